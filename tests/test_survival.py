"""Whatever moment a process is killed at, the same command completes, and nothing that is broken is taken for whole.

The process is the real `python data.py`, on an archive in TinyImageNet's layout from a server of our own. It is killed
while it fetches, extracts or packs, at random moments.
"""
import dataclasses
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import compile
import distill
import engine
import files
import models
import record
import report
import TeacherTrain
import transfer
from conftest import small_run
from data import Target
from packing import Packed
from run import RECIPES, Interrupted
from shards import Shards, open_shards
from test_networks import random_images, tiny
from test_shards import make_shards

IMAGES = 900
MEGABYTE = 1 << 20
COMMAND = """
import dataclasses, faulthandler, sys
faulthandler.dump_traceback_later(100, exit=True)       # a process that hangs says where
sys.path.insert(0, {here!r})
import data, packing, run
packing.SAVE_INTERVAL = 0.05
record = data.DATA_SETS["tinyimagenet"]
data.DATA_SETS["tinyimagenet"] = dataclasses.replace(record, images={{"source": {images}}}, unpacked={size},
                                                     files=(data.RemoteFile(({url!r},), {size}, {md5!r}),))
print("ready", flush=True)
run.command(data.main)
"""


@pytest.fixture(scope="module")
def archive():
    """A zip in TinyImageNet's layout, of photograph-sized JPEGs that take a while to decode."""
    rng, content = np.random.default_rng(0), io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for i in range(IMAGES):
            image = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8)).resize((400, 400)).save(image, "JPEG")
            archive.writestr(f"tiny-imagenet-200/train/n{i % 10}/images/{i}.JPEG", image.getvalue())
    return content.getvalue()


@pytest.fixture
def server(archive, monkeypatch):
    """Serves the archive at ten megabytes a second, with ranges; `server.starts` are the places it was asked to begin at."""
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            start = int(re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])
            self.server.starts.append(start)
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(archive) - 1}/{len(archive)}")
            self.send_header("Content-Length", str(len(archive) - start))
            self.send_header("ETag", '"one"')
            self.end_headers()
            try:
                for position in range(start, len(archive), 100_000):
                    self.wfile.write(archive[position:position + 100_000])
                    time.sleep(0.01)
            except ConnectionError:
                pass

        def log_message(self, *args):
            pass

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.starts = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


class Command:
    """`python data.py tinyimagenet` on our server."""

    def __init__(self, server, archive, folder):
        self.folder, self.archive, self.said = folder, archive, folder.with_suffix(".txt")
        self.program = COMMAND.format(here=str(Path(__file__).resolve().parent.parent), images=IMAGES, size=len(archive),
                                      url=f"http://127.0.0.1:{server.server_port}/tiny-imagenet-200.zip", md5=hashlib.md5(archive).hexdigest())

    def start(self):
        self.folder.mkdir(exist_ok=True)
        with open(self.said, "w") as said:      # a file: a pipe is at its end only when nobody at all can write to it
            process = subprocess.Popen([sys.executable, "-c", self.program, "tinyimagenet", "--data-dir", self.folder], stdout=said,
                                       stderr=subprocess.STDOUT)
        while process.poll() is None and not self.said.read_text().startswith("ready\n"):
            time.sleep(0.01)
        return process

    def assert_completes(self, process):
        assert process.wait(timeout=120) == 0, self.said.read_text()

    def complete(self):
        self.assert_completes(self.start())
        return (self.folder / "packed" / "tinyimagenet-source-32" / "images.npy").read_bytes()

    def phase(self):
        """What is being made right now."""
        if (self.folder / "tiny-imagenet-200.zip.part").exists():
            return "fetching"
        if (self.folder / ".tiny-imagenet-200.part").exists():
            return "extracting"
        if (self.folder / "packed" / "tinyimagenet-source-32.part").exists():
            return "packing"
        return None

    def assert_nothing_broken_has_a_name(self, expected):
        zipped, layout, pack = (self.folder / name for name in ("tiny-imagenet-200.zip", "tiny-imagenet-200", "packed/tinyimagenet-source-32"))
        if zipped.exists():
            assert zipped.read_bytes() == self.archive
        if layout.exists():
            assert len(list(layout.rglob("*.JPEG"))) == IMAGES
        if pack.exists():
            assert (pack / "images.npy").read_bytes() == expected

    def part(self):
        part = self.folder / "tiny-imagenet-200.zip.part"
        return part.read_bytes() if part.exists() else b""


