"""The one training loop, the one evaluation, and the device they run on.

Images stay uint8 until they are on the device; nothing here loops over images or waits for the device
within a step.
"""
import collections
import contextlib
import ctypes
import datetime
import functools
import io
import math
import os
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from data import augment, epoch_generator, shuffled_batches
from packing import release_pages
from run import Progress, UserError, write_atomically

AUXILIARY_WEIGHT = 0.4      # of an auxiliary head's loss, as in Inception (Szegedy et al. 2015)
EVALUATION_BATCH = 512      # images, of up to 96 pixels; fewer where they are larger
READ_AT_ONCE = 100_000_000  # bytes of a memory-mapped array that may lie in memory
PREFETCHED = 2              # batches that wait on the device, where the images stay on the CPU
COMPILING_PAYS = 300.0      # seconds of training left, on CUDA, from which torch.compile earns back the minute that it takes
COMPILER = "inductor"
SAVE_INTERVAL = 20.0        # seconds of training after which the end of an epoch is worth a checkpoint


def pick_device(name):
    """torch.device for "auto", "cpu", "cuda" or "mps". Raises UserError where it isn't there."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if available[kind])
    if not available[name]:
        raise UserError(f"--device {name}: this machine, or this build of torch, has none")
    if name == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if name == "cpu":
        keep_memory()
    return torch.device(name, torch.cuda.current_device()) if name == "cuda" else torch.device(name)


def keep_memory():
    """Has glibc keep what is freed. Else every step may give the memory of its gradients back to the system and pay for the pages of it
    again, which costs up to a tenth of a step, depending on what happens to lie above it."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):        # another C library
        return
    mallopt(-3, 1 << 25)            # M_MMAP_THRESHOLD, at its highest
    mallopt(-1, (1 << 31) - 1)      # M_TRIM_THRESHOLD


# --------------------------------------------------------------------------------------------------
# Processes
# --------------------------------------------------------------------------------------------------

def start_processes():
    """Joins the processes that torchrun started. Nothing times out: they wait while the first one fetches, packs and writes,
    and torchrun ends them all when one dies."""
    absent = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if absent:
        raise UserError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']} and {', '.join(absent)} not set: start several processes with torchrun, or unset WORLD_SIZE")
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=datetime.timedelta(days=30))


def end_processes():
    """Leaves the others once all have come here: an interpreter that ends with their threads at work may be aborted."""
    wait()
    distributed.destroy_process_group()


def process():
    """(number of this process, how many there are)."""
    return (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)


def wait():
    """Until every process has come here."""
    if distributed.is_initialized():
        distributed.all_reduce(torch.zeros(1))      # on the CPU: a barrier of nccl would keep the device busy


def together(stage):
    """A function that every process leaves only when the first one has written what it makes."""
    @functools.wraps(stage)
    def waiting(*args, **kwargs):
        made = stage(*args, **kwargs)
        wait()
        return made
    return waiting


def first_alone(make):
    """make() in the first process, then in the others, which find on disk what it put there."""
    if process()[0]:
        wait()
        return make()
    made = make()
    wait()
    return made


def gathered(value):
    """[value of each process], in each."""
    values = [value]
    if distributed.is_initialized():
        values = [None] * process()[1]
        distributed.all_gather_object(values, value)
    return values


def share_of(count):
    """The part of `count` things, one after the other, that is this process's: (start, stop)."""
    number, processes = process()
    return number * count // processes, (number + 1) * count // processes


def compiling_pays(device, seconds):
    """Whether the steps of the `seconds` that a training will still take should be compiled."""
    return device.type == "cuda" and seconds > COMPILING_PAYS


def compiled(network):
    """The same network for the steps to come; where the compiler fails, as it came."""
    torch._dynamo.config.suppress_errors = True
    return torch.compile(network, backend=COMPILER)


