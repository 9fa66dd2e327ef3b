"""Plumbing shared by the scripts: the scorer module, generation, log-probs, optimiser, run folder.

Nobody has to read this file to understand the paper: every loss, a = r - e, GAE and the metrics stand in the scripts.
Glossary of dimensions: batch (sequences), seq_len (prompt + response, padded right), response_len (response alone).
"""

import contextlib
import hashlib
import importlib
import inspect
import itertools
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.utils.checkpoint
from torch import nn

from engines import Engine, InputError, dealt, device, everywhere, finish, forked_rng, generating, join_ranks, largest
from engines import loading, merged, own_rng, rank, wait, within_forward, world


SHARE = 0.85  # of length_batches, where batches need not be large
LOGITS_AT_ONCE = 2**26  # numbers: 256 MB of float32
E_HEAD = "expected_reward_head.safetensors"  # e of Eq. 7 lies beside the model, which AutoModel loads without it


def run_cli(main, args_class, description):
    """Parse the flags into `args_class`, run `main(args)`; bad input ends in one line on stderr and exit code 2."""
    import tyro

    try:
        args = tyro.cli(
            args_class, description=description, config=(tyro.conf.FlagConversionOff,), use_underscores=True
        )
        from transformers.utils import logging  # after the flags, so that --help does not wait for it

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        for name, value in vars(args).items():
            if type(value) in (int, float) and not value >= 0:
                raise InputError(f"--{name} {value}: must not be negative")
            if value == 0 and name.endswith("batch_size"):
                raise InputError(f"--{name} 0: must be positive")
        folder = Path(getattr(args, "output_dir", None) or ".").absolute()
        if folder.is_file():
            raise InputError(f"--output_dir {folder}: is a file")
        above = next(p for p in (folder, *folder.parents) if p.exists())
        if not (above.is_dir() and os.access(above, os.W_OK)):
            raise InputError(f"--output_dir {folder}: cannot be made in {above}")
        join_ranks(args)
        main(args)
        finish()
    except InputError as error:
        given = [(n, v) for n, value in vars(args).items() for v in (value if isinstance(value, tuple) else (value,))]
        named = (f"--{n} " for n, v in given if v and re.match(rf"{re.escape(str(v))}[:,]", str(error)))
        time.sleep(
            2 * (rank() > 0)
        )  # what is the same everywhere rank 0 has said by then, and torchrun ends the others
        if rank() or os.environ.get("RANK", "0") == "0":  # before the ranks have met, all say the same
            print(f"error: {next(named, '')}{error}", file=sys.stderr)  # a file or folder is named with its flag
        finish(2)
    except RuntimeError as error:
        if world() == 1:
            raise
        traceback.print_exc()
        lost = f"rank {rank()}: {str(error).strip().splitlines()[0]}; if another rank was lost, start the same command again"
        print(f"error: {lost}, with --resume True where the run writes checkpoints", file=sys.stderr)
        finish(1)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def autocast(bf16):
    """bfloat16 matrix products over float32 weights; nothing at all when `bf16` is off."""
    return torch.autocast(device().type, dtype=torch.bfloat16, enabled=bf16)


# --- files ------------------------------------------------------------------------------------------------------------


