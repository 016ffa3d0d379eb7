"""The fast selection against one written the slow way, on random scores."""
import numpy as np
import pytest

from transfer import CRITERIA, join, select

KEEP = {"mms": lambda score, threshold: score >= threshold, "entropy": lambda score, threshold: score <= threshold}
BETTER_FIRST = {"mms": lambda score: -score, "entropy": lambda score: score}


def random_scores(rng, counts, classes, levels):
    """Scores of a few levels only, so that ties abound; the last class is never predicted."""
    return {f"source{number}": {"predicted": rng.integers(0, classes - 1, count),
                                "mms": rng.integers(0, levels, count).astype(np.float32),
                                "entropy": rng.integers(0, levels, count).astype(np.float32),
                                "confidence": rng.random(count).astype(np.float32)}
            for number, count in enumerate(counts)}


def select_slowly(scores, allowed, threshold, criterion, bucket, fill):
    """One image after the other, source by source. Returns [(source, index)]."""
    by_class = {}
    for source, columns in scores.items():
        if source not in allowed:
            continue
        for index in range(len(columns["predicted"])):
            label = int(columns["predicted"][index])
            if criterion is not None and not KEEP[criterion](columns[criterion][index], threshold[label]):
                continue
            by_class.setdefault(label, []).append((source, index))
    taken = set()
    for members in by_class.values():
        if fill == "best" and criterion is not None:
            members = sorted(members, key=lambda member: BETTER_FIRST[criterion](scores[member[0]][criterion][member[1]]))
        taken |= set(members[:bucket])
    return [(source, index) for source in scores for index in range(len(scores[source]["predicted"])) if (source, index) in taken]


def as_pairs(candidates, chosen):
    return [(candidates.names[candidates.source[i]], int(candidates.index[i])) for i in chosen]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("fill", ["first", "best"])
@pytest.mark.parametrize("approach", ["mms", "entropy", "balanced", "eats"])
def test_selection_equals_the_slow_one(approach, fill, seed):
    rng = np.random.default_rng(seed)
    classes = 6
    scores = random_scores(rng, rng.integers(0, 60, 4), classes, levels=8)
    scores = dict(zip(("cifar100", "svhn", "tinyimagenet", "noise"), scores.values()))
    thresholds = {name: rng.integers(0, 9, classes).astype(float) for name in CRITERIA}
    thresholds["mms"][2] = thresholds["entropy"][2] = np.nan
    allowed = ("svhn", "tinyimagenet") if approach == "eats" else tuple(scores)
    criterion = approach if approach in CRITERIA else None
    bucket = int(rng.integers(1, 12))
    candidates = join(scores)
    chosen = select(approach, candidates, thresholds, bucket, fill)
    assert as_pairs(candidates, chosen) == select_slowly(scores, allowed, thresholds.get(criterion), criterion, bucket, fill)


def choose_slowly(scores, threshold, high, room_of, group_of, fill, shortfall):
    """One group after the other, one image after the other. scores: [(source, index, class, score)] in order. Returns a sorted
    list of positions, repeated ones as often as they are taken."""
    groups, chosen = {}, []
    for position, (_, _, label, score) in enumerate(scores):
        groups.setdefault(group_of(label), []).append((position, label, score))
    for group, members in groups.items():
        def better_first(some):
            return sorted(some, key=lambda member: -member[2] if high else member[2])
        passing = [m for m in members if (m[2] >= threshold[m[1]] if high else m[2] <= threshold[m[1]])]
        failing = [m for m in members if m not in passing]
        taken = (better_first(passing) if fill == "best" else passing)[:room_of(group)]
        while shortfall == "relax" and len(taken) < room_of(group) and failing:
            taken.append(better_first(failing)[0])
            failing.remove(taken[-1])
        taken = sorted(taken)
        number = 0
        while shortfall == "repeat" and taken and len(taken) < room_of(group):
            taken.append(taken[number])
            number += 1
        chosen += [m[0] for m in taken]
    return sorted(chosen)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("shortfall", ["keep", "relax", "repeat"])
