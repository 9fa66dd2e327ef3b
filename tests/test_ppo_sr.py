"""ppo_sr.py as a run: switch by switch, killed and resumed, with scorers of other tokenizers, and what stops it.

The models are random and speak words, so that every response is text which another tokenizer can read.
"""

import copy
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import MISSING, fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationMixin,
    GPT2LMHeadModel,
    LlamaConfig,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    TopKLogitsWarper,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import ppo_sr
import utils
from plumbing import checkpoints, finite
from plumbing.attention import register_attention
from plumbing.command_line import check_flags
from ppo_sr import Args
from tests.conftest import SENTENCE, gpt2_config
from baselines import ppo_max
from tests.test_data import jsonl, refused
from utils import Engine, Scorer, forward_batches, load_policy, response_logprobs, run_cli

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
    """Calls of a method of PPO: a list of (arguments, result)."""
    function, calls = getattr(ppo_sr.PPO, name), []

    def spying(self, *args):
        calls.append((args, function(self, *args)))
        return calls[-1][1]

    monkeypatch.setattr(ppo_sr.PPO, name, spying)
    return calls


# --- each switch, on fixed batches (tests/test_nano.py has whole runs against nano.py) --------------------------------

ROLLOUT = ("logprobs", "ref_logprobs", "entropy", "values", "rewards", "advantages", "returns")  # one value a token


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
    """Sequences of 1 to 6 + 1 to 7 tokens, a third of them without <eos>, and their raw scores."""
    draw = torch.Generator().manual_seed(step)
    sequences = []
    for i in range(count):
        x = torch.randint(3, vocabulary, (1 + i % 6,), generator=draw).tolist()
        y = torch.randint(3, vocabulary, (1 + (3 * i + step) % 7,), generator=draw).tolist()
        sequences.append((x, [*y[:-1], eos] if i % 3 else y))
    scores = (2 * torch.randn(count, generator=draw) + 0.5).tolist()
    return sequences, scores


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
    off |= {"whiten_mini_batches": False, "score_clip": math.inf} if module is ppo_max else {}
    common = {"learning_rate": 3e-3, "critic_learning_rate": 5e-3, "kl_coef": 0.2, "num_mini_batches": 2}
    common |= {"per_device_train_batch_size": 3, "per_device_eval_batch_size": 3}  # divides neither 4 nor 8
    return module.Args("", "", "", "", **off | common | case)


def run_script(module, args, models, tokenizer, folder, steps, ptx_rows=None):
    """The stages of PPO on the fixed batches -> [(rollout, experience, metrics)], policy, critic."""
    policy, reference, critic = (copy.deepcopy(model) for model in models)
    ppo = object.__new__(module.PPOMax if module is ppo_max else ppo_sr.PPO)
    ppo.args, ppo.tokenizer, ppo.reference, ppo.gold_reward = args, tokenizer, reference, None
    norm, rows = {"max_grad_norm": args.max_grad_norm}, rehearsal_rows(args, len(tokenizer))
    ppo.policy = Engine(policy, args.learning_rate, **norm)
    critic = ppo_sr.Critic(Scorer(critic), args.score_scale)
    ppo.critic = Engine(critic, args.critic_learning_rate, **norm)
    ppo.moving_average, history = ppo_sr.MovingAverage(args.moving_average_decay), []
    ppo.rehearsal = [1] if rows else []
    ppo.rehearsal_size = args.rehearsal_batch_size
    ppo.rehearsal_rows = ((ids[:n], ids[n:]) for ids, n in rows or ())
    if module is ppo_max:
        ppo.controller = ppo_max.AdaptiveKL(args.kl_coef, args.kl_target, args.kl_horizon)
        ppo.ptx = [1] if ptx_rows else []
        ppo.ptx_rows = ((ids[:n], ids[n:]) for ids, n in ptx_rows or ())
    log = SimpleNamespace(take_step=lambda engine, *_: engine.step())
    for step in range(1, steps + 1):
        sequences, scores = fixed_batch(step, len(tokenizer), tokenizer.eos_token_id)
        ppo.read_scorer = lambda *batch, scores=scores: torch.tensor(scores)
        rollout = ppo.score([{}] * len(sequences), sequences)
        experience = ppo.advantages(rollout)
        torch.manual_seed(step)
        history.append((rollout, experience, ppo.learn(step, rollout, experience, log)))
    return history, policy, critic.model


