"""ppo_sr.py with the scores of several scorers, joined to one reward.

    scorers of one aim: where they disagree, none of them knows the answer
    mean                 mean_i r_i                       Coste et al. (2023), "mean"
    min                  min_i r_i                        "worst-case optimization", WCO
    mean_minus_std       mean_i r_i - lambda std_i r_i
    mean_minus_variance  mean_i r_i - lambda var_i r_i    "uncertainty-weighted", UWO, as printed

    two scorers of two aims, the first helpful, the second harmless
    safety_first         r_safe where s(r_safe) < 0.15 or the prompt is tagged, otherwise r_helpful;
                         then whitened                    Llama 2 (Touvron et al. 2023), §3.2.3

    for seed in 1 2 3; do python am_train.py --loss rm --seed $seed --output_dir runs/rm_$seed \\
        --model_name_or_path runs/sft/model --dataset_name data/toy/preferences_train.jsonl \\
        --learning_rate 5e-4 --max_length 64 --global_batch_size 64 \\
        --per_device_train_batch_size 64; done
    python -m baselines.reward_ensemble --reward min --output_dir runs/ppo_min \\
        --model_name_or_path runs/sft/model --dataset_name data/toy/prompts_train.jsonl \\
        --reward_model_path runs/rm_1/model runs/rm_2/model runs/rm_3/model \\
        --response_length 24 --max_length 64 --per_device_train_batch_size 64 \\
        --per_device_eval_batch_size 256 --learning_rate 5e-4 --critic_learning_rate 5e-4 \\
        --global_batch_size 128 --num_ppo_epochs 1 --num_mini_batches 2 --total_steps 20

Bradley-Terry gives a score no zero and the seeds differ in scale. So of one aim each r_i is
standardised first: mean 0 and std 1 over pi_init's answers. What is logged as the score is the
joined reward. Of two aims it is the score of one scorer or of the other, before whitening.

An ensemble puts overoptimisation off, and does not end it. Gold on the toy world's main tasks, in
seeds 1 2 3:
    step            0            20            50           100
    one scorer      .41 .50 .50  .45 .27 .46   .36 -.08 .38  -.16 -.16 -.10
    mean of three   .41 .50 .50  .57 .39 .55   .46 .01 .29   -.04 (seed 1)
    min of three    .41 .50 .50  .45 .31 .53   .37 (seed 1)  .01 (seed 1)
"""

from dataclasses import dataclass
from itertools import islice
from typing import Literal

import torch

import ppo_sr
from ppo_sr import PPO, Critic, whiten
from utils import DEVICE, InputError, Weight, load_scorer, load_tokenizer, run_cli, same_form
from utils import seeded


@dataclass
class Args(ppo_sr.Args):
    reward_model_path: tuple[str, ...] = ()
    """two scorers or more, of the policy's tokenizer; the critic starts from the first one"""
    reward: Literal["mean", "min", "mean_minus_std", "mean_minus_variance", "safety_first"] = "mean"
    """how their scores become one"""
    uncertainty_coef: Weight = 0.5
    """lambda (Coste et al.: 0.1 for the variance in PPO)"""
    standardize_scores: bool = True
    """mean 0 and std 1 over pi_init's answers to a batch of prompts (not for safety_first)"""
    safety_tasks: tuple[str, ...] = ()
    """safety_first: prompts of these tasks are tagged, as field `task` of a row says"""


# --- the rewards: pure functions of scores (scorers, batch) -> (batch,) ---


def standardized(scores, means, stds):  # (scorers, batch), (scorers,), (scorers,)
    """(r_i - mean_i) / std_i: scorers of another zero or scale count alike."""
    return (scores - means[:, None]) / stds[:, None]


def mean_reward(scores, coef=0.0):
    return scores.mean(0)


def worst_case(scores, coef=0.0):
    """A response is as good as the scorer that likes it least says (Coste et al. 2023, WCO)."""
    return scores.amin(0)


def mean_minus_std(scores, coef):
    """The std is over the scorers, divided by k. Its unit is the scores': lambda keeps its meaning
    when all scores are multiplied by a number."""
    return scores.mean(0) - coef * scores.std(0, correction=0)


def mean_minus_variance(scores, coef):
    """1/k sum_i r_i - lambda 1/k sum_i (r_i - mean)^2  (Coste et al. 2023, UWO; their code for PPO
    divides by k - 1)."""
    return scores.mean(0) - coef * scores.var(0, correction=0)


