"""baselines/rlaif.py and constitutional.py: labels, ratings and revisions of judges: a server, a model, a function."""

import json
import math
import re
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import am_train
from baselines import constitutional, rlaif
from baselines.rlaif import expected_rating, normalized, read_rating, soft_label, soft_label_loss
from tests import test_ppo_sr as sr
from tests.conftest import gpt2_config
from tests.judge_server import JudgeServer, verdict
from tests.test_data import jsonl, refused
from tests.test_judges import KEY, longer, shown
from tests.test_judges import quick  # noqa: F401  a fixture: the key, short waits
from tools.judges import FunctionJudge, Settings, load_judge, samples
from utils import load_policy

words, policy, scorer, data = sr.words, sr.policy, sr.scorer, sr.data  # fixtures

pytestmark = pytest.mark.usefixtures("one_thread")

HERE = "tests.test_rlaif"


def config(folder, server, **more):
    return str(write(folder, "judge.json", {"base_url": server.url, "concurrency": 4} | more))


def write(folder, name, value):
    (folder / name).write_text(json.dumps(value), encoding="utf-8")
    return folder / name


def by_length(prompts, responses):
    """In [-1, 1], as gold is."""
    return [len(response.split()) / 4 - 1 for response in responses]


# --- equations ------------------------------------------------------------------------------------


def test_soft_label_loss_by_hand():
    """Difference 0: log 2 whatever p. Difference log 3: s = 3/4, so -p log 3/4 - (1 - p) log 1/4."""
    scores = torch.tensor([0.0, math.log(3)]), torch.zeros(2)
    for p in (0.0, 0.3, 1.0):
        wanted = (math.log(2) - p * math.log(3 / 4) - (1 - p) * math.log(1 / 4)) / 2
        assert soft_label_loss(*scores, torch.tensor([p, p])).item() == pytest.approx(wanted)
    chosen, rejected, p = torch.randn(3, 9, dtype=torch.float64)
    assert torch.allclose(soft_label_loss(chosen, rejected, p * 0 + 1), am_train.reward_model_loss(chosen, rejected))
    p = p.sigmoid()
    softmax = torch.stack([chosen, rejected]).log_softmax(0)  # Lee et al. say it so
    assert torch.allclose(soft_label_loss(chosen, rejected, p), -(p * softmax[0] + (1 - p) * softmax[1]).mean())


def said(*verdicts):
    """Verdicts in turn on (response, reference) and (reference, response)."""
    firsts = ("response", "reference") * len(verdicts)
    return [{"first": first, "verdict": v} for first, v in zip(firsts, verdicts, strict=False)]


@pytest.mark.parametrize(
    ("verdicts", "label"),
    [
        ("AB", 1.0),
        ("BA", 0.0),
        ("AA", 0.5),  # whatever stands first
        (["A", "tie"], 0.75),
        (["tie", "tie"], 0.5),
        (["A", "malformed"], 0.75),
        ("ABABBA", 2 / 3),  # three samples
        (["malformed", "refused"], None),
    ],
)
def test_soft_label_by_hand(verdicts, label):
    assert soft_label(said(*verdicts)) == (label if label is None else pytest.approx(label))


def test_expected_rating_by_hand():
    """P(7) = .25 and P(9) = .75, of log-probs that are not normalised: 7 x .25 + 9 x .75 = 8.5, (8.5 - 5.5) / 4.5."""
    assert expected_rating({7: math.log(0.1), 9: math.log(0.3)}) == pytest.approx(8.5)
    assert normalized(8.5) == pytest.approx(2 / 3) and (normalized(1), normalized(10)) == (-1, 1)
    assert expected_rating(dict.fromkeys(range(1, 11), -5000.0)) == pytest.approx(5.5)


@pytest.mark.parametrize(
    ("reply", "rating"),
    [
        ("7", 7), (" 10.", 10), ("**8**", 8), ("7/10", 7), ("11", None), ("0", None), ("7.5", None), ("", None),
        ("I saw 3 faults in 10 lines. Rating: 4", 4), ("Rating: 9/10", 9), ("rating: 2 ... Rating: **6**", 6),
        ("Rating: 10", 10), ("Rating: 100", None), ("I give it a 7", None), ("I'm sorry", None),
    ],
)  # fmt: skip
def test_read_rating(reply, rating):
    assert read_rating(reply) == rating


def test_the_1_of_a_10_is_no_rating():
    """A tokenizer that splits digits says "1" first."""
    assert read_rating("10", {"1": 0.0}) == 10 and read_rating("1", {"1": 0.0}) == 1
    assert read_rating("10", {"10": math.log(0.5), "1": math.log(0.5)}) == pytest.approx(5.5)


