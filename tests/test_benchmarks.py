"""The benchmarks beside TRL: the same data for every arm, counts and ratios by hand, and a run of each where TRL is."""

import importlib.util
import itertools
import json
import re
import shutil
import sys
from collections import Counter
from importlib.metadata import version

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from benchmarks import ppo_vs_trl as ppo_bench
from benchmarks import reward_vs_trl as bench
from benchmarks import bfloat16, throughput
from utils import E_HEAD, InputError, write_json, write_jsonl

TINY = {
    "steps": 2,
    "batch_size": 4,
    "max_length": 40,
    "hidden_size": 24,
    "num_layers": 1,
    "vocab_size": 100,
    "threads": 1,
}
ALL_PRESENT = {"trl": "1.16.0", "accelerate": "1", "torch": version("torch"), "transformers": version("transformers")}


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """What every arm reads, and the result of ours."""
    folder, args = tmp_path_factory.mktemp("benchmark"), bench.Args(**TINY)
    write_json(folder / "args.json", vars(args))
    about = bench.prepare(args, folder)
    return folder, about, bench.run_arm("ours", folder, args)


def test_the_rows_have_the_lengths_of_the_table():
    table = json.loads(bench.LENGTHS.read_text())["lengths"]
    assert len(table) == 200
    rows = bench.draw_rows(bench.Args(steps=30, batch_size=10))
    drawn = [tuple(len(row[k].split()) for k in ("prompt", "chosen", "rejected")) for row in rows]
    assert sorted(drawn[:200]) == sorted(map(tuple, table)), "each triple once before any comes again"
    assert len(set(drawn[200:]) - set(drawn[:200])) == 0 and len(drawn) == 300
    assert drawn[:200] != [tuple(t) for t in table], "shuffled"


def rankings(path, prompts, responses):
    """Every prompt with all pairs of its responses, prompts interleaved: [{prompt, chosen, rejected}], and as a file."""
    pairs = list(itertools.combinations(range(responses), 2))
    rows = [
        {"prompt": f"p{x} the", "chosen": f"r{x} x{a} fox", "rejected": f"r{x} x{b} fox"}
        for a, b in pairs
        for x in range(prompts)
    ]
    write_jsonl(path, [row | {"margin": 1.0} for row in rows])
    return rows


def test_a_file_gives_whole_prompts(tmp_path):
    """12 pairs of 6-pair prompts are 2 whole ones; 15 are those 2 and the first half of a third. Their texts stay."""
    rows, path = rankings(tmp_path / "pairs.jsonl", 9, 4), str(tmp_path / "pairs.jsonl")
    twelve = bench.draw_rows(bench.Args(dataset_name=path, steps=3, batch_size=4))
    prompts = list(dict.fromkeys(row["prompt"] for row in twelve))
    assert len(prompts) == 2 and twelve == [row for prompt in prompts for row in rows if row["prompt"] == prompt]
    fifteen = bench.draw_rows(bench.Args(dataset_name=path, steps=3, batch_size=5))
    count = Counter(row["prompt"] for row in fifteen)
    assert fifteen[:12] == twelve and list(count.values()) == [6, 6, 3]
    drawn = {next(iter(bench.draw_rows(bench.Args(dataset_name=path, steps=1, seed=s))))["prompt"] for s in range(20)}
    assert len(drawn) > 4, "at random"


def test_pairs_that_share_texts_are_read_once_by_prompt(tmp_path):
    """Three prompts of five responses: 30 pairs, 60 texts of 6 tokens, of which a batch of all pairs reads 15."""
    rankings(tmp_path / "pairs.jsonl", 3, 5)
    args = bench.Args(**TINY | {"dataset_name": str(tmp_path / "pairs.jsonl"), "steps": 3, "batch_size": 10})
    write_json(tmp_path / "args.json", vars(args))
    about = bench.prepare(args, tmp_path)
    ids = read(tmp_path / "ids.jsonl")
    assert about["tokens"] == 60 * 6 and len({tuple(p[f"{s}_ids"]) for p in ids for s in ("chosen", "rejected")}) == 15
    one = bench.run_arm("ours by prompt", tmp_path, args)
    assert (one["positions"], one["padding"]) == (15 * 6, 0), "a batch is one prompt"
    batches = [ids[i : i + 10] for i in (0, 10, 20)]  # of the arm `ours`: prepare() wrote its order
    assert sum(len({tuple(p[f"{s}_ids"]) for p in batch for s in ("chosen", "rejected")}) for batch in batches) > 25


