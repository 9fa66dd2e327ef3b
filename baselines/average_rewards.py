"""One scorer whose weights are the mean of several scorers' weights (WARM, Rame et al. 2024).

    theta = 1/M sum_i theta_i

    python -m baselines.average_rewards --output_dir runs/warm/model \\
        --reward_model_path runs/rm_1/model runs/rm_2/model runs/rm_3/model
    python ppo_sr.py --reward_model_path runs/warm/model ...

An ensemble (baselines/reward_ensemble.py) needs M forward passes a response, the mean needs one.
The scorers must have been trained from one model. am_train.py --seed draws another head for each
of them; WARM gives them one: train a scorer for some steps, and start the others from its folder.
"""

from dataclasses import dataclass
from types import SimpleNamespace

from baselines.average_weights import average, first_difference
from utils import InputError, load_scorer, load_tokenizer, run_cli, save_model


@dataclass
class Args:
    reward_model_path: tuple[str, ...]
    """the scorers, folders of am_train.py, all trained from one model"""
    output_dir: str
    """receives the scorer (float32) and the first one's tokenizer"""


def main(args: Args):
    first, *others = args.reward_model_path or [None]
    if not others:
        raise InputError("--reward_model_path: give two scorers or more")
    tokenizer = load_tokenizer(first, dedicated_pad=True)
    mean = load_scorer(first, tokenizer)
    for n, path in enumerate(others, 1):
        words = load_tokenizer(path, dedicated_pad=True)
        scorer = load_scorer(path, words)
        difference = first_difference(mean.model, scorer.model)
        if (mean.e_head is None) != (scorer.e_head is None):
            difference = "one of them has an e head"
        if not difference and tokenizer.get_vocab() != words.get_vocab():
            difference = "their tokenizers differ"
        if difference:
            problem = f"{first} and {path} have no mean ({difference})"
            raise InputError(f"--reward_model_path: {problem}")
        average(mean, scorer, n / (n + 1))  # the mean of n + 1, from that of n
    trained = {"args": {"bf16": mean.bf16}}  # the precision in which it is read
    save_model(SimpleNamespace(module=mean), args.output_dir, tokenizer, trained)
    print(f"mean of {len(others) + 1} scorers written to {args.output_dir}")


if __name__ == "__main__":
    run_cli(main, Args, __doc__)
