"""Fetch, extract and pack data sets, into their one form inside this project.

In:  official archives, official layouts, folders of images, tar shards (see `--list`).
Out: Packed or Streamed (kd/packing.py), which answer with batches of uint8 pixels.

    python data.py --list
    python data.py svhn stl10        # fetch, extract and pack
    python data.py --all
"""
import functools
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from kd import drawn, readers
from kd.archives import extract
from kd.command import command
from kd.download import fetch_all, remaining
from kd.files import UserError, digest, listed, one_field, require_none, say, say_once
from kd.flags import add_flags, bare_parser
from kd.huggingface import open_rows
from kd.layouts import registry
from kd.packing import Packed, Streamed, pack
from kd.settings import Settings
from kd.values import HF, data_set_spec, name_of

PACKED_BELOW = 8e9      # bytes of a pack; larger sources are decoded as they are read
DATA_SETS = registry()
ARCHIVES = (".zip", ".tar", ".gz")
NO_CLASSES = ("places365", *drawn.COUNTS)


@dataclass(frozen=True)
class Place:
    """kind: built-in, extracted, folder, shards, rows, archive or absent; files: {path: RemoteFile}
    of what a data set has still to be made of, there or not; the files of shards and rows."""

    kind: str
    path: Path
    files: dict = field(default_factory=dict)


def find(spec, data_dir, role="source"):
    """The Place of NAME, NAME=PATH or NAME=SHARDS. Raises UserError where nothing has that name, or
    the path is not what `role` needs: source, target, or test (a target's test split alone)."""
    if "=" in spec:
        return _find_path(spec, role)
    if spec not in DATA_SETS or role != "source" and spec in NO_CLASSES:
        known = [each for each in DATA_SETS if role == "source" or each not in NO_CLASSES]
        raise UserError(f"There is no data set {spec} to be a {role} (there are "
                        f"{', '.join(known)}). Give your own as {spec}=PATH.")
    return _find_named(DATA_SETS[spec], Path(data_dir), role)


def _find_named(record, data_dir, role):
    """In the data folder, and in folders there that have its name as people write it: SVHN."""
    if not record.files:
        return Place("built-in", data_dir)
    named = sorted(path for path in data_dir.glob("*/")
                   if re.sub("[^a-z0-9]", "", path.name.lower()) == record.name)
    more = record.target_files if role != "source" else ()
    for folder in (data_dir, *named):
        if (folder / record.layout).exists():
            return Place("extracted", folder / record.layout, {
                folder / file.name: file for file in more if not (folder / file.name).exists()})
    for folder in named:
        has_images = role == "source" and next(readers.walk(folder, Counter(), set()), None)
        if has_images or role != "source" and not _lacking(folder, role):
            return Place("folder", folder)
    folder = next((each for each in named if (each / record.files[0].name).exists()), data_dir)
    files = {folder / file.name: file for file in record.files + more}
    return Place("archive" if all(path.exists() for path in files) else "absent", folder, files)


def _find_path(spec, role):
    """The Place of NAME=PATH or NAME=SHARDS. Raises UserError where it is not what `role` needs."""
    name, _, path = spec.partition("=")
    root = Path(path)
    if path.startswith(HF) and role == "source":
        return Place("rows", root)
    if not root.is_dir() and role == "source" and path.endswith((".tar", ".parquet")):
        kind = "shards" if path.endswith(".tar") else "rows"
        return Place(kind, root, dict.fromkeys(readers.shard_paths(name, path)))
    lacking = [f"{path}/{split}" for split in _lacking(root, role)] if root.is_dir() else [path]
    if lacking:
        raise UserError(f"{spec}: there is no folder {listed(lacking)}." + (
            " Archives are read as uncompressed .tar shards only." if role == "source" else
            " A target holds train/<class>/* and test/<class>/*; one without training images needs "
            "--data-free."))
    return Place("folder", root)


def _split_of(root, split):
    """A split's folder: val/ is taken for test/ where that is not there, or has no classes."""
    train, test, val = ({each.name for each in (root / name).glob("*/")}
                        for name in ("train", "test", "val"))
    known = train or val
    return root / ("val" if split == "test" and known & val and not known & test else split)


def _lacking(root, role):
    splits = {"source": (), "target": ("train", "test"), "test": ("test",)}[role]
    return [split for split in splits if not _split_of(root, split).is_dir()]


def _folders_of(place, role):
    """The real paths that a data set is read from."""
    if place.kind in ("shards", "rows"):
        return {Path(shard).resolve() for shard in place.files}
    if place.kind == "folder" and role != "source":
        splits = [_split_of(place.path, split) for split in ("train", "test")]
        return {each.resolve() for split in splits for each in (split, *split.glob("*/"))}
    return {place.path.resolve()} if place.kind in ("folder", "extracted") else set()


