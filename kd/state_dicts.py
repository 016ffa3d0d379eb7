"""State dicts of any origin: files read without running what is in them, keys fitted to a network.

A checkpoint holds the weights under some key ("state_dict", "model", ...), their names start with
something ("module.", "model.", ...), and beside them lies what nobody needs. All of that is one
question here: below which prefix do the network's own names lie?
"""
import collections
import pickle
import re
import warnings
from pathlib import Path

import torch

from kd.files import UserError, listed, say_once

OURS = {"arch", "classes", "input_size", "mean", "std", "state_dict"}      # in our checkpoints
REMEDY = "Where it was made, use torch.save(network.state_dict(), FILE)"
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# Counters of profilers and of averages; the state of a loss or a metric.
LEFT_OUT = re.compile(r"(^|\.)(total_ops|total_params|n_averaged)$|^\w*(criterion|loss|metric)")


# ---- Reading -------------------------------------------------------------------------------------

class StandIn(list):
    """In place of what a class named in a file would make. It takes all that a file does to it."""

    def __init__(self, *args):
        super().__init__()

    def __setstate__(self, state):
        pass


class DictStandIn:
    """The same for what a file fills as a dict."""

    def __new__(cls, *args):
        return collections.OrderedDict()


def weights_file(path):
    """The file of the weights: `path`, or in a folder of a hub its model.safetensors."""
    file = Path(path) / "model.safetensors"
    return file if file.is_file() else Path(path)


def read_file(path):
    """What a file holds, on the CPU: tensors, plain types, and StandIns for all else. Nothing in it
    is run. Raises UserError where it can't be read so."""
    file = weights_file(path)
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file
            return load_file(file)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _unpickled(file)
    except Exception as error:      # what a damaged file makes readers raise is of every kind
        said = str(error).rpartition("WeightsUnpickler error:")[2].strip() or repr(error)
        reason = ("no such file" if not file.exists() else
                  "a folder without model.safetensors" if file.is_dir() else
                  "pip install safetensors" if isinstance(error, ImportError) else
                  f"{said.splitlines()[0][:120]}. {REMEDY}")
        raise UserError(f"{path} can't be read as tensors and plain types: {reason}.") from None


def _unpickled(file):
    """torch.load, restricted to tensors and plain types. What else the file names gets a stand-in
    of that name, so that nothing is imported or called."""
    made = {}       # {name: its stand-in}
    while True:
        try:
            with torch.serialization.safe_globals(list(made.values())):
                return torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            unknown = re.search(r"GLOBAL (\S+) was not an allowed global", str(error))
            filled = re.search(r"Can only SETITEM.* but got <class '(\S+)'>", str(error))
            if not (unknown or filled):
                raise
            name, base = (unknown[1], StandIn) if unknown else (filled[1], DictStandIn)
            if name in made and issubclass(made[name], base):
                raise
            module, _, qualified = name.rpartition(".")
            made[name] = type(qualified, (base,), {"__module__": module or "builtins"})


def is_ours(content):
    """Whether a file's content is a checkpoint of this project."""
    return isinstance(content, dict) and content.keys() >= OURS and (
        isinstance(content["input_size"], int))


# ---- Fitting -------------------------------------------------------------------------------------

def tensors_of(content, at=""):
    """Yields (keys joined by dots, tensor) of the tensors in dicts within dicts."""
    for key, value in content.items() if isinstance(content, dict) else ():
        if isinstance(value, torch.Tensor):
            yield _bare(f"{at}{key}"), value
        else:
            yield from tensors_of(value, f"{at}{key}.")


def _bare(key):
    """A name without what wraps modules, and as torchvision renames those of its old DenseNets and
    vision transformers."""
    key = ".".join(part for part in key.split(".") if part not in WRAPPERS)
    for old, new in (("1", "0"), ("2", "3")):
        key = re.sub(rf"((?:^|\.)mlp\.)linear_{old}(?=\.)", rf"\g<1>{new}", key)
    return re.sub(r"(denselayer\d+\.(?:norm|conv))\.(?=[12]\.)", r"\1", key)


def _prefixes(theirs, ours):
    """The prefixes of names in `theirs` {name: tensor} below which the most of `ours` {name: shape}
    lie and the least else, but for whole copies of the network; plain weights come before averages
    of them."""
    matches = collections.Counter()
    for key, value in theirs.items():
        for start in (0, *(dot.end() for dot in re.finditer(r"\.", key))):
            if key[start:] in ours:
                matches[key[:start]] += 1 + (ours[key[start:]] == value.shape)
    whole = [prefix for prefix, found in matches.items() if found == 2 * len(ours)]
    for prefix in matches:
        copies = tuple(each for each in whole if each.startswith(prefix) and each != prefix)
        rest = (key.removeprefix(prefix) for key in theirs
                if key.startswith(prefix) and not key.startswith(copies))
        matches[prefix] -= sum(key not in ours and not LEFT_OUT.search(key) for key in rest)
    best = max(matches.values(), default=0)
    tied = [prefix for prefix in matches if matches[prefix] == best] or [""]
    return sorted(tied, key=lambda prefix: (bool(re.search("ema|av(era)?g|swa", prefix.lower())),
                                            "teacher" not in prefix))


def fit(network, content, path, arch):
    """Loads a file's weights. Raises UserError that names the keys that do not fit."""
    expected = network.state_dict()
    names = {_bare(name): name for name in expected}
    theirs = {key: value for key, value in tensors_of(content) if not key.startswith("optim")}
    prefix, *others = _prefixes(theirs, {key: expected[names[key]].shape for key in names})
    state, copies = collections.OrderedDict(), tuple(
        each for each in others if each.startswith(prefix))
    for key, value in theirs.items():
        rest = key.removeprefix(prefix)
        if key.startswith(prefix) and not key.startswith(copies) and (
                rest in names or not LEFT_OUT.search(rest)):
            state[names.get(rest, rest)] = value
    state._metadata = expected._metadata        # the versions of its layers
    wrong = _misfits(network, state) if theirs else f"it holds no state dict. {REMEDY}"
    if wrong:
        raise UserError(f"{path} does not fit {arch}: {wrong}. It needs the network and the "
                        "classes that it was saved with.")
    if prefix or others:
        where = f"under '{prefix[:-1]}'" if prefix else "on top"
        beside = f", not those under {listed([repr(other[:-1]) for other in others])}"
        say_once(f"{path}: the weights {where} are used{beside * bool(others)}.")


def _misfits(network, state):
    """Loads what fits; what does not, in words."""
    ours, has_auxiliary = network.state_dict(), hasattr(network, "aux_logits")
    for name in [name for name, value in state.items() if has_auxiliary and "aux" in name.lower()
                 and name in ours and value.shape != ours[name].shape]:
        del state[name]     # of an auxiliary head for other classes, which is left out below
    try:        # the network may rename or reshape what it is given
        lacks, beyond = network.load_state_dict(state, strict=False)
    except RuntimeError as error:       # of other shapes; below a heading
        return "; ".join(line.strip(" \t.") for line in str(error).splitlines()[1:4])
    if has_auxiliary:       # auxiliary heads have no part in an answer
        for name in {name.partition(".")[0] for name in lacks if "aux" in name.lower()}:
            setattr(network, name, None)
            network.aux_logits = False
        lacks, beyond = ([name for name in names if "aux" not in name.lower()]
                         for names in (lacks, beyond))
    wrong = {"missing keys": [name for name in lacks if not name.endswith("num_batches_tracked")],
             "unexpected keys": beyond}
    return "; ".join(f"{what} {listed(names, 3)}" for what, names in wrong.items() if names)
