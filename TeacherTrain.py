"""Fine-tune the teacher on the target.

In:  the target's training split, cut once by a seeded generator into a part to train on and a confidence set.
Out: split.npz, teacher.pt, teacher.json in the run folder.

    python TeacherTrain.py --target cifar10
"""
import numpy as np
import torch

import engine
import models
from data import specs_of, target_of, unavailable
from files import UserError, is_usable, read_json, require_whole, say, stop_on, write_atomically, write_json
from run import command, default_teacher, name_of_arch, open_stage

TRAIN_SHARE = 0.8       # of the target's training split; the rest is the confidence set
WATCHED = 2000          # images of the confidence set on which accuracy is noted after each epoch


def split_target(count, seed):
    """Cuts `count` images into (train, confidence): int64 indices, disjoint, sorted, together all of them."""
    order = np.random.default_rng(engine.seed_for(seed, "split")).permutation(count)
    cut = round(TRAIN_SHARE * count)
    return np.sort(order[:cut]), np.sort(order[cut:])


@engine.together
def _draw_split(path, count, seed):
    if not is_usable(path):
        train, confidence = split_target(count, seed)
        write_atomically(path, lambda file: np.savez(file, train=train, confidence=confidence))


def saved_split(run, count):
    """The run's (train, confidence), drawn when there is none yet: nothing draws it a second time."""
    path = run / "split.npz"
    _draw_split(path, count, run.settings.seed)
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


def answer_test_split(classifier, target, path, device):
    """What a classifier says to each image of the test split, (N,) int64, which is written to `path` as well, {"predicted", "labels"}.

    The test split is read here alone.
    """
    predicted = engine.answers(classifier, target.test.images, device=device, **_gone_on_from(path, "test", target.test, classifier))
    write_atomically(path, lambda file: np.savez(file, predicted=predicted, labels=target.test.labels))
    return predicted


def _gone_on_from(path, what, images, classifier):
    """The checkpoint of an evaluation, beside `path`, and what it is of."""
    return dict(checkpoint=engine.Checkpoint(path.with_suffix(f".{what}.part"), f"{path.stem} on the {what} images", own=True),
                mark=f"{images.made_from}, {engine.checksum(classifier)}, {engine.process()}")


def evaluate(classifier, target, confidence, path, device):
    """{"accuracy": on the test split, "confidence_accuracy": on the confidence set}, None where the target has no images for it. The checkpoints of
    this work lie beside `path` until `engine.remove_checkpoints`."""
    return {"accuracy": float((answer_test_split(classifier, target, path, device) == target.test.labels).mean()) if target.test else None,
            "confidence_accuracy": engine.accuracy(
                classifier, target.train.images, target.train.labels, confidence, device, **_gone_on_from(path, "confidence", target.train, classifier)) if target.train else None}


@engine.together
def train_teacher(run, target, device):
    """Makes teacher.pt and teacher.json, unless they are there. Returns the content of teacher.json.

    target: a data.Target. With `teacher_checkpoint` in the settings that network is used as it is. An accuracy is None
    where the target has no images for it.
    """
    checkpoint = run / "teacher.part"
    if (run / "teacher.json").exists() and (run / "teacher.pt").exists():
        for name in ("teacher.json", "teacher.pt"):
            require_whole(run / name, "restore it, or train another teacher with --restart-from teacher")
        figures = read_json(run / "teacher.json")
        models.require_same_files(run / "teacher.pt", figures.get("files", {}))
        if target.test and not is_usable(run / "teacher.npz"):
            answer_test_split(models.load(run / "teacher.pt", run.settings.teacher_arch).to(device), target, run / "teacher.npz", device)
        engine.remove_checkpoints(checkpoint)
        return figures
    settings = run.settings
    files = models.files_of(settings.teacher_arch, settings.teacher_checkpoint or settings.teacher_weights)
    train, confidence = saved_split(run, len(target.train)) if target.train else (None, None)
    seed = engine.seed_for(settings.seed, "teacher")
    if settings.teacher_checkpoint:
        teacher = load_checkpoint(settings, target.classes).to(device)
        training = engine.Training()
    else:
        torch.manual_seed(seed)
        teacher = models.require_trainable(models.require_logits(engine.first_alone(lambda: models.build(
            settings.teacher_arch, target.classes, settings.teacher_weights, size_of(settings), settings.teacher_mean, settings.teacher_std)),
            settings.image_size), settings.image_size)
        watched = watch(target, confidence)
        training = engine.train(
            teacher, target.train.images, train, engine.cross_entropy(target.train.labels, device),
            settings.teacher_recipe, seed=seed, device=device, checkpoint=checkpoint, label="teacher",
            evaluate=lambda network: engine.accuracy(network, *watched, device=device), remedy="a smaller --teacher-lr", board=run.board("teacher"),
            mark=f"{target.train.made_from}, {files}")
    figures = {
        "arch": teacher.arch, "input_size": teacher.input_size, "classes": teacher.classes,
        **evaluate(teacher, target, confidence, run / "teacher.npz", device),
        "linear_head": models.head_weight(teacher) is not None, "files": files,
        "seconds": training.seconds, "images_per_second": training.images_per_second, "history": training.history,
    }
    models.save(run / "teacher.pt", teacher, accuracy=figures["accuracy"])
    write_json(run / "teacher.json", figures)
    engine.remove_checkpoints(checkpoint)
    return figures


def size_of(settings):
    """The edge in pixels of what the teacher looks at."""
    return settings.teacher_size or models.input_size_of(settings.teacher_arch, settings.image_size)


def has_linear_head(settings, classes):
    """Whether a linear layer makes the logits of the teacher to come, whose weights, where they are given, must fit."""
    teacher = (load_checkpoint(settings, classes) if settings.teacher_checkpoint else
               models.build(settings.teacher_arch, classes, input_size=size_of(settings)))
    return models.head_weight(teacher) is not None


def load_checkpoint(settings, classes):
    """The teacher that was given, on the CPU. classes: names, or None where nothing but it tells them."""
    return models.load_teacher(settings.teacher_checkpoint, settings.teacher_arch, classes,
                               settings.teacher_size, settings.teacher_mean, settings.teacher_std, settings.image_size, default_teacher(settings.target))


def report(figures):
    accuracy, confidence_accuracy = (None if value is None else f"{value:.2%}" for value in (figures["accuracy"], figures["confidence_accuracy"]))
    said = [f"{accuracy} on the test split" if accuracy else "no test split to measure its accuracy on"]
    if confidence_accuracy:
        said.append(f"{confidence_accuracy} on the confidence set")
    said.append(f"trained in {figures['seconds']:,.0f} s at {figures['images_per_second']:,.0f} img/s" if figures["history"] else "as it was given")
    say(f"teacher: {name_of_arch(figures['arch'])}, {', '.join(said)}")


def main(argv):
    settings, run, _ = open_stage(argv, __doc__)
    device = engine.pick_device(settings.device)
    weights = [] if settings.teacher_checkpoint else [("teacher", settings.teacher_arch, settings.teacher_weights, settings.teacher_size)]
    engine.first_alone(lambda: stop_on(unavailable(specs_of(settings, sources=False), settings.data_dir, settings.image_size)
                                       + models.unavailable(weights, settings.image_size)))
    engine.first_alone(lambda: run.open(device))
    target = engine.first_alone(lambda: target_of(settings))
    report(train_teacher(run, target, device))


if __name__ == "__main__":
    command(main)
