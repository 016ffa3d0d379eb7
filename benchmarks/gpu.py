"""What a card does, in at most ten minutes: the table of docs/speed.md, scoring at 32 and 299
pixels, steps beside a CUDA graph of the bare step, and KD rows against the usual way.

    python benchmarks/gpu.py > gpu.md       # Markdown for docs/speed.md

A part that would begin after eight minutes is left out, and that is said.
"""
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import speed, usual
from benchmarks.measuring import arguments, table
from kd import engine, models
from kd.settings import resolve

LIMIT = 480.0       # seconds after which no part begins
TARGET = 40_000     # images of CIFAR-10 that a teacher trains on
BEST = resolve({"recipe": "best"})


def captured(step):
    """The step as a CUDA graph, which costs the host nothing; without CUDA the step itself."""
    if not torch.cuda.is_available():
        return step
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def scores(device, batches, sizes):
    """Scoring beside a loop over a resident batch that answers and does nothing else."""
    rows = []
    for arch, size in sizes:
        teacher = models.folded(models.build(arch, range(10), input_size=size)).to(device).eval()
        batch, network = engine.evaluation_batch(teacher), teacher.network
        images = torch.randn(batch, 3, size, size, device=device).to(
            memory_format=torch.channels_last)
        engine.allow_tf32(False)
        with torch.inference_mode():
            bare = speed.speed(lambda network=network, images=images: network(images), batch,
                               batches, device)
        here = speed.one_pass(teacher, batches, device)
        rows.append([f"{arch}, {size}x{size}, batches of {batch}", here, bare, here / bare])
    table("Scoring by all criteria in true float32, images per second",
          ["", "here", "bare", "ratio"], rows)


def steps(device, count, compiled, batch_size=None):
    """Trainings beside a bare step and a CUDA graph of it. compiled: whether with torch.compile as
    well, which takes a minute for each network; batch_size: in place of each one's own."""
    rows, speeds = [], []
    for name, student, teacher, recipe in (
            ("resnet18, labels", "resnet18", None, replace(speed.LIVE, augment="crop,flip")),
            ("resnet34_cifar, labels", "resnet34_cifar", None, BEST.teacher_recipe),
            ("resnet34_cifar to resnet18_cifar, live", "resnet18_cifar", "resnet34_cifar",
             speed.LIVE),
            ("the same, orthogonal steps here", "resnet18_cifar", "resnet34_cifar",
             replace(speed.LIVE, optimizer="muon"))):
        recipe = replace(recipe, batch_size=batch_size or recipe.batch_size)
        big = teacher and models.folded(models.build(teacher, range(10)))
        big = big and big.to(device)
        found = {f"here{', compiled' * wanted}": speed.training(
            student, replace(recipe, compile=wanted), big, count, device)
            for wanted in (False, True)[:1 + compiled]}
        engine.allow_tf32(True)
        for way, wrap in (("bare", lambda step: step), ("captured", captured)):
            network = models.build(student, range(10)).to(device).network
            found[way] = speed.bare(network, recipe.batch_size, count, device, recipe,
                                    big and big.network, wrap)
        best = max(value for way, value in found.items() if way.startswith("here"))
        speeds.append(best)
        rows.append([f"{name}, batch {recipe.batch_size}", *found.values(),
                     best / found["captured"], 1000 * recipe.batch_size / best])
    table("Training, images per second", ["", *found, "best of ours / captured", "ms per step"],
          rows)
    took = (BEST.teacher_epochs * TARGET / speeds[1],
            BEST.steps * BEST.batch_size / speeds[3])
    table("A full run of the pair for CIFAR, recipe best, extrapolated, minutes",
          ["teacher", "one student"], [[each / 60 for each in took]])


def main():
    args, began = arguments(__doc__, device="auto"), time.monotonic()
    device = engine.pick_device(args.device)
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    print(f"## {card}", file=sys.__stdout__)
    sizes = (("resnet34", 32), ("inception_v3", 299))
    parts = ((steps, 2, False, 8), (scores, 1, sizes[:1]), (usual.compare, (16,), 1, 50)
             ) if args.trial else (
        (steps, 200, True), (scores, 40, sizes), (speed.compare, 25_600, 3),
        (usual.compare, (256,), 5, 1000))
    for part, *sizes in parts:
        if time.monotonic() - began > LIMIT:
            print(f"\n{part.__module__}.{part.__name__} is left out: no time was left.",
                  file=sys.__stdout__)
            continue
        part(device, *sizes)
    print(f"\n`python benchmarks/gpu.py`, {time.monotonic() - began:,.0f} s.", file=sys.__stdout__)


if __name__ == "__main__":
    main()
