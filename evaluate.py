"""Evaluation (§4.3): is a scorer calibrated and balanced, and does a policy beat the SFT model?

    python evaluate.py calibration --scorers runs/rm/model runs/am/model \\
        --dataset_name test.jsonl --output_dir runs/calibration
    python evaluate.py winrate --policy runs/ppo/model --reference runs/sft/model --judge length \\
        --dataset_names main.jsonl forget.jsonl --output_dir runs/winrate

calibration (Table 1; from its files tools/figures.py draws Figures 1a, 2, 3 and 4):
    for each pair (x, y_c, y_r):  score = a(x, y) = r - e                             [Eq. 8, K = 0]
        it states  p(y_c preferred) = s(score_c - score_r),  s(z) = 1/(1 + e^-z)              [p. 6]
    is it right as often as it says?  accuracy, ECE, Brier, NLL
    has every task even scores?       mean and std by task

winrate (Table 2, Figures 1b, 5b):
    for each prompt x:  y ~ policy, y' ~ SFT policy    stored first, so that no judge loses them
        a judge says  win, lose or tie                 percent with 95 % intervals, by task
    how far did the policy move?      KL(policy | SFT policy), perplexity of y under the latter
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from utils import InputError, backend, check_positions, encode_prompts, encode_rows, environment
from utils import forward_batches, generate, load_function, load_policy, load_rows, load_scorer
from utils import load_tokenizer, response_logprobs, run_cli, score_texts, write_json, write_jsonl

SIDES = ("chosen", "rejected")
VERDICTS = ("win", "tie", "lose")


@dataclass(kw_only=True)
class Common:
    output_dir: str
    """receives calibration.json and scores.jsonl, or responses.jsonl and winrate.json"""
    max_length: int = 512
    """tokens of prompt and response together"""
    truncate_prompts: bool = False
    """keep the end of a prompt that is too long instead of refusing it"""
    per_device_eval_batch_size: int = 256
    """texts in a batch"""
    num_bootstrap: int = 1000
    """resamples of the prompts behind every interval"""
    seed: int = 1
    """seed of sampling and bootstrap"""
    bf16: bool = False
    """matrix products in bfloat16"""


@dataclass(kw_only=True)
class Calibration(Common):
    """Table 1."""

    scorers: tuple[str, ...]
    """model folders of am_train.py, or sequence classifiers with one label"""
    dataset_name: str
    """test pairs: `prompt`, `chosen`, `rejected`, optional `task` and `prob_chosen` (the truth)"""
    names: tuple[str, ...] = ()
    """a name for each scorer; the run folder's by default"""


@dataclass(kw_only=True)
class Winrate(Common):
    """Table 2."""

    judge: str
    """module:function(prompts, responses) -> scores, a scorer, length (the longer answer wins), or
    a model that compares: openai:MODEL (the paper: GPT-4), hf:MODEL"""
    judge_config: str | None = None
    """settings of judges that compare, JSON (docs/JUDGES.md)"""
    tie_band: float = 0.1
    """differences of scores that are a tie (our choice C14; gold lies in [-1, 1])"""
    policy: str | None = None
    """the policy, a folder or hub id"""
    reference: str | None = None
    """the SFT policy beside it"""
    dataset_names: tuple[str, ...] = ()
    """a prompt file for each test set (paper: main and forget)"""
    responses: str | None = None
    """in the place of these three: the responses.jsonl of another run"""
    response_length: int = 64
    """tokens that a response may have"""
    temperature: float = 1.0
    """sampling temperature, 0 for greedy (our choice C15)"""
    common_random_numbers: bool = False
    """both policies draw from one seed: ties while they are close (our choice C15)"""


# --- calibration: the first three functions stand in am_train.py, too, and a test says so ---


