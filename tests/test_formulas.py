"""Scores, thresholds and the KD loss against values worked by hand; directions of comparisons."""
import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import entropy
import mms_threshold
from distill import kd_loss
from kd import muon
from kd.classifier import Classifier
from kd.scoring import load_criteria
from kd.settings import resolve
from kd.thresholds import passes, share_threshold

pytestmark = pytest.mark.quick


ROWS = [[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]]


@pytest.mark.parametrize("weight, logits, expected", [
    (ROWS, [7.0, 2.0, 1.0], 1.0),       # a=0, b=1: (7-2)/||(3,-4)|| = 5/5
    (ROWS, [6.0, 0.0, 9.0], 1.0),       # a=2, b=0: (9-6)/||(-3,0)|| = 3/3
    (ROWS, [0.0, 8.0, 6.0], 0.5),       # a=1, b=2: (8-6)/||(0,4)|| = 2/4
    ([[1.0, 1.0]] * 3, [2.0, 2.0, 0.0], 0.0),       # a tie, even between equal rows
    # Between equal rows: to the nearest other class, (9-4)/||(3,-4)|| = 1 or (9-0)/3 = 3.
    ([ROWS[0], *ROWS], [9.0, 8.0, 4.0, 0.0], 1.0)])
def test_mms_is_the_margin_over_the_distance_of_the_two_weight_rows(weight, logits, expected):
    found = mms_threshold.score(torch.tensor([logits]), torch.tensor(weight))
    assert found.tolist() == [expected]


def test_mms_of_equal_rows_among_a_hundred_is_the_distance_to_another_class():
    weight = torch.randn(100, 64, generator=torch.Generator().manual_seed(1))
    weight[1] = weight[0]
    logits = torch.tensor([[9.0, 8.0] + [0.0] * 98])
    nearest = 9 / (weight[2:] - weight[0]).norm(dim=1).max()
    assert mms_threshold.score(logits, weight).item() == pytest.approx(nearest.item(), rel=1e-5)


def test_mms_is_the_distance_to_the_decision_boundary_in_feature_space():
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(5, 7, generator=generator), torch.randn(5, generator=generator)
    features = torch.randn(20, 7, generator=generator)
    logits = features @ weight.T + bias
    distance = mms_threshold.score(logits, weight)
    for x, z, d in zip(features, logits, distance, strict=True):
        a, b = z.argsort(descending=True)[:2]
        normal = weight[b] - weight[a]
        moved = x + d * normal / normal.norm()
        at_boundary = moved @ weight.T + bias
        assert at_boundary[a].item() == pytest.approx(at_boundary[b].item(), abs=1e-4)


@pytest.mark.parametrize("criterion", [mms_threshold, entropy])
def test_threshold_ignores_classes_the_teacher_never_predicts(criterion):
    with np.errstate(all="raise"):
        thresholds = criterion.threshold(np.array([1.0], np.float32), np.array([1]), 3)
    assert np.isnan(thresholds).tolist() == [True, False, True]
    scores, predicted = np.array([-1e30, 1e30]), np.array([0, 2])
    assert not passes(scores, predicted, thresholds, criterion.KEEP == ">=").any()


@pytest.mark.parametrize("logits, expected", [
    ([0.0] * 10, math.log(10)), ([math.log(2), 0.0, 0.0], 1.5 * math.log(2)),   # p = 1/2, 1/4, 1/4
    ([1000.0, 0.0, 0.0], 0.0), ([0.0, -math.inf, -math.inf], 0.0)])
def test_entropy_of_worked_distributions(logits, expected):
    value = entropy.score(torch.tensor([logits])).numpy()
    assert value == pytest.approx([expected], rel=1e-6) and (value == 0) == (expected == 0)


@pytest.mark.parametrize("criterion, scores, predicted, expected", [
    (mms_threshold, [1, 3, 10, 2], [0, 0, 2, 2], {0: 2.0, 2: 6.0}),     # the mean
    (entropy, range(19, -1, -1), [0] * 20, {0: 0.5}),       # that of the lowest tenth, 0 and 1
    (entropy, [3, 2, 5], [0, 0, 0], {0: 2.0})])             # of fewer than ten the lowest
def test_a_published_threshold_is_that_of_the_images_of_its_class(
        criterion, scores, predicted, expected):
    found = criterion.threshold(np.array(scores, np.float32), np.array(predicted), 3)
    assert {label: found[label] for label in expected} == expected


@pytest.mark.parametrize("criterion", [mms_threshold, entropy])
def test_an_exact_hit_of_the_threshold_is_kept(criterion):
    value = np.full(7, 0.1, np.float32)     # not a binary fraction: means must not round away
    thresholds = criterion.threshold(value, np.zeros(7, int), 1)
    assert passes(value, np.zeros(7, int), thresholds, criterion.KEEP == ">=").all()


