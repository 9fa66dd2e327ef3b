"""RRHF and PRO: learn from rankings of K answers, without a scorer and without PPO.

    p_i = log pi(y_i | x) / |y_i|               mean log-prob of a token of answer i
    r_i                                         how good it is, by the people who ranked it

    RRHF   sum over r_i < r_j of  max(0, p_i - p_j)
    PRO    sum over k of  -log( exp(p_k) / (exp(p_k) + sum over r_i < r_k of exp(p_i)) )
    both   + sft_coef x NLL of the best answer

RRHF moves a pair until its order is right, and then leaves it alone. PRO goes on: each answer in
turn has to be the likeliest of itself and those below it. Neither has a KL penalty. An order can
also be had by making every answer of the ranking unlikely, and then the policy writes others, which
nobody ranked; the NLL stands against this. On the toy world the NLL of the best answers alone does
as well as either loss: much of what these methods learn is best-of-K.

    python -m baselines.ranking --loss pro --model_name_or_path runs/sft/model \\
        --dataset_name data/toy/preferences_train.jsonl --output_dir runs/pro \\
        --learning_rate 3e-4 --sft_coef 1 --response_length 24 --max_length 64 \\
        --eval_dataset_names data/toy/prompts_test_main.jsonl data/toy/prompts_test_forget.jsonl \\
        --gold_reward miniature.world:gold_reward --max_eval_prompts 200 \\
        --per_device_train_batch_size 32 --per_device_eval_batch_size 256

RRHF: Yuan et al. 2023, arXiv 2304.05302. PRO: Song et al. 2023, arXiv 2306.17492.

The rows are am_train.py's pairs. Answers that pairs link are one ranking: a > b and b > c make a
ranking of three, c > d of the same prompt another one. r_i is the answer's share of wins, times
K - 1: of how many others it would win. A pair that was judged both ways is then a tie, as is a
cycle a > b > c > a, and no loss compares equals. Where pairs are missing the share is an estimate:
with a > b > c > d and no other pair, b and c are equal. Pairs that the ranking does not repeat are
counted in a line.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from baselines.measure import Measure, Training
from utils import Count, InputError, LearningRate, Natural, Weight, autocast, backend, check_fits
from utils import encode_sides, length_batches, load_policy, load_rows, load_tokenizer, pad
from utils import progress, response_logprobs, run_cli, run_log


@dataclass(kw_only=True)
class Args(Training):
    dataset_name: str
    """pairs of rankings: rows with `prompt`, `chosen` and `rejected`"""
    loss: Literal["rrhf", "pro"] = "rrhf"
    """how a ranking is learned"""
    sft_coef: Weight = 1.0
    """of the best answer's NLL (RRHF: 1, toy world: 10; beta of PRO: 0.05 (K - 1)^2)"""
    top_k: Natural = 0
    """PRO: only these best answers are each held against those below (0: all)"""
    temperatures: bool = False
    """PRO: hold an answer the harder against another, the further that one is below"""
    learning_rate: LearningRate = 1e-6
    """of AdamW, constant"""
    num_train_epochs: Count = 1
    """passes over the rankings"""
    global_batch_size: Count = 32
    """rankings per optimiser step"""
    per_device_train_batch_size: Count = 1
    """rankings per forward pass, with all their answers"""


# --- losses of one ranking ------------------------------------------------------------------------


def rrhf_loss(p, r):  # each (K,)
    """[RRHF, L_rank]  Every pair in the wrong order costs what separates it, any other nothing."""
    worse = r[:, None] < r  # (i, j)
    return (p[:, None] - p)[worse].clamp(min=0).sum()


def pro_loss(p, r, top_k=0, temperatures=False):  # each (K,)
    """[PRO, Eq. 5]  -log softmax of each answer k among itself and those that are worse.

    temperatures [PRO, §3.3]: p_i is multiplied by 1 / T_ki = r_k - r_i, p_k by the largest of them.
    """
    gap = r[:, None] - r  # (k, i)
    inverse = gap if temperatures else torch.ones_like(gap)
    below = (p * inverse).masked_fill(gap <= 0, -torch.inf)
    logits = torch.cat([(p * inverse.amax(1))[:, None], below], 1)  # (K, 1 + K): k, then the others
    better = (gap < 0).sum(1)  # than k
    return -logits.log_softmax(1)[better < (top_k or len(p)), 0].sum()


def best_nll(logprobs, r):  # each (K,)
    """[RRHF, L_ft]  -log pi(y | x) of the best answer, the mean if several are best."""
    return -logprobs[r == r.max()].mean()


def order_accuracy(p, r):  # each (K,)
    """Share of the pairs that p has in their order."""
    worse = r[:, None] < r
    return (p[:, None] < p)[worse].float().mean()


def ranking_loss(args, logprobs, lengths, r):  # each (K,)
    """The loss and what it consists of, for one ranking."""
    p = logprobs / lengths  # RRHF: p_i
    if args.loss == "rrhf":
        loss = rrhf_loss(p, r)
    else:
        loss = pro_loss(p, r, args.top_k, args.temperatures)
    nll = best_nll(logprobs, r)
    return torch.stack([loss + args.sft_coef * nll, loss, nll, order_accuracy(p, r)])


# --- rankings from pairs --------------------------------------------------------------------------


