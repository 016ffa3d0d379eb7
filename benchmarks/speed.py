"""How close the stages come to the bare network: images a second beside a loop over random tensors.

The bare loop holds one batch of normalised floats, of the stage's shape, on the device, and does nothing but what
no training can do without: forward, loss, backward, optimizer step. Ours is the stage's own code on random uint8
images: shuffling, augmentation, normalisation, the teacher and the bookkeeping are inside. The two take turns, so that a noisy machine disturbs both. "stock" is the bare loop over torchvision's network as it
comes, without SmallInputConv2d (see models.py).

    python benchmarks/speed.py                          # JSON on standard output
    python benchmarks/speed.py --run-dir runs/cifar10   # and what that run reached
"""
import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torchvision

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import distill
import engine
import models
import transfer
from run import RECIPES

CLASSES = [str(number) for number in range(10)]
REPEATS = 3


def bare_step(network, recipe, device, teacher=None):
    """A function that does one training step on a resident batch, after a forward pass of the teacher where there is one."""
    images = torch.randn(recipe.batch_size, 3, 32, 32, device=device).to(memory_format=torch.channels_last)
    labels = torch.randint(0, len(CLASSES), (recipe.batch_size,), device=device)
    optimizer = torch.optim.SGD(network.parameters(), 1e-3, recipe.momentum, weight_decay=recipe.weight_decay,
                                nesterov=recipe.momentum > 0, fused=True)
    network.train()

    def step():
        if teacher is not None:
            with torch.inference_mode():
                teacher(images)
        loss = torch.nn.functional.cross_entropy(network(images), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return step


def bare_forward(network, device):
    images = torch.randn(engine.EVALUATION_BATCH, 3, 32, 32, device=device).to(memory_format=torch.channels_last)
    network.eval()

    @torch.inference_mode()
    def forward():
        network(images)
    return forward


def speed(step, batch, count, device):
    """Images a second of `count` calls."""
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(count):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return batch * count / (time.perf_counter() - began)


def our_training(arch, recipe, count, device, teacher=None):
    """Images a second of engine.train on `count` batches of random images, in the second of two epochs, as the bare loop has had a first step
    as well; KD where there is a teacher, which answers for each view where there is augmentation."""
    images = np.random.default_rng(0).integers(0, 256, (recipe.batch_size * count, 32, 32, 3), np.uint8)
    labels = np.random.default_rng(1).integers(0, len(CLASSES), len(images))
    objective = (engine.cross_entropy(labels, device) if teacher is None else distill.live_objective(teacher, recipe.temperature, device)
                 if recipe.augment != "none" else distill.fixed_objective(teacher, images, recipe.temperature, device))
    ends = []
    with tempfile.TemporaryDirectory() as folder:
        engine.train(models.build(arch, CLASSES), images, np.arange(len(images)), objective, dataclasses.replace(recipe, epochs=2), seed=0, device=device,
                     checkpoint=Path(folder) / "part", label="speed", evaluate=lambda network: ends.append(time.perf_counter()))
    return len(images) / (ends[1] - ends[0])


def our_scoring(teacher, count, device):
    images = np.random.default_rng(0).integers(0, 256, (engine.EVALUATION_BATCH * count, 32, 32, 3), np.uint8)
    transfer.score_images(teacher, images[:engine.EVALUATION_BATCH], device=device)
    began = time.perf_counter()
    transfer.score_images(teacher, images, device=device)
    return len(images) / (time.perf_counter() - began)


def our_augmentation(recipe, count, device):
    """Images a second of augmenting resident batches: crops, flips and mixup."""
    images = torch.randint(0, 256, (recipe.batch_size, 32, 32, 3), dtype=torch.uint8, device=device)
    generator = torch.Generator().manual_seed(0)
    return speed(lambda: data.augment(images, "crop,flip,mixup", generator), recipe.batch_size, 10 * count, device)


def measure(device, images):
    """{stage: {"ours", "bare", "stock": images a second, "ratio": ours / bare}}, medians of REPEATS rounds; the last row is a share of time."""
    recipe = RECIPES["reference"]
    teacher_recipe = dataclasses.replace(recipe.teacher, epochs=1, lr=1e-3)
    student_recipe = dataclasses.replace(recipe.student, epochs=1, lr=1e-3)
    live_recipe = dataclasses.replace(RECIPES["best"].student, epochs=1, lr=1e-3)
    teacher = models.build("resnet34", CLASSES).to(device).eval()
    answering = models.folded(teacher)

    def stock(arch):
        return torchvision.models.get_model(arch, num_classes=len(CLASSES)).to(device, memory_format=torch.channels_last)

    def training(arch, recipe, teacher=None):
        count = max(2, images // recipe.batch_size)
        ours, plain, live = models.build(arch, CLASSES).to(device).network, stock(arch), teacher is not None and recipe.augment != "none"
        return {"ours": lambda: our_training(arch, recipe, count, device, teacher),
                "bare": lambda: speed(bare_step(ours, recipe, device, bare_teacher if live else None), recipe.batch_size, count, device),
                "stock": lambda: speed(bare_step(plain, recipe, device, stock_teacher if live else None), recipe.batch_size, count, device)}
    bare_teacher, stock_teacher = teacher.network, stock("resnet34").eval()

    batch = engine.EVALUATION_BATCH
    count = max(2, images // batch)
    stages = {
        "teacher training": training("resnet34", teacher_recipe),
        "scoring": {"ours": lambda: our_scoring(answering, count, device),
                    "bare": lambda: speed(bare_forward(teacher.network, device), batch, count, device),
                    "stock": lambda: speed(bare_forward(stock("resnet34"), device), batch, count, device)},
        "distillation, fixed pixels": training("resnet18", student_recipe, answering),
        "distillation, augmented, live teacher": training("resnet18", live_recipe, answering),
    }
    results = {}
    for name, ways in stages.items():
        rounds = [{way: run() for way, run in ways.items()} for _ in range(REPEATS)]
        results[name] = {way: round(statistics.median(r[way] for r in rounds), 1) for way in ways}
        results[name]["ratio"] = round(statistics.median(r["ours"] / r["bare"] for r in rounds), 3)
    count, network = max(2, images // live_recipe.batch_size), models.build("resnet18", CLASSES).to(device).network
    rounds = [{"ours": our_augmentation(live_recipe, count, device), "bare": speed(bare_step(network, live_recipe, device), live_recipe.batch_size, count, device)}
              for _ in range(REPEATS)]
    results["augmentation alone, in time of a ResNet-18 step"] = {
        **{way: round(statistics.median(r[way] for r in rounds), 1) for way in ("ours", "bare")},
        "ratio": round(statistics.median(r["bare"] / r["ours"] for r in rounds), 4)}
    return results


def of_run(folder):
    """What a run reached: images a second of teacher training, scoring, and distillation (the slowest and the fastest student)."""
    scored = [np.load(path) for path in sorted((folder / "scores").glob("*.npz"))]
    students = [json.loads(path.read_text())["images_per_second"] for path in sorted((folder / "students").glob("*.json"))
                if path.stem != "supervised"]
    return {"teacher training": json.loads((folder / "teacher.json").read_text())["images_per_second"],
            "scoring": sum(len(s["predicted"]) for s in scored) / sum(float(s["seconds"]) for s in scored),
            "distillation": [min(students), max(students)]}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    parser.add_argument("--images", type=int, default=4096, help="random images a measurement (default: 4096)")
    parser.add_argument("--run-dir", type=Path, help="show what this run reached as well")
    args = parser.parse_args()
    device = engine.pick_device(args.device)
    results = {"device": str(device), "threads": torch.get_num_threads(), "torch": torch.__version__, "images": args.images,
               "repeats": REPEATS, "stages": measure(device, args.images)}
    if args.run_dir:
        results["run"] = of_run(args.run_dir)
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
