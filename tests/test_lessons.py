"""docs/lessons/: every code block of the three pages is run against the scripts, and every number is worked out again.

The blocks for TRL run where TRL is (requirements-benchmarks.txt), those for OpenRLHF beside its loss as it stands.
"""

import copy
import importlib.util
import inspect
import json
import math
import random
import re
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import am_train
import nano
import ppo_sr
import utils
from baselines import rloo
from tests.chat_templates import ANSWER, MODELS, OTHER, PROMPT, messages, tokenizer_for
from tests.conftest import gpt2_config
from tests.test_am_train import metrics_of, pairs, weights_of
from tests.test_data import jsonl
from tests.test_nano import folder  # noqa: F401 (a fixture: the toy world's policy, scorer and rows)
from utils import encode_pair

PAGES = Path(__file__).parents[1] / "docs" / "lessons"
AM, SR, LOOP = "from_rm_to_am", "from_ppo_to_ppo_sr", "into_your_loop"
WORDS = {AM: 350, SR: 300, LOOP: 600}  # beside code
needs_trl = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl: requirements-benchmarks.txt")

pytestmark = pytest.mark.usefixtures("one_thread")


def text_of(page):
    return (PAGES / f"{page}.md").read_text(encoding="utf-8")


def blocks(page):
    return re.findall(r"^```(\w+)\n(.*?)^```$", text_of(page), flags=re.M | re.S)


def block(page, words):
    """The page's one block that holds these words."""
    [found] = [code for _, code in blocks(page) if words in code]
    return found


def run_block(page, words, **names):
    """Run it as a user would who has pasted it, where `names` exist; -> what exists then."""
    exec(block(page, words), names)
    return names


def numbers(page, columns):
    """Rows of the page's table whose head has these columns: lists of the numbers in every cell."""
    lines = text_of(page).replace("−", "-").splitlines()
    start = lines.index(f"| {columns} |") + 2
    rows = []
    while start < len(lines) and lines[start].startswith("|"):
        cells = lines[start].strip("|").split("|")
        rows.append([[float(n) for n in re.findall(r"-?\d+\.?\d*", cell)] for cell in cells])
        start += 1
    return rows


# --- the pages ----------------------------------------------------------------------------------------------------

TESTED = {  # words that a test below finds the block by
    AM: ["-def reward_model_loss", "torch.autograd.grad"],
    SR: ["+    rehearsal_path", "rehearsal_loss("],
    LOOP: ["class AdvantageModelTrainer", "class AdvantageModelLoss", "for batch in loader", "def ids_of",
           "def rehearsal_batches", "loss = policy_loss + 0.01", "class Rehearsal:"],
}  # fmt: skip


@pytest.mark.parametrize("page", TESTED)
def test_every_block_is_run_here(page):
    assert [code for _, code in blocks(page)] == [block(page, words) for words in TESTED[page]]
    assert text_of(page).count("```") == 2 * len(TESTED[page])


@pytest.mark.parametrize("page", TESTED)
def test_a_page_is_short(page):
    prose = re.sub(r"^```.*?^```$", "", text_of(page), flags=re.M | re.S).replace("|", " ")
    assert len(prose.split()) <= WORDS[page]
    assert max(map(len, text_of(page).splitlines())) <= 142


# --- from RM to AM ------------------------------------------------------------------------------------------------

BATCH = torch.tensor([[4.0, 1.0, -2.0], [2.0, -1.0, -4.0]])  # chosen, rejected


def test_the_diff_leads_from_one_loss_to_the_other():
    lines = block(AM, "-def reward_model_loss").splitlines()
    for sign, loss, margin in (("-", am_train.reward_model_loss, []), ("+", am_train.advantage_model_loss, [2.5])):
        part, names = [line[1:] for line in lines if line[0] == sign], {"F": F}
        assert set(part) <= set(inspect.getsource(loss).splitlines())
        exec("\n".join(part), names)
        assert names[loss.__name__](*BATCH, *margin) == loss(*BATCH, *margin)
    assert {line[0] for line in lines} == {"-", "+"}


