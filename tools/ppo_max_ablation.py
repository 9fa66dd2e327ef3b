"""Each stabiliser of PPO-max alone, and each left out, on the toy world: what each one buys.

    make reproduce && python -m tools.ppo_max_ablation --output_dir results/ppo_max

Rows: plain PPO (every switch off), PPO-max (its preset), and for every switch plain PPO with it and PPO-max without it; for
those that the preset leaves off, PPO-max with it. World, SFT model and reward model are the reproduction's; a seed repeats
PPO. Every run makes the same number of policy updates from the same number of responses; a critic that is trained first
gets its steps on top.
"""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from reproduce import SETTINGS, Job, Progress, die_with_parent, read_json, read_jsonl, run_jobs
from utils import InputError, environment, run_cli, write_json


@dataclass
class Args:
    output_dir: str
    """receives a folder a row and seed, ppo_max.json and ppo_max.md"""
    folder: str = "results/full/seed_1"
    """a finished seed of the reproduction, for its world, SFT model and scorer"""
    scorer: str = "rm"
    """folder in it whose model scores: rm or am"""
    seeds: tuple[int, ...] = (1, 2, 3)
    """seeds of PPO"""
    ppo_steps: int = 48
    """policy updates of a row, in batches of the small buffer"""
    rows: tuple[str, ...] = ()
    """rows to run, by their names in the table; all by default"""
    scale: str = "full"
    """`smoke` checks the machinery on the smoke reproduction's folder"""


INF = float("inf")
LARGE = 4  # times the small buffer
# switch: flags that turn it on, flags that turn it off; "buffer" and the paths are filled in by flags_of
PRESET = {
    "score normalisation": (
        dict(score_normalization="moving_average", moving_average_decay=1.0),
        dict(score_normalization="none"),
    ),
    "score clip 10": (dict(score_clip=10.0), dict(score_clip=INF)),
    "advantage normalisation": (dict(whiten_mini_batches=True), dict(whiten_mini_batches=False)),
    "ratio clip": (dict(cliprange=0.2), dict(cliprange=INF)),
    "value clip": (dict(cliprange_value=0.2), dict(cliprange_value=INF)),
    "critic from the scorer": (dict(critic_init="scorer"), dict(critic_init="policy")),
    "critic trained first": (dict(critic_warmup_steps=8), dict(critic_warmup_steps=0)),
    "KL in the reward": (dict(kl_coef=0.02), dict(kl_coef=0.0)),
    "ptx": (dict(ptx_dataset_name="sft.jsonl"), dict(ptx_dataset_name=None)),
    "gradient clip": (dict(max_grad_norm=1.0), dict(max_grad_norm=INF)),
    "small buffer": (dict(buffer=1), dict(buffer=LARGE)),
}
BESIDE = {  # off in the preset
    "KL in the loss, k2": dict(kl_coef=0.02, kl_estimator="k2"),
    "KL in the loss, k3": dict(kl_coef=0.02, kl_estimator="k3"),
    "adaptive KL in the reward": dict(kl_coef=0.02, kl_target=1.0, kl_horizon=1000),
    "entropy bonus": dict(entropy_coef=0.01),
    "advantage clip 0.5": dict(advantage_clip=0.5),
}
MAX = {flag: value for on, _ in PRESET.values() for flag, value in on.items()}
PLAIN = {flag: value for _, off in PRESET.values() for flag, value in off.items()}
ROWS = {"plain PPO": PLAIN, "PPO-max": MAX}
ROWS |= {f"plain + {name}": PLAIN | on for name, (on, _) in PRESET.items()}
ROWS |= {f"PPO-max - {name}": MAX | off for name, (_, off) in PRESET.items()}
ROWS |= {f"plain + {name}": PLAIN | on for name, on in BESIDE.items()}
ROWS |= {f"PPO-max + {name}": MAX | on for name, on in BESIDE.items()}


def run_name(row, seed):
    return (
        f"ppo_{row.replace(' + ', '_with_').replace(' - ', '_without_').replace(',', '').replace(' ', '_')}_seed{seed}"
    )


