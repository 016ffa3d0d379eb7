"""What a run selected and how its students learned, as pictures for print: each from what the run folder holds.

Colours are those of Okabe and Ito, which the colour-blind tell apart; what a colour says a marker, a line or a number says as well.
"""
import math
from dataclasses import dataclass

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot       # noqa: E402

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#8C8C00")
LINES = ("-", "--", "-.", ":")
MARKERS = "osD^vP*X"
MOST_CLASSES = 20       # that a figure with a panel or a row for each class shows
MOST_ROWS = 100         # that a heat map shows
STRIP = 4               # images of each kind in a strip
WIDTH = 7.2             # inches: of a page of text
STYLE = {"font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "xtick.labelsize": 7, "ytick.labelsize": 7, "legend.fontsize": 7, "axes.spines.top": False, "axes.spines.right": False,
         "axes.grid": True, "grid.color": "#dddddd", "grid.linewidth": 0.6, "axes.axisbelow": True, "savefig.dpi": 150, "figure.dpi": 150, "legend.frameon": False, "text.parse_math": False}


@dataclass(frozen=True)
class Figure:
    """name: of its file; title; reading: one sentence on how to read it; text: what it shows, for who can't see it."""

    name: str
    title: str
    reading: str
    text: str
    drawn: object       # matplotlib's


def colour_of(number):
    return COLOURS[number % len(COLOURS)]


def line_of(number):
    return LINES[number // len(COLOURS) % len(LINES)]


def styled(draw):
    """A function that draws with our style, whatever the user's is."""
    def drawing(*args, **kwargs):
        with matplotlib.rc_context(), pyplot.style.context("default"):
            matplotlib.rcParams.update(STYLE)
            return draw(*args, **kwargs)
    return drawing


# --------------------------------------------------------------------------------------------------
# Accuracy
# --------------------------------------------------------------------------------------------------

@styled
def accuracy(experiments, published):
    """A row for each approach (of each experiment, where there are several). published: {approach: share}, of the target where there are such values.
    None where no student has been measured."""
    rows = [(experiment, approach, [figures["accuracy"] for figures in experiment.figures_of(approach) if figures["accuracy"] is not None])
            for experiment in experiments for approach in experiment.approaches]
    rows = [(experiment, approach, 100 * np.array(values)) for experiment, approach, values in rows if values]
    if not rows:
        return None
    drawn, axes = pyplot.subplots(figsize=(WIDTH, 0.9 + 0.28 * len(rows)))
    many = len(experiments) > 1
    for place, (experiment, approach, values) in enumerate(rows):
        number = experiments.index(experiment)
        spread = values.std(ddof=1) if len(values) > 1 else 0
        axes.errorbar(values.mean(), place, xerr=spread or None, fmt=MARKERS[number % len(MARKERS)], color=colour_of(number), capsize=3, markersize=5,
                      label=experiment.name if many and approach == next(row[1] for row in rows if row[0] is experiment) else None)
        if len(values) > 1:
            axes.plot(values, [place] * len(values), "|", color=colour_of(number), markersize=6)
        if approach in published:
            axes.plot(100 * published[approach], place, "o", markerfacecolor="none", color="#555555", markersize=6, zorder=3)
        axes.annotate(f"{values.mean():.2f}" + (f" ± {spread:.2f}" if spread else ""), (values.mean(), place), xytext=(8 if values.mean() < 85 else -8, 5), textcoords="offset points",
                      ha="left" if values.mean() < 85 else "right", fontsize=6.5)
    axes.set_yticks(range(len(rows)), [f"{approach}" + (f" ({experiment.name})" if many else "") for experiment, approach, _ in rows])
    axes.invert_yaxis()
    axes.set_ylim(len(rows) - 0.4, -0.7)
    for number, experiment in enumerate(experiments):
        teacher = experiment.teacher_accuracy()
        if teacher is not None:
            axes.axvline(100 * teacher, color=colour_of(number) if many else "#555555", linestyle="--", linewidth=1, label=f"teacher{f' of {experiment.name}' if many else ''}, {100 * teacher:.2f}")
    if any(approach in published for _, approach, _ in rows):
        axes.plot([], [], "o", markerfacecolor="none", color="#555555", label="published")
    axes.set_xlabel("accuracy on the test split, %")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.35 if len(rows) < 5 else -0.18), ncols=3)
    seeds = max(len(values) for _, _, values in rows)
    said = "; ".join(f"{approach}{f' of {experiment.name}' if many else ''} {values.mean():.2f}" for experiment, approach, values in rows)
    return Figure("accuracy", "Accuracy", "A dot is the mean of an approach's students" + (", a bar one standard deviation over the seeds, a stroke one seed" if seeds > 1 else " (one seed)")
                  + "; the dashed line is the teacher" + ("; circles are the published values, of other sources and weights." if any(approach in published for _, approach, _ in rows) else "."), f"Accuracy in per cent: {said}.", drawn)


