"""One process or many: ranks, the plain engine, DeepSpeed's behind the same calls, LoRA (commands: docs/DEEPSPEED.md).

Every rank holds all prompts, responses and numbers of a batch, which are small, and does its share of the forward and
backward passes, which are not: dealt() hands batches out; merged(), total() and largest() bring the results back to every
rank. So whitening, moving averages, means and shuffles are the lines of one process, on the same numbers.
"""

import contextlib
import datetime
import functools
import importlib.util
import json
import logging
import math
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._pytree import tree_map_only

PATIENCE = datetime.timedelta(minutes=30)  # for a rank that is busy: one alone calls a judge, or writes the weights
OWNED = {  # entries of a DeepSpeed file that flags decide
    ("train_batch_size",): "global_batch_size",
    ("train_micro_batch_size_per_gpu",): "per_device_train_batch_size",
    ("gradient_clipping",): "max_grad_norm",
    ("bf16", "enabled"): "bf16",
    ("optimizer", "params", "lr"): "learning_rate",
    ("optimizer", "params", "weight_decay"): "weight_decay",
}
OURS = {"gradient_accumulation_steps", "scheduler", "fp16", "amp", "managed_gradient_accumulation"}
config = None  # the DeepSpeed file with our entries, once join_ranks() has read it


class InputError(Exception):
    """A mistake of the user's: run_cli prints it as one line and exits with code 2."""


@dataclass(kw_only=True)
class DeepSpeedArgs:
    """What every script that runs a model has for a large one."""

    deepspeed: str | None = None
    """a DeepSpeed file, say configs/zero2.json, under torchrun: docs/DEEPSPEED.md"""


@dataclass(kw_only=True)
class EngineArgs(DeepSpeedArgs):
    """And those that train one: sft.py, am_train.py, ppo_sr.py and ppo_max.py."""

    gradient_checkpointing: bool = False
    """keep one activation a layer and compute the rest again: less memory, a third more work"""
    lora_rank: int = 0
    """train adapters of this rank on all linear layers, with alpha = 2 x rank, merged when saved (0: train all weights)"""


def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# --- set up -------------------------------------------------------------------------------------------------------------


def join_ranks(args):
    """Join the ranks that torchrun started, or with --deepspeed and without torchrun be the only one.

    Raises InputError where packages, flags, the DeepSpeed file and the number of ranks do not fit together.
    """
    global config
    file, ranks = getattr(args, "deepspeed", None), int(os.environ.get("WORLD_SIZE", 1))
    if getattr(args, "bf16", False) and torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
        raise InputError("--bf16 True: this GPU has no bfloat16")
    for package, flag in (("deepspeed", file), ("peft", getattr(args, "lora_rank", 0))):
        if flag and importlib.util.find_spec(package) is None:
            name = "--deepspeed" if flag == file else "--lora_rank"
            raise InputError(f"{name} {flag}: is not installed; pip install {package}")
    if file:
        config = read_config(args, ranks)
    elif hasattr(args, "deepspeed") and ranks > 1:
        raise InputError(f"--deepspeed: missing, and torchrun started {ranks} processes; say configs/zero2.json")
    if getattr(args, "shard_frozen_models", False) and not file:
        raise InputError("--shard_frozen_models True: needs --deepspeed")
    if not getattr(args, "gather_to_generate", True) and (not file or stage() < 3):
        raise InputError("--gather_to_generate False: needs --deepspeed with ZeRO 3")
    if ranks == 1 and not file:
        return
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost"}.items():
        os.environ.setdefault(name, str(value))
    warnings.filterwarnings("ignore", category=FutureWarning)  # DeepSpeed calls what torch is about to rename
    rendezvous = {}
    if "MASTER_PORT" not in os.environ:  # alone
        os.environ["MASTER_PORT"] = "0"
        rendezvous = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE, **rendezvous
    )
    if rank():
        sys.stdout = open(os.devnull, "w")


