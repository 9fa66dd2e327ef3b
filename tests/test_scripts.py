"""What every script says about bad input, and a few training steps of each."""

import dataclasses
import importlib.util
import inspect
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import am_train
import evaluate
import ppo_sr
import select_rehearsal
import sft
from plumbing.command_line import check_flags
from tests.test_data import ROW, jsonl, refused, write
from tools import compare
from utils import LearningRate, load_function, load_policy, load_tokenizer, run_cli

ROOT = Path(__file__).parents[1]
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog"]


def test_warmup_cosine_by_hand():
    factor = sft.warmup_cosine(110, 0.1, 0.1)  # 11 steps of warm-up, 99 of cosine
    assert factor(0) == pytest.approx(1 / 11)
    assert factor(10) == factor(11) == 1  # the peak, where cos 0 = 1
    # a third of the way, cos 60 deg = .5: .1 + .9 x .75; two thirds, -.5: .1 + .9 x .25
    assert factor(44) == pytest.approx(0.775) and factor(77) == pytest.approx(0.325)
    # the last step, 98 / 99 of the way: cos 178.18 deg = -.999497, .1 + .45 x .000503
    assert factor(109) == pytest.approx(0.100227, abs=1e-6)
    assert factor(110) == factor(500) == pytest.approx(0.1)
    assert sft.warmup_cosine(1, 0.1, 0.1)(0) == 1 and sft.warmup_cosine(3, 0.0, 0.5)(0) == 1
    copies = {inspect.getsource(script.warmup_cosine) for script in (sft, am_train)}
    assert len(copies) == 1


# --- functions of the user's ----------------------------------------------------------------------


def lengths(prompts, responses):
    return torch.tensor([len(y) for y in responses])


def test_load_function():
    two = ["x", "y"], ["a", "bcd"]
    assert load_function("tests.test_scripts:lengths", "--judge")(*two) == [1.0, 3.0]
    # too many and no numbers; no list; no list
    for spec in ("operator:add", "operator:eq", "operator:is_not", "json:dumps", "textwrap:dedent"):
        with refused("--judge", spec):
            load_function(spec, "--judge")(*two)
    for spec in ("no_such_module:f", "json:no_such_function", "json"):
        with refused("--judge", spec, "module:function"):
            load_function(spec, "--judge")


# --- what is printed ------------------------------------------------------------------------------


def test_usage_shows_how_a_module_is_run(monkeypatch, capsys):
    spec = importlib.util.find_spec("tools.compare")
    for main, argv, shown in (
        (SimpleNamespace(__spec__=spec), spec.origin, "usage: python -m tools.compare ["),
        (SimpleNamespace(__spec__=None), "ppo_sr.py", "usage: ppo_sr.py ["),
    ):
        monkeypatch.setitem(sys.modules, "__main__", main)
        monkeypatch.setattr("sys.argv", [argv, "--help"])
        with pytest.raises(SystemExit):
            run_cli(None, compare.Args, "")
        assert capsys.readouterr().out.startswith(shown)


def test_no_script_counts_1_steps():
    for path in (ROOT / f"{name}.py" for name in ("am_train", "sft", "ppo_sr", "utils")):
        assert "} steps" not in path.read_text(encoding="utf-8"), path.name


# --- bad input ------------------------------------------------------------------------------------


@pytest.fixture
def runs(policy_folder, scorer_folder, tmp_path):
    """For each script a function of (data file, changes of the flags) that runs it."""

    def script(main, args_class, data="dataset_name", **fixed):
        fixed["output_dir"] = str(tmp_path / "out")

        def run(path, **changes):
            given = (path,) if data == "dataset_names" else path
            args = args_class(**fixed | {data: given} | changes)
            check_flags(args)  # as run_cli does
            main(args)

        return run

    policy, both = {"model_name_or_path": policy_folder}, {"reward_model_path": scorer_folder}
    both |= policy
    judged = {
        "policy": policy_folder,
        "reference": policy_folder,
        "judge": "tests.test_scripts:lengths",
    }
    return {
        "sft": script(sft.main, sft.Args, **policy),
        "am_train": script(am_train.main, am_train.Args, **policy),
        "calibration": script(evaluate.main, evaluate.Calibration, scorers=(scorer_folder,)),
        "winrate": script(evaluate.main, evaluate.Winrate, "dataset_names", **judged),
        "select_rehearsal": script(select_rehearsal.main, select_rehearsal.Args, **both, num_clusters=1),
        "ppo_sr": script(ppo_sr.main, ppo_sr.Args, **both, max_length=128),
    }


