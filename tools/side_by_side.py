"""build/docs: a page for each script, its prose on the left and its numbered code on the right.

    make docs
    python -m tools.side_by_side          # the same; needs pygments and latex2mathml

The prose is the script's own: docstrings, and comments on lines of their own. side_by_side.toml
says how an equation of the prose is typeset, and what the figures show. Whoever changes an equation
of a script changes it there, too. Pages load nothing: mathematics is MathML, figures are SVG.

One line ends the build if mathematics is broken, if the table has an equation that no script has,
if the prose names an equation that no page typesets, or if a link or anchor is dead.
"""

import ast
import io
import re
import sys
import textwrap
import tokenize
import tomllib
import xml.etree.ElementTree as xml
from html import escape
from html.parser import HTMLParser
from pathlib import Path

from latex2mathml.converter import convert
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

from tools.equations import ROOT, SCRIPTS, table

HERE = Path(__file__)
CSS = HERE.with_suffix(".css").read_text(encoding="utf-8")
TABLE = tomllib.loads(HERE.with_suffix(".toml").read_text(encoding="utf-8"))
NAMES = {"gae": "GAE", "policy-clip": "policy clip", "value-clip": "value clip", "nll": "NLL"}
NAMES |= {"ece": "ECE", "p-6": "p. 6"} | {f"eq-{n}": f"Eq. {n}" for n in range(1, 10)}
PAGES = "|".join(Path(path).stem for path in SCRIPTS)


# --- pieces of a page: each takes text and gives HTML, escaped first ---


def links(html):
    """Equations and scripts that escaped text names become links; resolve() knows where to."""

    def equation(match):
        kind = "eq" if match[1] == "Eq. " else "p"
        return match[1] + re.sub(r"\d", rf'<a href="?{kind}-\g<0>">\g<0></a>', match[2])

    html = re.sub(r"\b(Eq\. )(\d(?:(?:, | and |-|–)\d\b)*\b)", equation, html)
    html = re.sub(r"(?<=\[)(p\. )(\d)(?=\])", equation, html)
    return re.sub(rf"(?<![\w/.>])({PAGES})\.py\b", r'<a href="\1.html">\g<0></a>', html)


def words(text):
    """A paragraph: `code`, symbols such as y_c and pi_init, links."""
    parts = re.split(r"`([^`]+)`", escape(text, quote=False))
    symbol = r"\b(pi|[A-Za-z])('?)_(\{[^}]+\}|&lt;t|(?:init|old|phi|ref|[a-zR])\b)"
    for i, part in enumerate(parts):
        if i % 2:
            parts[i] = f"<code>{part}</code>"
            continue
        part = re.sub(symbol, lambda m: f"<i>{m[1]}</i>{m[2]}<sub>{m[3].strip('{}')}</sub>", part)
        parts[i] = links(re.sub(r"\bpi\b", "π", re.sub(r"\bphi\b", "φ", part)))
    return "".join(parts)


def mathml(latex):
    """MathML of a display. The converter lets much pass that is no LaTeX: ValueError instead."""
    made = convert(latex, display="block").replace(r"\_", "_")
    bare = re.sub(r"\\[{}]", "", latex)
    if bare.count("{") != bare.count("}"):
        raise ValueError("braces do not match")
    sizes = {"mfrac": 2, "msub": 2, "msup": 2, "munder": 2, "mover": 2, "msubsup": 3}
    for node in xml.fromstring(made).iter():  # ParseError: an & outside a table
        name = node.tag.rpartition("}")[2]
        if len(node) != sizes.get(name, len(node)) or "\\" in (node.text or ""):
            raise ValueError(f"{name} {node.text or ''}")
    return made


class Prose:
    """Docstrings and comments of one page; `shown` has the anchors of its equations."""

    def __init__(self, used):
        self.shown, self.used = [], used

    def equation(self, number, tag):
        """A typeset equation; the first of its anchor on a page has it."""
        self.used.add(number)
        anchor, latex = (TABLE["equation"][number][key] for key in ("anchor", "latex"))
        try:
            made = mathml(latex)
        except Exception as error:
            problem = f"{type(error).__name__} {error}".strip()
            raise SystemExit(f"side_by_side.toml, {anchor}, {latex!r}: {problem}") from None
        label, identity = escape(tag or NAMES[anchor]), ""
        if anchor not in self.shown:
            self.shown.append(anchor)
            identity, label = f' id="{anchor}"', f'<a href="#{anchor}">{label}</a>'
        return f'<div class="equation"{identity}>{made}<span>{label}</span></div>'

    def html(self, text):
        """Paragraphs, equations, and what is indented or aligned as it stands."""
        typeset, blocks = [], []
        for number, of in enumerate(TABLE["equation"]):
            plain = r"\s+".join(map(re.escape, of["plain"].split()))
            whole = rf"(?:(?:\[([^]\n]*)\]|\b(?:GAE|PPO):)\s+)?(?<!\S){plain}(?!\S)"

            def put(match, number=number):
                typeset.append(self.equation(number, match[1]))
                return f"\n\0{len(typeset) - 1}\n"

            text = re.sub(whole, put, text)
        last = None
        for line in text.splitlines():
            kind = "pre" if re.match(r" |\S.*[^.\s] {2}", line) else "p"
            kind = "math" if line[:1] == "\0" else kind if line.strip() else ""
            if kind != last:
                blocks.append((kind, []))
            blocks[-1][1].append(line)
            last = kind
        out = []
        for kind, lines in blocks:
            if kind == "math":
                out += [typeset[int(line[1:])] for line in lines]
            elif kind == "pre":
                block = textwrap.dedent("\n".join(lines))
                out.append(f'<pre tabindex="0">{links(escape(block, quote=False))}</pre>')
            elif kind == "p":
                out.append(f"<p>{words(' '.join(lines))}</p>")
        return "\n".join(out)


