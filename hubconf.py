"""The networks of this tool for torch.hub, which looks for them here.

    network = torch.hub.load("OWNER/REPOSITORY", "student", "runs/cifar10/students/mms.pt")
"""
from kd.checkpoints import load
from kd.export import Standalone

dependencies = ["torch", "torchvision", "PIL", "filelock", "requests", "tqdm"]


def student(path, arch=""):
    """The network of a checkpoint of this tool, student or teacher, in eval mode: (N, 3, H, W)
    float32 pixels in [0, 1] -> logits (N, C). Resize and normalisation are inside; `classes` has
    the names. Raises UserError where the file holds nothing of the kind.

    arch: FILE.py:FACTORY, or hub:..., where the network is code that the file can't hold.
    """
    return Standalone(load(path, arch)).eval()
