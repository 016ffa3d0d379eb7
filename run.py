"""The run folder and the settings: what every script shares and nothing that computes.

A run is one folder. `config.json` in it says how it was made; every other file in it is written beside
its place and moved there in one step, so a file that is there is whole. The flags of all the scripts are
declared here, once, and therefore mean the same everywhere.
"""
import argparse
import contextlib
import dataclasses
import errno
import importlib.util
import io
import itertools
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
import typing
from dataclasses import dataclass
from pathlib import Path

from files import (LEDGER, UserError, damage, file_digest, first_line, hold, is_first, let_go, listed, nearest_existing, one_field, open_ledger, read_json, remove_beside, require_whole, say,
                   write_json)
from structure import META, ORIGIN, WHERE, plain

# --------------------------------------------------------------------------------------------------
# Recipes
# --------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Recipe:
    """How one network is trained: SGD on batches of `batch_size` for `epochs` passes, or for `steps` batches."""

    epochs: int
    batch_size: int
    lr: float                       # peak learning rate
    momentum: float = 0.0           # Nesterov momentum when it is not 0
    weight_decay: float = 0.0
    schedule: str = "constant"      # or "onecycle": warm up to `lr`, then anneal to nearly 0 (cosine)
    augment: str = "none"           # or some of AUGMENTATIONS, joined by commas
    temperature: float = 1.0        # of the KD loss; a network that learns from labels ignores it
    steps: int = 0                  # where it is not 0, in place of epochs: that many batches, however large the transfer set is
    ema: float = 0.0                # what the network ends as is the moving average of its weights with this decay, where it is not 0


@dataclass(frozen=True)
class RecipePair:
    """A named recipe: how the teacher is fine-tuned and how every student is trained."""

    teacher: Recipe
    student: Recipe
    student_weights: str = "none"


RECIPES = {
    # The published protocol for the student. How the published teacher was trained is not stated; this
    # is a usual way to train a CIFAR classifier.
    "reference": RecipePair(
        teacher=Recipe(epochs=15, batch_size=128, lr=0.1, momentum=0.9, weight_decay=5e-4,
                       schedule="onecycle", augment="crop,flip"),
        student=Recipe(epochs=20, batch_size=64, lr=0.1, temperature=10.0)),
    # benchmarks/ablation.py chose the student's: --grid recipe.
    "best": RecipePair(
        teacher=Recipe(epochs=24, batch_size=128, lr=0.1, momentum=0.9, weight_decay=5e-4,
                       schedule="onecycle", augment="crop,flip"),
        student=Recipe(epochs=40, batch_size=256, lr=0.05, momentum=0.9, weight_decay=5e-4,
                       schedule="onecycle", augment="crop,flip", temperature=4.0, steps=6_000),
        student_weights="auto"),
    "quick": RecipePair(
        teacher=Recipe(epochs=12, batch_size=64, lr=0.02, momentum=0.9, weight_decay=5e-4,
                       schedule="onecycle", augment="crop"),
        student=Recipe(epochs=16, batch_size=64, lr=0.1, momentum=0.9, weight_decay=5e-4,
                       schedule="onecycle", temperature=4.0)),
}

AUGMENTATIONS = ("crop", "flip", "mixup", "cutmix")
MAX_BAD = 0.01              # share of unreadable images in a folder above which something else is wrong
DATA_FREE_SIZE = 50_000     # images of a transfer set where no training split says how many
LARGEST = 4_096             # pixels of an edge
MOST = 10 ** 12             # of anything that is counted
MOST_SELECTED = 10 ** 8     # images of a transfer set
HOTTEST = 1e6               # temperature: its square and the logits over it still are numbers
MOST_CLASSES = 1_000_000
LARGEST_CONFIG = 100_000_000    # bytes; a million names of classes have fewer
OTHERS_WAIT = 5.0           # seconds before another process than the first says what is wrong
FINE_TUNING_SCALE = 0.1     # of the teacher's learning rate when it starts from trained weights

# --------------------------------------------------------------------------------------------------
# Settings
# --------------------------------------------------------------------------------------------------

APPROACHES = ("supervised", "eats", "balanced", "random", "mms", "entropy")
MORE_CRITERIA = ("confidence", "energy", "cross_entropy")
MORE_APPROACHES = ("all", *MORE_CRITERIA)       # which run when they are asked for
# what else has a name in scores/*.npz, thresholds.json or a summary.json
TAKEN = ("predicted", *WHERE, *ORIGIN, *META)
EATS_SOURCES = ("svhn", "tinyimagenet")     # arXiv 2011.09113
PUBLISHED_ORDER = ("cifar100", "stl10", "places365", "tinyimagenet", "svhn", "caltech101", "caltech256")
BUILT_IN_SOURCES = ("glyphs", "photos", "noise")


@dataclass(frozen=True)
class Settings:
    """Every setting of a run, resolved: no field is left for a later stage to guess.

    `sources` and `target` are `NAME` or `NAME=PATH`. `transfer_size` is None where it is the size of
    the target's training split; `limit` is None where there is none. `criteria`: {name: file} of the user's own.
    The fields with a default came later than the others: a config.json may lack them.
    """

    target: str
    sources: tuple
    approaches: tuple
    recipe: str
    data_dir: str
    run_dir: str
    device: str
    seed: int
    seeds: tuple
    teacher_arch: str
    student_arch: str
    teacher_weights: str
    student_weights: str
    supervised_weights: str
    teacher_checkpoint: str | None
    calibrate: str
    fill: str
    transfer_size: int | None
    temperature: float
    epochs: int
    teacher_epochs: int
    batch_size: int
    lr: float
    limit: int | None
    max_bad: float
    restart: bool
    image_size: int = 32
    teacher_size: int | None = None
    teacher_mean: tuple | None = None
    teacher_std: tuple | None = None
    classes: tuple | int | None = None
    data_free: bool = False
    mms_plain: bool = False
    criteria: dict = dataclasses.field(default_factory=dict)
    threshold_scale: float = 1.0
    threshold_quantile: float | None = None
    no_balance: bool = False
    shortfall: str = "keep"
    teacher_lr: float | None = None
    steps: int = 0
    augment: str | None = None
    schedule: str | None = None
    momentum: float | None = None
    weight_decay: float | None = None
    ema: float | None = None
    restart_from: str | None = None
    tensorboard: bool = False

    @property
    def teacher_recipe(self):
        recipe = RECIPES[self.recipe].teacher
        scale = 1.0 if self.teacher_weights == "none" else FINE_TUNING_SCALE
        return dataclasses.replace(recipe, epochs=self.teacher_epochs, lr=self.teacher_lr or recipe.lr * scale)

    @property
    def student_recipe(self):
        """Of every student: the named recipe, and what the flags change of it."""
        changed = {name: getattr(self, name) for name in CHANGEABLE if getattr(self, name) is not None}
        return dataclasses.replace(RECIPES[self.recipe].student, epochs=self.epochs, lr=self.lr,
                                   batch_size=self.batch_size, temperature=self.temperature, steps=self.steps, **changed)


