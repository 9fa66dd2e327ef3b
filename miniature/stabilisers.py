"""The methods around the paper on one world whose truth is known: which of them should one take?

    python -m miniature.reproduce --seeds 1 2 3 --output_dir results/eight
    python -m miniature.stabilisers --seeds 1 2 3 --folder results/eight

For every seed all methods start from the same SFT model, prompts and preference pairs, and answer
the same test prompts: the first 200 of each set along training; all of them at the end, where there
are win rates (means of weights have these alone). First come the reproduction's jobs and those of
miniature/study.py, then one run for each of PPO_ARMS and OFFLINE_ARMS. It writes stabilisers.json,
stabilisers.md and stabilisers.png. Finished runs are kept, so that more --seeds can follow.

    python -m miniature.stabilisers --search --seeds 25 --folder results/search

is the search for learning rates, three for each arm of SEARCHED, on a seed that the table does not
use. The rule for methods without PPO's loop, written before it ran: the rate with the highest gold
on main, a mean over the evaluations of the second half of the run. --arms runs some arms alone, to
confirm on fresh seeds what eight others have shown.

How arms are compared. Gold on main and forget at a KL of .5 and of 1 nat on main, between the two
evaluations on both sides of it, linear in sqrt(KL) as gold is at first; where a seed never reached
that KL there is no number. At the end: KL, gold. A method *helps* in a seed if its last gold on
main lies above SFT's.

PPO's arms and those without a critic have the rate of the reproduction's arms, but for those named
"best rate": theirs is the search's, as for all other methods. The test prompts are the same for
all seeds, the search's too.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.figure import Figure

from miniature import study
from miniature.claims import over_seeds
from miniature.jobs import Job, check_seeds, read_json, read_jsonl, run_jobs
from miniature.reproduce import ARMS, GOLD, SETTINGS, curve, jobs_of_seed, run_name
from miniature.tables import markdown_table, with_interval
from utils import InputError, environment, run_cli, write_json

KLS = (0.5, 1.0)
AT_KL = (
    "gold on main at a KL of 0.5, {0} - {1}: yes if the 95 % interval over seeds lies above 0, no "
    "if below; undecided otherwise, with fewer than 8 seeds, or where an arm never reached that KL"
)
FORGET = AT_KL.replace("on main", "on forget")
AT_END = (
    "gold on main at the end, {0} - {1}: yes if the 95 % interval over seeds lies above 0, no if "
    "below; undecided otherwise, or with fewer than 8 seeds"
)
FORGET_END = AT_END.replace("on main", "on forget")
COLUMNS = {AT_KL: "gold", AT_END: "gold", FORGET: "forget_gold", FORGET_END: "forget_gold"}
PESSIMIST = "ensemble of AMs, mean - std"
LOST, AVERAGED_RM = "RM-PPO-SR, what is lost", "RM-PPO averaged"  # w = .5, of the study
QUESTIONS = {  # written before any of these runs: question, rule, the two arms
    "M1": ("does AM help where each prompt has a baseline?", AT_KL, ("RLOO, AM", "RLOO")),
    "M2": ("more than its scale does?", AT_KL, ("RLOO, AM", "RLOO, RM rescaled")),
    "M3": ("does PPO need its critic?", AT_KL, ("RM-PPO", "RLOO")),
    "M4": ("does a bounded reward beat AM?", AT_KL, ("bounded (PAR)", "AM-PPO")),
    "M5": ("does r less that of SFT's answers beat AM?", AT_KL, ("contrastive", "AM-PPO")),
    "M6": ("is a pessimistic ensemble better?", AT_KL, ("ensemble, mean - std", "ensemble, mean")),
    "M7": ("are three RMs better than one?", AT_KL, ("ensemble, mean", "RM-PPO")),
    "M8": ("does imitating the best samples beat PPO?", AT_KL, ("RAFT", "RM-PPO")),
    "M9": ("does DPO beat PPO?", AT_KL, ("DPO", "RM-PPO")),
    "M10": ("does DPO forget less than PPO?", FORGET, ("DPO", "RM-PPO")),
    "M11": ("does the best of K forget less than PPO?", FORGET, ("RAFT", "RM-PPO")),
    "M12": ("does KL in the loss forget less?", FORGET, ("KL in the loss", "RM-PPO")),
    "M13": ("does DPO beat AM, both at their best rate?", AT_END, ("DPO", "AM-PPO, best rate")),
    "M14": ("does AM beat the RM, likewise?", AT_END, ("AM-PPO, best rate", "RM-PPO, best rate")),
    "M15": ("does RLOO beat PPO, likewise?", AT_END, ("RLOO, best rate", "RM-PPO, best rate")),
    # looking for something better than both AM and the rescaled RM
    "M16": ("does a bounded reward help AM?", AT_KL, ("bounded, AM", "AM-PPO")),
    "M17": ("does a pessimistic ensemble help AM?", AT_KL, (PESSIMIST, "AM-PPO")),
    "M18": ("does that beat the rescaled RM?", AT_KL, (PESSIMIST, "RM-PPO rescaled")),
    # and for a rehearsal that beats the mean of the weights, where PPO forgets most
    "M19": ("does rehearsing what is lost forget less than that?", FORGET_END, (LOST, AVERAGED_RM)),
    "M20": ("at what price on main?", AT_END, (LOST, AVERAGED_RM)),
    "M21": ("does it forget less than Eq. 9?", FORGET_END, (LOST, "RM-PPO-SR")),
    "M22": ("does Eq. 9 help the RM on forget?", FORGET_END, ("RM-PPO-SR", "RM-PPO")),
}
SCORERS = 3  # of an ensemble: the RM and two of other seeds


@dataclass
class Args:
    seeds: tuple[int, ...] = (1, 2, 3)
    """every seed repeats everything"""
    folder: str = "results/eight"
    """reproduce.py's --output_dir"""
    scale: Literal["smoke", "full"] = "full"
    """the reproduction's"""
    arms: tuple[str, ...] = ()
    """these alone and what they need, in a folder of their own: to confirm on fresh seeds"""
    search: bool = False
    """run SEARCHED at every rate instead"""


