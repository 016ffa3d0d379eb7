"""Layouts: how each data set lies on disk, and a reader for each: read(root, split) -> Images.

split: "train", "test" or "source"; what a source is, where it is not the training split, the reader says.
"""
import os
import pickle
import re

import numpy as np
from PIL import Image

from files import UserError
from packing import IMAGE_SIZE, ImageFiles, Images, digest, state_of

SVHN = "http://ufldl.stanford.edu/housenumbers/"
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff"}


def list_images(root, pattern=None):
    """Paths of the image files below `root` at any depth, relative to it, sorted by name. A folder that can't be
    read is among them, so that packing counts it."""
    found, seen = [], set()
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=lambda error: found.append(os.path.relpath(error.filename, root))):
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


def has_images(root):
    """Whether any image file lies below `root`."""
    return any(os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES for _, _, names in os.walk(root) for name in names)


def read_files(root, files, labels=None, classes=None):
    """Image files below `root`; files: relative paths."""
    return Images(len(files), ImageFiles(os.fspath(root), files), state_of(root, files),
                  None if labels is None else np.asarray(labels, np.int64), None if classes is None else list(classes), files)


def read_class_folders(root, pattern=None, exclude=()):
    """`root`/<class>/*: a class a folder, in the order of their names."""
    files = [path for path in list_images(root, pattern) if "/" in path and path.split("/")[0] not in exclude]
    classes = sorted({path.split("/")[0] for path in files})
    number = {name: i for i, name in enumerate(classes)}
    return read_files(root, files, [number[path.split("/")[0]] for path in files], classes)


def read_arrays(root, files, arrays, labels=None, classes=None):
    """Arrays, which `files` below `root` hold; arrays: a list of (n, H, W, 3) or (n, H, W) uint8, one after the other."""
    ends = np.cumsum([len(array) for array in arrays])

    def read(i):
        part = int(np.searchsorted(ends, i, side="right"))
        return Image.fromarray(np.ascontiguousarray(arrays[part][i - (ends[part - 1] if part else 0)]))

    return Images(int(ends[-1]), read, state_of(root, files), None if labels is None else np.asarray(labels, np.int64), classes)


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
    names = list(_unpickle(root / meta)[names_key])
    if not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise ValueError(f"{meta} holds no names of classes")
    return read_arrays(root, batches, arrays, labels, names)


def read_cifar10(root, split):
    batches = ["test_batch"] if split == "test" else [f"data_batch_{i}" for i in range(1, 6)]
    return _read_cifar(root, batches, "batches.meta", "labels", "label_names")


def read_cifar100(root, split):
    return _read_cifar(root, ["test" if split == "test" else "train"], "meta", "fine_labels", "fine_label_names")


def read_svhn(root, split):
    """X is height x width x channel x image; label 10 means the digit 0."""
    from scipy.io import loadmat
    name = f"{'test' if split == 'test' else 'train'}_32x32.mat"
    if not (root / name).exists():
        raise UserError(f"{root / name} is missing: fetch it from {SVHN}{name}")
    try:
        content = loadmat(root / name)
    except Exception as error:
        raise UserError(f"{root / name} is not a MATLAB file ({error}): delete it and fetch it again") from None
    digits = np.asarray(content["y"]).ravel()
    if not np.isin(digits, np.arange(1, 11)).all():
        raise ValueError(f"{name} has other labels than 1 to 10")
    return read_arrays(root, [name], [content["X"].transpose(3, 0, 1, 2)], digits % 10, [str(digit) for digit in range(10)])


class _Stl10Images:
    """One of STL10's binary files, read image by image: the unlabelled part alone is 2.8 GB."""

    SHAPE = (3, 96, 96)
    BYTES = 3 * 96 * 96

    def __init__(self, path):
        self.path = path
        self.count, rest = divmod(path.stat().st_size, self.BYTES)
        if rest:
            raise ValueError(f"{path.name} is cut short")

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        """(96, 96, 3) uint8; the file has planes of colour, each in column-major order."""
        return np.fromfile(self.path, np.uint8, self.BYTES, offset=int(i) * self.BYTES).reshape(self.SHAPE).transpose(2, 1, 0)


def read_stl10(root, split):
    """96x96. As a source: the labelled and the unlabelled part."""
    if split == "source":
        names = ["train_X.bin", "unlabeled_X.bin"]
        return read_arrays(root, names, [_Stl10Images(root / name) for name in names])
    labels = np.fromfile(root / f"{split}_y.bin", np.uint8).astype(np.int64) - 1
    classes = (root / "class_names.txt").read_text().split()
    return read_arrays(root, [f"{split}_X.bin", f"{split}_y.bin"], [_Stl10Images(root / f"{split}_X.bin")], labels, classes)


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
    whole = Images(len(pixels), lambda i: Image.fromarray(pixels[i]), digest(pixels.tobytes()),
                   digits.target.astype(np.int64), [str(digit) for digit in range(10)])
    order = np.random.default_rng(0).permutation(len(pixels))
    test = len(pixels) // 5
    return whole.take(np.sort(order[:test] if split == "test" else order[test:]))


def read_built_in_source(name):
    def read(seed, split):
        import builtin_sources
        return builtin_sources.read(name, seed)
    return read
