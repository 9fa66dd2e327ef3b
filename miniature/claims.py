"""The paper's claims K1 to K14 and the rules that decide them, written before the runs.

One run cannot decide a claim about PPO: seeds differ too much. So every run is laid beside the
eight seeds of the committed study (EIGHT): their verdict, and whether this run lies where one more
of their kind would, in 95 of 100 cases.
"""

import json
from pathlib import Path

import numpy as np
from scipy.stats import t

from miniature.tables import markdown_table, with_interval

EIGHT = Path(__file__).parents[1] / "docs/results/eight_seeds.json"
VISIBLE = 0.05  # gold, of a range of 2: a change that a reader can see in a figure
INTERVALS = (
    "Intervals are of 95 %: over seeds (Student's t) from three seeds on; before that over prompts "
    "for claims about scorers, while those about PPO (K7 to K14) are undecided."
)
UNITS = dict.fromkeys(("K1", "K2", "K9", "K10", "K11", "K12", "K14"), "points")
UNITS |= dict.fromkeys(("K4", "K5"), "AM / RM") | dict.fromkeys(("K7", "K8"), "gold")
UNITS |= {"K3": "share of bins", "K6": "std of all scores", "K13": "AM score"}
CLAIMS = {
    "K1": (
        "AM ranks as accurately as RM, or better",
        "accuracy AM - RM in points: reproduced if the interval lies above -0.5, contradicted if "
        "below",
    ),
    "K2": (
        "AM has the lower ECE",
        "ECE AM - RM in points: reproduced if the interval lies below 0, contradicted if above",
    ),
    "K3": (
        "RM is over-confident in most score-gap bins, AM is not",
        "share of bins (with 1 % of the pairs or more) whose confidence exceeds their accuracy, "
        "RM - AM: reproduced if RM's share is above 1/2 and AM's is not, else contradicted",
    ),
    "K4": (
        "RM's mean score differs widely between tasks, AM's does not",
        "spread of task means AM / RM: reproduced if at most 1/3 raw and at most 0.6 after "
        "division by the mean within-task std, contradicted if either is 1 or more, else undecided",
    ),
    "K5": (
        "RM's std differs between tasks, AM's is stable",
        "spread of task stds AM / RM: reproduced if at most 1/2 raw and below 1 after division by "
        "the mean within-task std, contradicted if the raw ratio is 1 or more, else undecided",
    ),
    "K6": (
        "AM separates good from bad responses more distinctly",
        "(mean chosen - mean rejected) / std of all scores, AM - RM: reproduced if the interval "
        "lies above 0, contradicted if below",
    ),
    "K7": (
        "RM-PPO hacks: its reward rises while the judged quality falls",
        "RM-PPO, main curve prompts, gold at the last step - gold at step 0: reproduced if the "
        "interval lies below 0 and the proxy rose in every seed, contradicted if the interval lies "
        "above 0",
    ),
    "K8": (
        "moving-average normalisation of RM scores does not cure it",
        "RM-PPO w/ MA, main curve prompts, gold at the last step - gold at step 0: reproduced if "
        "the interval lies below 0, contradicted if above",
    ),
    "K9": (
        "AM-PPO beats RM-PPO in win rate over SFT on the main set",
        "(win - lose) of AM-PPO - (win - lose) of RM-PPO, main: reproduced if the interval lies "
        "above 0, contradicted if below",
    ),
    "K10": (
        "RM-PPO forgets: it loses to SFT on the forget set",
        "win - lose of RM-PPO, forget: reproduced if the interval lies below 0, contradicted if "
        "above",
    ),
    "K11": (
        "AM-PPO does not forget",
        "win - lose of AM-PPO, forget: reproduced if the interval lies above -5 points, "
        "contradicted if below",
    ),
    "K12": (
        "selective rehearsal raises the win rate further on both sets",
        "(win - lose) of AM-PPO-SR - (win - lose) of AM-PPO, on the set where it is less sure: "
        "reproduced if its interval lies above 0, contradicted if below",
    ),
    "K13": (
        "the number of clusters c matters little (about 0.05 reward)",
        "largest - smallest final proxy score over c, main curve prompts: reproduced if at most "
        "0.05, contradicted if above 0.1",
    ),
    "K14": (
        "response patterns of a high-scoring task transfer to other tasks under RM",
        "share of test answers that open like another task's answers, RM-PPO - SFT, in points: "
        "reproduced if the interval lies above 0 and AM-PPO's mean is smaller, contradicted if it "
        "lies below 0",
    ),
}
SETS = ("main", "forget")
PPO_CLAIMS = ("K7", "K8", "K9", "K10", "K11", "K12", "K13", "K14")


