"""Energy: log sum_c exp(z_c), the negative free energy at temperature 1 (Liu et al., arXiv 2010.03759).

    python energy.py
"""
import torch

import mms_threshold

KEEP = ">="


def score(logits, weight=None):
    """logsumexp of the logits. logits: (N, C) float; weight is not used. Returns (N,), at least the largest logit."""
    return torch.logsumexp(logits, dim=1)


threshold = mms_threshold.threshold     # the mean of each class


if __name__ == "__main__":
    import transfer
    from run import command
    command(lambda argv: transfer.threshold_command("energy", __doc__, argv))
