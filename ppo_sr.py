"""PPO with Selective Rehearsal (Eq. 2 and 9) of "Stabilizing RLHF through Advantage Model and Selective Rehearsal".

    for each step:
        1 sample     y ~ pi(. | x) for a batch of prompts x
        2 score      s = scorer(x, y), normalised or rescaled if asked; log-probs under pi and pi_init; values
        3 advantages per-token reward  - beta log(pi / pi_init), plus s on the last token [Eq. 2]; GAE; whitening
        4 update     clipped policy loss and clipped value loss, num_ppo_epochs over the batch
        5 rehearse   + gamma x NLL of the rehearsal set D_R, in the same update [Eq. 9]
        6 log        and every eval_steps answer the test prompts
        7 save

The arms of the paper by flags (the scorer decides between RM and AM):

    RM-PPO          --reward_model_path runs/rm/model
    RM-PPO w/ MA    --reward_model_path runs/rm/model --score_normalization moving_average
    RM rescaled     --reward_model_path runs/rm/model --score_scale 0.25          (the control: AM's std / RM's std)
    AM-PPO          --reward_model_path runs/am/model
    AM-PPO-SR       --reward_model_path runs/am/model --rehearsal_dataset_name runs/select/rehearsal.jsonl

    python ppo_sr.py --model_name_or_path runs/sft/model --reward_model_path runs/am/model \\
        --dataset_name prompts.jsonl --output_dir runs/ppo

What differs from the paper, or is left open there (numbers: docs/CHOICES.md):
  C4  Eq. 2 is maximised; its KL term is paid token by token (the usual k1 estimate), and Eq. 9 minimises -log pi.
  C5  Eq. 9's NLL is a mean over tokens, as the PPO loss is, unless --rehearsal_reduction sum.
  C8  beta, GAE's gamma and lambda, clip ranges, epochs and the critic's start are not stated.
  C9  Neither is the moving average of RM-PPO w/ MA.
  C18 Nor is §3.2's alternative view, a larger beta for D_R's prompts (--rehearsal_kl_weight).

Collisions of symbols: gamma is GAE's discount here and the rehearsal coefficient in the paper (--rehearsal_coef);
r_t is the probability ratio in PPO papers and a reward in Eq. 2: here `ratio` and `rewards`.
"""

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from data import encode_pair, encode_prompts, load_rows, load_tokenizer
from engines import AdaptersOff, EngineArgs, frozen, gathered_parameters, largest, make_engine, rank, save_model
from engines import seeded, total
from instruments import Alarms, check_first_ratio, check_sampler, explain, rollout_metrics
from utils import SHARE, InputError, RunLog, Scorer, autocast, check_finite, check_positions, dealt_batches, device
from utils import endless, forward_batches, generate, load_checkpoint, load_function, load_policy, pad
from utils import response_logprobs, run_cli, save_checkpoint, score_texts, stop_ids


