"""Exported scorers give our scores: to transformers, to a dozen copied lines, to TRL, to OpenRLHF; pairs go to RewardBench.

OpenRLHF and RewardBench are not installed here: what their loaders do is written again below, from the named versions.
"""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    LlamaConfig,
    OPTConfig,
    RobertaConfig,
)

from tests.conftest import byte_level_tokenizer, gpt2_config
from tools.export_reward_model import AdvantageModel, Args, EncoderAdvantageModel, load_advantage_model, main
from tools.export_rewardbench import Args as PairArgs
from tools.export_rewardbench import main as export_pairs
from utils import E_HEAD, InputError, Scorer, encode_pair, load_rows, pad, run_cli

WIDE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
WIDE |= {"initializer_range": 0.2, "max_position_embeddings": 128}
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
PROMPTS = ["the quick fox", "judges my vow", "dog", "the lazy dog while Sphinx of black quartz judges"]
RESPONSES = ["jumps over the lazy dog", "my", "black quartz of Sphinx judges my vow", "brown"]
ROWS = [
    {"prompt": x, "chosen": y, "rejected": z, "task": t}
    for x, y, z, t in zip(PROMPTS, RESPONSES, reversed(RESPONSES), "abab", strict=True)
]


def special(tokenizer):
    return {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "num_labels": 1}


CONFIGS = {
    "gpt2": lambda t: gpt2_config(t, num_labels=1),
    "llama": lambda t: LlamaConfig(
        **WIDE, **special(t), num_key_value_heads=1, bos_token_id=None, eos_token_id=t.eos_token_id
    ),
    "bert": lambda t: BertConfig(**WIDE, **special(t)),
    "roberta": lambda t: RobertaConfig(**WIDE, **special(t), type_vocab_size=1, bos_token_id=2, eos_token_id=3),
}
CAUSAL, ENCODERS = ["gpt2", "llama"], ["bert", "roberta"]


def make(family, request, tmp_path, e_head, template=None):
    """A random scorer saved as am_train.py saves one -> folder, scorer, tokenizer."""
    torch.manual_seed(0)
    name = f"{family}_tokenizer" if family in ENCODERS else "tokenizer"
    tokenizer = AutoTokenizer.from_pretrained(reloaded(request.getfixturevalue(name), tmp_path))
    tokenizer.chat_template = template
    model = AutoModelForSequenceClassification.from_config(CONFIGS[family](tokenizer))
    scorer = Scorer(model, e_head).eval()
    if e_head:
        nn.init.normal_(scorer.e_head.weight, std=0.2)
        nn.init.constant_(scorer.e_head.bias, 0.3)
    folder = tmp_path / "model"
    save(scorer, tokenizer, folder)
    return str(folder), scorer, tokenizer


def save(scorer, tokenizer, folder):
    scorer.save_pretrained(folder, scorer.state_dict())
    tokenizer.save_pretrained(folder)


