"""Classifiers: building them, their heads, and what a stage asks of them."""
import collections
import copy

import numpy as np
import torch
from torch import nn

from kd.architectures import TIMM, input_size_of, make_network, usual_pixels
from kd.classifier import CENTERED, Classifier
from kd.files import UserError, first_line, listed, say, say_once
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


def _from_file(path, arch, classes, given):
    content, (*usual, origin) = read_file(path), usual_pixels(arch)
    stated = None, *usual
    if is_ours(content):
        theirs, origin = content["arch"], "as it says"
        _refuse(path, theirs != arch and not (is_own(arch) and is_own(theirs)) and
                f"holds a {theirs}, not a {arch}")
        stated = content["input_size"], content["mean"], content["std"]
        content = content["state_dict"]
    given = [each or said for each, said in zip(given, stated, strict=True)]
    classifier = build(arch, classes, "none", *given)
    known = outputs(classifier, content)
    if known not in (None, len(classes)):
        classifier = build(arch, range(known), "none", *given)
    fit(classifier.network, content, path, arch)
    say_once(f"{name_of_arch(arch)} starts from {path}, with {classifier.takes()} ({origin}).")
    if len(classifier.classes) != len(classes):
        replace_head(classifier, classes)
    classifier.classes = list(classes)
    return classifier


def outputs(classifier, content):
    """How many classes the weights in a file's content are for; None where that is not seen."""
    head = f".{_head(classifier)}.weight"
    rows = {name: len(value) for name, value in tensors_of(content) if f".{name}".endswith(head)}
    return rows[min(rows, key=lambda name: name.count("."))] if rows else None


def unavailable(choices, image_size=IMAGE_SIZE):
    """A line for each of [("teacher" or "student", arch, weights, input size or None)] whose
    ImageNet weights can't be had.

    Raises UserError for an architecture that does not exist or does not take the images, and for a
    file that does not fit.
    """
    lines = []
    for role, arch, weights, size in dict.fromkeys(choices):
        size = size or input_size_of(arch, image_size)
        classifier = build(arch, ["a", "b"], "none", size)
        _watched(classifier, noise(classifier))
        if is_file(weights):        # without a head only a network of its own classes can tell
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
    training, seen, hooks = classifier.training, {}, []
    for name, module in classifier.network.named_modules():
        if _gives(module, len(classifier.classes)):
            hooks.append(module.register_forward_hook(      # what follows may work in place
                lambda _, inputs, output, name=name: seen.update({name: output.clone()})))
    try:
        return classifier.eval()(images), seen
    except (RuntimeError, ValueError, TypeError, AssertionError, LookupError) as error:
        if is_own(classifier.arch):
            error.add_note(f"{classifier.arch} was given {classifier.takes()}. Does it take images "
                           "of another size (--image-size, or --teacher-size)?")
            raise
        raise UserError(f"{classifier.arch} can't process {classifier.takes()} "
                        f"({first_line(error)}). Use another network or size.") from None
    finally:
        classifier.train(training)
        for hook in hooks:
            hook.remove()


def _same(some, others, tolerance=1e-4):
    if some.shape != getattr(others, "shape", None):        # or it is no tensor
        return False
    scale = others.nan_to_num(0, 0, 0).abs().max().item() if len(others) else 0
    return torch.allclose(some, others, rtol=tolerance, atol=tolerance * scale, equal_nan=True)


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
    _refuse(classifier.arch, main is None and "has no linear layer that makes its logits, so its "
            "head can't be replaced by one for other classes")
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
    _refuse(name_of_arch(student.arch), required and not enough and
            f"can't start from its teacher's weights: {name_of_arch(teacher.arch)} has {share:.0%} "
            "of them under the same names; half of them, and the head, are needed. Use "
            "--student-weights none")
    if enough:
        for name in shared:
            state[name].copy_(known[name])
        student.normalise(teacher.mean, teacher.std)
    return enough


