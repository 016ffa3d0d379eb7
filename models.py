"""Networks: building them, their heads, their checkpoints.

Every stage handles a `Classifier`: a network together with what it needs to know about its input. It takes
packed uint8 batches as they come from the disk; scaling, resizing and memory layout happen inside it.
"""
import collections
import copy
import functools
import inspect
import io
import itertools
import re
import warnings
from pathlib import Path

import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from download import RemoteFile, fetch, reachable
from files import UserError, file_digest, first_line, listed, require_whole, write_atomically
from packing import IMAGE_SIZE
from run import LARGEST, failing_in_a_line, import_file, is_own, name_of_arch, running_own

CIFAR_STEMS = {"resnet18_cifar": "resnet18", "resnet34_cifar": "resnet34"}
INPUT_SIZES = {"inception_v3": 299, "alexnet": 64, "maxvit_t": 224,     # the others take 32
               **dict.fromkeys(("vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32", "vit_h_14"), 224)}
AT_LEAST = ("inception_v3", "alexnet")      # which take more as well
TIMM = "timm:"
WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "network", "teacher")     # keys that a state dict is saved under
STARTS = ("none", "imagenet", "teacher", "auto")    # of a network's weights, if it is not a file
ENOUGH_SHARED = 0.5     # of a student's parameters, for a start from the teacher's
PLAIN = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool)
CENTERED = (0.5, 0.5, 0.5)      # as mean and as deviation: pixels in [-1, 1]


class SmallInputConv2d(nn.Conv2d):
    """The same convolution, as one matrix product where the input is at most 2x2 and no tap sees only padding.

    At 32x32 the last blocks of a stock ResNet work on 2x2 and 1x1 pixels, where most taps of a 3x3 kernel see
    nothing but padding and the weight gradient of a convolution costs more than all other layers together.
    The parameters, their names and the result, up to rounding, are those of nn.Conv2d.
    """

    enabled = True      # for all of them; without it they are the convolutions that they are called

    def forward(self, images):
        height, width = images.shape[-2:]
        taps = _taps(height, width, self.kernel_size, self.stride, self.padding) if (
            self.enabled and images.device.type == "cpu" and height * width <= 4 and self.groups == 1 and self.dilation == (1, 1) and self.padding_mode == "zeros") else None
        if taps is None:
            return super().forward(images)
        out_height, out_width, pairs = taps
        bias = None if self.bias is None else self.bias.repeat(out_height * out_width)
        flat = F.linear(images.permute(0, 2, 3, 1).reshape(len(images), -1), _ByTap.apply(self.weight, pairs), bias)
        return flat.view(len(images), out_height, out_width, self.out_channels).permute(0, 3, 1, 2)


class _ByTap(torch.autograd.Function):
    """The matrix (outputs * out, inputs * into) of a convolution whose taps, `pairs` (((ky, kx), ... one an input pixel), ... one an output
    pixel), are of its weight (out, into, kh, kw). The gradient is written straight into the form that the weight has: torch's own way to
    the same copies the weight, mostly zeros here, three times."""

    @staticmethod
    def forward(ctx, weight, pairs):
        ctx.save_for_backward(weight)
        ctx.pairs = pairs
        if len(pairs) == len(pairs[0]) == 1:
            return weight[:, :, pairs[0][0][0], pairs[0][0][1]].contiguous()
        matrix = weight.new_empty(len(pairs), len(weight), len(pairs[0]), weight.shape[1])
        for output, taps in enumerate(pairs):
            for number, (y, x) in enumerate(taps):
                matrix[output, :, number] = weight[:, :, y, x]
        return matrix.view(len(pairs) * len(weight), -1)

    @staticmethod
    def backward(ctx, gradient):
        weight, = ctx.saved_tensors
        found = torch.zeros_like(weight)
        gradient = gradient.view(len(ctx.pairs), len(weight), len(ctx.pairs[0]), weight.shape[1])
        for output, taps in enumerate(ctx.pairs):
            for number, (y, x) in enumerate(taps):
                found[:, :, y, x] += gradient[output, :, number]
        return found, None


@functools.lru_cache
def _taps(height, width, kernel, stride, padding):
    """(output height, output width, ((the kernel's tap for each input pixel), ... for each output pixel)), or None where a
    pair has none. Raises nothing: padding given by name ("same") is left to the convolution."""
    if not isinstance(padding, tuple):
        return None
    size = [(edge + 2 * pad - taps) // step + 1
            for edge, taps, step, pad in zip((height, width), kernel, stride, padding)]
    pairs = tuple(tuple((in_y - out_y * stride[0] + padding[0], in_x - out_x * stride[1] + padding[1])
                        for in_y, in_x in itertools.product(range(height), range(width)))
                  for out_y, out_x in itertools.product(range(size[0]), range(size[1])))
    inside = all(0 <= y < kernel[0] and 0 <= x < kernel[1] for taps in pairs for y, x in taps)
    return (size[0], size[1], pairs) if inside and pairs else None