@dataclass
class Args(EngineArgs):
    model_name_or_path: str
    """the SFT policy: where the policy starts and pi_init stays (folder or hub id; paper §4.2: BLOOMZ-176B)"""
    dataset_name: str
    """PPO prompts: .jsonl, .jsonl.gz, .parquet or a hub id, with `prompt`, optional `task`"""
    output_dir: str
    """the run folder; the policy is written to its model/"""
    reward_model_path: str | None = None
    """the scorer, RM or AM, written by am_train.py; with another tokenizer than the policy's it reads texts"""
    reward_function: str | None = None
    """module:function(prompts, responses) -> scores, in the place of a scorer"""
    rehearsal_dataset_name: str | None = None
    """D_R of Eq. 9: rows `prompt`, `response`, written by select_rehearsal.py; without it there is no rehearsal"""
    rehearsal_coef: float = 0.01
    """gamma of Eq. 9 (paper §3.2)"""
    rehearsal_batch_size: int = 64
    """rehearsal rows per update (not stated in the paper; our choice C6)"""
    rehearsal_reduction: Literal["mean", "sum"] = "mean"
    """NLL of Eq. 9 as a mean over tokens, or as a sum over tokens and a mean over rows (as printed; our choice C5)"""
    rehearsal_kl_weight: float = 1.0
    """factor on beta for prompts of D_R: §3.2's alternative view (our choice C18; alone with --rehearsal_coef 0)"""
    eval_dataset_names: tuple[str, ...] = ()
    """prompt files to answer before the first step, every --eval_steps and after the last (a main and a forget set)"""
    max_eval_prompts: int = 0
    """answer only the first prompts of each of those files (0: all)"""
    eval_steps: int = 10
    """steps between two evaluations"""
    gold_reward: str | None = None
    """module:function(prompts, responses) -> scores, logged beside the scorer's and never trained on"""
    total_steps: int = 100
    """PPO steps (paper §4.2); a step is one batch of fresh responses (our choice C13)"""
    global_batch_size: int = 256
    """prompts per step (paper §4.2: 256; PPO-max: 128, a small experience buffer)"""
    num_ppo_epochs: int = 2
    """passes over the batch (not stated in the paper: 2, our choice C8; PPO-max: 1)"""
    num_mini_batches: int = 1
    """optimiser steps per pass (not stated in the paper: 1, our choice C8; PPO-max: 4)"""
    per_device_train_batch_size: int = 64
    """sequences per training forward pass; gradients accumulate up to the mini-batch"""
    per_device_eval_batch_size: int = 256
    """sequences per forward pass in sampling and scoring"""
    learning_rate: float = 5e-7
    """of the policy (paper §4.2), constant, AdamW (our choice C16)"""
    critic_learning_rate: float = 1.5e-6
    """of the critic (PPO-max), constant, AdamW (our choice C16)"""
    kl_coef: float = 0.05
    """beta of Eq. 2 (not stated in the paper: TRL's 0.05, our choice C8; PPO-max: 0.02)"""
    gamma: float = 1.0
    """discount of GAE (PPO-max; not the paper's gamma)"""
    lam: float = 0.95
    """lambda of GAE (PPO-max)"""
    cliprange: float = 0.2
    """the probability ratio stays within 1 - this and 1 + this (PPO-max; inf: no clip)"""
    cliprange_value: float = 0.2
    """a new value stays within this of the old one (PPO-max; inf: no clip)"""
    vf_coef: float = 1.0
    """weight of the value loss; where policy and critic are separate models, it scales the critic's gradient alone"""
    max_grad_norm: float = 1.0
    """global gradient norm above which gradients are scaled down (PPO-max; inf: never)"""
    whiten_advantages: bool = True
    """advantages to mean 0 and std 1 over the tokens of the batch (PPO-max normalises per mini-batch)"""
    score_normalization: Literal["none", "moving_average"] = "none"
    """moving_average: (score - mean) / std with averages over the batches so far (RM-PPO w/ MA)"""
    moving_average_decay: float = 0.99
    """decay of those averages, bias-corrected; 1: PPO-max's historical mean and std (our choice C9)"""
    score_clip: float = float("inf")
    """scores, normalised if asked, are cut to [-this, this] (PPO-max: 10 after normalisation)"""
    score_scale: float = 1.0
    """fixed factor on the scores, and on the critic's start: RM scores brought to AM's std are the scale control"""
    critic_warmup_steps: int = 0
    """in the first of the steps the critic learns alone (PPO-max, §5.3.3; how long is our choice)"""
    missing_eos_penalty: float = 0.0
    """subtracted from a response without <eos>, in units of the score's std in its batch (our choice C10)"""
    response_length: int = 64
    """tokens that a response may have"""
    temperature: float = 1.0
    """of sampling and of all log-probs alike (not stated in the paper; our choice C8)"""
    max_length: int = 512
    """tokens of prompt and response together"""
    truncate_prompts: bool = False
    """shorten a prompt that leaves no room for the response instead of refusing it"""
    num_samples_logged: int = 16
    """training responses kept in samples.jsonl at each evaluation; evaluation responses are all kept"""
    explain: bool = False
    """print three responses token by token, with each term of Eq. 2, and stop"""
    stop_on_alarm: bool = False
    """end the run, policy saved, when a dial leaves its band (instruments.py)"""
    save_steps: int = 0
    """steps between two checkpoints that --resume can start from (0: none)"""
    resume: bool = False
    """go on from the checkpoint in output_dir, to the same numbers as a run that was never stopped"""
    seed: int = 1
    """seed of sampling and data order"""
    shard_frozen_models: bool = False
    """with --deepspeed: a share of pi_init and the scorer on each GPU instead of a copy"""
    gather_to_generate: bool = True
    """with ZeRO-3: the whole policy on each GPU while it samples; False: one layer at a time, slow, if it does not fit"""
    bf16: bool = False
    """matrix products in bfloat16 over float32 weights"""
    report_to: Literal["none", "tensorboard", "wandb"] = "none"
    """mirror the metrics to `tensorboard` or `wandb`"""


