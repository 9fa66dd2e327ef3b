"""Seconds per update and peak memory of ppo_sr.py beside TRL 1.12's PPOTrainer: same policy, scorer, prompts and batch.

    python -m benchmarks.ppo_vs_trl --model_name_or_path results/full/seed_1/sft/model \\
        --reward_model_path results/full/seed_1/rm/model --dataset_name results/full/seed_1/world/prompts_train.jsonl \\
        --trl_python /path/to/env/bin/python          # folders: what `make reproduce` leaves; docs/results/speed.md

TRL 1.12 is the last release that has PPO (trl.experimental.ppo). It lives in an environment of its own, with the same
torch and transformers. Two arms, each in a process of its own, in turned order from one repeat to the next.

What is held equal: the folders of policy and scorer (the critic starts from the scorer), prompts, batch, micro-batches,
epochs, mini-batches, response length, sampling at temperature 1 from the whole vocabulary until <eos>, beta, GAE, clip
ranges, a constant learning rate, no checkpointing, no saving or evaluation inside the clock, one
logged row an update, --threads threads. What is not: TRL clips no gradient norm; it keeps its fused AdamW; it pays the
score after the last token, not on it. Both run in float32; with --bf16, ours in bfloat16 throughout, TRL's in training alone:
it samples and scores past accelerate, which would cast. TRL's forward passes in sampling and scoring take
--trl_rollout_batch_size rows: its best value.

An update is everything from one logged row to the next; the first --warmup_steps are left out. Columns:

    s/update   mean over a run's updates, median over the repeats; tokens/s counts prompts and responses (<eos> included)
    peak, start    high-water mark of resident memory, and resident memory before a model is loaded, in MB (10^6 bytes)
    padding    share of the computed token positions that are padding, or come after <eos>; positions: computed positions
               per token, over all models and passes
    of limit   the work that no PPO update can leave out / seconds / the machine's measured matrix products of 2048 x 2048
               in that precision. The work: 2 FLOP per weight of the matrices and token for one pass of policy (sampling, which
               gives the log-probs), reference, scorer and critic, and 6 for each epoch's forward and backward pass of
               policy and critic; the output matrix at response tokens alone; attention's own products left out

Stages: `sample`; `score` (scorer, log-probs, values); `update`; `other` is what lies between them. TRL's loop is one
function, so there a stage lasts until the next can be seen: `score`, up to the first pass with gradients, holds the
advantages, `update` the log, `other` its garbage collection and the next batch.

The last line is one JSON object: ratio is TRL's seconds per update / ours, the median over the repeats; memory_ratio is
our peak / TRL's.
"""

import shutil
import functools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks import reward_vs_trl as shared
from plumbing import run_folder
from utils import InputError, run_cli, write_json, write_jsonl

ROOT = Path(__file__).resolve().parents[1]
ARMS = ("ours", "trl")
STAGES = {"sample": "sample", "score": "score", "update": "learn"}  # methods of ppo_sr.PPO
INSTALL = "pip install 'trl==1.12.*' accelerate in an environment of its own, and name it with --trl_python"


@dataclass
class Args:
    model_name_or_path: str
    """the SFT policy, which emits <eos>"""
    reward_model_path: str
    """the scorer, without an e head (TRL knows none); the critic starts from it"""
    dataset_name: str
    """prompts: more than the updates take, so that no arm sees one twice"""
    steps: int = 12
    """updates of each arm, warm-up included"""
    warmup_steps: int = 2
    """first updates that are left out of every number"""
    global_batch_size: int = 128
    """prompts per update"""
    per_device_train_batch_size: int = 64
    """sequences per training pass; gradients accumulate up to the mini-batch"""
    num_ppo_epochs: int = 2
    """passes over the batch"""
    num_mini_batches: int = 1
    """optimiser steps per pass"""
    response_length: int = 22
    """tokens that a response may have"""
    learning_rate: float = 3e-6
    """of policy and critic, constant; TRL's default, which leaves the length of the responses as it is"""
    trl_rollout_batch_size: int = 128
    """TRL's local_rollout_forward_batch_size"""
    bf16: bool = False
    """matrix products in bfloat16"""
    threads: int = 2
    """threads of each arm"""
    repeats: int = 3
    """runs of each arm"""
    seed: int = 1
    """seed of prompts, order and sampling"""
    trl_python: str = sys.executable
    """the interpreter that has TRL 1.12, with the same torch and transformers as this one"""