@pytest.mark.parametrize("high, expected", [(True, [7.0, 8.0]), (False, [1.0, 2.0])])
def test_a_share_threshold_lets_the_surest_quarter_of_a_class_pass(high, expected):
    scores, predicted = np.arange(1.0, 9.0), np.zeros(8, int)
    thresholds = share_threshold(scores, predicted, 2, high, 0.25)
    assert scores[passes(scores, predicted, thresholds, high)].tolist() == expected
    assert np.isnan(thresholds[1])


@pytest.mark.parametrize("shapes", [[(4, 9), (4, 30), (7, 3), (1, 5)]])
def test_orthogonal_steps_keep_the_singular_vectors_and_make_their_values_alike(shapes):
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.randn(*shape, generator=generator) for shape in shapes]
    for matrix, found in zip(matrices, muon.orthogonal(matrices), strict=True):
        left, _, right = torch.linalg.svd(matrix, full_matrices=False)
        values = left.T @ found @ right.T
        torch.testing.assert_close(values, values.diag().diag(), atol=1e-3, rtol=0)
        assert 0.6 < values.diag().min() and values.diag().max() < 1.25


@pytest.mark.parametrize("columns", [0, 3, 9])
def test_columns_of_zeros_change_no_orthogonal_step(columns):
    matrix = torch.randn(4, columns, generator=torch.Generator().manual_seed(0))
    wide = torch.zeros(4, 12)
    wide[:, 1:columns + 1] = matrix
    found, alone = muon.orthogonal([wide, matrix])
    torch.testing.assert_close(found[:, 1:columns + 1], alone)
    assert not found[:, columns + 1:].any() and not found[:, 0].any()


def test_a_muon_step_turns_convolutions_by_an_angle_and_the_rest_is_sgds():
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, groups=8),
              nn.Conv2d(8, 8, 1, bias=False), weight_norm(nn.Conv2d(8, 8, 1)), nn.Conv2d(8, 5, 1),
              nn.Flatten())
    layers[3].register_module("again", nn.Conv2d(8, 8, 1))
    layers[3].again.weight = layers[3].weight       # which two layers share
    network = Classifier(nn.Sequential(*layers), "small", list("abcde"), 5)
    plain, options = copy.deepcopy(network), {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01,
                                              "nesterov": True}
    taken = muon.convolutions_of(network)
    assert [id(each) for each in taken] == [id(layers[at].weight) for at in (0, 3)]
    optimizers = (muon.Muon(network.parameters(), taken, **options),
                  torch.optim.SGD(plain.parameters(), **options))
    before = copy.deepcopy(network)
    for each, optimizer in zip((network, plain), optimizers, strict=True):
        images = torch.randint(256, (4, 5, 5, 3), generator=torch.Generator().manual_seed(1))
        (each(images.float()) * torch.arange(5)).sum().backward()
        optimizer.step()
    first, old = network.network[0].weight.detach(), before.network[0].weight.detach()
    turned = torch.nn.functional.cosine_similarity(first.flatten(), old.flatten(), dim=0).acos()
    assert turned.item() == pytest.approx(0.05, rel=0.1)
    assert first.norm().item() == pytest.approx(old.norm().item(), rel=1e-5)
    others = dict(plain.named_parameters())
    for name, value in network.named_parameters():
        if name not in ("network.0.weight", "network.3.weight"):
            torch.testing.assert_close(value, others[name])
    weight = nn.Parameter(torch.zeros(8, 3, 2, 2))      # which has no direction yet
    weight.grad = torch.randn(weight.shape)
    muon.Muon([weight], [weight], **options).step()
    assert weight.norm().item() == pytest.approx(0.1 * 8 ** 0.5, rel=1e-4)


def test_kd_loss_averages_over_images_and_not_over_classes():
    teacher = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    student = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
    each = [kd_loss(student[i:i + 1], teacher[i:i + 1], 10.0).item() for i in range(3)]
    assert kd_loss(student, teacher, 10.0).item() == pytest.approx(sum(each) / 3, rel=1e-5)
    p, q = torch.softmax(teacher / 10, 1), torch.softmax(student / 10, 1)
    assert sum(each) / 3 == pytest.approx(100 * (p * (p / q).log()).sum().item() / 3, rel=1e-4)


@pytest.mark.parametrize("name, expected", [
    ("confidence", 1 / 2), ("energy", math.log(4)), ("cross_entropy", math.log(2))])
def test_other_criteria_of_a_worked_distribution(name, expected):
    criterion, logits = load_criteria(resolve({}))[name], torch.tensor([[math.log(2), 0.0, 0.0]])
    assert criterion.score(logits, None).tolist() == pytest.approx([expected], rel=1e-6)
    assert criterion.threshold(np.array([1.0, 3.0]), np.array([0, 0]), 2)[0] == 2.0     # the mean
