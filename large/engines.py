"""Models under DeepSpeed, and gradient checkpointing. Which one the flags ask for: LargeBackend."""

import contextlib
import functools
import logging
import math
import os
from pathlib import Path

import torch
from torch import nn

from large.flags import zero_stage
from plumbing.errors import first_line
from utils import DEVICE, Engine, InputError, backend


def without_frozen(module, state):
    """Of a state dict, what changes in a run: buffers, and weights that learn. Under LoRA the
    others are a hundred times as much, and lie in the folder that the run starts from."""
    named = module.named_parameters(remove_duplicate=False)
    frozen = {name for name, weight in named if not weight.requires_grad}
    return {name: value for name, value in state.items() if name not in frozen}


def fingerprint(module):
    """The sum of the frozen weights' bits, by which a resumed run knows that they are the same."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    frozen = [p for p in module.parameters() if not p.requires_grad]
    frozen = [getattr(p, "ds_tensor", p).detach() for p in frozen]  # ZeRO-3: this process's share
    return sum(int(p.view(integers[p.element_size()]).sum()) for p in frozen)


def check_frozen(module, saved):
    if saved not in (fingerprint(module), None):  # None: of an older run, which kept all weights
        raise InputError("--resume: the frozen weights are not those that the run started from")


class LargeEngine(Engine):
    """One process without DeepSpeed, for adapters and gradient checkpointing."""

    def __init__(self, module, *options, **more):
        super().__init__(module, *options, **more)
        checkpointed = (m for m in module.modules() if getattr(m, "gradient_checkpointing", False))
        self.checkpointed = list(checkpointed)
        for layer in self.checkpointed:
            checkpoint = layer._gradient_checkpointing_func
            layer._gradient_checkpointing_func = self.in_its_mode(layer, checkpoint)

    def in_its_mode(self, layer, checkpoint):
        """run() has a layer say that it trains. Within, OPT's and others would turn on dropout."""

        def forward_in_mode(forward, *args):
            layer.training = self.module.training
            try:
                return forward(*args)
            finally:
                layer.training = True

        return lambda forward, *args: checkpoint(functools.partial(forward_in_mode, forward), *args)

    def run(self, function, *args, **kwargs):
        # in eval mode, which PPO needs to be without dropout, layers would keep all activations
        for layer in self.checkpointed:
            layer.training = torch.is_grad_enabled()
        return self.forward(function, *args, **kwargs)

    def forward(self, function, *args, **kwargs):
        return function(self.module, *args, **kwargs)

    def state(self, folder):
        state = super().state(folder)
        state["module"] = without_frozen(self.module, state["module"])
        return state | {"frozen": fingerprint(self.module)}

    def load_state(self, state):
        state = dict(state)
        check_frozen(self.module, state.pop("frozen", None))
        state["module"] = self.module.state_dict() | state["module"]
        super().load_state(state)


class OneForward(nn.Module):
    """DeepSpeed's hooks stand around one forward. Ours are several functions of one module."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, function, *args, **kwargs):
        return function(self.module, *args, **kwargs)


def import_deepspeed():
    """Quiet, and without the kernel that it would build on a CPU for a minute."""
    os.environ.setdefault("DS_ACCELERATOR", DEVICE.type)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if isinstance(ops := getattr(deepspeed.ops, "__compatible_ops__", None), dict):  # private
        ops["deepspeed_shm_comm"] = False
    return deepspeed


def initialize(module, config, **parts):
    dtype = torch.bfloat16 if config["bf16"]["enabled"] else torch.float32
    with float32_buffers(module):
        for p in module.parameters():  # beside weights that came in shards DeepSpeed casts none
            p.data = p.data.to(dtype)
        return import_deepspeed().initialize(model=OneForward(module), config=config, **parts)[0]


@contextlib.contextmanager
def float32_buffers(module):
    """A cast to bfloat16 within leaves the buffers: rotary frequencies would be other positions."""
    kept = {name: b.clone() for name, b in module.named_buffers()}
    yield
    for name, b in module.named_buffers():
        b.data = kept[name].to(b.device)


def in_shards(config):
    """The DeepSpeed file's entries for a model of which each process holds a part."""
    zero = dict(config.get("zero_optimization", {}))
    zero.pop("offload_optimizer", None)
    return config | {"zero_optimization": zero | {"stage": 3}}


