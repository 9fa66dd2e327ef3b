"""Supervised fine-tuning: the starting policy pi_init, which the paper takes as given (§2).

    for each batch of (prompt x, response y):
        minimise  - sum_t log pi(y_t | x, y_<t) / number of response tokens          the prompt is not trained on

From a Hugging Face causal LM (--model_name_or_path), or from scratch with a small GPT-2 of --num_layers x --hidden_size
over any tokenizer folder (--tokenizer_name_or_path), as the toy world does:

    python toy_world.py --output_dir data/toy
    python sft.py --tokenizer_name_or_path data/toy/tokenizer --dataset_name data/toy/sft.jsonl \\
        --output_dir runs/sft --learning_rate 1e-3 --num_train_epochs 3

Rows are JSON Lines with `prompt` (a string or messages) and `response`. The loss is the mean over response tokens of
the global batch, so it does not depend on --per_device_train_batch_size.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from tqdm import tqdm

from data import encode_pair, load_rows, load_tokenizer
from engines import EngineArgs, make_engine, rank, save_model, total
from utils import InputError, RunLog, autocast, check_finite, check_positions, dealt_batches, load_checkpoint
from utils import load_policy, pad, response_logprobs, run_cli, save_checkpoint, warmup_cosine


@dataclass
class Args(EngineArgs):
    dataset_name: str
    """demonstrations: .jsonl, .jsonl.gz, .parquet or a hub id, with `prompt` and `response`"""
    output_dir: str
    """the run folder; the policy is written to its model/"""
    model_name_or_path: str | None = None
    """causal LM to start from (folder or hub id); without it a small GPT-2 is made from scratch"""
    tokenizer_name_or_path: str | None = None
    """tokenizer folder or hub id; the model's own by default, required from scratch"""
    num_layers: int = 4
    """layers of a model from scratch (toy world: 4 x 128)"""
    hidden_size: int = 128
    """width of a model from scratch"""
    num_heads: int = 4
    """attention heads of a model from scratch"""
    learning_rate: float = 1e-5
    """peak learning rate of AdamW (a common value for pre-trained models; 1e-3 from scratch)"""
    warmup_ratio: float = 0.1
    """share of steps with linear warm-up (the scorer's schedule, paper §4.2)"""
    min_lr_ratio: float = 0.1
    """the cosine ends at this share of the peak (the scorer's schedule, paper §4.2)"""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay"""
    max_grad_norm: float = 1.0
    """global gradient norm above which gradients are scaled down"""
    num_train_epochs: int = 1
    """passes over the data"""
    global_batch_size: int = 64
    """rows per optimiser step"""
    per_device_train_batch_size: int = 64
    """rows per forward pass; gradients accumulate up to the global batch"""
    max_length: int = 512
    """tokens of prompt and response together; longer prompts keep their end"""
    truncate_prompts: bool = False
    """shorten a prompt that fills --max_length by itself instead of refusing it"""
    save_steps: int = 0
    """steps between two checkpoints that --resume can start from (0: none)"""
    resume: bool = False
    """go on from the checkpoint in output_dir, to the same numbers as a run that was never stopped"""
    seed: int = 1
    """seed of initialisation and data order"""
    bf16: bool = False
    """matrix products in bfloat16 over float32 weights"""
    report_to: Literal["none", "tensorboard", "wandb"] = "none"
    """mirror the metrics to `tensorboard` or `wandb`"""


def model_from_scratch(args, tokenizer):
    from transformers import AutoModelForCausalLM, GPT2Config

    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=args.max_length,
        n_embd=args.hidden_size,
        n_layer=args.num_layers,
        n_head=args.num_heads,
        activation_function="relu",  # cheapest on CPU, and as good at this size
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return AutoModelForCausalLM.from_config(config)


def main(args: Args):
    # --- set up -----------------------------------------------------------------------------------------------------
    if not (args.model_name_or_path or args.tokenizer_name_or_path):
        raise InputError("--model_name_or_path: missing; or give --tokenizer_name_or_path for a model from scratch")
    rows = load_rows(args.dataset_name, {"prompt": "prompt", "response": "response"})
    tokenizer = load_tokenizer(args.tokenizer_name_or_path or args.model_name_or_path)
    data = []
    for i, row in enumerate(rows, 1):
        where = f"{args.dataset_name}, line {row.get('file_line', i)}"
        ids, prompt_len, _ = encode_pair(
            tokenizer, row["prompt"], row["response"], args.max_length, args.truncate_prompts, where
        )
        data.append((ids, prompt_len))
    torch.manual_seed(args.seed)
    if args.model_name_or_path:
        model = load_policy(args.model_name_or_path)
    else:
        model = model_from_scratch(args, tokenizer)
    check_positions(model, max(len(ids) for ids, _ in data))
    steps = args.num_train_epochs * -(-len(data) // args.global_batch_size)
    schedule = warmup_cosine(steps, args.warmup_ratio, args.min_lr_ratio)
    engine = make_engine(args, model, args.learning_rate, schedule, args.weight_decay, args.max_grad_norm)
    saved = load_checkpoint(args.output_dir, args) if args.resume else None
    done = saved["step"] if saved else 0
    if saved:
        engine.load_state(saved["engine"])
    log = RunLog(args, [args.dataset_name], done)
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())  # ZeRO-3 holds a share
    print(f"{len(data)} demonstrations, {steps} steps, {parameters:,} parameters")

    # --- train ------------------------------------------------------------------------------------------------------
    model.train()
    order = torch.Generator().manual_seed(args.seed)
    step = 0
    progress = tqdm(total=steps, initial=done, desc="sft", disable=rank() > 0 or None)
    for _ in range(args.num_train_epochs):
        for batch in torch.randperm(len(data), generator=order).split(args.global_batch_size):
            step += 1
            if step <= done:
                continue
            lengths = [len(data[i][0]) for i in batch]
            tokens = sum(len(data[i][0]) - data[i][1] for i in batch)
            nll = 0.0
            for micro, weight in dealt_batches(lengths, args.per_device_train_batch_size):
                micro = [data[batch[j]] for j in micro]
                ids, mask = pad([ids for ids, _ in micro], tokenizer.pad_token_id)
                prompt_lens = torch.tensor([n for _, n in micro], device=ids.device)
                with autocast(args.bf16):
                    logprobs, response_mask = response_logprobs(engine, ids, mask, prompt_lens)
                loss = -weight * logprobs[response_mask].sum() / tokens  # a mean over the tokens of the global batch
                engine.backward(loss)
                nll += loss.item()
            nll, lr = total(nll), engine.scheduler.get_last_lr()[0]
            grad_norm = engine.step()
            check_finite("gradient norm", grad_norm, step, log.folder, [rows[i] for i in batch])
            log.write(step, {"loss": nll, "grad_norm": grad_norm, "lr": lr})
            if args.save_steps and step % args.save_steps == 0:
                save_checkpoint(log.folder, args, step, {"engine": engine})
            progress.update()
            progress.set_postfix(loss=f"{nll:.3f}")
    progress.close()

    # --- save -------------------------------------------------------------------------------------------------------
    save_model(engine, log.folder / "model", tokenizer)
    print(f"policy written to {log.folder / 'model'}")


if __name__ == "__main__":
    run_cli(main, Args, __doc__)
