"""The fast selection against one written the slow way, on random scores; matched pools."""
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import nn

from kd import matching
from kd.classifier import Classifier
from kd.matching import directions, draw, gap, match, watched
from kd.scoring import join
from transfer import Rules, even_weights, evenness, report_pool, select

HIGH = {"mms": True, "entropy": False}
pytestmark = pytest.mark.quick


def random_scores(rng, counts, classes, levels):
    """Scores of a few levels only, so that ties abound, half of them missing; the last class is
    never predicted."""
    def drawn(count):
        return np.where(rng.random(count) < 0.5, np.nan, rng.integers(0, levels, count))
    return {name: {"predicted": rng.integers(0, classes - 1, count), "index": np.arange(count),
                   "mms": drawn(count), "entropy": drawn(count)}
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
            scored = [m for m in members if not math.isnan(m[1])]
            best = sorted(scored, key=lambda m: (not m[2], m[1], m[0]))[:least]
            passing = sorted(set(passing) | set(best))
        if rules.fill == "best" and approach in high:
            passing = sorted(passing, key=lambda m: (not m[2], m[1], m[0]))
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
    chosen = select(approach, join(scores), thresholds, given)
    assert chosen.tolist() == select_slowly(scores, approach, thresholds, given)


@pytest.mark.parametrize("approach", ["all", "even", "weighted"])
def test_all_is_everything(approach):
    candidates = join(random_scores(np.random.default_rng(0), (30, 20), 4, levels=5))
    assert select(approach, candidates, {}, rules(3, 4)).tolist() == list(range(50))


def test_evenness_counts_the_classes_that_answers_spread_over():
    assert evenness(np.repeat([0, 3, 4], 7)) == pytest.approx(3)
    assert evenness(np.full(9, 2)) == pytest.approx(1)
    assert evenness(np.repeat([0, 1], [90, 10])) == pytest.approx(1.384, abs=1e-3)


def test_even_weights_give_predicted_classes_equal_shares_up_to_a_limit():
    predicted = np.repeat([0, 2, 5], [60, 30, 1])       # the others are never predicted
    weights = even_weights(predicted)
    assert weights[0] * 60 == pytest.approx(91 / 3) and weights[60] * 30 == pytest.approx(91 / 3)
    assert weights[90] == 8


def chosen_by(approach, candidates, thresholds, **more):
    """What is chosen, when what is drawn is drawn again, and once more otherwise."""
    chosen, again, other = (select(approach, candidates, thresholds,
                                   rules(50, 4, seed=seed, **more)) for seed in (0, 0, 1))
    assert chosen.tolist() == again.tolist() != other.tolist()
    assert len(set(chosen.tolist())) == len(chosen)
    return chosen


def test_chance_fills_a_class_from_all_sources_alike_and_from_what_passes_alone():
    candidates = join(random_scores(np.random.default_rng(0), (900, 300), 4, levels=8))
    thresholds = {"mms": np.full(4, 4.0)}
    chosen = chosen_by("mms", candidates, thresholds, fill="random")
    assert np.bincount(candidates.predicted[chosen]).tolist() == [50, 50, 50]
    assert (candidates.scores["mms"][chosen] >= 4).all()
    assert 90 < (candidates.source[chosen] == 0).sum() < 135       # three quarters are there
    # random takes as many, without threshold or balance.
    drawn = chosen_by("random", candidates, thresholds)
    assert len(drawn) == len(chosen) and (candidates.scores["mms"][drawn] < 4).any()
    assert len(set(np.bincount(candidates.predicted[drawn]))) > 1


def pool(count=400, directions=3):
    return np.random.default_rng(0).normal(0.4, 1, (count, directions))


# Of 400 images no 300 reach the target: the weights come as near as the cap lets them.
@pytest.mark.parametrize("size, left", [(40, 0.1), (150, 0.1), (300, 0.5)])
def test_weights_have_mean_one_keep_the_cap_and_bring_the_mean_to_the_target(size, left):
    values = pool()
    weights = match(values, size)
    assert weights.mean() == pytest.approx(1, abs=1e-3)
    assert weights.min() >= 0 and weights.max() <= len(values) / size + 1e-9
    assert gap(values, weights) < left * gap(values)


def test_few_wanted_images_of_a_far_pool_are_found():
    """Where nearly all weights are at the cap or next to 0."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(3000, 60)) * np.linspace(1, 0.05, 60) + np.linspace(3, 0, 60)
    weights = match(values, 30)
    assert weights.mean() == pytest.approx(1, abs=1e-3)
    assert abs(len(draw(weights, 30, 0)) - 30) <= 1


def test_weights_are_the_most_even_ones():
    values, size = pool(60, 2), 30
    weights = match(values, size)
    reached = weights @ values / len(values)
    slow = minimize(lambda w: (w * np.log(np.maximum(w, 1e-12))).sum(), np.ones(60),
                    bounds=[(0, 2)] * 60, method="SLSQP", options={"maxiter": 300}, constraints=[
                        {"type": "eq", "fun": lambda w: w.mean() - 1},
                        {"type": "eq", "fun": lambda w: w @ values / 60 - reached}]).x
    np.testing.assert_allclose(weights, slow, atol=0.02)


def test_a_set_as_large_as_the_pool_is_the_pool():
    assert match(pool(), 400).tolist() == [1.0] * 400
    assert draw(np.ones(400), 400, 0).tolist() == list(range(400))


def test_the_weights_of_a_large_pool_follow_from_a_part_of_it(monkeypatch):
    values = pool(40_000)
    whole = match(values, 16_000)
    monkeypatch.setattr(matching, "SOLVED", 10_000)
    part = match(values, 16_000)
    assert not np.array_equal(part, whole) and np.abs(part - whole).max() < 0.1
    assert part.mean() == pytest.approx(1, abs=0.02) and part.max() <= 2.5
    assert gap(values, part) < 0.1 * gap(values)
    assert abs(len(draw(part, 16_000, 0)) - 16_000) <= 1


def test_images_are_drawn_as_often_as_they_weigh_and_none_twice():
    weights = np.random.default_rng(1).uniform(0, 2, 300)
    counts = np.zeros(300)
    for seed in range(2000):
        chosen = draw(weights, 100, seed)
        assert len(chosen) in (99, 100, 101) and len(set(chosen.tolist())) == len(chosen)
        counts[chosen] += 1
    np.testing.assert_allclose(counts / 2000, weights / weights.sum() * 100, atol=0.05)


def test_what_a_batch_norm_remembers_is_the_origin():
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4, momentum=None)
    network, images = nn.Sequential(norm), torch.randn(64, 4, 5, 5) * 3 + 2
    network.train()(images)
    with watched(network.eval()) as shown:
        network(images)
        found = shown()
    assert found.shape == (64, 8)       # the mean and the mean square of each channel
    torch.testing.assert_close(found.mean(0), torch.zeros(8), atol=2e-3, rtol=0)


def test_directions_keep_the_distance_of_the_pool_from_the_target_in_one_unit():
    sample = torch.randn(500, 20, generator=torch.Generator().manual_seed(0))
    sample[:, 0] += 5
    sample[:, 1] *= 3                           # the unit
    sample[:, 2] = 4 + 0.01 * sample[:, 2]      # an offset that no choice of images can change
    reduced = (sample @ directions(sample)).numpy()
    assert reduced.std(0).max() == pytest.approx(1, abs=0.05)
    assert gap(reduced) == pytest.approx((5 ** 2 + 4 ** 2) ** 0.5 / 3, rel=0.05)
    assert directions(torch.ones(1, 20)).isfinite().all()       # of one image


@pytest.mark.parametrize("spread, right, recipe, said", [
    (4, 0.9, "best", "try --recipe far"), (4, None, "best", "try --recipe far"),
    (4, 0.9, "far", ""), (8, 0.9, "best", ""), (4, 0.12, "best", "near chance")])
def test_a_pool_of_another_domain_is_said(capsys, spread, right, recipe, said):
    answers = np.repeat(np.arange(spread), 9)
    report_pool(SimpleNamespace(
        candidates=join({"web": {"predicted": answers, "index": np.arange(len(answers))}}),
        classes=range(10), figures={"confidence_accuracy": right},
        run=SimpleNamespace(settings=SimpleNamespace(recipe=recipe))))
    first, *more = capsys.readouterr().out.splitlines()
    assert f"spreads over {spread}.0 of 10 classes" in first
    assert len(more) == bool(said) and said in "".join(more)


@pytest.mark.quick
def test_a_batch_norm_that_sees_the_tokens_of_an_image_shows_their_mean():
    class Tokens(nn.Sequential):
        def forward(self, pixels):
            tokens = self[0](pixels.flatten(2).transpose(1, 2).flatten(0, 1))
            return self[1](tokens.unflatten(0, (len(pixels), -1)).mean(1))
    classifier = Classifier(Tokens(nn.BatchNorm1d(3), nn.Linear(3, 2)), "tokens", "ab").eval()
    images = torch.randint(0, 256, (5, 32, 32, 3), dtype=torch.uint8)
    with watched(classifier) as shown, torch.inference_mode():
        classifier(images)
        found = shown()
    mean = (images.float() / 127.5 - 1).mean((1, 2))
    assert found.shape == (5, 6)
    torch.testing.assert_close(found[:, :3], mean, rtol=1e-3, atol=1e-3)
