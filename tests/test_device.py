"""CUDA and mps on a machine that has neither: the offline job on a pretended device (pretend.py),
and what such a device would refuse, spoil or wait for."""
import copy
import csv
import json
from dataclasses import replace

import numpy as np
import pretend
import pytest
import torch
from conftest import NET
from pretend import Misplaced
from script_files import run_here
from test_training import COUNT, IMAGES, LABELS, small
from torch import nn

import data
from benchmarks.measuring import as_source
from distill import live_objective
from kd import engine, models, training
from kd.command import Interrupted
from kd.run import Run
from kd.scoring import Scoring, load_criteria, score_batches
from kd.settings import Recipe, resolve
from kd.training import Checkpoint, Watch, cross_entropy, train

LIVE = Recipe(3, 8, 0.05, 0.9, 1e-3, "onecycle", "crop,flip,mixup,cutmix", ema=0.8)
# Where the host may wait for the device. None of them comes with every step.
WAITS = {"classifier.py:Classifier.to",
         "training.py:_Keeper._require_finite", "training.py:_Keeper._require_finite_weights",
         "training.py:_Keeper.after_epoch", "training.py:train", "engine.py:resident",
         "training.py:cross_entropy", "training.py:train_one_epoch.<locals>.<genexpr>"}


@pytest.fixture(params=["cuda", "mps"])
def card(request, monkeypatch):
    with pretend.begin(request.param, monkeypatch) as card:
        yield card


@pytest.fixture
def cuda(monkeypatch):
    with pretend.begin("cuda", monkeypatch) as card:
        yield card


def learn(path, device, recipe, objective=None, plain=False):
    """(The classifier after its training, the losses of its epochs). plain: in torch's own memory
    layout, as on mps, since dropout is drawn in the order of memory."""
    classifier = small()
    if plain:
        classifier.use_torchs_layout()
    objective = objective or cross_entropy(LABELS, device)
    state = train(classifier, IMAGES, np.arange(COUNT), objective, recipe, seed=5, device=device,
                  watch=Watch(Checkpoint(path, ""), "student mms"))
    return classifier, [each["loss"] for each in state.history]


def live(device):
    return live_objective(models.folded(small(seed=1)).to(device), 4.0, device)


# --------------------------------------------------------------------------------------------------
# The offline job
# --------------------------------------------------------------------------------------------------

def job(root, device, *more):
    """The run folder of `compile.py` on the built-in digits."""
    (root / "net.py").write_text(NET)
    net, run = f"{root / 'net.py'}:make", root / device
    done = run_here(
        "compile.py", "--target", "digits", "--limit", "120", "--device", device, "--run-dir", run,
        "--data-dir", root / "data", "--teacher-arch", net, "--student-arch", net, "--epochs", "2",
        "--teacher-epochs", "8", "--teacher-batch-size", "16", "--batch-size", "16", "--augment",
        "crop,flip,mixup", "--ema", "0.9", "--approaches", "supervised,balanced,mms,matched", *more)
    assert (done.returncode, done.stderr) == (0, "")
    return run


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    return job(tmp_path_factory.mktemp("job"), "cpu")


def losses(run, name):
    return [each["loss"] for each in json.loads((run / f"{name}.json").read_text())["history"]]


def rows_of(run, approach):
    with open(run / f"transfer/{approach}/manifest.csv", newline="") as file:
        return [(row["source"], row["index"]) for row in csv.DictReader(file)]


def test_the_offline_job_runs_and_learns_what_the_cpu_learns(card, on_cpu):
    kind = card.device.type
    run = job(on_cpu.parent, kind)
    near = pytest.approx(losses(on_cpu, "teacher"), rel=0.02 if kind == "cuda" else 1e-3)
    assert losses(run, "teacher") == near
    # With the CPU's teacher, which is asked in true float32, the selection is the CPU's.
    run = job(on_cpu.parent, kind, "--restart", "--teacher-checkpoint", on_cpu / "teacher.pt")
    for name in ("glyphs", "photos", "noise", "confidence"):
        with np.load(run / f"scores/{name}.npz") as ours, np.load(
                on_cpu / f"scores/{name}.npz") as theirs:
            for key in theirs:
                np.testing.assert_allclose(ours[key], theirs[key], rtol=1e-4, atol=1e-5)
    for approach in ("balanced", "mms"):
        assert rows_of(run, approach) == rows_of(on_cpu, approach)
        near = pytest.approx(losses(on_cpu, f"students/{approach}"), rel=0.02)
        assert losses(run, f"students/{approach}") == near
    settings = resolve({"run_dir": str(run), "target": "digits", "limit": 120, "teacher_arch":
                        f"{on_cpu.parent / 'net.py'}:make"})
    teacher = Scoring(Run(settings), card.device, data).teacher
    assert not any(isinstance(each, nn.BatchNorm2d) for each in teacher.modules())


