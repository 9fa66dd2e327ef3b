"""What each GPU must hold for ppo_sr.py or am_train.py, by config.json alone: nothing is loaded.

    python -m large.plan_memory ppo_sr.py --model_name_or_path meta-llama/Llama-3.1-8B \\
        --deepspeed configs/zero3.json --bf16 True --per_device_train_batch_size 4 \\
        --response_length 512 --max_length 1536 --world_size 8

It takes a whole command line of ppo_sr.py or am_train.py, with flags of its own behind it, and
prints GiB a GPU: each model by part, each phase of a step, and, where the largest phase does not
fit, what to change first. A folder with nothing but a config.json will do. Flags that do not decide
memory are left out. Flags that are not given have the script's own defaults.

    states       counted: the model's own parameters, built without memory (torch's FakeTensorMode),
                 times the bytes that AdamW and ZeRO hold for each (Rajbhandari et al. 2020, "ZeRO",
                 §3 and §5)
    activations  counted: what autograd saves in a forward pass of that model or, with gradient
                 checkpointing, the inputs of its layers and one layer in full (Chen et al. 2016).
                 For a GPT that is the formula of Korthikanti et al. 2022, §4.1
    logits       LOGITS_AT_ONCE of utils.py, or the batch's where they are fewer, times what a loss
                 holds of each
    KV cache     counted: the cache that the model itself returns

Not counted, but reserved as --overhead: the CUDA context, NCCL, and the allocator's fragmentation.
No GPU has checked it.
"""

import functools
import importlib
import json
import sys
import warnings
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Literal

import torch

from large.flags import checkpoints, with_flags
from plumbing.errors import first_line
from utils import LOGITS_AT_ONCE, InputError, run_cli

GIB = 2**30
SCRIPTS = {"ppo_sr": "ppo_sr", "am_train": "am_train", "ppo_max": "baselines.ppo_max"}
UPDATE_LOGIT = 12  # bytes of a logit in float32, its log-softmax, and a gradient
SCORE_LOGIT = 16  # and those of its entropy
SUB_GROUP = 10**9  # ZeRO-3 steps over so many parameters at a time (its sub_group_size)


@dataclass
class Args:
    model_name_or_path: str
    """the policy's folder or hub id; its config.json is all that is read"""
    reward_model_path: str | None = None
    """the scorer's, from which the critic starts; without it of the policy's shape"""
    script: Literal["ppo_sr", "am_train", "ppo_max"] = "ppo_sr"
    """whose models: policy, critic, reference and scorer, or one scorer that learns from pairs; the
    first word may say it, as `am_train.py`"""
    world_size: int = 1
    """GPUs in all"""
    gpus_per_node: int = 8
    """GPUs that share a host's memory, which offloading needs"""
    gpu_memory: float = 80.0
    """GiB of one GPU"""
    overhead: float = 6.0
    """GiB of it for the CUDA context, NCCL and fragmentation (a guess: no GPU has checked it)"""
    deepspeed: str | None = None
    """the DeepSpeed file of the run; without it the plain path of one GPU"""
    bf16: bool = False
    """DeepSpeed: bfloat16 weights, float32 masters; plain: bfloat16 products, float32 weights"""
    gradient_checkpointing: bool | None = None
    """keep the inputs of the layers alone and compute the rest again in the backward pass (without
    it: as the run does, with --deepspeed or --lora_rank by the model's size)"""
    lora_rank: int = 0
    """rank of adapters on every linear layer; the policy without them is the reference (0: none)"""
    critic_init: Literal["scorer", "policy", "backbone"] = "scorer"
    """baselines/ppo_max.py: `backbone` is a head on the policy's, so no critic beside it; `policy`
    also where ppo_sr.py cannot start it from the scorer (another tokenizer, a function)"""
    shard_frozen_models: bool = False
    """reference and scorer partitioned over the GPUs, as ZeRO-3 does, instead of whole on each"""
    gather_to_generate: bool = True
    """ZeRO-3: the policy is whole on every GPU while it samples; False: layers one at a time"""
    per_device_train_batch_size: int | None = None
    """sequences (am_train: pairs) per training forward pass; this and what follows: the script's"""
    per_device_eval_batch_size: int | None = None
    """sequences per forward pass in sampling and scoring"""
    max_length: int | None = None
    """tokens of the longest text"""
    response_length: int | None = None
    """tokens of the longest response"""
    prompt_length: int | None = None
    """tokens of the longest prompt (without it: what --max_length leaves)"""


