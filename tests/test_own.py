"""A teacher at work: what it selects, and from what users bring: networks, criteria, shards."""
import os
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import NET, ROOT, run_script
from PIL import Image
from script_files import given, manifest, pool, ran, read, refused
from test_selection import select_slowly

from kd import checkpoints, engine, models
from kd.thresholds import passes
from TeacherTrain import say_if_odd
from transfer import Rules, even_weights

NETWORKS = NET + """
def three(num_classes):
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=4), nn.Flatten(), nn.Linear(256, num_classes))

def squashed(num_classes):
    return nn.Sequential(Net(num_classes), nn.Softsign())

class Contrast(Net):
    def forward(self, pixels):      # 0 / 0 for images of one colour
        deviation = (pixels - pixels.mean((1, 2, 3), keepdim=True)).flatten(1).norm(dim=1)
        return super().forward(pixels) + (0 * deviation / deviation)[:, None]

def contrast(num_classes):
    return Contrast(num_classes)
"""


@pytest.fixture
def networks(tmp_path):
    (tmp_path / "networks.py").write_text(NETWORKS)
    return tmp_path / "networks.py"


@pytest.fixture
def weights(finished_run, tmp_path):
    """The teacher's, as somebody else would have saved them."""
    content = torch.load(finished_run / "teacher.pt", weights_only=True)
    torch.save(content["state_dict"], tmp_path / "weights.pth")
    return str(tmp_path / "weights.pth")


@pytest.mark.parametrize("words, said", [
    ("--teacher-arch {}:three --approaches mms,weighted",
     "matched and weighted need a teacher with batch norms"),
    ("--teacher-arch alexnet --teacher-weights none --teacher-size 32",
     "alexnet can't process images of 32x32"),
    ("--transfer-size 1", "1 images are fewer than one for each of 3 classes")])
def test_what_can_not_work_is_refused_before_the_teacher_is_trained(
        flags, networks, tmp_path, words, said):
    assert said in refused("compile.py", flags, *words.format(networks).split())
    assert not (tmp_path / "run/split.npz").exists()


def test_matched_weighs_the_images_of_sources_in_another_order(run, flags):
    def lengths():      # of what the batch norms see; the axes are another sample's
        ran("transfer.py", flags, "--approach", "matched", "--restart-from", "transfer")
        return np.linalg.norm(np.load(run / "scores/matched.npy").astype(float), axis=1)
    first, order = lengths(), flags.index("--sources") + 1
    flags[order] = ",".join(reversed(flags[order].split(",")))
    assert lengths() == pytest.approx(np.roll(first, 60), rel=0.05)


def test_a_teacher_and_a_student_of_ones_own_run_from_data_to_table(
        finished_run, flags, networks, weights, tmp_path):
    run = tmp_path / "run"
    own = [*flags, "--teacher-arch", f"{networks}:make", "--student-arch", f"{networks}:three",
           "--teacher-checkpoint", weights, "--approaches", "balanced"]
    ran("compile.py", own)
    before, figures, results = (read(*name) for name in (
        (finished_run, "teacher.json"), (run, "teacher.json"), (run, "results.json")))
    assert figures["history"] == [] and figures["accuracy"] == before["accuracy"] > 0.9
    assert results["teacher"]["arch"] == "networks.py:make"
    assert results["rows"][0]["student"] == "networks.py:three"
    # How a teacher would have been trained does not matter to one that is given.
    assert "reused: teacher, " in ran("compile.py", own, "--teacher-epochs", "9")
    networks.write_text(NETWORKS + "\n# another version\n")
    assert "another version of its files" in refused("compile.py", own)
    networks.write_text(NETWORKS)
    ran("compile.py", own, "--teacher-size", "48", "--teacher-mean", "0.4,0.5,0.6",
        "--teacher-std", "0.5,0.4,0.3", "--run-dir", tmp_path / "larger")
    content = torch.load(tmp_path / "larger/teacher.pt", weights_only=True)
    assert [content[name] for name in ("input_size", "mean", "std", "classes")] == [
        48, [0.4, 0.5, 0.6], [0.5, 0.4, 0.3], ["blue", "green", "red"]]


