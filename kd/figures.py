"""What a run selected and how its students learned, drawn for print.

The colours are Okabe and Ito's, which the colour-blind tell apart; markers say the same. Each
figure is None where there is nothing to draw. How to read it is in page.html.
"""
import math
import warnings

import matplotlib
import numpy as np
from cycler import cycler

from kd.files import say, write_atomically
from kd.record import accuracy_text, place_of, shown
from kd.thresholds import passes

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

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
    "grid.color": "#dddddd", "axes.axisbelow": True, "savefig.dpi": 150,
    "savefig.bbox": "tight", "figure.constrained_layout.use": True,
    "image.interpolation": "nearest",
    "axes.prop_cycle": cycler(linestyle=["-", "--"]) * (
        cycler(color=COLOURS) + cycler(marker=MARKERS))}


def save(folder, drawn):
    """Writes <name>.png of those that are not None. Returns the paths.

    drawn: an iterator of (name, figure), each made when it is its turn, in our style and not the
    user's."""
    saved = []
    with pyplot.style.context(["default", STYLE]), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for name, figure in drawn:
            if figure is not None:
                saved.append(folder / f"{name}.png")
                write_atomically(saved[-1], figure.savefig)
                pyplot.close(figure)
    if any("missing from" in str(each.message) for each in caught):
        say("No font here has all letters of the class names: figures show boxes in their place.")
    return saved


def of_run(record, results):
    """Yields (name, figure) of a run. results: the content of results.json."""
    yield "accuracy", accuracy(results)
    yield "curves", curves(record)
    yield "counts", counts(record)
    for name in record.criteria:
        if name in record.approaches:
            yield f"scores-{name}", scores(record, name)
        if name in record.selected:
            yield f"strip-{name}", strip(record, name)


def _legend(drawn, axes, **options):
    drawn.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=5, **options)


def _panels(count, across, height):
    rows = math.ceil(count / across)
    drawn, grid = pyplot.subplots(rows, across, figsize=(WIDTH, 0.6 + height * rows), squeeze=False)
    for axes in grid.flat[count:]:
        axes.set_visible(False)
    return drawn, grid.flat[:count]


def _labels(record):
    short = [name if len(name) < 25 else f"{name[:23]}…" for name in record.classes[:MOST]]
    return [name.replace("$", r"\$") for name in short]     # no formula


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
    return drawn


