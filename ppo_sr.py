"""PPO with Selective Rehearsal: Eq. 2 and 9 of "Stabilizing RLHF through Advantage Model and
Selective Rehearsal" (Peng et al. 2023).

    for each step:
        1 sample      y ~ pi(. | x) for a batch of prompts x
        2 score       r(x, y) by the scorer; log-probs under pi and pi_init; values V_t
        3 advantages  rewards -beta log(pi / pi_init), plus r on the last token [Eq. 2]; GAE
        4 learn       clipped policy loss + rehearsal_coef x NLL of D_R [Eq. 9], and
                      clipped value loss, in num_ppo_epochs passes over the batch
        5 log         and every eval_steps answer the test prompts

    python ppo_sr.py --model_name_or_path runs/sft/model --reward_model_path runs/am/model \\
        --dataset_name prompts.jsonl --output_dir runs/ppo

RM-PPO and AM-PPO differ in the scorer: an AM's a(x, y) stands for r. RM-PPO w/ MA adds
--moving_average_decay 0.99, AM-PPO-SR --rehearsal_dataset_name runs/select/rehearsal.jsonl. The
paper leaves C1 to C17 open (docs/CHOICES.md); PPO-max: Zheng et al. 2023. C4: Eq. 2 is maximised,
its KL paid token by token; Eq. 9 prints sum of pi, we minimise -log pi.

gamma is GAE's discount here, the paper's gamma is --rehearsal_coef. PPO's r_t is `ratio`, Eq. 2's
r `scores`, the whole of Eq. 2 `rewards`.
"""

import itertools
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from utils import DEVICE, Bound, Count, InputError, LearningRate, Length, Natural, Positive, Share
from utils import Weight, answer_end, autocast, backend, check_fits, decode, encode_prompts
from utils import encode_rows, forward_batches, generate, length_batches, load_function, load_policy
from utils import load_rows, load_scorer, load_tokenizer, pad_pairs, progress, response_logprobs
from utils import run_cli, run_log, same_form, score_texts, seeded, stop_ids


@dataclass
class Args:
    model_name_or_path: str  # the SFT policy, pi_init: folder or hub id
    dataset_name: str  # rows `prompt`, optional `task` (docs/DATA.md)
    output_dir: str  # the run folder; the policy goes to its model/
    reward_model_path: str  # RM or AM of am_train.py (others: baselines/ppo_any_reward.py)
    score_scale: Positive = 1.0  # factor on the scores (control: RM at AM's std)
    moving_average_decay: Share | None = None  # RM-PPO w/ MA: 0.99 (C9)
    missing_eos_penalty: Weight = 0.0  # in stds of the batch's scores (C10)
    rehearsal_dataset_name: str | None = None  # D_R: rehearsal.jsonl of select_rehearsal.py
    rehearsal_coef: Weight = 0.01  # gamma of Eq. 9 (paper §3.2), added in every update
    rehearsal_batch_size: Count = 64  # rows of D_R an update (C6)
    rehearsal_reduction: Literal["mean", "sum"] = "mean"  # over tokens, or a row's sum (C5)
    total_steps: Count = 100  # batches of fresh responses (paper §4.2; C13)
    critic_warmup_steps: Natural = 0  # in these the critic learns alone (PPO-max)
    global_batch_size: Length = 256  # prompts a step (paper §4.2)
    num_ppo_epochs: Count = 2  # passes over the batch (C8; PPO-max: 1)
    num_mini_batches: Count = 1  # updates a pass (C8; PPO-max: 4)
    per_device_train_batch_size: Count = 2  # sequences at once; gradients add up
    per_device_eval_batch_size: Count = 32  # in sampling and scoring
    learning_rate: LearningRate = 5e-7  # of the policy (paper §4.2), AdamW (C16)
    critic_learning_rate: Positive = 1.5e-6  # of the critic (PPO-max)
    max_grad_norm: Bound = 1.0  # of gradients (PPO-max; inf: no bound)
    kl_coef: Weight = 0.05  # beta of Eq. 2 (TRL's, C8; PPO-max: 0.02)
    gamma: Share = 1.0  # GAE's discount (PPO-max; not the paper's gamma)
    lam: Share = 0.95  # GAE's lambda (PPO-max)
    cliprange: Bound = 0.2  # a ratio gains nothing beyond 1 +- this (PPO-max; inf: no clip)
    cliprange_value: Bound = 0.2  # how far V may move (PPO-max)
    whiten_advantages: bool = True  # mean 0, std 1 over the batch (C8): r x 2 acts as beta / 2
    response_length: Count = 64  # tokens of a response, at most
    temperature: Positive = 1.0  # of sampling and of all log-probs alike (C8)
    max_length: Length = 512  # tokens of prompt and response together
    truncate_prompts: bool = False  # cut longer ones, do not refuse them
    eval_dataset_names: tuple[str, ...] = ()  # prompts to answer every --eval_steps
    max_eval_prompts: Natural = 0  # of each file (0: all)
    eval_steps: Count = 10  # between evaluations
    gold_reward: str | None = None  # module:function(prompts, responses), only logged
    save_steps: Natural = 0  # between checkpoints for --resume (0: none)
    resume: bool = False  # go on, as if never stopped
    seed: Natural = 1  # of sampling and data order
    bf16: bool = False  # matrix products in bfloat16


