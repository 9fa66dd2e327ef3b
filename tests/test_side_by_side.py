"""The pages of `make docs`: each line of each script is there, escaped; what is broken ends the build with one line."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tools import side_by_side
from tools.side_by_side import SCRIPTS, Prose, build, figure, links, mathml, page, resolve, rows, words

ROOT = Path(__file__).parents[1]
VOID = {"meta", "br", "rect", "path", "mspace", "th"}  # th: the index leaves them open


class Seen(HTMLParser):
    """Tags, anchors, links and text of a page, read by another parser than the builder's."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.ids, self.hrefs, self.text = [], [], [], [], []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.open += [tag] if tag not in VOID else []
        self.ids += [value for name, value in attributes if name == "id"]
        self.hrefs += [value for name, value in attributes if name == "href"]
        assert not {"src", "onerror", "onload", "srcset"} & {name for name, _ in attributes}

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def sources():
    return {path: (ROOT / path).read_text(encoding="utf-8") for path in SCRIPTS}


@pytest.fixture(scope="module")
def pages(sources):
    return build(sources)


def test_the_generator_is_small_and_no_script_needs_it():
    assert (ROOT / "tools" / "side_by_side.py").stat().st_size <= 15 * 1024
    for path in [*ROOT.glob("*.py"), *(ROOT / "baselines").glob("*.py"), *(ROOT / "large").glob("*.py")]:
        assert not re.search(
            r"side_by_side|tools\.equations|tools import .*equations", path.read_text(encoding="utf-8")
        )


def test_pages_load_nothing_and_their_links_lead_somewhere(pages):
    assert {*pages} == {"index.html", *(f"{Path(path).stem}.html" for path in SCRIPTS)}
    seen = {name: Seen(html) for name, html in pages.items()}
    for name, of in seen.items():
        assert len(pages[name].encode()) < 2**20
        assert not {"script", "link", "img", "iframe", "object", "merror"} & {*of.tags}
        assert "url(http" not in pages[name] and "@import" not in pages[name]
        assert len({*of.ids}) == len(of.ids)
        for href in of.hrefs:
            to, _, anchor = href.partition("#")
            assert not anchor or anchor in seen[to or name].ids, (name, href)
            assert (to or name) in seen, (name, href)


@pytest.mark.parametrize("path", SCRIPTS)
def test_every_line_stands_on_one_side(path, sources, pages):
    """Code with its number on the right, docstrings and comment lines on the left: nothing is lost or moved."""
    seen, source = Seen(pages[f"{Path(path).stem}.html"]), sources[path]
    numbers = [n for *_, of_row in rows(source) for n in of_row]
    assert numbers == sorted({*numbers})
    assert {int(i[1:]) for i in seen.ids if re.fullmatch(r"L\d+", i)} >= {
        n for n in numbers if source.split("\n")[n - 1].strip()
    }
    prose = " ".join(line.strip() for _, _, lines, _ in rows(source) for line in lines)
    left = prose + source[: source.index('"""', 3)] + " ".join(heading for heading, *_ in rows(source))
    for n, line in enumerate(source.split("\n"), 1):
        if n not in numbers and (said := line.strip(' "#-=')) and not said.startswith("end of"):
            # a docstring is read, so that \\ is \ there
            assert said.rstrip("\\").strip() in left or said.replace("\\\\", "\\") in left, (n, line)


@pytest.mark.parametrize(
    ("name", "anchors"),
    {
        "nano": ["eq-2", "gae", "policy-clip", "value-clip", "eq-9"],
        "sft": ["nll"],
        "am_train": ["eq-1", "eq-5", "eq-6", "eq-7", "eq-8", "ece", "p-6"],
        "ppo_sr": ["eq-2", "gae", "policy-clip", "value-clip", "eq-9", "token_rewards", "L100"],
        "evaluate": ["ece", "p-6"],
        "rejection_sampling": ["eq-3", "eq-4"],
    }.items(),
)
def test_equations_have_anchors(name, anchors, pages):
    seen = Seen(pages[f"{name}.html"])
    assert {*anchors} <= {*seen.ids}
    for anchor in anchors:
        if not re.match("L|token", anchor):
            assert re.search(rf'<div class="equation" id="{anchor}">.*?<math', pages[f"{name}.html"])


def test_every_page_has_its_figure(pages):
    for path in SCRIPTS:
        name = Path(path).stem
        assert f'aria-label="Data flow of {name}"' in pages[f"{name}.html"]
    assert figure("ppo_sr").count('class="stage"') == 5 and figure("no_such_script") == ""


def test_the_index_has_the_lines_of_each_equation(pages, sources):
    line = sources["ppo_sr.py"].split("\n").index("def rehearsal_loss(logprobs, count):  # (tokens,)") + 1
    assert f'<a href="ppo_sr.html#L{line}">ppo_sr.py:{line}</a> rehearsal_loss' in pages["index.html"]
    assert '<a href="ppo_sr.html#eq-9">Eq. 9</a>' in pages["index.html"]  # not nano's
    assert "docs/EQUATIONS.md" in pages["index.html"]


