"""select_rehearsal.py for millions of prompts: D_R from scored responses, with embeddings on disk.

    python -m large.select_at_scale --dataset_name scored.jsonl --output_dir runs/large \\
        --num_clusters 1000

    read     each row once: `prompt`, `response`, `score`, and what --criterion reads
    embed    the prompts into float16 shards, one a block of rows; a stopped run goes on after its
             last shard. --embeddings takes shards that exist already: *.npy, float16 or float32,
             the rows in the order of the files' names
    cluster  KMeans on rows spread evenly over all, then MiniBatchKMeans through all blocks
    keep     the top k of each cluster, by select_rehearsal.py's own functions

In memory are a block of rows with their embeddings, the sample, and about 30 bytes a row, its
measures and cluster. So ties, criteria and order are those of select_rehearsal.py, word for word.
Several GPUs embed together. The order of rows and --rows_at_once decide what MiniBatchKMeans finds;
how the rows are cut into shards does not.

Rows with a score: responses.jsonl of select_rehearsal.py (which adds `entropy` under a --criterion
that reads it), or your own.
"""

import functools
import gzip
import hashlib
import itertools
import json
import os
import sys
import time
import zlib
from array import array
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from plumbing.rows import refuse_columns, turns
from select_rehearsal import criterion_keys, embed, load_encoder, prompt_text, select
from plumbing.errors import first_line
from utils import InputError, environment, refuse_finished, run_cli, write_json, write_jsonl

SAMPLE = 256  # rows a cluster from which KMeans starts


@dataclass
class Args:
    dataset_name: str
    """scored responses, .jsonl or .jsonl.gz: `prompt`, `response`, `score`; `entropy` or `length`
    where --criterion asks for it"""
    output_dir: str
    """receives rehearsal.jsonl and clusters.json, and embeddings/ where they are made here"""
    embeddings: str | None = None
    """a folder of *.npy shards (rows, dim); without it --embedding_model makes them"""
    embedding_model: str = "princeton-nlp/sup-simcse-roberta-base"
    """sentence encoder, as in select_rehearsal.py (paper §3.2, footnote 4)"""
    pooling: Literal["auto", "pooler", "cls", "mean"] = "auto"
    """as in select_rehearsal.py"""
    num_clusters: int = 24
    """c of §3.2 (our choice C6)"""
    top_k: int = 10
    """pairs kept in each cluster (our choice C6)"""
    criterion: Literal["advantage", "entropy", "length", "combined", "random", "low_advantage"] = (
        "advantage"
    )
    """what is kept the highest of, as in select_rehearsal.py (paper §3.2)"""
    num_passes: int = 1
    """passes of MiniBatchKMeans over all rows"""
    rows_at_once: int = 50_000
    """rows in memory, and of a mini-batch"""
    per_device_eval_batch_size: int = 256
    """prompts per forward pass of the encoder"""
    seed: int = 1
    """seed of clustering and of the random control"""


# --- rows and shards ------------------------------------------------------------------------------


def lines(name):
    try:
        open_file = gzip.open if name.endswith(".gz") else open
        with open_file(name, "rt", encoding="utf-8") as file:
            yield from (line for line in file if line.strip())
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise InputError(f"--dataset_name {name}: cannot be read ({error})") from None


