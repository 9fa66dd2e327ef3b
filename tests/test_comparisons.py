"""Statistics of verdicts and answers: by hand, against sklearn's, by simulation; tools/answers.py,
tools/compare.py, tools/judge_agreement.py."""

import inspect
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import cohen_kappa_score
from transformers import AutoModelForCausalLM

import evaluate
from evaluate import drift
from tests.conftest import gpt2_config
from tests.judge_server import JudgeServer, verdict
from tools import answers, compare, judge_agreement, judges, statistics
from tools.answers import at_equal_length, distinct, diversity, length_controlled, self_bleu
from tools.compare import net_difference
from tools.judge_agreement import kappa
from tools.statistics import EXTRA, POINTS, mean, resample, with_intervals
from utils import InputError, load_tokenizer

OUTCOMES = np.array([1, -1, 0])


# --- intervals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["numbered", "resample", "with_intervals"])
def test_duplicated_statistics_are_word_for_word_the_same(name):
    assert inspect.getsource(getattr(statistics, name)) == inspect.getsource(getattr(evaluate, name))


def test_rows_of_a_prompt_are_drawn_together():
    weights = resample(["a", "b", "a", "c"], 500, np.random.default_rng(0), extra=3)
    assert weights.shape == (501, 7) and weights[0].tolist() == [1, 1, 1, 1, 0, 0, 0]
    assert (weights[:, 0] == weights[:, 2]).all() and (weights[1:, [0, 1, 3, 4, 5, 6]].sum(1) == 6).all()
    assert np.abs(weights[1:].mean(0) - 1).max() < 0.2  # each of the six once on average
    samples = mean(weights, np.array([1.0, 2, 3, 4, 0, 0, 0]))
    a, b, c, x, y, z = weights[7, [0, 1, 3, 4, 5, 6]]
    assert samples[0] == 2.5 and samples[7] == pytest.approx((4 * a + 2 * b + 4 * c) / (2 * a + b + c + x + y + z))


def test_an_outcome_that_was_not_seen_is_not_impossible():
    """No win in 300 prompts: up to 1 % by the rule of three, where the plain bootstrap has [0,
    0]."""
    result = shares(np.repeat([-1, 0], [30, 270]), np.zeros(300), 1000)
    low, high = result["intervals"]["win"]
    assert result["win"] == low == 0 and high == pytest.approx(1, abs=0.4)
    assert result["lose"] == 10 and result["win_rate"] == round(result["length_controlled"], 3) == 45


def both(points, difference, weights):
    """What winrate.json and answers.json say of these verdicts."""
    verdicts = np.array(["tie", "win", "lose"])[points.astype(int)]
    samples = {"length_controlled": at_equal_length(points, difference, weights)}
    return with_intervals(evaluate.shares(verdicts, weights) | samples)


def shares(points, difference, num_bootstrap=200):
    rng = np.random.default_rng(0)
    return both(points, difference, resample(range(len(points)), num_bootstrap, rng, len(EXTRA)))


def coverage(points, difference, truth, num_bootstrap=300, result=both, extra=3):
    """Percent of the intervals that hold the truth; points, difference (repetitions, prompts).

    All repetitions share the resampling, which is cheap so: it knows nothing of the verdicts.
    """
    weights = resample(range(points.shape[1]), num_bootstrap, np.random.default_rng(1), extra)
    hits = {k: 0 for k in truth}
    for verdicts, characters in zip(points, difference, strict=True):
        intervals = result(verdicts, characters, weights)["intervals"]
        for k, value in truth.items():
            hits[k] += intervals[k][0] <= value <= intervals[k][1]
    return {k: 100 * v / len(points) for k, v in hits.items()}


