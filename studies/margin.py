"""Which m in Eq. 6? Calibration of advantage models over m, beside the reward model and RM / T.

    for each seed, label noise, number of pairs and number of epochs:
        hold a fifth of the training prompts out
        train on the rest, from one start, on the same batches:  RM (Eq. 1), AM (Eq. 6) at every m
        on the held-out pairs:  T of the least NLL of s(RM gap / T), and the m of AM's least NLL
        on new pairs of new prompts:  ECE, Brier, NLL, against labels and the true probability

    python -m studies.margin --output_dir docs/results            # nine minutes of one thread
    python -m studies.margin --output_dir OUT --scale smoke       # seconds

Texts are the toy world's: five distinct responses a prompt, references and corruptions, ranked once
(Plackett-Luce) at the task's sharpness x the noise level; all ten pairs of it. The scorer is small
and can over-fit: one hidden layer over the words of prompt and response, those that both hold, and
neighbours. All arms of a run lie side by side in one tensor.

Writes margin_study.json (settings, every number) and margin.png: docs/results/margin.md.
"""

import json
import random
from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, pairwise, product
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from am_train import advantage_model_loss, reward_model_loss, warmup_cosine
from evaluate import expected_calibration_error, ranking_metrics, truth_of_preferred
from plumbing.progress import Progress
from miniature.tables import write_rows
from miniature.world import TASKS, corrupt, gold_reward, preference_probability, prompts, rank
from miniature.world import reference, task_of, vocabulary
from utils import InputError, environment, run_cli

BUCKETS = 1024  # of hashed neighbours
FULL = {
    "noise_levels": [
        0.3,
        1.0,
        3.0,
    ],  # factor on every task's sharpness: 0.3 noisy, 3 nearly certain
    "pairs": [1000, 4000, 16000],  # of which a fifth is held out
    "epochs": [1, 3, 10],
    "margins": [1.0, 1.5, 2.5, 3.0, 4.0, 5.0, 6.0, 10.0, 20.0],
    "test_prompts_per_task": 100,
    "test_rankings_per_prompt": 2,  # in all 24,000 pairs; fewer drown ECE in its noise floor (C7)
    "held_out": 0.2,
    "responses_per_ranking": 5,  # paper §4.1
    "hidden": 128,
    "learning_rate": 3e-3,
    "batch_size": 64,
}
SMOKE = FULL | {
    "noise_levels": [1.0],
    "pairs": [200],
    "epochs": [1, 3],
    "margins": [1.0, 2.5, 20.0],
}
SMOKE |= {"test_prompts_per_task": 5, "hidden": 16}
METRICS = {"ece": "ECE (points)", "brier": "Brier", "nll": "NLL (nats)"}
NLL_TOP = 0.76  # of the figure: what lies above is cut, and stands in the JSON
T_EDGES = (0.0, 1.0, 1.5, 2.5, 100.1)  # of the table by temperature
COMPARISONS = (
    ("rm_scaled", "rm"),
    ("am_2.5", "rm"),
    ("am_2.5", "rm_scaled"),
    ("am_fitted", "rm"),
    ("am_fitted", "rm_scaled"),
    ("am_fitted_scaled", "rm_scaled"),
)


@dataclass
class Args:
    output_dir: Path
    """receives margin_study.json and margin.png"""
    scale: Literal["full", "smoke"] = "full"
    """full: the study of docs/results/margin.md; smoke: one noise level, 200 pairs, seconds"""
    seeds: tuple[int, ...] = (1, 2, 3)
    """each draws its own texts, labels, scorers and batches"""


# --- the world: rankings of texts, pairs with a known probability ---------------------------------


def draw_rankings(names, size, rng):
    """[(task, prompt, responses, golds)]: `size` distinct responses of every prompt, a third of the
    draws right."""
    rankings = []
    for prompt in names:
        texts = {}
        while len(texts) < size:
            texts[reference(prompt) if rng.random() < 1 / 3 else corrupt(prompt, rng)] = None
        golds = gold_reward([prompt] * size, list(texts))
        rankings.append((task_of(prompt), prompt, list(texts), golds))
    return rankings


@lru_cache
def word_ids():
    return {word: i for i, word in enumerate(vocabulary(), 1)}


