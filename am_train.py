"""Reward model (Eq. 1) and Advantage Model (Eq. 6-8) of "Stabilizing RLHF through Advantage Model
and Selective Rehearsal" (Peng et al. 2023).

    for each batch of preference pairs (x, y_c, y_r):
        r, e = scorer(x, y)                     r a score of the text, e an optional one of x alone
        a = r - (N - K)/N e - 1/N sum_k w_k r   Eq. 8; by default K = 0, e = 0: a = r
        rm:  minimise -log s(r_c - r_r)                                             Eq. 1
        am:  minimise -log s(a_c - a_r) - log s(m - a_c) - log s(m + a_r)           Eq. 6

    python am_train.py --loss am --model_name_or_path MODEL --dataset_name pairs.jsonl \\
        --eval_dataset_name test.jsonl --output_dir runs/am

What the paper leaves open (docs/CHOICES.md has the numbers):
  C1  e: `none` (the score is a itself), `joint` (by Eq. 6 as printed), `regress` (by Eq. 7).
  C2  Eq. 8's sum: which y stands in it, and what keeps the weights w_k = pi_phi / pi'_k finite.
      A trained scorer gives a = r - e: with K > 0 right under `regress`, where e learns E[w r].
  C3  e is read at the last prompt token, where a causal LM has not seen y.

Beware of two names: r is a score here, a probability ratio in PPO papers; a compares a response
with its prompt's expected reward, PPO's A_t compares a token with the critic's value.
"""

import itertools
import json
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from utils import DEVICE, Bound, Count, InputError, LearningRate, Length, Natural, Share, Weight
from utils import autocast, backend, check_fits, encode_rows, in_one_line, length_batches, load_rows
from utils import load_scorer, load_tokenizer, pad, progress, run_cli, run_log, score_texts
from utils import write_json

SIDES = ("chosen", "rejected")


@dataclass
class Args:
    model_name_or_path: str  # causal LM or encoder to start from (paper §4.2: BLOOMZ-7B)
    dataset_name: str  # rows `prompt`, `chosen`, `rejected`: .jsonl(.gz), .parquet or hub id
    output_dir: str  # the run folder; the scorer goes to its model/
    eval_dataset_name: str | None = None  # pairs to evaluate on, during training and at the end
    loss: Literal["rm", "am"] = "am"  # rm: Eq. 1, am: Eq. 6
    am_margin: Bound | str = 2.5  # m(x) of Eq. 6 (footnote 3; inf: no bound), or a file (C11)
    expected_reward: Literal["none", "joint", "regress"] = "none"  # e of Eq. 7 (our choice C1)
    num_alternates: Natural = 0  # K of Eq. 8; rows by tools/write_logprobs.py (our choice C2)
    num_policies: Natural = 0  # N of Eq. 8, at least K (0: 2K, our choice C2)
    eq8_y: Literal["drawn", "own"] = "drawn"  # y in the sum: of pi'_k, or a(x, y)'s own (C2)
    importance: Literal["clip", "length", "none"] = "clip"  # weights of Eq. 8 (our choice C2)
    importance_clip: Bound = 2.0  # largest weight under --importance clip (our choice C2)
    learning_rate: LearningRate = 5e-6  # at its peak (paper §4.2), of AdamW (our choice C16)
    warmup_ratio: Share = 0.1  # share of steps with linear warm-up (paper §4.2)
    min_lr_ratio: Share = 0.1  # the cosine ends at this share of the peak (paper §4.2)
    weight_decay: Weight = 0.0  # of AdamW (our choice C16)
    max_grad_norm: Bound = 1.0  # longer gradients are scaled down to it (our choice C16)
    num_train_epochs: Count = 1  # passes over the pairs (§4.2: more over-fit)
    global_batch_size: Count = 180  # pairs a step (paper §4.2: 180 English, 480 Chinese)
    group_by_prompt: bool = False  # shuffle prompts, not pairs: fewer texts (our choice C17)
    per_device_train_batch_size: Count = 2  # pairs at once; gradients add up
    per_device_eval_batch_size: Count = 32  # texts at once in evaluation
    max_length: Length = 512  # tokens of prompt and response together
    truncate_prompts: bool = False  # cut longer texts, do not refuse them
    max_rows: Natural = 0  # read the first rows alone (0: all)
    save_steps: Natural = 0  # steps between checkpoints for --resume (0: none)
    resume: bool = False  # go on, as if never stopped
    eval_steps: Natural = 0  # steps between evaluations (0: at the end alone)
    seed: Natural = 1  # of heads and data order
    bf16: bool = False  # matrix products in bfloat16 over float32 weights


