"""build/docs: a page for each script, its prose on the left and its numbered code on the right.

    make docs
    python -m tools.side_by_side  # the same; needs pygments and latex2mathml

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
from html import escape as escape_all
from pathlib import Path

from latex2mathml.converter import convert
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

from tools.equations import ROOT, SCRIPTS, table

HERE = Path(__file__)
CSS = HERE.with_suffix(".css").read_text(encoding="utf-8")
TABLE = tomllib.loads(HERE.with_suffix(".toml").read_text(encoding="utf-8"))
NAMES = TABLE["names"] | {f"eq-{n}": f"Eq. {n}" for n in range(1, 10)}
PARTS = (ast.FunctionDef, ast.ClassDef)
GREEK = {"pi": "π", "phi": "φ", "sum": "Σ"}
SIZE = 'width="112" height="42" rx="5"'
COLUMNS = (2, "in"), (154, "stage"), (306, "out")
PAGES = "|".join(Path(path).stem for path in SCRIPTS)


# --- pieces of a page: each takes text and gives HTML, escaped first ---


def escape(text):
    return escape_all(text, quote=False).replace('"', "&quot;")  # the ' of pi' stays


def links(html):
    """Equations and scripts that escaped text names become links; resolve() knows where to."""

    def equation(match):
        kind = "eq" if match[1] == "Eq. " else "p"
        return match[1] + re.sub(r"\d+", rf'<a href="?{kind}-\g<0>">\g<0></a>', match[2])

    html = re.sub(r"\b(Eq\. )(\d+(?:(?:, | and |-|–)\d+\b)*)", equation, html)
    html = re.sub(r"(?<=\[)(p\. )(\d)(?=\])", equation, html)
    return re.sub(rf"(?<![\w/.>])({PAGES})\.py\b", r'<a href="\1.html">\g<0></a>', html)


def words(text):
    """A paragraph: `code`, symbols such as y_c and pi_init, links."""
    parts = re.split(r"`([^`]+)`", escape(text))
    symbol = r"\b(pi|sum|[A-Za-z])('?)_(\{[^}]+\}|&lt;t|(?:init|old|phi|ref|[a-zR])\b)"
    for i, part in enumerate(parts):
        if i % 2:
            parts[i] = f"<code>{part}</code>"
            continue
        part = re.sub(symbol, lambda m: f"<i>{m[1]}</i>{m[2]}<sub>{m[3].strip('{}')}</sub>", part)
        parts[i] = links(re.sub(r"\b(pi|phi|sum(?=<))\b", lambda m: GREEK[m[1]], part))
    return "".join(parts)


def mathml(latex):
    """MathML of a display. The converter lets much pass that is no LaTeX: ValueError instead."""
    made = convert(latex, display="block").replace(r"\_", "_")
    bare = re.sub(r"\\[{}]", "", latex)
    if bare.count("{") != bare.count("}"):
        raise ValueError("braces do not match")
    sizes = {"mfrac": 2, "msub": 2, "msup": 2, "munder": 2, "msubsup": 3}
    for node in xml.fromstring(made).iter():  # ParseError: an & outside a table
        name = node.tag.rpartition("}")[2]
        if len(node) != sizes.get(name, len(node)) or "\\" in (node.text or ""):
            raise ValueError(f"{name} {node.text or ''}")
    thin = '<mspace width="0.17em"/>'
    return made.replace("<mi>log</mi>", f"{thin}<mi>log</mi>{thin}")


class Prose:
    """Docstrings and comments of one page; `shown` has the anchors of its equations."""

    def __init__(self, used):
        self.shown, self.used = [], used

    def equation(self, number, tag):
        """A typeset equation; the first of an anchor has it."""
        self.used.add(number)
        anchor, latex = (TABLE["equation"][number][key] for key in ("anchor", "latex"))
        try:
            made = mathml(latex)
        except Exception as error:
            problem = f"side_by_side.toml, {anchor}, {latex!r}: {type(error).__name__} {error}"
            raise SystemExit(problem) from None
        label, identity = escape(tag or NAMES[anchor]), ""
        if anchor not in self.shown:
            self.shown.append(anchor)
            identity, label = f' id="{anchor}"', f'<a href="#{anchor}">{label}</a>'
        return f'<div class="equation"{identity}><span>{label}</span>{made}</div>'

    def html(self, text):
        """Paragraphs, equations; what is indented or aligned stays as it stands."""
        text, typeset, blocks = text.replace("\0", ""), [], []
        for number, of in enumerate(TABLE["equation"]):
            plain = r"\s+".join(map(re.escape, of["plain"].split()))
            whole = rf"(?:(?:\[([^]\n]*)\]|\b(?:GAE|PPO):)\s+)?(?<!\S){plain}(?!\S) *"

            def put(match, number=number):
                typeset.append(self.equation(number, match[1]))
                return f"\n\0{len(typeset) - 1}\n"

            text = re.sub(whole, put, text)
        last = None
        for line in text.splitlines():
            kind = "pre" if re.match(r" |\S.*[^].:,\s] {2}", line) else "p"
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
                out.append(f'<pre tabindex="0">{links(escape(block))}</pre>')
            elif kind == "p":
                out.append(f"<p>{words(' '.join(lines))}</p>")
        return "\n".join(out)


# --- a script as rows ---


def rows(source):
    """[heading, name of a function, prose lines, numbers of code lines] in the script's order.

    A row begins at a comment line, at a function or class, and at a line whose comment has a tag.
    """
    docs, starts, found = {}, {}, []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, (ast.Module, *PARTS)):
            continue
        doc, top = ast.get_docstring(node, clean=False), isinstance(node, ast.Module)
        if doc:
            of = node.body[0]
            docs |= dict.fromkeys(range(of.lineno, of.end_lineno + 1), "")
            docs[of.lineno] = "" if top else re.sub(rf"\n {{{of.col_offset}}}", "\n", doc)
        # a function within a function has no row of its own, unless it has a docstring
        inside = [] if isinstance(node, ast.FunctionDef) else node.body
        for part in [*inside, *([node] if doc and not top else [])]:
            if isinstance(part, PARTS):
                first = min([part.lineno, *(d.lineno for d in part.decorator_list)])
                starts[first] = part.name
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {t.start[0]: t.string.lstrip("#") for t in tokens if t.type == tokenize.COMMENT}
    plain = {of["plain"] for of in TABLE["equation"]}

    def new(heading=""):
        found.append([heading, "", [], []])

    new()
    for n, line in enumerate(source.split("\n"), 1):
        code = line.split("#")[0].strip() if n in comments else line.strip()
        if n in docs:
            found[-1][2] += ["", *docs[n].splitlines()] if docs[n] else []
        elif n in comments and not code:
            text = comments[n].removeprefix(" ")
            banner = re.fullmatch(r"(?:---|===) (end of )?(.+?)[ =-]*", text)
            if banner or found[-1][3]:
                new(banner[2] if banner and not banner[1] else "")
            found[-1][2] += [] if banner else [text]
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
    code = re.sub(r'"(?=[^<>]*(<|$))', "&quot;", highlight(source, *how))  # not of attributes
    text, lines = source.split("\n"), links(code).split("\n")
    lead = prose.html(ast.get_docstring(ast.parse(source), clean=False) or "")
    for heading, anchor, of_row, numbers in rows(source):
        while numbers and not text[numbers[-1] - 1].strip():
            numbers.pop()
        code = "".join(
            f'<a id="L{n}" href="#L{n}">{n}</a><span>{lines[n - 1]}\n</span>' for n in numbers
        )
        identity = f' id="{anchor}"' if anchor and anchor not in ids else ""
        ids.add(anchor)
        left = f"<h2>{words(heading)}</h2>" if heading else ""
        left += prose.html("\n".join(of_row))
        right = f'<pre tabindex="0">{code}</pre>' if numbers else ""
        row = f'<div class="prose">{left}</div><div class="code">{right}</div>'
        body.append(f"<section{identity}>{row}</section>")
    jumps = " · ".join(f'<a href="#{anchor}">{NAMES[anchor]}</a>' for anchor in prose.shown)
    lead += f"<p>Equations here: {jumps}</p>" if jumps else ""
    name = Path(path).stem
    lead = f'<h1>{escape(path)}</h1><div class="lead">{figure(name)}<div>{lead}</div></div>'
    return whole(path, name, lead + "".join(body))


def figure(name):
    """The data flow as SVG: what comes in, stages below each other, what goes out."""
    boxes, arrows, chain, top = [], [], [], 2
    for line in TABLE["figure"].get(name, "").strip().splitlines():
        if line.startswith("loop"):
            last = chain[int(line.split()[1]) - 1] + 12
            arrows.append(f"M266 {last}h14V{chain[0] + 21}h-12")
        elif not line:
            chain, top = [], top + 16
        else:
            for text, (x, kind) in zip(line.split("|"), COLUMNS, strict=True):
                title, _, below = map(escape, text.strip().partition(": "))
                if title:
                    boxes.append(f'<rect class="{kind}" x="{x}" y="{top}" {SIZE}/>')
                    at = f'<text x="{x + 56}" y="{top + (18 if below else 26)}">{title}</text>'
                    boxes.append(f'{at}<text x="{x + 56}" y="{top + 33}">{below}</text>')
                    if kind != "stage":
                        arrows.append(f"M{114 if kind == 'in' else 266} {top + 21}h38")
            if chain:
                arrows.append(f"M210 {top - 16}v14")
            chain.append(top)
            top += 58
    paths = "".join(f'<path d="{d}" marker-end="url(#tip)"/>' for d in arrows)
    tip = '<marker id="tip" refX="5" refY="3" markerWidth="6" markerHeight="6" orient="auto">'
    tip += '<path d="M0 0L6 3L0 6z"/></marker>'
    size = f'viewBox="0 0 420 {top - 14}" role="img" aria-label="Data flow of {escape(name)}"'
    return f"<svg {size}>{tip}{paths}{''.join(boxes)}</svg>" if boxes else ""


def whole(title, name, body):
    """A page. It has no script, and its policy lets it load nothing."""
    names = ["index", *PAGES.split("|")]
    nav = "".join(f'<a href="{n}.html">{n}</a>' for n in names)
    nav = nav.replace(f'href="{name}.html"', f'href="{name}.html" aria-current="page"')
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<style>{CSS}</style></head>
<body><nav>{nav}</nav><main>{body}</main></body></html>
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
    heads = "<th>equation<th>paper<th>what<th>line<th>tests<th>metric"
    return whole(
        "Steady RLHF",
        "index",
        f"""<h1>Steady RLHF beside the paper</h1>
