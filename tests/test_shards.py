"""Sources in tar shards against the same images in a folder."""
import csv
import io
import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

import compile
import data
import transfer
from shards import expanded, open_shards
from test_processes import torchrun

pytest.importorskip("braceexpand", reason="braceexpand is an optional extra: pip install -r requirements-extra.txt")
RUN = Path("runs/colours")


def make_shards(folder, files, shards=3, extra=()):
    """Writes `files`, paths of images, into that many shards, each image with a .json beside it, and `extra`, [(name, content)], into the
    last. Returns the pattern."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, part in enumerate(np.array_split(np.arange(len(files)), shards)):
        with tarfile.open(folder / f"{number:06}.tar", "w") as tar:
            def add(name, content):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            for i in part:
                add(f"{i:05}.png", files[i].read_bytes())
                add(f"{i:05}.json", b"{}")
            for name, content in extra if number == shards - 1 else ():
                add(name, content)
    return f"{folder}/{{000000..{shards - 1:06}}}.tar"


@pytest.fixture
def pool_files(painted):
    return sorted(painted[1].rglob("*.png"), key=lambda path: (str(path.parent), path.name))


def with_pool(flags, pool, *more):
    at = flags.index("--sources")
    return [*flags[:at], "--sources", f"pool={pool}", *flags[at + 2:], *more]


def manifest(approach, run=RUN):
    with open(run / "transfer" / approach / "manifest.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_shards_give_the_selection_of_the_same_images_in_a_folder(painted, pool_files, flags, execute, tmp_path):
    ordered = tmp_path / "ordered"
    ordered.mkdir()
    for number, path in enumerate(pool_files):
        shutil.copy(path, ordered / f"{number:05}.png")
    chosen = ["--approaches", "balanced,random,mms", "--threshold-scale", "0.5"]
    assert execute(compile.main, [*with_pool(flags, ordered), *chosen])[0] == 0
    pattern = make_shards(tmp_path / "shards", pool_files)
    given = [*with_pool(flags, pattern), *chosen, "--run-dir", "runs/sharded", "--teacher-checkpoint", str(RUN / "teacher.pt")]
    status, out, err = execute(compile.main, given)
    assert (status, err) == (0, "")
    sharded = Path("runs/sharded")
    for approach in ("balanced", "random", "mms"):
        ours, theirs = manifest(approach, sharded), manifest(approach)
        assert [row["index"] for row in ours] == [row["index"] for row in theirs] and len(ours) > 10
        assert [row["file"].partition("/")[2] for row in ours] == [row["file"] for row in theirs]
        assert {row["file"].partition("/")[0] for row in ours} <= {"000000.tar", "000001.tar", "000002.tar"}
        assert np.array_equal(np.load(sharded / "transfer" / approach / "images.npy"), np.load(RUN / "transfer" / approach / "images.npy"))
        np.testing.assert_allclose([float(row["score"]) for row in ours], [float(row["score"]) for row in theirs], rtol=1e-4)
    assert not list(Path("data/packed").glob("pool-source-32-*/../pool-source-32-limit*")) and len(list(Path("data/packed").glob("pool-*"))) == 1     # the folder's alone
    before = (sharded / "scores/pool.npz").stat().st_mtime_ns
    assert execute(compile.main, given)[0] == 0 and (sharded / "scores/pool.npz").stat().st_mtime_ns == before
    # Repeated images are read once and written as often as they are chosen.
    shutil.rmtree(sharded / "transfer")
    shutil.rmtree(sharded / "students")
    (sharded / "results.json").unlink()
    (sharded / "results.md").unlink()
    status, out, err = execute(transfer.main, ["--target", flags[1], "--run-dir", "runs/sharded", "--approach", "mms", "--shortfall", "repeat", "--transfer-size", "600"])
    assert (status, err) == (0, "")
    rows, images = manifest("mms", sharded), np.load(sharded / "transfer/mms/images.npy")
    by_index = {}
    for row, image in zip(rows, images, strict=True):
        assert np.array_equal(by_index.setdefault(row["index"], image), image)
    assert len(by_index) < len(rows)


def test_two_processes_select_from_shards_what_one_selects(painted, pool_files, flags, tmp_path):
    pattern = make_shards(tmp_path / "shards", pool_files, shards=3)
    given = [*with_pool(flags, pattern), "--approaches", "balanced,mms", "--data-dir", str(tmp_path / "data")]
    one = torchrun(1, "compile.py", [*given, "--run-dir", str(tmp_path / "one")])
    assert one.returncode == 0, one.stderr
    two = torchrun(2, "compile.py", [*given, "--run-dir", str(tmp_path / "two"), "--teacher-checkpoint", str(tmp_path / "one" / "teacher.pt")])
    assert two.returncode == 0, two.stderr
    for name in ("transfer/mms/manifest.csv", "transfer/mms/images.npy", "transfer/balanced/manifest.csv"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_images_that_can_not_be_read_are_counted_listed_and_left_out(painted, pool_files, flags, execute, tmp_path):
    pattern = make_shards(tmp_path / "shards", pool_files, extra=[("odd/broken.jpg", b"junk"), ("empty.png", b""), ("last.png", pool_files[0].read_bytes())])
    given = [*with_pool(flags, pattern), "--approaches", "balanced"]
    status, out, err = execute(compile.main, given)
    listing = RUN / "scores/pool.bad.txt"
    assert status == 2 and f"pool: 2 of 123 images can't be read, more than 0.01 of all, see {listing}" in err and len(err.splitlines()) == 1
    status, out, err = execute(compile.main, [*given, "--max-bad", "5%"])
    assert (status, err) == (0, "") and "Images that can't be read are left out: pool 2." in out
    assert [line.split("\t")[:2] for line in listing.read_text().splitlines()] == [["000002.tar", "odd/broken.jpg"], ["000002.tar", "empty.png"]]
    index = np.load(RUN / "scores/pool.npz")["index"]
    assert index.tolist() == [*range(120), 122]
    assert all(row["file"] != "000002.tar/empty.png" for row in manifest("balanced"))


def test_a_limit_is_spread_over_the_shards(pool_files, tmp_path):
    pattern = make_shards(tmp_path / "shards", pool_files)
    found = list(open_shards("pool", pattern, 32, 7).read(0, 3))
    assert [shard.images for shard in found] == [3, 3, 3] and [shard.number for shard in found] == [0, 1, 2]
    again = list(open_shards("pool", pattern, 32, None).take({2: [1, 2], 0: [0]}))
    assert [(shard.number, shard.numbers) for shard in again] == [(0, [0]), (2, [1, 2])]
    assert np.array_equal(again[1].pixels, found[2].pixels[1:])


@pytest.mark.parametrize("damage, said", [
    (lambda shards: (shards / "000001.tar").unlink(), "1 of 3 shards are not there, the first is "),
    (lambda shards: (shards / "000001.tar").write_bytes(b"no tar at all" * 100), "000001.tar is damaged or can't be read"),
    (lambda shards: (shards / "000001.tar").write_bytes((shards / "000001.tar").read_bytes()[:2000]), "000001.tar is damaged or can't be read"),
    (lambda shards: [path.write_bytes(b"") for path in shards.iterdir()], "is damaged or can't be read"),
])
def test_shards_that_are_not_whole_are_named_in_one_line(painted, pool_files, flags, execute, tmp_path, damage, said):
    pattern = make_shards(tmp_path / "shards", pool_files)
    damage(tmp_path / "shards")
    status, out, err = execute(compile.main, [*with_pool(flags, pattern), "--approaches", "balanced", "--teacher-epochs", "1"])
    assert status == 2 and said in err and len(err.splitlines()) == 1, err


def test_shards_that_have_changed_are_not_taken_for_what_was_scored(painted, pool_files, flags, execute, tmp_path):
    pattern = make_shards(tmp_path / "shards", pool_files)
    given = [*with_pool(flags, pattern), "--approaches", "balanced", "--teacher-epochs", "1"]
    assert execute(compile.main, given)[0] == 0
    make_shards(tmp_path / "shards", pool_files[::-1])
    shutil.rmtree(RUN / "transfer")
    shutil.rmtree(RUN / "students")
    status, out, err = execute(compile.main, given)
    assert status == 2 and "scores/pool.npz was computed from other images" in err


def test_a_pattern_may_have_steps(tmp_path):
    names = [f"{number:07}.tar" for number in range(0, 2_000_001, 1_000_000)]
    for name in names:
        (tmp_path / name).write_bytes(b"")
    assert expanded("pool", f"{tmp_path}/{{0000000..2000000..1000000}}.tar") == tuple(f"{tmp_path}/{name}" for name in names)


def test_without_the_library_it_is_named(monkeypatch, execute, tmp_path):
    monkeypatch.setitem(sys.modules, "braceexpand", None)
    status, out, err = execute(data.main, ["pool=/data/{0..3}.tar"], "data.py")
    assert status == 2 and "to read shards, pip install braceexpand" in err and len(err.splitlines()) == 1


def test_data_py_has_nothing_to_do_for_shards(pool_files, execute, tmp_path):
    status, out, err = execute(data.main, [f"pool={make_shards(tmp_path / 'shards', pool_files)}"], "data.py")
    assert (status, err) == (0, "") and "pool: shards are scored as they are read, nothing is packed" in out
    status, out, err = execute(compile.main, ["--target", f"x={tmp_path}/shards/000000.tar"])
    assert status == 2 and "there is no such folder" in err
