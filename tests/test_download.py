"""Downloads: a server that misbehaves in every way known of, and a file that is right or one clear line at the end of each."""
import contextlib
import dataclasses
import email.utils
import errno
import functools
import hashlib
import http.server
import json
import random
import re
import socket
import struct
import threading
import time
from types import SimpleNamespace

import pytest

import data
import download
import files
from download import RemoteFile, fetch, fetch_all, part_of
from files import Stopped, UserError
from layout_files import forks, leftovers, register, start, write_cifar10

BODY = random.Random(0).randbytes(300_000)
OTHER = random.Random(1).randbytes(300_000)     # as long, and something else
MD5 = hashlib.md5(BODY).hexdigest()
CUT = 100_000


# --------------------------------------------------------------------------------------------------
# The server: each of its files has a script, a behaviour a request, of which the last one stays
# --------------------------------------------------------------------------------------------------

class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.scripts, self.requests, self.ended, self.sent = {}, [], threading.Event(), 0

    def url(self, name, *script):
        """The address of a file that is served by `script`, or as it should be."""
        self.scripts[f"/{name}"] = list(script) or [serve()]
        return f"http://127.0.0.1:{self.server_port}/{name}"

    def asked(self, header, name="a.tar"):
        return [headers.get(header) for path, headers in self.requests if path == f"/{name}"]

    def handle_error(self, request, client_address):
        pass        # whoever asked has hung up


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        script = self.server.scripts.get(re.sub("^http://[^/]*", "", self.path).partition("?")[0], [status(404)])
        self.server.requests.append((self.path, dict(self.headers)))
        (script.pop(0) if len(script) > 1 else script[0])(self)

    def send(self, content):
        self.server.sent += len(content)
        self.wfile.write(content)

    def head(self, code, **headers):
        self.send_response(code)
        for name, value in headers.items():
            if value is not None:
                self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def log_message(self, *args):
        pass


def serve(body=BODY, etag='"one"', until=None, end="hang up", ranges=True, piece=None, pause=0, **headers):
    """Answers as a good server does, ranges and all; but ends after `until` bytes of the file: "hang up", "reset" or "silence"."""
    def behave(handler):
        asked, start = handler.headers.get("Range"), 0
        if asked and ranges and handler.headers.get("If-Range", etag) == etag:
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
            if start >= len(body):
                return handler.head(416, Content_Range=f"bytes */{len(body)}")
        handler.head(206 if start else 200, **{"Content_Length": str(len(body) - start), "ETag": etag, **headers},
                     Content_Range=f"bytes {start}-{len(body) - 1}/{len(body)}" if start else None)
        to_send = body[start:len(body) if until is None else max(start, until)]
        step = piece or max(1, len(to_send))
        for position in range(0, len(to_send), step):
            handler.send(to_send[position:position + step])
            time.sleep(pause)
        if until is not None and end == "silence":
            handler.server.ended.wait(30)
        if until is not None and end == "reset":
            handler.wfile.flush()
            time.sleep(0.05)        # what was sent before a reset is lost unless it has been read
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            handler.connection.close()
    return behave


def status(code, content=b"", **headers):
    def behave(handler):
        handler.head(code, Content_Length=str(len(content)), **headers)
        handler.send(content)
    return behave


def hang_up(handler):
    pass


def keep_silent(handler):
    handler.server.ended.wait(30)


def chunked(body):
    """A transfer in chunks, which tells no length beforehand."""
    def behave(handler):
        handler.protocol_version = "HTTP/1.1"
        handler.close_connection = True
        handler.head(200, Transfer_Encoding="chunked")
        for position in range(0, len(body), 50_000):
            piece = body[position:position + 50_000]
            handler.send(b"%x\r\n%b\r\n" % (len(piece), piece))
        handler.send(b"0\r\n\r\n")
    return behave


def endless(handler):
    handler.head(200)
    with contextlib.suppress(ConnectionError):
        for _ in range(100):
            handler.send(BODY)


def from_another_place(handler):
    handler.head(206, Content_Length="1000", Content_Range=f"bytes 5-1004/{len(BODY)}")
    handler.send(BODY[5:1005])


