"""Packing: images of any kind become one uint8 array, memory-mapped, decoded once and reused for ever.

In:  `Images`, which read one image at a time.
Out: `Packed`, a folder with images.npy (uint8, N x size x size x 3), rows, labels, names, and what it was made from.
"""
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from PIL import Image

from run import Progress, UserError, say, write_json, write_text

IMAGE_SIZE = 32
MAX_BAD = 0.01          # share of unreadable images in a folder above which something else is wrong


@dataclass(frozen=True)
class Images:
    """Images that are not decoded yet: `read(i)` gives the i-th as a Pillow image of any mode and size."""

    count: int
    read: Callable
    made_from: str                      # changes when the files change
    labels: np.ndarray | None = None    # (count,) int64; None where there are none
    classes: list | None = None
    files: list | None = None           # paths below the data set's folder; None where it is one big array
    rows: np.ndarray | None = None      # which images of the whole data set these are; None: all of them

    def take(self, rows):
        """Those images alone. rows: (n,) int64."""
        return Images(len(rows), lambda i: self.read(int(rows[i])), self.made_from + digest(rows.tobytes()),
                      None if self.labels is None else self.labels[rows], self.classes,
                      None if self.files is None else [self.files[i] for i in rows],
                      rows if self.rows is None else self.rows[rows])

    def limited(self, limit):
        """At most `limit` images, evenly spaced, so that folders in the order of their classes keep all of them."""
        if limit is None or limit >= self.count:
            return self
        return self.take(np.linspace(0, self.count - 1, limit).round().astype(np.int64))


@dataclass(frozen=True)
class Packed:
    """A packed data set. images: (N, size, size, 3) uint8, memory-mapped; the rest as in `Images`."""

    images: np.ndarray
    labels: np.ndarray | None
    classes: list | None
    files: list | None
    rows: np.ndarray
    made_from: str

    def __len__(self):
        return len(self.images)


def decode(image, size=IMAGE_SIZE):
    """A Pillow image as (size, size, 3) uint8: what torchvision's Resize((size, size)) makes of it (bilinear,
    antialiased, aspect ratio not kept), grey as RGB."""
    image = image.convert("RGB")
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image)


def pack(images, folder, label, size=IMAGE_SIZE, chunk=2048):
    """Decodes `images` into `folder` unless it holds them already, and opens it. Memory holds one chunk.

    A file that can't be read is left out and listed with the reason in `bad.txt`; more than MAX_BAD of them
    is a UserError.
    """
    packed = open_pack(folder, images.made_from)
    if packed is not None:
        return packed
    beside = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{folder.parent} can't be written ({first_line(error)}): choose another --data-dir") from None
    progress = Progress(f"packing {label}", images.count)

    def read(i):
        try:
            return decode(images.read(i), size)
        except Exception as error:      # whatever a broken file makes a decoder raise
            return f"{type(error).__name__}: {first_line(error)}"

    try:
        out = np.lib.format.open_memmap(beside / "images.npy", "w+", np.uint8, (images.count, size, size, 3))
        good, bad = [], []
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for start in range(0, images.count, chunk):
                numbers = range(start, min(start + chunk, images.count))
                for i, pixels in zip(numbers, pool.map(read, numbers)):
                    if isinstance(pixels, str):
                        bad.append((i, pixels))
                    else:
                        out[len(good)] = pixels
                        good.append(i)
                progress.update(len(numbers))
        progress.close()
        out.flush()
        if bad:
            listing = "".join(f"{images.files[i] if images.files else i}\t{reason}\n" for i, reason in bad)
            if len(bad) > MAX_BAD * images.count:
                raise UserError(f"{label}: {len(bad)} of {images.count} images can't be read, the first is {listing.splitlines()[0]!r}")
            write_text(beside / "bad.txt", listing)
            whole = np.lib.format.open_memmap(beside / "good.npy", "w+", np.uint8, (len(good), size, size, 3))
            for start in range(0, len(good), chunk):
                whole[start:start + chunk] = out[start:min(start + chunk, len(good))]
            whole.flush()
            os.replace(beside / "good.npy", beside / "images.npy")
            say(f"{label}: {len(bad)} of {images.count} images can't be read and are left out, see {folder / 'bad.txt'}")
        rows = np.array(good, dtype=np.int64)
        np.save(beside / "rows.npy", rows if images.rows is None else images.rows[rows])
        if images.labels is not None:
            np.save(beside / "labels.npy", images.labels[rows])
        if images.files is not None:
            write_json(beside / "files.json", [images.files[i] for i in good])
        write_json(beside / "pack.json", {"images": len(good), "size": size, "made_from": images.made_from, "classes": images.classes})
        if folder.exists():     # made from files that have changed since
            os.replace(folder, beside.with_suffix(".old"))
            shutil.rmtree(beside.with_suffix(".old"))
        try:
            os.replace(beside, folder)
        except OSError:         # another process was faster; its pack is as good
            pass
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return open_pack(folder, images.made_from)


def open_pack(folder, made_from):
    """The pack in `folder`, or None where there is none or it was made from something else."""
    if not (folder / "pack.json").exists():
        return None

    def optional(name, read):
        return read(folder / name) if (folder / name).exists() else None

    try:
        meta = json.loads((folder / "pack.json").read_text())
        if meta["made_from"] != made_from:
            return None
        images = np.load(folder / "images.npy", mmap_mode="c")
        if images.shape != (meta["images"], meta["size"], meta["size"], 3):
            raise ValueError("it has another shape")
        return Packed(images, optional("labels.npy", np.load), meta["classes"],
                      optional("files.json", lambda path: json.loads(path.read_text())), np.load(folder / "rows.npy"), made_from)
    except (ValueError, OSError, KeyError) as error:
        raise UserError(f"{folder} is damaged ({first_line(error)}): delete it, it is packed anew") from None


def first_line(error):
    return (str(error).splitlines() or [type(error).__name__])[0]


def digest(content):
    return hashlib.sha256(content).hexdigest()[:16]


def state_of(root, paths):
    """A digest of names, sizes and times of change."""
    state = hashlib.sha256(os.path.realpath(root).encode("utf-8", "surrogateescape"))
    for path in paths:
        stat = os.stat(os.path.join(root, path))
        state.update(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return state.hexdigest()[:16]
