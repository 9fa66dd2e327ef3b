"""The report page of a small made-up folder: what must stand on it, what must not, what a missing picture does."""

import json
import math
import re
from html.parser import HTMLParser

import pytest
from matplotlib.figure import Figure

from miniature.report import ARMS, Args, main, write_report
from utils import InputError

PICTURES = [f"figures/{name}.png" for name in ("task_scores", "reliability", "histograms", "task_balance")]
PICTURES.append("clusters/clusters.png")
ATTACK = "<script>alert(1)</script>"
TASKS = ["capital", "sort", "apologize"]


def made_up_results():
    rates = {"win": 20.04, "lose": 31.26, "tie": 48.7}
    rates |= {"intervals": {k: [v - 3, v + 3] for k, v in rates.items()}}
    curves = {
        arm: [
            {"step": s, "gold": 0.5 - 0.001 * i * s, "proxy": s / 9, "kl": s / 20, "length": 7 + s / 50,
             "forget_gold": 0.9 - s / 300}
            for s in range(0, 101, 20)
        ]
        for i, arm in enumerate(ARMS)
    }  # fmt: skip
    sweep = [{"step": s, "proxy": math.sqrt(s), "gold": 0.5} for s in range(0, 101, 20)]
    table1 = {"accuracy": 71.234, "ece": 5.678, "ece_vs_truth": 4.321, "brier": 0.1987, "nll": 0.5876}
    verdicts = ["reproduced", "contradicted", "undecided"]
    return {
        "table1": {"rm": table1, "am": table1 | {"ece": 2.345}},
        "score_balance": {
            k: {"spread_of_means": 0.8, "spread_of_stds": 0.2, "mean_within_std": 1.6} for k in ("rm", "am")
        },
        "table2": {arm: {"main": rates, "forget": rates} for arm in ARMS},
        "curves": curves,
        "fig6": {"curves": {"12": sweep, "6": sweep}, "spread": 0.0421},
        "seeds": [3],
        "config": {"settings": {"ppo": {"kl_coef": 0.05, "max_eval_prompts": 200}}, "tasks": TASKS},
        "seconds": {"sft": 40.2, "ppo": 1234.0},
        "claims": {
            f"K{i}": {
                "verdict": verdicts[i % 3],
                "statistic": None if i == 14 else i / 7,
                "interval": None if i == 14 else [-0.5, i / 3],
                "rule": f"rule {i}: lower end > 0",
                "unit": "points",
            }
            for i in range(1, 15)
        },
        "in_words": ["the <first> sentence", "the second"],
    }


def made_up_details():
    group = {"share_of_tasks": {"capital": 0.5, "apologize": 0.5}, "mean_score": 1.2, "mean_gold": 0.7}
    cluster = {"size": 30, "score_min": -1.0, "score_max": 2.0, "kept_score_min": None, "dominant_task": "sort"}
    rate = {"win": 20.0, "lose": 30.0, "tie": 50.0}
    return {
        "scale": "smoke",
        "environment": {"versions": {"python": "3.11"}, "commit": None, "machine": {"threads": 2}},
        "claim_texts": {f"K{i}": f"claim text {i}" for i in range(1, 15)},
        "win_curves": {arm: [{"step": s, "main": rate, "forget": rate} for s in (0, 50, 100)] for arm in ARMS},
        "samples": [
            {
                "set": "forget" if task == "apologize" else "main",
                "task": task,
                "prompt": f"prompt {i} & more",
                "sft": {"response": ATTACK, "gold": 0.8},
                "arms": {arm: {"response": f"answer {i} of {arm}", "gold": 0.5 - 0.4 * i} for arm in ARMS},
            }
            for i, task in enumerate(TASKS)
        ],
        "clusters": {
            "pairs": 60,
            "kept": 4,
            "selected": group,
            "random_control": {"share_of_tasks": {"sort": 1.0}, "mean_score": 0.3},
            "clusters": [
                cluster | {"cluster": c, "dominant_share": 0.6, "typical_prompts": ["a", "b", "c"]} for c in range(2)
            ],
        },
        "task_gold": {
            task: {"SFT": 0.9, "AM-PPO": 0.8} | {arm: 0.7 - 0.5 * i for arm in ARMS if arm != "AM-PPO"}
            for i, task in enumerate(TASKS)
        },
        "paired": {
            m: {"difference": -0.5, "low": -1.0, "high": 0.1} for m in ("accuracy", "ece", "brier", "separation")
        },
    }


def make_folder(folder):
    for name in PICTURES:
        path = folder / "seed_3" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        figure = Figure(figsize=(1, 1))
        figure.subplots().plot([0, 1])
        figure.savefig(path)
    (folder / "results.json").write_text(json.dumps(made_up_results()))
    (folder / "details.json").write_text(json.dumps(made_up_details()))
    return folder


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = write_report(make_folder(tmp_path_factory.mktemp("report")))
    assert path.name == "report.html" and path.stat().st_size < 3e6
    return path.read_text()