class Classifier(nn.Module):
    """A network and its input: takes (N, H, W, 3) pixels in [0, 255], uint8 or float, gives logits (N, C).

    mean, std: three numbers each, of pixels in [0, 1]. input_size: edge in pixels that the network wants.
    A network with an auxiliary head gives a pair of logits while it trains.
    """

    def __init__(self, network, arch, classes, input_size=IMAGE_SIZE, mean=CENTERED, std=CENTERED):
        super().__init__()
        self.network = network.to(memory_format=torch.channels_last)
        for module in network.modules():
            if type(module) is nn.Conv2d:
                module.__class__ = SmallInputConv2d     # same parameters, same names
        self.arch, self.classes, self.input_size = arch, list(classes), input_size
        self.mean, self.std = [float(value) for value in mean], [float(value) for value in std]
        self.register_buffer("scale", torch.tensor([1 / (255 * s) for s in self.std]).view(3, 1, 1), persistent=False)
        self.register_buffer("shift", torch.tensor([-m / s for m, s in zip(self.mean, self.std)]).view(3, 1, 1), persistent=False)

    def forward(self, images):
        # (N, H, W, 3) in memory is (N, 3, H, W) in channels_last: the permutation moves nothing.
        pixels = torch.addcmul(self.shift, images.permute(0, 3, 1, 2).to(self.scale.dtype), self.scale)
        if pixels.shape[-1] != self.input_size:
            pixels = F.interpolate(pixels, (self.input_size, self.input_size), mode="bilinear", align_corners=False)
        return self.network(pixels)


# --------------------------------------------------------------------------------------------------
# Architectures
# --------------------------------------------------------------------------------------------------

def require_known(arch):
    """Raises UserError unless `arch` is a classifier of torchvision, one of CIFAR_STEMS, "timm:NAME" or "FILE.py:FACTORY"."""
    if is_own(arch):
        _factory(arch)
    elif arch.startswith(TIMM):
        if not _timm().is_model(arch.removeprefix(TIMM)):
            raise UserError(f"timm has no {arch.removeprefix(TIMM)}: timm.list_models() lists what it has")
    elif arch not in CIFAR_STEMS and arch not in torchvision.models.list_models(torchvision.models):
        raise UserError(f"no classifier is called {arch}: torchvision lists its own with torchvision.models.list_models(torchvision.models), "
                        f"there are {' and '.join(CIFAR_STEMS)}, timm:NAME where timm is installed, and FILE.py:FACTORY for your own")


def _timm():
    try:
        import timm
    except ImportError:
        raise UserError("timm is not installed: pip install timm") from None
    return timm


def _factory(arch):
    path, _, name = arch.rpartition(":")
    factory = getattr(import_file(path), name, None)
    if not callable(factory):
        raise UserError(f"{path} has no function {name}")
    return factory


def _own_network(arch, count, input_size):
    """What the user's function makes. It is given the number of classes where it has a parameter for it: one called
    num_classes, or else one without a default. Layers that take their size from their first input are shown one."""
    factory = _factory(arch)
    with failing_in_a_line(lambda said: f"{arch} raised {said}"):
        parameters = inspect.signature(factory).parameters
        required = [name for name, parameter in parameters.items() if parameter.default is parameter.empty
                    and parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)]
        with running_own(arch.rpartition(":")[0]):
            network = factory(num_classes=count) if "num_classes" in parameters else factory(count) if required else factory()
    if not isinstance(network, nn.Module):
        raise UserError(f"{arch} gives a {type(network).__name__}, not a torch.nn.Module")
    if any(isinstance(tensor, nn.parameter.UninitializedTensorMixin) for tensor in itertools.chain(network.parameters(), network.buffers())):
        with _taking_images(arch, input_size), torch.no_grad():
            network.eval()(torch.zeros(2, 3, input_size, input_size))
        network.train()
    return network


def _taking_images(arch, size):
    """A context in which what a network raises says that it does not take images of that size."""
    return failing_in_a_line(lambda said: f"{arch} does not take {size}x{size} images: {said.partition(': ')[2] or said}; another size is --teacher-size")


def input_size_of(arch, image_size=IMAGE_SIZE):
    """The edge in pixels that a network wants for images of `image_size`: the same, unless it can't have it."""
    if arch.startswith(TIMM):
        require_known(arch)
        settings = _timm().get_pretrained_cfg(arch.removeprefix(TIMM))
        return settings.input_size[-1] if settings is not None and settings.fixed_input_size else image_size
    return max(image_size, INPUT_SIZES[arch]) if arch in AT_LEAST else INPUT_SIZES.get(arch, image_size)


