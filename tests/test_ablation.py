"""studies/ablation.py: its cells, the identity that spares three of them, all at smoke scale."""

import json
import shutil
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from transformers import AutoModelForCausalLM

import am_train
import sft
from miniature import jobs, world
from miniature.reproduce import SETTINGS
from miniature.tables import table_of_seeds
from studies import ablation
from studies.ablation import CELLS, COLUMNS, collect, jobs_of, scorer_flags
from tests.conftest import gpt2_config
from tests.test_am_train import metrics_of, pairs
from tests.test_data import jsonl, refused
from utils import write_json

OFF = [("none", 0), ("none", 3), ("joint", 0), ("joint", 3)]  # the cells for which Eq. 1 stands


pytestmark = pytest.mark.usefixtures("one_thread")


# --- cells ------------------------------------------------------------------------------------------------------------


def test_cells():
    assert len(CELLS) == 9
    left_out = {(False, e, k) for e, k in OFF} - {(False, "none", 0)}
    everything = {(b, e, k) for b in (False, True) for e in ("none", "joint", "regress") for k in (0, 3)}
    assert set(CELLS.values()) == everything - left_out
    assert CELLS["bound on, e joint, K = 3"] == (True, "joint", 3)


def test_flags_of_the_cells():
    inf = float("inf")
    assert scorer_flags(False, "none", 0) == {"loss": "rm"}
    assert scorer_flags(True, "none", 0) == {"loss": "am", "expected_reward": "none"}
    assert scorer_flags(False, "regress", 0) == {"loss": "am", "expected_reward": "regress", "am_margin": inf}
    k = {"num_alternates": 3}
    assert scorer_flags(True, "none", 3) == {"loss": "am", "expected_reward": "none", "num_policies": 3} | k
    assert scorer_flags(True, "joint", 3) == {"loss": "am", "expected_reward": "joint", "num_policies": 6} | k
    for cell in CELLS.values():
        args = am_train.Args("model", "data", "out", **scorer_flags(*cell))
        assert args.num_policies >= args.num_alternates and (args.loss == "am" or args == am_train.Args(
            "model", "data", "out", loss="rm"
        ))  # fmt: skip


