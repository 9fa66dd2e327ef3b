"""Every equation against numbers worked out by hand, which wrong formulas (the mutants) do not meet.

s is the sigmoid; a few of its values stand in almost every sum below:
    -log s(0) = log 2 = 0.693147      -log s(1) = log(1 + e^-1) = 0.313262      -log s(-1) = 0.313262 + 1 = 1.313262
    -log s(2) = log(1 + e^-2) = 0.126928     -log s(3) = log(1 + e^-3) = 0.048587     -log s(0.5) = 0.474077
"""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import am_train
import ppo_sr
from am_train import advantage, advantage_model_loss, expected_reward_loss, reward_model_loss, scorer_loss
from ppo_sr import MovingAverage, generalized_advantages, policy_loss, token_rewards, value_loss, whiten

ls = torch.nn.functional.logsigmoid


def near(value, expected, tolerance=2e-6):
    return torch.allclose(torch.as_tensor(value), torch.as_tensor(expected), rtol=0, atol=tolerance)


# --- Eq. 1 ------------------------------------------------------------------------------------------------------------

R_CHOSEN, R_REJECTED = torch.tensor([2.0, 1.0, 0.5]), torch.tensor([0.0, 2.0, 0.5])
# differences 2, -1, 0:  (0.126928 + 1.313262 + 0.693147) / 3 = 2.133337 / 3
EQ1 = 0.711112


def test_eq1_reward_model_loss():
    assert near(reward_model_loss(R_CHOSEN, R_REJECTED), EQ1)


@pytest.mark.parametrize(
    "mutant",
    [
        pytest.param(lambda c, r: ls(c - r).mean(), id="sign"),
        pytest.param(lambda c, r: -ls(r - c).mean(), id="swapped"),
        pytest.param(lambda c, r: -ls(c - r).sum(), id="sum instead of mean"),
        pytest.param(lambda c, r: -torch.log((c - r).abs().sigmoid()).mean(), id="absolute difference"),
    ],
)
def test_eq1_mutants_differ(mutant):
    assert not near(mutant(R_CHOSEN, R_REJECTED), EQ1, 0.01)


# --- Eq. 2 ------------------------------------------------------------------------------------------------------------

SCORES = torch.tensor([1.5, -1.0])
LOGPROBS = torch.tensor([[-1.0, -2.0, -0.5], [-3.0, -1.0, -7.0]])  # the last one of row 2 is padding
REF_LOGPROBS = torch.tensor([[-1.5, -1.0, -0.5], [-2.0, -4.0, -9.0]])
MASK = torch.tensor([[True, True, True], [True, True, False]])
# beta = 0.1.  Row 1, log ratios 0.5, -1, 0:     -0.05, +0.1, -0 + 1.5;  sum 1.55 = 1.5 - 0.1 * (-0.5)
#              Row 2, log ratios -1, 3, padding: +0.1, -0.3 - 1.0, 0;     sum -1.2 = -1 - 0.1 * 2
EQ2 = torch.tensor([[-0.05, 0.1, 1.5], [0.1, -1.3, 0.0]])


def test_eq2_token_rewards():
    rewards = token_rewards(SCORES, LOGPROBS, REF_LOGPROBS, MASK, 0.1)
    assert near(rewards, EQ2)
    assert near(rewards.sum(1), [1.55, -1.2])
    assert rewards[1, 2] == 0
    without = token_rewards(torch.zeros(2), LOGPROBS, REF_LOGPROBS, MASK, 0.1)
    assert (rewards - without).nonzero().tolist() == [[0, 2], [1, 1]]  # the score stands on the last response token


@pytest.mark.parametrize(
    "mutant",
    [
        pytest.param(lambda s, p, q, m: token_rewards(s, q, p, m, 0.1), id="sign of the KL term"),
        pytest.param(lambda s, p, q, m: token_rewards(s, p, q, m, 0.1 / p.shape[1]), id="mean over tokens"),
        pytest.param(lambda s, p, q, m: token_rewards(s, p, q, torch.ones_like(m), 0.1), id="forgotten mask"),
        pytest.param(lambda s, p, q, m: -0.1 * (p - q) * m + s[:, None] * m, id="score on every token"),
        pytest.param(lambda s, p, q, m: -0.1 * (p.exp() - q.exp()) * m, id="no score"),
    ],
)
def test_eq2_mutants_differ(mutant):
    assert not near(mutant(SCORES, LOGPROBS, REF_LOGPROBS, MASK), EQ2, 0.01)


