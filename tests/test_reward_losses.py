"""baselines/reward_losses.py: losses and uses of scores by hand, the cache of frozen layers, the bootstrap, a bake-off."""

import json
import math
import shutil
from dataclasses import replace
from math import exp, log
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, LlamaConfig, RobertaConfig

import am_train
from baselines import reward_losses as bake
from baselines.frozen_layers import cache_frozen_layers
from baselines.reward_losses import (
    bake_off_table,
    centred_loss,
    contrastive_rewards,
    fit_temperature,
    llama2_margin_loss,
    par_rewards,
    scaled_margins,
    split_by_prompt,
    use_scores,
)
from plumbing.command_line import check_flags
from tests.conftest import gpt2_config
from tests.test_am_train import WORDS, pairs
from tests.test_data import jsonl
from utils import InputError, encode_pair, load_scorer, load_tokenizer, pad


pytestmark = pytest.mark.usefixtures("one_thread")


# --- losses -----------------------------------------------------------------------------------------------------------


def test_llama2_margin_loss():
    """Gaps of 2 and 1 less d = 2 - log 3 and 1: s = 3/4 and 1/2."""
    chosen, rejected = torch.tensor([3.0, 0.5]), torch.tensor([1.0, -0.5])
    d = torch.tensor([2 - log(3), 1.0])
    assert llama2_margin_loss(chosen, rejected, d).item() == pytest.approx(-(log(3 / 4) + log(1 / 2)) / 2)
    assert llama2_margin_loss(chosen, rejected, 0 * d) == am_train.reward_model_loss(chosen, rejected)


def test_centred_loss():
    """Gap log 3 twice, sums 2 and -4: log 4/3 + c (4 + 16) / 2."""
    chosen, rejected = (torch.tensor([sign * log(3) / 2 + 1, sign * log(3) / 2 - 2]) for sign in (1, -1))
    assert centred_loss(chosen, rejected, 0.01).item() == pytest.approx(log(4 / 3) + 0.1)
    assert centred_loss(chosen, rejected, 0.0) == am_train.reward_model_loss(chosen, rejected)


# --- uses of scores ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_fit_temperature_finds_the_one_that_scores_were_multiplied_by(temperature):
    rng = np.random.default_rng(0)
    delta = rng.normal(0, 1.5, 40_000)
    delta *= np.where(rng.random(40_000) < 1 / (1 + np.exp(-np.abs(delta))), 1, -1) * np.sign(delta)  # calibrated
    assert fit_temperature(delta * temperature) == pytest.approx(temperature, rel=0.03)


def test_fit_temperature_by_hand():
    """Three of four pairs right at a gap of 2: s(2 / T) = 3/4 at T = 2 / log 3."""
    assert fit_temperature(np.array([2.0, 2, 2, -2])) == pytest.approx(2 / log(3), rel=1e-4)


def test_par_and_contrastive_rewards_by_hand():
    """Score log 3 beside 0 and log 9: s(log 3) = 3/4, s(-log 3) = 1/4; score 0 beside itself: 1/2."""
    scores, references = np.array([log(3), 0.0]), [np.array([0, log(9)]), np.array([0.0])]
    assert par_rewards(scores, references).tolist() == pytest.approx([0.5, 0.5])
    assert par_rewards(np.array([log(9)]), references[:1]).tolist() == pytest.approx([(0.9 + 0.5) / 2])
    assert contrastive_rewards(scores, references).tolist() == pytest.approx([0, 0])
    assert contrastive_rewards(scores + 2, references).tolist() == pytest.approx([2, 2])


