"""Many processes and large models, behind the methods of utils.Backend (docs/DEEPSPEED.md).

flags.py     --deepspeed, --lora_rank ...: their fields, what does not fit together, the file
backend.py   who does which part of the passes, and how the results come together
engines.py   models under DeepSpeed, and gradient checkpointing
adapters.py  LoRA; weights made whole to be saved
plan_memory.py, select_at_scale.py   commands of their own (docs/SCALING.md)
"""

from large.backend import LargeBackend, become, runner
from large.flags import check, read_config, with_flags

__all__ = ["LargeBackend", "become", "check", "read_config", "runner", "with_flags"]