# === The equations. They need torch alone, and may be copied as a whole. ===
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

    V is 0 after the last token, <eos> or cut. Returns A_t and A_t + V_t, 0 off the mask.
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
    """Mean 0 and (unbiased) std 1 over the tokens of the mask; 0 outside, and of a single token."""
    kept = values[mask]
    return (values - kept.mean()) / (kept.std(correction=min(1, len(kept) - 1)) + 1e-8) * mask


def clipped_policy_loss(ratio, advantages, cliprange):  # each (tokens,)
    """PPO:  max(-ratio A, -clip(ratio, 1 - eps, 1 + eps) A),   ratio = pi / pi_old.

    The max is the pessimist: beyond the clip range a ratio gains nothing where it would look
    better, and still pays where it looks worse.
    """
    clipped = ratio.clamp(1 - cliprange, 1 + cliprange)
    return torch.max(-ratio * advantages, -clipped * advantages)


def clipped_value_loss(values, old_values, returns, cliprange):  # each (tokens,)
    """1/2 max((V - R)^2, (clip(V, V_old - eps, V_old + eps) - R)^2).

    The pessimist again: coming nearer to R by more than eps gains no more.
    """
    clipped = old_values + (values - old_values).clamp(-cliprange, cliprange)
    return 0.5 * torch.max((values - returns) ** 2, (clipped - returns) ** 2)


def rehearsal_loss(logprobs, count):  # (tokens,)
    """[Eq. 9]  E_{(x, y) ~ D_R} -log pi(y | x):  the sum over tokens / count.

    count: tokens (default: a mean), or rows (the printed sum; C5).
    """
    return -logprobs.sum() / count


class MovingAverage:
    """RM-PPO w/ MA: averages of batches' means and mean squares. A batch counts `decay` times as
    much as the one after it; at 1 all count the same (PPO-max)."""

    def __init__(self, decay):
        self.decay, self.weight, self.mean, self.mean_square = decay, 0.0, 0.0, 0.0

    def normalize(self, scores):  # (batch,)
        """Take the batch in, then return (scores - mean) / std."""
        exact = scores.double()  # a difference of squares loses digits
        self.weight = self.decay * self.weight + 1  # of all batches; this one's is 1
        self.mean += (exact.mean().item() - self.mean) / self.weight
        self.mean_square += (exact.square().mean().item() - self.mean_square) / self.weight
        std = max(self.mean_square - self.mean**2, 1e-8) ** 0.5
        return (scores - self.mean) / std


# === end of the equations ===


# --- the loop ---


def check(args):
    if args.global_batch_size % args.num_mini_batches:
        raise InputError("--global_batch_size: must be a multiple of --num_mini_batches")
    if args.critic_warmup_steps >= args.total_steps:
        raise InputError("--critic_warmup_steps: must be below --total_steps")


