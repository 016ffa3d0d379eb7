"""Sources: images of any kind as batches of uint8 pixels.

    Packed      images.npy, memory-mapped: decoded once, by all cores, and reused for ever
    Streamed    decoded as they are asked for; nothing is kept
"""
import contextlib
import io
import mmap
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from kd.decoding import block_of, decoded
from kd.files import (
    UserError,
    file_digest,
    first_line,
    holding,
    read_json,
    require_space,
    say,
    write_json,
    write_text,
)
from kd.progress import Progress
from kd.readers import Chosen, Images

SAVE_INTERVAL = 2.0         # seconds: what a kill can cost
UNRELEASED = 1 << 24        # bytes read from a memory map before they are given back
DARK = 64                   # of 255: images without a brighter pixel are misread


class Source:
    """What Packed and Streamed share. numbers: (N,) int64, which images of the whole data set they
    are; None where they are all."""

    @property
    def rows(self):
        """(N,) int64, which images of the whole data set these are."""
        return np.arange(len(self)) if self.numbers is None else self.numbers

    def batches(self, rows=None, batch_size=512, part=(0, 1)):
        """Yields (pixels (n, size, size, 3) uint8, index (n,) int64, a sequence of n file names).

        rows: (n,) int64, ascending, which images, as `index` numbers them; None for all. part:
        (rank, world size), for that process's contiguous share of a single process's batches.
        """
        where = range(len(self)) if rows is None else rows
        if rows is not None and self.numbers is not None:
            where = np.searchsorted(self.numbers, rows)
        total, (rank, processes) = -(-len(where) // batch_size), part
        numbers = range(rank * total // processes, (rank + 1) * total // processes)
        wanted = [where[k * batch_size:(k + 1) * batch_size] for k in numbers]
        for pixels, at in self._pixels(wanted, rows is None):
            yield pixels, at if self.numbers is None else self.numbers[at], (
                [""] * len(at) if self.files is None else Chosen(self.files, at))


@dataclass(frozen=True)
class Packed(Source):
    """images: (N, size, size, 3) uint8, memory-mapped; bad: how many others can't be read; the rest
    as in Images."""

    name: str
    images: np.ndarray
    labels: np.ndarray | None
    classes: list | None
    files: Sequence | None
    numbers: np.ndarray | None
    fingerprint: str
    bad: int

    def __len__(self):
        return len(self.images)

    @property
    def size(self):
        return self.images.shape[1]

    def _pixels(self, wanted, everything):
        unreleased = 0
        for at in map(np.asarray, wanted):
            pixels = self.images[at]
            unreleased += pixels.nbytes
            if unreleased > UNRELEASED:
                release_pages(self.images)
                unreleased = 0
            yield pixels, at


@dataclass
class Streamed(Source):
    """Not decoded yet. unreadable: [(number, file, what is wrong)] of the images that this process
    could not read in its last pass."""

    name: str
    source: Images
    size: int
    max_bad: float
    unreadable: list = field(default_factory=list)

    def __post_init__(self):
        self.files, self.numbers = self.source.files, self.source.rows
        self.fingerprint = self.source.fingerprint

    def __len__(self):
        return self.source.count

    @property
    def bad(self):
        return len(self.unreadable)

    def _pixels(self, wanted, everything):
        """What can't be read is missing in its batch. Raises UserError where that is too much, or
        was asked for by its number."""
        step, self.unreadable = block_of(self.size), []
        count = sum(-(-len(at) // step) for at in wanted)
        blocks = (at[i:i + step] for at in wanted for i in range(0, len(at), step))
        made = decoded(self.source, self.name, self.size, blocks, count)
        for at in wanted:
            pixels, good = np.empty((len(at), self.size, self.size, 3), np.uint8), []
            for _ in range(0, len(at), step):
                block, numbers, bad = next(made)
                pixels[len(good):len(good) + len(numbers)] = block
                good += numbers
                self.unreadable += bad
            _require_few(self.name, self.unreadable, len(self), self.max_bad * everything)
            if at is wanted[0]:
                _say_if_dark(self.name, pixels[:len(good)])
            if good:
                yield pixels[:len(good)], np.array(good, np.int64)


def release_pages(images):
    """Gives back the memory that reading a memory-mapped array has taken; what is needed again is
    read again. Does nothing to other arrays."""
    mapping = getattr(images, "_mmap", None)
    if mapping is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapping.madvise(mmap.MADV_DONTNEED)


def _say_if_dark(label, pixels):
    if len(pixels) and pixels.max() < DARK:
        say(f"{label}: the images are nearly black, no pixel is above {pixels.max()} of 255. If "
            "their files hold 12 bits in 16, scale them to the full range.")


def _require_few(label, bad, count, max_bad, listing=None):
    """bad: [(number, file, what is wrong)]. Raises UserError where they are too many."""
    if len(bad) > max_bad * count or len(bad) == count:
        number, file, what = bad[0]
        listed = f" All are listed in {listing}." if listing else ""
        raise UserError(f"{label}: {len(bad):,} of {count:,} images can't be read, more than "
                        f"{max_bad:.4g} of all; the first is {file or number} ({what}).{listed} "
                        f"--max-bad {min(1, len(bad) / count + 0.005):.2f} leaves them out.")


def pack(images, folder, name, size, max_bad):
    """Decodes `images` into `folder` unless it holds them already. Returns the Packed.

    What can't be read is left out and listed in bad.txt, a line of file, reason and number each;
    UserError where that is more than the share `max_bad`. What is being made is `<folder>.part`,
    which a later call continues.
    """
    packed = open_pack(images, folder, name, size, tell=False)
    if packed is None:
        with holding(folder, f"packing {name}"):
            packed = open_pack(images, folder, name, size)      # made while we waited
            if packed is None:
                _make(images, folder, name, size, max_bad)
                packed = open_pack(images, folder, name, size)
    if packed.bad:
        listing = folder / "bad.txt"
        _require_few(name, _listed(listing), images.count, max_bad, listing)
        say(f"{name}: {packed.bad:,} of {images.count:,} images can't be read and are left out. "
            f"They are listed in {listing}.")
    _say_if_dark(name, packed.images[::len(packed) // 500 + 1])
    return packed


def open_pack(images, folder, name, size, tell=True):
    """The Packed in `folder`; None where there is none, it was made of other files or in another
    size, or it is damaged, which is said if `tell`."""
    meta = read_json(folder / "pack.json") or {}
    if (meta.get("fingerprint"), meta.get("size")) != (images.fingerprint, size):
        return None
    try:
        _require_as_written(folder, meta["digests"])
        pixels = np.load(folder / "images.npy", mmap_mode="c")
        bad = [number for number, *_ in _listed(folder / "bad.txt")]
        if len(pixels) + len(bad) != images.count:
            raise ValueError("it holds another number of images")
    except (ValueError, OSError, LookupError, TypeError) as error:
        if tell:
            say(f"{folder} is damaged ({first_line(error)}). It will be made again.")
        return None
    kept = images.take(np.delete(np.arange(images.count), bad)) if bad else images
    return Packed(name, pixels, kept.labels, kept.classes, kept.files, kept.rows,
                  images.fingerprint, len(bad))


def _require_as_written(folder, digests):
    """Raises ValueError where a file of a pack is not what was written there. What was read through
    once is not read again until it changes."""
    now = dict(digests)
    for name in digests:
        status = os.stat(folder / name)
        now[name] += f" {status.st_ino} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
    if read_json(folder / ".checked") == now:
        return
    for name, written in digests.items():
        if file_digest(folder / name) != written:
            raise ValueError(f"{name} is not what was written there")
    with contextlib.suppress(OSError):      # a folder that may only be read is read each time
        write_json(folder / ".checked", now)


def _listed(path):
    """[(number, file, what is wrong)] of a bad.txt."""
    with open(path, encoding="utf-8", errors="surrogateescape") as lines:
        fields = (line.split("\t") for line in lines)
        return [(int(number), file, what) for file, what, number in fields]


def _header(count, size):
    """The head of a .npy file, as long for any count, since numpy leaves room for larger ones."""
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        head, {"descr": "|u1", "fortran_order": False, "shape": (count, size, size, 3)})
    return head.getvalue()


def _make(images, folder, name, size, max_bad):
    part = folder.with_name(f"{folder.name}.part")
    bad = _fill(images, part, name, size)
    write_text(part / "bad.txt", "".join(f"{file}\t{what}\t{i}\n" for i, file, what in bad))
    _require_few(name, bad, images.count, max_bad, part / "bad.txt")
    with open(part / "images.npy", "r+b") as pixels:
        pixels.write(_header(images.count - len(bad), size))
        pixels.flush()
        os.fsync(pixels.fileno())
    write_json(part / "pack.json", {
        "images": images.count - len(bad), "bad": len(bad), "size": size,
        "classes": images.classes, "fingerprint": images.fingerprint,
        "digests": {each: file_digest(part / each) for each in ("images.npy", "bad.txt")}})
    shutil.rmtree(folder, ignore_errors=True)       # a pack of files that have changed since
    os.replace(part, folder)
    (folder / "progress.json").unlink()


def _fill(images, part, name, size):
    """Makes images.npy in `part`, from where an earlier attempt was cut off. Returns [(number,
    file, what is wrong)] of the images that can't be read."""
    head, step, each = _header(images.count, size), block_of(size), size * size * 3
    found = read_json(part / "progress.json") or {}
    done, bad = found.get("done", 0), found.get("bad", [])
    kept, pixels = (done - len(bad)) * each, part / "images.npy"
    if found.get("fingerprint") != images.fingerprint or not pixels.is_file() or (
            pixels.stat().st_size < len(head) + kept):      # of other files, or not as it was left
        shutil.rmtree(part, ignore_errors=True)
        done, bad, kept = 0, [], 0
    require_space(part.parent, (images.count - done) * each, f"packing {name}")
    part.mkdir(exist_ok=True)
    progress, saved = Progress(f"packing {name}", images.count, done=done), time.monotonic()
    starts = range(done, images.count, step)
    blocks = (range(i, min(i + step, images.count)) for i in starts)
    with open(pixels, "r+b" if done else "wb") as file:
        file.write(head)
        file.seek(len(head) + kept)
        file.truncate()
        for block, good, failed in decoded(images, name, size, blocks, len(starts)):
            file.write(block)
            bad += failed
            done += len(good) + len(failed)
            progress.update(len(good) + len(failed))
            if done == images.count or time.monotonic() - saved > SAVE_INTERVAL:
                file.flush()
                os.fsync(file.fileno())     # what is counted as done is on disk before it is
                write_json(part / "progress.json", {
                    "fingerprint": images.fingerprint, "done": done, "bad": bad})
                saved = time.monotonic()
    progress.close()
    return bad
