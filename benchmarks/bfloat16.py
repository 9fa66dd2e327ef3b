"""What bfloat16 gives on a CPU, and what it does to PPO's first ratio: one language model, three ways in turn.

    python -m benchmarks.bfloat16 --model_name_or_path models/smollm2            # six minutes of one core

    float32        as without --bf16
    torch's        --bf16 with torch's fused attention
    written out    --bf16 as the scripts run it (plumbing/attention.py)

Columns, for texts of --lengths tokens whose last tenth is the response:

    pass        seconds of one forward and backward pass of log-probs on one core, median of --repeats
    GFLOP/s     6 FLOP per weight of the matrices and token, of the output matrix per response token / seconds
    of limit    that / products of 2048 x 2048 in the same precision
    off 1       largest |ratio - 1| of a response token between two batches: alone, and padded among longer texts
"""

import statistics
import time
from dataclasses import dataclass

import torch

from benchmarks.ppo_vs_trl import matrix_weights
from benchmarks.reward_vs_trl import matmul_limit
from miniature.tables import markdown_table
from utils import Count, autocast, load_policy, pad_pairs, response_logprobs, run_cli

WAYS = {"float32": False, "torch's": True, "written out": True}


@dataclass
class Args:
    model_name_or_path: str = "models/smollm2"
    """a causal LM"""
    lengths: tuple[int, ...] = (40, 128, 256, 512)
    """tokens of a text"""
    tokens: int = 1024
    """of a batch, about"""
    repeats: Count = 3
    """passes of each way, in turned order"""
    seed: int = 1
    """of the texts"""


def main(args: Args):
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    torch.set_num_threads(1)  # process time counts one core's, whatever else runs
    torch.manual_seed(args.seed)
    model = load_policy(args.model_name_or_path)
    attention = {"written out": ALL_ATTENTION_FUNCTIONS["sdpa"], "torch's": sdpa_attention_forward}
    limits = {bf16: matmul_limit(bf16=bf16) for bf16 in (False, True)}
    body, head = matrix_weights(model.base_model), model.get_output_embeddings().weight.numel()
    vocabulary = model.get_input_embeddings().num_embeddings

    def texts(count, length):
        response = max(2, length // 10)
        ids = torch.randint(vocabulary // 2, (count, length)).tolist()
        return [(x[:-response], x[-response:]) for x in ids]

    def logprobs(way, pairs):
        ALL_ATTENTION_FUNCTIONS["sdpa"] = attention.get(way, sdpa_attention_forward)
        with autocast(WAYS[way]):
            found, _ = response_logprobs(model, *pad_pairs(pairs, 0))
        return [row[: len(y)] for row, (_, y) in zip(found, pairs, strict=True)]

    rows = []
    for length in args.lengths:
        batch = texts(max(1, args.tokens // length), length)
        response = len(batch[0][1])
        flop = 6 * len(batch) * (body * length + head * response)
        seconds = {way: [] for way in WAYS}
        for turn in range(args.repeats + 1):  # the first one is left out
            for way in [*WAYS][:: 1 if turn % 2 else -1]:
                start = time.process_time()
                torch.cat(logprobs(way, batch)).sum().backward()
                seconds[way] += [time.process_time() - start] * bool(turn)
                model.zero_grad()
        shorter = [text for n in range(1, 6) for text in texts(1, length - n * max(1, length // 12))]
        for way in WAYS:
            with torch.no_grad():
                together = logprobs(way, [*batch[:1], *shorter])[1:]
                alone = [logprobs(way, [text])[0] for text in shorter]
            off = max(((a - b).exp() - 1).abs().max().item() for a, b in zip(alone, together, strict=True))
            speed = flop / statistics.median(seconds[way])
            cells = f"{statistics.median(seconds[way]):.3g}", f"{speed / 1e9:.0f}", f"{speed / limits[WAYS[way]]:.2f}"
            rows.append((str(length), way, *cells, f"{off:.2g}"))
    ALL_ATTENTION_FUNCTIONS["sdpa"] = attention["written out"]
    print(markdown_table(("tokens", "", "pass, s", "GFLOP/s", "of limit", "off 1"), rows))


if __name__ == "__main__":
    run_cli(main, Args, __doc__)
