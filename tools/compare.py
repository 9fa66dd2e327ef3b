"""win - lose of several policies, paired by prompt: which one wins more against the SFT policy?

    python -m tools.compare --winrates runs/winrate_rm_ppo runs/winrate_am_ppo \\
        --output_dir runs/compare                                                        # seconds

The folders are those of `evaluate.py winrate` with the same prompts, reference answers and judge.
Policies that answer the same prompts succeed and fail together, so the interval of their difference
is narrower than two intervals side by side would say.
"""

from dataclasses import asdict, dataclass
import numpy as np

from tools.statistics import EXTRA, POINTS, check_bootstrap, judge_name, mean
from tools.statistics import resample, run_names, win_lose_tie, with_intervals
from utils import InputError, environment, load_rows, refuse_finished, run_cli, write_json


@dataclass
class Args:
    winrates: tuple[str, ...]
    """output folders of `evaluate.py winrate`, one a policy"""
    output_dir: str
    """receives compare.json"""
    names: tuple[str, ...] = ()
    """a name for each folder; the folder's own by default"""
    num_bootstrap: int = 1000
    """resamples of the prompts behind every interval"""
    seed: int = 1
    """seed of the bootstrap"""


def net_difference(points, others, weights):
    """(win - lose) of one policy minus that of another, in points of percent -> samples."""
    return 100 * mean(weights, np.append(points - others, EXTRA))


def load_arms(winrates, names):
    """{name: rows} of folders that can be paired, and the name of their judge."""
    arms, (first, *_) = {}, winrates
    fields = {"prompt": "prompt", "reference": "text", "set": "text", "verdict": "text"}
    for name, folder in zip(names, winrates, strict=True):
        judge = judge_name(folder, "--winrates")
        if not arms:
            first_judge = judge
        elif judge != first_judge:
            said = f"{first} was judged by {first_judge}, {folder} by {judge}"
            raise InputError(f"--winrates: {said}; judge both by one (winrate --responses)")
        arms[name] = rows = load_rows(f"{folder}/responses.jsonl", fields)
        for i, (row, other) in enumerate(zip(rows, arms[names[0]], strict=False), 1):
            if different := [k for k in ("set", "prompt", "reference") if row[k] != other[k]]:
                where = f"'{different[0]}' (responses.jsonl, line {i})"
                remedy = "answer the same prompts with the same --reference and --seed"
                raise InputError(f"--winrates: {first} and {folder} differ in {where}; {remedy}")
        if len(rows) != len(arms[names[0]]):
            counted = f"{first} has {len(arms[names[0]])} answers, {folder} {len(rows)}"
            raise InputError(f"--winrates: {counted}")
    return arms, first_judge


def main(args: Args):
    check_bootstrap(args)
    if len(args.winrates) < 2:
        raise InputError("--winrates: give two folders or more")
    names, path = (
        run_names(args.winrates, args.names, "winrates"),
        f"{args.output_dir}/compare.json",
    )
    refuse_finished(path, args)
    arms, judge = load_arms(args.winrates, names)
    rng, report = np.random.default_rng(args.seed), {"judge": judge, "sets": {}}
    for label in dict.fromkeys(row["set"] for row in arms[names[0]]):
        of_set = {k: [row for row in rows if row["set"] == label] for k, rows in arms.items()}
        points = {k: np.array([POINTS[r["verdict"]] for r in rows]) for k, rows in of_set.items()}
        prompts = [str(row["prompt"]) for row in of_set[names[0]]]
        weights = resample(prompts, args.num_bootstrap, rng, len(EXTRA))
        differences = {
            f"{name} - {other}": net_difference(points[name], points[other], weights)
            for i, name in enumerate(names)
            for other in names[:i]
        }
        entry = {"prompts": len({*prompts}), "win - lose": with_intervals(differences)}
        entry["arms"] = {k: win_lose_tie(v, 0 * v, 0) for k, v in points.items()}
        report["sets"][label] = entry
        for pair, (low, high) in entry["win - lose"]["intervals"].items():
            print(f"{label}: {pair}: {differences[pair][0]:+.1f} [{low:+.1f}, {high:+.1f}]")
    write_json(path, report | {"args": asdict(args)} | environment())
    return report


if __name__ == "__main__":
    run_cli(main, Args, __doc__)
