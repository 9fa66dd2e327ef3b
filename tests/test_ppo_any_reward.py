"""baselines/ppo_any_reward.py: scorers that read the text, and Python functions in their place."""

import copy
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, BertConfig, RobertaConfig

from baselines import ppo_any_reward
from tests import test_ppo_sr as sr
from tests.conftest import gpt2_config
from tests.test_data import refused
from tests.test_ppo_sr import SMALL, WORDS, save_model, score_alone, word_tokenizer

words, policy, scorer, data = sr.words, sr.policy, sr.scorer, sr.data  # fixtures

pytestmark = pytest.mark.usefixtures("one_thread")


def args_for(policy, data, out, reward_model_path=None, reward_function=None, **changes):
    args = asdict(sr.args_for(policy, data, out, reward_model_path=reward_model_path, **changes))
    return ppo_any_reward.Args(**args, reward_function=reward_function)


def rollouts(monkeypatch, args):
    return sr.rollouts(monkeypatch, args, ppo_any_reward.main)


def check_starts_from_policy(seen, policy):
    """The critic: the policy's backbone, and V = 0 until it has learned."""
    (first, start), (second, _) = seen
    weights = load_file(Path(policy) / "model.safetensors").items()
    weights = {name: v for name, v in weights if "lm_head" not in name}
    assert all(torch.equal(start[name], v) for name, v in weights.items())
    assert {name for name in start if name not in weights} == {"score.weight"}
    assert not first.values.any() and second.values[second.mask].abs().min() > 0


@pytest.fixture(scope="module")
def other_words():
    """The same words under other ids, and two more of them."""
    return word_tokenizer("<unk>", *reversed(WORDS), "more", "words", "<end>", "<pad>", eos="<end>")


def test_a_scorer_of_another_tokenizer_reads_the_text(policy, other_words, data, tmp_path, monkeypatch):
    config = gpt2_config(other_words, **SMALL, num_labels=1)
    kind = AutoModelForSequenceClassification
    folder = save_model(kind, config, other_words, tmp_path / "scorer", 2)
    seen = rollouts(monkeypatch, args_for(policy, data, tmp_path / "run", folder))
    check_starts_from_policy(seen, policy)
    ids, ends = other_words.get_vocab(), Counter()
    for roll, _ in seen:
        columns = roll.rows, roll.texts, roll.finished.tolist(), roll.raw_scores.tolist()
        for row, text, end, score in zip(*columns, strict=True):
            read = [ids[word] for word in f"{row['prompt']} {text}".split()]
            read += [ids["<end>"]] * end  # a response that was cut has no <eos>
            assert score == pytest.approx(score_alone(folder, read), abs=1e-5)
            ends[end] += 1
    assert ends[True] and ends[False]


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_an_encoder_scores_in_its_own_form(kind, policy, data, tmp_path, monkeypatch, request):
    tokenizer = request.getfixturevalue(f"{kind}_tokenizer")
    config = {"bert": BertConfig, "roberta": RobertaConfig}[kind](
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=40, pad_token_id=0, num_labels=1,
        initializer_range=0.3, hidden_dropout_prob=0.1, type_vocab_size=2 if kind == "bert" else 1,
    )  # fmt: skip
    auto = AutoModelForSequenceClassification
    folder = save_model(auto, config, tokenizer, tmp_path / "scorer", 3)
    seen = rollouts(monkeypatch, args_for(policy, data, tmp_path / "run", folder))
    check_starts_from_policy(seen, policy)
    ids = tokenizer.get_vocab()
    for roll, _ in seen:
        for row, text, score in zip(roll.rows, roll.texts, roll.raw_scores.tolist(), strict=True):
            x, y = ([ids[word] for word in part.split()] for part in (row["prompt"], text))
            # ids of [CLS] or <s>, [SEP] or </s>
            read = [2, *x, 3, *y, 3] if kind == "bert" else [2, *x, 3, 3, *y, 3]
            segments = torch.tensor([[0] * (len(x) + 2) + [1] * (len(y) + 1)])
            more = {"token_type_ids": segments} if kind == "bert" else {}
            assert score == pytest.approx(score_alone(folder, read, **more), abs=1e-5)


def length(prompts, responses):
    pairs = zip(prompts, responses, strict=True)
    return [len(response.split()) + 10 * prompt.startswith("the") for prompt, response in pairs]


def one_too_few(prompts, responses):
    return [1.0] * (len(responses) - 1)


def no_number(prompts, responses):
    return ["good"] * len(responses)


HERE = "tests.test_ppo_any_reward"


def test_a_reward_function_in_the_place_of_a_scorer(policy, data, tmp_path, monkeypatch):
    flags = {"reward_function": f"{HERE}:length", "eval_dataset_names": (data["main"],)}
    seen = rollouts(monkeypatch, args_for(policy, data, tmp_path, **flags))
    check_starts_from_policy(seen, policy)
    for roll, _ in seen:
        assert roll.raw_scores.tolist() == length([row["prompt"] for row in roll.rows], roll.texts)
    for row in sr.lines_of(tmp_path / "samples.jsonl"):
        assert row["score"] == length([row["prompt"]], [row["response"]])[0]


def test_one_scorer_and_no_more(policy, scorer, data, tmp_path):
    for flags in ({}, {"reward_model_path": scorer, "reward_function": f"{HERE}:length"}):
        with refused("--reward_model_path", "--reward_function", "one of them"):
            ppo_any_reward.main(args_for(policy, data, tmp_path, **flags))


@pytest.mark.parametrize("name", ["one_too_few", "no_such_function", "no_number"])
def test_a_reward_function_that_is_none_is_refused(name, policy, data, tmp_path):
    with refused("--reward_function", f"{HERE}:{name}"):
        ppo_any_reward.main(args_for(policy, data, tmp_path, reward_function=f"{HERE}:{name}"))


def test_a_template_that_refuses_a_prompt_is_named_before_step_1(policy, other_words, data, tmp_path):
    """With the line, here the second one of the test prompts: only its roles are refused."""
    words = copy.deepcopy(other_words)
    words.chat_template = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}"
    words.chat_template += "{% endif %}{{ m.content }} {% endfor %}"
    kind, config = AutoModelForSequenceClassification, gpt2_config(words, **SMALL, num_labels=1)
    folder = save_model(kind, config, words, tmp_path / "scorer", 2)
    system = [{"role": "system", "content": "the fox"}, {"role": "user", "content": "the dog"}]
    tests = sr.jsonl(tmp_path / "tests.jsonl", {"prompt": "the fox"}, {"prompt": system})
    with refused("tests.jsonl, line 2", folder, "chat template", "no system role"):
        ppo_any_reward.main(args_for(policy, data, tmp_path / "run", folder, eval_dataset_names=(tests,)))
    assert not (tmp_path / "run").exists()


def test_a_scorer_too_short_for_the_texts_is_refused(policy, other_words, data, tmp_path):
    config = gpt2_config(other_words, **SMALL | {"n_positions": 8}, num_labels=1)
    kind = AutoModelForSequenceClassification
    folder = save_model(kind, config, other_words, tmp_path / "scorer", 2)
    with refused("--max_length", "8 positions"):
        ppo_any_reward.main(args_for(policy, data, tmp_path / "run", folder))