def test_read_rating_by_log_probs():
    """Two spellings of 8 add up; a first token that is mostly no rating says nothing, and the number counts."""
    top = {"8": math.log(0.3), " 8": math.log(0.3), "4": math.log(0.2), "The": math.log(0.2)}
    assert read_rating("8", top) == pytest.approx((8 * 0.6 + 4 * 0.2) / 0.8)
    assert read_rating("Rating: 3", {"8": math.log(0.4), "Rating": math.log(0.6)}) == 3


# --- a function as judge --------------------------------------------------------------------------


def test_a_function_with_noise_asked_the_same_says_the_same():
    judge, x, y = FunctionJudge(f"{HERE}:by_length", 1.0, 1), ["p"] * 4000, [f"a b {i}" for i in range(4000)]
    scores = np.array(judge.scores(x, y))
    assert scores.tolist() == judge.scores(x, y) != FunctionJudge(f"{HERE}:by_length", 1.0, 2).scores(x, y)
    assert scores.mean() == pytest.approx(-0.25, abs=0.06) and scores.std() == pytest.approx(1, abs=0.05)
    assert FunctionJudge(f"{HERE}:by_length", 0.0, 1).scores(x[:2], y[:2]) == [-0.25, -0.25]
    each = [judge.scores(x, y) for _ in samples(judge, 3)]
    assert each[0] == scores.tolist() and np.abs(np.corrcoef(each) - np.eye(3)).max() < 0.06


def test_a_function_errs_as_often_as_its_noise_says():
    """Scores that differ by 1/4 under noise of 1/4 each: right with probability Phi(1 / sqrt 2) = .760, in each order."""
    rows = [{"prompt": str(i), "response": "a b", "reference": "a"} for i in range(3000)]
    judged = FunctionJudge(f"{HERE}:by_length", 0.25, 1).compare(rows)
    assert np.mean([soft_label(row["judgements"]) for row in judged]) == pytest.approx(0.760, abs=0.02)
    orders = np.array([[(j["verdict"] == "A") == (j["first"] == "response") for j in r["judgements"]] for r in judged])
    assert orders.mean(0) == pytest.approx([0.760, 0.760], abs=0.03)
    assert abs(np.corrcoef(orders.T)[0, 1]) < 0.06  # errors of the two orders are independent


# --- label, train ---------------------------------------------------------------------------------


def label_args(policy, data, out, **flags):
    sizes = {"response_length": 6, "max_length": 24, "per_device_eval_batch_size": 8}
    paths = {"model_name_or_path": policy, "dataset_name": data["prompts"], "output_dir": str(out)}
    return rlaif.Label(**paths | sizes | flags)


def files_of(folder):
    return "".join(path.read_text(encoding="utf-8") for path in Path(folder).rglob("*.json*"))


def test_labels_of_a_server(policy, data, tmp_path):
    """Longer is better, but for the answers under A, of which one in two is refused in one order."""
    with JudgeServer(longer) as server:
        flags = {"judge": "openai:small", "judge_config": config(tmp_path, server), "pairs_per_prompt": 2}
        rlaif.main(label_args(policy, data, tmp_path / "run", **flags))
        rows, asked = sr.lines_of(tmp_path / "run" / "pairs.jsonl"), len(server.texts)
        assert {shown(text) for text in server.texts} == {shown(text)[::-1] for text in server.texts}  # both orders
        prompts = Counter(row["prompt"] for row in rows)
        known = {row["prompt"]: row["task"] for row in sr.lines_of(data["prompts"])}
        assert prompts.keys() <= known.keys() and max(prompts.values()) <= 2 and len(rows) > 11
        for row in rows:
            assert len(row["chosen"]) >= len(row["rejected"]) and row["task"] == known[row["prompt"]]
            assert row["prob_chosen"] == (1.0 if len(row["chosen"]) > len(row["rejected"]) else 0.5)
        (tmp_path / "run" / "label.json").unlink()
        rlaif.main(label_args(policy, data, tmp_path / "run", **flags))
        assert len(server.texts) == asked and sr.lines_of(tmp_path / "run" / "pairs.jsonl") == rows  # kept replies
    assert KEY not in files_of(tmp_path)


