"""The stages by hand and through compile.py, on small folders of images."""
import shutil

import numpy as np
import pytest
from conftest import run_script, small_run
from PIL import Image
from run_files import copied, given, manifest, outcome, read, run_stage

import compile
import data
import distill
import TeacherTrain
import transfer
from kd.decoding import decode
from kd.files import UserError
from kd.thresholds import passes

APPROACHES = ("supervised", "balanced", "random", "mms", "entropy")


@pytest.fixture
def flags(painted, tmp_path):
    """Those of finished_run, for a run folder of this test's own."""
    return [*small_run(painted), "--run-dir", str(tmp_path / "run")]


@pytest.fixture(scope="session")
def taught(painted, tmp_path_factory):
    """The run folder of a teacher that knows all three colours, and of nothing else."""
    folder = tmp_path_factory.mktemp("taught") / "run"
    run_stage(TeacherTrain, [*small_run(painted), "--run-dir", str(folder)], *SURE)
    return folder


SURE = ("--teacher-batch-size", "16", "--teacher-epochs", "8")


# --------------------------------------------------------------------------------------------------
# By hand
# --------------------------------------------------------------------------------------------------

def test_every_stage_by_hand_gives_what_compile_gave(flags, finished_run, tmp_path):
    run_stage(TeacherTrain, flags)
    for script in ("mms_threshold", "entropy"):     # from another folder
        (tmp_path / "elsewhere").mkdir(exist_ok=True)
        done = run_script(f"{script}.py", *given(script, flags)[:-1], "../run",
                          cwd=tmp_path / "elsewhere")
        assert (done.returncode, done.stderr) == (0, "")
        assert f"saved in {tmp_path / 'run/thresholds.json'}" in done.stdout.replace(
            "elsewhere/../", "")
    for approach in APPROACHES[1:]:
        run_stage(transfer, flags, "--approach", approach)
    for approach in APPROACHES:
        run_stage(distill, flags, "--approach", approach)
    expected, ended = outcome(finished_run), outcome(tmp_path / "run")
    assert expected.keys() - ended.keys() == {"results.json"}
    assert [name for name in ended if ended[name] != expected[name]] == []


def test_what_the_run_folder_knows_need_not_be_said_again(flags, finished_run, tmp_path, capsys):
    """Code runs only where the command line names it."""
    run = copied(finished_run, tmp_path / "run", "students")
    code = [word for name in ("--target", "--teacher-arch", "--student-arch")
            for word in (name, flags[flags.index(name) + 1])]
    run_stage(distill, [*code, "--run-dir", str(run)], "--approach", "mms")
    assert (run / "students/mms.pt").read_bytes() == (finished_run / "students/mms.pt").read_bytes()
    with pytest.raises(UserError, match="names code, .* add --teacher-arch=.*net.py:make"):
        run_stage(transfer, code[:2], "--run-dir", run, "--approach", "mms")


@pytest.mark.parametrize("module, extra, absent, missing, command", [
    (transfer, [], "*", "teacher.json", "python TeacherTrain.py"),
    (distill, [], "*", "teacher.json", "python TeacherTrain.py"),
    (distill, [], "transfer", "transfer/mms/summary.json", "python transfer.py --approach mms")])
def test_a_missing_predecessor_is_named_with_the_command_that_makes_it(
        flags, finished_run, tmp_path, module, extra, absent, missing, command):
    run = copied(finished_run, tmp_path / "run", absent, "students")
    with pytest.raises(UserError) as raised:
        run_stage(module, flags, "--approach", "mms")
    assert str(raised.value) == (f"{run / missing} is missing. Make it with `{command} --target "
                                 f"{flags[1]} --run-dir {run}`.")


