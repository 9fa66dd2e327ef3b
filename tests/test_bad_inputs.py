"""Bad inputs, and what is said of each: exit code 2 and one line on stderr, "error: ...", which names
the flag, file, line or field. Each case is one line of a table. Paths are those of `world`.
"""

import importlib
import json
import math
import re
import shutil
from dataclasses import fields
from pathlib import Path

import pandas as pd
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import am_train
import evaluate
import ppo_sr
import select_rehearsal
import sft
from baselines import average_weights, ppo_any_reward, ppo_max
from plumbing.command_line import check_flags
from tests.conftest import SENTENCE, byte_level_tokenizer, encoder_tokenizer, gpt2_config
from tools import gallery, write_logprobs
from utils import InputError, run_cli

pytestmark = pytest.mark.usefixtures("one_thread")

PPO = "--model_name_or_path policy --dataset_name rows.jsonl --global_batch_size 4 --total_steps 1"
PPO += " --response_length 8 --max_length 64"
JUDGED = "--num_bootstrap 10 --judge scorer"
SELECT = "--reward_model_path scorer --dataset_name rows.jsonl --embedding_model policy"
SELECT += " --num_clusters 2"
COMMANDS = {  # the command that works
    "am_train": (am_train, "--model_name_or_path policy --dataset_name rows.jsonl"),
    "sft": (sft, "--model_name_or_path policy --dataset_name rows.jsonl"),
    "sft from scratch": (sft, "--tokenizer_name_or_path policy --dataset_name rows.jsonl"),
    "ppo_sr": (ppo_sr, f"{PPO} --reward_model_path scorer"),
    "ppo_max": (ppo_max, f"{PPO} --reward_model_path scorer --critic_warmup_steps 0"),
    "ppo_any_reward": (ppo_any_reward, PPO),
    "calibration": (evaluate, "calibration --scorers scorer --dataset_name rows.jsonl"),
    "winrate": (
        evaluate,
        f"winrate {JUDGED} --policy policy --reference policy --dataset_names rows.jsonl"
        " --response_length 8 --max_length 64",
    ),
    "winrate of answers": (evaluate, f"winrate {JUDGED} --responses rows.jsonl"),
    "select_rehearsal": (select_rehearsal, f"{SELECT} --model_name_or_path policy"),
    "select of answers": (select_rehearsal, SELECT),
}
ROW = {"prompt": "the quick fox", "chosen": "jumps over", "rejected": "judges", "task": "a"}
ROW |= {"response": "my vow", "reference": "the lazy dog"}


# --- running a command ----------------------------------------------------------------------------


@pytest.fixture
def run(world, tmp_path, monkeypatch, capsys):
    """run(command, its changed flags) in `world` -> exit code and stderr; output goes to `out`."""

    def command(name, changes="", out=tmp_path / "out"):
        module, line = COMMANDS[name]
        monkeypatch.chdir(world)
        words, flags = f"{line} {changes}".split(), {}
        head = [words.pop(0)] if module is evaluate else []
        for word in words:  # a later flag is in the place of the earlier one
            if word.startswith("--"):
                flags[word] = values = []
            else:
                values.append(word)
        flags["--output_dir"] = [str(out)]
        line = [x for flag, values in flags.items() for x in (flag, *values)]
        monkeypatch.setattr("sys.argv", [f"{module.__name__}.py", *head, *line])
        kinds = evaluate.Calibration | evaluate.Winrate if module is evaluate else module.Args
        capsys.readouterr()  # the bars of models that were saved before
        try:
            code = run_cli(module.main, kinds, "") or 0
        except SystemExit as stop:
            code = stop.code
        return code, re.sub(r"\w+: \d+ of \d+, .*\n", "", capsys.readouterr().err)  # but no progress

    return command


def is_refused(result, *said):
    """One line in which all of `said` stand; in "a|b" a or b."""
    code, error = result
    assert code == 2 and re.fullmatch(r"error: [^\n]+\n", error), f"exit code {code}: {error}"
    for part in said:
        assert any(p in error for p in part.split("|")), f"no {part} in: {error}"


def jsonl(path, *lines):
    lines = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    Path(path).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return str(path)


def save(folder, tokenizer, config, kind=AutoModelForCausalLM):
    torch.manual_seed(0)
    kind.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def world(tmp_path_factory, tokenizer, policy_folder, scorer_folder):
    """A folder with a policy, a scorer, rows, and what is wrong with models."""
    folder, scorers = tmp_path_factory.mktemp("world"), AutoModelForSequenceClassification
    shutil.copytree(policy_folder, folder / "policy")
    shutil.copytree(scorer_folder, folder / "scorer")
    shutil.copytree(policy_folder, folder / "run" / "model")
    save(folder / "three_heads", tokenizer, gpt2_config(tokenizer, num_labels=3), scorers)
    (folder / "no_model").mkdir()
    (folder / "no_model" / "README.md").write_text("nothing here")
    sep = byte_level_tokenizer(pad_token="<pad>", sep_token="[SEP]")
    save(folder / "only_sep", sep, gpt2_config(sep))
    no_end = byte_level_tokenizer(pad_token="<pad>")
    save(folder / "no_end", no_end, gpt2_config(no_end))
    grown = byte_level_tokenizer(eos_token="<eos>")
    save(folder / "grown", grown, gpt2_config(grown, vocab_size=len(grown)))
    grown.add_special_tokens({"pad_token": "[PAD]"})
    grown.save_pretrained(folder / "grown")
    rows = [ROW | {"prompt": ROW["prompt"] + " now" * i, "task": "ab"[i % 2]} for i in range(8)]
    jsonl(folder / "rows.jsonl", *rows)
    jsonl(folder / "prompts.jsonl", *({"prompt": row["prompt"]} for row in rows))
    jsonl(folder / "one.jsonl", rows[0])
    long = {k: " ".join([SENTENCE] * 6) for k in ("chosen", "response")}
    jsonl(folder / "long.jsonl", ROW, ROW | long)
    jsonl(folder / "margins.jsonl", "{")
    (folder / "margins.json").write_text('{"b": 1.0}')
    (folder / "leaving.py").write_text("raise SystemExit(3)")
    return folder


