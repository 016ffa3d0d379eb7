"""Select images and write the transfer set of one approach.

In:  teacher.pt, split.npz and the sources.
Out: scores/<source>.npz and scores/confidence.npz (data-free: held_out.npz), thresholds.json,
     transfer/<approach>/{images.npy, manifest.csv, summary.json}; for matched and weighted
     scores/matched.npy, for weighted and even transfer/<approach>/weights.npy.

The teacher looks at every source once (kd/scoring.py); an approach only sorts numbers. With t the
threshold of a class,

    mms, entropy, ...  of the images whose score passes t[predicted], a bucket for each class
    balanced, eats     the same without a threshold (eats: from SVHN and TinyImageNet alone)
    all                every image of every source
    random             as many images as mms has, without threshold or balance
    matched            drawn so that batch norms see the target's statistics (kd/matching.py)
    weighted           every image, drawn in each step as often as matched weighs it
    even               every image, drawn so that all classes come equally often

    python transfer.py --approach mms
    python transfer.py --approach ./my_metric.py
"""
if __name__ == "__main__":      # --help and wrong flags need no PyTorch
    from kd.flags import parser_of
    parser_of("transfer", __doc__).parse_args()

import csv
import io
import math
from dataclasses import dataclass

import numpy as np

import data
from kd import engine
from kd.command import command
from kd.files import UserError, digest, say, write_atomically
from kd.matching import draw, matched_weights, statistics
from kd.processes import alone, first_alone, on_all_ranks
from kd.report import about_transfer_set, extent
from kd.run import open_stage
from kd.scoring import Scoring
from kd.settings import DRAWN_BY_WEIGHT, EATS_SOURCES, ON_TARGET
from kd.thresholds import passes
from kd.values import name_of_approach

MANIFEST = ["source", "index", "file", "predicted", "score"]
FAR = 0.5           # of the way from one class to all: near pools reach 0.9, far ones a third
AT_CHANCE = 1.5     # times an equal share of the classes: a teacher that knows hardly anything
MOST_OFTEN = 8      # the largest weight of `even`, where 1 is an image's share by chance


# ---- Selection -----------------------------------------------------------------------------------

def fill_buckets(predicted, eligible, bucket, preference=None):
    """Takes at most `bucket` eligible candidates of each predicted class.

    predicted: (N,) int, candidates of all sources in their order. eligible: (N,) bool.
    preference: (N,), the smallest values of a class are taken first, no NaN among the eligible;
    None: first come first served. Equals are taken in the order of the sources. Returns
    positions, (n,) int64, ascending."""
    candidates = np.flatnonzero(eligible)
    labels = predicted[candidates]
    # Numbers of few bytes are sorted by counting, in linear time.
    labels = labels.astype(np.min_scalar_type(labels.max(initial=0)))
    order = np.argsort(labels, kind="stable") if preference is None else (
        np.lexsort((preference[candidates], labels)))
    counts = np.bincount(labels)
    place = np.arange(len(labels)) - np.repeat(counts.cumsum() - counts, counts)   # in its class
    return np.sort(candidates[order[place < bucket]])


@dataclass(frozen=True)
class Rules:
    """bucket: images per class; classes: how many there are; fill: "first", "random" or "best";
    floor: where fewer than this share of a bucket pass, the best ones below the threshold come in;
    balance=False: one bucket, as large as all together; keeps_high: {criterion: whether large
    scores are kept}."""

    bucket: int
    classes: int
    keeps_high: dict
    fill: str = "first"
    floor: float = 0.0
    balance: bool = True
    seed: int = 0


def select(approach, candidates, thresholds, rules):
    """The transfer set of an approach: positions in `candidates`, (n,) int64, ascending.

    thresholds: {criterion: (C,) float64}.
    """
    count = len(candidates)
    if approach in ("all", *DRAWN_BY_WEIGHT):
        return np.arange(count)
    if approach == "random":
        size = min(count, len(select("mms", candidates, thresholds, rules)))
        rng = np.random.default_rng(engine.seed_for(rules.seed, "random"))
        return np.sort(rng.choice(count, size, replace=False))
    if approach == "matched":
        return draw(candidates.scores["matched"], min(count, rules.bucket * rules.classes),
                    rules.seed)
    group, room = candidates.predicted, rules.bucket
    if not rules.balance:
        group, room = np.zeros_like(group), rules.bucket * rules.classes
    badness = None
    if approach in rules.keeps_high:
        scores = candidates.scores[approach]
        badness = -scores if rules.keeps_high[approach] else scores
        eligible = passes(scores, candidates.predicted, thresholds[approach],
                          rules.keeps_high[approach])
        least = math.ceil(rules.floor * room)
        short = np.bincount(group[eligible], minlength=group.max(initial=0) + 1) < least
        scored = ~np.isnan(badness)
        if not rules.balance:       # thresholds are those of classes: what passes comes first
            badness = np.argsort(np.lexsort((badness, ~eligible)))
        eligible[fill_buckets(group, short[group] & scored, least, badness)] = True
    elif approach == "eats":
        eligible = np.isin(np.array(candidates.names), EATS_SOURCES)[candidates.source]
    else:       # balanced
        eligible = np.ones(count, bool)
    preference = badness if rules.fill == "best" else None
    if rules.fill == "random":
        preference = np.random.default_rng(engine.seed_for(rules.seed, "fill")).permutation(count)
    return fill_buckets(group, eligible, room, preference)


