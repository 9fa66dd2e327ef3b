"""What every script shares: models, batches, log-probs, sampling, the optimiser.

Nobody has to read it to understand the paper: losses, GAE and metrics stand in the scripts. Files,
texts as tokens, flags and the run folder are in plumbing/, large models in large/. Shapes: batch
(sequences), seq_len (prompt + response, padded right), response_len (response alone).
"""

import contextlib
import functools
import math
import os
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

# scripts import all this from here
from plumbing.attention import register_attention
from plumbing.errors import InputError, in_one_line, print_once
from plumbing.flags import Bound, Count, LearningRate, Length, Natural, Positive, Share, Weight
from plumbing.functions import load_function
from plumbing.progress import progress
from plumbing.records import environment, write_json, write_jsonl
from plumbing.rows import load_rows
from plumbing.texts import answer_end, encode_pair, encode_prompts, encode_rows, encode_sides
from plumbing.texts import load_tokenizer, render, same_form, tokenize

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":  # DeepSpeed, which transformers imports unasked, would warn of it
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
LOGITS_AT_ONCE = 2**26  # numbers: 256 MB of float32
E_HEAD = "expected_reward_head.safetensors"  # e of Eq. 7, beside the model


# --- how models run ---


class Engine:
    """A model and its AdamW. Gradients add up over backward() until step()."""

    PARTS = "module", "optimizer", "scheduler"

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
        return {name: getattr(self, name).state_dict() for name in self.PARTS}

    def load_state(self, state):
        for name in self.PARTS:
            getattr(self, name).load_state_dict(state[name])


class Backend:
    """One process, one device. large/ replaces `backend` by one for many devices."""

    engine = Engine
    writes = True  # files
    length_ratio = 0.85  # of length_batches

    deal = list  # the batches to train on here
    add_up = staticmethod(sum)  # of a list of tensors, one of each of those batches
    whole = contextlib.nullcontext  # a context in which these parameters can be changed

    def results(self, function, batches, count):
        """function(batch of indices) -> its list; all results, in order 0 to count - 1."""
        found = {}
        for batch in progress(list(batches), "batches", delay=5):
            found |= zip(batch, function(batch), strict=True)
        return [found.get(i) for i in range(count)]

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

    def weights(self, module):
        return module.state_dict()

    def saved(self, folder, step):
        """The checkpoint of `step` is written."""

    def last_pass(self):
        """No model runs from here on: the rest is for one alone."""


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


# --- batches ---


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
    if DEVICE.type == "cpu":  # else in bfloat16 the first ratio is not 1
        register_attention()
    adapter, model = (Path(path) / "adapter_config.json").is_file(), None
    with in_one_line(f"{path}: cannot be loaded as {auto_class.__name__}"):
        if not adapter:
            model, info = auto_class.from_pretrained(path, output_loading_info=True, **options)
    if adapter or getattr(model, "_hf_peft_config_loaded", False):  # saved without its base
        remedy = "merge it into its model (peft: merge_and_unload) and save that"
        raise InputError(f"{path}: is an adapter; {remedy}")
    return model, info["missing_keys"]