SCRIPTS = ["sft", "am_train", "calibration", "winrate", "select_rehearsal", "ppo_sr"]
SECOND_FIELD = {"sft": "response", "am_train": "rejected", "calibration": "chosen"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_bad_data_is_refused_before_anything_is_written(script, runs, tmp_path):
    run, field = runs[script], SECOND_FIELD.get(script, "prompt")
    good = {k: v for k, v in ROW.items() if k != "response" or script == "sft"}
    without = {k: v for k, v in good.items() if k != field}
    with refused(tmp_path / "none.jsonl"):
        run(str(tmp_path / "none.jsonl"))
    with refused("empty.jsonl", "no rows"):
        run(write(tmp_path / "empty.jsonl", ""))
    with refused("column.jsonl", "line 2", f"'{field}'"):
        run(jsonl(tmp_path / "column.jsonl", good, without))
    with refused("number.jsonl", "line 2", f"'{field}'"):
        run(jsonl(tmp_path / "number.jsonl", good, good | {field: 7}))
    long = jsonl(tmp_path / "long.jsonl", good, good | {"prompt": "the quick brown fox " * 30})
    room = {} if script in ("sft", "am_train", "calibration") else {"response_length": 64}
    with refused("long.jsonl", "line 2", "tokens", "--max_length", "--truncate_prompts"):
        run(long, max_length=100, **room)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("script", ["calibration", "select_rehearsal", "ppo_sr"])
def test_a_scorer_without_a_reward_head_is_refused(script, runs, policy_folder, tmp_path):
    flag = {"reward_model_path": policy_folder}
    if script == "calibration":
        flag = {"scorers": (policy_folder,)}
    with refused(policy_folder, "reward head"):
        runs[script](jsonl(tmp_path / "a.jsonl", ROW), **flag)


@pytest.mark.parametrize("script", ["sft", "am_train", "winrate", "ppo_sr"])
def test_a_missing_model_folder_is_refused(script, runs, tmp_path):
    flag = {"winrate": "policy"}.get(script, "model_name_or_path")
    with refused(tmp_path / "no_model"):
        runs[script](jsonl(tmp_path / "a.jsonl", ROW), **{flag: str(tmp_path / "no_model")})


def test_ppo_refuses_what_cannot_run(runs, tmp_path):
    data = jsonl(tmp_path / "a.jsonl", ROW)
    no_response = jsonl(tmp_path / "b.jsonl", {"prompt": "x"})
    for flags, said in (
        ({"global_batch_size": 10, "num_mini_batches": 3}, "--num_mini_batches"),
        ({"max_length": 64}, "--max_length"),
        ({"temperature": 0.0}, "--temperature"),
        ({"gold_reward": "miniature.world:no_such"}, "--gold_reward"),
        ({"rehearsal_dataset_name": no_response}, "'response'"),
        ({"eval_dataset_names": (str(tmp_path / "none.jsonl"),)}, "none.jsonl"),
    ):
        with refused(said):
            runs["ppo_sr"](data, **flags)


def test_other_flags_that_contradict_each_other_are_refused(runs, tmp_path):
    data = jsonl(tmp_path / "a.jsonl", ROW)
    for script, flags, *said in (
        ("am_train", {"loss": "rm", "expected_reward": "joint"}, "--expected_reward"),
        ("select_rehearsal", {"num_clusters": 2}, "--num_clusters", "1 prompts"),
        ("calibration", {"names": ("a", "b")}, "--names"),
        ("winrate", {"judge": "nothing"}, "--judge"),
        ("sft", {"model_name_or_path": None}, "--model_name_or_path"),
    ):
        with refused(*said):
            runs[script](data, **flags)


def test_what_is_no_policy_no_judge_or_too_long_is_refused(runs, policy_folder, scorer_folder, tmp_path):
    data = jsonl(tmp_path / "a.jsonl", {"prompt": "the fox"})
    with refused(scorer_folder, "language-model head"):
        runs["winrate"](data, reference=scorer_folder)
    with refused("--judge"):
        runs["winrate"](data, judge="tests.test_data:jsonl")
    positions = load_policy(policy_folder).config.max_position_embeddings
    with refused("--max_length", f"{positions} positions"):
        runs["winrate"](data, max_length=10 * positions, response_length=2 * positions)
    pair = {"prompt": "the fox " * 3 * positions, "chosen": "dog", "rejected": "fox"}
    with refused("--max_length", f"{positions} positions"):
        runs["am_train"](jsonl(tmp_path / "b.jsonl", pair), max_length=100 * positions)


# --- the command line -----------------------------------------------------------------------------


def command(monkeypatch, module, *flags):
    """The exit code of the script with these flags."""
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *flags])
    with pytest.raises(SystemExit) as stop:
        run_cli(module.main, module.Args, "")
    return stop.value.code


