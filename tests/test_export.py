"""The student for use elsewhere, run by others' own readers."""
import json
import sys

import pytest
import torch
import torchvision
from conftest import refusal
from torch import nn

from kd import checkpoints, models
from kd.classifier import Classifier
from kd.engine import predict
from kd.export import export, require_packages

CLASSES = ["ant, small", "bee", "cow é"]


def images(count=30):
    return torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8,
                         generator=torch.Generator().manual_seed(0)).numpy()


def pixels(count=30):
    return torch.from_numpy(images())[:count].permute(0, 3, 1, 2) / 255


@pytest.fixture(scope="module")
def student():
    torch.manual_seed(0)
    return models.build("resnet18", CLASSES).eval()


@pytest.mark.quick
@pytest.mark.parametrize("form", ["state_dict", "safetensors"])
def test_a_student_is_torchvisions_own_state_dict(student, form, tmp_path, capsys):
    if form == "safetensors":
        pytest.importorskip("safetensors", reason="safetensors is an optional extra")
    export(student, form, tmp_path / f"student.{form}", images())
    assert "On 30 images it gives the student's class for 30" in capsys.readouterr().out
    plain = torchvision.models.resnet18(num_classes=3).eval()
    if form == "safetensors":
        from safetensors.torch import load_file
        plain.load_state_dict(load_file(tmp_path / "student.safetensors"))
    else:
        plain.load_state_dict(torch.load(tmp_path / "student.state_dict", weights_only=True))
    with torch.no_grad():
        torch.testing.assert_close(plain((pixels() - 0.5) / 0.5), predict(student, images()),
                                   rtol=1e-4, atol=1e-4)
    again = checkpoints.load_teacher(tmp_path / f"student.{form}", "resnet18", CLASSES)
    assert torch.equal(predict(again, images()), predict(student, images()))


def of_channels(channels):
    """A student with a size, colours and a normalisation of its own."""
    network = nn.Sequential(nn.Conv2d(channels, 4, 3, 4), nn.BatchNorm2d(4), nn.Flatten(),
                            nn.Linear(576, 3))
    return Classifier(network, "small", CLASSES, 48, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)).eval()


@pytest.mark.parametrize("make", [
    lambda: models.build("squeezenet1_1", CLASSES).eval(), lambda: of_channels(1),
    lambda: of_channels(3)])
def test_onnx_has_all_that_the_student_does_for_any_batch_and_can_be_quantised(make, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="pip install '.[export]'")
    from onnxruntime.quantization import quantize_dynamic
    student, path, small = make(), tmp_path / "student.onnx", tmp_path / "int8.onnx"
    export(student, "onnx", path, images())
    assert list(tmp_path.iterdir()) == [path]
    quantize_dynamic(path, small)
    expected = predict(student, images())
    for file in (path, small):
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        for count in (1, 3, 17):
            found = session.run(["logits"], {"pixels": pixels(count).numpy()})[0]
            assert found.shape == (count, 3)
            if file == path:
                torch.testing.assert_close(torch.from_numpy(found), expected[:count], rtol=1e-3,
                                           atol=1e-3)
    assert json.loads(session.get_modelmeta().custom_metadata_map["classes"]) == CLASSES


@pytest.mark.quick
def test_an_export_that_gives_other_answers_is_not_written(tmp_path, monkeypatch):
    class Drawn(nn.Linear):
        def forward(self, x):
            return nn.functional.dropout(super().forward(x.flatten(1)), 0.5)
    drawn = Classifier(Drawn(3072, 3), "drawn", CLASSES)
    refusal("can't be exported as state_dict .it gives other logits", export, drawn, "state_dict",
            tmp_path / "drawn.pth", images())
    assert not list(tmp_path.iterdir())
    for name in ("onnx", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None)
    refusal("needs onnx and onnxruntime: pip install onnx onnxruntime", require_packages, "onnx")
