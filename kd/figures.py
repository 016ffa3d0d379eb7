"""What a run selected and how its students learned, drawn for print.

The colours are Okabe and Ito's, which the colour-blind tell apart; markers say the same. Each
function returns a Figure, or None where there is nothing to draw. How to read it is in page.html.
"""
import math
import warnings
from collections import namedtuple

import matplotlib
import numpy as np
from cycler import cycler

from kd.files import listed, say, write_atomically
from kd.record import accuracy_text, shown
from kd.thresholds import passes

matplotlib.use("Agg")
from matplotlib import pyplot, ticker  # noqa: E402

COLOURS = "#0072B2 #E69F00 #009E73 #D55E00 #CC79A7 #56B4E9 #000000 #8C8C00".split()
MARKERS = "osD^vP*X"
DASHED = {"color": "#444444", "linestyle": "--", "marker": ""}
MOST = 20               # classes with a panel, with names in the heat map, with images
STRIP = 4               # images of each kind
KINDS = ("best kept", "marginal kept", "narrowly rejected", "clearly rejected")
WIDTH = 7.2             # inches: a page of text
STYLE = {
    "font.family": ["DejaVu Sans", "Noto Sans CJK JP", "Microsoft YaHei", "Arial Unicode MS"],
    "font.size": 7.5, "axes.titlesize": 8, "legend.frameon": False, "lines.linewidth": 1,
    "lines.markersize": 4, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.color": "#dddddd", "axes.axisbelow": True, "text.parse_math": False, "savefig.dpi": 150,
    "savefig.bbox": "tight", "figure.constrained_layout.use": True,
    "image.interpolation": "nearest",
    "axes.prop_cycle": cycler(linestyle=["-", "--"]) * (
        cycler(color=COLOURS) + cycler(marker=MARKERS))}

# name: of its file; text: what it shows, for who can't see it; drawn: matplotlib's.
Figure = namedtuple("Figure", "name text drawn")


def save(folder, drawn):
    """Writes <name>.png of those that are not None. Returns [(name, text, path)].

    drawn: an iterator of figures, each made when it is its turn, in our style and not the user's.
    """
    saved = []
    with pyplot.style.context(["default", STYLE]), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for figure in filter(None, drawn):
            path = folder / f"{figure.name}.png"
            write_atomically(path, figure.drawn.savefig)
            pyplot.close(figure.drawn)
            saved.append((figure.name, figure.text, path))
    if any("missing from" in str(each.message) for each in caught):
        say("No font here has all letters of the class names: figures show boxes in their place.")
    return saved


def of_run(record, results):
    """Every Figure of a run, None among them. results: the content of results.json."""
    ours = [name for name in record.pools if name in record.selected]
    yield from (accuracy(results), curves(record), counts(record))
    yield from (scores(record, name) for name in ours or list(record.pools)[:1])
    yield from (strip(record, name) for name in ours)


def _legend(drawn, axes, **options):
    drawn.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=5, **options)


def _panels(count, across, height):
    rows = math.ceil(count / across)
    drawn, grid = pyplot.subplots(rows, across, figsize=(WIDTH, 0.6 + height * rows), squeeze=False)
    for axes in grid.flat[count:]:
        axes.set_visible(False)
    return drawn, grid.flat[:count]


def _labels(record):
    return [name if len(name) < 25 else f"{name[:23]}…" for name in record.classes[:MOST]]


def accuracy(results):
    """A row for each approach. results: the content of results.json."""
    rows = [row for row in results["rows"] if row["accuracy"] is not None]
    if not rows:
        return None
    drawn, (axes,) = _panels(1, 1, 0.5 + 0.3 * len(rows))
    for place, row in enumerate(rows):
        value, spread = 100 * row["accuracy"], 100 * (row["accuracy_std"] or 0)
        axes.errorbar(value, place, xerr=spread or None, capsize=3, color="C0", marker="o")
        axes.text(value, place - 0.2, accuracy_text(row), ha="center", fontsize=6.5)
    teacher = results["teacher"]["accuracy"]
    if teacher is not None:
        axes.axvline(100 * teacher, **DASHED, label=f"teacher, {teacher:.2%}")
        _legend(drawn, axes)
    axes.set_yticks(range(len(rows)), [row["approach"] for row in rows])
    axes.set(ylim=(len(rows) - 0.5, -0.8), xlabel="accuracy on the test split, %")
    axes.margins(x=0.08)
    said = ", ".join(f"{row['approach']} {accuracy_text(row)}" for row in rows)
    return Figure("accuracy", f"Accuracy in %: {said}.", drawn)


