"""Settings: what a command line stands for, what it says when it is wrong, and how it is kept."""
import json
import re
import resource
import shlex
from dataclasses import asdict, replace

import pytest
from conftest import ROOT, refusal, run_script
from script_files import run_here

from kd.files import write_sealed
from kd.flags import USES, parse, repeatable
from kd.settings import APPROACHES, GROUPS, PUBLISHED_ORDER, resolve
from kd.values import AUGMENTATIONS

pytestmark = pytest.mark.quick


def settings_of(*argv):
    return resolve(parse(argv, "compile", "text"))


# what is given: what it stands for
STANDS_FOR = {
    "": dict(
        target="cifar10", sources=PUBLISHED_ORDER, run_dir="runs/cifar10", approaches=APPROACHES,
        recipe="reference", seeds=(0,), teacher_arch="resnet34", teacher_weights="imagenet",
        teacher_lr=pytest.approx(0.01), student_arch="resnet18", student_weights="none", epochs=20,
        batch_size=64, lr=0.1, temperature=10.0, augment="none", schedule="constant",
        threshold="published", fill="first", floor=0.0, calibrate="target",
        supervised_weights="imagenet"),
    "--target cifar100": dict(teacher_arch="inception_v3", run_dir="runs/cifar100",
                              sources=("cifar10", *PUBLISHED_ORDER[1:])),
    "--target digits": dict(
        recipe="quick", teacher_weights="none", sources=("noise", "photos", "glyphs"),
        approaches=("supervised", "balanced", "random", "mms", "entropy", "matched")),
    "--target pets=/data/pets --sources web=/w,svhn": dict(
        run_dir="runs/pets", recipe="reference", approaches=APPROACHES),
    "--teacher-arch net.py:make": dict(
        teacher_weights="none", supervised_weights="none", teacher_lr=0.1),
    "--teacher-weights IMAGENET1K_V1": dict(
        teacher_lr=pytest.approx(0.01), supervised_weights="imagenet"),
    "--student-arch net.py:make": dict(teacher_weights="imagenet", supervised_weights="none"),
    "--teacher-checkpoint t.pt": dict(teacher_weights="imagenet", supervised_weights="none"),
    "--data-free --teacher-checkpoint t.pt": dict(
        calibrate="sources", approaches=APPROACHES[1:], threshold=0.25, floor=0.0,
        transfer_size=50_000),
    "--recipe best": dict(
        steps=6_000, batch_size=256, student_weights="auto", threshold=0.9, floor=1.0),
    "--recipe best --epochs 3": dict(epochs=3, steps=0, temperature=4.0),
    "--recipe far": dict(
        steps=6_000, batch_size=256, schedule="onecycle", temperature=4.0, floor=1.0,
        augment="crop,flip,cutmix", student_weights="none", threshold=0.9)}


@pytest.mark.parametrize("words, expected", STANDS_FOR.items())
def test_what_is_not_given_follows_from_the_target_the_recipe_and_the_networks(words, expected):
    found = settings_of(*words.split())
    assert {name: getattr(found, name) for name in expected} == expected


@pytest.mark.parametrize("words, expected", [
    ("--recipe best", [(0.1, "muon"), (0.05, "sgd")]), ("", [(0.1, "sgd")] * 2),
    ("--recipe far", [(0.1, "muon"), (0.05, "sgd")]),
    ("--recipe best --lr 0.3", [(0.3, "muon"), (0.3, "sgd")]),
    ("--recipe best --optimizer sgd", [(0.2, "sgd"), (0.05, "sgd")])])
def test_how_best_steps_follows_from_what_a_student_starts_with(words, expected):
    made = [settings_of(*words.split()).student_recipe(start)
            for start in ("none", "teacher", "imagenet")]
    assert [(each.lr, each.optimizer) for each in made] == [*expected, expected[1]]
    without = settings_of("--recipe", "best").student_recipe("none", convolutions=False)
    assert (without.lr, without.optimizer) == (0.2, "sgd")


@pytest.mark.parametrize("flag, text, value", [
    ("--lr", "1e-3", 0.001), ("--floor", "5%", 0.05), ("--threshold", "25%", 0.25),
    ("--seeds", "3, 1", (3, 1)), ("--target", "a=/b=c", "a=/b=c"),
    ("--sources", "svhn,web=/w,hf:you/pets", ("svhn", "web=/w", "pets=hf:you/pets")),
    ("--approaches", "mms,/m/my.py", ("mms", "/m/my.py")),
    ("--teacher-mean", "0,0.5,1", (0.0, 0.5, 1.0)),
    ("--classes", "10", 10)])
