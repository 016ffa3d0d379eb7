"""Score the sources, select, and write the transfer set of one approach.

In:  teacher.pt, split.npz and the sources.
Out: scores/<source>.npz and scores/confidence.npz, thresholds.json,
     transfer/<approach>/{images.npy, manifest.csv, summary.json}.

The teacher looks at every source once: predicted class and all scores are saved, and an approach only
sorts numbers. With t the threshold of a class,

    mms, entropy      of the images whose score passes t[predicted], a bucket for each class
    balanced, eats    the same without a threshold (eats: from SVHN and TinyImageNet alone)
    random            as many images as mms has, without threshold or balance

    python transfer.py --approach mms
"""
import csv
import hashlib
import io
import math
import time
from dataclasses import dataclass

import numpy as np
import torch

import engine
import entropy
import mms_threshold
import models
from data import load_source, load_target, unavailable
from run import (EATS_SOURCES, STAGE_FLAGS, UserError, command, name_of, open_stage, read_json, say, stop_on,
                 write_atomically, write_json, write_text)
from TeacherTrain import saved_split

CRITERIA = {"mms": mms_threshold, "entropy": entropy}
SOURCE_SHARE = 0.25     # of the candidates of a class that pass a threshold calibrated on the sources

# --------------------------------------------------------------------------------------------------
# Scores
# --------------------------------------------------------------------------------------------------


def score_images(teacher, images, rows=None, device=torch.device("cpu"), label="scoring"):
    """One pass of the teacher. Returns {"predicted": (N,) int64, "mms", "entropy", "confidence": (N,) float32}.

    confidence is the largest probability. images: (M, H, W, 3) uint8; rows: which of them, default all.
    """
    weight = models.head_weight(teacher).to(device)

    def of_logits(logits):
        return (logits.topk(2, dim=1).indices[:, 0], *(criterion.score(logits, weight) for criterion in CRITERIA.values()),
                torch.softmax(logits, 1).amax(1))

    predicted, *scores = engine.predict(teacher, images, rows, device, label, then=of_logits)
    return {"predicted": predicted.numpy(), **{name: column.numpy().astype(np.float32)
                                               for name, column in zip((*CRITERIA, "confidence"), scores)}}


def saved_scores(path, made_from, index, compute):
    """The scores in `path`, computed and saved where they aren't there, with the seconds that it took.

    made_from: what they are the scores of, and by which teacher; index: (N,) int64, which images of the whole
    data set the rows are.
    """
    count = len(index)
    if path.exists():
        try:
            with np.load(path) as saved:
                scores = {name: saved[name] for name in saved.files}
            origin = str(scores.pop("made_from"))
            del scores["seconds"], scores["index"]
        except Exception:
            raise UserError(f"{path} is damaged: delete it and run the command again") from None
        if origin != made_from or len(scores["predicted"]) != count:
            raise UserError(f"{path} was computed from other images or by another teacher, which have changed since: use another --run-dir, or --restart")
        return scores
    began = time.monotonic()
    scores = compute()
    seconds = time.monotonic() - began
    say(f"scores: {path.stem}, {count:,} images in {seconds:,.1f} s, {count / seconds:,.0f} img/s")
    write_atomically(path, lambda file: np.savez(file, made_from=made_from, seconds=seconds, index=index, **scores))
    return scores


# --------------------------------------------------------------------------------------------------
# Thresholds
# --------------------------------------------------------------------------------------------------

def source_threshold(scores, predicted, classes, keep):
    """The data-free threshold: the quantile of the candidates themselves that SOURCE_SHARE of each class passes.

    Shapes as in `mms_threshold.threshold`. keep: ">=" or "<=".
    """
    thresholds = np.full(classes, np.nan)
    for label in np.unique(predicted):
        ordered = np.sort(scores[predicted == label])
        count = math.ceil(SOURCE_SHARE * len(ordered))
        thresholds[label] = ordered[-count] if keep == ">=" else ordered[count - 1]
    return thresholds


def passes(scores, predicted, thresholds, keep):
    """(N,) bool: whether each score reaches the threshold of its class; an exact hit does, NaN never does."""
    limit = thresholds[predicted]
    return scores >= limit if keep == ">=" else scores <= limit


