"""The networks of CIFAR's distillation papers, for images of 32 pixels: ResNets of three stages (He
et al., CVPR 2016), wide ones (Zagoruyko and Komodakis, BMVC 2016), VGGs with one linear layer.

Their parameters have the names of RepDistiller (Tian et al., ICLR 2020), so that its checkpoints
load. What it calls vgg13_bn is vgg13_bn_cifar here, as torchvision has another vgg13_bn.
"""
import re
from collections import OrderedDict
from itertools import pairwise

from torch import nn
from torchvision.models.resnet import BasicBlock


def _sequence(**layers):
    return nn.Sequential(OrderedDict(layers))


def _conv(into, out, size=3, stride=1, bias=False):
    conv = nn.Conv2d(into, out, size, stride, size // 2, bias=bias)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


def _stages(blocks, widths, block):
    """Three stages, block(into, out, stride) each; from the second on they begin with a stride."""
    return [nn.Sequential(block(into, out, stride),
                          *(block(out, out, 1) for _ in range(blocks - 1)))
            for (into, out), stride in zip(pairwise(widths), (1, 2, 2), strict=True)]


def _block(into, out, stride):
    other = stride > 1 or into != out
    shortcut = nn.Sequential(_conv(into, out, 1, stride), nn.BatchNorm2d(out)) if other else None
    block = BasicBlock(into, out, stride, shortcut)
    block.conv1, block.conv2 = _conv(into, out, stride=stride), _conv(out, out)
    return block


def _resnet(blocks, widths, count):
    layers = _stages(blocks, widths, _block)
    return _sequence(
        conv1=_conv(3, widths[0]), bn1=nn.BatchNorm2d(widths[0]), relu=nn.ReLU(inplace=True),
        **{f"layer{number}": layer for number, layer in enumerate(layers, 1)},
        avgpool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc=nn.Linear(widths[-1], count))


class PreActivationBlock(nn.Module):
    """Batch norm and ReLU come before each convolution. Where the width changes, the shortcut
    begins after the first of them."""

    def __init__(self, into, out, stride):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(into), _conv(into, out, stride=stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(out), _conv(out, out)
        self.relu = nn.ReLU(inplace=True)
        self.convShortcut = _conv(into, out, 1, stride) if into != out else None

    def forward(self, maps):
        first = self.relu(self.bn1(maps))
        shortcut = maps if self.convShortcut is None else self.convShortcut(first)
        return shortcut + self.conv2(self.relu(self.bn2(self.conv1(first))))


def _wrn(blocks, widths, count):
    stages = _stages(blocks, widths, PreActivationBlock)
    return _sequence(
        conv1=_conv(3, 16),
        **{f"block{number}": _sequence(layer=stage) for number, stage in enumerate(stages, 1)},
        bn1=nn.BatchNorm2d(widths[-1]), relu=nn.ReLU(inplace=True),
        avgpool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc=nn.Linear(widths[-1], count))


def _vgg(convolutions, count):
    """convolutions: of each of the five blocks."""
    layers, into = {}, 3
    for number, out in enumerate((64, 128, 256, 512, 512)):
        block = []
        for _ in range(convolutions):
            block += [_conv(into, out, bias=True), nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
            into = out
        layers |= {f"block{number}": nn.Sequential(*block[:-1]), f"relu{number}": block[-1]}
        if number < 3:
            layers[f"pool{number}"] = nn.MaxPool2d(2)
    return _sequence(**layers, pool4=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(),
                     classifier=nn.Linear(512, count))


def make(name, count):
    """One of kd.values.CIFAR_NETWORKS, for `count` classes."""
    depth, factor = map(int, [*re.findall(r"\d+", name), 1][:2])
    widths = [16 * factor, 32 * factor, 64 * factor]
    if name.startswith("wrn"):
        return _wrn((depth - 4) // 6, [16, *widths], count)
    if name.startswith("vgg"):      # their names count the two linear layers that are not there
        return _vgg((depth - 3) // 5, count)
    return _resnet((depth - 2) // 6, [32 if factor > 1 else 16, *widths], count)
