"""ppo_sr.py as a run: against a naive PPO, killed and resumed, with scorers of other tokenizers, and what stops it.

The models are random and speak words, so that every response is text which another tokenizer can read.
"""

import contextlib
import copy
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GenerationMixin,
    GPT2LMHeadModel,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    RobertaConfig,
    TopKLogitsWarper,
)

import instruments
import ppo_max
import ppo_sr
from ppo_sr import Args
from tests.conftest import SENTENCE, gpt2_config
from tests.reference_ppo import ROLLOUT, ReferencePPO
from tests.test_data import jsonl, refused
from engines import Engine
from utils import InputError, Scorer, run_cli

ROOT = Path(ppo_sr.__file__).parent
WORDS = list(dict.fromkeys(SENTENCE.replace(",", "").replace(".", "").split()))
SMALL = {"n_embd": 16, "n_layer": 1, "n_positions": 64}
MODULES = [ppo_sr, ppo_max]

pytestmark = pytest.mark.usefixtures("one_thread")


def word_tokenizer(*vocabulary, eos="<eos>"):
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token=eos, unk_token="<unk>")


@pytest.fixture(scope="module")
def words():
    return word_tokenizer("<pad>", "<eos>", "<unk>", *WORDS)


def save_model(factory, config, tokenizer, folder, seed):
    torch.manual_seed(seed)
    factory.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def policy(words, tmp_path_factory):
    """Dropout stands in its config, as in a published GPT-2's: the script has to keep it off."""
    dropout = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
    config = gpt2_config(words, **SMALL, **dropout)
    return save_model(AutoModelForCausalLM, config, words, tmp_path_factory.mktemp("words"), 0)