LATER_DEFAULTS = {field.name: {} if field.name == "criteria" else field.default for field in dataclasses.fields(Settings)
                  if field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING}


NUMBERS = ("seeds", "teacher_mean", "teacher_std")      # settings that are several numbers; the others that are several things are names
CHANGEABLE = ("augment", "schedule", "momentum", "weight_decay", "ema")     # parts of a student's recipe: None is the recipe's own


def name_of(spec):
    """The name in `NAME` or `NAME=PATH`."""
    return spec.partition("=")[0]


def _positive_int(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    if value > MOST:
        raise argparse.ArgumentTypeError(f"more than {MOST:,}")
    return value


def _selected(text):
    if _positive_int(text) > MOST_SELECTED:
        raise argparse.ArgumentTypeError(f"{text} is more than {MOST_SELECTED:,} images")
    return int(text)


def _temperature(text):
    if not 1 / HOTTEST <= _positive_float(text) <= HOTTEST:
        raise argparse.ArgumentTypeError(f"{text} is not in {1 / HOTTEST:g} ... {HOTTEST:,.0f}")
    return float(text)


def _edge(text):
    if _positive_int(text) > LARGEST:
        raise argparse.ArgumentTypeError(f"{text} is more than {LARGEST:,} pixels")
    return int(text)


def _batch(text):
    if _positive_int(text) < 2:
        raise argparse.ArgumentTypeError("a batch of one image has no batch statistics: give 2 or more")
    return int(text)


def seed_number(text):
    value = int(text)
    if not 0 <= value < 2 ** 32:
        raise argparse.ArgumentTypeError(f"{text} is not in 0 ... 4294967295")
    return value


def _positive_float(text):
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def share(text):
    value = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share in 0 ... 1")
    return value


def data_set_spec(text):
    name, equals, path = text.partition("=")
    if not name or not plain(name) or (equals and not path):
        raise argparse.ArgumentTypeError(f"'{text}' is neither NAME nor NAME=PATH")
    return text


def _folder(text):
    if not text:        # of a shell variable that is not set; Path("") is the working directory
        raise argparse.ArgumentTypeError("names no folder")
    return text


def _list_of(convert, what):
    def parse(text):
        items = tuple(convert(item.strip()) for item in text.split(",") if item.strip())
        names = [name_of(item) if isinstance(item, str) else item for item in items]
        if not items:
            raise argparse.ArgumentTypeError(f"names no {what}")
        if len(set(names)) < len(names):
            raise argparse.ArgumentTypeError(f"names a {what} twice")
        return items
    return parse


def _approach(text):
    """The name of an approach, or the path of a criterion of the user's own, made absolute."""
    return str(Path(text).resolve()) if text.endswith(".py") else text


def _arch(text):
    path, colon, factory = text.rpartition(":")
    return f"{Path(path).resolve()}:{factory}" if path.endswith(".py") else text


def _augment(text):
    steps = text.split(",")
    if text != "none" and (len(set(steps)) < len(steps) or not set(steps) <= set(AUGMENTATIONS)):
        raise argparse.ArgumentTypeError(f"'{text}' is neither none nor some of {','.join(AUGMENTATIONS)}")
    return text


def _below_one(text):
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not in 0 ... 1, without 1")
    return value


def _quantile(text):
    if not 0 < share(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share above 0 and up to 1")
    return share(text)


def _three(text):
    values = tuple(float(value) for value in text.split(","))
    if len(values) != 3 or not all(0 <= value <= 1 for value in values):
        raise argparse.ArgumentTypeError(f"'{text}' is not three numbers in 0 ... 1, one a colour")
    return values


def _three_positive(text):
    if min(_three(text)) <= 0:
        raise argparse.ArgumentTypeError(f"'{text}': a standard deviation is above 0")
    return _three(text)


def _classes(text):
    """Names of classes, the lines of a file; or their number."""
    if text.isdecimal():
        names = tuple(range(min(int(text), MOST_CLASSES + 1)))
    elif Path(text).is_file():
        names = tuple(line.strip() for line in Path(text).read_text().splitlines() if line.strip())
    else:
        raise argparse.ArgumentTypeError(f"'{text}' is neither a number nor a file with a class a line")
    _require_classes(names, f"'{text}'")
    return len(names) if text.isdecimal() else names


def _require_classes(names, where):
    if len(names) > MOST_CLASSES:
        raise argparse.ArgumentTypeError(f"{where} gives more than {MOST_CLASSES:,} classes")
    if len(set(names)) < max(2, len(names)):
        raise argparse.ArgumentTypeError(f"{where} gives fewer than two classes, or one twice")


# name -> keywords of argparse. A default in the text is what `resolve` puts where the flag is not given.
FLAGS = {
    "target": dict(type=data_set_spec, metavar="NAME|NAME=PATH",
                   help="data set whose classes the teacher knows: a known name, or a folder that holds "
                        "train/<class>/* and test/<class>/* (default: cifar10)"),
    "sources": dict(type=_list_of(data_set_spec, "source"), metavar="A,B=PATH,...",
                    help="unlabelled data sets for the students, in the order in which they fill the transfer "
                         "set; B=PATH is a folder of images at any depth, B=SHARDS{000..099}.tar tar shards (default: "
                         f"{','.join(PUBLISHED_ORDER)} without the target, cifar10 first for cifar100; "
                         f"for digits {','.join(BUILT_IN_SOURCES)})"),
    "approaches": dict(type=_list_of(_approach, "approach"), metavar="A,B,...",
                       help=f"rows of the table, of {','.join(APPROACHES)} (default: all of these; eats only where "
                            f"{' or '.join(EATS_SOURCES)} is among the sources), {','.join(MORE_APPROACHES)}, or a Python file "
                            "with a criterion of your own: KEEP, score and threshold as in mms_threshold.py"),
    "approach": dict(type=_approach, metavar="A",
                     help=f"which approach, of {','.join(APPROACHES + MORE_APPROACHES)}, or a Python file with a criterion (default: mms)"),
    "recipe": dict(choices=tuple(RECIPES), help="how the networks are trained: reference (the published protocol), "
                                                "best, quick (default: reference; quick for digits)"),
    "data_dir": dict(type=_folder, metavar="DIR", help="where data sets are looked for, fetched to and packed (default: data)"),
    "run_dir": dict(type=_folder, metavar="DIR", help="the run folder (default: runs/<target>)"),
    "device": dict(choices=("auto", "cpu", "cuda", "mps"), help="where to compute (default: auto)"),
    "seed": dict(type=seed_number, metavar="N", help="all randomness comes from it (default: 0)"),
    "seeds": dict(type=_list_of(seed_number, "seed"), metavar="N,N,...",
                  help="repeat the whole run for each seed, report mean and standard deviation (default: --seed alone)"),
    "image_size": dict(type=_edge, metavar="N",
                       help="edge in pixels to which all images are brought when they are packed (default: 32)"),
    "teacher_arch": dict(type=_arch, metavar="ARCH",
                         help="any torchvision classifier, resnet18_cifar, resnet34_cifar, timm:NAME where timm is installed, or "
                              "FILE.py:FACTORY, a function of yours that makes the network (default: resnet34; inception_v3 for cifar100)"),
    "teacher_size": dict(type=_edge, metavar="N",
                         help="edge in pixels to which the teacher resizes what it is given (default: --image-size, or what the "
                              "architecture needs: 299 for inception_v3, which takes 75 and more, below 299 without its auxiliary head)"),
    "teacher_mean": dict(type=_three, metavar="R,G,B",
                         help="what the teacher subtracts from pixels in [0, 1] (default: the checkpoint's, or 0.5,0.5,0.5)"),
    "teacher_std": dict(type=_three_positive, metavar="R,G,B", help="what it divides them by (default: the checkpoint's, or 0.5,0.5,0.5)"),
    "student_arch": dict(type=_arch, metavar="ARCH", help="as --teacher-arch (default: resnet18)"),
    "teacher_weights": dict(metavar="imagenet|none|FILE",
                            help="what fine-tuning starts from (default: imagenet; none for digits and for FILE.py:FACTORY)"),
    "student_weights": dict(metavar="imagenet|none|teacher|auto|FILE",
                            help="what students start from; teacher: the layers that it has under the same names; auto: those, where they are at least half of "
                                 "the student, else none (default: none, with --recipe best auto; the supervised student, which has no teacher, starts from "
                                 "imagenet when the teacher does, as in the published table)"),
    "teacher_checkpoint": dict(metavar="FILE", help="a teacher to use instead of fine-tuning one: a teacher.pt, or a state dict for --teacher-arch"),
    "classes": dict(type=_classes, metavar="N|FILE", help="a file with the names of the teacher's classes, a line each, in the order of its logits, or "
                                                          "their number (default: the checkpoint's, or the target's folders by name)"),
    "data_free": dict(action="store_true", help="touch no training image of the target: thresholds come from the sources, and accuracy is measured "
                                                "where NAME or NAME=PATH has a test split; the teacher is --teacher-checkpoint"),
    "mms_plain": dict(action="store_true", help="where no linear layer makes the teacher's logits, take the plain margin z_a - z_b for MMS"),
    "calibrate": dict(choices=("target", "sources"),
                      help="thresholds from the confidence set, or, data-free, from the best quarter of the "
                           "candidates of each class (default: target)"),
    "fill": dict(choices=("first", "best"),
                 help="fill a class first come first served in the order of the sources, or with its best scores "
                      "over all sources; approaches without a score always fill first (default: first)"),
    "threshold_scale": dict(type=_positive_float, metavar="F", help="multiply every threshold by F (default: 1)"),
    "threshold_quantile": dict(type=_quantile, metavar="Q",
                               help="a threshold that the best share Q of the images of each class reach, in place of the criterion's own; with "
                                    "--calibrate sources 0.25 where it isn't given"),
    "export": dict(choices=("onnx", "torch", "state_dict"),
                   help="write the student beside its checkpoint as ONNX (.onnx), as a program of torch.export (.pt2), both with the "
                        "normalisation inside, or as a bare state dict (.pth), and check it against the student"),
    "no_balance": dict(action="store_true", help="fill the whole transfer set as one bucket, whatever the classes"),
    "shortfall": dict(choices=("keep", "relax", "repeat"),
                      help="where a class is short of images: leave it, take the next best below its threshold, "
                           "or repeat those it has (default: keep)"),
    "transfer_size": dict(type=_selected, metavar="N",
                          help="images of a full transfer set, shared equally by the classes "
                               f"(default: the size of the target's training split; {DATA_FREE_SIZE} with --data-free)"),
    "temperature": dict(type=_temperature, metavar="T", help="of the KD loss (default: the recipe's)"),
    "epochs": dict(type=_positive_int, metavar="N", help="of every student (default: the recipe's)"),
    "teacher_epochs": dict(type=_positive_int, metavar="N", help="of the teacher (default: the recipe's)"),
    "teacher_lr": dict(type=_positive_float, metavar="RATE", help="learning rate of the teacher (default: the recipe's, a tenth of it from trained weights)"),
    "batch_size": dict(type=_batch, metavar="N", help="of every student (default: the recipe's)"),
    "lr": dict(type=_positive_float, metavar="RATE", help="learning rate of every student (default: the recipe's)"),
    "steps": dict(type=_positive_int, metavar="N", help="train every student for N batches, however large its transfer set is, in place of --epochs"),
    "augment": dict(type=_augment, metavar="none|A,B,...",
                    help=f"what changes the images of every student, of {','.join(AUGMENTATIONS)}; teacher and student see the same (default: the recipe's)"),
    "schedule": dict(choices=("constant", "onecycle"), help="of every student's learning rate (default: the recipe's)"),
    "momentum": dict(type=_below_one, metavar="M", help="of every student, Nesterov's (default: the recipe's)"),
    "weight_decay": dict(type=_below_one, metavar="W", help="of every student (default: the recipe's)"),
    "ema": dict(type=_below_one, metavar="D", help="every student ends as the moving average of its weights with decay D; 0 is none (default: the recipe's)"),
    "limit": dict(type=_positive_int, metavar="N",
                  help="use at most N images of every data set and split, evenly spaced, for a trial run"),
    "max_bad": dict(type=share, metavar="SHARE",
                    help="share of a folder's images that may be unreadable before that is an error, as 0.05 or 5%% (default: 0.01)"),
    "tensorboard": dict(action="store_true", help="write losses, accuracies and what the networks are shown into the run folder's tensorboard/ (pip install tensorboard)"),
    "restart": dict(action="store_true", help="delete what this command's run folder holds and begin anew"),
    "restart_from": dict(choices=("teacher", "scores", "transfer", "students"), metavar="STAGE",
                         help="delete what STAGE and those after it have made in the run folder, of teacher, scores, transfer, students, and make it anew"),
    "config": dict(metavar="FILE", help="a config.json whose settings hold where no flag says otherwise: what a run folder was made with, to repeat it"),
}

RUN_FLAGS = tuple(name for name in FLAGS if name not in ("approach", "export"))
STAGE_FLAGS = tuple(name for name in RUN_FLAGS if name not in ("approaches", "seeds", "restart", "restart_from", "config"))

# Which files a setting decides. A setting that no file depends on yet may still change.
STAGES = ("teacher", "scores", "transfer", "students")
DECIDES = {
    "target": "teacher", "recipe": "teacher", "seed": "teacher", "teacher_arch": "teacher",
    "teacher_weights": "teacher", "teacher_checkpoint": "teacher", "teacher_epochs": "teacher", "teacher_lr": "teacher", "limit": "teacher",
    "image_size": "teacher", "teacher_size": "teacher", "teacher_mean": "teacher", "teacher_std": "teacher", "classes": "teacher",
    "data_free": "teacher", "threshold_scale": "transfer", "threshold_quantile": "transfer",
    "no_balance": "transfer", "shortfall": "transfer",
    "sources": "transfer", "calibrate": "transfer", "fill": "transfer", "transfer_size": "transfer",
    "student_arch": "students", "student_weights": "students", "supervised_weights": "students",
    "temperature": "students", "epochs": "students", "batch_size": "students", "lr": "students",
    "steps": "students", **dict.fromkeys(CHANGEABLE, "students"),
}
MADE_BY = {
    "teacher": ("split.npz", "teacher.pt", "teacher.json", "teacher.npz", "teacher.*part"),
    "scores": ("scores/*", "thresholds.json"),
    "transfer": ("transfer/*",),
    "students": ("students/*", "results.json", "results.md"),
}
DRAWN = ("figures/*", "report.html")        # from all of those
TABLE = ("results.json", "results.md", *DRAWN)
BOARDS = {"teacher": "tensorboard/teacher", "students": "tensorboard/student-*"}


CONTRADICTORY = (("steps", "epochs"), ("seed", "seeds"))


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {one_field(message)} (see --help)\n")


class _StoredParser(Parser):
    """Of settings that were read from a file, which is its prog."""

    def error(self, message):
        raise UserError(f"{self.prog} is damaged: {one_field(message)}")


def _with_flags(parser, flags):
    for name in flags:
        parser.add_argument("--" + name.replace("_", "-"), dest=name, **FLAGS[name])
    return parser


def parse(argv, description, flags):
    """What was given on the command line, and only that, as {flag: value}. Exits with status 2 in one line."""
    parser = _with_flags(Parser(description=description.strip().splitlines()[0], argument_default=argparse.SUPPRESS, allow_abbrev=False), flags)
    given = _parsed(parser, argv)
    for one, other in CONTRADICTORY:
        if one in given and other in given:
            parser.error(f"--{one} and --{other} contradict each other: give one of them")
    if "config" in given:
        config = read_config(given["config"])
        stored = _parsed(parser, as_arguments(config))
        if isinstance(config.get("classes"), list):     # from a file, which need not be there any more
            try:
                _require_classes(config["classes"], f"--config {given['config']}")
            except argparse.ArgumentTypeError as error:
                parser.error(f"argument --classes: {error}")
            stored["classes"] = tuple(config["classes"])
        _require_named(stored, given, f"--config {given['config']}")
        for pair in CONTRADICTORY:
            if set(pair) & set(given):
                stored = {name: value for name, value in stored.items() if name not in pair}
        given = stored | given
    return given


def _require_named(stored, given, where):
    """Raises UserError where settings that were read from a file name code, which only the command line may do."""
    found, flags = [], []
    for name in ("teacher_arch", "student_arch", "approaches"):
        values = [stored[name]] if isinstance(stored.get(name), str) else list(stored.get(name) or ())
        code = [value for value in values if is_own(value) or value.endswith(".py")]
        if code and name not in given:
            found, flags = found + code, [*flags, f"--{name.replace('_', '-')} {','.join(values)}"]
    if found:
        raise UserError(f"{where} names code, {listed(list(dict.fromkeys(found)))}, and code runs only where the command line names it: add {' '.join(flags)}")


def _parsed(parser, argv):
    given = vars(parser.parse_args(argv))
    for name, value in given.items():
        if isinstance(value, list):         # what argparse makes of --name=--
            parser.error(f"argument --{name.replace('_', '-')}: expected one argument")
    return given


def read_config(path):
    """The settings in a config.json. Raises UserError where it holds anything that is no setting."""
    try:
        with open(path, "rb") as file:
            content = file.read(LARGEST_CONFIG + 1)
        config = json.loads(content) if len(content) <= LARGEST_CONFIG else None
        if not isinstance(config, dict):
            raise ValueError
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"--config {path} is no config.json" + (f" ({first_line(error)})" if isinstance(error, OSError) else "")) from None
    _require_types(config, f"--config {path}")
    known = {field.name for field in dataclasses.fields(Settings)} | {"versions", "commit", "machine"}
    unknown = [name for name in config if name not in known]
    if unknown:
        raise UserError(f"--config {path}: {listed(unknown)} {'is no setting' if len(unknown) == 1 else 'are no settings'}")
    return config


def read_made_with(folder):
    """The content of a run folder's config.json. Raises UserError where that is not what a run writes there."""
    path = Path(folder) / "config.json"
    config = read_json(path)
    _require_types(config, f"{path} is damaged")
    if not set(DECIDES) - set(LATER_DEFAULTS) <= set(config):
        raise UserError(f"{path} is damaged: it lacks settings; use another --run-dir")
    own = config.get("criteria", {})
    if not all(map(plain, own)):
        raise UserError(f"{path} is damaged: criteria can't be {listed(list(own))}")
    values = {name: value for name, value in config.items() if name != "seeds" and not (name == "steps" and value == 0)}
    values["approaches"] = [approach for approach in config.get("approaches", ()) if approach not in own] or None      # a path may have commas
    _parsed(_with_flags(_StoredParser(prog=str(path), argument_default=argparse.SUPPRESS, allow_abbrev=False), RUN_FLAGS), _as_words(values))
    return config


def as_arguments(config):
    """The command line that a config.json stands for, but for names of classes, which no command line has."""
    config = dict(config)
    if config.get("steps") == 0:
        del config["steps"]
    elif "steps" in config:
        config.pop("epochs", None)
    config.pop("seed" if config.get("seeds") else "seeds", None)
    start, supervised = config.get("student_weights"), config.pop("supervised_weights", None)
    if start == supervised == "none" and config.get("teacher_weights") == "imagenet":
        pass        # was given, since without it the supervised student would have started from ImageNet's
    elif start is not None and start == getattr(RECIPES.get(config.get("recipe")), "student_weights", None):
        del config["student_weights"]       # so that the supervised student starts from what its own default is
    return _as_words(config)


def _as_words(config):
    """[--flag=value] of settings, each as a command line would give it."""
    arguments = []
    for name, value in config.items():
        flag = "--" + name.replace("_", "-")
        if name not in FLAGS or value is None or name in ("restart", "restart_from") and value is False or name == "classes" and isinstance(value, list):
            continue
        if FLAGS[name].get("action") == "store_true":
            arguments += [flag] if value else []
        elif name == "approaches":      # those of the user's own are stored by name, their files beside them
            own = config.get("criteria", {})
            arguments.append(f"{flag}={','.join(own.get(each, each) for each in value)}")
        else:
            arguments.append(f"{flag}={','.join(map(str, value)) if isinstance(value, list) else value}")
    return arguments


def _require_types(config, where):
    """Raises UserError for a setting of a config.json that is of another type than that setting, or text that is no text."""
    def fits(value, kind):
        kinds = {list if one is tuple else one for one in typing.get_args(kind) or (kind,)}
        if isinstance(value, bool):
            return bool in kinds
        if isinstance(value, list):
            item_kind = int | float if field.name in NUMBERS else str
            return list in kinds and all(fits(item, item_kind) for item in value)
        if isinstance(value, dict):
            return dict in kinds and all(isinstance(item, str) and fits(item, str) for pair in value.items() for item in pair)
        return value is None and type(None) in kinds or isinstance(value, (*kinds, int) if float in kinds else tuple(kinds)) and not (isinstance(value, str) and _no_text(value))
    for field in dataclasses.fields(Settings):
        if field.name in config and not fits(config[field.name], field.type):
            raise UserError(f"{where}: {field.name} can't be {json.dumps(config[field.name])[:100]}")


def _no_text(text):
    """Whether it has a character that no argument and no name of a file can have."""
    try:
        return b"\0" in os.fsencode(text)
    except UnicodeEncodeError:
        return True


def resolve(given):
    """Settings from the flags that were given; everything else from the target, the recipe and the defaults."""
    target = given.get("target", "cifar10")
    name = name_of(target)
    built_in = target == "digits"
    first = ("cifar10",) if name == "cifar100" else ()
    sources = given.get("sources") or (BUILT_IN_SOURCES if built_in else
                                       first + tuple(s for s in PUBLISHED_ORDER if s != name))
    names = [name_of(source) for source in sources]
    has_eats = any(source in names for source in EATS_SOURCES)
    data_free = given.get("data_free", False)
    approaches = given.get("approaches") or tuple(a for a in APPROACHES if (a != "eats" or has_eats) and (a != "supervised" or not data_free))
    approaches, criteria = _with_criteria(given, approaches)
    if data_free and not given.get("teacher_checkpoint"):
        raise UserError("--data-free trains no teacher: give yours as --teacher-checkpoint FILE")
    if data_free and "supervised" in (*approaches, given.get("approach")):
        raise UserError("supervised learns from the target's labelled images, which --data-free does without: leave it out of --approaches")
    if data_free and given.get("calibrate") == "target":
        raise UserError("--calibrate target needs images of the target, which --data-free does without: take --calibrate sources")
    if "eats" in (*approaches, given.get("approach")) and not has_eats:
        raise UserError(f"eats needs {' or '.join(EATS_SOURCES)} among the sources, which are {','.join(names)}")
    if name in names:
        raise UserError(f"{name} is the target and can't be a source as well: take it out of --sources")
    if "confidence" in names:
        raise UserError("a source can't be called confidence, since scores/confidence.npz is the confidence set's: rename it")
    recipe = given.get("recipe", "quick" if built_in else "reference")
    seeds = given.get("seeds") or (given.get("seed", 0),)
    teacher_arch, student_arch = given.get("teacher_arch", default_teacher(target)), given.get("student_arch", "resnet18")
    teacher_weights = given.get("teacher_weights", "none" if built_in or is_own(teacher_arch) else "imagenet")
    student_weights = given.get("student_weights", RECIPES[recipe].student_weights)
    supervised_weights = student_weights if "student_weights" in given and student_weights not in ("teacher", "auto") else (
        "imagenet" if teacher_weights == "imagenet" and not is_own(student_arch) else "none")
    return Settings(
        target=target, sources=tuple(sources), approaches=tuple(approaches), recipe=recipe,
        data_dir=given.get("data_dir", "data"), run_dir=given.get("run_dir", f"runs/{name}"),
        device=given.get("device", "auto"), seed=seeds[0], seeds=tuple(seeds),
        teacher_arch=teacher_arch, student_arch=student_arch,
        teacher_weights=teacher_weights, student_weights=student_weights, supervised_weights=supervised_weights,
        teacher_checkpoint=given.get("teacher_checkpoint"), calibrate=given.get("calibrate", "sources" if data_free else "target"),
        fill=given.get("fill", "first"), transfer_size=given.get("transfer_size", DATA_FREE_SIZE if data_free else None),
        temperature=given.get("temperature", RECIPES[recipe].student.temperature),
        epochs=given.get("epochs", RECIPES[recipe].student.epochs),
        teacher_epochs=given.get("teacher_epochs", RECIPES[recipe].teacher.epochs),
        batch_size=given.get("batch_size", RECIPES[recipe].student.batch_size),
        lr=given.get("lr", RECIPES[recipe].student.lr), limit=given.get("limit"),
        max_bad=given.get("max_bad", MAX_BAD), restart=given.get("restart", False), criteria=criteria,
        steps=given.get("steps", 0 if "epochs" in given else RECIPES[recipe].student.steps),
        **{name: given.get(name, default) for name, default in LATER_DEFAULTS.items() if name not in ("criteria", "steps")})


def default_teacher(target):
    return "inception_v3" if name_of(target) == "cifar100" else "resnet34"


def _with_criteria(given, approaches):
    """(names of the approaches, {name: file} of the criteria that are the user's own)."""
    files = [approach for approach in (*approaches, given.get("approach", "")) if approach.endswith(".py")]
    criteria = given.get("criteria", {}) | {Path(file).stem: file for file in files}
    known = APPROACHES + MORE_APPROACHES
    for name, file in criteria.items():
        if name in known or name in TAKEN:
            raise UserError(f"{file}: {name} is the name of something else in a run folder: rename the file")
        if not name or not plain(name) or name.endswith(".py"):
            raise UserError(f"{file}: {name[:40]!r} can't be the name of an approach: rename the file")
    names = tuple(name_of_approach(approach) for approach in approaches)
    for name in (*names, name_of_approach(given.get("approach", "mms"))):
        if name not in known and name not in criteria:
            raise UserError(f"no approach '{name}' (there are {', '.join(known)}, and FILE.py for a criterion of your own)")
    if len(set(names)) < len(names):
        raise UserError("--approaches names an approach twice")
    return names, criteria


def name_of_approach(approach):
    """The name in the table, and in the run folder, of an approach or of a criterion's file."""
    return Path(approach).stem if approach.endswith(".py") else approach


def is_own(arch):
    """Whether an architecture is a function in a file of the user's, FILE.py:FACTORY."""
    return ".py:" in arch


def name_of_arch(arch):
    """An architecture as it is shown: without the folders of a file."""
    return arch.rpartition("/")[2]


# --------------------------------------------------------------------------------------------------
# Code of the user's
# --------------------------------------------------------------------------------------------------

_beside = {}        # {folder of the user's: {name: module} that its files have imported and that a module of ours has the name of}


@contextlib.contextmanager
def failing_in_a_line(line):
    """Within it, whatever code of the user's raises is the UserError `line(what it says)`: sys.exit as well, which would end the tool as if all were well."""
    try:
        yield
    except (UserError, Interrupted):
        raise
    except (Exception, SystemExit, GeneratorExit, KeyboardInterrupt) as error:       # a signal's is an Interrupted
        raise UserError(line(f"{type(error).__name__}: {first_line(error)}")) from None


@contextlib.contextmanager
def running_own(path):
    """While code of the user's file runs: what it imports is looked for beside it first, also where a module of this project has that name."""
    folder, here = Path(path).resolve().parent, Path(__file__).resolve().parent
    ours = {file.stem for file in here.glob("*.py")}
    both = {name for name in ours if (folder / f"{name}.py").exists() or (folder / name).is_dir()} if folder != here else set()

    def take_out():
        return {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in both}
    kept = take_out()
    sys.modules.update(_beside.get(folder, {}))
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        if str(folder) not in sys.path:
            sys.path.append(str(folder))        # for what a function imports when it is called
        _beside[folder] = take_out()
        sys.modules.update(kept)


def import_file(path):
    """The module in a Python file of the user's, which may import what lies beside it."""
    path = Path(path).resolve()
    if not path.is_file():
        raise UserError(f"{path}: there is no such file")
    name = f"{path.stem}_{file_digest(path)}"       # one of the same name may lie elsewhere, or be changed
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    try:
        with failing_in_a_line(lambda said: f"{path} can't be imported ({said})"), running_own(path):
            spec.loader.exec_module(module)
    except UserError:
        del sys.modules[name]
        raise
    return module


class Run:
    """The run folder of `settings`: where each file is, and whether what is there was made with these settings."""

    def __init__(self, settings):
        self.path = Path(settings.run_dir)
        self.settings = settings

    def __truediv__(self, name):
        return self.path / name

    def scores(self, source):
        return self.path / "scores" / f"{source}.npz"

    def transfer(self, approach):
        return self.path / "transfer" / approach

    def student(self, approach, suffix):
        return self.path / "students" / f"{approach}.{suffix}"

    def board(self, name):
        """Where --tensorboard has a training written; None without it."""
        return self.path / "tensorboard" / name if self.settings.tensorboard else None

    def require(self, name, command):
        """The path of a file that an earlier stage makes; a UserError with the command where it is missing."""
        path, again = self.path / name, f"make it with `{command}{self._flags_to_repeat()}`"
        if not path.exists():
            raise UserError(f"{path} is missing: {again}")
        require_whole(path, f"delete it and {again}")
        return path

    def _flags_to_repeat(self):
        name = name_of(self.settings.target)
        flags = f" --target {self.settings.target}" if self.settings.target != "cifar10" else ""
        return flags + (f" --run-dir {self.path}" if str(self.path) != f"runs/{name}" else "")

    def has(self, name):
        """Whether a file is there and whole, and neither --restart nor --restart-from takes it away."""
        path = self.path / name
        cleared = [path for pattern in self._cleared() for path in self.path.glob(pattern)]
        return path.exists() and not any(path.is_relative_to(each) for each in cleared) and damage(path) is None

    def _cleared(self):
        """Patterns of what --restart or --restart-from takes away."""
        if not self.settings.restart and not self.settings.restart_from:
            return []
        stages = STAGES if self.settings.restart else STAGES[STAGES.index(self.settings.restart_from):]
        patterns = (["config.json", LEDGER] if self.settings.restart else []) + [pattern for stage in stages for pattern in MADE_BY[stage]] + list(DRAWN)
        patterns += [BOARDS[stage] for stage in stages if stage in BOARDS]
        return patterns + [f"{pattern}.damaged" for pattern in patterns if "*" not in pattern]

    def holds(self, stage):
        """Whether any file of this stage or of a later one is there."""
        later = STAGES[STAGES.index(stage):]
        return any(next(self.path.glob(pattern), None) for name in later for pattern in MADE_BY[name])

    def _to_clear(self):
        """The paths of what --restart or --restart-from takes away. Raises UserError where one has been given as an input."""
        made = [path for pattern in self._cleared() for path in sorted(self.path.glob(pattern))]
        settings = self.settings
        for given in (settings.teacher_checkpoint, settings.teacher_weights, settings.student_weights, *settings.criteria.values(),
                      *(spec.partition("=")[2] for spec in (settings.target, *settings.sources))):
            inside = given and [path for path in made if Path(given).resolve().is_relative_to(path.resolve())]
            if inside:
                raise UserError(f"--restart would delete {given}, which is given as an input: copy it to another folder first")
        return made

    def clear(self):
        """Deletes what the stages made that are to begin anew, and nothing else that may lie in the folder."""
        made, settings = self._to_clear(), self.settings
        if made:
            say(f"{'--restart' if settings.restart else '--restart-from ' + settings.restart_from} deletes {listed([path.relative_to(self.path).as_posix() for path in made])} in {self.path}")
        for path in made:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def check(self):
        """Raises UserError when a setting differs from the folder's `config.json` on which a file depends that is there."""
        config, changed, stages = dataclasses.asdict(self.settings), [], set()
        if not self.settings.restart and self._made_with():
            made_with = self._made_with()
            for name, stage in DECIDES.items():
                now, then = json.loads(json.dumps(config[name])), made_with.get(name, LATER_DEFAULTS.get(name))
                if name.endswith("_arch") and is_own(str(now)) and is_own(str(then)):
                    now, then = name_of_arch(now), name_of_arch(then)       # the file may have been moved
                if now != then and self.holds(stage) and not self._begins_anew(stage):
                    flag = "student-weights" if name == "supervised_weights" else name.replace("_", "-")
                    changed.append(f"{'with' if then else 'without'} --{flag}" if isinstance(now, bool) else f"with --{flag} {_as_flag(then)}, not {_as_flag(now)}")
                    stages.add(stage)
        if changed:
            first = min(stages, key=STAGES.index)
            raise UserError(f"{self.path} was made {', '.join(dict.fromkeys(changed))}: use {'that' if len(changed) == 1 else 'those'}, another --run-dir, or "
                            f"{'--restart' if first == 'teacher' else f'--restart-from {first}, which keeps what comes before'}")
        if self.settings.tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise UserError("--tensorboard needs a package that is not installed: pip install tensorboard")
        if not nearest_existing(self.path).is_dir() or not os.access(nearest_existing(self.path), os.W_OK):
            raise UserError(f"{self.path} can't be written: choose another --run-dir")

    def claim(self):
        """Holds the folder. Raises UserError where it can't be opened; deletes nothing."""
        hold(self.path)
        self.check()
        self._to_clear()

    def open(self, device):
        """Checks, deletes what is to begin anew, and writes `config.json`; device: the torch.device that computes. Returns the run."""
        self.claim()
        remove_beside(self.path)
        if is_first():
            self.clear()
        open_ledger(self.path, [path for pattern in ("config.json", *itertools.chain.from_iterable(MADE_BY.values())) for found in self.path.glob(pattern)
                                for path in (found.iterdir() if found.is_dir() else [found]) if path.suffix not in (".part", ".damaged")])
        earlier = self._made_with().get("criteria", {})
        criteria = {name: file for name, file in earlier.items() if Path(file).is_file()} | self.settings.criteria
        write_json(self.path / "config.json", dataclasses.asdict(self.settings) | {"restart": False, "restart_from": None, "tensorboard": False, "criteria": criteria, "device": device.type} | environment())
        return self

    def _made_with(self):
        """What config.json says; nothing where it is not there, which is an error once something has been made."""
        path = self.path / "config.json"
        if path.exists():
            return read_made_with(self.path)
        if any(next(self.path.glob(pattern), None) for patterns in MADE_BY.values() for pattern in patterns if pattern not in TABLE):      # the table may be that of several seeds
            raise UserError(f"{path} is missing, so that nothing says how the rest was made: restore it, use another --run-dir, or --restart")
        return {}

    def _begins_anew(self, stage):
        return self.settings.restart_from is not None and STAGES.index(stage) >= STAGES.index(self.settings.restart_from)


def _as_flag(value):
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else "unset" if value is None else str(value)


def open_stage(argv, description, flags=STAGE_FLAGS):
    """For a stage run by hand: (settings, run, flags given). What is not given comes from the run folder.

    Nothing is written: the stage opens the run when it has checked what else it needs.
    """
    given = parse(argv, description, flags)
    target = {"target": given["target"]} if "target" in given else {}
    folder = Path(given.get("run_dir", resolve(target).run_dir))
    stored = _stored_flags(folder, given)
    _require_named({name: value for name, value in stored.items() if name != "approaches"}, given, str(folder / "config.json"))
    own = stored.pop("criteria", {})        # files of code, as well
    if given.get("approach") in own:
        raise UserError(f"{given['approach']} is a criterion in {own[given['approach']]}, and code runs only where the command line names it: give --approach {own[given['approach']]}")
    if "approaches" in stored:
        stored["approaches"] = tuple(approach for approach in stored["approaches"] if approach not in own) or None
    merged = stored | given
    if "eats" in (merged.get("approaches") or ()) and "sources" in given:
        del merged["approaches"]        # the stored rows belong to the stored sources
    if "epochs" in given:
        merged.pop("steps", None)
    settings = resolve({name: value for name, value in merged.items() if value is not None})
    if "supervised_weights" in stored and "student_weights" not in given and settings.teacher_weights == stored["teacher_weights"]:
        settings = dataclasses.replace(settings, supervised_weights=stored["supervised_weights"])
    elif stored and "student_weights" not in given:
        settings = dataclasses.replace(settings, supervised_weights=resolve({"teacher_weights": settings.teacher_weights, "student_arch": settings.student_arch}).supervised_weights)
    run = Run(settings)
    run.check()
    return settings, run, given


def _stored_flags(folder, given):
    """The settings in the folder's `config.json`, as if they had been given."""
    if not (folder / "config.json").exists():
        return {}
    stored = read_made_with(folder)
    fields = {field.name for field in dataclasses.fields(Settings)} - {"run_dir", "restart", "restart_from", "device", "seeds"}
    other = any(name in given and given[name] != stored[name] for name in ("target", "recipe"))
    if other and not Run(resolve({"run_dir": str(folder)})).holds("teacher"):
        return {}       # nothing is made yet: what is stored follows from another target or recipe
    return {name: tuple(stored[name]) if isinstance(stored[name], list) else stored[name] for name in fields if name in stored}


def environment():
    """Versions, commit and machine, for `config.json`."""
    import numpy
    import torch
    import torchvision
    here = Path(__file__).resolve().parent
    commit = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=here,
                            capture_output=True, text=True).stdout.strip() if (here / ".git").exists() else ""
    return {"versions": {"python": platform.python_version(), "torch": torch.__version__,
                         "torchvision": torchvision.__version__, "numpy": numpy.__version__},
            "commit": commit or None,
            "machine": {"system": platform.platform(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
                        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None}}


# --------------------------------------------------------------------------------------------------
# Signals
# --------------------------------------------------------------------------------------------------

STOPPING = (signal.SIGINT, signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else []))    # batch systems send the last before the time limit


