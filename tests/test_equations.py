"""Every equation against numbers worked out by hand, which wrong formulas (the mutants) do not meet.

s is the sigmoid; a few of its values stand in almost every sum below:
    -log s(0) = log 2 = 0.693147      -log s(1) = log(1 + e^-1) = 0.313262      -log s(-1) = 0.313262 + 1 = 1.313262
    -log s(2) = log(1 + e^-2) = 0.126928     -log s(3) = log(1 + e^-3) = 0.048587     -log s(0.5) = 0.474077
"""

import itertools
import math
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import am_train
import ppo_sr
from am_train import (
    add_alternates,
    advantage,
    advantage_model_loss,
    expected_reward_loss,
    importance_weights,
    reward_model_loss,
    score_pairs,
    scorer_loss,
)
from ppo_sr import MovingAverage, clipped_policy_loss, clipped_value_loss, generalized_advantages
from ppo_sr import token_rewards, whiten
from utils import InputError

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


def loss_args(expected_reward="none", loss="am", **flags):
    defaults = {"am_margin": 2.0, "num_alternates": 0, "num_policies": 0, "eq8_y": "drawn", "bf16": False}
    weights = {"importance": "clip", "importance_clip": 10.0}
    return SimpleNamespace(**{"loss": loss, "expected_reward": expected_reward} | defaults | weights | flags)


def scores(r, e, weighted_sum=0.0, k=0.0, margin=2.0):
    """What score_pairs returns: r, weighted_sum and k (2, pairs), e and margin (pairs,)."""
    like = torch.zeros_like(r)
    return {
        "r": r, "e": e, "margin": torch.as_tensor(margin).expand(r.shape[1]),
        "weighted_sum": like + torch.as_tensor(weighted_sum), "k": like + torch.as_tensor(k),
    }  # fmt: skip


# a = r - e turns these into the pairs of Eq. 6 above
R, E8 = torch.tensor([[2.0, 3.0], [0.0, 4.0]]), torch.tensor([1.0, 3.0])


def test_eq8_advantage_k0():
    assert near(advantage(torch.tensor([2.0, -1.0]), torch.tensor([0.5, 0.5])), [1.5, -1.5])
    assert near(advantage(torch.tensor([2.0, -1.0]), torch.tensor([0.5, 0.5]), n=7), [1.5, -1.5])  # for any N
    assert near(scorer_loss(loss_args("joint"), scores(R, E8)), EQ6)
    assert near(scorer_loss(loss_args("joint", num_policies=7), scores(R, E8)), EQ6)
    # regress adds Eq. 7: means (1, 3.5), ((1 - 1)^2 + (3 - 3.5)^2) / 2 = 0.125
    assert near(scorer_loss(loss_args("regress"), scores(R, E8)), EQ6 + 0.125)
    # rm ignores e: differences 2 and -1, (0.126928 + 1.313262) / 2
    assert near(scorer_loss(loss_args("none", "rm"), scores(R, E8)), 0.720095)


def test_eq8_advantage_with_a_sum():
    # r 2, e 1, sum 3, N = 4.  K = 1: 2 - 3/4 - 3/4;  K = 4: 2 - 0 - 3/4, e has no weight;  K = 0, no sum: 2 - 1
    r, e = torch.tensor([2.0, 2.0, 2.0]), torch.tensor([1.0, 1.0, 1.0])
    a = advantage(r, e, torch.tensor([3.0, 3.0, 0.0]), torch.tensor([1.0, 4.0, 0.0]), 4)
    assert near(a, [0.5, 1.25, 1.0])
    # sides (2, pairs) share the pair's e: [[2, 5], [0, 1]] - 1/2 [1, 2] - [[2, 4], [2, 0]] / 2
    sides = torch.tensor([[2.0, 5.0], [0.0, 1.0]]), torch.tensor([1.0, 2.0]), torch.tensor([[2.0, 4.0], [2.0, 0.0]])
    assert near(advantage(*sides, torch.ones(2, 2), 2), [[0.5, 2.0], [-1.5, 0.0]])


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
    monkeypatch.setattr(am_train, "advantage", lambda r, e, *rest: mutant(r, e))
    assert not near(scorer_loss(loss_args("joint"), scores(R, E8)), EQ6, 0.01)


