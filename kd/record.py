"""What a run folder holds, read for showing: whatever is there and whole, finished or not."""
import csv
import functools
import statistics
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kd.files import one_field, say
from kd.readers import Names
from kd.run import read_product, read_settings
from kd.settings import APPROACHES
from kd.values import name_of


def shown(name):
    """A name, whatever is in it, in one line of UTF-8."""
    return one_field(str(name).encode("utf-8", "backslashreplace").decode())


def mean(values):
    """Of those that are not None; None where there are none."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def accuracy_text(row):
    """The accuracy of a row of results.json in %, with its deviation over the seeds."""
    spread = "" if row["accuracy_std"] is None else f" ± {100 * row['accuracy_std']:.2f}"
    return "-" if row["accuracy"] is None else f"{100 * row['accuracy']:.2f}{spread}"


@dataclass(frozen=True)
class Images:
    """(N,) each. source: into Record.sources; index: which image of it; files: names, or ""."""

    source: np.ndarray
    index: np.ndarray
    predicted: np.ndarray
    score: np.ndarray
    files: Sequence = ()

    @property
    def key(self):
        """(N,) int64, another one for each image of any source."""
        return self.source << 40 | self.index


class Record:
    """The run folder of one seed. A product that is not there or not whole counts as empty."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.settings, self.config = read_settings(folder)
        self.sources = [name_of(spec) for spec in self.settings.sources]
        self.teacher = self._product("teacher.json")
        self.test = self.teacher.get("test")        # on what test split it was measured
        self.thresholds = self._product("thresholds.json")
        self.held_out = self._product("scores/held_out.json")
        self.classes = [shown(name) for name in
                        (self.teacher or self.thresholds).get("classes", ())]
        found = [*self.settings.rows,
                 *sorted(path.parent.name for path in self.folder.glob("transfer/*/summary.json")),
                 *sorted(path.stem for path in self.folder.glob("students/*.json"))]
        self.approaches = sorted(set(found), key=[*APPROACHES, *found].index)
        self.students = self._products("students/{}.json", self.approaches)
        self.summaries = self._products("transfer/{}/summary.json", self.approaches)
        used = [name for each in self.summaries.values() for name in each["per_source"]]
        self.sources = list(dict.fromkeys([*self.sources, *used]))      # of a stage by hand
        self.scored = self._products("scores/{}.json", [*self.sources, "confidence"])

    def _product(self, name):
        content, wrong = read_product(self.folder, name)
        if wrong:
            say(f"{wrong}. It is left out.")
        return content or {}

    def _products(self, pattern, names):
        found = {name: self._product(pattern.format(name)) for name in names}
        return {name: content for name, content in found.items() if content}

    @functools.cached_property
    def scores(self):
        """{source, or "confidence": {"predicted", "index" and each criterion: (N,)}}."""
        return {name: dict(np.load(self.folder / f"scores/{name}.npz")) for name in self.scored}

    @functools.cached_property
    def pools(self):
        """{criterion that has thresholds: Images of all sources that have been scored}."""
        parts = [self.scores[name] | {"source": np.full(len(self.scores[name]["index"]), number)}
                 for number, name in enumerate(self.sources) if name in self.scores]
        names = [name for name in self.thresholds if parts and all(name in part for part in parts)]
        where = [np.concatenate([part[column] for part in parts])
                 for column in ("source", "index", "predicted") if names]
        return {name: Images(*where, np.concatenate([part[name] for part in parts]))
                for name in names}

    @functools.cached_property
    def selected(self):
        """{approach: Images} of the transfer sets that are not empty."""
        found = {}
        for name in (name for name, summary in self.summaries.items() if summary["size"]):
            with open(self.folder / f"transfer/{name}/manifest.csv", encoding="utf-8",
                      errors="surrogateescape", newline="") as file:
                rows, columns = csv.reader(file), [array("q"), array("q"), array("q"), array("d")]
                next(rows)
                files = Names(self._fill(columns, rows))
            found[name] = Images(*map(np.asarray, columns), files)
        return found

    def _fill(self, columns, rows):
        """Yields the file of each row of a manifest; the rest goes into columns."""
        for source, index, file, predicted, score in rows:
            for column, value in zip(columns, (self.sources.index(source), int(index),
                                               int(predicted), float(score or "nan")), strict=True):
                column.append(value)
            yield file

    def places(self, keys):
        """{key: (Images, their pixels (N, size, size, 3) uint8, the row there)} of those of these
        images that a transfer set has."""
        found = {}
        for approach, images in self.selected.items():
            pixels = np.load(self.folder / f"transfer/{approach}/images.npy", mmap_mode="r")
            rows = np.flatnonzero(np.isin(images.key, keys))
            found |= {key: (images, pixels, row)
                      for key, row in zip(images.key[rows].tolist(), rows, strict=True)}
        return found


class Experiment:
    """A run folder as the user named it: one run, or one per seed below it, whichever began last.

    settings: which seeds are meant; without, all that are there.
    """

    def __init__(self, folder, settings=None):
        self.folder, self.name = Path(folder), shown(folder)
        own, below = self.folder / "config.json", [
            path for path in self.folder.glob("seed-*/config.json")
            if path.parent.name[5:].isdecimal()]
        if settings:
            below = [self.folder / f"seed-{seed}/config.json"
                     for seed in settings.seeds if len(settings.seeds) > 1]
        elif own.exists() and all(path.stat().st_mtime < own.stat().st_mtime for path in below):
            below = []
        below.sort(key=lambda path: int(path.parent.name[5:]))
        self.records = [Record(path.parent) for path in below or [own]]
        self.first = self.records[0]
        self.approaches = list(dict.fromkeys(
            name for record in self.records for name in record.approaches))
        self.teacher_accuracy = mean(record.teacher.get("accuracy") for record in self.records)

    def trained(self, approach):
        """What the students of an approach reached: the JSON of each seed that has one."""
        students = [record.students.get(approach) for record in self.records]
        return [student for student in students if student and student["history"]]
