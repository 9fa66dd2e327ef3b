"""Instruments of a PPO run: checks that stop a wrong set-up, alarms when a dial leaves its band, one batch explained.

Shared by ppo_sr.py and ppo_max.py. Before anything is learned three numbers are known (KL 0, sampler = model, ratio 1);
later, rewards and losses do not show a collapse, while KL, length and perplexity do (Secrets of RLHF I, §5.2). BANDS is
there to be changed: a number without a source is ours, chosen between the healthy and the collapsed arms of the toy world.
"""

import copy
import math
import unicodedata
from typing import NamedTuple

import torch

from engines import forked_rng
from utils import InputError, autocast, generate, pad, response_logprobs

# Largest difference between two computations of one log-prob (nats), by --bf16. Cached against uncached, padded left
# against right, the toy's SFT model and a random one of 24 layers differ by up to 7e-6 in float32 and .07 in bfloat16;
# deep models in bfloat16 by more. top-p .99 moves the toy's by .01, top-k 50 by .04, a temperature of .9 by .7.
TOLERANCE = {False: 1e-3, True: 0.5}
# Rounding has no direction, a filter has: top-p .95 lifts the sampler's log-probs by .017 on average, less than the
# largest rounding in bfloat16, whose average is .001. So the mean must keep within a 50th of the tolerance.
MEAN_SHARE = 1 / 50


def check_first_step(logprobs, ref_logprobs, sampled_logprobs, mask, bf16=False):
    """Before the first update: pi is pi_init, and the sampler drew from the distribution that the update will use.

    logprobs, ref_logprobs, sampled_logprobs: each (batch, response_len) or (tokens,), nats, of the sampled tokens: under
    pi, under pi_init, and as the sampler had them, after its temperature and filters; mask: bool of that shape.
    Raises InputError where the largest difference exceeds TOLERANCE, or the mean one MEAN_SHARE of it.
    """
    for other, wrong in (
        (ref_logprobs, "pi and pi_init disagree, so KL is not 0: two different models, or one of them has dropout on or "
         "another temperature, mask or dtype"),
        (sampled_logprobs, "the sampler and the model disagree on the sampled tokens: the sampler has a top-k, top-p, "
         "penalty or temperature of its own, or a mask is shifted or the padding on the wrong side"),
    ):  # fmt: skip
        difference = (logprobs - other)[mask]
        worst, mean = difference.abs().max().item(), difference.mean().item()
        if not (worst <= TOLERANCE[bf16] and abs(mean) <= TOLERANCE[bf16] * MEAN_SHARE):  # `not`: NaN stops, too
            raise InputError(
                f"first batch: {wrong} (log-probs differ by up to {worst:.2g} and by {mean:.2g} on average; rounding "
                f"explains {TOLERANCE[bf16]:g} and {TOLERANCE[bf16] * MEAN_SHARE:g})"
            )


def check_sampler(args, policy, reference, tokenizer, prompts):
    """Before step 1, on a few responses that nothing learns from: KL is 0, and the sampler draws what the log-probs say."""
    with forked_rng(), torch.no_grad(), autocast(args.bf16):
        sampling = (args.response_length, args.temperature, args.per_device_eval_batch_size, args.bf16)
        responses, sampled = generate(policy, tokenizer, prompts, *sampling, with_logprobs=True)
        ids, mask = pad([x + y for x, y in zip(prompts, responses, strict=True)], tokenizer.pad_token_id)
        prompt_lens = torch.tensor([len(x) for x in prompts], device=ids.device)
        logprobs, response_mask = response_logprobs(policy, ids, mask, prompt_lens, args.temperature)
        ref_logprobs, _ = response_logprobs(reference, ids, mask, prompt_lens, args.temperature)
    sampled = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in sampled], batch_first=True).to(ids.device)
    check_first_step(logprobs, ref_logprobs, sampled, response_mask, args.bf16)


