"""What users bring: their networks, checkpoints, criteria, classes, image sizes; a target without images; the export."""
import csv
import itertools
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import compile
import data
import distill
import engine
import files
import mms_threshold
import models
import transfer
from conftest import COLOURS, paint
from files import UserError

RUN = Path("runs/colours")
NETWORKS = """
import torch
from torch import nn

def body():
    return [nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()]

def make(num_classes):
    return nn.Sequential(*body(), nn.Linear(32, num_classes))

def squashed(num_classes):
    return nn.Sequential(*body(), nn.Linear(32, num_classes), nn.Tanh())

class InPlace(nn.Sequential):
    def forward(self, images):
        return super().forward(images).tanh_()

def in_place(num_classes):
    return InPlace(*make(num_classes))

class Pair(nn.Sequential):
    def forward(self, images):
        return super().forward(images), images

def pair():
    return Pair(*make(3))

def five():
    return make(5)

def three():
    return make(3)

class Then(nn.Module):
    def __init__(self, first, then):
        super().__init__()
        self.first, self.then = first, then

    def forward(self, images):
        return self.then(self.first(images))

def scaled(num_classes):
    return Then(make(num_classes), lambda logits: 5 * logits + 1)

def normed(num_classes):
    norm = nn.BatchNorm1d(num_classes)
    nn.init.uniform_(norm.weight, 0.5, 2)
    return Then(make(num_classes), norm)

def log_softmax(num_classes):
    return Then(make(num_classes), nn.LogSoftmax(1))

def probabilities(num_classes):
    return Then(make(num_classes), nn.Softmax(1))

def rectified(num_classes):
    return Then(make(num_classes), nn.ReLU())

def grouped(num_classes):
    return nn.Sequential(*body()[:-2], nn.Conv2d(8, 2 * num_classes, 1), nn.Conv2d(2 * num_classes, num_classes, 1, groups=num_classes), nn.AdaptiveAvgPool2d(1), nn.Flatten())

def tokens(num_classes):
    return Then(nn.Sequential(*body()[:-2], nn.Flatten(2)), Tokens(num_classes))

class Tokens(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.fc = nn.Linear(8, num_classes)

    def forward(self, maps):
        return self.fc(maps.transpose(1, 2)).mean(1)

def turned(num_classes):
    return Turned(num_classes)

class Turned(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.rows = nn.Parameter(torch.randn(num_classes, 3 * 32 * 32))

    def forward(self, images):
        return torch.tanh((self.rows @ images.flatten(1).T).T)

def lazy(num_classes):
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.Flatten(), nn.LazyLinear(num_classes))

def on_the_cpu(num_classes):
    network = make(num_classes)
    network[0].weight.data.mul_(1 + network[0].weight.abs().max().item())       # no such number without data
    return network

def weight_norm(num_classes):
    network = make(num_classes)
    network[0] = nn.utils.parametrizations.weight_norm(network[0])
    return network

def broken(num_classes):
    raise RuntimeError("no such\\nlayer")

def nothing():
    return 7

def wrong(num_classes):
    return nn.Conv2d(3, num_classes, 3)
"""


@pytest.fixture
def networks(tmp_path):
    """The path of a file with functions that make networks."""
    (tmp_path / "networks.py").write_text(NETWORKS)
    return tmp_path / "networks.py"


