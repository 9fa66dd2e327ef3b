"""What a user would compare the Advantage Model with: other losses and other uses of scores.

    trained       RM         -log s(r_c - r_r)                        [Eq. 1] Bradley-Terry
                  AM m       [Eq. 6] at every m of --margins
                  margin     -log s(r_c - r_r - d(pair))              Llama 2 (2023), Eq. 2
                  centred    -log s(r_c - r_r) + c (r_c + r_r)^2      Eisenstein et al. (2023)
    from scores   AM fitted  the m with the lowest held-out NLL
                  temperature     r / T, T fitted on held-out pairs   Guo et al. (2017)
                  PAR             mean_k s(r - r_k)                   Fu et al. (2025)
                  contrastive     r - mean_k r_k                      Shen et al. (2024)

    python -m baselines.reward_losses --model_name_or_path MODEL --dataset_name pairs.jsonl \\
        --eval_dataset_name test.jsonl --output_dir runs/bakeoff --learning_rate 2e-4

Every arm has the same pairs, order, steps and learning rate: am_train.py's, with another loss. The
references r_k are the prompt's responses in the test file, the scored one among them, since no
policy is at hand. So PAR and contrastive leave the ranking within a prompt alone, contrastive its
differences too, and their balance is partly by construction. Finished arms are kept: the same
command goes on where it stopped, with more --seeds or --margins too.
"""

import shutil
import hashlib
import json
import zlib
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch.nn.functional as F
import tyro
from scipy.optimize import minimize_scalar

import am_train
from baselines.frozen_layers import cache_frozen_layers
from utils import Bound, Count, InputError, Natural, Share, Weight, environment, load_rows, run_cli
from utils import write_json, write_jsonl

METRICS = ("accuracy", "ece", "brier", "nll")
SPREADS = ("spread_of_means", "normalised_spread", "mean_within_std")
# flags that make other arms, or change none; files count by their rows
FREE = ("seeds", "margins", "num_bootstrap", "seed", "loss", "am_margin", "resume")
FREE += ("output_dir", "dataset_name", "eval_dataset_name")


@dataclass
class Args(am_train.Args):
    loss: tyro.conf.Suppress[str] = "rm"  # every arm has its own, and its own m and seed
    am_margin: tyro.conf.Suppress[float] = 2.5
    seed: tyro.conf.Suppress[int] = 1
    seeds: tuple[Natural, ...] = (1, 2, 3)
    """of heads and data order"""
    margins: tuple[Bound, ...] = (2.5, 5.0, 10.0)
    """m of the AM arms"""
    held_out: Share = 0.15
    """share of the training prompts on which only T and m are fitted"""
    margin_scale: Weight = 1.0
    """d of the margin loss for a task's median margin; at most three times that"""
    centring_coef: Weight = 0.01
    """c of the centring regulariser (TRL's value); 0 leaves the arm out"""
    num_frozen_layers: int = 0
    """the first layers stay as they are, computed once for all arms"""
    num_bootstrap: Count = 1000
    """resamples of the test prompts for an interval"""


# --- losses: (args, batch) -> scalar, as am_train.scorer_loss ---


def llama2_margin_loss(r_chosen, r_rejected, margin):  # each (pairs,)
    """Llama 2, Eq. 2:  -E log s(r_c - r_r - d): clearer pairs are to lie farther apart."""
    return -F.logsigmoid(r_chosen - r_rejected - margin).mean()


def centred_loss(r_chosen, r_rejected, coef):  # each (pairs,)
    """-E log s(r_c - r_r) + c (r_c + r_r)^2: scores of every prompt lie around 0."""
    centre = (r_chosen + r_rejected).square().mean()
    return am_train.reward_model_loss(r_chosen, r_rejected) + coef * centre


# --- uses of scores: what stands in place of r ---


