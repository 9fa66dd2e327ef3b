"""Log-probs of pairs under the policies that wrote them and the current one: weights of Eq. 8.

    w(x, y) = pi_phi(y | x) / pi'(y | x)    pi_phi: the current policy, pi': the one that wrote y

    python -m tools.write_logprobs --dataset_name pairs.jsonl --output_path pairs_logprobs.jsonl \\
        --current_policy runs/sft/model \\
        --policies sft@1=runs/sft/model sft@1.4=runs/sft/model@1.4

Rankings of K policies become such pairs by tools/convert_data.py. Every row keeps its fields and
gets, for its `chosen` and in the same way for its `rejected`:

    logprob_chosen           log pi'(y | x), pi' the policy that policy_chosen names; one that is
                             there is kept
    current_logprob_chosen   log pi_phi(y | x)
    logprobs_chosen          {name: log-prob} under every one of --policies

in nats, the sum over the response's tokens with the end-of-sequence token, at the policy's
temperature. Each policy reads the texts with its own tokenizer. A response that its policy never
ended (cut at a length limit) gets the log-prob of ending there, which is not how it was drawn:
leave such rows out where they are many.

Its last line says how unequal the weights are, before am_train.py --importance keeps them finite:
weights of which one is large and the others small are worth one response (docs/CHOICES.md, C2).
"""

import math
from dataclasses import dataclass

import numpy as np

from utils import InputError, check_fits, encode_pair, forward_batches, load_policy, load_rows
from utils import load_tokenizer, response_logprobs, run_cli, write_jsonl

SIDES = ("chosen", "rejected")


@dataclass
class Args:
    dataset_name: str
    """pairs: `prompt`, `chosen`, `rejected`, `policy_chosen`, `policy_rejected`"""
    output_path: str
    """the same rows with their log-probs, as .jsonl"""
    current_policy: str
    """pi_phi of Eq. 5 and 8: FOLDER or FOLDER@TEMPERATURE (default 1)"""
    policies: tuple[str, ...] = ()
    """the policies pi', each NAME=FOLDER or NAME=FOLDER@TEMPERATURE, NAME as in policy_chosen"""
    per_device_eval_batch_size: int = 32
    """texts per forward pass"""
    max_length: int = 512
    """tokens of prompt and response together; a longer text is refused: a part of it has another
    log-prob"""


def folder_and_temperature(spec, flag):
    """runs/sft/model@1.4 -> ("runs/sft/model", 1.4); the temperature is 1 where none is given."""
    folder, temperature = spec.rsplit("@", 1) if "@" in spec.rpartition("/")[2] else (spec, "1")
    try:
        if folder and 0 < float(temperature) < math.inf:
            return folder, float(temperature)
    except ValueError:
        pass
    raise InputError(f"{flag} {spec}: expected FOLDER or FOLDER@TEMPERATURE, a positive number")


def named_policies(flag, specs):
    """NAME=FOLDER[@T] … -> {name: (folder, temperature)}."""
    policies = {}
    for spec in specs:
        name, equals, rest = spec.partition("=")
        if not (name and equals) or name in policies:
            expected = "expected NAME=FOLDER or NAME=FOLDER@TEMPERATURE, each name once"
            raise InputError(f"{flag} {spec}: {expected}")
        policies[name] = folder_and_temperature(rest, flag)
    return policies


def sequence_logprobs(model, tokenizer, texts, temperature, batch_size):
    """log pi(y | x) = sum_t log pi(y_t | x, y_<t) of (ids, prompt_len) -> float64 (texts,)."""

    def log_prob(ids, mask, prompt_lens):
        logprobs = response_logprobs(model, ids, mask, prompt_lens, temperature)[0]
        return (logprobs.double().sum(1),)

    model.eval()
    sequences = [(ids[:n], ids[n:]) for ids, n in texts]
    return forward_batches(log_prob, sequences, tokenizer.pad_token_id, batch_size)[0].cpu().numpy()


def behaviour(row, side, where, policies):
    """The log-prob that the row gives, or else the name of the policy that wrote the text."""
    given, name = row.get(f"logprob_{side}"), row.get(f"policy_{side}")
    if given is not None:
        if type(given) not in (int, float) or not -math.inf < given <= 0:
            expected = f"must be a log-prob, a number of at most 0, found {given!r}"
            raise InputError(f"{where}: field 'logprob_{side}' {expected}")
        return float(given)
    if name is None:
        fields = f"fields 'policy_{side}' and 'logprob_{side}' are missing"
        raise InputError(f"{where}: {fields}; one says who wrote the text")
    if name not in policies:
        known = f"is not in --policies ({', '.join(policies) or 'none'}); add {name}=FOLDER"
        raise InputError(f"{where}: policy_{side} {name!r} {known}")
    return name