# === The equations: functions of (pairs,); losses are their means. s: the sigmoid. ===


def reward_model_loss(r_chosen, r_rejected):  # each (pairs,)
    """[Eq. 1]  -E log s(r(x, y_c) - r(x, y_r))"""
    return -F.logsigmoid(r_chosen - r_rejected).mean()


def importance_weights(logprob_current, logprob_behaviour, num_tokens, method="clip", clip=2.0):
    """[Eq. 5, 8]  w = pi_phi(y|x) / pi'_k(y|x) of whole responses, (texts,), kept finite:

    clip    min(w, clip), biased where it clips
    length  w^(1 / tokens), the tokens' geometric mean: no importance weight any more
    none    1, as if every alternate policy were the current one
    """
    log_ratio = logprob_current - logprob_behaviour
    if method == "clip":
        return log_ratio.exp().clamp(max=clip)
    return (log_ratio / num_tokens).exp() if method == "length" else torch.ones_like(log_ratio)


def advantage(r, e, weighted_sum=0.0, k=0, n=1):  # (2, pairs), e (pairs,) or (texts,)
    """[Eq. 8]  a(x, y) = r(x, y) - (N - K)/N e(x) - 1/N sum_k w_k r(x, y_k)

    weighted_sum: sum_k w_k r(x, y_k), in print r(x, y) (C2); k = 0 gives a = r - e.
    """
    return r - (n - k) / n * e - weighted_sum / n


def advantage_model_loss(a_chosen, a_rejected, margin):  # each (pairs,); margin may be a number
    """[Eq. 6]  -E[ log s(a_c - a_r)  +  log s(m - a_c)  +  log s(m + a_r) ]
                    rank                 a_c below m        a_r above -m

    The bound brakes long before m: for one pair with a certain label the optimum is
    a_c = -a_r = m / 3.
    """
    rank = -F.logsigmoid(a_chosen - a_rejected)
    bound = -F.logsigmoid(margin - a_chosen) - F.logsigmoid(margin + a_rejected)
    return (rank + bound).mean()


def expected_reward_loss(e, r_chosen, r_rejected):  # each (pairs,)
    """[Eq. 7]  e(x) = E r(x, y), y of the pair: e regressed on their mean score.

    In print y ~ pi_phi (C1). Over all pairs of a ranking e goes to its mean score. r is
    detached, but shares the backbone with e.
    """
    return F.mse_loss(e, (r_chosen + r_rejected).detach() / 2)


def scorer_loss(args, batch):
    """The loss that the flags ask for, of what score_pairs returns."""
    r, e, weighted_sum, k = (batch[name] for name in ("r", "e", "weighted_sum", "k"))
    if args.loss == "rm":
        return reward_model_loss(*r)  # r (2, pairs): chosen, rejected
    n = args.num_policies or 2 * args.num_alternates or 1  # without K it cancels
    if args.expected_reward != "regress":
        return advantage_model_loss(*advantage(r, e, weighted_sum, k, n), batch["margin"])
    # e and the sum are estimates: no gradient of Eq. 6
    a = advantage(r, e.detach(), weighted_sum.detach(), k, n)
    mean = torch.where(k > 0, weighted_sum / k.clamp(min=1), r)  # sum_k w_k r / k, or r if none
    return advantage_model_loss(*a, batch["margin"]) + expected_reward_loss(e, *mean)