def worst(one, other):
    """Largest difference of two models' parameters, by name."""
    other = dict(other.named_parameters())
    return {name: (p - other[name]).abs().max().item() for name, p in one.named_parameters()}


ADVANTAGES = {"advantages", "returns"}
TERMS = {  # switch: what of the rollout it may change, and whose weights after one update
    "kl_coef": (0.0, {"rewards", *ADVANTAGES}, "both"),
    "score_scale": (0.5, {"scores", "values", "rewards", *ADVANTAGES}, "both"),
    "moving_average_decay": (0.99, {"scores", "rewards", *ADVANTAGES}, "both"),
    "missing_eos_penalty": (1.0, {"scores", "rewards", *ADVANTAGES}, "both"),
    "gamma": (0.9, ADVANTAGES, "both"),
    "lam": (0.5, ADVANTAGES, "both"),
    "whiten_advantages": (False, {"advantages"}, "policy"),
    "cliprange": (0.01, set(), "policy"),
    "cliprange_value": (0.01, set(), "critic"),
    "max_grad_norm": (0.01, set(), "both"),
    "critic_warmup_steps": (1, set(), "policy"),
    "rehearsal_coef": (0.3, set(), "policy"),
    "temperature": (0.5, {"logprobs", "ref_logprobs", "entropy", "rewards", *ADVANTAGES}, "both"),
}


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_each_switch_changes_the_term_that_it_names(module, words, tmp_path, float64):
    models = three_models(words)
    (plain,), *plain_models = run_script(module, flags_of({}, module), models, words, tmp_path, 1)
    plain = SimpleNamespace(**vars(plain[0]) | vars(plain[1]))
    for switch, (value, terms, trained) in TERMS.items():
        (roll,), *trained_models = run_script(module, flags_of({switch: value}, module), models, words, tmp_path, 1)
        roll = SimpleNamespace(**vars(roll[0]) | vars(roll[1]))
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
    flags |= {"moving_average_decay": 0.9, "num_mini_batches": 2}
    flags |= {"critic_warmup_steps": 1, "gold_reward": "tests.test_ppo_sr:gold"}
    return args_for(policy, data, out, **flags | changes)


def command(args):
    flags = [(f.name, getattr(args, f.name)) for f in fields(args) if getattr(args, f.name) != f.default]
    parts = [(f"--{name}", *(map(str, v) if isinstance(v, tuple) else [str(v)])) for name, v in flags]
    return [sys.executable, "ppo_sr.py", *itertools.chain(*parts)]


def stop_in(args, step, module=ppo_sr):
    """The run, ended in the middle of a step by an exception, when advantages are to be made."""
    original, calls = ppo_sr.PPO.advantages, Counter()

    def stopping(self, *a):
        calls["step"] += 1
        if calls["step"] == step:
            raise Stopped
        return original(self, *a)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(ppo_sr.PPO, "advantages", stopping)
        module.main(args)


class Stopped(Exception):
    pass


@pytest.fixture(scope="module")
def whole(policy, scorer, data, tmp_path_factory):
    """The run that is never stopped."""
    out = tmp_path_factory.mktemp("whole")
    ppo_sr.main(rich(policy, data, out, scorer))
    return out


@pytest.fixture(scope="module")
def stopped(policy, scorer, data, tmp_path_factory):
    """The same stopped in step 5, as often as it is asked for: a function that brings the folder back as it was left."""
    out, kept = tmp_path_factory.mktemp("stopped"), tmp_path_factory.mktemp("kept")
    stop_in(rich(policy, data, out, scorer), 5)
    shutil.copytree(out, kept, dirs_exist_ok=True)

    def restored():
        shutil.rmtree(out)
        return shutil.copytree(kept, out)

    return restored


