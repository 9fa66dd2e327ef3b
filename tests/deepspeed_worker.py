"""One of the processes that tests/test_deepspeed.py has torchrun start: it runs a list of jobs in one process group.

    torchrun --nproc_per_node 2 -m tests.deepspeed_worker jobs.json

A job: {script, args, fixed: responses that do not depend on the sampler, stop: the step after which the run breaks off};
of: the class of the flags; stay: what would be left to rank 0 all ranks go on with}; or {families: a folder}.
"""

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

import engines
import ppo_sr
import utils
from tests.test_backbones import CAUSAL, ENCODERS
from tests.test_models import EOS, PAD


class Stopped(Exception):
    pass


def fixed_responses(model, tokenizer, prompts, *sampling, draw=None):
    """1 to 6 random tokens a prompt, two thirds with <eos>: the same in every process that asks as often."""
    responses = []
    for i in range(len(prompts)):
        ids = torch.randint(
            3, len(tokenizer), (1 + int(torch.randint(6, (), generator=draw)),), generator=draw
        ).tolist()
        responses.append([*ids[:-1], tokenizer.eos_token_id] if i % 3 else ids)
    return responses


def run(script, args, fixed=False, stop=None, of="Args", stay=False):
    """main(args) of a script -> its metrics, without the clock; None where it was stopped."""
    module, draw = importlib.import_module(script), torch.Generator().manual_seed(5)
    args = getattr(module, of)(**{k: tuple(v) if isinstance(v, list) else v for k, v in args.items()})
    if engines.config is not None and hasattr(args, "deepspeed"):
        engines.config = engines.read_config(args, engines.world())
    generate, write, leave = utils.generate, utils.RunLog.write, engines.leave_to_rank_0

    def stopping(log, step, metrics):
        write(log, step, metrics)
        if step == stop:
            raise Stopped

    utils.RunLog.write = stopping
    if fixed:
        module.generate = lambda *a, **options: fixed_responses(*a, draw=draw)
    if stay:
        module.leave_to_rank_0 = lambda: None
    try:
        module.main(args)
    except Stopped:
        return None
    finally:
        utils.RunLog.write = write
        if stay:
            module.leave_to_rank_0 = leave
        if fixed:
            module.generate = generate
    return metrics_of(args.output_dir) if (Path(args.output_dir) / "metrics.jsonl").is_file() else None


def metrics_of(folder):
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def loaded(load, *where, sharded=None):
    """The model as the scripts load it, and the same without DeepSpeed."""
    model = load(*where, sharded=sharded)
    config, engines.config = engines.config, None
    plain = load(*where)
    engines.config = config
    return model.eval(), plain.eval()


