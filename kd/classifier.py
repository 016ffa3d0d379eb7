"""A network together with what it takes."""
import torch
from torch import nn
from torch.nn import functional as F

from kd.settings import IMAGE_SIZE
from kd.small_conv import SmallInputConv2d

CENTERED = (0.5, 0.5, 0.5)      # as mean and as deviation: pixels in [-1, 1]
IMAGENET = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


class Classifier(nn.Module):
    """A network and its input: (N, H, W, 3) pixels in [0, 255], uint8 or float -> logits (N, C).

    mean, std: three numbers each, of pixels in [0, 1]. input_size: edge in pixels that the network
    wants. One whose first convolution has one channel gets grey images. One with auxiliary heads
    gives a tuple of logits while it trains.
    """

    def __init__(self, network, arch, classes, input_size=IMAGE_SIZE, mean=CENTERED, std=CENTERED):
        super().__init__()
        self.network = network.float().to(memory_format=torch.channels_last)
        convolutions = [each for each in network.modules() if isinstance(each, nn.Conv2d)]
        for module in convolutions:
            if type(module) is nn.Conv2d:
                module.__class__ = SmallInputConv2d     # same parameters, same names
        self.grey = bool(convolutions) and convolutions[0].in_channels == 1
        self.contiguous = False
        self.arch, self.classes, self.input_size = arch, list(classes), input_size
        self.normalise(mean, std)

    def normalise(self, mean, std):
        self.mean, self.std = [float(value) for value in mean], [float(value) for value in std]
        if self.arch in ("inception_v3", "googlenet"):  # what torchvision gives those trained so
            self.network.transform_input = (self.mean, self.std) == IMAGENET
        scale = torch.tensor([1 / (255 * s) for s in self.std])
        shift = torch.tensor([-m / s for m, s in zip(self.mean, self.std, strict=True)])
        self.register_buffer("scale", scale.view(3, 1, 1), persistent=False)
        self.register_buffer("shift", shift.view(3, 1, 1), persistent=False)

    def forward(self, images):
        # (N, H, W, 3) in memory is (N, 3, H, W) in channels_last: the permutation moves nothing.
        pixels = images.permute(0, 3, 1, 2).to(self.scale.dtype)
        pixels = self.fitted(torch.addcmul(self.shift, pixels, self.scale))
        if self.contiguous:
            return self.network(pixels.contiguous())
        try:
            return self.network(pixels)
        except RuntimeError as error:       # x.view(len(x), -1), as every course has it
            if "view size is not compatible" not in str(error):
                raise
        with torch.inference_mode(False):
            self.use_torchs_layout()
        return self.forward(images)

    def to(self, *args, **kwargs):
        """As of any module. On mps, which has had wrong results in channels_last, without it."""
        moved = super().to(*args, **kwargs)
        if self.scale.device.type == "mps":
            self.use_torchs_layout()
        return moved

    def use_torchs_layout(self):
        as_torch_has_it(self.network)
        self.contiguous = True

    def fitted(self, pixels):
        """Normalised (N, 3, H, W) pixels in the network's size and colours; grey as Pillow's."""
        size = self.input_size, self.input_size
        if pixels.shape[-2:] != size:       # shrunk as Pillow does it
            pixels = F.interpolate(pixels, size, mode="bilinear", align_corners=False,
                                   antialias=max(pixels.shape[-2:]) > self.input_size)
        if self.grey:
            red, green, blue = pixels.split(1, 1)
            pixels = 0.299 * red + 0.587 * green + 0.114 * blue
        return pixels

    def takes(self):
        """What the network is given, in words."""
        mean, std = (", ".join(f"{value:.4g}" for value in each) for each in (self.mean, self.std))
        size, inside = self.input_size, getattr(self.network, "transform_input", False)
        return (f"{'grey ' * self.grey}images of {size}x{size} pixels, mean {mean}, std {std}"
                f"{', transform_input' * inside}")


def as_torch_has_it(network):
    """Undoes what Classifier does to a network: its memory layout, the class of convolutions."""
    for module in network.modules():
        if type(module) is SmallInputConv2d:
            module.__class__ = nn.Conv2d
    return network.to(memory_format=torch.contiguous_format)
