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


def test_a_data_set_is_fetched_once_extracted_and_read(tmp_path, server, monkeypatch):
    content = server.files["/cifar-10-python.tar.gz"] = cifar10_archive(tmp_path / "made")
    register(monkeypatch, "cifar10", f"{server.url}/cifar-10-python.tar.gz", content)
    for _ in range(2):
        assert load_source("cifar10", tmp_path / "data").images[:2, 2, 5, 0].tolist() == [110, 111]
    assert server.requested == ["/cifar-10-python.tar.gz"]
    assert (tmp_path / "data" / "cifar-10-batches-py" / "batches.meta").exists()
    assert not leftovers(tmp_path)


def test_an_archive_in_the_data_folder_is_used_without_the_network(tmp_path, dead_url, monkeypatch):
    content = cifar10_archive(tmp_path / "made")
    register(monkeypatch, "cifar10", f"{dead_url}/cifar-10-python.tar.gz", content)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "cifar-10-python.tar.gz").write_bytes(content)
    assert data.unavailable([("cifar10", "source")], tmp_path / "data") == []
    assert load_source("cifar10", tmp_path / "data").images[:2, 2, 5, 0].tolist() == [110, 111]


def test_a_wrong_archive_in_the_data_folder_is_refused_before_it_is_opened(tmp_path, dead_url, monkeypatch):
    content = cifar10_archive(tmp_path / "made")
    register(monkeypatch, "cifar10", f"{dead_url}/cifar-10-python.tar.gz", content)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "cifar-10-python.tar.gz").write_bytes(content[:-1] + b"x")
    with pytest.raises(UserError, match="cifar-10-python.tar.gz has the wrong md5"):
        load_source("cifar10", tmp_path / "data")
    assert not (tmp_path / "data" / "cifar-10-batches-py").exists()


def test_svhns_file_in_the_data_folder_is_moved_to_its_place(tmp_path, dead_url, monkeypatch):
    write_svhn(tmp_path / "made")
    content = (tmp_path / "made" / "svhn" / "train_32x32.mat").read_bytes()
    register(monkeypatch, "svhn", f"{dead_url}/train_32x32.mat", content)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train_32x32.mat").write_bytes(content)
    assert len(load_source("svhn", tmp_path / "data")) == 3
    assert (tmp_path / "data" / "svhn" / "train_32x32.mat").exists()


def test_svhn_as_a_target_fetches_the_test_file_it_lacks(tmp_path, server, monkeypatch):
    write_svhn(tmp_path)
    content = server.files["/test_32x32.mat"] = (tmp_path / "svhn" / "test_32x32.mat").read_bytes()
    (tmp_path / "svhn" / "test_32x32.mat").unlink()
    remote = download.RemoteFile(f"{server.url}/test_32x32.mat", len(content), md5(content))
    monkeypatch.setitem(data.DATA_SETS, "svhn", dataclasses.replace(data.DATA_SETS["svhn"], target_archives=(remote,)))
    assert load_target("svhn", tmp_path).test.labels.tolist() == [0, 5]


def test_a_tar_that_climbs_out_of_its_folder_is_refused(tmp_path):
    (tmp_path / "evil.txt").write_text("evil")
    write_cifar10(tmp_path / "made")
    archive = tmp_path / "data" / "cifar-10-python.tar.gz"
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as content:
        content.add(tmp_path / "made" / "cifar-10-batches-py", "cifar-10-batches-py")
        content.add(tmp_path / "evil.txt", "../escaped.txt")
    with pytest.raises(UserError, match="cifar-10-python.tar.gz"):
        archives.extract(archive, archive.parent, data.DATA_SETS["cifar10"])
    assert [path.name for path in archive.parent.iterdir()] == ["cifar-10-python.tar.gz"]
    assert not (tmp_path / "escaped.txt").exists()


def test_a_zip_cannot_climb_out_of_its_folder(tmp_path):
    archive = tmp_path / "data" / "tiny-imagenet-200.zip"
    archive.parent.mkdir()
    with zipfile.ZipFile(archive, "w") as content:
        content.writestr("../escaped.txt", "evil")
        content.writestr("tiny-imagenet-200/train/n01/images/n01_0.JPEG", b"")
    archives.extract(archive, archive.parent, data.DATA_SETS["tinyimagenet"])
    assert {path.name for path in archive.parent.iterdir()} == {"tiny-imagenet-200.zip", "tiny-imagenet-200"}
    assert not (tmp_path / "escaped.txt").exists()


@pytest.mark.parametrize("damage", ["cut short", "another content"])
def test_an_archive_that_does_not_hold_the_data_set_leaves_nothing(tmp_path, damage):
    write_cifar10(tmp_path / "made")
    (tmp_path / "made" / "other").mkdir()
    (tmp_path / "data").mkdir()
    archive = tmp_path / "data" / "cifar-10-python.tar.gz"
    archive.write_bytes(tar_of(tmp_path / "made", "cifar-10-batches-py")[:-300] if damage == "cut short" else tar_of(tmp_path / "made", "other"))
    with pytest.raises(UserError, match="cifar-10-python.tar.gz"):
        archives.extract(archive, archive.parent, data.DATA_SETS["cifar10"])
    assert [path.name for path in archive.parent.iterdir()] == ["cifar-10-python.tar.gz"]


def caltech101_zip(folder, *more):
    write_caltech101(folder / "101_ObjectCategories")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("caltech-101/101_ObjectCategories.tar.gz", tar_of(folder, "101_ObjectCategories"))
        archive.writestr("caltech-101/Annotations.tar", b"")
        archive.writestr("caltech-101/show_annotation.m", b"% matlab")
        for name, content in more:
            archive.writestr(name, content)
    return buffer.getvalue()


def test_caltech101s_tar_inside_its_zip_is_extracted(tmp_path, server, monkeypatch):
    content = server.files["/caltech-101.zip"] = caltech101_zip(tmp_path / "made")
    register(monkeypatch, "caltech101", f"{server.url}/caltech-101.zip", content)
    assert len(load_source("caltech101", tmp_path / "data")) == 18
    assert {path.name for path in (tmp_path / "data").iterdir()} == {"101_ObjectCategories", "caltech-101.zip", "packed"}


def test_what_macos_adds_to_a_zip_does_not_disturb_the_tar_inside(tmp_path):
    (tmp_path / "data").mkdir()
    archive = tmp_path / "data" / "caltech-101.zip"
    archive.write_bytes(caltech101_zip(tmp_path / "made", ("__MACOSX/caltech-101/._101_ObjectCategories.tar.gz", b"\0\x05\x16\7\0\2\0\0Mac OS X")))
    archives.extract(archive, archive.parent, data.DATA_SETS["caltech101"])
    assert len(list((tmp_path / "data" / "101_ObjectCategories").rglob("*.jpg"))) == 18


def test_a_plain_tar_is_extracted(tmp_path):
    save_images(tmp_path / "made" / "val_256", ["Places365_val_00000001.jpg"])
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "val_256.tar").write_bytes(tar_of(tmp_path / "made", "val_256", mode="w"))
    archives.extract(tmp_path / "data" / "val_256.tar", tmp_path / "data", data.DATA_SETS["places365"])
    assert (tmp_path / "data" / "val_256" / "Places365_val_00000001.jpg").exists()


