"""PPO with Selective Rehearsal: Eq. 2 and 9 of "Stabilizing RLHF through Advantage Model and
Selective Rehearsal" (Peng et al. 2023).

    for each step:
        1 sample      y ~ pi(. | x) for a batch of prompts x
        2 score       r(x, y) by the scorer; log-probs under pi and pi_init; values V_t
        3 advantages  rewards -beta log(pi / pi_init), plus r on the last token [Eq. 2]; GAE
        4 update      clipped policy loss + gamma x NLL of the rehearsal set D_R [Eq. 9], and
                      clipped value loss, in num_ppo_epochs passes over the batch
        5 log         and every eval_steps answer the test prompts

The paper's arms. The scorer decides between RM and AM:

    RM-PPO          --reward_model_path runs/rm/model
    RM-PPO w/ MA    --reward_model_path runs/rm/model --moving_average_decay 0.99
    RM rescaled     --reward_model_path runs/rm/model --score_scale 0.25      (control: AM's std)
    AM-PPO          --reward_model_path runs/am/model
    AM-PPO-SR       ... --rehearsal_dataset_name runs/select/rehearsal.jsonl

    python ppo_sr.py --model_name_or_path runs/sft/model --reward_model_path runs/am/model \\
        --dataset_name prompts.jsonl --output_dir runs/ppo

What the paper leaves open (docs/CHOICES.md has the numbers):
  C4  Eq. 2 is maximised, its KL is paid token by token, and Eq. 9 minimises -log pi.
  C5  The NLL of Eq. 9 is a mean over tokens, as PPO's losses are (--rehearsal_reduction).
  C8  The paper does not state beta, GAE's gamma and lambda, the clip ranges, the critic's start.
  C9  The paper does not define the moving average of RM-PPO w/ MA.

Two symbols mean two things. gamma is GAE's discount here, the paper's gamma is --rehearsal_coef.
r_t is a ratio in PPO papers and a reward in Eq. 2: here they are `ratio` and `rewards`.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from utils import DEVICE, InputError, RunLog, autocast, backend, check_positions, encode_pair
from utils import encode_prompts, encode_rows, forward_batches, generate, length_batches
from utils import load_function, load_policy, load_rows, load_scorer, load_tokenizer, pad_pairs
from utils import response_logprobs, run_cli, save_model, score_texts, seeded, stop_ids


@dataclass
class Args:
    model_name_or_path: str
    """the SFT policy, where the policy starts and pi_init stays: folder or hub id"""
    dataset_name: str
    """PPO prompts: .jsonl, .jsonl.gz, .parquet or a hub id; rows with `prompt`, optional `task`"""
    output_dir: str
    """the run folder; the policy is written to its model/"""
    reward_model_path: str | None = None
    """the scorer, RM or AM, written by am_train.py"""
    reward_function: str | None = None
    """module:function(prompts, responses) -> scores, in the place of a scorer"""
    score_scale: float = 1.0
    """factor on the scores and on the critic's start (control: RM scores at AM's std)"""
    moving_average_decay: float | None = None
    """normalise scores by moving averages with this decay (RM-PPO w/ MA: 0.99, our choice C9)"""
    missing_eos_penalty: float = 0.0
    """for a response without <eos>, in units of the batch's std of scores (our choice C10)"""
    rehearsal_dataset_name: str | None = None
    """D_R of Eq. 9: rows `prompt`, `response`, as select_rehearsal.py writes them"""
    rehearsal_coef: float = 0.01
    """gamma of Eq. 9 (paper §3.2)"""
    rehearsal_batch_size: int = 64
    """rehearsal rows an update (not stated in the paper; our choice C6)"""
    rehearsal_reduction: Literal["mean", "sum"] = "mean"
    """Eq. 9's NLL: mean over tokens, or sum over tokens, mean over rows as printed (C5)"""
    total_steps: int = 100
    """PPO steps (paper §4.2); a step is one batch of fresh responses (our choice C13)"""
    critic_warmup_steps: int = 0
    """in the first of the steps the critic learns alone (PPO-max, §5.3.3)"""
    global_batch_size: int = 256
    """prompts a step (paper §4.2)"""
    num_ppo_epochs: int = 2
    """passes over the batch (not stated in the paper; our choice C8; PPO-max: 1)"""
    num_mini_batches: int = 1
    """optimiser steps a pass (not stated in the paper; our choice C8; PPO-max: 4)"""
    per_device_train_batch_size: int = 64
    """sequences a training pass; gradients add up over the mini-batch"""
    per_device_eval_batch_size: int = 256
    """sequences a pass in sampling and scoring"""
    learning_rate: float = 5e-7
    """of the policy (paper §4.2), constant, AdamW (our choice C16)"""
    critic_learning_rate: float = 1.5e-6
    """of the critic (PPO-max), constant, AdamW (our choice C16)"""
    max_grad_norm: float = 1.0
    """gradients of a larger norm are scaled down to it (PPO-max; inf: never)"""
    kl_coef: float = 0.05
    """beta of Eq. 2 (not stated in the paper: TRL's, our choice C8; PPO-max: 0.02)"""
    gamma: float = 1.0
    """discount of GAE (PPO-max; not the paper's gamma)"""
    lam: float = 0.95
    """lambda of GAE (PPO-max)"""
    cliprange: float = 0.2
    """the ratio counts within 1 - this and 1 + this (PPO-max; inf: no clip)"""
    cliprange_value: float = 0.2
    """a new value counts within this of the old one (PPO-max; inf: no clip)"""
    whiten_advantages: bool = True
    """advantages to mean 0 and std 1 over the tokens of the batch (our choice C8)"""
    response_length: int = 64
    """tokens that a response may have"""
    temperature: float = 1.0
    """of sampling and of all log-probs alike (not stated in the paper; our choice C8)"""
    max_length: int = 512
    """tokens of prompt and response together"""
    truncate_prompts: bool = False
    """shorten a prompt that leaves no room for the response instead of refusing it"""
    eval_dataset_names: tuple[str, ...] = ()
    """prompt files to answer at the start, every --eval_steps and at the end"""
    max_eval_prompts: int = 0
    """answer only the first prompts of each of those files (0: all)"""
    eval_steps: int = 10
    """steps between two evaluations"""
    gold_reward: str | None = None
    """module:function(prompts, responses) -> scores, logged and never trained on"""
    explain: bool = False
    """print three responses token by token, with each term of Eq. 2, and stop"""
    save_steps: int = 0
    """steps between two checkpoints that --resume can start from (0: none)"""
    resume: bool = False
    """go on from the checkpoint in output_dir, to the numbers of a run that was never stopped"""
    seed: int = 1
    """seed of sampling and data order"""
    bf16: bool = False
    """matrix products in bfloat16 over float32 weights"""


