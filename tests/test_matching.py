"""Matched selection: the most even capped weights that bring a pool to the teacher's statistics."""
import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import nn

from kd.files import UserError
from kd.matching import directions, draw, gap, match, watched

pytestmark = pytest.mark.quick


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


def test_a_teacher_without_batch_norms_is_refused():
    with pytest.raises(UserError, match="batch norms"), watched(nn.Linear(2, 2)):
        pass
