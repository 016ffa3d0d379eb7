"""Networks: building them, their heads, their checkpoints.

Every stage handles a `Classifier`: a network together with what it needs to know about its input. It takes
packed uint8 batches as they come from the disk; scaling, resizing and memory layout happen inside it.
"""
import functools
import io
import itertools
from pathlib import Path

import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from download import RemoteFile, fetch, reachable
from packing import IMAGE_SIZE
from run import UserError, write_atomically

CIFAR_STEMS = {"resnet18_cifar": "resnet18", "resnet34_cifar": "resnet34"}
INPUT_SIZES = {"inception_v3": 299, "alexnet": 64, "maxvit_t": 224,     # the others take 32
               **dict.fromkeys(("vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32", "vit_h_14"), 224)}
CENTERED = (0.5, 0.5, 0.5)      # as mean and as deviation: pixels in [-1, 1]


class SmallInputConv2d(nn.Conv2d):
    """The same convolution, as one matrix product where the input is at most 2x2 and no tap sees only padding.

    At 32x32 the last blocks of a stock ResNet work on 2x2 and 1x1 pixels, where most taps of a 3x3 kernel see
    nothing but padding and the weight gradient of a convolution costs more than all other layers together.
    The parameters, their names and the result, up to rounding, are those of nn.Conv2d.
    """

    def forward(self, images):
        height, width = images.shape[-2:]
        taps = _taps(height, width, self.kernel_size, self.stride, self.padding) if (
            images.device.type == "cpu" and height * width <= 4 and self.groups == 1 and self.dilation == (1, 1) and self.padding_mode == "zeros") else None
        if taps is None:
            return super().forward(images)
        out_height, out_width, numbers = taps
        outputs, inputs, out, into = out_height * out_width, height * width, self.out_channels, self.in_channels
        by_tap = self.weight.permute(2, 3, 0, 1).reshape(-1, out, into)
        matrix = by_tap.index_select(0, torch.tensor(numbers, device=by_tap.device))
        matrix = matrix.view(outputs, inputs, out, into).permute(0, 2, 1, 3).reshape(outputs * out, inputs * into)
        bias = None if self.bias is None else self.bias.repeat(outputs)
        flat = F.linear(images.permute(0, 2, 3, 1).reshape(len(images), -1), matrix, bias)
        return flat.view(len(images), out_height, out_width, out).permute(0, 3, 1, 2)


@functools.lru_cache
def _taps(height, width, kernel, stride, padding):
    """(output height, output width, the kernel's tap for each pair of output and input pixel), or None where a
    pair has none. Raises nothing: padding given by name ("same") is left to the convolution."""
    if not isinstance(padding, tuple):
        return None
    size = [(edge + 2 * pad - taps) // step + 1
            for edge, taps, step, pad in zip((height, width), kernel, stride, padding)]
    numbers = []
    for out_y, out_x, in_y, in_x in itertools.product(range(size[0]), range(size[1]), range(height), range(width)):
        y, x = in_y - out_y * stride[0] + padding[0], in_x - out_x * stride[1] + padding[1]
        if not (0 <= y < kernel[0] and 0 <= x < kernel[1]):
            return None
        numbers.append(y * kernel[1] + x)
    return size[0], size[1], tuple(numbers)


