"""Score the sources, select, and write the transfer set of one approach.

In:  teacher.pt, split.npz and the sources.
Out: scores/<source>.npz and scores/confidence.npz, thresholds.json,
     transfer/<approach>/{images.npy, manifest.csv, summary.json}.

The teacher looks at every source once: predicted class and all scores are saved, and an approach only
sorts numbers. With t the threshold of a class,

    mms, entropy, ...  of the images whose score passes t[predicted], a bucket for each class
    balanced, eats     the same without a threshold (eats: from SVHN and TinyImageNet alone)
    all                every image of every source
    random             as many images as mms has, without threshold or balance

    python transfer.py --approach mms
    python transfer.py --approach ./my_metric.py    # a criterion of your own: KEEP, score, threshold
"""
import contextlib
import csv
import io
import itertools
import json
import math
import os
import time
import zlib
from dataclasses import dataclass

import numpy as np
import torch

import confidence
import cross_entropy
import energy
import engine
import entropy
import mms_threshold
import models
from data import source_of, specs_of, target_of, unavailable
from files import UserError, file_digest, is_usable, listed, one_field, read_json, say, stop_on, write_atomically, write_json, write_text
from packing import release_pages
from run import (DATA_FREE_SIZE, EATS_SOURCES, STAGE_FLAGS, Interrupted, command, failing_in_a_line, import_file, interrupted, name_of, name_of_approach, name_of_arch, open_stage, orderly,
                 running_own)
from shards import Shards
from structure import MANIFEST, WHERE
from TeacherTrain import saved_split

CRITERIA = {"mms": mms_threshold, "entropy": entropy, "confidence": confidence, "energy": energy, "cross_entropy": cross_entropy}
SOURCE_SHARE = 0.25     # of the candidates of a class that pass a threshold calibrated on the sources

# --------------------------------------------------------------------------------------------------
# Criteria
# --------------------------------------------------------------------------------------------------


class OwnCriterion:
    """A criterion in a file of the user's: KEEP, score and threshold as in mms_threshold.py. What it gets wrong is one line.

    digest: of the file, so that scores by another version of it are not taken for its own.
    """

    def __init__(self, path):
        self.path, self._module, self.digest = path, import_file(path), file_digest(path)
        self.KEEP = getattr(self._module, "KEEP", None)
        lacking = [name for name in ("score", "threshold") if not callable(getattr(self._module, name, None))]
        if not isinstance(self.KEEP, str) or self.KEEP not in (">=", "<="):
            lacking.append("KEEP = '>=' or '<='")
        if lacking:
            raise UserError(f"{path} is no criterion: it lacks {' and '.join(lacking)} (see mms_threshold.py)")

    def score(self, logits, weight):
        scores = self._called("score", logits.clone(), None if weight is None else weight.clone())       # it may work in place
        if not (isinstance(scores, torch.Tensor) and scores.layout == torch.strided and not (scores.is_nested or scores.is_meta or scores.is_complex()) and scores.shape == logits.shape[:1]):
            raise UserError(f"{self.path}: score gives {_shape(scores)} for logits of {tuple(logits.shape)}, not one number an image, ({len(logits)},)")
        return scores.float()

    def threshold(self, scores, predicted, classes):
        thresholds = self._called("threshold", scores.copy(), predicted.copy(), classes)
        try:
            numbers = None if np.iscomplexobj(thresholds) else np.asarray(thresholds, np.float64)
        except Exception:       # whatever is no number
            numbers = None
        if np.shape(numbers) != (classes,):
            raise UserError(f"{self.path}: threshold gives {_shape(thresholds)}, not one number for each of {classes} classes")
        return numbers

    def _called(self, name, *args):
        with failing_in_a_line(lambda said: f"{self.path}: {name} raised {said}"), running_own(self.path):
            return getattr(self._module, name)(*args)


def _shape(value):
    try:
        return f"a {type(value).__name__} of {tuple(value.shape)}"
    except Exception:       # it has no shape, or none that can be told
        return f"a {type(value).__name__}"


