"""What each GPU must hold for ppo_sr.py or am_train.py, from config.json alone, before anything is loaded.

    python -m tools.plan_memory --model_name_or_path meta-llama/Llama-3.1-8B --world_size 8 \\
        --deepspeed configs/zero3.json --bf16 True --gradient_checkpointing True --per_device_train_batch_size 4 \\
        --per_device_eval_batch_size 16 --prompt_length 1024 --response_length 512

It takes those flags of the run that decide its memory (of ppo_sr.py and ppo_max.py alike), with the longest prompt and
response, and prints GiB a GPU: each model by
part, each phase of a step, and, where the largest phase does not fit, what to change first. A folder with nothing but a
config.json will do.

    states       counted: parameters of the model itself, built without memory (torch's FakeTensorMode), times the bytes
                 that AdamW and ZeRO hold for each (Rajbhandari et al. 2020, "ZeRO", §3 and §5)
    activations  counted: what autograd saves in a forward pass of that model (saved_tensors_hooks), or, with gradient
                 checkpointing, the inputs of its layers and one layer in full (Chen et al. 2016). So the formula of each
                 architecture is its own code; for a GPT it is that of Korthikanti et al. 2022, §4.1
    logits       LOGITS_AT_ONCE of utils.py, or the batch's where they are fewer, times what a loss holds of each
    KV cache     counted: the cache that the model itself returns
Not counted, but reserved as --overhead: the CUDA context, NCCL, and the allocator's fragmentation. No GPU has checked it.
"""

import functools
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from utils import LOGITS_AT_ONCE, InputError, read_json, run_cli

GIB = 2**30
UPDATE_LOGIT, SCORE_LOGIT = (
    12,
    16,
)  # bytes a logit: float32 logits, their log-softmax, and a gradient or two for entropy
SUB_GROUP = 10**9  # ZeRO-3 steps over this many parameters at a time (its sub_group_size)


@dataclass
class Args:
    model_name_or_path: str
    """the policy's folder or hub id; its config.json is all that is read"""
    reward_model_path: str | None = None
    """the scorer's, from which the critic starts; without it of the policy's shape"""
    script: Literal["ppo_sr", "am_train"] = "ppo_sr"
    """whose models: policy, critic, reference and scorer, or one scorer that is trained on pairs"""
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
    """DeepSpeed: bfloat16 weights with float32 masters; plain: bfloat16 products over float32 weights"""
    gradient_checkpointing: bool = False
    """keep the inputs of the layers alone and compute the rest again in the backward pass"""
    lora_rank: int = 0
    """rank of adapters on every linear layer; the rest is frozen, and the policy without them is the reference (0: none)"""
    critic_init: Literal["scorer", "policy", "backbone"] = "scorer"
    """of ppo_max.py: `backbone` is a head on the policy's, so no critic beside it; `policy` also where ppo_sr.py cannot start
    it from the scorer (another tokenizer, an encoder, a function)"""
    shard_frozen_models: bool = False
    """reference and scorer partitioned over the GPUs, as ZeRO-3 does, instead of whole on each"""
    gather_to_generate: bool = True
    """ZeRO-3: the policy is whole on every GPU while it samples; False: layers one at a time, with all GPUs in step"""
    per_device_train_batch_size: int = 64
    """sequences (am_train: pairs) per training forward pass"""
    per_device_eval_batch_size: int = 256
    """sequences per forward pass in sampling and scoring"""
    prompt_length: int = 448
    """tokens of the longest prompt"""
    response_length: int = 64
    """tokens of the longest response"""


@dataclass(frozen=True)
class Engine:
    """What a DeepSpeed file says of memory; `stage` None is the plain path. Counts are parameters, defaults DeepSpeed's."""

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
        zero = read_json(path, "--deepspeed")
        zero = zero.get("zero_optimization", {}) if isinstance(zero, dict) else None
        if not isinstance(zero, dict) or zero.get("stage", 0) not in (0, 1, 2, 3):
            raise InputError(f"--deepspeed {path}: zero_optimization.stage must be 0, 1, 2 or 3")

        def number(name, default):  # transformers' "auto" stands for a default
            return int(zero[name]) if isinstance(zero.get(name), (int, float)) else default

        def on_host(name):
            return (zero.get(name) or {}).get("device", "none") != "none"

        return cls(
            zero.get("stage", 0), on_host("offload_optimizer"), on_host("offload_param"),
            number("reduce_bucket_size", cls.bucket) * (2 if zero.get("overlap_comm") else 1),
            number("stage3_max_live_parameters", cls.max_live),
            number("stage3_param_persistence_threshold", cls.persistent),
        )  # fmt: skip


