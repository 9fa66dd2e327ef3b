"""One of the processes that tests/test_deepspeed.py has torchrun start: it runs a list of jobs.

    torchrun --nproc_per_node 2 -m tests.deepspeed_worker jobs.json

A job: {script, args, fixed: responses that do not depend on the sampler, stop: the step after which
the run breaks off}; of: the class of the flags; stay: what would be left to one process all go on
with}; or {families: a folder}.
"""

import contextlib
import dataclasses
import importlib
import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import large
import ppo_sr
import utils
from am_train import score_batch
from plumbing import run_folder
from large.flags import zero_stage
from tests.test_backbones import CAUSAL, ENCODERS
from tests.test_models import EOS, PAD
from utils import Backend, backend


class Stopped(Exception):
    pass


def flags(script, args, of="Args"):
    """The flags of a script and those of large/, as run_cli parses them."""
    args_class = large.with_flags(getattr(importlib.import_module(script), of))
    return args_class(**{k: tuple(v) if isinstance(v, list) else v for k, v in args.items()})


def settings(args):
    """The backend for these flags, in the processes that there are; plain where none needs more."""
    if args.deepspeed:
        config = large.read_config(args, backend.processes)
        large.become(args, config, backend.rank, backend.processes)
    elif getattr(args, "lora_rank", 0):
        large.become(args, None)


@contextlib.contextmanager
def plain_backend():
    """One process again, for a while."""
    kind, kept = type(backend), dict(vars(backend))
    backend.__class__ = Backend
    vars(backend).clear()
    try:
        yield
    finally:
        backend.__class__ = kind
        vars(backend).clear()
        vars(backend).update(kept)


def fixed_responses(tokenizer, prompts, draw):
    """1 to 6 random tokens a prompt, two thirds with <eos>: the same in all that ask as often."""
    responses = []
    for i in range(len(prompts)):
        size = (1 + int(torch.randint(6, (), generator=draw)),)
        ids = torch.randint(3, len(tokenizer), size, generator=draw).tolist()
        responses.append([*ids[:-1], tokenizer.eos_token_id] if i % 3 else ids)
    return responses


def run(script, args, fixed=False, stop=None, of="Args", stay=False):
    """main(args) of a script -> its metrics, without the clock; None where it was stopped."""
    module, draw = importlib.import_module(script), torch.Generator().manual_seed(5)
    args = flags(script, args, of)
    generate, write = utils.generate, run_folder.RunLog.write

    def stopping(log, step, metrics):
        write(log, step, metrics)
        if step == stop:
            raise Stopped

    def fixed_or_asked_for_logprobs(model, tokenizer, prompts, *how):
        if how[-1]:  # the check of the sampler itself
            return generate(model, tokenizer, prompts, *how)
        return fixed_responses(tokenizer, prompts, draw)

    run_folder.RunLog.write = stopping
    if fixed:
        ppo_sr.generate = fixed_or_asked_for_logprobs
    try:
        settings(args)
        if stay:
            backend.last_pass = lambda: None
        module.main(args)
    except Stopped:
        return None
    finally:
        run_folder.RunLog.write = write
        vars(backend).pop("last_pass", None)
        ppo_sr.generate = generate
    # the others could meet half of the last line
    written = utils.backend.writes and (Path(args.output_dir) / "metrics.jsonl").is_file()
    return metrics_of(args.output_dir) if written else None


def metrics_of(folder):
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def loaded(load, *where):
    """The model as the scripts load it, and the same without DeepSpeed."""
    model = load(*where)
    with plain_backend():
        return model.eval(), load(*where).eval()


class Tokenizer:
    pad_token_id, eos_token_id = PAD, EOS

    def __init__(self, length=2):
        self.length = length

    def __len__(self):
        return self.length


def a_scorer(path, length=2, expected_reward_head=False):
    start = {"trained": True, "expected_reward_head": expected_reward_head}
    return utils.load_scorer(path, Tokenizer(length), **start)


