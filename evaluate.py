"""Evaluation (§4.3): is a scorer calibrated and balanced, and does a policy beat the SFT model?

    python evaluate.py calibration --scorers runs/rm/model runs/am/model \\
        --dataset_name test.jsonl --output_dir runs/calibration
    python evaluate.py winrate --policy runs/ppo/model --reference runs/sft/model --judge length \\
        --dataset_names main.jsonl forget.jsonl --output_dir runs/winrate

calibration (Table 1; tools/figures.py draws Figures 1a, 2, 3 and 4):
    for each pair (x, y_c, y_r):  score = a(x, y) = r - e                             [Eq. 8, K = 0]
        it states  p(y_c preferred) = s(score_c - score_r),  s(z) = 1/(1 + e^-z)              [p. 6]
    is it right as often as it says?  accuracy, ECE, Brier, NLL
    has every task even scores?       mean and std by task

winrate (Table 2, Figures 1b, 5b):
    for each prompt x:  y ~ policy, y' ~ SFT policy    on disk before a judge is asked
        a judge says  win, lose or tie                 percent with 95 % intervals, by task
    how far did the policy move?      KL(policy | SFT policy), perplexity of y under the latter
"""

import functools
import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch

from utils import Count, InputError, Length, Natural, Weight, backend, check_fits, decode
from utils import encode_prompts, environment, forward_batches, generate, in_one_line, load_policy
from utils import load_rows, load_tokenizer, progress, refuse_finished, response_logprobs, run_cli
from utils import stop_ids, write_json, write_jsonl

SIDES = ("chosen", "rejected")
VERDICTS = ("win", "tie", "lose")
OWN = "evaluate.py"  # key in winrate.json beside the test sets, whose names have no dot


@dataclass(kw_only=True)
class Common:
    output_dir: str
    """for calibration.json and scores.jsonl, or responses.jsonl and winrate.json"""
    max_length: Length = 512
    """tokens of prompt and response together"""
    truncate_prompts: bool = False
    """cut texts that are longer"""
    per_device_eval_batch_size: Count = 32
    """texts at once"""
    bf16: bool = False
    """matrix products in bfloat16"""


@dataclass(kw_only=True)
class Resampled(Common):
    num_bootstrap: Count = 1000
    """resamples of the prompts behind every interval"""
    seed: Natural = 1
    """of sampling and bootstrap"""


@dataclass(kw_only=True)
class Calibration(Resampled):
    """Table 1."""

    scorers: tuple[str, ...]
    """folders of am_train.py, sequence classifiers with one label, or any program's scores of the
    same pairs: a file with the columns that `evaluate.py score` writes"""
    dataset_name: str
    """pairs: `prompt`, `chosen`, `rejected`, optional `task`, `prob_chosen` (the truth)"""
    names: tuple[str, ...] = ()
    """for each scorer; the run folder's by default"""


@dataclass(kw_only=True)
class Score(Common):
    """The score of every row, to scored.jsonl (tools/score.py)."""

    scorer: str
    """its folder"""
    dataset_name: str
    """rows `prompt` and `response`, or pairs"""
    output_dir: str
    """for scored.jsonl"""


@dataclass(kw_only=True)
class Winrate(Resampled):
    """Table 2."""

    judge: str
    """module:function(prompts, responses) -> scores, a scorer, length (the longer wins), or a model
    that compares: openai:MODEL (the paper: GPT-4), hf:MODEL"""
    judge_config: str | None = None
    """settings of judges that compare, JSON (docs/JUDGES.md)"""
    tie_band: Weight = 0.1
    """differences of scores that are a tie (our choice C14; gold lies in [-1, 1])"""
    policy: str | None = None
    """the policy, a folder or hub id"""
    reference: str | None = None
    """the SFT policy beside it"""
    dataset_names: tuple[str, ...] = ()
    """a prompt file for each test set (paper: main and forget)"""
    responses: str | None = None
    """instead of these three: the responses.jsonl of a run"""
    response_length: Count = 64
    """tokens of a response"""
    temperature: Weight = 1.0
    """of sampling, 0: greedy (our choice C15)"""
    common_random_numbers: bool = False
    """both policies draw from one seed: ties while they are close (our choice C15)"""


# --- calibration: the first three functions stand in am_train.py, too, and a test says so ---


