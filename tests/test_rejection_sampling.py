"""baselines/rejection_sampling.py: criteria by hand, best of n by enumeration, Eq. 4's loss, resume, RSO's pairs."""

import itertools
import json
import math

import numpy as np
import pytest
import torch

from baselines import rejection_sampling as rs
from baselines.rejection_sampling import above, accepted, best_of_k, best_of_n, positive_advantage
from tests import test_ppo_sr as sr
from tests.test_data import refused

words, policy, scorer, data = sr.words, sr.policy, sr.scorer, sr.data  # fixtures

pytestmark = pytest.mark.usefixtures("one_thread")


def args_for(policy, scorer, data, out, kind=rs.Train, **changes):
    args = dict(model_name_or_path=policy, reward_model_path=scorer, dataset_name=data["prompts"])
    args |= dict(output_dir=str(out), response_length=6, max_length=24, per_device_eval_batch_size=4)
    if kind is rs.Train:
        args |= dict(prompts_per_round=5, global_batch_size=3, learning_rate=1e-3, num_rounds=2)
        args |= dict(eval_dataset_names=(data["main"],), per_device_train_batch_size=2)
    return kind(**args | changes)


def scores_of_letters(monkeypatch):
    """A scorer without a model: longer texts are better. The random policy seldom ends an answer: all count as ended."""
    monkeypatch.setattr(rs.Sampler, "score", lambda self, rows, texts: np.array([float(len(t)) for t in texts]))
    every_answer_ends(monkeypatch)


def every_answer_ends(monkeypatch):
    sample = rs.Sampler.sample

    def finished(self, policy, chosen):
        *found, ended = sample(self, policy, chosen)
        return *found, np.ones_like(ended)

    monkeypatch.setattr(rs.Sampler, "sample", finished)


# --- by hand ----------------------------------------------------------------------------------------------------------

SCORES = np.array([[1.0, 2.0, 6.0, 3.0], [5.0, 5.0, -1.0, 0.0]])
FINISHED = np.array([[True, True, False, True], [True, True, True, True]])


def test_eq_3_by_hand():
    """[Eq. 3]  6 is not finished, so that 3 is the best of its prompt; of the two 5s the first one."""
    assert best_of_k(SCORES, FINISHED).tolist() == [[0, 0, 0, 1], [1, 0, 0, 0]]
    assert best_of_k(SCORES, FINISHED & (SCORES < 0)).tolist() == [[0, 0, 0, 0], [0, 0, 1, 0]]
    # what is finished, sorted: -1 0 1 2 3 5 5; the quantile .5 is 2, and .75 is 4
    assert above(SCORES, FINISHED, 0.5).tolist() == [[0, 1, 0, 1], [1, 1, 0, 0]]
    assert above(SCORES, FINISHED, 0.75).tolist() == [[0, 0, 0, 0], [1, 1, 0, 0]]
    # means 2 and 2.25
    assert positive_advantage(SCORES, FINISHED).tolist() == [[0, 0, 0, 1], [2.75, 2.75, 0, 0]]
    assert not positive_advantage(SCORES, FINISHED & False).any()


@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_best_of_n_by_enumeration(n):
    """Every way to draw n of 4 samples (with a repeated one and a tie), the best of each, its share and its KL."""
    answers, scores = np.array(["a", "b", "a", "c"]), np.array([1.0, 3.0, 1.0, 2.0])
    found, probability, kl = best_of_n(answers, scores, n)
    draws = [max(draw, key=lambda i: scores[i]) for draw in itertools.product(range(4), repeat=n)]
    share = {letter: np.mean([answers[i] == letter for i in draws]) for letter in "abc"}
    assert dict(zip(answers[found], probability, strict=True)) == pytest.approx(share)
    pi = {"a": 0.5, "b": 0.25, "c": 0.25}
    assert kl == pytest.approx(sum(p * math.log(p / pi[k]) for k, p in share.items() if p))
    assert kl <= math.log(n) - (n - 1) / n + 1e-9  # the usual formula is a bound


def test_the_best_of_n_of_many_distinct_answers_is_near_the_formula():
    answers = np.array([str(i) for i in range(4096)])
    for n in (2, 8):
        _, _, kl = best_of_n(answers, np.arange(4096.0), n)
        assert kl == pytest.approx(math.log(n) - (n - 1) / n, abs=0.01)


