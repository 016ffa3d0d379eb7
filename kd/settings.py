"""Every setting, once: its default, its parser, its help, its group, and which stage depends on it.

A field of `Settings` is a flag of the same name (kd/flags.py). `resolve` fills in what is not given
from the target, the recipe and the defaults.
"""
import argparse
import dataclasses
import functools
from dataclasses import dataclass

from kd import values
from kd.files import UserError, listed
from kd.recipes import FROM_RANDOM, FROM_TRAINED, RECIPES, SGD, Recipe
from kd.values import has_imagenet_weights, is_pretrained, name_of, name_of_approach

IMAGE_SIZE = 32
MAX_BAD = 0.01              # share of unreadable images in a folder above which something is wrong
DATA_FREE_SIZE = 50_000     # images of a transfer set where no training split says how many
SOURCE_SHARE = 0.25         # of a class's candidates that pass where thresholds come from them
FINE_TUNING_SCALE = 0.1     # of the teacher's learning rate when it starts from trained weights
APPROACHES = ("supervised", "eats", "balanced", "random", "mms", "entropy")
MORE_APPROACHES = ("all", "matched", "even", "weighted", "confidence", "energy", "cross_entropy",
                   "original")
ON_TARGET = ("supervised", "original")      # learn from the target's own images, to compare with
DRAWN_BY_WEIGHT = ("even", "weighted")      # every image, some more often than others
EATS_SOURCES = ("svhn", "tinyimagenet")     # arXiv 2011.09113
PUBLISHED_ORDER = ("cifar100", "stl10", "places365", "tinyimagenet", "svhn", "caltech101",
                   "caltech256")
BUILT_IN_SOURCES = ("noise", "photos", "glyphs")
STAGES = ("teacher", "scores", "transfer", "students")
# What is beside the criteria in scores/, thresholds.json, numpy's arguments and the report's pool.
OURS = ("predicted", "index", "file", "allow_pickle", "key", "classes", "calibrated_on",
        "keeps_high", "made_from", "files", "digest")
BESIDE_SOURCES = {"confidence", "held_out", "matched"}      # in scores/
TRAINS_TEACHER = ("teacher_weights", "teacher_epochs", "teacher_lr", "teacher_batch_size",
                  "teacher_augment")


# ---- The settings --------------------------------------------------------------------------------

GROUPS = ("everyday", "data", "teacher", "selection", "students", "running")
BY_RECIPE = "the recipe's"      # the default of what `resolve` takes from there


def setting(group, stage, default, kind, *said):
    """A field of Settings.

    stage: the first whose files depend on it. kind: the parser of its flag's text, a tuple of
    choices, bool for a switch, or None where it has no flag. said: [what stands for its value in
    --help,] its help."""
    metavar, text = (None, None, *said)[-2:]
    if text and default and "(default" not in text:
        text += f" (default: {default})"
    flag = {"help": text and text.replace("%", "%%")}
    if kind is bool:        # with a default of None, --no-NAME as well
        flag["action"] = "store_true" if default is False else argparse.BooleanOptionalAction
    elif isinstance(kind, tuple):
        flag |= {"choices": kind, "metavar": metavar}
    else:
        flag |= {"type": kind, "metavar": metavar}
    return dataclasses.field(default=default, metadata={
        "group": group, "stage": stage, "flag": flag if kind is not None else None})


_everyday = functools.partial(setting, "everyday")
_data = functools.partial(setting, "data")
_teacher = functools.partial(setting, "teacher", "teacher")
_selection = functools.partial(setting, "selection", "transfer")
_students = functools.partial(setting, "students", "students")
_running = functools.partial(setting, "running", None)


