"""Train the student of one approach.

In:  teacher.pt and transfer/<approach>/ (for `supervised`: the target's labelled training part instead).
Out: students/<approach>.pt and .json.

With z the logits and T the temperature, the loss of a batch is

    T^2 * mean over images of KL(softmax(z_teacher / T) || softmax(z_student / T))     (Hinton et al., arXiv 1503.02531)

No labels of any kind. The teacher is in eval mode and has no gradients; with fixed pixels it answers once for
the whole transfer set, with augmentation it sees the very views that the student sees.

    python distill.py --approach mms
"""
import numpy as np
import torch
from torch.nn import functional as F

import engine
import models
from data import load_target
from run import STAGE_FLAGS, command, name_of, open_stage, read_json, say, stop_on, write_json
from TeacherTrain import saved_split, watch

SMALLEST = 2        # images: fewer have no batch statistics


def kd_loss(student_logits, teacher_logits, temperature):
    """The loss above. Logits: (N, C) float32. Returns a scalar.

    "batchmean" sums over the classes and averages over the images; "mean" would also divide by C and make the
    gradient that much smaller.
    """
    return temperature ** 2 * F.kl_div(F.log_softmax(student_logits / temperature, dim=1),
                                       F.log_softmax(teacher_logits / temperature, dim=1),
                                       reduction="batchmean", log_target=True)


def fixed_objective(teacher, images, temperature, device):
    """KD on unchanging pixels: the teacher's logits for all images are computed here, once."""
    teacher_logits = engine.predict(teacher, images, device=device, label="teacher's answers").to(device)
    return lambda logits, views, rows: kd_loss(logits.float(), teacher_logits[rows.to(device)], temperature)


def live_objective(teacher, temperature, device):
    """KD on augmented views: the teacher answers for each view as it comes."""
    teacher.eval()

    def objective(logits, views, rows):
        with torch.no_grad(), engine.autocast(device):
            teacher_logits = teacher(views)
        return kd_loss(logits.float(), teacher_logits.float(), temperature)
    return objective


def train_student(run, approach, target, device):
    """Makes students/<approach>.pt and .json unless they are there. Returns the content of the .json.

    target: a data.Target; its test split is read once, at the end. An approach whose transfer set is too small
    to learn from gets no student: its accuracy is None.
    """
    if run.student(approach, "json").exists():
        return read_json(run.student(approach, "json"))
    settings, recipe = run.settings, run.settings.student_recipe
    teacher_figures = read_json(run.require("teacher.json", "python TeacherTrain.py"))
    seed = engine.seed_for(settings.seed, "student")        # the same start for all approaches
    labels = target.train.labels
    train, confidence = saved_split(run, len(target.train))
    watched = watch(target, confidence)
    supervised = approach == "supervised"
    figures = {"approach": approach, "arch": settings.student_arch,
               "weights": settings.supervised_weights if supervised else settings.student_weights}
    if supervised:
        figures |= {"sources": [name_of(settings.target)], "per_class": np.bincount(labels[train], minlength=len(target.classes)).tolist()}
        images, rows = target.train.images, train
    else:
        run.require(f"transfer/{approach}/summary.json", f"python transfer.py --approach {approach}")
        summary = read_json(run.transfer(approach) / "summary.json")
        figures |= {"sources": [name for name, count in summary["per_source"].items() if count], "per_class": summary["per_class"]}
        images = np.load(run.transfer(approach) / "images.npy", mmap_mode="c")
        rows = np.arange(len(images))
    figures["transfer_size"] = len(rows)
    if len(rows) < SMALLEST:
        figures |= {"accuracy": None, "confidence_accuracy": None, "retention": None, "seconds": 0.0, "images_per_second": 0.0, "history": []}
        write_json(run.student(approach, "json"), figures)
        return figures

    torch.manual_seed(seed)
    student = models.build(settings.student_arch, target.classes, figures["weights"])
    if supervised:
        objective = engine.cross_entropy(labels, device)
    else:
        teacher = models.load(run.require("teacher.pt", "python TeacherTrain.py")).to(device)
        objective = (fixed_objective(teacher, images, recipe.temperature, device) if recipe.augment == "none"
                     else live_objective(teacher, recipe.temperature, device))
    training = engine.train(
        student, images, rows, objective, recipe, seed=seed, device=device,
        checkpoint=run.student(approach, "part"), label=f"student {approach}",
        evaluate=lambda: engine.accuracy(student, *watched, device=device))
    accuracy = engine.accuracy(student, target.test.images, target.test.labels, device=device)
    figures |= {"accuracy": accuracy, "confidence_accuracy": engine.accuracy(student, target.train.images, labels, confidence, device),
                "retention": accuracy / teacher_figures["accuracy"] if teacher_figures["accuracy"] else None,
                "seconds": training.seconds, "images_per_second": training.images_per_second, "history": training.history}
    models.save(run.student(approach, "pt"), student, accuracy=accuracy)
    write_json(run.student(approach, "json"), figures)
    run.student(approach, "part").unlink(missing_ok=True)
    return figures


def report_student(figures):
    if figures["accuracy"] is None:
        say(f"student: {figures['approach']}, none: a transfer set of {figures['transfer_size']} images is too small to learn from")
    else:
        retention = "unknown" if figures["retention"] is None else f"{figures['retention']:.3f}"
        say(f"student: {figures['approach']}, {figures['arch']}, {figures['accuracy']:.2%} on the test split, retention "
            f"{retention}, {figures['seconds']:,.0f} s at {figures['images_per_second']:,.0f} img/s")


def main(argv):
    settings, run, given = open_stage(argv, __doc__, STAGE_FLAGS + ("approach",))
    approach = given.get("approach", "mms")
    device = engine.pick_device(settings.device)
    weights = settings.supervised_weights if approach == "supervised" else settings.student_weights
    stop_on(models.unavailable([(settings.student_arch, weights)]))
    run.require("teacher.json", "python TeacherTrain.py")
    run.open(device)
    target = load_target(settings.target, settings.data_dir, settings.seed, settings.limit, max_bad=settings.max_bad)
    report_student(train_student(run, approach, target, device))


if __name__ == "__main__":
    command(main)
