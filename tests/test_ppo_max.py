"""ppo_max.py beside ppo_sr.py: the same words, the switches that it alone has by hand and against the naive PPO, resume."""

import ast
import difflib
import inspect
import itertools
import math
import re
import shutil
import statistics
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import tensor

import engines
import ppo_max
import ppo_sr
import utils
from ppo_max import AdaptiveKL, kl_estimate, mini_batch_advantages
from tests import test_ppo_sr as sr
from tests.reference_ppo import ROLLOUT, ReferencePPO, token_logprobs
from tests.test_data import refused
from tools import ppo_max_ablation as ablation

words, policy, scorer, data, float64 = sr.words, sr.policy, sr.scorer, sr.data, sr.float64  # fixtures
INF = float("inf")

pytestmark = pytest.mark.usefixtures("one_thread")


# --- word for word ------------------------------------------------------------------------------------------------------

GROWN = {"load_scorer_and_critic", "update", "main"}  # they hold more than ppo_sr.py's
OWN = {"mini_batch_advantages", "kl_estimate", "AdaptiveKL", "on_backbone"}
PRESET = {"global_batch_size": 128, "num_ppo_epochs": 1, "num_mini_batches": 4, "kl_coef": 0.02, "score_clip": 10.0}
PRESET |= {"score_normalization": "moving_average", "moving_average_decay": 1.0, "whiten_advantages": False}
PRESET |= {"critic_warmup_steps": 10}  # shared fields whose default differs
CHANGED = [  # lines of ppo_sr.py behind its docstring and fields that ppo_max.py does not hold, in their order
    "from dataclasses import dataclass",
    "from engines import AdaptersOff, EngineArgs, frozen, gathered_parameters, largest, make_engine, rank, save_model",
    "from engines import seeded, total",
    "def update(args, step, policy_engine, critic_engine, pad_id, rollout, rehearsal_rows, folder):",
    '"""num_ppo_epochs passes of clipped policy and value loss, plus rehearsal [Eq. 9] -> means of the dials.',
    "rehearsal_rows: an iterator over D_R or None. Raises InputError where a gradient is not finite.",
    "sums = torch.zeros(len(DIALS), device=tokens.device)",
    "new, m = response_logprobs(policy_engine, ids, attention, prompt_lens, args.temperature)",
    "old, advantages, returns, old_values = (",
    "for v in (rollout.logprobs, rollout.advantages, rollout.returns, rollout.values)",
    "policy_engine.backward(loss_p)",
    "sums += torch.stack([loss_p, loss_v, kl / tokens, clipped / tokens, weight * ratio.sum() / tokens])",
    "dials = dict(zip(DIALS, total(torch.stack(dials)).mean(0).tolist(), strict=True))",
    "lengths = [len(x) + args.response_length for x in answered] + [len(ids) for ids, _ in rehearsal]",
    "add_advantages(args, rollout, moving_average, args.kl_coef * kl_weights[batch, None])",
    "print(explain(args, tokenizer, roll_out(list(itertools.islice(endless(range(len(prompts)), args.seed, 0), 3)))))",
    'log = RunLog(args, [args.dataset_name, args.rehearsal_dataset_name or "", *args.eval_dataset_names], done)',
    "dials = update(args, step, policy_engine, critic_engine, pad_id, rollout, rehearsal_rows, log.folder)",
]


def definitions(module):
    """{name: source} of a module's functions and classes, without those that it imports."""
    members = vars(module).items()
    return {name: inspect.getsource(v) for name, v in members if getattr(v, "__module__", "") == module.__name__}


def flags(module):
    """{name: (type, docstring)} of Args, in order."""
    body = ast.parse(inspect.getsource(module.Args)).body[0].body
    pairs = zip(body[::2], body[1::2], strict=True)
    return {f.target.id: (ast.unparse(f.annotation), text.value.value) for f, text in pairs}