def curves(record):
    """Loss and accuracy on the confidence set, epoch by epoch."""
    learned = {name: student["history"] for name, student in record.students.items()
               if student["history"]}
    if not learned:
        return None
    shown = [("loss", 1, "loss (supervised: cross-entropy)")]
    if any(epoch["confidence_accuracy"] is not None for each in learned.values() for epoch in each):
        shown.append(("confidence_accuracy", 100, "accuracy on the confidence set, %"))
    drawn, panels = _panels(len(shown), 2, 2.3)
    for axes, (figure, scale, label) in zip(panels, shown, strict=True):
        for approach, history in learned.items():
            done, known = np.linspace(0, 100, len(history) + 1)[1:], [
                number for number, epoch in enumerate(history) if epoch[figure] is not None]
            axes.plot(done[known], [scale * history[number][figure] for number in known],
                      label=approach, markevery=max(1, len(known) // 8))
        axes.set(xlabel="training done, %", ylabel=label)
    panels[0].set_yscale("log")
    panels[0].yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 3, 5, 7)))
    panels[0].yaxis.set_major_formatter("{x:g}")
    panels[0].yaxis.set_minor_formatter(ticker.NullFormatter())
    if record.teacher.get("confidence_accuracy") is not None:
        axes.axhline(100 * record.teacher["confidence_accuracy"], **DASHED, label="teacher")
    _legend(drawn, axes)
    said = ", ".join(f"{name} {history[-1]['loss']:.3g}" for name, history in learned.items())
    return Figure("curves", f"Loss at the end: {said}.", drawn)


def scores(record, criterion):
    """The distribution of a criterion's scores, a panel per class that has any."""
    labels, limits, panels = _labels(record), record.thresholds[criterion], {}
    for label in range(len(labels)):
        groups = {name: columns[criterion][(columns["predicted"] == label)
                                           & np.isfinite(columns[criterion])]
                  for name, columns in record.scores.items() if criterion in columns}
        panels |= {label: groups} if any(map(len, groups.values())) else {}
    if not panels:
        return None
    drawn, grid = _panels(len(panels), min(5, len(panels)), 1.2)
    for axes, (label, groups) in zip(grid, panels.items(), strict=True):
        low, high = np.quantile(np.concatenate(list(groups.values())), [0.005, 0.995])
        edges = np.linspace(low, max(high, low + 0.1 * abs(low) + 1e-9), 31)
        for number, (name, values) in enumerate(groups.items()):
            real = name == "confidence"
            axes.hist(np.clip(values, low, high), edges, label="confidence set" if real else name,
                      weights=np.full(len(values), 1 / max(1, len(values))),
                      histtype="stepfilled" if real else "step",
                      color="#cccccc" if real else f"C{number}")
        none = limits[label] is None
        axes.axvline(math.nan if none else limits[label], **DASHED, label="threshold")
        axes.set_title(labels[label] + " (no threshold)" * none, pad=2)
        axes.set_yticks([])
        axes.locator_params(axis="x", nbins=4)
        axes.grid(False)
    _legend(drawn, axes, title=f"{criterion} of the images that the teacher puts into the class")
    said = f"Distributions of {criterion} of {listed(list(groups))}."
    return Figure(f"scores-{criterion}", said, drawn)


