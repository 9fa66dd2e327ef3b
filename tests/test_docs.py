"""The pages and the command lines agree: flags are described and read, commands can be typed as they stand."""

import ast
import json
import importlib
import re
import shlex
import sys
from pathlib import Path
from typing import get_args

import pytest

from plumbing import command_line

ROOT = Path(__file__).parents[1]
FOLDERS = ("", "baselines/", "benchmarks/", "large/", "miniature/", "plumbing/", "studies/", "tools/")
FILES = {path: path.read_text("utf-8") for folder in FOLDERS for path in ROOT.glob(f"{folder}*.py")}
CALL = re.compile(r"(?:run_cli\(main, ([\w.| ]+), __doc__\)|tyro\.cli\((Args), description)")
COMMANDS = {path: "".join(found[-1]) for path, text in FILES.items() if (found := CALL.findall(text))}
PAGES = [*ROOT.glob("*.md"), *(p for p in (ROOT / "docs").rglob("*.md") if "results" not in p.parts)]


def module_of(path):
    return importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))


def classes_of(path):
    """The dataclasses of a command's flags, of several subcommands all."""
    kind = eval(COMMANDS[path], vars(module_of(path)))
    return get_args(kind) or (kind,)


# --- flags ----------------------------------------------------------------------------------------


def fields_of(text):
    """{(class, field): whether words stand beside it} of the dataclasses in a file."""
    lines, found = text.splitlines(), {}
    for node in ast.walk(ast.parse(text)):
        if not (isinstance(node, ast.ClassDef) and any("dataclass" in ast.unparse(d) for d in node.decorator_list)):
            continue
        for field, after in zip(node.body, [*node.body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign) and not re.search("Unused|Suppress", ast.unparse(field.annotation)):
                below = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                beside = "#" in lines[field.end_lineno - 1] or lines[field.lineno - 2].strip().startswith("#")
                found[node.name, field.target.id] = below or beside
    return found


def flags():
    """(file, class, flag, whether it is described) of every command, and those of large/flags.py."""
    paths = {path: {kind.__name__ for kind in classes_of(path)} for path in COMMANDS}
    paths |= {ROOT / "large/flags.py": None, ROOT / "baselines/measure.py": None}
    for path, names in paths.items():
        for (kind, flag), described in fields_of(FILES[path]).items():
            if names is None or kind in names:
                yield path, kind, flag, described


def test_every_flag_is_described():
    found = list(flags())
    assert len(found) > 300
    assert not [f"{path.name}: {kind}.{flag}" for path, kind, flag, described in found if not described]


def test_every_flag_is_read():
    """As .flag, or by its name where flags are handed on as a whole."""
    everything = "\n".join(FILES.values())
    words = {*re.findall(r"\.(\w+)", everything)} | {*re.findall(r"[\"'](\w+)[\"']", everything)}
    assert not {f"{path.name}: {flag}" for path, _, flag, _ in flags() if flag not in words}


def test_a_field_without_words_is_found():
    text = "@dataclass\nclass Args:\n    a: int  # the first\n    b: int\n    c: int\n    '''the third'''\n"
    assert fields_of(text) == {("Args", "a"): True, ("Args", "b"): False, ("Args", "c"): True}


# --- commands -------------------------------------------------------------------------------------


def commands(text):
    """Commands of `python` in code blocks or docstrings, a command of several lines as one."""
    for line in re.sub(r"\s*\\+\n\s*", " ", text).replace("&&", "\n").splitlines():
        line = re.sub(r"(\s+#|\s{4,}).*", "", line.strip())  # a comment, a column of words
        line = re.sub(r"^torchrun (--(nnodes|nproc_per_node|rdzv_\w+) \S+ +|--standalone +)*", "python ", line).strip(
            " &"
        )
        known = re.match(r"python (-m (baselines|benchmarks|large|miniature|studies|tools)\.)?\w+(\.py| |$)", line)
        if known and not re.search(r"\.\.\.|…|[<\[{]| FLAGS", line):
            yield line


def all_commands():
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text("utf-8"), re.S):
            yield from ((page.relative_to(ROOT), line) for line in commands(block))
    for path, text in FILES.items():
        docstring = ast.get_docstring(ast.parse(text), clean=False) or ""
        indented = "\n".join(re.findall(r"^    .*$", docstring, re.M))
        yield from ((path.relative_to(ROOT), line) for line in commands(indented))


