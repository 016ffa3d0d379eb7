"""--tensorboard: how a training goes, and what the network is shown, for those who have TensorBoard.

    python compile.py --tensorboard && tensorboard --logdir runs/cifar10/tensorboard

The optional package is loaded here alone. Without the flag nothing is written and nothing waits for the device.
"""
import torch
from torchvision.utils import make_grid

from files import is_first

SHOWN = 64      # images of a grid


class Board:
    """Writes into `folder`; folder None: nowhere. step: the one that a training goes on from; what an interrupted one wrote beyond it is not shown."""

    def __init__(self, folder, step=0):
        self.writer = None
        if folder is not None and is_first():
            from torch.utils.tensorboard import SummaryWriter
            self.writer = SummaryWriter(folder, purge_step=step or None)

    def losses(self, last, losses):
        """Of the steps up to `last`, [scalar tensors]."""
        if self.writer:
            for step, loss in enumerate(torch.stack(losses).tolist(), last + 1 - len(losses)):
                self.writer.add_scalar("loss", loss, step)

    def epoch(self, step, **figures):
        """Figures after an epoch, whose last step is `step`; None is not written."""
        if self.writer:
            for name, value in figures.items():
                if value is not None:
                    self.writer.add_scalar(name, value, step)

    def views(self, step, pixels):
        """What the network was shown. pixels: (N, H, W, 3) uint8."""
        if self.writer:
            self.writer.add_image("views", make_grid(pixels[:SHOWN].permute(0, 3, 1, 2).cpu(), nrow=8, padding=1), step)

    def close(self):
        if self.writer:
            self.writer.close()
