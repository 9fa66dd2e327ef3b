"""The multi-seed study: what the arms of the paper do at matched KL, and what rehearsal does beside its rivals.

    python reproduce.py --seeds 1 2 3 --output_dir results/study && python -m tools.study

For every seed it runs reproduce.py's jobs, unless they are there already, without Figure 6's sweep over c, which three seeds
decide; then, with the same prompts, steps and rates,

    matched KL   every arm at a larger beta too, and an AM whose m is fitted on held-out training pairs (tools/fit_margin.py)
    rehearsal    D_R replaced by random pairs of each cluster, by the pairs of the lowest scores, and by SFT demonstrations
                 (ptx: InstructGPT's mix of the earlier stage's data), at the same gamma
    averaging    the mean of the weights of a PPO policy and SFT's, half and half (baselines/average_weights.py)

and writes study.json, study.md, study.png, claims.md (the tables of docs/CLAIMS.md) and the reproduction's page over all
seeds. The questions and the rules that
answer them stand in QUESTIONS, written before any answer was seen; with ten of them, one false answer at 95 % is no surprise.
Finished runs are kept, so more --seeds can follow, and the files are written anew after every seed. S1 and S2 ask nearly
one thing: with whitened advantages a factor c on the scores at beta is no factor at beta / c, but for the critic (its value
clip, gradient clip and optimiser).
"""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from reproduce import ARMS, CLAIMS, SETTINGS, WORKERS, Job, Progress, by_interval, curve, decide_claims, die_with_parent
from reproduce import collect as collect_reproduction
from reproduce import jobs_of_seed, over_seeds, read_json, run_jobs, run_name, write_results
from tools.report import write_report
from utils import InputError, environment, run_cli, write_json

