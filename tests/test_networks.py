"""Networks, their heads and checkpoints; the training loop and the evaluation."""
import copy
import dataclasses
import io
import pickle
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import engine
import files
import models
from distill import fixed_objective, live_objective
from files import UserError
from run import Interrupted, Recipe
from transfer import score_images

CLASSES = ["cat", "dog", "frog"]
RECIPE = Recipe(epochs=3, batch_size=8, lr=0.05, momentum=0.9, weight_decay=5e-4, schedule="onecycle", augment="crop,flip")


def tiny(seed=0):
    """A network of the same kind that takes milliseconds."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                            nn.Flatten(), nn.Dropout(0.2), nn.Linear(8, 3))
    return models.Classifier(network, "tiny", CLASSES)


def random_images(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), np.uint8)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("kernel, stride, padding", [(3, 1, 1), (3, 2, 1), (1, 1, 0), (1, 2, 0)])
def test_small_inputs_are_convolved_as_torch_does(size, kernel, stride, padding):
    torch.manual_seed(0)
    reference = nn.Conv2d(5, 7, kernel, stride, padding)
    ours = models.SmallInputConv2d(5, 7, kernel, stride, padding)
    ours.load_state_dict(reference.state_dict())
    images = torch.randn(4, 5, size, size, requires_grad=True)
    gradient = torch.randn_like(reference(images))
    results = []
    for layer in (reference, ours):
        out = layer(images)
        results.append((out, *torch.autograd.grad(out, [images, *layer.parameters()], gradient)))
    for expected, found in zip(*results):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_classifier_gives_the_logits_of_torchvisions_own_network_on_normalised_pixels():
    import torchvision
    torch.manual_seed(0)
    classifier = models.build("resnet18", CLASSES).eval()
    plain = torchvision.models.resnet18(num_classes=3).eval()
    plain.load_state_dict(classifier.network.state_dict())
    images = torch.from_numpy(random_images(4))
    pixels = images.permute(0, 3, 1, 2).float() / 255 * 2 - 1       # [-1, 1]
    torch.testing.assert_close(classifier(images), plain(pixels), rtol=1e-4, atol=1e-4)


def test_a_network_of_another_input_size_is_handed_the_same_batch():
    classifier = models.Classifier(nn.Sequential(nn.Flatten(), nn.Linear(3 * 48 * 48, 3)), "wide", CLASSES, input_size=48)
    assert classifier(torch.from_numpy(random_images(2))).shape == (2, 3)


def test_the_last_linear_layer_is_the_head_and_its_rows_make_the_logits():
    classifier = models.build("resnet18", CLASSES).eval()
    features = []
    classifier.network.fc.register_forward_pre_hook(lambda module, inputs: features.append(inputs[0]))
    logits = classifier(torch.from_numpy(random_images(2)))
    torch.testing.assert_close(logits, features[0] @ models.head_weight(classifier).T + classifier.network.fc.bias)


def test_inception_has_two_heads_of_which_the_last_is_the_main_one():
    classifier = models.build("inception_v3", CLASSES)
    models.replace_head(classifier, 5)
    assert (classifier.network.fc.out_features, classifier.network.AuxLogits.fc.out_features) == (5, 5)
    assert models.heads(classifier, 5)[-1] == (classifier.network, "fc")


@pytest.mark.parametrize("arch", ["resnet34", "resnet18_cifar", "inception_v3", "vit_b_16", "densenet121", "squeezenet1_0", "regnet_x_400mf"])
def test_architectures_of_all_kinds_take_our_images(arch):
    models.require_fits(arch)


@pytest.mark.parametrize("arch, size", [("alexnet", 32), ("inception_v3", 74), ("vit_b_16", 32)])
def test_a_network_that_does_not_take_our_images_is_named_before_anything_long(arch, size):
    with pytest.raises(UserError, match=f"{arch} does not take {size}x{size} images: .*--teacher-size") as raised:
        models.require_fits(arch, input_size=size)
    assert len(str(raised.value).splitlines()) == 1


FIVE = [f"class{number}" for number in range(5)]


@pytest.mark.parametrize("arch, size", [*((arch, None) for arch in (
    "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small",
    "regnet_x_400mf", "resnet18", "resnet34_cifar", "resnext50_32x4d", "shufflenet_v2_x0_5", "squeezenet1_0", "squeezenet1_1", "swin_t",
    "swin_v2_t", "vgg11_bn", "vit_b_32", "wide_resnet50_2")), ("inception_v3", 75), ("inception_v3", None), pytest.param("maxvit_t", None, marks=pytest.mark.slow)])
def test_a_classifier_of_every_family_is_built_given_a_new_head_trained_saved_and_loaded(arch, size, tmp_path):
    torch.manual_seed(0)
    size = size or models.input_size_of(arch)
    count = 4 if size > 75 else 32      # RegNet overflows after a step on four
    classifier = models.build(arch, CLASSES, input_size=size)
    assert classifier.eval()(torch.from_numpy(random_images(2))).shape == (2, 3)
    models.replace_head(classifier, 5)
    classifier = models.Classifier(classifier.network, arch, FIVE, size)
    for module in classifier.modules():     # some networks overflow in eval mode until they have statistics
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    images, labels = random_images(count), np.arange(count) % 5
    classifier.train()(torch.from_numpy(images))
    parent, name = models.heads(classifier)[-1]
    head = getattr(parent, name)
    assert torch.equal(models.head_weight(classifier), head.weight.detach().flatten(1))
    before = {key: value.clone() for key, value in classifier.network.state_dict().items()}
    training = engine.train(classifier, images, np.arange(count), engine.cross_entropy(labels, torch.device("cpu")),
                            Recipe(epochs=1, batch_size=count, lr=1e-3), seed=0, device=torch.device("cpu"), checkpoint=tmp_path / "part", label=arch)
    assert training.images == count
    for parent, name in models.heads(classifier):       # the auxiliary heads learn as well
        changed = next(key for key, module in classifier.network.named_modules() if module is getattr(parent, name))
        assert not torch.equal(before[f"{changed}.weight"], getattr(parent, name).weight)
    models.save(tmp_path / "network.pt", classifier)
    loaded = models.load(tmp_path / "network.pt")
    pixels = torch.from_numpy(images)
    logits = classifier.eval()(pixels)
    assert logits.isfinite().all()
    assert logits.shape == (count, 5) and torch.equal(logits, loaded(pixels)) and loaded.classes == FIVE
    assert torch.equal(models.head_weight(loaded), models.head_weight(classifier))


def used_twice(norm):
    class Twice(nn.Module):
        """The convolution's output goes to the batch norm and past it."""
        def __init__(self):
            super().__init__()
            self.convolution, self.norm, self.head = nn.Conv2d(3, 4, 3), norm, nn.Linear(4, 3)

        def forward(self, images):
            images = self.convolution(images)
            return self.head((images + self.norm(images)).mean((2, 3)))
    return Twice()