def expected_calibration_error(confidence, correct):  # each (pairs,)
    """ECE in points: sum over bins of (share of pairs) x |accuracy - mean confidence|, times 100.

    confidence: s(|difference of scores|), in 10 bins of equal width over [0.5, 1], right edge
    included (our choice C7). correct: 1, 0, or 0.5 of a tie; or the true probability.
    """
    index = np.digitize(confidence, np.linspace(0.5, 1, 11)[1:-1], right=True)
    gap = np.bincount(index, correct, 10) - np.bincount(index, confidence, 10)
    return 100 * np.abs(gap).sum() / len(index)


def ranking_metrics(chosen, rejected):  # each (pairs,): scores
    """[p. 6]  p(y_c preferred) = s(score_c - score_r): accuracy and ECE in points, Brier, NLL."""
    delta = np.asarray(chosen, dtype=np.float64) - np.asarray(rejected, dtype=np.float64)
    correct = np.where(delta == 0, 0.5, delta > 0)
    return {
        "accuracy": 100 * correct.mean(),
        "ece": expected_calibration_error(1 / (1 + np.exp(-np.abs(delta))), correct),
        "brier": ((1 - 1 / (1 + np.exp(-delta))) ** 2).mean(),
        "nll": np.logaddexp(0, -delta).mean(),
    }


def score_balance(scores, tasks):  # (texts,), (texts,)
    """Mean and std of each task's scores, and how far they spread over the tasks (Fig. 4a, 4b)."""
    scores, tasks, per_task = np.asarray(scores), np.asarray(tasks, object), {}
    for task in np.unique(tasks):
        part = scores[tasks == task]
        per_task[str(task)] = {"mean": part.mean(), "std": part.std(), "count": len(part)}
    means, stds = ([v[k] for v in per_task.values()] for k in ("mean", "std"))
    spreads = {"spread_of_means": np.std(means), "spread_of_stds": np.std(stds)}
    return per_task, spreads | {"mean_within_std": np.mean(stds)}


def stated(delta):  # (pairs,): score_c - score_r
    """[p. 6] of every pair: its confidence; 1 if it is right, 0 if wrong, .5 if equal."""
    return 1 / (1 + np.exp(-np.abs(delta))), np.where(delta == 0, 0.5, delta > 0)


def truth_of_preferred(delta, prob_chosen):  # (pairs,), (pairs,)
    """True probability that annotators prefer the response that the scorer prefers."""
    return np.where(delta == 0, 0.5, np.where(delta > 0, prob_chosen, 1 - prob_chosen))


def reliability_bins(delta, truth=None):  # each (pairs,)
    """The bins of the ECE (Fig. 2): count, and means of accuracy, confidence, score gap, truth."""
    confidence, correct = stated(delta)
    index = np.digitize(confidence, np.linspace(0.5, 1, 11)[1:-1], right=True)
    columns = {"accuracy": correct, "confidence": confidence, "gap": np.abs(delta)}
    columns |= {} if truth is None else {"truth": truth}
    return [
        {"count": int(b.sum())} | {k: v[b].mean() if b.any() else None for k, v in columns.items()}
        for b in (index == k for k in range(10))
    ]


def numbered(texts):
    """A number for each text, equal ones alike, and how many there are.

    (An array of texts, as np.unique makes it, takes the longest one's room for every row.)
    """
    number = {text: n for n, text in enumerate(sorted({*texts}))}
    return np.array([number[text] for text in texts]), len(number)


def paired_intervals(scores, prompts, num_bootstrap, rng):
    """{name: (2, pairs)} -> metrics of each scorer minus the first one's, 95 % intervals.

    A prompt is drawn with all its pairs, which are not independent.
    """
    (of_pair, n), samples, result = numbered(prompts), {name: [] for name in scores}, {}
    for k in progress(range(1 + num_bootstrap), "bootstrap", delay=5):
        counts = rng.multinomial(n, np.full(n, 1 / n)) if k else np.ones(n, int)  # 0: the sample
        drawn = np.repeat(np.arange(len(of_pair)), counts[of_pair])
        for name, pair in scores.items():
            chosen, rejected = (side[drawn] for side in pair)
            std = np.append(chosen, rejected).std() or 1
            metrics = {"separation": (chosen - rejected).mean() / std}  # Fig. 3
            metrics |= ranking_metrics(chosen, rejected)
            samples[name].append([*metrics.values()])
    first, *others = scores
    for name in others:
        intervals = result[f"{name} - {first}"] = {}
        differences = np.subtract(samples[name], samples[first]).T
        for k, (point, *resampled) in zip(metrics, differences, strict=True):
            low, high = np.percentile(resampled, [2.5, 97.5])
            if k == "ece":  # resampling adds bias: reflect; still too narrow (C7)
                low, high = 2 * point - high, 2 * point - low
            intervals[k] = {"difference": point, "low": low, "high": high}
    return result


