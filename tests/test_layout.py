"""What the layout promises to a reader: checked here, so that it stays so."""

import ast
import dataclasses
import importlib
import inspect
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = ("sft.py", "am_train.py", "select_rehearsal.py", "ppo_sr.py", "evaluate.py", "nano.py")
BASELINES = sorted((ROOT / "baselines").glob("[!_]*.py"))

# --- no line of a script knows of other processes -------------------------------------------------

PROCESSES = r"ranks?|worlds?|dealt|gather\w*|largest|leave_to\w*|torchrun|process|processes|ds_\w+"
PROCESSES += r"|shard\w*|distributed|dist|all_reduce|barrier|local_rank|nodes?"
OTHERWISE = {  # words that mean something else there
    "sft.py": {"world"},  # the toy world
    "am_train.py": {"rank", "largest"},  # of texts; a weight
    "select_rehearsal.py": {"rank", "ranks"},  # of pairs in a cluster
    "ppo_sr.py": {"gather"},  # of a tensor
    "evaluate.py": {"world"},
    "nano.py": {"world", "gather"},
    "utils.py": {"ds_accelerator"},  # not to be warned by DeepSpeed
}


@pytest.mark.parametrize("name", [*SCRIPTS, "utils.py"])
def test_no_line_knows_of_other_processes(name):
    """What many processes need stands behind the methods of utils.Backend, in large/."""
    text = (ROOT / name).read_text(encoding="utf-8")
    if name == "utils.py":
        text = text[: text.index("class Backend:")] + text[text.index("backend = Backend()") :]
    found = []
    for line in text.splitlines():
        words = {word.lower() for word in re.findall(rf"\b(?:{PROCESSES})\b", line, re.I)}
        called = re.search(r"\b(rank|world)\(\)|\brank [=!]=", line)
        if called or words - OTHERWISE.get(name, set()):
            found.append(line)
    assert not found, "\n".join(found)


# --- what a reader opens --------------------------------------------------------------------------

BUDGETS = {"utils": 22, "am_train": 22, "ppo_sr": 28, "select_rehearsal": 13, "evaluate": 21}  # KB
BUDGETS |= {"sft": 8, "nano": 11} | {f"baselines/{path.stem}": 15 for path in BASELINES}
FLAGS = {"ppo_sr": 42, "am_train": 30}
# where an import stands inside the function or the branch that needs it
OPTIONAL = {"evaluate": {"tools.judges", "tools.score"}}
LAZY = {f"plumbing.{name}" for name in ("checkpoints", "command_line", "fits", "run_folder", "scorers")}
OURS = {path.stem for path in ROOT.glob("*.py")} | {"baselines", "benchmarks", "large", "miniature"}
OURS |= {"plumbing", "studies", "tests", "tools"}


def imports(path, everywhere=False):
    """Names of our modules that a file imports: at its top, or `everywhere`, in functions too."""
    tree, found = ast.parse(path.read_text(encoding="utf-8")), set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            below = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name for name in below if module_file(name)} or {node.module}
    return {name for name in found if name.split(".")[0] in OURS}


def module_file(name):
    path = ROOT / name.replace(".", "/")
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()), None)


@pytest.mark.parametrize("name", BUDGETS)
def test_kilobytes(name):
    assert (ROOT / f"{name}.py").stat().st_size <= BUDGETS[name] * 1024


def test_the_readme_is_a_page():
    """At most 700 words beside its commands; docs/README.md has the rest."""
    text = re.sub(r"```.*?```|<[^>]+>", "", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.S)
    assert len(text.split()) <= 700


