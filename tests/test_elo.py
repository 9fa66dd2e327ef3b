"""tools/elo.py: ratings by hand, by another fit, from folders of evaluate.py winrate."""

import json
import math
import random

import numpy as np
import pytest

from tests.test_data import jsonl, refused
from tools.elo import Args, main, ratings


def test_two_players_by_hand():
    """3 to 1, and the one tie more: 3.5 to 1.5. 400 log10(7 / 3) = 147.19, around 1000."""
    found = ratings([("a", "b", 1.0)] * 2 + [("b", "a", 0.0), ("a", "b", 0.0)])
    assert found["a"] - found["b"] == pytest.approx(400 * math.log10(7 / 3)) == pytest.approx(147.19, abs=0.01)
    assert found["a"] + found["b"] == pytest.approx(2000)
    assert math.isfinite(ratings([("a", "b", 1.0)])["a"])  # who never lost


def test_four_players_by_gradient_ascent():
    draw, truth, games = random.Random(1), {"a": 0.0, "b": 0.5, "c": -0.4, "d": 1.5}, []
    for _ in range(600):
        a, b = draw.sample(sorted(truth), 2)
        p = 1 / (1 + math.exp(truth[b] - truth[a]))
        games.append((a, b, 0.5 if draw.random() < 0.2 else float(draw.random() < p)))
    more = [(a, b, 0.5) for a in "abcd" for b in "abcd" if a < b]
    theta = dict.fromkeys(truth, 0.0)
    for _ in range(400):
        gradient = dict.fromkeys(truth, 0.0)
        for a, b, points in games + more:
            error = points - 1 / (1 + math.exp(theta[b] - theta[a]))
            gradient[a], gradient[b] = gradient[a] + error, gradient[b] - error
        theta = {k: v + 0.01 * gradient[k] for k, v in theta.items()}
    mean = np.mean([*theta.values()])
    for name, rating in ratings(games).items():
        assert rating == pytest.approx(1000 + 400 / math.log(10) * (theta[name] - mean), abs=0.01)
    assert ratings(games[::-1]) == pytest.approx(ratings(games))  # the order means nothing


def test_from_folders_and_files(tmp_path, capsys):
    for name, verdicts in (("good", ["win", "win", "tie"]), ("bad", ["lose", "lose", "tie"])):
        (tmp_path / name).mkdir()
        own = {"evaluate.py": {"args": {"policy": name, "reference": "sft"}, "judge": {"name": "length"}}}
        (tmp_path / name / "winrate.json").write_text(json.dumps(own))
        jsonl(tmp_path / name / "responses.jsonl", *({"verdict": v} for v in verdicts))
    (tmp_path / "more.json").write_text('[["other", "sft", "tie"]]')
    paths = tuple(str(tmp_path / name) for name in ("good", "bad", "more.json"))
    found = main(Args(games=paths, output_file=str(tmp_path / "elo.json")))
    assert json.loads((tmp_path / "elo.json").read_text()) == pytest.approx(found)
    assert next(iter(found)) == "good" and list(found)[-1] == "bad" and found["sft"] == pytest.approx(found["other"])
    assert capsys.readouterr().out.splitlines()[0].split() == [f"{found['good']:.0f}", "good"]
    own["evaluate.py"]["judge"]["name"] = "openai:x"
    (tmp_path / "bad" / "winrate.json").write_text(json.dumps(own))
    with refused("--games", "2 judges", "length", "openai:x"):
        main(Args(games=paths))


def test_games_without_ratings_are_refused(tmp_path):
    def refuse(text, *parts):
        (tmp_path / "g.json").write_text(text)
        with refused("--games", *parts):
            main(Args(games=(str(tmp_path / "g.json"),)))

    refuse('[["a", "b", "win"], ["c", "d", "win"]]', "no common scale")
    refuse('[["a", "a", "win"]]', "two names")
    refuse("[]", "two names")
    refuse('[["a", "b", "best"]]', "g.json", "no winrate folder")
    refuse('{"a": 1}', "g.json")
