"""Packing and streaming: what images become, which are left out, and what a kill costs: nothing."""
import contextlib
import gzip
import io
import os
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import layout_files as made
import numpy as np
import pytest
from conftest import ROOT, refusal
from layout_files import GREEN, RED, save, source
from PIL import Image
from torchvision.transforms import Resize

import data
from kd.packing import Streamed
from kd.readers import decode
from kd.values import data_set_spec

ENV = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}


@pytest.mark.quick
@pytest.mark.parametrize("width, height", [(8, 8), (31, 33), (300, 200), (1, 9)])
@pytest.mark.parametrize("mode", ["RGB", "CMYK", "P"])
@pytest.mark.parametrize("size", [32, 96])
def test_decoding_is_torchvisions_resize_to_the_bit(width, height, mode, size):
    image = Image.fromarray(made.random_pixels(height, width, 3)).convert(mode)
    expected = Resize((size, size))(image.convert("RGB"))
    np.testing.assert_array_equal(decode(image, size), np.asarray(expected))


def saved(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def filled(colour, mode="RGB", kind="PNG", **options):
    return saved(Image.new(mode, (32, 32), colour), kind, **options)


def of(*colour):
    return np.tile(np.array(colour, np.uint8), (32, 32, 1))


# By a right angle, beside a resolution that is a text: Pillow reads that, and can't write it.
TURNED = b"Exif\0\0II*\0" + struct.pack("<IHHHIIHHI4sI", 8, 2, 0x112, 3, 1, 6, 0x11A, 2, 4,
                                        b"72\0\0", 0)
GREY = np.random.default_rng(1).integers(0, 65536, (32, 32)).astype(np.uint16)
NOISE = made.random_pixels(32, 32, 3)
# what it is: (its content, the pixels that become of it, how far they may be off)
READ = {
    "JPEG of CMYK": (filled((0, 255, 255, 0), "CMYK", "JPEG"), of(255, 0, 0), 4),
    "turned by its EXIF": (saved(Image.fromarray(NOISE), "WEBP", lossless=True, exif=TURNED),
                           np.rot90(NOISE, -1), 0),
    "16 bits of grey": (saved(Image.fromarray(GREY), "PNG"), np.stack([GREY >> 8] * 3, 2), 0),
    "1 bit": (filled(1, "1"), of(255, 255, 255), 0),
    "half transparent": (filled((*RED, 128), "RGBA"), of(252, 132, 132), 1),
    "a transparent colour": (filled(GREEN, transparency=GREEN), of(255, 255, 255), 0),
    "a transparent grey": (filled(9, "L", transparency=9), of(255, 255, 255), 0),
    "a palette with transparency": (filled(1, "P", "GIF", transparency=1), of(255, 255, 255), 0),
    "an animation": (filled(RED, kind="GIF", save_all=True,
                            append_images=[Image.new("RGB", (32, 32), GREEN)]), of(*RED), 0),
}
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\nshowpage\n%%EOF\n"
PHOTO = saved(Image.fromarray(made.random_pixels(300, 300, 3)), "JPEG")
# what it is: (its content, the beginning of the reason in bad.txt)
BROKEN = {
    "empty": (b"", "Unidentified"), "a text": (b"no image\n", "Unidentified"),
    "PostScript": (EPS, "Unidentified"),
    "a JPEG cut short": (PHOTO[:len(PHOTO) // 2], "OSError: image file is truncated"),
    "a PNG cut short": (filled(RED)[:60], "OSError: image file is truncated"),
    "huge": (saved(Image.new("1", (10_000, 10_000)), "PNG"), "DecompressionBomb"),
    "floating point": (saved(Image.fromarray(np.ones((9, 9), np.float32)), "TIFF"),
                       "ValueError: floating-point")}


@pytest.mark.quick
def test_odd_images_are_read_as_a_viewer_shows_them(tmp_path, capfd):
    (tmp_path / "odd").mkdir()
    for number, (content, _, _) in enumerate(READ.values()):
        (tmp_path / "odd" / f"{number:02}.png").write_bytes(content)
    found = source(tmp_path / "d", f"odd={tmp_path / 'odd'}")
    for (name, (_, expected, tolerance)), image in zip(READ.items(), found.images, strict=True):
        assert np.abs(image.astype(int) - expected).max() <= tolerance, name
    assert capfd.readouterr() == ("", "")


@pytest.mark.quick
def test_a_shard_is_read_as_a_folder_is(tmp_path, capfd):
    root, names = tmp_path / "pool", ["a/1.png", "x/" * 90 + "long.png", "d"]
    save(root, *names[:2], "a/._1.png", ".hidden.png", "__MACOSX/a.png")
    save(root, "d", kind="JPEG")
    (root / "notes.txt").write_text("no image")
    os.link(root / names[0], root / "linked.png")
    with tarfile.open(tmp_path / "000.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        tar.add(root, ".")
    found = source(tmp_path / "d", f"pool={tmp_path}/**.tar")
    assert "1 links" in capfd.readouterr().out
    assert sorted(found.files) == sorted(f"000.tar/./{name}" for name in names)
    (tmp_path / "moved").mkdir()
    shutil.copy2(tmp_path / "000.tar", tmp_path / "moved")
    (tmp_path / "moved" / "._000.tar").write_bytes(b"what macOS leaves")
    moved = source(tmp_path / "e", f"pool={tmp_path}/moved/*.tar")
    assert moved.fingerprint == found.fingerprint


@pytest.mark.quick
def test_broken_images_are_left_out_and_listed_with_their_reason(tmp_path, capfd):
    save(tmp_path / "odd", "zz.png")
    for number, (content, _) in enumerate(BROKEN.values()):
        (tmp_path / "odd" / f"{number:02}.jpg").write_bytes(content)
    (tmp_path / "odd" / "link.jpg").symlink_to("nowhere.jpg")
    found = source(tmp_path / "d", f"odd={tmp_path / 'odd'}", max_bad=1.0)
    assert list(found.files) == ["zz.png"] and found.rows.tolist() == [8]
    [listing] = tmp_path.glob("d/packed/*/bad.txt")
    lines = [line.split("\t") for line in listing.read_text().splitlines()]
    for (name, (_, reason)), line in zip(BROKEN.items(), lines, strict=False):
        assert line[1].startswith(reason), (name, line)
    assert lines[-1][::2] == ["link.jpg", "7"] and lines[-1][1].startswith("FileNotFound")
    assert capfd.readouterr().out.startswith(
        f"odd: 8 of 9 images can't be read and are left out. They are listed in {listing}.")


def test_images_of_any_name_are_read_or_are_one_line_of_the_listing(tmp_path):
    names = ["中文.png", "🐱.png", "new\nline.png", "tab\there.png", "quote'\".png",
             "line\u2028end.png", "%s{}*.png", os.fsdecode(b"latin-\xe9.png")]
    save(tmp_path / "pool", *names, *(f"broken {name}" for name in names))
    for name in names:
        (tmp_path / "pool" / f"broken {name}").write_bytes(b"no image")
    for _ in range(2):      # made, and opened again
        found = source(tmp_path / "d", f"pool={tmp_path / 'pool'}", max_bad=1.0)
        assert list(found.files) == sorted(names)
    [listing] = tmp_path.glob("d/packed/*/bad.txt")
    lines = listing.read_text(errors="surrogateescape").splitlines()
    assert len(lines) == len(names) and all(line.count("\t") == 2 for line in lines)


def pool(root, count=100, bad=()):
    """The spec of a folder of images, those in `bad` broken."""
    save(root, *(f"{i:03}.png" for i in range(count)), size=(9, 9))
    for i in bad:
        (root / f"{i:03}.png").write_bytes(b"no image")
    return f"pool={root}"


@pytest.mark.quick
def test_a_pack_is_made_once_and_again_when_a_file_changes(tmp_path):
    spec = pool(tmp_path / "pool", 5)
    first = source(tmp_path / "d", spec)
    [file] = tmp_path.glob("d/packed/*/images.npy")
    before = file.stat().st_mtime_ns
    assert source(tmp_path / "d", spec).fingerprint == first.fingerprint
    assert file.stat().st_mtime_ns == before
    save(tmp_path / "pool", "003.png", "005.png", colour=GREEN)
    again = source(tmp_path / "d", spec)
    assert len(again) == 6 and again.fingerprint != first.fingerprint
    assert again.images[3, 0, 0].tolist() == list(GREEN)
    assert made.names_in(file.parent) == ["bad.txt", "images.npy", "pack.json"]


def test_what_could_not_be_read_and_now_can_is_packed(tmp_path):
    spec, path = pool(tmp_path / "pool", 20), tmp_path / "pool" / "004.png"
    whole, content, state = source(tmp_path / "d", spec).images.tobytes(), path.read_bytes(), None
    for file, bad in ((b"?" * len(content), 1), (content, 0)):      # as of another owner
        path.write_bytes(file)
        state = state or path.stat()
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
        found = source(tmp_path / "e", spec, max_bad=0.1)
        assert found.bad == bad
    assert found.images.tobytes() == whole


@pytest.mark.parametrize("damage", [
    lambda path: os.truncate(path, path.stat().st_size // 2), lambda path: path.unlink(),
    lambda path: path.write_bytes(path.read_bytes()[:-9] + b"?" + path.read_bytes()[-8:])])
def test_a_damaged_pack_is_said_and_made_again(tmp_path, capsys, damage):
    spec = pool(tmp_path / "pool", 20, bad=[4])
    whole = source(tmp_path / "d", spec, max_bad=0.1).images.tobytes()
    [folder] = tmp_path.glob("d/packed/pool-*")
    for name in ("images.npy", "bad.txt", "pack.json"):
        time.sleep(0.02)        # a file system's clock may tick every few milliseconds
        damage(folder / name)
        capsys.readouterr()
        again = source(tmp_path / "d", spec, max_bad=0.1)
        assert (again.images.tobytes(), again.bad, 4 in again.rows) == (whole, 1, False)
        assert (f"{folder} is damaged, or its files have changed or can be read now."
                in capsys.readouterr().out)


SLOW = """
import sys, time
from kd import readers
from layout_files import source
opened = readers.opened
readers.opened = lambda path: (time.sleep(0.01), opened(path))[1]
source(sys.argv[1], sys.argv[2], max_bad=0.1)
"""


def is_at_work(folder):
    """Whether a process has this folder in its command line, on Linux."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if os.fsencode(folder) in path.read_bytes():
                return True
    return False


def test_a_pack_that_is_killed_is_begun_again(tmp_path):
    spec = pool(tmp_path / "pool", 600, bad=range(0, 600, 50))
    expected = source(tmp_path / "whole", spec, max_bad=0.1)
    process = subprocess.Popen([sys.executable, "-c", SLOW, tmp_path / "d", spec], env=ENV)
    while process.poll() is None and not any(
            path.stat().st_size for path in tmp_path.glob("d/packed/*.part/images.npy")):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    until = time.monotonic() + 20
    while is_at_work(tmp_path):     # its decoders end with it
        assert time.monotonic() < until
        time.sleep(0.1)
    assert [path.suffix for path in tmp_path.glob("d/packed/pool-*")] == [".part"]
    found = source(tmp_path / "d", spec, max_bad=0.1)
    assert found.images.tobytes() == expected.images.tobytes()
    assert found.rows.tolist() == expected.rows.tolist() and found.bad == 12
    assert not list(tmp_path.glob("d/packed/*.part"))


def gathered(source, **how):
    pixels, index, files = zip(*source.batches(**how), strict=True)
    return (np.concatenate(pixels), np.concatenate(index).tolist(),
            [name for names in files for name in names])


@pytest.mark.quick
@pytest.mark.parametrize("limit", [None, 60])
def test_a_stream_answers_as_the_pack_does(tmp_path, limit):
    spec = pool(tmp_path / "pool", 90, bad=[7])
    packed, streamed = (source(tmp_path / "d", spec, limit=limit, max_bad=0.1, pack=how)
                        for how in ("always", "never"))
    assert isinstance(streamed, Streamed) and packed.images.shape[1] == streamed.size == 32
    assert packed.fingerprint == streamed.fingerprint and len(streamed) == (limit or 90)
    for how in ({}, {"batch_size": 25}, {"rows": packed.rows[[0, 5, 40]]}):
        one, two = gathered(packed, **how), gathered(streamed, **how)
        np.testing.assert_array_equal(one[0], two[0])
        assert one[1:] == two[1:]
    assert len(list(tmp_path.glob("d/packed/pool-*"))) == 1


@pytest.mark.quick
@pytest.mark.parametrize("how", ["always", "never"])
def test_more_unreadable_images_than_the_share_are_one_line(tmp_path, how):
    spec = pool(tmp_path / "pool", bad=[3, 77])

    def count(spec, **more):
        return len(gathered(source(tmp_path / "d", spec, pack=how, **more))[1])
    refusal("^pool: 2 of 100 images can't be read, more than --max-bad 0.01 allows; the first is "
            r"003.png \(UnidentifiedImageError", count, spec)
    assert count(spec, max_bad=0.03) == 98
    # Of several processes each judges its part by the share of the whole.
    lenient = source(tmp_path / "d", spec, pack=how, max_bad=0.02)
    assert sum(len(index) for _, index, _ in lenient.batches(None, 10, lambda n: slice(1))) >= 9
    refusal("^pool: 3 of 3 images can't be read", count,
            pool(tmp_path / "none" / "pool", 3, bad=[0, 1, 2]), max_bad=1.0)


@pytest.mark.quick
def test_an_image_of_a_stream_that_is_asked_for_and_can_not_be_read_is_one_line(tmp_path):
    streamed = source(tmp_path / "d", pool(tmp_path / "pool", bad=[3]), pack="never")
    refusal(r"^pool has changed since it was scored: 003.png \(Unid.*\) can't be read. Add "
            "--restart-from scores.$", gathered, streamed, rows=np.array([3]))


def test_large_sources_are_streamed_unless_they_shall_be_packed(tmp_path, monkeypatch):
    spec = pool(tmp_path / "pool", 3)
    monkeypatch.setattr(data, "PACKED_BELOW", 3 * 32 * 32 * 3 - 1)
    assert isinstance(source(tmp_path / "d", spec), Streamed)
    assert not isinstance(source(tmp_path / "d", spec, pack="always"), Streamed)


MEMORY = """
import resource, sys
import numpy as np
import torch.utils.data
from PIL import Image
from kd.packing import Packed, Streamed
from kd.readers import Images
class Read:
    def __call__(self, i):
        return Image.new("RGB", (64, 64), (i % 251, 9, 200))
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
path, count, size, how = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
before, source = peak(), Streamed("x", Images(count, Read(), "x"), size, 0.01)
if how == "packed":
    pixels = np.memmap(path, np.uint8, "c", 0, (count, size, size, 3))
    source = Packed("x", pixels, None, None, None, None, "x", "", 0)
assert sum(len(pixels) for pixels, _, _ in source.batches(batch_size=128)) == count
print(peak() - before)
"""


@pytest.mark.parametrize("how, size, few", [("packed", 32, 8_000), ("streamed", 224, 256)])
def test_memory_does_not_grow_with_the_number_of_images(tmp_path, how, size, few):
    def peak(count):
        with open(tmp_path / "pixels", "wb") as file:       # a file of holes
            file.truncate(count * size * size * 3)
        argv = [sys.executable, "-c", MEMORY, tmp_path / "pixels", str(count), str(size), how]
        done = subprocess.run(argv, capture_output=True, text=True, env=ENV)
        return float(done.stdout) if done.stdout else pytest.fail(done.stderr)
    small, large = peak(few), peak(8 * few)
    assert small < 250 and large - small < 30, (small, large)


KILLED = """
import os, signal
from kd.command import command
from kd.packing import decoded
from kd.readers import Images

def main(argv):
    images = Images(9, lambda i: os.kill(os.getpid(), signal.SIGKILL), "x")
    for _ in decoded(images, 32, [[i] for i in range(9)]):
        pass
command(main)
"""


def test_a_decoder_that_is_killed_is_one_line():
    done = subprocess.run([sys.executable, "-c", KILLED], capture_output=True, text=True, env=ENV)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "a process that decodes images was killed, mostly for lack of memory." in done.stderr


def test_packing_needs_no_fork(tmp_path):
    (tmp_path / "spawned.py").write_text(
        "import multiprocessing, sys\nimport kd.packing\nfrom layout_files import source\n"
        "if __name__ == '__main__':\n    multiprocessing.set_start_method('spawn')\n"
        "    kd.packing.FORKS = False\n    print(len(source(*sys.argv[1:])))\n")
    argv = [sys.executable, tmp_path / "spawned.py", tmp_path / "d", pool(tmp_path / "pool", 600)]
    done = subprocess.run(argv, capture_output=True, text=True, env=ENV)
    assert done.stdout.endswith("600\n"), done.stderr


@pytest.mark.parametrize("spec", ["rows={}/data/*.parquet", "hf:{}"])
def test_rows_of_hugging_face_data_sets_answer_as_the_same_images_in_a_folder_do(tmp_path, spec):
    datasets = pytest.importorskip("datasets", reason="pip install datasets")
    save(tmp_path / "pool", *(f"{i}.png" for i in range(9)), size=(40, 36))
    folder, repository = source(tmp_path / "d", f"p={tmp_path / 'pool'}"), tmp_path / "hub" / "rows"
    rows = datasets.Dataset.from_dict(
        {"image": ["x"] * 10, "label": list(range(10)),
         "img": [*(f"{tmp_path}/pool/{i}.png" for i in range(9)), None]},
        features=datasets.Features({"image": datasets.Value("string"), "img": datasets.Image(),
                                    "label": datasets.Value("int64")}))
    file = repository / "data" / "train-00000-of-00001.parquet"
    file.parent.mkdir(parents=True)
    rows.to_parquet(file)
    for pack in ("always", "never", "always"):
        found = source(tmp_path / "d", data_set_spec(spec.format(repository)), pack=pack,
                       max_bad=0.1)     # the last row has no image
        [(pixels, _, _)] = found.batches(rows=np.arange(9))
        np.testing.assert_array_equal(pixels, folder.images)
        assert found.name == "rows"
    rows.select_columns("label").to_parquet(file)
    refusal("it has no column of images, but label", source, tmp_path / "d",
            data_set_spec(spec.format(repository)))


NOT_WHOLE = {
    "cut": (lambda path: os.truncate(path, 19_500), "001.tar is damaged"),
    "a broken header": (lambda path: path.write_bytes(
        path.read_bytes()[:1024] + b"?" * 512 + path.read_bytes()[1536:]), "is damaged"),
    "compressed": (lambda path: path.write_bytes(gzip.compress(path.read_bytes())),
                   "not an uncompressed tar archive")}


@pytest.mark.parametrize("damage, said", NOT_WHOLE.values(), ids=NOT_WHOLE)
def test_shards_that_are_not_whole_are_named_in_one_line(tmp_path, damage, said):
    pool(tmp_path / "pool", 25)
    for number in range(3):
        with tarfile.open(tmp_path / f"{number:03}.tar", "w") as tar:
            tar.add(tmp_path / "pool", "pool")
    damage(tmp_path / "001.tar")
    refusal(said, source, tmp_path / "d", f"s={tmp_path}/{{000..002}}.tar")
