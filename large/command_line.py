"""The command line of every script: flags are parsed and checked before any work, and an error is
one line."""

import itertools
import os
import re
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_args, get_type_hints

import tyro

from large.backend import runner
from large.flags import with_flags
from utils import InputError, refuse_begun


def run(main, args_class, description):
    """Parse the flags and run main(args). Flags that a script does not have, as --deepspeed or
    --lora_rank, are those of flags.py, and then runner() runs it."""
    options = {"description": description, "config": (tyro.conf.FlagConversionOff,)}

    def parse(kind, **more):
        given, words = [], sys.argv[1:]
        for word, after in itertools.zip_longest(words, words[1:], fillvalue="--"):
            flag = "--" + word[2:].replace("-", "_")
            alone = flag in switches(kind) and after.startswith("--")  # --bf16 is --bf16 True
            given += [word, "True"] if alone else [word]
        return tyro.cli(kind, args=given, use_underscores=True, **options, **more)

    args, unknown = None, {"-h", "--help"} & {*sys.argv}
    try:
        if not unknown:
            args, unknown = parse(args_class, return_unknown_args=True)
        if unknown or "WORLD_SIZE" in os.environ:
            args, main = parse(with_flags(args_class)), runner(main)
    except BrokenPipeError:  # `--help | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    from transformers.utils import logging  # not at the top: --help should not wait for it

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        check_flags(args)
        main(args)
    except InputError as error:
        print(f"error: {with_flag(args, str(error))}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        state = Path(getattr(args, "output_dir", None) or ".") / "checkpoint" / "state.pt"
        again = "; --resume True goes on from the last checkpoint" * state.is_file()
        print(f"\nstopped{again}", file=sys.stderr)
        sys.exit(130)


def switches(kind):
    """The flags of type bool of a dataclass, or of several for subcommands."""
    if is_dataclass(kind):
        return {f"--{f.name}" for f in fields(kind) if f.type in (bool, bool | None)}
    return {flag for part in get_args(kind) for flag in switches(part)}


def with_flag(args, message):
    """The message with the flag whose value it begins with: of two the later one, since what the
    earlier one wanted was there."""
    of = "model|policy|reference|reward|scorer|judge"
    for words, flags in (
        (" rows|, line ", "data|responses"),
        ("reward head|labels", "reward|scorer|judge"),
        ("language-model head", "model_name|policy|reference"),
    ):
        of = flags if re.search(words, message) else of
    for name, value in reversed(vars(args).items()):
        for part in value if isinstance(value, tuple) else [value]:
            if re.search(of, name) and message.startswith((f"{part}:", f"{part}, line")):
                return f"--{name} {message}"
    return message


def check_flags(args):
    """Every number is what its type says, and none is negative; the output folder can be made."""
    for name, hint in get_type_hints(type(args), include_extras=True).items():
        value, kinds = getattr(args, name), (hint, *get_args(hint))
        rules = [rule for kind in kinds for rule in getattr(kind, "__metadata__", ())]
        rules = [rule for rule in rules if isinstance(rule, tuple)] or [
            ("0 or more", lambda x: x >= 0)
        ]
        for must, holds in rules if type(value) in (int, float) else ():
            if not holds(value):
                raise InputError(f"--{name} {value}: must be {must}")
    folder = Path(getattr(args, "output_dir", None) or ".").absolute()
    above = next(p for p in (folder, *folder.parents) if p.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise InputError(f"--output_dir {folder}: cannot be made in {above}")
    if hasattr(args, "resume"):  # before models load
        refuse_begun(args)
