"""studies/failures.py: each planted bug changes what it says and leaves nothing behind;
docs/FAILURES.md and docs/results/failures.md say what the runs showed."""

import json
import re
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GenerationMixin

import ppo_sr
import utils
from miniature import jobs
from studies import failures as gallery
from studies.failures import BUGS, first_symptoms
from tests.conftest import gpt2_config
from tests.test_data import jsonl, refused
from tests.test_ppo_sr import SMALL, WORDS, metrics_of, save_model, weights_of, word_tokenizer
from tools.watch import BANDS, GRACE, NO
from utils import generate, load_scorer, pad, response_logprobs

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(gallery.__file__).parents[1]
PAGE = (ROOT / "docs/FAILURES.md").read_text(encoding="utf-8")
DOC = (ROOT / "docs/results/failures.md").read_text(encoding="utf-8")
RESULTS = json.loads((ROOT / "docs/results/failures.json").read_text(encoding="utf-8"))
STOPPED = {  # before step 1, and what the check says
    "mask_one_early": "the sampler's log-prob less the model's is off 0",
    "logits_not_shifted": "the sampler's log-prob less the model's is off 0",
    "sampler_temperature": "the sampler's log-prob less the model's is off 0",
    "sampler_top_p": "the sampler's log-prob less the model's is off 0",
    "dropout_in_updates": "the first ratio - 1 is off 0",
}


@pytest.fixture(scope="module")
def words():
    return word_tokenizer("<pad>", "<eos>", "<unk>", *WORDS)


@pytest.fixture(scope="module")
def flags(words, tmp_path_factory):
    """A random policy and scorer of one layer, and eleven prompts; two steps."""
    folder = tmp_path_factory.mktemp("models")
    config = gpt2_config(words, **SMALL)
    policy = save_model(AutoModelForCausalLM, config, words, folder / "policy", 0)
    config = gpt2_config(words, **SMALL, num_labels=1)
    scorer = save_model(AutoModelForSequenceClassification, config, words, folder / "scorer", 1)
    prompts = jsonl(folder / "prompts.jsonl", *({"prompt": " ".join(WORDS[i : i + 1 + i % 4])} for i in range(11)))
    sizes = {"response_length": 6, "max_length": 24, "global_batch_size": 8, "num_mini_batches": 2, "total_steps": 2}
    paths = {"model_name_or_path": policy, "reward_model_path": scorer, "dataset_name": prompts}
    return paths | sizes | {"num_ppo_epochs": 1, "learning_rate": 1e-3, "critic_learning_rate": 3e-3}


def run(flags, out, bug=None):
    """run.json, and the folder of the run that went through."""
    gallery.main(gallery.Run(str(out), bug, flags))
    found = json.loads((out / "run.json").read_text())
    return found, out / ("unchecked" if found["check"] else "checked")


@pytest.fixture(scope="module")
def healthy(flags, tmp_path_factory):
    found, folder = run(flags, tmp_path_factory.mktemp("healthy"))
    assert found["check"] is found["stopped"] is None
    return SimpleNamespace(rows=metrics_of(folder), weights=weights_of(folder))


# --- the bugs as functions ----------------------------------------------------------------------------------------------

MASK = torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()
LOGPROBS, REF = (
    torch.tensor([[-1.0, -2.0, -1.0], [-1.0, -1.0, 0.0]]),
    torch.tensor([[-1.5, -2.0, -1.0], [-1.0, -3.0, 0]]),
)
SCORES = torch.tensor([5.0, 7.0])


def test_rewards_by_hand():
    """log-ratios .5 0 0 and 0 2; beta = .5: - .25 0 0 and 0 -1, and the scores 5 and 7 on the last token."""
    right = [[-0.25, 0.0, 5.0], [0.0, 6.0, 0.0]]
    assert ppo_sr.token_rewards(SCORES, LOGPROBS, REF, MASK, 0.5).tolist() == right
    assert gallery.paid_on_pad(SCORES, LOGPROBS, REF, MASK, 0.5).tolist() == [[-0.25, 0.0, 5.0], [0.0, -1.0, 7.0]]
    assert gallery.wrong_sign_of_kl(SCORES, LOGPROBS, REF, MASK, 0.5).tolist() == [[0.25, 0.0, 5.0], [0.0, 8.0, 0.0]]


def test_the_score_is_read_at_the_last_column(flags, words):
    scorer = load_scorer(flags["reward_model_path"], words).eval()
    texts = [([5, 6, 7, 8, 1], 2), ([9, 10, 1], 1)]
    ids, _ = pad([x for x, _ in texts], 0)
    with torch.no_grad():
        every = scorer.model.score(scorer.model.base_model(ids).last_hidden_state)[..., 0]  # (text, position)
    r, e = gallery.read_at_pad(scorer, words, texts, 1, False)
    assert r == pytest.approx(every[:, 4].tolist(), abs=1e-5) and e.tolist() == [0, 0]
    assert abs(every[1, 4] - every[1, 2]) > 1e-2  # PAD is not where the text ends


