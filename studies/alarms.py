"""Do the alarms of tools/watch.py ring in time? The saved PPO runs of the miniature, as a table.

    python -m studies.alarms --folder results/full        # seconds; reads seed_*/ppo*/metrics.jsonl

Gold turns, decided before any run was read: the gold reward of a step is the mean over the step's
responses to main prompts. Take its mean over 5 steps. It has turned at the first step where it
lies more than 3.6 standard errors below its highest value among windows that ended at least 5 steps
before. The standard error is that of a difference of two such means, from the differences of
successive steps. By that rule 1 in 20 runs of 50 steps turns where gold is constant but for noise
(4,000 simulated runs).

A run in which gold does not turn is healthy, and any alarm in it is a false one.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from tools.watch import FALLING_GOLD, Alarms, read_rows

WIDTH, FAR = 5, 3.6  # steps; standard errors
UNIT = " (standard errors)"


@dataclass
class Args:
    folder: str = "results/full"
    """a folder of `python -m miniature.reproduce`"""


def turn_of_gold(gold):
    """gold (steps,) -> the step of its peak, and the step where it has turned or None."""
    means = np.convolve(gold, np.ones(WIDTH) / WIDTH, "valid")  # [i] ends at step i + WIDTH
    error = math.sqrt(np.mean(np.diff(gold) ** 2) / 2 * 2 / WIDTH)
    for i in range(WIDTH, len(means)):
        peak = int(means[: i - WIDTH + 1].argmax())
        if means[peak] - means[i] > FAR * error:
            return peak + WIDTH, i + WIDTH
    return int(means.argmax()) + WIDTH, None


def alarms_of(rows):
    """[(step, dial)] of the alarms that ring on these rows."""
    alarms, rung = Alarms(), []
    for row in rows:
        lines = alarms.ring(row["step"], row)
        rung += [(row["step"], line.split(": ")[1].split(" is ")[0]) for line in lines]
    return rung


def row_of(path):
    """A run's cells, the step where gold turns, its alarms, and those that need no gold reward."""
    rows = list(read_rows(path.parent))
    gold = np.array([row["objective/gold"] for row in rows if "objective/gold" in row])
    peak, turn = turn_of_gold(gold)
    means = [f"{gold[i - WIDTH : i].mean():.2f}" for i in (WIDTH, peak, len(gold))]
    rung = alarms_of(rows)
    blind = [alarm for alarm in rung if alarm[1] != FALLING_GOLD]
    run, seed = path.parent.name.removeprefix("ppo "), path.parts[-3].removeprefix("seed_")
    cells = [run, seed, means[0], f"{means[1]} ({peak})", means[2], turn or "no"]
    cells += [", ".join(f"{step}: {dial.removesuffix(UNIT)}" for step, dial in rung) or "none"]
    return cells, turn, rung, blind


def main(args: Args):
    paths = sorted(Path(args.folder).glob("seed_*/ppo*/metrics.jsonl"), key=lambda p: p.parts[::-1])
    table = [row_of(path) for path in paths]
    heads = ["run", "seed", "gold at first", "at its peak (step)", "at last", "turns at"]
    heads += ["alarms, step: dial"]
    for cells in [heads, ["---"] * len(heads), *(cells for cells, *_ in table)]:
        print("| " + " | ".join(map(str, cells)) + " |")
    turned = [run for run in table if run[1]]
    for what, at in (("any dial", 2), ("a dial without gold", 3)):
        lags = sorted(run[at][0][0] - run[1] for run in turned if run[at])
        false = sum(bool(run[at]) for run in table if not run[1])
        print(f"{what}: rings in {len(lags)} of {len(turned)} runs in which gold turns, so many")
        print(f"steps after: {lags}; in {false} of the other {len(table) - len(turned)}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
