r"""Preference data of other forms -> the rows that the scripts read (docs/DATA.md), as JSON Lines.

    python -m tools.convert_data --dataset_name raw.jsonl --output_path pairs.jsonl

It reads .jsonl, .jsonl.gz, .parquet or a hub id. A row may have any of these forms:

    \n\nHuman: ... \n\nAssistant: ...    Anthropic's transcripts, wherever messages may stand
    chosen, rejected                    whole conversations; the messages that both share are the
                                        prompt. If more than one answer follows on a side, the row
                                        is left out, and counted
    prompt, responses:                  a ranking: every two distinct texts of different score
        [{policy, text, score, ...}]    become a pair; ties are dropped, and counted

Rows in the scripts' own forms pass through. Every row is checked, its optional numbers too.
"""

import itertools
import math
import re
from collections import Counter
from dataclasses import dataclass

from plumbing.rows import read_rows
from utils import InputError, run_cli, write_jsonl

NO = math.inf
SIDES = ("chosen", "rejected")
BOUNDS = {"margin": (-NO, NO), "prob_chosen": (0, 1)}
BOUNDS |= {f"{k}_{side}": (-NO, 0) for k in ("logprob", "current_logprob") for side in SIDES}


@dataclass
class Args:
    dataset_name: str
    """rows of any of the forms above: .jsonl, .jsonl.gz, .parquet or a hub id"""
    output_path: str
    """the .jsonl file to write"""


def convert(name):
    """Rows of `prompt` (text or messages) with `chosen` and `rejected`, or `response`, as text."""
    table = read_rows(name)
    rows, counts, left_out = [], Counter(), []
    for number, row in enumerate(table, 1):
        where = f"{name}, line {number}"
        if not isinstance(row, dict):
            raise InputError(f"{where}: expected a JSON object, found {type(row).__name__}")
        row = {k: v for k, v in row.items() if v is not None}  # tables fill absent columns
        for field in {"prompt", "response", *SIDES} & row.keys():
            row[field] = parse_transcript(row[field], field)
        pairs = [row]
        if "chosen" not in row and isinstance(row.get("responses"), list):
            pairs = pairs_of_ranking(row, where, counts)
        elif "prompt" not in row and all(is_messages(row.get(side)) for side in SIDES):
            pairs = [row] if split_conversations(row) else left_out.append(where) or []
        for pair in pairs:
            check(pair, where)
        rows += pairs
    if left_out:
        wanted = "each side must add one assistant message to those that both share, and differ"
        said = f"{left_out[0]}: 'chosen', 'rejected': {wanted}; add a 'prompt' or drop the row"
        if not rows:
            raise InputError(said)
        print(f"{said} ({len(left_out)} of {len(table)} rows left out)")
    if counts:
        made = f"{counts['rankings']:,} rankings became {counts['pairs']:,} pairs"
        print(f"{name}: {made} ({counts['ties']:,} ties dropped)")
    if not rows:
        problem = "no ranking has two texts of different score" if table else "holds no rows"
        raise InputError(f"{name}: {problem}")
    return rows


def is_messages(value):
    known = isinstance(value, list) and value != [] and all(isinstance(m, dict) for m in value)
    return known and all("role" in m and isinstance(m.get("content"), str) for m in value)


def turns(messages):
    """What messages are compared by; data sets add ids and stray spaces."""
    return [(m["role"], m["content"].strip()) for m in messages]


def parse_transcript(value, field):
    r"""Anthropic's form, "\n\nHuman: hi\n\nAssistant: yo", as messages; others as they are."""
    if not isinstance(value, str) or not value.startswith("\n\nHuman:"):
        return value
    parts, messages = re.split(r"\n\n(Human|Assistant):", value)[1:], []
    for speaker, text in zip(parts[::2], parts[1::2], strict=True):
        role, text = "user" if speaker == "Human" else "assistant", text.strip()
        if messages and messages[-1]["role"] == role:  # templates want roles to alternate
            text = messages.pop()["content"] + "\n\n" + text
        messages.append({"role": role, "content": text})
    opened = field == "prompt" and not messages[-1]["content"]  # "... \n\nAssistant:"
    return messages[:-1] if opened else messages