def test_every_pair_is_cut_as_our_script_cuts_it(prepared):
    folder, about, _ = prepared
    rows, ids = read(folder / "pairs.jsonl"), read(folder / "ids.jsonl")
    words = json.loads((folder / "model" / "tokenizer.json").read_text())["model"]["vocab"]
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1)).tolist()  # am_train.py's
    for pair, row in zip(ids, (rows[i] for i in order), strict=True):
        prompt, sides = [words[w] for w in row["prompt"].split()], {}
        for side in ("chosen", "rejected"):
            sides[side] = [*(words[w] for w in row[side].split()), words["<eos>"]]
        longest = min(max(map(len, sides.values())), max(30, 40 - len(prompt)))  # 10: the prompt's
        for side, response in sides.items():
            assert pair[f"{side}_ids"] == prompt[-(40 - longest) :] + response[:longest]
        assert pair["length"] == max(len(pair["chosen_ids"]), len(pair["rejected_ids"])) <= 40
    assert about["tokens"] == sum(len(p["chosen_ids"]) + len(p["rejected_ids"]) for p in ids)
    # attention 4 x 24 x 24, MLP 3 x 24 x 64, two norms and the last one, the score head
    assert about["non_embedding"] == 4 * 24 * 24 + 3 * 24 * 64 + 3 * 24 + 24
    assert about["parameters"] == about["non_embedding"] + 100 * 24


def test_our_arm_trains_on_those_pairs(prepared):
    folder, about, result = prepared
    model = AutoModelForSequenceClassification.from_pretrained(folder / "model", dtype=torch.float32)
    r = {
        side: torch.cat([model(torch.tensor([p[f"{side}_ids"]])).logits[0] for p in read(folder / "ids.jsonl")[:4]])
        for side in ("chosen", "rejected")
    }
    assert result["losses"][0] == pytest.approx(-F.logsigmoid(r["chosen"] - r["rejected"]).mean().item(), abs=1e-5)
    assert len(result["losses"]) == 2 and result["losses"][1] != result["losses"][0]
    assert 0 <= result["padding"] < result["positions"]
    assert result["positions"] - result["padding"] <= about["tokens"], "shared prompts may lower it, nothing raises it"
    assert 0 < result["start_mb"] < result["peak_mb"] and result["seconds"] > 0 and result["limit"] > 1e8


def test_embedded_tokens_are_counted(monkeypatch):
    monkeypatch.setattr(nn.Embedding, "forward", nn.Embedding.forward)  # put back afterwards
    seen, embedding = bench.count_positions(pad_id=0), nn.Embedding(4, 2)
    ids = torch.tensor([[1, 2, 0], [3, 0, 0]])
    assert torch.equal(embedding(ids), embedding.weight[ids]) and seen == {"positions": 6, "padding": 3}
    embedding(ids[:1])
    assert seen == {"positions": 9, "padding": 4}


def test_ratios_and_shares_by_hand():
    def run(seconds, peak, positions, padding, limit=1e9, losses=(0.7, 0.6)):
        return dict(seconds=seconds, peak_mb=peak, start_mb=100, positions=positions, padding=padding, limit=limit,
                    losses=list(losses))  # fmt: skip

    runs = {
        "ours": [run(2, 600, 90, 0), run(4, 600, 90, 0), run(2, 600, 90, 0)],
        "ours by prompt": [run(1, 450, 40, 0, losses=(0.9, 0.1)), run(3, 450, 40, 0), run(2, 500, 40, 0)],
        "trl": [run(6, 900, 150, 50, losses=(0.7, 0.58)), run(6, 1000, 150, 50), run(8, 1000, 150, 50, limit=2e9)],
        "trl grouped": [run(3, 800, 120, 20), run(4, 800, 120, 20), run(4, 800, 120, 20)],
    }
    result = bench.summarize(runs, {"tokens": 100, "non_embedding": 1e6}, pairs=24)
    assert result["ratio"] == 3  # of 3, 1.5 and 4
    assert result["ratio_grouped"] == 1.5  # of 1.5, 1 and 2
    assert result["ratio_by_prompt"] == 4  # trl / ours by prompt: of 6, 2 and 4
    memory = [result[f"memory_ratio{name}"] for name in ("", "_grouped", "_by_prompt")]
    assert memory == [0.6, 0.75, 0.45] and result["arms"]["ours by prompt"]["positions_per_token"] == 0.4
    assert result["loss_difference"] == pytest.approx(0.02)
    ours, trl = result["arms"]["ours"], result["arms"]["trl"]
    assert (ours["pairs_per_second"], ours["slowest"], ours["fastest"]) == (12, 6, 12)
    assert (trl["padding"], trl["positions_per_token"], ours["padding"], ours["positions_per_token"]) == (
        1 / 3,
        1.5,
        0,
        0.9,
    )
    assert ours["of_limit"] == pytest.approx(6 * 100 * 1e6 / 2 / 2e9)  # 6 N D in 2 s, on the fastest product seen
    assert ours["of_limit"] == pytest.approx(3 * trl["of_limit"])
    assert [line.split()[0] for line in bench.table(result).splitlines()[1:]] == ["ours", "ours", "trl", "trl"]