def reloaded(tokenizer, tmp_path):
    """A copy: the fixtures are shared, and a chat template would stay on them."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@torch.no_grad()
def ours(scorer, tokenizer, prompts=PROMPTS, responses=RESPONSES):
    """(ids, mask) of one padded batch and r, e by utils.Scorer."""
    pairs = zip(prompts, responses, strict=True)
    texts = [encode_pair(tokenizer, x, y, 120, False, "here", scorer.is_encoder)[:2] for x, y in pairs]
    assert len({len(ids) for ids, _ in texts}) > 2
    ids, mask = pad([ids for ids, _ in texts], tokenizer.pad_token_id)
    r, e = scorer(ids, mask, torch.tensor([n for _, n in texts]))
    return ids, mask, torch.tensor([n for _, n in texts]), r, e


def close(a, b, tolerance=1e-5):
    return torch.allclose(torch.as_tensor(a, dtype=torch.float32), b, rtol=0, atol=tolerance)


def export(folder, out, **flags):
    main(Args(reward_model_path=str(folder), output_dir=str(out), **flags))
    return str(out)


# --- transformers, the dozen lines ------------------------------------------------------------------------------------


@pytest.mark.parametrize("e_head", [False, True])
@pytest.mark.parametrize("family", CONFIGS)
def test_transformers_gives_our_score(family, e_head, request, tmp_path):
    folder, scorer, tokenizer = make(family, request, tmp_path, e_head, TEMPLATE)
    out = export(folder, tmp_path / "out")
    ids, mask, prompt_lens, r, e = ours(scorer, tokenizer)
    assert r.std() > 0.02 and bool(e.any()) == e_head
    auto = AutoModelForSequenceClassification.from_pretrained(out, num_labels=1).eval()
    kinds = {}
    if family == "bert":
        kinds["token_type_ids"] = ((torch.arange(ids.shape[1]) >= prompt_lens[:, None]) & mask).long()
    with torch.no_grad():
        assert close(auto(ids, attention_mask=mask.long(), **kinds).logits[:, 0], r)
    copied = AutoTokenizer.from_pretrained(out)
    assert (copied.pad_token, copied.pad_token_id) == (tokenizer.pad_token, auto.config.pad_token_id)
    assert copied.chat_template == TEMPLATE
    assert (Path(out) / E_HEAD).is_file() == e_head


@pytest.mark.parametrize("template", [None, TEMPLATE])
@pytest.mark.parametrize("family", CONFIGS)
def test_a_dozen_lines_give_our_advantage(family, template, request, tmp_path):
    folder, scorer, tokenizer = make(family, request, tmp_path, True, template)
    model = load_advantage_model(folder)
    assert type(model) is (AdvantageModel if family in CAUSAL else EncoderAdvantageModel)
    *_, r, e = ours(scorer, tokenizer)
    assert e.std() > 0.02 and not close(r, r - e, 0.05)
    scores = model.score(PROMPTS, RESPONSES)
    assert all(type(s) is float for s in scores)
    assert close(scores, r - e)
    if template:
        turns = [[{"role": "user", "content": x}, *([{"role": "assistant", "content": "my"}] * 2)] for x in PROMPTS]
        *_, r, e = ours(scorer, tokenizer, turns)
        assert close(model.score(turns, RESPONSES), r - e)


def test_a_tokenizer_that_adds_bos_adds_it_once(tmp_path):
    """Texts of a chat template hold their special tokens already."""
    from tokenizers import processors

    tokenizer = byte_level_tokenizer(pad_token="<pad>", eos_token="<eos>", bos_token="<bos>")
    bos = [("<bos>", tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=bos)
    for template in (None, "<bos>" + TEMPLATE):
        tokenizer.chat_template = template
        model = AutoModelForSequenceClassification.from_config(CONFIGS["gpt2"](tokenizer))
        scorer = Scorer(model, expected_reward_head=True).eval()
        nn.init.normal_(scorer.e_head.weight, std=0.2)
        save(scorer, tokenizer, tmp_path)
        ids, *_, r, e = ours(scorer, tokenizer)
        assert (ids == tokenizer.bos_token_id).sum(1).tolist() == [1] * 4
        assert close(load_advantage_model(tmp_path).score(PROMPTS, RESPONSES), r - e)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_the_model_card_s_lines_run_by_themselves(family, request, tmp_path):
    folder, scorer, tokenizer = make(family, request, tmp_path, True, TEMPLATE)
    card = (Path(export(folder, tmp_path / "out")) / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    assert "from utils" not in code and "from data" not in code
    scope = {}
    exec(code, scope)
    *_, r, e = ours(scorer, tokenizer)
    name = "AdvantageModel" if family in CAUSAL else "EncoderAdvantageModel"
    assert close(scope[name](str(tmp_path / "out")).score(PROMPTS, RESPONSES), r - e)


def test_card_without_an_e_head_says_so(request, tmp_path):
    folder, *_ = make("gpt2", request, tmp_path, False)
    card = (Path(export(folder, tmp_path / "out")) / "README.md").read_text()
    assert "only score" in card and "```" not in card


# --- TRL --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_trl_s_reward_trainer_takes_the_folder(family, request, tmp_path, monkeypatch):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    folder, scorer, tokenizer = make(family, request, tmp_path, False)
    if tokenizer.eos_token is None:
        tokenizer.eos_token = tokenizer.sep_token  # TRL ends a text in <eos>, which BERT's tokenizers do not name
    pairs = [{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in ROWS[:2]]
    config = trl.RewardConfig(
        output_dir=str(tmp_path / "trl"),
        per_device_train_batch_size=2,
        max_steps=1,
        learning_rate=1e-2,
        report_to="none",
        use_cpu=True,
        bf16=False,
        save_strategy="no",
    )
    trainer = trl.RewardTrainer(
        model=folder, args=config, train_dataset=datasets.Dataset.from_list(pairs), processing_class=tokenizer
    )
    ids, mask, *_, r, _ = ours(scorer, tokenizer)
    if family == "llama":
        with torch.no_grad():
            assert close(trainer.model.eval()(ids, attention_mask=mask.long()).logits[:, 0], r)
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    assert 0 < trainer.train().training_loss < 20
    after = trainer.model.state_dict()
    assert any(not torch.equal(before[k], after[k]) for k in before if k.startswith(("score", "classifier")))


# --- OpenRLHF ---------------------------------------------------------------------------------------------------------


def openrlhf_reward_model(folder, normalize_reward=False):
    """What OpenRLHF's get_llm_for_sequence_regression(folder, "reward") builds, without its devices and adapters.

    Read in openrlhf/models/model.py at commit 0008ea1a8bc6dae5bdb2369db53a06170d81323c (the loader, the head without
    bias, mean and std from config.json, the last attended token); later versions look up config.value_head_prefix
    first and take "score" where it is absent (issue 1039 quotes that default). Their class never calls post_init,
    which transformers 5 needs.
    """
    config = AutoConfig.from_pretrained(folder)
    config.normalize_reward = normalize_reward
    head = getattr(config, "value_head_prefix", "value_head")  # the old default, so that the key must be there
    body = AutoModel._model_mapping[type(config)]

    class RewardModel(body.__base__):
        def __init__(self, config):
            super().__init__(config)
            setattr(self, self.base_model_prefix, body(config))
            setattr(self, head, nn.Linear(config.hidden_size, 1, bias=False))
            self.register_buffer("mean", torch.zeros(1), persistent=False)
            self.register_buffer("std", torch.ones(1), persistent=False)
            self.post_init()

        def forward(self, input_ids, attention_mask):
            position_ids = (attention_mask.long().cumsum(-1) - 1).masked_fill(attention_mask == 0, 1)
            outputs = getattr(self, self.base_model_prefix)(
                input_ids, attention_mask=attention_mask, position_ids=position_ids
            )
            values = getattr(self, head)(outputs.last_hidden_state).squeeze(-1)
            last = attention_mask.shape[1] - 1 - attention_mask.long().flip(1).argmax(1, keepdim=True)
            reward = values.gather(1, last).squeeze(1)
            if not self.training and self.config.normalize_reward:
                reward = (reward - self.mean) / self.std
            return reward

    model, info = RewardModel.from_pretrained(folder, config=config, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    # they set the buffers in __init__, but transformers 5 builds on the meta device, where what is set there is lost
    model.mean[0], model.std[0] = getattr(config, "mean", 0.0), getattr(config, "std", 1.0)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("family", CAUSAL)
def test_openrlhf_s_loader_gives_our_score(family, request, tmp_path):
    folder, scorer, tokenizer = make(family, request, tmp_path, False, TEMPLATE)
    ids, mask, *_, r, _ = ours(scorer, tokenizer)
    out = export(folder, tmp_path / "out", format="openrlhf")
    assert not {"mean", "std"} & set(json.loads((Path(out) / "config.json").read_text()))
    for normalize in (False, True):  # without mean and std both are the score itself
        assert close(openrlhf_reward_model(out, normalize)(ids, mask), r)
    left, left_mask = pad(
        [row[m].tolist() for row, m in zip(ids, mask, strict=True)], tokenizer.pad_token_id, left=True
    )
    assert close(openrlhf_reward_model(out)(left, left_mask), r)  # their batches are padded on the left, with positions
    copied = AutoTokenizer.from_pretrained(out)
    assert copied.chat_template == TEMPLATE and copied.pad_token == tokenizer.pad_token
    auto = AutoModelForSequenceClassification.from_pretrained(out, num_labels=1).eval()
    assert close(auto(ids, attention_mask=mask.long()).logits[:, 0], r)  # and transformers reads it still


@torch.no_grad()
def test_openrlhf_normalises_by_the_given_mean_and_std(request, tmp_path):
    folder, scorer, tokenizer = make("llama", request, tmp_path, False)
    ids, mask, *_, r, _ = ours(scorer, tokenizer)
    out = export(folder, tmp_path / "out", format="openrlhf", mean_std=(-0.75, 2.0))
    assert close(openrlhf_reward_model(out, True)(ids, mask), (r + 0.75) / 2)
    assert close(openrlhf_reward_model(out, False)(ids, mask), r)


@torch.no_grad()
def test_openrlhf_normalises_measured_scores_to_mean_0_and_std_1(request, tmp_path):
    folder, scorer, tokenizer = make("gpt2", request, tmp_path, False)
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    out = export(folder, tmp_path / "out", format="openrlhf", dataset_name=str(pairs), per_device_eval_batch_size=3)
    both = PROMPTS * 2, RESPONSES + RESPONSES[::-1]
    ids, mask, *_, r, _ = ours(scorer, tokenizer, *both)
    normalised = openrlhf_reward_model(out, True)(ids, mask)
    assert close(normalised.mean(), torch.tensor(0.0)) and close(normalised.std(), torch.tensor(1.0))  # std over n - 1
    assert abs(r.mean()) > 0.05


@torch.no_grad()
def test_an_e_head_goes_to_openrlhf_on_request_alone_and_then_r_goes(request, tmp_path):
    folder, scorer, tokenizer = make("llama", request, tmp_path, True)
    with pytest.raises(InputError, match=r"has an e head.*--drop_expected_reward True"):
        export(folder, tmp_path / "out", format="openrlhf")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / E_HEAD).touch()  # an earlier export's
    out = export(folder, tmp_path / "out", format="openrlhf", drop_expected_reward=True)
    ids, mask, *_, r, _ = ours(scorer, tokenizer)
    assert close(openrlhf_reward_model(out)(ids, mask), r)
    assert not (Path(out) / E_HEAD).exists() and "left out" in (Path(out) / "README.md").read_text()


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ENCODERS)
def test_openrlhf_refuses_an_encoder(family, request, tmp_path):
    folder, *_ = make(family, request, tmp_path, False)
    with pytest.raises(InputError, match=r"model: is an encoder"):
        export(folder, tmp_path / "out", format="openrlhf")
    assert not (tmp_path / "out").exists()


def test_openrlhf_refuses_a_head_of_another_width(request, tmp_path, monkeypatch):
    """OPT's 350 M model projects its hidden states down before the head; OpenRLHF's head is as wide as hidden_size."""
    sizes = dict(hidden_size=32, word_embed_proj_dim=16, ffn_dim=48, num_hidden_layers=1, num_attention_heads=2)
    config = lambda t: OPTConfig(**sizes, **special(t), eos_token_id=t.eos_token_id)  # noqa: E731
    monkeypatch.setitem(CONFIGS, "opt", config)
    folder, *_ = make("opt", request, tmp_path, False)
    with pytest.raises(InputError, match="not as wide"):
        export(folder, tmp_path / "out", format="openrlhf")


@pytest.mark.parametrize("format", ["transformers", "openrlhf"])
def test_a_folder_without_a_score_head_is_refused(format, policy_folder, tmp_path):
    with pytest.raises(InputError, match="has no reward head"):
        export(policy_folder, tmp_path / "out", format=format)
    with pytest.raises(InputError, match=E_HEAD):
        load_advantage_model(policy_folder)


def test_flags_that_contradict_each_other_are_refused(scorer_folder, tmp_path):
    for flags, message in (
        ({"mean_std": (0.0, 1.0)}, "--mean_std: belongs to --format openrlhf"),
        ({"dataset_name": "x.jsonl"}, "--dataset_name: belongs"),
        ({"format": "openrlhf", "mean_std": (0.0, 1.0), "dataset_name": "x.jsonl"}, "drop one"),
        ({"format": "openrlhf", "mean_std": (0.0, 0.0)}, "the std must be positive"),
        ({"format": "openrlhf", "mean_std": (float("nan"), 1.0)}, "--mean_std"),
        ({"format": "openrlhf", "dataset_name": "missing.jsonl"}, "No such file"),
    ):
        with pytest.raises(InputError, match=message):
            export(scorer_folder, tmp_path / "out", **flags)
    with pytest.raises(InputError, match="name another folder"):
        export(scorer_folder, scorer_folder)


def test_command_line_takes_a_negative_mean_and_refuses_in_one_line(scorer_folder, tmp_path, monkeypatch, capsys):
    command = ["export", "--format", "openrlhf", "--reward_model_path", scorer_folder, "--mean_std", "-0.5", "2"]
    monkeypatch.setattr(sys, "argv", [*command, "--output_dir", str(tmp_path / "out")])
    run_cli(main, Args, "")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["mean"], config["std"], config["value_head_prefix"]) == (-0.5, 2.0, "score")
    monkeypatch.setattr(sys, "argv", [*command, "--output_dir", scorer_folder])
    with pytest.raises(SystemExit) as end:
        run_cli(main, Args, "")
    assert end.value.code == 2
    assert [line[:21] for line in capsys.readouterr().err.splitlines() if "weights" not in line] == [
        "error: --output_dir /"
    ]


# --- RewardBench ------------------------------------------------------------------------------------------------------


def export_rows(rows, tmp_path, **flags):
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    export_pairs(PairArgs(str(tmp_path / "pairs.jsonl"), str(tmp_path / "out.jsonl"), **flags))
    import datasets

    return datasets.load_dataset("json", data_files=str(tmp_path / "out.jsonl"), split="train")


def rewardbench_conversation(row, side):
    """The messages that RewardBench scores: load_and_process_dataset and prepare_dialogue_from_tokenizer of
    rewardbench/utils.py, rewardbench 0.1.4: chosen[:-1] is the prompt, and its turns' roles alternate from user on."""
    turns = [m["content"] for m in row["chosen"][:-1]]
    assert len(turns) % 2 == 1  # theirs too: the last turn before the answer is the user's
    turns.append(row[side][-1]["content"])
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


