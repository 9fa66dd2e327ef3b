"""The weights of Eq. 8: log-probs against a plain loop over the softmax, estimators against hand-worked numbers."""

import json
import math

import numpy as np
import pytest
import torch
from tests.conftest import gpt2_config
from transformers import AutoModelForCausalLM

import sft
from miniature import world
from studies import importance as study
from tools import write_logprobs
from utils import InputError, render


@pytest.fixture(scope="module")
def other_folder(tokenizer, tmp_path_factory):
    """A second random policy."""
    folder = tmp_path_factory.mktemp("other")
    torch.manual_seed(7)
    AutoModelForCausalLM.from_config(gpt2_config(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def uniform_folder(tokenizer, tmp_path_factory):
    """A policy of zero weights: every token has probability 1 / vocabulary at every temperature."""
    folder = tmp_path_factory.mktemp("uniform")
    model = AutoModelForCausalLM.from_config(gpt2_config(tokenizer))
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


ROWS = [
    {"prompt": "the quick", "chosen": " brown fox", "rejected": " dog", "policy_chosen": "a", "policy_rejected": "b"},
    {"prompt": "my vow", "chosen": "", "rejected": " brown fox", "policy_chosen": "b@2", "policy_rejected": "a"},
    {"prompt": "the quick", "chosen": " dog", "rejected": " lazy dog jumps over my vow", "policy_chosen": "b",
     "policy_rejected": "b@2", "task": "kept"},
    {"prompt": [{"role": "user", "content": "judge"}], "chosen": [{"role": "assistant", "content": " fox"}],
     "rejected": " Sphinx", "policy_chosen": "nobody", "logprob_chosen": -3.25, "policy_rejected": "a"},
]  # fmt: skip


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run(tmp_path, rows, current, policies, **changes):
    """write_logprobs on `rows` -> the rows that it writes."""
    out = tmp_path / "out.jsonl"
    args = dict(dataset_name=write(tmp_path / "pairs.jsonl", rows), output_path=str(out), current_policy=current)
    write_logprobs.main(write_logprobs.Args(**args | dict(policies=policies, per_device_eval_batch_size=3) | changes))
    return [json.loads(line) for line in out.open()]


def looped_logprob(folder, tokenizer, prompt, response, temperature):
    """log pi(y | x) one token at a time: the whole softmax of an unpadded text, read, exponentiated, summed in Python."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    prompt_ids = tokenizer(render(tokenizer, prompt)).input_ids
    response_ids = [*tokenizer(response).input_ids, tokenizer.eos_token_id]
    total = 0.0
    for t, token in enumerate(response_ids):
        with torch.no_grad():
            logits = model(torch.tensor([prompt_ids + response_ids[:t]])).logits[0, -1].tolist()
        odds = [math.exp(logit / temperature) for logit in logits]
        total += math.log(odds[token] / sum(odds))
    return total


# --- tools/write_logprobs.py ------------------------------------------------------------------------------------------
def test_logprobs_are_those_of_a_plain_loop_under_every_policy(tokenizer, policy_folder, other_folder, tmp_path):
    specs = (f"a={policy_folder}", f"b={other_folder}@1.0", f"b@2={other_folder}@2")
    rows = run(tmp_path, ROWS, f"{policy_folder}@0.5", specs)
    where = {"a": (policy_folder, 1.0), "b": (other_folder, 1.0), "b@2": (other_folder, 2.0)}
    for given, row in zip(ROWS, rows, strict=True):
        for side in ("chosen", "rejected"):
            text = given[side] if isinstance(given[side], str) else given[side][-1]["content"]
            expected = {n: looped_logprob(f, tokenizer, given["prompt"], text, t) for n, (f, t) in where.items()}
            assert row[f"logprobs_{side}"] == pytest.approx(expected, abs=1e-4)
            own = given.get(f"logprob_{side}", expected.get(given[f"policy_{side}"]))
            assert row[f"logprob_{side}"] == pytest.approx(own, abs=1e-4)
            current = looped_logprob(policy_folder, tokenizer, given["prompt"], text, 0.5)
            assert row[f"current_logprob_{side}"] == pytest.approx(current, abs=1e-4)
    assert rows[3]["logprob_chosen"] == -3.25 and rows[2]["task"] == "kept"  # a given value stays, and so do fields
    assert abs(rows[0]["logprobs_chosen"]["a"] - rows[0]["logprobs_chosen"]["b"]) > 0.1  # the policies do differ


def test_a_uniform_policy_pays_log_vocabulary_for_every_token_and_the_end(tokenizer, uniform_folder, tmp_path):
    specs = (f"a={uniform_folder}", f"b={uniform_folder}", f"b@2={uniform_folder}@2")
    rows = run(tmp_path, ROWS[:3], uniform_folder, specs)
    for row in rows:
        for side in ("chosen", "rejected"):
            tokens = len(tokenizer(row[side]).input_ids) + 1  # the end of the sequence counts
            assert row[f"logprob_{side}"] == pytest.approx(-tokens * math.log(len(tokenizer)), rel=1e-6)
    assert rows[1]["logprob_chosen"] == pytest.approx(-math.log(len(tokenizer)), rel=1e-6)  # an empty response: its end


def test_every_distinct_text_is_scored_once(policy_folder, tmp_path, monkeypatch):
    seen = []

    def counted(model, ids, *rest):
        seen.extend(ids.tolist())
        return scored(model, ids, *rest)

    scored = write_logprobs.response_logprobs
    monkeypatch.setattr(write_logprobs, "response_logprobs", counted)
    specs = (f"a={policy_folder}", f"b={policy_folder}", f"b@2={policy_folder}@2")
    rows = run(tmp_path, [ROWS[0]] * 3 + [ROWS[2]], policy_folder, specs)
    assert len(seen) == 2 * 3  # three texts at two temperatures: the current policy and two names share one pass
    assert rows[0] == rows[1] == rows[2] and rows[0]["logprob_rejected"] == rows[3]["logprob_chosen"]


@pytest.mark.parametrize(
    "row, changes, words",
    [
        ({"policy_rejected": "c"}, {}, ["pairs.jsonl, line 2", "policy_rejected 'c'", "(a, b)", "c=FOLDER"]),
        ({"policy_chosen": None}, {}, ["pairs.jsonl, line 2", "'policy_chosen' and 'logprob_chosen' are missing"]),
        ({"logprob_chosen": 0.5}, {}, ["pairs.jsonl, line 2", "'logprob_chosen'", "0.5"]),
        ({"logprob_chosen": "low"}, {}, ["pairs.jsonl, line 2", "'logprob_chosen'", "'low'"]),
        (
            {"rejected": " my" * 200},
            {"max_length": 99},
            ["pairs.jsonl, line 2", "response", "room for 99", "--max_length"],
        ),
        ({"rejected": " my" * 70}, {}, ["--max_length", "128 positions"]),
        ({}, {"policies": ("a",)}, ["--policies a", "NAME=FOLDER"]),
        ({}, {"policies": ("a=x", "a=y")}, ["--policies a=y", "once"]),
        ({}, {"policies": ("a=x@hot",)}, ["--policies x@hot", "FOLDER@TEMPERATURE"]),
        ({}, {"current_policy": "x@0"}, ["--current_policy x@0", "positive"]),
        ({}, {"current_policy": "nowhere"}, ["nowhere", "CausalLM"]),
        ({}, {"output_path": "out.parquet"}, ["--output_path out.parquet", ".jsonl"]),
    ],
)
def test_bad_input_is_refused_in_one_line(row, changes, words, policy_folder, tmp_path):
    good = ROWS[0]
    changes = {"current_policy": policy_folder, "policies": (f"a={policy_folder}", f"b={policy_folder}")} | changes
    current, policies = changes.pop("current_policy"), changes.pop("policies")
    with pytest.raises(InputError) as error:
        run(tmp_path, [good, good | row], current, policies, **changes)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_a_policy_that_is_none_is_refused_before_another_one_scores(
    policy_folder, scorer_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(write_logprobs, "response_logprobs", None)
    policies = (f"a={policy_folder}", f"b={scorer_folder}")
    with pytest.raises(InputError, match="no language-model head"):
        run(tmp_path, ROWS[:1], policy_folder, policies)


def test_a_folder_may_hold_an_at_sign_before_its_last_part():
    assert write_logprobs.folder_and_temperature("a@b/model", "") == ("a@b/model", 1.0)
    assert write_logprobs.folder_and_temperature("a@b/model@1.4", "") == ("a@b/model", 1.4)


# --- studies/importance.py ----------------------------------------------------------------------------------------
def test_eq8_sum_by_hand():
    weights, rewards = np.array([[2.0, 0.5, 1.0, 3.0, 9.0]]), np.array([[1.0, -1.0, 0.5, 0.5, 9.0]])
    assert study.estimate(weights, rewards, 2).tolist() == [
        [0.75, 1.0]
    ]  # (2 - 0.5)/2, (0.5 + 1.5)/2; the fifth is left
    assert study.estimate(weights, rewards, 2, self_normalised=True).tolist() == [[1.5 / 2.5, 2.0 / 4.0]]
    table = [["a", "b", "a", "c", "c", "c"]]
    assert study.distinct_mean(table, np.array([[1.0, 0.0, 1.0, 5.0, 5.0, 5.0]]), 3).tolist() == [[0.5, 5.0]]


def test_eq8_sum_is_exact_in_expectation_and_what_bounds_a_weight_is_not():
    """Two responses of which pi_phi writes the better in 9 of 10 cases and pi' in 1 of 10; all draws enumerated."""
    rewards, current = np.array([1.0, -1.0]), np.log([0.9, 0.1])
    behaviour, draws = (np.log([0.1, 0.9]), np.array([[0] + [1] * 9]))  # ten draws as pi' makes them on average
    truth, error = np.array([0.8]), np.zeros(1)  # 0.9 - 0.1
    table, settings = [[(0, 0), *[(1, 1)] * 9]], {"responses": [1], "resamples": 3, "seed": 1}
    report = study.measure(table, rewards[draws], current[draws], behaviour[draws], truth, error, settings)
    # with 0.8 less on every reward, 0.2 and -1.8: nothing moves but what has no mean weight of 1, as 0.04 - 0.18 at clip 2
    centred = {name: stats["bias"] for name, stats in report["centred"]["K=1"].items()}
    report = report["gold"]
    bias = {name: stats["bias"] for name, stats in report["K=1"].items()}
    # w = 9 and 1/9: plain 0.1 * 9 - 0.9 / 9; clipped at 2 0.1 * 2 - 0.1; w^(1/2) = 3 and 1/3: 0.3 - 0.3
    expected = {"unweighted": -1.6, "plain": 0.0, "clip 10": 0.0, "clip 2": -0.7, "length": -0.8}
    expected |= {"self-normalised": -1.6, "distinct": -1.6}
    assert bias == pytest.approx(expected, abs=1e-12)
    assert centred == pytest.approx(expected | {"clip 2": -0.14, "length": 0.06 - 0.54}, abs=1e-12)
    assert report["K=1"]["plain"]["variance"] == pytest.approx(10 / 9 * (8.1 + 0.9 / 81 - 0.64))
    assert report["K=1"]["plain"]["rmse"] == pytest.approx(math.sqrt(8.1 + 0.9 / 81 - 0.64))
    assert report["K=1"]["unweighted"]["rmse_less_unweighted"] == 0


def test_effective_sample_and_mean_weights_by_hand():
    log_current, log_behaviour = np.log([[0.8, 0.2, 0.2, 0.2]]), np.log([[0.2, 0.2, 0.2, 0.2]])
    settings = {"responses": [2], "resamples": 3, "seed": 1}
    table, rewards = [[(1, 2), (3,), (4,), (5,)]], np.zeros((1, 4))
    report = study.measure(table, rewards, log_current, log_behaviour, np.zeros(1), np.zeros(1), settings)
    assert report["effective_sample_share"] == pytest.approx(49 / (4 * 19))  # weights 4, 1, 1, 1
    expected = {"unweighted": 1, "plain": 7 / 4, "clip 10": 7 / 4, "clip 2": 5 / 4, "length": 5 / 4}  # 4^(1/2) = 2
    assert report["mean_weight"] == pytest.approx(expected)
    assert report["share_of_weights_above"] == {"10": 0, "2": 0.25, "0.1": 1}
    assert sum(report["log10_weight_histogram"]) == 4


def test_squared_error_is_free_of_the_noise_of_the_truth():
    rng = np.random.default_rng(0)
    truth = 0.3 + rng.normal(size=(4000, 5)).mean(1)  # five draws of variance 1: known to within 1/5
    bias, variance, squared = study.errors(0.5 + 2 * rng.normal(size=(4000, 20)), truth, np.full(4000, 1 / 5))
    assert bias.mean() == pytest.approx(0.2, abs=0.03) and variance.mean() == pytest.approx(4, rel=0.03)
    assert squared.mean() == pytest.approx(0.04 + 4, rel=0.03)


@pytest.mark.parametrize(
    "rmses, kl, between",
    [
        ([1.0, 2.0, 0.5], 1.0, [0.0, 1.0]),  # worse at the nearest policy: what comes later does not count
        ([1.0, 0.5, 2.0], 2.0, [1.0, 3.0]),  # log-ratio -1 at 1 nat, +1 at 3, in units of log 2
        ([1.0, 0.25, 2.0], 1 + 2 * 2 / 3, [1.0, 3.0]),
        ([1.1, 0.5, 2.0], 2.0, [1.0, 3.0]),  # at no divergence only noise tells them apart
    ],
)
def test_pays_until_by_hand(rmses, kl, between):
    expected = {"kl": pytest.approx(kl), "between": between}
    assert study.pays_until([0.0, 1.0, 3.0], rmses, [1.0, 1.0, 1.0]) == expected
    assert study.pays_until([0.0, 1.0, 3.0], [1.0, 0.5, 0.25], [1.0, 1.0, 1.0]) is None  # pays as far as was looked


@pytest.fixture(scope="module")
def seed_folder(tmp_path_factory):
    """What the study reads of a folder of reproduce.py, with a policy that has seen 256 demonstrations."""
    folder = tmp_path_factory.mktemp("seed")
    world.main(world.Args(output_dir=str(folder / "world"), demos_per_prompt=1))
    lines = (folder / "world" / "sft.jsonl").read_text().splitlines(keepends=True)[:256]
    (folder / "world" / "sft.jsonl").write_text("".join(lines))
    sizes = dict(num_layers=1, hidden_size=32, num_heads=2, max_length=64, global_batch_size=32, learning_rate=1e-2)
    names = dict(dataset_name=str(folder / "world" / "sft.jsonl"), output_dir=str(folder / "sft"))
    sft.main(sft.Args(**sizes, **names, tokenizer_name_or_path=str(folder / "world" / "tokenizer")))
    return folder


def test_smoke_study(seed_folder, tmp_path):
    args = study.Args(folder=seed_folder, output_dir=tmp_path / "out", scale="smoke")
    args.alternates = (f"again={seed_folder / 'sft' / 'model'}",)
    study.main(args)
    report = json.loads((tmp_path / "out" / "importance_study.json").read_text())
    assert (tmp_path / "out" / "importance.png").stat().st_size > 10_000
    same, hot, young, again = report["policies"]
    assert [p["name"] for p in report["policies"]] == ["hot, 1", "hot, 1.5", "young, 64", "again"]
    for policy in (same, again):  # pi_phi itself: every weight is 1 and every estimator the same
        assert policy["kl"] < 1e-5 and policy["effective_sample_share"] == pytest.approx(1, abs=1e-6)
        assert policy["mean_weight"] == pytest.approx(dict.fromkeys(study.WEIGHTS, 1), abs=1e-4)
        for label in ("gold", "centred"):
            rmses = [s["rmse"] for n, s in policy[label]["K=4"].items() if n != "distinct"]
            assert rmses == pytest.approx([rmses[0]] * 6, abs=1e-4)
    assert 0.05 < hot["kl"] < young["kl"] and hot["effective_sample_share"] < 0.9
    for policy in report["policies"]:
        for estimator in ("unweighted", "self-normalised", "distinct"):  # the zero of the reward is nothing to them
            for size in ("K=1", "K=4"):
                one, two = (policy[label][size][estimator]["rmse"] for label in ("gold", "centred"))
                assert one == pytest.approx(two, abs=1e-9)
        one, two = (policy["gold"]["K=1"][estimator] for estimator in ("self-normalised", "unweighted"))
        assert (one["bias"], one["rmse"]) == pytest.approx((two["bias"], two["rmse"]))
        for statistics in policy["gold"]["K=4"].values():
            low, high = statistics["rmse_interval"]
            assert low <= statistics["rmse"] <= high
    assert set(report["pays_until"]["gold"]["hot"]["K=4"]) == set(study.COLORS) - {"unweighted"}
    mean, std = report["expected_reward"]["mean"], report["expected_reward"]["std_over_prompts"]
    zero = report["rmse_of_answering_zero"]
    assert zero["gold"] ** 2 - zero["centred"] ** 2 == pytest.approx(mean**2) and zero["centred"] < std
    assert {"versions", "commit", "machine", "settings"} <= set(report)


def test_study_refuses_a_folder_that_reproduce_did_not_write(tmp_path):
    with pytest.raises(InputError, match=r"--folder .* is missing"):
        study.main(study.Args(folder=tmp_path, output_dir=tmp_path))
