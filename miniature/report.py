"""One page with the paper's tables and figures beside ours: report.html, which needs no network.

    python -m miniature.report --folder results/full     # seconds; after reproduce.py

The page's text stands in report.html beside this file; {{names}} in it are the parts made here. It
reads results.json, details.json, the pictures of the first seed and the committed study, and
computes nothing but differences, ratios and ranges of those numbers: what a number means is decided
where it was measured.
"""

import base64
import html
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from miniature.claims import INTERVALS, read_study
from utils import InputError, run_cli

TEMPLATE = Path(__file__).with_suffix(".html")


@dataclass
class Args:
    folder: Path
    """folder that reproduce.py wrote; receives report.html"""


# --- the paper's numbers and the looks of an arm --------------------------------------------------

PAPER_TABLE1 = {  # HH-RLHF accuracy and ECE, proprietary accuracy and ECE, as printed
    "OpenAssistant (DeBERTa)": ["69.24", None, None, None],
    "RM": ["69.25", "4.70", "74.75", "5.35"],
    "AM": ["69.43", "3.48", "75.28", "3.83"],
}
PAPER_TABLE2 = {  # win, lose, tie against the SFT model, as printed
    "RM-PPO": {"main": ["12.72", "12.62", "74.66"], "forget": ["16.87", "29.28", "53.84"]},
    "AM-PPO": {"main": ["14.87", "10.38", "74.74"], "forget": ["9.70", "8.44", "81.86"]},
    "AM-PPO-SR": {"main": ["15.78", "9.77", "74.45"], "forget": ["10.30", "7.95", "81.75"]},
}
# warm for RM scores, cool for AM scores, gray for the control; dashes tell the arms apart, too
ARMS = {
    "RM-PPO": {"color": "#c8452b", "linestyle": "-", "dashes": "none"},
    "RM-PPO w/ MA": {"color": "#dd9a1c", "linestyle": "-.", "dashes": "7 3 2 3"},
    "RM-PPO rescaled": {"color": "#7b7f87", "linestyle": "--", "dashes": "6 4"},
    "AM-PPO": {"color": "#2a6fb5", "linestyle": "-", "dashes": "none"},
    "AM-PPO-SR": {"color": "#17876a", "linestyle": "-", "dashes": "none"},
}
METRICS = {"accuracy": "accuracy", "ece": "ECE", "ece_vs_truth": "ECE to truth"}
METRICS |= {"brier": "Brier", "nll": "NLL"}
DECIMALS = {"accuracy": 2, "ece": 2, "ece_vs_truth": 2}  # points, as in the paper; others have four
OUTCOMES = ("win", "lose", "tie")
DASH = '<span class="none">–</span>'


# --- pieces of HTML: what came from models, tasks or settings passes through `text` first ---------


def text(value):
    return html.escape(str(value))


def number(value, decimals=2, sign=""):
    return DASH if value is None else f"{value:{sign}.{decimals}f}".replace("-", "−")


def span(bounds, decimals=2, sign=""):
    if bounds is None:
        return DASH
    return f"[{', '.join(number(bound, decimals, sign) for bound in bounds)}]"


def table(columns, rows, groups=(), kind=""):
    """A table that scrolls where the screen is narrow. groups: (title, columns) above the head; a
    row that is a string is a heading across the table."""
    starts = {sum(n for _, n in groups[:i]) for i in range(1, len(groups))}
    look = [' class="start"' if i in starts else "" for i in range(len(columns))]
    head = "".join(f'<th colspan="{n}">{title}</th>' for title, n in groups)
    head = f'<tr class="over">{head}</tr>' if groups else ""
    cells = "".join(f"<th{k}>{column}</th>" for k, column in zip(look, columns, strict=True))
    body = ""
    for row in rows:
        if isinstance(row, str):
            body += f'<tr class="group"><th colspan="{len(columns)}">{row}</th></tr>'
        else:
            rest = "".join(f"<td{k}>{cell}</td>" for k, cell in zip(look[1:], row[1:], strict=True))
            body += f'<tr><th scope="row">{row[0]}</th>{rest}</tr>'
    parts = f"<thead>{head}<tr>{cells}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="wide"><table class="{kind}">{parts}</table></div>'


def data_uri(png):
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def panels(charts):
    """[(png, alt text)] side by side, or one below the other on a phone."""
    images = "".join(f'<img src="{data_uri(png)}" alt="{text(alt)}">' for png, alt in charts)
    kind = "panels single" if len(charts) == 1 else "panels"
    return f'<div class="wide"><div class="{kind}">{images}</div></div>'