def from_nowhere(handler):
    handler.head(206, Content_Length=str(len(BODY)))
    handler.send(BODY)


cut = functools.partial(serve, until=CUT)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(download, "BACKOFF", (0.001, 0.003))
    monkeypatch.setattr(download, "TIMEOUT", (2, 1))
    server = Server()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.ended.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def dead_url():
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{closed.getsockname()[1]}/dead.tar"     # bound, and nobody listens


@pytest.fixture
def path(tmp_path):
    return tmp_path / "data" / "a.tar"


def remote(*urls, body=BODY):
    return RemoteFile(urls, len(body), hashlib.md5(body).hexdigest())


def put_part(path, content, note=None):
    path.parent.mkdir()
    part_of(path).write_bytes(content)
    if note is not None:
        path.with_name(f"{path.name}.part.json").write_text(note if isinstance(note, str) else json.dumps(note))


def assert_whole(path, body=BODY):
    assert path.read_bytes() == body
    assert leftovers(path.parent) == []


def refusal(file, path):
    """The one line that a fetch ends with."""
    with pytest.raises(UserError) as error:
        fetch(file, path)
    assert "\n" not in str(error.value) and not path.exists()
    return str(error.value)


# --------------------------------------------------------------------------------------------------
# One server
# --------------------------------------------------------------------------------------------------

def seconds_from_now(seconds):
    return email.utils.formatdate(time.time() + seconds, usegmt=True)


# What the server does, and the most bytes that it may have to send.
RECOVERS = {
    "a good server": ([serve()], len(BODY)),
    "hangs up": ([cut(), serve()], len(BODY)),
    "hangs up before it answers": ([hang_up, hang_up, serve()], len(BODY)),
    "resets": ([cut(end="reset"), serve()], len(BODY) + download.PIECE),
    "falls silent": ([cut(end="silence"), serve()], len(BODY)),
    "falls silent before it answers": ([keep_silent, serve()], len(BODY)),
    "breaks off again and again": ([*(serve(until=n) for n in range(70_000, 300_000, 70_000)), serve()], len(BODY)),
    "500": ([status(500), serve()], len(BODY)),
    "502 as a page": ([status(502, b"<html>bad gateway</html>"), serve()], len(BODY) + 100),
    "503 and when to come back": ([status(503, Retry_After="0"), serve()], len(BODY)),
    "429": ([status(429), serve()], len(BODY)),
    "429 and how long to wait": ([status(429, Retry_After="0"), serve()], len(BODY)),
    "429 and a date that has passed": ([status(429, Retry_After=seconds_from_now(-10)), serve()], len(BODY)),
    "429 and a wait that is none": ([status(429, Retry_After="soon"), serve()], len(BODY)),
    "503 in the middle": ([cut(), status(503), serve()], len(BODY)),
    "does not know ranges": ([cut(ranges=False), serve(ranges=False)], len(BODY) + CUT),
    "416": ([cut(), status(416), serve()], len(BODY) + CUT),
    "goes on from another place": ([cut(), from_another_place, serve()], len(BODY) + CUT + 1000),
    "goes on and does not say from where": ([cut(), from_nowhere, serve()], 2 * len(BODY) + CUT),
    "another file meanwhile": ([cut(OTHER), serve(etag='"two"')], len(BODY) + CUT),
    "another, shorter file meanwhile": ([cut(OTHER[:CUT + 1], until=None, Content_Length=str(len(BODY))), serve(etag='"two"')], len(BODY) + CUT + 1),
    "another file meanwhile, by a server that does not know ranges": ([cut(OTHER, ranges=False), serve(ranges=False)], len(BODY) + CUT),
    "in chunks": ([chunked(BODY)], len(BODY) + 100),
    "no length": ([serve(Content_Length=None)], len(BODY)),
    "no length, and hangs up": ([cut(Content_Length=None), serve()], len(BODY)),
    "redirects": ([status(302, Location="/b.tar")], len(BODY)),
    "says gzip of what is none": ([serve(Content_Encoding="gzip")], len(BODY)),
    "says deflate of what is none, and hangs up": ([cut(Content_Encoding="deflate"), serve(Content_Encoding="deflate")], len(BODY)),
}


