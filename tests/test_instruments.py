"""Checks that stop a wrong set-up, alarms in crafted histories and none in a healthy one, and --explain by hand."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import gpt2_config
from instruments import BANDS, QUIET, TOLERANCE, WINDOW, Alarms, _cell, check_first_ratio, check_first_step, explain
from ppo_sr import generalized_advantages, token_rewards, whiten
from utils import InputError, response_logprobs

# --- first step -------------------------------------------------------------------------------------------------------

LOGPROBS = torch.tensor([[-1.0, -2.0, -0.5], [-0.1, -3.0, 0.0]])
MASK = torch.tensor([[True, True, True], [True, True, False]])


def test_a_right_set_up_passes_and_padding_is_not_looked_at():
    noise = torch.tensor([[2e-6, -1e-6, 0.0], [1e-6, -2e-6, 7.0]])  # 7 at a padded position
    check_first_step(LOGPROBS, LOGPROBS + noise, LOGPROBS - noise, MASK)
    check_first_step(LOGPROBS[MASK], LOGPROBS[MASK], LOGPROBS[MASK], torch.ones(5, dtype=torch.bool))  # (tokens,)
    check_first_step(LOGPROBS, LOGPROBS, LOGPROBS + 1e3 * noise * MASK, MASK, bf16=True)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("which", ["pi_init", "the sampler"])
@pytest.mark.parametrize("sign", [1, -1])
def test_one_wrong_token_stops_the_run(bf16, which, sign):
    logprobs, mask = LOGPROBS.repeat(50, 1), MASK.repeat(50, 1)  # 250 tokens: one moves the mean by too little
    wrong = logprobs.clone()
    wrong[1, 1] += sign * 1.1 * TOLERANCE[bf16]
    tensors = (wrong, logprobs) if which == "pi_init" else (logprobs, wrong)
    with pytest.raises(InputError, match=f"^first batch: .*{which}.*differ by up to"):
        check_first_step(logprobs, *tensors, mask, bf16)


def test_a_nan_stops_the_run():
    with pytest.raises(InputError, match="nan"):
        check_first_step(LOGPROBS, LOGPROBS * math.nan, LOGPROBS, MASK)
    with pytest.raises(InputError, match="nan"):
        check_first_ratio(math.nan)


def test_a_small_difference_in_one_direction_is_no_rounding():
    """A filter lifts every log-prob of the sampler: in bfloat16 the mean tells it from rounding of the same size."""
    torch.manual_seed(0)
    mask, noise = torch.ones(64, 32, dtype=torch.bool), 0.02 * torch.randn(64, 32)
    logprobs = -torch.rand(64, 32)
    check_first_step(logprobs, logprobs, logprobs + noise, mask, bf16=True)
    for bias in (0.017, -0.017):
        with pytest.raises(InputError, match="top-p"):
            check_first_step(logprobs, logprobs, logprobs + noise + bias, mask, bf16=True)


@pytest.fixture(scope="module")
def sampled(tokenizer):
    """A random GPT-2 with dropout, 16 sequences drawn from it, and the sampler's log-probs under several samplers."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(gpt2_config(tokenizer, resid_pdrop=0.1)).eval()
    x = torch.randint(4, 200, (16, 6))

    def sample(**warp):
        ways = dict(do_sample=True, top_k=0, top_p=1.0, max_new_tokens=12, pad_token_id=0, eos_token_id=None) | warp
        out = model.generate(x, return_dict_in_generate=True, output_scores=True, **ways)
        of_sampler = torch.stack(out.scores, 1).log_softmax(-1)
        of_sampler = of_sampler.gather(-1, out.sequences[:, 6:, None])[..., 0]
        attention, prompt_lens = torch.ones_like(out.sequences, dtype=torch.bool), torch.full((16,), 6)
        with torch.no_grad():
            logprobs, mask, *_ = response_logprobs(model, out.sequences, attention, prompt_lens)
            model.train()
            with_dropout = response_logprobs(model, out.sequences, attention, prompt_lens)[0]
            model.eval()
        return logprobs, of_sampler, mask, with_dropout

    return sample


