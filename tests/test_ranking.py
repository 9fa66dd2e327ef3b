"""baselines/ranking.py: rankings rebuilt from pairs, RRHF and PRO by hand and by plain loops, a run and its resumption."""

import itertools
import json
import math
import random
from math import exp, log

import pytest
import torch
from transformers import AutoModelForCausalLM

from baselines.ranking import Args, best_nll, main, order_accuracy, pro_loss, ranking_loss, rebuild_rankings, rrhf_loss
from tests.test_am_train import Stopped, metrics_of, same_weights, stop_after
from tests.test_data import jsonl, refused
from utils import load_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


def pair(chosen, rejected, prompt="x"):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def all_pairs(*answers, prompt="x"):
    """Every pair of a ranking, best first."""
    return [pair(*two, prompt) for two in itertools.combinations(answers, 2)]


# --- rankings from pairs ----------------------------------------------------------------------------------------------


def rebuilt(rows):
    """{prompt: [{answer: r}]}"""
    found = {}
    for ranking in rebuild_rankings(rows, "pairs.jsonl"):
        found.setdefault(str(ranking["prompt"]), []).append(dict(zip(ranking["answers"], ranking["r"], strict=True)))
    return found


def test_the_pairs_of_a_ranking_give_it_back_in_any_order(capsys):
    rows = all_pairs("a", "b", "c", "d") + all_pairs("d", "a", prompt="y")
    for seed in range(5):
        random.Random(seed).shuffle(rows)
        assert rebuilt(rows) == {"x": [{"a": 3, "b": 2, "c": 1, "d": 0}], "y": [{"d": 1, "a": 0}]}
    said = capsys.readouterr().out
    assert "7 pairs, 2 rankings of up to 4 answers" in said and "left out" not in said


def test_answers_that_no_pair_links_are_another_ranking():
    """b > c comes last and links two of the three."""
    rows = [pair("a", "b"), pair("c", "d"), pair("e", "f"), pair("b", "c")]
    chain, alone = rebuilt(rows)["x"]
    assert chain == {"a": 3, "b": 1.5, "c": 1.5, "d": 0}  # a share of a half each: an estimate
    assert alone == {"e": 1, "f": 0}


def test_two_rankings_that_share_an_answer_are_one():
    """a > b > c and b > d: b wins 2 of 3, and K - 1 = 3."""
    assert rebuilt([*all_pairs("a", "b", "c"), pair("b", "d")]) == {"x": [{"a": 3, "b": 2, "c": 0, "d": 0}]}


def test_ties_and_cycles(capsys):
    both_ways = [pair("a", "b"), pair("b", "a"), pair("a", "c"), pair("b", "c")]
    assert rebuilt(both_ways) == {"x": [{"a": 2 * 2 / 3, "b": 2 * 2 / 3, "c": 0}]}
    assert "2 pairs are ties" in capsys.readouterr().out
    cycle = [pair("a", "b", "y"), pair("b", "c", "y"), pair("c", "a", "y"), pair("a", "a", "y")]
    assert rebuilt(both_ways + cycle).keys() == {"x"}
    assert "left out: 1 pairs of equal sides, 1 rankings without an order\n5 pairs are ties" in capsys.readouterr().out
    two_to_one = [pair("a", "b"), pair("a", "b"), pair("b", "a")]
    assert rebuilt(two_to_one) == {"x": [{"a": 2 / 3, "b": 1 / 3}]}
    assert "1 pairs are ties or turned round" in capsys.readouterr().out


def test_a_prompt_of_messages():
    turns = [{"role": "user", "content": "Hi"}]
    [ranking] = rebuild_rankings([pair("v", "v", "z"), pair("a", "b", turns)], "f.jsonl")
    assert ranking["prompt"] == turns and ranking["where"] == "f.jsonl, line 2"


# --- losses -----------------------------------------------------------------------------------------------------------

