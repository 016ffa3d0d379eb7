"""Sources: images of any kind as batches of uint8 pixels.

    Packed      images.npy, memory-mapped: decoded once, by all cores, and reused for ever
    Streamed    decoded as they are asked for; nothing is kept
"""
import contextlib
import mmap
import multiprocessing
import os
import shutil
import sys
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from kd.files import (
    UserError,
    file_digest,
    holding,
    one_field,
    read_product,
    say,
    write_sealed,
)
from kd.progress import Progress
from kd.readers import Chosen, Images, decode

FORKS = sys.platform == "linux"
BLOCK = 1 << 19             # bytes, about, that a worker packs at a time
TRIED = 100                 # of what could not be read, about, that is tried again


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
                    file = ""
                    with contextlib.suppress(Exception):    # of a shard that is gone
                        file = self.images.files[i] if self.images.files is not None else ""
                    what = one_field(f"{type(error).__name__}: {error}")
                    bad.append((i, one_field(file), what))
        return pixels[:len(good)], good, bad


def decoded(images, size, blocks):
    """What _Blocks makes of each of `blocks`, lists of image numbers, in order."""
    import torch

    from kd.processes import working_here
    workers = min(-(-cores() // working_here()), len(blocks)) if len(blocks) > 2 else 0
    return iter(torch.utils.data.DataLoader(
        _Blocks(images, size), batch_size=None, sampler=blocks, num_workers=workers,
        collate_fn=tuple, multiprocessing_context="fork" if workers and FORKS else None,
        worker_init_fn=_end_with_parent,
        generator=torch.Generator()))       # which leaves everybody else's random numbers alone


def _end_with_parent(_):
    """Ends this worker with the process that it works for, which may be killed: a worker would wait
    for ever for somebody to take what it has decoded."""
    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


def cores():
    """Cores that this process may use."""
    available = getattr(os, "sched_getaffinity", None)
    return len(available(0)) if available else os.cpu_count()


class Source:
    """What Packed and Streamed share. numbers: (N,) int64, which images of the whole data set they
    are; None where they are all."""

    @property
    def rows(self):
        """(N,) int64, which images of the whole data set these are."""
        return np.arange(len(self)) if self.numbers is None else self.numbers

    def batches(self, rows=None, batch_size=512, share=slice):
        """Yields (pixels (n, size, size, 3) uint8, index (n,) int64, a sequence of n file names).

        rows: (n,) int64, ascending, which images, as `index` numbers them; None for all.
        share(n): the slice of n batches that is wanted, as kd.processes.share_of has it.
        """
        numbers, where = self.numbers, range(len(self)) if rows is None else rows
        if rows is not None and numbers is not None:
            where = np.searchsorted(numbers, rows)
            if not np.array_equal(numbers[np.minimum(where, len(numbers) - 1)], rows):
                raise UserError(f"{self.name} has changed since it was scored: images are missing. "
                                "Add --restart-from scores.")
        wanted = [where[k:k + batch_size] for k in range(0, len(where), batch_size)]
        for pixels, at in self._pixels(wanted[share(len(wanted))], rows is None):
            yield pixels, at if numbers is None else numbers[at], (
                [""] * len(at) if self.files is None else Chosen(self.files, at))


@dataclass(frozen=True)
class Packed(Source):
    """images: (N, size, size, 3) uint8, memory-mapped; digest: of them; unreadable: [(number, file,
    what is wrong)] of the others; the rest as in Images."""

    name: str
    images: np.ndarray
    labels: np.ndarray | None
    classes: list | None
    files: Sequence | None
    numbers: np.ndarray | None
    fingerprint: str
    digest: str
    unreadable: list

    @property
    def bad(self):
        return len(self.unreadable)

    def __len__(self):
        return len(self.images)

    def _pixels(self, wanted, everything):
        for at in map(np.asarray, wanted):
            yield self.images[at], at
            release_pages(self.images)


class Streamed(Source):
    """Not decoded yet: nobody knows what can't be read (bad: 0)."""

    def __init__(self, name, source, size, max_bad):
        self.name, self.source, self.size, self.max_bad, self.bad = name, source, size, max_bad, 0
        self.files, self.numbers = source.files, source.rows
        self.fingerprint = source.fingerprint

    def __len__(self):
        return self.source.count

    def _pixels(self, wanted, everything):
        """What can't be read is missing in its batch. Raises UserError at the end where that is too
        much, at once where it was asked for by its number."""
        bad = []
        for pixels, good, failed in decoded(self.source, self.size, wanted):
            bad += failed
            if bad and not everything:
                raise UserError(f"{self.name} has changed since it was scored: {_first(bad)} can't "
                                "be read. Add --restart-from scores.")
            if good:
                yield pixels, np.array(good, np.int64)
        # Of several processes each saw a part, in which they may lie closer together.
        _require_few(self.name, bad, len(self), self.max_bad)


def release_pages(images):
    """Gives back the memory that reading a mapped array took; what is needed again is read again.
    Does nothing to other arrays."""
    mapping = getattr(images, "_mmap", None)
    if mapping is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapping.madvise(mmap.MADV_DONTNEED)


def _first(bad):
    """bad: [(number, file, what is wrong)]."""
    number, file, what = bad[0]
    return f"{file or number} ({what})"


def _require_few(name, bad, count, max_bad, listing=""):
    """Raises UserError where so many of `count` images are bad that something else is wrong."""
    if bad and (len(bad) > max_bad * count or len(bad) == count):
        raise UserError(f"{name}: {len(bad):,} of {count:,} images can't be read, more than "
                        f"--max-bad {max_bad:.4g} allows; the first is {_first(bad)}.{listing}")


def pack(images, folder, name, size, max_bad):
    """Decodes `images` into `folder` unless it holds them already. Returns the Packed.

    What can't be read is left out and listed in bad.txt, a line of file, reason and number each;
    UserError where that is more than the share `max_bad`.
    """
    packed = _as_of_now(images, folder, name, size)
    if packed is None:
        with holding(folder, f"packing {name}"):        # another process may make it meanwhile
            packed = _as_of_now(images, folder, name, size) or _make(images, folder, name, size)
    if packed.bad:
        listing = f" They are listed in {folder / 'bad.txt'}."
        _require_few(name, packed.unreadable, images.count, max_bad, listing)
        say(f"{name}: {packed.bad:,} of {images.count:,} images can't be read and are left out."
            f"{listing}")
    return packed


def open_pack(images, folder, name, size):
    """The Packed in `folder`; None where none is whole, of these files and of this size."""
    content, _ = read_product(folder, "pack.json")
    if content is None or content["made_from"] != [images.fingerprint, size]:
        return None
    pixels = np.load(folder / "images.npy", mmap_mode="r")
    bad = content["bad"]
    kept = images.take(np.delete(np.arange(images.count), [i for i, *_ in bad])) if bad else images
    return Packed(name, pixels, kept.labels, kept.classes, kept.files, kept.rows,
                  images.fingerprint, content["files"]["images.npy"], bad)


def _as_of_now(images, folder, name, size):
    """As of open_pack; None also where some of what could not be read now can, by another owner or
    another Pillow."""
    packed = open_pack(images, folder, name, size)
    if packed is None or not os.access(folder.parent, os.W_OK):
        return packed
    numbers = [number for number, *_ in packed.unreadable]
    readable = _Blocks(images, size)[numbers[::max(1, len(numbers) // TRIED)]][1]
    return None if readable else packed


def _make(images, folder, name, size):
    """What is being made is `<folder>.part`. pack.json comes last: without it there is no pack."""
    if folder.exists():
        say(f"{folder} is damaged, or its files have changed or can be read now. It will be made "
            "again.")
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)     # of an attempt that was killed
    part.mkdir()
    bad = _fill(part / "images.npy", images, name, size)
    lines = [f"{file}\t{what}\t{i}\n" for i, file, what in bad]
    (part / "bad.txt").write_text("".join(lines), "utf-8", "surrogateescape")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)
    write_sealed(folder / "pack.json", {
        "bad": bad, "made_from": [images.fingerprint, size],
        "files": {each: file_digest(folder / each) for each in ("images.npy", "bad.txt")}})
    return open_pack(images, folder, name, size)


def _fill(path, images, name, size):
    """Writes a .npy file. Returns [(number, file, what is wrong)] of what can't be read."""
    def write_header(count):        # as long for any count: numpy leaves room for larger ones
        np.lib.format.write_array_header_1_0(
            file, {"descr": "|u1", "fortran_order": False, "shape": (count, size, size, 3)})

    bad, step = [], max(16, BLOCK // (size * size * 3))
    blocks = [range(images.count)[i:i + step] for i in range(0, images.count, step)]
    with open(path, "wb") as file, Progress(f"packing {name}", images.count) as progress:
        write_header(images.count)
        for block, good, failed in decoded(images, size, blocks):
            file.write(block)
            bad += failed
            progress.update(len(good) + len(failed))
        file.seek(0)
        write_header(images.count - len(bad))
    return bad
