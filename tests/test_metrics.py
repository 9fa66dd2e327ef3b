"""The metrics of Table 1 and 2 on examples worked out by hand, and the noise floor of the ECE."""

import inspect
import math

import numpy as np
import pytest

import am_train
import evaluate
from evaluate import paired_intervals, ranking_metrics, reliability_bins, truth_of_preferred
from tools.statistics import win_lose_tie


def logit(p):
    return math.log(p / (1 - p))


@pytest.mark.parametrize("name", ["expected_calibration_error", "ranking_metrics", "score_balance"])
def test_duplicated_metrics_are_word_for_word_the_same(name):
    assert inspect.getsource(getattr(am_train, name)) == inspect.getsource(getattr(evaluate, name))


# --- ECE --------------------------------------------------------------------------------------------------------------

# 10 bins over [0.5, 1], right edge included:
#   bin 1  (0.50, 0.55]   0.50 (a tie, counts 0.5), 0.52 right, 0.54 wrong   accuracy sum 1.5, confidence sum 1.56
#   bin 5  (0.70, 0.75]   0.75 right (on the edge), 0.72 wrong               accuracy sum 1,   confidence sum 1.47
#   bin 6  (0.75, 0.80]   0.78 right                                         accuracy sum 1,   confidence sum 0.78
#   bin 10 (0.95, 1.00]   1.00 right (on the edge), 0.97 wrong               accuracy sum 1,   confidence sum 1.97
#   ECE = (|-0.06| + |-0.47| + |0.22| + |-0.97|) / 8 = 1.72 / 8 = 0.215
CONFIDENCE = np.array([0.50, 0.52, 0.54, 0.75, 0.72, 0.78, 1.00, 0.97])
CORRECT = np.array([0.5, 1, 0, 1, 0, 1, 1, 0])


def test_ece_by_hand():
    assert am_train.expected_calibration_error(CONFIDENCE, CORRECT) == pytest.approx(21.5, abs=1e-9)


def binned(confidence, correct, bin_of, weight=lambda n, total: n / total):
    """ECE in plain loops, with the choices that a mutant changes as arguments."""
    groups = {}
    for c, right in zip(confidence, correct, strict=True):
        groups.setdefault(bin_of(c), []).append((c, right))
    gaps = [(len(g), abs(sum(r - c for c, r in g)) / len(g)) for g in groups.values()]
    return 100 * sum(weight(n, len(confidence)) * gap for n, gap in gaps)


def right_edge(c):
    return max(math.ceil((c - 0.5) * 20), 1)


@pytest.mark.parametrize(
    ("name", "mutant"),
    [
        ("left edge included", lambda: binned(CONFIDENCE, CORRECT, lambda c: math.floor((c - 0.5) * 20))),
        ("bins over [0, 1]", lambda: binned(CONFIDENCE, CORRECT, lambda c: max(math.ceil(c * 10), 1))),
        ("bins weighted alike", lambda: binned(CONFIDENCE, CORRECT, right_edge, lambda n, total: 1 / 4)),
        ("a tie counts as wrong", lambda: binned(CONFIDENCE, np.floor(CORRECT), right_edge)),
        ("one bin", lambda: binned(CONFIDENCE, CORRECT, lambda c: 0)),
    ],
)
def test_ece_mutants_differ(name, mutant):
    assert binned(CONFIDENCE, CORRECT, right_edge) == pytest.approx(21.5)
    assert abs(mutant() - 21.5) > 0.5, name


def test_ece_equals_plain_loops_on_random_pairs():
    rng = np.random.default_rng(0)
    confidence, correct = rng.uniform(0.5, 1, 500), rng.integers(0, 2, 500).astype(float)
    expected = binned(confidence, correct, right_edge)
    assert am_train.expected_calibration_error(confidence, correct) == pytest.approx(expected, abs=1e-9)


def calibrated_pairs(rng, n, std=2.0):
    """Score gaps whose stated probability is the true one: -> (score_c - score_r), negative where the scorer errs."""
    gap = np.abs(rng.normal(0, std, n))
    return np.where(rng.random(n) < 1 / (1 + np.exp(-gap)), gap, -gap)


@pytest.mark.parametrize(
    ("pairs", "low", "high", "repeats"),
    [(287, 4.8, 6.1, 300), (913, 2.7, 3.4, 200), (2090, 1.9, 2.3, 150), (20000, 0.6, 0.7, 60)],
)
def test_ece_noise_floor_of_a_perfectly_calibrated_scorer(pairs, low, high, repeats):
    rng = np.random.default_rng(pairs)
    floor = np.mean([ranking_metrics(calibrated_pairs(rng, pairs), np.zeros(pairs))["ece"] for _ in range(repeats)])
    assert low < floor < high