@pytest.mark.parametrize("script, most", RECOVERS.values(), ids=RECOVERS)
def test_a_server_that_recovers_gives_the_file(server, path, script, most):
    server.url("b.tar")
    fetch(remote(server.url("a.tar", *script)), path)
    assert_whole(path)
    assert server.sent <= most


def test_gzip_is_not_asked_for(server, path):
    fetch(remote(server.url("a.tar")), path)
    assert server.asked("Accept-Encoding") == ["identity"]


@pytest.mark.parametrize("headers, condition", [
    ({"etag": '"one"'}, '"one"'),
    ({"etag": '"one"', "Last_Modified": "Mon, 02 Nov 2026 10:00:00 GMT"}, '"one"'),
    ({"etag": 'W/"one"', "Last_Modified": "Mon, 02 Nov 2026 10:00:00 GMT"}, "Mon, 02 Nov 2026 10:00:00 GMT"),
    ({"etag": 'W/"one"'}, None),
    ({"etag": None}, None)], ids=["strong", "strong and a date", "weak and a date", "weak", "nothing"])
def test_it_goes_on_only_if_the_file_is_the_same(server, path, headers, condition):
    fetch(remote(server.url("a.tar", cut(**headers), serve(**headers))), path)
    assert_whole(path)
    assert server.asked("Range") == [None, f"bytes={CUT}-"] and server.asked("If-Range") == [None, condition]


def test_waits_grow_and_are_drawn_at_random(server, path, monkeypatch):
    drawn = []
    monkeypatch.setattr(download.random, "uniform", lambda low, high: drawn.append((low, high)) or 0)
    fetch(remote(server.url("a.tar", *[status(503)] * 4, serve())), path)
    assert drawn == [(0, 0.001), (0, 0.002), (0, 0.003), (0, 0.003)]


@pytest.mark.parametrize("after", [lambda: "1", lambda: seconds_from_now(2)], ids=["seconds", "a date"])
def test_it_waits_as_long_as_it_is_asked_to(server, path, after):
    url = server.url("a.tar", status(429, Retry_After=after()), serve())
    began = time.monotonic()
    fetch(remote(url), path)
    assert_whole(path)
    assert 0.9 <= time.monotonic() - began < 5


def test_what_brings_something_new_may_break_off_any_number_of_times(server, path, monkeypatch):
    monkeypatch.setattr(download, "PIECE", 10_000)
    fetch(remote(server.url("a.tar", *(serve(until=n) for n in range(20_000, 300_000, 20_000)), serve())), path)
    assert_whole(path)
    assert len(server.requests) == 15 and server.sent == len(BODY)


def test_a_size_that_is_not_known(server, path):
    fetch(RemoteFile((server.url("a.tar"),)), path)
    assert_whole(path)


def test_a_size_that_is_not_known_and_nothing_to_go_on_with(server, path):
    """Killed after the last byte and before the file had its name: the server answers 416."""
    put_part(path, BODY)
    fetch(RemoteFile((server.url("a.tar"),), md5=MD5), path)
    assert_whole(path)
    assert server.sent == 0


# --------------------------------------------------------------------------------------------------
# What an earlier attempt has left
# --------------------------------------------------------------------------------------------------

def test_a_part_is_gone_on_from(server, path):
    url = server.url("a.tar")
    put_part(path, BODY[:CUT], {"from": [url], "etag": '"one"'})
    fetch(remote(url), path)
    assert_whole(path)
    assert server.sent == len(BODY) - CUT


def test_a_whole_part_is_not_fetched_again(server, path):
    put_part(path, BODY)
    fetch(remote(server.url("a.tar")), path)
    assert_whole(path)
    assert server.requests == []


@pytest.mark.parametrize("part", [OTHER[:CUT], OTHER, BODY + b"more", BODY[:CUT] + b"x", b""],
                         ids=["of another file", "as long", "too long", "a wrong byte", "empty"])
@pytest.mark.parametrize("note", [None, "{", "[]", '{"from": 3}', {"from": ["http://elsewhere/a.tar"], "etag": '"one"'}],
                         ids=["no note", "half a note", "a list", "a number", "of elsewhere"])
