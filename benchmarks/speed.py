"""How close the stages come to the bare network: images per second beside loops over random floats.

    bare    one batch that stays on the device: forward, loss, backward, step (scoring: forward)
    stock   the same over torchvision's network as it comes, without kd/small_conv.py
    here    the stage's own code on random uint8 images, with all that belongs to it

    python benchmarks/speed.py
"""
import copy
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import distill
from benchmarks.measuring import arguments, as_source, seconds, table, taking_turns, trained
from kd import engine, models, scoring
from kd.augment import augment
from kd.settings import resolve
from kd.training import cross_entropy

REFERENCE, BATCH = resolve({}), engine.EVALUATION_BATCH
LIVE = replace(resolve({"recipe": "best"}).student_recipe(), augment="crop,flip", ema=0.0,
               optimizer="sgd")     # as the bare loops have it


def random_images(count):
    return np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), np.uint8)


def speed(step, batch, count, device):
    """Images per second of `count` calls, after a first one."""
    def steps(count):
        for _ in range(count):
            step()
        if device.type != "cpu":
            torch.accelerator.synchronize()
    steps(1)
    return batch * count / seconds(steps, count)


def bare(network, batch, count, device, recipe=None, teacher=None, wrap=lambda step: step):
    """With a recipe it trains; teacher: one that answers before each step, if any; wrap(step): what
    is called in place of a step."""
    images = torch.randn(batch, 3, 32, 32, device=device).to(memory_format=torch.channels_last)
    if recipe is None:
        with torch.inference_mode():
            return speed(lambda: network.eval()(images), batch, count, device)
    labels = torch.randint(0, 10, (batch,), device=device)
    optimizer = torch.optim.SGD(network.train().parameters(), 1e-3, recipe.momentum, fused=True,
                                weight_decay=recipe.weight_decay, nesterov=recipe.momentum > 0)

    def step():
        with engine.autocast(device):
            if teacher:
                with torch.inference_mode():
                    teacher(images)
            loss = F.cross_entropy(network(images), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return speed(wrap(step), batch, count, device)


def training(arch, recipe, teacher, count, device):
    """The second of two epochs, since the bare loop has had a first step as well."""
    images, ends = random_images(recipe.batch_size * count), []
    if teacher is None:
        objective = cross_entropy(np.arange(len(images)) % 10, device)
    elif recipe.augment == "none":
        objective = distill.fixed_objective(teacher, images, recipe.temperature, device)
    else:
        if engine.in_bfloat16(device):
            teacher = engine.cast_once(copy.deepcopy(teacher))
        objective = distill.live_objective(teacher, recipe.temperature, device)
    trained(models.build(arch, range(10)), images, objective,
            replace(recipe, epochs=2, steps=0, lr=1e-3), device,
            lambda network: ends.append(time.perf_counter()))
    return len(images) / (ends[1] - ends[0])


def one_pass(teacher, count, device):
    """Scoring by all criteria, after one over a single batch."""
    batch, criteria = engine.evaluation_batch(teacher), scoring.load_criteria(REFERENCE)
    source = as_source(random_images(batch * count))
    for rows in (np.arange(batch), None):
        took = seconds(scoring.score_batches, teacher, source, rows, criteria, device, "speed")
    return len(source) / took


def ways(arch, recipe, teachers, images, device):
    """{way: a function that gives images per second}. recipe: None where it scores."""
    folded, big, stock_big = teachers
    ours = models.build(arch, range(10)).to(device).network
    stock = torchvision.models.get_model(arch, num_classes=10).to(
        device, memory_format=torch.channels_last)
    batch, live = recipe.batch_size if recipe else BATCH, recipe and recipe.augment != "none"
    how = max(2, images // batch), device
    return {"here": lambda: (training(arch, recipe, folded, *how) if recipe else
                             one_pass(folded, *how)),
            "bare": lambda: bare(ours, batch, *how, recipe, live and big),
            "stock": lambda: bare(stock, batch, *how, recipe, live and stock_big)}


def compare(device, images, rounds):
    """The table of the stages, and how little of a step augmentation takes."""
    rows, big = [], models.build("resnet34", range(10)).to(device).eval()
    stock = torchvision.models.resnet34(num_classes=10).to(
        device, memory_format=torch.channels_last).eval()
    teachers = models.folded(big), big.network, stock
    for name, arch, recipe, given in (
            ("teacher training", "resnet34", REFERENCE.teacher_recipe, (None,) * 3),
            ("scoring", "resnet34", None, teachers),
            ("distillation, fixed pixels", "resnet18", REFERENCE.student_recipe(), teachers),
            ("distillation, augmented, live teacher", "resnet18", LIVE, teachers)):
        here, loop, plain = taking_turns(ways(arch, recipe, given, images, device), rounds).values()
        rows.append([name, *map(np.median, (here, loop, here / loop, plain, here / plain))])
    table(f"Images per second on {device}, medians of {rounds} rounds",
          ["", "here", "bare", "ratio", "stock", "ratio"], rows)
    views, drawn = torch.from_numpy(random_images(256)).to(device), torch.Generator()
    alone = speed(lambda: augment(views, "crop,flip,mixup", drawn), 256, 160, device)
    table("Crops, flips and mixup of a batch of 256", ["images per second", "of a bare student's"],
          [[alone, f"{rows[2][2] / alone:.1%}"]])


def main():
    args = arguments(__doc__, device="auto")
    compare(engine.pick_device(args.device), *(64, 1) if args.trial else (4096, 3))


if __name__ == "__main__":
    main()
