"""What verdicts, scores and answers come to: the numbers of `evaluate.py winrate`, `compare` and `judge-agreement`.

    intervals           95 %, percentile bootstrap, whole prompts resampled; shares of verdicts with three prompts more (EXTRA)
    length control      win rate at equal length: logistic regression of the verdicts on a bounded difference of lengths
    diversity           distinct-1, distinct-2, self-BLEU
    KL, perplexity      of a policy's answers against the SFT model, from both models' log-probs
    compare             win - lose of several policies, paired by prompt
    judge-agreement     accuracy and Cohen's kappa of judges against labelled pairs and ties, "the longer answer wins" beside

Arrays are (rows,), a row one answered prompt or one labelled pair; samples (bootstrap + 1,), the first of the data itself.
Points are a verdict's: 1 win, 0 tie, -1 lose. None of it is in the paper, whose Table 2 has win, lose and tie alone.
"""

import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tyro

from data import load_rows
from engines import leave_to_rank_0
from judges import JudgeFlags, load_judge
from utils import InputError, environment, read_json, write_json

POINTS = {"win": 1, "lose": -1, "tie": 0}
EXTRA = np.array([1, 0, -1])  # one prompt of each verdict joins the resampled ones: see resample
WORD = re.compile(r"[\u3040-\u9fff]|[^\s\u3040-\u9fff]+")  # split at white space; of Chinese and Japanese, characters


# --- intervals --------------------------------------------------------------------------------------------------------


def resample(prompts, num_bootstrap, rng, extra=0):
    """How often each row counts: (num_bootstrap + 1, rows + extra); line 0 is the sample itself, without the extra rows.

    Rows of one prompt stay together: they are not independent. A bootstrap cannot draw what it has not seen: with no
    win among 300 prompts its interval is [0, 0], and it covers too little wherever an outcome is rare (at 5 % of 30
    prompts 79 % of the time). So shares of verdicts are resampled with one prompt more of each verdict, each with a
    weight of its own; tests/test_comparisons.py checks the coverage.
    """
    groups, of_row = np.unique(prompts, return_inverse=True)
    n = len(groups) + extra
    drawn = rng.multinomial(n, np.full(n, 1 / n), num_bootstrap)
    sample = np.append(np.ones(len(of_row)), np.zeros(extra))
    return np.vstack([sample, np.hstack([drawn[:, of_row], drawn[:, len(groups) :]])])


def mean(weights, values, per=None):
    """Weighted mean of values (rows,), or their sum over that of `per` (rows,) -> samples."""
    return weights @ values / (weights.sum(1) if per is None else weights @ per)


def with_intervals(samples):
    """{name: samples} -> {name: value, "intervals": {name: [low, high]}}."""
    bounds = {k: np.percentile(v[1:], [2.5, 97.5]).tolist() for k, v in samples.items()}
    return {k: float(v[0]) for k, v in samples.items()} | {"intervals": bounds}


def win_lose_tie(scores, reference_scores, tie_band):  # (prompts,), (prompts,)
    """Percent of prompts where the policy's answer is better, worse or within the tie band."""
    difference = np.asarray(scores) - np.asarray(reference_scores)
    points = np.sign(difference) * (np.abs(difference) > tie_band)
    return {k: 100 * float((points == v).mean()) for k, v in POINTS.items()}


def length_controlled(points, x, weights):
    """Percent of wins, ties as halves, that a policy would have with answers as long as the reference's -> samples.

        p(win) = s(theta + phi x),  x = tanh(d / sd(d)),  d = characters of response - characters of reference

    By cross-entropy against 1, 1/2, 0, with phi^2 / 2 added, which keeps phi finite where length alone decides; the
    result is 100 s(theta). AlpacaEval 2 (Dubois et al. 2024) has the same tanh term. Ours leaves out its difficulty of
    each instruction, which it estimates from a leaderboard's models, and its rows of two verbose and terse baselines,
    and has the fixed ridge in the place of an L1 penalty chosen by cross-validation. Newton's method on all resamples at
    once; weights (samples, rows).
    """
    y, powers = (1 + points) / 2, np.stack([np.ones(len(x)), x, x**2], 1)
    theta, phi = np.zeros((2, len(weights)))
    for _ in range(30):
        p = 1 / (1 + np.exp(-theta[:, None] - phi[:, None] * x))
        g0, g1 = ((weights * (y - p)) @ powers[:, :2]).T
        h00, h01, h11 = ((weights * p * (1 - p)) @ powers).T
        g1, h00, h11 = g1 - phi, h00 + 1e-9, h11 + 1
        steps = np.stack([h11 * g0 - h01 * g1, h00 * g1 - h01 * g0]) / (h00 * h11 - h01**2)
        theta, phi = np.array([theta, phi]) + steps.clip(-2, 2)  # bounded: nothing but wins has no optimum
        if np.abs(steps).max() < 1e-4:  # its square is the error left
            break
    return 100 / (1 + np.exp(-theta))