# --- arms -----------------------------------------------------------------------------------------

# as ppo_sr.py, but for what an arm is about
AS_PPO_SR = dict(moving_average_decay=None, score_clip=float("inf"), critic_warmup_steps=0)
AS_PPO_SR |= dict(whiten_advantages=True, whiten_mini_batches=False)
RLAIF = dict(judge=GOLD, judge_noise=0.3)
# name: (script, scorer or None, flags); PPO's other flags are those of the reproduction's arms
PPO_ARMS = {
    "bounded (PAR)": ("baselines.shaped_rewards", "rm", dict(shape="bounded")),
    "bounded, AM": ("baselines.shaped_rewards", "am", dict(shape="bounded")),
    "contrastive": ("baselines.shaped_rewards", "rm", dict(shape="contrastive")),
    "centred by task": ("baselines.shaped_rewards", "rm", dict(shape="task")),
    "length penalty": ("baselines.shaped_rewards", "rm", dict(shape="length")),
    "KL in the loss": ("baselines.ppo_max", "rm", AS_PPO_SR | dict(kl_estimator="k2")),
    "VC-PPO": ("baselines.ppo_vc", "rm", {}),
    "RLOO": ("baselines.rloo", "rm", dict(method="rloo")),
    "RLOO, AM": ("baselines.rloo", "am", dict(method="rloo")),
    "RLOO, RM rescaled": ("baselines.rloo", "rm", dict(method="rloo", score_scale=None)),
    "GRPO": ("baselines.rloo", "rm", dict(method="grpo")),
    "GRPO, AM": ("baselines.rloo", "am", dict(method="grpo")),
    "REINFORCE++-baseline": ("baselines.rloo", "rm", dict(method="reinforce++")),
    "P3O": ("baselines.rloo", "rm", dict(method="p3o", group_size=2)),
    "ensemble, mean": ("baselines.reward_ensemble", "all", dict(reward="mean")),
    "ensemble, min": ("baselines.reward_ensemble", "all", dict(reward="min")),
    "ensemble, mean - std": ("baselines.reward_ensemble", "all", dict(reward="mean_minus_std")),
    PESSIMIST: ("baselines.reward_ensemble", "all AMs", dict(reward="mean_minus_std")),
    "WARM": ("ppo_sr", "warm", {}),
    "RLAIF, scorer": ("ppo_sr", "ai_rm", {}),
    "RLAIF, direct (gold + noise)": ("baselines.rlaif:Direct", None, RLAIF),
    "RM-PPO-SR": ("ppo_sr", "rm", dict(rehearsal_dataset_name=None)),
    LOST: ("baselines.ppo_rehearse_lost", "rm", dict(rehearsal_dataset_name=None)),
    "RM-PPO, best rate": ("ppo_sr", "rm", {}),
    "AM-PPO, best rate": ("ppo_sr", "am", {}),
    "RLOO, best rate": ("baselines.rloo", "rm", dict(method="rloo")),
    "GRPO, best rate": ("baselines.rloo", "rm", dict(method="grpo")),
}
DPO = dict(beta=0.3, warmup_steps=10)  # as its docstring has it for the toy
REJECTION = "baselines.rejection_sampling:Train"
OFFLINE_ARMS = {
    "DPO": ("baselines.dpo", DPO | dict(loss="dpo")),
    "conservative DPO": ("baselines.dpo", DPO | dict(loss="cdpo")),
    "IPO": ("baselines.dpo", dict(loss="ipo", warmup_steps=10)),
    "CPL": ("baselines.dpo", dict(loss="cpl", warmup_steps=10)),
    "RSO": ("baselines.dpo", DPO | dict(loss="hinge")),
    "RRHF": ("baselines.ranking", dict(loss="rrhf", sft_coef=10.0)),
    "PRO": ("baselines.ranking", dict(loss="pro")),
    "RAFT": ("baselines.rejection_sampling:Train", dict(keep="best")),
    "RAFT, AM": ("baselines.rejection_sampling:Train", dict(keep="best")),
    "ReST": (
        "baselines.rejection_sampling:Train",
        dict(keep="threshold", thresholds=(0.5, 0.75, 0.9)),
    ),
    "A-LoL": ("baselines.rejection_sampling:Train", dict(keep="advantage")),
}
# prompts whose answers are labelled; PPO's 12,800 samples and, of the best of four, 200 updates
SIZES = {
    "full": dict(labelled=4000, num_rounds=10, prompts_per_round=320, global_batch_size=16),
    "smoke": dict(labelled=24, num_rounds=2, prompts_per_round=12),
}
RATES, PPO_RATES = (3e-5, 1e-4, 3e-4), (3e-5, 1e-4, 5e-4)
SHARES = (0.25, 0.75)  # w of the mean of the weights, beside the study's 0.5
AVERAGED = ("RM-PPO", "AM-PPO")
# learning rates of the search, and which of them it chose (docs/results/search_seed25.md)
SEARCHED = dict.fromkeys(("RM-PPO", "AM-PPO", "RLOO", "GRPO"), PPO_RATES)
SEARCHED |= dict.fromkeys((arm for arm in OFFLINE_ARMS if not arm.endswith("AM")), RATES)
FOUND = dict.fromkeys(("AM-PPO", "RLOO", "DPO", "conservative DPO", "RRHF", "PRO"), 1e-4)
FOUND |= dict.fromkeys(("RM-PPO", "GRPO", "CPL", "RSO", "RAFT", "ReST", "A-LoL"), 3e-5)
FOUND["IPO"] = 3e-4


