"""Alarms in crafted histories and none in a healthy one; the command on files that grow."""

import json
import math
import runpy
import subprocess
import sys

import numpy as np
import pytest

from studies.alarms import turn_of_gold
from tools import watch
from tools.watch import BANDS, FALLING_GOLD, QUIET, WINDOW, Alarms, read_rows

HEALTHY = {
    "objective/kl": 0.5, "objective/entropy": 0.25, "objective/scores": 0.1, "objective/gold": 0.6,
    "val/response_length": 10.0, "val/no_eos_share": 0.015,
    "val/explained_variance": 0.6, "val/ratio": 1.0, "policy/clipfrac_avg": 0.01,
    "policy/approxkl_avg": 0.001, "policy/perplexity": 1.3,
    "task/sort/kl": 0.5, "task/greet/kl": 0.5, "task/greet/score": 0.1,
}  # fmt: skip


def healthy(step):
    """KL, scores and gold rise, entropy halves, the critic starts badly: a run that goes well."""
    noise, entropy = 0.02 * (-1) ** step, 0.25 - 0.0025 * step
    return HEALTHY | {
        "objective/kl": 0.01 * step, "task/greet/kl": 0.02 * step, "task/sort/kl": 0.005 * step,
        "objective/scores": 0.004 * step + noise, "objective/gold": 0.6 + 0.002 * step + noise,
        "objective/entropy": entropy, "policy/perplexity": math.exp(entropy + noise),
        "val/response_length": 10 + 5 * noise, "val/explained_variance": -0.5 if step < 5 else 0.8,
    }  # fmt: skip


def rung(history):
    alarms = Alarms()
    return [line for step, metrics in enumerate(history, 1) for line in alarms.ring(step, metrics)]


def test_a_healthy_run_is_quiet():
    assert rung([healthy(step) for step in range(1, 51)]) == []


LENGTH, ENTROPY, TASK = (
    "val/response_length / step 1's",
    "objective/entropy / step 1's",
    "task/*/kl / other tasks'",
)
SURPRISE = "log perplexity / entropy"
CASES = [  # (dial, metric, just inside, just outside, other metrics of that step)
    ("objective/kl", "objective/kl", -0.95, -1.05),
    ("objective/kl per token", "objective/kl", 1.95, 2.05),  # of 10 tokens
    (LENGTH, "val/response_length", 19.5, 20.5),
    (LENGTH, "val/response_length", 5.5, 4.9),
    (ENTROPY, "objective/entropy", 0.065, 0.06),
    (ENTROPY, "objective/entropy", 0.74, 0.76),
    ("val/explained_variance", "val/explained_variance", 0.01, -0.01),
    ("val/explained_variance", "val/explained_variance", 0.01, math.nan),
    ("policy/clipfrac_avg", "policy/clipfrac_avg", 0.19, 0.21),
    ("val/ratio", "val/ratio", 0.91, 0.89),
    ("val/ratio", "val/ratio", 1.09, 1.11),
    ("val/no_eos_share - step 1's", "val/no_eos_share", 0.26, 0.27),  # from .015
    ("val/no_eos_share", "val/no_eos_share", 0.89, 0.91),  # from .8
    # nine steps of log 1.3 / .25 = 1.0495 and one of x: their mean is 1.5 at x = 5.555,
    # a perplexity of 4.01, and .67 at x = -2.745, one of .503
    (SURPRISE, "policy/perplexity", 3.98, 4.04),
    (SURPRISE, "policy/perplexity", 0.51, 0.50),
    # three tasks: the other two have a mean of (.5 + 3.1) / 2 = 1.8, so the bound is
    # 4 x 1.8 = 7.2: (9 x .5 + x) / 10 at x = 67.5
    (TASK, "task/greet/kl", 67, 68, {"task/a/kl": 3.1}),
    # where the others have hardly moved the bound is 4 x 1: x = 35.5
    (TASK, "task/greet/kl", 35, 36, {"task/sort/kl": 0}),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]} {case[3]}")
def test_each_alarm_rings_outside_its_band_and_only_there(case):
    dial, metric, inside, outside, others = (*case, {})[:5]
    before = HEALTHY
    if metric == "val/response_length":  # KL per token must not ring instead
        before = HEALTHY | {"objective/kl": 0}
    if dial == "val/no_eos_share":
        before = HEALTHY | {dial: 0.8}
    assert rung([before] * 11 + [before | others | {metric: inside}]) == []
    (line,) = rung([before] * 11 + [before | others | {metric: outside}])
    assert line.startswith(f"alarm, step 12: {dial.replace('*', 'greet')} is ")
    assert "(band: " in line and BANDS[dial].means in line