@dataclass(frozen=True)
class Settings:
    """Every setting of a run. None and "auto" are decided where they are used."""

    target: str = _everyday("teacher", "cifar10", values.data_set_spec, "NAME|NAME=PATH",
        "data set whose classes the teacher knows: a known name, a folder that holds "
        "train/<class>/* and test/<class>/*, or with --data-free any name (default: cifar10)")
    sources: tuple = _everyday("transfer", (), values.list_of(values.data_set_spec, "source"),
        "A,B=PATH,...",
        "unlabelled data sets for the students, in the order in which they fill the transfer set; "
        "B=PATH is a folder of images at any depth, B=SHARDS{000..099}.tar tar shards, "
        "B=hf:REPOSITORY or B=FILES*.parquet a Hugging Face data set (default: the published "
        f"ones; for digits {', '.join(BUILT_IN_SOURCES)})")
    approaches: tuple = _everyday(None, (), values.list_of(values.approach, "approach"), "A,B,...",
        f"what to compare, a row of the table each (README): {listed(APPROACHES)}, which are the "
        "default as far as sources and target allow, for digits with matched; "
        f"{listed(MORE_APPROACHES)}; and FILE.py, a criterion of your own (docs/own.md)")
    recipe: str = _everyday(None, "reference", tuple(RECIPES),
        "how networks are trained and images selected: reference is the published protocol, best "
        "the strongest for sources that resemble the target, far for others, quick takes minutes "
        "(default: reference; quick for digits)")
    seeds: tuple = _everyday(None, (0,), values.list_of(values.seed, "seed"), "N[,N,...]",
        "random seed; compile.py repeats the run for each of several (default: 0)")
    run_dir: str = _everyday(None, "", values.path, "DIR",
        "the run folder (default: runs/<target>)")

    data_dir: str = _data(None, "data", values.path, "DIR",
        "where data sets are looked for, fetched to and packed")
    image_size: int = _data("teacher", IMAGE_SIZE, values.edge, "N",
        "edge in pixels to which all images are resized")
    limit: int | None = _data("teacher", None, values.count, "N",
        "use at most N images of every data set and split, evenly spaced, for a trial run")
    max_bad: float = _data(None, MAX_BAD, values.share, "SHARE",
        "share of a folder's images that may be unreadable")
    pack: str = _data(None, "auto", ("auto", "always", "never"),
        "keep a source's images decoded on disk: auto does so below 8 GB and decodes larger "
        "sources as they are read")

    teacher_arch: str = _teacher("", values.arch, "ARCH",
        "a torchvision classifier, a network for CIFAR as resnet34_cifar (docs/own.md), timm:NAME, "
        "timm:hf-hub:OWNER/NAME, hub:OWNER/REPOSITORY:ENTRY of torch.hub, or FILE.py:FACTORY, a "
        "function that makes it (default: resnet34; inception_v3 for cifar100)")
    teacher_checkpoint: str | None = _teacher(None, values.path, "FILE",
        "a teacher to use instead of training one: a teacher.pt, or weights for --teacher-arch")
    teacher_weights: str = _teacher("", values.weights, "imagenet|none|FILE",
        "what the teacher's training starts from (default: imagenet; none for digits and networks "
        "that have no ImageNet weights)")
    teacher_size: int | None = _teacher(None, values.edge, "N",
        "edge in pixels to which the teacher resizes its input (default: --image-size, or what the "
        "architecture needs)")
    teacher_mean: tuple | None = _teacher(None, values.colour, "R,G,B",
        "mean of the teacher's pixels, in [0, 1] (default: what its weights state, of a file also "
        "what its library does, else 0.5,0.5,0.5)")
    teacher_std: tuple | None = _teacher(None, values.deviation, "R,G,B",
        "standard deviation of the teacher's pixels (default: as for --teacher-mean)")
    teacher_epochs: int = _teacher(BY_RECIPE, values.count, "N",
        "epochs of the teacher's training")
    teacher_lr: float = _teacher(BY_RECIPE, values.positive, "RATE",
        "its peak learning rate (default: the recipe's, a tenth of it from trained weights)")
    teacher_batch_size: int = _teacher(BY_RECIPE, values.count, "N", "its batch size")
    teacher_augment: str = _teacher(BY_RECIPE, None)
    classes: tuple | int | None = _teacher(None, values.classes, "N|FILE",
        "a file with the names of the teacher's classes, one per line, in the order of its logits, "
        "or their number (default: the checkpoint's, or the target's folders by name)")
    data_free: bool = _teacher(False, bool,
        "use no training image of the target, and the teacher of --teacher-checkpoint; thresholds "
        "come from the sources")

    threshold: float | str = _selection(BY_RECIPE, values.threshold, "published|R",
        "published: the criterion's own rule. R, a share: the score that the surest R of a class's "
        "confidence images reach (default: the recipe's; 0.25 with --calibrate sources)")
    floor: float = _selection(BY_RECIPE, values.share, "SHARE",
        "if fewer than this share of a class's bucket pass, take the best below the threshold too "
        "(default: the recipe's; 0 with --calibrate sources)")
    calibrate: str = _selection("target", ("target", "sources"),
        "what thresholds are computed on: the target's confidence set, or the sources (default: "
        "target; sources with --data-free)")
    fill: str = _selection(BY_RECIPE, ("first", "random", "best"),
        "how a class is filled: in the order of the sources, as published; at random; or with the "
        "best scores")
    no_balance: bool = _selection(False, bool,
        "fill the whole transfer set as one bucket, whatever the classes")
    transfer_size: int | None = _selection(None, values.count, "N",
        "images of a full transfer set, shared equally by the classes (default: the size of the "
        f"target's training split; {DATA_FREE_SIZE} with --data-free)")
    mms_plain: bool = setting("selection", "scores", False, bool,
        "where no linear layer makes the teacher's logits, use the plain margin z_a - z_b for MMS")

    student_arch: str = _students("resnet18", values.arch, "ARCH",
        "as --teacher-arch")
    student_weights: str = _students(
        BY_RECIPE, values.student_weights, "imagenet|none|teacher|auto|FILE",
        "what students start from; teacher: those of its layers that have the same names and "
        "shapes, which must be at least half of the student and include its head; auto: these, or "
        "random weights. supervised does not start from its teacher, but, unless a FILE is given, "
        "from ImageNet weights where the teacher's training does, else from random ones")
    epochs: int = _students(BY_RECIPE, values.count, "N", "passes over the images")
    steps: int = _students(BY_RECIPE, values.count, "N", "batches, instead of --epochs")
    batch_size: int = _students(BY_RECIPE, values.count, "N", "images per batch")
    lr: float | None = _students(BY_RECIPE, values.positive, "RATE",
        f"peak learning rate (default: the recipe's; best has {FROM_RANDOM['muon']} from random "
        f"weights, {FROM_RANDOM['sgd']} with sgd, and {FROM_TRAINED} from others)")
    optimizer: str | None = _students(BY_RECIPE, ("sgd", "muon"),
        "muon: orthogonal steps, which teach more and take longer, for the convolutions of "
        "networks with batch norms: they turn by half of --lr in radians, without weight decay; "
        "all else takes sgd's steps (default: the recipe's; best and far have muon from random "
        "weights, sgd from others)")
    schedule: str = _students(BY_RECIPE, ("constant", "onecycle", "cosine", "multistep"),
        "learning-rate schedule; multistep divides it by ten after 5, 6 and 7 eighths of the steps")
    momentum: float = _students(BY_RECIPE, values.below_one, "M", "Nesterov momentum")
    weight_decay: float = _students(BY_RECIPE, values.below_one, "W", "weight decay of SGD")
    temperature: float = _students(BY_RECIPE, values.positive, "T",
        "temperature of the KD loss")
    augment: str = _students(BY_RECIPE, values.augment, "none|A,B,...",
        f"some of {', '.join(values.AUGMENTATIONS)}; teacher and student see the same views")
    ema: float = _students(BY_RECIPE, values.below_one, "D",
        "end as an exponential moving average of the weights, with this decay")

    device: str = _running("auto", ("auto", "cpu", "cuda", "mps"),
        "where to compute")
    amp: bool | None = _running(None, bool,
        "train in bfloat16; scores are always float32 (default: on CUDA devices that have it)")
    compile: bool | None = _running(None, bool,
        "train with torch.compile (default: on CUDA, where five minutes or more are left)")
    tensorboard: bool = _running(False, bool,
        "write losses, accuracies and views into the run folder's tensorboard/")
    wandb: bool = _running(False, bool,
        "send what --tensorboard writes to Weights & Biases, which WANDB_ variables set up")
    restart: bool = _running(False, bool,
        "delete what the stages have made in the run folder and begin again")
    restart_from: str | None = _running(None, STAGES, "STAGE",
        "delete what STAGE and those after it have made, for all approaches, and make it again (a "
        f"stage by hand: its own part): {', '.join(STAGES)}")

    @property
    def seed(self):
        return self.seeds[0]

    @property
    def rows(self):
        """The names of the approaches in the table and the run folder."""
        return [name_of_approach(each) for each in self.approaches]

    @property
    def criteria(self):
        """The files of the user's own criteria among the approaches."""
        return tuple(each for each in self.approaches if each.endswith(".py"))

    @property
    def supervised_weights(self):
        """What the supervised student starts from: it has no teacher whose layers it could take."""
        if self.student_weights not in ("none", "teacher", "auto"):
            return self.student_weights
        as_the_teacher = is_pretrained(self.teacher_weights) and not self.teacher_checkpoint
        return "imagenet" if as_the_teacher and has_imagenet_weights(self.student_arch) else "none"

    def start_of(self, approach):
        """(whose flag decides, architecture, weights, None) of the student of an approach, as
        models.unavailable asks for it."""
        weights = self.supervised_weights if approach == "supervised" else self.student_weights
        role = "student" if weights == self.student_weights else "teacher"
        return role, self.student_arch, weights, None

    @property
    def read_sources(self):
        """The sources that the approaches need."""
        return () if set(self.approaches) <= set(ON_TARGET) else self.sources

    @property
    def teacher_recipe(self):
        return Recipe(self.teacher_epochs, self.teacher_batch_size, self.teacher_lr,
                      augment=self.teacher_augment, amp=self.amp, compile=self.compile,
                      **SGD)

    def student_recipe(self, weights="none", convolutions=True):
        """The Recipe of a student that starts from `weights`, as distill.new_student gives them.
        convolutions: whether it has any for kd/muon.py."""
        names = [field.name for field in dataclasses.fields(Recipe)]
        optimizer = self.optimizer or ("muon" if weights == "none" and convolutions else "sgd")
        lr = self.lr or (FROM_RANDOM[optimizer] if weights == "none" else FROM_TRAINED)
        given = {name: getattr(self, name) for name in names}
        return Recipe(**given | {"lr": lr, "optimizer": optimizer})

    def of_stage(self, stage):
        """{name: value as JSON has it} of the settings that a stage's files depend on first."""
        found = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)
                 if field.metadata["stage"] == stage}
        if stage == "teacher":
            found["seed"] = self.seed
            if self.teacher_checkpoint:     # what trains a teacher has no part in it
                for name in TRAINS_TEACHER:
                    del found[name]
        for name, value in found.items():      # files may move; their content is told by digests
            if name in ("target", "sources"):
                value = name_of(value) if name == "target" else [name_of(each) for each in value]
            elif isinstance(value, str):
                value = values.name_of_arch(value)
            found[name] = list(value) if isinstance(value, tuple) else value
        return found


