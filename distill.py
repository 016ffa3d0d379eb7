"""Train the student of one approach.

In:  teacher.pt and transfer/<approach>/ (`supervised` and `original`: the target's training part
instead, of which the first has the labels). Out: students/<approach>.pt, .json, and .npz (its
answers to the test split).

With z the logits and T the temperature, the loss of a batch is

    T^2 * mean over images of KL(softmax(z_teacher / T) || softmax(z_student / T))

(Hinton et al., arXiv 1503.02531). No labels of any kind. The teacher is in eval mode and has no
gradients; with fixed pixels it answers once for the whole transfer set, with augmentation it sees
the very views that the student sees.

    python distill.py --approach mms
    python distill.py --approach mms --export onnx
"""
if __name__ == "__main__":      # --help and wrong flags need no PyTorch
    from kd.flags import parser_of
    parser_of("distill", __doc__).parse_args()

import dataclasses
import functools

import numpy as np
import torch
from torch.nn import functional as F

import data
from kd import checkpoints, engine, models
from kd.augment import MIXING
from kd.command import command
from kd.evaluation import evaluate, saved_split, source_agreement, test_of, watcher
from kd.export import export, require_packages
from kd.files import UserError, is_first, read_product, require_none, say
from kd.muon import convolutions_of
from kd.processes import alone, first_alone, on_all_ranks
from kd.run import open_stage
from kd.settings import DRAWN_BY_WEIGHT, ON_TARGET
from kd.training import Watch, cross_entropy, require_batch, train
from kd.values import name_of, name_of_approach, name_of_arch

FORMS = {"onnx": ".onnx", "state_dict": ".pth", "safetensors": ".safetensors"}
SMALLEST = 2        # images: fewer have no batch statistics


def kd_loss(student_logits, teacher_logits, temperature):
    """The loss above. Logits: (N, C) float32. Returns a scalar.

    "batchmean" sums over the classes and averages over the images; "mean" would also divide by C
    and make the gradient that much smaller. An image for which the teacher's logits are not finite
    adds nothing."""
    answered = teacher_logits.isfinite().all(1, keepdim=True)
    teacher_logits = torch.where(answered, teacher_logits, student_logits.detach())
    return temperature ** 2 * F.kl_div(
        F.log_softmax(student_logits / temperature, dim=1),
        F.log_softmax(teacher_logits / temperature, dim=1), reduction="batchmean", log_target=True)


def fixed_objective(teacher, images, temperature, device):
    """KD on unchanging pixels: the teacher's logits for all images are computed here, once."""
    teacher_logits = engine.predict(teacher, images, device=device,
                                    label="teacher's answers").to(device)
    return lambda logits, views, rows: kd_loss(logits.float(), teacher_logits[rows.to(device)],
                                               temperature)


def live_objective(teacher, temperature, device, amp=None):
    """KD on augmented views: the teacher answers for each view as it comes."""
    teacher.eval()

    @functools.lru_cache(1)     # a student with auxiliary heads asks for each
    def answers(views):
        with torch.no_grad(), engine.autocast(device, amp):
            return teacher(views).float()
    return lambda logits, views, rows: kd_loss(logits.float(), answers(views), temperature)


