"""Classifiers: building them, their heads, and what a stage asks of them."""
import copy

import numpy as np
import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

from kd.architectures import TIMM, input_size_of, make_network, usual_pixels
from kd.classifier import CENTERED, Classifier
from kd.files import UserError, first_line, listed, say_once
from kd.settings import IMAGE_SIZE
from kd.small_conv import SmallInputConv2d
from kd.state_dicts import fit, is_ours, read_file, tensors_of
from kd.values import is_file, is_own, is_pretrained, name_of_arch

ENOUGH_SHARED = 0.5     # of a student's parameters, for a start from the teacher's


# ---- Building ------------------------------------------------------------------------------------

def build(arch, classes, weights="none", input_size=None, mean=None, std=None):
    """A Classifier with a head for `classes` (names).

    weights: "none" (random, from torch's seed), "imagenet" or a name of torchvision's, or the path
    of a checkpoint. input_size: edge in pixels, None: `input_size_of(arch)`. mean, std: None: those
    that come with the weights, else CENTERED, of a file `usual_pixels`. Raises UserError for an
    unknown architecture and for weights that can't be had or do not fit.
    """
    if is_file(weights):
        return _from_file(weights, arch, classes, (input_size, mean, std))
    input_size = input_size or input_size_of(arch)
    network, stated = make_network(arch, len(classes), weights, input_size)
    mean, std = (given or each for given, each in
                 zip((mean, std), stated or (CENTERED, CENTERED), strict=True))
    classifier = Classifier(network, arch, classes, input_size, mean, std)
    if stated:
        say_once(f"{name_of_arch(arch)}: ImageNet weights, which take {classifier.takes()}.")
        if not arch.startswith(TIMM):
            classifier.classes = range(1000)
            replace_head(classifier, classes)
    return classifier


def described(path, arch, image_size=IMAGE_SIZE):
    """What a checkpoint says of itself: {"arch", "classes", "input_size", "mean", "std",
    "state_dict"}, and in "origin" who says so.

    A bare state dict is taken for one of `arch` that is used to `usual_pixels` of `image_size`; its
    classes are None. Raises UserError for a file that can't be read, or that names code which
    `arch` does not name.
    """
    content = read_file(path)
    if not is_ours(content):
        mean, std, whose = usual_pixels(arch)
        return {"arch": arch, "classes": None, "input_size": input_size_of(arch, image_size),
                "mean": mean, "std": std, "state_dict": content,
                "origin": f"{whose}, as the file does not say"}
    if is_own(content["arch"]):
        if not is_own(arch):
            raise UserError(f"{path} was made by {content['arch']}, and code runs only where the "
                            "command line names it. Add it as --teacher-arch or --student-arch "
                            "(in Python arch=).")
        content["arch"] = arch
    return content | {"origin": "as it says"}


def _from_file(path, arch, classes, given):
    """The network with a file's weights, for other classes with a new head."""
    saved = described(path, arch)
    given = [each or saved[name] for name, each in
             zip(("input_size", "mean", "std"), given, strict=True)]
    classifier = build(arch, classes, "none", *given)
    known = _outputs(classifier, saved["state_dict"]) or len(classes)
    if known != len(classes):
        classifier = build(arch, range(known), "none", *given)
    fit(classifier.network, saved["state_dict"], path, arch)
    say_once(f"{name_of_arch(arch)} starts from {path}, with {classifier.takes()} "
             f"({saved['origin']}).")
    if known != len(classes):
        replace_head(classifier, classes)
    return classifier


def _outputs(classifier, content):
    """How many classes the weights in a file's content are for; None where that is not seen."""
    head = f".{_head(classifier)}.weight"
    rows = {name: len(value) for name, value in tensors_of(content) if f".{name}".endswith(head)}
    return rows[min(rows, key=lambda name: name.count("."))] if rows else None


def unavailable(choices, image_size=IMAGE_SIZE):
    """A line for each of [("teacher" or "student", arch, weights, input size or None)] whose
    ImageNet weights can't be had.

    Raises UserError for an architecture that does not exist or does not take the images, and for a
    file that can't be read.
    """
    lines = []
    for role, arch, weights, size in dict.fromkeys(choices):
        classifier = build(arch, ["a", "b"], "none", size or input_size_of(arch, image_size))
        _watched(classifier, noise(classifier))
        if is_file(weights):        # without a head only a network of its own classes can tell
            size = classifier.input_size
            build(arch, ["a", "b"], weights, size) if _head(classifier) else read_file(weights)
        try:
            if is_pretrained(weights):
                make_network(arch, 2, weights)      # which fetches them
        except UserError as error:
            lines.append(f"{error} Or use --{role}-weights none.")
    return lines


