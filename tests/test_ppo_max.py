"""baselines/ppo_max.py: what it alone has, by hand and switch by switch, its preset, resume.

tests/test_nano.py compares it with nano.py.
"""

import itertools
import math
import re
import shutil
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import tensor

import ppo_sr
import utils
from baselines import ppo_max
from baselines.ppo_max import AdaptiveKL, OnBackbone, kl_estimate, mini_batch_advantages
from plumbing import checkpoints
from tests import test_ppo_sr as sr
from tests.test_nano import float64  # noqa: F401  (a fixture)
from tests.test_data import refused

words, policy, scorer, data = sr.words, sr.policy, sr.scorer, sr.data  # fixtures
INF = float("inf")

pytestmark = pytest.mark.usefixtures("one_thread")


# --- the preset -------------------------------------------------------------------------------------------------------

PRESET = {"global_batch_size": 128, "num_ppo_epochs": 1, "num_mini_batches": 4, "kl_coef": 0.02}
PRESET |= {"moving_average_decay": 1.0, "whiten_advantages": False, "critic_warmup_steps": 10}


def test_the_preset_is_what_the_variant_changes():
    theirs = {f.name: f.default for f in fields(ppo_sr.Args)}
    mine = {f.name: f.default for f in fields(ppo_max.Args)}
    assert {name: mine[name] for name in theirs if mine[name] != theirs[name]} == PRESET


def test_the_table_in_the_docstring_is_the_preset():
    default = {f.name: f.default for f in fields(ppo_max.Args)}
    table = ppo_max.__doc__.split("stabiliser  ")[1].split("python -m")[0]
    named = dict(re.findall(r"--(\w+) (\d[\d.]*|inf|True|k1|scorer)", table))
    beside = {"whiten_mini_batches", "advantage_clip", "cliprange", "cliprange_value", "critic_init", "kl_estimator"}
    beside |= {"kl_target", "entropy_coef", "ptx_coef", "max_grad_norm", "score_clip"}
    assert named.keys() == PRESET.keys() - {"whiten_advantages"} | beside
    assert {name for name, value in named.items() if str(default[name]) not in (value, f"{value}.0")} == set()


# --- by hand ------------------------------------------------------------------------------------------------------------


def test_k2_and_k3_by_hand():
    lr = tensor([math.log(2), 0.0, -math.log(2)])  # pi / pi_init: 2, 1, 1/2
    ref = tensor([-1.0, -2.0, -3.0])
    half_square = math.log(2) ** 2 / 2
    assert kl_estimate(ref + lr, ref, "k2").tolist() == pytest.approx([half_square, 0, half_square])
    k3 = [0.5 - 1 + math.log(2), 0, 2 - 1 - math.log(2)]
    assert kl_estimate(ref + lr, ref, "k3").tolist() == pytest.approx(k3, abs=1e-7)


def test_whose_gradient_k2_and_k3_have():
    """Averages over every token of a vocabulary of 4: k2 descends on KL(pi || pi_init), k3 on KL(pi_init || pi), k1 nowhere;
    k3 as a number is KL(pi || pi_init)."""
    logits = tensor([0.3, -1.0, 0.7, 0.1], dtype=torch.float64, requires_grad=True)
    ref = tensor([1.0, 0.2, -0.5, 0.0], dtype=torch.float64).log_softmax(0)
    p = logits.log_softmax(0)

    def gradient(loss):
        return torch.autograd.grad(loss, logits, retain_graph=True)[0].tolist()

    def on_average(per_token):
        return (p.exp().detach() * per_token).sum()

    reverse, forward = (p.exp() * (p - ref)).sum(), (ref.exp() * (ref - p)).sum()
    assert gradient(on_average(kl_estimate(p, ref, "k2"))) == pytest.approx(gradient(reverse), abs=1e-12)
    assert gradient(on_average(kl_estimate(p, ref, "k3"))) == pytest.approx(gradient(forward), abs=1e-12)
    assert gradient(on_average(p - ref)) == pytest.approx([0] * 4, abs=1e-12)
    assert on_average(kl_estimate(p, ref, "k3")).item() == pytest.approx(reverse.item(), abs=1e-12)
    assert gradient(reverse) != pytest.approx(gradient(forward), abs=1e-2)


def test_the_controller_by_hand():
    control = AdaptiveKL(0.1, target=6.0, horizon=1000)
    for kl, factor in ((6.6, 1.01), (60.0, 1.02), (6.0, 1.0), (5.4, 0.99), (0.0, 0.98)):  # n / horizon = 1/10
        before = control.kl_coef
        control.update(kl, 100)
        assert control.kl_coef == pytest.approx(before * factor)
    constant = AdaptiveKL(0.1, target=0.0, horizon=1000)
    constant.update(60.0, 100)
    assert constant.kl_coef == 0.1


