"""What a user got wrong is answered in one line that names the thing, with exit status 2, before any work."""
import subprocess
import sys
from pathlib import Path

import pytest

import compile
import data
import distill
import run
import TeacherTrain
import transfer

REPOSITORY = Path(run.__file__).parent
SCRIPTS = {"compile.py": compile, "TeacherTrain.py": TeacherTrain, "transfer.py": transfer, "distill.py": distill}


@pytest.mark.parametrize("argv, said", [
    (["--target", "cifar11"], "cifar11"),
    (["--target", "pets=/nowhere"], "pets=/nowhere: there is no such folder"),
    (["--target", "=/nowhere"], "neither NAME nor NAME=PATH"),
    (["--target", "../x=/nowhere"], "neither NAME nor NAME=PATH"),
    (["--target", "glyphs"], "glyphs has no classes"),
    (["--target", "digits", "--sources", "glyphs,glyphs"], "twice"),
    (["--target", "digits", "--sources", "digits"], "digits is the target"),
    (["--target", "digits", "--sources", "web=/nowhere"], "web=/nowhere"),
    (["--target", "digits", "--sources", ","], "names no source"),
    (["--target", "digits", "--sources", "confidence=/nowhere"], "rename it"),
    (["--target", "digits", "--approaches", "margin"], "no approach 'margin'"),
    (["--target", "digits", "--approaches", "mms,mms"], "twice"),
    (["--target", "digits", "--approaches", "eats"], "svhn or tinyimagenet"),
    (["--target", "digits", "--recipe", "slow"], "--recipe"),
    (["--target", "digits", "--epochs", "0"], "--epochs"),
    (["--target", "digits", "--epochs", "many"], "--epochs"),
    (["--target", "digits", "--lr", "-1"], "--lr"),
    (["--target", "digits", "--lr", "nan"], "--lr"),
    (["--target", "digits", "--temperature", "0"], "--temperature"),
    (["--target", "digits", "--seed", "-1"], "--seed"),
    (["--target", "digits", "--seeds", "1,1"], "twice"),
    (["--target", "digits", "--seeds", "1,2", "--seed", "1"], "contradict"),
    (["--target", "digits", "--teacher-arch", "resnet999"], "resnet999"),
    (["--target", "digits", "--student-arch", "fasterrcnn_resnet50_fpn"], "fasterrcnn_resnet50_fpn"),
    (["--target", "digits", "--teacher-weights", "nowhere.pt"], "nowhere.pt"),
    (["--target", "digits", "--teacher-checkpoint", "nowhere.pt"], "nowhere.pt"),
    (["--target", "digits", "--transfer-size", "5"], "--transfer-size"),
    (["--target", "digits", "--device", "tpu"], "--device"),
    (["--target", "digits", "--nonsense"], "--nonsense"),
    (["--tar", "digits"], "--tar"),
])
def test_a_wrong_argument_is_named(argv, said, execute, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = execute(compile.main, argv)
    assert status == 2 and said in err and len(err.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_a_device_that_is_not_there_is_named(execute, tmp_path, monkeypatch):
    import torch
    if torch.backends.mps.is_available():
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    status, out, err = execute(compile.main, ["--target", "digits", "--device", "mps"])
    assert status == 2 and "--device mps" in err


def test_everything_that_is_missing_is_said_at_once_a_line_each(execute, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    for module in (data, compile.models):
        monkeypatch.setattr(module, "reachable", lambda urls: ", ".join(f"{url} can't be reached" for url in urls))
    status, out, err = execute(compile.main, [])
    lines = err.splitlines()
    assert status == 2 and len(lines) == 10     # eight data sets, the weights of teacher and supervised student
    for name in ("cifar10", *run.PUBLISHED_ORDER):
        record = data.DATA_SETS[name]
        line = next(line for line in lines if line.startswith(f"compile.py: {name} is missing"))
        assert all(file.name in line and url in line for file in record.files for url in file.urls)
        assert f"data/{record.layout}/" in line
    for arch, name in (("resnet34", "resnet34-b627a593.pth"), ("resnet18", "resnet18-f37072fd.pth")):
        line = next(line for line in lines if f"weights of {arch} " in line)
        assert f"https://download.pytorch.org/models/{name}" in line and str(tmp_path / "torch" / "hub" / "checkpoints" / name) in line
    assert not (tmp_path / "runs").exists()


def test_how_much_will_be_fetched_is_said_first(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "reachable", lambda urls: None)
    assert data.unavailable([("svhn", "source"), ("caltech101", "source")], tmp_path) == []
    assert capsys.readouterr().out == "to fetch: svhn, caltech101, 319 MB in all\n"


def test_defaults_follow_the_target():
    cifar10, cifar100, digits = (run.resolve({"target": name}) for name in ("cifar10", "cifar100", "digits"))
    assert cifar10.sources == ("cifar100", "stl10", "places365", "tinyimagenet", "svhn", "caltech101", "caltech256")
    assert cifar100.sources[0] == "cifar10" and "cifar100" not in cifar100.sources
    assert (cifar10.teacher_arch, cifar100.teacher_arch, cifar10.student_arch) == ("resnet34", "inception_v3", "resnet18")
    assert cifar10.approaches == run.APPROACHES and digits.approaches == ("supervised", "balanced", "random", "mms", "entropy")
    assert (cifar10.recipe, cifar10.epochs, cifar10.batch_size, cifar10.lr, cifar10.temperature) == ("reference", 20, 64, 0.1, 10.0)
    assert cifar10.student_recipe.augment == "none" and cifar10.student_recipe.schedule == "constant"
    assert (cifar10.teacher_weights, cifar10.student_weights, cifar10.supervised_weights) == ("imagenet", "none", "imagenet")
    assert run.resolve({"teacher_weights": "none"}).supervised_weights == "none"
    best = run.resolve({"recipe": "best", "teacher_weights": "none"})
    assert (best.student_weights, best.supervised_weights) == ("auto", "none")
    assert run.resolve({"recipe": "best", "student_weights": "none"}).student_weights == "none"


@pytest.mark.parametrize("argv, said", [
    (["--augment", "crop,spin"], "'crop,spin' is neither none nor some of crop,flip,mixup,cutmix"), (["--augment", "crop,crop"], "neither none nor"),
    (["--ema", "1"], "1 is not in 0 ... 1, without 1"), (["--momentum", "-0.1"], "not in 0 ... 1"), (["--weight-decay", "nan"], "not in 0 ... 1"),
    (["--steps", "0"], "0 is not a positive whole number"), (["--steps", "5", "--epochs", "5"], "--steps and --epochs contradict each other"),
    (["--schedule", "cosine"], "invalid choice"),
])
def test_a_recipe_that_can_not_be_is_refused(execute, argv, said):
    status, out, err = execute(compile.main, ["--target", "digits", *argv])
    assert status == 2 and said in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("script", ["compile.py", "data.py", "TeacherTrain.py", "mms_threshold.py", "entropy.py", "transfer.py", "distill.py", "report.py"])
def test_help_explains_every_flag(script):
    done = subprocess.run([sys.executable, str(REPOSITORY / script), "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    options = [line for line in done.stdout.split("options:")[1].splitlines() if line.startswith("  -")]
    explained = " ".join(done.stdout.split())
    assert len(options) >= 2
    for name, flag in run.FLAGS.items():
        if f"--{name.replace('_', '-')} " in done.stdout and script in SCRIPTS:
            assert flag["help"].split("(")[0].split(",")[0].strip()[:20] in explained


def test_a_script_run_by_hand_says_its_error_in_one_line_without_a_traceback(tmp_path):
    done = subprocess.run([sys.executable, str(REPOSITORY / "mms_threshold.py"), "--target", "digits"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "mms_threshold.py: runs/digits/teacher.json is missing: make it with `python TeacherTrain.py --target digits`\n"


def test_processes_that_torchrun_did_not_start_are_named(execute, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, out, err = execute(compile.main, ["--target", "digits"])
    assert status == 2 and "RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT not set: start several processes with torchrun" in err


def test_a_damaged_config_is_named(execute, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "digits").mkdir(parents=True)
    (tmp_path / "runs" / "digits" / "config.json").write_text("{")
    status, out, err = execute(TeacherTrain.main, ["--target", "digits"], "TeacherTrain.py")
    assert status == 2 and err.startswith("TeacherTrain.py: runs/digits/config.json is damaged")