def main(args: Args, algorithm=None):
    check(args)
    ppo = (algorithm or PPO)(args)
    torch.manual_seed(args.seed)
    log = run_log(args, policy=ppo.policy, critic=ppo.critic, **ppo.numbers)
    if not log.saved:  # else the run goes on where the checkpoint was written
        check_before_step_1(ppo)
        ppo.numbers["start"] |= answer_test_prompts(ppo, 0, log)
        log.write(0, ppo.numbers["start"])
    next_prompt = ppo.start_at(log.step)

    bar = progress(range(log.step + 1, args.total_steps + 1), "PPO", log.step)
    for step in bar:
        rows, prompts = zip(*itertools.islice(next_prompt, args.global_batch_size), strict=True)
        # --- 1 sample: PPO learns from what the policy writes now ---
        responses = ppo.sample(prompts)
        # --- 2 score: these numbers stay while the models learn ---
        rollout = ppo.score(rows, list(zip(prompts, responses, strict=True)))
        # --- 3 advantages: which tokens did better than the critic expected? ---
        experience = ppo.advantages(rollout)
        metrics = batch_metrics(rollout, experience)
        # --- 4 learn: make them likelier, a little at a time ---
        metrics |= ppo.learn(step, rollout, experience, log)
        # --- 5 log: a score that rises while gold falls is no success ---
        if step % args.eval_steps == 0 or step == args.total_steps:
            metrics |= answer_test_prompts(ppo, step, log)
            log_samples(log, step, "train", rollout, 16)
            shown = [f"{k} {v:.3g}" for k, v in metrics.items() if "task/" not in k]
            bar.write(f"step {step}: " + "  ".join(shown))
        bar.set_postfix({k: metrics[f"objective/{k}"] for k in ("scores", "kl")}, refresh=False)
        log.write(step, metrics)
        if args.save_steps and step % args.save_steps == 0:
            log.save(step)
    log.finish("policy", ppo.policy, ppo.tokenizer)


class Critic(nn.Module):
    """V(x, y_<t): a backbone and a score head, read at every token."""

    def __init__(self, scorer, score_scale):
        super().__init__()
        self.model = scorer.model
        head = self.model.score.weight
        with torch.no_grad(), backend.whole([head]):
            # V starts as score_scale r (w/ MA, too: C9); with an e head, as 0
            head.mul_(score_scale if scorer.e_head is None else 0)

    def forward(self, input_ids, attention_mask, prompt_lens):  # -> (batch, response_len)
        hidden = self.model.base_model(input_ids, use_cache=False).last_hidden_state
        response_len = int((attention_mask.sum(1) - prompt_lens).max())
        index = prompt_lens[:, None] - 1 + torch.arange(response_len, device=DEVICE)
        index = index.clamp(max=hidden.shape[1] - 1)[..., None]  # past a response: any
        return self.model.score(hidden.take_along_dim(index, 1)).squeeze(-1).float()


@dataclass
class Rollout:
    """What was seen. Matrices are (batch, response_len), 0 past a response."""

    rows: list  # of the prompt file
    sequences: list  # (prompt ids, response ids)
    texts: list  # of the responses
    gold: list  # their gold rewards, or Nones
    finished: Tensor  # (batch,) bool: not cut
    raw_scores: Tensor  # (batch,)
    mask: Tensor
    logprobs: Tensor  # under pi_old, which sampled
    ref_logprobs: Tensor  # under pi_init
    entropy: Tensor
    values: Tensor


@dataclass
class Experience:
    """What PPO makes of it."""

    scores: Tensor  # (batch,): scaled, normalised, less the penalty
    kl_coef: float  # beta
    rewards: Tensor  # these three (batch, response_len)
    advantages: Tensor
    returns: Tensor


# --- 1 sample, 2 score, 3 advantages; `ppo` is a PPO, below ---


def sample(ppo, prompts, logprobs=False):
    """y ~ pi(. | x): ids [, log-probs]."""
    args = ppo.args
    how = args.response_length, args.temperature, args.per_device_eval_batch_size, args.bf16
    return generate(ppo.policy, ppo.tokenizer, prompts, *how, logprobs)