@styled
def sizes(experiments):
    """Accuracy against the number of transfer images. None unless there are two sizes."""
    points = {}
    for experiment in experiments:
        for approach in experiment.approaches:
            for figures in experiment.figures_of(approach):
                if figures["accuracy"] is not None and approach != "supervised":
                    points.setdefault(approach, []).append((figures["transfer_size"], 100 * figures["accuracy"]))
    if len({size for values in points.values() for size, _ in values}) < 2:
        return None
    drawn, axes = pyplot.subplots(figsize=(WIDTH * 0.8, 3))
    for number, (approach, values) in enumerate(points.items()):
        values.sort()
        axes.plot(*zip(*values), marker=MARKERS[number % len(MARKERS)], linestyle=LINES[number % len(LINES)] if len(values) > 1 else "none", color=colour_of(number), markersize=5, label=approach)
    axes.set_xscale("log")
    for each in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        each(lambda size, place: f"{size:,.0f}" if f"{size:.0e}"[0] in "125" else "")
    axes.set_xlabel("images in the transfer set")
    axes.set_ylabel("accuracy on the test split, %")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    said = "; ".join(f"{approach}: " + ", ".join(f"{size:,} images {value:.2f}" for size, value in values) for approach, values in points.items())
    return Figure("sizes", "Accuracy against size", "Where a larger set lies higher, images were what the student lacked; where sets of one size lie apart, the choice of images mattered.",
                  f"Accuracy in per cent against the number of images. {said}.", drawn)


# --------------------------------------------------------------------------------------------------
# Scores and selection
# --------------------------------------------------------------------------------------------------

def shown_classes(record, most=MOST_CLASSES):
    """The classes that a figure shows: all, or the `most` to which most images of the sources are put."""
    count = len(record.classes)
    if count <= most:
        return list(range(count))
    votes = np.zeros(count, np.int64)
    for name, columns in record.scores.items():
        if name != "confidence":
            votes += np.bincount(columns["predicted"], minlength=count)
    return sorted(np.argsort(-votes, kind="stable")[:most].tolist())


def _of_shown(record, shown):
    return "" if len(shown) == len(record.classes) else f" Shown are the {len(shown)} of {len(record.classes)} classes to which most images of the sources are put."