def average(values):
    """Mean over seeds of numbers, or of equal structures of them; other leaves are the first's."""
    first = values[0]
    if isinstance(first, dict):
        return {k: average([v[k] for v in values]) for k in first}
    if isinstance(first, list):
        return [average(list(column)) for column in zip(*values, strict=True)]
    return float(np.mean(values)) if isinstance(first, float) else first


def over_seeds(values, prompt_intervals=None):
    """Mean and 95 % interval: Student's t from three seeds on, before that the prompts' own."""
    mean = float(np.mean(values))
    if len(values) < 3:
        return mean, average(prompt_intervals) if prompt_intervals else None
    half = float(t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5)
    return mean, [mean - half, mean + half]


def by_interval(interval, above="reproduced", below="contradicted", at=0.0):
    if interval is None:
        return "undecided"
    return above if interval[0] > at else below if interval[1] < at else "undecided"


def fig6_spread(curves):
    final = [rows[-1]["proxy"] for rows in curves.values()]
    return max(final) - min(final)


def decide_claims(seeds, less_sure=None):
    """The verdict on every claim; `seeds` is a list of what reproduce.collect() returns.

    less_sure: K12's set, main or forget, where other seeds have settled it.
    """
    found = {}

    def decide(claim, statistic, interval, verdict):
        ppo = claim in PPO_CLAIMS
        found[claim] = {
            "verdict": "undecided" if ppo and len(seeds) < 3 else verdict,
            "statistic": statistic,
            "interval": interval,
            "rule": CLAIMS[claim][1],
            "unit": UNITS[claim],
        }

    def rises(claim, value, interval, at=0.0):
        decide(claim, value, interval, by_interval(interval, at=at))

    def falls(claim, value, interval):
        decide(claim, value, interval, by_interval(interval, "contradicted", "reproduced"))

    def paired(metric):
        entries = [next(iter(s["calibration"]["paired"].values()))[metric] for s in seeds]
        intervals = [[entry["low"], entry["high"]] for entry in entries]
        return over_seeds([entry["difference"] for entry in entries], intervals)

    def overconfident(name):
        shares = []
        for calibration in (s["calibration"] for s in seeds):
            bins, least = calibration["scorers"][name]["bins"], 0.01 * calibration["pairs"]
            over = [b["confidence"] > b["accuracy"] for b in bins if b["count"] >= least]
            shares.append(sum(over) / len(over))
        return np.mean(shares)

    def balance(what):  # AM / RM: raw, its interval, and of spreads in units of the within-task std
        def ratios(key):
            return [s["score_balance"]["am"][key] / s["score_balance"]["rm"][key] for s in seeds]

        within = np.mean(np.divide(ratios(what), ratios("mean_within_std")))
        return *over_seeds(ratios(what)), float(within)

    def gains(arm, key):
        curves = [s["curves"][arm] for s in seeds]
        return [curve[-1][key] - curve[0][key] for curve in curves]

    def net_win(arm, test_set):
        cells = [s["table2"][arm][test_set] for s in seeds]
        return np.array([cell["win"] - cell["lose"] for cell in cells])

    rises("K1", *paired("accuracy"), at=-0.5)
    falls("K2", *paired("ece"))
    rm, am = overconfident("rm"), overconfident("am")
    decide("K3", float(rm - am), None, "reproduced" if rm > 0.5 >= am else "contradicted")
    raw, interval, normalised = balance("spread_of_means")
    verdict = "contradicted" if max(raw, normalised) >= 1 else "undecided"
    even = raw <= 1 / 3 and normalised <= 0.6
    decide("K4", raw, interval, "reproduced" if even else verdict)
    raw, interval, normalised = balance("spread_of_stds")
    verdict = "contradicted" if raw >= 1 else "undecided"
    even = raw <= 0.5 and normalised < 1
    decide("K5", raw, interval, "reproduced" if even else verdict)
    rises("K6", *paired("separation"))

    value, interval = over_seeds(gains("RM-PPO", "gold"))
    verdict = by_interval(interval, "contradicted", "reproduced")
    if verdict == "reproduced" and min(gains("RM-PPO", "proxy")) <= 0:
        verdict = "undecided"
    decide("K7", value, interval, verdict)
    falls("K8", *over_seeds(gains("RM-PPO w/ MA", "gold")))
    rises("K9", *over_seeds(net_win("AM-PPO", "main") - net_win("RM-PPO", "main")))
    falls("K10", *over_seeds(net_win("RM-PPO", "forget")))
    rises("K11", *over_seeds(net_win("AM-PPO", "forget")), at=-5.0)
    gains_of = {k: over_seeds(net_win("AM-PPO-SR", k) - net_win("AM-PPO", k)) for k in SETS}
    sure = {k: interval[0] if interval else mean for k, (mean, interval) in gains_of.items()}
    less_sure = less_sure or min(SETS, key=sure.get)
    rises("K12", *gains_of[less_sure])
    found["K12"]["set"] = less_sure

    swept = [fig6_spread(s["fig6"]) for s in seeds if len(s["fig6"]) > 1]
    value, interval = over_seeds(swept) if swept else (None, None)
    verdict = "undecided"
    if len(swept) >= 3:
        verdict = "reproduced" if value <= 0.05 else "contradicted" if value > 0.1 else "undecided"
    decide("K13", value, interval, verdict)
    foreign = {arm: [s["foreign"][arm] - s["foreign"]["SFT"] for s in seeds]
               for arm in ("RM-PPO", "AM-PPO")}  # fmt: skip
    value, interval = over_seeds(foreign["RM-PPO"])
    verdict = by_interval(interval)
    if verdict == "reproduced" and np.mean(foreign["AM-PPO"]) >= value:
        verdict = "undecided"
    decide("K14", value, interval, verdict)
    return found


