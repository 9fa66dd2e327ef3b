"""Do judges agree with people? Each judge against labelled pairs and ties, in one table.

    python -m tools.judge_agreement --judges length runs/rm/model openai:MODEL \\
        --dataset_name labelled.jsonl --ties ties.jsonl --output_dir runs/judges

accuracy    percent of the pairs whose chosen answer the judge prefers; its ties count half
kappa       Cohen's, over pairs and ties, so with three outcomes
flips       percent of the pairs whose winner changes with the order of the answers (openai:, hf:)

"The longer answer wins" (`length`) belongs beside every judge: a judge should beat it.
"""

import contextlib
import itertools
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from tools.judges import load_judge, load_scores
from tools.statistics import EXTRA, POINTS, check_bootstrap, column, different_sides, mean
from tools.statistics import resample, run_names, with_intervals
from utils import InputError, backend, environment, load_rows, refuse_finished, run_cli, write_json
from utils import write_jsonl


@dataclass
class Args:
    judges: tuple[str, ...]
    """any number of judges, each as `evaluate.py winrate --judge` takes one"""
    dataset_name: str
    """labelled pairs: `prompt`, `chosen`, `rejected`, optional `task` and `label_by`"""
    output_dir: str
    """receives judge_agreement.json and .md, and every judge's verdicts, verdicts.jsonl"""
    ties: str | None = None
    """labelled ties beside them: `prompt`, `response_a`, `response_b`, `label`: "tie" """
    label_by: tuple[str, ...] = ()
    """only rows whose `label_by` is one of these, such as human: those that people labelled"""
    names: tuple[str, ...] = ()
    """a name for each judge; a scorer's run folder, else the judge itself, by default"""
    tie_band: float = 0.0
    """judges that score: differences up to this are a tie, in each judge's own units"""
    judge_config: str | None = None
    """judges that compare: a JSON file of their settings (docs/JUDGES.md)"""
    num_bootstrap: int = 1000
    """resamples of the prompts behind every interval"""
    seed: int = 1
    """seed of the bootstrap"""
    max_length: int = 512
    """scorers: tokens of prompt and response together"""
    truncate_prompts: bool = False
    """keep the end of a prompt that is too long instead of refusing it"""
    per_device_eval_batch_size: int = 32
    """scorers: texts in a batch"""
    bf16: bool = False
    """matrix products in bfloat16"""


def load_labelled(args):
    """Rows {prompt, response, reference, tie, task}: of a pair the response is the chosen one."""
    rows = []
    fields = {"prompt": "prompt", "chosen": "response", "rejected": "response"}
    pairs = enumerate(load_rows(args.dataset_name, fields), 1)
    pairs = [row | {"file_line": line} for line, row in pairs]
    for row in different_sides(pairs, args.dataset_name):
        rows.append(row | {"response": row["chosen"], "reference": row["rejected"], "tie": False})
    fields = {"prompt": "prompt", "response_a": "response", "response_b": "response"}
    ties = load_rows(args.ties, fields | {"label": "text"}) if args.ties else []
    for i, row in enumerate(ties, 1):
        row["file_line"] = i
        if row["label"] != "tie":
            problem = f"field 'label' must be \"tie\", found {row['label']!r}"
            raise InputError(f"{args.ties}, line {i}: {problem}")
        answers = {"response": row["response_a"], "reference": row["response_b"]}
        rows.append(row | answers | {"tie": True})
    if args.label_by:
        found = dict.fromkeys(str(row.get("label_by")) for row in rows)
        if missing := [value for value in args.label_by if value not in found]:
            known = f"no row has it; `label_by` is one of: {', '.join(found)}"
            raise InputError(f"--label_by {missing[0]}: {known}")
        rows = [row for row in rows if row.get("label_by") in args.label_by]
    if all(row["tie"] for row in rows):
        raise InputError(f"{args.dataset_name}: holds no pair to judge; widen --label_by")
    return rows


def load_any(spec, args, rows):
    """A judge of either kind as a function (rows) -> points (rows,) of the response, which rows it
    reads as two equal texts, and a function of the kept rows (bool) that gives the flips."""
    if spec.startswith(("openai:", "hf:")):
        judge = load_judge(spec, args.judge_config, args.output_dir, args.bf16)

        def compared(rows):
            said = judge.compare(rows)
            points = np.array([POINTS[one["verdict"]] for one in said])
            of = lambda kept: judge.summary(list(itertools.compress(said, kept)))["flips"]  # noqa: E731
            return points, False, of

        return compared
    try:
        score = load_scores(spec, args)
    except InputError as error:
        known = "module:function, openai:MODEL, hf:MODEL, length or a scorer"
        raise InputError(f"--judges {spec}: expected {known} ({error})") from None
    if hasattr(score, "encode"):  # a text that does not fit is refused before any judge is paid
        with contextlib.redirect_stdout(None):
            score.encode(rows, ("response", "reference"))

    def scored(rows):
        responses, references = score(rows, ("response", "reference"))
        difference = responses - references
        if not np.isfinite(difference).all():
            raise InputError(f"--judges {spec}: gave a score that is no number")
        points = np.sign(difference) * (np.abs(difference) > args.tie_band)
        return points, getattr(score, "equal", False), lambda kept: None

    return scored


