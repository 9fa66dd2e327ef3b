"""miniature/study.py: matched KL by hand, the answers by their rules, and what its runs differ in."""

import json
from pathlib import Path

import pytest

from miniature.claims import CLAIMS, claims_page, read_study
from miniature.reproduce import SETTINGS, jobs_of_seed, run_name
from miniature.study import AT_TWO_BETAS, QUESTIONS, Args, answer_questions, fitted_at_kl, draw
from miniature.study import extra_jobs, main, markdown, questions_page
from utils import InputError

ROOT = Path(__file__).parents[1]


def run_of(*points):
    """[(KL, gold)] -> what reproduce.curve gives: step 0 first."""
    return [{"kl": kl, "gold": gold, "forget_gold": 1 - kl} for kl, gold in points]


def test_gold_at_a_kl_by_hand():
    """Points on .4 + d (1 - .5 d): the curve itself comes back, between them and beyond SFT's own point."""

    def gold(kl):
        return 0.4 + kl**0.5 * (1 - 0.5 * kl**0.5)

    start = (0.01, 0.4)
    curves = {str(b): run_of(start, *((kl * b, gold(kl * b)) for kl in (0.2, 0.9, 2.0))) for b in (0.5, 1.0)}
    assert fitted_at_kl(curves, 0.5) == pytest.approx(0.4 + 0.5**0.5 - 0.25)
    assert fitted_at_kl(curves, 2.0) == pytest.approx(gold(2.0))
    assert fitted_at_kl(curves, 2.1) is None
    # forget gold is 1 - KL = 1 - d^2: a = 0, b = 1
    assert fitted_at_kl({"1": run_of((0, 0.4), (1, 0), (4, 0))}, 2.0, "forget_gold") == pytest.approx(1 - 2.0)
    # off the curve: least squares of d (a - b d) = y - .4 through (1, 1) and (4, 2): a - b = .6, 2a - 4b = 1.6
    assert fitted_at_kl({"1": run_of(start, (1, 1.0), (4, 2.0))}, 2.25) == pytest.approx(0.4 + 1.5 * (0.4 + 0.2 * 1.5))


def seed_of(am, rescaled, forget):
    """Every arm's gold passes through its number at KL .5 and .4 + twice what it gains at KL 2: b = 0."""

    def both(gold):
        return dict.fromkeys(("0.05", "0.15"), run_of((0, 0.4), (0.5, gold), (2.0, 2 * gold - 0.4)))

    curves = dict.fromkeys(AT_TWO_BETAS, both(rescaled)) | {"AM-PPO": both(am)}
    arms = {arm.replace("/", "") for _, rule, pair in QUESTIONS.values() for arm in pair}
    net = {arm: {"main": 1.0, "forget": 0.0} for arm in arms}
    net["AM-PPO-SR"]["forget"] = forget
    return {"curves": curves, "net_win": net, "fitted_m": 5.0}


def test_answers_by_hand():
    """AM's gold .7, .8, .6 against .5: +.2, +.3, +.1, mean .2, t(2) = 4.303, std .1: .2 +- .248."""
    seeds = [seed_of(gold, 0.5, forget) for gold, forget in ((0.7, 9.0), (0.8, 10.0), (0.6, 11.0))]
    answers = answer_questions(seeds)
    assert answers["S1"]["of_seeds"] == pytest.approx([0.2, 0.3, 0.1])
    assert answers["S1"]["interval"] == pytest.approx([-0.0484, 0.4484], abs=1e-4)
    assert answers["S7"]["difference"] == pytest.approx(10) and answers["S7"]["interval"][0] > 0
    assert {a["verdict"] for a in answers.values()} == {"undecided"}  # three seeds decide nothing
    eight = [seed_of(0.7 + 0.001 * i, 0.5, -9.0 - i) for i in range(8)]
    answers = answer_questions(eight)
    assert {n: answers[n]["verdict"] for n in ("S1", "S4", "S10")} == {"S1": "yes", "S4": "no", "S10": "no"}


def test_forget_alone_is_no_success():
    """Better on forget and worse on main is undecided: the SFT policy itself would be."""
    seeds = [seed_of(0.7, 0.5, 9.0 + i) for i in range(8)]
    assert answer_questions(seeds)["S7"]["verdict"] == "yes"
    for i, seed in enumerate(seeds):
        seed["net_win"]["AM-PPO-SR"]["main"] = -5.0 - i
    assert answer_questions(seeds)["S7"]["verdict"] == "undecided"