<p>Each page shows one script: words and equations on the left, numbered code on the right. Read
nano.py first. Equations have the numbers of the paper (arXiv 2309.10202).</p>
<dl>{"".join(scripts)}</dl>
<h2 id="equations">Where each equation stands</h2>
<p><code>docs/EQUATIONS.md</code> is the same table without line numbers.</p>
<div class="wide"><table><tr>{heads}</tr><tr>{"</tr><tr>".join(lines)}</tr></table></div>""",
    )


def resolve(pages):
    """Give links to equations their page: the same, or the last that has it (ppo_sr, not nano);
    then every link must lead to an anchor."""
    ids = {name: re.findall(r' id="([^"]*)"', html) for name, html in pages.items()}

    def home(match, name):
        homes = [page for page in ids if match[1] in ids[page]]
        if not homes:
            raise SystemExit(f"{name}: no page has the equation {match[1]}")
        return f'href="{"" if name in homes else homes[-1]}#{match[1]}"'

    for name, html in pages.items():
        if len({*ids[name]}) < len(ids[name]):
            raise SystemExit(f"{name}: an anchor stands twice")
        pages[name] = re.sub(r'href="\?([^"]*)"', lambda m, name=name: home(m, name), html)
        for href in re.findall(r'href="([^"]*)"', pages[name]):
            to, _, anchor = href.partition("#")
            if anchor not in ["", *ids.get(to or name, ())] or (to or name) not in ids:
                raise SystemExit(f"{name}: the link {href} is dead")
    return pages


def build(sources):
    """{path: text of a script} -> {file name: HTML}"""
    used = set()
    pages = {f"{Path(path).stem}.html": page(path, text, used) for path, text in sources.items()}
    if unused := {*range(len(TABLE["equation"]))} - used:
        plain = TABLE["equation"][min(unused)]["plain"].strip()
        raise SystemExit(f"side_by_side.toml: no script has {plain!r}")
    return resolve({"index.html": index(sources)} | pages)


def main(folder="build/docs"):
    pages = build({path: (ROOT / path).read_text(encoding="utf-8") for path in SCRIPTS})
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, html in pages.items():
        (Path(folder) / name).write_text(html, encoding="utf-8")
    print(f"{folder}/index.html")


if __name__ == "__main__":
    main(*sys.argv[1:])
