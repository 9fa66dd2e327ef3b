"""What stored answers say beyond who wins: length, diversity, scores of other scorers.

    python -m tools.answers --winrate runs/winrate --scorers runs/rm/model runs/am/model

reads the folder of `evaluate.py winrate` and writes answers.json into it. For each test set:

    length_controlled   the win rate that answers as long as the reference's would have; by task
    diversity           characters, distinct-1, distinct-2 and self-BLEU of responses and references
    scorers             mean score of the responses minus that of the references (of every row:
                        scorers.jsonl)

and the answers in AlpacaEval's form, as alpaca_eval_response.json and alpaca_eval_reference.json.
All intervals are 95 %, of the resamples that winrate.json has with the same number and seed.
"""

import re
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from tools.judges import Advantages, as_text, try_scorers
from tools.statistics import EXTRA, POINTS, check_bootstrap, column, mean, read_json
from tools.statistics import resample, run_names, with_intervals
from utils import InputError, backend, environment, load_rows, refuse_finished, run_cli, write_json
from utils import write_jsonl

OWN = "tools.answers"  # key in answers.json of what is no set: those have no dot in their names
SIDES = ("response", "reference")
# words are split at white space; of Chinese and Japanese, characters
WORD = re.compile(r"[\u3040-\u9fff]|[^\s\u3040-\u9fff]+")


@dataclass
class Args:
    winrate: str
    """output folder of `evaluate.py winrate`"""
    scorers: tuple[str, ...] = ()
    """model folders or hub ids of scorers whose mean scores of both answers are compared"""
    num_bootstrap: int = 1000
    """resamples of the prompts behind every interval"""
    seed: int = 1
    """seed of the bootstrap"""
    max_length: int = 512
    """scorers: tokens of prompt and response together"""
    truncate_prompts: bool = False
    """keep the end of a prompt that is too long instead of refusing it"""
    per_device_eval_batch_size: int = 32
    """scorers: texts in a batch"""
    bf16: bool = False
    """matrix products in bfloat16"""
    output_dir: str | None = None
    """receives answers.json and the others (default: the same folder)"""

    def __post_init__(self):  # a default, too, is tried by run_cli before any work
        self.output_dir = self.output_dir or self.winrate


# --- length ---------------------------------------------------------------------------------------


def length_controlled(points, x, weights):
    """Percent of wins, ties as halves, that answers as long as the reference's would have.

        p(win) = s(theta + phi x),  x = tanh(d / sd(d)),  d = characters of response - reference

    By cross-entropy against 1, 1/2, 0, with phi^2 / 2 added, which keeps phi finite where length
    alone decides; the result is 100 s(theta) -> samples. AlpacaEval 2 (Dubois et al. 2024) has the
    same tanh term. Ours leaves out its difficulty of each instruction, which it estimates from a
    leaderboard's models, and its rows of two verbose and terse baselines, and has the fixed ridge
    in the place of an L1 penalty chosen by cross-validation. Newton's method on all resamples at
    once; weights (samples, rows).
    """
    y, powers = (1 + points) / 2, np.stack([np.ones(len(x)), x, x**2], 1)
    theta, phi = np.zeros((2, len(weights)))
    for _ in range(30):
        p = 1 / (1 + np.exp(-theta[:, None] - phi[:, None] * x))
        g0, g1 = ((weights * (y - p)) @ powers[:, :2]).T  # gradient
        h00, h01, h11 = ((weights * p * (1 - p)) @ powers).T  # Hessian
        g1, h00, h11 = g1 - phi, h00 + 1e-9, h11 + 1
        steps = np.stack([h11 * g0 - h01 * g1, h00 * g1 - h01 * g0]) / (h00 * h11 - h01**2)
        theta, phi = np.array([theta, phi]) + steps.clip(-2, 2)  # nothing but wins has no optimum
        if np.abs(steps).max() < 1e-4:  # its square is the error left
            break
    return 100 / (1 + np.exp(-theta))


def at_equal_length(points, difference, weights):
    """length_controlled with the EXTRA rows; difference (rows,): characters more than the other."""
    x = np.append(np.tanh(difference / (np.std(difference) or 1)), 0 * EXTRA)
    return length_controlled(np.append(points, EXTRA), x, weights)


# --- diversity ------------------------------------------------------------------------------------


def ngrams(words, n):
    return list(zip(*(words[i:] for i in range(n)), strict=False))


def distinct(texts, n):
    """Share of the n-grams of all texts that are different ones (Li et al. 2016).

    It falls with the amount of text.
    """
    grams = [gram for text in texts for gram in ngrams(WORD.findall(text), n)]
    return len(set(grams)) / len(grams) if grams else None