def test_another_approach_by_hand_costs_no_second_look_at_the_sources(
        flags, finished_run, tmp_path, capsys):
    run = copied(finished_run, tmp_path / "run")
    run_stage(transfer, flags, "--approach", "confidence")
    run_stage(distill, flags, "--approach", "confidence")
    assert "scores:" not in capsys.readouterr().out
    assert read(run, "students/confidence.json")["history"]
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*/*") if "figures" not in
              path.parts}
    run_stage(compile, flags, "--approaches", ",".join((*APPROACHES, "confidence")))
    said = capsys.readouterr().out
    assert "reused: teacher, " in said and "students/confidence" in said and "scores:" not in said
    assert before == {path: path.stat().st_mtime_ns for path in before}


@pytest.mark.parametrize("form, suffix, needs", [
    ("state_dict", "pth", "torch"), ("safetensors", "safetensors", "safetensors"),
    ("onnx", "onnx", "onnxscript")])
def test_a_student_is_exported(flags, finished_run, tmp_path, capsys, form, suffix, needs):
    pytest.importorskip(needs, reason=f"pip install {needs}")
    run = copied(finished_run, tmp_path / "run")
    run_stage(distill, flags, "--approach", "mms", "--export", form)
    assert f"export: {run}/students/mms.{suffix}, " in (said := capsys.readouterr().out)
    assert "On 30 images it gives the student's class for 30" in said
    assert (run / f"students/mms.{suffix}").stat().st_size > 1000


# --------------------------------------------------------------------------------------------------
# What is left
# --------------------------------------------------------------------------------------------------

def test_the_run_folder_and_the_table_are_as_documented(finished_run):
    names = ["config.json", "split.npz", "teacher.pt", "teacher.json", "thresholds.json",
             "results.json", "results.md", "report.html", "figures/accuracy.png"]
    names += [f"scores/{name}.npz" for name in ("pool", "more", "confidence")]
    names += [f"transfer/{approach}/{name}" for approach in APPROACHES[1:]
              for name in ("images.npy", "manifest.csv", "summary.json")]
    names += [f"students/{name}.{suffix}" for name in APPROACHES for suffix in ("pt", "json")]
    assert [name for name in names if not (finished_run / name).is_file()] == []
    assert not list(finished_run.rglob("*.part"))
    results, teacher = (read(finished_run, name) for name in ("results.json", "teacher.json"))
    assert {"target", "recipe", "seeds", "teacher", "rows"} <= set(results)
    assert (results["target"], results["recipe"], results["seeds"]) == ("colours", "quick", [0])
    assert results["teacher"] == {"arch": "net.py:make", "accuracy": teacher["accuracy"]}
    assert tuple(row["approach"] for row in results["rows"]) == APPROACHES
    for row in results["rows"]:
        assert set(row) >= {
            "approach", "student", "sources", "transfer_size", "per_class", "accuracy",
            "accuracy_std", "retention", "seconds", "images_per_second"}
        assert sum(row["per_class"]) == row["transfer_size"]
        assert row["retention"] == pytest.approx(row["accuracy"] / teacher["accuracy"])
    assert f"{results['rows'][0]['accuracy']:.2%}"[:-1] in (finished_run / "results.md").read_text()
    with np.load(finished_run / "scores/pool.npz") as scores:
        assert {name: scores[name].dtype.kind for name in ("predicted", "mms", "entropy")} == {
            "predicted": "i", "mms": "f", "entropy": "f"}
        assert len(scores["mms"]) == 120


def test_a_row_of_a_manifest_is_the_image_of_that_row(finished_run, painted):
    for approach in APPROACHES[1:]:
        images, rows = np.load(finished_run / f"transfer/{approach}/images.npy"), manifest(
            finished_run, approach)
        assert len(rows) == len(images) > 0
        for row, pixels in zip(rows, images, strict=True):
            file = Image.open(painted / row["source"] / row["file"])
            assert np.array_equal(decode(file, 32), pixels)
            with np.load(finished_run / f"scores/{row['source']}.npz") as scores:
                assert int(row["predicted"]) == scores["predicted"][int(row["index"])]
                shown = approach if approach == "entropy" else "mms"
                assert np.float32(row["score"]) == scores[shown][int(row["index"])]


# --------------------------------------------------------------------------------------------------
# Choices
# --------------------------------------------------------------------------------------------------

def scored(run):
    """(source, index, {column: (N,)}) of all candidates of a run."""
    parts = [np.load(run / f"scores/{name}.npz") for name in ("pool", "more")]
    names = np.repeat(["pool", "more"], [len(part["index"]) for part in parts])
    return names, {key: np.concatenate([part[key] for part in parts]) for key in parts[0].files}


def taken(run, approach):
    """(N,) bool, which candidates a transfer set has."""
    names, scores = scored(run)
    rows = {(row["source"], int(row["index"])) for row in manifest(run, approach)}
    return np.array([key in rows for key in zip(names, scores["index"].tolist(), strict=True)])


def test_threshold_and_floor_reach_the_transfer_sets_and_the_notes(flags, taught, tmp_path):
    run, given_ = copied(taught, tmp_path / "run"), [*flags, *SURE]
    names = {"confidence": True, "energy": True, "cross_entropy": False}
    run_stage(compile, given_, "--approaches", ",".join(("all", *names)), "--threshold", "0.9",
              "--floor", "0.5")
    _, scores = scored(run)
    confidence, below = np.load(run / "scores/confidence.npz"), 0
    for name, high in names.items():
        thresholds = np.array(read(run, "thresholds.json")[name], float)
        for label in range(3):          # nine tenths of the class's confidence set pass
            of = confidence[name][confidence["predicted"] == label]
            assert passes(of, np.full(len(of), label), thresholds, high).sum() == np.ceil(
                0.9 * len(of))
        summary, chosen = read(run, "transfer", name, "summary.json"), taken(run, name)
        eligible = passes(scores[name], scores["predicted"], thresholds, high)
        assert summary["bucket"] == 40 and summary["size"] == chosen.sum()
        for label, colour in enumerate(summary["classes"]):
            of = scores["predicted"] == label
            wanted = max(min(40, (eligible & of).sum()), min(20, of.sum()))
            assert (chosen & of).sum() == summary["per_class"][label] == wanted
            assert (chosen & of & ~eligible).sum() == summary["below_threshold"].get(colour, 0)
        below += sum(summary["below_threshold"].values())
    assert below and taken(run, "all").all()
    assert read(run, "transfer/all/summary.json")["shortfall"] == {}
    notes = " ".join(read(run, "results.json")["notes"])
    assert ("The surest 90% of the confidence set pass, class by class. Where fewer than 50% of a "
            "bucket pass, the best images below the threshold come in.") in notes
    assert "Images below the threshold that --floor let in for " in notes


def test_the_best_are_taken_and_one_bucket_may_hold_all_classes(flags, taught, tmp_path, capsys):
    run = copied(taught, tmp_path / "run")
    run_stage(compile, [*flags, *SURE], "--approaches", "balanced,mms", "--fill", "best",
              "--no-balance", "--transfer-size", "60", "--threshold", "1")
    _, scores = scored(run)
    chosen, thresholds = taken(run, "mms"), np.array(read(run, "thresholds.json")["mms"])
    eligible = passes(scores["mms"], scores["predicted"], thresholds, True)
    assert chosen.sum() == min(60, eligible.sum()) and not (chosen & ~eligible).any()
    if (eligible & ~chosen).any():
        assert scores["mms"][chosen].min() >= scores["mms"][eligible & ~chosen].max()
    summary = read(run, "transfer/balanced/summary.json")
    assert summary["size"] == 60 and max(summary["per_class"]) > 20 and not summary["shortfall"]
    assert ("One bucket for all classes is filled with the best scores."
            in " ".join(read(run, "results.json")["notes"]))


def test_a_trial_run_uses_few_images_of_everything(flags, tmp_path, capsys):
    run_stage(compile, flags, "--approaches", "balanced", "--limit", "24")
    said, run = capsys.readouterr().out, tmp_path / "run"
    assert "24 training images and 24 test images, 3 classes" in said
    assert [read(run, f"scores/{name}.json")["images"] for name in ("pool", "more")] == [24, 24]
    # Evenly spaced, and named as images of the whole data set.
    index = np.load(run / "scores/pool.npz")["index"]
    assert index.tolist() == np.linspace(0, 119, 24).round().tolist()
    assert read(run, "results.json")["notes"][0] == (
        "A trial run with at most 24 images of each data set.")


def test_several_seeds_are_repeated_and_averaged(flags, finished_run, tmp_path):
    run_stage(compile, flags, "--approaches", "balanced", "--seeds", "0,1")
    run = tmp_path / "run"
    assert (run / "seed-0/students/balanced.pt").read_bytes() == (
        finished_run / "students/balanced.pt").read_bytes()
    each = [read(run, f"seed-{seed}/students/balanced.json") for seed in (0, 1)]
    splits = [np.load(run / f"seed-{seed}/split.npz")["confidence"] for seed in (0, 1)]
    assert not np.array_equal(*splits)
    [row], accuracies = read(run, "results.json")["rows"], [student["accuracy"] for student in each]
    assert row["accuracy"] == pytest.approx(np.mean(accuracies))
    assert row["accuracy_std"] == pytest.approx(np.std(accuracies, ddof=1))
    assert read(run, "results.json")["seeds"] == [0, 1]


def test_the_teacher_never_trains_on_the_confidence_set_or_sees_the_test_split(
        flags, painted, tmp_path):
    """Other labels of those images make the same teacher."""
    run_stage(TeacherTrain, flags)
    colours = shutil.copytree(painted / "colours", tmp_path / "colours")
    target = data.load_target(TeacherTrain.open_stage(given("TeacherTrain", flags), "TeacherTrain",
                                                      "")[0].settings)
    for row in np.load(tmp_path / "run/split.npz")["confidence"]:
        Image.new("RGB", (24, 28)).save(colours / "train" / target.train.files[int(row)])
    for path in (colours / "test").rglob("*.png"):
        Image.new("RGB", (24, 28)).save(path)
    run_stage(TeacherTrain, [*flags[:-1], str(tmp_path / "other")], "--target",
              f"colours={colours}")
    weights = [TeacherTrain.checkpoints.load(tmp_path / name / "teacher.pt", flags[5]).state_dict()
               for name in ("run", "other")]
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])
