"""The memory planner beside counted bytes: of models, optimisers, saved tensors, and two DeepSpeed
processes."""

import json
import re
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
import tyro
from torch.distributed._tools.mem_tracker import MemTracker
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BloomConfig,
    GPT2Config,
    LlamaConfig,
)

import am_train
import ppo_sr
import utils
from baselines import ppo_max
from tests.zero_bytes import BUCKET
from large.plan_memory import Args, Engine, Shape, filled, main, measure, plan, states, without_others
from utils import InputError, response_logprobs

WIDE = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
CONFIGS = {
    "gpt2": GPT2Config(n_embd=64, n_layer=5, n_head=4, n_positions=128, **WIDE),
    "llama": LlamaConfig(
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        **WIDE,
    ),
    "bloom": BloomConfig(hidden_size=64, n_layer=6, n_head=4, **WIDE),
}
BATCH, PROMPT, RESPONSE = 3, 20, 30


@pytest.fixture(params=CONFIGS)
def config(request, tmp_path):
    """A folder with a config.json alone, and the config."""
    CONFIGS[request.param].save_pretrained(tmp_path)
    return str(tmp_path), CONFIGS[request.param]


def a_batch():
    ids = torch.randint(3, 300, (BATCH, PROMPT + RESPONSE))
    return ids, torch.ones_like(ids, dtype=torch.bool), torch.full((BATCH,), PROMPT)


# --- states ---------------------------------------------------------------------------------------


def test_plain_states_equal_the_bytes_of_a_real_engine(config):
    path, config = config
    engine = utils.Engine(AutoModelForCausalLM.from_config(config, dtype=torch.float32), 1e-3)
    engine.backward(response_logprobs(engine, *a_batch())[0].sum())
    part = states(measure(path, "policy"), Engine(), world_size=1, bf16=False)
    parameters = list(engine.module.parameters())
    assert part["weights"] == sum(p.nbytes for p in parameters)
    assert part["gradients"] == sum(p.grad.nbytes for p in parameters)
    engine.step()
    moments = [v for state in engine.optimizer.state.values() for k, v in state.items() if k != "step"]
    assert part["optimiser"] == sum(m.nbytes for m in moments)
    score_head = AutoModelForSequenceClassification.from_config(type(config)(**config.to_dict() | {"num_labels": 1}))
    assert measure(path, "scorer").parameters == sum(p.numel() for p in score_head.parameters())


def test_states_by_hand():
    """1,000 numbers, 100 of them in a parameter that ZeRO-3 leaves whole, on four GPUs."""
    shape = Shape(sizes=(900, 100), adapter=20, vocab=1, saved=0, kept=0, layer=0, kv_cache=0)

    def of(stage, bf16=True, offload=False, **more):
        engine = Engine(stage, offload, offload and stage == 3, bucket=10, persistent=100)
        part = states(shape, engine, 4, bf16, **more)
        return [part[name] for name in ("weights", "gradients", "optimiser", "step", "host")]

    assert of(0, bf16=False) == [4000, 4000, 8000, 0, 0]
    assert of(2) == [2000, 500 + 20, 3000, 1000, 0]
    assert of(2, bf16=False) == [4000, 1000 + 40, 3000, 1000, 0]
    assert of(3) == [500 + 200, 500 + 20, 3000, 1000, 0]
    assert of(2, offload=True) == [2000, 20, 0, 0, 3000 + 1000]
    assert of(3, offload=True) == [200, 20, 0, 0, 500 + 3000 + 1000]
    assert of(3, trained=False) == [2000, 0, 0, 0, 0]  # reference and scorer
    assert of(2, trained=False, shard_frozen=True) == [500 + 200, 0, 0, 0, 0]
    assert of(2, lora_rank=5) == [
        2 * 1100,
        2 * 100 / 4 + 20,
        12 * 100 / 4,
        4 * 100 / 4,
        0,
    ]  # 5 x 20 adapter numbers


