"""The experiment, from data to table.

Each step is a stage that also runs by hand; what a run folder holds already is not made again.

    python compile.py                       # CIFAR10, the reference recipe, all approaches
    python compile.py --target digits       # built-in data, no download, minutes on a CPU
"""
import dataclasses
import time
from pathlib import Path

import data
import engine
import models
import report
from distill import report_student, train_student
from run import RUN_FLAGS, Run, command, name_of, parse, resolve, say, stop_on
from TeacherTrain import report as report_teacher, train_teacher
from transfer import CRITERIA, Scoring, bucket_size, make_thresholds, make_transfer_set, report_thresholds, report_transfer_set


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
        return not settings.restart and all((run / name).exists() for run in runs)
    specs = [(settings.target, "target")]
    if set(settings.approaches) != {"supervised"}:
        specs += [(source, "source") for source in settings.sources]
    weights = [] if settings.teacher_checkpoint or is_made("teacher.json") else [(settings.teacher_arch, settings.teacher_weights)]
    if "supervised" in settings.approaches and not is_made("students/supervised.json"):
        weights.append((settings.student_arch, settings.supervised_weights))
    weights.append((settings.student_arch, settings.student_weights))
    if settings.teacher_checkpoint:
        models.read(settings.teacher_checkpoint)
    if not settings.restart:
        for run in runs:
            run.check()
    stop_on(data.unavailable(specs, settings.data_dir) + models.unavailable(weights))
    stop_on(data.obtain(specs, settings.data_dir))


def run_once(settings, device):
    """One seed: data, teacher, scores, transfer sets, students. Returns the run."""
    target = data.load_target(settings.target, settings.data_dir, settings.seed, settings.limit, max_bad=settings.max_bad)
    bucket_size(settings.transfer_size, len(target.train), len(target.classes))
    selecting = [approach for approach in settings.approaches if approach != "supervised"]
    # Whatever is wrong with a source shows here, before anything long.
    sources = {name_of(source): data.load_source(source, settings.data_dir, settings.seed, settings.limit, max_bad=settings.max_bad)
               for source in settings.sources} if selecting else {}
    run = Run(settings).open(device)
    say(f"target: {len(target.train):,} training and {len(target.test):,} test images of {len(target.classes)} classes")
    report_teacher(train_teacher(run, target, device))
    if selecting:
        scoring = Scoring(run, device, target, sources)
        thresholds = make_thresholds(run, scoring)
        for criterion in (c for c in CRITERIA if c in selecting):
            report_thresholds(criterion, thresholds[criterion], scoring.classes, settings.calibrate)
        for approach in selecting:
            report_transfer_set(approach, make_transfer_set(run, approach, scoring, len(target.train)))
    for approach in settings.approaches:
        report_student(train_student(run, approach, target, device))
    return run


def main(argv):
    began = time.monotonic()
    settings = resolve(parse(argv, __doc__, RUN_FLAGS))
    device = engine.pick_device(settings.device)
    check_everything_is_there(settings)
    folders = []
    for each in of_each_seed(settings):
        if len(settings.seeds) > 1:
            say(f"seed {each.seed}")
        folders.append(run_once(each, device).path)
    say("\n" + report.write(settings, folders))
    say(f"{time.monotonic() - began:,.0f} s in all; everything is in {settings.run_dir}")


if __name__ == "__main__":
    command(main)
