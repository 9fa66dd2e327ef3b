"""The judges against a real server on a socket: protocol, parsing, failures, cache, cost,
concurrency, the key."""

import json
import multiprocessing
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
from tests.judge_server import JudgeServer, verdict
from tools import judges
from tools.judges import Settings, fill, load_settings, parse_verdict
from tools.statistics import win_lose_tie
from utils import InputError

ROOT = Path(__file__).parents[1]
KEY = "sk-not-a-real-key-0123456789"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(judges, "BACKOFF", 0.01)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


def load_judge(folder, server=None, spec="openai:small", **changes):
    settings = {"base_url": server and server.url, "concurrency": 4} | changes
    return judges.load_judge(spec, Settings(**settings), folder)


def pairs(n):
    """Rows of prompt, response and reference; the responses of even rows are the longer ones."""
    return [
        {
            "prompt": f"question {i}",
            "response": f"answer {i}" + " which goes on" * (i % 2 == 0),
            "reference": f"other {i} and more",
        }
        for i in range(n)
    ]


def shown(text):
    """What stands under A and under B."""
    return re.search(r"\[Answer A\]\n(.*?)\n\[End.*\[Answer B\]\n(.*?)\n\[End", text, re.DOTALL).groups()


def longer(text, n=0):
    a, b = map(len, shown(text))
    return verdict("A" if a > b else "B" if b > a else "tie", f"{max(a, b)} characters")


def verdicts(rows):
    return [row["verdict"] for row in rows]


# --- verdicts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        ('{"reason": "clear", "verdict": "A"}', ("A", "clear")),
        ('{"verdict": "b", "reason": "x"}', ("B", "x")),
        ('```json\n{"reason": "as good", "verdict": "TIE"}\n```', ("tie", "as good")),
        (
            'Sure! {"reason": "a {brace} and\na line", "verdict": "[[B]]"} Done.',
            ("B", "a {brace} and\na line"),
        ),
        ('{"reason": "x", "verdict": "Answer A."}', ("A", "x")),
        ('{"result": {"verdict": "A", "reason": "inside"}}', ("A", "inside")),
        ('<think>{"verdict": "A"}? No.</think>{"reason": "", "verdict": "B"}', ("B", "")),
        ('{"reason": "it says "no" twice", "verdict": "A"}', ("A", "")),  # no JSON, but clear
        ('{"reason": "cut, "verdict": "B"', ("B", "")),
        ('{"reason": null, "verdict": "tie"}', ("tie", "")),
        ('{"verdict": "A"} {"verdict": "A"}', ("A", "")),
        ('{"verdict": "A"} or {"verdict": "B"}', ("malformed", "")),
        (
            '{"reason": "...", "verdict": "A" | "B" | "tie"}',
            ("malformed", ""),
        ),  # the instruction, repeated
        ('{"reason": "...", "verdict": "..."}', ("malformed", "")),
        ('{"reason": "x", "verdict": "both"}', ("malformed", "")),
        ('{"reason": "x", "verdict": null}', ("malformed", "")),
        ('{"reason": "x", "verdict": ["A", "B"]}', ("malformed", "")),
        ("A is better", ("malformed", "")),
        ("", ("malformed", "")),
        ("{" * 3000, ("malformed", "")),
        ('{"a":' * 3000, ("malformed", "")),
        ("I'm sorry, but I can’t compare these.", ("refused", "")),
        ("As an AI I will not.", ("refused", "")),
        ('{"reason": "I cannot fault A", "verdict": "A"}', ("A", "I cannot fault A")),
        # what is thought before the answer is no verdict, least of all where it was cut off
        ('<think>so {"verdict": "A"}. Or is B', ("malformed", "")),
        ('<think>\nI would say "verdict": "A"', ("malformed", "")),
        ('<Thinking>{"verdict": "A"}', ("malformed", "")),
        ('[THINK]{"verdict": "A"}[/THINK]{"verdict": "B"}', ("B", "")),
        ('[THINK]{"verdict": "A"}', ("malformed", "")),
        ('<seed:think>{"verdict": "A"}</seed:think>{"verdict": "B"}', ("B", "")),
        ('◁think▷{"verdict": "A"}', ("malformed", "")),
        ('<|begin_of_thought|>{"verdict": "A"}<|end_of_thought|>{"verdict": "B"}', ("B", "")),
        ('[Reasoning] B is right. {"verdict": "B"}', ("B", "")),  # a heading
        ('{"verdict": "A"} at first sight</think>{"verdict": "B"}', ("B", "")),
        ('{"verdict": "A"}</think>', ("malformed", "")),
        ('<think>x</think> {"verdict": "B"} <think>or {"verdict": "A"}', ("B", "")),
        ('<think>a <think>b</think> {"verdict": "A"}</think>{"verdict": "B"}', ("B", "")),
        ('{"reason": "A opens with <think>", "verdict": "B"}', ("B", "A opens with <think>")),
        ("<think>I'm sorry, but", ("malformed", "")),
    ],
)
def test_parse_verdict(reply, said):
    assert parse_verdict(reply) == said


