"""Train the teacher on the target.

In:  the target's training split, cut once by a seeded generator into a part to train on and a
     confidence set. Out: split.npz, teacher.pt, teacher.json, teacher.npz (its answers to the
     test split).

    python TeacherTrain.py --target cifar10
"""
if __name__ == "__main__":      # --help and wrong flags need no PyTorch
    from kd.flags import parser_of
    parser_of("TeacherTrain", __doc__).parse_args()

import data
from kd import checkpoints, engine, models
from kd.command import command
from kd.evaluation import evaluate, saved_split, test_of, watcher
from kd.files import UserError, listed, require_none, say
from kd.processes import first_alone, on_all_ranks
from kd.run import open_stage
from kd.training import Watch, cross_entropy, require_batch, train
from kd.values import name_of_arch

LEARNED = 0.03      # in accuracy: a confidence set so far above the test was learned from


@on_all_ranks
def train_teacher(run, target, device):
    """Makes teacher.pt and teacher.json, unless they are there. Returns the content of
    teacher.json. On another test split than before the teacher is measured again, not trained.

    target: a data.Target. A --teacher-checkpoint is used as it is. An accuracy is None where the
    target has no images for it."""
    settings, path = run.settings, run / "teacher.pt"
    start = settings.teacher_checkpoint or settings.teacher_weights
    inputs = {"images": target.train.fingerprint if target.train else None,
              "files": list(checkpoints.files_of(settings.teacher_arch, start).values())}
    product, test = run.product("teacher.json", **inputs), test_of(target)
    files = [path, run / "teacher.npz"] if target.test else [path]
    if product.done and product.content.get("test", test) == test:
        return product.content
    train_rows, confidence = saved_split(run, len(target.train)) if target.train else (None, None)
    figures = {"seconds": 0.0, "images_per_second": 0.0, "history": []}
    if product.done:        # with another test split, or none
        teacher = checkpoints.load(path, settings.teacher_arch).to(device)
        if target.classes not in (None, teacher.classes) and not isinstance(settings.classes, int):
            raise UserError(f"{path} knows {listed(teacher.classes, 3)}, and the target has "
                            f"{listed(target.classes, 3)}, in another order or with other names. "
                            "Name the teacher's with --classes, and choose another --run-dir.")
        figures = {name: product.content[name] for name in figures}
        product.write(product.content | {"test": ""}, [path])   # its answers are written over
    elif settings.teacher_checkpoint:
        teacher = load_checkpoint(settings, target).to(device)
    else:
        seed = engine.seed_for(settings.seed, "teacher")
        engine.seed_all(seed)
        teacher = new_teacher(settings, target.classes)
        watch = Watch(run / "teacher.part", product.made_from, "teacher",
                      watcher(target, confidence, device), run.board("teacher"),
                      "a smaller --teacher-lr, with --restart-from teacher",
                      real=not settings.limit)
        training = train(teacher, target.train.images, train_rows,
                         cross_entropy(target.train.labels, device), settings.teacher_recipe,
                         seed=seed, device=device, watch=watch)
        figures = {name: getattr(training, name) for name in figures}
    accuracies, _ = evaluate(teacher, target, confidence, run / "teacher.npz", device)
    figures = {"arch": teacher.arch, "input_size": teacher.input_size, "classes": teacher.classes,
               **accuracies, "linear_head": models.head_weight(teacher) is not None,
               "test": test} | figures
    if settings.teacher_checkpoint:
        say_if_odd(accuracies, len(teacher.classes), settings.calibrate)
    if not product.done:
        checkpoints.save(path, teacher, accuracy=figures["accuracy"])
    return product.write(figures, files)


def new_teacher(settings, classes):
    """The network before its training, checked on a few images."""
    return first_alone(lambda: models.untrained(
        settings.teacher_arch, classes, settings.teacher_weights, settings.image_size,
        settings.teacher_size, settings.teacher_mean, settings.teacher_std))


def load_checkpoint(settings, target):
    """The teacher that was given, on the CPU, asked about a few images."""
    known, count = target.train or target.test, settings.classes
    teacher = checkpoints.load_teacher(
        settings.teacher_checkpoint, settings.teacher_arch,
        target.classes if known or not isinstance(count, int) else count, settings.teacher_size,
        settings.teacher_mean, settings.teacher_std, settings.image_size)
    images = known.images if known else models.noise(teacher, settings.image_size).numpy()
    models.question_teacher(teacher, images)
    return teacher


def teacher_to_be(settings, target):
    """The one that was given, or that will be trained. Raises UserError where it can't be."""
    if settings.teacher_checkpoint:
        return load_checkpoint(settings, target)
    require_batch("--teacher-batch-size", settings.teacher_batch_size)
    return new_teacher(settings, target.classes)


def say_if_odd(accuracies, classes, calibrate):
    """Says where a teacher that was given is near chance: its images or classes are misread; and
    where it has probably learned from the confidence set."""
    tested, measured = accuracies["accuracy"], accuracies["confidence_accuracy"]
    right = tested if measured is None else measured
    if calibrate == "target" and None not in (tested, measured) and measured > tested + LEARNED:
        say(f"teacher: it is right on {measured:.2%} of the confidence set and {tested:.2%} of the "
            "test split. If it has learned from images of the confidence set, its thresholds are "
            "too strict (--threshold, --floor).")
    if right is not None and right <= max(1.2 / classes, 0.3):
        say(f"teacher: {right:.2%} is low. Are its pixels and the order of its classes what it was "
            "trained with (--teacher-mean, --teacher-std, --teacher-size, --classes)?")


def report_teacher(figures):
    accuracy, on_confidence = figures["accuracy"], figures["confidence_accuracy"]
    said = [f"{accuracy:.2%} on the test split" if accuracy is not None else
            "no test split to measure its accuracy on"]
    if on_confidence is not None:
        said.append(f"{on_confidence:.2%} on the confidence set")
    speed = f"{figures['seconds']:,.0f} s at {figures['images_per_second']:,.0f} img/s"
    said.append(f"trained in {speed}" if figures["history"] else "used as it was given")
    say(f"teacher: {name_of_arch(figures['arch'])}, {', '.join(said)}")


def weights_of(settings):
    """What `models.unavailable` has to look for."""
    return [] if settings.teacher_checkpoint else [
        ("teacher", settings.teacher_arch, settings.teacher_weights, settings.teacher_size)]


def main(argv):
    run, given = open_stage(argv, "TeacherTrain", __doc__)
    settings, device = run.settings, engine.pick_device(run.settings.device, run.settings.amp)
    first_alone(lambda: data.obtain(settings, sources=False))
    first_alone(lambda: require_none(models.unavailable(weights_of(settings),
                                                        settings.image_size)))
    target = first_alone(lambda: data.load_target(settings))
    if run.restarted:       # what can't be is refused before anything is deleted
        teacher_to_be(settings, target)
    first_alone(lambda: run.open(device, given))
    report_teacher(train_teacher(run, target, device))
    run.save_config(device, given)
    say(f"saved in {run / 'teacher.pt'}")


if __name__ == "__main__":
    command(main)