PLACES = {  # where the paper makes a claim, and with it each of its tables and figures
    "Table 1": ("K1", "K2"), "Table 2": ("K9", "K10", "K11", "K12"), "Figure 1a": ("K4",),
    "Figure 1b": ("K10",), "Figure 2": ("K3",), "Figure 3": ("K6",), "Figure 4a": ("K4",),
    "Figure 4b": ("K5",), "Figure 5": ("K7", "K8", "K9"), "Figure 6": ("K13",), "§1": ("K14",),
}  # fmt: skip


def claims_page(claims, seeds):
    """docs/results/rules.md's tables of the paper's claims, and their rules."""
    rows = []
    for name, c in claims.items():
        number = with_interval(c["statistic"], c["interval"], "+.3g")
        rows.append((name, CLAIMS[name][0], f"{number} {c['unit']}", f"**{c['verdict']}**"))
    places = [
        (place, ", ".join(names), ", ".join(claims[name]["verdict"] for name in names))
        for place, names in PLACES.items()
    ]
    return "\n".join((
        f"Seeds {', '.join(map(str, seeds))}.\n",
        markdown_table(("", "claim", "statistic", "verdict"), rows),
        markdown_table(("place", "claims", "verdicts"), places),
        f"Rules. {INTERVALS}\n",
        *(f"- **{name}** {c['rule']}" for name, c in claims.items()), "",
    ))  # fmt: skip


# --- one run beside the eight seeds ---------------------------------------------------------------


