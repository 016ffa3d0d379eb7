"""Scores: one pass of the teacher over a source for all criteria, and the thresholds made of them.

A criterion is a Python file with KEEP, ">=" or "<=", the side of its threshold on which an image
is kept; score(logits (N, C), weight (C, D), the rows of the last linear layer, or None where
there is none) -> (N,); and threshold(scores (N,), predicted (N,), classes) -> (C,) float64, NaN
where a class has none. Those that ship are loaded exactly as a user's own."""
import dataclasses
import functools
import math
import time
from pathlib import Path

import numpy as np
import torch

from kd import checkpoints, engine, models
from kd.evaluation import saved_split
from kd.files import UserError, digest, listed, say, write_atomically
from kd.own import code_digest, import_file
from kd.processes import first_alone, gathered, on_all_ranks, share_of
from kd.run import open_stage
from kd.thresholds import share_threshold
from kd.values import name_of, name_of_approach, name_of_arch

ROOT = Path(__file__).resolve().parent.parent
HELD_OUT, HELD_OUT_SHARE = 1_000, 0.05      # images of the sources, with --data-free; at most both
BUILT_IN = {"mms": "mms_threshold.py", "entropy": "entropy.py",
            **{name: f"criteria/{name}.py" for name in ("confidence", "energy", "cross_entropy")}}
OURS = {ROOT / file for file in BUILT_IN.values()}


@dataclasses.dataclass(frozen=True)
class Criterion:
    """A criterion's file, its digest, and what it defines."""

    path: Path
    digest: str
    module: object

    @property
    def keeps_high(self):
        return self.module.KEEP == ">="

    def score(self, logits, weight):
        """(N,) float32 of a batch. Raises UserError where the file gives anything else."""
        if self.path not in OURS:       # it may work in place
            logits, weight = logits.clone(), None if weight is None else weight.clone()
        scores = self.module.score(logits, weight)
        if type(scores) is not type(logits) or scores.shape != logits.shape[:1]:
            raise UserError(f"{self.path}: score must give a tensor of one number per image, "
                            f"({len(logits)},), and gives a {type(scores).__name__} of "
                            f"{getattr(scores, 'shape', 'no shape')}.")
        return scores.float()

    def threshold(self, scores, predicted, classes):
        """(C,) float64 of the criterion's own rule."""
        found = np.asarray(self.module.threshold(scores.copy(), predicted.copy(), classes), float)
        if found.shape != (classes,):
            raise UserError(f"{self.path}: threshold must give one number per class, ({classes},), "
                            f"and gives {found.shape}.")
        return found


def load_criterion(path):
    module = import_file(path)
    lacking = [name for name in ("score", "threshold") if not callable(getattr(module, name, None))]
    if getattr(module, "KEEP", None) not in (">=", "<="):
        lacking.append("KEEP = '>=' or '<='")
    if lacking:
        raise UserError(f"{path} is not a criterion: it lacks {' and '.join(lacking)} (see "
                        "criteria/energy.py).")
    return Criterion(Path(path), code_digest(path), module)


def load_criteria(settings):
    """{name: Criterion} of all that ship and of the user's own among the approaches."""
    files = {name: ROOT / file for name, file in BUILT_IN.items()}
    files |= {name_of_approach(file): file for file in settings.criteria}
    return {name: load_criterion(path) for name, path in files.items()}


# ---- Scores --------------------------------------------------------------------------------------