def test_states_equal_what_deepspeed_holds_on_two_processes():
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
    ]
    done = subprocess.run([*command, "-m", "tests.zero_bytes"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    for stage in (2, 3):
        counted = seen[f"zero{stage}"]
        shape = Shape((256 * 256, 256) * 8, 0, 1, 0, 0, 0, 0)
        assert shape.parameters == counted["parameters"]
        engine = Engine(stage, bucket=BUCKET, persistent=300)
        part = states(shape, engine, 2, bf16=True)
        resting = part["gradients"] if stage == 3 else 0
        assert part["weights"] + part["optimiser"] + resting == pytest.approx(counted["after_step"], rel=1e-3)
        bucket = 2 * BUCKET if stage == 2 else 0  # ZeRO-2 has given it back by then
        before = sum(part[name] for name in ("weights", "optimiser", "gradients")) - bucket
        assert before == pytest.approx(counted["before_step"], rel=1e-3)
    # DeepSpeed's own estimates for 10^9 parameters on 16 GPUs: the same for ZeRO-2; for ZeRO-3
    # theirs is 18 bytes a parameter and leaves out the 2 of the weights
    for stage, left_out in ((2, 0), (3, 2)):
        part = states(Shape((10**9,), 0, 1, 0, 0, 0, 0), Engine(stage, bucket=0), 16, bf16=True)
        ours = sum(part[name] for name in ("weights", "gradients", "optimiser", "step"))
        assert ours == seen["estimates"][f"zero{stage}"] + left_out * 10**9 / 16


# --- activations ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "autocast"), [("float32", False), ("float32", True), ("bfloat16", False)])
def test_activations_equal_what_autograd_saves(config, dtype, autocast, monkeypatch):
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", sdpa_attention_forward)  # a GPU's: plumbing/attention.py
    path, config = config
    dtype = getattr(torch, dtype)
    shape = measure(path, "policy", dtype, autocast, BATCH, PROMPT + RESPONSE)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()

    def counted():
        own, saved = {p.data_ptr() for p in (*model.parameters(), *model.buffers())}, {}

        def pack(tensor):
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = model.base_model(a_batch()[0], use_cache=False)
        assert output.last_hidden_state.requires_grad
        return sum(storage.nbytes() for address, storage in saved.items() if address not in own)

    everything = counted()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    for module in model.train().modules():
        module.p = 0.0  # dropout
    assert shape.saved == pytest.approx(everything, rel=0.02) and everything > 5 * counted()
    assert shape.kept == pytest.approx(counted(), rel=0.02)
    assert shape.layer * config.num_hidden_layers == pytest.approx(shape.saved - shape.kept, rel=1e-3)


def test_gpt_activations_are_those_of_korthikanti(tmp_path):
    """§4.1: 34 s b h bytes a layer in 16 bits, 2 of them dropout masks; here without the s^2
    scores, which sdpa drops."""
    GPT2Config(n_embd=256, n_layer=4, n_head=4, activation_function="gelu_pytorch_tanh", **WIDE).save_pretrained(
        tmp_path
    )
    shape = measure(str(tmp_path), "policy", torch.bfloat16, False, 2, 512)
    assert shape.layer == pytest.approx((34 - 2) * 512 * 2 * 256, rel=0.25)


def test_kv_cache_by_hand(config):
    path, config = config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    each = config.hidden_size // config.num_attention_heads
    shape = measure(path, "policy", torch.bfloat16, False, 4, 50)
    assert shape.kv_cache == 2 * config.num_hidden_layers * heads * each * 4 * 50 * 2  # keys and values, two bytes each


@pytest.mark.parametrize(("vocab_size", "checkpointing"), [(300, False), (20_000, True)])
def test_the_peak_of_a_real_update_is_the_planned_one(vocab_size, checkpointing, tmp_path):
    """torch's MemTracker beside the plan, all of a policy's forward and backward pass included."""
    config = LlamaConfig(hidden_size=128, intermediate_size=352, num_hidden_layers=6, num_attention_heads=4)
    config.vocab_size = vocab_size
    config.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_config(config)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    tracker = MemTracker()
    response_logprobs(model, *a_batch())[0].sum().backward()  # gradients from an earlier micro-batch
    tracker.track_external(model)
    with tracker:
        response_logprobs(model, *a_batch())[0].sum().backward()
    counted = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    args = Args(
        str(tmp_path),
        per_device_train_batch_size=BATCH,
        prompt_length=PROMPT,
        response_length=RESPONSE,
    )
    args.gradient_checkpointing = checkpointing
    policy = plan(args, Engine())[0]["policy"]
    planned = sum(policy[part] for part in ("weights", "gradients", "activations", "logits"))
    assert planned == pytest.approx(counted, rel=0.25)


# --- the plan -------------------------------------------------------------------------------------


def llama_8b(folder):
    config = {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
    }
    config |= {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8192}))
    return str(folder)


