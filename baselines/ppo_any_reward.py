"""ppo_sr.py with a scorer that reads text: of another tokenizer, an encoder, a Python function.

    python -m baselines.ppo_any_reward --reward_model_path ENCODER ...          flags of ppo_sr.py
    python -m baselines.ppo_any_reward --reward_function module:function ...

The policy's tokens mean nothing to such a scorer. So the critic cannot start from it, and starts
from the policy, at V = 0.
"""

from dataclasses import dataclass

import torch

import ppo_sr
from ppo_sr import PPO, Critic
from utils import DEVICE, InputError, answer_end, check_fits, decode, encode_pair, load_function
from utils import load_scorer, load_tokenizer, print_once, run_cli, score_texts, stop_ids


@dataclass
class Args(ppo_sr.Args):
    reward_model_path: str | None = None
    """any scorer: a causal LM or an encoder, with any tokenizer"""
    reward_function: str | None = None
    """module:function(prompts, responses) -> scores, in the place of a scorer"""


class AnyReward(PPO):
    def load_scorer(self):
        args, path = self.args, self.args.reward_model_path
        if (path is None) == (args.reward_function is None):
            raise InputError("--reward_model_path, --reward_function: give one of them")
        if args.reward_function:
            return load_function(args.reward_function, "--reward_function")
        self.scorer_tokenizer = load_tokenizer(path)
        scorer = load_scorer(path, self.scorer_tokenizer, frozen=True)
        check_fits(scorer.model, self.scorer_tokenizer, args.max_length)
        self.try_prompts(scorer.is_encoder)
        return scorer

    def try_prompts(self, is_encoder):
        """The scorer's template may refuse a prompt that the policy's takes: not in mid-run."""
        args, answer = self.args, " a" * self.args.response_length
        tests = [rows for rows, _, _ in self.tests.values()]
        names = args.dataset_name, *args.eval_dataset_names
        for name, rows in zip(names, [self.rows, *tests], strict=True):
            for number, row in enumerate(rows, 1):
                where = f"{name}, line {number}, read by {args.reward_model_path}"
                how = args.max_length, True, where, is_encoder
                encode_pair(self.scorer_tokenizer, row["prompt"], answer, *how)

    def load_critic(self, policy):
        scorer = load_scorer(self.args.model_name_or_path, self.tokenizer, trained=False)
        return Critic(scorer, 0.0)

    def read_scorer(self, rows, sequences):
        """(batch,): of the texts, in the form in which the scorer was trained."""
        responses = [y for _, y in sequences]
        stops, pairs = stop_ids(self.policy, self.tokenizer), []
        texts = decode(self.tokenizer, responses, stops)
        if self.args.reward_function:
            scores = self.scorer([row["prompt"] for row in rows], texts)
            return torch.tensor(scores, device=DEVICE)
        tokenizer, is_encoder = self.scorer_tokenizer, self.scorer.is_encoder
        for row, text, y in zip(rows, texts, responses, strict=True):
            how = self.args.max_length, True, "a response", is_encoder
            ids, prompt_len, cut = encode_pair(tokenizer, row["prompt"], text, *how)
            if cut:
                print_once("the scorer's tokenizer needs more than --max_length; texts are cut")
            if y[-1] not in stops and not is_encoder and ids[-1] == answer_end(tokenizer):
                ids = ids[:-1]  # the response was cut: it has no end
            pairs.append((ids, prompt_len))
        how = self.args.per_device_eval_batch_size, self.args.bf16
        r, e = score_texts(self.scorer, tokenizer, pairs, *how)
        return torch.tensor(r - e, dtype=torch.float32, device=DEVICE)


def main(args: Args):
    ppo_sr.main(args, AnyReward)


if __name__ == "__main__":
    run_cli(main, Args, __doc__)