def test_the_whole_run_is_rich(whole, policy):
    out, metrics = whole, metrics_of(whole)
    assert [row["step"] for row in metrics] == list(range(7))
    seen = set().union(*metrics)
    assert {"task/b/kl", "task/c/score", "objective/gold", "eval/main/gold", "loss/rehearsal_nll"} <= seen
    assert [("eval/forget/kl" in row) for row in metrics] == [True, False, True, False, True, False, True]
    assert "loss/rehearsal_nll" not in metrics[1]  # the critic alone
    assert metrics[0]["eval/main/kl"] == pytest.approx(0, abs=1e-6)
    assert metrics[6]["eval/main/delta_score"] == metrics[6]["eval/main/score"] - metrics[0]["eval/main/score"]
    assert 0 < sum(row["val/no_eos_share"] for row in metrics[1:]) < len(metrics) - 1  # some ended, some were cut
    samples = Counter((row["step"], row["set"]) for row in lines_of(out / "samples.jsonl"))
    tests = {(step, name): n for step in (0, 2, 4, 6) for name, n in (("main", 3), ("forget", 2))}
    assert samples == tests | {(step, "train"): 6 for step in (2, 4, 6)}
    start, end = load_file(Path(policy) / "model.safetensors"), weights_of(out)
    assert all(not torch.equal(start[k], end[k]) for k in end)


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
    assert same_run(tmp_path / "run", whole) == (True, True, True)
    assert torch.load(folder / "state.pt", weights_only=True)["step"] == 6


def forget(piece, monkeypatch):
    """The mutants: a piece of state that the resumed run does not get back."""
    load, endless = checkpoints.load, ppo_sr.endless

    def loading(log):
        saved = load(log)
        if piece == "start":
            saved["start"] = {key: value + 1 for key, value in saved["start"].items()}
        elif piece == "moving_average":
            saved[piece] = vars(ppo_sr.MovingAverage(0.9))
        elif piece in ("policy's moments", "critic's moments"):
            saved[piece.split("'")[0]]["optimizer"]["state"] = {}
        return saved

    def drawing(items, seed, skip):
        of_prompts = isinstance(items[0][0], dict)  # (row, ids)
        return endless(items, seed, skip + (piece == ("prompts" if of_prompts else "rehearsal rows")))

    monkeypatch.setattr(checkpoints, "load", loading)
    monkeypatch.setattr(ppo_sr, "endless", drawing)
    if piece == "RNG":
        monkeypatch.setattr(torch, "set_rng_state", lambda state: None)


PIECES = ("nothing", "RNG", "prompts", "rehearsal rows", "start", "moving_average", "policy's moments")


@pytest.mark.parametrize("piece", [*PIECES, "critic's moments"])
def test_every_piece_of_state_is_kept_and_needed(piece, policy, scorer, data, whole, stopped, monkeypatch):
    """Stopped in step 5: with all of its state a run goes on as `whole` does, without a piece of it otherwise."""
    forget(piece, monkeypatch)
    out = stopped()
    assert lines_of(out / "metrics.jsonl") == metrics_of(whole)[:5]
    ppo_sr.main(rich(policy, data, out, scorer, resume=True))
    metrics, samples, weights = same_run(out, whole)
    assert metrics == (piece == "nothing"), piece
    assert weights == (piece in ("nothing", "start")), piece
    assert samples or not weights, piece


def test_killed_before_the_first_checkpoint_it_starts_over(policy, scorer, data, whole, tmp_path):
    stop_in(rich(policy, data, tmp_path, scorer), 2)
    assert len(metrics_of(tmp_path)) == 2 and not (tmp_path / "checkpoint").exists()
    ppo_sr.main(rich(policy, data, tmp_path, scorer, resume=True))
    assert same_run(tmp_path, whole) == (True, True, True)


def test_resuming_after_the_last_step_changes_nothing(policy, scorer, data, stopped, whole):
    out = stopped()
    for _ in range(2):
        ppo_sr.main(rich(policy, data, out, scorer, resume=True))
        assert same_run(out, whole) == (True, True, True)


