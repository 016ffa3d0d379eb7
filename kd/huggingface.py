"""Hugging Face data sets as sources: a repository of the Hub, and parquet files as it has them.

The package `datasets` fetches a repository, keeps it, and maps its rows into memory. Of the columns
that of images is read, and no other.
"""
import importlib.util
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass

from kd.files import UserError, first_line, listed, say_once
from kd.readers import Images, opened
from kd.values import HF

USUAL = ("image", "img", "jpg", "png", "webp")      # names of a column of images


@dataclass(frozen=True)
class RowReader(Sequence):
    """Called with i it reads the image of the i-th row; as a sequence it is the name of each."""

    rows: object        # a datasets.Dataset whose images are not decoded
    column: str

    def __len__(self):
        return len(self.rows)

    def __call__(self, i):
        image = self.rows[int(i)][self.column]
        return opened(io.BytesIO(image["bytes"]) if image["bytes"] else image["path"])

    def __getitem__(self, i):
        image = self.rows[int(i)][self.column] or {}        # a row may have none
        return os.path.basename(image.get("path") or f"row {i}")


def open_rows(where, files):
    """The Images of the training split of hf:REPOSITORY, or of parquet files. Raises UserError
    where they can't be had, or no column holds images."""
    if importlib.util.find_spec("datasets") is None:
        raise UserError(f"{where} needs a package: pip install datasets")
    import datasets
    try:
        rows = (datasets.load_dataset("parquet", data_files=files, split="train") if files else
                datasets.load_dataset(where.removeprefix(HF), split="train"))
        named = [name for name, kind in rows.features.items() if isinstance(kind, datasets.Image)
                 or isinstance(kind, dict) and {"bytes", "path"} <= kind.keys()]
        named.sort(key=lambda name: name not in USUAL)
        if len(named) > 1:
            say_once(f"{where}: of the columns of images {listed(named)} the first is read.")
        named += [name for name in USUAL if name in rows.features]
        if not named:
            raise ValueError(f"it has no column of images, but {listed(list(rows.features))}")
        column = named[0]
        rows = rows.select_columns(column).cast_column(column, datasets.Image(decode=False))
    except (OSError, ValueError, LookupError, TypeError, RuntimeError,
            datasets.exceptions.DatasetsError) as error:
        raise UserError(f"{where} could not be loaded ({first_line(error)}).") from None
    reader = RowReader(rows, column)
    return Images(len(rows), reader, rows._fingerprint, files=reader)
