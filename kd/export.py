"""The student for use elsewhere: ONNX, or its weights alone."""
import copy
import importlib.util
import io
import json

import numpy as np
import torch
from torch import nn

from kd.classifier import as_torch_has_it
from kd.engine import predict
from kd.files import UserError, say, write_atomically

PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "safetensors": ("safetensors",)}
CHECKED = 1000      # images on which what was written must agree with the student
TOLERANCE = 1e-3    # of the largest logit


class Standalone(nn.Module):
    """A classifier that needs nothing of this project: (N, 3, H, W) float32 pixels in [0, 1] ->
    logits (N, C). classes: their names."""

    def __init__(self, classifier):
        super().__init__()
        self.network = as_torch_has_it(copy.deepcopy(classifier.network))
        self.fitted, self.classes = classifier.fitted, classifier.classes
        self.register_buffer("mean", torch.tensor(classifier.mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(classifier.std).view(3, 1, 1))

    def forward(self, pixels):
        return self.network(self.fitted((pixels - self.mean) / self.std))


def require_packages(form):
    """Raises UserError where the packages for a form are not installed."""
    lacking = [name for name in PACKAGES.get(form, ()) if importlib.util.find_spec(name) is None]
    if lacking:
        raise UserError(f"--export {form} needs {' and '.join(lacking)}: "
                        f"pip install {' '.join(lacking)}")


def export(classifier, form, path, images):
    """Writes `classifier` at `path` as "onnx", "state_dict" or "safetensors", once what was made
    gives the same answers. Raises UserError where it does not.

    images: (N, S, S, 3) uint8, of which up to CHECKED are shown to both.
    """
    require_packages(form)
    classifier = classifier.cpu().eval()
    images = images[np.linspace(0, len(images) - 1, min(len(images), CHECKED)).astype(int)]
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().float() / 255
    expected = predict(classifier, images)
    alone = Standalone(classifier).eval()
    content, answer = FORMS[form](alone, pixels[:2])
    found = torch.cat([torch.as_tensor(answer(batch)) for batch in pixels.split(100)])
    error, scale = (found - expected).abs().max().item(), expected.abs().max().item()
    if not error <= TOLERANCE * scale:
        raise UserError(f"{classifier.arch} can't be exported as {form} (it gives other logits, by "
                        f"up to {error:.2g} of {scale:.2g}).")
    write_atomically(path, lambda file: file.write(content))
    takes = f"pixels {(*pixels.shape[1:],)} in [0, 1]" if form == "onnx" else classifier.takes()
    same = int((found.argmax(1) == expected.argmax(1)).sum())
    say(f"export: {path}, {len(content) / 1e6:,.1f} MB, takes {takes}. On {len(images):,} images "
        f"it gives the student's class for {same:,}, logits within {error:.1g} of {scale:.3g}.")


# Each gives (bytes, function that answers pixels (n, 3, S, S) with what is in them).

def _state_dict(standalone, example):
    """The keys that the architecture's own network has; no normalisation."""
    buffer = io.BytesIO()
    torch.save(standalone.network.state_dict(), buffer)
    standalone.network.load_state_dict(torch.load(io.BytesIO(buffer.getvalue())))
    return buffer.getvalue(), torch.inference_mode()(standalone)


def _safetensors(standalone, example):
    from safetensors.torch import load, save
    content = save(standalone.network.state_dict(), {"classes": json.dumps(standalone.classes)})
    standalone.network.load_state_dict(load(content))
    return content, torch.inference_mode()(standalone)


def _onnx(standalone, example):
    import onnx
    import onnxruntime
    made = torch.onnx.export(
        standalone, (example,), dynamo=True, verbose=False,
        dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        input_names=["pixels"], output_names=["logits"])
    made.optimize()
    model = made.model_proto
    onnx.helper.set_model_props(model, {"classes": json.dumps(standalone.classes)})
    content = model.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return content, lambda pixels: session.run(None, {"pixels": pixels.numpy()})[0]


FORMS = {"onnx": _onnx, "state_dict": _state_dict, "safetensors": _safetensors}