def _require_apart(settings, spec, sources, folders):
    """Raises UserError where a source that is read from these real paths holds images of the target
    or of one of `sources`, or is the data or the run folder."""
    others = {"the data folder": {Path(settings.data_dir).resolve() / "packed"}}
    if settings.run_dir:
        others["the run folder"] = {Path(settings.run_dir).resolve()}
    if _has_images(settings.target):
        role = "test" if settings.data_free else "target"
        others["the target"] = _folders_of(find(settings.target, settings.data_dir, role), role)
    for other in sources:
        place = find(other, settings.data_dir)
        others[f"the source {name_of(other)}"] = _folders_of(place, "source")
    for what, theirs in others.items():
        above = {parent for path in theirs for parent in path.parents}
        for path in folders:
            if path in theirs or path in above or not theirs.isdisjoint(path.parents):
                raise UserError(f"{name_of(spec)} and {what} are the same folder, or one lies in "
                                f"the other ({path}): images would be used twice. Give another "
                                "folder.")


def _has_images(target):
    """Whether a target has images at all: data-free, it may be a mere name."""
    return "=" in target or target in DATA_SETS


def locate(settings, sources=True):
    """[(record, Place)] of the named data sets that are to be fetched, which is said. Raises
    UserError with a line for each thing that isn't there or can't be used. sources: whether the run
    reads them."""
    wanted = [(spec, "source") for spec in settings.sources if sources]
    if _has_images(settings.target) or settings.target and not settings.data_free:
        wanted.insert(0, (settings.target, "test" if settings.data_free else "target"))
    lines, absent = [], []
    for spec, role in wanted:
        try:
            place = find(spec, settings.data_dir, role)
            if role == "source":
                earlier = settings.sources[:settings.sources.index(spec)]
                _require_apart(settings, spec, earlier, _folders_of(place, role))
        except UserError as error:
            lines.append(str(error))
            continue
        if place.files and place.kind not in ("shards", "rows"):
            absent.append((DATA_SETS[spec], place))
    require_none(lines)
    missing = sum(remaining(path, file) for _, place in absent for path, file in
                  place.files.items())
    if missing:
        names = listed([record.name for record, _ in absent])
        say_once(f"Fetching {names}, {missing / 1e6:,.0f} MB in all.")
    return absent


def obtain(settings, sources=True):
    """Fetches and extracts what a run needs. Raises UserError, before any long work, for what can't
    be had. sources: as in `locate`."""
    absent = locate(settings, sources)
    files = {path: file for _, place in absent for path, file in place.files.items()}
    require_none(fetch_all(files))
    for record, place in absent:
        for archive in (path for path in place.files if path.suffix in ARCHIVES):
            extract(archive, place.path / record.layout,
                    functools.partial(_read_layout, record, split="source", named=archive))


@dataclass(frozen=True)
class Target:
    """The two splits, packed, and the names of the classes. With --data-free there is no train,
    perhaps no test, and where nothing tells the classes None."""

    train: Packed | None
    test: Packed | None
    classes: list | None


def load_target(settings):
    """The Target of a run. Raises UserError where its splits do not have the same classes."""
    spec, names = settings.target, settings.classes
    if settings.data_free and not _has_images(spec):
        names = [str(number) for number in range(names)] if isinstance(names, int) else names
        return Target(None, None, names and list(names))
    role, splits = ("test", ["test"]) if settings.data_free else ("target", ["train", "test"])
    found = {split: _read(settings, spec, role, split) for split in splits}
    classes = _in_order(found["test"], names, spec).classes
    odd = sorted({*classes} ^ {*found[splits[0]].classes})
    if odd or len(classes) < 2:
        raise UserError(f"{spec}: " + (
            f"{listed(odd, 5)} is in only one of train and test." if odd else
            f"a target needs two classes or more, found {len(classes)}."))
    packs = {split: pack(images.limited(settings.limit), _pack_folder(settings, spec, split),
                         f"{name_of(spec)} {split}", settings.image_size, settings.max_bad)
             for split, images in found.items()}        # whatever the order of the classes
    packs = {split: _in_order(packed, names, spec) for split, packed in packs.items()}
    return Target(packs.get("train"), packs["test"], classes)


def load_source(settings, spec):
    """The source `spec`, Packed or Streamed, without labels."""
    visited = set()
    images = _read(settings, spec, "source", "source", visited)
    _require_apart(settings, spec, [each for each in settings.sources if each != spec],
                   set(map(Path, visited)))     # links may lead anywhere
    images = replace(images, labels=None, classes=None).limited(settings.limit)
    name, size, max_bad = name_of(spec), settings.image_size, settings.max_bad
    is_large = images.count * size * size * 3 > PACKED_BELOW
    if settings.pack == "never" or settings.pack == "auto" and is_large:
        return Streamed(name, images, size, max_bad)
    return pack(images, _pack_folder(settings, spec, "source"), name, size, max_bad)