def curves(record):
    """Loss and accuracy on the confidence set, epoch by epoch."""
    learned = {name: student["history"] for name, student in record.students.items()
               if student["history"]}
    if not learned:
        return None
    reached = record.teacher.get("confidence_accuracy")
    drawn, panels = _panels(1 if reached is None else 2, 2, 2.3)
    for name, history in learned.items():
        done = np.linspace(0, 100, len(history) + 1)[1:]
        for axes, figure in zip(panels, ("loss", "confidence_accuracy"), strict=False):
            values = np.array([epoch[figure] for epoch in history], float)
            known = np.isfinite(values)
            axes.plot(done[known], values[known], label=name,
                      markevery=max(1, known.sum() // 8))
            axes.set(xlabel="training done, %")
    panels[0].set(ylabel="loss (supervised: cross-entropy)", yscale="log")
    if reached is not None:
        panels[1].set(ylabel="accuracy on the confidence set")
        panels[1].yaxis.set_major_formatter("{x:.0%}")
        panels[1].axhline(reached, **DASHED, label="teacher")
    _legend(drawn, panels[-1])
    return drawn


def scores(record, criterion):
    """The distribution of a criterion's scores, a panel per class that has any."""
    labels, limits, panels = _labels(record), np.array(record.thresholds[criterion], float), {}
    for label in range(len(labels)):
        groups = {name: columns[criterion][(columns["predicted"] == label)
                                           & np.isfinite(columns[criterion])]
                  for name, columns in record.scores.items() if criterion in columns}
        if any(map(len, groups.values())):
            panels[label] = groups
    if not panels:
        return None
    drawn, grid = _panels(len(panels), min(5, len(panels)), 1.2)
    for axes, (label, groups) in zip(grid, panels.items(), strict=True):
        low, high = np.quantile(np.concatenate(list(groups.values())), [0.005, 0.995])
        edges = np.linspace(low, max(high, low + 0.1 * abs(low) + 1e-9), 31)
        for number, (name, values) in enumerate(groups.items()):
            look = {"label": name, "histtype": "step", "color": f"C{number}"}
            if name == "confidence":
                look = {"label": "confidence set", "histtype": "stepfilled", "color": "#cccccc"}
            axes.hist(np.clip(values, low, high), edges,
                      weights=np.full(len(values), 1 / max(1, len(values))), **look)
        axes.axvline(limits[label], **DASHED, label="threshold")
        axes.set_title(labels[label] + " (no threshold)" * math.isnan(limits[label]), pad=2)
        axes.set_yticks([])
        axes.locator_params(axis="x", nbins=4)
        axes.grid(False)
    _legend(drawn, axes, title=f"{criterion} of the images that the teacher puts into the class")
    return drawn


def counts(record):
    """How many images of each source each class got, a panel per approach."""
    tables, few = {}, len(record.classes) <= MOST
    for approach, images in record.selected.items():
        tables[approach] = np.zeros((len(record.classes), len(record.sources)), int)
        np.add.at(tables[approach], (images.predicted, place_of(images.key)[0]), 1)
    if not tables:
        return None
    most = max(table.max() for table in tables.values())
    drawn, grid = _panels(len(tables), 2, 0.6 + (0.14 * len(record.classes) if few else 3))
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
    drawn.colorbar(image, ax=list(grid), label="images", shrink=0.6)
    return drawn


def ranked(record, criterion):
    """{class: its rows in the pool, four lists of KINDS}, of those of the first classes that have
    any. Only images that some transfer set has can be shown."""
    pool, high, found = record.pool, record.thresholds["keeps_high"][criterion], {}
    score, predicted, key = pool[criterion], pool["predicted"], pool["key"]
    there = np.concatenate([images.key for images in record.selected.values()])
    kept = np.isin(key, record.selected[criterion].key)
    # What passed and found no room was not rejected by its score.
    limits = np.array(record.thresholds[criterion], float)
    lost = np.isin(key, there) & ~kept & ~passes(score, predicted, limits, high)
    for label in range(min(MOST, len(record.classes))):
        members = np.flatnonzero((predicted == label) & (kept | lost) & np.isfinite(score))
        surest = members[np.argsort(score[members] * (-1 if high else 1), kind="stable")]
        ours, others = surest[kept[surest]], surest[lost[surest]]
        if len(surest):
            found[label] = [ours[:STRIP], ours[STRIP:][-STRIP:],
                            others[:STRIP], others[STRIP:][-STRIP:]]
    return found


def strip(record, criterion):
    """Images that a criterion kept and rejected, a row per class that has any."""
    key, score, groups = record.pool["key"], record.pool[criterion], ranked(record, criterion)
    if not groups:
        return None
    where = record.places(key[np.concatenate([row for kinds in groups.values() for row in kinds])])
    drawn, (axes,) = _panels(1, 1, WIDTH / 18 * 1.3 * len(groups))
    for number, kind in enumerate(KINDS):
        axes.text(4.5 * number, -0.5, kind, fontsize=9)
    for number, (label, kinds) in enumerate(groups.items()):
        y = 1.3 * number
        axes.text(-0.1, y + 0.5, _labels(record)[label], ha="right", va="center")
        for x, row in ((4.5 * kind + place, row) for kind, rows in enumerate(kinds)
                       for place, row in enumerate(rows)):
            _, pixels, there = where[key[row]]
            source = record.sources[place_of(key[row])[0]]
            axes.imshow(pixels[there], extent=(x, x + 0.94, y + 0.94, y))
            axes.text(x, y - 0.04, f"{source[:10]}\n{score[row]:.3g}", fontsize=4, linespacing=1)
    axes.set(xlim=(-0.1, 18), ylim=(1.3 * len(groups), -0.5), aspect="equal")
    axes.set_axis_off()
    return drawn
