"""Archives: what is extracted, what is refused before it does any harm, and what an attempt that failed leaves behind: nothing."""
import dataclasses
import errno
import gzip
import hashlib
import io
import os
import shutil
import socket
import stat
import struct
import tarfile
import threading
import time
import tracemalloc
import zipfile
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import archives
import data
import download
from data import load_source, load_target
from files import UserError
from layout_files import (SMALL, WRITERS, as_nobody, caltech101_zip, cifar10_archive, expect_small, forks, leftovers, names_in, register, shared_folder, start,
                          tar_of, write_svhn)

MEGABYTE = 1 << 20


@pytest.fixture(autouse=True)
def small_data_sets(monkeypatch):
    """No disk has to be waited for, since nothing here is a power cut."""
    expect_small(monkeypatch)
    monkeypatch.setattr(os, "sync", lambda: None)


@pytest.fixture
def server(monkeypatch):
    """Serves `server.files` ({path: bytes}), everything else is 404."""
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.requested.append(self.path)
            content = self.server.files.get(self.path)
            if content is None:
                return self.send_error(404)
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.requested = {}, []
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def dead_url(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{closed.getsockname()[1]}"      # bound, and nobody listens


# --------------------------------------------------------------------------------------------------
# What is extracted
# --------------------------------------------------------------------------------------------------

def test_a_data_set_is_fetched_once_extracted_and_read(tmp_path, server, monkeypatch):
    content = server.files["/cifar-10-python.tar.gz"] = cifar10_archive(tmp_path / "made")
    register(monkeypatch, "cifar10", f"{server.url}/cifar-10-python.tar.gz", content)
    for _ in range(2):
        assert load_source("cifar10", tmp_path / "data").images[:2, 2, 5, 0].tolist() == [110, 111]
    assert server.requested == ["/cifar-10-python.tar.gz"]
    assert (tmp_path / "data" / "cifar-10-batches-py" / "batches.meta").exists()
    assert not leftovers(tmp_path)


def test_an_archive_in_the_data_folder_is_used_without_the_network(tmp_path, dead_url, monkeypatch):
    content = cifar10_archive(tmp_path / "made")
    register(monkeypatch, "cifar10", f"{dead_url}/cifar-10-python.tar.gz", content)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "cifar-10-python.tar.gz").write_bytes(content)
    assert data.unavailable([("cifar10", "source")], tmp_path / "data") == []
    assert load_source("cifar10", tmp_path / "data").images[:2, 2, 5, 0].tolist() == [110, 111]


def test_a_wrong_archive_in_the_data_folder_is_refused_before_it_is_opened(tmp_path, dead_url, monkeypatch):
    content = cifar10_archive(tmp_path / "made")
    register(monkeypatch, "cifar10", f"{dead_url}/cifar-10-python.tar.gz", content)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "cifar-10-python.tar.gz").write_bytes(content[:-1] + b"x")
    with pytest.raises(UserError, match="cifar-10-python.tar.gz has the md5 .* instead of"):
        load_source("cifar10", tmp_path / "data")
    assert not (tmp_path / "data" / "cifar-10-batches-py").exists()


def test_svhns_file_in_the_data_folder_is_moved_to_its_place(tmp_path, dead_url, monkeypatch):
    write_svhn(tmp_path / "made")
    content = (tmp_path / "made" / "svhn" / "train_32x32.mat").read_bytes()
    register(monkeypatch, "svhn", f"{dead_url}/train_32x32.mat", content)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train_32x32.mat").write_bytes(content)
    assert len(load_source("svhn", tmp_path / "data")) == 3
    assert (tmp_path / "data" / "svhn" / "train_32x32.mat").exists()


def test_svhn_as_a_target_fetches_the_test_file_it_lacks(tmp_path, server, monkeypatch):
    write_svhn(tmp_path)
    content = server.files["/test_32x32.mat"] = (tmp_path / "svhn" / "test_32x32.mat").read_bytes()
    (tmp_path / "svhn" / "test_32x32.mat").unlink()
    remote = download.RemoteFile((f"{server.url}/test_32x32.mat",), len(content), hashlib.md5(content).hexdigest())
    monkeypatch.setitem(data.DATA_SETS, "svhn", dataclasses.replace(data.DATA_SETS["svhn"], target_files=(remote,)))
    assert load_target("svhn", tmp_path).test.labels.tolist() == [0, 5]


