"""Energy: log sum_c exp(z_c), the negative free energy at temperature 1 (Liu et al., arXiv
2010.03759).

    python transfer.py --approach energy
"""
import torch

from mms_threshold import threshold  # noqa: F401 - the mean of each class

KEEP = ">="


def score(logits, weight=None):
    """logsumexp of the logits. logits: (N, C) float; weight is not used. Returns (N,), at least
    the largest logit."""
    return torch.logsumexp(logits, dim=1)
