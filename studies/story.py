"""How sure is the story? In how many fresh seeds does a newcomer see what the README tells?

    python -m studies.story --output_dir results/story

Every seed repeats the miniature with the arms RM-PPO and AM-PPO alone. The rule, written before the
runs: a seed *shows the story* if RM-PPO's last evaluation, compared with step 0, has a gold that is
lower by VISIBLE or more on the main test prompts, a higher score there, and a gold that is lower by
VISIBLE or more on the forget prompts. VISIBLE is what a reader can see in the report's figure.
Beside it stands the same with 0 for VISIBLE, and what AM-PPO did. Seeds 1 to 8 are the claims' own.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from miniature.claims import VISIBLE
from miniature.jobs import check_seeds, run_jobs
from miniature.reproduce import SETTINGS, curve, jobs_of_seed, run_name
from miniature.tables import markdown_table
from utils import environment, run_cli, write_json

ARMS = ("RM-PPO", "AM-PPO")


@dataclass
class Args:
    output_dir: str = "results/story"
    """receives a folder a seed, story.json and story.md"""
    seeds: tuple[int, ...] = tuple(range(9, 25))
    """every seed repeats world order, SFT, annotators, scorers, PPO"""
    scale: Literal["full", "smoke"] = "full"
    """the reproduction's"""


def shows_the_story(rows, visible):
    """Gold falls on both sets while the score rises; rows: the evaluations of RM-PPO."""
    start, end = rows[0], rows[-1]
    falls = all(end[k] - start[k] <= -visible for k in ("gold", "forget_gold"))
    return falls and end["gold"] < start["gold"] and end["proxy"] > start["proxy"]


def wanted(folder, seed, settings):
    """The jobs of one seed that two arms of PPO need."""
    names = {"world", "sft", "preferences_train", "rm", "am"} | {run_name("ppo", a) for a in ARMS}
    return [job for job in jobs_of_seed(folder, seed, settings) if job.folder.name in names]


def write(folder, curves):
    """story.json and story.md of {seed: {arm: its evaluations}} -> the page."""
    shown = {
        visible: [seed for seed, arms in curves.items() if shows_the_story(arms["RM-PPO"], visible)]
        for visible in (VISIBLE, 0.0)
    }
    rows = []
    for seed, arms in curves.items():
        start, cells = arms["RM-PPO"][0], []
        for arm in ARMS:
            end, best = arms[arm][-1], max(row["gold"] for row in arms[arm])
            cells += [f"{end['gold']:.2f} ({best:.2f}) / {end['forget_gold']:.2f}"]
        rise = arms["RM-PPO"][-1]["proxy"] - start["proxy"]
        sft = f"{start['gold']:.2f} / {start['forget_gold']:.2f}"
        story = "yes" if seed in shown[VISIBLE] else "no"
        rows.append([str(seed), sft, *cells, f"{rise:+.2f}", story])
    columns = ("seed", "SFT: gold on main / forget", *(f"{a}: at the end (best)" for a in ARMS))
    page = markdown_table((*columns, "RM-PPO's score", "story"), rows)
    counts = [f"{len(seeds)} of {len(curves)} with {v} or more" for v, seeds in shown.items()]
    page = f"The story shows in {', '.join(counts)}.\n\n{page}\n"
    found = {"shown": {str(v): seeds for v, seeds in shown.items()}, "curves": curves}
    write_json(folder / "story.json", found | environment())
    (folder / "story.md").write_text(page, encoding="utf-8")
    return page


def main(args: Args):
    check_seeds(args.seeds)
    settings, curves, folder = SETTINGS[args.scale], {}, Path(args.output_dir)
    for seed in args.seeds:  # the files are written anew after every seed
        of_seed = folder / f"seed_{seed}"
        run_jobs(wanted(of_seed, seed, settings))
        curves[seed] = {arm: curve(of_seed / run_name("ppo", arm)) for arm in ARMS}
        page = write(folder, curves)
    print(page)


if __name__ == "__main__":
    run_cli(main, Args, __doc__)
