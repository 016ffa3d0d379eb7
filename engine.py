"""The one training loop, the one evaluation, and the device they run on.

Images stay uint8 until they are on the device; nothing here loops over images or waits for the device
within a step.
"""
import collections
import contextlib
import ctypes
import datetime
import functools
import glob
import io
import os
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from board import Board
from data import augment, epoch_generator, shuffled_batches
from files import UserError, is_first, read_sealed, say, write_sealed
from packing import release_pages
from progress import Progress
from run import Interrupted, interrupted, orderly

AUXILIARY_WEIGHT = 0.4      # of an auxiliary head's loss, as in Inception (Szegedy et al. 2015)
EVALUATION_BATCH = 512      # images, of up to 96 pixels; fewer where they are larger
READ_AT_ONCE = 100_000_000  # bytes of a memory-mapped array that may lie in memory
PREFETCHED = 2              # batches that wait on the device, where the images stay on the CPU
COMPILING_PAYS = 300.0      # seconds of training left, on CUDA, from which torch.compile earns back the minute that it takes
COMPILER = "inductor"
SAVE_INTERVAL = 20.0        # seconds of work after which a checkpoint is worth its time, and
SAVE_SHARE = 0.02           # of all time, at most, that checkpoints may take
UNSAVED_SHARE = 0.1         # of that interval, from which on a training that has come to its end is saved, since what follows it may take long too
CHECK_STEPS = 50            # steps after which the host waits for the device, to see whether the loss is still finite
AGREE_STEPS = 10            # steps after which several processes agree whether to save or to stop


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
def predict(classifier, images, rows=None, device=torch.device("cpu"), label="evaluating", then=None, shared=True, checkpoint=None, mark=""):
    """Logits of images, in eval mode, without gradients, in float32: scores are compared with thresholds, so that
    the coarser numbers of autocast would not do.

    images: (N, H, W, 3) uint8, array or tensor. rows: (n,) int64, default all. Returns (n, C) float32 on the
    CPU; with `then`, a function of a batch's logits (B, C) on the device that gives a tuple of tensors
    (B, ...), returns those over all images instead, so that nothing larger than they are is kept. Of several processes each
    answers for a part and all return the whole; with shared=False each answers for images of its own.

    checkpoint: a Checkpoint of this process, where answers are kept as they come and when a signal asks to stop, and mark, what they
    are answers to: a later call goes on from there.
    """
    batch_size = max(16, round(EVALUATION_BATCH * min(1.0, 96 / classifier.input_size) ** 2))
    try:
        with orderly() if checkpoint else contextlib.nullcontext():
            return _predict(classifier, images, rows, batch_size, device, label, then, shared, checkpoint, mark)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"{label}: {memory_of(device)} does not suffice for {batch_size:,} images of {images.shape[1]}x{images.shape[2]} at once: give a smaller network, or --device cpu") from None


def _predict(classifier, images, rows, batch_size, device, label, then, shared, checkpoint, mark):
    classifier.eval()
    tensor = images if isinstance(images, torch.Tensor) else to_device(images, device)
    rows = torch.arange(len(images)) if rows is None else torch.as_tensor(rows)
    then = then or (lambda logits: (logits,))
    columns, unreleased = None, 0
    batches = rows.split(batch_size)
    first, last = share_of(len(batches)) if shared else (0, len(batches))       # the batches are those of a single process, so that the logits are, to the bit
    done = begin = sum(map(len, batches[:first]))
    progress = Progress(label, sum(map(len, batches[first:last])))
    saved = checkpoint.load(mark) if checkpoint else None
    if saved is not None:
        columns = tuple(torch.zeros((len(rows), *value.shape[1:]), dtype=value.dtype) for value in saved["columns"])
        done += len(saved["columns"][0])
        for column, value in zip(columns, saved["columns"]):
            column[begin:done] = value
        first += saved["batches"]
        progress.skip(done - begin)
    mine = batches[first:last] or batches[:columns is None]     # with nothing to do, one batch still says what is made
    for number, (batch, pixels) in enumerate(zip(mine, batches_of(tensor, mine, device)), 1):
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
        stop = interrupted() if checkpoint or not distributed.is_initialized() else 0       # several processes stop where they agree about it
        if checkpoint and (stop or checkpoint.due()):
            checkpoint.save(mark, {"batches": number + (saved["batches"] if saved else 0), "columns": [column[begin:done].clone() for column in columns]})
        if stop:
            progress.close()
            raise Interrupted(stop)
    progress.close()
    if shared and distributed.is_initialized():     # each has zeros where the others have their answers
        for column in columns:
            distributed.all_reduce(column)
    return columns if len(columns) > 1 else columns[0]


