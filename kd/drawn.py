"""Sources that are drawn here, from the seed, for the job without a download (`--target digits`).

None of them holds a digit, and most are as unlike one as what a crawl brings: `noise` is noise,
`photos` are crops of scikit-learn's photographs, `glyphs` letters of five alphabets and signs, in
the faces that come with matplotlib. Glyphs are made as scikit-learn's digits were: an ink drawing,
black and white at 32x32, whose 4x4 blocks are counted: 8x8 pixels of 17 grey levels.
"""
import functools
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from kd.files import digest
from kd.readers import Images

COUNTS = {"noise": 16_000, "photos": 16_000, "glyphs": 16_000}
FACES = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono", "DejaVuSansMono-Oblique", "DejaVuSerif",
         "DejaVuSerif-Bold", "DejaVuSerif-Italic", "STIXGeneral", "STIXGeneralItalic")
ALPHABETS = ((0x41, 0x5a), (0x61, 0x7a), (0x391, 0x3a1), (0x3a3, 0x3c9), (0x410, 0x44f),
             (0x531, 0x556), (0x561, 0x586), (0x10d0, 0x10f0))      # Latin to Georgian
SIGNS = "!#$%&()*+/<=>?@[\\]^_{|}~\u00a9\u00ab\u00b1\u00bb\u2122"
IS_INK = [0] * 101 + [255] * 155
CANVAS = 96     # pixels of the drawing before it is brought to 32x32


def _draw(name, seed, i):
    """Image i of a source, which depends on the name, the seed and i alone."""
    draw = {"glyphs": draw_glyph, "photos": crop_photo, "noise": draw_noise}[name]
    return draw(np.random.default_rng((seed, list(COUNTS).index(name), i)))


def reader(name):
    """What reads a source: (seed, split) -> Images."""
    code = digest(Path(__file__).read_bytes())      # what is drawn differently is packed again
    return lambda seed, split: Images(COUNTS[name], functools.partial(_draw, name, seed),
                                      f"{name}/{seed}/{code}")


@functools.cache
def _face(number):
    """(Pillow's font, the characters that it has)."""
    import matplotlib
    from matplotlib import font_manager
    path = f"{matplotlib.get_data_path()}/fonts/ttf/{FACES[number]}.ttf"
    there = font_manager.get_font(path).get_charmap()
    letters = [chr(code) for first, last in ALPHABETS for code in range(first, last + 1)
               if code in there]
    return ImageFont.truetype(path, CANVAS), letters + list(SIGNS)


@functools.lru_cache(4_096)
def _ink(face, character, stroke):
    """The character in white on black, (CANVAS, CANVAS) Pillow image, its ink in the middle."""
    font, _ = _face(face)
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
    stroke, parts = int(rng.integers(0, 7)), []
    for _ in range(2):
        face = int(rng.integers(len(FACES)))
        letters = _face(face)[1]
        part = _ink(face, letters[rng.integers(len(letters))], stroke)
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
    bent = drawing.transform((CANVAS, CANVAS), Image.Transform.QUAD, tuple(corners.ravel()),
                             Image.Resampling.BILINEAR)
    # The ink's box fills the height and is centred, as a digit's does.
    box = bent.point(IS_INK).getbbox() or (0, 0, CANVAS, CANVAS)
    height, shape = int(rng.integers(27, 34)), (box[2] - box[0]) / (box[3] - box[1])
    width = int(np.clip(round(shape * height * rng.uniform(0.6, 1.05)), 3, 26))
    ink = np.asarray(bent.crop(box).resize((width, height), Image.Resampling.BILINEAR)) > 110
    page = np.zeros((48, 48), bool)
    x = (48 - width) // 2 + int(rng.integers(-3, 4))
    y = (48 - height) // 2 + int(rng.integers(-1, 2))
    page[y:y + height, x:x + width] = ink
    page = page[8:40, 8:40]
    page ^= rng.random(page.shape) < rng.choice((0.0, 0.0, 0.01, 0.03))
    return _counted(page)


def _counted(ink):
    """(32, 32) bool as an 8x8 grey image: how much ink each 4x4 block has."""
    counts = ink.reshape(8, 4, 8, 4).sum((1, 3))
    return Image.fromarray((counts * (255 / 16)).round().astype(np.uint8))


@functools.cache
def _photographs():
    from sklearn.datasets import load_sample_images
    return [Image.fromarray(image) for image in load_sample_images().images]


def crop_photo(rng):
    """A crop of 12 to 400 pixels. Two of three are line drawings of it: white strokes on black."""
    photograph = _photographs()[rng.integers(2)]
    edge = int(round(np.exp(rng.uniform(np.log(12), np.log(400)))))
    x = rng.integers(0, photograph.width - edge + 1)
    y = rng.integers(0, photograph.height - edge + 1)
    crop = photograph.crop((x, y, x + edge, y + edge))
    crop = crop.resize((32, 32), Image.Resampling.BILINEAR)
    style = rng.integers(3)
    if style == 0:
        return crop
    soft = crop.convert("L").filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 3)))
    grey = np.asarray(soft).astype(float)
    if style == 1:      # where it is brightest, or darkest
        if rng.random() < 0.5:
            return _counted(grey > np.quantile(grey, 1 - rng.uniform(0.15, 0.4)))
        return _counted(grey < np.quantile(grey, rng.uniform(0.15, 0.4)))
    # A line of equal brightness.
    level, spread = np.quantile(grey, rng.uniform(0.2, 0.8)), rng.uniform(0.1, 0.25)
    distance = np.abs(grey - level)
    return _counted(distance <= np.quantile(distance, spread))


def draw_noise(rng):
    """Noise of 2x2 to 16x16 cells, in colour or grey, as contrasty as ink or as soft as fog."""
    cells = int(rng.integers(2, 17))
    noise = rng.normal(0.5, rng.uniform(0.1, 1.0), (cells, cells, 3))
    if rng.random() < 0.7:
        noise = noise[:, :, :1].repeat(3, 2)
    image = Image.fromarray((noise.clip(0, 1) * 255).round().astype(np.uint8))
    return image.resize((32, 32), Image.Resampling.BILINEAR)