def legend():
    line = '<svg width="30" height="10"><path d="M0 5H30" stroke="{}" stroke-dasharray="{}"/></svg>'
    swatches = {arm: line.format(look["color"], look["dashes"]) for arm, look in ARMS.items()}
    arms = "".join(f"<span>{swatch} {arm}</span>" for arm, swatch in swatches.items())
    return f'<div class="legend">{arms}</div>'


# --- charts ---------------------------------------------------------------------------------------


def chart(title, xlabel, ylabel, lines, legend=False, bands=(), limits=None):
    """lines: (label, x, y, looks), bands: (x, low, high, colour) -> (png, alt text).

    A dot marks where a line ends; limits: of the y axis.
    """
    canvas = Figure(figsize=(5.3, 3.5), layout="constrained")
    axis, ends = canvas.subplots(), []
    for x, low, high, colour in bands:
        axis.fill_between(x, low, high, color=colour, alpha=0.13, linewidth=0)
    for label, x, y, look in lines:
        x, y = np.array(x, dtype=float), np.array(y, dtype=float)  # None becomes a gap
        axis.plot(x, y, label=label, linewidth=1.8, **look)
        axis.plot(x[-1:], y[-1:], "o", color=look["color"], markersize=5)
        ends.append(f"{label} from {y[0]:.3g} to {y[-1]:.3g}")
    axis.set(xlabel=xlabel, ylabel=ylabel, ylim=limits)
    axis.set_title(title, fontsize=11, loc="left")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    if legend:
        axis.legend(fontsize=8, frameon=False)
    buffer = io.BytesIO()
    canvas.savefig(buffer, dpi=130, format="png")
    return buffer.getvalue(), f"{title}, {ylabel} over {xlabel}: " + "; ".join(ends)


def arm_chart(title, ylabel, curves, key, x="step", arms=ARMS, legend=False, study=(), limits=None):
    """One line for each arm, of its rows' `key`; study: such curves of other seeds, as bands."""
    lines = []
    for arm in arms:
        looks = {k: ARMS[arm][k] for k in ("color", "linestyle")}
        lines.append((arm, [r[x] for r in curves[arm]], [r[key] for r in curves[arm]], looks))
    xlabel = {"step": "PPO step", "kl": "KL to the SFT model (nats)"}[x]
    bands = []
    for arm in arms if study else ():
        values = np.array([[row[key] for row in seed[arm]] for seed in study])
        steps = [row["step"] for row in study[0][arm]]
        bands.append((steps, values.min(0), values.max(0), ARMS[arm]["color"]))
    return chart(title, xlabel, ylabel, lines, legend, bands, limits)


def gold_charts(curves, x="step", legend=False, study=()):
    """Main and forget on one scale, so that a fall looks as large as it is."""
    sets, charts = (("main", "gold"), ("forget", "forget_gold")), []
    rows = [row for seed in (curves, *study) for arm in seed.values() for row in arm]
    lowest = min(row[key] for row in rows for _, key in sets)
    limits = (min(0, lowest) - 0.05, 1.05)
    for label, key in sets:
        title = f"gold, {label} test prompts"
        charts.append(arm_chart(title, "mean gold", curves, key, x, ARMS, legend, study, limits))
    return charts


def rises_of(curves):
    return {
        arm: [row | {"rise": row["proxy"] - rows[0]["proxy"]} for row in rows]
        for arm, rows in curves.items()
    }


def proxy_charts(curves, x="step", study=()):
    """The proxy score against step 0, a chart for each unit: RM and AM scores share no axis."""
    charts, rises, others = [], rises_of(curves), [rises_of(seed) for seed in study]
    for scorer in ("RM", "AM"):
        arms = [arm for arm in ARMS if arm.startswith(scorer)]
        title, ylabel = f"change of the {scorer} score", f"{scorer} score, minus step 0"
        charts.append(arm_chart(title, ylabel, rises, "rise", x, arms, study=others))
    return charts


def win_charts(curves, label):
    rates = {arm: [{"step": r["step"]} | r[label] for r in rows] for arm, rows in curves.items()}
    title = f"{label}: {{}} against the SFT model"
    return [arm_chart(title.format(k), "% of prompts", rates, k) for k in ("win", "lose")]


