"""What a run folder holds, shown: table, notes, figures, the page in a browser, comparisons."""
import csv
import io
import itertools
import json
import re
import shutil
import time
from base64 import b64decode
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import run_script
from PIL import Image
from script_files import manifest, read

from kd import board, report
from kd.files import file_digest, write_sealed
from kd.record import Experiment
from kd.settings import resolve

HOSTILE = ("<img src=x onerror=alert(1)>", "</script><script>alert(2)</script>",
           "'\"& $x_1$ {{ 7 }} \U0001faef蚂蚁")        # in letters that no font has
CLASSES = ("cat", "dog", "owl")
SOURCES = ("glyphs", "photos")
APPROACHES = ("supervised", "random", "mms", "entropy")
INDEX = np.arange(0, 60, 2)             # of the 60 images of a source every other one was readable
PREDICTED = np.arange(30) % 3
MMS = {"glyphs": 15 - np.arange(30) / 2, "photos": 10 - np.arange(30) / 3}


def pixels_of(source, index):
    """Each image has a colour of its own."""
    colours = [(40 + 60 * SOURCES.index(source), 4 * int(i), 200 - 3 * int(i)) for i in index]
    return np.broadcast_to(np.array(colours, np.uint8)[:, None, None], (len(index), 8, 8, 3))


def write_product(folder, name, content, *files, **arrays):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if arrays:
        np.savez(path.with_suffix(".npz"), **arrays)
        files = [path.with_suffix(".npz")]
    write_sealed(path, {"made_from": {"images": "as it was"}} | content | {"files": {
        file.relative_to(folder).as_posix(): file_digest(file) for file in files}})


def write_transfer_set(folder, approach, chosen, classes):
    """chosen: [(source, row of its scores)]. Returns how many of them each class has."""
    place = folder / f"transfer/{approach}"
    place.mkdir(parents=True)
    score_of = {"entropy": lambda mms: 1 / (1 + mms)}.get(approach, float)
    with open(place / "manifest.csv", "w", newline="") as file:
        csv.writer(file).writerows([("source", "index", "file", "predicted", "score"), *(
            (source, INDEX[i], f"<b>{i}.png", PREDICTED[i], score_of(MMS[source][i]))
            for source, i in chosen)])
    np.save(place / "images.npy",
            np.concatenate([pixels_of(source, INDEX[[i]]) for source, i in chosen]))
    per_class = np.bincount(PREDICTED[[i for _, i in chosen]], minlength=3).tolist()
    write_product(folder, f"transfer/{approach}/summary.json", {
        "size": len(chosen), "bucket": 18, "per_class": per_class, "classes": classes,
        "made_from": resolve({"target": "digits", "floor": 0.5}).of_stage("transfer"),
        "per_source": Counter(source for source, _ in chosen),
        "unreadable": {"photos": 30} if approach == "random" else {}, "below_threshold": {},
        "shortfall": {} if approach == "random" else {
            name: 18 - count for name, count in zip(classes, per_class, strict=True)},
        "no_threshold": list(classes[2:]) * (approach == "mms"), "calibrated_on": "target"},
        place / "images.npy", place / "manifest.csv")
    return per_class