def test_a_value_is_taken_as_it_is_meant(flag, text, value):
    assert parse([flag, text], "compile", "") == {flag[2:].replace("-", "_"): value}


@pytest.mark.parametrize("words, said", [
    ("--lr=0.1x", "'0.1x' is not a positive number"),
    ("--ema=1", "'1' is not a number from 0 up to, not including, 1"),
    ("--floor=101%", "'101%' is not a share from 0 to 1, as 0.05 or 5%"),
    ("--seeds/--seed=-1", "'-1' is not a whole number from 0 to 4294967295"),
    ("--threshold=0", "a threshold of 0 lets nothing pass"),
    ("--target=../x", "'../x' is neither NAME nor NAME=PATH (a comma separates data sets)"),
    ("--sources=,", "no source is given"), ("--seeds/--seed=1,1", "the same seed is given twice"),
    ("--augment=crop,spin", f"'crop,spin' is neither none nor some of {','.join(AUGMENTATIONS)}"),
    ("--teacher-std=1,1", "'1,1' is not three numbers above 0 and up to 1"),
    ("--teacher-std 0.2,0,0.2", "argument --teacher-std: '0.2,0,0.2' is not three numbers above 0"),
    ("--classes=no.txt", "'no.txt' is neither a number nor a UTF-8 file with one class per line"),
    ("--recipe=slow", "invalid choice: 'slow' (choose from 'reference', 'best', 'quick', 'far')"),
    ("--approches=mms", "unrecognized arguments: --approches=mms. Did you mean --approaches?"),
    ("digits", "unrecognized arguments: digits. Did you mean --target digits?"),
    ("--steps=5 --epochs=5", "--steps and --epochs contradict each other: give one of them"),
    ("--approaches margin", f"There is no approach margin. There are {', '.join(APPROACHES)}, "),
    ("--approaches=a/my.py,b/my.py", "the same approach is given twice"),
    ("--approaches /mms.py", "/mms.py: 'mms' can't be the name of an approach. Rename the file."),
    ("--data-free", "--data-free needs a teacher: give yours as --teacher-checkpoint FILE."),
    ("--data-free --teacher-checkpoint t.pt --approaches supervised", "supervised learns from the "
     "target's training images, which --data-free does not touch: leave it out of --approaches."),
    ("--data-free --teacher-checkpoint t.pt --calibrate target", "--calibrate target needs images "
     "of the target, which --data-free does not touch: use --calibrate sources."),
    ("--approaches eats --sources stl10", "eats needs svhn or tinyimagenet among the sources, "
     "which are stl10."),
    ("--target digits --sources matched=/data/web", "'matched' can't be the name of a source."),
    ("--target digits --sources digits", "digits is the target and can't be a source as well: take "
     "it out of --sources."),
    ("--target pets", "There is no data set pets to be a target")])     # no weights are asked for
def test_a_command_line_that_can_not_be_is_refused_in_a_sentence(words, said):
    done = run_here("compile.py", *words.replace("/--seed", "").split())
    flag = words.partition("=")[0] if "=" in words and " " not in words else ""
    about = f"argument {flag}: " if flag and "unrecognized" not in said else ""
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"compile.py: {about}{said}")


def test_a_stage_takes_one_seed():
    done = run_here("entropy.py", "--seeds", "0,1")
    assert (done.returncode, done.stderr) == (2, (
        "entropy.py: argument --seeds: a stage takes one (of several, each has a folder: --run-dir "
        "DIR/seed-N) (see --help)\n"))


@pytest.mark.parametrize("script, shown, not_shown", [
    ("compile", "config restart restart-from approaches lr fill limit seeds", "approach export"),
    ("TeacherTrain", "teacher-lr data-dir device", "sources threshold lr temperature restart"),
    ("mms_threshold", "threshold sources run-dir", "lr approach approaches"),
    ("entropy", "threshold sources run-dir", "lr approach approaches"),
    ("transfer", "approach fill threshold", "lr student-arch approaches amp wandb"),
    ("distill", "approach export lr fill restart-from amp wandb", "approaches restart"),
    ("data", "all list data-dir image-size", "target device"), ("report", "run-dir out", "target")])
