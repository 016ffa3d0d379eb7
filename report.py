"""The results table: results.json and results.md from what a run folder holds.

    python report.py --run-dir runs/cifar10
"""
import statistics
from pathlib import Path

from files import UserError, listed, read_json, say, write_json, write_text
from run import APPROACHES, EATS_SOURCES, Parser, command, name_of, name_of_arch

STARTS = {"none": "random weights", "teacher": "their teacher's weights", "auto": "their teacher's weights where the two share their layers, else from random ones"}

# CIFAR10, ResNet-34 teacher, ResNet-18 student, ImageNet weights, all sources; in per cent.
PUBLISHED = {"supervised": 79.65, "eats": 60.67, "mms": 68.02}


def collect(settings, folders):
    """The content of results.json from the run folders of one experiment, one a seed.

    Accuracies are means over the seeds, accuracy_std the sample standard deviation (None for one seed).
    """
    teachers = [read_json(folder / "teacher.json") for folder in folders]
    rows = []
    for approach in sorted(settings.approaches, key=lambda a: APPROACHES.index(a) if a in APPROACHES else len(APPROACHES)):
        students = [read_json(folder / "students" / f"{approach}.json") for folder in folders]
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
    return {"target": name_of(settings.target), "classes": teachers[0].get("classes"), "recipe": settings.recipe, "seeds": list(settings.seeds),
            "teacher": {"arch": name_of_arch(teachers[0]["arch"]), "accuracy": _mean([t["accuracy"] for t in teachers if t["accuracy"] is not None])},
            "rows": rows, "notes": notes(settings, folders)}


def _mean(figures):
    return statistics.fmean(figures) if figures else None


def notes(settings, folders):
    """What the table must not hide, a sentence each."""
    found = [f"Thresholds are calibrated on the {'confidence set' if settings.calibrate == 'target' else 'sources themselves (no target image)'}; "
             + ("one bucket is filled" if settings.no_balance else "buckets are filled") + f" {settings.fill}."]
    if settings.data_free:
        found.append("Data-free: no training image of the target was there; the teacher is as it was given.")
    teacher = read_json(folders[0] / "teacher.json")
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
    if "eats" in settings.approaches and absent:
        found.append(f"eats: without {', '.join(absent)}, which {'is' if len(absent) == 1 else 'are'} not among the sources.")
    if "supervised" in settings.approaches:
        found.append(f"supervised: labelled images of the target, from {'random' if settings.supervised_weights == 'none' else settings.supervised_weights} weights; "
                     f"the other students start from {STARTS.get(settings.student_weights, settings.student_weights + ' weights')}.")
    for approach in settings.approaches:
        students = [read_json(folder / "students" / f"{approach}.json") for folder in folders]
        without = sum(not student["history"] for student in students)
        if without:
            found.append(f"{approach}: no student for {without} of {len(folders)} seeds, since the transfer set was too small to learn from.")
    transfer_sets = [read_json(folder / "transfer" / approach / "summary.json")
                     for folder in folders for approach in settings.approaches if approach != "supervised"]
    unreadable = {name: bad for transfer_set in transfer_sets for name, bad in transfer_set.get("unreadable", {}).items()}
    if unreadable:
        found.append("Images that can't be read are left out: " + ", ".join(f"{name} {bad:,}" for name, bad in unreadable.items()) + ".")
    for folder in folders:
        of_seed = f" (seed {read_json(folder / 'config.json')['seed']})" if len(folders) > 1 else ""
        for approach in (a for a in settings.approaches if a != "supervised"):
            summary = read_json(folder / "transfer" / approach / "summary.json")
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
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines + [""] + [f"- {note}" for note in results["notes"]]) + "\n"


def write(settings, folders):
    """Writes results.json and results.md into the run folder of `settings`. Returns the Markdown."""
    results = collect(settings, folders)
    write_json(Path(settings.run_dir) / "results.json", results)
    markdown = as_markdown(results)
    write_text(Path(settings.run_dir) / "results.md", markdown)
    return markdown


def main(argv):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--run-dir", default="runs/cifar10", metavar="DIR", help="a finished run (default: runs/cifar10)")
    path = Path(parser.parse_args(argv).run_dir) / "results.json"
    if not path.exists():
        raise UserError(f"{path} is missing: make it with `python compile.py --run-dir {path.parent}`")
    say(as_markdown(read_json(path)))


if __name__ == "__main__":
    command(main)
