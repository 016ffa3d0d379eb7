"""How far long work has come: a bar on a terminal, plain lines at intervals without one."""
import sys
import time

from kd.files import is_first, say


class Progress:
    """A tqdm bar on a terminal, else a line every half minute. total: None where it is not known.

    unit: "img", or "B" for bytes, which are shown as MB.
    """

    INTERVAL = 30.0     # seconds between plain lines

    def __init__(self, label, total, unit="img", done=0):
        """done: what an earlier sitting did, which has no part in the speed."""
        self.label, self.total, self.unit, self.done, self.skipped = label, total, unit, done, done
        self.start = self.last = time.monotonic()
        self.bar = None
        if sys.stderr.isatty() and is_first():
            from tqdm import tqdm
            self.bar = tqdm(total=total, initial=done, desc=label, unit=unit, leave=False,
                            unit_scale=unit == "B", smoothing=0.1, dynamic_ncols=True)

    def update(self, count, figures=None):
        """Advances by `count`. `figures()` gives a short text; it is called only to be shown."""
        self.done += count
        now = time.monotonic()
        if self.bar is not None:
            self.bar.total = self.total
            self.bar.update(count)
            if figures and now - self.last >= 1.0:
                self.bar.set_postfix_str(figures())
                self.last = now
        elif now - self.last >= self.INTERVAL:
            speed = max((self.done - self.skipped) / (now - self.start), 1e-9)
            unit, scale = ("MB", 1e6) if self.unit == "B" else (self.unit, 1)
            total = f" of {self.total / scale:,.0f}" if self.total else ""
            left = f", {(self.total - self.done) / speed:,.0f} s left" if self.total else ""
            more = f", {figures()}" if figures else ""
            say(f"  {self.label}: {self.done / scale:,.0f}{total} {unit}, "
                f"{speed / scale:,.0f} {unit}/s{left}{more}")
            self.last = now

    def close(self):
        if self.bar is not None:
            self.bar.close()
