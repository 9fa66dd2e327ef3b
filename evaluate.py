"""Evaluation (§4.3): is a scorer calibrated and balanced, and does a policy beat the SFT model?

    python evaluate.py calibration --scorers runs/rm/model runs/am/model --dataset_name test.jsonl --output_dir runs/cal
    python evaluate.py winrate --policy runs/ppo/model --reference runs/sft/model --judge toy_world:gold_reward \\
        --dataset_names main.jsonl forget.jsonl --output_dir runs/winrate
    python evaluate.py compare --winrates runs/winrate_rm_ppo runs/winrate_am_ppo --output_dir runs/compare
    python evaluate.py judge-agreement --judges length runs/am/model --dataset_name labelled.jsonl --output_dir runs/judges

calibration (Table 1, Figures 1a, 2, 3, 4): accuracy, ECE, Brier, NLL of p(chosen preferred) = s(score_c - score_r);
reliability diagram with counts; score histograms; mean and std of every task; with two or more scorers the differences
to the first one, with 95 % intervals bootstrapped by prompt; and a reward card in each model folder. Rows may carry
`prob_chosen`, the true probability that an annotator prefers `chosen` (the toy world knows it); then ECE is measured
against that truth too.

winrate (Table 2, Figures 1b, 5b): both policies answer every prompt once, and a judge (judges.py: a reward, a scorer or a
language model) calls each pair of answers a win, a loss or a tie, in percent with 95 % bootstrap intervals; beside it
the win rate at equal length, tasks, diversity, KL and perplexity against the reference, scores of --scorers. The answers
are stored first, so that other judges can have them (--responses) and other tools too (AlpacaEval's form).

compare: several winrate folders on the same prompts and reference answers, paired by prompt. judge-agreement: how far
judges agree with labelled pairs and ties. The statistics of these three stand in comparisons.py (docs/JUDGES.md).

ECE is stated with its definition because it has many: 10 bins of equal width over the confidence s(|difference|) in
[0.5, 1], right edge included; equal scores count half. It has a noise floor (docs/CHOICES.md, C7).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro

from comparisons import Compare, JudgeAgreement, compare, judge_agreement, run_names, score_deltas, summarise
from data import encode_pair, encode_prompts, load_rows, load_tokenizer
from engines import DeepSpeedArgs, frozen, leave_to_rank_0
from judges import JudgeFlags, as_text, load_judge, scorer_function
from utils import InputError, Scorer, check_positions, environment, forward_batches, generate, load_policy
from utils import response_logprobs, run_cli, score_texts, write_json, write_jsonl


@dataclass
class Calibration(DeepSpeedArgs):
    scorers: tuple[str, ...]
    """model folders written by am_train.py (or hub ids of sequence classifiers with one label)"""
    dataset_name: str
    """test pairs: `prompt`, `chosen`, `rejected`, optional `task` and `prob_chosen`"""
    output_dir: str
    """receives calibration.json and the figures"""
    names: tuple[str, ...] = ()
    """a name for each scorer; the folder's run name by default"""
    per_device_eval_batch_size: int = 256
    """texts per forward pass"""
    max_length: int = 512
    """tokens of prompt and response together; longer prompts keep their end"""
    truncate_prompts: bool = False
    """shorten a prompt that fills --max_length by itself instead of refusing it"""
    num_bootstrap: int = 1000
    """resamples of the prompts behind every interval"""
    seed: int = 1
    """seed of the bootstrap"""
    bf16: bool = False
    """matrix products in bfloat16"""
    reward_card: bool = True
    """write each scorer's model card (README.md, reward_card.png) into its folder"""


