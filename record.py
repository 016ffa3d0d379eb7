"""What run folders hold, read for showing: whatever is there, of a run that is not finished too. Nothing is computed or written here."""
import csv
import dataclasses
import functools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from files import UserError, one_field, read_json, require_whole
from run import LATER_DEFAULTS, Settings, name_of, read_made_with
from structure import ORIGIN, WHERE

LONGEST_LABEL = 24      # letters


def shown(name):
    """A name, of a class or of anything, as every page and figure can show it."""
    return one_field(str(name).encode("utf-8", "backslashreplace").decode())


@dataclass(frozen=True)
class Selected:
    """The transfer set of an approach, a row an image. source: (N,) int, into the names of all sources; index: (N,) int, which image of
    that source; predicted: (N,) int; score: (N,) float; files: their names there, "" where it has none."""

    source: np.ndarray
    index: np.ndarray
    predicted: np.ndarray
    score: np.ndarray
    files: list

    def __len__(self):
        return len(self.source)


class Record:
    """One run folder, of one seed. What is not there yet is None, or not among the keys."""

    def __init__(self, folder):
        self.folder = Path(folder)
        if not (self.folder / "config.json").is_file():
            raise UserError(f"{self.folder} is no run folder: it has no config.json")
        self.config = read_made_with(self.folder)

    def _json(self, name):
        return read_json(self.folder / name, self.folder) if (self.folder / name).is_file() else None

    def _arrays(self, name):
        path = self.folder / name
        if not path.is_file():
            return None
        require_whole(path, folder=self.folder)
        with np.load(path) as saved:
            return {column: saved[column] for column in saved.files}

    @functools.cached_property
    def settings(self):
        """The run.Settings that it was made with."""
        known = {field.name for field in dataclasses.fields(Settings)}
        try:
            return Settings(**{name: tuple(value) if isinstance(value, list) else value for name, value in (LATER_DEFAULTS | self.config).items() if name in known})
        except TypeError:
            raise UserError(f"{self.folder / 'config.json'} is damaged: it lacks settings") from None

    @functools.cached_property
    def teacher(self):
        return self._json("teacher.json")

    @property
    def sources(self):
        """The names of the sources, in their order."""
        return [name_of(spec) for spec in self.settings.sources]

    @functools.cached_property
    def classes(self):
        for held in (self.teacher, self.thresholds):
            if held:
                return [shown(name) for name in held["classes"]]
        return None

    @functools.cached_property
    def labels(self):
        """The classes as a figure has room for them."""
        return [name if len(name) <= LONGEST_LABEL else name[:LONGEST_LABEL - 1] + "…" for name in self.classes]

    @functools.cached_property
    def thresholds(self):
        return self._json("thresholds.json")

    def threshold(self, criterion):
        """(C,) float64, NaN where a class has none; None where there are none yet."""
        values = (self.thresholds or {}).get(criterion)
        return None if values is None else np.array([np.nan if value is None else value for value in values])

    @functools.cached_property
    def scores(self):
        """{source, or "confidence": {"predicted" and each criterion: (N,)}} of what has been scored."""
        found = {}
        for name in [*self.sources, "confidence"]:
            columns = self._arrays(f"scores/{name}.npz")
            if columns is not None:
                found[name] = {column: values for column, values in columns.items() if column not in (*WHERE, *ORIGIN)}
        return found

    @property
    def approaches(self):
        """The names of those that were asked for, and of those that were made by hand."""
        made = sorted(path.stem for path in self.folder.glob("students/*.json"))
        return list(dict.fromkeys([*self.settings.approaches, *made]))

    @functools.cached_property
    def students(self):
        """{approach: what its .json says}."""
        found = {approach: self._json(f"students/{approach}.json") for approach in self.approaches}
        return {approach: figures for approach, figures in found.items() if figures}

    @functools.cached_property
    def summaries(self):
        """{approach: its summary.json}, of those with a transfer set."""
        found = {approach: self._json(f"transfer/{approach}/summary.json") for approach in self.approaches}
        return {approach: summary for approach, summary in found.items() if summary}

    @functools.lru_cache(maxsize=None)
    def selected(self, approach):
        """The Selected of an approach that has a summary."""
        path = self.folder / "transfer" / approach / "manifest.csv"
        require_whole(path, folder=self.folder)
        with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
            rows = list(csv.reader(file))[1:]
        if not rows:
            return Selected(*(np.empty(0, np.int64) for _ in range(3)), np.empty(0), [])
        source, index, files, predicted, score = zip(*rows)
        number = {name: i for i, name in enumerate(self.sources)}
        return Selected(np.array([number[name] for name in source]), np.array(index, np.int64), np.array(predicted, np.int64), np.array(score, np.float64), list(files))

    def pixels(self, approach):
        """The images of a transfer set, (N, size, size, 3) uint8, memory-mapped."""
        path = self.folder / "transfer" / approach / "images.npy"
        require_whole(path, folder=self.folder)
        return np.load(path, mmap_mode="r")

    @functools.lru_cache(maxsize=None)
    def index_of(self, source):
        """Which images of a source its scores are of, (N,) int64, ascending."""
        return self._arrays(f"scores/{source}.npz")["index"]

    def positions(self, approach):
        """Which rows of each source's scores are in the transfer set: {source: (n,) int64, ascending}."""
        selected = self.selected(approach)
        return {name: np.searchsorted(self.index_of(name), np.unique(selected.index[selected.source == number])) for number, name in enumerate(self.sources) if name in self.scores}

    def said(self, approach=None):
        """(what the student of an approach, or the teacher, said to each image of the test split (N,), its labels (N,)); None where nothing was kept."""
        columns = self._arrays("teacher.npz" if approach is None else f"students/{approach}.npz")
        return None if columns is None else (columns["predicted"], columns["labels"])


class Experiment:
    """A run folder as the user named it: one run, or one for each seed below it, whichever was begun last.

    settings: the run.Settings that say which seeds and approaches are meant; without, all that are there.
    """

    def __init__(self, folder, settings=None):
        self.folder, self.asked = Path(folder), settings and settings.approaches
        own = self.folder / "config.json"
        below = sorted((path for path in self.folder.glob("seed-*/config.json") if path.parent.name[5:].isdecimal()), key=lambda path: int(path.parent.name[5:]))
        if not own.is_file() and not below:
            raise UserError(f"{self.folder} is no run folder: it has neither a config.json nor seed-*/config.json; make it with `python compile.py --run-dir {self.folder}`")
        if settings is not None:
            below = [path for path in below if int(path.parent.name[5:]) in settings.seeds] if len(settings.seeds) > 1 else []
        elif below and own.is_file() and own.stat().st_mtime > max(path.stat().st_mtime for path in below):
            below = []
        self.records = [Record(path.parent) for path in below] if below else [Record(self.folder)]
        self.label = self.folder.resolve().name     # by which it is told from others

    @property
    def first(self):
        return self.records[0]

    @property
    def name(self):
        return self.label

    @property
    def approaches(self):
        return list(self.asked or dict.fromkeys(approach for record in self.records for approach in record.approaches))

    def figures_of(self, approach):
        """What the students of an approach reached, of each seed that has one with a history."""
        return [record.students[approach] for record in self.records if approach in record.students and record.students[approach]["history"]]

    def teacher_accuracy(self):
        """The mean over the seeds; None where it is not known."""
        found = [record.teacher["accuracy"] for record in self.records if record.teacher and record.teacher["accuracy"] is not None]
        return sum(found) / len(found) if found else None


def dump(value):
    """JSON that may stand inside a script element."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