def build(arch, classes, weights="none", input_size=None, mean=None, std=None):
    """A Classifier with a head for `classes` (names).

    weights: "none" (random, from torch's seed), "imagenet" (torchvision's or timm's; fetched where they aren't cached),
    or the path of a checkpoint. input_size: edge in pixels, None: `input_size_of(arch)`; mean, std: None: CENTERED, or, for
    all three, what the checkpoint says. Inception-V3 has its auxiliary
    head at 299 pixels and more, as that one takes no less. Raises UserError for an unknown architecture or a
    checkpoint that doesn't fit.
    """
    require_known(arch)
    if weights not in ("none", "imagenet"):
        start = load(weights, arch)
        if start.arch != arch:
            raise UserError(f"{weights} holds a {start.arch}, not a {arch}")
        if len(start.classes) != len(classes):
            replace_head(start, len(classes))
        return Classifier(start.network, arch, classes, input_size or start.input_size, mean or start.mean, std or start.std)
    input_size, mean, std = input_size or input_size_of(arch), mean or CENTERED, std or CENTERED
    if is_own(arch):
        if weights == "imagenet":
            raise UserError(f"there are no ImageNet weights for {arch}")
        return Classifier(_own_network(arch, len(classes), input_size), arch, classes, input_size, mean, std)
    if arch.startswith(TIMM):
        name = arch.removeprefix(TIMM)
        try:
            network = _timm().create_model(name, pretrained=weights == "imagenet", num_classes=len(classes))
        except Exception as error:      # what the hub's client raises is of many kinds
            raise UserError(f"{arch} can't be made with weights {weights} ({first_line(error)})") from None
        return Classifier(network, arch, classes, input_size, mean, std)
    base = CIFAR_STEMS.get(arch, arch)
    # Torch's own start. Their special one, with deviations of 0.1, did not learn here at any rate that was tried.
    options = {"init_weights": False} if base in ("inception_v3", "googlenet") else {}
    network = torchvision.models.get_model(base, weights=None, num_classes=1000 if weights == "imagenet" else len(classes), **options)
    if weights == "imagenet":
        path = imagenet_weights(base)
        state = torch.load(path, weights_only=True, map_location="cpu")
        _fit(network, state, path, base, "give --teacher-weights none")
    if base == "inception_v3" and input_size < INPUT_SIZES[base]:
        network.aux_logits, network.AuxLogits = False, None
    if arch in CIFAR_STEMS:
        network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
        network.maxpool = nn.Identity()
    classifier = Classifier(network, arch, classes, input_size, mean, std)
    if weights == "imagenet":
        replace_head(classifier, len(classes), 1000)
    return classifier


# --------------------------------------------------------------------------------------------------
# Heads
# --------------------------------------------------------------------------------------------------

class _LinearLayers(TorchFunctionMode):
    """Notes the rows of every linear layer and every 1x1 convolution that is computed, whatever module or function
    asks for it, and what comes out."""

    def __init__(self):
        super().__init__()
        self.found = []         # [(output, its version, a copy of it, rows w (C, D))]

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        output = function(*args, **kwargs)
        name = getattr(function, "__name__", "")
        operands = [*args, *kwargs.values()]
        if name in ("linear", "conv2d"):
            rows = args[1] if len(args) > 1 else kwargs["weight"]
            if name == "conv2d" and (kwargs.get("groups", 1) if len(args) < 7 else args[6]) != 1:
                return output
        elif name in ("addmm", "matmul", "mm", "__matmul__"):
            rows = operands[2 if name == "addmm" else 1].T if operands[2 if name == "addmm" else 1].dim() == 2 else None
        else:
            return output
        if rows is not None and rows.shape[2:] in ((), (1, 1)):
            self.found.append((output, output._version, output.clone(), rows))      # what comes next may change it in place
        return output

    def rows_of(self, logits):
        """(rows w (C, D) of the layer that `logits` (N, C) come from, the factor of each row (C,)): logits = factor * (features @ w.T) + a
        constant a class, up to a number that all of an image's logits share. None where something else has been done to them."""
        for output, version, copied, rows in reversed(self.found):
            if len(rows) != logits.shape[1]:
                continue
            untouched = output.data_ptr() == logits.data_ptr() and output._version == version     # holds for logits that are NaN as well
            if output.numel() == logits.numel() and (untouched or torch.equal(copied.reshape(logits.shape).to(logits.dtype), logits)):
                return rows, torch.ones(len(rows))
            if copied.dim() == 4:       # a convolution whose maps are averaged, in SqueezeNet after a ReLU
                made = (copied.mean((2, 3)), copied.relu().mean((2, 3)))
            elif copied.dim() == 3:     # tokens: their mean, or one of them
                made = (copied.mean(1), *copied.unbind(1))
            else:
                made = (copied,) if copied.shape == logits.shape else ()
            for each in made:
                factor = _factor(each.double(), logits.double()) if each.shape == logits.shape else None
                if factor is not None:
                    return rows, factor
        return None


