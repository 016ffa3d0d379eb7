"""The fast selection against one written the slow way, on random scores."""
import math

import numpy as np
import pytest

from transfer import Rules, even_weights, evenness, join, select

HIGH = {"mms": True, "entropy": False}
pytestmark = pytest.mark.quick


def random_scores(rng, counts, classes, levels):
    """Scores of a few levels only, so that ties abound; the last class is never predicted."""
    return {name: {"predicted": rng.integers(0, classes - 1, count), "index": np.arange(count),
                   "mms": rng.integers(0, levels, count).astype(np.float32),
                   "entropy": rng.integers(0, levels, count).astype(np.float32)}
            for name, count in zip(("cifar100", "svhn", "tinyimagenet", "noise"), counts,
                                   strict=False)}


def rules(bucket, classes=6, **more):
    return Rules(bucket, classes, HIGH, **more)


def select_slowly(scores, approach, threshold, rules):
    """One group after the other, one image after the other. Returns positions in the pool."""
    groups, position, high = {}, 0, rules.keeps_high
    for source, columns in scores.items():
        for index, label in enumerate(columns["predicted"].tolist()):
            score = columns[approach][index] if approach in high else 0.0
            badness = -score if high.get(approach) else score
            limit = threshold[approach][label] if approach in high else 0.0
            passing = badness <= (-limit if high.get(approach) else limit)
            if approach == "eats":
                passing = source in ("svhn", "tinyimagenet")
            groups.setdefault(label if rules.balance else 0, []).append(
                (position, badness, passing))
            position += 1
    chosen, room = [], rules.bucket * (1 if rules.balance else rules.classes)
    for members in groups.values():
        passing, least = [m for m in members if m[2]], math.ceil(rules.floor * room)
        if approach in high and len(passing) < least:
            best = sorted(members, key=lambda m: (m[1], m[0]))[:least]
            passing = sorted(set(passing) | set(best))
        if rules.fill == "best" and approach in high:
            passing = sorted(passing, key=lambda m: (m[1], m[0]))
        chosen += [m[0] for m in passing[:room]]
    return sorted(chosen)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("balance", [True, False])
@pytest.mark.parametrize("floor", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("fill", ["first", "best"])
@pytest.mark.parametrize("approach", ["mms", "entropy", "balanced", "eats"])
def test_selection_equals_the_slow_one(approach, fill, floor, balance, seed):
    rng = np.random.default_rng(seed)
    scores = random_scores(rng, rng.integers(1, 60, 4), 6, levels=8)
    thresholds = {name: rng.integers(0, 9, 6).astype(float) for name in HIGH}
    thresholds["mms"][2] = thresholds["entropy"][2] = np.nan
    given = rules(int(rng.integers(1, 12)), fill=fill, floor=floor, balance=balance)
    chosen, _ = select(approach, join(scores), thresholds, given)
    assert chosen.tolist() == select_slowly(scores, approach, thresholds, given)


def test_an_image_without_a_score_is_never_taken():
    scores = {"a": {"predicted": np.zeros(3, int), "index": np.arange(3),
                    "mms": np.array([np.nan, 1.0, 3.0], np.float32)}}
    for floor in (0.0, 1.0):
        chosen, _ = select("mms", join(scores), {"mms": np.array([2.0])}, rules(3, floor=floor))
        assert 0 not in chosen


def test_random_takes_as_many_as_mms_without_threshold_or_balance():
    candidates = join(random_scores(np.random.default_rng(0), (300, 200), 4, levels=50))
    thresholds = {"mms": np.full(4, 25.0), "entropy": np.full(4, 25.0)}
    mms, _ = select("mms", candidates, thresholds, rules(40, 4))
    chosen, again, other = (select("random", candidates, thresholds, rules(40, 4, seed=seed))[0]
                            for seed in (3, 3, 4))
    assert len(chosen) == len(mms) == len(set(chosen.tolist()))
    assert (candidates.scores["mms"][mms] >= 25).all()
    assert (candidates.scores["mms"][chosen] < 25).any()
    assert chosen.tolist() == again.tolist() != other.tolist()


@pytest.mark.parametrize("approach", ["all", "even", "weighted"])
def test_all_is_everything(approach):
    candidates = join(random_scores(np.random.default_rng(0), (30, 20), 4, levels=5))
    assert select(approach, candidates, {}, rules(3, 4))[0].tolist() == list(range(50))


def test_evenness_counts_the_classes_that_answers_spread_over():
    assert evenness(np.repeat([0, 3, 4], 7)) == pytest.approx(3)
    assert evenness(np.full(9, 2)) == pytest.approx(1)
    assert evenness(np.repeat([0, 1], [90, 10])) == pytest.approx(1.384, abs=1e-3)


def test_even_weights_give_predicted_classes_equal_shares_up_to_a_limit():
    predicted = np.repeat([0, 2, 5], [60, 30, 1])       # the others are never predicted
    weights = even_weights(predicted)
    assert weights[0] * 60 == pytest.approx(91 / 3) and weights[60] * 30 == pytest.approx(91 / 3)
    assert weights[90] == 8


def test_chance_fills_a_class_from_all_sources_alike_and_from_what_passes_alone():
    scores = random_scores(np.random.default_rng(0), (900, 300), 4, levels=8)
    candidates, thresholds = join(scores), {"mms": np.full(4, 4.0)}
    chosen, _ = select("mms", candidates, thresholds, rules(50, 4, fill="random"))
    again, _ = select("mms", candidates, thresholds, rules(50, 4, fill="random"))
    other, _ = select("mms", candidates, thresholds, rules(50, 4, fill="random", seed=1))
    assert chosen.tolist() == again.tolist() != other.tolist()
    assert np.bincount(candidates.predicted[chosen]).tolist() == [50, 50, 50]
    assert (candidates.scores["mms"][chosen] >= 4).all()
    assert 90 < (candidates.source[chosen] == 0).sum() < 135       # three quarters are there