@dataclass(kw_only=True)
class Winrate(DeepSpeedArgs, JudgeFlags):
    output_dir: str
    """receives winrate.json, responses.jsonl and each policy's answers in AlpacaEval's form"""
    policy: str | None = None
    """model folder or hub id of the policy to judge"""
    reference: str | None = None
    """model folder or hub id of the SFT policy it is held against"""
    dataset_names: tuple[str, ...] = ()
    """prompt files, one for each test set (the paper: a main and a forget set)"""
    responses: str | None = None
    """in the place of these three: a stored responses.jsonl, whose answers are judged (`prompt response reference set`)"""
    scorers: tuple[str, ...] = ()
    """model folders or hub ids of scorers whose mean scores of response and reference are compared, beside the judge"""
    response_length: int = 64
    """tokens that a response may have"""
    temperature: float = 1.0
    """sampling temperature, 0 for greedy (not stated in the paper; our choice C15)"""
    common_random_numbers: bool = False
    """both policies draw from the same seed: mostly equal answers, so ties, while they are close (our choice C15)"""
    num_bootstrap: int = 1000
    """resamples of the prompts behind every interval"""
    seed: int = 1
    """seed of sampling and bootstrap"""


# --- metrics: the same lines stand in am_train.py, and a test says so -------------------------------------------------


def expected_calibration_error(confidence, correct, num_bins=10):  # each (pairs,)
    """ECE in points: sum over bins of (share of pairs) x |accuracy - mean confidence|, times 100.

    The confidence of a pair is s(|difference of scores|), in [0.5, 1], cut into `num_bins` bins of equal width, the
    right edge included. `correct` is 1, 0 or, for equal scores, 0.5; or a true probability in place of the label.
    """
    index = np.digitize(confidence, np.linspace(0.5, 1, num_bins + 1)[1:-1], right=True)
    count = np.bincount(index, minlength=num_bins)
    gap = np.bincount(index, correct, num_bins) - np.bincount(index, confidence, num_bins)
    return 100 * np.abs(gap).sum() / count.sum()


def ranking_metrics(chosen, rejected):  # each (pairs,): scores
    """Accuracy and ECE in points, Brier and NLL (nats) of p(chosen preferred) = s(score_c - score_r); p. 6, Table 1."""
    delta = np.asarray(chosen, dtype=np.float64) - np.asarray(rejected, dtype=np.float64)
    correct = np.where(delta == 0, 0.5, delta > 0)
    return {
        "accuracy": 100 * correct.mean(),
        "ece": expected_calibration_error(1 / (1 + np.exp(-np.abs(delta))), correct),
        "brier": ((1 - 1 / (1 + np.exp(-delta))) ** 2).mean(),
        "nll": np.logaddexp(0, -delta).mean(),
    }


def score_balance(scores, tasks):  # (texts,), (texts,)
    """Mean and std of the scores of each task, and how far they spread over the tasks (Fig. 4a, 4b)."""
    scores, tasks = np.asarray(scores), np.asarray(tasks)
    per_task = {
        str(t): {"mean": scores[tasks == t].mean(), "std": scores[tasks == t].std(), "count": int((tasks == t).sum())}
        for t in sorted(set(tasks))
    }
    return per_task, {
        "spread_of_means": np.std([v["mean"] for v in per_task.values()]),
        "spread_of_stds": np.std([v["std"] for v in per_task.values()]),
        "mean_within_std": np.mean([v["std"] for v in per_task.values()]),
    }


# --- metrics of this file ---------------------------------------------------------------------------------------------


def truth_of_preferred(delta, prob_chosen):  # (pairs,), (pairs,)
    """True probability that the response which the scorer prefers is preferred: what confidence should equal."""
    return np.where(delta == 0, 0.5, np.where(delta > 0, prob_chosen, 1 - prob_chosen))


def reliability_bins(delta, correct, truth=None, num_bins=10):  # each (pairs,)
    """The bins of the ECE (Fig. 2): count, accuracy, mean confidence, mean score gap and, where known, mean truth."""
    confidence = 1 / (1 + np.exp(-np.abs(delta)))
    columns = {"accuracy": correct, "confidence": confidence, "gap": np.abs(delta)}
    if truth is not None:
        columns["truth"] = truth
    index = np.digitize(confidence, np.linspace(0.5, 1, num_bins + 1)[1:-1], right=True)
    bins = [index == b for b in range(num_bins)]
    return [{"count": int(b.sum())} | {k: v[b].mean() if b.any() else None for k, v in columns.items()} for b in bins]