def test_shifted_logprobs(flags):
    """Against all logits: x = a b, y = c d <eos>; x = a, y = c."""
    model = AutoModelForCausalLM.from_pretrained(flags["model_name_or_path"]).eval()
    ids, attention = pad([[5, 6, 7, 8, 1], [5, 7]], 0)
    ids[1, 0], lens = 6, torch.tensor([2, 1])
    with torch.no_grad():
        logp = model(ids).logits.log_softmax(-1)
        right, mask = response_logprobs(model, ids, attention, lens)
        assert right[0].tolist() == pytest.approx([logp[0, t - 1, ids[0, t]].item() for t in (2, 3, 4)], abs=1e-5)
        late, late_mask = gallery.logits_not_shifted(model, ids, attention, lens)
        assert late[0].tolist() == pytest.approx([logp[0, t, ids[0, t]].item() for t in (2, 3, 4)], abs=1e-5)
        assert late[1].tolist() == pytest.approx([logp[1, 1, 7].item(), 0, 0], abs=1e-5)
        early, early_mask = gallery.mask_one_early(model, ids[:1], attention[:1], lens[:1])
        assert early[0].tolist() == pytest.approx([logp[0, t - 1, ids[0, t]].item() for t in (1, 2, 3)], abs=1e-5)
    assert torch.equal(mask, late_mask) and torch.equal(mask[:1], early_mask)


def test_pad_is_eos_strips_what_ended(flags, words):
    model = AutoModelForCausalLM.from_pretrained(flags["model_name_or_path"]).eval()
    sampling = ([[word] for word in range(3, 20)] * 15, 6, 1.0, 64)
    torch.manual_seed(0)
    right, logprobs = generate(model, words, *sampling, logprobs=True)
    for with_logprobs in (False, True):
        torch.manual_seed(0)
        out = gallery.pad_is_eos(model, words, *sampling, logprobs=with_logprobs)
        responses = out[0] if with_logprobs else out
        assert [y[: max(1, len(y) - (y[-1] == 1))] for y in right] == responses
        if with_logprobs:
            assert out[1] == [row[: len(y)] for row, y in zip(logprobs, responses, strict=True)]
    ended = [y[-1] == 1 for y in right]
    assert any(ended) and not all(ended) and any(y == [1] for y in right)


# --- the bugs in a run ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_changes_the_run(bug, flags, healthy, tmp_path):
    patched = (ppo_sr, ppo_sr.PPO, utils.Backend, GenerationMixin)
    originals = [dict(vars(holder)) for holder in patched]
    found, folder = run(flags, tmp_path, bug)
    rows = metrics_of(folder)
    assert (found["check"] is None) == (bug not in STOPPED) and found["stopped"] is None
    if found["check"]:
        assert STOPPED[bug] in found["check"]["message"] and found["check"]["step"] == 0
        assert metrics_of(tmp_path / "checked") == []
    assert len(rows) == 3 and rows[1:] != healthy.rows[1:]
    assert [dict(vars(holder)) for holder in patched] == originals
    now, then = rows[1], healthy.rows[1]  # the first step, same seed
    same = {name for name in now if now[name] == pytest.approx(then[name], rel=1e-6, abs=1e-9)}
    last, normal = rows[2], healthy.rows[2]
    if bug in ("paid_on_pad", "wrong_sign_of_kl", "no_whitening", "random_critic"):
        assert {"objective/scores", "objective/kl", "val/response_length"} <= same  # the same batch
    if bug == "paid_on_pad":
        assert now["val/explained_variance"] < then["val/explained_variance"]
    if bug == "read_at_pad":
        assert "objective/scores" not in same and "objective/entropy" in same
    if bug == "logits_not_shifted":
        assert now["objective/kl"] == pytest.approx(0, abs=1e-4)
        assert "policy/perplexity" not in same
    if bug == "wrong_sign_of_kl":  # every response of step 2 has its KL paid and not charged
        for row, sign in ((last, 1), (normal, -1)):
            paid = row["objective/rlhf_reward"] - row["objective/scores"]
            assert paid == pytest.approx(sign * 0.05 * row["objective/kl"], abs=1e-6) and abs(paid) > 1e-4
    if bug == "reference_is_policy":
        assert last["objective/kl"] == 0 != normal["objective/kl"]
    if bug == "random_critic":
        assert now["loss/value_avg"] > 3 * then["loss/value_avg"]
    if bug == "pad_is_eos":
        assert now["val/no_eos_share"] > then["val/no_eos_share"] and last["val/response_length"] < 6
    if bug == "old_is_new":
        for row in rows[1:]:
            assert row["policy/approxkl_avg"] == 0 and row["val/ratio"] == 1
        assert then["policy/approxkl_avg"] > 0
    if bug == "dropout_in_updates":
        assert now["policy/approxkl_avg"] > 10 * then["policy/approxkl_avg"]
    if bug == "learning_rate_x10":
        assert now["policy/approxkl_avg"] > 3 * then["policy/approxkl_avg"]