def test_samples_examples_and_thoughts_of_the_judge(policy, data, tmp_path):
    """Three replies at temperature 1, averaged: A, A and B make 2/3 in one order, and none in the other."""
    shots = [{"prompt": "{a}", "chosen": "good", "rejected": "bad", "reason": "so"}]
    shots += [{"prompt": "q", "chosen": "well {b}", "rejected": "ill"}]
    seen = Counter()

    def answer(text, n):
        seen[text] += 1
        first, second = re.findall(r"\[Answer A\]\n(.*?)\n\[End.*?\[Answer B\]\n(.*?)\n\[End", text, re.DOTALL)[-1]
        if first > second:
            return "no verdict"
        return "Let me think {so}. " + verdict("A" if seen[text] < 3 else "B")

    with JudgeServer(answer) as server:
        flags = {"judge": "openai:small", "judge_config": config(tmp_path, server), "num_samples": 3}
        flags |= {"few_shot": jsonl(tmp_path / "shots.jsonl", *shots), "chain_of_thought": True}
        rlaif.main(label_args(policy, data, tmp_path / "run", **flags))
    assert {body["temperature"] for body in server.bodies} == {1.0}
    for row in sr.lines_of(tmp_path / "run" / "pairs.jsonl"):  # (1 + 1 + 0 + 3/2) / 6 for the first in the alphabet
        assert row["prob_chosen"] == pytest.approx(3.5 / 6) and row["chosen"] < row["rejected"]
    text = server.texts[0]
    assert "[Request]\n{a}\n" in text and "[Answer A]\ngood\n" in text and '{"reason": "so", "verdict": "A"}' in text
    assert "[Answer B]\nwell {b}\n" in text and '{"reason": "", "verdict": "B"}' in text  # in turns: no place wins
    assert "step by step" in text and "nothing else" not in text


def test_a_function_labels_and_a_scorer_learns_from_it(policy, data, tmp_path):
    labels = label_args(policy, data, tmp_path, judge=f"{HERE}:by_length", judge_noise=0.6, num_samples=4)
    rlaif.main(labels)
    rows = sr.lines_of(tmp_path / "pairs.jsonl")
    assert {row["prob_chosen"] for row in rows} <= {n / 8 for n in range(4, 9)} and len(rows) > 8

    def trained(name, main, **changes):
        file = jsonl(tmp_path / f"{name}.jsonl", *(row | changes for row in rows))
        how = {"max_length": 24, "global_batch_size": 4, "learning_rate": 1e-2, "loss": "rm", "num_train_epochs": 2}
        how |= {"per_device_train_batch_size": 3}
        kind = am_train.Args if main is am_train.main else rlaif.Train
        main(kind(model_name_or_path=policy, dataset_name=file, output_dir=str(tmp_path / name), **how))
        return sr.metrics_of(tmp_path / name)

    soft, certain, hard = trained("soft", rlaif.main), trained("ones", rlaif.main, prob_chosen=1.0), None
    hard = trained("hard", am_train.main)
    assert [row["loss"] for row in certain] == pytest.approx([row["loss"] for row in hard], abs=1e-5)  # p = 1 is Eq. 1
    assert [row["loss"] for row in soft] != pytest.approx([row["loss"] for row in hard], abs=1e-3)
    even = trained("even", rlaif.main, prob_chosen=0.5)
    assert min(row["loss"] for row in even) >= math.log(2) - 1e-6  # nobody knows: nothing below log 2


# --- direct ---------------------------------------------------------------------------------------


def direct_args(policy, data, out, **changes):
    own = "judge_config", "judge_noise", "num_samples", "rating_logprobs", "reward_function"
    mine = {name: changes.pop(name) for name in own if name in changes}
    judge = changes.pop("judge", f"{HERE}:by_length")
    args = asdict(sr.args_for(policy, data, out, reward_model_path=None, **changes))
    return rlaif.Direct(**args, judge=judge, **mine)


def test_a_functions_scores_are_the_reward(policy, data, tmp_path):
    """Cut to [-1, 1]; stopped and resumed, noise and all, it ends as if never stopped."""
    flags = {
        "judge_noise": 0.5,
        "total_steps": 4,
        "save_steps": 2,
        "eval_steps": 2,
        "eval_dataset_names": (data["main"],),
    }
    rlaif.main(direct_args(policy, data, tmp_path / "whole", **flags))
    judge = FunctionJudge(f"{HERE}:by_length", 0.5, 1)
    for row in sr.lines_of(tmp_path / "whole" / "samples.jsonl"):
        (score,) = judge.scores([row["prompt"]], [row["response"]])
        assert row["score"] == pytest.approx(min(1, max(-1, score)), abs=1e-6)
    sr.stop_in(direct_args(policy, data, tmp_path / "run", **flags), 4, rlaif)
    rlaif.main(direct_args(policy, data, tmp_path / "run", resume=True, **flags))
    assert sr.same_run(tmp_path / "run", tmp_path / "whole") == (True, True, True)