def encode(rankings):
    """Ids (texts, words): the prompt's words, the response's, those that both hold, and its
    neighbours, hashed; each kind has ids of its own, and 0 pads."""
    word, rows = word_ids(), []
    for _, prompt, texts, _ in rankings:
        for text in texts:
            x, y = ([word[w] for w in part.split()] for part in (prompt, text))
            shared = [2 * len(word) + w for w in set(x) & set(y)]
            pairs = [3 * len(word) + 1 + (31 * v + w) % BUCKETS for v, w in pairwise(y)]
            rows.append(x + [len(word) + w for w in y] + shared + pairs)
    width = max(map(len, rows))
    return torch.tensor([row + [0] * (width - len(row)) for row in rows])


def draw_pairs(rankings, level, rng):
    """Rank every prompt's texts once -> (pairs, 2) text numbers, preferred first; (pairs,) its true
    probability."""
    index, probability, first = [], [], 0
    for task, _, texts, golds in rankings:
        scaled = [level * gold for gold in golds]  # only sharpness x gold counts, so level x gold
        for better, worse in combinations(rank(task, scaled, rng), 2):
            index.append((first + better, first + worse))
            probability.append(preference_probability(task, scaled[better], scaled[worse]))
        first += len(texts)
    return torch.tensor(index), np.array(probability)


# --- scorers --------------------------------------------------------------------------------------


class Scorers(torch.nn.Module):
    """Two-layer perceptrons over bags of features, of one start, side by side in one tensor."""

    def __init__(self, words, arms, hidden):
        super().__init__()
        embedding, readout = torch.randn(words, 1, hidden) / 4, torch.randn(1, hidden) / hidden**0.5
        embedding = embedding.repeat(1, arms, 1).view(words, arms * hidden)
        self.embedding = torch.nn.Parameter(embedding)
        self.bias = torch.nn.Parameter(torch.zeros(arms, hidden))
        self.readout = torch.nn.Parameter(readout.repeat(arms, 1))

    def forward(self, ids):  # (texts, words) -> (texts, arms)
        summed = F.embedding_bag(ids, self.embedding, mode="sum", padding_idx=0)
        hidden = torch.relu(summed.view(-1, *self.bias.shape) + self.bias)
        return (hidden * self.readout).sum(-1)


