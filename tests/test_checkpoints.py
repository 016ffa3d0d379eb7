"""Checkpoints of strangers, of which nothing is run, and students for others, read by others."""
import argparse
import collections
import copy
import json
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import NET, refusal
from layout_files import random_pixels
from torch import nn

from kd import checkpoints, models, own
from kd.classifier import Classifier
from kd.engine import predict
from kd.export import export
from kd.files import UserError, say_once
from kd.state_dicts import fit

CLASSES = ["ant, small", "bee", "cow é"]


@pytest.fixture
def net(tmp_path, monkeypatch):
    """A network as its file makes it, in the folder of this test: net.py:make."""
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NET)
    torch.manual_seed(0)
    return own.import_file("net.py").make(3)


def given(content, path="given.pth", **options):
    """A teacher of that network from a file that holds `content`."""
    torch.save(content, path, **options)
    return checkpoints.load_teacher(path, "net.py:make", CLASSES)


def same(classifier, network):
    known = network.state_dict()
    return all(torch.equal(value, known[name].float()) or name.endswith("num_batches_tracked")
               for name, value in classifier.network.state_dict().items())


@pytest.mark.quick
def test_a_checkpoint_gives_the_logits_of_torchvisions_own_network_and_is_plain(tmp_path):
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]
    classifier = models.build("resnet18", CLASSES, input_size=40, mean=mean, std=std).eval()
    checkpoints.save(tmp_path / "student.pt", classifier, accuracy=0.5)
    images = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    loaded = checkpoints.load(tmp_path / "student.pt")
    assert torch.equal(classifier(images), loaded(images)) and not loaded.training
    content = torch.load(tmp_path / "student.pt", weights_only=True)
    assert {key: content[key] for key in content if key != "state_dict"} == {
        "arch": "resnet18", "classes": CLASSES, "input_size": 40, "mean": mean, "std": std,
        "accuracy": 0.5}
    plain = torchvision.models.resnet18(num_classes=3).eval()
    plain.load_state_dict(content["state_dict"])
    pixels = torchvision.transforms.functional.normalize(
        images.permute(0, 3, 1, 2) / 255, mean, std)
    pixels = nn.functional.interpolate(pixels, (40, 40), mode="bilinear", align_corners=False)
    torch.testing.assert_close(loaded(images), plain(pixels), rtol=1e-4, atol=1e-4)


@pytest.mark.quick
def test_a_student_is_a_teacher_whatever_the_default_architecture_is(net):
    checkpoints.save("mms.pt", models.build("resnet18_cifar", CLASSES, mean=(0.1, 0.2, 0.3)))
    loaded = checkpoints.load_teacher("mms.pt", "resnet34", CLASSES, 40)
    assert (loaded.arch, loaded.input_size, loaded.mean) == ("resnet18_cifar", 40, [0.1, 0.2, 0.3])
    assert checkpoints.load_teacher("mms.pt", "resnet18_cifar", None).classes == CLASSES
    assert checkpoints.load_teacher("mms.pt", "resnet18_cifar", 3).classes == CLASSES
    for classes, names in ((["a", "b"], "a, b"), (2, "0, 1")):
        refusal(rf"knows 3 classes \(ant, small, bee, cow é\), and the target has 2 \({names}\)",
                checkpoints.load_teacher, "mms.pt", "resnet18_cifar", classes)


@pytest.mark.quick
def test_code_that_only_a_checkpoint_names_does_not_run(net):
    checkpoints.save("ours.pt", models.build("net.py:make", CLASSES))
    Path("evil.py").write_text("open('ran', 'w')\n" + NET)
    torch.save(torch.load("ours.pt") | {"arch": "evil.py:make"}, "ours.pt")
    for call in (checkpoints.load, lambda path: checkpoints.load_teacher(path, "resnet18", None),
                 lambda path: models.build("resnet18", CLASSES, path)):
        refusal("evil.py:make", call, "ours.pt")
    assert not Path("ran").exists()
    assert checkpoints.load("ours.pt", "net.py:make").arch == "net.py:make"


class Attributes(dict):
    """As EasyDict, CfgNode, ... are."""
    __getattr__ = dict.__getitem__


def under(prefix, state):
    return {prefix + key: value for key, value in state.items()}


