"""Rehearsal of what is being lost: D_R's rows are drawn by how far their log-prob has fallen.

    lost(x, y)  = max(0, log pi_init(y | x) - log pi(y | x)) / tokens of y       before each step
    P(row)      = (1 - u) lost / sum of lost + u / rows                          u: --uniform_share

    python -m baselines.ppo_rehearse_lost --rehearsal_dataset_name runs/select/rehearsal.jsonl ...
                                                                             flags of ppo_sr.py

Eq. 9 takes D_R's rows in turn. Most of them are answered as before, and their gradient is spent on
nothing; a skill that PPO unlearns is seen as seldom as all others. This is not in the paper. The
price is one pass without gradients over D_R a step. metrics.jsonl has the mean as rehearsal/lost.
"""

from dataclasses import dataclass

import torch

import ppo_sr
from utils import InputError, Share, forward_batches, response_logprobs, run_cli


@dataclass
class Args(ppo_sr.Args):
    uniform_share: Share = 0.1
    """u: share of the draws that takes every row alike"""


def draw_shares(lost, uniform_share):  # (rows,)
    """P(row): in proportion to what is lost, mixed with a uniform share; uniform if nothing is."""
    even = torch.full_like(lost, 1 / len(lost))
    if not lost.sum():
        return even
    return (1 - uniform_share) * lost / lost.sum() + uniform_share * even


class RehearseLost(ppo_sr.PPO):
    def __init__(self, args):
        if not (args.rehearsal_dataset_name and args.rehearsal_coef):
            raise InputError("--rehearsal_dataset_name, --rehearsal_coef: nothing to rehearse")
        super().__init__(args)
        self.initial = self.mean_logprobs(self.reference)

    def mean_logprobs(self, model):
        """(1 / tokens) log p(y | x) of every row of D_R, (rows,)."""

        def look(*batch):
            logprobs, mask = response_logprobs(model, *batch, self.args.temperature)
            return [logprobs.sum(1) / mask.sum(1)]

        how = self.tokenizer.pad_token_id, self.args.per_device_eval_batch_size, self.args.bf16
        [means] = forward_batches(look, self.rehearsal, *how)
        return means

    def learn(self, step, rollout, experience, log):
        """PPO's, with this step's rows drawn anew."""
        args = self.args
        lost = (self.initial - self.mean_logprobs(self.policy)).clamp(min=0)
        shares = draw_shares(lost, args.uniform_share)
        count = args.num_ppo_epochs * args.num_mini_batches * self.rehearsal_size
        drawn = torch.multinomial(shares.cpu(), count, replacement=True).tolist()
        self.rehearsal_rows = iter([self.rehearsal[i] for i in drawn])
        metrics = super().learn(step, rollout, experience, log)
        return metrics | {"rehearsal/lost": lost.mean().item()}


def main(args: Args):
    ppo_sr.main(args, RehearseLost)


if __name__ == "__main__":
    run_cli(main, Args, __doc__)
