"""Scorers from disk, and those that are no causal LM with a head called `score`: encoders, and
other heads."""

import contextlib
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSequenceClassification

from utils import E_HEAD, InputError, Scorer, backend, in_one_line


def load(path, tokenizer, trained, frozen, expected_reward_head):
    """As utils.load_scorer says."""
    with in_one_line(f"{path}: no model"):
        config = AutoConfig.from_pretrained(path)
    if "SequenceClass" in str(config.architectures) and config.num_labels != 1:
        raise InputError(f"{path}: has {config.num_labels} labels, and a scorer has one")

    def wrap(model, missing):
        if trained and missing:
            problem = f"has no reward head ({min(missing)} is missing)"
            raise InputError(f"{path}: {problem}; train it with am_train.py")
        saved = Path(path) / E_HEAD
        with in_one_line(f"{path}: {config.model_type} models cannot be scorers here"):
            if len(tokenizer) > model.get_input_embeddings().num_embeddings:
                model.resize_token_embeddings(len(tokenizer))
            model.config.pad_token_id = tokenizer.pad_token_id
            scorer = Scorer(model, expected_reward_head or (trained and saved.is_file()))
        if saved.is_file() and scorer.e_head is not None:
            scorer.e_head.load_state_dict(load_file(saved))
        record = Path(path) / "training.json"
        if trained and record.is_file():
            with in_one_line(f"{record}: cannot be read"):
                training = json.loads(record.read_text(encoding="utf-8"))
                scorer.bf16 = training.get("args", {}).get("bf16")
        if not hasattr(model, "score") or config.is_encoder_decoder:
            try_out(scorer, path)
        return scorer

    return backend.load(AutoModelForSequenceClassification, path, wrap, frozen, num_labels=1)


@torch.no_grad()
def sees_ahead(model, unknown=True):
    """Whether the last token changes the states of those before it: an encoder."""
    ids = torch.arange(1, 9, device=next(model.parameters()).device)[None]
    other = ids.clone()
    other[0, -1] = 1
    with backend.whole([*model.parameters()]), contextlib.suppress(Exception):  # with a decoder
        first, second = (model.base_model(x).last_hidden_state[0, :-1] for x in (ids, other))
        return not torch.allclose(first, second, atol=1e-5 * float(first.abs().max()))
    return unknown


@torch.no_grad()
def try_out(scorer, path):
    """Find out now, on a short text, what would end a run later."""
    ids = torch.arange(1, 13, device=next(scorer.parameters()).device)[None]
    mask, prompt_lens = ids < 9, torch.full_like(ids[:, 0], 4)
    ids[~mask] = scorer.model.config.pad_token_id
    problem = f"{path}: {scorer.model.config.model_type} models cannot be scorers here"
    with backend.whole([*scorer.parameters()]), in_one_line(problem):
        alone, padded = (scorer(ids[:, :n], mask[:, :n], prompt_lens)[0] for n in (8, 12))
    if not torch.allclose(alone, padded, atol=1e-3):
        print(f"{path}: scores of a {scorer.model.config.model_type} depend on the batch's padding")


def read(scorer, input_ids, attention_mask, prompt_lens):
    """r and e of utils.Scorer, each (batch,), float32: r by the model's own head, e in a pass over
    the prompt, at the first token of an encoder and at the last one of a causal LM."""
    model, segments = scorer.model, {}
    prompt = torch.arange(input_ids.shape[1], device=input_ids.device) < prompt_lens[:, None]
    if scorer.is_encoder and getattr(model.config, "type_vocab_size", 0) > 1:
        segments["token_type_ids"] = (~prompt & attention_mask).long()  # the response: segment 1
    r, prompt_end = model(input_ids, attention_mask=attention_mask.long(), **segments).logits, None
    if scorer.e_head is not None:
        hidden = model.base_model(input_ids, attention_mask=prompt.long()).last_hidden_state
        at = torch.zeros_like(prompt_lens) if scorer.is_encoder else prompt_lens - 1
        prompt_end = hidden[torch.arange(len(hidden), device=hidden.device), at]
    e = scorer.expected_reward(prompt_end, r)
    return r.squeeze(-1).float(), e.squeeze(-1).float()


def save(scorer, folder, state_dict):
    """As Scorer.save_pretrained says."""
    e_head = {k[7:]: v for k, v in state_dict.items() if k.startswith("e_head.")}
    model = {k[6:]: v for k, v in state_dict.items() if k.startswith("model.")}
    scorer.model.save_pretrained(folder, state_dict=model)
    (Path(folder) / E_HEAD).unlink(missing_ok=True)  # an earlier run's
    if e_head:
        save_file(e_head, Path(folder) / E_HEAD)
