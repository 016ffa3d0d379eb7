"""What users bring: networks, criteria, teachers, folders and shards, and no target at all."""
import io
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import NET, ROOT, run_script, small_run
from PIL import Image
from run_files import copied, given, manifest, read, run_stage
from torch import nn

import compile
import TeacherTrain
import transfer
from kd import checkpoints
from kd.engine import predict
from kd.files import UserError

NETWORKS = NET + """
def three(num_classes):
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=4), nn.Flatten(), nn.Linear(256, num_classes))

def squashed(num_classes):
    return nn.Sequential(Net(num_classes), nn.Softsign())

class Contrast(Net):
    def forward(self, pixels):
        deviation = (pixels - pixels.mean((1, 2, 3), keepdim=True)).flatten(1).norm(dim=1)
        return super().forward(pixels) + (0 * deviation / deviation)[:, None]

def contrast(num_classes):
    return Contrast(num_classes)
"""
MINE = (ROOT / "mms_threshold.py").read_text()


@pytest.fixture(scope="module")
def networks(painted):
    (painted / "networks.py").write_text(NETWORKS)
    return painted / "networks.py"


@pytest.fixture(scope="module")
def taught(painted, networks, tmp_path_factory):
    """The run folder of a teacher that knows all three colours, scores and a transfer set."""
    folder = tmp_path_factory.mktemp("taught") / "run"
    flags = [*small_run(painted), "--teacher-batch-size", "16", "--teacher-epochs", "8",
             "--run-dir", str(folder)]
    run_stage(TeacherTrain, flags)
    run_stage(transfer, flags, "--approach", "mms")
    content = torch.load(folder / "teacher.pt", weights_only=True)
    torch.save(content["state_dict"], painted / "weights.pth")
    return folder


@pytest.fixture
def flags(painted, taught, tmp_path):
    """Those of `taught`, for a run folder of this test's own."""
    return [*small_run(painted), "--teacher-batch-size", "16", "--teacher-epochs", "8",
            "--run-dir", str(tmp_path / "run")]


# --------------------------------------------------------------------------------------------------
# Networks
# --------------------------------------------------------------------------------------------------

def test_a_teacher_and_a_student_of_ones_own_run_from_data_to_table(
        networks, flags, painted, tmp_path, capsys):
    """A bare state dict, with a size and a normalisation of its own."""
    own = [*flags, "--teacher-arch", f"{networks}:make", "--student-arch", f"{networks}:three",
           "--teacher-checkpoint", str(painted / "weights.pth"), "--teacher-size", "48",
           "--teacher-mean", "0.4,0.5,0.6", "--teacher-std", "0.5,0.4,0.3"]
    run_stage(compile, own, "--approaches", "balanced")
    run, results = tmp_path / "run", read(tmp_path / "run", "results.json")
    content = torch.load(run / "teacher.pt", weights_only=True)
    assert [content[name] for name in ("input_size", "mean", "std", "classes")] == [
        48, [0.4, 0.5, 0.6], [0.5, 0.4, 0.3], ["blue", "green", "red"]]
    assert results["teacher"]["arch"] == "networks.py:make"
    assert results["rows"][0]["student"] == "networks.py:three"
    assert read(run, "teacher.json")["history"] == []       # used as it was given
    # The same network and the same pixels, written out.
    network = checkpoints.load(run / "teacher.pt", f"{networks}:make").network.eval()
    right = []
    for label, name in enumerate(content["classes"]):
        for path in (painted / "colours/test" / name).iterdir():
            pixels = np.asarray(Image.open(path).resize((32, 32), Image.Resampling.BILINEAR))
            pixels = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None] / 255
            pixels = nn.functional.interpolate(pixels, (48, 48), mode="bilinear")
            mean, std = (torch.tensor(content[key]).view(3, 1, 1) for key in ("mean", "std"))
            right.append(network((pixels - mean) / std).argmax().item() == label)
    assert results["teacher"]["accuracy"] == np.mean(right)
    with pytest.raises(UserError, match="--teacher-size 48, not --teacher-size 40"):
        run_stage(compile, own, "--approaches", "balanced", "--teacher-size", "40")
    networks.write_text(NETWORKS + "\n# another version\n")
    with pytest.raises(UserError, match="another version of its files"):
        run_stage(compile, own, "--approaches", "balanced")
    networks.write_text(NETWORKS)


def test_without_a_linear_head_mms_is_refused_and_the_plain_margin_taken_when_asked(
        networks, flags, tmp_path):
    own, run = [*flags, "--teacher-arch", f"{networks}:squashed"], tmp_path / "run"
    with pytest.raises(UserError, match="No linear layer makes the logits of networks.py:squashed"
                                        ".*--mms-plain"):
        run_stage(compile, own)
    assert not run.exists()
    run_stage(compile, own, "--approaches", "balanced,entropy")
    with pytest.raises(UserError, match="No linear layer makes the logits"):
        run_stage(transfer, own, "--approach", "random")
    run_stage(transfer, own, "--approach", "mms", "--mms-plain", "--run-dir",
              copied(run, tmp_path / "plain", "scores", "transfer", "students", "thresholds.json"))
    scores = np.load(tmp_path / "plain/scores/pool.npz")
    from data import load_source
    settings = transfer.open_stage(given("transfer", own), "transfer", "")[0].settings
    logits = predict(checkpoints.load(run / "teacher.pt", f"{networks}:squashed"),
                     load_source(settings, settings.sources[0]).images)
    first, second = logits.topk(2, 1).values.T
    np.testing.assert_allclose(scores["mms"], first - second, rtol=1e-4, atol=1e-6)
    assert ("MMS is the plain margin z_a - z_b: no linear layer makes the teacher's logits."
            in read(run, "results.json")["notes"])