def criteria_of(settings):
    """{name: criterion} of all that ship and of the user's own."""
    return CRITERIA | {name: OwnCriterion(path) for name, path in settings.criteria.items()}

# --------------------------------------------------------------------------------------------------
# Scores
# --------------------------------------------------------------------------------------------------


def score_images(teacher, images, rows=None, device=torch.device("cpu"), label="scoring", criteria=CRITERIA, **how):
    """One pass of the teacher. Returns {"predicted": (N,) int64, and (N,) float32 for each of `criteria`}.

    images: (M, H, W, 3) uint8; rows: which of them, default all; how: shared, checkpoint and mark, as in `engine.predict`.
    """
    weight = models.head_weight(teacher)

    def of_logits(logits):
        return logits.topk(2, dim=1).indices[:, 0], *(criterion.score(logits, weight) for criterion in criteria.values())

    predicted, *scores = engine.predict(teacher, images, rows, device, label, of_logits, **how)
    return {"predicted": predicted.numpy(), **{name: column.numpy().astype(np.float32) for name, column in zip(criteria, scores)}}


def score_shards(teacher, shards, device, criteria, listing, max_bad, checkpoint=None, mark=""):
    """The same of a source in shards, with "index": (N,) int64, which images of the source they are, and "shard_images": (S,) int64,
    how many each shard has. What can't be read is listed in the file `listing`; UserError where that is more than the share `max_bad`. checkpoint, mark: as in `engine.predict`; it is
    written after a shard."""
    saved = checkpoint.load(mark) if checkpoint else None
    parts, counts, bad = ([{column: values.numpy() for column, values in part.items()} for part in saved["parts"]], saved["counts"], saved["bad"]) if saved else ([], [], [])
    first, last = engine.share_of(len(shards.paths))

    def save():
        checkpoint.save(mark, {"parts": [{column: torch.from_numpy(values) for column, values in part.items()} for part in parts], "counts": counts, "bad": bad})
    with orderly() if checkpoint else contextlib.nullcontext():
        for shard in shards.read(first + len(counts), last):
            try:
                columns = score_images(teacher, shard.pixels, None, device, f"scoring {shards.name}", criteria, shared=False) if len(shard.pixels) else {}
            except Interrupted:
                save()
                raise
            parts.append(columns | {"index": np.array(shard.numbers, np.int64)} if columns else {})
            counts.append(shard.images)
            bad += [(os.path.basename(shards.paths[shard.number]), member, reason) for member, reason in shard.bad]
            stop = interrupted()
            if checkpoint and (stop or checkpoint.due()):
                save()
            if stop:
                raise Interrupted(stop)
    parts, counts, bad = (list(itertools.chain.from_iterable(each)) for each in zip(*engine.gathered((parts, counts, bad))))
    total = sum(counts)
    if bad:
        write_text(listing, "".join("\t".join(map(one_field, line)) + "\n" for line in bad))
    if not total or len(bad) == total or len(bad) / total > max_bad:
        raise UserError(f"{shards.name}: {len(bad):,} of {total:,} images can't be read" + (f", more than {max_bad:.4g} of all, see {listing}" if bad else ""))
    starts = np.cumsum([0, *counts[:-1]])
    for part, start in zip(parts, starts):
        if part:
            part["index"] += start
    filled = [part for part in parts if part]
    return {column: np.concatenate([part[column] for part in filled]) for column in filled[0]} | {"shard_images": np.array(counts, np.int64)}


