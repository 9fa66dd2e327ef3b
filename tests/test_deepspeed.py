"""Two processes under ZeRO 2 and 3 against one plain process: the numbers of 20 steps, killed and resumed runs, refusals.

Each ZeRO stage has one launch, whose processes run all of its jobs (tests/deepspeed_worker.py).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import ppo_sr
from tests.conftest import gpt2_config
from tests.deepspeed_worker import metrics_of, run
from tests.test_data import jsonl
from tests.test_ppo_sr import SMALL, WORDS, save_model, word_tokenizer

ROOT = Path(ppo_sr.__file__).parent
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A policy, a scorer, and data for sft.py, am_train.py and ppo_sr.py, of texts of very different lengths."""
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
    return paths | {"policy": policy, "scorer": scorer}


def jobs(files, out, deepspeed=None):
    """The runs that are compared, by name; 20 optimiser steps each."""
    common = {"learning_rate": 1e-3, "per_device_train_batch_size": 2, "global_batch_size": 4, "max_length": 24}
    common |= {"deepspeed": deepspeed, "max_grad_norm": 0.5}

    def job(name, script, more, **options):
        return {"script": script, "args": common | {"output_dir": str(out / name)} | more} | options

    epochs = {"num_train_epochs": 7}  # of 3 steps
    sft = {"model_name_or_path": files["policy"], "dataset_name": files["answers"]} | epochs
    pairs = {"model_name_or_path": files["policy"], "dataset_name": files["pairs"], "eval_dataset_name": files["pairs"]}
    pairs |= {"expected_reward": "joint", "eval_steps": 5, "per_device_eval_batch_size": 4} | epochs
    ppo = {"model_name_or_path": files["policy"], "dataset_name": files["prompts"], "response_length": 6}
    ppo |= {"reward_model_path": files["scorer"], "rehearsal_dataset_name": files["answers"], "rehearsal_batch_size": 3}
    ppo |= {"rehearsal_coef": 0.3, "critic_learning_rate": 3e-3, "per_device_eval_batch_size": 3}
    ppo |= {"score_normalization": "moving_average", "missing_eos_penalty": 0.5, "global_batch_size": 8}
    fixed = {"total_steps": 5, "num_mini_batches": 2}
    sampled = {"total_steps": 5, "save_steps": 2, "eval_steps": 2, "eval_dataset_names": [files["answers"]]}
    return {
        "sft": job("sft", "sft", sft),
        "am": job("am", "am_train", pairs),
        "ppo": job("ppo", "ppo_sr", ppo | fixed, fixed=True),
        "lora": job("lora", "ppo_sr", ppo | fixed | {"lora_rank": 2, "gradient_checkpointing": True}, fixed=True),
        "sampled": job("sampled", "ppo_sr", ppo | sampled),
    }


COMPARED = ("sft", "am", "ppo", "lora")


@pytest.fixture(scope="module")
def plain(files, tmp_path_factory):
    """{name: metrics} and the folder of the runs of one plain process."""
    out = tmp_path_factory.mktemp("plain")
    return {name: run(**jobs(files, out)[name]) for name in COMPARED}, out


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
    environ = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "tests.deepspeed_worker", str(path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environ, **pipes)


def finished(process, seconds=300):
    output, _ = process.communicate(timeout=seconds)
    assert process.returncode == 0, output[-6000:]
    return output


def agrees(rows, expected, tolerance=1e-4):
    """Every metric of every step."""
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    for row, wanted in zip(rows, expected, strict=True):
        assert row == pytest.approx(wanted, abs=tolerance, rel=tolerance)


@pytest.fixture(scope="module")
def zero3(files, tmp_path_factory):
    out = tmp_path_factory.mktemp("zero3")
    named = jobs(files, out, config_of(3, out))
    sampled = named["sampled"]
    other = sampled | {"args": sampled["args"] | {"output_dir": str(out / "stopped")}}
    resumed = other | {"args": other["args"] | {"resume": True}}
    listed = [*(named[name] for name in COMPARED), sampled, other | {"stop": 3}, resumed]
    output = finished(launch(out, listed))
    print(output)
    return out


@pytest.mark.parametrize("name", COMPARED)
def test_zero_3_is_one_process(name, zero3, plain):
    agrees(metrics_of(zero3 / name), plain[0][name])
