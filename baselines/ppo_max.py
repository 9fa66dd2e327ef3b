"""PPO-max of "Secrets of RLHF in Large Language Models Part I: PPO" (Zheng et al. 2023), as what it
changes in ppo_sr.py: every stabiliser is a switch, and the preset is the default.

"Code" means that its released code, MOSS-RLHF, has this number.

    stabiliser               PPO-max                                            off, or another
    historical mean and std  --moving_average_decay 1                           None
    score clip               --score_clip 10                              code  inf
    advantage normalisation  --whiten_mini_batches True                   --whiten_advantages
    advantage clip           off: --advantage_clip inf                          code: 0.5
    ratio and value clip     --cliprange 0.2 --cliprange_value 0.2        code  inf
    critic's start           --critic_init scorer                               policy, backbone
    critic trained first     --critic_warmup_steps 10                           0
    KL in the reward         --kl_coef 0.02                               code  0
    KL in the loss           off: --kl_estimator k1                             k2, k3
    adaptive beta            off: --kl_target 0                                 nats a response
    entropy bonus            off: --entropy_coef 0                        code  above 0
    ptx                      with a file, --ptx_coef 0.01                       no file
    gradient clip            --max_grad_norm 1                                  inf
    small experience buffer  --global_batch_size 128 --num_mini_batches 4       n times both
                             --num_ppo_epochs 1                           code

    python -m baselines.ppo_max --model_name_or_path runs/sft/model \\
        --reward_model_path runs/rm/model --dataset_name prompts.jsonl \\
        --ptx_dataset_name sft.jsonl --output_dir runs/ppo_max

What differs from Secrets of RLHF I or its code, or is left open there:
  M1  The released buffer holds 128 rollouts, trains once on batches of 32 and is emptied: a step.
  M2  The released code trains critic and policy from the first step on. §5.3.3 prefers a
      pre-trained critic, as here. For how long is our choice: 10 of 100 steps.
  M3  Its entropy term, weight x |H - 35|, is the bonus here: H stays below 35 nats.
  M4  Its sampler (temperature 0.8, top-p 0.9, repetition penalty 1.1) is not the policy whose
      log-probs it trains. Ours is, or the run stops.
  M5  The weight of ptx, the KL in the loss and beta's controller are off or open there.
"""

import itertools
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Literal

import torch
from torch import nn

import ppo_sr
from ppo_sr import PPO, Critic, clipped_policy_loss, clipped_value_loss, critic_values
from ppo_sr import micro_batches, policy_logprobs, rehearse
from ppo_sr import rehearsal_loss, whiten
from utils import Bound, Count, Engine, InputError, Length, Natural, Share, Weight, autocast
from utils import backend, load_scorer, pad_pairs, response_logprobs, run_cli


@dataclass
class Args(ppo_sr.Args):
    moving_average_decay: Share | None = 1.0
    """scores become (score - mean) / std of all batches (1) or with this decay; None: raw"""
    score_clip: Bound = 10.0
    """scores, normalised if asked, are cut to [-this, this]"""
    critic_warmup_steps: Natural = 10
    """in the first of the steps the critic learns alone (§5.3.3; how long is our choice)"""
    critic_init: Literal["scorer", "policy", "backbone"] = "scorer"
    """where the critic starts: the scorer, or the policy, at V = 0; backbone: a head on the
    policy's own backbone, which learns from both losses and costs no second model"""
    global_batch_size: Length = 128
    """prompts a step: a small buffer"""
    num_ppo_epochs: Count = 1
    """passes over the batch"""
    num_mini_batches: Count = 4
    """updates a pass"""
    kl_coef: Weight = 0.02
    """beta of Eq. 2"""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """k1: the KL is paid in the reward; k2, k3: it is a loss of weight beta (kl_estimate)"""
    kl_target: Weight = 0.0
    """nats a response: beta is adapted to hold the KL there (0: it is constant)"""
    kl_horizon: Count = 10_000
    """responses in which an error of 20 % or more changes beta by some 20 %"""
    whiten_advantages: bool = False
    """advantages to mean 0 and std 1 over the tokens of the batch"""
    whiten_mini_batches: bool = True
    """advantages to mean 0 and std 1 over the tokens of the mini-batch"""
    advantage_clip: Bound = float("inf")
    """advantages are cut to [-this, this] in the mini-batch, after whitening (0.5 in the code)"""
    vf_coef: Weight = 1.0
    """weight of the value loss; it matters where policy and critic share a backbone"""
    entropy_coef: Weight = 0.0
    """weight of the entropy bonus, a mean over tokens (off in PPO-max: sensitive, no clear gain)"""
    ptx_dataset_name: str | None = None
    """demonstrations `prompt`, `response` whose LM loss is mixed in (ptx, InstructGPT)"""
    ptx_coef: Weight = 0.01
    """weight of that loss, a mean over response tokens (not stated; ours: the rehearsal's)"""
    ptx_batch_size: Count = 32
    """demonstrations an update (code: one a response, and mini-batches of 32)"""


