"""Views of a batch against a loop over its images."""
import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates
from scipy.spatial.transform import Rotation

from kd import views
from kd.augment import augment
from kd.values import augmentations

pytestmark = pytest.mark.quick


def slowly_augmented(images, steps, draws):
    """One image after the other, with what an equally seeded generator draws."""
    (count, height, width, _), padding = images.shape, images.shape[1] // 8
    down = right = mirrored = [0] * count
    if "crop" in steps:
        down, right = torch.randint(-padding, padding + 1, (2, count), generator=draws).tolist()
        assert min(down) == min(right) == -padding and max(down) == max(right) == padding
    if "flip" in steps:
        mirrored = (torch.rand(count, generator=draws) < 0.5).tolist()
    weight, way, *corner = torch.rand(4, count, generator=draws).numpy()
    views = []
    for i, image in enumerate(images):
        padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)), mode="reflect")
        image = padded[padding + down[i]:, padding + right[i]:][:height, :width]
        views.append(image[:, ::-1] if mirrored[i] else image)
    mixed = list(views)
    for i, view in enumerate(views):
        if "cutmix" in steps and ("mixup" not in steps or way[i] < 0.5):
            edge = np.sqrt(1 - weight[i])
            top, left = (round(float(each[i] * (1 - edge) * side)) for each, side in
                         zip(corner, (height, width), strict=True))
            cut = (slice(top, top + round(float(edge * height))),
                   slice(left, left + round(float(edge * width))))
            mixed[i] = view.copy()
            mixed[i][cut] = views[i - 1][cut]
        elif "mixup" in steps:
            mixed[i] = np.round(views[i - 1] + weight[i] * (view - views[i - 1].astype(np.float32)))
    return np.stack(mixed)


@pytest.mark.parametrize("steps", [
    "crop", "flip", "crop,flip", "mixup", "cutmix", "flip,cutmix", "crop,flip,mixup,cutmix"])
@pytest.mark.parametrize("height, width", [(32, 32), (16, 24)])
def test_augment_is_what_a_loop_over_images_makes(steps, height, width):
    images = np.random.default_rng(0).integers(0, 256, (120, height, width, 3), np.uint8)
    given, seeded = torch.from_numpy(images.copy()), torch.Generator().manual_seed
    views = augment(given, steps, seeded(5))
    expected = slowly_augmented(images, steps.split(","), seeded(5))
    apart = np.abs(views.numpy().astype(int) - expected)
    # A weight may be rounded to the other side of a half grey level.
    assert apart.max() <= ("mixup" in steps) and (apart > 0).mean() < 1e-3
    assert views.dtype == torch.uint8 and np.array_equal(given.numpy(), images)


def smooth(count=40, height=32, width=24):
    """Images without sharp edges, so that a rounding of a place moves no pixel by much."""
    rng = np.random.default_rng(0)
    waves = np.sin(np.arange(height)[:, None, None] / 5 + np.arange(width)[:, None] / 7
                   + rng.uniform(0, 6, (count, 1, 1, 3)))
    return (127.5 + 120 * waves).round().astype(np.uint8)


def slowly_placed(image, least, degrees, area, side, x, y, turn):
    """The crop and turn of one image, pixel by pixel; outside it is reflected."""
    height, width, _ = image.shape
    edge, ratio = np.sqrt(least + (1 - least) * area), (4 / 3) ** (side - 0.5) if least < 1 else 1
    wide, high = min(edge * ratio, 1), min(edge / ratio, 1)
    angle = np.radians((2 * turn - 1) * degrees)
    down, right = np.mgrid[:height, :width]
    right, down = (2 * right + 1) / width - 1, (2 * down + 1) / height - 1      # from -1 to 1
    across = wide * np.cos(angle) * right - high * np.sin(angle) * down + (2 * x - 1) * (1 - wide)
    along = wide * np.sin(angle) * right + high * np.cos(angle) * down + (2 * y - 1) * (1 - high)
    places = [((along + 1) * height - 1) / 2, ((across + 1) * width - 1) / 2]
    return np.stack([map_coordinates(image[:, :, k].astype(float), places, order=1, mode="reflect")
                     for k in range(3)], 2)


@pytest.mark.parametrize("steps", ["rrc", "rotate", "rrc:0.1,rotate:45"])
def test_crops_and_turns_are_what_a_loop_over_images_makes(steps):
    images, strengths = smooth(), augmentations(steps)
    drawn = torch.rand((views.DRAWS, 40), generator=torch.Generator().manual_seed(3))
    found = augment(torch.from_numpy(images), steps, torch.Generator().manual_seed(3)).numpy()
    for i, image in enumerate(images):
        expected = slowly_placed(image, strengths.get("rrc", 1.0), strengths.get("rotate", 0.0),
                                 *drawn[:5, i].tolist())
        assert np.abs(found[i] - expected).max() <= 1.01
    assert (found != images).any((1, 2, 3)).mean() > 0.9


def test_colours_are_those_of_their_definition():
    images, luma = smooth(), np.array([0.299, 0.587, 0.114])
    found = augment(torch.from_numpy(images), "colour", torch.Generator().manual_seed(3)).numpy()
    drawn = torch.rand((views.DRAWS, 40), generator=torch.Generator().manual_seed(3)).numpy()
    for image, view, draws in zip(images, found, 2 * drawn[5:].T - 1, strict=True):
        bright, contrast, saturation = np.exp(0.5 * draws[:3])
        hue = Rotation.from_rotvec(np.full(3, 3 ** -0.5) * np.radians(18 * draws[3]))
        turned = image @ hue.as_matrix().T
        coloured = saturation * turned + (1 - saturation) * (turned @ luma)[:, :, None]
        expected = bright * (contrast * coloured + (1 - contrast) * image.mean((0, 1)) @ luma)
        assert np.abs(view - expected.clip(0, 255)).max() <= 0.51
