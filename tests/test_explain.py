"""tools/explain.py: by hand on a batch of two responses, and as a command."""

from types import SimpleNamespace

import pytest
import torch

from ppo_sr import PPO, generalized_advantages, token_rewards, whiten
from tests import test_ppo_sr as sr
from tests.test_ppo_sr import data, policy, scorer, words  # noqa: F401  (fixtures)
from tools.explain import cell, explain, main


@pytest.fixture
def batch(tokenizer):
    """Two responses of 3 and 2 tokens; s = 1, -1; beta = .5; gamma = 1, lambda = .5."""
    args = SimpleNamespace(gamma=1.0, lam=0.5)
    newline, eos = tokenizer.encode("\n")[0], tokenizer.eos_token_id
    the, jump = (tokenizer.encode(letter)[0] for letter in "tj")
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()
    logprobs = torch.tensor([[-1.0, -2.0, -0.5], [-0.1, -3.0, 0.0]])
    ref_logprobs = torch.tensor([[-1.2, -1.8, -0.5], [-0.1, -3.4, 0.0]])
    values = torch.tensor([[0.2, 0.4, 0.6], [-0.5, -0.75, 0.0]])
    scores = torch.tensor([1.0, -1.0])
    rewards = token_rewards(scores, logprobs, ref_logprobs, mask, 0.5)
    advantages, returns = generalized_advantages(rewards, values, mask, 1.0, 0.5)
    rollout = SimpleNamespace(
        sequences=[([the] * 4, [the, newline, eos]), ([jump] * 2, [jump, eos])],
        mask=mask, logprobs=logprobs, ref_logprobs=ref_logprobs, values=values,
    )  # fmt: skip
    experience = SimpleNamespace(
        scores=scores, kl_coef=0.5, rewards=rewards, advantages=whiten(advantages, mask),
        returns=returns,
    )  # fmt: skip
    return args, rollout, experience


def numbers(line):
    return [float(word) for word in line.split()[-9:]]


def test_explain_prints_the_terms_worked_out_by_hand(tokenizer, batch):
    """Row 0: KL terms -.5 (.2, -.2, 0) = -.1, .1, 0, so rewards -.1, .1, 1.

    deltas  -.1 + .4 - .2 = .1     .1 + .6 - .4 = .3     1 - .6 = .4
    A       .1 + .5 x .5 = .35     .3 + .5 x .4 = .5     .4            returns  .55 .9 1
    Row 1: KL terms 0, -.5 x .4 = -.2, rewards 0, -1.2
    A_1 = -1.2 + .75 = -.45, A_0 = -.75 + .5 - .225 = -.475
    Whitened: mean .065, deviations .285 .435 .335 -.54 -.515, unbiased variance .9395 / 4,
    std .484639
    """
    args, rollout, experience = batch
    lines = explain(args, tokenizer, rollout, experience).split("\n")
    assert lines[0] == "row 0, prompt of 4 tokens: 'tttt'"
    assert "[Eq. 2]" in lines[2] and "GAE" in lines[2] and "whitened" in lines[2]
    first = lines[4:7]
    tokens = [["4", "'t'", "1"], ["5", r"'\n'", "1"], ["6", "'<eos>'", "1"]]
    assert [line.split()[:3] for line in first] == tokens
    assert [numbers(line) for line in first] == [
        [-1.0, -1.2, -0.1, 0.0, -0.1, 0.2, 0.35, 0.5881, 0.55],
        [-2.0, -1.8, 0.1, 0.0, 0.1, 0.4, 0.5, 0.8976, 0.9],
        [-0.5, -0.5, 0.0, 1.0, 1.0, 0.6, 0.4, 0.6912, 1.0],
    ]
    assert lines[7].split() == ["sum", "3", "0.0000", "1.0000", "1.0000"]
    second = lines[9:]
    assert [numbers(line) for line in second[4:6]] == [
        [-0.1, -0.1, 0.0, 0.0, 0.0, -0.5, -0.475, -1.1142, -0.975],
        [-3.0, -3.4, -0.2, -1.0, -1.2, -0.75, -0.45, -1.0626, -1.2],
    ]
    assert second[6].split()[:3] == ["4", "(padding)", "0"] and numbers(second[6]) == [0.0] * 9
    assert second[7].split() == ["sum", "2", "-0.2000", "-1.0000", "-1.2000"]
    assert "mean 0.0000, std 1.0000" in lines[-1] and not any("-0.0000" in line for line in lines)


def identities(text):
    """The largest errors that the last two lines state: of the sums of rewards, and of GAE."""
    tail = " ".join(text.split("\n")[-2:])
    return tuple(float(tail.split(f"{of} to ")[1].split(";")[0]) for of in ("beta KL", "A_t+1"))


def test_explain_states_whether_the_identities_hold(tokenizer, batch):
    args, rollout, experience = batch
    rollout.values[1, 2] = 0.3  # padding counts nowhere
    assert max(identities(explain(args, tokenizer, rollout, experience))) < 1e-6
    experience.rewards[1, 1] += 0.25  # a reward that Eq. 2 does not give, and that GAE has not seen
    text = explain(args, tokenizer, rollout, experience)
    assert identities(text) == (0.2, 0.2)  # one digit, as printed
    experience.rewards[1, 1] -= 0.25
    experience.returns[0, 2] += 0.5  # A_2 off by .5, and A_1 by lambda x .5
    sums, gae = identities(explain(args, tokenizer, rollout, experience))
    assert sums < 1e-6 and gae == 0.5


def test_explain_covers_the_batch_but_prints_the_first_rows(tokenizer, batch):
    args, rollout, experience = batch
    text = explain(args, tokenizer, rollout, experience, rows=1)
    assert "row 1" not in text and "all 5 tokens" in text


def test_explain_stays_aligned_and_escapes(tokenizer, batch):
    args, rollout, experience = batch
    rollout.sequences[0] = (tokenizer.encode("the\x1b[31m\n" * 60), tokenizer.encode("\t\x1b\r"))
    text = explain(args, tokenizer, rollout, experience)
    lines = text.split("\n")
    assert max(map(len, lines)) <= 120 and all(char == "\n" or char.isprintable() for char in text)
    table = [line for line in lines if line[:5].strip().isdigit() and "next token" not in line]
    assert len(table) == 6 and {len(line) for line in table} == {len(lines[1])}


def test_wide_characters_count_two_columns():
    assert cell("ab", 6) == "'ab'  "
    assert cell("巴黎", 8) == "'巴黎'  "  # 1 + 4 + 1 columns and two spaces
    assert cell("巴黎巴黎", 8) == "'巴黎巴…"  # 1 + 6 + 1
    assert cell("a" * 20, 8) == "'aaaaaa…"


# --- the command ----------------------------------------------------------------------------------


def test_the_command_trains_nothing(policy, scorer, data, tmp_path, monkeypatch, capsys):  # noqa: F811
    def no_update(*_):
        raise AssertionError

    seen, score = [], PPO.score

    def spying(self, *batch):
        seen.append(score(self, *batch))
        return seen[-1]

    monkeypatch.setattr(PPO, "score", spying)
    monkeypatch.setattr(PPO, "update", no_update)
    main(sr.args_for(policy, data, tmp_path / "run", reward_model_path=scorer))
    said = capsys.readouterr().out
    assert "[Eq. 2]" in said and "row 2" in said and len(seen) == 1
    for s in seen[0].raw_scores.tolist():
        assert f"{s:.4f}" in said
    assert not any((tmp_path / "run").glob("*"))
