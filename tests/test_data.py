"""Data sets: what every layout is read as, where they are found, what is refused.

All files are generated, small, in the official layouts; torchvision's own classes are the oracle.
"""
import os
import shutil
import unicodedata

import layout_files as made
import numpy as np
import pytest
import torchvision
from conftest import refusal, run_script
from layout_files import save, settings_of, source, target
from PIL import Image
from torchvision.transforms import Resize

import data

small = made.small
pytestmark = pytest.mark.usefixtures("small")
ORACLES = {     # name: arguments of torchvision's class for train, test and source
    "cifar10": ("CIFAR10", {"train": True}, {"train": False}, {"train": True}),
    "cifar100": ("CIFAR100", {"train": True}, {"train": False}, {"train": True}),
    "svhn": ("SVHN", {"split": "train"}, {"split": "test"}, {"split": "train"}),
    "stl10": ("STL10", {"split": "train"}, {"split": "test"}, {"split": "train+unlabeled"})}


@pytest.mark.quick
@pytest.mark.parametrize("name", ORACLES)
def test_arrays_are_read_as_torchvision_reads_them(tmp_path, name):
    kind, *splits = ORACLES[name]
    made.WRITERS[name](tmp_path)
    size = 96 if name == "stl10" else 32
    ours = target(tmp_path, name, image_size=size)
    for pack, arguments in zip((ours.train, ours.test, source(tmp_path, name, image_size=size)),
                               splits, strict=True):
        theirs = getattr(torchvision.datasets, kind)(tmp_path, **arguments)
        for image, (expected, _) in zip(pack.images, theirs, strict=True):
            np.testing.assert_array_equal(image, np.asarray(expected))
        if pack.labels is not None:
            assert pack.labels.tolist() == [label for _, label in theirs]
            assert pack.classes == getattr(theirs, "classes", list("0123456789"))


@pytest.mark.parametrize("name", ["tinyimagenet", "places365", "caltech256", "caltech101"])
def test_image_files_become_what_torchvisions_resize_makes_of_them(tmp_path, name):
    root, pack = made.WRITERS[name](tmp_path), source(tmp_path, name)
    assert len(pack) == made.SMALL[name]["source"] and pack.labels is None
    assert list(pack.files) == sorted(pack.files)
    for file, image in zip(pack.files, pack.images, strict=True):
        path = root / "train" / file if name == "tinyimagenet" else root / file
        np.testing.assert_array_equal(image, np.asarray(Resize((32, 32))(Image.open(path))))


def test_folders_of_classes_have_their_official_test_split_or_every_fifth_image(tmp_path):
    for write in (made.write_tinyimagenet, made.write_caltech256, made.write_caltech101):
        write(tmp_path)
    tiny = target(tmp_path, "tinyimagenet")
    assert tiny.classes == ["n01", "n02"] and tiny.train.labels.tolist() == [0, 0, 1, 1]
    assert tiny.test.labels.tolist() == [1, 0, 1] and tiny.test.files[2] == "val_2.JPEG"
    found = target(tmp_path, "caltech256")
    assert found.classes == ["056.dog", "198.spider"] and len(found.train) == 14
    assert list(found.test.files) == ["056.dog/056_0005.jpg", "056.dog/056_0010.jpg",
                                      "198.spider/198_0005.jpg"]
    assert not set(found.train.rows) & set(found.test.rows)
    assert target(tmp_path, "caltech101").classes == ["Motorbikes", "accordion"]


@pytest.mark.quick
def test_digits_are_scikit_learns_with_the_same_split_for_every_seed(tmp_path):
    from sklearn.datasets import load_digits
    official = load_digits()
    digits, other = target(tmp_path / "a", "digits"), target(tmp_path / "b", "digits", seeds=(7,))
    assert sorted([*digits.train.rows, *digits.test.rows]) == list(range(1797))
    assert digits.test.rows.tolist() == other.test.rows.tolist() and len(digits.test) == 359
    assert digits.test.labels.tolist() == official.target[digits.test.rows].tolist()
    ink = np.rint(official.images[digits.test.rows[3]] / 16 * 255).astype(np.uint8)
    expected = Resize((32, 32))(Image.fromarray(ink).convert("RGB"))
    np.testing.assert_array_equal(digits.test.images[3], np.asarray(expected))


