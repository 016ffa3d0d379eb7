"""Two processes against one: the same scores to the bit, the same selection to the row."""
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, refusal, small_run
from script_files import by_hand, manifest, ran, read
from test_training import learn, same, small
from torch import nn

from kd import checkpoints, engine, processes, training
from kd.settings import Recipe

BEGIN = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n"


def torchrun(script, *arguments):
    launcher = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
    return subprocess.run([sys.executable, *launcher, ROOT / script, *map(str, arguments)],
                          capture_output=True, text=True, timeout=300, check=False)


def test_two_processes_select_to_the_row_what_one_selects(painted, finished_run, run, tmp_path):
    alone, run = run, tmp_path / "two"
    flags = [*small_run(painted), "--run-dir", run, "--teacher-checkpoint",
             finished_run / "teacher.pt", "--approaches", "balanced,random,mms,entropy,matched"]
    done = torchrun("compile.py", *flags)
    assert done.returncode == 0, done.stderr
    for name in ("pool", "more", "confidence"):
        with np.load(finished_run / f"scores/{name}.npz") as one, np.load(
                run / f"scores/{name}.npz") as two:
            assert set(one) == set(two) and all(np.array_equal(one[key], two[key]) for key in one)
    for approach in ("balanced", "random", "mms", "entropy"):
        for file in ("manifest.csv", "images.npy"):
            name = f"transfer/{approach}/{file}"
            assert (run / name).read_bytes() == (finished_run / name).read_bytes(), name
    one, two = (read(each, "teacher.json") for each in (finished_run, run))
    assert all(one[key] == two[key] for key in ("accuracy", "confidence_accuracy"))
    lines = done.stdout.splitlines()        # one voice, one table
    assert sum(line.startswith(("student: mms, ", "| mms ")) for line in lines) == 2
    assert not [line for line in lines if line.startswith("reused")]
    assert not list(run.rglob("*.part"))
    for approach in ("balanced", "random", "mms"):      # each was trained by a process alone
        one, two = (checkpoints.load(each / f"students/{approach}.pt", f"{painted}/net.py:make")
                    for each in (finished_run, run))
        assert same(one, two)
    done = torchrun("distill.py", *by_hand(painted, run), "--export", "state_dict")
    assert done.returncode == 0 and (run / "students/mms.pth").exists(), done.stderr
    ran("transfer.py", by_hand(painted, alone), "--approach", "matched")
    one, two = ([(row["source"], row["index"]) for row in manifest(each, "matched")]
                for each in (alone, run))
    assert one == two


TRAIN = """
import torch
from pathlib import Path
from torch import nn
from kd import training
from kd.command import Interrupted, command
from kd.processes import gathered, rank
from test_processes import RECIPE, without_norms
from test_training import learn, small

def main(argv):
    folder, looks = Path(argv[0]), []
    training.SMALLEST_PART = 2
    network = small(*without_norms())       # of somebody who left a layer in that is not used
    network.arch, network.network[0].unused = "net.py:make", nn.Linear(1, 1)
    plain, state = learn(folder / "plain.part", RECIPE, classifier=network)
    undisturbed, _ = learn(folder / "undisturbed.part", RECIPE)
    # A signal that only the second process gets, and the first one hears of.
    training.interrupted = lambda: looks.append(1) or 15 * (rank() and len(looks) > 3)
    try:
        raise AssertionError(f"nothing has stopped {learn(folder / 'stopped.part', RECIPE)}")
    except Interrupted:
        training.interrupted = lambda: 0
    resumed, _ = learn(folder / "stopped.part", RECIPE)
    states = gathered([each.state_dict() for each in (plain, undisturbed, resumed)])
    for mine, theirs in zip(*states):       # both processes end with the same networks
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    if rank() == 0:
        torch.save({"states": states[0], "history": state.history, "looks": len(looks)},
                   folder / "ended.pt")

command(main)
"""
# Batches of five, which two processes share unevenly. After ten steps they agree to stop.
RECIPE = Recipe(3, 5, 0.05, 0.9, schedule="onecycle", augment="crop,flip,rrc,colour", ema=0.5)


def without_norms():
    torch.manual_seed(0)
    return nn.Conv2d(3, 8, 3, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(128, 3)


def test_two_processes_learn_what_one_learns_and_stop_and_resume_together(tmp_path):
    (tmp_path / "train.py").write_text(BEGIN + f"sys.path.insert(0, {str(ROOT / 'tests')!r})\n"
                                       + TRAIN)
    done = torchrun(tmp_path / "train.py", tmp_path)
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr
    found = torch.load(tmp_path / "ended.pt", weights_only=True)
    plain, undisturbed, resumed = found["states"]
    # Without batch norm, where each process sees its share alone, gradients are those of one.
    network, state = learn(tmp_path / "one.part", RECIPE, classifier=small(*without_norms()))
    for name, value in network.state_dict().items():
        torch.testing.assert_close(plain[name], value, rtol=1e-3, atol=1e-5)
    assert [each["loss"] for each in found["history"]] == pytest.approx(
        [each["loss"] for each in state.history], rel=1e-4)
    assert all(torch.equal(undisturbed[name], resumed[name]) for name in resumed)
    assert found["looks"] == 10


FAIL = BEGIN + """
from kd.command import command
from kd.files import UserError
from kd.processes import rank, wait

def main(argv):
    if argv[0] == "all" or rank() == int(argv[0]):
        raise UserError("the disk is full.")
    wait()

command(main)
"""


@pytest.mark.parametrize("which, who", [
    ("all", "fail.py"), ("0", "fail.py"), ("1", "fail.py, process 1")])
def test_what_goes_wrong_ends_all_processes_and_is_said_once(tmp_path, which, who):
    (tmp_path / "fail.py").write_text(FAIL)
    done = torchrun(tmp_path / "fail.py", which)
    said = [line for line in done.stderr.splitlines() if line.startswith("fail.py")]
    assert done.returncode != 0 and said == [f"{who}: the disk is full."]
    assert "by peer" not in done.stderr


@pytest.mark.parametrize("cards, here, rank, found", [(8, 8, 7, 7), (1, 8, 3, None)])
def test_each_process_has_a_card_of_its_own_or_says_so(monkeypatch, cards, here, rank, found):
    chosen = []
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(here))
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    monkeypatch.setattr(processes, "world_size", lambda: here)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert engine.pick_device("cpu") == engine.CPU and chosen == []
    if found is None:
        refusal("^--device cuda: torchrun started more processes on this machine .* Use "
                f"--nproc-per-node {cards}, or ", engine.pick_device, "auto")
    else:
        assert engine.pick_device("cuda") == torch.device("cuda", found) and chosen == [found]


@pytest.mark.parametrize("capability, amp, warned", [
    ("AVX2", True, True), ("AVX2", None, False), ("AVX512", True, False)])
def test_bfloat16_on_a_cpu_that_has_no_instructions_for_it_is_warned_of(
        monkeypatch, capsys, capability, amp, warned):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    engine.pick_device("cpu", amp)
    assert ("this CPU has no instructions for bfloat16" in capsys.readouterr().out) == warned


def test_a_process_is_not_left_with_a_few_images_of_a_batch(monkeypatch):
    monkeypatch.setattr(training, "world_size", lambda: 4)
    refusal("^--batch-size: a batch needs 32 images or more, 8 for each process, and there are "
            "31.$", training.require_batch, "--batch-size", 31)
    training.require_batch("--batch-size", 32)