def train_scorers(ids, index, epochs, seed, settings):
    """Train RM (arm 0) and AM at every m on the pairs `index`; -> Scorers.

    Arms share nothing but start and batches: the gradient of a sum of losses is each arm's own, and
    AdamW works number by number.
    """
    torch.manual_seed(seed)
    words, arms = 3 * len(word_ids()) + 1 + BUCKETS, 1 + len(settings["margins"])
    scorers, size = Scorers(words, arms, settings["hidden"]), settings["batch_size"]
    steps = epochs * -(-len(index) // size)
    adamw = dict(lr=settings["learning_rate"], betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    optimizer = torch.optim.AdamW(scorers.parameters(), **adamw)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine(steps, 0.1, 0.1))
    for _ in range(epochs):
        for batch in torch.randperm(len(index)).split(size):
            chosen, rejected = scorers(ids[index[batch].T.reshape(-1)]).chunk(2)  # (pairs, arms)
            loss = reward_model_loss(chosen[:, 0], rejected[:, 0])  # [Eq. 1]
            for arm, m in enumerate(settings["margins"], 1):
                loss = loss + advantage_model_loss(chosen[:, arm], rejected[:, arm], m)  # [Eq. 6]
            loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return scorers


@torch.no_grad()
def score_gaps(scorers, ids, index):
    """Score of the preferred minus the other -> (arms, pairs) float64; each text is scored once."""
    scores = torch.cat([scorers(part) for part in ids.split(2048)]).double()
    return (scores[index[:, 0]] - scores[index[:, 1]]).T.numpy()


# --- calibration ----------------------------------------------------------------------------------


def fit_temperature(gap):  # (pairs,): score of the preferred minus the other
    """The T in [0.01, 100] at which s(gap / T) has the least NLL.

    The NLL is convex in b = 1 / T with slope -mean(gap s(-b gap)): a bisection for its zero.
    """
    low, high = 0.01, 100.0
    for _ in range(60):
        b = (low * high) ** 0.5
        if (gap / (1 + np.exp(np.clip(b * gap, -700, 700)))).mean() > 0:
            low = b
        else:
            high = b
    return 1 / b


def fit_margin(gaps):  # (arms, pairs) of held-out pairs; arm 0 is RM
    """The AM arm of least NLL."""
    return 1 + int(np.logaddexp(0, -gaps[1:]).mean(1).argmin())


def measure(gap, probability):  # each (pairs,)
    """Metrics against the labels; against the truth ECE, and mean (stated - true probability)^2."""
    stated, sure = 1 / (1 + np.exp(-gap)), 1 / (1 + np.exp(-np.abs(gap)))
    truth = truth_of_preferred(gap, probability)
    return ranking_metrics(gap, np.zeros_like(gap)) | {
        "ece_vs_truth": expected_calibration_error(sure, truth),
        "error_vs_truth": ((stated - probability) ** 2).mean(),
        "overconfidence": 100 * (sure - truth).mean(),  # points, signed
        "mean_gap": np.abs(gap).mean(),
    }


def study(settings, seeds):
    """-> a record a seed, noise level, size, number of epochs: T, fitted m, every arm's metrics."""
    runs, margins, size = [], settings["margins"], settings["responses_per_ranking"]
    regimes = [settings[key] for key in ("noise_levels", "pairs", "epochs")]
    total = len(seeds) * len(list(product(*regimes)))
    progress = Progress(total=total, desc="margin study")
    per_ranking, pool = (
        size * (size - 1) // 2,
        [x for name in TASKS for x in prompts(name, "train")],
    )
    count = max(settings["pairs"]) // per_ranking
    if count > len(pool):
        problem = f"{max(settings['pairs'])} need {count} prompts, the world has {len(pool)}"
        raise InputError(f"pairs: {problem}")
    tested = settings["test_prompts_per_task"]
    new = [prompt for name in TASKS for prompt in prompts(name, "test")[:tested]]
    for seed in seeds:
        rng = random.Random(seed)
        train = draw_rankings(rng.sample(pool, count), size, rng)  # smaller sizes take the first
        test = draw_rankings(new * settings["test_rankings_per_prompt"], size, rng)
        train_ids, test_ids = encode(train), encode(test)
        for level in settings["noise_levels"]:
            index, _ = draw_pairs(train, level, rng)
            test_index, truth = draw_pairs(test, level, rng)
            known = np.clip(truth, 1e-12, 1 - 1e-12)
            floor = measure(np.log(known / (1 - known)), truth)  # what the truth itself would score
            for pairs, epochs in product(settings["pairs"], settings["epochs"]):
                cut = round(pairs * (1 - settings["held_out"]) / per_ranking) * per_ranking
                scorers = train_scorers(train_ids, index[:cut], epochs, seed, settings)
                validation = score_gaps(scorers, train_ids, index[cut:pairs])
                gaps = score_gaps(scorers, test_ids, test_index)
                fitted, t = fit_margin(validation), [fit_temperature(gap) for gap in validation]
                arms = {"rm": gaps[0], "rm_scaled": gaps[0] / t[0]}
                arms |= {f"am_{m:g}": gap for m, gap in zip(margins, gaps[1:], strict=True)}
                arms |= {"am_fitted": gaps[fitted], "am_fitted_scaled": gaps[fitted] / t[fitted]}
                run = {"seed": seed, "noise_level": level, "pairs": pairs, "epochs": epochs}
                run |= {"temperature": t[0], "fitted_m": margins[fitted - 1]}
                measured = {name: measure(gap, truth) for name, gap in arms.items()}
                runs.append(run | {"arms": measured | {"truth": floor}})
                progress.update()
    progress.close()
    return runs


# --- the page -------------------------------------------------------------------------------------


def best_margin(run):
    """The m of least NLL on the test pairs: a hindsight that no user has."""
    arms = {name: arm["nll"] for name, arm in run["arms"].items() if name.startswith("am_")}
    nll = {name: value for name, value in arms.items() if "fitted" not in name}
    return float(min(nll, key=nll.get).removeprefix("am_"))


def compared(runs, summary):
    """{"arm - rival": {metric: summary of the differences over runs}}"""
    found = {}
    for arm, rival in COMPARISONS:
        of = found[f"{arm} - {rival}"] = {}
        for metric in ("accuracy", *METRICS):
            arms = [run["arms"] for run in runs]
            of[metric] = summary(np.array([a[arm][metric] - a[rival][metric] for a in arms]))
    return found


def summarise(runs):
    """Per regime, over seeds: mean, least and largest of T, fitted m, the best m of hindsight, and
    of what AM gains."""
    groups = defaultdict(list)
    for run in runs:
        groups[run["noise_level"], run["pairs"], run["epochs"]].append(run)

    def spread(values):
        return {
            "mean": float(np.mean(values)),
            "low": float(min(values)),
            "high": float(max(values)),
        }

    rows = []
    for regime, group in groups.items():
        row = dict(zip(("noise_level", "pairs", "epochs"), regime, strict=True))
        row |= {key: spread([run[key] for run in group]) for key in ("temperature", "fitted_m")}
        row["overconfidence"] = spread([run["arms"]["rm"]["overconfidence"] for run in group])
        row["best_m"] = spread([best_margin(run) for run in group])
        rows.append(row | compared(group, spread))
    return rows


def by_temperature(runs):
    """The runs by the T of their RM: how sure it is, which m is best there, and what AM gains."""

    def spread(d):
        return {"mean": d.mean(), "std": d.std(), "below_0": int((d < 0).sum())}

    rows = []
    for low, high in pairwise(T_EDGES):
        group = [run for run in runs if low <= run["temperature"] < high]
        row = {"t_from": low, "t_below": high, "runs": len(group)}
        if group:
            sure = [run["arms"]["rm"]["overconfidence"] for run in group]
            row["overconfidence"] = float(np.mean(sure))
            best, fitted = map(best_margin, group), (run["fitted_m"] for run in group)
            for key, values in (("best_m", best), ("fitted_m", fitted)):
                quartiles = np.quantile(list(values), [0.25, 0.5, 0.75], method="nearest")
                row[key] = quartiles.tolist()
            row |= compared(group, spread)
        rows.append(row)
    return rows


def tally(rows, comparison, metric):
    """In how many regimes a difference is below 0 in every seed, above 0 in every seed, neither."""
    differences = [row[comparison][metric] for row in rows]
    better, worse = sum(d["high"] < 0 for d in differences), sum(d["low"] > 0 for d in differences)
    return {"better": better, "worse": worse, "unclear": len(rows) - better - worse}


def log_axis(axis, ticks):
    axis.set(xscale="log")
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=8)
    axis.minorticks_off()
    axis.grid(alpha=0.2)