def extra_jobs(folder, seed, s, sizes):
    """The runs of one seed, with other flags than its reproduction's jobs."""
    base = {job.folder.name: job for job in jobs_of_seed(folder, seed, s)}
    jobs = []

    def at(*parts):
        return str(folder.joinpath(*parts))

    def job(name, script, args, needs=(), folder_written=None):
        args = args | {"output_dir": folder_written or at(name)}
        jobs.append(Job(folder / name, script, args, needs))

    def within_prompts():
        """AM's std of a pair's difference over RM's: what is between prompts cancels in RLOO."""
        rows = {row["scorer"]: row for row in read_jsonl(folder / "calibration" / "scores.jsonl")}
        am, rm = (np.subtract(rows[k]["chosen"], rows[k]["rejected"]).std() for k in ("am", "rm"))
        return float(am / rm)

    # --- what some arms need: more scorers, pairs
    several, of_rm = {}, base["rm"].args  # {scorer of an arm: the names of its scorers}
    for kind, loss in (("all", "rm"), ("all AMs", "am")):
        several[kind] = [loss, *(f"{loss}_{n}" for n in range(2, SCORERS + 1))]
        for n, name in enumerate(several[kind][1:], 2):
            job(name, "am_train", base[loss].args | {"seed": 1000 * n + seed})
    # WARM's start from one head: that of ten steps
    job("warm_start", "am_train", of_rm | {"max_rows": 10 * of_rm["global_batch_size"]})
    parts = tuple(f"warm_{n}" for n in range(1, SCORERS + 1))
    for n, part in enumerate(parts, 1):
        args = of_rm | dict(model_name_or_path=at("warm_start", "model"), seed=1000 * n + seed)
        job(part, "am_train", args, ("warm_start",))
    warm = dict(reward_model_path=tuple(at(part, "model") for part in parts))
    job("warm", "baselines.average_rewards", warm, parts, at("warm", "model"))
    sft, prompts = at("sft", "model"), base["ppo RM-PPO"].args["dataset_name"]
    sampled = {k: v for k, v in s["winrate"].items() if k != "num_bootstrap"}
    sampled |= dict(model_name_or_path=sft, dataset_name=prompts, seed=seed)
    sampled["max_prompts"] = sizes["labelled"]
    rso = sampled | dict(reward_model_path=at("rm", "model"))
    job("rso_pairs", "baselines.rejection_sampling:Pairs", rso)
    job("ai_labels", "baselines.rlaif:Label", sampled | RLAIF)
    ai_rm = base["rm"].args | dict(dataset_name=at("ai_labels", "pairs.jsonl"))
    job("ai_rm", "baselines.rlaif:Train", ai_rm, ("ai_labels",))

    def judged(name):
        run = run_name("ppo", name)
        args = base["winrate RM-PPO"].args | dict(policy=at(run, "model"))
        job(run_name("winrate", name), "evaluate:Winrate", args, (run,))

    # --- PPO and what varies it
    for name, (script, scorer, flags) in PPO_ARMS.items():
        args, needs = base["ppo RM-PPO"].args | flags, ()
        if name.endswith("best rate"):
            args["learning_rate"] = FOUND[name.partition(",")[0]]
        if scorer in several:
            args["reward_model_path"] = tuple(at(one, "model") for one in several[scorer])
            needs = tuple(several[scorer][1:])
        elif scorer is None:
            del args["reward_model_path"]
        else:
            args["reward_model_path"] = at(scorer, "model")
            needs = (scorer,) if scorer in ("warm", "ai_rm") else ()
        if script == "baselines.rloo":
            del args["critic_learning_rate"]
        if script == "baselines.ppo_vc":
            args["critic_warmup_steps"] = args["total_steps"] // 10
        if flags.get("score_scale", 1) is None:
            args["score_scale"] = within_prompts
        if "rehearsal_dataset_name" in flags:  # AM-PPO-SR's D_R
            args["rehearsal_dataset_name"] = at("select_main", "rehearsal.jsonl")
        job(run_name("ppo", name), script, args, needs)
        if "rehearsal_dataset_name" in flags:  # beside means of weights, which have these alone
            judged(name)

    # --- the others
    kept = ("eval_dataset_names", "max_eval_prompts", "gold_reward", "seed", "response_length")
    kept += ("max_length", "per_device_train_batch_size", "per_device_eval_batch_size")
    tests = {k: base["ppo RM-PPO"].args[k] for k in (*kept, "model_name_or_path")}
    pairs = base["rm"].args["dataset_name"]
    for name, (script, flags) in OFFLINE_ARMS.items():
        args, needs = tests | {"dataset_name": pairs} | flags, ()
        if script == REJECTION:
            scorer = "am" if name.endswith("AM") else "rm"
            args |= {k: v for k, v in sizes.items() if k != "labelled"}
            args |= dict(dataset_name=prompts, reward_model_path=at(scorer, "model"))
        if name == "RSO":
            args["dataset_name"], needs = at("rso_pairs", "pairs.jsonl"), ("rso_pairs",)
        args["learning_rate"] = FOUND[name.partition(",")[0]]
        job(run_name("ppo", name), script, args, needs)

    # --- without a curve: its win rates have its gold and KL
    def measured(name, script, args, folder_written=None):
        job(run_name("ppo", name), script, args, folder_written=folder_written)
        judged(name)

    for arm in AVERAGED:
        for share in SHARES:
            name = f"{arm} averaged, w = {share:g}"
            args = dict(model_name_or_path=at(run_name("ppo", arm), "model"), weight=share)
            args["init_model"], written = sft, at(run_name("ppo", name), "model")
            measured(name, "baselines.average_weights", args, written)
    again = {k: v for k, v in base["sft"].args.items() if k != "tokenizer_name_or_path"}
    again |= dict(model_name_or_path=sft, num_train_epochs=1)
    measured("SFT continued", "sft", again)
    return jobs


