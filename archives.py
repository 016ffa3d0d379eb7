"""Archives: extracted beside their place, and moved there when they are whole."""
import os
import shutil
import tarfile
import zipfile

from packing import first_line
from run import UserError, say


def extract(archive, data_dir, record):
    """Extracts `archive` into a folder beside the layout's place, and moves it there when it is whole."""
    if not archive.name.endswith((".zip", ".tar", ".tar.gz")):
        target = data_dir / record.layout / archive.name        # SVHN: the file is the layout
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(archive, target)
        return
    if (data_dir / record.layout).exists():
        raise UserError(f"{data_dir / record.layout} is incomplete: delete it, it is extracted anew from {archive.name}")
    beside = data_dir / f".{record.layout}.{os.getpid()}.part"
    say(f"extracting {archive.name}")
    try:
        _extract_into(archive, beside)
        for nested in list(beside.rglob("[!.]*.tar.gz")):       # Caltech101's zip holds two tars
            _extract_into(nested, beside)
        found = next((path for path in beside.rglob(record.layout) if path.is_dir()), None)
        if found is None:
            raise UserError(f"{archive} does not hold {record.layout}/: delete it and fetch it again")
        os.replace(found, data_dir / record.layout)
    except (tarfile.TarError, zipfile.BadZipFile, OSError, EOFError) as error:
        raise UserError(f"{archive} can't be extracted ({first_line(error)}): delete it and fetch it again") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _extract_into(archive, folder):
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive) as content:
            content.extractall(folder)              # zipfile itself drops "..", and has no links
    else:
        with tarfile.open(archive) as content:
            content.extractall(folder, filter="data")