def test_the_frozen_critic_stays():
    """The policy's engine keeps its rate."""
    policy, model = torch.nn.Linear(2, 1), torch.nn.Module()
    model.score = torch.nn.Linear(2, 1)
    critic = ppo_sr.Critic(SimpleNamespace(model=model, e_head=None), 1.0)
    ppo = SimpleNamespace(args=SimpleNamespace(max_grad_norm=1.0))
    with gallery.planted("frozen_critic"):
        engines = [ppo_sr.PPO.engine(ppo, module, 0.5) for module in (policy, critic)]
    for module, engine, moves in zip((policy, critic), engines, (True, False), strict=True):
        before = [p.clone() for p in module.parameters()]
        engine.backward(sum(p.sum() for p in module.parameters()))
        engine.step()
        same = [torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True)]
        assert same == 2 * [not moves]


# --- symptoms, alarms, inputs --------------------------------------------------------------------------------------------


def test_trailing_mean_by_hand():
    mean = gallery.trailing_mean(np.array([[10.0, 20, 30] + [0] * 8, [1] * 11]))
    assert mean[0].tolist() == [10, 15, 20, 15, 12, 10, pytest.approx(60 / 7), 7.5, pytest.approx(60 / 9), 6, 5]
    assert mean[1].tolist() == [1] * 11


def test_first_symptoms_by_hand():
    """Healthy runs between 0 and 1: a mean is a symptom above 2.5 or below -1.5 in three steps on end."""
    healthy = [{"x": np.zeros(6)}, {"x": np.ones(6)}]

    def of(*values):
        return first_symptoms({"x": np.array(values, dtype=float)}, healthy)

    assert of(0.5, 3, 5, 3, 3, 3.0) == [(3, "x")]  # means .5 1.75 2.83 2.88 2.9 2.92
    assert of(0.5, 3, 5, 0.4, 0, 0) == []  # 2.83 and 2.2
    assert of(9, 0, 0, 0, 0, 0) == [(1, "x")]  # 9 4.5 3, then 2.25
    assert of(9, 0, -2, 0, 0, 0) == []
    assert of(-1.6, -1.6, -1.6, 1, 1, 1) == [(1, "x")] and of(-1.4, -1.4, -1.4, 1, 1, 1) == []
    assert of(0.5, 1, 1, 1, 1, 1) == []  # never moves, as the healthy ones
    moving = [{"x": np.arange(6.0)}, {"x": -np.arange(6.0)}]
    assert first_symptoms({"x": np.array([0.5, 1, 1, 1, 1, 1])}, moving) == [(2, "x")]


def test_dials_and_alarms_of_a_log():
    row = {"policy/perplexity": np.e**0.5, "objective/entropy": 0.25, "objective/kl": 0.0, "task/a/kl": 0.0}
    rows = [{"step": 0, "eval/main/kl": 0.0}] + [{"step": t, "seconds": t} | row for t in (1, 2, 3)]
    rows[2]["objective/kl"] = -1.5
    dials = gallery.series(rows)
    assert set(dials) == {"policy/perplexity", "objective/entropy", "objective/kl", gallery.SURPRISE}
    assert dials[gallery.SURPRISE].tolist() == pytest.approx([2, 2, 2]) and dials["objective/kl"].tolist() == [
        0,
        -1.5,
        0,
    ]
    assert gallery.alarms_of(rows) == [(2, "objective/kl")]


def test_what_cannot_be_run_is_refused(tmp_path):
    with refused("--bugs", "nothing"):
        gallery.main(gallery.Args(str(tmp_path), bugs=("nothing",)))
    with refused("--healthy_seeds"):
        gallery.main(gallery.Args(str(tmp_path), healthy_seeds=(1, 2, 2)))
    with refused("--total_steps"):
        gallery.main(gallery.Args(str(tmp_path), total_steps=2))
    with refused("--folder", "sft/model", "make reproduce"):
        gallery.main(gallery.Args(str(tmp_path), folder=str(tmp_path)))


