"""The table of a run or of several, and what a run folder holds as figures and as a page."""
import csv
import io
import logging
import shlex
import statistics
import time
from pathlib import Path

from kd.files import listed, write_json, write_text
from kd.flags import flag_of
from kd.record import Experiment, accuracy_text, mean, shown
from kd.settings import DRAWN_BY_WEIGHT, EATS_SOURCES, FIELDS, ON_TARGET
from kd.values import name_of, name_of_arch

HEADS = ("approach", "student", "sources", "images", "per class", "accuracy %", "retention",
         "agreement %", "seconds", "img/s")
logging.getLogger("matplotlib").setLevel(logging.ERROR)     # of its own folders and fonts


def collect(experiment):
    """The content of results.json, as far as there is something. Figures are means over the seeds,
    accuracy_std is the sample deviation (None for one seed)."""
    settings, records, rows = experiment.first.settings, experiment.records, []
    for approach in experiment.approaches:
        students = [each.students[approach] for each in records if approach in each.students]
        trained = experiment.trained(approach)
        known = [each["accuracy"] for each in trained if each["accuracy"] is not None]
        rows += [{
            "approach": approach, "student": name_of_arch(students[0]["arch"]),
            "sources": students[0]["sources"],
            "transfer_size": round(mean(each["transfer_size"] for each in students)),
            "per_class": [round(mean(counts)) for counts in zip(
                *(each["per_class"] for each in students), strict=True)],
            "accuracy": mean(known),
            "accuracy_std": statistics.stdev(known) if len(known) > 1 else None,
            **{name: mean(each.get(name) for each in trained) for name in
               ("retention", "agreement", "source_agreement", "seconds", "images_per_second")},
            "parameters": students[0].get("parameters")}] if students else []
    arch = experiment.first.teacher.get("arch", settings.teacher_arch)
    return {"target": name_of(settings.target), "classes": experiment.first.classes,
            "recipe": settings.recipe, "seeds": [each.settings.seed for each in records],
            "teacher": {"arch": name_of_arch(arch), "accuracy": experiment.teacher_accuracy,
                        "parameters": experiment.first.teacher.get("parameters")},
            "rows": rows, "notes": [shown(note) for note in notes(experiment)]}


def notes(experiment):
    """What the table must not hide, in sentences."""
    record, approaches, records = experiment.first, experiment.approaches, experiment.records
    settings, held = record.settings, record.held_out
    unfinished = [name for name in settings.rows
                  if any(name not in each.students for each in records)]
    absent = [name for name in EATS_SOURCES if name not in record.sources]
    supervised, size = experiment.trained("supervised"), record.teacher.get("parameters")
    start = next((each.get("weights", "none") for each in supervised), "none")
    others = [name for name in approaches if any(
        each.students[name].get("test", each.test) != each.test
        for each in records if name in each.students)]
    made_of = [[each.students[name]["made_from"] for each in records if name in each.students]
               for name in approaches]      # of each approach, by seed
    unlike = [flag_of(key) for key in FIELDS if any(
        each.get(key) != some[0].get(key) for some in made_of for each in some)]
    sizes = {name_of_arch(each["arch"]): each["parameters"] for each in record.students.values()
             if each.get("parameters")}
    selected = set(approaches) - {*ON_TARGET, "all", "matched", *DRAWN_BY_WEIGHT}
    made = next((each["made_from"] for each in record.summaries.values()), settings.of_stage(
        "transfer"))
    found = [sentence for true, sentence in (
        (unfinished, f"Not made yet: {listed(unfinished)}."),
        (settings.limit, f"A trial run with at most {settings.limit} images of each data set."),
        (settings.data_free, "Data-free: no training image of the target was used."),
        (held and experiment.teacher_accuracy is None,
         f"Agreement: on {held.get('images', 0):,} images of the sources that no student learned "
         "from; always answering the most frequent class would reach "
         f"{held.get('largest_class', 0):.2%}."),
        (settings.mms_plain and not record.teacher.get("linear_head", True),
         "MMS is the plain margin z_a - z_b: no linear layer makes the teacher's logits."),
        (record.thresholds and selected,
         f"Selected with --threshold {made['threshold']} --calibrate {made['calibrate']} --floor "
         f"{made['floor']:g} --fill {made['fill']}{' --no-balance' * made['no_balance']}."),
        ("eats" in approaches and absent,
         f"eats does without {listed(absent)}: not among the sources."),
        (unlike, f"The seeds differ in {listed(unlike)}: a mean over them says little."),
        (others, f"Measured on another test split than the teacher: {listed(others)}."),
        ("original" in approaches, "The student of original learns from the target's own training "
         "images: what other images are held against."),
        (supervised, "The supervised student learns from labels and starts from "
         f"{'random' if start == 'none' else name_of_arch(start)} weights.")) if true]
    if size and sizes:
        counts = listed([f"{arch} has {count:,}" for arch, count in sizes.items()])
        found.append(f"Parameters: {counts}, the teacher {size:,}.")
    said = {}       # {sentence about @: approaches}: what is true of several is said once
    for each in records:
        seed = f" (seed {each.settings.seed})" * (len(records) > 1)
        for approach in (name for name in approaches if name in each.summaries):
            summary = each.summaries[approach]
            for sentence in about_transfer_set(summary, each.students.get(approach)):
                said.setdefault(sentence, []).append(approach + seed)
    return found + [sentence.replace("@", listed(names), 1) for sentence, names in said.items()]