def test_eq8_joint_does_not_determine_e():
    """Adding any c(x) to both r and e changes neither the loss nor the gradient of r."""
    outcomes = []
    for c in (torch.zeros(2), torch.tensor([7.0, -3.5])):
        shifted = (R.double() + c).requires_grad_()
        loss = scorer_loss(loss_args("joint"), scores(shifted, E8.double() + c))
        outcomes.append((loss.item(), torch.autograd.grad(loss, shifted)[0]))
    assert outcomes[0][0] == pytest.approx(outcomes[1][0], abs=1e-12)
    assert near(outcomes[0][1], outcomes[1][1], 1e-12)
    alone = scorer_loss(loss_args("joint"), scores(R + 7, E8))  # the bound sees a shift of r alone
    assert abs(alone.item() - outcomes[0][0]) > 1


def test_eq8_regress_keeps_the_gradient_of_eq6_from_e():
    grad = {}
    for mode in ("joint", "regress"):
        free = E8.clone().requires_grad_()
        grad[mode] = torch.autograd.grad(scorer_loss(loss_args(mode), scores(R, free)), free)[0]
    assert near(grad["regress"], [0.0, -0.5])  # Eq. 7's alone: e - mean of the pair
    # joint: d/de = -s(a_c - m) + s(-m - a_r), over 2 pairs; pair 1 is symmetric, pair 2: (-s(-2) + s(-3)) / 2
    assert near(grad["joint"], [0.0, (-0.119203 + 0.047426) / 2])


# --- Eq. 8 with alternate policies: the weights -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "clip", "expected"),
    [
        # ratios: e^log 3 = 3, e^log 40 = 40, e^-log 4 = 1/4; tokens 2, 2, 1
        pytest.param("clip", 10.0, [3.0, 10.0, 0.25], id="clip"),
        pytest.param("clip", 2.0, [2.0, 2.0, 0.25], id="clip below the first"),
        pytest.param("clip", 1e6, [3.0, 40.0, 0.25], id="out of the clip's reach"),
        pytest.param("length", 10.0, [3**0.5, 40**0.5, 0.25], id="length: square roots, unclipped"),
        pytest.param("none", 10.0, [1.0, 1.0, 1.0], id="none"),
    ],
)
def test_eq8_importance_weights(method, clip, expected):
    behaviour = torch.tensor([-7.0, -9.0, -2.0])
    current = behaviour + torch.tensor([3.0, 40.0, 0.25]).log()
    w = importance_weights(current, behaviour, torch.tensor([2, 2, 1]), method, clip)
    assert near(w, expected, 1e-4)
    inverted = importance_weights(behaviour, current, torch.tensor([2, 2, 1]), method, clip)
    assert method == "none" or not near(inverted, expected, 0.01)


def test_eq8_weights_of_long_responses_stay_finite():
    """A whole response's ratio overflows float32 from e^89 on; clip and the geometric mean do not."""
    far = torch.tensor([-10.0]), torch.tensor([-400.0]), torch.tensor([200])
    assert near(importance_weights(*far, "clip", 10.0), [10.0], 1e-4)
    assert near(importance_weights(*far, "length"), [math.exp(390 / 200)], 1e-4)
    assert importance_weights(far[1], far[0], far[2], "clip", 10.0).item() == 0


# --- Eq. 8 with alternate policies: which y, which sum ----------------------------------------------------------------

# one prompt (token 9, e = 0.5), four responses of one to three tokens that end in their name
SCORE = {1: 3.0, 2: 8.0, 3: 2.0, 4: -1.0}
TEXTS = [([9, 1], 1), ([9, 0, 2], 1), ([9, 0, 0, 3], 1), ([9, 4], 1)]
PADDING = SimpleNamespace(pad_token_id=0)
# the responses 1 .. 4: policy, ratio pi_phi / pi'_policy
WRITERS = {1: ("b", 2.0), 2: ("a", 5.0), 3: ("c", 1.0), 4: ("a", 0.5)}
# a wrote 2 and 4. Of these 4 is drawn, the later one in the rows: crc32 of "[9, 4]" 132320184, of "[9, 0, 2]" 136266325