# --- stages: seconds and positions ------------------------------------------------------------------------------------


class Stages:
    """Where the time of an update goes: a stage lasts until the next one is entered."""

    def __init__(self):
        self.updates = []
        self.begin()

    def begin(self):
        """Start an update anew."""
        self.stage, self.since, self.now = "other", time.perf_counter(), {}

    def of(self, stage):
        return self.now.setdefault(stage, {"seconds": 0.0, "positions": 0, "padding": 0})

    def enter(self, stage):
        now = time.perf_counter()
        self.of(self.stage)["seconds"] += now - self.since
        self.stage, self.since = stage, now

    def end(self):
        """End the update: {stage: {seconds, positions, padding}} is kept."""
        self.enter("other")
        self.updates.append(self.now)
        self.begin()

    def within(self, stage, function):
        """`function`, timed as `stage`; the stage that it was called from goes on afterwards."""

        @functools.wraps(function)
        def timed(*args, **kwargs):
            before = self.stage
            self.enter(stage)
            try:
                return function(*args, **kwargs)
            finally:
                self.enter(before)

        return timed


def count_positions(stages, models, pad_id, on_gradients=lambda: None):
    """From here on every token id that a backbone in `models` (their classes) reads is counted in the current stage.

    Padding is what the attention mask hides, and <pad> itself, which finished rows of a batch go on to be fed. A pass
    with gradients calls `on_gradients` first.
    """
    import torch

    for model in models:
        inner = model.forward

        def counting(self, input_ids=None, *args, inner=inner, **kwargs):
            if torch.is_grad_enabled():
                on_gradients()
            padding, mask = input_ids == pad_id, kwargs.get("attention_mask")
            if mask is not None and mask.dim() == 2:
                padding = padding | (mask[:, -input_ids.shape[1] :] == 0)
            count = stages.of(stages.stage)
            count["positions"] += input_ids.numel()
            count["padding"] += int(padding.sum())
            return inner(self, input_ids, *args, **kwargs)

        model.forward = functools.wraps(inner)(counting)


# --- one arm, in a process of its own ---------------------------------------------------------------------------------


def positions(path):
    from transformers import AutoConfig

    return min(512, getattr(AutoConfig.from_pretrained(path), "max_position_embeddings", None) or 512)


