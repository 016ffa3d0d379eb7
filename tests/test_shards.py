"""Tar shards, written by webdataset itself, against the same images in a folder."""
import io
import os
import shutil
import tarfile

import numpy as np
import pytest
from conftest import refusal
from layout_files import random_pixels, save, source
from PIL import Image

webdataset = pytest.importorskip("webdataset", reason="pip install webdataset")


def write_shards(tmp_path, count=60, per_shard=25):
    """The same images in shards/ and, by the same names, in pool/."""
    save(tmp_path / "pool", *(f"{i:04}.png" for i in range(count)), size=(40, 36))
    (tmp_path / "shards").mkdir()
    pattern = str(tmp_path / "shards" / "%03d.tar")
    with webdataset.ShardWriter(pattern, maxcount=per_shard, verbose=0) as shards:
        for i in range(count):
            content = (tmp_path / "pool" / f"{i:04}.png").read_bytes()
            shards.write({"__key__": f"{i:04}", "png": content, "json": {"number": i}, "txt": "x"})
    return f"{tmp_path}/shards/{{000..{(count - 1) // per_shard:03}}}.tar"


@pytest.mark.quick
def test_a_limit_takes_images_evenly_from_all_shards(tmp_path):
    found = source(tmp_path / "d", f"s={write_shards(tmp_path)}", limit=7)
    assert found.rows.tolist() == np.linspace(0, 59, 7).round().astype(int).tolist()
    assert {name[:3] for name in found.files} == {"000", "001", "002"}


def png(i):
    buffer = io.BytesIO()
    Image.fromarray(random_pixels(8, 8, 3, seed=i)).save(buffer, "PNG")
    return buffer.getvalue()


def test_the_rule_of_folders_holds_in_shards(tmp_path, capsys):
    long = "x/" * 90 + "long.png"       # whose header is several
    members = {"./._000.png": b"\0\5\26\7resource fork", "./000.png": png(0),
               ".hidden/1.png": png(1), "__MACOSX/2.png": png(2),
               "no suffix": png(4), "page": b"<html>", "a.cls": b"7", long: png(5),
               "broken.jpg": b"junk", "empty.png": b""}
    with tarfile.open(tmp_path / "000.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "./000.png"
        tar.addfile(link)
    found = source(tmp_path / "d", f"s={tmp_path}/000.tar", max_bad=0.5)
    assert list(found.files) == [f"000.tar/{name}" for name in ("./000.png", "no suffix", long)]
    assert found.bad == 2 and found.rows.tolist() == [0, 1, 2]
    assert "(3 hidden, 1 no suffix, 1 .cls)" in capsys.readouterr().out


DAMAGE = {
    "missing": (lambda path: path.unlink(), "there is no .*001.tar"),
    "no tar": (lambda path: path.write_bytes(b"no tar" * 300), "001.tar is damaged, or not an"),
    "empty": (lambda path: path.write_bytes(b""), "001.tar is damaged"),
    "cut": (lambda path: os.truncate(path, 20_000), "001.tar is damaged .*unexpected end"),
    "a broken header": (lambda path: path.write_bytes(path.read_bytes()[:10_240] + b"?" * 512
                                                      + path.read_bytes()[10_752:]), "is damaged"),
    "compressed": (lambda path: shutil.copyfile(
        path.with_suffix(".gz"), path), "not an uncompressed tar archive"),
}


@pytest.mark.parametrize("damage, said", DAMAGE.values(), ids=DAMAGE)
def test_shards_that_are_not_whole_are_named_in_one_line(tmp_path, damage, said):
    pattern = write_shards(tmp_path)
    with tarfile.open(tmp_path / "shards" / "001.gz", "w:gz") as tar:
        tar.add(tmp_path / "pool" / "0000.png")
    damage(tmp_path / "shards" / "001.tar")
    refusal(said.replace(" .*", ".*"), source, tmp_path / "d", f"s={pattern}")
