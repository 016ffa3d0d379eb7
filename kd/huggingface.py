"""Hugging Face data sets as sources: a repository of the Hub, and parquet files as it has them.

The package `datasets` fetches a repository, keeps it, and maps its rows into memory. Of the columns
that of images is read, and no other.
"""
import functools
import importlib.util
import io

from kd.files import UserError, first_line, listed, say_once
from kd.readers import Images, opened, shard_paths
from kd.values import HF

USUAL = ("image", "img", "jpg", "png", "webp")      # names of a column of images


def _read_row(rows, column, i):
    """rows: a datasets.Dataset whose images are not decoded."""
    image = rows[i][column]
    return opened(io.BytesIO(image["bytes"]) if image["bytes"] else image["path"])


def open_rows(name, where):
    """The Images of the training split of hf:REPOSITORY, or of FOLDER/*.parquet. Raises UserError
    where they can't be had, or no column holds images."""
    if importlib.util.find_spec("datasets") is None:
        raise UserError(f"{where} needs a package: pip install datasets")
    import datasets
    try:
        if where.startswith(HF):
            rows = datasets.load_dataset(where.removeprefix(HF), split="train")
        else:
            files = shard_paths(name, where)
            rows = datasets.load_dataset("parquet", data_files=files, split="train")
        named = [each for each, kind in rows.features.items() if isinstance(kind, datasets.Image)]
        named = named or [each for each in USUAL if each in rows.features]
        named.sort(key=lambda each: each not in USUAL)
        if len(named) > 1:
            say_once(f"{where}: of the columns of images {listed(named)} the first is read.")
        if not named:
            raise ValueError(f"it has no column of images, but {listed(list(rows.features))}")
        column = named[0]
        rows = rows.select_columns(column).cast_column(column, datasets.Image(decode=False))
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"{where} could not be loaded ({first_line(error)}).") from None
    return Images(len(rows), functools.partial(_read_row, rows, column), rows._fingerprint)