def colour_teacher(networks, factory="make"):
    """A network of that file that tells the three colours apart: (module, its classes)."""
    torch.manual_seed(0)
    classes = sorted(COLOURS)
    classifier = models.build(f"{networks}:{factory}", classes)
    rng = np.random.default_rng(0)
    colours = np.array([COLOURS[name] for name in classes])
    labels = rng.integers(0, 3, 300)
    images = np.clip(colours[labels][:, None, None] + rng.normal(0, 40, (300, 32, 32, 3)), 0, 255).astype(np.uint8)
    optimizer = torch.optim.SGD(classifier.parameters(), 0.05, 0.9)
    for _ in range(30):
        loss = nn.functional.cross_entropy(3 * classifier(torch.from_numpy(images)), torch.from_numpy(labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return classifier.eval().network, classes


@pytest.fixture
def teacher(networks):
    """The flags of a teacher of one's own that has learnt the colours."""
    network, _ = colour_teacher(networks)
    torch.save(network.state_dict(), networks.with_name("weights.pth"))
    return ["--teacher-arch", f"{networks}:make", "--teacher-checkpoint", str(networks.with_name("weights.pth"))]


def without(flags, *names):
    """`flags` less those, with their values."""
    kept = list(flags)
    for name in names:
        at = kept.index(name)
        del kept[at:at + 2]
    return kept


def results():
    return json.loads((RUN / "results.json").read_text())


# --------------------------------------------------------------------------------------------------
# Networks of one's own
# --------------------------------------------------------------------------------------------------

def wrapped(state):
    """{how: what is saved} of one state dict."""
    def prefixed(prefix):
        return {prefix + key: value for key, value in state.items()}
    return {"bare": state, "module.": prefixed("module."), "_orig_mod.module.": prefixed("_orig_mod.module."),
            "state_dict": {"state_dict": state, "epoch": 3}, "model": {"model": prefixed("module."), "optimizer": {"state": {}, "param_groups": []}},
            "its own key": {"weights_of_mine": state, "args": {"lr": 0.1}},
            "two dicts, one known": {"state_dict": state, "ema": {key: value * 0 for key, value in state.items()}},
            "no counters": {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}}


@pytest.mark.parametrize("how", ["bare", "module.", "_orig_mod.module.", "state_dict", "model", "its own key", "two dicts, one known", "no counters"])
def test_a_state_dict_is_loaded_however_it_was_saved(networks, how):
    network, classes = colour_teacher(networks)
    path = networks.with_name("weights.pth")
    torch.save(wrapped(network.state_dict())[how], path)
    classifier = models.load_teacher(path, f"{networks}:make", classes)
    assert all(torch.equal(value, classifier.network.state_dict()[key]) for key, value in network.state_dict().items()
               if how != "no counters" or not key.endswith("num_batches_tracked"))


@pytest.mark.parametrize("change, said", [
    (lambda state: state.pop("5.weight"), "it lacks 5.weight"),
    (lambda state: state.update({"6.weight": torch.zeros(1)}), "it has beyond that 6.weight"),
    (lambda state: state.update({"5.bias": torch.zeros(4), "5.weight": torch.zeros(4, 32)}), r"of another shape are 5.bias \(4 for 3\), 5.weight \(4x32 for 3x32\)"),
    (lambda state: (state.update({f"x.{key}": value for key, value in state.items()}), [state.pop(key) for key in list(state) if not key.startswith("x.")],
                    state.pop("x.0.bias")), "it lacks 0.bias"),
    (lambda state: [state.pop(key) for key in list(state)] and state.update({f"other{i}": torch.zeros(1) for i in range(9)}), "other0, other1, other2 and 6 more"),
])
def test_keys_that_do_not_fit_are_named(networks, change, said):
    network, classes = colour_teacher(networks)
    state = dict(network.state_dict())
    change(state)
    torch.save(state, networks.with_name("weights.pth"))
    with pytest.raises(UserError, match=said) as raised:
        models.load_teacher(networks.with_name("weights.pth"), f"{networks}:make", classes)
    assert "weights.pth does not fit" in str(raised.value) and len(str(raised.value).splitlines()) == 1


def _pickle(network, path):
    torch.save(network, path)


def _script(network, path):
    for module in network.modules():        # scripting wants torch's own class
        if type(module) is models.SmallInputConv2d:
            module.__class__ = nn.Conv2d
    torch.jit.save(torch.jit.script(network), path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("save, said", [
    (_pickle, "it holds .*, and to read that is to run code from the file; .*torch.save\\(network.state_dict\\(\\), FILE\\)"),
    (_script, "it holds a TorchScript program, and to read that is to run code from the file"),
    (lambda network, path: path.write_bytes(b"junk"), "is not a checkpoint of tensors and plain types"),
    (lambda network, path: path.write_bytes(b""), "is not a checkpoint of tensors and plain types"),
    (lambda network, path: torch.save({"epoch": 3}, path), "holds no state dict"),
    (lambda network, path: torch.save([1, 2], path), "holds no state dict"),
    (lambda network, path: torch.save({"a": network.state_dict(), "b": network.state_dict()}, path), r"holds several state dicts \(a, b\)"),
    (lambda network, path: None, "there is no such checkpoint"),
])
def test_what_is_no_state_dict_is_refused_with_the_way_out(networks, save, said):
    network, classes = colour_teacher(networks)
    save(network, networks.with_name("weights.pth"))
    with pytest.raises(UserError, match=said) as raised:
        models.load_teacher(networks.with_name("weights.pth"), f"{networks}:make", classes)
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("arch, said", [
    ("networks.py:nobody", "has no function nobody"),
    ("elsewhere.py:make", "elsewhere.py: there is no such file"),
    ("networks.py:broken", "networks.py:broken raised RuntimeError: no such"),
    ("networks.py:nothing", "networks.py:nothing gives a int, not a torch.nn.Module"),
    ("networks.py:wrong", r"gives \(2, 2, 30, 30\) for two images, not a row of logits each"),
    ("syntax.py:make", "syntax.py can't be imported (SyntaxError"),
    ("timm:no_such_network", "no_such_network"),
])
def test_a_network_that_can_not_be_made_is_named_before_any_work(networks, flags, execute, arch, said):
    networks.with_name("syntax.py").write_text("def make(:\n")
    if arch.startswith("timm:"):
        pytest.importorskip("timm", reason="timm is an optional extra: pip install -r requirements-extra.txt")
    status, out, err = execute(compile.main, [*without(flags, "--teacher-arch"), "--teacher-arch", arch])
    assert status == 2 and len(err.splitlines()) == 1
    assert said in err or __import__("re").search(said, err), err
    assert not RUN.exists()


def test_a_package_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match="timm is not installed: pip install timm"):
        models.build("timm:resnet10t", ["a", "b"])


@pytest.mark.parametrize("arch", ["timm:resnet10t", "timm:mobilenetv4_conv_small", "timm:vit_tiny_patch16_224", "timm:convnext_atto"])
def test_a_network_of_timm_is_built_and_its_head_is_found(arch, tmp_path):
    pytest.importorskip("timm", reason="timm is an optional extra: pip install -r requirements-extra.txt")
    classifier = models.build(arch, ["a", "b", "c"]).eval()
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8))
    logits = classifier(images)
    assert logits.shape == (2, 3)
    parent, name = models.heads(classifier)[-1]
    assert torch.equal(models.head_weight(classifier), getattr(parent, name).weight.detach().flatten(1))
    models.save(tmp_path / "network.pt", classifier)
    assert torch.equal(models.load(tmp_path / "network.pt")(images), logits)


def test_rows_are_found_by_what_is_computed_not_by_names(networks):
    class Odd(nn.Module):
        """Its largest linear layer, and the last that is registered, don't make the logits."""
        def __init__(self):
            super().__init__()
            self.rows = nn.Parameter(torch.randn(4, 3))
            self.after = nn.Linear(3, 3)
            self.big = nn.Linear(3072, 4)

        def forward(self, images):
            hidden = torch.tanh(self.big(images.flatten(1)))
            self.after(torch.zeros(1, 3))
            return hidden @ self.rows + 0 * 1

    odd = models.Classifier(Odd(), "odd", ["a", "b", "c"])
    assert torch.equal(models.head_weight(odd), odd.network.rows.detach().T)
    for factory in ("squashed", "in_place"):
        squashed = models.build(f"{networks}:{factory}", ["a", "b", "c"])
        assert models.head_weight(squashed) is None
        with pytest.raises(UserError, match="has no linear layer that makes its logits"):
            models.heads(squashed)
    with pytest.raises(UserError, match="probabilities, which add up to 1, not logits"):
        models.require_logits(models.build(f"{networks}:probabilities", ["a", "b", "c"]))
    diverged = models.build(f"{networks}:make", ["a", "b", "c"])
    with torch.no_grad():
        diverged.network[-1].weight.fill_(float("nan"))
    assert models.head_weight(diverged).shape == (3, 32)