def test_eight_billion_on_eight_gpus_by_its_config_alone(tmp_path, capsys):
    path, file = llama_8b(tmp_path), tmp_path / "zero3.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3, "overlap_comm": True, "reduce_bucket_size": "auto"}}))
    assert measure(path, "policy").parameters == 8_030_261_248  # of the published model
    flags = {
        "bf16": True,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 16,
        "overhead": 0.0,
    }
    args = Args(path, world_size=8, deepspeed=str(file), gradient_checkpointing=True, **flags)
    main(args)
    assert "fits 80 GiB" in capsys.readouterr().out
    models, phases, host = plan(args, Engine.from_file(str(file)))
    assert models["reference"]["weights"] == 2 * 8_030_261_248 and host == 0
    assert models["policy"]["optimiser"] == 12 * 8_030_261_248 / 8
    held = sum(m["weights"] + m["optimiser"] + m["gradients"] for m in models.values())
    gathered = 2 * 8_030_261_248
    assert phases["sample"] > held + gathered + models["policy"]["kv_cache"]
    passes = {"policy": models["policy"]["activations"] + models["policy"]["logits"]}
    passes["critic"] = models["critic"]["activations"]  # after the policy's backward pass
    assert phases["update"] == pytest.approx(held + 2 * 10**9 + max(passes.values()))  # and layers gathered
    main(Args(path, world_size=8, deepspeed=str(file), gpu_memory=50, **flags))  # and so without checkpointing
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| --")]
    sizes = [float(row.split("|")[2]) for row in rows]
    assert (
        sizes == sorted(sizes, reverse=True)
        and sizes[0] > 50 > sizes[-1]
        and len(rows) > 1
        and rows[-1].endswith("| yes |")
    )
    assert all(row.endswith("| no |") for row in rows[:-1])


def test_am_train_plans_one_model_on_pairs(tmp_path):
    CONFIGS["gpt2"].save_pretrained(tmp_path)
    path = str(tmp_path)
    flags = {"per_device_train_batch_size": 3, "prompt_length": PROMPT, "response_length": RESPONSE}
    models, phases, _ = plan(Args(path, script="am_train", **flags), Engine())
    assert list(models) == ["scorer"] and set(phases) == {"score", "update", "step"}
    twice = measure(path, "scorer", torch.float32, False, 6, PROMPT + RESPONSE)
    assert models["scorer"]["activations"] == twice.saved


# --- defaults -------------------------------------------------------------------------------------