def code(module):
    """The lines behind the module's docstring and without the fields of Args, stripped."""
    source = inspect.getsource(module)
    source = source.split('"""', 2)[2].replace(inspect.getsource(module.Args), "")
    return [line.strip() for line in source.splitlines()]


def test_what_both_files_hold_is_the_same_word_for_word():
    ours, theirs = definitions(ppo_max), definitions(ppo_sr)
    assert ours.keys() - theirs.keys() == OWN and not theirs.keys() - ours.keys()
    assert {name for name in theirs if ours[name] != theirs[name]} == GROWN | {"Args"}
    opcodes = difflib.SequenceMatcher(None, code(ppo_sr), code(ppo_max), autojunk=False).get_opcodes()
    assert [line for tag, i, j, *_ in opcodes if tag != "equal" for line in code(ppo_sr)[i:j]] == CHANGED
    assert ppo_max.DIALS == ppo_sr.DIALS


def test_shared_flags_have_the_same_help_and_the_preset_is_the_default():
    ours, theirs = flags(ppo_max), flags(ppo_sr)
    assert [(name, flag) for name, flag in ours.items() if name in theirs] == list(theirs.items())
    defaults = {f.name: f.default for f in fields(ppo_sr.Args)}
    mine = {f.name: f.default for f in fields(ppo_max.Args)}
    assert {name: mine[name] for name in theirs if mine[name] != defaults[name]} == PRESET


def test_nothing_is_imported_from_another_script():
    imported = {n.module for n in ast.walk(ast.parse(inspect.getsource(ppo_max))) if isinstance(n, ast.ImportFrom)}
    root = Path(ppo_max.__file__).parent
    assert {name for name in imported if (root / f"{name}.py").is_file()} == {"data", "engines", "instruments", "utils"}


def test_the_table_in_the_docstring_is_the_preset():
    default = {f.name: f.default for f in fields(ppo_max.Args)}
    table = ppo_max.__doc__.split("stabiliser  ")[1].split("python ppo_max.py")[0]
    named = dict(re.findall(r"--(\w+) (\d[\d.]*|inf|True|k1|scorer|moving_average)", table))
    beside = {"whiten_mini_batches", "advantage_clip", "cliprange", "cliprange_value", "critic_init", "kl_estimator"}
    beside |= {"kl_target", "entropy_coef", "ptx_coef", "max_grad_norm"}
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
    ((_, dials),), *_ = sr.run_script(ppo_max, args, models, words, tmp_path, 1, demonstrations(len(words)))
    assert dials["loss/ptx_nll"] == pytest.approx(math.log(len(words)), rel=1e-5)


# --- against the naive PPO ------------------------------------------------------------------------------------------------


def demonstrations(vocabulary):
    """Rows of ptx for ever, (ids, prompt_len)."""
    draw = torch.Generator().manual_seed(5)
    rows = [torch.randint(3, vocabulary, (3 + i % 6,), generator=draw).tolist() for i in range(7)]
    return itertools.cycle([(ids, 1 + i % 2) for i, ids in enumerate(rows)])


