"""Kill a training script at random moments, resume it, and compare with a run that never stopped.

    OMP_NUM_THREADS=1 python -m tests.random_kills --folder results/smoke/seed_1 --kills 20

The folder is a seed of `make reproduce SCALE=smoke`. Each run is a fork of this process that has
imported everything; it gets SIGKILL at a random moment between its first row of metrics and its
end, and then goes on with --resume True to the last step. Metrics, samples and weights must be
those of the whole run, bit for bit.
"""

import os
import random
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file

import am_train
import ppo_sr
from tests.test_ppo_sr import lines_of
from utils import run_cli


@dataclass
class Args:
    folder: Path
    """a finished seed of the smoke reproduction"""
    kills: int = 20
    """of each script"""
    seed: int = 0
    """of the moments"""


def runs(folder):
    """{script: (main, its flags)}: small runs in which every piece of state matters."""
    sft, am, world = (str(folder / name) for name in ("sft/model", "am/model", "world"))
    pairs = str(folder / "preferences_train" / "preferences_train.jsonl")
    scorer = am_train.Args(sft, pairs, "", eval_dataset_name=pairs, eval_steps=7, save_steps=3)
    scorer = replace(scorer, num_train_epochs=2, global_batch_size=24, expected_reward="regress", max_length=64)
    tests = tuple(f"{world}/prompts_test_{name}.jsonl" for name in ("main", "forget"))
    ppo = ppo_sr.Args(sft, f"{world}/prompts_train.jsonl", "", reward_model_path=am, save_steps=2)
    ppo = replace(ppo, rehearsal_dataset_name=str(folder / "select_main" / "rehearsal.jsonl"), total_steps=10)
    ppo = replace(ppo, eval_dataset_names=tests, max_eval_prompts=12, eval_steps=3, moving_average_decay=0.9)
    ppo = replace(ppo, global_batch_size=16, num_mini_batches=2, critic_warmup_steps=2, learning_rate=1e-4)
    ppo = replace(ppo, response_length=24, max_length=64, critic_learning_rate=1e-4)
    return {"am_train": (am_train.main, scorer), "ppo_sr": (ppo_sr.main, ppo)}


def start(main, args):
    """A fork that runs main(args) -> its process id."""
    child = os.fork()
    if child == 0:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        main(args)
        os._exit(0)
    return child


def finished(child):
    return os.waitpid(child, 0)[1] == 0


def content(folder):
    files = [path for path in sorted(folder.glob("*.jsonl"))]
    return {path.name: lines_of(path) for path in files}, load_file(folder / "model" / "model.safetensors")


def main(args: Args):
    torch.set_num_threads(1)
    moments = random.Random(args.seed)
    for script, (run, flags) in runs(args.folder).items():
        folder = Path(tempfile.mkdtemp(prefix=script))
        began = time.time()
        assert finished(start(run, replace(flags, output_dir=str(folder / "whole"))))
        seconds, equal, at = time.time() - began, 0, []
        rows, weights = content(folder / "whole")
        for kill in range(args.kills):
            flags = replace(flags, output_dir=str(folder / f"killed_{kill}"), resume=False)
            child, metrics = start(run, flags), folder / f"killed_{kill}" / "metrics.jsonl"
            while not (metrics.is_file() and metrics.stat().st_size):
                time.sleep(0.001)
            time.sleep(moments.uniform(0, 0.8 * seconds))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            at.append(metrics.read_text().count("\n"))
            assert finished(start(run, replace(flags, resume=True)))
            again, moved = content(Path(flags.output_dir))
            same = again == rows and all(torch.equal(moved[k], v) for k, v in weights.items())
            equal += same
            shutil.rmtree(flags.output_dir)
        print(f"{script}: {equal} of {args.kills} killed runs end bit-equal; rows when killed: {at}")
        if equal < args.kills:
            sys.exit(1)


if __name__ == "__main__":
    run_cli(main, Args, __doc__)
