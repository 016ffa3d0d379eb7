"""The experiment, from data to table.

Each step is a stage that also runs by hand; what a run folder holds already is not made again.

    python compile.py                       # CIFAR10, the reference recipe, all approaches
    python compile.py --target digits       # built-in data, no download, minutes on a CPU
"""
import dataclasses
import math
import time
from pathlib import Path

import data
import engine
import models
import report
from distill import report_student, train_student
from files import UserError, is_first, listed, read_json, remove_beside, say, stop_on
from packing import Packed
from progress import expect
from record import Experiment
from run import DATA_FREE_SIZE, RECIPES, RUN_FLAGS, TABLE, Run, command, name_of, name_of_arch, parse, resolve
from TeacherTrain import has_linear_head, load_checkpoint, report as report_teacher, split_target, train_teacher
from transfer import Scoring, bucket_size, criteria_of, make_thresholds, make_transfer_set, no_mms, report_thresholds, report_transfer_set


def of_each_seed(settings):
    """The settings of each seed's run: several seeds have a folder each below the run folder."""
    if len(settings.seeds) == 1:
        return [settings]
    return [dataclasses.replace(settings, seed=seed, seeds=(seed,), run_dir=str(Path(settings.run_dir) / f"seed-{seed}"))
            for seed in settings.seeds]


def check_everything_is_there(settings):
    """Raises UserError, a line for each thing that is neither on disk nor to be had, before anything long starts.
    Then fetches what is to be had."""
    runs = [Run(each) for each in of_each_seed(settings)]

    def is_made(name):
        return all(run.has(name) for run in runs)
    specs = data.specs_of(settings, sources=set(settings.approaches) != {"supervised"})
    weights = [] if settings.teacher_checkpoint or is_made("teacher.json") else [("teacher", settings.teacher_arch, settings.teacher_weights, settings.teacher_size)]
    if "supervised" in settings.approaches and not is_made("students/supervised.json"):
        weights.append(("student", settings.student_arch, settings.supervised_weights, None))
    weights.append(("student", settings.student_arch, settings.student_weights, None))
    teacher_arch = models.arch_of(settings.teacher_checkpoint, settings.teacher_arch) if settings.teacher_checkpoint else settings.teacher_arch
    if settings.student_weights == "teacher":
        models.require_heir(settings.student_arch, teacher_arch)
    criteria_of(settings)
    if not settings.restart:
        for run in runs:
            run.check()
    stop_on(data.unavailable(specs, settings.data_dir, settings.image_size) + models.unavailable(weights, settings.image_size))
    stop_on(data.obtain(specs, settings.data_dir))


def of_any_kind(arch):
    """Whether a network is none of torchvision's, of which it is known what they do."""
    return models.is_own(arch) or arch.startswith(models.TIMM)


def check_networks(settings, target):
    """Raises UserError where the teacher that is given doesn't fit, or can't give an approach, or where the student can't be trained. Returns the names of the classes."""
    classes = target.classes or load_checkpoint(settings, None).classes
    if of_any_kind(settings.student_arch):
        size = settings.image_size
        models.require_trainable(models.require_logits(models.build(settings.student_arch, classes, input_size=models.input_size_of(settings.student_arch, size)), size), size)
    if (settings.teacher_checkpoint or of_any_kind(settings.teacher_arch)) and not Run(settings).has("teacher.json") and not has_linear_head(settings, classes):
        if not settings.mms_plain and {"mms", "random"} & set(settings.approaches):
            raise UserError(no_mms(name_of_arch(settings.teacher_arch)))
        say(f"the logits of {name_of_arch(settings.teacher_arch)} are made by no linear layer"
            + (": its MMS is the plain margin z_a - z_b" if settings.mms_plain else ""))
    return classes


def largest_sizes(settings, target, classes, sources):
    """(images of each class that are asked for, images of all sources, {approach: images that its student may have at most});
    of sources in shards nobody knows yet: math.inf."""
    target_size = len(target.train) if target.train else None
    bucket = bucket_size(settings.transfer_size, target_size, len(classes))
    counted = sources and all(isinstance(source, Packed) for source in sources.values())
    there = sum(map(len, sources.values())) if counted else math.inf
    sizes = {"supervised": target_size and len(split_target(target_size, 0)[0]), "all": there}
    return bucket, there, {approach: sizes.get(approach, min(there, bucket * len(classes))) for approach in settings.approaches}


