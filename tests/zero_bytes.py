"""Bytes a parameter that DeepSpeed holds on one of two GPUs (here: gloo processes) under ZeRO-2 and
ZeRO-3 in bfloat16.

    torchrun --nproc_per_node 2 -m tests.zero_bytes

Prints one JSON object: what is held after a step, what is held besides between a backward pass and
its step, and DeepSpeed's own estimates. tests/test_plan_memory.py holds the planner to it.
"""

import gc
import json
import logging
import os

os.environ["DS_ACCELERATOR"] = "cpu"
import deepspeed
import torch
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

BUCKET = 10_000


def storages():
    gc.collect()
    tensors = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor)]
    return {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}


def main():
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    ops = getattr(deepspeed.ops, "__compatible_ops__", {})
    ops["deepspeed_shm_comm"] = False  # a minute of compiling
    deepspeed.init_distributed("gloo")
    seen = {"estimates": {}}
    for stage in (2, 3):
        before = storages()  # held, so that no address is used twice
        model = torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(8)))
        numbers = sum(p.numel() for p in model.parameters())
        zero = {
            "stage": stage,
            "reduce_bucket_size": BUCKET,
            "stage3_param_persistence_threshold": 300,
        }
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "bf16": {"enabled": True},
            "zero_optimization": zero,
        }
        config |= {"steps_per_print": 10**9, "zero_force_ds_cpu_optimizer": False}
        engine = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters()), config=config)[0]
        for _ in range(2):
            loss = engine(torch.randn(1, 256, dtype=torch.bfloat16)).float().mean()
            engine.backward(loss)
            del loss
            pending = sum(s.nbytes() for address, s in storages().items() if address not in before)
            engine.step()
            held = sum(s.nbytes() for address, s in storages().items() if address not in before)
        seen[f"zero{stage}"] = {"parameters": numbers, "after_step": held, "before_step": pending}
    seen["estimates"]["zero2"] = estimate_zero2_model_states_mem_needs(10**9, 8, 2, cpu_offload=False)[1]
    seen["estimates"]["zero3"] = estimate_zero3_model_states_mem_needs(10**9, 0, 8, 2, cpu_offload=False)[1]
    if torch.distributed.get_rank() == 0:
        print(json.dumps(seen), flush=True)
    os._exit(0)  # DeepSpeed's shutdown aborts now and then


if __name__ == "__main__":
    main()
