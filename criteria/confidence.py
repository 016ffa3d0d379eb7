"""Confidence: the largest probability of the teacher's answer (the baseline of Hendrycks &
Gimpel, arXiv 1610.02136).

    python transfer.py --approach confidence
"""
import torch

from mms_threshold import threshold  # noqa: F401 - the mean of each class

KEEP = ">="


def score(logits, weight=None):
    """max_c p_c, p = softmax(z). logits: (N, C) float; weight is not used. Returns (N,), in [1 /
    C, 1]."""
    return torch.softmax(logits, dim=1).amax(1)
