"""Tar shards (the WebDataset convention) as Images, never unpacked. What counts is what counts in a
folder; labels and captions beside the images are not read."""
import io
import os
import re
import tarfile
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kd.files import UserError, first_line
from kd.readers import Images, is_hidden, is_image, opened, say_passed, state_of

META = re.compile(r"__[^/]*__")     # members that WebDataset keeps for itself


def shard_paths(name, pattern):
    """The shards that /data/{000..099}.tar or /data/*.tar stand for, in order. Raises UserError
    where there is none, or one of a range is not there."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if found:
        first, last, width = int(found[1]), int(found[2]), len(found[1])
        start, end = pattern[:found.start()], pattern[found.end():]
        return [path for number in range(first, last + 1)
                for path in shard_paths(name, f"{start}{number:0{width}}{end}")]
    folder, file = os.path.split(pattern)
    paths = [pattern] if os.path.isfile(pattern) else []
    if "*" in file or "?" in file:
        paths = sorted(map(str, Path(folder).glob(file.replace("[", "[[]"))))
    if not paths:
        raise UserError(f"{name}: there is no {pattern}. Shards are given as {name}=FOLDER/*.tar "
                        f"or {name}=FOLDER/{{000..099}}.tar.")
    return paths


@dataclass(frozen=True)
class ShardReader(Sequence):
    """Called with i it reads the i-th image; as a sequence it is "SHARD.tar/MEMBER" of each.

    shard, header, skip, size: (N,), each image's shard, where its header begins, how many bytes
    later its content does, and how many bytes that has.
    """

    paths: list
    shard: np.ndarray
    header: np.ndarray
    skip: np.ndarray
    size: np.ndarray

    def __len__(self):
        return len(self.shard)

    def __call__(self, i):
        with open(self.paths[self.shard[i]], "rb", buffering=0) as file:
            file.seek(int(self.header[i]) + int(self.skip[i]))
            return opened(io.BytesIO(file.read(int(self.size[i]))))

    def __getitem__(self, i):
        """From the shard: ten million names are not kept."""
        path = self.paths[self.shard[i]]
        with open(path, "rb") as file:
            file.seek(int(self.header[i]))
            with tarfile.open(fileobj=file, mode="r:") as tar:
                return f"{os.path.basename(path)}/{tar.next().name}"


def _members(path, passed):
    """Yields the tarfile.TarInfo of each image. Raises UserError where the shard is damaged."""
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            def begin():
                file.seek(member.offset_data)
                return file.read(16)
            while (member := tar.next()) is not None:
                tar.members.clear()     # which it would keep, of millions
                parts = [part for part in member.name.split("/") if part != "."]
                if any(is_hidden(part) or META.fullmatch(part) for part in parts):
                    passed["hidden"] += 1
                elif member.isreg() and not member.issparse() and (
                        is_image(member.name, begin, passed)):
                    yield member
            file.seek(tar.offset)
            if file.read(512).strip(b"\0"):     # a broken header ends the loop as the end does
                raise tarfile.ReadError(f"no header at byte {tar.offset:,}")
    except (tarfile.TarError, OSError, ValueError) as error:
        raise UserError(f"{path} is damaged, or not an uncompressed tar archive "
                        f"({first_line(error)}).") from None


def open_shards(name, paths):
    """The Images in these shards, whose headers are walked through once."""
    shard, header, skip, size = array("i"), array("q"), array("i"), array("q")
    passed = Counter()
    for number, path in enumerate(paths):
        for member in _members(path, passed):
            shard.append(number)
            header.append(member.offset)
            skip.append(member.offset_data - member.offset)
            size.append(member.size)
    say_passed(name, passed)
    reader = ShardReader(paths, *map(np.asarray, (shard, header, skip, size)))
    return Images(len(shard), reader, state_of("/", map(os.path.abspath, paths)), files=reader)