def fit_temperature(delta):  # (pairs,): score_chosen - score_rejected
    """T with the lowest NLL of s(delta / T) on pairs that the scorer was not trained on."""

    def nll(log_t):
        return np.logaddexp(0, -delta / np.exp(log_t)).mean()

    return float(np.exp(minimize_scalar(nll, bounds=(-5, 5), method="bounded").x))


def par_rewards(scores, references):  # (texts,), list of (references,)
    """Preference as reward: mean probability of being preferred to a reference, in (0, 1)."""
    pairs = zip(scores, references, strict=True)
    return np.array([(1 / (1 + np.exp(k - r))).mean() for r, k in pairs])


def contrastive_rewards(scores, references):  # (texts,), list of (references,)
    """r minus the mean score of offline responses to the same prompt."""
    return np.array([r - k.mean() for r, k in zip(scores, references, strict=True)])


# --- arms ---


def split_by_prompt(rows, share):
    """Rows that train, and those of a share of the prompts, chosen by hash."""
    train, held = [], []
    for row in rows:
        chosen = zlib.crc32(str(row["prompt"]).encode()) % 1000 < 1000 * share
        (held if chosen else train).append(row)
    return train, held


def scaled_margins(rows, scale):
    """d of every row: its `margin` over its task's median, at most 3; 0 where a row has none."""
    by_task = {}
    for row in rows:
        if row.get("margin"):
            by_task.setdefault(row.get("task"), []).append(row["margin"])

    def scaled(row):
        return min(3, row["margin"] / np.median(by_task[row.get("task")])) * scale

    return [scaled(row) if row.get("margin") else 0.0 for row in rows]


def check_flags(args, folder, rows):
    """Refuse other pairs, or flags that are not FREE, than those of the arms in `folder`."""
    flags = {f.name: getattr(args, f.name) for f in fields(args) if f.name not in FREE}
    pairs, path = hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16], folder / "flags.json"
    saved = json.loads(path.read_text()) if path.is_file() else {"flags": flags, "pairs": pairs}
    remedy = "give another --output_dir, or delete the folder"
    for name, value in flags.items():
        if (before := saved["flags"].get(name)) != value:
            raise InputError(f"--{name}: is {value}, the arms in {folder} had {before}; {remedy}")
    if saved["pairs"] != pairs:
        names = "--dataset_name, --eval_dataset_name"
        raise InputError(f"{names}: not the pairs of the arms in {folder}; {remedy}")
    write_json(path, saved)


def train_arms(args, folder, train, count):
    """Train every arm that is not there yet -> {arm: [scores of each seed]} of eval.jsonl."""

    def margin_loss(_, batch):
        margins = [row["scaled_margin"] for row in batch["rows"]]
        return llama2_margin_loss(*batch["r"], batch["r"].new_tensor(margins))

    def centring_loss(_, batch):
        return centred_loss(*batch["r"], args.centring_coef)

    arms = {"RM": ("rm", 2.5, {})} | {f"AM m={m:g}": ("am", m, {}) for m in args.margins}
    if args.centring_coef:
        arms["centred"] = "rm", 2.5, {"scorer_loss": centring_loss}
    if any(row.get("margin") for row in train):
        arms["margin"] = "rm", 2.5, {"scorer_loss": margin_loss}
    cache, scores = {}, {arm: [] for arm in arms}

    def prepare(scorer, tokenizer, texts):
        if args.num_frozen_layers:
            how = args.num_frozen_layers, cache, args.bf16
            cache_frozen_layers(scorer, tokenizer, texts, *how)

    common = {f.name: getattr(args, f.name) for f in fields(am_train.Args)}
    common |= {"dataset_name": str(folder / "train.jsonl")}
    common |= {"eval_dataset_name": str(folder / "eval.jsonl")}
    for seed in args.seeds:
        for arm, (loss, m, own_loss) in arms.items():
            run = folder / f"{arm.replace(' ', '_')}_seed{seed}"
            if not (run / "scores.json").is_file():
                one = dict(loss=loss, am_margin=m, seed=seed, output_dir=str(run))
                one = am_train.Args(**common | one)
                shutil.rmtree(run, ignore_errors=True)
                chosen, rejected = am_train.main(one, **own_loss, prepare=prepare)
                if len(chosen) != count:
                    raise InputError("--max_length: cuts pairs to equal sides; raise it")
                saved = {"chosen": chosen.tolist(), "rejected": rejected.tolist()}
                write_json(run / "scores.json", saved)
            saved = json.loads((run / "scores.json").read_text())
            scores[arm].append((np.array(saved["chosen"]), np.array(saved["rejected"])))
    return scores


