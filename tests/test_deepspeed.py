"""Two processes under ZeRO 2 and 3 against one plain process: the numbers of 20 steps, killed and
resumed runs, refusals.

Each ZeRO stage has one launch, whose processes run all of its jobs (tests/deepspeed_worker.py).
"""

import dataclasses
import importlib
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import large
import ppo_sr
import utils
from large.engines import DeepSpeedEngine
from tests.conftest import gpt2_config
from tests.deepspeed_worker import flags, metrics_of, plain_backend, run
from tests.test_backbones import CAUSAL
from tests.test_data import jsonl, refused
from tests.test_ppo_sr import SMALL, WORDS, save_model, word_tokenizer
from utils import InputError, backend

ROOT = Path(ppo_sr.__file__).parent
pytestmark = pytest.mark.usefixtures("one_thread", "one_process_afterwards")


@pytest.fixture(autouse=True)
def one_process_afterwards():
    """LoRA and checkpointing make utils.backend another one."""
    with plain_backend():
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A policy, a scorer, and data for sft.py, am_train.py and ppo_sr.py, texts of all lengths."""
    folder = tmp_path_factory.mktemp("deepspeed")
    words = word_tokenizer("<pad>", "<eos>", "<unk>", *WORDS)
    policy = save_model(AutoModelForCausalLM, gpt2_config(words, **SMALL), words, folder / "policy", 0)
    config = gpt2_config(words, **SMALL, num_labels=1)
    scorer = save_model(AutoModelForSequenceClassification, config, words, folder / "scorer", 1)

    def text(start, length):
        return " ".join(WORDS[(start + k) % len(WORDS)] for k in range(length))

    prompts = [{"prompt": text(i, 1 + i % 4), "task": "bc"[i % 2]} for i in range(11)]
    answers = [row | {"response": text(i + 2, 1 + 3 * i % 11)} for i, row in enumerate(prompts)]
    pairs = [row | {"chosen": text(i, 1 + i % 9), "rejected": text(i + 3, 1 + i % 5)} for i, row in enumerate(prompts)]
    data = {"prompts": prompts, "answers": answers, "pairs": pairs}
    paths = {name: jsonl(folder / f"{name}.jsonl", *rows) for name, rows in data.items()}
    other = save_model(AutoModelForCausalLM, gpt2_config(words, **SMALL), words, folder / "other", 2)
    return paths | {"policy": policy, "scorer": scorer, "other": other}


def jobs(files, out, deepspeed=None):
    """The runs that are compared, by name; 20 optimiser steps each."""
    common = {
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 2,
        "global_batch_size": 4,
        "max_length": 24,
    }
    common |= {"deepspeed": deepspeed, "max_grad_norm": 0.5}

    def job(name, script, more, **options):
        return {"script": script, "args": common | {"output_dir": str(out / name)} | more} | options

    epochs = {"num_train_epochs": 7}  # of 3 steps
    sft = {"model_name_or_path": files["policy"], "dataset_name": files["answers"]} | epochs
    pairs = {
        "model_name_or_path": files["policy"],
        "dataset_name": files["pairs"],
        "eval_dataset_name": files["pairs"],
    }
    pairs |= {"expected_reward": "joint", "eval_steps": 5, "per_device_eval_batch_size": 4} | epochs
    ppo = {
        "model_name_or_path": files["policy"],
        "dataset_name": files["prompts"],
        "response_length": 6,
    }
    ppo |= {
        "reward_model_path": files["scorer"],
        "rehearsal_dataset_name": files["answers"],
        "rehearsal_batch_size": 3,
    }
    ppo |= {"rehearsal_coef": 0.3, "critic_learning_rate": 3e-3, "per_device_eval_batch_size": 3}
    ppo |= {"moving_average_decay": 0.99, "missing_eos_penalty": 0.5, "global_batch_size": 8}
    fixed = {"total_steps": 5, "num_mini_batches": 2}
    lora = {"lora_rank": 2, "gradient_checkpointing": True, "total_steps": 2, "num_mini_batches": 1}
    backbone = {"critic_init": "backbone", "critic_warmup_steps": 0, "num_ppo_epochs": 2}
    sampled = {
        "total_steps": 5,
        "save_steps": 2,
        "eval_steps": 2,
        "eval_dataset_names": [files["answers"]],
    }
    return {
        "sft": job("sft", "sft", sft),
        "am": job("am", "am_train", pairs),
        "ppo": job("ppo", "ppo_sr", ppo | fixed, fixed=True),
        "lora": job("lora", "ppo_sr", ppo | fixed | lora, fixed=True),
        "backbone": job("backbone", "baselines.ppo_max", ppo | fixed | backbone, fixed=True),
        "sampled": job("sampled", "ppo_sr", ppo | sampled),
    }


ZERO_3 = ("sft", "am", "ppo", "lora")
COMPARED = (*ZERO_3, "backbone")


@pytest.fixture(scope="module")
def plain(files, tmp_path_factory):
    """{name: metrics} and the folder of the runs of one plain process."""
    out = tmp_path_factory.mktemp("plain")
    return {name: run_plain(jobs(files, out)[name]) for name in COMPARED}, out


def run_plain(job):
    with plain_backend():
        return run(**job)


def config_of(stage, folder):
    """configs/zeroN.json, in which even the smallest weights are sharded."""
    config = json.loads((ROOT / "configs" / f"zero{stage}.json").read_text())
    if stage == 3:
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    path = folder / "zero.json"
    path.write_text(json.dumps(config))
    return str(path)


def launch(out, listed):
    """torchrun with two processes that run the jobs, as a Popen."""
    path = out / "jobs.json"
    set_up = next(job["args"] for job in listed if job.get("script") == "ppo_sr")
    path.write_text(json.dumps({"set_up": set_up, "jobs": listed}))
    environ = os.environ | {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(ROOT),
    }
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
    ]
    command += ["-m", "tests.deepspeed_worker", str(path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environ, **pipes)


def finished(process, seconds=600):
    output, _ = process.communicate(timeout=seconds)
    assert process.returncode == 0, output[-6000:]
    return output


def agrees(rows, expected, tolerance=1e-4):
    """Every metric of every step."""
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    for row, wanted in zip(rows, expected, strict=True):
        assert row == pytest.approx(wanted, abs=tolerance, rel=tolerance)


def same_run(one, other):
    """Metrics, samples and weights, bit for bit."""
    assert metrics_of(one) == metrics_of(other)
    assert (one / "samples.jsonl").read_text() == (other / "samples.jsonl").read_text()
    a, b = (load_file(folder / "model" / "model.safetensors") for folder in (one, other))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def zero3(files, tmp_path_factory):
    """Under ZeRO 3: the compared runs, one that samples, the same one stopped after step 3 and
    resumed, one whose policy is never whole, all families, and the scripts that train nothing."""
    out = tmp_path_factory.mktemp("zero3")
    named = jobs(files, out, config_of(3, out))
    named["ppo"]["args"]["shard_frozen_models"] = True
    del named["backbone"]
    stopped = named["sampled"] | {"args": named["sampled"]["args"] | {"output_dir": str(out / "stopped")}}
    resumed = stopped | {"args": stopped["args"] | {"resume": True}}
    in_step = {
        "gather_to_generate": False,
        "shard_frozen_models": True,
        "bf16": True,
        "output_dir": str(out / "in_step"),
    }
    in_step = named["sampled"] | {"args": named["sampled"]["args"] | in_step}
    listed = [*named.values(), stopped | {"stop": 3}, resumed, in_step]
    others = evaluations(files, out, named["sampled"]["args"]["deepspeed"])
    finished(launch(out, [*listed, {"families": str(out / "families")}, *others]))
    return out


@pytest.fixture(scope="module")
def zero2(files, tmp_path_factory):
    """Under ZeRO 2: rank 1 of a run that samples is killed in a first launch. A second one resumes
    it, and runs the same without a kill, the compared runs, and the scripts that train nothing."""
    out = tmp_path_factory.mktemp("zero2")
    named = jobs(files, out, config_of(2, out))
    killed = named["sampled"] | {"args": named["sampled"]["args"] | {"output_dir": str(out / "killed")}}
    process, metrics, started = launch(out, [killed]), out / "killed" / "metrics.jsonl", time.time()
    while not (metrics.is_file() and metrics.read_text().count("\n") >= 4):
        assert process.poll() is None and time.time() - started < 240, process.communicate()[0][-3000:]
        time.sleep(0.01)
    killed_at = time.time()
    os.kill(int((out / "jobs.json.pid1").read_text()), signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    result = {"seconds": time.time() - killed_at, "output": output, "code": process.returncode}
    resumed = killed | {"args": killed["args"] | {"resume": True}}
    finished(launch(out, [resumed, *named.values(), *evaluations(files, out, config_of(2, out))]))
    return out, result


def evaluations(files, out, deepspeed=None):
    """What runs models and trains none, on greedy answers where they are compared; the last one
    ends in rank 0 alone."""
    small = {"deepspeed": deepspeed, "per_device_eval_batch_size": 3, "max_length": 24}

    def job(name, script, args, **options):
        return {"script": script, "args": small | {"output_dir": str(out / name)} | args} | options

    select = {
        "reward_model_path": files["scorer"],
        "model_name_or_path": files["policy"],
        "num_clusters": 2,
    }
    select |= {
        "dataset_name": files["prompts"],
        "embedding_model": files["policy"],
        "response_length": 6,
    }
    winrate = {
        "policy": files["policy"],
        "reference": files["other"],
        "dataset_names": [files["prompts"]],
    }
    winrate |= {"judge": files["scorer"], "response_length": 6, "temperature": 0.0}
    pairs = {"scorers": [files["scorer"]], "dataset_name": files["pairs"], "num_bootstrap": 10}
    stay = {"stay": deepspeed is not None}
    return [
        job("select", "select_rehearsal", select, **stay),
        job(
            "winrate",
            "evaluate",
            winrate | {"tie_band": 0.0, "num_bootstrap": 10},
            of="Winrate",
            **stay,
        ),
        job("calibration", "evaluate", pairs, of="Calibration"),
    ]


@pytest.mark.parametrize("name", ZERO_3)
def test_zero_3_is_one_process(name, zero3, plain):
    agrees(metrics_of(zero3 / name), plain[0][name])


@pytest.mark.parametrize("name", COMPARED)
def test_zero_2_is_one_process(name, zero2, plain):
    agrees(metrics_of(zero2[0] / name), plain[0][name])


def test_the_numbers_move_further_than_the_tolerance(plain):
    for name, key in (
        ("sft", "loss"),
        ("am", "loss"),
        ("ppo", "loss/rehearsal_nll"),
        ("lora", "loss/rehearsal_nll"),
    ):
        values = [row[key] for row in plain[0][name] if key in row]
        assert abs(values[0] - values[-1]) > 0.02, name


@pytest.mark.parametrize("name", ZERO_3)
def test_the_saved_model_is_whole(name, zero3, plain):
    """Shards gathered, adapters merged: any tool loads the folder. Key biases have no gradient but
    rounding."""
    ours, theirs = (load_file(out / name / "model" / "model.safetensors") for out in (zero3, plain[1]))
    assert ours.keys() == theirs.keys()
    for key in ours:
        if not key.endswith("c_attn.bias"):
            assert (
                ours[key].tolist() == pytest.approx(theirs[key].tolist(), abs=2e-3)
                if ours[key].dim() == 1
                else ((ours[key] - theirs[key]).abs().max() < 2e-3)
            ), key


def test_a_policy_that_is_never_whole_samples_and_trains(zero3):
    rows = metrics_of(zero3 / "in_step")
    assert [row["step"] for row in rows] == [*range(6)] and all(row["objective/entropy"] > 0 for row in rows[1:])
    assert (zero3 / "in_step" / "model" / "model.safetensors").is_file()


def test_a_stopped_run_resumes_to_the_same_numbers_under_zero_3(zero3):
    same_run(zero3 / "stopped", zero3 / "sampled")


def test_a_rank_is_killed_and_the_run_resumes(zero2):
    """torchrun ends the other rank within a minute and says why; started again, the numbers are
    those of a whole run."""
    out, killed = zero2
    assert killed["code"] != 0 and killed["seconds"] < 60 and "SIGKILL" in killed["output"]
    same_run(out / "killed", out / "sampled")
    shards = sorted(p.name for p in (out / "killed" / "checkpoint").glob("st*"))
    assert shards == ["state.pt", "step-4-critic", "step-4-policy"]  # and none of the steps before


@pytest.mark.parametrize("stage", [2, 3])
def test_ranks_share_an_evaluation(stage, zero2, zero3, files, tmp_path):
    out = zero3 if stage == 3 else zero2[0]
    _, winrate, calibration = evaluations(files, tmp_path)
    run_plain(calibration)
    ours, theirs = (json.loads((f / "calibration" / "calibration.json").read_text()) for f in (out, tmp_path))
    ours, theirs = (next(iter(report["scorers"].values())) for report in (ours, theirs))
    for name in ("accuracy", "ece", "nll"):
        assert ours[name] == pytest.approx(theirs[name]), name
    run_plain(winrate)
    ours, theirs = (rows_of(f / "winrate" / "responses.jsonl") for f in (out, tmp_path))
    assert len({row["response"] for row in ours}) > 1
    assert {row["verdict"] for row in ours} == {"win", "lose"}
    for row, other in zip(ours, theirs, strict=True):
        assert row == pytest.approx(other, abs=1e-5)
    ours, theirs = (json.loads((f / "winrate" / "winrate.json").read_text())["prompts"] for f in (out, tmp_path))
    assert ours["win"] == theirs["win"]
    assert ours["perplexity_ref"] == pytest.approx(theirs["perplexity_ref"], abs=1e-5)


@pytest.mark.parametrize("stage", [2, 3])
def test_ranks_share_a_selection(stage, zero2, zero3, files, tmp_path):
    """Sampling differs by rank; the scores of what was sampled are those that one process gives the
    same texts."""
    responses = (zero3 if stage == 3 else zero2[0]) / "select" / "responses.jsonl"
    ours = rows_of(responses)
    assert 3 < len(ours) <= 11 and len({row["response"] for row in ours}) > 3
    select = evaluations(files, tmp_path)[0]
    select["args"] |= {"model_name_or_path": None, "dataset_name": str(responses)}
    run_plain(select)
    theirs = rows_of(tmp_path / "select" / "responses.jsonl")
    assert [row["score"] for row in ours] == pytest.approx([row["score"] for row in theirs], abs=1e-5)


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- adapters and checkpointing, in one process ---------------------------------------------------


def policy_of(files):
    return utils.load_policy(files["policy"]).eval()


def engine_of(model, **options):
    """As the flags --lora_rank and --gradient_checkpointing make it in one process."""
    options = {"lora_rank": 0, "gradient_checkpointing": False, "seed": 1} | options
    large.become(SimpleNamespace(**options), None)
    return backend.engine(model, 0.1)


TEXTS = torch.tensor([[3, 4, 5, 6, 7, 8], [9, 8, 7, 6, 5, 4]])
WHOLE, PROMPTS = torch.ones(2, 6, dtype=torch.bool), torch.tensor([2, 3])


def logprobs_of(model):
    return utils.response_logprobs(model, TEXTS, WHOLE, PROMPTS)[0]


def test_adapters_start_at_the_policy_train_alone_and_are_merged(files, tmp_path):
    start, engine = policy_of(files), engine_of(policy_of(files), lora_rank=2)
    parameters = dict(engine.module.named_parameters())
    frozen = {name: p.clone() for name, p in parameters.items() if not p.requires_grad}
    before = logprobs_of(start)
    assert torch.equal(logprobs_of(engine), before)
    for _ in range(2):
        engine.backward(-logprobs_of(engine).sum())
        engine.step()
    after = logprobs_of(engine)
    assert (after - before).abs().max() > 0.1
    assert all(torch.equal(parameters[name], p) for name, p in frozen.items())
    trained = sum(p.numel() for p in parameters.values() if p.requires_grad)
    assert 0 < trained < 0.3 * start.num_parameters()
    with torch.no_grad():
        assert torch.equal(logprobs_of(backend.reference(engine, files["policy"])), before)
    utils.save_model(engine, tmp_path, word_tokenizer("<pad>", "<eos>", "<unk>", *WORDS))
    merged = logprobs_of(utils.load_policy(tmp_path).eval())
    assert (merged - after).abs().max() < 1e-5


def test_a_checkpoint_of_adapters_holds_them_alone_and_resumes_to_the_bit(files):
    def step(engine):
        engine.backward(-logprobs_of(engine).sum())
        engine.step()

    def numbers(state):
        return sum(value.numel() for value in state["module"].values())

    stopped, whole = engine_of(policy_of(files), lora_rank=2), engine_of(policy_of(files))
    step(stopped)
    state = stopped.state(None)
    trained = [p for p in stopped.module.parameters() if p.requires_grad]
    buffers = [b for name, b in stopped.module.named_buffers() if name in stopped.module.state_dict()]
    assert numbers(state) == sum(t.numel() for t in (*trained, *buffers)) < 0.3 * numbers(whole.state(None))
    assert numbers(whole.state(None)) == sum(t.numel() for t in whole.module.state_dict().values())  # nothing is frozen
    buffer = io.BytesIO()
    torch.save(state, buffer)
    step(stopped)
    resumed = engine_of(policy_of(files), lora_rank=2)
    resumed.load_state(torch.load(io.BytesIO(buffer.getvalue()), weights_only=True))
    step(resumed)
    one, other = stopped.module.state_dict(), resumed.module.state_dict()
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    another = policy_of(files)
    with torch.no_grad():
        another.transformer.h[0].attn.c_attn.weight[0, 0] += 1e-4
    with refused("--resume: the frozen weights are not those that the run started from"):
        engine_of(another, lora_rank=2).load_state(state)


@pytest.mark.parametrize("stage", [None, 3])
def test_a_stopped_run_of_adapters_goes_on_to_the_same_weights(stage, files, tmp_path):
    """From a checkpoint without the weights that stay; its last one is of step 2 of 3."""
    given = {"model_name_or_path": files["scorer"], "dataset_name": files["pairs"], "lora_rank": 2}
    given |= {"max_length": 24, "global_batch_size": 4, "per_device_train_batch_size": 4, "save_steps": 2}
    given |= {"learning_rate": 1e-2, "output_dir": tmp_path / "run"}
    given |= {"deepspeed": config_of(stage, tmp_path)} if stage else {}
    given = [part for name, value in given.items() for part in (f"--{name}", value)]
    model, checkpoint = tmp_path / "run" / "model" / "model.safetensors", tmp_path / "run" / "checkpoint"
    done = command("am_train.py", *given)
    assert done.returncode == 0, done.stderr
    weights = load_file(model)
    if stage:
        saved = torch.load(next(checkpoint.glob("*/*model_states.pt")), weights_only=False)["module"]
    else:
        saved = torch.load(checkpoint / "state.pt", weights_only=True)["engine"]["module"]
    assert saved and not [name for name in saved if ".lora_" not in name and "score" not in name]
    model.unlink()
    done = command("am_train.py", *given, "--resume", "True")
    assert done.returncode == 0 and "done 2" in done.stdout, done.stderr
    again = load_file(model)
    assert again.keys() == weights.keys() and all(torch.equal(weights[name], again[name]) for name in weights)


def test_checkpointing_computes_layers_twice_and_the_same_gradients(files):
    calls, gradients = [], []
    for on in (False, True):
        engine = engine_of(policy_of(files), gradient_checkpointing=on)
        with torch.no_grad():
            logprobs_of(engine)  # the first pass looks at the model's head, too
        calls.append(0)

        def count(*_):
            calls[-1] += 1

        engine.module.transformer.h[0].attn.register_forward_hook(count)
        engine.backward(-logprobs_of(engine).sum())
        gradients.append([p.grad.clone() for p in engine.module.parameters()])
    assert calls == [1, 2]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


def test_checkpointing_is_on_by_itself_for_large_models_alone(files, monkeypatch):
    """And so numbers of small ones stay as they are; the flag decides otherwise."""

    def on(asked):
        return engine_of(policy_of(files), gradient_checkpointing=asked).module.is_gradient_checkpointing

    assert [on(asked) for asked in (None, False, True)] == [False, False, True]
    monkeypatch.setattr("large.flags.CHECKPOINTED", policy_of(files).num_parameters() - 1)
    assert [on(asked) for asked in (None, False, True)] == [True, False, True]
    # a model that has none: off by itself, and refused where it is asked for
    monkeypatch.setattr("transformers.GPT2LMHeadModel.supports_gradient_checkpointing", False)
    assert not on(None)
    with refused("--gradient_checkpointing True: GPT2LMHeadModel has none"):
        on(True)


@pytest.mark.parametrize("train", [False, True])
def test_checkpointing_turns_on_no_dropout(train):
    """OPT's layers ask their own mode, which has to say `training` where checkpoints are made."""
    config = CAUSAL["opt"]()
    config.dropout = 0.5
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).train(train)
    engine, calls = engine_of(model, gradient_checkpointing=True), []
    with torch.no_grad():
        logprobs_of(engine)  # the first pass looks at the model's head, too
    model.model.decoder.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    logprobs = [logprobs_of(engine) for _ in range(2)]
    assert torch.equal(*logprobs) != train
    logprobs[0].sum().backward()
    assert len(calls) == 3 and model.training == train  # two passes, and one again


