"""Whatever the command line and config.json say, it is one line and status 2, or the work begins: never a traceback.

    python -m pytest tests/test_fuzz.py --tries 2000
"""
import collections
import contextlib
import dataclasses
import io
import json
import sys

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings, strategies as st

import compile
import data
import distill
import files
import models
import run
import TeacherTrain
import transfer

HOSTILE = ["", " ", ",", ",,", "=", "=x", "x=", "a=b=c", "-1", "0", "1", "2", "3", "007", "1_000", "1e3", "1e309", "-1e309", "nan", "inf", "-inf", "1.5", "0.5", "100%", "-5%", "%", "50%%",
           "9" * 30, "9" * 5000, "\u0663", "\u00b2", "none", "None", "null", "true", "all", "auto", "teacher", "../x", "../../etc/passwd", "/", ".", "..", "~", "/dev/null", "/dev/zero/x", "/proc/self/mem",
           "x" * 300, "x" * 5000, "a\nb", "a\tb", "\x1b[31m", "caf\u00e9", "\U0001f438", "\udcff", "\u202eabc", "%s%n", "{}", "{0..99999999999}.tar", "x={0..3}.tar", "x={}.tar", "x=.tar",
           "__class__", "x.py", "x.py:", ".py:f", "x.py:f:g", "os.py:system", "timm:", "timm:nothing", "nothing", "resnet18", "resnet34_cifar", "con", "digits", "cifar10", "cifar100", "mms", "mms,mms",
           "mms,random", "supervised", "eats", "predicted", "confidence", "glyphs", "photos", "noise", "glyphs,photos", "digits=x", "1,2", "1,1", "0.5,0.5,0.5", "0,0,0", "1,2,3", "nan,nan,nan",
           "crop", "crop,flip", "crop,crop", "mixup,cutmix", "quick", "best", "reference", "cpu", "cuda", "mps", "first", "best", "target", "sources", "teacher.pt", "config.json", "--", "-h", "--x"]
FITTING = {     # of the flags that take more than their choices; with these the later checks are reached
    "target": ["digits", "cifar10", "cifar100", "a=.", "a=nothing"], "sources": ["glyphs", "glyphs,photos", "svhn", "b=.", "tinyimagenet,b=."],
    "approaches": ["mms", "mms,eats", "supervised", "all,random", "mine.py"], "approach": ["mms", "eats", "supervised", "all", "mine.py"], "data_dir": ["d", "."], "run_dir": ["r", "."],
    "seed": ["1"], "seeds": ["1,2", "3"], "image_size": ["16", "64"], "teacher_arch": ["resnet18", "resnet34_cifar", "inception_v3", "mine.py:make", "mine.py:score"],
    "student_arch": ["resnet18_cifar", "squeezenet1_0", "mine.py:make"], "teacher_size": ["32", "75"], "teacher_mean": ["0.5,0.5,0.5"], "teacher_std": ["0.2,0.2,0.2"],
    "teacher_weights": ["none", "imagenet", "weights.pt"], "student_weights": ["none", "imagenet", "teacher", "auto", "weights.pt"], "teacher_checkpoint": ["weights.pt", "mine.py"],
    "classes": ["2", "10", "names.txt"], "threshold_scale": ["0.5"], "threshold_quantile": ["0.5"], "transfer_size": ["100"], "temperature": ["4"], "epochs": ["2"], "teacher_epochs": ["2"],
    "teacher_lr": ["0.1"], "batch_size": ["64"], "lr": ["0.1"], "steps": ["10"], "augment": ["crop,flip", "none"], "momentum": ["0.9"], "weight_decay": ["0.0001"], "ema": ["0.99"],
    "limit": ["100"], "max_bad": ["5%"], "config": ["config.json"]}
VALUES = st.one_of(st.sampled_from(HOSTILE), st.sampled_from(HOSTILE), st.text(max_size=12), st.integers().map(str), st.floats().map(str))
JSON = st.recursive(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), VALUES), lambda more: st.one_of(st.lists(more, max_size=3), st.dictionaries(VALUES, more, max_size=3)), max_leaves=5)


OPEN = run.Run.open


class Began(Exception):
    """The work would begin."""


def began(*args, **kwargs):
    raise Began


@st.composite
def command_lines(draw, flags):
    """Some flags, most with a value of their own kind or a hostile one, and at times a word that belongs to none."""
    words = []
    for name in draw(st.lists(st.sampled_from(flags), max_size=4, unique=True)):
        how = run.FLAGS[name]
        flag = "--" + name.replace("_", "-")
        if how.get("action") == "store_true":
            words.append(flag)
            continue
        value = draw(st.sampled_from(how.get("choices") or FITTING[name]) if draw(st.integers(0, 3)) else VALUES)
        words += [f"{flag}={value}"] if draw(st.booleans()) else [flag, value]
    return words + draw(st.lists(VALUES, max_size=1)) * draw(st.booleans()) if draw(st.booleans()) else words


@st.composite
def configs(draw, whole):
    """What a config.json might hold: a true one of which some things are others, or anything."""
    if draw(st.integers(0, 9)) == 0:
        return draw(JSON)
    config = dict(whole)
    for name in draw(st.lists(st.sampled_from([*whole, "unknown", "../x", "__proto__"]), max_size=3)):
        if draw(st.booleans()):
            config[name] = draw(JSON)
        else:
            config.pop(name, None)
    return config


