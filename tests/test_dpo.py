"""baselines/dpo.py: each loss by hand, a whole run beside plain loops and beside TRL, resume, implicit rewards, refusals."""

import importlib.util
import json
import math
from math import inf, log
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import evaluate
from baselines import dpo
from baselines.dpo import Args, conservative_loss, cpl_loss, dpo_loss, hinge_loss, implicit_rewards, ipo_loss
from plumbing.command_line import check_flags
from tests import test_ppo_sr as sr
from tests.conftest import gpt2_config
from tests.test_am_train import Stopped, metrics_of, same_weights, stop_after
from tests.test_data import jsonl, refused
from tests.test_ppo_sr import SMALL, WORDS, save_model

words, policy = sr.words, sr.policy  # fixtures: a tokenizer of words, a random policy with dropout in its config
LOSSES = ("dpo", "cdpo", "ipo", "hinge", "cpl")

pytestmark = pytest.mark.usefixtures("one_thread")


# --- losses -----------------------------------------------------------------------------------------------------------


def test_losses_by_hand():
    """s(log 3) = 3/4."""
    h = torch.tensor([log(3), 0.0, -log(3)])
    assert dpo_loss(h).tolist() == pytest.approx([log(4 / 3), log(2), log(4)])
    smoothed = [0.75 * log(4 / 3) + 0.25 * log(4), log(2), 0.75 * log(4) + 0.25 * log(4 / 3)]
    assert conservative_loss(h, 0.25).tolist() == pytest.approx(smoothed)
    # log ratios that differ by 6 and 0, where 1 / (2 beta) = 5
    assert ipo_loss(torch.tensor([0.6, 0.0]), 0.1).tolist() == pytest.approx([1, 25], abs=1e-5)
    assert hinge_loss(torch.tensor([1.5, 1.0, 0.25, -2.0])).tolist() == [0, 0, 0.75, 3]
    # 1/2 (-2 + 1/2 (4 + 4 log 3)) = log 3, and without a lambda 1/2 (2 log 9) = log 9
    chosen, rejected = torch.tensor([-2.0]), torch.tensor([-4 - 4 * log(3)])
    assert cpl_loss(chosen, rejected, 0.5, 0.5).item() == pytest.approx(log(4 / 3))
    assert cpl_loss(chosen, chosen - 2 * log(9), 0.5, 1.0).item() == pytest.approx(log(10 / 9))
    assert implicit_rewards(torch.tensor([-3.0]), torch.tensor([-5.0]), 0.1).item() == pytest.approx(0.2)


@pytest.mark.parametrize(
    "loss, end", [(lambda h: conservative_loss(h, 0.2), log(4)), (lambda h: ipo_loss(h, 0.1), 0.5)]
)
def test_where_a_loss_ends(loss, end):
    """cdpo at log((1 - epsilon) / epsilon), ipo at h / beta = 1 / (2 beta)."""
    h = torch.tensor([end - 0.1, end, end + 0.1], requires_grad=True)
    loss(h).sum().backward()
    below, there, above = h.grad.tolist()
    assert below < 0 < above and abs(there) < 1e-6


def test_a_lambda_below_1_prefers_likely_responses():
    """The same difference of log pi, 20 nats further down: CPL with lambda 1 cannot tell."""
    chosen, rejected = torch.tensor([-5.0, -25.0]), torch.tensor([-9.0, -29.0])
    plain, conservative = (cpl_loss(chosen, rejected, 0.1, value).tolist() for value in (1.0, 0.5))
    assert plain[0] == pytest.approx(plain[1]) and conservative[0] < conservative[1] - 0.1


# --- a run, beside plain loops ----------------------------------------------------------------------------------------