def test_caltech101s_tar_inside_its_zip_is_extracted(tmp_path, server, monkeypatch):
    content = server.files["/caltech-101.zip"] = caltech101_zip(tmp_path / "made")
    register(monkeypatch, "caltech101", f"{server.url}/caltech-101.zip", content)
    assert len(load_source("caltech101", tmp_path / "data")) == 18
    assert names_in(tmp_path / "data") == ["101_ObjectCategories", "caltech-101.zip", "packed"]


def put(tmp_path, name, content):
    """The archive at its place in the data folder."""
    (tmp_path / "data").mkdir(exist_ok=True)
    archive = tmp_path / "data" / name
    archive.write_bytes(content)
    return archive


def accept(folder, named):
    pass


def extract(archive, layout="pictures", size=10 * MEGABYTE, files=100, check=accept):
    archives.extract(archive, archive.parent / layout, size, files, check)
    return archive.parent / layout


def test_what_macos_adds_to_a_zip_does_not_disturb_the_tar_inside(tmp_path):
    added = ("__MACOSX/caltech-101/._101_ObjectCategories.tar.gz", b"\0\x05\x16\7\0\2\0\0Mac OS X")
    layout = extract(put(tmp_path, "caltech-101.zip", caltech101_zip(tmp_path / "made", added)), "101_ObjectCategories")
    assert len(list(layout.rglob("*.jpg"))) == 18


def test_a_plain_tar_is_extracted(tmp_path):
    WRITERS["places365"](tmp_path / "made")
    layout = extract(put(tmp_path, "val_256.tar", tar_of(tmp_path / "made", "val_256", mode="w")), "val_256")
    assert (layout / "Places365_val_00000001.jpg").exists()


@pytest.mark.parametrize("name", [name for name in SMALL if name != "svhn"])
def test_every_official_archive_is_extracted_and_checked(tmp_path, monkeypatch, dead_url, name):
    record = data.DATA_SETS[name]
    WRITERS[name](tmp_path / "made")
    archive_name, buffer = record.files[0].name, io.BytesIO()
    if archive_name.endswith(".zip"):
        with zipfile.ZipFile(buffer, "w") as content:
            for path in sorted((tmp_path / "made").rglob("*")):
                content.write(path, path.relative_to(tmp_path / "made"))
    else:
        buffer.write(tar_of(tmp_path / "made", record.layout, mode="w:gz" if archive_name.endswith(".gz") else "w"))
    register(monkeypatch, name, f"{dead_url}/{archive_name}", put(tmp_path, archive_name, buffer.getvalue()).read_bytes())
    assert len(load_source(name, tmp_path / "data")) == SMALL[name]["source"]


# --------------------------------------------------------------------------------------------------
# What is refused
# --------------------------------------------------------------------------------------------------

def tar_of_members(*members):
    """A .tar.gz; a member: (name, type, link's target, content)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, kind, target, content in members:
            member = tarfile.TarInfo(name)
            member.type, member.linkname, member.size = kind, target, len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def zip_of(*members, compression=zipfile.ZIP_STORED):
    """A .zip; a member: (name, kind of file as in `stat`, content)."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, kind, content in members:
            member = zipfile.ZipInfo(name)
            member.external_attr, member.compress_type = (kind | 0o644) << 16, compression
            archive.writestr(member, content)
    return buffer.getvalue()


def tar_with(*members):
    """A .tar.gz of pictures/ and these members."""
    return tar_of_members(("pictures/first.txt", tarfile.REGTYPE, "", b"first"), *members)


def zip_with(*members, compression=zipfile.ZIP_STORED):
    """A .zip of pictures/ and these members."""
    return zip_of(("pictures/first.txt", stat.S_IFREG, b"first"), *members, compression=compression)


def everything_below(folder):
    return sorted(str(path) for path in folder.rglob("*") if ".locks" not in path.parts)


def assert_refused(tmp_path, archive, reason, **kwargs):
    """In one line that names the archive, with nothing inside or outside of the data folder that was not there before."""
    before = everything_below(tmp_path)
    with pytest.raises(UserError) as refusal:
        extract(archive, **kwargs)
    assert "\n" not in str(refusal.value)
    assert str(refusal.value).startswith(f"{archive} ")
    assert reason in str(refusal.value)
    assert everything_below(tmp_path) == before
    assert names_in(archive.parent) == [archive.name]