# --- Eq. 6 ------------------------------------------------------------------------------------------------------------

A_CHOSEN, A_REJECTED = torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 1.0])
# m = 2.  Pair 1: -log s(1 - -1) - log s(2 - 1) - log s(2 + -1) = 0.126928 + 0.313262 + 0.313262 = 0.753452
#         Pair 2: -log s(0 - 1)  - log s(2 - 0) - log s(2 + 1)  = 1.313262 + 0.126928 + 0.048587 = 1.488777
EQ6 = (0.753452 + 1.488777) / 2


def test_eq6_advantage_model_loss():
    assert near(advantage_model_loss(A_CHOSEN, A_REJECTED, 2.0), EQ6)


def test_eq6_margin_may_differ_from_pair_to_pair():
    # m = (2, 1): pair 1 as above; pair 2: -log s(-1) - log s(1 - 0) - log s(1 + 1) = 1.313262 + 0.313262 + 0.126928
    expected = (0.753452 + 1.753452) / 2
    assert near(advantage_model_loss(A_CHOSEN, A_REJECTED, torch.tensor([2.0, 1.0])), expected)


@pytest.mark.parametrize("margin", [2.5, 5.0])
def test_eq6_single_pair_with_free_scores_settles_at_a_third_of_the_margin(margin):
    a = torch.tensor([0.3, 0.1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([a], max_iter=200, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = advantage_model_loss(a[:1], a[1:], margin)
        loss.backward()
        return loss

    optimizer.step(closure)
    # d/da_c = -s(a_r - a_c) + s(a_c - m) = 0 and, by symmetry, a_r = -a_c:  -2 a_c = a_c - m,  a_c = m / 3
    assert near(a.detach(), torch.tensor([margin / 3, -margin / 3], dtype=torch.float64), 1e-4)
    assert abs((a[0] - a[1]).item() - 2 * margin / 3) < 1e-4  # the gap saturates: stated confidence 84 % at m = 2.5


@pytest.mark.parametrize(
    "mutant",
    [
        pytest.param(lambda c, r, m: -ls(c - r).mean(), id="no bound"),
        pytest.param(lambda c, r, m: (-ls(c - r) - ls(m - c)).mean(), id="no bound on the rejected side"),
        pytest.param(lambda c, r, m: (-ls(c - r) - ls(m + r)).mean(), id="no bound on the chosen side"),
        pytest.param(lambda c, r, m: (-ls(c - r) - ls(m + c) - ls(m - r)).mean(), id="bounds swapped"),
        pytest.param(lambda c, r, m: (-ls(r - c) - ls(m - c) - ls(m + r)).mean(), id="rank swapped"),
        pytest.param(lambda c, r, m: (-ls(c - r) - ls(m - c) - ls(m + r)).sum(), id="sum instead of mean"),
    ],
)
def test_eq6_mutants_differ(mutant):
    assert not near(mutant(A_CHOSEN, A_REJECTED, 2.0), EQ6, 0.01)


# --- Eq. 7 ------------------------------------------------------------------------------------------------------------

E = torch.tensor([0.5, 1.0])
# mean scores (2 + 0)/2 = 1 and (1 + 2)/2 = 1.5:  ((0.5 - 1)^2 + (1 - 1.5)^2) / 2 = 0.25; with 1 for 0.5 in e: 0.125
EQ7 = 0.25


def test_eq7_expected_reward_loss():
    r_chosen, r_rejected = R_CHOSEN[:2].clone().requires_grad_(), R_REJECTED[:2].clone().requires_grad_()
    e = E.clone().requires_grad_()
    loss = expected_reward_loss(e, r_chosen, r_rejected)
    assert near(loss, EQ7)
    loss.backward()
    assert r_chosen.grad is None and r_rejected.grad is None  # e follows r, and r does not follow e
    assert near(e.grad, [-0.5, -0.5])  # 2 (e - mean) / 2 pairs


def test_eq7_is_least_at_the_mean_of_a_ranking_s_responses():
    ranking = [3.0, 1.0, 0.0, -2.0, 0.5]  # all 10 pairs of five responses, mean 0.5
    pairs = torch.tensor([(b, w) for i, b in enumerate(ranking) for w in ranking[i + 1 :]])

    def loss(e):
        return expected_reward_loss(torch.full((10,), e), pairs[:, 0], pairs[:, 1]).item()

    assert min(np.arange(-2, 3.01, 0.125), key=loss) == 0.5
    assert loss(0.5) < min(loss(0.49), loss(0.51))


@pytest.mark.parametrize(
    "mutant",
    [
        pytest.param(lambda e, c, r: ((e - (c + r)) ** 2).mean(), id="sum of the scores"),
        pytest.param(lambda e, c, r: ((e - c) ** 2).mean(), id="chosen alone"),
        pytest.param(lambda e, c, r: ((e - (c - r) / 2) ** 2).mean(), id="difference of the scores"),
        pytest.param(lambda e, c, r: ((e - (c + r) / 2) ** 2).sum(), id="sum instead of mean"),
    ],
)
def test_eq7_mutants_differ(mutant):
    assert not near(mutant(E, R_CHOSEN[:2], R_REJECTED[:2]), EQ7, 0.01)


# --- Eq. 8 ------------------------------------------------------------------------------------------------------------


def loss_args(expected_reward, loss="am"):
    return SimpleNamespace(loss=loss, expected_reward=expected_reward, am_margin=2.0)


def test_eq8_advantage_k0():
    assert near(advantage(torch.tensor([2.0, -1.0]), torch.tensor([0.5, 0.5])), [1.5, -1.5])
    # a = r - e turns r_c = (2, 3), r_r = (0, 4), e = (1, 3) into the pairs of Eq. 6 above
    r_chosen, r_rejected, e = torch.tensor([2.0, 3.0]), torch.tensor([0.0, 4.0]), torch.tensor([1.0, 3.0])
    assert near(scorer_loss(loss_args("joint"), r_chosen, r_rejected, e), EQ6)
    # regress adds Eq. 7: means (1, 3.5), ((1 - 1)^2 + (3 - 3.5)^2) / 2 = 0.125
    assert near(scorer_loss(loss_args("regress"), r_chosen, r_rejected, e), EQ6 + 0.125)
    # rm ignores e: differences 2 and -1, (0.126928 + 1.313262) / 2
    assert near(scorer_loss(loss_args("none", "rm"), r_chosen, r_rejected, e), 0.720095)


@pytest.mark.parametrize(
    "mutant",
    [
        pytest.param(lambda r, e: r + e, id="sign"),
        pytest.param(lambda r, e: e - r, id="swapped"),
        pytest.param(lambda r, e: r - 0 * e, id="forgotten e"),
        pytest.param(lambda r, e: r - e / 2, id="half of e"),
    ],
)
def test_eq8_mutants_differ(mutant, monkeypatch):
    assert not near(mutant(torch.tensor([2.0, -1.0]), torch.tensor([0.5, 0.5])), [1.5, -1.5], 0.01)
    r_chosen, r_rejected, e = torch.tensor([2.0, 3.0]), torch.tensor([0.0, 4.0]), torch.tensor([1.0, 3.0])
    monkeypatch.setattr(am_train, "advantage", mutant)
    assert not near(scorer_loss(loss_args("joint"), r_chosen, r_rejected, e), EQ6, 0.01)


def test_eq8_joint_does_not_determine_e():
    """Adding any c(x) to both r and e changes neither the loss nor the gradient of r."""
    r = torch.tensor([[2.0, 3.0], [0.0, 4.0]], dtype=torch.float64)
    e = torch.tensor([1.0, 3.0], dtype=torch.float64)
    outcomes = []
    for c in (torch.zeros(2), torch.tensor([7.0, -3.5])):
        shifted = (r + c).requires_grad_()
        loss = scorer_loss(loss_args("joint"), shifted[0], shifted[1], e + c)
        outcomes.append((loss.item(), torch.autograd.grad(loss, shifted)[0]))
    assert outcomes[0][0] == pytest.approx(outcomes[1][0], abs=1e-12)
    assert near(outcomes[0][1], outcomes[1][1], 1e-12)
    alone = scorer_loss(loss_args("joint"), r[0] + 7, r[1] + 7, e)  # the bound sees a shift of r alone
    assert abs(alone.item() - outcomes[0][0]) > 1


def test_eq8_regress_keeps_the_gradient_of_eq6_from_e():
    r_chosen, r_rejected, e = torch.tensor([2.0, 3.0]), torch.tensor([0.0, 4.0]), torch.tensor([1.0, 3.0])
    grad = {}
    for mode in ("joint", "regress"):
        free = e.clone().requires_grad_()
        grad[mode] = torch.autograd.grad(scorer_loss(loss_args(mode), r_chosen, r_rejected, free), free)[0]
    assert near(grad["regress"], [0.0, -0.5])  # Eq. 7's alone: e - mean of the pair
    # joint: d/de = -s(a_c - m) + s(-m - a_r), over 2 pairs; pair 1 is symmetric, pair 2: (-s(-2) + s(-3)) / 2
    assert near(grad["joint"], [0.0, (-0.119203 + 0.047426) / 2])


# --- Eq. 9 ------------------------------------------------------------------------------------------------------------

# NLL 1 + 2 + 0.5 = 3.5 and 3 + 1 = 4, padding (7) out: 7.5 over 5 tokens, or over 2 rows
EQ9 = {"mean": 1.5, "sum": 3.75}


@pytest.mark.parametrize("reduction", EQ9)
def test_eq9_rehearsal_loss(reduction):
    free = LOGPROBS.clone().requires_grad_()
    loss = ppo_sr.rehearsal_loss(free, MASK, reduction)
    assert near(loss, EQ9[reduction])
    loss.backward()
    weight = {"mean": 0.2, "sum": 0.5}[reduction]
    assert near(free.grad, [[-weight, -weight, -weight], [-weight, -weight, 0.0]])


@pytest.mark.parametrize("reduction", EQ9)
@pytest.mark.parametrize(
    "mutant",
    [
        pytest.param(lambda p, m, n: (p * m).sum() / n, id="sign, as printed"),
        pytest.param(lambda p, m, n: -p.sum() / n, id="forgotten mask"),
        pytest.param(lambda p, m, n: -(p * m).sum(), id="forgotten denominator"),
        pytest.param(lambda p, m, n: -(p * m).sum() / p.numel(), id="padding counted"),
        pytest.param(lambda p, m, n: -(p.exp() * m).sum() / n, id="probability instead of its logarithm"),
    ],
)
def test_eq9_mutants_differ(mutant, reduction):
    denominator = {"mean": MASK.sum(), "sum": 2}[reduction]
    assert not near(mutant(LOGPROBS, MASK, denominator), EQ9[reduction], 0.01)


# --- GAE --------------------------------------------------------------------------------------------------------------


def gae_forward(rewards, values, lengths, gamma, lam):
    """A_t = sum_k (gamma lam)^k delta_{t+k}, in plain loops and forwards."""
    advantages = np.zeros_like(rewards)
    for row, n in enumerate(lengths):
        v = [*values[row, :n], 0.0]
        delta = [rewards[row, t] + gamma * v[t + 1] - v[t] for t in range(n)]
        for t in range(n):
            advantages[row, t] = sum((gamma * lam) ** k * delta[t + k] for k in range(n - t))
    return advantages


def test_gae_by_hand():
    rewards = torch.tensor([[0.0, 1.0, 2.0], [1.0, 3.0, 5.0]])  # the 5 stands at padding, too
    values = torch.tensor([[1.0, 2.0, 1.0], [2.0, 1.0, 9.0]])  # the 9 is a value read at padding
    advantages, returns = generalized_advantages(rewards, values, MASK, 0.5, 0.5)
    # row 1: d = 0 + 0.5*2 - 1 = 0;  1 + 0.5*1 - 2 = -0.5;  2 - 1 = 1
    #        A_3 = 1;  A_2 = -0.5 + 0.25*1 = -0.25;  A_1 = 0 + 0.25*-0.25 = -0.0625
    # row 2: d = 1 + 0.5*1 - 2 = -0.5;  3 - 1 = 2;     A_2 = 2;  A_1 = -0.5 + 0.25*2 = 0
    assert near(advantages, [[-0.0625, -0.25, 1.0], [0.0, 2.0, 0.0]])
    assert near(returns, [[0.9375, 1.75, 2.0], [2.0, 3.0, 0.0]])


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.99), (0.97, 0.5), (0.9, 0.0)])
def test_gae_equals_the_forward_sum_on_ragged_masks(gamma, lam):
    rng = np.random.default_rng(0)
    lengths = [7, 1, 4, 6, 2]
    rewards, values = rng.normal(size=(2, 5, 7))
    mask = np.arange(7) < np.array(lengths)[:, None]
    rewards *= mask  # token_rewards leaves padding at 0; the critic reads anything there
    expected = gae_forward(rewards, values, lengths, gamma, lam)
    advantages, returns = generalized_advantages(*map(torch.tensor, (rewards, values, mask)), gamma, lam)
    assert near(advantages, torch.tensor(expected), 1e-10)
    assert near(returns, torch.tensor((expected + values) * mask), 1e-10)
    mutants = {
        "forgotten mask": gae_forward(rewards, values, [7] * 5, gamma, lam) * mask,
        "sign of the value": gae_forward(rewards, -values, lengths, gamma, lam),
        "discount": gae_forward(rewards, values, lengths, gamma * 0.9, lam),
    }
    for name, mutant in mutants.items():
        assert np.abs(mutant - expected).max() > 0.01, name