def cluster_charts(curves):
    """AM-PPO-SR by c, which is ordered, and so are its colours."""
    sweep, charts = sorted(curves.items(), key=lambda item: int(item[0])), []
    for key, ylabel in (("proxy", "mean AM score"), ("gold", "mean gold")):
        lines = []
        for i, (c, rows) in enumerate(sweep):
            look = {"color": colormaps["viridis"](i / len(sweep))}
            lines.append((f"c = {c}", [r["step"] for r in rows], [r[key] for r in rows], look))
        charts.append(chart(f"{ylabel}, by number of clusters", "PPO step", ylabel, lines, True))
    return charts


# --- sections: {name in the template: HTML} -------------------------------------------------------


def gold_style(gold):
    color = "26,150,90" if gold > 0 else "215,60,45"  # an overlay suits light and dark pages
    return f"background:rgba({color},{0.45 * min(1, abs(gold)):.2f})"


def answer_cell(who, answer):
    gold = f'<span class="gold">{number(answer["gold"], 2, "+")}</span>'
    style = gold_style(answer["gold"])
    return f'<td data-who="{who}" style="{style}">{gold}{text(answer["response"])}</td>'


def answer_table(rows):
    """rows: (attributes, the prompt's cell, a sample): what SFT and every arm answered."""
    body = ""
    for attributes, prompt, sample in rows:
        cells = [answer_cell("SFT", sample["sft"])]
        cells += [answer_cell(arm, sample["arms"][arm]) for arm in ARMS]
        body += f'<tr{attributes}><th scope="row">{prompt}</th>{"".join(cells)}</tr>'
    head = "".join(f"<th>{who}</th>" for who in ("prompt", "SFT", *ARMS))
    return f'<table class="text"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def story(results, details):
    warnings, study = [], studied(details)
    if details["scale"] == "smoke":
        warnings.append("A smoke run shows that the machinery works; its numbers mean nothing.")
    if details.get("model"):
        who = f"The world in English, learned by {text(details['model'])}"
        warnings.append(
            f"{who}. The verdicts of the committed study are of another model, so none is shown."
        )
    steps = results["curves"]["RM-PPO"][-1]["step"]
    return {
        "in_words": "".join(f"<p>{text(sentence)}</p>" for sentence in results["in_words"]),
        "last": text(steps),
        "tests": text(results["config"]["settings"]["ppo"]["max_eval_prompts"]),
        "warnings": "".join(f'<p class="warning">{line}</p>' for line in warnings),
        "first_look": answer_table([("", text(s["prompt"]), s) for s in first_look(details)]),
        "legend": legend(),
        "band": "; behind the lines, the range of the eight seeds of the study" if study else "",
        "gold_charts": panels(gold_charts(results["curves"], study=study)),
        "by_task": by_task(details),
    }


def studied(details):
    """The curves of the eight seeds, which only the toy's own model at full scale lies beside."""
    own = details["scale"] == "full" and not details.get("model")
    return read_study()["curves"] if own else []


def first_look(details):
    """Of the five tasks on which RM-PPO lost the most, the first test prompt each."""
    golds = details["task_gold"]
    worst = sorted(golds, key=lambda task: golds[task]["RM-PPO"] - golds[task]["SFT"])[:5]
    firsts = {sample["task"]: sample for sample in reversed(details["samples"])}
    return [firsts[task] for task in worst]


def by_task(details):
    """Mean gold of each task under SFT and every arm, as a heat map."""
    sets, golds = {s["task"]: s["set"] for s in details["samples"]}, details["task_gold"]
    rows = []
    for task in sorted(golds, key=lambda task: (sets[task] == "forget", task)):
        row = [golds[task][who] for who in ("SFT", *ARMS)]
        cells = [f'<i style="{gold_style(gold)}">{number(gold, 2, "+")}</i>' for gold in row]
        rows.append([text(task), sets[task], *cells])
    return table(["task", "set", "SFT", *ARMS], rows, kind="heat")