def paired_intervals(scores, prompts, num_bootstrap, rng):
    """95 % intervals of the metrics of each scorer minus the first one's, prompts resampled with replacement.

    scores: {name: (chosen (pairs,), rejected (pairs,))}. Pairs of one prompt stay together: they are not independent.
    Every metric is a function of sums over pairs (the ECE of one a bin), so a resample is a product of prompt weights
    with per-prompt sums. An ECE is a sum of absolute values, which resampling inflates, that of the better calibrated
    scorer most; so its interval is the basic one, reflected at the difference, and still covers too little (C7).
    `separation` is (mean chosen - mean rejected) / std of all scores, what Fig. 3 shows.
    Returns {name: {metric: {difference, low, high}}}.
    """
    groups, group_of_pair = np.unique(prompts, return_inverse=True)
    weights = rng.multinomial(len(groups), np.full(len(groups), 1 / len(groups)), num_bootstrap)  # (bootstrap, prompts)
    weights = np.vstack([np.ones(len(groups)), weights])  # row 0: the sample itself

    def resampled(chosen, rejected):
        delta = chosen - rejected
        correct, confidence = np.where(delta == 0, 0.5, delta > 0), 1 / (1 + np.exp(-np.abs(delta)))
        index = np.digitize(confidence, np.linspace(0.5, 1, 11)[1:-1], right=True)

        def total(values):  # (bootstrap,)
            return weights @ np.bincount(group_of_pair, values, len(groups))

        pairs = total(np.ones(len(delta)))
        ece = sum(np.abs(total((index == b) * (correct - confidence))) for b in range(10)) / pairs
        variance = total(chosen**2 + rejected**2) / (2 * pairs) - (total(chosen + rejected) / (2 * pairs)) ** 2
        return {
            "accuracy": 100 * total(correct) / pairs,
            "ece": 100 * ece,
            "separation": total(delta) / pairs / np.sqrt(variance),
            "brier": total((1 - 1 / (1 + np.exp(-delta))) ** 2) / pairs,
            "nll": total(np.logaddexp(0, -delta)) / pairs,
        }

    first, *others = scores
    base = resampled(*scores[first])
    result = {}
    for name in others:
        other = resampled(*scores[name])
        differences = {k: _interval(other[k] - base[k]) for k in base}
        d, low, high = differences["ece"]
        differences["ece"] = d, 2 * d - high, 2 * d - low
        result[f"{name} - {first}"] = {
            k: dict(zip(("difference", "low", "high"), v, strict=True)) for k, v in differences.items()
        }
    return result


def _interval(samples):
    return [float(samples[0]), *np.percentile(samples[1:], [2.5, 97.5]).tolist()]


# --- calibration ------------------------------------------------------------------------------------------------------


def score_pairs(path, rows, args):
    """a(x, y) = r - e of every distinct text of the pairs -> chosen and rejected scores, each (pairs,)."""
    tokenizer = load_tokenizer(path, dedicated_pad=True)
    scorer = frozen(args, Scorer.from_pretrained, path, tokenizer)
    texts = {}
    for i, row in enumerate(rows, 1):
        for side in ("chosen", "rejected"):
            key, where = (str(row["prompt"]), row[side]), f"{args.dataset_name}, line {row.get('file_line', i)}"
            if key not in texts:
                ids, prompt_len, _ = encode_pair(
                    tokenizer,
                    row["prompt"],
                    row[side],
                    args.max_length,
                    args.truncate_prompts,
                    where,
                    scorer.is_encoder,
                )
                texts[key] = ids, prompt_len
    check_positions(scorer.model, max(len(ids) for ids, _ in texts.values()))
    r, e = score_texts(scorer, tokenizer, list(texts.values()), args.per_device_eval_batch_size, args.bf16)
    scores = dict(zip(texts, r - e, strict=True))  # [Eq. 8] with K = 0
    return [np.array([scores[str(row["prompt"]), row[side]] for row in rows]) for side in ("chosen", "rejected")]