def norms(network):
    return sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())


@pytest.mark.parametrize("arch, left", [("resnet34", 0), ("resnet18_cifar", 0), ("mobilenet_v2", 0), ("densenet121", 62), ("shufflenet_v2_x0_5", 0), ("convnext_tiny", 0)])
def test_a_teacher_with_its_batch_norms_folded_gives_the_same_logits(arch, left):
    torch.manual_seed(0)
    classifier = models.build(arch, CLASSES)
    for module in classifier.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
            nn.init.uniform_(module.weight, 0.5, 2.0)
            nn.init.normal_(module.bias)
    classifier.train()(torch.from_numpy(random_images(16)))
    before = {name: value.clone() for name, value in classifier.state_dict().items()}
    folded = models.folded(classifier)
    assert norms(folded) == left
    assert all(torch.equal(before[name], value) for name, value in classifier.state_dict().items())
    images = torch.from_numpy(random_images(32, seed=1))
    with torch.no_grad():
        expected = classifier.eval()(images)
        torch.testing.assert_close(folded(images), expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
    assert torch.equal(models.head_weight(folded), models.head_weight(classifier))


def test_a_batch_norm_that_can_not_be_folded_stays():
    torch.manual_seed(0)
    images = torch.from_numpy(random_images(4))
    for network in (used_twice(nn.BatchNorm2d(4)), used_twice(nn.BatchNorm2d(4, track_running_stats=False)),
                    nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3))):
        classifier = models.Classifier(network, "odd", CLASSES)
        classifier.train()(images)
        folded = models.folded(classifier)
        assert norms(folded) == 1
        torch.testing.assert_close(folded(images), classifier.eval()(images))