def test_template_is_filled_in_one_pass_and_must_have_its_places(tmp_path):
    assert fill("{prompt}|{a}|{b}|{c}", "x {a}", "y {b}", r"z \1 {prompt}") == r"x {a}|y {b}|z \1 {prompt}|{c}"
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    assert fill("<{prompt}>", messages, "", "") == "<user: hi\nassistant: yo>"
    (tmp_path / "t.txt").write_text("{prompt} {a}")
    for path, said in (("t.txt", r"has no \{b\}"), ("none.txt", "cannot be read")):
        with pytest.raises(InputError, match=f"template .*{path}.*{said}"):
            load_judge(tmp_path, template=str(tmp_path / path))


# --- protocol -------------------------------------------------------------------------------------


def test_both_orders_are_asked_and_a_clear_judge_is_followed(tmp_path):
    asked = pairs(4)
    same = {"prompt": "same", "response": "equal text", "reference": "equal text"}
    with JudgeServer(longer) as server:
        judge = load_judge(tmp_path, server, max_tokens=77)
        rows = judge.compare([*asked, same, asked[0]])  # identical answers; a row again
        body = server.bodies[0]
        assert len(server.texts) == len(set(server.texts)) == judge.usage["requests"] == 8
    assert verdicts(rows) == ["win", "lose", "win", "lose", "tie", "win"]
    orders = sorted(map(shown, server.texts))
    both = [(row["response"], row["reference"]) for row in asked]
    assert orders == sorted([*both, *(two[::-1] for two in both)])
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("small", 0, 77)
    assert body["path"] == "/v1/chat/completions" and "question" in body["messages"][0]["content"]
    said = f"{len(asked[0]['response'])} characters"
    assert rows[0]["judgements"] == [
        {"first": "response", "verdict": "A", "reason": said},
        {"first": "reference", "verdict": "B", "reason": said},
    ]
    summary = judge.summary(rows)
    assert summary == {
        "pairs_asked": 5, "identical": 1, "disagreements": 0, "flips": 0, "first": 50,
        "malformed": 0, "refused": 0, "too_long": 0,
    }  # fmt: skip
    assert judge.usage["prompt_tokens"] == 8 * 7 and judge.usage["completion_tokens"] == 8 * 3


@pytest.mark.parametrize(("letter", "first"), [("A", 100), ("B", 0), ("tie", None)])
def test_a_position_biased_judge_gives_ties_every_time(letter, first, tmp_path):
    with JudgeServer(lambda text, n: verdict(letter)) as server:
        judge = load_judge(tmp_path, server)
        rows = judge.compare(pairs(10))
    summary = judge.summary(rows)
    assert verdicts(rows) == ["tie"] * 10
    assert summary["first"] == first and summary["flips"] == summary["disagreements"] == 100 * (letter != "tie")


def test_summary_by_hand(tmp_path):
    """Verdicts by order: A B win, A A flip, B B flip, A tie disagreement, tie tie, A malformed.

    Usable pairs 5: they disagree in 3 and flip in 2; of 7 verdicts for an answer, A B A A B B A, 4
    are for the first."""
    said = [("A", "B"), ("A", "A"), ("B", "B"), ("A", "tie"), ("tie", "tie"), ("A", "malformed")]
    rows = [{"judgements": [{"verdict": v} for v in two]} for two in said] + [{"judgements": []}]
    summary = load_judge(tmp_path, base_url="http://127.0.0.1:9/v1").summary(rows)
    assert summary["pairs_asked"] == 6 and summary["identical"] == 1 and summary["malformed"] == 1
    assert [summary[k] for k in ("disagreements", "flips", "first")] == pytest.approx([60, 40, 400 / 7])


def test_malformed_and_refused_replies_are_asked_for_once_more_and_counted(tmp_path):
    bad = {
        "question 0": "no idea",
        "question 1": {"content": None, "refusal": "I will not"},
        "question 2": "I'm sorry.",
    }
    bad |= {
        "question 3": {"content": None, "finish_reason": "content_filter"},
        "question 4": "<think>it is A, as",
    }
    bad |= {"question 5": {"content": ""}, "question 6": {"content": None}}
    seen = {}

    def answer(text, n):
        name = re.search(r"question \d+", text)[0]
        seen[text] = seen.get(text, 0) + 1
        if name == "question 7" and seen[text] == 1:
            return "hm"  # and a verdict when asked again
        return bad.get(name) or longer(text)

    with JudgeServer(answer) as server:
        judge = load_judge(tmp_path, server)
        rows = judge.compare(pairs(9))
        assert verdicts(rows) == ["tie"] * 7 + ["lose", "win"]
        summary = judge.summary(rows)
        assert (summary["malformed"], summary["refused"], summary["flips"]) == (8, 6, 0)
        assert {re.search(r"question (\d+)", text)[1]: n for text, n in seen.items()} == {
            str(i): 2 if i < 8 else 1 for i in range(9)
        }
        again = load_judge(tmp_path, server)  # a tie by now: not asked a third time
        assert again.compare(pairs(9)) == rows and again.usage["requests"] == 0 and len(server.texts) == 34


