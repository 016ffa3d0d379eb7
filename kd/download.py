"""Downloads that arrive whole or not at all: a file takes its name once its checksum is right.

Until then it is `<name>.part`, which a later attempt, from any mirror, continues. One process
fetches a file; another one that wants it waits and then uses it.
"""
import hashlib
import os
import time
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path

import requests
import urllib3

from kd.files import UserError, holding, say
from kd.progress import Progress

TIMEOUT = (10, 60)          # seconds to connect, and between two pieces of an answer
PIECE = 1 << 16             # bytes at most that a read asks for
ROUNDS = 3                  # in which each mirror is asked
BACKOFF = 3.0               # seconds to wait before the second round, and twice before the third
CRAWL, PATIENCE = 100_000, 30.0     # a mirror that is slower crawls: bytes a second, over seconds
AT_ONCE = 4                 # files fetched at the same time


@dataclass(frozen=True)
class RemoteFile:
    """A file and its addresses, the official one first. size: bytes. A sha256 may be the beginning
    of one: torchvision's weights carry eight digits in their names."""

    urls: tuple
    size: int | None = None
    md5: str | None = None
    sha256: str | None = None

    @property
    def name(self):
        return self.urls[0].partition("?")[0].rpartition("/")[2]


def wrong_with(path, file):
    """What is wrong with the content of `path`, in a few words; None where nothing is."""
    size = path.stat().st_size
    if file.size not in (None, size):
        return f"has {size:,} bytes instead of {file.size:,}"
    algorithm, expected = ("sha256", file.sha256) if file.sha256 else ("md5", file.md5)
    if expected is not None:
        with open(path, "rb") as content:
            found = hashlib.file_digest(content, algorithm).hexdigest()
        if not found.startswith(expected):
            return f"has the {algorithm} {found} instead of {expected}"
    return None


def _length(path):
    return path.stat().st_size if path.exists() else 0


def fetch(file, path):
    """Brings `file` to `path`; one that is there is verified. Raises UserError."""
    path = Path(path)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with holding(path, f"fetching {path.name}"):
            if not path.exists():       # else another process fetched it while we waited
                return _from_mirrors(file, path, Path(f"{path}.part"))
    wrong = wrong_with(path, file)
    if wrong:
        raise UserError(f"{path} {wrong}. Delete it, and it is fetched again, or put the right one "
                        f"there ({file.urls[0]}).")


def _from_mirrors(file, path, part):
    """Several times around: a part may hold another mirror's wrong bytes, a busy server may answer
    later, and who crawls is better than nobody."""
    tried = []
    with Progress(f"fetching {path.name}", file.size, "B", done=_length(part)) as progress:
        for number, url in enumerate(file.urls * ROUNDS):
            if number % len(file.urls) == 0:
                time.sleep(BACKOFF * number / len(file.urls))
            slowest = CRAWL if number < len(file.urls) - 1 else 0
            reason = _fill(part, url, file.size, slowest, progress)
            if reason is None:
                wrong = wrong_with(part, file)
                if wrong is None:
                    return os.replace(part, path)
                part.unlink()
                reason = f"sent a file that {wrong}"
            tried.append(f"{url} {reason}")
            say(f"{path.name}: {tried[-1]}")
    raise UserError(f"{path.name} can't be fetched: {'; '.join(dict.fromkeys(tried))}. Put it at "
                    f"{path} by hand: it is verified and used.")


def _fill(part, url, size, slowest, progress):
    """Fills the part from one mirror, asked again where it breaks off as long as it brings
    something. Returns why that can't be done, or None. slowest: bytes a second."""
    while size is None or _length(part) < size:
        start = _length(part)
        headers = {"Accept-Encoding": "identity"}
        headers |= {"Range": f"bytes={start}-"} if start else {}
        try:
            with requests.get(url, stream=True, timeout=TIMEOUT, headers=headers) as answer:
                return _receive(answer, part, start, size, slowest, progress)
        except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
            if _length(part) < start + PIECE:
                return f"can't be reached, or breaks off ({type(error).__name__})"


def _receive(answer, part, start, size, slowest, progress):
    """Appends an answer to the part, which has `start` bytes, or begins it again. Returns why it
    will not do, or None."""
    if answer.status_code == 416 and size is None:      # there is no more of it
        return None
    if answer.status_code == 200:       # also a server that ignores ranges
        start = 0
    elif answer.status_code != 206:
        return f"answers {answer.status_code}"
    offered = start + int(answer.headers.get("Content-Length", (size or start) - start))
    if size is not None and offered != size:        # a web page, mostly
        return f"offers {offered:,} bytes instead of {size:,}"
    progress.update(start - progress.n)
    began, received = time.monotonic(), 0
    with open(part, "r+b" if start else "wb", buffering=0) as content:
        content.seek(start)
        while piece := answer.raw.read1(PIECE, decode_content=False):
            content.write(piece)
            progress.update(len(piece))
            received, seconds = received + len(piece), time.monotonic() - began
            if seconds >= PATIENCE:
                if received < slowest * seconds:
                    return f"crawls ({received / seconds / 1e3:,.1f} kB/s)"
                began, received = time.monotonic(), 0


def fetch_all(wanted):
    """Fetches several files at once. wanted: {path: RemoteFile}. Returns [why one failed]."""
    def failure(each):
        try:
            fetch(each[1], each[0])
        except (UserError, OSError) as error:
            return str(error)
    with ThreadPool(AT_ONCE) as pool:       # of daemons: whoever interrupts does not wait for them
        return [line for line in pool.map(failure, wanted.items()) if line]