# === end of the equations ===


def warmup_cosine(steps, warmup_ratio, min_lr_ratio):
    """Factor on the learning rate: linear warm-up, then a cosine to min_lr_ratio (paper §4.2)."""
    warmup = max(1, round(steps * warmup_ratio))

    def factor(step):
        progress = min(1.0, max(0, step - warmup) / max(1, steps - warmup))
        cosine = min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
        return min((step + 1) / warmup, cosine)

    return factor


# --- metrics: the same lines stand in evaluate.py ---


def expected_calibration_error(confidence, correct):  # each (pairs,)
    """ECE in points: sum over bins of (share of pairs) x |accuracy - mean confidence|, times 100.

    confidence: s(|difference of scores|), in 10 bins of equal width over [0.5, 1], right edge
    included (our choice C7). correct: 1, 0, or 0.5 of a tie; or the true probability.
    """
    index = np.digitize(confidence, np.linspace(0.5, 1, 11)[1:-1], right=True)
    gap = np.bincount(index, correct, 10) - np.bincount(index, confidence, 10)
    return 100 * np.abs(gap).sum() / len(index)


def ranking_metrics(chosen, rejected):  # each (pairs,): scores
    """[p. 6]  p(y_c preferred) = s(score_c - score_r): accuracy and ECE in points, Brier, NLL."""
    delta = np.asarray(chosen, dtype=np.float64) - np.asarray(rejected, dtype=np.float64)
    correct = np.where(delta == 0, 0.5, delta > 0)
    return {
        "accuracy": 100 * correct.mean(),
        "ece": expected_calibration_error(1 / (1 + np.exp(-np.abs(delta))), correct),
        "brier": ((1 - 1 / (1 + np.exp(-delta))) ** 2).mean(),
        "nll": np.logaddexp(0, -delta).mean(),
    }


def score_balance(scores, tasks):  # (texts,), (texts,)
    """Mean and std of each task's scores, and how far they spread over the tasks (Fig. 4a, 4b)."""
    scores, tasks, per_task = np.asarray(scores), np.asarray(tasks, object), {}
    for task in np.unique(tasks):
        part = scores[tasks == task]
        per_task[str(task)] = {"mean": part.mean(), "std": part.std(), "count": len(part)}
    means, stds = ([v[k] for v in per_task.values()] for k in ("mean", "std"))
    spreads = {"spread_of_means": np.std(means), "spread_of_stds": np.std(stds)}
    return per_task, spreads | {"mean_within_std": np.mean(stds)}


# --- data ---


def encode_pairs(name, rows, tokenizer, encoder, args):
    """Rows -> texts, each distinct one once: [(ids, prompt_len)], and pairs of indices into them:
    {chosen, rejected, row, where, alternates: of both sides, empty; see add_alternates}."""
    index, pairs = {}, []
    encoded = encode_rows(tokenizer, rows, SIDES, args, name, encoder)
    for number, (row, sides) in enumerate(zip(rows, encoded, strict=True), 1):
        pair = {"row": row, "where": f"{name}, line {number}", "alternates": ([], [])}
        numbers = [index.setdefault((*ids, prompt_len), len(index)) for ids, prompt_len in sides]
        pairs.append(pair | dict(zip(SIDES, numbers, strict=True)))
    kept = [pair for pair in pairs if pair["chosen"] != pair["rejected"]]
    if equal := len(pairs) - len(kept):
        print(f"{name}: {equal} of {len(pairs)} pairs left out: equal sides")
    if rows and not kept:
        raise InputError(f"{name}: no pair has two different sides")
    return [(ids, prompt_len) for *ids, prompt_len in index], kept