def write_run(folder, seed=0, accuracy=0.6, least=3.0, classes=CLASSES):
    """A finished run. mms keeps scores from `least` on, and has no threshold for owls.
    Returns the folder."""
    folder.mkdir(parents=True)
    write_sealed(folder / "config.json", {"sources": list(SOURCES), "commit": None, "command": [
        "--target=digits", "--sources=glyphs,photos", f"--approaches={','.join(APPROACHES)}",
        f"--seeds={seed}"]})
    write_product(folder, "teacher.json", {
        "arch": "resnet34", "classes": classes, "accuracy": 0.9, "confidence_accuracy": 0.8,
        "linear_head": True})
    write_product(folder, "thresholds.json", {
        "mms": [least, least, None], "entropy": [0.2] * 3, "classes": classes,
        "keeps_high": {"mms": True, "entropy": False}})
    chosen = {"random": [(source, i) for source in SOURCES for i in range(30)],
              "mms": [], "entropy": []}
    for source, mms in MMS.items():
        write_product(folder, f"scores/{source}.json", {}, index=INDEX, predicted=PREDICTED,
                      mms=mms.astype(np.float32), entropy=(1 / (1 + mms)).astype(np.float32))
        chosen["mms"] += [(source, i) for i in range(30) if mms[i] >= least and PREDICTED[i] < 2]
        chosen["entropy"] += [(source, i) for i in range(30) if mms[i] >= 4]
    write_product(folder, "scores/confidence.json", {}, index=INDEX, predicted=PREDICTED,
                  mms=MMS["glyphs"] + 2, entropy=np.linspace(0, 1, 30))
    per_class = {"supervised": [400] * 3}
    for place, approach in enumerate(APPROACHES):
        if approach != "supervised":
            per_class[approach] = write_transfer_set(folder, approach, chosen[approach], classes)
        reached = accuracy + 0.05 * place
        write_product(folder, f"students/{approach}.json", {
            "arch": "resnet18", "sources": ["digits"] if approach == "supervised" else SOURCES,
            "transfer_size": sum(per_class[approach]), "per_class": per_class[approach],
            "accuracy": reached, "retention": reached / 0.9, "agreement": 0.8,
            "seconds": 3.0 + 2 * seed, "images_per_second": 1500.0, "history": [
                {"loss": 1 / epoch, "confidence_accuracy": 0.1 * epoch} for epoch in (1, 2, 3)]})
    return folder


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A run and its page."""
    run = write_run(tmp_path_factory.mktemp("report") / "run")
    report.illustrate(Experiment(run))
    return run


def data_in(html):
    return json.loads(re.search(r'id="data">(.*?)</script>', html)[1])


def figures_in(run):
    return {path.stem for path in (run / "figures").glob("*.png")}


@pytest.mark.quick
def test_the_table_has_means_and_deviations_over_the_seeds(tmp_path):
    write_run(tmp_path / "seed-0", accuracy=0.6)
    write_run(tmp_path / "seed-1", accuracy=0.7, seed=1)
    table = report.write(Experiment(tmp_path))
    assert table == (tmp_path / "results.md").read_text()
    assert table.startswith("Target digits, recipe quick, seed 0, 1. Teacher resnet34, 90.00%.\n\n"
                            "| approach | student | sources | images | per class | accuracy % | "
                            "retention | agreement % | seconds | img/s |\n")
    # Accuracies 0.70 and 0.80: mean 0.75, deviation 0.1 / sqrt(2). 15 - i/2 >= 3 up to i = 24, 10 -
    # i/3 >= 3 up to i = 21: 17 + 15 images that are no owls.
    assert ("| mms | resnet18 | glyphs, photos | 32 | 0 to 17 | 75.00 ± 7.07 | 0.833 | 80.00 | 4 | "
            "1,500 |\n") in table
    assert "| supervised | resnet18 | digits | 1,200 | 400 | 65.00 ± 7.07 | 0.722 |" in table
    results = read(tmp_path, "results.json")
    assert set(results) == {"target", "classes", "recipe", "seeds", "teacher", "rows", "notes"}
    assert set(results["rows"][0]) >= {
        "approach", "student", "sources", "transfer_size", "per_class", "accuracy", "accuracy_std",
        "retention", "agreement", "seconds", "images_per_second"}


@pytest.mark.quick
def test_what_is_unknown_is_a_dash(tmp_path):
    run = write_run(tmp_path / "run")

    def table_with(name, **changes):
        write_sealed(run / name, read(run, name) | changes)
        return report.as_markdown(report.collect(Experiment(run)))
    assert "Teacher resnet34, accuracy unknown.\n" in table_with("teacher.json", accuracy=None)
    assert "| 0 to 17 | - | - | - | 3 | 1,500 |" in table_with(
        "students/mms.json", accuracy=None, retention=None, agreement=None)
    table = table_with("students/mms.json", history=[])
    assert "| 0 to 17 | - | - | - | - | - |" in table
    assert "There is no student of mms: its transfer set is too small" in table
    assert "The student of mms is pruned from the teacher" in table_with(
        "students/mms.json", weights="teacher")


@pytest.mark.quick
def test_what_the_table_must_not_hide_is_said_in_plain_sentences(finished):
    assert report.collect(Experiment(finished))["notes"] == [
        "Selected with --threshold 0.9 --calibrate target --floor 0.5 --fill random.",
        "The supervised student learns from labels and starts from random weights.",
        "Images that can't be read, or get no finite logits, are left out of random: photos (30).",
        "Classes with fewer than 18 images in mms: cat (17), dog (15), owl (0).",
        "Classes without a threshold in mms: owl. No image of the confidence set gives them "
        "one.",
        "Classes with fewer than 18 images in entropy: cat (15), dog (14), owl (13)."]


LATER = ["students", "transfer", "scores", "thresholds.json", "teacher.json"]
STAGES = {"students": 1, "transfer sets": 2, "scores": 4, "teacher": 5}


@pytest.mark.parametrize("lacking", STAGES)
def test_an_unfinished_run_is_shown_as_far_as_it_is(tmp_path, lacking):
    run = write_run(tmp_path / "run")
    for path in (run / name for name in LATER[:STAGES[lacking]]):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    done = run_script("report.py", "--run-dir", run, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "") and not (run / "results.json").exists()
    assert "- Not made yet: supervised, random, mms, entropy.\n" in done.stdout
    html, names = (run / "report.html").read_text(), figures_in(run)
    assert "No student yet." in html and not names & {"accuracy", "curves"}
    assert ("counts" in names) == ("strip-mms" in names) == (lacking == "students")
    assert ("scores-mms" in names) == (lacking in ("students", "transfer sets"))
    assert ("Nothing has been selected yet." in html) == (lacking != "students")


def test_what_is_damaged_is_left_out_and_what_is_no_run_is_one_line(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "transfer/random/images.npy").write_bytes(b"cut")
    done = run_script("report.py", run, cwd=tmp_path)
    assert done.returncode == 0 and "random/images.npy is damaged" in done.stdout
    done = run_script("report.py", run, "nowhere", cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "nowhere is not a run folder" in done.stderr


def test_runs_are_compared_in_markdown_and_csv(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", accuracy=0.5, least=6.0)
    done = run_script("report.py", "a", "b", "--out", "out", cwd=tmp_path)
    table = (tmp_path / "out/table.md").read_text()
    assert (done.returncode, done.stderr) == (0, "") and table in done.stdout
    assert len(table.splitlines()) == 2 + 2 * len(APPROACHES)
    assert "| b | mms | resnet18 | glyphs, photos | 22 | 0 to 12 | 60.00 | 0.667 | 80.00 |" in table
    with open(tmp_path / "out/table.csv", newline="") as file:
        row = list(csv.DictReader(file))[6]
    assert (row["run"], row["approach"], row["accuracy_std"]) == ("b", "mms", "")
    assert (row["per_class"], float(row["accuracy"])) == ("12 10 0", pytest.approx(0.6))


def test_the_page_tells_what_the_manifests_tell(finished):
    html, kept = (finished / "report.html").read_text(), {}
    shown = data_in(html)
    for approach in shown["approaches"]:
        kept[approach] = {(row["source"], int(row["index"]))
                          for row in manifest(finished, approach)}
    assert shown["count"] == len(set().union(*kept.values()))
    sheet = re.search(r"sheet0: url\(data:image/webp;base64,([^)]*)", html)[1]
    sheet = np.asarray(Image.open(io.BytesIO(b64decode(sheet)))).astype(int)
    for number in range(shown["count"]):
        source, index = shown["sources"][shown["source"][number]], shown["index"][number]
        assert shown["kept"][number] == sum(((source, index) in images) << bit
                                            for bit, images in enumerate(kept.values()))
        assert shown["scores"][0][number] == pytest.approx(MMS[source][index // 2], rel=1e-3)
        assert shown["label"][number] == PREDICTED[index // 2]
        y, x = number // shown["across"] * 8 + 4, number % shown["across"] * 8 + 4
        assert abs(sheet[y, x] - pixels_of(source, [index])[0, 0, 0]).max() < 30
    for one, other in itertools.combinations(kept, 2):
        row = re.search(rf"<td>{one}, {other}</td>(.*?)</tr>", html)[1]
        assert [int(each) for each in re.findall(r"<td>(\d+)", row)] == [len(each) for each in (
            kept[one] & kept[other], kept[one] - kept[other], kept[other] - kept[one])]
    assert "<pre>python compile.py --target=digits --sources=glyphs,photos " in html
    # Every figure is there, and says in words what it shows.
    alternatives = " ".join(re.findall(r'<img alt="([^"]{20,})"', html))
    assert "mms: glyphs 17, photos 15" in alternatives and "mms 0.333" in alternatives
    assert figures_in(finished) == {"accuracy", "curves", "counts", "scores-mms", "scores-entropy",
                                    "strip-mms", "strip-entropy"}
    assert html.count("<img alt=") == html.count("How to read it:") == 7


@pytest.fixture(scope="session")
def browser():
    driver = pytest.importorskip("playwright.sync_api", reason="NOT TESTED IN A BROWSER")
    program = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    if program is None:
        pytest.skip("NOT TESTED IN A BROWSER: no Chromium is installed (apt-get install chromium)")
    with driver.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield opened
        opened.close()


def opened(browser, path, width=1280, scheme="light"):
    """(the page, a list that what it complains of and what it asks for is added to)."""
    shown = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    complaints, own = [], path.resolve().as_uri()
    shown.on("console", lambda message: complaints.append(message.text))
    shown.on("pageerror", lambda error: complaints.append(str(error)))
    shown.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
    shown.on("request", lambda asked: asked.url.startswith(("data:", own))
             or complaints.append(asked.url))
    shown.goto(own)
    shown.wait_for_selector(".tile")
    return shown, complaints


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_gallery_in_a_browser(browser, finished, width, scheme):
    shown, complaints = opened(browser, finished / "report.html", width, scheme)
    data = data_in((finished / "report.html").read_text())
    kept = {approach: {i for i in range(data["count"]) if data["kept"][i] >> bit & 1}
            for bit, approach in enumerate(data["approaches"])}

    def select(**values):
        """(how many images are said, the texts of the first tiles)."""
        for name, value in values.items():
            shown.select_option(f"#{name}", label=value)
        tiles = shown.eval_on_selector_all(".tile", "all => all.map(tile => tile.ariaLabel)")
        return int(shown.inner_text("#count").split()[0]), tiles
    assert shown.evaluate("document.documentElement.scrollWidth") <= width
    background = shown.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")
    assert shown.evaluate("[...document.images].every(image => image.naturalWidth > 100)")
    assert select(approach="mms")[0] == len(kept["mms"])
    assert select(approach="entropy", without="mms")[0] == len(kept["entropy"] - kept["mms"])
    count, tiles = select(without="-", label="dog", source="photos", sort="mms")
    scores = [float(re.search(r"mms ([\d.]+)", each)[1]) for each in tiles]
    assert count == 6 and all(tile.startswith("dog, from photos, ") for tile in tiles)
    assert scores == sorted(scores, reverse=True)
    assert select(falling="smallest first")[1] == tiles[::-1]
    select(label="any", source="any")
    columns = shown.evaluate("[...document.querySelectorAll('.tile')].filter(tile => "
                             "tile.style.top === document.querySelector('.tile').style.top).length")
    shown.focus("#grid")
    for key, place in (("ArrowRight", 1), ("ArrowDown", 1 + columns), ("ArrowLeft", columns),
                       ("ArrowUp", 0), ("End", len(kept["entropy"]) - 1), ("Home", 0)):
        shown.keyboard.press(key)
        assert shown.get_attribute("#grid", "aria-activedescendant") == f"tile{place}"
    assert "kept by" in shown.inner_text("#about") and "<b>" in shown.inner_text("#about")
    shown.keyboard.press("Tab")
    assert shown.evaluate("document.activeElement.id") != "grid"        # nobody is caught in it
    shown.locator("button[data-approach]").first.click()
    assert shown.evaluate("document.activeElement.id") == "grid" and complaints == []
    shown.close()


@pytest.mark.filterwarnings("error")
def test_hostile_names_cannot_become_a_part_of_the_page(tmp_path, request, capsys):
    run = write_run(tmp_path / "run", classes=HOSTILE)
    report.illustrate(Experiment(run))
    assert capsys.readouterr().out.startswith("No font here has all letters of the class names")
    html = (run / "report.html").read_text()
    assert "<img src=x" not in html and "<script>alert" not in html
    assert data_in(html)["classes"] == list(HOSTILE)
    shown, complaints = opened(request.getfixturevalue("browser"), run / "report.html")
    assert all(name in shown.inner_text("main ul") for name in HOSTILE) and complaints == []
    shown.close()


def test_wandb_gets_losses_figures_and_views(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = tmp_path / "run" / "wandb" / "student-mms"
    shown = board.Board({"wandb": folder})
    shown.views(2, torch.zeros(4, 8, 8, 3, dtype=torch.uint8))
    shown.figures(3, epoch_loss=0.375)
    shown.close()
    run_id = (folder / "id").read_text()       # by which a resumed training continues it
    [file] = folder.rglob(f"run-{run_id}.wandb")
    wanted = (b"run student-mms", b"epoch_loss", b"0.375")
    waited = time.monotonic()
    while not all(word in file.read_bytes() for word in wanted):    # another process writes it
        assert time.monotonic() < waited + 60
        time.sleep(0.05)
    assert len(list(tmp_path.rglob("*.png"))) == 1
