"""Which images to distil from, and how: a grid of (selection, size, seed, recipe) under one teacher, the same steps for every cell.

    python benchmarks/ablation.py --run-dir runs/cifar10 --grid selection       # after TeacherTrain.py with that run folder
    python benchmarks/ablation.py --grid selection --table                      # what is there, as Markdown; computes nothing

Each cell becomes one line of benchmarks/ablation/<grid>.jsonl; what is there is not run again, an interrupted cell goes on from its last
epoch, and a line tells by which teacher it was made. HELD_OUT images of the sources are in no transfer set: `agreement` is the share of them to which the student gives
the teacher's class, a choice that needs no image of the target. `confidence` is the accuracy on the confidence set; `test` that on the test split.
"""
import argparse
import dataclasses
import functools
import itertools
import json
import math
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from sklearn.cluster import MiniBatchKMeans
from sklearn.decomposition import PCA

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import data
import distill
import engine
import models
import transfer
from files import UserError, say, write_atomically, write_text
from run import RECIPES, command, open_stage
from TeacherTrain import saved_split

HELD_OUT = 4_000
STEPS = 1_500
BASE = dataclasses.replace(RECIPES["best"].student, augment="crop,flip", temperature=4.0, batch_size=256, lr=0.2, momentum=0.9, weight_decay=5e-4,
                           schedule="onecycle", ema=0.0)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One student. changes: what differs from BASE, ((field of Recipe, value), ...), and ("start", "teacher") where it begins with the teacher's weights."""

    selection: str
    size: int | None = None         # None: all that there are
    seed: int = 0
    steps: int = STEPS
    changes: tuple = ()

    @property
    def recipe(self):
        return dataclasses.replace(BASE, steps=self.steps, **{name: value for name, value in self.changes if name != "start"})

    @property
    def key(self):
        changes = "".join(f" {name}={value}" for name, value in self.changes)
        return f"{self.selection} {'all' if self.size is None else self.size} {self.steps} steps{changes} seed {self.seed}"


def cells_of_selection(seeds):
    """At equal size and equal steps: does the choice of images matter?"""
    for seed, size in itertools.product(seeds, (15_000, 5_000, 50_000)):
        yield from (Cell(name, size, seed) for name in (*SELECTIONS, ORACLE) if name != "all" and (name, size) != (ORACLE, 50_000))
    yield from (Cell(name, None, seed) for name in ("all", *SAMPLINGS) for seed in seeds)


def cells_of_recipe(seeds):
    """Each ingredient alone, over everything there is: added to BASE or taken from it."""
    for seed in seeds:
        yield Cell("all", None, seed)
        for changes in ({"augment": "none"}, {"augment": "flip"}, {"augment": "crop,flip,mixup"}, {"augment": "crop,flip,cutmix"}, {"augment": "crop,flip,mixup,cutmix"},
                        {"temperature": 1.0}, {"temperature": 2.0}, {"temperature": 10.0}, {"momentum": 0.0}, {"weight_decay": 0.0}, {"schedule": "constant", "lr": 0.05},
                        {"start": "teacher"}, {"start": "teacher", "lr": 0.05}, {"start": "teacher", "lr": 0.02}, {"start": "teacher", "lr": 0.05, "temperature": 1.0},
                        {"start": "teacher", "lr": 0.05, "augment": "crop,flip,mixup"}, {"start": "teacher", "lr": 0.05, "augment": "crop,flip,cutmix"},
                        {"start": "teacher", "lr": 0.05, "ema": 0.999}, {"ema": 0.999}, {"lr": 0.1}, {"lr": 0.4}, {"batch_size": 64, "lr": 0.05}, {"batch_size": 128, "lr": 0.1}):
            steps = STEPS * BASE.batch_size // changes.get("batch_size", BASE.batch_size)       # the same number of images
            yield Cell("all", None, seed, steps, tuple(changes.items()))


def cells_of_mixed(seeds):
    """The same question where most of the pool has nothing to do with the target: a run folder whose sources are so."""
    for seed in seeds:
        yield from (Cell(name, 15_000, seed) for name in ("random", "mms", "balanced", "tilted", "entropy"))


GRIDS = {"selection": cells_of_selection, "recipe": cells_of_recipe, "mixed": cells_of_mixed}

# --------------------------------------------------------------------------------------------------
# What the cells share
# --------------------------------------------------------------------------------------------------


