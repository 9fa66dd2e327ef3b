"""Rejection sampling: sample, keep what the scorer likes, imitate it [Eq. 3, 4].

    for each round n:
        sample   K responses y ~ pi(. | x) to each prompt of the round
        score    r(x, y)
        keep     D_n = {(x, y): F(x, y)}                                                     [Eq. 3]
        train    -E_{(x, y) ~ D_n} sum_t log pi(y_t | x, y_<t)                               [Eq. 4]

    Eq. 4 is printed without the log.

    --keep          F
    best            the best of the K: Llama 2 (Touvron 2023), RAFT (Dong 2023)
    threshold       r >= tau: with several --thresholds ReST (Gulcehre 2023), which samples once a
                    round (grow) and trains once for each tau, the next one higher (improve)
    advantage       r above the mean of the K, weighted by the distance: after A-LoL (Baheti 2023),
                    which learns the mean, offline

    python -m baselines.rejection_sampling train --keep best --learning_rate 5e-4 \\
        --model_name_or_path runs/sft/model --reward_model_path runs/am/model \\
        --dataset_name data/toy/prompts_train.jsonl --output_dir runs/raft \\
        --prompts_per_round 320 --global_batch_size 64 --response_length 24 --max_length 64 \\
        --per_device_train_batch_size 64 --per_device_eval_batch_size 256
    python -m baselines.rejection_sampling best_of_n --output_dir runs/best_of_n ...
    python -m baselines.rejection_sampling pairs --output_dir runs/rso ...

best_of_n trains nothing: what would the best of n samples score, what is it worth, how far is it
from pi? A scorer that can be hacked shows it here, without PPO.

pairs writes pairs for dpo.py --loss hinge: RSO (Liu 2023) accepts y with probability
exp((r - max r) / beta), so that what is accepted is a sample of the optimal policy of Eq. 2, and
lets the scorer choose between two.

With --rehearsal_dataset_name the loss has Eq. 9's term, too: rehearsal within rejection sampling.
"""

import itertools
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import torch

from baselines.measure import Measure, Sampling, Training, answer
from ppo_sr import endless
from tools.judges import Advantages
from utils import DEVICE, Count, InputError, LearningRate, Length, Natural, Positive, Share, Weight
from utils import autocast, backend, check_fits, encode_prompts, encode_rows, environment
from utils import length_batches, load_function, load_policy, load_rows, load_tokenizer, pad_pairs
from utils import progress, response_logprobs, run_cli, run_log, seeded, write_json, write_jsonl


@dataclass(kw_only=True)
class Sampled(Sampling):
    reward_model_path: str
    """the scorer, RM or AM of am_train.py"""
    dataset_name: str
    """rows `prompt`"""
    max_prompts: Natural = 0
    """the first ones alone (0: all)"""
    responses_per_prompt: Length = 4
    """K"""


@dataclass(kw_only=True)
class Train(Sampled, Training):
    """Rounds of Eq. 3 and 4."""

    keep: Literal["best", "threshold", "advantage"] = "best"
    """F of Eq. 3"""
    thresholds: tuple[Share, ...] = (0.75,)
    """each tau, as a quantile of the scores (the paper's is a score)"""
    num_rounds: Count = 10
    """times that the current policy samples"""
    prompts_per_round: Count = 512
    """prompts of a round"""
    learning_rate: LearningRate = 1e-5
    """of AdamW, constant"""
    global_batch_size: Count = 64
    """kept responses an optimiser step"""
    per_device_train_batch_size: Count = 4
    """at once; gradients add up"""
    rehearsal_dataset_name: str | None = None
    """D_R: rehearsal.jsonl of select_rehearsal.py"""
    rehearsal_coef: Weight = 0.01
    """gamma of Eq. 9"""
    eval_steps: Count = 1
    """rounds between evaluations"""


@dataclass(kw_only=True)
class BestOfN(Sampled):
    """The best of n samples, for n = 1, 2, 4 ... K, to best_of_n.json."""

    responses_per_prompt: Length = 64
    """K, the largest n, near which the curve is too low: the K stand for pi"""
    gold_reward: str | None = None
    """module:function(prompts, responses)"""


@dataclass(kw_only=True)
class Pairs(Sampled):
    """RSO's pairs, to pairs.jsonl."""

    responses_per_prompt: Length = 16
    """K, samples of which some are accepted"""
    beta: Positive = 0.5
    """of Eq. 2, whose optimal policy is sampled: small, and only the best are accepted"""
    pairs_per_prompt: Count = 4
    """at most"""


# --- F [Eq. 3]: scores (prompts, K), what is finished (prompts, K) -> weights (prompts, K) ---


def best_of_k(scores, finished):
    """[Eq. 3]  F = 1 for the best finished response to each prompt."""
    scores = np.where(finished, scores, -np.inf)
    best = np.zeros(scores.shape)
    best[np.arange(len(scores)), scores.argmax(1)] = 1
    return best * finished


def above(scores, finished, quantile):
    """[Eq. 3]  F = 1[finished, r >= tau], tau their quantile."""
    return (scores >= np.quantile(scores[finished], quantile)) * 1.0 * finished


