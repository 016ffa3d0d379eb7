"""How far a piece of work has come, and the whole job: a bar on a terminal, plain lines without one."""
import sys
import time

from files import is_first, say

# How long an image takes in one kind of work against another, until it has been seen: forward passes of a ResNet-34 as the teacher, a ResNet-18 as the student.
COST = {"teacher": 5.0, "scoring": 1.0, "student": 3.4}

_coming = []        # (label, images) of the long pieces of work after this one, in their order
_pace = {}          # {kind: seconds an image}, as last seen


def kind_of(label):
    """The first word of a label: images of one kind of work take the same time."""
    return label.partition(" ")[0]


def expect(pieces):
    """Says what long work is to come: [(label, images), ...], in its order. What begins is no longer to come, nor is what stands before it."""
    _coming[:] = [(label, images) for label, images in pieces if images]


def seconds_to_come():
    """Of all that is to come after what has begun, as well as is known; None where no pace has been seen yet."""
    known = next((kind for kind in reversed(COST) if kind in _pace), None)
    if known is None:
        return None
    return sum(images * _pace.get(kind_of(label), _pace[known] / COST[known] * COST.get(kind_of(label), 1.0)) for label, images in _coming)


def duration(seconds):
    """For people: 40 s, 12 min, 3 h 05 min."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"


class Progress:
    """A tqdm bar on a terminal; without one, a plain line every half minute. total: None where it isn't known."""

    INTERVAL = 30.0     # seconds between plain lines

    def __init__(self, label, total, unit="img"):
        self.label, self.total, self.unit, self.done, self.skipped = label, total, unit, 0, 0
        self.start = self.last = time.monotonic()
        self.bar = None
        labels = [each for each, _ in _coming]
        if label in labels:
            del _coming[:labels.index(label) + 1]
        if sys.stderr.isatty() and is_first():
            from tqdm import tqdm
            self.bar = tqdm(total=total, desc=label, unit=unit, unit_scale=unit == "B", leave=False, smoothing=0.1, dynamic_ncols=True)

    def skip(self, count):
        """Counts what an earlier sitting did, which has no part in the speed."""
        self.skipped = self.done = count
        if self.bar is not None:
            self.bar.update(count)
            self.bar.unpause()

    def update(self, count, figures=None):
        """Advances by `count`. `figures()` gives a short text; it is called only when something is shown."""
        self.done += count
        now = time.monotonic()
        if self.bar is not None:
            self.bar.total = self.total
            self.bar.update(count)
            if now - self.last >= 1.0:
                everything = self._everything(now)
                self.bar.set_postfix_str(", ".join(filter(None, [figures and figures(), everything])))
                self.last = now
        elif now - self.last >= self.INTERVAL:
            more = f", {figures()}" if figures else ""
            left, everything = f", {self._left(now):,.0f} s left" if self.total else "", self._everything(now)
            say(f"  {self.label}: {self._amount(self.done)}{f' of {self._amount(self.total)}' if self.total else ''} "
                f"{'MB' if self.unit == 'B' else self.unit}, {self._amount(self._speed(now))} {'MB' if self.unit == 'B' else self.unit}/s{left}"
                f"{f' ({everything})' if everything else ''}{more}")
            self.last = now

    def _speed(self, now):
        return max((self.done - self.skipped) / max(now - self.start, 1e-9), 1e-9)

    def _left(self, now):
        return (self.total - self.done) / self._speed(now)

    def _everything(self, now):
        """The time that the whole job still takes, in words; "" where nothing follows."""
        if not self.total or not _coming:
            return ""
        self._keep_pace(now)
        later = seconds_to_come()
        return "" if later is None else f"everything: about {duration(self._left(now) + later)}"

    def _keep_pace(self, now):
        if kind_of(self.label) in COST and self.done > self.skipped:
            _pace[kind_of(self.label)] = 1 / self._speed(now)

    def _amount(self, number):
        return f"{number / 1e6:,.2f}" if self.unit == "B" else f"{number:,.0f}"

    def close(self):
        self._keep_pace(time.monotonic())
        if self.bar is not None:
            self.bar.close()