def test_warped_samplers_are_found(sampled):
    logprobs, of_sampler, mask, _ = sampled()
    check_first_step(logprobs, logprobs, of_sampler, mask)
    for warp in ({"temperature": 0.9}, {"top_k": 50}, {"top_p": 0.95}, {"repetition_penalty": 1.1}):
        logprobs, of_sampler, mask, _ = sampled(**warp)
        with pytest.raises(InputError, match="the sampler"):
            check_first_step(logprobs, logprobs, of_sampler, mask)
    with pytest.raises(InputError, match="the sampler"):  # a mask that is off by one
        check_first_step(logprobs, logprobs, logprobs.roll(1, 1), mask)


@pytest.mark.parametrize("bf16", [False, True])
def test_first_ratio(sampled, bf16):
    check_first_ratio(0.0, bf16)
    check_first_ratio(0.9 * TOLERANCE[bf16], bf16)
    with pytest.raises(InputError, match=r"^first ratio: .*1\.1 before any update.*dropout"):
        check_first_ratio(1.1, bf16)
    logprobs, _, _, with_dropout = sampled()
    with pytest.raises(InputError, match="first ratio"):
        check_first_ratio(((with_dropout - logprobs).exp() - 1).abs().max().item(), bf16)


# --- alarms -----------------------------------------------------------------------------------------------------------

HEALTHY = {
    "objective/kl": 0.5, "objective/entropy": 0.25, "objective/scores": 0.1, "objective/gold": 0.6,
    "val/response_length": 10.0, "val/num_eos_tokens": 126, "val/no_eos_share": 0.015, "val/explained_variance": 0.6,
    "policy/clipfrac_avg": 0.01, "policy/approxkl_avg": 0.001, "val/ratio": 1.0, "policy/perplexity": 1.3,
    "task/sort/kl": 0.5, "task/greet/kl": 0.5, "task/greet/score": 0.1,
}  # fmt: skip


def healthy(step):
    """KL rises, entropy halves, scores and gold rise, the critic starts badly: all as in a run that went well."""
    noise = 0.02 * (-1) ** step
    return HEALTHY | {
        "objective/kl": 0.01 * step, "objective/entropy": 0.25 - 0.0025 * step, "objective/scores": 0.004 * step + noise,
        "objective/gold": 0.6 + 0.002 * step + noise, "val/response_length": 10 + 5 * noise,
        "val/explained_variance": -0.5 if step < 5 else 0.8, "task/greet/kl": 0.02 * step, "task/sort/kl": 0.005 * step,
        "policy/perplexity": math.exp(0.25 - 0.0025 * step + noise),
    }  # fmt: skip


def rung(history, alarms=None):
    alarms = alarms or Alarms()
    return [line for step, metrics in enumerate(history, 1) for line in alarms.ring(step, metrics)]


def test_a_healthy_run_is_quiet():
    assert rung([healthy(step) for step in range(1, 51)]) == []


CASES = [  # metrics that leave their band, as far inside and outside as the test dares
    ("objective/kl", {"objective/kl": -0.95}, {"objective/kl": -1.05}),
    ("objective/kl per token", {"objective/kl": 1.95}, {"objective/kl": 2.05}),  # of 10 tokens
    ("val/response_length / step 1's", {"val/response_length": 19.5}, {"val/response_length": 20.5}),
    ("val/response_length / step 1's", {"val/response_length": 5.5}, {"val/response_length": 4.9}),
    ("objective/entropy / step 1's", {"objective/entropy": 0.065}, {"objective/entropy": 0.06}),
    ("objective/entropy / step 1's", {"objective/entropy": 0.74}, {"objective/entropy": 0.76}),
    ("val/explained_variance", {"val/explained_variance": 0.01}, {"val/explained_variance": -0.01}),
    ("val/explained_variance", {"val/explained_variance": 0.01}, {"val/explained_variance": math.nan}),
    ("policy/clipfrac_avg", {"policy/clipfrac_avg": 0.19}, {"policy/clipfrac_avg": 0.21}),
    ("val/ratio", {"val/ratio": 0.91}, {"val/ratio": 0.89}),
    ("val/ratio", {"val/ratio": 1.09}, {"val/ratio": 1.11}),
    ("val/no_eos_share - step 1's", {"val/no_eos_share": 0.26}, {"val/no_eos_share": 0.27}),  # from .015
    ("val/no_eos_share", {"val/no_eos_share": 0.89}, {"val/no_eos_share": 0.91}),  # from .8
    # nine steps of log 1.3 / .25 = 1.0495 and one of x: their mean is 1.5 at x = 5.555, a perplexity of 4.01
    ("log perplexity / entropy", {"policy/perplexity": 3.98}, {"policy/perplexity": 4.04}),
    ("log perplexity / entropy", {"policy/perplexity": 0.51}, {"policy/perplexity": 0.50}),  # .67 at x = -2.745
    # three tasks: the other two have a mean of (.5 + 3.1) / 2 = 1.8, so the bound is 7.2: (9 x .5 + x) / 10 at x = 67.5
    ("task/*/kl / other tasks'", {"task/greet/kl": 67, "task/a/kl": 3.1}, {"task/greet/kl": 68, "task/a/kl": 3.1}),
    # where the others have hardly moved the bound is 4 x 1: x = 35.5
    ("task/*/kl / other tasks'", {"task/greet/kl": 35, "task/sort/kl": 0}, {"task/greet/kl": 36, "task/sort/kl": 0}),
]


