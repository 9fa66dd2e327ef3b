"""The paper in miniature, one command: toy world -> SFT -> RM and AM -> rehearsal -> PPO in all arms -> report.

    python reproduce.py                          results/full: report.html and results.json
    python reproduce.py --scale smoke            the same in under 90 seconds; the numbers mean nothing
    python reproduce.py --seeds 1 2 3            claims about PPO stay undecided below three seeds

Every job calls a script's main(args), or toy_world's writers, in one of two worker processes of one thread each (SFT has
both threads to itself). A job that is done leaves done.json behind; a stopped reproduction, started again, goes on with
the first job that has none.
The rule that decides a claim stands in CLAIMS below, written before the runs that it judges.
"""

import contextlib
import importlib
import json
import multiprocessing
import os
import shutil
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from comparisons import win_lose_tie
from utils import InputError, environment, run_cli, write_json

WORKERS = 2


@dataclass
class Args:
    scale: Literal["smoke", "full"] = "full"
    """full: the miniature (8 to 13 minutes a seed on two cores); smoke: a check of the machinery"""
    seeds: tuple[int, ...] = (1,)
    """every seed repeats everything: world order, SFT, annotators, scorers, PPO"""
    output_dir: str | None = None
    """results/<scale> by default"""


# --- settings: what the toy world needs; every arm gets the same data, steps and rates -----------------------------------
COMMON_PPO = dict(response_length=24, max_length=64, num_ppo_epochs=1, num_mini_batches=2, kl_coef=0.05)
COMMON_PPO |= dict(learning_rate=5e-4, critic_learning_rate=5e-4, gold_reward="toy_world:gold_reward")
COMMON_PPO |= dict(rehearsal_batch_size=32)  # read by AM-PPO-SR alone
SETTINGS = {
    "full": dict(
        demos_per_prompt=3,
        sft=dict(learning_rate=3e-3, num_train_epochs=3, global_batch_size=32, max_length=64),
        train_preferences=dict(prompts_per_task=100),
        test_preferences=dict(prompts_per_task=100, rankings_per_prompt=3, responses_per_ranking=8),
        scorer=dict(learning_rate=5e-4, global_batch_size=64, per_device_train_batch_size=64, max_length=64),
        select=dict(response_length=24, max_length=64, top_k=10),
        clusters=(24, 6, 12, 48),  # c of Fig. 6; the first one is the AM-PPO-SR arm's
        ppo=dict(
            total_steps=50, eval_steps=10, max_eval_prompts=200, global_batch_size=128, per_device_train_batch_size=64
        )
        | COMMON_PPO,
        winrate=dict(response_length=24, max_length=64),
    ),
    "smoke": dict(
        demos_per_prompt=1,
        sft=dict(learning_rate=3e-3, global_batch_size=64, max_length=64, num_layers=2, hidden_size=64, num_heads=2),
        train_preferences=dict(prompts_per_task=5),
        test_preferences=dict(prompts_per_task=5),
        scorer=dict(learning_rate=5e-4, global_batch_size=64, per_device_train_batch_size=64, max_length=64),
        select=dict(response_length=24, max_length=64, top_k=2),
        clusters=(6, 3),
        ppo=dict(total_steps=2, eval_steps=1, max_eval_prompts=12, global_batch_size=16, per_device_train_batch_size=16)
        | COMMON_PPO,
        winrate=dict(response_length=24, max_length=64, num_bootstrap=100),
    ),
}
ARMS = ("RM-PPO", "RM-PPO w/ MA", "RM-PPO rescaled", "AM-PPO", "AM-PPO-SR")
EXPECTED_SECONDS = dict(world=8, sft=200, preferences_train=25, preferences_test=70, scorer=75, calibration=40)
EXPECTED_SECONDS |= dict(select=15, ppo=115, winrate=8)  # of one worker each; SFT holds both