P, R = torch.tensor([-1.0, -3.0, -2.0]), torch.tensor([0.0, 2.0, 1.0])  # the best one is the unlikeliest


def test_rrhf_by_hand():
    """Best -3, then -2, then -1: 1 + 2 + 1. In the right order nothing; equals are not compared."""
    assert rrhf_loss(P, R).item() == 4
    assert rrhf_loss(P, -R).item() == 0
    assert rrhf_loss(P, torch.tensor([0.0, 1.0, 0.0])).item() == 3
    p = P.clone().requires_grad_()
    rrhf_loss(p, R).backward()
    assert p.grad.tolist() == [2, -2, 0], "the middle one is pushed up by one pair and down by the other"


def test_pro_by_hand():
    """p = log 1, log 2, log 3 for r = 2, 1, 0: -log(1/6) - log(2/5)."""
    p, r = torch.tensor([1.0, 2.0, 3.0]).log(), torch.tensor([2.0, 1.0, 0.0])
    assert pro_loss(p, r).item() == pytest.approx(log(6) + log(5 / 2))
    assert pro_loss(p, r, top_k=1).item() == pytest.approx(log(6))
    assert pro_loss(p, r, top_k=2).item() == pro_loss(p, r).item()
    # two are best: each is held against the third alone, -log(1/4) - log(2/5)
    tied = torch.tensor([2.0, 2.0, 0.0])
    assert pro_loss(p, tied).item() == pytest.approx(log(4) + log(5 / 2))
    assert pro_loss(p, tied, top_k=1).item() == pytest.approx(log(4) + log(5 / 2)), "both are among the best one"
    # 1 / T: 2 for the best against the last, 1 for the others; the best one's own p gets the 2
    by_hand = log(1 + 2 + 9) + log((2 + 3) / 2)
    assert pro_loss(p, r, temperatures=True).item() == pytest.approx(by_hand)


def test_a_pair_is_logistic_regression():
    """K = 2: -log s(p_chosen - p_rejected), whatever the temperature."""
    p, r = torch.tensor([0.3, -0.4]), torch.tensor([1.0, 0.0])
    for temperatures in (False, True):
        assert pro_loss(p, r, temperatures=temperatures).item() == pytest.approx(log(1 + exp(-0.7)))


def loops(p, r, top_k, temperatures):
    """Both losses as the papers write them, for a ranking without ties: sums over sorted answers."""
    order = sorted(range(len(p)), key=lambda i: -r[i])
    p, r, n = [p[i] for i in order], [r[i] for i in order], len(p)
    rrhf = sum(max(0.0, p[i] - p[j]) for i in range(n) for j in range(n) if r[i] < r[j])
    pro = 0.0
    for k in range(min(n - 1, top_k or n)):
        T = {i: 1 / (r[k] - r[i]) if temperatures else 1.0 for i in range(k + 1, n)}
        T[k] = min(T.values())
        pro -= log(exp(p[k] / T[k]) / sum(exp(p[i] / T[i]) for i in range(k, n)))
    return rrhf, pro


@pytest.mark.parametrize("temperatures", [False, True])
@pytest.mark.parametrize("top_k", [0, 1, 3])
def test_losses_against_loops(top_k, temperatures):
    torch.manual_seed(0)
    for size in range(2, 8):
        p, r = torch.randn(size, dtype=torch.float64), torch.randperm(size).double()
        rrhf, pro = loops(p.tolist(), r.tolist(), top_k, temperatures)
        assert rrhf_loss(p, r).item() == pytest.approx(rrhf)
        assert pro_loss(p, r, top_k, temperatures).item() == pytest.approx(pro)


def test_gradients_are_finite_at_extremes():
    p = torch.tensor([-80.0, 0.0, -1e4], requires_grad=True)
    for temperatures in (False, True):
        pro_loss(p, torch.tensor([2.0, 1.0, 0.0]), 0, temperatures).backward()
    assert p.grad.isfinite().all()


