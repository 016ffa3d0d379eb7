"""Data sets in the official layouts, small and generated, archives of them, and a local server."""
import dataclasses
import hashlib
import http.server
import io
import pickle
import tarfile
import threading
import zipfile

import numpy as np
import pytest
from PIL import Image

import data
from kd.download import RemoteFile
from kd.settings import Settings

RED, GREEN = (250, 10, 10), (10, 250, 10)
# How many images the writers below write.
SMALL = {"cifar10": {"train": 10, "test": 3, "source": 10},
         "cifar100": {"train": 3, "test": 2, "source": 3},
         "svhn": {"train": 3, "test": 2, "source": 3},
         "stl10": {"train": 2, "test": 3, "source": 6},
         "tinyimagenet": {"train": 4, "test": 3, "source": 4}, "places365": {"source": 3},
         "caltech256": {"source": 20}, "caltech101": {"source": 18}}


@pytest.fixture
def small(monkeypatch):
    """The registry has the counts of what is written here; torchvision takes it for official."""
    for name, counts in SMALL.items():
        register(monkeypatch, name, images=counts)
    for module in ("cifar", "svhn", "stl10"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.check_integrity", lambda *_: True)


def register(monkeypatch, name, **changes):
    record = dataclasses.replace(data.DATA_SETS[name], **changes)
    monkeypatch.setitem(data.DATA_SETS, name, record)


def remote(content, *urls):
    return RemoteFile(urls, len(content), hashlib.md5(content).hexdigest())


def settings_of(data_dir, target="", sources=(), **more):
    return Settings(**{"target": target, "sources": tuple(sources), "data_dir": str(data_dir),
                       "run_dir": f"{data_dir}/run"} | more)


def source(data_dir, spec, **more):
    settings = settings_of(data_dir, sources=(spec,), **more)
    data.obtain(settings)
    return data.load_source(settings, spec)


def target(data_dir, spec, **more):
    settings = settings_of(data_dir, spec, **more)
    data.obtain(settings)
    return data.load_target(settings)


def random_pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def save(root, *names, colour=None, size=(70, 90), kind=None):
    """Images of a colour, or no two of which are the same."""
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = random_pixels(9, 7, 3, seed=i) if colour is None else np.uint8([[colour]])
        Image.fromarray(pixels).resize(size).save(root / name, kind)


def names_in(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != ".locks")


def _write_cifar(root, batches, names, fine, meta):
    root.mkdir(parents=True)
    for number, (name, labels) in enumerate(batches.items()):
        content = {"data": random_pixels(len(labels), 3072, seed=number), f"{fine}labels": labels}
        (root / name).write_bytes(pickle.dumps(content, 4))
    (root / meta).write_bytes(pickle.dumps({f"{fine}label_names": names}))
    return root


def write_cifar10(data_dir):
    train = {f"data_batch_{k}": [k, k - 1] for k in range(1, 6)}
    return _write_cifar(data_dir / "cifar-10-batches-py", train | {"test_batch": [9, 0, 4]},
                        [f"class{i}" for i in range(10)], "", "batches.meta")


def write_cifar100(data_dir):
    return _write_cifar(data_dir / "cifar-100-python", {"train": [99, 3, 7], "test": [0, 42]},
                        [f"fine{i:02}" for i in range(100)], "fine_", "meta")


def write_svhn(data_dir):
    from scipy.io import savemat
    data_dir.mkdir(parents=True, exist_ok=True)
    for split, labels in (("train", [1, 10, 9]), ("test", [10, 5])):
        savemat(data_dir / f"{split}_32x32.mat", {
            "X": random_pixels(32, 32, 3, len(labels)), "y": np.array(labels, np.uint8)[:, None]})
    return data_dir / "train_32x32.mat"


def write_stl10(data_dir):
    root = data_dir / "stl10_binary"
    root.mkdir(parents=True)
    for seed, (part, count) in enumerate((("train", 2), ("test", 3), ("unlabeled", 4))):
        (root / f"{part}_X.bin").write_bytes(random_pixels(count, 3, 96, 96, seed=seed).tobytes())
    (root / "train_y.bin").write_bytes(bytes([1, 10]))
    (root / "test_y.bin").write_bytes(bytes([3, 2, 1]))
    (root / "class_names.txt").write_text("\n".join("abcdefghij"))
    return root


def write_tinyimagenet(data_dir):
    root = data_dir / "tiny-imagenet-200"
    save(root / "train", *(f"{wnid}/images/{wnid}_{i}.JPEG" for wnid in ("n02", "n01")
                           for i in range(2)))
    (root / "train" / "n01" / "n01_boxes.txt").write_text("n01_0.JPEG\t0\t0\t63\t63\n")
    save(root / "val" / "images", *(f"val_{i}.JPEG" for i in range(3)))
    (root / "val" / "val_annotations.txt").write_text("".join(
        f"val_{i}.JPEG\t{wnid}\t0\t0\t62\t62\n" for i, wnid in enumerate(("n02", "n01", "n02"))))
    return root


def write_places365(data_dir):
    save(data_dir / "val_256", *(f"Places365_val_{i:08d}.jpg" for i in (2, 1, 10)))
    return data_dir / "val_256"


def write_caltech256(data_dir):
    root = data_dir / "256_ObjectCategories"
    save(root, "056.dog/greg/x.jpg", *(f"{name}/{name[:3]}_{i:04d}.jpg" for name, count in (
        ("056.dog", 12), ("198.spider", 5), ("257.clutter", 3)) for i in range(1, count + 1)))
    (root / "198.spider" / "RENAME2").write_text("mv a b\n")
    return root


def write_caltech101(data_dir):
    root = data_dir / "101_ObjectCategories"
    save(root, *(f"{name}/image_{i:04d}.jpg" for name in (
        "accordion", "Motorbikes", "BACKGROUND_Google") for i in range(1, 7)))
    (root / "BACKGROUND_Google" / "tmp").write_text("")
    return root


WRITERS = {name: globals()[f"write_{name}"] for name in SMALL}


def tar_of(root, *names, mode="w:gz"):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name in names:
            archive.add(root / name, name)
    return buffer.getvalue()


def zip_of(files):
    """files: {name: content}."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


class Server(http.server.ThreadingHTTPServer):
    """scripts: {path: functions of the handler, one per request, the last one for ever}; asked:
    [(path, headers)] of the requests."""

    daemon_threads = True

    def url(self, name, *script):
        self.scripts[f"/{name}"] = list(script)
        return f"http://127.0.0.1:{self.server_port}/{name}"

    def handle_error(self, request, client_address):
        pass        # whoever asked has hung up


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append((self.path, dict(self.headers)))
        script = self.server.scripts[self.path]
        (script.pop(0) if len(script) > 1 else script[0])(self)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = Server(("127.0.0.1", 0), Handler)
    server.scripts, server.asked = {}, []
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()
