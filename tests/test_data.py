"""Data sets: what every layout is read as, what packing keeps, what is refused, and what a batch becomes.

All files are generated, small, in the layout of the official ones; the only server is our own.
"""
import dataclasses
import hashlib
import io
import json
import os
import pickle
import socket
import struct
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import Resize

import archives
import builtin_sources
import data
import download
import layouts
import packing
from data import load_source, load_target
from run import UserError

RED, GREEN, BLUE, WHITE = (250, 10, 10), (10, 250, 10), (10, 10, 250), (240, 240, 240)


def random_pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save_image(path, colour=RED, size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L" if isinstance(colour, int) else "RGB", size, colour).save(path)


def save_images(root, names, colour=RED):
    for name in names:
        save_image(root / name, colour)


def assert_colour(image, colour, tolerance=0):
    assert np.abs(image.astype(int) - np.asarray(colour)).max() <= tolerance


JPEG_TOLERANCE = 4


def leftovers(folder):
    return [str(path) for path in Path(folder).rglob("*") if ".part" in path.name or ".old" in path.name]


# --------------------------------------------------------------------------------------------------
# CIFAR
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
    root = tmp_path / "cifar-100-python"
    root.mkdir()
    for name, first, fine in (("train", 50, [99, 3, 7]), ("test", 80, [0, 42])):
        (root / name).write_bytes(dump({"data": cifar_rows(len(fine), first), "fine_labels": fine, "coarse_labels": [1] * len(fine)}))
    (root / "meta").write_bytes(dump({"fine_label_names": [f"fine{i}" for i in range(100)], "coarse_label_names": [f"coarse{i}" for i in range(20)]}))
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

def write_svhn(data_dir):
    from scipy.io import savemat
    root = data_dir / "svhn"
    root.mkdir(parents=True)
    for split, labels in (("train", [1, 10, 9]), ("test", [10, 5])):
        pixels = np.full((32, 32, 3, len(labels)), 7, np.uint8)
        pixels[2, 5, 1, 1] = 200        # row 2, column 5, green, second image
        savemat(root / f"{split}_32x32.mat", {"X": pixels, "y": np.array(labels, np.uint8)[:, None]})


def test_svhn_has_the_images_last_and_ten_means_zero(tmp_path):
    write_svhn(tmp_path)
    target = load_target("svhn", tmp_path)
    assert target.train.labels.tolist() == [1, 0, 9] and target.test.labels.tolist() == [0, 5]
    assert target.classes == list("0123456789")
    assert np.argwhere(target.train.images == 200).tolist() == [[1, 2, 5, 1]]
    assert np.argwhere(load_source("svhn", tmp_path).images == 200).tolist() == [[1, 2, 5, 1]]


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
    for i, colour in ((2, GREEN), (1, RED), (10, BLUE)):
        save_image(tmp_path / "val_256" / f"Places365_val_{i:08d}.jpg", colour, (256, 256))
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


def write_caltech256(data_dir):
    root = data_dir / "256_ObjectCategories"
    save_images(root, [f"056.dog/056_{i:04d}.jpg" for i in range(1, 13)], RED)
    save_images(root, [f"198.spider/198_{i:04d}.jpg" for i in range(1, 6)], 120)
    save_images(root, [f"257.clutter/257_{i:04d}.jpg" for i in range(1, 4)], BLUE)
    save_image(root / "056.dog" / "greg" / "x.jpg", WHITE)
    (root / "198.spider" / "RENAME2").write_text("mv a b\n")


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


def write_caltech101(root):
    for name, colour in (("accordion", RED), ("Motorbikes", GREEN), ("BACKGROUND_Google", BLUE)):
        save_images(root, [f"{name}/image_{i:04d}.jpg" for i in range(1, 7)], colour)
    (root / "BACKGROUND_Google" / "tmp").write_text("")


def test_caltech101_has_its_background_as_a_source_and_not_as_a_class(tmp_path):
    write_caltech101(tmp_path / "101_ObjectCategories")
    source = load_source("caltech101", tmp_path)
    assert len(source) == 18 and sum("BACKGROUND_Google" in name for name in source.files) == 6
    target = load_target("caltech101", tmp_path)
    assert target.classes == ["Motorbikes", "accordion"]
    assert target.test.files == ["Motorbikes/image_0005.jpg", "accordion/image_0005.jpg"]
    assert target.train.labels.tolist() == [0] * 5 + [1] * 5
    assert not set(target.train.files) & set(target.test.files)
    assert_colour(target.test.images[1], RED, JPEG_TOLERANCE)


# --------------------------------------------------------------------------------------------------
# Folders of images
# --------------------------------------------------------------------------------------------------

def write_class_folders(root, test_classes=("airplane", "bird")):
    save_image(root / "train" / "bird" / "b.png", GREEN)
    save_image(root / "train" / "airplane" / "deep" / "er" / "a.png", RED)
    save_image(root / "train" / "airplane" / "z.png", RED)
    for name in test_classes:
        save_image(root / "test" / name / "t.png", WHITE)


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
    data.augment(images, "crop,flip", generator())
    np.testing.assert_array_equal(images.numpy(), pixels)


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


def test_a_damaged_pack_is_a_user_error_that_names_its_folder(tmp_path):
    save_images(tmp_path / "pictures", ["a.png", "b.png"])
    load_source(f"mine={tmp_path / 'pictures'}", tmp_path / "data")
    pack = pack_of(tmp_path / "data")
    meta = json.loads((pack / "pack.json").read_text())
    (pack / "pack.json").write_text(json.dumps(meta | {"images": 3}))
    with pytest.raises(UserError, match=str(pack)):
        load_source(f"mine={tmp_path / 'pictures'}", tmp_path / "data")


def test_class_folders_may_be_links_and_a_loop_of_links_ends(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    Image.new("RGB", (8, 8)).save(elsewhere / "a.png")
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool" / "cat").symlink_to(elsewhere)
    (elsewhere / "loop").symlink_to(tmp_path / "pool")
    assert layouts.list_images(tmp_path / "pool") == ["cat/a.png"]


def test_a_damaged_pack_is_named(tmp_path):
    (tmp_path / "pool").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "pool" / "a.png")
    spec = f"pool={tmp_path / 'pool'}"
    data.load_source(spec, tmp_path / "data")
    images = next((tmp_path / "data" / "packed").glob("*/images.npy"))
    images.write_bytes(images.read_bytes()[:1000])
    with pytest.raises(UserError, match="is damaged"):
        data.load_source(spec, tmp_path / "data")


def test_an_incomplete_layout_is_named(tmp_path):
    (tmp_path / "stl10_binary").mkdir()
    (tmp_path / "stl10_binary" / "unlabeled_X.bin").write_bytes(bytes(3 * 96 * 96))
    with pytest.raises(UserError, match="stl10_binary is incomplete or damaged"):
        data.load_source("stl10", tmp_path)


def test_a_data_folder_that_can_not_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--data-dir"):
        data.load_source("noise", tmp_path / "file")