def test_without_a_linear_head_mms_is_refused_and_the_plain_margin_taken_when_asked(
        flags, networks, tmp_path):
    own = [*flags, "--teacher-arch", f"{networks}:squashed"]
    said = refused("compile.py", own)
    assert "No linear layer makes the logits of networks.py:squashed" in said
    assert "Add --mms-plain" in said and not (tmp_path / "run/split.npz").exists()
    (tmp_path / "plain.py").write_text("from mms_threshold import KEEP, threshold\n\n"
                                       "def score(logits, weight):\n    assert weight is None\n"
                                       "    return -logits.topk(2).values.diff()[:, 0]\n")
    ran("compile.py", own, "--run-dir", tmp_path / "plain", "--mms-plain", "--approaches",
        f"mms,{tmp_path / 'plain.py'}")
    scores = pool(tmp_path / "plain")
    assert np.array_equal(scores["mms"], scores["plain"])
    rows, notes = (read(tmp_path / "plain", "results.json")[name] for name in ("rows", "notes"))
    assert [row["approach"] for row in rows] == ["mms", "plain"]
    assert "MMS is the plain margin z_a - z_b: no linear layer makes the teacher's logits." in notes


def test_images_whose_logits_are_not_finite_are_left_out_and_counted(
        flags, networks, painted, tmp_path):
    folder, run = shutil.copytree(painted / "pool", tmp_path / "pool"), tmp_path / "run"
    for number in range(3):
        Image.new("RGB", (24, 28), "gray").save(folder / f"flat{number}.png")
    said = ran("compile.py", flags, "--teacher-arch", f"{networks}:contrast",
               "--sources", f"pool={folder},more={painted / 'more'}", "--approaches", "all",
               "--data-dir", tmp_path / "data")
    assert "3 images are left out: the teacher's logits for them are NaN or infinite." in said
    assert [read(run, "scores/pool.json")[name] for name in ("images", "bad")] == [120, 3]
    assert not any("flat" in row["file"] for row in manifest(run, "all"))
    summary = read(run, "transfer/all/summary.json")
    assert summary["unreadable"] == {"pool": 3} and summary["size"] == 180
    # The target, too, may have such images: nothing is learned or matched from them.
    colours = shutil.copytree(painted / "colours", tmp_path / "colours")
    for number in range(20):
        Image.new("RGB", (24, 28), "gray").save(colours / f"train/red/flat{number}.png")
    said = ran("compile.py", flags, "--teacher-arch", f"{networks}:contrast",
               "--teacher-checkpoint", run / "teacher.pt", "--target", f"colours={colours}",
               "--approaches", "original,matched", "--transfer-size", "60", "--run-dir",
               tmp_path / "second", "--data-dir", tmp_path / "data")
    assert "scores: confidence" in said and "nan" not in said
    rows = read(tmp_path / "second", "results.json")["rows"]
    assert [row["transfer_size"] for row in rows] == [112, 60]
    assert all(row["accuracy"] is not None for row in rows)


def criterion(score, thresholds="[0] * classes"):
    return (f"KEEP = '>='\ndef score(logits, weight):\n    return {score}\n"
            f"def threshold(scores, predicted, classes):\n    return {thresholds}\n")


@pytest.mark.parametrize("text, said", [
    ("KEEP = '>'\n", "is not a criterion: it lacks score and threshold and KEEP = '>=' or '<='"),
    (criterion("logits"), "score must give a tensor of one number per image, (120,), and gives a "),
    (criterion("logits[:, 0].numpy()"), "and gives a ndarray of (120,)"),
    (criterion("logits[:, 0]", "[0]"),
     "threshold must give one number per class, (3,), and gives (1,)"),
    (criterion("logits[:, 0]", "[float('inf')] * classes"), "the threshold of blue is infinite")])