class Zero3:
    """What transformers asks of a DeepSpeed file to partition weights while it reads them."""

    def __init__(self, config):
        self.config = in_shards(config)

    def is_zero3(self):
        return True


@contextlib.contextmanager
def sharded_loading(config):
    """In it each process reads a share of each weight, and none ever holds the model."""
    import_deepspeed()
    from transformers.integrations.deepspeed import set_hf_deepspeed_config as set_config
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config as unset_config

    kept_alive = Zero3(config)  # transformers has a weak reference alone
    set_config(kept_alive)
    try:
        yield
    finally:
        unset_config()


def generate(module, **kwargs):
    return module.generate(**kwargs)


class FrozenEngine(Engine):
    """A model that is only read, a shard in each process (ZeRO-3 without an optimiser)."""

    def __init__(self, module):
        self.module, self.engine = module, initialize(module, in_shards(backend.config))

    def __getattr__(self, name):
        return getattr(self.module, name)

    def run(self, function, *args, **kwargs):
        return self.engine(function, *args, **kwargs)

    def sampler(self):
        return contextlib.nullcontext(functools.partial(self.run, generate, synced_gpus=True))


class DeepSpeedEngine(LargeEngine):
    def __init__(self, module, *options, **more):
        super().__init__(module, *options, **more)
        parts = {"optimizer": self.optimizer, "lr_scheduler": self.scheduler}
        self.stage, self.norm = zero_stage(backend.config), None
        self.gather_to_generate = getattr(backend.args, "gather_to_generate", True)
        self.engine = initialize(module, backend.config, **parts)
        # ZeRO 0 in float32 clips by a function that forgets the norm
        self.engine.clip_fp32_gradients = self.clip
        self.engine.module_state_dict = self.trained  # its own leaves tied weights in

    def clip(self):
        most = self.engine.gradient_clipping()
        self.norm = nn.utils.clip_grad_norm_(self.module.parameters(), most)

    def trained(self, **options):
        return without_frozen(self.engine.module, self.engine.module.state_dict())

    def forward(self, function, *args, **kwargs):
        return self.engine(function, *args, **kwargs)

    @contextlib.contextmanager
    def sampler(self):
        """The policy is gathered; or else layer after layer is, for each token, and all processes
        sample until the last has finished."""
        if self.stage == 3 and self.gather_to_generate:
            from deepspeed.runtime.zero import unwrap_model_for_generation

            with unwrap_model_for_generation(self.engine):
                yield self.module.generate
        else:
            yield functools.partial(self.run, generate, synced_gpus=self.stage == 3)

    def backward(self, loss):
        # DeepSpeed takes the mean over processes, and the loss of a batch is a sum
        self.engine.backward(loss * (backend.processes if backend.counts else 0))

    def step(self):
        self.engine.step()
        norm = self.engine.get_global_grad_norm() if self.norm is None else self.norm
        return math.nan if norm is None else float(norm)

    def state(self, folder):
        """DeepSpeed's shards lie in `folder`. Random numbers differ where dropout is on."""
        try:
            where = {"tag": folder.name, "save_latest": False}
            self.engine.save_checkpoint(str(folder.parent), **where, exclude_frozen_parameters=True)
        except (OSError, RuntimeError) as error:  # nobody goes on alone
            raise InputError(f"{folder}: cannot be written ({first_line(error)})") from None
        cuda = torch.cuda.get_rng_state() if DEVICE.type == "cuda" else None
        rng = {"cpu": torch.get_rng_state(), "cuda": cuda, "frozen": fingerprint(self.module)}
        return {"shards": str(folder), "rng": backend.everyone(rng)}  # and so all have written

    def load_state(self, state):
        shards, had, now = Path(state["shards"]), len(state["rng"]), backend.processes
        if had != now:
            raise InputError(f"--resume: the run had {had} processes, this one has {now}")
        rng = state["rng"][backend.rank]
        check_frozen(self.module, rng.get("frozen"))
        how = {"tag": shards.name, "load_module_strict": False}  # frozen weights are not in it
        if self.engine.load_checkpoint(str(shards.parent), **how)[0] is None:
            raise InputError(f"--resume: {shards} is missing")
        torch.set_rng_state(rng["cpu"].cpu())
        if rng["cuda"] is not None:
            torch.cuda.set_rng_state(rng["cuda"].cpu())