def test_advantages_of_a_mini_batch_by_hand():
    """Tokens 1, 3 | 2, 4, 6: means 2 and 4, unbiased stds sqrt(2) and 2; what stands outside the mask counts for nothing."""
    values = tensor([[1.0, 3.0, 9.0], [2.0, 4.0, 6.0]])
    mask = tensor([[True, True, False], [True, True, True]])
    one, two = (mini_batch_advantages(values[[i]], mask[[i]], True, INF)[0].tolist() for i in range(2))
    assert one == pytest.approx([-(0.5**0.5), 0.5**0.5, 0]) and two == pytest.approx([-1, 0, 1])
    assert mini_batch_advantages(values[[1]], mask[[1]], True, 0.5)[0].tolist() == pytest.approx([-0.5, 0, 0.5])
    assert mini_batch_advantages(values, mask, False, 2.5).tolist() == [[1.0, 2.5, 2.5], [2.0, 2.5, 2.5]]
    assert torch.equal(mini_batch_advantages(values, mask, False, INF), values)
    both = mini_batch_advantages(values, mask, True, INF)  # mean 3.2, variance 3.7
    assert both[mask].tolist() == pytest.approx([(v - 3.2) / 3.7**0.5 for v in (1, 3, 2, 4, 6)])


def test_ptx_by_hand(words, tmp_path):
    """A policy whose logits are all 0 gives every token log(1 / vocabulary), whatever the row."""
    models = sr.three_models(words)
    for parameter in models[0].get_output_embeddings().parameters():
        parameter.data.zero_()
    args = sr.flags_of({"ptx_batch_size": 3, "ptx_coef": 0.5, "num_ppo_epochs": 1, "num_mini_batches": 1}, ppo_max)
    ((_, _, dials),), *_ = sr.run_script(ppo_max, args, models, words, tmp_path, 1, demonstrations(len(words)))
    assert dials["loss/ptx_nll"] == pytest.approx(math.log(len(words)), rel=1e-5)


# --- each switch ----------------------------------------------------------------------------------------------------------


def demonstrations(vocabulary):
    """Rows of ptx for ever, (ids, prompt_len)."""
    draw = torch.Generator().manual_seed(5)
    rows = [torch.randint(3, vocabulary, (3 + i % 6,), generator=draw).tolist() for i in range(7)]
    return itertools.cycle([(ids, 1 + i % 2) for i, ids in enumerate(rows)])


BEFORE = {"rewards", "advantages", "returns"}
PAID = {"kl_estimator": "k1", "kl_coef": 0.0}
TERMS = {  # switch: its flags, what of the rollout, which dials of the first mini-batch, and whose weights it changes
    "whiten_mini_batches": ({}, set(), {"loss/policy_avg"}, "policy"),
    "score_clip": ({"score_clip": 0.7}, {"scores", *BEFORE}, {"loss/policy_avg", "loss/value_avg"}, "both"),
    "vf_coef": ({"vf_coef": 0.01}, set(), set(), "critic"),
    "advantage_clip": ({"advantage_clip": 0.3}, set(), {"loss/policy_avg"}, "policy"),
    "KL left out": (PAID, BEFORE, {"loss/policy_avg", "loss/value_avg"}, "both"),
    "k2": ({"kl_estimator": "k2"}, BEFORE, {"loss/policy_avg", "loss/value_avg", "loss/kl_avg"}, "both"),
    "k3": ({"kl_estimator": "k3"}, BEFORE, {"loss/policy_avg", "loss/value_avg", "loss/kl_avg"}, "both"),
    "entropy_coef": ({"entropy_coef": 0.2}, set(), {"loss/entropy_avg"}, "policy"),
    "ptx": ({"ptx_coef": 0.5}, set(), {"loss/ptx_nll"}, "policy"),
    "ptx at 0": ({"ptx_coef": 0.0}, set(), set(), ""),
}


def first_update(words, tmp_path, **changes):
    """One optimiser step: rollout and dials are those of the models as they were."""
    common = {"num_ppo_epochs": 1, "num_mini_batches": 1, "whiten_advantages": False, "ptx_batch_size": 3}
    rows = demonstrations(len(words)) if changes.get("ptx_coef") else None  # at 0 a run loads none
    args = sr.flags_of(common | changes, ppo_max)
    found = sr.run_script(ppo_max, args, sr.three_models(words), words, tmp_path, 1, rows)
    ((rollout, experience, dials),), *models = found
    del dials["objective/kl_coef"]
    return SimpleNamespace(**vars(rollout) | vars(experience)), dials, models


