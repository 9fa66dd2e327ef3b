"""nano.py: its size and imports, its sampler, and ppo_sr.py and baselines/ppo_max.py against it.

nano.py shares no function with them. All run on the same responses, and give the same losses and
weights. What the others can do beside it stands in Beyond, by hand, as a few lines around its
functions.
"""

import ast
import contextlib
import copy
import io
import json
import math
import statistics
import sys
import tokenize
from dataclasses import MISSING, fields
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import nano
import ppo_sr
from baselines import ppo_max
from miniature import world
from tests.conftest import SENTENCE, gpt2_config

SOURCE = Path(nano.__file__).read_text(encoding="utf-8")
MODULES = [ppo_sr, ppo_max]
SMALL = {"n_embd": 16, "n_layer": 1, "n_positions": 64}
BATCH = 8

pytestmark = pytest.mark.usefixtures("one_thread")


# --- to read, and to copy ------------------------------------------------------------------------


def test_it_needs_torch_and_transformers_alone():
    nodes = list(ast.walk(ast.parse(SOURCE)))
    names = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module for n in nodes if isinstance(n, ast.ImportFrom)}
    packages = {name.split(".")[0] for name in names}
    assert packages - set(sys.stdlib_module_names) == {"torch", "transformers"}


def test_it_has_at_most_11_kb_in_lines_of_100_characters():
    assert len(SOURCE.encode()) <= 11 * 1024
    assert max(map(len, SOURCE.splitlines())) <= 100


def test_about_every_third_line_says_why():
    comments, code = set(), set()
    blank = tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER
    for token in tokenize.generate_tokens(io.StringIO(SOURCE).readline):
        first, last = token.start[0], token.end[0]
        if token.type == tokenize.COMMENT:
            comments.add(first)
        elif token.type not in blank and not token.string.startswith('"""'):
            code.update(range(first, last + 1))
    assert len(comments) / len(code) > 0.3


def test_its_equations_are_tagged_and_eq_9_has_a_line_of_its_own():
    lines = [line.strip() for line in SOURCE.splitlines()]
    assert "loss = policy_loss + rehearsal_coef * rehearsal_nll  # [Eq. 9]" in lines
    assert any(line.startswith('"""[Eq. 2]  r(x, y) - beta log(') for line in lines)


def test_the_drawing_of_indices():
    """x = <bos> name the capital, y = it is rome <eos>, beside a text that is one token longer."""
    tokens, in_response = nano.pad([([10, 11, 12, 13], [14, 15, 16, 17]), ([1, 2], [3] * 7)])
    drawn = [line.split()[1:] for line in nano.pad.__doc__.splitlines() if "in_resp" in line][1]
    assert in_response[0].tolist() == [word == "yes" for word in drawn]
    assert tokens.shape == (2, 9) and in_response.shape == (2, 8)
    assert tokens[0, :8].tolist() == list(range(10, 18))
    assert tokens[:, 1:][in_response].tolist() == [14, 15, 16, 17, *[3] * 7]


# --- its parts ------------------------------------------------------------------------------------


def model_of(tokenizer, seed=0):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(gpt2_config(tokenizer, **SMALL)).eval()


def test_the_sampler_draws_from_the_model_s_own_distribution(tokenizer, monkeypatch):
    """Prompts of unequal length: each token is drawn from what the model makes of the text so far,
    read alone and without a cache."""
    model, seen, original = model_of(tokenizer), [], torch.Tensor.multinomial

    def drawing(probabilities, count):
        seen.append(probabilities)
        return original(probabilities, count)

    monkeypatch.setattr(torch.Tensor, "multinomial", drawing)
    prompts, eos = [[5], [7, 8, 9, 10], [11, 12]], tokenizer.eos_token_id
    pairs = nano.sample(model, prompts, 6, eos)
    assert [x for x, _ in pairs] == prompts
    for i, (x, y) in enumerate(pairs):
        assert len(y) == 6 or y.index(eos) == len(y) - 1
        for t in range(len(y)):
            alone = model(torch.tensor([x + y[:t]])).logits[0, -1].softmax(-1)
            drawn_from = seen[len(x) + t - min(map(len, prompts))][i]
            assert torch.allclose(drawn_from, alone, atol=1e-5)


def test_greedy_answers_are_those_of_transformers(tokenizer, monkeypatch):
    model, eos = model_of(tokenizer), tokenizer.eos_token_id
    monkeypatch.setattr(torch.Tensor, "multinomial", lambda p, _: p.argmax(-1, keepdim=True))
    prompts = [[5, 6], [7, 8, 9, 10, 11], [12, 13, 14]]
    for x, y in nano.sample(model, prompts, 8, eos):
        ids = torch.tensor([x])
        alone = model.generate(ids, attention_mask=ids > 0, max_new_tokens=8, do_sample=False)
        assert y == alone[0, len(x) :].tolist()