def saved_scores(path, made_from, index, criteria, compute):
    """The scores of `criteria` in `path`; what isn't there is computed by compute({name: criterion}, checkpoint=, mark=), and saved with the seconds that it took.

    made_from: what they are the scores of, and by which teacher; index: (N,) int64, which images of the whole
    data set the rows are, or None where compute says it, as `score_shards` does.
    """
    scores, seconds = {}, 0.0
    where = {} if index is None else {"index": index}
    digests = {name: criterion.digest for name, criterion in criteria.items() if isinstance(criterion, OwnCriterion)}
    if is_usable(path):
        try:
            with np.load(path) as saved:
                scores = {name: saved[name] for name in saved.files}
            origin, seconds, then = str(scores.pop("made_from")), float(scores.pop("seconds")), json.loads(str(scores.pop("digests", "{}")))
            where = {name: scores.pop(name) for name in WHERE if name in scores}
            as_before = index is None or np.array_equal(where["index"], index)
        except Exception:
            raise UserError(f"{path} is damaged: delete it and run the command again") from None
        if origin != made_from or not as_before:
            raise UserError(f"{path} was computed from other images or by another teacher, which have changed since: use another --run-dir, or --restart")
        scores = {name: column for name, column in scores.items() if name not in digests or digests[name] == then.get(name)}
        digests = then | digests
    lacking = {name: criterion for name, criterion in criteria.items() if name not in scores}
    checkpoint = engine.Checkpoint(path.with_suffix(".part"), f"scoring {path.stem}", own=True)
    if lacking:
        began = time.monotonic()
        which = zlib.crc32(np.ascontiguousarray(index)) if index is not None else "shards"
        scores |= compute(lacking, checkpoint=checkpoint, mark=f"{made_from}, {which}, {', '.join(f'{name} {digests.get(name, 0)}' for name in lacking)}, {engine.process()}")
        where |= {name: scores.pop(name) for name in WHERE if name in scores}
        elapsed, count = time.monotonic() - began, len(scores["predicted"])
        say(f"scores: {path.stem}, {count:,} images in {elapsed:,.1f} s, {count / elapsed:,.0f} img/s")
        write_atomically(path, lambda file: np.savez(file, made_from=made_from, seconds=seconds + elapsed, digests=json.dumps(digests), **where, **scores))
        engine.wait()
    checkpoint.remove()
    return scores


# --------------------------------------------------------------------------------------------------
# Thresholds
# --------------------------------------------------------------------------------------------------

