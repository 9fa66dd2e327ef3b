"""baselines/average_weights.py: what is held against rehearsal as a remedy against forgetting."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from baselines.average_weights import Args, main
from tests.conftest import byte_level_tokenizer, gpt2_config
from utils import InputError


def save(tokenizer, folder, seed=0, **changes):
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(gpt2_config(tokenizer, **changes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def fill(folder, value):
    """Every parameter of the model in `folder` becomes `value`, its embeddings twice that."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
        model.get_input_embeddings().weight.fill_(2 * value)
    model.save_pretrained(folder)


def averaged(policy, init, folder, weight=0.5):
    main(Args(model_name_or_path=policy, init_model=init, output_dir=str(folder), weight=weight))
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("tied", [True, False])
def test_average_by_hand(tied, tokenizer, tmp_path):
    """0.25 x 4 + 0.75 x -2 = -0.5 everywhere, -1 in the embeddings: averaged twice, tied ones would be -3.25."""
    policy, init = (save(tokenizer, tmp_path / name, tie_word_embeddings=tied) for name in ("policy", "init"))
    fill(policy, 4.0)
    fill(init, -2.0)
    model = averaged(policy, init, tmp_path / "out", 0.25)
    inputs, outputs = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (inputs is outputs) == tied
    for name, parameter in model.named_parameters():
        assert (parameter == (-1.0 if parameter is inputs else -0.5)).all(), name
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == tokenizer.get_vocab()


def test_the_ends_are_the_two_models_and_sums_are_float32(tokenizer, tmp_path):
    policy, init = (save(tokenizer, tmp_path / name, seed) for seed, name in enumerate(("policy", "init")))
    model = AutoModelForCausalLM.from_pretrained(policy).to(torch.bfloat16)
    model.save_pretrained(policy)  # a policy that was saved in bfloat16
    for weight, source in ((1, policy), (0, init)):
        model = averaged(policy, init, tmp_path / "out", weight)
        expected = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).state_dict()
        assert model.dtype == torch.float32
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, expected[name]), name
    a, b = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float64).state_dict() for f in (policy, init))
    for name, tensor in averaged(policy, init, tmp_path / "out", 0.3).state_dict().items():
        assert (tensor - (0.3 * a[name] + 0.7 * b[name])).abs().max() < 1e-6, name


def test_models_without_a_mean_are_refused(tokenizer, tmp_path):
    policy = save(tokenizer, tmp_path / "policy")
    other_words = byte_level_tokenizer(pad_token="<pad>", eos_token="</s>")
    cases = {
        "n_layer is 2 and 3": save(tokenizer, tmp_path / "deeper", n_layer=3),
        "n_head is 2 and 4": save(tokenizer, tmp_path / "heads", n_head=4),  # the same shapes
        "tie_word_embeddings is True and False": save(tokenizer, tmp_path / "untied", tie_word_embeddings=False),
        "their tokenizers differ": save(other_words, tmp_path / "words"),
    }
    for said, init in cases.items():
        with pytest.raises(InputError) as error:
            averaged(policy, init, tmp_path / "out")
        assert said in str(error.value) and init in str(error.value) and policy in str(error.value)
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=r"--weight 1\.5"):
        averaged(policy, policy, tmp_path / "out", 1.5)
    assert not (tmp_path / "out").exists()
