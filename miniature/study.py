"""The study of many seeds: the paper's arms at matched KL, and rehearsal beside its rivals.

    python -m miniature.reproduce --seeds 1 2 3 --output_dir results/study
    python -m miniature.study

For every seed it runs the reproduction's jobs, unless they are there already. Figure 6's sweep over
c is left out: three seeds decide it. Then, with the same prompts, steps and rates:

    matched KL   every arm at a larger beta, too, and an AM whose m is fitted on held-out training
                 pairs (tools/fit_margin.py)
    rehearsal    D_R replaced by random pairs of each cluster, by those of the lowest scores, and by
                 SFT demonstrations (ptx: InstructGPT's mix of earlier data), at the same gamma
    averaging    the mean of the weights of a PPO policy and SFT's (baselines/average_weights.py)

It writes study.json, study.md, study.png, claims.md (the tables of docs/results/rules.md) and the
reproduction's page over all seeds. The questions and the rules that answer them stand in QUESTIONS,
written before any answer was seen; with ten of them, one false answer at 95 % is no surprise.
Finished runs are kept, so more --seeds can follow, and the files are written anew after every seed.
S1 and S2 ask nearly one thing: multiplying every score and the KL coefficient by c gives the same
policy gradient, except through the critic (its value clip, gradient clip and optimiser).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.figure import Figure

from miniature import reproduce
from miniature.claims import by_interval, claims_page, decide_claims, over_seeds
from miniature.jobs import Job, check_seeds, read_json, run_jobs
from miniature.reproduce import ARMS, SETTINGS, curve, jobs_of_seed, run_name
from miniature.tables import markdown_table, with_interval
from utils import environment, run_cli, write_json

BETA = 0.15  # beside the reproduction's 0.05
AT_TWO_BETAS = (*ARMS, "AM-PPO fitted m")
REPLAY = {"random": "random", "low scores": "low_advantage"}  # D_R's pairs; ptx comes beside them
AVERAGED = ("RM-PPO", "RM-PPO rescaled", "AM-PPO")
NEEDED = 8  # seeds; with fewer every answer is undecided, and looking at them decides nothing
KL = 0.5  # nats, within the reach of every arm
MATCHED = (
    f"gold on main at a KL of {KL}, {{0}} - {{1}}, gold fitted as SFT's + d (a - b d), d = "
    "sqrt(KL) (Gao et al. 2023), over all evaluations of its two beta: yes if the 95 % interval "
    "over seeds (Student's t) lies above 0, no if below; undecided otherwise, with fewer than "
    f"{NEEDED} seeds, or where an arm of a seed never reached that KL"
)
FORGET = (
    "win - lose against SFT on forget, {0} - {1}: yes if the 95 % interval over seeds lies above 0 "
    "and that of the same difference on main not below 0, no if it lies below 0; undecided "
    f"otherwise, or with fewer than {NEEDED} seeds"
)
QUESTIONS = {  # name: question, rule, the two arms
    "S1": ("does AM buy more than its smaller scale?", MATCHED, ("AM-PPO", "RM-PPO rescaled")),
    "S2": ("does AM buy more than a larger beta?", MATCHED, ("AM-PPO", "RM-PPO")),
    "S3": ("does AM buy more than normalised scores?", MATCHED, ("AM-PPO", "RM-PPO w/ MA")),
    "S4": ("does the fitted m beat m = 2.5?", MATCHED, ("AM-PPO fitted m", "AM-PPO")),
    "S5": ("does rehearsal help at matched KL?", MATCHED, ("AM-PPO-SR", "AM-PPO")),
    "S6": ("does rehearsal help on forget?", FORGET, ("AM-PPO-SR", "AM-PPO")),
    "S7": ("does the score matter in selecting D_R?", FORGET, ("AM-PPO-SR", "AM-PPO-SR random")),
    "S8": ("are high scores better than low ones?", FORGET, ("AM-PPO-SR", "AM-PPO-SR low scores")),
    "S9": ("does D_R beat SFT demonstrations (ptx)?", FORGET, ("AM-PPO-SR", "AM-PPO ptx")),
    "S10": ("does rehearsal beat averaging the weights?", FORGET, ("AM-PPO-SR", "AM-PPO averaged")),
}


@dataclass
class Args:
    seeds: tuple[int, ...] = tuple(range(1, NEEDED + 1))
    """every seed repeats everything: annotators, SFT, scorers, PPO"""
    folder: str = "results/study"
    """reproduce.py's --output_dir; the study's runs lie beside its own, and its files too"""
    scale: Literal["smoke", "full"] = "full"
    """the reproduction's"""