def quantile_threshold(scores, predicted, classes, keep, passing):
    """The threshold that the best share `passing` of the images of each class reach, at least one of them. Scores that are NaN are left out.

    Shapes as in `mms_threshold.threshold`. keep: ">=" or "<=".
    """
    thresholds, scored = np.full(classes, np.nan), ~np.isnan(scores)
    for label in np.unique(predicted[scored]):
        ordered = np.sort(scores[scored & (predicted == label)])
        count = math.ceil(passing * len(ordered))
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

    predicted: (N,) int, candidates of all sources in their order. eligible: (N,) bool. bucket: one number, or (C,) one a
    class. preference: (N,), the smallest values of a class are taken first, no NaN among the eligible; None: first come first
    served. Equals are taken in the order of the sources. Returns the positions taken, (n,) int64, ascending.
    """
    candidates = np.flatnonzero(eligible)
    labels = predicted[candidates]
    labels = labels.astype(np.min_scalar_type(labels.max(initial=0)))       # few bytes are sorted by counting, in linear time
    order = np.argsort(labels, kind="stable")
    of_class = np.split(candidates[order], np.flatnonzero(np.diff(labels[order])) + 1)
    taken = [candidates[:0]]
    for members in of_class if len(candidates) else ():
        room = bucket if np.ndim(bucket) == 0 else bucket[predicted[members[0]]]
        if preference is not None and 0 < room < len(members):
            values = preference[members]
            last = np.partition(values, room - 1)[room - 1]         # the largest that is still taken
            better = values < last
            better[np.flatnonzero(values == last)[:room - better.sum()]] = True
            members = members[better]
        taken.append(members[:max(room, 0)])
    return np.sort(np.concatenate(taken))


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


def select(approach, candidates, thresholds, bucket, fill="first", seed=0, balance=True, shortfall="keep", criteria=CRITERIA):
    """The transfer set of an approach: positions in `candidates`, (n,) int64, ascending, some twice where shortfall is "repeat". That of
    "all" is everything, whatever the other rules say.

    thresholds: {criterion: (C,) float64}. bucket: images a class. balance=False: one bucket, as large as all together.
    shortfall, where a bucket is not full: "keep" it so, "relax" (the next best below the threshold; a class without threshold has all of
    its images there), or "repeat" the images it has, in their order.
    """
    rules = dict(fill=fill, seed=seed, balance=balance, shortfall=shortfall, criteria=criteria)
    if approach == "all":
        return np.arange(len(candidates))
    if approach == "random":
        size = min(len(candidates), len(select("mms", candidates, thresholds, bucket, **rules)))
        return np.sort(np.random.default_rng(engine.seed_for(seed, "random")).choice(len(candidates), size, replace=False))
    predicted, badness = candidates.predicted, None
    group, room = predicted, bucket
    if not balance:
        group, room = np.zeros_like(predicted), bucket * len(next(iter(thresholds.values())))
    if approach in criteria:
        keep, scores = criteria[approach].KEEP, candidates.scores[approach]
        eligible = passes(scores, predicted, thresholds[approach], keep)
        badness = -scores if keep == ">=" else scores
    elif approach == "balanced":
        eligible = np.ones(len(candidates), bool)
    elif approach == "eats":
        eligible = np.isin(candidates.source, [i for i, name in enumerate(candidates.names) if name in EATS_SOURCES])
    else:
        raise UserError(f"{approach} has no transfer set: it learns from the target's labelled images")
    chosen = fill_buckets(group, eligible, room, badness if fill == "best" else None)
    if shortfall == "relax" and badness is not None:
        left = room - np.bincount(group[chosen], minlength=group.max(initial=0) + 1)
        chosen = np.sort(np.r_[chosen, fill_buckets(group, ~eligible & ~np.isnan(badness), left, badness)])
    if shortfall == "repeat":
        chosen = np.sort(np.concatenate([chosen[:0], *(np.resize(members, max(room, len(members))) for members in
                                                       (chosen[group[chosen] == label] for label in np.unique(group[chosen])))]))
    return chosen


# --------------------------------------------------------------------------------------------------
# The stage: scores -> thresholds -> transfer set, each made unless it is there
# --------------------------------------------------------------------------------------------------

def no_mms(arch):
    """What to say about a teacher whose logits come from something else than a linear layer."""
    return (f"the logits of {arch} are made by no linear layer, so there are no weight rows for MMS, which mms and random need: "
            "give --mms-plain for the plain margin z_a - z_b, or leave mms and random out of --approaches")


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
        self.teacher_digest = file_digest(self.path)
        self._teacher = self._candidates = None
        self._target, self._sources = target, dict(sources)
        self.criteria = criteria_of(run.settings)
        figures = read_json(run / "teacher.json")
        models.require_same_files(self.path, figures.get("files", {}))
        # Without a linear layer there is no MMS.
        self.has_mms = figures.get("linear_head", True) or run.settings.mms_plain
        if not self.has_mms:
            del self.criteria["mms"]

    @property
    def teacher(self):
        if self._teacher is None:
            self._teacher = models.folded(models.load(self.path, self.run.settings.teacher_arch).to(self.device))
        return self._teacher

    @property
    def target(self):
        if self._target is None:
            self._target = engine.first_alone(lambda: target_of(self.run.settings))
        return self._target

    def source(self, name):
        """The source of that name, packing.Packed or shards.Shards."""
        if name not in self._sources:
            settings = self.run.settings
            self._sources[name] = engine.first_alone(lambda: source_of(settings, next(spec for spec in settings.sources if name_of(spec) == name)))
        return self._sources[name]

    def require(self, approach):
        """Raises UserError where this teacher can't have that approach."""
        if not self.has_mms and approach in ("mms", "random"):
            raise UserError(no_mms(name_of_arch(read_json(self.run / "teacher.json")["arch"])))

    def confidence(self):
        """Scores of the confidence set."""
        target = self.target
        _, rows = saved_split(self.run, len(target.train))
        return saved_scores(self.run.scores("confidence"), f"{target.train.made_from}/{self.teacher_digest}", target.train.rows[rows], self.criteria,
                            lambda criteria, **how: score_images(self.teacher, target.train.images, rows, self.device, "scoring confidence", criteria, **how))

    def candidates(self):
        """Candidates of all sources, in the order of the settings."""
        if self._candidates is None:
            self._candidates = join({name_of(spec): self._scores(name_of(spec)) for spec in self.run.settings.sources})
        return self._candidates

    def _scores(self, name):
        source, made_from = self.source(name), f"{self.source(name).made_from}/{self.teacher_digest}"
        if isinstance(source, Shards):
            return saved_scores(self.run.scores(name), made_from, None, self.criteria, lambda criteria, **how: score_shards(
                self.teacher, source, self.device, criteria, self.run / "scores" / f"{name}.bad.txt", self.run.settings.max_bad, **how))
        return saved_scores(self.run.scores(name), made_from, source.rows, self.criteria,
                            lambda criteria, **how: score_images(self.teacher, source.images, None, self.device, f"scoring {name}", criteria, **how))

    def bad(self, name):
        """How many images of a source, which has been scored, can't be read."""
        source = self.source(name)
        if not isinstance(source, Shards):
            return source.bad
        with np.load(self.run.scores(name)) as saved:
            return int(saved["shard_images"].sum()) - len(saved["index"])

    def images(self, name, positions):
        """As `images_of`, of the source of that name."""
        return images_of(self.source(name), self.run.scores(name), positions)