def test_a_criterion_that_gives_something_else_is_named(flags, run, tmp_path, text, said):
    (tmp_path / "mine.py").write_text(text)
    found = refused("transfer.py", flags, "--approach", tmp_path / "mine.py")
    assert said in found and f"{tmp_path / 'mine.py'}" in found


@pytest.mark.parametrize("text, said", [
    ("1 / 0", "ZeroDivisionError: division by zero"),
    ("open('/nowhere')", "FileNotFoundError: [Errno 2] No such file or directory: '/nowhere'")])
def test_what_a_criterion_raises_is_shown_with_its_traceback(flags, run, tmp_path, text, said):
    (tmp_path / "mine.py").write_text(criterion(text))
    done = run_script("transfer.py", *given("transfer.py", flags), "--approach",
                      tmp_path / "mine.py")
    assert done.returncode == 1 and done.stderr.startswith("Traceback ")
    assert 'mine.py", line 3, in score' in done.stderr
    assert done.stderr.endswith(f"{said}\n")


def test_a_criterion_that_nothing_passes_leaves_no_student_and_the_table_says_so(
        flags, run, tmp_path):
    (tmp_path / "no.py").write_text(criterion("(logits @ weight)[:, 0]", "[1e9] * classes"))
    assert "too small to learn from" in ran(
        "compile.py", flags, "--restart-from", "transfer", "--floor", "0", "--approaches",
        tmp_path / "no.py")
    [row], notes = (read(run, "results.json")[name] for name in ("rows", "notes"))
    assert (row["transfer_size"], row["accuracy"]) == (0, None)
    assert "There is no student of no: its transfer set is too small to learn from." in notes


@pytest.mark.parametrize("pack", ["always", "never"])
@pytest.mark.parametrize("form", ["", "/{000..002}.tar"])
def test_shards_and_folders_packed_or_not_select_alike(run, flags, painted, tmp_path, pack, form):
    expected = manifest(run, "mms"), (run / "transfer/mms/images.npy").read_bytes()
    for name in ("scores", "transfer"):
        shutil.rmtree(run / name)
    place = painted / "pool"
    if form:
        webdataset = pytest.importorskip("webdataset", reason="pip install webdataset")
        place = tmp_path / "shards"
        place.mkdir()
        with webdataset.ShardWriter(f"{place}/%03d.tar", maxcount=50, verbose=0) as shards:
            for path in sorted((painted / "pool").rglob("*.png")):
                shards.write({"__key__": f"{path.parent.name}/{path.stem}", "json": {"number": 1},
                              "png": path.read_bytes(), "txt": "x"})
    ran("transfer.py", flags, "--approach", "mms", "--pack", pack, "--data-dir", tmp_path / "data",
        "--sources", f"pool={place}{form},more={painted / 'more'}")
    found = manifest(run, "mms")
    for row in found:
        row["file"] = row["file"].rpartition(".tar/")[2]
    assert (found, (run / "transfer/mms/images.npy").read_bytes()) == expected and len(found) > 3
    packs = list(tmp_path.glob("data/packed/*-source-*/images.npy"))
    assert len(packs) == (2 if pack == "always" else 0)


