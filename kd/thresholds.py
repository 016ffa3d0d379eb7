"""Thresholds that are no criterion's own, and what passes one."""
import math

import numpy as np


def share_threshold(scores, predicted, classes, keeps_high, share):
    """The score that the surest `share` of the images of each class reach, at least one of them.
    (C,) float64, NaN for a class without images; scores that are NaN are left out.

    Up to one image of the class it is the score at which class-conditional conformal prediction
    keeps an image with a level of 1 - share (Vovk, 2012)."""
    thresholds, scored = np.full(classes, np.nan), ~np.isnan(scores)
    for label in np.unique(predicted[scored]):
        ordered = np.sort(scores[scored & (predicted == label)])
        count = math.ceil(share * len(ordered))
        thresholds[label] = ordered[-count] if keeps_high else ordered[count - 1]
    return thresholds


def passes(scores, predicted, thresholds, keeps_high):
    """(N,) bool: whether each score reaches the threshold of its class. An exact hit does, NaN
    never does."""
    limit = thresholds[predicted]
    return scores >= limit if keeps_high else scores <= limit
