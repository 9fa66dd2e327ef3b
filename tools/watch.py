"""Alarms of a PPO run: lines that say which dial of metrics.jsonl has left its band, and why.

    python -m tools.watch runs/ppo                  # a finished run, or one so far
    python -m tools.watch runs/ppo --follow True    # while it runs, up to its last step

Rewards and losses do not show a collapse. KL, length and perplexity do (Secrets of RLHF I, §5.2).
A dial rings when it leaves its band, and again only after QUIET steps inside. BANDS is a table to
change: a number without a source is ours, set between the healthy and the collapsed runs of the
toy world. docs/FAILURES.md shows what fifteen bugs do to the dials, and how early alarms ring.

Exit code: 1 if an alarm rang, 0 if none did, 2 if there is nothing to read.
"""

import json
import math
import sys
import time
from collections import defaultdict, deque
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, variance
from typing import NamedTuple

import tyro


@dataclass
class Args:
    run_folder: tyro.conf.Positional[str]
    """the folder of a run of ppo_sr.py or baselines/ppo_max.py"""
    follow: bool = False
    """wait for more rows, up to the run's last step; Ctrl-C ends it"""
    stop_on_alarm: bool = False
    """end at the first alarm: `python -m tools.watch runs/ppo --follow True ... || kill %1`"""


class Band(NamedTuple):
    low: float
    high: float
    source: str  # of the two numbers
    means: str  # what it usually means to be outside, and what to do


WINDOW = 10  # steps in a mean of scores, gold or a task's KL
QUIET = 5  # steps that a dial must have been inside before it can ring again
FLOOR = 1.0  # nats: a task's KL is compared with the others' mean, or with this if it is smaller
RISE = 2.0  # standard errors: a difference of two windows' means that is more than noise
NO = math.inf
FALLING_GOLD = "objective/gold while scores rise (standard errors)"
BANDS = {  # a dial that is no metric of its own is defined in Alarms.readings
    "objective/kl": Band(
        -1, NO, "TRL's first PPOTrainer warns there",
        "the sampler does not draw from pi; look for filters and masks"),
    "objective/kl per token": Band(
        -NO, 0.2, "ours: at most .17 where gold holds, .40 to .45 in collapses",
        "the policy has left pi_init, where the scorer knows little; "
        "raise --kl_coef or lower --learning_rate"),
    FALLING_GOLD: Band(
        -RISE, NO, "ours: more than noise",
        "the policy hacks the reward; raise --kl_coef, stop earlier or mend the scorer"),
    "val/response_length / step 1's": Band(
        0.5, 2, "dial: Secrets of RLHF I, §5.2; factors: ours",
        "the scorer pays for length or for brevity; read samples.jsonl, raise --kl_coef"),
    "objective/entropy / step 1's": Band(
        0.25, 3, "dial: as above (perplexity); factors: ours, at least .52 in healthy arms",
        "low: one pattern answers everything; high: the policy dissolves; "
        "raise --kl_coef or lower --learning_rate"),
    "log perplexity / entropy": Band(
        0.67, 1.5, "two estimates of one entropy, so 1 but for noise; width: ours",
        "the tokens are no samples of pi: the sampler has filters or another temperature, "
        "or a mask is shifted"),
    "val/no_eos_share": Band(
        -NO, 0.9, "ours",
        "hardly any response ends: pad = eos, an SFT model that never learned to end, "
        "or a short --response_length"),
    "val/explained_variance": Band(
        0, NO, "a constant explains 0",
        "the critic is worse than a constant; "
        "raise --critic_learning_rate or --critic_warmup_steps"),
    "policy/clipfrac_avg": Band(
        -NO, 0.2, "ours: at most .02 in the toy world",
        "updates overshoot the clip range; lower --learning_rate or --num_ppo_epochs"),
    "val/ratio": Band(
        0.9, 1.1, "it starts at 1; width: ours, half of --cliprange",
        "updates carry the policy too far from its samples; "
        "lower --learning_rate or --num_ppo_epochs"),
    "val/no_eos_share - step 1's": Band(
        -NO, 0.25, "ours",
        "responses no longer end; set --missing_eos_penalty or raise --response_length"),
    "task/*/kl / other tasks'": Band(
        -NO, 4, "ours: at most 3.6 in healthy arms, 5.7 in a collapsed one",
        "this task drifts alone, often into another task's pattern; "
        "read its samples, rehearse it, or even out the scores"),
}  # fmt: skip
GRACE = {"val/explained_variance": 10}  # steps before a dial is judged: the critic learns first