class ReferencePPOMax(ReferencePPO):
    """What ppo_max.py has beside ppo_sr.py, once more."""

    def __init__(self, args, policy, reference, critic):
        super().__init__(args, policy, reference, critic)
        self.ptx = demonstrations(self.policy.config.vocab_size)

    def rollout(self, sequences, raw, finished, betas):
        self.betas = betas
        return super().rollout(
            sequences, raw, finished, betas if self.args.kl_estimator == "k1" else [0.0] * len(betas)
        )

    def losses(self, sequences, roll, chosen):
        every = torch.cat([roll["advantages"][i] for i in chosen]).tolist()
        mean, std = (statistics.fmean(every), statistics.stdev(every)) if self.args.whiten_mini_batches else (0.0, 1.0)
        used = {i: (roll["advantages"][i] - mean) / (std + 1e-8 * (std != 1.0)) for i in chosen}
        clip = self.args.advantage_clip
        roll = roll | {"advantages": {i: torch.where(a.abs() > clip, clip * a.sign(), a) for i, a in used.items()}}
        return super().losses(sequences, roll, chosen)

    def regularizer(self, step, sequences, roll, chosen):
        """beta times k2 or k3, less the entropies, as means over the tokens of the mini-batch; NLL of demonstrations."""
        args, kls, entropies = self.args, [], []
        for i in chosen:
            new, entropy = token_logprobs(self.policy, *sequences[i], args.temperature)
            entropies.append(entropy)
            ratio = roll["ref_logprobs"][i].exp() / new.exp()
            kls.append(self.betas[i] * (ratio.log() ** 2 / 2 if args.kl_estimator == "k2" else ratio - 1 - ratio.log()))
        losses = {"loss/kl_avg": torch.cat(kls).mean()} if args.kl_estimator != "k1" else {}
        if args.entropy_coef:
            losses["loss/entropy_avg"] = -args.entropy_coef * torch.cat(entropies).mean()
        if args.ptx_batch_size and step > args.critic_warmup_steps:
            rows = [next(self.ptx) for _ in range(args.ptx_batch_size)]
            logs = [token_logprobs(self.policy, ids[:n], ids[n:], args.temperature)[0] for ids, n in rows]
            losses["loss/ptx_nll"] = -torch.cat(logs).mean()
        self.dials.append({name: loss.item() for name, loss in losses.items()})
        return sum(loss * (args.ptx_coef if "ptx" in name else 1) for name, loss in losses.items())

    def update(self, *args):
        self.dials = []
        dials = super().update(*args)
        return dials | {name: statistics.fmean(row[name] for row in self.dials) for name in self.dials[0]}


