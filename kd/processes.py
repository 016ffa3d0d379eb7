"""The processes that torchrun started: which one this is, and what they do together.

The first one fetches, packs, writes and speaks. Nothing times out while it does: torchrun ends all
of them when one dies.
"""
import contextlib
import datetime
import functools
import os

import torch
from torch import distributed

from kd.files import UserError, working_alone


def start_processes():
    """Joins the processes that torchrun started."""
    absent = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
              if name not in os.environ]
    if absent:
        raise UserError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but there is no "
                        f"{' and no '.join(absent)}. Start several processes with torchrun, or "
                        "unset WORLD_SIZE.")
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo",
                                   timeout=datetime.timedelta(days=30))


def end_processes():
    """Leaves the others once all have come here: an interpreter that ends while their threads work
    may be aborted."""
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


def first_alone(make):
    """make() in the first process, then in the others, which find on disk what it put there."""
    if rank():
        wait()
        return make()
    made = make()
    wait()
    return made


def gathered(value):
    """[value of each process], in each."""
    values = [value] * world_size()
    if _together():
        distributed.all_gather_object(values, value)
    return values


def share_of(count, part=None):
    """The contiguous part of `count` things that is this process's: (start, stop).

    part: (rank, world size), default this process's.
    """
    number, processes = part or (rank(), world_size())
    return number * count // processes, (number + 1) * count // processes


def agreed(*numbers):
    """The largest of each of these numbers that any process has."""
    if not _together():
        return list(numbers)
    found = torch.tensor(numbers, dtype=torch.int64)
    distributed.all_reduce(found, distributed.ReduceOp.MAX)
    return found.tolist()


def summed(tensor):
    """The sum of this tensor over all processes."""
    if _together():
        tensor = tensor.clone()
        distributed.all_reduce(tensor)
    return tensor
