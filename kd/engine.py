"""The device, and the one evaluation.

Images stay uint8 until they are on the device; nothing here loops over images or waits for the
device within a step."""
import collections
import contextlib
import ctypes
import itertools
import random
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import nn

from kd.augment import to_device
from kd.files import UserError, say
from kd.packing import release_pages
from kd.processes import gathered, own_card, share_of, world_size
from kd.progress import Progress

CPU = torch.device("cpu")
EVALUATION_BATCH = 512      # images of up to 96 pixels (CUDA: 160); fewer where they are larger
BLOCK = 32                  # batches whose answers wait on the device to be copied
PREFETCHED = 2              # batches that wait on the device, where the images stay on the CPU


def pick_device(name, amp=None):
    """torch.device for "auto", "cpu", "cuda" or "mps". Raises UserError where it isn't there.
    amp: whether bfloat16 was asked for, of which a CPU without instructions for it is warned."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(),
                 # gloo carries none of its tensors
                 "mps": torch.backends.mps.is_available() and world_size() == 1}
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if available[kind])
    if not available[name]:
        raise UserError(f"--device {name}: no {name.upper()} device found, or PyTorch was built "
                        f"without {name.upper()}.")
    if name == "cpu":
        keep_memory()
        if amp and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2"):
            say("--amp: this CPU has no instructions for bfloat16, which takes many times as long "
                "as float32. Leave --amp out, or use --no-amp.")
    device = own_card() if name == "cuda" else torch.device(name)
    say(f"device: {device}")
    return device


def keep_memory():
    """Has glibc keep what is freed. Otherwise each step may give the memory of its gradients back
    to the system and pay for the pages again, which costs up to a tenth of a step."""
    with contextlib.suppress(AttributeError, TypeError):        # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 1 << 25)            # M_MMAP_THRESHOLD, at its highest
        mallopt(-1, (1 << 31) - 1)      # M_TRIM_THRESHOLD


def in_bfloat16(device, amp=None):
    """Whether training computes in it: `amp`; None: on CUDA devices that do so themselves. Older
    ones emulate it, slowly; so do most CPUs."""
    return amp if amp is not None else (
        device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False))


def autocast(device, amp=None):
    return torch.autocast(device.type, torch.bfloat16, enabled=in_bfloat16(device, amp))


def cast_once(network):
    """The network with the weights in bfloat16 that autocast would cast in every call."""
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.bfloat16()
    return network


def allow_tf32(allowed):
    """Training may use the 10-bit mantissas of TF32, and whatever convolutions cuDNN finds to be
    the fastest; scores that decide a selection may not."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
    torch.backends.cudnn.benchmark = allowed


def seed_for(seed, purpose):
    """A seed of its own for each purpose, so that no stage depends on which ran before it."""
    return zlib.crc32(f"{seed}/{purpose}".encode())


def seed_all(number, device=CPU):
    """Seeds what draws without a generator: Python's, numpy's and torch's numbers. Not by
    torch.manual_seed: without CUDA it remembers every call, for later."""
    random.seed(number)
    np.random.seed(number)
    torch.default_generator.manual_seed(number)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(number)
    elif device.type == "mps":
        torch.mps.manual_seed(number)