def kappa(points, ties, weights):
    """Cohen's kappa of a judge against labels -> samples; points (rows,) of the response that is
    chosen, ties (rows,): whether a tie is labelled.

    Which of two answers stands first means nothing, so every row counts in both orders: each side
    of the table then has (1 - ties) / 2 of either answer, and chance agrees in
    (1 - t)(1 - s) / 2 + t s, t and s the shares of ties. Without ties it is 2 accuracy - 1.
    """
    t, s = mean(weights, ties), mean(weights, points == 0)
    chance = (1 - t) * (1 - s) / 2 + t * s
    agree = mean(weights, np.where(ties, points == 0, points == 1))
    return (agree - chance) / np.maximum(1 - chance, 1e-12)  # nothing but ties on both sides: 0


def main(args: Args):
    check_bootstrap(args)
    folder, names = Path(args.output_dir), run_names(args.judges, args.names, "judges")
    refuse_finished(folder / "judge_agreement.json", args)
    rows, points, flips, said = load_labelled(args), [], [], []
    equal = np.zeros(len(rows), bool)
    backend.last_pass()
    judges = [load_any(spec, args, rows) for spec in args.judges]
    for name, judge in zip(names, judges, strict=True):
        of_rows, same, flips_of = judge(rows)
        equal |= same
        points.append(of_rows)
        flips.append(flips_of)
        said.append({"judge": name, "points": of_rows.tolist()})
        write_jsonl(folder / "verdicts.jsonl", said)  # before the next one, which may fail
    # what a cut made equal says nothing of its judge; a labelled tie may be equal from the start
    kept = ~(equal & [row["response"] != row["reference"] for row in rows])
    cut = f"{(~kept).sum()} of {len(rows)} rows cut to equal sides"
    rows = list(itertools.compress(rows, kept))
    if all(row["tie"] for row in rows):
        raise InputError(f"--max_length {args.max_length}: {cut}, and no pair is left; raise it")
    if not kept.all():
        print(f"--max_length {args.max_length}: {cut}, and left out")
    points, flips = [of_rows[kept] for of_rows in points], [flips_of(kept) for flips_of in flips]
    ties, prompts = np.array([row["tie"] for row in rows]), [str(row["prompt"]) for row in rows]
    tasks = column("" if row["tie"] else row.get("task", "all") for row in rows)
    weights = resample(prompts, args.num_bootstrap, np.random.default_rng(args.seed))
    rng = np.random.default_rng(args.seed)
    padded = resample(prompts, args.num_bootstrap, rng, len(EXTRA))
    padded[:, : len(rows)] *= ~ties  # accuracy speaks of the pairs
    report = {"pairs": int((~ties).sum()), "ties": int(ties.sum()), "prompts": len({*prompts})}
    report["left_out"] = np.flatnonzero(~kept).tolist()
    report |= {"label_by": args.label_by, "tie_band": args.tie_band, "judges": {}}
    for i, name in enumerate(names):
        right = 50 * (1 + points[i])
        samples = {"accuracy": mean(padded, np.append(right, 50 * (1 + EXTRA)))}
        samples["kappa"] = kappa(points[i], ties, weights)
        entry = {"judge": args.judges[i]} | with_intervals(samples) | {"flips": flips[i]}
        entry["tasks"] = {}
        for task in sorted({*tasks[~ties]}):
            of_task = right[(tasks == task) & ~ties]
            entry["tasks"][task] = {"accuracy": of_task.mean(), "pairs": len(of_task)}
        report["judges"][name] = entry
    report |= {"args": asdict(args)} | environment()
    write_json(folder / "judge_agreement.json", report)
    text = table(report)
    (folder / "judge_agreement.md").write_text(text, encoding="utf-8")
    print(text, end="")
    return report


def table(report):
    """judge_agreement.json as Markdown: one table of the judges, one by task."""

    def cells(*values):
        safe = (str(value).replace("|", "\\|").replace("<", "&lt;") for value in values)
        return "| " + " | ".join(safe) + " |"

    judges = report["judges"]
    lines = [f"{report['pairs']} pairs, {report['ties']} ties, {report['prompts']} prompts", ""]
    lines += [cells("judge", "accuracy", "kappa", "flips"), "|---|---|---|---|"]
    for name, entry in judges.items():
        bounds = entry["intervals"]
        accuracy = "{:.1f} [{:.1f}, {:.1f}]".format(entry["accuracy"], *bounds["accuracy"])
        kappa = "{:z.2f} [{:z.2f}, {:z.2f}]".format(entry["kappa"], *bounds["kappa"])
        flips = "–" if entry["flips"] is None else f"{entry['flips']:.1f}"
        lines.append(cells(name, accuracy, kappa, flips))
    lines += ["", cells("accuracy by task", "pairs", *judges), "|---" * (2 + len(judges)) + "|"]
    for task, first in next(iter(judges.values()))["tasks"].items():
        shown = (f"{entry['tasks'][task]['accuracy']:.1f}" for entry in judges.values())
        lines.append(cells(task, first["pairs"], *shown))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_cli(main, Args, __doc__)
