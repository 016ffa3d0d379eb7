"""The student for use elsewhere: ONNX, a program of torch.export, or a bare state dict.

    python distill.py --approach mms --export onnx
"""
import copy
import importlib.util
import io
import json

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import engine
from files import UserError, first_line, say, write_atomically

PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime")}
CHECKED = 1000      # images on which what was written must agree with the student
TOLERANCE = 1e-3    # of the largest logit
ANY_BATCH = ({0: torch.export.Dim("batch", min=1)},)


class Standalone(nn.Module):
    """A classifier that needs nothing of this project: takes (N, 3, S, S) float32 pixels in [0, 1], gives logits (N, C)."""

    def __init__(self, classifier):
        super().__init__()
        self.network = copy.deepcopy(classifier.network).to(memory_format=torch.contiguous_format)
        for module in self.network.modules():
            if isinstance(module, nn.Conv2d):
                module.__class__ = nn.Conv2d
        self.input_size = classifier.input_size
        self.register_buffer("mean", torch.tensor(classifier.mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(classifier.std).view(3, 1, 1))

    def forward(self, pixels):
        pixels = (pixels - self.mean) / self.std
        if pixels.shape[-1] != self.input_size:
            pixels = F.interpolate(pixels, (self.input_size, self.input_size), mode="bilinear", align_corners=False)
        return self.network(pixels)


def require_packages(form):
    """Raises UserError where the packages for a form are not installed."""
    lacking = [name for name in PACKAGES.get(form, ()) if importlib.util.find_spec(name) is None]
    if lacking:
        raise UserError(f"--export {form} needs {' and '.join(lacking)}: pip install {' '.join(lacking)}")


def export(classifier, form, path, images):
    """Writes `classifier` as `form`, "onnx", "torch" or "state_dict", at `path`, when what was made of it gives the same answers.

    images: (N, S, S, 3) uint8; up to CHECKED of them are shown to both. Raises UserError where they disagree.
    """
    require_packages(form)
    classifier = classifier.cpu().eval()
    images = np.array(images[:: max(1, len(images) // CHECKED)][:CHECKED])
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().float() / 255
    try:
        content, answer = {"onnx": _onnx, "torch": _program, "state_dict": _state_dict}[form](classifier, pixels[:2])
    except Exception as error:      # exporters raise of every kind
        raise UserError(f"{classifier.arch} can't be exported as {form} ({type(error).__name__}: {first_line(error)})") from None
    expected = engine.predict(classifier, images)
    found = torch.cat([answer(batch) for batch in pixels.split(100)])
    error, scale = (found - expected).abs().max().item(), expected.abs().max().item()
    same = int((found.argmax(1) == expected.argmax(1)).sum())
    if not error <= TOLERANCE * scale:
        raise UserError(f"{path} is not written: exported as {form}, the student gives other logits on {len(images):,} images, by up to {error:.2g} of {scale:.2g}")
    write_atomically(path, lambda file: file.write(content))
    edge = images.shape[1]
    takes = (f"pixels in [0, 1] less {classifier.mean}, divided by {classifier.std}" if form == "state_dict" else
             f"float32 pixels (N, 3, {edge}, {edge}) in [0, 1]")
    say(f"export: {path}, {len(content) / 1e6:,.1f} MB, takes {takes}, gives the logits of {len(classifier.classes)} classes; "
        f"on {len(images):,} images the student's class for {same:,}, logits within {error:.1g} of {scale:.3g}")


# Each gives (bytes, function of pixels (n, 3, S, S) that runs what is in them).

def _state_dict(classifier, example):
    """The keys that the architecture's own network has; no normalisation."""
    buffer = io.BytesIO()
    torch.save({name: value.contiguous() for name, value in classifier.network.state_dict().items()}, buffer)
    fresh = Standalone(classifier)
    for tensor in fresh.network.state_dict().values():
        tensor.zero_()
    fresh.network.load_state_dict(torch.load(io.BytesIO(buffer.getvalue()), weights_only=True))
    return buffer.getvalue(), torch.inference_mode()(fresh.eval())


def _program(classifier, example):
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(Standalone(classifier).eval(), (example,), dynamic_shapes=ANY_BATCH), buffer, extra_files={"classes.json": json.dumps(classifier.classes)})
    program = torch.export.load(io.BytesIO(buffer.getvalue())).module()
    return buffer.getvalue(), torch.inference_mode()(program)


def _onnx(classifier, example):
    import onnx
    import onnxruntime
    made = torch.onnx.export(Standalone(classifier).eval(), (example,), dynamo=True, dynamic_shapes=ANY_BATCH, input_names=["pixels"], output_names=["logits"], verbose=False)
    made.optimize()
    proto = made.model_proto
    onnx.helper.set_model_props(proto, {"classes": json.dumps(classifier.classes)})
    content = proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return content, lambda pixels: torch.from_numpy(session.run(None, {session.get_inputs()[0].name: pixels.numpy()})[0])