@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no ranges"])
def test_a_part_that_is_wrong_does_no_harm(server, path, part, note, ranges):
    put_part(path, part, note)
    fetch(remote(server.url("a.tar", serve(ranges=ranges))), path)
    assert_whole(path)
    assert server.sent <= 2 * len(BODY)


def test_no_condition_is_put_to_another_mirror(server, path):
    fetch(remote(server.url("a.tar", cut(), status(404)), server.url("b.tar", serve(etag='"two"'))), path)
    assert_whole(path)
    assert server.asked("Range", "b.tar") == [f"bytes={CUT}-"] and server.asked("If-Range", "b.tar") == [None]


def test_parts_of_two_mirrors_that_do_not_fit_are_fetched_from_one(server, path):
    bad, good = server.url("a.tar", cut(OTHER), status(404)), server.url("b.tar")
    fetch(remote(bad, good), path)
    assert_whole(path)
    assert server.sent <= 2 * len(BODY) + CUT


# --------------------------------------------------------------------------------------------------
# The next mirror
# --------------------------------------------------------------------------------------------------

NEXT = {
    "401": ([status(401)], "answers 401"),
    "403": ([status(403)], "answers 403"),
    "404": ([status(404, b"<html>not found</html>")], "answers 404"),
    "410": ([status(410)], "answers 410"),
    "204": ([status(204)], "answers 204"),
    "another file": ([serve(OTHER)], "sent a file that has the md5"),
    "a shorter file": ([serve(BODY[:-1])], "offers 299,999 bytes instead of 300,000"),
    "a longer file": ([serve(BODY + b"x")], "offers 300,001 bytes instead of 300,000"),
    "an endless file": ([endless], "sends more than the 300,000 bytes of the file"),
    "a shorter file in chunks": ([chunked(BODY[:-1])], "hung up after 299,999 of 300,000 bytes (5 times)"),
    "an empty file": ([serve(b"")], "offers 0 bytes instead of 300,000"),
    "a web page": ([status(200, b"\n<!DOCTYPE html><title>Sign in</title>")], "answers with a web page instead of the file"),
    "a web page as an archive": ([status(200, b"<HTML>quota exceeded", Content_Type="application/gzip")], "answers with a web page"),
    "an error of a bucket": ([status(200, b"<?xml version='1.0'?><Error>")], "answers with a web page"),
    "redirects for ever": ([status(302, Location="/a.tar")], "TooManyRedirects"),
    "redirects to what is no address": ([status(302, Location="nothing:nowhere")], "InvalidSchema"),
    "always hangs up": ([hang_up], "can't be reached (ConnectionError) (5 times)"),
    "always breaks off": ([serve(until=1000)], "broke the connection (5 times)"),
    "always silent": ([keep_silent], "timed out (5 times)"),
    "always 503": ([status(503)], "answers 503 (5 times)"),
    "always 429": ([status(429)], "answers 429 (5 times)"),
    "come back tomorrow": ([status(429, Retry_After="86400")], "answers 429 and asks to wait 86,400 s"),
    "come back tomorrow, a date": ([status(503, Retry_After=seconds_from_now(86_400))], "answers 503 and asks to wait 86,"),
    "never goes on": ([cut(), from_another_place], "does not go on from where it is asked to (5 times)"),
}


@pytest.mark.parametrize("script, reason", NEXT.values(), ids=NEXT)
def test_a_mirror_that_will_not_do_is_followed_by_the_next(server, path, capsys, script, reason):
    bad = server.url("a.tar", *script)
    fetch(remote(bad, server.url("b.tar")), path)
    assert_whole(path)
    [line] = [line for line in capsys.readouterr().out.splitlines() if "trying" in line]
    assert line.startswith(f"a.tar: {bad} {reason}") and line.endswith("/b.tar")


@pytest.mark.parametrize("script, reason", NEXT.values(), ids=NEXT)
def test_where_no_mirror_will_do_one_line_says_what_was_tried(server, path, script, reason):
    bad, worse = server.url("a.tar", *script), server.url("b.tar", status(404))
    line = refusal(remote(bad, worse), path)
    assert line.startswith(f"a.tar can't be fetched: {bad} {reason}") and f"; {worse} answers 404" in line
    assert line.endswith(f": put it at {path} by hand, it is verified and used")