def test_ece_grows_when_the_scorer_is_over_or_under_confident():
    delta = calibrated_pairs(np.random.default_rng(0), 20000)
    calibrated, over, under = (ranking_metrics(k * delta, 0 * delta)["ece"] for k in (1, 3, 1 / 3))
    assert calibrated < 1.2 and over > 6 and under > 6


# --- accuracy, Brier, NLL ---------------------------------------------------------------------------------------------


def test_ranking_metrics_by_hand():
    # p(chosen) = 0.8, 0.4, 0.5, 0.9: right, wrong, tie, right
    chosen, rejected = np.array([logit(0.8), 1.0, 2.0, logit(0.9) - 3]), np.array([0.0, 1 + logit(0.6), 2.0, -3.0])
    metrics = ranking_metrics(chosen, rejected)
    assert metrics["accuracy"] == pytest.approx(100 * 2.5 / 4)
    # (0.2^2 + 0.6^2 + 0.5^2 + 0.1^2) / 4 = (0.04 + 0.36 + 0.25 + 0.01) / 4
    assert metrics["brier"] == pytest.approx(0.165)
    # -(log 0.8 + log 0.4 + log 0.5 + log 0.9) / 4 = (0.223144 + 0.916291 + 0.693147 + 0.105361) / 4
    assert metrics["nll"] == pytest.approx(0.484486, abs=1e-6)
    # four bins of one pair: |1 - 0.8| + |0 - 0.6| + |0.5 - 0.5| + |1 - 0.9| = 0.9
    assert metrics["ece"] == pytest.approx(22.5)
    swapped = ranking_metrics(rejected, chosen)
    assert swapped["accuracy"] == pytest.approx(37.5) and swapped["brier"] > 0.3 and swapped["nll"] > 0.8


def test_ranking_metrics_stay_finite_for_huge_gaps():
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        metrics = ranking_metrics(np.array([500.0, 0.0]), np.array([0.0, 500.0]))
    # p = 1 and 0: accuracy 1/2, Brier 1/2, NLL 500 / 2, both pairs in the last bin: |1 - 2| / 2
    assert metrics == pytest.approx({"accuracy": 50, "brier": 0.5, "nll": 250, "ece": 50})


def test_score_balance_by_hand():
    per_task, balance = evaluate.score_balance([1.0, 3.0, 10.0, 16.0], ["a", "a", "b", "b"])
    assert per_task["a"] == {"mean": 2, "std": 1, "count": 2} and per_task["b"] == {"mean": 13, "std": 3, "count": 2}
    # means 2 and 13: half of 11; stds 1 and 3: half of 2, mean 2
    assert balance == pytest.approx({"spread_of_means": 5.5, "spread_of_stds": 1, "mean_within_std": 2})


# --- truth and bins ---------------------------------------------------------------------------------------------------


def test_truth_of_preferred():
    delta, prob_chosen = np.array([2.0, -1.0, 0.0, 0.5]), np.array([0.9, 0.7, 0.8, 0.3])
    assert truth_of_preferred(delta, prob_chosen) == pytest.approx([0.9, 0.3, 0.5, 0.3])


def test_reliability_bins_by_hand():
    delta = np.array([0.0, logit(0.52), -logit(0.54), logit(0.97), -logit(0.97)])
    assert evaluate.stated(delta)[1].tolist() == [0.5, 1, 0, 1, 0]
    bins = reliability_bins(delta, np.array([0.5, 0.6, 0.4, 0.9, 0.1]))
    assert [b["count"] for b in bins] == [3, 0, 0, 0, 0, 0, 0, 0, 0, 2]
    gap = (logit(0.52) + logit(0.54)) / 3
    assert bins[0] == pytest.approx({"count": 3, "accuracy": 0.5, "confidence": 0.52, "gap": gap, "truth": 0.5})
    assert bins[9] == pytest.approx({"count": 2, "accuracy": 0.5, "confidence": 0.97, "gap": logit(0.97), "truth": 0.5})
    assert bins[1] == {"count": 0, "accuracy": None, "confidence": None, "gap": None, "truth": None}
    assert bins == [b | {"truth": t["truth"]} for b, t in zip(reliability_bins(delta), bins, strict=True)]


