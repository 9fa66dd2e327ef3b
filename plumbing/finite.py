"""A number that is NaN, infinite or too large to go on with ends a run, and no model is saved."""

import math
import re
from dataclasses import fields

from torch import nn

from utils import InputError, write_json

LARGEST_WEIGHT = 1e6  # none of a model that works is near it, and activations would overflow


def check(log, what, value, step, batch, most=math.inf):
    """End the run `log` unless |value| < most, with the batch on disk."""
    if not abs(value) < most:
        path = log.folder / "bad_batch.json"
        write_json(path, {"step": step, what: str(value), "batch": batch})
        problem = f"the {what} is {value:.3g}; its batch is in {path}"
        raise InputError(f"step {step}: {problem}; lower {' or '.join(suspects(log.args))}")


def take_step(log, engine, whose, step, batch):
    """One optimiser step -> the gradients' norm. The weights are looked at here, and not by the
    next pass over them: after the last step there is none. (Those of ZeRO-3 are not whole here.)"""
    norm = engine.step()
    check(log, f"{whose}gradient norm", norm, step, batch)
    trained = [p.detach() for p in engine.module.parameters() if p.requires_grad and p.numel()]
    largest = nn.utils.get_total_norm(trained, math.inf).item()
    check(log, f"{whose}largest weight", largest, step, batch, LARGEST_WEIGHT)
    return norm


def suspects(args):
    """The flags that scale losses or updates and stand above their defaults: those are known to
    work, and nobody should lower a flag that is innocent."""
    scales = re.compile("_rate$|_coef$|_scale$|_penalty$|weight_decay|max_grad_norm")
    given = [(f"--{f.name}", f.default, getattr(args, f.name)) for f in fields(args)]
    raised = [name for name, default, value in given if scales.search(name) and value > default]
    return raised or ["--learning_rate"]
