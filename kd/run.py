"""The run folder, and the one mechanism for "is it there, whole, and made from these inputs?".

What a stage makes is a product: some files and a JSON beside them, written last, that names the
settings and the digests of what it was made from, and the digests of its files. What comes later
has the digests of what came before among its inputs, so nothing else needs to know which setting
decides what."""
import dataclasses
import importlib.util
import json
import os
import platform
import shutil
import subprocess
from fnmatch import fnmatchcase
from pathlib import Path

from kd import flags
from kd.files import (
    UserError,
    file_digest,
    hold,
    is_first,
    listed,
    read_product,
    read_sealed,
    say,
    write_sealed,
)
from kd.flags import MAKER, USES, flag_of
from kd.settings import FIELDS, STAGES, resolve

# What each stage makes, as patterns below the run folder; nothing else there is ever deleted.
MADE_BY = {
    "teacher": ("split.npz", "split.json", "teacher.pt", "teacher.npz", "teacher.json",
                "teacher.part", "tensorboard/teacher", "wandb/teacher"),
    "scores": ("scores/*.np[yz]", "scores/*.json", "thresholds.json"),
    "transfer": tuple(f"transfer/*/{name}" for name in (
        "images.npy", "weights.npy", "manifest.csv", "summary.json")),
    "students": (*(f"students/*.{form}" for form in (
        "pt", "npz", "json", "part", "onnx", "pth", "safetensors")), "tensorboard/student-*",
        "wandb/student-*", "results.json", "results.md", "figures/*.png", "report.html"),
}
CHECKED = ("teacher.json", "transfer/*/summary.json", "students/*.json")


class Product:
    """A JSON in the run folder and the files that belong to it.

    done: whether it is there, whole, and made from `made_from`; content: what is in the JSON, then.
    """

    def __init__(self, run, name, made_from, remake):
        self.run, self.name, self.made_from = run, name, json.loads(json.dumps(made_from))
        self.content, wrong = read_product(run, name)
        if wrong and name == "teacher.json":    # it costs hours: nobody wants it made again unasked
            raise UserError(f"{wrong}. Restore it, or add --restart-from teacher to make another.")
        if wrong:
            say(f"{wrong}. It will be made again.")
        if self.content is not None and not remake:
            run.require_same(name, self.content, self.made_from)
        self.done = self.content is not None and not _changed(self.content, self.made_from)
        self.label = name.removesuffix(".json").removesuffix("/summary")    # as people say it
        run.found.setdefault(self.label, self.done)

    def write(self, content, files=()):
        """Writes the JSON, after its files (paths), and returns its content."""
        digests = {path.relative_to(self.run.path).as_posix(): file_digest(path)
                   for path in files} if is_first() else {}
        self.content = content | {"made_from": self.made_from, "files": digests}
        write_sealed(self.run / self.name, self.content)
        self.run.found[self.label] = False
        if is_first():      # what an interrupted training would have resumed from
            (self.run / self.name).with_suffix(".part").unlink(missing_ok=True)
        return self.content


def stage_of(name):
    return next(stage for stage, patterns in MADE_BY.items()
                if any(fnmatchcase(name, pattern) for pattern in patterns))


