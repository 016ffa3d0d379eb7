"""The stages, one by one and through compile.py, on small folders of images and real networks."""
import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import compile
import distill
import engine
import entropy
import files
import mms_threshold
import TeacherTrain
import transfer
from packing import decode

RUN = Path("runs/colours")


def threshold_main(name, module):
    return lambda argv: transfer.threshold_command(name, module.__doc__, argv)


STAGES = [(TeacherTrain.main, []), (threshold_main("mms", mms_threshold), []), (threshold_main("entropy", entropy), []),
          *((transfer.main, ["--approach", name]) for name in ("balanced", "random", "mms", "entropy")),
          *((distill.main, ["--approach", name]) for name in ("supervised", "balanced", "random", "mms", "entropy"))]


def modified(folder):
    return {path: path.stat().st_mtime_ns for path in sorted(Path(folder).rglob("*")) if path.is_file() and path.name != "config.json"}


def same_checkpoint(a, b):
    a, b = (torch.load(path, weights_only=True)["state_dict"] for path in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_stages_by_hand_give_the_numbers_of_compile(flags, finished, execute):
    hand = RUN.parent / "hand"
    for number, (main, extra) in enumerate(STAGES):
        given = flags if number == 0 else ["--target", flags[1]]        # the rest comes from the run folder
        status, out, err = execute(main, [*given, "--run-dir", str(hand), *extra])
        assert (status, err) == (0, "")
    for name in ("thresholds.json", *(f"transfer/{a}/{f}" for a in ("balanced", "random", "mms", "entropy") for f in ("manifest.csv", "images.npy", "summary.json"))):
        assert (hand / name).read_bytes() == (RUN / name).read_bytes(), name
    for name in ("teacher", "students/supervised", "students/balanced", "students/random", "students/mms", "students/entropy"):
        assert same_checkpoint(hand / f"{name}.pt", RUN / f"{name}.pt"), name
        by_hand, by_compile = (json.loads((folder / f"{name}.json").read_text()) for folder in (hand, RUN))
        assert by_hand["accuracy"] == by_compile["accuracy"]


def test_all_takes_every_image_and_the_flags_of_the_recipe_reach_the_student(flags, finished, execute, monkeypatch):
    recipes, train = [], engine.train
    monkeypatch.setattr(engine, "train", lambda *args, **kwargs: recipes.append(args[4]) or train(*args, **kwargs))
    at = flags.index("--epochs")
    changed = [*flags[:at], *flags[at + 2:], "--steps", "5", "--augment", "crop,mixup", "--schedule", "constant", "--momentum", "0.5", "--weight-decay", "0.001", "--ema", "0.9"]
    for name in ("transfer", "students"):
        shutil.rmtree(RUN / name)
    for path in RUN.glob("results.*"):
        path.unlink()
    status, out, err = execute(compile.main, [*changed, "--approaches", "supervised,all", "--transfer-size", "30"])
    assert (status, err) == (0, "") and "transfer: all, 180 images" in out and "from pool 120, more 60" in out
    supervised, distilled = recipes
    assert (distilled.steps, distilled.augment, distilled.schedule, distilled.momentum, distilled.weight_decay, distilled.ema) == (5, "crop,mixup", "constant", 0.5, 0.001, 0.9)
    assert supervised.augment == "crop"         # a mixture has no label
    summary = json.loads((RUN / "transfer/all/summary.json").read_text())
    assert summary["shortfall"] == {} and np.load(RUN / "transfer/all/images.npy").shape == (180, 32, 32, 3)
    history = json.loads((RUN / "students/all.json").read_text())["history"]
    assert len(history) == 1 and history[0]["lr"] == 0.1       # 5 of 11 batches
    status, _, err = execute(compile.main, [*changed, "--approaches", "all", "--transfer-size", "30", "--ema", "0.99"])
    assert status == 2 and "--ema 0.9, not 0.99" in err
    (RUN / "students/all.json").unlink()
    assert execute(distill.main, ["--target", flags[1], "--approach", "all"])[0] == 0 and recipes[-1] == distilled     # what is not given comes from the run folder


def test_the_run_folder_and_the_table_are_as_documented(finished):
    for name in ("config.json", "split.npz", "teacher.pt", "teacher.json", "scores/pool.npz", "scores/more.npz", "scores/confidence.npz",
                 "thresholds.json", "transfer/mms/images.npy", "transfer/mms/manifest.csv", "transfer/mms/summary.json",
                 "students/mms.pt", "students/mms.json", "results.json", "results.md"):
        assert (RUN / name).is_file(), name
    assert not list(RUN.rglob("*.part"))
    results = json.loads((RUN / "results.json").read_text())
    assert {"target", "recipe", "seeds", "teacher", "rows"} <= set(results)
    assert (results["target"], results["recipe"], results["seeds"]) == ("colours", "quick", [0])
    assert [row["approach"] for row in results["rows"]] == ["supervised", "balanced", "random", "mms", "entropy"]
    teacher = json.loads((RUN / "teacher.json").read_text())
    for row in results["rows"]:
        assert set(row) == {"approach", "student", "sources", "transfer_size", "per_class", "accuracy", "accuracy_std",
                            "retention", "seconds", "images_per_second"}
        assert sum(row["per_class"]) == row["transfer_size"]
        assert row["retention"] == pytest.approx(row["accuracy"] / teacher["accuracy"])
    assert f"{100 * results['rows'][0]['accuracy']:.2f}" in (RUN / "results.md").read_text()
    scores = np.load(RUN / "scores" / "pool.npz")
    assert {name: scores[name].dtype.kind for name in ("predicted", "mms", "entropy", "confidence")} == {
        "predicted": "i", "mms": "f", "entropy": "f", "confidence": "f"}
    assert len(scores["mms"]) == 120
    assert len(np.load(RUN / "scores" / "confidence.npz")["mms"]) == len(np.load(RUN / "split.npz")["confidence"]) == 24


def test_a_manifest_row_is_the_image_of_that_row(finished, painted):
    folders = dict(zip(("colours", "pool", "more"), painted))
    for approach in ("mms", "random", "balanced"):
        images = np.load(RUN / "transfer" / approach / "images.npy")
        rows = list(csv.DictReader(open(RUN / "transfer" / approach / "manifest.csv")))
        assert len(rows) == len(images) > 0
        scores = {name: np.load(RUN / "scores" / f"{name}.npz") for name in ("pool", "more")}
        for row, pixels in zip(rows, images):
            assert np.array_equal(decode(Image.open(folders[row["source"]] / row["file"])), pixels)
            of = scores[row["source"]]
            assert int(row["predicted"]) == of["predicted"][int(row["index"])]
            assert np.float32(row["score"]) == of["mms"][int(row["index"])]


def test_what_mms_selects_passes_the_threshold_and_nothing_eligible_is_left_out_of_an_open_bucket(finished):
    thresholds = json.loads((RUN / "thresholds.json").read_text())["mms"]
    rows = list(csv.DictReader(open(RUN / "transfer" / "mms" / "manifest.csv")))
    taken = {(row["source"], int(row["index"])) for row in rows}
    summary = json.loads((RUN / "transfer" / "mms" / "summary.json").read_text())
    assert summary["bucket"] == 120 // 3
    for source in ("pool", "more"):
        scores = np.load(RUN / "scores" / f"{source}.npz")
        for index, (label, value) in enumerate(zip(scores["predicted"], scores["mms"])):
            eligible = thresholds[label] is not None and value >= thresholds[label]
            if (source, index) in taken:
                assert eligible
            elif eligible:
                assert summary["per_class"][label] == summary["bucket"]


def test_confidence_is_the_largest_probability_and_scores_follow_from_the_logits(finished, painted):
    import models
    teacher = models.load(RUN / "teacher.pt")
    scores = np.load(RUN / "scores" / "pool.npz")
    files = sorted(str(path.relative_to(painted[1])) for path in painted[1].rglob("*.png"))
    images = np.stack([decode(Image.open(painted[1] / name)) for name in files[:8]])
    with torch.no_grad():
        logits = teacher(torch.from_numpy(images)).double()
    p = torch.softmax(logits, 1)
    assert scores["confidence"][:8] == pytest.approx(p.amax(1).numpy(), rel=1e-4)
    assert scores["entropy"][:8] == pytest.approx(-(p * p.log()).sum(1).numpy(), rel=1e-3, abs=1e-5)
    assert (scores["predicted"][:8] == logits.argmax(1).numpy()).all()


def test_a_second_run_redoes_nothing(flags, finished, execute, monkeypatch):
    before = modified(RUN / "students") | modified(RUN / "scores") | modified(RUN / "transfer")
    monkeypatch.setattr(engine, "train", None)
    monkeypatch.setattr(engine, "predict", None)
    assert execute(compile.main, flags)[0] == 0
    assert before == modified(RUN / "students") | modified(RUN / "scores") | modified(RUN / "transfer")


def test_another_approach_costs_no_second_look_at_the_sources(flags, execute):
    assert execute(compile.main, [*flags, "--approaches", "balanced"])[0] == 0
    before = modified(RUN / "scores")
    status, out, err = execute(compile.main, [*flags, "--approaches", "balanced,entropy"])
    assert status == 0 and before == modified(RUN / "scores") and (RUN / "students" / "entropy.pt").exists()


def test_a_setting_that_differs_from_the_run_folder_is_named(flags, finished, execute):
    for name, value in (("--teacher-epochs", "7"), ("--seed", "1"), ("--temperature", "2"), ("--fill", "best")):
        status, out, err = execute(compile.main, [*flags, name, value])
        assert status == 2 and name in err and len(err.splitlines()) == 1


def test_restart_begins_anew(flags, finished, execute):
    (RUN / "mine.txt").write_text("not the tool's")
    assert execute(compile.main, [*flags, "--seed", "1", "--approaches", "balanced", "--restart"])[0] == 0
    assert not (RUN / "students" / "mms.pt").exists() and (RUN / "mine.txt").exists()


@pytest.mark.parametrize("main, extra, missing, command", [
    (threshold_main("mms", mms_threshold), [], "teacher.json", "python TeacherTrain.py"),
    (transfer.main, ["--approach", "mms"], "teacher.json", "python TeacherTrain.py"),
    (distill.main, ["--approach", "mms"], "teacher.json", "python TeacherTrain.py"),
])
def test_a_missing_predecessor_is_named_with_the_command_that_makes_it(flags, execute, main, extra, missing, command):
    status, out, err = execute(main, [*flags, *extra])
    assert status == 2 and missing in err and f"`{command} --target colours=" in err and len(err.splitlines()) == 1


def test_a_missing_transfer_set_is_named_with_the_command_that_makes_it(flags, execute):
    execute(TeacherTrain.main, flags)
    status, out, err = execute(distill.main, [*flags, "--approach", "entropy"])
    assert status == 2 and "python transfer.py --approach entropy" in err


def test_the_teacher_never_trains_on_the_confidence_set(flags, execute, monkeypatch):
    trained_on = []
    train = engine.train
    monkeypatch.setattr(engine, "train", lambda classifier, images, rows, *more, **named: trained_on.append(rows) or train(classifier, images, rows, *more, **named))
    execute(TeacherTrain.main, flags)
    execute(distill.main, [*flags, "--approach", "supervised"])
    split = np.load(RUN / "split.npz")
    assert len(trained_on) == 2
    for rows in trained_on:
        assert not set(rows) & set(split["confidence"])
        assert sorted([*rows, *split["confidence"]]) == list(range(120))


def test_the_split_is_drawn_once(flags, execute):
    execute(TeacherTrain.main, flags)
    files.write_atomically(RUN / "split.npz", lambda file: np.savez(file, train=np.arange(24, 120), confidence=np.arange(24)))
    (RUN / "teacher.json").unlink()
    execute(TeacherTrain.main, flags)
    assert np.load(RUN / "split.npz")["confidence"].tolist() == list(range(24))


def test_a_class_without_threshold_is_reported_and_nothing_is_selected_for_it(flags, execute):
    execute(TeacherTrain.main, flags)
    content = torch.load(RUN / "teacher.pt", weights_only=True)
    content["state_dict"]["fc.bias"][1] = -1e4      # green is never predicted
    files.write_atomically(RUN / "teacher.pt", lambda file: torch.save(content, file))
    status, out, err = execute(compile.main, flags)
    assert status == 0
    assert json.loads((RUN / "thresholds.json").read_text())["mms"][1] is None
    summary = json.loads((RUN / "transfer" / "mms" / "summary.json").read_text())
    assert summary["per_class"][1] == 0
    assert "no threshold, so nothing is selected, for green" in out
    assert "mms: no threshold, so nothing selected, for green" in (RUN / "results.md").read_text()


def test_an_empty_transfer_set_has_no_student_and_the_table_says_so(flags, execute):
    execute(TeacherTrain.main, flags)
    execute(threshold_main("mms", mms_threshold), flags)
    thresholds = json.loads((RUN / "thresholds.json").read_text())
    files.write_json(RUN / "thresholds.json", thresholds | {"mms": [1e9] * 3})
    status, out, err = execute(compile.main, [*flags, "--approaches", "mms"])
    assert status == 0 and "too small to learn from" in out
    row = json.loads((RUN / "results.json").read_text())["rows"][0]
    assert (row["transfer_size"], row["accuracy"]) == (0, None)


def test_calibration_on_the_sources_is_said(flags, execute):
    status, out, err = execute(compile.main, [*flags, "--calibrate", "sources", "--fill", "best", "--approaches", "mms"])
    assert status == 0 and json.loads((RUN / "thresholds.json").read_text())["calibrated_on"] == "sources"
    assert "calibrated on the sources" in (RUN / "results.md").read_text()


def test_seeds_are_repeated_and_averaged(flags, execute):
    status, out, err = execute(compile.main, [*flags, "--seeds", "0,1", "--approaches", "balanced"])
    assert status == 0
    row = json.loads((RUN / "results.json").read_text())["rows"][0]
    each = [json.loads((RUN / f"seed-{seed}" / "students" / "balanced.json").read_text())["accuracy"] for seed in (0, 1)]
    assert row["accuracy"] == pytest.approx(sum(each) / 2)
    assert row["accuracy_std"] == pytest.approx(abs(each[0] - each[1]) / 2 ** 0.5)


def test_a_teacher_checkpoint_takes_the_place_of_fine_tuning(flags, execute, monkeypatch):
    execute(TeacherTrain.main, [*flags, "--run-dir", "runs/other"])
    monkeypatch.setattr(engine, "train", None)
    assert execute(TeacherTrain.main, [*flags, "--teacher-checkpoint", "runs/other/teacher.pt"])[0] == 0
    assert same_checkpoint(RUN / "teacher.pt", "runs/other/teacher.pt")


def test_a_student_learns_the_colours_from_other_images(flags, execute):
    """Most of three students: 40 images a class are few, and a class whose candidates the teacher mistakes is lost."""
    assert execute(compile.main, [*flags, "--approaches", "balanced", "--teacher-epochs", "25", "--epochs", "20", "--lr", "0.03", "--seeds", "0,1,2"])[0] == 0
    results = json.loads((RUN / "results.json").read_text())
    students = [json.loads((RUN / f"seed-{seed}/students/balanced.json").read_text())["accuracy"] for seed in range(3)]
    assert results["teacher"]["accuracy"] >= 0.9 and sorted(students)[1] >= 0.8


def test_importing_the_modules_does_nothing(tmp_path):
    repository = Path(compile.__file__).parent
    modules = sorted(path.stem for path in repository.glob("*.py"))
    assert len(modules) >= 11
    script = f"import sys; sys.path.insert(0, {str(repository)!r}); sys.argv = ['x', '--nonsense']; import {', '.join(modules)}"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "") and not list(tmp_path.iterdir())