class Pool:
    """The sources, scored once, less the images that are held out.

    candidates: transfer.Candidates; held_out, usable: positions in them, (N,) int64, ascending; images: (N, 32, 32, 3) uint8.
    """

    def __init__(self, run, device):
        self.run, self.scoring = run, transfer.Scoring(run, device)
        self.candidates = self.scoring.candidates()
        self.images = np.concatenate([self.scoring.source(name).images for name in self.candidates.names])
        rng = np.random.default_rng(engine.seed_for(0, "held out"))
        self.held_out = np.sort(rng.choice(len(self.candidates), HELD_OUT, replace=False))
        self.usable = np.setdiff1d(np.arange(len(self.candidates)), self.held_out)
        self.thresholds = transfer.make_thresholds(run, self.scoring)
        self.classes = len(self.scoring.classes)

    @functools.cached_property
    def features(self):
        """What the teacher's last linear layer is given, (N, D) float32, and for each image how far the channels of each batch norm lie from
        its running mean, in standard deviations, (N, channels of all of them) float16. Kept in the run folder."""
        path = self.run / "ablation" / f"features-{self.scoring.teacher_digest}.npz"
        if not path.exists():
            found = activations(models.load(self.scoring.path, self.run.settings.teacher_arch), self.images)
            write_atomically(path, lambda file: np.savez(file, last=found[0], norms=found[1]))
        saved = np.load(path)
        return saved["last"], saved["norms"]

    @functools.cached_property
    def weights(self):
        return tilting(self.features[1])

    def best(self, badness, size):
        """The `size` images with the least badness (N,): an equal share of each predicted class, and what short classes leave, from all of them."""
        predicted, eligible = self.candidates.predicted, np.zeros(len(self.candidates), bool)
        eligible[self.usable] = True
        chosen = transfer.fill_buckets(predicted, eligible, size // self.classes, badness)
        eligible[chosen] = False
        return np.sort(np.r_[chosen, transfer.fill_buckets(np.zeros_like(predicted), eligible, size - len(chosen), badness)])

    def badness(self, name):
        """Smaller is better, by a criterion."""
        scores = self.candidates.scores[name]
        return -scores if self.scoring.criteria[name].KEEP == ">=" else scores

    def order(self, seed):
        """A random place (N,) for every image."""
        return np.random.default_rng(engine.seed_for(seed, "order")).permutation(len(self.candidates))


@torch.no_grad()
def activations(teacher, images):
    """(input of the head (N, D) float32, mean of each channel before each batch norm, normalised as that one does it (N, C) float16)."""
    last, norms = [], []
    parent, name = models.heads(teacher)[-1]
    getattr(parent, name).register_forward_pre_hook(lambda module, given: last.append(given[0].flatten(1)))
    for module in teacher.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.register_forward_pre_hook(lambda module, given: norms.append(
                ((given[0].mean((2, 3)) - module.running_mean) / (module.running_var + module.eps).sqrt()).half()))
    rows = []
    for batch in torch.from_numpy(images).split(engine.EVALUATION_BATCH):
        teacher.eval()(batch)
        rows.append(torch.cat(norms, 1))
        norms.clear()
    return torch.cat(last).numpy(), torch.cat(rows).numpy()


def tilting(values, directions=200, strength=0.01, steps=300):
    """Weights (N,), of mean 1, under which the mean of `values` (N, C) is 0: exp(values @ t), of all such weights the most even ones.

    That is the maximum-entropy way to make the pool look like the data that batch norms have averaged, whose mean in these units is 0 by
    definition. Solved by Newton's method in the `directions` in which the pool varies most; strength: of the ridge on t.
    """
    sample = values[np.random.default_rng(0).choice(len(values), 10_000, replace=False)].astype(np.float32)
    found = PCA(directions, svd_solver="randomized", random_state=0).fit(sample)
    axes = (found.components_ / found.explained_variance_[:, None] ** 0.5).T.astype(np.float32)
    reduced = np.concatenate([part.astype(np.float32) @ axes for part in np.array_split(values, 50)]).astype(np.float64)     # of about unit variance
    tilt = np.zeros(directions)

    def objective(tilt):
        exponent = reduced @ tilt
        highest = exponent.max()
        return highest + np.log(np.exp(exponent - highest).mean()) + strength / 2 * tilt @ tilt
    for _ in range(steps):
        exponent = reduced @ tilt
        weight = np.exp(exponent - exponent.max())
        weight /= weight.sum()
        gradient = weight @ reduced
        hessian = (reduced * weight[:, None]).T @ reduced - np.outer(gradient, gradient) + strength * np.eye(directions)
        step = np.linalg.solve(hessian, gradient + strength * tilt)
        scale = 1.0
        while objective(tilt - scale * step) > objective(tilt) and scale > 1e-4:
            scale /= 2
        tilt -= scale * step
        if np.abs(scale * step).max() < 1e-6:
            break
    exponent = reduced @ tilt
    weight = np.exp(exponent - exponent.max())
    return weight / weight.mean()


def _drawn(weight, usable, size, seed):
    """`size` of the usable images, each as likely as its weight (N,): without replacement, by exponential races."""
    races = np.random.default_rng(engine.seed_for(seed, "races")).exponential(size=len(weight)) / np.maximum(weight, 1e-12)
    return np.sort(usable[np.argpartition(races[usable], size - 1)[:size]])


def _tilted(power):
    """As if the sources had the teacher's batch-norm statistics: each image as likely as that power of its weight."""
    return lambda pool, size, seed: _drawn(pool.weights ** power, pool.usable, size, seed)


def _weighted(power):
    """The same with replacement: what is likely comes often."""
    def chosen(pool, size, seed):
        share = pool.weights[pool.usable] ** power
        return np.sort(np.random.default_rng(engine.seed_for(seed, "weighted")).choice(pool.usable, size, p=share / share.sum()))
    return chosen


def _coverage(pool, size, seed):
    """An equal share of each of size / 10 clusters of the teacher's features, drawn at random; what small clusters leave, from the others."""
    last = pool.features[0]
    clusters = MiniBatchKMeans(size // 10, random_state=seed, batch_size=4096, n_init=1, max_iter=20).fit(last[pool.usable]).predict(last)
    eligible, order = np.zeros(len(last), bool), pool.order(seed)
    eligible[pool.usable] = True
    chosen = np.empty(0, np.int64)
    while len(chosen) < size:       # a round fills every cluster that has more by its share of what is lacking
        left = np.unique(clusters[eligible])
        more = transfer.fill_buckets(clusters, eligible, max(1, (size - len(chosen)) // len(left)), order)[:size - len(chosen)]
        eligible[more] = False
        chosen = np.r_[chosen, more]
    return np.sort(chosen)


def _random(pool, size, seed):
    return np.sort(np.random.default_rng(engine.seed_for(seed, "random")).choice(pool.usable, size, replace=False))


def _first(name):
    """What passes the thresholds first, in the order of the sources; what is lacking, the next best."""
    def chosen(pool, size, seed):
        badness = pool.badness(name)
        passing = transfer.passes(pool.candidates.scores[name], pool.candidates.predicted, pool.thresholds[name], pool.scoring.criteria[name].KEEP)
        place = np.where(passing, np.arange(len(passing)), len(passing) + np.argsort(np.argsort(badness, kind="stable")))
        return pool.best(place, size)
    return chosen


SELECTIONS = {
    "all": lambda pool, size, seed: pool.usable,
    "random": _random,
    "balanced": lambda pool, size, seed: pool.best(pool.order(seed), size),
    "mms": lambda pool, size, seed: pool.best(pool.badness("mms"), size),
    "mms, lowest": lambda pool, size, seed: pool.best(-pool.badness("mms"), size),
    "mms, first": _first("mms"),
    "entropy": lambda pool, size, seed: pool.best(pool.badness("entropy"), size),
    "confidence": lambda pool, size, seed: pool.best(pool.badness("confidence"), size),
    "coverage": _coverage,
    "tilted": _tilted(1.0),
    "tilted, root": _tilted(0.5),
    "energy": lambda pool, size, seed: pool.best(pool.badness("energy"), size),
}
ORACLE = "the target's own"     # training images, without their labels: what no one has, and how much a selection could be worth at most
SAMPLINGS = {"weighted": _weighted(1.0), "weighted, root": _weighted(0.5)}      # of everything, an image for each place in a batch


def run_cell(cell, pool, run, target, device):
    """What a student of that cell reached."""
    folder, seed = run / "ablation", engine.seed_for(cell.seed, "student")
    size = cell.steps * cell.recipe.batch_size if cell.selection in SAMPLINGS else cell.size
    images, (train, confidence) = pool.images, saved_split(run, len(target.train))
    if cell.selection == ORACLE:
        images, chosen = target.train.images, np.sort(np.random.default_rng(engine.seed_for(cell.seed, "oracle")).choice(train, size, replace=False))
    else:
        chosen = (SELECTIONS | SAMPLINGS)[cell.selection](pool, size, cell.seed)
    if cell.size is not None and len(chosen) != size:
        raise UserError(f"{cell.key}: {len(chosen):,} images are selected, not {cell.size:,}")
    teacher, recipe = pool.scoring.teacher, cell.recipe
    torch.manual_seed(seed)
    student = models.build(run.settings.student_arch, pool.scoring.classes)
    if ("start", "teacher") in cell.changes:
        models.inherit(student, models.load(pool.scoring.path, run.settings.teacher_arch))      # that of the pool has its batch norms folded
    objective = (distill.fixed_objective(teacher, images, recipe.temperature, device) if recipe.augment == "none"
                 else distill.live_objective(teacher, recipe.temperature, device))
    part = folder / f"{cell.key.replace(' ', '_')}.part"
    training = engine.train(student, images, chosen, objective, recipe, seed=seed, device=device, checkpoint=part, label=cell.key)
    answers = engine.predict(student, pool.images, pool.held_out, device).argmax(1).numpy()
    figures = {
        "key": cell.key, "selection": cell.selection, "size": len(chosen), "steps": cell.steps, "changes": dict(cell.changes), "seed": cell.seed,
        **({} if cell.selection == ORACLE else {
            "per_class": np.bincount(pool.candidates.predicted[chosen], minlength=pool.classes).tolist(),
            "per_source": {name: int((pool.candidates.source[chosen] == number).sum()) for number, name in enumerate(pool.candidates.names)}}),
        "loss": training.history[-1]["loss"],
        "agreement": float((answers == pool.candidates.predicted[pool.held_out]).mean()),
        "confidence": engine.accuracy(student, target.train.images, target.train.labels, confidence, device),
        "test": engine.accuracy(student, target.test.images, target.test.labels, device=device),
        "seconds": round(training.seconds), "teacher": pool.scoring.teacher_digest,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads" if device.type == "cpu" else torch.cuda.get_device_name(), "torch": torch.__version__,
    }
    part.unlink(missing_ok=True)
    return figures


# --------------------------------------------------------------------------------------------------
# The table
# --------------------------------------------------------------------------------------------------

def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def as_markdown(lines):
    """A row for each cell, its seeds taken together."""
    def mean(values, factor=100):
        spread = f" ± {factor * statistics.stdev(values):.2f}" if len(values) > 1 else ""
        return f"{factor * statistics.mean(values):.2f}{spread}"
    rows = ["| selection | images | steps | changes | seeds | confidence set % | agreement % | test % | seconds |", "|---|---:|---:|---|---:|---:|---:|---:|---:|"]
    groups = {}
    for line in lines:
        groups.setdefault((line["selection"], line["size"], line["steps"], json.dumps(line["changes"])), []).append(line)
    for (selection, size, steps, changes), group in groups.items():
        changed = ", ".join(f"{name} {value}" for name, value in json.loads(changes).items()) or "-"
        rows.append(f"| {selection} | {size:,} | {steps:,} | {changed} | {len(group)} | " + " | ".join(mean([line[name] for line in group]) for name in ("confidence", "agreement", "test"))
                    + f" | {statistics.mean(line['seconds'] for line in group):,.0f} |")
    return "\n".join(rows)


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run-dir", default="runs/cifar10", help="a run folder with a teacher (default: runs/cifar10)")
    parser.add_argument("--grid", choices=tuple(GRIDS), default="selection", help="(default: selection)")
    parser.add_argument("--seeds", default="0", help="joined by commas (default: 0)")
    parser.add_argument("--only", nargs="+", default=(), metavar="TEXT", help="run the cells alone whose key has one of these texts in it")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no cell after that time")
    parser.add_argument("--table", action="store_true", help="print what is there")
    args = parser.parse_args(argv)
    path = HERE / "ablation" / f"{args.grid}.jsonl"
    if args.table:
        return say(as_markdown(lines_of(path)))
    settings, run, _ = open_stage(["--run-dir", args.run_dir], __doc__)
    device = engine.pick_device(settings.device)
    os.makedirs(run / "ablation", exist_ok=True)
    target, pool = data.target_of(settings), Pool(run, device)
    began = time.monotonic()
    for cell in GRIDS[args.grid]([int(seed) for seed in args.seeds.split(",")]):
        there = {line["key"]: line["teacher"] for line in lines_of(path)}
        if cell.key in there or args.only and not any(text in cell.key for text in args.only):
            continue
        if time.monotonic() - began > 60 * args.minutes:
            break
        figures = run_cell(cell, pool, run, target, device)
        write_text(path, "".join(json.dumps(line) + "\n" for line in [*lines_of(path), figures]))
        say(f"{cell.key}: confidence {figures['confidence']:.2%}, agreement {figures['agreement']:.2%}, {figures['seconds']:,} s")
    return None


if __name__ == "__main__":
    command(main)