def test_gae_with_lambda_1_is_return_minus_value():
    rewards, values = torch.tensor([[0.0, 0.0, 4.0]]), torch.tensor([[1.0, -1.0, 2.0]])
    advantages, returns = generalized_advantages(rewards, values, torch.ones(1, 3, dtype=bool), 1.0, 1.0)
    assert near(returns, [[4.0, 4.0, 4.0]]) and near(advantages, [[3.0, 5.0, 2.0]])


# --- whitening --------------------------------------------------------------------------------------------------------


def test_whiten():
    values = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 99.0]])
    # 1..5: mean 3, squares 4 + 1 + 0 + 1 + 4 = 10, unbiased variance 10 / 4 = 2.5 (biased: 2), std 1.581139
    expected = [[-1.264911, -0.632456, 0.0], [0.632456, 1.264911, 0.0]]
    assert near(whiten(values, MASK), expected)
    biased = (values - 3) / 2**0.5 * MASK
    unmasked = (values - values.mean()) / values.std() * MASK
    not_centred = values / 2.5**0.5 * MASK
    for mutant in (biased, unmasked, not_centred):
        assert not near(mutant, expected, 0.01)


# --- PPO's two losses -------------------------------------------------------------------------------------------------

RATIO = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1])
ADVANTAGE = torch.tensor([1.0, -1.0, 1.0, -1.0, 2.0])
# eps = 0.2.  ratio 1.5, A +1: -min(1.5, 1.2) = -1.2 (clipped)     ratio 1.5, A -1: -min(-1.5, -1.2) = 1.5
#             ratio 0.5, A +1: -min(0.5, 0.8) = -0.5               ratio 0.5, A -1: -min(-0.5, -0.8) = 0.8 (clipped)
#             ratio 1.1, A +2: -2.2
POLICY_LOSS = [-1.2, 1.5, -0.5, 0.8, -2.2]