CLIMBING = {"absolute": "{outside}/escaped.txt", "one up": "../escaped.txt", "down and further up": "a/../../escaped.txt", "only up": "..",
            "from within": "pictures/../../escaped.txt", "backslashes": "pictures\\..\\..\\escaped.txt", "a drive": "C:\\escaped.txt",
            "a network drive": "\\\\host\\escaped.txt"}


@pytest.mark.parametrize("name", CLIMBING.values(), ids=CLIMBING)
def test_a_tar_that_climbs_out_of_its_folder_is_refused(tmp_path, name):
    content = tar_with((name.format(outside=tmp_path), tarfile.REGTYPE, "", b"evil"))
    assert_refused(tmp_path, put(tmp_path, "pictures.tar.gz", content), "leads out of its folder")


@pytest.mark.parametrize("name", CLIMBING.values(), ids=CLIMBING)
def test_a_zip_that_climbs_out_of_its_folder_is_refused(tmp_path, name):
    content = zip_with((name.format(outside=tmp_path), stat.S_IFREG, b"evil"))
    assert_refused(tmp_path, put(tmp_path, "pictures.zip", content), "leads out of its folder")


@pytest.mark.parametrize("target", ["../../../outside", "..\\..\\..\\outside", "{outside}", ".."])
def test_a_symbolic_link_out_of_the_tree_is_refused(tmp_path, target):
    target = target.format(outside=tmp_path)
    content = tar_with(("out", tarfile.SYMTYPE, target, b""), ("out/escaped.txt", tarfile.REGTYPE, "", b"evil"))
    assert_refused(tmp_path, put(tmp_path, "pictures.tar.gz", content), "leads out of its folder")


@pytest.mark.parametrize("target", ["../secret.txt", "pictures/../../secret.txt", "{outside}/secret.txt"])
def test_a_hard_link_out_of_the_tree_is_refused(tmp_path, target):
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "secret.txt").write_text("secret")
    content = tar_with(("pictures/secret.txt", tarfile.LNKTYPE, target.format(outside=tmp_path), b""))
    archive = put(tmp_path, "pictures.tar.gz", content)
    (tmp_path / "data" / "secret.txt").unlink()
    assert_refused(tmp_path, archive, "leads out of its folder")


def test_a_symbolic_link_inside_the_tree_is_left_out(tmp_path):
    content = tar_with(("pictures/again.txt", tarfile.SYMTYPE, "first.txt", b""), ("pictures/last.txt", tarfile.REGTYPE, "", b"last"))
    layout = extract(put(tmp_path, "pictures.tar.gz", content))
    assert names_in(layout) == ["first.txt", "last.txt"]


def test_nothing_is_written_through_a_symbolic_link_inside_the_tree(tmp_path):
    content = tar_with(("pictures/link.txt", tarfile.SYMTYPE, "first.txt", b""), ("pictures/link.txt", tarfile.REGTYPE, "", b"other"))
    layout = extract(put(tmp_path, "pictures.tar.gz", content))
    assert (layout / "first.txt").read_text() == "first" and (layout / "link.txt").read_text() == "other"


def test_a_hard_link_inside_the_tree_is_extracted(tmp_path):
    content = tar_with(("pictures/again.txt", tarfile.LNKTYPE, "pictures/first.txt", b""))
    layout = extract(put(tmp_path, "pictures.tar.gz", content))
    assert (layout / "again.txt").read_text() == "first"


def test_a_hard_link_to_a_symbolic_link_puts_no_link_into_the_tree(tmp_path):
    content = tar_with(("a/b/up", tarfile.SYMTYPE, "../../a", b""), ("pictures/out", tarfile.LNKTYPE, "a/b/up", b""))
    archive = put(tmp_path, "pictures.tar.gz", content)
    try:
        extract(archive)
    except UserError as error:
        assert str(archive) in str(error)
    assert not [path for path in (tmp_path / "data").rglob("*") if path.is_symlink()]