@pytest.mark.parametrize(
    "found, message",
    [
        (ALL_PRESENT | {"trl": None, "accelerate": None}, "lacks trl, accelerate; pip install -r requirements-bench"),
        (ALL_PRESENT | {"torch": "0.1"}, f"has torch 0.1, this one {version('torch')}"),
        (None, "is no Python interpreter"),
    ],
)
def test_an_environment_without_trl_or_with_another_torch_is_refused(found, message, tmp_path):
    python = tmp_path / "python"
    if found:
        python.write_text(f"#!/bin/sh\necho '{json.dumps(found)}'\n")
        python.chmod(0o755)
    with pytest.raises(InputError, match="trl_python .*python: " + re.escape(message)):
        bench.main(bench.Args(trl_python=str(python)))


def test_flags_that_cannot_work_are_named(tmp_path):
    with pytest.raises(InputError, match=r"--hidden_size 20: must be a multiple of 12"):
        bench.main(bench.Args(hidden_size=20))
    with pytest.raises(InputError, match=r"--steps.*positive"):
        bench.main(bench.Args(steps=0))
    write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": "a b", "chosen": "c", "rejected": "d"}] * 7)
    with pytest.raises(InputError, match=r"holds 7 pairs where 8 are needed; lower --steps"):
        bench.draw_rows(bench.Args(dataset_name=str(tmp_path / "pairs.jsonl"), steps=2, batch_size=4))


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is absent: requirements-benchmarks.txt")
def test_a_small_run_beside_trl(prepared, capsys):
    folder, about, _ = prepared
    bench.main(bench.Args(**TINY, trl_python=sys.executable))
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["loss_difference"] < 1e-4, "the same loss, on the same pairs, in the same order"
    assert result["tokens"] == about["tokens"] and result["dropped_by_trl"] == 0
    ids = read(folder / "ids.jsonl")
    positions = sum(8 * max(p["length"] for p in ids[i : i + 4]) for i in (0, 4))  # TRL pads to the longest of 8 texts
    assert result["arms"]["trl"]["padding"] == pytest.approx(1 - about["tokens"] / positions, abs=1e-5)
    speed = {arm: numbers["pairs_per_second"] for arm, numbers in result["arms"].items()}
    assert result["ratio"] == pytest.approx(speed["ours"] / speed["trl"], rel=1e-4)
    assert result["ratio_grouped"] == pytest.approx(speed["ours"] / speed["trl grouped"], rel=1e-4)
    assert result["ratio_by_prompt"] == pytest.approx(speed["ours by prompt"] / speed["trl"], rel=1e-4)


# --- PPO --------------------------------------------------------------------------------------------------------------

TINY_PPO = {"steps": 3, "warmup_steps": 1, "global_batch_size": 8, "per_device_train_batch_size": 4, "threads": 1,
            "response_length": 5, "trl_rollout_batch_size": 4, "repeats": 1}  # fmt: skip