def pairs(count):
    """Sides of 1 to 6 words, of which the longer one is now chosen and now rejected."""
    of = lambda j: " ".join(WORDS[j % 11 : j % 11 + 1 + j % 6])  # noqa: E731
    rows = [(" ".join(WORDS[: 1 + i % 5]), of(3 * i), of(3 * i + 7)) for i in range(count)]
    return [{"prompt": x, "chosen": c, "rejected": r, "task": "t", "mine": [i]} for i, (x, c, r) in enumerate(rows)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return jsonl(tmp_path_factory.mktemp("data") / "pairs.jsonl", *pairs(7))


def args_for(policy, data, out, **changes):
    flags = {"learning_rate": 1e-2, "warmup_steps": 0, "max_grad_norm": inf, "max_length": 32, "response_length": 6}
    flags |= {"global_batch_size": 7, "per_device_train_batch_size": 3, "beta": 0.3, "temperature": 0.7}
    return Args(**{"model_name_or_path": policy, "dataset_name": data, "output_dir": str(out)} | flags | changes)


def log_pi(model, tokenizer, prompt, response, temperature):
    """Of one text, token by token, the end among them."""
    ids = [*tokenizer(f"{prompt} {response}").input_ids, tokenizer.eos_token_id]
    start, logits = len(tokenizer(prompt).input_ids), model(torch.tensor([ids])).logits[0] / temperature
    return sum(torch.log_softmax(logits[t - 1], -1)[ids[t]] for t in range(start, len(ids)))


def slow_loss(kind, c, r, c_0, r_0, beta, epsilon, lam):
    """The formulas of the papers, of log pi (c, r) and log pi_init (c_0, r_0) of one pair."""
    right = 1 / (1 + ((c_0 - r_0 - c + r) * beta).exp())  # probability that c is preferred
    return {
        "dpo": -right.log(),
        "cdpo": -(1 - epsilon) * right.log() - epsilon * (1 - right).log(),
        "ipo": ((c - c_0) - (r - r_0) - 1 / (2 * beta)) ** 2,
        "hinge": (1 - beta * (c - c_0) + beta * (r - r_0)).clamp(min=0),
        "cpl": -((beta * c).exp() / ((beta * c).exp() + (beta * lam * r).exp())).log(),
    }[kind]


def slow_run(kind, folder, tokenizer, rows, args, steps):
    """Steps over all rows at once -> the metrics of each step, the model."""
    model, init = (AutoModelForCausalLM.from_pretrained(folder).eval() for _ in range(2))
    optimizer, found = torch.optim.AdamW(model.parameters(), args.learning_rate, (0.9, 0.95), weight_decay=0), []
    for _ in range(steps):
        losses, columns = [], {"rewards/accuracies": [], "rewards/margins": []}
        for row in rows:
            sides = [(tokenizer, row["prompt"], row[side], args.temperature) for side in dpo.SIDES]
            new = [log_pi(model, *side) for side in sides]
            old = [log_pi(init, *side).detach() for side in sides]
            losses.append(slow_loss(kind, *new, *old, args.beta, args.label_smoothing, args.cpl_lambda))
            rewards = [args.beta * (a - b * (kind != "cpl")).item() for a, b in zip(new, old, strict=True)]
            columns["rewards/accuracies"].append(rewards[0] > rewards[1])
            columns["rewards/margins"].append(rewards[0] - rewards[1])
            for side, reward, value in zip(dpo.SIDES, rewards, new, strict=True):
                columns.setdefault(f"rewards/{side}", []).append(reward)
                columns.setdefault(f"logps/{side}", []).append(value.item())
        loss = sum(losses) / len(rows)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
        optimizer.step()
        means = {name: sum(values) / len(rows) for name, values in columns.items()}
        found.append(means | {"loss": loss.item(), "grad_norm": norm.item()})
    return found, model


@pytest.mark.parametrize("kind", LOSSES)
def test_two_steps_beside_plain_loops(kind, policy, words, data, tmp_path):
    """Numbers, gradients and weights; in parts of 3, 3 and 1 pairs, longest first."""
    args = args_for(policy, data, tmp_path, loss=kind, num_train_epochs=2)
    dpo.main(args)
    rows = metrics_of(tmp_path)
    expected, model = slow_run(kind, policy, words, pairs(7), args, 2)
    assert [row["step"] for row in rows] == [0, 1, 2] and rows[2]["lr"] == 1e-2
    for row, slow in zip(rows[1:], expected, strict=True):
        if row["step"] == 1 and kind != "cpl":
            assert abs(row["rewards/margins"]) < 1e-6, "pi is pi_init: dropout is off"
            slow.pop("rewards/accuracies")  # of equal rewards, up to rounding
        assert {name: row[name] for name in slow} == pytest.approx(slow, rel=1e-4, abs=1e-5)
    assert abs(rows[2]["rewards/margins"] - rows[1]["rewards/margins"]) > 0.01
    saved = load_file(tmp_path / "model" / "model.safetensors")
    for name, value in model.state_dict().items():
        if name in saved and "c_attn.bias" not in name:  # a key's bias changes no attention
            torch.testing.assert_close(saved[name], value, rtol=0, atol=1e-4, msg=name)


def test_warm_up_then_the_rate_stays(policy, data, tmp_path):
    """[DPO's code] (step + 1) / (warmup_steps + 1) from step 0 on."""
    dpo.main(args_for(policy, data, tmp_path, warmup_steps=2, num_train_epochs=5))
    rates = [row["lr"] for row in metrics_of(tmp_path)[1:]]
    assert rates == pytest.approx([1e-2 / 3, 2e-2 / 3, 1e-2, 1e-2, 1e-2])


def test_a_policy_that_learns_and_how_often_pi_init_is_read(policy, data, tmp_path, monkeypatch):
    """Once, before the first of 20 epochs; CPL does not read it at all."""
    read, logprobs_of = [], dpo.logprobs_of
    monkeypatch.setattr(dpo, "logprobs_of", lambda *args: read.append(1) or logprobs_of(*args))
    for kind, times in (("dpo", 1), ("cpl", 0)):
        read.clear()
        dpo.main(args_for(policy, data, tmp_path / kind, loss=kind, num_train_epochs=20))
        first, *_, last = metrics_of(tmp_path / kind)[1:]
        assert len(read) == times
        assert last["rewards/accuracies"] == 1 and last["loss"] < first["loss"] / 2
        assert last["rewards/margins"] > first["rewards/margins"] + 1


# --- what a run writes ------------------------------------------------------------------------------------------------


def count_words(prompts, responses):
    return [len(response.split()) for response in responses]


def test_a_stopped_run_goes_on_to_the_same_numbers(policy, tmp_path, monkeypatch):
    """Three steps an epoch, stopped in the second; with evaluations, and scores in the end."""
    data = jsonl(tmp_path / "pairs.jsonl", *pairs(12))
    tests = jsonl(tmp_path / "main.jsonl", *({"prompt": word} for word in WORDS[:5]))
    flags = {"eval_dataset_names": (tests,), "eval_steps": 2, "gold_reward": "tests.test_dpo:count_words"}
    flags |= {"global_batch_size": 4, "num_train_epochs": 2, "save_steps": 2, "score_dataset_name": data}
    dpo.main(args_for(policy, data, tmp_path / "whole", **flags))
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(patch, 5)
        dpo.main(args_for(policy, data, tmp_path / "stopped", **flags))
    assert torch.load(tmp_path / "stopped" / "checkpoint" / "state.pt", weights_only=True)["step"] == 4
    dpo.main(args_for(policy, data, tmp_path / "stopped", resume=True, **flags))
    rows = metrics_of(tmp_path / "whole")
    assert metrics_of(tmp_path / "stopped") == rows and same_weights(tmp_path / "stopped", tmp_path / "whole")
    for name in ("samples.jsonl", "scored.jsonl"):
        assert (tmp_path / "stopped" / name).read_text() == (tmp_path / "whole" / name).read_text()
    evaluated = [row["step"] for row in rows if "eval/main/gold" in row]
    assert evaluated == [0, 2, 4, 6] and [row["step"] for row in rows] == [*range(7)]
    assert rows[0]["eval/main/kl"] == pytest.approx(0, abs=1e-5) and rows[6]["eval/main/length"] > 0


def lines_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.mark.parametrize("kind", ["dpo", "cpl"])
def test_scores_of_other_pairs(kind, policy, words, data, tmp_path):
    """beta log(pi / pi_init) of each side, alpha log pi with CPL, beside the rows' own columns; equal sides, too."""
    others = [*pairs(9)[5:], {"prompt": "the", "chosen": "fox", "rejected": "fox"}]
    others = jsonl(tmp_path / "others.jsonl", *others)
    args = args_for(policy, data, tmp_path / "run", loss=kind, score_dataset_name=others)
    dpo.main(args)
    model, init = (AutoModelForCausalLM.from_pretrained(f).eval() for f in (tmp_path / "run" / "model", policy))
    scored = lines_of(tmp_path / "run" / "scored.jsonl")
    assert len(scored) == 5
    for row, other in zip(scored, lines_of(others), strict=True):
        for side in dpo.SIDES:
            text = words, row["prompt"], row[side], args.temperature
            with torch.no_grad():
                value = log_pi(model, *text) - (kind == "dpo") * log_pi(init, *text)
            assert row.pop(f"{side}_score") == pytest.approx(args.beta * value.item(), abs=1e-4)
        assert row == other


def test_evaluate_calibrates_the_implicit_reward_beside_a_scorer(policy, words, data, tmp_path):
    kind, config = sr.AutoModelForSequenceClassification, gpt2_config(words, **SMALL, num_labels=1)
    scorer = save_model(kind, config, words, tmp_path / "rm" / "model", 1)
    dpo.main(args_for(policy, data, tmp_path / "dpo", score_dataset_name=data))
    scorers = f"{tmp_path}/dpo/scored.jsonl", scorer
    flags = {"dataset_name": data, "output_dir": str(tmp_path / "calibration"), "num_bootstrap": 10}
    report = evaluate.main(evaluate.Calibration(scorers=scorers, **flags))
    assert list(report["scorers"]) == ["dpo", "rm"] and list(report["paired"]) == ["rm - dpo"]
    deltas = [row["chosen_score"] - row["rejected_score"] for row in lines_of(scorers[0])]
    found = report["scorers"]["dpo"]
    assert found["accuracy"] == pytest.approx(100 * sum(d > 0 for d in deltas) / 7)
    assert found["nll"] == pytest.approx(sum(log(1 + math.exp(-d)) for d in deltas) / 7)


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_bad_inputs_are_refused_before_a_model_runs(policy, data, tmp_path, monkeypatch):
    monkeypatch.setattr(dpo, "logprobs_of", None)
    one, *_ = pairs(1)
    equal = one | {"rejected": one["chosen"]}
    file = lambda *rows: jsonl(tmp_path / "bad.jsonl", *rows)  # noqa: E731
    cases = [
        (("--label_smoothing", "below 0.5"), lambda: {"label_smoothing": 0.5}),
        (("bad.jsonl", "line 2", "'rejected'"), lambda: {"dataset_name": file(one, {"prompt": "x", "chosen": "y"})}),
        (("bad.jsonl", "line 2", "--max_length"), lambda: {"dataset_name": file(one, one | {"chosen": "fox " * 99})}),
        (("bad.jsonl", "2 of 2 pairs have equal sides"), lambda: {"dataset_name": file(equal, equal)}),
        (("bad.jsonl", "'chosen_score'", "rename"), lambda: {"score_dataset_name": file(one | {"chosen_score": 1.0})}),
        (("bad.jsonl", "line 1", "'prompt'"), lambda: {"eval_dataset_names": (file({"response": "x"}),)}),
        (("--max_length", "64"), lambda: {"max_length": 65}),
        (("no_such",), lambda: {"model_name_or_path": str(tmp_path / "no_such")}),
    ]
    for said, changes in cases:
        with refused(*said):
            dpo.main(args_for(policy, data, tmp_path / "run", **changes()))
    for flag, value in (("beta", 0.0), ("cpl_lambda", 1.5), ("global_batch_size", 0)):
        with refused(f"--{flag}"):
            check_flags(args_for(policy, data, tmp_path / "run", **{flag: value}))
    assert not (tmp_path / "run").exists()


def test_equal_sides_are_left_out_and_counted(policy, data, tmp_path, capsys):
    """Numbers are those of a file without them."""
    equal = {"prompt": "the", "chosen": "fox", "rejected": "fox"}
    more = jsonl(tmp_path / "more.jsonl", equal, *pairs(7))
    dpo.main(args_for(policy, data, tmp_path / "without"))
    dpo.main(args_for(policy, more, tmp_path / "with"))
    assert metrics_of(tmp_path / "with") == metrics_of(tmp_path / "without")
    assert "more.jsonl: 1 of 8 pairs have equal sides, and are left out" in capsys.readouterr().out


# --- beside TRL -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is absent: requirements-benchmarks.txt")
@pytest.mark.parametrize("kind, theirs", [("dpo", "sigmoid"), ("hinge", "hinge"), ("ipo", "ipo")])
def test_losses_beside_trl(kind, theirs, policy, words, data, tmp_path):
    """TRL's evaluation of one policy against another. Its IPO takes means over tokens, ours sums."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    other = save_model(AutoModelForCausalLM, gpt2_config(words, **SMALL), words, tmp_path / "other", 7)
    model, init = (AutoModelForCausalLM.from_pretrained(folder) for folder in (other, policy))
    # a word begins with a space here, which TRL does not put between prompt and answer
    rows = [row | {"prompt": row["prompt"] + " "} for row in pairs(7)]
    how = dict(loss_type=[theirs], beta=0.3, per_device_eval_batch_size=7, report_to=[], use_cpu=True, bf16=False)
    config = DPOConfig(str(tmp_path / "trl"), **how)
    sets = dict.fromkeys(
        ("train_dataset", "eval_dataset"), Dataset.from_list(rows).select_columns(["prompt", *dpo.SIDES])
    )
    trainer = DPOTrainer(model, init, config, **sets, processing_class=words)
    found = trainer.evaluate()

    args = args_for(policy, data, tmp_path / "run", temperature=1.0, loss=kind)
    rows, texts = dpo.load_pairs(data, words, args)
    ours, ref = (dpo.logprobs_of(m.eval(), texts, words, args) for m in (model, init))
    assert found["eval_logps/chosen"] == pytest.approx(ours[0].mean().item(), rel=1e-4)
    if kind == "ipo":
        lengths = torch.tensor([[len(pair[side][1]) for pair in texts] for side in (0, 1)])
        ours, ref = ours / lengths, ref / lengths
    losses = dpo.preference_losses(args, ours, ref)
    assert found["eval_loss"] == pytest.approx(losses.mean().item(), rel=1e-4)