def anchors(path):
    """The fragments that a page's headings get on the usual hosts."""
    heads = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def test_no_link_is_dead():
    """Every relative link of the README and the docs leads to a file, and its fragment to a heading."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    links = [(page, link) for page in pages for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8"))]
    assert len(links) > 50
    for page, link in links:
        place, _, fragment = link.partition("#")
        if not re.match(r"[a-z]+:", link):
            target = page.parent / place if place else page
            assert target.exists(), f"{page.name}: {link}"
            assert not fragment or fragment in anchors(target), f"{page.name}: {link}"


def test_every_record_is_in_the_index():
    """docs/results/README.md says of each file what made it."""
    index = (ROOT / "docs/results/README.md").read_text(encoding="utf-8")
    names = {path.name for path in (ROOT / "docs/results").iterdir()} - {"README.md"}
    known = {*re.findall(r"[\w.]+\.(?:jsonl?|md|png)", index)}
    known |= {name.rsplit(".", 1)[0] + ".json" for name in known if f"`{name}`](" in index}  # "`, `.json`"
    assert names <= known, names - known


def test_the_docs_are_short():
    """The results aside: 10,000 words in all, 900 a page, without code, links' targets and the bars of tables. What was
    measured belongs into docs/results."""
    words = {}
    for page in (ROOT / "docs").rglob("*.md"):
        if "results" not in page.parts:
            text = re.sub(r"```.*?```|\]\([^)]*\)", "", page.read_text(encoding="utf-8"), flags=re.S)
            words[page.name] = sum(bool(re.search(r"\w", word)) for word in text.split())
    assert max(words.values()) <= 900 and sum(words.values()) <= 10_000, words


@pytest.mark.parametrize("name", FLAGS)
def test_flags(name):
    assert len(dataclasses.fields(importlib.import_module(name).Args)) <= FLAGS[name]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_imports_utils_and_nothing_else_of_ours(script):
    name = script.removesuffix(".py")
    at_the_top = set() if name == "nano" else {"utils"}
    assert imports(ROOT / script) == at_the_top
    assert imports(ROOT / script, everywhere=True) == at_the_top | OPTIONAL.get(name, set())


def test_utils_imports_plumbing_alone():
    """At its top what knows of no model; in the function that needs it what imports utils itself."""
    at_the_top = imports(ROOT / "utils.py")
    assert {name.split(".")[0] for name in at_the_top} == {"plumbing"} and not at_the_top & LAZY
    assert imports(ROOT / "utils.py", everywhere=True) == at_the_top | LAZY


def test_tools_import_no_script_that_imports_them():
    for path in (ROOT / "tools").glob("*.py"):
        assert "evaluate" not in imports(path, everywhere=True), path.name


def test_no_circle_of_imports():
    """Packages, and the scripts of the root: a walk along all imports comes back to none."""
    files = [p for p in ROOT.rglob("*.py") if p.relative_to(ROOT).parts[0] in {*OURS, p.name}]
    files = [p for p in files if "tests" not in p.parts and ".venv" not in p.parts]
    graph = {p: {f for name in imports(p) if (f := module_file(name))} for p in files}
    done, walking = set(), []

    def walk(path):
        assert path not in walking, [p.name for p in [*walking[walking.index(path) :], path]]
        if path not in done:
            walking.append(path)
            for below in graph.get(path, ()):
                walk(below)
            done.add(walking.pop())

    for path in files:
        walk(path)
    assert len(done) == len({*files})


def test_lines_are_short():
    """One idea a line, at most 100 characters; tests and tables of their own may have 120."""
    for path in [*ROOT.glob("*.py"), *(ROOT / "large").glob("*.py"), *(ROOT / "plumbing").glob("*.py"), *BASELINES]:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            assert len(line) <= 100, f"{path.name}, line {number}"


def test_copies_of_one_function_agree():
    """What a reader must see stands in each script that needs it."""
    import am_train
    import evaluate
    import sft

    copies = {"warmup_cosine": (am_train, sft)}
    for name in ("expected_calibration_error", "ranking_metrics", "score_balance"):
        copies[name] = am_train, evaluate
    for name, modules in copies.items():
        one, other = (inspect.getsource(getattr(module, name)) for module in modules)
        assert one == other, name


def test_nothing_else_stands_twice():
    """Copies are for a reader of the equations and metrics; what runs models has one place."""
    folders, places = ("", "baselines/", "large/", "plumbing/", "tools/"), {}
    for path in (path for folder in folders for path in ROOT.glob(f"{folder}*.py")):
        text = path.read_text(encoding="utf-8")
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef):
                of = node.name, ast.get_source_segment(text, node)
                places[of] = [*places.get(of, ()), path.name]
    twice = {name for (name, _), files in places.items() if len(files) > 1}
    assert twice - {"warmup_cosine", "expected_calibration_error", "ranking_metrics", "score_balance"} == {
        "numbered",
        "resample",
        "with_intervals",
    }