@torch.no_grad()
def folded(classifier):
    """A copy in eval mode, with its batch norms folded into the convolutions that are seen to come
    before them: the same logits up to rounding, on a CPU 8 % (ResNet-34) to 41 % (MobileNet)
    faster. The classifier itself where they would differ, or where it can't be copied."""
    try:
        copied = copy.deepcopy(classifier.eval())
    except (RuntimeError, TypeError, NotImplementedError):      # a network may refuse that
        return classifier
    images, made, calls, pairs = noise(classifier), {}, collections.Counter(), []
    copied(images)      # which may run it twice, once in each layout

    def after_convolution(module, inputs, output):
        made[id(output)] = (module, output)     # kept, so that no other tensor takes its id
        calls[module] += 1

    def before_norm(module, inputs):
        pairs.append((made.get(id(inputs[0]), (None,))[0], module))
        calls[module] += 1
    hooks = [module.register_forward_hook(after_convolution) if isinstance(module, nn.Conv2d)
             else module.register_forward_pre_hook(before_norm) for module in copied.modules()
             if isinstance(module, nn.BatchNorm2d) or type(module) in (nn.Conv2d, SmallInputConv2d)]
    expected = copied(images)
    for hook in hooks:
        hook.remove()
    names = {module: name for name, module in copied.named_modules()}
    for convolution, norm in pairs:
        if convolution and calls[convolution] == calls[norm] == 1 and norm.track_running_stats:
            fused = nn.utils.fuse_conv_bn_eval(convolution, norm)
            convolution.weight, convolution.bias = fused.weight, fused.bias
            copied.set_submodule(names[norm], nn.Identity())
    return copied if _same(copied(images), expected) else classifier


# ---- What a network must do ----------------------------------------------------------------------

def _refuse(what, wrong):
    if wrong:
        raise UserError(f"{what} {wrong}.")


def require_logits(classifier, image_size=IMAGE_SIZE):
    """The classifier, in the mode it was in. Raises UserError unless it gives a logit for each of
    its classes. image_size: edge in pixels of the images."""
    logits, seen = _watched(classifier, noise(classifier, image_size, 3))
    found, wanted = _shape(logits), (3, len(classifier.classes))
    if found != wanted:
        wrong = f"gives {found} for three images of {wanted[1]} classes, not {wanted} logits"
    elif not logits.isfinite().all():
        wrong = "gives logits that are NaN or infinite for images of noise"
    elif logits.min() >= 0 and _same(logits.sum(1), torch.ones_like(logits[:, 0])):
        wrong = "gives probabilities, which add up to 1, not logits. Remove its softmax"
    else:
        wrong = any(_same(output.sigmoid(), logits) for output in seen.values()) and (
            "gives the probabilities of a sigmoid, not logits. Leave its sigmoid out")
    _refuse(classifier.arch, wrong)
    return classifier


def untrained(arch, classes, weights, image_size, input_size=None, mean=None, std=None):
    """The network before its training, as of `build`, checked on a few images of `image_size`."""
    classifier = build(arch, classes, weights, input_size or input_size_of(arch, image_size),
                       mean, std)
    return require_trainable(require_logits(classifier, image_size), image_size)


def _shape(value):
    return tuple(value.shape) if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"


def require_trainable(classifier, image_size=IMAGE_SIZE):
    """The classifier as it was. Raises UserError unless it gives logits while it trains as well."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        answer = copy.deepcopy(classifier).train()(noise(classifier, image_size, 2))
    _refuse(classifier.arch, any(not isinstance(value, torch.Tensor) for value in
                                 classifier.network.state_dict().values()) and
            "has other state than tensors (get_extra_state), which a checkpoint here can't hold")
    found = {_shape(each) for each in (answer if isinstance(answer, tuple) else [answer])
             if each is not None}
    _refuse(classifier.arch, found != {(2, len(classifier.classes))} and
            f"gives {listed(list(found))} for two images in train mode, not a row of logits each")
    return classifier


@torch.no_grad()
def question_teacher(classifier, images):
    """Raises UserError where a teacher's answer for an image is not one that scores can rest on: it
    is another one when asked again, or beside other images. Says what else is odd about it.

    images: (N, H, W, 3) uint8, real ones, of which it is shown up to 16.
    """
    arch, half = f"The teacher {name_of_arch(classifier.arch)}", min(len(images), 16) // 2
    shown = np.array(images[:: max(1, len(images) // 16)][:16])
    shown = torch.from_numpy(shown).to(classifier.scale.device)
    flat = torch.zeros_like(shown)
    flat[::2] = 255
    classifier.eval()
    once, again, beside = map(classifier, (shown, shown, torch.cat((flat, shown[:half]))))
    blank, beside = beside.split((len(flat), half))
    sure = once.isfinite().all(1)
    _refuse(arch, not sure.any() and "gives NaN or infinity for every image")
    _refuse(arch, not _same(again[sure], once[sure], 1e-3) and
            "gives different answers when asked twice for the same images: something in it is "
            "random in eval mode as well, such as dropout")
    _refuse(arch, not _same(beside[sure[:half]], once[:half][sure[:half]], 1e-2) and
            "gives an image another answer beside other images: its batch norm has no running "
            "statistics, or is in train mode")
    if not blank.isfinite().all():
        say(f"{arch} gives NaN for images of one colour. Such images are left out.")
