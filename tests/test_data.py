"""Data sets: what every layout is read as, what state each is in, what is refused, and what a batch becomes.

All files are generated, small, in the layout of the official ones.
"""
import contextlib
import dataclasses
import hashlib
import io
import os
import pickle
import re
import shutil
import socket
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import Resize

import builtin_sources
import data
import download
import layouts
import packing
import run
from data import load_source, load_target
from files import UserError
from layout_files import (BLUE, GREEN, JPEG_TOLERANCE, RED, SMALL, WRITERS, as_nobody, assert_colour, dump_python2, dump_python3,
                          expect_small, forks, names_in, random_pixels, register, save_image, save_images, shared_folder, tar_of, write_caltech101,
                          write_caltech256, write_cifar10, write_cifar100, write_class_folders, write_places365, write_stl10, write_svhn, write_tinyimagenet)

OFFICIAL = dict(data.DATA_SETS)
ARRAYS, IMAGE_FILES = ("cifar10", "cifar100", "svhn", "stl10"), ("tinyimagenet", "places365", "caltech256", "caltech101")


@pytest.fixture(autouse=True)
def small_data_sets(monkeypatch):
    expect_small(monkeypatch)
    monkeypatch.setattr(os, "sync", lambda: None)


# --------------------------------------------------------------------------------------------------
# CIFAR
# --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dump", [dump_python2, dump_python3])
def test_cifar10_batches_are_planes_of_rows_in_the_order_of_the_batches(tmp_path, dump):
    write_cifar10(tmp_path, dump)
    target = load_target("cifar10", tmp_path)
    assert target.classes == [f"class{i}" for i in range(10)]
    assert target.train.labels.tolist() == [1, 0, 2, 1, 3, 2, 4, 3, 5, 4]
    assert target.test.labels.tolist() == [9, 0, 4]
    assert target.train.images.shape == (10, 32, 32, 3) and target.train.images.dtype == np.uint8
    assert target.train.images[:, 2, 5].tolist() == [[value, 20, 30] for value in (110, 111, 120, 121, 130, 131, 140, 141, 150, 151)]
    assert target.test.images[:, 2, 5, 0].tolist() == [200, 201, 202]
    assert target.train.images[3, 5, 2].tolist() == [10, 20, 30]


def test_cifar10_as_a_source_is_its_training_split_without_labels(tmp_path):
    write_cifar10(tmp_path)
    source = load_source("cifar10", tmp_path)
    assert source.images[:, 2, 5, 0].tolist() == [110, 111, 120, 121, 130, 131, 140, 141, 150, 151]
    assert source.labels is None and source.classes is None


@pytest.mark.parametrize("dump", [dump_python2, dump_python3])
def test_cifar100_has_the_fine_labels(tmp_path, dump):
    write_cifar100(tmp_path, dump)
    target = load_target("cifar100", tmp_path)
    assert target.train.labels.tolist() == [99, 3, 7] and target.test.labels.tolist() == [0, 42]
    assert target.classes[42] == "fine42" and len(target.classes) == 100
    assert target.train.images[:, 2, 5, 0].tolist() == [50, 51, 52]
    assert load_source("cifar100", tmp_path).images[:, 2, 5, 0].tolist() == [50, 51, 52]


@pytest.mark.parametrize("module", ["os", "posix"])
def test_a_cifar_batch_that_names_os_system_is_refused_and_not_run(tmp_path, module):
    root = write_cifar10(tmp_path)
    (root / "data_batch_3").write_bytes(f"c{module}\nsystem\n(S'touch {tmp_path}/run'\ntR.".encode())
    with pytest.raises(UserError, match=r"data_batch_3.*system"):
        load_source("cifar10", tmp_path)
    assert not (tmp_path / "run").exists()


def test_a_cifar_batch_cut_short_is_a_user_error(tmp_path):
    batch = write_cifar10(tmp_path) / "data_batch_2"
    batch.write_bytes(batch.read_bytes()[:500])
    with pytest.raises(UserError, match="data_batch_2"):
        load_source("cifar10", tmp_path)


# --------------------------------------------------------------------------------------------------
# SVHN, STL10
# --------------------------------------------------------------------------------------------------

def test_svhn_has_the_images_last_and_ten_means_zero(tmp_path):
    write_svhn(tmp_path)
    target = load_target("svhn", tmp_path)
    assert target.train.labels.tolist() == [1, 0, 9] and target.test.labels.tolist() == [0, 5]
    assert target.classes == list("0123456789")
    assert np.argwhere(target.train.images == 200).tolist() == [[1, 2, 5, 1]]
    assert np.argwhere(load_source("svhn", tmp_path).images == 200).tolist() == [[1, 2, 5, 1]]


def test_stl10_planes_are_column_major(tmp_path):
    write_stl10(tmp_path)
    target = load_target("stl10", tmp_path, size=96)
    assert np.argwhere(target.train.images[..., 0]).tolist() == [[0, 2, 5], [1, 2, 5]]
    assert target.train.images[:, 2, 5].tolist() == [[100, 0, 1], [101, 0, 1]]


def test_stl10_labels_begin_at_zero_here(tmp_path):
    write_stl10(tmp_path)
    target = load_target("stl10", tmp_path)
    assert target.train.labels.tolist() == [0, 9] and target.test.labels.tolist() == [2, 1, 0]
    assert target.classes[0] == "airplane" and target.classes[9] == "truck"
    assert target.train.images.shape == (2, 32, 32, 3)


def test_stl10_as_a_source_is_the_labelled_training_part_and_then_the_unlabelled(tmp_path):
    write_stl10(tmp_path)
    source = load_source("stl10", tmp_path, size=96)
    assert source.images[:, 2, 5].tolist() == [[100, 0, 1], [101, 0, 1], [100, 0, 3], [101, 0, 3], [102, 0, 3], [103, 0, 3]]
    assert source.labels is None


# --------------------------------------------------------------------------------------------------
# TinyImageNet, Places365, Caltech
# --------------------------------------------------------------------------------------------------

def test_tinyimagenet_tests_on_its_annotated_val_split(tmp_path):
    write_tinyimagenet(tmp_path)
    target = load_target("tinyimagenet", tmp_path)
    assert target.classes == ["n01", "n02"]
    assert target.train.labels.tolist() == [0, 0, 1, 1] and target.test.labels.tolist() == [1, 0, 1]
    for split in (target.train, target.test):
        for image, label in zip(split.images, split.labels):
            assert_colour(image, (RED, GREEN)[label], JPEG_TOLERANCE)