def test_inception_has_its_auxiliary_head_from_299_pixels_on_and_learns_from_it():
    assert models.build("inception_v3", CLASSES, input_size=298).network.AuxLogits is None
    network = models.build("inception_v3", CLASSES)
    assert network.input_size == 299 and network.network.AuxLogits.fc.out_features == 3
    ones, threes = torch.ones(2, 3), torch.full((2, 3), 3.0)
    assert engine._loss(lambda logits, views, rows: logits.mean(), (ones, threes), None, None).item() == pytest.approx(1 + 0.4 * 3)


def test_the_cifar_variant_keeps_the_resolution():
    network = models.build("resnet18_cifar", CLASSES).network
    assert network.conv1.stride == (1, 1) and network.conv1.kernel_size == (3, 3) and isinstance(network.maxpool, nn.Identity)


def test_a_checkpoint_gives_the_same_logits_and_is_plain(tmp_path):
    classifier = models.build("resnet18", CLASSES).eval()
    models.save(tmp_path / "student.pt", classifier, accuracy=0.5)
    loaded = models.load(tmp_path / "student.pt")
    images = torch.from_numpy(random_images(3))
    assert torch.equal(classifier(images), loaded(images))
    content = torch.load(tmp_path / "student.pt", weights_only=True)
    assert (content["arch"], content["classes"], content["input_size"], content["accuracy"]) == ("resnet18", CLASSES, 32, 0.5)
    assert content["mean"] == content["std"] == [0.5, 0.5, 0.5]
    import torchvision
    torchvision.models.resnet18(num_classes=3).load_state_dict(content["state_dict"])


class _Bomb:
    def __reduce__(self):
        return print, ("code from a checkpoint ran",)


def test_a_checkpoint_with_code_in_it_is_refused(tmp_path, capsys):
    (tmp_path / "bomb.pt").write_bytes(pickle.dumps(_Bomb(), protocol=2))
    with pytest.raises(UserError, match="bomb.pt"):
        models.load(tmp_path / "bomb.pt")
    torch.save({"arch": _Bomb()}, tmp_path / "bomb2.pt")
    with pytest.raises(UserError, match="bomb2.pt"):
        models.load(tmp_path / "bomb2.pt")
    assert "ran" not in capsys.readouterr().out


def test_damaged_imagenet_weights_in_the_cache_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    (cache / "resnet18-f37072fd.pth").write_bytes(b"junk")
    with pytest.raises(UserError, match="resnet18-f37072fd.pth has the sha256 .* instead of f37072fd"):
        models.build("resnet18", CLASSES, "imagenet")


def test_imagenet_weights_are_loaded_and_the_head_is_new(tmp_path, monkeypatch):
    import hashlib
    import torchvision
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    original = torchvision.models.resnet18()
    torch.save(original.state_dict(), cache / "weights")
    digest = hashlib.sha256((cache / "weights").read_bytes()).hexdigest()[:8]
    path = (cache / "weights").rename(cache / f"resnet18-{digest}.pth")
    monkeypatch.setattr(models, "_imagenet", lambda arch: ("http://127.0.0.1:9/", path))
    network = models.build("resnet18", CLASSES, "imagenet").network
    assert torch.equal(network.layer4[1].conv2.weight, original.layer4[1].conv2.weight)
    assert network.fc.out_features == 3