SAVED = {
    "bare": lambda net: net.state_dict(),
    "parallel": lambda net: nn.DataParallel(net).state_dict(),
    "compiled": lambda net: torch.compile(net).state_dict(),
    "averaged": lambda net: torch.optim.swa_utils.AveragedModel(net).state_dict(),
    "halved": lambda net: net.half().state_dict(),
    "two keys": lambda net: {"epoch": 3, "model": {"net": under("module.", net.state_dict())}},
    "a student beside": lambda net: {
        "model": {key: torch.ones_like(value) for key, value in net.state_dict().items()},
        "teacher": net.state_dict()},
    "things beside": lambda net: {
        "state_dict": net.state_dict(), "best": np.float64(0.9), "array": np.zeros(3),
        "opt": argparse.Namespace(lr=0.05, data=Path("/data")),
        "cfg": Attributes(a=Attributes(b=1)), "history": collections.defaultdict(list, a=[1])},
    "an average inside": lambda net: net.state_dict() | under("ema.", {
        "n_averaged": torch.tensor(3)} | under("module.", {
            key: torch.ones_like(value) for key, value in net.state_dict().items()})),
    "an optimizer beside": lambda net: net.state_dict() | {
        "optimizer": {"state": {0: {"momentum_buffer": torch.ones(3)}}}},
}


@pytest.mark.parametrize("how", SAVED)
@pytest.mark.parametrize("zipped", [True, False])
def test_a_state_dict_is_read_however_it_was_saved(net, capsys, how, zipped):
    content = SAVED[how](net)
    say_once.cache_clear()
    assert same(given(content, _use_new_zipfile_serialization=zipped), net)
    assert ("on top are used, not those under 'ema'." in capsys.readouterr().out) == (
        how == "an average inside")


def test_what_timms_own_script_saves_is_read(net, capsys):
    pytest.importorskip("timm", reason="timm is an optional extra")
    from timm.utils import CheckpointSaver, ModelEmaV2
    ema = ModelEmaV2(copy.deepcopy(net))
    for parameter in ema.parameters():
        parameter.data += 1
    saver = CheckpointSaver(net, torch.optim.SGD(net.parameters(), 0.1), checkpoint_dir=".",
                            args=argparse.Namespace(model="net"), model_ema=ema)
    saver.save_checkpoint(3, metric=np.float64(0.9))
    assert same(checkpoints.load_teacher("last.pth.tar", "net.py:make", CLASSES), net)
    assert ("last.pth.tar: the weights under 'state_dict' are used, not those under "
            "'state_dict_ema'.") in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")       # of Lightning's, about a training of one step
def test_what_lightnings_trainer_saves_is_read(net):
    from lightning import pytorch as lightning

    class Module(lightning.LightningModule):
        def __init__(self, rate, place=Path("/data")):
            super().__init__()
            self.save_hyperparameters()
            self.model, self.criterion = net, nn.CrossEntropyLoss(weight=torch.ones(len(CLASSES)))

        def training_step(self, batch, number):
            return self.criterion(self.model(batch), torch.zeros(len(batch), dtype=torch.long))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)
    trainer = lightning.Trainer(accelerator="cpu", max_steps=1, logger=False, barebones=True)
    trainer.fit(Module(0.1), torch.utils.data.DataLoader(torch.rand(4, 3, 32, 32), batch_size=2))
    trainer.save_checkpoint("last.ckpt")
    assert same(checkpoints.load_teacher("last.ckpt", "net.py:make", CLASSES), net)


def older(key):
    """As torchvision's published weights of DenseNets have it."""
    return re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)", r"\1.\2", key)


@pytest.mark.filterwarnings("ignore::FutureWarning")        # torchvision's, about random weights
@pytest.mark.parametrize("arch, size, key_of", [
    ("densenet121", 32, lambda key: f"module.{older(key)}"),
    ("mnasnet0_5", 32, str),        # whose loading depends on the versions of its layers: lost here
    ("inception_v3", 75, lambda key: key * ("AuxLogits" not in key)),
    ("googlenet", 32, lambda key: key * (key[:3] != "aux"))])
def test_torchvisions_weights_are_read_with_older_keys_and_without_auxiliary_heads(
        tmp_path, arch, size, key_of):
    network = torchvision.models.get_model(arch, num_classes=3)
    state = {key_of(key): value for key, value in network.state_dict().items() if key_of(key)}
    torch.save({"arch": arch, "state_dict": state}, tmp_path / "w.pth.tar")
    assert same(checkpoints.load_teacher(tmp_path / "w.pth.tar", arch, CLASSES, size), network)


