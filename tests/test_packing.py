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
# Decoding
# --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("width, height", [(8, 8), (31, 33), (64, 64), (96, 96), (300, 200), (200, 300), (17, 90), (500, 40), (1, 1)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_decode_is_torchvision_resize_bit_for_bit(width, height, mode):
    image = Image.fromarray(random_pixels(height, width, 3)).convert(mode)
    expected = np.asarray(Resize((32, 32))(image.convert("RGB")))
    np.testing.assert_array_equal(packing.decode(image), expected)


def test_decode_leaves_native_pixels_unchanged():
    pixels = random_pixels(32, 32, 3)
    np.testing.assert_array_equal(packing.decode(Image.fromarray(pixels)), pixels)


def test_decode_repeats_grey_in_all_three_colours():
    grey = random_pixels(32, 32)
    np.testing.assert_array_equal(packing.decode(Image.fromarray(grey)), np.stack([grey, grey, grey], axis=2))


def test_decode_looks_colours_of_a_palette_up():
    image = Image.new("P", (32, 32), 1)
    image.putpalette([0, 0, 0, *GREEN])
    assert_colour(packing.decode(image), GREEN)


# --------------------------------------------------------------------------------------------------
# Packing
# --------------------------------------------------------------------------------------------------

def pack_of(data_dir):
    [pack] = (data_dir / "packed").iterdir()
    return pack


def test_a_second_load_does_not_decode_again(tmp_path):
    write_class_folders(tmp_path / "pictures")
    load_source(f"mine={tmp_path / 'pictures'}", tmp_path / "data")
    first = (pack_of(tmp_path / "data") / "images.npy").stat().st_mtime_ns
    load_source(f"mine={tmp_path / 'pictures'}", tmp_path / "data")
    assert (pack_of(tmp_path / "data") / "images.npy").stat().st_mtime_ns == first


def test_a_changed_file_is_packed_anew(tmp_path):
    save_images(tmp_path / "pictures", ["a.bmp", "b.bmp"], RED)
    load_source(f"mine={tmp_path / 'pictures'}", tmp_path / "data")
    save_image(tmp_path / "pictures" / "b.bmp", GREEN)      # of the same size in bytes
    os.utime(tmp_path / "pictures" / "b.bmp", (1, 1))
    images = load_source(f"mine={tmp_path / 'pictures'}", tmp_path / "data").images
    assert_colour(images[0], RED)
    assert_colour(images[1], GREEN)
    assert not leftovers(tmp_path)


def test_an_added_file_is_packed_anew(tmp_path):
    save_images(tmp_path / "pictures", ["b.png"], RED)
    load_source(f"mine={tmp_path / 'pictures'}", tmp_path / "data")
    save_image(tmp_path / "pictures" / "a.png", GREEN)
    source = load_source(f"mine={tmp_path / 'pictures'}", tmp_path / "data")
    assert source.files == ["a.png", "b.png"]
    assert_colour(source.images[0], GREEN)


def test_limit_spaces_the_images_evenly_over_the_whole_set(tmp_path):
    for i in range(11):
        save_image(tmp_path / "pictures" / f"{i:02d}.png", 20 * i)
    source = load_source(f"mine={tmp_path / 'pictures'}", tmp_path / "data", limit=3)
    assert source.rows.tolist() == [0, 5, 10]
    assert source.files == ["00.png", "05.png", "10.png"]
    assert source.images[:, 0, 0, 0].tolist() == [0, 100, 200]


def test_limit_keeps_every_class_of_a_target_and_the_labels_of_its_rows(tmp_path):
    for split in ("train", "test"):
        for name in ("a", "b", "c", "d"):
            save_images(tmp_path / "mine" / split, [f"{name}/{i}.png" for i in range(5)])
    target = load_target(f"mine={tmp_path / 'mine'}", tmp_path / "data", limit=8)
    assert len(target.train) == len(target.test) == 8
    assert set(target.train.labels) == {0, 1, 2, 3}
    assert target.train.labels.tolist() == [row // 5 for row in target.train.rows]


def test_limit_counts_rows_in_the_whole_set_where_a_split_takes_every_fifth(tmp_path):
    write_caltech101(tmp_path / "101_ObjectCategories")
    target = load_target("caltech101", tmp_path, limit=2)
    assert target.train.rows.tolist() == [0, 11] and target.test.rows.tolist() == [4, 10]


def test_a_limit_above_the_size_is_the_whole_set(tmp_path):
    save_images(tmp_path / "pictures", ["a.png", "b.png"])
    assert load_source(f"mine={tmp_path / 'pictures'}", tmp_path / "data", limit=100).rows.tolist() == [0, 1]


def write_hundred(root, broken):
    for i in range(100):
        save_image(root / "train" / f"class{i // 50}" / f"{i:03d}.png", i)
    for i in broken:
        (root / "train" / f"class{i // 50}" / f"{i:03d}.png").write_bytes(b"not an image")
    for name in ("class0", "class1"):
        save_image(root / "test" / name / "t.png")


def test_a_broken_file_in_a_hundred_is_left_out_and_listed(tmp_path):
    write_hundred(tmp_path / "mine", broken=[10])
    train = load_target(f"mine={tmp_path / 'mine'}", tmp_path / "data").train
    kept = [i for i in range(100) if i != 10]
    assert train.rows.tolist() == kept
    assert train.images[:, 31, 31, 0].tolist() == kept
    assert train.labels.tolist() == [i // 50 for i in kept]
    assert train.files == [f"class{i // 50}/{i:03d}.png" for i in kept]
    [listing] = (tmp_path / "data" / "packed").glob("*/bad.txt")
    [line] = listing.read_text().splitlines()
    assert line.startswith("class0/010.png\tUnidentifiedImageError")
    assert not leftovers(tmp_path)


def test_an_image_cut_short_is_left_out_too(tmp_path):
    write_hundred(tmp_path / "mine", broken=[])
    whole = tmp_path / "mine" / "train" / "class0" / "007.png"
    Image.fromarray(random_pixels(64, 64, 3)).save(whole)
    whole.write_bytes(whole.read_bytes()[:6000])
    assert 7 not in load_source(f"mine={tmp_path / 'mine' / 'train'}", tmp_path / "data").rows


def test_two_broken_files_in_a_hundred_are_a_user_error_and_leave_nothing(tmp_path):
    write_hundred(tmp_path / "mine", broken=[3, 50])
    with pytest.raises(UserError, match="2 of 100.*003.png"):
        load_source(f"mine={tmp_path / 'mine' / 'train'}", tmp_path / "data")
    assert list((tmp_path / "data" / "packed").iterdir()) == []


def test_packing_in_chunks_loses_no_image(tmp_path):
    images = packing.Images(10, lambda i: Image.new("RGB", (4, 4), (i, 0, 0)) if i != 4 else 1 / 0, "ten")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "MAX_BAD", 0.1)
        packed = packing.pack(images, tmp_path / "pack", "ten", chunk=3)
    assert packed.images[:, 0, 0, 0].tolist() == packed.rows.tolist() == [0, 1, 2, 3, 5, 6, 7, 8, 9]


def test_a_pack_can_be_written_to_in_memory_without_changing_the_file(tmp_path):
    save_images(tmp_path / "pictures", ["a.png"], RED)
    load_source(f"mine={tmp_path / 'pictures'}", tmp_path / "data").images[:] = 0
    assert_colour(load_source(f"mine={tmp_path / 'pictures'}", tmp_path / "data").images[0], RED)


