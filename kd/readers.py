"""Images that are not decoded yet, how one is decoded, folders and tar shards of them.

One rule says what counts: no hidden name, and an image's suffix or, with none, the first bytes of
one. What is passed over is counted.
"""
import contextlib
import functools
import hashlib
import io
import os
import re
import tarfile
import unicodedata
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from kd.files import UserError, digest, first_line, listed, say

# What Pillow may read, whatever a file is called. AVIF comes with Pillow 11.3.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF",
           *(["AVIF"] if find_spec("PIL.AvifImagePlugin") else []))
SUFFIXES = set(".jpg .jpeg .jfif .png .webp .bmp .gif .ppm .pgm .pbm .tif .tiff .avif".split())
BEGINNING = re.compile(rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|BM.{4}\0{4}|RIFF.{4}WEBP"
                       rb"|II\*\0|MM\0\*|P[1-6]\s|.{4}ftypavi[fs]", re.DOTALL)


class Names(Sequence):
    """Names in one blob of bytes: ten million are not as many objects."""

    def __init__(self, names):
        self.blob, ends = bytearray(), array("q", [0])
        for name in names:
            self.blob += os.fsencode(name)
            ends.append(len(self.blob))
        self.ends = np.frombuffer(ends, np.int64)

    def __len__(self):
        return len(self.ends) - 1

    def __getitem__(self, i):
        i = range(len(self))[i]
        return os.fsdecode(bytes(self.blob[self.ends[i]:self.ends[i + 1]]))


@dataclass(frozen=True)
class Chosen(Sequence):
    """The items at `rows` of a sequence; or of what is called with a number."""

    of: object
    rows: np.ndarray

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.of[int(self.rows[i])]

    def __call__(self, i):
        return self.of(int(self.rows[i]))


@dataclass(frozen=True)
class Images:
    """`read(i)` gives the i-th of `count` images as a Pillow image of any mode and size.

    fingerprint: changes when the files change. labels: (count,) int64. files: their paths. rows:
    (count,) int64, which images of the whole data set they are; None where they are all.
    """

    count: int
    read: Callable
    fingerprint: str
    labels: np.ndarray | None = None
    classes: list | None = None
    files: Sequence | None = None
    rows: np.ndarray | None = None

    def take(self, rows):
        """Those images alone. rows: (n,) int64."""
        return Images(len(rows), Chosen(self.read, rows), self.fingerprint + digest(rows.tobytes()),
                      None if self.labels is None else self.labels[rows], self.classes,
                      None if self.files is None else Chosen(self.files, rows),
                      rows if self.rows is None else self.rows[rows])

    def limited(self, limit):
        """At most `limit` images, evenly spaced, so that no class or shard is left out."""
        if limit is None or limit >= self.count:
            return self
        return self.take(np.linspace(0, self.count - 1, limit).round().astype(np.int64))


def opened(file):
    """The Pillow image in a path or binary file, read to its end."""
    with Image.open(file, formats=FORMATS) as image:
        image.load()
        return image


def decode(image, size):
    """A Pillow image as (size, size, 3) uint8: what torchvision's Resize((size, size)) makes of it
    in RGB (bilinear, antialiased, aspect ratio not kept), once it is as a viewer shows it: turned
    as its EXIF says, of more than 8 bits the upper eight, what is transparent on white. Raises
    ValueError where no range is stated."""
    if image.mode == "F" or image.mode == "I" and image.format not in ("PNG", "PPM"):
        raise ValueError("floating-point, signed or 32-bit pixels have no fixed range")
    tags = getattr(image, "tag_v2", {})     # of a TIFF
    if "exif" in image.info:
        with contextlib.suppress(Exception):    # of one that can't be read, which turns nothing
            image.getexif()
            del image.info["exif"]      # it is read; written anew, it may fail at anything odd
            image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = _of_eight_bits(image, tags)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode != "RGB":
        image = image.convert("RGB")
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image)