# --- the equations: pure functions of tensors; column t is the t-th response token ------------------------------------


def token_rewards(scores, logprobs, ref_logprobs, mask, kl_coef):
    """[Eq. 2] per token:  - beta log(pi(y_t) / pi_init(y_t)),  plus r(x, y) on the last response token.

    scores (batch,), kl_coef (batch, 1) or a number, the others (batch, response_len) -> (batch, response_len); the sum
    over t is Eq. 2 for one (x, y).
    """
    rewards = -kl_coef * (logprobs - ref_logprobs) * mask
    last = mask.sum(1) - 1  # (batch,)
    rewards[torch.arange(len(rewards)), last] += scores
    return rewards


def generalized_advantages(rewards, values, mask, gamma, lam):  # each (batch, response_len)
    """GAE:  A_t = sum_k (gamma lam)^k d_{t+k},  d_t = reward_t + gamma V_{t+1} - V_t,  V = 0 after the last token.

    Returns advantages and returns A_t + V_t, both 0 outside the mask.
    """
    values = values * mask
    advantages = torch.zeros_like(rewards)
    following, next_value = torch.zeros_like(rewards[:, 0]), torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantages[:, t] = following = (delta + gamma * lam * following) * mask[:, t]
        next_value = values[:, t]
    return advantages, (advantages + values) * mask


def whiten(values, mask):  # (batch, response_len)
    """Mean 0 and (unbiased) std 1 over the tokens of the mask; 0 outside."""
    kept = values[mask]
    return (values - kept.mean()) / (kept.std() + 1e-8) * mask


def policy_loss(logprobs, old_logprobs, advantages, cliprange):  # each (tokens,)
    """PPO:  -min(ratio A, clip(ratio, 1 - eps, 1 + eps) A) per token, ratio = pi / pi_old; gradient ascent on Eq. 2."""
    ratio = (logprobs - old_logprobs).exp()
    return torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - cliprange, 1 + cliprange))


def value_loss(values, old_values, returns, cliprange_value):  # each (tokens,)
    """1/2 max((V - R)^2, (clip(V, V_old +- eps) - R)^2) per token."""
    clipped = old_values + (values - old_values).clamp(-cliprange_value, cliprange_value)
    return 0.5 * torch.max((values - returns) ** 2, (clipped - returns) ** 2)


def rehearsal_loss(logprobs, mask, reduction):  # (rows, response_len)
    """[Eq. 9]  E_{(x, y) ~ D_R} -log pi(y | x): the sum over tokens as printed, or their mean."""
    nll = -(logprobs * mask).sum()
    return nll / (mask.sum() if reduction == "mean" else len(mask))


class MovingAverage:
    """Exponential averages of a batch's mean and mean square, each weight divided by their sum: the normaliser of
    RM-PPO w/ MA; at decay 1 the mean and std of all batches so far, PPO-max's."""

    def __init__(self, decay):
        self.decay, self.weight, self.mean, self.square = decay, 0.0, 0.0, 0.0

    def normalize(self, scores):  # (batch,)
        """Take the batch in, then return (scores - mean) / std; a difference of squares needs float64."""
        exact = scores.double()
        self.weight = self.decay * self.weight + 1
        self.mean = self.decay * self.mean + exact.mean().item()
        self.square = self.decay * self.square + exact.square().mean().item()
        mean = self.mean / self.weight
        std = max(self.square / self.weight - mean**2, 1e-8) ** 0.5
        return (scores - mean) / std


# --- scorer, critic, rollout --------------------------------------------------------------------------------------------


