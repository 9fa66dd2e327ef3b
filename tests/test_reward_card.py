"""The reward card: numbers by hand, inert text, code that runs, and no file of somebody else's
destroyed."""

import html
import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
import yaml
from tokenizers import processors
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    RobertaConfig,
)

import evaluate
from tests.conftest import byte_level_tokenizer, gpt2_config
from tools import figures, judges, reward_card
from tools.statistics import load_calibration
from utils import E_HEAD, InputError, Scorer

NASTY = {  # what a model or a data set may hold
    "html": "<script>alert(1)</script><img src=x onerror=y> </pre> <!-- -->",
    "markdown": "![x](http://evil/x.png) [a](b) **bold** `code` ```\n```\n# head | a | b |\n---\n* _x_ ~~y~~ <b>",
    "links": "https://evil.example www.evil.example me@evil.example @someone #1 $x$ {{ site }} :smile:",
    "control": "a\x00b\x1b[31m\u202eright\u2066\u200bto left\u2028line\r\nend\x85 \ud800",
    "entities": "&lt;script&gt; &#60;b&#62; &amp;",
}


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    """Figures take a test's time; they are drawn where a test asks for them with `drawn`."""
    monkeypatch.setattr(reward_card, "draw", lambda *args: None)


@pytest.fixture
def drawn(monkeypatch, no_figures):
    monkeypatch.setattr(reward_card, "draw", figures.draw)


def run(tmp_path, scorer, rows, **flags):
    """Calibration on `rows`, and the cards; -> its report and the output folder."""
    data, out = tmp_path / "pairs.jsonl", tmp_path / "out"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    scorers = scorer if isinstance(scorer, tuple) else (str(scorer),)
    fixed = {
        "scorers": scorers,
        "dataset_name": str(data),
        "output_dir": str(out),
        "num_bootstrap": 10,
    }
    report = evaluate.calibration(evaluate.Calibration(**fixed | {"truncate_prompts": True} | flags))
    reward_card.main(reward_card.Args(str(out)))
    return report, out


def scores_of(folder, rows, max_length=512):
    args = evaluate.Calibration(scorers=(), dataset_name="", output_dir="", max_length=max_length)
    return judges.Advantages(str(folder), args, "rows")(rows, ("chosen", "rejected"))


def training_run(folder, scorer_folder, **args):
    """A run folder whose weights were trained so, as training.json says -> its model folder. A
    later run has begun in it: config.json is that one's."""
    shutil.copytree(scorer_folder, folder / "model", ignore=shutil.ignore_patterns("*.md", "*.png"))
    told = {"args": args, "data": {}, "commit": "abc", "versions": {"torch": "2.0"}}
    (folder / "model" / "training.json").write_text(json.dumps(told))
    later = {"args": {"loss": "later", "learning_rate": 0.0777, "am_margin": 1.0}, "data": {}, "commit": "later"}
    (folder / "config.json").write_text(json.dumps(later))
    return folder / "model"


ROWS = [
    {"prompt": p, "chosen": c, "rejected": r, "task": t}
    for p, c, r, t in (
        ("the quick", "brown fox", "lazy dog jumps", "one"),
        ("the quick", "brown fox", "lazy dog jumps", "one"),  # the same pair again
        ("over the", "lazy", "dog", "two"),
        ("black quartz", "judges my vow", "Sphinx", "two"),
        ("0123", "456", "789", "two"),
        ("equal", "times", "vow", "two"),
    )
]


# --- numbers --------------------------------------------------------------------------------------


def test_equal_mass_bins_by_hand():
    # two bins of four: the edge is the 2nd smallest, .6, which belongs to the left bin
    confidence, correct = np.array([0.9, 0.5, 0.7, 0.6]), np.array([1, 0.5, 0, 1])
    assert reward_card.equal_mass_index(confidence, 2).tolist() == [1, 0, 1, 0]
    # left: 1.5 right where 1.1 was stated; right: 1 where 1.6 was; (.4 + .6) / 4
    assert reward_card.equal_mass_ece(confidence, correct, 2) == pytest.approx(25)
    # five confidences in three bins: edges are the ceil(5/3) = 2nd and ceil(10/3) = 4th smallest
    assert reward_card.equal_mass_index(np.array([0.5, 0.6, 0.7, 0.8, 0.9]), 3).tolist() == [
        0,
        0,
        1,
        1,
        2,
    ]


