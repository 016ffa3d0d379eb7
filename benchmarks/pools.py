"""What a selection is worth, pool by pool, at equal size and equal steps.

    python benchmarks/pools.py make /data /data/pools       # photo-polluted and related, as links
    python benchmarks/pools.py copies /data/packed/cifar10-test-32* /data/packed/caltech101-*
    python compile.py --target cifar10=/data/cifar10 --sources crawl=/data/pools/photo-polluted ...
    python benchmarks/pools.py lines RUN...                 # one JSON line per row, for pools.jsonl
    python benchmarks/pools.py table                        # pools.jsonl as Markdown
    python benchmarks/pools.py better A/students/mms.npz A/students/all.npz B/students/...

In the photo-polluted pool lie 60,000 photographs in random order: the 26 classes of TinyImageNet
that show what CIFAR10 shows (6 %), its 174 others, and 30,000 images of twelve superclasses of
CIFAR100 that show nothing of it. The labels serve to build it, and to say how much of a selection
is related. The related pool is all of CIFAR100, TinyImageNet and Caltech101 but for two copies of
CIFAR10's test images, which `copies` shows. `make` looks for CIFAR100's training images as
/data/cifar100-source/<class>/*.jpg, for /data/tiny-imagenet-200 (the figures are of 150 of the 500
images of each class) and for /data/101_ObjectCategories (816 images).
"""
import hashlib
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from kd import matching  # noqa: E402
from kd.record import Experiment  # noqa: E402

LINES = ROOT / "benchmarks" / "pools.jsonl"
RELATED = {     # TinyImageNet's classes by what CIFAR10 calls them
    "automobile": "n03100240 n04285008 n02814533 n03670208",
    "bird": "n01855672 n02002724 n02056570 n02058221",
    "cat": "n02123045 n02123394 n02124075",
    "deer": "n02423022",
    "dog": "n02085620 n02094433 n02099601 n02099712 n02106662 n02113799",
    "frog": "n01641577 n01644900",
    "ship": "n03447447 n03662601",
    "truck": "n03796401 n04146614 n04487081 n03977966"}
UNRELATED = """aquarium_fish flatfish ray shark trout orchid poppy rose sunflower tulip bottle bowl
    can cup plate apple mushroom orange pear sweet_pepper clock keyboard lamp telephone television
    bed chair couch table wardrobe bee beetle butterfly caterpillar cockroach bridge castle house
    road skyscraper cloud forest mountain plain sea crab lobster snail spider worm baby boy girl man
    woman maple_tree oak_tree palm_tree pine_tree willow_tree""".split()
COPIES = {"pickup_truck_s_000169.jpg", "emu/image_0006.jpg"}    # of the test images 9609 and 2290
DRAWS = 10_000      # of the bootstrap


def make(data, out):
    """Links to the images of the two pools, in folders of a hundred or so: random names put them in
    random order, and say at their end which show one of CIFAR10's classes."""
    wnids = {wnid for words in RELATED.values() for wnid in words.split()}
    data, out = Path(data).resolve(), Path(out)
    tiny = [(path, "-related" if path.parents[1].name in wnids else "-other") for path in
            sorted(data.glob("tiny-imagenet-200/train/*/images/*.JPEG"))]
    unrelated = [(path, "-other") for name in UNRELATED for path in
                 sorted((data / "cifar100-source" / name).glob("*.jpg"))]
    _link(out / "photo-polluted", tiny + unrelated)
    others = [path for folder in ("cifar100-source", "101_ObjectCategories")
              for path in sorted((data / folder).glob("*/*.jpg"))]
    _link(out / "related", [(path, "") for path in [each for each, _ in tiny] + others
                            if not str(path).endswith(tuple(COPIES))])


def _link(folder, files):
    """files: [(path, what its link's name ends in)]."""
    for path, end in files:
        name = hashlib.sha256(f"{path.parent.name}/{path.name}".encode()).hexdigest()[:12]
        link = folder / name[:2] / f"{name}{end}{path.suffix}"
        link.parent.mkdir(parents=True, exist_ok=True)
        os.symlink(path, link)
    print(f"{len(files):,} images in {folder}")


def copies(target, *sources, most=5):
    """Prints the images of packed sources that correlate most with one of the target's: a copy
    stands out by more than 0.99, or, of another size, above skies and walls, by eye."""
    def unit(pixels):
        rows = torch.from_numpy(np.array(pixels)).flatten(1).float()
        rows -= rows.mean(1, keepdim=True)
        return rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-6)
    theirs = unit(np.load(Path(target) / "images.npy"))
    for source in sources:
        images, found = np.load(Path(source) / "images.npy", mmap_mode="r"), []
        for start in range(0, len(images), 1000):
            best, which = (unit(images[start:start + 1000]) @ theirs.T).max(1)
            found += zip(best.tolist(), range(start, len(images)), which.tolist(), strict=False)
        for value, row, which in sorted(found, reverse=True)[:most]:
            print(f"{Path(source).name} {row} and {which}: {value:.3f}")