def check_sizes(settings, target, classes, sources):
    """Raises UserError where the command line asks for sizes that no student can have."""
    bucket, there, sizes = largest_sizes(settings, target, classes, sources)
    asked = settings.transfer_size and not (settings.data_free and settings.transfer_size == DATA_FREE_SIZE)
    if asked and bucket > there and settings.shortfall != "repeat":
        raise UserError(f"--transfer-size {settings.transfer_size:,} asks for {bucket:,} images of each class, and all sources together have {there:,}: give a smaller one, or --shortfall repeat")
    largest = max(sizes.values())
    if settings.batch_size > largest and settings.batch_size != RECIPES[settings.recipe].student.batch_size:
        raise UserError(f"--batch-size {settings.batch_size:,} is more than the {largest:,} images that a student here can have: give a smaller one")


def long_work(settings, target, classes, sources):
    """[(label of its progress, images)] of what this run still has to do, as far as that is known before: of a selection the largest size."""
    run, (_, _, sizes) = Run(settings), largest_sizes(settings, target, classes, sources)

    def trained(recipe, count):
        return (recipe.steps or recipe.epochs * max(1, count // recipe.batch_size)) * min(recipe.batch_size, count) if count < math.inf else 0
    if not settings.teacher_checkpoint and not run.has("teacher.json"):
        yield "teacher", trained(settings.teacher_recipe, len(split_target(len(target.train), 0)[0]))
    for name, source in sources.items():
        if isinstance(source, Packed) and not run.has(f"scores/{name}.npz"):
            yield f"scoring {name}", len(source)
    for approach, largest in sizes.items():
        summary = f"transfer/{approach}/summary.json"
        size = read_json(run / summary)["size"] if run.has(summary) else largest
        if not run.has(f"students/{approach}.json"):
            yield f"student {approach}", trained(settings.student_recipe, size)


def describe(target, classes):
    """What there is of the target, in a few words."""
    splits = [f"{len(images):,} {name}" for images, name in ((target.train, "training"), (target.test, "test")) if images]
    return (" and ".join(splits) + " images" if splits else "no image") + f" of {len(classes):,} classes: {listed(classes, most=10)}"


def open_runs(settings, device):
    """Opens the run folder of every seed, so that all that --restart takes away is gone before the first one begins."""
    runs = [Run(each) for each in of_each_seed(settings)]
    for run in runs:
        run.claim()
    for run in runs:
        run.open(device)
    if is_first() and len(settings.seeds) > 1:
        remove_beside(settings.run_dir, ("", "figures/"), held=False)
        for path in [path for pattern in TABLE for path in Path(settings.run_dir).glob(pattern)] if settings.restart or settings.restart_from else []:
            path.unlink()       # of all seeds together, as they were


def run_once(settings, device, later=(), of=None):
    """One seed: data, teacher, scores, transfer sets, students. later: the settings of the seeds that follow; of: those of all seeds, for the first
    one, which opens the run folders. Returns the run."""
    target = engine.first_alone(lambda: data.target_of(settings))
    classes = check_networks(settings, target)
    target_size = len(target.train) if target.train else None
    selecting = [approach for approach in settings.approaches if approach != "supervised"]
    # Whatever is wrong with a source shows here, before anything long.
    sources = engine.first_alone(lambda: {name_of(source): data.source_of(settings, source) for source in settings.sources}) if selecting else {}
    check_sizes(settings, target, classes, sources)
    if of is not None:
        engine.first_alone(lambda: open_runs(of, device))
    run = Run(settings)
    say(f"target: {describe(target, classes)}")

    def look_ahead():
        expect([piece for each in (settings, *later) for piece in long_work(each, target, classes, sources)])
    look_ahead()
    report_teacher(train_teacher(run, target, device))
    if selecting:
        scoring = Scoring(run, device, target, sources)
        thresholds = make_thresholds(run, scoring)
        for name in (name for name in scoring.criteria if name in selecting):
            report_thresholds(name, scoring.criteria[name], thresholds[name], scoring.classes, settings.calibrate)
        for approach in selecting:
            report_transfer_set(approach, make_transfer_set(run, approach, scoring, target_size))
    look_ahead()        # now the sizes of the transfer sets are known
    for approach in settings.approaches:
        report_student(train_student(run, approach, target, device))
    return run


def main(argv):
    began = time.monotonic()
    settings = resolve(parse(argv, __doc__, RUN_FLAGS))
    device = engine.pick_device(settings.device)
    engine.first_alone(lambda: is_first() and check_everything_is_there(settings))
    seeds = of_each_seed(settings)
    for number, each in enumerate(seeds, 1):
        if len(settings.seeds) > 1:
            say(f"seed {each.seed}")
        run_once(each, device, seeds[number:], settings if number == 1 else None)
    if is_first():
        say("\n" + report.write(settings))
        say(report.illustrate(Experiment(settings.run_dir, settings)))
    say(f"{time.monotonic() - began:,.0f} s in all; everything is in {settings.run_dir}")


if __name__ == "__main__":
    command(main)