def _of_eight_bits(image, tags):
    """A grey image of more than 8 bits. How many, and whether 0 is white, is what its file says."""
    bits, clear = tags.get(258, (16,))[0], image.info.get("transparency")
    pixels = np.asarray(image).astype(np.int32)
    grey = ((1 << bits) - 1 - pixels if tags.get(262) == 0 else pixels) >> (bits - 8)
    if isinstance(clear, int):
        grey[pixels == clear] = 255
    return Image.fromarray(grey.astype(np.uint8))


def state_of(root, paths):
    """A digest of the names, sizes and times of change of files below `root`."""
    state = hashlib.sha256()        # not of `root`: files that have moved are the same
    for path in paths:
        try:
            status = os.stat(os.path.join(root, path))
            about = f"{status.st_size}\0{status.st_mtime_ns}"
        except OSError as error:        # a link to nowhere; decoding says what is wrong with it
            about = str(error.errno)
        state.update(os.fsencode(f"{path}\0{about}\n"))
    return state.hexdigest()[:16]


def is_hidden(name):
    return name.startswith(".") or name == "__MACOSX"


def is_image(name, begin, passed):
    """Whether a file counts; else `passed` counts it, by suffix. begin(): its first bytes, read
    where it has no suffix."""
    suffix = os.path.splitext(name)[1].lower()
    counts = suffix in SUFFIXES or not suffix and bool(BEGINNING.match(begin()))
    passed[suffix or "no suffix"] += not counts
    return counts


def _beginning(path):
    if os.path.isfile(path) and os.access(path, os.R_OK):
        with open(path, "rb") as file:
            return file.read(16)
    return b""


def walk(root, passed=None, visited=None, below=""):
    """Yields the paths of the images below `root`, relative to it, in their alphabetical order.
    Links are followed, each folder is entered once; one that can't be read is yielded itself.

    passed: a Counter of what is passed over, by suffix; visited: the real paths entered so far.
    """
    passed = Counter() if passed is None else passed
    visited = set() if visited is None else visited
    folder, names = os.path.join(root, below), []
    real = os.path.realpath(folder)
    if real in visited:
        return
    visited.add(real)
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                name, path = entry.name, entry.path
                if is_hidden(name):
                    passed["hidden"] += 1
                elif os.path.isdir(path) if entry.is_symlink() else entry.is_dir():
                    names.append(f"{name}/")    # sorted as the paths below it are
                elif is_image(name, lambda path=path: _beginning(path), passed):
                    names.append(name)
    except OSError:
        yield below.rstrip("/") or "."
    names.sort()
    for name in names:
        if name.endswith("/"):
            yield from walk(root, passed, visited, below + name)
        else:
            yield below + name


def _read_file(root, files, i):
    return opened(os.path.join(root, files[i]))


def read_files(root, files, labels=None, classes=None):
    """Image files below `root`; files: a sequence of relative paths."""
    return Images(len(files), functools.partial(_read_file, os.fspath(root), files),
                  state_of(root, files), labels, classes, files)


def say_passed(label, passed):
    """passed: a Counter of what is passed over, by suffix."""
    kinds = [f"{count:,} {kind}" for kind, count in passed.most_common() if count]
    if label and kinds:
        say(f"{label}: skipping what is not an image ({listed(kinds, 5)}).")


def list_images(root, label="", wanted=lambda path: True):
    """The Names of the images below `root`. label: of whom to say what is passed over; wanted:
    whether a path counts."""
    passed = Counter()
    names = Names(filter(wanted, walk(root, passed)))
    say_passed(label, passed)
    return names