@pytest.mark.parametrize("test_split", [True, False])
def test_without_training_images_of_the_target_thresholds_come_from_the_sources(
        flags, weights, painted, tmp_path, test_split):
    run, target = tmp_path / "run", "secret"
    own = [*flags, "--teacher-checkpoint", weights, "--transfer-size", "60",
           "--threshold", "0.25"]
    if test_split:
        (tmp_path / "secret").mkdir()
        os.symlink(painted / "colours/test", tmp_path / "secret/test")
        target = f"secret={tmp_path / 'secret'}"
    else:
        assert "--classes" in refused("compile.py", own, "--target", target, "--data-free")
        own += ["--classes", "3"]
    ran("compile.py", own, "--target", target, "--data-free")
    results, thresholds = read(run, "results.json"), read(run, "thresholds.json")
    assert results["classes"] == (["blue", "green", "red"] if test_split else ["0", "1", "2"])
    assert [row["approach"] for row in results["rows"]] == ["balanced", "random", "mms", "entropy"]
    measured = [results["teacher"]["accuracy"], *(row["accuracy"] for row in results["rows"])]
    assert all((accuracy is not None) == test_split for accuracy in measured)
    assert "Data-free: no training image of the target was used." in results["notes"]
    assert not (run / "split.npz").exists() and not (run / "scores/confidence.npz").exists()
    # A twentieth of the images are in no transfer set: on them all students are compared.
    scores, out = pool(run), np.load(run / "scores/held_out.npz")
    for row in results["rows"]:
        student = checkpoints.load(run / f"students/{row['approach']}.pt", flags[7])
        answers = engine.predict(student, out["images"]).argmax(1).numpy()
        assert row["source_agreement"] == (answers == out["predicted"]).mean()
    held = len(scores["index"]) // 20
    assert out["images"].shape == (held, 32, 32, 3) and held > 2
    assert test_split != (f"Agreement: on {held} images of the sources that no student learned "
                          "from" in str(results["notes"]))      # the table has one or the other
    kept = {image.tobytes() for image in np.load(run / "transfer/balanced/images.npy")}
    assert not kept & {image.tobytes() for image in out["images"]}
    # Each class is held to the best quarter of its candidates.
    assert thresholds["calibrated_on"] == "sources"
    for label, value in enumerate(thresholds["mms"]):
        members = np.sort(scores["mms"][scores["predicted"] == label])[::-1]
        assert value == members[-(-len(members) // 4) - 1]


def test_a_test_split_that_comes_later_is_measured_and_nothing_is_trained_again(
        flags, weights, painted, tmp_path):
    (tmp_path / "names.txt").write_text("blue\ngreen\nred\n")
    (tmp_path / "secret").mkdir()
    os.symlink(painted / "colours/test", tmp_path / "secret/test")
    own = [*flags, "--teacher-checkpoint", weights, "--transfer-size", "60",
           "--approaches", "mms", "--classes", str(tmp_path / "names.txt")]
    run, folder = tmp_path / "run", f"secret={tmp_path / 'secret'}"
    ran("compile.py", own, "--target", "secret", "--data-free")
    before = [(run / name).read_bytes() for name in ("teacher.pt", "students/mms.pt")]
    assert "teacher.json is of another test split, or of none. Make it with `python " in refused(
        "distill.py", own, "--target", folder, "--data-free", "--approach", "mms")
    ran("compile.py", own, "--target", folder, "--data-free")
    results = read(run, "results.json")
    [row] = results["rows"]
    assert row["accuracy"] == pytest.approx(row["retention"] * results["teacher"]["accuracy"])
    assert 0 <= row["agreement"] <= 1
    assert before == [(run / name).read_bytes() for name in ("teacher.pt", "students/mms.pt")]
    ran("compile.py", own, "--target", "secret", "--data-free")
    [row] = read(run, "results.json")["rows"]
    assert (row["accuracy"], row["agreement"], row["retention"]) == (None, None, None)
    # A checkpoint that says its classes, in another order than that of the folders.
    (tmp_path / "names.txt").write_text("red\ngreen\nblue\n")
    bare = ["--target", "secret", "--data-free", "--run-dir"]
    ran("TeacherTrain.py", own, *bare, tmp_path / "a")
    bare = [*own[:-2], "--teacher-checkpoint", tmp_path / "a/teacher.pt"], *bare, tmp_path / "b"
    ran("TeacherTrain.py", *bare)
    assert "knows red, green, blue, and the target has blue, green, red, in another" in refused(
        "TeacherTrain.py", *bare, "--target", folder)


def test_a_teacher_that_fits_its_images_badly_or_too_well_is_asked_about(capsys):
    def said(accuracy, on_confidence, classes):
        say_if_odd({"accuracy": accuracy, "confidence_accuracy": on_confidence}, classes, "target")
        return capsys.readouterr().out
    for figures in ((0.9, 0.1, 12), (0.1, None, 12), (None, 0.55, 2)):
        assert "is low. Are its pixels and the order of its classes" in said(*figures)
    assert ("right on 90.00% of the confidence set and 85.00% of the test split. If it has learned "
            "from images of the confidence set") in said(0.85, 0.9, 12)
    for figures in ((0.9, 0.92, 12), (None, None, 12), (0.65, None, 2)):
        assert said(*figures) == ""


def test_original_learns_the_teachers_answers_to_the_targets_own_images(run, flags):
    ran("compile.py", flags, "--approaches", "original,mms", "--augment", "crop,cutmix",
        "--restart-from", "students")
    rows = {row["approach"]: row for row in read(run, "results.json")["rows"]}
    assert (rows["original"]["transfer_size"], rows["original"]["sources"]) == (96, ["colours"])
    assert not (run / "transfer/original").exists()
    assert "original has no transfer set" in refused("transfer.py", flags, "--approach", "original")


def test_even_has_the_images_of_all_and_draws_rare_classes_as_often(run, flags):
    ran("compile.py", flags, "--approaches", "all,even")
    one, other = ((run / f"transfer/{name}/images.npy").read_bytes() for name in ("all", "even"))
    weights = np.load(run / "transfer/even/weights.npy")
    assert one == other and weights == pytest.approx(even_weights(pool(run)["predicted"]))
    heads = [torch.load(run / f"students/{name}.pt", weights_only=True)["state_dict"]["head.weight"]
             for name in ("all", "even")]
    assert not torch.equal(*heads)      # all else is the same: start, images, order of numbers


def test_matched_and_weighted_share_their_weights(run, flags):
    said = ran("compile.py", flags, "--approaches", "matched,weighted", "--transfer-size", "60",
               "--restart-from", "transfer")
    assert said.count("; effective size ") == 1
    weights, columns = np.load(run / "transfer/weighted/weights.npy"), manifest(run, "matched")
    assert {float(row["score"]) for row in columns} <= set(map(float, weights))
    assert len(set(weights)) > 10


def test_the_headline_of_the_first_page_runs(flags, weights, tmp_path):
    """Data-free, with images of another size, from the weights to the table."""
    run = tmp_path / "run"
    ran("compile.py", flags, "--target", "secret", "--data-free", "--classes", "3",
        "--image-size", "48", "--teacher-checkpoint", weights, "--recipe", "best",
        "--transfer-size", "60", "--approaches", "matched,all", "--data-dir", tmp_path / "data")
    matched, whole = (row["transfer_size"] for row in read(run, "results.json")["rows"])
    assert abs(matched - 60) <= 1 and whole == 171       # but for those held out
    assert np.load(run / "transfer/matched/images.npy").shape[1:] == (48, 48, 3)
    student = torch.load(run / "students/all.pt", weights_only=True)
    assert student["input_size"] == 48


def test_the_code_of_the_page_about_ones_own_runs(flags, run, tmp_path, monkeypatch):
    criterion, _, elsewhere = re.findall("```python\n(.*?)```", (ROOT / "docs/own.md").read_text(),
                                         re.S)
    (tmp_path / "my_metric.py").write_text(criterion)
    ran("transfer.py", flags, "--approach", tmp_path / "my_metric.py")
    assert len(manifest(run, "my_metric")) > 10
    torch.manual_seed(0)
    student = models.build("resnet18", list("abc"), "none", 32).eval()
    checkpoints.save(tmp_path / "runs/cifar10/students/mms.pt", student)
    monkeypatch.chdir(tmp_path)
    images = torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8)
    given = {"images": images.permute(0, 3, 1, 2) / 255}
    exec(elsewhere, given)
    torch.testing.assert_close(given["logits"], student(images), rtol=1e-3, atol=1e-4)


def test_matched_aims_at_the_confidence_set(run, flags, painted, tmp_path):
    files = sorted((painted / "colours/train").rglob("*.png"))      # in the order of the data set
    (tmp_path / "same").mkdir()
    for i in np.load(run / "split.npz")["confidence"]:
        shutil.copy(files[i], tmp_path / f"same/{i:03}.png")
    said = ran("transfer.py", flags, "--approach", "matched", "--restart-from", "scores",
               "--sources", f"same={tmp_path / 'same'}", "--data-dir", tmp_path / "data")
    assert "not below the pool's size, so that all weights are 1: matched takes every" in said
    found = np.load(run / "scores/matched.npy").astype(float)
    assert np.abs(found.mean(0)).max() < 0.01 < np.abs(found).max()


def test_a_student_starts_with_its_teachers_layers_and_a_live_teacher_in_bfloat16(run, flags):
    losses = []
    for amp in ("--no-amp", "--amp"):
        ran("distill.py", flags, "--approach", "mms", "--student-weights", "auto", "--lr", "1e-12",
            "--augment", "crop", amp, "--restart-from", "students")
        losses.append([each["loss"] for each in read(run, "students/mms.json")["history"]])
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], abs=0.1)
    teacher, student = (torch.load(run / name, weights_only=True)["state_dict"]["head.weight"]
                        for name in ("teacher.pt", "students/mms.pt"))
    torch.testing.assert_close(student, teacher)
    assert read(run, "students/mms.json")["weights"] == "teacher"


