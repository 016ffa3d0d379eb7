"""Matched selection: images drawn so that the pool as a whole looks to the teacher's batch norms as
the target does. It needs no label and no threshold.

v_i is what image i shows in every batch norm: each channel's mean and mean square, normalised as
that one does it, less 0 and 1, and the teacher's probabilities less equal shares. Its mean over the
target, o, is that over the confidence set (--calibrate target); without an image of the target
(--calibrate sources) it is 0, what the batch norms remember. That is a poor second where channels
seldom fire: their running variance tells little of them. No statistic counts for more than LIMIT.
The weights are, of all with mean 1 under which the mean of v is o and none above a cap, the most
even ones:

    w_i = min(cap, exp(b + (v_i - o) . t))                  (maximum entropy; Jaynes, 1957)

cap = N / n, since a set of n images holds an image of N at most once.
"""
import contextlib

import numpy as np
import torch

from kd import checkpoints, engine, models
from kd.files import UserError, say, write_atomically
from kd.processes import alone, gathered, rank, wait
from kd.progress import Progress

LIMIT = 5.0             # of a statistic, in deviations: channels that hardly ever fire say no more
DIRECTIONS = 200        # in which the pool varies most: v is reduced to them as it is made
SAMPLE = 4_096          # images that tell which those are
LEAST_SPREAD = 0.01     # of a pool along its first direction: one image has none
RIDGE = 0.01            # on t, in units of the pool's variance
SOLVED = 1 << 19        # images that tell the parameters of the weights, of more than twice as many
LITTLE = 0.9            # of the gap is left: matched has nothing to offer
CHUNK = 1 << 16         # rows that lie in memory at a time


def norms_of(classifier):
    """Its batch norms that remember their data. Raises UserError where there are none."""
    found = [module for module in classifier.modules()
             if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)
             and module.track_running_stats]
    if not found:
        raise UserError("matched and weighted need a teacher with batch norms, which remember "
                        "their data. Choose other approaches.")
    return found


@contextlib.contextmanager
def watched(classifier):
    """Within it, a function gives what the last batch showed in every batch norm, (n, D)
    float32."""
    seen, count = [], 0

    def begin(module, given):
        nonlocal count
        count = len(given[0])

    def look(module, given):
        pixels = given[0].float()
        shape = (1, -1, *[1] * (pixels.dim() - 2))
        scale = (module.running_var + module.eps).rsqrt()
        pixels = (pixels - module.running_mean.view(shape)) * scale.view(shape)
        pixels = pixels.unflatten(0, (count, -1))       # an image may have several rows, its tokens
        rest = (1, *range(3, pixels.dim()))
        found = pixels.mean(rest), pixels.square().mean(rest) - 1
        seen.extend(each.clamp(-LIMIT, LIMIT) for each in found)

    def shown():
        found = torch.cat(seen, 1)
        seen.clear()
        return found
    with contextlib.ExitStack() as hooks:
        hooks.enter_context(classifier.register_forward_pre_hook(begin))
        for norm in norms_of(classifier):
            hooks.enter_context(norm.register_forward_pre_hook(look))
        yield shown


def _blocks(scoring, classifier, shown, parts):
    """Yields v, (n, D + C) float32, of all in `parts`, [(what has `batches`, rows of it)]."""
    share, count = 1 / len(scoring.classes), sum(len(rows) for _, rows in parts)
    progress = Progress("matching", count)
    for source, rows in parts:
        batches = (torch.from_numpy(np.ascontiguousarray(pixels)) for pixels, _, _ in
                   source.batches(rows, engine.evaluation_batch(classifier)))
        for probabilities, in engine.answered(classifier, batches, scoring.device,
                                              lambda logits: (logits.softmax(1) - share,)):
            yield torch.cat([shown(), probabilities], 1)
            progress.update(len(probabilities))
    progress.close()


def statistics(scoring):
    """v - o of all candidates in DIRECTIONS, as of `directions`, (N, K) float16, memory-mapped;
    made in three more passes of the teacher, over a sample, the confidence set and all, by the
    first process alone, and kept in scores/matched.npy. scoring: a kd.scoring.Scoring."""
    run, path = scoring.run, scoring.run / "scores" / "matched.npy"
    images = [[name, source.fingerprint] for name, source in scoring.sources.items()]   # in order
    product = run.product("scores/matched.json", remake=True, teacher=scoring.digest,
                          images=images, calibrate=run.settings.calibrate)
    if not product.done:
        write_atomically(path, lambda file: _write_statistics(scoring, file))
        product.write({"images": len(scoring.candidates)}, [path])
    wait()
    return np.load(path, mmap_mode="r")