def test_a_hard_link_to_what_is_not_there_is_refused(tmp_path):
    content = tar_with(("pictures/again.txt", tarfile.LNKTYPE, "pictures/none.txt", b""))
    assert_refused(tmp_path, put(tmp_path, "pictures.tar.gz", content), "delete it and fetch it again")


@pytest.mark.parametrize("name", [".", "./", "pictures/.."])
@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_a_file_with_the_name_of_the_folder_itself_does_no_lasting_harm(tmp_path, kind, name):
    suffix, content = ("zip", zip_of((name, stat.S_IFREG, b"evil"))) if kind == "zip" else ("tar.gz", tar_of_members((name, tarfile.REGTYPE, "", b"evil")))
    assert_refused(tmp_path, put(tmp_path, f"pictures.{suffix}", content), "delete it and fetch it again")
    assert (extract(put(tmp_path, f"pictures.{suffix}", zip_with() if kind == "zip" else tar_with())) / "first.txt").read_text() == "first"


@pytest.mark.parametrize("kind", [tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE], ids=["character device", "block device", "pipe"])
def test_a_device_in_a_tar_is_refused(tmp_path, kind):
    assert_refused(tmp_path, put(tmp_path, "pictures.tar.gz", tar_with(("pictures/null.jpg", kind, "", b""))), "'pictures/null.jpg' is a device")


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO], ids=["link", "character device", "block device", "pipe"])
def test_a_link_or_a_device_in_a_zip_is_refused(tmp_path, kind):
    content = zip_with(("pictures/link.jpg", kind, b"../../secret.txt"))
    assert_refused(tmp_path, put(tmp_path, "pictures.zip", content), "'pictures/link.jpg' is a link or a device")


def test_a_nested_tar_that_climbs_out_of_its_folder_is_refused(tmp_path):
    nested = tar_with(("../../escaped.txt", tarfile.REGTYPE, "", b"evil"))
    content = zip_with(("inner/pictures.tar.gz", stat.S_IFREG, nested))
    assert_refused(tmp_path, put(tmp_path, "pictures.zip", content), "leads out of its folder")


# --------------------------------------------------------------------------------------------------
# Bombs
# --------------------------------------------------------------------------------------------------

def squeezed_zeros(megabytes):
    """Many megabytes of zeros as gzip, of a kilobyte each."""
    return gzip.compress(bytes(MEGABYTE)) * megabytes


def tar_header(name, kind, size):
    header = tarfile.TarInfo(name)
    header.type, header.size = kind, size
    return header.tobuf(tarfile.GNU_FORMAT)


def zeros_in_a_tar():
    return gzip.compress(tar_header("pictures/zeros.jpg", tarfile.REGTYPE, 300 * MEGABYTE)) + squeezed_zeros(301)


def a_header_of(megabytes, kind):
    return gzip.compress(tar_header("pictures/first.txt", kind, megabytes * MEGABYTE)) + squeezed_zeros(megabytes + 1)


def zeros_in_a_zip():
    return zip_with(("pictures/zeros.jpg", stat.S_IFREG, bytes(100 * MEGABYTE)), compression=zipfile.ZIP_DEFLATED)


BOMBS = {
    "a tar of zeros": ("pictures.tar.gz", zeros_in_a_tar),
    "a tar of very many files": ("pictures.tar.gz", lambda: tar_with(*((f"pictures/{i}.jpg", tarfile.REGTYPE, "", b"") for i in range(200)))),
    "a tar of very many folders": ("pictures.tar.gz", lambda: tar_with(*((f"pictures/{i}", tarfile.DIRTYPE, "", b"") for i in range(200)))),
    "a tar of very many links": ("pictures.tar.gz", lambda: tar_with(*((f"pictures/{i}.jpg", tarfile.SYMTYPE, "first.txt", b"") for i in range(200)))),
    "a pax header of 300 MB": ("pictures.tar.gz", partial(a_header_of, 300, tarfile.XHDTYPE)),
    "a name of 300 MB": ("pictures.tar.gz", partial(a_header_of, 300, tarfile.GNUTYPE_LONGNAME)),
    "a zip of zeros": ("pictures.zip", zeros_in_a_zip),
    "a zip of very many files": ("pictures.zip", lambda: zip_with(*((f"pictures/{i}.jpg", stat.S_IFREG, b"") for i in range(200)))),
    "a tar of zeros in a zip": ("pictures.zip", lambda: zip_with(("zeros.tar.gz", stat.S_IFREG, zeros_in_a_tar()))),
    "many files in a tar in a zip": ("pictures.zip", lambda: zip_with(("many.tar.gz", stat.S_IFREG, BOMBS["a tar of very many files"][1]()))),
}


