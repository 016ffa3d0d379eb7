"""The page of an experiment, or of several: one file that asks for nothing from anywhere.

Tables and figures, the settings and the commands to repeat them, and a gallery of what was selected. Thumbnails are tiles of a
few large images, so that thousands of them take a few megabytes and are drawn only where they are seen.
"""
import base64
import html
import io
import itertools
import math
import shlex
import string
from pathlib import Path

import numpy as np
from PIL import Image

from record import dump

TEMPLATE = Path(__file__).with_name("page.html")
GALLERY = 6_000         # images on a page
ACROSS, DOWN = 50, 30   # tiles of a sheet
LARGEST_TILE = 48       # pixels
LOSSLESS = 300_000      # bytes of a figure
LARGEST_EDGE = 16_000   # pixels: WebP has no more
QUALITY = 72            # of the sheets, WebP


def escaped(text):
    return html.escape(str(text).encode("utf-8", "backslashreplace").decode())


def table(header, rows, words=()):
    """An HTML table. words: columns that hold words."""
    def cells(kind, values):
        return "".join(f"<{kind}{' class=words' if number in words else ''}>{escaped(value)}</{kind}>" for number, value in enumerate(values))
    return (f"<div class=wide tabindex=0 role=region aria-label='{escaped(header[0])}'><table><thead><tr>{cells('th', header)}</tr></thead><tbody>"
            + "".join(f"<tr>{cells('td', row)}</tr>" for row in rows) + "</tbody></table></div>")


def png_of(figure):
    """A figure as bytes."""
    buffer = io.BytesIO()
    figure.drawn.savefig(buffer, format="png", bbox_inches="tight", pad_inches=0.06)
    return buffer.getvalue()


def _as_webp(png):
    """Without loss where that is small enough; figures with photographs in them are not."""
    image, buffer = Image.open(io.BytesIO(png)).convert("RGB"), io.BytesIO()
    image.thumbnail((LARGEST_EDGE, LARGEST_EDGE))
    image.save(buffer, "WEBP", lossless=True, method=4)
    if buffer.tell() > LOSSLESS:
        buffer = io.BytesIO()
        image.save(buffer, "WEBP", quality=88, method=4)
    return buffer.getvalue(), image.size


def figure_html(figure, png):
    webp, (width, height) = _as_webp(png)
    source = base64.b64encode(webp).decode()
    return (f"<figure id='{escaped(figure.name)}'><h2>{escaped(figure.title)}</h2><img alt='{escaped(figure.text)}' width={width // 2 * 4 // 3} height={height // 2 * 4 // 3} "
            f"src='data:image/webp;base64,{source}'><figcaption><b>How to read it:</b> {escaped(figure.reading)}</figcaption></figure>")


# --------------------------------------------------------------------------------------------------
# The gallery
# --------------------------------------------------------------------------------------------------

