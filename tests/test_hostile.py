"""What comes from a stranger, or from code of the user's own: it is told in one line, or it works. Nothing runs that the command line does not name,
and nothing is written outside the folders that it names."""
import io
import json
import math
import os
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import compile
import data
import distill
import files
import layouts
import models
import packing
import record
import report
import shards
import transfer
from conftest import paint
from files import UserError

RUN = Path("runs/colours")
CLASSES = ["red", "green", "blue"]


def one_line(executed, said, status=2):
    """Asserts that a command ended in one line that says so, and returns what it printed."""
    ended, out, err = executed
    assert ended == status and err.count("\n") == 1 and said in err, (ended, err)
    return out


def everything_in(folder):
    return {path.relative_to(folder).as_posix() for path in Path(folder).rglob("*")}


# --------------------------------------------------------------------------------------------------
# Checkpoints
# --------------------------------------------------------------------------------------------------

def ours(**changed):
    network = models.build("squeezenet1_0", CLASSES, input_size=32)
    return {"arch": "squeezenet1_0", "classes": CLASSES, "input_size": 32, "mean": [0.5] * 3, "std": [0.5] * 3, "state_dict": network.network.state_dict()} | changed


def with_weight(change):
    """The state dict of a SqueezeNet in which one tensor has become another."""
    state = ours()["state_dict"]
    state["features.0.bias"] = change(state["features.0.bias"])
    return state


def marked(thing, **attributes):
    for name, value in attributes.items():
        setattr(thing, name, value)
    return thing


@pytest.mark.parametrize("start", ["none", "teacher"])
def test_code_that_only_a_checkpoint_names_does_not_run(flags, execute, tmp_path, start):
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\ndef make(classes): pass\n")
    torch.save(ours(arch=f"{tmp_path}/evil.py:make"), "given.pt")
    one_line(execute(compile.main, [*flags, "--teacher-checkpoint", "given.pt", "--student-weights", start]), "code runs only where the command line names it")
    assert not (tmp_path / "ran").exists() and not RUN.exists()


@pytest.mark.parametrize("content, said", [
    (lambda: ours(arch=5), "arch is not what"), (lambda: ours(classes=[True, 1, 2]), "classes is not what"), (lambda: ours(classes=[-1, 0, 1]), "classes is not what"), (lambda: ours(classes=[7, 8, 9]), "knows 3 classes (7, 8, 9, ...)"),
    (lambda: ours(mean=[10 ** 400] * 3), "mean is not what"), (lambda: ours(input_size=True), "input_size is not what"), (lambda: ours(state_dict={5: torch.zeros(1)}), "state_dict is not what"),
    (lambda: {"arch": "resnet9", "model": {"weight": torch.zeros(1)}}, "does not fit squeezenet1_0"),
    (lambda: with_weight(lambda value: torch.nested.nested_tensor([value])), "features.0.bias holds no dense real numbers"), (lambda: with_weight(torch.Tensor.to_sparse), "no dense real numbers"),
    (lambda: with_weight(lambda value: value.to(torch.float8_e4m3fn)), "no dense real numbers"), (lambda: with_weight(lambda value: value.to("meta")), "no dense real numbers"),
    (lambda: with_weight(lambda value: value.to(torch.complex64)), "no dense real numbers"), (lambda: with_weight(lambda value: value * math.nan), "features.0.bias holds NaN or infinity"),
])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_a_checkpoint_that_can_not_be_is_one_line(tmp_path, content, said):
    torch.save(content(), tmp_path / "given.pt")
    with pytest.raises(UserError, match=re.escape(said)) as raised:
        models.load_teacher(tmp_path / "given.pt", "squeezenet1_0", CLASSES)
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("disguised", [
    lambda: marked(with_weight(lambda value: value), _metadata="x"), lambda: marked(with_weight(lambda value: value), _metadata={"classifier": {"version": "x"}}), lambda: marked(with_weight(lambda value: value), keys=5),
    lambda: with_weight(lambda value: marked(nn.Parameter(value), is_complex=5)), lambda: with_weight(lambda value: marked(nn.Parameter(value), detach=5)), lambda: with_weight(lambda value: value.double()),
])
def test_attributes_that_a_file_gives_to_its_tensors_do_not_stand_in_the_way(tmp_path, disguised):
    torch.manual_seed(0)
    expected = ours()["state_dict"]
    torch.manual_seed(0)
    torch.save(disguised(), tmp_path / "given.pt")
    loaded = models.load_teacher(tmp_path / "given.pt", "squeezenet1_0", CLASSES)
    assert all(torch.equal(value, loaded.network.state_dict()[name]) for name, value in expected.items())