def changed(one, other):
    """Names of rollout terms, of dials, and models, that are not bit for bit the same."""
    (roll, dials, models), (roll2, dials2, models2) = one, other
    terms = {name for name in ("scores", *sr.ROLLOUT) if not torch.equal(getattr(roll, name), getattr(roll2, name))}
    # key biases have no gradient but rounding, which AdamW makes a step of
    weights = [
        {k: v for k, v in sr.worst(*two).items() if "bias" not in k} for two in zip(models, models2, strict=True)
    ]
    moved = [max(worst.values()) > 1e-5 for worst in weights]
    whose = {(True, True): "both", (True, False): "policy", (False, True): "critic", (False, False): ""}[tuple(moved)]
    differ = {name for name in dials | dials2 if dials.get(name) != pytest.approx(dials2.get(name), abs=1e-6)}
    return terms, differ, whose  # replayed pairs share a pass with the others, which pads them and rounds otherwise


def test_each_switch_changes_the_term_that_it_names_and_no_other(words, tmp_path, float64):  # noqa: F811
    plain = first_update(words, tmp_path)
    for switch, (change, *expected) in TERMS.items():
        change = {"whiten_mini_batches": True} if switch == "whiten_mini_batches" else change
        assert changed(first_update(words, tmp_path, **change), plain) == tuple(expected), switch
    unpaid = first_update(words, tmp_path, **PAID)
    for estimator in ("k2", "k3"):  # beside the reward that they leave alone
        in_loss = first_update(words, tmp_path, kl_estimator=estimator)
        assert changed(in_loss, unpaid) == (set(), {"loss/kl_avg"}, "policy")
        nothing = first_update(words, tmp_path, kl_estimator=estimator, kl_coef=0.0)
        assert changed(nothing, unpaid) == (set(), {"loss/kl_avg"}, "") and nothing[1]["loss/kl_avg"] == 0


# --- whole runs -----------------------------------------------------------------------------------------------------------


def args_for(policy, data, out, **changes):
    """tests/test_ppo_sr.py's small sizes on the preset."""
    required = {"model_name_or_path", "dataset_name", "output_dir", "reward_model_path"}
    small = vars(sr.args_for(policy, data, out, reward_model_path=changes["reward_model_path"]))
    small = {f.name: small[f.name] for f in fields(ppo_sr.Args) if f.name in required or small[f.name] != f.default}
    small |= {"global_batch_size": 8, "ptx_batch_size": 2, "critic_warmup_steps": 1}
    return ppo_max.Args(**small | changes)


def run(policy, scorer, data, out, **changes):
    args = args_for(policy, data, out, **{"reward_model_path": scorer} | changes)
    ppo_max.main(args)
    return sr.metrics_of(out)


def spy(monkeypatch, name, of=ppo_max.PPOMax):
    """Calls of a method: a list of (arguments, result, the critic's weights before)."""
    function, calls = getattr(of, name), []

    def spying(self, *args):
        start = {key: v.clone() for key, v in self.critic.module.model.state_dict().items()}
        calls.append((args, function(self, *args), start))
        return calls[-1][1]

    monkeypatch.setattr(of, name, spying)
    return calls


def test_the_preset_runs(policy, scorer, data, tmp_path, monkeypatch):
    """Critic first, k1 in the reward, beta constant, ptx, 4 mini-batches in one pass over the buffer."""
    used, function = [], ppo_max.mini_batch_advantages

    def spying(*args):
        used.append(args)
        return function(*args)

    monkeypatch.setattr(ppo_max, "mini_batch_advantages", spying)
    metrics = run(policy, scorer, data, tmp_path, ptx_dataset_name=data["rehearsal"], total_steps=3)
    assert [len(mask) for _, mask, *_ in used] == [2] * 12
    assert all(switches == [True, INF] for _, _, *switches in used)
    assert ["loss/ptx_nll" in row for row in metrics] == [False, False, True, True]
    assert {row["objective/kl_coef"] for row in metrics[1:]} == {0.02}
    assert not {"loss/kl_avg", "loss/entropy_avg", "loss/rehearsal_nll"} & set().union(*metrics)
    kl = [row["objective/kl"] for row in metrics[1:]]
    assert kl[:2] == pytest.approx([0, 0], abs=1e-5) and abs(kl[2]) > 1e-4


