"""Fetch, extract and pack data sets, into their one form inside this project.

In:  official archives, official layouts (`--list`), folders of images, tar shards, rows of Hugging
     Face.
Out: Packed or Streamed (kd/packing.py), which answer with batches of uint8 pixels.

    python data.py --list
    python data.py svhn stl10        # fetch, extract and pack
    python data.py --all
"""
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from kd import drawn, readers
from kd.archives import extract
from kd.command import command
from kd.download import fetch_all
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
    """Where a data set is. state: built-in, extracted, folder, files, archive or absent; path: None
    where it is not on disk; open(split): its Images, split: train, test or source; files: {path:
    RemoteFile} of what it has still to be made of, there or not."""

    state: str
    path: Path | None
    open: Callable
    files: dict = field(default_factory=dict)


def find(spec, settings, splits=()):
    """The Place of NAME, NAME=PATH or NAME=SHARDS. splits: those that a target needs, of train and
    test; a source needs none. Raises UserError where nothing has that name or is at that path."""
    if "=" in spec:
        return _find_path(spec, splits)
    known = [name for name in DATA_SETS if not splits or name not in NO_CLASSES]
    if spec not in known:
        raise UserError(f"There is no data set {spec} to be a {'target' if splits else 'source'} "
                        f"(there are {', '.join(known)}). Give your own as {spec}=PATH.")
    record = DATA_SETS[spec]
    if not record.files:
        return Place("built-in", None, partial(record.read, settings.seed))
    return _find_named(record, Path(settings.data_dir), splits)


def _find_named(record, data_dir, splits):
    """In the data folder, and in folders there that have its name as people write it: SVHN."""
    named = sorted(path for path in data_dir.glob("*/")
                   if re.sub("[^a-z0-9]", "", path.name.lower()) == record.name)
    more = record.target_files if splits else ()
    for folder in (data_dir, *named):
        layout = folder / record.layout
        if layout.exists():
            return Place("extracted", layout, partial(_read_layout, record, layout), {
                folder / file.name: file for file in more if not (folder / file.name).exists()})
    for folder in named:
        if not splits and (folder / "train").is_dir():
            folder /= "train"
        if not _lacking(folder, splits) and (splits or any(readers.walk(folder))):
            return Place("folder", folder, partial(_read_folder, record.name, folder))
    layout = data_dir / record.layout
    files = {data_dir / file.name: file for file in record.files + more}
    state = "archive" if all(path.exists() for path in files) else "absent"
    return Place(state, layout, partial(_read_layout, record, layout), files)


def _find_path(spec, splits):
    name, _, path = spec.partition("=")
    root = Path(path)
    if not splits and path.startswith(HF):
        return Place("files", None, lambda split: open_rows(name, path))
    if not splits and path.endswith((".tar", ".parquet")) and not root.is_dir():
        readers.shard_paths(name, path)     # raises where there are none
        read = readers.open_shards if path.endswith(".tar") else open_rows
        return Place("files", root, lambda split: read(name, path))
    lacking = [f"{path}/{split}" for split in _lacking(root, splits)] if root.is_dir() else [path]
    if lacking:
        raise UserError(f"{spec}: there is no folder {listed(lacking)}." + (
            " A target holds train/<class>/* and test/<class>/*; one without training images needs "
            "--data-free." if splits else " Archives are read as uncompressed .tar shards only."))
    return Place("folder", root, partial(_read_folder, name, root))


def _read_folder(name, root, split):
    if split == "source":
        return readers.read_files(root, readers.list_images(root, name))
    return readers.read_class_folders(_split_folder(root, split), f"{name} {split}")


def _read_layout(record, root, split, named=None):
    """The images of an official layout. Raises UserError, about `named`, where it is not whole."""
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


def _split_folder(root, split):
    """val/ is taken for test/ where it has more of the classes."""
    train, test, val = ({each.name for each in (root / name).glob("*/")}
                        for name in ("train", "test", "val"))
    known = train or test | val
    return root / ("val" if split == "test" and len(known & val) > len(known & test) else split)


