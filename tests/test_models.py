"""Scorers, log-probs, sampling and the critic on small random models of eleven families, against unpadded single passes.

Weights are drawn with a std of 0.2, ten times the usual one: at 0.02 every score is near 0 and would meet any tolerance.
"""

import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BloomConfig,
    DebertaV2Config,
    FalconH1Config,
    GemmaConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    ModernBertDecoderConfig,
    OPTConfig,
    Qwen2Config,
    RecurrentGemmaConfig,
    RobertaConfig,
)
from transformers.models.hyperclovax.configuration_hyperclovax import HyperCLOVAXConfig

import utils

from ppo_sr import Critic
from tests.conftest import gpt2_config
from utils import InputError, Scorer, encode_pair, generate, load_policy, load_scorer, pad
from utils import response_logprobs, save_model, score_texts, write_json

PAD, EOS, VOCAB = 0, 1, 96
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": VOCAB}
SPECIAL = {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": None, "initializer_range": 0.2}
WIDE = {"intermediate_size": 48, "max_position_embeddings": 128}
IDS = SimpleNamespace(chat_template=None, pad_token_id=PAD, eos_token_id=EOS)  # all that generate reads of a tokenizer

CAUSAL = {
    "gpt2": lambda: gpt2_config(IDS_WITH_LENGTH),
    "llama": lambda: LlamaConfig(**SIZES, **SPECIAL, **WIDE, num_key_value_heads=1),
    "qwen2": lambda: Qwen2Config(**SIZES, **SPECIAL, **WIDE, num_key_value_heads=1, tie_word_embeddings=True),
    "bloom": lambda: BloomConfig(hidden_size=32, n_layer=2, n_head=2, vocab_size=VOCAB, **SPECIAL),
    "gpt_neox": lambda: GPTNeoXConfig(**SIZES, **SPECIAL, **WIDE),
    "opt": lambda: OPTConfig(
        **SIZES, pad_token_id=PAD, eos_token_id=EOS, init_std=0.2, ffn_dim=48, word_embed_proj_dim=32
    ),
    "mistral": lambda: MistralConfig(**SIZES, **SPECIAL, **WIDE, num_key_value_heads=1),
    "gemma": lambda: GemmaConfig(**SIZES, **SPECIAL, **WIDE, num_key_value_heads=1, head_dim=16),
}
ENCODERS = {
    "bert": lambda: BertConfig(**SIZES, pad_token_id=PAD, initializer_range=0.2, **WIDE),
    "roberta": lambda: RobertaConfig(
        **SIZES, pad_token_id=PAD, bos_token_id=2, eos_token_id=3, initializer_range=0.2, type_vocab_size=1, **WIDE
    ),
    "deberta_v2": lambda: DebertaV2Config(
        **SIZES, pad_token_id=PAD, initializer_range=0.2, relative_attention=True, pos_att_type=["p2c", "c2p"], **WIDE
    ),
}


class _Ids(SimpleNamespace):
    def __len__(self):
        return VOCAB


IDS_WITH_LENGTH = _Ids(pad_token_id=PAD, eos_token_id=EOS)


def texts(seed=0, lengths=((5, 3), (2, 9), (11, 1), (1, 1), (7, 6))):
    """Ragged (prompt ids, response ids) of a causal LM, without padding or <eos>."""
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randint(2, VOCAB, (n,), generator=generator).tolist() for n in pair) for pair in lengths]


def make_scorer(config, expected_reward_head=True, num_labels=1):
    torch.manual_seed(0)
    config.num_labels = num_labels
    scorer = Scorer(AutoModelForSequenceClassification.from_config(config), expected_reward_head).eval()
    if expected_reward_head:
        torch.nn.init.normal_(scorer.e_head.weight, std=0.2)  # it starts at 0, which is constant
        torch.nn.init.constant_(scorer.e_head.bias, 0.3)
    return scorer


def make_policy(family):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CAUSAL[family]()).eval()
    model.generation_config = type(model.generation_config)(eos_token_id=EOS)  # as load_policy leaves it
    return model


