"""The results table, and what a run folder holds as figures and as a page.

    python report.py --run-dir runs/cifar10         # the table, runs/cifar10/figures/*.png, runs/cifar10/report.html; of a half-finished run too
    python report.py runs/a runs/b runs/c           # one table (Markdown, CSV, LaTeX) and one page over several runs
"""
import csv
import io
import re
import statistics
import time
from pathlib import Path

import numpy as np

import data
import transfer
from files import UserError, first_line, listed, say, write_atomically, write_json, write_text
from record import Experiment, shown
from run import APPROACHES, DECIDES, EATS_SOURCES, LATER_DEFAULTS, Parser, as_arguments, command, name_of, name_of_arch, read_config

STARTS = {"none": "random weights", "teacher": "their teacher's weights", "auto": "their teacher's weights where the two share their layers, else from random ones"}

# CIFAR10, ResNet-34 teacher, ResNet-18 student, ImageNet weights, all sources; in per cent.
PUBLISHED = {"supervised": 79.65, "eats": 60.67, "mms": 68.02}


def collect(experiment):
    """The content of results.json of a record.Experiment, as far as there is something.

    Accuracies are means over the seeds, accuracy_std the sample standard deviation (None for one seed).
    """
    settings, rows = experiment.first.settings, []
    teachers = [record.teacher for record in experiment.records if record.teacher]
    for approach in sorted(experiment.approaches, key=lambda a: APPROACHES.index(a) if a in APPROACHES else len(APPROACHES)):
        students = [record.students[approach] for record in experiment.records if approach in record.students]
        if not students:
            continue
        trained = [student for student in students if student["history"]]
        accuracies = [student["accuracy"] for student in trained if student["accuracy"] is not None]
        rows.append({
            "approach": approach, "student": name_of_arch(students[0]["arch"]),
            "sources": students[0]["sources"],
            "transfer_size": round(statistics.fmean(student["transfer_size"] for student in students)),
            "per_class": [round(statistics.fmean(counts)) for counts in zip(*(student["per_class"] for student in students))],
            "accuracy": _mean(accuracies), "accuracy_std": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
            **{key: _mean([student[key] for student in trained if student[key] is not None]) for key in ("retention", "seconds", "images_per_second")},
        })
    return {"target": name_of(settings.target), "classes": experiment.first.classes, "recipe": settings.recipe, "seeds": [record.config["seed"] for record in experiment.records],
            "teacher": {"arch": name_of_arch(teachers[0]["arch"] if teachers else settings.teacher_arch), "accuracy": experiment.teacher_accuracy()},
            "rows": rows, "notes": notes(experiment)}


def _mean(figures):
    return statistics.fmean(figures) if figures else None


