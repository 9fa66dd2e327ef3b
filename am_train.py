"""Reward model (Eq. 1) and Advantage Model (Eq. 6-8) of "Stabilizing RLHF through Advantage Model and Selective Rehearsal".

    for each batch of preference pairs (x, y_c, y_r):
        r, e = scorer(x, y)                             r a score head on the text, e an optional head on x alone
        a = r - (N - K)/N e - 1/N sum_k w_k r           Eq. 8; K = 0, the default: a = r - e, without an e head a = r
        rm:  minimise -log s(r_c - r_r)                                                             Eq. 1
        am:  minimise -log s(a_c - a_r) - log s(m - a_c) - log s(m + a_r)                           Eq. 6

One CPU command on real pairs (rows `prompt`, `chosen`, `rejected`, optional `task`; see --help for every flag):

    python am_train.py --loss am --model_name_or_path MODEL --dataset_name pairs.jsonl \\
        --eval_dataset_name test.jsonl --output_dir runs/am

What differs from the paper, or is left open there (numbers: docs/CHOICES.md):
  C1  how e is trained: --expected_reward none (default: the score is a itself), joint (Eq. 6 as printed), regress (Eq. 7).
  C2  Eq. 8's sum: --num_alternates K is 0 by default; which y stands in it is --eq8_y, what keeps the weights
      w_k = pi_phi / pi'_k finite is --importance. A trained scorer gives a = r - e, where the sum stands for e: with
      `regress` it does estimate e; with `none` or `joint`, or under `own`, a as trained is another function (C2).
  C3  e is read at the last prompt token, where a causal LM has not seen y.

Collisions of symbols: r is a score here and the probability ratio in PPO papers; the paper's a is an advantage over the
expected reward of the *prompt*, PPO's A_t one over the value of a *token*.
"""

import zlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import encode_pair, load_rows, load_tokenizer
from engines import EngineArgs, dealt, make_engine, rank, save_model, total
from utils import InputError, RunLog, Scorer, check_finite, check_positions
from utils import (
    load_checkpoint,
    read_json,
    run_cli,
    save_checkpoint,
    score_batch,
    score_texts,
    warmup_cosine,
    write_json,
)


