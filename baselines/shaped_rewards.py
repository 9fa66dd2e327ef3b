"""ppo_sr.py with a reward made from the scorer's: what others do where the paper has its AM.

    --shape        the reward r(x, y) becomes
    bounded        mean over k of s(r(x, y) - r(x, y_k)), in (0, 1)         PAR: Fu et al. 2025
    contrastive    r(x, y) - mean over k of r(x, y_k)                       Shen et al. 2024
    task           (r(x, y) - mean of the task) / std of the task           centred, one scale
    length         r(x, y) - length_coef x tokens of y                      a length penalty

    python -m baselines.shaped_rewards --shape bounded \\
        --model_name_or_path runs/sft/model --reward_model_path runs/rm/model \\
        --dataset_name data/toy/prompts_train.jsonl --output_dir runs/par --total_steps 30 \\
        --learning_rate 5e-4 --critic_learning_rate 5e-4 --global_batch_size 128 \\
        --num_ppo_epochs 1 --num_mini_batches 2 --response_length 24 --max_length 64 \\
        --per_device_train_batch_size 64 --per_device_eval_batch_size 256

s is the sigmoid. y_1 ... y_K are answers of pi_init, sampled once before step 1, so that the mean
of r(x, y_k) is e(x) of Eq. 7 with pi_init in the place of pi: `contrastive` is the advantage model
of Eq. 5 by sampling, without its bound, and `bounded` has a bound, too. `task` takes mean and std
of r over the answers of pi_init to all prompts of a task (rows need a `task`).

Other flags are ppo_sr.py's. The critic starts at V = 0 (length: from the scorer).
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch

import ppo_sr
from utils import DEVICE, Count, InputError, Weight, load_scorer, run_cli, seeded


@dataclass
class Args(ppo_sr.Args):
    shape: Literal["bounded", "contrastive", "task", "length"] = "bounded"
    """what becomes of r"""
    num_reference_answers: Count = 4
    """K, answers of pi_init to every prompt (length: none)"""
    length_coef: Weight = 0.02
    """paid for each token, in units of the score (length)"""


def bounded(score, reference_scores):  # (batch,), (batch, K)
    """PAR:  1/K sum_k s(r - r_k): how often y would be preferred to an answer of pi_init [Eq. 1].

    Far above all references the gradient vanishes: more score buys nothing.
    """
    return torch.sigmoid(score[:, None] - reference_scores).mean(1)


def contrastive(score, reference_scores):  # (batch,), (batch, K)
    """r - 1/K sum_k r_k: nothing is gained where pi_init is already as good."""
    return score - reference_scores.mean(1)


def task_statistics(tasks, reference_scores):  # a task a prompt; (prompts, K)
    """{task: (mean, std)} of the scores of pi_init's answers."""
    found = {}
    for task in {*tasks}:
        of_task = reference_scores[[other == task for other in tasks]]
        found[task] = of_task.mean().item(), max(of_task.std().item(), 1e-4)
    return found


class Shaped(ppo_sr.PPO):
    def __init__(self, args):
        super().__init__(args)
        if args.shape == "task" and not all("task" in row for row in self.rows):
            problem = "has rows without a `task`"
            raise InputError(f"--dataset_name {args.dataset_name}: {problem}, which --shape needs")
        if args.shape != "length":
            self.answer_all_prompts()

    def answer_all_prompts(self):
        """The policy is pi_init still: also in a resumed run, whose weights are loaded later."""
        k = self.args.num_reference_answers
        rows, prompts = ([one for one in of for _ in range(k)] for of in (self.rows, self.prompts))
        print(f"{len(prompts)} reference answers to {len(self.prompts)} prompts")
        with seeded(self.args.seed):
            responses = self.sample(prompts)
        scores = self.read_scorer(rows, list(zip(prompts, responses, strict=True)))
        scores = scores.view(-1, k)
        # equal prompts share their answers' scores
        self.reference_scores = dict(zip(map(tuple, self.prompts), scores, strict=True))
        tasks = [row.get("task") for row in self.rows]
        self.statistics = task_statistics(tasks, scores)

    def load_critic(self, policy):
        if self.args.shape == "length":
            return super().load_critic(policy)
        scorer = load_scorer(self.args.reward_model_path, self.tokenizer)
        return ppo_sr.Critic(scorer, 0.0)

    def shape(self, rollout):
        """(batch,)"""
        args, scores = self.args, rollout.raw_scores
        if args.shape == "length":
            return scores - args.length_coef * rollout.mask.sum(1)
        if args.shape == "task":
            means, stds = zip(*(self.statistics[row["task"]] for row in rollout.rows), strict=True)
            return (scores - torch.tensor(means, device=DEVICE)) / torch.tensor(stds, device=DEVICE)
        known = torch.stack([self.reference_scores[tuple(x)] for x, _ in rollout.sequences])
        return {"bounded": bounded, "contrastive": contrastive}[args.shape](scores, known)

    def advantages(self, rollout):
        """As in ppo_sr.py, of other scores; what is logged as the score stays the scorer's."""
        return super().advantages(replace(rollout, raw_scores=self.shape(rollout)))


def main(args: Args):
    ppo_sr.main(args, Shaped)


if __name__ == "__main__":
    run_cli(main, Args, __doc__)