def taken(run, approach):
    """Which images of all sources, numbered in their order, a transfer set has."""
    return [int(row["index"]) + 120 * (row["source"] == "more") for row in manifest(run, approach)]


CRITERIA = {"mms": True, "entropy": False, "confidence": True, "energy": True,
            "cross_entropy": False}


@pytest.mark.parametrize("share, words, said, given", [
    (0.9, "--floor 0.5 --fill first", "Images below the threshold that --floor let in for ",
     {"bucket": 40, "floor": 0.5}),
    (1.0, "--floor 0 --fill best --no-balance --transfer-size 30", "--fill best --no-balance.",
     {"bucket": 10, "fill": "best", "balance": False})])
def test_a_run_selects_what_the_slow_selection_selects(flags, run, share, words, said, given):
    ran("compile.py", flags, "--restart-from", "transfer", "--threshold", share, *words.split(),
        "--approaches", ",".join(("all", "balanced", *CRITERIA)))
    scores = {name: np.load(run / f"scores/{name}.npz") for name in ("pool", "more")}
    confidence, rules = np.load(run / "scores/confidence.npz"), Rules(
        classes=3, keeps_high=CRITERIA, **given)
    thresholds = {name: np.array(read(run, "thresholds.json")[name], float) for name in CRITERIA}
    for approach in ("balanced", *CRITERIA):
        chosen = select_slowly(scores, approach, thresholds, rules)
        strict = select_slowly(scores, approach, thresholds, replace(rules, floor=0.0))
        summary = read(run, f"transfer/{approach}/summary.json")
        assert taken(run, approach) == chosen and summary["size"] == len(chosen) > 5
        assert sum(summary["below_threshold"].values()) == len(set(chosen) - set(strict))
    for name, high in CRITERIA.items():
        sure = passes(confidence[name], confidence["predicted"], thresholds[name], high)
        for label in range(3):
            of = confidence["predicted"] == label
            assert sure[of].sum() == np.ceil(share * of.sum())
    assert taken(run, "all") == list(range(180))
    notes = " ".join(read(run, "results.json")["notes"])
    assert f"--threshold {share} --calibrate target --floor " in notes and said in notes
