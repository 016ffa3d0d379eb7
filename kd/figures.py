"""What a run selected and how its students learned, drawn for print.

The colours are Okabe and Ito's, which the colour-blind tell apart; markers say the same. Each
function returns a Figure, or None where there is nothing to draw. How to read it is in page.html.
"""
import contextlib
import io
import math
import warnings
from collections import namedtuple

import matplotlib
import numpy as np
from cycler import cycler

from kd.files import listed, say
from kd.record import shown

matplotlib.use("Agg")
from matplotlib import font_manager, pyplot, ticker  # noqa: E402

COLOURS = "#0072B2 #E69F00 #009E73 #D55E00 #CC79A7 #56B4E9 #000000 #8C8C00".split()
MARKERS = "osD^vP*X"
DASHED = {"color": "#444444", "linestyle": "--", "marker": ""}
MOST_PANELS, MOST_ROWS = 20, 100        # classes with a panel or images, classes in a heat map
NUMBERED = 25                           # classes up to which a heat map holds numbers
STRIP = 4                               # images of each kind
KINDS = ("best kept", "marginal kept", "narrowly rejected", "clearly rejected")
WIDTH = 7.2                             # inches: a page of text
STYLE = {
    "font.size": 7.5, "axes.titlesize": 8, "legend.frameon": False, "lines.linewidth": 1,
    "lines.markersize": 4, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.color": "#dddddd", "axes.axisbelow": True, "text.parse_math": False, "savefig.dpi": 150,
    "savefig.bbox": "tight", "figure.constrained_layout.use": True,
    "image.interpolation": "nearest", "axes.prop_cycle": cycler(linestyle=["-", "--"]) * (
        cycler(color=COLOURS) + cycler(marker=MARKERS))}

# name: of its file; text: what it shows, for who can't see it; drawn: matplotlib's.
Figure = namedtuple("Figure", "name text drawn")


@contextlib.contextmanager
def styled(text):
    """Our style, whatever the user's is, and fonts that have these letters."""
    families, missing = ["DejaVu Sans"], {ord(letter) for letter in text}
    missing -= set(font_manager.get_font(font_manager.findfont("DejaVu Sans")).get_charmap())
    for font in font_manager.fontManager.ttflist if missing else ():
        with contextlib.suppress(OSError, RuntimeError):        # it can't be read
            there = missing & set(font_manager.get_font(font.fname).get_charmap())
            if there and not font.name.startswith("Last Resort"):       # which has a box for each
                families.append(font.name)
                missing -= there
    if missing:
        say("No font here has all letters of the class names: figures show boxes in their place.")
    style = ["default", STYLE | {"font.family": families}]
    with pyplot.style.context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        yield


def as_png(figure):
    """Its bytes; it can't be drawn again."""
    file = io.BytesIO()
    figure.drawn.savefig(file)
    pyplot.close(figure.drawn)
    return file.getvalue()


def _legend(drawn, axes, **options):
    drawn.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=5, **options)


def _panels(count, across, height):
    """(figure, its axes)."""
    rows = math.ceil(count / across)
    drawn, grid = pyplot.subplots(rows, across, figsize=(WIDTH, 0.6 + height * rows), squeeze=False)
    for axes in grid.flat[count:]:
        axes.set_visible(False)
    return drawn, grid.flat[:count]


def _plain_numbers(axis):
    """On a logarithmic axis, in place of powers of ten."""
    axis.set_major_formatter(ticker.LogFormatter())
    axis.set_minor_formatter(ticker.LogFormatter(minor_thresholds=(1.5, 0.5)))


def _labels(record, most):
    """The names of the first classes, as a figure has room for them."""
    return [name if len(name) < 25 else f"{name[:23]}…" for name in record.classes[:most]]


def _reached(experiments):
    """[(experiment, approach, [(images, accuracy in %) of each seed])], approach by approach."""
    rows = [(experiment, approach, [(each["transfer_size"], 100 * each["accuracy"]) for each in
                                    experiment.trained(approach) if each["accuracy"] is not None])
            for approach in dict.fromkeys(name for each in experiments for name in each.approaches)
            for experiment in experiments]
    return [row for row in rows if row[2]]