# --------------------------------------------------------------------------------------------------
# Selection
# --------------------------------------------------------------------------------------------------

def fill_buckets(predicted, eligible, bucket, preference=None):
    """Takes at most `bucket` eligible candidates of each predicted class.

    predicted: (N,) int, candidates of all sources in their order. eligible: (N,) bool. preference: (N,), the
    smallest values of a class are taken first; None: first come first served. Equals are taken in the order
    of the sources. Returns the positions taken, (n,) int64, ascending.
    """
    candidates = np.flatnonzero(eligible)
    keys = (predicted[candidates],) if preference is None else (preference[candidates], predicted[candidates])
    order = candidates[np.lexsort(keys)]            # by class, then by preference; stable
    grouped = predicted[order]
    starts = np.flatnonzero(np.r_[True, grouped[1:] != grouped[:-1]]) if len(order) else np.empty(0, np.int64)
    rank = np.arange(len(order)) - np.repeat(starts, np.diff(np.r_[starts, len(order)]))
    return np.sort(order[rank < bucket])


@dataclass(frozen=True)
class Candidates:
    """The scored images of all sources, one after the other.

    names: of the sources; source: (N,) int64 into names; index: (N,) int64, the row in its source; scores: as
    from `score_images`.
    """

    names: tuple
    source: np.ndarray
    index: np.ndarray
    scores: dict

    @property
    def predicted(self):
        return self.scores["predicted"]

    def __len__(self):
        return len(self.source)


def join(scores):
    """Candidates from {source name: scores}, in that order."""
    counts = [len(columns["predicted"]) for columns in scores.values()]
    return Candidates(tuple(scores), np.repeat(np.arange(len(counts)), counts),
                      np.concatenate([np.arange(count) for count in counts]),
                      {column: np.concatenate([columns[column] for columns in scores.values()])
                       for column in next(iter(scores.values()))})


def select(approach, candidates, thresholds, bucket, fill="first", seed=0):
    """The transfer set of an approach: positions in `candidates`, (n,) int64, ascending.

    thresholds: {criterion: (C,) float64}. bucket: images a class.
    """
    predicted = candidates.predicted
    if approach in CRITERIA:
        keep, scores = CRITERIA[approach].KEEP, candidates.scores[approach]
        eligible = passes(scores, predicted, thresholds[approach], keep)
        preference = None if fill == "first" else -scores if keep == ">=" else scores
        return fill_buckets(predicted, eligible, bucket, preference)
    if approach == "balanced":
        return fill_buckets(predicted, np.ones(len(candidates), bool), bucket)
    if approach == "eats":
        numbers = [i for i, name in enumerate(candidates.names) if name in EATS_SOURCES]
        return fill_buckets(predicted, np.isin(candidates.source, numbers), bucket)
    if approach == "random":
        size = len(select("mms", candidates, thresholds, bucket, fill, seed))
        return np.sort(np.random.default_rng(engine.seed_for(seed, "random")).choice(len(candidates), size, replace=False))
    raise UserError(f"{approach} has no transfer set: it learns from the target's labelled images")


# --------------------------------------------------------------------------------------------------
# The stage: scores -> thresholds -> transfer set, each made unless it is there
# --------------------------------------------------------------------------------------------------

