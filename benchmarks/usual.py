"""The three KD rows of the reference recipe (balanced, mms, entropy) in this tool and written the usual way, on the same images.

The usual way: a DataLoader over image files with Pillow transforms in every pass and epoch, torchvision's networks as they come, a pass of
the teacher for each criterion, selection image by image in Python, and a live teacher in the training loop whose gradients are computed
too. Ours: packing (which is paid once for ever, and counted here), one pass, saved logits. Both train with the same steps; the selections are compared.

The teacher knows the built-in digits after one short training; the sources are the built-in letters and photographs as PNG files, or the
images below --folder.

    python benchmarks/usual.py --batch-size 64          # JSON on standard output
"""
import argparse
import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from torch.nn import functional as F
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import distill
import engine
import entropy
import mms_threshold
import models
import transfer
from files import UserError
from packing import cores
from run import RECIPES

ROWS = ("balanced", "mms", "entropy")
CPU = torch.device("cpu")


def make_teacher():
    """(teacher, confidence set) for the digits."""
    with tempfile.TemporaryDirectory() as folder:
        target = data.load_target("digits", folder)
        torch.manual_seed(0)
        teacher = models.build("resnet34", target.classes)
        recipe = dataclasses.replace(RECIPES["quick"].teacher, epochs=2)
        engine.train(teacher, target.train.images, np.arange(1000), engine.cross_entropy(target.train.labels, CPU), recipe, seed=0, device=CPU,
                     checkpoint=Path(folder) / "part", label="teacher")
        return teacher.eval(), np.array(target.train.images[1000:])