def images_of(source, path, positions, chunk=4096):
    """Yields (pixels (n, size, size, 3) uint8, which images of the source (n,), their files) of the images at `positions` of the scores in
    the file `path`, (N,) int64, ascending, some more than once. source: packing.Packed or shards.Shards."""
    if not isinstance(source, Shards):
        for rows in np.split(positions, range(chunk, len(positions), chunk)):
            yield source.images[rows], source.rows[rows], [source.files[i] for i in rows] if source.files else [""] * len(rows)
            release_pages(source.images)
        return
    with np.load(path) as saved:
        index, ends = saved["index"][positions], np.cumsum(saved["shard_images"])
    of = np.searchsorted(ends, index, side="right")
    starts = np.r_[0, ends[:-1]]
    wanted = {int(shard): np.unique(index[of == shard] - starts[shard]).tolist() for shard in np.unique(of)}
    for shard in source.take(wanted):
        numbers = index[of == shard.number]
        found = np.searchsorted(np.array(shard.numbers) + starts[shard.number], numbers)
        file = os.path.basename(source.paths[shard.number])
        yield shard.pixels[found], numbers, [f"{file}/{shard.members[i]}" for i in found]


@engine.together
def make_thresholds(run, scoring):
    """Makes thresholds.json unless it is there. Returns {criterion: (C,) float64, NaN where a class has none}."""
    path, settings, criteria = run / "thresholds.json", run.settings, scoring.criteria
    passing = settings.threshold_quantile or (SOURCE_SHARE if settings.calibrate == "sources" else None)
    basis = {"calibrated_on": settings.calibrate, "teacher": scoring.teacher_digest, "scale": settings.threshold_scale, "quantile": passing,
             "digests": {name: criterion.digest for name, criterion in criteria.items() if isinstance(criterion, OwnCriterion)}}
    if settings.calibrate == "sources":     # such thresholds hold for these sources alone
        basis["sources"] = list(settings.sources)
    saved = read_json(path) if is_usable(path) else {}
    if not set(criteria) <= set(saved) or any(saved.get(key) != value for key, value in basis.items()):
        count = len(scoring.classes)
        scores = scoring.confidence() if settings.calibrate == "target" else scoring.candidates().scores
        thresholds = {}
        for name, criterion in criteria.items():
            values = (criterion.threshold(scores[name], scores["predicted"], count) if passing is None else
                      quantile_threshold(scores[name], scores["predicted"], count, criterion.KEEP, passing))
            with np.errstate(over="ignore"):
                values = values * settings.threshold_scale
            if np.isinf(values).any():
                label = int(np.flatnonzero(np.isinf(values))[0])
                raise UserError(f"{getattr(criterion, 'path', name)}: the threshold of {scoring.classes[label]} is {values[label]}, which no image or every image passes")
            thresholds[name] = [value if math.isfinite(value) else None for value in values.tolist()]
        saved = thresholds | basis | {"classes": scoring.classes}
        write_json(path, saved)
    return {name: np.array([math.nan if value is None else value for value in saved[name]]) for name in criteria}


