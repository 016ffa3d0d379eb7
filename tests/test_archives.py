"""Archives: fetched, verified, extracted and read; hostile and damaged ones refused in one line."""
import gzip
import io
import os
import stat
import tarfile
import tracemalloc

import layout_files as made
import pytest
from conftest import refusal
from layout_files import WRITERS, names_in, register, remote, source, tar_of, zip_of

import data
from kd.archives import extract

small, server = made.small, made.server
MEGABYTE = 1 << 20
REGULAR = tarfile.REGTYPE


def official(tmp_path, name):
    """A small archive as the official one is made."""
    root = WRITERS[name](tmp_path / "made")
    if name == "caltech101":
        return zip_of({"caltech-101/101_ObjectCategories.tar.gz": tar_of(root.parent, root.name),
                       "caltech-101/Annotations.tar": b"", "__MACOSX/._101.tar.gz": b"junk"})
    if name == "tinyimagenet":
        return zip_of({str(path.relative_to(root.parent)): path.read_bytes()
                       for path in root.rglob("*") if path.is_file()})
    file = data.DATA_SETS[name].files[0].name
    return tar_of(root.parent, root.name, mode="w:gz" if file.endswith("gz") else "w")


@pytest.mark.parametrize("name", [name for name in WRITERS if name != "svhn"])
def test_an_archive_is_fetched_verified_extracted_and_read(
        tmp_path, monkeypatch, server, small, name):
    content, file = official(tmp_path, name), data.DATA_SETS[name].files[0].name
    url = server.url(file, lambda handler: handler.answer(200, content))
    register(monkeypatch, name, files=(remote(content, url),))
    for _ in range(2):
        found = source(tmp_path / "d", name)
        assert len(found) == data.DATA_SETS[name].images["source"]
    assert names_in(tmp_path / "d") == sorted([data.DATA_SETS[name].layout, file, "packed"])
    assert len(server.asked) == 1


def test_an_archive_that_is_put_there_by_hand_is_used(tmp_path, monkeypatch, small):
    content = official(tmp_path, "caltech256")
    register(monkeypatch, "caltech256", files=(remote(content, "http://127.0.0.1:9/c.tar"),))
    (tmp_path / "d" / "Caltech-256").mkdir(parents=True)       # where torchvision has it
    (tmp_path / "d" / "Caltech-256" / "c.tar").write_bytes(content)
    assert len(source(tmp_path / "d", "caltech256")) == 20
    assert names_in(tmp_path / "d" / "Caltech-256") == ["256_ObjectCategories", "c.tar"]


def test_an_archive_that_is_not_whole_is_refused_and_named(
        tmp_path, monkeypatch, small):
    root = made.write_cifar10(tmp_path / "made")
    (root / "data_batch_4").unlink()
    content = tar_of(root.parent, root.name)
    (tmp_path / "d").mkdir()
    archive = tmp_path / "d" / "cifar-10-python.tar.gz"
    archive.write_bytes(content)
    url = "http://127.0.0.1:9/cifar-10-python.tar.gz"
    register(monkeypatch, "cifar10", files=(remote(content, url),))
    refusal(rf"^{archive} is incomplete or damaged .*data_batch_4", source, tmp_path / "d",
            "cifar10")
    assert names_in(tmp_path / "d") == [archive.name]


