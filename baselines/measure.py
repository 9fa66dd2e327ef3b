"""How good is a policy, and how far has it moved? For the baselines without PPO's loop.

They write into metrics.jsonl and samples.jsonl what ppo_sr.py writes, under the same names, so that
every method can be drawn on one axis: eval/SET/gold, score, kl (nats a response), length.
"""

from dataclasses import dataclass

import numpy as np

from utils import Bound, Count, InputError, Length, Natural, Positive, decode, encode_prompts
from utils import forward_batches, generate, load_function, load_rows, response_logprobs, seeded
from utils import stop_ids


@dataclass(kw_only=True)
class Sampling:
    """Flags of what samples; the Args of a baseline inherit them."""

    model_name_or_path: str
    """the policy, after sft.py: folder or hub id"""
    output_dir: str
    """the run folder"""
    response_length: Count = 64
    """tokens of a response, at most"""
    temperature: Positive = 1.0
    """of sampling and of all log-probs alike"""
    max_length: Length = 512
    """tokens of prompt and response together"""
    truncate_prompts: bool = False
    """cut longer ones, do not refuse them"""
    per_device_eval_batch_size: Count = 32
    """in sampling and scoring"""
    seed: Natural = 1
    """of sampling and data order"""
    bf16: bool = False
    """matrix products in bfloat16"""


@dataclass(kw_only=True)
class Training(Sampling):
    """Flags of what trains; the policy goes to output_dir/model."""

    max_grad_norm: Bound = 1.0
    """gradients of a larger norm are scaled down to it"""
    save_steps: Natural = 0
    """steps between two checkpoints that --resume can start from (0: none)"""
    resume: bool = False
    """go on from the checkpoint in output_dir, to the numbers of a run that was never stopped"""
    eval_dataset_names: tuple[str, ...] = ()
    """prompts to answer every --eval_steps"""
    max_eval_prompts: Natural = 0
    """of each file (0: all)"""
    eval_steps: Count = 10
    """between evaluations"""
    gold_reward: str | None = None
    """module:function(prompts, responses), only logged"""


class Measure:
    """Answers the test prompts; made before training, so that wrong files are refused early.

    score: function(rows, texts) -> a number a text, where there is a scorer, which reads a cut
    answer as if it had ended.
    """

    def __init__(self, args, tokenizer, reference, score=None):
        self.args, self.tokenizer, self.reference, self.score = args, tokenizer, reference, score
        self.gold = args.gold_reward and load_function(args.gold_reward, "--gold_reward")
        length = args.max_length, args.response_length, args.truncate_prompts
        self.sets = {}
        for name in args.eval_dataset_names:
            rows = load_rows(name, {"prompt": "prompt"}, args.max_eval_prompts)
            prompts = encode_prompts(tokenizer, rows, *length, name)
            self.sets[name.split("/")[-1].split(".")[0]] = rows, prompts
        if len(self.sets) < len(args.eval_dataset_names):
            raise InputError("--eval_dataset_names: two files have one name")

    def due(self, step, last):
        return step % self.args.eval_steps == 0 or step == last

    def __call__(self, policy, step, log):
        """Means over one answer to each test prompt, the same random numbers every time."""
        args, metrics = self.args, {}
        for label, (rows, prompts) in self.sets.items():
            with seeded(args.seed):
                responses, texts, _ = answer(policy, self.tokenizer, prompts, args)
            how = list(zip(prompts, responses, strict=True)), self.tokenizer, args
            kl = sequence_logprobs(policy, *how) - sequence_logprobs(self.reference, *how)
            found = {"kl": kl.cpu().numpy()}  # log(pi(y | x) / pi_init(y | x)), y ~ pi
            found["length"] = np.array([*map(len, responses)])
            columns = {"score": [None] * len(rows), "gold": [None] * len(rows)}
            if self.score:
                found["score"] = columns["score"] = np.array(self.score(rows, texts))
            if self.gold:
                golds = self.gold([row["prompt"] for row in rows], texts)
                found["gold"] = columns["gold"] = np.array(golds)
            metrics |= {f"eval/{label}/{k}": float(v.mean()) for k, v in found.items()}
            samples = [
                {"step": step, "set": label, "prompt": row["prompt"], "response": text}
                | {"task": row.get("task", "all"), "score": score, "gold": gold}
                for row, text, score, gold in zip(rows, texts, *columns.values(), strict=True)
            ]
            log.append("samples.jsonl", samples)
        return metrics


def answer(policy, tokenizer, prompts, args):
    """y ~ pi(. | x) for each of the prompts (ids) -> their ids, their texts, which are finished."""
    how = args.response_length, args.temperature, args.per_device_eval_batch_size, args.bf16
    responses, stops = generate(policy, tokenizer, prompts, *how), stop_ids(policy, tokenizer)
    finished = np.array([y[-1] in stops for y in responses])
    return responses, decode(tokenizer, responses, stops), finished


def sequence_logprobs(model, sequences, tokenizer, args):
    """log pi(y | x) of all (prompt ids, response ids), without gradients, (sequences,)."""

    def look(*batch):
        return response_logprobs(model, *batch, args.temperature)[:1]

    how = tokenizer.pad_token_id, args.per_device_eval_batch_size, args.bf16
    return forward_batches(look, sequences, *how)[0].sum(1)
