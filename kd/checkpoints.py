"""Checkpoints: of this project, which say themselves what they are, and of anybody else."""
import io

import torch

from kd.files import UserError, file_digest, listed, say_once, write_atomically
from kd.models import build, described, require_logits
from kd.own import code_digest
from kd.settings import IMAGE_SIZE
from kd.state_dicts import fit, weights_file
from kd.values import HUB, is_file, is_own


def files_of(arch, *files):
    """{path: digest} of the files that a network is made from: that of its architecture, where it
    is the user's own, and those of its weights."""
    own = arch.rpartition(":")[0] if is_own(arch) and not arch.startswith(HUB) else None
    found = {own: code_digest(own)} if own else {}
    return found | {path: file_digest(weights_file(path)) for path in files if is_file(path)}


def save(path, classifier, **figures):
    """Writes plain types and torchvision's own state dict, with `figures` (accuracy, ...)."""
    state = {name: value.detach().cpu().contiguous()
             for name, value in classifier.network.state_dict().items()}
    content, buffer = {name: getattr(classifier, name) for name in (
        "arch", "classes", "input_size", "mean", "std")}, io.BytesIO()
    torch.save({**content, "state_dict": state, **figures}, buffer)     # to a full disk no OSError
    write_atomically(path, lambda file: file.write(buffer.getbuffer()))


def load(path, arch=""):
    """The Classifier of a checkpoint of this project, in eval mode. arch: FILE.py:FACTORY where the
    user's own network lies now."""
    return _restored(described(path, arch), path)


def _restored(saved, path):
    if saved["classes"] is None:
        raise UserError(f"{path} does not say which classes it knows, as checkpoints of this "
                        "project do. Add --classes.")
    classifier = build(saved["arch"], saved["classes"], "none",
                       saved["input_size"], saved["mean"], saved["std"])
    fit(classifier.network, saved["state_dict"], path, saved["arch"])
    return classifier.eval()


def load_teacher(path, arch, classes, input_size=None, mean=None, std=None, image_size=IMAGE_SIZE):
    """The Classifier of any checkpoint, in eval mode: one of this project, whose own architecture
    it is, or a state dict for `arch`, whatever lies around it. Raises UserError where it does not
    fit.

    classes: names, or how many; None takes them from the checkpoint. input_size, mean, std: where
    given, they hold instead of what `described` finds.
    """
    saved = described(path, arch, image_size)
    if isinstance(classes, int):        # the names are the checkpoint's, or numbers
        named = len(saved["classes"] or ()) == classes
        classes = saved["classes"] if named else [str(number) for number in range(classes)]
    known = saved["classes"] or classes
    if classes is not None and list(known) != list(classes):
        raise UserError(f"{path} knows {len(known)} classes ({listed(known, 3)}), and the target "
                        f"has {len(classes)} ({listed(classes, 3)}). They must be the same, in one "
                        "order.")
    origin = "as asked" if mean or std else saved["origin"]
    given = {"classes": classes, "input_size": input_size, "mean": mean, "std": std}
    teacher = _restored(saved | {name: value for name, value in given.items() if value}, path)
    say_once(f"{path} is given {teacher.takes()} ({origin}).")
    return require_logits(teacher, image_size)