def _factor(made, logits):
    """(C,) positive numbers that made @ diag(factor) differs from `logits` by, but for a constant a class; or one for all classes, but for a
    number an image as well, which a log-softmax takes off. None where there are none. Both (N, C)."""
    if torch.allclose(made, logits, rtol=1e-4, atol=1e-6):
        return torch.ones(made.shape[1])
    made, logits = made - made.mean(0), logits - logits.mean(0)
    each = (made * logits).sum(0) / made.square().sum(0)
    made_alike, logits_alike = (values - values.mean(1, keepdim=True) for values in (made, logits))
    common = ((made_alike * logits_alike).sum() / made_alike.square().sum()).expand(made.shape[1])
    for factor, ours, theirs in ((each, made, logits), (common, made_alike, logits_alike)):
        if (factor > 0).all() and (factor * ours - theirs).abs().max() <= 1e-3 * theirs.abs().max():
            return factor.float()
    return None


@torch.no_grad()
def head_weight(classifier):
    """The rows w of the linear layer that makes the logits, (C, D) float32: z = features @ w.T + bias.
    None where they are made by something else. Found by watching the network at work on a few random images."""
    found = _watched_head(classifier)
    return None if found is None else (found[0].detach().flatten(1).float() * found[1].to(found[0].device)[:, None])


def _watched_head(classifier):
    """(rows (C, D), factors (C,)) as in `_LinearLayers.rows_of`, or None."""
    images = _random_images(classifier)
    training = classifier.training
    classifier.eval()
    SmallInputConv2d.enabled = False
    try:
        with _LinearLayers() as layers:
            logits = classifier(images)
    finally:
        SmallInputConv2d.enabled = True
        classifier.train(training)
    return layers.rows_of(logits)


def _random_images(classifier):
    """Noise of many brightnesses and contrasts, so that what comes out differs as it would for photographs. Not as many as there are classes."""
    size, generator = classifier.input_size, torch.Generator().manual_seed(0)
    count = 8 if len(classifier.classes) != 8 else 9
    low, high = torch.rand(2, count, 1, 1, 3, generator=generator) * 256
    noise = low + (high - low) * torch.rand(count, size, size, 3, generator=generator)
    return noise.to(torch.uint8).to(classifier.scale.device)


def heads(classifier, count=None):
    """[(parent module, name)] of every layer that gives `count` logits (default: as many as there are classes), the
    auxiliary heads first, the head, which makes the logits, last."""
    network, count = classifier.network, count or len(classifier.classes)
    with torch.no_grad():
        rows = (_watched_head(classifier) or (None,))[0]
    layers = {name: module for name, module in network.named_modules()
              if isinstance(module, nn.Linear) and module.out_features == count
              or isinstance(module, nn.Conv2d) and module.out_channels == count and module.kernel_size == (1, 1)}
    main = [name for name, module in layers.items() if rows is not None and torch.equal(module.weight.detach().flatten(1), rows.detach().flatten(1))]
    if not main:
        raise UserError(f"{classifier.arch} has no linear layer that makes its logits, so its head can't be replaced by one for other classes")
    auxiliary = [name for name in layers if "aux" in name.lower()]
    paths = [name.rpartition(".") for name in (*auxiliary, main[-1])]
    return [(network.get_submodule(parent), name) for parent, _, name in paths]


def replace_head(classifier, count, old_count=None):
    """Puts new layers for `count` classes, randomly initialised, in place of those that give the logits."""
    for parent, name in heads(classifier, old_count):
        old = getattr(parent, name)
        new = (nn.Linear(old.in_features, count, old.bias is not None) if isinstance(old, nn.Linear)
               else SmallInputConv2d(old.in_channels, count, 1, bias=old.bias is not None))
        setattr(parent, name, new)


@torch.no_grad()
def inherit(student, teacher):
    """Copies into a student every weight and statistic that its teacher has under the same name, of the same shape, if those are at least half of
    the student's parameters. Returns what share of them that is, in [0, 1].

    Of two networks of one family the shallower one gets the first blocks of each stage, and the head: a ResNet-18 all that it has
    from a ResNet-34. A residual network that has lost blocks still answers much like the whole one (Veit et al., arXiv 1605.06431).
    """
    known, state = teacher.network.state_dict(), student.network.state_dict()
    shared = [name for name, value in state.items() if name in known and known[name].shape == value.shape]
    sizes = {name: parameter.numel() for name, parameter in student.network.named_parameters()}
    share = sum(sizes.get(name, 0) for name in shared) / sum(sizes.values())
    if share >= ENOUGH_SHARED:
        for name in shared:
            state[name].copy_(known[name])
    return share