# === The equations. They need torch alone, and may be copied as a whole. ==========================
#
#   tokens     <bos> name the capital <sep> | the  capital  is  rome <eos> <pad>
#   index        0    1    2    3      4       5     6      7    8     9    10
#   column t                                   0     1      2    3     4
#
# Matrices are (batch, response_len). Column t holds the t-th token of the response y: its
# log-prob, its reward, and V_t. Log-prob and V_t are read one token early, before y_t is seen:
# here at indices 4 to 8.


def token_rewards(scores, logprobs, ref_logprobs, mask, kl_coef):
    """[Eq. 2]  -beta log(pi(y_t) / pi_init(y_t)) at every token, plus r(x, y) at the last one.

    scores (batch,), kl_coef a number or (batch, 1). The sum over t is Eq. 2 of one (x, y).
    """
    rewards = -kl_coef * (logprobs - ref_logprobs) * mask
    last = mask.sum(1) - 1  # (batch,)
    rewards[torch.arange(len(rewards)), last] += scores
    return rewards


def generalized_advantages(rewards, values, mask, gamma, lam):
    """GAE:  A_t = sum_k (gamma lam)^k d_{t+k},   d_t = reward_t + gamma V_{t+1} - V_t.

    V is 0 behind the last token. Returns A_t and the returns A_t + V_t, 0 outside the mask.
    """
    values = values * mask
    advantages = torch.zeros_like(rewards)
    next_advantage = next_value = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):  # from the end: A_t needs A_{t+1}
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = (delta + gamma * lam * next_advantage) * mask[:, t]
        advantages[:, t], next_value = next_advantage, values[:, t]
    return advantages, (advantages + values) * mask


def whiten(values, mask):
    """Mean 0 and (unbiased) std 1 over the tokens of the mask; 0 outside."""
    kept = values[mask]
    return (values - kept.mean()) / (kept.std() + 1e-8) * mask


def clipped_policy_loss(ratio, advantages, cliprange):  # each (tokens,)
    """PPO:  max(-ratio A, -clip(ratio, 1 - eps, 1 + eps) A),   ratio = pi / pi_old.

    The max is the pessimist: beyond the clip range a ratio gains nothing where it would look
    better, and still pays where it looks worse.
    """
    clipped = ratio.clamp(1 - cliprange, 1 + cliprange)
    return torch.max(-ratio * advantages, -clipped * advantages)