# --------------------------------------------------------------------------------------------------
# Run folders
# --------------------------------------------------------------------------------------------------

def seal():
    """Gives a changed run folder a ledger, as its maker would."""
    (RUN / files.LEDGER).unlink()
    files.open_ledger(RUN, [path for path in RUN.rglob("*") if path.is_file()])


def configured(**changed):
    path = RUN / "config.json"
    content = json.loads(path.read_text()) | changed
    path.unlink()
    path.write_text(json.dumps(content))
    seal()


@pytest.mark.parametrize("changed, said", [
    ({"recipe": "nope"}, "argument --recipe"), ({"image_size": 0}, "argument --image-size"), ({"limit": -5}, "argument --limit"), ({"epochs": -1}, "argument --epochs"), ({"ema": 1.5}, "argument --ema"),
    ({"lr": 10 ** 400}, "argument --lr"), ({"schedule": "zzz"}, "argument --schedule"), ({"augment": "zzz"}, "argument --augment"), ({"fill": "zzz"}, "argument --fill"), ({"seed": -1}, "argument --seed"),
    ({"momentum": 5.0}, "argument --momentum"), ({"teacher_mean": [1]}, "argument --teacher-mean"), ({"threshold_scale": math.nan}, "argument --threshold-scale"), ({"temperature": 1e200}, "argument --temperature"),
    ({"sources": ["../../escaped=/"]}, "argument --sources"), ({"target": "../x=y"}, "argument --target"), ({"run_dir": ""}, "argument --run-dir"),
])
def test_settings_that_no_command_line_gives_are_refused_in_a_run_folder_too(flags, finished, execute, changed, said):
    configured(**changed)
    for main, argv in ((distill.main, ["--target", flags[1], "--approach", "mms"]), (compile.main, flags), (report.main, [str(RUN)])):
        one_line(execute(main, argv), f"runs/colours/config.json is damaged: {said}")


def test_names_in_a_strangers_run_folder_do_not_lead_out_of_it(flags, finished, execute, tmp_path):
    limits = json.loads((RUN / "thresholds.json").read_text())
    (RUN / "thresholds.json").unlink()
    (RUN / "thresholds.json").write_text(json.dumps(limits | {"x/../../../../escaped": limits["mms"]}))
    seal()
    before = everything_in(tmp_path)
    one_line(execute(report.main, [str(RUN)]), "x/../../../../escaped is not one number a class")
    assert {name for name in everything_in(tmp_path) - before if not name.startswith("runs/colours/figures")} == set()


def test_to_look_at_a_run_fetches_and_packs_nothing(flags, finished, execute, monkeypatch, tmp_path):
    monkeypatch.setattr(data, "fetch", None)
    shutil.rmtree("data")
    configured(sources=["cifar100", "pool=" + json.loads((RUN / "config.json").read_text())["sources"][0].partition("=")[2]], data_dir="elsewhere")
    for name in ("transfer", "students", "scores/more.npz", "results.json", "results.md", "report.html"):
        shutil.rmtree(RUN / name) if (RUN / name).is_dir() else (RUN / name).unlink(missing_ok=True)
    seal()
    assert execute(report.main, [str(RUN)])[::2] == (0, "") and not Path("elsewhere").exists() and not Path("data").exists()
    with pytest.raises(UserError, match="cifar100 is not in elsewhere, ready to be read"):
        data.source_at_hand(record.Record(RUN).settings, "cifar100")
    with pytest.raises(UserError, match="pool is not packed in elsewhere"):
        data.source_at_hand(record.Record(RUN).settings, record.Record(RUN).settings.sources[1])


# --------------------------------------------------------------------------------------------------
# Code of the user's
# --------------------------------------------------------------------------------------------------

CRITERION = "KEEP = {keep}\nimport torch, numpy\ndef score(logits, weight):\n    {score}\ndef threshold(scores, predicted, classes):\n    {threshold}\n"


def criterion(path, keep="'>='", score="return logits[:, 0]", threshold="return [0.0] * classes", before=""):
    Path(path).write_text(before + CRITERION.format(keep=keep, score=score, threshold=threshold))
    return f"./{path}"