def test_torchvisions_weights_of_vision_transformers_are_read_with_older_keys():
    ours, theirs = (torchvision.models.VisionTransformer(32, 16, 1, 2, 8, 16, num_classes=3)
                    for _ in range(2))
    state = {key.replace("mlp.0", "mlp.linear_1").replace("mlp.3", "mlp.linear_2"): value
             for key, value in theirs.state_dict().items()}
    assert state.keys() != ours.state_dict().keys()
    fit(ours, state, "vit.pth", "vit")
    assert all(torch.equal(value, theirs.state_dict()[key])
               for key, value in ours.state_dict().items())


def test_what_is_assumed_of_the_pixels_is_said(net, capsys):
    torch.save(net.state_dict(), "w.pth")
    checkpoints.load_teacher("w.pth", "net.py:make", CLASSES)
    said = capsys.readouterr().out
    assert "w.pth is given images of 32x32 pixels, mean 0.5, 0.5, 0.5, std" in said
    assert "(assumed, as the file does not say)" in said
    checkpoints.load_teacher("w.pth", "net.py:make", CLASSES, 48, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    said = capsys.readouterr().out
    assert "48x48 pixels, mean 0.1, 0.2, 0.3, std 0.4, 0.5, 0.6 (as asked)" in said
    refusal("does not say which classes it knows, .* Add --classes", checkpoints.load_teacher,
            "w.pth", "net.py:make", None)
    models.build("net.py:make", CLASSES, "w.pth")
    assert "mean 0.5, 0.5, 0.5, std 0.5, 0.5, 0.5 (assumed, as" in capsys.readouterr().out
    torch.save(models.build("resnet18", CLASSES).network.state_dict(), "r.pth")
    for load in (lambda: checkpoints.load_teacher("r.pth", "resnet18", CLASSES),
                 lambda: models.build("resnet18", CLASSES, "r.pth")):
        assert load().mean == [0.485, 0.456, 0.406]
        assert "(torchvision's for the architecture" in capsys.readouterr().out


@pytest.mark.parametrize("classes", [CLASSES, ["a", "b", "c", "d", "e"]])
@pytest.mark.parametrize("ours", [True, False])
def test_a_start_may_be_a_state_dict_or_a_checkpoint_that_knows_other_classes(net, ours, classes):
    torch.save({"state_dict": under("module.", net.state_dict())}, "w.pth")
    if ours:
        checkpoints.save("w.pth", given(net.state_dict()))
    started = models.build("net.py:make", classes, "w.pth")
    assert torch.equal(started.network.features[0].weight, net.features[0].weight)
    assert started.classes == classes and len(started.network.head.weight) == len(classes)
    assert torch.equal(started.network.head.weight[:3], net.head.weight) == (len(classes) == 3)


@pytest.mark.parametrize("change, said", [
    (lambda state: state.pop("head.weight"), "missing keys head.weight"),
    (lambda state: state.update({"head2.weight": torch.zeros(1)}), "unexpected keys head2.weight"),
    (lambda state: state.update({"head.bias": torch.zeros(4)}),
     r"size mismatch for head.bias: .* torch.Size\(\[4\]\) .* torch.Size\(\[3\]\)"),
    (lambda state: state.update({"head.bias": torch.zeros(1).expand(10 ** 12)}), "size mismatch")])
def test_keys_that_do_not_fit_are_named_with_what_to_do(net, change, said):
    state = copy.deepcopy(net.state_dict())
    change(state)
    assert refusal(said, given, state).startswith("given.pth ")


class Bomb:
    """Unpickled by Python's own pickle, it writes a file."""

    def __init__(self, call, *arguments):
        self.reduced = call, arguments

    def __reduce__(self):
        return self.reduced


class Built(dict):
    def __getstate__(self):
        return {"a": 1}

    def __setstate__(self, state):
        open("ran", "w").close()


@pytest.mark.quick
@pytest.mark.parametrize("bomb", [
    Bomb(eval, "open('ran', 'w')"), Bomb(os.system, "touch ran"),
    Bomb(np.save, "ran", np.zeros(1)), Built()], ids=["eval", "system", "numpy", "state"])
@pytest.mark.parametrize("zipped", [True, False])
def test_no_code_from_a_file_runs(net, bomb, zipped):
    pickle.loads(pickle.dumps(bomb))
    ran, = Path().glob("ran*")
    ran.unlink()
    for content in (bomb, {"state_dict": net.state_dict(), "epoch": bomb},
                    {"state_dict": net.state_dict() | {"head.bias": bomb}}):
        try:
            given(content, _use_new_zipfile_serialization=zipped)
        except UserError as error:
            assert len(str(error).splitlines()) == 1
        Path("given.pth").write_bytes(pickle.dumps(content, protocol=2))
        refusal("given.pth", checkpoints.load_teacher, "given.pth", "net.py:make", CLASSES)
    assert not list(Path().glob("ran*"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("save, said", [
    (lambda net: torch.save(nn.Sequential(nn.Linear(3, 3)), "given.pth"),
     r"it holds no state dict. Where it was made, use torch.save\(network.state_dict\(\), FILE\)"),
    (lambda net: torch.jit.save(torch.jit.script(nn.Linear(3, 3)), "given.pth"), "TorchScript"),
    (lambda net: Path("given.pth").write_bytes(b"junk"), "can't be read as tensors and plain"),
    (lambda net: Path("given.pth").write_bytes(b"\x80\x02]K\x01K\x02s."),     # list[1] = 2
     "can't be read as tensors and plain"),
    (lambda net: torch.save({"epoch": 3}, "given.pth"), "it holds no state dict"),
    (lambda net: None, "no such file"),
])
def test_what_is_no_state_dict_is_refused_with_the_way_out(net, save, said):
    save(net)
    refusal(said, checkpoints.load_teacher, "given.pth", "net.py:make", CLASSES)
    refusal(said, models.build, "net.py:make", CLASSES, "given.pth")


IMAGES = random_pixels(30, 32, 32, 3)


@pytest.mark.quick
@pytest.mark.parametrize("form", ["state_dict", "safetensors"])
def test_a_student_is_torchvisions_own_state_dict(form, tmp_path, capsys):
    if form == "safetensors":
        pytest.importorskip("safetensors", reason="safetensors is an optional extra")
    student = models.build("resnet18", CLASSES).eval()
    export(student, form, tmp_path / f"student.{form}", IMAGES)
    assert "On 30 images it gives the student's class for 30" in capsys.readouterr().out
    plain = torchvision.models.resnet18(num_classes=3).eval()
    if form == "safetensors":
        from safetensors.torch import load_file
        plain.load_state_dict(load_file(tmp_path / "student.safetensors"))
    else:
        plain.load_state_dict(torch.load(tmp_path / "student.state_dict", weights_only=True))
    again = checkpoints.load_teacher(tmp_path / f"student.{form}", "resnet18", CLASSES, None,
                                     student.mean, student.std)
    assert torch.equal(predict(again, IMAGES), predict(student, IMAGES))


def grey():
    """A student of grey images, with a size and a normalisation of its own."""
    network = nn.Sequential(nn.Conv2d(1, 4, 3, 4), nn.BatchNorm2d(4), nn.Flatten(),
                            nn.Linear(576, 3))
    return Classifier(network, "small", CLASSES, 48, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)).eval()


@pytest.mark.parametrize("make", [lambda: models.build("squeezenet1_1", CLASSES).eval(), grey])
def test_onnx_has_all_that_the_student_does_for_any_batch(make, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="pip install '.[export]'")
    student, path = make(), tmp_path / "student.onnx"
    export(student, "onnx", path, IMAGES)
    assert list(tmp_path.iterdir()) == [path]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert json.loads(session.get_modelmeta().custom_metadata_map["classes"]) == CLASSES
    for count in (1, 3, 17):
        pixels = torch.from_numpy(IMAGES[:count]).permute(0, 3, 1, 2) / 255
        [found] = session.run(["logits"], {"pixels": pixels.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), predict(student, IMAGES)[:count],
                                   rtol=1e-3, atol=1e-3)


@pytest.mark.quick
def test_an_export_that_gives_other_answers_is_not_written(tmp_path):
    class Drawn(nn.Linear):
        def forward(self, x):
            return nn.functional.dropout(super().forward(x.flatten(1)), 0.5)
    drawn = Classifier(Drawn(3072, 3), "drawn", CLASSES)
    refusal("can't be exported as state_dict .it gives other logits", export, drawn, "state_dict",
            tmp_path / "drawn.pth", IMAGES)
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_auxiliary_head_for_other_classes_is_left_out(tmp_path):
    network = torchvision.models.googlenet(num_classes=3)
    network.aux1.fc2 = nn.Linear(1024, 1000)        # only the main head was replaced
    torch.save(network.state_dict(), tmp_path / "w.pth")
    network.aux1 = None
    assert same(checkpoints.load_teacher(tmp_path / "w.pth", "googlenet", CLASSES), network)
