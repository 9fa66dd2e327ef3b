"""Direct preference optimisation: the policy learns from pairs, without a scorer and without PPO.

    h = beta [log(pi(y_c | x) / pi_init(y_c | x)) - log(pi(y_r | x) / pi_init(y_r | x))]

    for each batch of preference pairs (x, y_c, y_r) minimise the mean of
        dpo    -log s(h)                                      Rafailov et al. (2023), Eq. 7
        cdpo   -(1 - epsilon) log s(h) - epsilon log s(-h)    conservative DPO, Mitchell (2023)
        ipo    (h / beta - 1 / (2 beta))^2                    Azar et al. (2023), Eq. 17
        hinge  max(0, 1 - h)                                  RSO, Liu et al. (2023): hinge-norm
        cpl    -log s(alpha log pi(y_c | x) - lambda alpha log pi(y_r | x))
                                                              Hejna et al. (2023), discount 1

    python -m baselines.dpo --model_name_or_path runs/sft/model \\
        --dataset_name data/toy/preferences_train.jsonl --output_dir runs/dpo \\
        --learning_rate 1e-4 --beta 0.3 --warmup_steps 10 --per_device_train_batch_size 64 \\
        --eval_dataset_names data/toy/prompts_test_main.jsonl data/toy/prompts_test_forget.jsonl \\
        --gold_reward miniature.world:gold_reward --eval_steps 50 --max_eval_prompts 200 \\
        --response_length 24 --max_length 64 --per_device_eval_batch_size 256

log pi is the sum over a response's tokens, s the sigmoid. IPO sums, too, as its paper prints it.
TRL takes means over tokens: by its source, IPO's authors say that their results come from means.

beta log(pi / pi_init) is a reward that stands in the policy itself. --score_dataset_name writes it
for other pairs, and evaluate.py calibration reads that file in the place of a scorer:

    python evaluate.py calibration --scorers runs/dpo/scored.jsonl runs/rm/model ...

On the toy world this setting raises gold for all losses but CPL's (IPO: --beta 0.1). CPL left it
or lowered it at six settings tried on one seed.

Watch logps/chosen: the loss asks for a difference alone, and both sides may become less likely.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from baselines.measure import Measure, Training, sequence_logprobs
from utils import Count, InputError, LearningRate, Natural, Positive, Share, autocast, backend
from utils import check_fits, encode_rows, length_batches, load_policy, load_rows, load_tokenizer
from utils import pad_pairs, progress, response_logprobs, run_cli, run_log, write_jsonl

SIDES = ("chosen", "rejected")


@dataclass(kw_only=True)
class Args(Training):
    dataset_name: str
    """preference pairs: rows `prompt`, `chosen`, `rejected`"""
    loss: Literal["dpo", "cdpo", "ipo", "hinge", "cpl"] = "dpo"
    """the formulas above"""
    beta: Positive = 0.1
    """beta of DPO (its paper: 0.1), tau of IPO, gamma of RSO, alpha of CPL (its code: 0.1)"""
    label_smoothing: Share = 0.1
    """epsilon of cdpo: the share of pairs that are labelled the wrong way round"""
    cpl_lambda: Share = 0.5
    """lambda of cpl (its code: 0.5); below 1 likely responses have the lower loss"""
    score_dataset_name: str | None = None
    """pairs whose implicit rewards are written to scored.jsonl in the end"""
    learning_rate: LearningRate = 1e-6
    """of AdamW (DPO's paper: 1e-6, of RMSprop)"""
    warmup_steps: Natural = 150
    """steps with linear warm-up, then the rate stays (DPO's paper)"""
    num_train_epochs: Count = 1
    """passes over the pairs"""
    global_batch_size: Count = 64
    """pairs per optimiser step (DPO's paper)"""
    per_device_train_batch_size: Count = 2
    """pairs per forward pass; gradients add up over the global batch"""


# === The losses: pure functions of tensors (pairs,), one value a pair. ===


def implicit_rewards(logprobs, ref_logprobs, beta):
    """[DPO, §4]  r(x, y) = beta log(pi(y | x) / pi_init(y | x)), up to a number of x alone.

    For the policy that maximises r - beta KL this is the r that it maximises.
    """
    return beta * (logprobs - ref_logprobs)


def dpo_loss(h):
    """[DPO, Eq. 7]  -log s(h): Eq. 1 of a reward model, with the implicit reward."""
    return -F.logsigmoid(h)


def conservative_loss(h, epsilon):
    """[Mitchell]  a share epsilon of labels is wrong, so h is to end at log((1 - eps) / eps)."""
    return -(1 - epsilon) * F.logsigmoid(h) - epsilon * F.logsigmoid(-h)


def ipo_loss(h, beta):
    """[IPO, Eq. 17]  the difference of the log ratios is to end at 1 / (2 beta)."""
    return (h / beta - 1 / (2 * beta)).square()


def hinge_loss(h):
    """[RSO]  nothing more to gain from h = 1 on; SLiC's hinge, of log pi / pi_init."""
    return F.relu(1 - h)


def cpl_loss(logprob_chosen, logprob_rejected, alpha, cpl_lambda):
    """[CPL]  alpha log pi is the advantage of the best policy: there is no pi_init.

    A policy that moves both sides to what nobody wrote keeps the difference of log pi. With lambda
    below 1 it pays for that.
    """
    return -F.logsigmoid(alpha * (logprob_chosen - cpl_lambda * logprob_rejected))


def preference_losses(args, logprobs, ref_logprobs):
    """What --loss asks for, (pairs,), of log-probs, each (2, pairs): chosen and rejected."""
    if args.loss == "cpl":
        return cpl_loss(*logprobs, args.beta, args.cpl_lambda)
    chosen, rejected = implicit_rewards(logprobs, ref_logprobs, args.beta)
    h = chosen - rejected
    if args.loss == "cdpo":
        return conservative_loss(h, args.label_smoothing)
    if args.loss == "ipo":
        return ipo_loss(h, args.beta)
    return hinge_loss(h) if args.loss == "hinge" else dpo_loss(h)


# === end of the losses ===


def load_pairs(name, tokenizer, args, written=()):
    """Rows, and for each [(x, y_c), (x, y_r)] in ids."""
    fields = {"prompt": "prompt"} | dict.fromkeys(SIDES, "response")
    rows = load_rows(name, fields, written=written)
    texts = encode_rows(tokenizer, rows, SIDES, args, name)
    return rows, [[(ids[:n], ids[n:]) for ids, n in sides] for sides in texts]


def both_sides(pairs):
    """All chosen ones, then all rejected ones."""
    return [chosen for chosen, _ in pairs] + [rejected for _, rejected in pairs]


def logprobs_of(model, pairs, tokenizer, args):
    """log pi(y | x) of whole responses, without gradients, (2, pairs)."""
    return sequence_logprobs(model, both_sides(pairs), tokenizer, args).view(2, -1)


def reference_logprobs(reference, pairs, tokenizer, args):
    """Of pi_init, which CPL does without: then they are 0."""
    if args.loss == "cpl":
        return torch.zeros(2, len(pairs), device=reference.device)
    return logprobs_of(reference, pairs, tokenizer, args)


def batch_metrics(args, losses, logprobs, ref_logprobs):
    """Sums over these pairs, under TRL's names."""
    rewards = implicit_rewards(logprobs, ref_logprobs, args.beta)
    right = (rewards[0] > rewards[1]).float()
    metrics = {"loss": losses, "rewards/accuracies": right}
    metrics["rewards/margins"] = rewards[0] - rewards[1]
    for side, name in enumerate(SIDES):
        metrics |= {f"rewards/{name}": rewards[side], f"logps/{name}": logprobs[side]}
    return {name: values.detach().double().sum() for name, values in metrics.items()}


def main(args: Args):
    # --- set up -----------------------------------------------------------------------------------
    if args.label_smoothing >= 0.5:
        raise InputError("--label_smoothing: must be below 0.5, or the labels say nothing")
    tokenizer = load_tokenizer(args.model_name_or_path)
    rows, pairs = load_pairs(args.dataset_name, tokenizer, args)
    kept = [i for i, (chosen, rejected) in enumerate(pairs) if chosen != rejected]
    said = f"{args.dataset_name}: {len(pairs) - len(kept)} of {len(pairs)} pairs have equal sides"
    if not kept:
        raise InputError(said)
    if len(kept) < len(pairs):
        print(f"{said}, and are left out")
    rows, pairs = [rows[i] for i in kept], [pairs[i] for i in kept]
    scored, score_pairs = [], []
    if args.score_dataset_name:
        written = {f"{side}_score" for side in SIDES}
        scored, score_pairs = load_pairs(args.score_dataset_name, tokenizer, args, written)
    # a model loads without dropout: with it, the first h would not be 0
    policy = load_policy(args.model_name_or_path)
    check_fits(policy, tokenizer, args.max_length)
    steps = args.num_train_epochs * -(-len(pairs) // args.global_batch_size)
    torch.manual_seed(args.seed)

    def warmup(step):
        return min(1.0, (step + 1) / (args.warmup_steps + 1))

    engine = backend.engine(policy, args.learning_rate, warmup, max_grad_norm=args.max_grad_norm)
    reference = backend.reference(engine, args.model_name_or_path)
    measure = Measure(args, tokenizer, reference)
    log = run_log(args, engine=engine)
    print(f"{args.loss}: pairs {len(pairs)}, steps {steps}, done {log.step}")
    # pi_init does not change: one pass over the pairs serves all epochs
    ref_logprobs = reference_logprobs(reference, pairs, tokenizer, args)  # (2, pairs)
    if not log.saved:
        log.write(0, measure(engine, 0, log))

    # --- train ------------------------------------------------------------------------------------
    order = torch.Generator().manual_seed(args.seed)
    epochs = [torch.randperm(len(pairs), generator=order) for _ in range(args.num_train_epochs)]
    batches = [batch.tolist() for epoch in epochs for batch in epoch.split(args.global_batch_size)]
    lengths = [max(len(x + y) for x, y in sides) for sides in pairs]
    bar = progress(batches[log.step :], args.loss, log.step)  # skip what a stopped run did
    for step, batch in enumerate(bar, log.step + 1):
        sums = []
        size = args.per_device_train_batch_size
        for part in backend.deal(length_batches(lengths, size, batch)):
            texts = both_sides([pairs[i] for i in part])
            inputs = pad_pairs(texts, tokenizer.pad_token_id)
            with autocast(args.bf16):
                logprobs, _ = response_logprobs(engine, *inputs, args.temperature)
            logprobs = logprobs.sum(1).view(2, -1)  # (2, pairs of this part)
            of_part = args, logprobs, ref_logprobs[:, part]
            losses = preference_losses(*of_part)
            # this part's share of a mean over the pairs of the global batch
            engine.backward(losses.sum() / len(batch))
            found = batch_metrics(args, losses, *of_part[1:])
            sums.append(torch.stack([*found.values()]) / len(batch))
        metrics = dict(zip(found, backend.add_up(sums).tolist(), strict=True))
        metrics["lr"] = engine.scheduler.get_last_lr()[0]
        metrics["grad_norm"] = log.take_step(engine, "", step, [rows[i] for i in batch])
        if measure.due(step, steps):
            metrics |= measure(engine, step, log)
        log.write(step, metrics)
        if args.save_steps and step % args.save_steps == 0:
            log.save(step)
        shown = {k: f"{metrics[k]:.3g}" for k in ("loss", "rewards/accuracies", "logps/chosen")}
        bar.set_postfix(shown, refresh=False)

    # --- save, then score -------------------------------------------------------------------------
    log.finish("policy", engine, tokenizer)
    if scored:
        ref_logprobs = reference_logprobs(reference, score_pairs, tokenizer, args)
        logprobs = logprobs_of(engine, score_pairs, tokenizer, args)
        rewards = implicit_rewards(logprobs, ref_logprobs, args.beta).T.tolist()
        columns = [f"{side}_score" for side in SIDES]
        for row, scores in zip(scored, rewards, strict=True):
            row |= dict(zip(columns, scores, strict=True))
        write_jsonl(log.folder / "scored.jsonl", scored)
        print(f"{len(scored):,} pairs with scores written to {log.folder / 'scored.jsonl'}")


if __name__ == "__main__":
    run_cli(main, Args, __doc__)