def test_one_batch_in_numbers():
    """The page's table, from am_train.py: losses of each pair alone, and gradients by autograd."""
    table = numbers(AM, "chosen, rejected | rank | bound | gradient of Eq. 1 | of Eq. 6")
    assert [row[0] for row in table] == BATCH.T.tolist()
    for (c, r), rank, bound, *gradients in table:
        scores = torch.tensor([c, r], requires_grad=True)
        losses = am_train.reward_model_loss(*scores), am_train.advantage_model_loss(*scores, 2.5)
        assert rank == pytest.approx([losses[0].item()], abs=5e-4)
        assert sum(bound) == pytest.approx((losses[1] - losses[0]).item(), abs=1e-3)
        assert bound == pytest.approx([math.log1p(math.exp(c - 2.5)), math.log1p(math.exp(-2.5 - r))], abs=5e-4)
        for loss, stated in zip(losses, gradients, strict=True):
            assert stated == pytest.approx(torch.autograd.grad(loss, scores)[0].tolist(), abs=5e-4)
    s = torch.sigmoid(torch.tensor([4 - 2.5, -2.5 - 2, 2 * 2.5 / 3]))
    assert s.tolist() == pytest.approx([0.818, 0.011, 0.84], abs=5e-3)
    assert all(number in text_of(AM) for number in ("= 0.818", "= −0.011", "= 0.84"))


def test_where_the_scores_go():
    printed = []
    run_block(AM, "torch.autograd.grad", print=lambda scores: printed.append(scores.clone()))
    rows = numbers(AM, "start | 4, 2 | 1, -1 | -2, -4")
    for scores, (_, *cells) in zip(printed, rows, strict=True):
        assert [n for cell in cells for n in cell] == pytest.approx(scores.T.flatten().tolist(), abs=6e-3)
    assert printed[1].abs().flatten().tolist() == pytest.approx([2.5 / 3] * 6, abs=1e-4)


# --- from PPO to PPO-SR -------------------------------------------------------------------------------------------


def plain_ppo():
    """nano.py without the lines of the page's diff, as a module."""
    source = inspect.getsource(nano)
    for hunk in block(SR, "+    rehearsal_path").split("@@\n"):
        lines = [line + "\n" for line in hunk.splitlines()]
        new = "".join(line[1:] for line in lines if line[0] != "-")
        assert source.count(new) == 1, new
        source = source.replace(new, "".join(line[1:] for line in lines if line[0] != "+"))
    assert not re.search(r"rehears|old_answers|Eq\. 9", source.split('"""', 2)[2])
    module = types.ModuleType("plain_ppo")
    exec(source, module.__dict__)
    return module


def test_without_the_diff_nano_is_ppo(folder, tmp_path, monkeypatch):  # noqa: F811
    """The same weights as nano.py at a coefficient of 0, and others at another one."""
    flags = {"policy_path": folder / "policy", "scorer_path": folder / "scorer"}
    flags |= {"prompts_path": folder / "prompts.jsonl", "steps": 2, "batch_size": 8, "response_length": 6}
    more = {"rehearsal_path": folder / "rehearsal.jsonl"}
    monkeypatch.setattr(random, "choices", lambda rows, k: rows[:k])  # draws nothing: the prompts stay the same
    _, plain, _ = plain_ppo().main(**flags, output_path=tmp_path / "plain")
    weights = []
    for coef in (0.0, 0.5):
        _, policy, _ = nano.main(**flags, **more, rehearsal_coef=coef, output_path=tmp_path / str(coef))
        weights.append(policy.state_dict())
    plain = plain.state_dict()
    assert all(torch.equal(plain[name], weights[0][name]) for name in plain)
    assert any(not torch.equal(plain[name], weights[1][name]) for name in plain)