def about_transfer_set(summary, student=None):
    """Sentences about it and about its student, with @ where the approach comes."""
    got = dict(zip(summary["classes"], summary["per_class"], strict=True))
    for words, counts in (
            (f"Classes with fewer than {summary['bucket']:,} images in @",
             {name: got[name] for name in summary["shortfall"]}),
            ("Images below the threshold that --floor let in for @", summary["below_threshold"]),
            ("Images that can't be read, or get no finite logits, are left out of @",
             summary["unreadable"])):
        if counts:
            yield f"{words}: {listed([f'{name} ({count:,})' for name, count in counts.items()])}."
    if summary["no_threshold"]:
        where = "confidence set" if summary["calibrated_on"] == "target" else "sources"
        yield (f"Classes without a threshold in @: {listed(summary['no_threshold'])}. No image "
               f"of the {where} gives them one.")
    if student and student.get("weights") == "teacher":
        yield ("The student of @ is pruned from the teacher: it starts with the teacher's layers, "
               "which keep most of its accuracy on any images.")
    if student and student.get("bfloat16"):
        yield "The student of @ learned in bfloat16."
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
    return [row["approach"], row["student"], ", ".join(row["sources"]), f"{row['transfer_size']:,}",
            extent(row["per_class"]),
            accuracy_text(row), number("retention", ".3f"),
            number("source_agreement", ".2f", 100) + " (sources)" if row["agreement"] is None and
            row["source_agreement"] is not None else number("agreement", ".2f", 100),
            number("seconds", ",.0f"),
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
    """Writes results.json and results.md of a run. Returns the Markdown."""
    results = collect(experiment)
    write_json(experiment.folder / "results.json", results)
    write_text(experiment.folder / "results.md", as_markdown(results))
    return as_markdown(results)


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


def illustrate(experiment):
    """Writes figures/*.png and report.html of a run, finished or not. Returns a line about them."""
    from kd import figures, page
    results, record = collect(experiment), experiment.first
    drawn = figures.save(experiment.folder / "figures", figures.of_run(record, results))
    command = ["python", "compile.py", "--config", str(record.folder / "config.json"), "--run-dir",
               "runs/again", "--seeds", ",".join(map(str, results["seeds"]))]
    text = page.render(record, drawn, name=experiment.name, results=results, heads=HEADS,
                       rows=map(cells, results["rows"]), heading=heading(results),
                       command=shlex.join(command), now=time.strftime("%Y-%m-%d %H:%M"))
    write_text(experiment.folder / "report.html", text)
    return (f"{len(drawn)} figures in {experiment.folder / 'figures'}, page in "
            f"{experiment.folder / 'report.html'}")
