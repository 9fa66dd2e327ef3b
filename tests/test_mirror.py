"""tools/mirror.py with stand-ins for TensorBoard and wandb."""

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest

from tests.test_data import refused
from tools import mirror, watch

ROWS = [{"step": 0, "eval/main/gold": 0.4}, {"step": 1, "loss": 2.0, "lr": 0.5}]


@pytest.fixture
def run(tmp_path):
    text = "".join(json.dumps(row) + "\n" for row in ROWS)
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 2, "lo')
    (tmp_path / "config.json").write_text('{"args": {"total_steps": 2, "seed": 3}}')
    return tmp_path


def stand_in(monkeypatch, name, **members):
    module = ModuleType(name)
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def tensorboard(monkeypatch):
    seen = []

    class SummaryWriter:
        def __init__(self, folder):
            seen.append(str(folder))

        def add_scalar(self, name, value, step):
            seen.append((name, value, step))

        def flush(self):
            seen.append("flush")

    stand_in(monkeypatch, "torch.utils.tensorboard", SummaryWriter=SummaryWriter)
    return seen


EXPECTED = [("eval/main/gold", 0.4, 0), "flush", ("loss", 2.0, 1), ("lr", 0.5, 1), "flush"]


def test_tensorboard_gets_every_number(run, tensorboard):
    mirror.main(mirror.Args(str(run)))
    assert tensorboard == [str(run / "tensorboard"), *EXPECTED]


def test_it_follows_a_growing_run_to_its_last_step(run, tensorboard, monkeypatch):
    def grow(seconds):
        with open(run / "metrics.jsonl", "a") as file:
            file.write('ss": 1.0}\n')

    monkeypatch.setattr(watch.time, "sleep", grow)
    mirror.main(mirror.Args(str(run), follow=True))
    assert tensorboard[1:] == [*EXPECTED, ("loss", 1.0, 2), "flush"]


def test_wandb_gets_the_flags_too(run, monkeypatch):
    seen = []

    def init(**options):
        seen.append(options["config"])
        return SimpleNamespace(log=lambda metrics, step: seen.append((metrics, step)))

    stand_in(monkeypatch, "wandb", init=init)
    mirror.main(mirror.Args(str(run), to="wandb"))
    config = {"total_steps": 2, "seed": 3}
    assert seen == [config, ({"eval/main/gold": 0.4}, 0), ({"loss": 2.0, "lr": 0.5}, 1)]


def test_what_is_missing_is_named_in_one_line(run, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with refused("--to tensorboard", "pip install tensorboard"):
        mirror.main(mirror.Args(str(run)))
    monkeypatch.setitem(sys.modules, "wandb", None)
    with refused("--to wandb", "pip install wandb"):
        mirror.main(mirror.Args(str(run), to="wandb"))
    with refused(tmp_path / "none", "no run"):
        mirror.main(mirror.Args(str(tmp_path / "none")))