class Scoring:
    """The teacher and what it scores. The teacher is loaded only when something has yet to be scored.

    target: a data.Target, and sources: {name: packing.Packed}, where the caller has opened them already; what is
    not given is opened when it is needed.
    """

    def __init__(self, run, device, target=None, sources=()):
        self.run, self.device = run, device
        run.require("teacher.json", "python TeacherTrain.py")
        self.path = run.require("teacher.pt", "python TeacherTrain.py")
        self.classes = models.read(self.path)["classes"]
        with open(self.path, "rb") as file:
            self.teacher_digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
        self._teacher = self._candidates = None
        self._target, self._sources = target, dict(sources)

    @property
    def teacher(self):
        if self._teacher is None:
            self._teacher = models.load(self.path).to(self.device)
        return self._teacher

    @property
    def target(self):
        if self._target is None:
            settings = self.run.settings
            self._target = load_target(settings.target, settings.data_dir, settings.seed, settings.limit, max_bad=settings.max_bad)
        return self._target

    def source(self, name):
        """The packed source of that name."""
        if name not in self._sources:
            settings = self.run.settings
            spec = next(spec for spec in settings.sources if name_of(spec) == name)
            self._sources[name] = load_source(spec, settings.data_dir, settings.seed, settings.limit, max_bad=settings.max_bad)
        return self._sources[name]

    def confidence(self):
        """Scores of the confidence set."""
        target = self.target
        _, rows = saved_split(self.run, len(target.train))
        return saved_scores(self.run.scores("confidence"), f"{target.train.made_from}/{self.teacher_digest}", target.train.rows[rows],
                            lambda: score_images(self.teacher, target.train.images, rows, self.device, "scoring confidence"))

    def candidates(self):
        """Candidates of all sources, in the order of the settings."""
        if self._candidates is None:
            self._candidates = join({name_of(spec): self._scores(name_of(spec)) for spec in self.run.settings.sources})
        return self._candidates

    def _scores(self, name):
        source = self.source(name)
        return saved_scores(self.run.scores(name), f"{source.made_from}/{self.teacher_digest}", source.rows,
                            lambda: score_images(self.teacher, source.images, device=self.device, label=f"scoring {name}"))


def make_thresholds(run, scoring):
    """Makes thresholds.json unless it is there. Returns {criterion: (C,) float64, NaN where a class has none}."""
    path, calibrated_on = run / "thresholds.json", run.settings.calibrate
    # Thresholds that come from the sources hold for these sources alone.
    basis = {"calibrated_on": calibrated_on, "teacher": scoring.teacher_digest} | ({"sources": list(run.settings.sources)} if calibrated_on == "sources" else {})
    saved = read_json(path) if path.exists() else None
    if saved is None or any(saved.get(key) != value for key, value in basis.items()):
        count = len(scoring.classes)
        if calibrated_on == "target":
            scores = scoring.confidence()
            thresholds = {name: criterion.threshold(scores[name], scores["predicted"], count) for name, criterion in CRITERIA.items()}
        else:
            scores = scoring.candidates().scores
            thresholds = {name: source_threshold(scores[name], scores["predicted"], count, criterion.KEEP)
                          for name, criterion in CRITERIA.items()}
        write_json(path, {name: [None if math.isnan(value) else value for value in values.tolist()]
                          for name, values in thresholds.items()} | basis)
        saved = read_json(path)
    return {name: np.array([math.nan if value is None else value for value in saved[name]]) for name in CRITERIA}


def bucket_size(transfer_size, target_size, classes):
    """Images a class: an equal share of `transfer_size`, or, where that is None, of the target's training split."""
    bucket = (transfer_size or target_size) // classes
    if bucket < 1:
        raise UserError(f"{transfer_size or target_size} images are less than one for each of {classes} classes: give a larger "
                        f"{'--transfer-size' if transfer_size else '--limit'}")
    return bucket


def make_transfer_set(run, approach, scoring, target_size):
    """Makes transfer/<approach> unless it is there. Returns the content of its summary.json.

    target_size: images of the target's training split, shared by the classes unless --transfer-size says else.
    """
    folder = run.transfer(approach)
    if (folder / "summary.json").exists():
        summary = read_json(folder / "summary.json")
        if summary["teacher"] != scoring.teacher_digest:
            raise UserError(f"{folder} was selected by another teacher than {run / 'teacher.pt'}: use another --run-dir, or --restart")
        return summary
    settings, classes = run.settings, scoring.classes
    candidates, thresholds = scoring.candidates(), make_thresholds(run, scoring)
    bucket = bucket_size(settings.transfer_size, target_size, len(classes))
    chosen = select(approach, candidates, thresholds, bucket, settings.fill, settings.seed)
    predicted, source, index = (column[chosen] for column in (candidates.predicted, candidates.source, candidates.index))
    per_class = np.bincount(predicted, minlength=len(classes))
    summary = {
        "teacher": scoring.teacher_digest, "size": len(chosen), "bucket": bucket, "per_class": per_class.tolist(), "classes": classes,
        "per_source": {name: int((source == i).sum()) for i, name in enumerate(candidates.names)},
        "unreadable": {name: scoring.source(name).bad for name in candidates.names if scoring.source(name).bad},
        # random doesn't fill buckets, so none of its classes can be short
        "shortfall": {} if approach == "random" else {classes[c]: int(bucket - n) for c, n in enumerate(per_class) if n < bucket},
        "no_threshold": [classes[c] for c in np.flatnonzero(np.isnan(thresholds[approach]))] if approach in CRITERIA else [],
        "calibrated_on": settings.calibrate if approach in (*CRITERIA, "random") else None,
    }
    _write_images(folder / "images.npy", [(scoring.source(name).images, index[source == i]) for i, name in enumerate(candidates.names)])
    # An approach without a criterion of its own shows the margin, for comparison.
    scores = candidates.scores[approach if approach in CRITERIA else "mms"][chosen]
    listing = io.StringIO()
    writer = csv.writer(listing, lineterminator="\n")
    writer.writerow(["source", "index", "file", "predicted", "score"])
    for number, name in enumerate(candidates.names):
        packed, rows = scoring.source(name), index[source == number]
        of = source == number
        files = [packed.files[i] for i in rows] if packed.files else [""] * len(rows)
        writer.writerows(zip([name] * len(rows), packed.rows[rows].tolist(), files, predicted[of].tolist(), scores[of].tolist()))
    write_text(folder / "manifest.csv", listing.getvalue())
    write_json(folder / "summary.json", summary)        # last: it says that the rest is whole
    return summary


