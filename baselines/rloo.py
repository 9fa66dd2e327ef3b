"""Policy gradient without a critic: every prompt gets K responses, which are each other's baseline.

    R_i = r(x, y_i) - beta log(pi(y_i | x) / pi_init(y_i | x))                               [Eq. 2]

    --method       advantage of every token of y_i                        KL
    rloo           R_i - mean of the other K - 1                          in R       Ahmadian 2024
    grpo           (r_i - mean of the K) / std of the K                   loss, k3   Shao 2024
    reinforce++    r_i - mean of the K, then mean 0, std 1 of the batch   loss, k2   Hu 2025
                                                  (its REINFORCE++-baseline)
    p3o            R_1 - R_2, K = 2; one ratio for the pair, clipped      in R       Wu 2023

    python -m baselines.rloo --method rloo --group_size 4 --kl_coef 0.05 --learning_rate 5e-4 \\
        --model_name_or_path runs/sft/model --reward_model_path runs/am/model \\
        --dataset_name data/toy/prompts_train.jsonl --output_dir runs/rloo --total_steps 30 \\
        --global_batch_size 128 --response_length 24 --max_length 64 --num_ppo_epochs 1 \\
        --num_mini_batches 2 --per_device_train_batch_size 64 --per_device_eval_batch_size 256

The mean reward of a prompt's responses is e(x) of Eq. 7: sampled here, learned by the advantage
model. So whatever depends on the prompt alone cancels: r and a = r - e(x) have equal advantages.
What is left of the advantage model is its bound, and its scale against the KL.

Other flags are ppo_sr.py's, and Eq. 9's rehearsal too. What differs from the papers:
  R1  All but P3O clip each token's ratio as PPO does. RLOO's paper makes one update a batch, whose
      ratio is 1. The clip counts in the second of --num_mini_batches.
  R2  Losses are means over the tokens of the mini-batch, as ppo_sr.py's; P3O's over its pairs.
      RLOO sums a response's tokens; GRPO takes their mean first, so that a long response counts as
      much as a short one.
  R3  P3O clips each response or the pair; here it is the pair, whose ratio is
      pi(y_1 | x) / pi_old(y_1 | x) over the same of y_2.
"""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Annotated, Literal

import torch
import tyro

import ppo_sr
from baselines.ppo_max import kl_estimate
from ppo_sr import PPO, Experience, clipped_policy_loss, endless, micro_batches, policy_logprobs
from ppo_sr import rehearse, token_rewards, whiten
from utils import DEVICE, Engine, InputError, Length, backend, run_cli

KL = {"rloo": "k1", "grpo": "k3", "reinforce++": "k2", "p3o": "k1"}
Unused = tyro.conf.Suppress  # a critic's flags: they cannot be given


@dataclass
class Args(ppo_sr.Args):
    method: Literal["rloo", "grpo", "reinforce++", "p3o"] = "rloo"
    """how the advantage is made"""
    group_size: Length = 4
    """K, responses to each prompt; --global_batch_size counts responses"""
    whiten_advantages: bool = False
    """mean 0 and std 1 over the batch's tokens on top of the method's own"""
    critic_warmup_steps: Annotated[int, Unused] = 0
    critic_learning_rate: Annotated[float, Unused] = 1.5e-6
    gamma: Annotated[float, Unused] = 1.0
    lam: Annotated[float, Unused] = 0.95
    cliprange_value: Annotated[float, Unused] = 0.2


# --- the advantages: (prompts, K) -> (prompts, K) ---


def leave_one_out(rewards):
    """RLOO:  R_i - 1/(K-1) sum_{j != i} R_j.  The baseline has not seen y_i, so nothing is biased.

    It is K/(K-1) times R_i - mean of all K.
    """
    k = rewards.shape[1]
    return rewards - (rewards.sum(1, keepdim=True) - rewards) / (k - 1)


def group_mean(rewards):
    """r_i - mean of the K: e(x) of Eq. 7 by sampling is the baseline."""
    return rewards - rewards.mean(1, keepdim=True)


def group_standardized(rewards):
    """GRPO:  (r_i - mean) / std of the K.  A prompt on which all answers are nearly equally good
    gets as large a gradient as one on which they differ widely."""
    return group_mean(rewards) / (rewards.std(1, keepdim=True) + 1e-4)


ADVANTAGES = {
    "rloo": leave_one_out,
    "grpo": group_standardized,
    "reinforce++": group_mean,  # and then whiten()
    "p3o": leave_one_out,  # at K = 2:  R_1 - R_2  and  R_2 - R_1
}


def pair_policy_loss(log_ratios, advantages, cliprange):  # (pairs, 2), (pairs, 2)
    """P3O:  PPO's clipped loss of (pi/pi_old)(y_1) / (pi/pi_old)(y_2), with A = (R_1 - R_2) / 2.

    The gradient at ratio 1 is -(R_1 - R_2)/2 grad log(pi(y_1 | x) / pi(y_2 | x)).
    """
    ratio = (log_ratios[:, 0] - log_ratios[:, 1]).exp()
    return clipped_policy_loss(ratio, advantages[:, 0] / 2, cliprange)


# --- the variant ---


class NoCritic(Engine):
    """V = 0, and nothing to learn."""

    PARTS = ()

    def __init__(self, module):
        self.module = module

    def __call__(self, input_ids, attention_mask, prompt_lens):
        response_len = int((attention_mask.sum(1) - prompt_lens).max())
        return torch.zeros(len(input_ids), response_len, device=DEVICE)


