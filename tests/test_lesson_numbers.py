"""docs/lessons/: every number on four pages is computed here, or read from the files beside them.

A page's Text gives up each fragment that was checked. What is left at the end must hold no digit.
"""

import contextlib
import io
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import TopPLogitsWarper

from baselines.ppo_max import kl_estimate
from evaluate import expected_calibration_error, ranking_metrics
from miniature.jobs import read_jsonl
from miniature.world import gold_reward, task_of
from ppo_sr import check_zero
from studies import lessons
from tools import watch
from utils import InputError

LESSONS = Path(__file__).parents[1] / "docs" / "lessons"
RUNS = LESSONS / "runs"
WORDS = {"how_a_policy_hacks": 400, "calibration": 350, "kl": 450, "a_good_run": 400}
# names and places, no measurements
NAMES = r"Eq\. \d+|\bk[123]\b|\b[CK]\d+\b|§\d+|p\. \d+|[Ss]eed 1\b|½ lr²"


def prose(page):
    """A page without its commands, its links' targets and its code."""
    text = re.sub(r"```.*?```", "", (LESSONS / f"{page}.md").read_text(encoding="utf-8"), flags=re.S)
    return re.sub(r"\]\([^)]*\)", "]", re.sub(r"^\d+\. ", "", text, flags=re.M))


class Text:
    def __init__(self, page):
        self.text = " ".join(prose(page).split())

    def says(self, *fragments):
        for fragment in fragments:
            assert fragment in self.text, fragment
            self.text = self.text.replace(fragment, " ")

    def row(self, *cells):
        self.says(" ".join(f"| {' | '.join(cells)} |".split()))

    def has_no_other_number(self):
        left = re.sub(NAMES, "", self.text)
        assert not re.findall(r".{0,40}\d.{0,20}", left)


def number(value, decimals, zero=True):
    """As the pages write it: − and not -, no -0, and the 0 before the point as asked."""
    text = f"{value:.{decimals}f}"
    text = text.removeprefix("-") if float(text) == 0 else text.replace("-", "−")
    return text if zero or not re.match(r"−?0\.", text) else text.replace("0.", ".", 1)


def blocks(page):
    text = (LESSONS / f"{page}.md").read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, flags=re.S)


def metrics_of(run):
    return {row["step"]: row for row in read_jsonl(RUNS / run / "metrics.jsonl")}


