"""What a run folder holds, read for showing: whatever is there and whole, finished or not."""
import csv
import functools
import statistics
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kd.files import one_field, read_product, say
from kd.readers import Names
from kd.run import read_settings
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


def key_of(source, index):
    """(N,) int64, another one for each image of any source. source: into Record.sources."""
    return source << 40 | index


def place_of(key):
    """(source, index) of a key."""
    return key >> 40, key & (1 << 40) - 1


class Images(NamedTuple):
    """A transfer set. (N,) each; key: of key_of; files: names, or ""."""

    key: np.ndarray
    predicted: np.ndarray
    files: Sequence


class Record:
    """The run folder of one seed. A product that is not there or not whole counts as empty."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.settings, self.config = read_settings(folder)
        self.teacher = self._product("teacher.json")
        self.thresholds = self._product("thresholds.json")
        self.held_out = self._product("scores/held_out.json")
        known = self.teacher or self.thresholds
        self.classes = [shown(name) for name in known.get("classes", ())]
        names = [*self.settings.rows,
                 *sorted(path.parent.name for path in self.folder.glob("transfer/*/summary.json")),
                 *sorted(path.stem for path in self.folder.glob("students/*.json"))]
        self.approaches = sorted(set(names), key=[*APPROACHES, *names].index)
        self.students = self._products("students/{}.json", self.approaches)
        self.summaries = self._products("transfer/{}/summary.json", self.approaches)
        used = [name for each in self.summaries.values() for name in each["per_source"]]
        named = map(name_of, self.settings.sources)
        self.sources = list(dict.fromkeys([*named, *used]))     # a stage by hand may have others

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
        there = self._products("scores/{}.json", [*self.sources, "confidence"])
        return {name: dict(np.load(self.folder / f"scores/{name}.npz")) for name in there}

    @functools.cached_property
    def pool(self):
        """{"key", "predicted" and each criterion: (N,)} of all sources that have been scored."""
        parts = [self.scores[name] | {"key": key_of(number, self.scores[name]["index"])}
                 for number, name in enumerate(self.sources) if name in self.scores]
        return {name: np.concatenate([part[name] for part in parts])
                for name in parts[0] if all(name in part for part in parts)} if parts else {}

    @property
    def criteria(self):
        """Those that all sources have scores by."""
        return [name for name in self.thresholds if name in self.pool]

    @functools.cached_property
    def selected(self):
        """{approach: Images} of the transfer sets that are not empty."""
        return {name: self._manifest(self.folder / f"transfer/{name}/manifest.csv")
                for name, summary in self.summaries.items() if summary["size"]}

    def _manifest(self, path):
        keys, predicted = array("q"), array("q")        # there may be millions of rows

        def files(rows):
            for row in rows:
                keys.append(key_of(self.sources.index(row["source"]), int(row["index"])))
                predicted.append(int(row["predicted"]))
                yield row["file"]
        with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
            names = Names(files(csv.DictReader(file)))
        return Images(np.asarray(keys), np.asarray(predicted), names)

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
    """What is shown as one table: the run folders of all seeds.

    folder: as the user named it, a run or what holds one per seed; folders: the runs, if known.
    """

    def __init__(self, folder, folders=None):
        self.folder, self.name = Path(folder), shown(folder)
        own, below = self.folder / "config.json", [
            path for path in self.folder.glob("seed-*/config.json")
            if path.parent.name[5:].isdecimal()]
        if own.exists() and all(path.stat().st_mtime < own.stat().st_mtime for path in below):
            below = []      # what began last
        records = map(Record, folders or [path.parent for path in below] or [folder])
        self.records = sorted(records, key=lambda record: record.settings.seed)
        self.first = self.records[0]
        self.approaches = list(dict.fromkeys(
            name for record in self.records for name in record.approaches))
        self.teacher_accuracy = mean(record.teacher.get("accuracy") for record in self.records)
