"""The mean of a trained policy's weights and those it started from: a rival without training.

    theta = w theta_policy + (1 - w) theta_init      WiSE-FT (Wortsman et al., 2022);
                                                     for RLHF: Lin et al. (2023)

    python -m baselines.average_weights --model_name_or_path runs/ppo/model \\
        --init_model runs/sft/model --weight 0.5 --output_dir runs/average/model
    python evaluate.py winrate --policy runs/average/model --reference runs/sft/model ...

w = 1 is the policy, w = 0 the initial model; between them reward is traded for what is kept, so
judge the curve over w and not one point. The policy must have been trained from --init_model: the
mean of two unrelated models is none.
"""

from dataclasses import dataclass

import torch

from utils import InputError, Share, load_policy, load_tokenizer, run_cli

NOT_ARCHITECTURE = {"_name_or_path", "transformers_version", "dtype", "use_cache"}


@dataclass
class Args:
    model_name_or_path: str
    """the trained policy, a model folder written by ppo_sr.py"""
    init_model: str
    """the model that it was trained from, e.g. the SFT model"""
    output_dir: str
    """receives the averaged model (float32) and the policy's tokenizer"""
    weight: Share = 0.5
    """w, the policy's share, in [0, 1]"""


@torch.no_grad()
def average(policy, init, weight):
    """theta = w theta_policy + (1 - w) theta_init, in place in `policy`; buffers are the policy's.

    named_parameters() gives a tied weight once: state_dict() would give it under both names, and
    average it twice.
    """
    of = dict(init.named_parameters())
    for name, parameter in policy.named_parameters():
        parameter.mul_(weight).add_(of[name], alpha=1 - weight)
    return policy


def first_difference(policy, init):
    """'n_layer is 2 and 4' of two models whose weights have no mean, else None.

    The configurations are compared, since equal shapes are not enough: with another number of heads
    they are the same.
    """
    a, b = (model.config.to_dict() for model in (policy, init))
    for key in sorted((a.keys() | b.keys()) - NOT_ARCHITECTURE):
        if a.get(key) != b.get(key):
            return f"{key} is {a.get(key)} and {b.get(key)}"


def main(args: Args):
    if not 0 <= args.weight <= 1:
        wanted = "must lie between 0 (the initial model) and 1 (the policy)"
        raise InputError(f"--weight {args.weight}: {wanted}")
    policy, init = load_policy(args.model_name_or_path), load_policy(args.init_model)
    tokenizer = load_tokenizer(args.model_name_or_path)
    difference = first_difference(policy, init)
    if not difference and tokenizer.get_vocab() != load_tokenizer(args.init_model).get_vocab():
        difference = "their tokenizers differ"
    if difference:
        problem = f"is no start of {args.model_name_or_path} ({difference})"
        raise InputError(f"--init_model {args.init_model}: {problem}")
    average(policy, init, args.weight).save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    weights = f"{args.weight:g} policy + {1 - args.weight:g} initial model"
    print(f"{weights}, written to {args.output_dir}")


if __name__ == "__main__":
    run_cli(main, Args, __doc__)
