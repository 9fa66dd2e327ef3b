"""docs/EQUATIONS.md: every tag has a test, every equation a tag, and the page is what the scripts say."""

import ast
import re
from pathlib import Path

import pytest

from tools.equations import PAGE, PAPER, SCRIPTS, functions, page, read, table, tags

ROOT = Path(__file__).parents[1]


@pytest.fixture
def sources():
    return read()


def test_the_page_is_what_the_scripts_say():
    """Where this fails: python -m tools.equations"""
    assert PAGE.read_text(encoding="utf-8") == page(table())


def test_the_page_is_short():
    text = PAGE.read_text(encoding="utf-8")
    assert len(text.split()) <= 350
    assert {f"Eq. {n}" for n in range(1, 10)} <= {row["tag"] for row in table()}


def test_tags_of_the_paper_alone():
    text = "[Eq. 5, 8] a [Eq. 8, K = 0] b [DPO, Eq. 7] [p. 6] [PRO, Eq. 5] Eq. 2 [Eq. 9]"
    assert [*tags(text)] == ["Eq. 5", "Eq. 8", "Eq. 8", "p. 6", "Eq. 9"]
    assert [*tags(f"[Eq. {10}]")] == [f"Eq. {10}"]  # of two digits


def test_what_defines_stands_before_what_uses():
    source = """'[Eq. 1]'\ndef use():\n    f()  # [Eq. 2]\n\n
def other():\n    '[Eq. 1, 2]'\n\ndef f():\n    '[Eq. 2]'"""
    both = ("Eq. 1", "Eq. 2")
    assert functions(source) == {
        "Eq. 1": [("other", 6, both)],
        "Eq. 2": [("f", 9, ("Eq. 2",)), ("other", 6, both), ("use", 2, ("Eq. 2",))],
    }


@pytest.mark.parametrize("number", range(1, 10))
def test_an_equation_without_a_tag_or_a_test_is_named(number, sources):
    """Take all tags of one equation away, or rename its tests: one line says which."""
    untagged = {p: re.sub(rf"(\[Eq\. [^]]*)\b{number}\b", r"\1", text) for p, text in sources.items()}
    # the tests of Eq. 8 hold Eq. 5, too, which stands first
    said = r"\[Eq. 5\] .*: no test" if number == 8 else rf"\[Eq\. {number}\]: no function"
    with pytest.raises(SystemExit, match=said):
        table(untagged)
    of, first = ("[58]", 5) if number in (5, 8) else (number, number)
    untested = {p: re.sub(rf"def test_eq_?{of}_", "def test_of_", text) for p, text in sources.items()}
    with pytest.raises(SystemExit, match=rf"\[Eq\. {first}\] .*: no test is called"):
        table(untested)


def test_an_equation_that_the_paper_does_not_have_is_named(sources):
    sources["ppo_sr.py"] += f'\n\ndef more():\n    """[Eq. {12}]  more"""\n'
    with pytest.raises(SystemExit, match=rf"ppo_sr.py: the paper has no \[Eq. {12}\]"):
        table(sources)


def test_each_pure_function_with_a_tag_is_named_in_a_test():
    """Functions of numbers alone; what takes args, models or a run is tested by running it."""
    tested = [p.read_text(encoding="utf-8") for p in (ROOT / "tests").glob("test_*.py")]
    found = []
    for path in SCRIPTS:
        for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and [*tags((ast.get_docstring(node) or "")[:12])]:
                names = {argument.arg for argument in node.args.args}
                if not names & {"args", "ppo", "self", "engine"}:
                    words = re.escape(node.name), re.escape(Path(path).stem)
                    found.append(node.name)
                    assert any(all(re.search(rf"\b{w}\b", text) for w in words) for text in tested), node.name
    assert {"token_rewards", "advantage", "advantage_model_loss", "rehearsal_loss", "best_of_k"} <= {*found}


def test_the_metrics_are_written_by_the_scripts():
    """Each name in the page's last column is a string of a script, or a tool or flag that there is."""
    text = "".join((ROOT / path).read_text(encoding="utf-8") for path in SCRIPTS)
    for _, _, metrics in PAPER.values():
        for name in re.findall(r"`([^`]+)`", metrics):
            if name.startswith("--"):
                flag, value = name[2:].split()
                assert re.search(rf'\b{flag}: Literal\[.*"{value}"', text), name
            elif name.startswith("tools/"):
                assert (ROOT / name).is_file(), name
            else:
                assert f'"{name.removeprefix("eval/")}"' in text, name