def test_an_alarm_line_names_value_band_and_remedy():
    (line,) = rung([HEALTHY] * 11 + [HEALTHY | {"val/response_length": 21.0}])
    assert line == (
        "alarm, step 12: val/response_length / step 1's is 2.1 (band: above 0.5, below 2): "
        "the scorer pays for length or for brevity; read samples.jsonl, raise --kl_coef"
    )


def test_every_dial_has_a_case():
    assert {dial for dial, *_ in CASES} | {FALLING_GOLD} == set(BANDS)
    assert all(band.source and band.means and band.low < band.high for band in BANDS.values())


def hacked(gold_slope, score_slope, steps=2 * WINDOW, noise=0.02):
    """Scores and gold that move after the first window.

    Noise of +- .02 has a sample variance of .0004 x 10/9.
    """
    late = [max(0, step - WINDOW) for step in range(1, steps + 1)]
    return [
        HEALTHY | {"objective/scores": score_slope * (t > 0) + noise * (-1) ** i,
                   "objective/gold": 0.6 + gold_slope * (t > 0) + noise * (-1) ** i}
        for i, t in enumerate(late)
    ]  # fmt: skip


def test_proxy_gold_divergence():
    # standard error of a difference of two windows: sqrt(2 x .0004 x (10/9) / 10) = .009428,
    # two of them .018856
    (line,) = rung(hacked(-0.02, 0.02))
    assert line.startswith(f"alarm, step 20: {FALLING_GOLD} is -2.12 ")
    assert rung(hacked(-0.018, 0.02)) == []  # gold fell within noise
    assert rung(hacked(-0.02, 0.018)) == []  # the proxy did not rise
    assert rung(hacked(0.02, 0.02)) == [] and rung(hacked(-0.02, -0.02)) == []
    assert rung(hacked(-0.02, 0.02, steps=2 * WINDOW - 1)) == []  # windows do not overlap
    history = hacked(-0.02, 0.02)
    for row in history:
        del row["objective/gold"]
    assert rung(history) == []


def test_the_first_window_stays_the_first():
    history = hacked(-0.02, 0.02, steps=3 * WINDOW)
    assert len(rung(history)) == 1  # still out at step 30, and not said again
    back = hacked(-0.02, 0.02) + [HEALTHY] * (WINDOW + QUIET)  # gold is .6 again, scores .1
    assert len(rung(back + hacked(-0.02, 0.02, steps=3 * WINDOW)[WINDOW:])) == 2


def test_the_critic_has_a_grace_period():
    bad = HEALTHY | {"val/explained_variance": -1.0}
    assert rung([bad] * 10) == []
    assert len(rung([bad] * 11)) == 1


def test_a_long_run_is_not_flooded():
    bad = HEALTHY | {"val/ratio": 1.5}
    assert len(rung([bad] * 100)) == 1
    assert len(rung([bad, HEALTHY] * 50)) == 1  # to and fro: it never came back
    assert len(rung([bad] + [HEALTHY] * (QUIET - 1) + [bad])) == 1
    assert len(rung([bad] + [HEALTHY] * QUIET + [bad])) == 2


def test_dials_are_told_apart():
    """Two tasks, and two dials at one step, have a line each."""
    tasks = {f"task/{name}/kl": 0.0 for name in "abc"}
    history = [
        HEALTHY | tasks,
        HEALTHY | tasks | {"task/a/kl": 9.0},
        HEALTHY | tasks | {"task/b/kl": 90.0, "val/ratio": 2},
    ]
    lines = rung(history)
    assert [line.split(" is ")[0] for line in lines] == [
        "alarm, step 2: task/a/kl / other tasks'",
        "alarm, step 3: task/b/kl / other tasks'",
        "alarm, step 3: val/ratio",
    ]


def test_one_task_alone_and_absent_metrics_are_passed_over():
    assert rung([{"task/sort/kl": 99.0}] * 30) == []
    assert rung([{}] * 30) == []


# --- the command --------------------------------------------------------------------------------


def write(folder, rows, end="\n"):
    folder.mkdir(exist_ok=True)
    text = "\n".join(json.dumps({"step": step} | row) for step, row in rows)
    (folder / "metrics.jsonl").write_text(text + end, encoding="utf-8")
    (folder / "config.json").write_text(json.dumps({"args": {"total_steps": 12}}))


def run(folder, **flags):
    return watch.main(watch.Args(str(folder), **flags))


BAD = {"val/ratio": 2.0, "policy/clipfrac_avg": 0.5}