def bucket_size(transfer_size, target_size, classes):
    """Images a class: an equal share of `transfer_size`, or, where that is None, of the target's training split (None: there is none)."""
    target_size = target_size or DATA_FREE_SIZE
    bucket = (transfer_size or target_size) // classes
    if bucket < 1:
        raise UserError(f"{transfer_size or target_size} images are less than one for each of {classes} classes: give a larger "
                        f"{'--transfer-size' if transfer_size else '--limit'}")
    return bucket


@engine.together
def make_transfer_set(run, approach, scoring, target_size):
    """Makes transfer/<approach> unless it is there. Returns the content of its summary.json.

    target_size: images of the target's training split, shared by the classes unless --transfer-size says else; None where there is none.
    """
    scoring.require(approach)
    folder, digest = run.transfer(approach), getattr(scoring.criteria.get(approach), "digest", None)
    if is_usable(*(folder / name for name in ("summary.json", "images.npy", "manifest.csv"))):
        summary = read_json(folder / "summary.json")
        if summary["teacher"] != scoring.teacher_digest:
            raise UserError(f"{folder} was selected by another teacher than {run / 'teacher.pt'}: use another --run-dir, or --restart")
        if summary.get("criterion") != digest:
            raise UserError(f"{folder} was selected by another version of {scoring.criteria[approach].path}: use another --run-dir, or --restart")
        return summary
    settings, classes = run.settings, scoring.classes
    candidates, thresholds = scoring.candidates(), make_thresholds(run, scoring)
    bucket = bucket_size(settings.transfer_size, target_size, len(classes))
    rules = dict(fill=settings.fill, seed=settings.seed, balance=not settings.no_balance, criteria=scoring.criteria)
    chosen = select(approach, candidates, thresholds, bucket, shortfall=settings.shortfall, **rules)
    before = select(approach, candidates, thresholds, bucket, **rules) if settings.shortfall != "keep" else chosen
    added = np.bincount(candidates.predicted[chosen], minlength=len(classes)) - np.bincount(candidates.predicted[before], minlength=len(classes))
    predicted, source, index = (column[chosen] for column in (candidates.predicted, candidates.source, candidates.index))
    per_class = np.bincount(predicted, minlength=len(classes))
    summary = {
        "teacher": scoring.teacher_digest, "criterion": digest, "size": len(chosen), "bucket": bucket, "per_class": per_class.tolist(), "classes": classes,
        "per_source": {name: int((source == i).sum()) for i, name in enumerate(candidates.names)},
        "unreadable": {name: scoring.bad(name) for name in candidates.names if scoring.bad(name)},
        "added": {classes[c]: int(n) for c, n in enumerate(added) if n and approach != "random"},
        # these two don't fill buckets, so none of their classes can be short
        "shortfall": {} if approach in ("random", "all") or settings.no_balance else {classes[c]: int(bucket - n) for c, n in enumerate(per_class) if n < bucket},
        "no_threshold": [classes[c] for c in np.flatnonzero(np.isnan(thresholds[approach]))] if approach in scoring.criteria else [],
        "calibrated_on": settings.calibrate if approach in (*scoring.criteria, "random") else None,
    }
    # An approach without a criterion of its own shows the margin, for comparison.
    scores = candidates.scores[approach if approach in scoring.criteria else "mms" if scoring.has_mms else "confidence"][chosen]
    listing = io.StringIO()
    writer, quoting = (csv.writer(listing, lineterminator="\n", quoting=how) for how in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL))
    writer.writerow(MANIFEST)

    def write_images(file):
        np.lib.format.write_array_header_2_0(file, {"descr": "|u1", "fortran_order": False, "shape": (len(chosen), *[settings.image_size] * 2, 3)})
        for number, name in enumerate(candidates.names):
            of, done = np.flatnonzero(source == number), 0
            for pixels, numbers, files in scoring.images(name, index[of]) if len(of) else ():
                file.write(np.ascontiguousarray(pixels).data)
                rows = of[done:done + len(pixels)]
                (quoting if any("\r" in file for file in files) else writer).writerows(zip([name] * len(rows), numbers.tolist(), files, predicted[rows].tolist(), scores[rows].tolist()))
                done += len(pixels)
    write_atomically(folder / "images.npy", write_images)
    write_text(folder / "manifest.csv", listing.getvalue())
    write_json(folder / "summary.json", summary)        # last: it says that the rest is whole
    return summary