# --- what PPO-max adds: pure functions of tensors -------------------------------------------------


def mini_batch_advantages(advantages, mask, whitened, clip):  # (mini_batch, response_len)
    """Mean 0 and std 1 over a mini-batch's tokens, if `whitened`, then cut to [-clip, clip]."""
    return (whiten(advantages, mask) if whitened else advantages).clamp(-clip, clip)


def kl_estimate(logprobs, ref_logprobs, estimator):  # each (tokens,)
    """The KL to pi_init as a loss per token (Schulman), lr = log(pi(y_t) / pi_init(y_t)).

    k2 = 1/2 lr^2           gradient lr grad log pi: over y_t ~ pi that of KL(pi || pi_init)
    k3 = exp(-lr) - 1 + lr  gradient (1 - exp(-lr)) grad log pi: that of KL(pi_init || pi)

    As a loss k1 = lr does nothing: its gradient is 0 on average. In the reward it is right, and
    holds a token to account for the KL of all that follow it. Here a token answers for its own.
    """
    log_ratio = logprobs - ref_logprobs
    return 0.5 * log_ratio**2 if estimator == "k2" else (-log_ratio).exp() - 1 + log_ratio


class AdaptiveKL:
    """beta is raised where the KL exceeds its target, and lowered where it falls short (Ziegler et
    al. 2019, §2.2). At target 0 it is constant."""

    def __init__(self, kl_coef, target, horizon):
        self.kl_coef, self.target, self.horizon = kl_coef, target, horizon

    def update(self, kl, responses):
        """beta *= 1 + clip(KL / target - 1, -0.2, 0.2) n / horizon;  kl: nats, of n responses."""
        if self.target:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.kl_coef *= 1 + error * responses / self.horizon


# --- a critic without a backbone of its own -------------------------------------------------------


class ScaledHead(nn.Linear):
    """Its output is multiplied by `scale`: AdamW then moves V as if the head's rate were that much
    larger."""

    scale = 1.0

    def forward(self, hidden):
        return super().forward(hidden) * self.scale


