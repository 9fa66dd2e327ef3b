"""What every script shares: rows, tokens, models, sampling, the optimiser, the run folder.

Nobody has to read it to understand the paper: losses, GAE and metrics stand in the scripts. Shapes:
batch (sequences), seq_len (prompt + response, padded right), response_len (response alone).
"""

import contextlib
import functools
import gzip
import hashlib
import inspect
import json
import math
import os
import pkgutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LOGITS_AT_ONCE = 2**26  # numbers: 256 MB of float32
E_HEAD = "expected_reward_head.safetensors"  # e of Eq. 7, beside the model


class InputError(Exception):
    """A mistake of the user's: run_cli prints it as one line and exits with code 2."""


def first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# --- how models run ---


class Engine:
    """A model and its AdamW. Gradients add up over backward() until step()."""

    def __init__(self, module, learning_rate, schedule=None, weight_decay=0.0, max_grad_norm=1.0):
        self.module, self.max_grad_norm = module, max_grad_norm
        trained = [p for p in module.parameters() if p.requires_grad]
        options = {"lr": learning_rate, "weight_decay": weight_decay, "betas": (0.9, 0.95)}
        self.optimizer = torch.optim.AdamW(trained, **options, fused=True)
        schedule = schedule or (lambda step: 1.0)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, schedule)

    def run(self, function, *args):
        return function(self.module, *args)

    def __call__(self, *args):
        return self.run(lambda module: module(*args))

    def backward(self, loss):
        loss.backward()

    def step(self):
        """One step, unless the gradients are not finite; returns their norm before clipping."""
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), self.max_grad_norm).item()
        if math.isfinite(norm):
            self.optimizer.step()
            self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def state(self, folder):
        """For load_state; `folder` takes what one file cannot hold."""
        return {k: getattr(self, k).state_dict() for k in ("module", "optimizer", "scheduler")}

    def load_state(self, state):
        for name, part in state.items():
            getattr(self, name).load_state_dict(part)


class Backend:
    """One process, one device. For large models large/ turns `backend` into one for many."""

    engine = Engine
    writes = True  # files
    length_ratio = 0.85  # of length_batches

    def results(self, function, batches, count):
        """function(batch), a list, for all batches of indices -> the results of 0 to count - 1."""
        found = [None] * count
        for batch in batches:
            for i, result in zip(batch, function(batch), strict=True):
                found[i] = result
        return found

    def deal(self, batches):
        """The batches to train on here."""
        return batches

    def add_up(self, parts):
        """The sum over those batches of what each gave, a list of tensors."""
        return sum(parts)

    def once(self, function):
        """function(), called once for all."""
        return function()

    def load(self, auto_class, path, wrap, frozen, **options):
        """wrap(model, missing weights) of a pretrained model; `frozen`: it is only read."""
        return wrap(*pretrained(auto_class, path, dtype=torch.float32, **options)).to(DEVICE)

    def reference(self, policy, path):
        """pi_init, which stays as it is while the engine `policy` learns."""
        return load_policy(path, frozen=True)

    def sampler(self, model):
        """A context with the generate() of a model or an engine."""
        return contextlib.nullcontext(getattr(model, "module", model).generate)

    def whole(self, parameters):
        """A context in which these parameters can be changed."""
        return contextlib.nullcontext()

    def weights(self, module):
        return module.state_dict()

    def saved(self, folder, step):
        """The checkpoint of `step` is written."""

    def last_pass(self):
        """No model runs from here on: what follows is work for one."""


backend = Backend()


def autocast(bf16):
    """bfloat16 matrix products over float32 weights; nothing at all when `bf16` is off."""
    return torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=bf16)