def encoded(family, request):
    """(ids, prompt_len) of ragged texts in the family's own form."""
    if family in CAUSAL:
        return [(x + y, len(x)) for x, y in texts()]
    tokenizer = request.getfixturevalue("roberta_tokenizer" if family == "roberta" else "bert_tokenizer")
    words = [
        "the",
        "quick",
        "brown",
        "fox",
        "jumps",
        "over",
        "lazy",
        "dog",
        "while",
        "black",
        "quartz",
        "judges",
        "my",
        "vow",
    ]
    pairs = [(5, 3), (2, 9), (11, 1), (1, 1), (7, 6)]
    return [
        encode_pair(tokenizer, " ".join(words[:n]), " ".join(words[-m:]), 64, False, "here", encoder=True)[:2]
        for n, m in pairs
    ]


@torch.no_grad()
def score(scorer, rows, extra_padding=0):
    """(r, e) of rows in one batch, `extra_padding` columns wider than need be."""
    ids, mask = pad([ids for ids, _ in rows], PAD)
    ids = torch.nn.functional.pad(ids, (0, extra_padding), value=PAD)
    mask = torch.nn.functional.pad(mask, (0, extra_padding), value=False)
    return scorer(ids, mask, torch.tensor([n for _, n in rows]))


def save(scorer, folder, tokenizer):
    save_model(SimpleNamespace(module=scorer), folder, tokenizer)


def close(a, b, tolerance=1e-5):
    return torch.allclose(a, b, rtol=0, atol=tolerance)


# --- the scorer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*CAUSAL, *ENCODERS])
def test_scores_depend_neither_on_batch_nor_on_padding(family, request):
    scorer, rows = make_scorer((CAUSAL | ENCODERS)[family]()), encoded(family, request)
    alone = [torch.cat(values) for values in zip(*(score(scorer, [row]) for row in rows), strict=True)]
    assert min(alone[0].std(), alone[1].std()) > 0.02  # scores that are all alike would pass whatever the code does
    for together in (
        score(scorer, rows),
        score(scorer, rows, extra_padding=7),
        [v.flip(0) for v in score(scorer, rows[::-1])],
    ):
        assert close(together[0], alone[0]) and close(together[1], alone[1])
    short, long = score(scorer, rows[:2]), score(scorer, [rows[3], rows[2]])
    assert close(torch.cat([short[0], long[0]]), alone[0][[0, 1, 3, 2]])


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_a_forgotten_mask_would_be_noticed(family, request):
    scorer, rows = make_scorer((CAUSAL | ENCODERS)[family]()), encoded(family, request)
    lens = torch.tensor([n for _, n in rows])
    r, e = score(scorer, rows)
    with torch.no_grad():
        ids, mask = pad([ids for ids, _ in rows], PAD)
        assert not close(scorer(ids, torch.ones_like(mask), lens)[0], r, 0.01)
        assert not close(scorer(ids, mask, lens + 1)[1], e, 0.01)  # e read one token late


@pytest.mark.parametrize("family", [*CAUSAL, *ENCODERS])
def test_e_does_not_depend_on_the_response(family, request):
    scorer = make_scorer((CAUSAL | ENCODERS)[family]())
    if family in CAUSAL:
        x = texts()[0][0]
        rows = [(x + y, len(x)) for _, y in texts(1)]
    else:
        tokenizer = request.getfixturevalue("roberta_tokenizer" if family == "roberta" else "bert_tokenizer")
        rows = [
            encode_pair(tokenizer, "the quick fox", y, 64, False, "here", encoder=True)[:2]
            for y in ("dog", "my vow judges", "black quartz of Sphinx over the lazy dog")
        ]
    r, e = score(scorer, rows)
    assert close(e, e[:1].expand(len(rows)))
    assert r.std() > 0.02  # while r does


@pytest.mark.parametrize("family", CAUSAL)
def test_causal_scorer_reads_the_last_token_and_the_last_prompt_token(family):
    scorer = make_scorer(CAUSAL[family]())
    rows = [(x + y, len(x)) for x, y in texts()]
    r, e = score(scorer, rows)
    for i, (ids, prompt_len) in enumerate(rows):
        with torch.no_grad():
            hidden = scorer.model.base_model(torch.tensor([ids])).last_hidden_state[0]
            prompt_alone = scorer.model.base_model(torch.tensor([ids[:prompt_len]])).last_hidden_state[0]
        assert close(r[i], hidden[-1] @ scorer.model.score.weight[0])
        assert close(e[i], prompt_alone[-1] @ scorer.e_head.weight[0] + 0.3)


