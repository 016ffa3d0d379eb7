"""Three KD rows of the reference recipe, the same images and steps, the usual way and in this tool.

    usual   Pillow transforms in every pass and epoch, torchvision's networks, a pass of the teacher
            per criterion, selection in Python, a live teacher whose gradients are computed too
    here    packing, which is paid once for ever and counted here, one pass, saved logits

    python benchmarks/usual.py
"""
import sys
import tempfile
import time
from collections import Counter, defaultdict
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torchvision
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import distill
import transfer
from benchmarks.measuring import arguments, as_source, table, trained
from kd import models, scoring
from kd.engine import CPU
from kd.packing import cores
from kd.settings import resolve
from kd.thresholds import share_threshold
from kd.training import cross_entropy

ROWS = ("balanced", "mms", "entropy")
CRITERIA = {name: each for name, each in scoring.load_criteria(resolve({})).items() if name in ROWS}
RULES = transfer.Rules(64, 10, {name: each.keeps_high for name, each in CRITERIA.items()})


def prepared(settings, count, device=CPU):
    """A teacher of the digits after one short training, thresholds so low that the rows differ and
    all are worth training on, and a folder of `count` letters and photographs each, as PNG."""
    target, files = data.load_target(settings).train, Path(settings.data_dir, "files")
    torch.manual_seed(0)
    teacher = trained(models.build("resnet34", target.classes), target.images[:1000],
                      cross_entropy(target.labels, device), settings.teacher_recipe, device).eval()
    real, _ = scoring.score_batches(teacher, as_source(target.images[1000:]), None, CRITERIA,
                                    device, "confidence set")
    thresholds = {name: share_threshold(real[name], real["predicted"], 10, high, 0.98)
                  for name, high in RULES.keeps_high.items()}
    for name in ("glyphs", "photos"):
        (files / name).mkdir(parents=True)
        images = data.load_source(replace(settings, limit=count), name).images
        for number, pixels in enumerate(images):
            Image.fromarray(pixels).save(files / name / f"{number:05}.png")
    return teacher, thresholds, files


def usual_scores(teacher, dataset, batch_size, criterion):
    """[(class, score)] of all images, by one criterion."""
    found, weight = [], teacher.fc.weight.detach().cpu()
    for images, _ in DataLoader(dataset, batch_size, num_workers=cores()):
        with torch.no_grad():
            logits = teacher(images.to(teacher.fc.weight.device)).cpu()
        for row in logits:
            z, order = row.sort(descending=True)
            if criterion != "entropy":
                value = ((z[0] - z[1]) / (weight[order[0]] - weight[order[1]]).norm()).item()
            else:
                p = row.softmax(0)
                value = -(p * p.clamp_min(1e-30).log()).sum().item()
            found.append((order[0].item(), value))
    return found


def usual_selection(row, scored, thresholds):
    taken, chosen = Counter(), []
    for index, (label, value) in enumerate(scored):
        passes = row == "balanced" or (value >= thresholds["mms"][label] if row == "mms" else
                                       value <= thresholds["entropy"][label])
        if passes and taken[label] < RULES.bucket:
            taken[label] += 1
            chosen.append(index)
    return chosen


def usual_distillation(teacher, dataset, recipe):
    torch.manual_seed(0)
    device = teacher.fc.weight.device
    student = torchvision.models.resnet18(num_classes=10).to(device).train()
    optimizer = torch.optim.SGD(student.parameters(), recipe.lr)
    loader = DataLoader(dataset, recipe.batch_size, True, num_workers=cores(), drop_last=True)
    for _ in range(recipe.epochs):
        for batch, _ in loader:
            batch = batch.to(device)
            optimizer.zero_grad()
            soft = F.softmax(teacher(batch) / recipe.temperature, 1)
            answer = F.log_softmax(student(batch) / recipe.temperature, 1)
            loss = F.kl_div(answer, soft, reduction="batchmean")
            (recipe.temperature ** 2 * loss).backward()
            optimizer.step()


def measure(settings, recipe, teacher, thresholds, files, device=CPU):
    """({work: {way: seconds}}, {row: images that both ways, and that one alone selected})."""
    took, selected = defaultdict(Counter), {}

    @contextmanager
    def timed(work, way):
        began = time.perf_counter()
        yield
        took[work][way] += time.perf_counter() - began
    dataset = torchvision.datasets.ImageFolder(files, v2.Compose([
        v2.Resize((32, 32)), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True),
        v2.Normalize([0.5] * 3, [0.5] * 3)]))
    big = torchvision.models.resnet34(num_classes=10).to(device).eval()
    big.load_state_dict(teacher.network.state_dict())
    with timed("packing", "here"):
        source = data.load_source(settings, f"files={files}")
    with timed("scoring", "here"):
        folded = models.folded(teacher.cpu()).to(device)
        scores, _ = scoring.score_batches(folded, source, None, CRITERIA, device, "files")
        candidates = scoring.join({"files": scores})
    for row in ROWS:
        with timed("scoring", "usual"):
            scored = usual_scores(big, dataset, recipe.batch_size, row)
        with timed("selection", "usual"):
            theirs = usual_selection(row, scored, thresholds)
        with timed("selection", "here"):
            ours = transfer.select(row, candidates, thresholds, RULES)
        with timed("distillation", "usual"):
            usual_distillation(big, Subset(dataset, theirs), recipe)
        with timed("distillation", "here"):
            torch.manual_seed(0)
            pixels, student = source.images[ours], models.build("resnet18", teacher.classes)
            objective = distill.fixed_objective(folded, pixels, recipe.temperature, device)
            trained(student, pixels, objective, recipe, device)
        selected[row] = len({*theirs} & {*ours}), len({*theirs} ^ {*ours})
    return took, selected


def compare(device, batch_sizes, epochs, count):
    """The tables for batches of these sizes; count: images of each source."""
    for batch_size in batch_sizes:
        recipe = replace(resolve({}).student_recipe(), lr=0.01, batch_size=batch_size,
                         epochs=epochs)
        with tempfile.TemporaryDirectory() as folder:
            settings = resolve({"target": "digits", "data_dir": folder, "teacher_epochs": 2})
            took, selected = measure(settings, recipe, *prepared(settings, count, device), device)
        took["all"] = sum(took.values(), Counter())
        rows = [[work, each["usual"], each["here"], each["usual"] / each["here"]]
                for work, each in took.items()]
        images = recipe.epochs * sum(both - both % batch_size for both, _ in selected.values())
        rows.append(["images per second in distillation", *(images / each for each in rows[3][1:3]),
                     rows[3][3]])
        table(f"Seconds of three KD rows, batches of {batch_size}",
              ["", "usual", "here", "times faster"], rows)
        table("Images that are selected", list(selected), [[
            f"{both} by both, {one} by one alone" for both, one in selected.values()]])


def main():
    compare(CPU, *((16,), 1, 50) if arguments(__doc__).trial else ((64, 256), 20, 1000))


if __name__ == "__main__":
    main()