@pytest.mark.parametrize("name", ["glyphs", "photos", "noise"])
def test_drawn_sources_depend_on_seed_and_number_alone(tmp_path, name):
    first, again, other = (source(tmp_path / str(seed), name, limit=limit, seeds=(seed,))
                           for limit, seed in ((12, 3), (2, 3), (12, 4)))
    np.testing.assert_array_equal(first.images[[0, 11]], again.images)
    assert first.rows[[0, 11]].tolist() == again.rows.tolist()
    assert all((one != two).any() for one, two in zip(first.images, other.images, strict=True))


def cut(path, count):
    os.truncate(path, path.stat().st_size - count)


DAMAGE = {      # what it is: (data set, what is done to its layout)
    "STL10 cut short": ("stl10", lambda root: cut(root / "test_X.bin", 1)),
    "no annotations": ("tinyimagenet", lambda root: shutil.rmtree(root / "val")),
    "a class without images": ("caltech101", lambda root: shutil.rmtree(root / "Motorbikes"))}


@pytest.mark.parametrize("name, damage", DAMAGE.values(), ids=DAMAGE)
def test_a_layout_that_is_not_whole_is_one_line_that_names_it(tmp_path, name, damage):
    root = made.WRITERS[name](tmp_path)
    damage(root)
    read = source if name == "caltech101" else target
    refusal(f"^{root} is incomplete or damaged", read, tmp_path, name)


def test_a_batch_of_cifar_is_unpickled_only_when_it_is_the_official_one(tmp_path, monkeypatch):
    root = made.write_cifar10(tmp_path)
    (root / "data_batch_1").write_bytes(f"cos\nsystem\n(S'touch {tmp_path}/run'\ntR.".encode())
    monkeypatch.undo()      # checksums count again
    refusal(f"^{root} is incomplete or damaged", source, tmp_path, "cifar10")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name, below", [
    ("svhn", "."), ("svhn", "SVHN"), ("cifar10", "CIFAR-10"), ("caltech101", "caltech101")])
def test_data_sets_are_read_in_place_where_torchvisions_users_have_them(tmp_path, name, below):
    made.WRITERS[name](tmp_path / below)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert len(source(tmp_path, name)) == made.SMALL[name]["source"]
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_folder_with_a_data_sets_name_serves_as_it_and_may_hold_links(tmp_path):
    save(tmp_path / "disk" / "cat", "a.png", "b.png")
    (tmp_path / "data" / "caltech101").mkdir(parents=True)
    (tmp_path / "data" / "caltech101" / "cat").symlink_to(tmp_path / "disk" / "cat")
    assert list(source(tmp_path / "data", "caltech101").files) == ["cat/a.png", "cat/b.png"]
    save(tmp_path / "data" / "cifar10", *(f"{split}/{name}/1.png" for split in ("train", "test")
                                          for name in "ab"))
    assert target(tmp_path / "data", "cifar10").classes == ["a", "b"]
    assert list(source(tmp_path / "data", "cifar10").files) == ["a/1.png", "b/1.png"]


@pytest.mark.quick
def test_what_counts_as_an_image_is_said_by_its_name_or_by_its_content(tmp_path, capsys):
    root, elsewhere = tmp_path / "pool", tmp_path / "elsewhere"
    names = ["b/2.PNG", "b/10.png", "a.b/x.png", "a/1.gif", "a/y/z.jpeg"]
    save(root, *names, ".hidden.png", ".cache/a.png", "__MACOSX/a.png", "a/._1.png")
    save(root, "c.jfif", "d", kind="JPEG")
    for name in ("notes.txt", "labels.json", "a/page", "b/c.heic", "broken.jpg", "empty.png"):
        (root / name).write_text("no image" * (name != "empty.png"))
    save(elsewhere, "a.png")
    (root / "link").symlink_to(elsewhere)
    (root / "link.png").symlink_to("b/2.PNG")
    (elsewhere / "loop").symlink_to(root)
    found = source(tmp_path / "d", f"pool={root}", max_bad=1.0)
    assert sorted(found.files) == sorted([*names, "c.jfif", "d", "link.png", "link/a.png"])
    said = capsys.readouterr().out
    assert "pool: skipping what is not an image (4 hidden" in said and "1 .heic" in said
    assert found.bad == 2