def score(ppo, rows, sequences):
    """How scorer, both policies and critic see the responses."""
    args, responses = ppo.args, [y for _, y in sequences]

    def look(*batch):
        # log softmax(logits / temperature)[y_t]: alike for pi_old, pi_init and, later, pi
        read = *batch, args.temperature
        logprobs, mask, entropy = response_logprobs(ppo.policy, *read, entropy=True)
        ref_logprobs, _ = response_logprobs(ppo.reference, *read)
        return mask, logprobs, ref_logprobs, entropy, ppo.critic(*batch)  # Rollout's

    how = ppo.tokenizer.pad_token_id, args.per_device_eval_batch_size, args.bf16
    seen = forward_batches(look, sequences, *how)  # no gradients
    raw_scores = ppo.read_scorer(rows, sequences)
    stops = stop_ids(ppo.policy, ppo.tokenizer)
    finished = torch.tensor([y[-1] in stops for y in responses], device=DEVICE)
    texts = decode(ppo.tokenizer, responses, stops)
    gold = [None] * len(rows)
    if ppo.gold_reward:
        gold = ppo.gold_reward([row["prompt"] for row in rows], texts)
    return Rollout(rows, sequences, texts, gold, finished, raw_scores, *seen)


def read_scorer(ppo, rows, sequences):
    """r - e [Eq. 8, K = 0], (batch,); e = 0 for an RM or a plain AM."""
    stops, end = stop_ids(ppo.policy, ppo.tokenizer), answer_end(ppo.tokenizer)
    # a scorer knows one end of an answer, whatever stopped the sampler
    ended = [(x, [*y[:-1], end] if y[-1] in stops else y) for x, y in sequences]
    texts = [(x + y, len(x)) for x, y in ended]
    how = ppo.args.per_device_eval_batch_size, ppo.args.bf16
    r, e = score_texts(ppo.scorer, ppo.tokenizer, texts, *how)
    return torch.tensor(r - e, dtype=torch.float32, device=DEVICE)


def advantages(ppo, rollout):
    """Rewards [Eq. 2], then advantages and returns by GAE."""
    args, mask, values = ppo.args, rollout.mask, rollout.values
    scores, kl_coef = ppo.normalize(rollout.raw_scores), ppo.kl_coef(rollout.rows)
    if args.missing_eos_penalty:
        scores = scores - args.missing_eos_penalty * scores.std() * ~rollout.finished
    rewards = token_rewards(scores, rollout.logprobs, rollout.ref_logprobs, mask, kl_coef)
    advantages, returns = generalized_advantages(rewards, values, mask, args.gamma, args.lam)
    if args.whiten_advantages:
        advantages = whiten(advantages, mask)
    return Experience(scores, kl_coef, rewards, advantages, returns)


# --- 4 learn ---


def learn(ppo, step, rollout, experience, log):
    """num_ppo_epochs passes over the batch -> means of its updates' metrics."""
    found = []
    for _ in range(ppo.args.num_ppo_epochs):
        shuffled = torch.randperm(len(rollout.sequences))
        for mini_batch in shuffled.chunk(ppo.args.num_mini_batches):
            found.append(ppo.update(step, rollout, experience, mini_batch.tolist(), log))
    means = torch.tensor([[*metrics.values()] for metrics in found]).mean(0).tolist()
    return dict(zip(found[0], means, strict=True))