def draw_metric(axes, runs, settings, metric, colors):
    """Rows: label noise; columns: pairs; colours: epochs; over m."""
    margins = settings["margins"]
    cells = product(enumerate(settings["noise_levels"]), enumerate(settings["pairs"]))
    for (i, level), (j, size) in cells:
        axis, cell = (
            axes[i, j],
            [r for r in runs if (r["noise_level"], r["pairs"]) == (level, size)],
        )
        for epochs, color in colors.items():
            group = [r for r in cell if r["epochs"] == epochs]
            arms = [r["arms"] for r in group]
            curve = np.array([[a[f"am_{m:g}"][metric] for m in margins] for a in arms])
            axis.plot(margins, curve.mean(0), color=color, linewidth=1.8)
            axis.fill_between(margins, curve.min(0), curve.max(0), color=color, alpha=0.18, lw=0)
            for arm, style in (("rm", ":"), ("rm_scaled", "--")):
                axis.axhline(np.mean([a[arm][metric] for a in arms]), color=color, ls=style, lw=1.3)
            fitted = [r["fitted_m"] for r in group], [a["am_fitted"][metric] for a in arms]
            axis.plot(*fitted, "v", color=color, markersize=6, markeredgecolor="white", mew=0.7)
        if metric == "ece":  # Brier and NLL of the truth lie far below every scorer of this study
            floor = [r["arms"]["truth"][metric] for r in cell if r["epochs"] == min(colors)]
            axis.axhline(np.mean(floor), color="gray", lw=0.9)
        log_axis(axis, margins)
        axis.tick_params(axis="y", labelsize=8)
        if i == 0:
            axis.set_title(f"{size:,} pairs", fontsize=10)
        if j == 0:
            axis.set_ylabel(f"sharpness x {level:g}\n{METRICS[metric]}", fontsize=9)
    for axis in axes[-1]:
        axis.set_xlabel("m of Eq. 6", fontsize=9)
    for row in axes if metric == "nll" else ():  # an over-fitted RM would hide the rest
        least = min(np.min(line.get_ydata()) for axis in row for line in axis.lines)
        row[0].set_ylim(least - 0.01, NLL_TOP)


