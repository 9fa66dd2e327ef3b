"""tools/convert_data.py: transcripts, rankings and conversations as the rows of the scripts."""

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from tests.test_data import LEFT_OUT, PAIR, REAL, ROW, jsonl, refused, say, write
from tools.convert_data import Args, convert, main
from utils import load_rows, write_jsonl


def converted(folder, *rows):
    """What the scripts read of the converted rows."""
    main(Args(jsonl(folder / "raw.jsonl", *rows), str(folder / "out.jsonl")))
    fields = PAIR if "chosen" in convert(str(folder / "raw.jsonl"))[0] else {"prompt": "prompt"}
    return load_rows(str(folder / "out.jsonl"), fields)


def test_the_scripts_own_forms_pass_through(tmp_path):
    rows = [ROW, ROW | {"prompt": "naïve 狐\u2028", "task": "b", "extra": [1, {"a": 2}]}]
    assert converted(tmp_path, *rows) == rows
    assert convert(str(tmp_path / "out.jsonl")) == rows
    assert convert(jsonl(tmp_path / "a.jsonl", {"prompt": "x", "task": "t"}))[0]["task"] == "t"
    pd.DataFrame(rows[:1]).to_parquet(tmp_path / "a.parquet")
    assert convert(str(tmp_path / "a.parquet")) == rows[:1]
    messages = {"prompt": "hi", "response": say("u:hi|a:yo")}
    assert convert(jsonl(tmp_path / "b.jsonl", messages)) == [{"prompt": "hi", "response": "yo"}]
    with refused("--output_path", ".jsonl"):
        main(Args(str(tmp_path / "a.jsonl"), str(tmp_path / "out.parquet")))


def test_transcripts(tmp_path, capsys):
    """Anthropic's form is split at its two markers, which start a paragraph, and nowhere else."""
    head = "\n\nHuman: Say Human: hi\n\nlines\nHuman: two \n\nAssistant: The Assistant: yo"
    head += "\n\nHuman:and"
    prompt = say("u:Say Human: hi\n\nlines\nHuman: two|a:The Assistant: yo|u:and")
    raw = {"chosen": head + "\n\nAssistant: more \n", "rejected": head + "\n\nAssistant:"}
    pair = {"prompt": prompt, "chosen": "more", "rejected": ""}  # the data has empty answers
    assert converted(tmp_path, raw) == [pair]
    # derivatives give the prompt apart: open at its end or not, the sides as text or whole
    opened = head + "\n\nAssistant:"
    for start, row in (
        (opened, {"chosen": " more", "rejected": "less"}),
        (head, raw),
        (prompt, raw),
    ):
        (out,) = converted(tmp_path, row | {"prompt": start})
        assert out["prompt"] == prompt and out["chosen"].strip() == "more"
    twice = "\n\nHuman: a\n\nHuman: b\n\nAssistant: c\n\nAssistant: "
    raw = {"chosen": twice + "d", "rejected": twice + "e"}  # one turn in two parts
    row = {"prompt": say("u:a\n\nb"), "chosen": "c\n\nd", "rejected": "c\n\ne"}
    assert converted(tmp_path, raw) == [row]
    raw = {"prompt": opened, "response": opened + " c"}
    assert convert(jsonl(tmp_path / "a.jsonl", raw))[0] == {"prompt": prompt, "response": "c"}
    for text in ("Tell me: what does \n\nHuman: mean?", "Human: hi\n\nAssistant:", "\nHuman: hi"):
        row = {"prompt": text, "chosen": "yo", "rejected": "a\n\nHuman: b"}  # no transcripts
        assert converted(tmp_path, row) == [row]
    assert "left out" not in capsys.readouterr().out


@pytest.mark.parametrize("case", LEFT_OUT)
def test_conversations_with_more_than_one_answer_are_left_out(case, tmp_path, capsys):
    bad = dict(zip(("chosen", "rejected"), map(say, LEFT_OUT[case]), strict=True))
    good = {"chosen": say("u:hi|a:yo"), "rejected": say("u:hi|a:no"), "task": "t"}
    row = {"prompt": say("u:hi"), "chosen": "yo", "rejected": "no", "task": "t"}
    assert converted(tmp_path, good, bad, good) == [row, row]
    said = capsys.readouterr().out.splitlines()
    assert "raw.jsonl, line 2:" in said[0] and "(1 of 3 rows left out)" in said[0]
    path = jsonl(tmp_path / "b.jsonl", bad, bad)
    with refused(path, "line 1", "'chosen', 'rejected'", "add a 'prompt' or drop the row"):
        convert(path)