def read_class_folders(root, label="", wanted=lambda path: "/" in path):
    """`root`/<class>/**: a class per folder, in the order of their names, which are compared in
    Unicode's composed form (macOS writes accents as characters of their own). label, wanted: as in
    `list_images`. Raises UserError for a folder that can't be read."""
    def class_of(path):
        return unicodedata.normalize("NFC", path.partition("/")[0])

    files = list_images(root, label, wanted)
    classes, labels = np.unique([class_of(path) for path in files], return_inverse=True)
    empty = [path.name for path in Path(root).glob("*/")
             if not is_hidden(path.name) and class_of(path.name) not in classes]
    if closed := [name for name in empty if not os.access(Path(root, name), os.R_OK | os.X_OK)]:
        raise UserError(f"{root}/{closed[0]} can't be read: its class would be left out.")
    if label and empty:
        say(f"{label}: {listed(sorted(empty))} holds no image and is not a class.")
    return read_files(root, files, labels, classes.tolist())


# ---- Tar shards (the WebDataset convention), never unpacked. Labels and captions are not read. ---

def shard_paths(name, pattern):
    """The shards that /data/{000..099}.tar or /data/*.tar stand for, in order. Raises UserError
    where there is none, or one of a range is not there."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if found:
        first, last, width = int(found[1]), int(found[2]), len(found[1])
        start, end = pattern[:found.start()], pattern[found.end():]
        paths = [path for number in range(first, last + 1)
                 for path in shard_paths(name, f"{start}{number:0{width}}{end}")]
    else:
        folder, file = os.path.split(pattern)
        file = re.sub(r"\*+", "*", file.replace("[", "[[]"))
        paths = sorted(str(path) for path in Path(folder).glob(file)
                       if not is_hidden(path.name))
    if not paths:
        raise UserError(f"{name}: there is no {pattern}. Shards are given as {name}=FOLDER/*.tar "
                        f"or {name}=FOLDER/{{000..099}}.tar.")
    return paths


@dataclass(frozen=True)
class ShardReader(Sequence):
    """Called with i it reads the i-th image; as a sequence it is "SHARD.tar/MEMBER" of each.

    shard, header: (N,), each image's shard, and the byte at which its header begins. All else is
    read there: ten million names are not kept.
    """

    paths: list
    shard: np.ndarray
    header: np.ndarray

    def __len__(self):
        return len(self.shard)

    def __call__(self, i):
        return opened(io.BytesIO(self._member(i)[1]))

    def __getitem__(self, i):
        return self._member(i)[0]

    def _member(self, i):
        path = self.paths[self.shard[i]]
        with open(path, "rb") as file:
            file.seek(int(self.header[i]))
            with tarfile.open(fileobj=file, mode="r:") as tar:
                member = tar.next()
                return f"{os.path.basename(path)}/{member.name}", tar.extractfile(member).read()


def _members(path, passed):
    """Yields the tarfile.TarInfo of each image. Raises UserError where the shard is damaged."""
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()     # which it would keep, of millions
                if any(is_hidden(part) for part in member.name.split("/") if part != "."):
                    passed["hidden"] += 1
                elif member.islnk() or member.issym():
                    passed["links"] += 1
                elif member.isreg() and is_image(
                        member.name, lambda file=member: tar.extractfile(file).read(16), passed):
                    yield member
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(512).strip(b"\0"):      # a broken header ends the loop as well
                raise tarfile.ReadError(f"no header at byte {tar.offset:,}")
    except (tarfile.TarError, OSError, ValueError) as error:
        raise UserError(f"{path} is damaged, or not an uncompressed tar archive "
                        f"({first_line(error)}).") from None


def open_shards(name, pattern):
    """The Images in shards, whose headers are walked through once. pattern: as in shard_paths."""
    paths, shard, header, passed = shard_paths(name, pattern), array("i"), array("q"), Counter()
    for number, path in enumerate(paths):
        for member in _members(path, passed):
            shard.append(number)
            header.append(member.offset)
    say_passed(name, passed)
    reader = ShardReader(paths, np.asarray(shard), np.asarray(header))
    root = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    state = state_of(root, (os.path.relpath(path, root) for path in paths))
    return Images(len(shard), reader, state, files=reader)
