"""baselines/ppo_rehearse_lost.py: D_R's rows by how far their log-prob has fallen."""

import math
from collections import Counter
from dataclasses import asdict

import pytest
import torch

from baselines import ppo_rehearse_lost
from baselines.ppo_rehearse_lost import RehearseLost, draw_shares
from tests import test_ppo_sr as sr
from tests.test_data import refused

words, policy, scorer, data = sr.words, sr.policy, sr.scorer, sr.data  # fixtures

pytestmark = pytest.mark.usefixtures("one_thread")


def args_for(policy, scorer, data, out, **changes):
    args = asdict(sr.args_for(policy, data, out, reward_model_path=scorer))
    return ppo_rehearse_lost.Args(**args | {"rehearsal_dataset_name": data["rehearsal"]} | changes)


def test_shares_by_hand():
    lost = torch.tensor([0.0, 0.1, 0.3, 0.0])
    assert draw_shares(lost, 0.0).tolist() == pytest.approx([0, 0.25, 0.75, 0])
    assert draw_shares(lost, 0.2).tolist() == pytest.approx([0.05, 0.25, 0.65, 0.05])
    assert draw_shares(lost, 1.0).tolist() == pytest.approx([0.25] * 4)
    assert draw_shares(torch.zeros(5), 0.1).tolist() == pytest.approx([0.2] * 5)  # step 1: pi = pi_init


def test_what_is_lost_is_the_fall_of_a_rows_log_prob(policy, scorer, data, tmp_path):
    """Against a plain loop over rows and tokens, after the policy's weights have moved."""
    ppo = RehearseLost(args_for(policy, scorer, data, tmp_path))
    assert ppo.mean_logprobs(ppo.policy).tolist() == ppo.initial.tolist()
    torch.manual_seed(3)
    with torch.no_grad():
        for p in ppo.policy.module.parameters():
            p.add_(0.05 * torch.randn_like(p))
    found = ppo.mean_logprobs(ppo.policy)
    for model, means in ((ppo.policy.module, found), (ppo.reference, ppo.initial)):
        for (x, y), mean in zip(ppo.rehearsal, means.tolist(), strict=True):
            with torch.no_grad():
                log_softmax = model(torch.tensor([x + y])).logits[0].log_softmax(-1)
            own = [log_softmax[len(x) + t - 1, token].item() for t, token in enumerate(y)]
            assert mean == pytest.approx(math.fsum(own) / len(y), abs=1e-4)
    assert (found - ppo.initial).abs().max() > 0.01


def test_rows_that_fell_are_rehearsed_and_others_are_not(policy, scorer, data, tmp_path, monkeypatch):
    """Log-probs that are made to fall for two rows alone: with u = 0 the updates see these and no other."""
    seen, rehearse = Counter(), ppo_rehearse_lost.ppo_sr.rehearse

    def spying(ppo):
        rows = list(ppo.rehearsal_rows)
        seen.update(tuple(x + y) for x, y in rows)
        ppo.rehearsal_rows = iter(rows)
        return rehearse(ppo)

    def fallen(self, model):
        means = torch.zeros(len(self.rehearsal))
        if model is self.policy:
            means[1], means[2], means[0] = -0.2, -0.6, 0.5
        return means

    monkeypatch.setattr(ppo_rehearse_lost.ppo_sr, "rehearse", spying)
    monkeypatch.setattr(RehearseLost, "mean_logprobs", fallen)
    args = args_for(policy, scorer, data, tmp_path, uniform_share=0.0, rehearsal_batch_size=2, total_steps=12)
    ppo_rehearse_lost.main(args)
    monkeypatch.undo()
    ppo = RehearseLost(args)
    one, two = (tuple(x + y) for x, y in ppo.rehearsal[1:3])
    assert set(seen) == {one, two} and seen[two] > 1.5 * seen[one]
    rows = sr.lines_of(tmp_path / "metrics.jsonl")
    assert all(row["rehearsal/lost"] == pytest.approx(0.8 / len(ppo.rehearsal)) for row in rows if row["step"])


def test_a_run_goes_on_to_the_same_numbers(policy, scorer, data, tmp_path):
    def run(name, steps, **flags):
        flags |= {"total_steps": steps, "save_steps": 2, "eval_steps": 2}
        ppo_rehearse_lost.main(args_for(policy, scorer, data, tmp_path / name, **flags))

    run("whole", 4)
    run("halves", 2)
    run("halves", 4, resume=True)
    assert sr.same_run(tmp_path / "whole", tmp_path / "halves") == (True, True, True)


def test_nothing_to_rehearse_is_refused(policy, scorer, data, tmp_path):
    for changes in ({"rehearsal_dataset_name": None}, {"rehearsal_coef": 0.0}):
        with refused("--rehearsal_dataset_name", "--rehearsal_coef"):
            ppo_rehearse_lost.main(args_for(policy, scorer, data, tmp_path, **changes))