BETAS = dict.fromkeys((*ARMS, "AM-PPO fitted m"), (0.15,))  # beside the reproduction's 0.05
REPLAY = {"random": "random", "low scores": "low_advantage"}  # D_R's pairs; ptx comes beside them
AVERAGED = ("RM-PPO", "RM-PPO rescaled", "AM-PPO")
NEEDED = 8  # seeds; with fewer every answer is undecided, and looking at them decides nothing
KL = 0.5  # nats, within the reach of every arm
MATCHED = (
    f"gold on main at a KL of {KL}, {{0}} - {{1}}, gold fitted as SFT's + d (a - b d), d = sqrt(KL) (Gao et al. 2023), "
    "over all evaluations of its two beta: yes if the 95 % interval over seeds (Student's t) lies above 0, no if below; "
    f"undecided otherwise, with fewer than {NEEDED} seeds, or where an arm of a seed never reached that KL"
)
FORGET = (
    "win - lose against SFT on forget, {0} - {1}: yes if the 95 % interval over seeds lies above 0 and that of the same "
    f"difference on main not below 0, no if it lies below 0; undecided otherwise, or with fewer than {NEEDED} seeds"
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
    scale: str = "full"
    """the reproduction's"""


def extra_jobs(folder, seed, s):
    """The runs of one seed: its own reproduction's jobs with other flags."""
    base = {job.folder.name: job for job in jobs_of_seed(folder, seed, s)}
    jobs = []

    def like(model, name, needs=(), **flags):
        args = base[model].args | {"output_dir": str(folder / name)} | flags
        jobs.append(Job(base[model].kind, folder / name, needs, base[model].function, args, base[model].steps))
        return str(folder / name)

    def ppo(model, name, needs=(), **flags):
        return like(run_name("ppo", model), run_name("ppo", name), needs, **flags)

    def winrate(name):
        policy = str(folder / run_name("ppo", name) / "model")
        like("winrate AM-PPO", run_name("winrate", name), (run_name("ppo", name),), policy=policy)

    # --- the fitted m: of three, on the prompts that a share of 15 % holds out
    fit = {k: v for k, v in base["am"].args.items() if k != "loss"} | {"output_dir": str(folder / "fit_margin")}
    fit |= {"margins": (2.5, 5.0, 10.0), "min_pairs": 10**9}
    jobs.append(Job("scorer", folder / "fit_margin", (), "tools.fit_margin:main", fit))
    margins = str(folder / "fit_margin" / "margins.json")
    fitted = like("am", "am_fitted", ("fit_margin",), am_margin=margins) + "/model"
    scorer = {"AM-PPO fitted m": dict(reward_model_path=fitted)}
    ppo("AM-PPO", "AM-PPO fitted m", ("am_fitted",), **scorer["AM-PPO fitted m"])

    # --- rehearsal
    for name, criterion in REPLAY.items():
        chosen = f"select_{criterion}"
        answered = str(folder / "select_main" / "responses.jsonl")
        like("select_main", chosen, model_name_or_path=None, dataset_name=answered, criterion=criterion)
        rows = str(folder / chosen / "rehearsal.jsonl")
        ppo("AM-PPO-SR", f"AM-PPO-SR {name}", (chosen,), rehearsal_dataset_name=rows)
        winrate(f"AM-PPO-SR {name}")
    ppo("AM-PPO-SR", "AM-PPO ptx", rehearsal_dataset_name=str(folder / "world" / "sft.jsonl"))
    winrate("AM-PPO ptx")

    # --- averages
    for arm in AVERAGED:
        name = f"{arm} averaged"
        args = dict(model_name_or_path=str(folder / run_name("ppo", arm) / "model"), weight=0.5)
        args |= dict(
            init_model=base["am"].args["model_name_or_path"], output_dir=str(folder / run_name("ppo", name) / "model")
        )
        jobs.append(Job("winrate", folder / run_name("ppo", name), (), "baselines.average_weights:main", args))
        winrate(name)

    # --- beta
    for arm, betas in BETAS.items():
        model = "AM-PPO" if arm not in ARMS else arm
        for beta in betas:
            needs = ("am_fitted",) if arm in scorer else ()
            ppo(model, f"{arm} beta={beta}", needs, kl_coef=beta, **scorer.get(arm, {}))
    return jobs


def collect(folder):
    """One seed: {arm: {beta: the last evaluation}}, {arm: win - lose on forget and main}, the fitted m."""
    points = {}
    for arm, betas in BETAS.items():
        points[arm] = {"0.05": curve(folder / run_name("ppo", arm))}
        points[arm] |= {str(b): curve(folder / run_name("ppo", f"{arm} beta={b}")) for b in betas}
    net = {}
    for path in sorted(folder.glob("winrate *")):
        report = read_json(path / "winrate.json")
        net[path.name.removeprefix("winrate ")] = {
            k: report[f"prompts_test_{k}"]["win"] - report[f"prompts_test_{k}"]["lose"] for k in ("main", "forget")
        }
    m = read_json(folder / "fit_margin" / "margins.json")["default"]
    return {"curves": points, "net_win": net, "fitted_m": m}


def at_kl(curves, kl, column="gold"):
    """Gold of an arm at this KL by its fitted curve; None where no evaluation of its runs has reached it."""
    start = next(iter(curves.values()))[0][column]
    points = np.array([(row["kl"], row[column]) for rows in curves.values() for row in rows[1:]])
    if points[:, 0].max() < kl:
        return None
    d = np.sqrt(points[:, 0].clip(min=0))
    a, b = np.linalg.lstsq(np.stack([d, -(d**2)], 1), points[:, 1] - start, rcond=None)[0]
    return float(start + kl**0.5 * (a - b * kl**0.5))


def answer_questions(seeds):
    answers = {}
    for name, (question, rule, (one, other)) in QUESTIONS.items():
        main = None
        if rule == MATCHED:
            pairs = [tuple(at_kl(s["curves"][arm], KL) for arm in (one, other)) for s in seeds]
        else:
            names = [arm.replace("/", "") for arm in (one, other)]
            pairs, main = ([tuple(s["net_win"][arm][k] for arm in names) for s in seeds] for k in ("forget", "main"))
            main = over_seeds([a - b for a, b in main])[1]
        differences = [None if None in pair else pair[0] - pair[1] for pair in pairs]
        mean, interval = over_seeds(differences) if None not in differences else (None, None)
        verdict = by_interval(interval if len(seeds) >= NEEDED else None, "yes", "no")
        if verdict == "yes" and main and main[1] < 0:
            verdict = "undecided"
        answers[name] = {
            "question": question,
            "rule": rule.format(one, other),
            "difference": mean,
            "interval": interval,
        }
        answers[name] |= {"of_seeds": differences, "verdict": verdict}
    return answers


COLOURS = dict(zip(BETAS, ("tab:red", "tab:orange", "tab:gray", "tab:blue", "tab:green", "tab:purple"), strict=True))


def draw(seeds, path):
    """Above, gold against KL along training (Goodhart curves; dashed: the larger beta); below, gold at matched KL."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    layout = dict(figsize=(11, 8), layout="constrained", height_ratios=(3, 2))
    figure, (curves, matched) = plt.subplots(2, 2, **layout)
    for above, below, column, title in zip(curves, matched, ("gold", "forget_gold"), ("main", "forget"), strict=True):
        for place, (arm, colour) in enumerate(COLOURS.items()):
            for line, beta in zip(("-", "--"), sorted(seeds[0]["curves"][arm], key=float), strict=True):
                steps = list(zip(*(s["curves"][arm][beta] for s in seeds), strict=True))  # (evaluations) of (seeds)
                x = [np.mean([row["kl"] for row in step]) for step in steps]
                y = [over_seeds([row[column] for row in step]) for step in steps]
                label = f"{arm}, beta {beta}" if column == "gold" else None
                above.plot(x, [m for m, _ in y], line, marker=".", color=colour, label=label, lw=1.3)
                if (last := y[-1])[1]:
                    error = [[last[0] - last[1][0]], [last[1][1] - last[0]]]
                    above.errorbar(x[-1:], [last[0]], error, color=colour, elinewidth=0.8, capsize=2)
            values = [at_kl(s["curves"][arm], KL, column) for s in seeds]
            if None not in values:
                below.plot(values, [place] * len(values), "|", color=colour, alpha=0.5)
                mean, interval = over_seeds(values)
                error = [[mean - interval[0]], [interval[1] - mean]] if interval else None
                below.errorbar([mean], [place], xerr=error, fmt="o", color=colour, capsize=3)
        start = np.mean([s["curves"]["AM-PPO"]["0.05"][0][column] for s in seeds])
        above.axhline(start, color="black", lw=0.8, ls=":")
        below.axvline(start, color="black", lw=0.8, ls=":")
        above.set(xlabel="KL to SFT on the main test prompts (nats)", ylabel="gold reward", title=f"{title} prompts")
        below.set(xlabel=f"gold reward at a KL of {KL} (ticks: seeds; dotted: SFT)", yticks=range(len(COLOURS)))
        below.set_yticklabels(COLOURS)
        below.invert_yaxis()
        below.locator_params(axis="x", nbins=6)
    figure.legend(loc="outside lower center", fontsize=8, ncols=len(COLOURS))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def with_interval(mean, interval):
    return f"{mean:.2f}" + (f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else "")


def markdown(seeds):
    """What the answers of claims.md rest on: fitted m, win - lose of every arm, its points in KL and gold."""
    lines = [f"{len(seeds)} seeds; fitted m: " + ", ".join(f"{s['fitted_m']:g}" for s in seeds)]
    lines += ["", "| arm | win - lose, main | win - lose, forget |", "|---|---|---|"]
    for arm in seeds[0]["net_win"]:
        cells = [over_seeds([s["net_win"][arm][k] for s in seeds]) for k in ("main", "forget")]
        shown = [f"{m:+.1f}" + (f" [{i[0]:+.1f}, {i[1]:+.1f}]" if i else "") for m, i in cells]
        lines.append(f"| {arm} | {' | '.join(shown)} |")
    lines += ["", f"| gold at a KL of {KL} | main | forget |", "|---|---|---|"]
    for arm in BETAS:
        values = [[at_kl(s["curves"][arm], KL, column) for s in seeds] for column in ("gold", "forget_gold")]
        lines.append(f"| {arm} | {' | '.join('–' if None in v else with_interval(*over_seeds(v)) for v in values)} |")
    lines += ["", "| arm, beta | KL | gold, main | gold, forget |", "|---|---|---|---|"]
    for arm in BETAS:
        for beta in sorted(seeds[0]["curves"][arm], key=float):
            last = [s["curves"][arm][beta][-1] for s in seeds]
            cells = [over_seeds([row[k] for row in last]) for k in ("kl", "gold", "forget_gold")]
            lines.append(f"| {arm}, {beta} | {' | '.join(with_interval(*cell) for cell in cells)} |")
    return "\n".join(lines) + "\n"


PLACES = {  # where the paper makes a claim, and with it each of its tables and figures
    "Table 1": ("K1", "K2"), "Table 2": ("K9", "K10", "K11", "K12"), "Figure 1a": ("K4",), "Figure 1b": ("K10",),
    "Figure 2": ("K3",), "Figure 3": ("K6",), "Figure 4a": ("K4",), "Figure 4b": ("K5",), "Figure 5": ("K7", "K8", "K9"),
    "Figure 6": ("K13",), "§1": ("K14",),
}  # fmt: skip


def claims_page(claims, answers, seeds):
    """docs/CLAIMS.md's tables: every claim of the paper and every question of the study with rule and verdict."""

    def number(value, interval):
        if value is None:
            return "–"
        return f"{value:+.3g}" + ("" if interval is None else f" [{interval[0]:+.3g}, {interval[1]:+.3g}]")

    lines = [f"Seeds {', '.join(map(str, seeds))}.", "", "| | claim | statistic | verdict |", "|---|---|---|---|"]
    for name, (text, _) in CLAIMS.items():
        c = claims[name]
        lines.append(f"| {name} | {text} | {number(c['statistic'], c['interval'])} | **{c['verdict']}** |")
    lines += ["", "| place | claims | verdicts |", "|---|---|---|"]
    for place, names in PLACES.items():
        lines.append(f"| {place} | {', '.join(names)} | {', '.join(claims[n]['verdict'] for n in names)} |")
    lines += ["", "| | question of the study | difference | answer |", "|---|---|---|---|"]
    for name, a in answers.items():
        lines.append(f"| {name} | {a['question']} | {number(a['difference'], a['interval'])} | **{a['verdict']}** |")
    lines += ["", "Rules:", ""]
    lines += [f"- **{n}** {claims[n]['rule']}" for n in CLAIMS] + [f"- **{n}** {a['rule']}" for n, a in answers.items()]
    return "\n".join(lines) + "\n"


def write(folder, finished, settings):
    """study.json, study.md, study.png and claims.md of the seeds {seed: its folder} that are finished."""
    seeds = [collect(f) for f in finished.values()]
    answers = answer_questions(seeds)
    claims = decide_claims([collect_reproduction(f, settings) for f in finished.values()])
    results = {"seeds": list(finished), "claims": claims, "answers": answers, "of_seeds": seeds}
    write_json(folder / "study.json", results | environment())
    (folder / "study.md").write_text(markdown(seeds), encoding="utf-8")
    draw(seeds, folder / "study.png")
    (folder / "claims.md").write_text(claims_page(claims, answers, list(finished)), encoding="utf-8")


def main(args: Args):
    if args.scale not in SETTINGS:
        raise InputError(f"--scale {args.scale}: is one of {', '.join(SETTINGS)}")
    folder, settings = Path(args.folder), SETTINGS[args.scale]
    if len(set(args.seeds)) < len(args.seeds) or not args.seeds:
        raise InputError(f"--seeds {args.seeds}: give at least one, each once")
    one_c = settings | {"clusters": settings["clusters"][:1]}
    folders = {seed: folder / f"seed_{seed}" for seed in args.seeds}
    jobs = [[jobs_of_seed(f, n, one_c), extra_jobs(f, n, settings)] for n, f in folders.items()]
    progress = Progress([job for of_seed in jobs for part in of_seed for job in part], 0.6)
    with ProcessPoolExecutor(WORKERS, multiprocessing.get_context("spawn"), die_with_parent) as pool:
        for finished, of_seed in enumerate(jobs, 1):
            for part in of_seed:
                run_jobs(part, pool, progress)
            write(folder, dict(list(folders.items())[:finished]), settings)
    write_results(folder, args, settings, {})
    write_report(folder)
    print((folder / "claims.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    run_cli(main, Args, __doc__)
