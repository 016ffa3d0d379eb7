"""What a run folder holds, shown: table, notes, figures, the page in a browser, comparisons."""
import csv
import io
import json
import re
import shutil
import time
from base64 import b64decode
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import refusal, run_script, small_run
from PIL import Image
from script_files import manifest, put, ran, read

from kd import board, report
from kd.files import file_digest, write_sealed
from kd.record import Experiment

HOSTILE = ("<img src=x onerror=alert(1)>", "</script><script>alert(2)</script>",
           "'\"& $x_1$ {{ 7 }} \U0001faef蚂蚁")        # in letters that no font has
CLASSES = ("blue", "green", "red")


@pytest.fixture(scope="module")
def finished(painted, tmp_path_factory):
    """A run with every other image of pool: which one it is, is not its row of the scores."""
    folder = tmp_path_factory.mktemp("report") / "run"
    ran("compile.py", [*small_run(painted), "--run-dir", folder, "--limit", "60"])
    return folder


def change(run, name, **changes):
    write_sealed(run / name, read(run, name) | changes)


def data_in(html):
    return json.loads(re.search(r'id="data">(.*?)</script>', html)[1])


def figures_in(run):
    return {path.stem for path in (run / "figures").glob("*.png")}


def table_of(folder):
    return report.as_markdown(report.collect(Experiment(folder)))


@pytest.mark.quick
def test_the_table_has_means_and_deviations_over_the_seeds(run, tmp_path):
    for seed in (0, 1):
        folder = shutil.copytree(run, tmp_path / f"both/seed-{seed}")
        change(folder, "config.json", given=read(run, "config.json")["given"] | {"seeds": [seed]})
        change(folder, "students/mms.json", transfer_size=1_032, per_class=[1_017, 15, 0],
               accuracy=0.7 + 0.1 * seed, retention=0.8 + 0.1 * seed, agreement=0.8,
               seconds=3 + 2 * seed, images_per_second=1500.0)
    table = table_of(tmp_path / "both")
    assert table.startswith("Target colours, recipe quick, seed 0, 1. Teacher net.py:make, 100.00%."
                            "\n\n| approach | student | sources | images | per class | accuracy % "
                            "| retention | agreement % | seconds | img/s |\n")
    # Accuracies 0.70 and 0.80: mean 0.75, deviation 0.1 / sqrt(2).
    assert ("| mms | net.py:make | pool, more | 1,032 | 0 to 1,017 | 75.00 ± 7.07 | 0.850 | 80.00 "
            "| 4 | 1,500 |\n") in table


@pytest.mark.quick
def test_what_is_unknown_is_a_dash_and_what_the_table_must_not_hide_is_said(run):
    change(run, "teacher.json", accuracy=None)
    change(run, "students/mms.json", accuracy=None, retention=None, agreement=None, seconds=3,
           images_per_second=1500.0, weights="teacher")
    change(run, "students/entropy.json", history=[])
    for name, changes in (
            ("random", {"unreadable": {"more": 30}}),
            ("mms", {"per_class": [40, 15, 0], "shortfall": {"green": 25, "red": 40},
                     "no_threshold": ["red"], "below_threshold": {}}),
            ("entropy", {"per_class": [40, 14, 13], "shortfall": {"green": 26, "red": 27},
                         "below_threshold": {"blue": 1_037}})):
        change(run, f"transfer/{name}/summary.json", **changes)
    table = table_of(run)
    assert "Teacher net.py:make, accuracy unknown.\n" in table
    assert "| 40 | - | - | - | 3 | 1,500 |" in table
    assert table.partition("\n\n- ")[2].splitlines() == [
        "Selected with --threshold published --calibrate target --floor 1 --fill random.",
        "- The supervised student learns from labels and starts from random weights.",
        "- Images that can't be read, or get no finite logits, are left out of random: more (30).",
        "- Classes with fewer than 40 images in mms: green (15), red (0).",
        "- Classes without a threshold in mms: red. No image of the confidence set gives them one.",
        "- The student of mms is pruned from the teacher: it starts with the teacher's layers, "
        "which keep most of its accuracy on any images.",
        "- Classes with fewer than 40 images in entropy: green (14), red (13).",
        "- Images below the threshold that --floor let in for entropy: blue (1,037).",
        "- There is no student of entropy: its transfer set is too small to learn from."]


