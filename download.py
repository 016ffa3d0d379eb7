"""Downloads that arrive whole, or not at all: a file takes its name only once its size and checksum are right.

In:  a `RemoteFile`: its addresses (a mirror is as good as another: the checksum decides), size and checksum.
Out: the file. Until then `<name>.part` beside it, which any later attempt, from any mirror, goes on from.

One process fetches a file; another one that wants it waits and then uses it.
"""
import email.utils
import errno
import hashlib
import http.client
import json
import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import requests
import urllib3

from files import Stopped, UserError, first_line, holding, require_space, say, write_json
from progress import Progress

TIMEOUT = (10, 60)          # seconds to connect, and between two pieces of an answer
PIECE = 1 << 16             # bytes at most that a read asks for; what a kill can cost
ATTEMPTS = 5                # in a row that bring nothing new, before the next mirror is tried
BACKOFF = (1.0, 30.0)       # seconds: the first wait is up to the one, no wait is longer than the other
LONGEST_WAIT = 120.0        # seconds a server may ask us to wait (Retry-After) before the next mirror is tried
CRAWL = (100_000, 30.0)     # bytes a second, over this many seconds: below it a mirror crawls
AT_ONCE = 4                 # files fetched at the same time

NETWORK = (requests.ConnectionError, requests.Timeout, urllib3.exceptions.HTTPError, http.client.HTTPException, ConnectionError, TimeoutError)


@dataclass(frozen=True)
class RemoteFile:
    """A file and where it can be had. urls: the official address first. size: bytes; None where it isn't known.
    A sha256 may be the beginning of one (torchvision's weights carry eight digits of it in their names)."""

    urls: tuple
    size: int | None = None
    md5: str | None = None
    sha256: str | None = None

    @property
    def name(self):
        return self.urls[0].partition("?")[0].rpartition("/")[2]


class _NextMirror(Exception):
    """This address won't do, for the reason in the message."""


class _Crawls(_NextMirror):
    """It would do if there is no faster one."""


class _Transient(Exception):
    """Worth another attempt; `wait`: the seconds that the server asked for."""

    def __init__(self, reason, wait=None):
        super().__init__(reason)
        self.wait = wait


# --------------------------------------------------------------------------------------------------
# Checking
# --------------------------------------------------------------------------------------------------

def checksum_error(path, file):
    """What is wrong with the file at `path`, in a few words; None where nothing is."""
    size = path.stat().st_size
    if file.size is not None and size != file.size:
        return f"has {size:,} bytes instead of {file.size:,}"
    for algorithm, expected in (("sha256", file.sha256), ("md5", file.md5)):
        if expected is not None:
            with open(path, "rb") as content:
                found = hashlib.file_digest(content, algorithm).hexdigest()
            return None if found.startswith(expected) else f"has the {algorithm} {found} instead of {expected}"
    return None


def verify(path, file):
    """Raises UserError unless the file at `path` is whole and right."""
    wrong = checksum_error(path, file)
    if wrong:
        raise UserError(f"{path} {wrong}: delete it, it is fetched again, or put the right one there ({file.urls[0]})")


def part_of(path):
    """Where the beginning of a file that is being fetched lies."""
    return path.with_name(f"{path.name}.part")


def remaining(path, file):
    """Bytes still to fetch."""
    part = part_of(path)
    return max(0, (file.size or 0) - (part.stat().st_size if part.exists() else 0)) if not path.exists() else 0


def reachable(urls):
    """Whether a server answers for one of these addresses; None, or the reasons why none does."""
    reasons = []
    for url in urls:
        try:
            with requests.get(url, stream=True, timeout=TIMEOUT[0]) as answer:
                if answer.ok or answer.status_code == 429 or answer.status_code >= 500:     # those pass
                    return None
                reasons.append(f"{url} answers {answer.status_code}")
        except requests.RequestException as error:
            reasons.append(f"{url} can't be reached ({type(error).__name__})")
    return ", ".join(reasons)


# --------------------------------------------------------------------------------------------------
# One file
# --------------------------------------------------------------------------------------------------

def fetch(file, path, stop=None):
    """Brings `file` to `path`; a file that is there is verified. Raises UserError with all that was tried.

    stop: a threading.Event on which it raises Stopped.
    """
    path, stop = Path(path), stop or threading.Event()
    if path.exists():
        return verify(path, file)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with holding(path, f"fetching {path.name}", stop):
            if path.exists():       # another process has fetched it while we waited
                return verify(path, file)
            _Download(file, path, stop).run()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"the disk under {path.parent} is full: make room and run this again, {part_of(path).name} is gone on from") from None
        raise UserError(f"{path} can't be written ({first_line(error)}): choose another --data-dir") from None


