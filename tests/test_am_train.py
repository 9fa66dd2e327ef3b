"""am_train.py as a run: kill and resume, NaN, accumulation, margins, how often a text is scored, what it says of bad rows.

One tiny GPT-2 with dropout on throughout, so that a random state which is not restored changes every later number.
"""

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
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import am_train
import large
import sft
import utils
from plumbing import run_folder
from am_train import Args, add_alternates, encode_pairs, load_margins, score_batch, score_pairs
from tests.conftest import SENTENCE, byte_level_tokenizer, gpt2_config
from tests.test_data import jsonl, refused
from tools.write_logprobs import report
from utils import backend, length_batches, load_rows, load_scorer, load_tokenizer, run_cli

ROOT = Path(am_train.__file__).parent
WORDS = SENTENCE.replace(",", "").replace(".", "").split()
POLICIES = ("a", "b", "c")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dropout")
    torch.manual_seed(0)
    dropout = {"resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.2}
    AutoModelForCausalLM.from_config(gpt2_config(tokenizer, **dropout)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def plain(tokenizer, tmp_path_factory):
    """The same without dropout: two ways to cut a batch draw different masks."""
    folder = tmp_path_factory.mktemp("plain")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(gpt2_config(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def pairs(count, **changes):
    """Prompts of one to five words, five prompts in all, so that responses to one prompt stand in several rows."""
    rows = []
    for i in range(count):
        row = {"prompt": " ".join(WORDS[: 1 + i % 5]), "task": ("b", "c")[i % 2]}
        for s, side in enumerate(("chosen", "rejected")):
            j = 3 * i + 7 * s
            row |= {side: " ".join(WORDS[j % 11 : j % 11 + 1 + j % 6]), f"policy_{side}": POLICIES[j % 3]}
            row |= {f"logprob_{side}": -9.0 + j % 4, f"current_logprob_{side}": -9.0 + j % 3}
        rows.append(row | changes)
    return rows


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return jsonl(tmp_path_factory.mktemp("data") / "pairs.jsonl", *pairs(24))


def args_for(model, data, out, **changes):
    defaults = {"learning_rate": 1e-3, "global_batch_size": 8, "per_device_train_batch_size": 8}
    return Args(**{"model_name_or_path": model, "dataset_name": data, "output_dir": str(out)} | defaults | changes)


def metrics_of(folder):
    """The lines of metrics.jsonl without the clock."""
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def weights_of(folder):
    files = sorted((Path(folder) / "model").glob("*.safetensors"))
    return {(file.name, k): v for file in files for k, v in load_file(file).items()}


def same_weights(one, other):
    one, other = weights_of(one), weights_of(other)
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


# --- kill and resume --------------------------------------------------------------------------------------------------


def command(args):
    flags = [(f.name, getattr(args, f.name)) for f in fields(args) if getattr(args, f.name) != f.default]
    return [sys.executable, "am_train.py", *(part for name, value in flags for part in (f"--{name}", str(value)))]


def test_a_killed_run_resumed_ends_as_one_that_never_stopped(model, tmp_path, monkeypatch, capsys):
    """Killed with SIGKILL in the second epoch, half a line and half a checkpoint left behind."""
    data = jsonl(tmp_path / "pairs.jsonl", *pairs(80))
    flags = {"eval_dataset_name": jsonl(tmp_path / "test.jsonl", *pairs(6)), "eval_steps": 4, "save_steps": 3}
    flags |= {"num_train_epochs": 2, "global_batch_size": 4, "per_device_train_batch_size": 3}
    flags |= {"expected_reward": "regress", "num_alternates": 2}
    environ = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    killed = args_for(model, data, tmp_path / "killed", **flags)
    process = subprocess.Popen(command(killed), cwd=ROOT, env=environ, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    metrics, started = tmp_path / "killed" / "metrics.jsonl", time.time()
    while not (metrics.is_file() and metrics.read_text().count("\n") >= 23):  # 20 steps an epoch
        assert process.poll() is None, process.stderr.read().decode()
        assert time.time() - started < 240
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "killed" / "model").exists()
    step = torch.load(tmp_path / "killed" / "checkpoint" / "state.pt", weights_only=True)["step"]
    assert step % 3 == 0 and 20 < step < 39
    with open(metrics, "a", encoding="utf-8") as file:
        file.write('{"step": 22, "seco')
    (tmp_path / "killed" / "checkpoint" / "state.pt.tmp").write_bytes(b"half of it")

    again = args_for(model, data, tmp_path / "killed", resume=True, **flags)
    monkeypatch.setattr(sys, "argv", command(again)[1:])
    run_cli(am_train.main, Args, "")
    assert f"steps 40, done {step}" in capsys.readouterr().out
    am_train.main(args_for(model, data, tmp_path / "whole", **flags))
    whole = metrics_of(tmp_path / "whole")
    assert [row["step"] for row in whole] == [*range(1, 41), 40]
    assert metrics_of(tmp_path / "killed") == whole
    assert same_weights(tmp_path / "killed", tmp_path / "whole")
    assert not same_weights_as_start(tmp_path / "whole", model)


def same_weights_as_start(folder, model):
    start = load_file(Path(model) / "model.safetensors")
    return all(torch.equal(start[k], v) for (_, k), v in weights_of(folder).items() if k in start)


class Stopped(Exception):
    pass


def stop_after(monkeypatch, step):
    """Runs end right after a step's line is written, as a kill would end them."""
    write = run_folder.RunLog.write

    def stopping(self, at, metrics):
        write(self, at, metrics)
        if at == step:
            raise Stopped

    monkeypatch.setattr(run_folder.RunLog, "write", stopping)


def test_sft_resumes_in_its_second_epoch_to_the_same_numbers(model, tmp_path, monkeypatch):
    """Dropout is on, so that the random state counts; 5 steps an epoch, checkpoints at 2, 4, 6 and so on."""
    rows = [{"prompt": row["prompt"], "response": row["chosen"]} for row in pairs(20)]
    data = jsonl(tmp_path / "sft.jsonl", *rows)

    def train(out, **flags):
        flags |= dict(global_batch_size=4, per_device_train_batch_size=3, num_train_epochs=2, learning_rate=1e-3)
        sft.main(sft.Args(data, str(tmp_path / out), model_name_or_path=model, save_steps=2, **flags))

    train("whole")
    with monkeypatch.context() as patch:
        stop_after(patch, 7)
        with pytest.raises(Stopped):
            train("stopped")
    assert torch.load(tmp_path / "stopped" / "checkpoint" / "state.pt", weights_only=True)["step"] == 6
    train("stopped", resume=True)
    assert metrics_of(tmp_path / "stopped") == metrics_of(tmp_path / "whole")
    assert [row["step"] for row in metrics_of(tmp_path / "whole")] == list(range(1, 11))
    assert same_weights(tmp_path / "stopped", tmp_path / "whole")


@pytest.fixture(scope="module")
def whole_run(model, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    am_train.main(args_for(model, data, out, num_train_epochs=2))
    return out


def test_resume_needs_the_random_state(model, data, whole_run, tmp_path, monkeypatch):
    """The mutant: everything restored but the RNG, which dropout reads."""
    for restored in (True, False):
        args = args_for(model, data, tmp_path / str(restored), num_train_epochs=2, save_steps=2)
        with monkeypatch.context() as patch, pytest.raises(Stopped):
            stop_after(patch, 5)
            am_train.main(args)
        args.resume = True
        with monkeypatch.context() as patch:
            if not restored:
                patch.setattr(torch, "set_rng_state", lambda state: None)
            am_train.main(args)
        equal = metrics_of(args.output_dir) == metrics_of(whole_run), same_weights(args.output_dir, whole_run)
        assert equal == (restored, restored)


@pytest.mark.parametrize(
    "changes", [{"learning_rate": 2e-3}, {"loss": "rm"}, {"seed": 2}, {"save_steps": 1}], ids=lambda c: next(iter(c))
)
def test_resume_with_another_flag_is_refused_by_name(changes, model, data, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(patch, 3)
        am_train.main(args_for(model, data, tmp_path, save_steps=2))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    ((name, value),) = changes.items()
    with refused(f"--{name}", value, {"save_steps": 2, "loss": "am", "seed": 1, "learning_rate": 0.001}[name]):
        am_train.main(args_for(model, data, tmp_path, **{"save_steps": 2, "resume": True} | changes))
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_resume_without_a_checkpoint_starts_from_the_start(model, data, whole_run, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 7}\n')  # of a run killed before its first checkpoint
    am_train.main(args_for(model, data, tmp_path, num_train_epochs=2, resume=True))
    assert metrics_of(tmp_path) == metrics_of(whole_run) and same_weights(tmp_path, whole_run)


def test_a_run_without_resume_does_not_touch_the_one_before(model, data, whole_run, tmp_path):
    for resume in ("remove it", "--resume True"):
        args = args_for(model, data, tmp_path, num_train_epochs=2, save_steps=2)
        if resume == "remove it":
            args.save_steps = 0
        am_train.main(args)
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        with refused("--output_dir", tmp_path, resume, "another"):
            am_train.main(args)
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
        assert metrics_of(tmp_path) == metrics_of(whole_run)
        shutil.rmtree(tmp_path)


def test_resuming_after_the_last_step_repeats_no_line(model, data, tmp_path):
    args = args_for(model, data, tmp_path, eval_dataset_name=data, save_steps=3)
    am_train.main(args)
    lines = metrics_of(tmp_path)
    args.resume = True
    am_train.main(args)
    assert metrics_of(tmp_path) == lines


# --- a full disk ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), RuntimeError("file write failed")])
def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(failure, model, data, tmp_path, monkeypatch, capsys):
    save, calls = torch.save, Counter()

    def filling(state, path):
        calls["save"] += 1
        if calls["save"] == 2:
            Path(path).write_bytes(b"half of it")
            raise failure
        save(state, path)

    monkeypatch.setattr(torch, "save", filling)
    folder = tmp_path / "checkpoint"
    left = []
    write = run_folder.RunLog.write

    def looking(self, step, metrics):  # before the checkpoint of the step
        state = folder / "state.pt"
        left.append(torch.load(state, weights_only=True)["step"] if state.is_file() else None)
        write(self, step, metrics)

    monkeypatch.setattr(run_folder.RunLog, "write", looking)
    am_train.main(args_for(model, data, tmp_path, save_steps=1))
    assert left == [None, 1, 1] and torch.load(folder / "state.pt", weights_only=True)["step"] == 3
    said = capsys.readouterr().err
    assert "step 2: no checkpoint written" in said and "the last one stays" in said
    assert sorted(p.name for p in folder.iterdir()) == ["state.pt"] and len(metrics_of(tmp_path)) == 3


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_disk_that_is_really_full(model, data, whole_run, tmp_path, capsys):
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "state.pt.tmp").symlink_to("/dev/full")
    am_train.main(args_for(model, data, tmp_path, num_train_epochs=2, save_steps=2))
    assert capsys.readouterr().err.count("no checkpoint written") == 1  # the link goes with the failure
    assert metrics_of(tmp_path) == metrics_of(whole_run) and same_weights(tmp_path, whole_run)


def test_a_checkpoint_folder_that_cannot_be_made(model, data, tmp_path):
    (tmp_path / "checkpoint").write_text("a file stands where the folder should")
    am_train.main(args_for(model, data, tmp_path, save_steps=2))
    assert len(metrics_of(tmp_path)) == 3


# --- NaN --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_before_the_weights(bad, model, data, tmp_path):
    """The second micro-batch of step 2, bad: the weights are those after step 1."""
    seen, calls = {}, Counter()

    def keep(scorer, tokenizer, texts):
        seen["scorer"] = scorer

    def loss(args, batch):
        calls["loss"] += 1
        if calls["loss"] in (3, 4):  # micro-batches 1 and 2 of step 2
            seen["weights"] = {k: v.clone() for k, v in seen["scorer"].state_dict().items()}
        return am_train.scorer_loss(args, batch) + (bad if calls["loss"] == 4 else 0)

    args = args_for(model, data, tmp_path, per_device_train_batch_size=4, save_steps=1)
    with refused("step 2", str(bad), tmp_path / "bad_batch.json"):
        am_train.main(args, loss, keep)
    now = seen["scorer"].state_dict()
    assert all(torch.equal(now[k], v) for k, v in seen["weights"].items())
    assert len(metrics_of(tmp_path)) == 1 and not (tmp_path / "model").exists()
    saved = torch.load(tmp_path / "checkpoint" / "state.pt", weights_only=True)
    assert saved["step"] == 1 and all(torch.equal(now[k], v) for k, v in saved["engine"]["module"].items())
    report = json.loads((tmp_path / "bad_batch.json").read_text())
    assert report["step"] == 2 and report["loss"] == str(bad)
    # step 2's rows are the second eight of the permutation; of those, the last four
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))[8:16].tolist()
    rows = pairs(24)
    assert [rows.index(row) for row in report["batch"]] == order[4:]


def test_nan_on_the_command_line_ends_in_one_line_and_exit_code_2(model, data, tmp_path, monkeypatch, capsys):
    loss, calls = am_train.advantage_model_loss, Counter()

    def breaking(*a):
        calls["loss"] += 1
        return loss(*a) * (math.nan if calls["loss"] == 2 else 1)

    monkeypatch.setattr(am_train, "advantage_model_loss", breaking)
    monkeypatch.setattr(sys, "argv", command(args_for(model, data, tmp_path))[1:])
    with pytest.raises(SystemExit) as stop:
        run_cli(am_train.main, Args, "")
    said = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and said.startswith("error: step 2: the loss is nan")
    assert str(tmp_path / "bad_batch.json") in said and "--learning_rate" in said


@pytest.mark.parametrize("flag, value", [("learning_rate", 1e30), ("weight_decay", 1e16)])
def test_weights_that_blow_up_in_the_last_step_are_no_model(flag, value, model, data, tmp_path):
    """Nothing follows that would notice; the last good checkpoint stays. The flag named is the one that was raised."""
    start = {"save_steps": 2, "learning_rate": 1e-8}
    with refused("step 1:", "largest weight", "bad_batch.json", f"lower --{flag}"):
        am_train.main(args_for(model, data, tmp_path / "a", **start | {flag: value}, global_batch_size=24))
    assert not (tmp_path / "a" / "model").exists() and not (tmp_path / "a" / "checkpoint").exists()


def test_a_gradient_that_is_not_finite_stops_before_the_weights(model, data, tmp_path):
    def loss(args, batch):
        return am_train.scorer_loss(args, batch) + (0 * batch["r"].sum()).sqrt()  # 0, with an infinite slope times 0

    with refused("step 1:"):
        am_train.main(args_for(model, data, tmp_path, save_steps=1), loss)


# --- the same trajectory by other ways ----------------------------------------------------------------------------------

KINDS = {
    "rm": {"loss": "rm"},
    "am": {"loss": "am"},
    "joint": {"expected_reward": "joint"},
    "regress, K = 2": {"expected_reward": "regress", "num_alternates": 2},
    "own, K = 1": {"expected_reward": "joint", "num_alternates": 1, "eq8_y": "own", "num_policies": 3},
}


def trajectory(model, data, out, **changes):
    """Losses and gradient norms of every step, final scores a, and the e head."""
    scores = am_train.main(args_for(model, data, out, eval_dataset_name=data, **changes))
    rows = metrics_of(out)[:-1]
    steps = np.array([[row[key] for key in ("loss", "grad_norm", "accuracy", "lr")] for row in rows])
    e_head = Path(out) / "model" / utils.E_HEAD
    heads = [v.numpy().ravel() for v in load_file(e_head).values()] if e_head.is_file() else [np.zeros(1)]
    return steps, np.concatenate(scores), np.concatenate(heads)


def near(one, other, tolerance=1e-5):
    return all(np.abs(a - b).max() <= tolerance * max(1, np.abs(a).max()) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_accumulation_changes_nothing(kind, plain, data, tmp_path):
    """One pass over 8 pairs, four over 2, and (once) 3 + 3 + 2, whose parts differ in size."""
    runs = []
    for size in (8, 2, 3) if kind.startswith("regress") else (8, 2):
        steps, a, e_head = trajectory(
            plain, data, tmp_path / str(size), per_device_train_batch_size=size, num_train_epochs=2, **KINDS[kind]
        )
        if kind == "rm":  # Eq. 1 does not determine the level of the scores: rounding moves it, through AdamW
            a = a - a.mean()
        runs.append((steps, a, e_head))
    assert len(runs[0][0]) == 6 and runs[0][1].std() > 1e-2
    assert ("expected_reward" in KINDS[kind]) == (np.abs(runs[0][2]).max() > 1e-4)  # the e head, where there is one
    assert all(near(runs[0], run) for run in runs[1:])


def test_another_global_batch_is_another_run(plain, data, tmp_path):
    """The mutant of the test above: what it allows for is not that wide."""
    scores = [trajectory(plain, data, tmp_path / str(n), global_batch_size=n)[1] for n in (8, 4)]
    assert np.abs(scores[0] - scores[1]).max() > 1e-3


def test_kinds_of_loss_differ(plain, data, tmp_path):
    losses = [trajectory(plain, data, tmp_path / str(i), **flags)[0][1, 0] for i, flags in enumerate(KINDS.values())]
    assert len({round(loss, 4) for loss in losses}) == len(losses)


def test_gradient_checkpointing_changes_nothing_but_the_work(model, data, tmp_path):
    """Dropout on: the second forward pass draws the masks of the first."""
    runs, forwards = [], Counter()
    for on in (False, True):

        def count(scorer, tokenizer, texts, on=on):
            mlp = scorer.model.transformer.h[0].mlp
            mlp.register_forward_pre_hook(lambda module, inputs: forwards.update([on]) if module.training else None)

        flags = {"expected_reward": "regress", "num_train_epochs": 2}
        args = vars(args_for(model, data, tmp_path / str(on), **flags))
        args = large.with_flags(Args)(**args, gradient_checkpointing=on)
        large.become(args, None)
        try:
            am_train.main(args, prepare=count)
        finally:
            vars(backend).clear()
            backend.__class__ = utils.Backend
        runs.append([[row["loss"], row["grad_norm"]] for row in metrics_of(tmp_path / str(on))])
    assert near([np.array(runs[0])], [np.array(runs[1])])
    assert forwards[True] == 2 * forwards[False] > 0


def test_bf16_is_close_and_no_copy(plain, data, tmp_path):
    exact, bf16 = (trajectory(plain, data, tmp_path / str(on), bf16=on, learning_rate=1e-4) for on in (False, True))
    difference = np.abs(exact[0][:, 0] - bf16[0][:, 0]).max()
    assert 0 < difference < 0.05 and 0 < np.abs(exact[1] - bf16[1]).max() < 0.2
    assert {v.dtype for v in weights_of(tmp_path / "True").values()} == {torch.float32}


# --- m(x) of each task ------------------------------------------------------------------------------------------------


def margins(margin, *tasks):
    rows = [{"row": {"prompt": "x"} | ({"task": task} if task else {})} for task in tasks]
    rows = [row | {"where": f"pairs.jsonl, line {n}"} for n, row in enumerate(rows, 1)]
    load_margins(SimpleNamespace(am_margin=margin), rows)
    return [row["margin"] for row in rows]


def test_margin_of_each_pair_s_task(tmp_path):
    table = tmp_path / "m.json"
    table.write_text('{"b": 1.5, "default": 4, "d": Infinity}')
    assert margins(str(table), "b", "c", "d", None) == [1.5, 4, math.inf, 4]
    assert margins(2.5, "b", None) == [2.5, 2.5] and margins("inf", "b") == [math.inf]
    table.write_text('{"all": 3, "c": 1}')  # rows without a task are of task "all"
    assert margins(str(table), None, "c") == [3, 1]


def test_margin_files_that_cannot_be_used_are_refused(tmp_path):
    table = tmp_path / "m.json"
    table.write_text('{"b": 1.5}')
    with refused("--am_margin", table, "'c'", "'default'", "pairs.jsonl, line 2"):
        margins(str(table), "b", "c")
    for text, field in (
        ('{"b": 0}', "'b'"),
        ('{"b": "3"}', "'b'"),
        ('{"b": 1, "c": null}', "'c'"),
        ('{"b": -1}', "'b'"),
    ):
        table.write_text(text)
        with refused("--am_margin", table, field, "positive"):
            margins(str(table), "b")
    table.write_text('{"b": 1')
    with refused("--am_margin", table, "JSON"):
        margins(str(table), "b")
    with refused("--am_margin", "no/such.json"):
        margins("no/such.json", "b")


def test_a_margin_file_that_holds_no_object_is_refused(tmp_path):
    (tmp_path / "m.json").write_text("[1, 2]")
    with refused("--am_margin"):
        margins(str(tmp_path / "m.json"), "b")


@pytest.mark.parametrize("margin", ["nan", "-1"])
def test_a_margin_that_is_no_positive_number_is_refused(margin):
    with refused("--am_margin"):
        margins(margin, "b")


def test_the_margin_of_the_task_is_in_the_loss(plain, data, tmp_path):
    """One margin for both tasks is the number; a file with another for one task is not, and its pairs see their own."""
    table, losses, seen = tmp_path / "m.json", [], {}

    def look(args, batch):
        seen.setdefault(args.am_margin, []).extend(batch["margin"].tolist())
        return am_train.scorer_loss(args, batch)

    for text in ('{"b": 2.5, "c": 2.5}', '{"b": 2.5, "c": 0.5}'):
        table.write_text(text)
        am_train.main(args_for(plain, data, tmp_path / "out", am_margin=str(table)), look)
        losses.append(metrics_of(tmp_path / "out")[0]["loss"])
        shutil.rmtree(tmp_path / "out")
    am_train.main(args_for(plain, data, tmp_path / "out", am_margin=2.5))
    assert metrics_of(tmp_path / "out")[0]["loss"] == losses[0] != losses[1]
    assert Counter(seen[str(table)][24:]) == {2.5: 12, 0.5: 12}


# --- every text once --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [{}, {"num_alternates": 3}, {"num_alternates": 1, "eq8_y": "own"}], ids=str)
def test_a_distinct_text_is_scored_once_a_batch(flags, plain, tmp_path, monkeypatch):
    """Pairs of rankings share their responses; the responses of Eq. 8's sum are among them, or come along once."""
    rows = pairs(24)
    data = jsonl(tmp_path / "pairs.jsonl", *(rows + rows[:8]))
    forward, passes, wanted = utils.Scorer.forward, [[]], []

    def counting(self, ids, mask, prompt_lens, embedded=None):
        passes[-1] += [(tuple(i[m].tolist()), n) for i, m, n in zip(ids, mask, prompt_lens.tolist(), strict=True)]
        return forward(self, ids, mask, prompt_lens, embedded)

    original = am_train.score_pairs

    def looking(scorer, tokenizer, texts, chunk, args):
        sums = {t for pair in chunk for side in pair["alternates"] for t, _ in side}
        needed = {pair[side] for pair in chunk for side in ("chosen", "rejected")} | sums
        wanted.append(sorted((tuple(texts[t][0]), texts[t][1]) for t in needed))
        passes.append([])
        return original(scorer, tokenizer, texts, chunk, args)

    monkeypatch.setattr(utils.Scorer, "forward", counting)
    monkeypatch.setattr(am_train, "score_pairs", looking)
    am_train.main(args_for(plain, data, tmp_path / "out", global_batch_size=16, **flags))
    assert [sorted(seen) for seen in passes[1:]] == wanted and len(wanted) == 4
    if flags.get("num_alternates") == 3:  # sums bring texts along that are in none of the batch's pairs
        assert any(len(seen) > 16 for seen in passes[1:])
    else:  # 8 pairs with fewer than 16 texts
        assert any(len(seen) < 16 for seen in passes[1:])


def test_score_pairs_gives_every_pair_its_own_scores(plain, data):
    """Against one unpadded pass per text."""
    tokenizer = load_tokenizer(plain, dedicated_pad=True)
    torch.manual_seed(0)
    scorer = load_scorer(plain, tokenizer, trained=False, expected_reward_head=True).eval()
    torch.nn.init.normal_(scorer.e_head.weight)
    args = args_for(plain, data, "out", num_alternates=2)
    rows = load_rows(data, {"prompt": "prompt", "chosen": "response", "rejected": "response"})
    texts, train = encode_pairs(data, rows, tokenizer, scorer.is_encoder, args)
    load_margins(args, train)
    add_alternates(texts, train, args)
    chunk = train[5:14]
    with torch.no_grad():
        engine = SimpleNamespace(run=lambda function, *inputs: function(scorer, *inputs))
        batch = score_pairs(engine, tokenizer, texts, chunk, args)
        for p, pair in enumerate(chunk):
            for s, side in enumerate(("chosen", "rejected")):
                ids = tokenizer(pair["row"]["prompt"]).input_ids
                x = len(ids)
                ids = [*ids, *tokenizer(pair["row"][side]).input_ids, tokenizer.eos_token_id]
                hidden = scorer.model.transformer(torch.tensor([ids])).last_hidden_state[0]
                assert batch["r"][s, p].item() == pytest.approx(scorer.model.score(hidden[-1]).item(), abs=1e-5)
                assert batch["e"][p].item() == pytest.approx(scorer.e_head(hidden[x - 1]).item(), abs=1e-5)
    assert batch["r"].std() > 0.1 and batch["e"].std() > 0.1 and (batch["k"] == 2).all()


def by_first_token(ids, mask, prompt_lens, embedded):
    assert (embedded[..., 0] == ids).all()
    return ids[:, 0].float(), mask.sum(1).float() + 100 * prompt_lens


by_first_token.model = SimpleNamespace(
    get_input_embeddings=lambda: torch.nn.Embedding.from_pretrained(torch.arange(100.0)[:, None], freeze=False)
)


def test_score_batch_puts_the_scores_back_in_order():
    lengths = [3, 40, 7, 39, 1, 20, 36, 8, 3]
    texts = [([i] * n, 1 + i % n) for i, n in enumerate(lengths)]
    r, e = score_batch(by_first_token, SimpleNamespace(pad_token_id=99), texts, False)
    assert r.tolist() == list(range(9))
    assert e.tolist() == [n + 100 * (1 + i % n) for i, n in enumerate(lengths)]
    assert score_batch(by_first_token, SimpleNamespace(pad_token_id=99), texts[:1], False).tolist() == [[0.0], [103.0]]


@pytest.mark.parametrize("share", [0.85, 0.5, 1.0])
def test_similar_lengths(share):
    rng = np.random.default_rng(0)
    for lengths in ([], [5], [4, 4, 4], [1, 100], *(rng.integers(1, 200, n).tolist() for n in (2, 17, 240))):
        groups = length_batches(lengths, 1000, length_ratio=share)
        assert sorted(i for group in groups for i in group) == list(range(len(lengths)))  # each text once
        in_order = [lengths[i] for group in groups for i in group]
        assert in_order == sorted(lengths, reverse=True)
        for group in groups:
            assert group and min(lengths[i] for i in group) >= share * lengths[group[0]]
        for group, after in itertools.pairwise(groups):  # none is cut without need
            assert lengths[after[0]] < share * lengths[group[0]]
    assert (
        len(length_batches([100, 90, 84, 72, 71], 9, length_ratio=0.85)) == 3
    )  # 100 90 | 84 72 | 71, for 84 < 85 and 71 < 71.4


def test_similar_lengths_save_padding():
    lengths = np.random.default_rng(1).integers(20, 400, 64).tolist()
    padded = sum(len(g) * lengths[g[0]] for g in length_batches(lengths, 64, length_ratio=backend.length_ratio))
    assert sum(lengths) <= padded < sum(lengths) / 0.85 < 0.7 * len(lengths) * max(lengths)


# --- what is refused, and by which line -------------------------------------------------------------------------------


def broken(field, value=None, at=3):
    rows = pairs(6)
    rows[at - 1].pop(field)
    return rows if value is None else [row | ({field: value} if i == at else {}) for i, row in enumerate(rows, 1)]


@pytest.mark.parametrize(
    ("rows", "flags", "parts"),
    [
        (broken("chosen"), {}, ("line 3", "'chosen'", "missing")),
        (broken("rejected", 7), {}, ("line 3", "'rejected'", "text")),
        (broken("prompt", ""), {}, ("line 3", "'prompt'", "empty")),
        (broken("prompt", "fox " * 300), {}, ("line 3", "tokens", "--max_length")),
        (broken("logprob_chosen"), {"num_alternates": 1}, ("line 3", "'logprob_chosen'", "tools/write_logprobs.py")),
        (broken("logprob_chosen", "-3"), {"num_alternates": 1}, ("line 3", "'logprob_chosen'", "number")),
        (broken("logprob_chosen", 0.5), {"num_alternates": 1}, ("line 3", "'logprob_chosen'", "number")),
        (broken("policy_rejected"), {"num_alternates": 1}, ("line 3", "'policy_rejected'")),
        (pairs(2), {"num_alternates": 3, "num_policies": 2}, ("--num_policies 2", "--num_alternates")),
        (pairs(2), {"num_alternates": 1, "loss": "rm"}, ("--num_alternates", "--loss am")),
    ],
    ids=lambda value: None if isinstance(value, (list, dict)) else " ".join(value),
)
def test_a_broken_row_names_its_line(rows, flags, parts, plain, tmp_path):
    with refused(*parts):
        am_train.main(args_for(plain, jsonl(tmp_path / "pairs.jsonl", *rows), tmp_path / "out", **flags))


@pytest.mark.parametrize("value", [{"a": "x"}, [-1.0]], ids=str)
def test_the_log_probs_of_the_own_reading_are_checked(value, plain, tmp_path):
    data = jsonl(tmp_path / "a.jsonl", *broken("policy_chosen"), pairs(1)[0] | {"logprobs_chosen": value})
    with refused("line 7", "logprobs_chosen"):
        am_train.main(args_for(plain, data, tmp_path / "out", num_alternates=1, eq8_y="own"))


# --- importance weights --------------------------------------------------------------------------------------


def weighted(prompts, log_ratio):
    """Rows of two policies' responses: plain weights 2 and e^log_ratio."""
    row = {"chosen": "fox", "rejected": "dog", "policy_chosen": "a", "policy_rejected": "b"}
    row |= {"logprob_chosen": -3.0, "current_logprob_chosen": -3.0 + math.log(2)}
    row |= {"logprob_rejected": -9.0, "current_logprob_rejected": -9.0 + log_ratio}
    return [row | {"prompt": prompt} for prompt in prompts]


@pytest.mark.parametrize(("log_ratio", "above"), [(5.0, (1.0, 0.5)), (-1.0, (0.5, 0.0))])
def test_the_weights_are_reported(log_ratio, above, capsys):
    """Four prompts, each with a weight of 2 (no more than 2) and one of e^5, or of 1/e."""
    found, w = report(weighted(WORDS[:4], log_ratio)), math.exp(log_ratio)
    assert found["weights"] == 8 and found["mean"] == pytest.approx((2 + w) / 2, rel=1e-5)
    # Kish: (4 * 2 + 4 w)^2 / (8 (4 * 4 + 4 w^2)) = (2 + w)^2 / (2 (4 + w^2)); at e^5: 22624.1 / 44060.9 = 0.5135
    assert found["effective_share"] == pytest.approx((2 + w) ** 2 / (2 * (4 + w**2)), rel=1e-5)
    assert found["above_1"] == above[0] and found["above_2"] in (above[1], above[1] + 0.5)  # e^log 2 rounds
    said = f"mean {(2 + w) / 2:.3g}, effective sample {50 * (2 + w) ** 2 / (4 + w**2):.1f} %"
    assert said in capsys.readouterr().out


def test_pairs_that_repeat_their_texts_do_not_change_the_reported_weights():
    """Prompt 1 stands five times as often: not the share of weights that the pairs hold, but that of the responses."""
    rows = weighted(WORDS[:1], 5.0) + weighted(WORDS[1:3], -1.0)
    once = report(rows)
    # 2 three times, e^5, 1/e twice
    total, squares = 6 + math.exp(5) + 2 * math.exp(-1), 12 + math.exp(10) + 2 * math.exp(-2)
    assert once["weights"] == 6 and once["effective_share"] == pytest.approx(total**2 / (6 * squares), rel=1e-5)
    assert report(rows + 4 * rows[:1]) == once


def test_what_is_drawn_does_not_depend_on_the_rank(plain):
    """One policy wrote both sides, with weights of their own: the rows, swapped, and from the end, draw the same."""
    tokenizer = load_tokenizer(plain, dedicated_pad=True)
    args = args_for(plain, "pairs.jsonl", "out", num_alternates=2)
    prompts = [" ".join(words) for words in itertools.product(WORDS[:6], repeat=3)]  # 216
    rows = [row | {"policy_rejected": "a"} for row in weighted(prompts, -1.0)]
    other = {"chosen": "rejected", "rejected": "chosen"}
    names = {
        f"{p}{side}": f"{p}{to}" for side, to in other.items() for p in ("", "policy_", "logprob_", "current_logprob_")
    }
    swapped = [{names.get(k, k): v for k, v in row.items()} for row in rows]
    assert swapped[0]["chosen"] == "dog" and swapped[0]["logprob_chosen"] == -9.0

    def drawn(rows):
        texts, train = encode_pairs("pairs.jsonl", rows, tokenizer, False, args)
        add_alternates(texts, train, args)
        assert all(pair["alternates"][0] == pair["alternates"][1] for pair in train)
        terms = {pair["row"]["prompt"]: pair["alternates"][0] for pair in train}
        return {prompt: (texts[t][0], w) for prompt, ((t, w),) in terms.items()}

    first = drawn(rows)
    assert first == drawn(swapped) == drawn(rows[::-1]) == drawn(rows + swapped)
    fox = {prompt: tokenizer(prompt).input_ids + tokenizer("fox").input_ids for prompt in prompts}
    is_fox = [ids[: len(fox[prompt])] == fox[prompt] for prompt, (ids, _) in first.items()]
    assert [w for _, w in first.values()] == pytest.approx([2.0 if one else math.exp(-1) for one in is_fox], rel=1e-5)
    assert 84 < sum(is_fox) < 132  # 108 +- 7.3


# --- tokenizers without a padding token of their own --------------------------------------------------------------------


@pytest.mark.parametrize("pad", ["eos", "none"])
def test_a_model_without_a_padding_token_gets_one(pad, data, tmp_path):
    """AutoModel finds a text's end as the last token that is not padding: with pad = eos it would read one early."""
    tokenizer = byte_level_tokenizer(eos_token="<eos>")
    torch.manual_seed(0)
    config = gpt2_config(tokenizer, pad_token_id=None)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "start")
    if pad == "eos":
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path / "start")
    scores = am_train.main(args_for(str(tmp_path / "start"), data, tmp_path / "out", eval_dataset_name=data))
    folder = tmp_path / "out" / "model"
    saved, auto = load_tokenizer(str(folder)), AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert saved.pad_token_id == auto.config.pad_token_id == len(tokenizer) != saved.eos_token_id
    assert auto.get_input_embeddings().num_embeddings == len(tokenizer) + 1
    rows = pairs(24)
    texts = [
        tokenizer(row["prompt"]).input_ids + tokenizer(row[side]).input_ids + [tokenizer.eos_token_id]
        for side in ("chosen", "rejected")
        for row in rows
    ]
    batch = saved.pad({"input_ids": texts}, padding_side="right", return_tensors="pt")
    with torch.no_grad():
        logits = auto(**batch).logits[:, 0]
    assert torch.allclose(logits, torch.tensor(np.concatenate(scores), dtype=torch.float32), atol=1e-5)
    assert logits.std() > 0.05


# --- pairs that carry no preference; what is written beside the weights -----------------------------------------------


def test_equal_sides_are_left_out_and_counted_from_the_start_and_by_a_cut(plain, tmp_path, capsys):
    rows = pairs(6)
    rows[1] |= {"rejected": rows[1]["chosen"]}
    long = " ".join(WORDS * 8)
    rows[3] |= {"chosen": f"{long} fox", "rejected": f"{long} dog"}
    data = jsonl(tmp_path / "a.jsonl", *rows)
    args = args_for(plain, data, tmp_path / "out", max_length=24, truncate_prompts=True, eval_dataset_name=data)
    chosen, _ = am_train.main(args)
    said = capsys.readouterr().out
    assert len(chosen) == 4 and said.count(f"{data}: 2 of 6 pairs left out: equal sides") == 2
    assert said.count(f"{data}: 2 of 6 rows shortened to 24 tokens") == 2
    with refused(data, "no pair"):
        am_train.main(args_for(plain, jsonl(tmp_path / "a.jsonl", rows[1]), tmp_path / "other"))


def test_what_trained_the_weights_is_written_beside_them(plain, data, tmp_path):
    am_train.main(args_for(plain, data, tmp_path / "run", loss="rm", bf16=True))
    record = json.loads((tmp_path / "run" / "model" / "training.json").read_text())
    assert record == json.loads((tmp_path / "run" / "config.json").read_text())
    assert (record["args"]["loss"], record["args"]["bf16"], record["args"]["learning_rate"]) == ("rm", True, 1e-3)


def test_a_sum_over_policies_that_is_not_read_is_explained(plain, data, tmp_path, capsys):
    for kind, said in (("none", True), ("joint", True), ("regress", False)):
        flags = {"expected_reward": kind, "num_alternates": 1}
        am_train.main(args_for(plain, data, tmp_path / kind, **flags))
        assert ("is read as r - e" in capsys.readouterr().out) == said