@pytest.mark.parametrize(
    "changes",
    [{"kl_coef": 0.07}, {"total_steps": 3}, {"eval_dataset_names": ()}],
    ids=lambda changes: next(iter(changes)),
)
def test_resume_with_another_flag_is_refused_by_name(changes, policy, scorer, data, stopped):
    out = stopped()
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    values = [list(v) if isinstance(v, tuple) else v for v in changes.values()]
    with refused(*(f"--{name}" for name in changes), *values, "--resume"):
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
    advantages = ppo_sr.PPO.advantages

    def looking(self, *a):
        if steps == [2, 4] and not checkpoint.exists():  # in step 5
            shutil.copytree(tmp_path / "run", checkpoint)
        return advantages(self, *a)

    monkeypatch.setattr(ppo_sr.PPO, "advantages", looking)
    ppo_sr.main(rich(policy, data, tmp_path / "run", scorer))
    said = capsys.readouterr().err
    assert "step 4: no checkpoint written" in said and "No space left" in said and "the last one stays" in said
    assert steps == [2, 4, 6] and torch.load(state, weights_only=True)["step"] == 6
    assert same_run(tmp_path / "run", whole) == (True, True, True)
    assert [path.name for path in (checkpoint / "checkpoint").iterdir()] == ["state.pt"]
    shutil.rmtree(tmp_path / "run")
    checkpoint.rename(tmp_path / "run")
    assert torch.load(state, weights_only=True)["step"] == 2
    ppo_sr.main(rich(policy, data, tmp_path / "run", scorer, resume=True))
    assert same_run(tmp_path / "run", whole) == (True, True, True)


def test_a_stopped_run_goes_on_to_more_steps(policy, scorer, data, stopped, tmp_path):
    """The learning rate is constant: 8 steps are 6 and two more."""
    ppo_sr.main(rich(policy, data, tmp_path / "longer", scorer, total_steps=8))
    out = stopped()
    ppo_sr.main(rich(policy, data, out, scorer, resume=True, total_steps=8))
    assert same_run(out, tmp_path / "longer") == (True, True, True)


def test_a_run_may_move_and_its_data_too(policy, scorer, data, stopped, whole, tmp_path):
    out, moved = stopped(), tmp_path / "moved"
    shutil.copytree(out, moved / "run")
    files = {name: shutil.copy(path, moved / Path(path).name) for name, path in data.items()}
    args = rich(policy, {k: str(v) for k, v in files.items()}, f"{moved}/run/", scorer, resume=True)
    ppo_sr.main(args)
    assert same_run(moved / "run", whole) == (True, True, True)


def test_a_checkpoint_that_is_cut_off_is_named(policy, scorer, data, stopped):
    state = stopped() / "checkpoint" / "state.pt"
    whole = state.read_bytes()
    for size in (0, 5000):
        state.write_bytes(whole[:size])
        with refused(state, "cut off", "remove it"):
            ppo_sr.main(rich(policy, data, state.parents[1], scorer, resume=True))


def test_a_new_run_does_not_touch_the_old_one(policy, scorer, data, stopped):
    out = stopped()
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with refused("--output_dir", out, "--resume True", "another"):
        ppo_sr.main(rich(policy, data, out, scorer))
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


# --- scorers --------------------------------------------------------------------------------------------------------------


def rollouts(monkeypatch, args, main=ppo_sr.main):
    """Runs, and returns the rollouts of its steps with the critic's weights before the first update."""
    seen, original = [], ppo_sr.PPO.advantages

    def spying(self, rollout):
        start = {name: v.clone() for name, v in self.critic.module.model.state_dict().items()}
        seen.append((rollout, start))
        return original(self, rollout)

    monkeypatch.setattr(ppo_sr.PPO, "advantages", spying)
    main(args)
    assert len(seen) == 2 and len(metrics_of(args.output_dir)) == 3
    return seen


@torch.no_grad()
def score_alone(folder, *ids, **more):
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    return model(torch.tensor([*ids]), **more).logits.item()


def test_a_scorer_with_the_policy_s_tokenizer_reads_its_tokens_and_starts_the_critic(
    policy, scorer, data, tmp_path, monkeypatch
):
    seen = rollouts(monkeypatch, args_for(policy, data, tmp_path, reward_model_path=scorer, score_scale=0.5))
    roll, start = seen[0]
    for (x, y), score in zip(roll.sequences, roll.raw_scores.tolist(), strict=True):
        assert score == pytest.approx(score_alone(scorer, x + y), abs=1e-5)
    weights = load_file(Path(scorer) / "model.safetensors")
    assert all(torch.equal(start[name], v * (0.5 if name == "score.weight" else 1)) for name, v in weights.items())
    assert roll.values[roll.mask].abs().min() > 0