def test_a_seed_whose_arm_never_reached_the_kl_leaves_it_undecided():
    seeds = [seed_of(0.7, 0.5, 0.0) for _ in range(8)]
    seeds[3]["curves"]["AM-PPO"] = {"0.05": run_of((0, 0.4), (0.3, 0.7))}
    answer = answer_questions(seeds)["S1"]
    assert answer["difference"] is None and answer["verdict"] == "undecided" and answer["of_seeds"][3] is None


def test_runs_differ_from_their_models_where_they_should_alone(tmp_path):
    base = {job.folder.name: job for job in jobs_of_seed(tmp_path, 3, SETTINGS["full"])}
    jobs = {job.folder.name: job for job in extra_jobs(tmp_path, 3, SETTINGS["full"])}
    assert not set(base) & set(jobs)

    def changed(name, model):
        a, b = jobs[name].args, base[model].args
        return {k: a[k] for k in a if not callable(a[k]) and a[k] != b.get(k)} | {k: None for k in b if k not in a}

    out = {"output_dir": str(tmp_path / "ppo RM-PPO w MA beta=0.15")}
    assert changed("ppo RM-PPO w MA beta=0.15", "ppo RM-PPO w MA") == out | {"kl_coef": 0.15}
    fitted = changed("ppo AM-PPO fitted m", "ppo AM-PPO")
    assert set(fitted) == {"output_dir", "reward_model_path"} and "am_fitted" in fitted["reward_model_path"]
    rows = changed("ppo AM-PPO-SR low scores", "ppo AM-PPO-SR")
    assert (
        set(rows) == {"output_dir", "rehearsal_dataset_name"}
        and "select_low_advantage" in rows["rehearsal_dataset_name"]
    )
    assert changed("select_low_advantage", "select_main")["criterion"] == "low_advantage"
    assert jobs["ppo RM-PPO averaged"].args["model_name_or_path"] == str(tmp_path / run_name("ppo", "RM-PPO") / "model")
    for job in jobs.values():  # everything that a run waits for is in the list, or finished before
        assert set(job.needs) <= set(jobs)


def test_pages(tmp_path):
    seeds = [seed_of(0.7, 0.6, f) for f in (1.0, 2.0, 4.0)]
    answers = answer_questions(seeds)
    page = questions_page(answers)
    assert page.count("| **undecided** |") == 10 and all(f"| {name} |" in page for name in QUESTIONS)
    claim = {"statistic": 1.0, "interval": None, "verdict": "reproduced", "rule": "r", "unit": "points"}
    page = claims_page(dict.fromkeys(CLAIMS, claim), (1, 2, 3))
    assert page.count("| +1 points | **reproduced** |") == 14 and all(f"| {name} |" in page for name in CLAIMS)
    assert "| AM-PPO-SR | +1.0 [+1.0, +1.0] | +2.3 [" in markdown(seeds)
    assert "| AM-PPO | 0.70 [0.70, 0.70] | 0.50 [0.50, 0.50] |" in markdown(seeds)  # at KL .5: gold .7, forget 1 - .5
    draw(seeds, tmp_path / "study.png")
    assert (tmp_path / "study.png").stat().st_size > 10_000


def test_seeds_are_given_once(tmp_path):
    with pytest.raises(InputError, match="each once"):
        main(Args(seeds=(1, 1), folder=str(tmp_path)))


def test_the_page_of_rules_has_every_claim_and_question_with_its_rule_and_verdict():
    page = (ROOT / "docs/results/rules.md").read_text(encoding="utf-8")
    for name, found in read_study()["claims"].items():
        claim, rule = CLAIMS[name]
        [row] = [line for line in page.splitlines() if line.startswith(f"| {name} | ")]
        assert row.startswith(f"| {name} | {claim} | ") and row.endswith(f" **{found['verdict']}** |")
        assert f"\n- **{name}** {rule}\n" in page
    answers = json.loads((ROOT / "docs/results/study.json").read_text(encoding="utf-8"))["answers"]
    assert questions_page(answers).split("\n\n")[0] in page
    assert all(rule.format(*"AB") in page for _, rule, _ in QUESTIONS.values())
