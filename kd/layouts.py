"""The data sets that have a name, and a reader of each one's official layout: read(root, split) ->
Images; split: train, test or source."""
import functools
import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from kd import drawn
from kd.download import RemoteFile
from kd.files import digest
from kd.readers import Images, list_images, read_class_folders, read_files, state_of


def _picture(pixels, i):
    return Image.fromarray(np.ascontiguousarray(pixels[i]))


def read_arrays(root, files, pixels, labels=None, classes=None):
    """(n, H, W, 3) uint8 that `files` below `root` hold."""
    return Images(len(pixels), functools.partial(_picture, pixels), state_of(root, files), labels,
                  classes)


def _read_cifar(kind, root, split):
    """kind: torchvision's class, which opens a file only when its checksum is the official one: a
    pickle can call any function."""
    from torchvision import datasets
    official = getattr(datasets, kind)(root.parent, train=split != "test")
    files = official.test_list if split == "test" else official.train_list
    return read_arrays(root, [name for name, _ in files], official.data,
                       np.array(official.targets), official.classes)


read_cifar10 = functools.partial(_read_cifar, "CIFAR10")
read_cifar100 = functools.partial(_read_cifar, "CIFAR100")


def read_svhn(root, split):
    """root: the training split's file; the test split's lies beside it. X is height x width x
    channel x image; label 10 means the digit 0."""
    from scipy.io import loadmat
    file = root.with_name("test_32x32.mat") if split == "test" else root
    content = loadmat(file)
    return read_arrays(root.parent, [file.name], content["X"].transpose(3, 0, 1, 2),
                       content["y"].ravel().astype(int) % 10, list("0123456789"))


def _stl10_picture(paths, i):
    """The files, 2.8 GB the unlabelled one, are mapped anew: workers that are not forked share no
    map. They have planes of colour, each in column-major order."""
    for path in paths:
        planes = np.memmap(path, np.uint8, "r").reshape(-1, 3, 96, 96)
        if i < len(planes):
            return _picture(planes.transpose(0, 3, 2, 1), i)
        i -= len(planes)


def read_stl10(root, split):
    """As a source: the labelled and the unlabelled part."""
    names, labels, classes = ["train_X.bin", "unlabeled_X.bin"], None, None
    if split != "source":
        names = [f"{split}_X.bin", f"{split}_y.bin"]
        labels = np.fromfile(root / names[1], np.uint8).astype(int) - 1
        classes = (root / "class_names.txt").read_text().split()
    paths = [root / name for name in names if name.endswith("_X.bin")]
    count = sum(path.stat().st_size for path in paths) // (3 * 96 * 96)
    return Images(count, functools.partial(_stl10_picture, paths), state_of(root, names), labels,
                  classes)


def read_tinyimagenet(root, split):
    """train/<wnid>/images/*.JPEG; the labelled val/ is the test split: test/ has no labels."""
    train = read_class_folders(root / "train")
    if split != "test":
        return train
    lines = (root / "val" / "val_annotations.txt").read_text().splitlines()
    files, wnids = zip(*(line.split("\t")[:2] for line in lines), strict=True)
    labels = np.array([train.classes.index(wnid) for wnid in wnids])
    return read_files(root / "val" / "images", files, labels, train.classes)


def read_places365(root, split):
    """val_256/*.jpg, without labels."""
    return read_files(root, list_images(root))


def read_caltech(root, split):
    """<class>/*.jpg directly in the class's folder: deeper lies junk. There is no official test
    split: every fifth image of each class is test, whatever the seed."""
    images = r"[^/]+/[^/]+\.jpg"
    if split == "source":
        return read_files(root, list_images(root, wanted=re.compile(images).fullmatch))
    of_classes = re.compile(r"(?!BACKGROUND_Google/|257\.clutter/)" + images)
    images = read_class_folders(root, wanted=of_classes.fullmatch)
    number = np.arange(images.count) - np.searchsorted(images.labels, images.labels)
    return images.take(np.flatnonzero((number % 5 == 4) == (split == "test")))


read_caltech101 = read_caltech256 = read_caltech


def read_digits(seed, split):
    """scikit-learn's 1,797 handwritten digits, 8x8 with 17 grey levels. A fixed fifth is the test
    split, whatever the seed."""
    from sklearn.datasets import load_digits
    digits = load_digits()
    pixels = (digits.images * (255 / 16)).round().astype(np.uint8)
    whole = Images(len(pixels), functools.partial(_picture, pixels), digest(pixels.tobytes()),
                   digits.target.astype(np.int64), list("0123456789"))
    order, test = np.random.default_rng(0).permutation(len(pixels)), len(pixels) // 5
    return whole.take(np.sort(order[:test] if split == "test" else order[test:]))


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


def registry():
    found = tomllib.loads(Path(__file__).with_name("data_sets.toml").read_text())
    for name, record in found.items():
        for key in ("files", "target_files"):
            record[key] = tuple(RemoteFile(**each) for each in record.get(key, ()))
        read = drawn.reader(name) if name in drawn.COUNTS else globals()[f"read_{name}"]
        found[name] = DataSet(name, read, **record)
    return found
