"""Whatever moment a run is killed at, the same command completes it and ends in the same bits."""
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import NET, ROOT, small_run
from script_files import outcome, ran

# Like compile.py, but every epoch is worth a checkpoint: a run of seconds would write none.
EAGER = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import compile
from kd import command, training
training.SAVE_INTERVAL = 0.0
command.command(compile.main)
"""


def start(flags, folder, said):
    return subprocess.Popen([sys.executable, "-c", EAGER, ROOT, *flags, "--run-dir", folder],
                            stdout=open(said, "w"), stderr=subprocess.STDOUT)


def complete(flags, folder):
    """The outcome of a run that nothing disturbs."""
    ran("compile.py", flags, "--run-dir", folder)
    assert not list(folder.rglob("*.part"))
    return outcome(folder)


def assert_same(ended, expected):
    assert len(expected) > 20 and ended.keys() == expected.keys()
    assert [name for name in expected if ended[name] != expected[name]] == []


def reached(folder, moment):
    """moment: a file's name, or how many files there are: neither depends on the machine."""
    return (folder / moment).exists() if isinstance(moment, str) else (
        len(list(folder.rglob("*"))) >= moment)


SLOW = pytest.param("the offline job", marks=pytest.mark.slow)


@pytest.mark.parametrize("job", ["a run of seconds", SLOW])
def test_killed_at_random_moments_a_run_ends_in_the_same_bits(painted, tmp_path, pytestconfig, job):
    rng = random.Random(pytestconfig.getoption("--kill-seed"))
    runs, pause, killed, between = 2, 0.05, 0, 0
    flags = [*small_run(painted), "--approaches", "supervised,mms", "--augment", "crop,mixup",
             "--epochs", "20", "--teacher-epochs", "20"]
    if job == "the offline job":
        runs, pause = pytestconfig.getoption("--kill-runs"), 10.0
        flags = ["--target", "digits", "--device", "cpu", "--data-dir", str(tmp_path / "data")]
    expected = complete(flags, tmp_path / "undisturbed")
    files = len(list((tmp_path / "undisturbed").rglob("*")))
    for number in range(runs):
        folder = tmp_path / f"run{number}"
        checkpoint = ("teacher.part", "students/supervised.part")[number % 2]
        for moment in (checkpoint, *sorted(rng.sample(range(5, files), 2))):
            process = start(flags, folder, tmp_path / "said.txt")
            while process.poll() is None and not reached(folder, moment):
                time.sleep(0.002)
            time.sleep(rng.uniform(0, pause))
            process.kill()
            killed += process.wait() == -signal.SIGKILL
            between += any(folder.rglob("[!.]*.part"))
        assert_same(complete(flags, folder), expected)
        shutil.rmtree(folder)
    assert killed >= 2 * runs and between


TELLING = NET.replace("    def forward(self, pixels):\n", """
    steps = 0

    def forward(self, pixels):
        self.steps += self.training
        if self.steps == 5:
            print("it learns", flush=True)
""")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_has_everything_saved_and_says_how_to_resume(painted, tmp_path, number):
    (tmp_path / "net.py").write_text(TELLING)
    process = subprocess.Popen(
        [sys.executable, ROOT / "TeacherTrain.py", "--target", f"colours={painted / 'colours'}",
         "--teacher-arch", f"{tmp_path / 'net.py'}:make", "--teacher-epochs", "1000000",
         "--data-dir", painted / "data", "--run-dir", tmp_path / "run", "--device", "cpu"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert "it learns\n" in iter(process.stdout.readline, "")
    for each in (number, signal.SIGTERM):       # as where torchrun asks as well
        process.send_signal(each)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert said == "\nInterrupted. Run the same command again to resume.\n"
    saved = torch.load(tmp_path / "run/teacher.part", weights_only=True)
    assert saved["images"] >= 5 * 64
    assert not (tmp_path / "run/teacher.pt").exists()
