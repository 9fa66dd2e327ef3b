"""What evaluate.py does not lose, mistake or overwrite, and how much memory it takes."""

import json
import shutil
import tracemalloc

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

import evaluate
from plumbing.command_line import check_flags
from tests.conftest import gpt2_config
from tests.test_data import jsonl, refused
from tools import answers, compare, judge_agreement, judges, reward_card, statistics
from tools.statistics import load_calibration


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture
def winrate(policy_folder, tmp_path):
    """Runs `evaluate.py winrate` in tmp_path/out -> winrate.json, rows."""

    def run(*names, out="out", **changes):
        two = {"policy": policy_folder, "reference": policy_folder, "dataset_names": names}
        fixed = {"judge": "length", "response_length": 6, "num_bootstrap": 20}
        two = {} if "responses" in changes else two
        evaluate.main(evaluate.Winrate(output_dir=str(tmp_path / out), **fixed | two | changes))
        return read(tmp_path / out / "winrate.json"), rows_of(tmp_path / out / "responses.jsonl")

    return run


@pytest.fixture
def prompts(tmp_path):
    return jsonl(tmp_path / "main.jsonl", *({"prompt": f"the fox {i}", "task": f"t{i % 2}"} for i in range(6)))


# --- names of sets --------------------------------------------------------------------------------


def test_every_set_has_its_numbers_whatever_its_file_is_called(winrate, tmp_path):
    names = ["machine", "judge", "scorers", "commit", "versions", "args", "evaluate", "tools"]
    files = [jsonl(tmp_path / f"{name}.jsonl", {"prompt": f"{name} a"}, {"prompt": "b"}) for name in names]
    report, rows = winrate(*files)
    for name in names:
        assert report[name]["prompts"] == 2 and "win" in report[name]
    assert report.keys() - {*names} == {"evaluate.py"} and len(rows) == 16
    own = report["evaluate.py"]
    assert own["judge"] == {"name": "length"} and own["args"]["judge"] == "length"
    said = answers.main(answers.Args(str(tmp_path / "out"), num_bootstrap=20))
    assert all("diversity" in said[name] for name in names)
    assert said.keys() - {*names} == {"tools.answers"} and "versions" in said["tools.answers"]


def test_a_set_is_called_as_its_file_and_stored_answers_keep_their_sets(winrate, tmp_path):
    """Prompts may be the answers of an earlier run, which had sets of its own."""
    rows = [{"prompt": f"p{i}", "set": "old", "response": "x", "reference": "y"} for i in range(2)]
    one, two = (jsonl(tmp_path / f"{name}.jsonl", *rows) for name in ("one", "two"))
    assert winrate(one, two)[0].keys() == {"one", "two", "evaluate.py"}
    assert winrate(responses=one, out="b")[0].keys() == {"old", "evaluate.py"}
    for wrong in ("evaluate.py", 3, ["a"]):
        with refused("field 'set'", "evaluate.py"):
            winrate(responses=jsonl(tmp_path / "wrong.jsonl", rows[0] | {"set": wrong}), out="c")


# --- nothing is lost ------------------------------------------------------------------------------


def test_answers_are_on_disk_before_the_next_model_is_loaded(winrate, prompts, tmp_path, monkeypatch):
    load, seen = evaluate.load_policy, []

    def load_policy(path, frozen):
        file = tmp_path / "out" / "responses.jsonl"
        seen.append([sorted(row) for row in rows_of(file)] if file.exists() else [])
        if len(seen) == 3:  # the first time both are tried
            raise MemoryError
        return load(path, frozen)

    monkeypatch.setattr(evaluate, "load_policy", load_policy)
    with pytest.raises(MemoryError):
        winrate(prompts)
    assert seen[:2] == [[], []] and len(seen[2]) == 6 and all("response" in row for row in seen[2])