def safety_first(helpful, safe, tagged, threshold=0.15):  # each (batch,), tagged bool
    """R_c = R_s where the prompt is tagged or R_s < 0.15, otherwise R_h  (Llama 2, §3.2.3).

    Their R are probabilities, sigmoids of a score, and the logit of R_c brings the score back. So
    a score is taken here as it is, and only the threshold needs a sigmoid.
    """
    return torch.where(tagged | (safe.sigmoid() < threshold), safe, helpful)


JOIN = {"mean": mean_reward, "min": worst_case, "mean_minus_std": mean_minus_std}
JOIN["mean_minus_variance"] = mean_minus_variance


# --- PPO ---


class RewardEnsemble(PPO):
    def __init__(self, args):
        self.two_aims, self.fixed = args.reward == "safety_first", {}
        super().__init__(args)
        if args.standardize_scores and not self.two_aims:
            self.fit()
        self.numbers["standardized"] = self.fixed  # a resumed run has the same

    def load_scorer(self):
        paths, scorers = self.args.reward_model_path, []
        if self.two_aims and len(paths) != 2:
            raise InputError("--reward_model_path: safety_first takes two, the second is safety")
        if len(paths) < 2:
            raise InputError("--reward_model_path: give two scorers or more (one: ppo_sr.py)")
        for path in paths:
            if not same_form(self.tokenizer, load_tokenizer(path, dedicated_pad=True)):
                raise InputError(f"{path}: not the policy's tokenizer, template or end")
            scorers.append(load_scorer(path, self.tokenizer, frozen=True))
        tasks = {row.get("task", "all") for row in self.rows}
        if unknown := [task for task in self.args.safety_tasks if task not in tasks]:
            raise InputError(f"--safety_tasks: no prompt of --dataset_name is of '{unknown[0]}'")
        return scorers

    def load_critic(self, policy):
        scorer = load_scorer(self.args.reward_model_path[0], self.tokenizer)
        return Critic(scorer, self.args.score_scale)

    def fit(self):
        """Means and stds of the scorers over pi_init's answers."""
        rows, prompts = zip(*islice(self.start_at(0), self.args.global_batch_size), strict=True)
        with seeded(self.args.seed):
            responses = self.sample(prompts)
        scores = self.read_each(rows, list(zip(prompts, responses, strict=True)))
        for path, std in zip(self.args.reward_model_path, scores.std(1), strict=True):
            if not std > 1e-6:
                raise InputError(f"{path}: gives all answers of the policy one score")
        self.fixed |= {"means": scores.mean(1).tolist(), "stds": scores.std(1).tolist()}

    def read_each(self, rows, sequences):
        """(scorers, batch): ppo_sr.py's read_scorer, scorer by scorer."""
        every, scores = self.scorer, []
        for self.scorer in every:
            scores.append(super().read_scorer(rows, sequences))
        self.scorer = every
        return torch.stack(scores)

    def read_scorer(self, rows, sequences):
        scores = self.read_each(rows, sequences)
        if self.two_aims:
            tagged = [row.get("task") in self.args.safety_tasks for row in rows]
            return safety_first(*scores, torch.tensor(tagged, device=DEVICE))
        if self.fixed:
            fixed = (torch.tensor(self.fixed[name], device=DEVICE) for name in ("means", "stds"))
            scores = standardized(scores, *fixed)
        self.disagreement = scores.std(0, correction=0).mean().item()
        return JOIN[self.args.reward](scores, self.args.uncertainty_coef)

    def normalize(self, scores):
        if self.two_aims:  # over the batch: Llama 2 does not say over what
            scores = whiten(scores, torch.ones_like(scores, dtype=torch.bool))
        return super().normalize(scores)

    def learn(self, *batch):
        metrics = super().learn(*batch)
        if not self.two_aims:  # mean over the batch of the std over scorers
            metrics["objective/disagreement"] = self.disagreement
        return metrics


def main(args: Args):
    if not args.reward.startswith("mean_minus") and args.uncertainty_coef != Args.uncertainty_coef:
        raise InputError(
            "--uncertainty_coef: is for --reward mean_minus_std or mean_minus_variance"
        )
    ppo_sr.main(args, RewardEnsemble)


if __name__ == "__main__":
    run_cli(main, Args, __doc__)