class Classifier(nn.Module):
    """A network and its input: takes (N, H, W, 3) pixels in [0, 255], uint8 or float, gives logits (N, C).

    mean, std: three numbers each, of pixels in [0, 1]. input_size: edge in pixels that the network wants.
    A network with an auxiliary head gives a pair of logits while it trains.
    """

    def __init__(self, network, arch, classes, input_size=IMAGE_SIZE, mean=CENTERED, std=CENTERED):
        super().__init__()
        self.network = network.to(memory_format=torch.channels_last)
        for module in network.modules():
            if type(module) is nn.Conv2d:
                module.__class__ = SmallInputConv2d     # same parameters, same names
        self.arch, self.classes, self.input_size = arch, list(classes), input_size
        self.mean, self.std = [float(value) for value in mean], [float(value) for value in std]
        self.register_buffer("scale", torch.tensor([1 / (255 * s) for s in self.std]).view(3, 1, 1), persistent=False)
        self.register_buffer("shift", torch.tensor([-m / s for m, s in zip(self.mean, self.std)]).view(3, 1, 1), persistent=False)

    def forward(self, images):
        # (N, H, W, 3) in memory is (N, 3, H, W) in channels_last: the permutation moves nothing.
        pixels = torch.addcmul(self.shift, images.permute(0, 3, 1, 2).to(self.scale.dtype), self.scale)
        if pixels.shape[-1] != self.input_size:
            pixels = F.interpolate(pixels, (self.input_size, self.input_size), mode="bilinear", align_corners=False)
        return self.network(pixels)


def require_known(arch):
    """Raises UserError unless `arch` is a classifier of torchvision or one of CIFAR_STEMS."""
    if arch not in CIFAR_STEMS and arch not in torchvision.models.list_models(torchvision.models):
        raise UserError(f"no classifier is called {arch}: torchvision lists its own with torchvision.models.list_models(torchvision.models), "
                        f"and there are {' and '.join(CIFAR_STEMS)}")


def build(arch, classes, weights="none"):
    """A Classifier with a head for `classes` (names).

    weights: "none" (random, from torch's seed), "imagenet" (torchvision's; fetched where they aren't cached),
    or the path of a checkpoint. Raises UserError for an unknown architecture or a checkpoint that doesn't fit.
    """
    require_known(arch)
    base = CIFAR_STEMS.get(arch, arch)
    if weights not in ("none", "imagenet"):
        classifier = load(weights)
        if classifier.arch != arch:
            raise UserError(f"{weights} holds a {classifier.arch}, not a {arch}")
        if len(classifier.classes) != len(classes):
            replace_head(classifier.network, len(classifier.classes), len(classes))
        return Classifier(classifier.network, arch, classes, classifier.input_size, classifier.mean, classifier.std)
    options = {"init_weights": True} if base in ("inception_v3", "googlenet") else {}
    count = 1000 if weights == "imagenet" else len(classes)
    network = torchvision.models.get_model(base, weights=None, num_classes=count, **options)
    if weights == "imagenet":
        path = imagenet_weights(base)
        try:
            network.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
        except RuntimeError as error:
            raise UserError(f"{path} does not fit torchvision's {base} ({str(error).splitlines()[1].strip()}): give --teacher-weights none") from None
        replace_head(network, count, len(classes))
    if arch in CIFAR_STEMS:
        network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
        network.maxpool = nn.Identity()
    return Classifier(network, arch, classes, INPUT_SIZES.get(arch, IMAGE_SIZE))


def heads(network, classes):
    """[(parent module, name)] of every layer that gives `classes` logits, the auxiliary heads first, the head last."""
    found = [name for name, module in network.named_modules()
             if isinstance(module, nn.Linear) and module.out_features == classes
             or isinstance(module, nn.Conv2d) and module.out_channels == classes and module.kernel_size == (1, 1)]
    auxiliary = [name for name in found if "aux" in name.lower()]
    main = [name for name in found if name not in auxiliary][-1:]
    if not main:
        raise UserError(f"{type(network).__name__} has no linear layer that gives {classes} logits")
    paths = [name.rpartition(".") for name in auxiliary + main]
    return [(network.get_submodule(parent), name) for parent, _, name in paths]


def replace_head(network, old_classes, new_classes):
    """Puts new layers, randomly initialised, in place of those that give the logits."""
    for parent, name in heads(network, old_classes):
        old = getattr(parent, name)
        new = (nn.Linear(old.in_features, new_classes) if isinstance(old, nn.Linear)
               else nn.Conv2d(old.in_channels, new_classes, 1))
        setattr(parent, name, new)


