"""Cross-entropy of the teacher's answer to its own prediction, -log max_c p_c: the noise-free case of the one-hot loss by
which Chen et al., "Learning Student Networks in the Wild" (CVPR 2021), choose unlabelled images.

    python cross_entropy.py
"""
import torch

import mms_threshold

KEEP = "<="


def score(logits, weight=None):
    """-log p of the predicted class, in nats. logits: (N, C) float; weight is not used. Returns (N,), at least 0."""
    return -torch.log_softmax(logits, dim=1).amax(1)


threshold = mms_threshold.threshold     # the mean of each class


if __name__ == "__main__":
    import transfer
    from run import command
    command(lambda argv: transfer.threshold_command("cross_entropy", __doc__, argv))