def answers(classifier, images, rows=None, device=torch.device("cpu"), **how):
    """The class with the largest logit of each image, (n,) int64. how: checkpoint and mark, as in `predict`."""
    return predict(classifier, images, rows, device, then=lambda logits: (logits.argmax(1),), **how).numpy()


def accuracy(classifier, images, labels, rows=None, device=torch.device("cpu"), **how):
    """Share of images, in [0, 1], whose label is the class with the largest logit. labels: (N,) int64. how: as in `answers`."""
    return float((answers(classifier, images, rows, device, **how) == (labels if rows is None else labels[rows])).mean())


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


def train(classifier, images, rows, objective, recipe, *, seed, device, checkpoint, label, evaluate=None, remedy="a smaller --lr", board=None, mark=""):
    """Trains `classifier` in place and returns the Training.

    images: (N, H, W, 3) uint8 array. rows: (n,) int64, those to train on. objective(logits, views, rows): the
    mean loss of a batch, where views are the augmented pixels that the classifier saw and rows says which
    images they are. evaluate(network): an accuracy to note after each epoch, of the network as it would end. board: the folder where board.Board
    writes, None for none. mark: what, beside these, decides how it ends: a checkpoint with another one is not gone on from.

    Between two steps, SAVE_INTERVAL after the last time, and when a signal asks to stop, everything is saved at `checkpoint`; a later call
    goes on from there and ends in the same bits as one that was never interrupted, since a step draws from (seed, epoch, step) alone.
    Raises UserError when the loss is no longer finite, with `remedy`, or the memory does not suffice; the checkpoint stays.
    """
    try:
        with orderly():
            return _train(classifier, images, rows, objective, recipe, seed, device, Checkpoint(checkpoint, label), label, evaluate, remedy, board, mark)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"{label}: {memory_of(device)} does not suffice for batches of {recipe.batch_size:,} images of {images.shape[1]}x{images.shape[2]}: give a smaller "
                        + ("network, with --teacher-arch, or --teacher-size" if label == "teacher" else "--batch-size, or a smaller network")) from None


def memory_of(device):
    return "the memory" if device.type == "cpu" else "the memory of the device"


def is_out_of_memory(error):
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error) or "out of memory" in str(error)


class Checkpoint:
    """The file that an interrupted piece of work goes on from; it is written when that is worth its time. own: each process has one."""

    def __init__(self, path, label, own=False):
        number, processes = process()
        self.alone = path
        self.path = path.with_name(f"{path.stem}.{number + 1}-of-{processes}{path.suffix}") if own and processes > 1 else path
        self.label, self.own, self.interval = label, own, SAVE_INTERVAL
        self.saved = time.monotonic()

    def load(self, mark, device=torch.device("cpu")):
        """What was saved, by work with the same `mark`; None where there is nothing, or it is damaged or of other work, which is said."""
        if not self.path.exists():
            return None
        content = read_sealed(self.path)
        saved = None if content is None else torch.load(io.BytesIO(content), weights_only=True, map_location=device)
        if saved is None or saved["mark"] != mark:
            say(f"{self.label}: {self.path} is {'damaged' if saved is None else 'of another run'} and is not used")
            return None
        return saved

    def due(self):
        return time.monotonic() - self.saved >= self.interval

    def save(self, mark, content):
        """content: of plain types and tensors."""
        began, buffer = time.monotonic(), io.BytesIO()
        if is_first() or self.own:
            torch.save({"mark": mark, **content}, buffer)
            write_sealed(self.path, buffer.getbuffer(), everyone=self.own)
        self.saved = time.monotonic()
        self.interval = max(SAVE_INTERVAL, (self.saved - began) / SAVE_SHARE)

    def remove(self):
        """Deletes it, and what as many processes as there are not any more have left."""
        if is_first():
            for path in (self.alone, *self.alone.parent.glob(f"{glob.escape(self.alone.stem)}.*-of-*{self.alone.suffix}")):
                path.unlink(missing_ok=True)