def test_a_mirror_that_refuses_the_connection_is_followed_by_the_next(server, path, dead_url):
    fetch(remote(dead_url, server.url("a.tar")), path)
    assert_whole(path)


def test_a_server_without_a_certificate_is_not_believed(server, path):
    url = server.url("a.tar").replace("http:", "https:")
    assert "has no valid certificate" in refusal(remote(url), path)
    fetch(remote(url, server.url("a.tar")), path)
    assert_whole(path)


@pytest.fixture
def crawl(monkeypatch):
    monkeypatch.setattr(download, "CRAWL", (1_000_000, 0.1))
    return serve(piece=1000, pause=0.01)


def test_a_mirror_that_crawls_is_followed_by_the_next_which_goes_on(server, path, capsys, crawl):
    fetch(remote(server.url("a.tar", crawl), server.url("b.tar")), path)
    assert_whole(path)
    assert re.search(r"a.tar crawls \(\d+\.\d kB/s\); trying .*/b.tar", capsys.readouterr().out)
    assert int(re.fullmatch(r"bytes=(\d+)-", *server.asked("Range", "b.tar"))[1]) > 0


def test_a_mirror_that_crawls_is_better_than_none(server, path, crawl):
    fetch(remote(server.url("a.tar", crawl), server.url("b.tar", status(404))), path)
    assert_whole(path)


def test_the_only_mirror_may_crawl(server, path, crawl):
    fetch(remote(server.url("a.tar", crawl)), path)
    assert_whole(path)
    assert len(server.requests) == 1


def test_the_only_mirror_may_not_stand_still(server, path, monkeypatch):
    monkeypatch.setattr(download, "CRAWL", (10_000_000, 0.1))
    assert "crawls (" in refusal(remote(server.url("a.tar", serve(piece=100, pause=0.05))), path)


# --------------------------------------------------------------------------------------------------
# Checksums, and files put there by hand
# --------------------------------------------------------------------------------------------------

def checked(**checks):
    return RemoteFile(("http://127.0.0.1:1/a.tar",), **checks)


RIGHT = [{}, {"size": 300_000}, {"md5": MD5}, {"sha256": hashlib.sha256(BODY).hexdigest()}, {"sha256": hashlib.sha256(BODY).hexdigest()[:8]}]
WRONG = [{"size": 299_999}, {"md5": MD5[::-1]}, {"sha256": "0" * 64}, {"sha256": "0" * 8}, {"sha256": "0" * 64, "md5": MD5}]


@pytest.mark.parametrize("checks", RIGHT, ids=str)
def test_a_file_put_there_by_hand_is_used(path, checks):
    path.parent.mkdir()
    path.write_bytes(BODY)
    fetch(checked(**checks), path)
    assert path.read_bytes() == BODY


@pytest.mark.parametrize("checks", WRONG, ids=str)
def test_a_wrong_file_put_there_by_hand_is_refused_and_kept(path, checks):
    path.parent.mkdir()
    path.write_bytes(BODY)
    with pytest.raises(UserError, match=re.escape(f"{path} has ") + ".* instead of .*: delete it"):
        fetch(checked(**checks), path)
    assert path.read_bytes() == BODY


@pytest.mark.parametrize("checks", RIGHT, ids=str)
def test_a_file_with_the_right_checksum_takes_its_name(server, path, checks):
    fetch(RemoteFile((server.url("a.tar"),), **checks), path)
    assert_whole(path)


@pytest.mark.parametrize("checks", WRONG, ids=str)
def test_a_file_with_a_wrong_checksum_does_not_take_its_name(server, path, checks):
    refusal(RemoteFile((server.url("a.tar"),), **checks), path)
    assert leftovers(path.parent) == []


def test_a_file_is_named_after_its_first_address():
    assert RemoteFile(("https://host/files/a.tar.gz?download=1", "https://other/b")).name == "a.tar.gz"