# --- without the bound, Eq. 6 is Eq. 1 --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def train(tokenizer, tmp_path_factory):
    """Train a tiny model without dropout -> r_c - r_r of every pair of every step, the e head's largest weight."""
    folder = tmp_path_factory.mktemp("identity")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(gpt2_config(tokenizer)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    data = jsonl(folder / "pairs.jsonl", *pairs(48))

    def run(**flags):
        seen = []

        def look(args, batch):
            seen.append((batch["r"][0] - batch["r"][1]).detach())
            return am_train.scorer_loss(args, batch)

        steps = dict(learning_rate=1e-3, global_batch_size=8, per_device_train_batch_size=8, weight_decay=0.1)
        am_train.main(
            am_train.Args(str(folder / "model"), data, str(folder / "out"), **steps, **flags), scorer_loss=look
        )
        shutil.rmtree(folder / "out")
        return torch.stack(seen)  # (steps, pairs)

    return run


@pytest.fixture(scope="module")
def reward_model(train):
    return train(loss="rm")


def without_bound(e, k):
    """What scorer_flags would give to the cells that are left out; Eq. 6 itself in place of its Eq. 1."""
    flags = scorer_flags(False, e, k)
    return {"am_margin": float("inf")} | flags | {"loss": "am", "expected_reward": e}


@pytest.mark.parametrize("e, k", OFF)
def test_without_the_bound_the_scores_train_as_eq1_s(e, k, train, reward_model):
    differences = train(**without_bound(e, k))
    torch.testing.assert_close(differences, reward_model, rtol=0, atol=2e-4)
    assert (reward_model[-1] - reward_model[0]).abs().max() > 0.1, "or nothing was trained"


@pytest.mark.parametrize(
    "flags",
    [without_bound("regress", 0), scorer_flags(True, "none", 0), without_bound("none", 3) | {"eq8_y": "own"}],
    ids=["regress", "bound", "own y"],
)
def test_what_else_differs_from_eq1(flags, train, reward_model):
    """`regress` moves the shared layers; with the bound, or with y itself in the sum, not a_c - a_r alone counts."""
    assert (train(**flags) - reward_model).abs().max() > 5e-3


# --- the whole study --------------------------------------------------------------------------------------------------


class Inline:
    """A pool of no workers: a job runs where it is submitted."""

    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, *args):
        future = Future()
        try:
            future.set_result(function(*args))
        except Exception as error:
            future.set_exception(error)
        return future


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Seed 2, one PPO step: a world with few demonstrations, few prompts, and a model of one layer."""
    scale = SETTINGS["smoke"] | {f"{split}_preferences": dict(prompts_per_task=2) for split in ("train", "test")}
    scale["sft"] = scale["sft"] | dict(num_layers=1, hidden_size=32)
    scale["ppo"] = scale["ppo"] | dict(max_eval_prompts=6, global_batch_size=8)
    base, out = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("ablation")
    world.main(world.Args(output_dir=str(base / "world"), demos_per_prompt=1))
    demos = (base / "world" / "sft.jsonl").read_text().splitlines(keepends=True)[:256]
    (base / "world" / "sft.jsonl").write_text("".join(demos))
    flags = scale["sft"] | dict(dataset_name=str(base / "world" / "sft.jsonl"))
    flags |= dict(tokenizer_name_or_path=str(base / "world" / "tokenizer"), output_dir=str(base / "sft"))
    sft.main(sft.Args(**flags))
    args = ablation.Args(output_dir=str(out), folder=str(base), seeds=(2,), ppo_steps=1, scale="smoke")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "ProcessPoolExecutor", Inline)
        patch.setitem(ablation.SETTINGS, "smoke", scale)
        ablation.main(args)
        yield args, out


def test_every_cell_is_in_the_table(study):
    args, out = study
    result = json.loads((out / "ablation.json").read_text())
    assert result["args"] == json.loads(json.dumps(asdict(args))) and list(result["cells"]) == list(CELLS)
    for cell, row in result["cells"].items():
        assert {"accuracy", "ece", "nll", "spread", "normalised_spread", "kl"} < row.keys()
        assert sum(k.startswith("eval/") for k in row) == 2, "gold of the main and of the forget prompts"
        assert all(len(values) == 1 and np.isfinite(values).all() for values in row.values()), cell
    scorers = json.loads((out / "calibration_seed2" / "calibration.json").read_text())["scorers"]
    for cell, row in result["cells"].items():
        assert row["nll"] == [scorers[cell]["nll"]]
        balance = scorers[cell]["balance"]
        assert row["normalised_spread"] == [balance["spread_of_means"] / balance["mean_within_std"]]
    assert len({row["nll"][0] for row in result["cells"].values()}) == 9, "nine different scorers"


def test_a_cell_s_run_had_the_flags_of_the_cell(study):
    out = study[1]
    for cell, name in (
        ("bound on, e regress, K = 3", "bound_on_e_regress_K3"),
        ("bound off, e none, K = 0", "bound_off_e_none_K0"),
    ):
        config = json.loads((out / f"{name}_seed2" / "config.json").read_text())["args"]
        assert {k: config[k] for k in scorer_flags(*CELLS[cell])} == scorer_flags(*CELLS[cell]) and config["seed"] == 2
        ppo = json.loads((out / f"ppo_{name}_seed2" / "config.json").read_text())["args"]
        assert ppo["reward_model_path"] == str(out / f"{name}_seed2" / "model") and ppo["seed"] == 2
        values = json.loads((out / "ablation.json").read_text())["cells"][cell]
        last = metrics_of(out / f"ppo_{name}_seed2")[-1]
        assert last["step"] == 1 and all(values[k] == [last[k]] for k in values if k.startswith("eval/"))
        assert values["kl"] == [last["objective/kl"]]
    rows = [json.loads(line) for line in (out / "logprobs" / "pairs.jsonl").read_text().splitlines()]
    assert {row[f"policy_{side}"] for row in rows for side in ("chosen", "rejected")} == {"early@1", "sft@1", "sft@1.4"}


def test_seeds_and_their_table(study, tmp_path):
    """The same seed read twice, once with other numbers: mean, least and largest of both in the Markdown."""
    _, out = study
    folder = Path(shutil.copytree(out, tmp_path / "two"))
    for path in list(folder.glob("*_seed2")):
        shutil.copytree(path, str(path)[:-1] + "1")
    report = json.loads((folder / "calibration_seed1" / "calibration.json").read_text())
    cell = "bound on, e none, K = 3"
    report["scorers"][cell]["accuracy"], seed2 = 40.0, report["scorers"][cell]["accuracy"]
    write_json(folder / "calibration_seed1" / "calibration.json", report)
    table = collect(ablation.Args(output_dir=str(folder), seeds=(1, 2)))
    assert table[cell]["accuracy"] == [40.0, seed2] and list(table) == list(CELLS)
    table[cell] |= {"accuracy": [40.0, 61.0], "nll": [0.5, 0.75]}
    head, rule, *lines = table_of_seeds(table, COLUMNS).splitlines()
    assert len(lines) == 9 and all(line.count("|") == head.count("|") == rule.count("|") for line in lines)
    columns = [part.strip() for part in head.split("|")]
    values = dict(zip(columns, (part.strip() for part in lines[list(CELLS).index(cell)].split("|")), strict=True))
    assert values[""] == "" and cell in lines[list(CELLS).index(cell)]
    assert values["accuracy"] == "50.50 (40.00 to 61.00)" and values["nll"] == "0.6250 (0.5000 to 0.7500)"


def test_a_study_that_is_done_is_not_run_again(study, monkeypatch):
    """Only the finished jobs are collected; another PPO length is another PPO."""
    args, out = study
    monkeypatch.setattr(jobs, "ProcessPoolExecutor", Inline)
    monkeypatch.setattr(Inline, "submit", lambda *_: pytest.fail("a job ran twice"))
    before = (out / "ablation.md").read_text()
    ablation.main(args)
    assert (out / "ablation.md").read_text() == before
    longer = ablation.Args(**asdict(args) | {"ppo_steps": 2})
    again = [job.folder.name for job in jobs_of(longer, SETTINGS["smoke"]) if not job.done()]
    assert len(again) == 9 and all(name.startswith("ppo_") for name in again)


def test_folders_and_scales_that_are_not_there(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        tyro.cli(ablation.Args, args=["--output-dir", "out", "--scale", "huge"])
    assert stop.value.code == 2 and "huge" in capsys.readouterr().err
    with refused(f"--folder {tmp_path}: holds no sft/model; run make reproduce first"):
        ablation.main(ablation.Args(output_dir="out", folder=str(tmp_path)))
