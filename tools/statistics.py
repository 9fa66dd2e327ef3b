"""What several tools share: verdicts, bootstrap intervals, names of runs, a calibration's files.

Arrays are (rows,), a row one answered prompt or one labelled pair. Samples are
(1 + num_bootstrap,): the first is the value of the data, the others are of resamples. Points are a
verdict's: 1 win, 0 tie, -1 lose. evaluate.py has four of these functions, too, and a test says so.
"""

import json
from pathlib import Path

import numpy as np

from utils import InputError, load_rows

POINTS = {"win": 1, "lose": -1, "tie": 0}
EXTRA = np.array([1, 0, -1])  # the points of the extra prompts: see resample
OWN = "evaluate.py"  # key in winrate.json of what is no set: those have no dot in their names


def numbered(texts):
    """A number for each text, equal ones alike, and how many there are.

    (An array of texts, as np.unique makes it, takes the longest one's room for every row.)
    """
    number = {text: n for n, text in enumerate(sorted({*texts}))}
    return np.array([number[text] for text in texts]), len(number)


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


def mean(weights, values):
    """Weighted mean of values (rows,) -> samples."""
    return weights @ values / weights.sum(1)


def with_intervals(samples):
    """{name: (1 + num_bootstrap,)} -> {name: value, "intervals": {name: [low, high]}}, 95 %."""
    bounds = {k: np.percentile(v[1:], [2.5, 97.5]).tolist() for k, v in samples.items()}
    return {k: float(v[0]) for k, v in samples.items()} | {"intervals": bounds}


def win_lose_tie(scores, reference_scores, tie_band):  # (prompts,), (prompts,)
    """Percent of prompts where the policy's answer is better, worse or within the tie band."""
    difference = np.asarray(scores) - np.asarray(reference_scores)
    points = np.sign(difference) * (np.abs(difference) > tie_band)
    return {k: 100 * float((points == v).mean()) for k, v in POINTS.items()}


def run_names(paths, names, flag):
    """A name for each of `paths`: those of --names, or of the run folders, each once."""
    folders = [Path(path).parent if Path(path).name == "model" else Path(path) for path in paths]
    names = names or tuple(folder.name for folder in folders)
    if len(names) != len(paths):
        raise InputError(f"--names: {len(names)} names for {len(paths)} {flag}")
    if len(set(names)) < len(names):
        raise InputError(f"--names: two of the {flag} have equal names; give one for each")
    return names


def check_bootstrap(args):
    if args.num_bootstrap < 1:
        raise InputError("--num_bootstrap: must be positive")


def read_json(path, flag):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{flag} {path}: cannot be read as JSON ({error})") from None


def column(values):
    """An array of texts to compare with ==, as large as they are and no larger."""
    return np.array([*values], dtype=object)


def judge_name(folder, flag):
    """The judge of a folder of `evaluate.py winrate`; earlier ones had it beside the sets."""
    report = read_json(f"{folder}/winrate.json", flag)
    return report.get(OWN, report).get("judge", {}).get("name")


def different_sides(rows, name):
    """The pairs with two different responses: equal ones carry no preference. Counted in a line."""
    kept = [row for row in rows if row["chosen"] != row["rejected"]]
    said = f"{name}: {len(rows) - len(kept)} of {len(rows)} pairs have equal sides"
    if not kept:
        raise InputError(said)
    if len(kept) < len(rows):
        print(f"{said}, and are left out")
    return kept


def load_calibration(folder):
    """Of `evaluate.py calibration`: calibration.json, {scorer: chosen and rejected scores
    (2, pairs)} and the rows of the pairs."""
    report, scores = read_json(f"{folder}/calibration.json", "--calibration"), {}
    for line in Path(folder, "scores.jsonl").read_text(encoding="utf-8").rstrip("\n").split("\n"):
        of_scorer = json.loads(line)
        both = np.array([of_scorer["chosen"], of_scorer["rejected"]])
        scores[of_scorer["scorer"]] = np.delete(both, report.get("left_out", []), 1)
    name, fields = report["args"]["dataset_name"], {"chosen": "response", "rejected": "response"}
    rows = load_rows(name, {"prompt": "prompt"} | fields)
    kept = sorted({*range(len(rows))} - {*report.get("left_out", ())})  # pairs of equal sides
    rows = [rows[i] for i in kept]
    if len(rows) != report["pairs"]:
        problem = f"has {len(rows):,} pairs, the calibration {report['pairs']:,}"
        raise InputError(f"{name}: {problem}; run evaluate.py calibration again")
    known = {scorer: of_scorer.shape[1] for scorer, of_scorer in scores.items()}
    if known != dict.fromkeys(report["scorers"], report["pairs"]):  # another one was stopped
        problem = "not the scores of calibration.json; run evaluate.py calibration again"
        raise InputError(f"{folder}/scores.jsonl: {problem}")
    return report, scores, rows
