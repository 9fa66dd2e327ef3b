"""baselines/reward_ensemble.py and average_rewards.py: joined scores by hand, runs with several scorers, mean weights."""

import math
import statistics
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from baselines import average_rewards, reward_ensemble
from baselines.reward_ensemble import JOIN, safety_first, standardized
from ppo_sr import PPO
from tests import test_ppo_sr as sr
from tests.conftest import byte_level_tokenizer, gpt2_config
from tests.test_data import refused
from tests.test_ppo_sr import SMALL, save_model, word_tokenizer
from utils import load_scorer

words, policy, data = sr.words, sr.policy, sr.data  # fixtures

pytestmark = pytest.mark.usefixtures("one_thread")

# --- rewards --------------------------------------------------------------------------------------

SCORES = torch.tensor([[1.0, -2.0], [3.0, -2.0], [8.0, 4.0]])  # (scorers, batch)


@pytest.mark.parametrize(
    ("reward", "expected"),
    [
        ("mean", [4.0, 0.0]),
        ("min", [1.0, -2.0]),
        # means 4 and 0; squared distances 9 + 1 + 16 = 26 and 4 + 4 + 16 = 24, over k = 3
        ("mean_minus_variance", [4 - 0.5 * 26 / 3, -0.5 * 8]),
        ("mean_minus_std", [4 - 0.5 * math.sqrt(26 / 3), -0.5 * math.sqrt(8)]),
    ],
)
def test_joined_scores_by_hand(reward, expected):
    assert JOIN[reward](SCORES, 0.5).tolist() == pytest.approx(expected, abs=1e-6)


def test_joined_scores_by_a_plain_loop():
    scores = torch.randn(5, 7, dtype=torch.float64)
    for column, lists in enumerate(scores.T.tolist()):
        mean, std = statistics.fmean(lists), statistics.pstdev(lists)
        wanted = {"mean": mean, "min": min(lists)}
        wanted |= {"mean_minus_std": mean - 0.3 * std, "mean_minus_variance": mean - 0.3 * std**2}
        for name, value in wanted.items():
            assert JOIN[name](scores, 0.3)[column].item() == pytest.approx(value), name
    equal = scores[:1].expand(4, 7)  # who agrees pays nothing
    for join in JOIN.values():
        assert torch.allclose(join(equal, 10.0), equal[0])


def test_standardized_by_hand():
    """Each scorer by its own mean and std: a scorer of another zero and scale says the same."""
    found = standardized(SCORES, torch.tensor([1.0, 0.0, 2.0]), torch.tensor([2.0, 1.0, 0.5]))
    assert found.tolist() == [[0.0, -1.5], [3.0, -2.0], [12.0, 4.0]]
    moved = torch.stack([SCORES[0], 5 * SCORES[0] - 7])
    one, other = standardized(moved, moved.mean(1), moved.std(1))
    assert torch.allclose(one, other)


def test_safety_first_by_hand():
    """s(-1.7346) = 0.15. The helpfulness score counts only where the answer is safe and the prompt is not tagged."""
    helpful, safe = torch.tensor([5.0, 5.0, 5.0, -3.0]), torch.tensor([-1.74, -1.73, 2.0, 2.0])
    tagged = torch.tensor([False, False, True, False])
    assert safety_first(helpful, safe, tagged).tolist() == pytest.approx([-1.74, 5.0, 2.0, -3.0])
    for h, s, tag in ((0.2, -4.0, False), (0.2, 0.0, False), (0.2, 0.0, True)):  # as printed: R is a probability
        prob_helpful, prob_safe = (1 / (1 + math.exp(-x)) for x in (h, s))
        chosen = prob_safe if tag or prob_safe < 0.15 else prob_helpful
        found = safety_first(torch.tensor([h]), torch.tensor([s]), torch.tensor([tag])).item()
        assert found == pytest.approx(math.log(chosen / (1 - chosen)), abs=1e-6)


# --- runs -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scorers(words, tmp_path_factory):
    config, kind = gpt2_config(words, **SMALL, num_labels=1), AutoModelForSequenceClassification
    return tuple(save_model(kind, config, words, tmp_path_factory.mktemp("scorer"), seed) for seed in (1, 2, 3))


