"""ppo_sr.py's checks before step 1: what is rounding, and what stops a wrong set-up."""

import math
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from ppo_sr import check_zero
from tests.conftest import gpt2_config
from utils import InputError, response_logprobs

TOLERANCE = {False: 1e-3, True: 0.5}  # by bf16, in nats


def check_first_step(logprobs, ref_logprobs, sampled_logprobs, mask, bf16=False):
    """Two of the three checks of PPO.check_before_step_1, on given log-probs."""
    for other, name in ((ref_logprobs, "KL to pi_init"), (sampled_logprobs, "the sampler, top-p")):
        check_zero(name, (logprobs - other)[mask], "causes", SimpleNamespace(bf16=bf16))


def check_first_ratio(error, bf16=False):
    check_zero("first ratio - 1", torch.tensor([error, *[0.0] * 200]), "dropout", SimpleNamespace(bf16=bf16))


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
    with pytest.raises(InputError, match=f"^before step 1: .*{which}.*off 0 by up to"):
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
    with pytest.raises(InputError, match=r"^before step 1: the first ratio - 1 is off 0 by up to 1\.1.*dropout"):
        check_first_ratio(1.1, bf16)
    logprobs, _, _, with_dropout = sampled()
    with pytest.raises(InputError, match="first ratio"):
        check_first_ratio(((with_dropout - logprobs).exp() - 1).abs().max().item(), bf16)