def _write_images(path, parts, chunk=4096):
    """Writes images[rows] of each part, one after the other. parts: [(images, rows)], rows ascending."""
    shape = (sum(len(rows) for _, rows in parts), *parts[0][0].shape[1:])

    def write(file):
        np.lib.format.write_array_header_2_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        for images, rows in parts:
            for start in range(0, len(rows), chunk):
                file.write(np.ascontiguousarray(images[rows[start:start + chunk]]).data)
    write_atomically(path, write)


# --------------------------------------------------------------------------------------------------
# Commands
# --------------------------------------------------------------------------------------------------

def report_thresholds(criterion, thresholds, classes, calibrated_on):
    keep = CRITERIA[criterion].KEEP
    say(f"thresholds: {criterion}, keep {keep}, calibrated on the {calibrated_on}: "
        + ", ".join(f"{name}: {'none' if math.isnan(value) else f'{value:.4g}'}" for name, value in zip(classes[:20], thresholds))
        + (", ..." if len(classes) > 20 else ""))
    absent = [name for name, value in zip(classes, thresholds) if math.isnan(value)]
    if absent:
        say(f"  no threshold, so nothing is selected, for {', '.join(absent)}: the teacher puts no image of the {calibrated_on} there")


def report_transfer_set(approach, summary):
    say(f"transfer: {approach}, {summary['size']:,} images, "
        f"{min(summary['per_class']):,} to {max(summary['per_class']):,} a class, from "
        + ", ".join(f"{name} {count:,}" for name, count in summary["per_source"].items()))
    if summary["shortfall"]:
        say(f"  short of {summary['bucket']:,}: " + ", ".join(f"{name}: {summary['bucket'] - lack:,}" for name, lack in summary["shortfall"].items()))


def threshold_command(criterion, description, argv):
    """`python mms_threshold.py` and `python entropy.py`: print and save the thresholds."""
    settings, run, _ = open_stage(argv, description)
    device = engine.pick_device(settings.device)
    scoring = Scoring(run, device)
    run.open(device)
    report_thresholds(criterion, make_thresholds(run, scoring)[criterion], scoring.classes, settings.calibrate)
    say(f"saved in {run / 'thresholds.json'}")


def main(argv):
    settings, run, given = open_stage(argv, __doc__, STAGE_FLAGS + ("approach",))
    approach = given.get("approach", "mms")
    if approach == "supervised":
        raise UserError("supervised has no transfer set, it learns from the target's labelled images: run `python distill.py --approach supervised`")
    device = engine.pick_device(settings.device)
    scoring = Scoring(run, device)
    stop_on(unavailable([(settings.target, "target"), *((source, "source") for source in settings.sources)], settings.data_dir))
    run.open(device)
    report_transfer_set(approach, make_transfer_set(run, approach, scoring, len(scoring.target.train)))
    say(f"saved in {run.transfer(approach)}")


if __name__ == "__main__":
    command(main)