def table_scorer(input_ids, attention_mask, prompt_lens, embedded):
    """r by the last token of the text, e = 0.5, as a trained scorer would return them."""
    last = input_ids[torch.arange(len(input_ids)), attention_mask.sum(1) - 1]
    return torch.tensor([SCORE[i] for i in last.tolist()]), torch.full((len(last),), 0.5)


table_scorer.model = SimpleNamespace(
    get_input_embeddings=lambda: torch.nn.Embedding.from_pretrained(torch.arange(100.0)[:, None], freeze=False)
)


table_engine = SimpleNamespace(run=lambda function, *args: function(table_scorer, *args))


def pair_of(chosen, rejected, prompt="x", **changes):
    row = {"prompt": prompt}
    for side, response in (("chosen", chosen), ("rejected", rejected)):
        policy, ratio = WRITERS[response]
        row |= {f"policy_{side}": policy, f"logprob_{side}": -6.0, f"current_logprob_{side}": -6.0 + math.log(ratio)}
    pair = {"row": row | changes, "chosen": chosen - 1, "rejected": rejected - 1, "alternates": ([], [])}
    return pair | {"margin": 2.0, "where": f"pairs.jsonl, line {(chosen + 1) // 2}"}


def score_all(args, *pairs):
    add_alternates(TEXTS, pairs, args)
    return score_pairs(table_engine, PADDING, TEXTS, pairs, args)


def terms_of(pair):
    """The (response, weight) of Eq. 8's sum for each side, weights rounded."""
    return [[(text + 1, round(w, 5)) for text, w in side] for side in pair["alternates"]]


def test_the_hash_order_of_the_responses_is_the_one_counted_on():
    assert [zlib.crc32(b) for b in (b"[9, 4]", b"[9, 0, 2]")] == [132320184, 136266325]
    assert [str(TEXTS[i - 1][0]) for i in (4, 2)] == ["[9, 4]", "[9, 0, 2]"]


def test_eq8_drawn_by_hand():
    """K = 2 of N = 4: the first two policies by name, each with one response to x."""
    args, pairs = loss_args(num_alternates=2, num_policies=4), (pair_of(1, 2), pair_of(3, 4))
    batch = score_all(args, *pairs)
    # a wrote 2 and the 4 that is drawn (w 1/2, r -1); b wrote 1 (w 2, r 3); c is the third policy
    assert [terms_of(pair) for pair in pairs] == [[[(4, 0.5), (1, 2.0)]] * 2] * 2
    assert near(batch["r"], [[3.0, 2.0], [8.0, -1.0]]) and near(batch["e"], [0.5, 0.5])
    assert near(batch["weighted_sum"], [[5.5, 5.5], [5.5, 5.5]]) and near(batch["k"], torch.full((2, 2), 2.0))
    # a = r - (4 - 2)/4 0.5 - 1/4 (1/2 * -1 + 2 * 3) = r - 0.25 - 1.375
    a = advantage(batch["r"], batch["e"], batch["weighted_sum"], batch["k"], 4)
    assert near(a, [[1.375, 0.375], [6.375, -2.625]])
    # Eq. 6 of (1.375, 6.375) and (0.375, -2.625) at m = 2
    by_hand = sum(
        math.log1p(math.exp(-z)) for z in (1.375 - 6.375, 2 - 1.375, 2 + 6.375, 0.375 + 2.625, 2 - 0.375, 2 - 2.625)
    )
    assert near(scorer_loss(args, batch), by_hand / 2, 1e-5)