def pets(root, test="test", names=("ant", "bee")):
    for split in ("train", test):
        save(root / split, *(f"{name}/{i}.png" for name in names for i in range(3)))
    return f"pets={root}"


@pytest.mark.quick
def test_a_target_has_a_class_per_folder_hidden_ones_and_empty_ones_left_out(tmp_path, capsys):
    spec = pets(tmp_path / "pets", test="val")      # which is taken for test, where there is none
    save(tmp_path / "pets" / "train", ".ipynb_checkpoints/a.png", "bee/deep/er/b.png")
    (tmp_path / "pets" / "train" / "cow").mkdir()
    found = target(tmp_path / "d", spec)
    assert found.classes == ["ant", "bee"]
    assert found.train.labels.tolist() == [0] * 3 + [1] * 4 and len(found.test) == 6
    assert "pets train: cow holds no image and is not a class." in capsys.readouterr().out


def test_a_class_that_can_not_be_read_is_refused(tmp_path, monkeypatch):
    spec, access = pets(tmp_path / "pets"), os.access
    (tmp_path / "pets" / "train" / "cow").mkdir()       # root, too, may read it
    monkeypatch.setattr(os, "access", lambda path, mode: (
        "cow" not in str(path) and access(path, mode)))
    refusal("pets/train/cow can't be read: its class would be left out.", target, tmp_path, spec)


@pytest.mark.quick
def test_classes_take_the_order_of_the_names_that_are_given(tmp_path, capsys):
    composed, split = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    spec = pets(tmp_path / "pets", names=("ant", split))        # as macOS writes the accent
    plain, turned = (target(tmp_path / "d", spec, classes=names) for names in (
        2, (composed, "ant")))
    assert plain.classes == ["ant", composed] and turned.classes == [composed, "ant"]
    assert turned.train.labels.tolist() == [1, 1, 1, 0, 0, 0]
    assert turned.train.fingerprint != plain.train.fingerprint
    assert "made again" not in capsys.readouterr().out      # one pack serves all orders
    for wrong in (3, ("ant", "cow"), ("ant", composed, "cow")):
        refusal("--classes gives . classes", target, tmp_path / "d", spec, classes=wrong)


REFUSED = {     # what it is: (target, sources, what the line says), in the working folder
    "an unknown name": ("pets={}/pets", "cifar11", "no data set cifar11.*cifar10.*cifar11=PATH"),
    "a missing folder": ("pets={}/pets", "pool={}/nowhere", "there is no folder .*nowhere"),
    "a target without test": ("pets={}/pets/train", "noise", "there is no folder .*train/train"),
    "a target without classes": ("noise", "glyphs", "no data set noise to be a target"),
    "compressed shards": ("pets={}/pets", "pool={}/a.tar.gz", "uncompressed .tar shards"),
    "no shards": ("pets={}/pets", "pool={}/{{000..002}}.tar", r"there is no .*000.tar.*\*.tar"),
    "the target": ("pets={}/pets", "pool={}/pets", "pool and the target are the same folder"),
    "a class of it": ("pets={}/pets", "pool={}/pets/train/ant", "pool and the target"),
    "what holds it": ("pets={}/pets", "pool={}", "the same folder"),
    "a folder twice": ("pets={}/pets", "a={}/pool,b={}/again", "b and the source a are the same"),
    "a folder within": ("pets={}/pets", "a={}/pool/x,b={}/pool", "images would be used twice")}


@pytest.mark.quick
@pytest.mark.parametrize("given, sources, said", REFUSED.values(), ids=REFUSED)
def test_what_can_not_be_used_is_one_line_before_any_work(tmp_path, given, sources, said):
    pets(tmp_path / "pets")
    made.write_cifar10(tmp_path / "d")
    save(tmp_path / "pool", "x/a.png")
    (tmp_path / "again").symlink_to(tmp_path / "pool")
    (tmp_path / "a.tar.gz").write_bytes(b"")
    sources = [spec.format(tmp_path) for spec in sources.split(",")]
    refusal(said, data.obtain, settings_of(tmp_path / "d", given.format(tmp_path), sources))


