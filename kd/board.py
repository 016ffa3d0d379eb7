"""How a training goes and what the network is shown, on TensorBoard.

Another board is a writer with add_scalar(name, value, step), add_image(name, pixels (3, H, W),
step) and close(), made in open_board.
"""
import torch
from torchvision.utils import make_grid

from kd.files import is_first


def open_board(kind, folder, step=0):
    """A Board below `folder`; of kind None it writes nothing. step: where the training resumes;
    what an interrupted one wrote from there on is not shown."""
    if kind is None or not is_first():
        return Board(None)
    from torch.utils.tensorboard import SummaryWriter
    return Board(SummaryWriter(folder, purge_step=step or None))


class Board:
    """Without a writer nothing is written, and nothing waits for the device."""

    def __init__(self, writer):
        self.writer = writer

    def losses(self, last, losses):
        """Of the steps up to `last`, [scalar tensors]."""
        values = torch.stack(losses).tolist() if self.writer else ()
        for step, loss in enumerate(values, last + 1 - len(losses)):
            self.writer.add_scalar("loss", loss, step)

    def epoch(self, step, **figures):
        """Figures after an epoch, whose last step is `step`; None is not written."""
        for name, value in figures.items():
            if self.writer and value is not None:
                self.writer.add_scalar(name, value, step)

    def views(self, step, pixels):
        """What the network was shown. pixels: (N, H, W, 3) uint8."""
        if self.writer:
            grid = make_grid(pixels[:64].permute(0, 3, 1, 2).cpu(), padding=1)
            self.writer.add_image("views", grid, step)

    def close(self):
        if self.writer:
            self.writer.close()