@pytest.mark.parametrize("estimator", ["k1", "k2"])
def test_where_the_kl_is_paid(estimator, policy, scorer, data, tmp_path, monkeypatch):
    """In the reward or in the loss, and never in both."""
    made = spy(monkeypatch, "advantages")
    metrics = run(policy, scorer, data, tmp_path, kl_estimator=estimator, kl_coef=0.5)
    assert {experience.kl_coef for _, experience, _ in made} == {0.5 if estimator == "k1" else 0.0}
    assert ("loss/kl_avg" in metrics[2]) == (estimator == "k2")


def test_beta_follows_the_kl_from_the_first_update_of_the_policy_on(policy, scorer, data, tmp_path, monkeypatch):
    paid = spy(monkeypatch, "advantages")
    flags = {"total_steps": 4, "kl_target": 0.5, "kl_horizon": 80}
    metrics = run(policy, scorer, data, tmp_path / "adaptive", **flags)[1:]
    betas = [row["objective/kl_coef"] for row in metrics]
    assert betas[:2] == [0.02, 0.02]  # the critic alone, KL 0: nothing to control
    for row, before, after in zip(metrics[1:], betas[1:], betas[2:], strict=False):
        error = min(max(row["objective/kl"] / 0.5 - 1, -0.2), 0.2)
        assert after == pytest.approx(before * (1 + error / 10), rel=1e-12)
    assert betas[2] < 0.02 and [made.kl_coef for _, made, _ in paid] == [pytest.approx(b) for b in betas]
    constant = run(policy, scorer, data, tmp_path / "constant", total_steps=4)[1:]
    same = [{**row, "objective/kl_coef": 0} == {**other, "objective/kl_coef": 0}
            for row, other in zip(metrics, constant, strict=True)]  # fmt: skip
    assert same == [True, True, False, False]


def test_the_critic_starts_where_it_is_told(policy, scorer, data, tmp_path, monkeypatch):
    rolls = spy(monkeypatch, "advantages")
    for start in ("scorer", "policy"):
        run(policy, scorer, data, tmp_path / start, critic_init=start)
    ((of_scorer,), _, scorers), ((of_policy,), _, policys) = rolls[0], rolls[len(rolls) // 2]
    weights = load_file(Path(scorer) / "model.safetensors")
    assert all(torch.equal(scorers[name], v) for name, v in weights.items())
    weights = {name: v for name, v in load_file(Path(policy) / "model.safetensors").items() if "lm_head" not in name}
    assert all(torch.equal(policys[name], v) for name, v in weights.items()) and not of_policy.values.any()
    differ = {name for name in ("raw_scores", "logprobs", "ref_logprobs", "entropy", "values", "mask")
              if not torch.equal(getattr(of_scorer, name), getattr(of_policy, name))}  # fmt: skip
    assert differ == {"values"}


def test_a_head_on_the_backbone_adds_its_gradient_to_the_policys(policy):
    """Against one autograd pass over transformers' own hidden states and logits."""
    ids, prompt_lens = tensor([[3, 4, 5, 6, 7], [8, 9, 10, 11, 12]]), tensor([2, 3])
    batch = ids, torch.ones_like(ids, dtype=torch.bool), prompt_lens
    model, other = (utils.load_policy(policy).eval() for _ in range(2))
    ppo = object.__new__(ppo_max.PPOMax)
    rates = {"learning_rate": 1e-3, "critic_learning_rate": 0.1}
    ppo.args = SimpleNamespace(critic_init="backbone", **rates)
    critic = ppo.load_critic(model)
    weight = torch.nn.init.normal_(model.score.weight).detach().clone().requires_grad_()
    engine = utils.Engine(model, 1e-3, max_grad_norm=INF)
    values = OnBackbone(engine, critic)
    (lp, mask), v = utils.response_logprobs(engine, *batch), values(*batch)
    engine.backward(lp[mask].sum())
    values.backward(0.3 * (v[mask] - 1).square().sum())
    out = other(ids, output_hidden_states=True)
    where = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3)]
    loss = sum(out.logits[r, t].log_softmax(-1)[ids[r, t + 1]] for r, t in where)
    # V is the head times 0.1 / 0.001, the rates: AdamW moves V as if the head's own were 0.1
    loss = loss + 0.3 * sum((100 * out.hidden_states[-1][r, t] @ weight[0] - 1).square() for r, t in where)
    loss.backward()
    assert torch.allclose(model.score.weight.grad, weight.grad, rtol=1e-4)
    theirs = dict(other.named_parameters())
    for name, p in model.named_parameters():
        assert name == "score.weight" or torch.allclose(p.grad, theirs[name].grad, rtol=1e-3, atol=0.5), name
    start = model.score.weight.detach().clone()
    assert values.step() == 0 and engine.step() > 0
    moved = 100 * (model.score.weight - start).abs().max().item()
    assert moved == pytest.approx(0.1, rel=1e-3)  # AdamW's first step, as V sees it
    assert (model.lm_head.weight - other.lm_head.weight).abs().max().item() == pytest.approx(1e-3, rel=1e-3)


