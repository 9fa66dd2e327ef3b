"""LoRA (Hu et al. 2021), and weights made whole: adapters merged, shards gathered."""

import contextlib
import warnings

import torch

from utils import backend

HEADS = "score", "classifier", "e_head"


def add_adapters(module, model, lora_rank):
    """Freeze `module` but for its heads, and give every linear layer of `model` W + 2 B A."""
    from peft import LoraConfig, inject_adapter_in_model

    options = {"r": lora_rank, "lora_alpha": 2 * lora_rank, "target_modules": "all-linear"}
    lora = LoraConfig(**options, exclude_modules=r".*\b(score|classifier)\b.*")
    with warnings.catch_warnings(action="ignore"):
        inject_adapter_in_model(lora, model)
    for name, child in [*model.named_children(), *module.named_children()]:
        if name in HEADS:
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


def gathered(parameters, writer=None):
    """A context with these weights whole. What process `writer` writes to them in it stays."""
    sharded = [p for p in parameters if hasattr(p, "ds_id")]
    if not sharded:
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(sharded, modifier_rank=writer)


@torch.no_grad()
def whole_weights(module):
    """The state dict on the CPU of the process that writes (empty elsewhere), gathered one weight
    after the other."""
    state, seen, layers = {}, {}, dict(module.named_modules())
    for name, value in module.state_dict(keep_vars=True).items():
        if ".lora_" in name:
            continue
        layer, adapter, _ = name.partition(".base_layer.")
        layer = layers[layer] if adapter else None
        with gathered(layer.parameters() if layer else [value]):
            if not backend.writes:
                continue
            if id(value) not in seen:  # tied weights are one tensor, and stay so
                whole = value.detach()
                if name.endswith(".base_layer.weight"):
                    whole = whole + layer.get_delta_weight("default")
                seen[id(value)] = whole.cpu().clone()
            state[name.replace(".base_layer.", ".")] = seen[id(value)]
    return state