FIELDS = {field.name: field for field in dataclasses.fields(Settings)}
FLAGS = tuple(name for name, field in FIELDS.items() if field.metadata["flag"])


def default_teacher(target):
    return "inception_v3" if name_of(target) == "cifar100" else "resnet34"


def resolve(given):
    """Settings from {name: value} of what was given; the rest are defaults."""
    given = {name: value for name, value in given.items() if name in FIELDS}
    target = given.get("target", "cifar10")
    name, built_in = name_of(target), target == "digits"
    data_free, sources = given.get("data_free", False), given.get("sources")
    chosen = {
        "recipe": "quick" if built_in else "reference", "run_dir": f"runs/{name}",
        "teacher_arch": default_teacher(target), "calibrate": "sources" if data_free else "target",
        "sources": sources or default_sources(target), "student_arch": "resnet18",
        "transfer_size": DATA_FREE_SIZE if data_free else None} | given
    untrained = built_in or not has_imagenet_weights(chosen["teacher_arch"])
    chosen = {
        "teacher_weights": "none" if untrained else "imagenet",
        "approaches": tuple(each for each in APPROACHES if (
            each != "eats" or _has_eats(chosen["sources"])) and (
            each != "supervised" or not data_free)) + ("matched",) * built_in} | chosen
    recipe = dict(RECIPES[chosen["recipe"]])
    if chosen["teacher_weights"] != "none":
        recipe["teacher_lr"] *= FINE_TUNING_SCALE
    if chosen["calibrate"] == "sources":
        recipe |= {"threshold": SOURCE_SHARE, "floor": 0.0}
    if "epochs" in given:
        recipe["steps"] = 0
    settings = Settings(**recipe | chosen)
    _require_consistent(settings)
    return settings