@pytest.mark.parametrize("family", CAUSAL)
def test_saved_scorer_is_what_auto_model_reads(family, tokenizer, tmp_path):
    """The folder gives one score through Scorer and through AutoModelForSequenceClassification, with its e head or not."""
    config = CAUSAL[family]()
    config.vocab_size = len(tokenizer)
    config.pad_token_id, config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    scorer = make_scorer(config)
    pairs = [("the quick", "brown fox"), ("judges", "my vow, 0123456789 times."), ("a", "b"), ("over the lazy dog", "")]
    rows = [encode_pair(tokenizer, x, y, 64, False, "here")[:2] for x, y in pairs]
    before = score_padded(scorer, rows, tokenizer.pad_token_id)
    save(scorer, tmp_path, tokenizer)
    again = load_scorer(str(tmp_path), tokenizer).eval()
    after = score_padded(again, rows, tokenizer.pad_token_id)
    assert before[0].std() > 0.02 and before[1].std() > 0.02
    assert close(after[0], before[0]) and close(after[1], before[1])
    auto = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        ids, mask = pad([ids for ids, _ in rows], tokenizer.pad_token_id)
        assert close(auto(ids, attention_mask=mask.long()).logits[:, 0], before[0])
        ids[ids == tokenizer.pad_token_id] = tokenizer.eos_token_id  # pad = eos would be read too early or too late
        auto.config.pad_token_id = tokenizer.eos_token_id
        assert not close(auto(ids, attention_mask=mask.long()).logits[:, 0], before[0], 0.01)


@torch.no_grad()
def score_padded(scorer, rows, pad_id):
    return scorer(*pad([ids for ids, _ in rows], pad_id), torch.tensor([n for _, n in rows]))


@pytest.mark.parametrize("family", ENCODERS)
def test_saved_encoder_scores_as_auto_model_on_the_tokenizer_s_pairs(family, request, tmp_path):
    tokenizer = request.getfixturevalue("roberta_tokenizer" if family == "roberta" else "bert_tokenizer")
    scorer = make_scorer(ENCODERS[family]())
    prompts, responses = ["the quick fox", "judges my", "dog"], ["over the lazy dog", "vow", "black quartz judges"]
    rows = [
        encode_pair(tokenizer, x, y, 64, False, "here", encoder=True)[:2]
        for x, y in zip(prompts, responses, strict=True)
    ]
    save(scorer, tmp_path, tokenizer)
    r, e = score(load_scorer(str(tmp_path), tokenizer).eval(), rows)
    auto = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    batch = tokenizer(prompts, responses, padding=True, return_tensors="pt", return_token_type_ids=True)
    kinds = {"token_type_ids": batch.token_type_ids} if family == "bert" else {}
    with torch.no_grad():
        assert close(auto(batch.input_ids, attention_mask=batch.attention_mask, **kinds).logits[:, 0], r)
        for i, x in enumerate(prompts):  # e: the first token of a pass over the prompt alone
            first = auto.base_model(tokenizer(x, return_tensors="pt").input_ids).last_hidden_state[0, 0]
            assert close(e[i], first @ scorer.e_head.weight[0] + 0.3)
    assert r.std() > 0.02 and e.std() > 0.02


def test_new_e_head_starts_at_zero_and_no_head_means_zero(scorer_folder, tokenizer):
    rows = [encode_pair(tokenizer, "the fox", "jumps", 64, False, "here")[:2]]
    for head in (False, True):
        scorer = load_scorer(scorer_folder, tokenizer, expected_reward_head=head).eval()
        r, e = score_padded(scorer, rows, tokenizer.pad_token_id)
        assert e.tolist() == [0.0] and abs(r.item()) > 1e-3
        assert (scorer.e_head is not None) == head


