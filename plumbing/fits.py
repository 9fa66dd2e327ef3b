"""What a model has room for."""

from torch import nn

from plumbing.errors import InputError


def check(model, tokenizer, longest):
    """As utils.check_fits says."""
    from utils import backend

    known = len(tokenizer)
    words = getattr(model.get_input_embeddings(), "num_embeddings", known)
    if known > words:
        problem = f"the tokenizer has {known} tokens, the model {words}"
        raise InputError(f"{model.name_or_path}: {problem}; resize_token_embeddings and save it")
    positions = getattr(model.config, "max_position_embeddings", None)
    positions = getattr(model.config, "max_seq_len", positions)  # MPT's name
    if not positions or positions < 0:
        return
    for module in model.modules():  # some families count from behind the padding's id
        words = module is model.get_input_embeddings()
        if isinstance(module, nn.Embedding) and module.num_embeddings == positions and not words:
            positions -= 0 if module.padding_idx is None else module.padding_idx + 1
            break
    if longest > positions:
        problem = f"texts may have {longest} tokens, the model has {positions} positions"
        raise InputError(f"--max_length: {problem}; lower it or --response_length")
    if positions % backend.multiple:  # GPT-2 with 100: a text of 98 tokens has no room for 14 more
        backend.multiple = 1