def test_tinyimagenet_as_a_source_is_its_training_split(tmp_path):
    write_tinyimagenet(tmp_path)
    source = load_source("tinyimagenet", tmp_path)
    assert source.files == ["n01/images/n01_0.JPEG", "n01/images/n01_1.JPEG", "n02/images/n02_0.JPEG", "n02/images/n02_1.JPEG"]
    assert source.labels is None


def test_places365_is_the_flat_folder_of_its_archive(tmp_path):
    write_places365(tmp_path)
    source = load_source("places365", tmp_path)
    assert source.files == ["Places365_val_00000001.jpg", "Places365_val_00000002.jpg", "Places365_val_00000010.jpg"]
    for image, colour in zip(source.images, (RED, GREEN, BLUE)):
        assert_colour(image, colour, JPEG_TOLERANCE)


def test_places365_as_a_target_takes_its_labels_from_the_lists_beside_it(tmp_path):
    with pytest.raises(UserError, match="categories_places365.txt"):
        save_image(tmp_path / "val_256" / "Places365_val_00000001.jpg")
        load_target("places365", tmp_path)
    names = [f"Places365_val_{i:08d}.jpg" for i in range(1, 11)]
    save_images(tmp_path / "val_256", names)
    (tmp_path / "categories_places365.txt").write_text("/a/airfield 0\n/b/beach 1\n")
    (tmp_path / "places365_val.txt").write_text("".join(f"{name} {i % 2}\n" for i, name in enumerate(names)))
    target = load_target("places365", tmp_path)
    assert target.train.labels.tolist() == [0, 1] * 4 and target.test.labels.tolist() == [0, 1]
    assert target.test.files == names[8:]


def test_caltech256_leaves_junk_out(tmp_path):
    write_caltech256(tmp_path)
    source = load_source("caltech256", tmp_path)
    assert len(source) == 12 + 5 + 3
    assert not any("greg" in name or "RENAME2" in name for name in source.files)
    target = load_target("caltech256", tmp_path)
    assert target.classes == ["056.dog", "198.spider"]
    assert not any("greg" in name for name in target.train.files + target.test.files)


def test_caltech256_tests_on_every_fifth_image_of_each_class(tmp_path):
    write_caltech256(tmp_path)
    target = load_target("caltech256", tmp_path)
    assert target.test.files == ["056.dog/056_0005.jpg", "056.dog/056_0010.jpg", "198.spider/198_0005.jpg"]
    assert target.test.labels.tolist() == [0, 0, 1]
    assert len(target.train) == 10 + 4
    assert not set(target.train.files) & set(target.test.files)
    assert not set(target.train.rows) & set(target.test.rows)
    assert_colour(target.test.images[2], (120, 120, 120), JPEG_TOLERANCE)


def test_caltech101_has_its_background_as_a_source_and_not_as_a_class(tmp_path):
    write_caltech101(tmp_path)
    source = load_source("caltech101", tmp_path)
    assert len(source) == 18 and sum("BACKGROUND_Google" in name for name in source.files) == 6
    target = load_target("caltech101", tmp_path)
    assert target.classes == ["Motorbikes", "accordion"]
    assert target.test.files == ["Motorbikes/image_0005.jpg", "accordion/image_0005.jpg"]
    assert target.train.labels.tolist() == [0] * 5 + [1] * 5
    assert not set(target.train.files) & set(target.test.files)
    assert_colour(target.test.images[1], RED, JPEG_TOLERANCE)


# --------------------------------------------------------------------------------------------------
# Every layout
# --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, layout, batches", [("cifar10", "cifar-10-batches-py", [f"data_batch_{i}" for i in range(1, 6)]),
                                                   ("cifar100", "cifar-100-python", ["train"])])
def test_the_pixels_of_cifar_are_unchanged(tmp_path, monkeypatch, name, layout, batches):
    WRITERS[name](tmp_path)
    pixels = random_pixels(4 * len(batches), 32, 32, 3)
    for i, batch in enumerate(batches):
        rows = pixels[4 * i:4 * i + 4].transpose(0, 3, 1, 2).reshape(4, 3072)
        (tmp_path / layout / batch).write_bytes(dump_python2({"data": rows, "labels": [0] * 4, "fine_labels": [0] * 4}))
    expect(monkeypatch, name, len(pixels))
    np.testing.assert_array_equal(load_source(name, tmp_path).images, pixels)


def test_the_pixels_of_svhn_are_unchanged(tmp_path, monkeypatch):
    from scipy.io import savemat
    (tmp_path / "svhn").mkdir()
    pixels = random_pixels(5, 32, 32, 3)
    savemat(tmp_path / "svhn" / "train_32x32.mat", {"X": pixels.transpose(1, 2, 3, 0), "y": np.ones((5, 1), np.uint8)})
    expect(monkeypatch, "svhn", 5)
    np.testing.assert_array_equal(load_source("svhn", tmp_path).images, pixels)


def test_the_pixels_of_stl10_are_unchanged_at_96(tmp_path, monkeypatch):
    root, pixels = write_stl10(tmp_path), random_pixels(7, 96, 96, 3)
    for part, of_part in (("train", pixels[:3]), ("unlabeled", pixels[3:])):
        (root / f"{part}_X.bin").write_bytes(of_part.transpose(0, 3, 2, 1).tobytes())
    expect(monkeypatch, "stl10", 7)
    np.testing.assert_array_equal(load_source("stl10", tmp_path, size=96).images, pixels)
    expected = np.stack([np.asarray(Resize((32, 32))(Image.fromarray(image))) for image in pixels])
    np.testing.assert_array_equal(load_source("stl10", tmp_path).images, expected)


@pytest.mark.parametrize("name", IMAGE_FILES)
def test_the_pixels_of_image_files_are_those_of_torchvision(tmp_path, name):
    root = WRITERS[name](tmp_path)
    for i, path in enumerate(sorted(root.rglob("*.[jJ]*"))):
        Image.fromarray(random_pixels(9, 7, 3, seed=i)).resize((90 + i, 70)).save(path)
    source = load_source(name, tmp_path)
    assert len(source) == SMALL[name]["source"]
    for file, image in zip(source.files, source.images):
        path = root / "train" / file if name == "tinyimagenet" else root / file
        np.testing.assert_array_equal(image, np.asarray(Resize((32, 32))(Image.open(path))))