def test_images_whose_logits_are_not_finite_are_left_out_and_counted(
        networks, flags, painted, tmp_path, capsys):
    pool = shutil.copytree(painted / "pool", tmp_path / "pool")
    for number in range(3):
        Image.new("RGB", (24, 28), "gray").save(pool / f"flat{number}.png")
    run, flags[3] = tmp_path / "run", f"pool={pool},more={painted / 'more'}"
    own = [*flags, "--teacher-arch", f"{networks}:contrast"]
    run_stage(compile, own, "--approaches", "all", "--data-dir", tmp_path / "data")
    assert "3 images are left out: the teacher's logits are not finite." in capsys.readouterr().out
    assert [read(run, "scores/pool.json")[name] for name in ("images", "bad")] == [120, 3]
    assert not any("flat" in row["file"] for row in manifest(run, "all"))
    summary = read(run, "transfer/all/summary.json")
    assert summary["unreadable"] == {"pool": 3} and summary["size"] == 180


# --------------------------------------------------------------------------------------------------
# Criteria
# --------------------------------------------------------------------------------------------------

def test_a_criterion_of_ones_own_is_treated_as_ours_whichever_side_it_keeps(
        flags, taught, tmp_path):
    run = copied(taught, tmp_path / "run")
    (tmp_path / "high.py").write_text(MINE.replace("def score(logits, weight):", """
def score(logits, weight):
    assert logits.shape[1] == 3 and tuple(weight.shape) == (3, 16) and not logits.requires_grad
    return margin(logits, weight)

def margin(logits, weight):"""))
    low = MINE.replace('KEEP = ">="', 'KEEP = "<="').replace("return (first", "return -(first")
    (tmp_path / "low.py").write_text(low)
    run_stage(compile, flags, "--approaches", f"mms,{tmp_path / 'high.py'},{tmp_path / 'low.py'}")
    expected, thresholds = manifest(run, "mms"), read(run, "thresholds.json")
    assert expected and thresholds["mms"] == thresholds["high"]
    assert thresholds["low"] == [-value for value in thresholds["mms"]]
    for name in ("high", "low"):
        assert [row["file"] for row in manifest(run, name)] == [row["file"] for row in expected]
        assert (run / f"transfer/{name}/images.npy").read_bytes() == (
            run / "transfer/mms/images.npy").read_bytes()
    rows = read(run, "results.json")["rows"]
    assert [row["approach"] for row in rows] == ["mms", "high", "low"]
    assert len({row["accuracy"] for row in rows}) == 1
    # One that is edited is noticed, and only its own scores are made again.
    (tmp_path / "low.py").write_text(low.replace("return -(first", "return 2 * (second"))
    with pytest.raises(UserError, match="low/summary.json was made with another version of its "
                                        "criterion, .* add --restart-from transfer"):
        run_stage(transfer, flags, "--approach", tmp_path / "low.py")
    before = np.load(run / "scores/pool.npz")
    run_stage(compile, [*flags, "--restart-from", "transfer"], "--approaches", tmp_path / "low.py")
    after = np.load(run / "scores/pool.npz")
    np.testing.assert_allclose(after["low"], 2 * before["low"], rtol=1e-6)
    assert all(np.array_equal(before[name], after[name]) for name in before.files if name != "low")


SCORE = "KEEP = '>='\ndef score(logits, weight):\n    return {}\n"
THRESHOLD = "def threshold(scores, predicted, classes):\n    return {}\n"


@pytest.mark.parametrize("text, said", [
    ("KEEP = '>'\n", "mine.py is not a criterion: it lacks score and threshold and KEEP = '>=' or"),
    (SCORE.format("logits") + THRESHOLD.format("[0] * classes"),
     r"mine.py: score must give one number per image, \(24,\), and gives torch.Size\(\[24, 3\]\)"),
    (SCORE.format("3") + THRESHOLD.format("[0] * classes"),
     r"mine.py: score must give one number per image, \(24,\), and gives int"),
    (SCORE.format("logits[:, 0]") + THRESHOLD.format("[0]"),
     r"mine.py: threshold must give one number per class, \(3,\), and gives \(1,\)"),
    (SCORE.format("logits[:, 0]") + THRESHOLD.format("[-float('inf')] * classes"),
     "mine.py: the threshold of blue is infinite")])
def test_a_criterion_that_gives_something_else_is_named(flags, taught, tmp_path, text, said):
    copied(taught, tmp_path / "run")
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(UserError, match=said):
        run_stage(transfer, flags, "--approach", tmp_path / "mine.py")