def calibration(args: Calibration):
    if args.num_bootstrap < 1:
        raise InputError("--num_bootstrap: must be positive")
    names = run_names(args.scorers, args.names, "scorers")
    rows = load_rows(args.dataset_name, {"prompt": "prompt", "chosen": "response", "rejected": "response"})
    tasks = [row.get("task", "all") for row in rows]
    truth = np.array([row["prob_chosen"] for row in rows]) if all("prob_chosen" in row for row in rows) else None
    folder = Path(args.output_dir)
    report, scores = {"pairs": len(rows), "scorers": {}}, {}
    for name, path in zip(names, args.scorers, strict=True):
        chosen, rejected = scores[name] = score_pairs(path, rows, args)
        delta = chosen - rejected
        per_task, balance = score_balance(np.concatenate([chosen, rejected]), tasks * 2)
        entry = ranking_metrics(chosen, rejected) | {"score_std": np.concatenate([chosen, rejected]).std()}
        true = None if truth is None else truth_of_preferred(delta, truth)
        if truth is not None:
            entry["ece_vs_truth"] = expected_calibration_error(1 / (1 + np.exp(-np.abs(delta))), true)
        bins = reliability_bins(delta, np.where(delta == 0, 0.5, delta > 0), true)
        report["scorers"][name] = entry | {"balance": balance, "per_task": per_task, "bins": bins}
        print(f"{name}: " + "  ".join(f"{k} {v:.4g}" for k, v in (entry | balance).items()))
    leave_to_rank_0()
    if len(names) > 1:
        rng = np.random.default_rng(args.seed)
        report["paired"] = paired_intervals(scores, [str(r["prompt"]) for r in rows], args.num_bootstrap, rng)
        for pair, metrics in report["paired"].items():
            print(
                f"{pair}: "
                + "  ".join(
                    f"{k} {v['difference']:+.4g} [{v['low']:+.4g}, {v['high']:+.4g}]" for k, v in metrics.items()
                )
            )
    write_json(folder / "calibration.json", report | environment())
    draw(report, scores, tasks, folder)
    print(f"calibration.json and figures written to {folder}")
    if args.reward_card:  # last: nothing that was computed depends on a folder that cannot be written to
        from tools import reward_card

        for name, path in zip(names, args.scorers, strict=True):
            reward_card.write(path, name, rows, *scores[name], report["scorers"][name], args)
    return report