@pytest.mark.parametrize("balance", [True, False])
@pytest.mark.parametrize("fill", ["first", "best"])
@pytest.mark.parametrize("criterion", ["mms", "entropy"])
def test_balance_and_shortfall_are_as_the_slow_rules_say(criterion, fill, balance, shortfall, seed):
    rng = np.random.default_rng(seed)
    classes = 5
    scores = random_scores(rng, rng.integers(0, 40, 3), classes, levels=6)
    thresholds = {name: rng.integers(0, 8, classes).astype(float) for name in CRITERIA}
    thresholds[criterion][seed % 4] = np.nan
    bucket = int(rng.integers(1, 15))
    rows = [(name, index, int(columns["predicted"][index]), float(columns[criterion][index]))
            for name, columns in scores.items() for index in range(len(columns["predicted"]))]
    expected = choose_slowly(rows, thresholds[criterion], criterion == "mms", lambda group: bucket if balance else bucket * classes,
                             lambda label: label if balance else 0, fill, shortfall)
    found = select(criterion, join(scores), thresholds, bucket, fill, balance=balance, shortfall=shortfall)
    assert found.tolist() == expected


def test_an_image_without_a_score_is_never_taken():
    scores = {"a": {"predicted": np.zeros(3, int), "mms": np.array([np.nan, 1.0, 3.0], np.float32)}}
    for shortfall in ("keep", "relax"):
        assert 0 not in select("mms", join(scores), {"mms": np.array([2.0])}, 3, "best", shortfall=shortfall)


def test_a_class_without_any_image_stays_empty_whatever_is_to_be_done_about_it():
    scores = {"a": {"predicted": np.array([0, 0]), "mms": np.array([1.0, 3.0], np.float32)}}
    for shortfall, expected in (("keep", [1]), ("relax", [0, 1]), ("repeat", [1, 1, 1])):
        assert select("mms", join(scores), {"mms": np.array([2.0, 2.0])}, 3, shortfall=shortfall).tolist() == expected


def test_random_is_as_large_as_mms_under_every_rule():
    candidates = join(random_scores(np.random.default_rng(0), (300, 200), 4, levels=50))
    thresholds = {"mms": np.full(4, 45.0)}
    for rules in (dict(), dict(shortfall="relax"), dict(shortfall="repeat"), dict(balance=False)):
        assert len(select("random", candidates, thresholds, 40, **rules)) == len(select("mms", candidates, thresholds, 40, **rules))


def test_random_takes_as_many_as_mms_without_threshold_or_balance():
    candidates = join(random_scores(np.random.default_rng(0), (300, 200), 4, levels=50))
    thresholds = {"mms": np.full(4, 25.0), "entropy": np.full(4, 25.0)}
    mms = select("mms", candidates, thresholds, 40)
    chosen = select("random", candidates, thresholds, 40, seed=3)
    assert len(chosen) == len(mms) == len(set(chosen.tolist()))
    assert (candidates.scores["mms"][mms] >= 25).all() and (candidates.scores["mms"][chosen] < 25).any()
    assert chosen.tolist() == select("random", candidates, thresholds, 40, seed=3).tolist()
    assert chosen.tolist() != select("random", candidates, thresholds, 40, seed=4).tolist()


def test_the_criterion_that_is_asked_for_is_the_one_applied():
    scores = {"a": {"predicted": np.zeros(2, int), "mms": np.array([9, 0], np.float32), "entropy": np.array([9, 0], np.float32),
                    "confidence": np.ones(2, np.float32)}}
    thresholds = {"mms": np.array([5.0]), "entropy": np.array([5.0])}
    assert select("mms", join(scores), thresholds, 5).tolist() == [0]
    assert select("entropy", join(scores), thresholds, 5).tolist() == [1]


def test_the_first_source_fills_the_bucket_before_the_second():
    scores = {name: {"predicted": np.zeros(3, int), "mms": np.full(3, value, np.float32), "entropy": np.zeros(3, np.float32),
                     "confidence": np.ones(3, np.float32)} for name, value in (("a", 1.0), ("b", 2.0))}
    thresholds = {"mms": np.array([0.0]), "entropy": np.array([1.0])}
    assert select("mms", join(scores), thresholds, 4, "first").tolist() == [0, 1, 2, 3]
    assert select("mms", join(scores), thresholds, 4, "best").tolist() == [0, 3, 4, 5]


def test_a_million_candidates_take_seconds():
    import time
    rng = np.random.default_rng(0)
    count = 1_000_000
    scores = {"a": {"predicted": rng.integers(0, 100, count), "mms": rng.random(count, np.float32),
                    "entropy": rng.random(count, np.float32), "confidence": rng.random(count, np.float32)}}
    thresholds = {name: np.full(100, 0.5) for name in CRITERIA}
    began = time.monotonic()
    assert len(select("mms", join(scores), thresholds, 500, "best")) == 50_000
    assert time.monotonic() - began < 10