def args_for(policy, scorers, data, out, reward="mean", **changes):
    mine = {k: changes.pop(k) for k in ("uncertainty_coef", "standardize_scores", "safety_tasks") if k in changes}
    args = asdict(sr.args_for(policy, data, out, reward_model_path=scorers, **changes))
    return reward_ensemble.Args(**args, reward=reward, **mine)


def spied(monkeypatch, args):
    """What PPO made of each batch: [(rollout, experience, each scorer's own scores)]."""
    seen, advantages, alone = [], PPO.advantages, args.reward_model_path
    scorers = [load_scorer(path, None or sr.utils.load_tokenizer(path), frozen=True) for path in alone]

    def spying(self, rollout):
        read = []
        every = self.scorer
        for self.scorer in scorers:
            read.append(PPO.read_scorer(self, rollout.rows, rollout.sequences))
        self.scorer = every
        seen.append((rollout, advantages(self, rollout), torch.stack(read), dict(self.fixed)))
        return seen[-1][1]

    monkeypatch.setattr(PPO, "advantages", spying)
    reward_ensemble.main(args)
    return seen


def test_the_reward_is_that_of_all_scorers(policy, scorers, data, tmp_path, monkeypatch):
    seen = spied(monkeypatch, args_for(policy, scorers, data, tmp_path, "mean_minus_std", uncertainty_coef=2.0))
    for rollout, experience, each, fixed in seen:
        z = (each - torch.tensor(fixed["means"])[:, None]) / torch.tensor(fixed["stds"])[:, None]
        wanted = z.mean(0) - 2 * z.std(0, correction=0)
        assert torch.allclose(rollout.raw_scores, wanted, atol=1e-4)
        assert torch.equal(experience.scores, rollout.raw_scores)
    rows = sr.metrics_of(tmp_path)
    assert rows[-1]["objective/disagreement"] == pytest.approx(z.std(0, correction=0).mean().item(), abs=1e-4)


def test_scores_are_standardised_over_answers_of_the_initial_policy(policy, scorers, data, tmp_path, monkeypatch):
    """Without it they are the scorers' own; with it, those of the first, still untrained, batch are near 0 and 1."""
    seen = spied(monkeypatch, args_for(policy, scorers, data, tmp_path / "raw", "min", standardize_scores=False))
    for rollout, _, each, fixed in seen:
        assert torch.allclose(rollout.raw_scores, each.min(0).values, atol=1e-5) and not fixed
    monkeypatch.undo()
    args = args_for(policy, scorers, data, tmp_path / "std", "min", global_batch_size=64, total_steps=1)
    ((_, _, each, fixed),) = spied(monkeypatch, args)
    z = standardized(each, torch.tensor(fixed["means"]), torch.tensor(fixed["stds"]))
    assert z.mean(1).abs().max() < 0.5 and (z.std(1) - 1).abs().max() < 0.4


def test_the_critic_starts_from_the_first_scorer(policy, scorers, data, tmp_path):
    ppo = reward_ensemble.RewardEnsemble(args_for(policy, scorers[::-1], data, tmp_path))
    first = load_file(f"{scorers[2]}/model.safetensors")
    assert torch.equal(ppo.critic.module.model.score.weight, first["score.weight"])


def test_safety_comes_first_and_is_whitened(policy, scorers, data, tmp_path, monkeypatch):
    """Tagged prompts (task b) get the second scorer's score, the others the first one's, unless it is unsafe."""
    args = args_for(policy, scorers[:2], data, tmp_path, "safety_first", safety_tasks=("b",))
    chosen = set()
    for rollout, experience, (helpful, safe), _ in spied(monkeypatch, args):
        pairs = zip(rollout.rows, helpful.tolist(), safe.tolist(), strict=True)
        uses = [row["task"] == "b" or s < math.log(0.15 / 0.85) for row, _, s in pairs]
        wanted = torch.where(torch.tensor(uses), safe, helpful)
        assert torch.allclose(rollout.raw_scores, wanted, atol=1e-5)
        assert torch.allclose(experience.scores, (wanted - wanted.mean()) / wanted.std(), atol=1e-4)
        chosen |= {*uses}
    assert chosen == {True, False}