def score_batches(teacher, source, rows, criteria, device, label):
    """One pass of the teacher over a source. Returns {"predicted": (N,) int64, "index": (N,) int64,
    and (N,) float32 for each of `criteria`}, and how many images are left out, whose logits are
    not finite.

    source: what has `batches` (kd/packing.py); rows: as there. Of several processes each answers
    for a part of the batches, and all return the whole."""
    weight, total = models.head_weight(teacher), len(source if rows is None else rows)
    index, batch = [], engine.evaluation_batch(teacher)
    mine = share_of(-(-total // batch))

    def pixels():
        for images, numbers, _ in source.batches(rows, batch, share_of):
            index.append(numbers)
            yield torch.from_numpy(np.ascontiguousarray(images))

    def of_logits(logits):
        scores = (criterion.score(logits, weight) for criterion in criteria.values())
        return logits.topk(2, 1).indices[:, 0], logits.isfinite().all(1), *scores
    predicted, finite, *scores = engine.columns_of(
        teacher, pixels(), device, of_logits, label,
        min(total, mine.stop * batch) - mine.start * batch)
    index = np.concatenate(sum(gathered(index), []))
    named = dict(zip(("predicted", "index", *criteria), (predicted, index, *scores), strict=True))
    left_out = int((~finite).sum())
    if left_out:
        named = {name: column[finite] for name, column in named.items()}
    return named, left_out


@on_all_ranks
def saved_scores(scoring, name, source, rows=None):
    """The scores of a source, as from `score_batches`, kept in scores/<name>.npz. All are made
    again, in one pass, where a criterion is not there or was another version. scoring: a
    Scoring."""
    run, path = scoring.run, scoring.run / f"scores/{name}.npz"
    product = run.product(f"scores/{name}.json", teacher=scoring.digest, images=source.fingerprint,
                          rows=None if rows is None else digest(np.ascontiguousarray(rows)))
    wanted = {key: criterion.digest for key, criterion in scoring.criteria.items()}
    if product.done and wanted.items() <= product.content["criteria"].items():
        with np.load(path) as saved:
            return {key: saved[key] for key in ("predicted", "index", *wanted)}
    began = time.monotonic()
    columns, unanswered = score_batches(scoring.teacher, source, rows, scoring.criteria,
                                        scoring.device, f"scoring {name}")
    seconds, count = time.monotonic() - began, len(columns["predicted"])
    say(f"scores: {name}, {count:,} images in {seconds:,.1f} s, {count / seconds:,.0f} img/s")
    if unanswered:
        say(f"  {unanswered:,} images are left out: the teacher's logits for them are NaN or "
            "infinite.")
    if not count:
        raise UserError(f"{name}: the teacher gives finite logits for none of its images.")
    write_atomically(path, lambda file: np.savez(file, **columns))
    asked = len(source if rows is None else rows)       # by all processes
    unreadable = asked - count - unanswered     # of which each process judges its own
    if unreadable > run.settings.max_bad * asked:
        raise UserError(f"{name}: {unreadable:,} of {asked:,} images can't be read, more than "
                        f"--max-bad {run.settings.max_bad:.4g} allows.")
    product.write({"images": count, "bad": source.bad + asked - count, "seconds": seconds,
                   "criteria": wanted}, [path])
    return columns


@dataclasses.dataclass(frozen=True)
class Candidates:
    """The scored images of all sources, one after the other.

    names: of the sources; source: (N,) into names; index: (N,) int64, which image of its source;
    scores: {"predicted" and each criterion: (N,)}.
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

    def at(self, rows):
        """Those alone. rows: positions, or (N,) bool."""
        return Candidates(self.names, self.source[rows], self.index[rows],
                          {name: column[rows] for name, column in self.scores.items()})


def join(scores):
    """Candidates from {source name: its scores}, in that order."""
    parts = list(scores.values())
    counts, columns = [len(part["predicted"]) for part in parts], dict(parts[0])
    if len(parts) > 1:      # of one source alone nothing is copied
        columns = {name: np.concatenate([part[name] for part in parts]) for name in columns}
    index = columns.pop("index")
    source = np.repeat(np.arange(len(counts), dtype=np.int16), counts)
    return Candidates(tuple(scores), source, index, columns)


# ---- What a stage needs of all this --------------------------------------------------------------

def report_thresholds(name, scoring):
    side = "at least" if scoring.criteria[name].keeps_high else "at most"
    said = [f"{label}: {'none' if math.isnan(value) else f'{value:.4g}'}"
            for label, value in zip(scoring.classes, scoring.thresholds[name], strict=True)]
    say(f"thresholds: {name}, {side} ({listed(said)})")


def no_mms(arch):
    """The sentence about a teacher whose logits come from something else than a linear layer."""
    return (f"No linear layer makes the logits of {name_of_arch(arch)}, so there are no rows for "
            "the Minimal Margin Score, which mms and random need. Add --mms-plain to use the plain "
            "margin z_a - z_b, or leave mms and random out of --approaches.")


class Scoring:
    """The teacher of a run and what it scores, each made when it is first asked for.

    data: the module data.py, whose load_target and load_source are used; opened: target, sources,
    where the caller has opened them already. classes: names; digest: of teacher.pt.
    """

    def __init__(self, run, device, data, **opened):
        self.run, self.device, self.data = run, device, data
        self.figures = run.content_of("teacher.json")
        self.classes, self.digest = self.figures["classes"], self.figures["files"]["teacher.pt"]
        self.criteria = load_criteria(run.settings)
        if not self.figures["linear_head"] and not run.settings.mms_plain:
            del self.criteria["mms"]
        vars(self).update(opened)

    @functools.cached_property
    def teacher(self):
        """In eval mode, its batch norms folded where they can be."""
        loaded = checkpoints.load(self.run / "teacher.pt", self.run.settings.teacher_arch)
        return models.folded(loaded).to(self.device)

    @functools.cached_property
    def target(self):
        return first_alone(lambda: self.data.load_target(self.run.settings))

    @functools.cached_property
    def sources(self):
        """{name: what has `batches`}, in the order of the settings."""
        settings = self.run.settings
        return {name_of(spec): first_alone(lambda spec=spec: self.data.load_source(settings, spec))
                for spec in settings.sources}

    @functools.cached_property
    def _parts(self):
        """(Candidates of all sources, in the order of the settings; those held out, that no student
        learns from, so that data-free, too, there is something to judge it by, else None)."""
        found = join({name: saved_scores(self, name, source)
                      for name, source in self.sources.items()})
        if not self.run.settings.data_free:
            return found, None
        rng = np.random.default_rng(engine.seed_for(self.run.settings.seed, "held out"))
        most = min(HELD_OUT, int(len(found) * HELD_OUT_SHARE))
        out = np.zeros(len(found), bool)
        out[rng.choice(len(found), most, replace=False)] = True
        return found.at(~out), found.at(out)

    candidates = property(lambda self: self._parts[0])
    held_out = property(lambda self: self._parts[1])

    @functools.cached_property
    def confidence(self):
        """The confidence set: (what has `batches`, rows of it)."""
        train = self.target.train
        return train, train.rows[saved_split(self.run, len(train))[1]]

    @functools.cached_property
    @on_all_ranks
    def thresholds(self):
        """{criterion: (C,) float64, NaN where a class has none}, kept in thresholds.json: of the
        confidence set, or, with --calibrate sources, of all candidates."""
        settings, classes = self.run.settings, self.classes
        scores = (saved_scores(self, "confidence", *self.confidence)
                  if settings.calibrate == "target" else self.candidates.scores)
        predicted = scores["predicted"]
        inputs = {name: [criterion.digest, digest(scores[name], predicted)]
                  for name, criterion in self.criteria.items()}
        product = self.run.product("thresholds.json", remake=True, criteria=inputs,
                                   threshold=settings.threshold, calibrate=settings.calibrate)
        if not product.done:
            made = {}
            for name, criterion in self.criteria.items():
                if settings.threshold == "published":
                    found = criterion.threshold(scores[name], predicted, len(classes))
                else:
                    found = share_threshold(scores[name], predicted, len(classes),
                                            criterion.keeps_high, settings.threshold)
                if np.isinf(found).any():
                    label = classes[np.isinf(found).argmax()]
                    raise UserError(f"{criterion.path}: the threshold of {label} is infinite, so "
                                    "that no image or every image passes it.")
                made[name] = [None if math.isnan(value) else value for value in found.tolist()]
            sides = {name: criterion.keeps_high for name, criterion in self.criteria.items()}
            product.write(made | {"calibrated_on": settings.calibrate, "classes": classes,
                                  "keeps_high": sides})
        return {name: np.array(product.content[name], float) for name in self.criteria}

    def require(self, approach):
        """Raises UserError where this teacher can't have that approach."""
        if "mms" not in self.criteria and approach in ("mms", "random"):
            raise UserError(no_mms(self.figures["arch"]))


def threshold_command(name, script, description, data, argv):
    """`python mms_threshold.py`, `python entropy.py`: print and save a criterion's thresholds."""
    run, given = open_stage(argv, script, description)
    device = engine.pick_device(run.settings.device)
    scoring = Scoring(run, device, data)
    scoring.require(name)
    first_alone(lambda: run.open(device, given))
    report_thresholds(name, scoring)
    run.save_config(device, given)
    say(f"saved in {run / 'thresholds.json'}")
