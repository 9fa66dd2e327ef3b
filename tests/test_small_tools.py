"""tools/fit_margin.py, tools/small_model.py, and the flag of am_train.py that keeps the pairs of a prompt together."""

import shutil
import itertools
import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import am_train
from am_train import shuffled_batches
from tests.conftest import gpt2_config
from tests.test_am_train import args_for, metrics_of, pairs, same_weights
from tests.test_data import jsonl
from tools import fit_margin, small_model
from tools.fit_margin import best_margins
from utils import InputError, Scorer, load_scorer


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tokenizer, tmp_path_factory):
    """With dropout, so that a random state which is not restored changes every later number."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(gpt2_config(tokenizer, resid_pdrop=0.2)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def rankings(prompts, responses):
    """All pairs of a ranking, of every prompt, prompts interleaved."""
    pairs = list(itertools.combinations(range(responses), 2))
    return [
        {"prompt": f"dog {x}", "chosen": f"fox {x} {a}", "rejected": f"fox {x} {b}"}
        for a, b in pairs
        for x in range(prompts)
    ]


# --- fit_margin -------------------------------------------------------------------------------------------------------


def test_best_margins_by_hand():
    """a: 1.0 wins .2 to .3; b: 9.0 by .1 to .5; c has one pair, which would like 4.0; all: 9.0, .28 to .36 and .48."""
    tasks = ["a", "b", "a", "b", "c"]
    nll = {
        1.0: np.array([0.1, 0.4, 0.3, 0.6, 0.4]),
        4.0: np.array([0.5, 0.6, 0.5, 0.6, 0.2]),
        9.0: np.array([0.2, 0.1, 0.4, 0.1, 0.6]),
    }
    assert best_margins(nll, tasks, 2) == {"default": 9.0, "a": 1.0, "b": 9.0}
    assert best_margins(nll, tasks, 1) == {"default": 9.0, "a": 1.0, "b": 9.0, "c": 4.0}
    assert best_margins(nll, tasks, 3) == {"default": 9.0}


def test_a_task_called_default_has_the_default():
    nll = {1.0: np.array([0.1, 0.9]), 4.0: np.array([0.4, 0.2])}  # over all 4.0, its own 1.0
    assert best_margins(nll, ["default", "a"], 1) == {"default": 4.0, "a": 4.0}


def test_a_fit_that_was_stopped_goes_on_and_another_fit_stays(model, tmp_path, monkeypatch):
    trained = []

    def train(args):
        trained.append(args.am_margin)
        if args.am_margin == 4 and len(trained) == 2:
            raise KeyboardInterrupt
        count = len((tmp_path / "fit" / "held_out.jsonl").read_text().splitlines())
        return np.full(count, args.am_margin), np.zeros(count)

    monkeypatch.setattr(am_train, "main", train)
    rows = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(40)]
    equal = {"prompt": "p", "chosen": "a", "rejected": "a"}
    data = jsonl(tmp_path / "pairs.jsonl", equal, *rows)
    args = dict(model_name_or_path=model, dataset_name=data, output_dir=str(tmp_path / "fit"), margins=(2.5, 4.0, 6.0))
    with pytest.raises(KeyboardInterrupt):
        fit_margin.main(fit_margin.Args(**args))
    assert fit_margin.main(fit_margin.Args(**args)) == {"default": 6.0}
    assert trained == [2.5, 4, 4, 6], "the first is not trained again"
    both = [(tmp_path / "fit" / f"{name}.jsonl").read_text() for name in ("train", "held_out")]
    assert "".join(both).count("\n") == 40, "without the pair of equal sides"
    assert json.loads((tmp_path / "fit" / "fit.json").read_text())["nll"].keys() == {"2.5", "4", "6"}
    with pytest.raises(InputError, match=r"fit.json: the result of another --learning_rate is there; give another"):
        fit_margin.main(fit_margin.Args(**args, learning_rate=1e-3))
    (tmp_path / "fit" / "fit.json").unlink()
    with pytest.raises(InputError, match=r"nll.json: is of other flags or pairs; give another --output_dir"):
        fit_margin.main(fit_margin.Args(**args, learning_rate=1e-3))
    jsonl(tmp_path / "pairs.jsonl", *rows[1:])
    with pytest.raises(InputError, match=r"nll.json: is of other flags or pairs"):
        fit_margin.main(fit_margin.Args(**args))


def test_fitted_margins_are_what_am_train_takes(model, tmp_path, capsys):
    """Recomputed from the run of each m; then am_train.py --am_margin margins.json trains with the m of each task."""
    rows = [row | {"prompt": f"{row['prompt']} {i % 12}"} for i, row in enumerate(pairs(60))]
    data = jsonl(tmp_path / "pairs.jsonl", *rows)
    common = dict(model_name_or_path=model, dataset_name=data, learning_rate=3e-3, global_batch_size=16)
    args = fit_margin.Args(
        **common, output_dir=str(tmp_path / "fit"), margins=(0.3, 5.0), held_out=0.3, min_pairs=4, num_train_epochs=2
    )
    margins = fit_margin.main(args)
    assert margins == json.loads((tmp_path / "fit" / "margins.json").read_text())
    held, train = (
        [json.loads(line) for line in (tmp_path / "fit" / name).read_text().splitlines()]
        for name in ("held_out.jsonl", "train.jsonl")
    )
    assert len(held) + len(train) == 60 and not {r["prompt"] for r in held} & {r["prompt"] for r in train}
    nll = [json.loads((tmp_path / "fit" / f"m_{m}" / "eval.json").read_text())["nll"] for m in ("0.3", "5")]
    assert margins["default"] == (0.3, 5.0)[int(np.argmin(nll))] and nll[0] != nll[1]
    config = json.loads((tmp_path / "fit" / "m_5" / "config.json").read_text())["args"]
    assert config["am_margin"] == 5 and config["loss"] == "am" and f"NLL {nll[1]:.4f}" in capsys.readouterr().out

    seen = []

    def look(args, batch):
        seen.extend(zip([row["task"] for row in batch["rows"]], batch["margin"].tolist(), strict=True))
        return am_train.scorer_loss(args, batch)

    table = {"default": 2.0, "b": 0.5} | {k: m for k, m in margins.items() if k == "b"}
    for path, wanted in (("fit/margins.json", margins), ("own.json", table)):
        (tmp_path / "own.json").write_text(json.dumps(table))
        seen.clear()
        am_train.main(am_train.Args(**common, output_dir=str(tmp_path / "am"), am_margin=str(tmp_path / path)), look)
        expected = {task: pytest.approx(wanted.get(task, wanted["default"])) for task in ("b", "c")}
        assert len(seen) == 60 and all(m == expected[task] for task, m in seen)
        shutil.rmtree(tmp_path / "am")


def test_margins_that_cannot_be_fitted(model, tmp_path):
    data = jsonl(tmp_path / "pairs.jsonl", *rankings(1, 3))
    args = dict(model_name_or_path=model, dataset_name=data, output_dir=str(tmp_path / "out"))
    with pytest.raises(InputError, match=r"--held_out 0\.15: leaves no pairs to train on or to judge by"):
        fit_margin.main(fit_margin.Args(**args))
    for wrong in ({"margins": ()}, {"margins": (2.5, float("nan"))}, {"held_out": 0.0}, {"held_out": 1.0}):
        with pytest.raises(InputError, match="--margins must be positive numbers, --held_out must lie between 0 and 1"):
            fit_margin.main(fit_margin.Args(**args | wrong))


# --- small_model ------------------------------------------------------------------------------------------------------


def test_a_small_model_reads_every_language_and_trains(tmp_path):
    texts = {"en": "how do magnets work?", "zh": "磁铁是怎样工作的？", "both": "GPU 的价格 — 12 €, naïve 😀\n\t done"}
    rows = [{"prompt": p, "chosen": f"{p} ok", "rejected": "不知道。"} for p in texts.values()] * 4
    rows[1]["prompt"] = [{"role": "user", "content": "你好"}]
    data = jsonl(tmp_path / "pairs.jsonl", *rows)
    flags = dict(vocab_size=300, num_layers=1, hidden_size=32, max_length=96)
    small_model.main(small_model.Args(data, str(tmp_path / "small"), **flags))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "small")
    for text in (*texts.values(), "한국어 и кириллица: never seen", " spaces  kept "):
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids) == text and not {0, 1} & set(ids)
    assert len(tokenizer(texts["zh"]).input_ids) < len(texts["zh"].encode()), "merges were learned from the texts"
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<pad>", "<eos>") and len(tokenizer) <= 300
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert lm.config.vocab_size == len(tokenizer) and (lm.config.n_positions, lm.config.n_layer) == (96, 1)
    small_model.main(small_model.Args(data, str(tmp_path / "same"), **flags))
    small_model.main(small_model.Args(data, str(tmp_path / "other"), seed=2, **flags))
    one, same, other = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("small", "same", "other"))
    with pytest.raises(InputError, match=r"--output_dir .*small: holds a model; give another"):
        small_model.main(small_model.Args(data, str(tmp_path / "small"), **flags))
    assert one == same != other
    args = args_for(str(tmp_path / "small"), data, tmp_path / "rm", loss="rm", global_batch_size=12, max_length=96)
    am_train.main(args)
    (row,) = metrics_of(tmp_path / "rm")
    assert row["step"] == 1 and row["grad_norm"] > 0
    scorer = load_scorer(str(tmp_path / "rm" / "model"), tokenizer)
    assert scorer.model.config.pad_token_id == tokenizer.pad_token_id


# --- am_train --group_by_prompt ---------------------------------------------------------------------------------------


def batches_of(prompts, size, generator, **flags):
    """Indices in place of pairs."""
    pairs = [{"row": {"prompt": p}, "index": i} for i, p in enumerate(prompts)]
    args = SimpleNamespace(global_batch_size=size, **{"group_by_prompt": True} | flags)
    return [[pair["index"] for pair in batch] for batch in shuffled_batches(pairs, args, generator)]


PROMPTS = [["x", "y", [{"role": "user", "content": "x"}], "z"][i % 4] for i in range(26)]


def test_pairs_of_a_prompt_follow_one_another():
    generator, epochs = torch.Generator().manual_seed(3), []
    for _ in range(4):
        batches = batches_of(PROMPTS, 8, generator)
        assert [len(batch) for batch in batches] == [8, 8, 8, 2]
        order = [i for batch in batches for i in batch]
        assert sorted(order) == list(range(26)), "each pair once"
        runs = [str(p) for p, _ in itertools.groupby(PROMPTS[i] for i in order)]
        assert len(runs) == len(set(runs)) == 4, "each prompt in one piece"
        epochs.append(order)
    assert len(set(map(tuple, epochs))) == 4
    assert len({tuple(p for p, _ in itertools.groupby(str(PROMPTS[i]) for i in order)) for order in epochs}) > 1
    within = [[i for i in order if PROMPTS[i] == "x"] for order in epochs]
    assert len(set(map(tuple, within))) > 1, "pairs of a prompt are shuffled too"
    again = torch.Generator().manual_seed(3)
    assert [[i for batch in batches_of(PROMPTS, 8, again) for i in batch] for _ in range(4)] == epochs
    other = torch.Generator().manual_seed(4)
    assert [i for batch in batches_of(PROMPTS, 8, other) for i in batch] != epochs[0]


def test_a_prompt_of_many_pairs_comes_no_earlier():
    """One prompt of ten pairs, ten of one: it opens 1/11 of the epochs, give or take."""
    prompts, generator = ["long"] * 10 + list("abcdefghij"), torch.Generator().manual_seed(0)
    opens = [batches_of(prompts, 20, generator)[0][0] < 10 for _ in range(1000)]
    assert abs(np.mean(opens) - 1 / 11) < 0.03


def test_without_the_flag_the_order_is_that_of_randperm():
    ours, torch_s = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    for _ in range(2):
        batches = batches_of(PROMPTS, 8, ours, group_by_prompt=False)
        assert batches == [part.tolist() for part in torch.randperm(26, generator=torch_s).split(8)]


def test_texts_of_a_prompt_are_read_once_a_batch(model, tmp_path, monkeypatch):
    """Four prompts of four responses: 24 pairs. A batch of six pairs reads four texts by prompt, otherwise more."""
    data, forward, read = jsonl(tmp_path / "pairs.jsonl", *rankings(4, 4)), Scorer.forward, []

    def counting(self, ids, mask, prompt_lens, embedded=None):
        read.extend(tuple(i[m].tolist()) for i, m in zip(ids, mask, strict=True))
        return forward(self, ids, mask, prompt_lens, embedded)

    monkeypatch.setattr(Scorer, "forward", counting)
    flags = {"global_batch_size": 6, "per_device_train_batch_size": 6}
    am_train.main(args_for(model, data, tmp_path / "by_prompt", group_by_prompt=True, **flags))
    assert set(Counter(read).values()) == {1} and len(read) == 16
    read.clear()
    am_train.main(args_for(model, data, tmp_path / "pairs", **flags))
    assert len(set(read)) == 16 and len(read) > 24


def test_a_stopped_run_by_prompt_goes_on(model, tmp_path):
    data = jsonl(tmp_path / "pairs.jsonl", *rankings(5, 4))
    flags = {"group_by_prompt": True, "num_train_epochs": 2, "save_steps": 3, "global_batch_size": 4}
    am_train.main(args_for(model, data, tmp_path / "whole", **flags))
    left = iter(range(11))  # 8 steps an epoch: it stops in the second

    def stop(args, batch):
        if next(left) == 10:
            raise KeyboardInterrupt
        return am_train.scorer_loss(args, batch)

    with pytest.raises(KeyboardInterrupt):
        am_train.main(args_for(model, data, tmp_path / "run", **flags), stop)
    am_train.main(args_for(model, data, tmp_path / "run", resume=True, **flags))
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "whole") and len(metrics_of(tmp_path / "run")) == 16
    assert same_weights(tmp_path / "run", tmp_path / "whole")
    with pytest.raises(InputError, match="--group_by_prompt: is False"):
        am_train.main(args_for(model, data, tmp_path / "run", resume=True, **flags | {"group_by_prompt": False}))
