"""Chat templates of real models as published, and tiny models that have them.

    python -m tests.chat_templates      the table of docs/results/chat_templates.md

gemma3, phi3, llama3 and qwen3.jinja are byte for byte those of the package trl 1.16 (Apache-2.0,
trl/chat_templates), which keeps them as the models ship them; mistral_v1.jinja is that of axolotl
0.19 (Apache-2.0). The others are written here, and render what the models' own do. Tokens are those
of the models' tokenizer_config.json, stops those of their generation_config.json.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    PreTrainedTokenizerFast,
)

FILES = Path(__file__).with_suffix("")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content']"
    " + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SMOLLM2 = (  # renders what SmolLM2's does: ChatML, and a system message where there is none
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou are a helpful AI assistant "
    "named SmolLM, trained by Hugging Face<|im_end|>\\n' }}{% endif %}" + CHATML
)


@dataclass(frozen=True)
class Model:
    """What a model's tokenizer and generation config say."""

    template: str | None  # a file of chat_templates/, the template itself, or none
    eos: str  # of the tokenizer
    end: str  # what ends an assistant's turn
    stops: tuple[str, ...] = ()  # of the generation config
    bos: str | None = None
    post: str | None = None  # what the tokenizer adds to a text: its post-processor
    pad: str | None = None
    others: tuple[str, ...] = ()  # special tokens beside these
    rstrip: bool = False  # special tokens swallow the white space behind them
    before: str = ""  # what the template puts between generation prompt and content
    behind: str = "\n"  # and behind the token that ends a turn


HEADERS = ("<|start_header_id|>", "<|end_header_id|>")
MODELS = {
    "Gemma 3": Model(
        "gemma3.jinja", "<eos>", "<end_of_turn>", ("<eos>", "<end_of_turn>"),
        bos="<bos>", post="<bos> $A", pad="<pad>", others=("<start_of_turn>",),
    ),
    "Phi-3": Model(
        "phi3.jinja", "<|endoftext|>", "<|end|>", ("<|endoftext|>", "<|assistant|>", "<|end|>"),
        bos="<s>", pad="<|endoftext|>", others=("<|user|>", "<|system|>"), rstrip=True,
        behind="\n<|endoftext|>",
    ),
    "Llama 3": Model(
        "llama3.jinja", "<|eot_id|>", "<|eot_id|>", ("<|end_of_text|>", "<|eot_id|>"),
        bos="<|begin_of_text|>", post="<|begin_of_text|> $A", others=HEADERS, behind="",
    ),
    "Llama 3, first release": Model(
        "llama3.jinja", "<|end_of_text|>", "<|eot_id|>", ("<|end_of_text|>", "<|eot_id|>"),
        bos="<|begin_of_text|>", post="<|begin_of_text|> $A", others=HEADERS, behind="",
    ),
    "Qwen 3": Model(
        "qwen3.jinja", "<|im_end|>", "<|im_end|>", ("<|im_end|>", "<|endoftext|>"),
        pad="<|endoftext|>", others=("<|im_start|>",), before="<think>\n\n</think>\n\n",
    ),
    "SmolLM2": Model(
        SMOLLM2, "<|im_end|>", "<|im_end|>", ("<|im_end|>",),
        bos="<|im_start|>", pad="<|im_end|>", others=("<|endoftext|>",),
    ),
    "ChatML on a base model": Model(  # the template was set, the <eos> stayed
        CHATML, "<|endoftext|>", "<|im_end|>", ("<|endoftext|>",),
        pad="<pad>", others=("<|im_start|>",),
    ),
    "Mistral 7B": Model(
        "mistral_v1.jinja", "</s>", "</s>", ("</s>",),
        bos="<s>", post="<s> $A", before=" ", behind="",
    ),
    "no template": Model(
        None, "<|endoftext|>", "<|endoftext|>", ("<|endoftext|>",),
        bos="<|endoftext|>", behind="",
    ),
    "no template, with <s>": Model(
        None, "</s>", "</s>", ("</s>",), bos="<s>", post="<s> $A", pad="<unk>", behind="",
    ),
}  # fmt: skip
PROMPT, ANSWER, OTHER = "What is 2 + 2?", "4.", "5."


