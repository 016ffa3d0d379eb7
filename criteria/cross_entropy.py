"""Cross-entropy of the teacher's answer to its own prediction, -log max_c p_c: the noise-free
case of the one-hot loss by which Chen et al., "Learning Student Networks in the Wild" (CVPR
2021), choose unlabelled images.

    python transfer.py --approach cross_entropy
"""
import torch

from mms_threshold import threshold  # noqa: F401 - the mean of each class

KEEP = "<="


def score(logits, weight=None):
    """-log p of the predicted class, in nats. logits: (N, C) float; weight is not used. Returns
    (N,), at least 0."""
    return -torch.log_softmax(logits, dim=1).amax(1)
