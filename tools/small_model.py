"""A small causal LM with random weights and a tokenizer made from the texts of a data set.

    python -m tools.small_model --dataset_name pairs.jsonl --output_dir models/small
    python am_train.py --model_name_or_path models/small --learning_rate 1e-3 ...

It stands for no pre-trained model: it shows what a loss does where nothing was known before, in any
language, on a CPU.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from utils import InputError, load_rows, render, run_cli


@dataclass
class Args:
    dataset_name: str
    """preference pairs whose texts the tokenizer learns"""
    output_dir: str
    """receives model and tokenizer"""
    vocab_size: int = 4000
    """tokens of the byte-level BPE"""
    num_layers: int = 2
    """layers of the GPT-2"""
    hidden_size: int = 128
    """its width"""
    max_length: int = 512
    """its positions"""
    seed: int = 1
    """seed of the weights"""


def main(args: Args):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    if Path(args.output_dir, "config.json").exists():
        problem = "holds a model; give another folder, or remove it"
        raise InputError(f"--output_dir {args.output_dir}: {problem}")
    fields = {"prompt": "prompt", "chosen": "response", "rejected": "response"}
    rows, byte_level = load_rows(args.dataset_name, fields), pre_tokenizers.ByteLevel
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = byte_level(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=args.vocab_size,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=byte_level.alphabet(),  # any text, in any language
        show_progress=False,
    )
    special = {"pad_token": "<pad>", "eos_token": "<eos>"}
    tokenizer, texts = PreTrainedTokenizerFast(tokenizer_object=bpe, **special), []
    for row in rows:
        texts += [render(tokenizer, row["prompt"]), row["chosen"], row["rejected"]]
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, **special)
    torch.manual_seed(args.seed)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=args.max_length,
        n_embd=args.hidden_size,
        n_layer=args.num_layers,
        n_head=max(1, args.hidden_size // 32),
        activation_function="relu",
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    GPT2LMHeadModel(config).save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    print(f"{len(tokenizer)} tokens, model written to {args.output_dir}")


if __name__ == "__main__":
    run_cli(main, Args, __doc__)