def test_a_response_ends_at_its_eos_or_at_its_limit(tokenizer, monkeypatch):
    """Drawn: 20, 21, 22 ... in every row; <eos> is made 23."""
    tokens = iter(range(20, 99))
    monkeypatch.setattr(torch.Tensor, "multinomial", lambda p, _: torch.full((len(p), 1), next(tokens)))
    pairs = nano.sample(model_of(tokenizer), [[5], [6, 7], [8] * 6], 3, 23)
    assert pairs == [([5], [20, 21, 22]), ([6, 7], [21, 22, 23]), ([8] * 6, [25, 26, 27])]


def test_what_stands_behind_a_text_changes_nothing_in_it(tokenizer):
    """Log-probs, values and score of a padded batch are those of each text read alone."""
    policy, (first, second) = model_of(tokenizer), (([5, 6, 7], [8, 9]), ([3], [4] * 9))
    scorer = AutoModelForSequenceClassification.from_config(gpt2_config(tokenizer, **SMALL, num_labels=1)).eval()
    tokens, in_response = nano.pad([first, second])
    alone = torch.tensor([first[0] + first[1]])
    log_p = policy(alone).logits[0].log_softmax(-1)
    expected = [log_p[2, 8].item(), log_p[3, 9].item()]
    found = nano.token_logprobs(policy, tokens)[0][in_response[0]]
    assert found.tolist() == pytest.approx(expected, abs=1e-5)
    found = nano.token_values(scorer, tokens)[0, :5]
    assert torch.allclose(found, nano.token_values(scorer, alone)[0], atol=1e-5)
    assert found[4].item() == pytest.approx(scorer(alone).logits.item(), abs=1e-5)


def test_prompts_go_through_the_chat_template_where_there_is_one(tokenizer, tmp_path):
    rows = [{"prompt": "the quick fox", "response": "jumps"}, {"prompt": "my vow"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plain, templated = copy.deepcopy(tokenizer), copy.deepcopy(tokenizer)
    templated.chat_template = "{% for m in messages %}over {{ m.content }} the {% endfor %}lazy"
    plain.chat_template = None
    for one, first in ((plain, "the quick fox"), (templated, "over the quick fox the lazy")):
        pairs = nano.load_pairs(tmp_path / "rows.jsonl", one)
        assert one.decode(pairs[0][0]) == first and one.decode(pairs[0][1]) == "jumps<eos>"
        assert len(pairs) == 2


def test_gae_by_hand(monkeypatch):
    monkeypatch.setattr(nano, "DISCOUNT", 0.5)
    monkeypatch.setattr(nano, "LAMBDA", 0.5)
    rewards = torch.tensor([[0.0, 1.0, 2.0], [1.0, 3.0, 0.0]])
    values = torch.tensor([[1.0, 2.0, 1.0], [2.0, 1.0, 0.0]])
    # row 1: d = 0 + 0.5*2 - 1 = 0;  1 + 0.5*1 - 2 = -0.5;  2 - 1 = 1
    #        A_3 = 1;  A_2 = -0.5 + 0.25*1 = -0.25;  A_1 = 0 + 0.25*-0.25 = -0.0625
    # row 2: d = 1 + 0.5*1 - 2 = -0.5;  3 - 1 = 2;     A_2 = 2;  A_1 = -0.5 + 0.25*2 = 0
    advantages, returns = nano.generalized_advantages(rewards, values)
    assert advantages.tolist() == [[-0.0625, -0.25, 1.0], [0.0, 2.0, 0.0]]
    assert returns.tolist() == [[0.9375, 1.75, 2.0], [2.0, 3.0, 0.0]]


def test_the_pessimist_by_hand():
    mask = torch.ones(5, dtype=torch.bool)
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1])
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, 2.0])
    logprobs = ratio.log().requires_grad_()
    nano.clipped_policy_loss(logprobs, torch.zeros(5), advantages, mask).backward()
    # ratio A, where no gain is clipped: 1.5 A -1, 0.5 A +1, 1.1 A +2
    assert (5 * logprobs.grad).tolist() == pytest.approx([0.0, 1.5, -0.5, 0.0, -2.2])
    values = torch.tensor([2.0, 0.0, 2.0, 0.0, 1.1], requires_grad=True)
    returns = torch.tensor([3.0, -1.0, 0.0, 2.0, 2.0])
    nano.clipped_value_loss(values, torch.ones(5), returns, mask).backward()
    assert (5 * values.grad).tolist() == pytest.approx([0.0, 0.0, 2.0, -2.0, -0.9])


# --- ppo_sr.py and ppo_max.py on fixed responses --------------------------------------------------