@pytest.mark.parametrize("kills", [9, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_random_moments_the_same_command_completes(server, archive, tmp_path, kills):
    rng = random.Random(0)
    expected = Command(server, archive, tmp_path / "undisturbed").complete()
    command, killed, cycle = None, {"fetching": 0, "extracting": 0, "packing": 0}, 0
    longest = {"fetching": 1.0, "extracting": 0.15, "packing": 0.6}      # seconds, about, that each takes
    while sum(killed.values()) < kills:
        if command is None:
            cycle += 1
            command = Command(server, archive, tmp_path / f"cycle{cycle}")
        there, wanted = command.part(), min(killed, key=killed.get)
        server.starts.clear()
        process = command.start()
        while process.poll() is None and command.phase() != wanted:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, longest[wanted]))
        phase = command.phase()
        if process.poll() is None and phase:
            process.kill()
            process.wait(timeout=120)
            killed[phase] += 1
            command.assert_nothing_broken_has_a_name(expected)
            assert command.part()[:len(there)] == there or phase != "fetching"
        else:
            command.assert_completes(process)
            command.assert_nothing_broken_has_a_name(expected)
            command = None
        assert not there or all(start >= len(there) - MEGABYTE for start in server.starts)
    assert min(killed.values()) >= kills // 4
    if command is not None:
        assert command.complete() == expected
        assert not [path for path in command.folder.rglob("*") if ".part" in path.name or ".old" in path.name]
    print(f"{kills} kills, {killed}, in {cycle} cycles")


# --------------------------------------------------------------------------------------------------
# The whole experiment
# --------------------------------------------------------------------------------------------------

JOB = """
import sys
sys.path.insert(0, {here!r})
import compile, engine, run
engine.SAVE_INTERVAL, engine.SAVE_SHARE = {interval}, {share}
run.command(compile.main)
"""


def outcome(folder):
    """{file: what must be the same, to the bit}: everything but seconds and speeds."""
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for name in ("*.pt", "split.npz", "teacher.npz", "thresholds.json", "transfer/*/*", "students/*.pt", "students/*.npz") for path in folder.glob(name)}
    for path in folder.glob("scores/*.npz"):
        with np.load(path) as saved:
            found |= {f"{path.stem}/{name}": saved[name].tobytes() for name in saved.files if name != "seconds"}
    results = json.loads((folder / "results.json").read_text())
    found["results"] = [{name: value for name, value in row.items() if name not in ("seconds", "images_per_second")} for row in results["rows"]]
    return found | {"table": [row["accuracy"] for row in results["rows"]], "teacher": results["teacher"]}


