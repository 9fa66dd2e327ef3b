"""Is the weighted sum of Eq. 8 a good estimate of the expected reward? How far may a policy be?

    e(x) = E_{y ~ pi_phi} r(x, y)                  Eq. 7, known here: the mean of many responses
    1/K sum_k w_k r(x, y_k),  y_k ~ pi'            Eq. 8's sum at N = K
                 w_k = pi_phi(y_k | x) / pi'(y_k | x)

    for each policy pi':  a young one (SFT on fewer demonstrations), or pi_phi, hotter
        KL(pi_phi || pi'), the effective sample size (sum w)^2 / (n sum w^2), the weights
        for K = 1, 3, 8 and each estimator:  bias, variance and RMSE against e(x), 95 % intervals

    python -m studies.importance --folder results/full/seed_1 --output_dir OUT      # 10 minutes
    python -m studies.importance --folder FOLDER --output_dir OUT --scale smoke     # seconds

r is the toy world's gold reward, fixed and known, so nothing but the weights is on trial. pi_phi is
the SFT policy. Responses are drawn independently. One cut at the length limit counts as
what was drawn: its log-prob has no end-of-sequence token, so E[w] = 1 holds exactly. Estimators:

    unweighted        1/K sum r                    as if pi' were pi_phi
    plain             1/K sum w r                  Eq. 8; no bias, a variance that grows
    clip c            1/K sum min(w, c) r          loses the mass above c: the answer is drawn to 0
    length            1/K sum w^(1/tokens) r       what length normalisation does
    self-normalised   sum w r / sum w              for comparison; at K = 1 the unweighted one
    distinct          mean of r, distinct texts    unweighted, as a ranking holds no text twice

A learned reward's zero is arbitrary (Eq. 1 knows only differences), and whatever has E[w] != 1 or
varies multiplies that zero. So everything is measured twice: on gold as it is, and on gold less its
overall mean under pi_phi (`centred`). Beside them stands the RMSE of always answering 0, where an
estimate ends whose weights are all but 0: less is needed to know anything.

Writes importance_study.json (settings, every number) and importance.png: docs/CHOICES.md, C2.
"""

import shutil
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from matplotlib.figure import Figure

import sft
from am_train import importance_weights
from plumbing.progress import Progress
from miniature.jobs import read_json
from miniature.world import RESPONSE_LENGTH, TASKS, gold_reward, prompts
from tools.write_logprobs import named_policies, sequence_logprobs
from utils import InputError, encode_prompts, environment, generate, load_policy, load_rows
from utils import load_tokenizer, run_cli, write_json, write_jsonl

FULL = {
    "prompts_per_task": 20,  # of the test split: 240 prompts
    "truth_draws": 200,  # responses of pi_phi for each prompt, behind e(x)
    "kl_draws": 40,  # of them, those behind KL(pi_phi || pi')
    "draws": 72,  # of each policy for each prompt: 9 estimates of 8, 24 of 3, 72 of 1
    "responses": [1, 3, 8],  # K
    "temperatures": [1.0, 1.2, 1.4, 1.7, 2.0],  # 1: pi_phi itself, where all weights are 1
    "demonstrations": [12800, 6400, 3200, 1600],  # of a young policy; SFT saw 14,400 three times
    "resamples": 1000,  # bootstrap over prompts
    "seed": 1,
}
SMOKE = FULL | {"prompts_per_task": 1, "truth_draws": 12, "kl_draws": 4, "draws": 16}
SMOKE |= {"resamples": 50, "responses": [1, 4], "temperatures": [1.0, 1.5], "demonstrations": [64]}
WEIGHTS = {  # estimator -> method and clip of am_train.importance_weights
    "unweighted": ("none", math.inf),
    "plain": ("clip", math.inf),
    "clip 10": ("clip", 10.0),
    "clip 2": ("clip", 2.0),
    "length": ("length", math.inf),
}
LOG_WEIGHT_BINS = np.linspace(-20, 10, 61)  # of log10 w


