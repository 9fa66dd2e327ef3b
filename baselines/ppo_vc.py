"""VC-PPO (Yuan et al. 2025): a critic that is trained first, and has a lambda of its own.

    GAE's lambda      policy: --lam, as ever      critic: --critic_lam 1
    critic first      --critic_warmup_steps

The policy's lambda trades variance for the critic's bias. The critic's own target needs no such
trade: at 1 its return is what was really received until the end of the response, so that the
reward at the last token reaches the first one undiminished.

    python -m baselines.ppo_vc --critic_warmup_steps 10 ...                flags of ppo_sr.py

The paper's third part, a lambda that depends on the response's length, is for long reasoning, and
left out.
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
