"""Seconds and memory of large/select_at_scale.py on made-up scored responses, by size.

    python -m benchmarks.select_at_scale --sizes 10000 100000 1000000

The embeddings on disk are noise around as many directions as there are clusters, float16, in shards
of 50,000: a million need 1.2 GB in the temporary folder. Each size is a process of its own, whose
peak of resident memory is read when it ends.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils import InputError, run_cli


@dataclass
class Args:
    sizes: tuple[int, ...] = (10_000, 100_000, 1_000_000)
    """numbers of prompts"""
    dim: int = 384
    """numbers of an embedding"""
    num_clusters: int = 100
    """c of §3.2"""
    seed: int = 1
    """seed of the made-up data"""


def make(folder, size, args, shard=50_000):
    rng = np.random.default_rng(args.seed)
    centres = rng.normal(size=(args.num_clusters, args.dim)).astype(np.float32)
    (folder / "shards").mkdir()
    with open(folder / "rows.jsonl", "w", encoding="utf-8") as file:
        for start in range(0, size, shard):
            which = rng.integers(0, args.num_clusters, min(shard, size - start))
            points = centres[which] + rng.standard_normal((len(which), args.dim), dtype=np.float32)
            points /= np.linalg.norm(points, axis=1, keepdims=True)
            np.save(folder / "shards" / f"{start:09}.npy", points.astype(np.float16))
            for i, score in enumerate(rng.normal(size=len(which)).tolist(), start):
                row = {
                    "prompt": f"prompt {i} " + "word " * 20,
                    "response": "word " * 20,
                    "score": score,
                }
                file.write(json.dumps(row) + "\n")


def main(args: Args):
    if min(args.sizes, default=0) < args.num_clusters:
        raise InputError("--sizes: each must be at least --num_clusters")
    print("| prompts | read, s | cluster, s | keep, s | peak memory, MB |\n|---|---|---|---|---|")
    rows = []
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            make(folder, size, args)
            flags = {"dataset_name": folder / "rows.jsonl", "embeddings": folder / "shards"}
            flags |= {"output_dir": folder / "out", "num_clusters": args.num_clusters}
            flags = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
            command = [sys.executable, "-m", "large.select_at_scale", *flags]
            child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            _, status, usage = os.wait4(child.pid, 0)
            if status:
                raise RuntimeError(f"the selection of {size} prompts ended with status {status}")
            seconds = json.loads((folder / "out" / "clusters.json").read_text())["seconds"]
            rows.append({"prompts": size, "peak_mb": usage.ru_maxrss / 1024} | seconds)
            stages = " | ".join(f"{seconds[s]:.1f}" for s in ("read", "cluster", "keep"))
            print(f"| {size:,} | {stages} | {rows[-1]['peak_mb']:.0f} |", flush=True)
    return rows


if __name__ == "__main__":
    run_cli(main, Args, __doc__)