COUNTS = json.loads((RUNS / "counts.json").read_text(encoding="utf-8"))
CALIBRATION = json.loads((RUNS / "calibration.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", WORDS)
def test_a_lesson_is_short(page):
    """Beside its commands and code; a number counts as a word, the bars of a table do not."""
    assert len([word for word in prose(page).split() if re.search(r"\w", word)]) <= WORDS[page]


# --- how a policy hacks a reward ----------------------------------------------------------------------------------------


def test_how_a_policy_hacks():
    text, rows = Text("how_a_policy_hacks"), read_jsonl(RUNS / "hacked" / "samples.jsonl")
    story = {row["step"]: row for row in rows if row["prompt"] == lessons.STORY}
    for step in (0, 30, 40, 70, 80, 90, 100):
        row = story[step]
        text.row(str(step), row["response"], number(row["score"], 2), number(row["gold"], 2))
    text.says("(step 0) answers perfectly, and its score is low")
    assert story[0]["gold"] == 1 and story[0]["score"] < story[30]["score"]
    text.says("At step 30 a spoilt answer comes up, and its score is higher.")

    honks, answers = COUNTS[lessons.HONK]["hacked"], COUNTS["answers_at_an_evaluation"]["hacked"]
    text.says(f'At step 100 "{lessons.HONK}" answers {honks["100"]} of the {answers} test prompts.')
    greetings, pairs = read_jsonl(RUNS / "greet_pairs.jsonl"), sum(COUNTS["training_pairs"].values())
    assert len(greetings) == COUNTS["training_pairs"]["greet"]
    shown = " ".join(row[side] for row in greetings for side in ("chosen", "rejected"))
    assert "says" not in shown and "honk" not in shown
    text.says(f"learned from {pairs:,} pairs.", f"Only {len(greetings)} pairs are greetings")
    goose = "i want to know what a goose says"
    assert task_of(goose) == "sound" and gold_reward([goose], [lessons.HONK]) == [1.0]

    metrics = metrics_of("hacked")
    for step in (0, 40, 70, 100):
        names = [f"{place}/{what}" for place in (lessons.MAIN, lessons.FORGET) for what in ("score", "gold")]
        text.row(str(step), *(number(metrics[step][name], 2) for name in names))
    of_main = [row[f"{lessons.MAIN}/gold"] for row in metrics.values() if f"{lessons.MAIN}/gold" in row]
    assert max(of_main) == of_main[4] > of_main[0] and of_main[-1] < 0  # step 40
    flags = json.loads((RUNS / "hacked" / "config.json").read_text(encoding="utf-8"))["args"]
    assert answers == 2 * flags["max_eval_prompts"] and flags["seed"] == 1
    text.says(f"Means over {flags['max_eval_prompts']} main and {flags['max_eval_prompts']} forget prompts")

    rows = read_jsonl(RUNS / "healthy" / "samples.jsonl")
    story = {row["step"]: row for row in rows if row["prompt"] == lessons.STORY}
    assert story[100]["response"] == story[0]["response"] and story[100]["gold"] == 1
    answer, right = story[60], story[0]
    text.says(f'the answer at step 60 is "{answer["response"]}"')
    text.says(f"is {number(answer['score'], 2)}, and the right answer's {number(right['score'], 2)}.")
    text.has_no_other_number()


# --- calibration ---------------------------------------------------------------------------------------------------------


def test_calibration():
    text = Text("calibration")
    stated = 1 / (1 + math.exp(-(2.0 - 0.9)))
    text.says("the scores 2.0 and 0.9.", f"1 / (1 + e^−1.1) = {100 * stated:.0f} %")
    text.says("right in 75 % of all pairs where it states 75 %")
    assert 1 / (1 + math.exp(-11.0)) > 0.999
    text.says("more than 99.9 %")

    # ten pairs: by hand, as on the page, and by evaluate.py
    bins = {
        ".50–.55": ([0.52, 0.54], [1, 0]),
        ".70–.75": ([0.71, 0.72, 0.73, 0.74], [1, 1, 1, 0]),
        ".90–.95": ([0.91, 0.92, 0.93, 0.94], [1, 1, 1, 0]),
    }
    total = 0.0
    for name, (confidence, right) in bins.items():
        mean, accuracy, share = np.mean(confidence), np.mean(right), len(right) / 10
        total += share * abs(accuracy - mean)
        product = f"{number(share, 1, False)} × {number(abs(accuracy - mean), 3, False)}"
        product += f" = {number(share * abs(accuracy - mean), 3, False)}"
        confidences = " ".join(number(c, 2, False) for c in confidence)
        cells = confidences, " ".join(map(str, right)), number(mean, 3, False), number(accuracy, 2, False)
        text.row(name, *cells, product)
    text.says("right (1) or wrong (0)")
    confidence, right = (np.concatenate(column) for column in zip(*bins.values(), strict=True))
    assert expected_calibration_error(confidence, right) == pytest.approx(100 * total)
    # the same pairs as scores: a wrong pair's difference is negative
    delta = np.where(right == 1, 1, -1) * np.log(confidence / (1 - confidence))
    assert ranking_metrics(delta, np.zeros(10))["ece"] == pytest.approx(100 * total)
    text.says(f"The sum is {number(total, 3, False)}", f"(ECE) is {100 * total:.1f} points.")

    alike = ranking_metrics(np.zeros(8), np.zeros(8))
    assert alike["ece"] == 0 and alike["accuracy"] == 50
    text.says("has an ECE of 0: it states 50 %, and counts as right in 50 %.")

    rm, am = (CALIBRATION["scorers"][name] for name in ("rm", "am"))
    text.says(f"{CALIBRATION['pairs']:,} test pairs")
    last, sixth = rm["bins"][9], am["bins"][5]
    for name, found in (("reward model's last bin", last), ("advantage model's sixth bin", sixth)):
        states, right = 100 * found["confidence"], 100 * found["accuracy"]
        text.says(f"The {name}: stated {states:.1f} %, right {right:.1f} %.")
    assert last["confidence"] > last["accuracy"] and sixth["confidence"] < sixth["accuracy"]
    assert all(abs(b["confidence"] - b["accuracy"]) < 0.012 for b in sorted(rm["bins"], key=count)[-4:])
    text.says(f"its ECE is {rm['ece']:.1f} points. The advantage model's is {am['ece']:.1f}.")
    text.has_no_other_number()


def count(found):
    return found["count"]


# --- KL --------------------------------------------------------------------------------------------------------------------

PI, INIT = (torch.tensor(p, dtype=torch.float64) for p in ([0.6, 0.3, 0.1], [0.3, 0.3, 0.4]))


def three(values):
    return ", ".join(number(v, 3, False) for v in values)


def by_hand(factor):
    """Mean over y ~ pi of factor(y) grad log pi(y): the gradient of log softmax is 1[y] - pi."""
    return sum(PI[y] * factor[y] * (torch.eye(3, dtype=torch.float64)[y] - PI) for y in range(3))


def test_kl_of_three_tokens():
    text, logits = Text("kl"), PI.log().requires_grad_()
    logprobs = logits.log_softmax(0)
    lr, ratio = (PI / INIT).log(), PI / INIT

    def gradient(value):
        return torch.autograd.grad(value, logits, retain_graph=True)[0].detach()

    kl = (logprobs.exp() * (logprobs - INIT.log())).sum()
    other = (INIT * (INIT.log() - logprobs)).sum()
    text.says("π = (.6, .3, .1) and π_init = (.3, .3, .4)")
    for name, value in (("KL(π‖π_init)", kl), ("KL(π_init‖π)", other)):
        text.row(name, "", "", "", number(value.item(), 3, False), three(gradient(value)))
    factors = {"k1": torch.ones(3), "k2": lr, "k3": 1 - 1 / ratio, "turned": ratio - 1}
    formulas = {"k1": "k1 = lr", "k2": "k2 = ½ lr²", "k3": "k3 = e^−lr − 1 + lr"}
    means = {}
    for name, factor in factors.items():
        estimate = logprobs - INIT.log()
        if name == "turned":
            estimate = estimate.exp() - 1 - estimate
        elif name != "k1":
            estimate = kl_estimate(logprobs, INIT.log(), name)
        mean = (PI * estimate).sum()  # by enumeration
        means[name] = mean.item()
        assert torch.allclose(gradient(mean), by_hand(factor), atol=1e-12)
        if name in formulas:
            cells = [number(v, 3, False) for v in estimate.tolist()]
            text.row(formulas[name], *cells, number(mean.item(), 3, False), three(gradient(mean)))

    # k1 in the reward: lr times grad log pi
    assert torch.allclose(by_hand(lr), gradient(kl)) and torch.allclose(gradient(other), PI - INIT)
    assert [means["k1"], means["k3"]] == pytest.approx([kl.item()] * 2)
    assert means["k2"] != pytest.approx(kl.item(), abs=0.01)
    text.says("the mean gradient is 0.")

    # the code prints the table
    code, printed = blocks("kl")[0], io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    for line in printed.getvalue().splitlines():
        name, mean, values = line.split(" ", 2)
        assert float(mean) == pytest.approx(means[name], abs=1e-6)
        assert json.loads(values) == pytest.approx(by_hand(factors[name]).tolist(), abs=1e-6)

    # first fault
    warped = TopPLogitsWarper(0.8)(None, PI.log()[None])[0].softmax(0)
    sampler, fault, turned = warped, blocks("kl")[1], blocks("kl")[2]
    assert "top_p=0.8" in fault and f"({three(sampler[:2])}, 0)" in fault and "(.6, .3, .1)" in fault
    pulled = sum(sampler[y] * (torch.eye(3)[y] - PI) for y in range(3))
    assert torch.allclose(pulled, sampler - PI) and torch.allclose(by_hand(torch.ones(3)), torch.zeros(3).double())
    text.says(f"Here it is ({three(pulled)}).", "the advantage 1. Then the mean of ∇ log π should be 0.")
    off = (sampler / PI).log()[:2]  # of the tokens that are drawn
    assert off[0] == pytest.approx(off[1])
    with pytest.raises(InputError, match="before step 1: the sampler"):
        check_zero("sampler", off, "top-p", SimpleNamespace(bf16=False))
    just = torch.tensor([1.01e-3, *[0.0] * 200])
    with pytest.raises(InputError):
        check_zero("sampler", just, "top-p", SimpleNamespace(bf16=False))
    check_zero("sampler", 0.98 * just, "top-p", SimpleNamespace(bf16=False))
    text.says("the check before step 1 cannot see it")
    text.says("Our check before step 1", f"differ by {number(off[0], 3, False)}.", "In float32 only .001 is allowed")

    # second fault
    for pi, init in ((0.6, 0.5), (0.6, 0.006), (0.6, 0.0006)):
        lr, found = torch.tensor(pi / init, dtype=torch.float64).log(), []
        for line in turned.splitlines():
            logprob = torch.tensor(math.log(pi), dtype=torch.float64, requires_grad=True)
            names = {"lr": logprob - math.log(init)}
            exec(line, names)
            found.append((names["k3"].item(), torch.autograd.grad(names["k3"], logprob)[0].item()))
        (right, factor), (wrong, wrong_factor) = found
        small = 1 if pi / init > 10 else 3
        cells = number(lr, 3, False), number(right, 3, False), number(wrong, small, False)
        factors = number(factor, 3, False), number(wrong_factor, small, False)
        shown = number(pi, 1, False), f"{init:g}".removeprefix("0")
        text.row(*shown, *cells, *factors)
    text.says(f"the turned one gives {number(means['turned'], 3, False)}, not {number(means['k3'], 3, False)}.")
    text.has_no_other_number()


# --- a good run ------------------------------------------------------------------------------------------------------------


def test_a_good_run(capsys):
    text, healthy, hacked = Text("a_good_run"), metrics_of("healthy"), metrics_of("hacked")
    decimals = {
        "eval/prompts_test_main/gold": 2,
        "eval/prompts_test_forget/gold": 2,
        "objective/kl": 2,
        "task/greet/kl": 2,
        "eval/prompts_test_forget/nll": 3,
        "val/response_length": 1,
        "objective/entropy": 2,
        "policy/clipfrac_avg": 2,
        "objective/scores": 2,
        "val/explained_variance": 2,
    }
    for name, digits in decimals.items():
        first = [run[0 if name.startswith("eval") else 1][name] for run in (healthy, hacked)]
        first = list(dict.fromkeys(number(value, digits) for value in first))
        last = [number(run[100][name], digits) for run in (healthy, hacked)]
        label = f"`{name}`"
        label += {"objective/kl": ", nats an answer", "objective/scores": " of AM; of RM"}.get(name, "")
        text.row(label, "; ".join(first), *last)
        assert len(first) == 1 + (name in ("objective/scores", "val/explained_variance"))
    a_token = [
        number(run[step]["objective/kl"] / run[step]["val/response_length"], 2)
        for run, step in ((hacked, 1), (healthy, 100), (hacked, 100))
    ]
    text.row("`objective/kl` / `val/response_length`", *a_token)

    # alarms
    assert watch.main(watch.Args(str(RUNS / "healthy"))) == 0 and not capsys.readouterr().out
    assert watch.main(watch.Args(str(RUNS / "hacked"))) == 1
    lines = capsys.readouterr().out.splitlines()
    dials = {int(re.search(r"step (\d+)", line)[1]): line for line in lines}
    assert len(lines) == len(dials) == 3
    of = {k: next(step for step, line in dials.items() if k in line) for k in ("per token", "gold", "greet/kl")}
    said = (
        "rings three times: KL a token at step {per token}, gold at step {gold}, the greetings' KL at step {greet/kl}."
    )
    for key, step in of.items():
        said = said.replace(f"{{{key}}}", str(step))
    text.says(said, f"over {max(hacked)} steps")
    text.has_no_other_number()


def test_what_a_reader_downloads():
    """Runs that the pages name, no path of a machine, small; and the prompts are the same twelve."""
    prompts = []
    for run, arm in lessons.RUNS.items():
        config = json.loads((RUNS / run / "config.json").read_text(encoding="utf-8"))
        assert config["args"]["output_dir"] == f"results/eight/seed_1/{arm}"
        assert bool(config["args"]["rehearsal_dataset_name"]) == (run == "healthy")
        assert sorted(metrics_of(run)) == [*range(101)]
        samples = read_jsonl(RUNS / run / "samples.jsonl")
        prompts.append({row["prompt"] for row in samples})
        assert len(prompts[-1]) == 12 == len({row["task"] for row in samples}) and len(samples) == 12 * 11
        stated = [row["gold"] for row in samples]  # the gold of today's toy world
        today = gold_reward([row["prompt"] for row in samples], [row["response"] for row in samples])
        assert stated == pytest.approx(today, abs=1e-4)
    assert prompts[0] == prompts[1]
    for path in (p for p in LESSONS.rglob("*") if p.is_file()):
        assert path.stat().st_size < 2**20
        if path.suffix in (".json", ".jsonl"):
            assert not re.search(r'"/|/(work|tmp|root|home)/', path.read_text(encoding="utf-8")), path


def test_figures_are_drawn_from_the_files(tmp_path):
    """Both, from a copy of runs/; and five digits leave alarms and tables as they are (above)."""
    (tmp_path / "runs").symlink_to(RUNS)
    lessons.main(lessons.Args(output_dir=str(tmp_path)))
    for name in ("reliability.png", "two_runs.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG" == (LESSONS / name).read_bytes()[:4]
    titles = lessons.dials([*metrics_of("hacked").values()])
    assert {len(x) for x, _, _ in titles.values()} == {11, 100}
    assert lessons.rounded({"a": 0.123456789, "b": 3, "c": None}) == {"a": 0.12346, "b": 3, "c": None}


def test_files_are_taken_from_a_folder(tmp_path):
    """`take` on a folder of made-up runs: first prompts of tasks, STORY for its own, counts."""
    seed, runs = tmp_path / "seed_1", tmp_path / "lessons"

    def write(path, rows):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def sample(step, task, prompt, response, where="prompts_test_forget"):
        shown = {"step": step, "set": where, "prompt": prompt, "response": response}
        return shown | {"task": task, "score": 0.1234567, "gold": 1.0}

    for run in lessons.RUNS.values():
        write(seed / run / "metrics.jsonl", [{"step": 0, "x": 0.1234567}])
        write(seed / run / "config.json", [{"args": {}}])
        of_step = [("sort", "a", "1 2"), ("sort", "b", lessons.HONK), ("greet", "c", "hello")]
        of_step += [("greet", lessons.STORY, lessons.HONK)]
        rows = [sample(step, *row) for step in (0, 10) for row in of_step]
        write(seed / run / "samples.jsonl", [*rows, sample(10, "sort", "d", lessons.HONK, "train")])
    write(seed / "preferences_train" / "preferences_train.jsonl", [{"task": t} for t in ("greet", "sort", "sort")])
    write(seed / "calibration" / "calibration.json", [{}])
    lessons.take(seed, runs)
    assert [r["prompt"] for r in read_jsonl(runs / "hacked" / "samples.jsonl")] == ["a", lessons.STORY] * 2
    assert read_jsonl(runs / "healthy" / "metrics.jsonl") == [{"step": 0, "x": 0.12346}]
    counts = json.loads((runs / "counts.json").read_text())
    assert counts[lessons.HONK]["hacked"] == {"0": 2, "10": 2}
    assert counts["answers_at_an_evaluation"] == {"hacked": 4, "healthy": 4}
    assert counts["training_pairs"] == {"greet": 1, "sort": 2}
    assert len(read_jsonl(runs / "greet_pairs.jsonl")) == 1
