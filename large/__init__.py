"""What most readers can leave closed. Many processes and large models stand behind the methods of
utils.Backend (docs/DEEPSPEED.md); utils.py imports the rest inside the function that needs it.

flags.py     --deepspeed, --lora_rank ...: their fields, what does not fit together, the file
backend.py   who does which part of the passes, and how the results come together
engines.py   models under DeepSpeed, and gradient checkpointing
adapters.py  LoRA; weights made whole to be saved
checkpoints.py   --save_steps, --resume
command_line.py  parsing, ranges, the flag that an error is about
cuts.py          --truncate_prompts
finite.py        a run ends where a number is none
fits.py          tokens and positions that a model has
forms.py         which token ends an answer; tokenizers that make the same ids
functions.py     a user's function, as --gold_reward
hub.py           asked once
progress.py      a bar, or lines
rows.py          JSON Lines, checked row by row
run_folder.py    what a run writes
scorers.py       loading; encoders and other heads than `score`
tables.py        Parquet and hub ids
plan_memory.py, select_at_scale.py   commands of their own (docs/SCALING.md)
"""

from large.backend import LargeBackend, become, runner
from large.flags import check, read_config, with_flags

__all__ = ["LargeBackend", "become", "check", "read_config", "runner", "with_flags"]
