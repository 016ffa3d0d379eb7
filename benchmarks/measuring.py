"""What the benchmarks share: ways that take turns, processes of their own, images, tables."""
import argparse
import multiprocessing
import re
import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from kd.packing import Packed
from kd.training import Watch, train


def arguments(doc, **defaults):
    """What is given of these flags and of --trial."""
    parser = argparse.ArgumentParser(description=doc.partition("\n\n")[0])
    parser.add_argument("--trial", action="store_true", help="tiny sizes, to see that it runs")
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", default=default)
    args = parser.parse_args()
    hush()
    return args


def hush():
    """Standard output is for the tables. What the tool says goes to standard error."""
    sys.stdout = sys.stderr


def table(title, heads, rows):
    """Prints a Markdown table of texts and numbers."""
    cells = [[each if isinstance(each, str) else f"{each:,.0f}" if abs(each) >= 100 else
              f"{each:.3g}" for each in row] for row in rows]
    rule = ["---", *["---:"] * (len(heads) - 1)]
    print(f"\n{title} ({torch.get_num_threads()} threads, torch {torch.__version__}):\n",
          *(f"| {' | '.join(row)} |" for row in (heads, rule, *cells)), sep="\n",
          file=sys.__stdout__, flush=True)


def taking_turns(ways, rounds):
    """{name: (rounds,) figures} of {name: a function that gives one}. They take turns, so that a
    noisy machine disturbs all of them."""
    found = [{name: way() for name, way in ways.items()} for _ in range(rounds)]
    return {name: np.array([each[name] for each in found]) for name in ways}


def seconds(function, *arguments):
    began = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - began


def in_a_process(function, *arguments):
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), hush) as pool:
        return pool.submit(function, *arguments).result()


def peaks():
    """(MiB that this process has had at most, memory-mapped files included; and the largest of
    those that it started). Linux alone: ru_maxrss of oneself begins with that of the parent."""
    own = re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]
    return int(own) / 1024, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024


def as_source(images):
    """(N, size, size, 3) uint8 as a source that is packed."""
    return Packed("random", images, None, None, None, None, "", "", 0)


def trained(classifier, images, objective, recipe, device, after_epoch=None):
    """Trains on all images, and returns the classifier."""
    with tempfile.TemporaryDirectory() as folder:
        watch = Watch(Path(folder) / "part", "", "benchmark", after_epoch, every=1)
        train(classifier, images, np.arange(len(images)), objective, recipe, seed=0, device=device,
              watch=watch)
    return classifier


def write_jpegs(folder, count):
    """Crops of a photograph, 64x64 pixels, a thousand in each folder below `folder`."""
    photograph, rng = load_sample_image("china.jpg"), np.random.default_rng(0)
    for number in range(count):
        y, x = rng.integers(0, (363, 576))
        path = folder / f"{number // 1000:05}" / f"{number:08}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photograph[y:y + 64, x:x + 64]).save(path, quality=90)
    return folder
