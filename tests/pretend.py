"""A CUDA or mps device on a machine that has none: what is computed there is computed on the CPU,
and what a card would refuse, corrupt or wait for is noticed.

A tensor on it says `cuda:0` or `mps`, C++ takes it for one on `meta`, and its values lie in a CPU
tensor. Refused, as a `Misplaced`: a CPU tensor beside tensors on the device, a CPU generator,
.numpy(), float64 on mps, an asynchronous copy from memory that is not pinned. On "cuda", matrix
products and convolutions have the 10-bit mantissas of TF32 where that is allowed.
"""
import functools
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only

from kd import engine

aten = torch.ops.aten
WAITING = {aten._local_scalar_dense, aten.item, aten.is_nonzero, aten.nonzero, aten.equal}
PRODUCTS = {aten.convolution, aten.convolution_backward, aten.conv2d, aten.linear, aten.mm,
            aten.addmm, aten.bmm, aten.matmul}
COPIES = {aten._to_copy, aten.to, aten.copy_}


class Misplaced(Exception):
    """What a device would refuse or spoil."""


class OnDevice(torch.Tensor):
    """values: what it holds, a CPU tensor."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values, card):
        if card.device.type == "mps" and values.dtype in (torch.float64, torch.complex128):
            raise Misplaced(f"{values.dtype} on mps")
        with torch.inference_mode(False):
            made = torch.Tensor._make_wrapper_subclass(
                cls, values.shape, values.stride(), values.storage_offset(), dtype=values.dtype,
                device="meta")
        made.values, made.card = values, card
        return made

    @classmethod
    def __torch_dispatch__(cls, function, *_):
        raise Misplaced(f"{function} of a tensor on the device, outside of its Card")

    device = property(lambda self: self.card.device)
    is_cuda = property(lambda self: self.card.device.type == "cuda")
    is_mps = property(lambda self: self.card.device.type == "mps")
    is_meta = is_cpu = property(lambda self: False)

    def numpy(self, **_):
        raise Misplaced(".numpy() of a tensor on the device")

    def __array__(self, *_, **__):
        self.numpy()

    def tolist(self):
        self.card.seen["wait"] += 1
        return self.values.tolist()

    def __reduce_ex__(self, protocol):
        self.card.seen["wait"] += 1
        return self.values.detach().__reduce_ex__(protocol)


class _Names(TorchFunctionMode):
    """C++ would look for a card where the device has the name of one."""

    def __init__(self, device):
        self.device = device

    def __torch_function__(self, function, types, args=(), kwargs=None):
        def meant(value):
            named = isinstance(value, str) and value.partition(":")[0] == self.device.type
            return torch.device("meta") if named or value == self.device else value
        if function is torch.device:
            return function(*args, **(kwargs or {}))
        plain = (str, torch.device)
        return function(*tree_map_only(plain, meant, args),
                        **tree_map_only(plain, meant, kwargs or {}))


class Card(TorchDispatchMode):
    """The device itself; within it, tensors can be put there. seen: Counter of what happens: "wait"
    of the host, "copy" to the device, "product" in full float32 or "TF32"."""

    def __init__(self, kind):
        super().__init__()
        self.device = torch.device("cuda", 0) if kind == "cuda" else torch.device(kind)
        self.names, self.seen, self.pinned = _Names(self.device), Counter(), {}

    def __enter__(self, *_):
        self.names.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.names.__exit__(*error)

    def __deepcopy__(self, memo):
        return self

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        packet, kwargs = function.overloadpacket, dict(kwargs or {})
        flat = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, torch.Tensor)]
        here = any(isinstance(each, OnDevice) for each in flat)
        if packet is aten.is_pinned:
            return not here and args[0].untyped_storage().data_ptr() in self.pinned
        if packet is aten._pin_memory:
            copied = args[0].clone()
            self.pinned[copied.untyped_storage().data_ptr()] = copied
            return copied
        if packet is aten.to:       # in inference mode, where nothing is decomposed
            names = [each.name for each in function._schema.arguments]
            kwargs |= dict(zip(names[1:], args[1:], strict=False))
            args = args[:1]
        to = kwargs.get("device")
        goes = to is not None and torch.device(to).type == "meta"
        if to is not None:
            kwargs["device"] = "cpu"
        if not here and not goes:
            return function(*args, **(kwargs if to is None else kwargs | {"device": to}))
        self._check(packet, flat, here, kwargs)
        if packet in COPIES:
            self._copy(packet, args, kwargs, goes)
        elif packet in WAITING or packet is aten.index and any(
                each is not None and each.dtype == torch.bool for each in args[1]):
            self.seen["wait"] += 1
        result_here = goes or here and to is None
        if packet is aten.copy_:
            result_here = isinstance(args[0], OnDevice)
        return self._compute(function, packet, args, kwargs, result_here)

    def _check(self, packet, flat, here, kwargs):
        beside = [each for each in flat if not isinstance(each, OnDevice) and each.dim()]
        if here and beside and packet not in COPIES:
            raise Misplaced(f"{packet}: a CPU tensor beside tensors on the device")
        if kwargs.pop("generator", None) is not None:
            raise Misplaced(f"{packet}: a CPU generator draws on the device")

    def _copy(self, packet, args, kwargs, goes):
        source, target = (args[1], args[0]) if packet is aten.copy_ else (args[0], None)
        source_here = isinstance(source, OnDevice)
        target_here = isinstance(target, OnDevice) if target is not None else (
            goes or source_here and "device" not in kwargs)
        if source_here == target_here or not source.dim() and not source_here:
            return
        freely = kwargs.get("non_blocking") or packet is aten.copy_ and len(args) > 2 and args[2]
        if freely and (source_here or source.untyped_storage().data_ptr() not in self.pinned):
            raise Misplaced("an asynchronous copy of memory that is not pinned")
        if target_here:
            self.seen["copy"] += 1
        if not freely:
            self.seen["wait"] += 1

    def _compute(self, function, packet, args, kwargs, result_here):
        owners = {}

        def inner(value):
            owners[id(value.values)] = value
            return value.values
        args, kwargs = tree_map_only(OnDevice, inner, (args, kwargs))
        if packet in PRODUCTS and self.device.type == "cuda":
            allowed = (torch.backends.cudnn.allow_tf32 if "conv" in str(packet) else
                       torch.backends.cuda.matmul.allow_tf32)
            self.seen["TF32" if allowed else "product"] += 1
            args = tree_map_only(torch.Tensor, rounded, args) if allowed else args
        found = function(*args, **kwargs)

        def outer(value):
            if not isinstance(value, torch.Tensor) or not result_here:
                return value
            return owners[id(value)] if id(value) in owners else OnDevice(value, self)
        return tree_map(outer, found)


def rounded(tensor):
    """As TF32 has it: a mantissa of 10 bits."""
    return ((tensor.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def begin(kind, monkeypatch):
    """Has this process believe that it has such a device. Returns the Card, within which it has."""
    card, load = Card(kind), torch.load
    settings = {"is_available": lambda: True, "device_count": lambda: 1,
                "current_device": lambda: 0, "get_device_name": lambda: "pretended",
                "mem_get_info": lambda _=None: (1 << 33, 1 << 34),
                "is_bf16_supported": lambda *_, **__: False,
                "default_generators": [SimpleNamespace(manual_seed=lambda seed: None)]}
    for name, value in settings.items() if kind == "cuda" else ():
        monkeypatch.setattr(torch.cuda, name, value)
    if kind == "mps":
        monkeypatch.setattr(torch.backends.mps, "is_available", functools.cache(lambda: True))
        monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 1 << 33)
        monkeypatch.setattr(torch.mps, "manual_seed", lambda seed: None)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(engine, "ThreadPoolExecutor",       # a mode is that of its thread
                        functools.partial(ThreadPoolExecutor, initializer=card.__enter__))
    monkeypatch.setattr(torch, "load", lambda file, map_location=None, **more: tree_map_only(
        torch.Tensor, lambda value: value.to(map_location), load(file, **more)))
    monkeypatch.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)
    return card