def drawn(theta, phi, repetitions, prompts, rng):
    """Verdicts whose mean is 2 s(theta + phi tanh(d)) - 1 exactly, with ties (most where the two
    are close) -> points, d."""
    d = rng.normal(0.3, 1, (repetitions, prompts))
    p = 1 / (1 + np.exp(-theta - phi * np.tanh(d)))
    tie = p * (1 - p)
    u = rng.random(p.shape)
    return np.where(u < p - tie / 2, 1, np.where(u < p + tie / 2, 0, -1)), d


def test_intervals_of_win_rates_cover_their_nominal_95_percent():
    rng = np.random.default_rng(0)
    many, _ = drawn(-0.4, 0.8, 1, 2_000_000, rng)
    truth = {k: 100 * (many == v).mean() for k, v in POINTS.items()}
    truth |= {"win_rate": 50 * (1 + many.mean()), "length_controlled": 100 / (1 + np.exp(0.4))}
    covered = coverage(*drawn(-0.4, 0.8, 1000, 60, rng), truth)
    assert all(93 <= v <= 97 for v in covered.values()), covered


def test_intervals_of_rare_wins_cover_and_the_plain_bootstrap_would_not():
    def plain(points, difference, weights):
        return with_intervals({"win": 100 * mean(weights, points == 1)})

    points = np.random.default_rng(0).choice(OUTCOMES, (500, 40), p=[0.05, 0.35, 0.6])
    assert coverage(points, 0 * points, {"win": 5})["win"] >= 93
    assert coverage(points, 0 * points, {"win": 5}, result=plain, extra=0)["win"] < 90


def test_intervals_of_paired_differences_cover_their_nominal_95_percent():
    """Two policies that agree on half of the prompts; the same weights for all repetitions, which
    are cheap so."""
    rng = np.random.default_rng(0)
    a, fresh = rng.choice(OUTCOMES, (2, 4000, 50), p=[0.3, 0.3, 0.4])
    b = np.where(rng.random(a.shape) < 0.5, a, np.where(fresh == 1, fresh, rng.choice(OUTCOMES, a.shape)))
    truth = 100 * (a - b).mean()  # of 200,000 prompts
    weights, hits = resample(range(50), 1000, rng, len(EXTRA)), {1.0: 0, 0.85: 0}
    for one, other in zip(a, b, strict=True):
        samples = net_difference(one, other, weights)
        low, high = with_intervals({"d": samples})["intervals"]["d"]
        for width in hits:
            hits[width] += abs(truth - (low + high) / 2) <= width * (high - low) / 2
    assert 93 <= hits[1.0] / 40 <= 97 and hits[0.85] / 40 < 93  # narrower by 15 %: the check can fail


# --- length control -------------------------------------------------------------------------------


def test_length_control_is_the_fit_of_sklearn_in_every_resample():
    points, d = (column[0] for column in drawn(0.5, -1.5, 1, 80, np.random.default_rng(3)))
    x, y = np.tanh(d / d.std()), (1 + points) / 2
    weights = resample(range(80), 5, np.random.default_rng(0))
    fits = []
    for w in weights:  # a verdict of 1/2 is half a win and half a loss
        fit = LogisticRegression(C=1, tol=1e-10, max_iter=1000)
        fit.fit(np.tile(x, 2)[:, None], np.repeat([1, 0], 80), np.append(w * y, w * (1 - y)))
        fits.append(100 / (1 + np.exp(-fit.intercept_[0])))
    assert length_controlled(points, x, weights) == pytest.approx(fits, abs=1e-4)
    result = shares(points, d)
    assert result["length_controlled"] == pytest.approx(fits[0], abs=1e-4)


def test_where_length_alone_decides_the_controlled_win_rate_is_even():
    d = np.random.default_rng(0).normal(0.6, 1, 400)  # longer than the reference three times of four
    result = shares(np.sign(d), d)
    low, high = result["intervals"]["length_controlled"]
    assert result["win_rate"] > 70 and abs(result["length_controlled"] - 50) < 5 and low < 50 < high
    backwards = shares(-np.sign(d), d)
    assert backwards["win_rate"] < 30 and abs(backwards["length_controlled"] - 50) < 5


