"""Packing: images of any kind become one uint8 array, memory-mapped, decoded once and reused for ever.

In:  `Images`, which read one image at a time.
Out: `Packed`, a folder with images.npy (uint8, N x size x size x 3), rows, labels, names, and what it was made from.

All cores decode; memory holds a few blocks, whatever the set's size; a killed process is gone on from.
"""
import ctypes
import errno
import functools
import hashlib
import io
import json
import mmap
import os
import shutil
import signal
import stat
import sys
import time
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset

from files import UserError, file_digest, first_line, holding, one_field, require_space, say, write_atomically, write_json
from progress import Progress
from run import MAX_BAD

IMAGE_SIZE = 32
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF")      # what is let in, whatever a file is called
MAX_PIXELS = 89_478_485     # of one image: Pillow's own bound, a quarter of a gigabyte in RGB
BLOCK = 1 << 19             # bytes, about, that a worker decodes at a time
SAVE_INTERVAL = 2.0         # seconds: what a kill can cost
READ_AT_ONCE = 1 << 24      # bytes, of what an earlier attempt has left
FORKS = sys.platform == "linux"


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

    def __post_init__(self):
        if self.labels is not None and len(self.labels) != self.count:
            raise ValueError(f"{self.count:,} images have {len(self.labels):,} labels")
        if self.labels is not None and self.classes is not None and len(self.labels) and not 0 <= self.labels.min() <= self.labels.max() < len(self.classes):
            raise ValueError(f"a label is not among its {len(self.classes):,} classes")

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
    """A packed data set. images: (N, size, size, 3) uint8, memory-mapped; the rest as in `Images`.
    bad: how many images could not be read and are left out; they are listed in the pack's bad.txt."""

    images: np.ndarray
    labels: np.ndarray | None
    classes: list | None
    files: list | None
    rows: np.ndarray
    made_from: str
    bad: int = 0

    def __len__(self):
        return len(self.images)


# --------------------------------------------------------------------------------------------------
# One image
# --------------------------------------------------------------------------------------------------

PARTS = ("images.npy", "rows.npy", "labels.npy", "files.jsonl", "bad.txt")      # of a pack, beside pack.json
CHECKED = ".checked"        # inodes of those when their digests were last found right


@dataclass(frozen=True)
class ImageFiles:
    """Reads the i-th of `files`, paths below `root`, as a Pillow image. Raises what is wrong with it."""

    root: str
    files: list

    def __call__(self, i):
        path = os.path.join(self.root, self.files[i])
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):        # opening a pipe would wait for ever
            raise ValueError("a folder that can't be read" if stat.S_ISDIR(status.st_mode) else "no regular file")
        if status.st_size == 0:
            raise ValueError("empty")
        return load(functools.partial(Image.open, path, formats=FORMATS))


def load(opening):
    """The Pillow image that opening() gives, read to its end. Raises ValueError where it has too many pixels."""
    with opening() as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width}x{image.height} pixels are more than {MAX_PIXELS:,}")
        image.load()
        return image


def decode(image, size=IMAGE_SIZE):
    """A Pillow image as (size, size, 3) uint8: what torchvision's Resize((size, size)) makes of it as RGB (bilinear,
    antialiased, aspect ratio not kept)."""
    image = as_shown(image)
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image)


