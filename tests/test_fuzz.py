"""Whatever a command line or a config.json says, it is refused in a line, or the work begins: never
a traceback. `python -m pytest tests/test_fuzz.py --tries 2000` tries more."""
import collections
import json

import pytest
import torch
from conftest import NET, ROOT
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from script_files import run_here

import data
from kd import download, packing, run, scoring
from kd.flags import FIELDS, flags_of

HOSTILE = [
    *"= , ,, =x x= a=b=c -1 0 1 2 007 1_000 1e3 1e309 nan -inf 1.5 0.5 100% -5% % 50%% none null "
    "all auto ../x ../../etc/passwd / . .. ~ /dev/null /dev/zero/x caf\u00e9 \u0663 \u00b2 \u202ea "
    "\U0001f438 \udcff %s%n {} x={0..3}.tar x={0..99999999999}.tar x={}.tar x.py x.py: .py:f "
    "x.py:f:g os.py:system timm: timm:nothing con digits cifar10 mms mms,mms eats predicted "
    "confidence digits=x 1,1 nan,nan,nan crop,crop cuda mps teacher.pt config.json -h "
    "--x".split(), "", " ", "a\nb", "a\tb", "\x1b[31m", "a\0b", "9" * 5000, "x" * 300, "x" * 5000]
FITTING = {     # values that reach later checks, where 2 and 0.1 do not
    "target": "digits cifar10 a=. a=nothing", "sources": "glyphs svhn b=. tinyimagenet,b=nothing",
    "approaches": "mms,eats all,my.py", "approach": "mms eats supervised my.py", "run_dir": "r .",
    "teacher_arch": "resnet18_cifar squeezenet1_0 my.py:make", "teacher_mean": "0.5,0.5,0.5",
    "student_arch": "resnet18_cifar my.py:make", "teacher_checkpoint": "w.pt names.txt",
    "student_weights": "none teacher auto w.pt", "teacher_weights": "none w.pt",
    "teacher_std": "0.2,0.2,0.2", "classes": "2 10 names.txt", "config": "config.json"}
VALUES = st.one_of(st.sampled_from(HOSTILE), st.sampled_from(HOSTILE), st.text(max_size=12),
                   st.integers().map(str), st.floats().map(str))
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), VALUES),
    lambda more: st.lists(more, max_size=3) | st.dictionaries(VALUES, more, max_size=3),
    max_leaves=5)


class Began(Exception):
    """The work would begin."""


def began(*args, **kwargs):
    raise Began


@st.composite
def command_lines(draw, flags):
    """Some flags, most with a value of their own kind."""
    words = []
    for name in draw(st.lists(st.sampled_from(flags), max_size=5, unique=True)):
        flag = FIELDS[name].metadata["flag"] if name in FIELDS else {}
        values = st.sampled_from(flag.get("choices") or FITTING.get(name, "2 0.1").split())
        if draw(st.integers(0, 3)) == 0:
            values = VALUES
        words.append(f"--{name.replace('_', '-')}"
                     + ("" if "action" in flag else f"={draw(values)}"))
    return words


def require_lines(script, argv, ends):
    """ends: a Counter of how they end."""
    small = [] if script == "data.py" else ["--teacher-arch=my.py:make"]      # built in no time
    try:
        done = run_here(script, *small, *argv)
    except Began:
        ends["began"] += 1
        return
    ends[done.returncode] += 1
    if done.returncode != 0 or not {"-h", "--help"} & set(argv) and script != "data.py":
        assert done.returncode == 2 and 1 <= done.stderr.count("\n") <= 20, argv


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """Where everything is that FITTING names; what would read, fetch or make data only says so."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")     # so that nothing is reached
    (tmp_path / "names.txt").write_text("a\nb\n")
    (tmp_path / "my.py").write_text((ROOT / "criteria/energy.py").read_text() + NET)
    torch.save({"weight": torch.zeros(2, 3072)}, tmp_path / "w.pt")
    monkeypatch.setattr(run, "hold", lambda folder: None)
    for place, names in ((data, ("obtain", "load_target", "load_source")), (run.Run, ["open"]),
                         (packing, ("pack", "open_pack")), (download, ["fetch_all"]),
                         (scoring, ["Scoring"])):
        for name in names:
            monkeypatch.setattr(place, name, began)
    return tmp_path


@pytest.fixture
def few(request):
    return settings(max_examples=request.config.getoption("--tries"), deadline=None,
                    derandomize=True, database=None, phases=(Phase.generate, Phase.shrink),
                    suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("script", ["compile", "TeacherTrain", "transfer", "distill", "data"])
def test_any_command_line_is_refused_in_a_line_or_begins(script, folder, few):
    names, ends = script == "data", collections.Counter()       # data.py has its names, not flags
    flags = ["data_dir", "max_bad", "pack"] if names else [*flags_of(script), "approach", "config"]

    @few
    @given(command_lines(flags), st.lists(VALUES | st.sampled_from(["svhn", "b=."]),
                                          min_size=names, max_size=1 + names))
    def check(argv, more):
        require_lines(f"{script}.py", [*argv, *more], ends)
    check()
    assert ends[2] and (ends["began"] or script == "distill"), ends     # which needs a teacher


def test_any_config_that_is_not_a_runs_is_refused_in_a_line(folder, few):
    ends = collections.Counter()

    @few
    @given(JSON | st.fixed_dictionaries({"given": JSON, "digest": JSON}))
    def check(config):
        (folder / "config.json").write_text(json.dumps(config))
        require_lines("compile.py", ["--config", "config.json"], ends)
    check()
    assert set(ends) == {2}