def use_scores(scores, num_held, prompts):
    """{arm: [(chosen, rejected) of each seed]} of the test pairs, with the arms that reuse scores,
    and what was fitted on the first `num_held` pairs."""
    fitted = {"temperature": [], "m": []}
    arms = {arm: [(c[num_held:], r[num_held:]) for c, r in runs] for arm, runs in scores.items()}
    am = [arm for arm in scores if arm.startswith("AM")]
    names = ("AM fitted m", "RM temperature", f"{am[0]} temperature", "PAR", "contrastive")
    arms |= {name: [] for name in names}
    for seed, (chosen, rejected) in enumerate(arms["RM"]):
        held = {arm: (runs[seed][0] - runs[seed][1])[:num_held] for arm, runs in scores.items()}
        best = min(am, key=lambda arm: np.logaddexp(0, -held[arm]).mean())
        arms["AM fitted m"].append(arms[best][seed])
        fitted["m"].append(best)
        for arm in ("RM", am[0]):
            t = fit_temperature(held[arm])
            arms[f"{arm} temperature"].append(tuple(side / t for side in arms[arm][seed]))
            fitted["temperature"].append([arm, t])
        of_prompt = {}  # scores of the distinct responses to each prompt
        for prompt, score in zip(prompts * 2, np.concatenate([chosen, rejected]), strict=True):
            of_prompt.setdefault(prompt, set()).add(float(score))
        references = [np.array(sorted(of_prompt[p])) for p in prompts]
        for name, function in (("PAR", par_rewards), ("contrastive", contrastive_rewards)):
            arms[name].append(tuple(function(side, references) for side in (chosen, rejected)))
    return arms, fitted


# --- table ---


def metrics_of(chosen, rejected, tasks):
    _, balance = am_train.score_balance(np.concatenate([chosen, rejected]), tasks * 2)
    values = am_train.ranking_metrics(chosen, rejected) | balance
    return values | {"normalised_spread": balance["spread_of_means"] / balance["mean_within_std"]}


def bake_off_table(arms, tasks, prompts, num_bootstrap):
    """Each arm's metrics, mean and values over seeds, and its difference to RM, 95 % interval.

    A resample draws prompts with all their pairs, the same for all arms and seeds; its metric is
    the mean over the seeds. So an interval holds the spread of the test prompts alone.
    """
    groups, rng = {}, np.random.default_rng(1)
    for i, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(i)
    groups, resamples = [np.array(g) for g in groups.values()], [np.arange(len(prompts))]
    for _ in range(num_bootstrap):
        drawn = rng.integers(0, len(groups), len(groups))
        resamples.append(np.concatenate([groups[g] for g in drawn]))
    table, sampled = {}, {}
    for arm, runs in arms.items():
        each = [metrics_of(c, r, tasks) for c, r in runs]
        columns = {k: [m[k] for m in each] for k in METRICS + SPREADS}
        table[arm] = {k: {"mean": np.mean(v), "seeds": v} for k, v in columns.items()}
        sampled[arm] = []
        for index in resamples:
            each = [am_train.ranking_metrics(c[index], r[index]) for c, r in runs]
            sampled[arm].append({k: np.mean([m[k] for m in each]) for k in METRICS})
        for k in METRICS:
            pairs = zip(sampled[arm], sampled["RM"], strict=True)
            point, *samples = [a[k] - b[k] for a, b in pairs]
            low, high = np.percentile(samples, [2.5, 97.5])
            if k == "ece":  # reflected, as in evaluate.paired_intervals
                low, high = 2 * point - high, 2 * point - low
            table[arm][k]["minus_rm"] = {"difference": point, "low": low, "high": high}
    return table