def flags_of(row, args, s):
    """ppo_max.py's flags of a row: a buffer of n times the size has n times the mini-batches and 1/n of the steps."""
    flags, world = dict(ROWS[row]), Path(args.folder).resolve() / "world"
    n, batch = flags.pop("buffer"), s["ppo"]["global_batch_size"]
    if flags["ptx_dataset_name"]:
        flags["ptx_dataset_name"] = str(world / flags["ptx_dataset_name"])
    warmup = min(flags["critic_warmup_steps"], args.ppo_steps) // n
    steps = args.ppo_steps // n + warmup
    flags |= dict(critic_warmup_steps=warmup, total_steps=steps, eval_steps=max(1, steps // 4))
    flags |= dict(global_batch_size=n * batch, num_mini_batches=4 * n, num_ppo_epochs=1)
    return {k: v for k, v in s["ppo"].items() if k not in flags} | flags


def jobs_of(args, s):
    folder, base = Path(args.output_dir).resolve(), Path(args.folder).resolve()
    paths = dict(model_name_or_path=str(base / "sft" / "model"), reward_model_path=str(base / args.scorer / "model"))
    paths |= dict(dataset_name=str(base / "world" / "prompts_train.jsonl"))
    paths |= dict(
        eval_dataset_names=[str(base / "world" / f"prompts_test_{kind}.jsonl") for kind in ("main", "forget")]
    )
    jobs = []
    for seed in args.seeds:
        for row in args.rows or ROWS:
            flags = flags_of(row, args, s) | paths | dict(output_dir=str(folder / run_name(row, seed)), seed=seed)
            steps = flags["total_steps"] + 1
            jobs.append(Job("ppo", folder / run_name(row, seed), (), "ppo_max:main", flags, steps))
    return jobs


COLUMNS = {  # of the last line of metrics.jsonl: name in the table, digits
    "eval/prompts_test_main/gold": ("gold, main", 2),
    "eval/prompts_test_forget/gold": ("gold, forget", 2),
    "eval/prompts_test_main/delta_score": ("score gained, main", 2),
    "eval/prompts_test_main/kl": ("KL, main", 2),
    "eval/prompts_test_main/length": ("length, main", 1),
    "policy/perplexity": ("perplexity", 2),
    "val/explained_variance": ("explained variance", 2),
}


def collect(args):
    """{row: {metric: [value of each seed]}}"""
    folder, table = Path(args.output_dir), {}
    for row in args.rows or ROWS:
        last = [read_jsonl(folder / run_name(row, seed) / "metrics.jsonl")[-1] for seed in args.seeds]
        table[row] = {metric: [line[metric] for line in last] for metric in COLUMNS}
    return table


def markdown(table):
    names = [name for name, _ in COLUMNS.values()]
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for row, values in table.items():
        cells = []
        for metric, (_, d) in COLUMNS.items():
            low, high = min(values[metric]), max(values[metric])
            cells.append(f"{np.mean(values[metric]):z.{d}f} ({low:z.{d}f} to {high:z.{d}f})")
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(args: Args):
    if args.scale not in SETTINGS:
        raise InputError(f"--scale {args.scale}: is one of {', '.join(SETTINGS)}")
    if unknown := [row for row in args.rows if row not in ROWS]:
        raise InputError(f"--rows {unknown[0]}: is one of {'; '.join(ROWS)}")
    if args.ppo_steps < LARGE or args.ppo_steps % LARGE:
        raise InputError(f"--ppo_steps {args.ppo_steps}: must be a multiple of {LARGE}, the large buffer's size")
    for needed in ("sft", args.scorer):
        if not (Path(args.folder) / needed / "model").is_dir():
            raise InputError(f"--folder {args.folder}: holds no {needed}/model; run make reproduce first")
    jobs = jobs_of(args, SETTINGS[args.scale])
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn"), die_with_parent) as pool:
        run_jobs(jobs, pool, Progress(jobs, 0.6))
    seconds = [read_json(job.folder / "done.json")["seconds"] for job in jobs]
    table = collect(args)
    found = {"args": vars(args), "rows": table, "seconds": seconds}
    write_json(Path(args.output_dir) / "ppo_max.json", found | environment())
    (Path(args.output_dir) / "ppo_max.md").write_text(markdown(table), encoding="utf-8")
    print(markdown(table))


if __name__ == "__main__":
    run_cli(main, Args, __doc__)
