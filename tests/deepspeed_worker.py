"""One of the processes that tests/test_deepspeed.py has torchrun start: it runs a list of jobs in one process group.

    torchrun --nproc_per_node 2 -m tests.deepspeed_worker jobs.json

A job: {script, args, fixed: responses that do not depend on the sampler, stop: the step after which the run breaks off}.
"""

import importlib
import json
import os
import sys
import time
from pathlib import Path

import torch

import engines
import ppo_sr
import utils


class Stopped(Exception):
    pass


def fixed_responses(model, tokenizer, prompts, *sampling, draw=None):
    """1 to 6 random tokens a prompt, two thirds with <eos>: the same in every process that asks as often."""
    responses = []
    for i in range(len(prompts)):
        ids = torch.randint(
            3, len(tokenizer), (1 + int(torch.randint(6, (), generator=draw)),), generator=draw
        ).tolist()
        responses.append([*ids[:-1], tokenizer.eos_token_id] if i % 3 else ids)
    return responses


def run(script, args, fixed=False, stop=None):
    """main(args) of a script -> its metrics, without the clock; None where it was stopped."""
    module, draw = importlib.import_module(script), torch.Generator().manual_seed(5)
    args = module.Args(**{k: tuple(v) if isinstance(v, list) else v for k, v in args.items()})
    if engines.config is not None:
        engines.config = engines.read_config(args, engines.world())
    generate, write = utils.generate, utils.RunLog.write

    def stopping(log, step, metrics):
        write(log, step, metrics)
        if step == stop:
            raise Stopped

    utils.RunLog.write = stopping
    if fixed:
        module.generate = lambda *a, **options: fixed_responses(*a, draw=draw)
    try:
        module.main(args)
    except Stopped:
        return None
    finally:
        utils.RunLog.write = write
        if fixed:
            module.generate = generate
    return metrics_of(args.output_dir)


def metrics_of(folder):
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def main():
    jobs = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    first = ppo_sr.Args(**jobs["set_up"])
    engines.join_ranks(first)
    Path(f"{sys.argv[1]}.pid{engines.rank()}").write_text(str(os.getpid()))
    for job in jobs["jobs"]:
        started = time.time()
        if "families" in job:
            from tests.test_deepspeed import train_families

            train_families(job["families"])
        else:
            run(**job)
        print(f"{job.get('script', 'families')}: {time.time() - started:.1f} s", file=sys.stderr)
    engines.finish()


if __name__ == "__main__":
    main()