def positive_advantage(scores, finished):
    """r - mean of the prompt's K, where that is above 0. Only what is finished counts."""
    means = (scores * finished).sum(1) / finished.sum(1).clip(min=1)
    return (scores - means[:, None]).clip(min=0) * finished


def accepted(scores, beta, rng):  # (K,)
    """RSO:  u < exp((r - max r) / beta).  Of draws from pi the accepted ones are draws from
    pi(y | x) exp(r / beta) / Z, but for the maximum, which is that of the K."""
    return np.flatnonzero(rng.random(len(scores)) < np.exp((scores - scores.max()) / beta))


def best_of_n(answers, scores, n):  # K answers and their scores to one prompt
    """Where the best of n draws from the K lies: indices of distinct answers, their probability,
    and its KL to pi, whose probabilities are the shares among the K.

    P(the best scores at most s) = P(one scores at most s)^n, so an answer's probability is
    F(s)^n - F(s-)^n, with F the distribution of pi's scores. Equal scores: a fixed order.
    """
    _, first, counts = np.unique(answers, return_index=True, return_counts=True)
    order = np.argsort(scores[first], kind="stable")
    share = counts[order] / len(answers)
    below = np.concatenate([[0.0], share.cumsum()])
    below[-1] = 1.0
    best = np.diff(below**n)
    kl = (best[best > 0] * np.log(best[best > 0] / share[best > 0])).sum()
    return first[order], best, kl


# --- what all three commands do ---


class Sampler:
    def __init__(self, args):
        """Wrong inputs are refused here."""
        self.args = args
        self.tokenizer = load_tokenizer(args.model_name_or_path)
        self.rows = load_rows(args.dataset_name, {"prompt": "prompt"}, args.max_prompts)
        length = args.max_length, args.response_length, args.truncate_prompts
        self.prompts = encode_prompts(self.tokenizer, self.rows, *length, args.dataset_name)
        self.policy = load_policy(args.model_name_or_path)
        check_fits(self.policy, self.tokenizer, args.max_length)
        self.scorer = Advantages(args.reward_model_path, args, args.dataset_name)
        self.score(self.rows[:1], ["a"])

    def score(self, rows, texts):
        """a(x, y) of the texts, (batch,)."""
        rows = [row | {"response": text} for row, text in zip(rows, texts, strict=True)]
        return self.scorer(rows, ["response"])[0]

    def sample(self, policy, chosen):
        """K responses to each of these prompts (numbers): their ids, texts, scores, and whether
        they are finished, each (prompts, K)."""
        args, shape = self.args, (len(chosen), self.args.responses_per_prompt)
        each = [i for i in chosen for _ in range(args.responses_per_prompt)]
        prompts = [self.prompts[i] for i in each]
        responses, texts, finished = answer(policy, self.tokenizer, prompts, args)
        scores = self.score([self.rows[i] for i in each], texts).reshape(shape)
        return responses, np.array(texts, object).reshape(shape), scores, finished.reshape(shape)