def notes(experiment):
    """What the table must not hide, a sentence each."""
    settings, records = experiment.first.settings, experiment.records
    found = [f"Thresholds are calibrated on the {'confidence set' if settings.calibrate == 'target' else 'sources themselves (no target image)'}; "
             + ("one bucket is filled" if settings.no_balance else "buckets are filled") + f" {settings.fill}."]
    unfinished = [approach for approach in experiment.approaches if any(approach not in record.students for record in records)]
    if unfinished:
        found.insert(0, f"Not finished: {listed(unfinished)}{'' if len(records) == 1 else ' of some seed'}.")
    different = [name for name in DECIDES if name != "seed" and len({str((LATER_DEFAULTS | record.config).get(name)) for record in records}) > 1]
    if different:
        found.insert(0, f"The seeds differ in more than the seed, so that they are no repetitions: {listed(different)}.")
    if settings.data_free:
        found.append("Data-free: no training image of the target was there; the teacher is as it was given.")
    teacher = experiment.first.teacher or {"accuracy": 0.0}
    if teacher["accuracy"] is None:
        found.append("No image of the target was there either to measure an accuracy on.")
    if teacher.get("input_size", settings.image_size) != settings.image_size:
        found.append(f"The teacher looks at images of {settings.image_size}x{settings.image_size} pixels resized to {teacher['input_size']}x{teacher['input_size']}.")
    if not teacher.get("linear_head", True) and settings.mms_plain:
        found.append("MMS is the plain margin z_a - z_b: no linear layer makes this teacher's logits.")
    if settings.threshold_quantile:
        found.append(f"A threshold is what the best {settings.threshold_quantile:.4g} of the images of each class reach, in place of the criterion's own.")
    if settings.threshold_scale != 1:
        found.append(f"Thresholds are multiplied by {settings.threshold_scale:g}.")
    if settings.no_balance:
        found.append("The transfer sets are not balanced by class.")
    names = [name_of(source) for source in settings.sources]
    absent = [name for name in EATS_SOURCES if name not in names]
    if "eats" in experiment.approaches and absent:
        found.append(f"eats: without {', '.join(absent)}, which {'is' if len(absent) == 1 else 'are'} not among the sources.")
    if "supervised" in experiment.approaches:
        found.append(f"supervised: labelled images of the target, from {'random' if settings.supervised_weights == 'none' else settings.supervised_weights} weights; "
                     f"the other students start from {STARTS.get(settings.student_weights, settings.student_weights + ' weights')}.")
    for approach in experiment.approaches:
        without = sum(approach in record.students and not record.students[approach]["history"] for record in records)
        if without:
            found.append(f"{approach}: no student for {without} of {len(records)} seeds, since the transfer set was too small to learn from.")
    transfer_sets = [summary for record in records for summary in record.summaries.values()]
    unreadable = {name: bad for transfer_set in transfer_sets for name, bad in transfer_set.get("unreadable", {}).items()}
    if unreadable:
        found.append("Images that can't be read are left out: " + ", ".join(f"{name} {bad:,}" for name, bad in unreadable.items()) + ".")
    for record in records:
        of_seed = f" (seed {record.config['seed']})" if len(records) > 1 else ""
        for approach, summary in record.summaries.items():
            if summary.get("added"):
                what = "images below the threshold" if settings.shortfall == "relax" else "repeated images"
                found.append(f"{approach}{of_seed}: {what} were added where too few passed, {listed([f'{name}: {count:,}' for name, count in summary['added'].items()])}.")
            if summary["shortfall"]:
                short = listed([f"{name}: {summary['bucket'] - lack:,}" for name, lack in summary["shortfall"].items()])
                found.append(f"{approach}{of_seed}: short of {summary['bucket']:,} images a class, {short}.")
            if summary["no_threshold"]:
                found.append(f"{approach}{of_seed}: no threshold, so nothing selected, for {listed(summary['no_threshold'])}.")
    if settings.limit:
        found.append(f"A trial run: at most {settings.limit:,} images of every data set.")
    return found


def as_markdown(results):
    """The table for people."""
    published = results["target"] == "cifar10"
    lines = [f"Target {results['target']}, recipe {results['recipe']}, seeds {', '.join(map(str, results['seeds']))}. "
             f"Teacher {results['teacher']['arch']}: "
             + ("accuracy unknown" if results["teacher"]["accuracy"] is None else f"{results['teacher']['accuracy']:.2%}") + ".", ""]
    header = ["approach", "student", "sources", "images", "a class", "accuracy %", "retention", "seconds", "img/s"] + ["published %"] * published
    lines += ["| " + " | ".join(header) + " |", "|" + "---|" * 3 + "---:|" * (len(header) - 3)]
    for row in results["rows"]:
        spread = "" if row["accuracy_std"] is None else f" ± {100 * row['accuracy_std']:.2f}"
        figures = (["none", "-", "-", "-"] if row["seconds"] is None else
                   ["unknown" if row["accuracy"] is None else f"{100 * row['accuracy']:.2f}{spread}",
                    "-" if row["retention"] is None else f"{row['retention']:.3f}", f"{row['seconds']:,.0f}", f"{row['images_per_second']:,.0f}"])
        cells = [row["approach"], row["student"], ", ".join(row["sources"]), f"{row['transfer_size']:,}",
                 f"{min(row['per_class']):,} to {max(row['per_class']):,}", *figures]
        cells += [f"{PUBLISHED[row['approach']]:.2f}" if row["approach"] in PUBLISHED else "-"] * published
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines + [""] + [f"- {shown(note)}" for note in results["notes"]]) + "\n"


def write(settings):
    """Writes results.json and results.md into a finished run folder. Returns the Markdown."""
    results, folder = collect(Experiment(settings.run_dir, settings)), Path(settings.run_dir)
    write_json(folder / "results.json", results)
    markdown = as_markdown(results)
    write_text(folder / "results.md", markdown)
    return markdown


# --------------------------------------------------------------------------------------------------
# Figures and pages
# --------------------------------------------------------------------------------------------------

def published_for(experiment):
    return PUBLISHED if name_of(experiment.first.settings.target) == "cifar10" else {}