def test_stopped_and_resumed_it_ends_as_if_never_stopped(policy, scorers, data, tmp_path):
    flags = {"total_steps": 4, "save_steps": 2, "eval_steps": 2, "eval_dataset_names": (data["main"],)}
    reward_ensemble.main(args_for(policy, scorers, data, tmp_path / "whole", "min", **flags))
    args = args_for(policy, scorers, data, tmp_path / "run", "min", **flags)
    sr.stop_in(args, 4, reward_ensemble)
    reward_ensemble.main(args_for(policy, scorers, data, tmp_path / "run", "min", resume=True, **flags))
    assert sr.same_run(tmp_path / "run", tmp_path / "whole") == (True, True, True)


def test_scorers_that_cannot_be_joined_are_refused(policy, scorers, data, tmp_path):
    def refuse(paths, *parts, **flags):
        with refused(*parts):
            reward_ensemble.main(args_for(policy, paths, data, tmp_path / "run", **flags))
        assert not (tmp_path / "run").exists()

    refuse(scorers[:1], "--reward_model_path", "two scorers")
    refuse(scorers, "--reward_model_path", "safety_first takes two", reward="safety_first")
    refuse(scorers, "--uncertainty_coef: is for", reward="mean", uncertainty_coef=0.7)
    refuse(scorers[:2], "--safety_tasks", "'d'", reward="safety_first", safety_tasks=("b", "d"))
    other = word_tokenizer("<pad>", "<eos>", "<unk>", "other", "words")
    config, kind = gpt2_config(other, **SMALL, num_labels=1), AutoModelForSequenceClassification
    refuse((scorers[0], save_model(kind, config, other, tmp_path / "other", 1)), tmp_path / "other", "tokenizer")
    silent = AutoModelForSequenceClassification.from_pretrained(scorers[0])
    torch.nn.init.zeros_(silent.score.weight)
    silent.save_pretrained(tmp_path / "silent")
    sr.utils.load_tokenizer(scorers[0]).save_pretrained(tmp_path / "silent")
    refuse((scorers[0], str(tmp_path / "silent")), tmp_path / "silent", "one score")


# --- mean weights ---------------------------------------------------------------------------------


def mean_of(paths, out):
    average_rewards.main(average_rewards.Args(reward_model_path=tuple(paths), output_dir=str(out)))
    return load_file(f"{out}/model.safetensors")


def test_the_mean_of_three_scorers_weights(scorers, tmp_path):
    each = [load_file(f"{path}/model.safetensors") for path in scorers]
    found = mean_of(scorers, tmp_path / "mean")
    for name, value in found.items():
        wanted = torch.stack([of[name].double() for of in each]).mean(0)
        assert (value - wanted).abs().max() < 1e-6, name
    assert "score.weight" in found
    scorer = load_scorer(str(tmp_path / "mean"), sr.utils.load_tokenizer(str(tmp_path / "mean")), frozen=True)
    assert scorer.e_head is None and scorer.bf16 is None


def test_scorers_without_a_mean_are_refused(words, scorers, tokenizer, tmp_path):
    kind, small = AutoModelForSequenceClassification, SMALL | {"n_layer": 2}
    others = byte_level_tokenizer(pad_token="<pad>", eos_token="</s>")
    bytes_of = gpt2_config(tokenizer, **SMALL, num_labels=1, eos_token_id=1)
    pairs = {
        "n_layer is 1 and 2": (scorers[0], gpt2_config(words, **small, num_labels=1), words),
        "tokenizers differ": (save_model(kind, bytes_of, tokenizer, tmp_path / "a", 1), bytes_of, others),
    }
    for said, (path, config, its_words) in pairs.items():
        folder = save_model(kind, config, its_words, tmp_path / said.split()[0], 1)
        with refused("--reward_model_path", path, folder, said):
            mean_of([path, folder], tmp_path / "mean")
    with refused("--reward_model_path", "two scorers"):
        mean_of(scorers[:1], tmp_path / "mean")
    assert not (tmp_path / "mean").exists()