def test_policy_loss():
    old = torch.full((5,), -3.0)
    new = (old + RATIO.log()).requires_grad_()
    loss = policy_loss(new, old, ADVANTAGE, 0.2)
    assert near(loss, POLICY_LOSS)
    loss.sum().backward()
    assert near(new.grad, [0.0, 1.5, -0.5, 0.0, -2.2])  # d ratio / d log pi = ratio; none where the clip is active


@pytest.mark.parametrize(
    "mutant",
    [
        pytest.param(lambda ratio, a: -a * ratio, id="no clip"),
        pytest.param(lambda ratio, a: -a * ratio.clamp(0.8, 1.2), id="clip without the minimum"),
        pytest.param(lambda ratio, a: torch.min(-a * ratio, -a * ratio.clamp(0.8, 1.2)), id="optimistic"),
        pytest.param(lambda ratio, a: torch.max(a * ratio, a * ratio.clamp(0.8, 1.2)), id="sign"),
        pytest.param(lambda ratio, a: torch.max(-a * ratio, -a * ratio.clamp(max=1.2)), id="upper clip alone"),
        pytest.param(lambda ratio, a: torch.max(-a / ratio, -a * (1 / ratio).clamp(0.8, 1.2)), id="ratio inverted"),
    ],
)
def test_policy_loss_mutants_differ(mutant):
    assert not near(mutant(RATIO, ADVANTAGE), POLICY_LOSS, 0.01)


