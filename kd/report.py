"""The table of a run or of several, and what a run folder holds as figures and as a page."""
import csv
import io
import logging
import shlex
import statistics
import time
from pathlib import Path

from kd.files import listed, say, write_json, write_text
from kd.flags import code_in
from kd.record import Experiment, accuracy_text, mean, shown
from kd.values import name_of, name_of_arch

HEADS = ("approach", "student", "sources", "images", "per class", "accuracy %", "retention",
         "agreement %", "seconds", "img/s")
logging.getLogger("matplotlib").setLevel(logging.ERROR)     # of its own folders and fonts


def collect(experiment):
    """The content of results.json, as far as there is something."""
    settings, teacher = experiment.first.settings, experiment.first.teacher
    rows = [row_of(experiment, approach) for approach in experiment.approaches
            if any(approach in each.students for each in experiment.records)]
    return {"target": name_of(settings.target), "classes": experiment.first.classes,
            "recipe": settings.recipe, "seeds": [each.settings.seed for each in experiment.records],
            "teacher": {"arch": name_of_arch(teacher.get("arch", settings.teacher_arch)),
                        "accuracy": experiment.teacher_accuracy,
                        "parameters": teacher.get("parameters")},
            "rows": rows, "notes": [shown(note) for note in notes(experiment)]}


def row_of(experiment, approach):
    """Figures are means over the seeds, accuracy_std is the sample deviation (None for one)."""
    students = [each.students[approach] for each in experiment.records if approach in each.students]
    known = [each["accuracy"] for each in students if each["accuracy"] is not None]
    per_class = zip(*(each["per_class"] for each in students), strict=True)
    return {
        "approach": approach, "student": name_of_arch(students[0]["arch"]),
        "sources": students[0]["sources"],
        "transfer_size": round(mean(each["transfer_size"] for each in students)),
        "per_class": [round(mean(counts)) for counts in per_class],
        "accuracy": mean(known),
        "accuracy_std": statistics.stdev(known) if len(known) > 1 else None,
        **{name: mean(each[name] for each in students) for name in (
            "retention", "agreement", "source_agreement", "seconds", "images_per_second")},
        "parameters": students[0].get("parameters")}


def notes(experiment):
    """Yields what the table must not hide, in sentences."""
    record, records = experiment.first, experiment.records
    settings, held = record.settings, record.held_out
    unfinished = [name for name in settings.rows
                  if any(name not in each.students for each in records)]
    if unfinished:
        yield f"Not made yet: {listed(unfinished)}."
    if settings.limit:
        yield f"A trial run with at most {settings.limit} images of each data set."
    if settings.data_free:
        yield "Data-free: no training image of the target was used."
    if held and experiment.teacher_accuracy is None:
        yield (f"Agreement: on {held['images']:,} images of the sources that no student learned "
               "from; always answering the most frequent class would reach "
               f"{held['largest_class']:.2%}.")
    others = dict.fromkeys(
        name for each in records if each.teacher for name, student in each.students.items()
        if student.get("test", each.teacher["test"]) != each.teacher["test"])
    if others:
        yield f"Measured on another test split than the teacher: {listed(list(others))}."
    if settings.mms_plain and not record.teacher.get("linear_head", True):
        yield "MMS is the plain margin z_a - z_b: no linear layer makes the teacher's logits."
    by_threshold = [each for each in record.summaries.values() if each["calibrated_on"]]
    if by_threshold:
        made = by_threshold[0]["made_from"]
        yield (f"Selected with --threshold {made['threshold']} --calibrate {made['calibrate']} "
               f"--floor {made['floor']:g} --fill {made['fill']}"
               f"{' --no-balance' * made['no_balance']}.")
    if "supervised" in record.students:
        weights = record.students["supervised"]["weights"]
        start = "random" if weights == "none" else name_of_arch(weights)
        yield f"The supervised student learns from labels and starts from {start} weights."
    said = {}       # {sentence about @: approaches}: what is true of several is said once
    for each in records:
        seed = f" (seed {each.settings.seed})" * (len(records) > 1)
        for approach, summary in each.summaries.items():
            for sentence in about_transfer_set(summary, each.students.get(approach)):
                said.setdefault(sentence, []).append(approach + seed)
    for sentence, names in said.items():
        yield sentence.replace("@", listed(names), 1)