def test_no_room_and_a_filtered_prompt_are_ties_and_not_asked_again(tmp_path):
    def answer(text, n):
        code = "content_filter" if "question 0" in text else "context_length_exceeded" if "question 1" in text else None
        return (400, {"error": {"message": "no", "code": code}}, {}) if code else longer(text)

    with JudgeServer(answer) as server:
        judge = load_judge(tmp_path, server)
        rows = judge.compare(pairs(3))
        assert verdicts(rows) == ["tie", "tie", "win"]
        assert [judge.summary(rows)[k] for k in ("refused", "too_long")] == [2, 2]
        asked = len(server.texts)
        load_judge(tmp_path, server).compare(pairs(3))
        assert len([t for t in server.texts[asked:] if "question 1" in t or "question 2" in t]) == 0


# --- failures -------------------------------------------------------------------------------------


def test_rate_limits_and_server_errors_are_tried_again(tmp_path, monkeypatch):
    seen, waits = {}, []

    def answer(text, n):
        seen[text] = seen.get(text, 0) + 1
        status = {1: 429, 2: 500, 3: 503}.get(seen[text])
        return (status, {"error": {"message": "later"}}, {"Retry-After": "0.05"}) if status else longer(text)

    with JudgeServer(answer) as server:
        judge = load_judge(tmp_path, server, concurrency=1, max_judgements=6)
        wait = judge.model.stop.wait
        monkeypatch.setattr(judge.model.stop, "wait", lambda seconds: waits.append(seconds) or wait(seconds))
        assert verdicts(judge.compare(pairs(3))) == ["win", "lose", "win"]
    assert len(server.texts) == 24 and len(server.answered) == 6
    assert judge.usage["requests"] == 6 and judge.usage["retries"] == 18  # errors cost nothing
    assert len(waits) == 18 and min(waits) == 0.05  # the server's wish


ERRORS = [  # with status 200, as gateways send them when they are overloaded
    {"error": {"message": "overloaded", "code": 503}},
    {"error": {"message": "overloaded", "code": "rate_limit"}, "choices": []},
    {"error": "overloaded", "choices": None},
    {"object": "error", "message": "overloaded", "code": 50301},
    {"detail": "overloaded"},
    {"choices": []},
    {"choices": {"overloaded": True}},
    {
        "choices": [
            {
                "index": 0,
                "finish_reason": "error",
                "error": {"message": "overloaded", "code": 502},
                "message": {"role": "assistant", "content": '{"verdict": "A"}'},
            }
        ]
    },
    "<html>overloaded",
    "",
    "null",
]


@pytest.mark.parametrize("body", ERRORS)
def test_an_error_in_the_place_of_a_reply_is_asked_again_and_never_kept(body, tmp_path):
    """The server errs twice a question and is then well; or it stays ill, and a later run, when it
    is well again, asks everything."""
    seen = {}

    def answer(text, n):
        seen[text] = seen.get(text, 0) + 1
        return (200, body, {}) if seen[text] <= 2 else longer(text)

    path = tmp_path / "judgements.jsonl"
    with JudgeServer(answer) as server:
        judge = load_judge(tmp_path, server)
        assert verdicts(judge.compare(pairs(2))) == ["win", "lose"]
        assert set(seen.values()) == {3} and judge.usage["requests"] == 4
        assert len(path.read_text().splitlines()) == 4 and "overloaded" not in path.read_text()
        path.unlink()
        server.answer = lambda text, n: (200, body, {})
        with pytest.raises(InputError, match=r"no reply in 6 tries .*the same command goes on"):
            load_judge(tmp_path, server).compare(pairs(2))
        assert path.read_text() == ""
        server.answer, asked = longer, len(server.texts)
        assert verdicts(load_judge(tmp_path, server).compare(pairs(2))) == ["win", "lose"]
        assert len(server.texts) - asked == 4


