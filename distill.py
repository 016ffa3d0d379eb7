"""Train the student of one approach.

In:  teacher.pt and transfer/<approach>/ (for `supervised`: the target's labelled training part instead).
Out: students/<approach>.pt and .json.

With z the logits and T the temperature, the loss of a batch is

    T^2 * mean over images of KL(softmax(z_teacher / T) || softmax(z_student / T))     (Hinton et al., arXiv 1503.02531)

No labels of any kind. The teacher is in eval mode and has no gradients; with fixed pixels it answers once for
the whole transfer set, with augmentation it sees the very views that the student sees.

    python distill.py --approach mms
    python distill.py --approach mms --export onnx      # or torch, state_dict: the student for use elsewhere
"""
import dataclasses

import numpy as np
import torch
from torch.nn import functional as F

import engine
import models
from data import MIXING, specs_of, target_of, unavailable
from export import export, require_packages
from files import UserError, file_digest, is_first, is_usable, read_json, say, stop_on, write_json
from run import STAGE_FLAGS, command, name_of, name_of_approach, name_of_arch, open_stage
from TeacherTrain import answer_test_split, evaluate, saved_split, watch

SMALLEST = 2        # images: fewer have no batch statistics


def kd_loss(student_logits, teacher_logits, temperature):
    """The loss above. Logits: (N, C) float32. Returns a scalar.

    "batchmean" sums over the classes and averages over the images; "mean" would also divide by C and make the
    gradient that much smaller.
    """
    return temperature ** 2 * F.kl_div(F.log_softmax(student_logits / temperature, dim=1),
                                       F.log_softmax(teacher_logits / temperature, dim=1),
                                       reduction="batchmean", log_target=True)


def fixed_objective(teacher, images, temperature, device, **how):
    """KD on unchanging pixels: the teacher's logits for all images are computed here, once. how: checkpoint and mark, as in `engine.predict`."""
    teacher_logits = engine.predict(teacher, images, device=device, label="teacher's answers", **how).to(device)
    return lambda logits, views, rows: kd_loss(logits.float(), teacher_logits[rows.to(device)], temperature)


def live_objective(teacher, temperature, device):
    """KD on augmented views: the teacher answers for each view as it comes."""
    teacher.eval()

    def objective(logits, views, rows):
        with torch.no_grad(), engine.autocast(device):
            teacher_logits = teacher(views)
        return kd_loss(logits.float(), teacher_logits.float(), temperature)
    return objective