def read_config(args, ranks):
    """The DeepSpeed file, "auto" entries left out, with what the flags say. Raises InputError where it says otherwise."""
    where = f"--deepspeed {args.deepspeed}"
    try:
        config = json.loads(Path(args.deepspeed).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{where}: cannot be read as JSON ({error})") from None
    for path, flag in OWNED.items():
        value = config
        for key in path:
            value = value.get(key, "auto") if isinstance(value, dict) else "auto"
        if value != "auto" and hasattr(args, flag) and value != getattr(args, flag):
            raise InputError(
                f"{where}: {'.'.join(path)} is {value}, --{flag} {getattr(args, flag)}; drop it from the file"
            )
    if extra := sorted(OURS & config.keys() - {k for k, v in config.items() if v in ("auto", {"enabled": False})}):
        raise InputError(
            f"{where}: {extra[0]} is decided by the flags; drop it from the file (mixed precision: --bf16)"
        )
    trains, zero = isinstance(args, EngineArgs), config.get("zero_optimization", {})
    if trains and args.bf16 and zero.get("stage", 0) == 0:  # it drifts from float32
        raise InputError(f"{where}: --bf16 True needs ZeRO stage 1, 2 or 3")
    offload = (zero.get("offload_optimizer") or {}).get("device", "none") != "none"
    if getattr(args, "critic_init", "") == "backbone" and (zero.get("stage", 0) == 3 or offload):
        # a weight that the first of a step's backward passes leaves out keeps the last step's gradient there
        raise InputError(f"--critic_init backbone: needs ZeRO 0 to 2 without offload, which {where} is not")
    if trains:
        mini_batches = getattr(args, "num_mini_batches", 1)
        share = ranks * args.per_device_train_batch_size * mini_batches
        what = f"{ranks} ranks x --per_device_train_batch_size {args.per_device_train_batch_size}"
        what += f" x --num_mini_batches {mini_batches}" if mini_batches > 1 else ""
        if args.global_batch_size % share:
            raise InputError(
                f"--global_batch_size {args.global_batch_size}: must be a multiple of {what} = {share}; change one of them"
            )

    def without_auto(entries):
        return {k: without_auto(v) if isinstance(v, dict) else v for k, v in entries.items() if v != "auto"}

    config = {k: v for k, v in without_auto(config).items() if k not in OURS | {path[0] for path in OWNED}}
    # backward() accumulates and step() decides that a batch is whole: the scripts' micro-batches vary in number
    config |= {"train_micro_batch_size_per_gpu": 1, "managed_gradient_accumulation": False}
    config |= {"bf16": {"enabled": args.bf16}, "steps_per_print": 10**9, "zero_force_ds_cpu_optimizer": False}
    # 0 would be no clipping, and no norm
    return config | {"gradient_clipping": min(args.max_grad_norm, 1e30)} if trains else config


def finish(code=0):
    """End the process. Under DeepSpeed the interpreter's own shutdown aborts now and then, after all is written."""
    if dist.is_initialized() or import_deepspeed.done:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code) if code else None


# --- ranks --------------------------------------------------------------------------------------------------------------


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def wait():
    """For all ranks."""
    total(0)