def as_shown(image):
    """A Pillow image in RGB as a viewer shows it: turned as its EXIF says, of 16 bits the upper eight, what is
    transparent on white. Of an animation it is the first frame. Raises ValueError where pixels have no fixed range."""
    if image.mode == "RGB" and not image.info.keys() & {"exif", "transparency"}:
        return image
    if "exif" in image.info:
        try:
            image = ImageOps.exif_transpose(image)
        except Exception:       # EXIF that can't be read turns nothing
            pass
    if image.mode == "F":
        raise ValueError("floating-point pixels have no fixed range")
    if image.mode.startswith("I"):
        pixels = np.asarray(image)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise ValueError("32-bit pixels have no fixed range")
        return Image.fromarray((pixels >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def what_is_wrong(error):
    if isinstance(error, UnidentifiedImageError):
        return f"no {', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
    return first_line(error) if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {first_line(error)}"


# --------------------------------------------------------------------------------------------------
# All of them
# --------------------------------------------------------------------------------------------------

class _Blocks(Dataset):
    """What a worker decodes at a time: images [range] -> ((n, size, size, 3) uint8 of those that could be read, [(number, reason)])."""

    def __init__(self, images, size):
        self.images, self.size = images, size

    def __getitem__(self, numbers):
        pixels, bad = np.empty((len(numbers), self.size, self.size, 3), np.uint8), []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")         # about files that are odd and can be read
            for i in numbers:
                try:
                    pixels[i - numbers.start - len(bad)] = decode(self.images.read(i), self.size)
                except Exception as error:          # whatever a broken file makes a decoder raise
                    bad.append((i, what_is_wrong(error)))
        return pixels[:len(numbers) - len(bad)], bad


def _decoded(images, size, start):
    """Yields the blocks of `_Blocks` from image `start` on, in order, decoded by all cores."""
    block = max(16, BLOCK // (size * size * 3))
    numbers = [range(i, min(i + block, images.count)) for i in range(start, images.count, block)]
    # Arrays and drawings are functions, which only a forked process has; macOS and Windows don't fork.
    workers = min(cores(), len(numbers)) if len(numbers) > 2 and (FORKS or isinstance(images.read, ImageFiles)) else 0
    return zip(numbers, in_order(_Blocks(images, size), numbers, workers))


def in_order(dataset, asked, workers):
    """Yields dataset[i] for each i of `asked`, made by that many processes."""
    return DataLoader(dataset, batch_size=None, sampler=asked, num_workers=workers, collate_fn=_as_it_is,
                      worker_init_fn=functools.partial(_die_with_parent, os.getpid()), multiprocessing_context="fork" if workers and FORKS else None)


def _as_it_is(block):
    return block


def _die_with_parent(parent, worker):
    """DataLoader's workers see for themselves that their parent is gone, but only every five seconds, and not
    while nobody has asked for its exit status; then they wait, forever, for someone to take what they decoded."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)      # PR_SET_PDEATHSIG
        if os.getppid() != parent:                      # it died before that
            os._exit(1)


def cores():
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def pack(images, folder, label, size=IMAGE_SIZE, max_bad=MAX_BAD):
    """Decodes `images` into `folder` unless it holds them already, and opens it.

    What can't be read is left out and listed in bad.txt, a line each of file, reason and number; UserError where that
    is more than the share `max_bad`. While it is being made the pack is `<folder>.part`, which a later call goes on from.
    """
    packed, old = open_pack(folder, images.made_from, tell=False), folder.with_name(f"{folder.name}.old")
    if packed is not None and old.exists():     # what was killed had this left to do
        shutil.rmtree(old, ignore_errors=True)
    if packed is None:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with holding(folder, f"packing {label}"):
                packed = open_pack(folder, images.made_from)        # another process has made it while we waited
                if packed is None:
                    _make_pack(images, folder, label, size, max_bad)
                    packed = open_pack(folder, images.made_from)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(f"the disk under {folder.parent} is full: make room and run this again, {label} is gone on from") from None
            raise UserError(f"{folder.parent} can't be written ({first_line(error)}): choose another --data-dir") from None
    if packed.bad:
        _require_few(packed.bad, len(packed) + packed.bad, max_bad, label, folder / "bad.txt")
        say(f"{label}: {packed.bad:,} of {len(packed) + packed.bad:,} images can't be read and are left out, see {folder / 'bad.txt'}")
    return packed


def _require_few(bad, count, max_bad, label, listing):
    if bad / count > max_bad:
        with open(listing, encoding="utf-8", errors="surrogateescape") as lines:
            first = next(lines).split("\t")
        raise UserError(f"{label}: {bad:,} of {count:,} images can't be read, more than {max_bad:.4g} of all; the first is {first[0]} "
                        f"({first[1]}), all are in {listing}; --max-bad {min(1, bad / count + 0.005):.2f} would leave them out")


def _make_pack(images, folder, label, size, max_bad):
    part, old = folder.with_name(f"{folder.name}.part"), folder.with_name(f"{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    whole = _made_from(part)
    if whole != images.made_from:       # else it was killed before it had its name
        if whole is not None:
            shutil.rmtree(part)
        _fill_pack(images, part, label, size, max_bad)
    if folder.exists():     # made from files that have changed since
        os.replace(folder, old)
    os.replace(part, folder)
    shutil.rmtree(old, ignore_errors=True)


def _made_from(part):
    """What the pack in `part` was made from; None where it is not whole."""
    try:
        return json.loads((part / "pack.json").read_text())["made_from"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _header(count, size):
    """The head of a .npy file; numpy leaves room in it for a larger number of rows, so its length does not depend on them."""
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "|u1", "fortran_order": False, "shape": (count, size, size, 3)})
    return head.getvalue()


def _fill_pack(images, part, label, size, max_bad):
    """Makes all of a pack in `part`, from where an earlier attempt was cut off."""
    head = _header(images.count, size)
    start, bad, listed, checksums = _done_so_far(part, images.made_from, size)
    require_space(part.parent, (images.count - start) * size * size * 3, f"packing {label}")
    part.mkdir(exist_ok=True)
    progress = Progress(f"packing {label}", images.count)
    progress.skip(start)
    with open(part / "images.npy", "ab") as pixels, open(part / "bad.txt", "ab") as listing:
        pixels.truncate(len(head) + (start - len(bad)) * size * size * 3 if start else 0)
        listing.truncate(listed)
        listing.seek(listed)
        if not start:
            pixels.write(head)
        saved = time.monotonic()
        try:
            for numbers, (decoded, failed) in _decoded(images, size, start):
                pixels.write(decoded)
                lines = "".join(f"{one_field(images.files[number] if images.files else str(number))}\t{one_field(reason)}\t{number}\n"
                                for number, reason in failed).encode("utf-8", "surrogateescape")
                listing.write(lines)
                bad += [number for number, _ in failed]
                checksums = [zlib.crc32(content, checksum) for content, checksum in zip((decoded, lines), checksums)]
                progress.update(len(numbers))
                if time.monotonic() - saved > SAVE_INTERVAL:
                    _save_progress(part, images.made_from, size, numbers.stop, pixels, listing, checksums)
                    saved = time.monotonic()
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            where = f" near {images.files[progress.done]}" if images.files else ""
            raise UserError(f"{label}: a process that decodes images died{where} after {progress.done:,} of {images.count:,}, of too little memory or a "
                            "file that breaks the decoder: this command goes on from there") from None
        finally:
            progress.close()
        _save_progress(part, images.made_from, size, images.count, pixels, listing, checksums)
    if bad:
        _require_few(len(bad), images.count, max_bad, label, part / "bad.txt")
    if len(bad) == images.count:
        raise UserError(f"{label}: none of {images.count:,} images can be read, see {part / 'bad.txt'}")
    with open(part / "images.npy", "r+b") as pixels:
        pixels.write(_header(images.count - len(bad), size))
        pixels.flush()
        os.fsync(pixels.fileno())
    rows = np.delete(np.arange(images.count), bad)
    _save_array(part / "rows.npy", rows if images.rows is None else images.rows[rows])
    if images.labels is not None:
        _save_array(part / "labels.npy", images.labels[rows])
    if images.files is not None:
        write_atomically(part / "files.jsonl", lambda file: file.writelines(json.dumps(images.files[i]).encode() + b"\n" for i in rows))
    if not bad:
        (part / "bad.txt").unlink(missing_ok=True)
    meta = {"images": len(rows), "bad": len(bad), "size": size, "made_from": images.made_from, "classes": images.classes,
            "digests": {name: file_digest(part / name) for name in PARTS if (part / name).exists()}}
    write_json(part / "pack.json", meta | {"seal": digest(json.dumps(meta).encode())})
    for left_over in (part / "progress.json", *part.glob(".*.part")):       # when nothing is left to go on with
        left_over.unlink()


def _save_array(path, array):
    write_atomically(path, lambda file: np.save(file, array))


def _save_progress(part, made_from, size, done, pixels, listing, checksums):
    for file in (pixels, listing):      # what is counted as done must be on disk before it is
        file.flush()
        os.fsync(file.fileno())
    write_json(part / "progress.json", {"made_from": made_from, "size": size, "done": done, "listed": listing.tell(), "checksums": checksums})


def _done_so_far(part, made_from, size):
    """How far an earlier attempt came: (images done, numbers of the bad ones among them, bytes of bad.txt, checksums of the pixels and of those bytes).
    Where there is none, or it is of other files or damaged, `part` is deleted."""
    try:
        progress = json.loads((part / "progress.json").read_text())
        if (progress["made_from"], progress["size"]) != (made_from, size):
            raise ValueError("of other files")
        if not ((part / "images.npy").is_file() and (part / "bad.txt").is_file()):       # a pipe would be waited for
            raise ValueError("no files")
        with open(part / "bad.txt", "rb") as listing:
            listed = listing.read(progress["listed"])
        bad = [int(line.rpartition(b"\t")[2]) for line in listed.splitlines()]
        if [_checksum(part / "images.npy", len(_header(0, size)), (progress["done"] - len(bad)) * size * size * 3), zlib.crc32(listed)] != progress["checksums"]:
            raise ValueError("damaged")
        return progress["done"], bad, progress["listed"], progress["checksums"]
    except (OSError, ValueError, KeyError, TypeError):
        shutil.rmtree(part, ignore_errors=True)
        return 0, [], 0, [0, 0]


def _checksum(path, start, length):
    """CRC-32 of so many bytes of a file from `start` on. Raises ValueError where it has fewer."""
    checksum = 0
    with open(path, "rb") as file:
        file.seek(start)
        while length:
            content = file.read(min(length, READ_AT_ONCE))
            if not content:
                raise ValueError("cut short")
            checksum, length = zlib.crc32(content, checksum), length - len(content)
    return checksum


def open_pack(folder, made_from, tell=True):
    """The pack in `folder`, or None where there is none, it was made from something else, or it is damaged, which is said if `tell`."""
    if not (folder / "pack.json").is_file():
        return None

    def optional(name, read):
        return read(folder / name) if (folder / name).exists() else None

    try:
        meta = json.loads((folder / "pack.json").read_text())
        if meta["made_from"] != made_from or "seal" not in meta:     # or by an earlier version
            return None
        _require_as_written(folder, meta)
        images = np.load(folder / "images.npy", mmap_mode="c")
        if images.shape != (meta["images"], meta["size"], meta["size"], 3):
            raise ValueError("it has another shape")
        return Packed(images, optional("labels.npy", np.load), meta["classes"],
                      optional("files.jsonl", _load_names), np.load(folder / "rows.npy"), made_from, meta["bad"])
    except (ValueError, OSError, KeyError, TypeError) as error:
        if tell:
            say(f"{folder} is damaged ({first_line(error)}): it is packed anew")
        return None


def _require_as_written(folder, meta):
    """Raises ValueError where a file of a pack is not what was written there. What has been read once is not read again until its inode changes."""
    if meta.pop("seal") != digest(json.dumps(meta).encode()):
        raise ValueError("pack.json is not what was written there")
    checked, now = folder / CHECKED, {}
    for name in meta["digests"]:
        status = os.stat(folder / name)
        now[name] = [status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    try:
        if json.loads(checked.read_text()) == now | {"pack": meta["digests"]}:
            return
    except (OSError, ValueError):
        pass
    for name, written in meta["digests"].items():
        if file_digest(folder / name) != written:
            raise ValueError(f"{name} is not what was written there")
    try:
        write_json(checked, now | {"pack": meta["digests"]})
    except OSError:     # a folder that may only be read is read each time
        pass


def release_pages(images):
    """Gives back the memory that reading a memory-mapped array has taken; what is needed again is read again. Does nothing to others."""
    mapping = getattr(images, "_mmap", None)
    if mapping is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapping.madvise(mmap.MADV_DONTNEED)


def _load_names(path):
    with open(path) as lines:
        return [json.loads(line) for line in lines]


def digest(content):
    return hashlib.sha256(content).hexdigest()[:16]


def state_of(root, paths):
    """A digest of names, sizes and times of change."""
    state = hashlib.sha256(os.path.realpath(root).encode("utf-8", "surrogateescape"))
    for path in paths:
        try:
            status = os.stat(os.path.join(root, path))
            about = f"{status.st_size}\0{status.st_mtime_ns}"
        except OSError as error:        # a link to nowhere; packing says what is wrong with it
            about = str(error.errno)
        state.update(f"{path}\0{about}\n".encode("utf-8", "surrogateescape"))
    return state.hexdigest()[:16]