@alone()        # of several processes the others wait
def _write_statistics(scoring, file):
    run, candidates, count = scoring.run, scoring.candidates, len(scoring.candidates)
    classifier = checkpoints.load(run / "teacher.pt", run.settings.teacher_arch).to(scoring.device)
    parts = [(source, candidates.index[candidates.source == number])
             for number, source in enumerate(scoring.sources.values())]
    step = max(1, count // SAMPLE)
    with watched(classifier) as shown, torch.inference_mode():
        classifier.eval()(models.noise(classifier))     # which may run it twice, in two layouts
        shown()
        axes = directions(torch.cat([block.cpu() for block in _blocks(
            scoring, classifier, shown, [(source, rows[::step]) for source, rows in parts])])).to(
            scoring.device)
        origin = 0.0
        if run.settings.calibrate == "target":
            origin = torch.cat([block @ axes for block in _blocks(
                scoring, classifier, shown, [scoring.confidence])])
            origin = origin[origin.isfinite().all(1)].mean(0)       # of those that are scored
        header = {"descr": "<f2", "fortran_order": False, "shape": (count, axes.shape[1])}
        np.lib.format.write_array_header_2_0(file, header)
        for block in _blocks(scoring, classifier, shown, parts):
            file.write((block @ axes - origin).half().cpu().numpy().data)


def directions(sample):
    """(D, K): the axes in which `sample` (n, D) varies most, all in one unit, the deviation along
    the first. They pass through the origin: the pool's mean is kept.

    A unit of its own for each, its deviation, would make the most of axes along which nothing
    varies: no weights can move the pool's mean there, and those that try take odd images."""
    engine.seed_all(0)
    most = min(DIRECTIONS, *sample.shape)
    _, values, axes = torch.svd_lowrank(sample - sample.mean(0), min(most + 20, *sample.shape),
                                        niter=4)
    spread = max(values[0].item() / len(sample) ** 0.5, LEAST_SPREAD)
    return axes[:, :most] / spread


def match(values, size):
    """Weights (N,) float64 of mean 1, none above N / size, under which the mean of `values` (N,
    K) is as near to 0 as they can bring it: from the dual, which is convex."""
    from scipy.optimize import minimize
    most, step = np.log(len(values) / size), max(1, len(values) // SOLVED)
    if most <= 0:
        return np.ones(len(values))
    some = values if step == 1 else np.array(values[::step])
    point = minimize(_dual, np.zeros(values.shape[1] + 1), (some, most), "L-BFGS-B", jac=True,
                     options={"maxiter": 1000, "ftol": 1e-14, "gtol": 1e-6}).x
    return np.concatenate([np.exp(np.minimum(part @ point, most)) for part in _parts(values)])


def _parts(values):
    for start in range(0, len(values), CHUNK):
        part = np.asarray(values[start:start + CHUNK], np.float64)
        yield np.concatenate([part, np.ones((len(part), 1))], 1)


def _dual(point, values, most):
    """(value, gradient) of the dual, whose gradient is 0 where the weights do as they should.
    point: t, and b last; most: the logarithm of the cap."""
    gradient = RIDGE * point
    gradient[-1] = -1.0
    value = gradient[:-1] @ point[:-1] / 2 - point[-1]
    for part in _parts(values):
        exponent = part @ point
        weight = np.exp(np.minimum(exponent, most))
        value += (weight * (1 + np.maximum(exponent - most, 0))).sum() / len(values)
        gradient += weight @ part / len(values)
    return value, gradient


def gap(values, weights=None):
    """How far the mean of `values` (N, K), under `weights` (N,), is from the target's, in standard
    deviations of the pool along its first direction, over all of them."""
    weights = np.ones(len(values)) if weights is None else weights
    total = sum(weights[at:at + CHUNK] @ np.asarray(values[at:at + CHUNK], np.float64)
                for at in range(0, len(values), CHUNK))
    return float(np.linalg.norm(total / weights.sum()))


def draw(weights, size, seed):
    """Positions (n,) int64, ascending, of `size` images, each as likely as its weight: systematic
    sampling, which takes none twice while no weight is above N / size."""
    share = weights.astype(np.float64)
    share *= size / share.sum()
    start = np.random.default_rng(engine.seed_for(seed, "matched")).random()
    return np.flatnonzero(np.diff(np.floor(np.concatenate([[0], np.cumsum(share)]) + start)) > 0)


def matched_weights(scoring, size):
    """(N,) float32 of all candidates, for a set of `size`; says what they are worth."""
    values = statistics(scoring)
    weights = gathered(match(values, size) if rank() == 0 else None)[0]
    effective = weights.sum() ** 2 / (weights ** 2).sum()
    before, after = gap(values), gap(values, weights)
    aim = ("the confidence set's" if scoring.run.settings.calibrate == "target" else
           "those that the teacher's batch norms remember")
    say(f"matched: the pool's statistics lie {before:.2f} deviations from {aim}, weighted "
        f"{after:.2f}; effective size {effective:,.0f} of {len(weights):,} images")
    if size == len(weights):
        say("  --transfer-size is not below the pool's size, so that all weights are 1: matched "
            "takes every image, and weighted is all.")
    elif after > LITTLE * before:
        say("  No weights bring them much nearer: expect matched to gain little over random "
            "images.")
    return weights.astype(np.float32)