def test_answers_whose_log_probs_are_not_there_can_be_judged(winrate, prompts, tmp_path, monkeypatch):
    """The run ends before the reference's log-probs."""
    forward, seen = evaluate.forward_batches, []

    def forward_batches(*args):
        seen.append(args)
        if len(seen) == 2:
            raise MemoryError
        return forward(*args)

    monkeypatch.setattr(evaluate, "forward_batches", forward_batches)
    with pytest.raises(MemoryError):
        winrate(prompts)
    report, rows = winrate(responses=str(tmp_path / "out" / "responses.jsonl"), out="judged")
    assert report["main"]["prompts"] == 6 and "kl" not in report["main"] and "logprob" in rows[0]


@pytest.fixture
def short_policy(tokenizer, tmp_path):
    """A policy of eight positions."""
    AutoModelForCausalLM.from_config(gpt2_config(tokenizer, n_positions=8)).save_pretrained(tmp_path / "short")
    tokenizer.save_pretrained(tmp_path / "short")
    return str(tmp_path / "short")


def test_a_reference_that_cannot_answer_is_refused_before_the_policy_answers(
    winrate, prompts, scorer_folder, short_policy, tmp_path, monkeypatch
):
    monkeypatch.setattr(evaluate, "generate", None)
    for reference, said in (
        ("nowhere", "nowhere"),
        (scorer_folder, "no language-model head"),
        (short_policy, "8 positions"),
    ):
        with refused(said):
            winrate(prompts, reference=reference)
    with refused("no language-model head"):
        winrate(prompts, judge=f"hf:{scorer_folder}")
    assert not (tmp_path / "out").exists()