def half_a_pair(row):
    """The first field that UTF-8 cannot hold: half a surrogate pair, where an emoji was cut."""
    for field, value in row.items():
        try:
            json.dumps({field: value}, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return field
    return None


def read_measures(name, fields):
    """{field: (rows,) float64} of all rows, each row checked, and a hash of all prompts."""
    measures, prompts = {field: array("d") for field in fields}, hashlib.sha256()
    for number, line in enumerate(lines(name), 1):
        where, wrong = f"{name}, line {number}", None
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # too many digits or brackets, too
            raise InputError(f"{where}: not JSON ({first_line(error)})") from None
        if not isinstance(row, dict):
            raise InputError(f"{where}: expected a JSON object")
        if row.get("cluster") is not None:
            refuse_columns(row, {"cluster"}, where)
        prompt = row.get("prompt")
        if not (turns(prompt) or (prompt and isinstance(prompt, str))):
            wrong = "'prompt' is empty, or neither text nor messages"
        if not isinstance(row.get("response"), str):
            wrong = "'response' must be text"
        for field in fields:
            value = row.get(field)
            if field not in row:
                wrong = f"'{field}' is missing; select_rehearsal.py writes it into responses.jsonl"
            elif type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
                wrong = f"'{field}' must be a finite number"
            else:
                measures[field].append(value)
        if "\\ud" in line.lower() and (field := half_a_pair(row)):
            wrong = f"'{field}' holds half a surrogate pair, which is no text"
        if wrong:
            raise InputError(f"{where}: field {wrong}")
        prompts.update(f"{prompt_text(prompt)}\0".encode())
    found = {field: np.frombuffer(values) for field, values in measures.items()}
    return found, prompts.hexdigest()


def write_shards(args, folder, total, prompts):
    """Embed the prompts of `total` rows into `folder`, a shard a block. What is there stays, if it
    is of the same `prompts` (their hash), model and blocks."""
    model, note = args.embedding_model, folder / "made_of.json"
    made_of = {"prompts": prompts, "pooling": args.pooling, "rows_at_once": args.rows_at_once}
    made_of["embedding_model"] = str(Path(model).resolve()) if Path(model).exists() else model
    had = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else None
    if had != made_of and any(folder.glob("*.npy")):
        problem = "holds embeddings of other rows or flags; remove it"
        raise InputError(f"--output_dir: {folder} {problem}")
    encoder = load_encoder(args.embedding_model, args.pooling)
    if torch.cuda.device_count() > 1:
        encoder.encode = functools.partial(encoder.encode, pool=encoder.start_multi_process_pool())
    write_json(note, made_of)
    stream = lines(args.dataset_name)
    for number in range(-(-total // args.rows_at_once)):
        block, path = list(itertools.islice(stream, args.rows_at_once)), folder / f"{number:06}.npy"
        if path.is_file():
            continue
        texts = [prompt_text(json.loads(line)["prompt"]) for line in block]
        with open(f"{path}.tmp", "wb") as file:
            vectors = embed(encoder, texts, args.per_device_eval_batch_size)
            np.save(file, vectors.astype(np.float16))
        os.replace(f"{path}.tmp", path)


class Shards:
    """The *.npy files of a folder as one matrix (rows, dim) that is never in memory."""

    def __init__(self, folder, flag):
        self.paths, self.sizes, widths = sorted(Path(folder).glob("*.npy")), [], set()
        for path in self.paths:
            try:
                shard = np.load(path, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError) as error:
                raise InputError(f"{path}: no array ({error})") from None
            if shard.ndim != 2 or shard.dtype not in (np.float16, np.float32):
                found = f"found {shard.shape} {shard.dtype}"
                raise InputError(f"{path}: expected (rows, dim) of float16 or float32, {found}")
            self.sizes.append(len(shard))
            widths.add(shard.shape[1])
        if len(widths) != 1:
            problem = f"shards of different dimensions {sorted(widths)}"
            raise InputError(f"{flag} {folder}: {problem if widths else 'holds no .npy files'}")

    def rows(self, indices):
        """The rows of these ascending indices: (indices, dim) float32."""
        parts, start = [], 0
        for path, size in zip(self.paths, self.sizes, strict=True):
            first, last = np.searchsorted(indices, [start, start + size])
            if first < last:
                shard = np.load(path, mmap_mode="r")
                parts.append(shard[indices[first:last] - start].astype(np.float32))
                if not np.isfinite(parts[-1]).all():
                    raise InputError(f"{path}: holds a number that is not finite")
            start += size
        return np.concatenate(parts)

    def blocks(self, size):
        """All rows in order, `size` at a time, whatever the shards are."""
        total = sum(self.sizes)
        return (self.rows(np.arange(i, min(i + size, total))) for i in range(0, total, size))


# --- clusters -------------------------------------------------------------------------------------


def cluster_blocks(shards, num_clusters, num_passes, rows_at_once, seed):
    """Cluster index of every row, (rows,) int32, in `num_passes` + 1 passes over the blocks."""
    from sklearn.cluster import KMeans, MiniBatchKMeans

    total = sum(shards.sizes)
    sample = np.linspace(0, total - 1, min(total, SAMPLE * num_clusters)).astype(np.int64)
    start = KMeans(num_clusters, n_init=1, random_state=seed).fit(shards.rows(np.unique(sample)))
    options = {"init": start.cluster_centers_, "n_init": 1, "random_state": seed}
    model = MiniBatchKMeans(num_clusters, **options)
    for _ in range(num_passes):
        for block in shards.blocks(rows_at_once):
            model.partial_fit(block)
    found = [model.predict(block) for block in shards.blocks(rows_at_once)]
    return np.concatenate(found).astype(np.int32)


def main(args: Args):
    for name in ("num_clusters", "top_k", "num_passes", "rows_at_once"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name}: must be positive")
    folder, seconds, began = Path(args.output_dir), {}, time.perf_counter()
    if (folder / "clusters.npz").exists():
        problem = "holds a selection of select_rehearsal.py; take another folder"
        raise InputError(f"--output_dir {folder}: {problem}")
    refuse_finished(folder / "clusters.json", args)

    def lap(stage):
        seconds[stage] = round(time.perf_counter() - began - sum(seconds.values()), 2)
        print(f"{stage}: {seconds[stage]:.1f} s")

    shards = Shards(args.embeddings, "--embeddings") if args.embeddings else None
    by = {"entropy": ("entropy",), "combined": ("entropy",), "length": ("length",)}
    fields = "score", *by.get(args.criterion, ())
    measures, prompts = read_measures(args.dataset_name, fields)
    total = len(measures["score"])
    of = f"{args.dataset_name} has {total} rows"
    if total < args.num_clusters:
        raise InputError(f"--num_clusters {args.num_clusters}: {of} alone")
    if args.rows_at_once < args.num_clusters:
        problem = f"a mini-batch needs a row for each of --num_clusters {args.num_clusters}"
        raise InputError(f"--rows_at_once {args.rows_at_once}: {problem}")
    if shards and sum(shards.sizes) != total:
        raise InputError(f"--embeddings {args.embeddings}: {sum(shards.sizes)} rows, {of}")
    lap("read")
    if shards is None:
        write_shards(args, folder / "embeddings", total, prompts)
        shards = Shards(folder / "embeddings", "--output_dir")
        lap("embed")
    how = args.num_clusters, args.num_passes, args.rows_at_once, args.seed
    clusters = cluster_blocks(shards, *how)
    lap("cluster")
    rng, other = np.random.default_rng(args.seed), np.random.default_rng(args.seed + 1)
    kept = select(criterion_keys(args.criterion, clusters, measures, rng), clusters, args.top_k)
    control = select(criterion_keys("random", clusters, measures, other), clusters, args.top_k)
    wanted, rows = set(kept), {}
    for i, line in enumerate(lines(args.dataset_name)):
        if i in wanted:
            rows[i] = json.loads(line) | {"cluster": int(clusters[i])}
    shuffled = np.random.default_rng(args.seed).permutation(kept).tolist()  # as select_rehearsal.py
    write_jsonl(folder / "rehearsal.jsonl", [rows[i] for i in shuffled])
    lap("keep")
    report = {"criterion": args.criterion, "pairs": total, "kept": len(kept), "seconds": seconds}
    report["sizes"] = np.bincount(clusters, minlength=args.num_clusters).tolist()
    for name, chosen in (("selected", kept), ("random_control", control)):
        report[name] = {f"mean_{key}": values[chosen].mean() for key, values in measures.items()}
    write_json(folder / "clusters.json", report | {"args": asdict(args)} | environment())
    print(f"{len(kept)} of {total} pairs kept from {args.num_clusters} clusters: {folder}")


if __name__ == "__main__":
    run_cli(main, Args, __doc__)
