"""Rows of files and token ids of texts: TRL's forms are read, others refused by line and field."""

import datetime
import decimal
import gzip
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError
from tokenizers.normalizers import Lowercase
from tokenizers.processors import TemplateProcessing

from plumbing.hub import ask_once
from tests.conftest import byte_level_tokenizer
from utils import InputError, answer_end, decode, encode_pair, encode_prompts, encode_rows, encode_sides
from utils import length_batches, load_rows, load_tokenizer, pad, pad_pairs, render, same_form
from utils import write_json, write_jsonl

PAIR = {"prompt": "prompt", "chosen": "response", "rejected": "response"}
ANSWER = {"prompt": "prompt", "response": "response"}
ROW = {"prompt": "the quick fox", "chosen": "jumps", "rejected": "judges", "response": "the dog"}
OTHER_FORM = "tools/convert_data.py"


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


def jsonl(path, *rows):
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def refused(*parts):
    """An InputError of one line in which all `parts` stand."""
    together = "".join(rf"(?=.*{re.escape(str(part))})" for part in parts)
    return pytest.raises(InputError, match=together + r"^[^\n]+\Z")


def say(text):
    """`u:hi|a:yo` -> messages."""
    roles = {"u": "user", "a": "assistant", "s": "system"}
    return [{"role": roles[m[0]], "content": m[2:]} for m in text.split("|")]


# --- rows -----------------------------------------------------------------------------------------


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
    messages = say("u:the fox")
    rows = [ROW | {"prompt": messages}, ROW | {"prompt": say("u:the fox|s:dog")}]
    pd.DataFrame(rows).to_parquet(tmp_path / "a.parquet")
    assert load_rows(str(tmp_path / "a.parquet"), PAIR) == rows
    with refused(tmp_path / "none.parquet"):
        load_rows(str(tmp_path / "none.parquet"), PAIR)
    with refused(tmp_path / "a.parquet", "line 1", "'text'"):
        load_rows(str(tmp_path / "a.parquet"), {"text": "text"})


BAD_ROWS = {
    "missing column": ({"prompt": "x", "chosen": "y"}, ("'rejected'", "prompt, chosen")),
    "number": (ROW | {"chosen": 3}, ("'chosen'", "text")),
    "null": (ROW | {"rejected": None}, ("'rejected'", "text")),
    "empty prompt": (ROW | {"prompt": ""}, ("'prompt'", "empty")),
    "empty list": (ROW | {"prompt": []}, ("'prompt'",)),
    "messages without content": (ROW | {"prompt": [{"role": "user"}]}, ("'prompt'",)),
    "task": (ROW | {"task": 3}, ("'task'", "string")),
    "no object": (["a", "b"], ("JSON object",)),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_named_by_file_line_and_field(case, tmp_path):
    row, said = BAD_ROWS[case]
    path = jsonl(tmp_path / "a.jsonl", ROW, row)
    with refused(path, "line 2", *said):
        load_rows(path, PAIR)
    assert len(load_rows(path, PAIR, limit=1)) == 1  # the row before is fine


def test_a_column_for_the_line_of_errors_is_refused_and_not_dropped(tmp_path):
    """Where rows are left out, file_line says in which line the others stood."""
    path = jsonl(tmp_path / "a.jsonl", ROW, ROW | {"file_line": 7, "ended": "no"})
    with refused(path, "line 2", "field 'file_line'", "rename yours"):
        load_rows(path, PAIR)
    ours = [{"ended": True}, {"ended": True, "score": 1.0, "length": 3}, {}]  # select_rehearsal.py's
    path = jsonl(tmp_path / "b.jsonl", *(ROW | more | {"file_line": 7} for more in ours[:2]), ROW | {"file_line": None})
    assert load_rows(path, PAIR) == [ROW | more for more in ours]


def test_a_bad_file_is_named(tmp_path):
    for name in (tmp_path / "none.jsonl", tmp_path, "nobody/nothing", "nothing"):
        with refused(name):
            load_rows(str(name), PAIR)
    with refused("empty.jsonl", "no rows"):
        load_rows(write(tmp_path / "empty.jsonl", ""), PAIR)
    good = json.dumps(ROW) + "\n"
    with refused("bad.jsonl", "line 3", "not JSON"):
        load_rows(write(tmp_path / "bad.jsonl", good * 2 + "{'prompt': 1}\n"), PAIR)
    with refused("blank.jsonl", "line 2", "JSON object"):  # a blank line is none, but at the end
        load_rows(write(tmp_path / "blank.jsonl", good + "\n" + good), PAIR)
    assert len(load_rows(write(tmp_path / "end.jsonl", good + "\n \n"), PAIR)) == 1
    (tmp_path / "bad.jsonl.gz").write_bytes(b"not gzip")
    with refused("bad.jsonl.gz"):
        load_rows(str(tmp_path / "bad.jsonl.gz"), PAIR)
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "naïve"}'.encode("latin-1"))
    with refused("latin.jsonl"):
        load_rows(str(tmp_path / "latin.jsonl"), PAIR)