def test_conversations_reload_and_read_as_rewardbench_reads_them(tmp_path):
    turns = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    turns.append({"role": "user", "content": "three", "name": "x"})
    rows = [ROWS[0] | {"policy_chosen": "big", "policy_rejected": "small"}, ROWS[1] | {"prompt": turns}]
    data = export_rows(rows, tmp_path)
    assert data.column_names == ["id", "chosen", "chosen_model", "rejected", "rejected_model", "subset"]
    assert data["id"][:] == [1, 2] and data["subset"][:] == ["a", "b"]
    assert data["chosen_model"][:] == ["big", ""] and data["rejected_model"][:] == ["small", ""]
    for side in ("chosen", "rejected"):
        assert rewardbench_conversation(data[0], side) == [
            {"role": "user", "content": ROWS[0]["prompt"]},
            {"role": "assistant", "content": ROWS[0][side]},
        ]
        contents = [m["content"] for m in rewardbench_conversation(data[1], side)]
        assert contents == ["one", "two", "three", ROWS[1][side]]
        assert [set(m) for m in data[1][side]] == [{"role", "content"}] * 4
    fields = {"prompt": "prompt", "chosen": "response", "rejected": "response"}
    again = load_rows(tmp_path / "out.jsonl", fields)  # and our own scripts read them
    assert [r["chosen"] for r in again] == [r["chosen"] for r in ROWS[:2]]
    assert [len(r["prompt"]) for r in again] == [1, 3]


def test_core_rows_have_the_columns_and_types_of_the_set(tmp_path):
    data = export_rows(ROWS, tmp_path, format="core", max_rows=3)
    types = {name: feature.dtype for name, feature in data.features.items()}
    text = dict.fromkeys(("prompt", "chosen", "chosen_model", "rejected", "rejected_model", "subset"), "string")
    assert types == {"id": "int64"} | text
    assert [{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in data] == [
        {k: row[k] for k in ("prompt", "chosen", "rejected")} for row in ROWS[:3]
    ]


def test_prompts_that_rewardbench_would_bend_are_refused(tmp_path):
    def turns(*roles):
        return ROWS[0] | {"prompt": [{"role": role, "content": "text"} for role in roles]}

    for roles in (("system", "user"), ("user", "assistant"), ("user", "user", "user"), ("system", "user", "system")):
        with pytest.raises(InputError, match=rf"line 2: field 'prompt' has the roles {', '.join(roles)}"):
            export_rows([ROWS[0], turns(*roles)], tmp_path)
    with pytest.raises(InputError, match=r"line 1: .* 3 turns.*--format conversations"):
        export_rows([turns("user", "assistant", "user")], tmp_path, format="core")
    assert not (tmp_path / "out.jsonl").exists()