def test_what_rso_accepts_is_the_optimal_policy():
    """Accepted draws are distributed as pi(y) exp(r / beta): answers 0, 1, 2 with pi = .5, .3, .2."""
    rng, pi, reward = np.random.default_rng(0), np.array([0.5, 0.3, 0.2]), np.array([0.0, 0.5, 1.0])
    drawn = rng.choice(3, size=40_000, p=pi)
    kept = drawn[accepted(reward[drawn], 0.5, rng)]
    optimal = pi * np.exp(reward / 0.5)
    assert np.bincount(kept) / len(kept) == pytest.approx(optimal / optimal.sum(), abs=0.015)


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def updates(monkeypatch):
    """What each optimiser step saw, and its loss."""
    seen, update = [], rs.update

    def spying(args, engine, tokenizer, pairs, rehearsal, log, step):
        before = [p.detach().clone() for p in engine.module.parameters()]
        loss = update(args, engine, tokenizer, pairs, rehearsal, log, step)
        seen.append((step, pairs, rehearsal, loss, before, engine.module))
        return loss

    monkeypatch.setattr(rs, "update", spying)
    return seen


def nll_by_hand(model, weights, rows):
    """sum_t -log softmax(logits)[y_t] of each row, token by token."""
    parameters = list(model.parameters())
    now = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for p, old in zip(parameters, weights, strict=True):
            p.copy_(old)
        losses = []
        for x, y in rows:
            logits = model(torch.tensor([x + y])).logits[0].double()
            logprobs = logits.log_softmax(-1)
            losses.append(-sum(logprobs[len(x) + t - 1, token].item() for t, token in enumerate(y)))
        for p, new in zip(parameters, now, strict=True):
            p.copy_(new)
    return losses


