"""The reward card: what a calibration measured of a scorer, as the model card of its folder.

    python evaluate.py calibration --scorers runs/rm/model runs/am/model \\
        --dataset_name test.jsonl --output_dir runs/calibration
    python -m tools.reward_card --calibration runs/calibration                          # seconds

README.md (Hugging Face front matter, Markdown) in every scorer's folder, and its pictures in
reward_card/: calibration with bin counts, every task, how the score goes with length, the share of
scores beyond the bound, the most confident mistakes, the training as training.json beside the
weights has it, and how to load the model. Nothing is scored here. A README.md of somebody else's
stays as it is: the card is then REWARD_CARD.md. The card of a hub id goes into a folder of its name
in the calibration's.

Length is counted in characters, which need no tokenizer; slopes are in units of the std of all
scores, so that scorers of different scale can be compared. Text of the data is shortened and
escaped: on a card that others open, it must do nothing but be read.
"""

import hashlib
import json
import os
import re
import shlex
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tools.figures import draw
from tools.judges import as_text
from tools.statistics import column, load_calibration
from utils import E_HEAD, InputError, answer_end, environment, load_tokenizer, run_cli

OURS = "<!-- reward card of evaluate.py calibration"  # the line that tells our files from others
MARK = f"{OURS}: the next one rewrites this file unless this line is removed -->"
MISTAKES, TASKS = 10, 40  # how many the card lists at most
LOOSE_UNDERSCORE = r"(?<![^\W_])_|_(?![^\W_])"  # one within a word does nothing in Markdown
HISTOGRAM = "·▁▂▃▄▅▆▇█"  # an empty bin, then eighths of the fullest one


@dataclass
class Args:
    calibration: str
    """output folder of `evaluate.py calibration`"""
    names: tuple[str, ...] = ()
    """the scorers that get a card, by their names there (default: all)"""


# --- numbers ---