# --- runs -----------------------------------------------------------------------------------------


def extra_jobs(folder, seed, s):
    """The runs of one seed: its own reproduction's jobs with other flags."""
    base = {job.folder.name: job for job in jobs_of_seed(folder, seed, s)}
    jobs = []

    def at(*parts):
        return str(folder.joinpath(*parts))

    def like(model, name, needs=(), **flags):
        args = base[model].args | {"output_dir": at(name)} | flags
        jobs.append(Job(folder / name, base[model].script, args, needs))

    def ppo(model, name, needs=(), **flags):
        like(run_name("ppo", model), run_name("ppo", name), needs, **flags)

    def winrate(name):
        run = run_name("ppo", name)
        like("winrate AM-PPO", run_name("winrate", name), (run,), policy=at(run, "model"))

    # --- the fitted m: of three, on the prompts that a share of 15 % holds out
    fit = {k: v for k, v in base["am"].args.items() if k != "loss"}
    fit |= dict(output_dir=at("fit_margin"), margins=(2.5, 5.0, 10.0), min_pairs=10**9)
    jobs.append(Job(folder / "fit_margin", "tools.fit_margin", fit))
    like("am", "am_fitted", ("fit_margin",), am_margin=at("fit_margin", "margins.json"))
    fitted = dict(needs=("am_fitted",), reward_model_path=at("am_fitted", "model"))
    ppo("AM-PPO", "AM-PPO fitted m", **fitted)

    # --- rehearsal
    answered = at("select_main", "responses.jsonl")
    for name, criterion in REPLAY.items():
        chosen = f"select_{criterion}"
        flags = dict(model_name_or_path=None, dataset_name=answered, criterion=criterion)
        like("select_main", chosen, **flags)
        rows = at(chosen, "rehearsal.jsonl")
        ppo("AM-PPO-SR", f"AM-PPO-SR {name}", (chosen,), rehearsal_dataset_name=rows)
        winrate(f"AM-PPO-SR {name}")
    ppo("AM-PPO-SR", "AM-PPO ptx", rehearsal_dataset_name=at("world", "sft.jsonl"))
    winrate("AM-PPO ptx")

    # --- averages
    for arm in AVERAGED:
        averaged = run_name("ppo", f"{arm} averaged")
        args = dict(model_name_or_path=at(run_name("ppo", arm), "model"), weight=0.5)
        args |= dict(init_model=at("sft", "model"), output_dir=at(averaged, "model"))
        jobs.append(Job(folder / averaged, "baselines.average_weights", args))
        winrate(f"{arm} averaged")

    # --- beta
    for arm in ARMS:
        ppo(arm, f"{arm} beta={BETA}", kl_coef=BETA)
    ppo("AM-PPO", f"AM-PPO fitted m beta={BETA}", kl_coef=BETA, **fitted)
    return jobs


def collect(folder):
    """One seed: {arm: {beta: evaluations}}, {arm: win - lose on main and forget}, the fitted m."""
    curves, net_win = {}, {}
    for arm in AT_TWO_BETAS:
        runs = {"0.05": arm, str(BETA): f"{arm} beta={BETA}"}
        curves[arm] = {beta: curve(folder / run_name("ppo", name)) for beta, name in runs.items()}
    for path in sorted(folder.glob("winrate *")):
        report = read_json(path / "winrate.json")
        cells = {k: report[f"prompts_test_{k}"] for k in ("main", "forget")}
        net = {k: cell["win"] - cell["lose"] for k, cell in cells.items()}
        net_win[path.name.removeprefix("winrate ")] = net
    m = read_json(folder / "fit_margin" / "margins.json")["default"]
    return {"curves": curves, "net_win": net_win, "fitted_m": m}


