"""Whether scoring streams: peak memory and time for 10,000 to 1,000,000 packed images, for images in tar shards, and the selection among
10,000,000 scores.

The images are random bytes in the form of a pack, and the network is tiny, so that what is measured is what lies around it. Each
size is scored in a process of its own, after one batch that pays for the start. The memory is that of the whole process, mapped
files included.

    python benchmarks/scale.py                  # JSON on standard output; takes 3 GB of disk for a while
"""
import argparse
import io
import json
import multiprocessing
import resource
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import models
import shards
import transfer

SHARDS, IN_A_SHARD = 20, 2_000
SIZES = (10_000, 100_000, 1_000_000)
CANDIDATES, CLASSES, TRANSFER_SIZE = 10_000_000, 100, 50_000


def tiny():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    return models.Classifier(network, "tiny", list(range(10)))


def score(path, count, pipe):
    images = np.load(path, mmap_mode="c")[:count]
    teacher = tiny()
    transfer.score_images(teacher, images[:512])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    scores = transfer.score_images(teacher, images)
    pipe.send({"images": len(scores["predicted"]), "seconds": round(time.perf_counter() - began, 2),
               "peak_MB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024), "before_MB": round(before / 1024)})


def scoring(folder):
    """[{"images", "seconds", "peak_MB", "before_MB"}] for SIZES."""
    path, rng = Path(folder) / "images.npy", np.random.default_rng(0)
    with open(path, "wb") as file:      # not through a map: a process starts with the peak of the one that started it
        np.lib.format.write_array_header_2_0(file, {"descr": "|u1", "fortran_order": False, "shape": (max(SIZES), 32, 32, 3)})
        for _ in range(0, max(SIZES), 10_000):
            file.write(rng.integers(0, 256, (10_000, 32, 32, 3), np.uint8).data)
    return [in_a_process(score, path, count) for count in SIZES]


def score_in_shards(pattern, count, pipe):
    source, teacher = shards.open_shards("pool", pattern, 32, None), tiny()
    began = time.perf_counter()
    scores = transfer.score_shards(teacher, source, torch.device("cpu"), transfer.CRITERIA, None, 0)
    elapsed = time.perf_counter() - began
    pipe.send({"images": len(scores["predicted"]), "shards": count, "seconds": round(elapsed, 2),
               "peak_MB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
               "peak_MB_of_a_decoder": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)})


def scoring_in_shards(folder):
    """The same for images as PNG in tar shards, a tenth of them and all, decoded as they are read."""
    rng = np.random.default_rng(0)
    for number in range(SHARDS):
        with tarfile.open(Path(folder) / f"{number:03}.tar", "w") as shard:
            for member in range(IN_A_SHARD):
                content = io.BytesIO()
                Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(content, "PNG")
                info = tarfile.TarInfo(f"{member:06}.png")
                info.size = content.tell()
                content.seek(0)
                shard.addfile(info, content)
    return [in_a_process(score_in_shards, f"{folder}/{{000..{count - 1:03}}}.tar", count) for count in (SHARDS // 10, SHARDS)]


def in_a_process(function, *arguments):
    """What a function sends through the pipe that is its last argument, run by a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=function, args=(*arguments, theirs))
    process.start()
    theirs.close()      # so that the end of the process is the end of the pipe
    found = ours.recv()
    process.join()
    return found


def selection():
    """Seconds of filling the buckets from CANDIDATES, of which two thirds pass, first come first served and best first."""
    rng = np.random.default_rng(0)
    scores = rng.random(CANDIDATES, np.float32)
    candidates = transfer.Candidates(("pool",), np.zeros(CANDIDATES, np.int64), np.arange(CANDIDATES),
                                     {"predicted": rng.integers(0, CLASSES, CANDIDATES), "mms": scores})
    seconds = {}
    for fill in ("first", "best"):
        began = time.perf_counter()
        chosen = transfer.select("mms", candidates, {"mms": np.full(CLASSES, 1 / 3)}, TRANSFER_SIZE // CLASSES, fill)
        seconds[fill] = round(time.perf_counter() - began, 2)
        if len(chosen) != TRANSFER_SIZE:
            raise SystemExit(f"selected {len(chosen)} images, not {TRANSFER_SIZE}")
    return seconds


def main():
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = {"threads": torch.get_num_threads(), "scoring": scoring(folder), "scoring_in_shards": scoring_in_shards(folder)}
    print(json.dumps(found | {"selection_seconds_of_10_million": selection()}, indent=2))


if __name__ == "__main__":
    main()
