"""baselines/ppo_kl_weight.py: beta for each prompt."""

from dataclasses import asdict

import shutil
import pytest
import torch

from baselines import ppo_kl_weight
from ppo_sr import PPO
from tests import test_ppo_sr as sr
from tests.test_data import refused

words, policy, scorer, data = sr.words, sr.policy, sr.scorer, sr.data  # fixtures

pytestmark = pytest.mark.usefixtures("one_thread")


def args_for(policy, scorer, data, out, **changes):
    args = asdict(sr.args_for(policy, data, out, reward_model_path=scorer))
    return ppo_kl_weight.Args(**args | {"rehearsal_dataset_name": data["rehearsal"]} | changes)


def test_beta_of_a_prompt_in_the_rehearsal_set(policy, scorer, data, tmp_path, monkeypatch):
    """Eq. 2 with 4 beta for D_R's prompts, and beta for the others."""
    seen, advantages = [], PPO.advantages

    def spying(self, rollout):
        seen.append((rollout, advantages(self, rollout)))
        return seen[-1][1]

    monkeypatch.setattr(PPO, "advantages", spying)
    ppo_kl_weight.main(args_for(policy, scorer, data, tmp_path, rehearsal_kl_weight=4.0))
    crucial = {row["prompt"] for row in sr.lines_of(data["rehearsal"])}
    found = set()
    for rollout, experience in seen:
        inside = [row["prompt"] in crucial for row in rollout.rows]
        betas = torch.tensor([0.2 if crucial else 0.05 for crucial in inside])
        assert experience.kl_coef[:, 0].tolist() == pytest.approx(betas.tolist())
        kl = (rollout.logprobs - rollout.ref_logprobs).sum(1)
        paid = experience.scores - betas * kl
        assert experience.rewards.sum(1).tolist() == pytest.approx(paid.tolist(), abs=1e-5)
        found |= {*inside}
    assert found == {True, False} and len(seen) == 2


def test_a_weight_of_1_is_ppo_sr_and_rows_that_weigh_nothing_are_not_read(policy, scorer, data, tmp_path):
    for name, coef in (("with", 0.01), ("without", 0.0)):
        args = args_for(policy, scorer, data, tmp_path / name, rehearsal_kl_weight=1.0)
        args.rehearsal_coef = coef
        ppo_kl_weight.main(args)
        flags = {"rehearsal_dataset_name": data["rehearsal"]} if coef else {}
        plain = sr.args_for(policy, data, tmp_path / "plain", reward_model_path=scorer, **flags)
        sr.ppo_sr.main(plain)
        assert sr.same_run(tmp_path / name, tmp_path / "plain") == (True, True, True)
        shutil.rmtree(tmp_path / "plain")


def test_a_weight_that_weighs_nothing_is_refused(policy, scorer, data, tmp_path):
    with refused("--rehearsal_kl_weight", "--rehearsal_dataset_name"):
        args = args_for(policy, scorer, data, tmp_path, rehearsal_dataset_name=None)
        ppo_kl_weight.main(args)
    with refused("--rehearsal_kl_weight", data["rehearsal"]):
        other = {"dataset_name": data["forget"], "rehearsal_dataset_name": data["rehearsal"]}
        ppo_kl_weight.main(args_for(policy, scorer, data, tmp_path, **other))