def calibration(results, details):
    rows, paired, balance = [], [], []
    for name, paper in PAPER_TABLE1.items():
        ours = results["table1"].get(name.lower(), {})
        cells = [number(ours.get(key), DECIMALS.get(key, 4)) for key in METRICS]
        rows.append([name, *(value or DASH for value in paper), *cells])
    for metric, entry in details["paired"].items():
        decimals = DECIMALS.get(metric, 4)
        bounds = span((entry["low"], entry["high"]), decimals, "+")
        name = METRICS.get(metric, text(metric))
        paired.append([name, number(entry["difference"], decimals, "+"), bounds])
    for name in ("rm", "am"):
        spreads = results["score_balance"][name]
        means, stds = (spreads[f"spread_of_{k}"] for k in ("means", "stds"))
        within = spreads["mean_within_std"]
        by_means, by_stds = (value / within if within else None for value in (means, stds))
        values = (within, means, by_means, stds, by_stds)
        balance.append([name.upper(), *(number(value, 3) for value in values)])
    papers = [("", 1), ("paper, HH-RLHF", 2), ("paper, proprietary", 2), ("ours, toy world", 5)]
    spreads = [("", 2), ("spread of the tasks' means", 2), ("spread of the tasks' stds", 2)]
    columns = ["", "accuracy", "ECE", "accuracy", "ECE", *METRICS.values()]
    names = ["", "mean std within a task", "raw", "÷ within", "raw", "÷ within"]
    return {
        "table1": table(columns, rows, papers),
        "paired": table(["", "difference", "95 % interval"], paired),
        "balance": table(names, balance, spreads),
    }


def policies(results, details):
    rows = []
    for label in ("main", "forget"):
        rows.append(f"{label} test prompts")
        for arm in ARMS:
            paper = PAPER_TABLE2.get(arm, {}).get(label, [DASH] * 3)
            mine = results["table2"][arm][label]
            intervals = [f"<small>{span(mine['intervals'][k], 1)}</small>" for k in OUTCOMES]
            cells = [number(mine[k], 1) + i for k, i in zip(OUTCOMES, intervals, strict=True)]
            rows.append([arm, *paper, *cells])
    groups = [("", 1), ("paper (GPT-4 as judge)", 3), ("ours (gold as judge, 95 % interval)", 3)]
    curves, wins, sweep = results["curves"], details["win_curves"], results["fig6"]["curves"]
    lengths = arm_chart("response length", "mean tokens", curves, "length")
    return {
        "table2": table(["", *OUTCOMES, *OUTCOMES], rows, groups),
        "win_forget": panels(win_charts(wins, "forget")),
        "proxy_charts": panels(proxy_charts(curves, study=studied(details))),
        "win_main": panels(win_charts(wins, "main")),
        "no_sweep": "" if len(sweep) > 1 else " hidden",
        "by_count": panels(cluster_charts(sweep)),
        "fig6_spread": number(results["fig6"]["spread"], 3),
        "goodhart": panels(gold_charts(curves, "kl") + proxy_charts(curves, "kl")),
        "lengths": panels([lengths]),
    }


def selection(results, details):
    report = details["clusters"]
    chosen, control = report["selected"], report["random_control"]
    forget = {sample["task"] for sample in details["samples"] if sample["set"] == "forget"}
    columns = ["cluster", "size", "score from", "to", "kept from", "dominant task", "share"]
    rows = []
    for c in report["clusters"]:
        scores = [number(c[k]) for k in ("score_min", "score_max", "kept_score_min")]
        tasks = text(c["dominant_task"]), f"{100 * c['dominant_share']:.0f} %"
        prompts = "<br>".join(map(text, c["typical_prompts"]))
        rows.append([text(c["cluster"]), text(c["size"]), *scores, *tasks, prompts])
    of_chosen, of_control = chosen["share_of_tasks"], control["share_of_tasks"]
    tasks = sorted(
        of_chosen.keys() | of_control.keys(), key=lambda task: (task not in forget, task)
    )
    largest = max([*of_chosen.values(), *of_control.values()])

    def bar(share, arm):
        style = f"width:{5 * share / largest:.2f}rem;background:{ARMS[arm]['color']}"
        return f'<span class="bar" style="{style}"></span>{number(100 * share, 1)} %'

    shares = []
    for task in tasks:
        mark = ' <span class="badge undecided">forget</span>' if task in forget else ""
        bars = (
            bar(of_chosen.get(task, 0), "AM-PPO-SR"),
            bar(of_control.get(task, 0), "RM-PPO rescaled"),
        )
        shares.append([text(task) + mark, *bars])
    shares.append("averages")
    for label, key in (("mean AM score", "mean_score"), ("mean gold", "mean_gold")):
        shares.append([label, *(number(group.get(key), 3) for group in (chosen, control))])
    return {
        "kept": f"{report['kept']} of {report['pairs']}",
        "clusters": table([*columns, "typical prompts"], rows, kind="text"),
        "shares": table(["task", "selected", "random control"], shares, kind="share"),
    }


