"""Checkpoints: of this project, which say themselves what they are, and of anybody else."""
import io
import os

import torch

from kd.architectures import TIMM, input_size_of, timm_settings, usual_pixels
from kd.files import UserError, file_digest, listed, say_once, write_atomically
from kd.models import build, outputs, require_logits
from kd.own import code_digest
from kd.settings import IMAGE_SIZE
from kd.state_dicts import fit, is_ours, read_file, weights_file
from kd.values import HUB, is_file, is_own


def files_of(arch, *files):
    """{path: digest} of the files that a network is made from: that of its architecture, where it
    is the user's own, and those of its weights."""
    paths = [arch.rpartition(":")[0]] if is_own(arch) else []
    if arch.startswith(HUB):        # what a repository on this machine has
        local = f"{paths[0].removeprefix(HUB)}/hubconf.py"
        paths = [local] if os.path.isfile(local) else []
    return {path: code_digest(path) for path in paths} | {
        str(path): file_digest(weights_file(path)) for path in files if path and is_file(str(path))}


def save(path, classifier, **figures):
    """Writes plain types and torchvision's own state dict, with `figures` (accuracy, ...)."""
    state = {name: value.detach().cpu().contiguous()
             for name, value in classifier.network.state_dict().items()}
    content, buffer = {name: getattr(classifier, name) for name in (
        "arch", "classes", "input_size", "mean", "std")}, io.BytesIO()
    torch.save({**content, "state_dict": state, **figures}, buffer)     # to a full disk no OSError
    write_atomically(path, lambda file: file.write(buffer.getbuffer()))


def load(path, arch=None):
    """The Classifier of a checkpoint of this project, in eval mode. arch: FILE.py:FACTORY where the
    user's own network lies now."""
    content = read_file(path)
    if not is_ours(content):
        raise UserError(f"{path} is damaged, or not a checkpoint of this project.")
    content = _named(content, path, arch)
    classifier = build(content["arch"], content["classes"], "none",
                       content["input_size"], content["mean"], content["std"])
    fit(classifier.network, content["state_dict"], path, content["arch"])
    return classifier.eval()


def _named(content, path, arch):
    """The content with the code that the command line names, in place of what the file names."""
    if not is_own(content["arch"]):
        return content
    if not (arch and is_own(arch)):
        raise UserError(f"{path} was made by {content['arch']}, and code runs only where the "
                        "command line names it. Add it as --teacher-arch or --student-arch (in "
                        "Python arch=).")
    return content | {"arch": arch}


def load_teacher(path, arch, classes, input_size=None, mean=None, std=None, image_size=IMAGE_SIZE,
                 default_arch=None):
    """The Classifier of any checkpoint, in eval mode: one of this project, or a state dict for
    `arch`, whatever lies around it. Raises UserError where it does not fit.

    classes: names; None takes them from the checkpoint. input_size, mean, std: where given, they
    hold instead of what the checkpoint says; where nobody says it, the images' own size and
    `usual_pixels` are assumed. default_arch: the `arch` that says nothing, as nobody chose it.
    """
    content, origin, edge = read_file(path), "as it says", 0
    if is_ours(content):
        ours = _named(content, path, arch)
        known, state = ours["classes"], ours["state_dict"]
        stated = ours["input_size"], ours["mean"], ours["std"]
        wrong = (f"holds a {ours['arch']}, not a {arch}. Leave --teacher-arch out"
                 if arch not in (ours["arch"], default_arch) else
                 classes is not None and known != list(classes) and
                 f"knows {len(known)} classes ({listed(known, 3)}), and the target has "
                 f"{len(classes)} ({listed(classes, 3)}). They must be the same, in one order")
        arch, classes = ours["arch"], known
    else:
        state, wrong = content, classes is None and (
            "does not say which classes it knows. Add --classes")
        *pixels, whose = usual_pixels(arch)
        stated, origin = (input_size_of(arch, image_size), *pixels), (
            f"{whose}, as the file does not say")
        edge = timm_settings(arch)["input_size"][-1] if arch.startswith(TIMM) else 0
    if wrong:
        raise UserError(f"{path} {wrong}.")
    classifier = build(arch, classes, "none", *(
        given or each for given, each in zip((input_size, mean, std), stated, strict=True)))
    known = outputs(classifier, state)
    if known not in (None, len(classes)):
        raise UserError(f"{path} has {known} outputs, and there are {len(classes)} classes "
                        f"({listed(classes, 3)}). Name its own with --classes.")
    fit(classifier.network, state, path, arch, "Use the --teacher-arch that it was saved from.")
    say_once(f"{path} is given {classifier.takes()} ({'as asked' if mean or std else origin}).")
    if edge > max(image_size, input_size or 0):
        say_once(f"  timm has {arch[len(TIMM):]} for {edge} pixels: if yours was trained at them, "
                 f"add --image-size {edge}.")
    return require_logits(classifier.eval(), image_size)