# --- the claims (PAPER.md's K1 to K14): text, rule ------------------------------------------------------------------------
INTERVAL = "interval: 95 %, over prompts with one or two seeds, over seeds (Student's t) from three on"
PPO_INTERVAL = "interval: 95 % over seeds (Student's t); undecided below three seeds"
CLAIMS = {
    "K1": ("AM ranks as accurately as RM, or better",
           "accuracy AM - RM in points: reproduced if the interval lies above -0.5, contradicted if below"),
    "K2": ("AM has the lower ECE", "ECE AM - RM in points: reproduced if the interval lies below 0, contradicted if above"),
    "K3": ("RM is over-confident in most score-gap bins, AM is not",
           "share of bins (with 1 % of the pairs or more) whose confidence exceeds their accuracy, RM - AM: reproduced if "
           "RM's share is above 1/2 and AM's is not, else contradicted"),
    "K4": ("RM's mean score differs widely between tasks, AM's does not",
           "spread of task means AM / RM: reproduced if at most 1/3 raw and at most 0.6 after division by the mean "
           "within-task std, contradicted if either is 1 or more, else undecided"),
    "K5": ("RM's std differs between tasks, AM's is stable",
           "spread of task stds AM / RM: reproduced if at most 1/2 raw and below 1 after division by the mean within-task "
           "std, contradicted if the raw ratio is 1 or more, else undecided"),
    "K6": ("AM separates good from bad responses more distinctly",
           "(mean chosen - mean rejected) / std of all scores, AM - RM: reproduced if the interval lies above 0, "
           "contradicted if below"),
    "K7": ("RM-PPO hacks: its reward rises while the judged quality falls",
           "RM-PPO, main curve prompts, gold at the last step - gold at step 0: reproduced if the interval lies below 0 "
           "and the proxy rose in every seed, contradicted if the interval lies above 0"),
    "K8": ("moving-average normalisation of RM scores does not cure it",
           "RM-PPO w/ MA, main curve prompts, gold at the last step - gold at step 0: reproduced if the interval lies "
           "below 0, contradicted if above"),
    "K9": ("AM-PPO beats RM-PPO in win rate over SFT on the main set",
           "(win - lose) of AM-PPO - (win - lose) of RM-PPO, main: reproduced if the interval lies above 0, contradicted "
           "if below"),
    "K10": ("RM-PPO forgets: it loses to SFT on the forget set",
            "win - lose of RM-PPO, forget: reproduced if the interval lies below 0, contradicted if above"),
    "K11": ("AM-PPO does not forget",
            "win - lose of AM-PPO, forget: reproduced if the interval lies above -5 points, contradicted if below"),
    "K12": ("selective rehearsal raises the win rate further on both sets",
            "(win - lose) of AM-PPO-SR - (win - lose) of AM-PPO, on the set where it is less sure: reproduced if its "
            "interval lies above 0, contradicted if below"),
    "K13": ("the number of clusters c matters little (about 0.05 reward)",
            "largest - smallest final proxy score over c, main curve prompts: reproduced if at most 0.05, contradicted "
            "if above 0.1"),
    "K14": ("response patterns of a high-scoring task transfer to other tasks under RM",
            "share of test answers that open like another task's answers, RM-PPO - SFT, in points: reproduced if the "
            "interval lies above 0 and AM-PPO's mean is smaller, contradicted if it lies below 0"),
}  # fmt: skip
PPO_CLAIMS = ("K7", "K8", "K9", "K10", "K11", "K12", "K13", "K14")


# --- jobs ---------------------------------------------------------------------------------------------------------------


@dataclass
class Job:
    kind: str  # a key of EXPECTED_SECONDS
    folder: Path
    needs: tuple[str, ...]  # folder names of the jobs of this seed that come first
    function: str  # module:function
    args: dict
    steps: int = 0  # lines that metrics.jsonl will have, for the progress bar
    threads: int = 1

    def done(self):
        record = self.folder / "done.json"
        return record.is_file() and read_json(record)["args"] == json.loads(json.dumps(self.args))

    def progress(self):
        lines = self.folder / "metrics.jsonl"
        return min(0.99, lines.read_text().count("\n") / self.steps) if self.steps and lines.is_file() else 0.0


