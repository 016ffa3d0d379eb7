"""The page of a run: one file that asks for nothing from anywhere.

The gallery's thumbnails are tiles of a few large images: thousands of them take a few megabytes.
"""
import base64
import io
import math
from pathlib import Path

import jinja2
import numpy as np
from PIL import Image

from kd.record import place_of, shown

GALLERY = 6_000         # images on a page, about
ACROSS, DOWN = 50, 30   # tiles of a sheet
LARGEST_TILE = 48       # pixels


def sampled(record):
    """(n,) keys of the images that are shown: of each approach and class as many, evenly spaced."""
    found, labels = [], range(len(record.classes))
    most = max(1, GALLERY // (len(record.selected) * len(labels)))
    for images in record.selected.values():
        for rows in (np.flatnonzero(images.predicted == label) for label in labels):
            spaced = np.linspace(0, len(rows) - 1, min(most, len(rows))).astype(int)
            found.append(images.key[rows[spaced]])
    return np.unique(np.concatenate(found))


def gallery(record):
    """(what the page's script reads, the sheets as WebP)."""
    keys = sampled(record)
    where, (source, index) = record.places(keys), place_of(keys)
    found = [where[key] for key in keys.tolist()]
    kept = sum(np.isin(keys, images.key).astype(int) << number
               for number, images in enumerate(record.selected.values()))
    data = {
        "count": len(keys), "across": ACROSS, "perSheet": ACROSS * DOWN,
        "approaches": list(record.selected), "classes": record.classes,
        "sources": record.sources, "criteria": record.criteria, "kept": kept.tolist(),
        "source": source.tolist(), "index": index.tolist(),
        "label": [int(images.predicted[row]) for images, _, row in found],
        "files": [shown(images.files[row]) for images, _, row in found],
        "scores": [_scores(record.pool, name, keys) for name in record.criteria]}
    tiles = [pixels[row] for _, pixels, row in found]
    return data, [_sheet(tiles[start:start + ACROSS * DOWN])
                  for start in range(0, len(tiles), ACROSS * DOWN)]


def _scores(pool, criterion, keys):
    ours = np.isin(pool["key"], keys) & np.isfinite(pool[criterion])
    found = dict(zip(pool["key"][ours].tolist(), pool[criterion][ours].tolist(), strict=True))
    return [float(f"{found[key]:.4g}") if key in found else None for key in keys.tolist()]


def _sheet(tiles):
    edge = min(len(tiles[0]), LARGEST_TILE)
    sheet = Image.new("RGB", (ACROSS * edge, math.ceil(len(tiles) / ACROSS) * edge))
    for number, tile in enumerate(tiles):
        image = Image.fromarray(tile).resize((edge, edge), Image.Resampling.BOX)
        sheet.paste(image, (number % ACROSS * edge, number // ACROSS * edge))
    file = io.BytesIO()
    sheet.save(file, "WEBP", quality=72)
    return base64.b64encode(file.getvalue()).decode()


def render(record, drawn, **content):
    """The whole file. drawn: paths of PNGs; content: what page.html names."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    template = jinja2.Environment(loader=loader, autoescape=True).get_template("page.html")
    data, sheets = gallery(record) if record.selected else ({"count": 0}, [])
    figures = [(path.stem, base64.b64encode(path.read_bytes()).decode()) for path in drawn]
    return template.render(data=data, sheets=sheets, config=record.config, figures=figures,
                           **content)