@pytest.mark.parametrize("changes", [{}, {"ema": 0.9}, {"steps": 10, "augment": "crop,flip,mixup,cutmix"}])
def test_training_is_repeatable_and_an_interrupted_one_ends_in_the_same_bits(tmp_path, monkeypatch, changes):
    recipe = dataclasses.replace(RECIPE, **changes)
    monkeypatch.setattr(engine, "SAVE_INTERVAL", 0.0)
    monkeypatch.setattr(engine, "SAVE_SHARE", 1e9)
    images, rows = random_images(40), np.arange(2, 38)
    labels = np.random.default_rng(1).integers(0, 3, 40)
    asked = []

    def trained(path, stop_after=None, signalled_in=None):
        network = tiny()
        network.network.append(nn.Dropout(0.1))     # which draws from torch's own state
        stopping, steps = iter(range(100)), iter(range(100))

        def evaluate(network):
            if stop_after is not None and next(stopping) == stop_after:
                raise KeyboardInterrupt
            return 0.0
        monkeypatch.setattr(engine, "interrupted", lambda: asked.append(0) or (signal.SIGTERM if next(steps) == signalled_in else 0))
        training = engine.train(network, images, rows, engine.cross_entropy(labels, torch.device("cpu")), recipe, seed=7,
                                device=torch.device("cpu"), checkpoint=path, label="test", evaluate=evaluate)
        return network.state_dict(), training

    whole, training = trained(tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "b", stop_after=1)
    assert (tmp_path / "b").exists()
    for step in (1, 1, 3):      # in the middle of an epoch, three times
        if step == 3:
            monkeypatch.setattr(engine, "SAVE_INTERVAL", 1000.0)      # now the signal alone has it saved
        with pytest.raises(Interrupted) as stopped:
            trained(tmp_path / "c", signalled_in=step)
        assert stopped.value.args == (signal.SIGTERM,)
    for path in (tmp_path / "b", tmp_path / "c"):
        asked.clear()
        resumed, resumed_training = trained(path)
        assert len(asked) < training.images / 8 - 4      # most steps were not taken again
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)
        assert [epoch["loss"] for epoch in training.history] == [epoch["loss"] for epoch in resumed_training.history]
        assert training.images == resumed_training.images == 8 * changes.get("steps", 3 * 4)
    other = tiny(seed=1).state_dict()
    assert not all(torch.equal(whole[name], other[name]) for name in whole)


def test_ema_is_the_moving_average_of_the_weights_of_every_step(tmp_path):
    images, labels, cpu = random_images(8), np.array([0, 1, 2, 0, 1, 2, 0, 1]), torch.device("cpu")
    ended = {}
    for decay in (0.0, 0.8):        # one step an epoch, so that each is seen
        network, seen = tiny(), []
        engine.train(network, images, np.arange(8), engine.cross_entropy(labels, cpu), dataclasses.replace(RECIPE, epochs=5, ema=decay), seed=7, device=cpu,
                     checkpoint=tmp_path / "part", label="test", evaluate=lambda network: seen.append({name: value.clone() for name, value in network.state_dict().items()}))
        ended[decay] = (network.state_dict(), seen)
    expected = ended[0.0][1][0]
    for weights, averaged in zip(ended[0.0][1], ended[0.8][1]):
        expected = {name: 0.8 * value.double() + 0.2 * weights[name].double() for name, value in expected.items()}
        for name, value in averaged.items():
            if value.is_floating_point():
                torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)
    assert all(torch.equal(value, ended[0.8][1][-1][name]) for name, value in ended[0.8][0].items())
    assert all(torch.equal(value, ended[0.0][1][-1][name]) for name, value in ended[0.0][0].items())


