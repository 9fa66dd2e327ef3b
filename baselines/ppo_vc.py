"""VC-PPO (Yuan et al. 2025): a critic that is trained first, and has a lambda of its own.

    GAE's lambda      policy: --lam, as ever      critic: --critic_lam 1
    critic first      --critic_warmup_steps

The policy's lambda trades variance for the critic's bias. The critic's own target needs no such
trade: at 1 its return is what was really received until the end of the response, so that the
reward at the last token reaches the first one undiminished.

    python -m baselines.ppo_vc --critic_warmup_steps 5 \\
        --model_name_or_path runs/sft/model --reward_model_path runs/rm/model \\
        --dataset_name data/toy/prompts_train.jsonl --output_dir runs/ppo_vc --total_steps 30 \\
        --learning_rate 5e-4 --critic_learning_rate 5e-4 --global_batch_size 128 \\
        --num_ppo_epochs 1 --num_mini_batches 2 --response_length 24 --max_length 64 \\
        --per_device_train_batch_size 64 --per_device_eval_batch_size 256

Other flags are ppo_sr.py's.
"""

from dataclasses import dataclass

import ppo_sr
from utils import Natural, Share, run_cli


@dataclass
class Args(ppo_sr.Args):
    critic_lam: Share = 1.0
    """GAE's lambda in the critic's returns"""
    critic_warmup_steps: Natural = 10
    """in these the critic learns alone (how long is our choice)"""


class VC(ppo_sr.PPO):
    def advantages(self, rollout):
        found, args = super().advantages(rollout), self.args
        seen = found.rewards, rollout.values, rollout.mask, args.gamma
        _, found.returns = ppo_sr.generalized_advantages(*seen, args.critic_lam)
        return found


def main(args: Args):
    ppo_sr.main(args, VC)


if __name__ == "__main__":
    run_cli(main, Args, __doc__)