# --- who does what --------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("rows", [1, 2, 5, 8, 11])
@pytest.mark.parametrize("processes", [2, 3])
def test_every_row_is_dealt_once_and_all_processes_have_as_many_batches(rows, size, processes):
    batches, seen, counts = utils.length_batches([9] * rows, size), [], set()
    for rank in range(processes):
        large.become(None, None, rank, processes)
        mine, counted = [], []
        for batch in backend.deal(batches):
            mine.append(batch)
            counted.append(backend.counts)
        assert counted == sorted(counted, reverse=True) and sum(counted) == backend.dealt
        assert all(0 < len(batch) <= size for batch in mine)
        assert all(batch == [0] for batch in mine[backend.dealt :])
        counts.add(len(mine))
        seen += [row for batch in mine[: backend.dealt] for row in batch]
    assert sorted(seen) == list(range(rows)) and len(counts) == 1


def test_another_number_of_processes_cannot_resume():
    large.become(None, None)
    saved = {"shards": "checkpoint/step-2-policy", "rng": [None, None]}
    with refused("--resume: the run had 2 processes, this one has 1"):
        DeepSpeedEngine.load_state(None, saved)


# --- what is refused, before any model runs -------------------------------------------------------

REFUSED = {
    "two processes and no file": (
        {},
        None,
        2,
        "--deepspeed: missing, and torchrun started 2 processes",
    ),
    "batch": (
        {"global_batch_size": 6},
        {},
        2,
        "--global_batch_size 6: must be a multiple of 2 ranks x",
    ),
    "mini-batches": ({"num_mini_batches": 4}, {}, 2, "x --num_mini_batches 4 = 16"),
    "batch of the file": (
        {},
        {"train_batch_size": 512},
        1,
        "train_batch_size is 512, --global_batch_size 8",
    ),
    "rate": (
        {},
        {"optimizer": {"params": {"lr": 1e-2}}},
        1,
        "optimizer.params.lr is 0.01, --learning_rate 0.001",
    ),
    "bf16": ({}, {"bf16": {"enabled": True}}, 1, "bf16.enabled is True, --bf16 False"),
    "clipping": (
        {},
        {"gradient_clipping": 2.0},
        1,
        "gradient_clipping is 2.0, --max_grad_norm 0.5",
    ),
    "fp16": ({}, {"fp16": {"enabled": True}}, 1, "fp16 is decided by the flags"),
    "bf16 at stage 0": (
        {"bf16": True},
        {"zero_optimization": {"stage": 0}},
        1,
        "--bf16 True needs ZeRO stage 1, 2 or 3",
    ),
    "no JSON": ({}, "{", 1, "cannot be read as JSON"),
    "a list": ({}, "[]", 1, "zero_optimization.stage must be 0, 1, 2 or 3"),
    "no ZeRO": ({}, '{"zero_optimization": null}', 1, "zero_optimization.stage must be 0, 1, 2 or 3"),
    "stage as text": (
        {},
        {"zero_optimization": {"stage": "2"}},
        1,
        "zero_optimization.stage must be 0, 1, 2 or 3",
    ),
    "whole to sample": (
        {"gather_to_generate": False},
        {},
        1,
        "--gather_to_generate False: needs --deepspeed with ZeRO 3",
    ),
    "sharding": (
        {"shard_frozen_models": True},
        None,
        1,
        "--shard_frozen_models True: needs --deepspeed",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_together_is_refused(name, files, tmp_path):
    more, config, processes, said = REFUSED[name]
    path = tmp_path / "zero.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    args = jobs(files, tmp_path, None if config is None else str(path))["sampled"]["args"] | more
    with refused(said):
        large.check(flags("ppo_sr", args), processes)


def test_a_shared_backbone_is_refused_under_zero_3(files, tmp_path):
    for file in (config_of(3, tmp_path), str(ROOT / "configs" / "zero2_offload.json")):
        args = jobs(files, tmp_path, file)["backbone"]["args"]
        with refused("--critic_init backbone: needs ZeRO 0 to 2 without offload"):
            large.read_config(flags("baselines.ppo_max", args), 1)


MISSING = [("deepspeed", {"deepspeed": "zero.json"}), ("peft", {"lora_rank": 2})]


@pytest.mark.parametrize("package, given", MISSING)
def test_a_missing_package_is_named(package, given, monkeypatch):
    find = importlib.util.find_spec
    without = lambda name: None if name == package else find(name)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", without)
    with pytest.raises(InputError, match=f"is not installed; pip install {package}"):
        large.check(SimpleNamespace(**given), 1)


def test_settings_that_agree_and_auto_are_taken(files, tmp_path):
    path = tmp_path / "zero.json"
    zero = {"stage": 2, "sub": "auto"}
    entries = {"train_batch_size": 8, "gradient_clipping": "auto", "zero_optimization": zero}
    path.write_text(json.dumps(entries))
    args = jobs(files, tmp_path, str(path))["sampled"]["args"]
    config = large.read_config(flags("ppo_sr", args), 2)
    assert config["zero_optimization"] == {"stage": 2} and config["gradient_clipping"] == 0.5


# --- the flags, and one process with them ---------------------------------------------------------

OF = {"select_rehearsal": (1, 0, 0), "sft": (1, 1, 0), "am_train": (1, 1, 0), "ppo_sr": (1, 1, 1)}
FLAGS = [{"deepspeed"}, {"gradient_checkpointing", "lora_rank"}]
FLAGS += [{"shard_frozen_models", "gather_to_generate"}]


@pytest.mark.parametrize("script", OF)
def test_a_script_has_the_flags_that_it_can_use(script):
    module = importlib.import_module(script)
    own, extended = module.Args, large.with_flags(module.main.__annotations__["args"])
    added = {f.name for f in dataclasses.fields(extended)} - {f.name for f in dataclasses.fields(own)}
    expected = (names for names, has in zip(FLAGS, OF[script], strict=True) if has)
    assert added == set().union(*expected) and issubclass(extended, own)


def command(script, *given, environ=None):
    environ = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | (environ or {})
    command = [sys.executable, script, *map(str, given)]
    return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=300)


def test_help_tells_of_the_flags_of_large_models():
    said = command("ppo_sr.py", "--help").stdout
    assert "--deepspeed" in said and "configs/zero2.json" in said and "--lora_rank" in said
    said = command("evaluate.py", "winrate", "--help").stdout
    assert "--deepspeed" in said and "--lora_rank" not in said


def test_one_process_trains_adapters_from_the_command_line(files, tmp_path):
    """As in the README: no DeepSpeed, a checkpoint, and other flags refused when it is resumed."""
    given = {"model_name_or_path": files["policy"], "dataset_name": files["answers"]}
    given |= {"output_dir": tmp_path, "max_length": 24, "global_batch_size": 4, "save_steps": 1}
    given = [part for name, value in given.items() for part in (f"--{name}", value)]
    done = command("sft.py", *given, "--lora_rank", 2, "--gradient_checkpointing", "True")
    assert done.returncode == 0, done.stderr
    assert "c_attn.weight" in str(load_file(tmp_path / "model" / "model.safetensors").keys())
    done = command("sft.py", *given, "--resume", "True")
    assert done.returncode == 2 and "--gradient_checkpointing: is None" in done.stderr, done.stderr


def test_an_error_of_all_processes_is_said_once(files, tmp_path):
    given = ["--dataset_name", tmp_path / "none.jsonl", "--model_name_or_path", files["policy"]]
    given += ["--output_dir", tmp_path]
    # before they have met: --deepspeed is missing, which the first one says
    done = command("sft.py", *given, environ={"RANK": "1", "WORLD_SIZE": "2"})
    assert done.returncode == 2 and "error" not in done.stderr, done.stderr
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "sft.py"]
    given += ["--deepspeed", "configs/zero2.json", "--per_device_train_batch_size", 8]
    done = command(*launch, *given)
    assert done.returncode and done.stderr.count("none.jsonl: ") == 1, done.stderr
