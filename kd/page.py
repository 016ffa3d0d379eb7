"""The page of a run: one file that asks for nothing from anywhere.

The gallery's thumbnails are tiles of a few large images: thousands of them take a few megabytes.
"""
import base64
import io
import itertools
import math
from pathlib import Path

import jinja2
import numpy as np
from PIL import Image

from kd.record import shown

GALLERY = 6_000         # images on a page, about
ACROSS, DOWN = 50, 30   # tiles of a sheet
LARGEST_TILE = 48       # pixels


def sampled(record, most=GALLERY):
    """{approach: rows (n,) of its transfer set} that are shown: as many of each class, evenly
    spaced from the best score to the last."""
    each, found = max(1, most // (len(record.selected) * len(record.classes))), {}
    for approach, images in record.selected.items():
        order = np.lexsort((-images.score, images.predicted))
        classes = np.split(order, np.flatnonzero(np.diff(images.predicted[order])) + 1)
        found[approach] = np.concatenate([rows[np.unique(np.linspace(
            0, len(rows) - 1, each).round().astype(int))] for rows in classes])
    return found


def gallery(record):
    """(what the page's script reads, the sheets as WebP)."""
    rows = sampled(record)
    keys = np.unique(np.concatenate([images.key[rows[approach]]
                                     for approach, images in record.selected.items()]))
    where = record.places(keys)
    found = [where[key] for key in keys.tolist()]
    kept = sum(np.isin(keys, images.key).astype(int) << number
               for number, images in enumerate(record.selected.values()))
    data = {
        "count": len(keys), "across": ACROSS, "perSheet": ACROSS * DOWN,
        "approaches": list(record.selected), "classes": record.classes,
        "sources": record.sources, "criteria": list(record.pools), "kept": kept.tolist(),
        "source": (keys >> 40).tolist(), "index": (keys & (1 << 40) - 1).tolist(),
        "label": [int(images.predicted[row]) for images, _, row in found],
        "files": [shown(images.files[row]) for images, _, row in found],
        "scores": [_scores(pool, keys) for pool in record.pools.values()]}
    tiles = [pixels[row] for _, pixels, row in found]
    return data, [_sheet(tiles[start:start + ACROSS * DOWN])
                  for start in range(0, len(tiles), ACROSS * DOWN)]


def _scores(pool, keys):
    ours = np.isin(pool.key, keys) & np.isfinite(pool.score)
    found = dict(zip(pool.key[ours].tolist(), pool.score[ours].tolist(), strict=True))
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


def _pairs(record):
    """[(approach, approach, images that both kept, the first alone, the second alone)]"""
    keys = {name: images.key for name, images in record.selected.items()}
    both = {pair: int(np.isin(*map(keys.get, pair)).sum())
            for pair in itertools.combinations(keys, 2)}
    return [(one, other, count, len(keys[one]) - count, len(keys[other]) - count)
            for (one, other), count in both.items()]


def render(record, drawn, **content):
    """The whole file. drawn: as of figures.save; content: what page.html names."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    template = jinja2.Environment(loader=loader, autoescape=True).get_template("page.html")
    data, sheets = gallery(record) if record.selected else ({"count": 0}, [])
    text = template.render(
        data=data, sheets=sheets, config=record.config, pairs=_pairs(record),
        figures=[(name, said, base64.b64encode(path.read_bytes()).decode())
                 for name, said, path in drawn], **content)
    return text.encode("utf-8", "backslashreplace").decode()
