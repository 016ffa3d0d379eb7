"""Downloads: what is fetched takes its name only once size and checksum are right."""
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import requests

from run import Progress, UserError

TIMEOUT = (10, 60)      # seconds to connect, and between two pieces of an answer


@dataclass(frozen=True)
class RemoteFile:
    url: str
    size: int           # bytes
    md5: str

    @property
    def name(self):
        return self.url.partition("?")[0].rpartition("/")[2]


def reachable(url):
    """Whether a server answers for this address; None, or the reason why not."""
    try:
        with requests.get(url, stream=True, timeout=TIMEOUT[0]) as answer:
            return None if answer.ok else f"answers {answer.status_code}"
    except requests.RequestException as error:
        return f"can't be reached ({type(error).__name__})"


def fetch(url, path, size=None, *, md5=None, sha256_prefix=None):
    """Fetches `url` to `path`, which it becomes only once size and checksum are right."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with requests.get(url, stream=True, timeout=TIMEOUT) as answer, open(part, "wb") as file:
            answer.raise_for_status()
            progress = Progress(f"fetching {path.name}", int(answer.headers.get("Content-Length", size or 0)), "B")
            for piece in answer.iter_content(1 << 20):
                file.write(piece)
                progress.update(len(piece))
            progress.close()
        verify(part, size, md5, sha256_prefix, name=url)
        os.replace(part, path)
    except requests.RequestException as error:
        raise UserError(f"{url} can't be fetched ({type(error).__name__}): fetch it by hand and put it at {path}") from None
    finally:
        part.unlink(missing_ok=True)


def verify(path, size=None, md5=None, sha256_prefix=None, name=None):
    name = name or path
    if size is not None and path.stat().st_size != size:
        raise UserError(f"{name} is not whole: {path.stat().st_size:,} bytes instead of {size:,}; delete it and fetch it again")
    for algorithm, expected in (("md5", md5), ("sha256", sha256_prefix)):
        if expected is None:
            continue
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, algorithm).hexdigest()
        if not found.startswith(expected):
            raise UserError(f"{name} has the wrong {algorithm}, {found} instead of {expected}: delete it and fetch it again")
