"""miniature/stabilisers.py: its jobs are complete and can be parsed, its table by hand, at smoke scale its numbers."""

import json
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import pytest

from miniature import stabilisers
from miniature.reproduce import SETTINGS
from miniature.stabilisers import OFFLINE_ARMS, PPO_ARMS, SIZES
from utils import InputError


@pytest.fixture(scope="module", params=["full", "smoke"])
def jobs(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("jobs") / "seed_1"
    return stabilisers.extra_jobs(folder, 1, SETTINGS[request.param], SIZES[request.param])


def test_every_job_has_flags_that_its_script_takes(jobs):
    for job in jobs:
        name, _, args_class = job.script.partition(":")
        known = {f.name for f in fields(getattr(import_module(name), args_class or "Args"))}
        assert job.args.keys() <= known, job.folder.name
        assert job.folder in (Path(job.args["output_dir"]), Path(job.args["output_dir"]).parent)


def test_every_arm_is_a_job_and_what_it_needs_comes_before(jobs):
    names = [job.folder.name for job in jobs]
    assert len({*names}) == len(names)
    assert {f"ppo {arm}" for arm in (*PPO_ARMS, *OFFLINE_ARMS)} <= {*names}
    for place, job in enumerate(jobs):
        assert {*job.needs} <= {*names[:place]}, job.folder.name


def test_a_switch_that_is_off_is_in_the_flags(jobs):
    """None turns score normalisation off, and is not the same as no flag."""
    [args] = [job.args for job in jobs if job.folder.name == "ppo KL in the loss"]
    assert args["moving_average_decay"] is None and args["whiten_advantages"] is True


def test_what_the_search_found_is_for_an_arm_and_its_variants(tmp_path, monkeypatch):
    monkeypatch.setattr(stabilisers, "FOUND", stabilisers.FOUND | {"RAFT": 7e-4, "RLOO": 6e-4})
    made = stabilisers.extra_jobs(tmp_path, 1, SETTINGS["full"], SIZES["full"])
    of = {job.folder.name: job.args.get("learning_rate") for job in made}
    assert of["ppo RAFT"] == of["ppo RAFT, AM"] == 7e-4 != of["ppo ReST"]
    assert of["ppo RLOO, best rate"] == 6e-4 != of["ppo RLOO"] == of["ppo RLOO, AM"]  # PPO's arms share one


def test_what_the_search_found_is_the_best_of_its_record():
    """The rule, applied to the numbers that docs/results keeps."""
    found = json.loads(Path("docs/results/search_seed25.json").read_text())["arms"]
    for arm, rate in stabilisers.FOUND.items():
        golds = {float(r): of["second_half"] for r, of in found[arm].items()}
        assert golds[rate] == max(golds.values()), arm


def test_arms_share_steps_prompts_and_test_prompts(jobs):
    """No baseline gets less than ours: the same samples, steps and test prompts."""
    ppo = [job.args for job in jobs if job.folder.name.removeprefix("ppo ") in PPO_ARMS]
    for name in ("total_steps", "global_batch_size", "num_mini_batches", "num_ppo_epochs", "kl_coef", "dataset_name"):
        assert len({args[name] for args in ppo}) == 1, name
    others = [job.args for job in jobs if job.folder.name.removeprefix("ppo ") in OFFLINE_ARMS]
    for name in ("eval_dataset_names", "max_eval_prompts", "gold_reward", "model_name_or_path", "seed"):
        assert len({args[name] for args in (*ppo, *others)}) == 1, name
    sampled = {args["num_rounds"] * args["prompts_per_round"] * 4 for args in others if "num_rounds" in args}
    steps = ppo[0]["total_steps"] * ppo[0]["global_batch_size"]
    assert sampled == {steps} or steps == 2 * 16  # smoke


def points(*rows):
    return [dict(zip(("kl", "gold", "forget_gold"), row, strict=True), step=i) for i, row in enumerate(rows)]


def test_the_table_by_hand():
    """gold = .4 + .2 sqrt(KL), so that linear interpolation in sqrt(KL) is exact: .5414 at .5 and .6 at 1. On forget, where it
    is 1 - .2 KL, between KL .64 and 1.44 the value at 1, halfway in sqrt(KL), is (.872 + .712) / 2."""

    def gold(kl):
        return 0.4 + 0.2 * kl**0.5

    curve = points(*((kl, gold(kl), 1 - 0.2 * kl) for kl in (0.0, 0.25, 0.64, 1.44)))
    near = points((0.0, 0.4, 1.0), (0.2, 0.3, 0.9), (0.3, 0.2, 0.8))
    entry = {"tokens": 12_000, "minutes": 2.0}
    seeds = [{"PPO": entry | {"points": curve}, "near": entry | {"points": near}, "one": entry | {"points": curve}}]
    seeds.append({"PPO": entry | {"points": curve}, "near": entry | {"points": near}})
    found = stabilisers.statistics([seed["PPO"] for seed in seeds])
    assert found["main at 0.5"] == pytest.approx([0.4 + 0.2 * 0.5**0.5] * 2)
    assert found["main at 1"] == pytest.approx([0.6] * 2) and found["forget at 1"] == pytest.approx([0.792] * 2)
    assert found["helps"] == [True, True] and found["KL"] == [1.44] * 2
    table = stabilisers.table(seeds).splitlines()
    assert table[2].startswith("| PPO | 0.54") and table[3].startswith("| near | – | – | – | – |")
    assert len(table) == 4 and "| 2 of 2 | 12 | 2.0 |" in table[2] and "| 0 of 2 |" in table[3]


def test_answers_by_hand():
    """DPO keeps 1.0 on forget; RM-PPO, whose KL is .5 in the end, .5 and a little more in each seed."""
    entry = {"tokens": 0, "minutes": 1.0}
    seeds = []
    for i in range(8):
        dpo = points((0.0, 0.4, 1.0), (0.1, 0.5, 1.0), (0.6, 0.5, 1.0))
        ppo = points((0.0, 0.4, 1.0), (0.1, 0.5, 1.0), (0.5, 0.5, 0.5 + 0.01 * i))
        seeds.append({"DPO": entry | {"points": dpo}, "RM-PPO": entry | {"points": ppo}})
    found = stabilisers.answers_of(seeds)
    assert found["M10"]["difference"] == pytest.approx(0.465) and found["M10"]["verdict"] == "yes"
    best = {f"{arm}, best rate": seeds[0]["RM-PPO"] for arm in ("RM-PPO", "AM-PPO", "RLOO")}
    higher = entry | {"points": points((0.0, 0.4, 1.0), (0.1, 0.7, 1.0))}
    ended = stabilisers.answers_of([best | {"DPO": higher}] * 8)  # the last one counts, at any KL
    assert ended["M13"]["difference"] == pytest.approx(0.2) and ended["M14"]["difference"] == 0
    assert found["M11"]["difference"] is None and found["M11"]["verdict"] == "undecided"  # no such arm has run
    assert stabilisers.answers_of(seeds[:7])["M10"]["verdict"] == "undecided"
    page = stabilisers.study.questions_page(found, stabilisers.QUESTIONS)
    assert "| M10 | does DPO forget less than PPO? | DPO − RM-PPO | +0.465 [" in page
    kept = {"RM-PPO averaged": {"points": points((0.0, 0.4, 1.0), (0.1, 0.6, 0.9))}}
    kept[stabilisers.LOST] = {"points": points((0.0, 0.4, 1.0), (2.0, 0.3, 0.95))}
    rehearsed = stabilisers.answers_of([kept] * 8)
    assert rehearsed["M19"]["difference"] == pytest.approx(0.05) and rehearsed["M19"]["verdict"] == "yes"
    assert rehearsed["M20"]["difference"] == pytest.approx(-0.3) and rehearsed["M20"]["verdict"] == "no"
    for arm, gold in (("RM-PPO averaged", 0.7), (stabilisers.LOST, 0.9)):  # on all test prompts, where both are
        kept[arm]["tested"] = {"gold": gold, "forget_gold": gold}
        number = stabilisers.answers_of([kept] * 8)["M20"]["difference"]
        assert number == pytest.approx(-0.3 if arm == "RM-PPO averaged" else 0.2)
    known = {*PPO_ARMS, *OFFLINE_ARMS, "RM-PPO", "AM-PPO", "RM-PPO rescaled", "RM-PPO averaged"}
    assert all({*arms} <= known for *_, arms in stabilisers.QUESTIONS.values())


def test_the_page_of_rules_has_every_question_and_its_rule():
    page = (Path(__file__).parents[1] / "docs/results/rules.md").read_text(encoding="utf-8")
    for name, (question, rule, arms) in stabilisers.QUESTIONS.items():
        assert f"| {name} | {question} | {' − '.join(arms)} |" in page and rule.format(*"AB") in page


def test_tokens_of_samples_and_of_given_texts(tmp_path):
    def run(args, *rows):
        (tmp_path / "config.json").write_text(json.dumps({"args": args}))
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return stabilisers.tokens(tmp_path)

    rows = {"step": 0}, {"step": 1, "val/response_length": 8.0}, {"step": 2, "val/response_length": 10.0}
    assert run({"global_batch_size": 128}, *rows) == 128 * 18
    sampled = {"num_rounds": 2, "prompts_per_round": 5, "responses_per_prompt": 4, "global_batch_size": 3}
    assert run(sampled, *rows) == 20 * 18
    assert run({"global_batch_size": 64}, {"step": 0}, {"step": 1, "loss": 0.1}) == 0


def test_the_search_runs_each_arm_at_each_rate(tmp_path):
    first, jobs = stabilisers.search_jobs(tmp_path, 25, SETTINGS["full"], SIZES["full"])
    rates = {}
    for job in jobs:
        arm, found, rate = job.folder.name.removeprefix("ppo ").partition(" lr=")
        if found:
            rates.setdefault(arm, []).append(job.args["learning_rate"])
            assert Path(job.args["output_dir"]) == job.folder and float(rate) == job.args["learning_rate"]
    assert rates.keys() == stabilisers.SEARCHED.keys() and {*rates} & {*PPO_ARMS} and {*rates} & {*OFFLINE_ARMS}
    names = {job.folder.name for job in jobs}
    assert all({*job.needs} <= names for job in jobs)
    names = {job.folder.name for job in first}
    assert len(first) == 5 and all({*job.needs} <= names for job in first)
    assert {len({*of}) for of in rates.values()} == {3}


def test_some_arms_alone(tmp_path):
    """What they need and no more: SFT, both scorers, the pairs; of an ensemble its scorers, of a mean of weights its policy."""
    s = SETTINGS["full"]
    jobs = [*stabilisers.jobs_of_seed(tmp_path, 9, s), *stabilisers.study.extra_jobs(tmp_path, 9, s)]
    jobs += stabilisers.extra_jobs(tmp_path, 9, s, SIZES["full"])

    def names(*arms):
        return [job.folder.name for job in stabilisers.jobs_of_arms(jobs, arms)]

    first = {*stabilisers.FIRST}
    assert {*names("bounded, AM")} == first | {"ppo bounded, AM"}
    averaged = first | {"ppo RM-PPO", "ppo RM-PPO averaged", "winrate RM-PPO averaged"}
    assert {*names("RM-PPO averaged")} == averaged
    assert {*names("AM-PPO averaged, w = 0.75")} >= {"ppo AM-PPO", "ppo AM-PPO averaged, w = 0.75"}
    assert {*names("WARM")} == first | {"warm_start", "warm_1", "warm_2", "warm_3", "warm", "ppo WARM"}
    assert names(stabilisers.LOST)[-2:] == [f"ppo {stabilisers.LOST}", f"winrate {stabilisers.LOST}"]
    with pytest.raises(InputError, match="--arms: 'RM' is none"):
        names("RM")