def clipped_value_loss(values, old_values, returns, cliprange):  # each (tokens,)
    """1/2 max((V - R)^2, (clip(V, V_old - eps, V_old + eps) - R)^2).

    The pessimist again: a value does not look good for having moved far in one update.
    """
    clipped = old_values + (values - old_values).clamp(-cliprange, cliprange)
    return 0.5 * torch.max((values - returns) ** 2, (clipped - returns) ** 2)


def rehearsal_loss(logprobs, mask, count):  # (rows, response_len)
    """[Eq. 9]  E_{(x, y) ~ D_R} -log pi(y | x):  the sum over tokens / count.

    count: the rows of D_R, as printed, or their tokens: a mean over tokens, as PPO's losses are.
    """
    return -(logprobs * mask).sum() / count


class MovingAverage:
    """RM-PPO w/ MA: averages of the batches' means and mean squares. A batch counts `decay` times
    as much as the one after it; at 1 all count the same (PPO-max's historical mean and std)."""

    def __init__(self, decay):
        self.decay, self.weight, self.mean, self.square = decay, 0.0, 0.0, 0.0

    def normalize(self, scores):  # (batch,)
        """Take the batch in, then return (scores - mean) / std."""
        exact = scores.double()  # a difference of squares loses digits
        self.weight = self.decay * self.weight + 1  # the sum of all weights so far
        self.mean = self.decay * self.mean + exact.mean().item()
        self.square = self.decay * self.square + exact.square().mean().item()
        mean = self.mean / self.weight
        std = max(self.square / self.weight - mean**2, 1e-8) ** 0.5
        return (scores - mean) / std


# === end of the equations =========================================================================


class Critic(nn.Module):
    """V(x, y_<t): a backbone and a score head, read at every token (our choice C8)."""

    def __init__(self, scorer, score_scale):
        super().__init__()
        self.model = scorer.model
        head = self.model.score.weight
        with torch.no_grad(), backend.whole([head]):
            head.mul_(score_scale)  # values start on the scale of the scores

    def forward(self, input_ids, attention_mask, prompt_lens):
        """(batch, seq_len) -> (batch, response_len)."""
        hidden = self.model.base_model(input_ids, use_cache=False).last_hidden_state
        response_len = int((attention_mask.sum(1) - prompt_lens).max())
        index = prompt_lens[:, None] - 1 + torch.arange(response_len, device=hidden.device)
        index = index.clamp(max=hidden.shape[1] - 1)[..., None].expand(-1, -1, hidden.shape[2])
        return self.model.score(hidden.gather(1, index)).squeeze(-1).float()


@dataclass
class Rollout:
    """What was seen. Matrices are (batch, response_len), 0 past a response."""

    rows: list  # of the prompt file
    sequences: list  # (prompt ids, response ids)
    texts: list  # of the responses
    finished: torch.Tensor  # (batch,) bool: the response ended by itself
    raw_scores: torch.Tensor  # (batch,)
    mask: torch.Tensor
    logprobs: torch.Tensor  # under pi_old, which sampled
    ref_logprobs: torch.Tensor  # under pi_init
    entropy: torch.Tensor
    values: torch.Tensor


@dataclass
class Experience:
    """What PPO makes of it."""

    scores: torch.Tensor  # (batch,): scaled, normalised, less the penalty
    kl_coef: float  # beta
    rewards: torch.Tensor  # these three (batch, response_len)
    advantages: torch.Tensor
    returns: torch.Tensor