@pytest.mark.parametrize("between", [1, 3])
def test_a_loss_that_is_not_finite_stops_the_training_at_once_and_what_was_good_stays(tmp_path, monkeypatch, between):
    monkeypatch.setattr(engine, "SAVE_INTERVAL", 0.0 if between == 1 else 1000.0)
    monkeypatch.setattr(engine, "SAVE_SHARE", 1e9)
    monkeypatch.setattr(engine, "steps_between_checks", lambda device: between)
    steps = iter(range(1, 100))

    def objective(logits, views, rows):
        return logits.sum() * 1e-3 * (float("nan") if next(steps) == 6 else 1)
    with pytest.raises(UserError, match=r"^test: the loss is nan in step 2 of epoch 2, at a learning rate of 0\.\d+: give a smaller --lr, with --restart-from students$"):
        engine.train(tiny(), random_images(32), np.arange(32), objective, RECIPE, seed=0, device=torch.device("cpu"), checkpoint=tmp_path / "part", label="test")
    assert next(steps) == (7 if between == 1 else 8)        # seen in that step, or when the next look is due
    assert (tmp_path / "part").exists() == (between == 1)
    if between == 1:
        saved = torch.load(io.BytesIO(files.read_sealed(tmp_path / "part")), weights_only=True)
        assert saved["step"] == 1 and all(value.isfinite().all() for value in saved["state_dict"].values())


@pytest.mark.parametrize("steps", [1, 2])
def test_a_network_that_its_last_step_breaks_is_told_and_not_saved(tmp_path, monkeypatch, steps):
    """The loss of that step, which is that of the network before, is finite."""
    monkeypatch.setattr(engine, "SAVE_INTERVAL", 0.0)
    monkeypatch.setattr(engine, "steps_between_checks", lambda device: 50)
    rate = iter([0.0] * (steps - 1) + [1e30])

    def objective(logits, views, rows):
        return logits.sum() * next(rate)
    with pytest.raises(UserError, match=rf"^test: the network answers in NaN or infinity after step {steps} of epoch 1, at a learning rate of 1e\+10: give a smaller --lr, with --restart-from students$"):
        engine.train(tiny(), random_images(16), np.arange(16), objective, dataclasses.replace(RECIPE, epochs=1, steps=steps, lr=1e10, schedule="constant", momentum=0.0, weight_decay=0.0), seed=0,
                     device=torch.device("cpu"), checkpoint=tmp_path / "part", label="test")
    assert (tmp_path / "part").exists() == (steps == 2)
    if steps == 2:
        assert torch.load(io.BytesIO(files.read_sealed(tmp_path / "part")), weights_only=True)["step"] == 1


def test_a_checkpoint_of_other_files_is_not_gone_on_from(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(engine, "SAVE_INTERVAL", 0.0)
    cpu, images, labels = torch.device("cpu"), random_images(32), np.arange(32) % 3

    def trained(mark):
        engine.train(tiny(), images, np.arange(32), engine.cross_entropy(labels, cpu), RECIPE, seed=0, device=cpu, checkpoint=tmp_path / "part", label="test", mark=mark)
        return capsys.readouterr().out
    assert [trained(mark) for mark in ("one", "one", "two")] == ["", "", f"test: {tmp_path / 'part'} is of another run and is not used\n"]


@pytest.mark.parametrize("damage", ["cut", "emptied", "noise", "one bit", "of another run", "no seal"])
def test_a_checkpoint_that_is_not_whole_or_not_its_own_is_named_and_not_used(tmp_path, monkeypatch, capsys, damage):
    monkeypatch.setattr(engine, "SAVE_INTERVAL", 0.0)
    cpu, labels = torch.device("cpu"), np.arange(32) % 3

    def trained(name, images):
        network = tiny()
        engine.train(network, images, np.arange(32), engine.cross_entropy(labels, cpu), RECIPE, seed=0, device=cpu, checkpoint=tmp_path / name, label="test")
        return network.state_dict()
    images = random_images(32)
    expected = trained("whole", images)
    trained("other", 255 - images)
    content = (tmp_path / "whole").read_bytes()
    broken = {"cut": content[:-1000], "emptied": b"", "noise": np.random.default_rng(0).bytes(len(content)), "one bit": content[:5000] + bytes([content[5000] ^ 1]) + content[5001:],
              "of another run": (tmp_path / "other").read_bytes(), "no seal": files.read_sealed(tmp_path / "whole")}[damage]
    (tmp_path / "part").write_bytes(broken)
    capsys.readouterr()
    ended = trained("part", images)
    assert capsys.readouterr().out == f"test: {tmp_path / 'part'} is {'of another run' if damage == 'of another run' else 'damaged'} and is not used\n"
    assert all(torch.equal(ended[name], expected[name]) for name in expected)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError(),
                                   RuntimeError("[enforce fail at alloc_cpu.cpp:113] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")])
