"""The stages by hand and through compile.py, on small folders of images."""
import shutil

import numpy as np
import pytest
import torch
from conftest import run_script
from PIL import Image
from script_files import given, linked, manifest, outcome, ran, read, refused

from kd.readers import decode

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


def test_a_student_is_exported(flags, finished_run, run):
    said = ran("distill.py", [*flags[:-1], linked(finished_run, run)], "--approach", "mms",
               "--export", "state_dict")
    assert f"export: {run}/students/mms.pth, " in said
    assert "On 30 images it gives the student's class for 30" in said
    assert (run / "students/mms.pth").stat().st_size > 1000


def test_the_run_folder_is_as_documented(finished_run):
    names = ["config.json", "split.npz", "teacher.pt", "teacher.json", "thresholds.json",
             "results.json", "results.md", "report.html", "figures/accuracy.png",
             *(f"scores/{name}.npz" for name in ("pool", "more", "confidence")),
             *(f"transfer/{approach}/{name}" for approach in APPROACHES[1:]
               for name in ("images.npy", "manifest.csv", "summary.json")),
             *(f"students/{name}.{suffix}" for name in APPROACHES for suffix in ("pt", "json"))]
    assert [name for name in names if not (finished_run / name).is_file()] == []
    assert not list(finished_run.rglob("*.part"))
    accuracy = read(finished_run, "teacher.json")["accuracy"]
    for row in read(finished_run, "results.json")["rows"]:
        assert sum(row["per_class"]) == row["transfer_size"]
        assert row["retention"] == pytest.approx(row["accuracy"] / accuracy)


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


def test_a_trial_run_uses_few_images_of_everything(flags, run):
    said = ran("compile.py", flags, "--approaches", "balanced", "--limit", "24")
    assert "24 training images and 24 test images, 3 classes" in said
    # Evenly spaced, and named as images of the whole data set.
    index = np.load(run / "scores/pool.npz")["index"]
    assert index.tolist() == np.linspace(0, 119, 24).round().tolist()
    assert read(run, "results.json")["notes"][0] == (
        "A trial run with at most 24 images of each data set.")


def test_several_seeds_have_a_run_each_and_one_table(flags, finished_run, run):
    ran("compile.py", flags, "--approaches", "balanced", "--seeds", "0,1")
    assert (run / "seed-0/students/balanced.pt").read_bytes() == (
        finished_run / "students/balanced.pt").read_bytes()
    splits = [np.load(run / f"seed-{seed}/split.npz")["confidence"] for seed in (0, 1)]
    assert not np.array_equal(*splits) and read(run, "results.json")["seeds"] == [0, 1]