class RLOO(PPO):
    def load_critic(self, policy):
        return SimpleNamespace(model=policy)

    def engine(self, model, learning_rate):
        if isinstance(model, SimpleNamespace):
            return NoCritic(model)
        return super().engine(model, learning_rate)

    def start_at(self, step):
        """Every prompt K times in a row."""
        args = self.args
        super().start_at(step)  # the rehearsal rows
        prompts = list(zip(self.rows, self.prompts, strict=True))
        used = step * args.global_batch_size // args.group_size
        for prompt in endless(prompts, args.seed, used):
            yield from [prompt] * args.group_size

    def advantages(self, rollout):
        """(batch, response_len): the same at every token of a response."""
        args, mask = self.args, rollout.mask
        scores, kl_coef = self.normalize(rollout.raw_scores), self.kl_coef(rollout.rows)
        if args.missing_eos_penalty:
            scores = scores - args.missing_eos_penalty * scores.std() * ~rollout.finished
        in_reward = kl_coef if KL[args.method] == "k1" else 0.0
        both = rollout.logprobs, rollout.ref_logprobs
        rewards = token_rewards(scores, *both, mask, in_reward)  # their sum is R_i
        groups = rewards.sum(1).view(-1, args.group_size)
        advantages = ADVANTAGES[args.method](groups).view(-1, 1) * mask
        if args.method == "reinforce++" or args.whiten_advantages:
            advantages = whiten(advantages, mask)
        # no critic has a return to explain: val/explained_variance is 0
        return Experience(scores, kl_coef, rewards, advantages, advantages)

    def learn(self, step, rollout, experience, log):
        """As in ppo_sr.py, with a prompt's responses in one mini-batch."""
        args, found = self.args, []
        k = args.group_size
        for _ in range(args.num_ppo_epochs):
            shuffled = torch.randperm(len(rollout.sequences) // k)
            for groups in shuffled.chunk(args.num_mini_batches):
                rows = (groups[:, None] * k + torch.arange(k)).flatten().tolist()
                found.append(self.update(step, rollout, experience, rows, log))
        means = torch.tensor([[*metrics.values()] for metrics in found]).mean(0).tolist()
        return dict(zip(found[0], means, strict=True))

    def update(self, step, rollout, experience, mini_batch, log):
        """One optimiser step of the policy."""
        args, parts, paired = self.args, [], self.args.method == "p3o"
        num_tokens = rollout.mask[mini_batch].sum()
        # a pair shares a pass: each first response takes the one after it along
        firsts = mini_batch[::2] if paired else mini_batch
        clipped = len(firsts) if paired else num_tokens  # number of ratios
        for batch in micro_batches(args, rollout.sequences, firsts):
            batch = batch + [i + 1 for i in batch] if paired else batch
            mask, advantages = rollout.mask[batch], experience.advantages[batch]
            logprobs = policy_logprobs(self, [rollout.sequences[i] for i in batch])  # (tokens,)
            log_ratio = logprobs - rollout.logprobs[batch][mask]
            ratio = log_ratio.exp()
            if paired:  # (pairs, 2): the first halves of `batch`, then the second ones
                of_rows = torch.zeros_like(advantages).masked_scatter(mask, log_ratio).sum(1)
                of_pairs = of_rows.view(2, -1).T, advantages[:, 0].view(2, -1).T, args.cliprange
                policy_loss = pair_policy_loss(*of_pairs).sum() / len(firsts)
                ratio = (of_pairs[0][:, 0] - of_pairs[0][:, 1]).exp()  # what is clipped, (pairs,)
            else:
                policy_loss = clipped_policy_loss(ratio, advantages[mask], args.cliprange)
                policy_loss = policy_loss.sum() / num_tokens
            kl_loss = torch.zeros_like(policy_loss)
            if KL[args.method] != "k1":
                kl = kl_estimate(logprobs, rollout.ref_logprobs[batch][mask], KL[args.method])
                kl_loss = experience.kl_coef * kl.sum() / num_tokens
            self.policy.backward(policy_loss + kl_loss)

            metrics = {
                "loss/policy_avg": policy_loss,
                "loss/kl_avg": kl_loss,
                "policy/approxkl_avg": 0.5 * log_ratio.square().sum() / num_tokens,
                "policy/clipfrac_avg": ((ratio - 1).abs() > args.cliprange).sum() / clipped,
                "val/ratio": ratio.sum() / clipped,
            }
            parts.append(torch.stack([*metrics.values()]).detach())
        metrics = dict(zip(metrics, backend.add_up(parts).tolist(), strict=True))
        metrics |= rehearse(self)  # [Eq. 9]
        log.take_step(self.policy, "policy's ", step, rollout.sequences)
        return metrics


def check(args):
    if args.method == "p3o" and args.group_size != 2:
        raise InputError("--method p3o: compares two responses; set --group_size 2")
    if args.method == "p3o" and args.whiten_advantages:
        raise InputError("--whiten_advantages: p3o takes a pair's difference, whose mean is 0")
    if args.global_batch_size % (args.group_size * args.num_mini_batches):
        wanted = "must be a multiple of --group_size times --num_mini_batches"
        raise InputError(f"--global_batch_size: {wanted}")


def main(args: Args):
    check(args)
    ppo_sr.main(args, RLOO)


if __name__ == "__main__":
    run_cli(main, Args, __doc__)
