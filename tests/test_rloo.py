"""baselines/rloo.py: advantages by hand, their gradients on average, what a step logs, resume."""

import itertools
from dataclasses import asdict

import pytest
import torch
from torch import tensor

from baselines import rloo
from baselines.rloo import group_mean, group_standardized, leave_one_out, pair_policy_loss
from ppo_sr import whiten
from tests import test_ppo_sr as sr
from tests.test_data import refused

words, policy, scorer, data = sr.words, sr.policy, sr.scorer, sr.data  # fixtures

pytestmark = pytest.mark.usefixtures("one_thread")

METHODS = ("rloo", "grpo", "reinforce++", "p3o")


def args_for(policy, scorer, data, out, **changes):
    args = asdict(sr.args_for(policy, data, out, reward_model_path=scorer))
    args |= {k: v.default for k, v in rloo.Args.__dataclass_fields__.items() if k in SUPPRESSED}
    return rloo.Args(**args | {"group_size": 2, "whiten_advantages": False} | changes)


SUPPRESSED = ("critic_warmup_steps", "critic_learning_rate", "gamma", "lam", "cliprange_value")


# --- by hand ----------------------------------------------------------------------------------------------------------


def test_advantages_by_hand():
    """1, 2, 6: the others' means are 4, 3.5, 1.5; the mean is 3, and the unbiased std sqrt(7)."""
    rewards = tensor([[1.0, 2.0, 6.0], [5.0, 5.0, 5.0]])
    assert leave_one_out(rewards).tolist() == [[-3.0, -1.5, 4.5], [0.0, 0.0, 0.0]]
    assert group_mean(rewards).tolist() == [[-2.0, -1.0, 3.0], [0.0, 0.0, 0.0]]
    expected = [v / (7**0.5 + 1e-4) for v in (-2, -1, 3)]
    assert group_standardized(rewards)[0].tolist() == pytest.approx(expected)
    assert group_standardized(rewards)[1].tolist() == [0.0] * 3
    assert leave_one_out(tensor([[1.0, 4.0]])).tolist() == [[-3.0, 3.0]]  # P3O's differences


@pytest.mark.parametrize("advantage", [leave_one_out, group_mean, group_standardized])
def test_what_depends_on_the_prompt_alone_cancels(advantage):
    """r and a = r - e(x) of Eq. 8 give the same: a group has its own e(x), by sampling."""
    rewards = torch.randn(5, 4, dtype=torch.float64)
    expected_reward = torch.randn(5, 1, dtype=torch.float64)
    assert torch.allclose(advantage(rewards), advantage(rewards - expected_reward))
    of_prompt = torch.randn(5, 1)
    assert not torch.allclose(advantage(rewards), advantage(rewards * (2 + of_prompt)), atol=0.1) or (
        advantage is group_standardized  # it takes the scale away, too
    )


def test_leave_one_out_has_the_gradient_of_the_expected_reward():
    """Over all groups of 2 and of 3 responses of a vocabulary of 3: the baseline that has not seen y_i leaves the gradient
    of E r, the mean of all K gives (K - 1)/K of it."""
    logits = tensor([0.3, -1.0, 0.7], dtype=torch.float64, requires_grad=True)
    p, reward = logits.softmax(0), tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    [true] = torch.autograd.grad((p * reward).sum(), logits, retain_graph=True)
    for k in (2, 3):
        for advantage, share in ((leave_one_out, 1.0), (group_mean, (k - 1) / k)):
            objective = 0.0
            for group in itertools.product(range(3), repeat=k):
                of = list(group)
                a = advantage(reward[of][None])[0]
                objective = objective + p[of].prod().detach() * (a * p[of].log()).mean()
            [found] = torch.autograd.grad(objective, logits, retain_graph=True)
            assert found.tolist() == pytest.approx((share * true).tolist())


