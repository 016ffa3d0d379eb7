"""Data sets: where they are, and their one form inside this project.

In:  official archives, official layouts, folders of images, tar shards (see `--list`).
Out: Packed or Streamed (kd/packing.py), which answer with batches of uint8 pixels.

    python data.py --list
    python data.py svhn stl10        # fetch, extract and pack
    python data.py --all
"""
import functools
import itertools
import re
import unicodedata
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from kd import drawn
from kd.archives import extract
from kd.command import command
from kd.download import fetch, fetch_all, part_of, remaining
from kd.files import UserError, digest, listed, one_field, require_none, require_space, say
from kd.flags import Parser, add_flags
from kd.packing import Packed, Streamed, open_pack, pack
from kd.places import find_named, find_path, folders_of, registry, split_of
from kd.readers import list_images, read_class_folders, read_files
from kd.settings import Settings
from kd.shards import open_shards
from kd.values import data_set_spec, name_of

PACKED_BELOW = 8e9      # bytes of a pack; larger sources are decoded as they are read
DATA_SETS = registry()
NO_CLASSES = ("places365", *drawn.COUNTS)


def find(spec, data_dir, role="source"):
    """The Place of NAME, NAME=PATH or NAME=SHARDS. Raises UserError where nothing has that name, or
    the path is not what `role` needs: source, target, or test (a target's test split alone)."""
    if "=" in spec:
        return find_path(spec, role)
    if spec not in DATA_SETS or role != "source" and spec in NO_CLASSES:
        known = [each for each in DATA_SETS if role == "source" or each not in NO_CLASSES]
        raise UserError(f"There is no data set {spec} to be a {role} (there are "
                        f"{', '.join(known)}). Give your own as {spec}=PATH.")
    return find_named(DATA_SETS[spec], Path(data_dir), role)


def _require_apart(settings, spec, folders):
    """Raises UserError where a source that is read from these real paths holds images of the target
    or of an earlier source, or is the data or the run folder."""
    data_dir = Path(settings.data_dir).resolve()
    others = {"the data folder": {data_dir / "packed"}}
    if settings.run_dir:
        others["the run folder"] = {Path(settings.run_dir).resolve()}
    if _has_images(settings.target):
        role = "test" if settings.data_free else "target"
        others["the target"] = folders_of(find(settings.target, data_dir, role), role)
    for other in itertools.takewhile(lambda other: other != spec, settings.sources):
        others[f"the source {name_of(other)}"] = folders_of(find(other, data_dir), "source")
    for what, theirs in others.items():
        above = {parent for path in theirs for parent in path.parents}
        for path in folders:
            if path in theirs or path in above or not theirs.isdisjoint(path.parents):
                raise UserError(f"{name_of(spec)} and {what} are the same folder, or one lies in "
                                f"the other ({path}): images would be used twice. Give another.")


def _has_images(target):
    """Whether a target has images at all: data-free, it may be a mere name."""
    return "=" in target or target in DATA_SETS


def obtain(settings, sources=True):
    """Fetches what a run needs. Raises UserError, before any long work, with a line for each thing
    that can't be had or used. sources: whether the run reads them."""
    wanted = [(spec, "source") for spec in settings.sources if sources]
    if _has_images(settings.target) or settings.target and not settings.data_free:
        wanted.insert(0, (settings.target, "test" if settings.data_free else "target"))
    lines, files, names, size = [], {}, [], 0
    for spec, role in wanted:
        try:
            place = find(spec, settings.data_dir, role)
            if role == "source":
                _require_apart(settings, spec, folders_of(place, role))
        except UserError as error:
            lines.append(str(error))
            continue
        if place.files and place.kind != "shards":
            files |= place.files
            names.append(spec)
            size += DATA_SETS[spec].unpacked
    if not lines and files:
        missing = sum(remaining(path, file) for path, file in files.items())
        require_space(settings.data_dir, missing + size, f"fetching and extracting {listed(names)}")
        if missing:
            say(f"Fetching {listed(names)}, {missing / 1e6:,.0f} MB in all.")
        lines = fetch_all(files)
    require_none(lines)


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
    found = {split: _in_order(_read(settings, spec, role, split), names, spec) for split in splits}
    classes = found["test"].classes
    odd = sorted({*classes} ^ {*found[splits[0]].classes})
    if odd or len(classes) < 2:
        raise UserError(f"{spec}: " + (
            f"{listed(odd, 5)} is in only one of train and test." if odd else
            f"a target needs two classes or more, found {len(classes)}."))
    packs = {split: pack(images.limited(settings.limit), _pack_folder(settings, spec, split),
                         f"{name_of(spec)} {split}", settings.image_size, settings.max_bad)
             for split, images in found.items()}
    return Target(packs.get("train"), packs["test"], classes)


def load_source(settings, spec, make=True):
    """The source `spec`, Packed or Streamed, without labels. make=False: raises UserError where it
    would have to be fetched, extracted or packed."""
    visited = set()
    images = _read(settings, spec, "source", "source", make, visited)
    _require_apart(settings, spec, set(map(Path, visited)))
    images = replace(images, labels=None, classes=None).limited(settings.limit)
    name, size, max_bad = name_of(spec), settings.image_size, settings.max_bad
    is_large = images.count * size * size * 3 > PACKED_BELOW
    if settings.pack == "never" or settings.pack == "auto" and is_large:
        return Streamed(name, images, size, max_bad)
    folder = _pack_folder(settings, spec, "source")
    if make:
        return pack(images, folder, name, size, max_bad)
    packed = open_pack(images, folder, name, size, tell=False)
    if packed is None:
        raise UserError(f"{name} is not packed in {settings.data_dir}, or has changed since.")
    return packed


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


