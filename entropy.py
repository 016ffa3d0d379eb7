"""Entropy: how little the teacher's answer is spread over the classes.

    H(x) = -sum_c p_c log p_c,   p = softmax(z)             (in nats; p log p is 0 at p = 0)

In:  the run folder's teacher and confidence set.
Out: thresholds.json, scores/confidence.npz.

    python entropy.py
"""
if __name__ == "__main__":      # --help and wrong flags need no PyTorch
    from kd.flags import parser_of
    parser_of("entropy", __doc__).parse_args()

import numpy as np
import torch

KEEP = "<="         # an image is kept when its score is <= the threshold of its predicted class
LOWEST_SHARE = 10   # the threshold is the mean over the lowest tenth


def score(logits, weight=None):
    """Entropy of a batch, in nats. logits: (N, C) float; weight is not used. Returns (N,), 0 for
    a one-hot output."""
    log_p = torch.log_softmax(logits, dim=1)
    p = log_p.exp()
    return -torch.where(p > 0, p * log_p, 0.0).sum(1).clamp_max(0.0)


def threshold(scores, predicted, classes):
    """The mean over the lowest-entropy tenth (at least one) of the confidence-set images put in
    each class.

    scores: (N,) float32; predicted: (N,) int64. Returns (classes,) float64, NaN for a class that
    is never predicted: it has no threshold, and no score passes NaN. """
    thresholds = np.full(classes, np.nan)
    for label in np.unique(predicted):
        members = np.sort(scores[predicted == label]).astype(np.float64)
        thresholds[label] = members[:max(1, len(members) // LOWEST_SHARE)].mean()
    return thresholds


if __name__ == "__main__":
    import data
    from kd.command import command
    from kd.scoring import threshold_command
    command(lambda argv: threshold_command("entropy", "entropy", __doc__, data, argv))