def even_weights(predicted):
    """How often each candidate comes where all predicted classes come equally often, less where
    that is more than MOST_OFTEN times as often as in the pool. predicted: (N,) int. Returns (N,)
    float64, whose mean is below 1 where that is so."""
    counts = np.bincount(predicted)
    share = len(predicted) / np.count_nonzero(counts)
    return np.minimum(share / counts[predicted], MOST_OFTEN)


def evenness(predicted):
    """How many classes the teacher's answers spread over: the exponential of their entropy, from 1
    (all images in one class) to the number of classes (as many in each). predicted: (N,) int."""
    share = np.bincount(predicted) / len(predicted)
    return float(np.exp(-np.sum(share[share > 0] * np.log(share[share > 0]))))


# ---- The stage -----------------------------------------------------------------------------------

def bucket_size(settings, target, classes):
    """Images per class: an equal share of --transfer-size, or of the target's training split."""
    size = settings.transfer_size or len(target.train)
    if size < len(classes):
        raise UserError(f"{size} images are fewer than one for each of {len(classes)} classes. "
                        "Use a larger --transfer-size.")
    return size // len(classes)


@on_all_ranks
def make_transfer_set(run, approach, scoring):
    """Makes transfer/<approach>, unless it is there. Returns the content of its summary.json."""
    if scoring.held_out:
        make_held_out(run, scoring)
    settings, classes = run.settings, scoring.classes
    candidates, thresholds = scoring.candidates, scoring.thresholds
    bucket = bucket_size(settings, scoring.target, classes)
    # An approach without a criterion of its own shows the margin, for comparison.
    shown = approach if approach in scoring.criteria else (
        "mms" if "mms" in scoring.criteria else "confidence")
    used = [candidates.predicted, candidates.index, candidates.scores[shown]]
    if approach in ("matched", "weighted"):
        used.append(statistics(scoring))
    product = run.product(
        f"transfer/{approach}/summary.json", teacher=scoring.digest, bucket=bucket,
        criterion=scoring.criteria[shown].digest, thresholds=digest(thresholds[shown].tobytes()),
        scores=digest(*used))
    if product.done:
        return product.content
    size = min(len(candidates), bucket * len(classes))
    if approach in ("matched", "weighted"):
        shown = "matched"       # for both, and solved once
        if shown not in candidates.scores:
            candidates.scores[shown] = matched_weights(scoring, size)
    elif approach == "even":
        candidates.scores["even"], shown = even_weights(candidates.predicted), "even"
    rules = Rules(bucket, len(classes), {name: each.keeps_high
                                         for name, each in scoring.criteria.items()},
                  settings.fill, settings.floor, not settings.no_balance, settings.seed)
    chosen, own = select(approach, candidates, thresholds, rules), approach in scoring.criteria
    below = np.zeros(len(chosen), bool)
    if own:         # what the floor let in
        below = ~passes(candidates.scores[approach][chosen], candidates.predicted[chosen],
                        thresholds[approach], rules.keeps_high[approach])
    summary = summarise(approach, candidates, chosen, below, classes, bucket)
    balanced = rules.balance and approach not in ("random", "all", "matched", *DRAWN_BY_WEIGHT)
    if not balanced:        # nothing fills buckets, so no class can be short
        summary["shortfall"] = {}
    summary |= {
        "unreadable": {name: bad for name in candidates.names if (
            bad := run.content_of(f"scores/{name}.json")["bad"])},
        "no_threshold": [classes[c] for c in np.flatnonzero(np.isnan(thresholds[approach]))] if own
        else [], "calibrated_on": settings.calibrate if own or approach == "random" else None}
    folder = run / "transfer" / approach
    write_transfer_set(folder, scoring, candidates, chosen, shown, settings.image_size)
    files = [folder / "images.npy", folder / "manifest.csv"]
    if approach in DRAWN_BY_WEIGHT:
        files.append(folder / "weights.npy")
        write_atomically(files[-1], lambda file: np.save(file, candidates.scores[shown]))
    return product.write(summary, files)


