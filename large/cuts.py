"""Texts that do not fit --max_length, cut where --truncate_prompts asks for it."""

from utils import InputError, render


def shorten(tokenizer, prompt, x, ys, responses, room, where, encoder):
    """Ids of the prompt, alike for all its responses, and of these. x, ys: their Encodings, which
    are shortened in place for an encoder. The prompt keeps up to a quarter of the room."""
    longest = max(map(len, responses))
    n_y = min(longest, max(room - len(x), room - max(1, room // 4)))
    n_x = min(len(x), room - n_y)
    if not encoder:
        return cut_prompt(tokenizer, prompt, x, n_x, where), [y[:n_y] for y in responses]
    x.truncate(n_x, direction="left")
    for y in ys:
        y.truncate(n_y)
    return x.ids, [y.ids for y in ys]


def cut_prompt(tokenizer, prompt, x, length, where):
    """Ids of a prompt's Encoding, cut to `length` tokens. What stands before its first word stays,
    <bos> and the template's head, and then its end."""
    if len(x) <= length:
        return x.ids
    other = "\0" if isinstance(prompt, str) else [m | {"content": "\0"} for m in prompt]
    texts = zip(*(render(tokenizer, p, where) for p in (prompt, other)), strict=False)
    shared = next((i for i, (a, b) in enumerate(texts) if a != b), 0)
    head = sum(end <= shared for _, end in x.offsets)
    if head >= length:
        raise InputError(f"{where}: --max_length leaves no room for the prompt; raise it")
    return x.ids[:head] + x.ids[len(x) - length + head :]