def test_a_critic_on_the_backbone_trains_is_resumed_and_is_no_part_of_the_saved_policy(
    policy, scorer, data, tmp_path, monkeypatch
):
    flags = {"critic_init": "backbone", "critic_warmup_steps": 0}
    made, make = [], utils.Engine
    monkeypatch.setattr(
        utils.Backend, "engine", lambda self, module, *a, **k: made.append(module) or make(module, *a, **k)
    )
    ppo_max.main(rich(policy, scorer, data, tmp_path / "whole", **flags))
    assert len(made) == 1  # one model is trained
    rows = sr.metrics_of(tmp_path / "whole")
    assert all(row["loss/value_avg"] > 0 for row in rows[1:]) and made[0].score.weight.abs().max() > 0
    saved = load_file(tmp_path / "whole" / "model" / "model.safetensors")
    assert saved.keys() == load_file(Path(policy) / "model.safetensors").keys()
    sr.stop_in(rich(policy, scorer, data, tmp_path / "run", **flags), 4, module=ppo_max)
    ppo_max.main(rich(policy, scorer, data, tmp_path / "run", resume=True, **flags))
    assert sr.same_run(tmp_path / "run", tmp_path / "whole") == (True, True, True)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kl_target": 1.0, "kl_coef": 0.0}, "--kl_target"),
        ({"kl_target": 1.0, "kl_horizon": 0}, "--kl_target"),
        ({"critic_warmup_steps": 2}, "--critic_warmup_steps"),
        ({"critic_init": "backbone"}, "--critic_init backbone"),
        ({"ptx_dataset_name": "nowhere.jsonl"}, "nowhere.jsonl"),
    ],
)
def test_bad_flags_are_refused(changes, said, policy, scorer, data, tmp_path):
    with refused(said):
        run(policy, scorer, data, tmp_path, **changes)
    assert not (tmp_path / "metrics.jsonl").exists()


def rich(policy, scorer, data, out, **changes):
    flags = {"total_steps": 4, "save_steps": 2, "kl_target": 0.5, "kl_horizon": 20, "kl_estimator": "k2"}
    flags |= {"ptx_dataset_name": data["rehearsal"], "ptx_coef": 0.3, "entropy_coef": 0.01}
    return args_for(policy, data, out, reward_model_path=scorer, **flags | changes)


@pytest.mark.parametrize("piece", ["nothing", "controller", "ptx position"])
def test_resume_brings_back_the_controller_and_the_place_in_ptx(piece, policy, scorer, data, tmp_path, monkeypatch):
    ppo_max.main(rich(policy, scorer, data, tmp_path / "whole"))
    sr.stop_in(rich(policy, scorer, data, tmp_path / "run"), 4, module=ppo_max)
    load, endless = checkpoints.load, ppo_sr.endless
    if piece == "controller":
        monkeypatch.setattr(checkpoints, "load", lambda log: load(log) | {"controller": dict(log.parts["controller"])})
    if piece == "ptx position":

        def drawing(items, seed, skip):
            return endless(items, seed, skip + bool(items and not isinstance(items[0][0], dict)))

        monkeypatch.setattr(ppo_sr, "endless", drawing)
    ppo_max.main(rich(policy, scorer, data, tmp_path / "run", resume=True))
    same = sr.same_run(tmp_path / "run", tmp_path / "whole")
    assert same == (True, True, True) if piece == "nothing" else not (same[0] or same[2])


def test_resume_with_other_demonstrations_is_refused(policy, scorer, data, tmp_path):
    ptx = shutil.copy(data["rehearsal"], tmp_path / "ptx.jsonl")
    flags = {"ptx_dataset_name": str(ptx), "save_steps": 1}
    run(policy, scorer, data, tmp_path / "run", **flags)
    ptx.write_text("".join(reversed(ptx.read_text().splitlines(keepends=True))))
    with refused("--resume", "data"):
        run(policy, scorer, data, tmp_path / "run", resume=True, **flags)
