"""tools/score.py: the score of every row, in order, with the row's own columns."""

import dataclasses
import json

import numpy as np
import pytest

import evaluate
from tests.test_data import jsonl, refused
from tools import judges, score
from tools.score import Args, main


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def by_evaluate(scorer, rows, fields):
    args = evaluate.Calibration(scorers=(), dataset_name="", output_dir="")
    return judges.Advantages(scorer, args, "rows")(rows, fields)


MESSAGES = [{"role": "user", "content": "the fox"}]
ANSWERS = [
    {"prompt": "over the lazy dog", "response": "jumps " * i, "task": "t", "mine": [i, None], "none": None}
    for i in (3, 1, 5, 1)
]
ANSWERS.append({"prompt": MESSAGES, "response": [{"role": "assistant", "content": "dog"}], "mine": {"a": 1}})


def test_rows_of_prompt_and_response(scorer_folder, tmp_path):
    data, out = jsonl(tmp_path / "a.jsonl", *ANSWERS), tmp_path / "new" / "scored.jsonl"
    evaluate.main(evaluate.Score(scorer=scorer_folder, dataset_name=data, output_dir=str(out.parent)))
    scored = rows_of(out)
    plain = [*ANSWERS[:4], ANSWERS[4] | {"response": "dog"}]
    (expected,) = by_evaluate(scorer_folder, plain, ("response",))
    assert [row.pop("score") for row in scored] == pytest.approx(expected.tolist(), abs=1e-5)
    assert scored == ANSWERS and expected[1] == expected[3] and len({*expected}) == 4


def test_evaluate_shows_the_flags_that_are_read():
    names = [{field.name for field in dataclasses.fields(kind)} for kind in (evaluate.Score, Args)]
    assert names[0] == names[1] - {"fields"}


def test_pairs_and_other_columns(scorer_folder, tmp_path):
    pairs = [{"prompt": f"p{i}", "chosen": "fox", "rejected": "dog " * i, "score_chosen": 7} for i in range(4)]
    main(Args(scorer_folder, jsonl(tmp_path / "a.jsonl", *pairs), str(tmp_path / "pairs")))
    scored, expected = (
        rows_of(tmp_path / "pairs" / "scored.jsonl"),
        by_evaluate(scorer_folder, pairs, ("chosen", "rejected")),
    )
    for side, values in zip(("chosen", "rejected"), expected, strict=True):
        assert [row.pop(f"{side}_score") for row in scored] == pytest.approx(values.tolist(), abs=1e-5)
    assert scored == pairs
    both = [{"prompt": "p", "response": "fox", "reference": "dog"}]
    flags = {"fields": ("response", "reference")}
    main(Args(scorer_folder, jsonl(tmp_path / "b.jsonl", *both), str(tmp_path / "both"), **flags))
    assert list(rows_of(tmp_path / "both" / "scored.jsonl")[0]) == [
        "prompt",
        "response",
        "reference",
        "score",
        "reference_score",
    ]


def test_what_is_there_is_kept_and_what_is_wrong_is_named(scorer_folder, tmp_path, monkeypatch):
    data, out = jsonl(tmp_path / "a.jsonl", *ANSWERS), tmp_path / "scored.jsonl"
    out.write_text("mine")
    with refused(out, "give another --output_dir, or remove it"):
        main(Args(scorer_folder, data, str(out.parent)))
    assert out.read_text() == "mine"
    out.unlink()
    for row, *said in (
        ({"prompt": "p", "response": "x", "score": 1.0}, "b.jsonl, line 2", "has a 'score' already"),
        ({"prompt": "p", "chosen": "x"}, "b.jsonl, line 2", "field 'response'"),
        ({"prompt": "dog " * 600, "response": "x"}, "b.jsonl, line 2", "--max_length"),
    ):
        with refused(*said):
            main(Args(scorer_folder, jsonl(tmp_path / "b.jsonl", ANSWERS[0], row), str(out.parent)))
        assert not out.exists()
    monkeypatch.setattr(score, "Advantages", lambda *args: lambda rows, fields: np.full((1, len(rows)), np.nan))
    with refused("--scorer", "5 of 5 scores are no numbers"):
        main(Args(scorer_folder, data, str(out.parent)))
