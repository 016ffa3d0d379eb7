"""Recipes: how networks are trained, and what an image must show to be selected."""
from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """How one network is trained: for `epochs` passes, or for `steps` batches where not 0."""

    epochs: int
    batch_size: int
    lr: float                       # peak learning rate
    momentum: float = 0.0           # Nesterov's, where it is not 0
    weight_decay: float = 0.0
    schedule: str = "constant"      # or onecycle, cosine, multistep
    augment: str = "none"           # or some of AUGMENTATIONS, joined by commas
    temperature: float = 1.0        # of the KD loss
    steps: int = 0
    optimizer: str = "sgd"          # or muon (kd/muon.py)
    ema: float = 0.0                # decay of the average of weights that it ends as
    amp: bool | None = None         # bfloat16 where it pays; None: on cards that have it
    compile: bool | None = None     # torch.compile; None: on CUDA, where much is left to train

    def steps_of_epoch(self, count):
        return max(1, count // self.batch_size)

    def all_steps(self, count):
        return self.steps or self.epochs * self.steps_of_epoch(count)


# Peak rates of `best`'s students, by what they start from.
FROM_RANDOM, FROM_TRAINED = {"muon": 0.1, "sgd": 0.2}, 0.05
SGD = dict(momentum=0.9, weight_decay=5e-4, schedule="onecycle")

# Defaults by recipe. How the published teacher was trained is not stated: `reference` trains it as
# is usual for CIFAR. The published student: constant rate, no augmentation, T = 10.
RECIPES = {
    "reference": dict(
        teacher_epochs=15, teacher_batch_size=128, teacher_lr=0.1, teacher_augment="crop,flip",
        epochs=20, steps=0, batch_size=64, lr=0.1, optimizer="sgd", momentum=0.0, weight_decay=0.0,
        schedule="constant", augment="none", temperature=10.0, ema=0.0,
        student_weights="none", threshold="published", floor=0.0, fill="first"),
    "best": dict(
        teacher_epochs=24, teacher_batch_size=128, teacher_lr=0.1, teacher_augment="crop,flip",
        epochs=40, steps=6_000, batch_size=256, lr=None, optimizer=None, **SGD,
        augment="crop,flip", temperature=4.0, ema=0.0, student_weights="auto", threshold=0.9,
        floor=1.0, fill="random"),
}
RECIPES["quick"] = RECIPES["best"] | dict(
    teacher_epochs=12, teacher_batch_size=64, teacher_lr=0.02, teacher_augment="crop", epochs=16,
    steps=352, batch_size=64, lr=0.1, optimizer="sgd", augment="none", student_weights="none")
# For pools of another domain: the same with CutMix, from random weights.
RECIPES["far"] = RECIPES["best"] | dict(
    augment="crop,flip,cutmix", student_weights="none")