OFF = {"whiten_advantages": False, "max_grad_norm": INF, "cliprange": INF, "cliprange_value": INF, "kl_coef": 0.0}
CASES = {
    "every stabiliser off": OFF,
    "mini-batches whitened": {"whiten_mini_batches": True, "whiten_advantages": False},
    "advantage clip": {"whiten_mini_batches": True, "advantage_clip": 0.5},
    "advantage clip without whitening": {"whiten_advantages": False, "advantage_clip": 0.5},
    "k2": {"kl_estimator": "k2", "rehearsal_kl_weight": 3.0},
    "k3": {"kl_estimator": "k3", "rehearsal_kl_weight": 3.0},
    "k3 alone": OFF | {"kl_estimator": "k3", "kl_coef": 1.0},
    "entropy": {"entropy_coef": 0.3, "temperature": 0.7},
    "ptx": {"ptx_batch_size": 5, "ptx_coef": 0.5},
    "ptx beside rehearsal": sr.REHEARSAL | {"rehearsal_reduction": "sum", "ptx_batch_size": 5, "ptx_coef": 0.5},
    "all at once": {"kl_estimator": "k2", "entropy_coef": 0.1, "ptx_batch_size": 3, "whiten_mini_batches": True}
    | {"advantage_clip": 1.0, "critic_warmup_steps": 1, "moving_average_decay": 1.0, "score_clip": 1.5}
    | {"score_normalization": "moving_average", "whiten_advantages": False, "ptx_coef": 0.3},
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_reference(case, words, tmp_path, float64):
    args, models = sr.flags_of({"ptx_batch_size": 0} | CASES[case], ppo_max), sr.three_models(words)
    rows = demonstrations(len(words)) if args.ptx_batch_size else None
    ours, policy, critic = sr.run_script(ppo_max, args, models, words, tmp_path, 2, rows)
    reference, ref_policy, ref_critic = sr.run_reference(args, models, words, 2, ReferencePPOMax)
    if args.critic_warmup_steps:  # the step without ptx
        assert "loss/ptx_nll" not in ours[0][1]
    sr.compare(ours, reference, 1e-9)
    assert max(sr.worst(policy, ref_policy).values()) < 1e-9
    assert max(sr.worst(critic, ref_critic).values()) < 1e-9
    assert max(sr.worst(policy, models[0]).values()) > 1e-3


BEFORE = {"rewards", "advantages", "returns"}
PAID = {"kl_estimator": "k1", "kl_coef": 0.0}
TERMS = {  # switch: its flags, what of the rollout, which dials of the first mini-batch, and whose weights it changes
    "whiten_mini_batches": ({}, set(), {"loss/policy_avg"}, "policy"),
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
    rows = demonstrations(len(words)) if "ptx_coef" in changes else None
    args = sr.flags_of(common | changes, ppo_max)
    ((roll, dials),), *models = sr.run_script(ppo_max, args, sr.three_models(words), words, tmp_path, 1, rows)
    return roll, dials, models


def changed(one, other):
    """Names of rollout terms, of dials, and models, that are not bit for bit the same."""
    (roll, dials, models), (roll2, dials2, models2) = one, other
    terms = {name for name in ("scores", *ROLLOUT) if not torch.equal(getattr(roll, name), getattr(roll2, name))}
    moved = [max(sr.worst(a, b).values()) > 0 for a, b in zip(models, models2, strict=True)]
    whose = {(True, True): "both", (True, False): "policy", (False, True): "critic", (False, False): ""}[tuple(moved)]
    return terms, {name for name in dials | dials2 if dials.get(name) != dials2.get(name)}, whose


def test_each_switch_changes_the_term_that_it_names_and_no_other(words, tmp_path):
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
    required = {"model_name_or_path", "dataset_name", "output_dir"}
    small = vars(sr.args_for(policy, data, out))
    small = {f.name: small[f.name] for f in fields(ppo_sr.Args) if f.name in required or small[f.name] != f.default}
    small |= {"global_batch_size": 8, "ptx_batch_size": 2, "critic_warmup_steps": 1}
    return ppo_max.Args(**small | changes)


def run(policy, scorer, data, out, **changes):
    args = args_for(policy, data, out, **{"reward_model_path": scorer} | changes)
    ppo_max.main(args)
    return sr.metrics_of(out)


def spy(monkeypatch, name):
    function, calls = getattr(ppo_max, name), []

    def spying(*args):
        kept = args[4].module.model.state_dict() if name == "score_rollout" else {}
        start = {key: v.clone() for key, v in kept.items()}
        calls.append((args, function(*args), start))
        return calls[-1][1]

    monkeypatch.setattr(ppo_max, name, spying)
    return calls


def test_the_preset_runs(policy, scorer, data, tmp_path, monkeypatch):
    """Critic first, k1 in the reward, beta constant, ptx, 4 mini-batches in one pass over the buffer."""
    used, rehearsed = spy(monkeypatch, "mini_batch_advantages"), spy(monkeypatch, "rehearse")
    metrics = run(policy, scorer, data, tmp_path, ptx_dataset_name=data["rehearsal"], total_steps=3)
    assert [len(mask) for (_, mask, *_), *_ in used] == [2] * 12
    assert all(switches == (True, INF) for (_, _, *switches), *_ in used for switches in [tuple(switches)])
    assert ["loss/ptx_nll" in row for row in metrics] == [False, False, True, True] and len(rehearsed) == 8
    assert {args[0].rehearsal_coef for args, *_ in rehearsed} == {0.01}
    assert {row["objective/kl_coef"] for row in metrics[1:]} == {0.02}
    assert not {"loss/kl_avg", "loss/entropy_avg", "loss/rehearsal_nll"} & set().union(*metrics)
    kl = [row["objective/kl"] for row in metrics[1:]]
    assert kl[:2] == pytest.approx([0, 0], abs=1e-5) and abs(kl[2]) > 1e-4


@pytest.mark.parametrize("estimator", ["k1", "k2"])
def test_where_the_kl_is_paid(estimator, policy, scorer, data, tmp_path, monkeypatch):
    """With the weight of D_R's prompts: in the reward or in the loss, and never in both."""
    paid, updates = spy(monkeypatch, "add_advantages"), spy(monkeypatch, "update")
    flags = {"kl_coef": 0.5, "rehearsal_dataset_name": data["rehearsal"], "rehearsal_kl_weight": 4.0}
    metrics = run(policy, scorer, data, tmp_path, kl_estimator=estimator, global_batch_size=12, **flags)
    in_reward, in_loss = (calls[0][0][-1] for calls in (paid, updates))
    beta, other = (in_reward, in_loss) if estimator == "k1" else (in_loss, in_reward)
    assert beta.shape == (12, 1) and set(beta.flatten().tolist()) == {0.5, 2.0}
    assert other is None if estimator == "k1" else not other.any()
    assert ("loss/kl_avg" in metrics[2]) == (estimator == "k2")


def test_beta_follows_the_kl_from_the_first_update_of_the_policy_on(policy, scorer, data, tmp_path, monkeypatch):
    paid = spy(monkeypatch, "add_advantages")
    flags = {"total_steps": 4, "kl_target": 0.5, "kl_horizon": 80}
    metrics = run(policy, scorer, data, tmp_path / "adaptive", **flags)[1:]
    betas = [row["objective/kl_coef"] for row in metrics]
    assert betas[:2] == [0.02, 0.02]  # the critic alone, KL 0: nothing to control
    for row, before, after in zip(metrics[1:], betas[1:], betas[2:], strict=False):
        error = min(max(row["objective/kl"] / 0.5 - 1, -0.2), 0.2)
        assert after == pytest.approx(before * (1 + error / 10), rel=1e-12)
    assert betas[2] < 0.02 and [args[-1].unique().tolist() for args, *_ in paid] == [[pytest.approx(b)] for b in betas]
    constant = run(policy, scorer, data, tmp_path / "constant", total_steps=4)[1:]
    same = [{**row, "objective/kl_coef": 0} == {**other, "objective/kl_coef": 0}
            for row, other in zip(metrics, constant, strict=True)]  # fmt: skip
    assert same == [True, True, False, False]


def test_the_critic_starts_where_it_is_told(policy, scorer, data, tmp_path, monkeypatch):
    rolls = spy(monkeypatch, "score_rollout")
    for start in ("scorer", "policy"):
        run(policy, scorer, data, tmp_path / start, critic_init=start)
    (_, of_scorer, scorers), _, (_, of_policy, policys), _ = rolls
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
    critic = ppo_max.on_backbone(model, 0.1)
    weight = torch.nn.init.normal_(model.score.weight).detach().clone().requires_grad_()
    engine = engines.Engine(model, 1e-3, max_grad_norm=INF)
    values = engines.OnBackbone(engine, critic)
    (lp, mask), v = utils.response_logprobs(engine, *batch), values(*batch)
    engine.backward(lp[mask].sum())
    values.backward(0.3 * (v[mask] - 1).square().sum())
    out = other(ids, output_hidden_states=True)
    where = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3)]
    loss = sum(out.logits[r, t].log_softmax(-1)[ids[r, t + 1]] for r, t in where)
    loss = loss + 0.3 * sum((out.hidden_states[-1][r, t] @ weight[0] - 1).square() for r, t in where)
    loss.backward()
    assert torch.allclose(model.score.weight.grad, weight.grad, atol=1e-4)
    theirs = dict(other.named_parameters())
    for name, p in model.named_parameters():
        assert name == "score.weight" or torch.allclose(p.grad, theirs[name].grad, atol=1e-4), name
    start = model.score.weight.detach().clone()
    assert values.step() == 0 and engine.step() > 0
    assert (model.score.weight - start).abs().max().item() == pytest.approx(0.1, rel=1e-3)  # AdamW's first step
    assert (model.lm_head.weight - other.lm_head.weight).abs().max().item() == pytest.approx(1e-3, rel=1e-3)