class Critic(nn.Module):
    """V(x, y_<t): a backbone and score head, r without e, read at every token (our choice C8)."""

    def __init__(self, scorer, score_scale):
        super().__init__()
        self.model = scorer.model
        with torch.no_grad(), gathered_parameters([self.model.score.weight], 0):
            self.model.score.weight.mul_(score_scale)  # so that values start on the scale of the scores

    def forward(self, input_ids, attention_mask, prompt_lens):
        """(batch, seq_len) -> (batch, response_len): column t is read where y_t is chosen, one token early."""
        hidden = self.model.base_model(input_ids, use_cache=False).last_hidden_state
        response_len = int((attention_mask.sum(1) - prompt_lens).max())
        index = prompt_lens[:, None] - 1 + torch.arange(response_len, device=hidden.device)
        index = index.clamp(max=hidden.shape[1] - 1)[..., None].expand(-1, -1, hidden.shape[2])
        return self.model.score(hidden.gather(1, index)).squeeze(-1).float()


def load_scorer_and_critic(args, tokenizer):
    """score(rows, sequences, texts, finished) -> raw scores (batch,), and the critic.

    A scorer that has the policy's tokenizer reads its very tokens, and the critic starts from it; any other one reads
    the text in its own tokens, as a Python function does, and the critic starts from the policy, at V = 0.
    """
    if (args.reward_model_path is None) == (args.reward_function is None):
        raise InputError("--reward_model_path, --reward_function: give one of them")

    def critic_from_policy():
        start = Scorer.from_pretrained(args.model_name_or_path, tokenizer, trained=False)
        return Critic(start, 0.0)

    if args.reward_function:
        function = load_function(args.reward_function, "--reward_function")

        def score(rows, sequences, texts, finished):
            return torch.tensor(function([row["prompt"] for row in rows], texts), device=device())

        return score, critic_from_policy()
    scorer_tokenizer = load_tokenizer(args.reward_model_path)
    scorer = frozen(args, Scorer.from_pretrained, args.reward_model_path, scorer_tokenizer)
    vocabulary = scorer_tokenizer.get_vocab()  # it may hold a padding token more
    shared = not scorer.is_encoder and all(vocabulary.get(t) == i for t, i in tokenizer.get_vocab().items())

    def score(rows, sequences, texts, finished):
        """a(x, y) = r - e [Eq. 8, K = 0], raw as the scorer gives it."""
        pairs = [(x + y, len(x)) for x, y in sequences]
        if not shared:
            length = (args.max_length, True, "a response", scorer.is_encoder)
            pairs = [encode_pair(scorer_tokenizer, row["prompt"], y, *length)[:2]
                     for row, y in zip(rows, texts, strict=True)]  # fmt: skip
            if not scorer.is_encoder:  # a response that was cut has no <eos>
                eos = scorer_tokenizer.eos_token_id
                pairs = [(ids[: -1 if not end and ids[-1] == eos else None], n)
                         for (ids, n), end in zip(pairs, finished.tolist(), strict=True)]  # fmt: skip
        r, e = score_texts(scorer, scorer_tokenizer, pairs, args.per_device_eval_batch_size, args.bf16)
        return torch.tensor(r - e, dtype=torch.float32, device=device())

    if not shared:
        check_positions(scorer.model, args.max_length)
        return score, critic_from_policy()
    return score, Critic(Scorer.from_pretrained(args.reward_model_path, scorer_tokenizer), args.score_scale)


@dataclass
class Rollout:
    """A batch of fresh responses and what the update needs of them; matrices (batch, response_len), 0 past a response."""

    sequences: list  # (prompt ids, response ids)
    texts: list
    finished: torch.Tensor  # (batch,) bool: ended by itself
    raw_scores: torch.Tensor  # (batch,)
    mask: torch.Tensor
    logprobs: torch.Tensor
    ref_logprobs: torch.Tensor
    entropy: torch.Tensor
    values: torch.Tensor
    kl_coef: torch.Tensor | float = 0.0  # beta, (batch, 1) where it depends on x
    scores: torch.Tensor | None = None  # (batch,): normalised, scaled, clipped
    rewards: torch.Tensor | None = None
    advantages: torch.Tensor | None = None
    returns: torch.Tensor | None = None


