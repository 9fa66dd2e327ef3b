"""Every family the scorer is promised for: scores do not depend on the batch or on the padding, they are
transformers' own, and a training step of am_train.py reaches the backbone.

Weights are drawn with a std of 0.2, as in test_models.py: at 0.02 all scores are near 0 and would meet any tolerance.
"""

import json
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    Gemma2Config,
    Gemma3TextConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

import am_train
from tests.conftest import SENTENCE
from tests.test_models import CAUSAL, ENCODERS, PAD, SIZES, SPECIAL, WIDE, close, make_scorer
from am_train import score_batch
from utils import encode_pair, load_scorer, pad, write_jsonl

GROUPED = {"num_key_value_heads": 1, "head_dim": 16}
WINDOW = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}  # shorter than the texts
CAUSAL = CAUSAL | {
    "qwen3": lambda: Qwen3Config(**SIZES, **SPECIAL, **WIDE, **GROUPED),
    "gemma2": lambda: Gemma2Config(**SIZES, **SPECIAL, **WIDE, **GROUPED, **WINDOW, query_pre_attn_scalar=16),
    "gemma3": lambda: Gemma3TextConfig(**SIZES, **SPECIAL, **WIDE, **GROUPED, **WINDOW, query_pre_attn_scalar=16),
}
FAMILIES = CAUSAL | ENCODERS
WORDS = [*dict.fromkeys(SENTENCE.replace(",", " ,").replace(".", " .").split())]
# words of prompt and response
LENGTHS = [(5, 3), (2, 9), (11, 1), (1, 1), (7, 6)]