class Alarms:
    """Takes one step's metrics after the other; names as in ppo_sr.py, and any may be absent."""

    def __init__(self):
        self.first = {}  # metric: its value at step 1, which is pi_init's: sampling comes first
        self.outside = {}  # dial: the last step outside its band
        self.surprise = deque(maxlen=WINDOW)  # log perplexity / entropy
        self.kl = defaultdict(lambda: deque(maxlen=WINDOW))  # of each task
        self.pairs = []  # (score, gold) of every step
        self.read = 0  # dials so far

    def ring(self, step, metrics):
        """The alarm lines of this step."""
        lines = []
        for dial, task, value in self.readings(metrics):
            band, name = BANDS[dial], dial.replace("*", task)
            self.read += 1
            if step <= GRACE.get(dial, 0) or band.low <= value <= band.high:  # NaN is in no band
                continue
            if step - self.outside.get(name, -QUIET - 1) > QUIET:
                limits = {"above": band.low, "below": band.high}
                limits = ", ".join(f"{k} {v:g}" for k, v in limits.items() if abs(v) != NO)
                lines.append(
                    f"alarm, step {step}: {name} is {value:.3g} (band: {limits}): {band.means}"
                )
            self.outside[name] = step
        return lines

    def readings(self, metrics):
        """(dial, task, value) of every dial that can be read by now."""
        values = dict(metrics)
        for name in ("val/response_length", "objective/entropy", "val/no_eos_share"):
            if name in metrics:
                first = self.first.setdefault(name, metrics[name])
                values[f"{name} / step 1's"] = metrics[name] / max(first, 1e-8)
                values[f"{name} - step 1's"] = metrics[name] - first
        if "objective/kl" in metrics and "val/response_length" in metrics:
            length = max(metrics["val/response_length"], 1)
            values["objective/kl per token"] = metrics["objective/kl"] / length
        if "objective/gold" in metrics:
            self.pairs.append((metrics["objective/scores"], metrics["objective/gold"]))
            if len(self.pairs) >= 2 * WINDOW:
                score, gold = map(rise, zip(*self.pairs, strict=True))
                values[FALLING_GOLD] = gold if score > RISE else 0.0
        if "policy/perplexity" in metrics and "objective/entropy" in metrics:
            surprise = math.log(metrics["policy/perplexity"])
            self.surprise.append(surprise / max(metrics["objective/entropy"], 1e-8))
            if len(self.surprise) == WINDOW:
                values["log perplexity / entropy"] = sum(self.surprise) / WINDOW
        yield from self.tasks(metrics)
        yield from ((dial, "", values[dial]) for dial in values if dial in BANDS)

    def tasks(self, metrics):
        """Each task's KL beside the others'. Both are means, as a task has few responses a step."""
        for name, value in metrics.items():
            if name.startswith("task/") and name.endswith("/kl"):
                self.kl[name[5:-3]].append(value)
        means = {task: sum(kl) / len(kl) for task, kl in self.kl.items()}
        for task, kl in means.items() if len(means) > 1 else ():
            others = (sum(means.values()) - kl) / (len(means) - 1)
            yield "task/*/kl / other tasks'", task, kl / max(others, FLOOR)


def rise(values):
    """The last window's mean less the first window's, in standard errors of that difference."""
    first, last = values[:WINDOW], values[-WINDOW:]
    error = math.sqrt((variance(first) + variance(last)) / WINDOW)
    return (mean(last) - mean(first)) / max(error, 1e-9)


def numbers(row):
    """JSON has no NaN: a null is one."""
    return {k: math.nan if v is None else v for k, v in row.items()}


def read_rows(folder, follow=False):
    """The rows of a run's metrics.jsonl and, if asked, each later one as soon as it is there."""
    path, config, done = Path(folder) / "metrics.jsonl", Path(folder) / "config.json", 0
    while True:
        text = path.read_text(encoding="utf-8") if path.is_file() or not follow else ""
        lines = text.split("\n")[:-1]  # half a line is not over yet
        rows = [json.loads(line, object_hook=numbers) for line in lines]
        yield from rows[done:]
        done = max(done, len(rows))  # a resumed run repeats the rows after its checkpoint
        if not follow:
            return
        if rows:
            flags = json.loads(config.read_text(encoding="utf-8"))["args"]
            if rows[-1]["step"] >= flags.get("total_steps", NO):
                return
        time.sleep(2)


def main(args: Args):
    alarms, rung = Alarms(), False
    try:
        for row in read_rows(args.run_folder, args.follow):
            for line in alarms.ring(row["step"], row):
                print(line, flush=True)
                rung = True
            if rung and args.stop_on_alarm:
                break
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"error: {args.run_folder}: no metrics.jsonl to read ({error})", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        pass
    if not alarms.read:  # silence would be taken for health
        problem = "metrics.jsonl has none of the dials: no run of ppo_sr.py, or none of its steps"
        print(f"error: {args.run_folder}: {problem}", file=sys.stderr)
        return 2
    return int(rung)


if __name__ == "__main__":
    options = {"use_underscores": True, "config": (tyro.conf.FlagConversionOff,)}
    options["prog"] = "python -m tools.watch"
    sys.exit(main(tyro.cli(Args, description=__doc__, **options)))
