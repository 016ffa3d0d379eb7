"""Two processes on this machine against one: the same scores, to the bit, the same selection, to the row."""
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import files
import run
from conftest import small_run

REPOSITORY = Path(run.__file__).parent


def torchrun(processes, script, argv, timeout=300):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    start = [sys.executable] if processes == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.run([*start, str(REPOSITORY / script), *argv], capture_output=True, text=True, timeout=timeout, env=environment)


@pytest.fixture(scope="module")
def folders(painted, tmp_path_factory):
    """(the flags, run folder of one process, run folder of two, which takes the teacher of the first; what the two printed)."""
    root = tmp_path_factory.mktemp("processes")
    flags = [*small_run(*painted), "--approaches", "balanced,random,mms,entropy", "--data-dir", str(root / "data")]
    one = torchrun(1, "compile.py", [*flags, "--run-dir", str(root / "one")])
    assert (one.returncode, one.stderr) == (0, "")
    two = torchrun(2, "compile.py", [*flags, "--run-dir", str(root / "two"), "--teacher-checkpoint", str(root / "one" / "teacher.pt"), "--data-dir", str(root / "data2")])
    assert two.returncode == 0, two.stderr
    return flags, root / "one", root / "two", two


def test_two_processes_select_what_one_selects(folders):
    _, one, two, _ = folders
    for name in ("pool", "more", "confidence"):
        alone, together = np.load(one / "scores" / f"{name}.npz"), np.load(two / "scores" / f"{name}.npz")
        for column in ("predicted", "mms", "entropy", "confidence"):
            assert np.array_equal(alone[column], together[column]), (name, column)
    for approach in ("balanced", "random", "mms", "entropy"):
        for name in ("manifest.csv", "images.npy"):
            assert (one / "transfer" / approach / name).read_bytes() == (two / "transfer" / approach / name).read_bytes()
    figures = [json.loads((folder / "teacher.json").read_text()) for folder in (one, two)]
    assert figures[0]["accuracy"] == figures[1]["accuracy"] and figures[0]["confidence_accuracy"] == figures[1]["confidence_accuracy"]
    assert np.array_equal(*(np.load(folder / "split.npz")["confidence"] for folder in (one, two)))


def test_two_processes_speak_with_one_voice_and_make_one_table(folders):
    _, one, two, said = folders
    lines = said.stdout.splitlines()
    assert sum(line.startswith("teacher: ") for line in lines) == 1 and sum(line.startswith("| mms ") for line in lines) == 1
    results = json.loads((two / "results.json").read_text())
    assert [row["approach"] for row in results["rows"]] == ["balanced", "random", "mms", "entropy"]
    assert {path.name for path in two.rglob("*") if path.is_file()} - {"teacher.pt"} >= {"results.md", "mms.pt", "mms.json", "manifest.csv"}
    assert not list(two.rglob("*.part"))