def test_a_finished_run_is_kept_and_another_one_is_not(tmp_path, monkeypatch):
    calls = []

    class Pool:
        def __init__(self, *args): ...
        def __enter__(self):
            return self

        def __exit__(self, *args): ...
        def submit(self, function, job):
            calls.append(job.args["flags"]["seed"])
            jobs.write_json(job.folder / "done.json", {"args": job.args, "seconds": 1.0})
            future = Future()
            future.set_result(None)
            return future

    monkeypatch.setattr(jobs, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(gallery, "read_json", lambda path: pytest.fail("no run left its run.json"))
    for name in ("sft", "am"):
        (tmp_path / name / "model").mkdir(parents=True)
    out = str(tmp_path / "out")
    for seeds in ((1, 2, 3), (1, 2, 3), (2, 1, 4)):
        args = gallery.Args(out, str(tmp_path), healthy_seeds=seeds, bugs=("no_whitening",))
        with pytest.raises(pytest.fail.Exception):
            gallery.main(args)
    assert calls == [1, 2, 3, 1, 4, 2]  # the bug of the first seed of each


# --- docs/FAILURES.md and docs/results/failures.md --------------------------------------------------------------------


def table_rows(text=DOC):
    lines = [line for line in text.splitlines() if line.startswith("| **")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_the_table_has_every_bug_with_its_line_of_code():
    rows = {cells[0].strip("* "): cells for cells in table_rows()}
    assert list(rows) == [bug.title for bug in BUGS.values()]
    assert [cells[0].strip("* ") for cells in table_rows(PAGE)] == list(rows)
    for bug in BUGS.values():
        assert f"`{bug.cause}`" in rows[bug.title][-1]


@pytest.mark.parametrize("name, bug", BUGS.items())
def test_the_table_says_what_rang(name, bug):
    """Column 4 names the step of the check, and of the first alarm on each dial."""
    facts = RESULTS["runs"][name]
    cell = next(cells for cells in table_rows() if cells[0] == f"**{bug.title}**")[3]
    first = {}
    for step, dial in facts["alarms"]:
        first.setdefault(dial, step)
    check = re.search(r"check of step (\d+)", cell)
    assert (int(check[1]) if check else None) == (facts["check"] and facts["check"]["step"])
    assert {d: int(s) for s, d in re.findall(r"(\d+): `([^`]+)`", cell)} == first
    assert ("nothing" in cell) == (not facts["check"] and not first)


@pytest.mark.parametrize("name, bug", BUGS.items())
def test_the_table_has_the_symptoms(name, bug):
    cell = next(cells for cells in table_rows() if cells[0] == f"**{bug.title}**")[2]
    said = [[int(step), dial] for step, dial in re.findall(r"(\d+): `([^`]+)`", cell)]
    assert said == RESULTS["runs"][name]["symptoms"]


@pytest.mark.parametrize("name, bug", BUGS.items())
def test_the_page_says_when_it_rang(name, bug):
    """The last column: "check", the step of the first alarm, or "never"."""
    facts = RESULTS["runs"][name]
    cell = next(cells for cells in table_rows(PAGE) if cells[0] == f"**{bug.title}**")[-1]
    first = str(facts["alarms"][0][0]) if facts["alarms"] else "never"
    assert cell.strip("| ") == ("check" if facts["check"] else first)


def test_the_page_has_every_alarm_with_its_band():
    said = {}
    for dial, band in re.findall(r"^- `([^`]+)`: (.+)$", PAGE, flags=re.M):
        kind, numbers = band.split(" ", 1)
        low, *high = (float(x.replace("−", "-")) for x in numbers.split(",")[0].split("–"))
        said[dial] = {"below": (low, NO), "above": (-NO, low), "outside": (low, *high)}[kind]
        assert re.findall(r"after step (\d+)", band) == [str(steps) for name, steps in GRACE.items() if name == dial]
    assert said == {dial: (band.low, band.high) for dial, band in BANDS.items()}


def test_the_runs_are_the_ones_described():
    settings, runs = RESULTS["settings"], RESULTS["runs"]
    assert RESULTS["commit"][:7] in DOC and settings["total_steps"] == 25 and settings["global_batch_size"] == 64
    assert set(runs) == set(BUGS) | {f"healthy_{seed}" for seed in settings["healthy_seeds"]}
    assert {name for name in BUGS if runs[name]["check"]} == set(STOPPED)
    for name in STOPPED:  # the words of that commit
        dropout = name == "dropout_in_updates"
        said = "dropout is on in updates" if dropout else "the sampler and the model disagree"
        assert said in runs[name]["check"]["message"]
    assert not any(runs[f"healthy_{seed}"]["alarms"] for seed in settings["healthy_seeds"])
    for facts in runs.values():
        assert facts["stopped"] is None and all(len(values) == 25 for values in facts["dials"].values())


def test_the_figure_is_small_and_there():
    assert "docs/results/failures.png" not in PAGE and "](results/failures.png)" in PAGE
    assert "](failures.png)" in DOC
    assert (ROOT / "docs/results/failures.png").stat().st_size < 300_000
