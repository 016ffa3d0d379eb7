"""Whatever moment a process is killed at, the same command completes, and nothing that is broken is taken for whole.

The process is the real `python data.py`, on an archive in TinyImageNet's layout from a server of our own. It is killed
while it fetches, extracts or packs, at random moments.
"""
import hashlib
import io
import random
import re
import subprocess
import sys
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

IMAGES = 900
MEGABYTE = 1 << 20
COMMAND = """
import dataclasses, faulthandler, sys
faulthandler.dump_traceback_later(100, exit=True)       # a process that hangs says where
sys.path.insert(0, {here!r})
import data, packing, run
packing.SAVE_INTERVAL = 0.05
record = data.DATA_SETS["tinyimagenet"]
data.DATA_SETS["tinyimagenet"] = dataclasses.replace(record, images={{"source": {images}}}, unpacked={size},
                                                     files=(data.RemoteFile(({url!r},), {size}, {md5!r}),))
print("ready", flush=True)
run.command(data.main)
"""


@pytest.fixture(scope="module")
def archive():
    """A zip in TinyImageNet's layout, of photograph-sized JPEGs that take a while to decode."""
    rng, content = np.random.default_rng(0), io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for i in range(IMAGES):
            image = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8)).resize((400, 400)).save(image, "JPEG")
            archive.writestr(f"tiny-imagenet-200/train/n{i % 10}/images/{i}.JPEG", image.getvalue())
    return content.getvalue()


@pytest.fixture
def server(archive, monkeypatch):
    """Serves the archive at ten megabytes a second, with ranges; `server.starts` are the places it was asked to begin at."""
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            start = int(re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])
            self.server.starts.append(start)
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(archive) - 1}/{len(archive)}")
            self.send_header("Content-Length", str(len(archive) - start))
            self.send_header("ETag", '"one"')
            self.end_headers()
            try:
                for position in range(start, len(archive), 100_000):
                    self.wfile.write(archive[position:position + 100_000])
                    time.sleep(0.01)
            except ConnectionError:
                pass

        def log_message(self, *args):
            pass

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.starts = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


class Command:
    """`python data.py tinyimagenet` on our server."""

    def __init__(self, server, archive, folder):
        self.folder, self.archive, self.said = folder, archive, folder.with_suffix(".txt")
        self.program = COMMAND.format(here=str(Path(__file__).resolve().parent.parent), images=IMAGES, size=len(archive),
                                      url=f"http://127.0.0.1:{server.server_port}/tiny-imagenet-200.zip", md5=hashlib.md5(archive).hexdigest())

    def start(self):
        self.folder.mkdir(exist_ok=True)
        with open(self.said, "w") as said:      # a file: a pipe is at its end only when nobody at all can write to it
            process = subprocess.Popen([sys.executable, "-c", self.program, "tinyimagenet", "--data-dir", self.folder], stdout=said,
                                       stderr=subprocess.STDOUT)
        while process.poll() is None and not self.said.read_text().startswith("ready\n"):
            time.sleep(0.01)
        return process

    def assert_completes(self, process):
        assert process.wait(timeout=120) == 0, self.said.read_text()

    def complete(self):
        self.assert_completes(self.start())
        return (self.folder / "packed" / "tinyimagenet-source-32" / "images.npy").read_bytes()

    def phase(self):
        """What is being made right now."""
        if (self.folder / "tiny-imagenet-200.zip.part").exists():
            return "fetching"
        if (self.folder / ".tiny-imagenet-200.part").exists():
            return "extracting"
        if (self.folder / "packed" / "tinyimagenet-source-32.part").exists():
            return "packing"
        return None

    def assert_nothing_broken_has_a_name(self, expected):
        zipped, layout, pack = (self.folder / name for name in ("tiny-imagenet-200.zip", "tiny-imagenet-200", "packed/tinyimagenet-source-32"))
        if zipped.exists():
            assert zipped.read_bytes() == self.archive
        if layout.exists():
            assert len(list(layout.rglob("*.JPEG"))) == IMAGES
        if pack.exists():
            assert (pack / "images.npy").read_bytes() == expected

    def part(self):
        part = self.folder / "tiny-imagenet-200.zip.part"
        return part.read_bytes() if part.exists() else b""


@pytest.mark.parametrize("kills", [9, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_random_moments_the_same_command_completes(server, archive, tmp_path, kills):
    rng = random.Random(0)
    expected = Command(server, archive, tmp_path / "undisturbed").complete()
    command, killed, cycle = None, {"fetching": 0, "extracting": 0, "packing": 0}, 0
    longest = {"fetching": 1.0, "extracting": 0.15, "packing": 0.6}      # seconds, about, that each takes
    while sum(killed.values()) < kills:
        if command is None:
            cycle += 1
            command = Command(server, archive, tmp_path / f"cycle{cycle}")
        there, wanted = command.part(), min(killed, key=killed.get)
        server.starts.clear()
        process = command.start()
        while process.poll() is None and command.phase() != wanted:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, longest[wanted]))
        phase = command.phase()
        if process.poll() is None and phase:
            process.kill()
            process.wait(timeout=120)
            killed[phase] += 1
            command.assert_nothing_broken_has_a_name(expected)
            assert command.part()[:len(there)] == there or phase != "fetching"
        else:
            command.assert_completes(process)
            command.assert_nothing_broken_has_a_name(expected)
            command = None
        assert not there or all(start >= len(there) - MEGABYTE for start in server.starts)
    assert min(killed.values()) >= kills // 4
    if command is not None:
        assert command.complete() == expected
        assert not [path for path in command.folder.rglob("*") if ".part" in path.name or ".old" in path.name]
    print(f"{kills} kills, {killed}, in {cycle} cycles")
