"""The whole chain at smoke scale: every script end to end, the promised results.json, and resume after a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from miniature import jobs, reproduce, world
from miniature.claims import CLAIMS, PPO_CLAIMS, beside_the_study, by_interval, decide_claims, expected
from miniature.claims import fig6_spread, in_words, over_seeds, read_study, statistics_of, study_of
from miniature.reproduce import ARMS, SETTINGS, jobs_of_seed, run_name
from tests.chat_templates import CHATML
from tests.check_results import check
from tests.test_data import jsonl, refused

ROOT = Path(__file__).parent.parent


def start(folder):
    flags = ["--scale", "smoke", "--output_dir", str(folder)]
    command = [sys.executable, "-m", "miniature.reproduce", *flags]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A reproduction that is killed while PPO runs, and started again: its folder and when each job ended."""
    folder = tmp_path_factory.mktemp("reproduction")
    process = start(folder)
    seed = folder / "seed_1"
    deadline = time.time() + 240
    while not (seed / "am" / "done.json").is_file() and process.poll() is None and time.time() < deadline:
        time.sleep(0.2)
    assert process.poll() is None, process.communicate()[0]
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    finished = {path: path.read_text() for path in seed.glob("*/done.json")}
    assert seed / "am" / "done.json" in finished
    assert not list(seed.glob("winrate*/done.json")), "it was done before it could be killed"
    resumed = start(folder)
    output = resumed.communicate(timeout=280)[0]
    assert resumed.returncode == 0, output
    return folder, finished


def test_a_killed_reproduction_goes_on_where_it_stopped(killed):
    folder, finished = killed
    for path, text in finished.items():
        assert path.read_text() == text, f"{path.parent.name} ran twice"  # done.json holds the seconds it took
    assert len(list((folder / "seed_1").glob("*/done.json"))) == len(jobs_of_seed(folder, 1, SETTINGS["smoke"]))


def test_results_have_the_promised_shape(killed):
    check(json.loads((killed[0] / "results.json").read_text()))


def test_a_resumed_job_gives_the_numbers_of_one_that_was_never_stopped(killed, tmp_path):
    """PPO again from the same inputs, in this process: the same metrics apart from times."""
    import ppo_sr

    run = killed[0] / "seed_1" / "ppo AM-PPO-SR"
    args = json.loads((run / "done.json").read_text())["args"]
    args |= {"output_dir": str(tmp_path / "again"), "eval_dataset_names": tuple(args["eval_dataset_names"])}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    ppo_sr.main(ppo_sr.Args(**args))
    torch.set_num_threads(threads)

    def metrics(folder):
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]

    assert metrics(run) == metrics(tmp_path / "again")
    assert "loss/rehearsal_nll" in metrics(run)[1]