def dealt(batches):
    """[(batch, weight)] of this rank: all of them, weight 1, in one process.

    `batches` must be the same on all ranks. Each gets as many, so that the collectives within passes meet; one that lacks
    a batch repeats the first at weight 0. Batches sorted by length take equally long on all ranks.
    """
    mine = [(batch, 1.0) for batch in batches[rank() :: world()]]
    return mine + [(batch, 0.0) for batch in batches[:1]] * (-(-len(batches) // world()) - len(mine))


def everywhere(value):
    """[value of rank 0, value of rank 1, ...], for any picklable value without tensors on a GPU."""
    values = [value] * world()
    if world() > 1:
        dist.all_gather_object(values, value)
    return values


def merged(results):
    """A list with None where another rank has the result -> the whole list, on every rank."""
    if world() == 1:
        return results
    # cloned: a row of a batch would travel with the batch
    parts = everywhere(tree_map_only(torch.Tensor, lambda t: t.cpu().clone(), results))
    whole = [next((x for x in of_ranks if x is not None), None) for of_ranks in zip(*parts, strict=True)]
    return tree_map_only(torch.Tensor, lambda t: t.to(device()), whole)


def _reduced(values, op):
    if world() == 1:
        return values
    tensor = torch.as_tensor(values, dtype=torch.float64).detach().cpu().clone()
    dist.all_reduce(tensor, op)
    return tensor.to(values) if isinstance(values, torch.Tensor) else type(values)(tensor.item())


def total(values):
    """Sum over the ranks, on every rank, of a number or a tensor of any shape."""
    return _reduced(values, dist.ReduceOp.SUM)


def largest(values):
    return _reduced(values, dist.ReduceOp.MAX)


def leave_to_rank_0():
    """What follows is one process's work: rank 0 goes on as if alone, the others end. Sharded models end with them."""
    global config
    config = None
    if world() > 1:
        first = rank() == 0
        wait()
        dist.destroy_process_group()
        if not first:
            os._exit(0)


def forked_rng():
    """A context whose random numbers are not taken from those outside."""
    return torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else [])


@contextlib.contextmanager
def seeded(seed):
    """Random numbers from `seed` on, and none taken from those outside."""
    with forked_rng():
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def own_rng():
    """Random numbers of this rank's own; all ranks go on with the same ones."""
    if world() == 1:
        yield
    else:
        with seeded(int(torch.randint(2**40, ())) + rank()):
            yield


# --- engines ------------------------------------------------------------------------------------------------------------


def within_forward(function):
    """function(model, ...), which also takes an engine in the model's place: it then runs within the engine's one forward,
    around which ZeRO-3 gathers and releases the weights of the model's parts."""

    @functools.wraps(function)
    def call(model, *args, **kwargs):
        run = functools.partial(model.run, function) if hasattr(model, "run") else functools.partial(function, model)
        return run(*args, **kwargs)

    return call


class Engine:
    """A model and its optimiser behind the calls that a training loop needs; DeepSpeedEngine has the same ones."""

    def __init__(self, module, learning_rate, schedule=lambda step: 1.0, weight_decay=0.0, max_grad_norm=1.0):
        self.module, self.max_grad_norm = module, max_grad_norm
        rates = {}
        for p in module.parameters():
            if p.requires_grad:
                rates.setdefault(getattr(p, "learning_rate", learning_rate), []).append(p)
        groups = [{"params": parameters, "lr": rate} for rate, parameters in rates.items()]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=weight_decay, betas=(0.9, 0.95), fused=True)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, schedule)
        self.checkpointed = [m for m in module.modules() if getattr(m, "gradient_checkpointing", False)]
        for layer in self.checkpointed:
            layer._gradient_checkpointing_func = self._in_its_mode(layer, layer._gradient_checkpointing_func)

    def _in_its_mode(self, layer, checkpoint):
        """run() has a layer say that it trains; within, OPT's and others would turn on dropout by that."""

        def forward_in_mode(forward, *args):
            layer.training = self.module.training
            try:
                return forward(*args)
            finally:
                layer.training = True

        return lambda forward, *args: checkpoint(functools.partial(forward_in_mode, forward), *args)

    def run(self, function, *args, **kwargs):
        """function(module, ...), with whatever the module calls."""
        for layer in self.checkpointed:  # they keep all activations in eval mode, which PPO needs to be without dropout
            layer.training = torch.is_grad_enabled()
        return self._run(function, *args, **kwargs)

    def _run(self, function, *args, **kwargs):
        return function(self.module, *args, **kwargs)

    def __call__(self, *args, **kwargs):
        return self.run(_call, *args, **kwargs)

    def generating(self):
        """A context with the module's generate()."""
        return contextlib.nullcontext(self.module.generate)

    def state(self, folder):
        """What load_state takes, for a checkpoint; DeepSpeed's shards go to `folder`."""
        parts = {"module": self.module, "optimizer": self.optimizer, "scheduler": self.scheduler}
        return {name: part.state_dict() for name, part in parts.items()}

    def load_state(self, state):
        for name, part in state.items():
            getattr(self, name).load_state_dict(part)

    def backward(self, loss):
        loss.backward()

    def step(self):
        """One optimiser step on the accumulated gradients, unless they are not finite; returns their global norm
        before clipping."""
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), self.max_grad_norm).item()
        if math.isfinite(norm):
            self.optimizer.step()
            self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm


def _call(module, *args, **kwargs):
    return module(*args, **kwargs)


def _generate(module, **kwargs):
    return module.generate(**kwargs)


def generating(model):
    """A context with the generate() of a model or engine. Under ZeRO-3 the weights are whole in it, or else each layer is
    gathered for each token; then all ranks sample until the last has finished, and must call it equally often."""
    return model.generating() if hasattr(model, "generating") else contextlib.nullcontext(model.generate)