@pytest.fixture(scope="module")
def ppo_args(policy_folder, scorer_folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    write_jsonl(path, [{"prompt": f"the fox {'jumps over ' * (i % 3)}{i}"} for i in range(40)])
    return TINY_PPO | {
        "model_name_or_path": policy_folder,
        "reward_model_path": scorer_folder,
        "dataset_name": str(path),
    }


@pytest.fixture(scope="module")
def ppo_run(ppo_args, tmp_path_factory):
    """What both arms read, and the result of ours."""
    folder, args = tmp_path_factory.mktemp("ppo"), ppo_bench.Args(**ppo_args)
    write_json(folder / "args.json", vars(args))
    return folder, ppo_bench.prepare(args, folder), ppo_bench.run_arm("ours", folder, args)


def test_an_update_is_divided_among_stages(monkeypatch):
    """Clock 1, 2, 3 ...: a stage gets the time until the next is entered, and an inner one interrupts an outer."""
    clock = itertools.count(1)
    monkeypatch.setattr(ppo_bench.time, "perf_counter", lambda: next(clock))
    stages = ppo_bench.Stages()  # at 1
    inner = stages.within("score", lambda: next(clock))  # takes 2 with its own reading
    outer = stages.within("sample", lambda: [inner(), next(clock)])
    outer()  # sample from 2 to 3, score to 5, sample to 7
    stages.end()  # other to 8
    seconds = {stage: part["seconds"] for stage, part in stages.updates[0].items()}
    assert seconds == {"other": 1 + 1, "sample": 1 + 2, "score": 2} and sum(seconds.values()) == 8 - 1
    stages.enter("update")  # begun at 9
    stages.begin()
    stages.end()
    assert set(stages.updates[1]) == {"other"}, "what came before begin() does not count"


def test_padding_is_what_the_mask_hides_and_what_finished_rows_are_fed(policy_folder):
    model = AutoModelForCausalLM.from_pretrained(policy_folder)

    class Backbone(type(model.base_model)):
        pass

    model.base_model.__class__ = Backbone
    stages, called = ppo_bench.Stages(), []
    ppo_bench.count_positions(stages, [Backbone], 0, lambda: called.append(stages.stage))
    stages.enter("score")
    ids, mask = torch.tensor([[5, 6, 7], [7, 7, 8]]), torch.tensor([[1, 1, 1], [0, 0, 1]])  # 7 is no <pad>, but hidden
    with torch.no_grad():
        expected = type(model.base_model).forward.__wrapped__(model.base_model, ids, attention_mask=mask)[0]
        assert torch.equal(model.base_model(ids, attention_mask=mask)[0], expected)
        model(input_ids=torch.tensor([[4], [0]]), attention_mask=torch.ones(2, 9))  # decoding: the second row is done
    assert not called
    assert {k: stages.of("score")[k] for k in ("positions", "padding")} == {"positions": 6 + 2, "padding": 2 + 1}
    stages.enter("update")
    model(torch.tensor([[0, 5]]))
    assert called == ["update"] and stages.of("update")["padding"] == 1


def test_the_work_of_an_update_by_hand(ppo_run):
    """Two layers of 12 x 32 x 32 weights; the output matrix is the embedding."""
    about = ppo_run[1]
    body, vocabulary = 2 * 12 * 32 * 32, about["output_matrix"] // 32
    assert about["policy_matrices"] == about["scorer_matrices"] == body and vocabulary > 256
    read = 4 * 2 * body * 50 + 2 * 2 * 32 * vocabulary * 30  # 20 prompt tokens and 30 of responses
    trained = 3 * (2 * 2 * body * 50 + 2 * 32 * vocabulary * 30)  # policy and critic, forward and twice that backward
    assert ppo_bench.unavoidable_flop(about, 20, 30, 0) == read
    assert ppo_bench.unavoidable_flop(about, 20, 30, 2) == read + 2 * trained


def test_both_arms_get_the_same_prompts_once(ppo_run, ppo_args, tokenizer):
    folder, about, _ = ppo_run
    prompts, ids = read(folder / "prompts.jsonl"), read(folder / "ids.jsonl")
    assert len(prompts) == len(ids) == 4 * 8 == len({row["prompt"] for row in prompts}), "a batch more than is taken"
    assert [row["input_ids"] for row in ids] == [tokenizer(row["prompt"]).input_ids for row in prompts]
    assert about["prompt_tokens"] == sum(len(row["input_ids"]) for row in ids) / 32


def test_our_ppo_arm(ppo_run):
    folder, _, result = ppo_run
    assert len(result["updates"]) == 3 and abs(result["kl"][0]) < 1e-5
    assert all(1 <= n <= 5 for n in result["response_length"]) and 0 < result["start_mb"] < result["peak_mb"]
    lengths = sorted(len(row["input_ids"]) for row in read(folder / "ids.jsonl"))
    for update, mean_length in zip(result["updates"], result["response_length"], strict=True):
        assert all(update[stage]["seconds"] > 0 for stage in ("sample", "score", "update"))
        real = {stage: part["positions"] - part["padding"] for stage, part in update.items()}
        assert 0 <= update["update"]["padding"] < update["update"]["positions"]
        responses = mean_length * 8
        # two epochs of policy and critic; whether the last token is read is the script's business
        low, high = sum(lengths[:8]) + responses, sum(lengths[-8:]) + responses
        assert 4 * (low - 8) <= real["update"] <= 4 * high and real["sample"] >= low - 8


def test_ppo_ratios_and_shares_by_hand():
    def run(seconds, peak, lengths, limit=1e9, padding=10):
        updates = [{"sample": {"seconds": s / 4, "positions": 60, "padding": padding},
                    "update": {"seconds": s / 2, "positions": 40, "padding": 0},
                    "other": {"seconds": s / 4, "positions": 0, "padding": 0}} for s in seconds]  # fmt: skip
        return dict(updates=updates, limit=limit, peak_mb=peak, start_mb=50, kl=[0.0, 1, 1],
                    response_length=lengths, score=[9, 1, 3])  # fmt: skip

    runs = {
        "ours": [run((9, 1, 3), 400, (9, 2, 4)), run((9, 2, 4), 400, (9, 3, 3)), run((9, 1, 1), 300, (9, 3, 3))],
        "trl": [run((99, 6, 6), 800, (9, 3, 3), padding=30)] * 2 + [run((99, 6, 6), 800, (9, 3, 3), 2e9, padding=30)],
    }
    about = {"prompt_tokens": 5, "policy_matrices": 1e5, "scorer_matrices": 1e5, "output_matrix": 0}
    args = ppo_bench.Args("", "", "", steps=3, warmup_steps=1, global_batch_size=4, num_ppo_epochs=2)
    result = ppo_bench.summarize(runs, about, args)
    ours, trl = result["arms"]["ours"], result["arms"]["trl"]
    assert (ours["seconds_per_update"], ours["fastest"], ours["slowest"]) == (2, 1, 3), "the first update is left out"
    assert result["ratio"] == 3 and result["memory_ratio"] == 0.5  # of 3, 2 and 6; 400 / 800
    assert ours["tokens_per_second"] == 4 * (5 + 3) / 2 and ours["response_length"] == 3 and ours["score"] == 2
    assert ours["stages"] == {"sample": 0.5, "score": 0, "update": 1, "other": 0.5}
    assert ours["padding"] == {"sample": 1 / 6, "update": 0, "all": 0.1} and trl["padding"]["all"] == 0.3
    assert ours["positions_per_token"] == 100 / 32
    # 32 tokens: four reads at 2 x 1e5, two epochs of two models at 6 x 1e5; on the fastest product seen
    assert ours["of_limit"] == pytest.approx(32 * (4 * 2e5 + 4 * 6e5) / 2 / 2e9)
    text = ppo_bench.table(result).splitlines()
    assert [line.split()[0] for line in text if line[:3] in ("our", "trl")] == ["ours", "trl"] * 2


def test_a_run_that_measured_something_else_is_refused():
    stage = {"seconds": 1.0, "positions": 3, "padding": 0}
    update = {"sample": stage, "score": stage, "update": stage}
    good = {"updates": [update] * 2, "kl": [1e-6, 0.1]}
    ppo_bench.check("ours", good, 2)
    with pytest.raises(RuntimeError, match="took 2 updates, not 3"):
        ppo_bench.check("ours", good, 3)
    with pytest.raises(RuntimeError, match=r"'trl' starts at KL 0.2000, not at 0"):
        ppo_bench.check("trl", good | {"kl": [0.2, 0.1]}, 2)
    with pytest.raises(RuntimeError, match="no model reads a token in the stage `score`"):
        ppo_bench.check("ours", good | {"updates": [update, update | {"score": stage | {"positions": 0}}]}, 2)


def test_a_stage_whose_function_is_gone_is_named(ppo_run, ppo_args, monkeypatch):
    monkeypatch.setattr(ppo_bench, "STAGES", {"score": "another"})
    with pytest.raises(RuntimeError, match=r"ppo_sr.PPO has no method another: name"):
        ppo_bench.run_ours(ppo_run[0], ppo_args, ppo_bench.Stages())


@pytest.mark.parametrize(
    "found, message",
    [
        (ALL_PRESENT | {"trl": None}, "lacks trl; pip install 'trl==1.12.*' accelerate in an environment of its own"),
        (ALL_PRESENT, "has TRL 1.16.0, PPO was last in 1.12; pip install 'trl==1.12.*'"),
    ],
)
def test_a_trl_without_ppo_is_refused(found, message, tmp_path, ppo_args):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho '{json.dumps(found)}'\n")
    python.chmod(0o755)
    with pytest.raises(InputError, match="trl_python .*python: " + re.escape(message)):
        ppo_bench.main(ppo_bench.Args(**ppo_args, trl_python=str(python)))


def test_ppo_flags_that_cannot_work_are_named(ppo_args, tmp_path):
    def refuses(message, call=ppo_bench.main, **changes):
        with pytest.raises(InputError, match=message):
            call(ppo_bench.Args(**ppo_args | changes))

    def prepare(args):
        ppo_bench.prepare(args, tmp_path)

    refuses("--steps: must exceed --warmup_steps", warmup_steps=3)
    refuses("--repeats.*must be positive", repeats=0)
    refuses("--global_batch_size: must be a multiple", global_batch_size=10)
    refuses("holds 40 prompts where 48 are needed; lower --steps", prepare, steps=5)
    refuses("has no reward head", prepare, reward_model_path=ppo_args["model_name_or_path"])
    with_head = shutil.copytree(ppo_args["reward_model_path"], tmp_path / "scorer")
    (with_head / E_HEAD).touch()
    refuses("--reward_model_path .*scorer: has an e head", prepare, reward_model_path=str(with_head))


def has_ppo():
    return importlib.util.find_spec("trl") is not None and version("trl").startswith("1.12.")


@pytest.mark.skipif(not has_ppo(), reason="TRL 1.12, the last with PPO, is absent")
def test_a_small_ppo_run_beside_trl(ppo_args, capsys):
    ppo_bench.main(ppo_bench.Args(**ppo_args, trl_python=sys.executable))
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    ours, trl = result["arms"]["ours"], result["arms"]["trl"]
    assert abs(trl["kl_at_start"]) < 1e-5 and 1 <= trl["response_length"] <= 5
    assert result["ratio"] == pytest.approx(trl["seconds_per_update"] / ours["seconds_per_update"], rel=1e-4)
    assert all(trl["stages"][stage] > 0 for stage in ("sample", "score", "update", "other"))
    assert 0 < trl["padding"]["update"] == pytest.approx(trl["padding"]["score"]), "the whole batch, padded once"


def test_what_a_model_must_read_and_compute_by_hand():
    """Shape tiny: a layer has q 64x64+64, k and v 64x32+32, o 64x64, three of 64x128, two norms of 64: 37,120 weights."""
    model, layers, table = throughput.build("tiny"), 2 * 37_120 + 64, 256 * 64
    assert model.num_parameters() == layers + table  # the output matrix is the embedding
    cache = 2 * 2 * 2 * 16 * 4 * 24 * 4  # keys and values, layers, heads, width, float32, tokens, sequences
    assert throughput.decode_bytes(model, 4, 24) == 4 * (layers + table) + cache
    attention = 6 * 32 * 64 * 2
    assert throughput.train_flop(model, 16, 20, 12) == 16 * (32 * (6 * layers + attention) + 12 * 6 * table)


def test_throughput_runs(capsys):
    small = dict(batch_size=2, train_batch_size=2, prompt_length=4, response_length=4, repeats=1, compile=False)
    result = throughput.main(throughput.Args("tiny", **small))
    assert set(result["decode"]) == {"dynamic", "static"} and set(result["train"]) == {"plain", "checkpointed"}
    row = result["decode"]["static"]
    assert row["tokens_per_second"] == pytest.approx(8 / row["seconds"]) and 0 < row["of_bandwidth"] < 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["decode"]["static"] == row


# --- bfloat16 -------------------------------------------------------------------------------------


def test_bfloat16_counts_products_and_compares_two_batches(policy_folder, capsys):
    threads = torch.get_num_threads()
    bfloat16.main(bfloat16.Args(policy_folder, lengths=(20, 40), tokens=80, repeats=1))
    torch.set_num_threads(threads)
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith(("| 20 ", "| 40 "))]
    assert [row[1] for row in rows] == [*bfloat16.WAYS] * 2
    off = {way: [float(row[-1].strip(" |")) for row in rows if row[1] == way] for way in bfloat16.WAYS}
    assert max(off["float32"]) < 1e-4 and off["written out"] == [0, 0]
    assert all(float(row[2]) > 0 and float(row[3]) >= 0 for row in rows)