def responses():
    names = ("policy", "text", "score", "logprob", "current_logprob")
    for values in (
        ("p", "A", 2, -1.5, -1.0),
        ("q", "B", 3.5, -2.0),
        ("r", "C", 2),
        (None, "D", -1, None, -4.0),
        ("s", "B", 1),
    ):
        yield {k: v for k, v in zip(names, values, strict=False) if v is not None}


RANKING = {
    "prompt": say("s:be kind|u:hi"),
    "task": "t",
    "lang": "en",
    "responses": [*responses()],
}


def test_rankings_become_pairs(tmp_path, capsys):
    plain = {"prompt": "x", "chosen": "y", "rejected": "z"}
    first, *rows = converted(tmp_path, plain, RANKING | {"chosen": None, "rejected": None})
    # 10 twos, less the tie A C and B beside B; in the order AB AD AE BC BD CD CE DE
    assert first == plain
    pairs = ["BA", "AD", "AB", "BC", "BD", "CD", "CB", "BD"]
    assert [r["chosen"] + r["rejected"] for r in rows] == pairs
    assert [r["margin"] for r in rows] == [1.5, 3, 1, 1.5, 4.5, 3, 1, 2]
    assert rows[0] == {
        "prompt": RANKING["prompt"], "chosen": "B", "rejected": "A", "task": "t", "lang": "en",
        "margin": 1.5, "chosen_score": 3.5, "rejected_score": 2,
        "policy_chosen": "q", "policy_rejected": "p",
        "logprob_chosen": -2.0, "logprob_rejected": -1.5, "current_logprob_rejected": -1.0,
    }  # fmt: skip
    assert "policy_rejected" not in rows[1] and "logprob_rejected" not in rows[1]
    assert rows[1]["current_logprob_chosen"] == -1.0
    assert rows[1]["current_logprob_rejected"] == -4.0
    said = capsys.readouterr().out
    assert "raw.jsonl: 1 rankings became 8 pairs (1 ties dropped)\n" in said
    policies = [{"policy": str(i), "text": f"t{i}", "score": i * 7 % 24} for i in range(24)]
    assert len(convert(jsonl(tmp_path / "b.jsonl", RANKING | {"responses": policies}))) == 276


BAD_RANKINGS = {
    "no text": ({"score": 1}, ("'responses[1]'", "text")),
    "no object": ("text", ("'responses[1]'",)),
    "no score": ({"text": "b"}, ("'responses[1].score'", "finite number", "None")),
    "score not a number": ({"text": "b", "score": "high"}, ("'responses[1].score'", "'high'")),
    "score nan": ({"text": "b", "score": float("nan")}, ("'responses[1].score'", "nan")),
    "logprob above 0": ({"text": "b", "score": 1, "logprob": 0.5}, ("'logprob_chosen'", "0.5")),
    "only a tie": ({"text": "b", "score": 0}, ("no ranking has two texts of different score",)),
}


@pytest.mark.parametrize("case", BAD_RANKINGS)
def test_a_bad_ranking_is_named(case, tmp_path):
    response, said = BAD_RANKINGS[case]
    path = jsonl(tmp_path / "a.jsonl", {"prompt": "x", "responses": [{"text": "a", "score": 0}, response]})
    with refused(path, *said, *(["line 1"] if case != "only a tie" else [])):
        convert(path)