# --- what came out --------------------------------------------------------------------------------


def tokens(run):
    """Tokens that the policy wrote in training; 0 for methods that learn from given texts."""
    rows = read_jsonl(run / "metrics.jsonl")
    args = read_json(run / "config.json")["args"]
    a_step = args["global_batch_size"]
    if "num_rounds" in args:
        a_step = args["prompts_per_round"] * args["responses_per_prompt"]
    return sum(row.get("val/response_length", 0) for row in rows) * a_step


def points_of(folder, arm):
    """An arm's evaluations, step 0 first; of a mean of weights one, from its win rates."""
    run = folder / run_name("ppo", arm)
    if (run / "metrics.jsonl").is_file() and (points := curve(run)):
        return points
    report = read_json(folder / run_name("winrate", arm) / "winrate.json")
    main, forget = (report[f"prompts_test_{k}"] for k in ("main", "forget"))
    start = {"step": 0, "kl": 0.0, "gold": main["reference_score"]}
    start["forget_gold"] = forget["reference_score"]
    end = {"step": 1, "kl": main["kl"], "gold": main["score"], "forget_gold": forget["score"]}
    return [start, end]


def arms_of(folder):
    """The arms of a seed that have run: the paper's, the study's, these."""
    runs = [path.parent for path in folder.glob("ppo */done.json")]
    names = {arm.replace("/", ""): arm for arm in (*ARMS, *PPO_ARMS, *OFFLINE_ARMS)}
    found = [run.name.removeprefix("ppo ") for run in runs]
    skipped = ("c=", f"beta={study.BETA}")
    return sorted(names.get(name, name) for name in found if not any(k in name for k in skipped))