def calibration(args: Calibration):
    from tools.judges import load_advantages, try_scorers

    folders = [s.rstrip("/").removesuffix("/scored.jsonl") for s in args.scorers]
    names = args.names or [Path(s.removesuffix("/model")).name for s in folders]
    if not len({*names}) == len(names) == len(args.scorers):
        raise InputError("--names: give each scorer a name of its own")
    refuse_finished(f"{args.output_dir}/calibration.json", args)
    pairs = load_rows(args.dataset_name, {"prompt": "prompt"} | dict.fromkeys(SIDES, "response"))
    for line, row in enumerate(pairs, 1):
        with in_one_line(f"{args.dataset_name}, line {line}: field 'prob_chosen'"):
            if not 0 <= row.get("prob_chosen", 0) <= 1:
                raise ValueError("must be from 0 to 1")
    scores, lines, equal = {}, [], np.zeros(len(pairs), bool)

    # 1 scores; equal sides carry no preference
    try_scorers(args.scorers, args, args.dataset_name, pairs, SIDES)
    for name, path in zip(names, args.scorers, strict=True):
        score = load_advantages(path, args, args.dataset_name)  # a [Eq. 8, K = 0]
        scores[name] = score(pairs, SIDES)
        equal |= score.equal
        if not np.isfinite(scores[name]).all():
            raise InputError(f"--scorers {path}: gives scores that are no numbers")
        lines.append({"scorer": name} | dict(zip(SIDES, scores[name].tolist(), strict=True)))
        write_jsonl(f"{args.output_dir}/scores.jsonl", lines)
    backend.last_pass()
    said = f"{args.dataset_name}: {equal.sum()} of {len(pairs)} pairs have equal sides"
    if equal.all():
        raise InputError(said)
    if equal.any():
        print(f"{said}, and are left out")
    rows = [pairs[i] for i in np.flatnonzero(~equal)]
    scores = {name: both[:, ~equal] for name, both in scores.items()}
    tasks, known = [row.get("task", "all") for row in rows], [r.get("prob_chosen") for r in rows]
    report = {"pairs": len(rows), "left_out": np.flatnonzero(equal).tolist(), "scorers": {}}

    # 2 an entry for each scorer
    for name, (chosen, rejected) in scores.items():
        delta, both, truth = chosen - rejected, scores[name].ravel(), None
        entry = ranking_metrics(chosen, rejected) | {"score_std": both.std()}
        if None not in known:  # the truth, without the noise of the labels
            truth = truth_of_preferred(delta, np.array(known))
            entry["ece_vs_truth"] = expected_calibration_error(stated(delta)[0], truth)
        per_task, balance = score_balance(both, tasks * 2)
        print(f"{name}: " + "  ".join(f"{k} {v:.4g}" for k, v in (entry | balance).items()))
        entry |= {"balance": balance, "per_task": per_task, "bins": reliability_bins(delta, truth)}
        report["scorers"][name] = entry

    # 3 differences to the first scorer
    if len(names) > 1:
        rng, prompts = np.random.default_rng(args.seed), [str(row["prompt"]) for row in rows]
        report["paired"] = paired_intervals(scores, prompts, args.num_bootstrap, rng)
        for pair, metrics in report["paired"].items():
            for k, v in metrics.items():
                print("{} {} {difference:+.4g} [{low:+.4g}, {high:+.4g}]".format(pair, k, **v))

    # 4 for tools/figures.py and tools/reward_card.py
    report |= {"args": asdict(args)} | environment()
    write_json(f"{args.output_dir}/calibration.json", report)
    return report


# --- win rate ---