def test_one_rehearsed_answer_in_numbers():
    """The page's table by hand, by its block (ppo_sr.py's loss), and by nano.py's line on such a policy."""
    rows = numbers(SR, "p | -log p | gradient of Eq. 9's term on the token's logit")
    p = [row[0][0] for row in rows]
    assert [row[1][0] for row in rows] == pytest.approx([-math.log(q) for q in p], abs=5e-4)
    gradient = [-0.01 * (1 - q) / 3 for q in p]
    assert [row[2][0] for row in rows] == pytest.approx(gradient, abs=5e-6)
    nll = -sum(map(math.log, p)) / 3
    found = run_block(SR, "rehearsal_loss(", print=lambda *_: None)
    assert found["logits"].grad.tolist() == pytest.approx(gradient)
    assert found["term"].item() == pytest.approx(0.01 * nll)
    assert f"2.303 / 3 = {nll:.3f}" in text_of(SR) and f"{0.01 * nll:.5f}" in text_of(SR)
    assert -sum(map(math.log, p)) == pytest.approx(2.303, abs=5e-4)

    logits = torch.zeros(1, 4, 5, requires_grad=True)  # one prompt token and the answer 1, 1, 1
    with torch.no_grad():
        logits[0, :3, 1] = torch.tensor([math.log(4 * q / (1 - q)) for q in p])
    tokens, in_answer = nano.pad([([0], [1, 1, 1])])
    policy = lambda ids: types.SimpleNamespace(logits=logits[:, : ids.shape[1]])  # noqa: E731
    rehearsal_nll = -nano.token_logprobs(policy, tokens)[in_answer].mean()
    (0.01 * rehearsal_nll).backward()
    assert rehearsal_nll.item() == pytest.approx(nll)
    assert logits.grad[0, :3, 1].tolist() == pytest.approx(gradient)


def test_a_fresh_token_of_advantage_1_weighs_100_times_as_much():
    logits = torch.tensor([0.0, -1.0, 2.0], requires_grad=True)
    logprobs, all_of_them = F.logsigmoid(logits), torch.ones(3, dtype=torch.bool)
    fresh = nano.clipped_policy_loss(logprobs, logprobs.detach(), torch.ones(3), all_of_them)
    fresh, old = (torch.autograd.grad(loss, logits, retain_graph=True)[0]
                  for loss in (fresh, 0.01 * ppo_sr.rehearsal_loss(logprobs, 3)))  # fmt: skip
    assert torch.allclose(fresh, 100 * old)


# --- into your loop: the advantage model --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return jsonl(tmp_path_factory.mktemp("data") / "pairs.jsonl", *pairs(6))


@pytest.fixture(scope="module")
def ids(data, tokenizer):
    """The six pairs, as every script reads them: {chosen_ids, rejected_ids}."""
    rows = []
    for line in Path(data).read_text().splitlines():
        row, found = json.loads(line), {}
        for side in am_train.SIDES:
            found[f"{side}_ids"], *_ = encode_pair(tokenizer, row["prompt"], row[side], 128, False, "here")
        rows.append(found)
    return rows


def trained_by_am_train(scorer_folder, data, out):
    """Losses and weights of four steps of all six pairs, whose order then does not count."""
    flags = {"global_batch_size": 6, "per_device_train_batch_size": 6, "num_train_epochs": 4}
    flags |= {"learning_rate": 1e-3, "warmup_ratio": 0.0, "min_lr_ratio": 1.0}
    args = am_train.Args(scorer_folder, data, str(out), eval_dataset_name=data, **flags)
    am_train.main(args)
    return metrics_of(out), {name: weight for (_, name), weight in weights_of(out).items()}


def same(weights, model):
    """But for the bias of the attention's keys: its gradient is rounding alone, which AdamW makes a whole step of."""
    model = model.state_dict()
    names = [name for name in weights if not name.endswith("attn.c_attn.bias")]
    return all((weights[name] - model[name]).abs().mean() < 1e-5 for name in names)


def load_scorer(scorer_folder):
    return AutoModelForSequenceClassification.from_pretrained(scorer_folder, dtype=torch.float32)


