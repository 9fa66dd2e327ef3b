"""§3.2's other view of rehearsal: "amplifying the weight of the KL-divergence term in PPO training
(Eq. 2) for crucial instances". The paper gives no formula (C18); ours is

    beta(x) = rehearsal_kl_weight x beta    for the prompts x of D_R
    beta(x) = beta                          for all others

    python -m baselines.ppo_kl_weight --rehearsal_dataset_name runs/select/rehearsal.jsonl \\
        --rehearsal_coef 0 ...                                          flags of ppo_sr.py

Eq. 9 asks for the old answers to prompts of D_R, this only for answers that pi_init could give.
"""

from dataclasses import dataclass

import torch

import ppo_sr
from utils import DEVICE, InputError, Weight, load_rows, run_cli


@dataclass
class Args(ppo_sr.Args):
    rehearsal_kl_weight: Weight = 4.0
    """factor on beta for prompts of D_R (our choice C18; alone with --rehearsal_coef 0)"""


class KLWeight(ppo_sr.PPO):
    def __init__(self, args):
        name = args.rehearsal_dataset_name
        if not name:
            raise InputError("--rehearsal_kl_weight: needs --rehearsal_dataset_name")
        self.crucial = {str(row["prompt"]) for row in load_rows(name, {"prompt": "prompt"})}
        super().__init__(args)
        if not args.rehearsal_coef:
            self.rehearsal = []  # no pass over rows that weigh nothing
        if not any(str(row["prompt"]) in self.crucial for row in self.rows):
            problem = f"no prompt of --dataset_name is in {name}"
            raise InputError(f"--rehearsal_kl_weight: {problem}")

    def kl_coef(self, rows):
        """beta of Eq. 2 for each of these prompts, (batch, 1)."""
        args = self.args
        crucial = [str(row["prompt"]) in self.crucial for row in rows]
        weights = [args.rehearsal_kl_weight if inside else 1.0 for inside in crucial]
        return args.kl_coef * torch.tensor(weights, device=DEVICE)[:, None]


def main(args: Args):
    ppo_sr.main(args, KLWeight)


if __name__ == "__main__":
    run_cli(main, Args, __doc__)