@dataclass
class Args:
    folder: Path
    """the folder of one seed of the reproduction: sft/model (pi_phi), sft/config.json and
    world/sft.jsonl"""
    output_dir: Path
    """receives importance_study.json and importance.png"""
    alternates: tuple[str, ...] = ()
    """further alternate policies, each NAME=FOLDER or NAME=FOLDER@TEMPERATURE"""
    scale: Literal["full", "smoke"] = "full"
    """full: the numbers of docs/results/choices.md; smoke: 12 prompts, seconds"""


# --- drawing: tables (prompts, draws) of responses, their rewards and log-probs -------------------


def draw(model, tokenizer, prompt_ids, count, temperature):
    """`count` independent responses to every prompt -> one list of tuples of ids a prompt."""
    repeated = [ids for ids in prompt_ids for _ in range(count)]
    responses = generate(model, tokenizer, repeated, RESPONSE_LENGTH, temperature, 512)
    starts = range(0, len(responses), count)
    return [[tuple(ids) for ids in responses[i : i + count]] for i in starts]


def rewards_of(tokenizer, names, table):
    """Gold of every response: (prompts, draws)."""
    flat = [list(ids) for row in table for ids in row]
    texts = tokenizer.batch_decode(flat, skip_special_tokens=True)
    repeated = [prompt for prompt, row in zip(names, table, strict=True) for _ in row]
    return np.array(gold_reward(repeated, texts)).reshape(len(names), -1)


def logprobs_of(model, tokenizer, prompt_ids, table, temperature):
    """log pi(y | x) of every response: (prompts, draws); a text drawn twice is scored once."""
    keys = [(x, y) for x, row in enumerate(table) for y in row]
    distinct = list(dict.fromkeys(keys))
    texts = [([*prompt_ids[x], *y], len(prompt_ids[x])) for x, y in distinct]
    logprobs = sequence_logprobs(model, tokenizer, texts, temperature, 256)
    scores = dict(zip(distinct, logprobs, strict=True))
    return np.array([scores[key] for key in keys]).reshape(len(table), -1)


def train_young_policies(args, settings, folder):
    """SFT as pi_phi's, from the same start, once over the first so many demonstrations
    -> [(name, folder, temperature)]."""
    config = read_json(args.folder / "sft" / "config.json")["args"]
    columns = {"prompt": "prompt", "response": "response"}
    rows, young = load_rows(args.folder / "world" / "sft.jsonl", columns), []
    for count in settings["demonstrations"]:
        data, run = folder / f"{count}.jsonl", folder / str(count)
        write_jsonl(data, rows[:count])
        changes = dict(dataset_name=str(data), output_dir=str(run), num_train_epochs=1)
        changes |= dict(tokenizer_name_or_path=str(args.folder / "world" / "tokenizer"))
        shutil.rmtree(run, ignore_errors=True)  # what a killed run left
        sft.main(sft.Args(**config | changes))
        young.append((f"young, {count}", str(run / "model"), 1.0))
    return young


# --- estimating -----------------------------------------------------------------------------------


def estimate(weights, rewards, size, self_normalised=False):  # each (prompts, draws)
    """[Eq. 8]'s sum at N = K = size, on consecutive groups of draws -> (prompts, draws // size)."""
    shape = len(rewards), rewards.shape[1] // size, size
    w, r = (table[:, : shape[1] * size].reshape(shape) for table in (weights, rewards))
    return (w * r).sum(-1) / (w.sum(-1) if self_normalised else size)