def preference(points, difference, weights):
    """Win, lose, tie, win_rate (ties as halves), length_controlled in percent, with intervals.

    difference: characters of response - reference (rows,); weights: of resample, with the rows of EXTRA.
    """
    x = np.append(np.tanh(difference / (np.std(difference) or 1)), 0 * EXTRA)
    points = np.append(points, EXTRA)
    samples = {k: 100 * mean(weights, points == v) for k, v in POINTS.items()}
    samples["win_rate"] = samples["win"] + samples["tie"] / 2
    return with_intervals(samples | {"length_controlled": length_controlled(points, x, weights)})


def net_difference(points, others, weights):
    """(win - lose) of one policy minus that of another on the same prompts, in points of percent -> samples."""
    return 100 * mean(weights, np.append(points - others, EXTRA))


def mean_difference(differences, prompts, num_bootstrap, rng):
    """Mean of differences (rows,), with its interval -> {difference, low, high}."""
    result = with_intervals({"difference": mean(resample(prompts, num_bootstrap, rng), differences)})
    low, high = result["intervals"]["difference"]
    return {"difference": result["difference"], "low": low, "high": high}


# --- answers ----------------------------------------------------------------------------------------------------------


def ngrams(words, n):
    return list(zip(*(words[i:] for i in range(n)), strict=False))


def distinct(texts, n):
    """Share of the n-grams of all texts that are different ones (Li et al. 2016); it falls with the amount of text."""
    grams = [gram for text in texts for gram in ngrams(WORD.findall(text), n)]
    return len(set(grams)) / len(grams) if grams else None