def test_equal_confidences_share_a_bin_whatever_the_order_of_the_rows():
    rng = np.random.default_rng(0)
    confidence = np.round(0.5 + 0.5 * rng.random(203), 1)  # six values, many ties
    correct = rng.random(203) < confidence
    index = reward_card.equal_mass_index(confidence)
    assert all(len(set(index[confidence == c])) == 1 for c in set(confidence))
    order = rng.permutation(203)
    assert reward_card.equal_mass_ece(confidence[order], correct[order]) == pytest.approx(
        reward_card.equal_mass_ece(confidence, correct)
    )
    distinct = 0.5 + 0.5 * rng.random(200)
    assert np.bincount(reward_card.equal_mass_index(distinct)).tolist() == [20] * 10


def test_the_noise_floor_is_what_calibrated_scorers_show():
    rng = np.random.default_rng(0)
    confidence = 1 / (1 + np.exp(-np.abs(rng.normal(0, 1.5, 2000))))
    index = np.digitize(confidence, np.linspace(0.5, 1, 11)[1:-1], right=True)
    for ece, bins in (
        (evaluate.expected_calibration_error, index),
        (reward_card.equal_mass_ece, reward_card.equal_mass_index(confidence)),
    ):
        simulated = np.mean([ece(confidence, rng.random(2000) < confidence) for _ in range(300)])
        assert reward_card.noise_floor(confidence, bins) == pytest.approx(simulated, rel=0.05)


def test_length_slopes_by_hand():
    # Within each prompt ten more characters cost 1; the second has long answers and high scores.
    chosen, rejected = np.array([1.0, 11.0]), np.array([0.0, 10.0])
    chosen_length, rejected_length = np.array([10, 110]), np.array([20, 120])
    std = np.sqrt(0.5**2 + 5**2)  # of 1, 11, 0, 10
    over_all, within = reward_card.length_slopes(chosen, rejected, chosen_length, rejected_length)
    assert within == pytest.approx(-0.1 * 100 / std)
    # covariance of (10, 110, 20, 120) and (1, 11, 0, 10): 247.5, the mean of (-55)(-4.5),
    # (45)(5.5), (-45)(-5.5), (55)(4.5);
    # variance of the lengths: (55^2 + 45^2) / 2 = 2525
    assert over_all == pytest.approx(247.5 / 2525 * 100 / std)
    swapped = reward_card.length_slopes(rejected, chosen, rejected_length, chosen_length)
    assert swapped == pytest.approx((over_all, within))
    one_of_two = reward_card.length_slopes(  # and swapping one pair alone changes nothing either
        np.array([0.0, 11.0]), np.array([1.0, 10.0]), np.array([20, 110]), np.array([10, 120])
    )
    assert one_of_two == pytest.approx((over_all, within))
    assert reward_card.length_slopes(chosen, rejected, chosen_length, chosen_length)[1] is None
    assert reward_card.length_slopes(chosen, chosen, np.array([3, 3]), np.array([3, 3])) == (
        None,
        None,
    )


def test_the_most_confident_mistakes_come_first_and_once():
    rows = [{"prompt": "p", "chosen": c, "rejected": "r"} for c in "aabcde"]
    delta = np.array([-2.0, -2.0, 3.0, -5.0, 0.0, -0.1])
    assert reward_card.confident_mistakes(rows, delta) == [
        3,
        0,
        5,
    ]  # the second row is the first again; 0 is a tie
    assert reward_card.confident_mistakes(rows, delta, limit=2) == [3, 0]


def test_tasks_by_hand():
    chosen, rejected = np.array([1.0, 2.0, 0.0]), np.array([0.0, 2.0, 1.0])
    per_task, _ = evaluate.score_balance(np.concatenate([chosen, rejected]), ["b", "a", "a"] * 2)
    (a, b), edges = reward_card.task_rows(["b", "a", "a"], chosen, rejected, per_task)
    assert (a["task"], a["pairs"], a["accuracy"], a["mean"]) == (
        "a",
        2,
        25.0,
        1.25,
    )  # a tie and a mistake
    assert (b["task"], b["pairs"], b["accuracy"], b["std"]) == ("b", 1, 100.0, 0.5)
    assert len(edges) == 13 and a["histogram"] == "▄·····▄····█" and b["histogram"] == "█·····█·····"