def split_conversations(row):
    """Set the prompt that both share; False unless each side has one assistant message more."""
    sides = [turns(row[side]) for side in SIDES]
    same = [a == b for a, b in itertools.zip_longest(*sides)]
    shared = [*same, False].index(False)
    row["prompt"] = row["chosen"][:shared]
    one_more = all(len(s) == shared + 1 and s[-1][0] == "assistant" for s in sides)
    return shared > 0 and one_more


def pairs_of_ranking(row, where, counts):
    """Every two distinct texts of different score, the higher one chosen, in the row's order."""
    shared, pairs = {k: v for k, v in row.items() if k != "responses"}, []
    for i, response in enumerate(row["responses"]):
        if not isinstance(response, dict) or not isinstance(response.get("text"), str):
            wanted = "must be an object {policy, text, score}"
            raise InputError(f"{where}: field 'responses[{i}]' {wanted}")
        check_number(response.get("score"), f"responses[{i}].score", where)
    for two in itertools.combinations(row["responses"], 2):
        chosen, rejected = sorted(two, key=lambda response: -response["score"])
        tie = chosen["score"] == rejected["score"]
        counts["ties"] += tie
        if tie or chosen["text"] == rejected["text"]:
            continue
        pair = shared | {"margin": chosen["score"] - rejected["score"]}
        for side, response in zip(SIDES, (chosen, rejected), strict=True):
            pair |= {side: response["text"], f"{side}_score": response["score"]}
            named = ("policy", "logprob", "current_logprob")
            pair |= {f"{k}_{side}": response[k] for k in named if response.get(k) is not None}
        pairs.append(pair)
    counts.update(rankings=1, pairs=len(pairs))
    return pairs


def check(row, where):
    """Refuse a row that no script could use; a response given as messages becomes its text."""
    prompt, sides = row.get("prompt"), SIDES if {*SIDES} & row.keys() else ()
    for field in ("prompt", *sides):
        if field not in row:
            raise InputError(f"{where}: field '{field}' is missing (found: {', '.join(row)})")
    if not prompt or not (isinstance(prompt, str) or is_messages(prompt)):
        problem = "is empty" if prompt == "" else "must be text or messages {role, content}"
        raise InputError(f"{where}: field 'prompt' {problem}")
    for field in {"response", *sides} & row.keys():
        if is_messages(row[field]):
            row[field] = last_message(row, field, where)
        elif not isinstance(row[field], str):
            found = type(row[field]).__name__
            wanted = "must be text or messages {role, content}"
            raise InputError(f"{where}: field '{field}' {wanted}, found {found}")
    if not isinstance(row.get("task", ""), str):
        raise InputError(f"{where}: field 'task' must be text")
    for field in {f"logprobs_{side}" for side in SIDES} & row.keys():
        if not isinstance(row[field], dict):
            raise InputError(f"{where}: field '{field}' must be an object {{policy: log-prob}}")
        for policy, value in row[field].items():
            check_number(value, f"{field}.{policy}", where, -NO, 0)
    for field in BOUNDS.keys() & row.keys():
        check_number(row[field], field, where, *BOUNDS[field])


def last_message(row, field, where):
    *before, last = row[field]
    if last["role"] != "assistant":
        problem = f"must end in an assistant message, found role '{last['role']}'"
        raise InputError(f"{where}: field '{field}' {problem}")
    prompt = row["prompt"]
    prompt = prompt if is_messages(prompt) else [{"role": "user", "content": prompt}]
    if before and turns(before) != turns(prompt):
        remedy = "correct it, or drop 'prompt': what both sides share is the prompt"
        raise InputError(f"{where}: field '{field}' repeats another prompt than 'prompt'; {remedy}")
    return last["content"]


def check_number(value, field, where, low=-NO, high=NO):
    number = type(value) in (int, float) and low <= value <= high and abs(value) < NO
    if not number:
        within = f" in [{low:g}, {high:g}]" if high < NO else ""
        problem = f"must be a finite number{within}, found {value!r}"
        raise InputError(f"{where}: field '{field}' {problem}")


def main(args: Args):
    if not args.output_path.endswith(".jsonl"):
        raise InputError(f"--output_path {args.output_path}: must end in .jsonl")
    rows = convert(args.dataset_name)
    write_jsonl(args.output_path, rows)
    print(f"{len(rows):,} rows written to {args.output_path}")


if __name__ == "__main__":
    run_cli(main, Args, __doc__)
