"""Scorers that are no causal LM with a head called `score`: encoders, and other heads."""

import contextlib

import torch

from utils import backend, in_one_line


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
