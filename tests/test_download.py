"""Downloads: from a server that misbehaves, a file that is right or one clear line."""
import functools
import hashlib
import multiprocessing
import random
import re
import time

import layout_files as made
import pytest
from conftest import refusal
from layout_files import names_in, remote

from kd import download
from kd.download import RemoteFile, fetch, fetch_all, remaining

server = made.server
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
        headers = {"Content-Length": str(len(body) - start)}
        if asked:
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        handler.send_response(206 if asked else 200)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        to_send = body[start:until]
        for position in range(0, len(to_send), 1000 if pause else 100_000):
            handler.wfile.write(to_send[position:position + (1000 if pause else 100_000)])
            time.sleep(pause)
        time.sleep(after)
    return behave


def status(code, content=b"", **headers):
    return lambda handler: handler.answer(code, content, **headers)


def hang_up(handler):
    pass


@pytest.fixture
def path(tmp_path):
    return tmp_path / "data" / "a.tar"


def assert_whole(path):
    assert path.read_bytes() == BODY and names_in(path.parent) == [path.name]


RECOVERS = {
    "a good server": [serve()],
    "breaks off again and again": [*map(functools.partial(serve, BODY), (70_000, 140_000, 210_000)),
                                   serve()],
    "falls silent": [serve(until=CUT, after=1.5), serve()],
    "hangs up before it answers": [hang_up, hang_up, serve()],
    "503, then fine": [status(503), status(429), serve()],
    "does not know ranges": [serve(until=CUT, ranges=False), serve(ranges=False)],
    "redirects": [status(302, Location="/b.tar")],
}


@pytest.mark.parametrize("script", RECOVERS.values(), ids=RECOVERS)
def test_a_server_that_recovers_gives_the_file(server, path, script):
    server.url("b.tar", serve())
    fetch(remote(BODY, server.url("a.tar", *script)), path)
    assert_whole(path)


NEXT = {
    "404": ([status(404)], "answers 404"),
    "always 503": ([status(503)], "answers 503"),
    "always hangs up": ([hang_up], "can't be reached, or breaks off (ConnectionError)"),
    "always breaks off": ([serve(until=1000)], "can't be reached, or breaks off (ProtocolError)"),
    "another file": ([serve(OTHER)], "sent a file that has the md5"),
    "a shorter file": ([serve(BODY[:-1])], "offers 299,999 bytes instead of 300,000"),
    "a web page": ([status(200, b"<html>Sign in</html>")], "offers 20 bytes instead"),
}


@pytest.mark.quick
@pytest.mark.parametrize("script, reason", NEXT.values(), ids=NEXT)
def test_a_mirror_that_will_not_do_is_followed_by_the_next(server, path, capsys,
                                                           script, reason):
    bad = server.url("a.tar", *script)
    fetch(remote(BODY, bad, server.url("b.tar", serve())), path)
    assert_whole(path)
    assert f"a.tar: {bad} {reason}" in capsys.readouterr().out


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
    assert len(server.asked) == asked and remaining(path, file) == 0


def test_a_mirror_that_crawls_is_followed_by_the_next_or_better_than_none(
        server, path, monkeypatch, capsys):
    monkeypatch.setattr(download, "CRAWL", 1_000_000)
    monkeypatch.setattr(download, "PATIENCE", 0.1)
    slow = serve(pause=0.002)
    fetch(remote(BODY, server.url("a.tar", slow), server.url("b.tar", serve())), path)
    assert_whole(path)
    assert re.search(r"a.tar crawls \([\d.]+ kB/s\)", capsys.readouterr().out)
    [(_, first), (_, second)] = server.asked
    assert int(second["Range"][6:-1]) > 0
    path.unlink()
    fetch(remote(BODY, server.url("a.tar", slow), server.url("b.tar", status(404))), path)
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


def test_several_files_are_fetched_at_once_and_one_that_fails_stops_no_other(
        server, tmp_path):
    wanted = {tmp_path / f"{i}.tar": remote(BODY, server.url(f"{i}.tar", serve(pause=0.001)))
              for i in range(3)}
    wanted[tmp_path / "bad.tar"] = remote(BODY, server.url("bad.tar", status(404)))
    began = time.monotonic()
    [line] = fetch_all(wanted)
    assert line.startswith("bad.tar can't be fetched")
    assert names_in(tmp_path) == ["0.tar", "1.tar", "2.tar"]
    assert {path for path, _ in server.asked} == {"/0.tar", "/1.tar", "/2.tar", "/bad.tar"}
    assert time.monotonic() - began < 10


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