def test_too_little_memory_is_said_with_the_batch_size(tmp_path, error):
    def objective(logits, views, rows):
        raise error
    with pytest.raises(UserError, match=r"^test: the memory does not suffice for batches of 8 images of 32x32: give a smaller --batch-size"):
        engine.train(tiny(), random_images(32), np.arange(32), objective, RECIPE, seed=0, device=torch.device("cpu"), checkpoint=tmp_path / "part", label="test")


def test_too_little_memory_for_the_teacher_names_what_changes_it(tmp_path):
    def objective(logits, views, rows):
        raise MemoryError
    with pytest.raises(UserError, match="give a smaller network, with --teacher-arch, or --teacher-size"):      # --batch-size is of the students
        engine.train(tiny(), random_images(32), np.arange(32), objective, RECIPE, seed=0, device=torch.device("cpu"), checkpoint=tmp_path / "part", label="teacher")


def test_checkpoints_take_a_small_share_of_the_time(tmp_path, monkeypatch):
    """Where one takes long, the next one waits longer."""
    checkpoint = engine.Checkpoint(tmp_path / "part", "test")
    assert not checkpoint.due() and checkpoint.interval == engine.SAVE_INTERVAL
    write = engine.write_sealed
    monkeypatch.setattr(engine, "write_sealed", lambda path, content, everyone: time.sleep(0.5) or write(path, content, everyone))
    checkpoint.save("mark", {"a": 1})
    assert 25 <= checkpoint.interval < 40 and checkpoint.load("mark") == {"mark": "mark", "a": 1}


def test_steps_that_are_compiled_end_where_the_others_do(tmp_path, monkeypatch):
    """On CUDA that is done where much is left to train; here the compiler is the one that needs no other program."""
    images, labels, cpu = random_images(40), np.random.default_rng(1).integers(0, 3, 40), torch.device("cpu")
    monkeypatch.setattr(engine, "COMPILER", "aot_eager")
    assert engine.compiling_pays(torch.device("cuda"), 1e4) and not engine.compiling_pays(torch.device("cuda"), 10) and not engine.compiling_pays(cpu, 1e4)
    compiled, calls, ended = engine.compiled, [], []
    monkeypatch.setattr(engine, "compiled", lambda network: calls.append(network) or compiled(network))
    for pays in (False, True):
        monkeypatch.setattr(engine, "compiling_pays", lambda device, seconds: pays)
        network = tiny()
        training = engine.train(network, images, np.arange(40), engine.cross_entropy(labels, cpu), RECIPE, seed=7, device=cpu, checkpoint=tmp_path / "part", label="test")
        ended.append((network.network.state_dict(), training))
    assert len(calls) == 1 and set(ended[0][0]) == set(ended[1][0])
    for name, value in ended[0][0].items():
        torch.testing.assert_close(ended[1][0][name], value, rtol=1e-3, atol=1e-4)
    assert [epoch["loss"] for epoch in ended[1][1].history] == pytest.approx([epoch["loss"] for epoch in ended[0][1].history], rel=1e-4)


