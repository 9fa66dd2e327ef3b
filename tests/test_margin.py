"""docs/MARGIN.md and docs/results/margin.md: what Eq. 6 asks for at every m, found by minimising it; studies/margin.py."""

import json
import random
import re
from itertools import combinations
from math import exp, log, tanh
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import brentq, fsolve, minimize_scalar

from am_train import advantage_model_loss, reward_model_loss
from miniature.world import TASKS, preference_probability, prompts
from studies import margin as study

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/MARGIN.md").read_text(encoding="utf-8")
DOC = (ROOT / "docs/results/margin.md").read_text(encoding="utf-8")
PROBABILITIES, MARGINS = (0.6, 0.7, 0.8, 0.9, 0.99), (1, 2.5, 5, 10)


def s(x):
    return 1 / (1 + exp(-x))


def table(caption, text=DOC):
    """The numbers of the first table under a caption of the text: {first cell: [the other cells]}, and the header."""
    lines = text.split(caption, 1)[1].lstrip().splitlines()
    rows = []
    for line in lines[next(i for i, line in enumerate(lines) if line.startswith("|")) :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows[0][1:], {row[0]: row[1:] for row in rows[2:]}


def minimise(count, loss):
    """The free scores (count,) at which `loss` is least."""
    a = torch.zeros(count, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [a], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        value = loss(a)
        value.backward()
        return value

    optimizer.step(closure)
    return a.detach().numpy()


def pair_optimum(p, margin):
    """Half the gap where Eq. 6 is least for a pair whose first response is preferred with probability p."""
    a = minimise(
        2,
        lambda a: p * advantage_model_loss(a[:1], a[1:], margin) + (1 - p) * advantage_model_loss(a[1:], a[:1], margin),
    )
    assert abs(a[0] + a[1]) < 1e-7  # the optimum is symmetric
    return a[0]


def ranking_optimum(probability, margin):
    """Scores where Eq. 6 is least over all pairs of a ranking; probability (n, n): how often i is preferred to j."""
    probability = torch.as_tensor(probability, dtype=torch.float64)
    i, j = torch.nonzero(probability, as_tuple=True)

    def loss(a):
        each = torch.vmap(advantage_model_loss, in_dims=(0, 0, None))(a[i], a[j], margin)
        return (probability[i, j] * each).sum()

    return minimise(len(probability), loss)


def certain(n):
    return np.triu(np.ones((n, n)), 1)


def stated(p, margin):
    """sigma(2a) at the root of the stationarity equation of the doc, by bisection: nothing of am_train in it."""
    return s(2 * brentq(lambda a: s(2 * a) - p + p * s(a - margin) - (1 - p) * s(-a - margin), 0, 60, xtol=1e-13))


# --- (a) an isolated pair ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("margin", MARGINS)
def test_a_certain_pair_settles_at_a_third_of_the_margin(margin):
    assert abs(pair_optimum(1.0, margin) - margin / 3) < 1e-5


def test_a_table_of_the_cap():
    header, rows = table("**Cap of an isolated pair.**")
    for k, name in enumerate(header):
        margin = float(name)
        assert float(rows["gap 2m/3"][k]) == round(2 * margin / 3, 2)
        assert float(rows["stated confidence"][k]) == round(s(2 * margin / 3), 4)


# --- the page's example ----------------------------------------------------------------------------------------------


def test_the_page_s_example_of_a_certain_pair():
    a = pair_optimum(1.0, 2.5)
    push, pull = s(-2 * a), s(a - 2.5)
    assert push == pytest.approx(pull, abs=1e-5)
    example = PAGE.split("## An example", 1)[1].split("Now ", 1)[0]
    found = [a, -a, -2 * a, a, push, 2 * a, s(2 * a)]
    assert re.findall(r"(?<![\d.])−?\d\.\d\d", example) == [f"{x:.2f}".replace("-", "−") for x in found]


def test_the_page_s_table_of_stated_confidence():
    header, rows = table("## An example", PAGE)
    assert header == ["m = 1", "m = 2.5", "m = 5"] and list(rows) == ["0.7", "0.9"]
    for p, cells in rows.items():
        margins = [float(name.removeprefix("m = ")) for name in header]
        assert cells == [f"{s(2 * pair_optimum(float(p), m)):.2f}" for m in margins]


# --- (b) rankings -----------------------------------------------------------------------------------------------------


def test_b_rankings_of_three_and_five_solve_the_doc_s_equations():
    for margin in (2.5, 5.0):
        b = brentq(lambda b: 2 * s(b - margin) - s(-b) - s(-2 * b), 0, margin, xtol=1e-13)
        assert np.allclose(ranking_optimum(certain(3), margin), [b, 0, -b], atol=1e-5)

        def equations(scores):
            b, c = scores
            first = 4 * s(b - margin) - s(c - b) - s(-b) - s(-b - c) - s(-2 * b)
            return first, 3 * s(c - margin) - s(-c - margin) - s(-c) - s(-2 * c) - s(-b - c) + s(c - b)

        b, c = fsolve(equations, (margin / 2, margin / 4), xtol=1e-12)
        assert np.allclose(ranking_optimum(certain(5), margin), [b, c, 0, -c, -b], atol=1e-5)


def test_b_table_of_largest_gaps():
    header, rows = table("**Largest gap")
    assert list(rows) == ["2", "3", "5", "9"]
    for n, cells in rows.items():
        for name, cell in zip(header, cells, strict=True):
            margin = float(name.removeprefix("m = "))
            gap, confidence = cell.rstrip(")").split(" (")
            found = np.ptp(ranking_optimum(certain(int(n)), margin))
            assert abs(float(gap) - found) < 0.00051 and abs(float(confidence) - s(found)) < 0.00051
            assert 2 * margin / 3 - 1e-6 < found < 2 * margin


# --- (c) label noise --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("margin", MARGINS)
@pytest.mark.parametrize("p", PROBABILITIES)
def test_c_stated_confidence_of_an_uncertain_pair(p, margin):
    found = s(2 * pair_optimum(p, margin))
    assert abs(found - stated(p, margin)) < 1e-6
    assert 0.5 < found < p  # under-confident, and never on the wrong side
    a = log(found / (1 - found)) / 2  # the doc's inverse: the label probability that a stated one means
    assert abs((s(2 * a) - s(-a - margin)) / (s(margin - a) - s(-a - margin)) - p) < 1e-4


def test_c_table_of_stated_confidence():
    header, rows = table("**Stated confidence.**")
    assert [float(name) for name in header] == list(PROBABILITIES)
    assert [float(name.removeprefix("m = ")) for name in rows] == list(MARGINS)
    for name, cells in rows.items():
        for p, cell in zip(PROBABILITIES, cells, strict=True):
            assert cell == f"{s(2 * pair_optimum(p, float(name.removeprefix('m = ')))):.3f}"


def test_c_no_pair_of_a_bradley_terry_ranking_is_overconfident():
    rng = np.random.default_rng(0)
    for _ in range(20):
        scores = rng.normal(0, rng.choice([1, 3]), rng.integers(3, 6))
        truth = 1 / (1 + np.exp(scores[None] - scores[:, None])) * (1 - np.eye(len(scores)))
        a = ranking_optimum(truth, rng.choice([1.0, 2.5, 5.0]))
        said = 1 / (1 + np.exp(a[None] - a[:, None]))
        assert (said < truth)[truth > 0.5].all()


# --- (d) the bound as a temperature -----------------------------------------------------------------------------------


def test_d_table_of_equivalent_temperatures():
    header, rows = table("**The bound as a temperature.**")
    for k, name in enumerate(header):
        m = float(name)
        assert rows["p near 1/2"][k] == f"{(1 + 2 * s(m) * s(-m)) / tanh(m / 2):.2f}"
        for p in (0.7, 0.9, 0.99):
            q = s(2 * pair_optimum(p, m))
            assert rows[f"p = {p:g}"][k] == f"{log(p / (1 - p)) / log(q / (1 - q)):.2f}"


def test_d_formula_near_one_half():
    for m in (1, 2.5, 6):
        p = 0.5001
        q = stated(p, m)
        assert abs(log(p / (1 - p)) / log(q / (1 - q)) / ((1 + 2 * s(m) * s(-m)) / tanh(m / 2)) - 1) < 1e-5


# --- the study --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_fit_temperature_is_the_minimum_of_the_nll(temperature):
    rng = np.random.default_rng(1)
    gap = rng.normal(0, 2, 4000)
    label = rng.random(4000) < 1 / (1 + np.exp(-gap / temperature))
    gap = np.where(label, gap, -gap)
    fitted = study.fit_temperature(gap)
    best = minimize_scalar(lambda t: np.logaddexp(0, -gap / t).mean(), bounds=(0.05, 50), options={"xatol": 1e-8})
    assert abs(fitted - best.x) < 1e-4 * best.x and abs(fitted / temperature - 1) < 0.1


def test_fit_temperature_stays_finite():
    assert study.fit_temperature(np.ones(5)) == pytest.approx(0.01)  # all right: as sure as allowed
    assert study.fit_temperature(-np.ones(5)) == pytest.approx(100)  # all wrong: as unsure as allowed


def test_fit_margin_is_the_advantage_model_of_least_nll():
    gaps = np.array([[1.0, 1.0], [0.1, 0.1], [4.0, -1.5], [0.4, 0.3]])  # means of log(1 + e^-gap): .31 .64 .86 .53
    assert study.fit_margin(gaps) == 3
    assert study.fit_margin(gaps[[3, 2, 1]]) == 2


def test_what_t_and_m_are_fitted_on_is_neither_trained_on_nor_tested_on(monkeypatch):
    """A stand-in for training, and one for scoring, write down what they see: 16 prompts, 4 prompts, 60 x 2 rankings."""
    seen = []
    settings = study.SMOKE | {"epochs": [1]}

    def train_scorers(ids, index, *_):
        seen.append((len(ids), index))

    def score_gaps(scorers, ids, index):
        seen.append((len(ids), index))
        return np.random.default_rng(len(seen)).normal(size=(4, len(index)))

    monkeypatch.setattr(study, "train_scorers", train_scorers)
    monkeypatch.setattr(study, "score_gaps", score_gaps)
    (run,) = study.study(settings, (5,))
    (trained, held_out, tested) = seen
    assert trained[0] == held_out[0] == 100 and tested[0] == 600  # texts
    assert set(trained[1].flatten().tolist()) == set(range(80)) and len(trained[1]) == 160
    assert set(held_out[1].flatten().tolist()) == set(range(80, 100)) and len(held_out[1]) == 40
    gaps = np.random.default_rng(2).normal(size=(4, 40))
    assert run["temperature"] == study.fit_temperature(gaps[0])
    assert run["fitted_m"] == settings["margins"][study.fit_margin(gaps) - 1]


def test_pairs_of_the_study_carry_their_probability_and_follow_it():
    rng = random.Random(0)
    prompt = prompts("list", "test")[0]
    (ranking,) = study.draw_rankings([prompt], 5, rng)
    task, _, texts, golds = ranking
    assert task == "list" and len(set(texts)) == 5
    wins = np.zeros((5, 5))
    for _ in range(2000):
        index, truth = study.draw_pairs([ranking], 0.5, rng)
        assert {tuple(sorted(pair)) for pair in index.tolist()} == set(combinations(range(5), 2))
        for (i, j), p in zip(index.tolist(), truth, strict=True):
            assert p == pytest.approx(s(0.5 * TASKS["list"].sharpness * (golds[i] - golds[j])))
            wins[i, j] += 1
    expected = [[preference_probability("list", 0.5 * x, 0.5 * y) for y in golds] for x in golds]
    assert np.abs(wins / 2000 - expected)[~np.eye(5, dtype=bool)].max() < 0.05


def test_words_of_prompt_and_response_have_ids_of_their_own_and_neighbours_tell_the_order():
    prompt = prompts("sort", "test")[0]
    digits = sorted(word for word in prompt.split() if word.isdigit())
    texts = [" ".join(digits), " ".join(digits[::-1])]
    one, other = (set(row.tolist()) for row in study.encode([("sort", prompt, texts, [0.0, 0.0])]))
    vocabulary = len(study.word_ids())
    assert {i for i in one if i <= 3 * vocabulary} == {i for i in other if i <= 3 * vocabulary}
    assert one != other
    assert max(one | other) < 3 * vocabulary + 1 + study.BUCKETS


def test_arms_trained_side_by_side_equal_arms_trained_alone():
    settings = study.SMOKE | {"margins": [1.0, 4.0]}
    rng = random.Random(3)
    ids = study.encode(rankings := study.draw_rankings(prompts("count", "train")[:12], 5, rng))
    index, _ = study.draw_pairs(rankings, 1.0, rng)
    together = study.score_gaps(study.train_scorers(ids, index, 2, 7, settings), ids, index)
    assert together.shape == (3, 120)
    for arm in range(3):
        torch.manual_seed(7)
        alone = study.Scorers(3 * len(study.word_ids()) + 1 + study.BUCKETS, 1, 16)
        # the same order of batches, and warmup_cosine worked out: 4 steps, no warm-up to speak of
        optimizer = torch.optim.AdamW(alone.parameters(), settings["learning_rate"], (0.9, 0.95), weight_decay=0.0)
        factors = [1.0, 1.0, 0.1 + 0.9 * 0.75, 0.1 + 0.9 * 0.25]
        orders = [batch for _ in range(2) for batch in torch.randperm(120).split(64)]
        for factor, batch in zip(factors, orders, strict=True):
            optimizer.param_groups[0]["lr"] = settings["learning_rate"] * factor
            a, b = alone(ids[index[batch, 0]])[:, 0], alone(ids[index[batch, 1]])[:, 0]
            loss = advantage_model_loss(a, b, settings["margins"][arm - 1]) if arm else reward_model_loss(a, b)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert np.allclose(study.score_gaps(alone, ids, index)[0], together[arm], atol=2e-3)
    assert np.abs(together[0] - together[1]).max() > 0.01


def test_measure_by_hand():
    # stated .75, .75 and .25 (that is .75 for the other); the truth .9, .5, .4
    gap = np.log([3.0, 3.0, 1 / 3])
    metrics = study.measure(gap, np.array([0.9, 0.5, 0.4]))
    assert metrics["accuracy"] == pytest.approx(200 / 3)
    assert metrics["overconfidence"] == pytest.approx(100 * (0.75 - (0.9 + 0.5 + 0.6) / 3))
    assert metrics["ece_vs_truth"] == pytest.approx(100 * (0.75 - 2 / 3))
    assert metrics["ece"] == pytest.approx(100 * (0.75 - 2 / 3))
    assert metrics["error_vs_truth"] == pytest.approx((0.15**2 + 0.25**2 + 0.15**2) / 3)


def test_smoke_study(tmp_path):
    study.main(study.Args(tmp_path, "smoke", (1, 2)))
    report = json.loads((tmp_path / "margin_study.json").read_text())
    assert (tmp_path / "margin.png").stat().st_size > 20_000 and report["settings"]["seeds"] == [1, 2]
    assert len(report["runs"]) == 4 and len(report["summary"]) == 2 and "versions" in report
    for run in report["runs"]:
        arms = run["arms"]
        assert arms["am_fitted"] == arms[f"am_{run['fitted_m']:g}"]
        assert arms["rm_scaled"]["accuracy"] == arms["rm"]["accuracy"]  # a temperature moves no pair
        assert arms["rm_scaled"]["mean_gap"] == pytest.approx(arms["rm"]["mean_gap"] / run["temperature"], rel=1e-3)
        assert arms["truth"]["nll"] < min(arm["nll"] for name, arm in arms.items() if name != "truth")
        assert arms["am_1"]["mean_gap"] < arms["am_2.5"]["mean_gap"] < arms["am_20"]["mean_gap"]
    assert sum(row["runs"] for row in report["by_temperature"]) == 4
    row, runs = report["summary"][0], [run["arms"] for run in report["runs"] if run["epochs"] == 1]
    differences = [arms["am_2.5"]["nll"] - arms["rm"]["nll"] for arms in runs]
    found = row["am_2.5 - rm"]["nll"]
    assert [found["low"], found["high"]] == pytest.approx([min(differences), max(differences)], abs=2e-6)
    assert found["mean"] == pytest.approx(sum(differences) / 2, abs=2e-6)


# --- the numbers of the doc's section (e) are those of the stored study ----------------------------------------------


def cell(found, decimals):
    text = f"{found['mean']:+.{decimals}f} ± {found['std']:.{decimals}f}"
    return (text + f" ({found['below_0']})").replace("-", "−")


def test_e_tables_are_the_stored_study_s():
    report = json.loads((ROOT / "docs/results/margin_study.json").read_text(encoding="utf-8"))
    _, rows = table("**Regimes (of 27)")
    assert list(rows) == list(report["verdicts"])
    for name, cells in rows.items():
        counts = [report["verdicts"][name][metric] for metric in ("ece", "brier", "nll")]
        assert cells == [f"{c['better']} / {c['worse']} / {c['unclear']}" for c in counts]
    _, rows = table("**By the T of the run's RM")
    for cells, group in zip(rows.values(), report["by_temperature"], strict=True):
        assert cells[:3] == [
            str(group["runs"]),
            f"{group['overconfidence']:+.1f}",
            "/".join(f"{m:g}" for m in group["best_m"]),
        ]
        assert cells[3:] == [
            cell(group["am_2.5 - rm"]["ece"], 1),
            cell(group["am_fitted - rm"]["nll"], 4),
            cell(group["am_fitted - rm_scaled"]["nll"], 4),
            cell(group["am_fitted - rm_scaled"]["ece"], 1),
            cell(group["am_fitted_scaled - rm_scaled"]["nll"], 4),
        ]


def test_e_stored_summary_follows_from_the_stored_runs():
    report = json.loads((ROOT / "docs/results/margin_study.json").read_text(encoding="utf-8"))
    settings = {k: v for k, v in report["settings"].items() if k != "seeds"}
    assert settings == study.FULL and len(report["runs"]) == 81
    for stored, found in zip(report["summary"], study.summarise(report["runs"]), strict=True):
        assert stored["fitted_m"] == pytest.approx(found["fitted_m"], abs=1e-5)
        for arm, rival in study.COMPARISONS:
            name = f"{arm} - {rival}"
            for metric, values in stored[name].items():
                assert values == pytest.approx(found[name][metric], abs=5e-6)