# --- text -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NASTY)
def test_escaped_text_is_inert_and_still_says_the_same(name):
    text = reward_card.escape(NASTY[name], limit=1000)
    assert len(text.splitlines()) == 1 and not re.search(r"[<>`|\[\]*~$\\{}@:!]|&(?!#\d+;)|www\.|(?<!&)#", text)
    plain = " ".join(NASTY[name].split())
    shown = html.unescape(text)
    assert shown == re.sub("[\x00\x1b\u202e\u2066\u200b\ud800]", "\ufffd", plain)
    text.encode()


def test_long_text_keeps_both_ends_and_no_entity_is_cut():
    text = reward_card.escape("<" * 500 + "question", limit=60)
    assert html.unescape(text) == "<" * 40 + " … " + "<" * 12 + "question"
    assert "&" not in re.sub(r"&#\d+;", "", text)


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found, self.texts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)


def test_a_rendered_card_holds_no_element_of_the_data(tmp_path, scorer_folder):
    markdown_it = pytest.importorskip("markdown_it")
    model = shutil.copytree(scorer_folder, tmp_path / "model")
    rows = [
        {"prompt": [{"role": role, "content": text}], "chosen": a, "rejected": b, "task": text}
        for role, text in zip("uvwxy", (t.encode("utf-8", "replace").decode() for t in NASTY.values()), strict=True)
        for a, b in ((text, "x"), ("x", text))
    ]
    run(tmp_path, model, rows, max_length=128)
    text = (model / "README.md").read_text(encoding="utf-8")
    parser = markdown_it.MarkdownIt("commonmark", {"html": True}).enable("table")
    page = Tags(parser.render(text.partition(reward_card.MARK)[2]))
    kinds = {tag for tag, _ in page.found}
    assert kinds == {
        "h1",
        "h2",
        "p",
        "img",
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "pre",
        "code",
    }
    pictures = [f"reward_card/{name}.png" for name in ("reliability", "histograms", "task_balance")]
    assert [a["src"] for tag, a in page.found if tag == "img"] == pictures
    assert {k for _, a in page.found for k in a} <= {"src", "alt", "style", "class"}
    assert any(NASTY["entities"] in t for t in page.texts)  # an entity in the data shows as it stands there
    assert len(re.findall("confidence .* %", text.partition("<pre>")[2].partition("</pre>")[0])) == 5
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):  # every table row has its header's columns
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


def test_names_that_matplotlib_would_read_as_mathematics_are_drawn(tmp_path, scorer_folder, drawn):
    model = shutil.copytree(scorer_folder, tmp_path / "model")
    rows = [ROWS[0] | {"task": "$\\frac{$"}, ROWS[2] | {"task": "two"}]
    run(tmp_path, model, rows, names=("$\\bad{$",))
    for name in ("reliability", "histograms", "task_scores", "task_balance"):
        assert (model / "reward_card" / f"{name}.png").stat().st_size > 4000


def test_figures_are_drawn_for_all_scorers_of_a_calibration(tmp_path, model):
    _, out = run(tmp_path, (str(model), str(model)), ROWS, names=("rm", "am"))
    figures.main(figures.Args(str(out)))
    figures.main(figures.Args(str(out), str(tmp_path / "elsewhere")))
    for name in ("reliability", "histograms", "task_scores", "task_balance"):
        picture = (out / f"{name}.png").read_bytes()
        assert picture == (tmp_path / "elsewhere" / f"{name}.png").read_bytes()
        assert picture[:4] == b"\x89PNG" and len(picture) > 10_000


