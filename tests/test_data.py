"""Rows, tokens, batches and the learning-rate schedule; and what every script says about bad input."""

import gzip
import json
import shutil
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

import am_train
import engines
import evaluate
import ppo_sr
import select_rehearsal
import sft
import utils
from data import encode_pair, encode_prompts, load_rows, load_tokenizer, render
from utils import InputError, length_batches, load_function, load_policy, pad, run_cli, warmup_cosine, write_jsonl

ROOT = Path(am_train.__file__).parent
PAIR = {"prompt": "prompt", "chosen": "response", "rejected": "response"}
ROW = {"prompt": "the quick fox", "chosen": "jumps", "rejected": "judges", "response": "over the dog"}


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


def jsonl(path, *rows):
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def refused(*parts):
    """An InputError of one line in which all `parts` stand."""
    return pytest.raises(InputError, match="".join(rf"(?=.*{re.escape(str(p))})" for p in parts) + r"^[^\n]+\Z")


# --- load_rows --------------------------------------------------------------------------------------------------------


def test_rows_of_json_lines_come_back_unchanged(tmp_path):
    rows = [ROW, ROW | {"prompt": "naïve 狐", "task": "b"}]
    assert load_rows(jsonl(tmp_path / "a.jsonl", *rows), PAIR) == rows
    assert load_rows(str(tmp_path / "a.jsonl"), PAIR, limit=1) == rows[:1]
    with gzip.open(tmp_path / "a.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(json.dumps(rows[1], ensure_ascii=False) + "\n")
    assert load_rows(str(tmp_path / "a.jsonl.gz"), PAIR) == rows[1:]
    write_jsonl(tmp_path / "b.jsonl", rows)
    assert load_rows(str(tmp_path / "b.jsonl"), PAIR) == rows


def test_rows_of_parquet(tmp_path):
    messages = [{"role": "user", "content": "the fox"}]
    rows = [ROW | {"prompt": messages}, ROW | {"prompt": [*messages, {"role": "system", "content": "dog"}]}]
    pd.DataFrame(rows).to_parquet(tmp_path / "a.parquet")
    assert load_rows(str(tmp_path / "a.parquet"), PAIR) == rows
    with refused(tmp_path / "none.parquet"):
        load_rows(str(tmp_path / "none.parquet"), PAIR)
    with refused(tmp_path / "a.parquet", "line 1", "'text'"):
        load_rows(str(tmp_path / "a.parquet"), {"text": "text"})


def test_messages_and_whole_conversations(tmp_path):
    user, good, bad = ({"role": r, "content": c} for r, c in (("user", "hi"), ("assistant", "yo"), ("assistant", "no")))
    other = {"role": "user", "content": "bye"}
    path = jsonl(tmp_path / "a.jsonl", {"prompt": [user], "chosen": [good], "rejected": "no"})
    assert load_rows(path, PAIR) == [{"prompt": [user], "chosen": "yo", "rejected": "no"}]
    path = jsonl(tmp_path / "b.jsonl", {"chosen": [user, good], "rejected": [user, bad]})
    assert load_rows(path, PAIR) == [{"prompt": [user], "chosen": "yo", "rejected": "no"}]
    path = jsonl(tmp_path / "c.jsonl", {"chosen": [user, good], "rejected": [other, bad]})
    with refused(path, "line 1", "differ"):
        load_rows(path, PAIR)


BAD_ROWS = {
    "missing column": ({"prompt": "x", "chosen": "y"}, ("'rejected'", "missing", "prompt, chosen")),
    "number": (ROW | {"chosen": 3}, ("'chosen'", "int")),
    "null": (ROW | {"rejected": None}, ("'rejected'", "NoneType")),
    "empty prompt": (ROW | {"prompt": ""}, ("'prompt'", "empty")),
    "empty list": (ROW | {"prompt": []}, ("'prompt'", "list")),
    "messages without content": (ROW | {"prompt": [{"role": "user"}]}, ("'prompt'", "{role, content}")),
    "no object": (["a", "b"], ("JSON object", "list")),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_named_by_file_line_and_field(case, tmp_path):
    row, said = BAD_ROWS[case]
    path = jsonl(tmp_path / "a.jsonl", ROW, row)
    with refused(path, "line 2", *said):
        load_rows(path, PAIR)
    assert len(load_rows(path, PAIR, limit=1)) == 1  # the row before is fine


def test_a_bad_file_is_named(tmp_path):
    with refused(tmp_path / "none.jsonl", "no such file"):
        load_rows(str(tmp_path / "none.jsonl"), PAIR)
    with refused(tmp_path):
        load_rows(str(tmp_path), PAIR)
    with refused("nobody/nothing", "hub id"):
        load_rows("nobody/nothing", PAIR)
    with refused("empty.jsonl", "no rows"):
        load_rows(write(tmp_path / "empty.jsonl", ""), PAIR)
    with refused("bad.jsonl", "line 3", "not JSON"):
        load_rows(write(tmp_path / "bad.jsonl", (json.dumps(ROW) + "\n") * 2 + "{'prompt': 1}\n"), PAIR)
    (tmp_path / "bad.jsonl.gz").write_bytes(b"not gzip")
    with refused("bad.jsonl.gz", "cannot be read"):
        load_rows(str(tmp_path / "bad.jsonl.gz"), PAIR)
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "naïve"}'.encode("latin-1"))
    with refused("latin.jsonl", "cannot be read"):
        load_rows(str(tmp_path / "latin.jsonl"), PAIR)


# --- forms of rows ----------------------------------------------------------------------------------------------------


def say(text):
    """`u:hi|a:yo` -> messages."""
    roles = {"u": "user", "a": "assistant", "s": "system"}
    return [{"role": roles[m[0]], "content": m[2:]} for m in text.split("|")]


def test_the_shared_messages_of_whole_conversations_are_the_prompt(tmp_path, capsys):
    good = {"chosen": say("s:be kind|u:hi|a:yo|u:and|a:more"), "rejected": say("s:be kind|u:hi|a:yo|u:and|a:less")}
    row = {"prompt": say("s:be kind|u:hi|a:yo|u:and"), "chosen": "more", "rejected": "less"}
    assert load_rows(jsonl(tmp_path / "a.jsonl", good, good | {"prompt": None}), PAIR) == [row, row]
    assert load_rows(str(tmp_path / "a.jsonl"), {"prompt": "prompt"})[0]["prompt"] == row["prompt"]
    marked = good | {"rejected": [m | {"id": i, "content": m["content"] + " "} for i, m in enumerate(good["rejected"])]}
    assert load_rows(jsonl(tmp_path / "b.jsonl", marked), PAIR) == [
        row | {"rejected": "less "}
    ]  # ids differ, turns do not
    assert capsys.readouterr().out == ""


LEFT_OUT = {
    "they part early": ("u:hi|a:yo|u:and|a:more", "u:hi|a:no|u:or|a:less"),
    "one goes on": ("u:hi|a:yo", "u:hi|a:no|u:why|a:so"),
    "one contains the other": ("u:hi|a:yo", "u:hi|a:yo|u:and|a:more"),
    "equal": ("u:hi|a:yo", "u:hi|a:yo"),
    "nothing shared": ("u:hi|a:yo", "u:ho|a:yo"),
    "no prompt at all": ("a:yo", "a:no"),
    "the user's turn last": ("u:hi|a:yo|u:and", "u:hi|a:yo|u:or"),
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_conversations_with_more_than_one_answer_are_left_out_and_counted(case, tmp_path, capsys):
    chosen, rejected = LEFT_OUT[case]
    bad = {"chosen": say(chosen), "rejected": say(rejected)}
    good = {"chosen": say("u:hi|a:yo"), "rejected": say("u:hi|a:no"), "task": "t"}
    rows = load_rows(jsonl(tmp_path / "a.jsonl", good, bad, good), PAIR)
    row = {"prompt": say("u:hi"), "chosen": "yo", "rejected": "no", "task": "t"}
    assert rows == [row, row | {"file_line": 3}]  # what is refused later is still named by its line
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "a.jsonl, line 2:" in said and "(1 of 3 rows alike, left out)" in said
    with refused(tmp_path / "b.jsonl", "line 1", "one assistant message", "give a prompt or drop the row"):
        load_rows(jsonl(tmp_path / "b.jsonl", bad, bad), PAIR)


def test_only_one_side_a_conversation_is_refused(tmp_path):
    for i, row in enumerate(({"chosen": say("u:hi|a:yo"), "rejected": "no"}, {"chosen": "yo", "rejected": "no"})):
        with refused(tmp_path / f"{i}.jsonl", "line 1", "'prompt'", "missing"):
            load_rows(jsonl(tmp_path / f"{i}.jsonl", row), PAIR)


def test_transcripts(tmp_path, capsys):
    """Anthropic's form is split at its two markers, which start a paragraph, and nowhere else."""
    head = "\n\nHuman: Say Human: hi\n\nlines\nHuman: two \n\nAssistant: The Assistant: yo\n\nHuman:and"
    prompt = say("u:Say Human: hi\n\nlines\nHuman: two|a:The Assistant: yo|u:and")
    raw = {"chosen": head + "\n\nAssistant: more \n", "rejected": head + "\n\nAssistant:"}
    pair = {"prompt": prompt, "chosen": "more", "rejected": ""}  # the data has answers without a word
    assert load_rows(jsonl(tmp_path / "a.jsonl", raw), PAIR) == [pair]
    # derivatives give the prompt apart: open at its end or not, the sides as text or whole
    for i, (start, row) in enumerate(
        ((head + "\n\nAssistant:", {"chosen": " more", "rejected": "less"}), (head, raw), (prompt, raw))
    ):
        (out,) = load_rows(jsonl(tmp_path / f"{i}.jsonl", row | {"prompt": start}), PAIR)
        assert out["prompt"] == prompt and out["chosen"].strip() == "more"
    twice = "\n\nHuman: a\n\nHuman: b\n\nAssistant: c\n\nAssistant: "
    raw = {"chosen": twice + "d", "rejected": twice + "e"}  # one turn in two parts, as templates want it
    rows = [{"prompt": say("u:a\n\nb"), "chosen": "c\n\nd", "rejected": "c\n\ne"}]
    assert load_rows(jsonl(tmp_path / "twice.jsonl", raw), PAIR) == rows
    for text in ("Tell me: what does \n\nHuman: mean?", "Human: hi\n\nAssistant:", "\nHuman: hi"):  # no transcripts
        row = {"prompt": text, "chosen": "yo", "rejected": "a\n\nHuman: b"}
        assert load_rows(jsonl(tmp_path / "plain.jsonl", row), PAIR) == [row]
    text = {"prompt": "x", "response": "\n\nHuman: a\n\nAssistant: b"}
    assert load_rows(jsonl(tmp_path / "text.jsonl", text), {"response": "text"}) == [text]
    assert capsys.readouterr().out == ""


def test_rankings_become_pairs(tmp_path, capsys):
    names = ("policy", "text", "score", "logprob", "current_logprob")
    a, b, c, d, e = (
        {k: v for k, v in zip(names, values, strict=False) if v is not None}
        for values in (
            ("p", "A", 2, -1.5, -1.0),
            ("q", "B", 3.5, -2.0),
            ("r", "C", 2),
            (None, "D", -1, None, -4.0),
            ("s", "B", 1),
        )
    )
    ranking = {"prompt": say("s:be kind|u:hi"), "task": "t", "lang": "en", "responses": [a, b, c, d, e]}
    path = jsonl(tmp_path / "a.jsonl", {"prompt": "x", "chosen": "y", "rejected": "z"}, ranking)
    rows = load_rows(path, PAIR)
    # 10 twos, less the tie A C and B beside B; in the order AB AD AE BC BD CD CE DE
    assert [r["chosen"] + r["rejected"] for r in rows[1:]] == ["BA", "AD", "AB", "BC", "BD", "CD", "CB", "BD"]
    assert [r["margin"] for r in rows[1:]] == [1.5, 3, 1, 1.5, 4.5, 3, 1, 2]
    assert rows[1] == {
        "prompt": ranking["prompt"], "chosen": "B", "rejected": "A", "task": "t", "lang": "en", "margin": 1.5,
        "chosen_score": 3.5, "rejected_score": 2, "policy_chosen": "q", "policy_rejected": "p",
        "logprob_chosen": -2.0, "logprob_rejected": -1.5, "current_logprob_rejected": -1.0,
    }  # fmt: skip
    extra = {k: v for k, v in rows[2].items() if k not in rows[1] or v != rows[1][k]}
    assert extra.pop("file_line") == 2 and "policy_rejected" not in rows[2] and "logprob_rejected" not in rows[2]
    assert extra["current_logprob_chosen"] == -1.0 and rows[2]["current_logprob_rejected"] == -4.0
    assert capsys.readouterr().out == f"{path}: 1 rankings became 8 pairs (1 ties dropped)\n"
    assert load_rows(path, PAIR, limit=2) == rows and len(load_rows(path, PAIR, limit=1)) == 1  # lines, not pairs
    assert load_rows(path, {"prompt": "prompt"}, 0)[1] == ranking  # a file of prompts, too
    policies = [{"policy": str(i), "text": f"t{i}", "score": i * 7 % 24} for i in range(24)]
    path = jsonl(tmp_path / "b.jsonl", ranking | {"responses": policies})
    assert len(load_rows(path, PAIR)) == 276 and load_rows(path, PAIR) == load_rows(path, PAIR)


BAD_RANKINGS = {
    "no text": ({"score": 1}, ("'responses[1]'", "text")),
    "no object": ("text", ("'responses[1]'",)),
    "no score": ({"text": "b"}, ("'responses[1].score'", "finite number", "None")),
    "score not a number": ({"text": "b", "score": "high"}, ("'responses[1].score'", "'high'")),
    "score nan": ({"text": "b", "score": float("nan")}, ("'responses[1].score'", "nan")),
    "logprob above 0": ({"text": "b", "score": 1, "logprob": 0.5}, ("'logprob_chosen'", "0.5")),
    "only a tie": ({"text": "b", "score": 0}, ()),
}


@pytest.mark.parametrize("case", BAD_RANKINGS)
def test_a_bad_ranking_is_named(case, tmp_path):
    response, said = BAD_RANKINGS[case]
    row = {"prompt": "x", "responses": [{"text": "a", "score": 0}, response]}
    path = jsonl(tmp_path / "a.jsonl", row)
    with refused(path, *(("line 1", *said) if said else ("no ranking has two texts of different score",))):
        load_rows(path, PAIR)
    with refused("line 1", "'prompt'", "missing"):
        load_rows(
            jsonl(tmp_path / "b.jsonl", {"responses": [{"text": t, "score": i} for i, t in enumerate("ab")]}), PAIR
        )


def test_sides_of_messages_beside_a_prompt(tmp_path):
    for i, (prompt, chosen, rejected) in enumerate(
        (
            ("hi", say("u:hi|a:yo"), say("a:no")),
            (say("s:be kind|u:hi"), say("s:be kind|u:hi |a:yo"), "no"),
            (say("u:hi|a:oh|u:so"), say("u:hi|a:oh|u:so|a:yo"), say("a:no")),
        )
    ):
        path = jsonl(tmp_path / f"{i}.jsonl", {"prompt": prompt, "chosen": chosen, "rejected": rejected})
        assert load_rows(path, PAIR) == [{"prompt": prompt, "chosen": "yo", "rejected": "no"}]
    path = jsonl(tmp_path / "sft.jsonl", {"prompt": "hi", "response": say("u:hi|a:yo")})
    assert load_rows(path, {"prompt": "prompt", "response": "response"}) == [{"prompt": "hi", "response": "yo"}]
    for i, (prompt, chosen) in enumerate(
        (("hi", "u:ho|a:yo"), ("hi", "s:x|u:hi|a:yo"), (say("u:a|a:b|u:hi"), "u:hi|a:yo"))
    ):
        path = jsonl(tmp_path / f"bad{i}.jsonl", {"prompt": prompt, "chosen": say(chosen), "rejected": "no"})
        with refused(path, "line 1", "'chosen'", "another prompt", "drop 'prompt'"):
            load_rows(path, PAIR)
    with refused("line 1", "'rejected'", "assistant", "'user'"):
        load_rows(jsonl(tmp_path / "c.jsonl", {"prompt": "hi", "chosen": "yo", "rejected": say("u:no")}), PAIR)


def test_optional_fields_are_checked_and_null_is_absent(tmp_path):
    fine = {"task": "t", "margin": -1, "prob_chosen": 0.5, "logprob_chosen": 0, "current_logprob_rejected": -9.5}
    assert load_rows(jsonl(tmp_path / "a.jsonl", ROW | fine), PAIR) == [ROW | fine]
    null = dict.fromkeys(fine) | {"note": None, "responses": None}
    assert load_rows(jsonl(tmp_path / "b.jsonl", ROW | null), PAIR) == [ROW]
    inf = float("inf")
    bad = [
        ("task", 3),
        ("margin", "big"),
        ("margin", True),
        ("margin", float("nan")),
        ("margin", -inf),
        ("margin", inf),
    ]
    bad += [("prob_chosen", 1.01), ("prob_chosen", -0.1), ("logprob_chosen", 0.1), ("logprob_rejected", [-1.0])]
    bad += [("current_logprob_chosen", 2), ("current_logprob_rejected", -inf)]
    for i, (field, value) in enumerate(bad):
        path = jsonl(tmp_path / f"{i}.jsonl", ROW, ROW | {field: value})
        with refused(path, "line 2", f"'{field}'", "must be"):
            load_rows(path, PAIR)


def test_hub_ids(tmp_path, monkeypatch):
    import datasets

    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((*args, *kwargs.values()))
        return datasets.Dataset.from_list(rows)

    ranking = {
        "prompt": say("u:hi"),
        "responses": [{"policy": p, "text": p, "score": i, "logprob": None} for i, p in enumerate("ab")],
    }
    rows = [
        ranking | {"task": "t", "chosen": None, "rejected": None},
        {"prompt": None, "chosen": say("u:hi|a:yo"), "rejected": say("u:hi|a:no"), "responses": None, "task": None},
    ]
    pair = {"prompt": say("u:hi"), "chosen": "b", "rejected": "a", "task": "t", "margin": 1, "chosen_score": 1}
    pair |= {"rejected_score": 0, "policy_chosen": "b", "policy_rejected": "a"}
    read = [pair, {"prompt": say("u:hi"), "chosen": "yo", "rejected": "no"}]
    with monkeypatch.context() as patch:
        patch.setattr(datasets, "load_dataset", load_dataset)
        for name in ("owner/name", "owner/name:test", "owner/name.v1/config-a", "owner/name/config:test[:2]"):
            assert load_rows(name, PAIR) == read
    assert asked == [
        ("owner/name", "train"), ("owner/name", "test"),
        ("owner/name.v1", "config-a", "train"), ("owner/name", "config", "test[:2]"),
    ]  # fmt: skip
    folder = tmp_path / "owner" / "name" / "local"  # a folder is read by the same road; it is no config
    folder.mkdir(parents=True)
    datasets.Dataset.from_list(rows).to_parquet(folder / "train.parquet")
    assert load_rows(str(folder), PAIR) == load_rows(f"{folder}:train", PAIR) == read
    monkeypatch.chdir(tmp_path)
    assert load_rows("owner/name/local", PAIR) == read
    with refused("owner/name/none", "hub id"):
        load_rows("owner/name/none", PAIR)


REAL = Path(__file__).parents[2] / "shared" / "data"


@pytest.mark.skipif(not REAL.is_dir(), reason="../shared/data, which is no part of the repository, is absent")
def test_real_files():
    files = {p.name.split(".")[0]: str(p) for p in REAL.glob("*.jsonl*")}
    counts = {}
    for name, path in files.items():
        if name.startswith("prompts_"):
            counts[name] = len(load_rows(path, {"prompt": "prompt"}))
        elif name.endswith(("_train", "_test", "_kpolicy")):
            rows = load_rows(path, PAIR)
            counts[name] = len(rows)
            assert all(type(r["chosen"]) is type(r["rejected"]) is str and r["prompt"] and r["task"] for r in rows)
            if name.endswith("_kpolicy"):
                assert all(r["chosen_score"] > r["rejected_score"] and r["chosen"] != r["rejected"] for r in rows)
    known = {"hh_harmless_train": 2012, "multitask_en_test": 913, "prompts_zh": 2346, "rmb_test": 769}
    assert known.items() <= counts.items() and len(counts) == 13


# --- tokens -----------------------------------------------------------------------------------------------------------


def test_causal_form_is_prompt_response_eos(tokenizer):
    x, y = tokenizer("the fox").input_ids, tokenizer(" jumps").input_ids
    assert encode_pair(tokenizer, "the fox", " jumps", 64, False, "") == ([*x, *y, tokenizer.eos_token_id], len(x), 0)
    assert tokenizer.decode(x + y) == "the fox jumps"


def test_prompt_keeps_its_end_and_response_its_beginning(tokenizer):
    x, y = tokenizer("0123456789").input_ids, tokenizer("quartz").input_ids
    y = [*y, tokenizer.eos_token_id]
    n, m = len(x), len(y)
    assert n > m > 3
    room = n + 1  # the prompt alone fits, both do not: the prompt gives way
    ids, prompt_len, cut = encode_pair(tokenizer, "0123456789", "quartz", room, False, "")
    assert (ids, prompt_len, cut) == (x[m - 1 :] + y, n + 1 - m, m - 1)
    # a response longer than the room is cut at its end, and one prompt token remains
    assert encode_pair(tokenizer, "0", "quartz 0123456789", 5, False, "")[:2] == (
        tokenizer("0").input_ids + tokenizer("quartz 0123456789").input_ids[:4],
        1,
    )


@pytest.mark.parametrize("encoder", [False, True])
def test_prompt_that_fills_the_room_is_refused_unless_truncated(encoder, tokenizer, bert_tokenizer):
    tok, special = (bert_tokenizer, 3) if encoder else (tokenizer, 0)
    prompt, response = "the quick brown fox jumps over the lazy dog", "my vow"
    n = len(tok(prompt, add_special_tokens=False).input_ids)
    for room in (n, n - 1):
        with refused("a.jsonl, line 7", f"{n} tokens", "--max_length", "--truncate_prompts"):
            encode_pair(tok, prompt, response, room + special, False, "a.jsonl, line 7", encoder)
        ids, prompt_len, cut = encode_pair(tok, prompt, response, room + special, True, "", encoder)
        assert len(ids) == room + special and cut > 0
        text = tok.decode(ids[:prompt_len], skip_special_tokens=True)
        assert text and prompt.endswith(text)
    assert encode_pair(tok, prompt, response, n + special + 1, False, "", encoder)[2] > 0  # one token short: no refusal


def test_encode_prompts_leaves_room_for_the_response(tokenizer):
    rows = [{"prompt": "the"}, {"prompt": "the quick brown fox"}]
    ids = tokenizer("the quick brown fox").input_ids
    assert encode_prompts(tokenizer, rows, len(ids) + 3, 3, False, "")[1] == ids
    with refused("a.jsonl, line 2", f"{len(ids)} tokens", "--max_length"):
        encode_prompts(tokenizer, rows, len(ids) + 2, 3, False, "a.jsonl")
    assert encode_prompts(tokenizer, rows, 5, 3, True, "")[1] == ids[-2:]
    with refused("--max_length", "--response_length"):
        encode_prompts(tokenizer, rows, 3, 3, True, "")


@pytest.mark.parametrize("name", ["bert_tokenizer", "roberta_tokenizer"])
def test_encoder_form_is_the_tokenizer_s_own(name, request):
    tok = request.getfixturevalue(name)
    for prompt, response in (("the quick fox", "jumps over"), ("dog", "my vow judges"), ("unheard of", "words")):
        ids, prompt_len, cut = encode_pair(tok, prompt, response, 64, False, "", encoder=True)
        assert ids == tok(prompt, response).input_ids and cut == 0
        assert ids[:prompt_len] == tok(prompt).input_ids  # <first> x <last>
    room = tok.num_special_tokens_to_add(pair=True) + 6  # 5 + 2 words, one too many: the prompt loses its first
    ids, prompt_len, cut = encode_pair(tok, "the quick brown fox jumps", "my vow", room, False, "", encoder=True)
    assert ids == tok("quick brown fox jumps", "my vow").input_ids and len(ids) == room and cut == 1
    assert ids[:prompt_len] == tok("quick brown fox jumps").input_ids
    long = "over the lazy dog while black quartz judges"  # 8 words for 5 places: it loses its last ones, one of x stays
    ids, prompt_len, cut = encode_pair(tok, "quick fox", long, room, False, "", encoder=True)
    assert ids == tok("fox", "over the lazy dog while").input_ids and cut == 4


def test_prompts_of_messages(tokenizer):
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    assert render(tokenizer, "hi") == "hi"
    assert render(tokenizer, messages) == "system: be brief\nuser: hi\nassistant:"
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
    )
    try:
        assert render(tokenizer, "hi") == "<user>hi<bot>"
        assert render(tokenizer, messages) == "<system>be brief<user>hi<bot>"
        ids, prompt_len, _ = encode_pair(tokenizer, messages, "yo", 128, False, "")
        assert tokenizer.decode(ids[:prompt_len]) == "<system>be brief<user>hi<bot>"
    finally:
        tokenizer.chat_template = None


MARKED = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
)


