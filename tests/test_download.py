"""From a server that misbehaves a file that is right, or one clear line; archives verified,
extracted and read."""
import functools
import hashlib
import multiprocessing
import random
import re
import shutil
import threading
import time

import layout_files as made
import pytest
from conftest import refusal
from layout_files import WRITERS, names_in, register, remote, source, tar_of, zip_of

import data
from kd import download
from kd.download import RemoteFile, fetch, fetch_all

small, server = made.small, made.server
BODY, OTHER = random.Random(0).randbytes(300_000), random.Random(1).randbytes(300_000)
CUT = 100_000


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(download, "BACKOFF", 0.001)
    monkeypatch.setattr(download, "TIMEOUT", (2, 1))


def serve(body=BODY, until=None, ranges=True, pause=0, after=0):
    """Answers as a good server does, ranges and all; hangs up after `until` bytes of the file."""
    def behave(handler):
        asked = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", "")) if ranges else None
        start = int(asked[1]) if asked else 0
        handler.send_response(206 if asked else 200)
        handler.send_header("Content-Length", str(len(body) - start))
        handler.end_headers()
        for position in range(start, len(body[:until]), 1000):
            handler.wfile.write(body[position:min(position + 1000, len(body[:until]))])
            time.sleep(pause)
        time.sleep(after)
    return behave


def status(code):
    def behave(handler):
        handler.send_response(code)
        handler.send_header("Content-Length", "0")
        handler.end_headers()
    return behave


def hang_up(handler):
    pass


@pytest.fixture
def path(tmp_path):
    return tmp_path / "data" / "a.tar"


def assert_whole(path):
    assert path.read_bytes() == BODY and names_in(path.parent) == [path.name]


SERVERS = {     # how it behaves: (its answers, why another mirror is asked then; "": none is)
    "a good server": ([serve()], ""),
    "breaks off again and again": (
        [*map(functools.partial(serve, BODY), (70_000, 140_000, 210_000)), serve()], ""),
    "falls silent": ([serve(until=CUT, after=1.5), serve()], ""),
    "hangs up before it answers": ([hang_up, hang_up, serve()], ""),
    "503, then fine": ([status(503), status(429), serve()], ""),
    "does not know ranges": ([serve(until=CUT, ranges=False), serve(ranges=False)], ""),
    "404": ([status(404)], "answers 404"),
    "always hangs up": ([hang_up], "can't be reached, or breaks off (ConnectionError)"),
    "another file": ([serve(OTHER)], "sent a file that has the md5"),
    "a shorter file": ([serve(BODY[:-1])], "offers 299,999 bytes instead of 300,000"),
}


@pytest.mark.quick
@pytest.mark.parametrize("script, reason", SERVERS.values(), ids=SERVERS)
def test_a_server_that_recovers_gives_the_file_and_one_that_does_not_is_followed_by_the_next(
        server, path, capsys, script, reason):
    url, good = server.url("a.tar", *script), server.url("b.tar", serve())
    fetch(remote(BODY, url, *([good] if reason else [])), path)
    assert_whole(path)
    assert not reason or f"a.tar: {url} {reason}" in capsys.readouterr().out


@pytest.mark.quick
def test_where_no_mirror_will_do_one_line_says_what_was_tried(server, path):
    bad, worse = server.url("a.tar", serve(OTHER)), server.url("b.tar", status(404))
    refusal(rf"^a.tar can't be fetched: {bad} sent a file that .*; {worse} answers 404. Put it at "
            rf"{path} by hand: it is verified and used.$", fetch, remote(BODY, bad, worse), path)
    assert not path.exists()


@pytest.mark.parametrize("left, continued", [
    (BODY[:200_000], True), (OTHER[:200_000], True), (BODY + b"more", False)],
    ids=["a part", "a part of another file", "more than there is"])
def test_what_an_earlier_attempt_has_left_is_continued_and_where_it_is_wrong_begun_again(
        server, path, left, continued):
    path.parent.mkdir()
    path.with_name("a.tar.part").write_bytes(left)
    file = remote(BODY, server.url("a.tar", serve()))
    fetch(file, path)
    assert_whole(path)
    assert (server.asked[0][1].get("Range") == "bytes=200000-") == continued
    asked = len(server.asked)
    fetch(file, path)
    assert len(server.asked) == asked