def pixel_reader(record):
    """A function (name of a source, rows of its scores (n,) ascending, an approach) -> {row: (size, size, 3) uint8}: from the source, where
    it is at hand and as it was when it was scored; else of those images alone that the approach selected."""
    sources, settings = {}, record.settings

    def open_source(name):
        try:
            source = data.source_at_hand(settings, next(spec for spec in settings.sources if name_of(spec) == name))
            with np.load(record.folder / "scores" / f"{name}.npz") as saved:
                if str(saved["made_from"]).rpartition("/")[0] == source.made_from:
                    return source
            reason = "it has changed since"
        except (UserError, OSError) as error:
            reason = first_line(error)
        say(f"  of {name} only selected images are shown: {reason}")
        return None

    def pixels_of(name, rows, approach):
        if name not in sources:
            sources[name] = open_source(name)
        if sources[name] is not None:
            return dict(zip(rows.tolist(), np.concatenate([pixels for pixels, _, _ in transfer.images_of(sources[name], record.folder / "scores" / f"{name}.npz", rows)])))
        selected, images = record.selected(approach), record.pixels(approach)
        ours = np.flatnonzero(selected.source == record.sources.index(name))
        places = np.searchsorted(record.index_of(name), selected.index[ours])
        return {row: images[ours[np.argmax(places == row)]] for row in rows.tolist() if (places == row).any()}
    return pixels_of


def drawn_of(experiment):
    """Yields every figures.Figure for which there is something."""
    import figures      # matplotlib takes a second
    record, published = experiment.first, published_for(experiment)
    criteria = [name for name in record.thresholds or () if any(name in columns for columns in record.scores.values())]
    ours = [name for name in criteria if name in record.summaries] or criteria[:1]
    pixels_of = pixel_reader(record)
    learned = [approach for approach in record.students if record.said(approach)]
    best = max(learned, key=lambda approach: (approach != "supervised", record.students[approach]["accuracy"] or 0.0), default=None)
    yield figures.accuracy([experiment], published)
    yield figures.sizes([experiment])
    yield figures.curves(record)
    yield figures.counts(record)
    for criterion in ours:
        yield figures.scores(record, criterion)
    for criterion in (name for name in ours if name in record.summaries):
        yield figures.strip(record, criterion, lambda name, rows, criterion=criterion: pixels_of(name, rows, criterion))
    if best is not None:
        yield figures.confusion(record, best)


def _written(folder, drawn):
    """[(figure, PNG)] of those that are not None, each written below `folder`; older ones that are drawn no more are deleted."""
    from matplotlib import pyplot
    import page
    found = []
    for figure in drawn:
        if figure is None:
            continue
        found.append((figure, page.png_of(figure)))
        pyplot.close(figure.drawn)
        write_atomically(folder / "figures" / f"{figure.name}.png", lambda file: file.write(found[-1][1]))
    for path in (folder / "figures").glob("*.png"):
        if path.stem not in {figure.name for figure, _ in found}:
            path.unlink(missing_ok=True)      # another report may be at it
    return found


def table_of(results):
    """(header, rows) of the table of `as_markdown`, of text."""
    lines = [line for line in as_markdown(results).splitlines() if line.startswith("| ")]
    header, *rows = ([cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line.strip("|"))] for line in lines)
    return header, rows


def illustrate(experiment):
    """Writes figures/*.png and report.html of a record.Experiment, finished or not. Returns one line about them."""
    import page
    began = time.monotonic()
    results = collect(experiment)
    drawn = _written(experiment.folder, drawn_of(experiment))
    gallery = page.gallery_of(experiment.first)
    header, rows = table_of(results)
    body = (page.table(header, rows, words=(1, 2)) if rows else "<p>No student yet.</p>") + "<ul>" + "".join(f"<li>{page.escaped(note)}</li>" for note in results["notes"]) + "</ul>"
    body += "".join(page.figure_html(figure, png) for figure, png in drawn)
    body += page.gallery_html(gallery[0], gallery[2]) if gallery else "<section id=gallery><h2>Selected images</h2><p>Nothing has been selected yet.</p></section>"
    body += page.settings_html([(record, as_arguments(read_config(record.folder / "config.json"))) for record in experiment.records[:1]])
    text = page.page(f"{experiment.name}: {results['target']} without its images", _summary(results), body, f"Written {time.strftime('%Y-%m-%d %H:%M')} from {experiment.folder}.", gallery)
    write_text(experiment.folder / "report.html", text)
    return (f"{len(drawn)} figures in {experiment.folder / 'figures'}, the page is {experiment.folder / 'report.html'} ({len(text.encode()) / 1e6:.1f} MB), {time.monotonic() - began:,.0f} s")


