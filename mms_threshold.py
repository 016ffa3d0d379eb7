"""Minimal Margin Score: how far an image is from the boundary between its two likeliest classes.

With z the logits, a and b the two largest and w the rows of the last linear layer,

    MMS(x) = (z_a - z_b) / ||w_a - w_b||_2                  (Weinstein et al., arXiv 1911.06996)

is the distance to the boundary between a and b in the space of the last features. The paper keeps
small margins, to find what is worth labelling; here large ones are kept, where the teacher is
sure.

In:  the run folder's teacher and confidence set (--calibrate sources: the sources).
Out: thresholds.json, scores/confidence.npz (scores/<source>.npz).

    python mms_threshold.py
"""
if __name__ == "__main__":      # --help and wrong flags need no PyTorch
    from kd.flags import parser_of
    parser_of("mms_threshold", __doc__).parse_args()

import functools

import numpy as np
import torch

KEEP = ">="     # an image is kept when its score is >= the threshold of its predicted class


def score(logits, weight):
    """MMS of a batch. logits: (N, C) float; weight: (C, D), the rows of the last linear layer, or
    None where there is no such layer: then it is the plain margin z_a - z_b. Returns (N,)."""
    (first, second), (a, b) = (pair.unbind(1) for pair in logits.topk(2, dim=1))
    if weight is None:
        return first - second
    distance = torch.linalg.vector_norm(weight[a] - weight[b], dim=1)
    margin = (first - second) / distance.clamp_min(torch.finfo(logits.dtype).tiny)
    if _has_equal_rows(weight) and (parallel := (distance == 0) & (first > second)).any():
        # No boundary lies between equal rows: the nearest other one counts.
        others = torch.cdist(weight[a[parallel]], weight,
                             compute_mode="donot_use_mm_for_euclid_dist")   # 0 from equal rows
        reached = (first[parallel, None] - logits[parallel]) / others
        margin[parallel] = reached.where(others > 0, torch.inf).amin(1)
    return margin


@functools.lru_cache(1)
def _has_equal_rows(weight):
    """Asked once, since a look at each batch would wait for the device."""
    return len(weight.cpu().unique(dim=0)) < len(weight)


def threshold(scores, predicted, classes):
    """The mean score of the confidence-set images that the teacher puts in each class.

    scores: (N,) float32; predicted: (N,) int64. Returns (classes,) float64, NaN for a class that
    is never predicted: it has no threshold, and no score passes NaN. """
    count = np.bincount(predicted, minlength=classes)
    total = np.bincount(predicted, weights=scores, minlength=classes)
    return np.divide(total, count, out=np.full(classes, np.nan), where=count > 0)


if __name__ == "__main__":
    import data
    from kd.command import command
    from kd.scoring import threshold_command
    command(lambda argv: threshold_command("mms", "mms_threshold", __doc__, data, argv))