# ---- Heads ---------------------------------------------------------------------------------------

def _gives(module, count):
    """Whether a layer may be the head: linear, or a 1x1 convolution, with `count` outputs."""
    return (isinstance(module, nn.Linear) and module.out_features == count
            or isinstance(module, nn.Conv2d) and module.out_channels == count
            and module.kernel_size == (1, 1))


@torch.no_grad()
def _watched(classifier, images):
    """(logits, {name: output of each layer that may be the head}) of images, in eval mode. What a
    network of the user's raises is shown as it is; of others it is a UserError."""
    training, seen = classifier.training, {}
    names = {module: name for name, module in classifier.network.named_modules()}

    def after(module, inputs, output):
        if module in names and _gives(module, len(classifier.classes)):
            seen[names[module]] = output.clone()        # what follows may work in place
    try:
        with register_module_forward_hook(after):
            return classifier.eval()(images), seen
    except (RuntimeError, ValueError, TypeError, AssertionError, LookupError) as error:
        if is_own(classifier.arch):
            raise
        raise UserError(f"{classifier.arch} can't process {classifier.takes()} "
                        f"({first_line(error)}). Use another network or size.") from None
    finally:
        classifier.train(training)


def _same(some, others, tolerance=1e-4):
    scale = others.nan_to_num(0, 0, 0).abs().max().item()
    return some.shape == others.shape and torch.allclose(
        some, others, rtol=tolerance, atol=tolerance * scale, equal_nan=True)


def _head(classifier):
    """The name of the layer that makes the logits, seen on one batch; None where there is none.
    They are its output, or log-probabilities; of maps the mean, in SqueezeNet after a ReLU."""
    logits, seen = _watched(classifier, noise(classifier))
    for name, output in reversed(seen.items()):
        made = (output, output.log_softmax(-1)) if output.dim() < 4 else (
            output.mean((2, 3)), output.relu().mean((2, 3)))
        if any(_same(each, logits) for each in made):
            return name


def head_weight(classifier):
    """The rows w of the layer that makes the logits, (C, D) float32: z = features @ w.T + bias.
    None where something else makes them."""
    name = _head(classifier)
    return name and classifier.network.get_submodule(name).weight.detach().flatten(1).float()


def noise(classifier, size=None, count=8):
    """(count, size, size, 3) uint8 of many brightnesses and contrasts, the same every time."""
    size, generator = size or classifier.input_size, torch.Generator().manual_seed(0)
    low, high = torch.rand(2, count, 1, 1, 3, generator=generator) * 256
    pixels = low + (high - low) * torch.rand(count, size, size, 3, generator=generator)
    return pixels.to(torch.uint8).to(classifier.scale.device)


def replace_head(classifier, classes):
    """Makes it a classifier of `classes` (names): its head, and its auxiliary heads, are new and
    randomly initialised. Raises UserError where no linear layer makes the logits."""
    main, old, count = _head(classifier), len(classifier.classes), len(classes)
    if main is None:
        raise UserError(f"{classifier.arch} has no linear layer that makes its logits, so its head "
                        "can't be replaced by one for other classes.")
    for name, layer in list(classifier.network.named_modules()):
        if name == main or "aux" in name.lower() and _gives(layer, old):
            bias = layer.bias is not None
            new = (nn.Linear(layer.in_features, count, bias) if isinstance(layer, nn.Linear) else
                   SmallInputConv2d(layer.in_channels, count, 1, bias=bias))
            classifier.network.set_submodule(name, new)
    classifier.classes = list(classes)


@torch.no_grad()
def inherit(student, teacher, required=False):
    """Copies into a student what its teacher has under the same name, of the same shape, and the
    teacher's normalisation, if that is at least half of the student's parameters, and its head.
    Returns whether; raises UserError where it is not, though `required`.

    Of one family the shallower network gets the first blocks of each stage, and the head. A
    residual network without some blocks answers much as the whole one (arXiv 1605.06431).
    """
    known, state = teacher.network.state_dict(), student.network.state_dict()
    shared = [name for name, value in state.items()
              if name in known and known[name].shape == value.shape]
    sizes = {name: parameter.numel() for name, parameter in student.network.named_parameters()}
    share, head = sum(sizes.get(name, 0) for name in shared) / sum(sizes.values()), _head(student)
    enough = share >= ENOUGH_SHARED and (head is None or f"{head}.weight" in shared)
    if required and not enough:
        raise UserError(f"{name_of_arch(student.arch)} can't start from its teacher's weights: "
                        f"{name_of_arch(teacher.arch)} has {share:.0%} of them under the same "
                        "names; half of them, and the head, are needed. Use "
                        "--student-weights none.")
    if enough:
        for name in shared:
            state[name].copy_(known[name])
        student.normalise(teacher.mean, teacher.std)
    return enough


