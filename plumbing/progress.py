"""How far a run is: a bar in a terminal, lines where there is none (nohup, a cluster, | tee)."""

import io
import sys
import time

from tqdm import tqdm

SECONDS = 30  # between two lines
LINE = "{desc}: {n_fmt} of {total_fmt}, {rate_inv_fmt}, {remaining} left{postfix}"


class Progress(tqdm):
    """tqdm, but without a terminal it writes a line at the start, one at least every 30 seconds
    (or when the next item is done) and one at the end.

    line: what it writes there; delay: shows nothing before that many seconds, and leaves nothing.
    """

    def __init__(self, *args, line=LINE, delay=0, **options):
        self.lines, self.due = not sys.stderr.isatty(), 0.0
        if self.lines:  # tqdm's own writes are made for a terminal, and go nowhere
            options |= dict(bar_format=line, file=io.StringIO(), mininterval=1, miniters=1)
        super().__init__(*args, delay=delay, leave=not delay, **{"unit": "step"} | options)

    def display(self, msg=None, pos=None):
        if not self.lines:
            return super().display(msg, pos)
        now, end = time.monotonic(), self.n == self.total
        if msg is None and (now >= self.due or end) and self.due < float("inf"):
            print(self, file=sys.stderr, flush=True)
            self.due = float("inf") if end else now + SECONDS
        return True


def progress(items, name, done=0, **how):
    """The items, after `done` others, with a bar or lines."""
    return Progress(items, desc=name, initial=done, total=done + len(items), **how)