@pytest.fixture
def float64(monkeypatch):
    """Everything in double precision, casts to float32 included. A parameter whose gradient is 0
    but for rounding (the biases of the attention's keys) moves under Adam by the sign of the
    rounding error, so that two correct programs in float32 part by as much as the learning rate."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    for auto in (AutoModelForCausalLM, AutoModelForSequenceClassification):
        load = auto.from_pretrained

        def loading(*args, load=load, **options):
            return load(*args, **options | {"dtype": torch.float64})

        monkeypatch.setattr(auto, "from_pretrained", loading)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def write_folder(folder, tokenizer, rows):
    """Policy (with dropout in its config, to be kept off), scorer, prompts, and rows to replay."""
    dropout = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
    torch.manual_seed(1)
    config = gpt2_config(tokenizer, **SMALL, **dropout)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "policy")
    config = gpt2_config(tokenizer, **SMALL, num_labels=1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder / "scorer")
    for name in ("policy", "scorer"):
        tokenizer.save_pretrained(folder / name)
    files = {"prompts": rows, "rehearsal": rows[:10], "ptx": rows[3:], "eight": rows[-8:]}
    for name, lines in files.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The toy world, whose tokenizer has a chat template: a prompt of each of its tasks and one."""
    prompts = [world.prompts(task, "train")[3] for task in world.TASKS]
    prompts.append(world.prompts("greet", "train")[5])
    rows = [{"prompt": x, "response": world.reference(x)} for x in prompts]
    return write_folder(tmp_path_factory.mktemp("toy"), world.build_tokenizer(), rows)


@pytest.fixture(scope="module")
def plain_folder(tokenizer, tmp_path_factory):
    """A tokenizer without a template."""
    words = SENTENCE.split()
    rows = [{"prompt": " ".join(words[i : i + 1 + i % 3])} for i in range(13)]
    rows = [row | {"response": " ".join(words[-1 - i % 4 :])} for i, row in enumerate(rows)]
    return write_folder(tmp_path_factory.mktemp("plain"), tokenizer, rows)


def flags_of(case, folder, module=ppo_sr):
    """A case on ppo_sr.py's defaults: of ppo_max.py what it alone has is off."""
    flags = {f.name: f.default for f in fields(ppo_sr.Args) if f.default is not MISSING}
    flags |= {"learning_rate": 3e-3, "critic_learning_rate": 5e-3, "kl_coef": 0.2}
    flags |= {"num_mini_batches": 2, "global_batch_size": BATCH, "rehearsal_batch_size": BATCH}
    # batch sizes that divide neither 4 nor 8
    flags |= {"per_device_train_batch_size": 3, "per_device_eval_batch_size": 3}
    flags |= {"total_steps": 3, "response_length": 7, "max_length": 64}
    flags |= {"reward_model_path": str(folder / "scorer")}
    if module is ppo_max:
        flags |= {"whiten_mini_batches": False, "score_clip": math.inf}
    policy, prompts = str(folder / "policy"), str(folder / "prompts.jsonl")
    names = {name for name in case if name.endswith("dataset_name")}
    case = case | {name: str(folder / case[name]) for name in names}
    return module.Args(policy, prompts, "", **flags | case)


def run(args, out, main=ppo_sr.main):
    """The script on fixed responses -> its PPO, metrics, and what it drew."""
    args.output_dir = str(out)
    found = SimpleNamespace(prompts=[], responses=[], permutations=[], streams=[])
    set_up, generate, endless, randperm = (
        ppo_sr.PPO.__init__, ppo_sr.generate, ppo_sr.endless, torch.randperm
    )  # fmt: skip

    def setting_up(self, args):
        set_up(self, args)
        found.ppo, scores = self, self.read_scorer
        self.read_scorer = lambda *batch: scores(*batch).double()

    def answering(model, tokenizer, prompts, *how):
        if how[-1]:  # the check before step 1, which compares what was drawn with the model
            return generate(model, tokenizer, prompts, *how)
        draw = torch.Generator().manual_seed(len(found.prompts))
        found.prompts.append(prompts)
        found.responses.append([])
        for i in range(len(prompts)):
            length = 1 + (3 * i + len(found.prompts)) % 7
            y = torch.randint(3, len(tokenizer), (length,), generator=draw).tolist()
            found.responses[-1].append([*y[:-1], tokenizer.eos_token_id] if i % 3 else y)
        return found.responses[-1]

    def drawing(items, seed, skip):
        drawn = []
        found.streams.append((items, drawn))
        for item in endless(items, seed, skip):
            drawn.append(item)
            yield item

    def permuting(count, **options):
        order = randperm(count, **options)
        if not options:
            found.permutations.append(order)
        return order

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo_sr.PPO, "__init__", setting_up)
        patch.setattr(ppo_sr, "generate", answering)
        for place in MODULES:
            if hasattr(place, "endless"):
                patch.setattr(place, "endless", drawing)
        patch.setattr(torch, "randperm", permuting)
        main(args)
    found.drawn = {}
    for name in ("rehearsal", "ptx"):
        items = getattr(found.ppo, name, None)
        found.drawn[name] = next((d for i, d in found.streams if items and i is items), [])
    lines = (Path(out) / "metrics.jsonl").read_text().splitlines()
    found.metrics = [json.loads(line) for line in lines][1:]
    return found