@contextmanager
def little_memory():
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 40 * MEGABYTE


@pytest.mark.parametrize("name, content", BOMBS.values(), ids=BOMBS)
def test_a_bomb_is_refused_before_it_fills_the_memory_or_the_disk(tmp_path, name, content):
    archive = put(tmp_path, name, content())
    with little_memory():
        assert_refused(tmp_path, archive, " is refused: ")


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK],
                         ids=["of a member", "of all members", "a long name", "a long link"])
def test_a_large_header_is_refused_where_a_large_file_would_not_be(tmp_path, kind):
    archive = put(tmp_path, "pictures.tar.gz", a_header_of(100, kind))
    with little_memory():
        assert_refused(tmp_path, archive, "delete it and fetch it again", size=1000 * MEGABYTE)


def test_a_header_that_is_slow_to_search_is_refused_at_once(tmp_path):
    """A million digits take the tarfile of some versions of Python a quarter of an hour."""
    digits = 80 * 1024
    content = gzip.compress(tar_header("pictures/first.txt", tarfile.XHDTYPE, digits) + b"1" * digits + bytes(1024))
    began = time.monotonic()
    assert_refused(tmp_path, put(tmp_path, "pictures.tar.gz", content), "delete it and fetch it again")
    assert time.monotonic() - began < 2


def test_a_hole_of_a_terabyte_is_refused(tmp_path):
    content = tar_with_pax(GNU_sparse_map="0,0", GNU_sparse_size="1000000000000", GNU_sparse_numblocks="1")
    assert_refused(tmp_path, put(tmp_path, "pictures.tar.gz", content), "it unpacks to several times what the data set holds")


def test_a_zip_cannot_unpack_to_more_than_it_declares(tmp_path):
    content = bytearray(zip_with(("pictures/zeros.jpg", stat.S_IFREG, bytes(100 * MEGABYTE)), compression=zipfile.ZIP_DEFLATED))
    for position in (content.rfind(b"PK\3\4") + 22, content.rfind(b"PK\1\2") + 24):     # its size, in both of its headers
        content[position:position + 4] = struct.pack("<I", 1000)
    assert_refused(tmp_path, put(tmp_path, "pictures.zip", bytes(content)), "Bad CRC-32")


# --------------------------------------------------------------------------------------------------
# What is damaged, or something else
# --------------------------------------------------------------------------------------------------

def noise(size):
    return os.urandom(size)


def cut_tar_gz():
    return tar_with(("pictures/a.jpg", tarfile.REGTYPE, "", noise(100_000)))[:60_000]


def cut_tar():
    return gzip.decompress(tar_with(("pictures/a.jpg", tarfile.REGTYPE, "", noise(100_000))))[:60_000]


def flipped_in_gzip():
    content = bytearray(tar_with(("pictures/a.jpg", tarfile.REGTYPE, "", noise(100_000))))
    content[50_000] ^= 255
    return bytes(content)


def flipped_in_zip(compression):
    content = bytearray(zip_with(("pictures/a.jpg", stat.S_IFREG, b"abc" + noise(100_000)), compression=compression))
    content[50_000:50_100] = bytes(100)
    return bytes(content)


def zip_with_flag(local, central, value):
    """A zip whose second member has a field set in its two headers, `local` and `central` bytes after their beginning."""
    content = bytearray(zip_with(("pictures/a.jpg", stat.S_IFREG, b"content")))
    content[content.rfind(b"PK\3\4") + local] = content[content.rfind(b"PK\1\2") + central] = value
    return bytes(content)


def tar_with_pax(**headers):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo("pictures/a.jpg")
        member.pax_headers = {name.replace("_", "."): value for name, value in headers.items()}
        archive.addfile(member)
    return buffer.getvalue()


