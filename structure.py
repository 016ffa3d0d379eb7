"""What each file of a run folder holds, so that one that holds anything else is told before it is used.

The ledger (files.py) tells a file that has changed since it was written. This tells one that no run can have written, whatever a
ledger says: that may be lost, or have come with the rest from somebody else. Config.json has its own check (run.py).
"""
import csv
import fnmatch
import functools
import json
import math
import os
import zipfile
from pathlib import Path

import numpy as np

META = ("calibrated_on", "teacher", "scale", "quantile", "digests", "sources", "classes")      # in thresholds.json, beside the criteria
WHERE = ("index", "shard_images")                   # columns of a file of scores that say which images they are,
ORIGIN = ("made_from", "seconds", "digests")        # and where they come from
LONGEST_NAME = 180                                  # bytes
MANIFEST = ["source", "index", "file", "predicted", "score"]


def plain(name):
    """Whether a name may be that of a file and be shown: nothing that leads elsewhere, is hidden or can't be printed, and no longer than a file system takes
    with what is added to it."""
    return name.isprintable() and name == Path(name).name and not name.startswith(".") and len(name.encode()) <= LONGEST_NAME


class Misfit(Exception):
    """What is wrong with a file, in a few words."""


def misfit(folder, name):
    """What no run can have written in the file `name`, a path below the run folder `folder`, in words; None where it is sound, or of a kind
    that has no check here. A file is read once for each of its versions."""
    facts = _facts_of(folder, name)
    if "wrong" in facts:
        return facts["wrong"]
    teacher = _facts_of(folder, "teacher.json") if "classes" in facts or "labels" in facts else {}
    if "classes" in teacher and (facts.get("classes", teacher["classes"]) != teacher["classes"] or facts.get("labels", 0) > teacher["classes"]):
        return f"it is of other classes than the {teacher['classes']:,} that teacher.json names"
    if name.startswith("transfer/"):
        summary = _facts_of(folder, f"{name.rpartition('/')[0]}/summary.json")
        if "images" in summary and facts.get("images", 0) != summary["images"]:
            return f"it holds {facts['images']:,} images, and summary.json says {summary['images']:,}"
        if "sources" in summary and not facts.get("sources", set()) <= summary["sources"]:
            return "it names sources that summary.json does not"
    return None


def _facts_of(folder, name):
    """{"wrong": ...}, or what other files must agree with: "classes", "labels" (one more than the largest label), "images" and "sources"."""
    path = Path(folder) / name
    check = next((check for pattern, check in CHECKS.items() if fnmatch.fnmatchcase(name, pattern)), None)
    if check is None or not path.is_file():
        return {}
    status = os.stat(path)
    return _facts(check, path, status.st_ino, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=1000)
def _facts(check, path, *version):
    try:
        return check(path)
    except Misfit as error:
        return {"wrong": str(error)}
    except OSError as error:
        if error.errno:
            raise
    except Exception:       # whatever a broken file makes a reader raise
        pass
    return {"wrong": f"it is no {path.suffix} that can be read"}


def _require(right, what):
    if not right:
        raise Misfit(what)


# --------------------------------------------------------------------------------------------------
# Values in JSON
# --------------------------------------------------------------------------------------------------

def _text(value):
    return isinstance(value, str)


def _count(value):
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _share(value):
    return _number(value) and 0 <= value <= 1


def _flag(value):
    return isinstance(value, bool)


def _or_none(fits):
    return lambda value: value is None or fits(value)


def _list_of(fits):
    return lambda value: isinstance(value, list) and all(map(fits, value))


def _dict_of(fits):
    return lambda value: isinstance(value, dict) and all(map(fits, value.values()))


def _epoch(value):
    return isinstance(value, dict) and not _wrong_in(value, {"epoch": _count, "loss": _number, "lr": _number, "confidence_accuracy": _or_none(_share)})


def _names(value):
    return _list_of(lambda name: _text(name) or _count(name))(value) and len(set(value)) == len(value) >= 2


def _wrong_in(content, fields):
    """The names of the `fields` {name: what its value must fit} that a dict lacks or has otherwise; of those that end in "?", which it may lack, the latter."""
    return [name for name, fits in ((name.rstrip("?"), fits) for name, fits in fields.items() if not name.endswith("?") or name[:-1] in content)
            if name not in content or not fits(content[name])]


def _read_object(path, fields):
    content = json.loads(path.read_text())
    _require(isinstance(content, dict), "it is not a JSON object")
    wrong = _wrong_in(content, fields)
    _require(not wrong, f"{', '.join(wrong)} {'is' if len(wrong) == 1 else 'are'} not what a run writes there")
    return content


def _teacher(path):
    content = _read_object(path, {"arch": _text, "classes": _names, "accuracy": _or_none(_share), "confidence_accuracy": _or_none(_share), "seconds": _number,
                                  "images_per_second": _number, "history": _list_of(_epoch), "input_size?": _count, "linear_head?": _flag, "files?": _dict_of(_text)})
    return {"classes": len(content["classes"])}


def _thresholds(path):
    content = _read_object(path, {"classes": _names, "calibrated_on": _text, "teacher?": _text, "digests?": _dict_of(_text)})
    limits = _list_of(_or_none(_number))
    wrong = [name for name, values in content.items() if name not in META and not (plain(name) and limits(values) and len(values) == len(content["classes"]))]
    _require(not wrong, f"{', '.join(wrong)} {'is' if len(wrong) == 1 else 'are'} not one number a class")
    return {"classes": len(content["classes"])}