def test_the_commands_work(run, world, tmp_path):
    """Else what is refused below would be refused anyway. And a seed may be of any size."""
    for name in COMMANDS:
        how = "--per_device_eval_batch_size 8" if "sft" not in name else ""
        how += " --reward_function tests.test_bad_inputs:lengths" * (name == "ppo_any_reward")
        if name != "select_rehearsal":  # a random policy does not end its answers
            code, error = run(name, f"{how} --seed {2**40}", tmp_path / name)
            assert code == 0, f"{name}: {error}"


# --- numbers out of range -------------------------------------------------------------------------

LENGTH = {"--max_length": "0 1 -5", "--seed": "-1"}
EVAL = {"--per_device_eval_batch_size": "0 -1"} | LENGTH
ADAM = {"--learning_rate": "0 -1 nan inf", "--max_grad_norm": "0 -1 nan", "--save_steps": "-1"}
TRAIN = {"--warmup_ratio": "5 -0.1 nan", "--min_lr_ratio": "50 -1 nan", "--num_train_epochs": "0 -1"}
TRAIN |= {"--weight_decay": "-1 nan inf 1e38", "--global_batch_size": "0 -1"} | ADAM
TRAIN |= {"--per_device_train_batch_size": "0"}
SAMPLE = {"--response_length": "0 -1", "--temperature": "-1 nan inf"}
RANGES = {
    "am_train": TRAIN
    | EVAL
    | {
        "--am_margin": "0 -1 nan",
        "--num_alternates": "-1",
        "--num_policies": "-1",
        "--importance_clip": "-1 nan",
        "--max_rows": "-1",
        "--eval_steps": "-1",
    },
    "sft": TRAIN | LENGTH,
    "sft from scratch": {"--num_layers": "0 -1", "--hidden_size": "0", "--num_heads": "0"},
    "ppo_sr": ADAM
    | EVAL
    | SAMPLE
    | {
        "--temperature": "0 -1 nan inf",
        "--score_scale": "0 -1 nan inf 1e38",
        "--moving_average_decay": "2 -1 nan",
        "--missing_eos_penalty": "-1 nan inf",
        "--rehearsal_coef": "-1 nan inf",
        "--rehearsal_batch_size": "0",
        "--total_steps": "0 -1",
        "--critic_warmup_steps": "-1",
        "--global_batch_size": "0",
        "--num_ppo_epochs": "0",
        "--num_mini_batches": "0",
        "--per_device_train_batch_size": "0",
        "--critic_learning_rate": "0 -1 nan inf",
        "--kl_coef": "-1 nan inf 1e38",
        "--gamma": "-1 2 nan",
        "--lam": "-1 2 nan",
        "--cliprange": "0 -1 nan",
        "--cliprange_value": "0 -1 nan",
        "--max_eval_prompts": "-1",
        "--eval_steps": "0 -1",
    },
    "calibration": EVAL | {"--num_bootstrap": "0 -1"},
    "winrate": EVAL | SAMPLE | {"--num_bootstrap": "0", "--tie_band": "-1 nan"},
    "select_rehearsal": EVAL | SAMPLE | {"--num_clusters": "0 -1", "--top_k": "0 -1"},
    "ppo_max": {
        "--score_clip": "0 -1 nan",
        "--kl_target": "-1 nan",
        "--kl_horizon": "-1",
        "--advantage_clip": "0 -1 nan",
        "--vf_coef": "-1 nan",
        "--entropy_coef": "-1 nan",
        "--ptx_coef": "-1 nan",
        "--ptx_batch_size": "0",
        "--lam": "2",  # and those of ppo_sr.py
    },
}


def numbers(args_class):
    return {f"--{f.name}" for f in fields(args_class) if type(f.default) in (int, float)}


def test_every_number_has_a_range():
    tested = {}
    for command, flags in RANGES.items():
        tested.setdefault(COMMANDS[command][0], set()).update(flags)
    tested[ppo_max] |= tested[ppo_sr]
    assert numbers(am_train.Args) | {"--am_margin"} == tested[am_train]
    assert numbers(evaluate.Winrate) | numbers(evaluate.Calibration) == tested[evaluate]
    assert numbers(ppo_sr.Args) | {"--moving_average_decay"} == tested[ppo_sr]
    for module in (sft, ppo_max, select_rehearsal):
        assert numbers(module.Args) <= tested[module]


OUT_OF_RANGE = [
    f"{command}: {flag} {value}"
    for command, flags in RANGES.items()
    for flag, values in flags.items()
    for value in values.split()
]


@pytest.mark.parametrize("case", OUT_OF_RANGE)
def test_a_number_out_of_range_is_named_before_a_file_is_opened(case, run, tmp_path):
    command, flag, value = re.fullmatch("(.+): (.+) (.+)", case).groups()
    named = re.findall(
        r"--(?:\w+_path|dataset_names?|policy|reference|scorers|embedding_model)\b", COMMANDS[command][1]
    )
    nothing = " ".join(f"{name} none" for name in named)  # what is not there is not reached
    code, error = run(command, f"{nothing} {flag} {value}")
    assert code == 2 and re.fullmatch(rf"error: {flag} \S+: must be [^\n]+\n", error), error
    assert not (tmp_path / "out").exists()