def expected_calibration_error(confidence, correct):  # each (pairs,)
    """ECE in points: sum over bins of (share of pairs) x |accuracy - mean confidence|, times 100.

    confidence: s(|difference of scores|), in 10 bins of equal width over [0.5, 1], right edge
    included. correct: 1, 0 or, for equal scores, 0.5; or the true probability instead.
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
    scores, tasks, per_task = np.asarray(scores), np.asarray(tasks), {}
    for task in np.unique(tasks):
        part = scores[tasks == task]
        per_task[str(task)] = {"mean": part.mean(), "std": part.std(), "count": len(part)}
    means, stds = ([v[k] for v in per_task.values()] for k in ("mean", "std"))
    spreads = {"spread_of_means": np.std(means), "spread_of_stds": np.std(stds)}
    return per_task, spreads | {"mean_within_std": np.mean(stds)}


def stated(delta):  # (pairs,): score_c - score_r
    """[p. 6] of every pair: its confidence, whether it is right (equal scores: .5), its bin."""
    confidence = 1 / (1 + np.exp(-np.abs(delta)))
    index = np.digitize(confidence, np.linspace(0.5, 1, 11)[1:-1], right=True)
    return confidence, np.where(delta == 0, 0.5, delta > 0), index


def truth_of_preferred(delta, prob_chosen):  # (pairs,), (pairs,)
    """True probability that the response which the scorer prefers is the preferred one."""
    return np.where(delta == 0, 0.5, np.where(delta > 0, prob_chosen, 1 - prob_chosen))


def reliability_bins(delta, truth=None):  # each (pairs,)
    """The bins of the ECE (Fig. 2): count, and means of accuracy, confidence, score gap, truth."""
    confidence, correct, index = stated(delta)
    columns = {"accuracy": correct, "confidence": confidence, "gap": np.abs(delta)}
    columns |= {} if truth is None else {"truth": truth}
    return [
        {"count": int(b.sum())} | {k: v[b].mean() if b.any() else None for k, v in columns.items()}
        for b in (index == k for k in range(10))
    ]


def paired_intervals(scores, prompts, num_bootstrap, rng):
    """Metrics of each scorer minus the first one's, with 95 % intervals, of {name: (2, pairs)}.

    A prompt is drawn with all its pairs, which are not independent. Metrics are made of sums over
    pairs, so all resamples are one product of prompt weights with the sums of each prompt.
    """
    groups, of_pair = np.unique(prompts, return_inverse=True)
    n = len(groups)
    drawn = rng.multinomial(n, np.full(n, 1 / n), num_bootstrap)
    weights = np.vstack([np.ones(n), drawn])  # (1 + num_bootstrap, prompts); 0: the sample

    def total(values):  # (pairs,) -> (1 + num_bootstrap,)
        return weights @ np.bincount(of_pair, values, n)

    def metrics(chosen, rejected):
        delta = chosen - rejected
        (confidence, correct, index), pairs = stated(delta), total(np.ones(len(delta)))
        gaps = [np.abs(total((index == b) * (correct - confidence))) for b in range(10)]
        mean = total(chosen + rejected) / (2 * pairs)
        std = np.sqrt(total(chosen**2 + rejected**2) / (2 * pairs) - mean**2)
        return {
            "accuracy": 100 * total(correct) / pairs,
            "ece": 100 * (sum(gaps) / pairs),
            "separation": total(delta) / pairs / std,  # Fig. 3
            "brier": total((1 - 1 / (1 + np.exp(-delta))) ** 2) / pairs,
            "nll": total(np.logaddexp(0, -delta)) / pairs,
        }

    (first, of_first), *others = [(name, metrics(*pair)) for name, pair in scores.items()]
    result = {}
    for name, of_other in others:
        intervals = result[f"{name} - {first}"] = {}
        for k, values in of_other.items():
            point, *samples = values - of_first[k]
            low, high = np.percentile(samples, [2.5, 97.5])
            if k == "ece":  # resampling inflates it: reflected, still too narrow (C7)
                low, high = 2 * point - high, 2 * point - low
            intervals[k] = {"difference": point, "low": low, "high": high}
    return result


def load_advantages(path, args, name):
    """A scorer as a function (rows, fields) -> a(x, y) of each field's texts, (fields, rows)."""
    tokenizer = load_tokenizer(path, dedicated_pad=True)
    scorer = load_scorer(path, tokenizer, frozen=True)
    size, how = args.per_device_eval_batch_size, (args, name, scorer.is_encoder)

    def advantages(rows, fields):
        texts = zip(*(encode_rows(tokenizer, rows, field, *how) for field in fields), strict=True)
        keys = [(*ids, prompt_len) for row in texts for ids, prompt_len in row]
        distinct = [(ids, prompt_len) for *ids, prompt_len in dict.fromkeys(keys)]
        check_positions(scorer.model, max(len(ids) for ids, _ in distinct))
        r, e = score_texts(scorer, tokenizer, distinct, size, args.bf16)
        a = dict(zip(dict.fromkeys(keys), r - e, strict=True))  # [Eq. 8] with K = 0
        return np.array([a[key] for key in keys]).reshape(-1, len(fields)).T.copy()

    return advantages