def test_a_scorer_with_a_padding_token_more_shares_the_tokenizer(policy, scorer, words, tmp_path):
    other = copy.deepcopy(words)
    other.add_special_tokens({"pad_token": "<|pad|>"})
    model = AutoModelForSequenceClassification.from_pretrained(scorer)
    model.resize_token_embeddings(len(other))
    model.save_pretrained(tmp_path)
    other.save_pretrained(tmp_path)
    ppo = object.__new__(ppo_sr.PPO)
    ppo.args, ppo.tokenizer = Args(policy, "", "", reward_model_path=str(tmp_path)), words
    ppo.load_scorer()
    assert ppo.load_critic(load_policy(policy)).model.score.weight.any()


def test_a_scorer_of_another_tokenizer_is_refused(policy, data, tmp_path):
    other = word_tokenizer("<unk>", *reversed(WORDS), "<end>", "<pad>", eos="<end>")
    config = gpt2_config(other, **SMALL, num_labels=1)
    folder = save_model(AutoModelForSequenceClassification, config, other, tmp_path / "scorer", 2)
    with refused(folder, "tokenizer", "ppo_any_reward"):
        ppo_sr.main(args_for(policy, data, tmp_path / "run", reward_model_path=folder))


def test_a_policy_too_short_for_max_length_is_refused_before_a_model_runs(policy, scorer, data, tmp_path):
    with refused("--max_length", "64 positions"):
        ppo_sr.main(args_for(policy, data, tmp_path, reward_model_path=scorer, max_length=65))


# --- what stops a run ---------------------------------------------------------------------------------------------------


def small_run(policy, scorer, data, out, **changes):
    ppo_sr.main(args_for(policy, data, out, reward_model_path=scorer, **changes))


