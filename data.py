"""Data sets: where they are, what they hold, and their one form inside this project.

In:  official archives, official extracted layouts, or folders of images (see DATA_SETS and `--list`).
Out: a packed array for each, uint8 N x 32 x 32 x 3, memory-mapped, decoded once and reused for ever;
     batches of it on the device, augmented there.

    python data.py --list
    python data.py svhn stl10        # fetch, extract and pack
    python data.py --all
"""
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

import layouts
from archives import extract
from download import RemoteFile, fetch, reachable, verify
from layouts import list_images, read_class_folders, read_files
from packing import IMAGE_SIZE, Images, Packed, digest, first_line, pack
from run import Parser, UserError, command, say, seed_number

# --------------------------------------------------------------------------------------------------
# Batches
# --------------------------------------------------------------------------------------------------


def epoch_generator(seed, epoch):
    """A CPU generator that depends on the seed and the epoch alone, so that a resumed epoch repeats itself."""
    return torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2 ** 63)


def shuffled_batches(rows, batch_size, generator):
    """Splits `rows` (int64, N) in random order into full batches; a rest smaller than a batch waits for
    another epoch, unless it is all there is."""
    batch_size = min(batch_size, len(rows))
    order = rows[torch.randperm(len(rows), generator=generator)]
    return order[:len(rows) // batch_size * batch_size].split(batch_size)


def augment(images, steps, generator, padding=4):
    """Random crops and flips of a whole batch, on its device, without a loop over images.

    images: (N, H, W, 3) uint8. steps: "none", or "crop" and "flip" joined by commas. A crop shifts by up to
    `padding` pixels either way; what comes in from outside is the image reflected at its edge.
    """
    steps = [] if steps == "none" else steps.split(",")
    count, height, width, _ = images.shape
    y = torch.arange(height, device=images.device).expand(count, height)
    x = torch.arange(width, device=images.device).expand(count, width)
    if "crop" in steps:
        shift = _moved(torch.randint(-padding, padding + 1, (2, count, 1), generator=generator), images.device)
        y = height - 1 - (height - 1 - (y + shift[0]).abs()).abs()      # reflected into 0 ... height - 1
        x = width - 1 - (width - 1 - (x + shift[1]).abs()).abs()
    if "flip" in steps:
        flip = _moved(torch.rand((count, 1), generator=generator) < 0.5, images.device)
        x = torch.where(flip, x.flip(1), x)
    if not steps:
        return images
    image = torch.arange(count, device=images.device)[:, None, None]
    return images[image, y[:, :, None], x[:, None, :]]


def _moved(drawn, device):
    """What was drawn on the CPU, on the device; nothing waits for the copy."""
    return (drawn.pin_memory() if device.type == "cuda" else drawn).to(device, non_blocking=True)


# --------------------------------------------------------------------------------------------------
# Registry
# --------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class DataSet:
    """One data set: what to fetch, the folder that its archives hold, and the reader of that layout."""

    name: str
    read: Callable
    images: str                         # as published, for --list
    native: int | None                  # edge in pixels; None: all sizes
    terms: str
    archives: tuple = ()
    layout: str = ""                    # path below the data folder
    marker: str = ""                    # a file in it that the reader needs
    target_archives: tuple = field(default=())      # needed in addition when it is a target
    built_in: bool = False


_RESEARCH = "non-commercial research"

DATA_SETS = {record.name: record for record in (
    DataSet("cifar10", layouts.read_cifar10, "50k+10k", 32, "none stated",
            (RemoteFile("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz", 170498071, "c58f30108f718f92721af3b95e74349a"),),
            "cifar-10-batches-py", "batches.meta"),
    DataSet("cifar100", layouts.read_cifar100, "50k+10k", 32, "none stated",
            (RemoteFile("https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz", 169001437, "eb9058c3a382ffc7106e4002c42a8d85"),),
            "cifar-100-python", "meta"),
    DataSet("svhn", layouts.read_svhn, "73k+26k", 32, "non-commercial",
            (RemoteFile(layouts.SVHN + "train_32x32.mat", 182040794, "e26dedcc434d2e4c54c9b2d4a06d8373"),), "svhn", "train_32x32.mat",
            target_archives=(RemoteFile(layouts.SVHN + "test_32x32.mat", 64275384, "eb5a983be6a315427106f1b164d9cef3"),)),
    DataSet("tinyimagenet", layouts.read_tinyimagenet, "100k+10k", 64, f"{_RESEARCH} (ImageNet)",
            (RemoteFile("http://cs231n.stanford.edu/tiny-imagenet-200.zip", 248100043, "90528d7ca1a48142e341f4ef8d21d0de"),),
            "tiny-imagenet-200", "train"),
    DataSet("places365", layouts.read_places365, "36.5k", 256, "images belong to their owners",
            (RemoteFile("http://data.csail.mit.edu/places/places365/val_256.tar", 525158400, "e27b17d8d44f4af9a78502beb927f808"),),
            "val_256"),
    DataSet("stl10", layouts.read_stl10, "105k+8k", 96, f"{_RESEARCH} (ImageNet)",
            (RemoteFile("http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz", 2640397119, "91f7769df0f17e558f3565bffb0c7dfb"),),
            "stl10_binary", "unlabeled_X.bin"),
    DataSet("caltech256", layouts.read_caltech256, "30.6k", None, "CC BY 4.0",
            (RemoteFile("https://data.caltech.edu/records/nyy15-4j048/files/256_ObjectCategories.tar", 1183006720, "67b4f42ca05d46448c6bb8ecd2220f6d"),),
            "256_ObjectCategories"),
    DataSet("caltech101", layouts.read_caltech101, "9.1k", None, "CC BY 4.0",
            (RemoteFile("https://data.caltech.edu/records/mzrjq-6wc02/files/caltech-101.zip", 137414764, "3138e1922a9193bfa496528edbbc45d0"),),
            "101_ObjectCategories"),
    DataSet("digits", layouts.read_digits, "1.4k+0.4k", 8, "BSD-3 (scikit-learn)", built_in=True),
    DataSet("glyphs", layouts.read_built_in_source("glyphs"), "drawn", 8, "drawn here", built_in=True),
    DataSet("photos", layouts.read_built_in_source("photos"), "cropped", None, "CC BY (scikit-learn)", built_in=True),
    DataSet("noise", layouts.read_built_in_source("noise"), "drawn", None, "drawn here", built_in=True),
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

    role: "source" or "target". A target's folder must hold train/ and test/.
    """
    data_dir = Path(data_dir)
    if record.built_in:
        return Place("built-in")
    for path in (data_dir / record.layout, data_dir / record.name / record.layout):
        if (path / record.marker).exists():
            return Place("layout", path)
    folder = data_dir / record.name
    if (folder / "train").is_dir() and (role == "source" or (folder / "test").is_dir()):
        return Place("folder", folder)
    if role == "source" and folder.is_dir() and next(iter(list_images(folder)), None):
        return Place("folder", folder)
    if all((data_dir / archive.name).exists() for archive in record.archives):
        return Place("archive", data_dir)
    return Place("absent")


def ensure(record, data_dir, role="source"):
    """Fetches and extracts a data set where that is needed. Returns the Place of what can be read."""
    place = locate(record, data_dir, role)
    archives = record.archives + (record.target_archives if role == "target" else ())
    if place.kind == "layout" and record.layout == record.name:     # the files are the layout (SVHN)
        archives = tuple(archive for archive in archives if not (place.path / archive.name).exists())
        for archive in archives:
            fetch(archive.url, place.path / archive.name, archive.size, md5=archive.md5)
    elif place.kind in ("archive", "absent"):
        for archive in archives:
            path = Path(data_dir) / archive.name
            if path.exists():
                verify(path, archive.size, archive.md5)
            else:
                fetch(archive.url, path, archive.size, md5=archive.md5)
            extract(path, Path(data_dir), record)
        place = locate(record, data_dir, role)
    return place


def missing(specs, data_dir):
    """What would have to be fetched: (record, role, archives) for each spec that isn't on disk.

    specs: (NAME or NAME=PATH, role). Raises UserError for a name or a path that doesn't exist.
    """
    absent = []
    for spec, role in specs:
        name, equals, path = spec.partition("=")
        if equals:
            _check_folder(name, Path(path), role)
            continue
        record = _record(name)
        if role == "target" and record.built_in and name != "digits":
            raise UserError(f"{name} has no classes and can't be a target")
        place = locate(record, data_dir, role)
        archives = record.archives + (record.target_archives if role == "target" else ())
        if place.kind == "absent":
            absent.append((record, role, [a for a in archives if not (Path(data_dir) / a.name).exists()]))
        elif place.kind == "layout" and record.layout == record.name:
            lacking = [a for a in archives if not (place.path / a.name).exists()]
            absent += [(record, role, lacking)] if lacking else []
    return absent


def _check_folder(name, path, role):
    if not path.is_dir():
        raise UserError(f"{name}={path}: there is no such folder")
    if role == "target":
        for split in ("train", "test"):
            if not (path / split).is_dir():
                raise UserError(f"{name}={path}: a target's folder holds train/<class>/* and test/<class>/*, and {path / split} is missing")


def unavailable(specs, data_dir):
    """A line for each data set that is neither on disk nor to be had: its address and where to put it by hand.

    Says how much will be fetched, when everything can be. specs as in `missing`.
    """
    absent = missing(specs, data_dir)
    urls = [archive.url for _, _, archives in absent for archive in archives]
    with ThreadPoolExecutor(len(urls) or 1) as pool:
        reasons = dict(zip(urls, pool.map(reachable, urls)))
    lines = []
    for record, role, archives in absent:
        lacking = [archive for archive in archives if reasons[archive.url]]
        if lacking:
            files = " and ".join(f"{archive.url} {reasons[archive.url]}" for archive in lacking)
            folder = Path(data_dir) / record.name
            lines.append(f"{record.name} is missing and {files}: put {' and '.join(archive.name for archive in lacking)} into {Path(data_dir)}/, "
                         f"or what it holds at {Path(data_dir) / record.layout}/, or images "
                         + (f"in {folder}/train/<class>/ and {folder}/test/<class>/" if role == "target" else f"below {folder}/"))
    if absent and not lines:
        size = sum(archive.size for _, _, archives in absent for archive in archives)
        say(f"to fetch: {', '.join(record.name for record, _, _ in absent)}, {size / 1e6:,.0f} MB in all")
    return lines

# --------------------------------------------------------------------------------------------------
# Loading: what the stages call
# --------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Target:
    """The data set whose classes the teacher knows: its two splits, packed, and the names of its classes."""

    train: Packed
    test: Packed
    classes: list


def load_target(spec, data_dir="data", seed=0, limit=None, size=IMAGE_SIZE):
    """Packs and opens both splits of `NAME` or `NAME=PATH`."""
    train, test = (_read(spec, data_dir, "target", split, seed) for split in ("train", "test"))
    if train.classes != test.classes:
        only = sorted(set(train.classes) ^ set(test.classes))
        raise UserError(f"{spec}: train and test have different classes, {', '.join(only[:5])} is in only one of them")
    if len(train.classes) < 2:
        raise UserError(f"{spec}: a target needs two classes or more, found {len(train.classes)}")
    packs = [_pack_spec(images.limited(limit), spec, split, data_dir, seed, limit, size)
             for images, split in ((train, "train"), (test, "test"))]
    return Target(*packs, train.classes)


def load_source(spec, data_dir="data", seed=0, limit=None, size=IMAGE_SIZE):
    """Packs and opens the source `NAME` or `NAME=PATH`. Its labels, if it has any, are not kept."""
    images = _read(spec, data_dir, "source", "source", seed)
    unlabelled = Images(images.count, images.read, images.made_from, files=images.files, rows=images.rows)
    return _pack_spec(unlabelled.limited(limit), spec, "source", data_dir, seed, limit, size)


def _read(spec, data_dir, role, split, seed):
    name, equals, path = spec.partition("=")
    if equals:
        _check_folder(name, Path(path), role)
        root = Path(path)
        images = read_class_folders(root / split) if role == "target" else read_files(root, list_images(root))
    else:
        record = _record(name)
        place = ensure(record, data_dir, role)
        if place.kind == "built-in":
            images = record.read(seed, split)
        elif place.kind == "layout":
            try:
                images = record.read(place.path, "train" if split == "source" and record.read in _TRAIN_IS_SOURCE else split)
            except (OSError, KeyError, ValueError, IndexError) as error:
                raise UserError(f"{place.path} is incomplete or damaged ({first_line(error)}): delete it and extract the archive again") from None
        elif role == "target":
            images = read_class_folders(place.path / split)
        else:
            root = place.path / "train" if (place.path / "train").is_dir() else place.path
            images = read_files(root, list_images(root))
    if images.count == 0:
        raise UserError(f"{spec}: no images found ({', '.join(sorted(layouts.IMAGE_SUFFIXES))})")
    return images


_TRAIN_IS_SOURCE = (layouts.read_cifar10, layouts.read_cifar100, layouts.read_svhn)


def _pack_spec(images, spec, split, data_dir, seed, limit, size):
    name, _, path = spec.partition("=")
    parts = [name, split, str(size)]
    if path:
        parts.append(digest(str(Path(path).resolve()).encode())[:8])
    if name in DATA_SETS and DATA_SETS[name].built_in and name != "digits":
        parts.append(f"seed{seed}")
    if limit is not None:
        parts.append(f"limit{limit}")
    return pack(images, Path(data_dir) / "packed" / "-".join(parts), name if split == "source" else f"{name} {split}", size)


# --------------------------------------------------------------------------------------------------
# Command
# --------------------------------------------------------------------------------------------------

def _list(data_dir):
    say(f"{'name':13} {'images':>9} {'pixels':>6} {'to fetch':>9}  {'state':9} terms")
    for record in DATA_SETS.values():
        place = locate(record, data_dir)
        packed = any(next((Path(data_dir) / "packed").glob(f"{record.name}-*-{IMAGE_SIZE}{seed}/pack.json"), None) for seed in ("", "-seed*"))
        size = sum(archive.size for archive in record.archives)
        say(f"{record.name:13} {record.images:>9} {record.native or 'all':>6} {f'{size / 1e6:,.0f} MB' if size else '-':>9}  "
            f"{'packed' if packed else place.kind:9} {record.terms}")


def main(argv):
    parser = Parser(description="Fetch, extract and pack data sets.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"data sets, of {', '.join(DATA_SETS)}")
    parser.add_argument("--all", action="store_true", help="every data set of the list")
    parser.add_argument("--list", action="store_true", help="show every data set, its size, its state and its terms")
    parser.add_argument("--data-dir", default="data", metavar="DIR", help="where they are looked for, fetched to and packed (default: data)")
    parser.add_argument("--seed", type=seed_number, default=0, metavar="N", help="of the sources that are drawn here (default: 0)")
    args = parser.parse_args(argv)
    if args.list or not (args.names or args.all):
        return _list(args.data_dir)
    names = list(DATA_SETS) if args.all else args.names
    for name in names:
        _record(name)
    for name in names:
        images = load_source(name, args.data_dir, args.seed)
        say(f"{name}: {len(images):,} images packed")


if __name__ == "__main__":
    command(main)