def test_an_e_head_of_an_earlier_run_is_not_taken_for_this_one_s(scorer_folder, tokenizer, tmp_path):
    with_head = load_scorer(scorer_folder, tokenizer, expected_reward_head=True)
    save(with_head, tmp_path, tokenizer)
    assert load_scorer(str(tmp_path), tokenizer).e_head is not None
    assert load_scorer(str(tmp_path), tokenizer, trained=False).e_head is None  # a start for `none`
    save(load_scorer(scorer_folder, tokenizer), tmp_path, tokenizer)
    assert load_scorer(str(tmp_path), tokenizer).e_head is None


def test_a_causal_lm_without_a_head_is_no_scorer(policy_folder, tokenizer):
    with pytest.raises(InputError, match="no reward head") as error:
        load_scorer(policy_folder, tokenizer)
    assert policy_folder in str(error.value) and "\n" not in str(error.value)
    assert not load_scorer(policy_folder, tokenizer, trained=False).is_encoder


# --- log-probs --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def logprobs_alone(model, x, y, temperature):
    """log pi(y_t | x, y_<t), entropy_t from the full log-softmax of one unpadded sequence."""
    log_softmax = torch.log_softmax(model(torch.tensor([x + y])).logits[0] / temperature, -1)
    steps = [log_softmax[len(x) + t - 1] for t in range(len(y))]
    return [step[token].item() for step, token in zip(steps, y, strict=True)], [
        -sum(math.exp(p) * p for p in step.tolist()) for step in steps
    ]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("family", CAUSAL)
def test_response_logprobs_equal_single_unpadded_passes(family, temperature):
    model, pairs = make_policy(family), texts()
    ids, mask = pad([x + y for x, y in pairs], PAD)
    lens = torch.tensor([len(x) for x, _ in pairs])
    with torch.no_grad():
        logprobs, response_mask, entropy = response_logprobs(model, ids, mask, lens, temperature, entropy=True)
        other = response_logprobs(model, ids, mask, lens, 1.7 - temperature)[0]
    assert logprobs.shape == response_mask.shape == entropy.shape == (5, 9)
    assert response_mask.sum(1).tolist() == [len(y) for _, y in pairs]
    for row, (x, y) in enumerate(pairs):
        expected, expected_entropy = logprobs_alone(model, x, y, temperature)
        assert logprobs[row][response_mask[row]].tolist() == pytest.approx(expected, abs=2e-5)
        assert entropy[row][response_mask[row]].tolist() == pytest.approx(expected_entropy, abs=2e-5)
    assert not close(other[response_mask], logprobs[response_mask], 0.05)  # the other temperature would be noticed


def test_logprobs_and_entropy_by_hand():
    """Next-token probabilities 1/2, 1/4, 1/4: entropy 1/2 log 2 + 2 * 1/4 log 4 = 1.5 log 2."""

    output = torch.nn.Linear(1, 3, bias=False)
    output.weight.data = torch.tensor([[0.5], [0.25], [0.25]]).log()
    model = SimpleNamespace(
        base_model=lambda ids, use_cache: SimpleNamespace(last_hidden_state=torch.ones(*ids.shape, 1)),
        get_output_embeddings=lambda: output,
        config=SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=3)),
        head_is_known=True,
    )
    ids, mask = pad([[2, 1, 0, 2], [1, 1, 0]], 0)
    logprobs, response_mask, entropy = response_logprobs(model, ids, mask, torch.tensor([2, 2]), entropy=True)
    assert response_mask.tolist() == [[True, True], [True, False]]
    assert close(logprobs[response_mask], torch.tensor([0.5, 0.25, 0.5]).log())
    assert close(entropy, 1.5 * math.log(2) * response_mask)
    assert not logprobs[~response_mask].any()
    # at temperature 1/2 the probabilities are squared: 1/4, 1/16, 1/16 over 3/8: 2/3, 1/6, 1/6
    sharp = response_logprobs(model, ids, mask, torch.tensor([2, 2]), 0.5)[0]
    assert close(sharp[response_mask], torch.tensor([2 / 3, 1 / 6, 2 / 3]).log())


# --- sampling ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def greedy_alone(model, prompt, length, stop=None):
    """Plain argmax, one token and one full unpadded pass at a time."""
    ids = list(prompt)
    while len(ids) < len(prompt) + length:
        ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
        if ids[-1] == stop:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("family", CAUSAL)