def require_heir(student_arch, teacher_arch):
    """Raises UserError unless a network of the one architecture can `inherit` from one of the other."""
    share = inherit(build(student_arch, ["a", "b"]), build(teacher_arch, ["a", "b"]))
    if share < ENOUGH_SHARED:
        raise UserError(f"{name_of_arch(student_arch)} can't start from its teacher's weights: the layers that {name_of_arch(teacher_arch)} has under the same names hold "
                        f"{share:.0%} of its own: give --student-weights none")


# --------------------------------------------------------------------------------------------------
# Answering faster
# --------------------------------------------------------------------------------------------------

def folded(classifier):
    """A copy for answering alone, in eval mode, whose batch norms are folded into the convolutions before them: the same
    logits up to rounding. Where they wouldn't be, or the network can't be copied, the classifier itself.

    Which batch norm follows which convolution is seen by watching the network at work, as names and order say nothing sure.
    """
    classifier.eval()
    try:
        return _folded(classifier)
    except Exception:       # a network of the user's may have weights that are computed, or refuse a copy
        return classifier


@torch.no_grad()
def _folded(classifier):
    copied = copy.deepcopy(classifier)
    images = _random_images(classifier)
    made, calls, pairs = {}, collections.Counter(), []

    def after_convolution(module, inputs, output):
        made[id(output)] = (module, output)     # kept alive, so that no other tensor takes its id
        calls[module] += 1

    def before_batch_norm(module, inputs):
        convolution, output = made.get(id(inputs[0]), (None, None))
        pairs.append((convolution, module))
        calls[module] += 1
    hooks = [module.register_forward_hook(after_convolution) if isinstance(module, nn.Conv2d) else module.register_forward_pre_hook(before_batch_norm)
             for module in copied.modules() if isinstance(module, (nn.Conv2d, nn.BatchNorm2d))]
    expected = copied(images)
    for hook in hooks:
        hook.remove()
    places = {child: (parent, name) for parent in copied.modules() for name, child in parent.named_children()}
    for convolution, norm in pairs:
        if convolution is not None and calls[convolution] == calls[norm] == 1 and norm.track_running_stats:
            fused = nn.utils.fuse_conv_bn_eval(convolution, norm)
            convolution.weight, convolution.bias = fused.weight, fused.bias
            setattr(*places[norm], nn.Identity())
    error = (copied(images) - expected).abs().max()
    return copied if error <= 1e-4 * expected.abs().max() else classifier


# --------------------------------------------------------------------------------------------------
# ImageNet weights
# --------------------------------------------------------------------------------------------------

def _imagenet(arch):
    """(address, path in torch's cache) of torchvision's weights."""
    weights = torchvision.models.get_model_weights(CIFAR_STEMS.get(arch, arch)).DEFAULT
    name = weights.url.rpartition("/")[2]
    return weights.url, Path(torch.hub.get_dir()) / "checkpoints" / name


def require_fits(arch, image_size=IMAGE_SIZE, input_size=None):
    """Raises UserError unless `arch` exists and takes images of this size, resized to `input_size` where that is given."""
    require_known(arch)
    input_size = input_size or input_size_of(arch, image_size)
    images = torch.zeros(2, image_size, image_size, 3, dtype=torch.uint8)
    # On the meta device only shapes are computed. Some constructors can't run there and get a second, real try.
    for device in ("meta", "cpu"):
        try:
            with torch.device(device), torch.no_grad():
                logits = build(arch, ["a", "b"], input_size=input_size).eval()(images.to(device))
            break
        except UserError:
            if device == "cpu":
                raise
        except (Exception, SystemExit, GeneratorExit) as error:
            reason = first_line(error)
    else:
        raise UserError(f"{arch} does not take {input_size}x{input_size} images: {reason}; another size is --teacher-size")
    if not isinstance(logits, torch.Tensor) or logits.dim() != 2 or len(logits) != 2:
        raise UserError(f"{arch} gives {_shape(logits)} for two images, not a row of logits each")


def require_logits(classifier, image_size=IMAGE_SIZE):
    """Raises UserError unless the classifier gives a logit for each of its classes. Returns it, in the mode it was in."""
    training = classifier.training
    images = torch.zeros(2, image_size, image_size, 3, dtype=torch.uint8, device=classifier.scale.device)
    with _taking_images(classifier.arch, classifier.input_size), torch.no_grad():
        logits = classifier.eval()(images)
        of_noise = classifier(_random_images(classifier)[:3])       # more of them, and not all of one colour
    if not isinstance(logits, torch.Tensor) or logits.shape != (2, len(classifier.classes)):
        raise UserError(f"{classifier.arch} gives {_shape(logits)} for two images of {len(classifier.classes)} classes, not (2, {len(classifier.classes)})")
    if not logits.is_floating_point():
        raise UserError(f"{classifier.arch} gives logits of {logits.dtype}, not of real numbers")
    if not of_noise.isfinite().all():
        raise UserError(f"{classifier.arch} gives logits that are NaN or infinite, for images of noise")
    if (logits >= 0).all() and torch.allclose(logits.sum(1), torch.ones_like(logits[:, 0]), atol=1e-4):
        raise UserError(f"{classifier.arch} gives probabilities, which add up to 1, not logits: leave its softmax out")
    return classifier.train(training)