def _summary(path):
    content = _read_object(path, {"teacher": _text, "size": _count, "bucket": _count, "per_class": _list_of(_count), "per_source": _dict_of(_count), "shortfall": _dict_of(_count),
                                  "added": _dict_of(_count), "no_threshold": _list_of(lambda name: _text(name) or _count(name)), "criterion?": _or_none(_text), "unreadable?": _dict_of(_count)})
    _require(sum(content["per_class"]) == sum(content["per_source"].values()) == content["size"], "its numbers of images do not add up")
    return {"classes": len(content["per_class"]), "images": content["size"], "sources": set(content["per_source"])}


def _student(path):
    content = _read_object(path, {"approach": _text, "arch": _text, "weights": _text, "sources": _list_of(_text), "per_class": _list_of(_count), "transfer_size": _count,
                                  "accuracy": _or_none(_share), "confidence_accuracy": _or_none(_share), "retention": _or_none(_number), "seconds": _number,
                                  "images_per_second": _number, "history": _list_of(_epoch), "files?": _dict_of(_text)})
    return {"classes": len(content["per_class"])}


# --------------------------------------------------------------------------------------------------
# Arrays, tables, checkpoints
# --------------------------------------------------------------------------------------------------

def _columns(path, *needed):
    """{name: array} of a .npz, none of which is larger than the file."""
    with zipfile.ZipFile(path) as archive:
        _require(sum(member.file_size for member in archive.infolist()) <= path.stat().st_size, "its columns are compressed")
    with np.load(path) as saved:
        columns = {name: saved[name] for name in saved.files}
    lacking = [name for name in needed if name not in columns]
    _require(not lacking, f"it lacks {', '.join(lacking)}")
    return columns


def _require_integers(columns, *names):
    for name in names:
        _require(columns[name].ndim == 1 and columns[name].dtype.kind in "iu" and columns[name].min(initial=0) >= 0, f"{name} is no row of numbers of images or classes")


def _split(path):
    columns = _columns(path, "train", "confidence")
    _require_integers(columns, "train", "confidence")
    both = np.sort(np.concatenate([columns["train"], columns["confidence"]]))
    _require(np.array_equal(both, np.arange(len(both))), "its two parts are not each image once")
    return {}


def _answers(path):
    columns = _columns(path, "predicted", "labels")
    _require_integers(columns, "predicted", "labels")
    _require(len(columns["predicted"]) == len(columns["labels"]), "its columns differ in length")
    return {"labels": int(max(columns["predicted"].max(initial=-1), columns["labels"].max(initial=-1))) + 1}


def _scores(path):
    columns = _columns(path, "predicted", "index", "made_from", "seconds")
    _require_integers(columns, "predicted", *(name for name in WHERE if name in columns))
    _require(columns["made_from"].shape == () == columns["seconds"].shape and columns["made_from"].dtype.kind == "U" and _number(columns["seconds"].item()), "it does not say what it was made from")
    _require(_dict_of(_text)(json.loads(str(columns.get("digests", "{}")))), "digests is not what a run writes there")
    _require((np.diff(columns["index"]) > 0).all(), "index is not in order")
    wrong = [name for name, values in columns.items() if name not in ("predicted", *WHERE, *ORIGIN) and values.dtype != np.float32]
    _require(not wrong and all(map(plain, columns)), f"{', '.join(wrong or columns)} {'holds' if len(wrong) == 1 else 'hold'} no scores")
    _require(all(values.shape == columns["predicted"].shape for name, values in columns.items() if values.ndim and name != "shard_images"), "its columns differ in length")
    return {"labels": int(columns["predicted"].max(initial=-1)) + 1}


def _images(path):
    images = np.load(path, mmap_mode="r")
    _require(images.dtype == np.uint8 and images.ndim == 4 and images.shape[1] == images.shape[2] and images.shape[3] == 3, "it holds no images")
    return {"images": len(images)}


def _manifest(path):
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
        rows = csv.reader(file)
        _require(next(rows, None) == MANIFEST, f"its first line is not {','.join(MANIFEST)}")
        count, sources, largest = 0, set(), -1
        for count, row in enumerate(rows, 1):
            _require(len(row) == len(MANIFEST) and row[1].isdecimal() and row[3].isdecimal() and float(row[4]) is not None, f"row {count} is no image of a source")
            sources.add(row[0])
            largest = max(largest, int(row[3]))
    return {"images": count, "sources": sources, "labels": largest + 1}


def _zip(path):
    """What torch.save has written: its parts carry checksums."""
    with zipfile.ZipFile(path) as archive:
        bad = archive.testzip()
    _require(bad is None, f"{bad} in it is not what was written there")
    return {}


CHECKS = {
    "split.npz": _split, "teacher.json": _teacher, "teacher.npz": _answers, "teacher.pt": _zip, "thresholds.json": _thresholds, "scores/*.npz": _scores,
    "transfer/*/summary.json": _summary, "transfer/*/images.npy": _images, "transfer/*/manifest.csv": _manifest,
    "students/*.json": _student, "students/*.npz": _answers, "students/*.pt": _zip,
}