def check_first_ratio(error, bf16=False):
    """error: max |ratio - 1| over the tokens that an update reads before its first optimiser step: 0 up to rounding.
    Raises InputError beyond TOLERANCE."""
    if not error <= TOLERANCE[bf16]:
        raise InputError(
            f"first ratio: pi / pi_old is off 1 by {error:.2g} before any update (rounding explains {TOLERANCE[bf16]:g}): "
            "dropout is on in updates, or rollout and update have different temperatures, masks or padding"
        )


def rollout_metrics(rollout, tasks):
    """The dials of one batch of responses, TRL's names where it has them; score and KL (nats) by task."""
    lens, mask = rollout.mask.sum(1), rollout.mask
    kl = (rollout.logprobs - rollout.ref_logprobs).sum(1)  # (batch,)
    error = (rollout.returns - rollout.values)[mask].var() / rollout.returns[mask].var().clamp(min=1e-8)
    metrics = {
        "objective/scores": rollout.raw_scores.mean().item(),
        "objective/scores_std": rollout.raw_scores.std().item(),
        "objective/rlhf_reward": rollout.rewards.sum(1).mean().item(),
        "objective/kl": kl.mean().item(),
        "objective/entropy": rollout.entropy[mask].mean().item(),
        "policy/perplexity": (-rollout.logprobs[mask]).mean().exp().item(),
        "policy/perplexity_ref": (-rollout.ref_logprobs[mask]).mean().exp().item(),
        "val/response_length": lens.float().mean().item(),
        "val/num_eos_tokens": rollout.finished.sum().item(),
        "val/no_eos_share": 1 - rollout.finished.float().mean().item(),
        "val/explained_variance": 1 - error.item(),
    }
    for task in sorted(set(tasks)) if len(set(tasks)) > 1 else ():
        of_task = torch.tensor([t == task for t in tasks], device=kl.device)
        metrics[f"task/{task}/score"] = rollout.raw_scores[of_task].mean().item()
        metrics[f"task/{task}/kl"] = kl[of_task].mean().item()
    return metrics


class Band(NamedTuple):
    low: float
    high: float
    source: str  # of the numbers
    means: str  # what leaving the band usually means, and what to do


WINDOW = 10  # steps that a mean of scores or gold is taken over
QUIET = 5  # steps that a dial must have been back in its band before it can ring again
FLOOR = 1.0  # nats: a task's KL is compared with the other tasks' mean, or with this while that is smaller
RISE = 2.0  # standard errors: a difference of two windows' means that is more than noise
NO = math.inf
BANDS = {  # dial: band; what a dial is, where it is no metric of its own, stands in Alarms.readings
    "objective/kl": Band(-1, NO, "TRL's first PPOTrainer warns there",
        "a KL below 0 means that the sampler draws from something else than pi; look for filters and masks"),
    "objective/kl per token": Band(-NO, 0.2, "ours: .13 at most in healthy arms, .27 in the collapsed one",
        "the policy has left pi_init, where the scorer knows little; raise --kl_coef or lower --learning_rate"),
    "objective/gold while scores rise (standard errors)": Band(-RISE, NO, "ours: more than noise",
        "the reward is being hacked, the proxy gains what the gold loses; raise --kl_coef, stop earlier, mend the scorer"),
    "val/response_length / step 1's": Band(0.5, 2, "dial: Secrets of RLHF I, §5.2; factors: ours",
        "the scorer pays for length or for brevity; read samples.jsonl, raise --kl_coef"),
    "objective/entropy / step 1's": Band(0.25, 3, "dial: as above (perplexity); factors: ours, .52 at least when healthy",
        "low, one pattern answers everything, high, the policy dissolves; raise --kl_coef or lower --learning_rate"),
    "log perplexity / entropy": Band(0.67, 1.5, "1 but for noise, two estimates of one entropy; width: ours",
        "the tokens are no samples of pi: the sampler has filters or a temperature of its own, or a mask is shifted"),
    "val/no_eos_share": Band(-NO, 0.9, "ours",
        "hardly any response ends: pad = eos, an SFT model that never learned to end, or a short --response_length"),
    "val/explained_variance": Band(0, NO, "0 is what a constant explains",
        "the critic predicts worse than a constant; raise --critic_learning_rate or --critic_warmup_steps"),
    "policy/clipfrac_avg": Band(-NO, 0.2, "ours: .02 at most in the toy world",
        "updates overshoot the clip range; lower --learning_rate or --num_ppo_epochs"),
    "val/ratio": Band(0.9, 1.1, "its mean starts at 1; the width, half of --cliprange, is ours",
        "updates carry the policy too far from its samples; lower --learning_rate or --num_ppo_epochs"),
    "val/no_eos_share - step 1's": Band(-NO, 0.25, "ours",
        "responses no longer end by themselves; set --missing_eos_penalty or raise --response_length"),
    "task/*/kl / other tasks'": Band(-NO, 4, "ours, of means over WINDOW steps: 3.6 in healthy arms, 5.7 in a collapsed one",
        "this task drifts alone, often into another task's pattern; read its samples, rehearse it, even out the scores"),
}  # fmt: skip
GRACE = {"val/explained_variance": 10}  # steps in which a dial may be anywhere: the critic has to learn first


