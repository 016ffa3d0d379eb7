"""Run folders as finished runs leave them, small enough to work out by hand what they show."""
import csv

import numpy as np

from kd.files import file_digest, write_sealed

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
    write_sealed(path, content | {"made_from": {"images": "as it was"}, "files": {
        file.relative_to(folder).as_posix(): file_digest(file) for file in files}})


def write_transfer_set(folder, approach, chosen, classes):
    """chosen: [(source, row of its scores)]."""
    place, per_class = folder / f"transfer/{approach}", [0, 0, 0]
    place.mkdir(parents=True)
    with open(place / "manifest.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("source", "index", "file", "predicted", "score"))
        for source, i in chosen:
            score = MMS[source][i] if approach != "entropy" else 1 / (1 + MMS[source][i])
            table.writerow((source, INDEX[i], f"<b>{i}.png", PREDICTED[i], score))
            per_class[PREDICTED[i]] += 1
    np.save(place / "images.npy",
            np.concatenate([pixels_of(source, INDEX[[i]]) for source, i in chosen]))
    write_product(folder, f"transfer/{approach}/summary.json", {
        "size": len(chosen), "bucket": 18, "per_class": per_class, "classes": classes,
        "unreadable": {"photos": 30} if approach == "random" else {}, "below_threshold": {},
        "shortfall": {name: 18 - count for name, count in zip(classes, per_class, strict=True)
                      if approach != "random"}, "calibrated_on": "target",
        "no_threshold": list(classes[2:]) * (approach == "mms")},
        place / "images.npy", place / "manifest.csv")
    return per_class


def write_run(folder, flags=(), seed=0, accuracy=0.6, least=3.0, classes=CLASSES):
    """A finished run. mms keeps scores from `least` on, and has no threshold for owls.
    Returns the folder."""
    folder.mkdir(parents=True)
    write_sealed(folder / "config.json", {"sources": list(SOURCES), "commit": None, "command": [
        "--target=digits", "--sources=glyphs,photos", f"--approaches={','.join(APPROACHES)}",
        f"--seeds={seed}", *flags]})
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