# --- a script as rows ---


def rows(source):
    """[heading, anchor, prose lines, numbers of code lines] in the order of the script.

    A row begins at a comment line, at a function or class, and at a line whose comment has a tag.
    """
    docs, starts, found = {}, {}, []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)):
            doc = ast.get_docstring(node)
            if doc:
                of = node.body[0]
                docs |= dict.fromkeys(range(of.lineno, of.end_lineno + 1), "")
                docs[of.lineno] = doc
            if not isinstance(node, ast.Module) and (doc or node.col_offset <= 4):
                first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                starts[first] = node.name
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {t.start[0]: t.string.lstrip("#") for t in tokens if t.type == tokenize.COMMENT}
    plain = {of["plain"] for of in TABLE["equation"]}

    def new(heading="", anchor=""):
        found.append([heading, anchor, [], []])

    new()
    for n, line in enumerate(source.split("\n"), 1):
        code = line.split("#")[0].strip() if n in comments else line.strip()
        if n in docs:
            found[-1][2] += ["", *docs[n].splitlines()]
        elif n in comments and not code:
            text = comments[n].removeprefix(" ")
            if banner := re.fullmatch(r"(?:---|===) (.+?)[ =-]*", text):
                new(banner[1])
                continue
            if found[-1][3]:
                new()
            found[-1][2].append(text)
        else:
            if n in starts:
                if found[-1][3]:
                    new()
                found[-1][1] = starts[n]
            elif n in comments and code in plain:  # loss = ...  # [Eq. 9]
                new()
                found[-1][2].append(f"{comments[n].strip()}  {code}")
            if code or found[-1][3]:
                found[-1][3].append(n)
    return [row for row in found if any(row)]


def page(path, source, used):
    prose, body, ids = Prose(used), [], set()
    how = PythonLexer(stripnl=False, ensurenl=False), HtmlFormatter(nowrap=True)
    text, lines = source.split("\n"), links(highlight(source, *how)).split("\n")
    for heading, anchor, words_of_row, numbers in rows(source):
        while numbers and not text[numbers[-1] - 1].strip():
            numbers.pop()
        code = "".join(
            f'<a id="L{n}" href="#L{n}">{n}</a><span>{lines[n - 1]}\n</span>' for n in numbers
        )
        identity = f' id="{anchor}"' if anchor and anchor not in ids else ""
        ids.add(anchor)
        left = f"<h2>{words(heading)}</h2>" if heading else ""
        left += prose.html("\n".join(words_of_row).strip("\n"))
        right = f'<pre tabindex="0">{code}</pre>' if numbers else ""
        if body or numbers:
            left = f'<div class="prose">{left}</div><div class="code">{right}</div>'
        name = "section" if body or numbers else "div"
        body.append(f"<{name}{identity}>{left}</{name}>")
    jumps = " · ".join(f'<a href="#{anchor}">{NAMES[anchor]}</a>' for anchor in prose.shown)
    jumps = f"<p>On this page: {jumps}</p>" if jumps else ""
    name = Path(path).stem
    return whole(path, name, f"<h1>{escape(path)}</h1>{figure(name)}{jumps}{''.join(body)}")


def figure(name):
    """The data flow as SVG: what comes in on the left, stages below each other, what goes out."""
    boxes, arrows, chain, top, links_to = [], [], [], 2, (2, 154, 306)
    for line in TABLE["figure"].get(name, "").strip().splitlines():
        if line == "loop":
            arrows.append(f"M154 {chain[-1] + 30}h-8V{chain[0] + 12}h6")
        elif not line:
            chain, top = [], top + 16
        else:
            for column, (x, text) in enumerate(zip(links_to, line.split("|"), strict=True)):
                title, _, below = map(escape, text.strip().partition(": "))
                if title:
                    kind = "stage" if column == 1 else "file"
                    box = f'<rect class="{kind}" x="{x}" y="{top}" width="112" height="42" rx="5"/>'
                    at = f'x="{x + 56}" y="{top + (18 if below else 26)}"'
                    box += f'<text {at}>{title}</text><text class="below" x="{x + 56}" '
                    boxes.append(f'{box}y="{top + 33}">{below}</text>')
                    arrows += [f"M{x - 40} {top + 21}h38" for x in [(154, 0, 306)[column]] if x]
            if chain:
                arrows.append(f"M210 {top - 16}v14")
            chain.append(top)
            top += 58
    paths = "".join(f'<path d="{d}" marker-end="url(#tip)"/>' for d in arrows)
    tip = '<defs><marker id="tip" viewBox="0 0 6 6" refX="5" refY="3" markerWidth="6" '
    tip += 'markerHeight="6" orient="auto"><path d="M0 0L6 3L0 6z"/></marker></defs>'
    size = f'viewBox="0 0 420 {top - 14}" role="img" aria-label="Data flow of {escape(name)}"'
    return f"<svg {size}>{tip}{paths}{''.join(boxes)}</svg>" if boxes else ""