def draw(report, scores, tasks, folder):
    """reliability.png (Fig. 2), histograms.png (Fig. 3), task_scores.png (Fig. 1a), task_balance.png (Fig. 4a, 4b)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams["text.parse_math"] = False  # a task may be called anything
    names, tasks = list(scores), np.array(tasks * 2)

    def panels(width=4.2, height=3.2):
        return plt.subplots(1, len(names), figsize=(width * len(names), height), squeeze=False, layout="constrained")

    figure, axes = panels(height=3.8)
    for axis, name in zip(axes[0], names, strict=True):
        bins = [b for b in report["scorers"][name]["bins"] if b["count"] >= 20]  # fewer say nothing
        axis.plot([0.5, 1], [0.5, 1], color="tab:orange", label="calibrated: 1/(1+exp(-gap))")
        axis.plot([b["confidence"] for b in bins], [b["accuracy"] for b in bins], "o-", label=name)
        for b in bins:
            axis.annotate(b["count"], (b["confidence"], 0.505), rotation=90, fontsize=7, ha="center", color="gray")
        axis.set(xlabel="confidence of the scorer", ylabel="accuracy", xlim=(0.49, 1.01), ylim=(0.49, 1.01))
        axis.set_title(
            f"{name}: ECE {report['scorers'][name]['ece']:.2f} (counts in gray, bins under 20 left out)", fontsize=10
        )
        axis.legend(fontsize=8, loc="upper left")
    figure.savefig(folder / "reliability.png", dpi=130)

    figure, axes = panels()
    for axis, name in zip(axes[0], names, strict=True):
        edges = np.histogram_bin_edges(np.concatenate(scores[name]), 60)
        for values, label, color in zip(scores[name], ("chosen", "rejected"), ("tab:green", "tab:red"), strict=True):
            axis.hist(values, edges, alpha=0.5, label=label, color=color)
        axis.set(title=name, xlabel="score", ylabel="responses")
        axis.legend(fontsize=8)
    figure.savefig(folder / "histograms.png", dpi=130)

    # Fig. 1a shows two tasks under the RM: those whose means lie farthest apart under the first scorer
    per_task = report["scorers"][names[0]]["per_task"]
    extremes = [f(per_task, key=lambda t: per_task[t]["mean"]) for f in (min, max)]
    figure, axes = panels()
    for axis, name in zip(axes[0], names, strict=True):
        values = np.concatenate(scores[name])
        edges = np.histogram_bin_edges(values, 50)
        for task in dict.fromkeys(extremes):
            axis.hist(values[tasks == task], edges, alpha=0.5, density=True, label=task)
        axis.set(title=name, xlabel="score", ylabel="density")
        axis.legend(fontsize=8)
    figure.savefig(folder / "task_scores.png", dpi=130)

    figure, axes = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    for axis, what in zip(axes, ("mean", "std"), strict=True):
        for k, name in enumerate(names):
            x = np.arange(len(per_task)) + (k - (len(names) - 1) / 2) * 0.8 / len(names)
            values = [report["scorers"][name]["per_task"][t][what] for t in per_task]
            axis.bar(x, values, 0.8 / len(names), label=name)
        axis.set_xticks(range(len(per_task)), per_task, rotation=40, ha="right", fontsize=8)
        axis.axhline(0, color="black", linewidth=0.5)
        axis.set_title(f"{what} of the scores of each task")
        axis.legend(fontsize=8)
    figure.savefig(folder / "task_balance.png", dpi=130)
    plt.close("all")


# --- win rate ---------------------------------------------------------------------------------------------------------


def add_logprobs(lines, field, model, tokenizer, prompts, responses, args):
    """Sets each line's `field`: log pi(response | prompt) in nats, at the sampling temperature (greedy: at 1)."""

    def function(ids, mask, prompt_lens):
        return response_logprobs(model, ids, mask, prompt_lens, args.temperature or 1.0)

    sequences = list(zip(prompts, responses, strict=True))
    logprobs, _ = forward_batches(
        function, sequences, tokenizer.pad_token_id, args.per_device_eval_batch_size, args.bf16
    )
    for line, value, tokens in zip(lines, logprobs.double().sum(1).tolist(), responses, strict=True):
        line |= {field: value, "tokens": len(tokens)}


def generate_answers(args, judge):
    """Rows {set, prompt, ..., response, reference, log-probs}: both policies' answers, stored before they are judged."""
    if not (args.policy and args.reference and args.dataset_names):
        raise InputError("--policy, --reference and --dataset_names: are required, or --responses with stored answers")
    sets = {}
    for name in args.dataset_names:
        label = Path(name).name.split(".")[0]
        if label in sets:
            raise InputError(f"--dataset_names: two files are called {label}")
        sets[label] = (name, load_rows(name, {"prompt": "prompt"}))
    judge.probe(next(iter(sets.values()))[1][0]["prompt"])
    lines = {label: [{"set": label} | row | {"set": label} for row in rows] for label, (_, rows) in sets.items()}
    answers, vocabulary, size = {}, None, args.per_device_eval_batch_size
    for field, path in (("response", args.policy), ("reference", args.reference)):
        tokenizer, model = load_tokenizer(path), None  # the one before leaves the memory first
        model = frozen(args, load_policy, path)
        for label, (name, rows) in sets.items():
            other = field == "reference" and not args.common_random_numbers
            torch.manual_seed(args.seed + other * 10**6)  # far from the seeds of other runs
            length = (args.max_length, args.response_length, args.truncate_prompts)
            prompts = encode_prompts(tokenizer, rows, *length, name)
            check_positions(model, max(map(len, prompts)) + args.response_length)
            ids = generate(model, tokenizer, prompts, args.response_length, args.temperature, size, args.bf16)
            if field == "response":
                answers[label], vocabulary = ids, tokenizer.get_vocab()
                if args.temperature:  # a greedy answer is no sample of the policy, and has no KL
                    add_logprobs(lines[label], "logprob", model, tokenizer, prompts, ids, args)
            elif vocabulary == tokenizer.get_vocab():
                add_logprobs(lines[label], "reference_logprob", model, tokenizer, prompts, answers[label], args)
            else:
                print(f"{label}: policy and reference have other tokens, so no KL")
            for line, text in zip(lines[label], tokenizer.batch_decode(ids, skip_special_tokens=True), strict=True):
                line[field] = text
    lines, folder = [line for label in lines for line in lines[label]], Path(args.output_dir)
    write_jsonl(folder / "responses.jsonl", lines)
    for field, path in (("response", args.policy), ("reference", args.reference)):
        rows = [{"dataset": r["set"], "instruction": as_text(r["prompt"]), "output": r[field]} for r in lines]
        write_json(folder / f"alpaca_eval_{field}.json", [row | {"generator": path} for row in rows])
    return lines