def completion(text, top=None):
    """A response of the server with the log-probs of its first token."""
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    if top:
        top = [{"token": t, "logprob": value, "bytes": None} for t, value in top.items()]
        choice["logprobs"] = {"content": [top[0] | {"top_logprobs": top}], "refusal": None}
    body = {"id": "x", "object": "chat.completion", "created": 0, "model": "small", "choices": [choice]}
    return 200, json.dumps(body), {}


def answer_in(text):
    return re.search(r"\[Answer\]\n(.*?)\n\[End of answer\]", text, re.DOTALL)[1]


@pytest.mark.parametrize("logprobs", [True, False])
def test_a_servers_ratings_are_the_reward(logprobs, policy, data, tmp_path):
    """Short: 9; long: 3, with P(9) = 1/4 and P(3) = 3/4; an answer of two words has no rating: the middle."""

    def answer(text, n):
        count = len(answer_in(text).split())
        if count == 2:
            return "I'm sorry, no."
        top = {"3": math.log(0.75), "9": math.log(0.25)} if count > 4 else {"9": 0.0}
        return completion("3" if count > 4 else "9", top if logprobs else None)

    with JudgeServer(answer) as server:
        flags = {"judge": "openai:small", "judge_config": config(tmp_path, server), "rating_logprobs": logprobs}
        rlaif.main(direct_args(policy, data, tmp_path / "run", eval_dataset_names=(data["prompts"],), **flags))
    assert all(body.get("top_logprobs") == (20 if logprobs else None) for body in server.bodies)
    assert max(Counter(server.texts).values()) <= 2  # once more where there was no rating
    values = set()
    for row in sr.lines_of(tmp_path / "run" / "samples.jsonl"):
        count = len(row["response"].split())
        rating = 5.5 if count == 2 else 9 if count < 5 else 0.75 * 3 + 0.25 * 9 if logprobs else 3
        assert row["score"] == pytest.approx((rating - 5.5) / 4.5, abs=1e-6)
        values.add(round(rating, 2))
    assert len(values) == 3
    assert KEY not in files_of(tmp_path)