HOSTILE = """<script>document.title='run'</script><img src=x onerror="alert(1)"> " href="?eq-99" & \\0"""


def test_everything_is_escaped():
    """Text of a docstring, comment, string, banner, name of a file: on the page as text, never as markup."""
    source = f'''"""{HOSTILE}

    {HOSTILE}
"""

# --- {HOSTILE} ---


def f():
    """`{HOSTILE}` {HOSTILE}

    a  {HOSTILE}
    """
    # {HOSTILE}
    return {HOSTILE!r}  # {HOSTILE}
'''
    html = page(f"{HOSTILE}.py", source, set())
    seen = Seen(html)
    assert not {"script", "img"} & {*seen.tags}
    assert "".join(seen.text).count("<script>document.title=") >= 8
    resolve({f"{name}.html": page(f"{name}.py", source, set()) for name in (*side_by_side.PAGES.split("|"), "index")})


def test_mentions_become_links_and_symbols_symbols():
    assert links("Eq. 1, 5-8 and") == ('Eq. <a href="?eq-1">1</a>, <a href="?eq-5">5</a>-<a href="?eq-8">8</a> and')
    assert links("[p. 6] p. 6") == '[p. <a href="?p-6">6</a>] p. 6'
    assert links("nano.py, tests/nano.py, mynano.py") == '<a href="nano.html">nano.py</a>, tests/nano.py, mynano.py'
    assert words("y_c under pi_init, `y_c`, pi'_k, kl_coef, y_<t, V_{t+1}, sum_k") == (
        "<i>y</i><sub>c</sub> under <i>π</i><sub>init</sub>, <code>y_c</code>, <i>π</i>'<sub>k</sub>, kl_coef, "
        "<i>y</i><sub>&lt;t</sub>, <i>V</i><sub>t+1</sub>, <i>Σ</i><sub>k</sub>"
    )


def test_aligned_lines_stay_as_they_are():
    html = Prose(set()).html("One sentence.  And one more:\n\n    a = b\n      c\n\nclip    min(w, clip)\nlength  w\n")
    assert html.count("<pre") == 2 and "<p>One sentence.  And one more:</p>" in html
    assert ">a = b\n  c</pre>" in html and ">clip    min(w, clip)\nlength  w</pre>" in html


@pytest.mark.parametrize(
    "latex",
    [
        r"\foo x",
        r"\frac{a",
        r"a}",
        r"x^",
        r"\left( a",
        r"\begin{align*}a",
        r"a & b",
        r"\begin{aligned}a&b\end{aligned}",
    ],
)
def test_broken_mathematics_ends_the_build(latex, sources, monkeypatch):
    with pytest.raises(Exception):  # noqa: B017  whatever the converter says
        mathml(latex)
    equations = [of | {"latex": latex} if of["anchor"] == "eq-1" else of for of in side_by_side.TABLE["equation"]]
    monkeypatch.setitem(side_by_side.TABLE, "equation", equations)
    with pytest.raises(SystemExit, match=r"^side_by_side.toml, eq-1, [^\n]*$"):
        build(sources)


@pytest.mark.parametrize(
    ("path", "old", "new", "said"),
    [
        ("ppo_sr.py", "A_t = sum_k", "A_t = 2 sum_k", "side_by_side.toml: no script has 'A_t = sum_k"),
        ("nano.py", "# [Eq. 9]", f"# [Eq. {11}]", "nano.html: no page has the equation eq-11"),
        ("sft.py", '"""Supervised', f'"""See Eq. {10}. Supervised', "index.html: no page has the equation eq-10"),
        ("sft.py", '"""Supervised', '"""See [p. 7]. Supervised', "index.html: no page has the equation p-7"),
        ("evaluate.py", "def stated(", "def winrate(", None),  # two functions of one name: the first has the anchor
        ("evaluate.py", "def stated(", "def ece(", "evaluate.html: an anchor stands twice"),
    ],
)
def test_what_is_broken_is_named_in_one_line(path, old, new, said, sources):
    assert old in sources[path]
    changed = sources | {path: sources[path].replace(old, new, 1)}
    if said is None:
        assert build(changed)
        return
    with pytest.raises(SystemExit) as error:
        build(changed)
    assert str(error.value).startswith(said) and "\n" not in str(error.value)


def test_a_dead_link_is_named():
    with pytest.raises(SystemExit, match=r"a.html: the link #no is dead"):
        resolve({"a.html": '<a href="#no">'})
    with pytest.raises(SystemExit, match=r"a.html: the link https://example.org/ is dead"):
        resolve({"a.html": '<a href="https://example.org/">'})
    assert resolve({"a.html": '<a href="?eq-1">', "b.html": '<p id="eq-1">'})["a.html"] == '<a href="b.html#eq-1">'