VALUES, OLD_VALUES = torch.tensor([2.0, 0.0, 2.0, 0.0, 1.1]), torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0])
RETURNS = torch.tensor([3.0, -1.0, 0.0, 2.0, 2.0])
# eps = 0.2; clipped values 1.2, 0.8, 1.2, 0.8, 1.1
# 1/2 max((2-3)^2, (1.2-3)^2)  = 1/2 max(1, 3.24) = 1.62     1/2 max((0+1)^2, (0.8+1)^2) = 1/2 max(1, 3.24) = 1.62
# 1/2 max((2-0)^2, (1.2-0)^2)  = 1/2 max(4, 1.44) = 2.0      1/2 max((0-2)^2, (0.8-2)^2) = 1/2 max(4, 1.44) = 2.0
# 1/2 (1.1-2)^2 = 0.405
VALUE_LOSS = [1.62, 1.62, 2.0, 2.0, 0.405]


def test_value_loss():
    free = VALUES.clone().requires_grad_()
    loss = value_loss(free, OLD_VALUES, RETURNS, 0.2)
    assert near(loss, VALUE_LOSS)
    loss.sum().backward()
    assert near(free.grad, [0.0, 0.0, 2.0, -2.0, -0.9])  # none where the clipped value counts


@pytest.mark.parametrize(
    "mutant",
    [
        pytest.param(lambda v, o, r: 0.5 * (v - r) ** 2, id="no clip"),
        pytest.param(lambda v, o, r: 0.5 * (o + (v - o).clamp(-0.2, 0.2) - r) ** 2, id="clip without the maximum"),
        pytest.param(
            lambda v, o, r: torch.max((v - r) ** 2, (o + (v - o).clamp(-0.2, 0.2) - r) ** 2), id="without the half"
        ),
        pytest.param(
            lambda v, o, r: 0.5 * torch.min((v - r) ** 2, (o + (v - o).clamp(-0.2, 0.2) - r) ** 2), id="minimum"
        ),
        pytest.param(
            lambda v, o, r: 0.5 * torch.max((v - r) ** 2, (v.clamp(-0.2, 0.2) - r) ** 2), id="clipped around 0"
        ),
    ],
)
def test_value_loss_mutants_differ(mutant):
    assert not near(mutant(VALUES, OLD_VALUES, RETURNS), VALUE_LOSS, 0.01)


