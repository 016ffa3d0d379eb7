"""Files: written in one step, told from damaged ones, held by one process at a time; and what is said to the person.

The one place that writes.
"""
import contextlib
import functools
import hashlib
import itertools
import json
import os
import re
import shutil
import socket
import stat
import time
from pathlib import Path

from filelock import FileLock, Timeout

from structure import misfit

SPARE = 200_000_000         # bytes of disk that stay free
LEDGER = "digests.json"
SHOWN = ("report.html", "figures")      # what may be drawn while another process works in the run folder
SEAL = b"sha256 "      # and the digest of all before, at the end of a file that is sealed


class UserError(Exception):
    """Something the user can put right. Its message is one line that names the thing and what to do."""


class Stopped(Exception):
    """Another thread failed or was interrupted; what is on disk stays for the next time."""


# --------------------------------------------------------------------------------------------------
# Talking to the person
# --------------------------------------------------------------------------------------------------

def is_first():
    """Whether this process is the only one, or the first of those that torchrun started: the one that writes and speaks."""
    return os.environ.get("RANK", "0") == "0"


def say(line):
    if is_first():
        print(line, flush=True)


def stop_on(lines):
    """Raises UserError with these lines, one a thing that is missing; does nothing where there are none."""
    if lines:
        raise UserError("\n".join(dict.fromkeys(lines)))


def first_line(error):
    """What an exception says, in one line."""
    try:
        text = getattr(error, "strerror", None)
        return (text if isinstance(text, str) and text else str(error)).splitlines()[0]
    except Exception:       # it says nothing, or can't even do that
        return type(error).__name__


def listed(items, most=20):
    """Joined by commas; of a thousand the first few, and how many more."""
    return ", ".join(map(str, items[:most])) + (f" and {len(items) - most:,} more" if len(items) > most else "")


def one_field(text):
    """`text` with its tabs and everything that ends a line escaped."""
    return re.sub("[\t\n\v\f\r\x1c-\x1e\x85\u2028\u2029]", lambda found: repr(found[0])[1:-1], text)


# --------------------------------------------------------------------------------------------------
# Writing and reading
# --------------------------------------------------------------------------------------------------