def test_stl10_is_read_image_by_image(tmp_path, monkeypatch):
    """Its unlabelled part alone has 2.8 GB; a file of 300 MB, of holes, of which every other image is read, stands for it."""
    root, count = write_stl10(tmp_path), 10_850
    os.truncate(root / "unlabeled_X.bin", count * 3 * 96 * 96)
    before = resident_megabytes()
    tracemalloc.start()
    images = layouts.read_stl10(root, "source")
    for i in range(0, images.count, 2):
        image = images.read(i)
    peak = tracemalloc.get_traced_memory()[1] / 1e6
    tracemalloc.stop()
    assert images.count == 2 + count and image.size == (96, 96)
    assert peak < 10 and resident_megabytes() - before < 100


def resident_megabytes():
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 1e6 if statm.exists() else 0


def expect(monkeypatch, name, count, **changes):
    """Sets how many images the source of this data set has."""
    monkeypatch.setitem(data.DATA_SETS, name, dataclasses.replace(data.DATA_SETS[name], images={"source": count}, **changes))


@pytest.mark.parametrize("name", WRITERS)
def test_a_layout_with_fewer_images_than_the_record_is_refused(tmp_path, monkeypatch, name):
    root, expected = WRITERS[name](tmp_path), OFFICIAL[name].images["source"]
    expect(monkeypatch, name, expected)
    with pytest.raises(UserError) as refusal:
        load_source(name, tmp_path)
    assert str(refusal.value).startswith(f"{root} holds {SMALL[name]['source']} of the {expected:,} images of {name}: delete it, it is made again")


@pytest.mark.parametrize("name", IMAGE_FILES)
def test_what_there_is_of_a_layout_can_be_used_as_the_line_says(tmp_path, monkeypatch, name):
    root = WRITERS[name](tmp_path)
    expect(monkeypatch, name, 30_000)
    with pytest.raises(UserError, match=f", or use what is there as {name}=PATH$"):
        load_source(name, tmp_path)
    assert len(load_source(f"{name}={root}", tmp_path)) >= SMALL[name]["source"]


@pytest.mark.parametrize("name", ARRAYS)
def test_what_there_is_of_a_layout_of_arrays_is_not_said_to_be_a_folder_of_images(tmp_path, monkeypatch, name):
    WRITERS[name](tmp_path)
    expect(monkeypatch, name, 30_000)
    with pytest.raises(UserError) as refusal:
        load_source(name, tmp_path)
    assert "=PATH" not in str(refusal.value)


def dump_to(path, content):
    path.write_bytes(pickle.dumps(content))


def save_mat(path, **arrays):
    from scipy.io import savemat
    savemat(path, arrays)


def shorten(path, count=1):
    os.truncate(path, path.stat().st_size - count)