BAD_ROWS = {
    "missing side": ({"prompt": "x", "chosen": "y"}, ("'rejected'", "missing", "prompt, chosen")),
    "null": (ROW | {"rejected": None}, ("'rejected'", "missing")),
    "number": (ROW | {"chosen": 3}, ("'chosen'", "int")),
    "messages without content": (ROW | {"chosen": [{"role": "user"}]}, ("'chosen'", "list")),
    "no prompt": ({"chosen": "y", "rejected": "z"}, ("'prompt'", "missing", "chosen, rejected")),
    "one side whole": ({"chosen": say("u:hi|a:yo"), "rejected": "no"}, ("'prompt'", "missing")),
    "empty prompt": (ROW | {"prompt": ""}, ("'prompt'", "empty")),
    "empty list": (ROW | {"prompt": []}, ("'prompt'",)),
    "prompt without content": (
        ROW | {"prompt": [{"role": "user"}]},
        ("'prompt'", "{role, content}"),
    ),
    "ranking without prompt": ({"responses": RANKING["responses"]}, ("'prompt'", "missing")),
    "nothing": ({"question": "x"}, ("'prompt'", "missing", "question")),
    "no object": (["a", "b"], ("JSON object", "list")),
    "other prompt": (
        {"prompt": "hi", "chosen": say("u:ho|a:yo"), "rejected": "no"},
        ("'chosen'", "another prompt", "drop 'prompt'"),
    ),
    "more prompt": (
        {"prompt": "hi", "chosen": say("s:x|u:hi|a:yo"), "rejected": "no"},
        ("'chosen'", "another prompt"),
    ),
    "the user's turn last": (
        {"prompt": "hi", "chosen": "yo", "rejected": say("u:no")},
        ("'rejected'", "assistant", "'user'"),
    ),
    "log-probs": (ROW | {"logprobs_chosen": [-1.0]}, ("'logprobs_chosen'", "object")),
    "a log-prob": (
        ROW | {"logprobs_chosen": {"a": -1, "b": 1}},
        ("'logprobs_chosen.b'", "found 1"),
    ),
}
inf, nan = float("inf"), float("nan")
for field, *values in (
    ("task", 3),
    ("margin", "big", True, nan, -inf, inf),
    ("prob_chosen", 1.01, -0.1),
    ("logprob_chosen", 0.1),
    ("logprob_rejected", [-1.0]),
    ("current_logprob_chosen", 2),
    ("current_logprob_rejected", -inf),
):
    for value in values:
        BAD_ROWS[f"{field} {value}"] = (ROW | {field: value}, (f"'{field}'", "must be"))


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_named_by_file_line_and_field(case, tmp_path):
    row, said = BAD_ROWS[case]
    path = jsonl(tmp_path / "a.jsonl", ROW, row)
    with refused(path, "line 2", *said):
        convert(path)


def test_good_optional_fields_stay(tmp_path):
    fine = {"task": "t", "margin": -1, "prob_chosen": 0.5, "logprob_chosen": 0}
    fine |= {"current_logprob_rejected": -9.5, "logprobs_chosen": {"a": -1.0}}
    assert converted(tmp_path, ROW | fine) == [ROW | fine]
    theirs = ROW | {"file_line": 9}  # load_rows says that it must be renamed
    assert convert(jsonl(tmp_path / "a.jsonl", theirs)) == [theirs]
    null = dict.fromkeys(fine) | {"note": None, "responses": None}
    assert converted(tmp_path, ROW | null) == [ROW]


def test_bad_files(tmp_path):
    with refused("empty.jsonl", "no rows"):
        convert(write(tmp_path / "empty.jsonl", ""))
    with refused("bad.jsonl", "line 2", "not JSON"):
        convert(write(tmp_path / "bad.jsonl", json.dumps(ROW) + "\n{'prompt': 1}\n"))
    with refused(tmp_path / "none.jsonl"):
        convert(str(tmp_path / "none.jsonl"))


def test_the_command(tmp_path):
    path, out = jsonl(tmp_path / "a.jsonl", RANKING), tmp_path / "folder" / "out.jsonl"
    command = [sys.executable, "-m", "tools.convert_data", "--dataset_name", path]
    root = Path(__file__).parents[1]
    done = subprocess.run([*command, "--output_path", out], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"8 rows written to {out}\n")
    assert len(load_rows(str(out), PAIR)) == 8
    jsonl(tmp_path / "a.jsonl", RANKING | {"task": 3})
    done = subprocess.run([*command, "--output_path", out], cwd=root, capture_output=True, text=True)
    assert done.returncode == 2 and f"{path}, line 1: field 'task'" in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.skipif(not REAL.is_dir(), reason="../shared/data is absent")
def test_real_rankings(tmp_path):
    counts = {}
    for path in REAL.glob("*_kpolicy*"):
        rows = convert(str(path))
        write_jsonl(tmp_path / "a.jsonl", rows)
        assert load_rows(str(tmp_path / "a.jsonl"), PAIR) == rows
        assert all(r["chosen_score"] > r["rejected_score"] for r in rows)
        assert all(r["chosen"] != r["rejected"] and r["prompt"] and r["task"] for r in rows)
        counts[path.name.split(".")[0]] = len(rows)
    pairs = {"llmeval2_zh_kpolicy": 41072, "mtbench_kpolicy": 14437, "rmb_bon_kpolicy": 3826}
    assert counts == pairs