def equal_mass_index(confidence, num_bins=10):  # (pairs,) -> (pairs,) int
    """Bin of each pair when the edges are the sample's own quantiles, right edge included.

    The k-th edge is the ceil(k n / num_bins)-th smallest confidence. Equal confidences share a bin,
    whatever the order of the rows; where there are many, bins differ in size and some stay empty.
    """
    ranks = -(-np.arange(1, num_bins) * len(confidence) // num_bins)
    return np.digitize(confidence, np.sort(confidence)[ranks - 1], right=True)


def equal_mass_ece(confidence, correct, num_bins=10):  # each (pairs,)
    """ECE in points as evaluate.py defines it, over bins of equal mass instead of equal width."""
    gap = np.bincount(equal_mass_index(confidence, num_bins), correct - confidence)
    return 100 * np.abs(gap).sum() / len(confidence)


def noise_floor(confidence, index):  # (pairs,), (pairs,) int
    """About the ECE in points of a perfectly calibrated scorer: E|N(0, v)| = sqrt(2 v / pi).

    Pairs are taken as independent; pairs of one prompt are not, so the floor is a little higher.
    """
    variance = np.bincount(index, confidence * (1 - confidence))
    return 100 * np.sqrt(2 / np.pi * variance).sum() / len(confidence)


def length_slopes(chosen, rejected, chosen_length, rejected_length):  # each (pairs,)
    """Slopes of score on length, in stds of all scores per 100 characters: over all, within prompt.

    Within prompt is the least-squares slope of the pairs' score differences on their length
    differences, through the origin, so that swapping the two responses changes nothing: easy
    prompts that get long answers and high scores drop out of it. None where no length or no score
    differs.
    """
    scores = np.concatenate([chosen, rejected])
    lengths, unit = np.concatenate([chosen_length, rejected_length]), scores.std() / 100

    def slope(x, y):
        return float(x @ y / (x @ x) / unit) if x.any() and unit else None

    within = slope((chosen_length - rejected_length).astype(float), chosen - rejected)
    return slope(lengths - lengths.mean(), scores - scores.mean()), within


def confident_mistakes(rows, delta, limit=MISTAKES):  # (pairs,) dicts, (pairs,)
    """Indices of the pairs that are ranked wrongly by the largest margin, equal texts once."""
    found = {}
    for i in np.argsort(delta, kind="stable"):
        if delta[i] >= 0 or len(found) == limit:
            break
        texts = str(rows[i]["prompt"]), rows[i]["chosen"], rows[i]["rejected"]
        found.setdefault(texts, int(i))
    return list(found.values())


def task_rows(tasks, chosen, rejected, per_task):
    """One dict a task, those with most pairs first, and the edges of the histograms.

    All histograms share 12 bins from the 1st to the 99th percentile of all scores; the outer two
    are open.
    """
    tasks, scores = column(tasks), np.concatenate([chosen, rejected])
    edges, table = np.linspace(*np.percentile(scores, [1, 99]), 13), []
    cell = np.digitize(scores, edges[1:-1])
    correct = np.where(chosen == rejected, 0.5, chosen > rejected)
    for task in sorted({*tasks}):
        of_task = tasks == task
        counts = np.bincount(cell[np.tile(of_task, 2)], minlength=12)
        heights = np.ceil(8 * counts / counts.max()).astype(int)
        row = {"task": task, "pairs": int(of_task.sum())}
        row["accuracy"] = 100 * correct[of_task].sum() / row["pairs"]
        row |= {k: per_task[task][k] for k in ("mean", "std")}
        table.append(row | {"histogram": "".join(HISTOGRAM[h] for h in heights)})
    return sorted(table, key=lambda row: -row["pairs"]), edges


def training_run(scorer):
    """training.json, written with the weights of this folder, or None: hub ids and others. The run
    folder's config.json may be of a later run, whose weights are not there yet."""
    try:
        run = json.loads((Path(scorer) / "training.json").read_text(encoding="utf-8"))
        return run if isinstance(run["args"]["loss"], str) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def bound_of(run):
    """m(x) of Eq. 6 that the run was trained with, {task: m} with a "default", as am_train.py's
    --am_margin reads it; None where there is no bound or nobody knows it any more."""
    if not run or run["args"]["loss"] != "am":
        return None
    margin = run["args"].get("am_margin")
    try:
        try:
            return {"default": float(margin)}
        except ValueError:
            table = json.loads(Path(margin).read_text(encoding="utf-8"))
            return {str(k): float(m) for k, m in table.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return None


# --- text ---


def escape(text, limit=240):
    """Text of a data set as inert Markdown on one line, at most `limit` characters of it.

    White space becomes one space, control and direction characters a replacement mark, and what
    means something to Markdown, HTML, GitHub (mentions, www. links, $ mathematics) or Jekyll a
    numeric entity, which shows and does nothing. Of long text the middle is left out.
    """
    text = " ".join(text.split())
    if len(text) > limit:  # the end of a prompt often holds the question
        text = f"{text[: limit * 2 // 3]} … {text[-limit // 3 :]}"
    control = ("Cc", "Cf", "Cs")
    text = "".join("\ufffd" if unicodedata.category(c) in control else c for c in text)
    active = rf"[&<>`|\[\]*~#$\\{{}}@:!]|(?<=www)\.|{LOOSE_UNDERSCORE}"
    return re.sub(active, lambda match: f"&#{ord(match[0])};", text, flags=re.IGNORECASE)


def shown(path):
    """A path for a card that may be published, without what lies above the working folder."""
    path = Path(path)
    if path.is_absolute():
        inside = path.is_relative_to(Path.cwd())
        path = path.relative_to(Path.cwd()) if inside else Path("…", *path.parts[-2:])
    return str(path)


def file_hash(path):
    """The first 16 hex digits of a file's SHA-256, as a run's config.json has them, or None."""
    if not Path(path).is_file():
        return None
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def command_line(args):
    """The command that repeats the measurement; args: of calibration.json."""
    words = ["python evaluate.py calibration"]
    for name, value in args.items():
        values = value if isinstance(value, (tuple, list)) else [value]
        if value:
            words.append(f"--{name}")
            words += [shlex.quote(shown(v) if isinstance(v, str) else str(v)) for v in values]
    return " ".join(" ".join(words).split())  # on one line, so that no path can end the code block


def whole_conversation(scorer):
    """How to read the score of a conversation that the chat template writes as a whole, "" where
    that gives other tokens than am_train.py reads, or where there is no template."""
    tokenizer = load_tokenizer(scorer)
    if not tokenizer.chat_template:
        return ""
    question, answer = {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}
    end, how = answer_end(tokenizer), {"return_dict": False}
    try:
        before = tokenizer.apply_chat_template([question], add_generation_prompt=True, **how)
        ids = tokenizer.apply_chat_template([question, answer], **how)
    except Exception:  # a template is a program
        return ""
    ours = before + tokenizer("y", add_special_tokens=False).input_ids + [end]
    if ids[: len(ours)] != ours or end in ids[len(ours) :]:
        return ""
    token = tokenizer.convert_ids_to_tokens(end)
    code = (
        'messages.append({"role": "assistant", "content": response})',
        "ids = tokenizer.apply_chat_template(messages, return_dict=False)",
        f"end = tokenizer.convert_tokens_to_ids({json.dumps(token, ensure_ascii=False)})",
        "ids = ids[: len(ids) - ids[::-1].index(end)]",
    )
    return """

A chat template may write text behind the answer, as ChatML's line break. The score is read at the
token that ends the answer. So where the template writes the whole conversation, cut behind the last
such token:

```python
{}
```""".format("\n".join(code))


def loading_code(scorer, folder):
    """Python that gives r(x, y) from the files alone, of the tokens that am_train.py reads."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    tokenizer = load_tokenizer(scorer)
    with torch.device("meta"):  # the architecture without its weights
        config = AutoConfig.from_pretrained(scorer, num_labels=1)
        model = AutoModelForSequenceClassification.from_config(config)
    template, encoder = bool(tokenizer.chat_template), not hasattr(model, "score")
    lines = [
        "import torch",
        "from transformers import AutoModelForSequenceClassification, AutoTokenizer",
        "",
        f"folder = {json.dumps(folder, ensure_ascii=False)}  # or where you put the model",
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        "load = AutoModelForSequenceClassification.from_pretrained",
        "model = load(folder, num_labels=1, dtype=torch.float32).eval()",
        'prompt, response = "the prompt", "the response"',
    ]
    if not encoder and tokenizer.pad_token_id == tokenizer.eos_token_id:
        why = "it is <eos> here, which would be read one token early"
        lines.append(f"model.config.pad_token_id = None  # {why}")
    if template:
        flags = "add_generation_prompt=True, tokenize=False"
        lines.append('messages = [{"role": "user", "content": prompt}]')
        lines.append(f"prompt = tokenizer.apply_chat_template(messages, {flags})")
    if encoder:
        # a scorer always marks the response where the model knows segments; tokenizers may not
        segments = getattr(model.config, "type_vocab_size", 0) > 1
        flags = f'return_tensors="pt", return_token_type_ids={segments}'
        lines.append(f"inputs = tokenizer(prompt, response, {flags})")
        score = "model(**inputs)"
    else:
        special = ", add_special_tokens=False" if template else ""
        lines.append(f"ids = tokenizer(prompt{special}).input_ids")
        lines.append("ids += tokenizer(response, add_special_tokens=False).input_ids")
        end, ends = answer_end(tokenizer), "tokenizer.eos_token_id"
        if end != tokenizer.eos_token_id:
            token = json.dumps(tokenizer.convert_ids_to_tokens(end), ensure_ascii=False)
            ends = f"tokenizer.convert_tokens_to_ids({token})"
        lines.append(f"ids += [{ends}]  # the end of an answer, where the score is read")
        score = "model(torch.tensor([ids]))"
    return "\n".join([*lines, "with torch.no_grad():", f"    score = {score}.logits.item()"])


def table(head, rows, right=()):
    line = ["---:" if i in right else "---" for i in range(len(head))]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (head, line, *rows))


def number(value, form="+.3f"):
    return "–" if value is None else format(value, form)


def bound_text(margin):
    if set(margin) == {"default"}:
        return f"m = {margin['default']:g}"
    of_task = ", ".join(f"{escape(k, 60)} {m:g}" for k, m in margin.items())
    return f"m(x) by task, as its file has it now: {of_task}"


def beyond_text(run, margin, scores, tasks):
    """How many scores (2, pairs) lie beyond the bound, where there is one and it is known."""
    if margin == {"default": np.inf}:
        return "none: m = inf"
    if margin:
        m = np.array([margin.get(t, margin.get("default", np.nan)) for t in tasks])
        beyond = (np.abs(scores) > m)[:, ~np.isnan(m)].mean()
        single = set(margin) == {"default"}
        bound = bound_text(margin) if single else "m(x), which differs by task"
        largest = f"the largest is {np.abs(scores).max():.2f}"
        return f"{100 * beyond:.2f} % have \\|a\\| > {bound}; {largest}"
    if run is None:
        return "not known, since the training is not recorded"
    if run["args"]["loss"] == "am":
        return "not known, since the margins are not"
    what = "Eq. 1" if run["args"]["loss"] == "rm" else "its loss"
    return f"this scorer has none: {what} bounds nothing"


def longer_text(delta, difference):  # (pairs,): scores and characters, chosen - rejected
    unequal = difference != 0
    if not unequal.any():
        return "all pairs are of equal length"
    labels = 100 * (difference > 0)[unequal].mean()
    scored = 100 * np.where(delta == 0, 0.5, delta * difference > 0)[unequal].mean()
    return f"chosen by the labels in {labels:.1f} %, by the scorer in {scored:.1f} % of the pairs"


def mistakes_text(rows, scores):
    """The pairs that the scorer ranks wrongly by the largest margin, with what it said of them."""
    lines = []
    for k, i in enumerate(confident_mistakes(rows, scores[0] - scores[1]), 1):
        row, (chosen, rejected) = rows[i], scores[:, i]
        head = f"{k:2}. confidence {100 / (1 + np.exp(chosen - rejected)):.1f} %"
        if "prob_chosen" in row:
            head += f"   true p(chosen) {100 * row['prob_chosen']:.1f} %"
        lines.append(f"{head}   {escape(str(row.get('task', '')), 60)}".rstrip())
        lines.append(f"    prompt            {escape(as_text(row['prompt']))}")
        lines.append(f"    chosen   {chosen:+8.3f} {escape(row['chosen'])}")
        lines.append(f"    rejected {rejected:+8.3f} {escape(row['rejected'])}")
    return "\n".join(lines)


def training_text(run, margin, measured):
    """What training.json says; `measured`: hash of the pairs of the card."""
    if run is None:
        return "The settings are not recorded: no training.json is beside the weights."
    a, hashes = run["args"], run["data"] if isinstance(run.get("data"), dict) else {}
    loss = {"rm": "Eq. 1, the ranking loss of a reward model", "am": "Eq. 6, the advantage model"}
    lines = [f"- loss: {loss.get(a['loss'], escape(a['loss']))}"]
    if margin:
        lines[0] += f", margin {bound_text(margin)}"
    for label, flag in (("started from", "model_name_or_path"), ("pairs", "dataset_name")):
        hashed = hashes.get(str(a.get(flag)))
        line = f"- {label}: {escape(shown(str(a.get(flag))))}"
        line += f" (SHA-256 {escape(str(hashed))}…)" if hashed else ""
        if flag == "dataset_name" and hashed and hashed == measured:
            same = "the same file as measured here: these numbers are of training data"
            line += f" — **{same}**"
        lines.append(line)
    names = ("expected_reward", "learning_rate", "global_batch_size", "num_train_epochs")
    names += ("max_length", "seed")
    known = [f"{n.replace('_', ' ')} {escape(str(a[n]))}" for n in names if n in a]
    versions = run["versions"] if isinstance(run.get("versions"), dict) else {}
    code = [f"{k} {v}" for k, v in ({"commit": run.get("commit")} | versions).items()]
    code = ", ".join(escape(words) for words in code)
    return "\n".join([*lines, "- " + ", ".join(known), f"- {code}"])


WRAPPER = f"""To compare prompts it takes a = r − e: the e head lies beside the model ({E_HEAD}),
and the wrapper is in the Steady RLHF repository:

```python
from tools.export_reward_model import load_advantage_model

scores = load_advantage_model(folder).score(["the prompt"], ["the response"])  # a, one a pair
```"""


def loading_text(scorer, folder, loss, e_head):
    """The code that loads the score, and what the score may be compared with."""
    before = "This gives the score that the numbers above are about."
    after = {
        "rm": "Eq. 1 leaves a constant free for every prompt: compare scores of responses to one "
        "prompt only.",
        "am": "The score is the advantage a(x, y) itself, meant to be comparable across prompts.",
    }.get(loss, "Compare responses to one prompt, unless the training made prompts comparable.")
    if e_head:
        before = (
            "AutoModel gives r, which ranks the responses to one prompt. The numbers above are "
        )
        before, after = before + "of a = r − e.", WRAPPER
    code = loading_code(scorer, folder)
    whole = "" if "ids = " not in code else whole_conversation(scorer)
    return f"{before}\n\n```python\n{code}\n```{whole}\n\n{after}"


def card(scorer, name, rows, scores, entry, args, folder):
    """The card's text; scores (2, pairs); entry and args of calibration.json; folder: where the
    code finds the model."""
    run, (chosen, rejected), known = training_run(scorer), scores, "ece_vs_truth" in entry
    loss, margin, e_head = run and run["args"]["loss"], bound_of(run), Path(scorer) / E_HEAD
    tasks, delta = [row.get("task", "all") for row in rows], chosen - rejected
    correct, confidence = np.where(delta == 0, 0.5, delta > 0), 1 / (1 + np.exp(-np.abs(delta)))
    width = np.digitize(confidence, np.linspace(0.5, 1, 11)[1:-1], right=True)
    mass = equal_mass_index(confidence)
    sizes = np.bincount(mass)[np.unique(mass)]
    lengths = [np.array([len(row[side]) for row in rows]) for side in ("chosen", "rejected")]
    slope, within = length_slopes(chosen, rejected, *lengths)
    prompts = len({str(row["prompt"]) for row in rows})
    floors = [noise_floor(confidence, index) for index in (width, mass)]
    ece_mass = equal_mass_ece(confidence, correct)
    half = f"equal scores count half; {(delta == 0).sum():,} here"
    truth = f"{entry.get('ece_vs_truth', 0):.2f} points"
    numbers = [
        ["pairs, prompts", f"{len(rows):,} pairs of {prompts:,} prompts"],
        ["accuracy", f"{entry['accuracy']:.2f} % ({half})"],
        ["ECE, equal width", f"{entry['ece']:.2f} points; noise floor {floors[0]:.2f}"],
        ["ECE, equal mass", f"{ece_mass:.2f} points; noise floor {floors[1]:.2f}"],
        *[["ECE to the true probabilities", truth]][:known],
        ["Brier, NLL", f"{entry['brier']:.4f}, {entry['nll']:.4f} nats (a coin: 0.2500, 0.6931)"],
        ["mean, std of the scores", f"{scores.ravel().mean():+.3f}, {entry['score_std']:.3f}"],
        ["scores beyond the bound", beyond_text(run, margin, scores, tasks)],
        ["length slope, all responses", f"{number(slope)} std per 100 characters"],
        ["length slope, within prompt", f"{number(within)} std per 100 characters"],
        ["the longer response", longer_text(delta, lengths[0] - lengths[1])],
    ]
    bins, columns = [], ("confidence", "accuracy", "truth")[: 2 + known]
    for b, v in enumerate(entry["bins"]):
        cells = [number(v[k] and 100 * v[k], ".1f") for k in columns]
        bins.append([f"{0.5 + b / 20:.2f} – {0.55 + b / 20:.2f}", f"{v['count']:,}", *cells])
    head = ["confidence", "pairs", "mean confidence, %", "accuracy, %", "true probability, %"]
    of_tasks, edges = task_rows(tasks, chosen, rejected, entry["per_task"])
    low, high = edges[[0, -1]]
    left_out, task_cells = len(of_tasks) - TASKS, []
    for t in of_tasks[:TASKS]:
        spread = [f"{t['accuracy']:.1f}", f"{t['mean']:+.3f}", f"{t['std']:.3f}"]
        task_cells.append([escape(t["task"], 60), f"{t['pairs']:,}", *spread, t["histogram"]])
    fewest = f" The {left_out} tasks with fewest pairs are left out." if left_out > 0 else ""
    mistakes, hashed = mistakes_text(rows, scores), file_hash(args["dataset_name"])
    said = "The rejected response scores higher." if mistakes else "There is none."
    if mistakes and known:
        said += " A true p(chosen) below 50 % means that the label is the mistake."
    data = escape(shown(args["dataset_name"])) + (f" (SHA-256 {hashed}…)" if hashed else "")
    env = environment()
    versions = ", ".join(f"{k} {v}" for k, v in env["versions"].items())
    tags = "\n".join(["- reward-model", "- rlhf", *["- advantage-model"] * (loss == "am")])
    return f"""---
library_name: transformers
pipeline_tag: text-classification
tags:
{tags}
---
{MARK}

# Reward card: {escape(name)}

A scorer of responses: the higher {"a = r − e" if e_head.is_file() else "the score"}, the better,
and p(y1 preferred to y2) = s(score of y1 − score of y2) with the logistic function s. Measured on
{data}.

![Reliability](reward_card/reliability.png)
![Score histograms](reward_card/histograms.png)
![Tasks](reward_card/task_balance.png)

## Numbers

{table(["", ""], numbers)}

Confidence is s(\\|difference of scores\\|), in [0.5, 1]. Equal width: 10 bins of 0.05, right edge
included. Equal mass: 10 bins with edges at the deciles of the confidence, right edge included,
equal confidences in one bin (sizes here: {sizes.min():,} to {sizes.max():,} pairs in {len(sizes)}
bins). The noise floor is about what a perfectly calibrated scorer shows on as many independent
pairs. Brier and NLL are of p(chosen preferred). A length slope is the least-squares slope of score
on characters of the response, in stds of all scores; within prompt it is the slope of the score
differences on the length differences of the pairs, which prompts that ask for longer answers cannot
feign. Whether longer answers are better is for the labels to say: compare the last two shares.

## Reliability

{table(head[: 4 + known], bins, range(1, 5))}

## Tasks

Scores of chosen and rejected responses together.{fewest} Histograms: 12 bins from {low:+.2f} to
{high:+.2f}, the outer two open, heights relative to the task's fullest bin, · empty.

{table(["task", "pairs", "accuracy, %", "mean", "std", "histogram"], task_cells, range(1, 5))}

## The most confident mistakes

{said}

<pre>
{mistakes}
</pre>

## Training

{training_text(run, margin, hashed)}

## Loading

{loading_text(scorer, folder, loss, e_head.is_file())}

## How this was measured

```sh
{command_line(args)}
```

{versions}; commit {env["commit"]}; {env["machine"]["device"]}. Folders above the working folder are
left out of paths.
"""


# --- files ---


def is_ours(path):
    """Whether the mark of our cards is its first line, or the first one after the front matter."""
    text = path.read_text(encoding="utf-8", errors="replace")
    if text.startswith("---\n"):
        text = text[4:].partition("\n---\n")[2]
    return text.startswith(OURS)


def place(folder):
    """README.md, or REWARD_CARD.md where somebody else's README.md stands."""
    for path in (folder / "README.md", folder / "REWARD_CARD.md"):
        if not path.exists() or is_ours(path):
            return path
    raise InputError(f"{folder}: README.md and REWARD_CARD.md are not cards of ours")


def main(args: Args):
    report, scores, rows = load_calibration(args.calibration)
    scorers = dict(zip(report["scorers"], report["args"]["scorers"], strict=True))
    if unknown := [name for name in args.names if name not in scorers]:
        raise InputError(f"--names {unknown[0]}: not one of {', '.join(scorers)}")
    tasks = [row.get("task", "all") for row in rows]
    for name in args.names or scorers:
        scorer, entry = scorers[name], report["scorers"][name]
        if Path(scorer).is_file():
            print(f"{name}: {scorer} holds scores and no model, so it gets no card")
            continue
        folder, model = Path(scorer), "."
        if not folder.is_dir():  # a hub id
            plain_name = name.replace("/", "_").strip(".") or "scorer"
            folder, model = Path(args.calibration) / plain_name, shown(scorer)
        try:
            (folder / "reward_card").mkdir(parents=True, exist_ok=True)
            path, aside = place(folder), folder / "reward_card" / "README.md.tmp"
            text = card(scorer, name, rows, scores[name], entry, report["args"], model)
            aside.write_text(text, encoding="utf-8")
            os.replace(aside, path)  # a reader never meets half a card; a link is replaced
            draw({name: entry}, scores, tasks, folder / "reward_card")
        except OSError as error:
            problem = f"no reward card can be written here ({error})"
            raise InputError(f"{folder}: {problem}") from None
        theirs = "" if path.name == "README.md" else "; README.md there is not ours and stays"
        print(f"{name}: reward card written to {path}{theirs}")


if __name__ == "__main__":
    run_cli(main, Args, __doc__)