def write_atomically(path, write, everyone=False):
    """Calls `write(file)` with a binary file beside `path`, which takes its place when all of it is on disk. Of several processes
    the first alone does it, unless `everyone` writes a file of its own. Below a folder with a ledger the file's digest is noted there."""
    if not (is_first() or everyone):
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(beside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        _note(path, beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_text(path, text):
    """UTF-8; bytes of file names that are no UTF-8 are written as they are."""
    write_atomically(path, lambda file: file.write(text.encode("utf-8", "surrogateescape")))


def write_json(path, content):
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def read_json(path, folder=None):
    """The dict in a file. Raises UserError where it holds none, or where `damage` finds something wrong."""
    require_whole(path, folder=folder)
    try:
        content = json.loads(Path(path).read_text())
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it is not a JSON object; delete it and run the command that made it again")
    return content


def write_sealed(path, content, everyone=False):
    """Writes bytes atomically, with their digest behind them."""
    digest = hashlib.sha256(content).digest()

    def write(file):
        file.write(content)
        file.write(SEAL + digest)
    write_atomically(path, write, everyone)


def read_sealed(path):
    """The bytes that `write_sealed` was given; None where the file holds anything else."""
    if not Path(path).is_file():        # a pipe would be waited for
        return None
    content = Path(path).read_bytes()
    end = len(content) - len(SEAL) - hashlib.sha256().digest_size
    return content[:end] if end >= 0 and content[end:] == SEAL + hashlib.sha256(content[:end]).digest() else None


def _require_no_pipe(path):
    """Raises UserError where opening a path would wait for somebody to write there."""
    if stat.S_ISFIFO(os.stat(path).st_mode):
        raise UserError(f"{path} is a pipe and no file: remove it")


def file_digest(path):
    """16 hexadecimal digits that tell a file from every other version of it."""
    try:
        _require_no_pipe(path)
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    except OSError as error:
        raise UserError(f"{path} can't be read ({first_line(error)})") from None


# --------------------------------------------------------------------------------------------------
# The ledger of a folder: {path below it: digests of what was written there last}
# --------------------------------------------------------------------------------------------------

def open_ledger(folder, files):
    """Begins the ledger of a folder that has none, with these paths of files as they are."""
    path = Path(folder) / LEDGER
    if is_first() and not path.exists():
        write_json(path, {Path(file).relative_to(folder).as_posix(): [_digest(file)] for file in files if Path(file).is_file()})


def _ledger_above(path):
    """(folder, ledger) of the nearest folder above that has one; None where none has."""
    path = Path(path).absolute()
    if path.name == LEDGER or path.suffix == ".part" or path.name in SHOWN or path.parent.name in SHOWN:      # sealed, and written often; or drawn from the others
        return None
    folder = next((folder for folder in path.parents[:3] if (folder / LEDGER).exists()), None)
    if folder is None:
        return None
    try:
        ledger = json.loads((folder / LEDGER).read_text())
        if not all(isinstance(digests, list) for digests in ledger.values()):
            raise ValueError
    except (ValueError, AttributeError, RecursionError):
        raise UserError(f"{folder / LEDGER} is damaged: delete it if you trust the other files as they are, or begin anew with --restart") from None
    return folder, ledger


def _digest(path):
    _require_no_pipe(path)
    status = os.stat(path)
    return _digest_of_version(str(path), status.st_ino, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=1000)
def _digest_of_version(path, *version):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _note(path, content):
    """Notes that `path` is about to become what the file `content` is. Until it is, what it was is good as well."""
    found = _ledger_above(path)
    if found is not None:
        folder, ledger = found
        name = Path(path).absolute().relative_to(folder).as_posix()
        before = [_digest(path)] if Path(path).exists() else []
        ledger[name] = list(dict.fromkeys([_digest(content), *(digest for digest in before if digest in ledger.get(name, ()))]))
        write_json(folder / LEDGER, ledger)


def damage(path, folder=None):
    """What is wrong with a file below a ledger, or, where there is none, with a file of the run folder `folder`; None where nothing is."""
    found = _ledger_above(path)
    if found is not None:
        folder, ledger = found
        digests = ledger.get(Path(path).absolute().relative_to(folder).as_posix())
        if digests is None:
            return "was not written in this run"
        if _digest(path) not in digests:
            return "is damaged: it is not what was written there"
    wrong = folder and misfit(folder, Path(path).absolute().relative_to(Path(folder).absolute()).as_posix())
    return f"is damaged: {wrong}" if wrong else None


def require_whole(path, remedy="restore it, or delete it and run the command that made it again", folder=None):
    """Raises UserError where `damage` finds something wrong."""
    wrong = damage(path, folder) if Path(path).exists() else None
    if wrong:
        raise UserError(f"{path} {wrong}; {remedy}")


def is_usable(*paths):
    """Whether these files, which belong together, are all there and whole. Where one is damaged that is said, and it is set aside, so that it can be made again."""
    usable = True
    for path in map(Path, paths):
        try:
            wrong = damage(path) if path.exists() else "is missing"
        except FileNotFoundError:       # another process has just set it aside
            wrong = "is missing"
        usable = usable and wrong is None
        if wrong not in (None, "is missing") and is_first():
            say(f"{path} {wrong}; it is set aside as {path.name}.damaged and made again")
            os.replace(path, path.with_name(f"{path.name}.damaged"))
    return usable


# --------------------------------------------------------------------------------------------------
# Disk and processes
# --------------------------------------------------------------------------------------------------

def nearest_existing(path):
    path = Path(path).absolute()
    while not path.exists():
        path = path.parent
    return path


def require_space(folder, needed, what):
    """Raises UserError where the disk under `folder` has less than `needed` bytes (and some to spare) free."""
    free = shutil.disk_usage(nearest_existing(folder)).free
    if needed and needed + SPARE > free:
        raise UserError(f"{folder} has {free / 1e9:,.1f} GB free, and {what} needs {(needed + SPARE) / 1e9:,.1f} GB: "
                        "make room, or choose another --data-dir")


@contextlib.contextmanager
def holding(path, what, stop=None):
    """Keeps every other process from making `path` meanwhile; waits while another one does.

    The operating system lets go of it when the process ends, however it ends. stop: a threading.Event that ends
    the waiting, with `Stopped`.
    """
    folder = Path(path).parent / ".locks"
    folder.mkdir(parents=True, exist_ok=True)
    lock, waited = FileLock(folder / f"{Path(path).name}.lock"), False
    while True:
        try:
            lock.acquire(timeout=0.5)
            break
        except Timeout:
            if not waited:
                say(f"{what}: another process is at it, waiting for it")
                waited = True
            if stop is not None and stop.is_set():
                raise Stopped from None
        except NotImplementedError:     # a file system without locks
            say(f"{folder} is on a file system without locks: do not let two processes use it at once")
            break
    try:
        yield
    finally:
        lock.release()


_held = {}      # {folder: its lock}


def hold(folder):
    """Keeps every other process from writing in a run folder until `let_go`, or until this one ends. Raises UserError that says who holds it."""
    folder = Path(folder).absolute()
    if not is_first() or folder in _held:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, FileNotFoundError) as error:       # a file has its name; a file system where nothing can be made
        raise UserError(f"{folder} can't be made ({first_line(error)}): choose another --run-dir") from None
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"{folder} is in use by {_holder(folder)}: wait for it, or use another --run-dir") from None
    except NotImplementedError:
        say(f"{folder} is on a file system without locks: do not let two processes use it at once")
        return
    _held[folder] = lock
    (folder / ".holder").write_text(json.dumps({"process": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}))


def remove_beside(folder, below=("", "*/", "transfer/*/"), held=True):
    """Removes what a process that was killed has left beside the files that it was writing in a folder and in these `below` it. held: this process holds
    the folder, so that nothing but a report can be at work there meanwhile."""
    if is_first():
        for path in itertools.chain.from_iterable(Path(folder).glob(f"{each}.*.part") for each in below):
            found = re.fullmatch(r"\.(.+)\.(\d+)\.part", path.name)
            if found and not ((not held or path.parent.name in SHOWN or found[1] in SHOWN) and _runs(int(found[2]))):
                path.unlink(missing_ok=True)


def _runs(process):
    """Whether there is a process of that number on this machine."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def let_go():
    """Of every run folder that this process holds."""
    while _held:
        _held.popitem()[1].release()


def _holder(folder):
    try:
        found = json.loads((folder / ".holder").read_text())
        return f"process {found['process']} on {found['host']} since {found['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
