"""Numbers as Markdown, and as JSON that a person can read."""

import json

import numpy as np

from utils import environment, write_json


def markdown_table(columns, rows):
    lines = ["| " + " | ".join(row) + " |" for row in (columns, *rows)]
    lines.insert(1, "|---" * len(columns) + "|")
    return "\n".join(lines) + "\n"


def with_interval(value, interval, form=".2f"):
    """0.52 [0.41, 0.63]"""
    if value is None:
        return "–"
    bounds = f" [{', '.join(format(bound, form) for bound in interval)}]" if interval else ""
    return format(value, form) + bounds


def with_range(values, decimals):
    """The mean, and the least and largest of a few seeds: 0.52 (0.41 to 0.63)"""
    mean, low, high = (format(f(values), f"z.{decimals}f") for f in (np.mean, np.min, np.max))
    return f"{mean} ({low} to {high})"


def write_rows(path, report):
    """JSON with a line for every entry of the lists and dicts that `report` holds."""
    lines = []
    for key, value in report.items():
        if isinstance(value, dict):
            rows = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in value.items())
            value = f"{{\n{rows}\n}}"
        elif isinstance(value, list):
            value = "[\n" + ",\n".join(map(json.dumps, value)) + "\n]"
        else:
            value = json.dumps(value)
        lines.append(f"{json.dumps(key)}: {value}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def table_of_seeds(table, columns):
    """{row: {metric: [value of each seed]}} as Markdown; columns: {metric: (title, decimals)}."""
    rows = [
        [name, *(with_range(values[metric], d) for metric, (_, d) in columns.items())]
        for name, values in table.items()
    ]
    return markdown_table(["", *(title for title, _ in columns.values())], rows)


def write_study(folder, name, found, page):
    """The numbers as name.json, the page as name.md."""
    write_json(folder / f"{name}.json", found | environment())
    (folder / f"{name}.md").write_text(page, encoding="utf-8")
    print(page)