def self_bleu(texts, limit=200):
    """Mean BLEU of each text against all others (Zhu et al. 2018), on at most `limit` texts: 1, all are alike.

    Unsmoothed, 1- to 4-grams (fewer in a text of fewer words), brevity penalty to the closest length. Texts without a
    word are left out; None for fewer than two. To a text, a reference's count is the largest of all the others'.
    """
    words = [found for text in texts[:: -(-len(texts) // limit)] if (found := WORD.findall(text))]
    if len(words) < 2:
        return None
    counts = [[Counter(ngrams(w, n)) for n in range(1, min(4, len(w)) + 1)] for w in words]
    largest = {}  # n-gram -> its two largest counts in a text
    for gram, count in (item for orders in counts for order in orders for item in order.items()):
        largest[gram] = sorted((*largest.get(gram, (0, 0)), count))[1:]
    lengths, scores = Counter(map(len, words)), []
    for w, orders in zip(words, counts, strict=True):
        others = lengths - Counter([len(w)])
        closest = min(others, key=lambda length: (abs(length - len(w)), length))
        precisions = [
            sum(min(count, largest[gram][count < largest[gram][1]]) for gram, count in order.items()) / order.total()
            for order in orders
        ]
        scores.append(np.prod(precisions) ** (1 / len(orders)) * min(1, np.exp(1 - closest / len(w))))
    return float(np.mean(scores))


def diversity(texts):
    """Mean characters of a text, distinct-1, distinct-2 and self-BLEU of the texts."""
    measures = {"distinct_1": distinct(texts, 1), "distinct_2": distinct(texts, 2), "self_bleu": self_bleu(texts)}
    return {"characters": float(np.mean([len(text) for text in texts]))} | measures


def drift(rows, num_bootstrap, rng):
    """KL to the reference and the reference's perplexity, with intervals, on the policy's own answers; {} where no log-probs
    are. Log-probs are of whole responses, so kl = E[log pi(y|x) - log pi_ref(y|x)] is in nats a response."""
    if not all({"tokens", "reference_logprob"} <= row.keys() for row in rows):
        return {}
    weights = resample([str(row["prompt"]) for row in rows], num_bootstrap, rng)
    tokens, reference = (np.array([row[k] for row in rows]) for k in ("tokens", "reference_logprob"))
    samples = {"perplexity_ref": np.exp(-mean(weights, reference, tokens))}
    if all("logprob" in row for row in rows):  # a greedy answer is no sample: it has a perplexity and no KL
        ratio = np.array([row["logprob"] for row in rows]) - reference
        samples |= {"kl": mean(weights, ratio), "kl_per_token": mean(weights, ratio, tokens)}
    return with_intervals(samples)


# --- winrate ----------------------------------------------------------------------------------------------------------


def summarise(rows, verdicts, judge, args, rng):
    """What winrate.json says of one set: verdicts, KL, diversity and, where there are several, tasks."""
    prompts, points = [str(row["prompt"]) for row in rows], np.array([POINTS[v["verdict"]] for v in verdicts])
    characters = np.array([len(row["response"]) - len(row["reference"]) for row in rows])

    def shares(at):
        weights = resample([prompts[i] for i in at], args.num_bootstrap, rng, len(EXTRA))
        return preference(points[at], characters[at], weights)

    result = shares(range(len(rows)))
    moved = drift(rows, args.num_bootstrap, rng)
    result["intervals"] |= moved.pop("intervals", {})
    result |= moved | judge.summary(verdicts) | {"prompts": len(rows)}
    result["diversity"] = {k: diversity([row[k] for row in rows]) for k in ("response", "reference")}
    tasks = np.array([row.get("task", "all") for row in rows])
    if len({*tasks}) > 1:
        result["tasks"] = {}
        for task in sorted({*tasks}):
            at = np.flatnonzero(tasks == task)
            result["tasks"][str(task)] = {"prompts": len(at)} | shares(at)
    return result


def score_deltas(score, rows, args):
    """Mean score of responses minus references, {difference, low, high}, overall and by set; score: a scorer_function."""
    prompts, rng = [row["prompt"] for row in rows], np.random.default_rng(args.seed)
    delta = np.subtract(*(score(prompts, [row[k] for row in rows]) for k in ("response", "reference")))

    def part(indices):
        return mean_difference(delta[indices], [str(prompts[i]) for i in indices], args.num_bootstrap, rng)

    sets = dict.fromkeys(row["set"] for row in rows)
    by_set = {label: part([i for i, row in enumerate(rows) if row["set"] == label]) for label in sets}
    return {"overall": part(range(len(rows))), "sets": by_set}


# --- compare ----------------------------------------------------------------------------------------------------------


@dataclass
class Compare:
    winrates: tuple[str, ...]
    """output folders of `evaluate.py winrate`, one a policy: same prompts, reference answers and judge"""
    output_dir: str
    """receives compare.json"""
    names: tuple[str, ...] = ()
    """a name for each folder; the folder's own by default"""
    num_bootstrap: int = 1000
    """resamples of the prompts behind every interval"""
    seed: int = 1
    """seed of the bootstrap"""


def run_names(paths, names, flag):
    """A name for each of `paths`: those of --names, or of the run folders. Raises InputError where two are the same."""
    if names and len(names) != len(paths):
        raise InputError(f"--names: {len(names)} names for {len(paths)} {flag}")
    names = names or tuple(Path(p).parent.name if Path(p).name == "model" else Path(p).name for p in paths)
    if len(set(names)) < len(names):
        raise InputError(f"--names: two of the {flag} have equal names; give one for each")
    return names


def compare(args: Compare):
    """win - lose of each policy minus that of those before it, in points, by set, paired by prompt -> compare.json."""
    if args.num_bootstrap < 1 or len(args.winrates) < 2:
        raise InputError("--num_bootstrap must be positive, --winrates two folders or more")
    names = run_names(args.winrates, args.names, "winrates")
    arms, judges, first = {}, {}, args.winrates[0]
    for name, folder in zip(names, args.winrates, strict=True):
        fields = {"prompt": "prompt", "reference": "text", "set": "text", "verdict": "text"}
        arms[name] = rows = load_rows(f"{folder}/responses.jsonl", fields)
        judges[folder] = read_json(f"{folder}/winrate.json", "--winrates")["judge"]["name"]
        if judges[folder] != judges[first]:
            said = f"{first} was judged by {judges[first]}, {folder} by {judges[folder]}"
            raise InputError(f"--winrates: {said}; judge both by one (winrate --responses)")
        for i, (row, other) in enumerate(zip(rows, arms[names[0]], strict=False), 1):
            for k in ("set", "prompt", "reference"):
                if row[k] != other[k]:
                    what = f"differ in '{k}' (responses.jsonl, line {i})"
                    remedy = "answer the same prompts with the same --reference and --seed"
                    raise InputError(f"--winrates: {first} and {folder} {what}; {remedy}")
        if len(rows) != len(arms[names[0]]):
            raise InputError(f"--winrates: {first} has {len(arms[names[0]])} answers, {folder} {len(rows)}")
    rng, report = np.random.default_rng(args.seed), {"judge": judges[first], "sets": {}}
    for label in dict.fromkeys(row["set"] for row in arms[names[0]]):
        points = {k: np.array([POINTS[r["verdict"]] for r in v if r["set"] == label]) for k, v in arms.items()}
        prompts = [str(row["prompt"]) for row in arms[names[0]] if row["set"] == label]
        weights, differences = resample(prompts, args.num_bootstrap, rng, len(EXTRA)), {}
        for i, name in enumerate(names):
            for other in names[:i]:
                differences[f"{name} - {other}"] = net_difference(points[name], points[other], weights)
        shares = {k: win_lose_tie(v, 0 * v, 0) for k, v in points.items()}
        report["sets"][label] = {"prompts": len({*prompts}), "arms": shares, "win - lose": with_intervals(differences)}
        for pair, (low, high) in report["sets"][label]["win - lose"]["intervals"].items():
            print(f"{label}: {pair}: {differences[pair][0]:+.1f} [{low:+.1f}, {high:+.1f}]")
    write_json(Path(args.output_dir) / "compare.json", report | environment())
    return report


# --- judge-agreement --------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class JudgeAgreement(JudgeFlags):
    judges: tuple[str, ...]
    """any number of judges, each as --judge of winrate takes it: module:function, a scorer folder, length, openai:, hf:"""
    dataset_name: str
    """labelled pairs: `prompt`, `chosen`, `rejected`, optional `task` and `label_by`"""
    output_dir: str
    """receives judge_agreement.json and judge_agreement.md"""
    ties: str | None = None
    """labelled ties beside them: `prompt`, `response_a`, `response_b`, `label`: "tie" """
    label_by: tuple[str, ...] = ()
    """only rows whose `label_by` is one of these, such as human: those that people labelled"""
    names: tuple[str, ...] = ()
    """a name for each judge; a scorer's run folder, else the judge itself, by default"""
    tie_band: float = 0.0
    """scoring judges: differences up to this are a tie, in each judge's own units"""
    num_bootstrap: int = 1000
    """resamples of the prompts behind every interval"""
    seed: int = 1
    """seed of the bootstrap"""
    judge: tyro.conf.Suppress[str] = ""


def load_labelled(args):
    """Rows {prompt, a, b, tie, task}: of a pair a is the chosen answer."""
    rows = load_rows(args.dataset_name, {"prompt": "prompt", "chosen": "response", "rejected": "response"})
    rows = [row | {"a": row["chosen"], "b": row["rejected"], "tie": False} for row in rows]
    if args.ties:
        fields = {"prompt": "prompt", "response_a": "response", "response_b": "response", "label": "text"}
        for i, row in enumerate(load_rows(args.ties, fields), 1):
            if row["label"] != "tie":
                raise InputError(f"{args.ties}, line {i}: field 'label' must be \"tie\", found {row['label']!r}")
            rows.append(row | {"a": row["response_a"], "b": row["response_b"], "tie": True})
    if args.label_by:
        found = dict.fromkeys(str(row.get("label_by")) for row in rows)
        if missing := [value for value in args.label_by if value not in found]:
            raise InputError(f"--label_by {missing[0]}: no row has it; `label_by` is one of: {', '.join(found)}")
        rows = [row for row in rows if row.get("label_by") in args.label_by]
    if all(row["tie"] for row in rows):
        raise InputError(f"{args.dataset_name}: holds no pair to judge; widen --label_by")
    return rows


def kappa(points, ties, weights):
    """Cohen's kappa of a judge against labels, samples; points (rows,) of answer a, ties (rows,): whether a tie is labelled.

    Which of two answers stands first means nothing, so every row counts in both orders: each side of the table then has
    (1 - ties) / 2 of either answer, and chance agrees in (1 - t)(1 - s) / 2 + t s, t and s the shares of ties. Without
    ties on either side it is 2 accuracy - 1.
    """
    t, s = mean(weights, ties), mean(weights, points == 0)
    chance = (1 - t) * (1 - s) / 2 + t * s
    agree = mean(weights, np.where(ties, points == 0, points == 1))
    return (agree - chance) / np.maximum(1 - chance, 1e-12)  # nothing but ties on both sides: 0


def judge_agreement(args: JudgeAgreement):
    """The table of all judges -> judge_agreement.json, judge_agreement.md."""
    if args.num_bootstrap < 1:
        raise InputError("--num_bootstrap: must be positive")
    names, rows = run_names(args.judges, args.names, "judges"), load_labelled(args)
    leave_to_rank_0()
    judges = [load_judge(replace(args, judge=spec), args.output_dir) for spec in args.judges]
    ties, prompts = np.array([row["tie"] for row in rows]), [str(row["prompt"]) for row in rows]
    tasks = np.array(["" if row["tie"] else row.get("task", "all") for row in rows])
    weights = resample(prompts, args.num_bootstrap, np.random.default_rng(args.seed))
    padded = resample(prompts, args.num_bootstrap, np.random.default_rng(args.seed), len(EXTRA))
    padded[:, : len(rows)] *= ~ties  # accuracy speaks of the pairs
    report = {"pairs": int((~ties).sum()), "ties": int(ties.sum()), "prompts": len({*prompts})}
    report |= {"label_by": args.label_by, "tie_band": args.tie_band, "judges": {}}
    for name, spec, judge in zip(names, args.judges, judges, strict=True):
        judge.probe(rows[0]["prompt"])
        said = judge.compare(*([row[k] for row in rows] for k in ("prompt", "a", "b")))
        points = np.array([POINTS[one["verdict"]] for one in said])
        right = 50 * (1 + points)
        samples = {"accuracy": mean(padded, np.append(right, 50 * (1 + EXTRA))), "kappa": kappa(points, ties, weights)}
        entry = {"judge": spec} | with_intervals(samples) | {"flips": judge.summary(said).get("flips")}
        by_task = {str(t): {"accuracy": right[tasks == t].mean(), "pairs": int((tasks == t).sum())} for t in {*tasks}}
        report["judges"][name] = entry | {"tasks": {t: by_task[t] for t in sorted(by_task.keys() - {""})}}
    write_json(Path(args.output_dir) / "judge_agreement.json", report | environment())
    text = agreement_table(report)
    Path(args.output_dir, "judge_agreement.md").write_text(text, encoding="utf-8")
    print(text, end="")
    return report


def agreement_table(report):
    """judge_agreement.json as Markdown: one table of the judges, one by task."""

    def cells(*values):
        return "| " + " | ".join(str(v).replace("|", "\\|").replace("<", "&lt;") for v in values) + " |"

    judges, shown = report["judges"], "{:.1f} [{:.1f}, {:.1f}]".format
    lines = [f"{report['pairs']} pairs, {report['ties']} ties, {report['prompts']} prompts", ""]
    lines += [cells("judge", "accuracy", "kappa", "flips"), "|---|---|---|---|"]
    for name, e in judges.items():
        percent = shown(e["accuracy"], *e["intervals"]["accuracy"])
        k = "{:z.2f} [{:z.2f}, {:z.2f}]".format(e["kappa"], *e["intervals"]["kappa"])
        lines.append(cells(name, percent, k, "–" if e["flips"] is None else f"{e['flips']:.1f}"))
    lines += ["", cells("accuracy by task", "pairs", *judges), "|---" * (2 + len(judges)) + "|"]
    for task, first in next(iter(judges.values()))["tasks"].items():
        lines.append(cells(task, first["pairs"], *(f"{e['tasks'][task]['accuracy']:.1f}" for e in judges.values())))
    return "\n".join(lines) + "\n"