def resident(images, device):
    """A uint8 array as a tensor: on the device where it takes less than half of the free memory."""
    with warnings.catch_warnings():     # a map that may be written needs as much memory as it has
        warnings.simplefilter("ignore")
        tensor = torch.from_numpy(images) if isinstance(images, np.ndarray) else images
    if device.type == "cpu":
        return tensor
    if device.type == "cuda":       # and what torch keeps of what it no longer uses
        memory = torch.cuda.mem_get_info(device)[0] + (
            torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    else:
        memory = torch.mps.recommended_max_memory()
    return tensor if tensor.nbytes > memory / 2 else tensor.to(device)


def prefetched(batches, device):
    """Yields CPU tensors on the device; another thread makes and sends the next ones meanwhile."""
    if device.type == "cpu":
        yield from batches
        return
    coming, waiting = (to_device(batch, device) for batch in batches), collections.deque()
    with ThreadPoolExecutor(1) as pool:
        waiting.extend(pool.submit(next, coming, None) for _ in range(PREFETCHED))
        while (ready := waiting.popleft().result()) is not None:
            waiting.append(pool.submit(next, coming, None))
            yield ready


@contextlib.contextmanager
def enough_memory(label, device, remedy):
    """Within it, memory that does not suffice is one sentence."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        said = str(error)
        if not isinstance(error, MemoryError) and not any(sign in said for sign in (
                "out of memory", "can't allocate memory", "ALLOC_FAILED", "ALLOCATION_FAILED",
                "CUBLAS_STATUS_NOT_INITIALIZED")):
            raise
        where = "out of memory" if device.type == "cpu" else "out of device memory"
        raise UserError(f"{label}: {where}. {remedy}") from None


# ---- Evaluation ----------------------------------------------------------------------------------

def evaluation_batch(classifier):
    """Images of a batch that is only answered."""
    edge = 160 if classifier.scale.device.type == "cuda" else 96
    return max(16, round(EVALUATION_BATCH * min(1.0, edge / classifier.input_size) ** 2))


@torch.inference_mode()
def answered(classifier, batches, device, then):
    """Yields then(logits), a tuple of tensors on the device, for each of `batches`, (n, H, W, 3)
    uint8 tensors. In eval mode, true float32: scores are compared with thresholds."""
    classifier.eval()
    allow_tf32(False)
    for pixels in prefetched(batches, device):
        yield then(classifier(pixels))


def columns_of(classifier, batches, device, then, label, total):
    """The columns that then(logits) makes of all batches, as in `answered`: [(N, ...) array]. Of
    several processes all return those of all, one process after the other.

    total: images in the batches, at most. Each column is made once, so that ten million images are
    held a single time."""
    progress, columns, done = Progress(label, total), [], 0
    coming = answered(classifier, batches, device, then)
    size = 1 if device.type == "cpu" else BLOCK
    remedy = "Use a smaller network, or --device cpu."
    with enough_memory(label, device, remedy), contextlib.closing(progress):
        while block := list(itertools.islice(coming, size)):       # each copy waits for the device
            values = [torch.cat(column).cpu().numpy() for column in zip(*block, strict=True)]
            start, done = done, done + len(values[0])
            columns = columns or [np.empty((total, *value.shape[1:]), value.dtype)
                                  for value in values]
            for column, value in zip(columns, values, strict=True):
                column[start:done] = value
            progress.update(done - start)
    parts = [part for part in gathered([column[:done] for column in columns]) if part]
    return parts[0] if len(parts) == 1 else [
        np.concatenate(column) for column in zip(*parts, strict=True)]


def predict(classifier, images, rows=None, device=CPU, label="evaluating",
            then=lambda logits: (logits,)):
    """The only column, (n, ...), that then(logits) makes of images, on the CPU: their logits,
    (n, C) float32, unless another `then` is given.

    images: (N, H, W, 3) uint8, array or tensor. rows: (n,) int64, default all. Of several
    processes each answers for a part of the batches, which are those of one process, and all
    return the whole."""
    tensor = resident(images, device)
    rows = torch.arange(len(images)) if rows is None else torch.as_tensor(rows)
    batches = rows.split(evaluation_batch(classifier))
    batches = batches[share_of(len(batches))]

    def picked():
        for batch in batches:
            yield tensor[batch.to(tensor.device)]
            release_pages(images)
    column, = columns_of(classifier, picked(), device, then, label, sum(map(len, batches)))
    return torch.from_numpy(column)


def answers(classifier, images, rows=None, device=CPU):
    """The class with the largest logit of each image, (n,) int64."""
    found = predict(classifier, images, rows, device, then=lambda logits: (logits.argmax(1),))
    return found.numpy()


def accuracy(classifier, images, labels, rows=None, device=CPU):
    """Share of images, in [0, 1], that get their label. labels: (N,) int64 of all images."""
    found = answers(classifier, images, rows, device)
    return float((found == (labels if rows is None else labels[rows])).mean())