class Reader(HTMLParser):
    """Text, attributes and the balance of tags."""

    def __init__(self, page):
        super().__init__()
        self.words, self.attributes, self.open = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.attributes += [(tag, key, value or "") for key, value in attributes]
        if tag not in ("meta", "img", "br", "path", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_page_holds_the_claims_the_arms_and_both_tables_of_the_paper(page):
    reader = Reader(page)
    assert not reader.open
    text = "\n".join(reader.words)
    for i in range(1, 15):
        assert f"\nK{i}\n" in text and f"claim text {i}\n" in text and f"rule {i}: lower end > 0" in text
    assert all(arm in text for arm in ARMS)
    for paper in ("69.24", "69.25", "4.70", "75.28", "3.83", "3.48", "12.72", "29.28", "81.75"):
        assert paper in reader.words
    # ours: Table 1, Table 2 with an interval, a paired difference, spread / within = 0.2 / 1.6, K14 without statistic
    for ours in ("71.23", "5.68", "2.35", "0.1987", "20.0", "31.3", "[28.3, 34.3]", "[−1.00, +0.10]", "0.125", "–"):
        assert ours in reader.words, ours
    assert "spreads by 0.042" in text and "1,234" in reader.words and "settings.ppo.kl_coef" in reader.words


def study():
    """Two seeds of the committed study: AM-PPO's curves of the made-up run, a tenth higher and lower."""
    curves = made_up_results()["curves"]
    shifted = [
        {arm: [row | {"gold": row["gold"] + by} for row in rows] for arm, rows in curves.items()} for by in (0.1, -0.1)
    ]
    return {"curves": shifted}


def of_study(i):
    verdict = ["reproduced", "contradicted", "undecided"][i % 3]
    agrees = {5: False, 14: None}.get(i, True)
    return {"verdict": verdict, "statistic": i / 8, "interval": [0.0, 1.5], "expected": [-1.0, 2.0], "agrees": agrees}


def test_a_full_run_stands_beside_the_study(page, tmp_path, monkeypatch):
    """Verdicts are the study's; the run's own stand beside it from three seeds on. A smoke run has none."""
    monkeypatch.setattr("miniature.report.read_study", study)
    assert (
        "numbers mean nothing" in page and "✓ reproduced" not in page and "of the eight seeds of the study" not in page
    )
    folder, results = make_folder(tmp_path), made_up_results()
    for i, claim in enumerate(results["claims"].values(), start=1):
        claim["study"] = of_study(i)
    (folder / "details.json").write_text(json.dumps(made_up_details() | {"scale": "full"}))
    (folder / "results.json").write_text(json.dumps(results))
    one = write_report(folder).read_text()
    assert 'class="warning"' not in one and "of the eight seeds of the study" in one
    assert [one.count(f">{v}<") for v in ("✓ reproduced", "✗ contradicted", "? undecided")] == [4, 5, 5]
    assert one.count(">agrees<") == 12 and one.count(">does not agree<") == 1
    (folder / "results.json").write_text(json.dumps(results | {"seeds": [3, 4, 5]}))
    three = write_report(folder).read_text()
    assert three.count(">✓ reproduced<") == 8  # both


def test_the_page_opens_with_what_was_seen_and_an_answer_for_each_lost_task(page):
    first, answers, curves, claims = (
        page.index(k) for k in ("the &lt;first&gt;", "prompt 2", "Mean gold", "claim text 1")
    )
    assert first < answers < curves < claims
    # the made-up RM-PPO lost .2, .7, 1.2 on the three tasks: the worst comes first
    assert page.index("prompt 2 &amp; more") < page.index("prompt 1 &amp; more") < curves


def test_gold_by_task_is_a_heat_map(page):
    assert '<i style="background:rgba(215,60,45,0.14)">−0.30</i>' in page  # .45 x .30: RM-PPO on the third task
    assert page.index(">capital<") < page.index(">apologize<")  # forget tasks come last


def test_both_gold_charts_have_one_scale(monkeypatch):
    from miniature import report

    seen = []
    monkeypatch.setattr(report, "chart", lambda *args: seen.append(args) or (b"", ""))
    report.gold_charts(made_up_results()["curves"], study=study()["curves"])
    (*_, main_bands, main_limits), (*_, forget_limits) = seen
    assert main_limits == forget_limits == pytest.approx((min(0, 0.5 - 0.4 - 0.1) - 0.05, 1.05))
    steps, low, high, colour = main_bands[0]  # RM-PPO's gold is .5 throughout
    assert colour == ARMS["RM-PPO"]["color"] and steps[-1] == 100
    assert low == pytest.approx([0.4] * 6) and high == pytest.approx([0.6] * 6)


def test_worst_regression_of_rm_ppo_comes_first_and_gold_colours_its_cell(page):
    page = page[page.index('id="samples"') :]
    assert page.index("prompt 2 &amp; more") < page.index("prompt 1 &amp; more") < page.index("prompt 0 &amp; more")
    red = 'style="background:rgba(215,60,45,0.14)"><span class="gold">−0.30</span>'  # 0.45 x 0.30
    assert f"{red}answer 2 of RM-PPO" in page


def test_model_output_is_escaped(page):
    assert ATTACK not in page and page.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 2 * len(TASKS)


def test_page_needs_no_network_and_every_image_has_alt_text(page):
    reader = Reader(page)
    assert not re.search(r"https?://|url\(|@import", page)
    for tag, key, value in reader.attributes:
        if key in ("src", "href"):
            assert value.startswith("#" if tag == "a" else "data:image/png;base64,")
    alts = [value for tag, key, value in reader.attributes if (tag, key) == ("img", "alt")]
    assert len(alts) == len(PICTURES) + 15 and all(alts) and page.count("<img") == len(alts)


@pytest.mark.parametrize("name", PICTURES)
def test_missing_picture_is_named(tmp_path, name):
    folder = make_folder(tmp_path)
    (folder / "seed_3" / name).unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(name)):
        write_report(folder)
    with pytest.raises(InputError, match=re.escape(name)):
        main(Args(folder))
    assert not (folder / "report.html").exists()
