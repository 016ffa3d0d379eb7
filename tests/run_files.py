"""Stages run in this process, and what must be the same in two run folders."""
import csv
import json
import shutil

from kd.files import let_go
from kd.flags import flags_of

STATES = ("teacher.pt", "students/*.pt", "*.npz", "*/*.npz", "transfer/*/images.npy",
          "transfer/*/manifest.csv")
MEASURED = ("seconds", "images_per_second", "digest")


def given(script, flags):
    """Those of `flags`, name and value in turn, that a script has."""
    known = {f"--{name.replace('_', '-')}" for name in flags_of(script)}
    pairs = zip(flags[::2], flags[1::2], strict=True)
    return [word for pair in pairs if pair[0] in known for word in pair]


def run_stage(module, flags, *more):
    """module.main as on a command line of its own, with the flags that it has."""
    try:
        module.main([*given(module.__name__, flags), *map(str, more)])
    finally:
        let_go()


def read(*path):
    return json.loads(path[0].joinpath(*path[1:]).read_text())


def manifest(run, approach):
    with open(run / f"transfer/{approach}/manifest.csv", newline="") as file:
        return list(csv.DictReader(file))


def copied(run, to, *without):
    """A copy of a run folder less the files and folders of these names."""
    return shutil.copytree(run, to, ignore=shutil.ignore_patterns(*without, ".lock", ".holder"))


def outcome(folder):
    """{file: what must be the same}: of states all bytes, of JSONs all but times."""
    found = {path: path.read_bytes() for pattern in STATES for path in folder.glob(pattern)}
    for path in [*folder.glob("[!c]*.json"), *folder.rglob("*/*.json")]:
        found[path] = content = read(path)
        for each in [content, *content.get("rows", ())]:
            for name in MEASURED:
                each.pop(name, None)
    return {str(path.relative_to(folder)): value for path, value in found.items()}