def _summary(results):
    teacher = results["teacher"]
    said = f"Teacher {teacher['arch']}" + ("" if teacher["accuracy"] is None else f", {teacher['accuracy']:.2%}") + f"; recipe {results['recipe']}; seeds {', '.join(map(str, results['seeds']))}."
    rows = [row for row in results["rows"] if row["accuracy"] is not None and row["approach"] != "supervised"]
    if rows:
        best = max(rows, key=lambda row: row["accuracy"])
        said += f" The best student without the target's images is that of {best['approach']}: {best['accuracy']:.2%} with {best['transfer_size']:,} images."
    return said


# --------------------------------------------------------------------------------------------------
# Several runs
# --------------------------------------------------------------------------------------------------

COMPARED = ("run", "target", "recipe", "teacher", "teacher %", "approach", "student", "images", "seeds", "accuracy %", "±", "retention", "seconds")


def compared(experiments):
    """A row, as in COMPARED, of text, for each approach of each experiment."""
    def number(value, form, scale=1):
        return "" if value is None else format(value * scale, form)
    rows = []
    for experiment in experiments:
        results = collect(experiment)
        for row in results["rows"]:
            rows.append([experiment.name, results["target"], results["recipe"], results["teacher"]["arch"], number(results["teacher"]["accuracy"], ".2f", 100), row["approach"], row["student"],
                         str(row["transfer_size"]), str(len(experiment.figures_of(row["approach"]))), number(row["accuracy"], ".2f", 100), number(row["accuracy_std"], ".2f", 100),
                         number(row["retention"], ".3f"), number(row["seconds"], ".0f")])
    return rows


def as_csv(rows):
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([COMPARED, *rows])
    return file.getvalue()


def as_latex(rows):
    """For \\usepackage{booktabs}."""
    def cell(text):
        return "".join({"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"}.get(c, "\\" + c if c in "&%$#_{}" else c) for c in text)
    numbers = [name in ("teacher %", "images", "seeds", "accuracy %", "±", "retention", "seconds") for name in COMPARED]
    lines = [r"\begin{tabular}{" + "".join("r" if right else "l" for right in numbers) + "}", r"\toprule", " & ".join(map(cell, COMPARED)) + r" \\", r"\midrule"]
    return "\n".join(lines + [" & ".join(map(cell, row)) + r" \\" for row in rows] + [r"\bottomrule", r"\end{tabular}"]) + "\n"


def as_pipes(rows):
    """Markdown."""
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in [list(COMPARED), ["---"] * len(COMPARED), *rows]) + "\n"


def compare(folders, out):
    """Writes one table (Markdown, CSV, LaTeX) and one page over several experiments below `out`. Returns the Markdown."""
    import figures
    import page
    experiments, out = [Experiment(folder) for folder in folders], Path(out)
    names = [experiment.name for experiment in experiments]
    for number, experiment in enumerate(experiments):       # of two with one name the folders above tell them apart
        if names.count(experiment.name) > 1:
            experiment.label = f"{experiment.folder.resolve().parent.name}/{names[number]}"
    rows = compared(experiments)
    for name, content in (("table.md", as_pipes(rows)), ("table.csv", as_csv(rows)), ("table.tex", as_latex(rows))):
        write_text(out / name, content)
    drawn = _written(out, [figures.accuracy(experiments, {}), figures.sizes(experiments)])
    body = page.table(COMPARED, rows) + "".join(page.figure_html(figure, png) for figure, png in drawn)
    body += page.settings_html([(experiment.first, as_arguments(read_config(experiment.first.folder / "config.json"))) for experiment in experiments])
    write_text(out / "report.html", page.page(f"{len(experiments)} runs compared", ", ".join(experiment.name for experiment in experiments), body, f"Written {time.strftime('%Y-%m-%d %H:%M')}."))
    return as_pipes(rows)


def main(argv):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*", metavar="RUN", help="run folders; several are compared in one table and one page")
    parser.add_argument("--run-dir", default="runs/cifar10", metavar="DIR", help="the run folder where no RUN is given (default: runs/cifar10)")
    parser.add_argument("--out", default="runs/comparison", metavar="DIR", help="where the comparison of several runs is written (default: runs/comparison)")
    args = parser.parse_args(argv)
    if len(args.runs) > 1:
        say(compare(args.runs, args.out))
        return say(f"table.md, table.csv, table.tex, report.html and figures are in {args.out}")
    folder = args.runs[0] if args.runs else args.run_dir
    experiment = Experiment(folder)
    say(as_markdown(collect(experiment)))
    return say(illustrate(experiment))


if __name__ == "__main__":
    command(main)