def remove_checkpoints(path):
    """Deletes the checkpoint of a training, NAME.part, and those of what comes before and after it."""
    for what in ("", ".answers", ".test", ".confidence"):
        Checkpoint(path.with_name(f"{path.stem}{what}.part"), "", own=True).remove()


def checksum(classifier):
    """A number that tells a network from one of other weights."""
    number = 0
    for value in classifier.state_dict().values():
        number = zlib.crc32(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy(), number)
    return number


def _train(classifier, images, rows, objective, recipe, seed, device, checkpoint, label, evaluate, remedy, board, mark):
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
    total, first, rate = torch.zeros((), device=device), 0, recipe.lr
    mark = f"{mark}, {label}, {classifier.arch}, {recipe}, {seed}, {len(rows)} images, {zlib.crc32(np.ascontiguousarray(images[rows[:256].numpy()]))}, {processes} processes"
    saved = checkpoint.load(mark, device)
    if saved is not None:
        classifier.network.load_state_dict(saved["state_dict"])
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
        if average is not None:
            average.load_state_dict(saved["average"])
        training = Training(saved["history"], saved["seconds"], saved["images"])
        total, first, rate = saved["total"], saved["step"], saved["rate"]
        del saved
    start = len(training.history)

    def save(step):
        state = {name: value for name, value in scheduler.state_dict().items() if isinstance(value, (int, float, list, bool))}
        checkpoint.save(mark, {"state_dict": classifier.network.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": state,
                               "average": None if average is None else average.state_dict(), "total": total if processes == 1 else _summed(total) / processes, "step": step, "rate": rate,
                               "history": training.history, "seconds": training.seconds, "images": training.images})
    progress = Progress(label, steps * batch_size)
    progress.skip((start * per_epoch + first) * batch_size)
    board = Board(board, start * per_epoch + first)
    # Each process has its share of every batch, whose gradient, the mean over all images, is that of one process; batch norm sees the share.
    network = classifier if processes == 1 else DistributedDataParallel(classifier, [device] if device.type == "cuda" else None, gradient_as_bucket_view=True)
    mine = slice(*share_of(batch_size))
    weight = (mine.stop - mine.start) * processes / batch_size

    check = steps_between_checks(device)
    losses, rates = [], []      # of the steps since it was last seen that they are finite
    views = None
    clock = time.monotonic()

    def tick():
        nonlocal clock
        training.seconds, clock = training.seconds + time.monotonic() - clock, time.monotonic()

    for epoch in range(start, epochs):
        classifier.train()
        batches = [batch.to(tensor.device) for batch in shuffled_batches(rows, recipe.batch_size, epoch_generator(seed, epoch))[:steps - epoch * per_epoch]]
        pixels = batches_of(tensor, [batch[mine] for batch in batches[first:]], device)
        for step, images_of_it in enumerate(pixels, first):
            batch, generator = batches[step], epoch_generator(seed, epoch, step)
            seed_dropout(seed, f"{epoch}/{step}/{number}", device)
            views = augment(images_of_it, recipe.augment, generator, tensor.shape[1] // 8, len(batch), mine)
            with autocast(device):
                logits = network(views)
                loss = weight * _loss(objective, logits, views, batch[mine])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            rate = optimizer.param_groups[0]["lr"]
            scheduler.step()
            if average is not None:
                average.update_parameters(classifier)
            losses.append(loss.detach())
            rates.append(rate)
            total += losses[-1]
            training.images += len(batch)
            progress.update(len(batch), lambda: f"epoch {epoch + 1}/{epochs}, loss {total.item() / (step + 1):.4f}{_reached(training)}")
            if step == 0 and epoch & (epoch + 1) == 0:      # epochs 1, 2, 4, 8, ...
                board.views(epoch * per_epoch, views)
            stop, due, last = interrupted(), is_first() and checkpoint.due(), step + 1 == len(batches)
            if processes > 1:
                stop, due = agreed(stop, due) if last or (step + 1) % AGREE_STEPS == 0 else (0, 0)
            if stop or due or len(losses) == check or last:
                left = largest_answer(classifier, views) if stop or due or (last and epoch + 1 == epochs) else None
                require_finite(losses, rates, left, label, epoch, step, remedy)
                board.losses(epoch * per_epoch + step, losses)
                losses.clear()
                rates.clear()
            if stop or due:
                tick()
                save(step + 1)
                clock = time.monotonic()
            if stop:
                progress.close()
                board.close()
                raise Interrupted(stop)
        if processes > 1:
            distributed.all_reduce(total)
        mean_loss = total.item() / len(batches) / processes     # waits for the device, so the clock is right
        tick()
        if processes > 1:
            _share_buffers(classifier, average)
        try:
            reached = evaluate(classifier if average is None else average.module) if evaluate else None
        except Interrupted:
            if processes == 1 and (views is None or largest_answer(classifier, views).isfinite()):
                save(len(batches))
            raise
        training.history.append({"epoch": epoch + 1, "loss": mean_loss, "lr": rate, "confidence_accuracy": reached})
        board.epoch(epoch * per_epoch + len(batches) - 1, epoch_loss=mean_loss, learning_rate=training.history[-1]["lr"], confidence_accuracy=reached)
        total, first = torch.zeros((), device=device), 0
        if epoch == start and compiling_pays(device, training.seconds / training.images * (steps - (epoch + 1) * per_epoch) * batch_size):
            network = compiled(network)
        clock = time.monotonic()
    unsaved = is_first() and time.monotonic() - checkpoint.saved > checkpoint.interval * UNSAVED_SHARE
    if unsaved if processes == 1 else agreed(unsaved)[0]:
        save(0)
    progress.close()
    board.close()
    if average is not None:
        classifier.load_state_dict(average.module.state_dict())
    return training


def _reached(training):
    """The last accuracy on the confidence set, in words."""
    reached = training.history and training.history[-1]["confidence_accuracy"]
    return f", confidence set {reached:.2%}" if reached else ""


def _loss(objective, logits, views, rows):
    if isinstance(logits, tuple):       # a network with auxiliary heads: Inception-V3 has one, GoogLeNet two
        main, *auxiliary = (objective(each, views, rows) for each in logits if each is not None)
        return main + AUXILIARY_WEIGHT * sum(auxiliary)
    return objective(logits, views, rows)


def steps_between_checks(device):
    """After how many steps it is seen whether the loss is finite: a look makes the host wait for the device."""
    return 1 if device.type == "cpu" else CHECK_STEPS


def _share_buffers(*networks):
    """Gives every process the statistics that the first one, which saves, has of its share of the images."""
    for network in networks:
        for buffer in network.buffers() if network is not None else ():
            distributed.broadcast(buffer, 0)


@torch.inference_mode()
def largest_answer(classifier, views):
    """The largest logit, without its sign, that a network has for these views in eval mode; NaN or infinity where any is. The loss of a step is that of
    the network before it: what the last step before a checkpoint, or the last of all, has broken shows only here."""
    classifier.eval()
    largest = classifier(views).abs().amax()
    classifier.train()
    return largest


def require_finite(losses, rates, left, label, epoch, step, remedy):
    """Raises UserError unless the losses of the steps up to this one, which were made at these learning rates, are finite, all of them, and the
    `largest_answer` of the network that the last one has left, where that is not None."""
    finite = torch.stack(losses if left is None else [*losses, left.to(losses[0].dtype)]).isfinite().tolist()
    if all(finite):
        return
    bad = finite.index(False)
    what, of = (f"the loss is {losses[bad].item()} in", bad) if bad < len(losses) else ("the network answers in NaN or infinity after", bad - 1)
    raise UserError(f"{label}: {what} step {step + 2 - len(losses) + of} of epoch {epoch + 1}, at a learning rate of {rates[of]:.3g}: "
                    f"give {remedy}, with --restart-from {'teacher' if label == 'teacher' else 'students'}")


def seed_dropout(seed, purpose, device):
    """Seeds what draws without being given a generator. Not torch.manual_seed: without CUDA that remembers every call, for later."""
    number = seed_for(seed, purpose)
    torch.default_generator.manual_seed(number)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(number)
    elif device.type == "mps":
        torch.mps.manual_seed(number)


def agreed(*numbers):
    """The largest of each of these numbers that any process has."""
    found = torch.tensor(numbers, dtype=torch.int64)
    distributed.all_reduce(found, distributed.ReduceOp.MAX)
    return found.tolist()


def _summed(tensor):
    tensor = tensor.clone()
    distributed.all_reduce(tensor)
    return tensor


def cross_entropy(labels, device):
    """The objective of a network that learns from labels. labels: (N,) int64 of all images."""
    labels = torch.as_tensor(labels).to(device)

    def objective(logits, views, rows):
        return torch.nn.functional.cross_entropy(logits.float(), labels[rows.to(device)])
    return objective
