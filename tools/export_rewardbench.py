"""Preference pairs as RewardBench rows: score any reward model with its code on your own pairs.

    python -m tools.export_rewardbench --dataset_name test.jsonl --output_path out.jsonl   # seconds
    rewardbench --model runs/am/model --dataset out.jsonl --load_json      # RewardBench's command

conversations: {id, chosen, chosen_model, rejected, rejected_model, subset}, where chosen and
rejected are the whole conversations, prompt included: what that command reads of a file
(rewardbench 0.1.4, load_and_process_dataset). Our own scripts read such rows back.

core: {id, prompt, chosen, chosen_model, rejected, rejected_model, subset}, strings but for the id:
the columns of the set allenai/reward-bench. Its prompts have a single turn, so one of several is
refused; that command does not read such a file.

RewardBench calls the turns of a prompt user, assistant, user ... whatever their roles say, a system
prompt too; a prompt whose roles are others is refused here. `task` becomes the subset,
`policy_chosen` and `policy_rejected` the models ("" where a row has none), the line the id.
"""

from dataclasses import dataclass
from typing import Literal

from utils import InputError, load_rows, run_cli, write_jsonl


@dataclass
class Args:
    dataset_name: str
    """pairs: `prompt`, `chosen`, `rejected`, optional `task`"""
    output_path: str
    """the JSON Lines file to write"""
    format: Literal["conversations", "core"] = "conversations"
    """conversations: for the command `rewardbench --load_json`; core: as in allenai/reward-bench"""
    max_rows: int = 0
    """read only the first rows (0: all)"""


def rewardbench_row(row, number, format, where):
    """A pair -> a row of RewardBench; refused if its loader would bend the prompt."""
    turns = row["prompt"]
    turns = [{"role": "user", "content": turns}] if isinstance(turns, str) else turns
    # other keys would make the columns differ
    turns = [{"role": m["role"], "content": m["content"]} for m in turns]
    roles = [m["role"] for m in turns]
    if len(roles) % 2 == 0 or roles != (["user", "assistant"] * len(roles))[: len(roles)]:
        found = f"field 'prompt' has the roles {', '.join(roles)}"
        expected = "user, assistant, ..., user alone (write a system prompt into the first turn)"
        raise InputError(f"{where}: {found}; RewardBench knows {expected}")
    if format == "core" and len(turns) > 1:
        problem = f"field 'prompt' has {len(turns)} turns, core rows have one"
        raise InputError(f"{where}: {problem}; use --format conversations")
    result = {"id": number} | ({"prompt": turns[0]["content"]} if format == "core" else {})
    for side in ("chosen", "rejected"):
        answer = {"role": "assistant", "content": row[side]}
        result[side] = row[side] if format == "core" else [*turns, answer]
        result[f"{side}_model"] = str(row.get(f"policy_{side}") or "")
    return result | {"subset": str(row.get("task", "all"))}


def main(args: Args):
    fields = {"prompt": "prompt", "chosen": "response", "rejected": "response"}
    rows = []
    for number, row in enumerate(load_rows(args.dataset_name, fields, args.max_rows), 1):
        where = f"{args.dataset_name}, line {number}"
        rows.append(rewardbench_row(row, number, args.format, where))
    write_jsonl(args.output_path, rows)
    print(f"{len(rows)} pairs written to {args.output_path}")


if __name__ == "__main__":
    run_cli(main, Args, __doc__)
