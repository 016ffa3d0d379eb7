"""Scripts run in this process, as by hand, and the run folders that they leave."""
import contextlib
import csv
import io
import json
import runpy
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from conftest import ROOT

from kd import command
from kd.flags import flags_of

STATES = ("*.pt", "*.npz", "*/*.pt", "*/*.npz", "transfer/*/*.npy", "transfer/*/*.csv")
MEASURED = ("seconds", "images_per_second", "digest")


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


def put(path, content):
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def by_hand(painted, run):
    """The flags of a stage run by hand: the folder, and the code that its config.json names."""
    net = f"{painted / 'net.py'}:make"
    return ["--run-dir", run, "--teacher-arch", net, "--student-arch", net]


def contents(run):
    """{name: bytes} of the files in a run folder."""
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in run.rglob("*")
            if path.is_file() and path.name not in (".lock", ".holder")}


def given(script, flags):
    """Those of `flags`, name and value in turn, that a script has."""
    known = {f"--{name.replace('_', '-')}" for name in flags_of(Path(script).stem)}
    pairs = zip(flags[::2], flags[1::2], strict=True)
    return [word for pair in pairs if pair[0] in known for word in pair]


def ran(script, flags, *more):
    """What a script says that ends well."""
    done = run_here(script, *given(script, flags), *more)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def refused(script, flags, *more):
    """The one line with which it refuses."""
    done = run_here(script, *given(script, flags), *more)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    return done.stderr


def read(run, name):
    return json.loads((run / name).read_text())


def manifest(run, approach):
    with open(run / f"transfer/{approach}/manifest.csv", newline="") as file:
        return list(csv.DictReader(file))


def pool(run):
    """{column: (N,)} of the scores of all sources, in their order."""
    parts = [np.load(run / f"scores/{name}.npz") for name in ("pool", "more")]
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0].files}


def outcome(folder):
    """{file: what must be the same}: of states all bytes, of JSONs all but times."""
    found = {path: path.read_bytes() for pattern in STATES for path in folder.glob(pattern)}
    for path in [*folder.glob("[!c]*.json"), *folder.rglob("*/*.json")]:
        found[path] = content = read(folder, path)
        for each in [content, *content.get("rows", ())]:
            for name in MEASURED:
                each.pop(name, None)
    return {str(path.relative_to(folder)): value for path, value in found.items()}
