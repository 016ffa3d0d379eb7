"""A run folder that something has happened to: every file, damaged in every way, is noticed, named, and made again or refused."""
import errno
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import compile
import distill
import files
import report
import structure
import transfer
from conftest import small_run

HERE = Path(__file__).resolve().parent.parent
RUN = Path("runs/colours")
REFUSED = ("config.json", "teacher.pt", "teacher.json")         # what the user gave, and what took longest
MADE_AGAIN = ("split.npz", "scores/pool.npz", "scores/confidence.npz", "thresholds.json", "transfer/mms/images.npy", "transfer/mms/manifest.csv",
              "transfer/mms/summary.json", "students/mms.pt", "students/mms.json", "teacher.npz", "students/mms.npz")
READ_FOR = {"split.npz": "students/mms.json", "scores/pool.npz": "transfer/mms/summary.json", "scores/confidence.npz": "thresholds.json"}    # else they are not read
WRITTEN_ALWAYS = ("results.json", "results.md")
DAMAGE = {
    "cut": lambda content, other: content[:len(content) // 2],
    "emptied": lambda content, other: b"",
    "noise": lambda content, other: np.random.default_rng(0).bytes(len(content)),
    "one byte": lambda content, other: content[:len(content) // 2] + bytes([content[len(content) // 2] ^ 1]) + content[len(content) // 2 + 1:],
    "of another run": lambda content, other: other,
}
FLAGS = ["--approaches", "mms"]


@pytest.fixture(scope="module")
def another_run(painted, tmp_path_factory):
    """The run folder of another seed."""
    root = tmp_path_factory.mktemp("another")
    compile.main([*small_run(*painted), *FLAGS, "--seed", "5", "--run-dir", str(root / "run")])
    files.let_go()
    return root / "run"


def put(path, content):
    """In place of a file, which may be a link to that of other tests."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def figures():
    """What must not change."""
    row = next(row for row in json.loads((RUN / "results.json").read_text())["rows"] if row["approach"] == "mms")
    return {name: row[name] for name in ("accuracy", "transfer_size", "per_class", "retention")}


@pytest.mark.parametrize("way", DAMAGE)
@pytest.mark.parametrize("name", [*REFUSED, *MADE_AGAIN, *WRITTEN_ALWAYS, files.LEDGER])
def test_damage_is_noticed_and_named_and_the_file_is_made_again_or_refused(flags, finished, another_run, execute, name, way):
    whole = (RUN / name).read_bytes()
    damaged = DAMAGE[way](whole, (another_run / name).read_bytes())
    assert damaged != whole
    expected = figures()
    put(RUN / name, damaged)
    if name in READ_FOR:
        (RUN / READ_FOR[name]).unlink()
    status, out, err = execute(compile.main, [*flags, *FLAGS])
    if name in REFUSED or (name == files.LEDGER and status == 2):
        assert status == 2 and err.count("\n") == 1 and (name in err or name == files.LEDGER)
        assert (RUN / name).read_bytes() == damaged         # nothing is lost
        put(RUN / name, whole)
        assert execute(compile.main, [*flags, *FLAGS])[0] == 0
    else:
        assert (status, err) == (0, "")
        if name in MADE_AGAIN:
            assert f"runs/colours/{name} is damaged: it is not what was written there; it is set aside as {Path(name).name}.damaged and made again\n" in out
            assert Path(f"{RUN / name}.damaged").read_bytes() == damaged
            assert name.endswith((".json", ".npz")) or (RUN / name).read_bytes() == whole
    assert figures() == expected and files.damage(RUN / name) is None


# --------------------------------------------------------------------------------------------------
# What no run can have written, where no ledger tells it
# --------------------------------------------------------------------------------------------------

def columns(**changed):
    """Changes columns of a .npz; None takes one out."""
    def change(content):
        with np.load(io.BytesIO(content)) as saved:
            found = {name: saved[name] for name in saved.files}
        made = {name: change(found[name]) for name, change in changed.items() if change}
        kept, buffer = {name: values for name, values in found.items() if name not in changed}, io.BytesIO()
        np.savez(buffer, **kept, **made)
        return buffer.getvalue()
    return change


def fields(**changed):
    return lambda content: json.dumps(json.loads(content) | changed).encode()


def array(make):
    def change(content):
        buffer = io.BytesIO()
        np.save(buffer, make(np.load(io.BytesIO(content))))
        return buffer.getvalue()
    return change


def header_of(*shape):
    def change(content):
        buffer = io.BytesIO()
        np.lib.format.write_array_header_1_0(buffer, {"descr": "|u1", "fortran_order": False, "shape": shape})
        return buffer.getvalue()
    return change


def compressed(content):
    with np.load(io.BytesIO(content)) as saved:
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **{name: saved[name] for name in saved.files}, more=np.zeros(10_000_000))
    return buffer.getvalue()


IMPOSSIBLE = [
    ("split.npz", columns(train=lambda rows: rows + 1000), "each image once"), ("split.npz", columns(train=lambda rows: rows * 0), "each image once"), ("split.npz", columns(train=None), "it lacks train"),
    ("split.npz", columns(train=lambda rows: rows.astype(float)), "train is no row of numbers"), ("split.npz", columns(train=lambda rows: rows[None]), "train is no row"), ("split.npz", compressed, "compressed"),
    ("split.npz", columns(train=lambda rows: np.array([object()])), "can be read"),
    ("scores/pool.npz", columns(predicted=lambda labels: labels + 1000), "of other classes than the 3"), ("scores/pool.npz", columns(predicted=lambda labels: labels - 5), "predicted is no row"),
    ("scores/pool.npz", columns(mms=lambda scores: scores[:5]), "differ in length"), ("scores/pool.npz", columns(mms=lambda scores: np.array(["x"] * len(scores))), "mms holds no scores"),
    ("scores/pool.npz", columns(predicted=None), "it lacks predicted"), ("scores/pool.npz", columns(index=lambda rows: rows[::-1]), "index is not in order"),
    ("scores/confidence.npz", columns(predicted=lambda labels: labels + 3), "of other classes than the 3"), ("scores/pool.npz", columns(digests=lambda text: np.array("[1]")), "digests is not"),
    ("teacher.npz", columns(predicted=lambda labels: labels[:5]), "differ in length"), ("students/mms.npz", columns(labels=lambda labels: labels + 3), "of other classes than the 3"),
    ("thresholds.json", fields(mms=[1.0]), "mms is not one number a class"), ("thresholds.json", fields(mms=["a", "b", "c"]), "mms is not"), ("thresholds.json", fields(classes=["a", "b"]), "not one number a class"),
    ("thresholds.json", fields(mms=[1.0, float("nan"), 2.0]), "mms is not"), ("teacher.json", fields(accuracy="high"), "accuracy is not what"), ("teacher.json", fields(history=3), "history is not"),
    ("teacher.json", fields(files=[1], classes=["a", "a"]), "classes, files are not"), ("teacher.json", lambda content: b"{}", "arch, classes, accuracy"), ("teacher.json", lambda content: b"[]", "not a JSON object"),
    ("transfer/mms/summary.json", fields(size="x"), "size is not"), ("transfer/mms/summary.json", fields(size=1), "do not add up"), ("transfer/mms/summary.json", fields(per_source={"pool": -1}), "per_source is not"),
    ("transfer/mms/images.npy", array(lambda images: images[:5]), "it holds 5 images, and summary.json says"), ("transfer/mms/images.npy", array(lambda images: images / 255), "it holds no images"),
    ("transfer/mms/images.npy", array(lambda images: images.ravel()), "it holds no images"), ("transfer/mms/images.npy", header_of(10 ** 12, 32, 32, 3), "can be read"),
    ("transfer/mms/manifest.csv", lambda content: content.replace(b"pool", b"loop"), "it names sources that summary.json does not"), ("transfer/mms/manifest.csv", lambda content: content[:-40], "summary.json says"),
    ("transfer/mms/manifest.csv", lambda content: b"x\n" + content, "its first line is not source,index,file,predicted,score"), ("transfer/mms/manifest.csv", lambda content: content + b"pool,1\n", "is no image of a source"),
    ("students/mms.json", fields(accuracy=1.5), "accuracy is not"), ("students/mms.json", fields(per_class=[1, 2]), "of other classes than the 3"), ("students/mms.json", fields(history=[{}]), "history is not"),
]


def test_of_a_finished_run_every_file_is_sound(finished):
    checked = [path.relative_to(RUN).as_posix() for path in RUN.rglob("*") if path.is_file()]
    assert len(checked) > 40 and {name: structure.misfit(RUN, name) for name in checked if structure.misfit(RUN, name)} == {}
    assert not [pattern for pattern in structure.CHECKS if not list(RUN.glob(pattern))]


@pytest.mark.parametrize("name, change, said", IMPOSSIBLE)
def test_what_no_run_can_have_written_is_told_from_what_one_has(finished, name, change, said):
    put(RUN / name, change((RUN / name).read_bytes()))
    assert said in structure.misfit(RUN, name)


@pytest.mark.parametrize("way", ["cut", "emptied", "noise"])
@pytest.mark.parametrize("name", [name for name in (*REFUSED, *MADE_AGAIN) if name != "config.json"])
def test_what_can_not_be_read_is_no_file_of_a_run(finished, name, way):
    put(RUN / name, DAMAGE[way]((RUN / name).read_bytes(), b""))
    assert structure.misfit(RUN, name)


@pytest.mark.parametrize("name", [*REFUSED, *MADE_AGAIN])
def test_without_a_ledger_what_can_not_be_read_is_named_and_made_again_or_refused(flags, finished, execute, name):
    expected, whole = figures(), (RUN / name).read_bytes()
    put(RUN / name, DAMAGE["cut"](whole, b""))
    (RUN / files.LEDGER).unlink()
    if name in READ_FOR:
        (RUN / READ_FOR[name]).unlink()
    status, out, err = execute(report.main, [str(RUN)])
    assert (status, err) == (0, "") or status == 2 and err.count("\n") == 1 and str(RUN / name) in err
    status, out, err = execute(compile.main, [*flags, *FLAGS])
    if name in REFUSED:
        assert status == 2 and err.count("\n") == 1 and str(RUN / name) in err
        return
    assert (status, err) == (0, "") and f"{RUN / name} is damaged: " in out and f"it is set aside as {Path(name).name}.damaged and made again\n" in out
    assert figures() == expected and (name.endswith((".json", ".npz")) or (RUN / name).read_bytes() == whole)


@pytest.mark.parametrize("name, change, said", [IMPOSSIBLE[number] for number in (0, 7, 14, 16, 17, 24, 26, 29, 33, 37)])
def test_a_ledger_that_somebody_made_does_not_help_what_no_run_can_have_written(flags, finished, execute, name, change, said):
    expected = figures()
    put(RUN / name, change((RUN / name).read_bytes()))
    (RUN / files.LEDGER).unlink()
    files.open_ledger(RUN, [path for path in RUN.rglob("*") if path.is_file()])
    if name in READ_FOR:
        (RUN / READ_FOR[name]).unlink()
    status, out, err = execute(compile.main, [*flags, *FLAGS])
    assert said in err if name in REFUSED else (status, err) == (0, "") and said in out and figures() == expected


def test_config_json_without_settings_is_refused(flags, finished, execute):
    put(RUN / "config.json", b"{}")
    (RUN / files.LEDGER).unlink()
    for main, argv in ((compile.main, flags), (report.main, [str(RUN)])):
        status, out, err = execute(main, argv)
        assert status == 2 and "runs/colours/config.json is damaged: it lacks settings" in err and err.count("\n") == 1


@pytest.mark.parametrize("stage, name, again", [(distill, "transfer/mms/images.npy", "python transfer.py --approach mms"), (distill, "transfer/mms/summary.json", "python transfer.py --approach mms"),
                                                (transfer, "teacher.pt", "python TeacherTrain.py"), (distill, "teacher.json", "python TeacherTrain.py")])
def test_a_stage_by_hand_says_which_command_makes_a_damaged_file_again(flags, finished, execute, stage, name, again):
    put(RUN / name, b"x")
    for made in (RUN / "students").glob("mms.*"):
        made.unlink()
    status, out, err = execute(stage.main, ["--target", flags[1], "--approach", "mms"])
    assert status == 2 and f"{name} is damaged: it is not what was written there; delete it and make it with `{again}" in err and err.count("\n") == 1


@pytest.mark.parametrize("name", ["config.json", "teacher.pt", "thresholds.json", "transfer/mms/images.npy", "students/mms.pt"])
@pytest.mark.parametrize("put_there", [os.mkfifo, os.mkdir])
def test_what_is_no_file_is_refused_and_not_waited_for(flags, finished, execute, name, put_there):
    (RUN / name).unlink()
    put_there(RUN / name)
    status, out, err = execute(compile.main, [*flags, *FLAGS])
    assert status == 2 and err.count("\n") == 1 and name in err and (RUN / name).exists()


def test_a_pipe_in_a_pack_is_not_waited_for(flags, execute):
    assert execute(compile.main, [*flags, *FLAGS])[0] == 0
    pack = next(Path("data/packed").glob("pool-*"))
    (pack / "images.npy").unlink()
    os.mkfifo(pack / "images.npy")
    status, out, err = execute(compile.main, [*flags, *FLAGS])
    assert status == 2 and err == f"compile.py: {pack}/images.npy is a pipe and no file: remove it\n"
    (pack / "images.npy").unlink()
    (pack / "pack.json").unlink()
    os.mkfifo(pack / "pack.json")
    assert execute(compile.main, [*flags, *FLAGS])[::2] == (0, "") and (pack / "pack.json").is_file()


def test_a_link_to_what_is_not_there_is_as_good_as_no_file(flags, finished, execute):
    whole = (RUN / "students/mms.pt").read_bytes()
    (RUN / "students/mms.pt").unlink()
    (RUN / "students/mms.pt").symlink_to("nowhere")
    assert execute(compile.main, [*flags, *FLAGS])[::2] == (0, "") and (RUN / "students/mms.pt").read_bytes() == whole


@pytest.mark.parametrize("folder, said", [("", "names no folder"), ("a file", "can't be written"), ("a file/below", "can't be written"), ("/dev/null", "can't be written"), ("/proc/x", "choose another --run-dir")])
def test_a_run_folder_that_can_not_be_is_refused(flags, execute, folder, said):
    Path("a file").write_text("")
    status, out, err = execute(compile.main, [*flags, "--run-dir", folder])
    assert status == 2 and err.count("\n") == 1 and said in err and Path("a file").read_text() == "" and not Path("runs").exists()


def test_a_run_folder_without_a_ledger_gets_one_and_what_is_no_longer_there_is_missed(flags, finished, execute):
    (RUN / files.LEDGER).unlink()
    assert execute(compile.main, flags)[0] == 0
    assert {"teacher.pt", "scores/pool.npz", "transfer/mms/images.npy", "students/mms.pt", "config.json"} <= set(json.loads((RUN / files.LEDGER).read_text()))
    (RUN / "config.json").unlink()
    status, out, err = execute(compile.main, flags)
    assert status == 2 and err == "compile.py: runs/colours/config.json is missing, so that nothing says how the rest was made: restore it, use another --run-dir, or --restart\n"
    assert execute(compile.main, [*flags, "--restart"])[0] == 0


def test_two_runs_in_one_run_folder_the_second_says_who_holds_it(flags, finished, execute):
    holder = subprocess.Popen([sys.executable, "-c", f"import sys; sys.path.insert(0, {str(Path(files.__file__).parent)!r})\nimport files, time\n"
                               f"files.hold({str(RUN)!r}); print('held', flush=True); time.sleep(100)"], stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    status, out, err = execute(compile.main, flags)
    assert status == 2 and f"runs/colours is in use by process {holder.pid} on " in err and "since 20" in err and err.count("\n") == 1
    holder.kill()
    holder.wait()
    assert execute(compile.main, flags)[0] == 0


def test_without_config_and_ledger_what_is_there_is_not_used(flags, finished, execute):
    """As --restart leaves it that is killed while it deletes: it begins with these."""
    for name in ("config.json", files.LEDGER):
        (RUN / name).unlink()
    status, out, err = execute(compile.main, flags)
    assert status == 2 and "config.json is missing, so that nothing says how the rest was made" in err


def test_restart_takes_a_link_away_and_leaves_what_it_leads_to(flags, finished, execute):
    (RUN / "transfer/mms").rename("elsewhere")
    (RUN / "transfer/mms").symlink_to(Path("elsewhere").resolve())
    assert execute(compile.main, [*flags, *FLAGS, "--restart-from", "transfer"])[::2] == (0, "")
    assert not (RUN / "transfer/mms").is_symlink() and (RUN / "transfer/mms/images.npy").exists() and Path("elsewhere/images.npy").exists()


def test_restart_from_a_stage_keeps_what_comes_before_and_says_what_it_deletes(flags, finished, execute):
    def ages():
        return {path.relative_to(RUN).as_posix(): path.stat().st_mtime_ns for path in RUN.rglob("*") if path.is_file() and path.parent.name != ".locks"}
    before = ages()
    status, out, err = execute(compile.main, [*flags, *FLAGS, "--lr", "0.02", "--temperature", "3", "--fill", "best"])
    assert status == 2 and err.startswith("compile.py: runs/colours was made with --fill first, not best, with --temperature 4.0, not 3.0, with --lr 0.1, not 0.02: use those, ")
    assert "--restart-from transfer, which keeps what comes before" in err and ages() == before
    status, out, err = execute(compile.main, [*flags, *FLAGS, "--lr", "0.02", "--restart-from", "students"])
    assert (status, err) == (0, "") and "--restart-from students deletes students/" in out and "results.json" in out
    after = ages()
    kept = [name for name in before if name.startswith(("teacher", "split", "scores/", "thresholds", "transfer/"))]
    assert len(kept) > 10 and all(after[name] == before[name] for name in kept)
    assert after["students/mms.pt"] != before["students/mms.pt"] and "students/balanced.pt" not in after
    assert json.loads((RUN / "config.json").read_text())["restart_from"] is None
    assert "made with --lr 0.02, not 0.1" in execute(compile.main, [*flags, *FLAGS])[2]


def test_a_config_repeats_a_run_and_flags_go_before_it(flags, finished, execute):
    shutil.copy(RUN / "config.json", "kept.json")
    status, out, err = execute(compile.main, ["--config", "kept.json", "--run-dir", "again", "--approaches", "mms,random"])
    assert (status, err) == (0, "")
    for name in ("transfer/mms/images.npy", "students/mms.pt", "teacher.pt", "students/random.pt"):
        assert (Path("again") / name).read_bytes() == (RUN / name).read_bytes(), name
    changed = {"run_dir"}
    first, second = (json.loads((folder / "config.json").read_text()) for folder in (RUN, Path("again")))
    assert {name for name in first if first[name] != second[name]} == changed | {"approaches"}


@pytest.mark.parametrize("content, said", [
    ("", "is no config.json"), ("[]", "is no config.json"), ("{", "is no config.json"), ('{"colour": 1}', "colour is no setting"), ('{"lr": "fast"}', 'lr can\'t be "fast"'), ('{"lr": -1}', "argument --lr"),
    ('{"lr": {"a": 1}}', "lr can't be"), ('{"sources": ["../x=y"]}', "argument --sources"), ('{"restart": 3}', "restart can't be 3"), ('{"seeds": [0, 0]}', "names a seed twice"), ('{"lr": NaN}', "argument --lr"),
    ('{"run_dir": 5, "recipe": "none"}', "run_dir can't be 5"), ('{"recipe": "none"}', "argument --recipe"), ('{"sources": [["a"]]}', "sources can't be"), ('{"seed": true}', "seed can't be true"),
    ('{"run_dir": "a\\u0000b"}', "run_dir can't be"), ('{"target": "--"}', "argument --target"), ('{"criteria": {"mine": 3}}', "criteria can't be"), ("[" * 100_000, "is no config.json"),
    ('{"classes": ["a", "a"]}', "one twice"), ('{"classes": ["a"]}', "fewer than two classes"), (" " * 100_000_001, "is no config.json"),
])
def test_a_config_that_can_not_be_is_refused(flags, execute, content, said):
    Path("config.json").write_text(content)
    status, out, err = execute(compile.main, ["--config", "config.json"])
    assert status == 2 and said in err and err.count("\n") == 1, err
    assert not Path("runs").exists() and os.listdir() == ["config.json"]


def test_with_files_of_a_limited_size_the_rest_is_whole_and_the_work_goes_on_without_the_limit(painted, finished_run, tmp_path):
    """A student has 45 MB, the teacher likewise: under 30 MB neither can be written, and what can is."""
    argv = [*small_run(*painted), "--data-dir", str(tmp_path / "data"), "--run-dir", str(tmp_path / "run")]

    def execute_under(limit):
        program = f"import sys, resource\nresource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY))\nsys.path.insert(0, {str(HERE)!r})\nimport compile, run\nrun.command(compile.main)"
        return subprocess.run([sys.executable, "-c", program, *argv], capture_output=True, text=True)
    made = execute_under(30_000_000)
    assert made.returncode == 2 and made.stderr.count("\n") == 1 and "a file is larger than the limit allows" in made.stderr and "the same command goes on from here" in made.stderr
    assert (tmp_path / "run" / "split.npz").exists() and not (tmp_path / "run" / "teacher.pt").exists() and not [path for path in tmp_path.rglob(".*.part")]
    assert execute_under(-1).returncode == 0
    rows, expected = (json.loads((folder / "results.json").read_text())["rows"] for folder in (tmp_path / "run", finished_run / RUN))
    assert [(row["approach"], row["accuracy"], row["per_class"]) for row in rows] == [(row["approach"], row["accuracy"], row["per_class"]) for row in expected]


@pytest.mark.parametrize("more, said", [
    (["--transfer-size", "900"], "--transfer-size 900 asks for 300 images of each class, and all sources together have 180"), (["--batch-size", "200"], "--batch-size 200 is more than the 120 images"),
    (["--approaches", "eats"], "eats needs svhn or tinyimagenet among the sources"), (["--seeds", "1,1"], "names a seed twice"), (["--image-size", "5000"], "more than 4,096 pixels"),
    (["--classes", "99999999999"], "more than 1,000,000 classes"), (["--steps", "5"], "--steps and --epochs contradict each other"), (["--transfer-size", "2"], "2 images are less than one for each of 3 classes"),
])
def test_sizes_that_can_not_be_are_refused_before_any_work(flags, execute, more, said):
    status, out, err = execute(compile.main, [*flags, *more])
    assert status == 2 and err.count("\n") == 1 and said in err, err
    assert not RUN.exists()


def test_a_full_disk_is_said_and_the_work_goes_on_after_room_is_made(flags, finished, execute, monkeypatch):
    shutil.rmtree(RUN / "students")
    replace, full = os.fsync, [True]

    def fsync(number):
        if full[0] and os.readlink(f"/proc/self/fd/{number}").endswith(".part") and "mms.pt" in os.readlink(f"/proc/self/fd/{number}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(number)
    monkeypatch.setattr(os, "fsync", fsync)
    status, out, err = execute(compile.main, flags)
    assert status == 2 and err.count("\n") == 1 and "the disk is full" in err and "the same command goes on" in err
    assert (RUN / "students" / "balanced.pt").exists() and not [path for path in RUN.rglob(".*.part")]
    full[0] = False
    assert execute(compile.main, flags)[0] == 0
