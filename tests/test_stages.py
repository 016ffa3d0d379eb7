"""The stages by hand and through compile.py, on small folders of images."""
import shutil

import numpy as np
import pytest
import torch
from conftest import run_script
from PIL import Image
from script_files import given, linked, manifest, outcome, pool, ran, read, refused, taught

from kd.readers import decode
from kd.thresholds import passes

APPROACHES = ("supervised", "balanced", "random", "mms", "entropy")


def test_every_stage_by_hand_gives_what_compile_gave(flags, finished_run, run):
    ran("TeacherTrain.py", flags)
    assert "thresholds: mms, at least" in ran("mms_threshold.py", flags)
    (run.parent / "elsewhere").mkdir()
    done = run_script("entropy.py", *given("entropy.py", flags)[:-1], "../run",
                      cwd=run.parent / "elsewhere")
    assert (done.returncode, done.stderr) == (0, "")
    for approach in APPROACHES[1:]:
        ran("transfer.py", flags, "--approach", approach)
    for approach in APPROACHES:
        ran("distill.py", flags, "--approach", approach)
    expected, ended = outcome(finished_run), outcome(run)
    assert expected.keys() - ended.keys() == {"results.json"}
    assert [name for name in ended if ended[name] != expected[name]] == []


@pytest.mark.parametrize("script, absent, command", [
    ("transfer.py", "teacher.json", "python TeacherTrain.py"),
    ("distill.py", "teacher.json", "python TeacherTrain.py"),
    ("distill.py", "transfer/mms/summary.json", "python transfer.py --approach mms")])
def test_a_missing_predecessor_is_named_with_the_command_that_makes_it(
        flags, finished_run, run, script, absent, command):
    (linked(finished_run, run) / absent).unlink()
    assert refused(script, flags, "--approach", "mms") == (
        f"{script}: {run / absent} is missing. Make it with `{command} --target {flags[1]} "
        f"--run-dir {run}`.\n")


def test_another_approach_by_hand_costs_no_second_look_at_the_sources(flags, finished_run, run):
    linked(finished_run, run)
    said = ran("transfer.py", flags, "--approach", "confidence")
    said += ran("distill.py", flags, "--approach", "confidence")
    assert "scores: " not in said and read(run, "students/confidence.json")["history"]
    said = ran("compile.py", flags, "--approaches", ",".join((*APPROACHES, "confidence")))
    assert "students/entropy, students/confidence" in said and "scores: " not in said


@pytest.mark.parametrize("form, suffix, needs", [
    ("state_dict", "pth", "torch"), ("safetensors", "safetensors", "safetensors"),
    ("onnx", "onnx", "onnxscript")])
def test_a_student_is_exported(flags, finished_run, run, form, suffix, needs):
    pytest.importorskip(needs, reason=f"pip install {needs}")
    linked(finished_run, run)
    said = ran("distill.py", flags, "--approach", "mms", "--export", form)
    assert f"export: {run}/students/mms.{suffix}, " in said
    assert "On 30 images it gives the student's class for 30" in said
    assert (run / f"students/mms.{suffix}").stat().st_size > 1000


def test_the_run_folder_and_the_table_are_as_documented(finished_run):
    names = ["config.json", "split.npz", "teacher.pt", "teacher.json", "thresholds.json",
             "results.json", "results.md", "report.html", "figures/accuracy.png",
             *(f"scores/{name}.npz" for name in ("pool", "more", "confidence")),
             *(f"transfer/{approach}/{name}" for approach in APPROACHES[1:]
               for name in ("images.npy", "manifest.csv", "summary.json")),
             *(f"students/{name}.{suffix}" for name in APPROACHES for suffix in ("pt", "json"))]
    assert [name for name in names if not (finished_run / name).is_file()] == []
    assert not list(finished_run.rglob("*.part"))
    results = read(finished_run, "results.json")
    accuracy = read(finished_run, "teacher.json")["accuracy"]
    assert [results[name] for name in ("target", "recipe", "seeds", "teacher")] == [
        "colours", "quick", [0], {"arch": "net.py:make", "accuracy": accuracy}]
    assert tuple(row["approach"] for row in results["rows"]) == APPROACHES
    for row in results["rows"]:
        assert set(row) >= {
            "approach", "student", "sources", "transfer_size", "per_class", "accuracy",
            "accuracy_std", "retention", "seconds", "images_per_second"}
        assert sum(row["per_class"]) == row["transfer_size"]
        assert row["retention"] == pytest.approx(row["accuracy"] / accuracy)
        assert f"| {100 * row['accuracy']:.2f} |" in (finished_run / "results.md").read_text()


def test_a_row_of_a_manifest_is_the_image_of_that_row(finished_run, painted):
    for approach in APPROACHES[1:]:
        images = np.load(finished_run / f"transfer/{approach}/images.npy")
        rows = manifest(finished_run, approach)
        assert len(rows) == len(images) > 0
        for row, pixels in zip(rows, images, strict=True):
            file, i = Image.open(painted / row["source"] / row["file"]), int(row["index"])
            assert np.array_equal(decode(file, 32), pixels)
            scores = np.load(finished_run / f"scores/{row['source']}.npz")
            assert int(row["predicted"]) == scores["predicted"][i]
            shown = approach if approach == "entropy" else "mms"
            assert np.float32(row["score"]) == scores[shown][i]