@pytest.mark.parametrize("factory", ["scaled", "normed", "log_softmax", "tokens", "weight_norm", "lazy", "on_the_cpu"])
@pytest.mark.parametrize("count", [3, 8])
def test_rows_of_a_head_that_something_linear_follows_give_the_distances_to_the_boundaries(networks, factory, count):
    classifier = models.build(f"{networks}:{factory}", list("abcdefgh")[:count]).eval()
    models.require_fits(f"{networks}:{factory}")
    images = torch.randint(0, 256, (20, 32, 32, 3), dtype=torch.uint8)
    inputs = []
    head = next(module for module in reversed(list(classifier.modules())) if isinstance(module, nn.Linear))
    head.register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
    with torch.no_grad():
        logits, rows = classifier(images), models.head_weight(classifier)
    features = inputs[0].detach()
    features = features.mean(1) if factory == "tokens" else features
    margins, made = (values - values[:, :1] for values in (logits, features @ rows.T))
    torch.testing.assert_close(margins - margins[0], made - made[0], rtol=1e-3, atol=1e-4)      # but for a constant a class
    torch.testing.assert_close(models.folded(classifier)(images), logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("factory", ["rectified", "grouped", "turned"])
@pytest.mark.parametrize("count", [3, 8, 9])
def test_what_is_no_linear_head_is_not_taken_for_one(networks, factory, count):
    assert models.head_weight(models.build(f"{networks}:{factory}", list("abcdefghi")[:count])) is None


def test_files_of_ones_own_may_have_the_names_of_ours_beside_them(networks, tmp_path):
    (tmp_path / "models.py").write_text("WIDTH = 5\n")
    (tmp_path / "data.py").write_text("WIDTH = 7\n")
    (tmp_path / "clash.py").write_text("""
from __future__ import annotations
from dataclasses import dataclass
from torch import nn
import models

@dataclass
class Options:
    width: int = models.WIDTH

def make(num_classes):
    from data import WIDTH
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, WIDTH * Options().width), nn.Linear(WIDTH * Options().width, num_classes))
""")
    ours = dict(sys.modules)
    for _ in range(2):
        assert models.build(f"{tmp_path}/clash.py:make", ["a", "b"]).network[1].out_features == 35
    assert all(sys.modules[name] is ours[name] for name in ("models", "data", "run"))


def test_the_file_of_a_network_may_be_moved(networks, teacher, flags, execute, tmp_path):
    own = [*without(flags, "--teacher-arch", "--teacher-weights"), *teacher[2:], "--approaches", "mms", "--student-arch", "resnet18"]
    assert execute(compile.main, [*own, *teacher[:2]])[0] == 0
    (tmp_path / "elsewhere").mkdir()
    os.replace(networks, tmp_path / "elsewhere/networks.py")
    for made in ("students", "transfer", "scores"):
        shutil.rmtree(RUN / made)
    status, out, err = execute(compile.main, [*own, "--teacher-arch", f"{tmp_path}/elsewhere/networks.py:make"])
    assert (status, err) == (0, "") and "scores: pool" in out


@pytest.mark.parametrize("changed", ["weights.pth", "networks.py"])
def test_a_run_whose_network_comes_from_files_that_changed_since_stops(networks, teacher, flags, execute, changed):
    own = [*without(flags, "--teacher-arch", "--teacher-weights"), *teacher, "--approaches", "balanced", "--student-arch", f"{networks}:make"]
    assert execute(compile.main, own)[0] == 0
    if changed == "networks.py":
        networks.write_text(NETWORKS + "# another version\n")
    else:
        torch.save(colour_teacher(networks)[0].state_dict() | {"0.bias": torch.zeros(8)}, networks.with_name(changed))
    status, out, err = execute(compile.main, own)
    assert status == 2 and f"was made from another version of {networks.with_name(changed)}: use another --run-dir, or --restart" in err
    assert execute(compile.main, [*own, "--restart"])[0] == 0


def test_restart_does_not_delete_what_is_given_as_an_input(finished, flags, execute):
    for given in (["--teacher-checkpoint", "runs/colours/teacher.pt"], ["--student-weights", "runs/colours/students/mms.pt"]):
        status, out, err = execute(compile.main, [*flags, *given, "--restart"])
        assert status == 2 and f"--restart would delete {given[1]}, which is given as an input" in err and len(err.splitlines()) == 1
    assert (RUN / "results.json").exists() and (RUN / "students/mms.pt").exists()
    (RUN / "teacher.py").write_text("")
    (RUN / "results.xlsx").write_text("")
    assert execute(compile.main, [*flags, "--restart", "--approaches", "balanced"])[0] == 0
    assert (RUN / "teacher.py").exists() and (RUN / "results.xlsx").exists()


def test_weights_to_start_from_are_shown_what_the_flags_say(finished, flags, execute):
    begun = [*without(flags, "--teacher-weights", "--teacher-epochs"), "--teacher-epochs", "1", "--teacher-weights", "runs/colours/teacher.pt", "--run-dir", "runs/again", "--approaches", "balanced"]
    assert execute(compile.main, [*begun, "--teacher-size", "40", "--teacher-mean", "0.1,0.2,0.3"])[0] == 0
    content = torch.load("runs/again/teacher.pt", weights_only=True)
    assert (content["input_size"], content["mean"], content["std"]) == (40, [0.1, 0.2, 0.3], [0.5, 0.5, 0.5])
    status, out, err = execute(compile.main, [*flags, "--teacher-arch", "resnet50", "--teacher-checkpoint", "runs/colours/teacher.pt", "--run-dir", "runs/other"])
    assert status == 2 and "runs/colours/teacher.pt holds a resnet18, not a resnet50: leave --teacher-arch out" in err


@pytest.mark.parametrize("arch, size, heads", [("inception_v3", 299, {"AuxLogits"}), ("googlenet", 32, {"aux1", "aux2"})])
def test_a_state_dict_need_not_have_the_auxiliary_heads_of_the_network(arch, size, heads, tmp_path):
    whole = models.build(arch, ["a", "b"], input_size=size)
    state = whole.network.state_dict()
    assert {key.partition(".")[0] for key in state if "aux" in key.lower()} == heads
    torch.save({key: value for key, value in state.items() if key.partition(".")[0] not in heads}, tmp_path / "without.pth")
    torch.save(state, tmp_path / "with.pth")
    images = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    with torch.no_grad():
        expected = whole.eval()(images)
        for name in ("without", "with"):
            assert torch.equal(models.load_teacher(tmp_path / f"{name}.pth", arch, ["a", "b"], size)(images), expected)
        if arch == "inception_v3":      # below 299 the network has none and the state dict does
            assert models.load_teacher(tmp_path / "with.pth", arch, ["a", "b"], 75).network.AuxLogits is None


def test_class_names_that_are_numbers_are_an_order_too(networks, painted, execute, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for split in ("train", "test"):
        for number, colour in enumerate(sorted(COLOURS)):
            shutil.copytree(painted[0] / split / colour, tmp_path / "numbers" / split / str(number))
    (tmp_path / "names.txt").write_text("2\n0\n1\n")
    named = data.load_target("numbers=numbers", names=("2", "0", "1"))
    counted = data.load_target("numbers=numbers", names=3)
    assert named.classes == ["2", "0", "1"] and counted.classes == ["0", "1", "2"]
    assert (named.train.labels == np.array([1, 2, 0])[counted.train.labels]).all()
    with pytest.raises(UserError, match="--classes gives 4 classes, numbers=numbers has 3"):
        data.load_target("numbers=numbers", names=4)


def by_hand(flags):
    """The flags of a stage in the run folder of `flags`: the target, and what is code."""
    return ["--target", flags[1], *itertools.chain.from_iterable((flag, flags[flags.index(flag) + 1]) for flag in ("--teacher-arch", "--student-arch") if flag in flags)]


def test_mms_plain_may_be_added_when_the_tool_asks_for_it(networks, flags, execute):
    own = [*without(flags, "--teacher-arch"), "--teacher-arch", f"{networks}:squashed", "--approaches", "balanced"]
    assert execute(compile.main, own)[0] == 0
    status, _, err = execute(transfer.main, [*by_hand(own), "--approach", "mms"])
    assert status == 2 and "give --mms-plain" in err
    status, out, err = execute(transfer.main, [*by_hand(own), "--approach", "mms", "--mms-plain"])
    assert (status, err) == (0, "") and "transfer: mms" in out


def test_a_criterion_is_still_known_after_a_run_without_it(finished_flags, execute, tmp_path):
    flags, _ = finished_flags
    mine = criterion_file(tmp_path / "mine.py")
    assert execute(compile.main, [*without(flags, "--approaches"), "--approaches", mine])[0] == 0
    assert execute(compile.main, [*without(flags, "--approaches"), "--approaches", "mms"])[0] == 0
    status, out, err = execute(transfer.main, [*by_hand(flags), "--approach", "mine"])
    assert status == 2 and len(err.splitlines()) == 1 and f"mine is a criterion in {mine}, and code runs only where the command line names it: give --approach {mine}" in err
    status, out, err = execute(transfer.main, [*by_hand(flags), "--approach", mine])
    assert (status, err) == (0, "") and "transfer: mine" in out


@pytest.mark.parametrize("code, flag", [("architecture", "--teacher-arch"), ("criterion", "--approaches")])
def test_code_that_only_a_run_folder_or_a_config_names_does_not_run(finished_flags, execute, tmp_path, code, flag):
    flags, _ = finished_flags
    criterion = criterion_file(tmp_path / "mine.py")
    if code == "criterion":
        assert execute(compile.main, [*without(flags, "--approaches"), "--approaches", criterion])[0] == 0
    (tmp_path / "ran.py").write_text("open('ran', 'w')\n" + Path(criterion).read_text())
    config = json.loads((RUN / "config.json").read_text())
    if code == "criterion":
        config |= {"criteria": {"ran": str(tmp_path / "ran.py")}, "approaches": ["ran"]}
    else:
        config |= {"teacher_arch": f"{tmp_path}/ran.py:score"}
    Path("config.json").write_text(json.dumps(config))
    status, _, err = execute(compile.main, ["--config", "config.json", *(["--teacher-arch", flags[flags.index("--teacher-arch") + 1], *by_hand(flags)[4:]] if code == "criterion" else [])])
    assert status == 2 and len(err.splitlines()) == 1 and "--config config.json names code" in err and f"{tmp_path}/ran.py" in err and f"add {flag} " in err
    (RUN / "config.json").write_text(json.dumps(config))
    (RUN / files.LEDGER).unlink()
    for argv in (["--target", flags[1], "--approach", "mms"], [*by_hand(flags), "--approach", "balanced"]):
        execute(transfer.main, argv)
    assert not Path("ran").exists()


@pytest.mark.parametrize("flag, value", [("--teacher-mean", "nan,0,0"), ("--teacher-mean", "0,0,1.5"), ("--teacher-std", "0.5,0.5,0"), ("--teacher-std", "inf,1,1")])
def test_a_normalisation_out_of_range_is_refused(flags, execute, flag, value):
    status, _, err = execute(compile.main, [*flags, flag, value])
    assert status == 2 and len(err.splitlines()) == 1 and flag in err


def test_scores_may_be_nan_and_of_any_precision(finished_flags, execute, tmp_path):
    flags, _ = finished_flags
    mine = criterion_file(tmp_path / "mine.py", "import torch\nKEEP = '>='\ndef score(z, w): return torch.where(z[:, 0] > 0, z[:, 0], float('nan')).bfloat16()\n"
                          "def threshold(s, p, c): return ['0.5'] * c\n")
    status, out, err = execute(compile.main, [*without(flags, "--approaches"), "--approaches", mine, "--threshold-quantile", "0.5", *scored_only("half")])
    assert (status, err) == (0, "")
    thresholds = json.loads(Path("runs/half/thresholds.json").read_text())["mine"]
    confidence = np.load("runs/half/scores/confidence.npz")
    for label, value in enumerate(thresholds):
        scores = confidence["mine"][confidence["predicted"] == label]
        scores = np.sort(scores[~np.isnan(scores)])[::-1]
        assert value == (scores[-(-len(scores) // 2) - 1] if len(scores) else None)


def test_a_teacher_of_ones_own_runs_from_data_to_table(networks, teacher, flags, execute):
    own = [*without(flags, "--teacher-arch", "--teacher-weights"), *teacher, "--teacher-size", "48", "--teacher-mean", "0.4,0.5,0.6", "--teacher-std", "0.2,0.3,0.4"]
    status, out, err = execute(compile.main, own)
    assert (status, err) == (0, "")
    assert "Teacher networks.py:make: " in out and "resized to 48x48" in out
    content = torch.load(RUN / "teacher.pt", weights_only=True)
    assert (content["input_size"], content["mean"], content["std"], content["classes"]) == (48, [0.4, 0.5, 0.6], [0.2, 0.3, 0.4], ["blue", "green", "red"])
    figures = json.loads((RUN / "teacher.json").read_text())
    # The same network and the same pixels, written out.
    network = models.build(f"{networks}:make", content["classes"]).network
    network.load_state_dict(torch.load(networks.with_name("weights.pth"), weights_only=True))
    packed = np.load(next(Path("data/packed").glob("colours-test-32-*/images.npy")))
    labels = np.load(next(Path("data/packed").glob("colours-test-32-*/labels.npy")))
    pixels = (torch.from_numpy(packed).permute(0, 3, 1, 2) / 255 - torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)) / torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    with torch.no_grad():
        found = network.eval()(nn.functional.interpolate(pixels, (48, 48), mode="bilinear", align_corners=False)).argmax(1).numpy()
    assert figures["accuracy"] == (found == labels).mean()
    assert {row["approach"] for row in results()["rows"]} == {"supervised", "balanced", "random", "mms", "entropy"}
    assert results()["teacher"] == {"arch": "networks.py:make", "accuracy": figures["accuracy"]}
    before = (RUN / "teacher.pt").stat().st_mtime_ns
    assert execute(compile.main, own)[0] == 0 and (RUN / "teacher.pt").stat().st_mtime_ns == before
    status, _, err = execute(compile.main, [*own, "--teacher-size", "40"])
    assert status == 2 and "--teacher-size 48, not 40" in err


def test_a_teacher_that_numbers_the_classes_otherwise_is_given_their_order(networks, flags, execute, tmp_path):
    network, classes = colour_teacher(networks)
    order = [2, 0, 1]       # red, blue, green
    with torch.no_grad():
        for parameter in (network[-1].weight, network[-1].bias):
            parameter.copy_(parameter[order].clone())
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    (tmp_path / "names.txt").write_text("".join(f"{classes[number]}\n" for number in order))
    own = [*without(flags, "--teacher-arch", "--teacher-weights"), "--teacher-arch", f"{networks}:make", "--teacher-checkpoint", str(tmp_path / "weights.pth"),
           "--approaches", "balanced", "--student-arch", f"{networks}:make"]
    assert execute(compile.main, own)[0] == 0 and results()["teacher"]["accuracy"] < 0.2
    status, out, err = execute(compile.main, [*own, "--classes", "names.txt", "--run-dir", "runs/ordered"])
    assert (status, err) == (0, "")
    figures = json.loads(Path("runs/ordered/results.json").read_text())
    assert figures["teacher"]["accuracy"] > 0.9 and figures["classes"] == ["red", "blue", "green"]
    (tmp_path / "names.txt").write_text("red\nblue\npink\n")
    status, out, err = execute(compile.main, [*own, "--classes", "names.txt", "--run-dir", "runs/pink"])
    assert status == 2 and "green, pink are in only one of them" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("factory, said", [("pair", "gives a tuple for two images"), ("five", r"gives (2, 5) for two images of 3 classes, not (2, 3)")])
@pytest.mark.parametrize("checkpoint", [True, False])
def test_a_network_that_gives_something_else_than_a_logit_a_class_is_named(networks, flags, execute, tmp_path, factory, said, checkpoint):
    own = [*without(flags, "--teacher-arch"), "--teacher-arch", f"{networks}:{factory}"]
    if checkpoint:
        torch.save(models.import_file(networks).__dict__[factory]().state_dict(), tmp_path / "weights.pth")
        own += ["--teacher-checkpoint", str(tmp_path / "weights.pth")]
    status, out, err = execute(compile.main, own)
    assert status == 2 and said in err and len(err.splitlines()) == 1, err


def test_a_network_of_ones_own_can_be_trained_as_teacher_and_as_student(networks, flags, execute):
    status, out, err = execute(compile.main, [*without(flags, "--teacher-arch"), "--teacher-arch", f"{networks}:make", "--student-arch", f"{networks}:three", "--approaches", "balanced"])
    assert (status, err) == (0, "") and "| balanced | networks.py:three |" in out
    assert json.loads((RUN / "teacher.json").read_text())["history"]


def test_without_a_linear_head_mms_is_refused_and_the_plain_margin_taken_when_asked(networks, flags, execute):
    network, _ = colour_teacher(networks, "squashed")
    torch.save(network.state_dict(), networks.with_name("weights.pth"))
    own = [*without(flags, "--teacher-arch", "--teacher-weights"), "--teacher-arch", f"{networks}:squashed", "--teacher-checkpoint", str(networks.with_name("weights.pth"))]
    status, out, err = execute(compile.main, own)
    assert status == 2 and len(err.splitlines()) == 1 and "made by no linear layer" in err and "--mms-plain" in err and not RUN.exists()
    status, out, err = execute(compile.main, [*own, "--approaches", "balanced,entropy"])
    assert (status, err) == (0, "") and "networks.py:squashed are made by no linear layer" in out
    status, out, err = execute(transfer.main, [*by_hand(own), "--approach", "mms"])
    assert status == 2 and "made by no linear layer" in err and len(err.splitlines()) == 1
    status, out, err = execute(compile.main, [*own, "--mms-plain", "--run-dir", "runs/plain", "--approaches", "mms"])
    assert (status, err) == (0, "") and "MMS is the plain margin z_a - z_b: no linear layer makes this teacher's logits." in out
    scores = np.load("runs/plain/scores/pool.npz")
    classifier = models.load("runs/plain/teacher.pt", f"{networks}:squashed")
    images = np.load(next(Path("data/packed").glob("pool-source-32-*/images.npy")))
    best = engine.predict(classifier, images).topk(2, dim=1).values
    np.testing.assert_allclose(scores["mms"], (best[:, 0] - best[:, 1]).numpy(), rtol=1e-5)


def test_mms_plain_changes_nothing_where_there_is_a_linear_head(finished_flags, execute):
    flags, _ = finished_flags
    shutil.copytree("runs/colours", "runs/plain", ignore=shutil.ignore_patterns("scores", "thresholds.json", "transfer", "students", "results.*"))
    assert execute(transfer.main, [*by_hand(flags), "--run-dir", "runs/plain", "--approach", "mms", "--mms-plain"])[0] == 0
    assert Path("runs/plain/transfer/mms/manifest.csv").read_bytes() == (RUN / "transfer/mms/manifest.csv").read_bytes()


# --------------------------------------------------------------------------------------------------
# Criteria of one's own
# --------------------------------------------------------------------------------------------------

@pytest.fixture
def finished_flags(painted, teacher, tmp_path, flags, execute):
    """(flags, run folder) of a run of balanced and mms with a ready teacher, finished."""
    given = [*without(flags, "--teacher-arch", "--teacher-weights", "--epochs"), *teacher, "--epochs", "1", "--student-arch", f"{teacher[1]}", "--approaches", "balanced,mms"]
    status, out, err = execute(compile.main, given)
    assert (status, err) == (0, "")
    return given, RUN


def criterion_file(path, text=None):
    path.write_text(text or Path(mms_threshold.__file__).read_text())
    return str(path)


def test_a_criterion_of_ones_own_is_treated_as_our_own(finished_flags, execute, tmp_path):
    flags, _ = finished_flags
    mine = criterion_file(tmp_path / "my_metric.py")
    status, out, err = execute(compile.main, [*without(flags, "--approaches"), "--approaches", f"balanced,mms,{mine}"])
    assert (status, err) == (0, "")
    assert "thresholds: my_metric, keep >=" in out and "| my_metric | " in out
    for name in ("manifest.csv", "images.npy"):
        assert (RUN / "transfer/my_metric" / name).read_bytes() == (RUN / "transfer/mms" / name).read_bytes()
    thresholds = json.loads((RUN / "thresholds.json").read_text())
    assert thresholds["my_metric"] == thresholds["mms"] and thresholds["classes"] == ["blue", "green", "red"]
    scores = np.load(RUN / "scores/pool.npz")
    assert np.array_equal(scores["my_metric"], scores["mms"])
    rows = {row["approach"]: row for row in results()["rows"]}
    assert rows["my_metric"]["accuracy"] == rows["mms"]["accuracy"] and results()["classes"] == ["blue", "green", "red"]
    # By hand, from the run folder's settings.
    status, out, err = execute(transfer.main, [*by_hand(flags), "--approach", "./my_metric.py"])
    assert (status, err) == (0, "") and "transfer: my_metric" in out


def test_a_criterion_that_has_changed_is_scored_anew_and_never_mixed_with_what_it_was(finished_flags, execute, tmp_path):
    flags, _ = finished_flags
    mine = criterion_file(tmp_path / "my_metric.py")
    given = [*without(flags, "--approaches"), "--approaches", mine]
    assert execute(compile.main, given)[0] == 0
    criterion_file(tmp_path / "my_metric.py", Path(mms_threshold.__file__).read_text().replace("return (first - second) / distance", "return 2 * (first - second) / distance"))
    status, out, err = execute(compile.main, given)
    assert status == 2 and "was selected by another version of" in err and len(err.splitlines()) == 1
    shutil.rmtree(RUN / "transfer/my_metric")
    (RUN / "students/my_metric.json").unlink()
    assert execute(compile.main, given)[0] == 0
    scores = np.load(RUN / "scores/pool.npz")
    np.testing.assert_allclose(scores["my_metric"], 2 * scores["mms"], rtol=1e-5)


@pytest.mark.parametrize("text, said", [
    ("KEEP = '>='\n", "it lacks score and threshold"),
    ("def score(z, w): return z[:, 0]\ndef threshold(s, p, c): return [0.0] * c\n", "it lacks KEEP = '>=' or '<='"),
    ("KEEP = '>'\ndef score(z, w): return z[:, 0]\ndef threshold(s, p, c): return [0.0] * c\n", "it lacks KEEP"),
    ("import nowhere_to_be_found\n", "can't be imported (ModuleNotFoundError: No module named 'nowhere_to_be_found')"),
    ("KEEP = '>='\ndef score(z, w): return z\ndef threshold(s, p, c): return [0.0] * c\n", "score gives a Tensor of (120, 3) for logits of (120, 3)"),
    ("KEEP = '>='\ndef score(z, w): return 3\ndef threshold(s, p, c): return [0.0] * c\n", "score gives a int"),
    ("KEEP = '>='\ndef score(z, w): raise ValueError('a\\nb')\ndef threshold(s, p, c): return [0.0] * c\n", "score raised ValueError: a"),
    ("KEEP = '>='\ndef score(z): return z[:, 0]\ndef threshold(s, p, c): return [0.0] * c\n", "score raised TypeError"),
    ("KEEP = '>='\ndef score(z, w): return z[:, 0]\ndef threshold(s, p, c): return [0.0]\n", "threshold gives a list"),
    ("KEEP = '>='\ndef score(z, w): return z[:, 0]\ndef threshold(s, p, c): return 1 / 0\n", "threshold raised ZeroDivisionError"),
    ("KEEP = '>='\ndef score(z, w): return z[:, 0]\ndef threshold(s, p, c): return ['high'] * c\n", "threshold gives a list"),
    ("KEEP = '>='\ndef score(z, w): return z[:, 0]\ndef threshold(s, p, c): return [float('-inf')] * c\n", "the threshold of blue is -inf"),
])
def test_a_criterion_that_is_wrong_is_named_in_one_line(finished_flags, execute, tmp_path, text, said):
    flags, _ = finished_flags
    mine = criterion_file(tmp_path / "mine.py", text)
    status, out, err = execute(compile.main, [*without(flags, "--approaches"), "--approaches", mine])
    assert status == 2 and len(err.splitlines()) == 1 and "mine.py" in err and (said in err or said.replace("(120, 3)", "(24, 3)") in err), err


@pytest.mark.parametrize("name", ["mms", "predicted", "confidence", "scale", "quantile", "digests", "shard_images", "calibrated_on"])
def test_a_criterion_can_not_take_a_name_that_is_there(flags, execute, tmp_path, name):
    (tmp_path / "mine").mkdir()
    status, out, err = execute(compile.main, [*flags, "--approaches", criterion_file(tmp_path / "mine" / f"{name}.py")])
    assert status == 2 and f"{name} is the name of something else in a run folder: rename the file" in err
    status, out, err = execute(compile.main, [*flags, "--approaches", "elsewhere.py"])
    assert status == 2 and "elsewhere.py: there is no such file" in err and len(err.splitlines()) == 1


def test_the_criteria_that_ship_run_when_they_are_asked_for(finished_flags, execute):
    flags, _ = finished_flags
    status, out, err = execute(compile.main, [*without(flags, "--approaches"), "--approaches", "confidence,energy,cross_entropy"])
    assert (status, err) == (0, "")
    for name, keep in (("confidence", ">="), ("energy", ">="), ("cross_entropy", "<=")):
        assert f"thresholds: {name}, keep {keep}" in out and f"| {name} | " in out
    scores = np.load(RUN / "scores/pool.npz")
    images = np.load(next(Path("data/packed").glob("pool-source-32-*/images.npy")))
    logits = engine.predict(models.load(RUN / "teacher.pt", flags[flags.index("--teacher-arch") + 1]), images).double()
    np.testing.assert_allclose(scores["confidence"], logits.softmax(1).amax(1), rtol=1e-5)
    np.testing.assert_allclose(scores["energy"], logits.exp().sum(1).log(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(scores["cross_entropy"], -logits.softmax(1).amax(1).log(), rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------------------------
# Choices of selection, through the command line
# --------------------------------------------------------------------------------------------------

def scored_only(name):
    """A copy of the run folder that holds teacher and scores alone."""
    shutil.copytree(RUN, f"runs/{name}", ignore=shutil.ignore_patterns("thresholds.json", "transfer", "students", "results.*"))
    return ["--run-dir", f"runs/{name}"]


def test_thresholds_are_scaled_or_a_quantile(finished_flags, execute):
    flags, _ = finished_flags
    before = json.loads((RUN / "thresholds.json").read_text())
    assert execute(transfer.main, [*by_hand(flags), "--approach", "mms", "--threshold-scale", "0.5", *scored_only("half")])[0] == 0
    half = json.loads(Path("runs/half/thresholds.json").read_text())
    assert half["mms"] == [value / 2 for value in before["mms"]] and half["scale"] == 0.5
    assert execute(transfer.main, [*by_hand(flags), "--approach", "mms", "--threshold-quantile", "30%", *scored_only("share")])[0] == 0
    share = json.loads(Path("runs/share/thresholds.json").read_text())
    confidence = np.load(RUN / "scores/confidence.npz")
    for label in range(3):
        for name, best_first in (("mms", lambda values: sorted(values, reverse=True)), ("entropy", sorted)):
            values = confidence[name][confidence["predicted"] == label].tolist()
            assert share[name][label] == best_first(values)[-(-3 * len(values) // 10) - 1]
    status, _, err = execute(transfer.main, [*by_hand(flags), "--approach", "mms", "--threshold-scale", "0.7", "--run-dir", "runs/half"])
    assert status == 2 and "--threshold-scale 0.5, not 0.7" in err


def manifest(run):
    with open(Path(run) / "transfer/mms/manifest.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("extra, name", [(["--shortfall", "relax"], "relax"), (["--shortfall", "repeat"], "repeat"), (["--no-balance", "--threshold-scale", "0.5"], "one"), (["--fill", "best"], "best")])
def test_every_choice_reaches_the_transfer_set_and_the_table(finished_flags, execute, extra, name):
    flags, _ = finished_flags
    small = ["--transfer-size", "90", "--threshold-scale", "1.2"]
    status, out, err = execute(compile.main, [*without(flags, "--approaches"), "--approaches", "mms", *small, *extra, *scored_only(name)])
    assert (status, err) == (0, "")
    rows, thresholds = manifest(f"runs/{name}"), json.loads(Path(f"runs/{name}/thresholds.json").read_text())["mms"]
    summary = json.loads(Path(f"runs/{name}/transfer/mms/summary.json").read_text())
    below = [row for row in rows if float(row["score"]) < thresholds[int(row["predicted"])]]
    counts = np.bincount([int(row["predicted"]) for row in rows], minlength=3)
    images = np.load(f"runs/{name}/transfer/mms/images.npy")
    assert len(images) == len(rows) == summary["size"]
    if name == "relax":
        assert below and len(below) == sum(summary["added"].values()) and "images below the threshold were added" in out
    else:
        assert not below
    if name == "repeat":
        twice = len(rows) - len({(row["source"], row["index"]) for row in rows})
        assert twice == sum(summary["added"].values()) > 0 and "repeated images were added" in out
        assert set(counts[counts > 0]) == {30}
    if name == "one":
        assert counts.max() > 30 and "The transfer sets are not balanced by class." in out and summary["shortfall"] == {}
    else:
        assert counts.max() <= 30


# --------------------------------------------------------------------------------------------------
# Own target, own image size
# --------------------------------------------------------------------------------------------------

def test_another_image_size_goes_through_packing_networks_and_run_folder(networks, flags, execute):
    given = [*without(flags, "--teacher-arch", "--epochs"), "--teacher-arch", f"{networks}:make", "--epochs", "1"]
    status, out, err = execute(compile.main, [*given, "--image-size", "64", "--approaches", "mms"])
    assert (status, err) == (0, "")
    assert np.load(RUN / "transfer/mms/images.npy", mmap_mode="r").shape[1:] == (64, 64, 3)
    assert {np.load(path, mmap_mode="r").shape[1:3] for path in Path("data/packed").glob("*/images.npy")} == {(64, 64)}
    assert all(torch.load(RUN / name, weights_only=True)["input_size"] == 64 for name in ("teacher.pt", "students/mms.pt"))
    status, out, err = execute(distill.main, [*by_hand(given), "--approach", "supervised"])      # the size comes from the run folder
    assert (status, err) == (0, "") and torch.load(RUN / "students/supervised.pt", weights_only=True)["input_size"] == 64
    status, out, err = execute(compile.main, [*given, "--approaches", "mms"])
    assert status == 2 and "--image-size 64, not 32" in err


@pytest.mark.parametrize("count", [2, 1000])
def test_a_target_of_two_and_one_of_a_thousand_classes(networks, painted, execute, tmp_path, monkeypatch, count):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for number in range(count):
        for split, images in (("train", 10 if count == 2 else 2), ("test", 2 if count == 2 else 1)):
            for image in range(images):
                paint(tmp_path / "many" / split / f"kind {number:04}" / f"{image}.png", rng.integers(0, 256, 3), rng)
    status, out, err = execute(compile.main, ["--target", f"many={tmp_path / 'many'}", "--sources", f"pool={painted[1]}", "--teacher-weights", "none", "--recipe", "quick",
                                              "--teacher-arch", f"{networks}:make", "--student-arch", f"{networks}:make", "--teacher-epochs", "1", "--epochs", "1", "--batch-size", "8"])
    assert (status, err) == (0, "")
    figures = json.loads(Path("runs/many/results.json").read_text())
    assert figures["classes"] == [f"kind {number:04}" for number in range(count)]
    assert all(len(row["per_class"]) == count for row in figures["rows"])
    assert f"of {count:,} classes: kind 0000, kind 0001" in out
    assert max(map(len, out.splitlines())) < 1500       # a thousand classes are not written out
    assert "kind 0001" in Path("runs/many/results.md").read_text()


# --------------------------------------------------------------------------------------------------
# Data-free
# --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("classes", ["3", "names.txt"])
def test_no_image_of_the_target_is_needed(painted, networks, teacher, execute, tmp_path, monkeypatch, classes):
    monkeypatch.chdir(tmp_path)
    Path("names.txt").write_text("blue\ngreen\n\nred\n")
    given = ["--target", "secret", "--data-free", "--sources", f"pool={painted[1]},more={painted[2]}", *teacher, "--recipe", "quick",
             "--epochs", "1", "--batch-size", "8", "--student-arch", f"{networks}:make", "--transfer-size", "60"]
    status, out, err = execute(compile.main, given)
    assert status == 2 and "does not say which classes it knows: give --classes" in err and len(err.splitlines()) == 1
    status, out, err = execute(compile.main, [*given, "--classes", classes])
    assert (status, err) == (0, "")
    names = ["0", "1", "2"] if classes == "3" else ["blue", "green", "red"]
    figures = json.loads(Path("runs/secret/results.json").read_text())
    assert figures["teacher"]["accuracy"] is None and figures["classes"] == names
    assert [row["approach"] for row in figures["rows"]] == ["balanced", "random", "mms", "entropy"]
    assert all(row["accuracy"] is None and row["retention"] is None and row["seconds"] > 0 for row in figures["rows"])
    assert any("calibrated on the sources themselves (no target image)" in note for note in figures["notes"])
    assert any(note.startswith("Data-free: ") for note in figures["notes"])
    assert "Teacher networks.py:make: accuracy unknown." in out and "| mms | networks.py:make | pool, more | " in out
    assert not Path("runs/secret/split.npz").exists() and not Path("runs/secret/scores/confidence.npz").exists()
    assert len(torch.load("runs/secret/students/mms.pt", weights_only=True)["classes"]) == 3
    # Each class is held to the best quarter of its candidates.
    scores = [np.load(f"runs/secret/scores/{name}.npz") for name in ("pool", "more")]
    predicted, mms = (np.concatenate([each[key] for each in scores]) for key in ("predicted", "mms"))
    for label, value in enumerate(json.loads(Path("runs/secret/thresholds.json").read_text())["mms"]):
        members = np.sort(mms[predicted == label])[::-1]
        assert value == members[-(-len(members) // 4) - 1]
    status, out, err = execute(distill.main, [*by_hand(given), "--approach", "balanced", "--export", "state_dict"])
    assert (status, err) == (0, "") and "export: runs/secret/students/balanced.pth" in out


def test_with_a_test_split_alone_accuracy_is_measured_and_nothing_else_is_read(painted, networks, teacher, execute, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "colours").mkdir()
    os.symlink(painted[0] / "test", tmp_path / "colours" / "test")
    given = ["--target", "colours=colours", "--sources", f"pool={painted[1]}", *teacher, "--recipe", "quick", "--epochs", "1", "--batch-size", "8",
             "--student-arch", f"{networks}:make", "--transfer-size", "60", "--approaches", "balanced,mms"]
    status, out, err = execute(compile.main, given)
    assert status == 2 and "with no training images there is --data-free" in err
    status, out, err = execute(compile.main, [*given, "--data-free"])
    assert (status, err) == (0, "")
    assert json.loads((RUN / "teacher.json").read_text())["accuracy"] > 0.9 and results()["rows"][1]["accuracy"] is not None
    assert "target: 30 test images of 3 classes: blue, green, red" in out


@pytest.mark.parametrize("argv, said", [
    (["--data-free"], "give yours as --teacher-checkpoint"),
    (["--data-free", "--teacher-checkpoint", "w.pth", "--approaches", "supervised,mms"], "leave it out of --approaches"),
    (["--data-free", "--teacher-checkpoint", "w.pth", "--calibrate", "target"], "take --calibrate sources"),
    (["--data-free", "--teacher-checkpoint", "w.pth"], "w.pth: there is no such checkpoint"),
    (["--teacher-mean", "1,2"], "--teacher-mean"), (["--teacher-std", "1,0,1"], "--teacher-std"), (["--classes", "1"], "--classes"),
    (["--classes", "nowhere.txt"], "--classes"), (["--threshold-quantile", "0"], "--threshold-quantile"), (["--threshold-quantile", "1.5"], "--threshold-quantile"),
    (["--threshold-scale", "-1"], "--threshold-scale"), (["--shortfall", "lie"], "--shortfall"), (["--image-size", "0"], "--image-size"),
    (["--teacher-arch", "inception_v3", "--teacher-size", "74"], "inception_v3 does not take 74x74 images"),
])
def test_what_contradicts_itself_is_named(argv, said, execute, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = execute(compile.main, ["--target", "digits", *argv])
    assert status == 2 and said in err and len(err.splitlines()) == 1
    assert not Path("runs").exists()


# --------------------------------------------------------------------------------------------------
# Export
# --------------------------------------------------------------------------------------------------

def pixels_of(images):
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


def test_a_student_is_a_plain_torchvision_state_dict(finished, flags, execute):
    import torchvision
    status, out, err = execute(distill.main, [*by_hand(flags), "--approach", "mms", "--export", "state_dict"])
    assert (status, err) == (0, "") and "on 30 images the student's class for 30" in out
    plain = torchvision.models.resnet18(num_classes=3)
    plain.load_state_dict(torch.load(RUN / "students/mms.pth", weights_only=True))
    images = np.load(next(Path("data/packed").glob("colours-test-32-*/images.npy")))
    expected = engine.predict(models.load(RUN / "students/mms.pt", flags[flags.index("--student-arch") + 1] if "--student-arch" in flags else None), images)
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()((pixels_of(images) - 0.5) / 0.5), expected, rtol=1e-4, atol=1e-4)


def test_a_student_is_exported_by_torch_export_for_any_batch(finished, flags, execute):
    status, out, err = execute(distill.main, [*by_hand(flags), "--approach", "mms", "--export", "torch"])
    assert (status, err) == (0, "")
    program = torch.export.load(RUN / "students/mms.pt2").module()
    images = np.load(next(Path("data/packed").glob("colours-test-32-*/images.npy")))
    expected = engine.predict(models.load(RUN / "students/mms.pt", flags[flags.index("--student-arch") + 1] if "--student-arch" in flags else None), images)
    for count in (1, 7, 30):
        torch.testing.assert_close(program(pixels_of(images[:count])), expected[:count], rtol=1e-3, atol=1e-4)


def test_a_student_is_exported_as_onnx_for_any_batch(finished, flags, execute):
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnx, onnxscript and onnxruntime are optional extras: pip install -r requirements-extra.txt")
    status, out, err = execute(distill.main, [*by_hand(flags), "--approach", "mms", "--export", "onnx"])
    assert (status, err) == (0, "") and list((RUN / "students").glob("mms.onnx*")) == [RUN / "students/mms.onnx"]
    session = onnxruntime.InferenceSession(RUN / "students/mms.onnx")
    assert json.loads(session.get_modelmeta().custom_metadata_map["classes"]) == ["blue", "green", "red"]
    images = np.load(next(Path("data/packed").glob("colours-test-32-*/images.npy")))
    expected = engine.predict(models.load(RUN / "students/mms.pt", flags[flags.index("--student-arch") + 1] if "--student-arch" in flags else None), images)
    for count in (1, 7, 30):
        found = torch.from_numpy(session.run(["logits"], {"pixels": pixels_of(images[:count]).numpy()})[0])
        torch.testing.assert_close(found, expected[:count], rtol=1e-3, atol=1e-4)


def test_a_network_that_resizes_its_input_is_exported_with_the_resize(networks, tmp_path):
    from export import export
    torch.manual_seed(0)
    classifier = models.build(f"{networks}:make", ["a", "b"], input_size=48, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7)).eval()
    images = np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), np.uint8)
    export(classifier, "torch", tmp_path / "network.pt2", images)
    torch.testing.assert_close(torch.export.load(tmp_path / "network.pt2").module()(pixels_of(images)), engine.predict(classifier, images), rtol=1e-3, atol=1e-5)


def test_an_export_that_gives_other_answers_is_not_written(networks, tmp_path, monkeypatch):
    import export
    classifier = models.build(f"{networks}:make", ["a", "b"])
    images = np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), np.uint8)
    monkeypatch.setattr(export.Standalone, "forward", lambda self, pixels: self.network(pixels))     # forgets the normalisation
    for form in ("state_dict", "torch"):
        with pytest.raises(UserError, match="gives other logits|gives? .*other logits"):
            export.export(classifier, form, tmp_path / "network", images)
    assert not (tmp_path / "network").exists()
    monkeypatch.undo()
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="--export onnx needs onnx and onnxscript and onnxruntime: pip install onnx onnxscript onnxruntime"):
        export.require_packages("onnx")
