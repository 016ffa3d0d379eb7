"""Archives: extracted beside their place, checked, and moved there when they are whole.

An archive may come from anywhere, so nothing in it is trusted: names that leave the folder, links that do,
devices, and more content than the data set can have are refused, and the archive is named.
"""
import errno
import gzip
import os
import posixpath
import shutil
import stat
import tarfile
import zipfile

from files import UserError, first_line, holding
from progress import Progress

SUFFIXES = (".zip", ".tar", ".tar.gz")
LONGEST_HEADER = 16_384     # bytes: room for any name


class Refused(Exception):
    """What is wrong with an archive."""


class _Budget:
    """How much may still be extracted. What a bomb unpacks to is unbounded, what a data set unpacks to is known."""

    def __init__(self, size, files):
        self.size, self.files = size, files

    def take(self, size, files=0):
        self.size -= size
        self.files -= files
        if self.size < 0 or self.files < 0:
            raise Refused("it unpacks to several times what the data set holds")


class _Counted:
    """A stream whose bytes count against a budget, headers and all."""

    def __init__(self, stream, budget):
        self.stream, self.budget = stream, budget

    def read(self, size):
        content = self.stream.read(size)
        self.budget.take(len(content))
        return content


class Member(tarfile.TarInfo):
    """A member of a tar. Headers that describe the next member are read into memory whole, and searched."""

    @classmethod
    def frombuf(cls, buf, encoding, errors):
        member = super().frombuf(buf, encoding, errors)
        if member.type in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK) \
                and member.size > LONGEST_HEADER:
            raise Refused(f"it has a header of {member.size:,} bytes")
        return member


def extract(archive, place, size, files, check):
    """Makes `place`, a folder that `archive` (.zip, .tar or .tar.gz) holds at any depth, unless it is there.

    size, files: how many bytes and files there are at the most. check(folder, named): raises UserError,
    about `named`, where something lacks. Archives inside the archive are extracted too (Caltech101's zip holds two tars).
    """
    beside = _beside(place)
    with holding(place, f"extracting {archive.name}"):
        if place.exists():      # another process has made it while we waited
            return check(place, place)
        shutil.rmtree(beside, ignore_errors=True)       # of an attempt that was killed
        budget = _Budget(size, files)
        try:
            beside.mkdir(parents=True)
            _extract_into(beside, archive, budget)
            for nested in sorted(path for path in beside.rglob("[!.]*") if path.name.endswith((".tar", ".tar.gz")) and path.is_file()):
                if nested.stat().st_size:
                    _extract_into(beside, nested, budget)
            found = next((path for path in sorted(beside.rglob(place.name)) if path.is_dir()), None)
            if found is None:
                raise UserError(f"{archive} does not hold {place.name}/: delete it and fetch it again")
            check(found, archive)
            os.sync()       # a name that is there after a power cut must not stand for empty files
            os.replace(found, place)
        except Refused as error:
            raise UserError(f"{archive} is refused: {error}; delete it and fetch it again") from None
        except (UserError, PermissionError):
            raise
        except Exception as error:      # whatever a broken archive makes its reader raise
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(f"the disk under {place.parent} is full: make room and run this again, {archive.name} is extracted anew") from None
            raise UserError(f"{archive} can't be extracted ({first_line(error)}): delete it and fetch it again") from None
        finally:
            shutil.rmtree(beside, ignore_errors=True)


def remove_left_over(place):
    """Deletes what is beside `place`, which exists, from an attempt that was killed after it had made it."""
    shutil.rmtree(_beside(place), ignore_errors=True)


def _beside(place):
    return place.with_name(f".{place.name}.part")


def _extract_into(folder, archive, budget):
    progress = Progress(f"extracting {archive.name}", archive.stat().st_size, "B")
    try:
        (_extract_zip if archive.suffix == ".zip" else _extract_tar)(folder, archive, budget, progress)
    finally:
        progress.close()


def _extract_zip(folder, archive, budget, progress):
    with zipfile.ZipFile(archive) as content:
        for member in content.infolist():
            _require_inside(member.filename)
            kind = stat.S_IFMT(member.external_attr >> 16)      # 0 where it was made on Windows
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise Refused(f"{member.filename!r} is a link or a device")
            budget.take(member.file_size, files=1)              # a member never yields more than it declares
            content.extract(member, folder)
            progress.update(member.compress_size)


def _extract_tar(folder, archive, budget, progress):
    with open(archive, "rb") as file:
        stream = gzip.GzipFile(fileobj=file) if archive.name.endswith(".gz") else file
        # Read as a stream, front to back: no member is larger than what the budget has let through.
        counted = _Counted(stream, budget)
        with tarfile.open(fileobj=counted, mode="r|", tarinfo=Member) as content:
            for member in content:
                _require_inside(member.name)
                if member.isdev():
                    raise Refused(f"{member.name!r} is a device")
                if member.issym() or member.islnk():
                    # A hard link counts from the top of the archive, a symbolic one from where it lies.
                    start = posixpath.dirname(member.name) if member.issym() else ""
                    _require_inside(posixpath.join(start, member.linkname), f"{member.name!r}, a link to ")
                budget.take(member.size if member.issparse() else 0, files=1)      # holes aren't in the stream
                if member.islnk():
                    _link(folder / member.linkname, folder / member.name)
                elif not member.issym():        # with no symbolic link in the tree, nothing can be written through one
                    content.extract(member, folder, filter="data")
                progress.update(file.tell() - progress.done)
        while counted.read(1 << 20):    # what follows the last member, up to gzip's checksum
            pass


def _link(first, again):
    if not first.is_file():
        raise Refused(f"{again.name!r} is a link to {first.name!r}, which is not there")
    again.parent.mkdir(parents=True, exist_ok=True)
    again.unlink(missing_ok=True)
    os.link(first, again)


def _require_inside(name, what=""):
    path = posixpath.normpath(name.replace("\\", "/"))
    if path.startswith(("/", "../")) or path == ".." or path[1:2] == ":":
        raise Refused(f"{what}{name!r} leads out of its folder")