def test_a_critic_on_the_backbone_trains_is_resumed_and_is_no_part_of_the_saved_policy(
    policy, scorer, data, tmp_path, monkeypatch
):
    flags = {"critic_init": "backbone", "critic_warmup_steps": 0}
    monkeypatch.setattr(
        ppo_max, "make_engine", lambda args, module, *a, **k: made.append(module) or make(args, module, *a, **k)
    )
    made, make = [], engines.make_engine
    ppo_max.main(rich(policy, scorer, data, tmp_path / "whole", **flags))
    assert len(made) == 1  # one model is trained
    rows = sr.metrics_of(tmp_path / "whole")
    assert all(row["loss/value_avg"] > 0 for row in rows[1:]) and made[0].score.weight.abs().max() > 0
    saved = load_file(tmp_path / "whole" / "model" / "model.safetensors")
    assert saved.keys() == load_file(Path(policy) / "model.safetensors").keys()
    sr.stop_in(rich(policy, scorer, data, tmp_path / "run", **flags), 4, module=ppo_max)
    ppo_max.main(rich(policy, scorer, data, tmp_path / "run", resume=True, **flags))
    assert sr.same_run(tmp_path / "run", tmp_path / "whole") == (True, True, True)


def test_explain_shows_the_advantages_as_they_are_used(policy, scorer, data, tmp_path, capsys):
    ppo_max.main(args_for(policy, data, tmp_path, reward_model_path=scorer, explain=True))
    assert "A used has mean 0.0000, std 1.0000" in capsys.readouterr().out


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
    load, endless = ppo_max.load_checkpoint, ppo_max.endless
    if piece == "controller":
        monkeypatch.setattr(ppo_max, "load_checkpoint", lambda *a: load(*a) | {"controller": {}})
    if piece == "ptx position":
        drawing = lambda items, seed, skip: endless(items, seed, skip + (not isinstance(items, range)))  # noqa: E731
        monkeypatch.setattr(ppo_max, "endless", drawing)
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


