"""docs/EQUATIONS.md: where each equation of the paper stands in the code, and which tests hold it.

    python -m tools.equations          # seconds; writes the page

A tag such as [Eq. 6] in a docstring or comment says which equation a function holds. This reads the
tags, and the names of the tests. The page names functions, not lines: lines move with every edit,
and the page would be stale each time. `make docs` builds pages with the lines.
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "EQUATIONS.md"
NAMES = ("nano", "sft", "am_train", "select_rehearsal", "ppo_sr", "evaluate")
SCRIPTS = (*(f"{name}.py" for name in NAMES), "baselines/rejection_sampling.py")
PAPER = {  # tag: where in the paper, what it is, metrics of the run folder (or a tool)
    "Eq. 1": ("§2", "loss of the reward model", "`loss` (`--loss rm`)"),
    "Eq. 2": ("§2", "reward of PPO", "`objective/rlhf_reward`, `objective/kl`"),
    "Eq. 3": ("§2", "what rejection sampling keeps", "`objective/kept`, `objective/kept_scores`"),
    "Eq. 4": ("§2", "loss of rejection sampling", "`loss`"),
    "Eq. 5": ("§3.1", "advantage, importance weights", "printed by `tools/write_logprobs.py`"),
    "Eq. 6": ("§3.1", "loss of the advantage model", "`loss` (`--loss am`)"),
    "Eq. 7": ("§3.1", "expected reward", "in `loss` (`--expected_reward regress`)"),
    "Eq. 8": ("§3.1", "practical advantage", "`objective/scores`"),
    "Eq. 9": ("§3.2", "loss of PPO-SR", "`loss/policy_avg`, `loss/rehearsal_nll`"),
    "p. 6": ("§4.3", "calibration", "`eval/accuracy`, `eval/ece`, `eval/brier`, `eval/nll`"),
}

INTRODUCTION = """# Where each equation stands

`python -m tools.equations` writes this page from the tags in the scripts, such as [Eq. 6]. A test
fails when an equation has no tag, when a tag has no test, or when this page is stale. Within a
script, the functions that define an equation stand first. `python -m pytest tests -k eq6_` runs the
tests of one equation. `tests/test_nano.py` compares the numbers of `nano.py` with those of
`ppo_sr.py`. `make docs` builds pages with typeset equations beside numbered code.

| equation | paper | what | function | tests | metric |
|---|---|---|---|---|---|"""


def tags(text):
    """The paper's tags in a text: "[Eq. 5, 8]" is two of them, "[DPO, Eq. 7]" is another's."""
    for kind, first, more in re.findall(r"\[(Eq\.|p\.) (\d+)((?:, \d+)*)[^]]*\]", text):
        yield from (f"{kind} {number}" for number in re.findall(r"\d+", first + more))


def functions(source):
    """{tag: [(function, line, tags of its bracket)]} of a script; its own docstring is no place.
    First come functions whose docstring begins with the tag."""
    found, lines = [], source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            doc = ast.get_docstring(node) or ""
            text = "\n".join(lines[node.lineno - 1 : node.end_lineno])
            for bracket in re.findall(r"\[[^]]*\]", text):
                together = [*tags(bracket)]
                for tag in together:
                    uses = 2 - doc.startswith(bracket) - doc.startswith(f"[{tag}")
                    found.append((uses, node.lineno, node.name, tag, tuple(together)))
    of_tag = {}
    for _, line, name, tag, together in sorted(found):
        of_tag.setdefault(tag, {}).setdefault((name, line), together)
    return {tag: [(*place, of) for place, of in places.items()] for tag, places in of_tag.items()}


def test_prefix(tag):
    """How the tests of an equation begin: test_eq9_ or test_eq_9_; of p. 6, the ECE: test_ece_."""
    return "test_ece_" if tag == "p. 6" else rf"test_eq_?{tag.removeprefix('Eq. ')}_"


def tests(tag, sources):
    """[(prefix, file)] of the tests of one equation."""
    found = {}
    for path, source in sources.items():
        for prefix in re.findall(rf"^def ({test_prefix(tag)})", source, re.M):
            found[prefix, path] = None
    return [*found]


def table(sources=None):
    """[{tag, section, what, functions, tests, metrics}] of each equation. A tag without an equation
    or a test, or an equation without a tag, ends the program with one line."""
    sources = sources or read()
    scripts = {path: functions(sources[path]) for path in SCRIPTS}
    tested = {path: text for path, text in sources.items() if path.startswith("tests/")}
    for path, found in scripts.items():
        if unknown := [tag for tag in found if tag not in PAPER]:
            raise SystemExit(f"{path}: the paper has no [{unknown[0]}]")
    rows = []
    for tag, (section, what, metrics) in PAPER.items():
        places = [(p, *place) for p, found in scripts.items() for place in found.get(tag, ())]
        if not places:
            raise SystemExit(f"[{tag}]: no function of the scripts has this tag")
        # the tests of [Eq. 5, 8] are those of either
        together = dict.fromkeys([tag, *(other for *_, of in places for other in of)])
        of_tag = next((t for t in (tests(other, tested) for other in together) if t), None)
        if not of_tag:
            raise SystemExit(f"[{tag}] {places[0][0]}: no test is called {test_prefix(tag)}...")
        columns = {"functions": [place[:3] for place in places], "tests": of_tag}
        rows.append({"tag": tag, "section": section, "what": what, "metrics": metrics} | columns)
    return rows


def read():
    """{path: text} of the scripts and the tests."""
    paths = [*SCRIPTS, *(f"tests/{p.name}" for p in sorted((ROOT / "tests").glob("test_*.py")))]
    return {path: (ROOT / path).read_text(encoding="utf-8") for path in paths}


def page(rows):
    lines = [INTRODUCTION]
    for row in rows:
        of_file = {}
        for path, name, _ in row["functions"]:
            of_file.setdefault(path, []).append(f"`{name}`")
        places = "; ".join(f"[{Path(p).name}](../{p}) {', '.join(n)}" for p, n in of_file.items())
        held = ", ".join(f"`{prefix}…` in [{Path(p).name}](../{p})" for prefix, p in row["tests"])
        cells = row["tag"], row["section"], row["what"], places, held, row["metrics"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(table()), encoding="utf-8")