@pytest.fixture(scope="module")
def scorer(words, tmp_path_factory):
    config = gpt2_config(words, **SMALL, num_labels=1)
    return save_model(AutoModelForSequenceClassification, config, words, tmp_path_factory.mktemp("scores"), 1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Prompts of two tasks, two test files, and D_R: answers to three of the prompts."""
    folder = tmp_path_factory.mktemp("data")
    prompts = [{"prompt": " ".join(WORDS[i : i + 1 + i % 4]), "task": "bc"[i % 2]} for i in range(11)]
    answers = [row | {"response": " ".join(WORDS[i + 2 : i + 3 + i])} for i, row in enumerate(prompts[:3])]
    files = {"prompts": prompts, "main": prompts[4:7], "forget": prompts[7:9], "rehearsal": answers}
    return {name: jsonl(folder / f"{name}.jsonl", *rows) for name, rows in files.items()}


def args_for(policy, data, out, **changes):
    sizes = {"response_length": 6, "max_length": 24, "global_batch_size": 6, "per_device_eval_batch_size": 4}
    sizes |= {"per_device_train_batch_size": 4, "rehearsal_batch_size": 2, "total_steps": 2}
    rates = {"learning_rate": 1e-3, "critic_learning_rate": 3e-3}
    paths = {"model_name_or_path": policy, "dataset_name": data["prompts"], "output_dir": str(out)}
    return Args(**paths | sizes | rates | changes)


def lines_of(path):
    """The lines of a .jsonl file without the clock."""
    rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def metrics_of(folder):
    return lines_of(Path(folder) / "metrics.jsonl")


def weights_of(folder):
    return load_file(Path(folder) / "model" / "model.safetensors")


def same_run(one, other):
    """Metrics, samples and weights, bit for bit."""
    logs = [lines_of(Path(one) / name) == lines_of(Path(other) / name) for name in ("metrics.jsonl", "samples.jsonl")]
    a, b = weights_of(one), weights_of(other)
    return (*logs, a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a))


def spy(monkeypatch, name):
    """Calls of a function of ppo_sr.py: a list of (arguments, result)."""
    function, calls = getattr(ppo_sr, name), []

    def spying(*args):
        calls.append((args, function(*args)))
        return calls[-1][1]

    monkeypatch.setattr(ppo_sr, name, spying)
    return calls


# --- against a PPO written once more ------------------------------------------------------------------------------------

REHEARSAL = {"rehearsal_batch_size": 4, "rehearsal_coef": 0.3}
CASES = {
    "plain": {},
    "rehearsal, mean": REHEARSAL | {"rehearsal_reduction": "mean"},
    "rehearsal, sum": REHEARSAL | {"rehearsal_reduction": "sum"},
    "moving average": {"score_normalization": "moving_average", "moving_average_decay": 0.99},
    "historical mean and std": {"score_normalization": "moving_average", "moving_average_decay": 1.0},
    "score clip": {"score_clip": 0.7},
    "missing <eos>": {"missing_eos_penalty": 1.5},
    "score scale": {"score_scale": 0.25},
    "no whitening": {"whiten_advantages": False},
    "critic first": REHEARSAL | {"critic_warmup_steps": 2},
    "KL weight of a row": {"rehearsal_kl_weight": 4.0},
    "temperature": {"temperature": 0.7},
    "gamma, lambda": {"gamma": 0.9, "lam": 0.5},
    "one mini-batch": {"num_mini_batches": 1, "per_device_train_batch_size": 100, "per_device_eval_batch_size": 100},
    "gradient clip": {"max_grad_norm": 0.05},
    "value weight": {"vf_coef": 0.1},
    "all at once": REHEARSAL
    | {"rehearsal_reduction": "sum", "score_normalization": "moving_average", "moving_average_decay": 0.9}
    | {"score_scale": 0.5, "score_clip": 1.2, "missing_eos_penalty": 0.5, "critic_warmup_steps": 1, "gamma": 0.95}
    | {"temperature": 1.3, "rehearsal_kl_weight": 3.0, "cliprange": 0.1, "cliprange_value": 0.05, "vf_coef": 0.5},
}


@pytest.fixture
def float64(monkeypatch):
    """Everything in double precision, casts to float32 included. A parameter whose gradient is 0 but for rounding (the
    biases of the attention's keys) moves under Adam by the sign of the rounding error, so that two correct programs in
    float32 part by as much as the learning rate."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def three_models(tokenizer):
    """Policy, pi_init and critic, which differ, so that KL and values are not 0 at the start."""
    torch.manual_seed(7)
    config, scores = gpt2_config(tokenizer, **SMALL), gpt2_config(tokenizer, **SMALL, num_labels=1)
    causal = [AutoModelForCausalLM.from_config(config).eval() for _ in range(2)]
    return *causal, AutoModelForSequenceClassification.from_config(scores).eval()


def fixed_batch(step, vocabulary, eos, count=8):
    """Sequences of 1 to 6 + 1 to 7 tokens, a third of them without <eos>, their raw scores, and whether they are in D_R."""
    draw = torch.Generator().manual_seed(step)
    sequences = []
    for i in range(count):
        x = torch.randint(3, vocabulary, (1 + i % 6,), generator=draw).tolist()
        y = torch.randint(3, vocabulary, (1 + (3 * i + step) % 7,), generator=draw).tolist()
        sequences.append((x, [*y[:-1], eos] if i % 3 else y))
    scores = (2 * torch.randn(count, generator=draw) + 0.5).tolist()
    return sequences, scores, [i % 4 == 1 for i in range(count)]


def rehearsal_rows(args, vocabulary):
    """D_R for ever, where the case has one: (ids, prompt_len)."""
    if args.rehearsal_coef < 0.1:
        return None
    draw = torch.Generator().manual_seed(99)
    rows = [torch.randint(3, vocabulary, (4 + i % 5,), generator=draw).tolist() for i in range(7)]
    return itertools.cycle([(ids, 1 + i % 3) for i, ids in enumerate(rows)])


def flags_of(case, module=ppo_sr):
    """A case on ppo_sr.py's defaults: ppo_max.py has its own preset, and what it alone has is off."""
    off = {f.name: f.default for f in fields(Args) if f.default is not MISSING}
    off |= {"whiten_mini_batches": False} if module is ppo_max else {}
    common = {"learning_rate": 3e-3, "critic_learning_rate": 5e-3, "kl_coef": 0.2, "num_mini_batches": 2}
    common |= {"per_device_train_batch_size": 3, "per_device_eval_batch_size": 3}  # divides neither 4 nor 8
    return module.Args("", "", "", **off | common | case)


def run_script(module, args, models, tokenizer, folder, steps, ptx_rows=None):
    """The script's own stages on the fixed batches -> [(rollout, dials)], policy, critic; ptx_rows: ppo_max.py's."""
    policy, reference, critic = (copy.deepcopy(model) for model in models)
    critic = module.Critic(Scorer(critic), args.score_scale)
    engines = [Engine(policy, args.learning_rate, max_grad_norm=args.max_grad_norm)]
    engines.append(Engine(critic, args.critic_learning_rate, max_grad_norm=args.max_grad_norm))
    average, history = module.MovingAverage(args.moving_average_decay), []
    rows = rehearsal_rows(args, len(tokenizer))
    for step in range(1, steps + 1):
        sequences, scores, inside = fixed_batch(step, len(tokenizer), tokenizer.eos_token_id)

        def score(batch_rows, batch, texts, finished, scores=scores):
            return torch.tensor(scores)

        roll = module.score_rollout(args, tokenizer, policy, reference, critic, score, sequences, sequences)
        betas = args.kl_coef * torch.where(torch.tensor(inside), args.rehearsal_kl_weight, 1.0)[:, None]
        in_loss = getattr(args, "kl_estimator", "k1") != "k1"
        module.add_advantages(args, roll, average, 0.0 * betas if in_loss else betas)
        more = (ptx_rows, betas if in_loss else None) if module is ppo_max else ()
        torch.manual_seed(step)
        dials = module.update(args, step, *engines, tokenizer.pad_token_id, roll, rows, folder, *more)
        history.append((roll, dials))
    return history, policy, critic.model


def run_reference(args, models, tokenizer, steps, reference=ReferencePPO):
    ppo, history, eos = reference(args, *models), [], tokenizer.eos_token_id
    rows = rehearsal_rows(args, len(tokenizer))
    for step in range(1, steps + 1):
        sequences, scores, inside = fixed_batch(step, len(tokenizer), eos)
        betas = [args.kl_coef * (args.rehearsal_kl_weight if of_rehearsal else 1) for of_rehearsal in inside]
        roll = ppo.rollout(sequences, scores, [y[-1] == eos for _, y in sequences], betas)
        torch.manual_seed(step)
        history.append((roll, ppo.update(step, sequences, roll, rows)))
    return history, ppo.policy, ppo.critic


def worst(one, other):
    """Largest difference of two models' parameters, by name."""
    other = dict(other.named_parameters())
    return {name: (p - other[name]).abs().max().item() for name, p in one.named_parameters()}


def compare(ours, reference, tolerance):
    """Rollouts and dials of every step."""
    for (roll, dials), (expected, expected_dials) in zip(ours, reference, strict=True):
        assert roll.scores.tolist() == pytest.approx(expected["scores"], abs=tolerance)
        lengths = [len(y) for _, y in roll.sequences]
        for name in ROLLOUT:
            matrix = getattr(roll, name)
            for row, length, wanted in zip(matrix, lengths, expected[name], strict=True):
                assert row[:length].tolist() == pytest.approx(wanted.tolist(), abs=tolerance), name
                assert name == "values" or not row[length:].any(), name
        assert dials.keys() - {"val/first_ratio_error"} == expected_dials.keys()
        assert {name: dials[name] for name in expected_dials} == pytest.approx(expected_dials, abs=tolerance)
        assert dials["val/first_ratio_error"] < 1e-5


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_reference(case, module, words, tmp_path, float64):
    """2 or 3 updates of 2 epochs x 2 mini-batches: log-probs, values, Eq. 2, GAE, losses, dials and weights to 1e-9."""
    args, models = flags_of(CASES[case], module), three_models(words)
    remembers = args.score_normalization != "none" or args.critic_warmup_steps
    steps = 3 if remembers else 2
    ours, policy, critic = run_script(module, args, models, words, tmp_path, steps)
    reference, ref_policy, ref_critic = run_reference(args, models, words, steps)
    compare(ours, reference, 1e-9)
    assert max(worst(policy, ref_policy).values()) < 1e-9
    assert max(worst(critic, ref_critic).values()) < 1e-9
    assert max(worst(policy, models[0]).values()) > 1e-3  # and the weights did move,
    assert ours[-1][1]["policy/clipfrac_avg"] > 0.01  # far enough for ratios to be clipped


def test_equals_the_reference_in_float32(words, tmp_path):
    """As it runs: at a rate where 12 optimiser steps move the weights by 1e-4, they agree to 1e-6, but for key biases."""
    args = flags_of(REHEARSAL | {"learning_rate": 1e-5, "critic_learning_rate": 1e-5})
    models = three_models(words)
    ours, *ours_models = run_script(ppo_sr, args, models, words, tmp_path, 3)
    reference, *reference_models = run_reference(args, models, words, 3)
    compare(ours, reference, 1e-5)
    for mine, other, start in zip(ours_models, reference_models, (models[0], models[2]), strict=True):
        for model in (mine, other):
            bias = next(p for name, p in model.named_parameters() if name.endswith("c_attn.bias"))
            bias.data[SMALL["n_embd"] : 2 * SMALL["n_embd"]] = 0
        assert max(worst(mine, other).values()) < 1e-6
        assert max(v for k, v in worst(mine, start).items() if "bias" not in k) > 5e-5


ADVANTAGES = {"advantages", "returns"}
TERMS = {  # switch: what of the rollout it may change, and whose weights after one update
    "kl_coef": (0.0, {"rewards", *ADVANTAGES}, "both"),
    "rehearsal_kl_weight": (4.0, {"rewards", *ADVANTAGES}, "both"),
    "score_clip": (0.7, {"scores", "rewards", *ADVANTAGES}, "both"),
    "score_scale": (0.5, {"scores", "values", "rewards", *ADVANTAGES}, "both"),
    "score_normalization": ("moving_average", {"scores", "rewards", *ADVANTAGES}, "both"),
    "missing_eos_penalty": (1.0, {"scores", "rewards", *ADVANTAGES}, "both"),
    "gamma": (0.9, ADVANTAGES, "both"),
    "lam": (0.5, ADVANTAGES, "both"),
    "whiten_advantages": (False, {"advantages"}, "policy"),
    "cliprange": (0.01, set(), "policy"),
    "cliprange_value": (0.01, set(), "critic"),
    "vf_coef": (0.01, set(), "critic"),
    "max_grad_norm": (0.01, set(), "both"),
    "critic_warmup_steps": (1, set(), "policy"),
    "rehearsal_coef": (0.3, set(), "policy"),
    "temperature": (0.5, {"logprobs", "ref_logprobs", "entropy", "rewards", *ADVANTAGES}, "both"),
}


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_each_switch_changes_the_term_that_it_names(module, words, tmp_path, float64):
    models = three_models(words)
    ((plain, _),), *plain_models = run_script(module, flags_of({}, module), models, words, tmp_path, 1)
    for switch, (value, terms, trained) in TERMS.items():
        ((roll, _),), *trained_models = run_script(
            module, flags_of({switch: value}, module), models, words, tmp_path, 1
        )
        assert torch.equal(roll.raw_scores, plain.raw_scores)
        assert {
            name for name in ("scores", *ROLLOUT) if not torch.equal(getattr(roll, name), getattr(plain, name))
        } == terms
        changed = [
            max(worst(one, other).values()) > 1e-9 for one, other in zip(trained_models, plain_models, strict=True)
        ]
        assert changed == [trained in ("policy", "both"), trained in ("critic", "both")], switch


# --- kill and resume ----------------------------------------------------------------------------------------------------


def gold(prompts, responses):
    return [len(set(response.split())) / 6 for response in responses]


def rich(policy, data, out, scorer, **changes):
    """A run in which every piece of state matters: 6 steps, checkpoints after 2, 4 and 6, passes that end mid-step."""
    flags = {"reward_model_path": scorer, "rehearsal_dataset_name": data["rehearsal"], "rehearsal_coef": 0.1}
    flags |= {"eval_dataset_names": (data["main"], data["forget"]), "eval_steps": 2, "total_steps": 6, "save_steps": 2}
    flags |= {"score_normalization": "moving_average", "moving_average_decay": 0.9, "num_mini_batches": 2}
    flags |= {"critic_warmup_steps": 1, "gold_reward": "tests.test_ppo_sr:gold", "num_samples_logged": 3}
    return args_for(policy, data, out, **flags | changes)


def command(args):
    flags = [(f.name, getattr(args, f.name)) for f in fields(args) if getattr(args, f.name) != f.default]
    parts = [(f"--{name}", *(map(str, v) if isinstance(v, tuple) else [str(v)])) for name, v in flags]
    return [sys.executable, "ppo_sr.py", *itertools.chain(*parts)]


@contextlib.contextmanager
def alarm_lines():
    """Alarm lines of the runs inside, in which val/ratio leaves its band at step 1 and never comes back."""
    lines, ring = [], instruments.Alarms.ring

    def listening(self, step, metrics):
        rung = ring(self, step, metrics)
        lines.extend(rung)
        return rung

    with pytest.MonkeyPatch.context() as patch:
        band = instruments.BANDS["val/ratio"]._replace(low=2.0, high=3.0)
        patch.setitem(instruments.BANDS, "val/ratio", band)
        patch.setattr(instruments.Alarms, "ring", listening)
        yield lines


def stop_in(args, step, function="add_advantages", module=ppo_sr):
    """The run, ended in the middle of a step by an exception in `function`, which is called once a step."""
    original, calls = getattr(module, function), Counter()

    def stopping(*a):
        calls["step"] += 1
        if calls["step"] == step:
            raise Stopped
        return original(*a)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(module, function, stopping)
        module.main(args)


class Stopped(Exception):
    pass


@pytest.fixture(scope="module")
def whole(policy, scorer, data, tmp_path_factory):
    """The run that is never stopped, and its alarms."""
    out = tmp_path_factory.mktemp("whole")
    with alarm_lines() as lines:
        ppo_sr.main(rich(policy, data, out, scorer))
    return out, lines


@pytest.fixture(scope="module")
def stopped(policy, scorer, data, tmp_path_factory):
    """The same stopped in step 5, as often as it is asked for: a function that brings the folder back as it was left."""
    out, kept = tmp_path_factory.mktemp("stopped"), tmp_path_factory.mktemp("kept")
    with alarm_lines():
        stop_in(rich(policy, data, out, scorer), 5)
    shutil.copytree(out, kept, dirs_exist_ok=True)

    def restored():
        shutil.rmtree(out)
        return shutil.copytree(kept, out)

    return restored


def test_the_whole_run_is_rich(whole, policy):
    out, alarms = whole
    metrics = metrics_of(out)
    assert [row["step"] for row in metrics] == list(range(7))
    seen = set().union(*metrics)
    assert {"task/b/kl", "task/c/score", "objective/gold", "eval/main/gold", "loss/rehearsal_nll"} <= seen
    assert [("eval/forget/kl" in row) for row in metrics] == [True, False, True, False, True, False, True]
    assert "loss/rehearsal_nll" not in metrics[1]  # the critic alone
    assert metrics[0]["eval/main/kl"] == pytest.approx(0, abs=1e-6)
    assert metrics[6]["eval/main/delta_score"] == metrics[6]["eval/main/score"] - metrics[0]["eval/main/score"]
    assert 0 < sum(row["val/num_eos_tokens"] for row in metrics[1:]) < 36  # some ended, some were cut
    samples = Counter((row["step"], row["set"]) for row in lines_of(out / "samples.jsonl"))
    tests = {(step, name): n for step in (0, 2, 4, 6) for name, n in (("main", 3), ("forget", 2))}
    assert samples == tests | {(step, "train"): 3 for step in (2, 4, 6)}
    start, end = load_file(Path(policy) / "model.safetensors"), weights_of(out)
    assert all(not torch.equal(start[k], end[k]) for k in end)
    assert sum("val/ratio" in line for line in alarms) == 1 and "step 1:" in alarms[0]


def test_killed_at_any_moment_and_resumed_it_ends_as_if_never_stopped(
    policy, scorer, data, whole, tmp_path, monkeypatch
):
    """SIGKILL in step 5, half a line of each log and half a checkpoint left behind; started again by its command line."""
    args = rich(policy, data, tmp_path / "run", scorer)
    environ = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(command(args), cwd=ROOT, env=environ, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    metrics, started = tmp_path / "run" / "metrics.jsonl", time.time()
    while not (metrics.is_file() and metrics.read_text().count("\n") >= 5):
        assert process.poll() is None, process.stderr.read().decode()
        assert time.time() - started < 240
        time.sleep(0.002)
    time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "run" / "model").exists()
    folder = tmp_path / "run" / "checkpoint"
    assert torch.load(folder / "state.pt", weights_only=True)["step"] in (2, 4)
    for name in ("metrics.jsonl", "samples.jsonl"):
        with open(tmp_path / "run" / name, "a", encoding="utf-8") as file:
            file.write('{"step": 4, "sco')
    (folder / "state.pt.tmp").write_bytes(b"half of it")

    again = rich(policy, data, tmp_path / "run", scorer, resume=True)
    monkeypatch.setattr(sys, "argv", command(again)[1:])
    run_cli(ppo_sr.main, Args, "")
    assert same_run(tmp_path / "run", whole[0]) == (True, True, True)
    assert torch.load(folder / "state.pt", weights_only=True)["step"] == 6


def forget(piece, monkeypatch):
    """The mutants: a piece of state that the resumed run does not get back."""
    fresh = {"moving_average": vars(ppo_sr.MovingAverage(0.9)), "alarms": instruments.Alarms().state()}
    load, endless = ppo_sr.load_checkpoint, ppo_sr.endless

    def loading(*a):
        saved = load(*a)
        if piece == "start":
            saved["start"] = {key: value + 1 for key, value in saved["start"].items()}
        elif piece in fresh:
            saved[piece] = fresh[piece]
        elif piece in ("policy's moments", "critic's moments"):
            saved[piece.split("'")[0]].pop("optimizer")
        return saved

    def drawing(items, seed, skip):
        return endless(items, seed, skip + (piece == ("prompts" if isinstance(items, range) else "rehearsal rows")))

    monkeypatch.setattr(ppo_sr, "load_checkpoint", loading)
    monkeypatch.setattr(ppo_sr, "endless", drawing)
    if piece == "RNG":
        monkeypatch.setattr(torch, "set_rng_state", lambda state: None)


PIECES = ("nothing", "RNG", "prompts", "rehearsal rows", "start", "moving_average", "alarms", "policy's moments")


@pytest.mark.parametrize("piece", [*PIECES, "critic's moments"])
def test_every_piece_of_state_is_kept_and_needed(piece, policy, scorer, data, whole, stopped, monkeypatch):
    """Stopped in step 5: with all of its state a run goes on as `whole` does, without a piece of it otherwise."""
    forget(piece, monkeypatch)
    out, late = stopped(), [line for line in whole[1] if re.search(r"step [56]:", line)]
    assert lines_of(out / "metrics.jsonl") == metrics_of(whole[0])[:5]
    with alarm_lines() as lines:
        ppo_sr.main(rich(policy, data, out, scorer, resume=True))
    metrics, samples, weights = same_run(out, whole[0])
    assert metrics == (piece in ("nothing", "alarms")), piece
    assert weights == (piece in ("nothing", "alarms", "start")), piece
    assert samples or not weights, piece
    assert (lines == late) == (piece != "alarms"), piece


def test_killed_before_the_first_checkpoint_it_starts_over(policy, scorer, data, whole, tmp_path):
    stop_in(rich(policy, data, tmp_path, scorer), 2)
    assert len(metrics_of(tmp_path)) == 2 and not (tmp_path / "checkpoint").exists()
    ppo_sr.main(rich(policy, data, tmp_path, scorer, resume=True))
    assert same_run(tmp_path, whole[0]) == (True, True, True)


def test_resuming_after_the_last_step_changes_nothing(policy, scorer, data, stopped, whole):
    out = stopped()
    for _ in range(2):
        ppo_sr.main(rich(policy, data, out, scorer, resume=True))
        assert same_run(out, whole[0]) == (True, True, True)


@pytest.mark.parametrize(
    "changes",
    [{"kl_coef": 0.07}, {"total_steps": 7}, {"eval_dataset_names": ()}],
    ids=lambda changes: next(iter(changes)),
)
def test_resume_with_another_flag_is_refused_by_name(changes, policy, scorer, data, stopped):
    out = stopped()
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with refused(*(f"--{name}" for name in changes), *changes.values(), "--resume"):
        ppo_sr.main(rich(policy, data, out, scorer, resume=True, **changes))
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name", ["prompts", "rehearsal", "forget"])
def test_resume_with_other_data_is_refused(name, policy, scorer, data, stopped):
    out, file = stopped(), Path(data[name])
    before, lines = file.read_text(), (out / "metrics.jsonl").read_bytes()
    try:
        file.write_text("".join(reversed(before.splitlines(keepends=True))))
        with refused("--resume", "data", out):
            ppo_sr.main(rich(policy, data, out, scorer, resume=True))
    finally:
        file.write_text(before)
    assert (out / "metrics.jsonl").read_bytes() == lines


def test_a_full_disk_leaves_the_last_checkpoint_and_the_run(policy, scorer, data, whole, tmp_path, monkeypatch, capsys):
    """The checkpoint of step 4 does not fit: step 2's stays and can be gone on from, and training goes on to the end."""
    save, steps = torch.save, []

    def filling(state, path):
        steps.append(state["step"])
        if state["step"] == 4:
            Path(path).write_bytes(b"half of it")
            raise OSError(28, "No space left on device")
        save(state, path)

    monkeypatch.setattr(torch, "save", filling)
    state, checkpoint = tmp_path / "run" / "checkpoint" / "state.pt", tmp_path / "of_step_2"
    roll = ppo_sr.score_rollout

    def looking(*a):
        if steps == [2, 4] and not checkpoint.exists():  # in step 5
            shutil.copytree(tmp_path / "run", checkpoint)
        return roll(*a)

    monkeypatch.setattr(ppo_sr, "score_rollout", looking)
    ppo_sr.main(rich(policy, data, tmp_path / "run", scorer))
    said = capsys.readouterr().err
    assert "step 4: no checkpoint written" in said and "No space left" in said and "the last one stays" in said
    assert steps == [2, 4, 6] and torch.load(state, weights_only=True)["step"] == 6
    assert same_run(tmp_path / "run", whole[0]) == (True, True, True)
    assert [path.name for path in (checkpoint / "checkpoint").iterdir()] == ["state.pt"]
    shutil.rmtree(tmp_path / "run")
    checkpoint.rename(tmp_path / "run")
    assert torch.load(state, weights_only=True)["step"] == 2
    ppo_sr.main(rich(policy, data, tmp_path / "run", scorer, resume=True))
    assert same_run(tmp_path / "run", whole[0]) == (True, True, True)


def test_a_new_run_in_an_old_folder_forgets_the_old_one(policy, scorer, data, stopped, whole):
    out = stopped()
    ppo_sr.main(rich(policy, data, out, scorer))
    assert same_run(out, whole[0]) == (True, True, True)


# --- scorers --------------------------------------------------------------------------------------------------------------


def rollouts(monkeypatch, args):
    """Runs, and returns the rollouts with the critic's weights as they were before the first update."""
    seen, original = [], ppo_sr.score_rollout

    def spying(args, tokenizer, policy, reference, critic, *rest):
        start = {name: v.clone() for name, v in critic.module.model.state_dict().items()}
        seen.append((original(args, tokenizer, policy, reference, critic, *rest), start, rest[1]))
        return seen[-1][0]

    monkeypatch.setattr(ppo_sr, "score_rollout", spying)
    ppo_sr.main(args)
    assert len(seen) == 2 and len(metrics_of(args.output_dir)) == 3
    return seen


def check_starts_from_policy(seen, policy):
    """The critic: the policy's backbone, and V = 0 until it has learned."""
    (first, start, _), (second, _, _) = seen
    weights = {name: v for name, v in load_file(Path(policy) / "model.safetensors").items() if "lm_head" not in name}
    assert all(torch.equal(start[name], v) for name, v in weights.items())
    assert {name for name in start if name not in weights} == {"score.weight"}
    assert not first.values.any() and second.values[second.mask].abs().min() > 0


@torch.no_grad()
def score_alone(folder, *ids, **more):
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    return model(torch.tensor([*ids]), **more).logits.item()


def test_a_scorer_with_the_policy_s_tokenizer_reads_its_tokens_and_starts_the_critic(
    policy, scorer, data, tmp_path, monkeypatch
):
    seen = rollouts(monkeypatch, args_for(policy, data, tmp_path, reward_model_path=scorer, score_scale=0.5))
    roll, start, _ = seen[0]
    for (x, y), score in zip(roll.sequences, roll.raw_scores.tolist(), strict=True):
        assert score == pytest.approx(score_alone(scorer, x + y), abs=1e-5)
    weights = load_file(Path(scorer) / "model.safetensors")
    assert all(torch.equal(start[name], v * (0.5 if name == "score.weight" else 1)) for name, v in weights.items())
    assert roll.values[roll.mask].abs().min() > 0
    assert torch.equal(roll.scores, roll.raw_scores * 0.5)


def test_a_scorer_with_a_padding_token_more_shares_the_tokenizer(policy, scorer, words, tmp_path):
    other = copy.deepcopy(words)
    other.add_special_tokens({"pad_token": "<|pad|>"})
    model = AutoModelForSequenceClassification.from_pretrained(scorer)
    model.resize_token_embeddings(len(other))
    model.save_pretrained(tmp_path)
    other.save_pretrained(tmp_path)
    _, critic = ppo_sr.load_scorer_and_critic(Args(policy, "", "", reward_model_path=str(tmp_path)), words)
    assert critic.model.score.weight.any()


@pytest.fixture(scope="module")
def other_words():
    """The same words under other ids, and two more of them."""
    return word_tokenizer("<unk>", *reversed(WORDS), "more", "words", "<end>", "<pad>", eos="<end>")


def test_a_scorer_of_another_tokenizer_reads_the_text(policy, other_words, data, tmp_path, monkeypatch):
    config = gpt2_config(other_words, **SMALL, num_labels=1)
    folder = save_model(AutoModelForSequenceClassification, config, other_words, tmp_path / "scorer", 2)
    seen = rollouts(monkeypatch, args_for(policy, data, tmp_path / "run", reward_model_path=folder))
    check_starts_from_policy(seen, policy)
    ids, ends = other_words.get_vocab(), Counter()
    for roll, _, rows in seen:
        for row, text, end, score in zip(
            rows, roll.texts, roll.finished.tolist(), roll.raw_scores.tolist(), strict=True
        ):
            read = [ids[word] for word in f"{row['prompt']} {text}".split()] + [ids["<end>"]] * end  # cut: no <eos>
            assert score == pytest.approx(score_alone(folder, read), abs=1e-5)
            ends[end] += 1
    assert ends[True] and ends[False]


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_an_encoder_scores_in_its_own_form(kind, policy, data, tmp_path, monkeypatch, request):
    tokenizer = request.getfixturevalue(f"{kind}_tokenizer")
    config = {"bert": BertConfig, "roberta": RobertaConfig}[kind](
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=40, pad_token_id=0, num_labels=1, initializer_range=0.3, hidden_dropout_prob=0.1,
        type_vocab_size=2 if kind == "bert" else 1,
    )  # fmt: skip
    folder = save_model(AutoModelForSequenceClassification, config, tokenizer, tmp_path / "scorer", 3)
    seen = rollouts(monkeypatch, args_for(policy, data, tmp_path / "run", reward_model_path=folder))
    check_starts_from_policy(seen, policy)
    ids = tokenizer.get_vocab()
    for roll, _, rows in seen:
        for row, text, score in zip(rows, roll.texts, roll.raw_scores.tolist(), strict=True):
            x, y = ([ids[word] for word in part.split()] for part in (row["prompt"], text))
            read = [2, *x, 3, *y, 3] if kind == "bert" else [2, *x, 3, 3, *y, 3]  # ids of [CLS] or <s>, [SEP] or </s>
            more = {"token_type_ids": torch.tensor([[0] * (len(x) + 2) + [1] * (len(y) + 1)])} if kind == "bert" else {}
            assert score == pytest.approx(score_alone(folder, read, **more), abs=1e-5)


def length(prompts, responses):
    return [
        len(response.split()) + 10 * prompt.startswith("the")
        for prompt, response in zip(prompts, responses, strict=True)
    ]


def one_too_few(prompts, responses):
    return [1.0] * (len(responses) - 1)


def no_number(prompts, responses):
    return ["good"] * len(responses)


def test_a_reward_function_in_the_place_of_a_scorer(policy, data, tmp_path, monkeypatch):
    flags = {"reward_function": "tests.test_ppo_sr:length", "eval_dataset_names": (data["main"],)}
    seen = rollouts(monkeypatch, args_for(policy, data, tmp_path, **flags))
    check_starts_from_policy(seen, policy)
    for roll, _, rows in seen:
        assert roll.raw_scores.tolist() == length([row["prompt"] for row in rows], roll.texts)
    for row in lines_of(tmp_path / "samples.jsonl"):
        assert row["score"] == length([row["prompt"]], [row["response"]])[0]


def test_one_scorer_and_no_more(policy, scorer, data, tmp_path):
    for flags in ({}, {"reward_model_path": scorer, "reward_function": "tests.test_ppo_sr:length"}):
        with refused("--reward_model_path", "--reward_function", "one of them"):
            ppo_sr.main(args_for(policy, data, tmp_path, **flags))


@pytest.mark.parametrize(
    "name",
    [
        "one_too_few",
        "no_such_function",
        "no_number",
    ],
)
def test_a_reward_function_that_is_none_is_refused(name, policy, data, tmp_path):
    with refused("--reward_function", f"tests.test_ppo_sr:{name}"):
        ppo_sr.main(args_for(policy, data, tmp_path, reward_function=f"tests.test_ppo_sr:{name}"))


def test_a_scorer_too_short_for_the_texts_is_refused_before_a_model_runs(policy, other_words, data, tmp_path):
    config = gpt2_config(other_words, **SMALL | {"n_positions": 8}, num_labels=1)
    folder = save_model(AutoModelForSequenceClassification, config, other_words, tmp_path / "scorer", 2)
    with refused("--max_length", "8 positions"):
        ppo_sr.main(args_for(policy, data, tmp_path / "run", reward_model_path=folder))


def test_the_kl_weight_of_a_prompt_in_the_rehearsal_set(policy, scorer, data, tmp_path, monkeypatch):
    flags = {"reward_model_path": scorer, "rehearsal_dataset_name": data["rehearsal"], "rehearsal_kl_weight": 4.0}
    seen = rollouts(monkeypatch, args_for(policy, data, tmp_path, **flags))
    crucial = {row["prompt"] for row in lines_of(data["rehearsal"])}
    weighted = [
        (roll.kl_coef[i].item(), row["prompt"] in crucial) for roll, _, rows in seen for i, row in enumerate(rows)
    ]
    assert weighted == [(pytest.approx(0.2 if inside else 0.05), inside) for _, inside in weighted]
    assert {inside for _, inside in weighted} == {True, False}


# --- what stops a run ---------------------------------------------------------------------------------------------------


def small_run(policy, scorer, data, out, **changes):
    ppo_sr.main(args_for(policy, data, out, reward_model_path=scorer, **changes))


@pytest.mark.parametrize("warp", ["temperature", "top-k"])
def test_a_warped_sampler_stops_before_step_1(warp, policy, scorer, data, tmp_path, monkeypatch):
    generate = GenerationMixin.generate

    def warped(self, *args, **kwargs):
        if warp == "temperature":
            kwargs["temperature"] = 0.5
        else:
            kwargs["logits_processor"] = LogitsProcessorList([TopKLogitsWarper(5)])
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(GPT2LMHeadModel, "generate", warped)
    updates = spy(monkeypatch, "update")
    with refused("first batch: the sampler and the model disagree"):
        small_run(policy, scorer, data, tmp_path)
    assert not updates and not (tmp_path / "model").exists()


def test_the_sampler_s_check_takes_no_randomness_from_the_run(policy, scorer, data, tmp_path, monkeypatch):
    small_run(policy, scorer, data, tmp_path / "checked")
    for module in (ppo_sr, instruments):
        if hasattr(module, "check_sampler"):
            monkeypatch.setattr(module, "check_sampler", lambda *a: None)
    small_run(policy, scorer, data, tmp_path / "unchecked")
    assert same_run(tmp_path / "checked", tmp_path / "unchecked") == (True, True, True)


def test_dropout_in_updates_stops_at_the_first_ratio(policy, scorer, data, tmp_path, monkeypatch):
    update = ppo_sr.update

    def training(args, step, policy_engine, *rest):
        policy_engine.module.train()
        return update(args, step, policy_engine, *rest)

    monkeypatch.setattr(ppo_sr, "update", training)
    with refused("first ratio", "dropout"):
        small_run(policy, scorer, data, tmp_path)
    assert not (tmp_path / "model").exists()


def test_explain_prints_a_batch_and_trains_nothing(policy, scorer, data, tmp_path, monkeypatch, capsys):
    updates = spy(monkeypatch, "update")
    rolls = spy(monkeypatch, "score_rollout")
    small_run(policy, scorer, data, tmp_path, explain=True)
    said = capsys.readouterr().out
    assert not updates and len(rolls) == 1 and not (tmp_path / "model").exists()
    ((_, roll),) = rolls
    assert "[Eq. 2]" in said and "row 0" in said
    for score in roll.raw_scores[:3].tolist():
        assert f"{score:.4f}" in said
    if (tmp_path / "metrics.jsonl").exists():
        assert {row["step"] for row in metrics_of(tmp_path)} <= {0}


def test_explain_leaves_the_run_in_its_folder_alone(policy, scorer, data, tmp_path):
    small_run(policy, scorer, data, tmp_path, eval_steps=1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    small_run(policy, scorer, data, tmp_path, eval_steps=1, explain=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_an_alarm_may_end_the_run(policy, scorer, data, tmp_path, monkeypatch, capsys):
    band = instruments.BANDS["val/ratio"]._replace(low=2.0, high=3.0)
    monkeypatch.setitem(instruments.BANDS, "val/ratio", band)
    flags = {"total_steps": 3, "eval_steps": 3, "eval_dataset_names": (data["main"],)}
    for stop, steps in ((False, [0, 1, 2, 3]), (True, [0, 1])):
        small_run(policy, scorer, data, tmp_path / str(stop), stop_on_alarm=stop, **flags)
        metrics = metrics_of(tmp_path / str(stop))
        assert [row["step"] for row in metrics] == steps
        assert "eval/main/score" in metrics[-1] and "alarm, step 1: val/ratio" in capsys.readouterr().out
    start, end = load_file(Path(policy) / "model.safetensors"), weights_of(tmp_path / "True")
    assert any(not torch.equal(start[k], end[k]) for k in end)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("loss", ["policy_loss", "value_loss", "rehearsal_loss"])
def test_a_gradient_that_is_not_finite_stops_before_the_weights(loss, bad, policy, scorer, data, tmp_path, monkeypatch):
    """From step 2 on: the model that it would reach stays as it was, and the batch is kept."""
    original, calls, models = getattr(ppo_sr, loss), Counter(), []
    update = ppo_sr.update

    def breaking(*a):
        return original(*a) * (bad if calls["step"] == 2 else 1)

    def remembering(args, step, *rest):
        calls["step"] += 1
        for engine in rest[:2]:
            models.append((engine.module, copy.deepcopy(engine.module.state_dict())))
        return update(args, step, *rest)

    monkeypatch.setattr(ppo_sr, loss, breaking)
    monkeypatch.setattr(ppo_sr, "update", remembering)
    rolls = spy(monkeypatch, "score_rollout")
    which = "critic" if loss == "value_loss" else "policy"
    with refused("step 2", f"{which}'s gradient norm", tmp_path / "bad_batch.json", "--learning_rate"):
        small_run(policy, scorer, data, tmp_path, save_steps=1, rehearsal_dataset_name=data["rehearsal"])
    module, before = models[3 if loss == "value_loss" else 2]
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    report = json.loads((tmp_path / "bad_batch.json").read_text())
    assert report["step"] == 2 and len(rolls) == 2
    assert [(x, y) for x, y in report["batch"]] == rolls[1][1].sequences
    assert len(metrics_of(tmp_path)) == 2 and not (tmp_path / "model").exists()
    assert torch.load(tmp_path / "checkpoint" / "state.pt", weights_only=True)["step"] == 1


def test_nll_of_known_answers(policy, scorer, data, words, tmp_path):
    """Test rows with a `response`: the mean over all their tokens, <eos> included, of -log pi_init at step 0."""
    rows = [("b c", "d a"), ("a", "c")]
    known = tmp_path / "known.jsonl"
    known.write_text("".join(json.dumps({"prompt": x, "response": y}) + "\n" for x, y in rows))
    ppo_sr.main(
        args_for(
            policy, data, tmp_path / "out", reward_model_path=scorer, total_steps=1, eval_dataset_names=(str(known),)
        )
    )
    model, logprobs = AutoModelForCausalLM.from_pretrained(policy), []
    for x, y in rows:
        prompt, response = words(x).input_ids, [*words(y).input_ids, words.eos_token_id]
        with torch.no_grad():
            log_softmax = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
        logprobs += [log_softmax[len(prompt) + t - 1, token].item() for t, token in enumerate(response)]
    first = metrics_of(tmp_path / "out")[0]
    assert first["eval/known/nll"] == pytest.approx(-sum(logprobs) / len(logprobs), abs=1e-5) and len(logprobs) == 5


def test_a_new_run_leaves_no_older_checkpoint_to_resume(policy, scorer, data, tmp_path):
    flags = {"reward_model_path": scorer, "save_steps": 1, "total_steps": 2}
    ppo_sr.main(args_for(policy, data, tmp_path / "run", **flags))
    assert (tmp_path / "run" / "checkpoint" / "state.pt").is_file()
    ppo_sr.main(args_for(policy, data, tmp_path / "run", **flags | {"save_steps": 0}))
    assert not (tmp_path / "run" / "checkpoint" / "state.pt").exists()


def test_a_weight_that_weighs_nothing_is_refused(policy, scorer, data, tmp_path):
    with pytest.raises(InputError, match="--rehearsal_kl_weight: needs --rehearsal_dataset_name"):
        ppo_sr.main(args_for(policy, data, tmp_path, reward_model_path=scorer, rehearsal_kl_weight=4.0))


def test_resuming_where_no_checkpoint_is_says_so(policy, scorer, data, tmp_path, capsys):
    ppo_sr.main(args_for(policy, data, tmp_path / "run", reward_model_path=scorer, total_steps=1, resume=True))
    assert f"--resume: no checkpoint in {tmp_path / 'run'}" in capsys.readouterr().err


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
@pytest.mark.parametrize(
    "flag, value",
    dict(
        gamma=2.0, lam=1.5, moving_average_decay=1.1, score_scale=0.0, response_length=0, critic_warmup_steps=100
    ).items(),
)
def test_numbers_out_of_range_are_refused(module, flag, value, policy, tmp_path):
    args = dict(model_name_or_path=str(policy), dataset_name="x", output_dir=str(tmp_path)) | {flag: value}
    with refused(f"--{flag}"):
        module.main(module.Args(**args))


def test_a_line_at_every_evaluation(policy, scorer, data, tmp_path, capsys):
    ppo_sr.main(args_for(policy, data, tmp_path, reward_model_path=scorer, total_steps=3, eval_steps=2))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.split(":")[0] for line in lines] == ["step 2", "step 3"]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert f"kl {rows[2]['objective/kl']:.3g}" in lines[0]


def test_a_ratio_that_is_no_number_stops_the_run(policy, scorer, data, tmp_path, monkeypatch):
    """In one token of the first batch: max(0.0, nan) would be 0."""
    score_rollout = ppo_sr.score_rollout

    def broken(*args):
        rollout = score_rollout(*args)
        rollout.logprobs[0, 0] = math.nan
        return rollout

    monkeypatch.setattr(ppo_sr, "score_rollout", broken)
    with refused("first ratio", "nan"):
        small_run(policy, scorer, data, tmp_path)
