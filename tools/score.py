"""The score of every row of a file: a(x, y) = r - e of one scorer.

    python evaluate.py score --scorer runs/am/model --dataset_name answers.jsonl \\
        --output_dir runs/scored            # as python -m tools.score, which has --fields, too

Rows with `prompt` and `response` get a `score`, preference pairs a `chosen_score` and a
`rejected_score`. Their own columns stay as they are, and so does their order.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tools.judges import Advantages
from plumbing.rows import read_rows
from utils import InputError, load_rows, run_cli, write_jsonl


@dataclass
class Args:
    scorer: str
    """model folder of am_train.py, or any sequence classifier with one label"""
    dataset_name: str
    """rows `prompt` and `response`, or `prompt`, `chosen` and `rejected`"""
    output_dir: str
    """receives scored.jsonl, the rows with their scores"""
    fields: tuple[str, ...] = ()
    """the columns to score (default: response, or else chosen and rejected)"""
    max_length: int = 512
    """tokens of prompt and response together"""
    truncate_prompts: bool = False
    """keep the end of a prompt that is too long instead of refusing it"""
    per_device_eval_batch_size: int = 32
    """texts in a batch"""
    bf16: bool = False
    """matrix products in bfloat16"""


def main(args: Args):
    path = Path(args.output_dir) / "scored.jsonl"
    if path.exists():
        raise InputError(f"{path}: is there; give another --output_dir, or remove it")
    own = read_rows(args.dataset_name)  # as they are, for load_rows brings them into one form
    first = own[0] if own and isinstance(own[0], dict) else {}
    fields = args.fields or (("response",) if "response" in first else ("chosen", "rejected"))
    rows = load_rows(args.dataset_name, {"prompt": "prompt"} | dict.fromkeys(fields, "response"))
    names = ["score" if field == "response" else f"{field}_score" for field in fields]
    for number, row in enumerate(own, 1):
        if taken := [name for name in names if row.get(name) is not None]:
            where = f"{args.dataset_name}, line {number}"
            raise InputError(f"{where}: has a '{taken[0]}' already; remove or rename that column")
    scores = Advantages(args.scorer, args, args.dataset_name)(rows, fields)
    scored = zip(own, scores.T.tolist(), strict=True)
    write_jsonl(path, [row | dict(zip(names, s, strict=True)) for row, s in scored])
    if bad := int((~np.isfinite(scores)).sum()):
        raise InputError(f"--scorer {args.scorer}: {bad} of {scores.size} scores are no numbers")
    for name, values in zip(names, scores, strict=True):
        print(f"{name}: mean {values.mean():.4g}, std {values.std():.4g}")
    print(f"{len(own):,} rows written to {path}")


if __name__ == "__main__":
    run_cli(main, Args, __doc__)
