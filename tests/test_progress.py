"""plumbing/progress.py: lines without a terminal, a bar in one, and work that shows how far it is."""

import io
import sys

import pytest

from plumbing import progress
from utils import backend


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """Time that passes by hand, for tqdm's rate and for the lines alike."""
    now = [1000.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


def lines_of(clock, capsys, steps, seconds, **options):
    bar = progress.Progress(range(steps), desc="PPO", **options)
    for step in bar:
        clock[0] += seconds
        bar.set_postfix(kl=step / 100, refresh=False)
    return capsys.readouterr().err.splitlines()


def test_a_line_at_the_start_every_30_seconds_and_at_the_end(clock, capsys):
    """20 steps of 7 seconds: lines at the start, after steps 5, 10, 15 (35, 70, 105 s), and at the end."""
    lines = lines_of(clock, capsys, 20, 7)
    assert [line.partition(",")[0] for line in lines] == [f"PPO: {n} of 20" for n in (0, 5, 10, 15, 20)]
    assert lines[1] == "PPO: 5 of 20,  7.00s/step, 01:44 left, kl=0.04"


def test_slow_steps_have_a_line_each(clock, capsys):
    assert len(lines_of(clock, capsys, 3, 100)) == 4


def test_short_work_with_a_delay_is_silent(clock, capsys):
    assert lines_of(clock, capsys, 4, 1, delay=5) == []
    assert len(lines_of(clock, capsys, 4, 40, delay=5)) == 4


def test_a_terminal_has_a_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    list(progress.Progress(range(3), desc="PPO"))
    assert "\rPPO: 100%|" in sys.stderr.getvalue() and "left" not in sys.stderr.getvalue()


def test_batches_of_sampling_and_scoring_show_themselves(clock, capsys):
    """What has batches of its own, as sampling inside a PPO step, is not silent for long."""

    def function(batch):
        clock[0] += 40
        return [i * i for i in batch]

    assert backend.results(function, [[2, 0], [1]], 3) == [0, 1, 4]
    assert "batches: 2 of 2" in capsys.readouterr().err