def add_alternates(texts, pairs, args):
    """Fill in the (text, weight) of Eq. 8's sum.

    drawn  y_k ~ pi'_k: one response to x of each of the first K policies by name. Of several in a
           ranking a hash picks one: picking by rank would favour chosen ones.
    own    y_k = y, weighed by pi_phi over each of K policies (`logprobs_*`).
    """
    drawn = {}
    for pair in pairs:
        for s, side in enumerate(SIDES):
            row, text, policy = pair["row"], pair[side], pair["row"].get(f"policy_{side}")
            check_logprobs(row, side, args, pair["where"])
            behaviour = {policy: row[f"logprob_{side}"]}  # the one that wrote y
            if args.eq8_y == "own" and f"logprobs_{side}" in row:
                behaviour = dict(sorted(row[f"logprobs_{side}"].items())[: args.num_alternates])
            ids, prompt_len = texts[text]
            current = torch.tensor(row[f"current_logprob_{side}"])
            ratio = current, torch.tensor([*behaviour.values()])
            how = args.importance, args.importance_clip
            weights = importance_weights(*ratio, len(ids) - prompt_len, *how).tolist()
            if args.eq8_y == "own":
                pair["alternates"][s].extend((text, w) for w in weights)
            else:
                of_prompt = drawn.setdefault(str(row["prompt"]), {})
                new = zlib.crc32(str(ids).encode()), text, weights[0]
                of_prompt[policy] = min(new, of_prompt.get(policy, new))
    for pair in pairs if args.eq8_y == "drawn" else ():
        of_prompt = drawn[str(pair["row"]["prompt"])]
        terms = [of_prompt[policy][1:] for policy in sorted(of_prompt)[: args.num_alternates]]
        pair["alternates"] = terms, terms


def check_logprobs(row, side, args, where):
    """Refuse a row that lacks what Eq. 8's sum needs: log-probs (up to 0), policy's name."""
    found = {field: {0: row.get(field)} for field in (f"logprob_{side}", f"current_logprob_{side}")}
    if args.eq8_y == "own":
        found[f"logprobs_{side}"] = row.get(f"logprobs_{side}", {})
    elif f"policy_{side}" not in row:
        found[f"policy_{side}"] = None
    for field, of in found.items():
        values = of.values() if isinstance(of, dict) else [None]
        if not all(type(value) in (int, float) and value <= 0 for value in values):
            problem = f"field '{field}' is missing, or no number up to 0"
            raise InputError(f"{where}: {problem}; tools/write_logprobs.py writes it")


def load_margins(args, pairs):
    """m(x) of every pair: --am_margin itself, or what its file gives to the pair's task."""
    flag, table = f"--am_margin {args.am_margin}", {}
    try:
        table["default"] = float(args.am_margin)
    except ValueError:  # a file
        with in_one_line(f"{flag}: is no JSON file {{task: number}}"):
            table = dict(json.loads(Path(args.am_margin).read_text(encoding="utf-8")))
    if bad := [k for k, m in table.items() if not (type(m) in (int, float) and m > 0)]:
        raise InputError(f"{flag}: '{bad[0]}' must be a positive number")
    for pair in pairs:
        task = pair["row"].get("task", "all")
        pair["margin"] = table.get(task, table.get("default"))
        if pair["margin"] is None:
            raise InputError(f"{flag}: no '{task}' and no 'default' ({pair['where']})")


def shuffled_batches(pairs, args, generator):
    """The batches of an epoch; with --group_by_prompt a prompt's pairs follow one another."""
    order = torch.randperm(len(pairs), generator=generator).tolist()
    if args.group_by_prompt:
        prompts, position = [str(pair["row"]["prompt"]) for pair in pairs], {}
        for prompt, place in zip(prompts, np.argsort(order), strict=True):
            position.setdefault(prompt, place)  # as its first pair (in the file) fell
        order.sort(key=lambda i: position[prompts[i]])
    size = args.global_batch_size
    return [[pairs[i] for i in order[k : k + size]] for k in range(0, len(order), size)]


# --- scoring ---


