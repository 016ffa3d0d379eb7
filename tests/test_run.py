"""A finished run: what is whole is reused, what is not is named and made again; by hand or not."""
import itertools
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, small_run
from PIL import Image
from script_files import by_hand, contents, manifest, outcome, put, ran, read, refused, run_here

from kd import checkpoints, engine
from kd.files import write_sealed
from kd.flags import MAKER
from kd.readers import decode

APPROACHES = ("supervised", "balanced", "random", "mms", "entropy")
STAGES = ("TeacherTrain.py", "mms_threshold.py", "entropy.py", "transfer.py", "distill.py")
MADE_AGAIN = {      # {the script that reads a file and makes it again: such files}
    "transfer.py --approach mms": [
        "scores/pool.npz", "scores/pool.json", "scores/confidence.npz", "split.npz", "split.json",
        "thresholds.json", "transfer/mms/images.npy", "transfer/mms/manifest.csv",
        "transfer/mms/summary.json"],
    "distill.py --approach mms": ["students/mms.pt", "students/mms.npz", "students/mms.json"],
    "distill.py --approach supervised": ["split.npz", "students/supervised.pt"]}
REFUSED = ("teacher.pt", "teacher.npz", "teacher.json")


def one_bit(content):
    at = next(at for at in range(len(content) // 2, len(content)) if content[at:at + 1].isalpha())
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1:]


DAMAGE = {"cut": lambda content: content[:len(content) // 2], "emptied": lambda content: b"",
          "one bit": one_bit, "another JSON": lambda content: b"[null]", "removed": None}


def damage(run, name, way):
    content = (run / name).read_bytes()
    (run / name).unlink()
    if DAMAGE[way]:
        put(run / name, DAMAGE[way](content))
        assert (run / name).read_bytes() != content


@pytest.mark.parametrize("way", DAMAGE)
@pytest.mark.parametrize("command, name", [
    (command, name) for command, names in MADE_AGAIN.items() for name in names])
def test_what_is_damaged_is_named_and_made_again_with_the_same_bits(
        run, painted, command, name, way):
    script, *approach = command.split()
    before = outcome(run)
    damage(run, name, way)
    said = ran(script, by_hand(painted, run), *approach)
    assert outcome(run) == before
    wrong = "missing" if way == "removed" else "damaged: it is not what was written there"
    if way != "removed" or not name.endswith(".json"):      # without its JSON nothing was made yet
        assert f"{run / name} is {wrong}. It will be made again.\n" in said


@pytest.mark.parametrize("script", [*STAGES, "compile.py"])
@pytest.mark.parametrize("name, way", [(name, way) for name in REFUSED for way in DAMAGE
                                       if way != "removed" or name[-5:] != ".json"])
def test_a_teacher_that_is_damaged_is_refused_and_left_as_it_is(
        run, painted, flags, name, way, script):
    damage(run, name, way)
    left = (run / name).exists() and (run / name).read_bytes()
    said = refused(script, flags if script == "compile.py" else by_hand(painted, run))
    wrong = "missing" if way == "removed" else "damaged"
    assert said.startswith(f"{script}: {run / name} is {wrong}")
    assert "Restore it, " in said or "Make it with `python TeacherTrain.py" in said
    assert left == ((run / name).exists() and (run / name).read_bytes())


@pytest.mark.parametrize("way", sorted(DAMAGE.keys() - {"removed"}))
def test_a_config_that_is_damaged_is_refused_by_a_stage_and_written_again_by_compile(
        run, painted, flags, way):
    damage(run, "config.json", way)
    assert "config.json is missing, damaged or of another version" in refused(
        "distill.py", by_hand(painted, run))
    ran("compile.py", flags)
    ran("distill.py", by_hand(painted, run))


def test_a_second_run_says_what_it_reuses_and_makes_nothing_again(run, flags):
    before = contents(run)
    said = ran("compile.py", flags)
    assert {name for name, content in contents(run).items() if content != before[name]} <= {
        "config.json", "report.html"}       # which name the folder
    assert ("\nreused: teacher, split, scores/confidence, thresholds, scores/pool, scores/more, "
            "transfer/balanced, transfer/random, transfer/mms, transfer/entropy, students/"
            "supervised, students/balanced, students/random, students/mms, students/entropy\n"
            ) in said


def test_another_test_split_is_measured_and_nothing_is_trained_again(
        run, flags, painted, tmp_path, monkeypatch):
    shutil.copytree(painted / "colours", tmp_path / "colours")
    (tmp_path / "colours/test/red/000.png").unlink()
    before = {path: path.read_bytes() for path in run.rglob("*.pt")}
    flags, accuracy = [*flags, "--target", f"colours={tmp_path / 'colours'}"], engine.accuracy
    for stop in (1, 2):     # once the teacher's answers to the test split are written; a student's
        calls = itertools.count(1)

        def interrupted(*arguments, stop=stop, calls=calls, **options):
            if next(calls) == stop:
                raise KeyboardInterrupt
            return accuracy(*arguments, **options)
        with monkeypatch.context() as patch:
            patch.setattr(engine, "accuracy", interrupted)
            assert run_here("compile.py", *flags).returncode
    said = ran("compile.py", flags)
    assert "split, scores/confidence" in said and "student mms: " not in said
    assert "damaged" not in said
    assert before == {path: path.read_bytes() for path in run.rglob("*.pt")}
    assert len(np.load(run / "students/mms.npz")["predicted"]) == 29


def test_a_setting_that_came_or_went_between_versions_makes_nothing_again(run, flags):
    path, content = run / "students/mms.json", read(run, "students/mms.json")
    made_from = content["made_from"] | {"gone": 0.0}
    del made_from["optimizer"]      # of before it was a choice
    write_sealed(path, content | {"made_from": made_from})
    assert "students/mms" in ran("compile.py", flags).split("\nreused: ")[1]


@pytest.mark.parametrize("more, product, stage, was, new", [
    ("--teacher-epochs 5 --seed 1", "teacher.json", "teacher", "with --teacher-epochs 8, with "
     "--seed 0", "with --teacher-epochs 5, with --seed 1"),
    ("--limit 50", "teacher.json", "teacher", "without --limit", "with --limit 50"),
    ("--no-balance", "transfer/balanced/summary.json", "transfer", "without --no-balance",
     "with --no-balance"),
    ("--fill best --threshold 0.5", "transfer/balanced/summary.json", "transfer",
     "with --threshold published, with --fill random", "with --threshold 0.5, with --fill best"),
    ("--temperature 2", "students/balanced.json", "students", "with --temperature 4",
     "with --temperature 2")])
def test_a_setting_that_differs_is_named_with_both_values_and_what_helps(
        run, flags, more, product, stage, was, new):
    before = contents(run)
    said = refused("compile.py", flags, *more.split())
    assert contents(run) == before and said == (
        f"compile.py: {run / product} was made {was}, not {new}. Give what it "
        f"was made with to keep it. To make it again, run {MAKER[stage]} or compile.py with "
        f"--restart-from {stage}, or choose another --run-dir.\n")


def test_another_version_of_a_criterion_is_noticed(run, painted, tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text((ROOT / "criteria/energy.py").read_text())
    ran("transfer.py", by_hand(painted, run), "--approach", mine)
    helper = tmp_path / "helper.py"     # what it imports counts as well
    helper.write_text("SCALE = 2\n")
    for path, text in ((mine, "\nfrom helper import SCALE\n"), (helper, "SCALE = 3\n")):
        with open(path, "a") as file:
            file.write(text)
        said = refused("transfer.py", by_hand(painted, run), "--approach", mine)
        assert "mine/summary.json was made with another version of its criterion. " in said
        assert "run transfer.py or compile.py with --restart-from transfer" in said
        ran("transfer.py", by_hand(painted, run), "--approach", mine, "--restart-from", "transfer")


def test_images_that_have_changed_are_noticed_and_nothing_is_lost(run, flags, painted, tmp_path):
    before = outcome(run)
    shutil.copytree(painted / "pool", tmp_path / "pool")
    (tmp_path / "pool/0/000.png").unlink()
    said = refused("compile.py", flags, "--sources",
                   f"pool={tmp_path / 'pool'},more={painted / 'more'}")
    assert "was made with another version of its images" in said and outcome(run) == before


@pytest.mark.parametrize("script", STAGES)
def test_a_stage_run_by_hand_takes_what_is_not_given_from_the_run(run, painted, script):
    before, config = contents(run), read(run, "config.json")
    ran(script, by_hand(painted, run))
    assert {name for name, content in contents(run).items() if content != before[name]} <= {
        "config.json"}      # which names the folder
    assert read(run, "config.json")["given"] == config["given"]


@pytest.mark.parametrize("restart, first, kept", [
    ("--restart-from=students", "students/balanced.pt",
     ("teacher", "split", "scores/", "thresholds", "transfer/")),
    ("--restart", "split.npz", ())])
def test_restart_keeps_what_comes_before_and_what_is_not_the_runs(run, flags, restart, first, kept):
    foreign = ["mine.txt", "teacher.md", "scores/mine.csv", "transfer/mms/mine", "students/notes"]
    for name in [*foreign, "students/.mms.pt.99.part"]:     # what a killed process leaves
        put(run / name, b"1")
    before, flags = contents(run), [*flags, "--approaches", "mms", "--lr", "0.02"]
    assert f"\nDeleting {first}, " in ran("compile.py", flags, restart)
    now = contents(run)
    assert not [name for name in before if name.startswith((*foreign, *kept))
                and now.get(name) != before[name]]
    assert now["students/mms.pt"] != before["students/mms.pt"]
    assert not [name for name in now if name.endswith(".part") or name == "students/entropy.pt"]
    assert "Deleting" not in ran("compile.py", flags)
    assert "--lr 0.02, not with --lr 0.1." in refused("compile.py", flags[:-2])


@pytest.mark.parametrize("script, words, said", [
    ("compile.py", "--restart-from transfer --transfer-size 1", "1 images are fewer than one"),
    ("transfer.py", "--restart-from transfer --transfer-size 1", "1 images are fewer than one"),
    ("TeacherTrain.py", "--restart-from teacher --teacher-checkpoint typo.pth", "typo.pth can't"),
    *((script, "--restart-from students --batch-size 1", "--batch-size: a batch needs 2 images")
      for script in ("compile.py", "distill.py")),
    ("TeacherTrain.py", "--restart-from teacher --teacher-batch-size 1",
     "--teacher-batch-size: a batch needs 2 images"),
    ("mms_threshold.py", "--restart-from teacher",
     "--restart-from: that is for TeacherTrain.py, which makes teacher"),
    ("compile.py", "--restart --teacher-checkpoint {run}/teacher.pt", "compile.py: --restart would "
     "delete {run}/teacher.pt, which is given as an input. Copy it to another folder first.\n"),
    *((script, "--restart-from students --student-weights teacher --student-arch alexnet",
       "alexnet can't start from its teacher's weights")
      for script in ("compile.py", "distill.py"))])
def test_what_is_refused_has_deleted_nothing(run, flags, script, words, said):
    before = contents(run)
    assert said.format(run=run) in refused(script, flags, *words.format(run=run).split())
    assert contents(run) == before


def test_a_stage_that_starts_again_by_hand_keeps_the_flags_of_the_others(run, painted):
    before = read(run, "config.json")
    ran("transfer.py", by_hand(painted, run), "--approach", "mms", "--restart-from", "transfer",
        "--fill", "best")
    now = read(run, "config.json")
    assert now["given"] == before["given"] | {"fill": "best"} and now["given"]["batch_size"] == 16
    assert (now["epochs"], now["approaches"]) == (before["epochs"], before["approaches"])


def test_a_name_with_a_carriage_return_is_one_row_of_the_manifest(run, flags, painted, tmp_path):
    shutil.copytree(painted / "more", tmp_path / "web")
    (tmp_path / "web/0/000.png").rename(tmp_path / "web/0/a\rb, c.png")
    ran("compile.py", flags, "--sources", f"web={tmp_path / 'web'}", "--approaches", "all",
        "--restart-from", "scores")
    rows = manifest(run, "all")
    assert len(rows) == 60 and sum(row["file"] == "0/a\rb, c.png" for row in rows) == 1


def test_of_two_commands_in_one_folder_the_second_says_who_holds_it(run, painted):
    program = f"from kd.run import *; hold(Path({str(run)!r})); print(flush=True); input()"
    argv = by_hand(painted, run)
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        said = refused("distill.py", argv)
        holder.communicate(b"\n")
    assert f"{run} is in use by process {holder.pid} on " in said
    assert said.endswith(". Wait for it, or choose another --run-dir.\n")
    ran("distill.py", argv)


@pytest.mark.parametrize("folder", ["file", "file/below"])
def test_a_folder_that_can_not_be_is_refused(painted, tmp_path, folder):
    (tmp_path / "file").write_text("")
    said = refused("compile.py", small_run(painted), "--run-dir", tmp_path / folder)
    assert said.startswith(f"compile.py: {tmp_path / folder}: ") and "with --data-dir or" in said


def test_every_stage_by_hand_gives_what_compile_gave(flags, tmp_path, finished_run):
    run = tmp_path / "run"
    ran("TeacherTrain.py", flags)
    assert "thresholds: mms, at least" in ran("mms_threshold.py", flags)
    ran("entropy.py", flags)
    for approach in APPROACHES[1:]:
        ran("transfer.py", flags, "--approach", approach)
    for approach in APPROACHES:
        ran("distill.py", flags, "--approach", approach)
    expected, ended = outcome(finished_run), outcome(run)
    assert expected.keys() - ended.keys() == {"results.json"}
    assert [name for name in ended if ended[name] != expected[name]] == []
    assert read(run, "config.json")["given"] == read(finished_run, "config.json")["given"]


@pytest.mark.parametrize("script, absent, command", [
    ("transfer.py", "teacher.json", "python TeacherTrain.py"),
    ("distill.py", "teacher.json", "python TeacherTrain.py"),
    ("distill.py", "transfer/mms/summary.json", "python transfer.py")])
def test_a_missing_predecessor_is_named_with_the_command_that_makes_it(
        flags, run, script, absent, command):
    (run / absent).unlink()
    assert refused(script, flags, "--approach", "mms") == (
        f"{script}: {run / absent} is missing. Make it with `{command}` and the flags of "
        "this run.\n")


def test_a_student_is_exported(flags, run):
    said = ran("distill.py", flags, "--approach", "mms", "--export", "state_dict")
    assert f"export: {run}/students/mms.pth, " in said
    assert "On 30 images it gives the student's class for 30" in said
    assert (run / "students/mms.pth").stat().st_size > 1000
    (run / "transfer/mms/images.npy").unlink()      # the largest file there is
    ran("distill.py", flags, "--approach", "mms", "--export", "safetensors")


def test_torch_hub_loads_a_student_that_takes_pixels_of_any_size(flags, run):
    path, arch = run / "students/mms.pt", flags[5]
    network = torch.hub.load(str(ROOT), "student", path, arch, source="local")
    images = torch.randint(0, 256, (6, 32, 32, 3), dtype=torch.uint8)
    with torch.inference_mode():
        expected = checkpoints.load(path, arch)(images)
        found = network(images.permute(0, 3, 1, 2) / 255)
        larger = Image.fromarray(images[0].numpy()).resize((80, 64))
        shrunk = torch.from_numpy(decode(larger, 32).copy()).permute(2, 0, 1)[None] / 255
        larger = torch.from_numpy(np.array(larger)).permute(2, 0, 1)[None] / 255
        scale = expected.abs().max().item()
        torch.testing.assert_close(network(larger), network(shrunk), rtol=0, atol=0.02 * scale)
    assert network.classes == read(run, "teacher.json")["classes"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_run_folder_is_as_documented(finished_run):
    names = ["config.json", "split.npz", "teacher.pt", "teacher.json", "thresholds.json",
             "results.json", "results.md", "report.html", "figures/accuracy.png",
             *(f"scores/{name}.npz" for name in ("pool", "more", "confidence")),
             *(f"transfer/{approach}/{name}" for approach in APPROACHES[1:]
               for name in ("images.npy", "manifest.csv", "summary.json")),
             *(f"students/{name}.{suffix}" for name in APPROACHES for suffix in ("pt", "json"))]
    assert [name for name in names if not (finished_run / name).is_file()] == []
    assert not list(finished_run.rglob("*.part"))
    listed = (ROOT / "docs/runs.md").read_text().partition("\n\n")[2].partition("\n\nCheck")[0]
    for path in finished_run.rglob("*.*"):
        assert path.name.startswith(".") or path.stem in listed or path.suffix in listed, path
    config = read(finished_run, "config.json")
    assert config.keys() >= {"target", "seed", "device", "commit", "machine", "given"}
    assert config["versions"]["torch"] == torch.__version__
    if (ROOT / ".git").exists():
        asked = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True,
                               text=True, check=True).stdout.strip()
        assert config["commit"].removesuffix("-dirty") == asked


def test_the_rows_of_the_table_are_what_the_run_folder_holds(finished_run):
    rows, notes = (read(finished_run, "results.json")[key] for key in ("rows", "notes"))
    assert rows[0]["transfer_size"] == 96       # supervised: four fifths of 120
    weights = torch.load(finished_run / "teacher.pt", weights_only=True)["state_dict"]
    size = sum(each.numel() for name, each in weights.items() if each.dim() and
               "running" not in name)
    teacher = np.load(finished_run / "teacher.npz")
    for row in rows:
        assert row["parameters"] == size        # of the same architecture
        assert sum(row["per_class"]) == row["transfer_size"]
        accuracy = read(finished_run, "teacher.json")["accuracy"]
        assert row["retention"] == pytest.approx(row["accuracy"] / accuracy)
        answers = np.load(finished_run / f"students/{row['approach']}.npz")
        assert answers["labels"].tolist() == np.repeat(np.arange(3), 10).tolist()
        assert row["accuracy"] == (answers["predicted"] == answers["labels"]).mean()
        assert row["agreement"] == (answers["predicted"] == teacher["predicted"]).mean()


def test_the_config_of_a_run_repeats_it(finished_run, painted, tmp_path):
    ran("compile.py", by_hand(painted, tmp_path / "again"), "--config",
        finished_run / "config.json")
    assert outcome(tmp_path / "again") == outcome(finished_run)


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


def test_the_teacher_learns_from_its_part_of_the_training_split_alone(
        run, flags, painted, tmp_path):
    """Whatever the other images show, it is the same teacher."""
    colours = shutil.copytree(painted / "colours", tmp_path / "colours")
    files = sorted((colours / "train").rglob("*.png"))      # in the order of the data set
    unseen = [files[i] for i in np.load(run / "split.npz")["confidence"]]
    for path in [*unseen, *(colours / "test").rglob("*.png")]:
        Image.new("RGB", (24, 28)).save(path)
    other = tmp_path / "other"
    ran("TeacherTrain.py", flags, "--target", f"colours={colours}", "--run-dir", other)
    one, other = (torch.load(folder / "teacher.pt", weights_only=True)["state_dict"]
                  for folder in (run, other))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_trial_run_uses_few_images_of_everything(flags, tmp_path):
    run = tmp_path / "run"
    said = ran("compile.py", flags, "--approaches", "balanced", "--limit", "24")
    assert "24 training images and 24 test images, 3 classes" in said
    # Evenly spaced, and named as images of the whole data set.
    index = np.load(run / "scores/pool.npz")["index"]
    assert index.tolist() == np.linspace(0, 119, 24).round().tolist()
    assert read(run, "results.json")["notes"][0] == (
        "A trial run with at most 24 images of each data set.")


def test_several_seeds_have_a_run_each_and_one_table(flags, tmp_path, finished_run):
    run = tmp_path / "run"
    ran("compile.py", flags, "--approaches", "balanced", "--seeds", "0,1")
    assert (run / "seed-0/students/balanced.pt").read_bytes() == (
        finished_run / "students/balanced.pt").read_bytes()
    splits = [np.load(run / f"seed-{seed}/split.npz")["confidence"] for seed in (0, 1)]
    assert not np.array_equal(*splits) and read(run, "results.json")["seeds"] == [0, 1]
    for script, more in (("distill.py", ["--approach", "balanced"]), ("compile.py", [])):
        assert f"{run} holds several seeds. Name one, as --run-dir {run}/seed-0" in refused(
            script, flags, *more)
