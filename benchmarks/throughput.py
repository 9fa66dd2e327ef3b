"""Tokens per second of sampling and of training at the shapes of real models, as shares of what the
machine can do.

    python -m benchmarks.throughput --shape qwen2-0.5b      # one GPU, bfloat16
    python -m benchmarks.throughput --shape tiny --batch_size 4 --prompt_length 16 \\
        --response_length 16                                # any machine

Random weights: speed does not depend on them. Two limits are measured first: memory bandwidth (a
copy of 1 GiB, read and written) and matrix products (bfloat16 on a GPU, float32 on a CPU).

    decode   transformers' generate, every response of full length, with a cache that grows
             (`dynamic`) and with one of fixed size, which on a GPU also compiles the step and
             replays it as a CUDA graph (`static`). A step must read all weights once and the cache
             of every sequence, and a token costs little arithmetic; so the limit is
             (bytes of weights + bytes of cache at half the response) / bandwidth
    train    forward and backward pass of utils.response_logprobs, plain, compiled, and with
             gradient checkpointing. The work is 6 FLOP per weight of the layers and token, and 6
             per weight of the output matrix and response token (Kaplan et al. 2020), and
             attention's 6 x seq_len x width a token and layer (causal: half of 12); what a
             checkpoint computes again is no work

The last line is one JSON object.
"""

import json
import time
from dataclasses import dataclass
from typing import Literal

import torch

from utils import DEVICE, InputError, environment, response_logprobs, run_cli

LLAMA = dict(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32)
QWEN2 = dict(hidden_size=896, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2)
SHAPES = {  # of config.json: Llama 2 7B, Qwen2 0.5B, and one for the tests
    "llama-7b": LLAMA | dict(intermediate_size=11008, vocab_size=32000, model_type="llama"),
    "qwen2-0.5b": QWEN2 | dict(intermediate_size=4864, vocab_size=151936, tie_word_embeddings=True, model_type="qwen2"),
    "tiny": dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    | dict(intermediate_size=128, vocab_size=256, tie_word_embeddings=True, model_type="qwen2"),
}


@dataclass
class Args:
    shape: Literal["qwen2-0.5b", "llama-7b", "tiny"] = "qwen2-0.5b"
    """the model's shape"""
    batch_size: int = 256
    """sequences that are sampled together"""
    train_batch_size: int = 16
    """sequences of a training forward pass"""
    prompt_length: int = 256
    """tokens of every prompt"""
    response_length: int = 256
    """tokens of every response"""
    repeats: int = 3
    """the best of so many counts, after one that warms up and compiles"""
    compile: bool = True
    """also time the compiled training pass (needs a C++ compiler)"""