def test_reliability_bins_add_up_to_the_ece():
    delta = calibrated_pairs(np.random.default_rng(3), 700)
    correct = np.where(delta == 0, 0.5, delta > 0)
    bins = [b for b in reliability_bins(delta) if b["count"]]
    assert sum(b["count"] for b in bins) == 700
    assert sum(b["count"] * b["accuracy"] for b in bins) == pytest.approx(correct.sum())
    ece = 100 * sum(b["count"] * abs(b["accuracy"] - b["confidence"]) for b in bins) / 700
    assert ece == pytest.approx(ranking_metrics(delta, 0 * delta)["ece"])


# --- paired intervals -------------------------------------------------------------------------------------------------


def scored(rng, pairs, scale=1.0):
    """(chosen, rejected) scores of a calibrated scorer whose gaps are then stretched by `scale`."""
    rejected = rng.normal(0, 1, pairs)
    return rejected + scale * calibrated_pairs(rng, pairs), rejected


def test_paired_intervals_point_is_the_difference_of_the_ranking_metrics():
    rng = np.random.default_rng(0)
    scores = {name: scored(rng, 400, scale) for name, scale in (("rm", 2), ("am", 1), ("other", 0.5))}
    scores["am"][0][:7] = scores["am"][1][:7]  # ties too
    result = paired_intervals(scores, [f"prompt {i % 90}" for i in range(400)], 200, np.random.default_rng(1))
    assert list(result) == ["am - rm", "other - rm"]
    of = {name: ranking_metrics(*pair) for name, pair in scores.items()}
    for name, (chosen, rejected) in scores.items():  # Fig. 3: distance of the two means in units of the scores' std
        of[name]["separation"] = (chosen.mean() - rejected.mean()) / np.concatenate([chosen, rejected]).std()
    for name in ("am", "other"):
        assert result[f"{name} - rm"].keys() == of[name].keys()
        for metric, interval in result[f"{name} - rm"].items():
            assert interval["difference"] == pytest.approx(of[name][metric] - of["rm"][metric], abs=1e-9), metric
            assert interval["low"] < interval["high"], metric


def test_paired_intervals_resample_prompts_and_not_pairs():
    """Ten copies of every pair under one prompt are no more evidence than one: the interval stays as wide."""
    rng = np.random.default_rng(0)
    scores = {"rm": scored(rng, 100), "am": scored(rng, 100)}

    def width(repeat, prompts):
        repeated = {name: tuple(np.repeat(side, repeat) for side in pair) for name, pair in scores.items()}
        interval = paired_intervals(repeated, prompts, 500, np.random.default_rng(1))["am - rm"]["accuracy"]
        return interval["high"] - interval["low"]

    assert width(10, np.repeat(np.arange(100), 10)) == pytest.approx(width(1, np.arange(100)))
    assert width(10, np.arange(1000)) < 0.5 * width(1, np.arange(100))  # what resampling pairs would claim


def test_paired_intervals_cover_the_true_difference():
    """Two scorers of true accuracy 70 and 65: 95 % intervals should hold the difference of 5 in about 95 of 100."""
    rng, held = np.random.default_rng(0), 0
    for _ in range(200):
        scores = {
            name: (np.where(rng.random(300) < p, 1.0, -1.0), np.zeros(300)) for name, p in (("rm", 0.65), ("am", 0.70))
        }
        interval = paired_intervals(scores, np.arange(300), 200, rng)["am - rm"]["accuracy"]
        held += interval["low"] <= 5 <= interval["high"]
    assert 178 <= held <= 199  # 190 expected, standard error 3.1; 200 would mean intervals too wide


# --- win, lose, tie ---------------------------------------------------------------------------------------------------


def test_win_lose_tie_by_hand():
    # differences 0.5, -0.5, 0.25 (on the band: a tie), -0.25 (a tie), 0.125 (a tie), 0.375, 1, 0: 3 win, 1 lose, 4 tie
    scores, reference = [1.0, 0.0, 0.5, 0.25, 0.125, 0.5, 1.0, 0.5], [0.5, 0.5, 0.25, 0.5, 0.0, 0.125, 0.0, 0.5]
    assert win_lose_tie(scores, reference, 0.25) == {"win": 37.5, "lose": 12.5, "tie": 50.0}
    assert win_lose_tie(reference, scores, 0.25) == {"win": 12.5, "lose": 37.5, "tie": 50.0}
    assert win_lose_tie(scores, reference, 0.0) == {"win": 62.5, "lose": 25.0, "tie": 12.5}