class OneForward(nn.Module):
    """DeepSpeed's hooks stand around one forward; ours are several functions of one module."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, function, *args, **kwargs):
        return function(self.module, *args, **kwargs)


def import_deepspeed():
    """Quiet, and without the kernel that it would build on a CPU for a minute."""
    os.environ.setdefault("DS_ACCELERATOR", device().type)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if isinstance(ops := getattr(deepspeed.ops, "__compatible_ops__", None), dict):  # a private name
        ops["deepspeed_shm_comm"] = False
    import_deepspeed.done = True
    return deepspeed


import_deepspeed.done = False


def initialize(module, config, **parts):
    with float32_buffers(module):
        for p in module.parameters():  # beside weights that came in shards DeepSpeed casts none
            p.data = p.data.to(torch.bfloat16 if config["bf16"]["enabled"] else torch.float32)
        return import_deepspeed().initialize(model=OneForward(module), config=config, **parts)[0]


class Zero3:
    """What transformers asks of a DeepSpeed file to partition weights while it reads them."""

    def __init__(self):
        self.config = zero3()

    def is_zero3(self):
        return True


@contextlib.contextmanager
def loading(sharded=None):
    """In it transformers loads a model as the engines take it; yields the dtype and where to put it then.

    sharded: each rank reads a share of each weight, and none ever holds the model; None: if --deepspeed says ZeRO-3.
    """
    if config is None:
        yield torch.float32, device()
        return
    dtype = torch.bfloat16 if config["bf16"]["enabled"] else torch.float32
    if not (stage() == 3 if sharded is None else sharded):
        yield dtype, torch.device("cpu")  # DeepSpeed takes it from there
        return
    import_deepspeed()
    from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

    set_hf_deepspeed_config(kept_alive := Zero3())
    try:
        yield dtype, device()
    finally:
        unset_hf_deepspeed_config()
        del kept_alive


def zero3():
    """The DeepSpeed file's entries for a model in shards."""
    zero = {k: v for k, v in config.get("zero_optimization", {}).items() if k != "offload_optimizer"}
    return config | {"zero_optimization": zero | {"stage": 3}}


def stage():
    return config.get("zero_optimization", {}).get("stage", 0)


@contextlib.contextmanager
def float32_buffers(module):
    """A cast of the module to bfloat16 inside leaves its buffers: rotary frequencies in bfloat16 are other positions."""
    kept = {name: b.clone() for name, b in module.named_buffers()}
    yield
    for name, b in module.named_buffers():
        b.data = kept[name].to(b.device)


class FrozenEngine:
    """A model that is only read, a shard on each rank (ZeRO-3 without an optimiser)."""

    def __init__(self, module):
        self.module, self.engine = module, initialize(module, zero3())

    def __getattr__(self, name):
        return getattr(self.module, name)

    def run(self, function, *args, **kwargs):
        return self.engine(function, *args, **kwargs)

    def generating(self):
        return contextlib.nullcontext(functools.partial(self.run, _generate, synced_gpus=True))


class DeepSpeedEngine(Engine):
    def __init__(self, module, *options, gather_to_generate=True, **more):
        super().__init__(module, *options, **more)
        parts = {"optimizer": self.optimizer, "lr_scheduler": self.scheduler}
        self.gather_to_generate = gather_to_generate
        self.engine, self.norm = initialize(module, config, **parts), None
        self.engine.clip_fp32_gradients = self._clip  # ZeRO 0 in float32 clips by a function that forgets the norm

    def _clip(self):
        self.norm = nn.utils.clip_grad_norm_(self.module.parameters(), self.engine.gradient_clipping())

    def _run(self, function, *args, **kwargs):
        return self.engine(function, *args, **kwargs)

    @contextlib.contextmanager
    def generating(self):
        if stage() == 3 and self.gather_to_generate:
            from deepspeed.runtime.zero import unwrap_model_for_generation

            with unwrap_model_for_generation(self.engine):
                yield self.module.generate
        else:
            yield functools.partial(self.run, _generate, synced_gpus=stage() == 3)

    def state(self, folder):
        self.engine.save_checkpoint(str(Path(folder).parent), tag=Path(folder).name, save_latest=False)
        return str(folder)

    def load_state(self, folder):
        if self.engine.load_checkpoint(str(Path(folder).parent), tag=Path(folder).name)[0] is None:
            raise InputError(f"--resume: {folder} is missing")

    def backward(self, loss):
        self.engine.backward(loss * world())  # DeepSpeed takes the mean over ranks, and a batch's loss is a sum

    def step(self):
        self.engine.step()
        norm = self.engine.get_global_grad_norm() if self.norm is None else self.norm
        return math.nan if norm is None else float(norm)


class OnBackbone(Engine):
    """A head on the backbone of another engine's model: gradients add up there, and its step is that engine's.

    A call keeps no graph, backward() makes it: an engine of DeepSpeed takes one at a time, and memory holds no second one.
    """

    def __init__(self, engine, module):
        self.engine, self.module = engine, module

    def run(self, function, *args, **kwargs):
        return self.engine.run(lambda _: function(self.module, *args, **kwargs))

    def __call__(self, *batch):
        with torch.no_grad():
            self.output = super().__call__(*batch)
        self.batch, self.autocast = batch, torch.is_autocast_enabled(device().type)
        return self.output.requires_grad_(torch.is_grad_enabled())

    def backward(self, loss):
        loss.backward()  # down to the output
        with torch.autocast(device().type, dtype=torch.bfloat16, enabled=self.autocast):
            again = self.run(_call, *self.batch)
        self.engine.backward((again * self.output.grad).sum())

    def step(self):
        return 0.0

    def state(self, folder):
        return {}