def score_batch(scorer, tokenizer, texts, bf16):
    """r and e, each (texts,), with gradients; texts go in groups of like length."""
    lengths, scores = [len(ids) for ids, _ in texts], []
    groups = length_batches(lengths, len(texts), length_ratio=backend.length_ratio)
    padded = [pad([texts[i][0] for i in group], tokenizer.pad_token_id) for group in groups]
    # one look-up for all groups: each would fill a gradient of the whole vocabulary going backward
    embedded = scorer.model.get_input_embeddings()(torch.cat([ids.flatten() for ids, _ in padded]))
    embedded = embedded.split([ids.numel() for ids, _ in padded])
    for group, (ids, mask), rows in zip(groups, padded, embedded, strict=True):
        prompt_lens = torch.tensor([texts[i][1] for i in group], device=DEVICE)
        with autocast(bf16):
            rows = rows.view(*ids.shape, -1)
            scores.append(torch.stack(scorer(ids, mask, prompt_lens, rows)))
    back = torch.tensor([i for group in groups for i in group]).argsort()
    return torch.cat(scores, 1)[:, back.to(DEVICE)]


def score_pairs(engine, tokenizer, texts, pairs, args):
    """Every text that the pairs need goes through the scorer once -> what scorer_loss takes:
    r, weighted_sum and k of Eq. 8, each (2, pairs); e and margin, each (pairs,); the rows."""
    sides = [[pair[side] for pair in pairs] for side in SIDES]
    alternates = [(s, p, pair["alternates"][s]) for p, pair in enumerate(pairs) for s in (0, 1)]
    terms = [(s, p, text, weight) for s, p, of in alternates for text, weight in of]
    needed = sorted({*sides[0], *sides[1], *(text for _, _, text, _ in terms)})
    place = {text: i for i, text in enumerate(needed)}
    r, e = engine.run(score_batch, tokenizer, [texts[t] for t in needed], args.bf16)
    chosen, rejected = ([place[text] for text in side] for side in sides)
    # (2, pairs), 0 where no y_k was drawn
    weighted_sum = k = torch.zeros(2, len(pairs), device=DEVICE)
    if terms:
        s, p, of_terms, weights = zip(*terms, strict=True)
        at = torch.tensor(s, device=DEVICE), torch.tensor(p, device=DEVICE)
        values = torch.tensor(weights, device=DEVICE) * r[[place[text] for text in of_terms]]
        weighted_sum = weighted_sum.index_put(at, values, accumulate=True)
        k = k.index_put(at, torch.ones_like(values), accumulate=True)
    batch = {"r": torch.stack([r[chosen], r[rejected]]), "e": e[chosen]}
    batch |= {"weighted_sum": weighted_sum, "k": k, "rows": [pair["row"] for pair in pairs]}
    return batch | {"margin": torch.tensor([pair["margin"] for pair in pairs], device=DEVICE)}


def evaluate(engine, tokenizer, texts, pairs, args):
    """Metrics of a(x, y) = r - e on pairs and the scores behind them."""
    engine.module.eval()
    r, e = score_texts(engine, tokenizer, texts, args.per_device_eval_batch_size, args.bf16)
    engine.module.train()
    a = advantage(r, e)  # [Eq. 8] with K = 0
    chosen, rejected = (a[[pair[side] for pair in pairs]] for side in SIDES)
    tasks = [pair["row"].get("task", "all") for pair in pairs]
    per_task, balance = score_balance([*chosen, *rejected], tasks * 2)
    return ranking_metrics(chosen, rejected) | balance, per_task, (chosen, rejected)


def check(args):
    if args.loss == "rm" and (args.expected_reward != "none" or args.num_alternates):
        raise InputError("--expected_reward, --num_alternates: belong to --loss am, not to Eq. 1")
    if args.num_policies and args.num_policies < max(1, args.num_alternates):
        raise InputError(f"--num_policies {args.num_policies}: N must be at least --num_alternates")
    if args.num_alternates and args.expected_reward != "regress":
        print("Eq. 8: a has the sum over K policies in training, and is read as r - e")