def rebuild_rankings(rows, name):
    """Rows {prompt, chosen, rejected} -> [{prompt, where, answers (K texts), r (K numbers)}]."""
    found = {}  # (prompt, answer) -> its ranking: {answer: [wins, pairs]}, one dict for all of them
    firsts, equal = {}, 0
    for number, row in enumerate(rows, 1):
        prompt, chosen, rejected = str(row["prompt"]), row["chosen"], row["rejected"]
        equal += chosen == rejected
        if chosen == rejected:
            continue
        firsts.setdefault(prompt, (row["prompt"], f"{name}, line {number}"))
        one = found.setdefault((prompt, chosen), {chosen: [0, 0]})
        other = found.setdefault((prompt, rejected), {rejected: [0, 0]})
        if one is not other:  # the pair links two rankings
            one |= other
            found |= {(prompt, answer): one for answer in other}
        for answer, won in ((chosen, 1), (rejected, 0)):
            one[answer][0] += won
            one[answer][1] += 1
    rankings, unordered, built = [], 0, {}
    for (prompt, _), counts in found.items():
        if id(counts) in built:
            continue
        r = [(len(counts) - 1) * wins / pairs for wins, pairs in counts.values()]
        built[id(counts)] = dict(zip(counts, r, strict=True))
        if len({*r}) == 1:
            unordered += 1
            continue
        row, where = firsts[prompt]
        rankings.append({"prompt": row, "where": where, "answers": [*counts], "r": r})
    if not rankings:
        raise InputError(f"{name}: no pair has two different sides that were not judged both ways")
    against = 0
    for row in rows:
        if row["chosen"] != row["rejected"]:
            of = built[id(found[str(row["prompt"]), row["chosen"]])]
            against += of[row["chosen"]] <= of[row["rejected"]]
    longest = max(len(ranking["r"]) for ranking in rankings)
    print(f"{name}: {len(rows)} pairs, {len(rankings)} rankings of up to {longest} answers")
    if equal or unordered or against:
        print(f"left out: {equal} pairs of equal sides, {unordered} rankings without an order")
        print(f"{against} pairs are ties or turned round in their ranking")
    return rankings


def encode_rankings(tokenizer, rankings, args):
    """Each ranking gets its `texts` [(ids, prompt_len)], K of them."""
    cut = 0
    for ranking in rankings:
        how = args.max_length, args.truncate_prompts, ranking["where"]
        sides = ranking["prompt"], ranking["answers"]
        ranking["texts"], dropped = encode_sides(tokenizer, *sides, *how)
        cut += dropped > 0
    if cut:
        print(f"{cut} of {len(rankings)} rankings shortened to {args.max_length} tokens")


def check(args):
    if args.loss == "rrhf" and (args.top_k or args.temperatures):
        raise InputError("--top_k, --temperatures: belong to --loss pro")


def main(args: Args):
    # --- set up -----------------------------------------------------------------------------------
    check(args)
    rows = load_rows(
        args.dataset_name, {"prompt": "prompt", "chosen": "response", "rejected": "response"}
    )
    tokenizer = load_tokenizer(args.model_name_or_path)
    rankings = rebuild_rankings(rows, args.dataset_name)
    encode_rankings(tokenizer, rankings, args)
    torch.manual_seed(args.seed)
    # models load without dropout: p of two answers must not differ by what it drops
    policy = load_policy(args.model_name_or_path)
    lengths = [max(len(ids) for ids, _ in ranking["texts"]) for ranking in rankings]
    check_fits(policy, tokenizer, max(args.max_length if args.eval_dataset_names else 0, *lengths))
    engine = backend.engine(policy, args.learning_rate, max_grad_norm=args.max_grad_norm)
    measure = Measure(args, tokenizer, backend.reference(engine, args.model_name_or_path))
    log = run_log(args, engine=engine)
    order = torch.Generator().manual_seed(args.seed)
    epochs = [torch.randperm(len(rankings), generator=order) for _ in range(args.num_train_epochs)]
    batches = [batch.tolist() for epoch in epochs for batch in epoch.split(args.global_batch_size)]
    if not log.saved:
        log.write(0, measure(engine, 0, log))

    # --- train ------------------------------------------------------------------------------------
    bar = progress(batches[log.step :], args.loss, log.step)  # skip what a stopped run did
    for step, batch in enumerate(bar, log.step + 1):
        sums = []
        for part in backend.deal(length_batches(lengths, args.per_device_train_batch_size, batch)):
            # the K answers of a ranking go through the model together
            texts = [text for i in part for text in rankings[i]["texts"]]
            ids, mask = pad([ids for ids, _ in texts], tokenizer.pad_token_id)
            prompt_lens = torch.tensor([n for _, n in texts], device=ids.device)
            with autocast(args.bf16):
                token_logprobs, response_mask = response_logprobs(
                    engine, ids, mask, prompt_lens, args.temperature
                )
            counts = [len(rankings[i]["r"]) for i in part]
            logprobs = token_logprobs.sum(1).split(counts)
            num_tokens = response_mask.sum(1).split(counts)
            r = [torch.tensor(rankings[i]["r"], device=ids.device) for i in part]
            each = [ranking_loss(args, *of) for of in zip(logprobs, num_tokens, r, strict=True)]
            # this part's share of a mean over the rankings of the global batch
            share = torch.stack(each).sum(0) / len(batch)
            engine.backward(share[0])
            sums.append(share.detach().double())
        names = "loss", f"loss/{args.loss}", "loss/nll", "order_accuracy"
        metrics = dict(zip(names, backend.add_up(sums).tolist(), strict=True))
        metrics["grad_norm"] = log.take_step(engine, "", step, [rankings[i] for i in batch])
        if measure.due(step, len(batches)):
            metrics |= measure(engine, step, log)
            bar.write(f"step {step}: " + "  ".join(f"{k} {v:.3g}" for k, v in metrics.items()))
        log.write(step, metrics)
        if args.save_steps and step % args.save_steps == 0:
            log.save(step)
        bar.set_postfix(loss=f"{metrics['loss']:.3f}", refresh=False)

    # --- save -------------------------------------------------------------------------------------
    log.finish("policy", engine, tokenizer)


if __name__ == "__main__":
    run_cli(main, Args, __doc__)