def resample(prompts, num_bootstrap, rng, extra=0):
    """How often each row counts, (1 + num_bootstrap, rows + extra); line 0 is the sample itself.

    Rows of one prompt are drawn together. A bootstrap cannot draw what it has not seen, say a win,
    so where shares of verdicts are resampled, `extra` prompts join, one of each verdict.
    """
    of_row, groups = numbered(prompts)
    n = groups + extra
    drawn = rng.multinomial(n, np.full(n, 1 / n), num_bootstrap)
    sample = np.append(np.ones(len(of_row)), np.zeros(extra))
    return np.vstack([sample, np.hstack([drawn[:, of_row], drawn[:, groups:]])])


def with_intervals(samples):
    """{name: (1 + num_bootstrap,)} -> {name: value, "intervals": {name: [low, high]}}, 95 %."""
    bounds = {k: np.percentile(v[1:], [2.5, 97.5]).tolist() for k, v in samples.items()}
    return {k: float(v[0]) for k, v in samples.items()} | {"intervals": bounds}


def shares(verdicts, weights):  # (rows,), with those of the extra prompts (rows + 3,)
    """Percent of wins, ties and losses, and the win rate, to which a tie is half a win."""
    verdicts = np.append(verdicts, VERDICTS)
    samples = {k: 100 * (weights @ (verdicts == k) / weights.sum(1)) for k in VERDICTS}
    return samples | {"win_rate": samples["win"] + samples["tie"] / 2}


def hash_of(row):
    """Written beside log-probs: of which text they are."""
    text = json.dumps([row["prompt"], row["response"]])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def drift(rows, num_bootstrap, rng):
    """KL = E[log pi(y|x) - log pi_ref(y|x)], y ~ pi, nats; perplexity of y under pi_ref."""
    if not all(row.get("logprobs_of") == hash_of(row) for row in rows):
        if any("logprob" in row for row in rows):
            print("log-probs of other texts, or of unknown ones: no KL")
        return {}
    weights = resample([str(row["prompt"]) for row in rows], num_bootstrap, rng)
    tokens, reference = (np.array([r[k] for r in rows]) for k in ("tokens", "reference_logprob"))
    samples = {"perplexity_ref": np.exp(-(weights @ reference / (weights @ tokens)))}
    if all("logprob" in row for row in rows):
        ratio = weights @ (np.array([row["logprob"] for row in rows]) - reference)
        samples |= {"kl": ratio / weights.sum(1), "kl_per_token": ratio / (weights @ tokens)}
    return samples


def summarise(rows, args, rng):
    """What winrate.json says of one test set: verdicts, KL and, if there are several, tasks."""

    def part(rows, more=dict):
        prompts = [str(row["prompt"]) for row in rows]
        weights = resample(prompts, args.num_bootstrap, rng, len(VERDICTS))
        samples = shares([row["verdict"] for row in rows], weights) | more()
        return {"prompts": len(rows)} | with_intervals(samples)

    result, by_task = part(rows, lambda: drift(rows, args.num_bootstrap, rng)), {}
    for row in rows:
        by_task.setdefault(row.get("task", "all"), []).append(row)
    if len(by_task) > 1:
        result["tasks"] = {task: part(by_task[task]) for task in sorted(by_task)}
    return result


def load_sets(args):
    """{set: (file, rows)}: prompts, or stored answers less the last judge's fields."""
    sets, fields = {}, {"prompt": "prompt"}
    old = {"verdict", "score", "reference_score", "judgements"}
    if args.responses:
        fields |= {"response": "text", "reference": "text"}
    else:
        old |= {"set", "logprob", "reference_logprob", "tokens", "logprobs_of"}
        old |= {"response", "reference"}
    for name in args.dataset_names or [args.responses]:
        rows, label = load_rows(name, fields), Path(name).name.split(".")[0]
        if label in sets:
            raise InputError(f"--dataset_names: two files are called {label}")
        rows = [{"set": label} | {k: v for k, v in row.items() if k not in old} for row in rows]
        if any(not isinstance(row["set"], str) or row["set"] == OWN for row in rows):
            raise InputError(f"{name}: field 'set' must be text, and not {OWN}")
        sets[label] = name, rows
    return sets