@on_all_ranks
def make_held_out(run, scoring):
    """Makes scores/held_out.npz, unless it is there: images of the sources that no student learns
    from, (n, size, size, 3) uint8, and the teacher's answers to them, (n,) int64."""
    held, path = scoring.held_out, run / "scores/held_out.npz"
    product = run.product("scores/held_out.json", remake=True, teacher=scoring.digest,
                          scores=digest(held.source, held.index, held.predicted))
    if not product.done:
        images = [pixels for number, name in enumerate(held.names) for pixels, _, _ in
                  scoring.sources[name].batches(held.index[held.source == number])]
        write_atomically(path, lambda file: np.savez(
            file, images=np.concatenate(images), predicted=held.predicted))
        largest = np.bincount(held.predicted).max() / len(held)
        product.write({"images": len(held), "largest_class": float(largest)}, [path])


def summarise(approach, candidates, chosen, below, classes, bucket):
    """The content of summary.json. below: (n,) bool, which of `chosen` the floor let in."""
    predicted = candidates.predicted[chosen]
    per_class = np.bincount(predicted, minlength=len(classes))
    let_in = np.bincount(predicted[below], minlength=len(classes))
    per_source = np.bincount(candidates.source[chosen], minlength=len(candidates.names))
    return {"approach": approach, "size": len(chosen), "bucket": bucket,
            "per_class": per_class.tolist(), "classes": classes,
            "per_source": dict(zip(candidates.names, per_source.tolist(), strict=True)),
            "below_threshold": {classes[c]: int(n) for c, n in enumerate(let_in) if n},
            "shortfall": {classes[c]: int(bucket - n) for c, n in enumerate(per_class)
                          if n < bucket}}


def write_transfer_set(folder, scoring, candidates, chosen, shown, size):
    """images.npy and manifest.csv of the images at `chosen`, with their scores by `shown`."""
    scores, shape = candidates.scores[shown], (len(chosen), size, size, 3)

    @alone()        # of several processes the others wait
    def write_images(file, listing):
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_2_0(file, header)
        text = io.TextIOWrapper(listing, "utf-8", "surrogateescape", newline="")
        as_needed, quoted = (csv.writer(text, lineterminator="\n", quoting=each)
                             for each in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL))
        as_needed.writerow(MANIFEST)
        for number, name in enumerate(candidates.names):
            rows = chosen[candidates.source[chosen] == number]
            for pixels, index, files in scoring.sources[name].batches(candidates.index[rows]):
                file.write(np.ascontiguousarray(pixels).data)
                of, rows = np.split(rows, [len(pixels)])
                # Python 3.11 and 3.12 do not see that a carriage return needs quotes.
                writer = quoted if any("\r" in file for file in files) else as_needed
                writer.writerows(zip([name] * len(of), index.tolist(), files,
                                     candidates.predicted[of].tolist(), scores[of].tolist(),
                                     strict=True))
        text.detach()
    write_atomically(folder / "manifest.csv", lambda listing: write_atomically(
        folder / "images.npy", lambda file: write_images(file, listing)))


def report_pool(scoring):
    """Says how far the pool is from the target, as far as its images can tell."""
    settings, classes = scoring.run.settings, len(scoring.classes)
    count, found = len(scoring.candidates), evenness(scoring.candidates.predicted)
    say(f"pool: {count:,} images, which the teacher spreads over {found:.1f} of {classes} classes")
    right = scoring.figures["confidence_accuracy"]
    if right is not None and right < min(AT_CHANCE / classes, 1 / classes + 0.1):
        say(f"  The teacher is right on {right:.2%} of the confidence set, which is near chance: "
            "the results below mean little.")
    elif found - 1 <= FAR * (min(classes, count) - 1) and settings.recipe != "far":
        say("  This pool looks like another domain: try --recipe far with the approach even, or "
            "for photographs matched (docs/results.md).")


def report_transfer_set(approach, summary):
    sources = ", ".join(f"{name} {count:,}" for name, count in summary["per_source"].items())
    say(f"transfer: {approach}, {summary['size']:,} images, {extent(summary['per_class'])} per "
        f"class, from {sources}")
    for sentence in about_transfer_set(summary):
        say(f"  {sentence.replace('@', approach, 1)}")


def main(argv):
    run, given = open_stage(argv, "transfer", __doc__)
    settings, approach = run.settings, name_of_approach(given["approach"])
    if approach in ON_TARGET:
        raise UserError(f"{approach} has no transfer set: it learns from the target's training "
                        f"images. Run `python distill.py --approach {approach}`.")
    device = engine.pick_device(settings.device)
    scoring = Scoring(run, device, data)
    first_alone(lambda: data.obtain(settings))
    scoring.require(approach)
    bucket_size(settings, scoring.target, scoring.classes)
    first_alone(lambda: run.open(device, given))        # which deletes: not what is refused above
    report_pool(scoring)
    report_transfer_set(approach, make_transfer_set(run, approach, scoring))
    run.save_config(device, given)
    say(f"saved in {run / 'transfer' / approach}")


if __name__ == "__main__":
    command(main)
