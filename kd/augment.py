"""Random changes of whole batches of uint8 images, on their device, without a loop over images.

What is drawn comes from a CPU generator that depends on the seed and the step alone, so that every
device and every resumed run sees the same views.
"""
import zlib

import torch

from kd import views
from kd.values import augmentations

MIXING = {"mixup", "cutmix"}        # augmentations that leave no image with one label


def step_generator(seed, epoch, step=None):
    """A CPU generator that depends on the seed, the epoch and, where given, the step alone."""
    number = ((seed * 1_000_003 + epoch) % 2 ** 63 if step is None else
              zlib.crc32(f"{seed}/{epoch}/{step}".encode()))
    return torch.Generator().manual_seed(number)


def shuffled_batches(rows, batch_size, generator, weights=None):
    """Splits `rows`, (N,) int64, in random order into full batches. A rest smaller than a batch
    waits for another epoch, unless it is all there is. weights: (N,), how often each comes in the
    long run, in place of once an epoch; drawn systematically, so that chance adds less than one."""
    batch_size = min(batch_size, len(rows))
    if weights is not None:
        edges = weights.double().cumsum(0)
        edges = edges * (len(rows) / edges[-1])
        points = torch.arange(len(rows)) + torch.rand((), generator=generator, dtype=torch.double)
        rows = rows[torch.searchsorted(edges, points).clamp_(max=len(rows) - 1)]
    order = rows[torch.randperm(len(rows), generator=generator)]
    return order[:len(rows) // batch_size * batch_size].split(batch_size)


def augment(images, steps, generator, batch=None, part=slice(None)):
    """Random views of a batch. images: (N, H, W, 3) uint8, and so are the views.

    steps: as `--augment` has them (kd.values.augmentations). First come those of kd/views.py. A
    crop shifts by up to an eighth of the edge either way; what comes in from outside is the image
    reflected at its edge. batch, part: where `images` are a part of a batch of that many, the views
    are those that the whole batch would be given; mixing partners are found in the part."""
    steps, (count, height, width, _) = augmentations(steps), images.shape
    if steps.keys() & set(views.STEPS):
        drawn = torch.rand((views.DRAWS, batch or count), generator=generator)[:, part]
        images = views.changed(images, steps, to_device(drawn, images.device))
    y = torch.arange(height, device=images.device).expand(count, height)
    x = torch.arange(width, device=images.device).expand(count, width)
    if "crop" in steps:
        padding = height // 8
        drawn = torch.randint(-padding, padding + 1, (2, batch or count, 1), generator=generator)
        shift = to_device(drawn[:, part], images.device)
        y = height - 1 - (height - 1 - (y + shift[0]).abs()).abs()      # reflected
        x = width - 1 - (width - 1 - (x + shift[1]).abs()).abs()
    if "flip" in steps:
        flip = to_device(torch.rand((batch or count, 1), generator=generator)[part] < 0.5, x.device)
        x = torch.where(flip, x.flip(1), x)
    if "crop" in steps or "flip" in steps:
        image = torch.arange(count, device=images.device)[:, None, None]
        images = images[image, y[:, :, None], x[:, None, :]]
    if MIXING & steps.keys():
        drawn = torch.rand((4, batch or count, 1, 1, 1), generator=generator)[:, part]
        images = _mixed(images, steps, to_device(drawn, images.device))
    return images


def _mixed(images, steps, drawn):
    """mixup (Zhang et al., arXiv 1710.09412) averages each image with another one of the batch,
    with a weight drawn evenly from 0 to 1, as Beyer et al. (arXiv 2106.05237) do for
    distillation; cutmix (Yun et al., arXiv 1905.04899) puts a rectangle of the other one there
    whose share of the area is as even. With both, each image has one of the two. drawn: (4, N, 1,
    1, 1) in [0, 1)."""
    weight, way, corner_y, corner_x = drawn
    partner, cut = images.roll(1, 0), images        # the batch is in random order already
    if "cutmix" in steps:
        inside = _rectangles(*images.shape[1:3], (1 - weight).sqrt(), corner_y, corner_x)
        if "mixup" in steps:
            inside = inside & (way < 0.5)
            weight = torch.where(way < 0.5, 1.0, weight)
        cut = torch.where(inside, partner, images)
    if "mixup" not in steps:
        return cut
    return torch.lerp(partner.float(), cut.float(), weight).round_().to(torch.uint8)


def _rectangles(height, width, edge, corner_y, corner_x):
    """(N, H, W, 1) bool: rectangles whose edges are the share `edge` of the image's."""
    top, left = (corner_y * (1 - edge) * height).round(), (corner_x * (1 - edge) * width).round()
    rows = torch.arange(height, device=edge.device).view(1, -1, 1, 1)
    columns = torch.arange(width, device=edge.device).view(1, 1, -1, 1)
    return ((rows >= top) & (rows < top + (edge * height).round())
            & (columns >= left) & (columns < left + (edge * width).round()))


def to_device(tensor, device):
    """A CPU tensor on the device. Only CUDA copies from pinned memory while the host goes on; on
    mps such a copy corrupts silently (pytorch#139550)."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