def tar_with(*members):
    """A .tar.gz of pictures/first.txt and these members: (name, type, a link's target, content)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, kind, target, content in (("pictures/first.txt", REGULAR, "", b"1"), *members):
            member = tarfile.TarInfo(name)
            member.type, member.linkname, member.size = kind, target, len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def zip_with(**files):
    return zip_of({"pictures/first.txt": b"1", **files})


def header(name, kind):
    member = tarfile.TarInfo(name)
    member.type, member.size = kind, 60 * MEGABYTE
    return gzip.compress(member.tobuf(tarfile.GNU_FORMAT))


def with_holes():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo("pictures/a.jpg")
        member.pax_headers = {"GNU.sparse.map": "0,0", "GNU.sparse.size": "1000000000000",
                              "GNU.sparse.numblocks": "1"}
        archive.addfile(member)
    return buffer.getvalue()


def lying_zip():
    """One that declares a thousand bytes, and unpacks to sixty million."""
    content = bytearray(zip_with(zeros=bytes(60 * MEGABYTE)))
    for position in (content.rfind(b"PK\3\4") + 22, content.rfind(b"PK\1\2") + 24):
        content[position:position + 4] = (1000).to_bytes(4, "little")
    return bytes(content)


ZEROS = gzip.compress(bytes(MEGABYTE)) * 60
CUT = tar_with(("pictures/a.jpg", REGULAR, "", os.urandom(100_000)))[:60_000]
HOSTILE = {     # what it is: (suffix, content, what the line says)
    **{f"a tar with {name}": (".tar.gz", tar_with((name, REGULAR, "", b"evil")), "leads out of")
       for name in ("/tmp/evil", "../evil", "a/../../evil", "..", "a\\..\\..\\evil", "C:\\evil")},
    **{f"a zip with {name}": (".zip", zip_with(**{name: b"evil"}), "leads out of")
       for name in ("/tmp/evil", "../evil", "a/../../evil")},
    **{f"a tar with a {what}": (".tar.gz", tar_with(("pictures/x", kind, "../../x", b"")), "a link")
       for what, kind in (("link", tarfile.SYMTYPE), ("hard link", tarfile.LNKTYPE),
                          ("device", tarfile.CHRTYPE), ("pipe", tarfile.FIFOTYPE))},
    "a file with holes": (".tar.gz", with_holes(), "with holes"),
    "a tar in a zip that climbs": (".zip", zip_with(**{"inner.tar.gz": tar_with(
        ("../../evil", REGULAR, "", b"evil"))}), "leads out of"),
    "zeros in a tar": (".tar.gz", header("pictures/0", REGULAR) + ZEROS, "several times"),
    "zeros in a zip": (".zip", zip_with(zeros=bytes(60 * MEGABYTE)), "several times"),
    "zeros in a zip that says less": (".zip", lying_zip(), "Bad CRC-32"),
    "a large header": (".tar.gz", header("pictures/0", tarfile.XHDTYPE) + ZEROS, "several times"),
    "a tar cut short": (".tar.gz", CUT, "can't be used"),
    "no tar": (".tar.gz", b"<html>not found</html>" * 100, "can't be used"),
    "an empty file": (".tar", b"", "can't be used"),
    "a zip cut short": (".zip", zip_with(a=os.urandom(100_000))[:60_000], "can't be used"),
    "another content": (".zip", zip_of({"drawings/a.jpg": b""}), "does not hold pictures/"),
}


@pytest.mark.quick
@pytest.mark.parametrize("suffix, content, said", HOSTILE.values(), ids=map(ascii, HOSTILE))
def test_a_hostile_or_damaged_archive_is_refused_and_leaves_nothing(
        tmp_path, suffix, content, said):
    folder = tmp_path / "d"
    folder.mkdir()
    archive = folder / f"pictures{suffix}"
    archive.write_bytes(content)
    tracemalloc.start()
    try:
        line = refusal(said, extract, archive, folder / "pictures", 10 * MEGABYTE, lambda _: None)
        assert tracemalloc.get_traced_memory()[1] < 30 * MEGABYTE
    finally:
        tracemalloc.stop()
    assert line.startswith(f"{archive} can't be used (")
    assert names_in(folder) == [archive.name] and names_in(tmp_path) == ["d"]


def test_an_archive_is_extracted_with_plain_modes_and_what_was_begun_is_begun_again(tmp_path):
    archive, place = tmp_path / "pictures.tar.gz", tmp_path / "pictures"
    archive.write_bytes(tar_with(("pictures/deep/last.txt", REGULAR, "", b"2")))
    (tmp_path / ".pictures.part" / "pictures").mkdir(parents=True)
    (tmp_path / ".pictures.part" / "pictures" / "junk").write_text("")
    extract(archive, place, MEGABYTE, lambda folder: None)
    assert names_in(place) == ["deep", "first.txt"] and names_in(tmp_path) == [
        "pictures", "pictures.tar.gz"]
    assert not stat.S_IMODE((place / "first.txt").stat().st_mode) & 0o111
    (place / "first.txt").write_text("mine")
    extract(archive, place, MEGABYTE, lambda folder: None)
    assert (place / "first.txt").read_text() == "mine"
