"""Each stabiliser of PPO-max alone, and each left out, on the toy world: what each one buys.

    make reproduce && python -m studies.ppo_max --output_dir results/ppo_max

Rows: plain PPO (every switch off), PPO-max (its preset), and for every switch plain PPO with it and
PPO-max without it; for those that the preset leaves off, PPO-max with it. World, SFT model and
reward model are the reproduction's; a seed repeats PPO. Every run makes the same number of
policy updates from the same number of responses. A critic that is trained first gets its steps on
top.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from miniature.jobs import Job, check_folder, read_json, read_jsonl, run_jobs
from miniature.reproduce import SETTINGS, ppo_inputs
from miniature.tables import table_of_seeds, write_study
from utils import InputError, run_cli


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
    scale: Literal["full", "smoke"] = "full"
    """`smoke` checks the machinery on the smoke reproduction's folder"""


INF = float("inf")
LARGE = 4  # times the small buffer
PRESET = {  # switch: a flag, on, off; "buffer" and the path of ptx are worked out in flags_of
    "score normalisation": ("moving_average_decay", 1.0, None),
    "score clip 10": ("score_clip", 10.0, INF),
    "advantage normalisation": ("whiten_mini_batches", True, False),
    "ratio clip": ("cliprange", 0.2, INF),
    "value clip": ("cliprange_value", 0.2, INF),
    "critic from the scorer": ("critic_init", "scorer", "policy"),
    "critic trained first": ("critic_warmup_steps", 8, 0),
    "KL in the reward": ("kl_coef", 0.02, 0.0),
    "ptx": ("ptx_dataset_name", "sft.jsonl", None),
    "gradient clip": ("max_grad_norm", 1.0, INF),
    "small buffer": ("buffer", 1, LARGE),
}
BESIDE = {  # off in the preset
    "KL in the loss, k2": dict(kl_coef=0.02, kl_estimator="k2"),
    "KL in the loss, k3": dict(kl_coef=0.02, kl_estimator="k3"),
    "adaptive KL in the reward": dict(kl_coef=0.02, kl_target=1.0, kl_horizon=1000),
    "entropy bonus": dict(entropy_coef=0.01),
    "advantage clip 0.5": dict(advantage_clip=0.5),
}
MAX = {flag: on for flag, on, _ in PRESET.values()}
PLAIN = {flag: off for flag, _, off in PRESET.values()}
ROWS = {"plain PPO": PLAIN, "PPO-max": MAX}
ROWS |= {f"plain + {name}": PLAIN | {flag: on} for name, (flag, on, _) in PRESET.items()}
ROWS |= {f"PPO-max - {name}": MAX | {flag: off} for name, (flag, _, off) in PRESET.items()}
ROWS |= {f"plain + {name}": PLAIN | on for name, on in BESIDE.items()}
ROWS |= {f"PPO-max + {name}": MAX | on for name, on in BESIDE.items()}
COLUMNS = {  # of the last line of metrics.jsonl: title in the table, digits
    "eval/prompts_test_main/gold": ("gold, main", 2),
    "eval/prompts_test_forget/gold": ("gold, forget", 2),
    "eval/prompts_test_main/delta_score": ("score gained, main", 2),
    "eval/prompts_test_main/kl": ("KL, main", 2),
    "eval/prompts_test_main/length": ("length, main", 1),
    "policy/perplexity": ("perplexity", 2),
    "val/explained_variance": ("explained variance", 2),
}


def run_name(row, seed):
    name = row.replace(" + ", "_with_").replace(" - ", "_without_").replace(",", "")
    return f"ppo_{name.replace(' ', '_')}_seed{seed}"


def flags_of(row, args, s):
    """ppo_max.py's flags of a row: a buffer of n times the size has 1 / n of the steps."""
    flags, world = dict(ROWS[row]), Path(args.folder).resolve() / "world"
    n, batch = flags.pop("buffer"), s["ppo"]["global_batch_size"]
    if flags["ptx_dataset_name"]:
        flags["ptx_dataset_name"] = str(world / flags["ptx_dataset_name"])
    warmup = min(flags["critic_warmup_steps"], args.ppo_steps) // n
    steps = args.ppo_steps // n + warmup
    flags |= dict(critic_warmup_steps=warmup, total_steps=steps, eval_steps=max(1, steps // 4))
    flags |= dict(global_batch_size=n * batch, num_mini_batches=4 * n, num_ppo_epochs=1)
    return s["ppo"] | flags


def jobs_of(args, s):
    folder = Path(args.output_dir).resolve()
    inputs, jobs = ppo_inputs(Path(args.folder).resolve(), args.scorer), []
    for seed in args.seeds:
        for row in args.rows or ROWS:
            run = folder / run_name(row, seed)
            flags = flags_of(row, args, s) | inputs | dict(output_dir=str(run), seed=seed)
            jobs.append(Job(run, "baselines.ppo_max", flags))
    return jobs


def collect(args):
    """{row: {metric: [value of each seed]}}"""
    folder, table = Path(args.output_dir), {}
    for row in args.rows or ROWS:
        runs = [folder / run_name(row, seed) / "metrics.jsonl" for seed in args.seeds]
        last = [read_jsonl(run)[-1] for run in runs]
        table[row] = {metric: [line[metric] for line in last] for metric in COLUMNS}
    return table


def main(args: Args):
    if unknown := [row for row in args.rows if row not in ROWS]:
        raise InputError(f"--rows {unknown[0]}: is one of {'; '.join(ROWS)}")
    if args.ppo_steps < LARGE or args.ppo_steps % LARGE:
        problem = f"must be a multiple of {LARGE}, the large buffer's size"
        raise InputError(f"--ppo_steps {args.ppo_steps}: {problem}")
    check_folder(args.folder, "sft", args.scorer)
    jobs = jobs_of(args, SETTINGS[args.scale])
    run_jobs(jobs)
    table = collect(args)
    seconds = [read_json(job.folder / "done.json")["seconds"] for job in jobs]
    found = {"args": vars(args), "rows": table, "seconds": seconds}
    write_study(Path(args.output_dir), "ppo_max", found, table_of_seeds(table, COLUMNS))


if __name__ == "__main__":
    run_cli(main, Args, __doc__)