def test_greedy_in_rounds_and_batches_equals_greedy_one_by_one(family):
    model, prompts = make_policy(family), [x for x, _ in texts()]
    length = 20  # rounds of 8, 8 and 4 tokens
    free = [greedy_alone(model, prompt, length, EOS) for prompt in prompts]
    assert generate(model, IDS, prompts, length, 0, 2) == free
    assert generate(model, IDS, prompts, length, 0, 64) == free
    stop = next(y[9] for y in free if len(y) > 9)  # a token of the second round
    tokenizer = SimpleNamespace(chat_template=None, pad_token_id=PAD, eos_token_id=stop)
    expected = [y[: y.index(stop) + 1] if stop in y else y for y in free]
    assert expected != free
    assert generate(model, tokenizer, prompts, length, 0, 3) == expected


def test_every_stop_token_of_the_checkpoint_ends_a_response():
    model, prompts = make_policy("gpt2"), [x for x, _ in texts()]
    free = [greedy_alone(model, prompt, 12) for prompt in prompts]
    model.generation_config.eos_token_id = [EOS, free[0][3], free[1][9]]
    for y, got in zip(free, generate(model, IDS, prompts, 12, 0, 8), strict=True):
        ends = [t for t, token in enumerate(y) if token in model.generation_config.eos_token_id]
        assert got == (y[: ends[0] + 1] if ends else y)


def test_sampled_responses_end_in_eos_unless_cut():
    model, prompts = make_policy("gpt2"), [x for x, _ in texts()] * 40
    torch.manual_seed(0)
    responses = generate(model, IDS, prompts, 20, 1.5, 64)
    assert len(responses) == len(prompts)
    assert {len(y) for y in responses} <= set(range(1, 21))
    assert all((y[-1] == EOS) or len(y) == 20 for y in responses)
    assert all(EOS not in y[:-1] for y in responses)
    ended = sum(y[-1] == EOS for y in responses)
    assert 0 < ended < len(responses)
    assert any(8 < len(y) < 20 for y in responses)  # some ended in a later round


def test_first_tokens_follow_the_softmax():
    model, prompt, n = make_policy("llama"), [5, 9, 40], 4000
    torch.manual_seed(0)
    sampled = [y[0] for y in generate(model, IDS, [prompt] * n, 1, 0.7, n)]
    counts = torch.bincount(torch.tensor(sampled), minlength=VOCAB)
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0, -1]

    def chi_squared(temperature):
        expected = n * torch.softmax(logits / temperature, -1)
        common = expected >= 5  # the others go into one cell
        pairs = zip(
            [*counts[common].tolist(), counts[~common].sum().item()],
            [*expected[common].tolist(), expected[~common].sum().item()],
            strict=True,
        )
        return sum((c - x) ** 2 / max(x, 1e-9) for c, x in pairs), common.sum().item()

    statistic, cells = chi_squared(0.7)
    assert statistic < cells + 4 * math.sqrt(2 * cells)
    assert chi_squared(1.0)[0] > 2 * statistic + 100  # sampling at another temperature would be noticed


def test_samples_of_all_rounds_follow_the_policy():
    """If y_t ~ pi, log pi(y_t) + entropy_t has mean 0 at every t, after the first round's 8 tokens too."""
    model, prompts = make_policy("gpt2"), [x for x, _ in texts()] * 60
    torch.manual_seed(1)
    responses = generate(model, IDS, prompts, 12, 0.7, 100)
    ids, mask = pad([x + y for x, y in zip(prompts, responses, strict=True)], PAD)
    lens = torch.tensor([len(x) for x in prompts])

    def surplus(temperature):
        with torch.no_grad():
            logprobs, m, entropy = response_logprobs(model, ids, mask, lens, temperature, entropy=True)
        for columns in (slice(0, 8), slice(8, 12)):
            z = (logprobs + entropy)[:, columns][m[:, columns]]
            yield abs(z.mean() / (z.std() / len(z) ** 0.5)).item()  # in standard errors

    assert max(surplus(0.7)) < 4
    assert min(surplus(1.0)) > 4