def test_a_mistyped_flag_of_a_stage_leaves_nothing_behind(flags, execute):
    status, out, err = execute(TeacherTrain.main, [*flags, "--teacher-arch", "resnet999"])
    assert status == 2 and "resnet999" in err and not RUN.exists()


def test_a_source_without_images_is_named_before_the_teacher_trains(flags, execute, tmp_path):
    (tmp_path / "empty").mkdir()
    status, out, err = execute(compile.main, [*flags, "--sources", f"web={tmp_path / 'empty'}"])
    assert status == 2 and "no images found" in err and not RUN.exists()


@pytest.mark.parametrize("approach, said", [("supervised", "distill.py --approach supervised"), ("eats", "svhn or tinyimagenet")])
def test_an_approach_that_selects_nothing_from_these_sources_is_refused(flags, finished, execute, approach, said):
    status, out, err = execute(transfer.main, ["--target", flags[1], "--approach", approach])
    assert status == 2 and said in err and len(err.splitlines()) == 1


def test_what_another_teacher_selected_is_not_used(flags, finished, execute):
    content = torch.load(RUN / "teacher.pt", weights_only=True)
    content["state_dict"]["fc.bias"] += 1
    files.write_atomically(RUN / "teacher.pt", lambda file: torch.save(content, file))
    status, out, err = execute(compile.main, flags)
    assert status == 2 and "another teacher" in err


