"""Two processes of torchrun, a thread each, against one process with two threads: the same work, images a second, and what they select.

The work is a run on the built-in digits from teacher to student. The run of two processes is given the teacher of the first, so that the
scores can be compared; its own teacher is trained in a third run.

    python benchmarks/processes.py          # JSON on standard output
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
FLAGS = ("--target", "digits", "--approaches", "mms", "--teacher-epochs", "4", "--epochs", "8", "--device", "cpu")


def run(processes, folder, *flags):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    subprocess.run([sys.executable, *launcher, str(ROOT / "compile.py"), *FLAGS, *flags, "--run-dir", str(folder)], check=True, cwd=folder.parent,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL if processes > 1 else None, env=os.environ | {"OMP_NUM_THREADS": str(2 // processes)})


def speeds(folder):
    scored = [np.load(path) for path in sorted((folder / "scores").glob("*.npz"))]
    return {"teacher training": round(json.loads((folder / "teacher.json").read_text())["images_per_second"]),
            "scoring": round(sum(len(s["predicted"]) for s in scored) / sum(float(s["seconds"]) for s in scored)),
            "distillation": round(json.loads((folder / "students" / "mms.json").read_text())["images_per_second"])}


def main():
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        one, two, given = (Path(folder) / name for name in ("one", "two", "given"))
        run(1, one)
        run(2, two)
        run(2, given, "--teacher-checkpoint", str(one / "teacher.pt"))
        alone, together = ([np.load(path) for path in sorted((run_of / "scores").glob("*.npz"))] for run_of in (one, given))
        same = all(np.array_equal(a["predicted"], b["predicted"]) for a, b in zip(alone, together))
        difference = max(float(np.abs(a[name] - b[name]).max() / np.abs(a[name]).max()) for a, b in zip(alone, together) for name in ("mms", "entropy"))
        rows = [(run_of / "transfer" / "mms" / "manifest.csv").read_text().splitlines() for run_of in (one, given)]
        chosen = [{tuple(row.split(",")[:2]) for row in lines} for lines in rows]
        print(json.dumps({"one process, two threads": speeds(one), "two processes, one thread each": speeds(two), "same predictions": same,
                          "largest difference of a score": difference, "selected": len(chosen[0]) - 1, "selected by one of them alone": len(chosen[0] ^ chosen[1])}, indent=2))


if __name__ == "__main__":
    main()