def train_families(folder):
    """One step of every family as a policy and as a scorer, against a plain engine with the whole
    batch; responses."""
    tokenizer = SimpleNamespace(chat_template=None, pad_token_id=PAD, eos_token_id=EOS)
    draw = torch.Generator().manual_seed(2)
    texts = [(torch.randint(4, 90, (4 + i,), generator=draw).tolist(), 1 + i % 3) for i in range(5)]

    def nll(engine, batch):
        ids, mask = utils.pad([texts[i][0] for i in batch], PAD)
        prompt_lens = torch.tensor([texts[i][1] for i in batch])
        return -utils.response_logprobs(engine, ids, mask, prompt_lens)[0].sum()

    def scores(engine, batch):
        found = engine.run(score_batch, tokenizer, [texts[i] for i in batch], False)
        return (found - 1).square().sum()

    def step(engine, loss, batches):
        parts = []
        for batch in backend.deal(batches):
            parts.append(loss(engine, batch))
            engine.backward(parts[-1])
        return backend.add_up(parts).item(), engine.step()

    for name, config in (CAUSAL | ENCODERS).items():
        torch.manual_seed(0)
        with_score = config()
        with_score.num_labels = 1
        path = Path(folder) / name
        if backend.writes:
            scorer = AutoModelForSequenceClassification.from_config(with_score)
            scorer.save_pretrained(path / "scorer")
            if name in CAUSAL:
                AutoModelForCausalLM.from_config(config()).save_pretrained(path / "policy")
        backend.everyone(None)
        kinds = [(loaded(a_scorer, path / "scorer", 2, True), scores)]
        if name in CAUSAL:
            kinds.append((loaded(utils.load_policy, path / "policy"), nll))
        for (module, whole), loss in kinds:
            if zero_stage(backend.config) == 3:  # no process has held the model
                held = [p for key, p in module.named_parameters() if "e_head" not in key]
                shared = (p.ds_tensor.numel() <= p.ds_numel // 2 + 1 for p in held)
                assert all(p.numel() == 0 for p in held) and all(shared), name
            plain = utils.Engine(whole, 1e-3)
            engine = backend.engine(module, 1e-3)
            for batches in ([[4, 3], [2, 1], [0]], [[4], [3], [2], [1], [0]]):  # one too few
                value, norm = step(engine, loss, batches)
                with plain_backend():
                    expected, expected_norm = step(plain, loss, [[0, 1, 2, 3, 4]])
                assert abs(value - expected) < 1e-4 * abs(expected), (name, value, expected)
                assert abs(norm - expected_norm) < 1e-3 * expected_norm, (name, norm, expected_norm)
        if name in CAUSAL:
            prompts = [ids for ids, _ in texts]
            greedy = utils.generate(plain, tokenizer, prompts, 12, 0.0, 2)
            stops = [EOS, *range(60, 96)]  # a third of the tokens: responses end at all lengths
            for engine.gather_to_generate in (True, False):
                assert utils.generate(engine, tokenizer, prompts, 12, 0.0, 2) == greedy, name
                module.generation_config.eos_token_id = stops
                for y in utils.generate(engine, tokenizer, prompts, 12, 1.0, 2):
                    ends = len(y) == 12 or y[-1] in stops
                    assert not set(y[:-1]) & set(stops) and ends, name
                module.generation_config.eos_token_id = None
    module, whole = loaded(a_scorer, Path(folder) / "llama" / "scorer", 98)
    longer = backend.engine(module, 1e-3)
    with torch.no_grad():
        ours = longer.run(score_batch, tokenizer, texts, False)
        plain = score_batch(whole, tokenizer, texts, False)
    assert module.model.get_input_embeddings().num_embeddings == 98
    assert torch.allclose(ours, plain, atol=1e-5), (ours, plain)


def train_in_bfloat16(folder):
    """Weights in bfloat16 but for rotary frequencies; 20 steps bring the loss down; the reference
    is in bfloat16, too."""
    where = Path(folder) / "llama" / "policy"
    model, plain = loaded(utils.load_policy, where)
    reference = utils.load_policy(where, frozen=True)
    frequencies = plain.model.rotary_emb.inv_freq
    engine = backend.engine(model, 1e-2)
    for part in (model, getattr(reference, "module", reference)):
        assert {p.dtype for p in part.parameters()} == {torch.bfloat16}
        assert torch.equal(part.model.rotary_emb.inv_freq, frequencies)
    ids = torch.arange(4, 16).view(2, 6)
    batch = ids, torch.ones_like(ids, dtype=torch.bool), torch.tensor([1, 2])
    losses = []
    for _ in range(20):
        with utils.autocast(True):
            loss = -utils.response_logprobs(engine, *batch)[0].mean() / backend.processes
        engine.backward(loss)
        assert 0 < engine.step() < 100
        losses.append(loss.item())
    with utils.autocast(True), torch.no_grad():
        start = -utils.response_logprobs(reference, *batch)[0].mean().item() / backend.processes
    assert losses[-1] < 0.5 * losses[0] and abs(start - losses[0]) < 1e-3, (losses, start)


def main(first):
    Path(f"{sys.argv[1]}.pid{backend.rank}").write_text(str(os.getpid()))
    for job in json.loads(Path(sys.argv[1]).read_text())["jobs"]:
        started = time.time()
        if "families" in job:
            settings(first)  # another job's are left
            train_families(job["families"])
            settings(dataclasses.replace(first, bf16=True, max_grad_norm=1.0))
            train_in_bfloat16(job["families"])
        else:
            run(**job)
        seconds = time.time() - started
        print(f"{job.get('script', 'families')}: {seconds:.1f} s", file=sys.stderr)


if __name__ == "__main__":
    torch.set_num_threads(1)
    of_all = json.loads(Path(sys.argv[1]).read_text())["set_up"]
    large.runner(main)(flags("ppo_sr", of_all))
