"""Data sets: where they are, what they hold, and their one form inside this project.

In:  official archives, official extracted layouts, or folders of images (see DATA_SETS and `--list`).
Out: a packed array for each, uint8 N x 32 x 32 x 3, memory-mapped, decoded once and reused for ever;
     batches of it on the device, augmented there.

    python data.py --list
    python data.py svhn stl10        # fetch, extract and pack
    python data.py --all
"""
import hashlib
import json
import os
import pickle
import re
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import requests
import torch
from PIL import Image

from run import Parser, Progress, UserError, command, say, seed_number, write_json, write_text

IMAGE_SIZE = 32
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff"}
MAX_BAD = 0.01          # share of unreadable images in a folder above which something else is wrong
TIMEOUT = (10, 60)      # seconds to connect, and between two pieces of an answer

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
# What a reader returns, and what packing makes of it
# --------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Images:
    """Images that are not decoded yet: `read(i)` gives the i-th as a Pillow image of any mode and size."""

    count: int
    read: Callable
    made_from: str                      # changes when the files change
    labels: np.ndarray | None = None    # (count,) int64; None where there are none
    classes: list | None = None
    files: list | None = None           # paths below the data set's folder; None where it is one big array
    rows: np.ndarray | None = None      # which images of the whole data set these are; None: all of them

    def take(self, rows):
        """Those images alone. rows: (n,) int64."""
        return Images(len(rows), lambda i: self.read(int(rows[i])), self.made_from + _digest(rows.tobytes()),
                      None if self.labels is None else self.labels[rows], self.classes,
                      None if self.files is None else [self.files[i] for i in rows],
                      rows if self.rows is None else self.rows[rows])

    def limited(self, limit):
        """At most `limit` images, evenly spaced, so that folders in the order of their classes keep all of them."""
        if limit is None or limit >= self.count:
            return self
        return self.take(np.linspace(0, self.count - 1, limit).round().astype(np.int64))


@dataclass(frozen=True)
class Packed:
    """A packed data set. images: (N, size, size, 3) uint8, memory-mapped; the rest as in `Images`."""

    images: np.ndarray
    labels: np.ndarray | None
    classes: list | None
    files: list | None
    rows: np.ndarray
    made_from: str

    def __len__(self):
        return len(self.images)


def decode(image, size=IMAGE_SIZE):
    """A Pillow image as (size, size, 3) uint8: what torchvision's Resize((size, size)) makes of it (bilinear,
    antialiased, aspect ratio not kept), grey as RGB."""
    image = image.convert("RGB")
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image)


def pack(images, folder, label, size=IMAGE_SIZE, chunk=2048):
    """Decodes `images` into `folder` unless it holds them already, and opens it. Memory holds one chunk.

    A file that can't be read is left out and listed with the reason in `bad.txt`; more than MAX_BAD of them
    is a UserError.
    """
    packed = open_pack(folder, images.made_from)
    if packed is not None:
        return packed
    beside = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{folder.parent} can't be written ({_first_line(error)}): choose another --data-dir") from None
    progress = Progress(f"packing {label}", images.count)

    def read(i):
        try:
            return decode(images.read(i), size)
        except Exception as error:      # whatever a broken file makes a decoder raise
            return f"{type(error).__name__}: {_first_line(error)}"

    try:
        out = np.lib.format.open_memmap(beside / "images.npy", "w+", np.uint8, (images.count, size, size, 3))
        good, bad = [], []
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for start in range(0, images.count, chunk):
                numbers = range(start, min(start + chunk, images.count))
                for i, pixels in zip(numbers, pool.map(read, numbers)):
                    if isinstance(pixels, str):
                        bad.append((i, pixels))
                    else:
                        out[len(good)] = pixels
                        good.append(i)
                progress.update(len(numbers))
        progress.close()
        out.flush()
        if bad:
            listing = "".join(f"{images.files[i] if images.files else i}\t{reason}\n" for i, reason in bad)
            if len(bad) > MAX_BAD * images.count:
                raise UserError(f"{label}: {len(bad)} of {images.count} images can't be read, the first is {listing.splitlines()[0]!r}")
            write_text(beside / "bad.txt", listing)
            whole = np.lib.format.open_memmap(beside / "good.npy", "w+", np.uint8, (len(good), size, size, 3))
            for start in range(0, len(good), chunk):
                whole[start:start + chunk] = out[start:min(start + chunk, len(good))]
            whole.flush()
            os.replace(beside / "good.npy", beside / "images.npy")
            say(f"{label}: {len(bad)} of {images.count} images can't be read and are left out, see {folder / 'bad.txt'}")
        rows = np.array(good, dtype=np.int64)
        np.save(beside / "rows.npy", rows if images.rows is None else images.rows[rows])
        if images.labels is not None:
            np.save(beside / "labels.npy", images.labels[rows])
        if images.files is not None:
            write_json(beside / "files.json", [images.files[i] for i in good])
        write_json(beside / "pack.json", {"images": len(good), "size": size, "made_from": images.made_from, "classes": images.classes})
        if folder.exists():     # made from files that have changed since
            os.replace(folder, beside.with_suffix(".old"))
            shutil.rmtree(beside.with_suffix(".old"))
        try:
            os.replace(beside, folder)
        except OSError:         # another process was faster; its pack is as good
            pass
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return open_pack(folder, images.made_from)