# --------------------------------------------------------------------------------------------------
# Commands
# --------------------------------------------------------------------------------------------------

def report_thresholds(name, criterion, thresholds, classes, calibrated_on):
    say(f"thresholds: {name}, keep {criterion.KEEP}, calibrated on the {calibrated_on}: "
        + ", ".join(f"{label}: {'none' if math.isnan(value) else f'{value:.4g}'}" for label, value in zip(classes[:20], thresholds))
        + (", ..." if len(classes) > 20 else ""))
    absent = [label for label, value in zip(classes, thresholds) if math.isnan(value)]
    if absent:
        say(f"  no threshold, so nothing is selected, for {listed(absent)}: the teacher puts no image of the {calibrated_on} there")


def report_transfer_set(approach, summary):
    say(f"transfer: {approach}, {summary['size']:,} images, "
        f"{min(summary['per_class']):,} to {max(summary['per_class']):,} a class, from "
        + ", ".join(f"{name} {count:,}" for name, count in summary["per_source"].items()))
    if summary["added"]:
        say(f"  not enough passed, so added: {listed([f'{name}: {count:,}' for name, count in summary['added'].items()])}")
    if summary["shortfall"]:
        say(f"  short of {summary['bucket']:,}: " + listed([f"{name}: {summary['bucket'] - lack:,}" for name, lack in summary["shortfall"].items()]))


def threshold_command(criterion, description, argv):
    """`python mms_threshold.py`, `python entropy.py`, ...: print and save the thresholds."""
    settings, run, _ = open_stage(argv, description)
    device = engine.pick_device(settings.device)
    scoring = Scoring(run, device)
    engine.first_alone(lambda: run.open(device))
    scoring.require(criterion)
    report_thresholds(criterion, scoring.criteria[criterion], make_thresholds(run, scoring)[criterion], scoring.classes, settings.calibrate)
    say(f"saved in {run / 'thresholds.json'}")


def main(argv):
    settings, run, given = open_stage(argv, __doc__, STAGE_FLAGS + ("approach",))
    approach = name_of_approach(given.get("approach", "mms"))
    if approach == "supervised":
        raise UserError("supervised has no transfer set, it learns from the target's labelled images: run `python distill.py --approach supervised`")
    device = engine.pick_device(settings.device)
    scoring = Scoring(run, device)
    engine.first_alone(lambda: stop_on(unavailable(specs_of(settings), settings.data_dir, settings.image_size)))
    engine.first_alone(lambda: run.open(device))
    target = scoring.target
    report_transfer_set(approach, make_transfer_set(run, approach, scoring, None if target.train is None else len(target.train)))
    say(f"saved in {run.transfer(approach)}")


if __name__ == "__main__":
    command(main)