@on_all_ranks
def train_student(run, approach, target, device):
    """Makes students/<approach>.pt and .json, unless they are there. Returns the content of the
    .json. On another test split than before a student is measured again, not trained.

    target: a data.Target; its test split is read once, at the end. An approach whose transfer set
    is too small to learn from gets no student: its history is empty. An accuracy is None where
    there is no student or no image for it. Raises UserError where the teacher was measured on
    another test split."""
    settings, supervised = run.settings, approach == "supervised"
    teacher = run.content_of("teacher.json")
    confidence = saved_split(run, len(target.train))[1] if target.train else None
    test, path = test_of(target), run / f"students/{approach}.pt"
    if teacher.get("test", test) != test:
        run.refuse("teacher.json", f"{run / 'teacher.json'} is of another test split, or of none")
    images, rows, figures, made_from = learned_from(run, approach, target)
    frequencies = run / f"transfer/{approach}/weights.npy"
    frequencies = None if supervised or approach not in DRAWN_BY_WEIGHT else np.load(frequencies)
    _, _, weights, _ = settings.start_of(approach)
    files = checkpoints.files_of(settings.student_arch, weights)
    product = run.product(f"students/{approach}.json", teacher=teacher["files"]["teacher.pt"],
                          transfer_set=made_from, files=list(files.values()))
    if product.done and product.content.get("test", test) == test:
        return product.content
    made = [path, run / f"students/{approach}.npz"] if target.test else [path]
    if product.done:        # with another test split, or none
        product.write(product.content | {"test": ""}, [path])   # its answers are written over
        student = checkpoints.load(path, settings.student_arch).to(device)
        return product.write(product.content | measured(
            run, approach, student, teacher, target, confidence, device), made)
    figures |= {"approach": approach, "arch": settings.student_arch, "weights": weights,
                "transfer_size": len(rows), **dict.fromkeys((
                    "accuracy", "confidence_accuracy", "retention", "agreement",
                    "source_agreement")), "seconds": 0.0, "images_per_second": 0.0, "history": []}
    if len(rows) < SMALLEST:
        return product.write(figures)
    seed = engine.seed_for(settings.seed, "student")        # the same start for all approaches
    engine.seed_all(seed)
    student, figures["weights"] = new_student(run, weights, teacher["classes"])
    recipe = settings.student_recipe(figures["weights"], bool(convolutions_of(student)))
    figures |= {"lr": recipe.lr, "optimizer": recipe.optimizer}
    objective, recipe = objective_of(run, images, supervised, recipe, target, device)
    figures["bfloat16"] = engine.in_bfloat16(device, recipe.amp)
    watch = Watch(run / f"students/{approach}.part", product.made_from, f"student {approach}",
                  watcher(target, confidence, device) if target.train else None,
                  run.board(f"student-{approach}"), real=not settings.limit)
    training = train(student, images, rows, objective, recipe, seed=seed, device=device,
                     watch=watch, weights=frequencies)
    figures |= measured(run, approach, student, teacher, target, confidence, device) | {
        name: getattr(training, name) for name in ("seconds", "images_per_second", "history")}
    checkpoints.save(path, student, accuracy=figures["accuracy"])
    return product.write(figures, made)


def measured(run, approach, student, teacher, target, confidence, device):
    """The figures of a student that need images it has not learned from. Writes its answers.
    teacher: the content of teacher.json."""
    found, predicted = evaluate(student, target, confidence, run / f"students/{approach}.npz",
                                device)
    figures = {"retention": None, "agreement": None} | found
    if predicted is not None:
        with np.load(run / "teacher.npz") as saved:
            figures["agreement"] = float((saved["predicted"] == predicted).mean())
        if teacher["accuracy"]:
            figures["retention"] = figures["accuracy"] / teacher["accuracy"]
    return figures | {"source_agreement": source_agreement(student, run, device),
                      "test": test_of(target)}


def learned_from(run, approach, target):
    """What a student learns from: (images (N, H, W, 3) uint8, rows (n,) of them, figures about
    them, what they were made from)."""
    if approach in ON_TARGET:
        train, labels = saved_split(run, len(target.train))[0], target.train.labels
        per_class = np.bincount(labels[train], minlength=len(target.classes)).tolist()
        figures = {"sources": [name_of(run.settings.target)], "per_class": per_class}
        return target.train.images, train, figures, target.train.fingerprint
    summary = run.content_of(f"transfer/{approach}/summary.json")
    images = np.load(run / f"transfer/{approach}/images.npy", mmap_mode="r")
    figures = {"sources": [name for name, count in summary["per_source"].items() if count],
               "per_class": summary["per_class"]}
    return images, np.arange(len(images)), figures, list(summary["files"].values())


