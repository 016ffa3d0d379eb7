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
# Fetching
# --------------------------------------------------------------------------------------------------

@pytest.fixture
def server(monkeypatch):
    """Serves `server.files` ({path: bytes}), everything else is 404; calls `server.halfway` in the middle of a file."""
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.requested.append(self.path)
            content = self.server.files.get(self.path)
            if content is None:
                return self.send_error(404)
            self.send_response(200)
            self.send_header("Content-Length", str(len(content) + self.server.withheld))
            self.end_headers()
            try:
                self.wfile.write(content[:len(content) // 2])
                self.wfile.flush()
                self.server.halfway()
                self.wfile.write(content[len(content) // 2:])
            except ConnectionError:     # the client only asked whether we are there
                pass

        def log_message(self, *args):
            pass

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.requested, server.withheld, server.halfway = {}, [], 0, lambda: None
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def dead_url(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{closed.getsockname()[1]}"      # bound, and nobody listens


def md5(content):
    return hashlib.md5(content).hexdigest()


CONTENT = bytes(range(256)) * 500


def test_fetch_gives_the_file_its_name_only_when_it_is_whole_and_right(tmp_path, server):
    server.files["/a.bin"] = CONTENT
    there_halfway = []
    server.halfway = lambda: there_halfway.append((tmp_path / "new" / "a.bin").exists())
    download.fetch(f"{server.url}/a.bin", tmp_path / "new" / "a.bin", len(CONTENT), md5=md5(CONTENT))
    assert there_halfway == [False]
    assert (tmp_path / "new" / "a.bin").read_bytes() == CONTENT
    assert not leftovers(tmp_path)


def test_fetch_checks_the_beginning_of_a_sha256(tmp_path, server):
    server.files["/a.bin"] = CONTENT
    download.fetch(f"{server.url}/a.bin", tmp_path / "a.bin", sha256_prefix=hashlib.sha256(CONTENT).hexdigest()[:8])
    with pytest.raises(UserError, match="sha256"):
        download.fetch(f"{server.url}/a.bin", tmp_path / "b.bin", sha256_prefix="0000000000")
    assert not (tmp_path / "b.bin").exists()


@pytest.mark.parametrize("size, checksum, complaint", [(len(CONTENT), "0" * 32, "md5"), (len(CONTENT) + 1, md5(CONTENT), "not whole")])
def test_fetch_leaves_nothing_of_a_wrong_file(tmp_path, server, size, checksum, complaint):
    server.files["/a.bin"] = CONTENT
    with pytest.raises(UserError, match=complaint):
        download.fetch(f"{server.url}/a.bin", tmp_path / "a.bin", size, md5=checksum)
    assert list(tmp_path.iterdir()) == []


def test_fetch_leaves_nothing_where_the_server_hangs_up(tmp_path, server):
    server.files["/a.bin"], server.withheld = CONTENT, 10
    with pytest.raises(UserError, match=f"{server.url}/a.bin"):
        download.fetch(f"{server.url}/a.bin", tmp_path / "a.bin")
    assert list(tmp_path.iterdir()) == []


def test_fetch_of_a_file_that_is_not_there_is_a_user_error(tmp_path, server):
    with pytest.raises(UserError, match=f"{server.url}/none.bin.*{tmp_path}/none.bin"):
        download.fetch(f"{server.url}/none.bin", tmp_path / "none.bin")
    assert list(tmp_path.iterdir()) == []


def test_fetch_without_a_server_is_a_user_error(tmp_path, dead_url):
    with pytest.raises(UserError, match=f"{dead_url}/a.bin.*{tmp_path}/a.bin"):
        download.fetch(f"{dead_url}/a.bin", tmp_path / "a.bin")
    assert list(tmp_path.iterdir()) == []


def register(monkeypatch, name, url, content):
    """Puts the address, size and checksum of our small archive into the registry."""
    archive = download.RemoteFile(url, len(content), md5(content))
    monkeypatch.setitem(data.DATA_SETS, name, dataclasses.replace(data.DATA_SETS[name], archives=(archive,)))


def test_unavailable_names_the_address_and_where_to_put_the_file(tmp_path, dead_url, monkeypatch):
    register(monkeypatch, "cifar10", f"{dead_url}/cifar-10-python.tar.gz", CONTENT)
    save_image(tmp_path / "here" / "a.png")
    [line] = data.unavailable([("cifar10", "target"), ("digits", "target"), (f"mine={tmp_path / 'here'}", "source")], tmp_path)
    assert f"{dead_url}/cifar-10-python.tar.gz can't be reached" in line
    assert f"put cifar-10-python.tar.gz into {tmp_path}/" in line
    assert f"{tmp_path}/cifar-10-batches-py/" in line
    assert f"{tmp_path}/cifar10/train/<class>/" in line


def test_unavailable_says_what_the_server_answered(tmp_path, server, monkeypatch):
    register(monkeypatch, "stl10", f"{server.url}/stl10_binary.tar.gz", CONTENT)
    [line] = data.unavailable([("stl10", "source")], tmp_path)
    assert f"{server.url}/stl10_binary.tar.gz answers 404" in line


def test_unavailable_says_how_much_will_be_fetched_where_all_can_be(tmp_path, server, monkeypatch, capsys):
    server.files["/stl10_binary.tar.gz"] = CONTENT
    archive = download.RemoteFile(f"{server.url}/stl10_binary.tar.gz", 123_000_000, "0" * 32)
    monkeypatch.setitem(data.DATA_SETS, "stl10", dataclasses.replace(data.DATA_SETS["stl10"], archives=(archive,)))
    assert data.unavailable([("stl10", "source")], tmp_path) == []
    assert "stl10, 123 MB" in capsys.readouterr().out


def test_unavailable_asks_no_server_for_what_is_on_disk(tmp_path, server, monkeypatch):
    register(monkeypatch, "cifar10", f"{server.url}/cifar-10-python.tar.gz", CONTENT)
    write_cifar10(tmp_path)
    assert data.unavailable([("cifar10", "target")], tmp_path) == []
    assert server.requested == []


def test_an_address_with_a_question_mark_names_its_file_without_it():
    assert download.RemoteFile("https://host/records/1/files/a.tar.gz?download=1", 1, "").name == "a.tar.gz"