def test_length_control_leaves_alone_what_length_does_not_explain():
    points, d = np.repeat([1, -1, 0], [30, 50, 20]), np.tile([-1, 1, 3, 5], 25)
    even = shares(points, np.full(100, 7))
    assert even["length_controlled"] == pytest.approx(even["win_rate"]) == pytest.approx(40)
    all_won = shares(np.ones(100), d)  # has no finite optimum
    assert all_won["length_controlled"] > 99.9 and all_won["intervals"]["length_controlled"][0] > 90


# --- answers --------------------------------------------------------------------------------------


def test_distinct_by_hand():
    texts = ["a b a", "b a", ""]  # words a b a b a: 2 of 5; pairs ab ba | ba: 2 of 3
    assert distinct(texts, 1) == 0.4 and distinct(texts, 2) == pytest.approx(2 / 3)
    assert distinct(["你好 hi"], 1) == 1 and distinct(["你好 你 hi"], 1) == 0.75 and distinct([""], 1) is None


def test_self_bleu_by_hand():
    """Of "a b" both orders are found in "a b c", e^(1 - 3/2) for the closest length; the others
    have an order with none."""
    assert self_bleu(["a b", "a b c", "x y z w"]) == pytest.approx(np.exp(1 - 3 / 2) / 3)
    assert self_bleu(["a b c", "a b c", "x"]) == pytest.approx(2 / 3)
    assert self_bleu(["a a", "a b"]) == pytest.approx(0)  # a counts once: 1/2, and no pair
    assert self_bleu(["a a a b", "a a a"]) == pytest.approx(np.exp(1 - 4 / 3) / 2)  # no order 4; all of three
    assert self_bleu(["b b b c", "b b b c d"]) == pytest.approx(
        (np.exp(1 - 5 / 4) + (4 / 5 * 3 / 4 * 2 / 3 / 2) ** 0.25) / 2
    )
    assert self_bleu(["a", ""]) is None
    assert self_bleu(["a b"] * 5 + ["c d"] * 5, limit=2) == 0  # rows 1 and 6
    assert diversity(["ab", "abcd"])["characters"] == 3


def drifted(rows, num_bootstrap):
    return with_intervals(drift(rows, num_bootstrap, np.random.default_rng(0)))


def test_drift_by_hand():
    """KL (3 - 1) / 2 = 1 a response, 2 / 8 a token; perplexity exp(12 / 8)."""
    rows = [{"prompt": "a", "tokens": 6, "logprob": -6.0, "reference_logprob": -9.0}]
    rows += [{"prompt": "b", "tokens": 2, "logprob": -4.0, "reference_logprob": -3.0}]
    rows = [row | {"response": "y"} for row in rows]
    rows = [row | {"logprobs_of": evaluate.hash_of(row)} for row in rows]
    result = drifted(rows, 200)
    assert [result[k] for k in ("kl", "kl_per_token", "perplexity_ref")] == pytest.approx([1, 0.25, np.exp(1.5)])
    assert result["intervals"]["kl"] == [-1, 3] and result["intervals"]["perplexity_ref"] == pytest.approx(
        np.exp([1.5, 1.5])
    )
    greedy = drifted([{k: v for k, v in row.items() if k != "logprob"} for row in rows], 10)
    assert "kl" not in greedy and greedy["perplexity_ref"] == result["perplexity_ref"]
    for other in ({"prompt": "c", "response": "y"}, rows[0] | {"response": "z"}, rows[0] | {"prompt": "z"}):
        assert drift([*rows, other], 10, np.random.default_rng(0)) == {}


