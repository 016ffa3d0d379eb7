"""What a run folder holds, shown: figures, the page with its gallery in a real browser, comparisons of runs."""
import csv
import io
import itertools
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import compile
import page
import progress
import report
from record import Experiment, Record, dump
from test_own import criterion_file, without

RUN = Path("runs/colours")
HOSTILE = "<img src=x onerror=alert(1)>"


def manifest_of(run, approach):
    """{(source, index)} of a transfer set."""
    with open(run / "transfer" / approach / "manifest.csv", encoding="utf-8", newline="") as file:
        return {(row["source"], int(row["index"])) for row in csv.DictReader(file)}


def content_of(html):
    """What the script of a page reads."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)[1])


def figures_in(run):
    return {path.stem for path in (run / "figures").glob("*.png")}


# --------------------------------------------------------------------------------------------------
# One run
# --------------------------------------------------------------------------------------------------

def test_a_finished_run_is_shown_whole(finished, execute):
    status, out, err = execute(report.main, ["--run-dir", str(RUN)], "report.py")
    assert (status, err) == (0, "")
    assert out.startswith((RUN / "results.md").read_text().rstrip()[:200])
    assert {"accuracy", "curves", "counts", "scores-mms", "scores-entropy", "strip-mms", "strip-entropy"} <= figures_in(RUN)
    assert any(name.startswith("confusion-") for name in figures_in(RUN))
    for path in (RUN / "figures").glob("*.png"):
        with Image.open(path) as image:
            assert min(image.size) > 200 and np.asarray(image.convert("L")).std() > 5      # something is drawn
    html = (RUN / "report.html").read_text()
    assert not re.findall(r"""\s(?:src|href)=(?!["']?(?:data:|#))["']?""", html) and "@import" not in html and not re.findall(r"url\((?!data:)", html)
    for figure in re.findall(r"<figure.*?</figure>", html, re.S):
        assert re.search(r"alt='[^']{20,}'", figure) and "How to read it:" in figure
    assert f"--config {RUN / 'config.json'}" in html and "--teacher-epochs=6" in html


def test_the_page_tells_what_the_manifests_tell(finished):
    report.illustrate(Experiment(RUN))
    shown, record = content_of((RUN / "report.html").read_text()), Record(RUN)
    kept = {approach: manifest_of(RUN, approach) for approach in shown["approaches"]}
    assert shown["count"] == len(set().union(*kept.values())) > 50
    for number in range(shown["count"]):
        image = shown["sources"][shown["source"][number]], shown["index"][number]
        assert [approach for bit, approach in enumerate(shown["approaches"]) if shown["kept"][number] >> bit & 1] == [approach for approach in kept if image in kept[approach]]
        for criterion, scores in zip(shown["criteria"], shown["scores"]):
            assert scores[number] == pytest.approx(float(record.scores[image[0]][criterion][image[1]]), rel=1e-3)
        assert shown["label"][number] == record.scores[image[0]]["predicted"][image[1]]
    _, sheets, pairs = page.gallery_of(record)
    for (one, other), counted in pairs.items():
        assert counted == (len(kept[one] & kept[other]), len(kept[one] - kept[other]), len(kept[other] - kept[one]))
    assert len(pairs) == len(list(itertools.combinations(kept, 2)))
    with Image.open(io.BytesIO(sheets[0])) as sheet:      # the tile of an image is that image
        sheet, selected, pixels = np.asarray(sheet).astype(int), record.selected("random"), record.pixels("random")
        for row in range(0, len(selected), 7):
            where = [number for number in range(shown["count"]) if (shown["source"][number], shown["index"][number]) == (selected.source[row], selected.index[row])]
            y, x = divmod(where[0], shown["across"])
            tile = sheet[y * 32:(y + 1) * 32, x * 32:(x + 1) * 32]
            assert abs(tile - pixels[row]).mean() < abs(tile - pixels[row - 1]).mean() and abs(tile.mean((0, 1)) - pixels[row].mean((0, 1))).max() < 12


def test_the_figures_tell_what_the_files_tell(finished):
    import figures
    record = Record(RUN)
    said = figures.counts(record).text
    for approach, summary in record.summaries.items():
        for source, count in summary["per_source"].items():
            assert f"{source} {count:,}" in said.partition(f"{approach}:")[2].partition(";")[0]
    results = json.loads((RUN / "results.json").read_text())
    said = figures.accuracy([Experiment(RUN)], {}).text
    assert all(f"{row['approach']} {100 * row['accuracy']:.2f}" in said for row in results["rows"] if row["accuracy"] is not None)
    for criterion, high in (("mms", True), ("entropy", False)):
        kept, limits = {name: set(rows.tolist()) for name, rows in record.positions(criterion).items()}, record.threshold(criterion)
        for label, (best, marginal, narrowly, clearly) in figures.ranked(record, criterion).items():
            def worths(places):
                return [float(record.scores[record.sources[source]][criterion][row]) * (1 if high else -1) for source, row in places]
            assert all(row in kept[record.sources[source]] for source, row in best + marginal)
            assert not any(row in kept[record.sources[source]] for source, row in narrowly + clearly)
            in_order = worths(best) + worths(marginal) + worths(narrowly) + worths(clearly)
            assert in_order == sorted(in_order, reverse=True)
            assert not narrowly or worths(narrowly)[0] < limits[label] * (1 if high else -1)
    labels = np.load(RUN / "teacher.npz")["labels"]
    predicted = np.load(RUN / "students" / "random.npz")["predicted"]
    assert f"is right on {np.mean(labels == predicted):.2%} of {len(labels):,} images" in figures.confusion(record, "random").text


STAGES = {"students": ("students",), "transfer sets": ("students", "transfer"), "scores": ("students", "transfer", "scores", "thresholds.json"),
          "teacher": ("students", "transfer", "scores", "thresholds.json", "teacher.json", "teacher.npz", "teacher.pt", "split.npz")}


@pytest.mark.parametrize("lacking", STAGES)
def test_a_run_that_lacks_its_later_stages_is_shown_as_far_as_it_is(finished, execute, lacking):
    for name in (*STAGES[lacking], "results.json", "results.md", "digests.json"):
        path = RUN / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    status, out, err = execute(report.main, ["--run-dir", str(RUN)], "report.py")
    assert (status, err) == (0, "")
    assert "Not finished: " in out and not (RUN / "results.json").exists()
    names, html = figures_in(RUN), (RUN / "report.html").read_text()
    assert not names & {"accuracy", "curves"} and "No student yet." in html
    assert ("counts" in names) == ("strip-mms" in names) == (lacking == "students")
    assert ("scores-mms" in names) == (lacking in ("students", "transfer sets"))
    assert ("Nothing has been selected yet." in html) == (lacking != "students")


def test_figures_of_before_that_are_drawn_no_more_are_gone(finished):
    report.illustrate(Experiment(RUN))
    assert "strip-entropy" in figures_in(RUN)
    shutil.rmtree(RUN / "transfer" / "entropy")
    report.illustrate(Experiment(RUN))
    assert "strip-entropy" not in figures_in(RUN) and "strip-mms" in figures_in(RUN)


def test_a_source_that_is_gone_leaves_what_was_selected(finished, painted, execute, tmp_path):
    config = json.loads((RUN / "config.json").read_text())
    (RUN / "config.json").unlink()
    (RUN / "digests.json").unlink()
    (RUN / "config.json").write_text(json.dumps(config | {"sources": [f"pool={tmp_path / 'gone'}", f"more={painted[2]}"]}))
    status, out, err = execute(report.main, ["--run-dir", str(RUN)], "report.py")
    assert (status, err) == (0, "") and "strip-mms" in figures_in(RUN)
    assert re.search(f"  of pool only selected images are shown: .*{re.escape(str(tmp_path / 'gone'))}: there is no such folder\n", out)


def test_a_criterion_of_the_users_own_has_its_figures_and_its_column(flags, execute, tmp_path):
    mine = criterion_file(tmp_path / "mine.py", "KEEP = '<='\ndef score(z, w): return -z.max(1).values\ndef threshold(s, p, c): return [float('nan') if not (p == k).any() else float(s[p == k].mean()) for k in range(c)]\n")
    status, out, err = execute(compile.main, [*flags, "--approaches", f"mms,{mine}", "--teacher-epochs", "12"])
    assert (status, err) == (0, "")
    assert {"scores-mine", "strip-mine", "scores-mms"} <= figures_in(RUN)
    assert "mine" in content_of((RUN / "report.html").read_text())["criteria"]


def test_seeds_are_shown_together(flags, execute):
    assert execute(compile.main, [*without(flags, "--teacher-epochs"), "--teacher-epochs", "2", "--approaches", "balanced,random", "--seeds", "0,1"])[0] == 0
    experiment, results = Experiment(RUN), json.loads((RUN / "results.json").read_text())
    assert [record.config["seed"] for record in experiment.records] == [0, 1] and all(row["accuracy_std"] is not None for row in results["rows"])
    html = (RUN / "report.html").read_text()
    assert "one standard deviation over the seeds" in html and "seeds 0, 1" in html and (RUN / "figures" / "accuracy.png").exists()


def with_hostile_names(execute):
    """Gives the classes and files of a finished run names that may not come to be markup, one of them no UTF-8, and shows it."""
    for name in ("teacher.json", "thresholds.json"):
        held = json.loads((RUN / name).read_text())
        (RUN / name).unlink()
        (RUN / name).write_text(json.dumps(held | {"classes": [HOSTILE, "</script><script>alert(2)</script>", "\u2028'\"&"]}))
    path = RUN / "transfer" / "random" / "manifest.csv"
    lines = path.read_bytes().split(b"\n")
    path.unlink()
    path.write_bytes(b"\n".join([lines[0], *(line.replace(b"0/", b"<b>\xff0/", 1) for line in lines[1:])]))
    (RUN / "digests.json").unlink()
    status, out, err = execute(report.main, ["--run-dir", str(RUN)], "report.py")
    assert (status, err) == (0, "")


def test_names_cannot_become_a_part_of_the_page(finished, execute):
    with_hostile_names(execute)
    html = (RUN / "report.html").read_bytes().decode()
    assert "<img src=x" not in html and "<script>alert" not in html and "<b>\\" not in html
    assert HOSTILE in content_of(html)["classes"] and any("\\xff" in name or "\\udcff" in name for name in content_of(html)["files"])
    assert json.loads(dump("</script>\u2028")) == "</script>\u2028" and "<" not in dump("</script>")


@pytest.mark.parametrize("argv, said", [(["--run-dir", "nowhere"], "nowhere is no run folder"), (["runs/colours", "nowhere"], "nowhere is no run folder"), (["--run-dir"], "--run-dir")])
def test_what_is_no_run_folder_is_one_line(finished, execute, argv, said):
    status, _, err = execute(report.main, argv, "report.py")
    assert status == 2 and err.count("\n") == 1 and said in err


def test_a_large_gallery_is_a_fair_sample(tmp_path, finished):
    record = Record(RUN)
    most = 12
    shown = page.sampled(record, ["random", "mms"], most)
    for approach, rows in shown.items():
        of_class = np.bincount(record.selected(approach).predicted[rows], minlength=3)
        there = np.bincount(record.selected(approach).predicted, minlength=3)
        assert len(rows) == min(most // 2, there.sum()) and all(of_class >= np.minimum(there, most // 2 // 3))
        assert len(set(rows.tolist())) == len(rows)


# --------------------------------------------------------------------------------------------------
# Several runs
# --------------------------------------------------------------------------------------------------

def test_runs_are_compared_in_tables_ready_for_a_paper(finished, execute):
    for place in ("a_1", "b/a_1"):
        shutil.copytree(RUN, place, copy_function=os.link)
    status, out, err = execute(report.main, ["a_1", "b/a_1", str(RUN), "--out", "out"], "report.py")
    assert (status, err) == (0, "")
    with open("out/table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    results = json.loads((RUN / "results.json").read_text())
    assert len({row["run"] for row in rows}) == 3 and len(rows) == 3 * len(results["rows"])
    for row, expected in zip(rows, results["rows"] * 3):
        assert row["approach"] == expected["approach"] and int(row["images"]) == expected["transfer_size"]
        assert row["accuracy %"] == ("" if expected["accuracy"] is None else f"{100 * expected['accuracy']:.2f}")
    markdown, latex = Path("out/table.md").read_text(), Path("out/table.tex").read_text()
    assert markdown in out and {line.count("|") for line in markdown.splitlines()} == {len(report.COMPARED) + 1}
    body = [line for line in latex.splitlines() if line.endswith(r"\\")]
    assert {line.count(" & ") for line in body} == {len(report.COMPARED) - 1} and r"a\_1" in latex and r"accuracy \%" in latex and r"$\pm$" in latex
    assert not re.search(r"(?<!\\)[%_#]", latex)
    html = Path("out/report.html").read_text()
    assert "3 runs compared" in html and figures_in(Path("out")) >= {"accuracy"}


def test_accuracy_is_drawn_against_the_number_of_images_where_there_are_several(finished, flags, execute):
    import figures
    assert figures.sizes([Experiment(RUN)]) is not None         # balanced, random and mms differ in size
    few = [*flags, "--approaches", "random", "--transfer-size", "30", "--run-dir", "runs/few", "--teacher-checkpoint", str(RUN / "teacher.pt")]
    assert execute(compile.main, few)[0] == 0
    said = figures.sizes([Experiment(RUN), Experiment("runs/few")]).text
    few, many = (json.loads((Path(run) / "transfer" / "random" / "summary.json").read_text())["size"] for run in ("runs/few", RUN))
    assert few < many and re.search(rf"random: {few} images [\d.]+, {many} images [\d.]+;", said)


# --------------------------------------------------------------------------------------------------
# In a browser
# --------------------------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def browser():
    """Chromium, as it is installed. Where it or the package that drives it is not, the tests here say so and are skipped."""
    reason = "NOT TESTED IN A BROWSER: {}"
    driver = pytest.importorskip("playwright.sync_api", reason=reason.format("pip install -r requirements-extra.txt"))
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip(reason.format("no Chromium is installed (apt-get install chromium)"))
    with driver.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="session")
def shown_page(finished_run):
    path = finished_run / RUN / "report.html"
    if not path.exists():
        report.illustrate(Experiment(finished_run / RUN))
    return path


def opened(browser, path, width, scheme):
    """(the page, a list that what it complains of and what it asks for is added to)."""
    shown, complaints = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme), []
    shown.on("console", lambda message: complaints.append(message.text))
    shown.on("pageerror", lambda error: complaints.append(str(error)))
    shown.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
    shown.on("request", lambda request: None if request.url.startswith("data:") or request.url == path.resolve().as_uri() else complaints.append(request.url))
    shown.on("requestfailed", lambda request: complaints.append(f"failed: {request.url[:80]}"))
    shown.goto(path.resolve().as_uri())
    shown.wait_for_selector(".tile")
    return shown, complaints


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_in_a_browser(browser, shown_page, width, scheme):
    shown, complaints = opened(browser, shown_page, width, scheme)
    data = content_of(shown_page.read_text())
    assert shown.evaluate("document.documentElement.scrollWidth") <= width
    background = shown.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 200) == (scheme == "dark")
    assert shown.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 100)")

    def listed():
        """What the gallery shows, from its text for who cannot see it."""
        shown.evaluate("document.getElementById('grid').scrollTop = 0")
        return shown.eval_on_selector_all(".tile", "tiles => tiles.map(tile => tile.getAttribute('aria-label'))")

    def number():
        return int(shown.inner_text("#count").split()[0].replace(",", ""))
    kept = {approach: [i for i in range(data["count"]) if data["kept"][i] >> bit & 1] for bit, approach in enumerate(data["approaches"])}
    for approach, images in kept.items():                               # filters
        shown.select_option("#approach", label=approach)
        assert number() == len(images)
    shown.select_option("#approach", label="random")
    for label, name in enumerate(data["classes"]):
        shown.select_option("#label", label=name)
        assert number() == sum(data["label"][i] == label for i in kept["random"]) and all(each.startswith(f"{name}, ") for each in listed())
    shown.select_option("#label", "")
    shown.select_option("#source", label="more")
    assert number() == sum(data["sources"][data["source"][i]] == "more" for i in kept["random"]) and all(", from more, " in each for each in listed())
    shown.select_option("#source", "")
    for falling in (True, False):                                       # sorts
        shown.select_option("#sort", label="mms")
        shown.select_option("#falling", "1" if falling else "0")
        scores = [float(re.search(r"mms (-?[\d.e+]+)", each)[1]) for each in listed()]
        assert len(scores) > 3 and scores == sorted(scores, reverse=falling)
    shown.select_option("#without", label="mms")
    assert number() == len(set(kept["random"]) - set(kept["mms"]))
    shown.select_option("#without", "")

    def chosen():
        return shown.evaluate("document.getElementById('grid').getAttribute('aria-activedescendant')")
    columns = shown.evaluate("(() => { const tiles = [...document.querySelectorAll('.tile')], top = tiles[0].style.top; return tiles.filter(tile => tile.style.top === top).length })()")
    shown.focus("#grid")                                                # moves by keyboard
    for key, place in (("ArrowRight", 1), ("ArrowDown", 1 + columns), ("ArrowLeft", columns), ("ArrowUp", 0), ("ArrowLeft", 0), ("End", len(kept["random"]) - 1), ("Home", 0)):
        shown.keyboard.press(key)
        assert chosen() == f"tile{place}"
    first = shown.inner_text("#about")
    shown.keyboard.press("ArrowRight")
    assert shown.inner_text("#about") != first and "kept by" in first
    shown.keyboard.press("Tab")
    assert shown.evaluate("document.activeElement.id") != "grid"        # nobody is caught in it
    shown.locator("button[data-approach]").first.click()
    assert shown.evaluate("document.activeElement.id") == "grid"
    assert complaints == []
    shown.close()


