"""baselines/shaped_rewards.py: each shape by hand, what reaches PPO and what is logged, resume."""

from dataclasses import asdict

import pytest
import torch
from torch import tensor

from baselines import shaped_rewards
from baselines.shaped_rewards import bounded, contrastive, task_statistics
from tests import test_ppo_sr as sr
from tests.test_data import jsonl, refused

words, policy, scorer, data = sr.words, sr.policy, sr.scorer, sr.data  # fixtures

pytestmark = pytest.mark.usefixtures("one_thread")


def args_for(policy, scorer, data, out, **changes):
    args = asdict(sr.args_for(policy, data, out, reward_model_path=scorer))
    return shaped_rewards.Args(**args | {"num_reference_answers": 3} | changes)


def test_shapes_by_hand():
    """s(1) = .7310586, s(-1) = .2689414, s(3) = .9525741; the mean of 0 and 2 is 1."""
    scores, references = tensor([1.0, 3.0]), tensor([[0.0, 2.0], [0.0, 2.0]])
    assert bounded(scores, references).tolist() == pytest.approx([0.5, (0.9525741 + 0.7310586) / 2])
    assert contrastive(scores, references).tolist() == [0.0, 2.0]
    assert bounded(tensor([1e3, -1e3]), references).tolist() == [1.0, 0.0]
    # tasks b: 1, 3, 5, 7 (mean 4, squares 9 + 1 + 1 + 9, unbiased std sqrt(20/3)); c: 2, 2
    found = task_statistics(["b", "c", "b"], tensor([[1.0, 3.0], [2.0, 2.0], [5.0, 7.0]]))
    assert found["b"] == pytest.approx((4.0, (20 / 3) ** 0.5)) and found["c"] == pytest.approx((2.0, 1e-4))


@pytest.mark.parametrize("shape", ["bounded", "contrastive", "task", "length"])
def test_what_reaches_ppo_by_a_plain_loop(shape, policy, scorer, data, tmp_path, monkeypatch):
    seen, made = [], []
    advantages, init = shaped_rewards.ppo_sr.advantages, shaped_rewards.Shaped.__init__

    def spying(self, rollout):
        seen.append((rollout, advantages(self, rollout)))
        return seen[-1][1]

    monkeypatch.setattr(shaped_rewards.ppo_sr.PPO, "advantages", spying)
    monkeypatch.setattr(shaped_rewards.Shaped, "__init__", lambda self, args: made.append(self) or init(self, args))
    whole = shaped_rewards.Shaped.advantages
    before = []
    monkeypatch.setattr(shaped_rewards.Shaped, "advantages", lambda self, r: before.append(r) or whole(self, r))
    shaped_rewards.main(args_for(policy, scorer, data, tmp_path, shape=shape, length_coef=0.25))
    [ppo] = made
    for raw, (rollout, experience) in zip(before, seen, strict=True):
        for i, score in enumerate(raw.raw_scores.tolist()):
            if shape == "length":
                expected = score - 0.25 * len(raw.sequences[i][1])
            elif shape == "task":
                task = raw.rows[i]["task"]
                of_task = [x for x, row in zip(ppo.prompts, ppo.rows, strict=True) if row["task"] == task]
                all_scores = torch.cat([ppo.reference_scores[tuple(x)] for x in of_task])
                expected = (score - all_scores.mean().item()) / all_scores.std().item()
            else:
                known = ppo.reference_scores[tuple(raw.sequences[i][0])].tolist()
                assert len(known) == 3
                expected = score - sum(known) / 3
                if shape == "bounded":
                    expected = sum(1 / (1 + 2.718281828459045 ** (k - score)) for k in known) / 3
            assert rollout.raw_scores[i].item() == pytest.approx(expected, abs=1e-5)
            assert experience.scores[i].item() == pytest.approx(expected, abs=1e-5)
    rows = sr.lines_of(tmp_path / "metrics.jsonl")[1:]
    logged = [row["objective/scores"] for row in rows]
    assert logged == pytest.approx([raw.raw_scores.mean().item() for raw in before])  # the scorer's own
    assert (before[0].values.abs().max() == 0) == (shape != "length")  # V starts at 0


def test_resume(policy, scorer, data, tmp_path):
    flags = dict(eval_steps=1, save_steps=1)
    shaped_rewards.main(args_for(policy, scorer, data, tmp_path / "whole", total_steps=3, **flags))
    shaped_rewards.main(args_for(policy, scorer, data, tmp_path / "cut", total_steps=2, **flags))
    shaped_rewards.main(args_for(policy, scorer, data, tmp_path / "cut", total_steps=3, resume=True, **flags))
    assert sr.same_run(tmp_path / "whole", tmp_path / "cut") == (True, True, True)


def test_rows_without_a_task_are_refused(policy, scorer, data, tmp_path):
    rows = [{"prompt": row["prompt"]} for row in sr.lines_of(data["prompts"])]
    bare = jsonl(tmp_path / "bare.jsonl", *rows)
    with refused("--dataset_name", "task"):
        shaped_rewards.main(args_for(policy, scorer, data, tmp_path / "run", shape="task", dataset_name=bare))
