"""Views that widen what a pool shows: random resized crops, turns and colours of whole batches, as
one affine grid and one matrix of colours per image.

A teacher that answers every view teaches a function and not a list of images (Beyer et al., arXiv
2106.05237); views stand in for images that nobody has (Asano & Saeed, arXiv 2112.00725).

    rrc:0.25    a random resized crop of 0.25 to 1 of the area, sides 3:4 to 4:3 (Szegedy et al.)
    rotate:15   turned by up to 15 degrees either way; what comes in from outside is a reflection
    colour:0.5  brightness, contrast, saturation times e^-0.5 to e^0.5, hue by up to 18 degrees
"""
import functools
import math

import torch
from torch.nn import functional as F

STEPS = ("rrc", "rotate", "colour")
DRAWS = 9       # numbers per image, whichever steps there are: one more step moves no other


def changed(images, steps, drawn):
    """Views of a batch. images: (N, H, W, 3) uint8, and so are the views; steps: {name: strength};
    drawn: (DRAWS, N) in [0, 1), on the images' device."""
    count, height, width, _ = images.shape
    pixels = images.permute(0, 3, 1, 2).float()         # moves nothing: channels_last
    if "rrc" in steps or "rotate" in steps:
        grid = F.affine_grid(_places(steps, drawn[:5]), (count, 3, height, width),
                             align_corners=False)
        pixels = F.grid_sample(pixels, grid, "bilinear", "reflection", align_corners=False)
    if "colour" in steps:
        matrix, offset = _colours(steps["colour"], drawn[5:], pixels)
        pixels = torch.baddbmm(offset[:, :, None], matrix, pixels.flatten(2))
        pixels = pixels.view(count, 3, height, width)
    pixels = pixels.round_().clamp_(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous()


def _places(steps, drawn):
    """(N, 2, 3): where in its image, from -1 to 1, each place of a view lies."""
    area, side, x, y, turn = drawn
    least = steps.get("rrc", 1.0)
    edge = (least + (1 - least) * area).sqrt()
    ratio = (4 / 3) ** (side - 0.5) if "rrc" in steps else torch.ones_like(side)
    wide, high = (edge * ratio).clamp(max=1), (edge / ratio).clamp(max=1)
    left, top = (2 * x - 1) * (1 - wide), (2 * y - 1) * (1 - high)
    angle = (2 * turn - 1) * math.radians(steps.get("rotate", 0.0))
    sine, cosine = angle.sin(), angle.cos()
    return torch.stack([torch.stack([wide * cosine, -high * sine, left], 1),
                        torch.stack([wide * sine, high * cosine, top], 1)], 1)


@functools.cache
def _constants(device):
    """Copied there once: a copy waits for the device."""
    axis = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]], device=device) / math.sqrt(3)
    return torch.tensor([0.299, 0.587, 0.114], device=device), axis, torch.eye(3, device=device)


def _colours(strength, drawn, pixels):
    """(N, 3, 3), (N, 3): what the colours of an image become. Contrast is about its mean grey; the
    hue is a turn about the grey axis (Rodrigues)."""
    bright, contrast, saturation = ((2 * drawn[:3] - 1) * strength).exp()
    angle = ((2 * drawn[3] - 1) * math.radians(36 * strength))[:, None, None]
    saturation = saturation[:, None, None]
    luma, axis, one = _constants(pixels.device)
    mean = pixels.mean((2, 3)) @ luma
    turned = one + angle.sin() * axis + (1 - angle.cos()) * (axis @ axis)
    matrix = (saturation * one + (1 - saturation) * luma.expand(3, 3)) @ turned
    offset = (bright * (1 - contrast) * mean)[:, None].expand(-1, 3)
    return (bright * contrast)[:, None, None] * matrix, offset