def head_weight(classifier):
    """The rows w of the last linear layer, (C, D) float32: z = features @ w.T + bias."""
    parent, name = heads(classifier.network, len(classifier.classes))[-1]
    return getattr(parent, name).weight.detach().flatten(1).float()


# --------------------------------------------------------------------------------------------------
# ImageNet weights
# --------------------------------------------------------------------------------------------------

def _imagenet(arch):
    """(address, path in torch's cache) of torchvision's weights."""
    weights = torchvision.models.get_model_weights(CIFAR_STEMS.get(arch, arch)).DEFAULT
    name = weights.url.rpartition("/")[2]
    return weights.url, Path(torch.hub.get_dir()) / "checkpoints" / name


def require_fits(arch):
    """Raises UserError unless `arch` exists and takes images of our size."""
    require_known(arch)
    # On the meta device only shapes are computed. Some constructors can't run there and get a second, real try.
    for device in ("meta", "cpu"):
        try:
            with torch.device(device), torch.no_grad():
                build(arch, ["a", "b"]).eval()(torch.zeros(2, IMAGE_SIZE, IMAGE_SIZE, 3, dtype=torch.uint8))
            return
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
    raise UserError(f"{arch} does not take {IMAGE_SIZE}x{IMAGE_SIZE} images: {reason}")


def unavailable(choices):
    """A line for each of [(arch, weights)] that can't be had: what is missing, its address, where to put it by hand.

    Raises UserError for an architecture that doesn't exist or doesn't fit, and for a file that is no checkpoint.
    """
    lines = []
    for arch, weights in dict.fromkeys(choices):
        require_fits(arch)
        if weights == "imagenet":
            url, path = _imagenet(arch)
            reason = None if path.exists() else reachable((url,))
            if reason:
                lines.append(f"the ImageNet weights of {arch} are missing and {reason}: put that file at {path}, "
                             "or give --teacher-weights none")
        elif weights != "none":
            read(weights)
    return lines


def imagenet_weights(arch):
    """The path of torchvision's weights, fetched into torch's cache where they aren't there, checked against the hash in their name."""
    url, path = _imagenet(arch)
    fetch(RemoteFile((url,), sha256=path.stem.rpartition("-")[2]), path)
    return path


# --------------------------------------------------------------------------------------------------
# Checkpoints
# --------------------------------------------------------------------------------------------------

def save(path, classifier, **figures):
    """Writes a checkpoint of plain types and tensors. `figures` (accuracy, ...) go beside the weights."""
    buffer = io.BytesIO()
    torch.save({"arch": classifier.arch, "classes": classifier.classes, "input_size": classifier.input_size,
                "mean": classifier.mean, "std": classifier.std,
                "state_dict": {name: value.detach().cpu().contiguous() for name, value in classifier.network.state_dict().items()},
                **figures}, buffer)
    write_atomically(path, lambda file: file.write(buffer.getbuffer()))


def read(path):
    """A checkpoint's content. Nothing in the file is ever run: only tensors and plain types are read."""
    if not Path(path).is_file():
        raise UserError(f"{path}: there is no such checkpoint")
    try:
        content = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:
        raise UserError(f"{path} is not a checkpoint of tensors and plain types ({str(error).splitlines()[0][:120]})") from None
    if not isinstance(content, dict) or not {"arch", "classes", "input_size", "mean", "std", "state_dict"} <= set(content):
        raise UserError(f"{path} is not a checkpoint of this project: it lacks arch, classes, input_size, mean, std or state_dict")
    return content


def load(path):
    """The Classifier of a checkpoint, in eval mode."""
    content = read(path)
    classifier = build(content["arch"], content["classes"])
    try:
        classifier.network.load_state_dict(content["state_dict"])
    except RuntimeError as error:
        raise UserError(f"{path} does not fit a {content['arch']}: {str(error).splitlines()[1].strip()}") from None
    return Classifier(classifier.network, content["arch"], content["classes"], content["input_size"],
                      content["mean"], content["std"]).eval()