def new_student(run, weights, classes):
    """(The network before its training, "none", "teacher" or whatever its weights are)."""
    settings, inherits = run.settings, weights in ("teacher", "auto")
    student = first_alone(lambda: models.untrained(
        settings.student_arch, classes, "none" if inherits else weights, settings.image_size))
    if inherits:
        teacher = checkpoints.load(run / "teacher.pt", settings.teacher_arch)
        weights = "teacher" if models.inherit(student, teacher, weights == "teacher") else "none"
    return student, weights


def objective_of(run, images, supervised, recipe, target, device):
    """(objective, recipe) of a student: labels, or the teacher's answers."""
    if supervised:      # a mixed image has no single label
        views = [step for step in recipe.augment.split(",")
                 if step.partition(":")[0] not in MIXING]
        return (cross_entropy(target.train.labels, device),
                dataclasses.replace(recipe, augment=",".join(views) or "none"))
    teacher = checkpoints.load(run / "teacher.pt", run.settings.teacher_arch)
    teacher = models.folded(teacher).to(device)
    if recipe.augment == "none":
        return fixed_objective(teacher, images, recipe.temperature, device), recipe
    if engine.in_bfloat16(device, recipe.amp):
        teacher = engine.cast_once(teacher)
    return live_objective(teacher, recipe.temperature, device, recipe.amp), recipe


def report_student(figures):
    if not figures["history"]:
        say(f"student: {figures['approach']}, not trained: a transfer set of "
            f"{figures['transfer_size']} images is too small to learn from")
        return
    accuracy, retention = figures["accuracy"], figures["retention"]
    reached = "no test split to measure its accuracy on" if accuracy is None else (
        f"{accuracy:.2%} on the test split, retention "
        + (f"{retention:.3f}" if retention is not None else "unknown")
        + f", agreement {figures['agreement']:.2%}")
    if figures["source_agreement"] is not None:
        reached += f", agreement {figures['source_agreement']:.2%} on held-out images"
    start = ", pruned from the teacher" if figures["weights"] == "teacher" else ""
    say(f"student: {figures['approach']}, {name_of_arch(figures['arch'])}{start}, {reached}, "
        f"{figures['seconds']:,.0f} s at {figures['images_per_second']:,.0f} img/s")


def export_student(run, approach, form, target):
    """Writes the student in another form, checked on the test images (else on its transfer set)."""
    path = run / f"students/{approach}.pt"
    if not path.exists():
        raise UserError(f"{approach} has no student to export: its transfer set was too small.")
    images = target.test.images if target.test else learned_from(run, approach, target)[0]
    student = checkpoints.load(path, run.settings.student_arch)
    export(student, form, run / f"students/{approach}{FORMS[form]}", images)


def main(argv):
    run, given = open_stage(argv, "distill", __doc__)
    settings, approach = run.settings, name_of_approach(given["approach"])
    if "export" in given:
        require_packages(given["export"])
    device = engine.pick_device(settings.device, settings.amp)
    if not run.has(f"students/{approach}.json"):
        require_batch("--batch-size", settings.batch_size)
        needed = [settings.start_of(approach)]
        first_alone(lambda: require_none(models.unavailable(needed, settings.image_size)))
    classes = run.content_of("teacher.json")["classes"]
    first_alone(lambda: data.obtain(settings, sources=False))
    if run.restarted:       # what can't start is refused before anything is deleted
        new_student(run, settings.start_of(approach)[2], classes)
    first_alone(lambda: run.open(device, given))
    target = first_alone(lambda: data.load_target(settings))
    # An export needs nothing but a student that is whole.
    if "export" not in given or read_product(run, f"students/{approach}.json")[0] is None:
        report_student(train_student(run, approach, target, device))
        run.save_config(device, given)
    if "export" in given and is_first():
        with alone():
            export_student(run, approach, given["export"], target)


if __name__ == "__main__":
    command(main)
