"""Training: what it learns, how it resumes, and what is said when it can't go on."""
import itertools
import math
import random
import time

import numpy as np
import pytest
import torch
from conftest import refusal
from torch import nn
from torch.nn import functional as F

from distill import fixed_objective, kd_loss, live_objective
from kd import engine, training
from kd.augment import shuffled_batches, step_generator
from kd.classifier import Classifier
from kd.command import Interrupted
from kd.settings import Recipe
from kd.training import Watch, cross_entropy, train

pytestmark = pytest.mark.quick
CPU = torch.device("cpu")
COUNT, SIZE = 58, 16
LABELS = np.arange(COUNT) % 3
IMAGES = np.random.default_rng(0).integers(0, 200, (COUNT, SIZE, SIZE, 3), np.uint8)
IMAGES[np.arange(COUNT), :, :, LABELS] += 55        # what tells the classes apart
WATCHED = {"evaluate": lambda network: engine.accuracy(network, IMAGES, LABELS)}
RECIPES = {
    "constant rate": Recipe(3, 8, 0.05),
    "everything": Recipe(4, 8, 0.05, 0.9, 1e-3, "onecycle", "crop,flip,mixup,cutmix", ema=0.8),
    "cosine": Recipe(4, 8, 0.05, 0.9, schedule="cosine"),
    "orthogonal steps": Recipe(4, 8, 0.05, 0.9, 1e-3, "onecycle", "crop", optimizer="muon"),
    "fewer steps than an epoch": Recipe(1, 8, 0.05, 0.9, schedule="onecycle", steps=3),
    "part of an epoch at the end": Recipe(1, 8, 0.05, 0.9, augment="crop,cutmix", steps=13),
    "one batch per epoch": Recipe(9, 64, 0.05, 0.9, schedule="onecycle", augment="mixup", ema=0.5),
}


def small(*layers, seed=0):
    """A classifier with what a step depends on: batch norm and dropout."""
    torch.manual_seed(seed)
    layers = layers or (nn.Conv2d(3, 4, 3, stride=4), nn.BatchNorm2d(4), nn.ReLU(),
                        nn.Dropout(0.2), nn.Flatten(), nn.Linear(64, 3))
    return Classifier(nn.Sequential(*layers), "small", ["a", "b", "c"], SIZE)


def learn(path, recipe, objective=None, classifier=None, made_from="this training", device=CPU,
          **watch):
    """(The classifier after its training, the Training)."""
    classifier = classifier or small()
    watch = Watch(path, made_from, "student mms", **{"every": 1} | watch)
    state = train(classifier, IMAGES, np.arange(COUNT), objective or cross_entropy(LABELS, CPU),
                  recipe, seed=5, device=device, watch=watch)
    return classifier, state


def same(some, others):
    """Whether two networks are the same to the bit."""
    some, others = some.state_dict(), others.state_dict()
    return all(torch.equal(value, others[name]) for name, value in some.items())


@pytest.fixture
def stopping(monkeypatch):
    """A list whose number says after how many more steps a signal asks to stop. (That signals do
    ask, test_survival.py shows.)"""
    left = []

    def asked():
        left[:] = [number - 1 for number in left]
        return 15 if left and left[0] <= 0 else 0
    monkeypatch.setattr(training, "interrupted", asked)
    return left


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("seed", range(3))
def test_a_training_that_signals_interrupt_ends_in_the_same_bits(tmp_path, stopping, recipe, seed):
    expected, undisturbed = learn(tmp_path / "undisturbed.part", recipe, **WATCHED)
    rng, stops, state = random.Random(seed), 0, None
    while state is None:
        stopping[:] = [rng.randint(1, 6)]
        try:
            classifier, state = learn(tmp_path / "student.part", recipe, **WATCHED)
        except Interrupted:
            stops += 1
            assert (tmp_path / "student.part").exists()
    assert stops >= state.steps // 7 and same(classifier, expected)
    assert (state.history, state.images) == (undisturbed.history, undisturbed.images)
    assert state.history[-1]["confidence_accuracy"] == WATCHED["evaluate"](classifier)
    assert len(state.history) == math.ceil(state.steps / state.per_epoch)


def half_done(path, stopping, recipe=RECIPES["everything"], **more):
    """Leaves the checkpoint of a training that was stopped after nine steps."""
    stopping[:] = [9]
    with pytest.raises(Interrupted):
        learn(path, recipe, **more)
    stopping.clear()
    return path.read_bytes()


@pytest.mark.parametrize("made_from, damage, said", [
    ("this training", lambda content: content[:-1], "damaged"),
    ("this training", lambda content: content[:3000] + b"?" + content[3001:], "damaged"),
    ("another transfer set", lambda content: content, "of another training")])