@styled
def scores(record, criterion):
    """The distribution of a criterion's scores in each class. None where nothing has been scored."""
    scored = {name: columns for name, columns in record.scores.items() if criterion in columns and len(columns[criterion])}
    if not scored or record.classes is None:
        return None
    shown, limits = shown_classes(record), record.threshold(criterion)
    columns = min(5, len(shown))
    rows = math.ceil(len(shown) / columns)
    drawn, grid = pyplot.subplots(rows, columns, figsize=(WIDTH, 0.5 + 1.25 * rows), squeeze=False, layout="constrained")
    for place, axes in enumerate(grid.flat):
        if place >= len(shown):
            axes.set_visible(False)
            continue
        label = shown[place]
        of_class = {name: values[criterion][(values["predicted"] == label) & np.isfinite(values[criterion])] for name, values in scored.items()}
        every = np.concatenate([*of_class.values(), [] if limits is None or not np.isfinite(limits[label]) else [limits[label]]])
        low, high = np.quantile(every, [0.005, 0.995]) if len(every) else (0, 1)
        edges = np.linspace(low, high if high > low else low + 1e-6, 31)
        for number, (name, members) in enumerate(of_class.items()):
            if len(members):
                counts, _ = np.histogram(np.clip(members, edges[0], edges[-1]), edges)
                if name == "confidence":
                    axes.stairs(counts / len(members), edges, color="#999999", alpha=0.45, fill=True)
                else:
                    axes.stairs(counts / len(members), edges, color=colour_of(number), linestyle=line_of(number), linewidth=1)
        if limits is not None and np.isfinite(limits[label]):
            axes.axvline(limits[label], color="black", linestyle="--", linewidth=1)
        axes.set_title(record.labels[label] + ("" if limits is None or np.isfinite(limits[label]) else " (no threshold)"), pad=2)
        axes.set_yticks([])
        axes.locator_params(axis="x", nbins=4)
        axes.grid(False)
    handles = [matplotlib.patches.Patch(color="#999999", alpha=0.45, label="confidence set (real images)")] * ("confidence" in scored)
    handles += [matplotlib.lines.Line2D([], [], color=colour_of(number), linestyle=line_of(number), label=name) for number, name in enumerate(scored) if name != "confidence"]
    handles += [matplotlib.lines.Line2D([], [], color="black", linestyle="--", linewidth=1, label="threshold")] * (limits is not None)
    drawn.legend(handles=handles, loc="outside lower center", ncols=4, title=f"{criterion}, of the images that the teacher puts into the class", title_fontsize=8)
    passing = _passing(record, criterion, scored, limits)
    return Figure(f"scores-{criterion}", f"Scores: {criterion}", "Each curve has the same area: where it lies beyond the dashed line towards the grey, images of that source pass." + _of_shown(record, shown),
                  f"Distributions of {criterion} in each class. {passing}", drawn)


def _passing(record, criterion, scored, limits):
    """How much of each source reaches the thresholds, in words."""
    if limits is None:
        return "There is no threshold yet."
    above = keeps_high(record, criterion)
    said = []
    for name, values in scored.items():
        limit = limits[values["predicted"]]
        share = np.mean(values[criterion] >= limit if above else values[criterion] <= limit) if len(limit) else 0
        said.append(f"{name} {share:.1%}")
    return f"The thresholds are reached by: {', '.join(said)}."


def keeps_high(record, criterion):
    """Whether large scores are kept: known of ours; of the user's own, seen from what was kept."""
    known = {"mms": True, "confidence": True, "energy": True, "entropy": False, "cross_entropy": False}
    if criterion in known or criterion not in record.summaries:
        return known.get(criterion, True)
    selected, limits = record.selected(criterion), record.threshold(criterion)
    return limits is None or not len(selected) or np.mean(selected.score >= limits[selected.predicted]) >= 0.5