def make_engine(args, module, learning_rate, *options, **more):
    """The engine that the flags ask for, around a policy, scorer or critic; adapters and checkpointing in place."""
    model = module if hasattr(module, "config") else getattr(module, "model", module)  # within a Scorer or a Critic
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if args.lora_rank:
        with seeded(args.seed):
            add_adapters(module, model, args.lora_rank)
    if config is None:
        return Engine(module, learning_rate, *options, **more)
    gather = getattr(args, "gather_to_generate", True)
    return DeepSpeedEngine(module, learning_rate, *options, gather_to_generate=gather, **more)


def frozen(args, load, *where):
    """load(*where): a model that is only read, ready to run. Under --deepspeed it is in bfloat16 if training is; and a
    share on each rank if --shard_frozen_models asks for it, in a script without that flag under ZeRO-3."""
    sharded = config is not None and getattr(args, "shard_frozen_models", stage() == 3)
    model = load(*where, sharded=sharded).eval()
    if config is None:
        return model
    if sharded:
        return FrozenEngine(model.requires_grad_(False))
    with float32_buffers(model):
        return model.requires_grad_(False).to(device(), torch.bfloat16 if args.bf16 else torch.float32)


# --- adapters and weights -----------------------------------------------------------------------------------------------


def add_adapters(module, model, lora_rank):
    """Freeze `module` but for its heads, and give every linear layer of `model` an adapter W + 2 B A (Hu et al. 2021)."""
    from peft import LoraConfig, inject_adapter_in_model

    heads = r".*\b(score|classifier)\b.*"
    lora = LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank, target_modules="all-linear", exclude_modules=heads)
    with warnings.catch_warnings(action="ignore"):
        inject_adapter_in_model(lora, model)
    for name, child in [*model.named_children(), *module.named_children()]:
        if name in ("score", "classifier", "e_head"):
            child.requires_grad_(True)


def adapted(module):
    """The layers that have an adapter."""
    return [m for m in module.modules() if hasattr(m, "get_delta_weight")]


class AdaptersOff:
    """The engine's model as it was before training: the reference that costs no memory."""

    def __init__(self, engine):
        self.engine, self.module = engine, engine.module
        self.layers = adapted(self.module)

    def run(self, function, *args, **kwargs):
        for layer in self.layers:
            layer.enable_adapters(False)
        try:
            return self.engine.run(function, *args, **kwargs)
        finally:
            for layer in self.layers:
                layer.enable_adapters(True)


def whole_weights(module):
    """The module's state dict on rank 0's CPU (empty on others), adapters merged, ZeRO-3's shards gathered one by one."""
    state, seen, layers = {}, {}, dict(module.named_modules())
    for name, value in module.state_dict(keep_vars=True).items():
        owner = layers[name.rsplit(".base_layer.", 1)[0]] if ".base_layer." in name else None
        if ".lora_" in name:
            continue
        parameters = [value] if owner is None else [*owner.parameters()]
        with gathered_parameters(parameters), torch.no_grad():
            if rank() == 0 and id(value) not in seen:  # tied weights are one tensor, and stay so
                delta = owner.get_delta_weight("default") if name.endswith(".base_layer.weight") else 0
                seen[id(value)] = (value.detach() + delta).cpu() if owner is not None else value.detach().cpu().clone()
            if rank() == 0:
                state[name.replace(".base_layer.", ".")] = seen[id(value)]
    return state


def gathered_parameters(parameters, modifier_rank=None):
    """A context with these weights whole; what rank `modifier_rank` writes to them in it stays."""
    sharded = [p for p in parameters if hasattr(p, "ds_id")]
    if not sharded:
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(sharded, modifier_rank=modifier_rank)


def save_model(engine, folder, tokenizer):
    """Weights and tokenizer as Hugging Face saves them, whole and with adapters merged, for every other tool."""
    module = engine.module
    state = module.state_dict() if config is None and not adapted(module) else whole_weights(module)
    if rank() == 0:
        if hasattr(module, "e_head"):  # a Scorer
            module.save_pretrained(folder, tokenizer, state)
        else:  # a policy; a critic's head on its backbone is none of it
            module.save_pretrained(folder, state_dict={k: v for k, v in state.items() if not k.startswith("score.")})
            tokenizer.save_pretrained(folder)
    wait()