def test_a_folder_beside_the_splits_of_a_target_is_a_source_like_any_other(tmp_path):
    spec = pets(tmp_path / "pets")
    save(tmp_path / "pets" / "unlabelled", "a.png")
    assert len(source(tmp_path / "d", f"pool={tmp_path}/pets/unlabelled", target=spec)) == 1
    refusal("pool and the target", source, tmp_path / "d", f"pool={tmp_path}/pets/train",
            target=spec, data_free=True)


@pytest.mark.parametrize("change, said", [
    (lambda root: save(root, "test/zebra/1.png"), "zebra is in only one of train and test"),
    (lambda root: [shutil.rmtree(root / split / "bee") for split in ("train", "test")],
     "two classes or more, found 1"),
    (lambda root: [path.unlink() for path in root.rglob("*.png")], "no images found")])
def test_a_target_that_can_not_be_learnt_is_one_line(tmp_path, change, said):
    spec = pets(tmp_path / "pets")
    change(tmp_path / "pets")
    refusal(said, target, tmp_path / "d", spec)


@pytest.mark.quick
def test_the_list_shows_every_data_set_with_its_size_its_state_and_its_terms(tmp_path):
    (tmp_path / "stl10_binary.tar.gz").write_bytes(b"")
    made.write_tinyimagenet(tmp_path)
    done = run_script("data.py", "--list", "--data-dir", tmp_path)
    lines = {line.split()[0]: " ".join(line.split()) for line in done.stdout.splitlines()}
    assert done.returncode == 0 and set(data.DATA_SETS) < set(lines)
    for line in ("svhn 73,257 182 MB absent non-commercial", "cifar10 50,000 170 MB absent",
                 "caltech101 9,144 137 MB absent CC BY 4.0", "digits 1,438 - built-in",
                 "stl10 105,000 - archive", "tinyimagenet 100,000 - extracted"):
        assert lines[line.split()[0]].startswith(line)


def test_folders_are_packed_by_their_path(tmp_path):
    save(tmp_path / "pictures", *(f"{i:02}.png" for i in range(20)))
    (tmp_path / "pictures" / "07.png").write_bytes(b"no image")
    save(tmp_path / "more", "a.png")
    argv = ["more=~/more", "mine=pictures", "--data-dir", "d"]
    done = run_script("data.py", *argv, cwd=tmp_path, env={"HOME": str(tmp_path)})
    assert done.returncode == 2 and done.stdout.splitlines()[-1] == "more: 1 images packed"
    assert "mine: 1 of 20 images can't be read, more than --max-bad 0.01" in done.stderr
    done = run_script("data.py", f"mine={tmp_path}/pictures", "--max-bad", "5%", "--data-dir", "d",
                      cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.endswith("mine: 19 images packed, 1 left out\n")
    assert len(made.names_in(tmp_path / "d" / "packed")) == 2


def test_what_is_drawn_is_packed_for_each_seed(tmp_path, monkeypatch):
    monkeypatch.setitem(data.drawn.COUNTS, "noise", 5)
    made.register(monkeypatch, "noise", images={"source": 5})
    data.main(["noise", "--seeds", "0,3", "--data-dir", str(tmp_path)])
    assert made.names_in(tmp_path / "packed") == ["noise-source-32-seed0", "noise-source-32-seed3"]


def test_a_test_folder_without_classes_gives_way_to_val(tmp_path):
    """As in ImageNet's and TinyImageNet's own layouts."""
    spec = pets(tmp_path / "pets", test="val")
    save(tmp_path / "pets" / "test", "images/1.png", "2.png")
    assert target(tmp_path / "d", spec).classes == ["ant", "bee"]
    spec = pets(tmp_path / "cats")
    save(tmp_path / "cats" / "val", "images/1.png")     # somebody's other split
    assert target(tmp_path / "d", spec).classes == ["ant", "bee"]