def whole(title, name, body):
    """A page. It has no script, and its policy lets it load nothing."""
    names = ["index", *PAGES.split("|")]
    here = ' aria-current="page"'
    nav = "".join(f'<a href="{n}.html"{here if n == name else ""}>{n}</a>' for n in names)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<style>{CSS}</style></head>
<body><nav>{nav}</nav><main class="{name}">{body}</main></body></html>
"""


def index(sources):
    """The scripts, and the table of docs/EQUATIONS.md with line numbers."""
    scripts, lines = [], []
    for path, source in sources.items():
        first = " ".join(ast.get_docstring(ast.parse(source)).split("\n\n")[0].split())
        name = f'<a href="{Path(path).stem}.html">{escape(path)}</a>'
        scripts.append(f"<dt>{name}</dt><dd>{words(first)}</dd>")
    for row in table():
        places = "<br>".join(
            f'<a href="{Path(path).stem}.html#L{line}">{Path(path).name}:{line}</a> {escape(name)}'
            for path, name, line in row["functions"]
        )
        tests = "<br>".join(f"{escape(prefix)}… in {escape(path)}" for prefix, path in row["tests"])
        tag = row["tag"].lower().replace(". ", "-")
        cells = f'<a href="?{tag}">{row["tag"]}</a>', escape(row["section"]), escape(row["what"])
        cells = *cells, places, tests, words(row["metrics"])
        lines.append("".join(f"<td>{cell}</td>" for cell in cells))
    heads = "".join(
        f"<th>{h}</th>" for h in ("equation", "paper", "what", "line", "tests", "metric")
    )
    return whole(
        "Steady RLHF beside the paper",
        "index",
        f"""<h1>Steady RLHF beside the paper</h1>
<p>Each page shows one script: words and equations on the left, numbered code on the right. Read
nano.py first. Equations have the numbers of the paper (arXiv 2309.10202).</p>
<dl>{"".join(scripts)}</dl>
<h2 id="equations">Where each equation stands</h2>
<p><code>docs/EQUATIONS.md</code> is the same table without line numbers.</p>
<div class="wide"><table><tr>{heads}</tr><tr>{"</tr><tr>".join(lines)}</tr></table></div>""",
    )


# --- the build ---


class Anchors(HTMLParser):
    def __init__(self, html):
        super().__init__()
        self.ids, self.hrefs = [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        for name, of in attributes:
            {"id": self.ids, "href": self.hrefs}.get(name, []).append(of)


def resolve(pages):
    """Give links to equations their page: the same, or the last that has it (ppo_sr, not nano)."""
    ids = {name: Anchors(html).ids for name, html in pages.items()}

    def found(name, anchor):
        homes = [page for page in ids if anchor in ids[page]]
        if not homes:
            raise SystemExit(f"{name}: no page has the equation {anchor}")
        return f'href="{"" if name in homes else homes[-1]}#{anchor}"'

    return {
        name: re.sub(r'href="\?([\w-]+)"', lambda m, name=name: found(name, m[1]), html)
        for name, html in pages.items()
    }


def check(pages):
    """Every link leads to an anchor, and every anchor is one."""
    found = {name: Anchors(html) for name, html in pages.items()}
    for name, of in found.items():
        if len({*of.ids}) < len(of.ids):
            raise SystemExit(f"{name}: an anchor stands twice")
        for href in of.hrefs:
            to, _, anchor = href.partition("#")
            if (to or name) not in found or (anchor and anchor not in found[to or name].ids):
                raise SystemExit(f"{name}: the link {href} is dead")
        if len(pages[name].encode()) >= 2**20:
            raise SystemExit(f"{name}: larger than 1 MB")


def build(sources):
    """{path of a script: its text} -> {file name: HTML}"""
    used = set()
    pages = {f"{Path(path).stem}.html": page(path, text, used) for path, text in sources.items()}
    if unused := {*range(len(TABLE["equation"]))} - used:
        plain = TABLE["equation"][min(unused)]["plain"].strip()
        raise SystemExit(f"side_by_side.toml: no script has {plain!r} any more")
    pages = resolve({"index.html": index(sources)} | pages)
    check(pages)
    return pages


def main(folder="build/docs"):
    pages = build({path: (ROOT / path).read_text(encoding="utf-8") for path in SCRIPTS})
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, html in pages.items():
        (Path(folder) / name).write_text(html, encoding="utf-8")
    print(f"{len(pages)} pages in {folder}: open index.html")


if __name__ == "__main__":
    main(*sys.argv[1:])
