"""Data sets in the layouts of the official ones, small and generated; archives of them; and processes to read them in."""
import dataclasses
import hashlib
import io
import multiprocessing
import os
import pickle
import shutil
import struct
import sys
import tarfile
import tempfile
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
import download
from packing import CHECKED

RED, GREEN, BLUE, WHITE = (250, 10, 10), (10, 250, 10), (10, 10, 250), (240, 240, 240)
JPEG_TOLERANCE = 4

# How many images the writers below write.
SMALL = {
    "cifar10": {"train": 10, "test": 3, "source": 10},
    "cifar100": {"train": 3, "test": 2, "source": 3},
    "svhn": {"train": 3, "test": 2, "source": 3},
    "stl10": {"train": 2, "test": 3, "source": 6},
    "tinyimagenet": {"train": 4, "test": 3, "source": 4},
    "places365": {"source": 3},
    "caltech256": {"source": 20},
    "caltech101": {"source": 18},
}


def expect_small(monkeypatch):
    """The registry with the counts and the sizes of what is written here."""
    for name, counts in SMALL.items():
        monkeypatch.setitem(data.DATA_SETS, name, dataclasses.replace(data.DATA_SETS[name], images=counts, unpacked=1_000_000))


def register(monkeypatch, name, url, content):
    """Puts the address, size and checksum of our small archive into the registry."""
    file = download.RemoteFile((url,), len(content), hashlib.md5(content).hexdigest())
    monkeypatch.setitem(data.DATA_SETS, name, dataclasses.replace(data.DATA_SETS[name], files=(file,)))


def random_pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def assert_colour(image, colour, tolerance=0):
    assert np.abs(image.astype(int) - np.asarray(colour)).max() <= tolerance