def train_families(args, folder):
    """One step of every family as a policy and as a scorer, against a plain engine with the whole batch; responses."""
    tokenizer = SimpleNamespace(pad_token_id=PAD, eos_token_id=EOS)
    draw = torch.Generator().manual_seed(2)
    texts = [(torch.randint(4, 90, (4 + i,), generator=draw).tolist(), 1 + i % 3) for i in range(5)]

    def nll(engine, micro, weight):
        ids, mask = utils.pad([texts[i][0] for i in micro], PAD)
        prompt_lens = torch.tensor([texts[i][1] for i in micro])
        return -weight * utils.response_logprobs(engine, ids, mask, prompt_lens)[0].sum()

    def scores(engine, micro, weight):
        return weight * (utils.score_batch(engine, tokenizer, [texts[i] for i in micro], False) - 1).square().sum()

    def step(engine, loss, micros):
        value = 0.0
        for micro, weight in micros:
            part = loss(engine, micro, weight)
            engine.backward(part)
            value += part.item()
        return value, engine.step()

    for name, config in (CAUSAL | ENCODERS).items():
        torch.manual_seed(0)
        with_score = config()
        with_score.num_labels = 1
        path = Path(folder) / name
        if engines.rank() == 0:
            AutoModelForSequenceClassification.from_config(with_score).save_pretrained(path / "scorer")
            if name in CAUSAL:
                AutoModelForCausalLM.from_config(config()).save_pretrained(path / "policy")
        engines.wait()
        kinds = [(loaded(utils.Scorer.from_pretrained, path / "scorer", Tokenizer(), True, True), scores)]
        if name in CAUSAL:
            kinds.append((loaded(utils.load_policy, path / "policy"), nll))
        for (module, whole), loss in kinds:
            if engines.stage() == 3:  # no rank has held the model
                held = [p for key, p in module.named_parameters() if "e_head" not in key]
                assert all(p.numel() == 0 and p.ds_tensor.numel() <= p.ds_numel // 2 + 1 for p in held), name
            plain = engines.Engine(whole, 1e-3)
            engine = engines.make_engine(args, module, 1e-3)
            for _ in range(2):
                value, norm = step(engine, loss, engines.dealt([[4, 3], [2, 1], [0]]))
                expected, expected_norm = step(plain, loss, [([0, 1, 2, 3, 4], 1.0)])
                assert abs(engines.total(value) - expected) < 1e-4 * abs(expected), (name, value, expected)
                assert abs(norm - expected_norm) < 1e-3 * expected_norm, (name, norm, expected_norm)
        if name in CAUSAL:
            prompts = [ids for ids, _ in texts]
            greedy = utils.generate(plain, tokenizer, prompts, 12, 0.0, 2)
            stops = [EOS, *range(60, 96)]  # a third of the tokens: ranks stop at different lengths
            for engine.gather_to_generate in (True, False):
                assert utils.generate(engine, tokenizer, prompts, 12, 0.0, 2) == greedy, name
                module.generation_config.eos_token_id = stops
                for y in utils.generate(engine, tokenizer, prompts, 12, 1.0, 2):
                    assert not set(y[:-1]) & set(stops) and (len(y) == 12 or y[-1] in stops), name
                module.generation_config.eos_token_id = None
    longer = loaded(utils.Scorer.from_pretrained, Path(folder) / "llama" / "scorer", Tokenizer(98))
    longer, whole = engines.make_engine(args, longer[0], 1e-3), longer[1]
    with torch.no_grad():
        ours, plain = (utils.score_batch(model, tokenizer, texts, False) for model in (longer, whole))
    assert longer.module.model.get_input_embeddings().num_embeddings == 98
    assert torch.allclose(ours, plain, atol=1e-5), (ours, plain)


class Tokenizer:
    pad_token_id, eos_token_id = PAD, EOS

    def __init__(self, length=2):
        self.length = length

    def __len__(self):
        return self.length


def train_in_bfloat16(args, folder):
    """Weights in bfloat16 but for rotary frequencies; 20 steps bring the loss down; the reference is in bfloat16, too."""
    where = Path(folder) / "llama" / "policy"
    model, plain = loaded(utils.load_policy, where)
    reference = engines.frozen(args, utils.load_policy, where)
    frequencies = plain.model.rotary_emb.inv_freq
    engine = engines.make_engine(args, model, 1e-2)
    for part in (model, getattr(reference, "module", reference)):
        assert {p.dtype for p in part.parameters()} == {torch.bfloat16}
        assert torch.equal(part.model.rotary_emb.inv_freq, frequencies)
    ids = torch.arange(4, 16).view(2, 6)
    batch = ids, torch.ones_like(ids, dtype=torch.bool), torch.tensor([1, 2])
    losses = []
    for _ in range(20):
        with utils.autocast(True):
            loss = -utils.response_logprobs(engine, *batch)[0].mean() / engines.world()
        engine.backward(loss)
        assert 0 < engine.step() < 100
        losses.append(loss.item())
    with utils.autocast(True), torch.no_grad():
        start = -utils.response_logprobs(reference, *batch)[0].mean().item() / engines.world()
    assert losses[-1] < 0.5 * losses[0] and abs(start - losses[0]) < 1e-3, (losses, start)


def main():
    jobs = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    first = ppo_sr.Args(**jobs["set_up"])
    engines.join_ranks(first)
    Path(f"{sys.argv[1]}.pid{engines.rank()}").write_text(str(os.getpid()))
    for job in jobs["jobs"]:
        started = time.time()
        if "families" in job:
            engines.config = engines.read_config(first, engines.world())  # another job's is left
            train_families(first, job["families"])
            args = dataclasses.replace(first, bf16=True, max_grad_norm=1.0)
            engines.config = engines.read_config(args, engines.world())
            train_in_bfloat16(args, job["families"])
        else:
            run(**job)
        print(f"{job.get('script', 'families')}: {time.time() - started:.1f} s", file=sys.stderr)
    engines.finish()


if __name__ == "__main__":
    main()