def generate_answers(sets, args, store):
    """Both policies answer: `response` and `reference` of each row and, for the KL, log-probs.
    store() writes what is there, before the next step can fail."""
    answers, paths = {}, {"response": args.policy, "reference": args.reference}
    tokenizers = {field: load_tokenizer(path) for field, path in paths.items()}
    one, other = (tokenizer.get_vocab() for tokenizer in tokenizers.values())
    at, size = args.temperature or 1.0, args.per_device_eval_batch_size
    length, prompts = (args.max_length, args.response_length, args.truncate_prompts), {}
    for field in ("reference", "response"):  # check that both fit before either one answers
        model = None  # frees the last one's memory
        tokenizer, model = tokenizers[field], load_policy(paths[field], frozen=True)
        read = functools.partial(encode_prompts, tokenizer)
        prompts[field] = [read(rows, *length, name) for name, rows in sets.values()]
        longest = max(len(x) for of_set in prompts[field] for x in of_set)
        check_fits(model, tokenizer, longest + args.response_length)
    for field, path in paths.items():
        if field == "reference":
            model = None
            model = load_policy(path, frozen=True)
        tokenizer = tokenizers[field]
        for (name, rows), x in zip(sets.values(), prompts[field], strict=True):
            apart = field == "reference" and not args.common_random_numbers
            torch.manual_seed(args.seed + apart * 10**6)  # far from the seeds of other runs
            how = args.response_length, args.temperature, size, args.bf16
            ids = generate(model, tokenizer, x, *how)
            texts = decode(tokenizer, ids, stop_ids(model, tokenizer))
            for row, text in zip(rows, texts, strict=True):
                row[field] = text
            store()
            y = answers.setdefault(name, ids)  # the policy's y, which both models read
            if one != other:
                print(f"{name}: policy and reference have other tokens, so no KL")
            elif args.temperature or field == "reference":  # greedy answers have no KL
                pairs, pad_id = list(zip(x, y, strict=True)), tokenizer.pad_token_id
                logprobs = lambda *batch: response_logprobs(model, *batch, at)  # noqa: E731
                values, _ = forward_batches(logprobs, pairs, pad_id, size, args.bf16)
                values = values.double().sum(1).tolist()  # log pi(y|x), nats
                for row, ids, value in zip(rows, y, values, strict=True):
                    if field == "response":
                        row["logprob"] = value
                    else:
                        row |= {"reference_logprob": value, "tokens": len(ids)}
                        row["logprobs_of"] = hash_of(row)


def winrate(args: Winrate):
    three = args.policy, args.reference, args.dataset_names
    if any(three) if args.responses else not all(three):
        raise InputError("--policy, --reference, --dataset_names: give these three or --responses")

    # 1 the judge: one that is not there must not cost the answers
    from tools.judges import Answers, judge_of

    folder = Path(args.output_dir)
    refuse_finished(folder / "winrate.json", args, OWN)
    stored = Answers(folder / "responses.jsonl", args)
    sets = load_sets(args)
    rows = [row for _, of_set in sets.values() for row in of_set]
    judge = judge_of(args, rows[0]["prompt"])

    # 2 answers, on disk before they are judged, and verdicts
    if not args.responses:
        generate_answers(sets, args, lambda: stored.write(rows))
        stored.write(rows)
        print(f"--responses {stored.path} judges these answers again")
    with stored.judging():
        verdicts = judge.compare(rows)
    rows = [row | verdict for row, verdict in zip(rows, verdicts, strict=True)]
    stored.write(rows)
    backend.last_pass()

    # 3 statistics of each set
    rng, report = np.random.default_rng(args.seed), {}
    for label in dict.fromkeys(row["set"] for row in rows):
        of_set = [row for row in rows if row["set"] == label]
        report[label] = result = summarise(of_set, args, rng) | judge.summary(of_set)
        for k, bounds in result["intervals"].items():
            print("{} {} {:.4g} [{:.4g}, {:.4g}]".format(label, k, result[k], *bounds))
    own = {"judge": {"name": args.judge} | judge.usage, "args": asdict(args)}
    report[OWN] = own | environment()
    write_json(folder / "winrate.json", report)
    return report


def main(args):
    if isinstance(args, Score):
        from tools import score

        given = {f.name: getattr(args, f.name) for f in fields(score.Args) if hasattr(args, f.name)}
        return score.main(score.Args(**given))
    return calibration(args) if isinstance(args, Calibration) else winrate(args)


if __name__ == "__main__":
    run_cli(main, Calibration | Winrate | Score, __doc__)
