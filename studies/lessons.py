"""The files and figures of docs/lessons/ that come from runs of the toy world.

    python -m miniature.reproduce --seeds 1 2 3 4 5 6 7 8 --output_dir results/eight       # hours
    python -m studies.lessons --folder results/eight/seed_1                              # seconds
    python -m studies.lessons                                     # draws the figures anew, alone

From one seed's folder it keeps, under docs/lessons/runs/, what a reader can download:

    hacked/, healthy/   RM-PPO and AM-PPO-SR: config.json as it is; metrics.jsonl to five digits;
                        samples.jsonl, the answers to PROMPTS at every evaluation
    calibration.json    of `evaluate.py calibration`, as it is
    counts.json         how many training pairs a task has; how often HONK answers a test prompt
    greet_pairs.jsonl   the training pairs of the greetings, all of them

and it draws reliability.png and two_runs.png beside the pages.
"""

import json
import math
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from miniature.jobs import read_jsonl
from tools.figures import reliability
from tools.watch import BANDS
from utils import run_cli, write_json, write_jsonl

PAGES = Path(__file__).parents[1] / "docs" / "lessons"
RUNS = {"hacked": "ppo RM-PPO", "healthy": "ppo AM-PPO-SR"}
COLOURS = {"hacked": "tab:red", "healthy": "tab:blue"}
STORY = "hi , write a evening greeting for ben"  # the prompt that one lesson follows
HONK = "a goose says honk ."
MAIN, FORGET = "eval/prompts_test_main", "eval/prompts_test_forget"


@dataclass
class Args:
    folder: str | None = None
    """a seed's folder of the reproduction, to take the files from"""
    output_dir: str = str(PAGES)
    """holds runs/ and receives the figures"""


# --- the files ------------------------------------------------------------------------------------


def rounded(row):
    """Five significant digits: half the bytes."""
    return {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in row.items()}


def kept_prompts(rows):
    """STORY, and of every other task the test prompt that comes first."""
    first = {row["task"]: row["prompt"] for row in reversed(rows)}
    first |= {row["task"]: STORY for row in rows if row["prompt"] == STORY}
    return {*first.values()}


def take(folder, runs):
    counts = {"answers_at_an_evaluation": {}, HONK: {}}
    for name, run in RUNS.items():
        (runs / name).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / run / "config.json", runs / name / "config.json")
        metrics = read_jsonl(folder / run / "metrics.jsonl")
        write_jsonl(runs / name / "metrics.jsonl", [rounded(row) for row in metrics])
        tests = [r for r in read_jsonl(folder / run / "samples.jsonl") if r["set"] != "train"]
        prompts = kept_prompts(tests)
        samples = [rounded(row) for row in tests if row["prompt"] in prompts]
        write_jsonl(runs / name / "samples.jsonl", samples)
        steps = sorted({row["step"] for row in tests})
        honks = Counter(row["step"] for row in tests if row["response"] == HONK)
        counts["answers_at_an_evaluation"][name] = len(tests) // len(steps)
        counts[HONK][name] = {step: honks[step] for step in steps}
    pairs = read_jsonl(folder / "preferences_train" / "preferences_train.jsonl")
    counts["training_pairs"] = dict(Counter(row["task"] for row in pairs))
    write_json(runs / "counts.json", counts)
    write_jsonl(runs / "greet_pairs.jsonl", [row for row in pairs if row["task"] == "greet"])
    shutil.copyfile(folder / "calibration" / "calibration.json", runs / "calibration.json")


# --- the figures ----------------------------------------------------------------------------------


def at_step_1(rows, name):
    return next(row[name] for row in rows if row["step"] == 1)


def dials(rows):
    """{title: (steps, values, dial of tools/watch.py or None)} of one run, in order."""
    tests = [row for row in rows if f"{MAIN}/gold" in row]
    train = [row for row in rows if row["step"]]

    def of_tests(name):
        return [row["step"] for row in tests], [row[name] for row in tests], None

    def of_train(value, dial):
        return [row["step"] for row in train], [value(row) for row in train], dial

    def ratio(name, dial):
        start = at_step_1(rows, name)
        return of_train(lambda row: row[name] / start, dial)

    mean, std = (at_step_1(rows, f"objective/{k}") for k in ("scores", "scores_std"))
    return {
        "gold, main test prompts": of_tests(f"{MAIN}/gold"),
        "gold, forget test prompts": of_tests(f"{FORGET}/gold"),
        "KL a token": of_train(
            lambda row: row["objective/kl"] / row["val/response_length"], "objective/kl per token"
        ),
        "NLL of the known answers, forget": of_tests(f"{FORGET}/nll"),
        "score gained (stds of step 1)": of_train(
            lambda row: (row["objective/scores"] - mean) / std, None
        ),
        "entropy / step 1's": ratio("objective/entropy", "objective/entropy / step 1's"),
        "explained variance of the critic": of_train(
            lambda row: row["val/explained_variance"], "val/explained_variance"
        ),
        "clip fraction": of_train(lambda row: row["policy/clipfrac_avg"], "policy/clipfrac_avg"),
    }


def draw_runs(metrics, path):
    figure = Figure(figsize=(12, 5.4), layout="constrained")
    axes = figure.subplots(2, 4)
    for name, rows in metrics.items():
        for axis, (title, (x, y, dial)) in zip(axes.flat, dials(rows).items(), strict=True):
            axis.plot(x, y, color=COLOURS[name], lw=1.3, label=name)
            axis.set_title(title, fontsize=10)
            for limit in (BANDS[dial].low, BANDS[dial].high) if dial else ():
                if math.isfinite(limit):
                    axis.axhline(limit, color="black", lw=0.9, ls=":")
    for axis, label in zip(axes[:, 0], ("tell the runs apart", "ring in neither run"), strict=True):
        axis.set_ylabel(label, fontsize=12)
    for axis in axes[1]:
        axis.set_xlabel("PPO step")
    axes[0, 0].legend(fontsize=9)
    figure.savefig(path, dpi=100, metadata={"Software": None})


def main(args: Args):
    pages = Path(args.output_dir)
    runs = pages / "runs"
    if args.folder:
        take(Path(args.folder), runs)
    calibration = json.loads((runs / "calibration.json").read_text(encoding="utf-8"))
    figure = reliability(calibration["scorers"], {"rm": "reward model", "am": "advantage model"})
    figure.savefig(pages / "reliability.png", dpi=110, metadata={"Software": None})
    metrics = {name: read_jsonl(runs / name / "metrics.jsonl") for name in RUNS}
    draw_runs(metrics, pages / "two_runs.png")
    print(f"{pages}: figures of {', '.join(RUNS)}")


if __name__ == "__main__":
    run_cli(main, Args, __doc__)