def collect(folder):
    """{arm: evaluations, tokens, minutes} of one seed."""
    found = {}
    for arm in arms_of(folder):
        run = folder / run_name("ppo", arm)
        points = points_of(folder, arm)
        trained = (run / "metrics.jsonl").is_file()
        found[arm] = {"points": points, "tokens": tokens(run) if trained else 0}
        found[arm]["minutes"] = read_json(run / "done.json")["seconds"] / 60
        rates = folder / run_name("winrate", arm) / "winrate.json"
        if rates.is_file():  # on all test prompts
            report = read_json(rates)
            names = {"gold": "prompts_test_main", "forget_gold": "prompts_test_forget"}
            found[arm]["tested"] = {k: report[name]["score"] for k, name in names.items()}
    return found


def between_evaluations(points, kl, column):
    """Between the first two evaluations on both sides of `kl`, linear in sqrt(KL); None without."""
    for one, other in itertools.pairwise(points):
        low, high = (max(point["kl"], 0.0) ** 0.5 for point in (one, other))
        if low <= kl**0.5 <= high:
            share = (kl**0.5 - low) / max(high - low, 1e-9)
            return one[column] + share * (other[column] - one[column])


def statistics(arms):
    """Of one arm, the seeds' entries: {statistic: a value a seed}; None where there is none."""
    found = {}
    for column, name in (("gold", "main"), ("forget_gold", "forget")):
        for kl in KLS:
            of_seeds = [between_evaluations(arm["points"], kl, column) for arm in arms]
            found[f"{name} at {kl:g}"] = of_seeds
        found[name] = [arm["points"][-1][column] for arm in arms]
    found["KL"] = [arm["points"][-1]["kl"] for arm in arms]
    starts = [arm["points"][0]["gold"] for arm in arms]
    found["helps"] = [end > start for end, start in zip(found["main"], starts, strict=True)]
    found["tokens"] = [arm["tokens"] for arm in arms]
    found["minutes"] = [arm["minutes"] for arm in arms]
    return found