def calibration(args: Calibration):
    names = args.names or [Path(path.removesuffix("/model")).name for path in args.scorers]
    if len({*names}) != len(args.scorers):
        raise InputError("--names: give each scorer a name of its own")
    rows = load_rows(args.dataset_name, {"prompt": "prompt"} | dict.fromkeys(SIDES, "response"))
    tasks, known = [row.get("task", "all") for row in rows], [r.get("prob_chosen") for r in rows]
    report, scores = {"pairs": len(rows), "scorers": {}}, {}

    # 1 an entry for each scorer
    for name, path in zip(names, args.scorers, strict=True):
        score = load_advantages(path, args, args.dataset_name)
        chosen, rejected = scores[name] = score(rows, SIDES)
        delta, both, truth = chosen - rejected, scores[name].ravel(), None
        entry = ranking_metrics(chosen, rejected) | {"score_std": both.std()}
        if None not in known:  # the truth, without the noise of the labels
            truth = truth_of_preferred(delta, np.array(known))
            entry["ece_vs_truth"] = expected_calibration_error(stated(delta)[0], truth)
        per_task, balance = score_balance(both, tasks * 2)
        print(f"{name}: " + "  ".join(f"{k} {v:.4g}" for k, v in (entry | balance).items()))
        entry |= {"balance": balance, "per_task": per_task, "bins": reliability_bins(delta, truth)}
        report["scorers"][name] = entry
    backend.last_pass()

    # 2 differences to the first scorer
    if len(names) > 1:
        rng, prompts = np.random.default_rng(args.seed), [str(row["prompt"]) for row in rows]
        report["paired"] = paired_intervals(scores, prompts, args.num_bootstrap, rng)
        for pair, metrics in report["paired"].items():
            for k, v in metrics.items():
                print("{} {} {difference:+.4g} [{low:+.4g}, {high:+.4g}]".format(pair, k, **v))

    # 3 write what tools/figures.py and tools/reward_card.py read
    report |= {"args": asdict(args)} | environment()
    write_json(f"{args.output_dir}/calibration.json", report)
    lines = [{"scorer": k} | dict(zip(SIDES, v.tolist(), strict=True)) for k, v in scores.items()]
    write_jsonl(f"{args.output_dir}/scores.jsonl", lines)
    return report


# --- win rate ---


def resample(prompts, num_bootstrap, rng, extra=0):
    """How often each row counts, (1 + num_bootstrap, rows + extra); line 0 is the sample itself.

    Rows of one prompt are drawn together. A bootstrap cannot draw what it has not seen: without a
    win among 300 prompts its interval is [0, 0]. So where shares of verdicts are resampled, `extra`
    prompts join, one of each verdict.
    """
    groups, of_row = np.unique(prompts, return_inverse=True)
    n = len(groups) + extra
    drawn = rng.multinomial(n, np.full(n, 1 / n), num_bootstrap)
    sample = np.append(np.ones(len(of_row)), np.zeros(extra))
    return np.vstack([sample, np.hstack([drawn[:, of_row], drawn[:, len(groups) :]])])