ALL = list(all_commands())


def parse(line, monkeypatch):
    """The command's flags as its script parses them; nothing runs."""
    _, *words = shlex.split(line)
    where = words[1].replace(".", "/") + ".py" if words[0] == "-m" else words[0]
    path, given = ROOT / where, words[2:] if words[0] == "-m" else words[1:]
    if path not in COMMANDS:  # a file with a parser of its own
        return path.is_file()
    if where == "large/plan_memory.py":  # it takes another script's command line
        given = module_of(path).without_others(given)
    found = []
    monkeypatch.setattr(sys, "argv", [where, *given])
    monkeypatch.setattr(command_line, "runner", lambda main: main)
    monkeypatch.setattr(command_line, "check_flags", lambda args: None)
    kind = eval(COMMANDS[path], vars(module_of(path)))
    command_line.run(found.append, kind, "")
    return len(found) == 1


@pytest.mark.parametrize(("page", "line"), ALL, ids=[f"{page}:{n}" for n, (page, _) in enumerate(ALL)])
def test_a_command_can_be_typed(page, line, monkeypatch):
    assert parse(line, monkeypatch)


def test_a_command_with_an_unknown_flag_is_found(monkeypatch, capsys):
    assert len(ALL) > 80
    with pytest.raises(SystemExit):
        parse("python am_train.py --model_name_or_path m --dataset_name d --output_dir o --los rm", monkeypatch)
    assert not parse("python -m tools.no_such_tool", monkeypatch)


# --- commands that run ----------------------------------------------------------------------------

SMALLER = {  # a README command's script: flags that end it in seconds
    "am_train.py": "--global_batch_size 4",
    "select_rehearsal.py": "--num_clusters 2 --response_length 60 --max_length 96 --embedding_model POLICY",
    "ppo_sr.py": "--total_steps 1 --global_batch_size 4 --rehearsal_batch_size 2 --response_length 60 --max_length 96",
    "evaluate.py": "--judge length --response_length 60 --max_length 96 --num_bootstrap 10",
}


def test_the_readmes_commands_run(policy_folder, tmp_path, monkeypatch):
    """One after the other, as they stand, with a small model and few rows in the places of a user's."""
    rows = [
        {"prompt": f"name {word}", "chosen": f"a {word} .", "rejected": f"no {word}"}
        for word in map("word{}".format, range(40))
    ]  # a random policy ends few
    text = "".join(json.dumps(row) + "\n" for row in rows)
    for name in ("pairs", "test", "prompts", "main", "forget"):
        (tmp_path / f"{name}.jsonl").write_text(text)
    monkeypatch.chdir(tmp_path)
    readme = (ROOT / "README.md").read_text("utf-8")
    lines = [line for block in re.findall(r"```bash\n(.*?)```", readme, re.S) for line in commands(block)]
    assert [line.split()[1] for line in lines] == list(SMALLER)
    for line in lines:
        script = line.split()[1]
        line = re.sub(r"Qwen/\S+|POLICY", str(policy_folder), f"{line} {SMALLER[script]}".replace("hf:", ""))
        kind, module = eval(COMMANDS[ROOT / script], vars(module_of(ROOT / script))), module_of(ROOT / script)
        monkeypatch.setattr(sys, "argv", shlex.split(line)[1:])
        command_line.run(module.main, kind, "")
    for written in ("am/eval.json", "select/rehearsal.jsonl", "ppo/metrics.jsonl", "winrate/winrate.json"):
        assert (tmp_path / "runs" / written).stat().st_size
