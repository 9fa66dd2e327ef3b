"""Rows of a Parquet file, a folder of them, or a hub id: owner/name[/config][:split]."""

import json
from pathlib import Path

import datasets
from pyarrow import parquet

from plumbing.hub import ask_once


def read(name):
    datasets.disable_progress_bars()
    hub_id, _, split = name.partition(":")
    owner, _, rest = hub_id.partition("/")
    where = (f"{owner}/{rest.split('/')[0]}", *rest.split("/")[1:])
    where = (hub_id,) if Path(hub_id).exists() or not rest else where
    inside = {path.suffix.replace(".gz", ".jsonl") for path in Path(hub_id).glob("*.*")}
    if len(inside & {".jsonl", ".json", ".parquet"}) > 1:
        raise ValueError("a folder's files must be of one format, or some would not be read")
    if Path(name).suffix == ".parquet":
        rows = parquet.read_table(name).to_pylist()
    elif Path(name).is_file():
        raise ValueError("a file must be .jsonl, .jsonl.gz or .parquet")
    else:
        ask_once(where[0], "dataset")
        rows = datasets.load_dataset(*where, split=split or "train").to_list()
    return json.loads(json.dumps(rows, default=str))  # dates and such as text
