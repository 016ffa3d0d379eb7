"""What the tests share: painted images, a run of seconds, scripts run as a user runs them."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kd.files import UserError

ROOT = Path(__file__).resolve().parent.parent
COLOURS = {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200)}
NET = """
from torch import nn

class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(16, classes)

    def forward(self, pixels):
        return self.head(self.features(pixels))

def make(num_classes):
    return Net(num_classes)
"""

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"     # for the processes that tests start


def pytest_addoption(parser):
    parser.addoption("--kill-runs", type=int, default=10,
                     help="how many runs the slow test in test_survival.py kills again and again")
    parser.addoption("--kill-seed", type=int, default=1, help="which moments it kills them at")
    parser.addoption("--tries", type=int, default=60, help="how many inputs test_fuzz.py makes up")


def run_script(script, *arguments, cwd=None, env=None, timeout=300):
    """The CompletedProcess of a script of this project, with text output."""
    return subprocess.run([sys.executable, str(ROOT / script), *map(str, arguments)], cwd=cwd,
                          env=os.environ | (env or {}), capture_output=True, text=True,
                          errors="replace", timeout=timeout, check=False)


def refusal(said, call, *arguments, **options):
    """The one line with which a call is refused, which says so."""
    with pytest.raises(UserError, match=said) as raised:
        call(*arguments, **options)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def paint(path, colour, rng):
    """A PNG of a colour with noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.clip(np.array(colour) + rng.normal(0, 40, (24, 28, 3)), 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="session")
def painted(tmp_path_factory):
    """A folder with a target of three colours (colours/), two sources (pool/, more/) and net.py."""
    root, rng = tmp_path_factory.mktemp("painted"), np.random.default_rng(0)
    for split, count in (("train", 40), ("test", 10)):
        for name, colour in COLOURS.items():
            for i in range(count):
                paint(root / "colours" / split / name / f"{i:03}.png", colour, rng)
    for source, count in (("pool", 120), ("more", 60)):
        for i in range(count):
            paint(root / source / f"{i % 4}" / f"{i:03}.png", rng.integers(0, 256, 3), rng)
    (root / "net.py").write_text(NET)
    return root


def small_run(painted):
    """The flags of a run of seconds: a small network, three colours, two sources."""
    net = f"{painted / 'net.py'}:make"
    return ["--target", f"colours={painted / 'colours'}",
            "--sources", f"pool={painted / 'pool'},more={painted / 'more'}",
            "--teacher-arch", net, "--student-arch", net, "--recipe", "quick",
            "--teacher-epochs", "8", "--teacher-batch-size", "16", "--epochs", "2",
            "--batch-size", "16", "--device", "cpu", "--threshold", "published",
            "--data-dir", str(painted / "data")]


@pytest.fixture(scope="session")
def finished_run(painted, tmp_path_factory):
    """The run folder of a finished run of supervised, balanced, random, mms and entropy."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    done = run_script("compile.py", *small_run(painted), "--run-dir", folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def run(finished_run, tmp_path):
    """That folder for one test: its files are links, of which `put` replaces those that change."""
    return shutil.copytree(finished_run, tmp_path / "run", copy_function=os.link,
                           ignore=shutil.ignore_patterns(".lock", ".holder"))


@pytest.fixture
def flags(painted, tmp_path):
    """The flags of a run of seconds in the folder of `run`, whether it is there or not."""
    return [*small_run(painted), "--run-dir", str(tmp_path / "run")]