def test_a_command_line_ends_in_one_line_and_exit_code_2(policy_folder, tmp_path):
    flags = ["--dataset_name", tmp_path / "none.jsonl", "--output_dir", tmp_path / "out"]
    line = [sys.executable, "am_train.py", "--model_name_or_path", policy_folder, *flags]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert str(tmp_path / "none.jsonl") in done.stderr


def test_numbers_that_cannot_be_are_refused_by_flag(policy_folder, monkeypatch, capsys):
    flags = ["--model_name_or_path", policy_folder, "--dataset_name", "a", "--output_dir", "b"]
    for flag, value in (("--global_batch_size", "0"), ("--learning_rate", "-1")):
        assert command(monkeypatch, am_train, *flags, flag, value) == 2
        assert capsys.readouterr().err.startswith(f"error: {flag} ")


def test_files_and_folders_are_named(monkeypatch, policy_folder, tmp_path, capsys):
    good, bad = jsonl(tmp_path / "a.jsonl", ROW), jsonl(tmp_path / "b.jsonl", {"prompt": "x"})
    for model, data, said in (("none", good, "none: "), (policy_folder, bad, f"{bad}, line 1: ")):
        flags = ["--model_name_or_path", model, "--dataset_name", data]
        assert command(monkeypatch, sft, *flags, "--output_dir", str(tmp_path / "out")) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and said in error


def test_a_reader_that_has_read_enough_sees_no_traceback():
    line = f"{sys.executable} ppo_sr.py --help | head -1"
    done = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.startswith("usage: ppo_sr.py") and done.stderr == ""


# --- a few training steps -------------------------------------------------------------------------


def last_row(folder):
    return json.loads((Path(folder) / "metrics.jsonl").read_text().splitlines()[-1])


def test_am_train_does_not_depend_on_the_micro_batch(runs, tmp_path):
    rows = [ROW | {"prompt": " ".join(WORDS[: 1 + i % 7]), "chosen": WORDS[i % 9]} for i in range(12)]
    data, grad_norms = jsonl(tmp_path / "a.jsonl", *rows), []
    for micro in (12, 5):
        flags = {"global_batch_size": 12, "expected_reward": "regress"}
        out = str(tmp_path / str(micro))
        runs["am_train"](data, output_dir=out, per_device_train_batch_size=micro, **flags)
        row = last_row(out)
        grad_norms.append((row["loss"], row["grad_norm"]))
    assert grad_norms[0] == pytest.approx(grad_norms[1], rel=1e-4)
    assert torch.isfinite(torch.tensor(grad_norms)).all() and grad_norms[0][1] > 0


def test_ppo_does_not_depend_on_the_micro_batch_and_rehearses(runs, tmp_path):
    """Losses are means over the mini-batch's tokens, Eq. 9's NLL over the rehearsal batch's."""
    prompts = [{"prompt": " ".join(WORDS[: 1 + i % 7])} for i in range(8)]
    answers = [{"prompt": w, "response": " ".join(WORDS[:i])} for i, w in enumerate(WORDS, 1)]
    data, replay = jsonl(tmp_path / "a.jsonl", *prompts), jsonl(tmp_path / "b.jsonl", *answers)
    flags = dict(global_batch_size=8, total_steps=1, num_mini_batches=1, response_length=6)
    flags |= dict(rehearsal_dataset_name=replay, rehearsal_batch_size=9, rehearsal_coef=1.0)
    logs = {}
    for micro in (16, 3):
        for reduction in ("mean", "sum"):
            out = str(tmp_path / f"{micro}{reduction}")
            changes = dict(per_device_train_batch_size=micro, rehearsal_reduction=reduction)
            runs["ppo_sr"](data, output_dir=out, learning_rate=1e-3, **flags, **changes)
            logs[micro, reduction] = last_row(out)
    for reduction in ("mean", "sum"):
        one, other = logs[16, reduction], logs[3, reduction]
        keys = [k for k in one if k.startswith(("loss/", "policy/", "val/", "objective/"))]
        assert "loss/rehearsal_nll" in keys
        for key in keys:
            assert one[key] == pytest.approx(other[key], rel=1e-3, abs=1e-5), key
    nll = {reduction: logs[3, reduction]["loss/rehearsal_nll"] for reduction in ("mean", "sum")}
    assert nll["sum"] > 3 * nll["mean"]  # rows of 2 to 10 tokens