def test_what_switches_something_off_is_in_range(run, tmp_path):
    """inf: no clipping; 0: no penalty, no limit, no warm-up."""
    flags = "--max_grad_norm inf --cliprange inf --cliprange_value inf --kl_coef 0 --gamma 0 --lam 0"
    flags += " --missing_eos_penalty 0 --rehearsal_coef 0 --max_eval_prompts 0 --save_steps 0"
    assert run("ppo_sr", flags, tmp_path / "ppo") == (0, "")
    flags = "--am_margin inf --max_grad_norm inf --warmup_ratio 0 --min_lr_ratio 0 --max_rows 0"
    assert run("am_train", flags + " --warmup_ratio 1 --min_lr_ratio 1", tmp_path / "am") == (0, "")
    flags = "--tie_band 0 --temperature 0 --num_bootstrap 1"
    assert run("winrate", flags, tmp_path / "winrate") == (0, "")


# --- files of rows --------------------------------------------------------------------------------

HALF = "\ud83d"  # half a surrogate pair: json.dumps writes \ud83d, as cut emoji leave it
USER = {"role": "user", "content": "Weather in Lyon?"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "weather"}}]}
TOOL = {"role": "tool", "content": "12 degrees"}


def row(more="", **changes):
    """A row as JSON, with `more` JSON at its end; None: the field is left out."""
    kept = {k: v for k, v in (ROW | changes).items() if v is not None}
    return json.dumps(kept)[:-1] + more + "}"


def talk(*before):
    """A pair of whole conversations."""
    sides = {"chosen": "Yes.", "rejected": "No."}
    sides = {k: [*before, {"role": "assistant", "content": v}] for k, v in sides.items()}
    return json.dumps(sides)


LINES = [  # command, what is wrong with line 2 of its data, that line, what is said beside its name
    ("am_train", "not JSON", "{'prompt': 1}", "not JSON"),
    ("am_train", "cut JSON", row()[:-9], "not JSON"),
    ("am_train", "blank", "", "object"),
    ("am_train", "a list", '["a", "b"]', "object"),
    ("am_train", "a text", '"a"', "object"),
    ("am_train", "null", "null", "object"),
    ("am_train", "an integer of 5,000 digits", row(', "n": ' + "9" * 5000), ""),
    ("am_train", "JSON nested 100,000 deep", row(', "n": ' + "[" * 10**5 + "]" * 10**5), ""),
    ("am_train", "an object nested 100,000 deep", '{"a":' * 10**5 + "1" + "}" * 10**5, ""),
    ("am_train", "half a surrogate pair in prompt", row(prompt="a " + HALF), "prompt"),
    ("am_train", "half a surrogate pair in chosen", row(chosen=HALF + " a"), "chosen"),
    ("am_train", "half a surrogate pair in a message", talk(USER | {"content": HALF}), "prompt|chosen"),
    ("am_train", "half a surrogate pair in task", row(task=HALF), "task"),
    ("sft", "half a surrogate pair in response", row(response=HALF), "response"),
    ("ppo_sr", "half a surrogate pair in prompt", row(prompt=HALF), "prompt"),
    ("winrate of answers", "half a surrogate pair in response", row(response=HALF), "response"),
    ("winrate of answers", "half a surrogate pair in reference", row(reference=HALF), "reference"),
    ("winrate", "half a surrogate pair in another field", row(note=HALF), "note"),
    ("select of answers", "half a surrogate pair in response", row(response=HALF), "response"),
    ("calibration", "prob_chosen NaN", row(prob_chosen=math.nan), "prob_chosen"),
    ("calibration", "prob_chosen infinite", row(prob_chosen=math.inf), "prob_chosen"),
    ("calibration", "prob_chosen as text", row(prob_chosen="0.7"), "prob_chosen"),
    ("calibration", "prob_chosen 1.2", row(prob_chosen=1.2), "prob_chosen"),
    ("am_train", "no rejected", row(rejected=None), "rejected"),
    ("am_train", "no prompt", row(prompt=None), "prompt"),
    ("am_train", "chosen null", row(', "chosen": null', chosen=None), "chosen"),
    ("am_train", "chosen a number", row(chosen=3), "chosen"),
    ("am_train", "prompt an empty text", row(prompt=""), "prompt"),
    ("am_train", "prompt without messages", row(prompt=[]), "prompt"),
    ("am_train", "prompt an object", row(prompt={"role": "user"}), "prompt"),
    ("am_train", "task a number", row(task=3), "task"),
    ("am_train", "a message without content", row(prompt=[{"role": "user"}]), "prompt|content"),
    ("am_train", "a message without role", row(prompt=[{"content": "hi"}]), "prompt|role"),
    ("am_train", "content null beside tool_calls", row(prompt=[USER, CALL, TOOL]), "content"),
    ("am_train", "content null in conversations", talk(USER, CALL, TOOL), "content"),
    ("am_train", "content a number", row(prompt=[USER | {"content": 3}]), "content"),
    ("am_train", "content a list", row(prompt=[USER | {"content": [{"text": "hi"}]}]), "content"),
    ("am_train", "a transcript", row(prompt="\n\nHuman: hi\n\nAssistant:"), "tools/convert_data.py"),
    ("sft", "no response", row(response=None), "response"),
    ("sft", "response a number", row(response=3), "response"),
    ("ppo_sr", "no prompt", row(prompt=None), "prompt"),
    ("ppo_sr", "prompt an empty text", row(prompt=""), "prompt"),
    ("winrate of answers", "no reference", row(reference=None), "reference"),
    ("winrate of answers", "response null", row(', "response": null', response=None), "response"),
    ("select of answers", "no response", row(response=None), "response"),
]


