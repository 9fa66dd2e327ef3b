"""Hand a scorer of am_train.py to other libraries.

    python -m tools.export_reward_model --reward_model_path runs/am/model --format openrlhf \\
        --dataset_name test.jsonl --output_dir OUT      # mean and std of its scores on these pairs

transformers: am_train.py's folder as it is, with a model card.
`AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)` gives a(x, y), or r(x, y)
where there is an e head, and then the card has the lines that give a = r - e. TRL's RewardTrainer
takes the folder too.

openrlhf: a causal LM under the names that OpenRLHF's
`get_llm_for_sequence_regression(OUT, "reward")` looks for, which are the same (`score.weight`, no
bias), and in config.json `value_head_prefix` and, on request, `mean` and `std`: its flag for
normalised rewards then turns a score s into (s - mean) / std. It reads one token, the last; e(x) is
read at another and cannot be exported, and neither can an encoder.

`load_advantage_model(folder).score(prompts, responses)` is a = r - e for a user's own program.
"""

import inspect
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from plumbing.errors import first_line
from utils import E_HEAD, InputError, check_fits, encode_rows, load_rows, load_scorer
from utils import load_tokenizer, run_cli, score_texts


@dataclass
class Args:
    reward_model_path: str
    """the scorer: model/ of an am_train.py run"""
    output_dir: str
    """folder that receives the exported model"""
    format: Literal["transformers", "openrlhf"] = "transformers"
    """whose loader shall read it"""
    drop_expected_reward: bool = False
    """openrlhf: export r alone of a scorer with an e head, instead of refusing it"""
    mean_std: tuple[float, float] | None = None
    """openrlhf: mean and std for its normalised rewards (none: 0 and 1, which change nothing)"""
    dataset_name: str | None = None
    """openrlhf: measure mean and std on these pairs instead, over both responses of each"""
    max_length: int = 512
    """tokens of prompt and response together, for --dataset_name; as in am_train.py"""
    truncate_prompts: bool = False
    """keep the end of a prompt that is too long instead of refusing it"""
    per_device_eval_batch_size: int = 32
    """texts per forward pass, for --dataset_name"""


# --- a = r - e in a dozen lines: the card of an exported model repeats them ---


class AdvantageModel:
    """a(x, y) = r(x, y) - e(x) [Eq. 8, K = 0] of a causal LM, by transformers and safetensors.

    A prompt is a string, or a list of {role, content} if the tokenizer has a chat template. Texts
    are scored one at a time, so that no padding can go wrong, and are not shortened.
    """

    def __init__(self, folder, device="cpu"):
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        load = AutoModelForSequenceClassification.from_pretrained
        self.model = load(folder, num_labels=1, dtype=torch.float32).to(device).eval()
        # weight (1, hidden) and bias
        self.e_head = load_file(f"{folder}/expected_reward_head.safetensors", device=device)

    @torch.no_grad()
    def score(self, prompts, responses):
        texts = zip(map(self.render, prompts), responses, strict=True)
        return [self.advantage(text, response) for text, response in texts]

    def render(self, prompt):
        chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        template = self.tokenizer.chat_template and self.tokenizer.apply_chat_template
        return template(chat, add_generation_prompt=True, tokenize=False) if template else prompt

    def end(self):
        """The token that the template puts behind an answer, or else <eos>."""
        ids, answer = [], [{"role": "user", "content": "x"}, {"role": "assistant", "content": "Hi"}]
        if self.tokenizer.chat_template:
            text = self.tokenizer.apply_chat_template(answer, tokenize=False)
            _, found, behind = text.rpartition("Hi")
            ids = self.tokenizer(behind, add_special_tokens=False).input_ids if found else []
        added = self.tokenizer.added_tokens_decoder
        special = (i for i in ids if i in added and added[i].special)
        return next(special, self.tokenizer.eos_token_id)

    def advantage(self, text, response):
        x = self.tokenizer(text, add_special_tokens=not self.tokenizer.chat_template).input_ids
        x = x[: -1 if x[-1] == self.tokenizer.eos_token_id else None]  # no end behind a prompt
        y = self.tokenizer(response, add_special_tokens=False).input_ids
        y = y[: -1 if y[-1:] == [self.end()] else None]
        ids = torch.tensor([[*x, *y, self.end()]], device=self.model.device)
        hidden = self.model.base_model(ids).last_hidden_state[0]
        e = F.linear(hidden[len(x) - 1], **self.e_head)
        return (self.model.score(hidden[-1]) - e).item()


class EncoderAdvantageModel(AdvantageModel):
    """The same of an encoder, which reads x alone in a second pass: in the first it sees y."""

    def advantage(self, text, response):
        segments = getattr(self.model.config, "type_vocab_size", 0) > 1
        kinds = {"return_tensors": "pt", "return_token_type_ids": segments}
        pair = self.tokenizer(text, response, **kinds).to(self.model.device)
        alone = self.tokenizer(text, return_tensors="pt", return_token_type_ids=False)
        first = self.model.base_model(**alone.to(self.model.device)).last_hidden_state[0, 0]
        return (self.model(**pair).logits[0] - F.linear(first, **self.e_head)).item()