def _in_order(images, names, spec):
    """`images` with their classes in the order of `names`; None, or their number in place of names,
    leaves them as they are."""
    if names is None or names == len(images.classes):
        return images
    names = [""] * names if isinstance(names, int) else [
        unicodedata.normalize("NFC", name) for name in names]
    if sorted(names) != sorted(images.classes):
        odd = listed(sorted({*names} ^ {*images.classes}), 3) if any(names) else ""
        raise UserError(f"--classes gives {len(names)} classes, {spec} has {len(images.classes)}"
                        f"{odd and f', and {odd} is in only one of them'}.")
    if names == images.classes:
        return images
    number = np.array([names.index(name) for name in images.classes])
    return replace(images, labels=number[images.labels], classes=names,
                   fingerprint=images.fingerprint + digest("\n".join(names).encode()))


def _read(settings, spec, role, split, visited=None):
    """The Images of a data set. Raises UserError where `obtain` has not fetched it. visited: as in
    kd.readers.walk."""
    name, record = name_of(spec), DATA_SETS.get(spec)
    place = find(spec, settings.data_dir, role)
    if record is not None and place.files:
        raise UserError(f"{name} is not in {settings.data_dir}. compile.py and data.py fetch it.")
    if place.kind == "built-in":
        return record.read(settings.seed, split)
    if place.kind == "extracted":
        return _read_layout(record, place.path, split)
    if place.kind == "shards":
        images = readers.open_shards(name, list(place.files))
    elif place.kind == "rows":
        images = open_rows(spec.partition("=")[2], list(place.files))
    elif role == "source":
        root = place.path / "train" if record and (place.path / "train").is_dir() else place.path
        images = readers.read_files(root, readers.list_images(root, name, visited=visited))
    else:
        images = readers.read_class_folders(_split_of(place.path, split), f"{name} {split}")
    if images.count == 0:
        raise UserError(f"{spec}: no images found. " + (
            f"Tar shards are given as {name}=FOLDER/*.tar." if role == "source" else
            f"A target's lie in a folder for each class, {split}/<class>/*."))
    return images


def _read_layout(record, root, split, named=None):
    """The images of an official layout. Raises UserError, about `named`, where it is not whole."""
    if record.target_files and split == "test":
        root = root.with_name(record.target_files[0].name)
    try:
        images = record.read(root, split)
        expected = record.images.get(split, images.count)
        if images.count != expected:
            raise ValueError(f"it holds {images.count:,} of {expected:,} images")
        return images
    except Exception as error:      # whatever a broken layout makes its reader raise
        raise UserError(f"{named or root} is incomplete or damaged ({one_field(str(error))}). "
                        "Delete it and run again, or give a folder of images as "
                        f"{record.name}=PATH.") from None


def _pack_folder(settings, spec, split):
    name, _, path = spec.partition("=")
    parts = [name, split, str(settings.image_size)]
    if path:
        real = path if path.startswith(HF) else str(Path(path).resolve())
        parts.append(digest(real.encode("utf-8", "surrogateescape"))[:8])
    if spec in drawn.COUNTS:
        parts.append(f"seed{settings.seed}")
    if settings.limit is not None:
        parts.append(f"limit{settings.limit}")
    return Path(settings.data_dir) / "packed" / "-".join(parts)


def _list(data_dir):
    say(f"{'name':13} {'images':>9} {'to fetch':>9}  {'state':9} terms")
    for record in DATA_SETS.values():
        place = find(record.name, data_dir)
        size = sum(remaining(path, file) for path, file in place.files.items())
        say(f"{record.name:13} {record.images['source']:>9,} "
            f"{f'{size / 1e6:,.0f} MB' if size else '-':>9}  {place.kind:9} {record.terms}")


def main(argv):
    parser = bare_parser("data", __doc__)
    parser.add_argument("names", nargs="*", default=[], type=data_set_spec,
                        metavar="NAME|NAME=PATH", help=f"of {', '.join(DATA_SETS)}, a folder of "
                        "images, tar shards, or rows of Hugging Face")
    parser.add_argument("--all", action="store_true", help="every data set of the list")
    parser.add_argument("--list", action="store_true",
                        help="show every data set, its size, its state and its terms")
    add_flags(parser, ("data_dir", "image_size", "max_bad", "pack", "seeds"))
    given = vars(parser.parse_args(argv))
    every = DATA_SETS if given.pop("all", False) else ()
    specs = tuple(dict.fromkeys([*given.pop("names"), *every]))
    show = given.pop("list", False) or not specs
    settings = Settings(target="", sources=specs, **given)
    if show:
        return _list(settings.data_dir)
    obtain(settings)
    for spec in specs:
        source = load_source(settings, spec)
        what = "packed" if isinstance(source, Packed) else "will be decoded as they are read"
        bad = f", {source.bad:,} left out" if source.bad else ""
        say(f"{source.name}: {len(source):,} images {what}{bad}")


if __name__ == "__main__":
    command(main)