def test_supervised_by_hand_starts_from_the_weights_that_the_run_was_made_with(flags):
    from run import Run, open_stage, resolve
    run = Run(resolve({"target": flags[1], "teacher_weights": "imagenet"}))
    run.open(torch.device("cpu"))
    for given in ([], ["--teacher-weights", "imagenet"]):
        assert open_stage(["--target", flags[1], *given], "A stage.")[0].supervised_weights == "imagenet"
    assert open_stage(["--target", flags[1], "--teacher-weights", "none"], "A stage.")[0].supervised_weights == "none"
    assert open_stage(["--target", flags[1], "--student-weights", "none"], "A stage.")[0].supervised_weights == "none"


def test_the_table_says_how_many_images_could_not_be_read(painted, flags, execute, tmp_path):
    odd = tmp_path / "odd"
    odd.mkdir()
    (odd / "more").symlink_to(painted[1], target_is_directory=True)
    (odd / "broken.png").write_bytes(b"")       # one of 121: less than one in a hundred
    status, out, _ = execute(compile.main, [*flags, "--sources", f"odd={odd}", "--approaches", "balanced"])
    assert status == 0 and "odd: 1 of 121 images can't be read and are left out, see " in out
    line = "Images that can't be read are left out: odd 1."
    assert line in out and line in json.loads((RUN / "results.json").read_text())["notes"]
    assert f"- {line}" in (RUN / "results.md").read_text().splitlines()
    assert "broken.png" not in (RUN / "transfer" / "balanced" / "manifest.csv").read_text()


