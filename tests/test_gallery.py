"""The page of answers: what stands in it, what it refuses, and how it behaves in a headless
Chromium, opened from disk."""

import json
import re
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest

from tools.gallery import Args, main
from utils import InputError

ATTACK = (
    "</script><script>document.title='run'</script><img src=x onerror=\"document.title='run'\"> <b>'bold'</b> \u2028"
)
CHROME, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
browser_needed = pytest.mark.skipif(not (CHROME and DRIVER), reason="needs the packages chromium and chromium-driver")


def rows_of(verdicts, scores):
    """Prompts 1, 2, ...: the odd ones of set main and task capital, the even ones of set forget and
    a hostile task."""
    return [
        {
            "set": "main" if i % 2 else "forget",
            "task": "capital" if i % 2 else ATTACK[:40],
            "prompt": [{"role": "user", "content": f"question {i}"}] if i == 1 else f"question {i}",
            "response": f"answer {i} {ATTACK}" if i == 2 else f"answer {i}",
            "reference": f"old {i}",
            "score": score,
            "reference_score": 0.5,
            "verdict": verdict,
        }
        for i, (verdict, score) in enumerate(zip(verdicts, scores, strict=True), 1)
    ]


def write_arm(folder, rows, judge="miniature.world:gold_reward"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "responses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "winrate.json").write_text(json.dumps({"judge": {"name": judge}}))
    return folder


@pytest.fixture
def arms(tmp_path):
    """Two arms of five prompts. Both lose on 4, one each on 2 (by .9) and on 5 (by .2)."""
    return [
        write_arm(
            tmp_path / "winrate RM",
            rows_of(["win", "lose", "tie", "lose", "tie"], [1, -0.4, 0.5, 0.3, 0.5]),
        ),
        write_arm(
            tmp_path / "winrate AM",
            rows_of(["tie", "tie", "win", "lose", "lose"], [0.5, 0.5, 0.9, 0.2, 0.3]),
        ),
    ]


def built(folders, path, **flags):
    main(Args(tuple(folders), path, **flags))
    return path.read_text(encoding="utf-8")


def change(folder, number, **fields):
    lines = (folder / "responses.jsonl").read_text().splitlines()
    row = json.loads(lines[number - 1]) | fields
    lines[number - 1] = json.dumps({k: v for k, v in row.items() if v != "gone"})
    (folder / "responses.jsonl").write_text("\n".join(lines))


def test_the_data_in_the_page_equals_the_files(arms, tmp_path):
    change(arms[0], 3, response="half a character: \ufffd")
    text = built(arms, tmp_path / "new" / "page.html")
    found = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    data = json.loads(found[0])
    assert len(found) == 1 and "<" not in found[0] and len(re.findall("<script", text)) == 2
    assert data["arms"] == ["RM", "AM"] and data["judge"] == "miniature.world:gold_reward"
    for i, folder in enumerate(arms):
        rows = [json.loads(line) for line in (folder / "responses.jsonl").read_text().splitlines()]
        for row, shown in zip(rows, data["rows"], strict=True):
            prompt = "user: question 1" if row["response"] == "answer 1" else row["prompt"]
            assert (shown["prompt"], shown["set"], shown["task"]) == (
                prompt,
                row["set"],
                row["task"],
            )
            assert shown["reference"] == row["reference"]
            assert shown["arms"][i] == {k: row[k] for k in ("response", "verdict", "score", "reference_score")}
    assert not re.search(r"(src|href)=\"?(https?:)?//|@import|url\(", text.replace(found[0], ""))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"prompt": "another"},
            r"winrate AM/responses.jsonl, line 2: another prompt than .*winrate RM",
        ),
        ({"reference": "another"}, r"winrate AM/responses.jsonl, line 2: another reference than"),
        ({"verdict": "gone"}, r"line 2: field 'verdict' is missing; the run is not finished"),
        ({"verdict": "won"}, r"line 2: field 'verdict' must be win, lose or tie, found 'won'"),
        ({"score": "1.0"}, r"line 2: field 'score' must be a number"),
        ({"score": float("nan")}, r"line 2: field 'score' cannot be written as JSON"),
    ],
)
def test_rows_that_do_not_belong_side_by_side_are_refused(arms, tmp_path, fields, said):
    change(arms[1], 2, **fields)
    with pytest.raises(InputError, match=said):
        built(arms, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_a_page_of_other_arms_and_any_other_file_stays(arms, tmp_path):
    page, ways = tmp_path / "page.html", "give another name, or remove it"
    first = built(arms, page)
    change(arms[0], 1, response="changed")
    assert built(arms, page) != first  # the same arms, judged again
    kept = page.read_text()
    for flags in ({"names": ("a", "b")}, {}):
        folders = arms if flags else arms[:1]
        with pytest.raises(InputError, match=f"--output_file .*page.html: is no page of these arms.*{ways}"):
            built(folders, page, **flags)
    assert page.read_text() == kept
    page.write_text("my own notes")
    with pytest.raises(InputError, match=ways):
        built(arms, page)


def test_a_folder_of_earlier_versions_is_read(arms, tmp_path):
    """They had the judge beside the sets; now it stands under evaluate.py."""
    before = built(arms, tmp_path / "before.html")
    for folder in arms:
        report = json.loads((folder / "winrate.json").read_text())
        (folder / "winrate.json").write_text(json.dumps({"evaluate.py": report, "judge": {"win": 1}}))
    assert built(arms, tmp_path / "after.html") == before


def test_folders_that_do_not_belong_side_by_side_are_refused(arms, tmp_path):
    def refused(match, folders, **flags):
        with pytest.raises(InputError, match=match):
            built(folders, tmp_path / "page.html", **flags)

    refused("nowhere/responses.jsonl: .*No such file", [tmp_path / "nowhere"])
    refused("give every one of the 2 folders a name of its own", [arms[0], arms[0]])
    refused("give every one of the 2 folders a name of its own", arms, names=("one",))
    short = write_arm(tmp_path / "short", rows_of(["win"], [1]))
    refused(r"short: another number of prompts \(1, not 5\)", [arms[0], short])
    write_arm(short, rows_of(["win"] * 5, [1] * 5), "openai:other")
    refused("short: another judge .openai:other, not miniature.world:gold_reward.", [arms[0], short])
    (short / "winrate.json").unlink()
    refused("short/winrate.json: no such file; the run is not finished", [short])


# --- in a browser ---------------------------------------------------------------------------------


class Browser:
    """WebDriver's protocol is JSON over HTTP: https://www.w3.org/TR/webdriver2; real keys, no
    further package."""

    def __init__(self, port, profile):
        self.root = f"http://127.0.0.1:{port}"
        flags = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
        flags += "disable-component-update disable-sync disable-dev-shm-usage"
        options = {
            "binary": CHROME,
            "args": [f"--{flag}" for flag in flags.split()] + [f"--user-data-dir={profile}"],
        }
        always = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        session = self.post("/session", {"capabilities": {"alwaysMatch": always}})
        self.root += f"/session/{session['sessionId']}"

    def post(self, path, body, method="POST"):
        request = urllib.request.Request(self.root + path, json.dumps(body).encode(), method=method)
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # localhost is no matter for a proxy
        with direct.open(request, timeout=60) as reply:
            return json.load(reply)["value"]

    def open(self, page, state="", width=1200):
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
        self.post("/goog/cdp/execute", {"cmd": "Emulation.setDeviceMetricsOverride", "params": size})
        self.post("/url", {"url": "about:blank"})  # or a change of the hash alone would load nothing
        self.post("/url", {"url": f"{Path(page).as_uri()}#{state}"})

    def js(self, expression):
        return self.post("/execute/sync", {"script": f"return {expression}", "args": []})

    def press(self, keys):
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self.post("/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]})

    def prompts(self):
        return self.js("[...document.querySelectorAll('article h2')].map(e => e.textContent)")

    def counts(self):
        rows = self.js("[...document.querySelectorAll('tbody tr')].map(r => [...r.cells].map(c => c.textContent))")
        return {name: [int(x) for x in numbers] for name, *numbers in rows}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    log = tmp_path_factory.mktemp("chromium")
    driver = subprocess.Popen([DRIVER, "--port=0"], stdout=(log / "out").open("w"), stderr=subprocess.STDOUT)
    try:
        for _ in range(200):
            if port := re.search(r"started successfully on port (\d+)", (log / "out").read_text()):
                break
            time.sleep(0.1)
        browser = Browser(port[1], log / "profile")
        yield browser
        browser.post("", {}, "DELETE")
    finally:
        driver.terminate()
        driver.wait()


@browser_needed
def test_worst_regressions_first_and_filters_move_the_counts(browser, arms, tmp_path):
    built(arms, page := tmp_path / "page.html")
    browser.open(page)
    assert browser.prompts() == [
        "question 4",
        "question 2",
        "question 5",
        "user: question 1",
        "question 3",
    ]
    assert browser.counts() == {
        "RM": [1, 0, 2, 0, 2, 0],
        "AM": [1, 1, 1, 0, 1, 1],
    }  # win lose tie of main, then forget
    browser.open(page, "arm=AM")
    assert browser.prompts()[:2] == ["question 4", "question 5"] and browser.counts() == {"AM": [1, 1, 1, 0, 1, 1]}
    browser.open(page, "set=main&verdict=win")
    assert browser.prompts() == ["user: question 1", "question 3"]
    assert browser.counts() == {"RM": [1, 0, 1, 0, 0, 0], "AM": [1, 0, 1, 0, 0, 0]}
    browser.open(page, "task=capital&q=ANSWER+5")
    assert browser.prompts() == ["question 5"] and browser.js("at('shown').textContent") == "1 of 5 prompts"
    assert browser.js("document.querySelector('.lose header').textContent") == "AM✗ lose 0.30 (−0.20)"


@browser_needed
def test_the_keys_move_search_and_help(browser, arms, tmp_path):
    built(arms, page := tmp_path / "page.html")
    browser.open(page)
    focused = "document.activeElement.querySelector('h2')?.textContent"
    browser.press("jj")
    assert browser.js(focused) == "question 2" and "item=2" in browser.js("location.hash")
    browser.press("k")
    assert browser.js(focused) == "question 4"
    browser.press("\ue015")  # arrow down
    assert browser.js(focused) == "question 2"
    browser.press("/old 3")
    assert browser.js("document.activeElement.id") == "q" and browser.prompts() == ["question 3"]
    assert browser.js("location.hash") == "#q=old+3"
    browser.press("\ue00c?")  # escape leaves the field, so that the question mark is a key again
    assert browser.js("at('keys').open") is True
    browser.press("\ue00c")
    assert browser.js("at('keys').open") is False
    browser.open(page, "verdict=lose&item=5")
    assert browser.js(focused) == "question 5"


@browser_needed
def test_text_of_models_stays_text(browser, arms, tmp_path):
    for folder in arms:
        change(folder, 2, prompt=ATTACK, reference=ATTACK)
        (folder / "winrate.json").write_text(json.dumps({"judge": {"name": ATTACK}}))
    built(arms, page := tmp_path / "page.html", names=(ATTACK, "AM"))
    browser.open(page, "q=answer+2")
    assert browser.js("document.title") == "Answers, side by side"
    assert browser.js("document.querySelectorAll('script, img, main b:not(header b)').length") == 2  # ours
    shown = browser.js("[...document.querySelectorAll('.answer p')].map(e => e.textContent)")
    assert shown == [ATTACK, "answer 2 " + ATTACK, "answer 2 " + ATTACK]
    assert browser.prompts() == [ATTACK] and browser.js("at('judge').textContent") == ATTACK
    assert browser.js("[...at('arm').options].map(o => o.textContent)") == ["all", ATTACK, "AM"]
    assert browser.js("[...at('task').options].map(o => o.textContent)") == [
        "all",
        "capital",
        ATTACK[:40],
    ]
    assert browser.post("/se/log", {"type": "browser"}) == []  # no error, and nothing that the policy had to block


@browser_needed
def test_reasons_of_a_comparing_judge_name_who_won(browser, tmp_path):
    (row,) = rows_of(["win"], [1])
    del row["score"], row["reference_score"]
    said = [("response", "A", "<i>clear</i>"), ("reference", "B", "right")]
    row["judgements"] = [dict(zip(("first", "verdict", "reason"), x, strict=True)) for x in said]
    built([write_arm(tmp_path / "AM", [row], "openai:judge")], page := tmp_path / "page.html")
    browser.open(page)
    reasons = browser.js("[...document.querySelectorAll('.win p.soft')].map(e => e.textContent)")
    assert reasons == ["AM shown first: AM. <i>clear</i>", "SFT shown first: AM. right"]


@browser_needed
def test_a_phone_scrolls_down_only_and_thousands_come_bit_by_bit(browser, tmp_path):
    rows = rows_of(["lose"] * 3000, [0] * 3000)
    rows[0]["response"] = "long" * 200
    built(
        [write_arm(tmp_path / name, rows) for name in ("RM-PPO", "AM-PPO", "w" * 60)],
        page := tmp_path / "page.html",
    )
    browser.open(page, width=390)
    assert browser.js("[innerWidth, document.documentElement.scrollWidth]") == [390, 390]
    assert 40 <= len(browser.prompts()) <= 120
    browser.press("j" * 45)
    assert browser.js("document.activeElement.id") == "place-44"
    browser.open(page, "item=2000", width=390)
    assert browser.js("document.activeElement.querySelector('h2').textContent") == "question 2000"