class Waiting(TorchDispatchMode):
    """Counts what makes the host wait for the device: reading a number, and shapes that depend on values."""
    CALLS = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "unique", "_unique2", "equal")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.name.partition("::")[2] in self.CALLS:
            self.found.append(function._schema.name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("recipe", [RECIPE, Recipe(epochs=2, batch_size=8, lr=0.05)])
def test_no_step_waits_for_the_device(tmp_path, monkeypatch, recipe):
    """What an epoch reads from the device does not grow with its steps; scoring reads nothing but what it gives back."""
    cpu, found, looks, require_finite = torch.device("cpu"), [], [], engine.require_finite
    monkeypatch.setattr(engine, "steps_between_checks", lambda device: engine.CHECK_STEPS)      # as on CUDA
    monkeypatch.setattr(engine, "require_finite", lambda *args: looks.append(args) or require_finite(*args))
    for count in (16, 80):
        images, network = random_images(count), tiny()
        with Waiting() as waiting:
            engine.train(network, images, np.arange(count), live_objective(tiny(1), 4.0, cpu), recipe, seed=0, device=cpu, checkpoint=tmp_path / "part", label="test")
        found.append(len(waiting.found))
    assert found[0] == found[1] <= 2 * recipe.epochs and len(looks) == 2 * recipe.epochs
    assert engine.steps_between_checks(torch.device("cuda")) == 50 and engine.steps_between_checks(torch.device("cpu")) > 0
    with Waiting() as waiting:
        score_images(tiny(), random_images(1200))
    once = len(waiting.found)
    with Waiting() as waiting:
        score_images(tiny(), random_images(30))
    assert len(waiting.found) == once


def test_batches_that_are_sent_ahead_come_in_order():
    """The meta device stands for one that is not the CPU: it has shapes alone."""
    images = torch.from_numpy(random_images(40))
    for count in (0, 1, 2, 7):
        batches = [torch.arange(number + 1) for number in range(count)]
        sent = list(engine.batches_of(images, batches, torch.device("meta")))
        assert [(len(pixels), pixels.device.type) for pixels in sent] == [(number + 1, "meta") for number in range(count)]
    here = list(engine.batches_of(images, [torch.tensor([3, 1]), torch.tensor([5])], torch.device("cpu")))
    assert torch.equal(here[0], images[[3, 1]]) and torch.equal(here[1], images[[5]])


def test_evaluation_is_in_eval_mode_without_gradients_and_leaves_the_statistics_alone():
    network = tiny().train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    images = random_images(30)
    logits = engine.predict(network, images, rows=np.array([3, 5]))
    assert not network.training and not logits.requires_grad
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    torch.testing.assert_close(logits, network(torch.from_numpy(images[[3, 5]])).detach())


def test_accuracy_counts_the_rows_it_is_given():
    network = models.Classifier(nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 3)), "flat", CLASSES)
    with torch.no_grad():
        network.network[1].weight.zero_()
        network.network[1].bias.copy_(torch.tensor([0.0, 1.0, 0.0]))      # always the second class
    labels = np.array([1, 1, 0, 1, 2])
    assert engine.accuracy(network, random_images(5), labels) == 0.6
    assert engine.accuracy(network, random_images(5), labels, rows=np.array([2, 3])) == 0.5


def test_the_teacher_answers_in_eval_mode_for_the_views_the_student_sees():
    teacher, cpu = tiny().train(), torch.device("cpu")
    images = random_images(12)
    views = torch.from_numpy(images[4:8])
    logits = torch.randn(4, 3, requires_grad=True)
    live = live_objective(teacher, 4.0, cpu)(logits, views, None)
    fixed = fixed_objective(teacher, images, 4.0, cpu)(logits, views, torch.arange(4, 8))
    assert live.item() == pytest.approx(fixed.item(), rel=1e-5)
    live.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_a_student_of_the_same_family_inherits_what_its_teacher_has():
    torch.manual_seed(0)
    teacher, student, stranger = (models.build(arch, ["a", "b", "c"]) for arch in ("resnet34", "resnet18", "mobilenet_v3_small"))
    for module in teacher.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
    assert models.inherit(student, teacher) == 1
    for name, value in student.network.state_dict().items():
        assert torch.equal(value, teacher.network.state_dict()[name]), name
    shorter = copy.deepcopy(teacher)
    for stage in (shorter.network.layer1, shorter.network.layer2, shorter.network.layer3, shorter.network.layer4):
        del stage[2:]
    images = torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8)
    torch.testing.assert_close(student.eval()(images), shorter.eval()(images))
    before = copy.deepcopy(stranger.state_dict())
    assert models.inherit(stranger, teacher) < 0.5
    assert all(torch.equal(value, before[name]) for name, value in stranger.state_dict().items())


