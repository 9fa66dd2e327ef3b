"""JSON and JSON Lines, and what a number needs beside it to be repeated."""

import json
import math
import os
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch


def plain(value):
    """The value as JSON has it: infinities as text, NaN as null, dates and such as text."""
    value = value.tolist() if hasattr(value, "dtype") else value  # of numpy or torch
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    if isinstance(value, str):
        return str(value)  # not a subclass of it
    return value if value is None or isinstance(value, int | float) else str(value)


def to_json(value, **options):
    return json.dumps(plain(value), ensure_ascii=False, allow_nan=False, **options) + "\n"


def write_json(path, value):
    write_aside(path, to_json(value, indent=1))


def write_jsonl(path, rows):
    write_aside(path, "".join(map(to_json, rows)))


def write_aside(path, text):
    """Write aside and rename, so that a reader never meets half a file."""
    from utils import backend  # which is not there yet when utils.py imports this file

    if backend.writes:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(f"{path}.tmp").write_text(text, encoding="utf-8")
        os.replace(f"{path}.tmp", path)


def environment():
    """Versions, commit, machine: what a number needs beside it to be repeated."""
    git = ["git", "-C", str(Path(__file__).parents[1]), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    versions = {name: version(name) for name in ("torch", "transformers")}
    machine = {
        "threads": torch.get_num_threads(),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }
    return {"versions": versions, "commit": commit, "machine": machine}
