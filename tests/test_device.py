"""CUDA and mps on a machine that has neither: the offline job on a pretended device (pretend.py),
and what such a device would refuse, spoil or wait for."""
import copy
from dataclasses import replace

import numpy as np
import pretend
import pytest
import test_training
import torch
from conftest import NET, small_run
from pretend import Misplaced
from script_files import manifest, ran, read
from test_training import IMAGES, LABELS, small
from torch import nn

from distill import live_objective
from kd import engine, models
from kd.settings import Recipe
from kd.training import cross_entropy

stopping = test_training.stopping
LIVE = Recipe(3, 8, 0.05, 0.9, 1e-3, "onecycle", "crop,flip,mixup,cutmix", optimizer="muon",
              ema=0.8)


@pytest.fixture(params=["cuda", "mps"])
def card(request, monkeypatch):
    with pretend.begin(request.param, monkeypatch) as card:
        yield card


def learn(path, device=engine.CPU, objective=None, recipe=LIVE, **more):
    """(The classifier after its training, the losses of its epochs)."""
    objective = objective or cross_entropy(LABELS, device)
    classifier, state = test_training.learn(path, recipe, objective, device=device, **more)
    return classifier, [each["loss"] for each in state.history]


def live(device):
    return live_objective(models.folded(small(seed=1)).to(device), 4.0, device)


def job(root, device, *more):
    """The run folder of `compile.py` on the built-in digits."""
    (root / "net.py").write_text(NET)
    flags = [*small_run(root), "--target", "digits", "--sources", "noise,photos,glyphs"]
    ran("compile.py", flags, "--threshold", "0.9", "--limit", "120", "--device", device,
        "--run-dir", root / device, "--augment", "crop,flip,mixup", "--ema", "0.9",
        "--approaches", "supervised,balanced,mms,matched", *more)
    return root / device


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    return job(tmp_path_factory.mktemp("job"), "cpu")


def losses(run, name):
    return [each["loss"] for each in read(run, f"{name}.json")["history"]]


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
        one, other = ([(row["source"], row["index"]) for row in manifest(folder, approach)]
                      for folder in (run, on_cpu))
        assert one == other
        near = pytest.approx(losses(on_cpu, f"students/{approach}"), rel=0.02)
        assert losses(run, f"students/{approach}") == near


@pytest.mark.parametrize("card", ["cuda"], indirect=True)
def test_only_training_uses_tf32(card, tmp_path):
    classifier, _ = learn(tmp_path / "a.part", card.device)
    assert card.seen.keys() == {"copy", "wait", "TF32", "product"}      # of Muon, which needs it
    card.seen.clear()
    assert torch.backends.cudnn.benchmark
    found = engine.predict(classifier, IMAGES, device=card.device)
    assert card.seen.keys() == {"copy", "wait", "product"}
    assert not torch.backends.cudnn.benchmark
    here = small()
    here.load_state_dict({name: value.cpu() for name, value in classifier.state_dict().items()})
    torch.testing.assert_close(found, engine.predict(here, IMAGES), rtol=1e-5, atol=1e-6)
    engine.allow_tf32(True)     # and it would make a difference
    rough = classifier(torch.from_numpy(IMAGES).to(card.device)).detach().cpu()
    assert (rough - found).abs().max() > 1e-5


@pytest.mark.parametrize("room", [True, False], ids=["resident", "in the host's memory"])
@pytest.mark.parametrize("teacher", [False, True], ids=["labels", "live teacher"])
def test_no_step_waits_for_the_device(card, tmp_path, monkeypatch, room, teacher):
    monkeypatch.setattr(pretend, "rounded", lambda tensor: tensor)      # no TF32
    if not room:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _=None: (0, 0))
        monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 0)
    of = live if teacher else lambda device: cross_entropy(LABELS, device)
    classifier = small()
    if card.device.type == "mps":       # which draws dropout in the order of torch's own layout
        classifier.use_torchs_layout()
    _, expected = learn(tmp_path / "cpu.part", objective=of(engine.CPU), classifier=classifier)
    objective, waits = of(card.device), []
    for batch_size in (LIVE.batch_size, LIVE.batch_size // 2):      # twice the steps
        card.seen.clear()
        _, found = learn(tmp_path / f"{batch_size}.part", card.device, objective,
                         replace(LIVE, batch_size=batch_size))
        assert batch_size < LIVE.batch_size or found == pytest.approx(expected, rel=1e-4)
        # mps copies what was drawn for a step, and the images that do not fit, before it goes on.
        waits.append(card.seen["wait"] - card.seen["copy"] * (card.device.type == "mps"))
    assert waits[0] == waits[1] > 0


def test_a_training_on_a_device_resumes_in_the_same_bits(card, tmp_path, stopping):
    expected, _ = learn(tmp_path / "undisturbed.part", card.device)
    test_training.half_done(tmp_path / "student.part", stopping, LIVE, device=card.device,
                            objective=cross_entropy(LABELS, card.device))
    resumed, _ = learn(tmp_path / "student.part", card.device)
    for name, value in expected.state_dict().items():
        assert torch.equal(value.cpu(), resumed.state_dict()[name].cpu())


@pytest.mark.filterwarnings("ignore")
def test_compiled_it_learns_the_same(tmp_path):
    """Where it is asked for, on a CPU as well."""
    layers = nn.Conv2d(3, 4, 3, stride=4), nn.Flatten(), nn.Linear(64, 3)
    found = {}
    for wanted in (False, True):
        _, state = test_training.learn(tmp_path / f"{wanted}.part", replace(LIVE, compile=wanted),
                               classifier=small(*copy.deepcopy(layers)))
        assert hasattr(state.network, "_orig_mod") == wanted
        found[wanted] = [each["loss"] for each in state.history]
    assert found[True] == pytest.approx(found[False], rel=1e-4)


FAULTS = {
    "a CPU tensor beside one on the device": lambda device: (
        torch.ones(3, device=device) + torch.ones(3)),
    "a CPU generator": lambda device: torch.rand(3, device=device, generator=torch.Generator()),
    "numpy": lambda device: np.asarray(torch.ones(3, device=device)),
    "memory that is not pinned": lambda device: torch.ones(3).to(device, non_blocking=True),
    "a copy to the host": lambda device: torch.ones(3, device=device).to("cpu", non_blocking=True),
    "float64, which mps has not": lambda device: torch.ones(3, device=device).double()}


@pytest.mark.parametrize("card", ["mps"], indirect=True)
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_planted_fault_is_noticed(card, fault):
    with pytest.raises(Misplaced):
        fault(card.device)