class Run:
    """The run folder of `settings`. stages: those whose settings the command line states; found:
    {product: whether it was done already}, in order."""

    def __init__(self, settings, stages=STAGES):
        self.path, self.settings, self.stages = Path(settings.run_dir), settings, stages
        self.found = {}

    def __truediv__(self, name):
        return self.path / name

    def board(self, name):
        """{kind: folder} of the boards on which a training is written."""
        return {kind: self.path / kind / name for kind in ("tensorboard", "wandb")
                if getattr(self.settings, kind)}

    def product(self, name, remake=False, **inputs):
        """The Product `name`, a path below the folder: made from the settings of its stage and from
        `inputs`, digests or other plain values. Raises UserError where it was made from other ones,
        unless `remake`: then it is made again, since it takes no time."""
        return Product(self, name, self.settings.of_stage(stage_of(name)) | inputs, remake)

    def content_of(self, name):
        """The content of an earlier stage's product. Raises UserError that says how to make it."""
        content, wrong = read_product(self, name)
        if content is None:
            self.refuse(name, wrong or f"{self / name} is missing")
        return content

    def refuse(self, name, wrong):
        """Raises UserError: what is wrong with a product, and the stage that makes it right."""
        raise UserError(f"{wrong}. Make it with `python {MAKER[stage_of(name)]}` and the flags "
                        "of this run.")

    @property
    def restarted(self):
        """The stages whose files --restart or --restart-from takes away."""
        first = "teacher" if self.settings.restart else self.settings.restart_from
        return STAGES[STAGES.index(first):] if first else ()

    def has(self, name):
        """Whether a product is there that no --restart takes away."""
        return (self / name).exists() and stage_of(name) not in self.restarted

    def require_same(self, name, content, now):
        """Raises UserError where a product was made from something else than `now`, with every key
        that differs and the flag that helps."""
        stage, changed = stage_of(name), _changed(content, now)
        if not changed:
            return
        stated = [key for key in changed if key in FIELDS or key == "seed"]
        was = [_with(key, changed[key]) for key in stated]
        was += [f"with another version of its {key.replace('_', ' ')}" for key in changed
                if key not in stated]
        new = ", ".join(_with(key, now[key]) for key in stated)
        raise UserError(
            f"{self / name} was made {', '.join(was)}{f', not {new}' if new else ''}. Give what "
            f"it was made with to keep it. To make it again, run {MAKER[stage]} or compile.py with "
            f"--restart-from {stage}, or choose another --run-dir.")

    def check(self):
        """Holds the folder. Raises UserError, before any long work, where a setting differs from
        the one with which a product of this run was made, or another process holds it."""
        for kind in self.board(""):
            if importlib.util.find_spec(kind) is None:
                raise UserError(f"--{kind} needs a package: pip install {kind}")
        below = sorted(self.path.glob("seed-*/config.json"))
        if below and not (self / "config.json").exists():
            raise UserError(f"{self.path} holds several seeds. Name one, as --run-dir "
                            f"{below[0].parent}, or, for compile.py, all with --seeds.")
        for pattern in CHECKED:
            for path in sorted(self.path.glob(pattern)):
                name, content = path.relative_to(self.path).as_posix(), read_sealed(path)
                if stage_of(name) in self.stages and self.has(name) and content is not None:
                    self.require_same(name, content, self.settings.of_stage(stage_of(name)))
        hold(self.path)

    def open(self, device, given):
        """Deletes what is to be made again, and writes config.json after that, or where there is
        none: once the work is done `save_config` has it. device: the torch.device that computes."""
        config = self._config(device, given)        # which may refuse what is given
        if is_first():
            self._clear()
            for path in self.path.rglob(".*.part"):     # of a killed process
                path.unlink()
        if self.restarted or not (self / "config.json").exists():
            write_sealed(self / "config.json", config)

    def save_config(self, device, given):
        write_sealed(self / "config.json", self._config(device, given))

    def _config(self, device, given):
        given = flags.repeatable(self.settings, given)
        settings = resolve(given | {"run_dir": str(self.path)})     # of a stage by hand: of all
        return dataclasses.asdict(settings) | {
            "seed": settings.seed, "device": device.type, "given": given} | environment()

    def _clear(self):
        patterns = [pattern for stage in self.restarted for pattern in MADE_BY[stage]]
        patterns += ["config.json"] * self.settings.restart
        made = [path for pattern in patterns for path in sorted(self.path.glob(pattern))]
        for name in ("teacher_checkpoint", "teacher_weights", "student_weights"):
            path = getattr(self.settings, name)
            if path and Path(path).resolve() in [each.resolve() for each in made]:
                raise UserError(f"--restart would delete {path}, which is given as an input. Copy "
                                "it to another folder first.")
        if made:
            names = [path.relative_to(self.path).as_posix() for path in made]
            say(f"Deleting {listed(names)} in {self.path}.")
        for path in made:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _changed(content, now):
    """{key: what a product was made from} where that differs from `now`. What an older version had
    besides counts for nothing, and what it had not is what it did."""
    before = flags.ADDED | content["made_from"]
    return {key: before.get(key) for key in now if before.get(key) != now[key]}


def _with(key, value):
    if value is None or isinstance(value, bool):
        return f"{'with' if value else 'without'} {flag_of(key)}"
    text = ",".join(map(str, value)) if isinstance(value, list) else (
        f"{value:.6g}" if isinstance(value, float) else value)
    return f"with {flag_of(key)} {text}"


def read_settings(folder):
    """(Settings, the content of config.json) of a run folder. Code that it names is not run."""
    config = flags.read_config(Path(folder) / "config.json")
    return resolve(config["given"] | {"run_dir": str(folder)}), config


def open_stage(argv, script, description):
    """For a stage run by hand: (its Run, what was given and what the run folder's config.json has
    beside it, of other stages too). What is not given comes from there."""
    given = everything = flags.parse(argv, script, description)
    where = {name: given[name] for name in ("target", "run_dir") if name in given}
    folder = resolve(where).run_dir
    config = Path(folder) / "config.json"
    if config.exists():
        given, everything = flags.with_config(config, given, script)
    approach = {"approaches": (given["approach"],)} if "approach" in given else {}
    run = Run(resolve(given | approach | {"run_dir": folder}), USES[script])
    run.check()
    return run, everything


def environment():
    """Versions, commit and machine, for config.json."""
    import numpy
    import torch
    import torchvision
    here, commit = Path(__file__).resolve().parent.parent, None
    if (here / ".git").exists() and shutil.which("git"):
        asked = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=here,
                               capture_output=True, text=True, check=False)
        commit = asked.stdout.strip() or None
    return {"versions": {"python": platform.python_version(), "torch": torch.__version__,
                         "torchvision": torchvision.__version__, "numpy": numpy.__version__},
            "commit": commit,
            "machine": {"system": platform.platform(), "cores": os.cpu_count(),
                        "threads": torch.get_num_threads(),
                        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None}}