@contextlib.contextmanager
def seeded(seed):
    """Random numbers from `seed` on, and none taken from those outside."""
    with torch.random.fork_rng([torch.cuda.current_device()] if DEVICE.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


# --- rows and tokens ---


def load_rows(name, fields, limit=0):
    """Rows of a .jsonl, .jsonl.gz or .parquet file or a hub id, `owner/name[/config][:split]`.

    fields: {column: "prompt" (text or messages {role, content}), "response" (text, or messages that
    end in it) or "text"}. `chosen` and `rejected` alone are conversations with a shared start.
    """
    rows = read_rows(name)[: limit or None]
    for number, row in enumerate(rows, 1):
        where, wrong = f"{name}, line {number}", ""
        if not isinstance(row, dict):
            raise InputError(f"{where}: expected a JSON object")
        row = rows[number - 1] = {k: v for k, v in row.items() if v is not None}  # null: absent
        row.pop("file_line", None)  # of another file
        sides = [row.get("chosen"), row.get("rejected")]
        if "prompt" in fields and "prompt" not in row and all(map(turns, sides)):
            pairs = enumerate(zip(*map(turns, sides), strict=False))
            row["prompt"] = sides[0][
                : next((i for i, (a, b) in pairs if a != b), min(map(len, sides)))
            ]
        for field, kind in fields.items():
            value = row.get(field)
            if kind == "response" and turns(value):
                *before, (role, _) = turns(value)
                prompt = turns(row.get("prompt")) or [("user", str(row.get("prompt")).strip())]
                if role != "assistant" or before not in ([], prompt):
                    wrong = "must be the prompt's messages or none, then one of the assistant's"
                row[field] = value = value[-1]["content"]
            if not (isinstance(value, str) or (kind == "prompt" and turns(value))):
                wrong = f"is missing or no text (found: {', '.join(row)})"
            elif kind != "text" and str(value).startswith("\n\nHuman:"):
                wrong = "is a transcript"
            if wrong or (kind == "prompt" and not value):
                wrong = f"{wrong or 'is empty'}; tools/convert_data.py reads other forms"
                raise InputError(f"{where}: field '{field}' {wrong}")
        if not isinstance(row.get("task", ""), str):
            raise InputError(f"{where}: field 'task' must be a string")
        if bad := [k for k, v in row.items() if isinstance(v, float) and not math.isfinite(v)]:
            raise InputError(f"{where}: field '{bad[0]}' must be a finite number")
    if not rows:
        raise InputError(f"{name}: holds no rows")
    return rows


def turns(value):
    """Messages as (role, content), by which they are compared; [] for anything else."""
    try:
        return [(m["role"], m["content"].strip()) for m in value if not isinstance(value, str)]
    except (TypeError, KeyError, AttributeError):
        return []


def read_rows(name):
    path, rows = Path(name), []
    try:
        if path.suffix in (".jsonl", ".json", ".gz"):
            open_file = gzip.open if path.suffix == ".gz" else open
            with open_file(path, "rt", encoding="utf-8") as file:
                for line in file.read().rstrip().split("\n"):
                    rows.append(json.loads(line or "null"))
            return rows if any(rows) else []
        import datasets

        hub_id, _, split = name.partition(":")
        owner, _, rest = hub_id.partition("/")
        where = (f"{owner}/{rest.split('/')[0]}", *rest.split("/")[1:])
        where = (hub_id,) if Path(hub_id).exists() or not rest else where
        if path.suffix == ".parquet":
            where = ("parquet", None, None, name)
        return datasets.load_dataset(*where, split=split or "train").to_list()
    except json.JSONDecodeError as error:
        raise InputError(f"{name}, line {len(rows) + 1}: not JSON ({error.msg})") from None
    except Exception as error:  # there are many ways; all mean that there are no rows to be had
        problem = f"neither a file of rows nor a hub id ({first_line(error)})"
        raise InputError(f"{name}: {problem}") from None


def load_tokenizer(path, dedicated_pad=False):
    """dedicated_pad: transformers takes the last token that is not padding for a text's end, so a
    scorer's padding must not be <eos>."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        tokenizer.backend_tokenizer.no_padding()  # a sentence encoder's file may fix a length
        tokenizer.backend_tokenizer.no_truncation()
    except (OSError, ValueError, AttributeError) as error:
        hint = f"{path}/model is one" if (Path(path) / "model").is_dir() else first_line(error)
        raise InputError(
            f"{path}: no model folder or hub id with a fast tokenizer ({hint})"
        ) from None
    if tokenizer.eos_token_id is None and tokenizer.sep_token_id is None:
        raise InputError(f"{path}: the tokenizer has no end-of-sequence token")
    if dedicated_pad and tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    elif tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def render(tokenizer, prompt, where="a prompt"):
    """The prompt as text: by the chat template, or as `role: content` lines where there is none."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if tokenizer.chat_template:
        try:
            return tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False
            )
        except Exception as error:  # a template is a program: it may refuse a role, or just fail
            problem = f"the chat template fails on roles {[m['role'] for m in messages]}"
            raise InputError(f"{where}: {problem} ({first_line(error)})") from None
    if isinstance(prompt, str):
        return prompt
    return "".join(f"{m['role']}: {m['content']}\n" for m in prompt) + "assistant:"


