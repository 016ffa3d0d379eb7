"""Stages run as by hand, and what their run folders hold."""
import csv
import json
from pathlib import Path

import numpy as np
from conftest import small_run
from script_files import run_here

from kd.flags import flags_of

STATES = ("*.pt", "*.npz", "*/*.pt", "*/*.npz", "transfer/*/*.npy", "transfer/*/*.csv")
MEASURED = ("seconds", "images_per_second", "digest")


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


def taught(painted, folder):
    """The flags of a run whose teacher, which is made here, knows all three colours."""
    flags = [*small_run(painted), "--teacher-batch-size", "16", "--teacher-epochs", "8"]
    ran("TeacherTrain.py", flags, "--run-dir", folder)
    return flags


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