@pytest.mark.parametrize("lacking, names", [
    ("students", {"counts", "strip-mms", "strip-entropy", "scores-mms", "scores-entropy"}),
    ("transfer", {"scores-mms", "scores-entropy"}), ("scores", set()), ("teacher.json", set())])
def test_an_unfinished_run_is_shown_as_far_as_it_is(run, lacking, names):
    later = ["students", "transfer", "scores", "thresholds.json", "teacher.json"]
    for name in ["results.json", "figures", *later[:later.index(lacking) + 1]]:
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    done = run_script("report.py", "--run-dir", run)
    assert (done.returncode, done.stderr) == (0, "") and (run / "results.json").exists()
    assert "- Not made yet: supervised, balanced, random, mms, entropy.\n" in done.stdout
    html = (run / "report.html").read_text()
    assert "No student yet." in html and figures_in(run) == names
    assert ("Nothing has been selected yet." in html) == (lacking != "students")


def test_what_is_damaged_is_left_out_and_what_is_no_run_is_one_line(run):
    put(run / "transfer/random/images.npy", b"cut")
    done = run_script("report.py", run)
    assert done.returncode == 0 and "random/images.npy is damaged" in done.stdout
    done = run_script("report.py", run, "nowhere")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "nowhere is not a run folder" in done.stderr