def score_rollout(args, tokenizer, policy, reference, critic, score, rows, sequences):
    """Raw scores, log-probs under pi and pi_init, values and entropies of fresh responses: a Rollout."""
    stops = stop_ids(policy, tokenizer)
    finished = torch.tensor([y[-1] in stops for _, y in sequences], device=device())
    texts = tokenizer.batch_decode([y for _, y in sequences], skip_special_tokens=True)

    def forward(ids, mask, prompt_lens):
        old, _, entropy = response_logprobs(policy, ids, mask, prompt_lens, args.temperature, with_entropy=True)
        ref, _ = response_logprobs(reference, ids, mask, prompt_lens, args.temperature)
        return old, ref, entropy, critic(ids, mask, prompt_lens)

    raw_scores = score(rows, sequences, texts, finished)
    batch = (args.per_device_eval_batch_size, args.bf16)
    columns = forward_batches(forward, sequences, tokenizer.pad_token_id, *batch)
    response_lens = torch.tensor([len(y) for _, y in sequences], device=device())
    mask = torch.arange(columns[0].shape[1], device=device()) < response_lens[:, None]
    return Rollout(sequences, texts, finished, raw_scores, mask, *columns)


def add_advantages(args, rollout, moving_average, kl_coef):
    """Scores as PPO sees them, rewards of Eq. 2, advantages and returns, into the rollout."""
    scores = rollout.raw_scores * args.score_scale
    if args.score_normalization == "moving_average":
        scores = moving_average.normalize(scores)
    scores = scores.clamp(-args.score_clip, args.score_clip)
    if args.missing_eos_penalty:
        scores = scores - args.missing_eos_penalty * scores.std() * ~rollout.finished
    rollout.scores, rollout.kl_coef = scores, kl_coef
    rollout.rewards = token_rewards(scores, rollout.logprobs, rollout.ref_logprobs, rollout.mask, kl_coef)  # [Eq. 2]
    rollout.advantages, rollout.returns = generalized_advantages(
        rollout.rewards, rollout.values, rollout.mask, args.gamma, args.lam
    )
    if args.whiten_advantages:
        rollout.advantages = whiten(rollout.advantages, rollout.mask)


# --- update -------------------------------------------------------------------------------------------------------------
DIALS = ("loss/policy_avg", "loss/value_avg", "policy/approxkl_avg", "policy/clipfrac_avg", "val/ratio")


def rehearse(args, policy_engine, pad_id, rows):
    """[Eq. 9] adds the gradient of gamma NLL over these rows of D_R, (ids, prompt_len) each; returns the NLL."""
    sum_nll = 0.0
    for micro, weight in dealt_batches([len(ids) for ids, _ in rows], args.per_device_train_batch_size):
        ids, attention = pad([rows[i][0] for i in micro], pad_id)
        prompt_lens = torch.tensor([rows[i][1] for i in micro], device=ids.device)
        with autocast(args.bf16):
            logprobs, mask = response_logprobs(policy_engine, ids, attention, prompt_lens, args.temperature)
        tokens = sum(len(ids) - n for ids, n in rows)
        share = mask.sum() / tokens if args.rehearsal_reduction == "mean" else len(micro) / len(rows)
        nll = weight * rehearsal_loss(logprobs, mask, args.rehearsal_reduction) * share
        policy_engine.backward(args.rehearsal_coef * nll)
        sum_nll += nll.item()
    return total(sum_nll)