def test_a_damaged_or_foreign_checkpoint_is_said_and_not_used(
        tmp_path, stopping, capsys, made_from, damage, said):
    path, recipe = tmp_path / "student.part", RECIPES["everything"]
    path.write_bytes(damage(half_done(path, stopping, made_from=made_from)))
    classifier, _ = learn(path, recipe)
    assert f"{path} is {said}, so it is not used." in capsys.readouterr().out
    assert same(classifier, learn(tmp_path / "undisturbed.part", recipe)[0])


def spoilt(at, make):
    """An objective that is make(loss) from its `at`-th call on."""
    calls, objective = itertools.count(1), cross_entropy(LABELS, CPU)
    return lambda *given: (make if next(calls) >= at else lambda loss: loss)(objective(*given))


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_loss_that_is_not_finite_is_one_sentence(tmp_path, stopping, value):
    path, recipe = tmp_path / "student.part", RECIPES["constant rate"]
    saved = half_done(path, stopping, recipe)
    refusal(f"^student mms: the loss is {value} at a learning rate of 0.05 in step 3 of epoch 2. "
            "Use a smaller --lr.$", learn, path, recipe,
            spoilt(1, lambda loss: loss + float(value)), remedy="a smaller --lr")
    assert path.read_bytes() == saved       # of the nine steps before
    expected, _ = learn(tmp_path / "undisturbed.part", recipe)
    assert same(learn(path, recipe)[0], expected)