@dataclass(frozen=True)
class Engine:
    """What a DeepSpeed file says of memory, with its defaults. `stage` None: the plain path."""

    stage: int | None = None
    offload_optimizer: bool = False
    offload_weights: bool = False
    bucket: int = 5 * 10**8  # gradients on their way between GPUs
    max_live: int = 10**9  # ZeRO-3: parameters that are whole at a time
    persistent: int = 10**5  # ZeRO-3: a parameter of at most so many numbers stays whole

    @classmethod
    def from_file(cls, path):
        """Raises InputError where the file is no DeepSpeed file."""
        if not path:
            return cls()
        try:
            zero = json.loads(Path(path).read_text(encoding="utf-8")).get("zero_optimization", {})
            stage = zero.get("stage", 0)
        except (OSError, ValueError, AttributeError) as error:
            raise InputError(f"--deepspeed {path}: no DeepSpeed file ({error})") from None
        if stage not in (0, 1, 2, 3):
            raise InputError(f"--deepspeed {path}: zero_optimization.stage must be 0, 1, 2 or 3")

        def number(name, default):  # "auto" stands for a default
            return int(zero[name]) if isinstance(zero.get(name), (int, float)) else default

        def on_host(name):
            return (zero.get(name) or {}).get("device", "none") != "none"

        return cls(
            stage=stage,
            offload_optimizer=on_host("offload_optimizer"),
            offload_weights=on_host("offload_param"),
            bucket=number("reduce_bucket_size", cls.bucket) * (1 + bool(zero.get("overlap_comm"))),
            max_live=number("stage3_max_live_parameters", cls.max_live),
            persistent=number("stage3_param_persistence_threshold", cls.persistent),
        )


# --- the run's own flags --------------------------------------------------------------------------


def filled(args):
    """The flags that were not given are those of the script."""
    of_script = importlib.import_module(SCRIPTS[args.script]).Args
    defaults = {f.name: f.default for f in fields(of_script) if f.default is not MISSING}
    missing = [name for name, value in vars(args).items() if value is None]
    args = replace(args, **{name: defaults[name] for name in missing if name in defaults})
    response = args.response_length or 64  # am_train.py has none: a part of the text
    if args.prompt_length is None:
        return replace(args, response_length=response, prompt_length=args.max_length - response)
    return replace(args, response_length=response)


def without_others(words):
    """A command line without the flags of the scripts that do not decide memory, and with the
    script's name as --script."""
    script, others = [], set()
    if words and not words[0].startswith("-"):
        name = Path(words[0].removesuffix(".py")).name.split(".")[-1]
        script, words = ["--script", name], words[1:]
    for name in SCRIPTS.values():
        others |= {field.name for field in fields(with_flags(importlib.import_module(name).Args))}
    others -= {field.name for field in fields(Args)}
    kept, keeps = [], True
    for word in words:
        if word.startswith("--"):
            keeps = word[2:].split("=")[0].replace("-", "_") not in others
        kept += [word] * keeps
    return script + kept


# --- counting: one model --------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """Of one model and a batch in it."""

    sizes: tuple  # numbers of every parameter, shared ones once
    adapter: int  # numbers of adapters of rank 1: inputs + outputs of the linear layers
    vocab: int
    saved: int  # bytes: by autograd in a forward pass
    kept: int  # of these with gradient checkpointing
    layer: int  # and by one layer
    kv_cache: int

    @property
    def parameters(self):
        return sum(self.sizes)


def build(path, kind, dtype, layers=None):
    """A policy or scorer by its config alone, with so many `layers`."""
    from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def without_mask(module, query, key, value, mask, **kwargs):
        """As in the scripts. transformers would make a mask: fake tensors look like tracing."""
        return sdpa_attention_forward(module, query, key, value, None, **kwargs)

    AttentionInterface.register("without_mask", without_mask)
    AttentionMaskInterface.register("without_mask", lambda *args, **kwargs: None)
    family = AutoModelForCausalLM if kind == "policy" else AutoModelForSequenceClassification
    try:
        config = AutoConfig.from_pretrained(path)
        if kind == "scorer":
            config.num_labels = 1
        if layers:
            config.num_hidden_layers = layers
            if getattr(config, "layer_types", None):
                config.layer_types = config.layer_types[:layers]
        try:
            options = {"dtype": dtype, "attn_implementation": "without_mask"}
            return family.from_config(config, **options).eval()
        except ValueError:  # a model that has its own attention alone
            return family.from_config(config, dtype=dtype).eval()
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: no {kind} by its config ({first_line(error)})") from None