def load_policy(path, frozen=False):
    """A causal LM. Of its generation config only the end-of-sequence ids are kept: a top-p or a
    penalty would change what is sampled, and not the log-probs."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    from plumbing.scorers import sees_ahead

    def wrap(model, missing):
        if missing or any("Classif" in name for name in model.config.architectures or ()):
            raise InputError(f"{path}: has no language-model head, so it is no policy")
        if all(p.numel() for p in model.parameters()) and sees_ahead(model, unknown=False):
            raise InputError(f"{path}: its tokens see those behind them, so it is no policy")
        ends = model.generation_config.eos_token_id
        model.generation_config = GenerationConfig(eos_token_id=ends)
        return model

    return backend.load(AutoModelForCausalLM, path, wrap, frozen)


def load_scorer(path, tokenizer, trained=True, frozen=False, expected_reward_head=False):
    """A Scorer. `trained`: refuse a folder without a score head; else the head is random."""
    from plumbing import scorers

    return scorers.load(path, tokenizer, trained, frozen, expected_reward_head)


def check_fits(model, tokenizer, longest):
    """Refuse tokens that the model has no embeddings for, and texts (their length in tokens) that
    it has no positions for, before an index error does."""
    from plumbing import fits

    fits.check(model, tokenizer, longest)


class Head(nn.Linear):
    """A linear layer in float32: in bfloat16, scores around 20 come in steps of 1/8."""

    NAMES = ("score", "classifier", "classification_head", "logits_proj", "e_head")

    def forward(self, hidden):
        with torch.autocast(hidden.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return nn.functional.linear(hidden.float(), self.weight.float(), bias)


class Scorer(nn.Module):
    """r(x, y), and e(x) where the scorer has an e head, on any causal LM or encoder.

    A causal LM is read at the last token of the text, an encoder by its own head. e(x) is read at
    a causal LM's last prompt token, which has not seen y; for an encoder, in a pass over x.
    """

    bf16 = None  # of the run that trained it, if that is known

    def __init__(self, model, expected_reward_head=False):
        from plumbing import scorers

        super().__init__()
        self.model, self.e_head = model, None
        self.is_encoder = not hasattr(model, "score") and scorers.sees_ahead(model)
        if expected_reward_head:
            score = getattr(model, "score", None)
            width = score.in_features if score else model.config.hidden_size
            self.e_head = nn.Linear(width, 1)
            nn.init.zeros_(self.e_head.weight)  # e = 0 at the start: a = r
            nn.init.zeros_(self.e_head.bias)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and {*name.split(".")} & {*Head.NAMES}:
                module.__class__ = Head

    def save_pretrained(self, folder, state_dict):
        """A folder that AutoModelForSequenceClassification loads, the e head beside it."""
        from plumbing import scorers

        scorers.save(self, folder, state_dict)

    def forward(self, input_ids, attention_mask, prompt_lens, embedded=None):
        """(batch, seq_len), padded right -> r (batch,), e (batch,), float32; e = 0 without a head.
        embedded: the embeddings of input_ids, where the caller has them already."""
        if not hasattr(self.model, "score"):
            from plumbing import scorers

            return scorers.read(self, input_ids, attention_mask, prompt_lens)
        # a causal LM cannot see what follows a text: it needs no mask
        tokens = {"input_ids": input_ids} if embedded is None else {"inputs_embeds": embedded}
        hidden = self.model.base_model(**tokens, use_cache=False).last_hidden_state
        rows = torch.arange(len(input_ids), device=input_ids.device)
        r = self.model.score(hidden[rows, attention_mask.sum(1) - 1])
        e = self.expected_reward(hidden[rows, prompt_lens - 1], r)
        return r.squeeze(-1).float(), e.squeeze(-1).float()

    def expected_reward(self, prompt_end, r):
        return torch.zeros_like(r) if self.e_head is None else self.e_head(prompt_end)


@torch.no_grad()
def score_texts(scorer, tokenizer, texts, batch_size, bf16):
    """r and e, each a float64 array (texts,), of texts given as (ids, prompt_len). A scorer is read
    in the precision in which it was trained; `bf16` counts where that is not known."""
    trained = getattr(scorer, "module", scorer).bf16
    if trained not in (None, bf16):
        print_once(f"the scorer is read with --bf16 {trained}, as it was trained")
        bf16 = trained
    lengths, groups = [len(ids) for ids, _ in texts], []
    for batch in length_batches(lengths, batch_size):
        groups += length_batches(lengths, batch_size, batch, backend.length_ratio)
    pairs = [(ids[:n], ids[n:]) for ids, n in texts]
    scores = forward_batches(scorer, pairs, tokenizer.pad_token_id, batch_size, bf16, groups)
    scores = torch.stack(scores).double().cpu()
    if not (scores.abs() < 1e9).all():  # NaN, too
        name = getattr(getattr(scorer, "model", None), "name_or_path", "evaluation")
        raise InputError(f"{name}: a text's score is {scores.abs().max().item():.3g}")
    return scores.numpy()


# --- log-probs and samples ---


def response_logprobs(
    model, input_ids, attention_mask, prompt_lens, temperature=1.0, entropy=False
):
    """log pi(y_t | x, y_<t) of every response token: (batch, seq_len) -> (batch, response_len).

    Returns log-probs, response mask (bool) and, if asked, the entropy of each next-token
    distribution, float32 and 0 outside the mask. Column t is the t-th token of y, whose logits are
    read one token early (see ppo_sr.py).
    """
    if hasattr(model, "run"):  # an engine
        batch = input_ids, attention_mask, prompt_lens
        return model.run(response_logprobs, *batch, temperature, entropy)
    response_lens = attention_mask.sum(1) - prompt_lens  # (batch,)
    column = torch.arange(int(response_lens.max()), device=input_ids.device)
    mask = column < response_lens[:, None]  # (batch, response_len)
    rows, index = mask.nonzero()[:, 0], (prompt_lens[:, None] - 1 + column)[mask]  # (tokens,)
    # what follows a text cannot be seen from within it: a causal model needs no mask
    if head_is_known(model, input_ids[:1, :8]):
        hidden = model.base_model(input_ids, use_cache=False).last_hidden_state[rows, index]
    else:
        hidden = model(input_ids, use_cache=False).logits[rows, index]
    targets = input_ids[rows, index + 1]

    def of_chunk(hidden, targets):
        logits = next_token_logits(model, hidden) if model.head_is_known else hidden.float()
        logits = logits / temperature
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


@torch.no_grad()
def head_is_known(model, input_ids):
    """Whether next_token_logits gives the model's own logits, found out on the first text. Where
    not, the whole logits are computed."""
    if not hasattr(model, "head_is_known"):
        with seeded(0):  # the same dropout, if any
            own = model(input_ids, use_cache=False).logits
        with seeded(0):
            hidden = model.base_model(input_ids, use_cache=False).last_hidden_state
        found = own * torch.nan
        with contextlib.suppress(Exception):  # factors that are words, widths that do not match
            found = next_token_logits(model, hidden)
        allowed = (1e-4 if own.dtype == torch.float32 else 1e-2) * own.abs().max()
        model.head_is_known = backend.once(lambda: bool((found - own).abs().max() <= allowed))
    return model.head_is_known


def next_token_logits(model, hidden):  # (tokens, hidden) -> (tokens, vocab), float32
    """The output matrix of a causal LM and, in some families, a scale or a cap."""
    logits, config = model.get_output_embeddings()(hidden).float(), model.config.get_text_config()
    logits = logits * (getattr(config, "logit_scale", None) or 1)
    logits = logits / (getattr(config, "logits_scaling", None) or 1)
    cap = getattr(config, "final_logit_softcapping", None)
    return cap * torch.tanh(logits / cap) if cap else logits


@torch.no_grad()
def forward_batches(function, sequences, pad_id, batch_size, bf16=False, batches=None):
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
    batches = batches or length_batches(lengths, batch_size, length_ratio=backend.length_ratio)
    columns = zip(*backend.results(results, batches, len(sequences)), strict=True)
    return [pad_sequence(c, batch_first=True) if c[0].dim() else torch.stack(c) for c in columns]


def stop_ids(model, tokenizer):
    """The tokens that end a response: the chat template's, <eos>, the generation config's."""
    ids = getattr(model, "module", model).generation_config.eos_token_id
    ids = {*(ids if isinstance(ids, list) else [ids]), tokenizer.eos_token_id}
    return {*ids, answer_end(tokenizer)} - {None}


def decode(tokenizer, responses, stops):
    """Texts of responses, without the token that ended them (which need not be a special one)."""
    responses = [y[:-1] if y[-1] in stops else y for y in responses]
    return tokenizer.batch_decode(responses, skip_special_tokens=True)


@torch.no_grad()
def generate(
    model, tokenizer, prompts, max_new_tokens, temperature, batch_size, bf16=False, logprobs=False
):
    """Sample y ~ pi(. | x) for every prompt (ids) -> lists of ids, ending in <eos> unless cut, and
    if asked the sampler's own `logprobs`. Plain sampling, greedy at temperature 0.

    It runs in rounds, after each of which finished rows leave and the others are batched anew, so
    that few long responses do not keep a whole batch decoding. A round reads the prompts again: if
    fewer than a quarter end in one, the next is the last.
    """
    stops, pad_id = stop_ids(model, tokenizer), tokenizer.pad_token_id
    flags = dict(do_sample=bool(temperature), eos_token_id=sorted(stops), pad_token_id=pad_id)
    flags |= dict(temperature=temperature, top_k=0, top_p=1.0) if temperature else {}
    flags |= dict(return_dict_in_generate=True, output_scores=logprobs)
    responses, sampled = [[] for _ in prompts], [[] for _ in prompts]
    unfinished, start, length = [*range(len(prompts))], 0, max(8, max_new_tokens // 3)
    if sum(map(len, prompts)) >= max_new_tokens * len(prompts):
        length = max_new_tokens  # long prompts: no rounds

    def continued(batch):
        # padded left: all rows go on from one column
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
        while unfinished and start < max_new_tokens:
            flags["max_new_tokens"] = length = min(length, max_new_tokens - start)
            batches = length_batches([len(p) + start for p in prompts], batch_size, unfinished)
            parts = backend.results(continued, batches, len(prompts))
            for i in unfinished:
                responses[i] += parts[i][0]
                sampled[i] += parts[i][1]
            before, start = len(unfinished), start + length
            unfinished = [i for i in unfinished if responses[i][-1] not in stops]
            if len(unfinished) > 0.75 * before:  # few end: one last round
                length = max_new_tokens
    return (responses, sampled) if logprobs else responses


# --- the run folder ---


def refuse_finished(path, args, own=None):
    """Refuse to overwrite a result of other flags; the same command may."""
    from plumbing import checkpoints

    checkpoints.refuse_finished(path, args, own)


def save_model(engine, folder, tokenizer, training=None):
    """Weights and tokenizer as Hugging Face saves them, for every other tool, and beside them, in
    training.json, what they were trained by."""
    state = backend.weights(engine.module)
    if backend.writes:
        engine.module.save_pretrained(folder, state_dict=state)
        tokenizer.save_pretrained(folder)
        write_json(Path(folder) / "training.json", training or {})


def run_log(args, **parts):
    """The RunLog of a run folder: config.json, metrics.jsonl, samples.jsonl, checkpoint/, model/.

    `parts` (engines, dicts of numbers) are what a checkpoint holds. With --resume they and the
    random numbers go on from there, `step` is that one's, and rows of later steps are dropped.
    """
    from plumbing.run_folder import RunLog

    return RunLog(args, **parts)


# --- the command line ---


def run_cli(main, args_class, description):
    """Parse the flags, check them, and run main(args): plumbing/command_line.py."""
    from plumbing import command_line

    command_line.run(main, args_class, description)