@torch.no_grad()
def folded(classifier):
    """A copy in eval mode, with its batch norms folded into the convolutions that are seen to come
    before them: the same logits up to rounding, on a CPU 8 % (ResNet-34) to 41 % (MobileNet)
    faster. The classifier itself where they would differ."""
    images, made, pairs = noise(classifier), {}, []
    expected = classifier.eval()(images)        # which settles the layout in memory
    copied = copy.deepcopy(classifier)

    def after(module, inputs, output):
        if type(module) in (nn.Conv2d, SmallInputConv2d) and isinstance(
                module.weight, nn.Parameter):       # not computed anew, as weight_norm's is
            made[id(output)] = module, output       # kept, so that no other tensor takes its id

    def before(module, inputs):
        if isinstance(module, nn.BatchNorm2d) and id(inputs[0]) in made:
            pairs.append((made[id(inputs[0])][0], module))
    with register_module_forward_hook(after), register_module_forward_pre_hook(before):
        copied(images)
    names = {module: name for name, module in copied.named_modules()}
    for convolution, norm in pairs:
        if norm.track_running_stats:
            fused = nn.utils.fuse_conv_bn_eval(convolution, norm)
            convolution.weight, convolution.bias = fused.weight, fused.bias
            copied.set_submodule(names[norm], nn.Identity())
    return copied if _same(copied(images), expected) else classifier


# ---- What a network must do ----------------------------------------------------------------------

def _refuse(what, wrong):
    if wrong:
        raise UserError(f"{what} {wrong}.")


def _shape(value):
    return tuple(value.shape) if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"


def require_logits(classifier, image_size=IMAGE_SIZE):
    """The classifier, in the mode it was in. Raises UserError unless it gives a logit for each of
    its classes. image_size: edge in pixels of the images."""
    logits, seen = _watched(classifier, noise(classifier, image_size, 3))
    found, wanted, wrong = _shape(logits), (3, len(classifier.classes)), None
    if found != wanted:
        wrong = f"gives {found} for three images of {wanted[1]} classes, not {wanted} logits"
    elif not logits.isfinite().any():
        wrong = "gives NaN or infinity for every image"
    elif logits.min() >= 0 and _same(logits.sum(1), torch.ones_like(logits[:, 0])):
        wrong = "gives probabilities, which add up to 1, not logits. Remove its softmax"
    elif any(_same(output.sigmoid(), logits) for output in seen.values()):
        wrong = "gives the probabilities of a sigmoid, not logits. Leave its sigmoid out"
    _refuse(classifier.arch, wrong)
    return classifier


def untrained(arch, classes, weights, image_size, input_size=None, mean=None, std=None):
    """The network before its training, as of `build`. Raises UserError unless it gives logits of a
    few images of `image_size`, in eval mode and while it trains."""
    input_size = input_size or input_size_of(arch, image_size)
    classifier = build(arch, classes, weights, input_size, mean, std)
    require_logits(classifier, image_size)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        answer = copy.deepcopy(classifier).train()(noise(classifier, image_size, 2))
    found = {_shape(each) for each in (answer if isinstance(answer, tuple) else [answer])
             if each is not None}
    if found != {(2, len(classes))}:
        _refuse(arch, f"gives {listed(list(found))} for two images in train mode, not a row of "
                "logits each")
    return classifier


@torch.no_grad()
def question_teacher(classifier, images):
    """Raises UserError where a teacher's answer for an image is not one that scores can rest on: it
    is always NaN, another one when asked again, or another one beside other images.

    images: (N, H, W, 3) uint8, real ones, of which it is shown up to 16.
    """
    shown = np.array(images[:: max(1, len(images) // 16)][:16])
    shown = torch.from_numpy(shown).to(classifier.scale.device)
    flat = torch.zeros_like(shown)
    flat[::2] = 255
    classifier.eval()
    once, again, beside = map(classifier, (shown, shown, torch.cat((flat, shown))))
    wrong = None
    if not once.isfinite().all(1).any():
        wrong = "gives NaN or infinity for every image"
    elif not _same(again, once, 1e-3):
        wrong = ("gives different answers when asked twice for the same images: something in it is "
                 "random in eval mode as well, such as dropout")
    elif not _same(beside[len(flat):], once, 1e-2):
        wrong = ("gives an image another answer beside other images: its batch norm has no running "
                 "statistics, or is in train mode")
    _refuse(f"The teacher {name_of_arch(classifier.arch)}", wrong)