def test_a_file_of_too_few_prompts_is_named_in_one_line(policy_folder, tmp_path):
    for name in ("prompts", "answers"):
        (tmp_path / f"{name}.jsonl").write_text('{"prompt": "the fox", "response": "dog"}\n' * 3, encoding="utf-8")
    files = {"prompts_path": tmp_path / "prompts.jsonl", "rehearsal_path": tmp_path / "answers.jsonl"}
    with pytest.raises(SystemExit, match=r"prompts\.jsonl: fewer rows than --batch_size$"):
        nano.main(policy_path=policy_folder, scorer_path="none", **files, batch_size=4)


# --- nano.py on the same --------------------------------------------------------------------------


class Beyond:
    """What the flags ask for beyond nano.py's, around its functions; and the metrics it does not
    print. Numbers of one update are kept in self.update, of one step in self.steps."""

    kl_weights = 1.0  # factors on beta, (batch, 1)

    def __init__(self, args, run):
        self.args, self.ran = args, run
        self.steps, self.averages, self.updates = [], [], 0
        self.rehearsal, self.ptx = iter(run.drawn["rehearsal"]), iter(run.drawn["ptx"])
        parts = [order.split(BATCH // args.num_mini_batches) for order in run.permutations]
        self.mini_batches = [part for order in parts for part in order]
        names = "token_logprobs token_rewards generalized_advantages clipped_policy_loss"
        self.names = [*names.split(), "clipped_value_loss"]
        self.real = {name: getattr(nano, name) for name in self.names}

    def get(self, name, default):
        return getattr(self.args, name, default)

    @property
    def warming_up(self):
        return len(self.steps) <= self.args.critic_warmup_steps

    # 1 sample
    def random(self):
        def sample(prompts, count):
            chosen = self.ran.prompts[len(self.steps)]
            assert len(chosen) == count and all(x in prompts for x in chosen)
            return chosen

        def choices(pairs, k):
            drawn = pairs[:k] if self.warming_up else list(islice(self.rehearsal, k)) or pairs[:k]
            assert all(pair in pairs for pair in drawn)
            with torch.no_grad():
                tokens, kept = nano.pad(drawn)
                nll = -self.token_logprobs(self.policy, tokens)[kept].mean()
            self.note("loss/rehearsal_nll", nll * self.per_row)
            return drawn

        return SimpleNamespace(seed=lambda seed: None, sample=sample, choices=choices)

    def sample(self, policy, prompts, response_length, eos):
        self.pairs = list(zip(prompts, self.ran.responses[len(self.steps)], strict=True))
        self.finished = torch.tensor([y[-1] == eos for _, y in self.pairs])
        _, self.in_response = nano.pad(self.pairs)
        self.entropies = []
        return self.pairs

    # 2 score
    def token_logprobs(self, policy, tokens):
        log_p = (policy(tokens[:, :-1]).logits / self.args.temperature).log_softmax(-1)
        self.policy = policy
        self.entropies.append(-(log_p.exp() * log_p).sum(-1))
        if self.args.temperature == 1:
            return self.real["token_logprobs"](policy, tokens)
        return log_p.gather(-1, tokens[:, 1:, None]).squeeze(-1)

    def deepcopy(self, model):
        """nano.py copies the policy and the scorer; V starts on the scale of the scores."""
        model = copy.deepcopy(model)
        if hasattr(model, "score"):
            model.score.weight.data *= self.args.score_scale
        return model

    # 3 advantages
    def ppo_scores(self, raw):
        """Floats: scaled, normalised by all batches so far, cut, less the penalty without <eos>."""
        args, scores = self.args, [score * self.args.score_scale for score in raw]
        if args.moving_average_decay is not None:
            squares = [score**2 for score in scores]
            self.averages.append((statistics.fmean(scores), statistics.fmean(squares)))
            ages = reversed(range(len(self.averages)))
            weights = [args.moving_average_decay**age for age in ages]
            total = sum(weights)
            mean = sum(w * m for w, (m, _) in zip(weights, self.averages, strict=True)) / total
            square = sum(w * s for w, (_, s) in zip(weights, self.averages, strict=True)) / total
            scores = [(score - mean) / (square - mean**2) ** 0.5 for score in scores]
        clip = self.get("score_clip", math.inf)
        scores = [min(max(score, -clip), clip) for score in scores]
        penalty = args.missing_eos_penalty * statistics.stdev(scores)
        return [s if end else s - penalty for s, end in zip(scores, self.finished, strict=True)]

    def token_rewards(self, scores, logprobs, ref_logprobs, last, kl_coef):
        raw = scores.to(torch.float32).double()  # as ppo_sr.py keeps them
        scores = torch.tensor(self.ppo_scores(raw.tolist()), dtype=logprobs.dtype)
        in_loss = self.get("kl_estimator", "k1") != "k1"
        kl_coef = 0.0 if in_loss else kl_coef * self.kl_weights
        policies, self.ref_logprobs = (logprobs, ref_logprobs), ref_logprobs
        rewards = self.real["token_rewards"](scores, *policies, last, kl_coef)
        self.steps.append({})
        for name, value in {
            "objective/scores": raw.mean(),
            "objective/kl": (logprobs.sum() - ref_logprobs.sum()) / BATCH,
            "objective/rlhf_reward": rewards.sum() / BATCH,
            "objective/entropy": self.entropies[0][self.in_response].mean(),
            "policy/perplexity": (-logprobs.sum() / self.in_response.sum()).exp(),
            "val/response_length": statistics.fmean(len(y) for _, y in self.pairs),
        }.items():
            self.note(name, value)
        return rewards

    def generalized_advantages(self, rewards, values):
        nano.DISCOUNT, nano.LAMBDA = self.args.gamma, self.args.lam
        self.advantages, returns = self.real["generalized_advantages"](rewards, values)
        kept = returns[self.in_response]
        error = (kept - values[self.in_response]).var()
        self.note("val/explained_variance", 1 - error / kept.var())
        return self.advantages, returns

    # 4 update
    def clipped_policy_loss(self, logprobs, old_logprobs, advantages, in_response):
        args, chosen = self.args, torch.zeros(BATCH, 1, dtype=torch.bool)
        chosen[self.mini_batches[self.updates]] = True
        kept = self.kept = in_response & chosen
        if not args.whiten_advantages:
            advantages = self.advantages
        if self.get("whiten_mini_batches", False):
            mean, std = advantages[kept].mean(), advantages[kept].std()
            advantages = (advantages - mean) / (std + 1e-8)
        clip = self.get("advantage_clip", math.inf)
        advantages = torch.where(advantages.abs() > clip, clip * advantages.sign(), advantages)
        nano.CLIP = args.cliprange
        loss = self.real["clipped_policy_loss"](logprobs, old_logprobs, advantages, kept)
        log_ratio = (logprobs - old_logprobs)[kept]
        outside = (log_ratio.exp() < 1 - args.cliprange) | (log_ratio.exp() > 1 + args.cliprange)
        self.note("loss/policy_avg", loss)
        self.note("policy/approxkl_avg", (log_ratio**2).mean() / 2)
        self.note("policy/clipfrac_avg", outside.double().mean())
        self.note("val/ratio", log_ratio.exp().mean())
        self.updates += 1
        return loss + self.regularizer(logprobs[kept])

    def regularizer(self, logprobs):
        """What else ppo_max.py's policy minimises: beta times k2 or k3, less the entropies, both
        means over the tokens of the mini-batch, and the NLL of demonstrations."""
        loss, estimator = 0.0, self.get("kl_estimator", "k1")
        entropy, policy = self.entropies[-1][self.kept], self.policy
        if estimator != "k1":
            ratio = self.ref_logprobs[self.kept].exp() / logprobs.exp()
            each = ratio.log() ** 2 / 2 if estimator == "k2" else ratio - 1 - ratio.log()
            kl_loss = self.args.kl_coef * each.mean()
            self.note("loss/kl_avg", kl_loss)
            loss = loss + kl_loss
        if self.get("entropy_coef", 0):
            entropy_loss = -self.args.entropy_coef * entropy.mean()
            self.note("loss/entropy_avg", entropy_loss)
            loss = loss + entropy_loss
        if self.get("ptx_dataset_name", None) and not self.warming_up:
            tokens, kept = nano.pad(list(islice(self.ptx, self.args.ptx_batch_size)))
            nll = -self.token_logprobs(policy, tokens)[kept].mean()
            self.note("loss/ptx_nll", nll)
            loss = loss + self.args.ptx_coef * nll
        return loss

    def clipped_value_loss(self, values, old_values, returns, in_response):
        nano.CLIP = self.args.cliprange_value
        loss = self.real["clipped_value_loss"](values, old_values, returns, self.kept)
        self.note("loss/value_avg", loss)
        return self.get("vf_coef", 1.0) * loss

    def adamw(self):
        """One rate for each model; during the warm-up the policy's parameters have no gradient."""
        beyond, args = self, self.args

        class Optimizer(torch.optim.AdamW):
            def __init__(self, parameters, rate, betas, weight_decay):
                count = len(list(beyond.ran.ppo.policy.module.parameters()))
                self.of_policy = parameters[:count]
                groups = [{"params": self.of_policy, "lr": args.learning_rate}]
                groups += [{"params": parameters[count:], "lr": args.critic_learning_rate}]
                super().__init__(groups, rate, betas, weight_decay=weight_decay)

            def step(self):
                for parameter in self.of_policy if beyond.warming_up else ():
                    parameter.grad = None
                super().step()

        return Optimizer

    # --- the whole
    def note(self, name, value):
        self.steps[-1].setdefault(name, []).append(float(torch.as_tensor(value).detach()))

    def run(self, folder, rehearsal):
        args, clip_norm = self.args, torch.nn.utils.clip_grad_norm_
        trained = list(islice(self.ran.drawn["rehearsal"], BATCH))
        self.per_row = 1.0  # Eq. 9 as printed: NLL a row, and not a token; the same rows each time
        if args.rehearsal_reduction == "sum":
            self.per_row = sum(len(y) for _, y in trained) / len(trained)
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
            for name in (*self.names, "sample"):
                patch.setattr(nano, name, getattr(self, name))
            for name in ("CLIP", "DISCOUNT", "LAMBDA"):  # to be restored
                patch.setattr(nano, name, getattr(nano, name))
            patch.setattr(nano, "random", self.random())
            patch.setattr(nano, "copy", SimpleNamespace(deepcopy=self.deepcopy))
            patch.setattr(torch.optim, "AdamW", self.adamw())
            norm = args.max_grad_norm
            patch.setattr(torch.nn.utils, "clip_grad_norm_", lambda p, _: clip_norm(p, norm))
            history, policy, critic = nano.main(
                policy_path=folder / "policy",
                scorer_path=folder / "scorer",
                prompts_path=folder / "prompts.jsonl",
                rehearsal_path=folder / rehearsal,
                output_path=Path(args.output_dir) / "nano",
                steps=args.total_steps,
                batch_size=BATCH,
                epochs=args.num_ppo_epochs * args.num_mini_batches,
                learning_rate=args.learning_rate,
                kl_coef=args.kl_coef,
                rehearsal_coef=args.rehearsal_coef * self.per_row if trained else 0.0,
                response_length=args.response_length,
            )
        return SimpleNamespace(history=history, policy=policy, critic=critic, steps=self.steps)


def worst(one, other):
    """Largest difference of two models' parameters, by name."""
    other = dict(other.named_parameters())
    return {name: (p - other[name]).abs().max().item() for name, p in one.named_parameters()}


def differences(ran, small):
    """{what: largest difference} of the script's run and nano.py's."""
    found = {}
    for step, (row, expected) in enumerate(zip(ran.metrics, small.steps, strict=True), 1):
        expected = {name: statistics.fmean(values) for name, values in expected.items()}
        for name, value in expected.items():
            if name in row:  # relative where it is large, as a perplexity is
                found[f"step {step}, {name}"] = abs(row[name] - value) / max(1, abs(value))
        wanted = {name for name in row if name.startswith("loss/")}
        assert wanted <= expected.keys(), (wanted, expected)
        printed = small.history[step - 1]
        for name, metric in (("kl", "objective/kl"), ("length", "val/response_length")):
            found[f"step {step}, nano.py's {name}"] = abs(printed[name] - row[metric])
    found["policy"] = max(worst(ran.ppo.policy.module, small.policy).values())
    found["critic"] = max(worst(ran.ppo.critic.module.model, small.critic).values())
    return found


def small_run(args, ran, folder):
    rehearsal = Path(args.rehearsal_dataset_name or "rehearsal.jsonl").name
    return Beyond(args, ran).run(folder, rehearsal)


def compare(case, module, folder, out, tolerance):
    args = flags_of(case, folder, module)
    ran = run(args, out, module.main)
    small = small_run(args, ran, folder)
    found = differences(ran, small)
    assert {name: value for name, value in found.items() if not value < tolerance} == {}
    return ran, small


REHEARSAL = {"rehearsal_coef": 0.3, "rehearsal_dataset_name": "rehearsal.jsonl"}
SUM = {"rehearsal_coef": 0.3, "rehearsal_dataset_name": "eight.jsonl", "rehearsal_reduction": "sum"}
CASES = {
    "plain": {},
    "rehearsal": REHEARSAL,
    "rehearsal, sum": SUM,
    "moving average": {"moving_average_decay": 0.99},
    "historical mean and std": {"moving_average_decay": 1.0},
    "missing <eos>": {"missing_eos_penalty": 1.5},
    "score scale": {"score_scale": 0.25},
    "no whitening": {"whiten_advantages": False},
    "critic first": REHEARSAL | {"critic_warmup_steps": 2, "total_steps": 4},
    "temperature": {"temperature": 0.7},
    "gamma, lambda": {"gamma": 0.9, "lam": 0.5},
    "one mini-batch": REHEARSAL | {"num_mini_batches": 1, "per_device_train_batch_size": 100},
    "gradient clip": {"max_grad_norm": 0.05},
    "all at once": SUM
    | {"moving_average_decay": 0.9, "score_scale": 0.5, "missing_eos_penalty": 0.5}
    | {"critic_warmup_steps": 1, "gamma": 0.95, "temperature": 1.3}
    | {"cliprange": 0.1, "cliprange_value": 0.05},
}


@pytest.mark.parametrize("case", CASES)
def test_ppo_equals_nano(case, folder, tmp_path, float64):
    """3 steps of 2 epochs x 2 mini-batches: KL, Eq. 2, GAE, losses, Eq. 9 and weights to 1e-9."""
    ran, small = compare(CASES[case], ppo_sr, folder, tmp_path, 1e-9)
    start = AutoModelForCausalLM.from_pretrained(folder / "policy")
    assert max(worst(small.policy, start).values()) > 1e-3  # the weights did move,
    assert ran.metrics[-1]["policy/clipfrac_avg"] > 0.01  # far enough for ratios to be clipped,
    assert max(abs(row["objective/kl"]) for row in ran.metrics) > 1e-3  # and for KL to cost


def test_ppo_equals_nano_without_a_chat_template(plain_folder, tmp_path, float64):
    compare(REHEARSAL, ppo_sr, plain_folder, tmp_path, 1e-9)


def test_ppo_equals_nano_with_a_beta_for_each_prompt(folder, tmp_path, float64):
    weights = 1.0 + torch.arange(BATCH)[:, None] % 3

    class Weighted(ppo_sr.PPO):
        def kl_coef(self, rows):
            return self.args.kl_coef * weights

    args = flags_of({}, folder)
    ran = run(args, tmp_path, lambda args: ppo_sr.main(args, Weighted))
    beyond = Beyond(args, ran)
    beyond.kl_weights = weights
    assert max(differences(ran, beyond.run(folder, "rehearsal.jsonl")).values()) < 1e-9


def test_ppo_equals_nano_in_float32(folder, tmp_path):
    """As they run: at a rate where 12 optimiser steps move the weights by 1e-4 they agree to 1e-6,
    but for the biases of keys, whose gradient is rounding alone."""
    rates = {"learning_rate": 1e-5, "critic_learning_rate": 1e-5}
    args = flags_of(REHEARSAL | rates, folder)
    ran = run(args, tmp_path)
    small = small_run(args, ran, folder)
    start = AutoModelForCausalLM.from_pretrained(folder / "policy")
    for model in (ran.ppo.policy.module, ran.ppo.critic.module.model, small.policy, small.critic):
        bias = next(p for name, p in model.named_parameters() if name.endswith("c_attn.bias"))
        bias.data[SMALL["n_embd"] : 2 * SMALL["n_embd"]] = 0
    found = differences(ran, small)
    assert max(found.pop("policy"), found.pop("critic")) < 1e-6
    assert max(found.values()) < 1e-5
    moved = worst(small.policy, start)
    assert max(value for name, value in moved.items() if "bias" not in name) > 5e-5


OFF = {"whiten_advantages": False, "max_grad_norm": math.inf, "kl_coef": 0.0}
OFF |= {"cliprange": math.inf, "cliprange_value": math.inf}
PTX = {"ptx_dataset_name": "ptx.jsonl", "ptx_batch_size": 5, "ptx_coef": 0.5}
CASES_OF_PPO_MAX = {
    "every stabiliser off": OFF,
    "nothing of its own": SUM | {"critic_warmup_steps": 1},
    "score clip": {"score_clip": 0.7},
    "value weight": {"vf_coef": 0.1},
    "mini-batches whitened": {"whiten_mini_batches": True, "whiten_advantages": False},
    "advantage clip": {"whiten_mini_batches": True, "advantage_clip": 0.5},
    "advantage clip without whitening": {"whiten_advantages": False, "advantage_clip": 0.3},
    "k2": {"kl_estimator": "k2"},
    "k3": {"kl_estimator": "k3"},
    "k3 alone": OFF | {"kl_estimator": "k3", "kl_coef": 1.0},
    "entropy": {"entropy_coef": 0.3, "temperature": 0.7},
    "ptx": PTX,
    "ptx beside rehearsal": SUM | PTX,
    "all at once": PTX
    | {"kl_estimator": "k2", "entropy_coef": 0.1, "whiten_mini_batches": True}
    | {"advantage_clip": 1.0, "critic_warmup_steps": 1, "moving_average_decay": 1.0}
    | {"score_clip": 1.5, "whiten_advantages": False, "ptx_batch_size": 3, "vf_coef": 0.5},
}


@pytest.mark.parametrize("case", CASES_OF_PPO_MAX)
def test_ppo_max_equals_nano_and_its_switch(case, folder, tmp_path, float64):
    ran, small = compare(CASES_OF_PPO_MAX[case], ppo_max, folder, tmp_path, 1e-9)
    start = AutoModelForCausalLM.from_pretrained(folder / "policy")
    assert max(worst(small.policy, start).values()) > 1e-3
    assert ("loss/ptx_nll" in ran.metrics[-1]) == ("ptx" in case or case == "all at once")


# --- a comparison that would notice ---------------------------------------------------------------


def late(real):
    """GAE with the value of this column in the place of the next one's."""

    def wrong(rewards, values):
        shifted = torch.cat([values[:, :1], values[:, :-1]], 1)
        advantages, _ = real(rewards, shifted)
        return advantages, advantages + values

    return wrong


def early(real):
    """The mask one column early: the last prompt token is trained, <eos> is not."""

    def wrong(pairs):
        tokens, in_response = real(pairs)
        return tokens, in_response.roll(-1, 1)

    return wrong


def no_clip(logprobs, old_logprobs, advantages, in_response):
    return (-(logprobs - old_logprobs).exp() * advantages)[in_response].mean()


def no_value_clip(values, old_values, returns, in_response):
    return ((values - returns) ** 2)[in_response].mean() / 2


def optimist(logprobs, old_logprobs, advantages, in_response):
    ratio = (logprobs - old_logprobs).exp()
    losses = torch.min(-ratio * advantages, -ratio.clamp(0.8, 1.2) * advantages)
    return losses[in_response].mean()


def in_place_of(wrong):
    return lambda real: wrong


NANO_MUTANTS = {  # the function, and the wrong one of the real one
    "sign of KL": ("token_rewards", lambda real: lambda *a: real(*a[:-1], -a[-1])),
    "no KL": ("token_rewards", lambda real: lambda *a: real(*a[:-1], 0.0)),
    "score a token early": ("token_rewards", lambda real: lambda *a: real(*a[:3], a[3] - 1, a[4])),
    "GAE off by one": ("generalized_advantages", late),
    "mask off by one": ("pad", early),
    "values a token late": ("token_values", lambda real: lambda *a: real(*a).roll(-1, 1)),
    "no ratio clip": ("clipped_policy_loss", in_place_of(no_clip)),
    "optimist": ("clipped_policy_loss", in_place_of(optimist)),
    "no value clip": ("clipped_value_loss", in_place_of(no_value_clip)),
    "no half": ("clipped_value_loss", lambda real: lambda *a: 2 * real(*a)),
}
PPO_MUTANTS = {
    "sign of KL": ("token_rewards", lambda real: lambda *a: real(*a[:-1], -a[-1])),
    "no whitening": ("whiten", in_place_of(lambda values, mask: values)),
    "lambda": ("generalized_advantages", lambda real: lambda *a: real(*a[:-1], 0.9 * a[-1])),
    "no ratio clip": ("clipped_policy_loss", in_place_of(lambda ratio, a, _: -ratio * a)),
    "sign of Eq. 9": ("rehearsal_loss", lambda real: lambda *a: -real(*a)),
}


def show(found):
    """A fault must part losses and weights by a thousand times the tolerance, and more."""
    losses = [value for name, value in found.items() if "loss/" in name or "rlhf_reward" in name]
    return max(found["policy"], found["critic"]) > 1e-6 and max(losses) > 1e-6


def test_faults_of_nano_would_show(folder, tmp_path, float64):
    args = flags_of(REHEARSAL, folder)
    ran = run(args, tmp_path)
    assert max(differences(ran, small_run(args, ran, folder)).values()) < 1e-9
    for mutant, (name, change) in NANO_MUTANTS.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(nano, name, change(getattr(nano, name)))
            assert show(differences(ran, small_run(args, ran, folder))), mutant


@pytest.mark.parametrize("mutant", PPO_MUTANTS)
def test_faults_of_ppo_sr_would_show(mutant, folder, tmp_path, float64, monkeypatch):
    name, change = PPO_MUTANTS[mutant]
    args = flags_of(REHEARSAL, folder)
    monkeypatch.setattr(ppo_sr, name, change(getattr(ppo_sr, name)))
    ran = run(args, tmp_path)
    assert show(differences(ran, small_run(args, ran, folder)))