# --- answers --------------------------------------------------------------------------------------


def fitted_at_kl(curves, kl, column="gold"):
    """An arm's gold at this KL by its fitted curve; None where none of its runs has reached it."""
    start = next(iter(curves.values()))[0][column]
    points = np.array([(row["kl"], row[column]) for rows in curves.values() for row in rows[1:]])
    if points[:, 0].max() < kl:
        return None
    d = np.sqrt(points[:, 0].clip(min=0))
    a, b = np.linalg.lstsq(np.stack([d, -(d**2)], 1), points[:, 1] - start, rcond=None)[0]
    return float(start + kl**0.5 * (a - b * kl**0.5))


def answer_questions(seeds):
    answers = {}
    for name, (question, rule, arms) in QUESTIONS.items():
        main = None
        if rule == MATCHED:
            pairs = [[fitted_at_kl(s["curves"][arm], KL) for arm in arms] for s in seeds]
        else:
            nets = [[s["net_win"][arm.replace("/", "")] for arm in arms] for s in seeds]
            pairs = [[net["forget"] for net in pair] for pair in nets]
            main = over_seeds([one["main"] - other["main"] for one, other in nets])[1]
        answers[name] = {"question": question, "rule": rule.format(*arms)} | answered(pairs)
        if answers[name]["verdict"] == "yes" and main and main[1] < 0:
            answers[name]["verdict"] = "undecided"
    return answers


def answered(pairs):
    """By the two arms' numbers in each seed, None where a seed has none."""
    of_seeds = [None if None in pair else pair[0] - pair[1] for pair in pairs]
    mean, interval = (None, None) if None in of_seeds else over_seeds(of_seeds)
    verdict = by_interval(interval if len(pairs) >= NEEDED else None, "yes", "no")
    found = {"difference": mean, "interval": interval, "of_seeds": of_seeds}
    return found | {"verdict": verdict}


# --- pages ----------------------------------------------------------------------------------------

COLOURS = ("tab:red", "tab:orange", "tab:gray", "tab:blue", "tab:green", "tab:purple")


def draw(seeds, path):
    """Above, gold against KL along training (Goodhart curves; dashed: the larger beta); below, gold
    at matched KL."""

    def bars(mean, interval):
        return [[mean - interval[0]], [interval[1] - mean]] if interval else None

    figure = Figure(figsize=(11, 8), layout="constrained")
    upper, lower = figure.subplots(2, 2, height_ratios=(3, 2))
    columns = {"main": "gold", "forget": "forget_gold"}.items()
    for above, below, (title, column) in zip(upper, lower, columns, strict=True):
        for place, (arm, colour) in enumerate(zip(AT_TWO_BETAS, COLOURS, strict=True)):
            for line, beta in ("-", "0.05"), ("--", str(BETA)):
                steps = list(zip(*(s["curves"][arm][beta] for s in seeds), strict=True))
                x = [np.mean([row["kl"] for row in step]) for step in steps]
                y = [over_seeds([row[column] for row in step]) for step in steps]
                look = dict(color=colour, marker=".", lw=1.3)
                if column == "gold":
                    look["label"] = f"{arm}, beta {beta}"
                above.plot(x, [mean for mean, _ in y], line, **look)
                last = dict(color=colour, elinewidth=0.8, capsize=2)
                above.errorbar(x[-1:], [y[-1][0]], bars(*y[-1]), **last)
            values = [fitted_at_kl(s["curves"][arm], KL, column) for s in seeds]
            if None not in values:
                below.plot(values, [place] * len(values), "|", color=colour, alpha=0.5)
                mean, interval = over_seeds(values)
                look = dict(fmt="o", color=colour, capsize=3)
                below.errorbar([mean], [place], xerr=bars(mean, interval), **look)
        start = np.mean([s["curves"]["AM-PPO"]["0.05"][0][column] for s in seeds])
        above.axhline(start, color="black", lw=0.8, ls=":")
        below.axvline(start, color="black", lw=0.8, ls=":")
        above.set(xlabel="KL to SFT on the main test prompts (nats)", ylabel="gold reward")
        above.set_title(f"{title} prompts")
        below.set(xlabel=f"gold reward at a KL of {KL} (ticks: seeds; dotted: SFT)")
        below.set_yticks(range(len(AT_TWO_BETAS)), AT_TWO_BETAS)
        below.invert_yaxis()
        below.locator_params(axis="x", nbins=6)
    figure.legend(loc="outside lower center", fontsize=8, ncols=len(AT_TWO_BETAS))
    figure.savefig(path, dpi=120)