def load_advantage_model(folder, device="cpu"):
    """The AdvantageModel or EncoderAdvantageModel of a folder with an e head."""
    if not (Path(folder) / E_HEAD).is_file():
        known = "the score that AutoModelForSequenceClassification gives is a itself"
        raise InputError(f"{folder}: has no {E_HEAD}; {known}, or train with --expected_reward")
    try:
        model = AdvantageModel(folder, device)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{folder}: no scorer could be loaded ({first_line(error)})") from None
    return model if hasattr(model.model, "score") else EncoderAdvantageModel(folder, device)


# --- export ---


def model_card(scorer, openrlhf):
    """README.md of the exported folder: what its score is, and how a text must be encoded."""
    form = "`prompt response <eos>`; the prompt goes through the chat template, with its generation"
    form += " prompt, if there is one"
    if scorer.is_encoder:
        form = "the tokenizer's own pair, `[CLS] prompt [SEP] response [SEP]`"
    meaning = "the scorer's only score, a(x, y) if it was trained with --loss am"
    if scorer.e_head is not None:
        rest = "which was left out" if openrlhf else f"which needs {E_HEAD} and the lines below"
        meaning = f"r(x, y); a(x, y) is r(x, y) - e(x), {rest}"
    card = f"""# A scorer trained by am_train.py

`AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)` gives {meaning}.
Texts are {form}; pad on the right.
"""
    if scorer.e_head is None or openrlhf:
        return card
    classes = [AdvantageModel, EncoderAdvantageModel][: 1 + scorer.is_encoder]
    imports = "import torch\nimport torch.nn.functional as F\n"
    imports += "from safetensors.torch import load_file\n"
    imports += "from transformers import AutoModelForSequenceClassification, AutoTokenizer"
    code = "\n\n\n".join([imports, *(inspect.getsource(c).strip() for c in classes)])
    use = f"# {classes[-1].__name__}(folder).score(prompts, responses)"
    return f"{card}\n```python\n{code}\n\n\n{use}\n```\n"


def openrlhf_refusal(scorer, args):
    """Why OpenRLHF's loader would not give this scorer's a, or None."""
    if scorer.is_encoder:
        return "is an encoder; OpenRLHF reads the last token of a causal LM"
    if scorer.e_head is not None and not args.drop_expected_reward:
        remedy = "pass --drop_expected_reward True to export r alone"
        return f"has an e head, which OpenRLHF cannot read; {remedy}"
    prefix, width = scorer.model.base_model_prefix, scorer.model.config.hidden_size
    names = [k for k in scorer.model.state_dict() if not k.startswith(f"{prefix}.")]
    other = [name for name in names if name != "score.weight"]
    if other or scorer.model.score.in_features != width:  # its head: Linear(width, 1, bias=False)
        wrong = ", ".join(other) or "a score head that is not as wide as hidden_size"
        return f"has {wrong}, which OpenRLHF has not"
    return None


def measure(scorer, tokenizer, args):
    """Mean and (n - 1) std of r over both responses of every pair, as OpenRLHF's trainer does."""
    fields = {"chosen": "response", "rejected": "response"}
    rows = load_rows(args.dataset_name, {"prompt": "prompt"} | fields)
    sides = zip(*encode_rows(tokenizer, rows, fields, args, args.dataset_name), strict=True)
    texts = [text for pair in zip(*sides, strict=True) for text in pair]
    check_fits(scorer.model, tokenizer, max(len(ids) for ids, _ in texts))
    r, _ = score_texts(scorer, tokenizer, texts, args.per_device_eval_batch_size, bf16=False)
    return float(r.mean()), float(r.std(ddof=1))


def main(args: Args):
    source, target = Path(args.reward_model_path), Path(args.output_dir)
    openrlhf = args.format == "openrlhf"
    if target.resolve() == source.resolve():
        raise InputError(f"--output_dir {target}: is --reward_model_path; name another folder")
    if args.mean_std and args.dataset_name:
        raise InputError("--mean_std: given, so --dataset_name has nothing to measure; drop one")
    for flag in ("mean_std", "dataset_name", "drop_expected_reward"):
        if getattr(args, flag) and not openrlhf:
            raise InputError(f"--{flag}: belongs to --format openrlhf")
    tokenizer = load_tokenizer(args.reward_model_path, dedicated_pad=True)
    scorer = load_scorer(args.reward_model_path, tokenizer)
    card = model_card(scorer, openrlhf)
    if openrlhf:
        if refusal := openrlhf_refusal(scorer, args):
            raise InputError(f"{args.reward_model_path}: {refusal}")
        mean_std = measure(scorer, tokenizer, args) if args.dataset_name else args.mean_std
        scorer.e_head, config = None, scorer.model.config
        config.value_head_prefix = "score"
        if mean_std:
            config.mean, config.std = mean_std
            numbers = f"mean {config.mean:.6g}, std {config.std:.6g}"
            if not (math.isfinite(config.mean) and 0 < config.std < math.inf):
                flag = "--dataset_name" if args.dataset_name else "--mean_std"
                raise InputError(f"{flag}: gives {numbers}; the std must be positive")
            print(f"{numbers}: OpenRLHF uses them where rewards are to be normalised")
    scorer.save_pretrained(target, scorer.state_dict())
    tokenizer.save_pretrained(target)
    (target / "README.md").write_text(card, encoding="utf-8")
    print(f"scorer written to {target}")


if __name__ == "__main__":
    run_cli(main, Args, __doc__)