class Alarms:
    """Rings once when a dial leaves its band, and again only after QUIET steps inside; its state is plain numbers."""

    def __init__(self):
        self.first, self.pairs, self.recent, self.outside = {}, [], {}, {}

    def state(self):
        return copy.deepcopy(vars(self))

    def load_state(self, state):
        vars(self).update(copy.deepcopy(state))

    def take(self, name, value):
        self.recent[name] = [*self.recent.get(name, []), value][-WINDOW:]

    def ring(self, step, metrics):
        """One step's metrics (names as in ppo_sr.py; absent ones are passed over) -> list of alarm lines."""
        lines = []
        for dial, task, value in self.readings(metrics):
            band, name = BANDS[dial], dial.replace("*", task)
            if step <= GRACE.get(dial, 0) or band.low <= value <= band.high:  # NaN is in no band
                continue
            if step - self.outside.get(name, -QUIET - 1) > QUIET:
                limits = [f"{word} {x:g}" for word, x in (("above", band.low), ("below", band.high)) if abs(x) != NO]
                lines.append(f"alarm, step {step}: {name} is {value:.3g} (band: {', '.join(limits)}): {band.means}")
            self.outside[name] = step
        return lines

    def readings(self, metrics):
        """(dial, task, value) of every dial that these metrics determine; takes them into the history."""
        values = {dial: metrics[dial] for dial in BANDS if dial in metrics}
        for metric in ("val/response_length", "objective/entropy", "val/no_eos_share"):
            if metric in metrics:
                first = self.first.setdefault(metric, metrics[metric])  # of pi_init: step 1 samples before it learns
                values[f"{metric} / step 1's"] = metrics[metric] / max(first, 1e-8)
                values[f"{metric} - step 1's"] = metrics[metric] - first
        if "objective/kl" in metrics and "val/response_length" in metrics:
            values["objective/kl per token"] = metrics["objective/kl"] / max(metrics["val/response_length"], 1)
        if "objective/gold" in metrics:
            self.pairs.append([metrics["objective/scores"], metrics["objective/gold"]])
            self.pairs = self.pairs[:WINDOW] + self.pairs[WINDOW:][-WINDOW:]  # the first and the last ones
            if len(self.pairs) == 2 * WINDOW:
                windows = torch.tensor(self.pairs, dtype=torch.float64).view(2, WINDOW, 2)  # first or last, step, dial
                error = (windows.var(1).sum(0) / WINDOW).sqrt().clamp(min=1e-9)
                score, gold = ((windows[1].mean(0) - windows[0].mean(0)) / error).tolist()  # in standard errors
                values["objective/gold while scores rise (standard errors)"] = gold if score > RISE else 0.0
        if "policy/perplexity" in metrics and "objective/entropy" in metrics:
            self.take("surprise", math.log(metrics["policy/perplexity"]) / max(metrics["objective/entropy"], 1e-8))
            if len(self.recent["surprise"]) == WINDOW:
                values["log perplexity / entropy"] = sum(self.recent["surprise"]) / WINDOW
        for name in metrics:
            if name.startswith("task/") and name.endswith("/kl"):  # a task has few responses a step
                self.take(name, metrics[name])
        tasks = {name[5:-3]: sum(kl) / len(kl) for name, kl in self.recent.items() if name.startswith("task/")}
        for task, kl in tasks.items() if len(tasks) > 1 else ():
            others = (sum(tasks.values()) - kl) / (len(tasks) - 1)
            yield "task/*/kl / other tasks'", task, kl / max(others, FLOOR)
        yield from ((dial, "", value) for dial, value in values.items() if dial in BANDS)


