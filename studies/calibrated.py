"""What calibrates scores of real pairs better than AM's bound, or than the RM with one temperature?

    python -m studies.calibrated --folders runs/bakeoff_* --output_dir results/calibrated

The folders are --output_dir of baselines/reward_losses.py, with seeds 1 to 2n: the first n explore,
the others confirm. Nothing is trained here. Every candidate turns the scores of one scorer, or of
n, into differences d = score(y_c) - score(y_r); s(d) is the probability that it states. What it
fits, it fits on the held-out pairs alone.

    one T         d / T                             the RM's is the control "RM rescaled"
    T by task     d / T_k, log T_k pulled to log T  k (log T_k - log T)^2 joins the sum of NLLs
    ensemble      mean of d over n scorers / T
    doubt         d / sqrt(T^2 + v w)               w: variance of d over n scorers; T, v fitted

The rule, written before it ran: a candidate is better if its ECE and its NLL are lower than those
of both controls, AM (m = 2.5) and RM rescaled, by intervals of 95 % (test prompts resampled) below
0, with the first half of the seeds and again with the second, on two thirds of the folders or more.
Both halves are tested on the same pairs, so the second confirms seeds, not prompts.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.optimize import minimize, minimize_scalar

from baselines.reward_losses import bake_off_table, fit_temperature
from miniature.jobs import read_jsonl
from miniature.tables import markdown_table, with_interval
from utils import Count, InputError, environment, run_cli, write_json

AM, CONTROL = "AM", "RM, one T"
METRICS = ("ece", "nll")


@dataclass
class Args:
    folders: tuple[str, ...]
    """output folders of baselines/reward_losses.py"""
    output_dir: str
    """receives calibrated.json and calibrated.md"""
    pull: float = 10.0
    """k of T by task, in pairs"""
    num_bootstrap: Count = 1000
    """resamples of the test prompts"""


def nll(delta):
    return np.logaddexp(0, -delta)


def temperatures_by_task(delta, tasks, pull):  # both (held-out pairs,)
    """T, {task: T_k}:  argmin of  sum NLL(d / T_k) + pull (log T_k - log T)^2,  T fitted first."""
    one, tasks, found = fit_temperature(delta), np.array(tasks), {}
    for task in set(tasks.tolist()):
        own = delta[tasks == task]

        def loss(log_t, own=own):
            return nll(own / np.exp(log_t)).sum() + pull * (log_t - np.log(one)) ** 2

        best = minimize_scalar(loss, bounds=(-5, 5), method="bounded").x
        found[task] = float(np.exp(best))
    return one, found


def fit_doubt(mean, variance):  # both (held-out pairs,)
    """(T^2, v) of  d / sqrt(T^2 + v w)  with the least NLL."""

    def loss(logs):
        return nll(mean / np.sqrt(np.exp(logs[0]) + np.exp(logs[1]) * variance)).mean()

    starts = [np.array([0.0, low]) for low in (-4.0, 0.0)]
    best = min((minimize(loss, x, method="Nelder-Mead") for x in starts), key=lambda fit: fit.fun)
    return np.exp(best.x)


def candidates(held, test, held_tasks, test_tasks, pull):
    """{name: [differences of the test pairs, one entry a scorer or one for all n]}.

    held, test: {"RM" or "AM": (n scorers, pairs)}.
    """
    found = {"RM": list(test["RM"]), AM: list(test["AM"])}
    for kind in ("RM", "AM"):
        alone, by_task = [], []
        for own, other in zip(held[kind], test[kind], strict=True):
            one, of_tasks = temperatures_by_task(own, held_tasks, pull)
            alone.append(other / one)
            by_task.append(other / np.array([of_tasks.get(task, one) for task in test_tasks]))
        found[f"{kind}, one T"] = alone
        if len({*held_tasks}) > 1:  # else the two are one
            found[f"{kind}, T by task"] = by_task
        mean, variance = held[kind].mean(0), held[kind].var(0, ddof=1)
        found[f"{kind}, ensemble"] = [test[kind].mean(0) / fit_temperature(mean)]
        t2, v = fit_doubt(mean, variance)
        doubt = np.sqrt(t2 + v * test[kind].var(0, ddof=1))
        found[f"{kind}, doubt"] = [test[kind].mean(0) / doubt]
    return found


def compare(found, prompts, num_bootstrap):
    """{name: its metrics, and of each control the difference with its interval of 95 %}."""
    runs = {name: [(d, np.zeros(len(d))) for d in of] for name, of in found.items()}
    table, tasks = {name: {} for name in found}, ["all"] * len(prompts)
    for control in (AM, CONTROL):
        # bake_off_table's differences are to the arm called RM
        arms = {"RM": runs[control]} | {f"of {name}": of for name, of in runs.items()}
        beside = bake_off_table(arms, tasks, prompts, num_bootstrap)
        for name, entry in table.items():
            own = beside[f"of {name}"]
            entry |= {k: float(own[k]["mean"]) for k in ("accuracy", *METRICS)}
            for k in METRICS:
                to = own[k]["minus_rm"]
                interval = [float(to["low"]), float(to["high"])]
                entry[f"{k} - {control}"] = {"difference": to["difference"], "interval": interval}
    return table


def is_better(entry):
    """Below both controls in ECE and NLL, by intervals."""
    return all(entry[f"{k} - {c}"]["interval"][1] < 0 for k in METRICS for c in (AM, CONTROL))


def read(folder):
    """{"RM", "AM": differences (seeds, pairs)}, the rows of these pairs, how many are held out."""
    folder = Path(folder)
    if not (folder / "bakeoff.json").is_file():
        raise InputError(f"--folders {folder}: holds no bakeoff.json of baselines/reward_losses.py")
    report = json.loads((folder / "bakeoff.json").read_text())
    held = int(re.search(r"(\d+) held-out", report["header"])[1])
    rows = read_jsonl(folder / "eval.jsonl")
    scores, seeds = {}, report["args"]["seeds"]
    if len(seeds) < 4 or len(seeds) % 2:
        raise InputError(f"--folders {folder}: has {len(seeds)} seeds; 4, 6 or more are needed")
    for kind, arm in (("RM", "RM"), ("AM", "AM_m=2.5")):
        of_seeds = [
            json.loads((folder / f"{arm}_seed{s}" / "scores.json").read_text()) for s in seeds
        ]
        scores[kind] = np.array([np.subtract(of["chosen"], of["rejected"]) for of in of_seeds])
    return scores, rows, held


def main(args: Args):
    tables = {"explore": {}, "confirm": {}}
    if len({Path(folder).name for folder in args.folders}) < len(args.folders):
        raise InputError("--folders: two of them have one name")
    for folder in args.folders:
        scores, rows, num_held = read(folder)
        half = len(scores["RM"]) // 2
        tasks = [row.get("task", "all") for row in rows]
        prompts = [str(row["prompt"]) for row in rows[num_held:]]
        for part, seeds in (("explore", slice(half)), ("confirm", slice(half, None))):
            held = {kind: of[seeds, :num_held] for kind, of in scores.items()}
            test = {kind: of[seeds, num_held:] for kind, of in scores.items()}
            found = candidates(held, test, tasks[:num_held], tasks[num_held:], args.pull)
            tables[part][Path(folder).name] = compare(found, prompts, args.num_bootstrap)
    names = dict.fromkeys(n for of in tables["explore"].values() for n in of)
    counts, verdicts = {}, {}
    for name in [n for n in names if n not in (AM, CONTROL)]:
        better = {
            part: {folder for folder, t in of.items() if name in t and is_better(t[name])}
            for part, of in tables.items()
        }
        counts[name] = {part: len(of) for part, of in better.items()}
        verdicts[name] = 3 * len(set.intersection(*better.values())) >= 2 * len(args.folders)
    columns = [
        "",
        "accuracy",
        "ECE",
        "NLL",
        *(f"{k} − {c}" for c in (AM, CONTROL) for k in METRICS),
    ]
    lines = []
    for part, of in tables.items():
        for folder, table in of.items():
            body = []
            for name, row in table.items():
                cells = [f"{row['accuracy']:.1f}", f"{row['ece']:.1f}", f"{row['nll']:.3f}"]
                for control in (AM, CONTROL):
                    for k, form in zip(METRICS, ("+.1f", "+.3f"), strict=True):
                        entry = row[f"{k} - {control}"]
                        cells.append(with_interval(entry["difference"], entry["interval"], form))
                body.append([name, *cells])
            lines += [f"**{folder}, seeds to {part}**\n", markdown_table(columns, body)]
    verdict_rows = [
        [
            name,
            *(f"{n} of {len(args.folders)}" for n in counts[name].values()),
            "yes" if v else "no",
        ]
        for name, v in verdicts.items()
    ]
    head = ("", "better: explore", "confirm", "by the rule")
    text = "\n".join([markdown_table(head, verdict_rows), *lines])
    folder = Path(args.output_dir)
    write_json(
        folder / "calibrated.json",
        {"args": vars(args), "tables": tables, "better": verdicts} | environment(),
    )
    (folder / "calibrated.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    run_cli(main, Args, __doc__)
