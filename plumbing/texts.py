"""The one form of a text: chat template, special tokens, the token that ends an answer, cuts.

A scorer reads a text in the form in which it was trained, whoever asks: training, calibration,
selection, PPO, judge. That form is encode_sides of the scorer's own tokenizer.
"""

import contextlib
import functools
import json
from pathlib import Path
from types import SimpleNamespace

from plumbing.errors import InputError, in_one_line


def load_tokenizer(path, dedicated_pad=False):
    """dedicated_pad: transformers takes the last token that is not padding for a text's end, so a
    scorer's padding must not be <eos>."""
    from transformers import AutoTokenizer

    from plumbing.hub import ask_once

    inside = Path(path) / "model"
    hint = f"; {inside} is one" if inside.is_dir() else ""
    ask_once(path)
    with in_one_line(f"{path}: no model folder or hub id with a fast tokenizer{hint}"):
        tokenizer = AutoTokenizer.from_pretrained(path)
        tokenizer.backend_tokenizer.no_padding()  # a sentence encoder's file may fix a length
        tokenizer.backend_tokenizer.no_truncation()
    if dedicated_pad and tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    elif tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = answer_end(tokenizer)
    return tokenizer


def render(tokenizer, prompt, where="a prompt"):
    """The prompt as text: by the chat template, or as `role: content` lines where there is none."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if tokenizer.chat_template:
        problem = f"{where}: the chat template fails on roles {[m['role'] for m in messages]}"
        with in_one_line(problem):  # a template is a program: it may refuse a role, or just fail
            return tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False
            )
    if isinstance(prompt, str):
        return prompt
    return "".join(f"{m['role']}: {m['content']}\n" for m in prompt) + "assistant:"


def answer_end(tokenizer):
    """The token that ends an answer: what the chat template puts behind it, or else <eos>. What a
    template adds behind that token, as ChatML's newline, belongs to no answer."""
    template, end = tokenizer.chat_template, tokenizer.eos_token_id
    if template:
        found = template_end(tokenizer, str(template))
        end = end if found is None else found
    if end is None:
        raise InputError(f"{tokenizer.name_or_path}: the tokenizer has no end-of-sequence token")
    return end


@functools.lru_cache(16)
def template_end(tokenizer, template):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    with contextlib.suppress(Exception):  # some know no assistant
        _, found, behind = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("Hello")
        added = tokenizer.added_tokens_decoder
        ids = tokenizer(behind, add_special_tokens=False).input_ids
        return next(i for i in ids if found and i in added and added[i].content.strip())


def tokenize(tokenizer, prompt, where, encoder=False):
    """tokenizers.Encoding of a prompt. A chat template holds the special tokens; without one the
    tokenizer's go before the prompt, and not behind it (<eos>, of some)."""
    special = not (encoder or tokenizer.chat_template)
    [x] = tokenizer(render(tokenizer, prompt, where), add_special_tokens=special).encodings
    x.truncate(max((n for n, added in enumerate(x.special_tokens_mask, 1) if not added), default=0))
    if not len(x):
        raise InputError(f"{where}: the prompt has no tokens")
    return x


def encode_sides(tokenizer, prompt, responses, max_length, truncate, where, encoder=False):
    """A prompt with each of its responses -> [(ids, prompt_len)], the most tokens cut of one.

    This is the one form of a text: a causal LM reads  prompt response end-of-answer,  an encoder
    [CLS] prompt [SEP] response [SEP].  Where a response does not fit, `truncate` cuts the prompt,
    alike for all, down to a quarter of the room, and then the response's end.
    """
    fast, room = tokenizer.backend_tokenizer, max_length
    room -= encoder * tokenizer.num_special_tokens_to_add(pair=True)
    end = [] if encoder else [answer_end(tokenizer)]
    x = tokenize(tokenizer, prompt, where, encoder)
    ys = [fast.encode(response, add_special_tokens=False) for response in responses]
    responses = [y.ids + end * (y.ids[-1:] != end) for y in ys]
    longest = max(map(len, responses))
    if len(x) + longest > room and not (truncate and room > 1):
        problem = f"the prompt has {len(x)} tokens and its response {longest}"
        problem += f", and --max_length leaves room for {room}; raise it"
        ways = "" if room < 2 else ", or pass --truncate_prompts True"
        raise InputError(f"{where}: {problem} or lower --response_length{ways}")
    prompt_ids, cut = x.ids, max(0, len(x) + longest - room)
    if cut:
        prompt_ids, responses = shorten(tokenizer, prompt, x, ys, responses, room, where, encoder)
    if not encoder:
        return [(prompt_ids + y, len(prompt_ids)) for y in responses], cut
    alone, *pairs = (fast.post_process(x, y, add_special_tokens=True).ids for y in (None, *ys))
    return [(ids, len(alone)) for ids in pairs], cut


def encode_pair(tokenizer, prompt, response, max_length, truncate, where, encoder=False):
    """encode_sides of one response -> (ids, prompt_len, tokens cut)."""
    how = max_length, truncate, where, encoder
    [(ids, prompt_len)], cut = encode_sides(tokenizer, prompt, [response], *how)
    return ids, prompt_len, cut


def encode_rows(tokenizer, rows, fields, args, name, encoder=False):
    """encode_sides of each row's prompt and `fields` -> for each row [(ids, prompt_len), ...]."""
    texts, cut, length = [], 0, (args.max_length, args.truncate_prompts)
    for number, row in enumerate(rows, 1):
        where = f"{name}, line {row.get('file_line', number)}"
        sides = row["prompt"], [row[field] for field in fields]
        encoded, dropped = encode_sides(tokenizer, *sides, *length, where, encoder)
        texts.append(encoded)
        cut += dropped > 0
    if cut:
        print(f"{name}: {cut} of {len(rows)} rows shortened to {args.max_length} tokens")
    return texts


def encode_prompts(tokenizer, rows, max_length, response_length, truncate, name):
    """Ids of every row's prompt, cut to what the response leaves room for if `truncate`."""
    length = max_length - response_length + 1  # with an end
    args = SimpleNamespace(max_length=length, truncate_prompts=truncate)
    rows = [row | {"response": ""} for row in rows]
    texts = encode_rows(tokenizer, rows, ["response"], args, name)
    return [ids[:prompt_len] for [(ids, prompt_len)] in texts]


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


def same_form(tokenizer, other):
    """Whether both make the same ids of any text (the other one may have a padding token more)."""
    known, more = tokenizer.get_vocab(), other.get_vocab()

    def form(of):
        parts = json.loads(of.backend_tokenizer.to_str())
        added = [token for token in parts["added_tokens"] if token["content"] in known]
        parts = [parts[k] for k in ("normalizer", "pre_tokenizer", "post_processor", "model")]
        return of.chat_template, answer_end(of), parts, added

    alike = known.items() <= more.items() and more.keys() - known.keys() <= {other.pad_token}
    return alike and form(tokenizer) == form(other)