def test_truncation_of_several_turns_under_a_chat_template(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", MARKED)
    messages = say("s:be brief|u:the fox|a:yes|u:jumps")
    x = tokenizer("<system>be brief<user>the fox<assistant>yes<user>jumps<bot>").input_ids
    y = [*tokenizer("over the dog").input_ids, tokenizer.eos_token_id]
    whole = len(x) + len(y)
    for lost in (0, 1, 7, len(x) - 1):  # the first turns go first, the response stays whole
        ids, prompt_len, cut = encode_pair(tokenizer, messages, "over the dog", whole - lost, True, "")
        assert (ids, prompt_len, cut) == (x[lost:] + y, len(x) - lost, lost)
    lost = len(x) + 2  # one prompt token is left, and the response loses its end
    assert encode_pair(tokenizer, messages, "over the dog", whole - lost, True, "") == (x[-1:] + y[:-3], 1, lost)
    rows = [{"prompt": messages}]
    assert encode_prompts(tokenizer, rows, len(x) + 2, 5, True, "a.jsonl") == [x[3:]]


def test_truncation_of_several_turns_by_an_encoder(bert_tokenizer, monkeypatch):
    tok, words = bert_tokenizer, lambda text: bert_tokenizer.convert_tokens_to_ids(text.split())
    template = "{% for m in messages %}{{ 'my' if m.role == 'user' else 'vow' }} {{ m.content }} {% endfor %}judges"
    monkeypatch.setattr(tok, "chat_template", template)
    messages = say("u:the quick|a:brown|u:fox")
    cls, sep = tok.cls_token_id, tok.sep_token_id
    x, y = "my the quick vow brown my fox judges", words("over the dog")  # 8 and 3 words, 3 special tokens
    for room, kept, cut in ((14, x, 0), (13, x.removeprefix("my "), 1), (9, "my fox judges", 5)):
        ids, prompt_len, lost = encode_pair(tok, messages, "over the dog", room, True, "", encoder=True)
        assert (ids, lost) == ([cls, *words(kept), sep, *y, sep], cut) and prompt_len == len(words(kept)) + 2
    ids, prompt_len, lost = encode_pair(tok, messages, "over the dog", 6, True, "", encoder=True)
    assert (ids, prompt_len, lost) == ([cls, *words("judges"), sep, *y[:2], sep], 3, 8)


BAD_TEMPLATES = {
    "refuses a system role": "{% if messages[0].role == 'system' %}{{ raise_exception('No system\nrole') }}{% endif %}x",
    "adds to what is missing": "{{ messages[0].name + messages[0].content }}",
    "adds a number": "{{ messages[0].content + 1 }}",
    "is no template": "{% if %}",
}


@pytest.mark.parametrize("case", BAD_TEMPLATES)
def test_a_chat_template_that_fails_is_one_line_that_names_the_row(case, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", BAD_TEMPLATES[case])
    messages = say("s:be brief|u:hi")
    with refused("a.jsonl, line 7", "chat template", "system, user"):
        encode_pair(tokenizer, messages, "yo", 64, False, "a.jsonl, line 7")
    with refused("a.jsonl, line 1", "chat template", "system, user"):
        encode_prompts(tokenizer, [{"prompt": messages}], 64, 8, False, "a.jsonl")


def test_pad():
    ids, mask = pad([[5, 6], [7], [8, 9, 4]], 0)
    assert ids.tolist() == [[5, 6, 0], [7, 0, 0], [8, 9, 4]]
    assert mask.tolist() == [[True, True, False], [True, False, False], [True, True, True]]
    ids, mask = pad([[5, 6], [0]], 0, left=True)  # a real token may equal the padding: the mask knows
    assert ids.tolist() == [[5, 6], [0, 0]] and mask.tolist() == [[True, True], [False, True]]


def test_load_tokenizer_gives_a_scorer_a_padding_token_of_its_own(tokenizer, tmp_path):
    assert load_tokenizer_of(tmp_path / "a", tokenizer, True).pad_token == "<pad>"
    from tests.conftest import byte_level_tokenizer

    bare = byte_level_tokenizer(eos_token="<eos>")
    assert load_tokenizer_of(tmp_path / "b", bare, False).pad_token == "<eos>"
    scorer = load_tokenizer_of(tmp_path / "c", bare, True)
    assert scorer.pad_token_id == len(bare) and len(scorer) == len(bare) + 1
    with refused(tmp_path / "nothing", "no tokenizer"):
        load_tokenizer(str(tmp_path / "nothing"))
    with refused(tmp_path / "d", "end-of-sequence"):
        load_tokenizer_of(tmp_path / "d", byte_level_tokenizer(pad_token="<pad>"), False)


def load_tokenizer_of(folder, tokenizer, dedicated_pad):
    tokenizer.save_pretrained(folder)
    return load_tokenizer(str(folder), dedicated_pad)


# --- batches and schedule ---------------------------------------------------------------------------------------------


def test_length_batches_cover_every_index_once():
    lengths = [3, 9, 1, 4, 1, 5, 9, 2, 6, 5, 3]
    batches = length_batches(lengths, 4)
    assert sorted(i for b in batches for i in b) == list(range(11))
    assert [len(b) for b in batches] == [4, 4, 3]
    flat = [lengths[i] for b in batches for i in b]
    assert flat == [9, 9, 6, 5, 5, 4, 3, 3, 2, 1, 1]
    assert length_batches(lengths, 2, [4, 1, 8]) == [[1, 8], [4]]


def test_warmup_cosine_by_hand():
    factor = warmup_cosine(110, 0.1, 0.1)  # 11 steps of warm-up, 99 of cosine
    assert factor(0) == pytest.approx(1 / 11)
    assert factor(10) == factor(11) == 1  # the peak, where cos 0 = 1
    # a third of the way cos 60 deg = 0.5: 0.1 + 0.9 * 0.75; two thirds: cos 120 deg = -0.5: 0.1 + 0.9 * 0.25
    assert factor(44) == pytest.approx(0.775) and factor(77) == pytest.approx(0.325)
    # the last step, 98 / 99 of the way: cos 178.18 deg = -0.999497, 0.1 + 0.45 * 0.000503
    assert factor(109) == pytest.approx(0.100227, abs=1e-6)
    assert factor(110) == factor(500) == pytest.approx(0.1)
    assert warmup_cosine(1, 0.1, 0.1)(0) == 1 and warmup_cosine(3, 0.0, 0.5)(0) == 1


def lengths(prompts, responses):
    return torch.tensor([len(y) for y in responses])


def test_load_function():
    assert load_function("tests.test_data:lengths", "--judge")(["x", "y"], ["a", "bcd"]) == [1.0, 3.0]
    for spec in ("operator:add", "operator:eq", "operator:is_not"):  # too many and no numbers, no list, no list
        with refused("--judge", spec, "one number a response"):
            load_function(spec, "--judge")(["x", "y"], ["a", "b"])
    for spec in ("json:dumps", "textwrap:dedent"):
        with refused("--judge", spec, "must take (prompts, responses)"):
            load_function(spec, "--judge")
    for spec in ("no_such_module:f", "json:no_such_function", "json"):
        with refused("--judge", spec, "module:function"):
            load_function(spec, "--judge")


# --- the scripts ------------------------------------------------------------------------------------------------------


@pytest.fixture
def runs(policy_folder, scorer_folder, tmp_path):
    """For each script a function of (data file, changes of the flags) that runs it."""
    out = str(tmp_path / "out")

    def script(module, args, **fixed):
        return lambda data, **changes: module.main(args(**{"output_dir": out} | fixed | data | changes))

    judge = "tests.test_data:length_of_response"
    return {
        "sft": lambda data, **k: script(sft, sft.Args, model_name_or_path=policy_folder)({"dataset_name": data}, **k),
        "am_train": lambda data, **k: script(am_train, am_train.Args, model_name_or_path=policy_folder)(
            {"dataset_name": data}, **k
        ),
        "calibration": lambda data, **k: script(evaluate, evaluate.Calibration, scorers=(scorer_folder,))(
            {"dataset_name": data}, **k
        ),
        "winrate": lambda data, **k: script(
            evaluate, evaluate.Winrate, policy=policy_folder, reference=policy_folder, judge=judge
        )({"dataset_names": (data,)}, **k),
        "select_rehearsal": lambda data, **k: script(
            select_rehearsal,
            select_rehearsal.Args,
            reward_model_path=scorer_folder,
            model_name_or_path=policy_folder,
            num_clusters=1,
        )({"dataset_name": data}, **k),
        "ppo_sr": lambda data, **k: script(
            ppo_sr, ppo_sr.Args, model_name_or_path=policy_folder, reward_model_path=scorer_folder
        )({"dataset_name": data}, **k),
    }


def length_of_response(prompts, responses):
    return [float(len(r)) for r in responses]


SCRIPTS = ["sft", "am_train", "calibration", "winrate", "select_rehearsal", "ppo_sr"]
SECOND_FIELD = {"sft": "response", "am_train": "rejected", "calibration": "chosen"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_bad_data_is_refused_by_name_before_anything_is_written(script, runs, tmp_path):
    run, field = runs[script], SECOND_FIELD.get(script, "prompt")
    good = {k: v for k, v in ROW.items() if k != "response" or script == "sft"}
    without = {k: v for k, v in good.items() if k != field}
    with refused(tmp_path / "none.jsonl", "no such file"):
        run(str(tmp_path / "none.jsonl"))
    with refused("empty.jsonl", "no rows"):
        run(write(tmp_path / "empty.jsonl", ""))
    with refused("column.jsonl", "line 2", f"'{field}'", "missing"):
        run(jsonl(tmp_path / "column.jsonl", good, without))
    with refused("number.jsonl", "line 2", f"'{field}'", "int"):
        run(jsonl(tmp_path / "number.jsonl", good, good | {field: 7}))
    long = jsonl(tmp_path / "long.jsonl", good, good | {"prompt": "the quick brown fox " * 30})
    room = {} if script in ("sft", "am_train", "calibration") else {"response_length": 64}
    with refused("long.jsonl", "line 2", "tokens", "--max_length", "--truncate_prompts"):
        run(long, max_length=100, **room)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("script", ["calibration", "select_rehearsal", "ppo_sr"])
def test_a_scorer_without_a_reward_head_is_refused(script, runs, policy_folder, tmp_path):
    flag = {"scorers": (policy_folder,)} if script == "calibration" else {"reward_model_path": policy_folder}
    with refused(policy_folder, "reward head"):
        runs[script](jsonl(tmp_path / "a.jsonl", ROW), **flag)


@pytest.mark.parametrize("script", ["sft", "am_train", "winrate", "ppo_sr"])
def test_a_missing_model_folder_is_refused(script, runs, tmp_path):
    flag = {"winrate": "policy"}.get(script, "model_name_or_path")
    with refused(tmp_path / "no_model"):
        runs[script](jsonl(tmp_path / "a.jsonl", ROW), **{flag: str(tmp_path / "no_model")})


def test_ppo_refuses_what_cannot_run(runs, tmp_path):
    data = jsonl(tmp_path / "a.jsonl", ROW)
    for flags, said in (
        ({"global_batch_size": 10, "num_mini_batches": 3}, "--num_mini_batches"),
        ({"max_length": 64}, "--response_length"),
        ({"temperature": 0.0}, "--temperature"),
        ({"gold_reward": "toy_world:no_such"}, "--gold_reward"),
        ({"rehearsal_dataset_name": jsonl(tmp_path / "b.jsonl", {"prompt": "x"})}, "'response'"),
        ({"eval_dataset_names": (str(tmp_path / "none.jsonl"),)}, "no such file"),
    ):
        with refused(said):
            runs["ppo_sr"](data, **flags)


def test_other_flags_that_contradict_each_other_are_refused(runs, tmp_path):
    data = jsonl(tmp_path / "a.jsonl", ROW)
    with refused("--expected_reward"):
        runs["am_train"](data, loss="rm", expected_reward="joint")
    with refused("--num_clusters", "1 prompts"):
        runs["select_rehearsal"](data, num_clusters=2)
    with refused("--names"):
        runs["calibration"](data, names=("a", "b"))
    with refused("--judge"):
        runs["winrate"](data, judge="nothing")
    with refused("--model_name_or_path"):
        runs["sft"](data, model_name_or_path=None)


def test_a_command_line_ends_in_one_line_and_exit_code_2(policy_folder, tmp_path):
    flags = ["--dataset_name", str(tmp_path / "none.jsonl"), "--output_dir", str(tmp_path / "out")]
    command = [sys.executable, "am_train.py", "--model_name_or_path", policy_folder, *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"error: --dataset_name {tmp_path / 'none.jsonl'}: no such file\n"


# --- a few training steps ---------------------------------------------------------------------------------------------


def test_am_train_does_not_depend_on_the_micro_batch(runs, tmp_path):
    words = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog"]
    rows = [ROW | {"prompt": " ".join(words[: 1 + i % 7]), "chosen": words[i % 9]} for i in range(12)]
    data, grad_norms = jsonl(tmp_path / "a.jsonl", *rows), []
    for micro in (12, 5):
        flags = {"global_batch_size": 12, "per_device_train_batch_size": micro, "expected_reward": "regress"}
        runs["am_train"](data, output_dir=str(tmp_path / str(micro)), **flags)
        log = json.loads((tmp_path / str(micro) / "metrics.jsonl").read_text().splitlines()[-1])
        grad_norms.append((log["loss"], log["grad_norm"]))
    assert grad_norms[0] == pytest.approx(grad_norms[1], rel=1e-4)
    assert torch.isfinite(torch.tensor(grad_norms)).all() and grad_norms[0][1] > 0


def test_ppo_does_not_depend_on_the_micro_batch_and_rehearses(runs, tmp_path):
    """Losses are means over the tokens of the mini-batch, and the NLL of Eq. 9 over those of the rehearsal batch."""
    words = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog"]
    data = jsonl(tmp_path / "a.jsonl", *[{"prompt": " ".join(words[: 1 + i % 7])} for i in range(8)])
    replay = jsonl(
        tmp_path / "b.jsonl", *[{"prompt": w, "response": " ".join(words[:i])} for i, w in enumerate(words, 1)]
    )
    flags = dict(global_batch_size=8, total_steps=1, num_mini_batches=1, response_length=6, learning_rate=1e-3)
    flags |= dict(rehearsal_dataset_name=replay, rehearsal_batch_size=9, rehearsal_coef=1.0)
    logs = {}
    for micro in (16, 3):
        for reduction in ("mean", "sum"):
            out = str(tmp_path / f"{micro}{reduction}")
            runs["ppo_sr"](
                data, output_dir=out, per_device_train_batch_size=micro, rehearsal_reduction=reduction, **flags
            )
            rows = (Path(out) / "metrics.jsonl").read_text().splitlines()
            logs[micro, reduction] = json.loads(rows[-1])
    for reduction in ("mean", "sum"):
        keys = [k for k in logs[16, reduction] if k.startswith(("loss/", "policy/", "val/", "objective/"))]
        assert "loss/rehearsal_nll" in keys
        for key in keys:
            assert logs[16, reduction][key] == pytest.approx(logs[3, reduction][key], rel=1e-3, abs=1e-5), key
    assert logs[3, "sum"]["loss/rehearsal_nll"] > 3 * logs[3, "mean"]["loss/rehearsal_nll"]  # rows of 2 to 10 tokens


def test_ppo_takes_a_policy_without_a_padding_token(policy_folder, scorer_folder, tokenizer, tmp_path):
    """GPT-2 and Llama have none: am_train.py gives the scorer one of its own, and the policy masks with <eos>."""
    for name, source in (("policy", policy_folder), ("scorer", scorer_folder)):
        shutil.copytree(source, tmp_path / name)
    bare = load_tokenizer(policy_folder)
    bare.pad_token = bare.eos_token
    bare.save_pretrained(tmp_path / "policy")
    data = jsonl(tmp_path / "a.jsonl", {"prompt": "the fox"}, {"prompt": "dog"})
    args = ppo_sr.Args(
        model_name_or_path=str(tmp_path / "policy"), reward_model_path=str(tmp_path / "scorer"), dataset_name=data,
        output_dir=str(tmp_path / "out"), global_batch_size=2, total_steps=1, response_length=4, eval_steps=1,
    )  # fmt: skip
    ppo_sr.main(args)
    row = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["objective/kl"] == pytest.approx(0, abs=1e-5) and row["val/ratio"] == pytest.approx(1, abs=1e-3)


def test_what_is_no_policy_no_judge_or_too_long_is_refused(runs, policy_folder, scorer_folder, tmp_path):
    data = jsonl(tmp_path / "a.jsonl", {"prompt": "the fox"})
    with refused(scorer_folder, "language-model head"):
        runs["winrate"](data, reference=scorer_folder)
    with refused("--judge", "fails on one prompt"):
        runs["winrate"](data, judge="tests.test_data:jsonl")
    positions = load_policy(policy_folder).config.max_position_embeddings
    with refused("--max_length", f"{positions} positions"):
        runs["winrate"](data, max_length=10 * positions, response_length=2 * positions)
    with refused("--max_length", f"{positions} positions"):
        pair = {"prompt": "the fox " * 3 * positions, "chosen": "dog", "rejected": "fox"}
        runs["am_train"](jsonl(tmp_path / "b.jsonl", pair), max_length=100 * positions)


def test_numbers_that_cannot_be_are_refused_by_flag(policy_folder, tmp_path, monkeypatch, capsys):
    for flag, value in (("--global_batch_size", "0"), ("--learning_rate", "-1")):
        command = ["am_train.py", "--model_name_or_path", policy_folder, "--dataset_name", "a", "--output_dir", "b"]
        monkeypatch.setattr(sys, "argv", [*command, flag, value])
        with pytest.raises(SystemExit) as stop:
            run_cli(am_train.main, am_train.Args, "")
        assert stop.value.code == 2 and capsys.readouterr().err.startswith(f"error: {flag} ")


def test_a_run_folder_in_place_of_its_model_is_named(tmp_path):
    (tmp_path / "model").mkdir()
    with refused(tmp_path, "is a run folder; its model is", tmp_path / "model"):
        load_tokenizer(str(tmp_path))


def test_a_reader_that_has_read_enough_sees_no_traceback():
    command = f"{sys.executable} ppo_sr.py --help | head -1"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert result.stdout.startswith("usage: ppo_sr.py") and result.stderr == ""


def test_files_and_folders_are_named_with_their_flags(monkeypatch, policy_folder, tmp_path, capsys):
    good, bad = jsonl(tmp_path / "a.jsonl", ROW), jsonl(tmp_path / "b.jsonl", {"prompt": "x"})
    for flags, said in (
        (["--model_name_or_path", "none", "--dataset_name", good], "error: --model_name_or_path none: "),
        (["--model_name_or_path", policy_folder, "--dataset_name", bad], f"error: --dataset_name {bad}, line 1: "),
    ):
        monkeypatch.setattr(sys, "argv", ["sft.py", "--output_dir", str(tmp_path / "out"), *flags])
        with pytest.raises(SystemExit) as stop:
            run_cli(sft.main, sft.Args, "")
        assert stop.value.code == 2 and capsys.readouterr().err.startswith(said)


def test_no_rank_is_ahead_after_a_function_that_draws(monkeypatch):
    """The function runs on rank 0 alone; the shuffles of all ranks must stay the same."""
    monkeypatch.setattr(utils, "world", lambda: 2)
    monkeypatch.setattr(utils, "everywhere", lambda value: [value, None])
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert len(load_function("tests.test_data:draws", "--judge")(["x"], ["a"])) == 1
    assert torch.equal(torch.get_rng_state(), before)
    monkeypatch.setattr(utils, "world", lambda: 1)  # alone its draws count, and are part of a checkpoint
    load_function("tests.test_data:draws", "--judge")(["x"], ["a"])
    assert not torch.equal(torch.get_rng_state(), before)


def draws(prompts, responses):
    return torch.randn(len(responses)).tolist()


def test_every_rank_has_work_at_large_batch_sizes(monkeypatch):
    monkeypatch.setattr(utils, "world", lambda: 8)
    monkeypatch.setattr(engines, "world", lambda: 8)
    seen = []
    for rank in range(8):
        monkeypatch.setattr(engines, "rank", lambda rank=rank: rank)
        (batch, weight), *others = utils.dealt_batches([5] * 60, 256)
        assert weight == 1 and len(batch) <= 8 and not others
        seen += batch
    assert sorted(seen) == list(range(60))
    monkeypatch.setattr(utils, "world", lambda: 1)
    monkeypatch.setattr(engines, "world", lambda: 1)
    monkeypatch.setattr(engines, "rank", lambda: 0)
    assert [len(batch) for batch, _ in utils.dealt_batches([5] * 60, 256)] == [60]