def markdown(table, header, fitted):
    names = "accuracy | ECE | Brier | NLL | spread of task means | / within-task std"
    lines = [header, "", f"| | {names} |", "|---" * 7 + "|"]
    for arm, row in table.items():
        cells = []
        for k, digits in zip(METRICS, (1, 1, 3, 3), strict=True):
            bounds = (f"{row[k]['minus_rm'][side]:+.{digits}f}" for side in ("low", "high"))
            interval = "" if arm == "RM" else f" [{', '.join(bounds)}]"
            cells.append(f"{row[k]['mean']:.{digits}f}{interval}")
        if arm == "PAR":  # in (0, 1), so s(difference) stays below .73: no probability is meant
            cells[1:] = ["–", "–", "–"]
        cells += [f"{row[k]['mean']:.2f}" for k in SPREADS[:2]]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    cells = "the mean over seeds [95 % interval of its difference to RM, test prompts resampled]"
    temperatures = ", ".join(f"{t:.3g} ({arm})" for arm, t in fitted["temperature"])
    margins = ", ".join(arm.partition("=")[2] for arm in fitted["m"])
    lines += ["", f"Cells: {cells}.", "", f"Fitted, seed by seed: m {margins}; T {temperatures}."]
    if any(not 0.01 < t < 100 for _, t in fitted["temperature"]):
        lines.append("A T ran to its bound: the held-out pairs say nothing, take more.")
    return "\n".join(lines) + "\n"


def main(args: Args):
    if not args.eval_dataset_name:
        raise InputError("--eval_dataset_name: missing; the table is of test pairs")
    if not (args.seeds and args.margins):
        raise InputError("--seeds, --margins: missing")
    columns = {"prompt": "prompt", "chosen": "response", "rejected": "response"}
    rows = load_rows(args.dataset_name, columns, args.max_rows)
    test = load_rows(args.eval_dataset_name, columns)
    for line, row in enumerate(rows, 1):
        d = row.get("margin", 0)
        if type(d) not in (int, float) or d < 0:
            raise InputError(f"{args.dataset_name}, line {line}: field 'margin' must be 0 or more")
    rows, test = ([row for row in of if row["chosen"] != row["rejected"]] for of in (rows, test))
    train, held = split_by_prompt(rows, args.held_out)
    if not train or not held:
        raise InputError(f"--held_out {args.held_out}: leaves no pairs to train on or to fit on")
    folder = Path(args.output_dir)
    check_flags(args, folder, [train, held, test])
    args = replace(args, max_rows=0, loss="rm")
    scaled = zip(train, scaled_margins(train, args.margin_scale), strict=True)
    write_jsonl(folder / "train.jsonl", [row | {"scaled_margin": d} for row, d in scaled])
    write_jsonl(folder / "eval.jsonl", held + test)
    tasks, prompts = [row.get("task", "all") for row in test], [str(row["prompt"]) for row in test]
    arms, fitted = use_scores(train_arms(args, folder, train, len(held + test)), len(held), prompts)
    table = bake_off_table(arms, tasks, prompts, args.num_bootstrap)
    header = f"{len(train)} training, {len(held)} held-out, {len(test)} test pairs, "
    header += f"{len(set(prompts))} test prompts, seeds {' '.join(map(str, args.seeds))}"
    text = markdown(table, header, fitted)
    (folder / "bakeoff.md").write_text(text, encoding="utf-8")
    report = {"args": vars(args), "header": header, "fitted": fitted, "table": table}
    write_json(folder / "bakeoff.json", report | environment())
    print(text)
    return table


if __name__ == "__main__":
    run_cli(main, Args, __doc__)