@pytest.mark.parametrize(("dial", "inside", "outside"), CASES)
def test_each_alarm_rings_outside_its_band_and_only_there(dial, inside, outside):
    before = [HEALTHY] * 11
    if "val/response_length" in inside:  # KL per token must not ring instead
        before = [HEALTHY | {"objective/kl": 0}] * 11
    if dial == "val/no_eos_share":
        before = [HEALTHY | {dial: 0.8}] * 11
    assert rung([*before, before[0] | inside]) == []
    (line,) = rung([*before, before[0] | outside])
    name = dial.replace("*", "greet")
    assert line.startswith(f"alarm, step 12: {name} is ") and "(band: " in line and BANDS[dial].means in line


def test_an_alarm_line_names_value_band_and_remedy():
    (line,) = rung([HEALTHY] * 11 + [HEALTHY | {"val/response_length": 21.0}])
    assert line == (
        "alarm, step 12: val/response_length / step 1's is 2.1 (band: above 0.5, below 2): "
        "the scorer pays for length or for brevity; read samples.jsonl, raise --kl_coef"
    )


def test_every_dial_has_a_case():
    hacking = "objective/gold while scores rise (standard errors)"
    assert {dial for dial, *_ in CASES} | {hacking} == set(BANDS)
    assert all(band.source and band.means and band.low < band.high for band in BANDS.values())


def hacked(gold_slope, score_slope, steps=2 * WINDOW, noise=0.02):
    """Scores and gold that move after the first window; noise +- .02 has a sample variance of .0004 x 10/9."""
    late = [max(0, step - WINDOW) for step in range(1, steps + 1)]
    return [
        HEALTHY | {"objective/scores": score_slope * (t > 0) + noise * (-1) ** i,
                   "objective/gold": 0.6 + gold_slope * (t > 0) + noise * (-1) ** i}
        for i, t in enumerate(late)
    ]  # fmt: skip


def test_proxy_gold_divergence():
    # standard error of a difference of two windows: sqrt(2 x .0004 x (10/9) / 10) = .009428; two of them .018856
    (line,) = rung(hacked(-0.02, 0.02))
    assert line.startswith("alarm, step 20: objective/gold while scores rise (standard errors) is -2.12 ")
    assert rung(hacked(-0.018, 0.02)) == []  # gold fell within noise
    assert rung(hacked(-0.02, 0.018)) == []  # the proxy did not rise
    assert rung(hacked(0.02, 0.02)) == [] and rung(hacked(-0.02, -0.02)) == []
    assert rung(hacked(-0.02, 0.02, steps=2 * WINDOW - 1)) == []  # windows do not overlap
    without_gold = [{k: v for k, v in row.items() if k != "objective/gold"} for row in hacked(-0.02, 0.02)]
    assert rung(without_gold) == []


def test_the_first_window_stays_the_first():
    back = hacked(-0.02, 0.02, steps=3 * WINDOW)
    alarms = Alarms()
    assert len(rung(back, alarms)) == 1 and len(alarms.pairs) == 2 * WINDOW  # still out at step 30, and not said again
    kept = back[:WINDOW] + back[-WINDOW:]
    assert alarms.pairs == [[row["objective/scores"], row["objective/gold"]] for row in kept]


def test_the_critic_has_a_grace_period():
    bad = HEALTHY | {"val/explained_variance": -1.0}
    assert rung([bad] * 10) == []
    assert len(rung([bad] * 11)) == 1