def save_image(path, colour=RED, size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L" if isinstance(colour, int) else "RGB", size, colour).save(path)


def save_images(root, names, colour=RED):
    for name in names:
        save_image(root / name, colour)


def names_in(folder):
    """What lies in a folder, the locks left out and the note that a pack has been checked."""
    return sorted(path.name for path in Path(folder).iterdir() if path.name not in (".locks", CHECKED))


def leftovers(folder):
    return [str(path) for path in Path(folder).rglob("*") if ".part" in path.name or ".old" in path.name]


# --------------------------------------------------------------------------------------------------
# Layouts
# --------------------------------------------------------------------------------------------------

class Python2Pickler(pickle._Pickler):
    """Writes str and bytes as Python 2 wrote its str, as the official batches are."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_string(self, value):
        content = value.encode("latin1") if isinstance(value, str) else value
        self.write(pickle.BINSTRING + struct.pack("<i", len(content)) + content)

    dispatch[str] = dispatch[bytes] = save_string


def dump_python2(content):
    buffer = io.BytesIO()
    Python2Pickler(buffer, protocol=2).dump(content)
    return buffer.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def dump_python3(content):
    return pickle.dumps(content, protocol=4)


def cifar_rows(count, first):
    """Rows of 3072 bytes; image i has `first + i` at row 2, column 5 of red, and 10, 20, 30 around it."""
    rows = np.tile(np.repeat(np.array([10, 20, 30], np.uint8), 1024), (count, 1))
    rows[:, 2 * 32 + 5] = first + np.arange(count)
    return rows


def write_cifar10(data_dir, dump=dump_python3):
    root = data_dir / "cifar-10-batches-py"
    root.mkdir(parents=True)
    for k in range(1, 6):
        (root / f"data_batch_{k}").write_bytes(dump({"batch_label": f"training batch {k} of 5", "data": cifar_rows(2, 100 + 10 * k), "labels": [k, k - 1],
                                                     "filenames": ["a.png", "b.png"]}))
    (root / "test_batch").write_bytes(dump({"batch_label": "testing batch 1 of 1", "data": cifar_rows(3, 200), "labels": [9, 0, 4]}))
    (root / "batches.meta").write_bytes(dump({"num_cases_per_batch": 2, "label_names": [f"class{i}" for i in range(10)], "num_vis": 3072}))
    return root


def write_cifar100(data_dir, dump=dump_python3):
    root = data_dir / "cifar-100-python"
    root.mkdir(parents=True)
    for name, first, fine in (("train", 50, [99, 3, 7]), ("test", 80, [0, 42])):
        (root / name).write_bytes(dump({"data": cifar_rows(len(fine), first), "fine_labels": fine, "coarse_labels": [1] * len(fine)}))
    (root / "meta").write_bytes(dump({"fine_label_names": [f"fine{i}" for i in range(100)], "coarse_label_names": [f"coarse{i}" for i in range(20)]}))
    return root


def write_svhn(data_dir):
    from scipy.io import savemat
    root = data_dir / "svhn"
    root.mkdir(parents=True)
    for split, labels in (("train", [1, 10, 9]), ("test", [10, 5])):
        pixels = np.full((32, 32, 3, len(labels)), 7, np.uint8)
        pixels[2, 5, 1, 1] = 200        # row 2, column 5, green, second image
        savemat(root / f"{split}_32x32.mat", {"X": pixels, "y": np.array(labels, np.uint8)[:, None]})
    return root


def write_stl10(data_dir):
    """In image i the byte for red at row 2, column 5 is 100 + i. The parts are told apart by their blue."""
    root = data_dir / "stl10_binary"
    root.mkdir(parents=True)
    for part, count, blue in (("train", 2, 1), ("test", 3, 2), ("unlabeled", 4, 3)):
        content = bytearray()
        for i in range(count):
            red = bytearray(96 * 96)
            red[5 * 96 + 2] = 100 + i       # columns one after the other
            content += red + bytes(96 * 96) + bytes([blue]) * (96 * 96)
        (root / f"{part}_X.bin").write_bytes(bytes(content))
    (root / "train_y.bin").write_bytes(bytes([1, 10]))
    (root / "test_y.bin").write_bytes(bytes([3, 2, 1]))
    (root / "class_names.txt").write_text("airplane\nbird\ncar\ncat\ndeer\ndog\nhorse\nmonkey\nship\ntruck\n")
    return root


def write_tinyimagenet(data_dir):
    root = data_dir / "tiny-imagenet-200"
    for wnid, colour in (("n02", GREEN), ("n01", RED)):
        for i in range(2):
            save_image(root / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", colour, (64, 64))
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t0\t63\t63\n")
    for i, colour in enumerate((GREEN, RED, GREEN)):
        save_image(root / "val" / "images" / f"val_{i}.JPEG", colour, (64, 64))
    (root / "val" / "val_annotations.txt").write_text("".join(f"val_{i}.JPEG\t{wnid}\t0\t0\t62\t62\n" for i, wnid in enumerate(("n02", "n01", "n02"))))
    save_image(root / "test" / "images" / "test_0.JPEG", BLUE, (64, 64))
    return root


def write_places365(data_dir):
    root = data_dir / "val_256"
    for i, colour in ((2, GREEN), (1, RED), (10, BLUE)):
        save_image(root / f"Places365_val_{i:08d}.jpg", colour, (256, 256))
    return root


def write_caltech256(data_dir):
    root = data_dir / "256_ObjectCategories"
    save_images(root, [f"056.dog/056_{i:04d}.jpg" for i in range(1, 13)], RED)
    save_images(root, [f"198.spider/198_{i:04d}.jpg" for i in range(1, 6)], 120)
    save_images(root, [f"257.clutter/257_{i:04d}.jpg" for i in range(1, 4)], BLUE)
    save_image(root / "056.dog" / "greg" / "x.jpg", WHITE)
    (root / "198.spider" / "RENAME2").write_text("mv a b\n")
    return root


def write_caltech101(data_dir):
    root = data_dir / "101_ObjectCategories"
    for name, colour in (("accordion", RED), ("Motorbikes", GREEN), ("BACKGROUND_Google", BLUE)):
        save_images(root, [f"{name}/image_{i:04d}.jpg" for i in range(1, 7)], colour)
    (root / "BACKGROUND_Google" / "tmp").write_text("")
    return root


WRITERS = {"cifar10": write_cifar10, "cifar100": write_cifar100, "svhn": write_svhn, "stl10": write_stl10, "tinyimagenet": write_tinyimagenet,
           "places365": write_places365, "caltech256": write_caltech256, "caltech101": write_caltech101}


def write_class_folders(root, test_classes=("airplane", "bird")):
    save_image(root / "train" / "bird" / "b.png", GREEN)
    save_image(root / "train" / "airplane" / "deep" / "er" / "a.png", RED)
    save_image(root / "train" / "airplane" / "z.png", RED)
    for name in test_classes:
        save_image(root / "test" / name / "t.png", WHITE)


# --------------------------------------------------------------------------------------------------
# Archives
# --------------------------------------------------------------------------------------------------

def tar_of(root, *names, mode="w:gz"):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name in names:
            archive.add(root / name, name)
    return buffer.getvalue()


def cifar10_archive(folder):
    write_cifar10(folder)
    return tar_of(folder, "cifar-10-batches-py")


def caltech101_zip(folder, *more):
    write_caltech101(folder)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("caltech-101/101_ObjectCategories.tar.gz", tar_of(folder, "101_ObjectCategories"))
        archive.writestr("caltech-101/Annotations.tar", b"")
        archive.writestr("caltech-101/show_annotation.m", b"% matlab")
        for name, content in more:
            archive.writestr(name, content)
    return buffer.getvalue()


# --------------------------------------------------------------------------------------------------
# Processes
# --------------------------------------------------------------------------------------------------

forks = pytest.mark.skipif(sys.platform != "linux", reason="this system does not fork")


def start(function, *args):
    """A process of its own that calls `function(*args)`."""
    process = multiprocessing.get_context("fork").Process(target=function, args=args)
    process.start()
    return process


def as_nobody(function, *args):
    """What `function(*args)` returns, or the exception it raises, in a process that may write only where everybody may."""
    ours, theirs = multiprocessing.get_context("fork").Pipe(duplex=False)

    def tell():
        if os.getuid() == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        try:
            theirs.send(function(*args))
        except Exception as error:
            theirs.send(error)

    process = start(tell)
    theirs.close()
    try:
        return ours.recv()
    finally:
        process.join()


@contextmanager
def shared_folder():
    """An empty folder that everybody may enter and only its owner may write to."""
    folder = Path(tempfile.mkdtemp())
    try:
        folder.chmod(0o755)
        yield folder
    finally:
        for path in folder.rglob("*"):
            if path.is_dir():
                path.chmod(0o755)
        shutil.rmtree(folder)