@pytest.fixture(scope="module")
def speaker(tokenizer, tmp_path_factory):
    """A random judge on this machine, with positions for the question."""
    folder, size = tmp_path_factory.mktemp("speaker"), {"n_positions": 1200, "n_embd": 16, "n_layer": 1}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(gpt2_config(tokenizer, **size)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_ratings_of_a_model_on_this_machine(speaker, tokenizer, tmp_path):
    """By a plain loop over the ten numbers, each with the end of an answer: so 1 is not also the start of 10."""
    judge, model = load_judge(f"hf:{speaker}", Settings(), tmp_path), load_policy(speaker)
    x, y = ["one", "two words"], ["yes", "no, never"]
    args = rlaif.Direct("", "", "", judge=f"hf:{speaker}")
    for prompt, response, found in zip(x, y, rlaif.rewards(judge, args, x, y), strict=True):
        text = (rlaif.RATE + rlaif.NUMBER).replace("{prompt}", prompt).replace("{a}", response)
        ids, likelihoods = tokenizer(text).input_ids, []
        for number in range(1, 11):
            tokens = [*tokenizer(str(number)).input_ids, tokenizer.eos_token_id]
            with torch.no_grad():
                logprobs = model(torch.tensor([ids + tokens])).logits[0].log_softmax(-1)
            value = sum(logprobs[len(ids) - 1 + i, token].item() for i, token in enumerate(tokens))
            likelihoods.append(math.exp(value))
        expected = sum(i * p for i, p in enumerate(likelihoods, 1)) / sum(likelihoods)
        assert found == pytest.approx((expected - 5.5) / 4.5, abs=1e-4)
    with refused("positions"):
        rlaif.rewards(judge, args, ["long " * 600], ["yes"])


# --- revise ---------------------------------------------------------------------------------------


def revise_args(policy, data, out, **flags):
    args = asdict(label_args(policy, data, out, judge="openai:small"))
    for name in ("judge_noise", "num_samples", "chain_of_thought", "pairs_per_prompt", "few_shot"):
        args.pop(name)
    return constitutional.Args(**args | flags)


def test_critique_and_revision(policy, data, tmp_path):
    """Two rounds: the second one criticises the revision, by the other principle. One row is refused, one thinks aloud."""
    principles = tmp_path / "principles.txt"
    principles.write_text("Be brief.\n\nBe kind {a}.\n", encoding="utf-8")
    refuses = sr.lines_of(data["prompts"])[3]["prompt"]

    def answer(text, n):
        if "[Critique]" in text:
            assert "says badly <" in text.split("[Critique]")[1] and "Principle: Be" in text
            return f"<think>hm</think> new {answer_in(text)}"
        if f"[Request]\n{refuses}\n[End" in text:
            return {"content": "", "finish_reason": "content_filter"}
        principle = re.search(r"Principle: (.*)", text)[1]
        return f"says badly <{answer_in(text)}> by {principle}"

    with JudgeServer(answer) as server:
        flags = {"judge_config": config(tmp_path, server), "principles": str(principles), "num_revisions": 2}
        constitutional.main(revise_args(policy, data, tmp_path / "run", **flags))
        asked = len(server.texts)
        (tmp_path / "run" / "revise.json").unlink()
        constitutional.main(revise_args(policy, data, tmp_path / "run", **flags))
        assert len(server.texts) <= asked + 1  # what is kept is not asked again
    rows, known = sr.lines_of(tmp_path / "run" / "revisions.jsonl"), sr.lines_of(data["prompts"])
    assert [row["prompt"] for row in rows] == [r["prompt"] for r in known if r["prompt"] != refuses]
    for row in rows:
        assert row["response"].split() == f"new new {row['answer']}".split()
        one, two = row["principles"]
        assert {one, two} == {"Be brief.", "Be kind {a}."}
        assert [c.split("> by ")[1] for c in row["critiques"]] == [one, two] and "<new" in row["critiques"][1]
    assert len({tuple(row["principles"]) for row in rows}) == 2  # drawn, not always the same
    assert json.loads((tmp_path / "run" / "revise.json").read_text())["without_reply"] == 1
    assert KEY not in files_of(tmp_path)


# --- what is refused ------------------------------------------------------------------------------


def test_bad_input_is_refused_in_one_line(policy, data, tmp_path):
    out, function = tmp_path / "run", f"{HERE}:by_length"
    (tmp_path / "template.txt").write_text("{prompt} {a} {b}")
    own = str(
        write(tmp_path, "own.json", {"template": str(tmp_path / "template.txt"), "base_url": "http://localhost:1"})
    )
    for flag, value in (("judge_config", "x.json"), ("chain_of_thought", True), ("few_shot", "x.jsonl")):
        with refused(f"--{flag}", "openai:MODEL"):
            rlaif.main(label_args(policy, data, out, judge=function, **{flag: value}))
    with refused("--judge_noise", "module:function"):
        rlaif.main(label_args(policy, data, out, judge="openai:small", judge_noise=1.0))
    with refused("--chain_of_thought", "template"):
        rlaif.main(label_args(policy, data, out, judge="openai:small", judge_config=own, chain_of_thought=True))
    with refused("--reward_function"):
        rlaif.main(direct_args(policy, data, out, reward_function=function))
    with refused("--judge", "must write text", function):
        constitutional.main(revise_args(policy, data, out, judge=function))
    flags = {"judge": "openai:small", "judge_config": own, "num_revisions": 5}
    with refused("--num_revisions", "4 principles"):
        constitutional.main(revise_args(policy, data, out, **flags))
    with refused("--principles", "none.txt"):
        constitutional.main(revise_args(policy, data, out, **flags | {"principles": "none.txt"}))
    good = {"prompt": "the fox", "chosen": "jumps", "rejected": "dog", "prob_chosen": 0.5}
    for value in (None, 1.5, "0.5", True):
        file = jsonl(tmp_path / "pairs.jsonl", good, good | {"prob_chosen": value})
        with refused("pairs.jsonl, line 2", "prob_chosen"):
            rlaif.main(rlaif.Train(model_name_or_path=policy, dataset_name=file, output_dir=str(out)))
    assert not out.exists()


def test_a_judge_without_any_verdict_is_refused(policy, data, tmp_path):
    with JudgeServer(lambda text, n: "I'm sorry") as server:
        flags = {"judge": "openai:small", "judge_config": config(tmp_path, server)}
        with refused("--judge openai:small", "no verdict"):
            rlaif.main(label_args(policy, data, tmp_path / "a", **flags))
        with refused("--judge openai:small", "no rating", "sorry"):
            rlaif.main(direct_args(policy, data, tmp_path / "b", **flags))