DAMAGED = {
    "a tar.gz cut short": ("pictures.tar.gz", cut_tar_gz),
    "a tar cut short": ("pictures.tar", cut_tar),
    "a tar.gz with other bytes in it": ("pictures.tar.gz", flipped_in_gzip),
    "a tar.gz that is none": ("pictures.tar.gz", lambda: b"<html>not found</html>" * 100),
    "a tar that is none": ("pictures.tar", lambda: b"<html>not found</html>" * 100),
    "an empty tar.gz": ("pictures.tar.gz", lambda: b""),
    "an empty tar": ("pictures.tar", lambda: b""),
    "a name with a zero byte": ("pictures.tar.gz", lambda: tar_with_pax(path="pictures/a\0b.jpg")),
    "a name that is too long": ("pictures.tar.gz", lambda: tar_with((f"pictures/{300 * 'a'}.jpg", tarfile.REGTYPE, "", b""))),
    "a map of holes that is none": ("pictures.tar.gz", lambda: tar_with_pax(GNU_sparse_map="here,there")),
    "a size that is none": ("pictures.tar.gz", lambda: tar_with_pax(GNU_sparse_major="1", GNU_sparse_minor="0")),
    "a zip cut short": ("pictures.zip", lambda: zip_with(("pictures/a.jpg", stat.S_IFREG, noise(100_000)))[:60_000]),
    "a zip with other bytes in it": ("pictures.zip", lambda: flipped_in_zip(zipfile.ZIP_STORED)),
    "a zip with other bytes in it, deflated": ("pictures.zip", lambda: flipped_in_zip(zipfile.ZIP_DEFLATED)),
    "a zip with other bytes in it, bzip2": ("pictures.zip", lambda: flipped_in_zip(zipfile.ZIP_BZIP2)),
    "a zip with other bytes in it, LZMA": ("pictures.zip", lambda: flipped_in_zip(zipfile.ZIP_LZMA)),
    "a zip with a password": ("pictures.zip", lambda: zip_with_flag(6, 8, 1)),
    "a zip of an unknown compression": ("pictures.zip", lambda: zip_with_flag(8, 10, 99)),
    "a zip that is none": ("pictures.zip", lambda: b"<html>not found</html>" * 100),
    "an empty zip": ("pictures.zip", lambda: b""),
    "a file where a folder is": ("pictures.zip", lambda: zip_with(("pictures/first.txt/a.jpg", stat.S_IFREG, b""))),
    "another content": ("pictures.zip", lambda: zip_with(("other/a.jpg", stat.S_IFREG, b"")).replace(b"pictures", b"drawings")),
    "a damaged tar in a zip": ("pictures.zip", lambda: zip_with(("inner.tar.gz", stat.S_IFREG, cut_tar_gz()))),
}