def test_load_policy_drops_the_warpers_of_a_checkpoint(policy_folder, tokenizer, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(policy_folder)
    model.generation_config.update(do_sample=True, top_p=0.5, temperature=0.3, repetition_penalty=1.3)
    model.save_pretrained(tmp_path)
    config = load_policy(str(tmp_path)).generation_config
    assert config.eos_token_id == tokenizer.eos_token_id
    assert {config.top_p, config.temperature, config.repetition_penalty} <= {None, 1.0}


# --- the critic -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CAUSAL)
def test_critic_reads_the_value_of_a_token_one_token_early(family):
    critic = Critic(make_scorer(CAUSAL[family](), expected_reward_head=False), 0.25).eval()
    head = make_scorer(CAUSAL[family](), expected_reward_head=False).model.score.weight[0] * 0.25
    pairs = texts()
    with torch.no_grad():
        values = critic(*pad([x + y for x, y in pairs], PAD), torch.tensor([len(x) for x, _ in pairs]))
        assert values.shape == (5, 9)
        for row, (x, y) in enumerate(pairs):
            hidden = critic.model.base_model(torch.tensor([x + y])).last_hidden_state[0]
            at = [(hidden[len(x) - 1 + t] @ head).item() for t in range(len(y))]
            assert values[row, : len(y)].tolist() == pytest.approx(at, abs=1e-5)
            late = [(hidden[len(x) + t] @ head).item() for t in range(len(y))]
            assert max(abs(a - b) for a, b in zip(at, late, strict=True)) > 1e-3


# --- heads ------------------------------------------------------------------------------------------------------------


def random_weights(config, auto=AutoModelForCausalLM):
    torch.manual_seed(0)
    model = auto.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    return model


NARROW = SIZES | SPECIAL | WIDE | {"num_key_value_heads": 1, "head_dim": 16}
MAMBA = dict(mamba_d_ssm=32, mamba_n_heads=2, mamba_d_head=16, mamba_d_state=8, mamba_expand=1, mamba_n_groups=1)
RECURRENT = {k: v for k, v in NARROW.items() if k != "max_position_embeddings"}
MORE_THAN_A_MATRIX = {  # a dense layer and a norm, a factor, a factor that Granite divides by, a cap of another name
    "modernbert_decoder": lambda: ModernBertDecoderConfig(
        **(SIZES | SPECIAL | WIDE | {"bos_token_id": 2}), cls_token_id=0, sep_token_id=0
    ),
    "falcon_h1": lambda: FalconH1Config(**NARROW, **MAMBA, lm_head_multiplier=0.05),
    "hyperclovax": lambda: HyperCLOVAXConfig(**NARROW, logits_scaling=0.25),
    "recurrent_gemma": lambda: RecurrentGemmaConfig(
        **RECURRENT, lru_width=32, attention_window_size=16, block_types=["recurrent", "attention"], logits_soft_cap=3.0
    ),
}


@pytest.mark.parametrize("family", MORE_THAN_A_MATRIX)
def test_logprobs_are_those_of_the_model_s_own_logits(family):
    model, pairs = random_weights(MORE_THAN_A_MATRIX[family]()), texts()
    ids, mask = pad([x + y for x, y in pairs], PAD)
    with torch.no_grad():
        found, response_mask = response_logprobs(model, ids, mask, torch.tensor([len(x) for x, _ in pairs]))
    assert not model.head_is_known
    for row, (x, y) in enumerate(pairs):
        assert found[row][response_mask[row]].tolist() == pytest.approx(logprobs_alone(model, x, y, 1.0)[0], abs=2e-4)


@pytest.mark.parametrize("family", CAUSAL)
def test_the_output_matrix_alone_is_read_where_it_is_the_head(family):
    """Whole logits, (batch, seq_len, vocab), would cost what the chunks save."""
    model, calls = make_policy(family), []
    model.register_forward_hook(lambda *_: calls.append(1))
    ids, mask = pad([[2, 3, 4, 5], [6, 7, 8]], PAD)
    for _ in range(2):
        response_logprobs(model, ids, mask, torch.tensor([2, 1]))
    assert model.head_is_known and len(calls) == 1  # to find out


def test_to_find_out_draws_no_random_number():
    model = make_policy("gpt2").train()
    model.config.resid_pdrop = 0.5
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    utils.head_is_known(model, torch.tensor([[2, 3, 4]]))
    assert torch.equal(torch.rand(1), expected)


def test_a_causal_lm_with_a_classifier_is_read_as_a_causal_lm():
    """Its head is no `score`: r is the model's own, at the last token; e does not see the response."""
    config = MORE_THAN_A_MATRIX["modernbert_decoder"]()
    config.num_labels = 1
    scorer = Scorer(random_weights(config, AutoModelForSequenceClassification), expected_reward_head=True)
    torch.nn.init.normal_(scorer.e_head.weight)
    assert not scorer.is_encoder and not hasattr(scorer.model, "score")
    rows = [(x + y, len(x)) for x, y in texts()]
    r, e = score(scorer, rows, extra_padding=3)
    with torch.no_grad():
        alone = torch.cat([scorer.model(torch.tensor([ids])).logits[0] for ids, _ in rows])
    assert close(r, alone, 1e-4)
    other = score(scorer, [([*ids[:n], 9, 8, 7], n) for ids, n in rows])[1]
    assert close(e, other, 1e-4) and e.std() > 0


@pytest.mark.parametrize("family", ["gpt2", "bert", "roberta"])
def test_heads_are_float32_under_bf16(family, request):
    """Scores with a level of 20: in bfloat16 they would come in steps of 1/8, and tie."""
    config = (CAUSAL | ENCODERS)[family]()
    scorer, rows = make_scorer(config), encoded(family, request)
    head = scorer.model.score if family == "gpt2" else scorer.model.classifier
    last = [m for m in head.modules() if isinstance(m, torch.nn.Linear)][-1]
    last.bias = torch.nn.Parameter(torch.full((1,), 20.0))
    with torch.autocast("cpu", torch.bfloat16):
        r, e = score(scorer, rows)
    assert r.dtype == e.dtype == torch.float32
    assert all((8 * value) % 1 for value in r.tolist()) and len({*r.tolist()}) == len(rows)
    assert close(r, score(scorer, rows)[0], 0.3)


def test_a_scorer_is_read_in_the_precision_of_its_training(scorer_folder, tokenizer, tmp_path, capsys):
    folder = tmp_path / "scorer"
    shutil.copytree(scorer_folder, folder)
    rows = [encode_pair(tokenizer, x, "the dog", 64, False, "here")[:2] for x in ("my vow", "quartz", "the fox")]

    def read(bf16):
        scorer = load_scorer(str(folder), tokenizer)
        return score_texts(scorer, tokenizer, rows, 4, bf16)[0].tolist()

    exact, rounded = read(False), read(True)
    assert exact != rounded and "trained" not in capsys.readouterr().out
    for trained, expected in ((True, rounded), (False, exact)):
        write_json(folder / "training.json", {"args": {"bf16": trained}})
        utils.print_once.cache_clear()
        assert read(True) == read(False) == expected
        assert capsys.readouterr().out == f"the scorer is read with --bf16 {trained}, as it was trained\n"


# --- rounds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt_len, calls", [(2, 2), (24, 1)])
def test_rounds_end_where_few_responses_do_and_are_none_where_prompts_are_long(prompt_len, calls, monkeypatch):
    """A round reads the prompts again: with prompts as long as responses that costs more than it saves."""
    model, seen = make_policy("gpt2"), []
    own = model.generate
    model.generation_config.eos_token_id = None
    monkeypatch.setattr(model, "generate", lambda **flags: seen.append(1) or own(**flags))
    torch.manual_seed(0)
    generate(
        model, SimpleNamespace(chat_template=None, pad_token_id=PAD, eos_token_id=95), [[5] * prompt_len], 24, 1.0, 4
    )
    assert len(seen) == calls


def test_a_model_whose_tokens_see_those_behind_them_is_no_policy(bert_tokenizer, tmp_path):
    """transformers loads BERT as a causal LM, and lets each token see the answer."""
    for causal in (False, True):
        config = BertConfig(**SIZES, pad_token_id=PAD, initializer_range=0.2, **WIDE, is_decoder=causal)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / str(causal))
    assert load_policy(str(tmp_path / "True"))
    with pytest.raises(InputError, match="see those behind them, so it is no policy"):
        load_policy(str(tmp_path / "False"))