def autocast(device):
    """bf16 on CUDA; nothing elsewhere (on the CPUs measured, bf16 is slower)."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()


def seed_for(seed, purpose):
    """A seed of its own for each purpose, so that no stage depends on which stages ran before it."""
    return zlib.crc32(f"{seed}/{purpose}".encode())


def to_device(images, device):
    """A packed array as a uint8 tensor: on the device when it takes less than half of its memory, else on the CPU."""
    tensor = torch.from_numpy(images)
    if device.type == "cpu":
        return tensor
    memory = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else torch.mps.recommended_max_memory()
    if tensor.nbytes > memory / 2:
        return tensor
    resident, chunk = torch.empty(tensor.shape, dtype=tensor.dtype, device=device), max(1, READ_AT_ONCE // max(1, tensor[:1].nbytes))
    for start in range(0, len(tensor), chunk):
        resident[start:start + chunk] = tensor[start:start + chunk].to(device)
        release_pages(images)
    return resident


def batch_of(images, rows, device):
    """images[rows] on the device. images: (N, H, W, 3) uint8 tensor; rows: (n,) int64."""
    picked = images[rows.to(images.device)]
    if picked.device.type != device.type:
        picked = (picked.pin_memory() if device.type == "cuda" else picked).to(device, non_blocking=True)
    return picked


def batches_of(images, batches, device):
    """Yields images[rows] on the device for each of `batches`. Where the images stay on the CPU, the next batch is picked, pinned
    and sent by another thread while the device is busy with this one."""
    if images.device.type == device.type:
        yield from (batch_of(images, rows, device) for rows in batches)
        return
    with ThreadPoolExecutor(1) as pool:
        coming = collections.deque(pool.submit(batch_of, images, rows, device) for rows in batches[:PREFETCHED])
        for rows in [*batches[PREFETCHED:], *[None] * len(coming)]:
            ready = coming.popleft().result()
            if rows is not None:
                coming.append(pool.submit(batch_of, images, rows, device))
            yield ready


# --------------------------------------------------------------------------------------------------
# Evaluation
# --------------------------------------------------------------------------------------------------

@torch.inference_mode()
def predict(classifier, images, rows=None, device=torch.device("cpu"), label="evaluating", then=None, shared=True):
    """Logits of images, in eval mode, without gradients, in float32: scores are compared with thresholds, so that
    the coarser numbers of autocast would not do.

    images: (N, H, W, 3) uint8, array or tensor. rows: (n,) int64, default all. Returns (n, C) float32 on the
    CPU; with `then`, a function of a batch's logits (B, C) on the device that gives a tuple of tensors
    (B, ...), returns those over all images instead, so that nothing larger than they are is kept. Of several processes each
    answers for a part and all return the whole; with shared=False each answers for images of its own.
    """
    classifier.eval()
    tensor = images if isinstance(images, torch.Tensor) else to_device(images, device)
    rows = torch.arange(len(images)) if rows is None else torch.as_tensor(rows)
    then = then or (lambda logits: (logits,))
    columns, unreleased = None, 0
    batches = rows.split(max(16, round(EVALUATION_BATCH * min(1.0, 96 / classifier.input_size) ** 2)))
    first, last = share_of(len(batches)) if shared else (0, len(batches))       # the batches are those of a single process, so that the logits are, to the bit
    done = sum(map(len, batches[:first]))
    progress = Progress(label, sum(map(len, batches[first:last])))
    mine = batches[first:last] or batches[:1]       # with nothing to do, one batch still says what is made
    for batch, pixels in zip(mine, batches_of(tensor, mine, device)):
        values = then(classifier(pixels))
        if columns is None:
            columns = tuple(torch.zeros((len(rows), *value.shape[1:]), dtype=value.dtype) for value in values)
        if first == last:
            break
        for column, value in zip(columns, values):
            column[done:done + len(batch)] = value
        done += len(batch)
        progress.update(len(batch))
        unreleased += len(batch) * tensor[:1].nbytes
        if unreleased > READ_AT_ONCE:
            release_pages(images)
            unreleased = 0
    progress.close()
    if shared and distributed.is_initialized():     # each has zeros where the others have their answers
        for column in columns:
            distributed.all_reduce(column)
    return columns if len(columns) > 1 else columns[0]


def accuracy(classifier, images, labels, rows=None, device=torch.device("cpu")):
    """Share of images, in [0, 1], whose label is the class with the largest logit. labels: (N,) int64."""
    logits = predict(classifier, images, rows, device)
    labels = torch.as_tensor(labels)
    labels = labels if rows is None else labels[torch.as_tensor(rows)]
    return (logits.argmax(1) == labels).double().mean().item()


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------

@dataclass
class Training:
    """What a training left: mean loss, learning rate and accuracy on the confidence set of each epoch."""

    history: list = field(default_factory=list)
    seconds: float = 0.0        # of the steps alone, over all sittings
    images: int = 0             # that went through the network

    @property
    def images_per_second(self):
        return self.images / self.seconds if self.seconds else 0.0


def train(classifier, images, rows, objective, recipe, *, seed, device, checkpoint, label, evaluate=None, remedy="a smaller --lr"):
    """Trains `classifier` in place and returns the Training.

    images: (N, H, W, 3) uint8 array. rows: (n,) int64, those to train on. objective(logits, views, rows): the
    mean loss of a batch, where views are the augmented pixels that the classifier saw and rows says which
    images they are. evaluate(): an accuracy to note after each epoch.

    At the end of an epoch, SAVE_INTERVAL after the last time, everything is saved at `checkpoint`; a later call
    goes on from there and ends in the same
    bits as one that was never interrupted, since an epoch draws from (seed, epoch) alone. Raises UserError
    when the loss is no longer finite; it names `remedy`.
    """
    classifier.to(device)
    tensor = to_device(images, device)
    rows = torch.as_tensor(rows)
    number, processes = process()
    batch_size = min(recipe.batch_size, len(rows))
    if batch_size < 2 * processes:
        raise UserError(f"{label}: a batch of {batch_size} images is too small" + (f" for {processes} processes" if processes > 1 else " to train on"))
    per_epoch = max(1, len(rows) // recipe.batch_size)
    steps = recipe.steps or recipe.epochs * per_epoch
    epochs = -(-steps // per_epoch)
    optimizer = torch.optim.SGD(classifier.parameters(), recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay,
                                nesterov=recipe.momentum > 0, fused=True)
    scheduler = (torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, steps, cycle_momentum=False)
                 if recipe.schedule == "onecycle" else torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0))
    average = AveragedModel(classifier, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema), use_buffers=True) if recipe.ema else None
    training = Training()
    start = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True, map_location=device)
        classifier.network.load_state_dict(saved["state_dict"])
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
        if average is not None:
            average.load_state_dict(saved["average"])
        training = Training(saved["history"], saved["seconds"], saved["images"])
        start = len(training.history)
    saved_at = training.seconds
    progress = Progress(label, steps * batch_size)
    progress.skip(start * per_epoch * batch_size)
    # Each process has its share of every batch, whose gradient, the mean over all images, is that of one process; batch norm sees the share.
    network = classifier if processes == 1 else DistributedDataParallel(classifier, [device] if device.type == "cuda" else None, gradient_as_bucket_view=True)
    mine = slice(*share_of(batch_size))
    weight = (mine.stop - mine.start) * processes / batch_size

    for epoch in range(start, epochs):
        classifier.train()
        generator = epoch_generator(seed, epoch)
        torch.manual_seed(seed + epoch + 1_000_003 * number)        # dropout
        total = torch.zeros((), device=device)
        began = time.monotonic()
        batches = [batch.to(tensor.device) for batch in shuffled_batches(rows, recipe.batch_size, generator)[:steps - epoch * per_epoch]]
        pixels = batches_of(tensor, [batch[mine] for batch in batches], device)
        for step, (batch, images_of_it) in enumerate(zip(batches, pixels)):
            views = augment(images_of_it, recipe.augment, generator, tensor.shape[1] // 8, len(batch), mine)
            with autocast(device):
                logits = network(views)
                loss = weight * _loss(objective, logits, views, batch[mine])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            scheduler.step()
            if average is not None:
                average.update_parameters(classifier)
            total += loss.detach()
            progress.update(len(batch), lambda: f"epoch {epoch + 1}/{epochs}, loss {total.item() / (step + 1):.4f}")
        if processes > 1:
            distributed.all_reduce(total)
        mean_loss = total.item() / len(batches) / processes     # waits for the device, so the clock is right
        elapsed = time.monotonic() - began
        training.seconds += elapsed
        training.images += sum(map(len, batches))
        if not math.isfinite(mean_loss):
            checkpoint.unlink(missing_ok=True)
            raise UserError(f"{label}: the loss is {mean_loss} in epoch {epoch + 1} at a learning rate of "
                            f"{optimizer.param_groups[0]['lr']:.3g}: give {remedy}")
        with _averaged(classifier, average):
            training.history.append({"epoch": epoch + 1, "loss": mean_loss, "lr": optimizer.param_groups[0]["lr"],
                                     "confidence_accuracy": evaluate() if evaluate else None})
        if epoch == start and compiling_pays(device, elapsed * (epochs - epoch - 1)):
            network = compiled(network)
        if epoch + 1 < epochs and training.seconds - saved_at >= SAVE_INTERVAL:
            _save_progress(checkpoint, classifier, optimizer, scheduler, average, training)
            saved_at = training.seconds
    progress.close()
    if average is not None:
        classifier.load_state_dict(average.module.state_dict())
    return training


@contextlib.contextmanager
def _averaged(classifier, average):
    """The classifier with the averaged weights; with its own where there is no average."""
    if average is None:
        yield
        return
    own = {name: value.clone() for name, value in classifier.state_dict().items()}
    classifier.load_state_dict(average.module.state_dict())
    try:
        yield
    finally:
        classifier.load_state_dict(own)


def _loss(objective, logits, views, rows):
    if isinstance(logits, tuple):       # a network with auxiliary heads: Inception-V3 has one, GoogLeNet two
        main, *auxiliary = (objective(each, views, rows) for each in logits if each is not None)
        return main + AUXILIARY_WEIGHT * sum(auxiliary)
    return objective(logits, views, rows)


def _save_progress(path, classifier, optimizer, scheduler, average, training):
    buffer = io.BytesIO()
    torch.save({"state_dict": classifier.network.state_dict(), "optimizer": optimizer.state_dict(),
                "scheduler": {name: value for name, value in scheduler.state_dict().items() if isinstance(value, (int, float, list, bool))},
                "average": None if average is None else average.state_dict(), "history": training.history, "seconds": training.seconds, "images": training.images}, buffer)
    write_atomically(path, lambda file: file.write(buffer.getbuffer()))


def cross_entropy(labels, device):
    """The objective of a network that learns from labels. labels: (N,) int64 of all images."""
    labels = torch.as_tensor(labels).to(device)

    def objective(logits, views, rows):
        return torch.nn.functional.cross_entropy(logits.float(), labels[rows.to(device)])
    return objective
