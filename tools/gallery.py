"""The answers behind win / lose / tie (Table 2) on one page: SFT's and every arm's, worst first.

    python -m tools.gallery --output_file gallery.html --folders \\
        "results/full/seed_1/winrate RM-PPO" "results/full/seed_1/winrate AM-PPO"        # seconds

The page needs no network and no other file. Each folder is the output of `evaluate.py winrate`. The
arms must answer the same prompts, be held against the same reference answers and have one judge:
what differs between columns is then the arm. The page itself is gallery.html beside this file; it
receives the data as JSON, and puts every text on the page as text, never as markup.
"""

import base64
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from tools.judges import as_text
from tools.statistics import judge_name
from utils import InputError, load_rows, run_cli

TEMPLATE = Path(__file__).with_suffix(".html")
SHARED = ("set", "task", "prompt", "reference")


@dataclass
class Args:
    folders: tuple[Path, ...]
    """one or more folders that `evaluate.py winrate` wrote; each is an arm, a column of the page"""
    output_file: Path = Path("gallery.html")
    """the page"""
    names: tuple[str, ...] = ()
    """a name for each folder; by default the folder's own, without a "winrate " before it"""


def load_arm(folder):
    """The judged rows of one winrate folder and its judge's name; refused where a verdict lacks."""
    path = folder / "responses.jsonl"
    finished = "the run is not finished: evaluate.py winrate, started again, ends it"
    fields = {"prompt": "prompt", "response": "text", "reference": "text"}
    rows = load_rows(str(path), fields)
    for number, row in enumerate(rows, 1):
        where = f"{path}, line {number}"
        if "verdict" not in row:
            raise InputError(f"{where}: field 'verdict' is missing; {finished}")
        if row["verdict"] not in ("win", "lose", "tie"):
            found = f"must be win, lose or tie, found {row['verdict']!r}"
            raise InputError(f"{where}: field 'verdict' {found}")
        for field in {"score", "reference_score"} & row.keys():
            if type(row[field]) not in (int, float):
                raise InputError(f"{where}: field '{field}' must be a number")
        row["prompt"] = as_text(row["prompt"])
        row["set"], row["task"] = row.get("set", "all"), row.get("task", "all")
    if not (folder / "winrate.json").exists():
        raise InputError(f"{folder}/winrate.json: no such file; {finished}")
    return rows, judge_name(folder, "--folders")


def collect(folders, names):
    """{judge, arms: [name], rows: [{set, task, prompt, reference, arms: [{response, ...}]}]}."""
    if len(names) != len(folders) or len(set(names)) < len(names):
        wanted = f"give every one of the {len(folders)} folders a name of its own"
        raise InputError(f"--names {' '.join(names)}: {wanted}")
    (first, judge), *others = arms = [load_arm(folder) for folder in folders]
    remedy = f"than {folders[0]}; give folders of equal prompts, reference answers and judge"
    for folder, (rows, other_judge) in zip(folders[1:], others, strict=True):
        if other_judge != judge:
            raise InputError(f"{folder}: another judge ({other_judge}, not {judge}) {remedy}")
        if len(rows) != len(first):
            counted = f"({len(rows):,}, not {len(first):,})"
            raise InputError(f"{folder}: another number of prompts {counted} {remedy}")
        for number, (row, expected) in enumerate(zip(rows, first, strict=True), 1):
            if different := [field for field in SHARED if row[field] != expected[field]]:
                where = f"{folder}/responses.jsonl, line {number}"
                raise InputError(f"{where}: another {different[0]} {remedy}")
    own, joined = ("response", "verdict", "score", "reference_score", "judgements"), []
    for of_arms in zip(*(rows for rows, _ in arms), strict=True):
        columns = [{field: row[field] for field in own if field in row} for row in of_arms]
        joined.append({field: of_arms[0][field] for field in SHARED} | {"arms": columns})
    return {"judge": judge, "arms": list(names), "rows": joined}


def page(data):
    """The template with the data in it. No "<" of any text is left, so nothing in the JSON can end
    its script element.

    The page's policy admits one script, by its hash, and no connection at all: a second lock behind
    textContent.
    """
    template, data = TEMPLATE.read_text(encoding="utf-8"), json.dumps(data).replace("<", "\\u003c")
    script = re.search(r"<script>(.*?)</script>", template, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return template.replace("SCRIPT_HASH", digest).replace("GALLERY_DATA", data)


def refuse_other_page(path, data):
    """A page of the same arms and judge may be written anew. Any other file stays."""
    if path.exists():
        text = path.read_text(encoding="utf-8", errors="replace")
        found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
        try:
            had = json.loads(found[1]) if found else {}
        except ValueError:
            had = {}
        if any(had.get(name) != data[name] for name in ("judge", "arms")):
            problem = "is no page of these arms and this judge; give another name, or remove it"
            raise InputError(f"--output_file {path}: {problem}")


def main(args: Args):
    own = [folder.resolve().name.removeprefix("winrate ") for folder in args.folders]
    data = collect(args.folders, args.names or own)
    refuse_other_page(args.output_file, data)
    args.output_file.parent.mkdir(parents=True, exist_ok=True)
    args.output_file.write_text(page(data), encoding="utf-8")
    print(f"{len(data['rows']):,} prompts, {len(data['arms'])} arms: open {args.output_file}")


if __name__ == "__main__":
    run_cli(main, Args, __doc__)