def test_figure_2_has_the_score_difference_on_its_x_axis(tmp_path, monkeypatch, drawn):
    """As the paper's. In every bin: the mean difference, and the share of the pairs ranked right."""
    seen, close = [], figures.plt.close
    monkeypatch.setattr(figures.plt, "close", lambda figure: seen.append(figure) or close(figure))
    means = [0.1, 0.3, 0.5, 0.7, 0.95, 1.2, 1.5, 1.8, 2.5, 6.0]
    bins = [{"count": 30, "accuracy": 0.5 + g / 20, "confidence": 0, "gap": g} for g in means]
    bins[3] = {"count": 0, "accuracy": None, "confidence": None, "gap": None}
    entry = {"bins": bins, "ece": 1.0, "per_task": {"all": {"mean": 0.0, "std": 1.0}}}
    figures.draw({"rm": entry}, {"rm": np.random.default_rng(0).normal(size=(2, 9))}, ["all"] * 9, tmp_path)
    (axis,) = seen[0].axes
    calibrated, measured = axis.lines
    assert axis.get_xlabel().startswith("difference of the two scores")
    assert measured.get_xdata().tolist() == [g for g in means if g != 0.7]
    x, y = calibrated.get_xdata(), calibrated.get_ydata()
    np.testing.assert_allclose(y, 1 / (1 + np.exp(-x)))
    assert x[0] == 0 and x[-1] > 6


def test_figures_of_another_calibration_stay(tmp_path, model):
    run(tmp_path, model, ROWS)
    shutil.copytree(tmp_path / "out", tmp_path / "other")
    elsewhere = str(tmp_path / "elsewhere")
    for _ in range(2):  # the same one may be drawn again
        figures.main(figures.Args(str(tmp_path / "out"), elsewhere))
    with pytest.raises(InputError, match="elsewhere: holds the figures of another calibration; give another"):
        figures.main(figures.Args(str(tmp_path / "other"), elsewhere))
    (tmp_path / "other" / "reliability.png").write_text("of somebody else")
    figures.main(figures.Args(str(tmp_path / "other")))  # its own folder


