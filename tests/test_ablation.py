"""benchmarks/ablation.py: what its cells share, what it writes, how it goes on."""
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import run

sys.path.insert(0, str(Path(run.__file__).parent / "benchmarks"))
import ablation

RUN = Path("runs/colours")


@pytest.fixture
def small(finished, tmp_path, monkeypatch):
    """The finished run, with a grid of seconds: path of its lines."""
    monkeypatch.setattr(ablation, "HELD_OUT", 20)
    monkeypatch.setattr(ablation, "HERE", tmp_path)
    monkeypatch.setitem(ablation.GRIDS, "selection", lambda seeds: [ablation.Cell(name, 60, seed, 3, (("batch_size", 8),)) for seed in seeds for name in ("random", "mms")]
                        + [ablation.Cell("all", None, 0, 2, (("batch_size", 8), ("augment", "none")))])
    return tmp_path / "ablation" / "selection.jsonl"


def pool_of():
    settings, of_run, _ = run.open_stage(["--run-dir", str(RUN)], ablation.__doc__)
    (RUN / "ablation").mkdir(exist_ok=True)
    return ablation.Pool(of_run, torch.device("cpu"))


def test_cells_are_run_once_and_make_a_table(small, execute):
    status, out, err = execute(ablation.main, ["--run-dir", str(RUN), "--seeds", "0,1", "--only", "random", "all"])
    assert (status, err) == (0, "")
    lines = [json.loads(line) for line in small.read_text().splitlines()]
    assert [(line["selection"], line["size"], line["seed"]) for line in lines] == [("random", 60, 0), ("random", 60, 1), ("all", 160, 0)]
    assert all(0 <= line[name] <= 1 for line in lines for name in ("agreement", "confidence", "test"))
    assert all(sum(line["per_class"]) == sum(line["per_source"].values()) == line["size"] for line in lines)
    before = small.read_text()
    status, out, err = execute(ablation.main, ["--run-dir", str(RUN), "--seeds", "0,1"])
    assert (status, err) == (0, "") and small.read_text().startswith(before) and len(small.read_text().splitlines()) == 5
    assert out.count("confidence ") == 2 and not list((RUN / "ablation").glob("*.part"))
    status, out, err = execute(ablation.main, ["--table"])
    rows = out.splitlines()
    assert len(rows) == 5 and rows[2].startswith("| random | 60 | 3 | batch_size 8 | 2 | ") and " ± " in rows[2]


def test_every_selection_has_the_size_it_is_asked_for_and_none_of_what_is_held_out(small):
    pool = pool_of()
    assert len(pool.held_out) == 20 and not set(pool.held_out) & set(pool.usable) and len(pool.usable) == 160
    for name, chosen in ablation.SELECTIONS.items():
        if name == "tilted" or name == "tilted, root":
            pool.weights = np.linspace(1, 2, 180)
        rows = chosen(pool, 60, 0)
        assert len(rows) == (160 if name == "all" else 60) == len(set(rows.tolist())) and set(rows) <= set(pool.usable), name
        assert np.array_equal(rows, chosen(pool, 60, 0)), name
    rows = ablation.SAMPLINGS["weighted"](pool, 900, 0)
    assert len(rows) == 900 and set(rows) <= set(pool.usable)


def test_the_best_of_each_class_are_taken_and_short_classes_are_filled_from_all(small):
    pool = pool_of()
    badness, predicted = pool.badness("mms"), pool.candidates.predicted
    chosen = pool.best(badness, 60)
    for label in range(3):
        members = [row for row in pool.usable if predicted[row] == label]
        best = sorted(members, key=lambda row: badness[row])[:20]
        assert set(best) <= set(chosen)
    assert set(pool.best(-badness, 60)) != set(chosen)


def test_activations_are_those_of_the_head_and_the_batch_norms(small):
    pool = pool_of()
    teacher, last, norms = pool.scoring.teacher, *pool.features
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(last) @ teacher.network.fc.weight.T + teacher.network.fc.bias, teacher(torch.from_numpy(pool.images)), rtol=1e-3, atol=1e-3)
    network = ablation.models.load(RUN / "teacher.pt").network
    pixels = (torch.from_numpy(pool.images).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
    with torch.no_grad():
        before = network.conv1(pixels).mean((2, 3))
    expected = (before - network.bn1.running_mean) / (network.bn1.running_var + network.bn1.eps).sqrt()
    np.testing.assert_allclose(norms[:, :64], expected, rtol=0.01, atol=0.01)
    assert norms.shape[1] == sum(module.num_features for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d))


def test_tilting_gives_the_pool_the_mean_that_it_should_have():
    rng = np.random.default_rng(0)
    pool = rng.normal(0, 1, (20_000, 30)) @ rng.normal(0, 1, (30, 30)) * 0.3 + np.r_[0.5, np.zeros(29)]
    pool[:5000, 1] += 3         # a kind of image of which there are too many
    weights = ablation.tilting(pool, directions=30, strength=1e-6)
    assert weights.mean() == pytest.approx(1) and (weights > 0).all()
    assert np.abs(weights @ pool / len(pool)).max() < 1e-3 < np.abs(pool.mean(0)).max()
    # Of all weights with that mean the most even ones are those whose logarithm is linear in the values.
    linear = np.c_[pool, np.ones(len(pool))]
    fitted = linear @ np.linalg.lstsq(linear, np.log(weights), rcond=None)[0]
    np.testing.assert_allclose(fitted, np.log(weights), atol=1e-3)
