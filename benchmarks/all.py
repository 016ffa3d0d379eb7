"""The table of the README's "Speed": every benchmark of this folder that needs no data, one after the other, on a quiet machine.

    python benchmarks/all.py > speed.json       # under 20 minutes on two cores
"""
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPEATS = 5


def seconds(command):
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=HERE.parent)
    return time.perf_counter() - began


def start_up():
    """Seconds to `compile.py --help`, and to import torch and torchvision alone, taking turns."""
    ways = {"ours": [sys.executable, "compile.py", "--help"], "bare": [sys.executable, "-c", "import torch, torchvision"]}
    for command in ways.values():
        seconds(command)
    rounds = [{way: seconds(command) for way, command in ways.items()} for _ in range(REPEATS)]
    return {way: round(statistics.median(r[way] for r in rounds), 2) for way in ways} | {
        "ratio": round(statistics.median(r["ours"] / r["bare"] for r in rounds), 3)}


def of(script, *arguments):
    print(f"{script} {' '.join(arguments)}", file=sys.stderr, flush=True)
    return json.loads(subprocess.run([sys.executable, str(HERE / script), *arguments], check=True, stdout=subprocess.PIPE).stdout)


def main():
    began = time.monotonic()
    found = {"stages": of("speed.py"), "usual way, batch 64": of("usual.py", "--batch-size", "64"), "usual way, batch 256": of("usual.py", "--batch-size", "256"),
             "scale": of("scale.py"), "processes": of("processes.py"), "start-up": start_up()}
    print(json.dumps(found | {"seconds": round(time.monotonic() - began)}, indent=2))


if __name__ == "__main__":
    main()