def test_nll_and_accuracy_by_hand():
    assert best_nll(torch.tensor([-4.0, -9.0]), torch.tensor([0.0, 1.0])).item() == 9
    assert best_nll(torch.tensor([-4.0, -9.0, -1.0]), torch.tensor([2.0, 2.0, 0.0])).item() == 6.5
    assert order_accuracy(P, R).item() == 0 and order_accuracy(P, -R).item() == 1
    assert order_accuracy(P, torch.tensor([1.0, 0.0, 2.0])).item() == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("loss", "expected", "slope"), [("rrhf", 1.0, 1.0), ("pro", log(1 + exp(1)), 1 / (1 + exp(-1)))]
)
def test_p_is_a_mean_and_the_nll_a_sum(loss, expected, slope):
    """-6 over 3 tokens is better than -2 over 2 by the ranking: p = -2 and -1; the NLL is 6, and counts half."""
    args = Args(model_name_or_path="", dataset_name="", output_dir="", loss=loss, sft_coef=0.5)
    logprobs = torch.tensor([-6.0, -2.0], requires_grad=True)
    parts = ranking_loss(args, logprobs, torch.tensor([3, 2]), torch.tensor([1.0, 0.0]))
    assert parts.tolist() == pytest.approx([expected + 3, expected, 6, 0])
    parts[0].backward()
    assert logprobs.grad.tolist() == pytest.approx([-slope / 3 - 0.5, slope / 2])


# --- a run ------------------------------------------------------------------------------------------------------------

ANSWERS = ("the quick fox", "brown dog", "lazy", "over the jumps while", "black quartz")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Six rankings of two to five answers, their pairs shuffled; and prompts to answer."""
    folder, rows = tmp_path_factory.mktemp("data"), []
    for i, prompt in enumerate(("the", "quick brown", "fox", "dog over", "my vow", "times")):
        rows += all_pairs(*random.Random(i).sample(ANSWERS, 2 + i % 4), prompt=prompt)
    random.Random(0).shuffle(rows)
    pairs = jsonl(folder / "pairs.jsonl", *rows)
    return {"pairs": pairs, "main": jsonl(folder / "main.jsonl", *({"prompt": p} for p in ("the", "fox")))}


def args_for(policy, data, out, **changes):
    flags = {"model_name_or_path": policy, "dataset_name": data["pairs"], "output_dir": str(out)}
    flags |= {"learning_rate": 1e-3, "global_batch_size": 4, "per_device_train_batch_size": 3, "response_length": 6}
    flags |= {"eval_dataset_names": (data["main"],), "gold_reward": "tests.test_ranking:length", "max_length": 40}
    return Args(**flags | {"num_train_epochs": 2, "eval_steps": 3} | changes)


def length(prompts, responses):
    return [len(response) / 100 for response in responses]


def alone(folder, prompt, answer):
    """log pi(y | x) of one answer, by the model's own logits, and its tokens."""
    tokenizer, model = load_tokenizer(folder), AutoModelForCausalLM.from_pretrained(folder)
    x, y = tokenizer(prompt).input_ids, [*tokenizer(answer).input_ids, tokenizer.eos_token_id]
    with torch.no_grad():
        logprobs = model(torch.tensor([x + y])).logits[0].log_softmax(-1)
    return sum(logprobs[len(x) - 1 + t, token].item() for t, token in enumerate(y)), len(y)