def write_files(folder, count):
    for name in ("glyphs", "photos"):
        images = data.load_source(name, folder / "data").images
        (folder / "files" / name).mkdir(parents=True)
        for number, pixels in enumerate(images[:: len(images) // (count // 2)][:count // 2]):
            Image.fromarray(pixels).save(folder / "files" / name / f"{number:05}.png")
    return folder / "files"


def usual_way(teacher, thresholds, files, bucket, recipe):
    """{"scoring", "selection", "distillation": seconds, "selected": {row: paths}, "images": that were distilled from}."""
    transform = v2.Compose([v2.Resize((32, 32)), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3)])
    dataset = torchvision.datasets.ImageFolder(files, transform)
    big = torchvision.models.resnet34(num_classes=len(teacher.classes)).eval()
    big.load_state_dict(teacher.network.state_dict())
    weight = big.fc.weight.detach()

    def scores(criterion):
        found = []
        for images, _ in torch.utils.data.DataLoader(dataset, recipe.batch_size, num_workers=cores()):
            with torch.no_grad():
                logits = big(images)
            for row in logits:
                z, order = row.sort(descending=True)
                if criterion == "mms":
                    value = ((z[0] - z[1]) / (weight[order[0]] - weight[order[1]]).norm()).item()
                else:
                    p = row.softmax(0)
                    value = -(p * p.clamp_min(1e-30).log()).sum().item()
                found.append((order[0].item(), value))
        return found
    took, selected, images = {"scoring": 0.0, "selection": 0.0, "distillation": 0.0}, {}, 0
    for row in ROWS:
        began = time.perf_counter()
        scored = scores("entropy" if row == "entropy" else "mms")
        took["scoring"] += time.perf_counter() - began
        began = time.perf_counter()
        buckets, chosen = {}, []
        for index, (label, value) in enumerate(scored):
            passes = row == "balanced" or (value >= thresholds["mms"][label] if row == "mms" else value <= thresholds["entropy"][label])
            if passes and len(buckets.setdefault(label, [])) < bucket:
                buckets[label].append(index)
                chosen.append(index)
        took["selection"] += time.perf_counter() - began
        selected[row] = [dataset.samples[index][0] for index in chosen]
        torch.manual_seed(0)
        student = torchvision.models.resnet18(num_classes=len(teacher.classes)).train()
        optimizer = torch.optim.SGD(student.parameters(), recipe.lr)
        loader = torch.utils.data.DataLoader(torch.utils.data.Subset(dataset, chosen), recipe.batch_size, shuffle=True, num_workers=cores(), drop_last=True)
        began = time.perf_counter()
        for _ in range(recipe.epochs):
            for batch, _ in loader:
                optimizer.zero_grad()
                loss = recipe.temperature ** 2 * F.kl_div(F.log_softmax(student(batch) / recipe.temperature, 1), F.softmax(big(batch) / recipe.temperature, 1), reduction="batchmean")
                loss.backward()
                optimizer.step()
                images += len(batch)
        took["distillation"] += time.perf_counter() - began
    return took | {"selected": selected, "images": images}


def our_way(teacher, thresholds, files, bucket, recipe, folder):
    """The same, "packing" besides."""
    began = time.perf_counter()
    source = data.load_source(f"files={files}", folder / "ours")
    took = {"packing": time.perf_counter() - began}
    began = time.perf_counter()
    fast = models.folded(teacher)
    candidates = transfer.join({"files": transfer.score_images(fast, source.images, criteria={"mms": mms_threshold, "entropy": entropy})})
    took["scoring"] = time.perf_counter() - began
    took["selection"], took["distillation"], selected, images = 0.0, 0.0, {}, 0
    for row in ROWS:
        began = time.perf_counter()
        chosen = transfer.select(row, candidates, thresholds, bucket)
        took["selection"] += time.perf_counter() - began
        selected[row] = [str(files / source.files[i]) for i in chosen]
        began = time.perf_counter()
        torch.manual_seed(0)
        student = models.build("resnet18", teacher.classes)
        pixels = source.images[chosen]
        training = engine.train(student, pixels, np.arange(len(chosen)), distill.fixed_objective(fast, pixels, recipe.temperature, CPU), recipe, seed=0,
                                device=CPU, checkpoint=folder / "part", label=row)
        images += training.images
        took["distillation"] += time.perf_counter() - began
    return took | {"selected": selected, "images": images}


def measure(batch_size, count=2000, transfer_size=640, epochs=RECIPES["reference"].student.epochs, folder=None):
    recipe = dataclasses.replace(RECIPES["reference"].student, epochs=epochs, batch_size=batch_size, lr=0.01)
    teacher, confidence = make_teacher()
    scores = transfer.score_images(models.folded(teacher), confidence, criteria={"mms": mms_threshold, "entropy": entropy})
    # So low that the rows differ and all are worth training on: what is measured is time.
    thresholds = {name: transfer.quantile_threshold(scores[name], scores["predicted"], 10, criterion.KEEP, 0.98)
                  for name, criterion in (("mms", mms_threshold), ("entropy", entropy))}
    with tempfile.TemporaryDirectory() as made:
        files = Path(folder) if folder else write_files(Path(made), count)
        usual = usual_way(teacher, thresholds, files, transfer_size // 10, recipe)
        ours = our_way(teacher, thresholds, files, transfer_size // 10, recipe, Path(made))
    total = {way: sum(value for key, value in found.items() if isinstance(value, float)) for way, found in (("usual", usual), ("ours", ours))}
    differing = {row: len(set(usual["selected"][row]) ^ set(ours["selected"][row])) for row in ROWS}
    sizes = {row: len(ours["selected"][row]) for row in ROWS}
    if usual["images"] != ours["images"] and not any(differing.values()):
        raise UserError(f"the two trained on {usual['images']:,} and {ours['images']:,} images")
    return {"batch_size": batch_size, "epochs": epochs, "selected": sizes, "selected_by_one_alone": differing,
            "distillation_images_per_second": {way: round(found["images"] / found["distillation"], 1) for way, found in (("usual", usual), ("ours", ours))},
            "seconds": {way: {key: round(value, 2) for key, value in found.items() if isinstance(value, float)} for way, found in (("usual", usual), ("ours", ours))},
            "times_faster": round(total["usual"] / total["ours"], 2)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=RECIPES["reference"].student.epochs)
    parser.add_argument("--folder", help="images in folders of any names, in place of the built-in ones")
    args = parser.parse_args()
    print(json.dumps(measure(args.batch_size, epochs=args.epochs, folder=args.folder), indent=2))


if __name__ == "__main__":
    main()
