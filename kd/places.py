"""Where a data set is: an official layout, a folder of images, shards, or not there yet."""
import re
import tomllib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from kd import drawn, layouts
from kd.download import RemoteFile
from kd.files import UserError, listed
from kd.readers import walk
from kd.shards import shard_paths


@dataclass(frozen=True)
class DataSet:
    """A record of data_sets.toml, which explains the fields."""

    name: str
    read: Callable      # (root, or seed where it is built in; split) -> Images
    terms: str
    images: dict
    files: tuple = ()
    target_files: tuple = ()
    layout: str = ""
    marker: str = ""
    unpacked: int = 0
    native: int | None = None


def registry():
    """{name: DataSet}."""
    found = tomllib.loads(Path(__file__).with_name("data_sets.toml").read_text())
    for name, record in found.items():
        for key in ("files", "target_files"):
            record[key] = tuple(RemoteFile(**each) for each in record.get(key, ()))
        read = drawn.reader(name) if name in drawn.COUNTS else getattr(layouts, f"read_{name}")
        found[name] = DataSet(name, read, **record)
    return found


@dataclass(frozen=True)
class Place:
    """kind: built-in, layout, folder, shards or absent; files: {path: RemoteFile} of what a data
    set has still to be made of, there or not."""

    kind: str
    path: Path
    files: dict = field(default_factory=dict)


def find_named(record, data_dir, role):
    """In the data folder, and in folders there that have its name as people write it: SVHN."""
    if not record.files:
        return Place("built-in", data_dir)
    named = sorted(path for path in data_dir.glob("*/")
                   if re.sub("[^a-z0-9]", "", path.name.lower()) == record.name)
    more = record.target_files if role != "source" else ()
    for folder in (data_dir, *named):
        if (folder / record.layout / record.marker).exists():
            return Place("layout", folder / record.layout, {
                folder / file.name: file for file in more if not (folder / file.name).exists()})
    for folder in named:
        has_images = role == "source" and next(walk(folder, Counter(), set()), None)
        if has_images or role != "source" and not _lacking(folder, role):
            return Place("folder", folder)
    folder = next((each for each in named if (each / record.files[0].name).exists()), data_dir)
    return Place("absent", folder, {folder / file.name: file for file in record.files + more})


def find_path(spec, role):
    """The Place of NAME=PATH or NAME=SHARDS. Raises UserError where it is not what `role` needs."""
    name, _, path = spec.partition("=")
    root = Path(path)
    if not root.is_dir() and re.search(r"\.(tar\.\w+|tgz|zip)$", path):
        raise UserError(f"{spec}: compressed archives can't be read image by image. Give shards "
                        "as uncompressed .tar files, or extract it and give the folder.")
    if not root.is_dir() and role == "source" and path.endswith(".tar"):
        return Place("shards", root, dict.fromkeys(shard_paths(name, path)))
    lacking = [f"{path}/{split}" for split in _lacking(root, role)] if root.is_dir() else [path]
    if lacking:
        raise UserError(f"{spec}: there is no folder {listed(lacking)}." + (
            "" if role == "source" else " A target holds train/<class>/* and test/<class>/*."))
    return Place("folder", root)


def split_of(root, split):
    """A split's folder: val/ is taken for test/ where there is none."""
    is_val = split == "test" and not (root / "test").is_dir() and (root / "val").is_dir()
    return root / ("val" if is_val else split)


def _lacking(root, role):
    splits = {"source": (), "target": ("train", "test"), "test": ("test",)}[role]
    return [split for split in splits if not split_of(root, split).is_dir()]


def folders_of(place, role):
    """The real paths that a data set is read from."""
    if place.kind == "shards":
        return {Path(shard).resolve() for shard in place.files}
    if place.kind == "folder" and role != "source":
        splits = [split_of(place.path, split) for split in ("train", "test")]
        return {each.resolve() for split in splits for each in (split, *split.glob("*/"))}
    return {place.path.resolve()} if place.kind in ("folder", "layout") else set()