def with_intervals(samples):
    """{name: (1 + num_bootstrap,)} -> {name: value, "intervals": {name: [low, high]}}, 95 %."""
    bounds = {k: np.percentile(v[1:], [2.5, 97.5]).tolist() for k, v in samples.items()}
    return {k: float(v[0]) for k, v in samples.items()} | {"intervals": bounds}


def shares(verdicts, weights):  # (rows,), with those of the extra prompts (rows + 3,)
    """Percent of wins, ties and losses, and the win rate, to which a tie is half a win."""
    verdicts = np.append(verdicts, VERDICTS)
    samples = {k: 100 * (weights @ (verdicts == k) / weights.sum(1)) for k in VERDICTS}
    return samples | {"win_rate": samples["win"] + samples["tie"] / 2}


def drift(rows, num_bootstrap, rng):
    """KL = E[log pi(y|x) - log pi_ref(y|x)], y ~ pi, nats; perplexity of y under pi_ref."""
    if not all("reference_logprob" in row for row in rows):
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
    columns = ([str(row.get(k, "all")) for row in rows] for k in ("prompt", "task", "verdict"))
    prompts, tasks, verdicts = map(np.array, columns)

    def part(of, more=dict):
        weights = resample(prompts[of], args.num_bootstrap, rng, len(VERDICTS))
        samples = shares(verdicts[of], weights) | more()
        return {"prompts": int(of.sum())} | with_intervals(samples)

    result = part(tasks == tasks, lambda: drift(rows, args.num_bootstrap, rng))
    if len({*tasks}) > 1:
        result["tasks"] = {str(task): part(tasks == task) for task in sorted({*tasks})}
    return result


def load_scores(spec, args):
    """A judge that scores, as a function (rows, fields) -> scores (fields, rows)."""
    if spec == "length":
        return lambda rows, fields: np.array([[len(row[k]) for row in rows] for k in fields])
    if ":" not in spec:
        return load_advantages(spec, args, "answers")
    function = load_function(spec, "--judge")

    def scores(rows, fields):
        prompts = [row["prompt"] for row in rows]
        return np.array([function(prompts, [row[k] for row in rows]) for k in fields])

    return scores


class ScoringJudge:
    """Scores one answer at a time; a difference within the tie band is a tie."""

    def __init__(self, args, prompt):
        self.args, self.usage = args, {}
        known = "module:function, openai:MODEL, hf:MODEL, length or a scorer"
        try:  # a judge that cannot judge should say so before any policy answers
            self.scores = load_scores(args.judge, args)
            self.scores([{"prompt": prompt, "response": "a response"}], ["response"])
        except Exception as error:  # whatever the user's function raises
            said = f"expected {known}; fails on one prompt ({type(error).__name__}: {error})"
            raise InputError(f"--judge {args.judge}: {said}") from None

    def compare(self, rows):
        found, scores = [], self.scores(rows, ("response", "reference"))
        if not np.isfinite(scores).all():
            raise InputError(f"--judge {self.args.judge}: gave a score of {scores.sum()}")
        for a, b in scores.T.tolist():
            verdict = "tie" if abs(a - b) <= self.args.tie_band else "win" if a > b else "lose"
            found.append({"score": a, "reference_score": b, "verdict": verdict})
        return found

    def summary(self, rows):
        return {k: np.mean([row[k] for row in rows]) for k in ("score", "reference_score")}


def load_sets(args):
    """{set: (file, rows)} of prompts, or of answers without what another judge said."""
    sets, fields, old = {}, {"prompt": "prompt"}, {"score", "reference_score", "judgements"}
    fields |= dict.fromkeys(("response", "reference"), "text") if args.responses else {}
    for name in args.dataset_names or [args.responses]:
        rows, label = load_rows(name, fields), Path(name).name.split(".")[0]
        if label in sets:
            raise InputError(f"--dataset_names: two files are called {label}")
        rows = [{k: v for k, v in row.items() if k not in old} for row in rows]
        sets[label] = name, [{"set": label} | row for row in rows]
    return sets