def test_a_mirror_that_crawls_is_followed_by_the_next_or_better_than_none(
        server, path, monkeypatch, capsys):
    monkeypatch.setattr(download, "CRAWL", 1_000_000)
    monkeypatch.setattr(download, "PATIENCE", 0.1)
    slow = server.url("a.tar", serve(pause=0.002))
    fetch(remote(BODY, slow, server.url("b.tar", serve())), path)
    assert_whole(path)
    assert re.search(r"a.tar crawls \([\d.]+ kB/s\)", capsys.readouterr().out)
    [(_, first), (_, second)] = server.asked
    assert int(second["Range"][6:-1]) > 0
    path.unlink()
    fetch(remote(BODY, slow, server.url("b.tar", status(404))), path)
    assert_whole(path)


@pytest.mark.quick
def test_a_file_that_is_there_is_verified_and_never_deleted(path):
    path.parent.mkdir()
    path.write_bytes(BODY)
    sha256 = hashlib.sha256(BODY).hexdigest()
    url = ("http://127.0.0.1:9/a.tar?download=1",)
    for file in (remote(BODY, *url), RemoteFile(url), RemoteFile(url, sha256=sha256[:8])):
        fetch(file, path)
    path.write_bytes(OTHER)
    refusal(f"^{path} has the md5 ", fetch, remote(BODY, *url), path)
    assert path.read_bytes() == OTHER


def test_several_files_are_fetched_at_once_and_one_that_fails_stops_no_other(server, tmp_path):
    three = threading.Barrier(3, timeout=10)

    def beside_two_others(handler):
        three.wait()
        serve()(handler)
    wanted = {tmp_path / f"{i}.tar": remote(BODY, server.url(f"{i}.tar", beside_two_others))
              for i in range(3)}
    wanted[tmp_path / "bad.tar"] = remote(BODY, server.url("bad.tar", status(404)))
    [line] = fetch_all(wanted)
    assert line.startswith("bad.tar can't be fetched")
    assert names_in(tmp_path) == ["0.tar", "1.tar", "2.tar"]


def test_two_processes_that_want_a_file_fetch_it_once(server, path):
    file = remote(BODY, server.url("a.tar", serve(pause=0.001)))
    fork = multiprocessing.get_context("fork")
    both = [fork.Process(target=fetch, args=(file, path)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0] and len(server.asked) == 1
    assert_whole(path)


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
    url = server.url(file, serve(content))
    register(monkeypatch, name, files=(remote(content, url),))
    layout = tmp_path / "d" / data.DATA_SETS[name].layout
    for begun in (False, True):     # extracted, and once more from the archive that is there
        shutil.rmtree(layout, ignore_errors=True)
        if begun:       # an extraction that was killed
            (tmp_path / "d" / f".{layout.name}.part" / layout.name).mkdir(parents=True)
            (tmp_path / "d" / f".{layout.name}.part" / layout.name / "junk").write_text("")
        found = source(tmp_path / "d", name)
        assert len(found) == data.DATA_SETS[name].images["source"]
    assert not list(layout.rglob("junk"))
    assert names_in(tmp_path / "d") == sorted([layout.name, file, "packed"])
    assert len(server.asked) == 1


def test_an_archive_that_is_not_whole_is_refused_and_named(tmp_path, monkeypatch, small):
    root = made.write_cifar10(tmp_path / "made")
    (root / "data_batch_4").unlink()
    content = tar_of(root.parent, root.name)
    register(monkeypatch, "cifar10", files=(remote(content, "http://127.0.0.1:9/c.tar.gz"),))
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "c.tar.gz").write_bytes(content)
    refusal(rf"^{tmp_path}/d/c.tar.gz is incomplete or damaged .*data_batch_4", source,
            tmp_path / "d", "cifar10")
    assert names_in(tmp_path / "d") == ["c.tar.gz"]