def test_the_first_ratio_is_one_and_the_first_kl_zero(killed):
    """Old and new log-probs come from one function, one temperature, one mask, with dropout off."""
    rows = [json.loads(x) for x in (killed[0] / "seed_1" / "ppo RM-PPO" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["eval/prompts_test_main/kl"] == pytest.approx(0, abs=1e-4)
    assert rows[1]["objective/kl"] == pytest.approx(0, abs=1e-4)
    assert rows[1]["val/ratio"] == pytest.approx(1, abs=0.05)


def test_the_report_opens_from_disk(killed):
    page = (killed[0] / "report.html").read_text()
    assert all(f">{claim}<" in page for claim in CLAIMS) and "data:image/png;base64," in page


def test_another_setting_in_the_same_folder_is_refused(killed, capsys):
    folder = killed[0]
    stored = (folder / "config.json").read_text()
    with refused("other settings"):
        reproduce.main(reproduce.Args(scale="full", output_dir=str(folder)))
    assert (folder / "config.json").read_text() == stored


def test_arms_differ_in_what_they_name_and_in_nothing_else(tmp_path):
    """Same prompts, steps, rates and beta for every arm."""
    jobs = {j.folder.name: j.args for j in jobs_of_seed(tmp_path, 1, SETTINGS["full"]) if j.script == "ppo_sr"}
    allowed = {"output_dir", "reward_model_path", "moving_average_decay", "score_scale"}
    allowed |= {"rehearsal_dataset_name"}
    base = jobs["ppo RM-PPO"]
    assert len(jobs) == 8
    for name, args in jobs.items():
        if " c=" in name:  # Figure 6's other arms are shorter
            assert args.pop("total_steps") == 50
            args["total_steps"] = base["total_steps"]
        assert base["total_steps"] == 100
        assert {k for k in args | base if args.get(k) != base.get(k)} <= allowed


def test_verdicts_by_interval():
    assert by_interval([0.1, 0.2]) == "reproduced" and by_interval([-0.2, -0.1]) == "contradicted"
    assert by_interval([-0.1, 0.1]) == "undecided" and by_interval(None) == "undecided"
    assert by_interval([-0.4, 0.2], at=-0.5) == "reproduced"  # not worse than half a point


def test_interval_over_three_seeds_is_students_t():
    mean, (low, high) = over_seeds([1.0, 2.0, 3.0])  # std 1, standard error 1 / sqrt(3), t(2) = 4.3027
    assert mean == 2 and (low, high) == pytest.approx((2 - 4.30265 / 3**0.5, 2 + 4.30265 / 3**0.5), abs=1e-4)
    assert over_seeds([1.0, 2.0]) == (1.5, None)
    assert over_seeds([1.0, 2.0], [[0.0, 2.0], [1.0, 3.0]]) == (1.5, [0.5, 2.5])


def seed_like(rm_gold, am_net, rm_forget):
    """A seed's numbers with chosen outcomes, for the rules."""
    scorer = {"accuracy": 66.0, "bins": [{"count": 100, "confidence": 0.8, "accuracy": 0.7}]}
    under = {"accuracy": 66.0, "bins": [{"count": 100, "confidence": 0.7, "accuracy": 0.8}]}
    paired = {k: {"difference": 1.0, "low": 0.5, "high": 1.5} for k in ("accuracy", "ece", "separation")}

    def curve(gold):
        return [{"gold": 0.4, "proxy": 0.1}, {"gold": gold, "proxy": 0.5}]

    def cell(net):
        return {"win": 50 + net / 2, "lose": 50 - net / 2}

    return {
        "calibration": {"scorers": {"rm": scorer, "am": under}, "paired": {"am - rm": paired}, "pairs": 100},
        "score_balance": {
            "rm": {"spread_of_means": 0.9, "spread_of_stds": 0.3, "mean_within_std": 0.9},
            "am": {"spread_of_means": 0.15, "spread_of_stds": 0.3, "mean_within_std": 0.3},
        },
        "curves": {"RM-PPO": curve(rm_gold), "RM-PPO w/ MA": curve(0.6)},
        "table2": {
            "RM-PPO": {"main": cell(0), "forget": cell(rm_forget)},
            "AM-PPO": {"main": cell(am_net), "forget": cell(-2)},
            "AM-PPO-SR": {"main": cell(am_net + 2), "forget": cell(-2 - rm_forget / 10)},
        },
        "fig6": {"6": curve(0.5), "24": curve(0.5)},
        "foreign": {"SFT": 2.0, "RM-PPO": 9.0 + am_net, "AM-PPO": 3.0},
    }


def test_the_rules_of_the_claims_decide_as_they_are_written():
    seeds = [seed_like(0.30, 10, -30), seed_like(0.31, 11, -31), seed_like(0.29, 12, -29)]
    verdicts = {k: v["verdict"] for k, v in decide_claims(seeds).items()}
    assert verdicts == {
        "K1": "reproduced", "K2": "contradicted", "K3": "reproduced", "K4": "reproduced", "K5": "contradicted",
        "K6": "reproduced", "K7": "reproduced", "K8": "contradicted", "K9": "reproduced", "K10": "reproduced",
        "K11": "reproduced", "K12": "reproduced", "K13": "reproduced", "K14": "reproduced",
    }  # fmt: skip
    # gains on main 2, on forget 3, 3.1, 2.9; every seed alone is asked on the set that the whole study has
    k12 = decide_claims(seeds)["K12"]
    assert k12["set"] == "main" and k12["statistic"] == pytest.approx(2)
    assert statistics_of(seeds, "forget")["K12"] == pytest.approx([3.0, 3.1, 2.9])
    few = {k: v["verdict"] for k, v in decide_claims(seeds[:2]).items()}
    assert all(few[k] == "undecided" for k in PPO_CLAIMS)
    assert few["K1"] == "reproduced"  # decided by the prompts' intervals


def test_prediction_interval_by_hand():
    """Mean 2, std 1, t(2) = 4.3027: one more seed lies within 4.3027 sqrt(1 + 1 / 3), three within t sqrt(2 / 3)."""
    assert expected([1.0, 2.0, 3.0]) == pytest.approx([2 - 4.96833, 2 + 4.96833], abs=1e-4)
    assert expected([1.0, 2.0, 3.0], 3) == pytest.approx([2 - 3.51312, 2 + 3.51312], abs=1e-4)


def test_prediction_interval_holds_95_of_100_new_seeds():
    rng, hits = np.random.default_rng(1), []
    for _ in range(2000):
        *seen, new = rng.normal(size=9)
        low, high = expected(seen)
        hits.append(low <= new <= high)
    assert np.mean(hits) == pytest.approx(0.95, abs=0.015)


def test_a_seed_stands_where_the_others_let_expect():
    """Each of the study's seeds left out: 95 of 100 lie within what the others let expect."""
    hits = []
    for values in read_study()["statistics"].values():
        for i, value in enumerate(values):
            low, high = expected(values[:i] + values[i + 1 :])
            hits.append(low <= value <= high)
    assert len(hits) == 13 * 8 + 3  # three sweep over c
    assert 0.90 <= np.mean(hits) <= 0.99


def test_a_run_beside_the_study():
    seeds = [seed_like(0.30, 10, -30), seed_like(0.31, 11, -31), seed_like(0.29, 12, -29)]
    study = study_of(seeds)
    assert study["statistics"]["K7"] == pytest.approx([-0.1, -0.09, -0.11]) and len(study["curves"]) == 3
    assert study["claims"]["K7"]["verdict"] == "reproduced"
    # mean -.1, std .01: -.1 +- 4.3027 x .01 x 1.1547
    near, far = [seed_like(0.34, 10, -30)], [seed_like(0.36, 10, -30)]
    one = beside_the_study(decide_claims(near), study, near)["K7"]["study"]
    assert one["expected"] == pytest.approx([-0.14968, -0.05032], abs=1e-4)
    assert one["agrees"] and one["verdict"] == "reproduced"  # -.06
    other = beside_the_study(decide_claims(far), study, far)["K7"]["study"]
    assert other["agrees"] is False  # -.04
    # three new seeds: -.1 +- 4.3027 x .01 x sqrt(2 / 3); K13 has no sweep there, and so no verdict
    three = [near[0] | {"fig6": {}} for _ in range(3)]
    found = beside_the_study(decide_claims(three), study, three)
    assert found["K7"]["study"]["expected"] == pytest.approx([-0.13513, -0.06487], abs=1e-4)
    assert found["K7"]["study"]["agrees"] is False and found["K13"]["study"]["agrees"] is None


def test_what_was_seen_in_words():
    def curve(*golds, forget, proxy):
        return [
            {"step": 50 * i, "gold": g, "forget_gold": f, "proxy": p}
            for i, (g, f, p) in enumerate(zip(golds, forget, proxy, strict=True))
        ]

    curves = {
        "RM-PPO": curve(0.46, 0.2, 0.1, forget=(1, 0.9, 0.2), proxy=(0, 1, 1.5)),
        "AM-PPO": curve(0.46, 0.6, 0.53, forget=(1, 1, 0.97), proxy=(0, 1, 1.5)),
    }
    first, second = in_words(curves, {})
    assert "the score rose, from 0.00 to 1.50" in first and "fell, from 0.46 to 0.10. It hacked" in first
    assert "gold fell, from 1.00 to 0.20: it forgot" in first
    assert "it stayed much as it was, from 1.00 to 0.97" in second and "At step 50 gold on main was 0.60" in second
    claims = {f"K{i}": {"study": {"verdict": "reproduced", "agrees": i != 2}} for i in range(1, 4)}
    assert in_words(curves, claims)[2].startswith("Eight seeds reproduced 3 of the paper's 3 claims.")
    assert in_words(curves, claims)[2].endswith("but for K2.")
    healthy = in_words(curves | {"RM-PPO": curve(0.46, 0.5, 0.55, forget=(1, 1, 1), proxy=(0, 1, 1.5))}, {})
    assert "hacked" not in healthy[0] and "forgot" not in healthy[0]


def test_the_story_asks_for_both_falls_and_a_rise():
    from studies.story import shows_the_story

    def rows(gold, forget, proxy):
        return [{"gold": 0.4, "forget_gold": 1.0, "proxy": 0.0}, {"gold": gold, "forget_gold": forget, "proxy": proxy}]

    assert shows_the_story(rows(0.3, 0.9, 1.0), 0.05)
    assert not shows_the_story(rows(0.3, 0.9, -1.0), 0.05)
    assert not shows_the_story(rows(0.3, 0.96, 1.0), 0.05) and shows_the_story(rows(0.3, 0.96, 1.0), 0.0)
    assert not shows_the_story(rows(0.36, 0.9, 1.0), 0.05) and not shows_the_story(rows(0.4, 0.9, 1.0), 0.0)


def test_fig6_spread():
    assert fig6_spread(
        {"6": [{"proxy": 0.0}, {"proxy": 0.3}], "24": [{"proxy": 0.9}, {"proxy": 0.35}]}
    ) == pytest.approx(0.05)


def test_foreign_openings_by_hand():
    """Of four answers one opens like another task's; a ramble and a bare word are nobody's opening."""
    rows = [
        {"task": "capital", "response": "the capital of france is paris ."},
        {"task": "greet", "response": "the capital of anna is paris ."},
        {"task": "capital", "response": "good question , i say rome"},
        {"task": "greet", "response": "paris"},
    ]
    assert reproduce.foreign_openings(rows, "response") == 25.0


def test_the_miniature_has_batch_sizes_of_its_own(tmp_path):
    """The scripts' defaults are for real models, and other batches make other sums of floats."""
    from studies import failures, ppo_max

    sizes = {"am_train": (64, 128), "ppo_sr": (64, 256), "select_rehearsal": (None, 256)}
    jobs = [job for job in jobs_of_seed(tmp_path, 1, SETTINGS["full"]) if job.script in sizes]
    found = {(j.script, j.args.get("per_device_train_batch_size"), j.args["per_device_eval_batch_size"]) for j in jobs}
    assert found == {(script, *of) for script, of in sizes.items()}
    study = [job.args["flags"] for job in failures.jobs_of(failures.Args("out"))]
    study += [job.args for job in ppo_max.jobs_of(ppo_max.Args("out"), SETTINGS["full"])]
    assert all((f["per_device_train_batch_size"], f["per_device_eval_batch_size"]) == (64, 256) for f in study)


# --- jobs of hours, and a language model -------------------------------------------------------------
def test_a_killed_job_goes_on_at_its_checkpoint_and_leaves_none(tmp_path, monkeypatch):
    seen = []

    def script(args):
        seen.append((args.resume, sorted(path.name for path in tmp_path.glob("*/*"))))
        if len(seen) < 3:  # killed before its first checkpoint, and after it
            name = ("step_1", "state.pt")[len(seen) - 1]
            (tmp_path / "job" / "checkpoint").mkdir(exist_ok=True)
            (tmp_path / "job" / "checkpoint" / name).touch()
            if len(seen) == 2:  # two minutes after its begin
                later = json.loads((tmp_path / "job" / "begun.json").read_text())["at"] + 120
                os.utime(tmp_path / "job" / "checkpoint" / name, (later, later))
            raise KeyboardInterrupt

    module = SimpleNamespace(main=script, Args=lambda save_steps, resume=False: SimpleNamespace(resume=resume))
    monkeypatch.setitem(sys.modules, "resumable", module)
    job = jobs.Job(tmp_path / "job", "resumable", {"save_steps": 1})
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            jobs.run_job(job)
        assert not job.done()
    jobs.run_job(job)
    first = (False, ["begun.json", "log.txt"])
    assert seen == [first, first, (True, ["begun.json", "checkpoint", "log.txt"])]
    assert job.done() and not (tmp_path / "job" / "checkpoint").exists()
    assert 120 < json.loads((tmp_path / "job" / "done.json").read_text())["seconds"] < 130


def test_a_checkpoint_of_other_flags_is_not_resumed(tmp_path, monkeypatch):
    """Where --resume would refuse, the job begins anew."""
    seen = []

    def script(args):
        seen.append((args.save_steps, args.resume))
        (tmp_path / "job" / "checkpoint").mkdir()
        (tmp_path / "job" / "checkpoint" / "state.pt").touch()
        if len(seen) == 1:
            raise KeyboardInterrupt

    module = SimpleNamespace(
        main=script, Args=lambda save_steps, resume=False: SimpleNamespace(resume=resume, save_steps=save_steps)
    )
    monkeypatch.setitem(sys.modules, "changed", module)
    with pytest.raises(KeyboardInterrupt):
        jobs.run_job(jobs.Job(tmp_path / "job", "changed", {"save_steps": 1}))
    jobs.run_job(jobs.Job(tmp_path / "job", "changed", {"save_steps": 2}))
    assert seen == [(1, False), (2, False)]


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    """A tiny Llama with ChatML that has the words of the world in English."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("chat")
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    prompts = [x for task in world.TASKS for x in world.prompts(task, "train")]
    backend.train_from_iterator([world.in_english(t) for x in prompts for t in (x, world.reference(x))], trainer)
    names = {"bos_token": special[1], "eos_token": special[2], "pad_token": special[0]}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names, chat_template=CHATML)
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **sizes, **ids)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def test_a_language_model_learns_the_world_in_english(chat_model, tmp_path, capsys):
    """The cells of docs/real_model.ipynb, and so the whole chain at smoke scale from a chat model's folder."""
    prompts = [x for task in world.TASKS for x in world.prompts(task, "train")[:2]]
    rows = [
        {"prompt": world.asked(x, True), "chosen": world.in_english(world.reference(x)), "rejected": "A cow says moo!"}
        for x in prompts
    ]
    own = {"MODEL": str(chat_model), "SCALE": "smoke", "OUTPUT": tmp_path, "NUM_PAIRS": 8}
    own |= {name: jsonl(tmp_path / f"{name}.jsonl", *rows) for name in ("PAIRS", "TEST_PAIRS")}
    known = {}
    for cell in json.loads((ROOT / "docs/real_model.ipynb").read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and "%pip" not in source:
            exec(source, known)
            if "MODEL" in source and "OUTPUT =" in source:
                assert own.keys() <= known.keys()
                known |= own
    said, folder = capsys.readouterr().out, tmp_path / "world"
    assert json.loads((tmp_path / "calibration/calibration.json").read_text())["pairs"] == len(rows)

    results, details = (json.loads((folder / f"{name}.json").read_text()) for name in ("results", "details"))
    check(results)
    assert results["config"]["settings"]["model"] == details["model"] == str(chat_model)
    assert not any("study" in claim for claim in results["claims"].values())  # the toy's study is of another model
    [turns] = {json.dumps(row["prompt"][:1]) for row in jobs.read_jsonl(folder / "seed_1/world/sft.jsonl")}
    assert json.loads(turns) == [{"role": "system", "content": world.SYSTEM}]
    asked = {world.in_english(x) for task in world.TASKS for x in world.prompts(task, "test")}
    assert asked.issuperset(sample["prompt"] for sample in details["samples"])
    assert any(f"\n{prompt}\n  SFT " in said for prompt in asked)
    page = (folder / "report.html").read_text()
    assert "The world in English" in page and str(chat_model) in page and "<figure hidden>" in page
    assert not list(folder.glob("seed_1/*/checkpoint"))
    run = json.loads((folder / "seed_1/ppo AM-PPO/config.json").read_text())["args"]
    assert run["bf16"] and run["model_name_or_path"] == str(folder / "seed_1/sft/model")


def test_a_model_that_is_none_is_refused_before_the_first_job(tmp_path):
    with refused(str(tmp_path / "none")):
        reproduce.main(reproduce.Args(model=str(tmp_path / "none"), output_dir=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_full_settings_of_a_language_model_are_the_toys_but_for_what_it_needs(tmp_path):
    toy, lm = reproduce.settings_of("full"), reproduce.settings_of("full", "models/smollm2")
    assert toy == SETTINGS["full"] and "model" not in toy
    ppo = {arm: next(j for j in jobs_of_seed(tmp_path, 1, lm) if j.folder.name == run_name("ppo", arm)) for arm in ARMS}
    differ = {"output_dir", "reward_model_path", "score_scale", "moving_average_decay", "rehearsal_dataset_name"}
    shared = [{k: v for k, v in job.args.items() if k not in differ} for job in ppo.values()]
    assert all(args == shared[0] for args in shared)  # every arm: the same data, steps and rates
    [select] = [j.args for j in jobs_of_seed(tmp_path, 1, lm) if j.folder.name == "select_main"]
    assert "MiniLM" in select["embedding_model"] or (Path(select["embedding_model"]) / "modules.json").is_file()
    assert shared[0]["total_steps"] == 100 and shared[0]["kl_coef"] == SETTINGS["full"]["ppo"]["kl_coef"]