def statistics_of(seeds, less_sure):
    """{claim: its statistic in each seed alone}; only some seeds sweep over c for K13."""
    found = [decide_claims([seed], less_sure) for seed in seeds]
    values = {claim: [of_seed[claim]["statistic"] for of_seed in found] for claim in CLAIMS}
    return {claim: [v for v in of_claim if v is not None] for claim, of_claim in values.items()}


def study_of(seeds):
    """EIGHT's content, to four digits: verdicts, and of every seed its statistics and curves."""
    claims, curves = decide_claims(seeds), [seed["curves"] for seed in seeds]
    statistics = statistics_of(seeds, claims["K12"]["set"])
    study = {"claims": claims, "statistics": statistics, "curves": curves}
    return json.loads(json.dumps(study), parse_float=lambda digits: round(float(digits), 4))


def read_study():
    return json.loads(EIGHT.read_text(encoding="utf-8"))


def expected(values, new=1):
    """Prediction interval of 95 % for the mean of `new` more seeds.

    mean +- t s sqrt(1 / n + 1 / new): the seeds seen scatter, and so will the new ones.
    """
    n = len(values)
    half = t.ppf(0.975, n - 1) * np.std(values, ddof=1) * (1 / n + 1 / new) ** 0.5
    return [float(np.mean(values) - half), float(np.mean(values) + half)]


def beside_the_study(found, study, seeds):
    """Adds to every claim what the study says of it, and whether the mean over `seeds` of what each
    gives alone lies where that many new ones would."""
    for claim, values in statistics_of(seeds, study["claims"]["K12"]["set"]).items():
        low, high = expected(study["statistics"][claim], len(values) or 1)
        of_study = {k: study["claims"][claim][k] for k in ("verdict", "statistic", "interval")}
        mine = float(np.mean(values)) if values else None
        agrees = bool(low <= mine <= high) if values else None
        of_study |= {"expected": [low, high], "this_run": mine, "agrees": agrees}
        found[claim]["study"] = of_study
    return found


def in_words(curves, claims):
    """What was seen, in sentences. curves: {arm: its evaluations}."""

    def moved(arm, key):
        start, end = curves[arm][0][key], curves[arm][-1][key]
        change = int(np.sign(end - start)) if abs(end - start) >= VISIBLE else 0
        verb = {-1: "fell", 0: "stayed much as it was", 1: "rose"}[change]
        return change, f"{verb}, from {start:.2f} to {end:.2f}"

    (score, scores), (main, golds) = moved("RM-PPO", "proxy"), moved("RM-PPO", "gold")
    forget, forgotten = moved("RM-PPO", "forget_gold")
    hacks = ". It hacked its reward" if score > 0 > main else ""
    loses = ": it forgot what it knew" if forget < 0 else ""
    first = (
        f"PPO on the reward model: the score {scores}. The true reward (gold) on main prompts "
        f"{golds}{hacks}. On forget prompts gold {forgotten}{loses}."
    )
    (_, golds), (_, forgotten) = moved("AM-PPO", "gold"), moved("AM-PPO", "forget_gold")
    best = max(curves["AM-PPO"], key=lambda row: row["gold"])
    second = (
        f"PPO on the advantage model: gold on main prompts {golds}, on forget prompts it "
        f"{forgotten}."
    )
    if best["gold"] - curves["AM-PPO"][-1]["gold"] >= VISIBLE:
        second += f" At step {best['step']} gold on main was {best['gold']:.2f}: training went on"
        second += " for too long here, too."
    agrees = {key: claim["study"]["agrees"] for key, claim in claims.items() if "study" in claim}
    others = [key for key, agreed in agrees.items() if agreed is False]
    if not agrees:
        return [first, second]
    reproduced = sum(claim["study"]["verdict"] == "reproduced" for claim in claims.values())
    third = (
        f"Eight seeds reproduced {reproduced} of the paper's {len(claims)} claims. This run lies"
    )
    third += " where they let expect" + (f", but for {', '.join(others)}." if others else ".")
    return [first, second, third]