# --------------------------------------------------------------------------------------------------
# Checkpoints from somewhere
# --------------------------------------------------------------------------------------------------

OURS = {"arch": "resnet18", "classes": ["a", "b", "c"], "input_size": 32, "mean": [0.5] * 3, "std": [0.5] * 3}


@pytest.fixture(scope="module")
def weights():
    return models.build("resnet18", CLASSES).network.state_dict()


@pytest.mark.parametrize("name, made, said", [
    ("fc.weight", torch.zeros(1).expand(10 ** 9, 512), "fc.weight (1000000000x512 for 3x512)"),        # four bytes on disk
    ("conv1.weight", torch.zeros(1).expand(10 ** 12, 3, 7, 7), "of another shape are conv1.weight"), ("conv1.weight", torch.zeros(0, 3, 7, 7), "of another shape are conv1.weight"),
    ("conv1.weight", torch.zeros(64, 3, 7, 7, dtype=torch.complex64), "no dense real numbers"), ("conv1.weight", torch.zeros(64, 3, 7, 7).to_sparse(), "no dense real numbers"),
    ("conv1.weight", torch.empty(64, 3, 7, 7, device="meta"), "no dense real numbers"), ("bn1.running_var", torch.full((64,), float("nan")), "bn1.running_var holds NaN or infinity"),
    ("../../bn1.weight", torch.zeros(64), "it has beyond that ../../bn1.weight"),
])
def test_tensors_that_no_network_has_are_refused(weights, tmp_path, name, made, said):
    torch.save(weights | {name: made}, tmp_path / "x.pt")
    with pytest.raises(UserError, match=re.escape(said)) as error:
        models.load_teacher(tmp_path / "x.pt", "resnet18", CLASSES)
    assert "\n" not in str(error.value) and str(tmp_path / "x.pt") in str(error.value)


@pytest.mark.parametrize("name, value", [("classes", 3), ("classes", ["a"]), ("classes", ["a", "a"]), ("classes", [["a"], ["b"]]), ("input_size", "x"), ("input_size", 0),
                                         ("input_size", 10 ** 7), ("mean", "abc"), ("mean", [0.5]), ("std", [0, 0, 0]), ("std", [float("nan")] * 3), ("state_dict", [1]), ("state_dict", {"a": 3})])
def test_a_checkpoint_of_ours_whose_parts_are_not_what_they_should_be_is_damaged(weights, tmp_path, name, value):
    torch.save(OURS | {"state_dict": weights} | {name: value}, tmp_path / "x.pt")
    for load in (models.load, models.read, lambda path: models.load_teacher(path, "resnet18", None)):
        with pytest.raises(UserError, match=f"x.pt is damaged: {name}"):
            load(tmp_path / "x.pt")
    torch.save(OURS | {"state_dict": weights, "arch": ["resnet18"]}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="x.pt is damaged: arch"):
        models.load(tmp_path / "x.pt")


def test_code_that_a_checkpoint_names_does_not_run(weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("evil.py").write_text("open('ran', 'w')\ndef make(classes):\n    import torchvision\n    return torchvision.models.resnet18(num_classes=classes)\n")
    torch.save(OURS | {"state_dict": weights, "arch": f"{tmp_path}/evil.py:make"}, "x.pt")
    for load in (models.load, lambda path: models.load_teacher(path, "resnet18", None), lambda path: models.load_teacher(path, "resnet18", None, default_arch="resnet18"),
                 lambda path: models.build("resnet18", CLASSES, path), lambda path: models.unavailable([("student", "resnet18", path, None)])):
        with pytest.raises(UserError, match="evil.py:make"):
            load("x.pt")
    assert not Path("ran").exists()
    assert models.load("x.pt", f"{tmp_path}/evil.py:make").classes == OURS["classes"] and Path("ran").exists()