# what it is: (data set, what is done to its layout, the file that the line names, or the layout)
DAMAGE = {
    "a CIFAR batch that holds a list": ("cifar10", lambda root: dump_to(root / "data_batch_1", [1, 2]), ""),
    "a CIFAR batch that holds a number": ("cifar10", lambda root: dump_to(root / "data_batch_1", 1), ""),
    "a CIFAR batch without images": ("cifar10", lambda root: dump_to(root / "data_batch_1", {"labels": [1]}), ""),
    "a CIFAR batch of None": ("cifar10", lambda root: dump_to(root / "data_batch_1", {"data": None, "labels": [1]}), ""),
    "a CIFAR batch of half images": ("cifar10", lambda root: dump_to(root / "data_batch_1", {"data": np.zeros((2, 1000), np.uint8), "labels": [1, 2]}), ""),
    "a CIFAR batch with fewer labels": ("cifar10", lambda root: dump_to(root / "data_batch_1", {"data": np.zeros((2, 3072), np.uint8), "labels": [1]}), ""),
    "CIFAR without one of its batches": ("cifar10", lambda root: (root / "data_batch_2").unlink(), "data_batch_2"),
    "CIFAR with an empty batch": ("cifar10", lambda root: (root / "test_batch").write_bytes(b""), "test_batch"),
    "CIFAR without names": ("cifar100", lambda root: dump_to(root / "meta", {}), ""),
    "CIFAR with names that are a number": ("cifar100", lambda root: dump_to(root / "meta", {"fine_label_names": 3}), ""),
    "SVHN that is no MATLAB file": ("svhn", lambda root: (root / "train_32x32.mat").write_bytes(b"<html>"), "train_32x32.mat"),
    "SVHN cut short": ("svhn", lambda root: shorten(root / "train_32x32.mat", 40), "train_32x32.mat"),
    "SVHN without images": ("svhn", lambda root: save_mat(root / "train_32x32.mat", y=np.ones((3, 1))), ""),
    "SVHN of another shape": ("svhn", lambda root: save_mat(root / "train_32x32.mat", X=np.zeros((32, 32, 3)), y=np.ones((3, 1))), ""),
    "SVHN with fewer labels": ("svhn", lambda root: save_mat(root / "train_32x32.mat", X=np.zeros((32, 32, 3, 3), np.uint8), y=np.ones((2, 1), np.uint8)), ""),
    "STL10 cut short": ("stl10", lambda root: shorten(root / "test_X.bin"), "test_X.bin"),
    "STL10 without labels": ("stl10", lambda root: (root / "train_y.bin").unlink(), ""),
    "STL10 with fewer labels": ("stl10", lambda root: shorten(root / "test_y.bin"), ""),
    "STL10 without names": ("stl10", lambda root: (root / "class_names.txt").unlink(), ""),
    "TinyImageNet without its validation part": ("tinyimagenet", lambda root: (root / "val" / "val_annotations.txt").unlink(), ""),
    "TinyImageNet with labels cut short": ("tinyimagenet", lambda root: shorten(root / "val" / "val_annotations.txt", 18), ""),
    "TinyImageNet with a label that is no class": ("tinyimagenet", lambda root: (root / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn99\n" * 3), ""),
}


@pytest.mark.parametrize("name, damage, file", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_layout_is_one_line_that_names_it(tmp_path, name, damage, file):
    root = WRITERS[name](tmp_path)
    damage(root)
    with pytest.raises(UserError) as refusal:
        load_target(name, tmp_path)
    assert "\n" not in str(refusal.value)
    assert str(root) in str(refusal.value) and file in str(refusal.value)


# --------------------------------------------------------------------------------------------------
# Folders of images
# --------------------------------------------------------------------------------------------------

def test_a_folder_of_the_data_sets_name_serves_as_the_data_set(tmp_path):
    write_class_folders(tmp_path / "cifar10")
    target = load_target("cifar10", tmp_path)
    assert target.classes == ["airplane", "bird"]
    assert target.train.labels.tolist() == [0, 0, 1] and target.test.labels.tolist() == [0, 1]
    assert_colour(target.train.images[2], GREEN)
    source = load_source("cifar10", tmp_path)
    assert source.files == ["airplane/deep/er/a.png", "airplane/z.png", "bird/b.png"]


def test_a_target_can_be_any_folder_with_train_and_test(tmp_path):
    write_class_folders(tmp_path / "elsewhere")
    target = load_target(f"mine={tmp_path / 'elsewhere'}", tmp_path / "data")
    assert target.train.labels.tolist() == [0, 0, 1]
    assert target.train.files == ["airplane/deep/er/a.png", "airplane/z.png", "bird/b.png"]
    assert_colour(target.train.images[0], RED)


def test_a_source_can_be_any_folder_in_the_order_of_the_names(tmp_path):
    names = ["b/2.PNG", "b/10.png", "a/x/y/z/deep.jpeg", "top.bmp", "c.webp", "a/1.gif"]
    save_images(tmp_path / "pictures", names)
    (tmp_path / "pictures" / "readme.txt").write_text("no image")
    (tmp_path / "pictures" / "._top.bmp").write_text("no image either")
    source = load_source(f"mine={tmp_path / 'pictures'}", tmp_path / "data")
    assert source.files == ["a/1.gif", "a/x/y/z/deep.jpeg", "b/10.png", "b/2.PNG", "c.webp", "top.bmp"]
    assert source.rows.tolist() == [0, 1, 2, 3, 4, 5]
    assert source.labels is None and source.classes is None


def test_a_path_takes_the_place_of_a_known_data_set(tmp_path):
    save_images(tmp_path / "data" / "stl10", ["one.png"], RED)
    save_images(tmp_path / "elsewhere", ["one.png", "two.png"], GREEN)
    source = load_source(f"stl10={tmp_path / 'elsewhere'}", tmp_path / "data")
    assert len(source) == 2
    assert_colour(source.images[0], GREEN)
    assert_colour(load_source("stl10", tmp_path / "data").images[0], RED)


# --------------------------------------------------------------------------------------------------
# Built-in data sets
# --------------------------------------------------------------------------------------------------

def test_digits_split_is_the_same_for_every_seed_and_disjoint(tmp_path):
    first, other = load_target("digits", tmp_path / "a", seed=0), load_target("digits", tmp_path / "b", seed=7)
    for one, two in ((first.train, other.train), (first.test, other.test)):
        np.testing.assert_array_equal(one.rows, two.rows)
        np.testing.assert_array_equal(one.images, two.images)
    assert sorted([*first.train.rows, *first.test.rows]) == list(range(1797))
    assert len(first.test) == 359


def test_digits_pixels_and_labels_are_those_of_scikit_learn(tmp_path):
    from sklearn.datasets import load_digits
    official = load_digits()
    test = load_target("digits", tmp_path).test
    np.testing.assert_array_equal(test.labels, official.target[test.rows])
    ink = Image.fromarray(np.rint(official.images[test.rows[3]] / 16 * 255).astype(np.uint8)).convert("RGB")
    np.testing.assert_array_equal(test.images[3], np.asarray(Resize((32, 32))(ink)))


@pytest.mark.parametrize("name", ["glyphs", "photos", "noise"])
def test_built_in_sources_depend_on_the_seed_alone(tmp_path, name):
    first, again, other = (load_source(name, tmp_path / folder, seed=seed, limit=12).images
                           for folder, seed in (("a", 3), ("b", 3), ("a", 4)))
    np.testing.assert_array_equal(first, again)
    assert all((one != two).any() for one, two in zip(first, other))


def test_an_image_of_a_built_in_source_does_not_depend_on_the_limit(tmp_path):
    few, many = (load_source("noise", tmp_path, limit=limit) for limit in (2, 3))
    assert few.rows.tolist() == [0, 1999] and many.rows.tolist() == [0, 1000, 1999]
    np.testing.assert_array_equal(few.images[1], many.images[2])


def test_glyphs_have_no_digit():
    assert not any(character.isnumeric() for character in builtin_sources.LETTERS_AND_SIGNS)


# --------------------------------------------------------------------------------------------------
# Batches
# --------------------------------------------------------------------------------------------------

def generator(seed=5):
    return torch.Generator().manual_seed(seed)


def slowly_augmented(images, crop, flip, padding=4):
    """One image after the other, with the shifts that an equally seeded generator gives."""
    draws = generator()
    count, height, width, _ = images.shape
    if crop:
        down, right = torch.randint(-padding, padding + 1, (2, count, 1), generator=draws).squeeze(2).tolist()
        assert min(down) < 0 < max(down) and min(right) < 0 < max(right)
    if flip:
        mirrored = (torch.rand((count, 1), generator=draws).squeeze(1) < 0.5).tolist()
        assert 0 < sum(mirrored) < count
    out = []
    for i, image in enumerate(images):
        if crop:
            padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)), mode="reflect")
            top, left = padding + down[i], padding + right[i]
            image = padded[top:top + height, left:left + width]
        if flip and mirrored[i]:
            image = image[:, ::-1]
        out.append(image)
    return np.stack(out)


@pytest.mark.parametrize("steps", ["crop", "flip", "crop,flip"])
@pytest.mark.parametrize("height, width", [(32, 32), (7, 12)])
def test_augment_is_what_a_loop_over_images_makes(steps, height, width):
    images = random_pixels(64, height, width, 3)
    expected = slowly_augmented(images, crop="crop" in steps, flip="flip" in steps)
    np.testing.assert_array_equal(data.augment(torch.from_numpy(images), steps, generator()).numpy(), expected)


def test_augment_none_returns_the_same_pixels():
    images = torch.from_numpy(random_pixels(4, 32, 32, 3))
    assert torch.equal(data.augment(images, "none", generator()), images)