@dataclass
class Args(EngineArgs):
    model_name_or_path: str
    """causal LM or encoder to start from (folder or hub id; paper §4.2: BLOOMZ-7B)"""
    dataset_name: str
    """training pairs: .jsonl, .jsonl.gz, .parquet or a hub id, with `prompt`, `chosen`, `rejected`, optional `task`"""
    output_dir: str
    """the run folder; the scorer is written to its model/"""
    eval_dataset_name: str | None = None
    """pairs to evaluate on, during training and at the end"""
    loss: Literal["rm", "am"] = "am"
    """rm: Eq. 1, am: Eq. 6"""
    am_margin: float | str = 2.5
    """m(x) of Eq. 6 (paper, footnote 3): the larger, the weaker the pull of the bound towards 0, inf: no bound; or a
    JSON file {task: m} with an optional "default", as tools/fit_margin.py writes it (our choice C11)"""
    expected_reward: Literal["none", "joint", "regress"] = "none"
    """how e(x) of Eq. 7 is learned; with K = 0 Eq. 6 does not determine it (our choice C1)"""
    num_alternates: int = 0
    """K of Eq. 8: alternate policies whose responses stand in the sum; needs log-probs in the rows (our choice C2)"""
    num_policies: int = 0
    """N of Eq. 8, at least K: the current policy, through e, weighs (N - K)/N (0: N = 2K; not stated in the paper)"""
    eq8_y: Literal["drawn", "own"] = "drawn"
    """which y Eq. 8's sum scores: a response drawn from each alternate policy, or the literal y of a(x, y) (our C2)"""
    importance: Literal["clip", "length", "none"] = "clip"
    """weights of Eq. 8: clipped at --importance_clip, exp(log-ratio / tokens), or all 1 (not stated; our choice C2)"""
    importance_clip: float = 2.0
    """largest weight under --importance clip (our choice C2: what it loses in bias it wins back in variance)"""
    learning_rate: float = 5e-6
    """peak learning rate (paper §4.2), of AdamW (our choice C16)"""
    warmup_ratio: float = 0.1
    """share of steps with linear warm-up (paper §4.2)"""
    min_lr_ratio: float = 0.1
    """the cosine ends at this share of the peak (paper §4.2)"""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay (not stated in the paper; our choice C16)"""
    max_grad_norm: float = 1.0
    """global gradient norm above which gradients are scaled down (not stated in the paper; our choice C16)"""
    num_train_epochs: int = 1
    """passes over the pairs (paper §4.2: it over-fits after one)"""
    global_batch_size: int = 180
    """pairs per optimiser step (paper §4.2: 180 English, 480 Chinese)"""
    group_by_prompt: bool = False
    """shuffle prompts instead of pairs: pairs of one ranking share a batch, which reads each text once (our C17)"""
    per_device_train_batch_size: int = 60
    """pairs per forward pass; gradients accumulate up to the global batch"""
    per_device_eval_batch_size: int = 128
    """texts per forward pass in evaluation"""
    max_length: int = 512
    """tokens of prompt and response together; longer prompts keep their end"""
    truncate_prompts: bool = False
    """shorten a prompt that fills --max_length by itself instead of refusing it"""
    max_rows: int = 0
    """read only the first rows of the training pairs (0: all)"""
    save_steps: int = 0
    """write checkpoint/ every so many steps (0: never)"""
    resume: bool = False
    """go on from checkpoint/ of the same command, or from the start where there is none"""
    eval_steps: int = 0
    """evaluate every so many steps (0: at the end alone)"""
    seed: int = 1
    """seed of the heads and of the data order"""
    bf16: bool = False
    """matrix products in bfloat16 over float32 weights"""
    report_to: Literal["none", "tensorboard", "wandb"] = "none"
    """mirror the metrics to `tensorboard` or `wandb`"""


# --- the equations: pure functions of tensors, one value a pair -------------------------------------------------------


def reward_model_loss(r_chosen, r_rejected):  # each (pairs,)
    """[Eq. 1]  -E log s(r(x, y_c) - r(x, y_r)),  s = sigmoid"""
    return -F.logsigmoid(r_chosen - r_rejected).mean()


def importance_weights(logprob_current, logprob_behaviour, num_tokens, method="clip", clip=2.0):  # each (texts,)
    """[Eq. 5, 8]  w = pi_phi(y|x) / pi'_k(y|x) of whole responses, kept finite by `method`; num_tokens: of the response.

    clip: min(w, clip), biased where it clips.  length: the geometric mean of the tokens' ratios, w^(1/tokens), which is
    finite and no importance weight any more.  none: 1, as if every alternate policy were the current one.
    """
    log_ratio = logprob_current - logprob_behaviour
    if method == "clip":
        return log_ratio.exp().clamp(max=clip)
    return (log_ratio / num_tokens).exp() if method == "length" else torch.ones_like(log_ratio)


def advantage(r, e, weighted_sum=0.0, k=0, n=1):  # r, e, weighted_sum, k each (batch,)
    """[Eq. 8]  a(x, y) = r(x, y) - (N - K)/N e(x) - 1/N sum_k w_k r(x, y_k)

    weighted_sum is sum_k w_k r(x, y_k) over the K alternate policies; k = 0 gives a = r - e for any n.
    """
    return r - (n - k) / n * e - weighted_sum / n


def advantage_model_loss(a_chosen, a_rejected, margin):  # each (pairs,); margin a number or (pairs,)
    """[Eq. 6]  -E[ log s(a_c - a_r)  +  log s(m - a_c)  +  log s(m + a_r) ]
                       rank               a_c below m       a_r above -m

    The bound is a brake, not a wall: for one pair with a certain label the optimum is a_c = -a_r = m / 3.
    """
    rank = -F.logsigmoid(a_chosen - a_rejected)
    bound = -F.logsigmoid(margin - a_chosen) - F.logsigmoid(margin + a_rejected)
    return (rank + bound).mean()


def expected_reward_loss(e, r_chosen, r_rejected):  # each (pairs,)
    """[Eq. 7]  e(x) = E_y r(x, y), as a regression of e on the mean score of the prompt's responses (detached).

    Over all pairs of a ranking every response stands equally often, so the mean of the pairs' means is the mean of the
    responses, and that is where this loss is least.
    """
    return F.mse_loss(e, (r_chosen + r_rejected).detach() / 2)


def scorer_loss(args, batch):
    """The loss that the flags ask for, of what score_pairs returns.

    With `regress` e and the sum of Eq. 8 are estimates, not levers: no gradient flows through them into Eq. 6, and e
    learns the importance-weighted mean where there are weights.
    """
    r, e, weighted_sum, k = (
        batch["r"],
        batch["e"],
        batch["weighted_sum"],
        batch["k"],
    )  # e (pairs,), the others (2, pairs)
    if args.loss == "rm":
        return reward_model_loss(*r)
    n = args.num_policies or 2 * args.num_alternates or 1
    detached = args.expected_reward == "regress"
    a = advantage(r, e.detach() if detached else e, weighted_sum.detach() if detached else weighted_sum, k, n)
    loss = advantage_model_loss(*a, batch["margin"])
    if args.expected_reward == "regress":
        loss = loss + expected_reward_loss(e, *torch.where(k > 0, weighted_sum / k.clamp(min=1), r))
    return loss


# --- evaluation: the same lines stand in evaluate.py, and a test says so ----------------------------------------------


def expected_calibration_error(confidence, correct, num_bins=10):  # each (pairs,)
    """ECE in points: sum over bins of (share of pairs) x |accuracy - mean confidence|, times 100.

    The confidence of a pair is s(|difference of scores|), in [0.5, 1], cut into `num_bins` bins of equal width, the
    right edge included. `correct` is 1, 0 or, for equal scores, 0.5; or a true probability in place of the label.
    """
    index = np.digitize(confidence, np.linspace(0.5, 1, num_bins + 1)[1:-1], right=True)
    count = np.bincount(index, minlength=num_bins)
    gap = np.bincount(index, correct, num_bins) - np.bincount(index, confidence, num_bins)
    return 100 * np.abs(gap).sum() / count.sum()


def ranking_metrics(chosen, rejected):  # each (pairs,): scores
    """Accuracy and ECE in points, Brier and NLL (nats) of p(chosen preferred) = s(score_c - score_r); p. 6, Table 1."""
    delta = np.asarray(chosen, dtype=np.float64) - np.asarray(rejected, dtype=np.float64)
    correct = np.where(delta == 0, 0.5, delta > 0)
    return {
        "accuracy": 100 * correct.mean(),
        "ece": expected_calibration_error(1 / (1 + np.exp(-np.abs(delta))), correct),
        "brier": ((1 - 1 / (1 + np.exp(-delta))) ** 2).mean(),
        "nll": np.logaddexp(0, -delta).mean(),
    }


def score_balance(scores, tasks):  # (texts,), (texts,)
    """Mean and std of the scores of each task, and how far they spread over the tasks (Fig. 4a, 4b)."""
    scores, tasks = np.asarray(scores), np.asarray(tasks)
    per_task = {
        str(t): {"mean": scores[tasks == t].mean(), "std": scores[tasks == t].std(), "count": int((tasks == t).sum())}
        for t in sorted(set(tasks))
    }
    return per_task, {
        "spread_of_means": np.std([v["mean"] for v in per_task.values()]),
        "spread_of_stds": np.std([v["std"] for v in per_task.values()]),
        "mean_within_std": np.mean([v["std"] for v in per_task.values()]),
    }


# --- data and evaluation ----------------------------------------------------------------------------------------------


def encode_pairs(name, rows, tokenizer, encoder, args):
    """Rows of a preference file -> texts, each distinct one once: [(ids, prompt_len)], and pairs of indices into them.

    A pair is {chosen, rejected, row, alternates}; alternates holds, for each side, the (text, weight) of Eq. 8's sum.
    """
    texts, index, pairs, cut = [], {}, [], 0
    for i, row in enumerate(rows, 1):
        pair = {"row": row, "alternates": ([], [])}
        for side in ("chosen", "rejected"):
            key = str(row["prompt"]), row[side]
            if key not in index:
                where = f"{name}, line {row.get('file_line', i)}"
                ids, prompt_len, dropped = encode_pair(
                    tokenizer, row["prompt"], row[side], args.max_length, args.truncate_prompts, where, encoder
                )
                index[key] = len(texts)
                texts.append((ids, prompt_len))
                cut += dropped > 0
            pair[side] = index[key]
        pairs.append(pair)
    if cut:
        print(f"{name}: {cut} of {len(texts)} texts shortened to --max_length {args.max_length}")
    return texts, pairs


def add_alternates(name, texts, pairs, args):
    """Fill in the (text, weight) of Eq. 8's sum: two readings of its y. Returns, for the log, the plain weight of every text.

    drawn: y_k ~ pi'_k, one response to x of each of (at most) K policies; its weight: pi_phi / the policy it is from.
           Of several by one policy a hash picks, and not their rank, or the sum would favour chosen ones.
    own:   y_k = y; the weights: pi_phi / each of K policies, `logprobs_*` {policy: log-prob}, or that of `logprob_*`.
    """
    drawn, plain = {}, {}
    for i, pair in enumerate(pairs, 1):
        for s, side in enumerate(("chosen", "rejected")):
            row, text = pair["row"], pair[side]
            fields = (f"logprob_{side}", f"current_logprob_{side}", *([f"policy_{side}"] * (args.eq8_y == "drawn")))
            if missing := [f for f in fields if f not in row]:
                where = f"{name}, line {row.get('file_line', i)}: field '{missing[0]}' is missing, --num_alternates needs it"
                raise InputError(f"{where}; tools/write_logprobs.py adds the log-probs")
            behaviour = {row.get(f"policy_{side}"): row[f"logprob_{side}"]}
            if args.eq8_y == "own" and f"logprobs_{side}" in row:
                behaviour = dict(sorted(row[f"logprobs_{side}"].items())[: args.num_alternates])
            ratio = torch.tensor(row[f"current_logprob_{side}"]), torch.tensor([*behaviour.values()])
            ids, prompt_len = texts[text]
            w = importance_weights(*ratio, len(ids) - prompt_len, args.importance, args.importance_clip).tolist()
            finite = (ratio[0] - ratio[1]).double().clamp(-300, 300).exp().tolist()
            plain |= {(text, policy): one for policy, one in zip(behaviour, finite, strict=True)}
            if args.eq8_y == "own":
                pair["alternates"][s].extend((text, one) for one in w)
            else:
                of_prompt = drawn.setdefault(str(row["prompt"]), {})
                new = zlib.crc32(str(ids).encode()), text, w[0]
                of_prompt[row["policy_" + side]] = min(new, of_prompt.get(row["policy_" + side], new))
    for pair in pairs if args.eq8_y == "drawn" else ():
        of_prompt = drawn[str(pair["row"]["prompt"])]
        terms = [of_prompt[policy][1:] for policy in sorted(of_prompt)[: args.num_alternates]]
        pair["alternates"] = (terms, terms)
    return np.array([*plain.values()])


def load_margins(args, name, pairs):
    """m(x) of every pair: --am_margin itself, or the one that its file gives to the pair's task."""
    try:
        table = {"default": float(args.am_margin)}
    except ValueError:
        table = read_json(args.am_margin, "--am_margin")
    entries = table.items() if isinstance(table, dict) else [(args.am_margin, table)]
    if bad := [k for k, m in entries if not (type(m) in (int, float) and m > 0)]:
        raise InputError(f"--am_margin {args.am_margin}: '{bad[0]}' must be a positive number")
    for i, pair in enumerate(pairs, 1):
        task = pair["row"].get("task", "all")
        pair["margin"] = table.get(task, table.get("default"))
        if pair["margin"] is None:
            raise InputError(
                f"--am_margin {args.am_margin}: no '{task}' and no 'default' ({name}, line {pair['row'].get('file_line', i)})"
            )