def test_runs_are_compared_in_markdown_and_csv(run, tmp_path):
    change(shutil.copytree(run, tmp_path / "b"), "students/mms.json", accuracy=0.6, retention=0.7,
           per_class=[12, 10, 0])
    done = run_script("report.py", "run", "b", "--out", "out", cwd=tmp_path)
    table = (tmp_path / "out/table.md").read_text()
    assert (done.returncode, done.stderr) == (0, "") and table in done.stdout
    assert "| run | mms | net.py:make | pool, more | 120 | 40 | 100.00 | 1.000 | 100.00 |" in table
    assert "| b | mms | net.py:make | pool, more | 120 | 0 to 12 | 60.00 | 0.700 |" in table
    with open(tmp_path / "out/table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 5 and (rows[8]["run"], rows[8]["approach"]) == ("b", "mms")
    assert (rows[8]["per_class"], rows[8]["accuracy"]) == ("12 10 0", "0.6")


def test_the_page_tells_what_the_manifests_tell(finished):
    html, kept, pixels = (finished / "report.html").read_text(), {}, {}
    shown = data_in(html)
    for approach in shown["approaches"]:
        rows = [(row["source"], int(row["index"])) for row in manifest(finished, approach)]
        pixels |= zip(rows, np.load(finished / f"transfer/{approach}/images.npy"), strict=True)
        kept[approach] = set(rows)
    assert shown["count"] == len(pixels) > 40
    sheet = re.search(r"sheet0 { background-image: url\(data:image/webp;base64,([^)]*)", html)[1]
    sheet = np.asarray(Image.open(io.BytesIO(b64decode(sheet)))).astype(int)
    scores = {name: np.load(finished / f"scores/{name}.npz") for name in ("pool", "more")}
    for number in range(shown["count"]):
        source, index = shown["sources"][shown["source"][number]], shown["index"][number]
        assert shown["kept"][number] == sum(((source, index) in images) << bit
                                            for bit, images in enumerate(kept.values()))
        row = scores[source]["index"].tolist().index(index)
        assert shown["scores"][0][number] == pytest.approx(scores[source]["mms"][row], rel=1e-3)
        assert shown["label"][number] == scores[source]["predicted"][row]
        y, x = number // shown["across"] * 32, number % shown["across"] * 32
        apart = sheet[y:y + 32, x:x + 32].mean((0, 1)) - pixels[source, index].mean((0, 1))
        assert abs(apart).max() < 12
    assert f"<pre>python compile.py --config {finished}/config.json --run-dir runs/again" in html
    assert figures_in(finished) == {"accuracy", "curves", "counts", "scores-mms", "scores-entropy",
                                    "strip-mms", "strip-entropy"}
    assert len(re.findall('<img alt="[A-Z]', html)) == html.count("How to read it:") == 7


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
        """(how many images are said, the texts of the tiles)."""
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
    count, tiles = select(without="-", label="green", source="more", sort="mms")
    scores = [float(re.search(r"mms ([\d.]+)", each)[1]) for each in tiles]
    assert count > 3 and all(tile.startswith("green, from more, ") for tile in tiles)
    assert scores == sorted(scores, reverse=True)
    assert select(falling="smallest first")[1] == tiles[::-1]
    select(label="any", source="any")
    columns = shown.evaluate("[...document.querySelectorAll('.tile')].filter(tile => "
                             "tile.offsetTop === document.querySelector('.tile').offsetTop).length")
    shown.focus("#grid")
    for key, place in (("ArrowRight", 1), ("ArrowDown", 1 + columns), ("ArrowLeft", columns),
                       ("ArrowUp", 0), ("End", len(kept["entropy"]) - 1), ("Home", 0)):
        shown.keyboard.press(key)
        assert shown.get_attribute("#grid", "aria-activedescendant") == f"tile{place}"
    assert "kept by" in shown.inner_text("#about")
    shown.keyboard.press("Tab")
    assert shown.evaluate("document.activeElement.id") != "grid"        # nobody is caught in it
    assert complaints == []
    shown.close()


@pytest.mark.filterwarnings("error")
def test_hostile_names_cannot_become_a_part_of_the_page(run, request, capsys):
    for path in run.rglob("*.json"):
        text = path.read_text()
        for name, other in zip(CLASSES, HOSTILE, strict=True):
            text = text.replace(json.dumps(name), json.dumps(other))
        write_sealed(path, json.loads(text))
    for listing in run.glob("transfer/*/manifest.csv"):
        put(listing, listing.read_bytes().replace(b",0/", b",<b>"))
        summary = listing.with_name("summary.json")
        change(run, summary, files=read(run, summary)["files"] | {
            listing.relative_to(run).as_posix(): file_digest(listing)})
    report.write(Experiment(run))
    assert capsys.readouterr().out.count("No font here has all letters of the class names") == 1
    html = (run / "report.html").read_text()
    assert "<img src=x" not in html and "<script>alert" not in html
    assert data_in(html)["classes"] == list(HOSTILE)
    shown, complaints = opened(request.getfixturevalue("browser"), run / "report.html")
    assert all(name in shown.inner_text("main ul") for name in HOSTILE) and complaints == []
    shown.focus("#grid")
    shown.keyboard.press("Home")
    assert "<b>" in shown.inner_text("#about")
    shown.close()


def test_wandb_gets_losses_and_views_and_a_resumed_training_continues_its_run(
        tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = tmp_path / "run" / "wandb" / "student-mms"
    with monkeypatch.context() as patch:
        error = wandb.errors.UsageError("No API key configured. Use `wandb login` to log in.")
        patch.setattr(wandb, "init", mock.Mock(side_effect=error))
        refusal("^--wandb: No API key configured.", board.Board, {"wandb": folder})
    shown = board.Board({"wandb": folder})
    shown.views(2, torch.zeros(4, 8, 8, 3, dtype=torch.uint8))
    shown.figures(3, epoch_loss=0.375)
    shown.close()
    [file] = folder.rglob(f"run-{(folder / 'id').read_text()}.wandb")
    began = time.monotonic()
    while not all(word in file.read_bytes() for word in (       # another process writes it
            b"run student-mms", b"epoch_loss", b"0.375")):
        assert time.monotonic() < began + 60
        time.sleep(0.05)
    assert len(list(tmp_path.rglob("*.png"))) == 1