class OnBackbone(Engine):
    """A head on the backbone of another engine's model: gradients add up there, and its step is
    that engine's.

    A call keeps no graph, backward() makes it: an engine of DeepSpeed takes one graph at a time.
    """

    PARTS = ()  # a checkpoint has that engine's

    def __init__(self, engine, module):
        self.engine, self.module = engine, module

    def run(self, function, *args):
        return self.engine.run(lambda _: function(self.module, *args))

    def __call__(self, *batch):
        with torch.no_grad():
            self.output = super().__call__(*batch)
        self.batch, self.bf16 = batch, torch.is_autocast_enabled(self.output.device.type)
        return self.output.requires_grad_(torch.is_grad_enabled())

    def backward(self, loss):
        loss.backward()  # down to the output
        with torch.autocast(self.output.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            again = super().__call__(*self.batch)
        self.engine.backward((again * self.output.grad).sum())

    def step(self):
        return 0.0


# --- the variant ----------------------------------------------------------------------------------


def logprobs_and_entropy(ppo, sequences):
    """Of all response tokens, each (tokens,)."""
    batch = *pad_pairs(sequences, ppo.tokenizer.pad_token_id), ppo.args.temperature
    with autocast(ppo.args.bf16):
        logprobs, mask, entropy = response_logprobs(ppo.policy, *batch, entropy=True)
    return logprobs[mask], entropy[mask]


class PPOMax(PPO):
    def __init__(self, args):
        if args.critic_warmup_steps and args.critic_init == "backbone":
            problem = "has no critic that learns alone; set --critic_warmup_steps 0"
            raise InputError(f"--critic_init backbone: {problem}")
        if args.kl_target and not (args.kl_coef and args.kl_horizon):
            raise InputError("--kl_target: needs --kl_coef and --kl_horizon above 0")
        super().__init__(args)
        self.ptx = self.load_pairs(args.ptx_dataset_name)
        self.controller = AdaptiveKL(args.kl_coef, args.kl_target, args.kl_horizon)
        self.numbers["controller"] = vars(self.controller)

    def load_critic(self, policy):
        """A copy of the scorer, or one that starts from the policy, at V = 0."""
        args = self.args
        if args.critic_init == "scorer":
            return super().load_critic(policy)
        if args.critic_init == "policy":
            scorer = load_scorer(args.model_name_or_path, self.tokenizer, trained=False)
            return Critic(scorer, 0.0)
        width, place = policy.get_output_embeddings().in_features, policy.device
        policy.score = ScaledHead(width, 1, bias=False).to(place, policy.dtype)
        policy.score.scale = args.critic_learning_rate / args.learning_rate
        save = policy.save_pretrained

        def without_head(folder, state_dict):
            """The head is no part of the policy."""
            save(folder, state_dict={k: v for k, v in state_dict.items() if "score." not in k})

        policy.save_pretrained = without_head
        return Critic(SimpleNamespace(model=policy, e_head=None), 0.0)

    def engine(self, model, learning_rate):
        if isinstance(model, Critic) and self.args.critic_init == "backbone":
            return OnBackbone(self.policy, model)
        return super().engine(model, learning_rate)

    def normalize(self, scores):
        return super().normalize(scores).clamp(-self.args.score_clip, self.args.score_clip)

    def kl_coef(self, rows):
        return self.controller.kl_coef if self.args.kl_estimator == "k1" else 0.0

    def start_at(self, step):
        args = self.args
        epochs = max(0, step - args.critic_warmup_steps) * args.num_ppo_epochs
        used = epochs * args.num_mini_batches * args.ptx_batch_size
        self.ptx_rows = ppo_sr.endless(self.ptx, args.seed, used)
        return super().start_at(step)

    def update(self, step, rollout, experience, mini_batch, log):
        """ppo_sr.py's update with the advantages of the mini-batch and three more losses."""
        args, learns, parts = self.args, step > self.args.critic_warmup_steps, []
        num_tokens = rollout.mask[mini_batch].sum()
        used = torch.zeros_like(experience.advantages)  # filled in the rows of the mini-batch
        switches = rollout.mask[mini_batch], args.whiten_mini_batches, args.advantage_clip
        used[mini_batch] = mini_batch_advantages(experience.advantages[mini_batch], *switches)
        for batch in micro_batches(args, rollout.sequences, mini_batch):
            fresh, mask = [rollout.sequences[i] for i in batch], rollout.mask[batch]
            old_values, returns = rollout.values[batch][mask], experience.returns[batch][mask]

            with torch.set_grad_enabled(learns):
                logprobs, entropy = logprobs_and_entropy(self, fresh)
            log_ratio = logprobs - rollout.logprobs[batch][mask]
            ratio = log_ratio.exp()
            policy_loss = clipped_policy_loss(ratio, used[batch][mask], args.cliprange)
            policy_loss = policy_loss.sum() / num_tokens
            kl_loss = torch.zeros_like(policy_loss)
            if args.kl_estimator != "k1":
                kl = kl_estimate(logprobs, rollout.ref_logprobs[batch][mask], args.kl_estimator)
                kl_loss = (self.controller.kl_coef * kl).sum() / num_tokens
            entropy_loss = -args.entropy_coef * entropy.sum() / num_tokens
            if learns:
                self.policy.backward(policy_loss + kl_loss + entropy_loss)

            values = critic_values(self, fresh)
            value_loss = clipped_value_loss(values, old_values, returns, args.cliprange_value)
            value_loss = value_loss.sum() / num_tokens
            self.critic.backward(args.vf_coef * value_loss)

            metrics = {
                "loss/policy_avg": policy_loss,
                "loss/value_avg": value_loss,
                "policy/approxkl_avg": 0.5 * log_ratio.square().sum() / num_tokens,
                "policy/clipfrac_avg": ((ratio - 1).abs() > args.cliprange).sum() / num_tokens,
                "val/ratio": ratio.sum() / num_tokens,
            }
            metrics |= {"loss/kl_avg": kl_loss} if args.kl_estimator != "k1" else {}
            metrics |= {"loss/entropy_avg": entropy_loss} if args.entropy_coef else {}
            parts.append(torch.stack([*metrics.values()]).detach())
        metrics = dict(zip(metrics, backend.add_up(parts).tolist(), strict=True))
        if learns:
            metrics |= rehearse(self)  # [Eq. 9]
            metrics |= self.pretrain()
            log.take_step(self.policy, "policy's ", step, rollout.sequences)
        log.take_step(self.critic, "critic's ", step, rollout.sequences)
        return metrics

    def pretrain(self):
        """PPO-ptx: ptx_coef * NLL of the next pretraining rows, a mean over tokens."""
        args, parts = self.args, []
        pairs = list(itertools.islice(self.ptx_rows, args.ptx_batch_size))
        count = sum(len(y) for _, y in pairs)
        for batch in micro_batches(args, pairs, range(len(pairs))):
            ptx_nll = rehearsal_loss(policy_logprobs(self, [pairs[i] for i in batch]), count)
            self.policy.backward(args.ptx_coef * ptx_nll)
            parts.append(ptx_nll.detach())
        return {"loss/ptx_nll": backend.add_up(parts).item()} if pairs else {}

    def learn(self, step, rollout, experience, log):
        metrics = super().learn(step, rollout, experience, log)
        metrics["objective/kl_coef"] = self.controller.kl_coef
        if step > self.args.critic_warmup_steps:
            kl = (rollout.logprobs - rollout.ref_logprobs).sum(1).mean().item()
            self.controller.update(kl, len(rollout.sequences))
        return metrics


def main(args: Args):
    ppo_sr.main(args, PPOMax)


if __name__ == "__main__":
    run_cli(main, Args, __doc__)