@pytest.mark.parametrize("runs, kills, argv, interval", [
    (2, 4, None, 0.1),
    pytest.param(30, 4, ["--target", "digits", "--device", "cpu"], 5.0, marks=pytest.mark.slow, id="the offline main job, 30 times"),
])
def test_killed_at_random_moments_a_run_ends_in_the_same_bits(painted, tmp_path, pytestconfig, runs, kills, argv, interval):
    rng, runs = random.Random(pytestconfig.getoption("--kill-seed")), min(runs, pytestconfig.getoption("--kill-runs"))
    argv = [*(argv or [*small_run(*painted), "--augment", "crop,flip,mixup"]), "--data-dir", str(tmp_path / "data")]
    program = JOB.format(here=str(Path(__file__).resolve().parent.parent), interval=interval, share=1e9)

    def start(folder):
        return subprocess.Popen([sys.executable, "-c", program, *argv, "--run-dir", str(folder)], stdout=open(tmp_path / "said.txt", "w"), stderr=subprocess.STDOUT)
    began = time.monotonic()
    assert start(tmp_path / "undisturbed").wait() == 0, (tmp_path / "said.txt").read_text()
    duration, expected = time.monotonic() - began, outcome(tmp_path / "undisturbed")
    assert len(expected) > 20
    killed, between = 0, 0
    print(f"undisturbed: {duration:.0f} s, {len(expected)} things to compare", flush=True)
    for number in range(runs):
        folder, alive = tmp_path / f"run{number}", None
        for _ in range(kills):
            alive = start(folder)
            try:
                assert alive.wait(rng.uniform(0.1, 0.6) * duration) == 0, (tmp_path / "said.txt").read_text()
            except subprocess.TimeoutExpired:
                alive.kill()
                alive.wait()
                killed += 1
                between += any(folder.rglob("*.part"))
        assert start(folder).wait() == 0, (tmp_path / "said.txt").read_text()
        ended = outcome(folder)
        assert ended.keys() == expected.keys() and [name for name in expected if ended[name] != expected[name]] == []
        assert not list(folder.rglob("*.part")) and not list(folder.rglob("*.damaged"))
        shutil.rmtree(folder)
        print(f"run {number + 1} of {runs}: {killed} kills so far, {between} of them with a checkpoint there; the same bits", flush=True)
    assert killed >= 2 * runs and between >= runs / 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_has_a_checkpoint_written_and_says_how_to_go_on(painted, tmp_path, number):
    argv = [*small_run(*painted), "--approaches", "supervised", "--epochs", "2000", "--data-dir", str(tmp_path / "data"), "--run-dir", str(tmp_path / "run")]
    program = JOB.format(here=str(Path(__file__).resolve().parent.parent), interval=1000.0, share=0.02)      # nothing but the signal has it written
    process = subprocess.Popen([sys.executable, "-c", program, *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 100
    while not (tmp_path / "run" / "teacher.json").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(2)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert err.strip() == f"-c: stopped by {number.name}; the same command goes on from here" and "Traceback" not in err
    saved = torch.load(io.BytesIO(files.read_sealed(tmp_path / "run" / "students" / "supervised.part")), weights_only=True)
    assert saved["images"] > 0


# --------------------------------------------------------------------------------------------------
# Scores and answers
# --------------------------------------------------------------------------------------------------

@pytest.fixture
def asked(monkeypatch):
    """A list that holds after how many looks (at which batch) a signal asks to stop."""
    left = []

    def looked():
        if left:
            left[0] -= 1
        return signal.SIGTERM if left and left[0] <= 0 else 0
    for module in (engine, transfer):
        monkeypatch.setattr(module, "interrupted", looked)
    return left


def interrupted_at(looks, asked, work):
    """What `work()` gives when it is stopped at each of these looks, and asked again."""
    for look in looks:
        asked[:] = [look]
        with pytest.raises(Interrupted):
            work()
        asked.clear()
    return work()


def test_scores_go_on_from_the_batch_that_a_signal_stopped(asked, tmp_path, monkeypatch):
    teacher, images = tiny(), random_images(3000)       # of six batches
    expected, seen, forward = transfer.score_images(teacher, images), [], teacher.forward
    monkeypatch.setattr(teacher, "forward", lambda pixels: seen.append(len(pixels) if len(pixels) > 8 else 0) or forward(pixels))      # 8: to find the head
    part = tmp_path / "pool.part"

    def work(mark="these"):
        return transfer.score_images(teacher, images, checkpoint=engine.Checkpoint(part, "scoring"), mark=mark)
    found = interrupted_at([2, 1, 2], asked, work)
    assert sum(seen) == 3000 and seen.count(512) == 5       # no image twice
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    work("others")
    assert sum(seen) == 6000
    part.write_bytes(part.read_bytes()[:-1])
    assert np.array_equal(work()["mms"], expected["mms"]) and sum(seen) == 9000
    part.unlink()
    os.mkfifo(part)
    assert np.array_equal(work()["mms"], expected["mms"]) and sum(seen) == 12000


def test_another_number_of_threads_selects_the_same(painted):
    threads, teacher, images = torch.get_num_threads(), models.build("resnet18", ["a", "b", "c"]), random_images(600)
    try:
        found = []
        for number in (1, 2):
            torch.set_num_threads(number)
            found.append(transfer.score_images(teacher, images))
    finally:
        torch.set_num_threads(threads)
    one, two = found
    assert np.array_equal(one["predicted"], two["predicted"])
    assert all(np.allclose(one[name], two[name], rtol=1e-5, atol=1e-6) for name in transfer.CRITERIA)
    thresholds = {"mms": transfer.mms_threshold.threshold(one["mms"], one["predicted"], 3)}
    chosen = [transfer.select("mms", transfer.join({"pool": each}), thresholds, 50, fill="best") for each in found]
    assert len(chosen[0]) and np.array_equal(*chosen)


def test_scores_of_shards_go_on_from_the_shard_that_a_signal_stopped(painted, asked, tmp_path, monkeypatch):
    files_of_it = sorted(path for path in painted[1].rglob("*") if path.suffix == ".png")
    shards = open_shards("pool", make_shards(tmp_path / "shards", files_of_it, 5), 32, None)
    teacher, cpu, read = tiny(), torch.device("cpu"), []
    expected = transfer.score_shards(teacher, shards, cpu, transfer.CRITERIA, None, 0)
    decode = Shards.read
    monkeypatch.setattr(Shards, "read", lambda self, first, last: read.append((first, last)) or decode(self, first, last))
    found = interrupted_at([1, 4, 3], asked, lambda: transfer.score_shards(teacher, shards, cpu, transfer.CRITERIA, None, 0, engine.Checkpoint(tmp_path / "pool.part", "scoring"), "these"))
    assert read[0] == (0, 5) and [first for first, _ in read] == sorted(first for first, _ in read) and read[-1][0] > 1
    assert found.keys() == expected.keys() and all(np.array_equal(found[name], expected[name]) for name in expected)


def test_the_teachers_answers_go_on_from_where_they_were_stopped(asked, tmp_path):
    teacher, images = tiny(), random_images(3000)
    expected = engine.predict(teacher, images)
    rows = torch.arange(40)
    objective = interrupted_at([3], asked, lambda: distill.fixed_objective(teacher, images, 4.0, torch.device("cpu"), checkpoint=engine.Checkpoint(tmp_path / "x.part", "answers"), mark="m"))
    assert objective(expected[:40], None, rows).item() == 0.0


@pytest.mark.parametrize("ema", [0.0, 0.8])
def test_a_training_stopped_while_it_is_evaluated_goes_on_from_there(tmp_path, ema):
    images, labels = random_images(128), np.arange(128) % 3
    recipe = dataclasses.replace(RECIPES["quick"].student, epochs=3, batch_size=32, lr=0.01, ema=ema)

    def work(evaluate, folder):
        torch.manual_seed(0)
        network, steps = tiny(), []
        objective = engine.cross_entropy(labels, torch.device("cpu"))
        training = engine.train(network, images, np.arange(128), lambda *given: steps.append(1) or objective(*given), recipe, seed=0, device=torch.device("cpu"),
                                checkpoint=tmp_path / folder, label="student", evaluate=evaluate)
        return training, network, len(steps)
    expected, whole, _ = work(lambda network: 0.5, "a.part")

    def stopped(network):
        with torch.no_grad():       # whatever an evaluation that is stopped leaves of what it looks at
            [value.zero_() for value in network.parameters() if ema]
        raise Interrupted(signal.SIGTERM)
    with pytest.raises(Interrupted):
        work(stopped, "b.part")
    found, network, steps = work(lambda network: 0.5, "b.part")
    assert steps == 8 and found.history == expected.history
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in whole.state_dict().items()) == (not ema)      # the average was zeroed, the weights were not
    saved = torch.load(io.BytesIO(files.read_sealed(tmp_path / "b.part")), weights_only=True)
    assert saved["history"] == expected.history[:len(saved["history"])]


def test_an_evaluation_goes_on_from_the_batch_that_a_signal_stopped(asked, tmp_path, monkeypatch):
    network, images, labels = tiny(), random_images(3000), np.arange(3000) % 3
    split = Packed(images, labels, ["a", "b", "c"], None, np.arange(3000), "made")
    target, cpu = Target(split, split, split.classes), torch.device("cpu")
    expected, seen, forward = TeacherTrain.evaluate(network, target, np.arange(2000), tmp_path / "whole.npz", cpu), [], network.forward
    monkeypatch.setattr(network, "forward", lambda pixels: seen.append(len(pixels)) or forward(pixels))
    found = interrupted_at([2, 1], asked, lambda: TeacherTrain.evaluate(network, target, np.arange(2000), tmp_path / "student.npz", cpu))
    assert found == expected and sum(seen) == 5000      # no image twice
    assert (tmp_path / "student.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()
    engine.remove_checkpoints(tmp_path / "student.part")
    assert not list(tmp_path.glob("student*.part"))


def test_what_killed_runs_have_left_goes_with_the_next_one(flags, finished, execute):
    left = [Path("runs/colours") / name for name in ("teacher.part", "teacher.test.part", "students/mms.part", "students/mms.answers.part", "students/mms.confidence.1-of-2.part")]
    for path in left:
        path.write_bytes(b"x")
    assert execute(compile.main, flags)[0] == 0 and not [path for path in left if path.exists()]


@pytest.mark.parametrize("given, said", [([], "the same command goes on from here"), (["--restart"], "the same command without --restart goes on from here"),
                                         (["--restart-from=students"], "the same command without --restart-from goes on from here")])
def test_who_is_stopped_is_told_what_goes_on(execute, given, said):
    def main(argv):
        raise Interrupted(signal.SIGTERM)
    status, out, err = execute(main, given)
    assert status == 143 and err == f"\ncompile.py: stopped by SIGTERM; {said}\n"


def test_a_single_run_may_follow_one_of_several_seeds_in_the_same_folder(flags, execute):
    given = [*flags, "--approaches", "balanced"]
    assert [execute(compile.main, [*given, *more])[::2] for more in (["--seeds", "0,1"], [], ["--seeds", "0,1"])] == [(0, "")] * 3


def test_restart_of_several_seeds_deletes_nothing_where_one_is_held_and_leaves_what_others_write(flags, execute):
    given = [*flags, "--approaches", "balanced", "--seeds", "0,1"]
    assert execute(compile.main, given)[0] == 0
    holder = subprocess.Popen([sys.executable, "-c", f"import sys; sys.path.insert(0, {str(Path(files.__file__).parent)!r})\nimport files, time\n"
                               "files.hold('runs/colours/seed-1'); print('held', flush=True); time.sleep(100)"], stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    before = {path: path.stat().st_mtime_ns for path in Path("runs/colours").rglob("*") if path.is_file() and not path.name.startswith(".")}
    status, out, err = execute(compile.main, [*given, "--restart"])
    files.let_go()
    assert status == 2 and "runs/colours/seed-1 is in use by process" in err and before == {path: path.stat().st_mtime_ns for path in before}
    holder.kill()
    holder.wait()
    others = [Path("runs/colours") / name for name in (f"seed-7/.teacher.pt.{os.getppid()}.part", f".results.json.{os.getppid()}.part", ".results.md.999999999.part")]
    for path in others:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    assert execute(compile.main, given)[0] == 0 and [path.exists() for path in others] == [True, True, False]


def test_restart_of_several_seeds_clears_all_of_them_before_the_first_begins(flags, execute, monkeypatch):
    argv = [*flags, "--approaches", "balanced", "--seeds", "0,1"]
    assert execute(compile.main, argv)[0] == 0 and Path("runs/colours/results.json").exists()

    def killed(*args):
        raise KeyboardInterrupt
    with monkeypatch.context() as once:
        once.setattr(compile, "train_teacher", killed)
        assert execute(compile.main, [*argv, "--epochs", "3", "--restart"])[0] == 130
    left = {path.relative_to("runs/colours").as_posix() for path in Path("runs/colours").rglob("*") if path.is_file() and not path.name.startswith(".")}
    assert left == {f"seed-{seed}/{name}" for seed in (0, 1) for name in ("config.json", files.LEDGER)}
    assert execute(compile.main, [*argv, "--epochs", "3"])[0] == 0
    assert "differ in more than the seed" not in Path("runs/colours/results.md").read_text()
    assert execute(compile.main, [*flags, "--approaches", "balanced", "--epochs", "3", "--seed", "1", "--lr", "0.02", "--run-dir", "runs/colours/seed-1", "--restart-from", "students"])[0] == 0
    assert report.collect(record.Experiment("runs/colours"))["notes"][0] == "The seeds differ in more than the seed, so that they are no repetitions: lr."