def samples(results, details):
    def change(sample):
        return sample["arms"]["RM-PPO"]["gold"] - sample["sft"]["gold"]

    rows, choices = [], ""
    for sample in sorted(details["samples"], key=change):
        answers = (sample["sft"], *sample["arms"].values())
        same = len({(a["response"], a["gold"]) for a in answers}) == 1
        where = f' data-set="{text(sample["set"])}" data-task="{text(sample["task"])}"'
        prompt = f'<span class="none">{text(sample["task"])}</span><br>{text(sample["prompt"])}'
        rows.append((f'{where} data-same="{int(same)}"', prompt, sample))
    for key in ("set", "task"):
        values = sorted({sample[key] for sample in details["samples"]})
        options = "".join(f"<option>{text(value)}</option>" for value in values)
        choices += f'<label>{key}<select id="{key}"><option value="">all</option>{options}'
        choices += "</select></label>"
    return {"choices": choices, "samples": answer_table(rows)}


def claims(results, details):
    """Beside every claim the eight seeds' verdict, and whether this run lies with them."""
    signs, rows = {"reproduced": "✓", "contradicted": "✗", "undecided": "?"}, []
    for key, claim in sorted(results["claims"].items(), key=lambda item: int(item[0][1:])):
        study, own = claim.get("study", {}), claim["verdict"]
        said = {True: "agrees", False: "does not agree"}.get(study.get("agrees"), "")

        def badge(verdict):
            return f'<span class="badge {verdict}">{signs[verdict]} {verdict}</span>'

        mine = f"{number(study.get('this_run', claim['statistic']))}<small>{said}</small>"
        if len(results["seeds"]) >= 3:
            mine += f"<small>{badge(own)} {span(claim['interval'])}</small>"
        mean = f"{number(study.get('statistic'))}<small>{span(study.get('interval'))}</small>"
        verdict = badge(study["verdict"]) if study else DASH
        cells = verdict, mean, span(study.get("expected")), mine, text(claim["unit"])
        rule = text(claim["rule"])
        rows.append([key, text(details["claim_texts"][key]), *cells, rule])
    columns = ["", "claim", "verdict of eight seeds", "their mean", "one more seed", "your run"]
    columns += ["unit", "rule fixed beforehand"]
    whose = "; the committed study has none of this model. Every rule was fixed before the runs."
    if not details.get("model"):
        whose = (
            ", and comes from the eight of the committed study; every statistic and rule was fixed "
            "before its runs. Beside it stands this run, and where the eight seeds let expect one "
            "more like it in 95 of 100 cases."
        )
    page = table(columns, rows, kind="text claims")
    return {"claims": page, "intervals": INTERVALS, "whose_verdicts": whose}


def flatten(value, key=""):
    """{"a": {"b": 1}} -> ("a.b", 1): nested settings as one list."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from flatten(inner, f"{key}.{name}" if key else name)
    else:
        yield text(key), text(value if isinstance(value, str) else json.dumps(value))


def how_it_was_run(results, details):
    stages = [[text(stage), f"{value:,.0f}"] for stage, value in results["seconds"].items()]
    about = {"scale": details["scale"], "seeds": results["seeds"]} | details["environment"]
    return {
        "about": table(["", ""], flatten(about), kind="text"),
        "seconds": table(["stage", "seconds"], stages),
        "settings": table(["setting", "value"], flatten(results["config"]), kind="text"),
    }


SECTIONS = (story, calibration, policies, selection, samples, claims, how_it_was_run)


# --- the page -------------------------------------------------------------------------------------


def write_report(folder: Path) -> Path:
    """report.html, and gold_main.png and gold_forget.png, the README's two pictures."""
    results, details = (
        json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("results", "details")
    )
    seed = folder / f"seed_{results['seeds'][0]}"

    def picture(match):  # a missing one ends it before the drawing
        return f'src="{data_uri((seed / match[1]).read_bytes())}"'

    page = re.sub(r'src="([\w/]+\.png)"', picture, TEMPLATE.read_text(encoding="utf-8"))
    parts = {}
    for section in SECTIONS:
        parts |= section(results, details)
    path = folder / "report.html"
    path.write_text(re.sub(r"\{\{(\w+)\}\}", lambda m: parts[m[1]], page), encoding="utf-8")
    charts = gold_charts(results["curves"], legend=True, study=studied(details))
    for name, (png, _) in zip(("gold_main", "gold_forget"), charts, strict=True):
        (folder / f"{name}.png").write_bytes(png)
    return path


def main(args: Args):
    try:
        print(f"written: {write_report(args.folder)}")
    except FileNotFoundError as error:
        raise InputError(f"{error.filename}: missing; reproduce.py writes it") from None


if __name__ == "__main__":
    run_cli(main, Args, __doc__)
