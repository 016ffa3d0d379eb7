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
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            def begin():
                file.seek(member.offset_data)
                return file.read(16)
            while (member := tar.next()) is not None:
                tar.members.clear()     # which it would keep, of millions
                if any(is_hidden(part) for part in member.name.split("/") if part != "."):
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
    shard, header, passed = array("i"), array("q"), Counter()
    for number, path in enumerate(paths):
        for member in _members(path, passed):
            shard.append(number)
            header.append(member.offset)
    say_passed(name, passed)
    reader = ShardReader(paths, np.asarray(shard), np.asarray(header))
    return Images(len(shard), reader, state_of("/", map(os.path.abspath, paths)), files=reader)