@engine.together
def train_student(run, approach, target, device):
    """Makes students/<approach>.pt and .json unless they are there. Returns the content of the .json.

    target: a data.Target; its test split is read once, at the end. An approach whose transfer set is too small
    to learn from gets no student: its history is empty. An accuracy is None where there is no student or no image for it.
    """
    checkpoint = run.student(approach, "part")
    if is_usable(run.student(approach, "json")) and (not read_json(run.student(approach, "json"))["history"] or is_usable(run.student(approach, "pt"))):
        figures = read_json(run.student(approach, "json"))
        models.require_same_files(run.student(approach, "pt"), figures.get("files", {}))
        if target.test and figures["history"] and not is_usable(run.student(approach, "npz")):
            answer_test_split(models.load(run.student(approach, "pt"), run.settings.student_arch).to(device), target, run.student(approach, "npz"), device)
        engine.remove_checkpoints(checkpoint)
        return figures
    settings, recipe = run.settings, run.settings.student_recipe
    teacher_figures = read_json(run.require("teacher.json", "python TeacherTrain.py"))
    seed = engine.seed_for(settings.seed, "student")        # the same start for all approaches
    teacher_path = run.require("teacher.pt", "python TeacherTrain.py")
    classes = models.read(teacher_path)["classes"]
    train, confidence = saved_split(run, len(target.train)) if target.train else (None, None)
    watched = watch(target, confidence) if target.train else None
    supervised = approach == "supervised"
    figures = {"approach": approach, "arch": settings.student_arch,
               "weights": settings.supervised_weights if supervised else settings.student_weights}
    figures["files"] = models.files_of(settings.student_arch, figures["weights"])
    if supervised:
        labels = target.train.labels
        figures |= {"sources": [name_of(settings.target)], "per_class": np.bincount(labels[train], minlength=len(classes)).tolist()}
        images, rows = target.train.images, train
        made_from = target.train.made_from
    else:
        run.require(f"transfer/{approach}/summary.json", f"python transfer.py --approach {approach}")
        summary = read_json(run.transfer(approach) / "summary.json")
        figures |= {"sources": [name for name, count in summary["per_source"].items() if count], "per_class": summary["per_class"]}
        images = np.load(run.require(f"transfer/{approach}/images.npy", f"python transfer.py --approach {approach}"), mmap_mode="c")
        rows = np.arange(len(images))
        made_from = f"{file_digest(teacher_path)}, {file_digest(run.transfer(approach) / 'manifest.csv')}"
    figures["transfer_size"] = len(rows)
    if len(rows) < SMALLEST:
        figures |= {"accuracy": None, "confidence_accuracy": None, "retention": None, "seconds": 0.0, "images_per_second": 0.0, "history": []}
        write_json(run.student(approach, "json"), figures)
        return figures

    answers = engine.Checkpoint(run.student(approach, "answers.part"), f"student {approach}", own=True)
    torch.manual_seed(seed)
    heir = figures["weights"] in ("teacher", "auto")
    student = models.require_trainable(models.require_logits(engine.first_alone(lambda: models.build(
        settings.student_arch, classes, "none" if heir else figures["weights"], models.input_size_of(settings.student_arch, settings.image_size))), settings.image_size), settings.image_size)
    if heir:
        teacher = models.load(teacher_path, settings.teacher_arch)
        if figures["weights"] == "teacher":
            models.require_heir(settings.student_arch, teacher.arch)
        figures["weights"] = "teacher" if models.inherit(student, teacher) >= models.ENOUGH_SHARED else "none"
    if supervised:
        objective = engine.cross_entropy(labels, device)
        recipe = dataclasses.replace(recipe, augment=",".join(step for step in recipe.augment.split(",") if step not in MIXING) or "none")
    else:
        teacher = models.folded(models.load(teacher_path, settings.teacher_arch).to(device))
        objective = (fixed_objective(teacher, images, recipe.temperature, device, checkpoint=answers,
                                     mark=f"{made_from}, {engine.process()}")
                     if recipe.augment == "none" else live_objective(teacher, recipe.temperature, device))
    training = engine.train(
        student, images, rows, objective, recipe, seed=seed, device=device,
        checkpoint=checkpoint, label=f"student {approach}",
        evaluate=(lambda network: engine.accuracy(network, *watched, device=device)) if watched else None, board=run.board(f"student-{approach}"),
        mark=f"{made_from}, {figures['files']}, {figures['weights']}")
    figures |= evaluate(student, target, confidence, run.student(approach, "npz"), device)
    accuracy = figures["accuracy"]
    figures |= {"retention": accuracy / teacher_figures["accuracy"] if accuracy is not None and teacher_figures["accuracy"] else None,
                "seconds": training.seconds, "images_per_second": training.images_per_second, "history": training.history}
    models.save(run.student(approach, "pt"), student, accuracy=accuracy)
    write_json(run.student(approach, "json"), figures)
    engine.remove_checkpoints(checkpoint)
    return figures


def report_student(figures):
    if not figures["history"]:
        say(f"student: {figures['approach']}, none: a transfer set of {figures['transfer_size']} images is too small to learn from")
        return
    start = ", from the teacher's weights" if figures["weights"] == "teacher" else ""
    retention = "unknown" if figures["retention"] is None else f"{figures['retention']:.3f}"
    accuracy = "no test split to measure its accuracy on" if figures["accuracy"] is None else f"{figures['accuracy']:.2%} on the test split, retention {retention}"
    say(f"student: {figures['approach']}, {name_of_arch(figures['arch'])}{start}, {accuracy}, {figures['seconds']:,.0f} s at {figures['images_per_second']:,.0f} img/s")


def export_student(run, approach, form, target):
    """Writes the student of an approach in another form, beside its checkpoint, once it has given the student's answers on the
    target's test images (where there are none, on its transfer set)."""
    if not run.student(approach, "pt").exists():
        raise UserError(f"{approach} has no student to export: its transfer set was too small to learn from")
    images = target.test.images if target.test else np.load(run.transfer(approach) / "images.npy", mmap_mode="r")
    export(models.load(run.student(approach, "pt"), run.settings.student_arch), form, run.student(approach, {"onnx": "onnx", "torch": "pt2", "state_dict": "pth"}[form]), images)


def main(argv):
    settings, run, given = open_stage(argv, __doc__, STAGE_FLAGS + ("approach", "export"))
    approach = name_of_approach(given.get("approach", "mms"))
    if "export" in given:
        require_packages(given["export"])
    device = engine.pick_device(settings.device)
    weights = settings.supervised_weights if approach == "supervised" else settings.student_weights
    weights = [] if run.student(approach, "json").exists() else [("student", settings.student_arch, weights, None)]
    engine.first_alone(lambda: stop_on(unavailable(specs_of(settings, sources=False), settings.data_dir, settings.image_size)
                                       + models.unavailable(weights, settings.image_size)))
    run.require("teacher.json", "python TeacherTrain.py")
    engine.first_alone(lambda: run.open(device))
    target = engine.first_alone(lambda: target_of(settings))
    report_student(train_student(run, approach, target, device))
    if "export" in given and is_first():
        export_student(run, approach, given["export"], target)


if __name__ == "__main__":
    command(main)