class PPO:
    """Models, data, and the stages of a step. baselines/ppo_max.py varies it."""

    update_metrics = ("loss/policy_avg", "loss/value_avg", "policy/approxkl_avg")
    update_metrics += ("policy/clipfrac_avg", "val/ratio", "loss/rehearsal_nll")

    def __init__(self, args):
        """What can be wrong is found here, before a model runs."""
        self.args = args
        self.load_data()
        policy = load_policy(args.model_name_or_path)
        critic = self.load_scorer_and_critic(policy)
        for model in policy, critic:  # with dropout on, the first ratio would not be 1
            model.eval()
        for model in policy, critic.model:
            check_positions(model, self.longest())
        norm = {"max_grad_norm": args.max_grad_norm}
        self.policy = backend.engine(policy, args.learning_rate, **norm)
        self.critic = self.critic_engine(critic, args.critic_learning_rate, **norm)
        self.reference = backend.reference(self.policy, args.model_name_or_path)
        self.moving_average = MovingAverage(args.moving_average_decay)

    def load_data(self):
        args, self.gold_reward = self.args, None
        if args.gold_reward:
            self.gold_reward = load_function(args.gold_reward, "--gold_reward")
        self.tokenizer = load_tokenizer(args.model_name_or_path)
        self.rows, self.prompts = self.load_prompts(args.dataset_name)
        self.test_sets = {}
        for name in args.eval_dataset_names:
            label = Path(name).name.split(".")[0]
            if label in self.test_sets:
                raise InputError(f"--eval_dataset_names: two files are called {label}")
            self.test_sets[label] = self.load_prompts(name, args.max_eval_prompts)
        self.rehearsal = self.load_pairs(args.rehearsal_dataset_name)

    def load_prompts(self, name, limit=0):
        """Rows of a prompt file and their token ids, each leaving room for the response."""
        args, rows = self.args, load_rows(name, {"prompt": "prompt"}, limit)
        length = args.max_length, args.response_length, args.truncate_prompts
        return rows, encode_prompts(self.tokenizer, rows, *length, name)

    def load_pairs(self, name):
        """Pairs to be replayed, such as D_R: [(prompt ids, response ids)]."""
        rows = load_rows(name, {"prompt": "prompt", "response": "response"}) if name else []
        texts = encode_rows(self.tokenizer, rows, "response", self.args, name)
        return [(ids[:prompt_len], ids[prompt_len:]) for ids, prompt_len in texts]

    def longest(self):
        """Tokens of the longest text that the models will read."""
        prompts = [*self.prompts, *(x for _, ids in self.test_sets.values() for x in ids)]
        answered = max(map(len, prompts)) + self.args.response_length
        return max([answered, *(len(x) + len(y) for x, y in self.rehearsal)])

    def load_scorer_and_critic(self, policy):
        """Sets self.scores(rows, sequences, texts, finished) -> (batch,); returns the critic.

        A scorer with the policy's tokenizer reads the sampled ids, and the critic starts from it.
        Any other one reads the texts, and the critic starts from the policy, at V = 0.
        """
        args, path = self.args, self.args.reward_model_path
        if (path is None) == (args.reward_function is None):
            raise InputError("--reward_model_path, --reward_function: give one of them")
        if args.reward_function:
            function = load_function(args.reward_function, "--reward_function")
            self.scores = lambda rows, sequences, texts, finished: torch.tensor(
                function([row["prompt"] for row in rows], texts), device=DEVICE
            )
            return self.critic_from_policy()
        tokenizer = load_tokenizer(path)
        scorer = load_scorer(path, tokenizer, frozen=True)
        vocabulary = tokenizer.get_vocab()  # it may hold a padding token more than the policy's
        same = all(vocabulary.get(t) == i for t, i in self.tokenizer.get_vocab().items())
        same = same and not scorer.is_encoder

        def scores(rows, sequences, texts, finished):
            """a(x, y) = r - e  [Eq. 8 with K = 0], (batch,), as the scorer gives it."""
            pairs = [(x + y, len(x)) for x, y in sequences]
            for i, row in enumerate(rows if not same else ()):
                length = args.max_length, True, "a response", scorer.is_encoder
                ids, prompt_len, _ = encode_pair(tokenizer, row["prompt"], texts[i], *length)
                if not (finished[i] or scorer.is_encoder) and ids[-1] == tokenizer.eos_token_id:
                    ids = ids[:-1]  # the response was cut: it has no <eos>
                pairs[i] = ids, prompt_len
            r, e = score_texts(scorer, tokenizer, pairs, args.per_device_eval_batch_size, args.bf16)
            return torch.tensor(r - e, dtype=torch.float32, device=DEVICE)

        self.scores = scores
        if not same:
            check_positions(scorer.model, args.max_length)
            return self.critic_from_policy()
        return Critic(load_scorer(path, tokenizer), args.score_scale)

    def critic_from_policy(self):
        return Critic(load_scorer(self.args.model_name_or_path, self.tokenizer, trained=False), 0.0)

    def critic_engine(self, critic, learning_rate, **options):
        return backend.engine(critic, learning_rate, **options)

    # --- 1 sample, 2 score, 3 advantages ----------------------------------------------------------

    def sample(self, prompts, logprobs=False):
        """y ~ pi(. | x) for every prompt: lists of ids."""
        args = self.args
        how = args.response_length, args.temperature, args.per_device_eval_batch_size, args.bf16
        return generate(self.policy, self.tokenizer, prompts, *how, logprobs)

    def logprobs_of(self, model, *batch, **options):
        """log pi(y_t) and the mask. Old, new and pi_init's log-probs all go through this line."""
        return response_logprobs(model, *batch, self.args.temperature, **options)

    def pad(self, sequences):
        """[(prompt ids, response ids)] -> input_ids, attention_mask, prompt_lens."""
        return pad_pairs(sequences, self.tokenizer.pad_token_id)

    def in_batches(self, function, sequences):
        """function(input_ids, attention_mask, prompt_lens) of all sequences, without gradients."""
        size, pad_id = self.args.per_device_eval_batch_size, self.tokenizer.pad_token_id
        return forward_batches(function, sequences, pad_id, size, self.args.bf16)

    def read(self, responses):
        """Their texts, and whether each ended by itself."""
        stops = stop_ids(self.policy, self.tokenizer)
        finished = torch.tensor([y[-1] in stops for y in responses], device=DEVICE)
        return self.tokenizer.batch_decode(responses, skip_special_tokens=True), finished

    def score(self, rows, sequences):
        """The Rollout: how scorer, both policies and critic see the responses."""

        def look(*batch):
            logprobs, _, entropy = self.logprobs_of(self.policy, *batch, entropy=True)
            ref_logprobs, _ = self.logprobs_of(self.reference, *batch)
            return logprobs, ref_logprobs, entropy, self.critic(*batch)

        responses = [y for _, y in sequences]
        texts, finished = self.read(responses)
        raw_scores = self.scores(rows, sequences, texts, finished)
        matrices = self.in_batches(look, sequences)
        response_lens = torch.tensor([len(y) for y in responses], device=DEVICE)
        mask = torch.arange(matrices[0].shape[1], device=DEVICE) < response_lens[:, None]
        return Rollout(rows, sequences, texts, finished, raw_scores, mask, *matrices)

    def ppo_scores(self, rollout):
        """The scores as PPO sees them, (batch,)."""
        scores = rollout.raw_scores * self.args.score_scale
        if self.args.moving_average_decay is not None:
            scores = self.moving_average.normalize(scores)
        return scores

    def kl_coef(self, rows):
        """beta of Eq. 2 for these prompts."""
        return self.args.kl_coef

    def advantages(self, rollout):
        """The Experience: rewards of Eq. 2, then advantages and returns by GAE."""
        args, mask, kl_coef = self.args, rollout.mask, self.kl_coef(rollout.rows)
        scores = self.ppo_scores(rollout)
        if args.missing_eos_penalty:
            scores = scores - args.missing_eos_penalty * scores.std() * ~rollout.finished
        policies = rollout.logprobs, rollout.ref_logprobs
        rewards = token_rewards(scores, *policies, mask, kl_coef)  # [Eq. 2]
        gae = generalized_advantages(rewards, rollout.values, mask, args.gamma, args.lam)
        advantages, returns = gae
        if args.whiten_advantages:
            advantages = whiten(advantages, mask)
        return Experience(scores, kl_coef, rewards, advantages, returns)

    # --- 4 update ---------------------------------------------------------------------------------

    def learn(self, step, rollout, experience, log):
        """num_ppo_epochs passes over the batch -> means of update_metrics over its updates."""
        args, found = self.args, []
        for _ in range(args.num_ppo_epochs):
            shuffled = torch.randperm(len(rollout.sequences))
            for mini_batch in shuffled.split(len(shuffled) // args.num_mini_batches):
                found.append(self.update(step, rollout, experience, mini_batch.tolist()))
                for name, engine in ("policy", self.policy), ("critic", self.critic):
                    if name == "critic" or self.policy_learns(step):
                        norm, what = engine.step(), f"{name}'s gradient norm"
                        log.check_finite(what, norm, step, rollout.sequences)
        means = torch.stack(found).mean(0).tolist()
        metrics = dict(zip(self.update_metrics, means, strict=True))
        if not (self.rehearsal and self.policy_learns(step)):
            del metrics["loss/rehearsal_nll"]
        return metrics

    def policy_learns(self, step):
        return step > self.args.critic_warmup_steps

    def update(self, step, rollout, experience, mini_batch):
        """Gradients of a mini-batch, a list of sequences [Eq. 9] -> sums of update_metrics."""
        args, learns, parts = self.args, self.policy_learns(step), []
        num_tokens = rollout.mask[mini_batch].sum()
        rehearsal = list(itertools.islice(self.rehearsal_rows, args.rehearsal_batch_size * learns))
        count = len(rehearsal)
        if args.rehearsal_reduction == "mean":
            count = sum(len(y) for _, y in rehearsal)
        for batch, replayed in self.micro_batches(rollout, mini_batch, rehearsal):
            now = self.forward(rollout, batch, replayed, learns)
            logprobs, values, replayed_logprobs, replayed_mask = now
            mask = rollout.mask[batch]  # from here on one number a token, (tokens,)
            old_logprobs, old_values = rollout.logprobs[batch][mask], rollout.values[batch][mask]
            advantages, returns = (
                experience.advantages[batch][mask],
                experience.returns[batch][mask],
            )

            # each loss is this batch's part of a mean over the tokens of the mini-batch
            ratio = (logprobs - old_logprobs).exp()
            policy_loss = clipped_policy_loss(ratio, advantages, args.cliprange)
            policy_loss = policy_loss.sum() / num_tokens
            value_loss = clipped_value_loss(values, old_values, returns, args.cliprange_value)
            value_loss = value_loss.sum() / num_tokens
            rehearsal_nll = rehearsal_loss(replayed_logprobs, replayed_mask, max(count, 1))
            loss = policy_loss + args.rehearsal_coef * rehearsal_nll  # [Eq. 9]
            if learns:
                self.policy.backward(loss)  # gradients add up until learn() steps
            self.critic.backward(value_loss)

            means = self.ratio_metrics(logprobs - old_logprobs, num_tokens)
            parts.append(torch.stack([policy_loss, value_loss, *means, rehearsal_nll]).detach())
        return backend.add_up(parts)

    def ratio_metrics(self, log_ratio, num_tokens):
        ratio = log_ratio.exp()
        outside = ((ratio - 1).abs() > self.args.cliprange).sum()
        parts = 0.5 * log_ratio.square().sum(), outside, ratio.sum()
        return [part / num_tokens for part in parts]  # approximate KL, clip fraction, mean ratio

    def micro_batches(self, rollout, mini_batch, replays):
        """(sequences, pairs to replay beside them): batches of similar length. The pairs are spread
        evenly over the mini-batch, long ones to long sequences, so every batch has its part."""
        length, size = [len(x) + len(y) for x, y in rollout.sequences], len(mini_batch)
        longest_first, partners = sorted(mini_batch, key=lambda i: -length[i]), {}
        for k, pair in enumerate(sorted(replays, key=lambda pair: -sum(map(len, pair[:2])))):
            partners.setdefault(longest_first[k * size // len(replays)], []).append(pair)
        how = self.args.per_device_train_batch_size, mini_batch, backend.length_ratio
        for batch in backend.deal(length_batches(length, *how)):
            yield batch, [pair for i in batch for pair in partners.get(i, ())]

    def forward(self, rollout, batch, replayed, learns, **options):
        """Policy and critic as they are now -> log-probs and values of the responses' tokens, each
        (tokens,); log-probs and mask of the replayed pairs; entropies if asked."""
        fresh, n = [rollout.sequences[i] for i in batch], len(batch)
        tokens = self.pad(fresh + [pair[:2] for pair in replayed])
        with autocast(self.args.bf16):
            with torch.set_grad_enabled(learns):  # no graph while the critic learns alone
                logprobs, mask, *entropy = self.logprobs_of(self.policy, *tokens, **options)
            values = self.critic(*self.pad(fresh))
        seen = mask[:n]
        values, entropy = values[seen[:, : values.shape[1]]], [e[:n][seen] for e in entropy]
        return logprobs[:n][seen], values, logprobs[n:], mask[n:], *entropy

    # --- what is measured -------------------------------------------------------------------------

    def check_before_step_1(self):
        """Before anything is learned three numbers are known: the KL to pi_init is 0, the sampler
        draws what the log-probs say, the first ratio is 1."""
        args, prompts = self.args, self.prompts[: min(16, self.args.global_batch_size)]
        with seeded(args.seed):  # nothing learns from these responses
            responses, drawn = self.sample(prompts, logprobs=True)
        tokens = self.pad(list(zip(prompts, responses, strict=True)))
        with torch.no_grad(), autocast(args.bf16):
            old, mask = self.logprobs_of(self.policy, *tokens)
            initial, _ = self.logprobs_of(self.reference, *tokens)
        with autocast(args.bf16):
            new, _ = self.logprobs_of(self.policy, *tokens)  # as an update does it
        drawn = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in drawn], True).to(DEVICE)
        kl, sampler, ratio = old - initial, drawn - old, (new - old).exp() - 1
        check_zero("KL to pi_init", kl[mask], "two models, or dropout or dtype differ", args)
        causes = "top-k, top-p, penalty or temperature in the sampler, a shifted mask"
        check_zero("sampler's log-prob less the model's", sampler[mask], causes, args)
        check_zero("first ratio - 1", ratio[mask], "dropout is on in updates", args)

    def metrics(self, rollout, experience):
        """The metrics of a batch of responses, by TRL's names; KL in nats a response."""
        mask, tasks = rollout.mask, np.array([row.get("task", "all") for row in rollout.rows])
        kl, returns = (rollout.logprobs - rollout.ref_logprobs).sum(1), experience.returns[mask]
        error = (returns - rollout.values[mask]).var() / returns.var().clamp(min=1e-8)
        found = {
            "objective/scores": rollout.raw_scores.mean(),
            "objective/scores_std": rollout.raw_scores.std(),
            "objective/rlhf_reward": experience.rewards.sum(1).mean(),
            "objective/kl": kl.mean(),
            "objective/entropy": rollout.entropy[mask].mean(),
            "policy/perplexity": (-rollout.logprobs[mask]).mean().exp(),
            "policy/perplexity_ref": (-rollout.ref_logprobs[mask]).mean().exp(),
            "val/response_length": mask.sum(1).float().mean(),
            "val/num_eos_tokens": rollout.finished.sum(),
        }
        for task in np.unique(tasks) if len({*tasks}) > 1 else ():
            of_task = torch.tensor(tasks == task, device=DEVICE)
            found[f"task/{task}/score"] = rollout.raw_scores[of_task].mean()
            found[f"task/{task}/kl"] = kl[of_task].mean()
        found = {name: value.item() for name, value in found.items()}
        found["val/no_eos_share"] = 1 - rollout.finished.float().mean().item()
        found["val/explained_variance"] = 1 - error.item()
        if self.gold_reward:
            gold = self.gold_reward([row["prompt"] for row in rollout.rows], rollout.texts)
            found["objective/gold"] = float(np.mean(gold))
        return found

    def log_prob(self, model, sequences):
        """log pi(y | x) of whole responses, (batch,)."""

        def of_batch(*batch):
            return (self.logprobs_of(model, *batch)[0].sum(1),)

        return self.in_batches(of_batch, sequences)[0]

    def answer_test_prompts(self, step, log):
        """Means of score, gold, KL (nats) and length of one answer to each test prompt, and where
        rows have a known `response`, its NLL a token. The answers go into samples.jsonl."""
        metrics = {}
        for label, (rows, prompts) in self.test_sets.items():
            with seeded(self.args.seed):  # the same each time, and none taken from training
                responses = self.sample(prompts)
            sequences = list(zip(prompts, responses, strict=True))
            kl = self.log_prob(self.policy, sequences) - self.log_prob(self.reference, sequences)
            texts, finished = self.read(responses)
            scores, gold = self.scores(rows, sequences, texts, finished), [None] * len(rows)
            if self.gold_reward:
                gold = self.gold_reward([row["prompt"] for row in rows], texts)
            found = {"score": scores.mean().item(), "kl": kl.mean().item()}
            found["length"] = float(np.mean([len(y) for y in responses]))
            if self.gold_reward:
                found["gold"] = float(np.mean(gold))
            if all(isinstance(row.get("response"), str) for row in rows):  # is it forgotten?
                known = encode_rows(self.tokenizer, rows, "response", self.args, label)
                known = [(ids[:prompt_len], ids[prompt_len:]) for ids, prompt_len in known]
                nll = -self.log_prob(self.policy, known).sum().item()
                found["nll"] = nll / sum(len(y) for _, y in known)
            metrics |= {f"eval/{label}/{name}": value for name, value in found.items()}
            log_samples(log, step, label, rows, texts, scores, gold)
        return metrics

    # --- a checkpoint -----------------------------------------------------------------------------

    def start_at(self, step):
        """Prompts and rehearsal rows from where a run of `step` steps has left them."""
        args = self.args
        self.updates = max(0, step - args.critic_warmup_steps)
        self.updates *= args.num_ppo_epochs * args.num_mini_batches
        used = self.updates * args.rehearsal_batch_size
        self.rehearsal_rows = endless(self.rehearsal, args.seed, used)
        return endless(range(len(self.rows)), args.seed, step * args.global_batch_size)

    def state(self):
        engines = {"policy": self.policy, "critic": self.critic}
        return engines | {"moving_average": vars(self.moving_average)}

    def load_state(self, saved):
        self.policy.load_state(saved["policy"])
        self.critic.load_state(saved["critic"])
        vars(self.moving_average).update(saved["moving_average"])

    def save(self, folder):
        save_model(self.policy, folder, self.tokenizer)


def check_zero(what, difference, causes, args):
    """Raises InputError where `difference` (tokens,) is more than rounding.

    Two ways to compute a log-prob differ by up to 7e-6 nats in float32, .07 in bfloat16 (24
    layers). Rounding has no direction, and filters have one: top-p .95 moves the mean by .017.
    """
    worst, mean = difference.abs().max().item(), difference.mean().item()
    allowed = 0.5 if args.bf16 else 1e-3
    if not (worst <= allowed and abs(mean) <= allowed / 50):  # `not`: NaN stops the run, too
        found = f"is off 0 by up to {worst:.2g}, on average by {mean:.2g}"
        raise InputError(f"before step 1: the {what} {found}; look for: {causes}")


def log_samples(log, step, label, rows, texts, scores, gold):
    samples = []
    for row, text, score, of_gold in zip(rows, texts, scores.tolist(), gold, strict=True):
        sample = {"step": step, "set": label, "prompt": row["prompt"], "response": text}
        sample |= {"task": row.get("task", "all"), "score": score, "gold": of_gold}
        samples.append(sample)
    log.append("samples.jsonl", samples)


def endless(items, seed, skip):
    """The items in shuffled passes, for ever, without the first `skip`, which are used up."""

    def indices():
        generator = torch.Generator().manual_seed(seed)
        while len(items):
            yield from torch.randperm(len(items), generator=generator).tolist()

    return (items[i] for i in itertools.islice(indices(), skip, None))


def check(args):
    if args.num_mini_batches < 1 or args.global_batch_size % args.num_mini_batches:
        raise InputError("--global_batch_size: must be a multiple of --num_mini_batches")
    if min(args.total_steps, args.eval_steps, args.num_ppo_epochs, args.response_length) < 1:
        flags = "--total_steps, --eval_steps, --num_ppo_epochs, --response_length"
        raise InputError(f"{flags}: must be positive")
    if args.critic_warmup_steps >= args.total_steps:
        raise InputError("--critic_warmup_steps: must be below --total_steps")
    if max(args.gamma, args.lam, args.moving_average_decay or 0) > 1:
        raise InputError("--gamma, --lam, --moving_average_decay: at most 1")
    if min(args.score_scale, args.temperature) <= 0:
        raise InputError("--score_scale, --temperature: must be positive")


def main(args: Args, algorithm=PPO):
    check(args)
    ppo = algorithm(args)
    torch.manual_seed(args.seed)
    if args.explain:
        from tools.explain import first_batch

        return print(first_batch(ppo))

    # --- start, or go on where the checkpoint was written ---
    log = RunLog(args)
    if log.saved:
        ppo.load_state(log.saved)
        start = log.saved["start"]
    else:
        ppo.check_before_step_1()
        start = ppo.answer_test_prompts(0, log)
        log.write(0, start)
    next_prompt = ppo.start_at(log.step)

    progress = tqdm(range(log.step + 1, args.total_steps + 1), desc="ppo", disable=None)
    for step in progress:
        batch = list(itertools.islice(next_prompt, args.global_batch_size))
        rows, prompts = [ppo.rows[i] for i in batch], [ppo.prompts[i] for i in batch]
        # --- 1 sample ---
        responses = ppo.sample(prompts)
        # --- 2 score ---
        rollout = ppo.score(rows, list(zip(prompts, responses, strict=True)))
        # --- 3 advantages ---
        experience = ppo.advantages(rollout)
        # --- 4 update ---
        metrics = ppo.metrics(rollout, experience) | ppo.learn(step, rollout, experience, log)
        # --- 5 log ---
        if step % args.eval_steps == 0 or step == args.total_steps:
            now = ppo.answer_test_prompts(step, log)
            metrics |= now
            for name in now:  # Fig. 5a: how far the scores have risen above the SFT policy's
                if name.endswith("/score"):
                    metrics[name.replace("/score", "/delta_score")] = now[name] - start[name]
            shown = {"score": metrics["objective/scores"], "kl": metrics["objective/kl"]} | now
            shown = (f"{name.removeprefix('eval/')} {value:.3g}" for name, value in shown.items())
            tqdm.write(f"step {step}: " + "  ".join(shown))
            few, none = slice(16), [None] * len(rows)
            log_samples(log, step, "train", rows[few], rollout.texts[few],
                        rollout.raw_scores[few], none[few])  # fmt: skip
        log.write(step, metrics)
        if args.save_steps and step % args.save_steps == 0:
            log.save(step, **ppo.state(), start=start)
        progress.set_postfix(score=metrics["objective/scores"], kl=metrics["objective/kl"])

    # --- save ---
    ppo.save(log.folder / "model")
    print(f"policy written to {log.folder / 'model'}")


if __name__ == "__main__":
    run_cli(main, Args, __doc__)
