"""What a model has room for."""

from torch import nn

from plumbing.errors import InputError


def check(model, tokenizer, longest):
    """As utils.check_fits says."""
    known = len(tokenizer)
    words = getattr(model.get_input_embeddings(), "num_embeddings", known)
    if known > words:
        problem = f"the tokenizer has {known} tokens, the model {words}"
        raise InputError(f"{model.name_or_path}: {problem}; resize_token_embeddings and save it")
    positions = getattr(model.config, "max_position_embeddings", None) or longest
    positions = getattr(model.config, "max_seq_len", positions)  # MPT's name
    for module in model.modules():  # some families count from behind the padding's id
        words = module is model.get_input_embeddings()
        if isinstance(module, nn.Embedding) and module.num_embeddings == positions and not words:
            positions -= 0 if module.padding_idx is None else module.padding_idx + 1
            break
    if longest > positions > 0:
        problem = f"texts may have {longest} tokens, the model has {positions} positions"
        raise InputError(f"--max_length: {problem}; lower it or --response_length")