def about_transfer_set(summary, student=None):
    """Sentences about it and about its student, with @ where the approach comes."""
    bucket, lacking = summary["bucket"], summary["shortfall"]
    for words, counts in (
            (f"Classes with fewer than {bucket:,} images in @",
             {name: bucket - count for name, count in lacking.items()}),
            ("Images below the threshold that --floor let in for @", summary["below_threshold"]),
            ("Images that can't be read, or get no finite logits, are left out of @",
             summary["unreadable"])):
        if counts:
            yield f"{words}: {listed([f'{name} ({count:,})' for name, count in counts.items()])}."
    if summary["no_threshold"]:
        where = "confidence set" if summary["calibrated_on"] == "target" else "sources"
        yield (f"Classes without a threshold in @: {listed(summary['no_threshold'])}. No image "
               f"of the {where} gives them one.")
    if student and student["weights"] == "teacher":
        yield ("The student of @ is pruned from the teacher: it starts with the teacher's layers, "
               "which keep most of its accuracy on any images.")
    if student and not student["history"]:
        yield "There is no student of @: its transfer set is too small to learn from."


def extent(counts):
    """From the least to the most, in words."""
    least, most = min(counts), max(counts)
    return f"{least:,} to {most:,}" if least < most else f"{least:,}"


def cells(row):
    """The text of a row, as in HEADS."""
    def number(name, form, scale=1):
        return "-" if row[name] is None else format(row[name] * scale, form)
    agreement = number("agreement", ".2f", 100)
    if row["agreement"] is None and row["source_agreement"] is not None:
        agreement = number("source_agreement", ".2f", 100) + " (sources)"
    return [row["approach"], row["student"], ", ".join(row["sources"]), f"{row['transfer_size']:,}",
            extent(row["per_class"]), accuracy_text(row), number("retention", ".3f"),
            agreement, number("seconds", ",.0f"),
            number("images_per_second", ",.0f")]


def _markdown(heads, rows, words=3):
    """A table whose first columns are words, the others numbers."""
    rule = ["---"] * words + ["---:"] * (len(heads) - words)
    return "".join("| " + " | ".join(shown(cell).replace("|", "\\|") for cell in row) + " |\n"
                   for row in (heads, rule, *rows))


def heading(results):
    teacher = results["teacher"]
    known = "accuracy unknown" if teacher["accuracy"] is None else f"{teacher['accuracy']:.2%}"
    return (f"Target {results['target']}, recipe {results['recipe']}, seed "
            f"{listed(results['seeds'])}. Teacher {teacher['arch']}, {known}.")


def as_markdown(results):
    return "\n".join([heading(results), "", _markdown(HEADS, map(cells, results["rows"])),
                      *(f"- {note}" for note in results["notes"]), ""])


def write(experiment):
    """Writes what shows a run, finished or not, and says the table: results.json, results.md,
    figures/*.png and report.html."""
    from kd import figures, page
    results, record, folder = collect(experiment), experiment.first, experiment.folder
    write_json(folder / "results.json", results)
    write_text(folder / "results.md", as_markdown(results))
    say(as_markdown(results))
    drawn = figures.save(folder / "figures", figures.of_run(record, results))
    command = ["python", "compile.py", "--config", str(record.folder / "config.json"), "--run-dir",
               "runs/again", "--seeds", ",".join(map(str, results["seeds"])),
               *code_in(record.config["given"])]
    text = page.render(record, drawn, name=experiment.name, results=results, heads=HEADS,
                       rows=map(cells, results["rows"]), heading=heading(results),
                       command=shlex.join(command), now=time.strftime("%Y-%m-%d %H:%M"))
    write_text(folder / "report.html", text)
    say(f"{len(drawn)} figures in {folder / 'figures'}, page in {folder / 'report.html'}")


def compare(folders, out):
    """Writes table.md, and table.csv with numbers as in results.json. Returns the Markdown."""
    rows, file = [], io.StringIO()
    for experiment in map(Experiment, folders):
        results = collect(experiment)
        rows += [{"run": experiment.name, "target": results["target"],
                  "teacher_accuracy": results["teacher"]["accuracy"], **row}
                 for row in results["rows"]]
    table = csv.DictWriter(file, rows[0] if rows else ["run"], lineterminator="\n")
    table.writeheader()
    table.writerows(row | {name: " ".join(map(str, row[name])) for name in ("sources", "per_class")}
                    for row in rows)
    markdown = _markdown(["run", *HEADS], [[row["run"], *cells(row)] for row in rows], words=4)
    write_text(Path(out) / "table.csv", file.getvalue())
    write_text(Path(out) / "table.md", markdown)
    return f"{markdown}\ntable.md and table.csv are in {out}"