def test_the_gradient_of_two_processes_is_that_of_one(tmp_path):
    """Without batch norm, where each process sees its share alone, the weights are the same up to rounding; uneven shares too."""
    (tmp_path / "train.py").write_text(f"""
import sys
sys.path.insert(0, {str(REPOSITORY)!r})
import os
from pathlib import Path
import numpy as np
import torch
from torch import nn
import engine, models
from run import Recipe
if "RANK" in os.environ:
    engine.start_processes()
torch.manual_seed(0)
network = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, 3))
classifier = models.Classifier(network, "tiny", ["a", "b", "c"])
images = np.random.default_rng(0).integers(0, 256, (50, 32, 32, 3), np.uint8)
labels = np.random.default_rng(1).integers(0, 3, 50)
cpu = torch.device("cpu")
training = engine.train(classifier, images, np.arange(50), engine.cross_entropy(labels, cpu), Recipe(3, 9, 0.05, 0.9, schedule="onecycle", augment="crop,flip"),
                        seed=0, device=cpu, checkpoint=Path("part"), label="test", evaluate=lambda network: engine.accuracy(network, images, labels))
if engine.process()[0] == 0:
    torch.save({{"state": network.state_dict(), "loss": [e["loss"] for e in training.history], "images": training.images,
                "logits": engine.predict(classifier, images, np.arange(3, 40)) if engine.process()[1] == 1 else None}}, sys.argv[1])
if "RANK" in os.environ:
    engine.end_processes()
""")
    found = []
    for processes in (1, 2):
        done = torchrun(processes, tmp_path / "train.py", [str(tmp_path / f"{processes}.pt")])
        assert done.returncode == 0, done.stderr
        found.append(torch.load(tmp_path / f"{processes}.pt", weights_only=True))
    one, two = found
    assert one["images"] == two["images"] == 3 * 45
    np.testing.assert_allclose(one["loss"], two["loss"], rtol=1e-4)
    for name, value in one["state"].items():
        torch.testing.assert_close(two["state"][name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("script, argv, said", [
    ("compile.py", ["--target", "cifar11"], "compile.py: no data set is called cifar11"),
    ("transfer.py", ["--target", "digits"], "teacher.json is missing"),
])
def test_what_is_wrong_is_said_once_and_ends_all_processes(script, argv, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = torchrun(2, script, argv, timeout=120)
    assert done.returncode != 0 and done.stderr.count(said) == 1
    assert "[rank" not in done.stderr and not re.findall(r'Traceback.*\n(?!  File "<frozen runpy>")', done.stderr)      # but torchrun's own


def test_a_process_that_dies_ends_the_others(painted, tmp_path):
    """The second process can't read a pack that the first one can."""
    (tmp_path / "die.py").write_text(f"""
import os, sys
sys.path.insert(0, {str(REPOSITORY)!r})
import engine
from files import UserError
from run import command

def main(argv):
    if os.environ["RANK"] == "1":
        raise UserError("the second one has lost its disk")
    engine.wait()
command(main)
""")
    done = torchrun(2, tmp_path / "die.py", [], timeout=120)
    assert done.returncode != 0 and "die.py, process 1: the second one has lost its disk" in done.stderr


def test_a_batch_that_is_too_small_for_the_processes_is_named(painted, tmp_path):
    flags = [*small_run(*painted), "--approaches", "balanced", "--batch-size", "3", "--run-dir", str(tmp_path / "run"), "--data-dir", str(tmp_path / "data")]
    done = torchrun(2, "compile.py", flags)
    assert done.returncode != 0 and "a batch of 3 images is too small for 2 processes" in done.stderr


def test_two_processes_save_where_an_epoch_has_few_batches(tmp_path):
    """Fewer than AGREE_STEPS: they agree at the end of the epoch."""
    (tmp_path / "train.py").write_text(f"""
import sys
sys.path.insert(0, {str(REPOSITORY)!r})
import os
from pathlib import Path
import numpy as np
import torch
from torch import nn
import engine, models
from run import Recipe
engine.start_processes()
engine.SAVE_INTERVAL = 0.0
classifier = models.Classifier(nn.Sequential(nn.Flatten(), nn.Linear(3072, 3)), "tiny", ["a", "b", "c"])
images, cpu, steps = np.zeros((30, 32, 32, 3), np.uint8), torch.device("cpu"), []
learn = engine.cross_entropy(np.arange(30) % 3, cpu)
def objective(*given):
    steps.append(1)
    if len(steps) == 5:         # in the second epoch of three batches
        os._exit(9)
    return learn(*given)
engine.train(classifier, images, np.arange(30), objective, Recipe(3, 10, 0.05), seed=0, device=cpu, checkpoint=Path({str(tmp_path)!r}) / "part", label="test")
""")
    done = torchrun(2, tmp_path / "train.py", [])
    assert done.returncode != 0
    saved = torch.load(io.BytesIO(files.read_sealed(tmp_path / "part")), weights_only=True)
    assert (saved["step"], saved["images"]) == (3, 30)


def test_every_process_ends_with_the_statistics_of_the_first_whose_are_saved(tmp_path):
    (tmp_path / "train.py").write_text(f"""
import sys
sys.path.insert(0, {str(REPOSITORY)!r})
from pathlib import Path
import numpy as np
import torch
from torch import nn
import engine, models
from run import Recipe
engine.start_processes()
torch.manual_seed(0)
classifier = models.Classifier(nn.Sequential(nn.Conv2d(3, 4, 3, 4), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(256, 3)), "tiny", ["a", "b", "c"])
images, cpu, seen = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), np.uint8), torch.device("cpu"), []
for ema in (0.0, 0.5):
    engine.train(classifier, images, np.arange(40), engine.cross_entropy(np.arange(40) % 3, cpu), Recipe(2, 10, 0.05, ema=ema), seed=0, device=cpu, checkpoint=Path({str(tmp_path)!r}) / "part", label=f"test{{ema}}",
                 evaluate=lambda network: seen.append(engine.checksum(network)) or 0.5)
    seen.append(engine.checksum(classifier))
found = engine.gathered(seen)
assert found[0] == found[1] and len(set(found[0])) >= 4, found
engine.end_processes()
""")
    done = torchrun(2, tmp_path / "train.py", [])
    assert done.returncode == 0, done.stderr