@pytest.mark.parametrize(
    "mutant",
    [
        pytest.param(lambda r, e, s, k, n: r - k / n * e - s / n, id="K/N of e"),
        pytest.param(lambda r, e, s, k, n: r - (n - k) / n * e - s / (n + 1), id="sum over N + 1"),
        pytest.param(lambda r, e, s, k, n: r - (n - k) / n * e - s / k, id="sum over K"),
        pytest.param(lambda r, e, s, k, n: r - (n - k) / n * e + s / n, id="sign of the sum"),
        pytest.param(lambda r, e, s, k, n: r - e - s / n, id="the whole of e"),
        pytest.param(lambda r, e, s, k, n: r - (n - k) / n * e, id="no sum"),
        pytest.param(lambda r, e, s, k, n: r - (n - k) / n * e - k / n * r, id="no weights, literal y"),
    ],
)
def test_eq8_drawn_mutants_differ(mutant, monkeypatch):
    args = loss_args(num_alternates=2, num_policies=5)
    batch = score_all(args, pair_of(1, 2), pair_of(3, 4))
    terms = batch["r"], batch["e"], batch["weighted_sum"], batch["k"], 5
    expected = [[1.6, 0.6], [6.6, -2.4]]  # r - (5 - 2)/5 0.5 - 1/5 (1/2 * -1 + 2 * 3) = r - 0.3 - 1.1
    assert near(advantage(*terms), expected) and not near(mutant(*terms), expected, 0.05)
    right = scorer_loss(args, batch)
    monkeypatch.setattr(am_train, "advantage", mutant)
    assert not near(scorer_loss(args, batch), right, 0.001)


def test_eq8_drawn_subtracts_the_mean_of_the_policies_responses_when_k_is_n_and_w_is_1():
    args = loss_args(num_alternates=3, num_policies=3, importance="none")
    pairs = pair_of(1, 2), pair_of(3, 4)
    batch = score_all(args, *pairs)
    a = advantage(batch["r"], 1e6 * batch["e"], batch["weighted_sum"], batch["k"], 3)  # e has no weight at all
    mean = (SCORE[4] + SCORE[1] + SCORE[3]) / 3
    assert terms_of(pairs[1]) == [[(4, 1.0), (1, 1.0), (3, 1.0)]] * 2 and near(a, batch["r"] - mean)


def test_eq8_drawn_takes_what_policies_a_prompt_has():
    """Sums over fewer than K policies give e the weight that is left; prompts do not lend each other responses."""
    args = loss_args(num_alternates=2)  # N = 2K = 4
    batch = score_all(args, pair_of(1, 4), pair_of(2, 2, prompt="z"))
    assert near(batch["k"], [[2.0, 1.0], [2.0, 1.0]]) and near(batch["weighted_sum"], [[5.5, 40.0], [5.5, 40.0]])
    # pair 2: a = 8 - (4 - 1)/4 0.5 - 5 * 8 / 4 = 8 - 0.375 - 10
    a = advantage(batch["r"], batch["e"], batch["weighted_sum"], batch["k"], 4)
    assert near(a[:, 1], [-2.375, -2.375])


def test_eq8_policies_are_taken_by_name_not_by_row():
    """Rows name c, a, b in this order; K = 2 are a and b all the same."""
    batch = score_all(loss_args(num_alternates=2), pair_of(3, 2), pair_of(1, 4))
    assert near(batch["weighted_sum"], torch.full((2, 2), 5.5))


def test_eq8_drawn_is_the_same_whatever_the_rank_or_the_row():
    """All ways to write four responses as two pairs: which side, which row and how often change no sum."""
    for order in itertools.permutations((1, 2, 3, 4)):
        pairs = [pair_of(*order[:2]), pair_of(*order[2:]), pair_of(*order[:2])]
        score_all(loss_args(num_alternates=3), *pairs)
        assert [terms_of(pair) for pair in pairs] == [[[(4, 0.5), (1, 2.0), (3, 1.0)]] * 2] * 3


@pytest.mark.parametrize("rejected", [[2], [1, 2, 3]], ids=["as long", "longer"])
def test_eq8_drawn_favours_no_rank(rejected):
    """One policy wrote both sides, the same two responses to 1000 prompts: each is drawn for about half of them."""
    args, drawn = loss_args(num_alternates=1), []
    for prompt in range(100, 1100):
        pair = pair_of(2, 4) | {"chosen": 0, "rejected": 1}
        add_alternates([([prompt, 1], 1), ([prompt, *rejected], 1)], [pair], args)
        assert terms_of(pair) in ([[(1, 5.0)]] * 2, [[(2, 0.5)]] * 2)  # one term a side, the weight the text's own
        drawn.append(pair["alternates"][0][0][0])
        ids = zlib.crc32(f"[{prompt}, 1]".encode()), zlib.crc32(str([prompt, *rejected]).encode())
        assert drawn[-1] == ids.index(min(ids))
    assert 450 < sum(drawn) < 550  # 500 +- 16