class _Download:
    """One file on its way: the mirrors still to be tried, the part on disk, and who has contributed to it."""

    def __init__(self, file, path, stop):
        self.file, self.path, self.part, self.stop = file, path, part_of(path), stop
        self.note = self.part.with_name(f"{self.part.name}.json")       # {"from": addresses, "etag": the last one's}
        self.mirrors = [(url, False) for url in file.urls]              # (address, whether it may crawl)
        self.tried = []
        self.ignoring_ranges = set()
        # Whether a mirror may go on from where another one, or an earlier attempt, stopped.
        self.mixing = True

    def run(self):
        require_space(self.path.parent, remaining(self.path, self.file), f"fetching {self.path.name}")
        if self.file.size is not None and self._length() > self.file.size:
            self.part.unlink()
        self.progress = Progress(f"fetching {self.path.name}", self.file.size, "B")
        self.resumed = self._length() > 0
        self.progress.skip(self._length())
        try:
            while self.mirrors:
                url, may_crawl = self.mirrors.pop(0)
                try:
                    self._fill(url, may_crawl or not self.mirrors)
                    return self._finish(url)
                except _Crawls as reason:
                    self.tried.append(f"{url} {reason}")
                    self.mirrors.append((url, True))
                except _NextMirror as reason:
                    self.tried.append(f"{url} {reason}")
                if self.mirrors:
                    say(f"{self.path.name}: {self.tried[-1]}; trying {self.mirrors[0][0]}")
        finally:
            self.progress.close()
        raise UserError(f"{self.path.name} can't be fetched: {'; '.join(self.tried)}: put it at {self.path} by hand, it is verified and used")

    def _fill(self, url, may_crawl):
        """Fills the part from one mirror, in as many attempts as it takes while each brings something."""
        failures, self.since, self.received = 0, time.monotonic(), 0
        while True:
            before, wait = self._length(), None
            try:
                return self._attempt(url, may_crawl)
            except requests.exceptions.SSLError:
                raise _NextMirror("has no valid certificate") from None
            except _Transient as error:
                reason, wait = str(error), error.wait
            except NETWORK as error:
                reason = _reason(error)
            except requests.RequestException as error:      # too many redirects, an address that is none
                raise _NextMirror(_reason(error)) from None
            failures = 1 if self._length() >= before + PIECE else failures + 1
            if failures >= ATTEMPTS:
                raise _NextMirror(f"{reason} ({ATTEMPTS} times)")
            if wait is None:        # full jitter, so that many processes do not come back together
                wait = random.uniform(0, min(BACKOFF[1], BACKOFF[0] * 2 ** (failures - 1)))
            elif wait > LONGEST_WAIT:
                raise _NextMirror(f"{reason} and asks to wait {wait:,.0f} s")
            if self.stop.wait(wait):
                raise Stopped

    def _attempt(self, url, may_crawl):
        start, note = self._length(), self._read_note()
        if start and not self.mixing and note.get("from") != [url]:
            self._discard()
            start = 0
        if start and start == self.file.size:
            return
        headers = {"Accept-Encoding": "identity"}       # the file's own bytes, which are what was counted and hashed
        if start and url not in self.ignoring_ranges:
            headers["Range"] = f"bytes={start}-"
            if note.get("from", [])[-1:] == [url] and note.get("etag"):
                headers["If-Range"] = note["etag"]
        with requests.get(url, stream=True, timeout=TIMEOUT, headers=headers) as answer:
            total = answer.headers.get("Content-Range", "").rpartition("/")[2] or answer.headers.get("Content-Length", "")
            if answer.status_code == 416 and total == str(start):       # of a file whose size we didn't know
                return
            if answer.status_code == 416 or answer.status_code == 206 and not answer.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
                self.ignoring_ranges.add(url)
                raise _Transient("does not go on from where it is asked to")
            if answer.status_code == 429 or answer.status_code >= 500:
                raise _Transient(f"answers {answer.status_code}", _retry_after(answer))
            if answer.status_code not in (200, 206):
                raise _NextMirror(f"answers {answer.status_code}")
            piece = self._read(answer)
            if answer.status_code == 200 and piece.lstrip()[:9].lower().startswith((b"<!doctype", b"<html", b"<?xml")):
                raise _NextMirror("answers with a web page instead of the file")
            if self.file.size is None:
                self.progress.total = int(total) if total.isdigit() else None
            elif total.isdigit() and int(total) != self.file.size:
                raise _NextMirror(f"offers {int(total):,} bytes instead of {self.file.size:,}")
            contributors = [*(note.get("from", []) if start else []), url]
            # A weak ETag says that two files mean the same, not that their bytes are equal.
            etag = answer.headers.get("ETag", "")
            write_json(self.note, {"from": list(dict.fromkeys(contributors)),
                                   "etag": etag if etag and not etag.startswith("W/") else answer.headers.get("Last-Modified")})
            self._receive(answer, piece, start if answer.status_code == 200 else 0, may_crawl)

    def _receive(self, answer, piece, known, may_crawl):
        """Appends what comes to the part, `piece` first. known: bytes of the part that the answer begins with once
        more, from a server that ignores ranges: they are compared, and what differs is replaced."""
        with open(self.part, "r+b" if self.part.exists() else "w+b", buffering=0) as part:
            position = 0 if known else part.seek(0, os.SEEK_END)
            while piece:
                if self.stop.is_set():
                    raise Stopped
                if known and part.read(len(piece)) == piece:
                    position += len(piece)
                    known = 0 if position == known else known
                else:
                    if known:       # from here on it is another file, or the part ends within this piece
                        self.progress.update(position - known)
                        part.seek(position)
                        part.truncate()
                        known = 0
                    position += len(piece)
                    self.progress.update(len(piece))
                    rest = memoryview(piece)
                    while rest:
                        rest = rest[part.write(rest):]
                if self.file.size is not None and position > self.file.size:
                    self._discard()
                    raise _NextMirror(f"sends more than the {self.file.size:,} bytes of the file")
                self._check_speed(len(piece), may_crawl)
                piece = self._read(answer)
            if known:       # the part was longer than the file
                self.progress.update(position - known)
                part.truncate(position)
        if self.file.size is not None and position < self.file.size:
            raise _Transient(f"hung up after {position:,} of {self.file.size:,} bytes")

    def _read(self, answer):
        return answer.raw.read1(PIECE, decode_content=False)

    def _check_speed(self, received, may_crawl):
        """Where there is no faster mirror, only one that is a hundred times slower still is given up."""
        speed, seconds = CRAWL
        self.received += received
        elapsed = time.monotonic() - self.since
        if elapsed >= seconds:
            found, self.since, self.received = self.received / elapsed, time.monotonic(), 0
            if found < (speed / 100 if may_crawl else speed):
                raise (_NextMirror if may_crawl else _Crawls)(f"crawls ({found / 1e3:,.1f} kB/s)")

    def _finish(self, last):
        wrong = checksum_error(self.part, self.file)
        if wrong:
            contributors = list(dict.fromkeys([*self._read_note().get("from", []), last]))
            self._discard()
            if self.mixing and (self.resumed or len(contributors) > 1):     # whose bytes were wrong is unknown: each again, alone
                self.mixing = False
                self.mirrors[:0] = [(url, True) for url in contributors if url in self.file.urls]
                raise _NextMirror(f"went on from an earlier part, and the whole {wrong}")
            raise _NextMirror(f"sent a file that {wrong}")
        with open(self.part, "rb") as part:
            os.fsync(part.fileno())
        os.replace(self.part, self.path)
        for left_over in (self.note, *self.note.parent.glob(f".{self.note.name}.*.part")):
            left_over.unlink(missing_ok=True)

    def _length(self):
        return self.part.stat().st_size if self.part.exists() else 0

    def _read_note(self):
        try:
            note = json.loads(self.note.read_text())
            return note if isinstance(note, dict) and isinstance(note.get("from"), list) else {}
        except (OSError, ValueError):
            return {}

    def _discard(self):
        self.progress.update(-self._length())
        self.part.unlink(missing_ok=True)
        self.note.unlink(missing_ok=True)


def _retry_after(answer):
    """The seconds in a Retry-After, which may also be a date; None where there is none."""
    text = answer.headers.get("Retry-After", "").strip()
    if text.isdigit():
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (TypeError, ValueError):
        return None


def _reason(error):
    """A network error in a few words."""
    if isinstance(error, (requests.Timeout, urllib3.exceptions.TimeoutError)):
        return "timed out"
    if isinstance(error, requests.ConnectionError):
        return f"can't be reached ({type(error).__name__})"
    if isinstance(error, (urllib3.exceptions.ProtocolError, http.client.HTTPException, ConnectionError)):
        return "broke the connection"
    return type(error).__name__


# --------------------------------------------------------------------------------------------------
# Several files
# --------------------------------------------------------------------------------------------------

def fetch_all(wanted):
    """Fetches several files at once. wanted: {path: RemoteFile}. Returns {path: the message why it failed}."""
    stop, failed = threading.Event(), {}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        running = {path: pool.submit(fetch, file, path, stop) for path, file in wanted.items()}
        try:
            for path, result in running.items():
                try:
                    result.result()
                except UserError as error:
                    failed[path] = str(error)
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    return failed