def answers_of(seeds):
    """As study.answer_questions."""
    found = {}
    for name, (question, rule, arms) in QUESTIONS.items():

        def number(seed, arm, rule=rule, arms=arms):
            if arm not in seed:
                return None
            if rule not in (AT_END, FORGET_END):
                return between_evaluations(seed[arm]["points"], 0.5, COLUMNS[rule])
            both = all("tested" in seed.get(one, {}) for one in arms)  # on the same prompts
            return (seed[arm]["tested"] if both else seed[arm]["points"][-1])[COLUMNS[rule]]

        pairs = [[number(seed, arm) for arm in arms] for seed in seeds]
        answered = study.answered(pairs)
        found[name] = {"question": question, "rule": rule.format(*arms)} | answered
    return found


def in_all(seeds):
    """{arm: its entries} of the arms that every seed has."""
    common = set.intersection(*(set(seed) for seed in seeds))
    return {arm: [seed[arm] for seed in seeds] for arm in seeds[0] if arm in common}


def table(seeds):
    """A row an arm, best gold on main at the end first."""

    def cell(values, form=".2f"):
        known = [v for v in values if v is not None]
        return with_interval(*over_seeds(known), form) if len(known) == len(values) else "–"

    found = {arm: statistics(entries) for arm, entries in in_all(seeds).items()}
    rows = []
    for arm in sorted(found, key=lambda name: -np.mean(found[name]["main"])):
        of = found[arm]
        cells = [cell(of[f"{name} at {kl:g}"]) for kl in KLS for name in ("main", "forget")]
        cells += [cell(of[name]) for name in ("KL", "main", "forget")]
        helps = f"{sum(of['helps'])} of {len(of['helps'])}"
        cost = f"{np.mean(of['tokens']) / 1000:.0f}", f"{np.mean(of['minutes']):.1f}"
        rows.append([arm, *cells, helps, *cost])
    at = [f"{name} at KL {kl:g}" for kl in KLS for name in ("main", "forget")]
    columns = ("arm", *at, "KL at the end", "main", "forget", "helps", "1000 tokens", "minutes")
    return markdown_table(columns, rows)


FAMILIES = {  # colours of the figure
    "PPO": "tab:red", "AM": "tab:blue", "without a critic": "tab:green", "pairs": "tab:purple",
    "rejection sampling": "tab:orange", "mean of weights": "black",
    "SFT continued": "tab:brown",
}  # fmt: skip


def family(arm):
    if "averaged" in arm or arm == "SFT continued":
        return "mean of weights" if "averaged" in arm else arm
    if arm in OFFLINE_ARMS:
        sampling = OFFLINE_ARMS[arm][0] == REJECTION
        return "rejection sampling" if sampling else "pairs"
    if arm in PPO_ARMS and PPO_ARMS[arm][0] == "baselines.rloo":
        return "without a critic"
    return "AM" if "AM" in arm else "PPO"