# --- counting: one model ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """Of one model: numbers of each parameter, adapter numbers a rank, logits a token; bytes of a batch."""

    sizes: tuple  # numel of every parameter, shared ones once
    adapter: int  # sum of inputs + outputs of its linear layers
    vocab: int
    saved: int  # by autograd in a forward pass
    kept: int  # of these with gradient checkpointing
    layer: int  # and by one layer
    kv_cache: int

    @property
    def parameters(self):
        return sum(self.sizes)


def build(path, kind, dtype, layers=None):
    """A policy or scorer by its config alone, with so many `layers`. Raises InputError where there is none."""
    from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def without_mask(module, query, key, value, mask, **kwargs):
        """As in the scripts, which give no mask; transformers would make one, since fake tensors look like tracing."""
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
            return family.from_config(config, dtype=dtype, attn_implementation="without_mask").eval()
        except ValueError:  # a model that has its own attention alone
            return family.from_config(config, dtype=dtype).eval()
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: no {kind} by its config ({str(error).strip().splitlines()[0]})") from None


def saved_bytes(model, ids, autocast):
    """Bytes that autograd keeps for the backward pass of model.base_model(ids), parameters left out."""
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    storages = {}  # kept alive, so that no address is used twice

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            storages[storage._cdata] = storage
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        kept_alive = model.base_model(ids, **({"use_cache": False} if hasattr(model.config, "use_cache") else {}))
    del kept_alive
    return sum(storage.nbytes() for storage in storages.values())