@pytest.mark.parametrize("how, said", [
    (dict(before="import sys; sys.exit(0)\n"), "can't be imported (SystemExit: 0)"), (dict(score="raise SystemExit(0)"), "score raised SystemExit: 0"), (dict(threshold="raise SystemExit"), "threshold raised SystemExit"),
    (dict(before="raise KeyboardInterrupt\n"), "can't be imported (KeyboardInterrupt"), (dict(score="raise GeneratorExit"), "score raised GeneratorExit"),
    (dict(score="return logits[:, 0].to('meta')"), "score gives a Tensor"), (dict(score="return logits[:, 0].to_sparse()"), "score gives a Tensor"), (dict(score="return logits[:, 0].to(torch.complex64)"), "score gives a Tensor"),
    (dict(threshold="return [10 ** 400] * classes"), "threshold gives a list"), (dict(threshold="return torch.zeros(classes, requires_grad=True)"), "threshold gives a Tensor"),
    (dict(threshold="return numpy.zeros(classes, complex)"), "threshold gives a ndarray"), (dict(keep="__import__('numpy').array(['>='])"), "it lacks KEEP"), (dict(keep="['>=']"), "it lacks KEEP"),
    (dict(score="raise type('Mute', (Exception,), {'__str__': lambda self: 1 / 0})"), "score raised Mute: Mute"), (dict(score="error = ValueError('low'); error.strerror = 5; raise error"), "score raised ValueError: low"),
])
def test_whatever_a_criterion_does_is_one_line(flags, finished, execute, how, said):
    one_line(execute(transfer.main, ["--target", flags[1], "--approach", criterion("mine.py", **how)]), said)


def test_a_criterion_that_works_in_place_changes_no_other_score(flags, finished, execute):
    given = criterion("mine.py", score="weight.div_(2); return logits.exp_()[:, 0]", threshold="scores.sort(); predicted[:] = 0; return [scores[0]] * classes")
    before = dict(np.load(RUN / "scores/pool.npz"))
    for path in (RUN / "scores").iterdir():
        path.unlink()
    shutil.rmtree(RUN / "transfer/mms")
    assert execute(transfer.main, ["--target", flags[1], "--approach", given])[::2] == (0, "")
    after = dict(np.load(RUN / "scores/pool.npz"))
    assert (after["mine"] > 0).all() and not (np.diff(after["mine"]) > 0).all()
    assert all(np.array_equal(before[name], after[name]) for name in ("predicted", *transfer.CRITERIA))


@pytest.mark.parametrize("name", ["...py", "..py", ".py", "x.py.py", f"{'x' * 200}.py", "a\tb.py"])
def test_a_criterion_whose_name_can_not_be_that_of_a_row_is_refused(flags, execute, name):
    criterion(name)
    one_line(execute(compile.main, [*flags, "--approaches", f"./{name}"]), "can't be the name of an approach: rename the file")
    assert not RUN.exists()


NETWORKS = """
import sys, torch
from torch import nn
class Net(nn.Module):
    def __init__(self, count):
        super().__init__()
        self.all = nn.Sequential(nn.Conv2d(3, 4, 3, stride=4), nn.Flatten(), nn.Linear(256, count))
    def forward(self, images):
        return self.all(images)
class Mask(Net):
    def __init__(self, count):
        super().__init__(count)
        self.register_buffer("mask", torch.full((4, 4), -torch.inf).triu(1))
class Exit(Net):
    def forward(self, images):
        sys.exit(0)
class Extra(Net):
    def get_extra_state(self):
        return {"a": 1}
    def set_extra_state(self, state):
        pass
class TrainDict(Net):
    def forward(self, images):
        return {"out": self.all(images)} if self.training else self.all(images)
class TrainRaise(Net):
    def forward(self, images):
        if self.training:
            raise RuntimeError("not yet")
        return self.all(images)
class Whole(Net):
    def forward(self, images):
        return self.all(images).long()
class Complex(Net):
    def forward(self, images):
        return self.all(images).to(torch.complex64)
class Fixed(Net):
    def forward(self, images):
        return self.all(images).view(2, -1)
class Keeps(Net):
    def forward(self, images):
        self.seen = self.all(images)
        return self.seen
class Standard(Net):
    def forward(self, images):
        return self.all((images - images.mean((1, 2, 3), keepdim=True)) / images.std((1, 2, 3), keepdim=True))
class Nan(Net):
    def forward(self, images):
        return self.all(images) * torch.nan
def frozen(count):
    return Net(count).requires_grad_(False)
"""


