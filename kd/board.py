"""How a training goes and what the network is shown, on TensorBoard or Weights & Biases.

A board is written through a writer with add_scalar(name, value, step), add_image(name, pixels (3,
H, W), step) and close(), made in WRITERS.
"""
import secrets
from pathlib import Path

from torchvision.utils import make_grid

from kd.files import UserError, first_line, is_first, write_text


def _tensorboard(folder, step):
    from torch.utils.tensorboard import SummaryWriter
    return SummaryWriter(folder, purge_step=step or None)


class _WandbWriter:
    """A run of wandb (WANDB_PROJECT, WANDB_MODE). A resumed training continues it: its id is kept
    in the folder."""

    def __init__(self, folder, step):
        import wandb
        folder, self.image = Path(folder).absolute(), wandb.Image
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "id").exists():
            write_text(folder / "id", secrets.token_hex(8))
        try:
            self.run = wandb.init(dir=folder, name=f"{folder.parents[1].name} {folder.name}",
                                  id=(folder / "id").read_text(), resume="allow")
        except wandb.Error as error:        # mostly nobody has logged in
            raise UserError(f"--wandb: {first_line(error)}") from None

    def add_scalar(self, name, value, step):
        self.run.log({name: value}, step=step)

    def add_image(self, name, pixels, step):
        self.run.log({name: self.image(pixels.permute(1, 2, 0).numpy())}, step=step)

    def close(self):
        self.run.finish()


WRITERS = {"tensorboard": _tensorboard, "wandb": _WandbWriter}


class Board:
    """Of {kind: folder}; without any it writes nothing. step: where the training resumes; what an
    interrupted one wrote from there on TensorBoard does not show."""

    def __init__(self, folders, step=0):
        self.writers = [WRITERS[kind](folder, step) for kind, folder in folders.items()
                        if is_first()]

    def figures(self, step, **figures):
        """Numbers at a step, by name; None is not written."""
        for name, value in figures.items():
            for writer in self.writers if value is not None else ():
                writer.add_scalar(name, value, step)

    def views(self, step, pixels):
        """What the network was shown. pixels: (N, H, W, 3) uint8."""
        for writer in self.writers:
            grid = make_grid(pixels[:64].permute(0, 3, 1, 2).cpu(), padding=1)
            writer.add_image("views", grid, step)

    def close(self):
        for writer in self.writers:
            writer.close()
