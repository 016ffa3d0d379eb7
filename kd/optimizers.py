"""What moves the weights: SGD, and the schedule of its rate."""
import torch
from torch.optim import lr_scheduler

SCHEDULES = {       # functions of an optimizer, its peak rate and the number of steps
    "constant": lambda optimizer, lr, steps: lr_scheduler.ConstantLR(optimizer, 1.0),
    # a single step would be the last of a cycle, at a rate of 0
    "onecycle": lambda optimizer, lr, steps: lr_scheduler.OneCycleLR(
        optimizer, lr, steps, cycle_momentum=False) if steps > 1 else (
        lr_scheduler.ConstantLR(optimizer, 1.0)),
    "cosine": lambda optimizer, lr, steps: lr_scheduler.CosineAnnealingLR(optimizer, steps),
    # as Tian et al. (arXiv 1910.10699) train theirs: 150, 180 and 210 of 240 epochs
    "multistep": lambda optimizer, lr, steps: lr_scheduler.MultiStepLR(
        optimizer, [steps * eighths // 8 for eighths in (5, 6, 7)])}


def optimizer_of(network, recipe, steps):
    """(optimizer, scheduler) of a kd.settings.Recipe over that many steps."""
    optimizer = torch.optim.SGD(
        network.parameters(), recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay,
        nesterov=recipe.momentum > 0, fused=True)
    return optimizer, SCHEDULES[recipe.schedule](optimizer, recipe.lr, steps)
