"""The form of a text: which token ends an answer, and whether two tokenizers make the same ids."""

import contextlib
import functools
import json

from utils import answer_end


def same(tokenizer, other):
    """As utils.same_form says."""
    known, more = tokenizer.get_vocab(), other.get_vocab()

    def form(of):
        parts = json.loads(of.backend_tokenizer.to_str())
        added = [token for token in parts["added_tokens"] if token["content"] in known]
        parts = [parts[k] for k in ("normalizer", "pre_tokenizer", "post_processor", "model")]
        return of.chat_template, answer_end(of), parts, added

    alike = known.items() <= more.items() and more.keys() - known.keys() <= {other.pad_token}
    return alike and form(tokenizer) == form(other)


@functools.lru_cache(16)
def template_end(tokenizer, template):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    with contextlib.suppress(Exception):  # some know no assistant
        _, found, behind = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("Hello")
        added = tokenizer.added_tokens_decoder
        ids = tokenizer(behind, add_special_tokens=False).input_ids
        return next(i for i in ids if found and i in added and added[i].content.strip())