def die_with_parent():
    """In a worker, at its start: a killed reproduction must not leave workers that write beside the next one's."""
    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_job(job):
    """In a worker process: call the script's main with its Args, output into log.txt; leave done.json behind."""
    import torch

    torch.set_num_threads(job.threads)
    shutil.rmtree(job.folder, ignore_errors=True)  # what a killed run left
    job.folder.mkdir(parents=True)
    start = time.time()
    module, _, name = job.function.partition(":")
    with open(job.folder / "log.txt", "w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        module = importlib.import_module(module)
        if name in ("write_world", "write_preferences"):
            getattr(module, name)(**job.args)
        else:
            function = getattr(module, name)
            function(function.__annotations__["args"](**job.args))
    write_json(job.folder / "done.json", {"args": job.args, "seconds": time.time() - start})


class Progress:
    """One line: bar, running jobs, minutes left, from the expected seconds of the jobs and the speed so far."""

    def __init__(self, jobs, guess):
        self.total = sum(EXPECTED_SECONDS[job.kind] for job in jobs)
        self.finished, self.skipped, self.start, self.shown = 0.0, 0.0, time.time(), ""
        self.guess = guess  # seconds for an expected second, until enough jobs are done to know

    def skip(self, job):
        self.finished += EXPECTED_SECONDS[job.kind]
        self.skipped += EXPECTED_SECONDS[job.kind]  # jobs found done say nothing about this machine's speed

    def show(self, running):
        seconds = time.time() - self.start
        done = self.finished + sum(EXPECTED_SECONDS[job.kind] * job.progress() for job in running)
        worked = done - self.skipped
        left = (self.total - done) * (seconds / worked if worked > 60 else self.guess)
        names = ", ".join(job.folder.name for job in running)
        if sys.stderr.isatty():
            bar = "#" * round(30 * done / self.total)
            line = f"\r[{bar:30s}] {names[:50]:50s} about {left / 60:4.1f} min left "
            print(line, end="", file=sys.stderr, flush=True)
        elif names != self.shown:
            print(f"{seconds:5.0f} s  {names:50s} about {left / 60:4.1f} min left", file=sys.stderr, flush=True)
        self.shown = names


def run_jobs(jobs, pool, progress):
    """Run the jobs in their order, each once what it needs is done, at most one a worker.

    Raises RuntimeError with the place of the log when one fails; the others that are under way still finish.
    """
    finished, running, waiting = set(), {}, list(jobs)
    while waiting or running:
        for job in [j for j in waiting if finished.issuperset(j.needs)]:
            job.args = {k: v() if callable(v) else v for k, v in job.args.items()}  # what an earlier job had to tell
            if job.done():
                waiting.remove(job)
                finished.add(job.folder.name)
                progress.skip(job)
            elif sum(j.threads for j in running.values()) + job.threads <= WORKERS:
                waiting.remove(job)
                running[pool.submit(run_job, job)] = job
        if not running:
            continue
        progress.show(list(running.values()))
        for future in wait(running, timeout=1.0, return_when="FIRST_COMPLETED").done:
            job = running.pop(future)
            if error := future.exception():
                raise RuntimeError(f"{job.folder.name} failed: {error!r}; its output is in {job.folder / 'log.txt'}")
            finished.add(job.folder.name)
            progress.finished += EXPECTED_SECONDS[job.kind]


def jobs_of_seed(folder, seed, s):
    """The jobs of one seed in the order in which they should start."""
    world, sft = folder / "world", str(folder / "sft" / "model")
    scorer = {name: str(folder / name / "model") for name in ("rm", "am")}
    tests = [str(world / f"prompts_test_{kind}.jsonl") for kind in ("main", "forget")]
    first, *others = s["clusters"]

    def job(kind, name, needs, function, steps=0, threads=1, **args):
        args |= {"output_dir": str(folder / name), "seed": seed}
        return Job(kind, folder / name, needs, function, args, steps, threads)

    def preferences(split):
        args = dict(prompts_per_task=0, rankings_per_prompt=1, responses_per_ranking=5) | s[f"{split}_preferences"]
        args |= dict(policy=sft, split=split)
        return job(f"preferences_{split}", f"preferences_{split}", ("sft",), "toy_world:write_preferences", **args)

    def pairs(split):
        return str(folder / f"preferences_{split}" / f"preferences_{split}.jsonl")

    def train_scorer(loss):
        args = s["scorer"] | dict(model_name_or_path=sft, loss=loss, dataset_name=pairs("train"))
        return job("scorer", loss, ("preferences_train",), "am_train:main", **args)

    def select(c, name, needs, **args):
        args |= s["select"] | dict(num_clusters=c, embedding_model=sft, gold_reward="toy_world:gold_reward")
        return job("select", name, needs, "select_rehearsal:main", reward_model_path=scorer["am"], **args)

    def ppo(arm, reward_model, rehearsal=None, **args):
        args |= s["ppo"] | dict(model_name_or_path=sft, dataset_name=str(world / "prompts_train.jsonl"))
        args |= dict(reward_model_path=scorer[reward_model], eval_dataset_names=tests)
        needs = ("calibration",) if "score_scale" in args else (reward_model,)
        if rehearsal:
            args["rehearsal_dataset_name"] = str(folder / rehearsal / "rehearsal.jsonl")
            needs = (rehearsal,)
        return job("ppo", run_name("ppo", arm), needs, "ppo_sr:main", steps=s["ppo"]["total_steps"] + 1, **args)

    def winrate(arm):
        args = s["winrate"] | dict(policy=str(folder / run_name("ppo", arm) / "model"), reference=sft)
        args |= dict(dataset_names=tests, judge="toy_world:gold_reward", common_random_numbers=True)
        return job("winrate", run_name("winrate", arm), (run_name("ppo", arm),), "evaluate:winrate", **args)

    def rescaling():
        scorers = read_json(folder / "calibration" / "calibration.json")["scorers"]
        return scorers["am"]["score_std"] / scorers["rm"]["score_std"]

    sft_args = s["sft"] | dict(tokenizer_name_or_path=str(world / "tokenizer"), dataset_name=str(world / "sft.jsonl"))
    calibration = dict(
        scorers=[scorer["rm"], scorer["am"]], names=["rm", "am"], dataset_name=pairs("test"), max_length=64
    )
    main_prompts, answered = str(world / "prompts_train.jsonl"), str(folder / "select_main" / "responses.jsonl")
    return [
        job("world", "world", (), "toy_world:write_world", demos_per_prompt=s["demos_per_prompt"]),
        job("sft", "sft", ("world",), "sft:main", threads=WORKERS, **sft_args),
        preferences("train"),
        preferences("test"),
        train_scorer("am"),
        train_scorer("rm"),
        select(first, "select_main", ("am",), model_name_or_path=sft, dataset_name=main_prompts),
        job("calibration", "calibration", ("rm", "am", "preferences_test"), "evaluate:calibration", **calibration),
        ppo("RM-PPO", "rm"),
        ppo("AM-PPO", "am"),
        ppo("AM-PPO-SR", "am", "select_main"),
        ppo("RM-PPO w/ MA", "rm", score_normalization="moving_average"),
        ppo("RM-PPO rescaled", "rm", score_scale=rescaling),
        *(select(c, f"select_c{c}", ("select_main",), dataset_name=answered) for c in others),
        *(ppo(f"AM-PPO-SR c={c}", "am", f"select_c{c}") for c in others),
        *(winrate(arm) for arm in ARMS),
    ]


def run_name(kind, arm):
    return f"{kind} {arm.replace('/', '')}"


def read_json(path):
    return json.loads(Path(path).read_text())


def read_jsonl(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


# --- results ------------------------------------------------------------------------------------------------------------


def collect(folder, s):
    """What one seed's folders hold, as the numbers that results.json averages."""
    calibration = read_json(folder / "calibration" / "calibration.json")
    scorers = calibration["scorers"]
    seed = {"calibration": calibration}
    metrics = ("accuracy", "ece", "ece_vs_truth", "brier", "nll")
    seed["table1"] = {n: {k: v[k] for k in metrics} for n, v in scorers.items()}
    seed["score_balance"] = {n: v["balance"] for n, v in scorers.items()}
    seed["table2"], seed["curves"], seed["win_curves"], seed["foreign"], seed["responses"] = {}, {}, {}, {}, {}
    for arm in ARMS:
        report = read_json(folder / run_name("winrate", arm) / "winrate.json")
        seed["table2"][arm] = {k: report[f"prompts_test_{k}"] for k in ("main", "forget")}
        seed["curves"][arm] = curve(folder / run_name("ppo", arm))
        seed["win_curves"][arm] = win_curve(folder / run_name("ppo", arm))
        seed["responses"][arm] = rows = read_jsonl(folder / run_name("winrate", arm) / "responses.jsonl")
        seed["foreign"][arm] = foreign_openings(rows, "response")
        seed["foreign"]["SFT"] = foreign_openings(rows, "reference")
    first, *others = s["clusters"]
    runs = {first: folder / "ppo AM-PPO-SR"} | {c: folder / f"ppo AM-PPO-SR c={c}" for c in others}
    seed["fig6"] = {  # tools/study.py sweeps over c in its first seeds alone
        str(c): [{k: row[k] for k in ("step", "proxy", "gold")} for row in curve(runs[c])]
        for c in sorted(runs)
        if (runs[c] / "done.json").is_file()
    }
    seed["seconds"] = {}
    for record in folder.glob("*/done.json"):
        seed["seconds"][record.parent.name] = read_json(record)["seconds"]
    return seed


def curve(run):
    columns = {
        "gold": "main/gold",
        "proxy": "main/score",
        "kl": "main/kl",
        "length": "main/length",
        "forget_gold": "forget/gold",
    }
    rows = [row for row in read_jsonl(run / "metrics.jsonl") if "eval/prompts_test_main/gold" in row]
    return [{"step": row["step"]} | {k: row[f"eval/prompts_test_{v}"] for k, v in columns.items()} for row in rows]


def win_curve(run):
    """Win, lose and tie against the answers of step 0, which are the SFT policy's, at every evaluation."""
    gold = {}
    for row in read_jsonl(run / "samples.jsonl"):
        if row["set"] != "train":
            test_set = row["set"].removeprefix("prompts_test_")
            gold.setdefault(row["step"], {}).setdefault(test_set, []).append(row["gold"])
    return [{"step": n} | {k: win_lose_tie(v, gold[0][k], 0.1) for k, v in sets.items()} for n, sets in gold.items()]


def foreign_openings(rows, field):
    """Percent of answers whose opening is another task's and not their own ("the capital", "good morning" ...)."""
    from toy_world import TASKS, prompts, reference

    def opening(text):
        words = text.split()
        return " ".join(words[:2]) if words[:1] in (["the"], ["i"], ["a"], ["good"]) else " ".join(words[:1])

    own = {task: {opening(reference(p)) for p in prompts(task, "train")} for task in TASKS}
    foreign = [
        opening(row[field]) not in own[row["task"]] and any(opening(row[field]) in v for v in own.values())
        for row in rows
    ]
    return 100 * float(np.mean(foreign))


def average(values):
    """Mean over seeds of numbers, or of equal structures of numbers; other leaves are the first seed's."""
    first = values[0]
    if isinstance(first, dict):
        return {k: average([v[k] for v in values]) for k in first}
    if isinstance(first, list):
        return [average(list(column)) for column in zip(*values, strict=True)]
    return float(np.mean(values)) if isinstance(first, float) else first


def over_seeds(values, prompt_interval=None):
    """Mean and 95 % interval: Student's t over seeds from three on, before that the mean of the prompts' intervals."""
    mean = float(np.mean(values))
    if len(values) >= 3:
        from scipy.stats import t

        half = float(t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5)
        return mean, [mean - half, mean + half]
    return mean, average(prompt_interval) if prompt_interval else None


def by_interval(interval, above="reproduced", below="contradicted", at=0.0):
    if interval is None:
        return "undecided"
    return above if interval[0] > at else below if interval[1] < at else "undecided"


def decide_claims(seeds):
    """The verdict on every claim, by the rules of CLAIMS; `seeds` is a list of collect()'s results."""
    found = {}

    def paired(metric):
        entries = [next(iter(s["calibration"]["paired"].values()))[metric] for s in seeds]
        return over_seeds([e["difference"] for e in entries], [[e["low"], e["high"]] for e in entries])

    def decide(claim, statistic, interval, verdict):
        few = claim in PPO_CLAIMS and len(seeds) < 3
        rule = CLAIMS[claim][1] + f" ({PPO_INTERVAL if claim in PPO_CLAIMS else INTERVAL})"
        found[claim] = {
            "verdict": "undecided" if few else verdict,
            "statistic": statistic,
            "interval": interval,
            "rule": rule,
        }

    value, interval = paired("accuracy")
    decide("K1", value, interval, by_interval(interval, at=-0.5))
    value, interval = paired("ece")
    decide("K2", value, interval, by_interval(interval, "contradicted", "reproduced"))

    def overconfident(s, name):
        bins = s["calibration"]["scorers"][name]["bins"]
        kept = [b for b in bins if b["count"] >= 0.01 * s["calibration"]["pairs"]]
        return sum(b["confidence"] > b["accuracy"] for b in kept) / len(kept)

    rm, am = (np.mean([overconfident(s, name) for s in seeds]) for name in ("rm", "am"))
    decide("K3", float(rm - am), None, "reproduced" if rm > 0.5 >= am else "contradicted")

    def balance(what):
        ratios = [s["score_balance"]["am"][what] / s["score_balance"]["rm"][what] for s in seeds]
        within = [
            s["score_balance"]["am"]["mean_within_std"] / s["score_balance"]["rm"]["mean_within_std"] for s in seeds
        ]
        value, interval = over_seeds(ratios)
        return value, interval, float(np.mean(np.divide(ratios, within)))

    raw, interval, normalised = balance("spread_of_means")
    ok = raw <= 1 / 3 and normalised <= 0.6
    decide("K4", raw, interval, "reproduced" if ok else "contradicted" if max(raw, normalised) >= 1 else "undecided")
    raw, interval, normalised = balance("spread_of_stds")
    ok = raw <= 0.5 and normalised < 1
    decide("K5", raw, interval, "reproduced" if ok else "contradicted" if raw >= 1 else "undecided")
    value, interval = paired("separation")
    decide("K6", value, interval, by_interval(interval))

    def gold_change(arm):
        return over_seeds([s["curves"][arm][-1]["gold"] - s["curves"][arm][0]["gold"] for s in seeds])

    value, interval = gold_change("RM-PPO")
    verdict = by_interval(interval, "contradicted", "reproduced")
    rose = all(s["curves"]["RM-PPO"][-1]["proxy"] > s["curves"]["RM-PPO"][0]["proxy"] for s in seeds)
    decide("K7", value, interval, "undecided" if verdict == "reproduced" and not rose else verdict)
    value, interval = gold_change("RM-PPO w/ MA")
    decide("K8", value, interval, by_interval(interval, "contradicted", "reproduced"))

    def net_win(arm, test_set):
        return np.array([s["table2"][arm][test_set]["win"] - s["table2"][arm][test_set]["lose"] for s in seeds])

    value, interval = over_seeds(net_win("AM-PPO", "main") - net_win("RM-PPO", "main"))
    decide("K9", value, interval, by_interval(interval))
    value, interval = over_seeds(net_win("RM-PPO", "forget"))
    decide("K10", value, interval, by_interval(interval, "contradicted", "reproduced"))
    value, interval = over_seeds(net_win("AM-PPO", "forget"))
    decide("K11", value, interval, by_interval(interval, at=-5.0))
    gains = [over_seeds(net_win("AM-PPO-SR", k) - net_win("AM-PPO", k)) for k in ("main", "forget")]
    value, interval = min(gains, key=lambda gain: gain[1][0] if gain[1] else gain[0])  # both sets must gain
    decide("K12", value, interval, by_interval(interval))
    swept = [fig6_spread(s["fig6"]) for s in seeds if len(s["fig6"]) > 1]
    value, interval = over_seeds(swept) if swept else (None, None)
    verdict = "undecided"
    if len(swept) >= 3:
        verdict = "reproduced" if value <= 0.05 else "contradicted" if value > 0.1 else "undecided"
    decide("K13", value, interval, verdict)
    rises = {arm: [s["foreign"][arm] - s["foreign"]["SFT"] for s in seeds] for arm in ("RM-PPO", "AM-PPO")}
    value, interval = over_seeds(rises["RM-PPO"])
    verdict = by_interval(interval)
    smaller = np.mean(rises["AM-PPO"]) < value
    decide("K14", value, interval, "undecided" if verdict == "reproduced" and not smaller else verdict)
    return found


def fig6_spread(curves):
    final = [rows[-1]["proxy"] for rows in curves.values()]
    return max(final) - min(final)


def write_results(folder, args, settings, seconds):
    seeds = [collect(folder / f"seed_{seed}", settings) for seed in args.seeds]
    table2 = {}
    for arm in ARMS:
        table2[arm] = {}
        for k in ("main", "forget"):
            cells = [s["table2"][arm][k] for s in seeds]
            row = {
                v: over_seeds([c[v] for c in cells], [c["intervals"][v] for c in cells]) for v in ("win", "lose", "tie")
            }
            table2[arm][k] = {v: mean for v, (mean, _) in row.items()}
            table2[arm][k]["intervals"] = {v: interval for v, (_, interval) in row.items()}
    swept = [s["fig6"] for s in seeds if len(s["fig6"]) == len(settings["clusters"])] or [seeds[0]["fig6"]]
    results = {
        "table1": average([s["table1"] for s in seeds]),
        "score_balance": average([s["score_balance"] for s in seeds]),
        "table2": table2,
        "curves": average([s["curves"] for s in seeds]),
        "fig6": {"curves": average(swept), "spread": float(np.mean([fig6_spread(curves) for curves in swept]))},
        "seeds": list(args.seeds),
        "config": {"scale": args.scale, "settings": settings},
        "seconds": seconds | {k: sum(s["seconds"].get(k, 0) for s in seeds) for k in seeds[0]["seconds"]},
        "claims": decide_claims(seeds),
    }
    write_json(folder / "results.json", results)
    first = folder / f"seed_{args.seeds[0]}"
    paired = [next(iter(s["calibration"]["paired"].values())) for s in seeds]
    details = {
        "scale": args.scale,
        "environment": environment(),
        "claim_texts": {k: text for k, (text, _) in CLAIMS.items()},
        "win_curves": average([s["win_curves"] for s in seeds]),
        "proxy_unit": {arm: "AM score" if arm.startswith("AM") else "RM score" for arm in ARMS},
        "samples": samples(seeds[0]["responses"]),
        "clusters": read_json(first / "select_main" / "clusters.json"),
        "paired": average(paired),
        "foreign_openings": average([s["foreign"] for s in seeds]),
        "forget_tasks": sorted(
            {r["task"] for r in seeds[0]["responses"][ARMS[0]] if r["set"] == "prompts_test_forget"}
        ),
    }
    write_json(folder / "details.json", details)
    return results


def samples(responses, per_task=4):
    """The first prompts of every task with the SFT policy's and every arm's answer."""
    chosen, taken = [], {}
    for i, row in enumerate(responses[ARMS[0]]):
        taken[row["task"]] = taken.get(row["task"], 0) + 1
        if taken[row["task"]] > per_task:
            continue
        entry = {"set": row["set"].removeprefix("prompts_test_"), "task": row["task"], "prompt": row["prompt"]}
        entry["sft"] = {"response": row["reference"], "gold": row["reference_score"]}
        entry["arms"] = {a: {"response": responses[a][i]["response"], "gold": responses[a][i]["score"]} for a in ARMS}
        chosen.append(entry)
    return chosen


def main(args: Args):
    settings = SETTINGS[args.scale]
    folder = Path(args.output_dir or f"results/{args.scale}")
    config = json.loads(json.dumps({"scale": args.scale, "settings": settings}))
    folder.mkdir(parents=True, exist_ok=True)
    stored = folder / "config.json"
    if stored.is_file() and read_json(stored) != config:
        raise InputError(f"--output_dir {folder}: holds runs with other settings; remove it or name another folder")
    write_json(stored, config)
    if len(set(args.seeds)) < len(args.seeds) or not args.seeds:
        raise InputError(f"--seeds {args.seeds}: give at least one, each once")
    start = time.time()
    jobs = [jobs_of_seed(folder / f"seed_{seed}", seed, settings) for seed in args.seeds]
    progress = Progress([job for jobs_of_one in jobs for job in jobs_of_one], 0.6 if args.scale == "full" else 0.03)
    with ProcessPoolExecutor(WORKERS, multiprocessing.get_context("spawn"), die_with_parent) as pool:
        for jobs_of_one in jobs:
            run_jobs(jobs_of_one, pool, progress)
    results = write_results(folder, args, settings, {"total": time.time() - start})
    from tools.report import write_report

    page = write_report(folder)
    print(f"\n{time.time() - start:.0f} s; open {page}", file=sys.stderr)
    return results


if __name__ == "__main__":
    run_cli(main, Args, __doc__)