# --------------------------------------------------------------------------------------------------
# Its parts
# --------------------------------------------------------------------------------------------------

def test_only_training_uses_tf32(cuda, tmp_path):
    classifier, _ = learn(tmp_path / "a.part", cuda.device, LIVE)
    assert {what for what, _ in cuda.seen} == {"copy", "wait", "TF32"}
    cuda.seen.clear()
    assert torch.backends.cudnn.benchmark
    found = engine.predict(classifier, IMAGES, device=cuda.device)
    assert {what for what, _ in cuda.seen} == {"copy", "wait", "product"}
    assert not torch.backends.cudnn.benchmark
    here = small()
    here.load_state_dict({name: value.cpu() for name, value in classifier.state_dict().items()})
    torch.testing.assert_close(found, engine.predict(here, IMAGES), rtol=1e-5, atol=1e-6)
    engine.allow_tf32(True)     # and it would make a difference
    rough = classifier(torch.from_numpy(IMAGES).to(cuda.device)).detach().cpu()
    assert (rough - found).abs().max() > 1e-5


def test_networks_are_in_channels_last_but_on_mps(card):
    classifier = small().to(card.device)
    engine.predict(classifier, IMAGES, device=card.device)
    weight = classifier.network[0].weight
    assert weight.is_contiguous() == (card.device.type == "mps")


def test_folded_folds_whatever_the_device_may(cuda):
    engine.allow_tf32(True)
    folded = models.folded(small()).to(cuda.device)
    assert not any(isinstance(each, nn.BatchNorm2d) for each in folded.modules())


@pytest.mark.parametrize("room", [True, False], ids=["resident", "in the host's memory"])
@pytest.mark.parametrize("teacher", [False, True], ids=["labels", "live teacher"])
def test_no_step_waits_for_the_device(card, tmp_path, monkeypatch, room, teacher):
    monkeypatch.setattr(pretend, "rounded", lambda tensor: tensor)      # no TF32
    if not room:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _=None: (0, 0))
        monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 0)
    of = live if teacher else lambda device: cross_entropy(LABELS, device)
    _, expected = learn(tmp_path / "cpu.part", engine.CPU, LIVE, of(engine.CPU),
                        plain=card.device.type == "mps")
    objective = of(card.device)
    card.seen.clear()
    _, found = learn(tmp_path / "card.part", card.device, LIVE, objective)
    assert found == pytest.approx(expected, rel=1e-4)
    # mps copies what was drawn for a step, and the images that do not fit, before it goes on.
    copies = {"augment.py:to_device"} if card.device.type == "mps" else set()
    assert card.waits() <= WAITS | copies
    waits = {where.partition(" ")[0]: count for (what, where), count in card.seen.items()
             if what == "wait"}
    assert waits["training.py:_Keeper.after_epoch"] == len(expected) == 3
    assert waits["training.py:train_one_epoch.<locals>.<genexpr>"] <= 6


def test_a_training_on_a_device_resumes_in_the_same_bits(card, tmp_path, monkeypatch):
    expected, _ = learn(tmp_path / "undisturbed.part", card.device, LIVE)
    left = [9]

    def asked():
        left[0] -= 1
        return 15 if left[0] == 0 else 0
    monkeypatch.setattr(training, "interrupted", asked)
    with pytest.raises(Interrupted):
        learn(tmp_path / "student.part", card.device, LIVE)
    resumed, _ = learn(tmp_path / "student.part", card.device, LIVE)
    for name, value in expected.state_dict().items():
        assert torch.equal(value.cpu(), resumed.state_dict()[name].cpu())


