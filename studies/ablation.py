"""The first table of docs/results/choices.md: the bound, e and the sum of Eq. 8, through PPO.

    make reproduce && python -m studies.ablation --output_dir results/ablation

Cells: bound off or on, times e none, joint or regress, times K = 0 or 3. All share one SFT model,
the reproduction's, and one data set: rankings of three policies (an early SFT checkpoint, the SFT
model, the SFT model at temperature 1.4) with their log-probs. A seed repeats scorer and PPO. K = 3
takes one response of each policy, weighs it by pi_phi / pi'_k with pi_phi the SFT model, and has
N = 6 (N = 3 without an e head).

Off the bound nothing but a_c - a_r is trained, in which e and the sum of Eq. 8 cancel. Every cell
without it and without `regress` is then the reward model of Eq. 1 (tests/test_ablation.py), so that
one stands for all four.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from miniature.jobs import Job, check_folder, read_json, read_jsonl, run_jobs
from miniature.reproduce import SETTINGS, ppo_inputs
from miniature.tables import table_of_seeds, write_study
from utils import run_cli


@dataclass
class Args:
    output_dir: str
    """receives a folder a cell and seed, ablation.json and ablation.md"""
    folder: str = "results/full/seed_1"
    """a finished seed of the reproduction, for its world and SFT model"""
    seeds: tuple[int, ...] = (1, 2, 3)
    """seeds of scorer and PPO"""
    ppo_steps: int = 30
    """PPO updates of a cell"""
    prompts_per_task: int = 60
    """prompts of each task that are ranked, for the scorers to learn from"""
    scale: Literal["full", "smoke"] = "full"
    """`smoke` checks the machinery on the smoke reproduction's folder"""


CELLS = {
    f"bound {'on' if bound else 'off'}, e {e}, K = {k}": (bound, e, k)
    for bound, e, k in itertools.product((False, True), ("none", "joint", "regress"), (0, 3))
    if bound or e == "regress" or (e, k) == ("none", 0)
}
COLUMNS = {name: (name, 2) for name in ("accuracy", "ece")}
COLUMNS |= {"brier": ("brier", 4), "nll": ("nll", 4), "spread": ("spread", 3)}
COLUMNS |= {"normalised_spread": ("normalised_spread", 2)}
COLUMNS |= {f"eval/prompts_test_{k}/gold": (f"gold, {k}", 2) for k in ("main", "forget")}
COLUMNS |= {"kl": ("kl", 2)}


def run_name(cell, seed):
    return f"{cell.replace(' = ', '').replace(', ', '_').replace(' ', '_')}_seed{seed}"


def scorer_flags(bound, e, k):
    """am_train.py's flags of a cell."""
    if (bound, e, k) == (False, "none", 0):
        return dict(loss="rm")
    flags = dict(loss="am", expected_reward=e) | ({} if bound else dict(am_margin=float("inf")))
    return flags | (dict(num_alternates=k, num_policies=k if e == "none" else 2 * k) if k else {})


def jobs_of(args, s):
    folder, base = Path(args.output_dir).resolve(), Path(args.folder).resolve()
    world, early = base / "world", str(folder / "early" / "model")
    inputs = ppo_inputs(base, "rm")
    sft = inputs["model_name_or_path"]

    def job(name, script, needs, seed=1, **flags):
        flags |= dict(output_dir=str(folder / name), seed=seed)
        return Job(folder / name, script, flags, needs)

    def pairs(split):
        return str(folder / f"preferences_{split}" / f"preferences_{split}.jsonl")

    def preferences(split):
        flags = s[f"{split}_preferences"] | dict(rankings_per_prompt=1)
        if args.scale == "full" and split == "train":
            flags |= dict(prompts_per_task=args.prompts_per_task)
        flags |= dict(policies=(early, sft, f"{sft}@1.4"), split=split)
        return job(f"preferences_{split}", "miniature.world", ("early",), **flags)

    early_flags = s["sft"] | dict(dataset_name=str(world / "sft.jsonl"), num_train_epochs=1)
    early_flags |= dict(tokenizer_name_or_path=str(world / "tokenizer"))
    scored = str(folder / "logprobs" / "pairs.jsonl")
    logprobs = dict(dataset_name=pairs("train"), output_path=scored, current_policy=sft)
    logprobs |= dict(policies=(f"early@1={early}", f"sft@1={sft}", f"sft@1.4={sft}@1.4"))
    jobs = [
        job("early", "sft", (), **early_flags),
        preferences("train"),
        preferences("test"),
        Job(folder / "logprobs", "tools.write_logprobs", logprobs, ("preferences_train",)),
    ]
    for seed in args.seeds:
        names = {cell: run_name(cell, seed) for cell in CELLS}
        for cell, name in names.items():
            flags = s["scorer"] | dict(model_name_or_path=sft, dataset_name=scored)
            flags |= scorer_flags(*CELLS[cell])
            jobs.append(job(name, "am_train", ("logprobs",), seed, **flags))
        models = {name: str(folder / name / "model") for name in names.values()}
        flags = dict(scorers=tuple(models.values()), names=tuple(CELLS), num_bootstrap=200)
        flags |= dict(dataset_name=pairs("test"), max_length=64)
        needs = ("preferences_test", *models)
        jobs.append(job(f"calibration_seed{seed}", "evaluate:Calibration", needs, seed, **flags))
        for name, model in models.items():
            flags = s["ppo"] | inputs | dict(reward_model_path=model)
            flags |= dict(total_steps=args.ppo_steps, eval_steps=args.ppo_steps)
            jobs.append(job(f"ppo_{name}", "ppo_sr", (name,), seed, **flags))
    return jobs


def collect(args):
    """{cell: {metric: [value of each seed]}}"""
    folder, table = Path(args.output_dir), {cell: {} for cell in CELLS}
    for seed in args.seeds:
        scorers = read_json(folder / f"calibration_seed{seed}" / "calibration.json")["scorers"]
        for cell in CELLS:
            values = {k: scorers[cell][k] for k in ("accuracy", "ece", "brier", "nll", "score_std")}
            balance = scorers[cell]["balance"]
            spread = balance["spread_of_means"]
            values |= {"spread": spread, "normalised_spread": spread / balance["mean_within_std"]}
            last = read_jsonl(folder / f"ppo_{run_name(cell, seed)}" / "metrics.jsonl")[-1]
            values |= {k: last[k] for k in COLUMNS if k.startswith("eval/")}
            values |= {"kl": last["objective/kl"]}
            for k, v in values.items():
                table[cell].setdefault(k, []).append(v)
    return table


def main(args: Args):
    check_folder(args.folder, "sft")
    run_jobs(jobs_of(args, SETTINGS[args.scale]))
    table = collect(args)
    found = {"args": vars(args), "cells": table}
    write_study(Path(args.output_dir), "ablation", found, table_of_seeds(table, COLUMNS))


if __name__ == "__main__":
    run_cli(main, Args, __doc__)