def test_the_teacher_learns_from_its_part_of_the_training_split_alone(flags, painted, run):
    """Whatever the other images show, it is the same teacher."""
    ran("TeacherTrain.py", flags)
    colours = shutil.copytree(painted / "colours", run.parent / "colours")
    files = sorted((colours / "train").rglob("*.png"))      # in the order of the data set
    unseen = [files[i] for i in np.load(run / "split.npz")["confidence"]]
    for path in [*unseen, *(colours / "test").rglob("*.png")]:
        Image.new("RGB", (24, 28)).save(path)
    ran("TeacherTrain.py", flags, "--target", f"colours={colours}", "--run-dir",
        run.parent / "other")
    one, other = (torch.load(run.parent / name / "teacher.pt", weights_only=True)["state_dict"]
                  for name in ("run", "other"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def taken(run, approach):
    """(N,) bool, which of pool(run) a transfer set has."""
    first = len(np.load(run / "scores/pool.npz")["index"])
    rows = [int(row["index"]) + first * (row["source"] == "more")
            for row in manifest(run, approach)]
    return np.isin(np.arange(len(pool(run)["index"])), rows)


def test_threshold_and_floor_reach_the_transfer_sets_and_the_notes(painted, run):
    criteria, below = {"confidence": True, "energy": True, "cross_entropy": False}, 0
    ran("compile.py", taught(painted, run), "--run-dir", run, "--threshold", "0.9",
        "--floor", "0.5", "--approaches", ",".join(("all", *criteria)))
    scores, confidence = pool(run), np.load(run / "scores/confidence.npz")
    for name, high in criteria.items():
        thresholds, chosen = np.array(read(run, "thresholds.json")[name]), taken(run, name)
        summary = read(run, f"transfer/{name}/summary.json")
        eligible = passes(scores[name], scores["predicted"], thresholds, high)
        assert summary["bucket"] == 40 and summary["size"] == chosen.sum()
        for label, colour in enumerate(summary["classes"]):
            sure = confidence[name][confidence["predicted"] == label]
            passed = passes(sure, np.full(len(sure), label), thresholds, high).sum()
            assert passed == np.ceil(0.9 * len(sure))
            of = scores["predicted"] == label
            wanted = max(min(40, (eligible & of).sum()), min(20, of.sum()))
            assert (chosen & of).sum() == summary["per_class"][label] == wanted
            assert (chosen & of & ~eligible).sum() == summary["below_threshold"].get(colour, 0)
        below += sum(summary["below_threshold"].values())
    assert below and taken(run, "all").all()
    notes = " ".join(read(run, "results.json")["notes"])
    assert "--threshold 0.9 --calibrate target --floor 0.5" in notes
    assert "Images below the threshold that --floor let in for " in notes


def test_the_best_are_taken_and_one_bucket_may_hold_all_classes(painted, run):
    ran("compile.py", taught(painted, run), "--run-dir", run, "--approaches", "balanced,mms",
        "--fill", "best", "--no-balance", "--transfer-size", "30", "--threshold", "1")
    scores, chosen = pool(run), taken(run, "mms")
    eligible = passes(scores["mms"], scores["predicted"],
                      np.array(read(run, "thresholds.json")["mms"]), True)
    assert chosen.sum() == min(30, eligible.sum()) and not (chosen & ~eligible).any()
    assert (scores["mms"][eligible & ~chosen] <= scores["mms"][chosen].min()).all()
    summary = read(run, "transfer/balanced/summary.json")
    assert summary["size"] == 30 and max(summary["per_class"]) > 10 and not summary["shortfall"]
    assert "--fill best --no-balance." in " ".join(read(run, "results.json")["notes"])


def test_a_trial_run_uses_few_images_of_everything(flags, run):
    said = ran("compile.py", flags, "--approaches", "balanced", "--limit", "24")
    assert "24 training images and 24 test images, 3 classes" in said
    # Evenly spaced, and named as images of the whole data set.
    index = np.load(run / "scores/pool.npz")["index"]
    assert index.tolist() == np.linspace(0, 119, 24).round().tolist()
    assert read(run, "results.json")["notes"][0] == (
        "A trial run with at most 24 images of each data set.")


def test_several_seeds_are_repeated_and_averaged(flags, finished_run, run):
    ran("compile.py", flags, "--approaches", "balanced", "--seeds", "0,1")
    assert (run / "seed-0/students/balanced.pt").read_bytes() == (
        finished_run / "students/balanced.pt").read_bytes()
    splits = [np.load(run / f"seed-{seed}/split.npz")["confidence"] for seed in (0, 1)]
    assert not np.array_equal(*splits) and read(run, "results.json")["seeds"] == [0, 1]
    each = [read(run, f"seed-{seed}/students/balanced.json")["accuracy"] for seed in (0, 1)]
    [row] = read(run, "results.json")["rows"]
    assert row["accuracy"] == pytest.approx(np.mean(each))
    assert row["accuracy_std"] == pytest.approx(np.std(each, ddof=1))