def test_augment_does_not_change_what_it_is_given():
    pixels = random_pixels(4, 32, 32, 3)
    images = torch.from_numpy(pixels.copy())
    data.augment(images, "crop,flip,mixup,cutmix", generator())
    np.testing.assert_array_equal(images.numpy(), pixels)


def test_mixup_averages_an_image_with_another_by_weights_from_0_to_1():
    images = torch.from_numpy(random_pixels(200, 20, 24, 3))
    mixed, own, other = (values.double() for values in (data.augment(images, "mixup", generator()), images, images.roll(1, 0)))
    weight = ((mixed - other) * (own - other)).sum((1, 2, 3)) / (own - other).square().sum((1, 2, 3))
    expected = torch.lerp(other, own, weight.view(-1, 1, 1, 1))
    assert (mixed - expected).abs().max() <= 0.7            # half a grey level of rounding, and the error of the weight
    assert weight.min() < 0.02 and weight.max() > 0.98 and abs(weight.mean() - 0.5) < 0.06 and abs(weight.std() - 12 ** -0.5) < 0.04


def test_cutmix_puts_a_rectangle_of_another_image_there():
    images = torch.from_numpy(random_pixels(200, 20, 24, 3))
    images[..., 0] = torch.arange(200, dtype=torch.uint8)[:, None, None]       # so that no pixel of two images is the same
    cut = data.augment(images, "cutmix", generator())
    theirs = (cut != images).any(3)
    assert torch.equal(cut, torch.where(theirs[..., None], images.roll(1, 0), images))
    assert torch.equal(theirs, theirs.any(2, keepdim=True) & theirs.any(1, keepdim=True))      # it has the area of a rectangle
    assert all((side.long().diff(dim=1) == 1).sum(1).max() <= 1 for side in (theirs.any(2), theirs.any(1)))     # and is in one piece
    share = theirs.double().mean((1, 2))
    assert share.min() < 0.02 and share.max() > 0.98 and abs(share.mean() - 0.5) < 0.06


def test_with_mixup_and_cutmix_each_image_has_one_of_the_two():
    images = torch.from_numpy(random_pixels(200, 20, 24, 3))
    images[..., 0] = torch.arange(200, dtype=torch.uint8)[:, None, None]
    both = data.augment(images, "mixup,cutmix", generator())
    unmixed = ((both == images) | (both == images.roll(1, 0))).flatten(1).all(1)
    assert 80 < unmixed.sum() < 120
    whole, part = (data.augment(images, "crop,flip", generator(), batch=200, part=each) for each in (slice(None), slice(0, 200)))
    assert torch.equal(whole, part)


def test_augmentations_repeat_themselves():
    images = torch.from_numpy(random_pixels(50, 32, 32, 3))
    assert torch.equal(*(data.augment(images, "crop,flip,mixup,cutmix", generator(3)) for _ in range(2)))


def test_shuffled_batches_are_full_and_take_a_row_at_most_once():
    rows = torch.arange(100, 123)
    batches = data.shuffled_batches(rows, 5, generator())
    assert [len(batch) for batch in batches] == [5, 5, 5, 5]
    taken = torch.cat(list(batches)).tolist()
    assert len(set(taken)) == 20 and set(taken) <= set(rows.tolist())
    assert taken != sorted(taken)


def test_the_rest_is_another_one_in_another_epoch():
    rows = torch.arange(23)
    left_out = [set(range(23)) - set(torch.cat(list(data.shuffled_batches(rows, 5, data.epoch_generator(0, epoch)))).tolist()) for epoch in range(3)]
    assert left_out[0] != left_out[1] != left_out[2]


@pytest.mark.parametrize("count", [1, 7, 64])
def test_a_set_no_larger_than_the_batch_is_one_batch(count):
    [batch] = data.shuffled_batches(torch.arange(count), 64, generator())
    assert sorted(batch.tolist()) == list(range(count))


def test_an_epoch_repeats_itself_and_differs_from_others():
    order = {key: torch.randperm(50, generator=data.epoch_generator(*key)).tolist() for key in ((0, 0), (0, 1), (1, 0))}
    assert torch.randperm(50, generator=data.epoch_generator(0, 1)).tolist() == order[0, 1]
    assert order[0, 0] != order[0, 1] != order[1, 0] != order[0, 0]


# --------------------------------------------------------------------------------------------------
# What is refused
# --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("load", [load_source, load_target])
def test_an_unknown_name_is_refused_and_the_known_ones_are_named(tmp_path, load):
    with pytest.raises(UserError, match="cifar11.*cifar10.*cifar11=PATH"):
        load("cifar11", tmp_path)


@pytest.mark.parametrize("load", [load_source, load_target])
def test_a_missing_folder_is_refused(tmp_path, load):
    with pytest.raises(UserError, match=f"{tmp_path}/nowhere"):
        load(f"mine={tmp_path / 'nowhere'}", tmp_path)


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_targets_folder_needs_both_splits(tmp_path, split):
    save_images(tmp_path / "mine", [f"{split}/a/1.png", f"{split}/b/1.png"])
    with pytest.raises(UserError, match=f"{tmp_path}/mine/{'test' if split == 'train' else 'train'} is missing"):
        load_target(f"mine={tmp_path / 'mine'}", tmp_path)


def test_splits_with_different_classes_are_refused_and_the_odd_class_is_named(tmp_path):
    write_class_folders(tmp_path / "mine", test_classes=("airplane", "bird", "zebra"))
    with pytest.raises(UserError, match="zebra"):
        load_target(f"mine={tmp_path / 'mine'}", tmp_path / "data")


def test_a_target_of_one_class_is_refused(tmp_path):
    save_images(tmp_path / "mine", ["train/a/1.png", "test/a/1.png"])
    with pytest.raises(UserError, match="two classes"):
        load_target(f"mine={tmp_path / 'mine'}", tmp_path / "data")


def test_a_folder_without_images_is_refused(tmp_path):
    (tmp_path / "mine" / "train" / "a").mkdir(parents=True)
    (tmp_path / "mine" / "test" / "a").mkdir(parents=True)
    (tmp_path / "mine" / "train" / "a" / "notes.txt").write_text("no image")
    for load in (load_source, load_target):
        with pytest.raises(UserError, match="no images"):
            load(f"mine={tmp_path / 'mine'}", tmp_path / "data")