def run_ours(folder, args, stages):
    """-> KL, mean response length and score of each update."""
    import ppo_sr

    for stage, name in STAGES.items():
        method = getattr(ppo_sr.PPO, name, None)
        if method is None:
            raise RuntimeError(f"ppo_sr.PPO has no method {name}: name that of stage `{stage}` in STAGES")
        setattr(ppo_sr.PPO, name, stages.within(stage, method))
    write = run_folder.RunLog.write

    def clocked(self, step, metrics):
        write(self, step, metrics)
        stages.end() if step else stages.begin()

    run_folder.RunLog.write = clocked
    shutil.rmtree(folder / "ours", ignore_errors=True)  # the repeat before
    ppo_sr.main(
        ppo_sr.Args(
            model_name_or_path=args["model_name_or_path"],
            reward_model_path=args["reward_model_path"],
            dataset_name=str(folder / "prompts.jsonl"),
            output_dir=str(folder / "ours"),
            total_steps=args["steps"],
            eval_steps=args["steps"] + 1,
            global_batch_size=args["global_batch_size"],
            num_ppo_epochs=args["num_ppo_epochs"],
            num_mini_batches=args["num_mini_batches"],
            per_device_train_batch_size=args["per_device_train_batch_size"],
            per_device_eval_batch_size=256,
            learning_rate=args["learning_rate"],
            critic_learning_rate=args["learning_rate"],
            response_length=args["response_length"],
            max_length=positions(args["model_name_or_path"]),
            seed=args["seed"],
            bf16=args["bf16"],
        )
    )
    rows = [json.loads(line) for line in (folder / "ours" / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "objective/kl" in row]
    return {
        "kl": [row["objective/kl"] for row in rows],
        "response_length": [row["val/response_length"] for row in rows],
        "score": [row["objective/scores"] for row in rows],
    }


def run_trl(folder, args, stages):
    """-> KL, mean response length and score of each update."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from transformers import PrinterCallback, TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    class Clock(TrainerCallback):
        def on_train_begin(self, *_, **__):
            stages.begin()

        def on_step_end(self, *_, **__):
            stages.end()

    tokenizer = AutoTokenizer.from_pretrained(args["model_name_or_path"], padding_side="left")
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(args["model_name_or_path"], dtype=torch.float32) for _ in range(2)
    )
    policy.generation_config.pad_token_id = tokenizer.pad_token_id  # what follows <eos> is padding for TRL too
    scorer, critic = (
        AutoModelForSequenceClassification.from_pretrained(args["reward_model_path"], num_labels=1, dtype=torch.float32)
        for _ in range(2)
    )
    lengths, truncate = [], ppo_trainer.truncate_response

    def keep_lengths(stop_id, pad_id, responses):
        cut = truncate(stop_id, pad_id, responses)
        lengths.append((cut != pad_id).sum(1))
        return cut

    def first_pass_with_gradients():
        if stages.stage == "score":
            stages.enter("update")

    sample = stages.within("sample", ppo_trainer.batch_generation)

    def sample_then_score(*given):
        out = sample(*given)
        stages.enter("score")
        return out

    ppo_trainer.truncate_response, ppo_trainer.batch_generation = keep_lengths, sample_then_score
    backbones = {type(model.base_model) for model in (policy, scorer)}
    count_positions(stages, backbones, tokenizer.pad_token_id, first_pass_with_gradients)
    config = PPOConfig(
        output_dir=str(folder / "trl"),
        total_episodes=args["steps"] * args["global_batch_size"],
        per_device_train_batch_size=args["per_device_train_batch_size"],
        gradient_accumulation_steps=args["global_batch_size"] // args["per_device_train_batch_size"],
        local_rollout_forward_batch_size=args["trl_rollout_batch_size"],
        num_ppo_epochs=args["num_ppo_epochs"],
        num_mini_batches=args["num_mini_batches"],
        response_length=args["response_length"],
        stop_token="eos",
        missing_eos_penalty=None,
        temperature=1.0,
        kl_coef=0.05,  # from here to gamma: ppo_sr.py's defaults
        vf_coef=1.0,
        cliprange=0.2,
        cliprange_value=0.2,
        lam=0.95,
        gamma=1.0,
        learning_rate=args["learning_rate"],
        lr_scheduler_type="constant",
        bf16=args["bf16"],
        use_cpu=True,
        gradient_checkpointing=False,
        num_sample_generations=0,
        save_strategy="no",
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        seed=args["seed"],
    )
    ids = [json.loads(line) for line in (folder / "ids.jsonl").read_text().splitlines()]
    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=scorer,
        value_model=critic,
        train_dataset=Dataset.from_list(ids),
        callbacks=[Clock()],
    )
    if trainer.accelerator.mixed_precision != ("bf16" if args["bf16"] else "no"):
        raise RuntimeError(f"TRL runs in {trainer.accelerator.mixed_precision}")
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "objective/kl" in row]
    per_update = torch.cat(lengths).view(len(rows), -1).float().mean(1).tolist()
    kl, score = ([row[f"objective/{name}"] for row in rows] for name in ("kl", "scores"))
    return {"kl": kl, "response_length": per_update, "score": score}


def work(arm, folder):
    """What a process does: run one arm on what prepare() wrote, and leave its numbers in result.json."""
    import torch
    from transformers import AutoConfig, AutoModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder, stages = Path(folder), Stages()
    args = json.loads((folder / "args.json").read_text())
    torch.set_num_threads(args["threads"])
    if arm == "ours":
        import ppo_sr  # noqa: F401
    else:
        from trl.experimental.ppo import PPOTrainer  # noqa: F401
    start = shared.memory("VmRSS")
    limit = shared.matmul_limit(bf16=args["bf16"])
    if arm == "ours":
        configs = [AutoConfig.from_pretrained(args[name]) for name in ("model_name_or_path", "reward_model_path")]
        pad_id = json.loads((folder / "about.json").read_text())["pad_id"]
        with torch.device("meta"):
            count_positions(stages, {type(AutoModel.from_config(config)) for config in configs}, pad_id)
    torch.manual_seed(args["seed"])
    numbers = (run_ours if arm == "ours" else run_trl)(folder, args, stages)
    result = {"updates": stages.updates, "limit": limit, "start_mb": start, "peak_mb": shared.memory("VmHWM")}
    write_json(folder / "result.json", result | numbers)


# --- the arms side by side --------------------------------------------------------------------------------------------


def prepare(args, folder):
    """Write the prompts that ppo_sr.py reads and the token ids of the same for TRL -> what summarize() needs to know.

    One batch is left over: at the end of its data accelerate steps the optimiser after every micro-batch.
    Raises InputError where the file holds too few, or the folders hold no policy and scorer that both arms can run.
    """
    from utils import encode_prompts, load_rows, load_tokenizer
    from utils import E_HEAD, load_policy, load_scorer

    tokenizer, count = load_tokenizer(args.model_name_or_path), (args.steps + 1) * args.global_batch_size
    rows = [{"prompt": row["prompt"]} for row in load_rows(args.dataset_name, {"prompt": "prompt"})]
    if len(rows) < count:
        raise InputError(f"{args.dataset_name}: holds {len(rows)} prompts where {count} are needed; lower --steps")
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise InputError(f"--model_name_or_path {args.model_name_or_path}: <pad> is <eos>; TRL needs a pad of its own")
    if (Path(args.reward_model_path) / E_HEAD).is_file():
        raise InputError(f"--reward_model_path {args.reward_model_path}: has an e head, which TRL would not read")
    policy = load_policy(args.model_name_or_path)
    scorer = load_scorer(args.reward_model_path, tokenizer).model
    rows = random.Random(args.seed).sample(rows, count)
    ids = encode_prompts(tokenizer, rows, 512, args.response_length, False, args.dataset_name)
    write_jsonl(folder / "prompts.jsonl", rows)
    write_jsonl(folder / "ids.jsonl", [{"input_ids": x} for x in ids])
    about = {
        "parameters": policy.num_parameters(),
        "policy_matrices": matrix_weights(policy.base_model),
        "output_matrix": policy.get_output_embeddings().weight.numel(),
        "scorer_matrices": matrix_weights(scorer.base_model),
        "prompt_tokens": sum(map(len, ids)) / len(ids),
        "pad_id": tokenizer.pad_token_id,
    }
    write_json(folder / "about.json", about)
    return about


def matrix_weights(backbone):
    """Weights of a backbone that every token is multiplied with: all matrices but the embeddings."""
    from torch import nn

    embedded = {id(m.weight) for m in backbone.modules() if isinstance(m, nn.Embedding)}
    return sum(p.numel() for p in backbone.parameters() if p.dim() == 2 and id(p) not in embedded)


def unavoidable_flop(about, prompt_tokens, response_tokens, epochs):
    """FLOP of one update on so many tokens: see `of limit` above."""
    tokens, policy, scorer = prompt_tokens + response_tokens, about["policy_matrices"], about["scorer_matrices"]
    head = about["output_matrix"] * response_tokens
    read = 2 * (2 * policy * tokens + 2 * scorer * tokens + 2 * head)  # policy and reference, scorer and critic
    return read + 6 * epochs * (policy * tokens + scorer * tokens + head)


def run_arm(arm, folder, args):
    """Start the process of an arm, wait for it, read what it found. Raises RuntimeError where that cannot be right."""
    (folder / "result.json").unlink(missing_ok=True)
    environment = os.environ | {
        "OMP_NUM_THREADS": str(args.threads),
        "CUDA_VISIBLE_DEVICES": "",  # resident memory says nothing about a GPU's
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRL_EXPERIMENTAL_SILENCE": "1",
    }
    if args.bf16:  # TRL's Accelerator reads nothing else
        environment["ACCELERATE_MIXED_PRECISION"] = "bf16"
    code = "import sys; from benchmarks.ppo_vs_trl import work; work(*sys.argv[1:])"
    command = [sys.executable if arm == "ours" else args.trl_python, "-c", code, arm, str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the arm '{arm}' ended with code {done.returncode}:\n{done.stderr[-4000:]}")
    result = json.loads((folder / "result.json").read_text())
    check(arm, result, args.steps)
    return result


def check(arm, result, steps):
    """Every update took place, KL starts at 0, and every stage read something."""
    if not len(result["updates"]) == len(result["kl"]) == steps:
        raise RuntimeError(f"the arm '{arm}' took {len(result['updates'])} updates, not {steps}")
    if abs(result["kl"][0]) > 1e-3:
        raise RuntimeError(f"the arm '{arm}' starts at KL {result['kl'][0]:.4f}, not at 0: policy and reference differ")
    for stage in STAGES:
        if not all(update.get(stage, {}).get("positions") for update in result["updates"]):
            raise RuntimeError(f"the arm '{arm}' has an update in which no model reads a token in the stage `{stage}`")


def mean_seconds(run, skip):
    """Seconds of an update, over all but the first `skip`."""
    return statistics.mean(sum(part["seconds"] for part in update.values()) for update in run["updates"][skip:])


def summarize(runs, about, args):
    """Medians of every arm over its repeats, and the median ratio of the repeats.

    `runs`: {arm: one result a repeat}; `about`: what prepare() returned. Warm-up updates are left out of all but `kl`.
    """
    limit, skip, arms = max(run["limit"] for repeats in runs.values() for run in repeats), args.warmup_steps, {}
    for arm, repeats in runs.items():
        prompts, speeds, shares, tokens_per_second = about["prompt_tokens"] * args.global_batch_size, [], [], []
        stages, padding, positions, needed = {}, {}, 0, 0
        for run in repeats:
            updates = run["updates"][skip:]
            responses = statistics.mean(run["response_length"][skip:]) * args.global_batch_size
            seconds = mean_seconds(run, skip)
            speeds.append(seconds)
            tokens_per_second.append((prompts + responses) / seconds)
            flop = unavoidable_flop(about, prompts, responses, args.num_ppo_epochs)
            shares.append(flop / seconds / limit)
            needed += (prompts + responses) * len(updates)
            for stage in (*STAGES, "other"):
                parts = [update[stage] for update in updates if stage in update]
                stages.setdefault(stage, []).append(sum(part["seconds"] for part in parts) / len(updates))
                total = padding.setdefault(stage, [0, 0])
                total[0] += sum(part["padding"] for part in parts)
                total[1] += sum(part["positions"] for part in parts)
                positions += sum(part["positions"] for part in parts)
        padding["all"] = [sum(part[i] for part in padding.values()) for i in (0, 1)]
        arms[arm] = {
            "seconds_per_update": statistics.median(speeds),
            "fastest": min(speeds),
            "slowest": max(speeds),
            "tokens_per_second": statistics.median(tokens_per_second),
            "peak_mb": statistics.median(run["peak_mb"] for run in repeats),
            "start_mb": statistics.median(run["start_mb"] for run in repeats),
            "stages": {stage: statistics.median(seconds) for stage, seconds in stages.items()},
            "padding": {stage: hidden / read for stage, (hidden, read) in padding.items() if read},
            "positions_per_token": positions / needed,
            "of_limit": statistics.median(shares),
            "kl_at_start": repeats[0]["kl"][0],
            "response_length": statistics.mean(n for run in repeats for n in run["response_length"][skip:]),
            "score": statistics.mean(s for run in repeats for s in run["score"][skip:]),
        }

    pairs = zip(runs["ours"], runs["trl"], strict=True)
    return {
        "ratio": statistics.median(mean_seconds(trl, skip) / mean_seconds(ours, skip) for ours, trl in pairs),
        "memory_ratio": arms["ours"]["peak_mb"] / arms["trl"]["peak_mb"],
        "matmul_gflops": limit / 1e9,
        "arms": arms,
    }


def table(result):
    """The arms as aligned text, one line each, then their stages."""
    lines = ["        s/update (min-max)     tokens/s  peak MB  start MB  padding  positions  of limit  length  score"]
    for arm, a in result["arms"].items():
        speed = f"{a['seconds_per_update']:6.3f} ({a['fastest']:.3f}-{a['slowest']:.3f})"
        memory = f"{a['tokens_per_second']:8.0f} {a['peak_mb']:8.0f} {a['start_mb']:9.0f}"
        shares = f"{a['padding']['all']:8.1%} {a['positions_per_token']:10.2f} {a['of_limit']:9.1%}"
        lines.append(f"{arm:7} {speed:22} {memory} {shares} {a['response_length']:7.2f} {a['score']:6.3f}")
    lines += ["", "seconds, and padding, by stage"]
    for arm, a in result["arms"].items():
        parts = (
            f"{s} {t:.3f}" + (f" ({a['padding'][s]:.1%})" if s in a["padding"] else "") for s, t in a["stages"].items()
        )
        lines.append(f"{arm:7} " + "   ".join(parts))
    return "\n".join(lines)


def check_trl(python):
    """Versions of the interpreter that runs TRL. Raises InputError where it is not 1.12, or torch is another."""
    versions = shared.check_trl(python, INSTALL)
    if not versions["trl"].startswith("1.12."):
        raise InputError(f"--trl_python {python}: has TRL {versions['trl']}, PPO was last in 1.12; {INSTALL}")
    return versions


def main(args: Args):
    """Prints a table and, as the last line, the result as JSON. Raises InputError where TRL 1.12 or prompts are missing."""
    if not 0 <= args.warmup_steps < args.steps:
        raise InputError("--steps: must exceed --warmup_steps, which are left out")
    if not (args.repeats and args.threads and args.num_ppo_epochs and args.num_mini_batches and args.response_length):
        raise InputError(
            "--repeats, --threads, --num_ppo_epochs, --num_mini_batches, --response_length: must be positive"
        )
    if args.global_batch_size % (args.per_device_train_batch_size * args.num_mini_batches):
        raise InputError("--global_batch_size: must be a multiple of micro-batch x --num_mini_batches")
    versions = check_trl(args.trl_python)
    for name in ("model_name_or_path", "reward_model_path"):  # the arms run in the repository's folder
        setattr(args, name, str(Path(getattr(args, name)).resolve()))
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_json(folder / "args.json", asdict(args))
        about = prepare(args, folder)
        million, prompt = about["parameters"] / 1e6, about["prompt_tokens"]
        print(
            f"{million:.1f} M parameters, {args.global_batch_size} prompts an update of {prompt:.1f} tokens each",
            end="",
        )
        print(f", {args.threads} threads, torch {versions['torch']}, TRL {versions['trl']}", flush=True)
        runs = {arm: [] for arm in ARMS}
        for repeat in range(args.repeats):
            for arm in ARMS[:: -1 if repeat % 2 else 1]:
                run = run_arm(arm, folder, args)
                runs[arm].append(run)
                speed = mean_seconds(run, args.warmup_steps)
                print(f"  repeat {repeat + 1}, {arm}: {speed:.3f} s/update, {run['peak_mb']:.0f} MB", flush=True)
    kept = {k: v for k, v in asdict(args).items() if k not in ("trl_python", "model_name_or_path", "reward_model_path")}
    result = summarize(runs, about, args) | about | {"versions": versions, "settings": kept}
    print(table(result))
    print(f"ours takes 1 / {result['ratio']:.2f} of TRL's time, at {result['memory_ratio']:.2f} times its peak memory")
    print(json.dumps(json.loads(json.dumps(result), parse_float=lambda digits: round(float(digits), 6))))


if __name__ == "__main__":
    run_cli(main, Args, __doc__)
