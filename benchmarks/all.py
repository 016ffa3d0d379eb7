"""All figures of docs/speed.md, one benchmark after the other, on a quiet machine.

    python benchmarks/all.py > speed.md
"""
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.measuring import arguments, seconds, table, taking_turns


def python(*command, output=subprocess.DEVNULL):
    """Runs a Python command in the folder of the project. Returns its seconds."""
    return seconds(partial(subprocess.run, check=True, stdout=output, cwd=sys.path[0]),
                   [sys.executable, *command])


def main():
    trial = ["--trial"] * arguments(__doc__).trial
    took = {name: python(f"benchmarks/{name}.py", *trial, output=None)
            for name in ("speed", "usual", "scale", "processes", "pack")}
    commands = ("compile.py --help", "-c import compile", "-c import torch, torchvision")
    found = taking_turns({each: partial(python, *each.split(" ", 1)) for each in commands}, 5)
    table("Start-up, seconds, medians", list(found), [map(np.median, found.values())])
    table("What the benchmarks took, seconds", list(took), [took.values()])


if __name__ == "__main__":
    main()