def test_a_source_without_classes_cannot_be_a_target(tmp_path):
    with pytest.raises(UserError, match="noise"):
        data.unavailable([("noise", "target")], tmp_path)


def test_class_folders_may_be_links_and_a_loop_of_links_ends(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    Image.new("RGB", (8, 8)).save(elsewhere / "a.png")
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool" / "cat").symlink_to(elsewhere)
    (elsewhere / "loop").symlink_to(tmp_path / "pool")
    assert layouts.list_images(tmp_path / "pool") == ["cat/a.png"]


DAMAGE = {
    "cut": lambda content, other: content[:len(content) // 2], "emptied": lambda content, other: b"", "noise": lambda content, other: np.random.default_rng(0).bytes(len(content)),
    "one byte": lambda content, other: content[:len(content) // 2] + bytes([content[len(content) // 2] ^ 1]) + content[len(content) // 2 + 1:], "of another pack": lambda content, other: other,
}


@pytest.mark.parametrize("way", [*DAMAGE, "deleted"])
@pytest.mark.parametrize("name", ["images.npy", "rows.npy", "labels.npy", "files.jsonl", "bad.txt", "pack.json"])
def test_a_damaged_pack_is_named_and_made_again(tmp_path, capsys, name, way):
    for folder, seed in (("colours", 0), ("other", 1)):
        for i in range(4):
            (tmp_path / folder / f"train/{'ab'[i % 2]}").mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.random.default_rng((seed, i)).integers(0, 256, (8, 8, 3), np.uint8)).save(tmp_path / folder / f"train/{'ab'[i % 2]}" / f"{seed}{i}.png")
        (tmp_path / folder / "train/b" / f"broken{seed}.png").write_bytes(b"no image")
        shutil.copytree(tmp_path / folder / "train", tmp_path / folder / "test")

    def read(folder):
        target = data.load_target(f"{folder}={tmp_path / folder}", tmp_path / "data", max_bad=0.5)
        return target.train.images.tobytes(), target.train.labels.tolist(), target.train.files, target.classes, target.train.bad
    expected, other = read("colours"), read("other")
    assert expected != other and expected[4] == 1
    ours, theirs = (next(path for path in (tmp_path / "data/packed").glob(f"{folder}*train*")) / name for folder in ("colours", "other"))
    whole = ours.read_bytes()
    if way == "deleted":
        ours.unlink()
    else:
        ours.write_bytes(DAMAGE[way](whole, theirs.read_bytes()))
    damaged = way == "deleted" or ours.read_bytes() != whole
    capsys.readouterr()
    assert read("colours") == expected and ours.read_bytes() == whole
    out = capsys.readouterr().out
    quiet = not damaged or name == "pack.json" and way in ("deleted", "of another pack")      # which is none of these images
    assert out.count("is damaged") == (not quiet), out


def test_a_pack_is_read_through_once(tmp_path, monkeypatch):
    (tmp_path / "pool").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "pool" / "a.png")
    read = []
    digest = packing.file_digest
    monkeypatch.setattr(packing, "file_digest", lambda path: read.append(path.name) or digest(path))
    for _ in range(3):
        data.load_source(f"pool={tmp_path / 'pool'}", tmp_path / "data")
    assert sorted(read) == sorted(["images.npy", "rows.npy", "files.jsonl"] * 2)       # when it is written, and when it is first opened


def test_an_incomplete_layout_is_named(tmp_path):
    (tmp_path / "stl10_binary").mkdir()
    (tmp_path / "stl10_binary" / "unlabeled_X.bin").write_bytes(bytes(3 * 96 * 96))
    with pytest.raises(UserError, match="stl10_binary is incomplete or damaged"):
        data.load_source("stl10", tmp_path)


def test_a_data_folder_that_can_not_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--data-dir"):
        data.load_source("noise", tmp_path / "file")


@forks
@pytest.mark.parametrize("argv", [["cifar10", "--data-dir", "closed/data"], ["mine=closed/pictures"], ["--list", "--data-dir", "closed/data"]],
                         ids=["a data folder", "a folder of images", "a list"])
def test_a_folder_that_may_not_be_entered_is_one_line(argv):
    with shared_folder() as folder:
        save_images(folder / "closed" / "pictures", ["a.png"])
        (folder / "closed" / "data").mkdir()
        (folder / "closed").chmod(0)
        status, said = as_nobody(said_by_the_command, [argument.replace("closed", f"{folder}/closed") for argument in argv])
    [line] = said.splitlines()
    assert status == 2 and f"{folder}/closed" in line


def said_by_the_command(argv):
    """The exit status of data.py and what it writes to standard error."""
    said = io.StringIO()
    sys.argv = ["data.py", *argv]
    with contextlib.redirect_stderr(said):
        try:
            run.command(data.main)
        except SystemExit as stop:
            return stop.code, said.getvalue()
    return 0, said.getvalue()


# --------------------------------------------------------------------------------------------------
# States
# --------------------------------------------------------------------------------------------------

def put_archive(data_dir, monkeypatch, name="cifar10"):
    """The archive of this data set in the data folder; its address answers nobody."""
    file = data.DATA_SETS[name].files[0].name
    root = WRITERS[name](data_dir.parent / "made")
    data_dir.mkdir(exist_ok=True)
    (data_dir / file).write_bytes(tar_of(data_dir.parent / "made", root.name))
    register(monkeypatch, name, f"http://127.0.0.1:9/{file}", (data_dir / file).read_bytes())


def state(name, data_dir):
    return data.state(data.DATA_SETS[name], data_dir)


@pytest.mark.parametrize("name", WRITERS)
def test_a_data_set_of_which_nothing_is_there_is_absent(tmp_path, name):
    assert state(name, tmp_path) == state(name, tmp_path / "nowhere") == "absent"


@pytest.mark.parametrize("name, part", [("cifar10", "cifar-10-python.tar.gz.part"), ("svhn", "svhn/train_32x32.mat.part")])
def test_a_data_set_whose_file_is_half_fetched_is_partial(tmp_path, name, part):
    (tmp_path / part).parent.mkdir(exist_ok=True)
    (tmp_path / part).write_bytes(b"half")
    assert state(name, tmp_path) == "partial"


def test_a_data_set_with_one_of_its_two_files_is_partial(tmp_path, monkeypatch):
    files = tuple(download.RemoteFile((f"http://127.0.0.1:9/{i}.tar",), 4) for i in (1, 2))
    monkeypatch.setitem(data.DATA_SETS, "cifar10", dataclasses.replace(data.DATA_SETS["cifar10"], files=files))
    (tmp_path / "1.tar").write_bytes(b"half")
    assert state("cifar10", tmp_path) == "partial"
    (tmp_path / "2.tar").write_bytes(b"half")
    assert state("cifar10", tmp_path) == "archive"


@pytest.mark.parametrize("name", WRITERS)
def test_a_data_set_with_an_incomplete_layout_is_partial(tmp_path, monkeypatch, name):
    WRITERS[name](tmp_path)
    expect(monkeypatch, name, SMALL[name]["source"] + 1)
    assert state(name, tmp_path) == "partial"


@pytest.mark.parametrize("name, lacking", [("cifar10", "batches.meta"), ("cifar100", "meta"), ("stl10", "unlabeled_X.bin"), ("cifar10", "data_batch_3")])
def test_a_data_set_whose_layout_lacks_a_file_is_partial(tmp_path, name, lacking):
    (WRITERS[name](tmp_path) / lacking).unlink()
    assert state(name, tmp_path) == "partial"


def test_a_data_set_whose_archive_is_there_is_an_archive(tmp_path, monkeypatch):
    put_archive(tmp_path / "data", monkeypatch)
    assert state("cifar10", tmp_path / "data") == "archive"


@pytest.mark.parametrize("name", WRITERS)
def test_a_data_set_whose_layout_is_whole_is_extracted(tmp_path, name):
    WRITERS[name](tmp_path)
    assert state(name, tmp_path) == "extracted"


def test_a_data_set_as_a_folder_of_images_is_extracted(tmp_path):
    save_images(tmp_path / "stl10", ["a/b.png"])
    assert state("stl10", tmp_path) == "extracted"


@pytest.mark.parametrize("name", [*WRITERS, "noise"])
def test_a_data_set_that_was_loaded_is_packed(tmp_path, name):
    if name in WRITERS:
        WRITERS[name](tmp_path)
    load_source(name, tmp_path)
    assert state(name, tmp_path) == "packed"


@pytest.mark.parametrize("name", ["caltech101", "noise"])
def test_a_pack_of_a_few_of_its_images_is_not_the_data_set(tmp_path, name):
    if name in WRITERS:
        WRITERS[name](tmp_path)
    before = state(name, tmp_path)
    load_source(name, tmp_path, limit=3)
    assert state(name, tmp_path) == before


def test_a_pack_that_is_being_made_is_not_the_data_set(tmp_path):
    write_cifar10(tmp_path)
    load_source("cifar10", tmp_path)
    [pack] = (tmp_path / "packed").glob("cifar10-*")
    pack.rename(f"{pack}.part")
    assert state("cifar10", tmp_path) == "extracted"


# --------------------------------------------------------------------------------------------------
# Command
# --------------------------------------------------------------------------------------------------

def test_the_list_shows_every_data_set_with_its_size_its_state_and_its_terms(tmp_path, monkeypatch, execute):
    for name, record in OFFICIAL.items():
        monkeypatch.setitem(data.DATA_SETS, name, record)
    status, out, err = execute(data.main, ["--list", "--data-dir", str(tmp_path)], program="data.py")
    head, *lines = out.splitlines()
    assert (status, err) == (0, "") and len(lines) == len(OFFICIAL) == 12
    assert head.split("  ") and all(word in head for word in ("name", "images", "to fetch", "on disk", "state", "terms"))
    for line, record in zip(lines, OFFICIAL.values()):
        fetched = f"{sum(file.size for file in record.files) / 1e6:,.0f} MB" if record.files else "-"
        state = "built in" if record.built_in else "absent"
        assert re.fullmatch(rf"{record.name} +{record.images['source']:,} +{record.native or 'all'} +{fetched} +-  {state} +{re.escape(record.terms)}", line)


def test_the_list_shows_what_is_there_in_which_state_and_what_is_still_to_fetch(tmp_path, monkeypatch, execute):
    folder = tmp_path / "data"
    put_archive(folder, monkeypatch)
    write_stl10(folder)
    (folder / "caltech-101.zip.part").write_bytes(bytes(7_000_000))
    write_caltech256(folder)
    load_source("caltech256", folder)
    status, out, _ = execute(data.main, ["--data-dir", str(folder)], program="data.py")
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert status == 0
    assert re.search(r" 10 +32 +- +0 MB  archive +none stated$", lines["cifar10"])
    assert re.search(r" 6 +96 +- +0 MB  extracted ", lines["stl10"])
    assert re.search(r" 18 +all +130 MB +7 MB  partial ", lines["caltech101"])
    assert re.search(r" 20 +all +- +0 MB  packed ", lines["caltech256"])
    assert re.search(r" 3 +32 +182 MB +-  absent ", lines["svhn"])


def only(monkeypatch, *names):
    """The registry with these data sets alone, in this order."""
    monkeypatch.setattr(data, "DATA_SETS", {name: data.DATA_SETS[name] for name in names})


@pytest.fixture
def dead_url(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(download, "BACKOFF", (0.0, 0.0))
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{closed.getsockname()[1]}"      # bound, and nobody listens


def wrong_archive(folder, monkeypatch, url):
    register(monkeypatch, "cifar10", f"{url}/cifar-10-python.tar.gz", b"right")
    (folder / "cifar-10-python.tar.gz").write_bytes(b"wrong")
    return f"{folder}/cifar-10-python.tar.gz has the md5 {hashlib.md5(b'wrong').hexdigest()} instead of {hashlib.md5(b'right').hexdigest()}"


def no_server(folder, monkeypatch, url):
    register(monkeypatch, "cifar10", f"{url}/cifar-10-python.tar.gz", b"right")
    return f"cifar-10-python.tar.gz can't be fetched: {url}/cifar-10-python.tar.gz can't be reached"


def incomplete_layout(folder, monkeypatch, url):
    write_cifar10(folder)
    expect(monkeypatch, "cifar10", 11)
    return f"{folder}/cifar-10-batches-py holds 10 of the 11 images"


def too_many_broken(folder, monkeypatch, url):
    save_images(folder / "cifar10", ["a.png", "b.png"])
    (folder / "cifar10" / "a.png").write_bytes(b"not an image")
    return "cifar10: 1 of 2 images can't be read"


@pytest.mark.parametrize("fail", [wrong_archive, no_server, incomplete_layout, too_many_broken])
def test_what_fails_does_not_keep_the_other_data_sets_back(tmp_path, monkeypatch, execute, dead_url, fail):
    write_stl10(tmp_path)
    write_svhn(tmp_path)
    line = fail(tmp_path, monkeypatch, dead_url)
    only(monkeypatch, "svhn", "cifar10", "stl10")
    status, out, err = execute(data.main, ["--all", "--data-dir", str(tmp_path)], program="data.py")
    assert status == 2
    assert [said for said in out.splitlines() if "packed" in said] == ["svhn: 3 images packed", "stl10: 6 images packed"]
    [said] = err.splitlines()
    assert said.startswith(f"data.py: {line}")
    assert [state(name, tmp_path) for name in ("svhn", "stl10")] == ["packed", "packed"] and state("cifar10", tmp_path) != "packed"


def test_all_that_fails_is_said_a_line_each(tmp_path, monkeypatch, execute, dead_url):
    first = wrong_archive(tmp_path, monkeypatch, dead_url)
    expect(monkeypatch, "stl10", 7)
    root = write_stl10(tmp_path)
    only(monkeypatch, "cifar10", "stl10")
    status, _, err = execute(data.main, ["--all", "--data-dir", str(tmp_path)], program="data.py")
    lines = err.splitlines()
    assert status == 2 and len(lines) == 2
    assert lines[0].startswith(f"data.py: {first}") and lines[1].startswith(f"data.py: {root} holds 6 of the 7 images of stl10")


def test_all_at_once_is_every_data_set_of_the_list(tmp_path, monkeypatch, execute):
    only(monkeypatch, *WRITERS, "digits", "noise")
    for name, write in WRITERS.items():
        write(tmp_path)
    status, out, err = execute(data.main, ["--all", "--data-dir", str(tmp_path)], program="data.py")
    assert (status, err) == (0, "")
    assert out.splitlines() == [f"{name}: {record.images['source']:,} images packed" for name, record in data.DATA_SETS.items()]


def test_a_data_set_is_added_by_adding_its_record(tmp_path, monkeypatch, execute):
    (tmp_path / "data").mkdir()
    root = write_caltech256(tmp_path / "made")
    root.rename(tmp_path / "made" / "petal_pictures")
    (tmp_path / "data" / "petals.tar.gz").write_bytes(tar_of(tmp_path / "made", "petal_pictures"))
    content = (tmp_path / "data" / "petals.tar.gz").read_bytes()
    record = data.DataSet("petals", layouts.read_caltech256, None, "CC BY 4.0", {"source": 20},
                          (download.RemoteFile(("https://petals.example/petals.tar.gz",), len(content), hashlib.md5(content).hexdigest()),),
                          "petal_pictures", unpacked=1_000_000)
    monkeypatch.setitem(data.DATA_SETS, "petals", record)
    assert len(load_source("petals", tmp_path / "data")) == 20
    assert load_target("petals", tmp_path / "data").classes == ["056.dog", "198.spider"]
    _, out, _ = execute(data.main, ["--list", "--data-dir", str(tmp_path / "data")], program="data.py")
    assert re.fullmatch(r"petals +20 +all +- +0 MB  packed +CC BY 4.0", out.splitlines()[-1])


def test_a_folder_of_images_is_packed_by_its_path(tmp_path, execute):
    save_images(tmp_path / "pictures", ["a.png", "b/c.png"])
    status, out, err = execute(data.main, [f"mine={tmp_path / 'pictures'}", "--data-dir", str(tmp_path / "data")], program="data.py")
    assert (status, out, err) == (0, "mine: 2 images packed\n", "")


def test_a_name_that_is_given_twice_is_packed_once(tmp_path, execute):
    write_cifar10(tmp_path)
    status, out, _ = execute(data.main, ["cifar10", "cifar10", "--data-dir", str(tmp_path)], program="data.py")
    assert (status, out) == (0, "cifar10: 10 images packed\n")


@pytest.mark.parametrize("given", ["5%", "0.05"])
def test_max_bad_is_a_share_or_per_cent(tmp_path, execute, given):
    save_images(tmp_path / "pictures", [f"{i:02}.png" for i in range(20)])
    (tmp_path / "pictures" / "07.png").write_bytes(b"not an image")
    argv = [f"mine={tmp_path / 'pictures'}", "--data-dir", str(tmp_path / "data")]
    assert execute(data.main, argv, program="data.py")[0] == 2
    status, out, _ = execute(data.main, [*argv, "--max-bad", given], program="data.py")
    assert status == 0 and out.endswith("mine: 19 images packed, 1 left out\n")


@pytest.mark.parametrize("given", ["1.5", "150%", "-0.1", "many", "nan", "%", ""])
def test_max_bad_that_is_no_share_is_refused_in_a_line(tmp_path, execute, given):
    status, out, err = execute(data.main, ["noise", f"--max-bad={given}", "--data-dir", str(tmp_path)], program="data.py")
    assert status == 2 and out == ""
    [line] = err.splitlines()
    assert line.startswith("data.py: ") and "--max-bad" in line
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("argv, complaint", [(["cifar11"], "no data set is called cifar11"), (["mine=nowhere"], "there is no such folder"),
                                             (["a/b"], "neither NAME nor NAME=PATH")])
def test_what_is_not_known_is_refused_before_anything_is_done(tmp_path, execute, argv, complaint):
    write_cifar10(tmp_path)
    status, _, err = execute(data.main, ["cifar10", *argv, "--data-dir", str(tmp_path)], program="data.py")
    [line] = err.splitlines()
    assert status == 2 and complaint in line
    assert names_in(tmp_path) == ["cifar-10-batches-py"]


def test_a_disk_that_is_too_small_is_said_before_anything_is_fetched(tmp_path, monkeypatch, execute, dead_url):
    no_server(tmp_path, monkeypatch, dead_url)
    expect(monkeypatch, "cifar10", 50_000, unpacked=10 ** 18)
    status, _, err = execute(data.main, ["cifar10", "--data-dir", str(tmp_path)], program="data.py")
    [line] = err.splitlines()
    assert status == 2
    assert re.fullmatch(rf"data.py: {tmp_path} has \S+ GB free, and what is still to be fetched, extracted and packed needs 1,000,000,000.\d GB: "
                        "make room, or choose another --data-dir", line)
