"""Checkpoints: a killed run goes on with --resume True to the same numbers, bit for bit.

`log` is a RunLog of run_folder.py. A checkpoint holds models, optimisers, the random numbers'
state, and how long the log files were, so that rows of later steps are dropped.
"""

import contextlib
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from plumbing.errors import first_line
from plumbing.records import plain
from utils import DEVICE, Engine, InputError, backend, in_one_line

BAD = "cut off, or not of this run and this model; remove it to start anew"


def refuse_begun(args):
    """A folder that holds a run is not written over."""
    folder = Path(args.output_dir)
    metrics, state = folder / "metrics.jsonl", folder / "checkpoint" / "state.pt"
    goes_on = args.resume and (state.is_file() or not (folder / "model").is_dir())
    if metrics.is_file() and metrics.stat().st_size and not goes_on:
        way = "it has no checkpoint for --resume True: remove it"
        way = way if (folder / "model").is_dir() else "--resume True begins it anew"
        way = "--resume True goes on with it" if state.is_file() else way
        raise InputError(
            f"--output_dir {folder}: holds a run already; {way}, or take another folder"
        )


def refuse_finished(path, args, own=None):
    """As utils.refuse_finished says."""
    if not Path(path).is_file():
        return
    with in_one_line(f"{path}: no result of this version; remove it"):
        report = json.loads(Path(path).read_text(encoding="utf-8"))
        had = dict(report.get(own, report)["args"])
    for name, value in plain(asdict(args)).items():
        if name != "output_dir" and had.get(name) != value:
            ways = "give another --output_dir, or remove it"
            raise InputError(f"{path}: the result of another --{name} is there; {ways}")


def load(log):
    """What was saved last; None if nothing was."""
    if not log.checkpoint.is_file():
        where = f"no checkpoint in {log.folder}, so the run starts at step 1"
        return print(f"--resume: {where}", file=sys.stderr)
    with in_one_line(f"{log.checkpoint}: {BAD}"):
        saved = torch.load(log.checkpoint, map_location=DEVICE, weights_only=True)
        needed = {"args", "data", "rng", "sizes", "step", *log.parts}
        if missing := needed - saved.keys():
            raise KeyError(f"{min(missing)} is missing")
    for name in saved["args"] | log.config["args"]:
        part = "data" if name in saved["data"] | log.config["data"] else "args"
        # a folder may be written with a slash at its end
        values = [str(of[part].get(name)).rstrip("/") for of in (saved, log.config)]
        same = values[0] == values[1]
        had, now = saved["args"].get(name), log.config["args"].get(name)
        longer = name == "total_steps" and now >= saved["step"]  # the learning rate is constant
        if not (same or longer or name in ("resume", "output_dir")):
            problem = f"is {now}, the run in {log.folder} had {had}"
            problem += " and other data" * (part == "data")
            raise InputError(f"--{name}: {problem}; cannot --resume")
    return saved


def restore(log, saved):
    """Set log.parts and the random numbers to go on from what load() found, if anything."""
    if saved is None:
        return
    with in_one_line(f"{log.checkpoint}: {BAD}"):
        torch.set_rng_state(saved["rng"]["cpu"].cpu())
        if saved["rng"]["cuda"] is not None:
            torch.cuda.set_rng_state(saved["rng"]["cuda"].cpu())
        for name, part in log.parts.items():
            if isinstance(part, Engine):
                part.load_state(saved[name])
            elif missing := part.keys() - saved[name].keys():
                raise ValueError(f"of another version: {name} has no {min(missing)}")
            else:
                part.update(saved[name])


def save(log, step):
    """Written aside and renamed: a kill or a full disk leaves the last good checkpoint, and
    training goes on."""
    cuda = torch.cuda.get_rng_state() if DEVICE.type == "cuda" else None
    saved = log.config | {"step": step, "rng": {"cpu": torch.get_rng_state(), "cuda": cuda}}
    path, aside = log.checkpoint, f"{log.checkpoint}.tmp"
    try:
        for name, part in log.parts.items():
            beside = path.parent / f"step-{step}-{name}"
            saved[name] = part.state(beside) if isinstance(part, Engine) else part
        if backend.writes:
            saved["sizes"] = {name: (log.folder / name).stat().st_size for name in log.FILES}
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(saved, aside)
            os.replace(aside, path)
        backend.saved(path.parent, step)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            Path(aside).unlink()
        problem = f"no checkpoint written ({first_line(error)}); the last one stays"
        print(f"step {step}: {problem}", file=sys.stderr)