@pytest.mark.parametrize("eq8_y", ["drawn", "own"])
def test_eq8_length_counts_the_tokens_of_the_response(eq8_y):
    """Response 3 has three tokens behind the prompt's one: 8^(1/3) = 2, and 1 has one: 2."""
    row = {"logprob_chosen": -6.0, "current_logprob_chosen": -6.0 + math.log(8)}
    args, pair = loss_args(num_alternates=3, eq8_y=eq8_y, importance="length"), pair_of(3, 1, **row)
    score_all(args, pair)
    assert terms_of(pair) == ([[(1, 2.0), (3, 2.0)]] * 2 if eq8_y == "drawn" else [[(3, 2.0)], [(1, 2.0)]])


@pytest.mark.parametrize("eq8_y", ["drawn", "own"])
def test_eq8_clip_holds_for_the_terms(eq8_y):
    """Ratios 2 and 5 at a clip of 3: the terms weigh 2 and 3; response 1 is b's, 2 is a's."""
    pair = pair_of(1, 2)
    score_all(loss_args(num_alternates=2, eq8_y=eq8_y, importance_clip=3.0), pair)
    assert terms_of(pair) == ([[(2, 3.0), (1, 2.0)]] * 2 if eq8_y == "drawn" else [[(1, 2.0)], [(2, 3.0)]])


def test_eq8_n_is_2k_unless_given():
    batch = score_all(loss_args(num_alternates=2), pair_of(1, 2), pair_of(3, 4))
    by_n = {n: scorer_loss(loss_args(num_alternates=2, num_policies=n), batch) for n in (0, 2, 4, 8)}
    assert near(by_n[0], by_n[4]) and not near(by_n[4], by_n[8], 0.01) and not near(by_n[2], by_n[4], 0.01)


def test_eq8_own_by_hand():
    """The literal y: r (1 - sum_k w_k / N) - (N - K)/N e."""
    args = loss_args(num_alternates=2, num_policies=5, eq8_y="own")
    ratios = {"p": 0.5, "q": 3.0, "z": 100.0}  # z is the third policy
    logs = {policy: -1.0 - math.log(ratio) for policy, ratio in ratios.items()}
    changes = {"current_logprob_chosen": -1.0, "logprobs_chosen": logs}
    pair = pair_of(1, 4, **changes)
    batch = score_all(args, pair)
    assert terms_of(pair) == [[(1, 0.5), (1, 3.0)], [(4, 0.5)]]  # the rejected one has logprob_rejected alone
    assert near(batch["weighted_sum"], [[3.5 * 3], [-0.5]], 1e-5) and near(batch["k"], [[2.0], [1.0]])
    # chosen: 3 (1 - 3.5/5) - 3/5 0.5 = 0.6;  rejected: -1 (1 - 0.5/5) - 4/5 0.5 = -1.3
    a = advantage(batch["r"], batch["e"], batch["weighted_sum"], batch["k"], 5)
    assert near(a, [[0.6], [-1.3]], 1e-5)
    loss = sum(math.log1p(math.exp(-z)) for z in (0.6 + 1.3, 2 - 0.6, 2 - 1.3))
    assert near(scorer_loss(args, batch), loss, 1e-5)


def test_eq8_own_is_zero_at_w_1_and_k_equal_n():
    """Then a does not depend on the scorer: the literal reading has no signal left to learn from."""
    args = loss_args(num_alternates=1, num_policies=1, eq8_y="own", importance="none")
    batch = score_all(args, pair_of(1, 2), pair_of(3, 4))
    r = batch["r"].clone().requires_grad_()
    a = advantage(r, batch["e"], r * 1.0, batch["k"], 1)
    assert near(a, torch.zeros(2, 2))
    assert near(advantage(batch["r"], batch["e"], batch["weighted_sum"], batch["k"], 1), torch.zeros(2, 2))
    assert near(scorer_loss(args, batch), math.log(2) + 2 * math.log1p(math.exp(-2)))
    assert torch.autograd.grad(a.sum(), r)[0].abs().max() == 0