def test_scores_are_copied_in_blocks(card, monkeypatch):
    monkeypatch.setattr(engine, "EVALUATION_BATCH", 16)
    teacher, criteria = small().to(card.device), load_criteria(resolve({}))
    del criteria["mms"]     # it looks whether two rows of the last layer are equal
    expected, _ = score_batches(small(), as_source(IMAGES), None, criteria, engine.CPU, "pool")
    card.seen.clear()
    found, _ = score_batches(teacher, as_source(IMAGES), None, criteria, card.device, "pool")
    for name, column in expected.items():
        np.testing.assert_allclose(found[name], column, rtol=1e-5, atol=1e-6)
    waits = {where.partition(" ")[0]: count for (what, where), count in card.seen.items()
             if what == "wait"}
    assert waits.pop("engine.py:columns_of") == 2 + len(criteria)
    assert not any(where.startswith(("scoring.py", "engine.py")) for where in waits)


def test_a_card_takes_larger_batches_of_large_images(cuda):
    assert engine.evaluation_batch(small().to(cuda.device)) == 512
    large = small()
    large.input_size = 299
    assert engine.evaluation_batch(large) == 53
    assert engine.evaluation_batch(large.to(cuda.device)) == 147


@pytest.mark.filterwarnings("ignore")
def test_compiled_it_learns_the_same(tmp_path):
    """Where it is asked for, on a CPU as well."""
    layers = {"conv": nn.Conv2d(3, 4, 3, stride=4), "flat": nn.Flatten(), "fc": nn.Linear(64, 3)}
    found = []
    for wanted in (False, True):
        classifier = copy.deepcopy(small(*copy.deepcopy(layers).values()))
        state = train(classifier, IMAGES, np.arange(COUNT), cross_entropy(LABELS, engine.CPU),
                      replace(LIVE, compile=wanted), seed=5, device=engine.CPU,
                      watch=Watch(Checkpoint(tmp_path / f"{wanted}.part", ""), "student"))
        assert hasattr(state.network, "_orig_mod") == wanted
        found.append([each["loss"] for each in state.history])
    assert found[1] == pytest.approx(found[0], rel=1e-4)


# --------------------------------------------------------------------------------------------------
# Planted faults
# --------------------------------------------------------------------------------------------------

def beside(device):
    return torch.ones(3, device=device) + torch.ones(3)


def cpu_generator(device):
    return torch.rand(3, device=device, generator=torch.Generator())


def cpu_generator_in_place(device):
    return torch.empty(3, device=device).uniform_(generator=torch.Generator())


def as_numpy(device):
    return torch.ones(3, device=device).numpy()


def as_array(device):
    return np.asarray(torch.ones(3, device=device))


def not_pinned(device):
    return torch.ones(3).to(device, non_blocking=True)


def copied_not_pinned(device):
    return torch.empty(3, device=device).copy_(torch.ones(3), non_blocking=True)


def to_the_host(device):
    return torch.ones(3, device=device).to("cpu", non_blocking=True)


@pytest.mark.parametrize("fault", [
    beside, cpu_generator, cpu_generator_in_place, as_numpy, as_array, not_pinned,
    copied_not_pinned, to_the_host])
def test_a_planted_fault_is_noticed(card, fault):
    with pytest.raises(Misplaced):
        fault(card.device)


@pytest.mark.parametrize("make", [
    lambda device: torch.ones(3, device=device).double(),
    lambda device: torch.ones(3, dtype=torch.float64).to(device)])
def test_float64_is_refused_on_mps_alone(card, make):
    if card.device.type == "cuda":
        assert make(card.device).dtype == torch.float64
    else:
        with pytest.raises(Misplaced):
            make(card.device)


def test_what_a_device_takes_is_not_refused(card):
    device = card.device
    ones = torch.ones(3, device=device)
    assert (ones + torch.tensor(1.0)).tolist() == [2, 2, 2] and bool((ones > 0).all())
    assert torch.ones(3).pin_memory().to(device, non_blocking=True).device == device
    assert torch.rand(3, generator=torch.Generator()).to(device).device == device