# --------------------------------------------------------------------------------------------------
# Proxies
# --------------------------------------------------------------------------------------------------

def test_the_proxy_of_the_environment_is_used(server, path, monkeypatch):
    monkeypatch.delenv("NO_PROXY")
    monkeypatch.setenv("http_proxy", server.url("").rstrip("/"))
    server.url("a.tar")
    fetch(remote("http://nowhere.invalid/a.tar"), path)
    assert_whole(path)
    assert [asked for asked, _ in server.requests] == ["http://nowhere.invalid/a.tar"]


def test_the_proxy_of_the_environment_is_not_used_for_what_is_excepted(server, path, monkeypatch, dead_url):
    monkeypatch.setenv("http_proxy", dead_url)
    fetch(remote(server.url("a.tar")), path)
    assert_whole(path)


# --------------------------------------------------------------------------------------------------
# Several at once
# --------------------------------------------------------------------------------------------------

@forks
def test_two_processes_that_want_a_file_fetch_it_once(server, path):
    file = remote(server.url("a.tar", serve(piece=10_000, pause=0.02)))
    processes = [start(fetch, file, path) for _ in range(3)]
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    assert_whole(path)
    assert server.sent == len(BODY)


@forks
def test_a_process_that_waited_for_one_that_was_killed_goes_on(server, path):
    url = server.url("a.tar", serve(piece=10_000, pause=0.02))
    first = start(fetch, remote(url), path)
    while not (part_of(path).exists() and part_of(path).stat().st_size > CUT):
        time.sleep(0.01)
    second = start(fetch, remote(url), path)
    time.sleep(0.05)
    first.kill()
    second.join(30)
    assert second.exitcode == 0 and int(re.fullmatch(r"bytes=(\d+)-", server.asked("Range")[1])[1]) >= CUT
    assert_whole(path)


def test_several_files_are_fetched_at_once_and_one_that_fails_stops_no_other(server, tmp_path):
    together = threading.Barrier(2)

    def both_here(handler):
        together.wait(5)        # is answered only when the other one is asked for as well
        serve()(handler)

    wanted = {tmp_path / "a.tar": remote(server.url("a.tar", both_here)), tmp_path / "bad.tar": remote(server.url("bad.tar", status(404))),
              tmp_path / "b.tar": remote(server.url("b.tar", both_here))}
    failed = fetch_all(wanted)
    assert list(failed) == [tmp_path / "bad.tar"] and "answers 404" in failed[tmp_path / "bad.tar"]
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes() == BODY


def test_nothing_to_fetch():
    assert fetch_all({}) == {}


@pytest.mark.parametrize("behaviour", [serve(piece=10_000, pause=0.02), status(429, Retry_After="20")], ids=["receiving", "waiting"])
def test_it_stops_when_it_is_told_to_and_keeps_its_part(server, path, behaviour):
    stop = threading.Event()
    threading.Timer(0.2, stop.set).start()
    began = time.monotonic()
    with pytest.raises(Stopped):
        fetch(remote(server.url("a.tar", cut(), behaviour)), path, stop)
    assert time.monotonic() - began < 2
    assert part_of(path).stat().st_size >= CUT and not path.exists()


def test_an_interrupt_stops_all_of_them(server, tmp_path, monkeypatch):
    wanted = {tmp_path / name: remote(server.url(name, serve(piece=1000, pause=0.05))) for name in ("a.tar", "b.tar")}
    began, result = time.monotonic(), download.ThreadPoolExecutor.submit

    def interrupted(*args):
        running = result(*args)
        monkeypatch.setattr(running, "result", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
        return running

    monkeypatch.setattr(download.ThreadPoolExecutor, "submit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch_all(wanted)
    assert time.monotonic() - began < 5 and not any(path.exists() for path in wanted)


# --------------------------------------------------------------------------------------------------
# Disks
# --------------------------------------------------------------------------------------------------

def little_space(monkeypatch, free):
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))


def test_too_little_disk_is_noticed_before_the_first_request(server, path, monkeypatch):
    little_space(monkeypatch, 1000)
    assert "make room" in refusal(remote(server.url("a.tar")), path)
    assert server.requests == []