def encode_prompt(tokenizer, prompt, room, truncate, where):
    """Ids of a prompt, refused where `room` is too small for them unless `truncate`."""
    text = render(tokenizer, prompt, where)  # a chat template holds the special tokens
    ids = tokenizer(text, add_special_tokens=not tokenizer.chat_template).input_ids
    check_room(len(ids), room, truncate, where)
    return ids


def check_room(length, room, truncate, where):
    if not length or room < 1 or (length > room and not truncate):
        problem = f"the prompt has {length} tokens, and --max_length leaves room for {room}"
        raise InputError(f"{where}: {problem}; raise it or pass --truncate_prompts True")


def encode_prompts(tokenizer, rows, max_length, response_length, truncate, name):
    """Ids of every row's prompt, cut to what the response leaves room for if `truncate`."""
    room, prompts = max_length - response_length, []
    for number, row in enumerate(rows, 1):
        where = f"{name}, line {number}"
        prompts.append(encode_prompt(tokenizer, row["prompt"], room, truncate, where)[-room:])
    return prompts


def encode_pair(tokenizer, prompt, response, max_length, truncate, where, encoder=False):
    """Ids of prompt and response with special tokens -> (ids, prompt_len, tokens cut).

    A causal LM reads  prompt response <eos>,  an encoder  [CLS] prompt [SEP] response [SEP].
    Where both do not fit, the prompt keeps its end; the response is whole while a prompt token is.
    """
    fast, room = tokenizer.backend_tokenizer, max_length
    if encoder:
        room -= tokenizer.num_special_tokens_to_add(pair=True)
        texts = render(tokenizer, prompt, where), response
        x, y = (fast.encode(text, add_special_tokens=False) for text in texts)
        check_room(len(x), room - 1, truncate, where)
    else:
        x = encode_prompt(tokenizer, prompt, room - 1, truncate, where)
        y = [*tokenizer(response, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    n_y = min(len(y), room - 1)
    n_x = min(len(x), room - n_y)
    cut = len(x) - n_x + len(y) - n_y
    if not encoder:
        return x[-n_x:] + y[:n_y], n_x, cut
    x.truncate(n_x, direction="left")
    y.truncate(n_y)
    alone, pair = (fast.post_process(x, other, add_special_tokens=True).ids for other in (None, y))
    return pair, len(alone), cut


def encode_rows(tokenizer, rows, field, args, name, encoder=False):
    """encode_pair of each row's prompt and `field` -> [(ids, prompt_len)]; equal texts once."""
    known, texts = {}, [(str(row["prompt"]), row[field]) for row in rows]
    length = args.max_length, args.truncate_prompts
    for number, (row, text) in enumerate(zip(rows, texts, strict=True), 1):
        if text not in known:
            where = f"{name}, line {row.get('file_line', number)}"
            known[text] = encode_pair(tokenizer, row["prompt"], row[field], *length, where, encoder)
    if cut := sum(dropped > 0 for *_, dropped in known.values()):
        print(f"{name}: {cut} of {len(known)} texts shortened to --max_length {args.max_length}")
    return [known[text][:2] for text in texts]


def pad(sequences, pad_id, left=False):
    """Lists of ids -> input_ids (batch, seq_len) int64, attention_mask (batch, seq_len) bool."""
    side = {"batch_first": True, "padding_side": "left" if left else "right"}
    ids = [torch.tensor(s) for s in sequences]
    mask = pad_sequence([torch.ones(len(s), dtype=torch.bool) for s in sequences], **side)
    return pad_sequence(ids, padding_value=pad_id, **side).to(DEVICE), mask.to(DEVICE)


def pad_pairs(pairs, pad_id):
    """[(prompt ids, response ids)] -> input_ids, attention_mask, prompt_lens (batch,)."""
    lengths = torch.tensor([len(x) for x, _ in pairs], device=DEVICE)
    return *pad([x + y for x, y in pairs], pad_id), lengths


def length_batches(lengths, batch_size, indices=None, length_ratio=0.0):
    """Index lists of similar length, the longest first, so that a batch pads little. Its shortest
    text has at least `length_ratio` of the longest one's tokens: .85 saves most of the padding."""
    batches = []
    for i in sorted(range(len(lengths)) if indices is None else indices, key=lambda i: -lengths[i]):
        full = not batches or len(batches[-1]) == batch_size
        if full or lengths[i] < length_ratio * lengths[batches[-1][0]]:
            batches.append([])
        batches[-1].append(i)
    return batches


# --- models ---


def pretrained(auto_class, path, **options):
    """The model, in eval mode, and the names of weights that the folder lacks."""
    try:
        model, info = auto_class.from_pretrained(path, output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{path}: no {auto_class.__name__} ({first_line(error)})") from None
    return model, info["missing_keys"]


def load_policy(path, frozen=False):
    """A causal LM. Of its generation config only the end-of-sequence ids are kept: a top-p or a
    penalty would change what is sampled, and not the log-probs."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    def wrap(model, missing):
        if missing or any("Classif" in name for name in model.config.architectures or ()):
            raise InputError(f"{path}: has no language-model head, so it is no policy")
        ends = model.generation_config.eos_token_id
        model.generation_config = GenerationConfig(eos_token_id=ends)
        return model

    return backend.load(AutoModelForCausalLM, path, wrap, frozen)


def load_scorer(path, tokenizer, trained=True, frozen=False, expected_reward_head=False):
    """`trained`: refuse a folder without a score head instead of starting a random one."""
    from safetensors.torch import load_file
    from transformers import AutoModelForSequenceClassification

    def wrap(model, missing):
        if trained and missing:
            problem = f"has no reward head ({min(missing)} is missing)"
            raise InputError(f"{path}: {problem}; train it with am_train.py")
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(len(tokenizer))
        model.config.pad_token_id = tokenizer.pad_token_id
        saved = Path(path) / E_HEAD
        scorer = Scorer(model, expected_reward_head or (trained and saved.is_file()))
        if saved.is_file() and scorer.e_head is not None:
            scorer.e_head.load_state_dict(load_file(saved))
        return scorer

    return backend.load(AutoModelForSequenceClassification, path, wrap, frozen, num_labels=1)


def check_positions(model, longest):
    """Refuse texts (in tokens) that the model has no positions for, before an index error does."""
    positions = getattr(model.config, "max_position_embeddings", None) or longest
    positions -= 2 if "roberta" in model.config.model_type else 0  # RoBERTa counts from 2
    if longest > positions:
        problem = f"a text has {longest} tokens, the model {positions} positions"
        raise InputError(f"--max_length: {problem}; lower it or --response_length")


class Scorer(nn.Module):
    """r(x, y), and e(x) where the scorer has an e head, on any causal LM or encoder.

    A causal LM is read at the last token of the text, an encoder by its own head. e(x) is read at
    the last prompt token of a causal LM, which has not seen y, by an encoder in a pass over x.
    """

    def __init__(self, model, expected_reward_head=False):
        super().__init__()
        self.model, self.e_head = model, None
        self.is_encoder = not hasattr(model, "score")  # encoders have a `classifier`
        if expected_reward_head:
            width = model.config.hidden_size if self.is_encoder else model.score.in_features
            self.e_head = nn.Linear(width, 1)
            nn.init.zeros_(self.e_head.weight)  # e = 0 at the start: a = r
            nn.init.zeros_(self.e_head.bias)

    def save_pretrained(self, folder, state_dict):
        """A folder that AutoModelForSequenceClassification loads, the e head beside it."""
        from safetensors.torch import save_file

        e_head = {k[7:]: v for k, v in state_dict.items() if k.startswith("e_head.")}
        model = {k[6:]: v for k, v in state_dict.items() if k.startswith("model.")}
        self.model.save_pretrained(folder, state_dict=model)
        (Path(folder) / E_HEAD).unlink(missing_ok=True)  # an earlier run's
        if e_head:
            save_file(e_head, Path(folder) / E_HEAD)

    def forward(self, input_ids, attention_mask, prompt_lens, embedded=None):
        """(batch, seq_len), padded right -> r (batch,), e (batch,), float32; e = 0 without a head.
        embedded: the embeddings of input_ids, where the caller has them already."""
        tokens = {"input_ids": input_ids} if embedded is None else {"inputs_embeds": embedded}
        if not self.is_encoder:  # what follows a text cannot be seen from within it: no mask
            hidden = self.model.base_model(**tokens, use_cache=False).last_hidden_state
            rows = torch.arange(len(hidden), device=hidden.device)
            r = self.model.score(hidden[rows, attention_mask.sum(1) - 1])
            prompt_end = hidden[rows, prompt_lens - 1]
        else:
            column, segments = torch.arange(input_ids.shape[1], device=input_ids.device), {}
            prompt = column < prompt_lens[:, None]
            if getattr(self.model.config, "type_vocab_size", 0) > 1:  # the response: segment 1
                segments["token_type_ids"] = (~prompt & attention_mask).long()
            r = self.model(**tokens, attention_mask=attention_mask, **segments).logits
            if self.e_head is not None:
                alone = self.model.base_model(**tokens, attention_mask=prompt)
                prompt_end = alone.last_hidden_state[:, 0]
        e = torch.zeros_like(r) if self.e_head is None else self.e_head(prompt_end)
        return r.squeeze(-1).float(), e.squeeze(-1).float()


@torch.no_grad()
def score_texts(scorer, tokenizer, texts, batch_size, bf16):
    """r and e, each a float64 array (texts,), of texts given as (ids, prompt_len)."""
    lengths, groups = [len(ids) for ids, _ in texts], []

    def scores(group):
        ids, mask = pad([texts[i][0] for i in group], tokenizer.pad_token_id)
        prompt_lens = torch.tensor([texts[i][1] for i in group], device=DEVICE)
        with autocast(bf16):
            return torch.stack(scorer(ids, mask, prompt_lens)).T.tolist()

    for batch in length_batches(lengths, batch_size):
        groups += length_batches(lengths, batch_size, batch, backend.length_ratio)
    return np.array(backend.results(scores, groups, len(texts))).reshape(-1, 2).T


# --- log-probs and samples ---


def response_logprobs(
    model, input_ids, attention_mask, prompt_lens, temperature=1.0, entropy=False
):
    """log pi(y_t | x, y_<t) of every response token: (batch, seq_len) -> (batch, response_len).

    Returns log-probs, response mask (bool) and, if asked, the entropy of each next-token
    distribution, float32 and 0 outside the mask. Column t is the t-th token of y, whose logits are
    read one token early; ppo_sr.py draws it.
    """
    if hasattr(model, "run"):  # an engine
        batch = input_ids, attention_mask, prompt_lens
        return model.run(response_logprobs, *batch, temperature, entropy)
    response_lens = attention_mask.sum(1) - prompt_lens  # (batch,)
    column = torch.arange(int(response_lens.max()), device=input_ids.device)
    mask = column < response_lens[:, None]  # (batch, response_len)
    rows, index = mask.nonzero()[:, 0], (prompt_lens[:, None] - 1 + column)[mask]  # (tokens,)
    # what follows a text cannot be seen from within it: a causal model needs no mask
    hidden = model.base_model(input_ids, use_cache=False).last_hidden_state[rows, index]
    targets = input_ids[rows, index + 1]

    def of_chunk(hidden, targets):
        logits = next_token_logits(model, hidden) / temperature
        entropies = torch.zeros_like(targets)
        if entropy:
            log_softmax = logits.log_softmax(-1)
            entropies = -(log_softmax.exp() * log_softmax).sum(-1)
        return -nn.functional.cross_entropy(logits, targets, reduction="none"), entropies

    # in chunks, computed again in the backward pass, so that no (batch, seq_len, vocab) exists
    size = max(1, LOGITS_AT_ONCE // model.config.get_text_config().vocab_size)
    count = backend.once(lambda: max(1, -(-len(targets) // size)))
    chunks = zip(hidden.tensor_split(count), targets.tensor_split(count), strict=True)
    again = functools.partial(checkpoint, of_chunk, use_reentrant=False)
    run = again if count > 1 and torch.is_grad_enabled() else of_chunk
    values = (torch.cat(v).float() for v in zip(*(run(*chunk) for chunk in chunks), strict=True))
    zeros = torch.zeros(mask.shape, device=mask.device)
    logprobs, entropies = (zeros.masked_scatter(mask, v) for v in values)
    return (logprobs, mask, entropies) if entropy else (logprobs, mask)


def next_token_logits(model, hidden):  # (tokens, hidden) -> (tokens, vocab), float32
    """The output matrix of a causal LM and, in some families, a scale or a cap."""
    logits, config = model.get_output_embeddings()(hidden).float(), model.config.get_text_config()
    logits = logits * (getattr(config, "logit_scale", None) or 1)
    logits = logits / (getattr(config, "logits_scaling", None) or 1)
    cap = getattr(config, "final_logit_softcapping", None)
    return cap * torch.tanh(logits / cap) if cap else logits


@torch.no_grad()
def forward_batches(function, sequences, pad_id, batch_size, bf16=False):
    """function(ids, mask, prompt_lens) over all (prompt ids, response ids), results in their order;
    those of one value a token are padded with 0: (sequences, longest response)."""

    def results(batch):
        with autocast(bf16):
            outputs = function(*pad_pairs([sequences[i] for i in batch], pad_id))
        return [
            [out[row, : len(sequences[i][1])] if out.dim() > 1 else out[row] for out in outputs]
            for row, i in enumerate(batch)
        ]

    lengths = [len(x) + len(y) for x, y in sequences]
    batches = length_batches(lengths, batch_size, length_ratio=backend.length_ratio)
    columns = zip(*backend.results(results, batches, len(sequences)), strict=True)
    return [pad_sequence(c, batch_first=True) if c[0].dim() else torch.stack(c) for c in columns]


def stop_ids(model, tokenizer):
    """The tokens that end a response: the tokenizer's <eos> and the generation config's."""
    ids = getattr(model, "module", model).generation_config.eos_token_id
    return {*(ids if isinstance(ids, list) else [ids]), tokenizer.eos_token_id} - {None}


@torch.no_grad()
def generate(
    model, tokenizer, prompts, max_new_tokens, temperature, batch_size, bf16=False, logprobs=False
):
    """Sample y ~ pi(. | x) for every prompt (ids) -> lists of ids, ending in <eos> unless cut, and
    if asked the sampler's own `logprobs`. Plain sampling, greedy at temperature 0.

    It runs in rounds, after each of which finished rows leave and the others are batched anew, so
    that few long responses do not keep a whole batch decoding.
    """
    stops, pad_id = stop_ids(model, tokenizer), tokenizer.pad_token_id
    flags = dict(do_sample=bool(temperature), eos_token_id=sorted(stops), pad_token_id=pad_id)
    flags |= dict(temperature=temperature, top_k=0, top_p=1.0) if temperature else {}
    flags |= dict(return_dict_in_generate=True, output_scores=logprobs)
    responses, sampled = [[] for _ in prompts], [[] for _ in prompts]
    unfinished, round_length = list(range(len(prompts))), max(8, max_new_tokens // 3)

    def continued(batch):
        ids, mask = pad([prompts[i] + responses[i] for i in batch], pad_id, left=True)
        with autocast(bf16):
            out = sample(input_ids=ids, attention_mask=mask.long(), **flags)
        parts = []
        for row, y in enumerate(out.sequences[:, ids.shape[1] :].tolist()):
            y = y[: next((t + 1 for t, token in enumerate(y) if token in stops), None)]
            steps = zip(out.scores or (), y, strict=False)
            parts.append((y, [s[row].float().log_softmax(-1)[token].item() for s, token in steps]))
        return parts

    with backend.sampler(model) as sample:
        for start in range(0, max_new_tokens, round_length):
            flags["max_new_tokens"] = min(round_length, max_new_tokens - start)
            batches = length_batches([len(p) + start for p in prompts], batch_size, unfinished)
            parts = backend.results(continued, batches, len(prompts))
            for i in unfinished:
                responses[i] += parts[i][0]
                sampled[i] += parts[i][1]
            unfinished = [i for i in unfinished if responses[i][-1] not in stops]
            if not unfinished:
                break
    return (responses, sampled) if logprobs else responses


# --- the run folder ---


def write_json(path, value):
    write_aside(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_jsonl(path, rows):
    write_aside(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_aside(path, text):
    """Write aside and rename, so that a reader never meets half a file."""
    if backend.writes:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(f"{path}.tmp").write_text(text, encoding="utf-8")
        os.replace(f"{path}.tmp", path)


def save_model(engine, folder, tokenizer):
    """Weights and tokenizer as Hugging Face saves them, for every other tool."""
    state = backend.weights(engine.module)
    if backend.writes:
        engine.module.save_pretrained(folder, state_dict=state)
        tokenizer.save_pretrained(folder)


class RunLog:
    """A run folder: config.json, metrics.jsonl, samples.jsonl and checkpoint/.

    With --resume it starts from the checkpoint: `step` is that one's, `saved` what was saved then,
    the random numbers go on, and rows of later steps are dropped.
    """

    def __init__(self, args):
        self.args, self.folder, self.start = args, Path(args.output_dir), time.time()
        self.checkpoint = self.folder / "checkpoint" / "state.pt"
        named = [value for name, value in asdict(args).items() if "dataset_name" in name]
        named = [f for value in named for f in (value if isinstance(value, tuple) else [value])]
        files = [Path(f) for f in named if f and Path(f).is_file()]
        hashes = {str(f): hashlib.sha256(f.read_bytes()).hexdigest()[:16] for f in files}
        self.config = {"args": asdict(args), "data": hashes}
        self.saved, self.step = self.resume() if args.resume else None, 0
        if self.saved:
            self.step = self.saved["step"]
        else:  # a later --resume must not find an older run's
            if self.checkpoint.is_file():
                self.checkpoint.unlink()
        for name in ("metrics.jsonl", "samples.jsonl"):
            path, kept = self.folder / name, {}
            text = path.read_text(encoding="utf-8") if self.step and path.is_file() else ""
            for n, line in enumerate(text.split("\n")[:-1]):  # a kill may leave half a line behind
                if (step := json.loads(line)["step"]) <= self.step:
                    # one row of metrics a step: a finished run's last evaluation follows it
                    kept.setdefault(step if name == "metrics.jsonl" else n, line + "\n")
            write_aside(path, "".join(kept.values()))
        write_json(self.folder / "config.json", self.config | environment())

    def resume(self):
        if not self.checkpoint.is_file():
            where = f"no checkpoint in {self.folder}, so the run starts at step 1"
            return print(f"--resume: {where}", file=sys.stderr)
        saved = torch.load(self.checkpoint, map_location=DEVICE, weights_only=True)
        had, now = saved["args"], self.config["args"]
        for name in had | now:
            if name != "resume" and had.get(name) != now.get(name):
                problem = f"is {now.get(name)}, the run in {self.folder} had {had.get(name)}"
                raise InputError(f"--{name}: {problem}; cannot --resume")
        if saved["data"] != self.config["data"]:
            raise InputError(f"--resume: the data are not those of the run in {self.folder}")
        torch.set_rng_state(saved["rng"]["cpu"].cpu())
        if saved["rng"]["cuda"] is not None:
            torch.cuda.set_rng_state(saved["rng"]["cuda"].cpu())
        return saved

    def save(self, step, **state):
        """state (engines, tensors, numbers) and the RNG, aside and renamed: a kill or a full disk
        leaves the last good checkpoint, and training goes on."""
        cuda = torch.cuda.get_rng_state() if DEVICE.type == "cuda" else None
        saved = self.config | {"step": step, "rng": {"cpu": torch.get_rng_state(), "cuda": cuda}}
        path, aside = self.checkpoint, f"{self.checkpoint}.tmp"
        try:
            for name, part in state.items():
                beside = path.parent / f"step-{step}-{name}"
                saved[name] = part.state(beside) if isinstance(part, Engine) else part
            if backend.writes:
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.save(saved, aside)
                os.replace(aside, path)
            backend.saved(path.parent, step)
        except (OSError, RuntimeError) as error:
            with contextlib.suppress(OSError):
                Path(aside).unlink()
            problem = f"no checkpoint written ({first_line(error)}); the last one stays"
            print(f"step {step}: {problem}", file=sys.stderr)

    def write(self, step, metrics):
        seconds = round(time.time() - self.start, 2)
        self.append("metrics.jsonl", [{"step": step, "seconds": seconds} | metrics])

    def append(self, name, rows):
        if backend.writes:
            with open(self.folder / name, "a", encoding="utf-8") as file:
                file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    def check_finite(self, what, value, step, batch):
        """Stop before a NaN or infinite number reaches the weights; the batch is kept."""
        if not math.isfinite(value):
            path = self.folder / "bad_batch.json"
            write_json(path, {"step": step, what: str(value), "batch": batch})
            problem = f"the {what} is {value}; its batch is in {path}"
            raise InputError(f"step {step}: {problem}; lower --learning_rate")


def environment():
    """Versions, commit, machine: what a number needs beside it to be repeated."""
    import transformers

    here = {"cwd": Path(__file__).parent, "capture_output": True, "text": True}
    commit = subprocess.run(["git", "rev-parse", "HEAD"], **here).stdout.strip() or None
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    machine = {"threads": torch.get_num_threads(), "device": DEVICE.type}
    return {"versions": versions, "commit": commit, "machine": machine}


# --- the command line ---


def load_function(spec, flag):
    """`module:function` -> that function of (prompts, responses), one number a response."""
    sys.path.insert(0, os.getcwd())
    try:
        function = pkgutil.resolve_name(spec)
        inspect.signature(function).bind([], [])
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        wanted = "module:function(prompts, responses)"
        raise InputError(f"{flag} {spec}: expected {wanted} ({error})") from None

    def numbers(prompts, responses):
        scores = backend.once(lambda: function(prompts, responses))
        with contextlib.suppress(TypeError, ValueError):
            if len(scores) == len(responses):
                return [float(score) for score in scores]
        raise InputError(f"{flag} {spec}: must return one number a response")

    return numbers


def run_cli(main, args_class, description):
    """Parse the flags and run main(args). Flags that a script does not have, as --deepspeed or
    --lora_rank, are those of large/, which then runs it."""
    import tyro

    options = {"description": description, "config": (tyro.conf.FlagConversionOff,)}
    parse = functools.partial(tyro.cli, use_underscores=True, **options)
    args, unknown = None, {"-h", "--help"} & {*sys.argv}
    try:
        if not unknown:
            args, unknown = parse(args_class, return_unknown_args=True)
        if unknown or "WORLD_SIZE" in os.environ:
            import large

            args, main = parse(large.with_flags(args_class)), large.runner(main)
    except BrokenPipeError:  # `--help | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    from transformers.utils import logging  # not at the top: --help should not wait for it

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        check_flags(args)
        main(args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)


def check_flags(args):
    """No number is negative, no batch is empty, and the output folder can be written."""
    for name, value in vars(args).items():
        if type(value) in (int, float) and not value >= name.endswith("batch_size"):
            raise InputError(f"--{name} {value}: must be positive")
    folder = Path(getattr(args, "output_dir", None) or ".").absolute()
    above = next(p for p in (folder, *folder.parents) if p.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise InputError(f"--output_dir {folder}: cannot be made in {above}")