def test_errors_that_earlier_versions_kept_are_asked_again(tmp_path):
    """An empty reply of no tokens is what they made of an error; an empty one of tokens is one."""
    with JudgeServer(longer) as server:
        judge = load_judge(tmp_path, server)
        judge.compare(pairs(2))
        lines = [json.loads(line) for line in (tmp_path / "judgements.jsonl").read_text().splitlines()]
        nothing = {"reply": "", "prompt_tokens": 0, "completion_tokens": 0}
        lines[0] |= nothing
        lines[1] |= {"reply": ""}
        lines[2] |= nothing | {"failed": "refused"}
        (tmp_path / "judgements.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert sorted(len(r) for r in load_judge(tmp_path, server).replies.values()) == [1, 1, 1]


def test_an_error_in_the_place_of_a_reply_that_stays_is_not_asked_again(tmp_path):
    for code, said in ((401, None), ("context_length_exceeded", "too_long"), ("content_filter", "refused")):
        body = {"error": {"message": "no", "code": code}}
        with JudgeServer(lambda text, n, body=body: (200, body, {})) as server:
            judge = load_judge(tmp_path / str(code), server, concurrency=1)
            if said:
                assert judge.summary(judge.compare(pairs(1)))[said] == 2
            else:
                with pytest.raises(InputError, match="the server refuses"):
                    judge.compare(pairs(1))
                assert len(server.texts) == 1


def test_fields_of_the_request_can_be_changed_added_and_left_out(tmp_path):
    """OpenAI's o series takes no max_tokens and no temperature of 0."""
    thinking = {"temperature": None, "max_tokens": None, "max_completion_tokens": 4000, "top_k": 1}
    (tmp_path / "settings.json").write_text(json.dumps({"request": thinking}))
    usual, common = {"temperature": 0, "max_tokens": 512}, {"model", "messages", "path"}

    def o_series(text, n):
        wrong = {"max_tokens", "temperature"} & server.bodies[n].keys()
        said = f"Unsupported parameter: {', '.join(sorted(wrong))}"
        return (400, {"error": {"message": said, "code": "unsupported_parameter"}}, {}) if wrong else longer(text)

    with JudgeServer(longer) as server:
        load_judge(tmp_path / "a", server).compare(pairs(1))
        assert {k: v for k, v in server.bodies[0].items() if k not in common} == usual
        server.answer, before = o_series, len(server.bodies)
        with pytest.raises(InputError, match=r"Unsupported parameter.*; `request` in --judge_config"):
            load_judge(tmp_path / "b", server, concurrency=1).compare(pairs(1))
        changes = {"request": load_settings(tmp_path / "settings.json").request}
        rows = load_judge(tmp_path / "a", server, **changes).compare(pairs(1))  # another question
        assert verdicts(rows) == ["win"]
        of_body = {k: v for k, v in server.bodies[-1].items() if k not in common}
        assert of_body == {"max_completion_tokens": 4000, "top_k": 1}
        assert len(server.bodies) - before == 3


def test_waits_double_up_to_a_bound_and_tries_end(tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(judges, "BACKOFF", 20.0)
    with JudgeServer(lambda text, n: (429, {"error": {"message": "slow down"}}, {})) as server:
        judge = load_judge(tmp_path, server, concurrency=1)
        monkeypatch.setattr(judge.model.stop, "wait", lambda seconds: waits.append(seconds) and False)
        with pytest.raises(
            InputError,
            match=r"no reply in 6 tries \(Error code: 429.*slow down.*the same command goes on",
        ):
            judge.compare(pairs(1))
        assert judge.usage["requests"] == 0
    for i, wait in enumerate(waits[:5]):
        assert min(60, 10 * 2**i) <= wait <= min(60, 20 * 2**i)


def test_time_outs_are_tried_again(tmp_path):
    slow = threading.Event()

    def answer(text, n):
        if n < 2:
            slow.wait(5)
        return longer(text)

    with JudgeServer(answer) as server:
        judge = load_judge(tmp_path, server, timeout=0.3, concurrency=2)
        assert verdicts(judge.compare(pairs(1))) == ["win"]
        assert len(server.texts) == 4 and judge.usage["retries"] == 2 and judge.usage["requests"] == 4
        slow.set()


def test_a_dead_server_and_a_refused_key_end_in_one_line(tmp_path):
    with JudgeServer(lambda text, n: (401, {"error": {"message": f"bad key {KEY}"}}, {})) as server:
        with pytest.raises(
            InputError,
            match=r"--judge openai:small: the server refuses \(Error code: 401 .*\[key\]",
        ) as stop:
            load_judge(tmp_path, server, concurrency=1).compare(pairs(50))
        assert len(server.texts) == 1 and KEY not in str(stop.value)  # the others are not sent
    with pytest.raises(InputError, match=r"no reply in 6 tries \(APIConnectionError, 127.0.0.1\)"):
        load_judge(tmp_path, server).compare(pairs(1))


def test_what_a_judge_needs_is_said_in_one_line(tmp_path, monkeypatch):
    config = tmp_path / "settings.json"
    for text, said in (
        ('{"concurrency": 0}', r"'concurrency' must be a positive whole number, found 0"),
        ('{"max_tokens": "many"}', r"'max_tokens' must be a positive whole number, found 'many'"),
        ('{"template": 3}', r"'template' must be text, found 3"),
        ('{"judge": "x"}', r"has no setting 'judge'; they are base_url, template, cache"),
        ('{"request": {"model": "x"}}', r"'request' must be an object of fields other than model"),
        ('{"request": "max_tokens"}', r"'request' must be an object of fields other than model"),
        ("[]", "expected a JSON object"),
        ("{", "cannot be read as JSON"),
    ):
        config.write_text(text)
        with pytest.raises(InputError, match=f"--judge_config .*settings.json.*{said}"):
            judges.load_judge("openai:small", str(config), tmp_path)
    config.write_text('{"timeout": 5, "cache": "all.jsonl"}')
    assert load_settings(config) == Settings(timeout=5, cache="all.jsonl")
    (tmp_path / "folder").mkdir()
    for cache, said in ((tmp_path / "folder", "is a folder; name a file"), ("/proc/1/a", "cannot be made in /proc/1")):
        with JudgeServer() as server, pytest.raises(InputError, match=f"--judge_config: cache {cache}: {said}"):
            load_judge(tmp_path, server, cache=str(cache))  # before any policy answers
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(InputError, match="set OPENAI_API_KEY, or OPENAI_BASE_URL"):
        load_judge(tmp_path)
    with JudgeServer(longer) as server:  # vLLM wants none
        assert verdicts(load_judge(tmp_path, server).compare(pairs(1))) == ["win"]
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(InputError, match="openai is not installed; pip install openai"):
        load_judge(tmp_path)


# --- cache and cost -------------------------------------------------------------------------------


def test_a_second_run_costs_nothing_and_another_question_is_another_one(tmp_path):
    with JudgeServer(longer) as server:

        def requests(folder=tmp_path, change=None, **changes):
            before, rows = len(server.texts), pairs(3)
            rows[2] |= change or {}
            judge = load_judge(folder, server, **changes)
            assert verdicts(judge.compare(rows)) == ["win", "lose", "win"]
            assert len(server.texts) - before == judge.usage["requests"]
            return judge.usage["requests"]

        assert requests() == 6 and requests() == 0
        assert requests(spec="openai:large") == 6
        assert requests(max_tokens=100) == 6
        (tmp_path / "t.txt").write_text(judges.TEMPLATE + "Think well.")
        assert requests(template=str(tmp_path / "t.txt")) == 6
        assert requests(change={"prompt": "new"}) == 2
        assert requests(change={"reference": "short"}) == 2
        assert requests(cache=str(tmp_path / "judgements.jsonl"), folder=tmp_path / "elsewhere") == 0
        assert requests() == 0
        entries = [json.loads(line) for line in (tmp_path / "judgements.jsonl").read_text().splitlines()]
        assert len(entries) == 28 and {"key", "judge", "reply"} <= entries[0].keys()


def test_a_torn_line_costs_its_own_judgement_only(tmp_path):
    with JudgeServer(longer) as server:
        load_judge(tmp_path, server).compare(pairs(3))
        path = tmp_path / "judgements.jsonl"
        path.write_text(path.read_text()[:-20])
        for more in (1, 0):
            before = len(server.texts)
            assert verdicts(load_judge(tmp_path, server).compare(pairs(3))) == [
                "win",
                "lose",
                "win",
            ]
            assert len(server.texts) - before == more


def test_a_killed_run_goes_on_and_pays_no_verdict_twice(tmp_path):
    """At the 18th request the server goes silent and the client is killed with `kill -9`; what had
    been answered then was on disk, so in the end every question has been answered once."""
    silent, dead = threading.Event(), threading.Event()

    def answer(text, n):
        if n >= 17 and not dead.is_set():
            silent.set()
            dead.wait(20)
            raise ConnectionError  # of the killed client
        return longer(text)

    with JudgeServer(answer) as server:
        run = multiprocessing.get_context("fork").Process(
            target=lambda: load_judge(tmp_path, server).compare(pairs(20))
        )
        run.start()
        assert silent.wait(20)
        path = tmp_path / "judgements.jsonl"
        end = time.time() + 20
        while path.read_text().count("\n") < 17 and time.time() < end:
            time.sleep(0.02)
        os.kill(run.pid, 9)
        run.join()
        dead.set()
        assert run.exitcode == -9 and len(server.answered) == 17
        rows = load_judge(tmp_path, server).compare(pairs(20))
        assert verdicts(rows) == ["win", "lose"] * 10
        assert len(server.answered) == len(set(server.answered)) == 40


def test_max_judgements_is_respected(tmp_path):
    with JudgeServer(longer) as server:
        with pytest.raises(
            InputError,
            match=r"max_judgements: 20 of 20 judgements are not in .*, and 19 are allowed",
        ):
            load_judge(tmp_path, server, max_judgements=19).compare(pairs(10))
        assert not server.texts  # no half result is paid for
        load_judge(tmp_path, server, max_judgements=20).compare(pairs(10))
        assert len(server.texts) == 20
        assert verdicts(load_judge(tmp_path, server, max_judgements=2).compare(pairs(11)))[-1] == "win"
        assert len(server.texts) == 22
    with JudgeServer(lambda text, n: "hm") as server:  # asking again is within the bound
        rows = load_judge(tmp_path, server, max_judgements=5).compare(pairs(2))
        assert verdicts(rows) == ["tie"] * 2 and len(server.texts) == 5
    with JudgeServer(lambda text, n: time.sleep(0.5)) as server:  # a request without a reply may be on the bill
        judge = load_judge(tmp_path, server, max_judgements=3, timeout=0.1, concurrency=2)
        with pytest.raises(InputError, match="max_judgements: spent"):
            judge.compare(pairs(1))
        assert len(server.texts) == 3


@pytest.mark.parametrize("concurrency", [1, 8])
def test_requests_in_flight_reach_the_bound_and_no_more(concurrency, tmp_path):
    n = 200 if concurrency > 1 else 5
    with JudgeServer(longer, delay=0.02) as server:
        judge = load_judge(tmp_path, server, concurrency=concurrency)
        assert verdicts(judge.compare(pairs(n))) == ["win", "lose"] * (n // 2) + ["win"] * (n % 2)
    assert server.most_in_flight == concurrency and len(server.texts) == 2 * n


def write_answers(path, n=4, **more):
    rows = [{"set": "main"} | row | more for row in pairs(n)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_the_key_is_in_no_file_and_in_no_log(tmp_path):
    """The server gets it, and echoes it in replies, reasons, refusals and errors; the client logs
    all that it can."""
    seen = {}

    def answer(text, n):
        seen[text] = seen.get(text, 0) + 1
        if "question 0" in text:
            return {"content": None, "refusal": f"not with {KEY}"}
        if "question 1" in text:
            return f"your key is {KEY}"
        if "question 2" in text:
            return verdict("A", f"{KEY} \ud800 is your key").replace("real", "r\\u0065al")
        return (
            (500, {"error": {"message": f"{KEY} broke"}}, {})
            if seen[text] == 1
            else (401, {"error": {"message": KEY}}, {})
        )

    logs = ""
    with JudgeServer(answer) as server:
        for n, code in ((3, 0), (4, 2)):
            stored = write_answers(tmp_path / "answers.jsonl", n)
            command = [
                sys.executable,
                "evaluate.py",
                "winrate",
                "--responses",
                stored,
                "--judge",
                "openai:small",
            ]
            command += ["--output_dir", str(tmp_path / "out"), "--num_bootstrap", "10"]
            environment = os.environ | {"OPENAI_LOG": "debug", "OPENAI_BASE_URL": server.url}
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
            assert done.returncode == code, done.stderr
            logs += done.stdout + done.stderr
        assert set(server.keys) == {f"Bearer {KEY}"}
    assert "[key]" in logs and "Sending HTTP Request" in logs  # the error, and the client's own log
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"winrate.json", "responses.jsonl", "judgements.jsonl"}
    for text in [logs, *(path.read_text() for path in files)]:
        assert KEY not in text and KEY[3:] not in text


# --- local models ---------------------------------------------------------------------------------


def test_a_local_model_that_babbles_gives_ties(policy_folder, tmp_path):
    short = tmp_path / "t.txt"  # the model has 128 positions
    short.write_text("{prompt} {a} {b}")
    local = dict(spec=f"hf:{policy_folder}", template=str(short), max_tokens=4, concurrency=3)
    asked = pairs(4)
    asked[3]["reference"] = "word " * 200
    judge = load_judge(tmp_path, **local)
    rows = judge.compare(asked)
    assert verdicts(rows) == ["tie"] * 4 and judge.usage["requests"] == 6
    assert [judge.summary(rows)[k] for k in ("malformed", "refused", "too_long")] == [6, 0, 2]
    again = load_judge(tmp_path, **local)
    assert again.compare(asked) == rows and again.usage["requests"] == 0
    assert again.model.model is None  # nothing to ask: it is not even loaded


def test_a_local_model_takes_what_fits_its_positions_and_no_more(policy_folder, tokenizer, tmp_path):
    (tmp_path / "t.txt").write_text("{prompt} {a} {b}")
    length = len(tokenizer("question answer one other").input_ids)
    for room, counts in ((128 - length, [2, 0]), (128 - length + 1, [0, 2])):  # of 128 positions
        changes = dict(template=str(tmp_path / "t.txt"), max_tokens=room)
        judge = load_judge(tmp_path, spec=f"hf:{policy_folder}", **changes)
        row = {"prompt": "question", "response": "answer one", "reference": "other"}
        summary = judge.summary(judge.compare([row]))
        assert [summary[k] for k in ("malformed", "too_long")] == counts


def test_a_local_model_reads_its_chat_template_and_is_greedy(policy_folder, tmp_path, monkeypatch):
    seen = []

    def answer(model, tokenizer, prompts, max_new_tokens, temperature, batch_size, bf16):
        texts = tokenizer.batch_decode(prompts)
        assert (max_new_tokens, temperature) == (9, 0.0) and len(prompts) <= batch_size == 3
        seen.extend(texts)
        return tokenizer([longer(text) for text in texts]).input_ids

    monkeypatch.setattr(judges, "generate", answer)
    monkeypatch.setattr(judges, "TEMPLATE", "[Answer A]\n{a}\n[End\n[Answer B]\n{b}\n[End {prompt}")
    judge = load_judge(tmp_path, spec=f"hf:{policy_folder}", max_tokens=9, concurrency=3)
    judge.model.tokenizer.chat_template = "<{{ messages[0].role }}>{{ messages[0].content }}</>"
    judge.model.model = torch.nn.Module()
    judge.model.model.config = None
    assert verdicts(judge.compare(pairs(4))) == ["win", "lose"] * 2
    assert len(seen) == 8 and all(text.startswith("<user>[Answer A]") and text.endswith("</>") for text in seen)


def test_a_thought_that_the_template_opens_is_no_verdict(policy_folder, tmp_path, monkeypatch):
    """The reply then starts within it: here it is cut off in one order and ends in the other."""

    def answer(model, tokenizer, prompts, *_):
        texts = tokenizer.batch_decode(prompts)
        ends = ("[Answer A]\nanswer" in text for text in texts)
        said = '{"verdict": "A"}', '{"verdict": "B"} no</think>{"verdict": "A"}'
        return tokenizer([said[end] for end in ends]).input_ids

    monkeypatch.setattr(judges, "generate", answer)
    monkeypatch.setattr(judges, "TEMPLATE", "[Answer A]\n{a}\n[End\n[Answer B]\n{b}\n[End {prompt}")
    judge = load_judge(tmp_path, spec=f"hf:{policy_folder}")
    judge.model.tokenizer.chat_template = "{{ messages[0].content }}<think>\n"
    judge.model.model = torch.nn.Module()
    judge.model.model.config = None
    (row,) = judge.compare(pairs(1))
    assert [said["verdict"] for said in row["judgements"]] == ["A", "malformed"]


def test_another_training_of_a_local_model_is_another_judge(policy_folder, tmp_path):
    local = f"hf:{policy_folder}"
    key = load_judge(tmp_path, spec=local).key("text")
    weights = next(Path(policy_folder).glob("*.safetensors"))
    assert load_judge(tmp_path, spec=local).key("text") == key
    os.utime(weights, (1, 1))
    assert load_judge(tmp_path, spec=local).key("text") != key


def scoring_judge(judge, **changes):
    args = evaluate.Winrate(judge=judge, output_dir="", **changes)
    return judges.judge_of(args, "question")


def test_a_scorer_judges_by_its_advantage_within_the_tie_band(scorer_folder, tmp_path):
    rows, args = pairs(6), evaluate.Calibration(scorers=(), dataset_name="", output_dir="")
    score = judges.Advantages(scorer_folder, args, "")
    chosen, rejected = (score(rows, [k])[0] for k in ("response", "reference"))
    band = float(np.sort(np.abs(chosen - rejected))[2])
    judge = scoring_judge(scorer_folder, tie_band=band - 1e-6)
    said = judge.compare(rows)
    assert [row["score"] for row in said] == pytest.approx(chosen.tolist(), abs=1e-5)
    by_hand = ["tie" if abs(d) <= band - 1e-6 else "win" if d > 0 else "lose" for d in chosen - rejected]
    assert verdicts(said) == by_hand and by_hand.count("tie") == 2
    means = {"score": chosen.mean(), "reference_score": rejected.mean()}
    assert judge.summary(said) == pytest.approx(means, abs=1e-5)
    expected = "expected module:function, openai:MODEL, hf:MODEL, length or a scorer"
    with pytest.raises(InputError, match=f"--judge nothing: {expected}; fails on one prompt"):
        scoring_judge("nothing")


def test_answers_that_a_cut_makes_equal_are_named(scorer_folder, capsys):
    rows = pairs(3)
    rows[1] |= {"response": "dog " * 99 + "fox", "reference": "dog " * 99 + "vow"}
    judge = scoring_judge(scorer_folder, max_length=40, truncate_prompts=True)
    assert judge.compare(rows)[1]["verdict"] == "tie"
    assert "1 of 3 rows have equal sides" in capsys.readouterr().out


def nan(prompts, responses):
    return [float("nan")] * len(prompts)


def length(prompts, responses):
    return [len(y) / 10 for y in responses]


def test_a_score_that_is_no_number_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"--judge tests.test_judges:nan: must return one finite"):
        scoring_judge("tests.test_judges:nan").compare(pairs(2))


# --- evaluate.py winrate --------------------------------------------------------------------------


def settings(folder, server):
    (folder / "judge.json").write_text(json.dumps({"base_url": server.url, "concurrency": 2}))
    return str(folder / "judge.json")


def winrate(out, **changes):
    evaluate.winrate(evaluate.Winrate(**{"output_dir": str(out), "judge": "tests.test_judges:length"} | changes))
    rows = [json.loads(line) for line in (out / "responses.jsonl").read_text().splitlines()]
    return json.loads((out / "winrate.json").read_text()), rows


@pytest.fixture
def prompts(tmp_path):
    names = []
    for name in ("main", "forget"):
        rows = [{"prompt": f"the {name} fox {i}", "task": "t"} for i in range(6)]
        rows[0]["prompt"] = [{"role": "system", "content": "be"}, {"role": "user", "content": name}]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        names.append(str(tmp_path / f"{name}.jsonl"))
    return tuple(names)


def test_answers_are_stored_and_judged_again_without_generating(policy_folder, prompts, tmp_path, monkeypatch):
    two = dict(policy=policy_folder, reference=policy_folder, dataset_names=prompts, response_length=8)
    report, rows = winrate(tmp_path / "a", **two)
    assert [row["set"] for row in rows] == ["main"] * 6 + ["forget"] * 6
    for label in ("main", "forget"):
        part = [row for row in rows if row["set"] == label]
        scores, reference = ([len(row[k]) / 10 for row in part] for k in ("response", "reference"))
        assert [row["score"] for row in part] == scores
        for k, v in win_lose_tie(scores, reference, 0.1).items():
            assert report[label][k] == v == pytest.approx(100 * sum(row["verdict"] == k for row in part) / 6)
        assert report[label].keys() >= {
            "win",
            "lose",
            "tie",
            "intervals",
            "score",
            "reference_score",
            "prompts",
        }
    own = report["evaluate.py"]
    assert own["judge"] == {"name": "tests.test_judges:length"} and {"args", "versions", "commit"} <= own.keys()
    monkeypatch.setattr(evaluate, "generate", None)
    stored = str(tmp_path / "a" / "responses.jsonl")
    same, again = winrate(tmp_path / "b", responses=stored)
    assert again == rows and same.pop("evaluate.py")["args"]["responses"] == stored
    del report["evaluate.py"]
    assert same == report
    with JudgeServer(longer) as server:
        api = {"judge": "openai:small", "judge_config": settings(tmp_path, server)}
        report, said = winrate(tmp_path / "c", responses=stored, **api)
    assert all("score" not in row and row["prompt"] == old["prompt"] for row, old in zip(said, rows, strict=True))
    assert report["main"]["pairs_asked"] + report["main"]["identical"] == report["main"]["prompts"] == 6
    assert report["evaluate.py"]["judge"]["requests"] == len(server.texts) and "score" not in report["main"]
    for row, old in zip(said, rows, strict=True):
        gap = len(old["response"]) - len(old["reference"])
        assert row["verdict"] == ("win" if gap > 0 else "lose" if gap < 0 else "tie")


def test_policies_draw_by_themselves_unless_they_share_random_numbers(policy_folder, prompts, tmp_path):
    two = dict(policy=policy_folder, reference=policy_folder, dataset_names=prompts, response_length=8)
    report, rows = winrate(tmp_path / "a", common_random_numbers=True, **two)
    assert all(row["response"] == row["reference"] for row in rows) and report["main"]["tie"] == 100
    _, independent = winrate(tmp_path / "b", **two)
    assert [row["response"] for row in independent] == [row["response"] for row in rows]
    assert sum(row["response"] == row["reference"] for row in independent) <= 1
    _, greedy = winrate(tmp_path / "c", temperature=0.0, **two)
    assert all(row["response"] == row["reference"] for row in greedy)


def test_a_judge_that_fails_loses_no_answers(policy_folder, prompts, tmp_path, capsys):
    two = dict(policy=policy_folder, reference=policy_folder, dataset_names=prompts, response_length=4)
    with JudgeServer(lambda text, n: (400, {"error": {"message": "no such model"}}, {})) as server:
        api = dict(judge="openai:small", judge_config=settings(tmp_path, server))
        with pytest.raises(InputError, match="no such model"):
            winrate(tmp_path / "a", **api, **two)
        server.answer, stored = longer, str(tmp_path / "a" / "responses.jsonl")
        assert f"--responses {stored} judges these answers again" in capsys.readouterr().out
        report, rows = winrate(tmp_path / "a", **api, responses=stored)
    assert len(rows) == 12 and report["forget"]["prompts"] == 6


def test_flags_of_winrate_that_contradict_each_other(tmp_path):
    stored = write_answers(tmp_path / "stored.jsonl")
    for wrong in ({"responses": stored, "policy": "p"}, {"policy": "p", "reference": "q"}, {}):
        with pytest.raises(InputError, match="--dataset_names: give these three or --responses"):
            winrate(tmp_path / "a", **wrong)
    with pytest.raises(InputError, match="--judge_config: is for openai: and hf:"):
        winrate(tmp_path / "a", responses=stored, judge_config="settings.json")
    unlabelled = write_answers(tmp_path / "mine.jsonl", set=None, response="\n\nHuman: I go on")
    report, rows = winrate(tmp_path / "b", responses=unlabelled)
    assert report["mine"]["prompts"] == 4 and rows[0]["response"] == "\n\nHuman: I go on"