def distinct_mean(table, rewards, size):
    """Mean reward over the distinct texts among `size` draws -> (prompts, draws // size)."""
    starts, means = range(0, rewards.shape[1] // size * size, size), []
    for row, r in zip(table, rewards, strict=True):
        groups = (dict(zip(row[i : i + size], r[i : i + size], strict=True)) for i in starts)
        means.append([np.mean(list(group.values())) for group in groups])
    return np.array(means)


def errors(estimates, truth, truth_error):  # (prompts, groups), (prompts,); the truth's variance
    """Bias, variance and squared error of every prompt, each (prompts,), free of truth's noise."""
    squared = ((estimates - truth[:, None]) ** 2).mean(1) - truth_error
    return estimates.mean(1) - truth, estimates.var(1, ddof=1), squared


def interval(samples):
    return np.percentile(samples, [2.5, 97.5]).tolist()


def summary(per_prompt, baseline, picks):  # picks: (resamples, prompts) indices
    """Bias, std and RMSE over prompts with 95 % bootstrap intervals, and the RMSE less that of the
    unweighted estimate."""
    bias, variance, squared = per_prompt

    def root(values):
        return np.sqrt(max(values.mean(), 0)), np.sqrt(values[picks].mean(1).clip(0))

    (rmse, rmses), (unweighted, unweighted_rmses) = root(squared), root(baseline[2])
    return {
        "bias": bias.mean(),
        "bias_interval": interval(bias[picks].mean(1)),
        "variance": variance.mean(),
        "rmse": rmse,
        "rmse_interval": interval(rmses),
        "rmse_less_unweighted": rmse - unweighted,
        "rmse_less_unweighted_interval": interval(rmses - unweighted_rmses),
    }


def measure(table, rewards, log_current, log_behaviour, truth, truth_error, settings):
    """What the JSON says of one policy's draws, each (prompts, draws), but for its divergence."""
    tokens = np.array([[len(y) for y in row] for row in table])
    flat = [torch.from_numpy(a.ravel()) for a in (log_current, log_behaviour, tokens)]
    weights = {}
    for name, how in WEIGHTS.items():
        weights[name] = importance_weights(*flat, *how).double().numpy().reshape(rewards.shape)
    plain, log10 = weights["plain"], (log_current - log_behaviour) / math.log(10)
    rng, sizes = np.random.default_rng(settings["seed"]), (settings["resamples"], len(truth))
    picks = rng.integers(len(truth), size=sizes)
    binned = np.histogram(log10.clip(*LOG_WEIGHT_BINS[[0, -1]]), LOG_WEIGHT_BINS)[0]
    report = {
        "expected_reward": rewards.mean(),
        "effective_sample_share": plain.sum() ** 2 / (plain.size * (plain**2).sum()),
        "mean_weight": {name: w.mean() for name, w in weights.items()},
        "share_of_weights_above": {f"{w:g}": (plain > w).mean() for w in (10, 2, 0.1)},
        "log10_weight_histogram": binned.tolist(),
    }
    for label, zero in (("gold", 0.0), ("centred", truth.mean())):
        r, report[label] = rewards - zero, {}
        for size in settings["responses"]:
            estimates = {name: estimate(w, r, size) for name, w in weights.items()}
            estimates["self-normalised"] = estimate(plain, r, size, self_normalised=True)
            estimates["distinct"] = distinct_mean(table, r, size)
            found = {k: errors(v, truth - zero, truth_error) for k, v in estimates.items()}
            summaries = {k: summary(e, found["unweighted"], picks) for k, e in found.items()}
            report[label][f"K={size}"] = summaries
    return report


def pays_until(divergences, rmses, unweighted):
    """Where an estimator's RMSE first exceeds the unweighted one's: {kl, between}; None if never.

    On policies in order of divergence, the first at 0. `between`: the divergences of the policies
    before and after. kl: linear between them in the log of the RMSEs' ratio, or that of the nearest
    policy where this one is too far already.
    """
    ratio = np.log(np.array(rmses) / np.array(unweighted))
    for i in range(1, len(ratio)):
        if ratio[i] > 0:
            share = 1.0 if i == 1 else float(-ratio[i - 1] / (ratio[i] - ratio[i - 1]))
            near, far = between = [float(k) for k in divergences[i - 1 : i + 1]]
            return {"kl": near + share * (far - near), "between": between}
    return None


def crossovers(policies, settings):
    """{gold or centred: {kind of policy: {K: {estimator: where it stops beating unweighted}}}}"""
    found = {"gold": {}, "centred": {}}
    for label in found:
        for kind in ("hot", "young"):  # both start at pi_phi itself
            start = [p for p in policies if p["name"] == "hot, 1"]
            others = [p for p in policies if p["kind"] == kind and p["name"] != "hot, 1"]
            family = start + sorted(others, key=lambda p: p["kl"])
            kl, found[label][kind] = [p["kl"] for p in family], {}
            for size in (f"K={k}" for k in settings["responses"]):
                rmse = {
                    n: [p[label][size][n]["rmse"] for p in family] for n in start[0][label][size]
                }
                weighted = [name for name in rmse if name not in ("unweighted", "distinct")]
                until = {n: pays_until(kl, rmse[n], rmse["unweighted"]) for n in weighted}
                found[label][kind][size] = until
    return found


# --- figure ---------------------------------------------------------------------------------------

COLORS = {
    "unweighted": "#7b7f87",
    "plain": "#c8452b",
    "clip 10": "#dd9a1c",
    "clip 2": "#17876a",
    "length": "#8a5fb0",
    "self-normalised": "#2a6fb5",
}


def draw_errors(axis, report, label, what):
    """Bias or RMSE of every estimator at the largest K against the divergence."""
    policies = sorted(report["policies"], key=lambda p: p["kl"])
    size = f"K={report['settings']['responses'][-1]}"
    for name, color in COLORS.items():
        for kind, marker, line in (("hot", "o", "-"), ("young", "s", "--")):
            family = [p for p in policies if p["kind"] == kind]
            values = [p[label][size][name] for p in family]
            low, high = zip(*(v[f"{what}_interval"] for v in values), strict=True)
            x, y = [p["kl"] for p in family], [v[what] for v in values]
            looks = dict(marker=marker, ms=4, lw=1.4, color=color)
            axis.plot(x, y, line, label=name if kind == "hot" else None, **looks)
            axis.fill_between(x, low, high, color=color, alpha=0.12, lw=0)
            until = report["pays_until"][label][kind][size].get(name)
            if what == "rmse" and until:
                face = color if kind == "hot" else "white"
                looks = dict(marker="^", ms=9, color=color, mfc=face, clip_on=False, zorder=5)
                axis.plot(until["kl"], 0.0, **looks)
    level = 0 if what == "bias" else report["rmse_of_answering_zero"][label]
    axis.axhline(level, color="black", lw=0.7, ls="-" if what == "bias" else ":")
    axis.set_xscale("symlog", linthresh=0.1)
    axis.set_xlim(0)
    axis.set_xlabel("KL(pi_phi || pi'), nats")
    if what == "rmse":
        worst = [p["gold"][size][n]["rmse"] for p in policies for n in COLORS if n != "plain"]
        axis.set_ylim(0, 1.15 * max(worst))


def draw_weights(axis, policies):
    middles = (LOG_WEIGHT_BINS[1:] + LOG_WEIGHT_BINS[:-1]) / 2
    others = [p for p in policies if p["name"] != "hot, 1"]
    for policy, color in zip((others[0], others[-1]), ("#2a6fb5", "#c8452b"), strict=True):
        share = np.array(policy["log10_weight_histogram"]) / sum(policy["log10_weight_histogram"])
        effective = f"effective {100 * policy['effective_sample_share']:.2g} %"
        known = f"{policy['name']}: KL {policy['kl']:.2g}, {effective}"
        width = middles[1] - middles[0]
        axis.bar(middles, share, width=width, color=color, alpha=0.55, label=known)
    axis.axvline(0, color="black", lw=0.6)
    axis.set(yscale="log", xlabel="log10 of the weight (outermost bars: and beyond)")
    axis.set_ylabel("share of responses")
    axis.set_title("Weights of a near and a far policy", fontsize=10)
    axis.legend(fontsize=8)


def figure(report, path):
    fig = Figure(figsize=(13, 8), layout="constrained")
    axes = fig.subplots(2, 2).ravel()
    size = f"K={report['settings']['responses'][-1]}"
    triangle = "triangle: from here on worse than unweighted; dotted: answering 0"
    panels = [
        ("gold", "bias", f"Bias of the estimated expected reward, {size}"),
        ("gold", "rmse", f"RMSE, {size}; {triangle}"),
        ("centred", "rmse", f"RMSE, {size}, of a reward with mean 0 under pi_phi"),
    ]
    for axis, (label, what, title) in zip(axes, panels, strict=False):
        draw_errors(axis, report, label, what)
        axis.set_title(title, fontsize=10)
    axes[0].legend(fontsize=8, title="solid: hotter   dashed: younger", title_fontsize=8)
    draw_weights(axes[3], sorted(report["policies"], key=lambda p: p["kl"]))
    fig.savefig(path, dpi=110)


def main(args: Args):
    # --- set up -----------------------------------------------------------------------------------
    settings = {"full": FULL, "smoke": SMOKE}[args.scale]
    for path in ("sft/model", "sft/config.json", "world/sft.jsonl"):
        if not (args.folder / path).exists():
            raise InputError(f"--folder {args.folder}: {path} is missing; run make reproduce first")
    current = str(args.folder / "sft" / "model")
    extra = named_policies("--alternates", args.alternates).items()
    model, tokenizer = load_policy(current), load_tokenizer(current)
    count = settings["prompts_per_task"]
    names = [prompt for task in TASKS for prompt in prompts(task, "test")[:count]]
    rows = [{"prompt": prompt} for prompt in names]
    prompt_ids = encode_prompts(tokenizer, rows, 64, RESPONSE_LENGTH, False, "toy world")

    # --- the truth: e(x) of every prompt ----------------------------------------------------------
    torch.manual_seed(settings["seed"])
    own = draw(model, tokenizer, prompt_ids, settings["truth_draws"], 1.0)
    own_rewards = rewards_of(tokenizer, names, own)
    truth = own_rewards.mean(1)
    truth_error = own_rewards.var(1, ddof=1) / settings["truth_draws"]
    own = [row[: settings["kl_draws"]] for row in own]
    own_logprobs = logprobs_of(model, tokenizer, prompt_ids, own, 1.0)

    # --- every alternate policy -------------------------------------------------------------------
    policies = []
    with tempfile.TemporaryDirectory() as folder:
        alternates = [("hot", f"hot, {t:g}", current, t) for t in settings["temperatures"]]
        young = train_young_policies(args, settings, Path(folder))
        alternates += [("young", *policy) for policy in young]
        alternates += [("other", name, *where) for name, where in extra]
        progress = Progress(alternates, desc="policies")
        for number, (kind, name, path, temperature) in enumerate(progress, 1):
            other, other_tokenizer = load_policy(path), load_tokenizer(path)
            if other_tokenizer.get_vocab() != tokenizer.get_vocab():
                raise InputError(f"--alternates {name}: its tokenizer is not that of {current}")
            torch.manual_seed(settings["seed"] + number)
            table = draw(other, tokenizer, prompt_ids, settings["draws"], temperature)
            log_current = logprobs_of(model, tokenizer, prompt_ids, table, 1.0)
            log_behaviour = logprobs_of(other, tokenizer, prompt_ids, table, temperature)
            ratio = own_logprobs - logprobs_of(other, tokenizer, prompt_ids, own, temperature)
            report = {"name": name, "kind": kind, "temperature": temperature}
            report["kl"] = max(0.0, float(ratio.mean()))
            draws = table, rewards_of(tokenizer, names, table), log_current, log_behaviour
            policies.append(report | measure(*draws, truth, truth_error, settings))
            effective = 100 * policies[-1]["effective_sample_share"]
            print(f"{name:14s} KL {report['kl']:6.2f}  effective {effective:.2g} %")

    # --- write ------------------------------------------------------------------------------------
    zeros, nothing = {"gold": 0.0, "centred": truth.mean()}, np.zeros((len(names), 2))
    squared = {k: errors(nothing, truth - zero, truth_error)[2] for k, zero in zeros.items()}
    report = {
        "settings": settings,
        "expected_reward": {"mean": truth.mean(), "std_over_prompts": truth.std()},
        "rmse_of_answering_zero": {k: np.sqrt(values.mean()) for k, values in squared.items()},
        "log10_weight_bins": LOG_WEIGHT_BINS.tolist(),
        "policies": policies,
        "pays_until": crossovers(policies, settings),
    } | environment()
    write_json(args.output_dir / "importance_study.json", report)
    figure(report, args.output_dir / "importance.png")
    print(f"importance_study.json and importance.png written to {args.output_dir}")


if __name__ == "__main__":
    run_cli(main, Args, __doc__)