def default_sources(target):
    if target == "digits":
        return BUILT_IN_SOURCES
    first = ("cifar10",) if name_of(target) == "cifar100" else ()
    return first + tuple(each for each in PUBLISHED_ORDER if each != name_of(target))


def _has_eats(sources):
    return any(name_of(source) in EATS_SOURCES for source in sources)


def _require_consistent(settings):
    names = settings.rows
    sources = [name_of(each) for each in settings.sources]
    known = APPROACHES + MORE_APPROACHES
    files = {file: name_of_approach(file) for file in settings.criteria}
    unknown = [each for each in settings.approaches if each not in known and each[-3:] != ".py"]
    contradictions = (
        *((name in (*known, *OURS),
           f"{file}: {name!r} can't be the name of an approach. Rename the file.")
          for file, name in files.items()),
        (unknown, f"There is no approach {listed(unknown)}. There are {', '.join(known)}, and "
                  "FILE.py for a criterion of your own."),
        (settings.data_free and not settings.teacher_checkpoint,
         "--data-free needs a teacher: give yours as --teacher-checkpoint FILE."),
        *((settings.data_free and name in names,
           f"{name} learns from the target's training images, which --data-free does not touch: "
           "leave it out of --approaches.") for name in ON_TARGET),
        (settings.data_free and settings.calibrate == "target",
         "--calibrate target needs images of the target, which --data-free does not touch: use "
         "--calibrate sources."),
        ("eats" in names and not _has_eats(settings.sources),
         f"eats needs {' or '.join(EATS_SOURCES)} among the sources, which are {listed(sources)}."),
        (name_of(settings.target) in sources,
         f"{name_of(settings.target)} is the target and can't be a source as well: take it out of "
         "--sources."),
        *((name in BESIDE_SOURCES,
           f"{name!r} can't be the name of a source. Choose another NAME in NAME=PATH.")
          for name in sources),
    )
    for wrong, sentence in contradictions:
        if wrong:
            raise UserError(sentence)