# --- winrate --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference_folder(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    torch.manual_seed(5)
    AutoModelForCausalLM.from_config(gpt2_config(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def winrate(out, **changes):
    args = {"output_dir": str(out), "judge": "length", "response_length": 6, "num_bootstrap": 100}
    report = evaluate.winrate(evaluate.Winrate(**args | changes))
    assert json.loads((out / "winrate.json").read_text())["evaluate.py"]["judge"] == {"name": args["judge"]}
    return report, [json.loads(line) for line in (out / "responses.jsonl").read_text().splitlines()]


def plain_logprob(path, prompt, response, temperature):
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    with torch.no_grad():
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1] / temperature
    return logits.log_softmax(-1)[range(len(response)), response].sum().item()


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_kl_tasks_scores_and_diversity_of_a_policy(
    temperature, policy_folder, reference_folder, scorer_folder, tmp_path, monkeypatch
):
    sampled, generate = [], evaluate.generate
    monkeypatch.setattr(evaluate, "generate", lambda *a: sampled.append((a[2], generate(*a))) or sampled[-1][1])
    files = [
        write_rows(
            tmp_path / f"{name}.jsonl",
            [{"prompt": f"the {name} fox {i}", "task": f"t{i % 2}"} for i in range(n)],
        )
        for name, n in (("main", 6), ("forget", 4))
    ]
    two = {"policy": policy_folder, "reference": reference_folder, "dataset_names": tuple(files)}
    report, rows = winrate(tmp_path / "a", temperature=temperature, **two)
    of_policy = [pair for prompts, ids in sampled[:2] for pair in zip(prompts, ids, strict=True)]  # of the policy
    t = temperature or 1.0
    by_hand = [[plain_logprob(path, *pair, t) for pair in of_policy] for path in (policy_folder, reference_folder)]
    assert [row["tokens"] for row in rows] == [len(ids) for _, ids in of_policy]
    assert [row["reference_logprob"] for row in rows] == pytest.approx(by_hand[1], abs=1e-3)
    ppl = np.exp(-sum(by_hand[1][:6]) / sum(len(ids) for _, ids in of_policy[:6]))
    assert report["main"]["perplexity_ref"] == pytest.approx(ppl, rel=1e-3)
    if temperature:
        assert [row["logprob"] for row in rows] == pytest.approx(by_hand[0], abs=1e-3)
        assert report["main"]["kl"] == pytest.approx(np.subtract(*by_hand)[:6].mean(), abs=1e-3)
    else:
        assert "kl" not in report["main"] and "logprob" not in rows[0]

    tasks = report["main"]["tasks"]
    assert {k: v["prompts"] for k, v in tasks.items()} == {"t0": 3, "t1": 3}
    assert report["main"]["win"] == pytest.approx(np.mean([v["win"] for v in tasks.values()]))
    said = answers.main(answers.Args(str(tmp_path / "a"), (scorer_folder,), num_bootstrap=100))
    assert said["main"]["diversity"]["reference"] == diversity([row["reference"] for row in rows[:6]])
    stored = json.loads((tmp_path / "a" / "answers.json").read_text())
    assert stored == json.loads(json.dumps(said))
    (deltas,) = said["tools.answers"]["scorers"].values()
    args = evaluate.Winrate(judge="", output_dir="")
    score = judges.Advantages(scorer_folder, args, "answers")
    delta = np.subtract(*score(rows, ("response", "reference")))
    assert deltas["overall"]["difference"] == pytest.approx(delta.mean(), abs=1e-5)
    assert deltas["sets"]["forget"]["difference"] == pytest.approx(delta[6:].mean(), abs=1e-5)
    assert deltas["overall"]["low"] < delta.mean() < deltas["overall"]["high"]
    again, _ = winrate(tmp_path / "b", responses=str(tmp_path / "a" / "responses.jsonl"))
    assert again["main"] == report["main"]  # stored answers keep their KL


def test_a_policy_is_at_no_distance_from_itself_and_other_tokens_have_no_kl(
    policy_folder, tmp_path, capsys, monkeypatch
):
    file = write_rows(tmp_path / "main.jsonl", [{"prompt": "the quick fox"}, {"prompt": "the lazy dog"}])
    two = {"policy": policy_folder, "reference": policy_folder, "dataset_names": (file,)}
    report, _ = winrate(tmp_path / "a", **two)
    assert report["main"]["kl"] == pytest.approx(0, abs=1e-6) and "tasks" not in report["main"]
    vocabularies = iter([{"a": 0}, {"b": 0}])
    kind = type(load_tokenizer(policy_folder))
    monkeypatch.setattr(kind, "get_vocab", lambda self: next(vocabularies))
    report, rows = winrate(tmp_path / "b", **two)
    assert "perplexity_ref" not in report["main"] and "reference_logprob" not in rows[0]
    assert "main.jsonl: policy and reference have other tokens, so no KL" in capsys.readouterr().out


def test_answers_of_a_judged_folder(tmp_path):
    """Length control draws as the win rate does: of both sets, with a KL between, and of the tasks;
    and AlpacaEval's files."""
    rng, rows = np.random.default_rng(0), []
    for i in range(60):
        row = {"set": "main" if i < 40 else "forget", "prompt": f"p{i % 50}", "task": f"t{i % 2}"}
        row |= {"response": "r" * rng.integers(1, 9), "reference": "s" * rng.integers(1, 9)}
        rows.append(row | {"logprob": -2.0 - i, "reference_logprob": -3.0, "tokens": 2})
    rows[0]["prompt"] = [{"role": "system", "content": "be"}, {"role": "user", "content": "main"}]
    rows = [row | {"logprobs_of": evaluate.hash_of(row)} for row in rows]
    stored = write_rows(tmp_path / "stored.jsonl", rows)
    winrate(tmp_path / "a", responses=stored, tie_band=1)
    report = answers.main(answers.Args(str(tmp_path / "a"), num_bootstrap=100))
    judged = [json.loads(line) for line in (tmp_path / "a" / "responses.jsonl").read_text().splitlines()]
    rng = np.random.default_rng(1)
    for label in ("main", "forget"):
        part = [row for row in judged if row["set"] == label]
        for draw, task in ((True, None), (False, None), (True, "t0"), (True, "t1")):
            of_task = [row for row in part if task in (None, row["task"])]
            weights = resample([str(row["prompt"]) for row in of_task], 100, rng, 3 * draw)
            if draw:
                points = np.array([POINTS[row["verdict"]] for row in of_task])
                d = np.array([len(row["response"]) - len(row["reference"]) for row in of_task])
                samples = {"length_controlled": at_equal_length(points, d, weights)}
                entry = report[label]["tasks"][task] if task else report[label]
                assert entry == entry | with_intervals(samples)
    for field in ("response", "reference"):
        alpaca = json.loads((tmp_path / "a" / f"alpaca_eval_{field}.json").read_text())
        assert [set(row) for row in alpaca] == [{"dataset", "instruction", "output", "generator"}] * 60
        assert [row["output"] for row in alpaca] == [row[field] for row in rows]
        assert alpaca[0]["instruction"] == "system: be\nuser: main" and alpaca[1]["instruction"] == "p1"
        assert alpaca[0]["generator"] == f"a {field}"


# --- compare --------------------------------------------------------------------------------------


def write_arm(folder, verdicts, judge="length", **changes):
    folder.mkdir()
    rows = [
        {"set": "main", "prompt": f"p{i}", "response": "x", "reference": "r", "verdict": v} | changes
        for i, v in enumerate(verdicts)
    ]
    write_rows(folder / "responses.jsonl", rows)
    (folder / "winrate.json").write_text(json.dumps({"judge": {"name": judge}}))
    return str(folder)


def test_compare_pairs_by_prompt(tmp_path, capsys):
    """a wins 5 of 10 and loses 5, b wins 7 and loses 2, the tie where a wins: 0 and 50 points; they
    differ in three prompts."""
    a = write_arm(tmp_path / "a", ["win"] * 5 + ["lose"] * 5)
    b = write_arm(tmp_path / "b", ["tie"] + ["win"] * 7 + ["lose"] * 2)
    report = compare.main(compare.Args(winrates=(a, b, a), names=("a", "b", "c"), output_dir=str(tmp_path / "out")))
    main = report["sets"]["main"]
    assert main["arms"]["b"] == {"win": 70, "lose": 20, "tie": 10} and main["prompts"] == 10
    assert {k: main["win - lose"][k] for k in ("b - a", "c - a", "c - b")} == {
        "b - a": 50,
        "c - a": 0,
        "c - b": -50,
    }
    low, high = main["win - lose"]["intervals"]["b - a"]
    assert low < 50 < high and json.loads((tmp_path / "out" / "compare.json").read_text())["sets"] == report["sets"]
    assert f"main: b - a: +50.0 [{low:+.1f}, {high:+.1f}]" in capsys.readouterr().out


def test_pairing_narrows_what_policies_have_in_common(tmp_path):
    points = np.random.default_rng(0).choice(OUTCOMES, 200)
    names = {v: k for k, v in POINTS.items()}
    a = write_arm(tmp_path / "a", [names[p] for p in points])
    b = write_arm(tmp_path / "b", [names[p] for p in np.where(np.arange(200) < 190, points, 1)])
    low, high = compare.main(compare.Args((a, b), str(tmp_path)))["sets"]["main"]["win - lose"]["intervals"]["b - a"]
    assert low >= 0 and high - low < 12  # unpaired: 2 * 1.96 * 100 * sqrt(2 * 2/3 / 200) = 32


def test_compare_refuses_what_cannot_be_paired(tmp_path):
    first = write_arm(tmp_path / "first", ["win", "tie"])
    for name, changes, said in (
        (
            "x",
            {"reference": "other"},
            r"first and .*x differ in 'reference' \(responses.jsonl, line 1\); answer the same",
        ),
        ("y", {"prompt": "other"}, r"first and .*y differ in 'prompt'"),
        ("z", {"judge": "hf:m"}, r"first was judged by length, .*z by hf:m"),
        ("w", {"verdict": None}, r"w/responses.jsonl, line 1: field 'verdict' is missing"),
    ):
        with pytest.raises(InputError, match=said):
            compare.main(
                compare.Args(
                    (first, write_arm(tmp_path / name, ["win", "tie"], **changes)),
                    str(tmp_path / "out"),
                )
            )
    with pytest.raises(InputError, match=r"first has 2 answers, .*short 1"):
        compare.main(compare.Args((first, write_arm(tmp_path / "short", ["win"])), str(tmp_path / "out")))
    with pytest.raises(InputError, match="--names: two of the winrates have equal names"):
        compare.main(compare.Args((first, first), str(tmp_path / "out")))
    with pytest.raises(InputError, match="two folders or more"):
        compare.main(compare.Args((first,), str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


# --- judge-agreement ------------------------------------------------------------------------------


def test_kappa_is_that_of_sklearn_over_both_orders():
    rng = np.random.default_rng(0)
    for share in (0.3, 0.0):
        points, ties = rng.choice(OUTCOMES, 200, p=[0.5, 0.3, 0.2]), rng.random(200) < share
        labels = np.where(ties, 0, 1)
        both = cohen_kappa_score(np.append(labels, -labels), np.append(points, -points))
        weights = resample(range(200), 1, rng)
        assert kappa(points, ties, weights)[0] == pytest.approx(both, abs=1e-12)
        repeated = weights[1].astype(int)  # a resample is rows repeated
        labels, drawn_points = np.repeat(labels, repeated), np.repeat(points, repeated)
        both = cohen_kappa_score(np.append(labels, -labels), np.append(drawn_points, -drawn_points))
        assert kappa(points, ties, weights)[1] == pytest.approx(both, abs=1e-12)
    right = np.repeat([1, -1], [7, 3])
    assert kappa(right, np.zeros(10, bool), np.ones((1, 10)))[0] == pytest.approx(2 * 0.7 - 1)
    assert kappa(np.zeros(3), np.ones(3, bool), np.ones((1, 3)))[0] == 0


def shorter(prompts, responses):
    return [-len(text) for text in responses]


@pytest.fixture
def labelled(tmp_path):
    """Of four pairs the longer answer is chosen in two, one has equal lengths; people labelled
    three. Two ties, one equal."""
    texts = [("long one", "short"), ("longer", "x"), ("x", "longer"), ("ab", "cd")]
    rows, ties = [], []
    for i, (a, b) in enumerate(texts):
        who = {"task": f"t|{i // 2}", "label_by": "human" if i else "gpt-4"}
        rows.append({"prompt": f"p{i}", "chosen": a, "rejected": b} | who)
    for i, a in enumerate(("xy", "xyz")):
        answers = {"response_a": a, "response_b": "ab"}
        label = {"label": "tie", "label_by": "human (2 of 3)"}
        ties.append({"prompt": f"q{i}"} | answers | label)
    return {
        "dataset_name": write_rows(tmp_path / "pairs.jsonl", rows),
        "ties": write_rows(tmp_path / "ties.jsonl", ties),
    }


def test_judge_agreement_by_hand(labelled, tmp_path):
    """longer: right right wrong tie, 62.5 %; of the ties one. Agreement 3 of 6, ties 2 of 6 by
    label and 2 of 6 by the judge: chance 4/6 * 4/6 / 2 + 1/9 = 1/3, kappa 1/4. shorter: 37.5 %,
    agreement 2 of 6: kappa 0."""
    judges = ("length", "tests.test_comparisons:shorter")
    out = tmp_path / "out"
    report = judge_agreement.main(
        judge_agreement.Args(judges=judges, names=("longer", "<s>"), output_dir=str(out), **labelled)
    )
    longer, other = report["judges"].values()
    assert (report["pairs"], report["ties"], report["prompts"]) == (4, 2, 6)
    assert (longer["accuracy"], other["accuracy"]) == (62.5, 37.5) and longer["flips"] is None
    assert (longer["kappa"], other["kappa"]) == pytest.approx((0.25, 0))
    assert longer["tasks"] == {
        "t|0": {"accuracy": 100, "pairs": 2},
        "t|1": {"accuracy": 25, "pairs": 2},
    }
    assert longer["intervals"]["accuracy"][0] < 62.5 < longer["intervals"]["accuracy"][1]
    text = (out / "judge_agreement.md").read_text()
    assert "| longer | 62.5 [" in text and "&lt;s>" in text and "| t\\|1 | 2 | 25.0 | 75.0 |" in text
    assert json.loads((out / "judge_agreement.json").read_text())["judges"] == report["judges"]

    people = judge_agreement.main(
        judge_agreement.Args(judges=judges[:1], label_by=("human",), output_dir=str(tmp_path / "2"), **labelled)
    )
    assert (people["pairs"], people["ties"]) == (3, 0) and people["judges"]["length"]["accuracy"] == 50
    assert people["judges"]["length"]["kappa"] == pytest.approx(0)  # 1 of 3, and by chance (1 - 1/3) / 2
    flags = {"judges": judges[:1], "tie_band": 100, "output_dir": str(tmp_path / "3")}
    wide = judge_agreement.main(judge_agreement.Args(**flags | labelled))
    assert wide["judges"]["length"]["accuracy"] == 50 and wide["judges"]["length"]["kappa"] == pytest.approx(0)


def test_rows_that_a_cut_makes_equal_are_left_out_for_all_judges(scorer_folder, tmp_path, capsys):
    """Also for judges that cut nothing, so that all are compared on the same rows."""
    long = "dog " * 99
    rows = [{"prompt": f"p{i}", "chosen": "a fox", "rejected": "fox" * (i + 2)} for i in range(4)]
    equal = {"prompt": "p", "chosen": f"{long} fox", "rejected": f"{long} vow"}
    ties = [{"prompt": "q", "response_a": "dog", "response_b": y, "label": "tie"} for y in ("dog", "fox")]
    ties.append({"prompt": "q", "response_a": f"{long} a", "response_b": f"{long} b", "label": "tie"})

    def agreement(out, rows, ties, **cut):
        names = {"dataset_name": write_rows(tmp_path / "pairs.jsonl", rows)}
        names["ties"] = write_rows(tmp_path / "ties.jsonl", ties)
        flags = {"judges": (scorer_folder, "length"), "num_bootstrap": 20, "output_dir": str(tmp_path / out)}
        return judge_agreement.main(judge_agreement.Args(**names, **flags, **cut))

    without = agreement("a", rows, ties[:2])
    assert without["left_out"] == [] and without["ties"] == 2  # equal from the start stays
    capsys.readouterr()
    cut = {"max_length": 60, "truncate_prompts": True}
    report = agreement("b", [rows[0], equal, *rows[1:]], ties, **cut)
    assert report["judges"] == without["judges"] and report["left_out"] == [1, 7]
    assert (report["pairs"], report["ties"]) == (4, 2)
    assert "--max_length 60: 2 of 8 rows cut to equal sides, and left out" in capsys.readouterr().out
    with pytest.raises(InputError, match="--max_length 60: 1 of 3 rows cut to equal sides, and no pair is left"):
        agreement("c", [equal], ties[:2], **cut)


def test_a_judge_that_always_says_a_agrees_by_chance(labelled, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-not-a-real-key-0123456789")
    with JudgeServer(lambda text, n: verdict("A")) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        flags = {"judges": ("openai:small", "length"), "output_dir": str(tmp_path)}
        report = judge_agreement.main(judge_agreement.Args(**flags, dataset_name=labelled["dataset_name"]))
    always = report["judges"]["openai:small"]
    assert (always["accuracy"], always["kappa"], always["flips"]) == (50, 0, 100) and len(server.texts) == 8


def test_judge_agreement_names_what_is_wrong(labelled, tmp_path):
    fixed = {"judges": ("length",), "output_dir": str(tmp_path / "out")} | labelled
    bad = write_rows(
        tmp_path / "bad.jsonl",
        [{"prompt": "p", "response_a": "a", "response_b": "b", "label": "a"}],
    )
    for changes, said in (
        (
            {"label_by": ("people",)},
            r"--label_by people: no row has it; .* one of: gpt-4, human, human \(2 of 3\)",
        ),
        (
            {"label_by": ("human (2 of 3)",)},
            r"pairs.jsonl: holds no pair to judge; widen --label_by",
        ),
        ({"ties": bad}, r"bad.jsonl, line 1: field 'label' must be \"tie\", found 'a'"),
        ({"judges": ("length", "length")}, "--names: two of the judges have equal names"),
        (
            {"judges": ("nothing",)},
            "--judges nothing: expected module:function, openai:MODEL, hf:MODEL, length or a",
        ),
        ({"num_bootstrap": 0}, "--num_bootstrap"),
    ):
        with pytest.raises(InputError, match=said):
            judge_agreement.main(judge_agreement.Args(**fixed | changes))
    assert not (tmp_path / "out").exists()


def test_the_committed_table_is_whole():
    """docs/results holds aggregate numbers and no texts; "the longer answer wins" stands beside the
    scorers."""
    paths = sorted(Path(__file__).parents[1].glob("docs/results/judge_agreement_*.json"))
    assert paths
    for path in paths:
        report = json.loads(path.read_text())
        assert judge_agreement.table(report) == path.with_suffix(".md").read_text()
        assert {"length", "RM", "AM"} <= report["judges"].keys()
        for entry in report["judges"].values():
            pairs, correct = zip(
                *((t["pairs"], t["pairs"] * t["accuracy"]) for t in entry["tasks"].values()),
                strict=True,
            )
            assert sum(pairs) == report["pairs"] and sum(correct) / sum(pairs) == pytest.approx(entry["accuracy"])
