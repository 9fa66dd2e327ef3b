"""Pairs per second and peak memory of am_train.py beside TRL's RewardTrainer: the same model, data, batch and loss.

    python -m benchmarks.reward_vs_trl                    # seven minutes on two cores; TRL: requirements-benchmarks.txt
    python -m benchmarks.reward_vs_trl --trl_python /path/to/env/bin/python --repeats 3
    python -m benchmarks.reward_vs_trl --dataset_name pairs.jsonl                        # pairs that share their texts

Four arms, each in a process of its own, one after the other, in turned order from one repeat to the next:

    ours            am_train.py --loss rm, as it stands
    ours by prompt  am_train.py --loss rm --group_by_prompt: the same pairs in other batches, as under `trl grouped`; a
                    text that several pairs of a prompt share is read once a batch. The table of lengths has no such
                    texts, so this arm is for --dataset_name
    trl             RewardTrainer; it gets the pairs in the order in which am_train.py draws them, so that the losses of
                    both can be held against each other step by step
    trl grouped     RewardTrainer with train_sampling_strategy="group_by_length": transformers sorts mega-batches of
                    min(50, steps / 4) batches. RewardTrainer drops the column of lengths that this needs, so
                    remove_unused_columns is off

What is held equal: a Llama of 22 M random weights, score head included; pairs whose texts utils.encode_sides has cut to
--max_length, since TRL drops longer ones (the count dropped is checked to be 0); AdamW of one constant learning rate,
betas, decay and gradient clip; float32, no checkpointing, no evaluation, no saving inside the clock, one logged row a
step, --threads threads. What is not: TRL keeps its default, the fused AdamW. Tokenising is outside both clocks, and a few
small passes through the model come before them, so that every step counts: grouping puts the longest texts first, and
leaving out the first steps would favour it.

Columns: pairs/s over all steps; peak the high-water mark of resident memory in MB (10^6 bytes), start the resident memory
before the model is loaded, imports included; padding the share of the computed positions that are padding; positions the
computed positions per token of all pairs' texts (below 1 where pairs share texts, and these are read once); of limit the
share of the machine's measured float32 matrix products that 6 x tokens x non-embedding parameters / seconds amounts
to, tokens being those of the pairs, however few of them an arm computes.

The last line is one JSON object: ratio is ours / trl in pairs per second, ratio_grouped ours / trl grouped,
ratio_by_prompt ours by prompt / trl, each the median over the repeats; memory_ratio, memory_ratio_grouped and
memory_ratio_by_prompt are peak / peak of the same arms.
"""

import shutil
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

from utils import InputError, run_cli, write_json, write_jsonl

ROOT = Path(__file__).resolve().parents[1]
LENGTHS = Path(__file__).with_name("pair_lengths.json")
ARMS = ("ours", "ours by prompt", "trl", "trl grouped")
RATIOS = {"": ("ours", "trl"), "_grouped": ("ours", "trl grouped"), "_by_prompt": ("ours by prompt", "trl")}
INSTALL = "pip install -r requirements-benchmarks.txt, or name an environment that has them with --trl_python"


@dataclass
class Args:
    dataset_name: str | None = None
    """preference file whose pairs all arms get; default: a table of 200 triples of real lengths beside this file"""
    steps: int = 24
    """optimiser steps of each arm"""
    batch_size: int = 16
    """pairs per optimiser step, in one forward pass"""
    max_length: int = 256
    """tokens of prompt and response together"""
    learning_rate: float = 1e-4
    """constant; TRL's default"""
    hidden_size: int = 384
    """width of the model, a multiple of 12; its MLP is 8/3 times as wide, and it has 6 heads"""
    num_layers: int = 6
    """layers of the model"""
    vocab_size: int = 30000
    """words of the tokenizer at most, and rows of the embedding: 22 M parameters in all"""
    threads: int = 2
    """threads of each arm"""
    repeats: int = 1
    """runs of each arm"""
    seed: int = 1
    """seed of weights, pairs and order"""
    trl_python: str = sys.executable
    """the interpreter that has TRL, with the same torch and transformers as this one"""


