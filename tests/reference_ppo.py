"""PPO with rehearsal written once more, naively, for tests to compare the scripts with: one sequence at a time, no
padding, GAE as its sum, plain autograd, plain AdamW. Nothing of ppo_sr.py or utils.py is imported.
"""

import copy
import statistics

import torch

ROLLOUT = ("logprobs", "ref_logprobs", "entropy", "values", "rewards", "advantages", "returns")  # one value a token
DIALS = ("loss/policy_avg", "loss/value_avg", "policy/approxkl_avg", "policy/clipfrac_avg", "val/ratio")


def token_logprobs(policy, x, y, temperature):
    """log pi(y_t | x, y_<t), and the entropy of the distribution that y_t is drawn from: each (len(y),)."""
    logits = policy(torch.tensor([x + y])).logits[0] / temperature
    log_p = logits[len(x) - 1 : len(x) + len(y) - 1].log_softmax(-1)  # (len(y), vocabulary)
    return log_p[range(len(y)), y], -(log_p.exp() * log_p).sum(-1)


def token_values(critic, x, y):
    """V(x, y_<t), read before y_t is seen: (len(y),)."""
    hidden = critic.base_model(torch.tensor([x + y])).last_hidden_state[0]
    return critic.score(hidden[len(x) - 1 : len(x) + len(y) - 1])[:, 0]