class Interrupted(KeyboardInterrupt):
    """A signal has asked to stop: its number."""


class _Signals:
    """pending: the number of a signal that has come and waits, or 0; orderly: how many pieces of work ask to be let finish a step first."""
    pending = orderly = 0


def interrupted():
    """The number of the signal that asks to stop; 0 where none does."""
    return _Signals.pending


@contextlib.contextmanager
def orderly():
    """Within it, a signal does not stop the work where it is: `interrupted` tells of it, and the work stops where it can go on from."""
    _Signals.orderly += 1
    try:
        yield
    finally:
        _Signals.orderly -= 1
    if _Signals.pending and not _Signals.orderly:       # it ended before it looked
        raise Interrupted(_Signals.pending)


def _on_signal(number, frame):
    again = bool(_Signals.pending)
    _Signals.pending = number
    if again or not _Signals.orderly:       # who asks twice does not want to wait
        raise Interrupted(number)


def _how_to_go_on():
    """What goes on with the work. --restart would begin it anew, once more."""
    given = [word.partition("=")[0] for word in sys.argv if word.partition("=")[0] in ("--restart", "--restart-from")]
    return f"the same command{' without ' + given[0] if given else ''} goes on from here"


def _wait_to_be_ended():
    """Leaves the first process the time to speak; torchrun ends the others meanwhile."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(OTHERS_WAIT)


# of a path: what the user, and nobody else, can put right
UNUSABLE = (errno.EEXIST, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EIO, errno.ESTALE)


def command(main):
    """Runs a script's main(argv) and exits: 2 after one line for a UserError, 128 + its number when a signal asked to stop."""
    program = Path(sys.argv[0]).name
    for number in STOPPING:
        signal.signal(number, _on_signal)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")       # names of files that are no UTF-8
    try:
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            main(sys.argv[1:])
        else:
            import engine
            engine.start_processes()
            main(sys.argv[1:])
            engine.end_processes()
    except UserError as error:
        if not is_first():      # what every process runs into, the first one says, and torchrun ends the others meanwhile
            _wait_to_be_ended()
            program = f"{program}, process {os.environ['RANK']}"
        for line in str(error).splitlines():
            print(f"{program}: {line}", file=sys.stderr, flush=True)
        sys.exit(2)
    except RuntimeError as error:
        if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "by peer" not in str(error):
            raise
        _wait_to_be_ended()     # the one that ended has said why, and torchrun ends the others meanwhile
        print(f"{program}, process {os.environ['RANK']}: another process has ended", file=sys.stderr, flush=True)
        sys.exit(1)
    except BrokenPipeError:     # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        if error.errno in UNUSABLE:
            print(f"{program}: {error.filename2 or error.filename} can't be used ({first_line(error)})", file=sys.stderr)
            sys.exit(2)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        what = "a file is larger than the limit allows" if error.errno == errno.EFBIG else "the disk is full"
        print(f"{program}: {what}{f', at {error.filename}' if error.filename else ''}: make room; what is there is whole, and {_how_to_go_on()}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as error:
        for number in STOPPING:     # who asks three times
            signal.signal(number, signal.SIG_IGN)
        number = error.args[0] if isinstance(error, Interrupted) else signal.SIGINT
        if is_first():
            print(f"\n{program}: stopped by {signal.Signals(number).name}; {_how_to_go_on()}", file=sys.stderr, flush=True)
        sys.exit(128 + number)
    finally:
        let_go()