# --- one model and one list of pairs for all arms ---------------------------------------------------------------------


def draw_rows(args):
    """steps x batch_size preference rows: all pairs of random prompts of the file, or random words of the table's lengths.

    Whole prompts keep what pairs share as it is in the file, where single pairs would thin it out; the last prompt gives
    as many pairs as are missing. The table is gone through in full before it starts over, so that few pairs have its
    distribution too.
    """
    draw, count = random.Random(args.seed), args.steps * args.batch_size
    if args.dataset_name:
        from utils import load_rows

        rows = load_rows(args.dataset_name, {"prompt": "prompt", "chosen": "response", "rejected": "response"})
        if len(rows) < count:
            raise InputError(f"{args.dataset_name}: holds {len(rows)} pairs where {count} are needed; lower --steps")
        by_prompt = {}
        for row in rows:
            by_prompt.setdefault(str(row["prompt"]), []).append({k: row[k] for k in ("prompt", "chosen", "rejected")})
        return [row for pairs in draw.sample(list(by_prompt.values()), len(by_prompt)) for row in pairs][:count]
    table, lengths = json.loads(LENGTHS.read_text(encoding="utf-8"))["lengths"], []
    while len(lengths) < count:
        lengths += draw.sample(table, min(len(table), count - len(lengths)))
    words = [f"w{i}" for i in range(args.vocab_size - 3)]
    texts = ([" ".join(draw.choices(words, k=n)) for n in triple] for triple in lengths)
    return [dict(zip(("prompt", "chosen", "rejected"), three, strict=True)) for three in texts]