def test_use_scores_by_hand():
    """One held-out pair, then two prompts: x with responses of score 2, 1, 0 in two pairs, y with 5 and 3."""
    rm = np.array([1.0, 2.0, 1.0, 3.0]), np.array([0.0, 1.0, 0.0, 5.0])
    low, high = [tuple(side * s for side in rm) for s in (0.5, 4.0)]
    arms, fitted = use_scores({"RM": [rm], "AM m=1": [low], "AM m=9": [high]}, 1, ["x", "x", "y"])
    assert fitted["m"] == ["AM m=9"] and arms["AM fitted m"][0][0].tolist() == [8, 4, 12], "a gap of 4 beats 1/2"
    assert [side.tolist() for side in arms["RM"][0]] == [[2, 1, 3], [1, 0, 5]], "held-out pairs are cut off"
    assert [side.tolist() for side in arms["contrastive"][0]] == [[1, 0, -1], [0, -1, 1]]
    s = lambda x: 1 / (1 + exp(-x))  # noqa: E731
    chosen = [(0.5 + s(1) + s(2)) / 3, 0.5, (0.5 + s(-2)) / 2]
    assert arms["PAR"][0][0] == pytest.approx(chosen) and arms["PAR"][0][1][0] == pytest.approx(0.5)
    (name, t), (other, u) = fitted["temperature"]
    assert (name, other) == ("RM", "AM m=1")
    assert t == pytest.approx(exp(-5), rel=1e-2) == u, "one right pair: as cold as the bounds allow"
    assert arms["RM temperature"][0][0] == pytest.approx(np.array([2, 1, 3]) / t)
    assert arms["AM m=1 temperature"][0][1] == pytest.approx(np.array([0.5, 0, 2.5]) / u)


# --- rows -------------------------------------------------------------------------------------------------------------


def test_scaled_margins():
    """Median margin 2 of a and 10 of b; at most 3 times that, then the scale; 0 without a margin."""
    rows = [{"task": "a", "margin": m} for m in (1, 2, 9)] + [{"task": "b", "margin": 10.0}, {"task": "b"}, {}]
    assert scaled_margins(rows, 1.0) == [0.5, 1.0, 3.0, 1.0, 0.0, 0.0]
    assert scaled_margins(rows, 2.0) == [1.0, 2.0, 6.0, 2.0, 0.0, 0.0]


def test_split_by_prompt():
    rows = [{"prompt": f"p{i % 500}", "i": i} for i in range(1000)]
    train, held = split_by_prompt(rows, 0.2)
    assert not {r["prompt"] for r in train} & {r["prompt"] for r in held}
    assert sorted(r["i"] for r in train + held) == list(range(1000)) and 0.15 < len(held) / 1000 < 0.25
    assert split_by_prompt(rows, 0.2) == (train, held)
    assert split_by_prompt(rows[::-1], 0.2) == (train[::-1], held[::-1]), "whatever the order"
    assert {r["i"] for r in held} < {r["i"] for r in split_by_prompt(rows, 0.4)[1]}
    messages = [{"prompt": [{"role": "user", "content": str(i)}]} for i in range(50)]
    assert 0 < len(split_by_prompt(messages, 0.5)[0]) < 50


# --- frozen layers ----------------------------------------------------------------------------------------------------