def _cell(text, width):
    """Control characters escaped as repr does, cut or filled to `width` columns of a terminal."""
    shown, used = "", 0
    for char in repr(text):
        columns = 0 if unicodedata.combining(char) else 1 + (unicodedata.east_asian_width(char) in "WF")
        if used + columns > width - 1:
            return shown + "…" + " " * (width - 1 - used)
        shown, used = shown + char, used + columns
    return shown + " " * (width - used)


def explain(args, tokenizer, rollout, rows=3):
    """The first rows of a rollout of ppo_sr.py token by token, each term of Eq. 2 and GAE, and the identities they meet.

    args: gamma, lam; rollout: kl_coef, sequences, scores (batch,), else (batch, response_len). Text of 120 columns.
    """
    r, out = rollout, []
    values = r.values * r.mask
    kl_terms = -r.kl_coef * (r.logprobs - r.ref_logprobs) * r.mask
    gae = r.returns - values  # the rollout keeps A_t whitened
    is_last = r.mask & (r.mask.cumsum(1) == r.mask.sum(1, keepdim=True))
    terms = {  # name, tag: (batch, response_len)
        ("log pi", ""): r.logprobs, ("log init", ""): r.ref_logprobs, ("KL term", "[Eq. 2]"): kl_terms,
        ("score", "[Eq. 2]"): torch.where(is_last, r.scores[:, None], 0.0), ("reward", "[Eq. 2]"): r.rewards,
        ("V_t", ""): r.values, ("A_t", "GAE"): gae, ("A used", "whitened"): r.advantages, ("return", "A_t + V_t"): r.returns,
    }  # fmt: skip
    for i, (x, y) in enumerate(r.sequences[:rows]):
        out.append(f"row {i}, prompt of {len(x)} tokens: {_cell(tokenizer.decode(x), 80)}".rstrip())
        for part, heads in enumerate((("index", "token", "mask"), ("", "", ""))):
            out.append("{:>5} {:18} {:>4}".format(*heads) + "".join(f"{name[part]:>10}" for name in terms))
        out.append(
            f"{len(x) - 1:5} {_cell(tokenizer.decode(x[-1:]), 18)}    0  (log pi, log init, V_t of the next token)"
        )
        for t in range(min(len(y) + 1, r.mask.shape[1])):  # and one column of padding, where all is 0
            token = _cell(tokenizer.decode(y[t : t + 1]), 18) if t < len(y) else f"{'(padding)':18}"
            numbers = "".join(f"{term[i, t].item():z10.4f}" for term in terms.values())
            out.append(f"{len(x) + t:5} {token} {int(r.mask[i, t]):4}{numbers}")
        sums = "".join(f"{term[i].sum().item():z10.4f}" for term in list(terms.values())[2:5])
        out.append(f"{'':5} {'sum':18} {len(y):4}{'':20}{sums}\n")
    following = torch.nn.functional.pad(torch.stack([values, gae]), (0, 1))[..., 1:]  # V, A of t + 1; 0 after the last
    step = r.rewards + args.gamma * following[0] - values + args.gamma * args.lam * following[1]
    sum_error = (r.rewards.sum(1) - r.scores - kl_terms.sum(1)).abs().max()
    gae_error, used = (gae - step)[r.mask].abs().max(), r.advantages[r.mask]
    out.append(f"all {len(used)} tokens: sum of rewards = s - beta KL to {sum_error:.0e}; A_t = return - V_t = reward_t "
               f"+ gamma V_t+1 - V_t\n+ gamma lam A_t+1 to {gae_error:.0e}; A used has mean {used.mean().item():z.4f}, "
               f"std {used.std():.4f} (whitened: 0, 1)")  # fmt: skip
    return "\n".join(out)