# --- the ablation ---------------------------------------------------------------------------------------------------------


def test_rows_of_the_ablation():
    defaults = {f.name: f.default for f in fields(ppo_max.Args) if f.default is not MISSING}
    once = {"buffer", "ptx_dataset_name", "critic_warmup_steps"}  # a size, a file, a number of steps of the toy world's
    assert all(defaults[flag] == value for flag, value in ablation.MAX.items() if flag not in once)
    assert all(
        defaults[flag] != value for flag, value in ablation.PLAIN.items() if flag != "buffer" and "ptx" not in flag
    )
    assert all(defaults[f] != v for on in ablation.BESIDE.values() for f, v in on.items() if f not in ("kl_coef",))
    assert len(ablation.ROWS) == 2 + 2 * (11 + 5)
    for name, (on, off) in ablation.PRESET.items():
        one = ablation.ROWS[f"plain + {name}"]
        assert {flag for flag in one if one[flag] != ablation.PLAIN.get(flag)} <= set(on), name
        one = ablation.ROWS[f"PPO-max - {name}"]
        assert {flag for flag in ablation.MAX if one[flag] != ablation.MAX[flag]} == set(off), name


def test_every_row_makes_as_many_updates_from_as_many_responses():
    args = ablation.Args("out")
    jobs = ablation.jobs_of(args, ablation.SETTINGS["full"])
    assert len(jobs) == 3 * len(ablation.ROWS) == len({job.folder for job in jobs})
    for job in jobs:
        flags = ppo_max.Args(**job.args)
        learning = flags.total_steps - flags.critic_warmup_steps
        assert (learning * flags.global_batch_size, learning * flags.num_mini_batches) == (48 * 128, 48 * 4)
        assert flags.total_steps % flags.eval_steps == 0 or flags.eval_steps < flags.total_steps


def test_the_table():
    metrics = {metric: [1.0, 2.0] for metric in ablation.COLUMNS}
    lines = ablation.markdown({"plain PPO": metrics, "PPO-max": metrics}).splitlines()
    assert len(lines) == 4 and lines[2].startswith("| plain PPO | 1.50 (1.00 to 2.00) |")
    assert {line.count("|") for line in lines} == {len(ablation.COLUMNS) + 2}
