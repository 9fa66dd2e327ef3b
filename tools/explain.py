"""The first responses of a run of ppo_sr.py, token by token: nothing is learned.

    python -m tools.explain FLAGS

The flags are those of ppo_sr.py.
"""

import itertools
import unicodedata

import torch

import ppo_sr
from utils import run_cli


def first_batch(ppo, rows=3):
    """explain() of the first responses of a PPO."""
    batch = itertools.islice(ppo.start_at(0), rows)
    of_batch, prompts = zip(*batch, strict=True)
    sequences = list(zip(prompts, ppo.sample(prompts), strict=True))
    rollout = ppo.score(of_batch, sequences)
    return explain(ppo.args, ppo.tokenizer, rollout, ppo.advantages(rollout), rows)


def explain(args, tokenizer, rollout, experience, rows=3):
    """The first rows with each term of Eq. 2 and GAE, and the identities that the batch must meet.

    args: gamma, lam; rollout: sequences, mask, logprobs, ref_logprobs, values; experience: scores
    (batch,), kl_coef, rewards, advantages, returns; matrices (batch, response_len). The text has
    120 columns.
    """
    mask, values = rollout.mask, rollout.values * rollout.mask
    kl_terms = -experience.kl_coef * (rollout.logprobs - rollout.ref_logprobs) * mask
    advantages = experience.returns - values  # those of the experience may be whitened
    is_last = mask & (mask.cumsum(1) == mask.sum(1, keepdim=True))
    columns = [  # two lines of head, (batch, response_len)
        ("log pi", "", rollout.logprobs),
        ("log init", "", rollout.ref_logprobs),
        ("KL term", "[Eq. 2]", kl_terms),
        ("score", "[Eq. 2]", torch.where(is_last, experience.scores[:, None], 0.0)),
        ("reward", "[Eq. 2]", experience.rewards),
        ("V_t", "", rollout.values),
        ("A_t", "GAE", advantages),
        ("A used", "whitened", experience.advantages),
        ("return", "A_t + V_t", experience.returns),
    ]
    out = []
    for i, (x, y) in enumerate(rollout.sequences[:rows]):
        out.append(f"row {i}, prompt of {len(x)} tokens: {cell(tokenizer.decode(x), 80)}".rstrip())
        for line, words in enumerate((("index", "token", "mask"), ("", "", ""))):
            heads = "".join(f"{column[line]:>10}" for column in columns)
            out.append("{:>5} {:18} {:>4}".format(*words) + heads)
        last = cell(tokenizer.decode(x[-1:]), 18)
        out.append(f"{len(x) - 1:5} {last}    0  (log pi, log init, V_t of the next token)")
        for t in range(min(len(y) + 1, mask.shape[1])):  # and a column of padding, where all is 0
            token = cell(tokenizer.decode(y[t : t + 1]), 18) if t < len(y) else f"{'(padding)':18}"
            numbers = "".join(f"{of[i, t].item():z10.4f}" for *_, of in columns)
            out.append(f"{len(x) + t:5} {token} {int(mask[i, t]):4}{numbers}")
        sums = "".join(f"{of[i].sum().item():z10.4f}" for *_, of in columns[2:5])
        out.append(f"{'':5} {'sum':18} {len(y):4}{'':20}{sums}\n")
    total = experience.scores + kl_terms.sum(1)
    sum_error = (experience.rewards.sum(1) - total).abs().max()
    # V and A of t + 1, 0 after the last token
    later = torch.nn.functional.pad(torch.stack([values, advantages]), (0, 1))[..., 1:]
    gae = experience.rewards + args.gamma * later[0] - values + args.gamma * args.lam * later[1]
    gae_error, used = (advantages - gae)[mask].abs().max(), experience.advantages[mask]
    out.append(
        f"all {len(used)} tokens: sum of rewards = s - beta KL to {sum_error:.0e}; "
        "A_t = return - V_t = reward_t + gamma V_t+1 - V_t\n"
        f"+ gamma lam A_t+1 to {gae_error:.0e}; A used has mean {used.mean().item():z.4f}, "
        f"std {used.std():.4f} (whitened: 0, 1)"
    )
    return "\n".join(out)


def cell(text, width):
    """Text with its control characters escaped, cut or filled to `width` columns of a terminal."""
    shown, used = "", 0
    for char in repr(text):
        wide = unicodedata.east_asian_width(char) in "WF"
        columns = 0 if unicodedata.combining(char) else 1 + wide
        if used + columns > width - 1:
            return shown + "…" + " " * (width - 1 - used)
        shown, used = shown + char, used + columns
    return shown + " " * (width - used)


def main(args: ppo_sr.Args):
    ppo_sr.check(args)
    ppo = ppo_sr.PPO(args)
    torch.manual_seed(args.seed)
    print(first_batch(ppo))


if __name__ == "__main__":
    run_cli(main, ppo_sr.Args, __doc__)