def stored_answers(args, judge):
    if args.policy or args.reference or args.dataset_names:
        raise InputError("--responses: holds the answers; drop --policy, --reference and --dataset_names")
    rows = load_rows(args.responses, {"prompt": "prompt", "response": "text", "reference": "text"})
    judge.probe(rows[0]["prompt"])
    judged = ("score", "reference_score", "verdict", "judgements")  # by another judge
    label = {"set": Path(args.responses).name.split(".")[0]}
    return [label | {k: v for k, v in row.items() if k not in judged} for row in rows]


def winrate(args: Winrate):
    names = run_names(args.scorers, (), "scorers")
    if args.num_bootstrap < 1:
        raise InputError("--num_bootstrap: must be positive")
    judge, folder = load_judge(args, args.output_dir), Path(args.output_dir)
    scorers = [scorer_function(path, args) for path in args.scorers]
    rows = (stored_answers if args.responses else generate_answers)(args, judge)
    try:
        deltas = [score_deltas(score, rows, args) for score in scorers]
        if judge.asks:  # replies are rank 0's to keep
            leave_to_rank_0()
        verdicts = judge.compare(*([row[k] for row in rows] for k in ("prompt", "response", "reference")))
    except InputError as error:
        stored = args.responses or folder / "responses.jsonl"
        raise InputError(f"{error}; the answers are in {stored}: --responses judges them") from None
    leave_to_rank_0()
    rng, report = np.random.default_rng(args.seed), {}
    for label in dict.fromkeys(row["set"] for row in rows):
        part = [(row, v) for row, v in zip(rows, verdicts, strict=True) if row["set"] == label]
        report[label] = summarise(*zip(*part, strict=True), judge, args, rng)
        bounds = {k: f" [{low:.4g}, {high:.4g}]" for k, (low, high) in report[label]["intervals"].items()}
        shown = [(k, v, bounds.get(k, "")) for k, v in report[label].items() if isinstance(v, (int, float))]
        print(f"{label}: " + "  ".join(f"{k} {v:.4g}{interval}" for k, v, interval in shown))
        for task, v in report[label].get("tasks", {}).items():
            print(f"  {task}: win {v['win']:.1f}  lose {v['lose']:.1f}  tie {v['tie']:.1f}  of {v['prompts']}")
    report["scorers"] = dict(zip(names, deltas, strict=True))
    for name, delta in report["scorers"].items():
        shown = {"overall": delta["overall"]} | delta["sets"]
        shown = "  ".join(f"{k} {v['difference']:+.4g} [{v['low']:+.4g}, {v['high']:+.4g}]" for k, v in shown.items())
        print(f"{name}: response - reference: {shown}")
    report["judge"] = {"name": args.judge} | judge.usage
    write_jsonl(folder / "responses.jsonl", [row | v for row, v in zip(rows, verdicts, strict=True)])
    write_json(folder / "winrate.json", report | environment())
    return report


COMMANDS = {Calibration: calibration, Winrate: winrate, Compare: compare, JudgeAgreement: judge_agreement}
Args = Annotated[Calibration, tyro.conf.subcommand("calibration")] | Annotated[Winrate, tyro.conf.subcommand("winrate")]
Args |= Annotated[Compare, tyro.conf.subcommand("compare")]
Args |= Annotated[JudgeAgreement, tyro.conf.subcommand("judge-agreement")]


def main(args):
    return COMMANDS[type(args)](args)


if __name__ == "__main__":
    run_cli(main, Args, __doc__)