class ReferencePPO:
    """args: flags by the names of ppo_sr.py; models: causal LM, causal LM, sequence classifier of one label."""

    def __init__(self, args, policy, reference, critic):
        self.args, self.history = args, []
        self.policy, self.reference, self.critic = (
            copy.deepcopy(model).eval() for model in (policy, reference, critic)
        )
        with torch.no_grad():
            self.critic.score.weight.mul_(args.score_scale)
        rates = (self.policy, args.learning_rate), (self.critic, args.critic_learning_rate)
        self.optimizers = [
            torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0) for model, lr in rates
        ]

    def ppo_scores(self, raw, finished):
        """Raw scores (floats) -> scaled, normalised by all batches so far, clipped, less the penalty without <eos>."""
        args, scores = self.args, [s * self.args.score_scale for s in raw]
        if args.score_normalization == "moving_average":
            self.history.append((statistics.fmean(scores), statistics.fmean(s * s for s in scores)))
            weights = [args.moving_average_decay**age for age in reversed(range(len(self.history)))]
            mean = sum(w * m for w, (m, _) in zip(weights, self.history, strict=True)) / sum(weights)
            square = sum(w * s for w, (_, s) in zip(weights, self.history, strict=True)) / sum(weights)
            scores = [(s - mean) / (square - mean**2) ** 0.5 for s in scores]
        scores = [min(max(s, -args.score_clip), args.score_clip) for s in scores]
        penalty = args.missing_eos_penalty * statistics.stdev(scores)
        return [s if end else s - penalty for s, end in zip(scores, finished, strict=True)]

    def rollout(self, sequences, raw, finished, betas):
        """betas: KL coefficient of every sequence -> {name: a list over sequences}."""
        args, roll = self.args, {name: [] for name in ("scores", *ROLLOUT)}
        roll["scores"] = self.ppo_scores(raw, finished)
        for (x, y), score, beta in zip(sequences, roll["scores"], betas, strict=True):
            with torch.no_grad():
                logprobs, entropy = token_logprobs(self.policy, x, y, args.temperature)
                ref_logprobs, _ = token_logprobs(self.reference, x, y, args.temperature)
                values = token_values(self.critic, x, y)
            rewards = [-beta * (logprobs[t] - ref_logprobs[t]).item() for t in range(len(y))]  # [Eq. 2]
            rewards[-1] += score
            after = [*values.tolist()[1:], 0.0]
            delta = [rewards[t] + args.gamma * after[t] - values[t].item() for t in range(len(y))]
            advantages = [
                sum((args.gamma * args.lam) ** (k - t) * delta[k] for k in range(t, len(y))) for t in range(len(y))
            ]
            returns = [advantages[t] + values[t].item() for t in range(len(y))]
            row = (logprobs, ref_logprobs, entropy, values, rewards, advantages, returns)
            for name, column in zip(ROLLOUT, row, strict=True):
                roll[name].append(torch.as_tensor(column))
        if args.whiten_advantages:
            every = torch.cat(roll["advantages"]).tolist()
            mean, std = statistics.fmean(every), statistics.stdev(every)
            roll["advantages"] = [(a - mean) / (std + 1e-8) for a in roll["advantages"]]
        return roll

    def rehearsal_nll(self, rows):
        """[Eq. 9]  -log pi(y | x), rows of (ids, prompt_len): the mean over all tokens, or over rows of the sums."""
        parts = [token_logprobs(self.policy, ids[:n], ids[n:], self.args.temperature)[0] for ids, n in rows]
        if self.args.rehearsal_reduction == "sum":
            return -sum(part.sum() for part in parts) / len(rows)
        return -torch.cat(parts).mean()

    def losses(self, sequences, roll, chosen):
        """Per-token policy losses, value losses and probability ratios of the chosen sequences."""
        args, policy_losses, value_losses, ratios = self.args, [], [], []
        for i in chosen:
            new, _ = token_logprobs(self.policy, *sequences[i], args.temperature)
            values = token_values(self.critic, *sequences[i])
            old, advantages, old_values, returns = (
                roll[name][i] for name in ("logprobs", "advantages", "values", "returns")
            )
            ratio = (new - old).exp()
            near = ratio.clamp(1 - args.cliprange, 1 + args.cliprange)
            near_values = values.clamp(old_values - args.cliprange_value, old_values + args.cliprange_value)
            ratios.append(ratio)
            policy_losses.append(-torch.min(ratio * advantages, near * advantages))
            value_losses.append(torch.max((values - returns) ** 2, (near_values - returns) ** 2) / 2)
        return torch.cat(policy_losses), torch.cat(value_losses), torch.cat(ratios)

    def regularizer(self, step, sequences, roll, chosen):
        """What else the policy minimises on the chosen sequences: nothing here, for ppo_max.py's to fill in."""
        return 0.0

    def update(self, step, sequences, roll, rehearsal_rows):
        """All epochs over one rollout -> means of the dials over the mini-batches."""
        args, rows, nlls = self.args, [], []
        size, trains_policy = len(sequences) // args.num_mini_batches, step > args.critic_warmup_steps
        for _ in range(args.num_ppo_epochs):
            order = torch.randperm(len(sequences)).tolist()
            for start in range(0, len(order), size):
                policy_losses, value_losses, ratios = self.losses(sequences, roll, order[start : start + size])
                outside = ((ratios > 1 + args.cliprange) | (ratios < 1 - args.cliprange)).double()
                dials = (policy_losses, value_losses, ratios.log() ** 2 / 2, outside, ratios)
                rows.append([dial.mean().item() for dial in dials])
                chosen = order[start : start + size]
                objective = policy_losses.mean() + self.regularizer(step, sequences, roll, chosen)
                if rehearsal_rows and trains_policy:
                    nll = self.rehearsal_nll([next(rehearsal_rows) for _ in range(args.rehearsal_batch_size)])
                    objective = objective + args.rehearsal_coef * nll
                    nlls.append(nll.item())
                for model, optimizer, loss, trains in (
                    (self.policy, self.optimizers[0], objective, trains_policy),
                    (self.critic, self.optimizers[1], args.vf_coef * value_losses.mean(), True),
                ):
                    if not trains:
                        continue
                    optimizer.zero_grad()
                    loss.backward()
                    gradients = [p.grad for p in model.parameters() if p.grad is not None]
                    norm = sum((g**2).sum().item() for g in gradients) ** 0.5
                    for g in gradients:
                        g *= min(1, args.max_grad_norm / (norm + 1e-6))  # the 1e-6 of torch
                    optimizer.step()
        means = [statistics.fmean(column) for column in zip(*rows, strict=True)]
        return dict(zip(DIALS, means, strict=True)) | ({"loss/rehearsal_nll": statistics.fmean(nlls)} if nlls else {})