def generate_answers(sets, args):
    """Both policies answer: `response` and `reference` of each row and, for the KL, log-probs."""
    answers, vocabularies, size = {}, [], args.per_device_eval_batch_size
    for field, path in (("response", args.policy), ("reference", args.reference)):
        model = None  # the one before leaves the memory first
        tokenizer, model = load_tokenizer(path), load_policy(path, frozen=True)
        vocabularies.append(tokenizer.get_vocab())
        at = args.temperature or 1.0
        for name, rows in sets.values():
            room = args.max_length, args.response_length, args.truncate_prompts
            prompts = encode_prompts(tokenizer, rows, *room, name)
            check_positions(model, max(map(len, prompts)) + args.response_length)
            apart = field == "reference" and not args.common_random_numbers
            torch.manual_seed(args.seed + apart * 10**6)  # far from the seeds of other runs
            how = args.response_length, args.temperature, size, args.bf16
            ids = generate(model, tokenizer, prompts, *how)
            texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
            for row, text in zip(rows, texts, strict=True):
                row[field] = text
            y = answers.setdefault(name, ids)  # the policy's: both models give log-probs
            if vocabularies[0] != vocabularies[-1]:
                print(f"{name}: policy and reference have other tokens, so no KL")
            elif args.temperature or field == "reference":  # greedy answers have no KL
                pairs, pad_id = list(zip(prompts, y, strict=True)), tokenizer.pad_token_id
                logprobs = lambda *batch: response_logprobs(model, *batch, at)  # noqa: E731
                values, _ = forward_batches(logprobs, pairs, pad_id, size, args.bf16)
                values = values.double().sum(1).tolist()  # log pi(y|x), nats
                key = "logprob" if field == "response" else "reference_logprob"
                for row, ids, value in zip(rows, y, values, strict=True):
                    row |= {key: value, "tokens": len(ids)}


def winrate(args: Winrate):
    three = args.policy, args.reference, args.dataset_names
    if any(three) if args.responses else not all(three):
        raise InputError("--policy, --reference, --dataset_names: give these three or --responses")

    # 1 the judge: one that is not there must not cost the answers
    sets, folder = load_sets(args), Path(args.output_dir)
    rows = [row for _, of_set in sets.values() for row in of_set]
    if args.judge.startswith(("openai:", "hf:")):
        from tools.judges import load_judge

        judge = load_judge(args.judge, args.judge_config, folder, args.bf16)
    elif args.judge_config:
        raise InputError("--judge_config: is for openai: and hf:")
    else:
        judge = ScoringJudge(args, rows[0]["prompt"])

    # 2 answers, on disk before they are judged, and verdicts
    if not args.responses:
        generate_answers(sets, args)
        write_jsonl(folder / "responses.jsonl", rows)
        print(f"--responses {folder}/responses.jsonl judges these answers again")
    rows = [row | verdict for row, verdict in zip(rows, judge.compare(rows), strict=True)]
    backend.last_pass()

    # 3 statistics of each set
    rng, report = np.random.default_rng(args.seed), {}
    for label in dict.fromkeys(row["set"] for row in rows):
        of_set = [row for row in rows if row["set"] == label]
        report[label] = result = summarise(of_set, args, rng) | judge.summary(of_set)
        for k, bounds in result["intervals"].items():
            print("{} {} {:.4g} [{:.4g}, {:.4g}]".format(label, k, result[k], *bounds))
    report |= {"judge": {"name": args.judge} | judge.usage, "args": asdict(args)}
    write_jsonl(folder / "responses.jsonl", rows)
    write_json(folder / "winrate.json", report | environment())
    return report


def main(args):
    if args.num_bootstrap < 1:
        raise InputError("--num_bootstrap: must be positive")
    return calibration(args) if isinstance(args, Calibration) else winrate(args)


if __name__ == "__main__":
    run_cli(main, Calibration | Winrate, __doc__)