# --- moving average ---------------------------------------------------------------------------------------------------


def test_moving_average():
    average = MovingAverage(0.5)
    # batch 1 (1, 3): its own mean 2 and std 1 (mean square 5, less 4), whatever the decay
    assert near(average.normalize(torch.tensor([1.0, 3.0])), [-1.0, 1.0])
    # batch 2 (4, 8): mean 6, mean square 40; weights 0.25 and 0.5, their sum 0.75
    # mean (0.25*2 + 0.5*6) / 0.75 = 14/3;  square (0.25*5 + 0.5*40) / 0.75 = 85/3;  var 85/3 - 196/9 = 59/9
    std = math.sqrt(59) / 3
    expected = [(4 - 14 / 3) / std, (8 - 14 / 3) / std]
    assert near(average.normalize(torch.tensor([4.0, 8.0])), expected)
    own = [-1.0, 1.0]  # of batch 2 alone
    no_bias_correction = [(4 - 3.5) / math.sqrt(21.25 - 3.5**2), (8 - 3.5) / math.sqrt(21.25 - 3.5**2)]
    mean_of_stds = [(4 - 14 / 3) / (5 / 3), (8 - 14 / 3) / (5 / 3)]  # (0.25*1 + 0.5*2) / 0.75
    for mutant in (own, no_bias_correction, mean_of_stds):
        assert not near(mutant, expected, 0.01)


def test_moving_average_of_equal_scores_stays_finite():
    assert near(MovingAverage(0.99).normalize(torch.full((4,), 3.0)), torch.zeros(4), 0.05)
