"""A model's first layers, left as they are and computed once: baselines/reward_losses.py trains
many arms and seeds on the same texts, and most of the time would be in these layers.
"""

import torch

from utils import DEVICE, InputError, autocast, length_batches, pad


def cache_frozen_layers(scorer, tokenizer, texts, num_layers, cache, bf16=False):
    """Freeze the embeddings and first layers of an encoder (BERT) or causal LM (Llama); `cache`
    keeps their output for `texts`.

    Only their `forward` is bypassed: the scorer is saved whole.
    """
    base = scorer.model.base_model
    if scorer.is_encoder:
        embeddings, layers = base.embeddings, getattr(getattr(base, "encoder", None), "layer", ())
    else:
        embeddings, layers = getattr(base, "embed_tokens", None), getattr(base, "layers", ())
    if embeddings is None or num_layers > len(layers):
        wanted = "takes an encoder, or a causal LM like Llama, with at least as many layers"
        raise InputError(f"--num_frozen_layers {num_layers}: {wanted}")
    frozen, kept = [embeddings, *layers[:num_layers]], {}
    for module in frozen:
        module.requires_grad_(False)

    def keep(module, inputs, output):
        kept["hidden"] = output[0] if isinstance(output, tuple) else output

    hook = frozen[-1].register_forward_hook(keep)
    scorer.eval()
    new = [text for text in texts if tuple(text[0]) not in cache]
    with torch.no_grad(), autocast(bf16):
        for batch in length_batches([len(ids) for ids, _ in new], 32):
            prompt_lens = torch.tensor([new[i][1] for i in batch], device=DEVICE)
            scorer(*pad([new[i][0] for i in batch], tokenizer.pad_token_id), prompt_lens)
            for row, i in enumerate(batch):
                cache[tuple(new[i][0])] = kept["hidden"][row, : len(new[i][0])].half()
    hook.remove()
    scorer.train()

    def look_up(input_ids, **_):
        if input_ids.dim() == 1:  # am_train.score_batch, of all texts at once: not used below
            return torch.zeros(len(input_ids), base.config.hidden_size, device=input_ids.device)
        hidden = torch.zeros(*input_ids.shape, base.config.hidden_size, device=input_ids.device)
        for i, row in enumerate(input_ids.cpu()):
            ids = row[: int((row != tokenizer.pad_token_id).sum())].tolist()
            hidden[i, : len(ids)] = cache[tuple(ids)].float()
        return hidden

    forward = scorer.forward  # by ids: embeddings would not say which text they are of
    scorer.forward = lambda ids, mask, prompt_lens, embedded=None: forward(ids, mask, prompt_lens)
    embeddings.forward = look_up
    for layer in layers[:num_layers]:
        layer.forward = lambda hidden, *args, **kwargs: hidden