def batch_bytes(path, kind, dtype, autocast, batch, seq_len, layers):
    """Bytes of a batch in a model of so many layers: saved, saved with gradient checkpointing, KV cache."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), warnings.catch_warnings(action="ignore"):
        model, ids, kv_cache = build(path, kind, dtype, layers), torch.zeros(batch, seq_len, dtype=torch.long), 0
        saved = saved_bytes(model, ids, autocast)
        if kind == "policy":
            with torch.no_grad():
                cache = model.base_model(ids, use_cache=True).past_key_values.layers
            kv_cache = sum(part.nbytes for layer in cache for part in (layer.keys, layer.values))
        # reentrant: what is kept then passes through the hooks; in train mode, or transformers would keep everything
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        for module in model.train().modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        return saved, saved_bytes(model, ids, autocast), kv_cache


@functools.cache
def measure(path, kind, dtype=torch.float32, autocast=False, batch=1, seq_len=8):
    """The Shape of a model and of a batch (batch, seq_len) in it. Its layers are alike, so two and four of them give the
    bytes of any number. Raises InputError where there is no such model, or where it has no such positions."""
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        model = build(path, kind, dtype)
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None) or seq_len
    if seq_len > positions:
        raise InputError(f"--prompt_length, --response_length: {seq_len} tokens; {path} has {positions} positions")
    heads = (model.get_output_embeddings(), getattr(model, "score", None), getattr(model, "classifier", None))
    linear = [m for m in model.modules() if isinstance(m, (torch.nn.Linear, Conv1D)) and all(m is not h for h in heads)]
    two, four = (batch_bytes(path, kind, dtype, autocast, batch, seq_len, layers) for layers in (2, 4))
    layers = config.num_hidden_layers
    saved, kept, kv_cache = (a + (b - a) * (layers - 2) // 2 for a, b in zip(two, four, strict=True))
    return Shape(
        sizes=tuple(p.numel() for p in model.parameters()),
        adapter=sum(sum(m.weight.shape) for m in linear),
        vocab=config.vocab_size,
        saved=saved,
        kept=kept,
        layer=(saved - kept) // layers,
        kv_cache=kv_cache,
    )


# --- arithmetic: bytes a GPU ------------------------------------------------------------------------------------------


def states(shape, engine, world_size, bf16, lora_rank=0, trained=True, shard_frozen=False):
    """Bytes on one GPU (and `host`: off it) for one model: weights, gradients, optimiser, and for one moment `step`.

    A parameter costs, plain and in float32, 4 for itself, 4 for its gradient and 8 for AdamW's moments. DeepSpeed in
    bfloat16: 2, 2 and 12 (a float32 master beside the moments), and 4 while it steps, for the gradient in float32. ZeRO
    divides by the GPUs: the optimiser from stage 1, gradients from 2, weights from 3 (small ones stay whole as well).
    """
    stage, numbers = engine.stage or 0, shape.parameters
    learned = (shape.adapter * lora_rank if lora_rank else numbers) if trained else 0
    numbers += shape.adapter * lora_rank if trained else 0

    def share(from_stage):
        return 1 / world_size if stage >= from_stage else 1

    masters = 4 if bf16 or stage else 0
    if engine.stage is None:
        return {"weights": 4 * numbers, "gradients": 4 * learned, "optimiser": 8 * learned, "step": 0, "host": 0}
    width, sharded = (2 if bf16 else 4), (stage == 3 if trained else shard_frozen)
    part = {"weights": width * numbers, "gradients": 0.0, "optimiser": 0.0, "step": 0.0, "host": 0.0}
    if sharded:
        whole = width * sum(n for n in shape.sizes if n <= engine.persistent)
        part["weights"] = width * numbers / world_size + whole
        if engine.offload_weights:
            part["weights"], part["host"] = whole, width * numbers / world_size
    if learned:
        in_flight = width * engine.bucket if stage else 0
        part["gradients"] = width * learned * share(2) + in_flight
        part["optimiser"] = (masters + 8) * learned * share(1)
        part["step"] = masters * min(learned * share(1), SUB_GROUP if stage == 3 else learned)
        if engine.offload_optimizer:
            part["host"] += part["optimiser"] + 4 * learned * share(1)
            part |= {"gradients": in_flight if stage > 1 else part["gradients"], "optimiser": 0.0, "step": 0.0}
    return part


def plan(args, engine):
    """{model: {part: bytes}} and {phase: bytes} of one GPU, and the bytes of a host that ZeRO keeps off the GPUs."""
    ppo, seq_len = args.script == "ppo_sr", args.prompt_length + args.response_length
    half = args.bf16 and engine.stage is not None
    dtype, autocast = (torch.bfloat16 if half else torch.float32), args.bf16
    scorer = args.reward_model_path or args.model_name_or_path
    train_batch = args.per_device_train_batch_size * (1 if ppo else 2)  # a pair is two texts
    paths = {"policy": args.model_name_or_path}
    paths |= {"critic": args.model_name_or_path if args.critic_init == "policy" else scorer}
    paths |= {"reference": args.model_name_or_path, "scorer": scorer}
    models, phases = {}, dict.fromkeys(("sample", "score", "update", "step"), 0)
    working, live = 0, {}
    for name, path in paths.items() if ppo else [("scorer", args.model_name_or_path)]:
        if name == "reference" and args.lora_rank:  # the policy without its adapters
            continue
        if name == "critic" and args.critic_init == "backbone":  # the policy's, whose graphs live one after the other
            continue
        kind = "policy" if name in ("policy", "reference") else "scorer"
        trained = name in ("policy", "critic") or not ppo
        train = measure(path, kind, dtype, autocast, train_batch, seq_len)
        score = measure(path, kind, dtype, autocast, args.per_device_eval_batch_size, seq_len)
        part = states(train, engine, args.world_size, args.bf16, args.lora_rank, trained, args.shard_frozen_models)
        sharded = engine.stage == 3 if trained else args.shard_frozen_models
        width = 2 if half else 4
        part["gathered"] = live[name] = width * min(train.parameters, engine.max_live) if sharded else 0
        part["activations"] = part["kv_cache"] = 0
        if trained:
            part["activations"] = train.kept + train.layer if args.gradient_checkpointing else train.saved
        if name == "policy":
            part["kv_cache"] = score.kv_cache
            tokens = args.response_length * train_batch
            part["logits"] = UPDATE_LOGIT * min(LOGITS_AT_ONCE, tokens * train.vocab)
            tokens = args.response_length * args.per_device_eval_batch_size
            phases["score"] += SCORE_LOGIT * min(LOGITS_AT_ONCE, tokens * score.vocab)
            phases["sample"] += SCORE_LOGIT * args.per_device_eval_batch_size * score.vocab
            if sharded and args.gather_to_generate:
                part["gathered"] = width * train.parameters
            phases["sample"] += part["kv_cache"] + part["gathered"] + score.layer * args.prompt_length // seq_len
        working = max(working, score.layer)
        models[name] = part
    learning = [m for m in models.values() if m["gradients"] or m["activations"]]
    gradients = sum(m["gradients"] for m in learning)
    phases["score"] += working + max(live.values())
    phases["update"] += sum(m["activations"] + m.get("logits", 0) for m in learning)
    phases["update"] += sum(live[name] for name, m in models.items() if m["activations"])
    phases["step"] += max(m["step"] for m in learning)
    held = args.overhead * GIB + sum(m["weights"] + m["optimiser"] for m in models.values())
    for phase in phases:  # ZeRO-3 keeps its gradients' memory between updates
        phases[phase] += held + (gradients if phase in ("update", "step") or engine.stage == 3 else 0)
    if not ppo:
        del phases["sample"]
    host = sum(m["host"] for m in models.values()) * min(args.gpus_per_node, args.world_size)
    return models, phases, host


def changes(args, engine):
    """What to change, the cheapest first: (what it is, args, engine) with all changes so far."""
    steps = []

    def add(what, engine=engine, **flags):
        last = steps[-1][1] if steps else args
        steps.append((what, replace(last, **flags), engine))
        return engine

    shared = args.critic_init == "backbone"
    small_eval, small_train = min(args.per_device_eval_batch_size, 16), min(args.per_device_train_batch_size, 4)
    if not args.bf16 and engine.stage != 0:
        add("--bf16 True", bf16=True)
    if not args.gradient_checkpointing:
        add("--gradient_checkpointing True", gradient_checkpointing=True)
    if small_eval < args.per_device_eval_batch_size:
        add(f"--per_device_eval_batch_size {small_eval}", per_device_eval_batch_size=small_eval)
    if small_train < args.per_device_train_batch_size:
        add(f"--per_device_train_batch_size {small_train}", per_device_train_batch_size=small_train)
    if args.world_size > 1:
        if not args.shard_frozen_models and args.script == "ppo_sr":
            add("--shard_frozen_models True", engine, shard_frozen_models=True)
        for stage in range(max(2, (engine.stage or 0) + 1), 3 if shared else 4):
            engine = add(f"--deepspeed configs/zero{stage}.json", replace(engine, stage=stage))
    if not args.bf16 and engine.stage and not steps[-1][1].bf16:
        add("--bf16 True", engine, bf16=True)
    if small_train > 1:
        add("--per_device_train_batch_size 1", engine, per_device_train_batch_size=1)
    if engine.stage == 3 and args.gather_to_generate and args.script == "ppo_sr":
        add("--gather_to_generate False", engine, gather_to_generate=False)
    if engine.stage and not shared and not (engine.offload_optimizer and engine.offload_weights):
        offloaded = replace(engine, offload_optimizer=True, offload_weights=engine.stage == 3)
        engine = add(f"--deepspeed configs/zero{engine.stage}_offload.json", offloaded)
    if engine.stage is None and not shared:
        file = "configs/zero2_offload.json"
        engine = add(f"--deepspeed {file}", Engine.from_file(Path(__file__).parents[1] / file))
    if not args.lora_rank:
        add("--lora_rank 64", engine, lora_rank=64)
    if engine.stage is not None:
        for factor in (2, 4, 8):
            add(f"{args.world_size * factor} GPUs", engine, world_size=args.world_size * factor)
    return steps


# --- printing ---------------------------------------------------------------------------------------------------------
PARTS = ("weights", "optimiser", "gradients", "gathered", "activations", "logits", "kv_cache")


def main(args: Args):
    engine = Engine.from_file(args.deepspeed)
    if args.world_size < 1 or args.gpus_per_node < 1 or min(args.prompt_length, args.response_length) < 1:
        raise InputError("--world_size, --gpus_per_node, --prompt_length, --response_length: must be positive")
    if args.world_size > 1 and engine.stage is None:
        raise InputError(f"--world_size {args.world_size}: needs --deepspeed, as the run does")
    if args.bf16 and engine.stage == 0:
        raise InputError(f"--deepspeed {args.deepspeed}: --bf16 True needs ZeRO stage 1, 2 or 3")
    if args.critic_init == "backbone" and (engine.stage == 3 or engine.offload_optimizer):
        raise InputError(
            f"--critic_init backbone: needs ZeRO 0 to 2 without offload, which --deepspeed {args.deepspeed} is not"
        )
    models, phases, host = plan(args, engine)
    what = "plain" if engine.stage is None else f"ZeRO-{engine.stage}"
    print(f"{Path(args.model_name_or_path).name}, {args.world_size} x {args.gpu_memory:g} GiB, {what}; GiB a GPU\n")
    print("| model | " + " | ".join(part.replace("_", " ") for part in PARTS) + " |")
    print("|---" * (len(PARTS) + 1) + "|")
    for name, part in models.items():
        print(f"| {name} | " + " | ".join(f"{part.get(p, 0) / GIB:.1f}" for p in PARTS) + " |")
    print("\n" + "  ".join(f"{phase} {size / GIB:.1f}" for phase, size in phases.items()) + " GiB at most")
    if host:
        print(f"and {host / GIB:.0f} GiB of memory on each host")
    peak = max(phases, key=phases.get)
    fits = phases[peak] <= args.gpu_memory * GIB
    print(f"{peak} decides: {'fits' if fits else 'does not fit'} {args.gpu_memory:g} GiB")
    if fits:
        return
    print("\n| change, with those above | GiB a GPU | GiB a host | decided by | fits |\n|---|---|---|---|---|")
    for change, changed, its_engine in changes(args, engine):
        _, phases, host = plan(changed, its_engine)
        peak = max(phases, key=phases.get)
        fits = phases[peak] <= args.gpu_memory * GIB
        print(f"| {change} | {phases[peak] / GIB:.1f} | {host / GIB:.0f} | {peak} | {'yes' if fits else 'no'} |")
        if fits:
            break
    else:
        print("\nnothing here makes it fit: shorten the texts, or take a smaller model")


if __name__ == "__main__":
    run_cli(main, Args, __doc__)
