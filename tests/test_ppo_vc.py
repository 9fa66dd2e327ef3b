"""baselines/ppo_vc.py: the critic's returns are those of its own lambda, the policy's advantages are PPO's."""

from dataclasses import asdict

import pytest
import torch

from baselines import ppo_vc
from tests import test_ppo_sr as sr

words, policy, scorer, data = sr.words, sr.policy, sr.scorer, sr.data  # fixtures

pytestmark = pytest.mark.usefixtures("one_thread")


def args_for(policy, scorer, data, out, **changes):
    args = asdict(sr.args_for(policy, data, out, reward_model_path=scorer))
    return ppo_vc.Args(**args | {"critic_warmup_steps": 0} | changes)


def test_returns_at_lambda_1_are_what_was_received(policy, scorer, data, tmp_path, monkeypatch):
    seen, advantages = [], ppo_vc.VC.advantages
    monkeypatch.setattr(ppo_vc.VC, "advantages", lambda self, r: seen.append((r, advantages(self, r))) or seen[-1][1])
    ppo_vc.main(args_for(policy, scorer, data, tmp_path / "vc", gamma=0.9, lam=0.5))
    assert len(seen) == 2
    for rollout, experience in seen:
        for rewards, returns, mask in zip(experience.rewards, experience.returns, rollout.mask, strict=True):
            rest = 0.0
            for t in reversed(range(int(mask.sum()))):
                rest = rewards[t].item() + 0.9 * rest
                assert returns[t].item() == pytest.approx(rest, abs=1e-5)
            assert not returns[int(mask.sum()) :].any()
        assert experience.advantages[rollout.mask].std().item() == pytest.approx(1, abs=1e-4)  # whitened as ever


def test_with_the_policy_s_lambda_it_is_ppo(policy, scorer, data, tmp_path):
    ppo_vc.main(args_for(policy, scorer, data, tmp_path / "vc", critic_lam=0.95))
    sr.ppo_sr.main(sr.args_for(policy, data, tmp_path / "plain", reward_model_path=scorer))
    assert sr.same_run(tmp_path / "vc", tmp_path / "plain") == (True, True, True)
    ppo_vc.main(args_for(policy, scorer, data, tmp_path / "other"))
    assert not torch.equal(*(sr.weights_of(tmp_path / k)["transformer.wte.weight"] for k in ("vc", "other")))