def require_trainable(classifier, image_size=IMAGE_SIZE):
    """Raises UserError unless the classifier gives logits that can be learned from while it trains, and its weights can be saved. Returns it as it was, as long as
    it can be copied; where not, its weights and torch's random numbers are as they were."""
    classes, state = len(classifier.classes), classifier.state_dict()
    odd = [name for name, value in state.items() if not isinstance(value, torch.Tensor)]
    if odd:
        raise UserError(f"{classifier.arch} can't be saved as plain tensors: {listed(odd, 3)} in its state_dict {'is' if len(odd) == 1 else 'are'} no tensor")
    try:
        tried = copy.deepcopy(classifier)
    except Exception:       # a network of the user's may refuse it
        tried = classifier
    training, kept = classifier.training, {name: value.clone() for name, value in state.items()} if tried is classifier else {}
    images = torch.zeros(2, image_size, image_size, 3, dtype=torch.uint8, device=classifier.scale.device)
    with torch.random.fork_rng(devices=[]), failing_in_a_line(lambda said: f"{classifier.arch} can't be trained: {said}"):
        answer = tried.train()(images)
    with torch.no_grad():
        for name, value in kept.items():
            state[name].copy_(value)
    logits = [each for each in answer if each is not None] if isinstance(answer, tuple) else [answer]
    if not logits or not all(isinstance(each, torch.Tensor) and each.shape == (2, classes) and each.is_floating_point() for each in logits):
        raise UserError(f"{classifier.arch} gives {', '.join(map(_shape, logits))} in train mode for two images of {classes} classes, not (2, {classes})")
    if not sum(each.sum() for each in logits).requires_grad:
        raise UserError(f"{classifier.arch} can't be trained: none of its weights takes a gradient")
    return classifier.train(training)


def _shape(value):
    return str(tuple(value.shape)) if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"


def unavailable(choices, image_size=IMAGE_SIZE):
    """A line for each of [("teacher" or "student", arch, weights, input size or None)] that can't be had: what is missing, its
    address, where to put it by hand.

    Raises UserError for an architecture that doesn't exist or doesn't fit, and for a file that is no checkpoint.
    """
    lines = []
    for role, arch, weights, input_size in dict.fromkeys(choices):
        require_fits(arch, image_size, input_size)
        if weights == "imagenet" and is_own(arch):
            lines.append(f"there are no ImageNet weights for {arch}: give --{role}-weights none")
        elif weights == "imagenet" and arch.startswith(TIMM):
            try:
                build(arch, ["a", "b"], "imagenet")     # its hub's client knows where they are, and fetches them
            except UserError as error:
                lines.append(f"{error}: give --{role}-weights none")
        elif weights == "imagenet":
            url, path = _imagenet(arch)
            reason = None if path.exists() else reachable((url,))
            if reason:
                lines.append(f"the ImageNet weights of {arch} are missing and {reason}: put that file at {path}, "
                             f"or give --{role}-weights none")
        elif weights not in STARTS:
            _require_named(read(weights), weights, arch)
    return lines


def imagenet_weights(arch):
    """The path of torchvision's weights, fetched into torch's cache where they aren't there, checked against the hash in their name."""
    url, path = _imagenet(arch)
    fetch(RemoteFile((url,), sha256=path.stem.rpartition("-")[2]), path)
    return path


# --------------------------------------------------------------------------------------------------
# Checkpoints
# --------------------------------------------------------------------------------------------------

def files_of(arch, *files):
    """{path: digest} of the files that a network is made from: that of its architecture, where it is the user's own, and its weights."""
    paths = [arch.rpartition(":")[0]] if is_own(arch) else []
    return {path: file_digest(path) for path in (*paths, *files) if path not in (None, *STARTS)}


def require_same_files(made, then):
    """Raises UserError where one of the files {path: digest} that `made`, a path, comes from is there with another content."""
    for path, digest in then.items():
        if Path(path).is_file() and file_digest(path) != digest:
            raise UserError(f"{made} was made from another version of {path}: use another --run-dir, or --restart")


def save(path, classifier, **figures):
    """Writes a checkpoint of plain types and tensors. `figures` (accuracy, ...) go beside the weights."""
    buffer = io.BytesIO()
    torch.save({"arch": classifier.arch, "classes": classifier.classes, "input_size": classifier.input_size,
                "mean": classifier.mean, "std": classifier.std,
                "state_dict": {name: value.detach().cpu().contiguous() for name, value in classifier.network.state_dict().items()},
                **figures}, buffer)
    write_atomically(path, lambda file: file.write(buffer.getbuffer()))