def test_too_many_images_that_can_not_be_read_stop_the_run_unless_they_may(painted, flags, execute, tmp_path):
    odd = tmp_path / "odd"
    odd.mkdir()
    (odd / "more").symlink_to(painted[1], target_is_directory=True)
    for number in range(6):
        (odd / f"broken{number}.png").write_bytes(b"")
    argv = [*flags, "--sources", f"odd={odd}", "--approaches", "balanced"]
    status, _, err = execute(compile.main, argv)
    assert status == 2 and "odd: 6 of 126 images can't be read, more than 0.01 of all" in err and "bad.txt" in err
    status, out, _ = execute(compile.main, [*argv, "--max-bad", "5%"])
    assert status == 0 and "- Images that can't be read are left out: odd 6." in out


def test_students_start_from_the_teacher_where_they_are_asked_to_and_can(flags, finished, execute, monkeypatch):
    starts, train = {}, engine.train

    def noted(student, *args, **kwargs):
        starts[kwargs["label"]] = {name: value.clone() for name, value in student.network.state_dict().items()}
        return train(student, *args, **kwargs)
    monkeypatch.setattr(engine, "train", noted)

    def forget_students():
        shutil.rmtree(RUN / "students")
        for path in RUN.glob("results.*"):
            path.unlink()
    forget_students()
    status, out, err = execute(compile.main, [*flags, "--approaches", "supervised,random", "--student-weights", "teacher", "--lr", "0.001"])
    assert (status, err) == (0, "") and "student: random, resnet18, from the teacher's weights, " in out
    figures = {name: json.loads((RUN / "students" / f"{name}.json").read_text())["weights"] for name in ("supervised", "random")}
    assert figures == {"supervised": "none", "random": "teacher"}
    teacher = torch.load(RUN / "teacher.pt", weights_only=True)["state_dict"]
    assert all(torch.equal(value, teacher[name]) for name, value in starts["student random"].items())
    assert not torch.equal(starts["student supervised"]["conv1.weight"], teacher["conv1.weight"])
    assert "the other students start from their teacher's weights" in (RUN / "results.md").read_text()
    forget_students()
    status, out, err = execute(compile.main, [*flags, "--approaches", "random", "--student-weights", "auto", "--student-arch", "mobilenet_v3_small"])
    assert (status, err) == (0, "") and json.loads((RUN / "students" / "random.json").read_text())["weights"] == "none"


def test_a_student_that_can_not_start_from_the_teacher_is_refused_before_any_work(flags, execute):
    status, out, err = execute(compile.main, [*flags, "--student-weights", "teacher", "--student-arch", "mobilenet_v3_small"])
    assert status == 2 and err.startswith("compile.py: mobilenet_v3_small can't start from its teacher's weights: ") and len(err.splitlines()) == 1
    assert not Path("runs").exists()
