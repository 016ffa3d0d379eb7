"""Archives: extracted beside their place, checked, and moved there when they are whole.

Nothing in one is trusted: names that leave the folder, links, devices, and more content than the
data set can have are refused, and the archive is named.
"""
import gzip
import lzma
import os
import posixpath
import shutil
import tarfile
import time
import zipfile
import zlib

from kd.files import UserError, first_line, holding, say

# What a damaged or hostile archive makes its readers raise.
BROKEN = (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, lzma.LZMAError,
          EOFError, ValueError, RuntimeError, LookupError, TypeError, OverflowError)


class _Budget:
    """How many bytes may still be extracted. As a stream: what is read from it counts."""

    def __init__(self, size):
        self.size, self.stream = size, None

    def take(self, size):
        self.size -= size
        if self.size < 0:
            raise ValueError("it unpacks to several times what the data set holds")

    def read(self, size):
        content = self.stream.read(size)
        self.take(len(content))
        return content


def extract(archive, place, size, check):
    """Makes `place`, a folder that `archive` (.zip, .tar or .tar.gz) holds at any depth, unless it
    is there.

    size: how many bytes there are at the most. check(folder): raises UserError where something
    lacks. Archives in it are extracted too: Caltech101's zip holds two tars.
    """
    beside = place.with_name(f".{place.name}.part")
    with holding(place, f"extracting {archive.name}"):
        if place.exists():      # another process made it while we waited
            return
        say(f"extracting {archive.name}")
        shutil.rmtree(beside, ignore_errors=True)       # of an attempt that was killed
        try:
            beside.mkdir(parents=True)
            budget = _Budget(size)
            _extract(archive, beside, budget)
            for nested in sorted(beside.rglob("[!.]*.tar*")):
                if nested.is_file() and nested.stat().st_size:
                    _extract(nested, beside, budget)
            found = [path for path in sorted(beside.rglob(place.name)) if path.is_dir()]
            if not found:
                raise ValueError(f"it does not hold {place.name}/")
            check(found[0])
            os.sync()       # a name that is there after a power cut must not stand for empty files
            os.replace(found[0], place)
        except BROKEN as error:
            raise UserError(f"{archive} can't be used ({first_line(error)}). Delete it, and it is "
                            "fetched again.") from None
        finally:
            shutil.rmtree(beside, ignore_errors=True)


def _extract(archive, folder, budget):
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive) as content:
            for member in content.infolist():
                _require_inside(member.filename)
                budget.take(member.file_size)       # a member never yields more than it declares
                # Dated as there: what is extracted once more must not look like other files.
                date = time.mktime((*member.date_time, 0, 0, -1))
                os.utime(content.extract(member, folder), (date, date))
        return
    opening = gzip.open if archive.name.endswith("gz") else open
    with opening(archive, "rb") as budget.stream:
        with tarfile.open(fileobj=budget, mode="r|") as content:
            content.extraction_filter = getattr(tarfile, "data_filter", None)   # from Python 3.11.4
            for member in content:
                _require_inside(member.name)
                if not (member.isreg() or member.isdir()) or member.issparse():
                    raise ValueError(f"{member.name!r} is a link, a device or a file with holes")
                content.extract(member, folder, set_attrs=False)
                os.utime(folder / member.name, (member.mtime, member.mtime))


def _require_inside(name):
    path = posixpath.normpath(name.replace("\\", "/"))
    if path.startswith(("/", "../")) or path == ".." or path[1:2] == ":":
        raise ValueError(f"{name!r} leads out of its folder")
