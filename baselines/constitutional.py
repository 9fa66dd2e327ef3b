"""Constitutional AI before SFT: a judge criticises answers and writes them anew (Bai et al. 2022).

    for each prompt x:
        y ~ policy(. | x)
        critique ~ judge(. | x, y, principle)         a principle drawn for each round
        y = judge(. | x, y, principle, critique)      the revision, which the next round criticises

    python -m baselines.constitutional --judge openai:MODEL --model_name_or_path runs/sft/model \\
        --dataset_name prompts.jsonl --output_dir runs/revised
    python sft.py --dataset_name runs/revised/revisions.jsonl ...

Bai et al. (§3) let the policy itself criticise and revise: --judge hf:POLICY. Their second half, AI
feedback in the place of annotators, is baselines/rlaif.py.
"""

import random
from dataclasses import asdict, dataclass
from pathlib import Path

from baselines.rlaif import RATE, Answers, kept, sample_answers
from tools.judges import fill, load_judge
from utils import Count, InputError, environment, load_rows, refuse_finished, run_cli
from utils import write_json, write_jsonl

CRITIQUE = RATE.replace("You rate an answer", "You criticise an answer") + (
    "Principle: {b}\n\nSay in a few sentences where the answer breaks this principle, or how it "
    "could follow it better.\n"
)
REVISE = """

[Critique]
{a}
[End of critique]

Now write the answer anew, so that this critique no longer holds. Reply with the new answer alone.
"""
PRINCIPLES = (
    "The answer is harmless: it helps nobody to hurt people, to deceive them or to break the law.",
    "The answer is honest: it states nothing that is false, and says so where it is not sure.",
    "The answer is helpful: it does what was asked, completely and no more than that.",
    "The answer is respectful: it insults nobody and treats no group as worth less.",
)


@dataclass(kw_only=True)
class Args(Answers):
    judge: str
    """openai:MODEL or hf:MODEL"""
    judge_config: str | None = None
    """its settings, JSON (docs/JUDGES.md)"""
    num_revisions: Count = 1
    """rounds of critique and revision, each by another principle"""
    principles: str | None = None
    """a text file with one on each line, in the place of PRINCIPLES"""


def main(args: Args):
    path, principles = f"{args.output_dir}/revise.json", PRINCIPLES
    refuse_finished(path, args)
    if not args.judge.startswith(("openai:", "hf:")):
        raise InputError(f"--judge {args.judge}: must write text, as openai:MODEL or hf:MODEL does")
    judge = load_judge(args.judge, args.judge_config, args.output_dir, args.bf16)
    if args.principles:
        try:
            principles = Path(args.principles).read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--principles {args.principles}: cannot be read ({error})") from None
        principles = [line.strip() for line in principles if line.strip()]
    if len(principles) < args.num_revisions:
        raise InputError(f"--num_revisions: there are {len(principles)} principles")
    rows = load_rows(args.dataset_name, {"prompt": "prompt"}, args.max_prompts)
    draw = random.Random(args.seed)
    revisions = [
        kept(row) | {"response": y, "answer": y, "critiques": []}
        | {"principles": draw.sample(principles, args.num_revisions)}
        for row, [y] in zip(rows, sample_answers(args, rows), strict=True)
    ]  # fmt: skip
    for k in range(args.num_revisions):
        asked = [fill(CRITIQUE, r["prompt"], r["response"], r["principles"][k]) for r in revisions]
        judge.fetch(asked, lambda text: not judge.said(text))
        critiques = [judge.said(text) for text in asked]
        again = [text + fill(REVISE, "", c, "") for text, c in zip(asked, critiques, strict=True)]
        judge.fetch([t for t, c in zip(again, critiques, strict=True) if c])
        for row, text, critique in zip(revisions, again, critiques, strict=True):
            row["response"] = judge.said(text) if critique else ""
            row["critiques"].append(critique)
        revisions = [row for row in revisions if row["response"]]
    counts = {"revised": len(revisions), "without_reply": len(rows) - len(revisions)}
    if not revisions:
        raise InputError(f"--judge {args.judge}: revised none of {len(rows)} answers")
    write_jsonl(f"{args.output_dir}/revisions.jsonl", revisions)
    write_json(path, counts | {"args": asdict(args)} | environment())
    print("  ".join(f"{k} {v}" for k, v in counts.items()))


if __name__ == "__main__":
    run_cli(main, Args, __doc__)