def said(main, argv, monkeypatch):
    """(what a script that is given `argv` ends with: its status, or "began"; what it writes to standard error)."""
    monkeypatch.setattr(sys, "argv", ["script.py", *argv])
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            run.command(main)
        except Began:
            return "began", err.getvalue()
        except SystemExit as end:
            return end.code, err.getvalue()
    return 0, err.getvalue()


def require_one_line(main, argv, monkeypatch, ends):
    """ends: a Counter of how they end."""
    ended, line = said(main, argv, monkeypatch)
    ends[ended] += 1
    assert ended in ("began", 2) or ended == 0 and (main is data.main or {"-h", "--help"} & set(argv)), (ended, line, argv)
    if ended == 2:
        assert 1 <= line.count("\n") <= 20 and line.strip() and "Traceback" not in line, (line, argv)


@pytest.fixture
def nothing_begins(monkeypatch, tmp_path):
    """A folder of its own; and whatever would read a data set, train, fetch or delete says that it would."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    (tmp_path / "names.txt").write_text("a\nb\n")
    (tmp_path / "mine.py").write_text("KEEP = '>='\ndef score(logits, weight):\n    return logits[:, 0]\ndef threshold(scores, predicted, classes):\n    return [0.0] * classes\n"
                                      "def make(classes):\n    import torch\n    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, classes))\n")
    torch.save({"weight": torch.zeros(2, 3072)}, tmp_path / "weights.pt")
    for module, name in ((compile.data, "target_of"), (compile.data, "obtain"), (TeacherTrain, "target_of"), (transfer, "target_of"), (distill, "target_of"), (data, "source_of"),
                         (transfer, "Scoring"), (run.Run, "clear"), (run.Run, "open")):
        monkeypatch.setattr(module, name, began)
    for module in (data, models):
        monkeypatch.setattr(module, "reachable", lambda urls: None)
    return monkeypatch


@pytest.fixture
def ends():
    """A Counter of what the tries of a test ended with."""
    counter = collections.Counter()
    yield counter
    print(dict(counter))
    assert counter[2]


@pytest.fixture
def few(request):
    return settings(max_examples=request.config.getoption("--tries"), deadline=None, derandomize=True, database=None, phases=(Phase.generate, Phase.shrink),
                    suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("module", [compile, TeacherTrain, transfer, distill, data])
def test_any_command_line_is_one_line_or_begins(module, nothing_begins, few, ends):
    flags = run.RUN_FLAGS if module is compile else (*run.STAGE_FLAGS, "approach", "export")

    @few
    @given(command_lines(flags))
    def check(argv):
        require_one_line(module.main, argv, nothing_begins, ends)
    check()


def test_any_config_is_one_line_or_begins(nothing_begins, few, tmp_path, ends):
    whole = json.loads(json.dumps(run.dataclasses.asdict(run.resolve(run.parse([], "x", run.RUN_FLAGS))) | run.environment()))

    @few
    @given(configs(whole))
    def check(config):
        (tmp_path / "config.json").write_text(json.dumps(config))
        require_one_line(compile.main, ["--config", "config.json"], nothing_begins, ends)
    check()


def test_any_config_repeats_the_command_line_that_it_came_from(nothing_begins, few, tmp_path):
    """But for the folder that is begun anew; code must be named again."""
    names, count = [name for name in run.RUN_FLAGS if name not in ("config", "help")], collections.Counter()

    @few
    @given(st.data())
    def check(drawn):
        argv = []
        for name in drawn.draw(st.lists(st.sampled_from(names), max_size=8, unique=True)):
            how = run.FLAGS[name]
            argv.append("--" + name.replace("_", "-") + ("" if how.get("action") == "store_true" else "=" + drawn.draw(st.sampled_from(how.get("choices") or FITTING[name]))))
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                expected = run.resolve(run.parse(argv, "x", run.RUN_FLAGS))
        except (SystemExit, files.UserError):
            return
        (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(expected) | {"restart": False, "restart_from": None, "tensorboard": False}))
        code = [word for word in argv if ".py" in word and not word.startswith("--teacher-checkpoint")]
        found = run.resolve(run.parse(["--config", "config.json", *code], "x", run.RUN_FLAGS))
        assert found == dataclasses.replace(expected, restart=False, restart_from=None, tensorboard=False), argv
        count["repeated"] += 1
    check()
    print(dict(count))
    assert count["repeated"] > 10


def test_any_bytes_in_a_run_folder_are_one_line_or_begin(nothing_begins, few, tmp_path, monkeypatch, ends):
    monkeypatch.setattr(run.Run, "open", OPEN)
    folder = tmp_path / "runs" / "digits"
    folder.mkdir(parents=True)
    kinds = st.one_of(st.binary(max_size=40), JSON.map(lambda value: json.dumps(value).encode()))

    @few
    @given(st.sampled_from(["config.json", "digests.json", "teacher.json", "thresholds.json"]), kinds, st.sampled_from([compile, transfer, distill]))
    def check(name, content, module):
        (folder / name).write_bytes(content)
        require_one_line(module.main, ["--target", "digits", "--device", "cpu"], nothing_begins, ends)
        files.let_go()
        for path in folder.iterdir():
            path.unlink()
    check()
