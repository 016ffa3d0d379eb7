"""The training loop, and what hangs on it: progress, boards, checkpoints, signals.

`train` over `train_one_epoch` is what learns. Everything else is in `_Keeper`, which is called
after each step and each epoch."""
import copy
import functools
import io
import math
import time
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.optim import lr_scheduler

from kd.augment import augment, shuffled_batches, step_generator
from kd.board import Board
from kd.command import Interrupted, interrupted, orderly
from kd.engine import allow_tf32, autocast, enough_memory, prefetched, resident, seed_all, seed_for
from kd.files import UserError, is_first, say, write_atomically
from kd.muon import Muon, convolutions_of
from kd.processes import gathered, rank, share_buffers, share_of, shared, summed, world_size
from kd.progress import Progress

AUXILIARY_WEIGHT = 0.4      # of an auxiliary head's loss, as in Inception (Szegedy et al. 2015)
COMPILING_PAYS = 300.0      # seconds left on CUDA from which torch.compile pays
ROUND = 1_000               # steps after which a training is saved within an epoch
SAVE_INTERVAL = 20.0        # seconds of work between two checkpoints, at least
SMALLEST_PART = 8           # images of a batch for each of several processes
LOOK_STEPS = 50             # between two looks at the accuracy: few images make short epochs
FEW_STEPS = 200             # in which a network from random weights hardly learns
CHECK_STEPS = 50            # on a device: steps between two looks at whether the loss is finite
AGREE_STEPS = 10            # steps after which several processes agree whether to stop
SCHEDULES = {       # functions of an optimizer, the peak rates of its groups, the number of steps
    "constant": lambda optimizer, lr, steps: lr_scheduler.ConstantLR(optimizer, 1.0),
    # a single step would be the last of a cycle, at a rate of 0
    "onecycle": lambda optimizer, lr, steps: lr_scheduler.OneCycleLR(
        optimizer, lr, steps, cycle_momentum=False) if steps > 1 else (
        lr_scheduler.ConstantLR(optimizer, 1.0)),
    "cosine": lambda optimizer, lr, steps: lr_scheduler.CosineAnnealingLR(optimizer, steps),
    # as Tian et al. (arXiv 1910.10699) train theirs: 150, 180 and 210 of 240 epochs
    "multistep": lambda optimizer, lr, steps: lr_scheduler.MultiStepLR(
        optimizer, [steps * eighths // 8 for eighths in (5, 6, 7)])}


class Training:
    """A network while it learns, and all that its next step depends on.

    history: {"epoch", "loss", "lr", "confidence_accuracy"} of each epoch, the last None where
    nobody looked; seconds: of the steps alone, over all sittings; step: the next one within the
    epoch; total: the sum of the epoch's losses."""

    def __init__(self, classifier, count, recipe, device):
        """The state before the first step on `count` images."""
        self.per_epoch, self.steps = recipe.steps_of_epoch(count), recipe.all_steps(count)
        make = torch.optim.SGD if recipe.optimizer == "sgd" else functools.partial(
            Muon, convolutions=convolutions_of(classifier))
        self.optimizer = make(
            classifier.parameters(), lr=recipe.lr, momentum=recipe.momentum, fused=True,
            weight_decay=recipe.weight_decay, nesterov=recipe.momentum > 0)
        peaks = [group["lr"] for group in self.optimizer.param_groups]
        self.scheduler = SCHEDULES[recipe.schedule](self.optimizer, peaks, self.steps)
        self.average = copy.deepcopy(classifier) if recipe.ema else None
        self.classifier, self.network = classifier, shared(classifier, device)     # or compiled
        self.total = torch.zeros((), device=device)
        self.history, self.seconds, self.images, self.step, self.rate = [], 0.0, 0, 0, 0.0

    @property
    def images_per_second(self):
        return self.images / self.seconds if self.seconds else 0.0

    @property
    def epoch(self):
        return len(self.history)

    @property
    def done(self):
        """Steps, over all epochs."""
        return self.epoch * self.per_epoch + self.step

    @property
    def result(self):
        """The classifier as it would end now."""
        return self.classifier if self.average is None else self.average

    @torch.no_grad()
    def update_average(self, decay):
        """Moves the average towards the weights and statistics of now. The decay warms up, so that
        a short training does not end as its beginning: min(decay, (1 + n) / (10 + n)) after n
        steps."""
        pairs = list(zip(*([*each.parameters(), *each.buffers()]
                           for each in (self.average, self.classifier)), strict=True))
        means = [pair for pair in pairs if pair[0].is_floating_point()]
        torch._foreach_lerp_(*map(list, zip(*means, strict=True)),
                             1 - min(decay, (1 + self.done) / (10 + self.done)))
        for kept, value in pairs:
            if not kept.is_floating_point():
                kept.copy_(value)

    def compile(self, wanted, device):
        """Compiles the network for the steps that are left, on CUDA into graphs that cost the host
        no time. wanted: whether; None: on CUDA, once it pays."""
        left = (self.steps - self.done) / max(1, self.done) * self.seconds
        pays = wanted is None and device.type == "cuda" and left > COMPILING_PAYS
        if (wanted or pays) and not hasattr(self.network, "_orig_mod"):
            torch._dynamo.config.suppress_errors = wanted is None   # what nobody asked for
            mode = "reduce-overhead" if device.type == "cuda" else None
            torch.cuda.empty_cache()        # a graph has memory of its own
            self.network = torch.compile(self.network, mode=mode)

    def state(self):
        """Everything, as plain types and tensors."""
        scheduler = {name: value for name, value in self.scheduler.state_dict().items()
                     if isinstance(value, (int, float, list, bool))}
        total = summed(self.total) / world_size()
        average = None if self.average is None else self.average.state_dict()
        return {"network": self.classifier.network.state_dict(), "average": average,
                "optimizer": self.optimizer.state_dict(), "scheduler": scheduler, "total": total,
                **{name: getattr(self, name) for name in (
                    "history", "seconds", "images", "step", "rate")}}

    def restore(self, state):
        self.classifier.network.load_state_dict(state.pop("network"))
        for name in ("optimizer", "scheduler", "average"):
            if (part := state.pop(name)) is not None:
                getattr(self, name).load_state_dict(part)
        vars(self).update(state)


@dataclass(frozen=True)
class Watch:
    """What hangs on a training and is not learning.

    path: of the checkpoint from which it resumes; made_from: what the training depends on, as a
    checkpoint of another one is not used; label: of its progress; evaluate(network): an accuracy to
    note after an epoch, or None; every: after how many steps at least, but for the last; board:
    {kind: folder} of kd.board; remedy: for a loss that is not finite; real: not a trial run, in
    which few steps are what was asked for."""

    path: Path
    made_from: object
    label: str
    evaluate: object = None
    board: dict = field(default_factory=dict)
    remedy: str = "a smaller --lr, with --restart-from students"
    every: int = LOOK_STEPS
    real: bool = True

    def load(self, device):
        """What was saved; None where there is nothing, or it is damaged or of another training."""
        try:
            with zipfile.ZipFile(self.path) as parts:       # torch.load checks no checksum
                whole = parts.testzip() is None
            saved = torch.load(self.path, weights_only=True, map_location=device) if whole else {}
        except FileNotFoundError:
            return None
        except (OSError, RuntimeError, zipfile.BadZipFile, ValueError, EOFError):
            saved = {}
        if saved.pop("made_from", None) == str(self.made_from):
            return saved
        say(f"{self.path} is {'of another training' if saved else 'damaged'}, so it is not used.")
        return None

    def save(self, state):
        buffer = io.BytesIO()       # to a full disk torch.save raises no OSError
        if is_first():
            torch.save(state | {"made_from": str(self.made_from)}, buffer)
        write_atomically(self.path, lambda file: file.write(buffer.getbuffer()))


def train(classifier, images, rows, objective, recipe, *, seed, device, watch, weights=None):
    """Trains `classifier` in place and returns the Training.

    images: (N, H, W, 3) uint8 array. rows: (n,) int64, those to train on. objective(logits, views,
    rows): the mean loss of a batch, where views are the augmented pixels that the classifier saw.
    weights: (n,), how often each row comes; None: once an epoch.

    A step draws from (seed, epoch, step) alone, and of several processes from the rank. After an
    epoch, or a thousand steps, and when a signal asks to stop, everything is saved; a later call
    resumes there and ends in the same bits. Raises UserError when the loss is no longer finite or
    memory runs out; the checkpoint stays."""
    require_batch(watch.label, min(recipe.batch_size, len(rows)))
    remedy = ("Use a smaller --batch-size (--teacher-batch-size), --no-compile, or a smaller "
              "network.")
    with orderly(), enough_memory(watch.label, device, remedy):
        classifier.to(device)
        state = Training(classifier, len(rows), recipe, device)
        keeper = _Keeper(state, watch, min(recipe.batch_size, len(rows)), device)
        if watch.real and state.steps < FEW_STEPS and not recipe.steps and not state.done:
            say(f"{watch.label}: {recipe.epochs} epochs of {len(rows):,} images are {state.steps} "
                "steps, which may be too few. More epochs or smaller batches make more, and for "
                "students --steps N.")
        tensor, rows = resident(images, device), torch.as_tensor(rows)
        weights = None if weights is None else torch.as_tensor(weights)
        while state.epoch * state.per_epoch < state.steps:
            batches = shuffled_batches(rows, recipe.batch_size,
                                       step_generator(seed, state.epoch), weights)
            left = state.steps - state.epoch * state.per_epoch      # the last may be a part of one
            train_one_epoch(state, tensor, batches[:left], objective, recipe, seed, device, keeper)
            keeper.after_epoch()
        keeper.close()
    classifier.load_state_dict(state.result.state_dict())
    return state


def require_batch(label, images, processes=None):
    """Raises UserError where a batch of so many images is too small for `processes` (None: all that
    there are): batch norms see the part of one process alone, and students of parts of two images
    reached a third of their accuracy."""
    processes = processes or world_size()
    smallest = 2 if processes == 1 else SMALLEST_PART * processes
    if images < smallest:
        more = f", {SMALLEST_PART} for each process" if processes > 1 else ""
        raise UserError(f"{label}: a batch needs {smallest} images or more{more}, and there are "
                        f"{images}.")


def train_one_epoch(state, images, batches, objective, recipe, seed, device, keeper):
    """The steps of one epoch that are left. batches: [(n,) int64 rows]."""
    state.classifier.train()
    allow_tf32(True)
    mine = share_of(len(batches[0]))    # this process's share of every batch
    weight = (mine.stop - mine.start) * world_size() / len(batches[0])
    # Two copies an epoch: where a step indexes the images, and where the objective indexes labels.
    count, order = len(batches[0]), torch.cat(batches)
    batches, at = (order.to(where).split(count) for where in (device, images.device))
    pixels = prefetched((images[rows[mine]] for rows in at[state.step:]), device)
    for step, (batch, raw) in enumerate(zip(batches[state.step:], pixels, strict=True), state.step):
        state.compile(recipe.compile, device)       # once it pays, which seconds tell
        generator = step_generator(seed, state.epoch, step)
        seed_all(seed_for(seed, f"{state.epoch}/{step}/{rank()}"), device)
        views = augment(raw, recipe.augment, generator, len(batch), mine)
        with autocast(device, recipe.amp):
            logits = state.network(views)
            loss = weight * _loss(objective, logits, views, batch[mine])
        state.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        state.optimizer.step()
        state.rate = state.optimizer.param_groups[0]["lr"]
        state.scheduler.step()
        state.total += loss.detach()
        state.images += len(batch)
        state.step = step + 1
        if state.average is not None:
            state.update_average(recipe.ema)
        keeper.after_step(loss.detach(), views, step + 1 == len(batches))


def _loss(objective, logits, views, rows):
    """Of a network with auxiliary heads (Inception-V3 has one, GoogLeNet two) all of them count."""
    if not isinstance(logits, tuple):
        return objective(logits, views, rows)
    main, *others = (objective(each, views, rows) for each in logits if each is not None)
    return main + AUXILIARY_WEIGHT * sum(others)


def cross_entropy(labels, device):
    """The objective of a network that learns from labels. labels: (N,) int64 of all images."""
    labels = torch.as_tensor(labels).to(device)

    def objective(logits, views, rows):
        return torch.nn.functional.cross_entropy(logits.float(), labels[rows.to(device)])
    return objective


# ---- What hangs on a training: progress, boards, checkpoints, signals ----------------------------

class _Keeper:
    """Called after each step and each epoch of a Training."""

    def __init__(self, state, watch, batch_size, device):
        self.state, self.watch, self.device = state, watch, device
        saved = watch.load(device)
        if saved is not None:
            state.restore(saved)
        self.epochs = -(-state.steps // state.per_epoch)
        self.progress = Progress(watch.label, state.steps * batch_size,
                                 done=state.done * batch_size)
        self.board = Board(watch.board, state.done)
        self.losses, self.rates = [], []      # of the steps since they were last seen to be finite
        self.began = self.saved = time.monotonic()

    def after_step(self, loss, views, last):
        state = self.state
        self.losses.append(loss)
        self.rates.append(state.rate)
        self.progress.update(len(views) * world_size(), self._figures)
        if state.step == 1 and state.epoch & (state.epoch + 1) == 0:        # epochs 1, 2, 4, 8, ...
            self.board.views(state.done - 1, views)
        looks = 1 if self.device.type == "cpu" else CHECK_STEPS
        stop = interrupted()
        if world_size() > 1:
            stop = max(gathered(stop)) if last or state.step % AGREE_STEPS == 0 else 0
        end_of_round = state.step % ROUND == 0
        if stop or last or end_of_round or len(self.losses) >= looks:
            self._require_finite(stop or last or end_of_round)
        if stop or end_of_round and not last:
            self._save(always=stop)
        if stop:
            self.close()
            raise Interrupted(stop)

    def after_epoch(self):
        state, watch = self.state, self.watch
        loss = summed(state.total).item() / state.step / world_size()   # waits for the device
        self._tick()
        share_buffers(state.classifier, state.result)
        due = state.done % watch.every < state.step or state.done >= state.steps
        reached = watch.evaluate(state.result) if watch.evaluate and due else None
        self.board.figures(state.done - 1, epoch_loss=loss, learning_rate=state.rate,
                           confidence_accuracy=reached)
        state.history.append({"epoch": state.epoch + 1, "loss": loss, "lr": state.rate,
                              "confidence_accuracy": reached})
        state.total, state.step = torch.zeros((), device=self.device), 0
        self.began = time.monotonic()       # what was evaluated meanwhile is no step
        self._save()

    def close(self):
        self.progress.close()
        self.board.close()

    def _figures(self):
        state = self.state
        reached = next(filter(None, (each["confidence_accuracy"] for each in state.history[::-1])),
                       None)
        return (f"epoch {state.epoch + 1}/{self.epochs}, loss {state.total.item() / state.step:.4f}"
                + (f", confidence set {reached:.2%}" if reached else ""))

    def _tick(self):
        now = time.monotonic()
        self.state.seconds, self.began = self.state.seconds + now - self.began, now

    def _save(self, always=False):
        due = always or time.monotonic() - self.saved >= SAVE_INTERVAL
        if not any(gathered(due)):
            return
        self._tick()
        self.watch.save(self.state.state())
        self.saved = self.began = time.monotonic()

    def _require_finite(self, weights):
        """weights: whether to look at them too, as a loss may be finite whose gradient is not."""
        state, losses = self.state, torch.stack(self.losses).tolist()
        wrong = [(f"the loss is {loss} at a learning rate of {rate:.3g}", step)
                 for step, (loss, rate) in enumerate(zip(losses, self.rates, strict=True),
                                                     state.step + 1 - len(losses))
                 if not math.isfinite(loss)]
        if weights and not wrong:
            norms = torch._foreach_norm([each.detach() for each in state.classifier.parameters()])
            if not torch.stack(norms).isfinite().all():
                wrong = [("the weights are no longer finite", state.step)]
        if wrong:
            self.close()
            what, step = wrong[0]
            raise UserError(f"{self.watch.label}: {what} in step {step} of epoch "
                            f"{state.epoch + 1}. Use {self.watch.remedy}.")
        for step, loss in enumerate(losses, state.done - len(losses)):
            self.board.figures(step, loss=loss)
        self.losses.clear()
        self.rates.clear()