def counts(record):
    """How many images of each source each class got, a panel per approach."""
    tables, said, few = {}, [], len(record.classes) <= MOST
    for approach, images in record.selected.items():
        tables[approach] = np.zeros((len(record.classes), len(record.sources)), int)
        np.add.at(tables[approach], (images.predicted, images.source), 1)
    if not tables:
        return None
    most = max(table.max() for table in tables.values())
    across = min(len(tables), max(2, 8 // len(record.sources)))
    drawn, grid = _panels(len(tables), across, 0.6 + (0.14 * len(record.classes) if few else 3))
    for axes, (approach, table) in zip(grid, tables.items(), strict=True):
        image = axes.imshow(table, aspect="auto", cmap="cividis", vmin=0, vmax=most)
        short = {shown(name) for name in record.summaries[approach]["shortfall"]}
        names = ["▸ " * (name in short) + label
                 for name, label in zip(record.classes, _labels(record), strict=False)]
        axes.set_yticks(range(len(names) * few), names * few)
        for (y, x), count in np.ndenumerate(table) if few else ():
            axes.text(x, y, f"{count:,}", ha="center", va="center", fontsize=5.5,
                      color="black" if count > most / 2 else "white")
        axes.set_xticks(range(len(record.sources)), record.sources, rotation=50, ha="right")
        axes.set_title(f"{approach}, {table.sum():,}")
        axes.grid(False)
        said.append(f"{approach}: " + ", ".join(f"{name} {count:,}" for name, count in zip(
            record.sources, table.sum(0), strict=True)))
    drawn.colorbar(image, ax=list(grid), label="images", shrink=0.6, format="{x:,.0f}",
                   ticks=ticker.MaxNLocator(4, integer=True))
    return Figure("counts", f"Images by source. {'; '.join(said)}.", drawn)


def ranked(record, criterion):
    """{class: its rows in the criterion's pool, four lists of KINDS}, of the first classes. Only
    images that some transfer set has can be shown."""
    pool, found = record.pools[criterion], {}
    high = record.thresholds["keeps_high"][criterion]
    there = np.concatenate([images.key for images in record.selected.values()])
    kept = np.isin(pool.key, record.selected[criterion].key)
    # What passed and found no room was not rejected by its score.
    lost = np.isin(pool.key, there) & ~kept & ~passes(
        pool.score, pool.predicted, np.array(record.thresholds[criterion], float), high)
    for label in range(min(MOST, len(record.classes))):
        members = np.flatnonzero((pool.predicted == label) & np.isfinite(pool.score))
        surest = np.argsort(pool.score[members] * (-1 if high else 1), kind="stable")
        ours, others = (members[surest][true[members[surest]]] for true in (kept, lost))
        found[label] = [ours[:STRIP], ours[STRIP:][-STRIP:],
                        others[:STRIP], others[STRIP:][-STRIP:]]
    return found


def strip(record, criterion):
    """Images that a criterion kept and rejected, a row per class that has any."""
    if criterion not in record.thresholds.get("keeps_high", ()):    # a run of an older version
        return None
    labels, pool = _labels(record), record.pools[criterion]
    keys = pool.key
    groups = [(labels[label], kinds) for label, kinds in ranked(record, criterion).items()
              if any(map(len, kinds))]
    if not groups:
        return None
    where = record.places(keys[np.concatenate([row for _, kinds in groups for row in kinds])])
    drawn, (axes,) = _panels(1, 1, WIDTH / 18 * 1.3 * len(groups))
    for number, kind in enumerate(KINDS):
        axes.text(4.5 * number, -0.5, kind, fontsize=9)
    for number, (name, kinds) in enumerate(groups):
        y = 1.3 * number
        axes.text(-0.1, y + 0.5, name, ha="right", va="center")
        for x, row in ((4.5 * kind + place, row) for kind, rows in enumerate(kinds)
                       for place, row in enumerate(rows)):
            _, pixels, there = where[keys[row]]
            axes.imshow(pixels[there], extent=(x, x + 0.94, y + 0.94, y))
            axes.text(x, y - 0.04, f"{record.sources[pool.source[row]][:10]}\n"
                      f"{pool.score[row]:.3g}", fontsize=4, linespacing=1)
    axes.set(xlim=(-0.1, 18), ylim=(1.3 * len(groups), -0.5), aspect="equal")
    axes.set_axis_off()
    said = f"Images of each class by {criterion}: {listed(KINDS)}."
    return Figure(f"strip-{criterion}", said, drawn)