def test_a_long_run_is_not_flooded():
    bad = HEALTHY | {"val/ratio": 1.5}
    assert len(rung([bad] * 100)) == 1
    assert len(rung([bad, HEALTHY] * 50)) == 1  # to and fro over the edge: it never came back for good
    assert len(rung([bad] + [HEALTHY] * (QUIET - 1) + [bad])) == 1
    assert len(rung([bad] + [HEALTHY] * QUIET + [bad])) == 2


def test_dials_are_told_apart():
    """Two tasks, and two dials at one step, have a line each."""
    tasks = {f"task/{name}/kl": 0.0 for name in "abc"}
    history = [
        HEALTHY | tasks,
        HEALTHY | tasks | {"task/a/kl": 9.0},
        HEALTHY | tasks | {"task/b/kl": 90.0, "val/ratio": 2},
    ]
    lines = rung(history)
    assert [line.split(" is ")[0] for line in lines] == [
        "alarm, step 2: task/a/kl / other tasks'",
        "alarm, step 3: task/b/kl / other tasks'",
        "alarm, step 3: val/ratio",
    ]


def test_one_task_alone_and_absent_metrics_are_passed_over():
    assert rung([{"task/sort/kl": 99.0}] * 30) == []
    assert rung([{}] * 30) == []


@pytest.mark.parametrize("cut", [1, 7, 12, 15, 25])
def test_resume_rings_as_if_never_stopped(cut):
    history = hacked(-0.02, 0.02, steps=30)
    history[11:] = [row | {"val/response_length": 30.0, "task/greet/kl": 9.0} for row in history[11:]]
    whole = Alarms()
    expected = [whole.ring(step, row) for step, row in enumerate(history, 1)]
    first = Alarms()
    lines = [first.ring(step, row) for step, row in enumerate(history[:cut], 1)]
    saved = json.dumps(first.state())
    rest = first.ring(cut + 1, history[cut])  # what follows the checkpoint does not reach it
    second = Alarms()
    second.load_state(json.loads(saved))
    lines += [second.ring(step, row) for step, row in enumerate(history[cut:], cut + 1)]
    assert lines == expected and rest == expected[cut] and sum(map(len, expected)) == 3
    assert second.state() == whole.state()


def test_state_is_a_copy():
    alarms = Alarms()
    alarms.ring(1, HEALTHY)
    saved = alarms.state()
    before = json.dumps(saved)
    alarms.ring(2, HEALTHY | {"val/ratio": 2.0})
    assert json.dumps(saved) == before
    other = Alarms()
    other.load_state(saved)
    other.ring(2, HEALTHY | {"val/ratio": 2.0})
    assert json.dumps(saved) == before


# --- explain ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def batch(tokenizer):
    """Two responses of 3 and 2 tokens; s = 1, -1; beta = .5; gamma = 1, lambda = .5."""
    args = SimpleNamespace(gamma=1.0, lam=0.5)
    newline, eos = tokenizer.encode("\n")[0], tokenizer.eos_token_id
    the, jump = (tokenizer.encode(letter)[0] for letter in "tj")
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()
    logprobs = torch.tensor([[-1.0, -2.0, -0.5], [-0.1, -3.0, 0.0]])
    ref_logprobs = torch.tensor([[-1.2, -1.8, -0.5], [-0.1, -3.4, 0.0]])
    values = torch.tensor([[0.2, 0.4, 0.6], [-0.5, -0.75, 0.0]])
    scores = torch.tensor([1.0, -1.0])
    rewards = token_rewards(scores, logprobs, ref_logprobs, mask, 0.5)
    advantages, returns = generalized_advantages(rewards, values, mask, 1.0, 0.5)
    rollout = SimpleNamespace(
        sequences=[([the] * 4, [the, newline, eos]), ([jump] * 2, [jump, eos])],
        mask=mask, logprobs=logprobs, ref_logprobs=ref_logprobs, values=values, scores=scores, rewards=rewards,
        advantages=whiten(advantages, mask), returns=returns, kl_coef=0.5,
    )  # fmt: skip
    return args, rollout


def numbers(line):
    return [float(word) for word in line.split()[-9:]]