def test_a_page_of_hostile_names_in_a_browser(browser, finished, execute):
    with_hostile_names(execute)
    shown, complaints = opened(browser, RUN / "report.html", 1280, "light")
    assert HOSTILE in shown.inner_text("#label") and complaints == []
    shown.close()


# --------------------------------------------------------------------------------------------------
# While it runs
# --------------------------------------------------------------------------------------------------

def test_plain_lines_tell_loss_accuracy_and_the_time_for_everything(flags, execute, monkeypatch):
    monkeypatch.setattr(progress.Progress, "INTERVAL", 0.0)
    monkeypatch.setattr(progress, "_pace", {})
    status, out, err = execute(compile.main, [*flags, "--approaches", "supervised,mms,random"])
    assert (status, err) == (0, "")
    lines = [line for line in out.splitlines() if line.startswith("  ") and "img/s" in line]
    of = {label: [line for line in lines if line.startswith(f"  {label}: ")] for label in ("teacher", "scoring pool", "student supervised", "student mms", "student random")}
    assert all(of.values())
    for label in ("teacher", "student supervised"):
        assert re.search(r": [\d,]+ of [\d,]+ img, [\d,]+ img/s, [\d,]+ s left \(everything: about \d+ (s|min)\), epoch 1/\d+, loss \d+\.\d+$", of[label][0])
        assert re.search(r"confidence set \d+\.\d\d%$", of[label][-1])
    assert not any("everything" in line for line in of["student random"])       # nothing follows