def causal_tokenizer():
    """Word-level, with a padding token of its own; every id below the models' 96."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=128
    )


def tokenizer_of(family, request):
    if family == "qwen2":  # transformers reads any tokenizer beside such a model by Qwen2's rules, which are byte-level
        return request.getfixturevalue("tokenizer")
    if family in CAUSAL:
        return causal_tokenizer()
    return request.getfixturevalue("roberta_tokenizer" if family == "roberta" else "bert_tokenizer")


def config_of(family):
    config = FAMILIES[family]()
    config.vocab_size = 288 if family == "qwen2" else config.vocab_size  # room for the byte-level tokenizer
    return config


def pairs_of_words():
    return [(" ".join(WORDS[:n]), " ".join(WORDS[-m:])) for n, m in LENGTHS]


def encoded(family, request):
    tokenizer = tokenizer_of(family, request)
    return [encode_pair(tokenizer, x, y, 64, False, "here", family in ENCODERS)[:2] for x, y in pairs_of_words()]


@torch.no_grad()
def score(scorer, rows, extra=0):
    """(2, rows): r and e of one batch, `extra` columns wider than need be."""
    ids, mask = pad([ids for ids, _ in rows], PAD)
    ids, mask = (torch.nn.functional.pad(part, (0, extra), value=0) for part in (ids, mask))
    return torch.stack(scorer(ids, mask, torch.tensor([n for _, n in rows])))


# --- invariance -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("e_head", [True, False], ids=["r and e", "r"])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_depend_on_neither_batch_size_nor_padding(family, e_head, request):
    scorer, rows = make_scorer(config_of(family), e_head), encoded(family, request)
    alone = torch.cat([score(scorer, [row]) for row in rows], 1)
    assert alone[0].std() > 1e-3 and (alone[1].std() > 1e-3 if e_head else (alone[1] == 0).all())
    assert close(score(scorer, rows), alone)
    assert close(score(scorer, rows, extra=9), alone)
    assert close(torch.cat([score(scorer, rows[:2]), score(scorer, rows[2:])], 1), alone)
    assert close(score(scorer, rows[::-1]).flip(1), alone)
    with torch.no_grad():  # in groups, embeddings looked up for all of them
        assert close(score_batch(scorer, SimpleNamespace(pad_token_id=PAD), rows, False), alone)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_lookup_a_batch_has_the_gradients_of_one_a_text(family, request):
    scorer, rows = make_scorer(config_of(family)), encoded(family, request)
    gradients = []
    for together in (True, False):
        scorer.zero_grad()
        groups = [rows] if together else [[row] for row in rows]
        r, e = torch.cat([score_batch(scorer, SimpleNamespace(pad_token_id=PAD), group, False) for group in groups], 1)
        (r - 2 * e).square().sum().backward()
        gradients.append([p.grad.clone() for p in scorer.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 2
    assert all(close(a, b, 1e-4 * (1 + b.abs().max().item())) for a, b in zip(*gradients, strict=True))


# --- r is transformers' own -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_r_is_the_logit_of_auto_model_on_a_right_padded_batch(family, request):
    scorer, rows = make_scorer(config_of(family), False), encoded(family, request)
    auto = scorer.model
    assert isinstance(auto, type(AutoModelForSequenceClassification.from_config(auto.config)))
    ids, mask = pad([ids for ids, _ in rows], PAD)
    kinds = {}
    if family == "bert":  # the tokenizer's own segments, not encode_pair's
        tokenizer = tokenizer_of(family, request)
        x, y = map(list, zip(*pairs_of_words(), strict=True))
        batch = tokenizer(x, y, padding=True, return_tensors="pt", return_token_type_ids=True)
        assert torch.equal(batch.input_ids, ids)
        kinds = {"token_type_ids": batch.token_type_ids}
    with torch.no_grad():
        logits = auto(ids, attention_mask=mask.long(), **kinds).logits
        assert logits.shape == (len(rows), 1)
        assert close(score(scorer, rows)[0], logits[:, 0])
        if family == "bert":  # and the segments matter
            assert not close(auto(ids, attention_mask=mask.long()).logits[:, 0], logits[:, 0], 1e-3)


# --- gradients and a step of training ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_r_and_of_e_reach_the_backbone(family, request):
    scorer, rows = make_scorer(config_of(family)), encoded(family, request)
    backbone = dict(scorer.model.base_model.named_parameters())
    ids, mask = pad([ids for ids, _ in rows], PAD)
    for part in scorer(ids, mask, torch.tensor([n for _, n in rows])):
        scorer.zero_grad()
        part.sum().backward(retain_graph=True)
        reached = {name for name, p in backbone.items() if p.grad is not None and p.grad.abs().max() > 0}
        assert all(p.grad is None or p.grad.isfinite().all() for p in backbone.values())
        # positions, pooler and biases may have none; both layers and the embeddings have
        assert any("embed" in name or "wte" in name for name in reached)
        for layer in (".0.", ".1."):
            assert any(layer in name for name in reached)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_step_of_am_train(family, request, tmp_path):
    """From the folder of a causal LM or encoder to one that AutoModel reads, the backbone moved."""
    tokenizer, config = tokenizer_of(family, request), config_of(family)
    torch.manual_seed(0)
    start = (AutoModelForCausalLM if family in CAUSAL else AutoModelForMaskedLM).from_config(config)
    start.save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    x = pairs_of_words()
    rows = [{"prompt": p, "chosen": c, "rejected": x[i - 1][1]} for i, (p, c) in enumerate(x)]
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    data = str(tmp_path / "pairs.jsonl")
    seen = {}
    args = am_train.Args(
        model_name_or_path=str(tmp_path / "start"), dataset_name=data, eval_dataset_name=data,
        output_dir=str(tmp_path / "run"), expected_reward="joint", learning_rate=1e-3, global_batch_size=5,
        per_device_train_batch_size=3, max_length=64, truncate_prompts=True,
    )  # fmt: skip

    def keep(scorer, tokenizer, texts):
        seen.update({name: p.detach().clone() for name, p in scorer.model.base_model.named_parameters()})

    chosen, rejected = am_train.main(args, prepare=keep)
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert 0 < first["loss"] < 50 and 0 < first["grad_norm"] < float("inf")
    assert torch.tensor([*chosen, *rejected]).std() > 1e-3
    scorer = load_scorer(str(tmp_path / "run" / "model"), tokenizer)
    moved = [(p - seen[n]).abs().max().item() for n, p in scorer.model.base_model.named_parameters()]
    assert sum(m > 1e-4 for m in moved) > len(moved) / 2  # AdamW's first step is about the learning rate everywhere