def template_of(name):
    template = MODELS[name].template
    if template and template.endswith(".jinja"):
        template = (FILES / template).read_text(encoding="utf-8").removesuffix("\n")
    return template


def tokenizer_for(name, **changes):
    """Bytes and the special tokens of the model. changes: template, post, eos ... of another one."""
    model, template = MODELS[name], changes.pop("template", template_of(name))
    post, eos = changes.pop("post", model.post), changes.pop("eos", model.eos)
    special = {"bos_token": model.bos, "eos_token": eos, "pad_token": model.pad} | changes
    special = {k: v for k, v in special.items() if v}
    names = dict.fromkeys([*special.values(), model.eos, model.end, *model.stops, *model.others])
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    added = [AddedToken(n, special=True, normalized=False, rstrip=model.rstrip) for n in names]
    size = {"vocab_size": 256 + len(added), "initial_alphabet": alphabet, "show_progress": False}
    backend.train_from_iterator([], trainers.BpeTrainer(special_tokens=added, **size))
    if post:
        used = [(n, backend.token_to_id(n)) for n in names if n in post.split()]
        backend.post_processor = processors.TemplateProcessing(single=post, special_tokens=used)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.chat_template = template
    return tokenizer


def gpt2_config(tokenizer, **changes):
    sizes = {"n_positions": 384, "n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": len(tokenizer)}
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    ids["pad_token_id"] = tokenizer.pad_token_id
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "initializer_range": 0.2}
    return GPT2Config(**sizes | ids | still | changes)


def save_policy(folder, tokenizer, end, stops):
    """A random GPT-2 whose samples are small letters, some ten of them, and then `end`: text that is
    read again as the same tokens."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(gpt2_config(tokenizer, tie_word_embeddings=False))
    letters = tokenizer.convert_tokens_to_ids([*"abcdefghijklmnopqrstuvwxyz"])
    with torch.no_grad():
        model.transformer.ln_f.bias.fill_(1.0)  # so that a constant row gives a constant logit
        head = model.lm_head.weight
        head -= head.mean(1, keepdim=True)
        for token in {*range(len(tokenizer))} - {*letters}:
            head[token] = (1.5 if token == end else -30.0) / model.config.n_embd
    model.generation_config.eos_token_id = stops
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_scorer(folder, tokenizer):
    torch.manual_seed(1)
    config = gpt2_config(tokenizer, num_labels=1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def models_for(name, folder, **changes):
    """Paths of a tiny policy and a tiny scorer of the model, written into `folder`."""
    tokenizer, model = tokenizer_for(name, **changes), MODELS[name]
    end, *stops = tokenizer.convert_tokens_to_ids([model.end, *model.stops])
    save_policy(Path(folder) / "policy", tokenizer, end, stops)
    save_scorer(Path(folder) / "scorer", tokenizer)
    return str(Path(folder) / "policy"), str(Path(folder) / "scorer")


def messages(prompt, answer):
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def markdown():
    """The table of docs/results/chat_templates.md: one text in the form of each model."""
    from utils import encode_pair

    def code(text):
        text = text.replace("\n", "↵").replace("|", r"\|")
        return f"`{text}`" if text else ""

    lines = ["| model | what is read | left out behind it |", "|---|---|---|"]
    for name, model in MODELS.items():
        tokenizer = tokenizer_for(name)
        ids, *_ = encode_pair(tokenizer, PROMPT, ANSWER, 384, False, name)
        text = tokenizer.decode(ids, skip_special_tokens=False)
        if model.rstrip:  # in the tokens it is swallowed, in the text it stands
            text = tokenizer.apply_chat_template(messages(PROMPT, ANSWER), tokenize=False)
            text = text[: text.rindex(model.end) + len(model.end)]
        lines.append(f"| {name} | {code(text)} | {code(model.behind)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown())
