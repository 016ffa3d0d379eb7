"""The processes that torchrun started: which one this is, and what they do together.

The first one fetches, packs, writes and speaks. Nothing times out while it does: torchrun ends all
of them when one dies.
"""
import contextlib
import datetime
import functools
import gc
import os
import warnings

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from kd.files import UserError, working_alone
from kd.values import is_own


def start_processes():
    """Joins the processes that torchrun started."""
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    distributed.init_process_group(backend, timeout=datetime.timedelta(days=30))


def own_card():
    """This process's CUDA device. Raises UserError where there are fewer than processes."""
    if world_size() == 1:
        return torch.device("cuda", torch.cuda.current_device())
    number, cards = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if working_here() > cards:
        raise UserError("--device cuda: torchrun started more processes on this machine than it "
                        f"has CUDA devices. Use --nproc-per-node {cards}, or --device cpu.")
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def end_processes():
    """Leaves the others once all have come here: an interpreter that ends while their threads work
    may be aborted."""
    gc.collect()        # networks that DistributedDataParallel holds in a circle
    wait()
    distributed.destroy_process_group()


@contextlib.contextmanager
def alone():
    """Within it this process works as if it were the only one, and makes what that one would."""
    working_alone.append(True)
    try:
        yield
    finally:
        working_alone.pop()


def _together():
    return distributed.is_initialized() and not working_alone


def rank():
    return distributed.get_rank() if _together() else 0


def world_size():
    return distributed.get_world_size() if _together() else 1


def wait():
    """Until every process has come here."""
    if _together():
        distributed.all_reduce(torch.zeros(1))      # on the CPU: nccl's barrier keeps the card busy


def on_all_ranks(stage):
    """A function that every process leaves only when the first one has written what it makes."""
    @functools.wraps(stage)
    def waiting(*args, **kwargs):
        made = stage(*args, **kwargs)
        wait()
        return made
    return waiting


def working_here():
    """Processes of this machine that work now: while the first one does alone, the others wait."""
    return 1 if working_alone else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def first_alone(make):
    """make() in the first process, then in the others, which find on disk what it put there."""
    if rank():
        wait()
        return make()
    with alone():
        made = make()
    wait()
    return made


def gathered(value):
    """[value of each process], in each."""
    values = [value] * world_size()
    if _together():
        distributed.all_gather_object(values, value)
    return values


def share_of(count):
    """The slice of `count` things that is this process's."""
    return slice(rank() * count // world_size(), (rank() + 1) * count // world_size())


def summed(tensor):
    """The sum of this tensor over all processes."""
    if _together():
        tensor = tensor.clone()
        distributed.all_reduce(tensor)
    return tensor


def shared(network, device):
    """The network whose gradients are the mean over all processes."""
    if world_size() == 1:
        return network
    devices = [device] if device.type == "cuda" else None
    with warnings.catch_warnings():     # torch 2.14 has another name for broadcast_buffers
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(network, devices, gradient_as_bucket_view=True,
                                       broadcast_buffers=False,
                                       find_unused_parameters=is_own(network.arch))


def share_buffers(*networks):
    """Gives every process the batch statistics of the first one, which saves."""
    for network in dict.fromkeys(networks) if world_size() > 1 else ():     # a set has no order
        for buffer in network.buffers():
            distributed.broadcast(buffer, 0)
