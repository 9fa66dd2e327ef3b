"""Ratings of several policies from pairwise verdicts: one scale, as in chess.

    P(a beats b) = 1 / (1 + 10^((R_b - R_a) / 400))          Bradley-Terry in Elo's units

    python -m tools.elo --games runs/winrate_rm_ppo runs/winrate_am_ppo --output_file runs/elo.json

The R of highest likelihood over all games at once; a tie is half a win, the mean of all R is 1000.
Elo's own update goes game by game, so its ratings depend on their order. Every two that met get one
tie more, or who never lost would have no finite rating. tools/compare.py gives intervals.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tools.statistics import OWN, judge_name, read_json
from utils import InputError, in_one_line, load_rows, run_cli, write_json

POINTS = {"win": 1.0, "tie": 0.5, "lose": 0.0}


@dataclass
class Args:
    games: tuple[str, ...]
    """folders of `evaluate.py winrate`, or JSON files [[a, b, "win", "tie" or "lose" of a], ...]"""
    output_file: str | None = None
    """a JSON file for {name: rating}"""


def ratings(games):
    """[(a, b, points of a)] -> {name: R}, R = 1000 + 400 log10 s, at the fixed point
    s_i = wins_i / sum_j n_ij / (s_i + s_j)  (Zermelo 1929; Hunter 2004)."""
    names = sorted({name for a, b, _ in games for name in (a, b)})
    place, wins = {name: i for i, name in enumerate(names)}, np.zeros((len(names),) * 2)
    for a, b, points in games:
        wins[place[a], place[b]] += points
        wins[place[b], place[a]] += 1 - points
    met = (wins + wins.T) > 0
    if not np.linalg.matrix_power(met | np.eye(len(names), dtype=bool), len(names)).all():
        raise InputError("--games: some never met, not even through others: no common scale")
    wins, strength = wins + met / 2, np.ones(len(names))
    for _ in range(100_000):
        before, met_at = strength, (wins + wins.T) / (strength[:, None] + strength)
        strength = wins.sum(1) / met_at.sum(1)
        strength = strength / np.exp(np.log(strength).mean())
        if np.abs(np.log(strength / before)).max() < 1e-10:
            break
    return dict(zip(names, (1000 + 400 * np.log10(strength)).tolist(), strict=True))


def load_games(path):
    if not Path(path).is_dir():
        with in_one_line(f"--games {path}: no winrate folder, nor JSON [[a, b, verdict], ...]"):
            return [(a, b, POINTS[v]) for a, b, v in json.loads(Path(path).read_text("utf-8"))]
    args = read_json(f"{path}/winrate.json", "--games")[OWN]["args"]
    a, b = args["policy"] or path, args["reference"] or "reference"
    rows = load_rows(f"{path}/responses.jsonl", {"verdict": "text"})
    return [(a, b, POINTS[row["verdict"]]) for row in rows]


def main(args: Args):
    folders = [path for path in args.games if Path(path).is_dir()]
    if len(judges := {judge_name(folder, "--games") for folder in folders}) > 1:
        said = ", ".join(sorted(map(str, judges)))
        raise InputError(f"--games: verdicts of {len(judges)} judges ({said})")
    games = [game for path in args.games for game in load_games(path)]
    if any(a == b for a, b, _ in games) or not games:
        raise InputError("--games: a game needs two names that differ")
    found = dict(sorted(ratings(games).items(), key=lambda item: -item[1]))
    for name, rating in found.items():
        print(f"{rating:7.0f}  {name}")
    if args.output_file:
        write_json(args.output_file, found)
    return found


if __name__ == "__main__":
    run_cli(main, Args, __doc__)