def test_the_shared_messages_of_whole_conversations_are_the_prompt(tmp_path, capsys):
    start = "s:be kind|u:hi|a:yo|u:and"
    good = {"chosen": say(start + "|a:more"), "rejected": say(start + "|a:less")}
    row = {"prompt": say(start), "chosen": "more", "rejected": "less"}
    path = jsonl(tmp_path / "a.jsonl", good, good | {"prompt": None})
    assert load_rows(path, PAIR) == [row, row]
    assert load_rows(path, {"prompt": "prompt"})[0]["prompt"] == row["prompt"]
    marked = [m | {"id": i, "content": m["content"] + " "} for i, m in enumerate(good["rejected"])]
    path = jsonl(tmp_path / "b.jsonl", good | {"rejected": marked})  # ids differ, turns do not
    assert load_rows(path, PAIR) == [row | {"rejected": "less "}]
    assert capsys.readouterr().out == ""


LEFT_OUT = {
    "they part early": ("u:hi|a:yo|u:and|a:more", "u:hi|a:no|u:or|a:less"),
    "and meet again": ("u:hi|a:yo|u:and|a:more", "u:hi|a:no|u:and|a:less"),
    "one goes on": ("u:hi|a:yo", "u:hi|a:no|u:why|a:so"),
    "one contains the other": ("u:hi|a:yo", "u:hi|a:yo|u:and|a:more"),
    "nothing shared": ("u:hi|a:yo", "u:ho|a:yo"),
    "no prompt at all": ("a:yo", "a:no"),
    "the user's turn last": ("u:hi|a:yo|u:and", "u:hi|a:yo|u:or"),
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_conversations_with_more_than_one_answer_are_refused(case, tmp_path):
    """tools/convert_data.py leaves them out."""
    good = {"chosen": say("u:hi|a:yo"), "rejected": say("u:hi|a:no")}
    bad = dict(zip(("chosen", "rejected"), map(say, LEFT_OUT[case]), strict=True))
    path = jsonl(tmp_path / "a.jsonl", good, bad)
    with refused(path, "line 2", "field '"):
        load_rows(path, PAIR)


def test_only_one_side_a_conversation_is_refused(tmp_path):
    for i, sides in enumerate(((say("u:hi|a:yo"), 3), ("yo", say("u:hi|a:no")))):
        path = jsonl(tmp_path / f"{i}.jsonl", dict(zip(("chosen", "rejected"), sides, strict=True)))
        with refused(path, "line 1", "'prompt'" if i else "'rejected'"):
            load_rows(path, PAIR)


def test_a_message_without_text_is_named(tmp_path):
    tool = {"role": "assistant", "content": None, "tool_calls": []}
    for row, field in (
        (ROW | {"prompt": [*say("u:hi"), tool, *say("u:so")]}, "prompt"),
        ({"chosen": [*say("u:hi"), tool], "rejected": say("u:hi|a:no")}, "chosen"),
        ({"chosen": [*say("u:hi"), tool, *say("a:x")], "rejected": say("u:hi|a:no")}, "prompt"),
    ):
        with refused("line 1", f"'{field}'", "message", "content"):
            load_rows(jsonl(tmp_path / "a.jsonl", row), PAIR)


def test_what_json_cannot_hold_is_refused_with_its_line(tmp_path):
    for value, said in (
        ("cut \ud83d", "surrogates"),
        (float("nan"), "Out of range"),
        ({"deep": [float("inf")]}, "Out of range"),
    ):
        path = write(tmp_path / "a.jsonl", json.dumps(ROW) + "\n" + json.dumps(ROW | {"x": value}))
        with refused(path, "line 2", "'x'", said):
            load_rows(path, PAIR)
    for text in ('{"prompt": ' + "9" * 5000 + "}", "[" * 100_000):
        path = write(tmp_path / "b.jsonl", json.dumps(ROW) + "\n" + text)
        with refused(path, "line 2", "not JSON"):
            load_rows(path, PAIR)


def test_a_folder_of_two_formats_is_refused(tmp_path):
    """The library would read one of them, and leave the other's rows out without a word."""
    rows = [{"text": "a"}, {"text": "b"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(load_rows(str(tmp_path), {"text": "text"})) == 2
    pytest.importorskip("datasets").Dataset.from_list(rows).to_parquet(tmp_path / "b.parquet")
    with refused(tmp_path, "one format"):
        load_rows(str(tmp_path), {"text": "text"})


def test_dates_of_a_parquet_file_are_text(tmp_path):
    import datasets

    path = str(tmp_path / "a.parquet")
    rows = [ROW | {"when": datetime.datetime(2024, 5, 1), "raw": b"x", "cost": decimal.Decimal(2)}]
    datasets.Dataset.from_list(rows).to_parquet(path)
    [row] = load_rows(path, PAIR)
    assert row["when"] == "2024-05-01 00:00:00" and row["prompt"] == ROW["prompt"]
    assert json.loads(json.dumps(row)) == row


def test_files_never_hold_nan(tmp_path):
    value = {"a": float("nan"), "b": [float("inf"), 1.5], "c": datetime.date(2024, 5, 1), 3: None}
    write_json(tmp_path / "a.json", value)
    write_jsonl(tmp_path / "a.jsonl", [value])
    plain = {"a": None, "b": ["inf", 1.5], "c": "2024-05-01", "3": None}
    assert json.loads((tmp_path / "a.json").read_text()) == plain
    assert json.loads((tmp_path / "a.jsonl").read_text()) == plain


def test_sides_of_messages_beside_a_prompt(tmp_path):
    for i, (prompt, chosen, rejected) in enumerate(
        (
            ("hi", say("u:hi|a:yo"), say("a:no")),
            (say("s:be kind|u:hi"), say("s:be kind|u:hi |a:yo"), "no"),
            (say("u:hi|a:oh|u:so"), say("u:hi|a:oh|u:so|a:yo"), say("a:no")),
        )
    ):
        row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        rows = load_rows(jsonl(tmp_path / f"{i}.jsonl", row), PAIR)
        assert rows == [{"prompt": prompt, "chosen": "yo", "rejected": "no"}]
    path = jsonl(tmp_path / "sft.jsonl", {"prompt": "hi", "response": say("u:hi|a:yo")})
    assert load_rows(path, ANSWER) == [{"prompt": "hi", "response": "yo"}]
    for i, (prompt, chosen) in enumerate(
        (("hi", "u:ho|a:yo"), ("hi", "s:x|u:hi|a:yo"), (say("u:a|a:b|u:hi"), "u:hi|a:yo"))
    ):
        row = {"prompt": prompt, "chosen": say(chosen), "rejected": "no"}
        path = jsonl(tmp_path / f"bad{i}.jsonl", row)
        with refused(path, "line 1", "'chosen'", "prompt"):
            load_rows(path, PAIR)
    path = jsonl(tmp_path / "c.jsonl", {"prompt": "hi", "chosen": "yo", "rejected": say("u:no")})
    with refused(path, "line 1", "'rejected'", "assistant"):
        load_rows(path, PAIR)


def test_other_forms_are_refused_with_the_command_that_converts_them(tmp_path):
    opened = "\n\nHuman: hi\n\nAssistant:"
    said = {"chosen": opened + " yo", "rejected": opened + " no"}
    ranking = {"prompt": "x", "responses": [{"policy": "a", "text": "b", "score": 1}]}
    for i, (row, field) in enumerate(
        (
            (said, "prompt"),
            (said | {"prompt": "hi"}, "chosen"),
            (ROW | {"prompt": opened}, "prompt"),
            (ranking, "chosen"),
        )
    ):
        path = jsonl(tmp_path / f"{i}.jsonl", ROW, row)
        with refused(path, "line 2", f"'{field}'", OTHER_FORM):
            load_rows(path, PAIR)
    for text in ("Tell me: what does \n\nHuman: mean?", "Human: hi\n\nAssistant:", "\nHuman: hi"):
        row = {"prompt": text, "chosen": "yo", "rejected": "a\n\nHuman: b"}  # no transcripts
        assert load_rows(jsonl(tmp_path / "plain.jsonl", row), PAIR) == [row]
    text = {"prompt": "x", "response": "\n\nHuman: a\n\nAssistant: b"}  # a policy may write one
    path = jsonl(tmp_path / "text.jsonl", text)
    assert load_rows(path, {"prompt": "prompt", "response": "text"}) == [text]


def test_null_is_absent(tmp_path):
    null = {"task": None, "margin": None, "note": None, "responses": None}
    assert load_rows(jsonl(tmp_path / "a.jsonl", ROW | null), PAIR) == [ROW]


def test_hub_ids(tmp_path, monkeypatch):
    import datasets

    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((*args, *kwargs.values()))
        return datasets.Dataset.from_list(rows)

    pair = {"prompt": say("u:hi"), "chosen": "yo", "rejected": "no"}
    talk = {"prompt": None, "chosen": say("u:hi|a:yo"), "rejected": say("u:hi|a:no"), "task": None}
    rows, read = [talk, talk | {"task": "t"}], [pair, pair | {"task": "t"}]
    with monkeypatch.context() as patch:
        patch.setattr(datasets, "load_dataset", load_dataset)
        for name in ("owner/name", "owner/name:test"):
            assert load_rows(name, PAIR) == read
        for name in ("owner/name.v1/config-a", "owner/name/config:test[:2]"):
            assert load_rows(name, PAIR) == read
    assert asked == [
        ("owner/name", "train"), ("owner/name", "test"),
        ("owner/name.v1", "config-a", "train"), ("owner/name", "config", "test[:2]"),
    ]  # fmt: skip
    folder = tmp_path / "owner" / "name" / "local"  # a folder is read by the same road
    folder.mkdir(parents=True)
    datasets.Dataset.from_list(rows).to_parquet(folder / "train.parquet")
    assert load_rows(str(folder), PAIR) == load_rows(f"{folder}:train", PAIR) == read
    monkeypatch.chdir(tmp_path)
    assert load_rows("owner/name/local", PAIR) == read
    with refused("owner/name/none", "hub id"):
        load_rows("owner/name/none", PAIR)


def test_a_file_of_another_kind_is_no_hub_id(tmp_path):
    with refused("notes.md", "must be .jsonl, .jsonl.gz or .parquet"):
        load_rows(write(tmp_path / "notes.md", "# hi"), PAIR)


@pytest.mark.parametrize("silent", [True, False])
def test_the_hub_is_asked_once(silent, monkeypatch):
    """Where it is silent, all that follows reads the cache alone; an answer, if a bad one, is one."""
    asked = []

    def model_info(self, path, timeout):
        asked.append(path)
        if silent:
            raise OSError("no network")
        raise HfHubHTTPError("404", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HfApi, "model_info", model_info)
    ask_once("owner/name")
    assert silent == constants.HF_HUB_OFFLINE
    ask_once("owner/name")
    assert len(asked) == (1 if silent else 2)
    ask_once(".")  # a folder
    assert len(asked) == (1 if silent else 2)


REAL = Path(__file__).parents[2] / "shared" / "data"


@pytest.mark.skipif(not REAL.is_dir(), reason="../shared/data is absent")
def test_real_files():
    counts = {}
    for path in REAL.glob("*.jsonl*"):
        name = path.name.split(".")[0]
        if name.startswith("prompts_"):
            counts[name] = len(load_rows(str(path), {"prompt": "prompt"}))
        elif name.endswith(("_train", "_test")):
            rows = load_rows(str(path), PAIR)
            counts[name] = len(rows)
            assert all(type(r["chosen"]) is type(r["rejected"]) is str for r in rows)
            assert all(r["prompt"] and r["task"] for r in rows)
    known = {"hh_harmless_train": 2012, "multitask_en_test": 913, "prompts_zh": 2346}
    assert known.items() <= counts.items() and len(counts) == 10


# --- tokens ---------------------------------------------------------------------------------------


def test_causal_form_is_prompt_response_eos(tokenizer):
    x, y = tokenizer("the fox").input_ids, tokenizer(" jumps").input_ids
    ids = [*x, *y, tokenizer.eos_token_id]
    assert encode_pair(tokenizer, "the fox", " jumps", 64, False, "") == (ids, len(x), 0)
    assert tokenizer.decode(x + y) == "the fox jumps"


def test_prompt_keeps_its_end_and_response_its_beginning(tokenizer):
    x, y = tokenizer("0123456789").input_ids, tokenizer("quartz").input_ids
    y = [*y, tokenizer.eos_token_id]
    n, m = len(x), len(y)
    assert n > m > 3
    room = n + 1  # the prompt alone fits, both do not: the prompt gives way
    ids, prompt_len, cut = encode_pair(tokenizer, "0123456789", "quartz", room, True, "")
    assert (ids, prompt_len, cut) == (x[m - 1 :] + y, n + 1 - m, m - 1)
    said = f"prompt has {n} tokens", f"response {m}", f"room for {room}", "--truncate_prompts"
    with refused("a.jsonl, line 7", *said):
        encode_pair(tokenizer, "0123456789", "quartz", room, False, "a.jsonl, line 7")
    # a response longer than what the prompt leaves is cut at its end, and has no end token
    long = "quartz 0123456789"
    ids, prompt_len, _ = encode_pair(tokenizer, "0", long, 5, True, "")
    assert ids == tokenizer("0").input_ids + tokenizer(long).input_ids[:4] and prompt_len == 1
    # both long: a quarter is the prompt's
    ids, prompt_len, cut = encode_pair(tokenizer, "0123456789", long, 8, True, "")
    assert ids == x[-2:] + tokenizer(long).input_ids[:6] and prompt_len == 2


def test_both_sides_share_one_prompt_however_it_is_cut(tokenizer):
    sides = ["yo", "the quick brown fox jumps"]
    texts, cut = encode_sides(tokenizer, "0123456789" * 3, sides, 30, True, "")
    (short, n), (long, same) = texts
    assert n == same < len(tokenizer("0123456789" * 3).input_ids) and short[:n] == long[:n]
    assert len(long) == 30 and short[n:] == [*tokenizer("yo").input_ids, tokenizer.eos_token_id]
    assert cut > 0


def test_bos_stays_and_an_end_behind_a_prompt_goes():
    tok = byte_level_tokenizer(pad_token="<pad>", eos_token="<eos>", bos_token="<bos>")
    special = [(t, tok.convert_tokens_to_ids(t)) for t in ("<bos>", "<eos>")]
    tok.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A <eos>", special_tokens=special)
    (bos, eos), x = (i for _, i in special), tok("the fox", add_special_tokens=False).input_ids
    assert tok("the fox").input_ids == [bos, *x, eos]
    ids, prompt_len, _ = encode_pair(tok, "the fox", "dog", 64, False, "")
    y = tok("dog", add_special_tokens=False).input_ids
    assert ids == [bos, *x, *y, eos] and prompt_len == len(x) + 1
    assert encode_pair(tok, "the fox", "dog<eos>", 64, False, "")[0] == ids  # one end, not two
    assert encode_prompts(tok, [{"prompt": "the fox"}], 64, 8, False, "") == [[bos, *x]]
    assert encode_prompts(tok, [{"prompt": "the fox"}], 11, 8, True, "") == [[bos, *x[-2:]]]
    assert encode_pair(tok, "the fox", "dog", len(y) + 4, True, "")[0] == [bos, *x[-2:], *y, eos]


@pytest.mark.parametrize("encoder", [False, True])
def test_prompt_that_fills_the_room_is_refused(encoder, tokenizer, bert_tokenizer):
    tok, special = (bert_tokenizer, 3) if encoder else (tokenizer, 0)
    prompt, response = "the quick brown fox jumps over the lazy dog", "my vow"
    n = len(tok(prompt, add_special_tokens=False).input_ids)
    m = len(tok(response, add_special_tokens=False).input_ids) + (not encoder)
    for room in (n + m - 1, n, n - 1):
        said = f"prompt has {n} tokens", f"response {m}", "--max_length", "--truncate_prompts"
        with refused("a.jsonl, line 7", *said):
            encode_pair(tok, prompt, response, room + special, False, "a.jsonl, line 7", encoder)
        length = room + special
        ids, prompt_len, cut = encode_pair(tok, prompt, response, length, True, "", encoder)
        assert len(ids) == room + special and cut > 0
        text = tok.decode(ids[:prompt_len], skip_special_tokens=True)
        assert text and prompt.endswith(text)
    *_, cut = encode_pair(tok, prompt, response, n + m + special, False, "", encoder)
    assert cut == 0


def test_encode_prompts_leaves_room_for_the_response(tokenizer):
    rows = [{"prompt": "the"}, {"prompt": "the quick brown fox"}]
    ids = tokenizer("the quick brown fox").input_ids
    assert encode_prompts(tokenizer, rows, len(ids) + 3, 3, False, "")[1] == ids
    with refused("a.jsonl, line 2", f"{len(ids)} tokens", "--max_length"):
        encode_prompts(tokenizer, rows, len(ids) + 2, 3, False, "a.jsonl")
    assert encode_prompts(tokenizer, rows, 5, 3, True, "")[1] == ids[-2:]
    with refused("--max_length"):
        encode_prompts(tokenizer, rows, 3, 3, True, "")


def test_encode_rows_counts_what_it_cuts_and_names_the_row(tokenizer, capsys):
    rows = [{"prompt": "the fox", "response": "dog"}] * 2
    rows += [{"prompt": "0123456789", "response": "my vow"}]
    x, y = tokenizer("0123456789").input_ids, tokenizer("my vow").input_ids
    args = SimpleNamespace(max_length=len(x) + 1, truncate_prompts=True)
    [first], [same], [cut] = encode_rows(tokenizer, rows, ["response"], args, "a.jsonl")
    assert first == same == encode_pair(tokenizer, "the fox", "dog", 64, False, "")[:2]
    assert len(cut[0]) == args.max_length and cut[0][cut[1] :] == [*y, tokenizer.eos_token_id]
    assert capsys.readouterr().out == f"a.jsonl: 1 of 3 rows shortened to {args.max_length} tokens\n"
    args.truncate_prompts = False
    with refused("a.jsonl, line 3", f"{len(x)} tokens", f"response {len(y) + 1}"):
        encode_rows(tokenizer, rows, ["response"], args, "a.jsonl")


@pytest.mark.parametrize("name", ["bert_tokenizer", "roberta_tokenizer"])
def test_encoder_form_is_the_tokenizer_s_own(name, request):
    tok = request.getfixturevalue(name)

    def encode(x, y, room):
        return encode_pair(tok, x, y, room, True, "", encoder=True)

    for x, y in (("the quick fox", "jumps over"), ("dog", "my vow judges"), ("unheard", "words")):
        ids, prompt_len, cut = encode(x, y, 64)
        assert ids == tok(x, y).input_ids and cut == 0
        assert ids[:prompt_len] == tok(x).input_ids  # <first> x <last>
    room = tok.num_special_tokens_to_add(pair=True) + 6
    # 5 + 2 words, one too many: the prompt loses its first
    ids, prompt_len, cut = encode("the quick brown fox jumps", "my vow", room)
    assert ids == tok("quick brown fox jumps", "my vow").input_ids
    assert len(ids) == room and cut == 1
    assert ids[:prompt_len] == tok("quick brown fox jumps").input_ids
    # 2 and 8 words for 6 places: a word of the prompt stays, the response loses its last ones
    ids, _, cut = encode("quick fox", "over the lazy dog while black quartz judges", room)
    assert ids == tok("fox", "over the lazy dog while").input_ids and cut == 4


MARKED = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
)


def test_prompts_of_messages(tokenizer, monkeypatch):
    messages = say("s:be brief|u:hi")
    assert render(tokenizer, "hi") == "hi"
    assert render(tokenizer, messages) == "system: be brief\nuser: hi\nassistant:"
    monkeypatch.setattr(tokenizer, "chat_template", MARKED)
    assert render(tokenizer, "hi") == "<user>hi<bot>"
    assert render(tokenizer, messages) == "<system>be brief<user>hi<bot>"
    ids, prompt_len, _ = encode_pair(tokenizer, messages, "yo", 128, False, "")
    assert tokenizer.decode(ids[:prompt_len]) == "<system>be brief<user>hi<bot>"


def test_truncation_of_several_turns_under_a_chat_template(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", MARKED)
    messages, response = say("s:be brief|u:the fox|a:yes|u:jumps"), "over the dog"
    x = tokenizer("<system>be brief<user>the fox<assistant>yes<user>jumps<bot>").input_ids
    y = [*tokenizer(response).input_ids, tokenizer.eos_token_id]
    whole = len(x) + len(y)
    head = len(tokenizer("<system>").input_ids)  # what the template puts before the first words
    for lost in (0, 1, 7):  # stays; then the first turns go first, and the response stays whole
        encoded = encode_pair(tokenizer, messages, response, whole - lost, True, "")
        assert encoded == (x[:head] + x[head + lost :] + y, len(x) - lost, lost)
    rows = [{"prompt": messages}]
    cut = encode_prompts(tokenizer, rows, len(x) + 2, 5, True, "a.jsonl")
    assert cut == [x[:head] + x[head + 3 :]]
    with refused("a.jsonl, line 1", "--max_length"):
        encode_prompts(tokenizer, rows, head + 5, 5, True, "a.jsonl")


ODD_TEMPLATES = {
    "drops the system": "{% for m in messages %}{% if m.role != 'system' %}<{{ m.role }}>{{ m.content }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}",
    "puts it into the last turn": "{% for m in messages %}{% if loop.last and m.role == 'user' %}"
    "<user>{{ messages[0].content }} {{ m.content }}{% elif m.role != 'system' %}<{{ m.role }}>{{ m.content }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}",
}


@pytest.mark.parametrize("case", ODD_TEMPLATES)
def test_a_cut_under_a_template_that_moves_or_drops_a_message(case, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", ODD_TEMPLATES[case])
    messages = say("s:be brief|u:" + "the fox " * 9 + "|a:yes|u:jumps")
    whole = encode_pair(tokenizer, messages, "dog", 512, False, "")[0]
    head = tokenizer("<user>").input_ids
    ids, _, cut = encode_pair(tokenizer, messages, "dog", 40, True, "a.jsonl, line 1")
    assert len(ids) == 40 == len(whole) - cut
    assert ids == whole[: len(head)] + whole[len(whole) - 40 + len(head) :]


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{% if m.role == 'user' %}<|u|>{{ m.content }}{% endif %}{% endfor %}<|a|>",
        "{% for m in messages %}{{ m.content }}\n\n{% endfor %}",
        "{{ messages[0].no.such }}",
    ],
    ids=["drops the assistant", "an added token that is white space", "fails"],
)
def test_the_end_is_eos_where_the_template_has_none_of_its_own(template):
    tok = byte_level_tokenizer(pad_token="<pad>", eos_token="<eos>")
    tok.add_special_tokens({"additional_special_tokens": ["<|u|>", "<|a|>"]})
    tok.add_tokens(["<|p|>", "\n\n"])
    tok.chat_template = template
    assert answer_end(tok) == tok.eos_token_id
    tok.chat_template = "{% for m in messages %}{{ m.content }}<|p|>\n{% endfor %}"  # not special
    assert answer_end(tok) == tok.convert_tokens_to_ids("<|p|>")
    ids = tok("the fox<|p|>").input_ids
    assert decode(tok, [ids, ids[:2]], {ids[-1]}) == ["the fox", tok.decode(ids[:2])]


def test_two_tokenizers_of_one_form(tmp_path):
    def tok(*added, **special):
        one = byte_level_tokenizer(**{"pad_token": "<pad>", "eos_token": "<eos>"} | special)
        one.add_tokens(list(added))
        return one

    plain, padded = byte_level_tokenizer(eos_token="<eos>"), byte_level_tokenizer(eos_token="<eos>")
    plain.pad_token = "<eos>"
    padded.add_special_tokens({"pad_token": "<|pad|>"})
    assert same_form(tok(), tok()) and same_form(plain, padded)
    assert not same_form(tok(), tok("lake"))  # it would read "the lake" in other tokens
    other = tok()
    other.chat_template = "{{ messages[0].content }}"
    assert not same_form(tok(), other)
    lower = tok()
    lower.backend_tokenizer.normalizer = Lowercase()
    assert not same_form(tok(), lower)


def test_truncation_of_several_turns_by_an_encoder(bert_tokenizer, monkeypatch):
    tok = bert_tokenizer
    template = "{% for m in messages %}{{ 'my' if m.role == 'user' else 'vow' }} {{ m.content }} "
    monkeypatch.setattr(tok, "chat_template", template + "{% endfor %}judges")
    messages = say("u:the quick|a:brown|u:fox")
    cls, sep = tok.cls_token_id, tok.sep_token_id

    def words(text):
        return tok.convert_tokens_to_ids(text.split())

    def encode(room):
        return encode_pair(tok, messages, "over the dog", room, True, "", encoder=True)

    # 8 and 3 words, 3 special tokens
    x, y = "my the quick vow brown my fox judges", words("over the dog")
    for room, kept, cut in ((14, x, 0), (13, x.removeprefix("my "), 1), (9, "my fox judges", 5)):
        ids, prompt_len, lost = encode(room)
        assert (ids, lost) == ([cls, *words(kept), sep, *y, sep], cut)
        assert prompt_len == len(words(kept)) + 2
    assert encode(6) == ([cls, *words("judges"), sep, *y[:2], sep], 3, 8)


BAD_TEMPLATES = {
    "refuses a system role": "{% if messages[0].role == 'system' %}"
    "{{ raise_exception('No system\nrole') }}{% endif %}x",
    "adds to what is missing": "{{ messages[0].name + messages[0].content }}",
    "adds a number": "{{ messages[0].content + 1 }}",
    "is no template": "{% if %}",
}


@pytest.mark.parametrize("case", BAD_TEMPLATES)
def test_a_chat_template_that_fails_names_the_row(case, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", BAD_TEMPLATES[case])
    messages = say("s:be brief|u:hi")
    with refused("a.jsonl, line 7", "chat template", "system", "user"):
        encode_pair(tokenizer, messages, "yo", 64, False, "a.jsonl, line 7")
    with refused("a.jsonl, line 1", "chat template", "system", "user"):
        encode_prompts(tokenizer, [{"prompt": messages}], 64, 8, False, "a.jsonl")


def test_load_tokenizer_gives_a_scorer_a_padding_token_of_its_own(tokenizer, tmp_path):
    def saved(name, tokenizer, dedicated_pad):
        tokenizer.save_pretrained(tmp_path / name)
        return load_tokenizer(str(tmp_path / name), dedicated_pad)

    assert saved("a", tokenizer, True).pad_token == "<pad>"
    bare = byte_level_tokenizer(eos_token="<eos>")
    assert saved("b", bare, False).pad_token == "<eos>"
    scorer = saved("c", bare, True)
    assert scorer.pad_token_id == len(bare) and len(scorer) == len(bare) + 1
    with refused(tmp_path / "nothing", "tokenizer"):
        load_tokenizer(str(tmp_path / "nothing"))
    endless = saved("d", byte_level_tokenizer(pad_token="<pad>"), False)
    for encode in (
        lambda: encode_pair(endless, "x", "y", 64, False, ""),
        lambda: encode_prompts(endless, [{"prompt": "x"}], 64, 8, False, ""),
    ):
        with refused(tmp_path / "d", "end-of-sequence"):
            encode()


def test_a_run_folder_in_place_of_its_model_is_named(tmp_path):
    (tmp_path / "model").mkdir()
    with refused(tmp_path, tmp_path / "model"):
        load_tokenizer(str(tmp_path))


# --- batches --------------------------------------------------------------------------------------


def test_pad():
    ids, mask = pad([[5, 6], [7], [8, 9, 4]], 0)
    assert ids.tolist() == [[5, 6, 0], [7, 0, 0], [8, 9, 4]]
    assert mask.tolist() == [[True, True, False], [True, False, False], [True, True, True]]
    ids, mask = pad([[5, 6], [0]], 0, left=True)  # a token may equal the padding: the mask knows
    assert ids.tolist() == [[5, 6], [0, 0]] and mask.tolist() == [[True, True], [False, True]]


def test_pad_pairs():
    ids, mask, prompt_lens = pad_pairs([([5, 6], [7]), ([8], [9])], 0)
    assert ids.tolist() == [[5, 6, 7], [8, 9, 0]] and prompt_lens.tolist() == [2, 1]
    assert mask.tolist() == [[True, True, True], [True, True, False]]


def test_length_batches_cover_every_index_once():
    lengths = [3, 9, 1, 4, 1, 5, 9, 2, 6, 5, 3]
    batches = length_batches(lengths, 4)
    assert sorted(i for b in batches for i in b) == list(range(11))
    assert [len(b) for b in batches] == [4, 4, 3]
    flat = [lengths[i] for b in batches for i in b]
    assert flat == [9, 9, 6, 5, 5, 4, 3, 3, 2, 1, 1]
    assert length_batches(lengths, 2, [4, 1, 8]) == [[1, 8], [4]]
    batches = length_batches(lengths, 4, length_ratio=0.5)  # 4 is less than half of 9
    assert [[lengths[i] for i in b] for b in batches] == [[9, 9, 6, 5], [5, 4, 3, 3], [2, 1, 1]]
