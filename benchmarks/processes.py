"""Two processes of torchrun, a thread each, against one with two threads, on the built-in digits. A
third run, of two processes that are given the teacher of the first, compares scores and selection.

    python benchmarks/processes.py
"""
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.measuring import arguments, table

FLAGS = (f"{sys.path[0]}/compile.py", "--target", "digits", "--approaches", "mms",
         "--threshold", "published", "--device", "cpu", "--teacher-epochs", "4", "--epochs", "8")
TRIAL = ("--teacher-epochs", "1", "--epochs", "1", "--limit", "600")


def run(processes, folder, *more):
    """Returns images per second of teacher training, scoring and distillation."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}")
    subprocess.run([sys.executable, *torchrun[:4 * (processes - 1)], *FLAGS,
                    *more, "--run-dir", folder], cwd=folder.parent, stdout=sys.stderr, check=True,
                   env=os.environ | {"OMP_NUM_THREADS": str(2 // processes)})
    teacher, student, *scored = (json.loads(path.read_text()) for path in (
        folder / "teacher.json", folder / "students/mms.json", *folder.glob("scores/*.json")))
    scoring = sum(each["images"] for each in scored) / sum(each["seconds"] for each in scored)
    return teacher["images_per_second"], scoring, student["images_per_second"]


def main():
    more = TRIAL if arguments(__doc__).trial else ()
    with tempfile.TemporaryDirectory() as folder:
        one, two, given = (Path(folder) / name for name in ("one", "two", "given"))
        speeds = run(1, one, *more), run(2, two, *more)
        run(2, given, *more, "--teacher-checkpoint", one / "teacher.pt")
        chosen = [{tuple(row.split(",")[:2]) for row in path.read_text().splitlines()[1:]}
                  for path in (each / "transfer/mms/manifest.csv" for each in (one, given))]
        pairs = [(np.load(path), np.load(given / "scores" / path.name))
                 for path in one.glob("scores/*.npz")]
        differing = sum((a["predicted"] != b["predicted"]).sum() for a, b in pairs)
        apart = max(np.abs(a[name] - b[name]).max() / np.abs(a[name]).max()
                    for a, b in pairs for name in ("mms", "entropy"))
    table("Images per second", ["", "one process, two threads", "two processes, a thread each",
                                "ratio"],
          [[stage, alone, shared, shared / alone] for stage, alone, shared in zip(
              ("teacher training", "scoring", "distillation"), *speeds, strict=True)])
    table("With one teacher", ["predictions that differ", "largest difference of scores, relative",
                               "images selected", "by one of the two alone"],
          [[differing, apart, len(chosen[0]), len(chosen[0] ^ chosen[1])]])


if __name__ == "__main__":
    main()