def test_a_plain_loop_is_am_train(scorer_folder, data, ids, tokenizer, tmp_path):
    metrics, weights = trained_by_am_train(scorer_folder, data, tmp_path / "run")
    rows = [row[f"{side}_ids"] for side in am_train.SIDES for row in ids]
    input_ids, attention_mask = utils.pad(rows, tokenizer.pad_token_id)
    model, losses = load_scorer(scorer_folder).train(), []  # this one has no dropout

    class Optimizer(torch.optim.AdamW):
        def step(self):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            return super().step()

    def loader():
        for _ in range(4):
            yield {"input_ids": input_ids, "attention_mask": attention_mask.long()}
            losses.append(names["loss"].item())

    names = {"model": model, "loader": loader()}
    names["optimizer"] = Optimizer(model.parameters(), 1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    exec(block(LOOP, "for batch in loader"), names)
    assert losses == pytest.approx([row["loss"] for row in metrics[:4]], rel=1e-4)
    assert same(weights, model)


def openrlhf_models():
    """What the page's block imports: openrlhf/models/loss.py of version 0.11.0 (Apache-2.0)."""

    class PairWiseLoss(torch.nn.Module):
        def forward(self, chosen_reward, reject_reward, margin=None):
            if margin is not None:
                loss = -F.logsigmoid(chosen_reward - reject_reward - margin)
            else:
                loss = -F.logsigmoid(chosen_reward - reject_reward)
            return loss.mean()

    return types.SimpleNamespace(PairWiseLoss=PairWiseLoss)


def test_openrlhf_s_loss(monkeypatch):
    """Called as rm_trainer.py calls it: positional, with a margin of None or one a pair."""
    monkeypatch.setitem(sys.modules, "openrlhf", types.ModuleType("openrlhf"))
    monkeypatch.setitem(sys.modules, "openrlhf.models", openrlhf_models())
    trainer = types.SimpleNamespace(loss_fn=None)
    run_block(LOOP, "class AdvantageModelLoss", trainer=trainer)
    found = trainer.loss_fn(*BATCH, None)
    assert found.item() == pytest.approx(am_train.advantage_model_loss(*BATCH, 2.5).item())
    # a column `margin` moves the ranking term alone
    margin = torch.tensor([0.0, 1.0, 3.0])
    moved = am_train.reward_model_loss(BATCH[0] - margin, BATCH[1]) - am_train.reward_model_loss(*BATCH)
    assert (trainer.loss_fn(*BATCH, margin) - found).item() == pytest.approx(moved.item())


# their templates put nothing between the generation prompt and the answer
CHAT = [name for name, model in MODELS.items() if model.template and not model.before]


def texts_block(name, tokenizer, model):
    names = {"tokenizer": tokenizer, "model": model}
    exec(block(LOOP, "def ids_of").replace("<|im_end|>", MODELS[name].end), names)
    return names


def sequence_classifier(tokenizer):
    torch.manual_seed(1)
    return AutoModelForSequenceClassification.from_config(gpt2_config(tokenizer, num_labels=1, n_positions=384)).eval()


@pytest.mark.parametrize("name", CHAT)
def test_a_text_ends_where_the_policy_stops(name):
    tokenizer = tokenizer_for(name)
    names = texts_block(name, tokenizer, model := sequence_classifier(tokenizer))
    for answer in (ANSWER, OTHER):
        expected, *_ = encode_pair(tokenizer, PROMPT, answer, 384, False, "here")
        assert names["ids_of"](messages(PROMPT, answer)) == expected
    assert names["end"] == utils.answer_end(tokenizer) != tokenizer.pad_token_id == model.config.pad_token_id
    assert model.get_input_embeddings().num_embeddings >= len(tokenizer)


@pytest.mark.parametrize("name", [name for name, model in MODELS.items() if model.template and model.before])
def test_a_template_that_adds_words_before_an_answer(name):
    """ids_of has them, the policy's samples have not: its prompt, answer and end are those of rehearsal_batches."""
    tokenizer = tokenizer_for(name)
    names = texts_block(name, tokenizer, sequence_classifier(tokenizer))
    sampled, *_ = encode_pair(tokenizer, PROMPT, ANSWER, 384, False, "here")
    assert names["ids_of"](messages(PROMPT, ANSWER)) != sampled
    batches = run_block(LOOP, "def rehearsal_batches")["rehearsal_batches"](ROWS[:1], tokenizer, names["end"])
    assert next(batches)["input_ids"].tolist() == [sampled]


def test_where_transformers_reads_a_score():
    """With pad = eos one token early; after the page's lines at the end of the answer."""
    tokenizer = tokenizer_for("SmolLM2")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    model = sequence_classifier(tokenizer)
    text, *_ = encode_pair(tokenizer, PROMPT, ANSWER, 384, False, "here")
    read = lambda ids: model(torch.tensor([ids])).logits.item()  # noqa: E731
    assert read(text) == pytest.approx(read(text[:-1]))
    end = model.score(model.transformer(torch.tensor([text])).last_hidden_state[0, -1]).item()
    assert read(text) != pytest.approx(end, abs=1e-3)
    ids_of = texts_block("SmolLM2", tokenizer, model)["ids_of"]
    assert read(ids_of(messages(PROMPT, ANSWER))) == pytest.approx(end, abs=1e-5)


def test_the_losses_of_scores_0():
    zero = torch.zeros(3)
    assert am_train.reward_model_loss(zero, zero).item() == pytest.approx(0.693, abs=5e-4)
    assert am_train.advantage_model_loss(zero, zero, 2.5).item() == pytest.approx(0.851, abs=5e-4)
    assert "Eq. 1 gives 0.693, Eq. 6 gives 0.851" in text_of(LOOP)


def test_scores_far_from_0_are_first_pulled_down():
    """Around 6 the gradients of both sides are positive, whatever their order."""
    for gap in (-1.0, -0.1, 0.1, 1.0):
        scores = torch.tensor([6 + gap / 2, 6 - gap / 2], requires_grad=True)
        am_train.advantage_model_loss(*scores, 2.5).backward()
        assert (scores.grad > 0).all()


# --- TRL's RewardTrainer ------------------------------------------------------------------------------------------

QUIET = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": [], "save_strategy": "no",
         "logging_steps": 1, "lr_scheduler_type": "constant", "disable_tqdm": True}  # fmt: skip