def test_in_bfloat16_the_first_ratio_is_one_whatever_the_batch(tokenizer):
    """An update's log-probs are bit for bit those of the rollout, though its batches have other rows and widths."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.2, **sizes)
    policy = AutoModelForCausalLM.from_config(config)
    pairs = [(torch.randint(4, 200, (n,)).tolist(), torch.randint(4, 200, (9,)).tolist()) for n in range(6, 54)]
    args = SimpleNamespace(bf16=True, temperature=1.0)
    ppo = SimpleNamespace(policy=policy, tokenizer=tokenizer, args=args)

    def largest_difference():
        def look(*batch):
            return response_logprobs(policy, *batch)[:1]

        [old] = forward_batches(look, pairs, tokenizer.pad_token_id, 64, bf16=True)
        of_update = [ppo_sr.policy_logprobs(ppo, pairs[i : i + 5]) for i in range(0, len(pairs), 5)]
        return (torch.cat(of_update) - old.flatten()).abs().max().item()

    register_attention()
    assert largest_difference() == 0  # with torch's own attention .14


@pytest.mark.parametrize("num_key_value_heads", [1, 2, 4])
def test_attention_written_out_is_torchs_own(num_key_value_heads):
    """Same values and gradients but for bfloat16's rounding; with a mask or in float32 torch's own is called."""
    register_attention()
    attention, module = ALL_ATTENTION_FUNCTIONS["sdpa"], SimpleNamespace(is_causal=True, training=False)
    heads = (4, num_key_value_heads, num_key_value_heads)
    torch.manual_seed(0)
    module.num_key_value_groups = 4 // num_key_value_heads
    qkv = [torch.randn(2, n, 21, 16, dtype=torch.bfloat16, requires_grad=True) for n in heads]

    def run(function, mask=None):
        with utils.autocast(True):
            out, _ = function(module, *qkv, mask, scaling=0.3)
        return out, torch.autograd.grad(out.float().square().sum(), qkv)

    (ours, our_gradients), (theirs, their_gradients) = run(attention), run(sdpa_attention_forward)
    assert not torch.equal(ours, theirs)
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)
    for own, other in zip(our_gradients, their_gradients, strict=True):
        torch.testing.assert_close(own, other, rtol=0.05, atol=0.1)
    mask = torch.ones(2, 1, 21, 21, dtype=torch.bool).tril()
    assert torch.equal(run(attention, mask)[0], run(sdpa_attention_forward, mask)[0])
    whole = [x.detach().float() for x in qkv]
    assert torch.equal(*(f(module, *whole, None)[0] for f in (attention, sdpa_attention_forward)))
    register_attention()
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is attention


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
    with refused("before step 1", "sampler"):
        small_run(policy, scorer, data, tmp_path)
    assert not updates and not (tmp_path / "model").exists()


def test_the_sampler_s_check_takes_no_randomness_from_the_run(policy, scorer, data, tmp_path, monkeypatch):
    small_run(policy, scorer, data, tmp_path / "checked")
    monkeypatch.setattr(ppo_sr, "check_before_step_1", lambda ppo: None)
    small_run(policy, scorer, data, tmp_path / "unchecked")
    assert same_run(tmp_path / "checked", tmp_path / "unchecked") == (True, True, True)


def test_dropout_in_updates_stops_at_the_first_ratio(policy, scorer, data, tmp_path, monkeypatch):
    start = ppo_sr.PPO.__init__

    def training(self, args):
        start(self, args)
        self.policy.module.train()

    monkeypatch.setattr(ppo_sr.PPO, "__init__", training)
    with refused("before step 1", "dropout"):
        small_run(policy, scorer, data, tmp_path)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("loss", ["clipped_policy_loss", "clipped_value_loss", "rehearsal_loss"])
def test_a_gradient_that_is_not_finite_stops_before_the_weights(loss, bad, policy, scorer, data, tmp_path, monkeypatch):
    """From step 2 on: the model that it would reach stays as it was, and the batch is kept."""
    original, calls, models = getattr(ppo_sr, loss), Counter(), []
    learn = ppo_sr.PPO.learn

    def breaking(*a):
        return original(*a) * (bad if calls["step"] == 2 else 1)

    def remembering(self, step, *rest):
        calls["step"] += 1
        for engine in (self.policy, self.critic):
            models.append((engine.module, copy.deepcopy(engine.module.state_dict())))
        return learn(self, step, *rest)

    monkeypatch.setattr(ppo_sr, loss, breaking)
    monkeypatch.setattr(ppo_sr.PPO, "learn", remembering)
    rolls = spy(monkeypatch, "advantages")
    which = "critic" if loss == "clipped_value_loss" else "policy"
    with refused("step 2", f"{which}'s gradient norm", tmp_path / "bad_batch.json", "--learning_rate"):
        small_run(policy, scorer, data, tmp_path, save_steps=1, rehearsal_dataset_name=data["rehearsal"])
    module, before = models[3 if loss == "clipped_value_loss" else 2]
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    report = json.loads((tmp_path / "bad_batch.json").read_text())
    assert report["step"] == 2 and len(rolls) == 2
    assert [(x, y) for x, y in report["batch"]] == rolls[1][0][0].sequences
    assert len(metrics_of(tmp_path)) == 2 and not (tmp_path / "model").exists()
    assert torch.load(tmp_path / "checkpoint" / "state.pt", weights_only=True)["step"] == 1


@pytest.mark.parametrize("which", ["policy", "critic"])
def test_weights_that_blow_up_in_the_last_update_are_no_policy(which, policy, scorer, data, tmp_path, monkeypatch):
    """And nothing is sampled from them. The flag named is the one that was raised."""
    flag = {"policy": "learning_rate", "critic": "critic_learning_rate"}[which]
    changes = {"learning_rate": 1e-7, "critic_learning_rate": 1e-7, "save_steps": 1} | {flag: 1e8}
    with refused("step 1", f"{which}'s largest weight", "bad_batch.json", f"lower --{flag}"):
        small_run(policy, scorer, data, tmp_path, **changes, total_steps=1)
    assert not (tmp_path / "model").exists() and not (tmp_path / "checkpoint").exists()


@pytest.mark.parametrize("raised", [("kl_coef",), ("score_scale",), ("kl_coef", "learning_rate"), ()])
def test_only_flags_that_were_raised_are_to_be_lowered(raised):
    args = Args("policy", "rows", "out", "scorer", **{flag: 100.0 for flag in raised}, gamma=0.5, temperature=2.0)
    assert {*finite.suspects(args)} == {f"--{flag}" for flag in raised or ("learning_rate",)}


@pytest.mark.parametrize("value", [math.nan, 1e30])
def test_a_scorer_without_finite_scores_is_named_before_step_1(value, policy, scorer, data, tmp_path):
    shutil.copytree(scorer, tmp_path / "bad")
    weights = load_file(tmp_path / "bad" / "model.safetensors")
    save_file(weights | {"score.weight": weights["score.weight"] * value}, tmp_path / "bad" / "model.safetensors")
    with refused(tmp_path / "bad", "score is"):
        small_run(policy, tmp_path / "bad", data, tmp_path / "out")
    assert not (tmp_path / "out" / "metrics.jsonl").read_text()


def test_a_run_says_where_its_policy_is(policy, scorer, data, tmp_path, capsys):
    small_run(policy, scorer, data, tmp_path, total_steps=1)
    assert capsys.readouterr().out.endswith(f"\npolicy written to {tmp_path / 'model'}\n")


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


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
@pytest.mark.parametrize(
    "flag, value",
    dict(
        gamma=2.0, lam=1.5, moving_average_decay=1.1, score_scale=0.0, response_length=0, critic_warmup_steps=100
    ).items(),
)
def test_numbers_out_of_range_are_refused(module, flag, value, policy, tmp_path):
    args = dict(model_name_or_path=str(policy), dataset_name="x", output_dir=str(tmp_path)) | {flag: value}
    args["reward_model_path"] = "x"
    with refused(f"--{flag}"):
        check_flags(module.Args(**args))
        module.main(module.Args(**args))


def test_a_line_at_every_evaluation(policy, scorer, data, tmp_path, capsys):
    ppo_sr.main(args_for(policy, data, tmp_path, reward_model_path=scorer, total_steps=3, eval_steps=2))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.split(":")[0] for line in lines] == ["step 2", "step 3"]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert f"kl {rows[2]['objective/kl']:.3g}" in lines[0]


def test_a_ratio_that_is_no_number_stops_the_run(policy, scorer, data, tmp_path, monkeypatch):
    """In one token of the responses that are checked before step 1."""
    score = ppo_sr.PPO.score

    def broken(*args):
        rollout = score(*args)
        rollout.logprobs[0, 0] = math.nan
        return rollout

    monkeypatch.setattr(ppo_sr.PPO, "score", broken)
    with refused("before step 1", "nan"):
        small_run(policy, scorer, data, tmp_path)


# --- small things that real inputs broke ------------------------------------------------------------------------------


def test_a_small_rehearsal_set_is_read_once_an_update(policy, scorer, data, tmp_path, monkeypatch):
    rows = Path(data["rehearsal"]).read_text().splitlines(keepends=True)[:3]
    (tmp_path / "d_r.jsonl").write_text("".join(rows))
    seen, loss = [], ppo_sr.rehearsal_loss

    def look(logprobs, count):
        seen.append((len(logprobs), count))
        return loss(logprobs, count)

    monkeypatch.setattr(ppo_sr, "rehearsal_loss", look)
    flags = {"rehearsal_dataset_name": str(tmp_path / "d_r.jsonl"), "rehearsal_batch_size": 64, "total_steps": 1}
    args = args_for(policy, data, tmp_path / "run", reward_model_path=scorer, num_ppo_epochs=2, **flags)
    ppo_sr.main(args)
    [count] = {count for _, count in seen}  # tokens of the three rows
    assert sum(tokens for tokens, _ in seen) == 2 * count  # two passes of one update


def test_the_critic_of_a_scorer_with_an_e_head_starts_at_0(words, scorer):
    """Its score a = r - e has the level of 0, and not r's."""
    for e_head in (False, True):
        loaded = utils.load_scorer(str(scorer), words, expected_reward_head=e_head)
        before = loaded.model.score.weight.clone()
        after = ppo_sr.Critic(loaded, 0.5).model.score.weight
        assert torch.equal(after, torch.zeros_like(before) if e_head else 0.5 * before)


def test_a_checkpoint_of_another_version_is_refused(policy, scorer, data, tmp_path):
    """A moving average that was kept as sums must not go on as one of means."""
    small_run(policy, scorer, data, tmp_path, save_steps=1, moving_average_decay=0.9, total_steps=1)
    path = tmp_path / "checkpoint" / "state.pt"
    saved = torch.load(path, weights_only=True)
    saved["moving_average"]["square"] = saved["moving_average"].pop("mean_square")
    torch.save(saved, path)
    with refused(path, "moving_average has no mean_square"):
        small_run(policy, scorer, data, tmp_path, save_steps=1, moving_average_decay=0.9, total_steps=2, resume=True)