def write_jsonl(path, rows):
    _write_aside(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_json(path, value):
    _write_aside(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path, flag):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{flag} {path}: cannot be read as JSON ({error})") from None


def _write_aside(path, text):
    """Write aside and rename, so that a reader never meets half a file."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    aside = f"{path}.tmp{rank() or ''}"
    Path(aside).write_text(text, encoding="utf-8")
    os.replace(aside, path)


def load_function(spec, flag):
    """`module:function` -> that function of (prompts, responses), for rewards and judges; it must return one number a
    response, else InputError."""
    module, _, name = spec.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"{flag} {spec}: expected module:function ({error})") from None
    try:
        with contextlib.suppress(ValueError):  # a built-in without a signature
            inspect.signature(function).bind([], [])
    except TypeError as error:
        raise InputError(f"{flag} {spec}: must take (prompts, responses) ({error})") from None

    def numbers(prompts, responses):
        # rank 0 asks, and its answer is everyone's: it may be an API's, or random, which must leave no rank ahead
        with forked_rng() if world() > 1 else contextlib.nullcontext():
            scores = everywhere(function(prompts, responses) if rank() == 0 else None)[0]
        with contextlib.suppress(TypeError, ValueError):
            scores = [float(score) for score in scores]
            if len(scores) == len(responses):
                return scores
        raise InputError(f"{flag} {spec}: must return one number a response")

    return numbers


# --- batches -------------------------------------------------------------------------------------------------------


def pad(sequences, pad_id, left=False):
    """Lists of ids -> input_ids (batch, seq_len) int64 and attention_mask (batch, seq_len) bool, on the device."""
    width = max(len(s) for s in sequences)
    ids = torch.full((len(sequences), width), pad_id)
    mask = torch.zeros(len(sequences), width, dtype=torch.bool)
    for row, s in enumerate(sequences):
        where = slice(width - len(s), width) if left else slice(0, len(s))
        ids[row, where] = torch.tensor(s)
        mask[row, where] = True
    return ids.to(device()), mask.to(device())


def length_batches(lengths, batch_size=None, indices=None, share=0.0):
    """Index lists of similar length, longest first, so that a batch pads little (and memory peaks at once).

    A batch has at most `batch_size` texts, and its shortest one at least `share` of the longest one's tokens: on texts
    of all lengths .85 saves most of the padding (30 % of a batch of preference pairs) for smaller matrix products.
    """
    batches = []
    for i in sorted(range(len(lengths)) if indices is None else indices, key=lambda i: -lengths[i]):
        if not batches or len(batches[-1]) == batch_size or lengths[i] < share * lengths[batches[-1][0]]:
            batches.append([])
        batches[-1].append(i)
    return batches


def dealt_batches(lengths, batch_size, indices=None, share=0.0):
    """[(batch, weight)] of this rank: length_batches dealt to the ranks, none larger than a rank's share of the texts."""
    count = len(lengths if indices is None else indices)
    return dealt(length_batches(lengths, min(batch_size, -(-count // world())), indices, share))


def endless(items, seed, skip):
    """The items in shuffled passes, for ever, without the first `skip`, which an earlier run has drawn."""

    def indices():
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield from torch.randperm(len(items), generator=generator).tolist()

    return (items[i] for i in itertools.islice(indices(), skip, None))


# --- models ---------------------------------------------------------------------------------------------------------


def load_policy(path, sharded=None):
    """A causal LM with float32 weights and plain sampling: a checkpoint's top-p or penalties would warp the sampler
    and not the log-probs, so they are dropped; its end-of-sequence ids are kept. sharded: see engines.loading."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    try:
        with loading(sharded) as (dtype, where):
            model, info = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: no causal language model ({str(error).strip().splitlines()[0]})") from None
    scorer = any("SequenceClassification" in name for name in model.config.architectures or ())
    if info["missing_keys"] or scorer:
        raise InputError(f"{path}: has no language-model head, so it is no policy")
    model.generation_config = GenerationConfig(eos_token_id=model.generation_config.eos_token_id)
    return model.to(where)


def check_positions(model, longest):
    """Refuse texts (`longest`: in tokens) that the model has no positions for, instead of an index error later."""
    positions = getattr(model.config, "max_position_embeddings", None) or longest
    positions -= 2 if "roberta" in model.config.model_type else 0  # RoBERTa counts from 2
    if longest > positions:
        raise InputError(
            f"--max_length: a text has {longest} tokens, the model {positions} positions; lower it or --response_length"
        )


class Scorer(nn.Module):
    """r(x, y), and e(x) where the scorer has an e head, on any causal LM or encoder.

    A causal LM is read at the last token of the text, an encoder by its own classification head. e(x) is read at the
    last prompt token of a causal LM (which has not seen y), by an encoder in a pass over x alone.
    """

    def __init__(self, model, expected_reward_head=False):
        super().__init__()
        self.model, self.e_head = model, None
        self.is_encoder = not hasattr(model, "score")  # transformers: `score` on causal LMs, `classifier` on encoders
        if expected_reward_head:
            self.e_head = nn.Linear(model.config.hidden_size if self.is_encoder else model.score.in_features, 1)
            nn.init.zeros_(self.e_head.weight)  # e = 0 at the start: a = r
            nn.init.zeros_(self.e_head.bias)

    @classmethod
    def from_pretrained(cls, path, tokenizer, trained=True, expected_reward_head=False, sharded=None):
        """`trained`: refuse a folder without a score head instead of starting a random one; sharded: see load_policy."""
        from transformers import AutoModelForSequenceClassification

        try:
            with loading(sharded) as (dtype, where):
                model, info = AutoModelForSequenceClassification.from_pretrained(
                    path, num_labels=1, dtype=dtype, output_loading_info=True
                )
        except (OSError, ValueError, RuntimeError) as error:
            raise InputError(f"{path}: no scorer could be loaded ({str(error).strip().splitlines()[0]})") from None
        if trained and info["missing_keys"]:
            missing = min(info["missing_keys"])
            raise InputError(f"{path}: has no reward head ({missing} is missing); train it with am_train.py")
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:
            with loading(sharded):
                model.resize_token_embeddings(len(tokenizer))
        model.config.pad_token_id = tokenizer.pad_token_id
        saved = Path(path) / E_HEAD
        scorer = cls(model, expected_reward_head or (trained and saved.is_file()))
        if saved.is_file() and scorer.e_head is not None:
            from safetensors.torch import load_file

            scorer.e_head.load_state_dict(load_file(saved))
        return scorer.to(where)

    def save_pretrained(self, folder, tokenizer, state=None):
        """A folder that AutoModelForSequenceClassification loads; the e head lies beside it. state: weights in the place
        of the module's own."""
        state = self.state_dict() if state is None else state

        def part(prefix):
            return {name.removeprefix(prefix): v for name, v in state.items() if name.startswith(prefix)}

        self.model.save_pretrained(folder, state_dict=part("model."))
        tokenizer.save_pretrained(folder)
        (Path(folder) / E_HEAD).unlink(missing_ok=True)  # an earlier run's, in the same folder
        if self.e_head is not None:
            from safetensors.torch import save_file

            save_file(part("e_head."), Path(folder) / E_HEAD)

    def forward(self, input_ids, attention_mask, prompt_lens, embedded=None):
        """(batch, seq_len), (batch, seq_len) bool, (batch,) -> r (batch,), e (batch,): float32; e = 0 without a head.

        Padding may stand on either side. A text is moved to the left end: positions then count from its first token,
        and a causal model needs no mask, since what stands behind a text cannot be seen from within it. embedded
        (batch, seq_len, hidden): the embeddings of input_ids, padded on the right, where the caller has them already.
        """
        position = torch.arange(input_ids.shape[1], device=input_ids.device)
        start = attention_mask.int().argmax(1)  # (batch,): 0 where padding is on the right
        index = (position + start[:, None]) % input_ids.shape[1]
        input_ids, attention_mask = input_ids.gather(1, index), attention_mask.gather(1, index)
        tokens = {"input_ids": input_ids} if embedded is None else {"inputs_embeds": embedded}
        if not self.is_encoder:
            hidden = self.model.base_model(**tokens, use_cache=False).last_hidden_state
            rows = torch.arange(len(hidden), device=hidden.device)
            r = self.model.score(hidden[rows, attention_mask.sum(1) - 1]).squeeze(-1)
            at_prompt_end = hidden[rows, prompt_lens - 1]
        else:
            kinds = {}
            if getattr(self.model.config, "type_vocab_size", 0) > 1:  # second segment: the response
                kinds["token_type_ids"] = ((position >= prompt_lens[:, None]) & attention_mask).long()
            r = self.model(**tokens, attention_mask=attention_mask, **kinds).logits.squeeze(-1)
            if self.e_head is not None:
                prompt_mask = position < prompt_lens[:, None]
                at_prompt_end = self.model.base_model(**tokens, attention_mask=prompt_mask).last_hidden_state[:, 0]
        if self.e_head is None:
            return r.float(), torch.zeros_like(r, dtype=torch.float32)
        return r.float(), self.e_head(at_prompt_end).squeeze(-1).float()


@within_forward
def score_batch(scorer, tokenizer, texts, bf16):
    """r and e, each (texts,), of texts given as (ids, prompt_len): one pass, cut into groups that pad little."""
    share = SHARE if world() == 1 else 0  # ranks make the same calls: one group
    groups, scores = length_batches([len(ids) for ids, _ in texts], share=share), []
    padded = [pad([texts[i][0] for i in group], tokenizer.pad_token_id) for group in groups]
    embed, embedded = scorer.model.get_input_embeddings(), [None] * len(groups)
    if torch.is_grad_enabled() and embed.weight.requires_grad:
        # looked up together: in the backward pass every lookup fills a gradient of the whole vocabulary
        flat = embed(torch.cat([ids.flatten() for ids, _ in padded])).split([ids.numel() for ids, _ in padded])
        embedded = [rows.view(*ids.shape, -1) for rows, (ids, _) in zip(flat, padded, strict=True)]
    for group, (ids, mask), rows in zip(groups, padded, embedded, strict=True):
        prompt_lens = torch.tensor([texts[i][1] for i in group], device=device())
        with autocast(bf16):
            scores.append(torch.stack(scorer(ids, mask, prompt_lens, rows)))
    back = torch.tensor([i for group in groups for i in group]).argsort()
    return torch.cat(scores, 1)[:, back.to(device())]


@torch.no_grad()
def score_texts(scorer, tokenizer, texts, batch_size, bf16):
    """r and e, each a float64 array (texts,), of texts given as (ids, prompt_len), in batches of similar length."""
    results = [None] * len(texts)
    for batch, _ in dealt_batches([len(ids) for ids, _ in texts], batch_size):
        scores = score_batch(scorer, tokenizer, [texts[i] for i in batch], bf16)
        for i, of_text in zip(batch, scores.T.tolist(), strict=True):
            results[i] = of_text
    return np.array(merged(results), dtype=np.float64).reshape(-1, 2).T


def stop_ids(model, tokenizer):
    """The tokens that end a response: the tokenizer's <eos> and those of the checkpoint's generation config."""
    ids = getattr(model, "module", model).generation_config.eos_token_id
    return {*(ids if isinstance(ids, list) else [ids]), tokenizer.eos_token_id} - {None}


@torch.no_grad()
def generate(model, tokenizer, prompts, max_new_tokens, temperature, batch_size, bf16=False, with_logprobs=False):
    """Sample a response to every prompt (lists of ids) -> lists of ids, ending in <eos> unless cut at max_new_tokens.

    Plain ancestral sampling at `temperature`, greedy at 0: what response_logprobs describes, no top-k, no top-p. It runs
    in rounds: after each, finished rows leave and the others are batched anew, so that few long responses do not keep
    a whole batch decoding. That reads a prefix again once a round, which is cheap, and changes no distribution.
    `with_logprobs` also returns, in lists of the same form, what the sampler itself took the log-probs to be.
    """
    stops = stop_ids(model, tokenizer)
    plain = dict(do_sample=True, temperature=temperature, top_k=0, top_p=1.0)
    flags = plain if temperature else dict(do_sample=False)
    flags |= dict(eos_token_id=sorted(stops), pad_token_id=tokenizer.pad_token_id, return_dict_in_generate=True)
    responses, logprobs = [[] for _ in prompts], [[] for _ in prompts]
    unfinished, round_length = list(range(len(prompts))), max(8, max_new_tokens // 3)
    getattr(model, "module", model).eval()
    with own_rng(), generating(model) as sample:
        for start in range(0, max_new_tokens, round_length):
            flags |= dict(max_new_tokens=min(round_length, max_new_tokens - start), output_scores=with_logprobs)
            parts = [None] * len(prompts)
            for batch, _ in dealt_batches([len(p) + start for p in prompts], batch_size, unfinished):
                ids, mask = pad([prompts[i] + responses[i] for i in batch], tokenizer.pad_token_id, left=True)
                with autocast(bf16):
                    out = sample(input_ids=ids, attention_mask=mask.long(), **flags)
                for row, (i, tokens) in enumerate(zip(batch, out.sequences[:, ids.shape[1] :].tolist(), strict=True)):
                    tokens = tokens[: next((t + 1 for t, token in enumerate(tokens) if token in stops), None)]
                    steps = zip(out.scores or (), tokens, strict=False)
                    parts[i] = tokens, [s[row].float().log_softmax(-1)[token].item() for s, token in steps]
            parts = merged(parts)
            for i in unfinished:
                responses[i] += parts[i][0]
                logprobs[i] += parts[i][1]
            unfinished = [i for i in unfinished if responses[i][-1] not in stops]
            if not unfinished:
                break
    return (responses, logprobs) if with_logprobs else responses


@within_forward
def response_logprobs(model, input_ids, attention_mask, prompt_lens, temperature=1.0, with_entropy=False):
    """log pi(y_t | x, y_<t) of every response token: (batch, seq_len) in, (batch, response_len) out, float32.

    Padding on the right. Returns log-probs, response_mask (bool) and, on request, the entropy of each next-token
    distribution, all 0 outside the mask. Column t is the t-th response token, so rows of different prompt length line
    up. Logits are computed for response tokens alone, and where the vocabulary is large in chunks that are computed
    again in the backward pass, so that no (batch, seq_len, vocab) ever exists.

        tokens        <bos> name the capital <sep> | the  capital  is  rome <eos> <pad>
        index           0    1    2    3      4       5     6      7    8     9    10
        logits read at indices 4..8 (one step early), prompt_len = 5, response_len = 5
    """
    response_lens = attention_mask.sum(1) - prompt_lens  # (batch,)
    column = torch.arange(int(response_lens.max()), device=input_ids.device)
    mask = column < response_lens[:, None]  # (batch, response_len)
    rows, index = mask.nonzero()[:, 0], (prompt_lens[:, None] - 1 + column)[mask]  # each (tokens,)
    # what stands behind a text cannot be seen from within it: a causal model needs no mask
    hidden = model.base_model(input_ids, use_cache=False).last_hidden_state[rows, index]  # (tokens, hidden)
    targets = input_ids[rows, index + 1]

    def of_chunk(hidden, targets):
        logits = next_token_logits(model, hidden) / temperature
        entropy = torch.zeros_like(targets)
        if with_entropy:
            log_softmax = logits.log_softmax(-1)
            entropy = -(log_softmax.exp() * log_softmax).sum(-1)
        return -nn.functional.cross_entropy(logits, targets, reduction="none"), entropy

    size = max(1, LOGITS_AT_ONCE // model.config.get_text_config().vocab_size)
    count = max(1, largest(-(-len(targets) // size)))  # the same on all ranks: ZeRO-3 gathers the matrix for each
    chunks = list(zip(hidden.tensor_split(count), targets.tensor_split(count), strict=True))
    if len(chunks) > 1 and torch.is_grad_enabled():
        chunks = [torch.utils.checkpoint.checkpoint(of_chunk, *chunk, use_reentrant=False) for chunk in chunks]
    else:
        chunks = [of_chunk(*chunk) for chunk in chunks]
    logprobs, entropy = (torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, torch.cat(part).float())
                         for part in zip(*chunks, strict=True))  # fmt: skip
    return (logprobs, mask, entropy) if with_entropy else (logprobs, mask)


@torch.no_grad()
def forward_batches(function, sequences, pad_id, batch_size, bf16=False):
    """`function(ids, mask, prompt_lens)` over all sequences in batches of similar length, results in their order.

    sequences: list of (prompt ids, response ids). A result of one value a token comes back padded with 0 to the longest
    response: (sequences, response_len); one of one value a sequence as (sequences,).
    """
    results = [None] * len(sequences)
    for batch, _ in dealt_batches([len(x) + len(y) for x, y in sequences], batch_size, share=SHARE):
        ids, mask = pad([sequences[i][0] + sequences[i][1] for i in batch], pad_id)
        prompt_lens = torch.tensor([len(sequences[i][0]) for i in batch], device=ids.device)
        with autocast(bf16):
            outputs = function(ids, mask, prompt_lens)
        for row, i in enumerate(batch):
            results[i] = [out[row, : len(sequences[i][1])] if out.dim() > 1 else out[row] for out in outputs]
    columns = zip(*merged(results), strict=True)
    return [nn.utils.rnn.pad_sequence(c, batch_first=True) if c[0].dim() else torch.stack(c) for c in columns]


def next_token_logits(model, hidden):  # (tokens, hidden) -> (tokens, vocab), float32
    """What a causal LM makes of its last hidden states: the output matrix and, in some families, a scale or a cap."""
    logits, config = model.get_output_embeddings()(hidden).float(), model.config.get_text_config()
    logits = logits * (getattr(config, "logit_scale", None) or 1) / (getattr(config, "logits_scaling", None) or 1)
    cap = getattr(config, "final_logit_softcapping", None)
    return cap * torch.tanh(logits / cap) if cap else logits


def check_finite(what, value, step, folder, batch):
    """Stop before a NaN or infinite loss or gradient reaches the weights; the batch is kept for inspection."""
    if not math.isfinite(value):
        write_json(Path(folder) / "bad_batch.json", {"step": step, what: str(value), "batch": batch})
        raise InputError(
            f"step {step}: the {what} is {value}; its batch is in {folder}/bad_batch.json; lower --learning_rate"
        )


def warmup_cosine(total_steps, warmup_ratio, min_lr_ratio):
    """Factor on the learning rate: linear warm-up over the first steps, cosine down to `min_lr_ratio` (paper §4.2)."""
    warmup = max(1, round(total_steps * warmup_ratio))

    def factor(step):
        progress = min(1.0, max(0, step - warmup) / max(1, total_steps - warmup))
        return min((step + 1) / warmup, min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))

    return factor


# --- run folder -----------------------------------------------------------------------------------------------------


def save_checkpoint(folder, args, step, state):
    """state (engines, tensors, numbers, containers) and every rank's RNG to checkpoint/state.pt, aside and renamed: a kill
    or a full disk leaves the last good one. A failure of one process is printed, and training goes on.

    DeepSpeed's shards lie in step-N-NAME/ beside it, and those of the step before go once state.pt names the new ones.
    """
    path = Path(folder) / "checkpoint" / "state.pt"
    rng = {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None}
    saved = {"args": asdict(args), "step": step, "rng": everywhere(rng)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for name, part in state.items():
            saved[name] = part.state(path.parent / f"step-{step}-{name}") if isinstance(part, Engine) else part
        wait()
        if rank() == 0:
            torch.save(saved, f"{path}.tmp")
            os.replace(f"{path}.tmp", path)
            for shards in path.parent.glob("step-*"):
                if not shards.name.startswith(f"step-{step}-"):
                    shutil.rmtree(shards)
    except (OSError, RuntimeError) as error:
        if world() > 1:
            raise
        with contextlib.suppress(OSError):
            Path(f"{path}.tmp").unlink(missing_ok=True)
        print(f"step {step}: no checkpoint written ({str(error).splitlines()[0]}); the last one stays", file=sys.stderr)


def load_checkpoint(folder, args):
    """What save_checkpoint wrote, with the RNG set, or None where there is none yet.

    Raises InputError where the run had other flags or another number of ranks: its numbers would be neither run's.
    """
    path = Path(folder) / "checkpoint" / "state.pt"
    if not path.is_file():
        if rank() == 0:
            print(f"--resume: no checkpoint in {folder}, so the run starts from the beginning", file=sys.stderr)
        return None
    saved = torch.load(path, map_location=device(), weights_only=True)
    for name, value in asdict(args).items():
        if name != "resume" and saved["args"].get(name) != value:
            raise InputError(
                f"--{name}: is {value}, the run in {folder} had {saved['args'].get(name)}; cannot --resume"
            )
    if len(saved["rng"]) != world():
        raise InputError(f"--resume: the run in {folder} had {len(saved['rng'])} processes, this one has {world()}")
    rng = saved["rng"][rank()]
    torch.set_rng_state(rng["cpu"].cpu())
    if rng["cuda"] is not None:
        torch.cuda.set_rng_state(rng["cuda"].cpu())
    return saved


class RunLog:
    """config.json and metrics.jsonl of a run folder, mirrored to TensorBoard or wandb on request.

    A resumed run keeps the lines up to `step`, the one of its checkpoint, of metrics.jsonl and samples.jsonl.
    """

    def __init__(self, args, data_files=(), step=0):
        self.folder, self.start, self.mirror = Path(args.output_dir), time.time(), lambda metrics, step: None
        self.folder.mkdir(parents=True, exist_ok=True)
        self.samples_file = os.devnull if rank() else self.folder / "samples.jsonl"  # for the script to open
        if rank():
            return
        if not step:  # a new run: --resume must not find an older one's checkpoint later
            with contextlib.suppress(NotADirectoryError):
                (self.folder / "checkpoint" / "state.pt").unlink(missing_ok=True)
        files = [Path(f) for f in data_files if f and Path(f).is_file()]
        hashes = {str(f): hashlib.sha256(f.read_bytes()).hexdigest()[:16] for f in files}
        if step and read_json(self.folder / "config.json", "--resume")["data"] != hashes:
            raise InputError(f"--resume: the data are not those of the run in {self.folder}")
        for name in ("metrics.jsonl", "samples.jsonl"):
            path = self.folder / name
            if path.is_file() or name == "metrics.jsonl":  # a killed run may leave half a line
                lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if step else ()
                kept = {}
                for n, line in enumerate(lines):
                    if line.endswith("\n") and (number := json.loads(line)["step"]) <= step:
                        # of metrics.jsonl the first line a step: a finished run's last evaluation stands behind it
                        kept.setdefault(number if name == "metrics.jsonl" else n, line)
                _write_aside(path, "".join(kept.values()))
        write_json(self.folder / "config.json", {"args": asdict(args), "data": hashes} | environment())
        try:
            if args.report_to == "tensorboard":
                from torch.utils.tensorboard import SummaryWriter

                writer = SummaryWriter(self.folder / "tensorboard")
                self.mirror = lambda metrics, step: [writer.add_scalar(k, v, step) for k, v in metrics.items()]
            elif args.report_to == "wandb":
                import wandb

                self.mirror = wandb.init(project="steady-rlhf", dir=str(self.folder), config=asdict(args)).log
        except ImportError:
            raise InputError(f"--report_to {args.report_to}: is not installed; pip install {args.report_to}") from None

    def write(self, step, metrics):
        if rank():
            return
        row = {"step": step, "seconds": round(time.time() - self.start, 2)} | metrics
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self.mirror(metrics, step=step)


def environment():
    """Versions, commit, machine: what a number needs beside it to be repeated."""
    import transformers

    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    machine = {"processor": platform.machine(), "threads": torch.get_num_threads(), "device": device().type}
    return {"versions": versions, "commit": git.stdout.strip() or None, "machine": machine}