def draw(seeds, path):
    """Is KL all there is to forgetting? Every evaluation of every arm and seed."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    axes = figure.subplots(1, 2)
    titles = {"gold": "gold on main", "forget_gold": "gold on forget"}
    for axis, (column, title) in zip(axes, titles.items(), strict=True):
        for name, colour in FAMILIES.items():
            points = [
                (point["kl"], point[column] - entry["points"][0][column])
                for arm, entries in in_all(seeds).items()
                if family(arm) == name
                for entry in entries
                for point in entry["points"][1:]
            ]
            if points:
                x, y = np.array(points).T
                axis.scatter(x.clip(min=1e-3), y, 7, color=colour, alpha=0.5, label=name, lw=0)
        axis.axhline(0, color="black", lw=0.8, ls=":")
        axis.set(xscale="log", xlabel="KL to SFT on the main test prompts (nats)")
        axis.set(ylabel=f"{title}, less SFT's")
    axes[0].legend(fontsize=8, markerscale=2)
    figure.savefig(path, dpi=110)


def write(folder, finished):
    seeds = {seed: collect(of_seed) for seed, of_seed in finished.items()}
    answers = answers_of([*seeds.values()])
    results = {"seeds": list(seeds), "answers": answers, "of_seeds": list(seeds.values())}
    write_json(folder / "stabilisers.json", results | environment())
    parts = table([*seeds.values()]), study.questions_page(answers, QUESTIONS)
    page = "\n".join((f"{len(seeds)} seeds: {', '.join(map(str, seeds))}.\n", *parts))
    (folder / "stabilisers.md").write_text(page, encoding="utf-8")
    draw([*seeds.values()], folder / "stabilisers.png")
    return page


# --- some arms alone, and the search --------------------------------------------------------------

FIRST = ("world", "sft", "preferences_train", "preferences_test", "rm", "am", "select_main")
FIRST += ("calibration",)


def jobs_of_arms(jobs, arms):
    """Of all jobs of a seed those of `arms`, what these need and what every arm starts from."""
    by_name = {job.folder.name: job for job in jobs}
    runs = [run for arm in arms for run in (run_name("ppo", arm), run_name("winrate", arm))]
    if unknown := [arm for arm in arms if run_name("ppo", arm) not in by_name]:
        raise InputError(f"--arms: {unknown[0]!r} is none; some are {', '.join(PPO_ARMS)}")
    wanted = [*FIRST, *runs]
    policies = {job.args.get("output_dir", "") + "/model": name for name, job in by_name.items()}
    for name in wanted:  # grows
        if name in by_name:
            wanted += by_name[name].needs
            if of := policies.get(by_name[name].args.get("model_name_or_path")):
                wanted.append(of)  # of a mean of weights the policy that goes in
    return [job for job in jobs if job.folder.name in wanted]


def search_jobs(folder, seed, s, sizes):
    """What the arms of SEARCHED need; these arms at every rate, in folders of their own."""
    own = {"world", "sft", "preferences_train", "rm", "am"}
    base = jobs_of_seed(folder, seed, s)
    first = [job for job in base if job.folder.name in own]
    jobs = []
    for job in base + extra_jobs(folder, seed, s, sizes):
        if job.folder.name == "rso_pairs":
            jobs.append(job)
        for rate in SEARCHED.get(job.folder.name.removeprefix("ppo "), ()):
            name = job.folder.with_name(f"{job.folder.name} lr={rate:g}")
            args = job.args | {"learning_rate": rate, "output_dir": str(name)}
            needs = tuple(name for name in job.needs if name not in own)
            jobs.append(Job(name, job.script, args, needs))
    return first, jobs


def searched(folder):
    """{arm: {rate: mean gold on main of the second half of the evaluations}}"""
    found = {}
    for path in sorted(folder.glob("ppo * lr=*/done.json")):
        arm, rate = path.parent.name.removeprefix("ppo ").split(" lr=")
        golds = [row["gold"] for row in curve(path.parent)]
        found.setdefault(arm, {})[rate] = float(np.mean(golds[len(golds) // 2 :]))
    return found


def main(args: Args):
    check_seeds(args.seeds)
    folder, s, finished = Path(args.folder), SETTINGS[args.scale], {}
    one_c, sizes = s | {"clusters": s["clusters"][:1]}, SIZES[args.scale]
    for seed in args.seeds:
        of_seed = folder / f"seed_{seed}"
        if args.search:
            for jobs in search_jobs(of_seed, seed, s, sizes):
                run_jobs(jobs)
            write_json(of_seed / "search.json", searched(of_seed))
            rows = [
                [arm, *(f"{r}: {g:.2f}" for r, g in of.items())]
                for arm, of in searched(of_seed).items()
            ]
            print(markdown_table(("arm", "rate: gold", "", ""), rows))
            continue
        stages = [jobs_of_seed(of_seed, seed, one_c), study.extra_jobs(of_seed, seed, s)]
        stages.append(extra_jobs(of_seed, seed, s, sizes))
        every = [job for jobs in stages for job in jobs]
        chosen = jobs_of_arms(every, args.arms) if args.arms else every
        for jobs in stages:  # each needs files of those before it
            run_jobs([job for job in jobs if job in chosen])
        finished[seed] = of_seed
        print(write(folder, finished))


if __name__ == "__main__":
    run_cli(main, Args, __doc__)