@pytest.mark.parametrize("name, content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_archive_is_refused_and_leaves_nothing(tmp_path, name, content):
    assert_refused(tmp_path, put(tmp_path, name, content()), "delete it and fetch it again")


@pytest.mark.parametrize("expected", [9, 11])
def test_an_archive_with_another_number_of_images_is_refused_and_named(tmp_path, dead_url, monkeypatch, expected):
    archive = put(tmp_path, "cifar-10-python.tar.gz", cifar10_archive(tmp_path / "made"))
    register(monkeypatch, "cifar10", f"{dead_url}/cifar-10-python.tar.gz", archive.read_bytes())
    monkeypatch.setitem(data.DATA_SETS, "cifar10", dataclasses.replace(data.DATA_SETS["cifar10"], images={"source": expected}))
    with pytest.raises(UserError) as refusal:
        load_source("cifar10", tmp_path / "data")
    assert str(refusal.value).startswith(f"{archive} holds 10 of the {expected} images of cifar10: delete it")
    assert names_in(tmp_path / "data") == [archive.name]


def test_an_archive_without_all_files_is_refused_and_named(tmp_path, dead_url, monkeypatch):
    cifar10_archive(tmp_path / "made")
    (tmp_path / "made" / "cifar-10-batches-py" / "data_batch_4").unlink()
    archive = put(tmp_path, "cifar-10-python.tar.gz", tar_of(tmp_path / "made", "cifar-10-batches-py"))
    register(monkeypatch, "cifar10", f"{dead_url}/cifar-10-python.tar.gz", archive.read_bytes())
    with pytest.raises(UserError) as refusal:
        load_source("cifar10", tmp_path / "data")
    assert "\n" not in str(refusal.value) and "data_batch_4" in str(refusal.value)
    assert names_in(tmp_path / "data") == [archive.name]


# --------------------------------------------------------------------------------------------------
# What happens meanwhile
# --------------------------------------------------------------------------------------------------

KINDS = {"tar": ("pictures.tar.gz", tar_with, tarfile), "zip": ("pictures.zip", zip_with, shutil)}


@pytest.mark.parametrize("name, content, module", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_is_full_is_one_line_and_leaves_no_half_folder(tmp_path, monkeypatch, name, content, module, number):
    def write(source, target, *args, **kwargs):
        target.write(b"fi")
        raise OSError(number, os.strerror(number))

    archive = put(tmp_path, name, content())
    with monkeypatch.context() as patch:
        patch.setattr(module, "copyfileobj", write)
        with pytest.raises(UserError, match=f"^the disk under {tmp_path}/data is full: make room and run this again, {name} is extracted anew$"):
            extract(archive)
    assert names_in(tmp_path / "data") == [name]
    assert (extract(archive) / "first.txt").read_text() == "first"


def test_a_layout_has_its_name_only_once_all_of_it_is_on_the_disk(tmp_path, monkeypatch):
    archive, steps, replace = put(tmp_path, "pictures.tar.gz", tar_with()), [], os.replace
    monkeypatch.setattr(os, "sync", lambda: steps.append("synced"))
    monkeypatch.setattr(os, "replace", lambda source, target: (steps.append(target), replace(source, target)))
    extract(archive)
    assert steps == ["synced", tmp_path / "data" / "pictures"]


def test_an_interrupt_leaves_no_half_folder(tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    archive = put(tmp_path, "pictures.tar.gz", tar_with())
    monkeypatch.setattr(tarfile, "copyfileobj", interrupt)
    with pytest.raises(KeyboardInterrupt):
        extract(archive)
    assert names_in(tmp_path / "data") == [archive.name]


def test_an_extraction_that_was_killed_is_begun_anew(tmp_path):
    archive = put(tmp_path, "pictures.tar.gz", tar_with())
    stale = tmp_path / "data" / ".pictures.part" / "pictures"
    stale.mkdir(parents=True)
    (stale / "first.txt").write_text("fi")
    (stale / "junk.txt").write_text("junk")
    layout = extract(archive)
    assert names_in(layout) == ["first.txt"] and (layout / "first.txt").read_text() == "first"
    assert names_in(tmp_path / "data") == ["pictures", "pictures.tar.gz"]


def test_a_layout_that_is_there_is_checked_and_not_extracted_again(tmp_path):
    archive, checked = put(tmp_path, "pictures.tar.gz", tar_with()), []
    layout = extract(archive)
    (layout / "first.txt").write_text("mine")
    extract(archive, check=lambda folder, named: checked.append((folder, named)))
    assert checked == [(layout, layout)] and (layout / "first.txt").read_text() == "mine"


@forks
def test_two_processes_that_extract_the_same_archive_both_end_well(tmp_path):
    archive = put(tmp_path, "pictures.tar.gz", tar_with())

    def check(folder, named):
        assert (folder / "first.txt").read_text() == "first"
        time.sleep(0.3)
        with open(tmp_path / "checked", "a") as log:
            log.write(f"{named.name}\n")

    both = [start(partial(extract, archive, check=check)) for _ in range(2)]
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert (tmp_path / "checked").read_text().split() == ["pictures.tar.gz", "pictures"]      # one has extracted it
    assert names_in(tmp_path / "data") == ["pictures", "pictures.tar.gz"]


@forks
@pytest.mark.parametrize("name", ["cifar10", "svhn"])
def test_a_data_folder_that_can_not_be_written_is_one_line(dead_url, monkeypatch, name):
    with shared_folder() as folder:
        root = WRITERS[name](folder / "made")
        (folder / "data").mkdir()
        file = data.DATA_SETS[name].files[0].name
        content = (root / file).read_bytes() if name == "svhn" else tar_of(folder / "made", root.name)
        (folder / "data" / file).write_bytes(content)
        (folder / "data").chmod(0o555)
        register(monkeypatch, name, f"{dead_url}/{file}", content)
        error = as_nobody(load_source, name, folder / "data")
    assert isinstance(error, UserError) and "\n" not in str(error) and "can't be written" in str(error)