def test_ppo_takes_a_policy_without_a_padding_token(policy_folder, scorer_folder, tmp_path):
    """GPT-2 and Llama have none: a scorer gets one of its own, the policy masks with <eos>."""
    for name, source in (("policy", policy_folder), ("scorer", scorer_folder)):
        shutil.copytree(source, tmp_path / name)
    bare = load_tokenizer(policy_folder)
    bare.pad_token = bare.eos_token
    bare.save_pretrained(tmp_path / "policy")
    data = jsonl(tmp_path / "a.jsonl", {"prompt": "the fox"}, {"prompt": "dog"})
    args = ppo_sr.Args(
        model_name_or_path=str(tmp_path / "policy"), reward_model_path=str(tmp_path / "scorer"),
        dataset_name=data, output_dir=str(tmp_path / "out"), global_batch_size=2, total_steps=1,
        response_length=4, eval_steps=1, max_length=128,
    )  # fmt: skip
    ppo_sr.main(args)
    row = last_row(tmp_path / "out")
    assert row["objective/kl"] == pytest.approx(0, abs=1e-5)
    assert row["val/ratio"] == pytest.approx(1, abs=1e-3)


# --- the command line -----------------------------------------------------------------------------


@dataclasses.dataclass
class Few:
    output_dir: str
    learning_rate: LearningRate = 1e-3
    bf16: bool = False
    resume: bool = True


def test_no_flags_at_all_name_what_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["few.py"])
    with pytest.raises(SystemExit) as stop:
        run_cli(print, Few, "")
    assert stop.value.code == 2 and "--output_dir" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, said",
    {
        "--output_dir out --lrr 3": "Unrecognized options: --lrr, 3; Perhaps you meant: --lr, --learning_rate",
        "--output_dir out --learning_rate x": "--learning_rate: could not convert string to float: 'x'",
        "--output_dir out --bf16 maybe": "'maybe' for argument '--bf16'",
        "--output_dir out extra": "Unrecognized options: extra",
        "--output_dir": "Missing value for argument '--output_dir'",
        "--otput_dir out": "--otput_dir out",
        "": "Missing from few.py: --output_dir STR",
    }.items(),
)
@pytest.mark.parametrize("columns", ["60", "200"])
def test_the_box_around_wrong_flags_ends_in_a_line(words, said, columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr(sys, "argv", ["few.py", *words.split()])
    with pytest.raises(SystemExit) as stop:
        run_cli(print, Few, "")
    *_, line = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and line.startswith("error: ") and said in line and "helptext" not in line


@pytest.mark.parametrize(
    "given, expected",
    [
        ("", (1e-3, False, True)),
        ("--bf16", (1e-3, True, True)),
        ("--bf16 --lr 2", (2.0, True, True)),
        ("--bf16 True --resume False", (1e-3, True, False)),
        ("--bf16=True --learning_rate=3", (3.0, True, True)),
    ],
)
def test_a_switch_may_stand_alone_and_lr_is_the_learning_rate(given, expected, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(sys, "argv", ["few.py", *given.split(), "--output_dir", str(tmp_path)])
    run_cli(seen.append, Few, "")
    assert (seen[0].learning_rate, seen[0].bf16, seen[0].resume) == expected


def test_the_flag_whose_value_is_wrong_is_named(runs, policy_folder, scorer_folder, tmp_path, monkeypatch, capsys):
    """One folder as two flags: both are named."""
    data = jsonl(tmp_path / "a.jsonl", ROW)
    no_response = jsonl(tmp_path / "b.jsonl", {"prompt": "x"})
    for flags, said in (
        (f"--reward_model_path {policy_folder} --dataset_name {data}", "--model_name_or_path and --reward_model_path"),
        (
            f"--reward_model_path {scorer_folder} --dataset_name {no_response} --rehearsal_dataset_name {no_response}",
            "--dataset_name and --rehearsal_dataset_name",
        ),
    ):
        command = f"ppo_sr.py --model_name_or_path {policy_folder} --output_dir {tmp_path}/out"
        monkeypatch.setattr(sys, "argv", f"{command} {flags} --max_length 128".split())
        with pytest.raises(SystemExit) as stop:
            run_cli(ppo_sr.main, ppo_sr.Args, "")
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert stop.value.code == 2 and line.startswith(f"error: {said} ")


def test_deepspeed_is_silent_where_nobody_asked_for_it():
    """transformers imports it where it is installed, and it would warn of a machine without a GPU."""
    code = "import utils; from transformers import AutoModelForCausalLM; AutoModelForCausalLM.from_pretrained"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0 and "accelerator" not in done.stdout + done.stderr
