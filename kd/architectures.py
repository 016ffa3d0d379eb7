"""Networks by name: torchvision's, those for CIFAR, timm's ("timm:NAME"), the user's own
("FILE.py:FACTORY"), a repository's ("hub:OWNER/REPOSITORY:ENTRY"). ImageNet weights."""
import contextlib
import functools
import inspect
import os
from pathlib import Path

import torch
import torchvision
from torch import nn

from kd import cifar
from kd.classifier import CENTERED, IMAGENET
from kd.download import RemoteFile, fetch
from kd.files import UserError, first_line
from kd.own import import_file
from kd.settings import IMAGE_SIZE
from kd.state_dicts import fit
from kd.values import CIFAR_NETWORKS, HUB, has_imagenet_weights, is_own, is_pretrained

CIFAR_STEMS = {"resnet18_cifar": "resnet18", "resnet34_cifar": "resnet34"}
LEAST = {"inception_v3": 299, "alexnet": 64}        # pixels of an edge; the others take 32
AT_224 = ("maxvit_t", "vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32", "vit_h_14")
TIMM = "timm:"


def input_size_of(arch, image_size=IMAGE_SIZE):
    """The edge in pixels that a network wants for images of `image_size`: the same if it can."""
    if arch.startswith(TIMM):
        settings = timm_settings(arch)
        return settings["input_size"][-1] if settings.get("fixed_input_size") else image_size
    return 224 if arch in AT_224 else max(image_size, LEAST.get(arch, 0))


def usual_pixels(arch):
    """(mean, std, whose they are) for weights that do not say what pixels they take."""
    if arch.startswith(TIMM):
        settings = timm_settings(arch)
        return settings["mean"], settings["std"], "timm's for the architecture"
    if arch in torchvision.models.list_models(torchvision.models):
        return *IMAGENET, "torchvision's for the architecture"
    return CENTERED, CENTERED, "assumed"


def make_network(arch, count, weights="none", input_size=IMAGE_SIZE):
    """(network, its (mean, std) where the weights bring them, else None). With torchvision's
    ImageNet weights it has their 1,000 classes, otherwise `count`. Raises UserError."""
    pretrained = is_pretrained(weights)
    if pretrained and not has_imagenet_weights(arch):
        raise UserError(f"There are no ImageNet weights for {arch}.")
    if arch in CIFAR_NETWORKS:
        return cifar.make(arch, count), None
    if is_own(arch):
        made = _of_hub(arch, count) if arch.startswith(HUB) else _of_file(arch, count)
        if not isinstance(made, nn.Module):
            raise UserError(f"{arch} gives a {type(made).__name__}, not a torch.nn.Module.")
        if any(map(nn.parameter.is_lazy, made.parameters())):
            with torch.no_grad():       # layers that take their size from their first input
                made.eval()(torch.zeros(2, 3, input_size, input_size))
            made.train()
        return made, None
    if arch.startswith(TIMM):
        with _said_of(arch):
            import timm
            network = timm.create_model(
                arch.removeprefix(TIMM), pretrained=pretrained, num_classes=count)
        stated = network.pretrained_cfg["mean"], network.pretrained_cfg["std"]
        return network, stated if pretrained else None
    return _of_torchvision(arch, count, weights, input_size)


@contextlib.contextmanager
def _said_of(arch):
    try:
        yield
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{arch} can't be made ({first_line(error)}).") from None


def _of_torchvision(arch, count, weights, input_size):
    base, stated = CIFAR_STEMS.get(arch, arch), None
    if base not in torchvision.models.list_models(torchvision.models):
        raise UserError(f"There is no network {arch}. There are torchvision's classifiers, "
                        f"{', '.join((*CIFAR_STEMS, *CIFAR_NETWORKS))}, timm:NAME, "
                        "hub:OWNER/REPOSITORY:ENTRY, and FILE.py:FACTORY for your own.")
    # Torch's own start. Their special one, with deviations of 0.1, did not learn at any rate.
    options = {"init_weights": False} if base in ("inception_v3", "googlenet") else {}
    pretrained = is_pretrained(weights)
    network = torchvision.models.get_model(
        base, weights=None, num_classes=1000 if pretrained else count, **options)
    if pretrained:
        preset, file, path = _imagenet(arch, weights)
        fetch(file, path)
        fit(network, torch.load(path, weights_only=True, map_location="cpu"), path, base)
        stated = tuple(preset.mean), tuple(preset.std)
    if base == "inception_v3" and input_size < LEAST[base]:
        network.aux_logits, network.AuxLogits = False, None     # it takes no fewer pixels
    if arch in CIFAR_STEMS:
        network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
        network.maxpool = nn.Identity()
    return network, stated


@functools.cache
def timm_settings(arch):
    """{"mean", "std", "input_size", ...} that timm has for a network of its own or of a hub."""
    with _said_of(arch):
        import timm
        settings = timm.get_pretrained_cfg(arch.removeprefix(TIMM))
    return vars(settings) if settings else make_network(arch, 2)[0].pretrained_cfg


def _of_file(arch, count):
    """What the user's function makes. It is given the number of classes as num_classes where it
    takes that, else as the parameter that has no default."""
    path, _, name = arch.rpartition(":")
    factory = getattr(import_file(path), name, None)
    if not callable(factory):
        raise UserError(f"{path} has no function {name}.")
    parameters = inspect.signature(factory).parameters
    required = [each for each in parameters.values() if each.default is each.empty
                and each.kind is each.POSITIONAL_OR_KEYWORD]
    if "num_classes" not in parameters and required:
        return factory(count)
    takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    return factory(num_classes=count) if "num_classes" in parameters or takes_any else factory()


def _of_hub(arch, count):
    repository, _, entry = arch.removeprefix(HUB).rpartition(":")
    load = functools.partial(torch.hub.load, repository, entry, trust_repo=True, verbose=False,
                             source="local" if os.path.isdir(repository) else "github")
    with _said_of(arch):
        try:
            return load(num_classes=count)
        except TypeError as error:
            if "num_classes" not in str(error):
                raise
            return load()       # it takes no number of classes


def _imagenet(arch, weights):
    """(preprocessing, remote file, path in torch's cache) of torchvision's weights."""
    kinds = torchvision.models.get_model_weights(CIFAR_STEMS.get(arch, arch)).__members__
    if weights not in ("imagenet", *kinds):
        raise UserError(f"{arch} has no weights {weights}. It has {', '.join(kinds)}.")
    kind = kinds["DEFAULT" if weights == "imagenet" else weights]
    name = kind.url.rpartition("/")[2]
    file = RemoteFile((kind.url,), sha256=Path(name).stem.rpartition("-")[2])
    return kind.transforms(), file, Path(torch.hub.get_dir()) / "checkpoints" / name