def build(shape):
    """A causal LM of this shape with random weights: bfloat16 on a GPU, float32 on a CPU."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**SHAPES[shape], max_position_embeddings=4096)
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    with DEVICE:
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def seconds_of(function, repeats):
    times = []
    for _ in range(repeats + 1):
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def limits(repeats):
    """Bytes per second of a copy, FLOP per second of a matrix product."""
    gpu = DEVICE.type == "cuda"
    source = torch.ones(2**28 if gpu else 2**26, device=DEVICE)
    target, n = torch.empty_like(source), 8192 if gpu else 2048
    copy = seconds_of(lambda: target.copy_(source), repeats)
    a = torch.ones(n, n, device=DEVICE, dtype=torch.bfloat16 if gpu else torch.float32)
    return 2 * source.nbytes / copy, 2 * n**3 / seconds_of(lambda: a @ a, repeats)


def decode_bytes(model, batch_size, length):
    """What a step of sampling must read: all weights (a tied output matrix is its embedding), and
    keys and values of `length` tokens of every sequence."""
    config = model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    weights = sum(p.nbytes for p in model.parameters())
    if not config.tie_word_embeddings:
        weights -= model.get_input_embeddings().weight.nbytes  # a few rows of it are looked up
    size = model.dtype.itemsize
    return weights + 2 * config.num_hidden_layers * config.num_key_value_heads * head * size * length * batch_size


def train_flop(model, batch_size, prompt_length, response_length):
    """Forward and backward pass over full sequences: see the top of the file."""
    config, seq_len = model.config, prompt_length + response_length
    output = model.get_output_embeddings().weight.numel()
    layers = sum(p.numel() for p in model.base_model.parameters()) - model.get_input_embeddings().weight.numel()
    attention = 6 * seq_len * config.hidden_size * config.num_hidden_layers  # a token
    return batch_size * (seq_len * (6 * layers + attention) + response_length * 6 * output)


def time_decode(model, args):
    ids = torch.randint(0, 255, (args.batch_size, args.prompt_length), device=DEVICE)
    length = dict(min_new_tokens=args.response_length, max_new_tokens=args.response_length)
    plain = dict(do_sample=True, top_k=0, top_p=1.0, temperature=1.0, pad_token_id=0, eos_token_id=255) | length
    model.eval()
    rows = {}
    for cache in ("dynamic", "static"):
        flags = plain | ({"cache_implementation": "static"} if cache == "static" else {})
        with torch.no_grad():
            seconds = seconds_of(
                lambda: model.generate(ids, attention_mask=torch.ones_like(ids), **flags),
                args.repeats,
            )
        rows[cache] = {
            "tokens_per_second": ids.shape[0] * args.response_length / seconds,
            "seconds": seconds,
        }
    return rows


def time_train(model, args):
    size, seq_len = args.train_batch_size, args.prompt_length + args.response_length
    ids = torch.randint(0, 255, (size, seq_len), device=DEVICE)
    mask, prompt_lens = (
        torch.ones_like(ids, dtype=torch.bool),
        torch.full((size,), args.prompt_length, device=DEVICE),
    )

    def step():
        response_logprobs(model, ids, mask, prompt_lens)[0].mean().backward()
        model.zero_grad()

    model.train()
    plain, backbone, rows = model.base_model.forward, model.base_model, {}
    for kind in ("plain", "compiled", "checkpointed"):
        if kind == "compiled" and not args.compile:
            continue
        if kind == "compiled":
            backbone.forward = torch.compile(plain)
        if kind == "checkpointed":
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if DEVICE.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = seconds_of(step, args.repeats)
        rows[kind] = {"tokens_per_second": size * seq_len / seconds, "seconds": seconds}
        if DEVICE.type == "cuda":
            rows[kind]["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        backbone.forward = plain
    return rows


def main(args: Args):
    if min(args.prompt_length, args.response_length, args.repeats) < 1:
        raise InputError("--prompt_length, --response_length, --repeats: must be positive")
    torch.manual_seed(1)
    model = build(args.shape)
    bandwidth, flops = limits(args.repeats)
    decode, train = time_decode(model, args), time_train(model, args)
    for row in decode.values():
        half = args.prompt_length + args.response_length // 2
        step = decode_bytes(model, args.batch_size, half) / bandwidth
        row["of_bandwidth"] = step * args.response_length / row["seconds"]
    for row in train.values():
        work = train_flop(model, args.train_batch_size, args.prompt_length, args.response_length)
        row["of_matrix_limit"] = work / row["seconds"] / flops
    found = f"copy {bandwidth / 1e9:.0f} GB/s, matrix products {flops / 1e12:.2f} TFLOP/s"
    print(f"{found}, {model.num_parameters():,} weights")
    for stage, rows in (("decode", decode), ("train", train)):
        for kind, row in rows.items():
            print(f"{stage:7} {kind:13}" + "  ".join(f"{k} {v:.3g}" for k, v in row.items()))
    result = {
        "args": vars(args),
        "bandwidth": bandwidth,
        "flops": flops,
        "decode": decode,
        "train": train,
    }
    print(json.dumps(result | environment()))
    return result


if __name__ == "__main__":
    run_cli(main, Args, __doc__)
