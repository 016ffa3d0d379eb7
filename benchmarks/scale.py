"""Whether scoring streams: peak memory and time of scoring packed images, and JPEGs in a folder and
in tar shards that are decoded at 224x224 meanwhile; and of selecting from ten million scores.

The network is tiny, and each size has a process of its own. What ten million images take is the
peak of the largest size and, for each image more, its place in the source and its scores, whose
cost is measured with ten million blank images, in batches as at 224x224, with nothing to decode.

    python benchmarks/scale.py      # takes 3 GB of disk for a while
"""
import pickle
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import transfer
from benchmarks import measuring
from kd import engine, scoring
from kd.classifier import Classifier
from kd.settings import resolve

TEN_MILLION, CLASSES, BUCKET = 10_000_000, 100, 500


def write_packed(folder, count):
    np.lib.format.open_memmap(folder / "images.npy", "w+", np.uint8, (count, 32, 32, 3))[:] = 128
    return folder / "images.npy"


def write_shards(folder, count):
    for each in measuring.write_jpegs(folder / "images", count).iterdir():
        with tarfile.open(folder / f"{each.name}.tar", "w") as shard:
            shard.add(each, each.name)
    return folder / "*.tar"


def source_at(where, size):
    """images.npy, a folder or shards, at `size` pixels; or so many blank images."""
    if isinstance(where, int):
        return measuring.as_source(np.broadcast_to(np.uint8(0), (where, 8, 8, 3)))
    if where.suffix == ".npy":
        return measuring.as_source(np.load(where, mmap_mode="c"))
    settings = resolve({"target": "digits", "pack": "never", "image_size": size})
    return data.load_source(settings, f"pool={where}")


def score(where, size):
    """Returns figures, and how many bytes the place of an image in the source takes."""
    network = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4, padding=1), nn.ReLU(),
                            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    teacher = Classifier(network, "tiny", range(10), size)
    criteria = scoring.load_criteria(resolve({}))
    teacher.fitted = lambda pixels: pixels      # blank images are not enlarged
    began, source = time.perf_counter(), source_at(where, size)
    found = {"images": f"{len(source):,}", "s to open": time.perf_counter() - began}
    for rows in (np.arange(100), None):         # one batch pays for the start
        found["MiB before"] = measuring.peaks()[0]
        found["s to score"] = measuring.seconds(
            scoring.score_batches, teacher, source, rows, criteria, engine.CPU, "pool")
    own, child = measuring.peaks()
    found |= {"MiB": own, "MiB of a decoder": child if source.files else "-"}
    return found, len(pickle.dumps(source.files)) / len(source)


def select(count):
    """Fills the buckets from `count` candidates, of which two thirds pass."""
    rng, thresholds = np.random.default_rng(0), {"mms": np.full(CLASSES, 1 / 3)}
    candidates = scoring.join({"pool": {
        "index": np.arange(count), "predicted": rng.integers(0, CLASSES, count),
        "mms": rng.random(count, np.float32)}})
    took = [measuring.seconds(transfer.select, "mms", candidates, thresholds, transfer.Rules(
        BUCKET, CLASSES, {"mms": True}, fill)) for fill in ("first", "best")]
    return [f"{count:,}", *took, measuring.peaks()[0]]


def main():
    part = 100 if measuring.arguments(__doc__).trial else 1
    few, many, rows, last = 100_000 // part, TEN_MILLION // part, [], {}
    for name, size, write, counts in (
            ("packed, 32x32", 32, write_packed, (few // 10, few, few * 10)),
            ("folder, 224x224", 224, measuring.write_jpegs, (few // 10, few)),
            ("tar shards, 224x224", 224, write_shards, (few // 10, few)),
            ("blank", 224, lambda folder, count: count, (few, many))):
        for count in counts:
            with tempfile.TemporaryDirectory() as folder:
                found, place = measuring.in_a_process(score, write(Path(folder), count), size)
            rows.append([name, *found.values()])
            last[name] = found["MiB"], place
    measuring.table("Scoring", ["", *found], rows)
    cost = (rows[-1][-2] - rows[-2][-2]) / (many - few)
    measuring.table("Ten million images, extrapolated", [
        "", "bytes of a place", "bytes of scores", "MiB"], [
        [name, place, cost * 2 ** 20, MiB + (cost + place / 2 ** 20) * (TEN_MILLION - few)]
        for name, (MiB, place) in last.items() if "x224" in name])
    heads = ["candidates", "s, --fill first", "s, --fill best", "MiB"]
    measuring.table(f"Selecting {BUCKET * CLASSES:,} images", heads,
                    [measuring.in_a_process(select, many)])


if __name__ == "__main__":
    main()