def test_a_calibration_is_read_with_the_pairs_that_it_scored(tmp_path, model):
    report, out = run(tmp_path, model, ROWS)
    read, scores, rows = load_calibration(out)
    assert read["scorers"] == report["scorers"] and rows == ROWS
    (name, pair), *_ = scores.items()
    assert (pair == scores_of(model, ROWS)).all() and name == "run"
    (tmp_path / "pairs.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    with pytest.raises(InputError, match=r"pairs\.jsonl: has 1 pairs, the calibration 6; run"):
        load_calibration(out)
    with pytest.raises(InputError, match=r"--calibration .*nothing/calibration\.json: cannot be read"):
        load_calibration(tmp_path / "nothing")


def test_paths_of_the_machine_stay_off_the_card(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert reward_card.shown(tmp_path / "runs" / "rm") == "runs/rm"
    assert reward_card.shown("/home/someone/secret/runs/rm") == "…/runs/rm"
    assert reward_card.shown("owner/name") == "owner/name"
    args = {"scorers": ["/home/someone/rm/model"], "dataset_name": "a b\n```.jsonl"}
    command = reward_card.command_line(args | {"max_length": 64, "bf16": False, "names": []})
    assert "\n" not in command and "someone" not in command and "--max_length 64" in command
    assert "--bf16" not in command and "'a b ```.jsonl'" in command and "--names" not in command


# --- the card -------------------------------------------------------------------------------------


def test_the_card_of_an_advantage_model(tmp_path, scorer_folder, drawn):
    chosen, rejected = scores_of(scorer_folder, ROWS)
    both = [*map(float, chosen), *map(float, rejected)]
    margin = round(float(np.median(np.abs(both))), 3)  # some scores lie beyond it, some do not
    data = {"dataset_name": "train.jsonl", "model_name_or_path": "/home/someone/sft/model"}
    model = training_run(tmp_path / "am", scorer_folder, loss="am", am_margin=margin, expected_reward="none", **data)
    report, out = run(tmp_path, model, [row | {"prob_chosen": 0.75} for row in ROWS])
    text = (model / "README.md").read_text(encoding="utf-8")
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "tags": ["reward-model", "rlhf", "advantage-model"],
    }
    assert (
        body.startswith(reward_card.MARK + "\n")
        and (model / "reward_card" / "reliability.png").read_bytes()[:4] == b"\x89PNG"
    )
    entry = report["scorers"]["am"]
    beyond = 100 * sum(abs(a) > margin for a in both) / 12
    assert 0 < beyond < 100
    for line in (
        "| pairs, prompts | 6 pairs of 5 prompts |",
        f"| accuracy | {entry['accuracy']:.2f} % (equal scores count half; 0 here) |",
        f"| scores beyond the bound | {beyond:.2f} % have \\|a\\| > m = {margin:g}; "
        f"the largest is {max(map(abs, both)):.2f} |",
        f"- loss: Eq. 6, the advantage model, margin m = {margin:g}",
        "- started from: …/sft/model",
        "meant to be comparable across prompts",
        "true p(chosen) 75.0 %",
    ):
        assert line in text, line
    assert "load_advantage_model" not in text and "someone" not in text and str(tmp_path) not in text
    assert "- commit abc, torch 2.0" in text and "0.0777" not in text
    counts = re.findall(r"^\| 0\.\d\d – [01]\.\d\d \| (\d+) \|", text, flags=re.MULTILINE)
    assert [int(c) for c in counts] == [b["count"] for b in entry["bins"]] and sum(map(int, counts)) == 6
    confidences = [float(c) for c in re.findall(r"^ ?\d+\. confidence ([\d.]+) %", text, flags=re.MULTILINE)]
    assert confidences == sorted(confidences, reverse=True) and len(confidences) == len(
        {(r["prompt"], r["chosen"]) for r, c, d in zip(ROWS, chosen, rejected, strict=True) if c < d}
    )
    assert (out / "calibration.json").is_file()


def test_the_card_says_where_there_is_no_bound_and_where_nobody_knows(tmp_path, scorer_folder):
    rm = training_run(tmp_path / "rm", scorer_folder, loss="rm", am_margin=2.5, expected_reward="none")
    other = shutil.copytree(rm, tmp_path / "elsewhere" / "other")
    (other / "training.json").unlink()  # and config.json beside the folder is no witness
    shutil.copy(tmp_path / "rm" / "config.json", tmp_path / "elsewhere")
    run(tmp_path, (str(rm), str(other)), ROWS)
    text, unknown = ((f / "README.md").read_text(encoding="utf-8") for f in (rm, other))
    assert "this scorer has none: Eq. 1 bounds nothing" in text and "have \\|a\\|" not in text and "margin" not in text
    assert "compare scores of responses to one prompt only" in text and "advantage-model" not in text
    assert "not known, since the training is not recorded" in unknown
    assert "The settings are not recorded" in unknown and "0.0777" not in unknown


@pytest.mark.parametrize("margin", ["by task", "gone", "inf", "one", None])
def test_margins_as_am_train_reads_them(margin, tmp_path, scorer_folder, drawn):
    chosen, rejected = scores_of(scorer_folder, ROWS)
    table = {
        "one": 0.001,
        "default": 99.0,
    }  # every score of task one lies beyond its bound, none of the others does
    (tmp_path / "m.json").write_text(json.dumps(table))
    spec = {
        "by task": str(tmp_path / "m.json"),
        "gone": str(tmp_path / "gone.json"),
        "one": "1e-3",
        "inf": np.inf,
    }
    model = training_run(tmp_path / "am", scorer_folder, loss="am", am_margin=spec.get(margin))
    run(tmp_path, model, ROWS)
    text = (model / "README.md").read_text(encoding="utf-8")
    largest = max(abs(a) for a in [*chosen, *rejected])
    bound, training = {
        "by task": (
            f"33.33 % have \\|a\\| > m(x), which differs by task; the largest is {largest:.2f}",
            "one 0.001, default 99",
        ),
        "one": (
            f"100.00 % have \\|a\\| > m = 0.001; the largest is {largest:.2f}",
            "margin m = 0.001",
        ),
        "inf": ("none: m = inf", "margin m = inf"),
    }.get(margin, ("not known, since the margins are not", "- loss: Eq. 6, the advantage model\n"))
    assert f"| scores beyond the bound | {bound} |" in text and training in text


def test_measuring_the_training_file_is_said(tmp_path, scorer_folder):
    model = training_run(tmp_path / "rm", scorer_folder, loss="rm", dataset_name="pairs.jsonl")
    run(tmp_path, model, ROWS)
    told = json.loads((model / "training.json").read_text())
    told["data"] = {"pairs.jsonl": reward_card.file_hash(tmp_path / "pairs.jsonl")}
    (model / "training.json").write_text(json.dumps(told))
    run(tmp_path, model, ROWS)
    assert "these numbers are of training data" in (model / "README.md").read_text(encoding="utf-8")


# --- loading --------------------------------------------------------------------------------------


def loaded_score(folder, prompt, response):
    """What the first Python block of the card gives for a prompt and a response, run in the card's
    folder."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", text, flags=re.DOTALL)[1]
    assert code.count("\n") <= 18
    names = {}
    exec(code.replace('"the prompt"', repr(prompt)).replace('"the response"', repr(response)), names)
    return names["score"]


TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}:{% endif %}"


CHATML = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
CHATML += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def test_a_whole_conversation_is_cut_behind_the_end_of_the_answer(tmp_path):
    """ChatML writes a line break behind it, where a sequence classifier would read another score."""
    words = byte_level_tokenizer(pad_token="<pad>", eos_token="<|im_end|>")
    words.chat_template = CHATML
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_config(gpt2_config(words, num_labels=1)).eval()
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    run(tmp_path, folder, ROWS, max_length=120)
    text = (folder / "README.md").read_text(encoding="utf-8")
    first, whole = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    names, row = {}, ROWS[0]
    first = first.replace('"the prompt"', repr(row["prompt"])).replace('"the response"', repr(row["chosen"]))
    exec(first.replace('folder = "."', f"folder = {str(folder)!r}"), names)
    ours = names["ids"]
    (score,), _ = scores_of(folder, [row], 120)
    assert names["score"] == pytest.approx(score, abs=1e-4)
    exec(whole, names)
    assert names["ids"] == ours and ours[-1] == words.eos_token_id
    conversation = words.apply_chat_template(names["messages"], tokenize=False)
    assert conversation.endswith("<|im_end|>\n")  # which has to be cut
    words.chat_template = TEMPLATE  # writes no end: nothing to cut
    words.save_pretrained(folder)
    assert reward_card.whole_conversation(folder) == ""


@pytest.mark.parametrize("kind", ["causal", "template", "pad is eos", "e head", "bert", "roberta"])
def test_the_loading_code_gives_the_score_of_the_calibration(
    kind, tmp_path, tokenizer, bert_tokenizer, roberta_tokenizer, monkeypatch
):
    torch.manual_seed(3)
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
    }
    sizes |= {"max_position_embeddings": 128, "initializer_range": 0.2, "num_labels": 1}
    config, words = gpt2_config(tokenizer, num_labels=1), tokenizer
    if kind == "template":
        words = byte_level_tokenizer(pad_token="<pad>", eos_token="<eos>")
        words.chat_template = TEMPLATE
        start = processors.TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", words.eos_token_id)])
        words.backend_tokenizer.post_processor = start  # which a rendered template must not get a second time
    elif kind == "pad is eos":
        words = byte_level_tokenizer(eos_token="<eos>")
        words.pad_token = "<eos>"
        config = gpt2_config(words, num_labels=1)
    elif kind == "bert":
        words = bert_tokenizer
        config = BertConfig(vocab_size=len(words), pad_token_id=0, **sizes)
    elif kind == "roberta":
        words = roberta_tokenizer
        config = RobertaConfig(vocab_size=len(words), pad_token_id=0, type_vocab_size=1, **sizes)
    scorer = Scorer(AutoModelForSequenceClassification.from_config(config), kind == "e head").eval()
    if kind == "e head":
        torch.nn.init.normal_(scorer.e_head.weight)
    folder = tmp_path / "model"
    scorer.save_pretrained(folder, scorer.state_dict())
    words.save_pretrained(folder)
    run(tmp_path, folder, ROWS, max_length=120)
    monkeypatch.chdir(folder)
    rows = [ROWS[0], ROWS[3]]
    scores = scores_of(folder, rows, 120)
    text = (folder / "README.md").read_text(encoding="utf-8")
    loaded = [[loaded_score(folder, row["prompt"], row[side]) for row in rows] for side in ("chosen", "rejected")]
    if kind == "e head":  # AutoModel gives r: right within a prompt, and the card says what is missing across prompts
        np.testing.assert_allclose(np.subtract(*loaded), np.subtract(*scores), atol=1e-4)
        assert np.abs(np.array(loaded) - scores).max() > 0.01
        assert (folder / E_HEAD).is_file() and "from tools.export_reward_model import load_advantage_model" in text
        assert "AutoModel gives r" in text and "a = r − e" in text
        wrapper = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)[1].replace(
            '"the prompt"', repr(rows[0]["prompt"])
        )
        names = {"folder": "."}
        exec(wrapper.replace('"the response"', repr(rows[0]["chosen"])), names)
        assert names["scores"] == pytest.approx([scores[0][0]], abs=1e-4)
    else:
        np.testing.assert_allclose(loaded, scores, atol=1e-4)
        assert "load_advantage_model" not in text
    assert AutoTokenizer.from_pretrained(folder).chat_template == (TEMPLATE if kind == "template" else None)


# --- files ----------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path, scorer_folder):
    return shutil.copytree(scorer_folder, tmp_path / "run" / "model", ignore=shutil.ignore_patterns("*.md", "*.png"))


def test_our_card_is_rewritten_and_somebody_elses_is_not(tmp_path, model, capsys):
    readme, beside = model / "README.md", model / "REWARD_CARD.md"
    run(tmp_path, model, ROWS)
    first = readme.read_text(encoding="utf-8")
    run(tmp_path, model, ROWS[:3])
    second = readme.read_text(encoding="utf-8")
    assert "6 pairs of" in first and "3 pairs of" in second and not beside.exists()
    assert not list(model.glob("*.tmp"))
    theirs = second.replace(reward_card.MARK + "\n", "").replace("# Reward card", f"{reward_card.MARK}\n# Theirs")
    for text in ("# Mine\n", theirs, "---\nno end", f"x\n{reward_card.MARK}\n"):
        readme.write_text(text, encoding="utf-8")
        run(tmp_path, model, ROWS)
        assert readme.read_text(encoding="utf-8") == text
        assert "6 pairs of" in beside.read_text(encoding="utf-8")
        assert "README.md there is not ours and stays" in capsys.readouterr().out
    beside.write_text("also mine")
    with pytest.raises(InputError, match=r"README\.md and REWARD_CARD\.md are not cards of ours"):
        run(tmp_path, model, ROWS)
    assert beside.read_text() == "also mine"


def test_a_folder_that_cannot_be_written_to_is_named_and_the_scores_stay(tmp_path, model):
    (model / "reward_card").write_text("a file stands in the way, even of root")
    with pytest.raises(InputError, match=r"run/model: no reward card can be written here"):
        run(tmp_path, model, ROWS)
    assert not (model / "README.md").exists()
    assert json.loads((tmp_path / "out" / "calibration.json").read_text())["pairs"] == 6


def test_a_hub_id_gets_its_card_in_the_output_folder(tmp_path, model, monkeypatch):
    for module, name in (
        (judges, "load_tokenizer"),
        (reward_card, "load_tokenizer"),
        (judges, "load_scorer"),
    ):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda path, *a, real=real, **k: real(model, *a, **k))
    from transformers import AutoConfig

    real_config = AutoConfig.from_pretrained
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda path, **k: real_config(model, **k))
    _, out = run(tmp_path, "owner/name", ROWS)
    card = (out / "name" / "README.md").read_text(encoding="utf-8")
    assert 'folder = "owner/name"' in card and (out / "name" / "reward_card").is_dir()
    (out / "calibration.json").unlink()
    _, out = run(tmp_path, "owner/name", ROWS, names=("../up",))
    assert not list(tmp_path.glob("up*")) and (out / "_up" / "README.md").is_file()


def test_only_the_named_scorers_get_a_card(tmp_path, model):
    other = shutil.copytree(model, tmp_path / "other" / "model")
    _, out = run(tmp_path, (str(model), str(other)), ROWS)
    for folder in (model, other):
        (folder / "README.md").unlink()
    reward_card.main(reward_card.Args(str(out), ("other",)))
    assert (other / "README.md").is_file() and not (model / "README.md").exists()
    with pytest.raises(InputError, match="--names am: not one of run, other"):
        reward_card.main(reward_card.Args(str(out), ("am",)))