def test_verdicts_are_on_disk_before_their_statistics(winrate, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "summarise", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        winrate(prompts)
    assert {row["verdict"] for row in rows_of(tmp_path / "out" / "responses.jsonl")} <= {"win", "lose", "tie"}


PAIRS = [{"prompt": f"p{i}", "chosen": "the dog", "rejected": f"fox {i}", "task": f"t{i % 2}"} for i in range(6)]


@pytest.fixture
def calibration(scorer_folder, tmp_path):
    def run(*rows, out="calibration", **changes):
        data = jsonl(tmp_path / "pairs.jsonl", *rows)
        args = {"scorers": (scorer_folder,), "names": ("rm",), "dataset_name": data, "num_bootstrap": 20}
        return evaluate.main(evaluate.Calibration(output_dir=str(tmp_path / out), **args | changes))

    return run


def only_once(function):
    """The function, and a MemoryError in the place of its second call."""
    calls = []

    def once(*args):
        calls.append(args)
        if len(calls) > 1:
            raise MemoryError
        return function(*args)

    return once


def test_scores_are_on_disk_before_the_next_scorer_and_the_statistics(
    calibration, scorer_folder, policy_folder, tmp_path, monkeypatch
):
    scores, two = tmp_path / "calibration" / "scores.jsonl", {"names": ("rm", "none")}
    with monkeypatch.context() as patch, refused("no reward head"):
        patch.setattr(judges, "score_texts", None)  # before the first one scores
        calibration(*PAIRS, scorers=(scorer_folder, policy_folder), **two)
    assert not scores.exists()
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(judges, "score_texts", only_once(judges.score_texts))
        calibration(*PAIRS, scorers=(scorer_folder, scorer_folder), **two)
    assert [len(row["chosen"]) for row in rows_of(scores)] == [6]
    monkeypatch.setattr(evaluate, "ranking_metrics", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        calibration(*PAIRS[:5])
    assert [len(row["chosen"]) for row in rows_of(scores)] == [5]


def test_scores_of_other_tools_are_on_disk_before_their_statistics(
    winrate, prompts, scorer_folder, policy_folder, tmp_path, monkeypatch
):
    winrate(prompts)
    with monkeypatch.context() as patch, refused("no reward head"):
        patch.setattr(judges, "score_texts", None)
        answers.main(answers.Args(str(tmp_path / "out"), (scorer_folder, policy_folder), num_bootstrap=20))
    other = shutil.copytree(scorer_folder, tmp_path / "other")
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(judges, "score_texts", only_once(judges.score_texts))
        answers.main(answers.Args(str(tmp_path / "out"), (scorer_folder, str(other)), num_bootstrap=20))
    (scored,) = rows_of(tmp_path / "out" / "scorers.jsonl")
    assert len(scored["response"]) == len(scored["reference"]) == 6
    pairs = jsonl(tmp_path / "pairs.jsonl", *PAIRS)
    flags = {"judges": ("length", "tests.test_judges:nan"), "dataset_name": pairs, "num_bootstrap": 20}
    with refused("--judge tests.test_judges:nan"):
        judge_agreement.main(judge_agreement.Args(output_dir=str(tmp_path / "judges"), **flags))
    (said,) = rows_of(tmp_path / "judges" / "verdicts.jsonl")
    assert said == {"judge": "length", "points": [1.0] * 6}


def test_numbers_that_give_no_result_are_refused_at_the_start(winrate, prompts, tmp_path):
    for flag, value in (("response_length", 0), ("num_bootstrap", 0), ("temperature", float("inf"))):
        with refused(f"--{flag}"):
            check_flags(evaluate.Winrate(output_dir="x", judge="length", **{flag: value}))
    assert not (tmp_path / "out").exists()


def test_a_scorer_without_spread_gives_numbers(calibration, scorer_folder, monkeypatch):
    """All scores equal: no separation, which is 0 and not 0 / 0."""
    same = lambda rows, fields: np.full((len(fields), len(rows)), 2.0)  # noqa: E731
    same.equal, same.encode = np.zeros(len(PAIRS), bool), same
    monkeypatch.setattr(judges, "Advantages", lambda *args: same)
    report = calibration(*PAIRS, scorers=(scorer_folder, scorer_folder), names=("a", "b"))
    assert report["paired"]["b - a"]["separation"] == {"difference": 0, "low": 0, "high": 0}


def test_scores_that_are_no_numbers_are_refused(calibration, tmp_path, monkeypatch):
    nothing = lambda rows, fields: np.full((len(fields), len(rows)), np.nan)  # noqa: E731
    nothing.equal = np.zeros(len(PAIRS), bool)
    monkeypatch.setattr(judges, "Advantages", lambda *args: nothing)
    with refused("--scorers", "no numbers"):
        calibration(*PAIRS)
    assert not (tmp_path / "calibration" / "calibration.json").exists()


def test_scores_of_a_calibration_that_was_stopped_are_not_taken_for_a_finished_one(
    calibration, scorer_folder, tmp_path
):
    calibration(*PAIRS, scorers=(scorer_folder, scorer_folder), names=("a", "b"))
    scores = tmp_path / "calibration" / "scores.jsonl"
    scores.write_text(scores.read_text().split("\n")[0] + "\n")
    with refused("scores.jsonl: not the scores of calibration.json", "run evaluate.py calibration again"):
        load_calibration(tmp_path / "calibration")


# --- columns of an earlier run --------------------------------------------------------------------


def test_log_probs_count_for_the_text_that_they_were_computed_for(winrate, prompts, tmp_path, capsys):
    report, rows = winrate(prompts)
    assert {"kl", "perplexity_ref"} <= report["main"].keys()
    again, _ = winrate(responses=str(tmp_path / "out" / "responses.jsonl"), out="again")
    assert again["main"] == report["main"]  # the same answers, another judge
    other = dict(rows[2], response="an answer of somebody else's")
    unknown = {k: v for k, v in rows[2].items() if k != "logprobs_of"}
    for wrong in (other, unknown, dict(rows[2], prompt="another")):
        stored = jsonl(tmp_path / "stored.jsonl", *rows[:2], wrong, *rows[3:])
        capsys.readouterr()
        report, _ = winrate(responses=stored, out="stale")
        assert not {"kl", "perplexity_ref"} & report["main"].keys()
        assert "log-probs of other texts" in capsys.readouterr().out
    assert winrate(responses=jsonl(tmp_path / "x.jsonl", unknown, other), out="x")[0]["main"]["prompts"] == 2


def test_prompts_that_were_answered_before_start_anew(winrate, prompts, tmp_path):
    """Greedy answers have no KL: none is left from the sampled ones of before."""
    _, rows = winrate(prompts)
    judged = [row | {"judgements": [], "score": 1.0, "reference_score": 2.0} for row in rows]
    before = jsonl(tmp_path / "before.jsonl", *judged)
    report, rows = winrate(before, out="greedy", temperature=0.0)
    assert "kl" not in report["before"] and "perplexity_ref" in report["before"]
    assert not {"logprob", "judgements"} & rows[0].keys()
    assert [row["score"] for row in rows] == [len(row["response"]) for row in rows]
    assert rows[0]["task"] == "t0" and rows[0]["set"] == "before"


# --- pairs without a preference -------------------------------------------------------------------


def test_pairs_with_equal_sides_are_left_out_and_counted(calibration, tmp_path, capsys):
    equal = {"prompt": "p", "chosen": "times", "rejected": "times"}
    message = equal | {"chosen": [{"role": "assistant", "content": "times"}]}
    without = calibration(*PAIRS)["scorers"]["rm"]
    report = calibration(equal, *PAIRS, message)
    assert report["pairs"] == 6 and report["scorers"]["rm"] == without
    assert "pairs.jsonl: 2 of 8 pairs have equal sides, and are left out" in capsys.readouterr().out
    _, scores, rows = load_calibration(tmp_path / "calibration")
    assert scores["rm"].shape == (2, 6) and [row["rejected"] for row in rows] == [row["rejected"] for row in PAIRS]
    with refused("pairs.jsonl: 1 of 1 pairs have equal sides"):
        calibration(equal, out="equal")
    long = {"prompt": "the quick fox " * 90, "chosen": "a", "rejected": "b"}
    with refused("pairs.jsonl, line 3", "tokens"):  # of the file
        calibration(equal, PAIRS[0], long, out="long", max_length=100)

    pairs = jsonl(tmp_path / "labelled.jsonl", equal, *PAIRS)
    flags = {"judges": ("length",), "dataset_name": pairs, "num_bootstrap": 20}
    agreement = judge_agreement.main(judge_agreement.Args(output_dir=str(tmp_path / "judges"), **flags))
    assert agreement["pairs"] == 6 and agreement["judges"]["length"]["accuracy"] == 100
    assert "labelled.jsonl: 1 of 7 pairs have equal sides" in capsys.readouterr().out


# --- scores of any program ------------------------------------------------------------------------


def scored_by(scorer_folder, tmp_path, *rows):
    """scored.jsonl of `evaluate.py score`, its path and its rows."""
    data = jsonl(tmp_path / "pairs.jsonl", *rows)
    evaluate.main(evaluate.Score(scorer=scorer_folder, dataset_name=data, output_dir=str(tmp_path / "rm")))
    return str(tmp_path / "rm" / "scored.jsonl"), rows_of(tmp_path / "rm" / "scored.jsonl")


def test_a_file_of_scores_in_the_place_of_a_scorer(calibration, scorer_folder, tmp_path):
    """The same numbers as from the scorer itself; messages, equal sides and a card among them."""
    turn = [{"role": "user", "content": "the fox"}]
    sides = {side: [*turn, {"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    rows = [*PAIRS, sides, {"prompt": "p", "chosen": "dog", "rejected": "dog"}]
    scored, _ = scored_by(scorer_folder, tmp_path, *rows)
    report = calibration(*rows, scorers=(scored, scorer_folder), names=("file", "rm"))
    one, other = report["scorers"].values()
    assert one == other and one["nll"] > 0 and report["pairs"] == 7 and report["left_out"] == [7]
    for name, metric in report["paired"]["rm - file"].items():
        assert metric == {"difference": 0, "low": 0, "high": 0}, name
    alone = calibration(*rows, scorers=(scored,), names=(), out="alone")
    assert alone["scorers"] == {"rm": one}, "the run folder's name"
    reward_card.main(reward_card.Args(str(tmp_path / "alone")))
    assert {path.name for path in (tmp_path / "alone").iterdir()} == {"calibration.json", "scores.jsonl"}


def test_a_file_of_scores_says_which_side_is_which(calibration, tmp_path):
    """Chosen better by 2 in five pairs, worse by 2 in one: not the other way round."""
    scores = [{"chosen_score": 3, "rejected_score": 1.0}] * 5 + [{"chosen_score": -1, "rejected_score": 1}]
    file = jsonl(tmp_path / "scored.jsonl", *(row | two for row, two in zip(PAIRS, scores, strict=True)))
    report = calibration(*PAIRS, scorers=(file,))
    assert report["scorers"]["rm"]["accuracy"] == pytest.approx(500 / 6)
    (line,) = rows_of(tmp_path / "calibration" / "scores.jsonl")
    assert line == {"scorer": "rm", "chosen": [3, 3, 3, 3, 3, -1], "rejected": [1] * 6}


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda rows: rows[:5], ("holds 5 rows", "pairs.jsonl 6", "score that file again")),
        (lambda rows: [rows[1], rows[0], *rows[2:]], ("line 1", "'prompt'", "pairs.jsonl, line 1")),
        (lambda rows: [*rows[:2], rows[2] | {"rejected": "dog"}, *rows[3:]], ("line 3", "'rejected'")),
        (lambda rows: [*rows[:5], rows[5] | {"chosen_score": "1"}], ("line 6", "'chosen_score'", "number")),
        (lambda rows: [*rows[:5], rows[5] | {"chosen_score": True}], ("line 6", "'chosen_score'", "number")),
        (lambda rows: [*rows[:5], rows[5] | {"rejected_score": None}], ("line 6", "'rejected_score'")),
        (lambda rows: [*rows[:5], rows[5] | {"rejected_score": float("nan")}], ("line 6", "'rejected_score'")),
        (lambda rows: [*rows[:5], rows[5] | {"chosen_score": 10**400}], ("line 6", "'chosen_score'")),
        (lambda rows: [], ("no rows",)),
    ],
)
def test_scores_of_other_pairs_or_none_are_refused(change, said, calibration, scorer_folder, tmp_path, monkeypatch):
    """Before the scorer beside them reads a text."""
    rows = [row | {"chosen_score": 1.0, "rejected_score": 0.5} for row in PAIRS]
    file = jsonl(tmp_path / "scored.jsonl", *change(rows))
    monkeypatch.setattr(judges, "score_texts", None)
    with refused(file, *said):
        calibration(*PAIRS, scorers=(scorer_folder, file), names=("rm", "file"))
    with refused(tmp_path / "none.jsonl"):
        calibration(*PAIRS, scorers=(str(tmp_path / "none.jsonl"),))
    assert not (tmp_path / "calibration").exists()


# --- finished results -----------------------------------------------------------------------------


def test_the_result_of_another_command_is_not_overwritten(winrate, calibration, prompts, tmp_path):
    report, _ = winrate(prompts)
    kept = (tmp_path / "out" / "winrate.json").read_bytes()
    for unknown in ("[]", "{", '{"judge": {"name": "length"}}'):
        (tmp_path / "out" / "winrate.json").write_text(unknown)
        with refused("winrate.json: no result of this version; remove it"):
            winrate(prompts)
    (tmp_path / "out" / "winrate.json").write_bytes(kept)
    ways = "give another --output_dir, or remove it"
    for changes, flag in (
        ({"judge": "tests.test_judges:length"}, "judge"),
        ({"temperature": 0.5}, "temperature"),
        ({"responses": str(tmp_path / "out" / "responses.jsonl")}, "policy"),
    ):
        with refused(f"winrate.json: the result of another --{flag}", ways):
            winrate(prompts, **changes)
    assert (tmp_path / "out" / "winrate.json").read_bytes() == kept
    assert winrate(prompts)[0] == report  # the same command may

    calibration(*PAIRS)
    with refused("calibration.json: the result of another --names", ways):
        calibration(*PAIRS, names=("other",))
    calibration(*PAIRS)
    folder = str(tmp_path / "out")
    for main, args, other in (
        (compare.main, compare.Args((folder, folder), str(tmp_path / "c"), ("a", "b")), {"seed": 2}),
        (answers.main, answers.Args(folder, num_bootstrap=20), {"seed": 2}),
    ):
        main(args)
        main(args)
        with refused("the result of another --seed", ways):
            main(type(args)(**vars(args) | other))


def test_answers_that_a_failed_judge_leaves_are_not_overwritten(winrate, prompts, tmp_path, monkeypatch):
    answered, failing = tmp_path / "out" / "responses.jsonl", "tests.test_evaluate:fails_on_two"
    with refused("--judge", f"--responses {answered} judges the same answers, and samples none"):
        winrate(prompts, judge=failing)
    kept, ways = answered.read_bytes(), f"--responses {answered} judges them; take another folder, or remove them"
    for changes, said in (
        ({"temperature": 0.5}, "holds answers of another --temperature"),
        ({"seed": 2}, "holds answers of another --seed"),
        ({"responses": jsonl(tmp_path / "x.jsonl", *rows_of(answered)[:1])}, "of another --responses"),
    ):
        with refused(f"--output_dir {tmp_path / 'out'}: ", said, ways):
            winrate(prompts, **changes)
    assert answered.read_bytes() == kept
    with refused("--judge"):
        winrate(prompts, judge=failing, tie_band=0.2)  # the same answers
    assert answered.read_bytes() == kept
    with pytest.raises(evaluate.InputError, match=r"\(no room\)$"):  # they are there already
        winrate(responses=str(answered), judge=failing)
    monkeypatch.setattr(evaluate, "generate_answers", None)
    again, rows = winrate(responses=str(answered))  # in their own folder
    monkeypatch.undo()
    assert again["main"]["prompts"] == 6 and [row["response"] for row in rows] == [
        json.loads(line)["response"] for line in kept.decode().splitlines()
    ]
    (tmp_path / "out" / "winrate.json").unlink()
    with refused("of another --seed"):  # they are still those of the policies
        winrate(prompts, seed=2)
    (tmp_path / "out" / "made_by.json").unlink()
    with refused("holds answers of unknown flags", ways):
        winrate(prompts)
    answered.unlink()
    winrate(prompts, seed=2)


def fails_on_two(prompts, responses):
    """A judge that can judge one prompt alone, the one it is tried on."""
    if len(prompts) > 1:
        raise MemoryError("no room")
    return [0.0]


# --- memory ---------------------------------------------------------------------------------------


def test_memory_follows_the_text_that_is_there():
    """6,000 rows, one of 200,000 characters: an array of such texts would take 4.8 GB."""
    prompts = [f"question {i}" for i in range(3000)] * 2
    prompts[7] = prompts[3007] = "x y z " * 33_333
    verdicts = np.random.default_rng(0).choice(evaluate.VERDICTS, 6000)
    rows = [
        {"prompt": x, "task": x[:100_000], "set": "main", "verdict": str(v), "response": "a", "reference": "bc"}
        for x, v in zip(prompts, verdicts, strict=True)
    ]
    for row in rows:
        row["task"] = row["prompt"] if len(row["prompt"]) > 100 else "t"
    args, scores = answers.Args("", num_bootstrap=10), np.random.default_rng(0).normal(size=(2, 6000))
    tracemalloc.start()
    rng = np.random.default_rng(0)
    found = evaluate.summarise(rows, args, rng)
    evaluate.paired_intervals({"a": scores, "b": -scores}, prompts, 10, rng)
    evaluate.score_balance(scores[0], statistics.column(row["task"] for row in rows))
    answers.describe(rows, {}, args, rng)
    answers.score_deltas(scores, rows, args)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6 and found["tasks"]["t"]["prompts"] == 5998


def test_numbered_is_the_inverse_of_np_unique():
    for values in (["b", "a", "b", "ä", ""], np.arange(4)[::-1], [""]):
        index, count = evaluate.numbered(values)
        groups, expected = np.unique(values, return_inverse=True)
        assert index.tolist() == expected.tolist() and count == len(groups)