def encoder(folder, tokenizer, family="bert"):
    """A random encoder of three layers without dropout -> its folder."""
    sizes = dict(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=3, num_attention_heads=4)
    sizes |= dict(intermediate_size=64, max_position_embeddings=66, pad_token_id=tokenizer.pad_token_id)
    sizes |= dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.2)
    torch.manual_seed(0)
    AutoModel.from_config({"bert": BertConfig, "roberta": RobertaConfig}[family](**sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def llama(folder, tokenizer):
    """A random Llama of three layers -> its folder."""
    sizes = dict(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=3)
    sizes |= dict(num_attention_heads=4, initializer_range=0.2, pad_token_id=tokenizer.pad_token_id)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(**sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def texts_of(tokenizer, count=9, encoder=True):
    two = [(" ".join(WORDS[: 1 + i % 4]), " ".join(WORDS[i : i + 1 + i % 5])) for i in range(count)]
    return [encode_pair(tokenizer, x, y, 64, False, "here", encoder=encoder)[:2] for x, y in two]


def scores(scorer, tokenizer, texts):
    return scorer(*pad([ids for ids, _ in texts], tokenizer.pad_token_id), torch.tensor([n for _, n in texts]))[0]


def scores_and_gradients(scorer, tokenizer, texts):
    scorer.zero_grad()
    r = scores(scorer, tokenizer, texts)
    r.square().sum().backward()
    return r.detach(), {name: p.grad for name, p in scorer.named_parameters()}


@pytest.mark.parametrize("family", ["bert", "roberta", "llama"])
@pytest.mark.parametrize("num_layers", [0, 1, 2, 3])
def test_the_cache_changes_neither_scores_nor_gradients(family, num_layers, request, tmp_path, monkeypatch):
    """In float32 both are equal to 1e-5; as the study keeps it, in float16, to 1e-2."""
    causal = family == "llama"
    tokenizer = request.getfixturevalue("tokenizer" if causal else f"{family}_tokenizer")
    made = (llama, tmp_path, tokenizer) if causal else (encoder, tmp_path, tokenizer, family)
    folder, texts = made[0](*made[1:]), texts_of(tokenizer, encoder=not causal)
    torch.manual_seed(1)
    plain = load_scorer(folder, tokenizer, trained=False)
    r, gradients = scores_and_gradients(plain, tokenizer, texts)
    assert r.std() > 0.01
    for precision, tolerance in ((torch.float32, 1e-5), (torch.float16, 1e-2)):
        if precision == torch.float32:
            monkeypatch.setattr(torch.Tensor, "half", torch.Tensor.clone)
        else:
            monkeypatch.undo()
        torch.manual_seed(1)
        scorer, cache = load_scorer(folder, tokenizer, trained=False), {}
        cache_frozen_layers(scorer, tokenizer, texts, num_layers, cache)
        assert scorer.training and len(cache) == len({tuple(ids) for ids, _ in texts})
        assert {value.dtype for value in cache.values()} == {precision}
        again, cached = scores_and_gradients(scorer, tokenizer, texts[::-1])
        torch.testing.assert_close(again.flip(0), r, rtol=0, atol=tolerance)
        parts, weights = (
            (("embed_tokens.", "layers."), (1, 9)) if causal else (("embeddings.", "encoder.layer."), (5, 16))
        )
        prefixes = (parts[0], *(f"{parts[1]}{i}." for i in range(num_layers)))
        frozen = [n for n in gradients if n.split(".", 2)[2].startswith(prefixes)]
        assert len(frozen) == weights[0] + weights[1] * num_layers and all(cached[n] is None for n in frozen)
        assert {n for n, p in scorer.named_parameters() if not p.requires_grad} == set(frozen)
        for name in gradients.keys() - set(frozen):
            if gradients[name] is not None:  # the pooler's, where the family has one
                scale = max(1.0, gradients[name].abs().max().item())
                assert (cached[name] - gradients[name]).abs().max() < tolerance * scale, name


def test_a_scorer_with_cached_layers_is_saved_whole(bert_tokenizer, tmp_path):
    """After a step, from the folder, without the cache: the same scores, also of a text that was never cached."""
    folder, texts = encoder(tmp_path / "encoder", bert_tokenizer), texts_of(bert_tokenizer)
    scorer, cache = load_scorer(folder, bert_tokenizer, trained=False), {}
    before = {k: v.clone() for k, v in scorer.state_dict().items()}
    cache_frozen_layers(scorer, bert_tokenizer, texts[:6], 2, cache)
    scores_and_gradients(scorer, bert_tokenizer, texts[:6])
    torch.optim.SGD([p for p in scorer.parameters() if p.requires_grad], lr=0.01).step()
    with torch.no_grad():
        r = scores(scorer, bert_tokenizer, texts[:6])
        scorer.save_pretrained(tmp_path / "saved", scorer.state_dict())
        bert_tokenizer.save_pretrained(tmp_path / "saved")
        again = load_scorer(str(tmp_path / "saved"), load_tokenizer(tmp_path / "saved")).eval()
        reloaded = scores(again, bert_tokenizer, texts[:6])
        assert scores(again, bert_tokenizer, texts).shape == (9,)
    torch.testing.assert_close(reloaded, r, rtol=0, atol=1e-2)
    after = again.state_dict()
    moved = {k for k in after if not torch.equal(after[k], before[k])}
    assert before.keys() == after.keys()
    assert {k.split(".")[1] for k in moved} == {"bert", "classifier"}
    assert moved and not any(part in k for k in moved for part in ("embeddings", "layer.0.", "layer.1."))
    other = load_scorer(folder, bert_tokenizer, trained=False)
    cache_frozen_layers(other, bert_tokenizer, texts, 2, cache)  # the study's next arm: only new texts are computed
    assert len(cache) == len({tuple(ids) for ids, _ in texts})


def test_models_whose_layers_cannot_be_frozen(bert_tokenizer, tokenizer, scorer_folder, tmp_path):
    deep = load_scorer(encoder(tmp_path, bert_tokenizer), bert_tokenizer, trained=False)
    with pytest.raises(InputError, match="--num_frozen_layers 4: takes an encoder"):
        cache_frozen_layers(deep, bert_tokenizer, [], 4, {})
    with pytest.raises(InputError, match="--num_frozen_layers 1: takes an encoder"):
        cache_frozen_layers(load_scorer(scorer_folder, tokenizer), tokenizer, [], 1, {})


# --- table ------------------------------------------------------------------------------------------------------------


def slow_ece(deltas):
    bins = [[] for _ in range(10)]
    for d in deltas:
        confidence = 1 / (1 + exp(-abs(d)))
        bins[min(9, int((confidence - 0.5) * 20))].append((confidence, d > 0))
    return sum(100 / len(deltas) * abs(sum(c - right for c, right in one)) for one in bins)


SLOW = {
    "nll": lambda deltas: np.mean([log(1 + exp(-d)) for d in deltas]),
    "accuracy": lambda deltas: 100 * np.mean([d > 0 for d in deltas]),
    "brier": lambda deltas: np.mean([(1 / (1 + exp(d))) ** 2 for d in deltas]),
    "ece": slow_ece,
}


def slow_interval(arm, rm, prompts, num_bootstrap, metric):
    """Another way to the interval of one metric's difference to RM: name by name, pair by pair."""
    names, rng = list(dict.fromkeys(prompts)), np.random.default_rng(1)

    def difference(drawn):
        means = []
        for runs in (arm, rm):
            deltas = [
                [c - r for name in drawn for p, c, r in zip(prompts, *run, strict=True) if p == name] for run in runs
            ]
            means.append(np.mean([SLOW[metric](one) for one in deltas]))
        return means[0] - means[1]

    resampled = [difference([names[g] for g in rng.integers(0, len(names), len(names))]) for _ in range(num_bootstrap)]
    low, high = np.percentile(resampled, [2.5, 97.5])
    point = difference(names)
    return [2 * point - high, 2 * point - low] if metric == "ece" else [low, high]  # ECE is biased: the basic interval


def test_the_table_beside_a_slow_bootstrap():
    rng, prompts, tasks = np.random.default_rng(0), list("abacadbbe"), list("uvuuuvvvu")
    two_seeds = lambda: [tuple(rng.normal(size=(2, 9))) for _ in range(2)]  # noqa: E731
    arms = {"RM": two_seeds(), "other": two_seeds()}
    arms["same"] = [tuple(side.copy() for side in run) for run in arms["RM"]]
    table = bake_off_table(arms, tasks, prompts, 60)
    for metric in SLOW:
        d = table["other"][metric]["minus_rm"]
        assert [d["low"], d["high"]] == pytest.approx(slow_interval(arms["other"], arms["RM"], prompts, 60, metric))
        assert d["low"] < d["high"]
        assert d["difference"] == pytest.approx(table["other"][metric]["mean"] - table["RM"][metric]["mean"])
    for metric in ("accuracy", "ece", "brier", "nll"):
        assert table["same"][metric]["minus_rm"] == {"difference": 0, "low": 0, "high": 0}
    one = [am_train.ranking_metrics(*run) for run in arms["other"]]
    assert table["other"]["ece"]["seeds"] == [m["ece"] for m in one]
    assert table["other"]["ece"]["mean"] == pytest.approx(sum(m["ece"] for m in one) / 2)
    (chosen, rejected), scores = arms["other"][0], {}
    for task, c, r in zip(tasks, chosen, rejected, strict=True):
        scores.setdefault(task, []).extend((c, r))
    spread = np.std([np.mean(v) for v in scores.values()])
    assert table["other"]["spread_of_means"]["seeds"][0] == pytest.approx(spread)
    within = np.mean([np.std(v) for v in scores.values()])
    assert table["other"]["normalised_spread"]["seeds"][0] == pytest.approx(spread / within)


# --- a bake-off -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bakeoff(tokenizer, tmp_path_factory):
    """Two seeds on a tiny model: the Args and the table; 12 prompts in training, with margins on most rows."""
    folder = tmp_path_factory.mktemp("bakeoff")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(gpt2_config(tokenizer)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [row | {"prompt": f"{row['prompt']} {i % 12}"} for i, row in enumerate(pairs(60))]
    train = [row | ({"margin": 1.0 + i % 3} if i % 4 else {}) for i, row in enumerate(rows)]
    args = bake.Args(
        str(folder / "model"),
        jsonl(folder / "train.jsonl", *train),
        str(folder / "out"),
        eval_dataset_name=jsonl(folder / "test.jsonl", *rows[:20]),
        learning_rate=3e-3,
        global_batch_size=16,
        margins=(0.5, 5.0),
        held_out=0.3,
        seeds=(1, 2),
        num_bootstrap=20,
    )
    return args, bake.main(args)


def finished(folder):
    return {path.parent.name: path.stat().st_mtime_ns for path in folder.glob("*/scores.json")}


ARMS = ("RM", "AM m=0.5", "AM m=5", "centred", "margin")
NAMES = [*ARMS, "AM fitted m", "RM temperature", "AM m=0.5 temperature", "PAR", "contrastive"]


def test_a_bake_off(bakeoff, tmp_path):
    args, table = bakeoff
    out = Path(args.output_dir)
    assert list(table) == NAMES
    assert sorted(finished(out)) == sorted(f"{arm.replace(' ', '_')}_seed{s}" for arm in ARMS for s in (1, 2))
    train, held = split_by_prompt([json.loads(line) for line in Path(args.dataset_name).read_text().splitlines()], 0.3)
    kept = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
    assert [row["scaled_margin"] for row in kept] == scaled_margins(train, 1.0) and 0 in scaled_margins(train, 1.0)
    assert len((out / "eval.jsonl").read_text().splitlines()) == len(held) + 20

    # an arm is am_train.py's run with its flags on those files, and its row the metrics of the test pairs alone
    flags = {f: getattr(args, f) for f in ("model_name_or_path", "learning_rate", "global_batch_size")}
    flags |= dict(dataset_name=str(out / "train.jsonl"), eval_dataset_name=str(out / "eval.jsonl"))
    for arm, own in (("RM", {"loss": "rm"}), ("AM m=5", {"loss": "am", "am_margin": 5.0})):
        chosen, rejected = am_train.main(am_train.Args(output_dir=str(tmp_path / "one"), seed=2, **flags, **own))
        shutil.rmtree(tmp_path / "one")
        expected = am_train.ranking_metrics(chosen[len(held) :], rejected[len(held) :])
        assert {k: table[arm][k]["seeds"][1] for k in expected} == pytest.approx(expected)
    assert len({table[arm]["nll"]["mean"] for arm in ARMS}) == 5, "five losses, five scorers"
    assert table["RM temperature"]["accuracy"] == table["RM"]["accuracy"]
    for arm in ("PAR", "contrastive"):  # within a prompt they keep the order
        assert table[arm]["accuracy"]["mean"] == pytest.approx(table["RM"]["accuracy"]["mean"])


def test_json_and_markdown_agree(bakeoff):
    args, table = bakeoff
    folder = Path(args.output_dir)
    result = json.loads((folder / "bakeoff.json").read_text())
    assert result["table"] == table and result["args"]["seeds"] == [1, 2]
    header, _, columns, _, *lines = (folder / "bakeoff.md").read_text().splitlines()
    end = lines.index("")
    below, lines = "\n".join(lines[end:]), lines[:end]
    fitted = result["fitted"]
    assert all(arm.partition("=")[2] in below for arm in fitted["m"]) and "difference to RM" in below
    assert all(f"{t:.3g} ({arm})" in below for arm, t in fitted["temperature"])
    assert ("ran to its bound" in below) == any(not 0.01 < t < 100 for _, t in fitted["temperature"])
    assert header == result["header"] and "20 test pairs" in header and header.endswith("seeds 1 2")
    assert [line.split("|")[1].strip() for line in lines] == list(result["table"]) and columns.count("|") == 8
    for line, (arm, row) in zip(lines, result["table"].items(), strict=True):
        accuracy, ece, brier, nll, spread, normalised = (part.strip() for part in line.split("|")[2:-1])
        for cell, key, digits in ((accuracy, "accuracy", 1), (ece, "ece", 1), (brier, "brier", 3), (nll, "nll", 3)):
            value, _, interval = cell.partition(" [")
            d = row[key]["minus_rm"]
            if arm == "PAR" and key != "accuracy":
                assert cell == "–", "it is no probability"
                continue
            assert value == f"{row[key]['mean']:.{digits}f}"
            assert interval == ("" if arm == "RM" else f"{d['low']:+.{digits}f}, {d['high']:+.{digits}f}]")
        assert (spread, normalised) == tuple(f"{row[k]['mean']:.2f}" for k in ("spread_of_means", "normalised_spread"))


def test_finished_arms_are_kept(bakeoff, monkeypatch):
    """Started again it trains nothing and says the same; with one more m, that arm of both seeds alone."""
    args, table = bakeoff
    out, main = Path(args.output_dir), am_train.main
    before, trained = finished(out), []
    monkeypatch.setattr(
        am_train, "main", lambda one, **kw: trained.append((one.am_margin, one.seed)) or main(one, **kw)
    )
    assert bake.main(args) == table and finished(out) == before and not trained
    more = bake.main(replace(args, margins=(0.5, 5.0, 9.0)))
    assert trained == [(9.0, 1), (9.0, 2)] and before.items() < finished(out).items()
    assert {arm: more[arm] for arm in ARMS} == {arm: table[arm] for arm in ARMS}
    assert bake.main(replace(args, seeds=(2,)))["RM"]["nll"]["seeds"] == table["RM"]["nll"]["seeds"][1:]


@pytest.mark.parametrize(
    "changes",
    [{"learning_rate": 1e-2}, {"held_out": 0.4}, {"centring_coef": 0.1}, {"margin_scale": 2.0}, {"max_rows": 50}],
    ids=str,
)
def test_arms_of_other_flags_are_not_mixed(changes, bakeoff):
    args, out = bakeoff[0], Path(bakeoff[0].output_dir)
    before = [(out / name).read_text() for name in ("train.jsonl", "flags.json")]
    (name, value), old = *changes.items(), getattr(args, *changes)
    with pytest.raises(
        InputError, match=f"--{name}: is {value}, the arms in {out} had {old}; give another --output_dir"
    ):
        bake.main(replace(args, **changes))
    assert [(out / name).read_text() for name in ("train.jsonl", "flags.json")] == before


def test_arms_of_other_pairs_are_not_mixed(bakeoff, tmp_path):
    """The same rows under another name are the same pairs."""
    args, table = bakeoff
    for field in ("dataset_name", "eval_dataset_name"):
        rows = [json.loads(line) for line in Path(getattr(args, field)).read_text().splitlines()]
        copy = replace(args, **{field: jsonl(tmp_path / "copy.jsonl", *rows)})
        assert bake.main(copy) == table
        rows[7]["chosen"] += " dog"
        with pytest.raises(InputError, match="--dataset_name, --eval_dataset_name: not the pairs of the arms"):
            bake.main(replace(args, **{field: jsonl(tmp_path / "copy.jsonl", *rows)}))


def test_flags_that_leave_nothing_to_compare(bakeoff):
    args = bakeoff[0]
    with pytest.raises(InputError, match="--eval_dataset_name: missing"):
        bake.main(replace(args, eval_dataset_name=None))
    for wrong in ({"seeds": ()}, {"margins": ()}):
        with pytest.raises(InputError, match="--seeds, --margins: missing"):
            bake.main(replace(args, **wrong))
    for share in (0.0001, 0.0, 1.0):
        with pytest.raises(InputError, match=f"--held_out {share}: leaves no pairs"):
            bake.main(replace(args, held_out=share))


@pytest.mark.parametrize(
    "wrong",
    [
        {"margins": (2.5, math.nan)},
        {"margins": (0.0,)},
        {"centring_coef": math.inf},
        {"margin_scale": math.nan},
        {"seeds": (1, -1)},
        {"held_out": 2.0},
        {"num_bootstrap": 0},
    ],
    ids=str,
)
def test_a_number_out_of_range_is_named_before_an_arm_trains(wrong, bakeoff, tmp_path):
    with pytest.raises(InputError, match=f"--{next(iter(wrong))} .*: must be "):
        check_flags(replace(bakeoff[0], output_dir=str(tmp_path / "out"), **wrong))
    check_flags(replace(bakeoff[0], output_dir=str(tmp_path / "out"), margins=(math.inf,), centring_coef=0.0))


@pytest.mark.parametrize("margin", ["wide", [1], True, -1])
def test_a_margin_that_is_no_number_is_named_by_its_line(margin, bakeoff, tmp_path):
    args = bakeoff[0]
    rows = [json.loads(line) for line in Path(args.dataset_name).read_text().splitlines()]
    rows[6]["margin"] = margin
    wrong = {"dataset_name": jsonl(tmp_path / "margins.jsonl", *rows), "output_dir": str(tmp_path / "out")}
    with pytest.raises(InputError, match=r"margins\.jsonl, line 7: field 'margin' must be 0 or more"):
        bake.main(replace(args, **wrong))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_bake_off_with_frozen_layers(family, request, tmp_path):
    """Frozen weights leave as they came in every arm; the arms share the cache and differ in what is above it."""
    tokenizer = request.getfixturevalue("bert_tokenizer" if family == "bert" else "tokenizer")
    folder = (encoder if family == "bert" else llama)(tmp_path / "model", tokenizer)
    rows = [row | {"prompt": f"{row['prompt']} {WORDS[i % 7]}"} for i, row in enumerate(pairs(30))]
    data = jsonl(tmp_path / "pairs.jsonl", *rows)
    args = bake.Args(folder, data, str(tmp_path / "out"), eval_dataset_name=data, num_frozen_layers=2, margins=(2.0,))
    table = bake.main(replace(args, learning_rate=1e-2, held_out=0.3, seeds=(1,), num_bootstrap=5))
    assert "margin" not in table, "no row has one"
    weights = [
        load_scorer(str(tmp_path / "out" / f"{arm}_seed1" / "model"), tokenizer).state_dict()
        for arm in ("RM", "AM_m=2")
    ]
    start = AutoModel.from_pretrained(folder).state_dict()
    names = {"bert": ("embeddings.", "encoder.layer.{}.", "bert"), "llama": ("embed_tokens.", "layers.{}.", "model")}
    embeddings, layer, inner = names[family]
    frozen = [k for k in start if k.startswith((embeddings, layer.format(0), layer.format(1)))]
    assert frozen and all(torch.equal(w[f"model.{inner}.{k}"], start[k]) for w in weights for k in frozen)
    above = next(k for k in start if k.startswith(layer.format(2)) and start[k].dim() == 2)
    moved = [w[f"model.{inner}.{above}"] for w in weights]
    assert not torch.equal(*moved) and not torch.equal(moved[0], start[above])
