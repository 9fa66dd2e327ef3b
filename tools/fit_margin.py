"""Fit m(x) of Eq. 6 on held-out training pairs: one number, or one a task.

    python -m tools.fit_margin --model_name_or_path MODEL --dataset_name pairs.jsonl \\
        --output_dir runs/margin
    python am_train.py --loss am --am_margin runs/margin/margins.json ...

An advantage model is trained at every m of --margins on the prompts that --held_out leaves, and
judged by the NLL of the others, over all pairs ("default") and by task. A task with fewer than
--min_pairs held-out pairs keeps the default: its best m would be noise. It is one seed without a
standard error, and every task's m comes from runs in which all tasks had it: look at the NLL that
is printed, and do not believe differences of .001. docs/MARGIN.md says what m does, and when no m
is better than a temperature. A fit that was stopped goes on behind the last m that was judged.
"""

import shutil
import hashlib
import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import tyro

import am_train
from baselines.reward_losses import split_by_prompt
from tools.statistics import column, different_sides, read_json
from utils import Bound, InputError, environment, load_rows, refuse_finished, run_cli, write_json
from utils import write_jsonl


@dataclass
class Args(am_train.Args):
    loss: tyro.conf.Suppress[str] = "am"
    am_margin: tyro.conf.Suppress[float] = 2.5  # the grid's, one after the other
    margins: tuple[Bound, ...] = (1.5, 2.5, 4.0, 6.0, 10.0)
    """the m to try (our choice C11)"""
    held_out: float = 0.15
    """share of the training prompts that judge, chosen by hash"""
    min_pairs: int = 100
    """held-out pairs that a task needs for an m of its own (our choice C11)"""


def best_margins(nll, tasks, min_pairs):  # {m: (pairs,)}, (pairs,)
    """{"default": m, task: m}: the m with the least mean NLL, over all pairs and over a task's."""
    tasks = column(tasks)
    groups = {"default": np.ones(len(tasks), dtype=bool)}
    for task in sorted({*tasks} - {"default"}):  # a task of that name has the default
        if (tasks == task).sum() >= min_pairs:
            groups[task] = tasks == task
    return {name: min(nll, key=lambda m: nll[m][group].mean()) for name, group in groups.items()}


def held_out_nll(args, held, pairs):
    """-log p(chosen preferred) of the held-out pairs, (pairs,), by an advantage model trained with
    am_train's args, or as nll.json has it. pairs: names those that it is trained on."""
    path, now = Path(args.output_dir) / "nll.json", asdict(args) | {"resume": None}
    wanted = json.loads(json.dumps({"args": now | {"am_margin": str(args.am_margin)}}))
    wanted["pairs"] = pairs
    if path.is_file():
        saved = read_json(path, "--output_dir")
        if {k: saved.get(k) for k in wanted} == wanted:
            return np.array(saved["nll"])
        problem = "is of other flags or pairs; give another --output_dir, or remove the folder"
        raise InputError(f"{path}: {problem}")
    shutil.rmtree(args.output_dir, ignore_errors=True)  # what a killed run left
    chosen, rejected = am_train.main(args)
    nll = np.logaddexp(0, rejected - chosen)
    if len(nll) != len(held):
        problem = f"{len(held) - len(nll)} held-out pairs were left out in training"
        raise InputError(f"{args.output_dir}: {problem}; remove them or raise --max_length")
    write_json(path, wanted | {"nll": nll.tolist()})
    return nll


def main(args: Args):
    if not args.margins or not all(m > 0 for m in args.margins) or not 0 < args.held_out < 1:
        wanted = "--margins must be positive numbers, --held_out must lie between 0 and 1"
        raise InputError(wanted)
    columns = {"prompt": "prompt", "chosen": "response", "rejected": "response"}
    folder, nll = Path(args.output_dir), {}
    refuse_finished(folder / "fit.json", args)
    rows = load_rows(args.dataset_name, columns, args.max_rows)
    rows = different_sides(rows, args.dataset_name)
    train, held = split_by_prompt(rows, args.held_out)
    if not train or not held:
        problem = "leaves no pairs to train on or to judge by"
        raise InputError(f"--held_out {args.held_out}: {problem}")
    print(f"{len(train)} pairs to train on, {len(held)} to judge by")
    pairs = hashlib.sha256(json.dumps([train, held]).encode()).hexdigest()[:16]
    write_jsonl(folder / "train.jsonl", train)
    write_jsonl(folder / "held_out.jsonl", held)
    common = {f.name: getattr(args, f.name) for f in fields(am_train.Args)}
    common |= dict(loss="am", max_rows=0, dataset_name=str(folder / "train.jsonl"))
    common |= dict(eval_dataset_name=str(folder / "held_out.jsonl"))
    for m in args.margins:
        run = {"am_margin": m, "output_dir": str(folder / f"m_{m:g}")}
        nll[m] = held_out_nll(replace(am_train.Args(**common), **run), held, pairs)
        print(f"m {m:g}: held-out NLL {nll[m].mean():.4f}")
    margins = best_margins(nll, [row.get("task", "all") for row in held], args.min_pairs)
    write_json(folder / "margins.json", margins)
    means = {f"{m:g}": values.mean() for m, values in nll.items()}
    write_json(folder / "fit.json", {"nll": means, "args": asdict(args)} | environment())
    print(f"margins.json written to {folder}: {margins}")
    return margins


if __name__ == "__main__":
    run_cli(main, Args, __doc__)
