"""The paper's claims K1 to K14 and the rules that decide them, written before the runs."""

import numpy as np
from scipy.stats import t

INTERVAL = (
    "interval: 95 %, over prompts with one or two seeds, over seeds (Student's t) from three on"
)
PPO_INTERVAL = "interval: 95 % over seeds (Student's t); undecided below three seeds"
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


def decide_claims(seeds):
    """The verdict on every claim; `seeds` is a list of what reproduce.collect() returns."""
    found = {}

    def decide(claim, statistic, interval, verdict):
        ppo = claim in PPO_CLAIMS
        found[claim] = {
            "verdict": "undecided" if ppo and len(seeds) < 3 else verdict,
            "statistic": statistic,
            "interval": interval,
            "rule": f"{CLAIMS[claim][1]} ({PPO_INTERVAL if ppo else INTERVAL})",
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
    both = [over_seeds(net_win("AM-PPO-SR", k) - net_win("AM-PPO", k)) for k in ("main", "forget")]
    rises("K12", *min(both, key=lambda gain: gain[1][0] if gain[1] else gain[0]))

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