@pytest.mark.parametrize("keep", ["best", "threshold", "advantage"])
def test_eq_4_by_a_plain_loop(keep, policy, scorer, data, tmp_path, updates, monkeypatch):
    """[Eq. 4]  Every step's loss token by token from the model's own logits; with a rehearsal set, and Eq. 9's term."""
    scores_of_letters(monkeypatch)
    flags = dict(keep=keep, rehearsal_dataset_name=data["rehearsal"], rehearsal_coef=0.5)
    if keep == "threshold":
        flags["thresholds"] = (0.7, 0.3)  # they rise, in whatever order they are given
    rs.main(args_for(policy, scorer, data, tmp_path, response_length=10, **flags))
    for _, pairs, rehearsal, loss, before, model in updates:
        nll = nll_by_hand(model, before, [(x, y) for x, y, _ in pairs])
        expected = sum(w * v for (_, _, w), v in zip(pairs, nll, strict=True)) / sum(len(y) for _, y, _ in pairs)
        assert len(rehearsal) == len(pairs)
        old = nll_by_hand(model, before, rehearsal)
        expected += 0.5 * sum(old) / sum(len(y) for _, y in rehearsal)
        assert loss == pytest.approx(expected, abs=1e-5)
    weights = [w for _, pairs, *_ in updates for _, _, w in pairs]
    assert (len({*weights}) == 1) == (keep != "advantage") and np.mean(weights) == pytest.approx(1, abs=0.2)
    rows = sr.lines_of(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all(row["objective/kept_scores"] > row["objective/scores"] for row in rows[1:])
    assert rows[0]["eval/main/kl"] == pytest.approx(0, abs=1e-6) and rows[2]["eval/main/kl"] != 0


def test_rest_samples_once_and_its_threshold_rises(policy, scorer, data, tmp_path, updates, monkeypatch):
    scores_of_letters(monkeypatch)
    sampled = []
    sample = rs.Sampler.sample
    monkeypatch.setattr(rs.Sampler, "sample", lambda *args: sampled.append(args) or sample(*args))
    flags = dict(keep="threshold", thresholds=(0.8, 0.0), num_rounds=1, global_batch_size=100)
    rs.main(args_for(policy, scorer, data, tmp_path, response_length=10, **flags))
    assert len(sampled) == 1
    [low, high] = [{(tuple(x), tuple(y)) for x, y, _ in pairs} for _, pairs, *_ in updates]
    assert high < low


def test_resume(policy, scorer, data, tmp_path, monkeypatch):
    every_answer_ends(monkeypatch)
    flags = dict(rehearsal_dataset_name=data["rehearsal"], num_rounds=3, save_steps=1, global_batch_size=2)
    rs.main(args_for(policy, scorer, data, tmp_path / "whole", **flags))
    update = rs.update

    def stopping(args, engine, tokenizer, pairs, rehearsal, log, step):
        if step == 3:
            raise KeyboardInterrupt
        return update(args, engine, tokenizer, pairs, rehearsal, log, step)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(rs, "update", stopping)
        rs.main(args_for(policy, scorer, data, tmp_path / "cut", **flags))
    rs.main(args_for(policy, scorer, data, tmp_path / "cut", resume=True, **flags))
    assert sr.same_run(tmp_path / "whole", tmp_path / "cut") == (True, True, True)


def test_best_of_n_rises_with_n(policy, scorer, data, tmp_path, monkeypatch):
    scores_of_letters(monkeypatch)
    flags = dict(responses_per_prompt=8, gold_reward=f"{__name__}:minus_length")
    rs.main(args_for(policy, scorer, data, tmp_path, rs.BestOfN, **flags))
    points = json.loads((tmp_path / "best_of_n.json").read_text())["points"]
    assert [p["n"] for p in points] == [1, 2, 4, 8]
    for one, next_one in itertools.pairwise(points):  # gold is the score's opposite: it is hacked
        assert next_one["score"] > one["score"] and next_one["gold"] < one["gold"]
        assert one["kl"] < next_one["kl"] <= next_one["kl_bound"] + 1e-9
    assert points[0]["kl"] == 0


def minus_length(prompts, responses):
    return [-float(len(text)) for text in responses]


def test_a_cut_answer_is_never_the_best_of_n(policy, scorer, data, tmp_path, monkeypatch):
    """The longest answers have the highest scores and are the cut ones; what is left is scored as it is."""
    scores_of_letters(monkeypatch)
    sample = rs.Sampler.sample

    def cut_long(self, policy, chosen):
        responses, texts, scores, _ = sample(self, policy, chosen)
        return responses, texts, scores, scores <= 12

    monkeypatch.setattr(rs.Sampler, "sample", cut_long)
    rs.main(args_for(policy, scorer, data, tmp_path, rs.BestOfN, responses_per_prompt=8))
    points = json.loads((tmp_path / "best_of_n.json").read_text())["points"]
    assert 0 < points[0]["score"] < points[-1]["score"] <= 12


def test_pairs_are_preferences_of_the_scorer(policy, scorer, data, tmp_path, monkeypatch):
    scores_of_letters(monkeypatch)
    rs.main(args_for(policy, scorer, data, tmp_path, rs.Pairs, beta=50.0, pairs_per_prompt=2))
    rows = sr.lines_of(tmp_path / "pairs.jsonl")
    assert rows
    for row in rows:
        gap = len(row["chosen"]) - len(row["rejected"])
        assert gap >= 0 and row["chosen"] != row["rejected"]
        assert row["prob_chosen"] == pytest.approx(1 / (1 + math.exp(-gap)))
    counts = [sum(row["prompt"] == prompt for row in rows) for prompt in {row["prompt"] for row in rows}]
    assert max(counts) == 2


def test_thresholds_that_nobody_would_read_are_refused(policy, scorer, data, tmp_path):
    with refused("--thresholds: is for --keep threshold"):
        rs.main(args_for(policy, scorer, data, tmp_path / "run", keep="best", thresholds=(0.5,)))
    assert not (tmp_path / "run").exists()


def test_nothing_kept_is_an_error(policy, scorer, data, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, refused("round 1", "--keep"):
        every_answer_ends(patch)
        patch.setattr(rs.Sampler, "score", lambda self, rows, texts: np.zeros(len(texts)))
        rs.main(args_for(policy, scorer, data, tmp_path / "equal", keep="advantage"))
    never = rs.Sampler.sample
    with monkeypatch.context() as patch, refused("round 1", "--response_length"):
        patch.setattr(rs.Sampler, "sample", lambda *of: (*never(*of)[:3], np.zeros((5, 4), bool)))
        rs.main(args_for(policy, scorer, data, tmp_path / "cut", keep="threshold"))
    monkeypatch.setattr(rs, "accepted", lambda scores, beta, rng: [0])
    with refused("--beta"):
        rs.main(args_for(policy, scorer, data, tmp_path / "pairs", rs.Pairs))