@pytest.mark.parametrize("loss", ["rrhf", "pro"])
def test_the_first_loss_by_single_answers(loss, policy_folder, data, tmp_path):
    """The whole file in one step: a mean over six rankings, whatever K they have."""
    flags = {"loss": loss, "sft_coef": 0.3, "global_batch_size": 6, "num_train_epochs": 1, "eval_dataset_names": ()}
    main(args_for(policy_folder, data, tmp_path, **flags))
    rankings = rebuild_rankings([json.loads(line) for line in open(data["pairs"])], "")
    expected = []
    for ranking in rankings:
        logprobs, lengths = zip(*(alone(policy_folder, ranking["prompt"], y) for y in ranking["answers"]), strict=True)
        p = [a / b for a, b in zip(logprobs, lengths, strict=True)]
        nll = -logprobs[max(range(len(p)), key=lambda i: ranking["r"][i])]
        expected.append((loops(p, ranking["r"], 0, False)[loss == "pro"], nll))
    ranked, nll = (sum(column) / 6 for column in zip(*expected, strict=True))
    _, step = metrics_of(tmp_path)
    assert step[f"loss/{loss}"] == pytest.approx(ranked, rel=1e-4)
    assert step["loss/nll"] == pytest.approx(nll, rel=1e-4)
    assert step["loss"] == pytest.approx(ranked + 0.3 * nll, rel=1e-4)


@pytest.mark.parametrize("loss", ["rrhf", "pro"])
def test_a_run_learns_the_order_and_resumes_to_the_same_numbers(loss, policy_folder, data, tmp_path, monkeypatch):
    flags = {"loss": loss, "sft_coef": 0.01, "num_train_epochs": 8, "save_steps": 2}
    main(args_for(policy_folder, data, tmp_path / "whole", **flags))
    rows = metrics_of(tmp_path / "whole")
    assert [row["step"] for row in rows] == [*range(17)]
    assert [row["step"] for row in rows if "eval/main/gold" in row] == [0, 3, 6, 9, 12, 15, 16]
    assert rows[0]["eval/main/kl"] == pytest.approx(0, abs=1e-5) and rows[-1]["eval/main/kl"] > 0.1
    assert rows[-1]["order_accuracy"] > max(0.9, rows[1]["order_accuracy"])
    with monkeypatch.context() as patch:
        stop_after(patch, 7)
        with pytest.raises(Stopped):
            main(args_for(policy_folder, data, tmp_path / "stopped", **flags))
    main(args_for(policy_folder, data, tmp_path / "stopped", resume=True, **flags))
    assert metrics_of(tmp_path / "stopped") == rows
    assert same_weights(tmp_path / "stopped", tmp_path / "whole")
    samples = [(tmp_path / name / "samples.jsonl").read_text() for name in ("stopped", "whole")]
    assert samples[0] == samples[1]


def test_parts_of_a_batch_add_up(policy_folder, data, tmp_path):
    for size in (1, 6):
        flags = {"per_device_train_batch_size": size, "eval_dataset_names": (), "loss": "pro"}
        main(args_for(policy_folder, data, tmp_path / str(size), **flags))
    for one, six in zip(*(metrics_of(tmp_path / size)[1:] for size in ("1", "6")), strict=True):
        assert all(math.isclose(one[k], six[k], rel_tol=1e-3, abs_tol=1e-4) for k in one), (one, six)


# --- bad inputs -------------------------------------------------------------------------------------------------------


def test_bad_inputs_are_one_line(policy_folder, data, tmp_path):
    for flag in ({"top_k": 2}, {"temperatures": True}):
        with refused("--top_k", "--loss pro"):
            main(args_for(policy_folder, data, tmp_path / "run", loss="rrhf", **flag))
    equal = {"pairs": jsonl(tmp_path / "equal.jsonl", pair("a", "a"), pair("a", "b"), pair("b", "a"))}
    with refused("equal.jsonl", "two different sides", "both ways"):
        main(args_for(policy_folder, data | equal, tmp_path / "run"))
    long = {"pairs": jsonl(tmp_path / "long.jsonl", pair("a", "b"), pair("the " * 50, "dog", "fox"))}
    with refused("long.jsonl, line 2", "--max_length", "--truncate_prompts True"):
        main(args_for(policy_folder, data | long, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    main(args_for(policy_folder, data | long, tmp_path / "run", truncate_prompts=True))