def shuffled_batches(pairs, args, generator):
    """The batches of an epoch, lists of pairs; with --group_by_prompt a prompt's pairs follow one another."""
    order = torch.randperm(len(pairs), generator=generator).tolist()
    if args.group_by_prompt:
        place, rank = {}, {i: p for p, i in enumerate(order)}
        for i, pair in enumerate(pairs):
            place.setdefault(str(pair["row"]["prompt"]), rank[i])  # of its first pair, however many follow
        order.sort(key=lambda i: place[str(pairs[i]["row"]["prompt"])])
    return [
        [pairs[i] for i in order[k : k + args.global_batch_size]] for k in range(0, len(order), args.global_batch_size)
    ]


def score_pairs(scorer, tokenizer, texts, pairs, args):
    """Every text that the pairs need goes through the scorer once -> what scorer_loss takes.

    r (2, pairs): chosen, rejected; e (pairs,), read with the chosen text; margin (pairs,); weighted_sum and k of Eq. 8,
    each (2, pairs); the rows themselves.
    """
    sides = [[pair[side] for pair in pairs] for side in ("chosen", "rejected")]
    sums = [(s, p, t, w) for p, pair in enumerate(pairs) for s in (0, 1) for t, w in pair["alternates"][s]]
    needed = sorted({*sides[0], *sides[1], *(t for _, _, t, _ in sums)})
    place = {text: i for i, text in enumerate(needed)}
    r, e = score_batch(scorer, tokenizer, [texts[t] for t in needed], args.bf16)
    chosen, rejected = ([place[t] for t in side] for side in sides)
    weighted_sum = k = torch.zeros(2, len(pairs), device=r.device)
    if sums:
        s, p, t, w = zip(*sums, strict=True)
        at = torch.tensor(s, device=r.device), torch.tensor(p, device=r.device)
        terms = torch.tensor(w, device=r.device) * r[[place[i] for i in t]]
        weighted_sum = weighted_sum.index_put(at, terms, accumulate=True)
        k = k.index_put(at, torch.ones_like(terms), accumulate=True)
    margin, rows = torch.tensor([pair["margin"] for pair in pairs], device=r.device), [pair["row"] for pair in pairs]
    r = torch.stack([r[chosen], r[rejected]])
    return {"r": r, "e": e[chosen], "margin": margin, "weighted_sum": weighted_sum, "k": k, "rows": rows}


