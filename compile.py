"""The experiment, from data to table.

Each step is a stage that also runs by hand; what a run folder holds already is reused.

    python compile.py                       # CIFAR10, the published protocol
    python compile.py --target digits       # built-in data, no download, minutes on a CPU
    python compile.py --target pets=/data/pets --sources web=/data/crawl,places365
"""
if __name__ == "__main__":      # --help and wrong flags need no PyTorch
    from kd.flags import parser_of
    parser_of("compile", __doc__).parse_args()

import dataclasses
import functools
import time
from pathlib import Path

import data
from distill import report_student, train_student
from kd import checkpoints, engine, models, report
from kd.command import command
from kd.files import UserError, is_first, listed, read_product, require_none, say
from kd.flags import parse
from kd.matching import norms_of
from kd.processes import alone, first_alone, gathered, rank, wait, world_size
from kd.record import Experiment
from kd.run import Run
from kd.scoring import Scoring, load_criteria, no_mms, report_thresholds
from kd.settings import BUILT_IN_SOURCES, ON_TARGET, resolve
from kd.state_dicts import read_file
from kd.training import require_batch
from kd.values import is_file, name_of
from TeacherTrain import report_teacher, teacher_to_be, train_teacher, weights_of
from transfer import bucket_size, make_transfer_set, report_pool, report_transfer_set


def runs_of(settings):
    """The Run of each seed: several seeds have a folder each below the run folder."""
    if len(settings.seeds) == 1:
        return [Run(settings)]
    return [Run(dataclasses.replace(settings, seeds=(seed,),
                                    run_dir=str(Path(settings.run_dir) / f"seed-{seed}")))
            for seed in settings.seeds]


def check_everything_is_there(settings, runs):
    """Raises UserError early, for what is wrong or can't be had; fetches the rest."""
    for run in runs:
        run.check()
    load_criteria(settings)
    reads_sources = bool(settings.read_sources)
    data.locate(settings, reads_sources)
    have_teacher = all(run.has("teacher.json") for run in runs)
    if settings.teacher_checkpoint and not have_teacher:
        read_file(settings.teacher_checkpoint)      # which may be missing
    weights = [] if have_teacher else weights_of(settings)
    weights += map(settings.start_of, settings.approaches)
    require_none(models.unavailable(weights, settings.image_size))
    data.obtain(settings, reads_sources)


def check_networks(settings, target, runs):
    """Raises UserError where the teacher does not fit or can't give an approach, or where the
    student can't be trained: before anything long, and before anything is deleted."""
    approaches = set(settings.approaches)
    have_teacher = all(run.has("teacher.json") for run in runs)
    if have_teacher and not runs[0].restarted:
        return
    if have_teacher:
        teacher = checkpoints.load(runs[0] / "teacher.pt", settings.teacher_arch)
    else:
        teacher = teacher_to_be(settings, target)
    if settings.read_sources:
        bucket_size(settings, target, teacher.classes)
    several = len(runs) * len(settings.rows) > 1        # of which each is trained by one process
    require_batch("--batch-size", settings.batch_size, 1 if several else world_size())
    weights = settings.student_weights if is_file(settings.student_weights) else "none"
    student = models.untrained(settings.student_arch, teacher.classes, weights, settings.image_size)
    if settings.student_weights == "teacher":
        models.inherit(student, teacher, required=True)
    if models.head_weight(teacher) is None and not settings.mms_plain and (
            {"mms", "random"} & approaches):
        raise UserError(no_mms(settings.teacher_arch))
    if {"matched", "weighted"} & approaches:
        norms_of(teacher)


def open_sources(settings, runs):
    """[{name: what has `batches`} of each run], opened once where no seed decides what they are."""
    @functools.cache
    def opened(spec, seed):
        of_seed = dataclasses.replace(settings, seeds=(seed,))
        return first_alone(lambda: data.load_source(of_seed, spec))
    return [{name_of(spec): opened(
        spec, run.settings.seed if spec in BUILT_IN_SOURCES else settings.seed)
        for spec in settings.read_sources} for run in runs]


def describe(target):
    splits = [f"{len(images):,} {name} images" for images, name in (
        (target.train, "training"), (target.test, "test")) if images]
    classes = f", {len(target.classes):,} classes: {listed(target.classes, 10)}" if (
        target.classes) else ""
    return (" and ".join(splits) or "no images") + classes


def prepare(run, device, target, sources):
    """Teacher, scores and transfer sets of one seed. sources: {name: what has `batches`}."""
    report_teacher(train_teacher(run, target, device))
    selecting = [approach for approach in run.settings.rows if approach not in ON_TARGET]
    if selecting:
        scoring = Scoring(run, device, data, target=target, sources=sources)
        for approach in selecting:
            scoring.require(approach)
        for name in (name for name in scoring.criteria if name in selecting):
            report_thresholds(name, scoring)
        report_pool(scoring)
        for approach in selecting:
            report_transfer_set(approach, make_transfer_set(run, approach, scoring))


def train_students(runs, target, device):
    """All rows of all seeds. Several processes share the students out, one to a device, and each
    trains its own as a single process would."""
    pairs = [(run, approach) for run in runs for approach in run.settings.rows]
    if world_size() > 1 and len(pairs) > 1:
        lacking = gathered([at for at, (run, approach) in enumerate(pairs) if read_product(
            run, f"students/{approach}.json")[0] is None])[0]       # as the first process sees it
        lacking = [pairs[at] for at in lacking]
        mine = lacking[rank()::world_size()]
        with alone():
            for run, approach in mine:
                train_student(run, approach, target, device)
        wait()
        for run, approach in lacking:       # by this process or another one
            run.found[f"students/{approach}"] = False
    for run in runs:
        if len(runs) > 1:
            say(f"seed {run.settings.seed}")
        for approach in run.settings.rows:
            report_student(train_student(run, approach, target, device))
        reused = [name for name, done in run.found.items() if done]
        if reused:
            say(f"reused: {listed(reused)}")


def main(argv):
    began = time.monotonic()
    given = parse(argv, "compile", __doc__)
    settings = resolve(given)
    device, runs = engine.pick_device(settings.device, settings.amp), runs_of(settings)
    first_alone(lambda: is_first() and check_everything_is_there(settings, runs))
    target = first_alone(lambda: data.load_target(settings))
    say(f"target: {name_of(settings.target)}, {describe(target)}")
    check_networks(settings, target, runs)
    sources = open_sources(settings, runs)      # what is wrong with one shows before anything long
    for run in runs:
        first_alone(lambda run=run: run.open(device, given))
    for run, theirs in zip(runs, sources, strict=True):
        if len(runs) > 1:
            say(f"seed {run.settings.seed}")
        prepare(run, device, target, theirs)
        run.save_config(device, given)      # not before: what is refused is not what the run is
    train_students(runs, target, device)
    if is_first():
        say("")
        report.write(Experiment(settings.run_dir, [run.path for run in runs]))
    say(f"{time.monotonic() - began:,.0f} s in all; everything is in {settings.run_dir}")


if __name__ == "__main__":
    command(main)
