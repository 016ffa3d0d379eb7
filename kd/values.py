"""Values of settings: parsers of their texts. Each raises Wrong, which argparse shows."""
import functools
import os
import re
from argparse import ArgumentTypeError as Wrong
from pathlib import Path

HUB, HF = "hub:", "hf:"
CIFAR_NETWORKS = (          # kd/cifar.py makes them
    "resnet20", "resnet32", "resnet56", "resnet110", "resnet8x4", "resnet32x4", "wrn_16_2",
    "wrn_40_1", "wrn_40_2", "vgg8_bn", "vgg13_bn_cifar")
# Steps of a recipe of views (kd/augment.py) and their usual strengths.
AUGMENTATIONS = {"crop": 1 / 8, "flip": 0.5, "rrc": 0.25, "rotate": 15.0, "colour": 0.5,
                 "mixup": 1.0, "cutmix": 1.0}
FIXED = ("crop", "flip", "mixup", "cutmix")     # those whose strength can't be given


def name_of(spec):
    """The name in NAME or NAME=PATH."""
    return spec.partition("=")[0]


def name_of_approach(approach):
    """The name of an approach, or of a criterion's file, in the table and the run folder."""
    return Path(approach).stem if approach.endswith(".py") else approach


def is_own(arch):
    """Whether an architecture is code: FILE.py:FACTORY, or hub:OWNER/REPOSITORY:ENTRY."""
    return ".py:" in arch or arch.startswith(HUB)


def has_imagenet_weights(arch):
    return not is_own(arch) and arch not in CIFAR_NETWORKS


def name_of_arch(arch):
    """An architecture, or a path, without its folders."""
    return arch if arch.startswith(("timm:", HUB)) else arch.rpartition("/")[2]


def plain(name):
    """Whether a name may be that of a file and be shown."""
    return bool(name) and name.isprintable() and name == Path(name).name and (
        name[0] not in ".-" and len(name.encode()) <= 180)


def _number(kind, right, what):
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not right(value):
            raise Wrong(f"'{text}' is not {what}")
        return value
    return parse


positive = _number(float, lambda x: 0 < x < float("inf"), "a positive number")
below_one = _number(float, lambda x: 0 <= x < 1, "a number from 0 up to, not including, 1")
share = _number(lambda text: float(text[:-1]) / 100 if text.endswith("%") else float(text),
                lambda x: 0 <= x <= 1, "a share from 0 to 1, as 0.05 or 5%")
count = _number(int, lambda x: 1 <= x <= 10 ** 12, "a positive whole number")
seed = _number(int, lambda x: 0 <= x < 2 ** 32, "a whole number from 0 to 4294967295")
edge = _number(int, lambda x: 1 <= x <= 4096, "a number of pixels from 1 to 4,096")
_per_colour = functools.partial(_number, lambda text: tuple(map(float, text.split(","))))
colour = _per_colour(lambda x: len(x) == 3 and all(0 <= each <= 1 for each in x),
                     "three numbers from 0 to 1, one per colour")
deviation = _per_colour(lambda x: len(x) == 3 and all(0 < each <= 1 for each in x),
                        "three numbers above 0 and up to 1, one per colour")


def threshold(text):
    if text != "published" and not share(text):
        raise Wrong("a threshold of 0 lets nothing pass")
    return text if text == "published" else share(text)


def path(text):
    """An absolute spelling; links stay as they are, so that people recognise their paths."""
    if not text:        # of a shell variable that is not set
        raise Wrong("no path is given")
    return str(Path(os.path.expanduser(text)).absolute())


def data_set_spec(text):
    """NAME; NAME=PATH, made absolute; NAME=hf:REPOSITORY, of which hf:REPOSITORY is short."""
    if text.startswith(HF):
        text = f"{text.removeprefix(HF).rpartition('/')[2]}={text}"
    name, equals, where = text.partition("=")
    if not plain(name) or (equals and not where):
        raise Wrong(f"'{text}' is neither NAME nor NAME=PATH (a comma separates data sets)")
    where = where if where.startswith(HF) else equals and path(where)
    return f"{name}{equals}{where}"


def list_of(item, what):
    """A parser of values joined by commas, each once."""
    def parse(text):
        items = tuple(item(each.strip()) for each in text.split(",") if each.strip())
        names = [name_of_approach(name_of(each)) if isinstance(each, str) else each
                 for each in items]
        if not items or len(set(names)) < len(names):
            raise Wrong(f"the same {what} is given twice" if items else f"no {what} is given")
        return items
    return parse


def approach(text):
    """The name of an approach, or the absolute path of a file with a criterion."""
    return path(text) if text.endswith(".py") else text


def arch(text):
    file, _, factory = text.rpartition(":")
    return f"{path(file)}:{factory}" if file.endswith(".py") else text


def is_pretrained(weights):
    """Whether they are ImageNet's: "imagenet", or a name that torchvision has for its own."""
    return bool(re.fullmatch(r"imagenet|DEFAULT|IMAGENET1K_\w+", weights))


def is_file(weights):
    return weights not in ("none", "teacher", "auto") and not is_pretrained(weights)


def weights(text):
    return text if text == "none" or is_pretrained(text) else path(text)


def student_weights(text):
    return text if text in ("teacher", "auto") else weights(text)


def augmentations(text):
    """{name: strength} of "none", or of AUGMENTATIONS joined by commas, NAME or NAME:STRENGTH."""
    found = {}
    for part in text.split(",") if text != "none" else ():
        name, colon, strength = part.partition(":")
        if name in found or name not in AUGMENTATIONS:
            raise Wrong(f"'{text}' is neither none nor some of {','.join(AUGMENTATIONS)}")
        most = {"rotate": 180, "colour": 5}.get(name, 1)
        if colon and (name in FIXED or positive(strength) > most):
            raise Wrong(f"'{name}:{strength}' is not a strength of {name}")
        found[name] = float(strength) if colon else AUGMENTATIONS[name]
    return found


def augment(text):
    augmentations(text)
    return text


def classes(text):
    """Names of classes, the lines of a file; or how many."""
    if text.isdecimal():
        if not 2 <= int(text) <= 10 ** 6:
            raise Wrong(f"{text} is not a number of classes")
        return int(text)
    try:
        content = Path(text).read_text("utf-8-sig")
    except (OSError, ValueError):
        raise Wrong(f"'{text}' is neither a number nor a UTF-8 file with one class per line"
                    ) from None
    if content.lstrip()[:1] in ("[", "{"):
        raise Wrong(f"{text} is JSON: give a file with one class per line")
    seen, unique = {}, []       # ImageNet has two cranes: the second becomes "crane (2)"
    for name in filter(None, map(str.strip, content.splitlines())):
        seen[name] = seen.get(name, 0) + 1
        unique.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    if len(unique) < 2:
        raise Wrong(f"{text} names fewer than two classes")
    return tuple(unique)