def load_and_encode(rows, folder, args):
    """A policy, its tokenizer, the distinct texts and {side: places of the rows' texts in them}."""
    model, tokenizer = load_policy(folder, frozen=True), load_tokenizer(folder)
    texts = {}  # (ids, prompt_len) -> its place in the list of distinct texts
    places = {side: [] for side in SIDES}
    for number, row in enumerate(rows, 1):
        for side in SIDES:
            where = f"{args.dataset_name}, line {number}"
            pair = row["prompt"], row[side]
            ids, prompt_len, _ = encode_pair(tokenizer, *pair, args.max_length, False, where)
            places[side].append(texts.setdefault((tuple(ids), prompt_len), len(texts)))
    check_fits(model, tokenizer, max(len(ids) for ids, _ in texts))
    return model, tokenizer, texts, places


def score_sides(rows, folder, temperature, args):
    """{side: log-probs of the rows' texts} under one policy; a distinct text is scored once."""
    model, tokenizer, texts, places = load_and_encode(rows, folder, args)
    size = args.per_device_eval_batch_size
    logprobs = sequence_logprobs(model, tokenizer, list(texts), temperature, size)
    print(f"{len(texts)} texts under {folder} at temperature {temperature:g}")
    return {side: logprobs[places[side]].tolist() for side in SIDES}


def report(rows):
    """Mean, Kish's effective share and shares above 1 and 2 of the weights of distinct texts."""
    log_ratios = {}  # of each text under the policy that wrote it
    for row in rows:
        for side in SIDES:
            text = str(row["prompt"]), row[side], row.get(f"policy_{side}")
            log_ratios[text] = row[f"current_logprob_{side}"] - row[f"logprob_{side}"]
    w = np.exp(np.clip([*log_ratios.values()], -300, 300))
    found = {"mean": w.mean(), "effective_share": w.sum() ** 2 / (w**2).sum() / len(w)}
    found |= {"above_1": (w > 1).mean(), "above_2": (w > 2).mean(), "weights": len(w)}
    shares = [f"{100 * found[name]:.1f} %" for name in ("effective_share", "above_1", "above_2")]
    worth = "mean {:.3g}, effective sample {}; {} above 1, {} above 2".format(w.mean(), *shares)
    print(f"{len(w)} weights: {worth}")
    return found


def main(args: Args):
    # 1 read, and refuse what cannot be scored before any model is loaded
    if not args.output_path.endswith(".jsonl"):
        raise InputError(f"--output_path {args.output_path}: must end in .jsonl")
    policies = named_policies("--policies", args.policies)
    current = folder_and_temperature(args.current_policy, "--current_policy")
    fields = {"prompt": "prompt", "chosen": "response", "rejected": "response"}
    rows, writers = load_rows(args.dataset_name, fields), []
    for number, row in enumerate(rows, 1):
        where = f"{args.dataset_name}, line {number}"
        writers.append({side: behaviour(row, side, where, policies) for side in SIDES})

    # 2 score: one pass for each folder and temperature
    different = dict.fromkeys([current, *policies.values()])
    folders = dict.fromkeys(folder for folder, _ in different)
    for folder in folders if len(folders) > 1 else ():  # none is refused after another's hours
        load_and_encode(rows, folder, args)
    scores = {policy: score_sides(rows, *policy, args) for policy in different}

    # 3 write
    for i, (row, writer) in enumerate(zip(rows, writers, strict=True)):
        for side in SIDES:
            under = {name: scores[policy][side][i] for name, policy in policies.items()}
            given = isinstance(writer[side], float)
            row[f"logprob_{side}"] = writer[side] if given else under[writer[side]]
            row[f"current_logprob_{side}"] = scores[current][side][i]
            row[f"logprobs_{side}"] = under
    write_jsonl(args.output_path, rows)
    print(f"{len(rows)} rows written to {args.output_path}")
    report(rows)


if __name__ == "__main__":
    run_cli(main, Args, __doc__)