def open_pack(folder, made_from):
    """The pack in `folder`, or None where there is none or it was made from something else."""
    if not (folder / "pack.json").exists():
        return None

    def optional(name, read):
        return read(folder / name) if (folder / name).exists() else None

    try:
        meta = json.loads((folder / "pack.json").read_text())
        if meta["made_from"] != made_from:
            return None
        images = np.load(folder / "images.npy", mmap_mode="c")
        if images.shape != (meta["images"], meta["size"], meta["size"], 3):
            raise ValueError("it has another shape")
        return Packed(images, optional("labels.npy", np.load), meta["classes"],
                      optional("files.json", lambda path: json.loads(path.read_text())), np.load(folder / "rows.npy"), made_from)
    except (ValueError, OSError, KeyError) as error:
        raise UserError(f"{folder} is damaged ({_first_line(error)}): delete it, it is packed anew") from None


def _first_line(error):
    return (str(error).splitlines() or [type(error).__name__])[0]


def _digest(content):
    return hashlib.sha256(content).hexdigest()[:16]


def _state_of(root, paths):
    """A digest of names, sizes and times of change."""
    state = hashlib.sha256(os.path.realpath(root).encode("utf-8", "surrogateescape"))
    for path in paths:
        stat = os.stat(os.path.join(root, path))
        state.update(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return state.hexdigest()[:16]


# --------------------------------------------------------------------------------------------------
# Readers, one for a layout: read(root, split) -> Images
# --------------------------------------------------------------------------------------------------

def list_images(root, pattern=None):
    """Paths of the image files below `root` at any depth, relative to it, sorted by name."""
    found, seen = [], set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        if os.path.realpath(folder) in seen:        # a link to where we have been
            subfolders.clear()
            continue
        seen.add(os.path.realpath(folder))
        subfolders.sort()
        below = os.path.relpath(folder, root)
        found += [name if below == "." else f"{below}/{name}" for name in names
                  if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not name.startswith(".")]
    if pattern is not None:
        found = [path for path in found if re.fullmatch(pattern, path)]
    return sorted(found)


def read_files(root, files, labels=None, classes=None):
    """Image files below `root`; files: relative paths."""
    root = Path(root)

    def read(i):
        with Image.open(root / files[i]) as image:
            image.load()
            return image

    return Images(len(files), read, _state_of(root, files), None if labels is None else np.asarray(labels, np.int64),
                  None if classes is None else list(classes), list(files))


def read_class_folders(root, pattern=None, exclude=()):
    """`root`/<class>/*: a class a folder, in the order of their names."""
    files = [path for path in list_images(root, pattern) if "/" in path and path.split("/")[0] not in exclude]
    classes = sorted({path.split("/")[0] for path in files})
    number = {name: i for i, name in enumerate(classes)}
    return read_files(root, files, [number[path.split("/")[0]] for path in files], classes)


def read_arrays(root, files, arrays, labels=None, classes=None):
    """Arrays in memory or mapped; arrays: a list of (n, H, W, 3) or (n, H, W) uint8, one after the other."""
    ends = np.cumsum([len(array) for array in arrays])

    def read(i):
        part = int(np.searchsorted(ends, i, side="right"))
        return Image.fromarray(np.ascontiguousarray(arrays[part][i - (ends[part - 1] if part else 0)]))

    return Images(int(ends[-1]), read, _state_of(root, files), None if labels is None else np.asarray(labels, np.int64), classes)


class _CifarUnpickler(pickle.Unpickler):
    """CIFAR's batches are pickles, and a pickle can name any function to be called: only numpy's array is let in."""

    ALLOWED = {("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct"),
               ("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}

    def find_class(self, module, name):
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


def _unpickle(path):
    try:
        with open(path, "rb") as file:
            return _CifarUnpickler(file, encoding="latin1").load()
    except Exception as error:
        raise UserError(f"{path} is not a CIFAR batch ({error}): delete its folder and extract the archive again") from None


def _read_cifar(root, batches, meta, label_key, names_key):
    contents = [_unpickle(root / name) for name in batches]
    arrays = [np.asarray(batch["data"], np.uint8).reshape(-1, 3, IMAGE_SIZE, IMAGE_SIZE).transpose(0, 2, 3, 1) for batch in contents]
    labels = np.concatenate([batch[label_key] for batch in contents])
    return read_arrays(root, batches, arrays, labels, list(_unpickle(root / meta)[names_key]))


def read_cifar10(root, split):
    batches = [f"data_batch_{i}" for i in range(1, 6)] if split == "train" else ["test_batch"]
    return _read_cifar(root, batches, "batches.meta", "labels", "label_names")


def read_cifar100(root, split):
    return _read_cifar(root, [split], "meta", "fine_labels", "fine_label_names")


def read_svhn(root, split):
    """X is height x width x channel x image; label 10 means the digit 0."""
    from scipy.io import loadmat
    name = f"{split}_32x32.mat"
    if not (root / name).exists():
        raise UserError(f"{root / name} is missing: fetch it from {_SVHN}{name}")
    try:
        content = loadmat(root / name)
    except Exception as error:
        raise UserError(f"{root / name} is not a MATLAB file ({error}): delete it and fetch it again") from None
    return read_arrays(root, [name], [content["X"].transpose(3, 0, 1, 2)], content["y"].ravel() % 10, [str(digit) for digit in range(10)])


def read_stl10(root, split):
    """96x96, planes of colour, each in column-major order. As a source: the labelled and the unlabelled part."""
    def images(name):
        return np.memmap(root / name, np.uint8, "r").reshape(-1, 3, 96, 96).transpose(0, 3, 2, 1)

    if split == "source":
        return read_arrays(root, ["train_X.bin", "unlabeled_X.bin"], [images("train_X.bin"), images("unlabeled_X.bin")])
    labels = np.fromfile(root / f"{split}_y.bin", np.uint8).astype(np.int64) - 1
    classes = (root / "class_names.txt").read_text().split()
    return read_arrays(root, [f"{split}_X.bin", f"{split}_y.bin"], [images(f"{split}_X.bin")], labels, classes)


def read_tinyimagenet(root, split):
    """train/<wnid>/images/*.JPEG; the labelled val/ is the test split, since test/ has no labels."""
    train = list_images(root / "train")
    classes = sorted({path.split("/")[0] for path in train})
    number = {name: i for i, name in enumerate(classes)}
    if split != "test":
        return read_files(root / "train", train, [number[path.split("/")[0]] for path in train], classes)
    lines = [line.split("\t") for line in (root / "val" / "val_annotations.txt").read_text().splitlines()]
    return read_files(root / "val" / "images", [line[0] for line in lines], [number[line[1]] for line in lines], classes)


def read_places365(root, split):
    """val_256/*.jpg; its labels are a file of their own, which only a target needs."""
    files = list_images(root)
    if split == "source":
        return read_files(root, files)
    names, truth = root.parent / "categories_places365.txt", root.parent / "places365_val.txt"
    for path in (names, truth):
        if not path.exists():
            raise UserError(f"{path} is missing: places365 as a target needs it, from filelist_places365-standard.tar of places2.csail.mit.edu")
    classes = [line.split()[0] for line in names.read_text().splitlines()]
    label = dict(line.split() for line in truth.read_text().splitlines())
    return _fifth_as_test(read_files(root, files, [int(label[name]) for name in files], classes), split)


def read_caltech101(root, split):
    if split == "source":
        return read_files(root, list_images(root))
    return _fifth_as_test(read_class_folders(root, exclude=("BACKGROUND_Google",)), split)


def read_caltech256(root, split):
    """<class>/*.jpg directly in the class's folder: deeper down lies junk. 257.clutter is no class."""
    pattern = r"[^/]+/[^/]+\.jpg"
    if split == "source":
        return read_files(root, list_images(root, pattern))
    return _fifth_as_test(read_class_folders(root, pattern, exclude=("257.clutter",)), split)


def _fifth_as_test(images, split):
    """A data set with no official test split: every fifth image of each class is test, whatever the seed."""
    position = np.zeros(images.count, np.int64)
    for label in np.unique(images.labels):
        members = np.flatnonzero(images.labels == label)
        position[members] = np.arange(len(members))
    return images.take(np.flatnonzero((position % 5 == 4) == (split == "test")))


def read_digits(seed, split):
    """scikit-learn's 1,797 handwritten digits, 8x8 with 16 grey levels. A fixed fifth is the test split, whatever the seed."""
    from sklearn.datasets import load_digits
    digits = load_digits()
    pixels = (digits.images * (255 / 16)).round().astype(np.uint8)
    whole = Images(len(pixels), lambda i: Image.fromarray(pixels[i]), _digest(pixels.tobytes()),
                   digits.target.astype(np.int64), [str(digit) for digit in range(10)])
    order = np.random.default_rng(0).permutation(len(pixels))
    test = len(pixels) // 5
    return whole.take(np.sort(order[:test] if split == "test" else order[test:]))


def _read_built_in_source(name):
    def read(seed, split):
        import builtin_sources
        return builtin_sources.read(name, seed)
    return read


# --------------------------------------------------------------------------------------------------
# Registry
# --------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class RemoteFile:
    url: str
    size: int           # bytes
    md5: str

    @property
    def name(self):
        return self.url.partition("?")[0].rpartition("/")[2]


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


_SVHN = "http://ufldl.stanford.edu/housenumbers/"
_RESEARCH = "non-commercial research"

DATA_SETS = {record.name: record for record in (
    DataSet("cifar10", read_cifar10, "50k+10k", 32, "none stated",
            (RemoteFile("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz", 170498071, "c58f30108f718f92721af3b95e74349a"),),
            "cifar-10-batches-py", "batches.meta"),
    DataSet("cifar100", read_cifar100, "50k+10k", 32, "none stated",
            (RemoteFile("https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz", 169001437, "eb9058c3a382ffc7106e4002c42a8d85"),),
            "cifar-100-python", "meta"),
    DataSet("svhn", read_svhn, "73k+26k", 32, "non-commercial",
            (RemoteFile(_SVHN + "train_32x32.mat", 182040794, "e26dedcc434d2e4c54c9b2d4a06d8373"),), "svhn", "train_32x32.mat",
            target_archives=(RemoteFile(_SVHN + "test_32x32.mat", 64275384, "eb5a983be6a315427106f1b164d9cef3"),)),
    DataSet("tinyimagenet", read_tinyimagenet, "100k+10k", 64, f"{_RESEARCH} (ImageNet)",
            (RemoteFile("http://cs231n.stanford.edu/tiny-imagenet-200.zip", 248100043, "90528d7ca1a48142e341f4ef8d21d0de"),),
            "tiny-imagenet-200", "train"),
    DataSet("places365", read_places365, "36.5k", 256, "images belong to their owners",
            (RemoteFile("http://data.csail.mit.edu/places/places365/val_256.tar", 525158400, "e27b17d8d44f4af9a78502beb927f808"),),
            "val_256"),
    DataSet("stl10", read_stl10, "105k+8k", 96, f"{_RESEARCH} (ImageNet)",
            (RemoteFile("http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz", 2640397119, "91f7769df0f17e558f3565bffb0c7dfb"),),
            "stl10_binary", "unlabeled_X.bin"),
    DataSet("caltech256", read_caltech256, "30.6k", None, "CC BY 4.0",
            (RemoteFile("https://data.caltech.edu/records/nyy15-4j048/files/256_ObjectCategories.tar", 1183006720, "67b4f42ca05d46448c6bb8ecd2220f6d"),),
            "256_ObjectCategories"),
    DataSet("caltech101", read_caltech101, "9.1k", None, "CC BY 4.0",
            (RemoteFile("https://data.caltech.edu/records/mzrjq-6wc02/files/caltech-101.zip", 137414764, "3138e1922a9193bfa496528edbbc45d0"),),
            "101_ObjectCategories"),
    DataSet("digits", read_digits, "1.4k+0.4k", 8, "BSD-3 (scikit-learn)", built_in=True),
    DataSet("glyphs", _read_built_in_source("glyphs"), "drawn", 8, "drawn here", built_in=True),
    DataSet("photos", _read_built_in_source("photos"), "cropped", None, "CC BY (scikit-learn)", built_in=True),
    DataSet("noise", _read_built_in_source("noise"), "drawn", None, "drawn here", built_in=True),
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
# Fetching and extracting
# --------------------------------------------------------------------------------------------------

def reachable(url):
    """Whether a server answers for this address; None, or the reason why not."""
    try:
        with requests.get(url, stream=True, timeout=TIMEOUT[0]) as answer:
            return None if answer.ok else f"answers {answer.status_code}"
    except requests.RequestException as error:
        return f"can't be reached ({type(error).__name__})"


def fetch(url, path, size=None, *, md5=None, sha256_prefix=None):
    """Fetches `url` to `path`, which it becomes only once size and checksum are right."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with requests.get(url, stream=True, timeout=TIMEOUT) as answer, open(part, "wb") as file:
            answer.raise_for_status()
            progress = Progress(f"fetching {path.name}", int(answer.headers.get("Content-Length", size or 0)), "B")
            for piece in answer.iter_content(1 << 20):
                file.write(piece)
                progress.update(len(piece))
            progress.close()
        verify(part, size, md5, sha256_prefix, name=url)
        os.replace(part, path)
    except requests.RequestException as error:
        raise UserError(f"{url} can't be fetched ({type(error).__name__}): fetch it by hand and put it at {path}") from None
    finally:
        part.unlink(missing_ok=True)


def verify(path, size=None, md5=None, sha256_prefix=None, name=None):
    name = name or path
    if size is not None and path.stat().st_size != size:
        raise UserError(f"{name} is not whole: {path.stat().st_size:,} bytes instead of {size:,}; delete it and fetch it again")
    for algorithm, expected in (("md5", md5), ("sha256", sha256_prefix)):
        if expected is None:
            continue
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, algorithm).hexdigest()
        if not found.startswith(expected):
            raise UserError(f"{name} has the wrong {algorithm}, {found} instead of {expected}: delete it and fetch it again")


def extract(archive, data_dir, record):
    """Extracts `archive` into a folder beside the layout's place, and moves it there when it is whole."""
    if not archive.name.endswith((".zip", ".tar", ".tar.gz")):
        target = data_dir / record.layout / archive.name        # SVHN: the file is the layout
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(archive, target)
        return
    if (data_dir / record.layout).exists():
        raise UserError(f"{data_dir / record.layout} is incomplete: delete it, it is extracted anew from {archive.name}")
    beside = data_dir / f".{record.layout}.{os.getpid()}.part"
    say(f"extracting {archive.name}")
    try:
        _extract_into(archive, beside)
        for nested in list(beside.rglob("[!.]*.tar.gz")):       # Caltech101's zip holds two tars
            _extract_into(nested, beside)
        found = next((path for path in beside.rglob(record.layout) if path.is_dir()), None)
        if found is None:
            raise UserError(f"{archive} does not hold {record.layout}/: delete it and fetch it again")
        os.replace(found, data_dir / record.layout)
    except (tarfile.TarError, zipfile.BadZipFile, OSError, EOFError) as error:
        raise UserError(f"{archive} can't be extracted ({_first_line(error)}): delete it and fetch it again") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _extract_into(archive, folder):
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive) as content:
            content.extractall(folder)              # zipfile itself drops "..", and has no links
    else:
        with tarfile.open(archive) as content:
            content.extractall(folder, filter="data")


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
                raise UserError(f"{place.path} is incomplete or damaged ({_first_line(error)}): delete it and extract the archive again") from None
        elif role == "target":
            images = read_class_folders(place.path / split)
        else:
            root = place.path / "train" if (place.path / "train").is_dir() else place.path
            images = read_files(root, list_images(root))
    if images.count == 0:
        raise UserError(f"{spec}: no images found ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return images


_TRAIN_IS_SOURCE = (read_cifar10, read_cifar100, read_svhn)


def _pack_spec(images, spec, split, data_dir, seed, limit, size):
    name, _, path = spec.partition("=")
    parts = [name, split, str(size)]
    if path:
        parts.append(_digest(str(Path(path).resolve()).encode())[:8])
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