def update(ppo, step, rollout, experience, mini_batch, log):
    """One optimiser step of policy and critic. mini_batch: numbers of sequences.

    [Eq. 9]  loss = policy_loss + rehearsal_coef * rehearsal_nll

    Its terms go backward one after the other: gradients add up until the step.
    """
    args, parts = ppo.args, []
    learns = step > args.critic_warmup_steps  # before that the critic learns alone
    # losses are means over the mini-batch's tokens, in parts that fit into memory
    num_tokens = rollout.mask[mini_batch].sum()
    for batch in micro_batches(args, rollout.sequences, mini_batch):
        pairs, mask = [rollout.sequences[i] for i in batch], rollout.mask[batch]
        # (tokens,): as sampled, before any update
        old_logprobs, old_values = rollout.logprobs[batch][mask], rollout.values[batch][mask]
        advantages, returns = experience.advantages[batch][mask], experience.returns[batch][mask]

        # how much likelier is each token now than then? (at first, ratio = 1)
        with torch.set_grad_enabled(learns):
            log_ratio = policy_logprobs(ppo, pairs) - old_logprobs
        ratio = log_ratio.exp()
        policy_loss = clipped_policy_loss(ratio, advantages, args.cliprange).sum() / num_tokens
        if learns:
            ppo.policy.backward(policy_loss)

        # the critic, another model, has a loss of its own
        values = critic_values(ppo, pairs)
        value_loss = clipped_value_loss(values, old_values, returns, args.cliprange_value)
        value_loss = value_loss.sum() / num_tokens
        ppo.critic.backward(value_loss)

        metrics = {
            "loss/policy_avg": policy_loss,
            "loss/value_avg": value_loss,
            "policy/approxkl_avg": 0.5 * log_ratio.square().sum() / num_tokens,
            "policy/clipfrac_avg": ((ratio - 1).abs() > args.cliprange).sum() / num_tokens,
            "val/ratio": ratio.sum() / num_tokens,
        }
        parts.append(torch.stack([*metrics.values()]).detach())
    metrics = dict(zip(metrics, backend.add_up(parts).tolist(), strict=True))
    if learns:
        metrics |= rehearse(ppo)  # Eq. 9's second term: gradients add up
        # the optimiser's step: clip gradients, AdamW, zero_grad; NaN ends the run
        log.take_step(ppo.policy, "policy's ", step, rollout.sequences)
    log.take_step(ppo.critic, "critic's ", step, rollout.sequences)
    return metrics


def rehearse(ppo):
    """[Eq. 9]  The second term: rehearsal_coef * -log pi(y | x) of the next rows of D_R."""
    args, parts = ppo.args, []
    pairs = list(itertools.islice(ppo.rehearsal_rows, ppo.rehearsal_size))
    by_token = args.rehearsal_reduction == "mean"  # else by row: the printed sum (C5)
    count = sum(len(y) if by_token else 1 for _, y in pairs)
    for batch in micro_batches(args, pairs, range(len(pairs))):
        rehearsal_nll = rehearsal_loss(policy_logprobs(ppo, [pairs[i] for i in batch]), count)
        ppo.policy.backward(args.rehearsal_coef * rehearsal_nll)
        parts.append(rehearsal_nll.detach())
    return {"loss/rehearsal_nll": backend.add_up(parts).item()} if pairs else {}


def micro_batches(args, sequences, indices):
    """Lists of indices of sequences, of nearly one length, that fit into memory."""
    size, lengths = args.per_device_train_batch_size, [len(x + y) for x, y in sequences]
    return backend.deal(length_batches(lengths, size, indices, backend.length_ratio))


def policy_logprobs(ppo, sequences):
    """log pi(y_t | x, y_<t) of all response tokens, (tokens,)."""
    batch = pad_pairs(sequences, ppo.tokenizer.pad_token_id)
    with autocast(ppo.args.bf16):
        logprobs, mask = response_logprobs(ppo.policy, *batch, ppo.args.temperature)
    return logprobs[mask]


def critic_values(ppo, sequences):
    """V(x, y_<t) before all response tokens, (tokens,)."""
    with autocast(ppo.args.bf16):
        values = ppo.critic(*pad_pairs(sequences, ppo.tokenizer.pad_token_id))
    return torch.cat([v[: len(y)] for v, (_, y) in zip(values, sequences, strict=True)])


# --- 5 log ---