def evaluate(engine, tokenizer, texts, pairs, args):
    """Metrics of a(x, y) = r - e on pairs, the scores (pairs,) behind them; dropout off."""
    engine.module.eval()
    r, e = score_texts(engine, tokenizer, texts, args.per_device_eval_batch_size, args.bf16)
    engine.module.train()
    a = advantage(r, e)
    chosen, rejected = (a[[pair[side] for pair in pairs]] for side in ("chosen", "rejected"))
    tasks = [pair["row"].get("task", "all") for pair in pairs]
    per_task, balance = score_balance([*chosen, *rejected], tasks * 2)
    return {"metrics": ranking_metrics(chosen, rejected) | balance, "per_task": per_task}, (chosen, rejected)


def main(args: Args, scorer_loss=scorer_loss, prepare=lambda scorer, tokenizer, texts: None):
    """Returns the scores (pairs,), (pairs,) of the evaluation pairs' chosen and rejected texts, or None without any.

    baselines/reward_losses.py passes other losses and a preparation of the scorer; the rest is the same for all.
    """
    # --- set up -----------------------------------------------------------------------------------------------------
    if args.loss == "rm" and (args.expected_reward != "none" or args.num_alternates):
        raise InputError("--expected_reward, --num_alternates: belong to --loss am; Eq. 1 has neither")
    if args.num_policies and args.num_policies < max(1, args.num_alternates):
        raise InputError(f"--num_policies {args.num_policies}: N must be at least K, --num_alternates")
    if args.num_alternates and args.importance == "clip" and not args.importance_clip:
        raise InputError("--importance_clip 0: must be positive")
    fields = {"prompt": "prompt", "chosen": "response", "rejected": "response"}
    rows = load_rows(args.dataset_name, fields, args.max_rows)
    test_rows = load_rows(args.eval_dataset_name, fields) if args.eval_dataset_name else []
    torch.manual_seed(args.seed)
    tokenizer = load_tokenizer(args.model_name_or_path, dedicated_pad=True)
    scorer = Scorer.from_pretrained(
        args.model_name_or_path, tokenizer, trained=False, expected_reward_head=args.expected_reward != "none"
    )
    texts, train = encode_pairs(args.dataset_name, rows, tokenizer, scorer.is_encoder, args)
    load_margins(args, args.dataset_name, train)
    test_texts, test = encode_pairs(args.eval_dataset_name, test_rows, tokenizer, scorer.is_encoder, args)
    check_positions(scorer.model, max(len(ids) for ids, _ in texts + test_texts))
    prepare(scorer, tokenizer, texts + test_texts)
    steps = args.num_train_epochs * -(-len(train) // args.global_batch_size)
    schedule = warmup_cosine(steps, args.warmup_ratio, args.min_lr_ratio)
    engine = make_engine(args, scorer, args.learning_rate, schedule, args.weight_decay, args.max_grad_norm)
    saved = load_checkpoint(args.output_dir, args) if args.resume else None
    done = saved["step"] if saved else 0
    if saved:
        engine.load_state(saved["engine"])
    log = RunLog(args, [args.dataset_name, args.eval_dataset_name or ""], done)
    if args.num_alternates:
        w = add_alternates(args.dataset_name, texts, train, args)
        effective = w.sum() ** 2 / (w**2).sum() / len(w)  # Kish: the share of equal weights that would vary as little
        count, edges = np.histogram(np.log10(w.clip(1e-6, 1e6)), 24)
        report = {"weights": len(w), "mean": w.mean(), "effective_share": effective, "above_1": (w > 1).mean()}
        report |= {"above_clip": (w > args.importance_clip).mean(), "log10_edges": list(edges), "count": count.tolist()}
        write_json(log.folder / "importance_weights.json", report)
        print(f"importance weights before clipping: mean {w.mean():.3g}, effective sample {100 * effective:.1f} %")
    print(f"{args.loss}: {len(train)} pairs, {steps} steps" + (f", resumed after step {done}" if done else ""))

    # --- train ------------------------------------------------------------------------------------------------------
    scorer.train()
    order = torch.Generator().manual_seed(args.seed)
    step = 0
    progress = tqdm(total=steps, initial=done, desc=args.loss, disable=rank() > 0 or None)
    for _ in range(args.num_train_epochs):
        for batch in shuffled_batches(train, args, order):
            step += 1
            if step <= done:
                continue
            metrics = {"loss": 0.0, "accuracy": 0.0}
            size = args.per_device_train_batch_size
            for micro, weight in dealt([batch[k : k + size] for k in range(0, len(batch), size)]):
                share = weight * len(micro) / len(batch)  # micro-batches of a global batch may differ in size
                scores = score_pairs(engine, tokenizer, texts, micro, args)
                loss = scorer_loss(args, scores) * share
                check_finite("loss", loss.item(), step, log.folder, [pair["row"] for pair in micro])
                engine.backward(loss)
                metrics["loss"] += loss.item()
                metrics["accuracy"] += 100 * share * (scores["r"][0] > scores["r"][1]).float().mean().item()
            metrics = {name: total(value) for name, value in metrics.items()}
            metrics["lr"] = engine.scheduler.get_last_lr()[0]
            metrics["grad_norm"] = engine.step()
            check_finite("gradient norm", metrics["grad_norm"], step, log.folder, [pair["row"] for pair in batch])
            if test and args.eval_steps and step % args.eval_steps == 0 and step < steps:
                report, _ = evaluate(engine, tokenizer, test_texts, test, args)
                metrics |= {f"eval/{k}": v for k, v in report["metrics"].items()}
            log.write(step, metrics)
            if args.save_steps and step % args.save_steps == 0:
                save_checkpoint(log.folder, args, step, {"engine": engine})
            progress.update()
            progress.set_postfix(loss=f"{metrics['loss']:.3f}", accuracy=f"{metrics['accuracy']:.1f}")
    progress.close()

    # --- save, then evaluate ----------------------------------------------------------------------------------------
    save_model(engine, log.folder / "model", tokenizer)
    print(f"scorer written to {log.folder / 'model'}")
    if test:
        report, scores = evaluate(engine, tokenizer, test_texts, test, args)
        log.write(step, {f"eval/{k}": v for k, v in report["metrics"].items()})
        write_json(log.folder / "eval.json", report["metrics"] | {"per_task": report["per_task"]})
        print("  ".join(f"{k} {v:.4g}" for k, v in report["metrics"].items()))
        return scores


if __name__ == "__main__":
    run_cli(main, Args, __doc__)
