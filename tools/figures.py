"""Figures 1a, 2, 3 and 4 of a calibration.

    python -m tools.figures --calibration runs/calibration                              # seconds

reads calibration.json and scores.jsonl of `evaluate.py calibration`, and writes beside them

    reliability.png     Fig. 2    accuracy by score difference; a larger dot is a bin of more pairs
    histograms.png      Fig. 3    scores of the chosen and of the rejected responses
    task_scores.png     Fig. 1a   scores of the two tasks whose means lie farthest apart
    task_balance.png    Fig. 4    mean and std of the scores of every task

As in the paper, the x axis of Figure 2 is the difference of the two scores. The bins are those of
the ECE, of equal width in the stated probability s(difference): they grow wider to the right.
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from tools.statistics import column, load_calibration
from utils import InputError, run_cli


@dataclass
class Args:
    calibration: str
    """output folder of `evaluate.py calibration`"""
    output_dir: str | None = None
    """receives the pictures (default: the same folder)"""

    def __post_init__(self):  # a default, too, is tried by run_cli before any work
        self.output_dir = self.output_dir or self.calibration


def source_of(path):
    """The calibration that a picture of ours was drawn from, or None."""
    from PIL import Image

    with contextlib.suppress(OSError), Image.open(path) as picture:
        return picture.info.get("Source")


def short(task):  # a name of 100,000 characters takes minutes to draw
    return task if len(task) <= 40 else f"{task[:39]}…"


def reliability(scorers, titles):
    """Fig. 2, {scorer: title}: a dot is a bin of the ECE, its area the number of its pairs."""
    figure = Figure(figsize=(4.5 * len(titles), 4.2), layout="constrained")
    axes = figure.subplots(1, len(titles), sharey=True, squeeze=False)[0]
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        bins = [b for b in scorers[name]["bins"] if b["count"] >= 20]  # fewer say nothing
        x, y, count = (np.array([b[k] for b in bins]) for k in ("gap", "accuracy", "count"))
        gaps = np.linspace(0, max([4.0, *(1.05 * x)]), 200)
        stated = 1 / (1 + np.exp(-gaps))
        axis.plot(gaps, stated, color="tab:orange", label="stated: 1/(1+exp(-difference))")
        axis.plot(x, y, color="tab:blue", lw=0.8)
        area = 1000 * count / max(1, count.sum())
        axis.scatter(x, y, area, color="tab:blue", alpha=0.6, lw=0, label="how often right")
        axis.text(0.02, 0.95, "above: under-confident", color="gray", transform=axis.transAxes)
        axis.text(0.5, 0.35, "below: over-confident", color="gray", transform=axis.transAxes)
        axis.set(xlabel="difference of the two scores (mean of a bin)", ylim=(0.48, 1.03))
        axis.set_title(f"{title}: ECE {scorers[name]['ece']:.1f} points", fontsize=11)
    axes[0].set_ylabel("share of pairs ranked right (larger dot: more pairs)", fontsize=9)
    legend = axes[-1].legend(fontsize=9, loc="lower right")
    for handle in legend.legend_handles[1:]:
        handle.set_sizes([60])
    return figure


def draw(scorers, scores, tasks, folder, source=""):
    """scorers: of calibration.json; scores {name: (2, pairs)}; tasks (pairs,); source: its name."""

    def save(figure, path):
        figure.savefig(path, dpi=130, metadata={"Source": source})
        plt.close(figure)

    plt.switch_backend("Agg")
    plt.rcParams["text.parse_math"] = False  # a task may be called anything
    names, tasks = list(scorers), column([*tasks, *tasks])

    def panels():
        size = (4.2 * len(names), 3.2)
        return plt.subplots(1, len(names), figsize=size, squeeze=False, layout="constrained")

    figure = reliability(scorers, {name: short(name) for name in names})
    save(figure, folder / "reliability.png")

    figure, axes = panels()
    for axis, name in zip(axes[0], names, strict=True):
        edges = np.histogram_bin_edges(scores[name], 60)
        sides = {"chosen": "tab:green", "rejected": "tab:red"}
        for values, (label, color) in zip(scores[name], sides.items(), strict=True):
            axis.hist(values, edges, alpha=0.5, label=label, color=color)
        axis.set(title=name, xlabel="score", ylabel="responses")
        axis.legend(fontsize=8)
    save(figure, folder / "histograms.png")

    # the paper shows two tasks under the RM: here those that the first scorer sets farthest apart
    per_task = scorers[names[0]]["per_task"]
    extremes = [f(per_task, key=lambda t: per_task[t]["mean"]) for f in (min, max)]
    figure, axes = panels()
    for axis, name in zip(axes[0], names, strict=True):
        values = scores[name].ravel()
        edges = np.histogram_bin_edges(values, 50)
        for task in dict.fromkeys(extremes):
            axis.hist(values[tasks == task], edges, alpha=0.5, density=True, label=short(task))
        axis.set(title=name, xlabel="score", ylabel="density")
        axis.legend(fontsize=8)
    save(figure, folder / "task_scores.png")

    figure, axes = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    for axis, what in zip(axes, ("mean", "std"), strict=True):
        width = 0.8 / len(names)
        for k, name in enumerate(names):
            x = np.arange(len(per_task)) + (k - (len(names) - 1) / 2) * width
            values = [scorers[name]["per_task"][task][what] for task in per_task]
            axis.bar(x, values, width, label=name)
        names_of_tasks = [short(task) for task in per_task]
        axis.set_xticks(range(len(per_task)), names_of_tasks, rotation=40, ha="right", fontsize=8)
        axis.axhline(0, color="black", linewidth=0.5)
        axis.set_title(f"{what} of the scores of each task")
        axis.legend(fontsize=8)
    save(figure, folder / "task_balance.png")


def main(args: Args):
    report, scores, rows = load_calibration(args.calibration)
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    source, picture = str(Path(args.calibration)), folder / "reliability.png"
    elsewhere = args.output_dir != args.calibration
    if elsewhere and picture.exists() and source_of(picture) != source:
        problem = "holds the figures of another calibration; give another, or remove them"
        raise InputError(f"--output_dir {folder}: {problem}")
    draw(report["scorers"], scores, [row.get("task", "all") for row in rows], folder, source)
    print(f"figures written to {folder}")


if __name__ == "__main__":
    run_cli(main, Args, __doc__)