def markdown(seeds):
    """What the answers of claims.md rest on: fitted m, win - lose of every arm, its KL and gold."""

    def cell(values, form=".2f"):
        return "–" if None in values else with_interval(*over_seeds(values), form)

    nets, matched, ends = [], [], []
    for arm in seeds[0]["net_win"]:
        of_sets = [[s["net_win"][arm][k] for s in seeds] for k in ("main", "forget")]
        nets.append([arm, *(cell(values, "+.1f") for values in of_sets)])
    for arm in AT_TWO_BETAS:
        for_columns = [[fitted_at_kl(s["curves"][arm], KL, column) for s in seeds]
                       for column in ("gold", "forget_gold")]  # fmt: skip
        matched.append([arm, *map(cell, for_columns)])
        for beta in ("0.05", str(BETA)):
            last = [s["curves"][arm][beta][-1] for s in seeds]
            cells = [cell([row[k] for row in last]) for k in ("kl", "gold", "forget_gold")]
            ends.append([f"{arm}, {beta}", *cells])
    return "\n".join((
        f"{len(seeds)} seeds; fitted m: {', '.join(format(s['fitted_m'], 'g') for s in seeds)}\n",
        markdown_table(("arm", "win - lose, main", "win - lose, forget"), nets),
        markdown_table((f"gold at a KL of {KL}", "main", "forget"), matched),
        markdown_table(("arm, beta", "KL", "gold, main", "gold, forget"), ends),
    ))  # fmt: skip


def questions_page(answers, questions=QUESTIONS):
    """docs/results/rules.md's table of a study's questions, and their two rules."""
    rows, asked = [], {}
    for name, answer in answers.items():
        question, rule, arms = questions[name]
        asked.setdefault(rule, []).append(name)
        number = with_interval(answer["difference"], answer["interval"], "+.3g")
        rows.append((name, question, " − ".join(arms), number, f"**{answer['verdict']}**"))
    columns = ("", "question of the study", "arms", "difference", "answer")
    rules = [f"- **{', '.join(names)}** {rule.format(*'AB')}" for rule, names in asked.items()]
    return "\n".join((markdown_table(columns, rows), "Rules, for arms A − B:\n", *rules, ""))


def write(folder, finished, settings):
    """study.json, study.md, study.png, claims.md of the finished seeds {seed: its folder}."""
    seeds = [collect(f) for f in finished.values()]
    answers = answer_questions(seeds)
    claims = decide_claims([reproduce.collect(f, settings) for f in finished.values()])
    results = {"seeds": list(finished), "claims": claims, "answers": answers, "of_seeds": seeds}
    write_json(folder / "study.json", results | environment())
    (folder / "study.md").write_text(markdown(seeds), encoding="utf-8")
    draw(seeds, folder / "study.png")
    page = f"{claims_page(claims, list(finished))}\n{questions_page(answers)}"
    (folder / "claims.md").write_text(page, encoding="utf-8")
    return page


def main(args: Args):
    check_seeds(args.seeds)
    folder, settings, finished = Path(args.folder), SETTINGS[args.scale], {}
    one_c = settings | {"clusters": settings["clusters"][:1]}
    for seed in args.seeds:
        finished[seed] = folder / f"seed_{seed}"
        run_jobs(jobs_of_seed(finished[seed], seed, one_c))
        run_jobs(extra_jobs(finished[seed], seed, settings))
        page = write(folder, finished, settings)
    reproduce.write_results(folder, args, settings, {})
    print(page)


if __name__ == "__main__":
    run_cli(main, Args, __doc__)
