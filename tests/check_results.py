"""`python -m tests.check_results results/smoke/results.json`: the shape that readers of results.json rely on."""

import json
import math
import sys

ARMS = {"RM-PPO", "RM-PPO w/ MA", "RM-PPO rescaled", "AM-PPO", "AM-PPO-SR"}
TOP = {
    "table1",
    "score_balance",
    "table2",
    "curves",
    "fig6",
    "seeds",
    "config",
    "seconds",
    "claims",
    "in_words",
}


def check(results):
    assert set(results) == TOP, set(results) ^ TOP
    for scorer in ("rm", "am"):
        assert set(results["table1"][scorer]) == {"accuracy", "ece", "ece_vs_truth", "brier", "nll"}
        assert set(results["score_balance"][scorer]) == {
            "spread_of_means",
            "spread_of_stds",
            "mean_within_std",
        }
        assert all(
            math.isfinite(v)
            for v in [
                *results["table1"][scorer].values(),
                *results["score_balance"][scorer].values(),
            ]
        )
        assert 0 <= results["table1"][scorer]["ece"] <= 50 and 0 <= results["table1"][scorer]["accuracy"] <= 100
    assert set(results["table2"]) == set(results["curves"]) == ARMS
    for sets in results["table2"].values():
        assert set(sets) == {"main", "forget"}
        for cell in sets.values():
            assert set(cell) == {"win", "lose", "tie", "intervals"}
            assert abs(cell["win"] + cell["lose"] + cell["tie"] - 100) < 1e-6
            for verdict, (low, high) in cell["intervals"].items():
                assert low <= cell[verdict] + 1e-9 and cell[verdict] <= high + 1e-9
    for rows in results["curves"].values():
        assert rows[0]["step"] == 0 and abs(rows[0]["kl"]) < 1e-4, "the policy starts at the SFT policy"
        assert len(rows) > 1 and all(set(r) == {"step", "gold", "proxy", "kl", "length", "forget_gold"} for r in rows)
    assert set(results["claims"]) == {f"K{i}" for i in range(1, 15)}
    for claim in results["claims"].values():
        assert set(claim) - {"study", "set"} == {"verdict", "statistic", "interval", "rule", "unit"}
        assert claim["verdict"] in ("reproduced", "contradicted", "undecided")
    assert results["seeds"] and all(v >= 0 for v in results["seconds"].values())


if __name__ == "__main__":
    check(json.load(open(sys.argv[1])))
    print(f"{sys.argv[1]}: as promised")
