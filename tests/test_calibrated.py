"""studies/calibrated.py: each use of scores on pairs whose true probability is known, and the rule by hand."""

import json
from dataclasses import replace

import numpy as np
import pytest

from studies import calibrated
from studies.calibrated import candidates, compare, fit_doubt, is_better, temperatures_by_task
from tests.test_data import refused
from utils import write_json, write_jsonl


def signed(rng, logit, factor):
    """Differences as a scorer states them, `factor` too large: its sign is right with probability s(|logit|)."""
    right = rng.random(len(logit)) < 1 / (1 + np.exp(-np.abs(logit)))
    return np.where(right, 1, -1) * np.abs(logit) * factor


def test_temperatures_by_task_find_each_tasks_factor():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 4000)) * 1.5
    delta = np.concatenate([signed(rng, logits[0], 3.0), signed(rng, logits[1], 0.5)])
    tasks = ["a"] * 4000 + ["b"] * 4000
    one, of = temperatures_by_task(delta, tasks, 0.0)
    assert of["a"] == pytest.approx(3, rel=0.1) and of["b"] == pytest.approx(0.5, rel=0.1) and 0.5 < one < 3
    assert temperatures_by_task(delta, tasks, 1e9)[1] == {"a": pytest.approx(one), "b": pytest.approx(one)}
    few = temperatures_by_task(delta[3990:4010], tasks[3990:4010], 10.0)[1]
    assert abs(np.log(few["a"] / of["a"])) < 2  # ten pairs are pulled to what all share


def test_doubt_lowers_what_the_scorers_disagree_on():
    """Half of the pairs are stated by noise alone: their variance is high, and they are worth nothing."""
    rng = np.random.default_rng(0)
    sure, variance = signed(rng, rng.normal(size=6000) * 2, 1.0), np.repeat([0.01, 4.0], 6000)
    mean = np.concatenate([sure, rng.normal(size=6000) * 2])
    t2, v = fit_doubt(mean, variance)
    scale = np.sqrt(t2 + v * variance)
    assert scale[0] == pytest.approx(1, rel=0.15) and scale[-1] > 5


def test_candidates_by_hand():
    held = {kind: np.array([[2.0, -1.0, 1.0, 0.5], [1.0, 1.0, -2.0, 1.0]]) for kind in ("RM", "AM")}
    test = {kind: np.array([[1.0, 3.0], [2.0, 1.0]]) for kind in ("RM", "AM")}
    found = candidates(held, test, ["a", "a", "b", "b"], ["a", "new"], 10.0)
    t = calibrated.fit_temperature(held["RM"][0])
    assert found["RM, one T"][0] == pytest.approx(np.array([1.0, 3.0]) / t)
    assert found["RM, T by task"][0][1] == pytest.approx(3.0 / t)  # a task without held-out pairs
    assert len(found["RM"]) == len(found["AM, T by task"]) == 2 and len(found["AM, ensemble"]) == 1
    ensemble = np.array([1.5, 2.0]) / calibrated.fit_temperature(held["RM"].mean(0))
    assert found["RM, ensemble"][0] == pytest.approx(ensemble)


def test_the_rule():
    """Lower ECE and NLL than both controls by intervals; one interval that holds 0 is not enough."""

    def entry(**changes):
        intervals = {f"{k} - {c}": [-0.2, -0.1] for k in ("ece", "nll") for c in (calibrated.AM, calibrated.CONTROL)}
        return {k: {"interval": v} for k, v in (intervals | changes).items()}

    assert is_better(entry())
    for key in entry():
        assert not is_better(entry(**{key: [-0.2, 0.01]})), key


def test_intervals_resample_prompts_and_lie_around_the_difference():
    rng = np.random.default_rng(1)
    logit = rng.normal(size=3000) * 2
    good = signed(rng, logit, 1.0)
    found = {
        name: [good * factor] for name, factor in (("better", 1.0), (calibrated.AM, 4.0), (calibrated.CONTROL, 0.2))
    }
    table = compare(found, [f"prompt {i // 3}" for i in range(3000)], 100)
    assert is_better(table["better"]) and not is_better(table[calibrated.AM])
    nll = table["better"][f"nll - {calibrated.AM}"]
    by_hand = np.logaddexp(0, -good).mean() - np.logaddexp(0, -4 * good).mean()
    assert nll["difference"] == pytest.approx(by_hand) and nll["interval"][0] < by_hand < nll["interval"][1]


def test_a_run_on_folders_of_the_bake_off(tmp_path, capsys):
    rng, folders = np.random.default_rng(0), []
    for name in ("one", "two", "three"):
        folder = tmp_path / name
        rows = [{"prompt": f"prompt {i // 2}", "task": "ab"[i % 2]} for i in range(300)]
        write_jsonl(folder / "eval.jsonl", rows)
        report = {"header": "700 training, 100 held-out, 200 test pairs", "args": {"seeds": [1, 2, 3, 4]}}
        write_json(folder / "bakeoff.json", report)
        for arm in ("RM", "AM_m=2.5"):
            for seed in (1, 2, 3, 4):
                chosen = signed(rng, rng.normal(size=300), 2.0).tolist()
                write_json(folder / f"{arm}_seed{seed}" / "scores.json", {"chosen": chosen, "rejected": [0.0] * 300})
        folders.append(str(folder))
    args = calibrated.Args(tuple(folders), str(tmp_path / "out"), num_bootstrap=20)
    calibrated.main(args)
    report = json.loads((tmp_path / "out" / "calibrated.json").read_text())
    assert set(report["better"]) == {"RM", "RM, T by task", "AM, one T", "AM, T by task"} | {
        f"{kind}, {use}" for kind in ("RM", "AM") for use in ("ensemble", "doubt")
    }
    assert "| RM, ensemble |" in capsys.readouterr().out
    with refused("--folders", "one name"):
        calibrated.main(replace(args, folders=(folders[0], folders[0])))
    alone = {kind: np.ones((2, 4)) for kind in ("RM", "AM")}
    assert "RM, T by task" not in candidates(alone, alone, ["all"] * 4, ["all"] * 4, 10.0)  # the two are one
    report = json.loads((tmp_path / "one" / "bakeoff.json").read_text())
    write_json(tmp_path / "one" / "bakeoff.json", report | {"args": {"seeds": [1, 2, 3]}})
    with refused("--folders", "3 seeds"):
        calibrated.main(args)
    with refused("--folders", "bakeoff.json"):
        calibrated.main(calibrated.Args((str(tmp_path),), str(tmp_path / "out")))