def self_bleu(texts, limit=200):
    """Mean BLEU of each text against all others (Zhu et al. 2018): 1, all are alike.

    On at most `limit` texts. Unsmoothed, 1- to 4-grams (fewer in a text of fewer words), brevity
    penalty to the closest length. Texts without a word are left out; None for fewer than two.
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
        precisions = []
        for order in orders:  # an n-gram counts as often as in the text that has it most
            most = {gram: largest[gram][n < largest[gram][1]] for gram, n in order.items()}
            precisions.append(sum(min(order[gram], most[gram]) for gram in order) / order.total())
        brevity = min(1, np.exp(1 - closest / len(w)))
        scores.append(np.prod(precisions) ** (1 / len(orders)) * brevity)
    return float(np.mean(scores))


def diversity(texts):
    return {
        "characters": float(np.mean([len(text) for text in texts])),
        "distinct_1": distinct(texts, 1),
        "distinct_2": distinct(texts, 2),
        "self_bleu": self_bleu(texts),
    }


# --- the folder -----------------------------------------------------------------------------------


def describe(rows, judged, args, rng):
    """What answers.json says of one test set; judged: what winrate.json says of it."""
    prompts = column(str(row["prompt"]) for row in rows)
    points = np.array([POINTS[row["verdict"]] for row in rows])
    characters = np.array([len(row["response"]) - len(row["reference"]) for row in rows])
    tasks = column(row.get("task", "all") for row in rows)

    def part(of):
        weights = resample(prompts[of], args.num_bootstrap, rng, len(EXTRA))
        samples = at_equal_length(points[of], characters[of], weights)
        return with_intervals({"length_controlled": samples})

    result = part(tasks == tasks)
    if "perplexity_ref" in judged:  # evaluate.py draws for the KL here
        resample(prompts, args.num_bootstrap, rng)
    if len({*tasks}) > 1:
        result["tasks"] = {task: part(tasks == task) for task in sorted({*tasks})}
    texts = {k: [row[k] for row in rows] for k in SIDES}
    return result | {"diversity": {k: diversity(v) for k, v in texts.items()}}


def score_deltas(scores, rows, args):  # (2, rows)
    """Mean score of responses minus references, {difference, low, high}, overall and by set."""
    rng, delta = np.random.default_rng(args.seed), np.subtract(*scores)
    prompts, sets = (column(str(row[k]) for row in rows) for k in ("prompt", "set"))

    def part(of):
        samples = mean(resample(prompts[of], args.num_bootstrap, rng), delta[of])
        low, high = with_intervals({"delta": samples})["intervals"]["delta"]
        return {"difference": float(samples[0]), "low": low, "high": high}

    by_set = {label: part(sets == label) for label in dict.fromkeys(sets)}
    return {"overall": part(sets == sets), "sets": by_set}


def main(args: Args):
    check_bootstrap(args)
    folder, names = Path(args.winrate), run_names(args.scorers, (), "scorers")
    out, scores, deltas = Path(args.output_dir), [], {}
    refuse_finished(out / "answers.json", args, OWN)
    judged = read_json(folder / "winrate.json", "--winrate")
    fields = {"prompt": "prompt", "response": "text", "reference": "text", "set": "text"}
    rows = load_rows(f"{folder}/responses.jsonl", fields | {"verdict": "text"})
    try_scorers(args.scorers, args, "answers", rows, SIDES)
    for name, path in zip(names, args.scorers, strict=True):
        of_rows = Advantages(path, args, "answers")(rows, SIDES)
        if not np.isfinite(of_rows).all():
            raise InputError(f"--scorers {path}: gave a score that is no number")
        scores.append({"scorer": name} | dict(zip(SIDES, of_rows.tolist(), strict=True)))
        write_jsonl(out / "scorers.jsonl", scores)
        deltas[name] = score_deltas(of_rows, rows, args)
    backend.last_pass()
    rng, report = np.random.default_rng(args.seed), {}
    for label in dict.fromkeys(row["set"] for row in rows):
        of_set = [row for row in rows if row["set"] == label]
        entry = report[label] = describe(of_set, judged.get(label, {}), args, rng)
        numbers = entry["length_controlled"], *entry["intervals"]["length_controlled"]
        print("{}: length_controlled {:.4g} [{:.4g}, {:.4g}]".format(label, *numbers))
    report[OWN] = {"scorers": deltas, "args": asdict(args)} | environment()
    for name, delta in deltas.items():
        for k, v in ({"overall": delta["overall"]} | delta["sets"]).items():
            print("{}: {} {difference:+.4g} [{low:+.4g}, {high:+.4g}]".format(name, k, **v))
    write_json(out / "answers.json", report)
    for field in SIDES:
        alpaca = [
            {"dataset": row["set"], "instruction": as_text(row["prompt"]), "output": row[field]}
            for row in rows
        ]
        generator = {"generator": f"{folder.name} {field}"}
        write_json(out / f"alpaca_eval_{field}.json", [row | generator for row in alpaca])
    return report


if __name__ == "__main__":
    run_cli(main, Args, __doc__)
