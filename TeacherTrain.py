"""Fine-tune the teacher on the target.

In:  the target's training split, cut once by a seeded generator into a part to train on and a confidence set.
Out: split.npz, teacher.pt, teacher.json in the run folder.

    python TeacherTrain.py --target cifar10
"""
import numpy as np
import torch

import engine
import models
from data import load_target, unavailable
from run import UserError, command, open_stage, read_json, say, stop_on, write_atomically, write_json

TRAIN_SHARE = 0.8       # of the target's training split; the rest is the confidence set
WATCHED = 2000          # images of the confidence set on which accuracy is noted after each epoch


def split_target(count, seed):
    """Cuts `count` images into (train, confidence): int64 indices, disjoint, sorted, together all of them."""
    order = np.random.default_rng(engine.seed_for(seed, "split")).permutation(count)
    cut = round(TRAIN_SHARE * count)
    return np.sort(order[:cut]), np.sort(order[cut:])


def saved_split(run, count):
    """The run's (train, confidence), drawn when there is none yet: nothing draws it a second time."""
    path = run / "split.npz"
    if not path.exists():
        train, confidence = split_target(count, run.settings.seed)
        write_atomically(path, lambda file: np.savez(file, train=train, confidence=confidence))
    with np.load(path) as split:
        train, confidence = split["train"], split["confidence"]
    if not len(confidence) or len(train) < 2:
        raise UserError(f"{count} training images of the target are too few to cut a confidence set from")
    if len(train) + len(confidence) != count:
        raise UserError(f"{path} cuts {len(train) + len(confidence):,} images and the target has {count:,}: "
                        "the data set has changed; use another --run-dir, or --restart")
    return train, confidence


def watch(target, confidence):
    """(images, labels) of about WATCHED images of the confidence set, for an accuracy after each epoch."""
    rows = confidence[:: max(1, len(confidence) // WATCHED)]
    return target.train.images[rows], target.train.labels[rows]


def train_teacher(run, target, device):
    """Makes teacher.pt and teacher.json, unless they are there. Returns the content of teacher.json.

    target: a data.Target. With `teacher_checkpoint` in the settings that network is used as it is.
    """
    if (run / "teacher.json").exists() and (run / "teacher.pt").exists():
        return read_json(run / "teacher.json")
    settings = run.settings
    train, confidence = saved_split(run, len(target.train))
    seed = engine.seed_for(settings.seed, "teacher")
    if settings.teacher_checkpoint:
        teacher = models.load(settings.teacher_checkpoint).to(device)
        if teacher.classes != target.classes:
            raise UserError(f"{settings.teacher_checkpoint} knows {len(teacher.classes)} classes ({', '.join(teacher.classes[:3])}, ...), "
                            f"the target has {len(target.classes)} ({', '.join(target.classes[:3])}, ...)")
        training = engine.Training()
    else:
        torch.manual_seed(seed)
        teacher = models.build(settings.teacher_arch, target.classes, settings.teacher_weights)
        watched = watch(target, confidence)
        training = engine.train(
            teacher, target.train.images, train, engine.cross_entropy(target.train.labels, device),
            settings.teacher_recipe, seed=seed, device=device, checkpoint=run / "teacher.part", label="teacher",
            evaluate=lambda: engine.accuracy(teacher, *watched, device=device), remedy="another --recipe")
    figures = {
        "arch": teacher.arch,
        "accuracy": engine.accuracy(teacher, target.test.images, target.test.labels, device=device),
        "confidence_accuracy": engine.accuracy(teacher, target.train.images, target.train.labels, confidence, device),
        "seconds": training.seconds, "images_per_second": training.images_per_second, "history": training.history,
    }
    models.save(run / "teacher.pt", teacher, accuracy=figures["accuracy"])
    write_json(run / "teacher.json", figures)
    (run / "teacher.part").unlink(missing_ok=True)
    return figures


def report(figures):
    say(f"teacher: {figures['arch']}, {figures['accuracy']:.2%} on the test split, {figures['confidence_accuracy']:.2%} on the "
        f"confidence set, trained in {figures['seconds']:,.0f} s at {figures['images_per_second']:,.0f} img/s")


def main(argv):
    settings, run, _ = open_stage(argv, __doc__)
    device = engine.pick_device(settings.device)
    weights = [] if settings.teacher_checkpoint else [(settings.teacher_arch, settings.teacher_weights)]
    stop_on(unavailable([(settings.target, "target")], settings.data_dir) + models.unavailable(weights))
    run.open(device)
    target = load_target(settings.target, settings.data_dir, settings.seed, settings.limit, max_bad=settings.max_bad)
    report(train_teacher(run, target, device))


if __name__ == "__main__":
    command(main)