QWEN = {"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24}
QWEN |= {"num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151_936}
QWEN |= {"tie_word_embeddings": True, "max_position_embeddings": 32_768}


SCALING = (Path(ppo_sr.__file__).parent / "docs" / "SCALING.md").read_text(encoding="utf-8")


def readme_command(script):
    """The README's first command of this script for a real model, as its words."""
    text = (Path(ppo_sr.__file__).parent / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    return next(line.split()[1:] for line in text.splitlines() if re.match(rf"python {script}.py --", line))


@pytest.mark.parametrize(
    ("script", "more", "gpu", "largest", "of_the_toy"),
    [("am_train", "", 24, 20.1, 197), ("ppo_sr", "", 32, 28.9, 123), ("ppo_sr", "--lora_rank 16", 24, 14.7, None)],
)
def test_the_readmes_commands_fit_a_model_of_half_a_billion(script, more, gpu, largest, of_the_toy, tmp_path, capsys):
    """Qwen2.5-0.5B's shape at 1,024 tokens, by the scripts' own defaults, as docs/SCALING.md says; the
    toy's batches would not fit."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN))
    words = readme_command(script) + more.split()
    assert words[words.index("--max_length") + 1] == "1024"
    for flag in {"--model_name_or_path", "--reward_model_path"} & {*words}:
        words[words.index(flag) + 1] = str(tmp_path)
    args = tyro.cli(Args, args=without_others(words), use_underscores=True, config=(tyro.conf.FlagConversionOff,))
    assert measure(str(tmp_path), "policy").parameters == 494_032_768  # of the published model
    main(replace(args, gpu_memory=gpu))
    assert f"fits {gpu} GiB" in capsys.readouterr().out

    def planned(**sizes):
        return max(plan(replace(args, **sizes), Engine())[1].values()) / 2**30

    assert planned() == pytest.approx(largest, abs=0.1) and f"| {largest} |" in SCALING
    if of_the_toy:
        train, score = (60, 128) if script == "am_train" else (64, 256)
        toy = planned(per_device_train_batch_size=train, per_device_eval_batch_size=score)
        assert toy == pytest.approx(of_the_toy, abs=1) and toy > 3 * gpu


def test_defaults_are_the_scripts_own(monkeypatch):
    for script, module in (("am_train", am_train), ("ppo_sr", ppo_sr), ("ppo_max", ppo_max)):
        theirs = {field.name: field.default for field in fields(module.Args)}
        found, given = filled(Args("x", script=script)), Args("x", script=script)
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "max_length"):
            assert getattr(given, name) is None and getattr(found, name) == theirs[name]
        assert found.prompt_length + found.response_length == theirs["max_length"]
        update = theirs["global_batch_size"] // theirs.get("num_mini_batches", 1)
        assert update % theirs["per_device_train_batch_size"] == 0  # gradients add up to the same update


def test_a_whole_command_line_of_a_script_is_taken():
    words = "ppo_sr.py --output_dir o --eval_dataset_names a b --lora_rank 8 --kl_coef=0.1 --seed -1 --gpu_memory 24"
    assert without_others(words.split()) == ["--script", "ppo_sr", "--lora_rank", "8", "--gpu_memory", "24"]
    words = "baselines.ppo_max --ptx_dataset_name sft.jsonl --kl_estimator k2 --wrld_size 2"
    assert without_others(words.split()) == ["--script", "ppo_max", "--wrld_size", "2"]
    assert without_others(["am_train.py", "--loss", "rm"]) == ["--script", "am_train"]
    assert without_others(["--help"]) == ["--help"]


def test_lora_needs_no_reference_and_trains_the_adapters(tmp_path):
    CONFIGS["llama"].save_pretrained(tmp_path)
    models, _, _ = plan(Args(str(tmp_path), lora_rank=2, prompt_length=20, response_length=20), Engine())
    each = (96 + 96) * 2 + (96 + 32) * 2 + (96 + 256) * 3  # q, o; k, v; gate, up, down
    assert "reference" not in models and models["policy"]["gradients"] == 4 * 2 * 3 * each


def test_a_critic_on_the_backbone_is_no_model_of_its_own(tmp_path):
    CONFIGS["llama"].save_pretrained(tmp_path)
    flags = {"prompt_length": 20, "response_length": 20}
    (models, phases, _), (more, other, _) = (
        plan(Args(str(tmp_path), critic_init=init, **flags), Engine()) for init in ("backbone", "scorer")
    )
    assert more.keys() - models.keys() == {"critic"}
    # not its activations: the policy's are gone by then
    states = sum(more["critic"][part] for part in ("weights", "gradients", "optimiser"))
    assert other["update"] - phases["update"] == pytest.approx(states)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"model_name_or_path": "/nowhere"}, "/nowhere: no policy"),
        ({"world_size": 8}, "--world_size 8: needs --deepspeed"),
        ({"prompt_length": 8192}, "8256 tokens"),
        ({"response_length": -1}, "must be positive"),
        ({"max_length": 64, "response_length": 64}, "--prompt_length 0: must be positive"),
        ({"deepspeed": "zero7.json"}, "zero_optimization.stage must be"),
        ({"deepspeed": "missing"}, "--deepspeed"),
        ({"deepspeed": "zero0.json", "bf16": True}, "needs ZeRO stage 1, 2 or 3"),
        (
            {"deepspeed": "zero3.json", "critic_init": "backbone"},
            "--critic_init backbone: needs ZeRO 0 to 2 without offload",
        ),
    ],
)
def test_refusals(flags, words, tmp_path):
    path = llama_8b(tmp_path)
    for stage in (0, 3, 7):
        (tmp_path / f"zero{stage}.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    if flags.get("deepspeed", "missing") != "missing":
        flags = flags | {"deepspeed": str(tmp_path / flags["deepspeed"])}
    with pytest.raises(InputError, match=words):
        main(Args(**{"model_name_or_path": path} | flags))