def test_what_a_criterion_raises_is_shown_with_its_traceback(flags, taught, tmp_path):
    copied(taught, tmp_path / "run")
    (tmp_path / "mine.py").write_text(SCORE.format("1 / 0") + THRESHOLD.format("[0] * classes"))
    done = run_script("transfer.py", *given("transfer", flags), "--approach", tmp_path / "mine.py")
    assert done.returncode == 1 and done.stderr.startswith("Traceback ")
    assert 'mine.py", line 3, in score' in done.stderr
    assert done.stderr.endswith("ZeroDivisionError: division by zero\n")


def test_a_criterion_that_nothing_passes_leaves_no_student_and_the_table_says_so(
        flags, taught, tmp_path, capsys):
    run = copied(taught, tmp_path / "run")
    (tmp_path / "no.py").write_text(SCORE.format("logits[:, 0]") + THRESHOLD.format("[1e9] * 3"))
    run_stage(compile, flags, "--approaches", tmp_path / "no.py")
    assert "too small to learn from" in capsys.readouterr().out
    [row], notes = (read(run, "results.json")[name] for name in ("rows", "notes"))
    assert (row["transfer_size"], row["accuracy"]) == (0, None)
    assert "There is no student of no: its transfer set is too small to learn from." in notes


# --------------------------------------------------------------------------------------------------
# Data
# --------------------------------------------------------------------------------------------------

def shards(folder, source):
    """The images of a folder, in their order, in two shards."""
    files = sorted(source.rglob("*.png"))
    folder.mkdir()
    for number, part in enumerate((files[:50], files[50:])):
        with tarfile.open(folder / f"{number:03}.tar", "w") as tar:
            for path in part:
                tar.add(path, str(path.relative_to(source)))
                member = tarfile.TarInfo(str(path.relative_to(source).with_suffix(".txt")))
                tar.addfile(member, io.BytesIO())
    return folder


@pytest.mark.parametrize("pack", ["always", "never"])
@pytest.mark.parametrize("form", ["folder", "{000..001}.tar", "*.tar"])
def test_shards_and_folders_packed_or_not_select_the_same(
        flags, taught, painted, tmp_path, pack, form):
    run = copied(taught, tmp_path / "run", "scores", "transfer", "thresholds.json")
    if form != "folder":
        pool = shards(tmp_path / "shards", painted / "pool")
        flags[3] = f"pool={pool / form},more={painted / 'more'}"
    run_stage(transfer, flags, "--approach", "mms", "--pack", pack, "--data-dir",
              tmp_path / "data")
    expected, found = (manifest(each, "mms") for each in (taught, run))
    if form != "folder":
        assert {row["file"][:8] for row in found if row["source"] == "pool"} <= {
            "000.tar/", "001.tar/"}
        for row in found:
            row["file"] = row["file"].partition(".tar/")[2] or row["file"]
    assert found == expected and len(found) > 3
    assert (run / "transfer/mms/images.npy").read_bytes() == (
        taught / "transfer/mms/images.npy").read_bytes()
    packs = [path for path in tmp_path.glob("data/packed/*-source-*/images.npy")]
    assert len(packs) == (2 if pack == "always" else 0)


@pytest.mark.parametrize("test_split", [True, False])
def test_without_training_images_of_the_target_thresholds_come_from_the_sources(
        flags, painted, networks, tmp_path, test_split):
    run, target = tmp_path / "run", "secret"
    if test_split:
        (tmp_path / "secret").mkdir()
        os.symlink(painted / "colours/test", tmp_path / "secret/test")
        target = f"secret={tmp_path / 'secret'}"
    own = [*flags, "--target", target, "--data-free", "--teacher-checkpoint",
           str(painted / "weights.pth"), "--transfer-size", "60"]
    if not test_split:
        with pytest.raises(UserError, match="--classes"):
            data_free(own)
        own += ["--classes", "3"]
    data_free(own)
    results = read(run, "results.json")
    assert results["classes"] == (["blue", "green", "red"] if test_split else ["0", "1", "2"])
    assert [row["approach"] for row in results["rows"]] == ["balanced", "random", "mms", "entropy"]
    measured = [results["teacher"]["accuracy"], *(row["accuracy"] for row in results["rows"])]
    assert all((accuracy is not None) == test_split for accuracy in measured)
    assert "Data-free: no training image of the target was used." in results["notes"]
    assert not (run / "split.npz").exists() and not (run / "scores/confidence.npz").exists()
    # Each class is held to the best quarter of its candidates.
    parts = [np.load(run / f"scores/{name}.npz") for name in ("pool", "more")]
    predicted, mms = (np.concatenate([part[key] for part in parts]) for key in ("predicted", "mms"))
    thresholds = read(run, "thresholds.json")
    assert thresholds["calibrated_on"] == "sources"
    for label, value in enumerate(thresholds["mms"]):
        members = np.sort(mms[predicted == label])[::-1]
        assert value == members[-(-len(members) // 4) - 1]


def data_free(flags):
    at = flags.index("--data-free")
    run_stage(compile, flags[:at] + flags[at + 1:], "--data-free")
