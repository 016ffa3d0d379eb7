"""Sources that are drawn here, from the seed, for the job that needs no download (`--target digits`).

None of them holds a digit: `glyphs` are letters and signs of the font that Pillow ships, `photos` crops of the
photographs that scikit-learn ships, `noise` is noise. Glyphs take the way of scikit-learn's digits: an ink
drawing, black and white at 32x32, whose 4x4 blocks are counted, which gives 8x8 pixels of 17 grey levels.
"""
import functools
import hashlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from packing import Images

COUNTS = {"glyphs": 40_000, "photos": 6_000, "noise": 2_000}
LETTERS_AND_SIGNS = ("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
                     "!#$%&()*+/<=>?@[\\]^_{|}~\u00a9\u00ab\u00b1\u00bb\u2122")
_IS_INK = [0] * 101 + [255] * 155
CANVAS = 96     # pixels of the drawing before it is brought to 32x32


def read(name, seed):
    """The packing.Images of a built-in source. Image i depends on the seed and i alone."""
    draw = {"glyphs": draw_glyph, "photos": crop_photo, "noise": draw_noise}[name]
    number = list(COUNTS).index(name)
    code = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]     # drawn differently, packed anew
    return Images(COUNTS[name], lambda i: draw(np.random.default_rng((seed, number, i))), f"{name}/{seed}/{code}")


# --------------------------------------------------------------------------------------------------
# Glyphs
# --------------------------------------------------------------------------------------------------

@functools.lru_cache(maxsize=None)
def _ink(character, stroke):
    """The character in white on black, (CANVAS, CANVAS) Pillow image, its ink filling the middle."""
    font = ImageFont.load_default(CANVAS)
    left, top, right, bottom = font.getbbox(character, stroke_width=stroke)
    image = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(image).text((-left, -top), character, fill=255, font=font, stroke_width=stroke)
    width = max(10, round(image.width * 64 / max(image.height, 40)))
    height = max(10, round(image.height * 64 / max(image.height, 40)))
    whole = Image.new("L", (CANVAS, CANVAS))
    image = image.resize((min(width, CANVAS), min(height, CANVAS)))
    whole.paste(image, ((CANVAS - image.width) // 2, (CANVAS - image.height) // 2))
    return whole


def _drawing(rng):
    """One character, of random stroke, mirrored or turned, or two of which each gives a half."""
    stroke = int(rng.integers(0, 7))
    parts = []
    for _ in range(2):
        part = _ink(LETTERS_AND_SIGNS[rng.integers(len(LETTERS_AND_SIGNS))], stroke)
        if rng.random() < 0.3:
            part = part.transpose(Image.Transpose(int(rng.integers(0, 5))))     # mirrors and turns
        parts.append(part)
    drawing, other = parts
    if rng.random() < 0.5:      # the upper half of one on the lower half of another
        seam = CANVAS // 2 + int(rng.integers(-12, 13))
        drawing = drawing.copy()
        drawing.paste(other.crop((0, seam, CANVAS, CANVAS)), (0, seam))
    return drawing


def draw_glyph(rng):
    """An 8x8 grey Pillow image, white ink on black."""
    drawing = _drawing(rng)
    # Slanted, turned and bent: the corners of a box around the ink move on their own.
    angle, slant = rng.normal(0, 0.15), rng.normal(0, 0.15)
    wide, high = rng.uniform(0.75, 1.5), rng.uniform(0.85, 1.15)
    corners = np.array([(-1, -1), (-1, 1), (1, 1), (1, -1)], float) * CANVAS / 2
    corners = corners * (wide, high) + corners[:, ::-1] * (slant, 0)
    turn = np.array([(np.cos(angle), -np.sin(angle)), (np.sin(angle), np.cos(angle))])
    corners = corners @ turn.T + rng.normal(0, CANVAS / 25, (4, 2)) + CANVAS / 2
    bent = drawing.transform((CANVAS, CANVAS), Image.Transform.QUAD, tuple(corners.ravel()), Image.Resampling.BILINEAR)
    # Like the digits: the ink's box fills the height, is centred, and every 4x4 block counts its ink.
    box = bent.point(_IS_INK).getbbox() or (0, 0, CANVAS, CANVAS)
    height = int(rng.integers(27, 34))
    width = int(np.clip(round((box[2] - box[0]) / (box[3] - box[1]) * height * rng.uniform(0.6, 1.05)), 3, 26))
    ink = np.asarray(bent.crop(box).resize((width, height), Image.Resampling.BILINEAR)) > 110
    page = np.zeros((48, 48), bool)
    x, y = (48 - width) // 2 + int(rng.integers(-3, 4)), (48 - height) // 2 + int(rng.integers(-1, 2))
    page[y:y + height, x:x + width] = ink
    page = page[8:40, 8:40]
    page ^= rng.random(page.shape) < rng.choice((0.0, 0.0, 0.01, 0.03))
    counts = page.reshape(8, 4, 8, 4).sum((1, 3))
    return Image.fromarray((counts * (255 / 16)).round().astype(np.uint8))


# --------------------------------------------------------------------------------------------------
# Photographs and noise
# --------------------------------------------------------------------------------------------------

@functools.lru_cache(maxsize=None)
def _photographs():
    from sklearn.datasets import load_sample_images
    return [Image.fromarray(image) for image in load_sample_images().images]


def crop_photo(rng):
    """A crop of 12 to 400 pixels. Two of three are line drawings of it: edges as white strokes on black, 8x8."""
    photograph = _photographs()[rng.integers(2)]
    edge = int(round(np.exp(rng.uniform(np.log(12), np.log(400)))))
    x, y = rng.integers(0, photograph.width - edge + 1), rng.integers(0, photograph.height - edge + 1)
    crop = photograph.crop((x, y, x + edge, y + edge)).resize((32, 32), Image.Resampling.BILINEAR)
    style = rng.integers(3)
    if style == 0:
        return crop
    grey = np.asarray(crop.convert("L").filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 3)))).astype(float)
    if style == 1:      # where it is brightest, or darkest
        ink = (grey > np.quantile(grey, 1 - rng.uniform(0.15, 0.4))) if rng.random() < 0.5 else (grey < np.quantile(grey, rng.uniform(0.15, 0.4)))
    else:               # a line of equal brightness
        level, spread = np.quantile(grey, rng.uniform(0.2, 0.8)), rng.uniform(0.1, 0.25)
        distance = np.abs(grey - level)
        ink = distance <= np.quantile(distance, spread)
    counts = ink.reshape(8, 4, 8, 4).sum((1, 3))
    return Image.fromarray((counts * (255 / 16)).round().astype(np.uint8))


def draw_noise(rng):
    """Noise from 2x2 to 16x16 cells, in colour or grey, as contrasty as ink or as soft as fog."""
    cells = int(rng.integers(2, 17))
    noise = rng.normal(0.5, rng.uniform(0.1, 1.0), (cells, cells, 3))
    if rng.random() < 0.7:
        noise = noise[:, :, :1].repeat(3, 2)
    image = Image.fromarray((noise.clip(0, 1) * 255).round().astype(np.uint8))
    return image.resize((32, 32), Image.Resampling.BILINEAR)
