"""Decoding: a Pillow image as uint8 pixels, and many of them by all cores."""
import contextlib
import ctypes
import functools
import os
import signal
import struct
import sys
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from kd.files import UserError, first_line, one_field
from kd.readers import FORMATS, Images

BLOCK = 1 << 19             # bytes, about, that a worker decodes at a time
FORKS = sys.platform == "linux"
# What an EXIF that can't be read makes Pillow raise. It turns nothing, and the image is read.
BAD_EXIF = (OSError, SyntaxError, ValueError, TypeError, LookupError, AttributeError, struct.error)


def decode(image, size):
    """A Pillow image as (size, size, 3) uint8: what torchvision's Resize((size, size)) makes of it
    as RGB (bilinear, antialiased, aspect ratio not kept)."""
    image = as_shown(image)
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image)


def as_shown(image):
    """A Pillow image in RGB as a viewer shows it: turned as its EXIF says, of more than 8 bits the
    upper eight, what is transparent on white. Raises ValueError where no range is stated."""
    if image.mode == "RGB" and not image.info.keys() & {"exif", "transparency"}:
        return image
    if image.mode == "F" or image.mode == "I" and image.format not in ("PNG", "PPM"):
        kind = "floating-point" if image.mode == "F" else "signed or 32-bit"
        raise ValueError(f"{kind} pixels have no fixed range")
    tags = getattr(image, "tag_v2", {})     # of a TIFF
    if "exif" in image.info:
        with contextlib.suppress(*BAD_EXIF):
            image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = _of_eight_bits(image, tags)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _of_eight_bits(image, tags):
    """A grey image of more than 8 bits. How many, and whether 0 is white, is what its file says."""
    bits, clear = tags.get(258, (16,))[0], image.info.get("transparency")
    pixels = np.asarray(image).astype(np.int32)
    grey = ((1 << bits) - 1 - pixels if tags.get(262) == 0 else pixels) >> (bits - 8)
    if isinstance(clear, int):
        grey[pixels == clear] = 255
    return Image.fromarray(grey.astype(np.uint8))


@dataclass(frozen=True)
class _Blocks:
    """What a worker does: image numbers -> ((n, size, size, 3) uint8 of those that can be read,
    their numbers, [(number, file, what is wrong)] of the others)."""

    images: Images
    size: int

    def __getitem__(self, numbers):
        pixels = np.empty((len(numbers), self.size, self.size, 3), np.uint8)
        good, bad = [], []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")     # about files that are odd and can be read
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            for i in map(int, numbers):
                try:
                    pixels[len(good)] = decode(self.images.read(i), self.size)
                    good.append(i)
                except Exception as error:      # whatever a broken file makes a decoder raise
                    file = "" if self.images.files is None else self.images.files[i]
                    bad.append((i, one_field(file), _what_is_wrong(error)))
        return pixels[:len(good)], good, bad


def _what_is_wrong(error):
    if isinstance(error, UnidentifiedImageError):
        return f"no {', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
    kind = "" if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: "
    return one_field(kind + first_line(error))


def block_of(size):
    """How many images a worker decodes at a time."""
    return max(16, BLOCK // (size * size * 3))


def decoded(images, label, size, blocks, count):
    """Yields what _Blocks makes of each of `blocks`, an iterable of `count` lists of image numbers,
    in order. Raises UserError where a process that decodes dies."""
    import torch

    from kd.processes import working_here
    workers = min(-(-cores() // working_here()), count) if count > 2 else 0
    loader = torch.utils.data.DataLoader(
        _Blocks(images, size), batch_size=None, sampler=blocks, num_workers=workers,
        collate_fn=tuple, worker_init_fn=functools.partial(_die_with_parent, os.getpid()),
        multiprocessing_context="fork" if workers and FORKS else None,
        generator=torch.Generator())        # which leaves everybody else's random numbers alone
    done = 0
    try:
        for block in loader:
            done += len(block[1]) + len(block[2])
            yield block
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(f"{label}: a process that decodes images died after {done:,} images, of "
                        "too little memory or of a file that breaks the decoder. Run the same "
                        "command again to resume.") from None


def _die_with_parent(parent, worker):
    """DataLoader's workers look only every few seconds whether their parent is gone."""
    if FORKS:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)      # PR_SET_PDEATHSIG
        if os.getppid() != parent:                      # it died before that
            os._exit(1)


def cores():
    """Cores that this process may use."""
    available = getattr(os, "sched_getaffinity", None)
    return len(available(0)) if available else os.cpu_count()