def test_the_loss_of_a_pair_by_hand():
    """Log-ratios .3 and .1: ratio e^.2 = 1.2214, above 1.2; A = (R_1 - R_2) / 2 = 1, then -1."""
    log_ratios = tensor([[0.3, 0.1], [0.3, 0.1], [0.0, 0.0]])
    advantages = tensor([[2.0, -2.0], [-2.0, 2.0], [3.0, -3.0]])
    loss = pair_policy_loss(log_ratios, advantages, 0.2).tolist()
    assert loss == pytest.approx([-1.2, 1.221403, -1.5])


def test_the_gradient_of_a_pair_is_the_pairwise_policy_gradient():
    """-(R_1 - R_2)/2 grad log(pi(y_1) / pi(y_2)); at K = 2 that is RLOO's, a mean over both."""
    logprobs = tensor([[-1.0, -2.0]], requires_grad=True)
    rewards = tensor([[0.7, 0.2]])
    advantages = leave_one_out(rewards)
    of_pair = pair_policy_loss(logprobs - logprobs.detach(), advantages, 0.2).sum()
    of_rloo = -(advantages * (logprobs - logprobs.detach()).exp()).mean()
    for loss in (of_pair, of_rloo):
        [gradient] = torch.autograd.grad(loss, logprobs, retain_graph=True)
        assert gradient[0].tolist() == pytest.approx([-0.25, 0.25])


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def seen(monkeypatch):
    """What the steps of a run saw and made of it, and each update's rows."""
    found = {"steps": [], "updates": []}
    advantages, update = rloo.RLOO.advantages, rloo.RLOO.update

    def spying(self, rollout):
        found["steps"].append((rollout, advantages(self, rollout)))
        return found["steps"][-1][1]

    def updating(self, step, rollout, experience, mini_batch, log):
        metrics = update(self, step, rollout, experience, mini_batch, log)
        found["updates"].append((step, mini_batch, metrics))
        return metrics

    monkeypatch.setattr(rloo.RLOO, "advantages", spying)
    monkeypatch.setattr(rloo.RLOO, "update", updating)
    return found


@pytest.mark.parametrize("method", METHODS)
def test_a_run_by_plain_loops(method, policy, scorer, data, tmp_path, seen):
    """Two steps of one update each, in which every ratio is 1: the losses follow from what was sampled."""
    one = dict(method=method, num_mini_batches=1, num_ppo_epochs=1, kl_coef=0.5, learning_rate=1e-3)
    rloo.main(args_for(policy, scorer, data, tmp_path, **one))
    assert len(seen["updates"]) == len(seen["steps"]) == 2
    for (rollout, experience), (_, rows, metrics) in zip(seen["steps"], seen["updates"], strict=True):
        prompts = [row["prompt"] for row in rollout.rows]
        assert prompts[::2] == prompts[1::2] and sorted(rows) == list(range(len(prompts)))
        log_ratio = (rollout.logprobs - rollout.ref_logprobs).double()
        scores = rollout.raw_scores.double()
        if method in ("rloo", "p3o"):
            scores = scores - 0.5 * log_ratio.sum(1)
        expected = torch.zeros_like(log_ratio)
        for i in range(0, len(prompts), 2):
            a, b = scores[i], scores[i + 1]
            if method in ("rloo", "p3o"):
                pair = a - b, b - a
            else:
                pair = (a - b) / 2, (b - a) / 2
            if method == "grpo":  # the unbiased std of two numbers is their distance / sqrt 2
                pair = [half / ((a - b).abs() / 2**0.5 + 1e-4) for half in pair]
            expected[i], expected[i + 1] = pair
        expected = expected * rollout.mask
        if method == "reinforce++":
            expected = whiten(expected, rollout.mask)
        assert torch.allclose(experience.advantages.double(), expected, atol=1e-5)
        loss = -expected[rollout.mask].mean()
        if method == "p3o":
            loss = -sum(expected[i, 0] / 2 for i in range(0, len(prompts), 2)) / (len(prompts) / 2)
        assert metrics["loss/policy_avg"] == pytest.approx(loss.item(), abs=1e-5)
        kl = {"grpo": (-log_ratio).exp() - 1 + log_ratio, "reinforce++": 0.5 * log_ratio**2}
        kl_loss = 0.5 * kl[method][rollout.mask].mean().item() if method in kl else 0.0
        assert metrics["loss/kl_avg"] == pytest.approx(kl_loss, abs=1e-6)
        assert metrics["val/ratio"] == pytest.approx(1, abs=1e-4)
    assert method in ("rloo", "p3o") or kl_loss > 0  # pi has left pi_init by step 2
    assert {row["val/explained_variance"] for row in sr.lines_of(tmp_path / "metrics.jsonl")[1:]} == {0.0}