@styled
def counts(record):
    """How many images of each source each class got, a panel an approach. None where nothing has been selected."""
    approaches = [approach for approach in record.summaries if record.summaries[approach]["size"]]
    if not approaches or record.classes is None:
        return None
    every, sources, shown = len(record.classes), record.sources, shown_classes(record, MOST_ROWS)
    classes, labels = len(shown), [record.labels[label] for label in shown]
    tables = {}
    for approach in approaches:
        selected = record.selected(approach)
        tables[approach] = np.bincount(selected.predicted * len(sources) + selected.source, minlength=every * len(sources)).reshape(every, len(sources))
    columns = min(len(approaches), max(1, 8 // max(2, len(sources))))
    rows = math.ceil(len(approaches) / columns)
    drawn, grid = pyplot.subplots(rows, columns, figsize=(WIDTH, rows * (1.0 + 0.14 * classes)), squeeze=False, layout="constrained")
    highest = max(table.max() for table in tables.values())
    for place, axes in enumerate(grid.flat):
        if place >= len(approaches):
            axes.set_visible(False)
            continue
        approach, table = approaches[place], tables[approaches[place]][shown]
        image = axes.imshow(table, aspect="auto", cmap="cividis", norm=matplotlib.colors.SymLogNorm(10, vmin=0, vmax=highest))
        short = record.summaries[approach]["shortfall"]
        names = [f"{'▸ ' if name in short else ''}{name}" for name in labels]
        axes.set_yticks(range(classes), names if place % columns == 0 or short else [""] * classes, fontsize=7 if classes <= 25 else 3.5)
        axes.set_xticks(range(len(sources)), sources, rotation=35, ha="right", rotation_mode="anchor")
        axes.set_title(f"{approach}, {tables[approach].sum():,}")
        axes.grid(False)
        if classes <= 25:
            for y, x in np.ndindex(*table.shape):
                axes.text(x, y, f"{table[y, x]:,}", ha="center", va="center", fontsize=5.5, color="black" if table[y, x] > highest / 6 else "white")
    drawn.colorbar(image, ax=grid, label="images", shrink=0.6)
    said = "; ".join(f"{approach}: " + ", ".join(f"{name} {table[:, number].sum():,}" for number, name in enumerate(sources)) + (
        f", short: {', '.join(record.summaries[approach]['shortfall'])}" if record.summaries[approach]["shortfall"] else "") for approach, table in tables.items())
    return Figure("counts", "Which source feeds which class", "A number is how many images of a source (column) a class (row) got; ▸ marks a class that is short of its bucket." + _of_shown(record, shown),
                  f"Images by source. {said}.", drawn)


# --------------------------------------------------------------------------------------------------
# Learning
# --------------------------------------------------------------------------------------------------

@styled
def curves(record):
    """Loss and accuracy on the confidence set, epoch by epoch. None where no student has learned."""
    learned = {approach: figures["history"] for approach, figures in record.students.items() if figures["history"]}
    if not learned:
        return None
    watched = any(epoch["confidence_accuracy"] is not None for history in learned.values() for epoch in history)
    drawn, grid = pyplot.subplots(1, 2 if watched else 1, figsize=(WIDTH, 2.8), squeeze=False, layout="constrained")
    for number, (approach, history) in enumerate(learned.items()):
        of_each = dict(color=colour_of(number), linestyle=line_of(number), marker=MARKERS[number % len(MARKERS)], markersize=3, markevery=max(1, len(history) // 8), linewidth=1, label=approach)
        share = (np.arange(len(history)) + 1) / len(history)
        grid[0, 0].plot(share, [epoch["loss"] for epoch in history], **of_each)
        if watched:
            grid[0, 1].plot(share, [np.nan if epoch["confidence_accuracy"] is None else 100 * epoch["confidence_accuracy"] for epoch in history], **of_each)
    grid[0, 0].set_yscale("log")
    grid[0, 0].set_ylabel("loss (supervised: cross-entropy)" if "supervised" in learned else "loss")
    for axes in grid.flat:
        axes.set_xlabel("share of the training")
    if watched:
        grid[0, 1].set_ylabel("accuracy on the confidence set, %")
        if record.teacher and record.teacher["confidence_accuracy"] is not None:
            grid[0, 1].axhline(100 * record.teacher["confidence_accuracy"], color="#555555", linestyle="--", linewidth=1, label="teacher")
    handles, labels = grid[0, -1].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=min(7, len(labels)))
    said = "; ".join(f"{approach} {history[-1]['loss']:.3g} after {len(history)} epochs" + (
        f", confidence set {history[-1]['confidence_accuracy']:.2%}" if history[-1]["confidence_accuracy"] is not None else "") for approach, history in learned.items())
    return Figure("curves", "Learning", "A curve that still rises at the right end says that the student stopped too early; losses of different transfer sets are no ranking.",
                  f"Loss at the end: {said}.", drawn)


@styled
def confusion(record, approach):
    """What the student said to each class of the test split, and where it and the teacher differ. None where that was not kept."""
    students, teachers = record.said(approach), record.said()
    if students is None or record.classes is None:
        return None
    (predicted, labels), count = students, len(record.classes)

    def table(rows, columns):
        return np.bincount(rows * count + columns, minlength=count * count).reshape(count, count)
    confused = table(labels, predicted)
    panels = [(100 * confused / np.maximum(1, confused.sum(1, keepdims=True)), "true class", f"student ({approach}), % of each class")]
    said = f"The student of {approach} is right on {np.mean(predicted == labels):.2%} of {len(labels):,} images"
    if teachers is not None and len(teachers[0]) == len(predicted):
        differ = predicted != teachers[0]
        panels.append((table(teachers[0][differ], predicted[differ]), "teacher", f"where they differ: {differ.mean():.1%} of the images, counts"))
        right = np.mean(teachers[0][differ] == labels[differ]) if differ.any() else 0
        said += f"; it differs from the teacher on {differ.mean():.2%}, of which the teacher has {right:.0%} right and the student {np.mean(predicted[differ] == labels[differ]) if differ.any() else 0:.0%}"
    drawn, grid = pyplot.subplots(1, len(panels), figsize=(WIDTH, WIDTH / 2 + 0.4 if len(panels) > 1 else WIDTH * 0.7), squeeze=False, layout="constrained")
    for axes, (values, left, title) in zip(grid.flat, panels):
        axes.imshow(values, cmap="cividis", norm=matplotlib.colors.PowerNorm(0.4, vmin=0, vmax=max(1, values.max())))
        ticks = range(count) if count <= 25 else range(0, count, max(1, count // 20))
        axes.set_xticks(ticks, [record.labels[i] for i in ticks], rotation=90 if max(map(len, record.labels)) > 2 else 0)
        axes.set_yticks(ticks, [record.labels[i] for i in ticks])
        axes.set_xlabel("student")
        axes.set_ylabel(left)
        axes.set_title(title)
        axes.grid(False)
        if count <= 12:
            for y, x in np.ndindex(*values.shape):
                if values[y, x] >= 0.5:
                    axes.text(x, y, f"{values[y, x]:.0f}", ha="center", va="center", fontsize=5.5, color="black" if values[y, x] > values.max() * 0.25 else "white")
    worst = np.unravel_index(np.argmax(confused - np.diag(np.diag(confused))), confused.shape)
    return Figure(f"confusion-{approach}", f"What the student confuses: {approach}", "Off the diagonal on the left are its mistakes; on the right, where it departs from what it was taught.",
                  f"{said}. Most often it takes {record.labels[worst[0]]} for {record.labels[worst[1]]}, {confused[worst]:,} times.", drawn)


# --------------------------------------------------------------------------------------------------
# Images
# --------------------------------------------------------------------------------------------------

KINDS = ("best kept", "marginal kept", "narrowly rejected", "clearly rejected")


def ranked(record, criterion):
    """{class: four lists of (source's number, row in its scores)}, of KINDS: what the criterion kept and rejected. A class may lack some."""
    kept = record.positions(criterion)
    high, rows = keeps_high(record, criterion), []
    for number, name in enumerate(record.sources):
        columns = record.scores.get(name)
        if columns is None or criterion not in columns:
            continue
        chosen = np.zeros(len(columns["predicted"]), bool)
        chosen[kept.get(name, [])] = True
        worth = columns[criterion].astype(np.float64) * (1 if high else -1)
        rows.append((np.full(len(worth), number), np.arange(len(worth)), columns["predicted"], worth, chosen))
    if not rows:
        return {}
    source, row, predicted, worth, chosen = (np.concatenate(column) for column in zip(*rows))
    limits, found = record.threshold(criterion), {}
    for label in range(len(record.classes)):
        members = np.flatnonzero((predicted == label) & ~np.isnan(worth))
        members = members[np.argsort(-worth[members], kind="stable")]
        limit = None if limits is None else limits[label] * (1 if high else -1)
        ours = members[chosen[members]]
        below = members[~chosen[members] & (worth[members] < limit if limit is not None else True)]       # what passed and found no room is not rejected by its score
        kinds = (ours[:STRIP], ours[STRIP:][-STRIP:], below[:STRIP], below[STRIP:][-STRIP:])
        found[label] = [[(int(source[i]), int(row[i])) for i in kind] for kind in kinds]
    return found


@styled
def strip(record, criterion, pixels_of):
    """A row a class of what a criterion kept and rejected. pixels_of(source's name, rows (n,)): {row: (size, size, 3) uint8} of those that
    are at hand. None where there is nothing to show."""
    if criterion not in record.summaries or record.classes is None or not any(criterion in columns for columns in record.scores.values()):
        return None
    shown = shown_classes(record)
    groups = {label: kinds for label, kinds in ranked(record, criterion).items() if label in shown}
    wanted = {}
    for kinds in groups.values():
        for number, row in (place for kind in kinds for place in kind):
            wanted.setdefault(number, set()).add(row)
    pixels = {}
    for number, rows in wanted.items():
        pixels |= {(number, row): image for row, image in pixels_of(record.sources[number], np.array(sorted(rows))).items()}
    if not pixels:
        return None
    drawn = pyplot.figure(figsize=(WIDTH, 0.5 + 0.62 * len(groups)))
    across, gap = len(KINDS) * STRIP, 0.5
    grid = drawn.add_gridspec(len(groups), across + len(KINDS) - 1, width_ratios=([1] * STRIP + [gap]) * (len(KINDS) - 1) + [1] * STRIP, left=0.1, right=0.995, top=1 - 0.35 / drawn.get_figheight(), bottom=0.01,
                              wspace=0.08, hspace=0.55)
    for place, (label, kinds) in enumerate(groups.items()):
        for kind, members in enumerate(kinds):
            for number in range(STRIP):
                axes = drawn.add_subplot(grid[place, kind * (STRIP + 1) + number])
                axes.set_axis_off()
                if place == 0 and number == 0:
                    axes.annotate(KINDS[kind], (0, 1), xytext=(0, 18), xycoords="axes fraction", textcoords="offset points", fontsize=8, fontweight="bold")
                if kind == number == 0:
                    axes.annotate(record.labels[label], (0, 0.5), xytext=(-4, 0), xycoords="axes fraction", textcoords="offset points", ha="right", va="center", fontsize=7)
                if number == 0 and not members:
                    axes.text(0, 0.5, "none", fontsize=6, color="#777777", va="center")
                if number < len(members) and members[number] in pixels:
                    source, row = members[number]
                    axes.imshow(pixels[members[number]], interpolation="nearest")
                    axes.set_title(f"{record.sources[source][:13]}\n{record.scores[record.sources[source]][criterion][row]:.3g}", fontsize=4.2, pad=1, linespacing=1)
    few = [record.labels[label] for label, kinds in groups.items() if not kinds[0]]
    return Figure(f"strip-{criterion}", f"Kept and rejected: {criterion}", "From the left: the surest images that were kept, the last that were, the first that fell below the threshold, the farthest below it; over each its "
                  "source and score." + _of_shown(record, shown), f"Images of each class by {criterion}." + (f" Nothing was kept for {', '.join(few)}." if few else ""), drawn)