def train(args: Train):
    if args.keep != "threshold" and args.thresholds != Train.thresholds:
        raise InputError("--thresholds: is for --keep threshold")
    torch.manual_seed(args.seed)
    sampler = Sampler(args)
    rehearsal = []
    if name := args.rehearsal_dataset_name:
        rows = load_rows(name, {"prompt": "prompt", "response": "response"})
        texts = encode_rows(sampler.tokenizer, rows, ["response"], args, name)
        rehearsal = [(ids[:n], ids[n:]) for [(ids, n)] in texts]
    engine = backend.engine(sampler.policy, args.learning_rate, max_grad_norm=args.max_grad_norm)
    reference = backend.reference(engine, args.model_name_or_path)
    measure = Measure(args, sampler.tokenizer, reference, sampler.score)
    used = {"rehearsal": 0}  # rows so far
    log = run_log(args, engine=engine, used=used)
    if not log.saved:
        log.write(0, measure(engine, 0, log))
    per_round = min(args.prompts_per_round, len(sampler.rows))
    prompts = endless(range(len(sampler.rows)), args.seed, log.step * per_round)
    replayed = endless(rehearsal, args.seed, used["rehearsal"])
    bar = progress(range(log.step + 1, args.num_rounds + 1), "rounds", log.step)
    for step in bar:
        # --- 1 sample, 2 score: once a round ---
        chosen = list(itertools.islice(prompts, per_round))
        responses, _, scores, finished = sampler.sample(engine, chosen)
        losses = []
        if not finished.any():
            raise InputError(f"round {step}: no response is finished; raise --response_length")
        for quantile in sorted(args.thresholds) if args.keep == "threshold" else [None]:
            # --- 3 keep [Eq. 3] ---
            if args.keep == "best":
                weights = best_of_k(scores, finished)
            elif args.keep == "threshold":
                weights = above(scores, finished, quantile)
            else:
                weights = positive_advantage(scores, finished)
            kept = np.flatnonzero(weights)
            if not len(kept):
                raise InputError(f"round {step}: all scores are equal; use another --keep")
            weights = weights.ravel() / weights.mean(where=weights > 0)  # 1 on average
            # --- 4 train [Eq. 4] ---
            for batch in torch.randperm(len(kept)).split(args.global_batch_size):
                pairs = [
                    (sampler.prompts[chosen[i // scores.shape[1]]], responses[i], weights[i])
                    for i in kept[batch.numpy()].tolist()
                ]
                old = list(itertools.islice(replayed, len(pairs)))
                used["rehearsal"] += len(old)
                losses.append(update(args, engine, sampler.tokenizer, pairs, old, log, step))
        metrics = {"objective/scores": scores.mean(), "objective/kept": len(kept) / scores.size}
        metrics |= {"objective/kept_scores": scores.ravel()[kept].mean(), "loss": np.mean(losses)}
        metrics["val/response_length"] = np.mean([*map(len, responses)])
        if measure.due(step, args.num_rounds):
            metrics |= measure(engine, step, log)
        log.write(step, metrics)
        if args.save_steps and not step % args.save_steps:
            log.save(step)
    log.finish("policy", engine, sampler.tokenizer)


def update(args, engine, tokenizer, pairs, rehearsal, log, step):
    """[Eq. 4]  One step on -sum_t log pi(y_t | x, y_<t), a mean over the tokens of the batch."""
    num_tokens = sum(len(y) for _, y, _ in pairs)
    num_old = max(1, sum(len(y) for _, y in rehearsal))
    rows = [(x, y, weight / num_tokens) for x, y, weight in pairs]
    rows += [(x, y, args.rehearsal_coef / num_old) for x, y in rehearsal]  # [Eq. 9]
    losses = []
    size = args.per_device_train_batch_size
    for part in backend.deal(length_batches([len(x + y) for x, y, _ in rows], size)):
        batch = pad_pairs([rows[i][:2] for i in part], tokenizer.pad_token_id)
        with autocast(args.bf16):
            logprobs, mask = response_logprobs(engine, *batch, args.temperature)
        weights = torch.tensor([rows[i][2] for i in part], dtype=torch.float32, device=DEVICE)
        loss = -((logprobs * mask).sum(1) * weights).sum()
        engine.backward(loss)
        losses.append(loss.detach().double())
    log.take_step(engine, "", step, [row[:2] for row in rows])
    return backend.add_up(losses).item()


def curve(args: BestOfN):
    sampler = Sampler(args)
    gold = args.gold_reward and load_function(args.gold_reward, "--gold_reward")
    with seeded(args.seed):
        _, texts, scores, done = sampler.sample(sampler.policy, range(len(sampler.rows)))
    golds = None
    if gold:
        each = [row["prompt"] for row in sampler.rows for _ in texts[0]]
        golds = np.array(gold(each, texts.ravel().tolist())).reshape(texts.shape)
    points = []
    for n in (2**i for i in range(args.responses_per_prompt.bit_length())):
        found = {"score": [], "gold": [], "kl": []}
        for i in np.flatnonzero(done.any(1)):  # a cut answer is not taken
            ended, of = done[i], scores[i][done[i]]
            where, share, kl = best_of_n(texts[i][ended].astype(str), of, n)
            found["score"].append(share @ of[where])
            found["kl"].append(kl)
            if gold:
                found["gold"].append(share @ golds[i][ended][where])
        point = {"n": n, "kl_bound": np.log(n) - (n - 1) / n}
        point |= {k: float(np.mean(v)) for k, v in found.items() if v}
        points.append(point)
        print("  ".join(f"{k} {v:.3g}" for k, v in point.items()))
    report = {"points": points, "args": asdict(args)} | environment()
    write_json(f"{args.output_dir}/best_of_n.json", report)
    return points


def pairs(args: Pairs):
    sampler, rng = Sampler(args), np.random.default_rng(args.seed)
    with seeded(args.seed):
        _, texts, scores, finished = sampler.sample(sampler.policy, range(len(sampler.rows)))
    written = []
    for row, answers, of, done in zip(sampler.rows, texts, scores, finished, strict=True):
        answers, of = answers[done], of[done]
        kept = accepted(of, args.beta, rng) if len(of) else []
        # pairs of neighbours in the order of drawing, the better one by the scorer first
        neighbours = [(i, j) for i, j in itertools.pairwise(kept) if answers[i] != answers[j]]
        for i, j in neighbours[: args.pairs_per_prompt]:
            i, j = (i, j) if of[i] >= of[j] else (j, i)
            both = {"chosen": answers[i], "rejected": answers[j]}
            written.append(row | both | {"prob_chosen": 1 / (1 + np.exp(of[j] - of[i]))})
    if not written:
        raise InputError("--beta: no prompt has two different accepted responses; raise it")
    write_jsonl(f"{args.output_dir}/pairs.jsonl", written)
    print(f"{len(written)} pairs of {len(sampler.rows)} prompts")


def main(args: Train | BestOfN | Pairs):
    {Train: train, BestOfN: curve, Pairs: pairs}[type(args)](args)


if __name__ == "__main__":
    run_cli(main, Train | BestOfN | Pairs, __doc__)