def batch_metrics(rollout, experience):
    """By TRL's names; KL in nats a response."""
    mask, kl = rollout.mask, (rollout.logprobs - rollout.ref_logprobs).sum(1)
    returns = experience.returns[mask]
    error = (returns - rollout.values[mask]).var() / returns.var().clamp(min=1e-8)
    found = {
        "objective/scores": rollout.raw_scores.mean(),
        "objective/scores_std": rollout.raw_scores.std(),
        "objective/rlhf_reward": experience.rewards.sum(1).mean(),
        "objective/kl": kl.mean(),
        "objective/entropy": rollout.entropy[mask].mean(),
        "policy/perplexity": (-rollout.logprobs[mask]).mean().exp(),
        "val/response_length": mask.sum(1).float().mean(),
        "val/no_eos_share": 1 - rollout.finished.float().mean().double(),
        "val/explained_variance": 1 - error.double(),
    }
    if None not in rollout.gold:
        found["objective/gold"] = np.mean(rollout.gold)
    tasks = [row.get("task", "all") for row in rollout.rows]
    for task in {*tasks} if len({*tasks}) > 1 else ():
        of_task = torch.tensor([other == task for other in tasks])
        found[f"task/{task}/score"] = rollout.raw_scores[of_task].mean()
        found[f"task/{task}/kl"] = kl[of_task].mean()
    return {name: float(value) for name, value in found.items()}


def answer_test_prompts(ppo, step, log):
    """Means of score, KL (nats), length and gold of one answer to each test prompt."""
    metrics, start = {}, ppo.numbers["start"]
    for label, (rows, prompts, known) in ppo.tests.items():
        with seeded(ppo.args.seed):  # the same each time
            responses = ppo.sample(prompts)
        rollout = ppo.score(rows, list(zip(prompts, responses, strict=True)))
        found = {"score": rollout.raw_scores.mean(), "length": np.mean([*map(len, responses)])}
        found["kl"] = (rollout.logprobs - rollout.ref_logprobs).sum(1).mean()
        if step:  # Fig. 5a: the score gained over the SFT policy's
            found["delta_score"] = found["score"].item() - start[f"eval/{label}/score"]
        if ppo.gold_reward:
            found["gold"] = np.mean(rollout.gold)
        if known:  # are the file's own answers forgotten?
            seen = ppo.score(rows, known)
            found["nll"] = -seen.logprobs[seen.mask].mean()
        metrics |= {f"eval/{label}/{name}": float(value) for name, value in found.items()}
        log_samples(log, step, label, rollout)
    return metrics


def log_samples(log, step, label, rollout, limit=None):
    columns = rollout.rows[:limit], rollout.texts, rollout.raw_scores.tolist(), rollout.gold
    samples = [
        {"step": step, "set": label, "prompt": row["prompt"], "response": text}
        | {"task": row.get("task", "all"), "score": score, "gold": gold}
        for row, text, score, gold in zip(*columns, strict=False)
    ]
    log.append("samples.jsonl", samples)


# --- start ---


def check_before_step_1(ppo):
    """pi = pi_old = pi_init before anything is learned: three differences are 0."""
    with seeded(ppo.args.seed):
        responses, drawn = ppo.sample(ppo.prompts[:16], logprobs=True)
    sequences = list(zip(ppo.prompts[:16], responses, strict=True))
    rollout = ppo.score(ppo.rows[:16], sequences)
    old, initial = rollout.logprobs[rollout.mask], rollout.ref_logprobs[rollout.mask]
    with torch.no_grad():
        new = policy_logprobs(ppo, sequences)  # on update's path
    drawn = torch.tensor([logprob for row in drawn for logprob in row], device=DEVICE)
    check_zero("KL to pi_init", old - initial, "two models, dropout, dtype", ppo.args)
    check_zero("sampler's log-prob less the model's", drawn - old, "top-p, temperature", ppo.args)
    check_zero("first ratio - 1", (new - old).exp() - 1, "dropout in updates", ppo.args)


def check_zero(what, off, causes, args):
    # rounding: up to 7e-6 nats (bfloat16: .07), with a mean nearer 0
    worst, mean, allowed = off.abs().max(), off.mean().abs(), 0.5 if args.bf16 else 1e-3
    if not (worst <= allowed and mean <= allowed / 50):  # `not`: NaN, too
        raise InputError(f"before step 1: the {what} is off 0 by up to {worst:.2g}; {causes}?")