def test_exit_codes_and_lines(tmp_path, capsys):
    history = [*enumerate([{"eval/main/gold": 1.0}] + [HEALTHY] * 12)]
    write(tmp_path / "a", history)
    assert run(tmp_path / "a") == 0 and capsys.readouterr().out == ""
    write(tmp_path / "b", [*history, (13, HEALTHY | BAD), (14, HEALTHY), (20, HEALTHY | BAD)])
    assert run(tmp_path / "b") == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["alarm, step 13"] * 2 + ["alarm, step 20"] * 2
    assert run(tmp_path / "b", stop_on_alarm=True) == 1
    assert capsys.readouterr().out.splitlines() == lines[:2]
    for name, text in (("none", None), ("text", "no json\n"), ("list", "[1]\n"), ("key", "{}\n")):
        if text:
            (tmp_path / name).mkdir()
            (tmp_path / name / "metrics.jsonl").write_text(text)
        assert run(tmp_path / name) == 2
        out, error = capsys.readouterr()
        assert out == "" and error.startswith(f"error: {tmp_path / name}: ")
        assert error.count("\n") == 1


def test_a_folder_without_a_dial_is_not_called_healthy(tmp_path, capsys):
    """Of am_train.py, of a run before its first step, and of one that has nothing yet."""
    for number, rows in enumerate(([(1, {"loss": 1.0, "accuracy": 60.0})], [(0, {"eval/main/kl": 0.0})], [])):
        write(tmp_path / str(number), rows, end="\n" * len(rows))
        assert run(tmp_path / str(number)) == 2
        out, error = capsys.readouterr()
        assert out == "" and error.startswith(f"error: {tmp_path / str(number)}: metrics.jsonl has none of the dials")
        assert error.count("\n") == 1


def test_half_a_line_waits_for_its_end(tmp_path):
    write(tmp_path, [(1, HEALTHY), (2, BAD)], end="")
    assert [row["step"] for row in read_rows(tmp_path)] == [1]


def test_a_growing_run_is_followed_to_its_last_step(tmp_path, monkeypatch):
    """The folder is made late, a row comes in two halves, a resumed run repeats rows."""
    rows = [(step, HEALTHY) for step in range(13)]
    stages = [
        lambda: write(tmp_path / "run", rows[:3], end=""),
        lambda: write(tmp_path / "run", rows[:6]),
        lambda: write(tmp_path / "run", rows[:4]),  # --resume cuts it to its checkpoint
        lambda: write(tmp_path / "run", rows[:8]),
        lambda: write(tmp_path / "run", rows),
    ]
    monkeypatch.setattr(watch.time, "sleep", lambda seconds: stages.pop(0)())
    steps = [row["step"] for row in read_rows(tmp_path / "run", follow=True)]
    assert steps == [step for step, _ in rows] and not stages


def test_ctrl_c_ends_it_with_what_has_rung(tmp_path, monkeypatch):
    def stop(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(watch.time, "sleep", stop)
    write(tmp_path, [(1, HEALTHY)])
    assert run(tmp_path, follow=True) == 0
    write(tmp_path, [(1, HEALTHY | BAD)])
    assert run(tmp_path, follow=True) == 1


def test_the_command_needs_no_torch(tmp_path):
    write(tmp_path, [(1, HEALTHY | BAD)])
    code = "import runpy, sys\ntry: runpy.run_module('tools.watch', run_name='__main__')\n"
    code += "finally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout.count("alarm, step 1: ") == 2, done.stderr
    assert done.stdout.endswith("False\n")


def test_usage_shows_how_it_is_run(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [watch.__file__, "--help"])
    with pytest.raises(SystemExit):
        runpy.run_path(watch.__file__, run_name="__main__")
    assert capsys.readouterr().out.startswith("usage: python -m tools.watch [")


def test_where_gold_turns_by_hand():
    """Noise of +- .01, so that a mean of five steps is up or down by .002."""
    noise = np.array([0.01 * (-1) ** step for step in range(40)])
    assert turn_of_gold(0.5 + noise) == (5, None)
    late = np.where(np.arange(40) >= 20, 0.1, 0.0)
    # a fall of .1 from step 21 on: the error is sqrt((38 x .02^2 + .08^2) / 39 / 5) = .0105, and
    # 3.6 of it are .038. Steps 17 to 21 lie .02 lower, steps 18 to 22 by .04 + .004 of noise
    assert turn_of_gold(0.5 + noise - late) == (5, 22)
    rising = np.linspace(0, 1, 40)
    assert turn_of_gold(rising + noise) == (40, None)


def test_a_null_is_no_number_and_rings(tmp_path):
    """JSON has no NaN, so metrics.jsonl has null for one: it is in no band."""
    rows = [{"step": step} | HEALTHY | {"val/ratio": None if step == 2 else 1.0} for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [line for row in read_rows(tmp_path) for line in Alarms().ring(row["step"], row)]
    assert len(lines) == 1 and lines[0].startswith("alarm, step 2: val/ratio is nan")