def _read(settings, spec, role, split, make=True, visited=None):
    """The Images of a data set, which is fetched and extracted where that is needed and `make`.
    visited: as in kd.readers.walk."""
    name, record = name_of(spec), DATA_SETS.get(spec)
    place = find(spec, settings.data_dir, role)
    if record is not None and place.files:
        if not make:
            raise UserError(f"{name} is not in {settings.data_dir}, ready to be read.")
        for path, file in place.files.items():
            fetch(file, path)
            if record.unpacked:
                extract(path, place.path / record.layout, 4 * record.unpacked,
                        4 * sum(record.images.values()) + 1000,
                        functools.partial(_read_layout, record, split="source", named=path))
        place = find(spec, settings.data_dir, role)
    if place.kind == "built-in":
        return record.read(settings.seed, split)
    if place.kind == "layout":
        return _read_layout(record, place.path, split)
    if place.kind == "shards":
        images = open_shards(name, list(place.files))
    elif role == "source":
        root = place.path / "train" if record and (place.path / "train").is_dir() else place.path
        images = read_files(root, list_images(root, name, visited=visited))
    else:
        images = read_class_folders(split_of(place.path, split), f"{name} {split}")
    if images.count == 0:
        raise UserError(f"{spec}: no images found. Tar shards are given as {name}=FOLDER/*.tar.")
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
                        "Delete it, and it is made again, or give a folder of images as "
                        f"{record.name}=PATH.") from None


def _pack_folder(settings, spec, split):
    name, _, path = spec.partition("=")
    parts = [name, split, str(settings.image_size)]
    if path:
        parts.append(digest(str(Path(path).resolve()).encode("utf-8", "surrogateescape"))[:8])
    if spec in drawn.COUNTS:
        parts.append(f"seed{settings.seed}")
    if settings.limit is not None:
        parts.append(f"limit{settings.limit}")
    return Path(settings.data_dir) / "packed" / "-".join(parts)


def state(record, data_dir):
    """absent, partial, archive, extracted, packed or built in."""
    place = find(record.name, data_dir)
    if any(re.fullmatch(r".*-source-\d+(-seed\d+)?", path.parent.name) for path in Path(
            data_dir).glob(f"packed/{record.name}-source-*/pack.json")):
        return "packed"
    if place.kind != "absent":
        return "built in" if place.kind == "built-in" else "extracted"
    if all(path.exists() for path in place.files):
        return "archive"
    return "partial" if any(part_of(path).exists() for path in place.files) else "absent"


def _list(data_dir):
    say(f"{'name':13} {'images':>9} {'pixels':>6} {'to fetch':>9}  {'state':9} terms")
    for record in DATA_SETS.values():
        files = find(record.name, data_dir).files
        size = sum(remaining(path, file) for path, file in files.items())
        say(f"{record.name:13} {record.images['source']:>9,} {record.native or 'all':>6} "
            f"{f'{size / 1e6:,.0f} MB' if size else '-':>9}  {state(record, data_dir):9} "
            f"{record.terms}")


def main(argv):
    parser = Parser(description="Fetch, extract and pack data sets.")
    parser.add_argument("names", nargs="*", default=[], metavar="NAME|NAME=PATH", help="of "
                        f"{', '.join(DATA_SETS)}, or a folder of images, or tar shards")
    parser.add_argument("--all", action="store_true", help="every data set of the list")
    parser.add_argument("--list", action="store_true",
                        help="show every data set, its size, its state and its terms")
    add_flags(parser, ("data_dir", "seeds", "max_bad", "pack"))
    given = vars(parser.parse_args(argv))
    try:
        specs = [data_set_spec(name) for name in given.pop("names")]
    except ValueError as error:
        parser.error(str(error))
    specs = tuple(dict.fromkeys([*specs, *(DATA_SETS if given.pop("all", False) else ())]))
    show = given.pop("list", False) or not specs
    settings = Settings(target="", sources=specs, **given)
    if show:
        return _list(settings.data_dir)
    lines = []
    for spec in specs:          # a name or a path that does not exist
        find(spec, settings.data_dir)
    for work in (functools.partial(obtain, settings),
                 *(functools.partial(_load, settings, spec) for spec in specs)):
        try:                    # what fails does not keep the others back
            work()
        except UserError as error:
            lines += str(error).splitlines()
    require_none(lines)


def _load(settings, spec):
    place = find(spec, settings.data_dir)
    if place.kind == "absent" and not all(path.exists() for path in place.files):
        return                  # its line is there already
    source = load_source(settings, spec)
    what = "packed" if isinstance(source, Packed) else "will be decoded as they are read"
    bad = f", {source.bad:,} left out" if source.bad else ""
    say(f"{source.name}: {len(source):,} images {what}{bad}")


if __name__ == "__main__":
    command(main)
