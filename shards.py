"""Sources in tar shards (the WebDataset convention): scored as they are read, never unpacked.

    python compile.py --sources "pool=/data/shards/{000000..000099}.tar"

Every member with an image's name is a candidate; labels and captions beside it are not read. One pass scores. Another reads the
selected images, from those shards alone that have any, and nothing else is kept.
"""
import functools
import io
import itertools
import math
import os
import re
import tarfile
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from archives import Member
from files import UserError, first_line
from layouts import IMAGE_SUFFIXES
from packing import FORMATS, cores, decode, in_order, load, state_of, what_is_wrong

SUFFIX = ".tar"
META = re.compile(r"__[^/]*__($|/)")        # members that WebDataset keeps for itself
LARGEST_MEMBER = 300_000_000                # bytes
MOST_SHARDS = 1_000_000


@dataclass(frozen=True)
class Shard:
    """What was read of one shard. pixels: (n, size, size, 3) uint8; numbers and members: which images of the shard they are, counted from
    0, and their names; images: how many were seen, those included that could not be read, which are `bad`: [(member, reason)]."""

    number: int
    pixels: np.ndarray
    numbers: list
    members: list
    images: int
    bad: list


@dataclass(frozen=True)
class Shards:
    """A source in shards. paths: of the files, in order; made_from: changes when they change; limit: of images, spread over all shards."""

    name: str
    paths: tuple
    made_from: str
    size: int
    limit: int | None = None

    def read(self, first, last):
        """Yields the Shard of each from `first` to before `last`, decoded by all cores. Raises UserError for one that is damaged."""
        return self._read([(number, None) for number in range(first, last)])

    def take(self, wanted):
        """Yields the Shard of each of {number of the shard: numbers of its images, ascending}, with those images alone."""
        return self._read([(number, tuple(numbers)) for number, numbers in sorted(wanted.items())])

    def _read(self, asked):
        each = None if self.limit is None else -(-self.limit // len(self.paths))
        try:
            for made in in_order(_Shards(self.paths, self.size, each), asked, min(cores(), len(asked)) if len(asked) > 1 else 0):
                if isinstance(made, str):
                    raise UserError(made)
                yield made
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise UserError(f"{self.name}: a process that decodes images died, of too little memory or a file that breaks the decoder") from None


@dataclass(frozen=True)
class _Shards(Dataset):
    """What a worker does: (number of a shard, its images that are wanted or None) -> Shard, or a line that says what is wrong with it."""

    paths: tuple
    size: int
    each: int | None

    def __getitem__(self, asked):
        number, wanted = asked
        last = max(wanted) if wanted is not None else None if self.each is None else self.each - 1
        pixels, numbers, members, bad, seen = [], [], [], [], 0
        try:
            for name, read in _members(self.paths[number]):
                if wanted is None or seen in wanted:
                    try:
                        with warnings.catch_warnings():
                            warnings.simplefilter("ignore")
                            pixels.append(decode(_image(read()), self.size))
                        numbers.append(seen)
                        members.append(name)
                    except Exception as error:      # whatever a broken file makes a decoder raise
                        bad.append((name, what_is_wrong(error)))
                seen += 1
                if last is not None and seen > last:
                    break
        except Exception as error:      # whatever a broken archive makes its reader raise
            return f"{self.paths[number]} is damaged or can't be read ({first_line(error)})"
        pixels = np.stack(pixels) if pixels else np.empty((0, self.size, self.size, 3), np.uint8)
        return Shard(number, pixels, numbers, members, seen, bad)


def _members(path):
    """Yields (name, a function that reads the content) of the images in a shard. WebDataset's own iterator reads every member whole, however large it says it is."""
    with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r|*", tarinfo=Member) as shard:
        for member in shard:
            if member.isreg() and os.path.splitext(member.name)[1].lower() in IMAGE_SUFFIXES and not META.match(member.name):
                yield member.name, functools.partial(_content, shard, member)
            shard.members = []      # which it would keep, of millions


def _content(shard, member):
    if member.issparse() or member.size > LARGEST_MEMBER:
        raise ValueError(f"{member.size:,} bytes are more than {LARGEST_MEMBER:,}" if member.size > LARGEST_MEMBER else "a file with holes")
    return shard.extractfile(member).read()


def _image(content):
    if not content:
        raise ValueError("empty")
    return load(functools.partial(Image.open, io.BytesIO(content), formats=FORMATS))


def is_shards(path):
    """Whether the path of a source names shards."""
    return str(path).endswith(SUFFIX)


def expanded(name, pattern):
    """The paths that a pattern like /data/{000000..000099}.tar stands for. Raises UserError where one is not there."""
    try:
        from braceexpand import braceexpand
    except ImportError:
        raise UserError(f"{name}={pattern}: to read shards, pip install braceexpand") from None
    try:
        ranges = re.findall(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?\}", pattern)
        count = math.prod(abs(int(last) - int(first)) // max(1, abs(int(step or 1))) + 1 for first, last, step in ranges)       # all of a range are made at once
        paths = tuple(itertools.islice(braceexpand(pattern), MOST_SHARDS + 1)) if count <= MOST_SHARDS else range(count)
    except ValueError as error:     # braces that are not closed
        raise UserError(f"{name}={pattern}: no pattern of shards ({first_line(error)})") from None
    if len(paths) > MOST_SHARDS:
        raise UserError(f"{name}={pattern}: more than {MOST_SHARDS:,} shards")
    absent = [path for path in paths if not os.path.isfile(path)]
    if absent:
        raise UserError(f"{name}={pattern}: {len(absent):,} of {len(paths):,} shards are not there, the first is {absent[0]}")
    return paths


def open_shards(name, pattern, size, limit):
    """The Shards of a pattern."""
    paths = expanded(name, pattern)
    return Shards(name, paths, state_of("/", [os.path.abspath(path) for path in paths]), size, limit)