def lines(*folders):
    """Prints a line for each student of each run folder, POOL or POOL-SEED."""
    for folder in folders:
        pool = re.sub(r"-\d+$", "", Path(folder).name)
        for record in Experiment(folder).records:
            for approach in record.approaches:
                if approach in record.students:
                    print(json.dumps(line(record, approach, pool)))


def line(record, approach, pool):
    student, settings = record.students[approach], record.settings
    found = {"pool": pool, "seed": settings.seed, "approach": approach,
             "teacher": record.teacher["files"]["teacher.pt"],
             "teacher_accuracy": record.teacher["accuracy"],
             **{name: getattr(settings, name) for name in (
                 "steps", "batch_size", "temperature", "augment")},
             **{name: student.get(name) for name in ("lr", "optimizer")},
             "images": student["transfer_size"], "confidence": student["confidence_accuracy"],
             **{name: student[name] for name in ("accuracy", "agreement", "seconds")}}
    if approach not in record.selected:
        return found
    chosen, path = record.selected[approach], record.folder / "scores" / "matched.npy"
    weights = np.ones(len(chosen.files))
    if (record.folder / f"transfer/{approach}/weights.npy").exists():
        weights = np.load(record.folder / f"transfer/{approach}/weights.npy")
    marked = ["-related." in file for file in chosen.files]
    if any(marked):
        found["related"] = float(np.average(marked, weights=weights))
    counts = np.bincount(chosen.predicted, weights, len(record.classes)) / weights.sum()
    found["smallest_class"] = float(counts.min())
    # The statistics of all candidates, in the order of the sources; data-free, of those not held
    # out, and from what the batch norms remember: another unit.
    if path.exists() and settings.calibrate == "target":
        key = record.pool["key"]
        full = np.zeros(len(key))
        full[np.searchsorted(key, chosen.key)] = weights
        found["gap"] = matching.gap(np.load(path, mmap_mode="r"), full)
    return found


def better(*files):
    """Prints the accuracy of the first student of each pair less that of the second, in points: the
    mean over the pairs, and the 95 % interval of a paired bootstrap over the test images, which are
    the same for all. files: students/*.npz, the first and the second of each pair in turn."""
    right = []
    for file in files:
        with np.load(file) as saved:
            right.append((saved["predicted"] == saved["labels"]).astype(float))
    difference = 100 * (np.mean(right[::2], 0) - np.mean(right[1::2], 0))
    rng = np.random.default_rng(0)
    means = [difference[rng.integers(0, len(difference), len(difference))].mean()
             for _ in range(DRAWS)]
    print(difference.mean(), *np.quantile(means, (0.025, 0.975)))


def mean(rows, name, scale=100.0, form=".2f"):
    """Mean and deviation of those of the rows that have it."""
    values = [scale * row[name] for row in rows if row.get(name) is not None]
    spread = f" ± {np.std(values, ddof=1):{form}}" if len(values) > 1 else ""
    return f"{np.mean(values):{form}}{spread}" if values else "-"


def table():
    """Prints pools.jsonl, a table per pool and a row per approach."""
    lines = [json.loads(each) for each in LINES.read_text().splitlines()]
    heads = ("approach", "seeds", "images", "related %", "smallest class %", "gap",
             "confidence set %", "agreement %", "test %")
    for pool in dict.fromkeys(line["pool"] for line in lines):
        print(f"\n{pool}\n\n| {' | '.join(heads)} |\n|---|{'---:|' * (len(heads) - 1)}")
        of_pool = [line for line in lines if line["pool"] == pool]
        for approach in dict.fromkeys(line["approach"] for line in of_pool):
            rows = [line for line in of_pool if line["approach"] == approach]
            images = np.mean([row["images"] for row in rows])
            cells = [approach, str(len(rows)), f"{images:,.0f}", mean(rows, "related", form=".1f"),
                     mean(rows, "smallest_class"), mean(rows, "gap", 1.0),
                     *(mean(rows, name) for name in ("confidence", "agreement", "accuracy"))]
            print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    command, *given = sys.argv[1:]
    {"make": make, "copies": copies, "table": table, "lines": lines, "better": better}[command](
        *given)