@pytest.mark.parametrize("method", METHODS)
def test_a_group_is_not_split_and_batches_that_fit_change_nothing(method, policy, scorer, data, tmp_path, seen):
    """Rehearsal rows, which are longer than the responses, come along."""
    for size in (1, 16):
        flags = dict(method=method, num_mini_batches=2, global_batch_size=8, per_device_train_batch_size=size)
        flags["rehearsal_dataset_name"] = data["rehearsal"]
        rloo.main(args_for(policy, scorer, data, tmp_path / str(size), **flags))
    for _, rows, _ in seen["updates"]:
        assert [i + 1 for i in rows[::2]] == rows[1::2] and all(i % 2 == 0 for i in rows[::2])
    one, other = (sr.lines_of(tmp_path / str(size) / "metrics.jsonl") for size in (1, 16))
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        assert {k: a[k] for k in a if k != "seconds"} == pytest.approx({k: b[k] for k in a if k != "seconds"}, abs=2e-4)
    assert "loss/rehearsal_nll" in one[-1]


def test_resume(policy, scorer, data, tmp_path):
    whole = args_for(policy, scorer, data, tmp_path / "whole", total_steps=3, eval_steps=1)
    rloo.main(whole)
    rloo.main(args_for(policy, scorer, data, tmp_path / "cut", total_steps=2, save_steps=2, eval_steps=1))
    rloo.main(args_for(policy, scorer, data, tmp_path / "cut", total_steps=3, save_steps=2, eval_steps=1, resume=True))
    assert sr.same_run(tmp_path / "whole", tmp_path / "cut") == (True, True, True)


def test_p3o_s_dials_are_of_the_pairs_ratios(policy, scorer, data, tmp_path, seen, monkeypatch):
    """They are what is clipped: a pair's ratio may be far off while its tokens' are not."""
    ratios, loss = [], rloo.pair_policy_loss

    def look(log_ratios, *rest):
        ratios.append((log_ratios[:, 0] - log_ratios[:, 1]).exp().detach())
        return loss(log_ratios, *rest)

    monkeypatch.setattr(rloo, "pair_policy_loss", look)
    flags = dict(method="p3o", num_mini_batches=1, num_ppo_epochs=2, learning_rate=1e-3, total_steps=1)
    rloo.main(args_for(policy, scorer, data, tmp_path, per_device_train_batch_size=64, **flags))
    assert len(seen["updates"]) == 2
    for ratio, (*_, metrics) in zip(torch.cat(ratios).chunk(2), seen["updates"], strict=True):  # as many pairs in each
        assert metrics["val/ratio"] == pytest.approx(ratio.mean().item(), rel=1e-5)
        assert metrics["policy/clipfrac_avg"] == pytest.approx(((ratio - 1).abs() > 0.2).float().mean().item())
    assert seen["updates"][1][2]["policy/clipfrac_avg"] > 0


def test_bad_flags(policy, scorer, data, tmp_path, capsys):
    with refused("--whiten_advantages", "p3o"):
        rloo.main(args_for(policy, scorer, data, tmp_path, method="p3o", whiten_advantages=True))
    with refused("--method p3o", "--group_size 2"):
        rloo.main(args_for(policy, scorer, data, tmp_path, method="p3o", group_size=4))
    with refused("--global_batch_size", "--group_size"):
        rloo.main(args_for(policy, scorer, data, tmp_path, group_size=4))