@pytest.mark.parametrize("factory, said", [
    ("Exit", "does not take 32x32 images: 0"), ("Extra", "can't be saved as plain tensors: network._extra_state in its state_dict is no tensor"), ("TrainDict", "gives a dict in train mode"),
    ("TrainRaise", "can't be trained: RuntimeError: not yet"), ("frozen", "can't be trained: none of its weights takes a gradient"), ("Whole", "logits of torch.int64"), ("Complex", "logits of torch.complex64"),
    ("Fixed", "does not take 32x32 images: shape"), ("Nan", "logits that are NaN or infinite"),
])
@pytest.mark.parametrize("role", ["teacher", "student"])
def test_a_network_that_can_not_be_trained_is_told_before_anything_is(flags, execute, factory, said, role):
    Path("nets.py").write_text(NETWORKS)
    flags = [*flags, "--approaches", "balanced", "--mms-plain"]
    if role == "teacher":
        flags[flags.index("--teacher-arch") + 1] = f"nets.py:{factory}"
    else:
        flags += ["--student-arch", f"nets.py:{factory}"]
    one_line(execute(compile.main, flags), said)
    assert not (RUN / "teacher.pt").exists()


@pytest.mark.parametrize("factory", ["Mask", "Keeps", "Standard"])
def test_a_network_with_infinity_in_a_mask_or_a_tensor_that_it_keeps_or_that_divides_by_contrast_is_welcome(flags, execute, factory):
    Path("nets.py").write_text(NETWORKS)
    flags[flags.index("--teacher-arch") + 1] = f"nets.py:{factory}"
    assert execute(compile.main, [*flags, "--approaches", "balanced", "--student-arch", f"nets.py:{factory}", "--ema", "0.9"])[::2] == (0, "")


@pytest.mark.parametrize("arch", ["resnet18", "mnasnet0_5", "googlenet", "densenet121"])
@pytest.mark.parametrize("copied", [True, False])
def test_a_look_at_how_a_network_trains_leaves_it_as_it_was(monkeypatch, arch, copied):
    if not copied:
        monkeypatch.setattr(models.copy, "deepcopy", None)
    torch.manual_seed(0)
    network = models.build(arch, CLASSES).eval()
    before, numbers = {name: value.clone() for name, value in network.state_dict().items()}, torch.random.get_rng_state()
    models.require_trainable(network)
    assert not network.training and torch.equal(torch.random.get_rng_state(), numbers)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


# --------------------------------------------------------------------------------------------------
# Numbers, shards, layouts, names
# --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("more, said", [
    (["--temperature", "1e200"], "argument --temperature"), (["--transfer-size", "1000000000000"], "more than 100,000,000 images"), (["--epochs", "1" + "0" * 400], "argument --epochs: more than 1,000,000,000,000"),
    (["--sources", "x=/tmp/{0..3.tar"], "no pattern of shards"), (["--sources", "x=/tmp/{0..99999999999}.tar"], "more than 1,000,000 shards"), (["--sources", f"x=/tmp/{{0..{'9' * 5000}}}.tar"], "no pattern of shards"),
    (["--sources", "a\nb=."], "neither NAME nor NAME=PATH"), (["--sources", f"{'x' * 300}=."], "neither NAME nor NAME=PATH"),
])
def test_numbers_patterns_and_names_that_can_not_be_are_refused_before_any_work(flags, execute, more, said):
    one_line(execute(compile.main, [*flags, *more]), said)
    assert not RUN.exists()


def test_a_threshold_that_its_scale_makes_infinite_is_one_line(flags, finished, execute):
    one_line(execute(compile.main, [*flags, "--threshold-scale", "1.7e308", "--restart-from", "scores"]), "is inf, which no image or every image passes")


def test_a_report_where_a_file_lies_is_one_line(finished, execute):
    Path("taken").write_text("mine")
    one_line(execute(report.main, [str(RUN), str(RUN), "--out", "taken"]), "taken")
    assert Path("taken").read_text() == "mine"


