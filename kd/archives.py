"""Archives whose checksums are known to be right: extracted beside their place, checked, and moved
there when they are whole."""
import os
import shutil
import tarfile

from kd.files import holding, say

# Refuses devices, and names and links that leave the folder; from Python 3.11.4.
SAFE = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}


def extract(archive, place, check):
    """Makes `place`, a folder that `archive` (.zip, .tar or .tar.gz) holds at any depth, unless it
    is there.

    check(folder): raises UserError where something lacks. Caltech101's zip holds a tar of it.
    """
    beside = place.with_name(f".{place.name}.part")
    with holding(place, f"extracting {archive.name}"):
        if place.exists():      # another process made it while we waited
            return
        say(f"extracting {archive.name}")
        shutil.rmtree(beside, ignore_errors=True)       # of an attempt that was killed
        try:
            _unpack(archive, beside)
            for nested in list(beside.rglob(f"{place.name}.tar*")):
                _unpack(nested, beside)
            found = next(beside.rglob(place.name))
            check(found)
            os.sync()       # a name that is there after a power cut must not stand for empty files
            os.replace(found, place)
        finally:
            shutil.rmtree(beside, ignore_errors=True)


def _unpack(archive, folder):
    shutil.unpack_archive(archive, folder, **({} if archive.suffix == ".zip" else SAFE))
