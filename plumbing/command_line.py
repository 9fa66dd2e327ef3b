"""The command line of every script: flags are parsed and checked before any work, and an error is
one line."""

import contextlib
import io
import itertools
import os
import re
import sys
import tempfile
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_args, get_type_hints

import tyro

from large.backend import runner
from plumbing.checkpoints import refuse_begun
from large.flags import with_flags
from utils import InputError, in_one_line


def run(main, args_class, description):
    """Parse the flags and run main(args). Flags that a script does not have, as --deepspeed or
    --lora_rank, are those of flags.py, and then runner() runs it."""
    options = {"description": description, "config": (tyro.conf.FlagConversionOff,)}
    spec = sys.modules["__main__"].__spec__
    if spec and spec.origin == sys.argv[0]:  # usage shows what works, and no path
        options["prog"] = f"python -m {spec.name}"

    def parse(kind, **more):
        given, words = [], sys.argv[1:]
        for word, after in itertools.zip_longest(words, words[1:], fillvalue="--"):
            flag = "--" + word[2:].replace("-", "_")
            alone = flag in switches(kind) and after.startswith("--")  # --bf16 is --bf16 True
            given += [word, "True"] if alone else [word]
        with ending_in_a_line():
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


@contextlib.contextmanager
def ending_in_a_line():
    """tyro draws a box around what is wrong with the flags. Below it goes the line in which every
    error ends: the box's parts between its rules, without colours and help."""
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            yield
    except SystemExit as stop:
        text = re.sub(r"\x1b\[[\d;]*m|│", "", box.getvalue())
        _, *parts = re.split(r"^ *(?:[╭╰─]|-{5}).*$", text, flags=re.M)  # the first is its title
        parts = [" ".join(part.split()) for part in parts]
        parts = [part for part in parts if part and not re.match("For full|Argument help", part)]
        box.write(f"error: {'; '.join(parts)}\n" if stop.code else "")
        raise
    finally:
        print(box.getvalue(), end="", file=sys.stderr)


def switches(kind):
    """The flags of type bool of a dataclass, or of several for subcommands."""
    if is_dataclass(kind):
        return {f"--{f.name}" for f in fields(kind) if f.type in (bool, bool | None)}
    return {flag for part in get_args(kind) for flag in switches(part)}


READ = "model|policy|reference|reward|scorer|judge|data|responses"  # in flags of what is read


def with_flag(args, message):
    """The message with the flag whose value it begins with. Where several flags have this value all
    are named: to take one of them by the message's words would be a guess."""
    flags = []
    for name, value in vars(args).items():
        parts = value if isinstance(value, tuple) else (value,)
        begins = tuple(f"{part}{end}" for part in parts for end in (":", ", line"))
        flags += [f"--{name}"] * bool(re.search(READ, name) and message.startswith(begins))
    return f"{' and '.join(flags)} {message}".lstrip()


def check_flags(args):
    """Every number is what its type says, and else none is negative; what is to be written can be,
    and writes over no model that is read."""
    for name, hint in get_type_hints(type(args), include_extras=True).items():
        value, kinds = getattr(args, name), (hint, *get_args(hint))
        rules = [rule for kind in kinds for rule in getattr(kind, "__metadata__", ())]
        rules = [rule for rule in rules if isinstance(rule, tuple)]
        several = isinstance(value, tuple)
        for number in value if several else (value,):
            for must, holds in rules or [("0 or more", lambda x: several or x >= 0)]:
                if type(number) in (int, float) and not holds(number):
                    raise InputError(f"--{name} {number}: must be {must}")
    for name in ("output_dir", "output_path", "output_file"):
        if path := getattr(args, name, None):
            check_output(f"--{name} {path}", Path(path).absolute(), name == "output_dir")
    if getattr(args, "output_dir", None):
        refuse_inputs(args, Path(args.output_dir))
    if hasattr(args, "resume"):  # before models load
        refuse_begun(args)


FILES = {".json", ".jsonl", ".md", ".npz", ".png", ".html", ".txt", ".tmp"}
FOLDERS = {"model", "checkpoint", "embeddings", "tensorboard", "reward_card"}


def check_output(flag, path, is_folder):
    """Try to make the folder, or the file, before anything is computed for it. It is made within a
    folder of another name, which goes: a folder without a result would be a trace of nothing."""
    folder = path if is_folder else path.parent
    above = next(p for p in (folder, *folder.parents) if os.path.lexists(p))
    problem = in_one_line(f"{flag}: cannot be made in {above}")
    with problem, tempfile.TemporaryDirectory(dir=above) as trial:
        made = Path(trial, folder.relative_to(above))
        made.mkdir(parents=True, exist_ok=True)
        (made / f"{'' if is_folder else path.name}.tmp").touch()  # as write_aside names it
    if path.is_dir() and not is_folder:
        raise InputError(f"{flag}: is a folder; name a file")
    for found in sorted(folder.iterdir()) if is_folder and folder.is_dir() else ():
        if found.is_dir() and found.suffix in FILES:
            raise InputError(f"{flag}: {found} is a folder, where a file is written; remove it")
        if found.is_file() and found.name in FOLDERS:
            raise InputError(f"{flag}: {found} is a file, where a folder is written; remove it")


def refuse_inputs(args, folder):
    """A model that is read must not be written over, nor its config.json by a run's."""
    written = [folder, *[folder / "model"] * hasattr(args, "resume")]
    written = [path for path in written if any(path.glob("*.safetensors"))]
    for name, value in vars(args).items():
        for part in value if isinstance(value, tuple) else (value,):
            read = isinstance(part, str) and name != "output_dir" and os.path.exists(part)
            if read and any(path.samefile(part) for path in written):
                problem = f"would write over --{name} {part}; take another folder"
                raise InputError(f"--output_dir {folder}: {problem}")