def read_tensors(path):
    """What a file of tensors and plain types holds. Nothing in it is ever run."""
    if not Path(path).is_file():
        raise UserError(f"{path}: there is no such checkpoint")
    require_whole(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")     # of TorchScript, which is refused below
            return _bare(torch.load(path, weights_only=True, map_location="cpu"))
    except Exception as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        if named or "TorchScript" in str(error):
            raise UserError(f"{path} is not a checkpoint of tensors and plain types: it holds "
                            f"{named[1] if named else 'a TorchScript program'}, and to read that is to run code from the file; "
                            "in the program that made it, torch.save(network.state_dict(), FILE)") from None
        raise UserError(f"{path} is not a checkpoint of tensors and plain types ({first_line(error)[:120]})") from None


def _bare(value):
    """What was read, without the attributes that a file may give to its dicts and tensors, where they would stand in the way of methods."""
    if isinstance(value, torch.Tensor):
        return torch.Tensor.detach(value)
    if not isinstance(value, dict):
        return value
    bare, versions = collections.OrderedDict((key, _bare(each)) for key, each in dict.items(value)), getattr(value, "_metadata", None)
    if isinstance(versions, dict) and all(isinstance(name, str) and isinstance(of, dict) and all(isinstance(number, int) for number in dict.values(of)) for name, of in dict.items(versions)):
        bare._metadata = versions
    return bare


def arch_of(path, arch):
    """The architecture of the teacher in a checkpoint that is given with `arch`: what it says of itself, if it is one of this project."""
    content = read_tensors(path)
    if not _is_ours(content):
        return arch
    _require_sound(content, path)
    _require_named(content, path, arch)
    return arch if is_own(content["arch"]) else content["arch"]


def _is_ours(content):
    return isinstance(content, dict) and {"arch", "classes", "input_size", "mean", "std", "state_dict"} <= set(content)


def _require_sound(content, path):
    """Raises UserError unless the parts of a checkpoint of this project are what they should be."""
    def three(values, least):
        return isinstance(values, (tuple, list)) and len(values) == 3 and all(type(value) in (int, float) and least <= value <= 1e12 for value in values)
    classes, size = content["classes"], content["input_size"]
    sound = {
        "arch": isinstance(content["arch"], str),
        "classes": isinstance(classes, (list, tuple)) and all(isinstance(name, str) or type(name) is int and name >= 0 for name in classes) and len(set(classes)) == len(classes) >= 2,
        "input_size": type(size) is int and 1 <= size <= LARGEST, "mean": three(content["mean"], -1e12), "std": three(content["std"], 1e-12),
        "state_dict": isinstance(content["state_dict"], dict) and all(isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in content["state_dict"].items()),
    }
    wrong = [name for name, right in sound.items() if not right]
    if wrong:
        raise UserError(f"{path} is damaged: {listed(wrong)} {'is' if len(wrong) == 1 else 'are'} not what a checkpoint of this project has there")


def read(path):
    """The content of a checkpoint of this project. Nothing in the file is ever run: only tensors and plain types are read."""
    content = read_tensors(path)
    if not _is_ours(content):
        raise UserError(f"{path} is not a checkpoint of this project: it lacks arch, classes, input_size, mean, std or state_dict")
    _require_sound(content, path)
    return content


def load(path, arch=None):
    """The Classifier of a checkpoint, in eval mode. arch: FILE.py:FACTORY where the file of such a network lies somewhere else now."""
    return _load_ours(read(path), path, arch)


def _require_named(content, path, arch):
    """Raises UserError where a checkpoint names code that `arch`, from the command line, does not."""
    if is_own(content["arch"]) and not (arch and is_own(arch)):
        raise UserError(f"{path} was made by {content['arch']}, and code runs only where the command line names it: add it as --teacher-arch, or --student-arch")


def _load_ours(content, path, arch=None):
    _require_named(content, path, arch)
    if is_own(content["arch"]):
        content = content | {"arch": arch}
    classifier = build(content["arch"], content["classes"], input_size=content["input_size"], mean=content["mean"], std=content["std"])
    _fit(classifier.network, content["state_dict"], path, content["arch"])
    return classifier.eval()


def load_teacher(path, arch, classes, input_size=None, mean=None, std=None, image_size=IMAGE_SIZE, default_arch=None):
    """The Classifier of any checkpoint, in eval mode: one of this project, which says itself what it is, or a state dict
    for `arch`, with or without a key around it and a prefix before its keys.

    classes: names; None takes them from the checkpoint. input_size, mean, std: where given, they hold instead of the
    checkpoint's or the defaults. default_arch: the `arch` that says nothing, as nobody chose it.
    """
    content = read_tensors(path)
    if _is_ours(content):
        _require_sound(content, path)
        if arch not in (content["arch"], default_arch) and not (is_own(arch) and is_own(content["arch"])):
            raise UserError(f"{path} holds a {content['arch']}, not a {arch}: leave --teacher-arch out")
        classifier = _load_ours(content | {"input_size": input_size or content["input_size"], "mean": mean or content["mean"],
                                           "std": std or content["std"]}, path, arch)
        if classes is not None and classifier.classes != list(classes):
            raise UserError(f"{path} knows {len(classifier.classes)} classes ({', '.join(map(str, classifier.classes[:3]))}, ...), "
                            f"the target has {len(classes)} ({', '.join(map(str, classes[:3]))}, ...)")
        return require_logits(classifier, image_size)
    if classes is None:
        raise UserError(f"{path} does not say which classes it knows: give --classes")
    input_size = input_size or input_size_of(arch, image_size)
    classifier = build(arch, classes, input_size=input_size, mean=mean or CENTERED, std=std or CENTERED)
    _fit(classifier.network, _unwrapped(content, path), path, arch, "give the --teacher-arch that it was saved from")
    return require_logits(classifier.eval(), image_size)


def _unwrapped(content, path):
    """The state dict in what was saved: itself, or under a key of its own beside figures, an optimizer, ..."""
    def is_state_dict(value):
        return isinstance(value, dict) and bool(value) and all(isinstance(key, str) and isinstance(tensor, torch.Tensor) for key, tensor in value.items())

    if is_state_dict(content):
        return content
    inside = {key: value for key, value in content.items() if is_state_dict(value)} if isinstance(content, dict) else {}
    key = next((key for key in WRAPPERS if key in inside), next(iter(inside)) if len(inside) == 1 else None)
    if key is None:
        raise UserError(f"{path} holds no state dict" if not inside else f"{path} holds several state dicts ({', '.join(map(str, inside))}): save the one alone")
    return inside[key]


def _fit(network, state, path, arch, remedy=None):
    """Loads a state dict. What stands before all of its keys, as `module.` does, is taken off; keys that do not fit are named."""
    expected = network.state_dict()
    versions = getattr(state, "_metadata", expected._metadata)      # of its layers; MNASNet takes no state dict without
    state = collections.OrderedDict(state)
    plain = {key for key, value in state.items() if value.layout == torch.strided and value.dtype in PLAIN and not (value.is_meta or value.is_nested)}
    if len(plain) < len(state):
        odd = [key for key in state if key not in plain]
        raise UserError(f"{path} can't be used: {listed(odd, 3)} {'holds' if len(odd) == 1 else 'hold'} no dense real numbers")
    while state and not state.keys() & expected.keys():
        prefixes = {key.partition(".")[0] for key in state}
        if len(prefixes) > 1 or "" in (key.partition(".")[2] for key in state):
            break
        state, versions = collections.OrderedDict((key.partition(".")[2], value) for key, value in state.items()), expected._metadata
    # Auxiliary heads have no part in an answer: a network and its state dict need not agree about them.
    for name in [name for name, child in network.named_children() if "aux" in name.lower() and child is not None] if hasattr(network, "aux_logits") else ():
        if not any(key.startswith(name + ".") for key in state):
            setattr(network, name, None)
            network.aux_logits = False
    if hasattr(network, "aux_logits"):
        expected = network.state_dict()
        state = collections.OrderedDict((key, value) for key, value in state.items() if key in expected or "aux" not in key.partition(".")[0].lower())
    counters = {key for key in expected if key.endswith("num_batches_tracked")}    # which old checkpoints lack
    wrong = {"it lacks": sorted(expected.keys() - state.keys() - counters), "it has beyond that": sorted(state.keys() - expected.keys()),
             "of another shape are": [f"{key} ({'x'.join(map(str, state[key].shape))} for {'x'.join(map(str, expected[key].shape))})"
                                      for key in sorted(expected.keys() & state.keys()) if state[key].shape != expected[key].shape]}
    said = [f"{what} {', '.join(keys[:3])}{f' and {len(keys) - 3} more' if len(keys) > 3 else ''}" for what, keys in wrong.items() if keys]
    if said:
        raise UserError(f"{path} does not fit {arch}: {'; '.join(said)}" + (f": {remedy}" if remedy else ""))
    broken = [key for key, value in state.items() if not value.isfinite().all() and (key not in expected or expected[key].isfinite().all())]      # a mask may hold infinity from the start
    if broken:
        raise UserError(f"{path} can't be used: {listed(broken, 3)} {'holds' if len(broken) == 1 else 'hold'} NaN or infinity")
    state._metadata = versions
    network.load_state_dict(state, strict=False)
