import contextlib
import os
import shutil
import signal
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import compile
import files
import run


def pytest_addoption(parser):
    parser.addoption("--kill-runs", type=int, default=30, help="how many runs the slow test in tests/test_survival.py kills again and again: 30, or fewer in one sitting")
    parser.addoption("--kill-seed", type=int, default=1, help="which moments it kills them at: another one for another sitting")
    parser.addoption("--tries", type=int, default=60, help="how many inputs of each kind tests/test_fuzz.py makes up")


def pytest_configure(config):
    """Several workers (pytest -n) share the cores: threads that wait for each other spin, and take each other's time."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    if workers > 1:
        threads = max(1, os.cpu_count() // workers)
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)        # for the processes that tests start


COLOURS = {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200)}


def paint(path, colour, rng):
    """A PNG of a colour with noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.clip(np.array(colour) + rng.normal(0, 40, (24, 28, 3)), 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="session")
def painted(tmp_path_factory):
    """A target of three colours and two sources, `pool` and `more`, as folders: (target, pool, more)."""
    root, rng = tmp_path_factory.mktemp("painted"), np.random.default_rng(0)
    for split, count in (("train", 40), ("test", 10)):
        for name, colour in COLOURS.items():
            for i in range(count):
                paint(root / "colours" / split / name / f"{i:03}.png", colour, rng)
    for source, count in (("pool", 120), ("more", 60)):
        for i in range(count):
            paint(root / source / f"{i % 4}" / f"{i:03}.png", rng.integers(0, 256, 3), rng)
    return root / "colours", root / "pool", root / "more"


def small_run(target, pool, more):
    """The flags of a run of seconds."""
    return ["--target", f"colours={target}", "--sources", f"pool={pool},more={more}", "--teacher-weights", "none",
            "--teacher-arch", "resnet18", "--recipe", "quick", "--teacher-epochs", "6", "--epochs", "2",
            "--batch-size", "16", "--device", "cpu"]


@pytest.fixture
def flags(painted, tmp_path, monkeypatch):
    """The flags of a run of seconds, in an empty folder that is the working directory."""
    monkeypatch.chdir(tmp_path)
    return small_run(*painted)


@pytest.fixture(scope="session")
def finished_run(painted, tmp_path_factory):
    """A run of all approaches, made once."""
    root = tmp_path_factory.mktemp("finished")
    with contextlib.chdir(root):
        compile.main(small_run(*painted))
    files.let_go()
    return root


@pytest.fixture
def finished(flags, finished_run):
    """That run in this test's own folder. Its files are links: what the tool changes, it replaces."""
    shutil.copytree(finished_run, ".", copy_function=os.link, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".lock"))


@pytest.fixture
def execute(monkeypatch, capsys):
    """Runs a script's main as its command line would: execute(main, argv) -> (exit status, stdout, stderr)."""
    def execute(main, argv, program="compile.py"):
        monkeypatch.setattr(sys, "argv", [program, *argv])
        capsys.readouterr()
        handlers = {number: signal.getsignal(number) for number in run.STOPPING}
        try:
            run.command(main)
            status = 0
        except SystemExit as stop:
            status = stop.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        captured = capsys.readouterr()
        return status, captured.out, captured.err
    return execute