def sampled(record, approaches, most=GALLERY):
    """{approach: rows (n,) of its transfer set} that are shown: of each class the same number, evenly spaced from the best to the last."""
    found, each = {}, max(1, most // max(1, len(approaches)))
    for approach in approaches:
        selected = record.selected(approach)
        order = np.lexsort((np.arange(len(selected)), -selected.score, selected.predicted))
        members = np.split(order, np.flatnonzero(np.diff(selected.predicted[order])) + 1) if len(order) else []
        room, rows = each, []
        for number, of_class in enumerate(sorted(members, key=len)):
            share = min(len(of_class), max(1, room // (len(members) - number)))
            rows.append(of_class[np.linspace(0, len(of_class) - 1, share).round().astype(int)] if share > 1 else of_class[:share])
            room -= share
        found[approach] = np.sort(np.concatenate(rows)) if rows else np.empty(0, np.int64)
    return found


def gallery_of(record, most=GALLERY):
    """(what the page's script reads, the sheets as WebP bytes, {(approach, approach): (both, the first alone, the second alone)}); None where nothing has been selected."""
    approaches = [approach for approach, summary in record.summaries.items() if summary["size"]]
    if not approaches or record.classes is None:
        return None
    # An image is one, whichever approaches kept it: 40 bits for its number in a source.
    keys = {approach: record.selected(approach).source.astype(np.int64) << 40 | record.selected(approach).index for approach in approaches}
    shown, where = {}, {}
    for approach, rows in sampled(record, approaches, most).items():
        for row in rows.tolist():
            where.setdefault(int(keys[approach][row]), (approach, row))
    order = sorted(where)
    if not order:
        return None
    kept = sum(np.isin(order, keys[approach]).astype(np.int64) << number for number, approach in enumerate(approaches))
    pixels = {approach: record.pixels(approach) for approach in approaches}
    size = next(iter(pixels.values())).shape[1]
    tile = min(size, LARGEST_TILE)
    sheets, per_sheet = [], ACROSS * DOWN
    for start in range(0, len(order), per_sheet):
        members = order[start:start + per_sheet]
        sheet = np.zeros((math.ceil(len(members) / ACROSS) * tile, ACROSS * tile, 3), np.uint8)
        for number, key in enumerate(members):
            approach, row = where[key]
            image = pixels[approach][row]
            if tile != size:
                image = np.asarray(Image.fromarray(image).resize((tile, tile), Image.Resampling.BOX))
            y, x = divmod(number, ACROSS)
            sheet[y * tile:(y + 1) * tile, x * tile:(x + 1) * tile] = image
        buffer = io.BytesIO()
        Image.fromarray(sheet).save(buffer, "WEBP", quality=QUALITY, method=4)
        sheets.append(buffer.getvalue())
    selected = [(record.selected(where[key][0]), where[key][1]) for key in order]
    criteria = [name for name in (record.thresholds or {}) if any(name in columns for source, columns in record.scores.items() if source != "confidence")]
    shown = {
        "count": len(order), "across": ACROSS, "perSheet": per_sheet, "approaches": approaches, "classes": record.classes, "sources": record.sources, "criteria": criteria,
        "kept": kept.tolist(), "label": [int(each.predicted[row]) for each, row in selected], "source": [int(each.source[row]) for each, row in selected],
        "index": [int(each.index[row]) for each, row in selected], "files": [each.files[row].encode("utf-8", "backslashreplace").decode() for each, row in selected],
        "scores": _scores_of(record, criteria, order),
    }
    first = next((approach for approach in ("mms", *approaches) if approach in approaches))
    shown |= {"start": approaches.index(first), "startSort": criteria.index(first) if first in criteria else 0 if criteria else -1}
    pairs = {}
    for one, other in itertools.combinations(approaches, 2):
        both = len(np.intersect1d(keys[one], keys[other]))
        pairs[one, other] = (both, len(np.unique(keys[one])) - both, len(np.unique(keys[other])) - both)
    return shown, sheets, pairs


def _scores_of(record, criteria, keys):
    """For each criterion the scores of these images, in four digits; None where one has none."""
    keys = np.array(keys)
    source, index, found = keys >> 40, keys & ((1 << 40) - 1), {name: np.full(len(keys), np.nan) for name in criteria}
    for number, name in enumerate(record.sources):
        columns, ours = record.scores.get(name), np.flatnonzero(source == number)
        if columns is None or not len(ours):
            continue
        places = np.searchsorted(record.index_of(name), index[ours])
        for criterion in criteria:
            if criterion in columns:
                found[criterion][ours] = columns[criterion][places]
    return [[float(f"{value:.4g}") if np.isfinite(value) else None for value in found[name].tolist()] for name in criteria]


def gallery_html(shown, pairs):
    select = ("<label>{}<select id={}>{}</select></label>").format
    everything = "<option value=''>any</option>"
    controls = (select("kept by", "approach", everything) + select("but not by", "without", "<option value=''>-</option>") + select("class", "label", everything)
                + select("source", "source", everything) + select("sorted by", "sort", "<option value=''>source</option>")
                + select("order", "falling", "<option value=1>largest first</option><option value=0>smallest first</option>"))
    rows = "".join(
        f"<tr><td>{escaped(one)}, {escaped(other)}</td><td>{both:,}</td>"
        + "".join(f"<td>{number:,} <button data-approach={shown['approaches'].index(a)} data-without={shown['approaches'].index(b)} aria-label='Show what {escaped(a)} kept and {escaped(b)} did not'>show</button></td>"
                  for number, a, b in ((first, one, other), (second, other, one))) + "</tr>" for (one, other), (both, first, second) in pairs.items())
    compared = ("<h2 id=pairs>What only one of two kept</h2><div class=wide tabindex=0 role=region aria-label='What only one of two kept'><table><thead><tr><th>two approaches</th><th>images of both</th><th>the first alone</th>"
                f"<th>the second alone</th></tr></thead><tbody>{rows}</tbody></table></div>") if pairs else ""
    return (compared + "<section id=gallery aria-label=Gallery><h2>Selected images</h2><p>Of each approach and class as many as there is room for here, evenly spaced from the best score to the last. "
            "Arrow keys, Page Up, Page Down, Home and End move in the grid.</p>"
            f"<div class=bar>{controls}</div><p id=count role=status></p><div id=grid tabindex=0 role=listbox aria-label='Selected images'><div id=rows role=presentation></div></div>"
            "<div id=about aria-live=polite><div class=large></div><dl></dl></div></section>")


# --------------------------------------------------------------------------------------------------
# The page
# --------------------------------------------------------------------------------------------------

def settings_html(records):
    """Of each run folder its settings and the commands that repeat it."""
    parts = []
    for record, arguments in records:
        commands = [f"python compile.py --config {shlex.quote(str(record.folder / 'config.json'))} --run-dir runs/again"]
        if not isinstance(record.config.get("classes"), list):      # names of classes come from a file
            commands.append("python compile.py " + " ".join(map(shlex.quote, arguments)))
        facts = "".join(f"<dt>{escaped(name)}</dt><dd>{escaped(_said(value))}</dd>" for name, value in record.config.items())
        parts.append(f"<h3>{escaped(record.folder)}</h3><pre tabindex=0>{escaped(chr(10).join(commands))}</pre>"
                     f"<details><summary>All settings, versions and the machine</summary><dl>{facts}</dl></details>")
    return "<section id=settings><h2>Settings, and the commands that repeat this</h2>" + "".join(parts) + "</section>"


def _said(value):
    return ", ".join(f"{name} {each}" for name, each in value.items()) if isinstance(value, dict) else ", ".join(map(str, value)) if isinstance(value, list) else "-" if value is None else value


def page(title, summary, body, footer, gallery=None):
    """The whole file, as text. gallery: as from `gallery_of`."""
    shown, sheets, _ = gallery or ({"count": 0}, [], {})
    styles = ":root {" + ";".join(f"--sheet{number}: url(data:image/webp;base64,{base64.b64encode(sheet).decode()})" for number, sheet in enumerate(sheets)) + "}" if sheets else ""
    return string.Template(TEMPLATE.read_text()).substitute(title=escaped(title), summary=escaped(summary), body=body, footer=escaped(footer), sheets=styles, data=dump(shown))