def shard_of(path, members):
    """A tar of [(name, content or a size that it only claims, PAX headers)]."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as shard:
        for name, content, headers in members:
            member = tarfile.TarInfo(name)
            member.size, member.pax_headers = len(content), headers
            shard.addfile(member, io.BytesIO(content))


def test_a_name_with_a_line_end_stays_one_row_of_the_manifest(flags, execute, painted, tmp_path):
    shutil.copytree(painted[1], "odd")
    next(Path("odd").rglob("*.png")).rename("odd/a\rb.png")
    flags[flags.index("--sources") + 1] = "pool=odd"
    for _ in range(2):
        status, out, err = execute(compile.main, [*flags, "--approaches", "all"])
        assert (status, err) == (0, "") and "damaged" not in out
    assert "a\rb.png" in record.Record(RUN).selected("all").files


def test_own_criteria_may_lie_in_a_folder_with_a_comma(flags, execute, monkeypatch, tmp_path):
    Path("a,b").mkdir()
    monkeypatch.chdir("a,b")
    given = [*flags, "--approaches", ",".join(criterion(name) for name in ("one.py", "two.py"))]
    assert [execute(compile.main, given)[::2] for _ in range(2)] == [(0, "")] * 2
    configured(criteria={"../x": "y.py"})
    one_line(execute(report.main, [str(RUN)]), "config.json is damaged: criteria can't be ../x")


def png():
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, "PNG")
    return file.getvalue()


def test_members_with_holes_or_of_absurd_sizes_are_left_out_of_a_shard_or_end_it(tmp_path, monkeypatch):
    pytest.importorskip("braceexpand", reason="braceexpand is an optional extra: pip install -r requirements-extra.txt")
    monkeypatch.setattr(shards, "LARGEST_MEMBER", 1000)
    shard_of(tmp_path / "0.tar", [("a.png", png(), {}), ("hole.png", b"12345678", {"GNU.sparse.map": "0,8", "GNU.sparse.size": str(2 ** 40)}), ("large.png", b"x" * 1001, {}), ("b.png", png(), {})])
    shard, = shards.open_shards("pool", str(tmp_path / "0.tar"), 32, None).read(0, 1)
    assert shard.members == ["a.png", "b.png"] and shard.numbers == [0, 3] and [name for name, _ in shard.bad] == ["hole.png", "large.png"]
    for headers in ({"GNU.sparse.map": "x,y"}, {"GNU.sparse.map": "0,8", "GNU.sparse.size": "zz"}):
        shard_of(tmp_path / "0.tar", [("a.png", b"12345678", headers)])
        with pytest.raises(UserError, match="0.tar is damaged or can't be read"):
            list(shards.open_shards("pool", str(tmp_path / "0.tar"), 32, None).read(0, 1))


@pytest.mark.parametrize("labels", [[3], [-1], [10 ** 30]])
def test_labels_outside_their_classes_are_told_before_anything_is_trained(tmp_path, labels):
    def broken(folder, split):
        return packing.Images(1, lambda i: Image.new("RGB", (8, 8)), "made", np.asarray(labels, np.int64), CLASSES)
    with pytest.raises(UserError, match="is incomplete or damaged"):
        data._read_layout(data.DataSet("odd", broken, 32, "none"), tmp_path, "train")


def test_classes_and_sources_of_any_name_are_drawn_and_tabled(execute, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng, names = np.random.default_rng(0), ["a$\\frac$b", os.fsdecode(b"\xff\xfe"), "x^$ | y"]
    for split, count in (("train", 30), ("test", 10)):
        for name, colour in zip(names, ((200, 40, 40), (40, 200, 40), (40, 40, 200))):
            for i in range(count):
                paint(tmp_path / "odd" / split / name / f"{i}.png", colour, rng)
    for i in range(60):
        paint(tmp_path / "pool" / f"{i}.png", rng.integers(0, 256, 3), rng)
    status, out, err = execute(compile.main, ["--target", "odd=odd", "--sources", "a|b $x^$=pool", "--teacher-weights", "none", "--teacher-arch", "resnet18", "--recipe", "quick", "--teacher-epochs", "6",
                                              "--epochs", "2", "--batch-size", "16", "--device", "cpu", "--approaches", "balanced,mms"])
    assert (status, err) == (0, "") and Path("runs/odd/report.html").exists()
    table = [line for line in Path("runs/odd/results.md").read_text(encoding="utf-8").splitlines() if line.startswith("| balanced")][0]
    assert "a\\|b $x^$" in table and len(re.findall(r"(?<!\\)\|", table)) == 10
    assert report.table_of(json.loads(Path("runs/odd/results.json").read_text()))[1][0][2] == "a|b $x^$"
    assert record.Record("runs/odd").classes == sorted(["a$\\frac$b", "\\udcff\\udcfe", "x^$ | y"], key=lambda name: name.replace("\\udcff", "\udcff"))