def accuracy(experiments):
    """A row for each approach of each experiment."""
    rows, several, said = _reached(experiments), len(experiments) > 1, []
    if not rows:
        return None
    drawn, (axes,) = _panels(1, 1, 0.5 + 0.3 * len(rows))
    names = [approach + f" ({experiment.name})" * several for experiment, approach, _ in rows]
    for place, (experiment, _, points) in enumerate(rows):
        values = [value for _, value in points]
        spread = np.std(values, ddof=1) if len(values) > 1 else None
        text = f"{np.mean(values):.2f}" + ("" if spread is None else f" ± {spread:.2f}")
        number = experiments.index(experiment)
        axes.errorbar(np.mean(values), place, xerr=spread, capsize=3, linestyle="none",
                      color=f"C{number}", marker=MARKERS[number % 8])
        axes.text(np.mean(values), place - 0.2, text, ha="center", fontsize=6.5)
        said.append(f"{names[place]} {text}")
    for number, experiment in enumerate(experiments):
        if experiment.teacher_accuracy is not None:
            value = 100 * experiment.teacher_accuracy
            label = f"teacher{f' of {experiment.name}' * several}, {value:.2f}"
            axes.axvline(value, **DASHED | {"color": f"C{number}"}, label=label)
    axes.set_yticks(range(len(rows)), names)
    axes.set(ylim=(len(rows) - 0.5, -0.8), xlabel="accuracy on the test split, %")
    axes.margins(x=0.08)
    _legend(drawn, axes)
    return Figure("accuracy", f"Accuracy in %: {', '.join(said)}.", drawn)


def sizes(experiments):
    """Accuracy against the number of images, where an approach has been run with several sizes."""
    points = {}
    for _, approach, found in _reached(experiments):
        points[approach] = sorted(points.get(approach, []) + found)
    points.pop("supervised", None)
    if all(found[-1][0] < 1.2 * found[0][0] for found in points.values()):
        return None     # seeds differ by a few images
    drawn, (axes,) = _panels(1, 1, 2.6)
    for approach, found in points.items():
        axes.plot(*zip(*found, strict=True), label=approach)
    axes.set(xscale="log", xlabel="images in the transfer set", ylabel="accuracy, %")
    _plain_numbers(axes.xaxis)
    _legend(drawn, axes)
    said = ", ".join(f"{approach} with {size:,} images {value:.2f}"
                     for approach, found in points.items() for size, value in found)
    return Figure("sizes", f"Accuracy in %: {said}.", drawn)