def test_help_is_there_at_once_and_shows_what_the_stage_uses_in_groups(script, shown, not_shown):
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = run_script(f"{script}.py", "--help" if script in ("data", "report") else "--help-all")
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 1       # seconds
    assert (done.returncode, done.stderr) == (0, "")
    flags = re.findall("^  --([a-z-]+)", done.stdout, re.M)
    assert len(flags) == len(set(flags)) and set(shown.split()) <= set(flags)
    assert not set(not_shown.split()) & set(flags)
    assert f"\n    python {script}.py" in done.stdout
    if script == "compile":
        groups = [line[:-1] for line in done.stdout.splitlines() if line[:-1] in GROUPS]
        assert groups == list(GROUPS)
        short = re.findall("^  --([a-z-]+)", run_script("compile.py", "--help").stdout, re.M)
        assert short == "help-all target sources approaches recipe seeds run-dir".split()


def commands_of(page):
    """The words of each command in its blocks of shell, of the scripts that have settings."""
    text = page.read_text()
    for name, value in re.findall('^([A-Z])="(.*)"$', text, re.M):
        text = text.replace(f"${name}", value)
    for block in re.findall("```bash\n(.*?)```", text, re.S):
        for line in block.replace("\\\n", "").splitlines():
            words = shlex.split(line, comments=True)
            for at, word in enumerate(words):
                if word.removesuffix(".py") in ("compile", *USES) and "..." not in line:
                    yield words[at:]


@pytest.mark.parametrize("page, least", [
    ("README.md", 15), ("docs/own.md", 9), ("docs/data.md", 1), ("docs/results.md", 6),
    ("docs/runs.md", 2)])
def test_the_commands_of_the_pages_are_understood(page, least, tmp_path, monkeypatch):
    found = list(commands_of(ROOT / page))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "names.txt").write_text("x\ny\n")
    kept(tmp_path / "runs/cifar10")
    assert len(found) >= least
    for script, *argv in found:
        parse(argv, script.removesuffix(".py"), "text")


def test_the_first_page_is_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= 1300 and max(map(len, text.splitlines())) <= 90


def kept(folder, *argv):
    """The config.json of a run with this command line, as far as --config reads it."""
    given, path = parse(argv, "compile", "text"), folder / "config.json"
    settings = resolve(given)
    write_sealed(path, asdict(settings) | {"given": repeatable(settings, given)})
    return str(path)


def test_a_config_repeats_a_run_in_any_folder_and_the_command_line_has_the_last_word(
        tmp_path, monkeypatch):
    argv = ("--target a=t --sources b=s,svhn --recipe best --classes names.txt --steps 7 --floor "
            "0.5 --teacher-mean 0.1,0.2,0.3 --no-compile --ema 0.9 --seeds 3").split()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "names.txt").write_text("x, y\n\ncrane\ncrane\n")
    path = kept(tmp_path, *argv, "--run-dir", "r", "--restart")
    expected = replace(settings_of(*argv), data_dir=f"{tmp_path}/data",
                       classes=("x, y", "crane", "crane (2)"))
    monkeypatch.chdir("/")
    assert settings_of("--config", path) == expected
    assert settings_of("--config", path, "--epochs", "2", "--seed", "9", "--data-dir", "d") == (
        replace(expected, epochs=2, steps=0, seeds=(9,), data_dir="/d"))


def test_a_config_of_before_a_setting_was_there_means_what_was_done_then(tmp_path):
    path = kept(tmp_path, "--recipe", "best")
    content = json.loads((tmp_path / "config.json").read_text())
    write_sealed(path, {name: value for name, value in content.items()
                        if name not in ("optimizer", "digest")})
    assert settings_of("--config", path).optimizer == "sgd"


@pytest.mark.parametrize("flag, value", [
    ("--teacher-arch", "/n/net.py:make"), ("--student-arch", "hub:owner/nets:resnet20"),
    ("--approaches", "mms,/m/my.py"), ("--approaches", "/m/my.py,mms")])
def test_code_that_a_config_names_runs_only_where_the_command_line_names_it(flag, value, tmp_path):
    path, here = kept(tmp_path, flag, value, "--data-dir", "/d"), ("--data-dir", "/d")
    refusal(re.escape(f"{path} names code, and code runs only where the command line names it: "
                      f"add {flag}={value}."), settings_of, "--config", path)
    assert settings_of("--config", path, flag, value) == settings_of(flag, value, *here)