def test_what_is_there_already_takes_no_more_disk(server, path, monkeypatch):
    put_part(path, BODY[:-1000])
    little_space(monkeypatch, files.SPARE + 1000)
    fetch(remote(server.url("a.tar")), path)
    assert_whole(path)


def test_a_disk_that_fills_up_is_one_line_and_the_part_is_gone_on_from(server, path, monkeypatch):
    class Full:
        """A part on a disk with room for CUT bytes."""

        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def write(self, content):
            room = CUT - self.file.tell()
            if room == 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(content[:room])

    file = remote(server.url("a.tar"))
    with monkeypatch.context() as context:
        context.setattr(download, "open", lambda *args, **flags: Full(open(*args, **flags)), raising=False)
        assert refusal(file, path) == f"the disk under {path.parent} is full: make room and run this again, a.tar.part is gone on from"
    assert part_of(path).read_bytes() == BODY[:CUT]
    fetch(file, path)
    assert_whole(path)
    assert server.asked("Range") == [None, f"bytes={CUT}-"]


def test_a_data_folder_that_can_not_be_made_is_one_line(server, tmp_path):
    (tmp_path / "file").write_text("")
    assert "choose another --data-dir" in refusal(remote(server.url("a.tar")), tmp_path / "file" / "a.tar")


# --------------------------------------------------------------------------------------------------
# What data.py asks before it begins
# --------------------------------------------------------------------------------------------------

def with_files(monkeypatch, name, *files):
    monkeypatch.setitem(data.DATA_SETS, name, dataclasses.replace(data.DATA_SETS[name], files=files))


def test_what_is_missing_is_named_with_its_addresses_and_where_to_put_it(tmp_path, server, dead_url, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", (1, 1))
    gone = server.url("gone.tar", status(404))
    with_files(monkeypatch, "cifar10", remote(dead_url, gone))
    (tmp_path / "here").mkdir()
    [line] = data.unavailable([("cifar10", "target"), ("digits", "target"), (f"mine={tmp_path / 'here'}", "source")], tmp_path)
    assert line.startswith(f"cifar10 is missing and {dead_url} can't be reached (ConnectionError), {gone} answers 404: put dead.tar into {tmp_path}/")
    assert str(tmp_path / "cifar-10-batches-py") in line and str(tmp_path / "cifar10" / "train") in line


@pytest.mark.parametrize("behaviour", [serve(), status(429), status(503)], ids=["answers", "429", "503"])
def test_one_mirror_that_answers_will_do(tmp_path, server, dead_url, monkeypatch, capsys, behaviour):
    with_files(monkeypatch, "stl10", remote(dead_url, server.url("b.tar", behaviour), body=bytes(2_000_000)))
    assert data.unavailable([("stl10", "source")], tmp_path) == []
    assert capsys.readouterr().out == "to fetch: stl10, 2 MB in all\n"


def test_what_a_part_holds_is_not_fetched_again(tmp_path, server, monkeypatch, capsys):
    with_files(monkeypatch, "stl10", remote(server.url("b.tar"), body=bytes(9_000_000)))
    (tmp_path / "b.tar.part").write_bytes(bytes(6_000_000))
    assert data.unavailable([("stl10", "source")], tmp_path) == []
    assert capsys.readouterr().out == "to fetch: stl10, 3 MB in all\n"


def test_too_little_disk_for_all_that_will_be_made_is_noticed_first(tmp_path, server, monkeypatch):
    """It fits as an archive, and not once more extracted."""
    with_files(monkeypatch, "stl10", remote(server.url("b.tar"), body=bytes(1_000_000)))
    little_space(monkeypatch, files.SPARE + data.DATA_SETS["stl10"].unpacked)
    [line] = data.unavailable([("stl10", "source")], tmp_path)
    assert "still to be fetched, extracted and packed needs" in line


def test_no_server_is_asked_for_what_is_on_disk(tmp_path, server, monkeypatch):
    write_cifar10(tmp_path)
    register(monkeypatch, "cifar10", server.url("cifar.tar.gz"), b"content")
    assert data.unavailable([("cifar10", "target")], tmp_path) == []
    assert server.requests == []
