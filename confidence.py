"""Confidence: the largest probability of the teacher's answer (the baseline of Hendrycks & Gimpel, arXiv 1610.02136).

    python confidence.py
"""
import torch

import mms_threshold

KEEP = ">="


def score(logits, weight=None):
    """max_c p_c, p = softmax(z). logits: (N, C) float; weight is not used. Returns (N,), in [1 / C, 1]."""
    return torch.softmax(logits, dim=1).amax(1)


threshold = mms_threshold.threshold     # the mean of each class


if __name__ == "__main__":
    import transfer
    from run import command
    command(lambda argv: transfer.threshold_command("confidence", __doc__, argv))