@needs_trl
def test_trl_s_reward_trainer_with_the_page_s_class_is_am_train(scorer_folder, data, ids, tokenizer, tmp_path):
    from datasets import Dataset
    from trl import RewardConfig

    metrics, weights = trained_by_am_train(scorer_folder, data, tmp_path / "run")
    how = {"num_train_epochs": 4, "per_device_train_batch_size": 6, "per_device_eval_batch_size": 6}
    config = RewardConfig(str(tmp_path / "trl"), learning_rate=1e-3, adam_beta2=0.95, **how, **QUIET)
    trainer = run_block(LOOP, "class AdvantageModelTrainer")["AdvantageModelTrainer"](
        model=load_scorer(scorer_folder),
        args=config,
        train_dataset=Dataset.from_list(ids),
        eval_dataset=Dataset.from_list(ids),
        processing_class=tokenizer,
    )
    trainer.train()
    log = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["loss"] for row in log] == pytest.approx([row["loss"] for row in metrics[:4]], rel=1e-3)
    assert [100 * row["accuracy"] for row in log] == pytest.approx([row["accuracy"] for row in metrics[:4]])
    assert same(weights, trainer.model)

    found, scores = trainer.evaluate(), []
    for side in am_train.SIDES:
        rows = utils.pad([row[f"{side}_ids"] for row in ids], tokenizer.pad_token_id)
        with torch.no_grad():
            scores.append(trainer.model(rows[0], attention_mask=rows[1].long()).logits.squeeze(-1))
    assert found["eval_loss"] == pytest.approx(am_train.advantage_model_loss(*scores, 2.5).item(), rel=1e-4)
    assert found["eval_margin"] == pytest.approx((scores[0] - scores[1]).mean().item(), rel=1e-4, abs=1e-5)

    trainer.save_model(out := str(tmp_path / "saved"))
    scorer = utils.load_scorer(out, words := utils.load_tokenizer(out, dedicated_pad=True), frozen=True)
    texts = [(row["chosen_ids"], 1) for row in ids]
    r, _ = utils.score_texts(scorer, words, texts, 6, False)
    assert r.tolist() == pytest.approx(scores[0].tolist(), abs=1e-4)
    assert utils.same_form(tokenizer, words)