@pytest.mark.parametrize(("eq8_y", "joint_gradient"), [("drawn", 1 - 2 / 4), ("own", 1 - 2 / 4)])
def test_eq8_the_gradient_flows_through_the_sum_unless_e_is_regressed(eq8_y, joint_gradient):
    """r of the text that stands in its own sum with w = 2, N = 4: d a / d r = 1 - 2/4; with regress 1."""
    for mode, expected in (("none", joint_gradient), ("joint", joint_gradient), ("regress", 1.0)):
        args = loss_args(mode, num_alternates=1, num_policies=4, eq8_y=eq8_y)
        r, e = torch.tensor([[3.0], [-1.0]], requires_grad=True), torch.tensor([0.5], requires_grad=True)
        # drawn: the sum of both sides is 2 r_c; own: 2 r_c and 2 r_r
        sums = 2 * r[:1].expand(2, 1) if eq8_y == "drawn" else 2 * r
        loss = scorer_loss(args, scores(r, e, sums, 1.0))
        a = advantage(r, e, sums, 1, 4).detach()
        # dL/da_c = -s(a_r - a_c) + s(a_c - m);  dL/da_r = s(a_r - a_c) - s(-m - a_r)
        rank, over, under = (torch.sigmoid(z).item() for z in (a[1] - a[0], a[0] - 2, -2 - a[1]))
        d_c, d_r = -rank + over, rank - under
        through_rejected = d_r * (-2 / 4) if eq8_y == "drawn" and mode != "regress" else 0
        by_hand_c = d_c * expected + through_rejected
        by_hand_r = d_r * (1.0 if eq8_y == "drawn" else expected)
        grad_r, grad_e = torch.autograd.grad(loss, (r, e))
        assert near(grad_r, [[by_hand_c], [by_hand_r]], 1e-5)
        # e: -(N - K)/N (d_c + d_r), or with regress Eq. 7's 2 (e - mean of the two sides' weighted means)
        target = 6.0 if eq8_y == "drawn" else (6.0 - 2.0) / 2
        assert near(grad_e, [2 * (0.5 - target) if mode == "regress" else -0.75 * (d_c + d_r)], 1e-5)


def test_eq8_regress_moves_e_towards_the_weighted_mean():
    args = loss_args("regress", num_alternates=2, num_policies=4)
    batch = score_all(args, pair_of(1, 2), pair_of(3, 4))
    # (1/2 * -1 + 2 * 3) / 2 = 2.75 for both sides of both pairs, not the means 5.5 and 0.5 of the pairs
    eq6 = scorer_loss(loss_args(num_alternates=2, num_policies=4), batch)
    assert near(scorer_loss(args, batch) - eq6, (0.5 - 2.75) ** 2, 1e-5)


def test_eq8_e_head_is_least_at_the_weighted_mean():
    args = loss_args("regress", num_alternates=2, num_policies=4)
    batch = score_all(args, pair_of(1, 4))
    free = torch.tensor([2.75], requires_grad=True)
    assert near(torch.autograd.grad(scorer_loss(args, batch | {"e": free}), free)[0], [0.0])


def test_eq8_alternates_are_those_of_a_pair_whatever_batch_it_is_in():
    """A micro-batch scores the responses of the sum along, though they stand in none of its pairs."""
    args, pairs = loss_args(num_alternates=2), [pair_of(1, 2), pair_of(3, 4)]
    together = score_all(args, *pairs)
    alone = [score_pairs(table_engine, PADDING, TEXTS, [pair], args) for pair in pairs]
    for key in ("r", "weighted_sum", "k"):
        assert near(torch.cat([one[key] for one in alone], 1), together[key])
    assert near(torch.cat([one["e"] for one in alone]), together["e"])


@pytest.mark.parametrize("field", ["logprob_rejected", "current_logprob_chosen", "policy_rejected"])
def test_eq8_missing_fields_are_named_with_line_and_tool(field):
    args, bad = loss_args(num_alternates=1), pair_of(3, 4)
    del bad["row"][field]
    with pytest.raises(InputError, match=rf"^pairs\.jsonl, line 2: (?=.*'{field}')(?=.*write_logprobs)[^\n]+$"):
        add_alternates(TEXTS, [pair_of(1, 2), bad], args)
    if field.startswith("policy"):  # the literal y needs no name
        add_alternates(TEXTS, [pair_of(1, 2), bad], loss_args(num_alternates=1, eq8_y="own"))


