"""A convolution that is fast on tiny maps, where a CPU is slow (docs/speed.md has how much).

At 32x32 the last blocks of a stock ResNet work on 2x2 and 1x1 pixels, where most taps of a 3x3
kernel see only padding and the weight gradient costs more than all other layers together.
"""
import functools
import itertools

import torch
from torch import nn
from torch.nn import functional as F


class SmallInputConv2d(nn.Conv2d):
    """nn.Conv2d, as one matrix product on a CPU where the input has at most 2x2 pixels. Parameters,
    their names and, up to rounding, the result are the same."""

    def forward(self, images):
        height, width = images.shape[-2:]
        small = (images.device.type == "cpu" and height * width <= 4 and self.groups == 1
                 and self.dilation == (1, 1) and self.padding_mode == "zeros")
        find = _taps.__wrapped__ if torch.compiler.is_compiling() else _taps
        taps = small and find(height, width, self.kernel_size, self.stride, self.padding)
        if not taps:
            return super().forward(images)
        out_height, out_width, pairs = taps
        bias = None if self.bias is None else self.bias.repeat(out_height * out_width)
        flat = F.linear(images.permute(0, 2, 3, 1).reshape(len(images), -1),
                        _ByTap.apply(self.weight, pairs), bias)
        maps = flat.view(len(images), out_height, out_width, self.out_channels)
        return maps.permute(0, 3, 1, 2)


class _ByTap(torch.autograd.Function):
    """The matrix (outputs * out, inputs * into) of a convolution with a weight (out, into, kh, kw).

    pairs: ((the kernel's tap (y, x) for each input pixel), ... for each output pixel). Torch's own
    way to the gradient copies the weight, here mostly zeros, three times.
    """

    @staticmethod
    def forward(ctx, weight, pairs):
        ctx.save_for_backward(weight)
        ctx.pairs = pairs
        if len(pairs) == len(pairs[0]) == 1:
            return weight[:, :, pairs[0][0][0], pairs[0][0][1]].contiguous()
        matrix = weight.new_empty(len(pairs), len(weight), len(pairs[0]), weight.shape[1])
        for output, taps in enumerate(pairs):
            for number, (y, x) in enumerate(taps):
                matrix[output, :, number] = weight[:, :, y, x]
        return matrix.view(len(pairs) * len(weight), -1)

    @staticmethod
    def backward(ctx, gradient):
        weight, = ctx.saved_tensors
        found = torch.zeros_like(weight)
        gradient = gradient.view(len(ctx.pairs), len(weight), len(ctx.pairs[0]), weight.shape[1])
        for output, taps in enumerate(ctx.pairs):
            for number, (y, x) in enumerate(taps):
                found[:, :, y, x] += gradient[output, :, number]
        return found, None


@functools.lru_cache
def _taps(height, width, kernel, stride, padding):
    """(output height, output width, the pairs of `_ByTap`), or None where a pair has no tap, or
    where the padding is given by name ("same")."""
    if not isinstance(padding, tuple):
        return None
    steps = zip((height, width), kernel, stride, padding, strict=True)
    size = [(edge + 2 * pad - taps) // step + 1 for edge, taps, step, pad in steps]
    places = list(itertools.product(range(height), range(width)))
    pairs = tuple(tuple((in_y - y * stride[0] + padding[0], in_x - x * stride[1] + padding[1])
                        for in_y, in_x in places)
                  for y, x in itertools.product(range(size[0]), range(size[1])))
    inside = all(0 <= y < kernel[0] and 0 <= x < kernel[1] for taps in pairs for y, x in taps)
    return (size[0], size[1], pairs) if inside and pairs else None