def draw_temperatures(axes, runs, settings, colors):
    """Every run against its RM's temperature: the best m, and AM at the fitted m beside RM / T."""
    markers = dict(zip(settings["pairs"], "os^", strict=False))
    for run in runs:
        look = dict(color=colors[run["epochs"]], marker=markers[run["pairs"]], s=22, alpha=0.75)
        arms, t = run["arms"], run["temperature"]
        axes[0].scatter(t, best_margin(run), linewidth=0, **look)
        for axis, metric in zip(axes[1:], ("nll", "ece"), strict=True):
            gain = arms["am_fitted"][metric] - arms["rm_scaled"][metric]
            axis.scatter(t, gain, linewidth=0, **look)
            axis.set_ylabel(f"{metric.upper()}: AM at fitted m minus RM / T\n(below 0: AM wins)")
    axes[0].set(yscale="log", ylabel="m of least test NLL")
    axes[0].set_yticks(settings["margins"], [f"{m:g}" for m in settings["margins"]], fontsize=8)
    for axis in axes:
        log_axis(axis, [0.5, 0.7, 1, 1.5, 2, 3, 5, 8])
        axis.set_xlabel("T of the RM (above 1: over-confident)")
        axis.axvline(1, color="black", lw=0.6)
    for axis in axes[1:]:
        axis.axhline(0, color="black", lw=0.6)
    shape = dict(color="gray", ls="")
    shapes = [Line2D([], [], marker=m, label=f"{n:,} pairs", **shape) for n, m in markers.items()]
    axes[0].legend(handles=shapes, fontsize=8)


def draw(runs, settings, path):
    """A block for each metric, and what T has to say below."""
    levels, sizes = len(settings["noise_levels"]), len(settings["pairs"])
    colors = dict(zip(settings["epochs"], ("#2a6fb5", "#dd9a1c", "#c8452b"), strict=False))
    heights = [2.3 * levels] * len(METRICS) + [3.6]
    figure = Figure(figsize=(11.5, sum(heights)), layout="constrained")
    *blocks, last = figure.subfigures(len(heights), 1, height_ratios=heights)
    title = dict(fontsize=13, fontweight="bold", x=0.01, ha="left")
    for block, (metric, label) in zip(blocks, METRICS.items(), strict=True):
        block.suptitle(f"{label}, cut at {NLL_TOP:g}" if metric == "nll" else label, **title)
        axes = block.subplots(levels, sizes, sharex=True, sharey="row", squeeze=False)
        draw_metric(axes, runs, settings, metric, colors)
    last.suptitle("Every run against its RM's temperature T", **title)
    draw_temperatures(last.subplots(1, 3), runs, settings, colors)
    looks = {f"{e} epoch{'s' * (e > 1)}": dict(color=c, lw=2.5) for e, c in colors.items()}
    for style, label in (("-", "AM (band: all seeds)"), (":", "RM"), ("--", "RM / T")):
        looks[label] = dict(color="black", ls=style)
    looks["AM at the fitted m, each seed"] = dict(color="black", marker="v", ls="")
    looks["noise floor of the ECE"] = dict(color="gray", lw=0.9)
    keys = [Line2D([], [], label=label, **look) for label, look in looks.items()]
    figure.legend(handles=keys, loc="outside upper center", ncols=4, fontsize=9, frameon=False)
    figure.savefig(path, dpi=100)


def main(args: Args):
    if len(args.seeds) == 0:
        raise InputError("--seeds: give at least one")
    settings = FULL if args.scale == "full" else SMOKE
    runs = study(settings, args.seeds)
    summary = summarise(runs)
    names = [f"{arm} - {rival}" for arm, rival in COMPARISONS]
    verdicts = {name: {k: tally(summary, name, k) for k in METRICS} for name in names}
    report = {"settings": settings | {"seeds": args.seeds}} | environment() | {"verdicts": verdicts}
    report |= {"by_temperature": by_temperature(runs), "summary": summary, "runs": runs}
    rounded = json.loads(json.dumps(report), parse_float=lambda x: round(float(x), 6))
    write_rows(args.output_dir / "margin_study.json", rounded)
    draw(runs, settings, args.output_dir / "margin.png")
    for comparison, metrics in verdicts.items():
        counts = "  ".join(f"{k} {v}" for k, v in metrics.items())
        print(f"{comparison}, {len(summary)} regimes: {counts}")
    print(f"margin_study.json and margin.png written to {args.output_dir}")


if __name__ == "__main__":
    run_cli(main, Args, __doc__)