def test_eq8_own_takes_the_same_policies_whatever_their_order_in_the_row():
    args, taken = loss_args(num_alternates=1, eq8_y="own"), []
    for logs in ({"a": -1.0, "b": -2.0}, {"b": -2.0, "a": -1.0}):
        pair = pair_of(1, 2, current_logprob_chosen=-2.0, logprobs_chosen=logs)
        add_alternates(TEXTS, [pair], args)
        taken.append(terms_of(pair))
    assert taken[0] == taken[1] == [[(1, 0.36788)], [(2, 5.0)]]  # a's: e^(-2 - -1)


# --- Eq. 6 without a bound --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["none", "joint"])
def test_eq6_with_an_infinite_margin_is_eq1_on_the_advantages(mode):
    r, e = R.clone().requires_grad_(), E8.clone().requires_grad_()
    loss = scorer_loss(loss_args(mode), scores(r, e, margin=math.inf))
    eq1 = reward_model_loss(*(r - e))
    assert loss.item() == eq1.item()
    grad, expected = (torch.autograd.grad(one, (r, e)) for one in (loss, eq1))
    assert all(torch.equal(g, x) and g.isfinite().all() for g, x in zip(grad, expected, strict=True))
    # one bounded pair beside an unbounded one: 0.753452 of Eq. 6's pair 1, 1.313262 of the other's rank alone
    assert near(scorer_loss(loss_args(mode), scores(r, e, margin=[2.0, math.inf])), (0.753452 + 1.313262) / 2)


# --- Eq. 9 ------------------------------------------------------------------------------------------------------------

# NLL 1 + 2 + 0.5 = 3.5 and 3 + 1 = 4, padding out: 7.5 over 5 tokens, or over 2 rows
EQ9 = {"mean": 1.5, "sum": 3.75}


@pytest.mark.parametrize("reduction", EQ9)
def test_eq9_rehearsal_loss(reduction):
    free = LOGPROBS.clone().requires_grad_()
    loss = ppo_sr.rehearsal_loss(free[MASK], {"mean": 5, "sum": 2}[reduction])
    assert near(loss, EQ9[reduction])
    loss.backward()
    weight = {"mean": 0.2, "sum": 0.5}[reduction]
    assert near(free.grad, [[-weight, -weight, -weight], [-weight, -weight, 0.0]])


@pytest.mark.parametrize("reduction", EQ9)
@pytest.mark.parametrize(
    "mutant",
    [
        pytest.param(lambda p, n: p.sum() / n, id="sign, as printed"),
        pytest.param(lambda p, n: -p.sum(), id="forgotten denominator"),
        pytest.param(lambda p, n: -p.mean() / n, id="divided twice"),
        pytest.param(lambda p, n: -p.exp().sum() / n, id="probability instead of its logarithm"),
    ],
)
def test_eq9_mutants_differ(mutant, reduction):
    denominator = {"mean": MASK.sum(), "sum": 2}[reduction]
    assert not near(mutant(LOGPROBS[MASK], denominator), EQ9[reduction], 0.01)


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
    one = torch.tensor([[False, True, False]])  # a mini-batch of one token has no std
    assert near(whiten(torch.tensor([[1.0, 2.0, 3.0]]), one), [[0.0, 0.0, 0.0]])


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
    loss = clipped_policy_loss((new - old).exp(), ADVANTAGE, 0.2)
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
    loss = clipped_value_loss(free, OLD_VALUES, RETURNS, 0.2)
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


def test_moving_average_of_scores_far_from_0():
    """A difference of squares: in float32 the std of scores around 5000 came out as half of what it is."""
    scores = torch.tensor([4999.5, 5000.0, 5000.5])
    assert torch.allclose(MovingAverage(0.99).normalize(scores), torch.tensor([-(1.5**0.5), 0.0, 1.5**0.5]), atol=1e-4)


def test_moving_average_of_equal_scores_stays_finite():
    assert near(MovingAverage(0.99).normalize(torch.full((4,), 3.0)), torch.zeros(4), 0.05)