@pytest.mark.parametrize("step", [9, 21])
def test_weights_that_are_not_finite_are_never_a_result(tmp_path, step):
    """A loss may be finite whose gradient is not; 21 is the last step of all."""
    refusal("student mms: the (weights are|loss is) .* epoch [23]", learn,
            tmp_path / "student.part", RECIPES["constant rate"],
            spoilt(step, lambda loss: (loss - loss).sqrt()))
    assert not (tmp_path / "student.part").exists()


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("MPS backend out of memory (MPS allocated: 9.05 GB)"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory")])
def test_memory_that_does_not_suffice_is_one_sentence(tmp_path, error):
    class Greedy(nn.Flatten):
        def forward(self, pixels):
            raise error
    network = small(nn.Conv2d(3, 4, 3), Greedy())
    refusal(r"^student mms: out of memory\. Use a smaller --batch-size .*, or .*$",
            learn, tmp_path / "student.part", RECIPES["constant rate"], classifier=network)
    refusal(r"^evaluating: out of memory\. .*$", engine.predict, network, IMAGES)


def test_the_history_has_the_rate_of_each_epochs_last_step(tmp_path):
    def rates(schedule, steps=18):          # 7 + 7 + 4
        _, state = learn(tmp_path / "a.part", Recipe(1, 8, 0.05, schedule=schedule, steps=steps))
        return [entry["lr"] for entry in state.history]
    assert rates("constant") == [0.05, 0.05, 0.05]
    assert rates("multistep") == pytest.approx([0.05, 0.0005, 0.00005])     # at steps 11, 13, 15
    assert rates("cosine")[-1] == pytest.approx(0.05 * (1 + math.cos(math.pi * 17 / 18)) / 2)
    falling = rates("onecycle")
    assert 0.05 > falling[0] > falling[1] > falling[2] == pytest.approx(0.05 / 25 / 10_000)
    assert rates("onecycle", steps=1) == [0.05]         # and not that of the end of a cycle


def test_the_average_of_weights_is_that_of_the_steps(tmp_path):
    weights, objective, classifier = [], cross_entropy(LABELS, CPU), small()

    def recording(*given):          # the weights that the steps before have left
        weights.append(classifier.network[5].weight.detach().clone())
        return objective(*given)
    learn(tmp_path / "a.part", Recipe(2, 8, 0.05, 0.9), recording, classifier)
    average = weights[0]
    for n, each in enumerate([*weights[1:], classifier.network[5].weight], 1):
        decay = min(0.7, (1 + n) / (10 + n))        # it warms up
        average = decay * average + (1 - decay) * each
    averaged, _ = learn(tmp_path / "b.part", Recipe(2, 8, 0.05, 0.9, ema=0.7))
    torch.testing.assert_close(averaged.network[5].weight, average)


def test_auxiliary_heads_count_four_tenths(tmp_path):
    class Auxiliary(nn.Linear):
        """A tuple while it trains, as Inception gives; a third head that is off."""
        def forward(self, colours):
            logits = super().forward(colours)
            return (logits[:, :3], logits[:, 3:], None) if self.training else logits[:, :3]
    network = small(nn.AdaptiveAvgPool2d(1), nn.Flatten(), Auxiliary(3, 6))
    main, other, _ = network.train()(torch.from_numpy(IMAGES))
    expected = sum(share * F.cross_entropy(logits, torch.from_numpy(LABELS)).item()
                   for share, logits in ((1, main), (0.4, other)))
    _, state = learn(tmp_path / "a.part", Recipe(1, COUNT, 0.05), classifier=network)
    assert state.history[0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_on_fixed_pixels_the_teacher_may_answer_beforehand(tmp_path):
    teacher, rows = small(seed=1), torch.tensor([3, 1, 30])
    fixed = fixed_objective(teacher, IMAGES, 4.0, CPU)
    live = live_objective(teacher.train(), 4.0, CPU)
    logits, views = torch.randn(3, 3), torch.from_numpy(IMAGES[rows])
    expected = kd_loss(logits, teacher(views).detach(), 4.0)
    for objective in (fixed, live):
        torch.testing.assert_close(objective(logits, views, rows), expected)
        learn(tmp_path / "a.part", Recipe(1, 8, 0.05), objective)
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_a_board_is_written_where_it_is_asked_for(tmp_path, stopping):
    pytest.importorskip("tensorboard", reason="pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    recipe, path = RECIPES["everything"], tmp_path / "a.part"
    learn(path, recipe, **WATCHED)
    assert list(tmp_path.iterdir()) == []
    half_done(path, stopping, board={"tensorboard": tmp_path / "board"}, **WATCHED)
    _, state = learn(path, recipe, board={"tensorboard": tmp_path / "board"}, **WATCHED)
    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    steps = {name: [event.step for event in board.Scalars(name)]
             for name in board.Tags()["scalars"]}
    ends = [6, 13, 20, 27]
    assert board.Tags()["images"] == ["views"] and steps == {
        "loss": list(range(28)), "epoch_loss": ends, "learning_rate": ends,
        "confidence_accuracy": ends}
    each = np.array([event.value for event in board.Scalars("loss")]).reshape(4, 7)
    assert each.mean(1) == pytest.approx([entry["loss"] for entry in state.history], rel=1e-5)


def test_bfloat16_is_for_training_alone(tmp_path, monkeypatch):
    full, half = (learn(tmp_path / f"{amp}.part", Recipe(2, 8, 0.05, amp=amp))[0]
                  for amp in (None, True))
    assert not same(full, half)
    assert all(value.dtype != torch.bfloat16 for value in half.state_dict().values())
    with torch.no_grad(), engine.autocast(CPU, True):       # a live teacher is cast once
        expected = full.eval()(torch.from_numpy(IMAGES))
        assert torch.equal(engine.cast_once(full)(torch.from_numpy(IMAGES)), expected)
    expected = engine.predict(small(), IMAGES)
    monkeypatch.setattr(engine, "in_bfloat16", lambda *_: True)
    assert torch.equal(engine.predict(small(), IMAGES), expected)


def test_a_long_epoch_is_saved_in_between(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "ROUND", 3)
    monkeypatch.setattr(training, "SAVE_INTERVAL", 0.0)
    path, recipe = tmp_path / "student.part", RECIPES["constant rate"]
    with pytest.raises(ZeroDivisionError):      # in the sixth step, as a kill ends it
        learn(path, recipe, spoilt(6, lambda loss: 1 / 0))
    assert torch.load(path, weights_only=True)["step"] == 3
    assert same(learn(path, recipe)[0], learn(tmp_path / "undisturbed.part", recipe)[0])


def test_images_with_weights_come_as_often_as_those_say():
    rows, weights = torch.arange(100, 150), torch.arange(50) / 24.5
    seen = torch.zeros(150)
    for epoch in range(200):
        batches = shuffled_batches(rows, 7, step_generator(0, epoch), weights)
        assert [len(batch) for batch in batches] == [7] * 7
        seen += torch.cat(batches).bincount(minlength=150)
    assert seen[:101].sum() == 0
    assert ((seen[101:] / (200 * 49 / 50) - weights[1:]).abs() < 0.12).all()


def test_the_seconds_of_a_training_are_those_of_its_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "SAVE_INTERVAL", 0.0)
    _, state = learn(tmp_path / "a.part", RECIPES["everything"],
                     evaluate=lambda network: time.sleep(0.5) or 0.5)
    assert len(state.history) == 4 and 0 < state.seconds < 1


def test_few_images_are_looked_at_after_some_steps_and_at_the_end(tmp_path):
    _, state = learn(tmp_path / "a.part", RECIPES["one batch per epoch"], every=4, **WATCHED)
    looked = [each["confidence_accuracy"] is not None for each in state.history]
    assert looked == [False, False, False, True, False, False, False, True, True]
