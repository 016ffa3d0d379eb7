"""Files that appear in one step, digests, locks of folders, and what is said to the person."""
import contextlib
import errno
import functools
import hashlib
import json
import os
import re
import socket
import time
from pathlib import Path

from filelock import FileLock, Timeout

NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP)     # of a file system that has none
working_alone = []      # not empty: this process works as if it were the only one (kd/processes.py)


class UserError(Exception):
    """Something the user can put right: one plain sentence that names the thing and what to do."""


# ---- What is said --------------------------------------------------------------------------------

def is_first():
    """Whether this process writes and speaks: the only one, or the first that torchrun started."""
    return bool(working_alone) or os.environ.get("RANK", "0") == "0"


def say(line):
    if is_first():
        print(f"{line}\n", end="", flush=True)     # at once, for lines of several threads


say_once = functools.cache(say)     # what is looked at for a check and again for the work


def require_none(lines):
    """Raises UserError with these lines, one for each thing that is wrong, where there are any."""
    if lines:
        raise UserError("\n".join(dict.fromkeys(lines)))


def first_line(error):
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(text).strip().splitlines()[0]


def listed(items, most=20):
    """Joined by commas; of many the first few, and how many more there are."""
    more = f" and {len(items) - most:,} more" if len(items) > most else ""
    return ", ".join(map(str, items[:most])) + more


def one_field(text):
    """`text` with its tabs and everything that ends a line escaped."""
    return re.sub("[\t\n\v\f\r\x1c-\x1e\x85\u2028\u2029]", lambda found: repr(found[0])[1:-1], text)


# ---- Writing and reading -------------------------------------------------------------------------

def write_atomically(path, write):
    """Calls `write(file)` with a binary file beside `path`, which takes its place once all of it is
    on disk. Of several processes only the first one writes."""
    if not is_first():
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(beside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_text(path, text):
    """UTF-8; bytes of file names that are not UTF-8 are written as they are."""
    write_atomically(path, lambda file: file.write(text.encode("utf-8", "surrogateescape")))


def write_json(path, content):
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def write_sealed(path, content):
    """Writes a dict as JSON with a "digest" of the rest, so that a later change is noticed."""
    write_json(path, content | {"digest": _seal(content)})


def read_sealed(path):
    """The dict in a file that `write_sealed` wrote; None where it holds anything else."""
    try:
        content = json.loads(Path(path).read_text()) if Path(path).is_file() else None
    except ValueError:
        return None
    whole = isinstance(content, dict) and content.get("digest") == _seal(content)
    return content if whole else None


def _seal(content):
    kept = {name: value for name, value in content.items() if name != "digest"}
    return digest(json.dumps(kept, sort_keys=True).encode())


def read_product(folder, name):
    """(content, None) of a sealed JSON whose files, {path: digest} of "files", are whole; (None,
    what is wrong) of one that isn't, (None, None) where there is none."""
    if not (folder / name).exists():
        return None, None
    content = read_sealed(folder / name)
    if content is None:
        return None, f"{folder / name} is damaged: it is not what was written there"
    for file, written in content["files"].items():
        if not (folder / file).exists():
            return None, f"{folder / file} is missing"
        if file_digest(folder / file) != written:
            return None, f"{folder / file} is damaged: it is not what was written there"
    return content, None


def digest(*contents):
    """16 hexadecimal digits that tell these bytes, or arrays, from others."""
    found = hashlib.sha256()
    for content in contents:
        found.update(memoryview(content).cast("B"))
    return found.hexdigest()[:16]


def file_digest(path):
    """The same of a file, which is read once for each of its versions (inode, size, time of
    change). Raises UserError where it can't be read."""
    try:
        now = os.stat(path)
        return _digest_of_version(path, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns)
    except OSError as error:
        raise UserError(f"{path} can't be read ({first_line(error)})") from None


@functools.lru_cache(maxsize=1000)
def _digest_of_version(path, *version):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


# ---- Disk and locks ------------------------------------------------------------------------------

def _acquire(lock, folder, timeout):
    """Whether the lock was had; None on a file system without locks, which is said."""
    try:
        lock.acquire(timeout=timeout)
        return True
    except Timeout:
        return False
    except NotImplementedError:         # filelock's, where there is no such call
        pass
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    say(f"{folder} is on a file system without locks. Do not let two processes use it at once.")
    return None


@contextlib.contextmanager
def holding(path, what):
    """Keeps every other process from making `path` meanwhile; waits while another one does. The
    operating system releases the lock when the process ends, however it ends."""
    folder = Path(path).parent / ".locks"
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / f"{Path(path).name}.lock")
    if _acquire(lock, folder, 0.5) is False:
        say(f"{what}: waiting for another process that is doing this.")
        _acquire(lock, folder, -1)
    try:
        yield
    finally:
        lock.release()


_held = {}      # {run folder: its lock}


def hold(folder):
    """Keeps every other process from writing in a run folder until `let_go` or the end of this one.
    Raises UserError that says who holds it."""
    if not is_first() or folder in _held:
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock, holder = FileLock(folder / ".lock"), folder / ".holder"
    if _acquire(lock, folder, 0) is False:
        who = holder.read_text() if holder.exists() else "another process"
        raise UserError(f"{folder} is in use by {who}. Wait for it, or choose another --run-dir.")
    _held[folder] = lock
    holder.write_text(f"process {os.getpid()} on {socket.gethostname()} since "
                      f"{time.strftime('%Y-%m-%d %H:%M:%S')}")


def let_go():
    while _held:
        _held.popitem()[1].release()