def word_tokenizer(texts, vocab_size):
    """A tokenizer of the most frequent words and punctuation marks of the texts."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    split = pre_tokenizers.BertPreTokenizer()
    count = Counter(word for text in texts for word, _ in split.pre_tokenize_str(text))
    words = ["<pad>", "<eos>", "<unk>", *(word for word, _ in count.most_common(vocab_size - 3))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = split
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def prepare(args, folder):
    """Write the model, the rows that am_train.py reads and, in its order, the token ids of the same pairs for TRL."""
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    from utils import encode_sides, render

    rows = draw_rows(args)
    plain = SimpleNamespace(chat_template=None)  # all that render() asks of a tokenizer
    texts = (text for r in rows for text in (render(plain, r["prompt"]), r["chosen"], r["rejected"]))
    tokenizer = word_tokenizer(texts, args.vocab_size)
    torch.manual_seed(args.seed)
    config = LlamaConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=args.hidden_size * 8 // 3,
        num_hidden_layers=args.num_layers,
        num_attention_heads=6,
        max_position_embeddings=args.max_length,
        num_labels=1,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForSequenceClassification(config)
    model.save_pretrained(folder / "model")  # with its score head: no arm draws one of its own
    tokenizer.save_pretrained(folder / "model")
    write_jsonl(folder / "pairs.jsonl", rows)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(args.seed)).tolist()
    ids = []
    for i in order:
        where = (args.max_length, True, f"{args.dataset_name or LENGTHS.name}, pair {i + 1}")
        sides = rows[i]["chosen"], rows[i]["rejected"]
        (chosen, rejected), _ = encode_sides(tokenizer, rows[i]["prompt"], sides, *where)
        pair = {"chosen_ids": chosen[0], "rejected_ids": rejected[0]}
        ids.append(pair | {"length": max(map(len, pair.values()))})
    write_jsonl(folder / "ids.jsonl", ids)
    everything, embedding = model.num_parameters(), model.get_input_embeddings().weight.numel()
    return {
        "parameters": everything,
        "non_embedding": everything - embedding,
        "tokens": sum(len(p["chosen_ids"]) + len(p["rejected_ids"]) for p in ids),
    }


# --- one arm, in a process of its own ---------------------------------------------------------------------------------


def memory(field):
    """VmRSS (now) or VmHWM (at most so far) of this process in MB; where there is no /proc, both are the latter.

    getrusage's maximum also covers what the parent process held when it started this one; Linux's VmHWM does not.
    """
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1.024e-3 for line in file if line.startswith(field))
    except (OSError, StopIteration):
        unit = 1e-6 if sys.platform == "darwin" else 1.024e-3
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def matmul_limit(size=2048, repeats=8, bf16=False):
    """Matrix products of this process in float32 or bfloat16, best of a few, in FLOP/s."""
    import torch

    a, b = (torch.randn(size, size, dtype=torch.bfloat16 if bf16 else None) for _ in range(2))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def warm_up(folder):
    """Thread pool and kernels of the library get ready on a few short texts: far below the peak of any arm."""
    import torch
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder / "model", dtype=torch.float32)
    for _ in range(3):
        ids = torch.randint(3, model.config.vocab_size, (4, min(32, model.config.max_position_embeddings)))
        model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.sum().backward()


def count_positions(pad_id):
    """From here on every token that a model embeds is counted: -> {"positions": 0, "padding": 0}, kept up to date."""
    from torch import nn

    seen, forward = {"positions": 0, "padding": 0}, nn.Embedding.forward

    def counting(self, ids):
        seen["positions"] += ids.numel()
        seen["padding"] += int((ids == pad_id).sum())
        return forward(self, ids)

    nn.Embedding.forward = counting
    return seen


def run_ours(folder, args, by_prompt):
    """-> seconds of all steps, loss of each step."""
    import am_train

    shutil.rmtree(folder / "ours", ignore_errors=True)  # the repeat before
    am_train.main(
        am_train.Args(
            model_name_or_path=str(folder / "model"),
            dataset_name=str(folder / "pairs.jsonl"),
            output_dir=str(folder / "ours"),
            loss="rm",
            learning_rate=args["learning_rate"],
            warmup_ratio=0.0,
            min_lr_ratio=1.0,
            global_batch_size=args["batch_size"],
            per_device_train_batch_size=args["batch_size"],
            max_length=args["max_length"],
            truncate_prompts=True,
            group_by_prompt=by_prompt,
            seed=args["seed"],
        )
    )
    rows = [json.loads(line) for line in (folder / "ours" / "metrics.jsonl").read_text().splitlines()]
    return rows[-1]["seconds"], [row["loss"] for row in rows]  # its clock starts when the run folder is opened


def run_trl(folder, args, grouped):
    """-> seconds from the start of training to the end of the last step, loss of each step."""
    from datasets import Dataset
    from transformers import AutoTokenizer, PrinterCallback, TrainerCallback
    from trl import RewardConfig, RewardTrainer

    class Clock(TrainerCallback):
        def on_train_begin(self, *_, **__):
            self.start = time.perf_counter()

        def on_step_end(self, *_, **__):
            self.seconds = time.perf_counter() - self.start

    rows = [json.loads(line) for line in (folder / "ids.jsonl").read_text().splitlines()]
    config = RewardConfig(
        output_dir=str(folder / "trl"),
        learning_rate=args["learning_rate"],
        lr_scheduler_type="constant",
        adam_beta2=0.95,
        num_train_epochs=1,
        per_device_train_batch_size=args["batch_size"],
        max_length=args["max_length"],
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        seed=args["seed"],
        train_sampling_strategy="group_by_length" if grouped else "sequential",  # rows come shuffled
        remove_unused_columns=not grouped,
        save_strategy="no",
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
    )
    clock, tokenizer = Clock(), AutoTokenizer.from_pretrained(folder / "model")
    trainer = RewardTrainer(
        model=str(folder / "model"),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    trainer.remove_callback(PrinterCallback)
    if len(trainer.train_dataset) != len(rows):
        raise RuntimeError(f"TRL dropped {len(rows) - len(trainer.train_dataset)} of {len(rows)} pairs")
    trainer.train()
    return clock.seconds, [row["loss"] for row in trainer.state.log_history if "loss" in row]


def work(arm, folder):
    """What a process does: train one arm on what prepare() wrote, and leave its numbers in result.json."""
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder = Path(folder)
    args = json.loads((folder / "args.json").read_text())
    torch.set_num_threads(args["threads"])
    if arm.startswith("ours"):
        import am_train  # noqa: F401
    else:
        from trl import RewardTrainer  # noqa: F401
    start = memory("VmRSS")
    limit = matmul_limit()
    warm_up(folder)
    seen = count_positions(json.loads((folder / "model" / "config.json").read_text())["pad_token_id"])
    run = run_ours if arm.startswith("ours") else run_trl
    seconds, losses = run(folder, args, arm in ("ours by prompt", "trl grouped"))
    result = {"seconds": seconds, "losses": losses, "limit": limit, "start_mb": start, "peak_mb": memory("VmHWM")}
    write_json(folder / "result.json", result | seen)


# --- the arms side by side --------------------------------------------------------------------------------------------


def check_trl(python, install=INSTALL):
    """The versions of the interpreter that runs TRL, which must share torch and transformers with this one.

    Raises InputError with `install` as the remedy where it lacks something."""
    names = ("trl", "accelerate", "torch", "transformers", "datasets")
    code = (
        "import json; from importlib.metadata import version, PackageNotFoundError\n"
        "def get(name):\n    try: return version(name)\n    except PackageNotFoundError: return None\n"
        f"print(json.dumps({{n: get(n) for n in {names}}}))"
    )
    try:
        found = json.loads(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout)
    except (OSError, subprocess.CalledProcessError, json.JSONDecodeError):
        raise InputError(f"--trl_python {python}: is no Python interpreter that runs") from None
    if missing := [name for name, version in found.items() if version is None]:
        raise InputError(f"--trl_python {python}: lacks {', '.join(missing)}; {install}")
    from importlib.metadata import version

    for name in ("torch", "transformers"):
        if found[name] != version(name):
            raise InputError(
                f"--trl_python {python}: has {name} {found[name]}, this one {version(name)}; install the same"
            )
    return found


def run_arm(arm, folder, args):
    """Start the process of an arm, wait for it, read what it found."""
    (folder / "result.json").unlink(missing_ok=True)
    environment = os.environ | {
        "OMP_NUM_THREADS": str(args.threads),
        "CUDA_VISIBLE_DEVICES": "",  # resident memory says nothing about a GPU's
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    code = "import sys; from benchmarks.reward_vs_trl import work; work(*sys.argv[1:])"
    command = [sys.executable if arm.startswith("ours") else args.trl_python, "-c", code, arm, str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the arm '{arm}' ended with code {done.returncode}:\n{done.stderr[-4000:]}")
    result = json.loads((folder / "result.json").read_text())
    if len(result["losses"]) != args.steps:
        raise RuntimeError(f"the arm '{arm}' took {len(result['losses'])} steps, not {args.steps}")
    return result


def summarize(runs, about, pairs):
    """Medians of every arm over its repeats, and the ratios of the repeats' medians.

    `runs`: {arm: one result a repeat}; `about`: what prepare() returned; `pairs`: how many an arm trained on.
    """
    limit = max(run["limit"] for repeats in runs.values() for run in repeats)
    flop = 6 * about["tokens"] * about["non_embedding"]
    arms = {}
    for arm, repeats in runs.items():
        speeds = [pairs / run["seconds"] for run in repeats]
        arms[arm] = {
            "pairs_per_second": statistics.median(speeds),
            "slowest": min(speeds),
            "fastest": max(speeds),
            "peak_mb": statistics.median(run["peak_mb"] for run in repeats),
            "start_mb": statistics.median(run["start_mb"] for run in repeats),
            "padding": repeats[0]["padding"] / repeats[0]["positions"],
            "positions_per_token": repeats[0]["positions"] / about["tokens"],
            "of_limit": statistics.median(speeds) / pairs * flop / limit,
            "losses": repeats[0]["losses"],
        }

    def ratio(ours, other):
        return statistics.median(b["seconds"] / a["seconds"] for a, b in zip(runs[ours], runs[other], strict=True))

    ratios = {f"ratio{name}": ratio(*two) for name, two in RATIOS.items()}
    ratios |= {f"memory_ratio{name}": arms[a]["peak_mb"] / arms[b]["peak_mb"] for name, (a, b) in RATIOS.items()}
    return ratios | {
        "loss_difference": max(abs(a - b) for a, b in zip(arms["ours"]["losses"], arms["trl"]["losses"], strict=True)),
        "matmul_gflops": limit / 1e9,
        "arms": arms,
    }


def table(result):
    """The arms as aligned text, one line each."""
    lines = [f"{'':14} pairs/s (min-max)      peak MB  start MB  padding  positions  of limit   loss, first to last"]
    for arm, a in result["arms"].items():
        speed = f"{a['pairs_per_second']:7.2f} ({a['slowest']:.2f}-{a['fastest']:.2f})"
        shares = f"{a['padding']:8.1%} {a['positions_per_token']:10.2f} {a['of_limit']:9.1%}"
        loss = f"{a['losses'][0]:.4f} to {a['losses'][-1]:.4f}"
        lines.append(f"{arm:14} {speed:22} {a['peak_mb']:8.0f} {a['start_mb']:9.0f} {shares}   {loss}")
    return "\n".join(lines)


def main(args: Args):
    """Prints a table and, as the last line, the result as JSON. Raises InputError where TRL is missing or another torch."""
    if args.hidden_size % 12:
        raise InputError(f"--hidden_size {args.hidden_size}: must be a multiple of 12")  # 6 heads of even width
    if args.max_length < 2 or args.vocab_size < 4:
        raise InputError("--max_length must be at least 2 and --vocab_size at least 4")
    if not (args.steps and args.repeats and args.threads and args.num_layers and args.hidden_size):
        raise InputError("--steps, --repeats, --threads, --num_layers and --hidden_size: must be positive")
    versions = check_trl(args.trl_python)
    with tempfile.TemporaryDirectory() as folder:
        folder, pairs = Path(folder), args.steps * args.batch_size
        write_json(folder / "args.json", asdict(args))
        about = prepare(args, folder)
        million, per_text = about["parameters"] / 1e6, about["tokens"] / pairs / 2
        print(
            f"{million:.1f} M parameters, {pairs} pairs, {per_text:.0f} tokens a text, batch {args.batch_size}", end=""
        )
        print(f", {args.threads} threads, torch {versions['torch']}, TRL {versions['trl']}", flush=True)
        runs = {arm: [] for arm in ARMS}
        for repeat in range(args.repeats):
            turn = repeat % len(ARMS)
            for arm in ARMS[turn:] + ARMS[:turn]:
                run = run_arm(arm, folder, args)
                runs[arm].append(run)
                speed = pairs / run["seconds"]
                print(f"  repeat {repeat + 1}, {arm}: {speed:.2f} pairs/s, {run['peak_mb']:.0f} MB", flush=True)
    result = summarize(runs, about, pairs) | about | {"pairs": pairs, "dropped_by_trl": 0, "versions": versions}
    print(table(result))
    for name, (ours, other) in RATIOS.items():
        speed, peak = result[f"ratio{name}"], result[f"memory_ratio{name}"]
        print(f"{ours} is {speed:.2f} times as fast as {other}, at {peak:.2f} times its peak memory")
    print(
        f"losses of ours and TRL, on the same pairs in the same order, differ by {result['loss_difference']:.1e} at most"
    )
    print(json.dumps(json.loads(json.dumps(result), parse_float=lambda digits: round(float(digits), 6))))


if __name__ == "__main__":
    run_cli(main, Args, __doc__)
