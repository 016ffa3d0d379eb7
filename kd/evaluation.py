"""The split of the target, and how good a network is on it."""
import numpy as np

from kd import engine
from kd.files import UserError, digest, write_atomically
from kd.processes import on_all_ranks

TRAIN_SHARE = 0.8       # of the target's training split; the rest is the confidence set
WATCHED = 2000          # images of the confidence set on which accuracy is noted after an epoch


@on_all_ranks
def saved_split(run, count):
    """The run's (train, confidence), int64 indices, sorted, together all, kept in split.npz: a
    teacher that is trained here never learns from the second."""
    path, product = run / "split.npz", run.product("split.json", images=count)
    if not product.done:
        rng = np.random.default_rng(engine.seed_for(run.settings.seed, "split"))
        train, confidence = map(np.sort, np.split(rng.permutation(count),
                                                  [round(TRAIN_SHARE * count)]))
        if len(train) < 2 or not len(confidence):
            raise UserError(f"The target's {count} training images are too few to split off a "
                            "confidence set.")
        write_atomically(path, lambda file: np.savez(file, train=train, confidence=confidence))
        product.write({"train": len(train), "confidence": len(confidence)}, [path])
        return train, confidence
    with np.load(path) as split:
        return split["train"], split["confidence"]


def test_of(target):
    """A digest of its test images and their labels; None where it has none."""
    return target.test and f"{target.test.digest}{digest(target.test.labels)}"


def watcher(target, confidence, device):
    """A function network -> its accuracy on about WATCHED images of the confidence set."""
    rows = confidence[:: max(1, len(confidence) // WATCHED)]
    images, labels = target.train.images[rows], target.train.labels[rows]
    return lambda network: engine.accuracy(network, images, labels, device=device)


def source_agreement(classifier, run, device):
    """Share of transfer.make_held_out's images that get the teacher's class; None without any."""
    if not (run.settings.data_free and (run / "scores/held_out.json").exists()):
        return None
    run.content_of("scores/held_out.json")
    with np.load(run / "scores/held_out.npz") as held:
        return engine.accuracy(classifier, held["images"], held["predicted"], device=device)


def evaluate(classifier, target, confidence, path, device):
    """{"accuracy": on the test split, "confidence_accuracy": on the confidence set, "parameters":
    how many it has}, None where the target has no images for it, and what the classifier answers to
    the test split, (N,) int64 or None, which is written to `path` beside the labels. The test split
    is read here alone."""
    predicted, accuracy = None, None
    if target.test:
        predicted = engine.answers(classifier, target.test.images, device=device)
        write_atomically(path, lambda file: np.savez(file, predicted=predicted,
                                                     labels=target.test.labels))
        accuracy = float((predicted == target.test.labels).mean())
    on_confidence = None
    if target.train:
        on_confidence = engine.accuracy(classifier, target.train.images, target.train.labels,
                                        confidence, device)
    size = sum(each.numel() for each in classifier.network.parameters())
    return {"accuracy": accuracy, "confidence_accuracy": on_confidence,
            "parameters": size}, predicted