def _lacking(root, splits):
    return [split for split in splits if not _split_folder(root, split).is_dir()]


def _real_paths(place, splits):
    """What a data set is read from; of a target both splits, whatever the run needs of them, and
    the folder of each class, which may be a link."""
    if place.state != "folder" or not splits:
        return [place.path.resolve()] if place.path else []
    folders = [_split_folder(place.path, split) for split in ("train", "test")]
    return [each.resolve() for folder in folders for each in (folder, *folder.glob("*/"))]


def _require_apart(settings, places):
    """Raises UserError where a source is, holds or lies in the target, an earlier source, or the
    data or the run folder. places: [(spec, splits, Place)], the target first."""
    taken = [("the data folder", Path(settings.data_dir).resolve() / "packed")]
    if settings.run_dir:
        taken.append(("the run folder", Path(settings.run_dir).resolve()))
    for spec, splits, place in places:
        paths = _real_paths(place, splits)
        for what, other in taken if not splits else ():
            for path in paths:
                if path == other or path in other.parents or other in path.parents:
                    raise UserError(f"{name_of(spec)} and {what} are the same folder, or one lies "
                                    f"in the other ({path}): images would be used twice. Give "
                                    "another folder.")
        what = "the target" if splits else f"the source {name_of(spec)}"
        taken += [(what, path) for path in paths]


def _has_images(target):
    """Whether a target has images at all: data-free, it may be a mere name."""
    return "=" in target or target in DATA_SETS


def _target_splits(settings):
    return ("test",) if settings.data_free else ("train", "test")


def _to_fetch(place):
    """Bytes."""
    return sum(file.size for path, file in place.files.items() if not path.exists())


def locate(settings, sources=True):
    """[(record, Place)] of the named data sets that are to be fetched, which is said. Raises
    UserError where one isn't there or can't be used. sources: whether the run reads them."""
    wanted = [(spec, ()) for spec in settings.sources if sources]
    if _has_images(settings.target) or settings.target and not settings.data_free:
        wanted.insert(0, (settings.target, _target_splits(settings)))
    places = [(spec, splits, find(spec, settings, splits)) for spec, splits in wanted]
    _require_apart(settings, places)
    absent = [(DATA_SETS[spec], place) for spec, _, place in places if place.files]
    missing = sum(_to_fetch(place) for _, place in absent)
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
            extract(archive, place.path,
                    partial(_read_layout, record, split="source", named=archive))


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
    splits = _target_splits(settings)
    found = {split: _read(settings, spec, split) for split in splits}
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
    images = _read(settings, spec, "source")
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


def _read(settings, spec, split):
    """The Images of a data set. Raises UserError where `obtain` has not fetched it."""
    place = find(spec, settings, () if split == "source" else (split,))
    if place.files:
        raise UserError(f"{spec} is not in {settings.data_dir}. compile.py and data.py fetch it.")
    images = place.open(split)
    if images.count == 0:
        raise UserError(f"{spec}: no images found. " + (
            f"Tar shards are given as {name_of(spec)}=FOLDER/*.tar." if split == "source" else
            f"A target's lie in a folder for each class, {split}/<class>/*."))
    return images


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


def _list(settings):
    say(f"{'name':13} {'images':>9} {'to fetch':>9}  {'state':9} terms")
    for record in DATA_SETS.values():
        place = find(record.name, settings)
        size = _to_fetch(place)
        say(f"{record.name:13} {record.images['source']:>9,} "
            f"{f'{size / 1e6:,.0f} MB' if size else '-':>9}  {place.state:9} {record.terms}")


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
        return _list(settings)
    obtain(settings)
    for spec in specs:
        for seed in settings.seeds if spec in drawn.COUNTS else settings.seeds[:1]:
            source = load_source(replace(settings, seeds=(seed,)), spec)
            what = "packed" if isinstance(source, Packed) else "will be decoded as they are read"
            bad = f", {source.bad:,} left out" if source.bad else ""
            say(f"{source.name}: {len(source):,} images {what}{bad}")


if __name__ == "__main__":
    command(main)