@needs_trl
def test_what_trl_does_with_texts_and_which_defaults_it_has(tmp_path):
    """It reads the template's newline, drops a pair with a long text, takes eos for a missing pad token, and its
    column `margin` moves the ranking term."""
    from datasets import Dataset
    from trl import RewardConfig

    tokenizer = tokenizer_for("SmolLM2")
    rows = [{"chosen": messages(PROMPT, ANSWER), "rejected": messages(PROMPT, OTHER), "margin": 3.0}]
    rows.append(rows[0] | {"rejected": messages(PROMPT, "a" * 300)})
    trainer_class = run_block(LOOP, "class AdvantageModelTrainer")["AdvantageModelTrainer"]
    how = {"max_length": 300, "per_device_train_batch_size": 1}
    trainer = trainer_class(
        model=sequence_classifier(tokenizer),
        args=RewardConfig(str(tmp_path / "trl"), **how, **QUIET),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    [kept] = trainer.train_dataset
    whole = tokenizer.apply_chat_template(messages(PROMPT, ANSWER), return_dict=False)
    assert kept["chosen_ids"] == whole and tokenizer.decode(whole[-2:]) == "<|im_end|>\n"
    batch = {k: v for k, v in trainer.data_collator([kept]).items()}
    with torch.no_grad():
        moved = trainer.compute_loss(trainer.model, dict(batch))
        margin = batch.pop("margin")
        loss, outputs = trainer.compute_loss(trainer.model, dict(batch), True)
    chosen, rejected = outputs.logits.squeeze(-1).chunk(2)
    assert loss.item() == pytest.approx(am_train.advantage_model_loss(chosen, rejected, 2.5).item(), rel=1e-5)
    rank = [am_train.reward_model_loss(chosen - m, rejected).item() for m in (margin, 0)]
    assert (moved - loss).item() == pytest.approx(rank[0] - rank[1], rel=1e-4)
    default = {f.name: f.default for f in RewardConfig.__dataclass_fields__.values()}
    assert default["learning_rate"] == 1e-4 and default["center_rewards_coefficient"] is None
    assert RewardConfig(str(tmp_path / "other"), use_cpu=True, report_to=[]).bf16 is True


# --- into your loop: rehearsal ------------------------------------------------------------------------------------

NAME = "ChatML on a base model"
ROWS = [{"prompt": PROMPT, "response": answer} for answer in (ANSWER, OTHER, "the answer is 4.")]


@pytest.fixture
def chat():
    """A tokenizer with a template, a policy, and the id that ends an answer."""
    tokenizer = tokenizer_for(NAME)
    torch.manual_seed(3)
    policy = AutoModelForCausalLM.from_config(gpt2_config(tokenizer, n_positions=384)).eval()
    return tokenizer, policy, utils.answer_end(tokenizer)


def scripts_rehearsal(policy, tokenizer, rows):
    """ppo_sr.py's Eq. 9 on these rows: the mean NLL of their responses' tokens."""
    texts = []
    for row in rows:
        tokens, length, _ = encode_pair(tokenizer, row["prompt"], row["response"], 384, False, "here")
        texts.append((tokens[:length], tokens[length:]))
    logprobs, mask = utils.response_logprobs(policy, *utils.pad_pairs(texts, tokenizer.pad_token_id))
    return ppo_sr.rehearsal_loss(logprobs[mask], mask.sum())


def test_a_batch_of_d_r_has_ppo_sr_s_loss(chat):
    tokenizer, policy, end = chat
    batches = run_block(LOOP, "def rehearsal_batches")["rehearsal_batches"]
    found = policy(**next(batches(ROWS, tokenizer, end))).loss
    assert found.item() == pytest.approx(scripts_rehearsal(policy, tokenizer, ROWS).item(), rel=1e-5)
    one = next(batches(ROWS[2:], tokenizer, end, size=1))
    expected, length, _ = encode_pair(tokenizer, PROMPT, ROWS[2]["response"], 384, False, "here")
    assert one["input_ids"].tolist() == [expected]
    assert one["labels"].tolist() == [[-100] * length + expected[length:]]


@pytest.mark.parametrize("method", ["ppo", "grpo", "rloo"])
def test_two_lines_for_any_loop(method, chat):
    """The gradient is that of the loop's own loss plus 0.01 times that of ppo_sr.py's Eq. 9."""
    tokenizer, policy, end = chat
    fresh = [encode_pair(tokenizer, PROMPT, text, 384, False, "here") for text in ("a", "b c", "d", "e f g")]
    fresh = [(tokens[:length], tokens[length:]) for tokens, length, _ in fresh]
    logprobs, mask = utils.response_logprobs(policy, *utils.pad_pairs(fresh, tokenizer.pad_token_id))
    logprobs, scores = logprobs[mask], torch.tensor([1.0, -2.0, 0.5, 3.0])
    if method == "ppo":
        advantages = ppo_sr.whiten(scores[:, None] * mask, mask)
    else:
        advantages = rloo.ADVANTAGES[method](scores.view(2, 2)).view(-1, 1) * mask
    ratio = (logprobs - logprobs.detach()).exp()
    policy_loss = ppo_sr.clipped_policy_loss(ratio, advantages[mask], 0.2).mean()

    parameters = [*policy.parameters()]
    own = torch.autograd.grad(policy_loss, parameters, retain_graph=True)
    old = torch.autograd.grad(scripts_rehearsal(policy, tokenizer, ROWS), parameters)
    d_r = run_block(LOOP, "def rehearsal_batches")["rehearsal_batches"](ROWS, tokenizer, end)
    names = run_block(LOOP, "loss = policy_loss + 0.01", policy=policy, d_r=d_r, policy_loss=policy_loss)
    names["loss"].backward()
    for parameter, a, b in zip(parameters, own, old, strict=True):
        assert torch.allclose(parameter.grad, a + 0.01 * b, atol=1e-6)


@needs_trl
@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
def test_trl_s_trainers_rehearse(kind, chat, tmp_path):
    """One SGD step of two accumulated parts, with and without: the weights part by 0.01 times the mean gradient of the
    two rehearsal batches, at whatever place the trainer divides its loss."""
    pytest.importorskip("requests", reason="TRL's GRPOTrainer imports it")
    import trl
    from datasets import Dataset

    tokenizer, policy, end = chat
    start = copy.deepcopy(policy.state_dict())
    batches = run_block(LOOP, "def rehearsal_batches")["rehearsal_batches"]
    d_r = [next(batches(rows, tokenizer, end)) for rows in (ROWS[:1], ROWS[1:])]
    how = {"max_steps": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_generations": 2}
    how |= {"max_completion_length": 5, "max_grad_norm": 1e9, "beta": 0.0, "seed": 1, "learning_rate": 1.0}
    config = getattr(trl, f"{kind}Config")
    names = run_block(LOOP, "class Rehearsal:")
    rows = [{"prompt": messages(f"{i}?", "")[:1]} for i in range(4)]
    ends, logs = [], []
    for rehearsed in (False, True):
        policy.load_state_dict(start)
        trainer = (names[f"Rehearsed{kind}"] if rehearsed else getattr(trl, f"{kind}Trainer"))(
            model=policy,
            reward_funcs=lambda completions, **_: [float(len(str(c))) for c in completions],
            args=config(str(tmp_path / str(rehearsed)), **how, **QUIET),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            optimizers=(torch.optim.SGD(policy.parameters(), 1.0), None),
        )
        trainer.d_r = iter(d_r)
        trainer.train()
        ends.append(copy.deepcopy(policy.state_dict()))
        logs += trainer.state.log_history
    policy.load_state_dict(start)
    policy.eval().zero_grad()
    losses = [policy(**batch).loss for batch in d_r]
    (0.01 * sum(losses) / 2).backward()
    expected = {name: parameter.grad for name, parameter in policy.named_parameters()}
    assert max(gradient.abs().max() for gradient in expected.values()) > 1e-3
    for name, gradient in expected.items():
        assert torch.allclose(ends[0][name] - ends[1][name], gradient, atol=2e-6), name
    [nll] = [row["rehearsal_nll"] for row in logs if "rehearsal_nll" in row]
    assert nll == pytest.approx(sum(losses).item() / 2, rel=1e-4)


@needs_trl
def test_where_the_lines_go_in_trl_s_ppo_trainer():
    if importlib.util.find_spec("trl.experimental.ppo") is None:
        pytest.skip("this TRL has no PPOTrainer; 1.12 is the last")
    from trl.experimental import ppo

    source = inspect.getsource(sys.modules[ppo.PPOTrainer.__module__])
    assert source.count("accelerator.backward(loss)") == 1 and "def compute_loss" not in source