def endless(items, seed, skip):
    """The items in shuffled passes, for ever, but without the first `skip`."""
    generator = torch.Generator().manual_seed(seed)
    while items:
        for i in torch.randperm(len(items), generator=generator).tolist():
            skip -= 1
            if skip < 0:
                yield items[i]


class PPO:
    """Models, data; the functions above, as methods: baselines vary them."""

    sample, score, read_scorer, advantages = sample, score, read_scorer, advantages
    learn, update = learn, update

    def __init__(self, args):
        """Wrong inputs are refused here, before a model runs."""
        self.args, path = args, args.model_name_or_path
        self.gold_reward = args.gold_reward and load_function(args.gold_reward, "--gold_reward")
        self.tokenizer = load_tokenizer(path)
        self.rows, self.prompts = self.load_prompts(args.dataset_name)
        self.rehearsal = self.load_pairs(args.rehearsal_dataset_name)
        self.rehearsal_size = min(args.rehearsal_batch_size, len(self.rehearsal))
        names = args.eval_dataset_names
        self.tests = {n.split("/")[-1].split(".")[0]: self.load_tests(n) for n in names}
        if len(self.tests) < len(names):
            raise InputError("--eval_dataset_names: two files have one name")

        # models load without dropout: with it, the first ratio would not be 1
        policy, self.scorer = load_policy(path), self.load_scorer()
        critic = self.load_critic(policy)
        for model in policy, critic.model:
            check_fits(model, self.tokenizer, args.max_length)
        self.policy = self.engine(policy, args.learning_rate)
        self.critic = self.engine(critic, args.critic_learning_rate)
        self.reference = backend.reference(self.policy, path)
        self.moving_average = MovingAverage(args.moving_average_decay)
        # a checkpoint restores these in place
        self.numbers = {"moving_average": vars(self.moving_average), "start": {}}

    def engine(self, model, learning_rate):
        return backend.engine(model, learning_rate, max_grad_norm=self.args.max_grad_norm)

    def load_prompts(self, name, limit=0):
        args, rows = self.args, load_rows(name, {"prompt": "prompt"}, limit)
        length = args.max_length, args.response_length, args.truncate_prompts
        return rows, encode_prompts(self.tokenizer, rows, *length, name)

    def load_tests(self, name):  # and known answers
        rows, prompts = self.load_prompts(name, self.args.max_eval_prompts)
        known = all(isinstance(row.get("response"), str) for row in rows)
        return rows, prompts, self.encode_pairs(rows, name) if known else []

    def load_pairs(self, name):
        fields = {"prompt": "prompt", "response": "response"}
        return self.encode_pairs(load_rows(name, fields), name) if name else []

    def encode_pairs(self, rows, name):
        texts = encode_rows(self.tokenizer, rows, ["response"], self.args, name)
        return [(ids[:prompt_len], ids[prompt_len:]) for [(ids, prompt_len)] in texts]

    def load_scorer(self):
        path = self.args.reward_model_path
        if not same_form(self.tokenizer, load_tokenizer(path, dedicated_pad=True)):
            problem = "not the policy's tokenizer, template or end"
            raise InputError(f"{path}: {problem}; use baselines/ppo_any_reward.py")
        return load_scorer(path, self.tokenizer, frozen=True)

    def load_critic(self, policy):  # a copy of the scorer
        scorer = load_scorer(self.args.reward_model_path, self.tokenizer)
        return Critic(scorer, self.args.score_scale)

    def normalize(self, scores):
        average, scores = self.moving_average, scores * self.args.score_scale
        return scores if average.decay is None else average.normalize(scores)

    def kl_coef(self, rows):
        return self.args.kl_coef

    def start_at(self, step):
        """Return prompts, and set rehearsal_rows, from where `step` steps have left both."""
        args = self.args
        epochs = max(0, step - args.critic_warmup_steps) * args.num_ppo_epochs
        used = epochs * args.num_mini_batches * self.rehearsal_size
        self.rehearsal_rows = endless(self.rehearsal, args.seed, used)
        prompts = list(zip(self.rows, self.prompts, strict=True))
        return endless(prompts, args.seed, step * args.global_batch_size)


if __name__ == "__main__":
    run_cli(main, Args, __doc__)