def test_explain_prints_the_terms_worked_out_by_hand(tokenizer, batch):
    """Row 0: KL terms -.5 (.2, -.2, 0) = -.1, .1, 0, so rewards -.1, .1, 1.

    deltas  -.1 + .4 - .2 = .1     .1 + .6 - .4 = .3     1 - .6 = .4
    A       .1 + .5 x .5 = .35     .3 + .5 x .4 = .5     .4            returns  .55 .9 1
    Row 1: KL terms 0, -.5 x .4 = -.2, rewards 0, -1.2;  A_1 = -1.2 + .75 = -.45, A_0 = -.75 + .5 - .225 = -.475
    Whitened: mean .065, deviations .285 .435 .335 -.54 -.515, unbiased variance .9395 / 4, std .484639
    """
    args, rollout = batch
    lines = explain(args, tokenizer, rollout).split("\n")
    assert lines[0] == "row 0, prompt of 4 tokens: 'tttt'"
    assert "[Eq. 2]" in lines[2] and "GAE" in lines[2] and "whitened" in lines[2]
    first = lines[4:7]
    assert [line.split()[:3] for line in first] == [["4", "'t'", "1"], ["5", r"'\n'", "1"], ["6", "'<eos>'", "1"]]
    assert [numbers(line) for line in first] == [
        [-1.0, -1.2, -0.1, 0.0, -0.1, 0.2, 0.35, 0.5881, 0.55],
        [-2.0, -1.8, 0.1, 0.0, 0.1, 0.4, 0.5, 0.8976, 0.9],
        [-0.5, -0.5, 0.0, 1.0, 1.0, 0.6, 0.4, 0.6912, 1.0],
    ]
    assert lines[7].split() == ["sum", "3", "0.0000", "1.0000", "1.0000"]
    second = lines[9:]
    assert [numbers(line) for line in second[4:6]] == [
        [-0.1, -0.1, 0.0, 0.0, 0.0, -0.5, -0.475, -1.1142, -0.975],
        [-3.0, -3.4, -0.2, -1.0, -1.2, -0.75, -0.45, -1.0626, -1.2],
    ]
    assert second[6].split()[:3] == ["4", "(padding)", "0"] and numbers(second[6]) == [0.0] * 9
    assert second[7].split() == ["sum", "2", "-0.2000", "-1.0000", "-1.2000"]
    assert "mean 0.0000, std 1.0000" in lines[-1] and not any("-0.0000" in line for line in lines)


def identities(text):
    """The largest errors that the last two lines state: of the sums of rewards, and of GAE."""
    tail = " ".join(text.split("\n")[-2:])
    return float(tail.split("beta KL to ")[1].split(";")[0]), float(tail.split("A_t+1 to ")[1].split(";")[0])


def test_explain_states_whether_the_identities_hold(tokenizer, batch):
    args, rollout = batch
    rollout.values[1, 2] = 0.3  # padding counts nowhere
    assert max(identities(explain(args, tokenizer, rollout))) < 1e-6
    rollout.rewards[1, 1] += 0.25  # a reward that Eq. 2 does not give, and that GAE has not seen
    assert identities(explain(args, tokenizer, rollout)) == (0.2, 0.2)  # one digit, as printed
    rollout.rewards[1, 1] -= 0.25
    rollout.returns[0, 2] += 0.5  # A_2 off by .5, and A_1 by lambda x .5
    sums, gae = identities(explain(args, tokenizer, rollout))
    assert sums < 1e-6 and gae == 0.5


def test_explain_covers_the_batch_but_prints_the_first_rows(tokenizer, batch):
    args, rollout = batch
    text = explain(args, tokenizer, rollout, rows=1)
    assert "row 1" not in text and "all 5 tokens" in text


def test_explain_stays_aligned_and_escapes(tokenizer, batch):
    args, rollout = batch
    rollout.sequences[0] = (tokenizer.encode("the\x1b[31m\n" * 60), tokenizer.encode("\t\x1b\r"))
    text = explain(args, tokenizer, rollout)
    lines = text.split("\n")
    assert max(map(len, lines)) <= 120 and all(char == "\n" or char.isprintable() for char in text)
    table = [line for line in lines if line[:5].strip().isdigit() and "next token" not in line]
    assert len(table) == 6 and {len(line) for line in table} == {len(lines[1])}


def test_wide_characters_count_two_columns():
    assert _cell("ab", 6) == "'ab'  "
    assert _cell("巴黎", 8) == "'巴黎'  "  # 1 + 4 + 1 columns and two spaces
    assert _cell("巴黎巴黎", 8) == "'巴黎巴…"  # 1 + 6 + 1
    assert _cell("a" * 20, 8) == "'aaaaaa…"
