"""Supervised fine-tuning: the starting policy pi_init, which the paper takes as given (§2).

    for each batch of (prompt x, response y):
        minimise  - sum_t log pi(y_t | x, y_<t) / number of response tokens
        (the prompt is read, and not learned)

From a Hugging Face causal LM (--model_name_or_path), or from scratch with a small GPT-2 of
--num_layers x --hidden_size over any tokenizer folder, as the toy world does:

    python -m miniature.world --output_dir data/toy
    python sft.py --tokenizer_name_or_path data/toy/tokenizer --dataset_name data/toy/sft.jsonl \\
        --output_dir runs/sft --learning_rate 1e-3 --num_train_epochs 3

The loss is the mean over the response tokens of the global batch, so it does not depend on
--per_device_train_batch_size.
"""

import math
from dataclasses import dataclass

import torch

from utils import DEVICE, Bound, Count, InputError, LearningRate, Length, Natural, Share, Weight
from utils import autocast, backend, check_fits, encode_rows, in_one_line, length_batches
from utils import load_policy, load_rows, load_tokenizer, pad, progress, response_logprobs, run_cli
from utils import run_log


@dataclass
class Args:
    dataset_name: str
    """demonstrations: .jsonl, .jsonl.gz, .parquet or a hub id, rows with `prompt` and `response`"""
    output_dir: str
    """the run folder; the policy is written to its model/"""
    model_name_or_path: str | None = None
    """causal LM to start from (folder or hub id); without it a small GPT-2 is made from scratch"""
    tokenizer_name_or_path: str | None = None
    """tokenizer folder or hub id; the model's own by default, required from scratch"""
    num_layers: Count = 4
    """layers of a model from scratch (toy world: 4 x 128)"""
    hidden_size: Count = 128
    """width of a model from scratch"""
    num_heads: Count = 4
    """attention heads of a model from scratch"""
    learning_rate: LearningRate = 1e-5
    """peak learning rate of AdamW (usual if pre-trained; from scratch 1e-3 to 3e-3)"""
    warmup_ratio: Share = 0.1
    """share of steps with linear warm-up (the scorer's schedule, paper §4.2)"""
    min_lr_ratio: Share = 0.1
    """the cosine ends at this share of the peak (the scorer's schedule, paper §4.2)"""
    weight_decay: Weight = 0.0
    """AdamW's decoupled weight decay"""
    max_grad_norm: Bound = 1.0
    """gradients of a larger norm are scaled down to it"""
    num_train_epochs: Count = 1
    """passes over the data"""
    global_batch_size: Count = 64
    """rows per optimiser step"""
    per_device_train_batch_size: Count = 4
    """rows per forward pass; gradients add up over the global batch"""
    max_length: Length = 512
    """tokens of prompt and response together"""
    truncate_prompts: bool = False
    """cut texts that are longer, instead of refusing them"""
    save_steps: Natural = 0
    """steps between two checkpoints that --resume can start from (0: none)"""
    resume: bool = False
    """go on from the checkpoint in output_dir; numbers are those of an unstopped run"""
    seed: Natural = 1
    """seed of initialisation and data order"""
    bf16: bool = False
    """matrix products in bfloat16 over float32 weights"""


def warmup_cosine(steps, warmup_ratio, min_lr_ratio):
    """Factor on the learning rate: linear warm-up, then a cosine to min_lr_ratio (paper §4.2)."""
    warmup = max(1, round(steps * warmup_ratio))

    def factor(step):
        progress = min(1.0, max(0, step - warmup) / max(1, steps - warmup))
        cosine = min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
        return min((step + 1) / warmup, cosine)

    return factor


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
    with in_one_line("--hidden_size, --num_heads"):
        return AutoModelForCausalLM.from_config(config)


def main(args: Args):
    # --- set up -----------------------------------------------------------------------------------
    start = args.tokenizer_name_or_path or args.model_name_or_path
    if not start:
        remedy = "or give --tokenizer_name_or_path for a model from scratch"
        raise InputError(f"--model_name_or_path: missing; {remedy}")
    rows = load_rows(args.dataset_name, {"prompt": "prompt", "response": "response"})
    tokenizer = load_tokenizer(start)
    texts = encode_rows(tokenizer, rows, ["response"], args, args.dataset_name)
    data = [text for [text] in texts]  # (ids, prompt_len)
    torch.manual_seed(args.seed)
    if args.model_name_or_path:
        model = load_policy(args.model_name_or_path)
    else:
        model = model_from_scratch(args, tokenizer).to(DEVICE)
    check_fits(model, tokenizer, max(len(ids) for ids, _ in data))
    steps = args.num_train_epochs * -(-len(data) // args.global_batch_size)
    schedule = warmup_cosine(steps, args.warmup_ratio, args.min_lr_ratio)
    options = args.learning_rate, schedule, args.weight_decay, args.max_grad_norm
    engine = backend.engine(model, *options)
    log = run_log(args, engine=engine)
    print(f"demonstrations {len(data)}, steps {steps}")

    # --- train ------------------------------------------------------------------------------------
    model.train()
    order = torch.Generator().manual_seed(args.seed)
    epochs = [torch.randperm(len(data), generator=order) for _ in range(args.num_train_epochs)]
    batches = [batch.tolist() for epoch in epochs for batch in epoch.split(args.global_batch_size)]
    lengths = [len(ids) for ids, _ in data]
    bar = progress(batches[log.step :], "SFT", log.step)  # skip what a stopped run did
    for step, batch in enumerate(bar, log.step + 1):
        num_tokens = sum(len(data[i][0]) - data[i][1] for i in batch)
        losses = []
        size = args.per_device_train_batch_size
        for part in backend.deal(length_batches(lengths, size, batch)):
            ids, mask = pad([data[i][0] for i in part], tokenizer.pad_token_id)
            prompt_lens = torch.tensor([data[i][1] for i in part], device=ids.device)
            with autocast(args.bf16):
                logprobs, response_mask = response_logprobs(engine, ids, mask, prompt_lens)
            # this part's share of a mean over the tokens of the global batch
            loss = -logprobs[response_mask].sum() / num_tokens
            engine.backward(loss)
            losses.append(loss.detach().double())
        learning_rate = engine.scheduler.get_last_lr()[0]
        norm = log.take_step(engine, "", step, [rows[i] for i in batch])
        loss = backend.add_up(losses).item()
        log.write(step, {"loss": loss, "grad_norm": norm, "lr": learning_rate})
        if args.save_steps and step % args.save_steps == 0:
            log.save(step)
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)

    # --- save -------------------------------------------------------------------------------------
    log.finish("policy", engine, tokenizer)


if __name__ == "__main__":
    run_cli(main, Args, __doc__)