def curves(record):
    """Loss and accuracy on the confidence set, epoch by epoch."""
    learned = {name: student["history"] for name, student in record.students.items()
               if student["history"]}
    if not learned:
        return None
    drawn, panels = _panels(2, 2, 2.3)
    for axes, figure, scale, label in zip(panels, ("loss", "confidence_accuracy"), (1, 100), (
            "loss (supervised: cross-entropy)", "accuracy on the confidence set, %"), strict=True):
        for approach, history in learned.items():
            values = np.array([epoch[figure] for epoch in history], float)      # None becomes NaN
            axes.plot(np.linspace(0, 100, len(history) + 1)[1:], scale * values, label=approach,
                      markevery=max(1, len(history) // 8))
        axes.set(xlabel="training done, %", ylabel=label)
    panels[0].set_yscale("log")
    _plain_numbers(panels[0].yaxis)
    if record.teacher.get("confidence_accuracy") is not None:
        axes.axhline(100 * record.teacher["confidence_accuracy"], **DASHED, label="teacher")
    _legend(drawn, axes)
    said = ", ".join(f"{name} {history[-1]['loss']:.3g}" for name, history in learned.items())
    return Figure("curves", f"Loss at the end: {said}.", drawn)


def scores(record, criterion):
    """The distribution of a criterion's scores, a panel per class that has any."""
    labels, limits, panels = _labels(record, MOST_PANELS), record.thresholds[criterion], {}
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
    labels, tables, said = _labels(record, MOST_ROWS), {}, []
    for approach, images in record.selected.items():
        tables[approach] = np.zeros((len(record.classes), len(record.sources)), int)
        np.add.at(tables[approach], (images.predicted, images.source), 1)
    if not tables:
        return None
    small = len(labels) > NUMBERED
    across = 4 if small else max(2, 8 // len(record.sources))
    drawn, grid = _panels(len(tables), min(len(tables), across),
                          0.6 + (0.06 if small else 0.14) * len(labels))
    scale = matplotlib.colors.PowerNorm(0.4, 0, max(table.max() for table in tables.values()))
    for axes, (approach, table) in zip(grid, tables.items(), strict=True):
        image = axes.imshow(table[:len(labels)], aspect="auto", cmap="cividis", norm=scale)
        for (y, x), count in np.ndenumerate(table) if not small else ():
            axes.text(x, y, f"{count:,}", ha="center", va="center", fontsize=5.5,
                      color="black" if scale(count) > 0.55 else "white")
        short = {shown(name) for name in record.summaries[approach]["shortfall"]}
        names = ["▸ " * (name in short) + label
                 for name, label in zip(record.classes, labels, strict=False)]
        axes.set_yticks(range(len(names)), names, fontsize=3.5 if small else 7)
        axes.set_xticks(range(len(record.sources)), record.sources, rotation=50, ha="right")
        axes.set_title(f"{approach}, {table.sum():,}")
        axes.grid(False)
        said.append(f"{approach}: " + ", ".join(f"{name} {count:,}" for name, count in zip(
            record.sources, table.sum(0), strict=True)))
    drawn.colorbar(image, ax=list(grid), label="images", shrink=0.6, format="{x:,.0f}",
                   ticks=ticker.MaxNLocator(integer=True))
    return Figure("counts", f"Images by source. {'; '.join(said)}.", drawn)


def keeps_high(record, criterion):
    """1 where large scores are kept, else -1: seen from classes that kept some of their images."""
    (every, total), (ours, kept) = (
        [np.bincount(images.predicted, weights, len(record.classes))
         for weights in (None, np.nan_to_num(images.score, posinf=0, neginf=0))]
        for images in (record.pools[criterion], record.selected[criterion]))
    some = (0 < ours) & (ours < every)
    return 1 if np.sign(kept[some] / ours[some] - total[some] / every[some]).sum() >= 0 else -1


def ranked(record, criterion):
    """For each of the first classes four lists of (source's number, index, score), of KINDS."""
    pool, sign, found = record.pools[criterion], keeps_high(record, criterion), []
    limits = np.array(record.thresholds[criterion], float)
    kept = np.isin(pool.key, record.selected[criterion].key)
    # What passed and found no room was not rejected by its score.
    lost = ~kept & ~(sign * pool.score >= sign * limits[pool.predicted])
    for label in range(min(MOST_PANELS, len(record.classes))):
        members = np.flatnonzero((pool.predicted == label) & np.isfinite(pool.score))
        members = members[np.argsort(-sign * pool.score[members], kind="stable")]
        ours, others = members[kept[members]], members[lost[members]]
        found.append([list(zip(pool.source[kind].tolist(), pool.index[kind].tolist(),
                               pool.score[kind].tolist(), strict=True))
                      for kind in (ours[:STRIP], ours[STRIP:][-STRIP:],
                                   others[:STRIP], others[STRIP:][-STRIP:])])
    return found


def strip(record, criterion, sources):
    """Images that a criterion kept and rejected, a row per class that has any. sources: {number:
    source} of those at hand; of the others only what was kept can be shown."""
    groups = [(name, kinds) for name, kinds in zip(
        _labels(record, MOST_PANELS), ranked(record, criterion), strict=True) if any(kinds)]
    if not groups:
        return None
    places = {(4.5 * number + x, 1.3 * y): each for y, (_, kinds) in enumerate(groups)
              for number, kind in enumerate(kinds) for x, each in enumerate(kind)}
    kept, images, wanted = record.selected[criterion], record.pixels(criterion), {
        each[:2] for each in places.values()}
    pixels = {each: images[row] for row, each in enumerate(
        zip(kept.source.tolist(), kept.index.tolist(), strict=True)) if each in wanted}
    for number, source in sources.items():
        index = np.array(sorted(index for each, index in wanted if each == number), np.int64)
        for batch, those, _ in source.batches(rows=index) if len(index) else ():
            pixels |= {(number, int(i)): image for i, image in zip(those, batch, strict=True)}
    drawn, (axes,) = _panels(1, 1, WIDTH / 18 * 1.3 * len(groups))
    for number, kind in enumerate(KINDS):
        axes.text(4.5 * number, -0.5, kind, fontsize=9)
    for y, (name, _) in enumerate(groups):
        axes.text(-0.1, 1.3 * y + 0.5, name, ha="right", va="center")
    for (x, y), (source, index, score) in places.items():
        if (source, index) in pixels:
            axes.imshow(pixels[source, index], extent=(x, x + 0.94, y + 0.94, y))
            axes.text(x, y - 0.04, f"{record.sources[source][:10]}\n{score:.3g}", fontsize=4,
                      linespacing=1)
    axes.set(xlim=(-0.1, 18), ylim=(1.3 * len(groups), -0.5), aspect="equal")
    axes.set_axis_off()
    said = f"Images of each class by {criterion}: {listed(KINDS)}."
    return Figure(f"strip-{criterion}", said, drawn)
