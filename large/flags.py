"""The flags that a script has for large models, and the DeepSpeed file."""

import dataclasses
import importlib.util
import json
import types
from pathlib import Path
from typing import Annotated, Union, get_args, get_origin

import torch

from utils import InputError

OWNED = {  # entries of a DeepSpeed file that flags decide
    "train_batch_size": "global_batch_size",
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "gradient_clipping": "max_grad_norm",
    "bf16.enabled": "bf16",
    "optimizer.params.lr": "learning_rate",
    "optimizer.params.weight_decay": "weight_decay",
}
CHECKPOINTED = 10**8  # a model of more weights has its layers' activations computed again
OURS = {"gradient_accumulation_steps", "scheduler", "fp16", "amp", "managed_gradient_accumulation"}


@dataclasses.dataclass(kw_only=True)
class AnyScript:
    deepspeed: str | None = None
    """a DeepSpeed file, say configs/zero2.json, under torchrun: docs/DEEPSPEED.md"""


@dataclasses.dataclass(kw_only=True)
class ScriptThatTrains:
    gradient_checkpointing: bool | None = None
    """keep one activation a layer and compute the rest again: less memory, a third more work
    (without it: for models of more than 100 million weights)"""
    lora_rank: int = 0
    """train adapters of this rank on all linear layers, with alpha = 2 x rank, merged when saved
    (0: train all weights)"""


@dataclasses.dataclass(kw_only=True)
class ScriptThatSamples:
    shard_frozen_models: bool = False
    """with --deepspeed: a share of pi_init and the scorer on each GPU instead of a copy"""
    gather_to_generate: bool = True
    """with ZeRO-3: the whole policy on each GPU while it samples; False: one layer at a time,
    slow, if it does not fit"""


def checkpoints(asked, weights):
    """Whether a model of so many weights runs under gradient checkpointing."""
    return weights > CHECKPOINTED if asked is None else asked


def with_flags(args_class):
    """A subclass of a script's flags, or a union of such for its subcommands, with those above."""
    if get_origin(args_class) in (Union, types.UnionType):
        return Union[tuple(map(with_flags, get_args(args_class)))]  # noqa: UP007
    if get_origin(args_class) is Annotated:
        kind, *notes = get_args(args_class)
        return Annotated[with_flags(kind), *notes]
    fields, flags = {field.name for field in dataclasses.fields(args_class)}, [AnyScript]
    if "bf16" not in fields or "deepspeed" in fields:  # runs no model, or has a flag of its own
        return args_class
    if "learning_rate" in fields:
        flags.insert(0, ScriptThatTrains)
    if "critic_learning_rate" in fields:
        flags.insert(0, ScriptThatSamples)
    namespace = {"__doc__": args_class.__doc__, "__module__": args_class.__module__}
    bases = (*flags, args_class)
    return dataclasses.make_dataclass(args_class.__name__, [], bases=bases, namespace=namespace)


def check(args, processes):
    """Raises InputError where packages, flags, the DeepSpeed file and the number of processes do
    not fit together. Returns the file with our entries, None without one."""
    file, cuda = getattr(args, "deepspeed", None), torch.cuda.is_available()
    if getattr(args, "bf16", False) and cuda and not torch.cuda.is_bf16_supported():
        raise InputError("--bf16 True: this GPU has no bfloat16")
    for package, flag in (("deepspeed", "deepspeed"), ("peft", "lora_rank")):
        value = getattr(args, flag, None)
        if value and importlib.util.find_spec(package) is None:
            raise InputError(f"--{flag} {value}: is not installed; pip install {package}")
    if not file and processes > 1 and hasattr(args, "deepspeed"):
        problem = f"missing, and torchrun started {processes} processes; say configs/zero2.json"
        raise InputError(f"--deepspeed: {problem}")
    config = read_config(args, processes) if file else None
    if getattr(args, "shard_frozen_models", False) and not file:
        raise InputError("--shard_frozen_models True: needs --deepspeed")
    if not getattr(args, "gather_to_generate", True) and zero_stage(config) < 3:
        raise InputError("--gather_to_generate False: needs --deepspeed with ZeRO 3")
    return config


def zero_stage(config):
    return (config or {}).get("zero_optimization", {}).get("stage", 0)


def read_config(args, processes):
    """The DeepSpeed file without its "auto" entries, with what the flags say. Raises InputError
    where it says otherwise."""
    where = f"--deepspeed {args.deepspeed}"
    without_auto = {"object_hook": lambda part: {k: v for k, v in part.items() if v != "auto"}}
    try:
        config = json.loads(Path(args.deepspeed).read_text(encoding="utf-8"), **without_auto)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{where}: cannot be read as JSON ({error})") from None
    zero = config.get("zero_optimization", {}) if isinstance(config, dict) else None
    if not isinstance(zero, dict) or zero.get("stage", 0) not in (0, 1, 2, 3):
        raise InputError(f"{where}: zero_optimization.stage must be 0, 1, 2 or 3")
    for path, flag in OWNED.items():
        value = config
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None and hasattr(args, flag) and value != getattr(args, flag):
            problem = f"{path} is {value}, --{flag} {getattr(args, flag)}; drop it from the file"
            raise InputError(f"{where}: {problem}")
    if extra := [k for k, v in config.items() if k in OURS and v != {"enabled": False}]:
        remedy = "drop it from the file (mixed precision: --bf16)"
        raise InputError(f"{where}: {extra[0]} is decided by the flags; {remedy}")
    if hasattr(args, "learning_rate"):
        check_training(args, processes, config, where)
    ours = OURS | {path.split(".")[0] for path in OWNED}
    config = {k: v for k, v in config.items() if k not in ours}
    # backward() accumulates and step() says that a batch is whole: its parts vary in number
    config |= {"train_micro_batch_size_per_gpu": 1, "managed_gradient_accumulation": False}
    config |= {"bf16": {"enabled": args.bf16}, "steps_per_print": 10**9}
    config |= {"zero_force_ds_cpu_optimizer": False}
    if hasattr(args, "max_grad_norm"):  # 0 would be no clipping, and no norm
        config["gradient_clipping"] = min(args.max_grad_norm, 1e30)
    return config


def check_training(args, processes, config, where):
    zero = config.get("zero_optimization", {})
    stage, offload = zero_stage(config), zero.get("offload_optimizer") or {}
    if args.bf16 and stage == 0:  # it drifts from float32
        raise InputError(f"{where}: --bf16 True needs ZeRO stage 1, 2 or 3")
    keeps = stage == 3 or offload.get("device", "none") != "none"
    # the first of a step's backward passes leaves weights out, and there they keep old gradients
    if keeps and getattr(args, "critic_init", "") == "backbone":
        needs = "needs ZeRO 0 to 2 without offload"
        raise InputError(f"--critic_init backbone: {needs}, which {where} is not")
    mini_batches = getattr(args, "num_mini_batches", 1)
    share = processes * args.per_device_train_batch_size * mini_batches
    if args.global_batch_size % share:
        of = f"{processes} ranks"
        of += f" x --per_device_train_batch_size {args.per_device_train_batch_size}"
        of += f" x --num_mini_batches {mini_batches}" if mini_batches > 1 else ""
        problem = f"must be a multiple of {of} = {share}; change one of them"
        raise InputError(f"--global_batch_size {args.global_batch_size}: {problem}")
