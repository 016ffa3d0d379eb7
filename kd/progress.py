"""How far long work has come: tqdm's bar on a terminal, its figures as plain lines without one."""
import sys

from tqdm import tqdm

from kd.files import is_first, say

PLAIN = "  {{desc}}: {}{{unit}}, {{rate_fmt}}{}{{postfix}}"


class Progress(tqdm):
    """total: None where it is not known. unit: " img", or "B" for bytes. done: what an earlier
    sitting did, which has no part in the speed."""

    monitor_interval = 0        # no thread of its own: update() looks at the clock

    def __init__(self, label, total, unit=" img", done=0):
        self.is_plain, self.figures = not sys.stderr.isatty(), None
        count = "{n:,} of {total:,}" if total and unit != "B" else "{n_fmt} of {total_fmt}"
        layout = PLAIN.format(count, ", {remaining} left" if total else "")
        interval, delay = (30, 30) if self.is_plain else (1, 0)
        super().__init__(desc=label, total=total, initial=done, unit=unit, unit_scale=unit == "B",
                         miniters=1, mininterval=interval, delay=delay, leave=False,
                         bar_format=layout if self.is_plain else None, dynamic_ncols=True,
                         disable=not is_first())

    def update(self, n=1, figures=None):
        """Advances by `n`. `figures()` gives a short text; it is called only to be shown."""
        self.figures = figures
        return super().update(n)

    def display(self, msg=None, pos=None):
        if msg is None and self.figures:        # else it is only cleared
            self.set_postfix_str(self.figures(), refresh=False)
        if not self.is_plain:
            return super().display(msg, pos)
        if msg is None:
            say(str(self))
