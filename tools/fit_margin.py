"""Fit m(x) of Eq. 6 on held-out training pairs: one number, or one a task.

    python -m tools.fit_margin --model_name_or_path MODEL --dataset_name pairs.jsonl \\
        --output_dir runs/margin
    python am_train.py --loss am --am_margin runs/margin/margins.json ...

An advantage model is trained at every m of --margins on the prompts that --held_out leaves, and
judged by the NLL of the others, over all pairs ("default") and by task. A task with fewer than
--min_pairs held-out pairs keeps the default: its best m would be noise. It is one seed without a
standard error, and every task's m comes from runs in which all tasks had it: look at the NLL that
is printed, and do not believe differences of .001. docs/MARGIN.md says what m does, and when no m
is better than a temperature.
"""

from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import tyro

import am_train
from baselines.reward_losses import split_by_prompt
from utils import InputError, load_rows, run_cli, write_json, write_jsonl


@dataclass
class Args(am_train.Args):
    loss: tyro.conf.Suppress[str] = "am"
    am_margin: tyro.conf.Suppress[float] = 2.5  # the grid's, one after the other
    margins: tuple[float, ...] = (1.5, 2.5, 4.0, 6.0, 10.0)
    """the m to try (our choice C11)"""
    held_out: float = 0.15
    """share of the training prompts that judge, chosen by hash"""
    min_pairs: int = 100
    """held-out pairs that a task needs for an m of its own (our choice C11)"""


def best_margins(nll, tasks, min_pairs):  # {m: (pairs,)}, (pairs,)
    """{"default": m, task: m}: the m with the least mean NLL, over all pairs and over a task's."""
    tasks = np.array(tasks)
    groups = {"default": np.ones(len(tasks), dtype=bool)}
    for task in sorted(set(tasks)):
        if (tasks == task).sum() >= min_pairs:
            groups[str(task)] = tasks == task
    return {name: min(nll, key=lambda m: nll[m][group].mean()) for name, group in groups.items()}


def main(args: Args):
    if not args.margins or not all(m > 0 for m in args.margins) or not 0 < args.held_out < 1:
        wanted = "--margins must be positive numbers, --held_out must lie between 0 and 1"
        raise InputError(wanted)
    columns = {"prompt": "prompt", "chosen": "response", "rejected": "response"}
    rows = load_rows(args.dataset_name, columns, args.max_rows)
    train, held = split_by_prompt(rows, args.held_out)
    if not train or not held:
        problem = "leaves no pairs to train on or to judge by"
        raise InputError(f"--held_out {args.held_out}: {problem}")
    print(f"{len(train)} pairs to train on, {len(held)} to judge by")
    folder, nll = Path(args.output_dir), {}
    write_jsonl(folder / "train.jsonl", train)
    write_jsonl(folder / "held_out.jsonl", held)
    common = {f.name: getattr(args, f.name) for f in fields(am_train.Args)}
    common |= dict(loss="am", max_rows=0, dataset_name=str(folder / "train.jsonl"))
    common |= dict(eval_dataset_name=str(folder / "held_out.jsonl"))
    for m in args.margins:
        run = {"am_margin": m, "output_dir": str(folder / f"m_{m:g}")}
        chosen, rejected = am_train.main(replace(am_train.Args(**common), **run))
        nll[m] = np.logaddexp(0, rejected - chosen)
        print(f"m {m:g}: held-out NLL {nll[m].mean():.4f}")
    margins = best_margins(nll, [row.get("task", "all") for row in held], args.min_pairs)
    write_json(folder / "margins.json", margins)
    print(f"margins.json written to {folder}: {margins}")
    return margins


if __name__ == "__main__":
    run_cli(main, Args, __doc__)