def saved_bytes(model, ids, autocast):
    """Bytes that autograd keeps of model.base_model(ids), parameters left out."""
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    storages = {}  # kept alive, so that no address is used twice

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            storages[storage._cdata] = storage
        return tensor

    options = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        kept_alive = model.base_model(ids, **options)
    del kept_alive
    return sum(storage.nbytes() for storage in storages.values())


def batch_bytes(path, kind, dtype, autocast, batch, seq_len, layers):
    """Bytes of a batch: saved, saved with gradient checkpointing, KV cache."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), warnings.catch_warnings(action="ignore"):
        model, kv_cache = build(path, kind, dtype, layers), 0
        ids = torch.zeros(batch, seq_len, dtype=torch.long)
        saved = saved_bytes(model, ids, autocast)
        if kind == "policy":
            with torch.no_grad():
                cache = model.base_model(ids, use_cache=True).past_key_values.layers
            kv_cache = sum(part.nbytes for layer in cache for part in (layer.keys, layer.values))
        # reentrant: what is kept passes through the hooks; in train mode: or everything is kept
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        for module in model.train().modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        return saved, saved_bytes(model, ids, autocast), kv_cache


@functools.cache
def measure(path, kind, dtype=torch.float32, autocast=False, batch=1, seq_len=8):
    """The Shape of a model and of a batch (batch, seq_len) in it. Its layers are alike, so two and
    four of them give the bytes of any number."""
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        model = build(path, kind, dtype)
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None) or seq_len
    if seq_len > positions:
        problem = f"{seq_len} tokens; {path} has {positions} positions"
        raise InputError(f"--prompt_length, --response_length: {problem}")
    heads = [getattr(model, name, None) for name in ("score", "classifier")]
    heads.append(model.get_output_embeddings())
    linear = (m for m in model.modules() if isinstance(m, (torch.nn.Linear, Conv1D)))
    of_two, of_four = (
        batch_bytes(path, kind, dtype, autocast, batch, seq_len, layers) for layers in (2, 4)
    )
    layers = config.num_hidden_layers
    saved, kept, kv_cache = (
        two + (four - two) * (layers - 2) // 2 for two, four in zip(of_two, of_four, strict=True)
    )
    return Shape(
        sizes=tuple(p.numel() for p in model.parameters()),
        adapter=sum(sum(m.weight.shape) for m in linear if all(m is not h for h in heads)),
        vocab=config.vocab_size,
        saved=saved,
        kept=kept,
        layer=(saved - kept) // layers,
        kv_cache=kv_cache,
    )


# --- arithmetic: bytes a GPU ----------------------------------------------------------------------


def states(shape, engine, world_size, bf16, lora_rank=0, trained=True, shard_frozen=False):
    """Bytes of one model on one GPU: weights, gradients, optimiser, and for a moment `step`; `host`
    is off it.

    A parameter costs, plain and in float32, 4 for itself, 4 for its gradient and 8 for AdamW's
    moments. DeepSpeed in bfloat16: 2, 2 and 12 (a float32 master beside the moments), and 4 while
    it steps, for the gradient in float32. ZeRO divides by the GPUs: the optimiser from stage 1,
    gradients from 2, weights from 3 (small ones stay whole as well).
    """
    stage, numbers, learned = engine.stage or 0, shape.parameters, 0
    if trained:
        learned = shape.adapter * lora_rank if lora_rank else numbers
        numbers += shape.adapter * lora_rank
    if engine.stage is None:
        plain = {"weights": 4 * numbers, "gradients": 4 * learned, "optimiser": 8 * learned}
        return plain | {"step": 0, "host": 0}

    def share(from_stage):
        return learned / (world_size if stage >= from_stage else 1)

    width, masters = (2 if bf16 else 4), (4 if bf16 or stage else 0)
    part = dict.fromkeys(("gradients", "optimiser", "step", "host"), 0.0)
    part["weights"] = width * numbers
    if stage == 3 if trained else shard_frozen:
        shard = width * numbers / world_size
        part["weights"] = width * sum(n for n in shape.sizes if n <= engine.persistent)
        part["host" if engine.offload_weights else "weights"] += shard
    if learned:
        in_flight = width * engine.bucket if stage else 0
        part["gradients"] = width * share(2) + in_flight
        part["optimiser"] = (masters + 8) * share(1)
        part["step"] = masters * min(share(1), SUB_GROUP if stage == 3 else learned)
        if engine.offload_optimizer:
            part["host"] += part["optimiser"] + 4 * share(1)
            part["gradients"] = in_flight if stage > 1 else part["gradients"]
            part["optimiser"] = part["step"] = 0.0
    return part


def models_of(args):
    """{model: (path, kind, whether it learns)} of the run."""
    policy, scorer = args.model_name_or_path, args.reward_model_path or args.model_name_or_path
    if args.script == "am_train":
        return {"scorer": (policy, "scorer", True)}
    models = {"policy": (policy, "policy", True)}
    if args.critic_init != "backbone":  # on it, whose graphs live one after the other
        models["critic"] = policy if args.critic_init == "policy" else scorer, "scorer", True
    if not args.lora_rank:  # the policy without its adapters
        models["reference"] = policy, "policy", False
    return models | {"scorer": (scorer, "scorer", False)}


def checkpointed(args, engine, weights):
    """As the run does it: of the plain path no flag of large/ is there to ask."""
    if args.gradient_checkpointing is None and engine.stage is None and not args.lora_rank:
        return False
    return checkpoints(args.gradient_checkpointing, weights)


def plan(args, engine):
    """{model: {part: bytes}} and {phase: bytes} of one GPU, and the bytes of a host that ZeRO keeps
    off the GPUs."""
    args = filled(args)
    seq_len, ppo = args.prompt_length + args.response_length, args.script != "am_train"
    half = args.bf16 and engine.stage is not None
    width, dtype = (2, torch.bfloat16) if half else (4, torch.float32)
    eval_batch, sizes = args.per_device_eval_batch_size, args.per_device_train_batch_size
    models, phases = {}, dict.fromkeys(("sample", "score", "update", "step"), 0)
    working = live = 0
    for name, (path, kind, learns) in models_of(args).items():
        train_batch = sizes if ppo else 2 * sizes  # a pair is two texts
        train = measure(path, kind, dtype, args.bf16, train_batch, seq_len)
        score = measure(path, kind, dtype, args.bf16, eval_batch, seq_len)
        options = args.lora_rank, learns, args.shard_frozen_models
        part = models[name] = states(train, engine, args.world_size, args.bf16, *options)
        sharded = engine.stage == 3 if learns else args.shard_frozen_models
        part["gathered"] = width * min(train.parameters, engine.max_live) if sharded else 0
        live, working, updating = max(live, part["gathered"]), max(working, score.layer), 0
        if learns:
            one = checkpointed(args, engine, train.parameters)
            part["activations"] = train.kept + train.layer if one else train.saved
            updating = part["activations"] + part["gathered"]
            phases["step"] = max(phases["step"], part["step"])
        if name == "policy":
            part["kv_cache"] = score.kv_cache
            tokens = args.response_length * train_batch
            part["logits"] = UPDATE_LOGIT * min(LOGITS_AT_ONCE, tokens * train.vocab)
            updating += part["logits"]
            tokens = args.response_length * eval_batch
            phases["score"] += SCORE_LOGIT * min(LOGITS_AT_ONCE, tokens * score.vocab)
            if sharded and args.gather_to_generate:
                part["gathered"] = width * train.parameters
            phases["sample"] += SCORE_LOGIT * eval_batch * score.vocab + part["kv_cache"]
            phases["sample"] += part["gathered"] + score.layer * args.prompt_length // seq_len
        phases["update"] = max(phases["update"], updating)  # one model's pass after the other's
    phases["score"] += working + live
    gradients = sum(part["gradients"] for part in models.values())
    held = args.overhead * GIB + sum(p["weights"] + p["optimiser"] for p in models.values())
    for phase in phases:  # ZeRO-3 keeps its gradients' memory between updates
        keeps = phase in ("update", "step") or engine.stage == 3
        phases[phase] += held + (gradients if keeps else 0)
    if not ppo:
        del phases["sample"]
    host = sum(part["host"] for part in models.values()) * min(args.gpus_per_node, args.world_size)
    return models, phases, host


def changes(args, engine):
    """What to change, the cheapest first: (what it is, args, engine), with all before it."""
    ppo, shared = args.script != "am_train", args.critic_init == "backbone"

    def change(file=None, to=None, **flags):
        nonlocal args, engine
        args, engine = replace(args, **flags), to or engine
        said = f"--deepspeed configs/{file}.json" if file else ""
        return said or " ".join(f"--{name} {value}" for name, value in flags.items()), args, engine

    if not args.bf16 and engine.stage != 0:
        yield change(bf16=True)
    by_size = args.gradient_checkpointing is None and (engine.stage is not None or args.lora_rank)
    if not (args.gradient_checkpointing or by_size):
        yield change(gradient_checkpointing=True)
    if args.per_device_eval_batch_size > 16:
        yield change(per_device_eval_batch_size=16)
    if args.per_device_train_batch_size > 4:
        yield change(per_device_train_batch_size=4)
    if args.world_size > 1:
        if ppo and not args.shard_frozen_models:
            yield change(shard_frozen_models=True)
        for stage in range(max(2, (engine.stage or 0) + 1), 3 if shared else 4):
            yield change(f"zero{stage}", replace(engine, stage=stage))
    if not args.bf16 and engine.stage:
        yield change(bf16=True)
    if args.per_device_train_batch_size > 1:
        yield change(per_device_train_batch_size=1)
    if ppo and engine.stage == 3 and args.gather_to_generate:
        yield change(gather_to_generate=False)
    if engine.stage and not shared and not (engine.offload_optimizer and engine.offload_weights):
        host = {"offload_optimizer": True, "offload_weights": engine.stage == 3}
        yield change(f"zero{engine.stage}_offload", replace(engine, **host))
    if engine.stage is None and not shared:
        file = Path(__file__).parents[1] / "configs" / "zero2_offload.json"
        yield change("zero2_offload", Engine.from_file(file))
    if not args.lora_rank:
        yield change(lora_rank=64)
    for _ in range(3) if engine.stage is not None else ():
        _, *more = change(world_size=2 * args.world_size)
        yield f"{args.world_size} GPUs", *more


# --- printing -------------------------------------------------------------------------------------
PARTS = "weights", "optimiser", "gradients", "gathered", "activations", "logits", "kv_cache"


def check(args, engine):
    for name in ("world_size", "gpus_per_node", "prompt_length", "response_length"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} {getattr(args, name)}: must be positive")
    if args.world_size > 1 and engine.stage is None:
        raise InputError(f"--world_size {args.world_size}: needs --deepspeed, as the run does")
    if args.bf16 and engine.stage == 0:
        raise InputError(f"--deepspeed {args.deepspeed}: --bf16 True needs ZeRO stage 1, 2 or 3")
    if args.critic_init == "backbone" and (engine.stage == 3 or engine.offload_optimizer):
        needs = f"needs ZeRO 0 to 2 without offload, which --deepspeed {args.deepspeed} is not"
        raise InputError(f"--critic_init backbone: {needs}")


def main(args: Args):
    args = filled(args)
    engine = Engine.from_file(args.deepspeed)
    check(args, engine)
    models, phases, host = plan(args, engine)
    what = "plain" if engine.stage is None else f"ZeRO-{engine.stage}"
    gpus = f"{args.world_size} x {args.gpu_memory:g} GiB"
    print(f"{Path(args.model_name_or_path).name}, {gpus}, {what}; GiB a GPU\n")
    print("| model | " + " | ".join(part.replace("_", " ") for part in PARTS) + " |")
    print("|---" * (len(PARTS) + 1) + "|")
    for name, part in models.items():
        print(f"| {name} | " + " | ".join(f"{part.get(p, 0) / GIB:.1f}" for p in PARTS) + " |")
    largest = "  ".join(f"{phase} {size / GIB:.1f}" for phase, size in phases.items())
    print(f"\n{largest} GiB at most")
    if host:
        print(f"and {host / GIB:.0f} GiB of memory on each host")

    def fits(phases):
        """The largest phase, and whether it fits."""
        peak = max(phases, key=phases.get)
        return peak, phases[peak] <= args.gpu_memory * GIB

    peak, enough = fits(phases)
    print(f"{peak} decides: {'fits' if enough else 'does not fit'} {args.gpu_memory:g} GiB")
    if enough:
        return
    print("\n| change, with those above | GiB a GPU | GiB a host | decided by | fits |")
    print("|---|---|---|---|---|")
    for change, changed, its_engine in changes(args, engine):
        _, phases, host = plan(changed, its_engine)
        peak, enough = fits(phases)
        sizes = f"{phases[peak] / GIB:.1f} | {host / GIB:.0f}"
        print(f"| {change} | {sizes} | {peak} | {'yes' if enough else 'no'} |")
        if enough:
            return
    print("\nnothing here makes it fit: shorten the texts, or take a smaller model")


if __name__ == "__main__":
    sys.argv[1:] = without_others(sys.argv[1:])
    run_cli(main, Args, __doc__)
