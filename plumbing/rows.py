"""Rows of JSON Lines, checked one by one, so that an error names its line and field."""

import gzip
import json
from pathlib import Path

from plumbing.errors import InputError, in_one_line
from plumbing.records import plain


def load_rows(name, fields, limit=0, written=()):
    """Rows of a .jsonl, .jsonl.gz or .parquet file or a hub id, `owner/name[/config][:split]`.

    fields: {column: "prompt" (text or messages {role, content}), "response" (text, or messages that
    end in it) or "text"}. Conversations `chosen` and `rejected` need no prompt beside them.
    written: columns that the caller writes. A bad row is refused with its line and field.
    """
    rows = read_rows(name)[: limit or None]
    for number, row in enumerate(rows, 1):
        where, wrong = f"{name}, line {number}", ""
        if not isinstance(row, dict):
            raise InputError(f"{where}: expected a JSON object")
        row = rows[number - 1] = {k: v for k, v in row.items() if v is not None}  # null: absent
        refuse_columns(row, {"file_line", *written}, where)
        row.pop("file_line", None)  # an earlier run's, of another file
        if "prompt" in fields and "prompt" not in row and isinstance(row.get("chosen"), list):
            row["prompt"] = row["chosen"][:-1]
        for field, kind in fields.items():
            value = row.get(field)
            if kind == "response" and turns(value):
                *before, (role, _) = turns(value)
                prompt = turns(row.get("prompt")) or [("user", str(row.get("prompt")).strip())]
                if role != "assistant" or before not in ([], prompt):
                    wrong = "must be the prompt's messages or none, then one of the assistant's"
                row[field] = value = value[-1]["content"]
            if value and isinstance(value, list) and not turns(value):
                wrong = "has a message that is not {role, content: text}"
            elif not (isinstance(value, str) or (kind == "prompt" and turns(value))):
                wrong = f"is missing, empty or no text (found: {', '.join(row)})"
            elif kind != "text" and str(value).startswith("\n\nHuman:"):
                wrong = "is a transcript"
            if wrong or (kind == "prompt" and not value):
                wrong = f"{wrong or 'is empty'}; tools/convert_data.py reads other forms"
                raise InputError(f"{where}: field '{field}' {wrong}")
        if not isinstance(row.get("task", ""), str):
            raise InputError(f"{where}: field 'task' must be a string")
        for field, value in row.items():  # half a surrogate pair, NaN: no other program reads them
            with in_one_line(f"{where}: field '{field}' cannot be written as JSON"):
                plain(value)  # nested too deep, for Python
                json.dumps({field: value}, ensure_ascii=False, allow_nan=False).encode()
    if not rows:
        raise InputError(f"{name}: holds no rows")
    return rows


def turns(value):
    """Messages as (role, content), by which they are compared; [] for anything else."""
    try:
        return [(m["role"], m["content"].strip()) for m in value if not isinstance(value, str)]
    except (TypeError, KeyError, AttributeError):
        return []


def read_rows(name):
    path, rows = Path(name), []
    if path.suffix in (".jsonl", ".json", ".gz"):
        with in_one_line(f"{name}: holds no rows that can be read"):
            open_file = gzip.open if path.suffix == ".gz" else open
            with open_file(path, "rt", encoding="utf-8-sig") as file:
                lines = file.read().rstrip().split("\n")  # U+2028 ends no line
        for line in lines if lines != [""] else ():
            with in_one_line(f"{name}, line {len(rows) + 1}: not JSON"):
                rows.append(json.loads(line or "null"))
        return rows
    with in_one_line(f"{name}: neither a file of rows nor a hub id"):
        from plumbing import tables  # not at the top: datasets takes a second

        return tables.read(name)


def refuse_columns(row, written, where):
    """A user's columns that are called like those that a script writes would be lost. Rows of an
    earlier run hold them all: a bool `ended` and, once scored, `score` and `length`. These are
    written anew. (`file_line` is the line that errors name, where rows were left out.)"""
    ours = type(row.get("ended")) is bool and ("score" in row) == ("length" in row)
    if taken := () if ours else sorted(written & row.keys()):
        raise InputError(f"{where}: field '{taken[0]}' is written by these scripts; rename yours")