def update(args, step, policy_engine, critic_engine, pad_id, rollout, rehearsal_rows, folder):
    """num_ppo_epochs passes of clipped policy and value loss, plus rehearsal [Eq. 9] -> means of the dials.

    rehearsal_rows: an iterator over D_R or None. Raises InputError where a gradient is not finite.
    """
    dials, rehearsal_nll, first_ratio = [], [], 0.0
    sequences = rollout.sequences
    lengths = [len(x) + len(y) for x, y in sequences]
    for _ in range(args.num_ppo_epochs):
        for mini in torch.randperm(len(sequences)).split(len(sequences) // args.num_mini_batches):
            tokens = rollout.mask[mini].sum()
            sums = torch.zeros(len(DIALS), device=tokens.device)
            for micro, weight in dealt_batches(lengths, args.per_device_train_batch_size, mini.tolist(), SHARE):
                ids, attention = pad([sequences[i][0] + sequences[i][1] for i in micro], pad_id)
                prompt_lens = torch.tensor([len(sequences[i][0]) for i in micro], device=ids.device)
                with autocast(args.bf16):
                    new, m = response_logprobs(policy_engine, ids, attention, prompt_lens, args.temperature)
                    new_values = critic_engine(ids, attention, prompt_lens)
                old, advantages, returns, old_values = (
                    v[micro, : m.shape[1]][m]
                    for v in (rollout.logprobs, rollout.advantages, rollout.returns, rollout.values)
                )
                new, new_values = new[m], new_values[m]  # (tokens of the micro-batch,)
                loss_p = weight * policy_loss(new, old, advantages, args.cliprange).sum() / tokens
                loss_v = weight * value_loss(new_values, old_values, returns, args.cliprange_value).sum() / tokens
                if step > args.critic_warmup_steps:
                    policy_engine.backward(loss_p)
                critic_engine.backward(args.vf_coef * loss_v)
                with torch.no_grad():
                    ratio = (new - old).exp()
                    clipped = weight * ((ratio - 1).abs() > args.cliprange).sum()
                    kl = weight * 0.5 * (new - old).square().sum()
                    sums += torch.stack([loss_p, loss_v, kl / tokens, clipped / tokens, weight * ratio.sum() / tokens])
                    if not dials:  # no optimiser step has been made yet
                        first_ratio = np.maximum(first_ratio, (ratio - 1).abs().max().item())  # keeps NaN
            if not dials:
                check_first_ratio(first_ratio := largest(first_ratio), args.bf16)
            if rehearsal_rows and args.rehearsal_coef and step > args.critic_warmup_steps:
                rows = list(itertools.islice(rehearsal_rows, args.rehearsal_batch_size))
                rehearsal_nll.append(rehearse(args, policy_engine, pad_id, rows))  # [Eq. 9]: L_PPO + gamma NLL(D_R)
            if step > args.critic_warmup_steps:
                check_finite("policy's gradient norm", policy_engine.step(), step, folder, sequences)
            check_finite("critic's gradient norm", critic_engine.step(), step, folder, sequences)
            dials.append(sums)
    dials = dict(zip(DIALS, total(torch.stack(dials)).mean(0).tolist(), strict=True))
    dials["val/first_ratio_error"] = first_ratio
    return dials | ({"loss/rehearsal_nll": float(np.mean(rehearsal_nll))} if rehearsal_nll else {})


# --- evaluation --------------------------------------------------------------------------------------------------------


def answer_test_prompts(args, step, policy, reference, score, tokenizer, sets, gold_reward, samples):
    """Answer every test prompt once, write the answers to `samples`, return mean scores, gold, KL, length and,
    where rows have a `response`, its NLL a token (nats)."""
    metrics = {}
    for label, (rows, prompts) in sets.items():
        with seeded(args.seed):  # the same randomness at every evaluation, and none taken from training
            sampling = (args.response_length, args.temperature, args.per_device_eval_batch_size, args.bf16)
            responses = generate(policy, tokenizer, prompts, *sampling)

        def log_prob(model, sequences):  # of whole responses: (batch,)
            def of_batch(*batch):
                return (response_logprobs(model, *batch, args.temperature)[0].sum(1),)

            batch = (args.per_device_eval_batch_size, args.bf16)
            return forward_batches(of_batch, sequences, tokenizer.pad_token_id, *batch)[0]

        sequences = list(zip(prompts, responses, strict=True))
        kl = log_prob(policy, sequences) - log_prob(reference, sequences)
        texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
        stops = stop_ids(policy, tokenizer)
        scores = score(rows, sequences, texts, torch.tensor([y[-1] in stops for y in responses]))
        gold = gold_reward([r["prompt"] for r in rows], texts) if gold_reward else [None] * len(rows)
        for i, row in enumerate(rows):
            line = {"step": step, "set": label, "prompt": row["prompt"], "task": row.get("task", "all")}
            line |= {"response": texts[i], "score": scores[i].item(), "gold": gold[i]}
            samples.write(json.dumps(line, ensure_ascii=False) + "\n")
        if all(isinstance(row.get("response"), str) for row in rows):  # known answers: what has been forgotten of them?
            length = (args.max_length, True, label)
            pairs = [encode_pair(tokenizer, row["prompt"], row["response"], *length)[:2] for row in rows]
            known = [(ids[:prompt_len], ids[prompt_len:]) for ids, prompt_len in pairs]
            metrics[f"eval/{label}/nll"] = -log_prob(policy, known).sum().item() / sum(len(y) for _, y in known)
        metrics[f"eval/{label}/score"] = scores.mean().item()
        metrics[f"eval/{label}/kl"] = kl.mean().item()
        metrics[f"eval/{label}/length"] = float(np.mean([len(r) for r in responses]))
        if gold_reward:
            metrics[f"eval/{label}/gold"] = float(np.mean(gold))
    return metrics


def load_prompts(args, name, tokenizer, limit=0):
    """Rows of a prompt file (at most `limit`) and their token ids, each leaving room for the response."""
    rows = load_rows(name, {"prompt": "prompt"}, limit)
    length = (args.max_length, args.response_length, args.truncate_prompts)
    return rows, encode_prompts(tokenizer, rows, *length, name)


def main(args: Args):
    # --- set up: everything that can be wrong is found before a model runs ------------------------------------------
    if args.num_mini_batches < 1 or args.global_batch_size % args.num_mini_batches:
        raise InputError("--global_batch_size: must be a multiple of --num_mini_batches")
    if min(args.total_steps, args.eval_steps, args.num_ppo_epochs, args.response_length) < 1:
        raise InputError("--total_steps, --eval_steps, --num_ppo_epochs, --response_length: must be positive")
    if args.critic_warmup_steps >= args.total_steps:
        raise InputError("--critic_warmup_steps: must be below --total_steps, or the policy never learns")
    if max(args.gamma, args.lam, args.moving_average_decay) > 1 or min(args.score_scale, args.temperature) <= 0:
        raise InputError("--gamma, --lam, --moving_average_decay: at most 1; --score_scale, --temperature: positive")
    gold_reward = load_function(args.gold_reward, "--gold_reward") if args.gold_reward else None
    tokenizer = load_tokenizer(args.model_name_or_path)
    pad_id = tokenizer.pad_token_id
    rows, prompts = load_prompts(args, args.dataset_name, tokenizer)
    test_sets = {
        Path(name).name.split(".")[0]: load_prompts(args, name, tokenizer, args.max_eval_prompts)
        for name in args.eval_dataset_names
    }
    if len(test_sets) < len(args.eval_dataset_names):
        raise InputError("--eval_dataset_names: two files have one name")
    rehearsal, crucial, kl_weights = [], set(), torch.ones(len(rows), device=device())
    if args.rehearsal_dataset_name:
        for i, row in enumerate(load_rows(args.rehearsal_dataset_name, {"prompt": "prompt", "response": "text"}), 1):
            where = f"{args.rehearsal_dataset_name}, line {row.get('file_line', i)}"
            pair = encode_pair(tokenizer, row["prompt"], row["response"], args.max_length, args.truncate_prompts, where)
            rehearsal.append(pair[:2])
            crucial.add(str(row["prompt"]))
        inside = torch.tensor([str(row["prompt"]) in crucial for row in rows], device=device())
        kl_weights[inside] = args.rehearsal_kl_weight
        if args.rehearsal_kl_weight != 1 and not inside.any():
            raise InputError("--rehearsal_kl_weight: no prompt of --dataset_name is in --rehearsal_dataset_name")
    elif args.rehearsal_kl_weight != 1:
        raise InputError("--rehearsal_kl_weight: needs --rehearsal_dataset_name, the prompts that it weighs")
    score, critic = load_scorer_and_critic(args, tokenizer)
    # eval() throughout: with dropout on, the first ratio would not be 1
    policy = load_policy(args.model_name_or_path).eval()
    critic.eval()
    answered = prompts + [x for _, test_prompts in test_sets.values() for x in test_prompts]
    lengths = [len(x) + args.response_length for x in answered] + [len(ids) for ids, _ in rehearsal]
    for model in (policy, critic.model):
        check_positions(model, max(lengths))
    policy_engine = make_engine(args, policy, args.learning_rate, max_grad_norm=args.max_grad_norm)
    critic_engine = make_engine(args, critic, args.critic_learning_rate, max_grad_norm=args.max_grad_norm)
    reference = AdaptersOff(policy_engine) if args.lora_rank else frozen(args, load_policy, args.model_name_or_path)
    moving_average, alarms = MovingAverage(args.moving_average_decay), Alarms()
    sampling = (args.response_length, args.temperature, args.per_device_eval_batch_size, args.bf16)

    def evaluate(step):
        models = policy_engine, reference
        return answer_test_prompts(args, step, *models, score, tokenizer, test_sets, gold_reward, samples)

    def roll_out(batch):
        responses = generate(policy_engine, tokenizer, [prompts[i] for i in batch], *sampling)
        sequences = [(prompts[i], y) for i, y in zip(batch, responses, strict=True)]  # (x ids, y ids)
        models = policy_engine, reference, critic_engine
        rollout = score_rollout(args, tokenizer, *models, score, [rows[i] for i in batch], sequences)
        add_advantages(args, rollout, moving_average, args.kl_coef * kl_weights[batch, None])
        return rollout

    # --- start, or go on where the checkpoint was written ------------------------------------------------------------
    torch.manual_seed(args.seed)
    if args.explain:
        print(explain(args, tokenizer, roll_out(list(itertools.islice(endless(range(len(prompts)), args.seed, 0), 3)))))
        return
    saved = load_checkpoint(args.output_dir, args) if args.resume else None
    done = saved["step"] if saved else 0
    log = RunLog(args, [args.dataset_name, args.rehearsal_dataset_name or "", *args.eval_dataset_names], done)
    samples = open(log.samples_file, "a" if saved else "w", encoding="utf-8", buffering=1)  # line by line
    if saved:
        policy_engine.load_state(saved["policy"])
        critic_engine.load_state(saved["critic"])
        vars(moving_average).update(saved["moving_average"])
        alarms.load_state(saved["alarms"])
        start = saved["start"]
    else:
        check_sampler(args, policy_engine, reference, tokenizer, prompts[: min(16, args.global_batch_size)])
        start = evaluate(0)
        log.write(0, start)
    updates = max(0, done - args.critic_warmup_steps) * args.num_ppo_epochs * args.num_mini_batches
    next_prompt = endless(range(len(prompts)), args.seed, done * args.global_batch_size)
    rehearsal_rows = endless(rehearsal, args.seed, updates * args.rehearsal_batch_size) if rehearsal else None

    progress = tqdm(total=args.total_steps, initial=done, desc="ppo", disable=rank() > 0 or None)
    for step in range(done + 1, args.total_steps + 1):
        # --- 1 sample, 2 score, 3 advantages ------------------------------------------------------------------------
        batch = list(itertools.islice(next_prompt, args.global_batch_size))
        rollout = roll_out(batch)
        batch_rows = [rows[i] for i in batch]

        # --- 4 update, 5 rehearse -----------------------------------------------------------------------------------
        dials = update(args, step, policy_engine, critic_engine, pad_id, rollout, rehearsal_rows, log.folder)

        # --- 6 log --------------------------------------------------------------------------------------------------
        metrics = rollout_metrics(rollout, [row.get("task", "all") for row in batch_rows]) | dials
        if gold_reward:
            gold = gold_reward([row["prompt"] for row in batch_rows], rollout.texts)
            metrics["objective/gold"] = float(np.mean(gold))
        rung = alarms.ring(step, metrics)
        last = step == args.total_steps or (rung and args.stop_on_alarm)
        if step % args.eval_steps == 0 or last:
            now = evaluate(step)
            metrics |= now | {  # Fig. 5a: how far the scorer's mean has risen over the SFT policy's
                key.replace("/score", "/delta_score"): now[key] - start[key] for key in start if key.endswith("/score")
            }
            shown = {"score": metrics["objective/scores"], "kl": metrics["objective/kl"]} | now
            tqdm.write(f"step {step}: " + "  ".join(f"{k.removeprefix('eval/')} {v:.3g}" for k, v in shown.items()))
            for k in range(min(args.num_samples_logged, len(batch))):
                line = {"step": step, "set": "train", "prompt": batch_rows[k]["prompt"], "response": rollout.texts[k]}
                line["score"] = rollout.raw_scores[k].item()
                samples.write(json.dumps(line, ensure_ascii=False) + "\n")
        log.write(step, metrics)
        if args.save_steps and step % args.save_steps == 0:
            state = {"policy": policy_engine, "critic": critic_engine, "start": start}
            state |= {"moving_average": vars(moving_average), "alarms": alarms.state()}
            save_checkpoint(log.folder, args, step, state)
        progress.update()
        progress.set_postfix(score=f"{metrics['objective/scores']:.3f}", kl=f"{metrics['objective/kl']:.2f}")
        for line in rung:
            tqdm.write(line)
        if last:
            break
    progress.close()
    samples.close()

    # --- 7 save -----------------------------------------------------------------------------------------------------
    save_model(policy_engine, log.folder / "model", tokenizer)
    print(f"policy written to {log.folder / 'model'}")


if __name__ == "__main__":
    run_cli(main, Args, __doc__)