def test_the_time_for_everything_is_that_of_the_pieces(monkeypatch):
    monkeypatch.setattr(progress, "_pace", {"scoring": 0.001})
    progress.expect([("teacher", 100), ("scoring a", 1000), ("scoring b", 500), ("student mms", 200), ("student all", 0)])
    assert progress.seconds_to_come() == pytest.approx(100 * 0.005 + 1.0 + 0.5 + 200 * 0.0034)
    progress.Progress("scoring a", 1000)
    assert progress.seconds_to_come() == pytest.approx(0.5 + 200 * 0.0034)
    progress._pace["student"] = 0.01
    assert progress.seconds_to_come() == pytest.approx(0.5 + 2.0)
    progress.Progress("evaluating", 10)
    assert progress.seconds_to_come() == pytest.approx(2.5)
    progress.Progress("student mms", 200)
    assert progress.seconds_to_come() == 0
    monkeypatch.setattr(progress, "_pace", {})
    assert progress.seconds_to_come() is None
    assert [progress.duration(seconds) for seconds in (7, 99.4, 100, 5999, 6000, 90_000)] == ["7 s", "99 s", "2 min", "1 h 40 min", "1 h 40 min", "25 h 00 min"]


def test_tensorboard_is_given_losses_accuracies_and_views(flags, execute):
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="NOT TESTED: --tensorboard; pip install -r requirements-extra.txt")
    asked = [*flags, "--approaches", "random"]
    assert execute(compile.main, [*asked, "--tensorboard"])[0] == 0
    student = json.loads((RUN / "students" / "random.json").read_text())
    events = loader.EventAccumulator(str(RUN / "tensorboard" / "student-random"))
    events.Reload()
    size = json.loads((RUN / "transfer" / "random" / "summary.json").read_text())["size"]
    steps = 2 * max(1, size // 16)
    assert [event.step for event in events.Scalars("loss")] == list(range(steps))
    assert [event.value for event in events.Scalars("epoch_loss")] == pytest.approx([epoch["loss"] for epoch in student["history"]])
    assert [event.value for event in events.Scalars("confidence_accuracy")] == pytest.approx([epoch["confidence_accuracy"] for epoch in student["history"]])
    assert np.mean([event.value for event in events.Scalars("loss")[:steps // 2]]) == pytest.approx(student["history"][0]["loss"], rel=1e-4)
    views = events.Images("views")
    assert [view.step for view in views] == [0, steps // 2] and views[0].height > 32
    before = (RUN / "students" / "random.pt").read_bytes()
    assert execute(compile.main, [*asked, "--restart-from", "students"])[0] == 0 and not (RUN / "tensorboard" / "student-random").exists() and (RUN / "tensorboard" / "teacher").exists()
    assert (RUN / "students" / "random.pt").read_bytes() == before         # watching changes nothing


def test_tensorboard_that_is_not_there_is_one_line(flags, execute, monkeypatch):
    import importlib.util
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "tensorboard" else found(name, *rest))
    status, _, err = execute(compile.main, [*flags, "--tensorboard"])
    assert (status, err) == (2, "compile.py: --tensorboard needs a package that is not installed: pip install tensorboard\n") and not RUN.exists()