def main(args: Args, scorer_loss=scorer_loss, prepare=lambda scorer, tokenizer, texts: None):
    """Returns the scores of the evaluation pairs, each (pairs,), or None without any.
    baselines/reward_losses.py passes another loss and scorer."""
    # --- set up ---
    check(args)
    fields = {"prompt": "prompt", "chosen": "response", "rejected": "response"}
    rows = load_rows(args.dataset_name, fields, args.max_rows)
    test_rows = load_rows(args.eval_dataset_name, fields) if args.eval_dataset_name else []
    torch.manual_seed(args.seed)
    tokenizer = load_tokenizer(args.model_name_or_path, dedicated_pad=True)
    start = {"trained": False, "expected_reward_head": args.expected_reward != "none"}
    scorer = load_scorer(args.model_name_or_path, tokenizer, **start)
    encode = tokenizer, scorer.is_encoder, args
    texts, train = encode_pairs(args.dataset_name, rows, *encode)
    load_margins(args, train)
    test_texts, test = encode_pairs(args.eval_dataset_name, test_rows, *encode)
    check_fits(scorer.model, tokenizer, max(len(ids) for ids, _ in texts + test_texts))
    prepare(scorer, tokenizer, texts + test_texts)
    steps = args.num_train_epochs * -(-len(train) // args.global_batch_size)
    schedule = warmup_cosine(steps, args.warmup_ratio, args.min_lr_ratio)
    options = args.learning_rate, schedule, args.weight_decay, args.max_grad_norm
    engine = backend.engine(scorer, *options)
    if args.num_alternates:
        add_alternates(texts, train, args)
    log = run_log(args, engine=engine)
    print(f"{args.loss}: pairs {len(train)}, steps {steps}, done {log.step}")

    # --- train ---
    scorer.train()
    order = torch.Generator().manual_seed(args.seed)
    epochs = [shuffled_batches(train, args, order) for _ in range(args.num_train_epochs)]
    batches, size = list(itertools.chain(*epochs)), args.per_device_train_batch_size
    bar = progress(batches[log.step :], args.loss, log.step)  # skip what a stopped run did
    for step, batch in enumerate(bar, log.step + 1):
        sums = []
        # in parts that fit into memory, each a share of the mean
        for micro in backend.deal([batch[k : k + size] for k in range(0, len(batch), size)]):
            scores = score_pairs(engine, tokenizer, texts, micro, args)
            loss = scorer_loss(args, scores) * (len(micro) / len(batch))
            log.check_finite("loss", loss.item(), step, scores["rows"])
            engine.backward(loss)  # gradients add up
            right = (scores["r"][0] > scores["r"][1]).float().mean().item()
            accuracy = 100 * (len(micro) / len(batch)) * right
            sums.append(torch.tensor([loss.item(), accuracy], dtype=torch.float64))
        loss, accuracy = backend.add_up(sums).tolist()
        metrics = {"loss": loss, "accuracy": accuracy}
        metrics["lr"] = engine.scheduler.get_last_lr()[0]
        metrics["grad_norm"] = log.take_step(engine, "", step, [pair["row"] for pair in batch])
        if test and args.eval_steps and step % args.eval_steps == 0 and step < steps:
            found, _, _ = evaluate(engine, tokenizer, test_texts, test, args)
            metrics |= {f"eval/{name}": value for name, value in found.items()}
        log.write(step, metrics)
        if args.save_steps and step % args.save_steps == 0:
            log.save(step)
        bar.set_postfix(loss=f"{loss:.3f}", accuracy=f"{accuracy:.1f}", refresh=False)

    # --- save, then evaluate ---
    log.finish("scorer", engine, tokenizer)
    if not test:
        return None
    found, per_task, scores = evaluate(engine, tokenizer, test_texts, test, args)
    log.write(steps, {f"eval/{name}": value for name, value in found.items()})
    write_json(log.folder / "eval.json", found | {"per_task": per_task})
    print("  ".join(f"{name} {value:.4g}" for name, value in found.items()))
    return scores


if __name__ == "__main__":
    run_cli(main, Args, __doc__)
