"""Scripts run in this process, and run folders that a test may change."""
import contextlib
import io
import os
import runpy
import shutil
import signal
import sys
from types import SimpleNamespace

from conftest import ROOT

from kd import command


def run_here(script, *argv):
    """As conftest.run_script, without the seconds that importing torch takes."""
    out, err, before, code = io.StringIO(), io.StringIO(), sys.argv, 0
    handlers = {number: signal.getsignal(number) for number in command.STOPPING}
    sys.argv = [str(ROOT / script), *map(str, argv)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.argv = before
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def linked(finished, folder):
    """A run folder whose files are links to those of `finished`: `put` what is to be changed."""
    return shutil.copytree(finished, folder, copy_function=os.link,
                           ignore=shutil.ignore_patterns(".lock", ".holder"))


def put(path, content):
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def by_hand(script, painted, run):
    """The flags of a stage run by hand: the folder, and the code that its config.json names."""
    code = ["--teacher-arch", "--student-arch"][:1 + (script == "distill.py")]
    return ["--run-dir", run, *(f"{flag}={painted / 'net.py'}:make" for flag in code)]


def contents(run):
    """{name: bytes} of the files in a run folder."""
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in run.rglob("*")
            if path.is_file() and path.name not in (".lock", ".holder")}