def data_flag(command):
    return re.findall(r"--(?:dataset_names?|responses)\b", COMMANDS[command][1])[0]


@pytest.mark.parametrize("case", LINES, ids=lambda case: f"{case[0]}: {case[1]}")
def test_a_bad_line_is_named(case, run, tmp_path):
    command, _, line, said = case
    path = jsonl(tmp_path / "data.jsonl", ROW, line, ROW)
    is_refused(run(command, f"{data_flag(command)} {path}"), "data.jsonl", "line 2", said)
    assert not (tmp_path / "out").exists()


def test_a_zero_character_is_text(run, tmp_path):
    path = jsonl(tmp_path / "data.jsonl", ROW | {"prompt": "a\0b", "chosen": "\0"})
    assert run("am_train", f"--dataset_name {path}", tmp_path / "am") == (0, "")


FILES = [  # name, its bytes (None: it is not there), what is said beside the name
    ("none.jsonl", None, "No such file|not found|neither"),
    ("none.parquet", None, ""),
    ("empty.jsonl", b"", "no rows"),
    ("blank.jsonl", b"\n\n \n", "no rows"),
    ("latin.jsonl", row(prompt="na\xefve").replace("\\u00ef", "\xef").encode("latin-1"), ""),
    ("utf16.jsonl", row().encode("utf-16"), ""),
    ("no_gzip.jsonl.gz", b"not gzip", ""),
    ("cut.jsonl.gz", b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff\xab\xae", ""),
    ("no_parquet.parquet", b"PAR1 no, it is not", ""),
    ("list.json", json.dumps([ROW, ROW]).encode(), "object"),
    ("rows.csv", b"prompt,chosen,rejected\na,b,c\n", ""),
    ("folder", "a folder", ""),
    ("nobody/nothing", None, "hub"),
]


@pytest.mark.parametrize("case", FILES, ids=lambda case: case[0])
@pytest.mark.parametrize("command", ["am_train", "winrate"])
def test_a_bad_file_is_named(command, case, run, tmp_path):
    name, data, said = case
    if data == "a folder":
        (tmp_path / name).mkdir()
    elif data is not None:
        (tmp_path / name).write_bytes(data)
    path = name if "/" in name else tmp_path / name
    is_refused(run(command, f"{data_flag(command)} {path}"), name, said)
    assert not (tmp_path / "out").exists()


def test_a_bad_row_of_parquet_is_named(run, tmp_path):
    pd.DataFrame([ROW, ROW | {"chosen": None}]).to_parquet(tmp_path / "data.parquet")
    said = "data.parquet", "line 2", "chosen"
    is_refused(run("am_train", f"--dataset_name {tmp_path / 'data.parquet'}"), *said)


# --- models, flags that do not fit together, functions of the user's ------------------------------


def lengths(prompts, responses):
    return [len(y) for y in responses]


def nan(prompts, responses):
    return [math.nan] * len(responses)


def infinite(prompts, responses):
    return [math.inf] * len(responses)


def too_few(prompts, responses):
    return [0.0]


def no_number(prompts, responses):
    return ["good"] * len(responses)


def fails(prompts, responses):
    raise KeyError("no such key")


def leaves(prompts, responses):
    raise SystemExit  # as a script does that parses flags of its own


HERE = "tests.test_bad_inputs"
CAUSES = [  # command, changed flags, what is said
    # a model that is none, or another one than the flag asks for
    ("am_train", "--model_name_or_path none", "none"),
    ("am_train", "--model_name_or_path no_model", "no_model"),
    ("am_train", "--model_name_or_path run", "run/model"),
    ("am_train", "--model_name_or_path rows.jsonl", "rows.jsonl"),
    ("am_train", "--model_name_or_path three_heads", "three_heads", "label|class"),
    ("am_train", "--model_name_or_path no_end", "no_end"),
    ("am_train", "--model_name_or_path only_sep", "only_sep"),
    ("sft", "--model_name_or_path none", "none"),
    ("sft", "--model_name_or_path scorer", "--model_name_or_path"),
    ("sft", "--model_name_or_path only_sep", "only_sep"),
    ("sft from scratch", "--tokenizer_name_or_path none", "none"),
    ("sft from scratch", "--tokenizer_name_or_path no_end", "no_end"),
    ("ppo_sr", "--model_name_or_path none", "none"),
    ("ppo_sr", "--model_name_or_path run", "run/model"),
    ("ppo_sr", "--model_name_or_path scorer", "--model_name_or_path"),
    ("ppo_sr", "--model_name_or_path only_sep", "only_sep"),
    ("ppo_sr", "--reward_model_path none", "none"),
    ("ppo_sr", "--reward_model_path no_model", "no_model"),
    ("ppo_sr", "--reward_model_path policy", "--reward_model_path"),
    ("ppo_sr", "--reward_model_path three_heads", "--reward_model_path", "label|class"),
    ("ppo_max", "--reward_model_path policy", "--reward_model_path"),
    ("ppo_any_reward", "--reward_model_path policy", "--reward_model_path"),
    ("ppo_any_reward", "--reward_model_path three_heads", "--reward_model_path", "label|class"),
    ("calibration", "--scorers policy", "policy"),
    ("calibration", "--scorers scorer three_heads", "three_heads", "label|class"),
    ("calibration", "--scorers scorer none", "none"),
    ("winrate", "--policy scorer", "scorer"),
    ("winrate", "--reference none", "none"),
    ("winrate", "--judge policy", "--judge"),
    ("winrate", "--judge three_heads", "--judge", "label|class"),
    ("winrate", "--judge none", "--judge"),
    ("select_rehearsal", "--reward_model_path policy", "--reward_model_path"),
    ("select_rehearsal", "--reward_model_path three_heads", "--reward_model_path", "label|class"),
    ("select_rehearsal", "--model_name_or_path scorer", "scorer"),
    ("select_rehearsal", "--embedding_model no_model", "--embedding_model"),
    # texts that do not fit: the model's positions, --max_length
    ("am_train", "--dataset_name long.jsonl --max_length 1000", "--max_length", "128 positions"),
    ("sft", "--dataset_name long.jsonl --max_length 1000", "--max_length", "128 positions"),
    ("calibration", "--dataset_name long.jsonl --max_length 1000", "--max_length", "128 positions"),
    ("ppo_sr", "--max_length 1000", "--max_length", "128 positions"),
    ("winrate", "--max_length 1000 --response_length 500", "--max_length", "128 positions"),
    ("am_train", "--dataset_name long.jsonl --max_length 99", "long.jsonl, line 2", "--max_length"),
    ("sft", "--dataset_name long.jsonl --max_length 99", "long.jsonl, line 2", "--max_length"),
    ("calibration", "--dataset_name long.jsonl --max_length 99", "line 2", "--max_length"),
    ("select of answers", "--dataset_name long.jsonl --num_clusters 1 --max_length 99", "line 2"),
    ("winrate of answers", "--responses long.jsonl --max_length 99", "line 2", "--max_length"),
    ("ppo_sr", "--rehearsal_dataset_name long.jsonl", "long.jsonl, line 2", "--max_length"),
    ("ppo_sr", "--response_length 64", "--max_length"),
    ("ppo_sr", "--max_length 12", "rows.jsonl, line 1", "--max_length"),
    ("winrate", "--max_length 12", "rows.jsonl, line 1|answers, line 1", "--max_length"),
    # the file of another flag than --dataset_name
    ("am_train", "--eval_dataset_name none.jsonl", "none.jsonl"),
    ("am_train", "--eval_dataset_name prompts.jsonl", "prompts.jsonl", "chosen", "--eval_dataset_name"),
    ("ppo_sr", "--rehearsal_dataset_name prompts.jsonl", "--rehearsal_dataset_name", "response"),
    ("ppo_max", "--ptx_dataset_name prompts.jsonl", "--ptx_dataset_name", "response"),
    ("ppo_sr", "--eval_dataset_names none.jsonl", "none.jsonl"),
    ("ppo_sr", "--eval_dataset_names rows.jsonl ./rows.jsonl", "--eval_dataset_names"),
    ("winrate", "--dataset_names rows.jsonl ./rows.jsonl", "--dataset_names"),
    ("am_train", "--am_margin none.json", "--am_margin", "none.json"),
    ("am_train", "--am_margin margins.jsonl", "--am_margin", "margins.jsonl"),
    ("am_train", "--am_margin margins.json", "--am_margin", "'a'"),
    ("am_train", "--num_alternates 1", "rows.jsonl, line 1", "logprob_chosen"),
    # flags that do not fit together
    ("am_train", "--loss rm --expected_reward joint", "--expected_reward"),
    ("am_train", "--loss rm --num_alternates 2", "--num_alternates"),
    ("am_train", "--num_alternates 3 --num_policies 2", "--num_policies 2", "--num_alternates"),
    ("sft from scratch", "--hidden_size 130 --num_heads 4", "--hidden_size|--num_heads"),
    ("ppo_sr", "--global_batch_size 10 --num_mini_batches 3", "--num_mini_batches"),
    ("ppo_sr", "--critic_warmup_steps 1", "--critic_warmup_steps"),
    ("ppo_sr", "--global_batch_size 1 --missing_eos_penalty 1", "--missing_eos_penalty|--global_batch_size"),
    (
        "ppo_sr",
        "--global_batch_size 1 --response_length 1",
        "--whiten_advantages|--response_length|--global_batch_size",
    ),
    ("ppo_max", "--critic_init backbone --critic_warmup_steps 1 --total_steps 2", "--critic_init backbone"),
    ("ppo_max", "--kl_target 1 --kl_coef 0", "--kl_target"),
    ("calibration", "--names a b", "--names"),
    ("calibration", "--scorers scorer scorer", "--names"),
    ("winrate", "--responses rows.jsonl", "--responses"),
    ("winrate", "--judge_config margins.json", "--judge_config"),
    ("select_rehearsal", "--num_clusters 9", "--num_clusters 9"),
    ("select of answers", "--criterion entropy", "--criterion entropy", "--model_name_or_path"),
    # functions
    ("ppo_any_reward", "", "--reward_model_path", "--reward_function"),
    ("ppo_any_reward", "--reward_function json:none", "--reward_function json:none"),
    ("ppo_any_reward", f"--reward_function {HERE}:nan", f"--reward_function {HERE}:nan"),
    ("ppo_any_reward", f"--reward_function {HERE}:infinite", f"--reward_function {HERE}:infinite"),
    ("ppo_any_reward", f"--reward_function {HERE}:too_few", f"--reward_function {HERE}:too_few"),
    ("ppo_any_reward", f"--reward_function {HERE}:no_number", f"--reward_function {HERE}:no_number"),
    ("ppo_any_reward", f"--reward_function {HERE}:fails", f"--reward_function {HERE}:fails"),
    ("ppo_any_reward", f"--reward_function {HERE}:leaves", f"--reward_function {HERE}:leaves", "SystemExit"),
    ("ppo_any_reward", "--reward_function leaving:f", "--reward_function leaving:f", "SystemExit(3)"),
    ("winrate", f"--judge {HERE}:leaves", f"--judge {HERE}:leaves", "SystemExit"),
    ("ppo_sr", "--gold_reward none:f", "--gold_reward none:f"),
    ("ppo_sr", f"--gold_reward {HERE}:too_few", f"--gold_reward {HERE}:too_few"),
    ("winrate", "--judge none:f", "--judge none:f"),
    ("winrate", f"--judge {HERE}:nan", f"--judge {HERE}:nan"),
    ("winrate", f"--judge {HERE}:fails", f"--judge {HERE}:fails"),
    ("winrate", "--judge hf:none", "none"),
    ("select of answers", f"--gold_reward {HERE}:too_few", f"--gold_reward {HERE}:too_few"),
    # the run folder
    ("am_train", "--output_dir rows.jsonl/out", "--output_dir"),
]
MEASURED = (":nan", ":infinite", ":too_few", ":no_number", ":fails", ":leaves")  # known when a model has run


@pytest.mark.parametrize("case", CAUSES, ids=lambda case: f"{case[0]}: {case[1]}".strip())
def test_the_cause_is_named(case, run, world, tmp_path):
    command, changes, *said = case
    out = tmp_path / "out"
    if "--output_dir" in changes:
        changes, out = "", world / changes.removeprefix("--output_dir ")
    is_refused(run(command, changes, out), *said)
    assert changes.endswith(MEASURED) or not (tmp_path / "out" / "model").exists()
    assert changes.endswith(MEASURED) or not (tmp_path / "out" / "metrics.jsonl").exists()


def test_a_flag_is_named_by_its_value_whatever_words_are_in_it(run, tmp_path):
    path = jsonl(tmp_path / "labels.jsonl", "3")
    is_refused(run("am_train", f"--dataset_name {path}"), f"error: --dataset_name {path}, line 1:")


def test_of_flags_with_one_value_all_are_named(run):
    """One of them would be a guess."""
    both = "error: --policy and --reference none: no model folder"
    is_refused(run("winrate", "--policy none --reference none"), both)
    both = "error: --model_name_or_path and --reward_model_path policy: has no reward head"
    is_refused(run("ppo_sr", "--reward_model_path policy"), both)
    is_refused(run("ppo_sr", "--reward_model_path ./policy"), "error: --reward_model_path ./policy: has no")


# --- what may be refused, and may work ------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter(world):
    peft = pytest.importorskip("peft")
    how = {"r": 4, "target_modules": ["c_attn", "c_fc"], "task_type": "CAUSAL_LM"}
    base = AutoModelForCausalLM.from_pretrained(world / "policy")
    peft.get_peft_model(base, peft.LoraConfig(**how)).save_pretrained(world / "adapter")
    shutil.copy(world / "policy" / "tokenizer.json", world / "adapter")
    shutil.copy(world / "policy" / "tokenizer_config.json", world / "adapter")


def works_or_is_refused(result, out, *said):
    if result[0]:
        is_refused(result, *said)
        assert not out.exists()
    elif out.exists() and (out / "metrics.jsonl").is_file():  # the whole model is there
        assert [*(out / "model").glob("*.safetensors")]


@pytest.mark.parametrize("command", ["am_train", "sft", "ppo_sr"])
def test_an_adapter_folder_is_no_model_without_weights(command, run, adapter, tmp_path):
    result = run(command, "--model_name_or_path adapter")
    works_or_is_refused(result, tmp_path / "out", "adapter")


@pytest.mark.parametrize("command", ["am_train", "sft", "ppo_sr --reward_model_path grown", "winrate --judge length"])
def test_a_policy_with_more_tokens_than_embeddings(command, run, tmp_path):
    name, _, more = command.partition(" ")
    flag = "--policy" if name == "winrate" else "--model_name_or_path"
    works_or_is_refused(run(name, f"{more} {flag} grown"), tmp_path / "out", "grown")


SIZE = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
SMALL = {"d_model": 32, "d_kv": 16, "d_ff": 32, "num_layers": 2, "num_heads": 2}
TWO = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
TWO |= {"d_model": 32, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 64}
CTRL = {"n_embd": 32, "dff": 32, "n_layer": 1, "n_head": 2, "n_positions": 64}
SCORERS = {  # config, its sizes
    "camembert": ("CamembertConfig", SIZE | {"max_position_embeddings": 66}),
    "data2vec": ("Data2VecTextConfig", SIZE | {"max_position_embeddings": 66}),
    "mpnet": ("MPNetConfig", SIZE | {"max_position_embeddings": 66}),
    "roberta": ("RobertaConfig", SIZE | {"max_position_embeddings": 66}),
    "longformer": ("LongformerConfig", SIZE | {"max_position_embeddings": 66, "attention_window": [4]}),
    "t5": ("T5Config", SMALL),
    "bart": ("BartConfig", TWO),
    "ctrl": ("CTRLConfig", CTRL),
    "xlnet": ("XLNetConfig", {"d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 64}),
    "ibert": ("IBertConfig", SIZE | {"max_position_embeddings": 66}),
    "perceiver": (
        "PerceiverConfig",
        {"d_model": 16, "d_latents": 16, "num_latents": 4, "num_self_attends_per_block": 1},
    ),
}


def save_encoder(name, folder):
    pair, more = "<s> $A </s> </s> $B </s>", {}
    if name == "xlnet":
        pair = "$A </s> $B:1 </s>:1 <s>:2"
    words = encoder_tokenizer(pair, "<s>", "</s>")
    ids = {"vocab_size": len(words), "pad_token_id": words.pad_token_id}
    if name in ("t5", "bart", "ctrl"):
        words.eos_token = "</s>"
        more = {"eos_token_id": words.eos_token_id, "decoder_start_token_id": words.pad_token_id}
    kind, sizes = SCORERS[name]
    config = getattr(transformers, kind)(**sizes, **ids, **more, num_labels=1)
    save(folder, words, config, AutoModelForSequenceClassification)
    return folder


@pytest.mark.parametrize("name", ["camembert", "data2vec", "mpnet", "roberta"])
def test_an_encoder_that_counts_positions_from_2_is_refused_beyond_them(name, run, tmp_path):
    """A text of 66 tokens for 66 positions. No token has the first ones: as many as the padding's
    id, which is 0 here or by the family 1, and one more."""
    flags = f"--model_name_or_path {save_encoder(name, tmp_path / name)}"
    long = jsonl(tmp_path / "long.jsonl", ROW | {"chosen": "dog " * 80})
    long = f"{flags} --dataset_name {long} --truncate_prompts True"
    is_refused(run("am_train", f"{long} --max_length 66"), "--max_length", "64|65")
    assert not (tmp_path / "out").exists()
    assert run("am_train", f"{long} --max_length 64", tmp_path / "fits") == (0, "")


@pytest.mark.parametrize("name", ["longformer", "t5", "bart", "ctrl", "xlnet"])
def test_another_family_is_trained_or_refused(name, run, tmp_path):
    result = run("am_train", f"--model_name_or_path {save_encoder(name, tmp_path / name)}")
    works_or_is_refused(result, tmp_path / "out", name)


# --- the run folder -------------------------------------------------------------------------------


@pytest.fixture
def a_run(run, tmp_path_factory):
    """command -> the folder of a finished run of it with a checkpoint, made once."""

    def of(command, out):
        if command not in FINISHED:
            FINISHED[command] = tmp_path_factory.mktemp("finished") / "out"
            assert run(command, "--save_steps 1", FINISHED[command])[0] == 0
        shutil.copytree(FINISHED[command], out)
        return out

    return of


FINISHED = {}
TRAINERS = ["am_train", "sft", "ppo_sr"]
LEFT = {  # what a run leaves -> what is taken away, the way on
    "a finished run": ((), "--resume True goes on with it"),
    "a finished run without checkpoint": (("checkpoint",), "no checkpoint for --resume True: remove it"),
    "a stopped run": (("model",), "--resume True goes on with it"),
    "a stopped run without checkpoint": (("model", "checkpoint"), "--resume True begins it anew"),
}


@pytest.mark.parametrize("left", LEFT)
@pytest.mark.parametrize("command", TRAINERS)
def test_a_run_is_not_written_over(command, left, run, a_run, tmp_path):
    out = a_run(command, tmp_path / "out")
    taken, way = LEFT[left]
    for name in taken:
        shutil.rmtree(out / name)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    is_refused(run(command, "--save_steps 1"), "--output_dir", way)
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


@pytest.mark.parametrize("command", TRAINERS)
def test_resume_with_another_flag_is_refused(command, run, a_run, tmp_path):
    a_run(command, tmp_path / "out")
    for flag, value in (("--learning_rate", "1e-3"), ("--seed", "7"), ("--max_length", "63")):
        result = run(command, f"--save_steps 1 --resume True {flag} {value}")
        is_refused(result, flag, "--resume")


@pytest.mark.parametrize("kept", [0, 1, 5000, -1])
@pytest.mark.parametrize("command", TRAINERS)
def test_a_checkpoint_that_is_cut_off_is_named(command, kept, run, a_run, tmp_path):
    checkpoint = a_run(command, tmp_path / "out") / "checkpoint" / "state.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:kept])
    is_refused(run(command, "--save_steps 1 --resume True"), "checkpoint", "state.pt")


def of_another_size(saved):
    module = saved["policy" if "policy" in saved else "engine"]["module"]
    name = max(module, key=lambda k: module[k].dim())
    module[name] = module[name][:-1]


BROKEN = {  # what is done to a checkpoint
    "another model": of_another_size,
    "no engine": lambda saved: saved.pop("critic" if "critic" in saved else "engine"),
    "no step": lambda saved: saved.pop("step"),
    "no optimizer": lambda saved: saved["policy" if "policy" in saved else "engine"].pop("optimizer"),
    "no random numbers": lambda saved: saved["rng"].pop("cpu"),
}


@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("command", TRAINERS)
def test_a_checkpoint_that_does_not_fit_is_named(command, broken, run, a_run, tmp_path):
    """And what the stopped run has written stays."""
    out = a_run(command, tmp_path / "out")
    saved = torch.load(out / "checkpoint" / "state.pt", weights_only=True)
    BROKEN[broken](saved)
    torch.save(saved, out / "checkpoint" / "state.pt")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    is_refused(run(command, "--save_steps 1 --resume True"), "checkpoint/state.pt", "remove it")
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_resume_with_other_data_is_refused(run, a_run, world, tmp_path):
    a_run("am_train", tmp_path / "out")
    other = jsonl(tmp_path / "rows.jsonl", *[ROW] * 8)
    result = run("am_train", f"--save_steps 1 --resume True --dataset_name {other}")
    is_refused(result, "--resume|--dataset_name")


def without_files(command):
    """The flags of a command with what is not there in the place of all it reads."""
    flags = re.findall(r"--(?:\w+_path|dataset_names?|policy|reference|scorers|responses)\b", COMMANDS[command][1])
    return " ".join(f"{flag} none" for flag in flags)


RESULTS = {  # a folder of this name is in the way, or else a file
    "am_train": ("metrics.jsonl", "config.json", "eval.json"),
    "sft": ("samples.jsonl", "metrics.jsonl.tmp"),
    "ppo_sr": ("samples.jsonl", "bad_batch.json"),
    "calibration": ("calibration.json", "scores.jsonl"),
    "winrate": ("responses.jsonl", "winrate.json", "judgements.jsonl"),
    "select_rehearsal": ("responses.jsonl", "rehearsal.jsonl", "clusters.npz"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_that_cannot_be_written_is_named_before_a_file_is_opened(command, run, tmp_path):
    for out in ("/proc/out", "/proc/1/out", tmp_path / ("long" * 64), tmp_path / "new" / ("ä" * 128), "a\0b"):
        is_refused(run(command, without_files(command), out), "--output_dir", "cannot be made")
    (tmp_path / "link").symlink_to(tmp_path / "nothing" / "there")
    is_refused(run(command, without_files(command), tmp_path / "link"), "--output_dir", "cannot be made")
    assert [path.name for path in tmp_path.iterdir()] == ["link"]  # no trace
    for name in RESULTS.get(command, ()):
        (tmp_path / "out" / name).mkdir(parents=True)
        is_refused(run(command, without_files(command)), "--output_dir", f"{name} is a folder", "remove it")
        (tmp_path / "out" / name).rmdir()
    for name in ("model", "checkpoint") if command in TRAINERS else ():
        (tmp_path / "out" / name).touch()
        is_refused(run(command, without_files(command)), "--output_dir", f"{name} is a file", "remove it")
        (tmp_path / "out" / name).unlink()


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "out.jsonl").mkdir()
    rows, policy = str(tmp_path / "rows.jsonl"), "none"
    for path, said in (
        (tmp_path / "out.jsonl", "is a folder"),
        ("/proc/out.jsonl", "cannot be made in /proc"),
        (tmp_path / ("a" * 246 + ".jsonl"), "cannot be made"),  # with .tmp it is too long
    ):
        with pytest.raises(InputError, match=f"--output_path .*{said}"):
            check_flags(write_logprobs.Args(rows, str(path), policy))
    check_flags(write_logprobs.Args(rows, str(tmp_path / "new" / "out.jsonl"), policy))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("tool", ["answers --winrate", "cluster_report", "figures --calibration"])
def test_a_folder_that_a_flag_leaves_to_the_input_is_tried_too(tool, tmp_path, monkeypatch, capsys):
    """Before anything of it is read: it is not there."""
    module = importlib.import_module(f"tools.{tool.split()[0]}")
    for folder, said in (("/proc/1/out", "cannot be made in /proc/1"), (tmp_path / "out", "is a folder")):
        (tmp_path / "out" / "clusters.png").mkdir(parents=True, exist_ok=True)
        monkeypatch.setattr("sys.argv", [*tool.split(), str(folder)])
        with pytest.raises(SystemExit):
            run_cli(module.main, module.Args, "")
        is_refused((2, capsys.readouterr().err), f"error: --output_dir {folder}: ", said)


def test_the_page_of_the_gallery_is_tried_before_its_folders_are_read(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("gallery.html").mkdir()
    for flags in ([], ["--output_file", "/proc/1/page.html"]):
        monkeypatch.setattr("sys.argv", ["gallery", "--folders", "none", *flags])
        with pytest.raises(SystemExit):
            run_cli(gallery.main, gallery.Args, "")
        is_refused((2, capsys.readouterr().err), "error: --output_file", "name a file|cannot be made in /proc/1")


@pytest.mark.parametrize("out", ["policy", "run/model", "run"])
def test_a_model_that_is_read_is_not_written_over(out, run, world):
    before = {path: path.read_bytes() for path in world.rglob("*") if path.is_file()}
    model = "run/model" if "run" in out else out
    said = f"would write over --model_name_or_path {model}"
    for command in ("am_train", "sft", "ppo_sr"):
        result = run(command, f"{without_files(command)} --model_name_or_path {model}", world / out)
        is_refused(result, "--output_dir", said)
    args = average_weights.Args(str(world / "policy"), str(world / model), str(world / "scorer" / ".." / model))
    with pytest.raises(InputError, match=r"--output_dir .* would write over --(init_model|model_name_or_path)"):
        check_flags(args)
    assert before == {path: path.read_bytes() for path in world.rglob("*") if path.is_file()}
    check_flags(average_weights.Args(str(world / "policy"), str(world / model), str(world / "new")))


@pytest.mark.parametrize("name", ["ibert", "perceiver", "t5gemma"])
def test_a_classifier_that_is_read_in_another_way_is_refused(name, run, tmp_path):
    """transformers loads them as classifiers, but their embeddings or their inputs are other ones."""
    if name == "t5gemma":
        words = encoder_tokenizer("<s> $A </s> </s> $B </s>", "<s>", "</s>")
        size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
        size |= {"head_dim": 8, "intermediate_size": 32, "vocab_size": len(words), "pad_token_id": words.pad_token_id}
        half = transformers.T5GemmaModuleConfig(**size)
        config = transformers.T5GemmaConfig(encoder=half, decoder=half, num_labels=1)
        save(folder := tmp_path / name, words, config, AutoModelForSequenceClassification)
    else:
        folder = save_encoder(name, tmp_path / name)
    is_refused(run("am_train", f"--model_name_or_path {folder}"), str(folder), "cannot be scorers here")
