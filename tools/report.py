"""One page that holds the paper's tables and figures beside ours: `report.html`, readable from disk without a network.

    python -m tools.report --folder results/full      # seconds; rebuilds the page from what reproduce.py left there

It reads results.json, details.json and the calibration and cluster pictures of the first seed, and computes nothing
but differences and ratios of those numbers: what a number means is decided where it was measured.
"""

import base64
import html
import io
import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from utils import InputError, run_cli


@dataclass
class Args:
    folder: Path
    """folder that reproduce.py wrote; receives report.html"""


# --- the paper's numbers and the looks of an arm ----------------------------------------------------------------------

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
# Warm for RM scores, cool for AM scores, gray for the control; dashes and colours both tell the arms apart.
ARMS = {
    "RM-PPO": {"color": "#c8452b", "linestyle": "-", "dashes": "none"},
    "RM-PPO w/ MA": {"color": "#dd9a1c", "linestyle": "-.", "dashes": "7 3 2 3"},
    "RM-PPO rescaled": {"color": "#7b7f87", "linestyle": "--", "dashes": "6 4"},
    "AM-PPO": {"color": "#2a6fb5", "linestyle": "-", "dashes": "none"},
    "AM-PPO-SR": {"color": "#17876a", "linestyle": "-", "dashes": "none"},
}
METRICS = {"accuracy": "accuracy", "ece": "ECE", "ece_vs_truth": "ECE to truth", "brier": "Brier", "nll": "NLL"}
DECIMALS = {"accuracy": 2, "ece": 2, "ece_vs_truth": 2}  # points, as the paper prints them; four for what is no point
OUTCOMES = ("win", "lose", "tie")
BALANCE = ("spread_of_means", "spread_of_stds", "mean_within_std")
FIGURES = {  # drawn for the first seed by evaluate.py and select_rehearsal.py
    "calibration/task_scores.png": "<b>Figure 1a.</b> The two tasks whose mean scores lie farthest apart under the RM, "
    "under each scorer. How far do the humps overlap? Under a balanced scorer a score means the same in both.",
    "calibration/reliability.png": "<b>Figure 2.</b> Accuracy by stated confidence, number of pairs in gray. Points "
    "below the line are over-confident, points above it under-confident; bins with few pairs scatter.",
    "calibration/histograms.png": "<b>Figure 3.</b> Scores of the chosen and the rejected responses. Look at how far "
    "the two humps stand apart, measured by their own width: the axes differ in scale.",
    "calibration/task_balance.png": "<b>Figures 4a and 4b.</b> Mean and std of the scores of each task. Look at how "
    "even the bars of one scorer are; between scorers compare the ratios of the table above, since scales differ.",
    "select_main/clusters.png": "<b>Selection of D_R</b> (no figure in the paper; it illustrates §3.2). Prompts in the "
    "plane of their two largest principal components, by cluster; rings mark D_R. Look for rings in every cluster.",
}  # fmt: skip
DASH = '<span class="none">–</span>'

STYLE = """
:root { --paper: #fdfcf9; --card: #fff; --ink: #22252a; --soft: #666c75; --line: #dedad1; --tint: #f4f1ea;
  --good: #17764f; --bad: #b3362a; --warn: #8a5a00; --warn-bg: #fdf3d8; }
@media (prefers-color-scheme: dark) { :root { --paper: #191b1f; --card: #202329; --ink: #e5e3de; --soft: #a0a5ad;
  --line: #3a3e46; --tint: #272a31; --good: #5cc49a; --bad: #ef8a7d; --warn: #f0c66b; --warn-bg: #3a3118; }
  figure img { filter: brightness(.88); } }
* { box-sizing: border-box; } [hidden] { display: none !important; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 17px/1.6 Charter, "Iowan Old Style", Georgia,
  serif; }
main { max-width: 1120px; margin: 0 auto; padding: 2.5rem 1.5rem 5rem; }
h1 { font-size: 2.1rem; line-height: 1.2; margin: 0 0 .5rem; } p, figcaption { max-width: 46rem; }
h2 { font-size: 1.45rem; margin: 3.5rem 0 .8rem; padding-top: .8rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.08rem; margin: 2rem 0 .5rem; } a { color: inherit; text-decoration-color: var(--soft); }
nav, table, figcaption, select, summary, .tiles, .legend, .note { font-family: system-ui, "Segoe UI", sans-serif; }
nav { font-size: .85rem; display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; margin: 1rem 0 1.5rem; }
.note, figcaption { font-size: .84rem; line-height: 1.5; color: var(--soft); } figcaption b { color: var(--ink); }
.warning { background: var(--warn-bg); color: var(--warn); padding: .5rem .9rem; border-left: 4px solid; margin: .6rem
  0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: .7rem; margin: 1.4rem 0; }
.tile { background: var(--card); border: 1px solid var(--line); border-top: 4px solid; border-radius: 4px; padding:
  .7rem .9rem;
  font-size: .85rem; font-variant-numeric: tabular-nums; } .tile > :first-child { display: block;
  font-weight: 650; margin-bottom: .2rem; }
.up { color: var(--good); } .down { color: var(--bad); } .none { color: var(--soft); }
figure { margin: 1.5rem 0 2.2rem; } figure img { display: block; width: 100%; padding: .35rem .2rem 0 0;
  background: #fff; border: 1px solid var(--line); border-radius: 4px; } .panels { display: grid; grid-template-columns:
  repeat(auto-fit, minmax(min(100%, 420px), 1fr));
  gap: .8rem; } .single { max-width: 640px; } .embedded img { min-width: 600px; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; font-size: .82rem; } .legend svg { vertical-align: middle;
  stroke-width: 2.5; }
.wide { overflow: auto; margin: .7rem 0; } table { border-collapse: collapse; font-size: .84rem; line-height: 1.4;
  font-variant-numeric: tabular-nums; } th, td { padding: .38rem .75rem; text-align: right; vertical-align: top;
  border-bottom: 1px solid var(--line); white-space: nowrap; } tbody th { font-weight: 500; }
th:first-child, .text td, .text th { text-align: left; } .text td { white-space: normal; }
.claims td:is(:nth-child(4), :nth-child(5)) { white-space: nowrap; }
thead th { font-weight: 600; color: var(--soft); border-bottom: 1.5px solid var(--soft); } thead tr.over th {
  border-bottom: 0;
  text-align: center; color: var(--ink); } .start { border-left: 1px solid var(--line); }
tr.group th { text-align: left; font-weight: 650; background: var(--tint); } td small { display: block; color:
  var(--soft); }
.badge { display: inline-block; padding: .05rem .55rem; border-radius: 1rem; border: 1px solid; font-size: .78rem;
  white-space: nowrap; }
.reproduced { color: var(--good); } .contradicted { color: var(--bad); } .undecided { color: var(--soft); }
.bar { display: inline-block; height: .6rem; border-radius: 2px; margin-right: .5rem; } .share :is(td, th) { text-align:
  left; }
summary { cursor: pointer; font-size: .88rem; } select { font-size: .88rem; padding: .2rem .4rem; margin: 0 1rem .4rem
  .3rem; }
#samples { max-height: 42rem; border: 1px solid var(--line); border-radius: 4px; } #samples td, #samples tbody th {
  white-space: normal; overflow-wrap: anywhere; min-width: 8.6rem; } #samples thead th { position: sticky; top: 0;
  background: var(--tint); } .gold { display: block; font-weight: 650; font-size: .78rem; }
@media (max-width: 640px) { main { padding: 1.5rem 1rem 3rem; } h1 { font-size: 1.6rem; } body { font-size: 16px; }
  #samples thead { display: none; } #samples :is(table, tbody, tr, td, tbody th) { display: block; width: 100%; }
  #samples tr { border-bottom: 6px solid var(--line); } #samples td::before { content: attr(data-who); color:
  var(--soft);
  float: right; font-size: .75rem; } .claims td:last-child { min-width: 16rem; } .claims td:nth-child(2) { min-width:
  13rem; } }
"""
SCRIPT = """
const rows = [...document.querySelectorAll("#samples tbody tr")], at = id => document.getElementById(id);
function show() {
  let shown = 0;
  for (const row of rows) {
    row.hidden = ["set", "task"].some(key => at(key).value && at(key).value !== row.dataset[key]);
    shown += !row.hidden;
  }
  at("shown").textContent = `${shown} of ${rows.length} prompts shown`;
}
for (const key of ["set", "task"]) at(key).onchange = show;
show();
"""

# --- pieces of HTML: what came from models, tasks or configurations passes through `text` first -----------------------


def text(value):
    return html.escape(str(value))


def number(value, decimals=2, sign=""):
    return DASH if value is None else f"{value:{sign}.{decimals}f}".replace("-", "−")


def span(bounds, decimals=2, sign=""):
    return DASH if bounds is None else f"[{number(bounds[0], decimals, sign)}, {number(bounds[1], decimals, sign)}]"


def table(columns, rows, groups=(), kind=""):
    """A table in a container of its own, which scrolls where the screen is narrow. groups: (title, columns) above the
    head; a row that is a string is a heading across the table."""
    starts = {sum(n for _, n in groups[:i]) for i in range(1, len(groups))}
    first = [' class="start"' if i in starts else "" for i in range(len(columns))]
    head = "".join(f'<th colspan="{n}">{title}</th>' for title, n in groups)
    head = f'<tr class="over">{head}</tr>' if groups else ""
    head += "<tr>" + "".join(f"<th{c}>{column}</th>" for c, column in zip(first, columns, strict=True)) + "</tr>"
    body = ""
    for row in rows:
        if isinstance(row, str):
            body += f'<tr class="group"><th colspan="{len(columns)}">{row}</th></tr>'
        else:
            cells = "".join(f"<td{c}>{cell}</td>" for c, cell in zip(first[1:], row[1:], strict=True))
            body += f'<tr><th scope="row">{row[0]}</th>{cells}</tr>'
    return f'<div class="wide"><table class="{kind}"><thead>{head}</thead><tbody>{body}</tbody></table></div>'


def figure(panels, caption, legend=True, kind=""):
    """panels: (png, alt text). They stand side by side, or one below the other on a phone; so the legend is apart."""
    images = "".join(
        f'<img src="data:image/png;base64,{base64.b64encode(png).decode()}" alt="{text(alt)}">' for png, alt in panels
    )
    swatch = '<svg width="30" height="10"><path d="M0 5H30" stroke="{color}" stroke-dasharray="{dashes}"/></svg>'
    arms = "".join(f"<span>{swatch.format(**look)} {arm}</span>" for arm, look in ARMS.items())
    legend = f'<div class="legend">{arms}</div>' if legend else ""
    kind = kind or ("single" if len(panels) == 1 else "")
    images = f'<div class="wide"><div class="panels {kind}">{images}</div></div>'
    return f"<figure>{legend}{images}<figcaption>{caption}</figcaption></figure>"


# --- charts -----------------------------------------------------------------------------------------------------------


def chart(title, xlabel, ylabel, lines, legend=False):
    """lines: (label, x, y, looks) -> (png, alt text); a dot marks where a line ends."""
    canvas = Figure(figsize=(5.3, 3.5), layout="constrained")
    axis, ends = canvas.subplots(), []
    for label, x, y, look in lines:
        x, y = np.array(x, dtype=float), np.array(y, dtype=float)  # None, a value not measured, becomes a gap
        axis.plot(x, y, label=label, linewidth=1.8, **look)
        axis.plot(x[-1:], y[-1:], "o", color=look["color"], markersize=5)
        ends.append(f"{label} from {y[0]:.3g} to {y[-1]:.3g}")
    axis.set(xlabel=xlabel, ylabel=ylabel)
    axis.set_title(title, fontsize=11, loc="left")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    if legend:
        axis.legend(fontsize=8, frameon=False)
    buffer = io.BytesIO()
    canvas.savefig(buffer, dpi=130, format="png")
    return buffer.getvalue(), f"{title}, {ylabel} over {xlabel}: " + "; ".join(ends)


def arm_chart(title, ylabel, curves, value, x="step", arms=ARMS, legend=False):
    """One line for each arm; value: the point's y from its row and the arm's first row."""
    lines = []
    for arm in arms:
        rows, look = curves[arm], {k: ARMS[arm][k] for k in ("color", "linestyle")}
        lines.append((arm, [r[x] for r in rows], [value(r, rows[0]) for r in rows], look))
    return chart(title, {"step": "PPO step", "kl": "KL to the SFT model (nats)"}[x], ylabel, lines, legend)


def gold_charts(curves, x="step", legend=False):
    return [
        arm_chart(f"gold, {label} test prompts", "mean gold", curves, lambda row, _: row[key], x, legend=legend)
        for label, key in (("main", "gold"), ("forget", "forget_gold"))
    ]


def proxy_charts(curves, units, x="step"):
    """The proxy score against step 0, one chart for each unit: RM and AM scores share no axis."""
    charts = []
    for unit in sorted(set(units.values()), reverse=True):
        arms = [arm for arm in ARMS if units[arm] == unit]
        title, ylabel = f"change of the {unit}", f"{unit}, minus step 0"
        charts.append(arm_chart(title, ylabel, curves, lambda row, start: row["proxy"] - start["proxy"], x, arms))
    return charts


# --- sections ---------------------------------------------------------------------------------------------------------


def story(results, details):
    curves, claims = results["curves"], results["claims"]
    verdicts = Counter(claim["verdict"] for claim in claims.values())
    first, last = curves["RM-PPO"][0]["step"], curves["RM-PPO"][-1]["step"]

    def moved(arm, key):
        start, end = curves[arm][0][key], curves[arm][-1][key]
        way = "" if number(start) == number(end) else "up" if end > start else "down"
        return f'{number(start)} → <b class="{way}">{number(end)}</b>'

    def told(arm):
        return f"{arm} {moved(arm, 'gold')} on the main and {moved(arm, 'forget_gold')} on the forget test prompts"

    tiles = "".join(
        f'<div class="tile" style="border-top-color:{look["color"]}"><span>{arm}</span>main {moved(arm, "gold")}<br>'
        f"forget {moved(arm, 'forget_gold')}</div>"
        for arm, look in ARMS.items()
    )
    warnings = []
    if details["scale"] == "smoke":
        warnings.append("A smoke run shows that the machinery works; its numbers mean nothing.")
    if len(results["seeds"]) < 3:
        warnings.append(f"PPO claims stay undecided below three seeds; seeds of this run: {len(results['seeds'])}.")
    warned = "".join(f'<p class="warning">{line}</p>' for line in warnings)
    counted = ", ".join(f"{verdicts[v]} {v}" for v in ("reproduced", "contradicted", "undecided"))
    return f"""<p>PPO against a reward model (RM) learns to please the model and forgets what the SFT model could do,
says the paper; an advantage model (AM) keeps the scores even across tasks, and selective rehearsal (SR) keeps the
skills. In the toy world every answer has a known true reward in [−1, 1], its <b>gold</b>, so both can be watched. Mean
gold from step {first} to step {last}: {told("RM-PPO")}; {told("AM-PPO-SR")}; all arms stand below. Of the paper's
{len(claims)} claims: {counted}.</p>
{warned}<div class="tiles">{tiles}</div>""" + figure(
        gold_charts(curves),
        "<b>Gold over PPO steps.</b> The paper has no such figure, since nobody knows its true reward; this is what "
        "its win rates (Fig. 1b, 5b) stand for. Look at which arms fall, and whether forget falls where main does not. "
        "RM-PPO rescaled is our control: RM scores times a constant, so that their std equals the AM's.",
    )


def calibration(results, details, picture):
    rows, paired, spreads = [], [], []
    for name, paper in PAPER_TABLE1.items():
        ours = results["table1"].get(name.lower(), {})
        cells = [number(ours.get(key), DECIMALS.get(key, 4)) for key in METRICS]
        rows.append([name, *(value or DASH for value in paper), *cells])
    titles = ["", "accuracy", "ECE", "accuracy", "ECE", *METRICS.values()]
    groups = [("", 1), ("paper, HH-RLHF", 2), ("paper, proprietary", 2), ("ours, toy world", 5)]
    for metric, entry in details["paired"].items():
        decimals = DECIMALS.get(metric, 4)
        bounds = span((entry["low"], entry["high"]), decimals, "+")
        paired.append([METRICS.get(metric, text(metric)), number(entry["difference"], decimals, "+"), bounds])
    for name in ("rm", "am"):
        means, stds, within = (results["score_balance"][name][k] for k in BALANCE)
        ratios = (value / within if within else None for value in (means, stds))
        spreads.append([name.upper(), *(number(v, 3) for v in (within, means, next(ratios), stds, next(ratios)))])
    balance = [("", 2), ("spread of the tasks' means", 2), ("spread of the tasks' stds", 2)]
    note = '<p class="note">{}</p>'.format
    return (
        "<h3>Table 1: is the preferred response scored higher, and is the confidence right?</h3>"
        + table(titles, rows, groups)
        + note("Accuracy and ECE in points. ECE to truth: confidence held against the annotators' true probabilities.")
        + "<h3>AM minus RM, on the same pairs</h3>"
        + table(["", "difference", "95 % interval"], paired)
        + note("The intervals resample prompts. An interval that holds 0 shows no difference.")
        + "<h3>Score balance: how far the tasks differ</h3>"
        + table(["", "mean std within a task", "raw", "÷ within", "raw", "÷ within"], spreads, balance)
        + note("Smaller scores altogether have a smaller raw spread; the ratio does not depend on the scale.")
        + "".join(picture(name) for name in FIGURES if name.startswith("calibration"))
    )


def policies(results, details):
    rows = []
    for label in ("main", "forget"):
        rows.append(f"{label} test prompts")
        for arm in ARMS:
            paper = PAPER_TABLE2.get(arm, {}).get(label, [DASH] * 3)
            mine = results["table2"][arm][label]
            cells = [f"{number(mine[k], 1)}<small>{span(mine['intervals'][k], 1)}</small>" for k in OUTCOMES]
            rows.append([arm, *paper, *cells])
    groups = [("", 1), ("paper (GPT-4 as judge)", 3), ("ours (gold as judge, 95 % interval)", 3)]
    table2 = table(["", *OUTCOMES, *OUTCOMES], rows, groups)
    curves, wins, units = results["curves"], details["win_curves"], details["proxy_unit"]

    def win_charts(label):
        return [
            arm_chart(f"{label}: {k} against the SFT model", "% of prompts", wins, lambda row, _: row[label][k])
            for k in OUTCOMES[:2]
        ]

    sweep = sorted(results["fig6"]["curves"].items(), key=lambda item: int(item[0]))
    by_count = []
    for key, title in (("proxy", "mean AM score"), ("gold", "mean gold")):
        lines = []
        for i, (c, rows) in enumerate(sweep):  # c is ordered, and so are its colours
            look = {"color": colormaps["viridis"](i / len(sweep))}
            lines.append((f"c = {c}", [r["step"] for r in rows], [r[key] for r in rows], look))
        by_count.append(chart(f"{title}, by number of clusters", "PPO step", title, lines, legend=True))
    return (
        "<h3>Table 2: win, lose and tie against the SFT model, in percent</h3>"
        + table2
        + figure(win_charts("forget"), "<b>Figure 1b.</b> Win and lose rate on the forget set. Look for a lose rate "
                 "that climbs above the win rate: skills which the SFT model had are being lost.")
        + figure(proxy_charts(curves, units), "<b>Figure 5a.</b> The scorer's mean score on the main set, "
                 "before any normalising or rescaling, minus its value at step 0. RM and AM scores have different "
                 "units, so compare shapes, not heights, between panels.")
        + figure(win_charts("main"), "<b>Figure 5b.</b> Win and lose rate on the main set. Held against Fig. 5a this "
                 "shows hacking: a score that still rises while the win rate falls.")
        + figure(by_count, "<b>Figure 6.</b> AM-PPO-SR with rehearsal sets selected from c clusters. Between the "
                 f"values of c the final score spreads by {number(results['fig6']['spread'], 3)}; the paper has about "
                 "0.05, in its own units. Look at whether the lines differ by more than one line's own jitter.", False)
        + "<h3>Over-optimisation: what each nat of KL buys</h3>"
        + figure(gold_charts(curves, "kl") + proxy_charts(curves, units, "kl"),
                 "<b>Goodhart curves</b> (not in the paper). Gold and proxy score against the distance from the SFT "
                 "model; the dot is the last step. Look for gold that turns down while the proxy score below it goes "
                 "on rising, and compare arms at equal KL.")
        + figure([arm_chart("response length", "mean tokens", curves, lambda row, _: row["length"])],
                 "<b>Response length</b> (not in the paper). The cheapest way to please a scorer is often to say more: "
                 "look for length that rises or collapses together with a fall in gold.")
    )  # fmt: skip


def selection(details, picture):
    report, forget = details["clusters"], details["forget_tasks"]
    chosen, control = report["selected"], report["random_control"]
    columns = ["cluster", "size", "score from", "to", "kept from", "dominant task", "share", "typical prompts"]
    rows = [
        [text(c["cluster"]), text(c["size"]), *(number(c[k]) for k in ("score_min", "score_max", "kept_score_min")),
         text(c["dominant_task"]), f"{100 * c['dominant_share']:.0f} %", "<br>".join(map(text, c["typical_prompts"]))]
        for c in report["clusters"]
    ]  # fmt: skip
    of_chosen, of_control = chosen["share_of_tasks"], control["share_of_tasks"]
    tasks = sorted(of_chosen.keys() | of_control.keys(), key=lambda task: (task not in forget, task))
    largest = max([*of_chosen.values(), *of_control.values()])

    def bar(share, arm):
        width, color = 5 * share / largest, ARMS[arm]["color"]
        return f'<span class="bar" style="width:{width:.2f}rem;background:{color}"></span>{number(100 * share, 1)} %'

    shares = []
    for task in tasks:
        mark = ' <span class="badge undecided">forget</span>' if task in forget else ""
        bars = bar(of_chosen.get(task, 0), "AM-PPO-SR"), bar(of_control.get(task, 0), "RM-PPO rescaled")
        shares.append([text(task) + mark, *bars])
    means = [
        [label, *(number(group.get(key), 3) for group in (chosen, control))]
        for label, key in (("mean AM score", "mean_score"), ("mean gold", "mean_gold"))
    ]
    return (
        f"<p>{report['kept']} of {report['pairs']} prompt-response pairs are rehearsed: the best of every cluster by "
        "AM score. The control draws as many at random from the same clusters.</p>"
        + picture("select_main/clusters.png")
        + f"<details><summary>All {len(rows)} clusters</summary>{table(columns, rows, kind='text')}</details>"
        + "<h3>Share of D_R by task</h3>"
        + table(["task", "selected", "random control"], [*shares, "averages", *means], kind="share")
        + '<p class="note">Forget tasks have expert demonstrations: SFT answers them well, PPO can but forget them.</p>'
    )


def samples(details):
    def change(sample):
        return sample["arms"]["RM-PPO"]["gold"] - sample["sft"]["gold"]

    def cell(who, answer):
        gold = answer["gold"]
        color = "26,150,90" if gold > 0 else "215,60,45"  # an overlay, so that it suits light and dark pages
        return (
            f'<td data-who="{who}" style="background:rgba({color},{0.45 * min(1, abs(gold)):.2f})">'
            f'<span class="gold">{number(gold, 2, "+")}</span>{text(answer["response"])}</td>'
        )

    ordered = sorted(details["samples"], key=change)
    body = ""
    for s in ordered:
        answers = cell("SFT", s["sft"]) + "".join(cell(arm, s["arms"][arm]) for arm in ARMS)
        body += f'<tr data-set="{text(s["set"])}" data-task="{text(s["task"])}"><th scope="row">{text(s["prompt"])}'
        body += f'<br><small class="none">{text(s["task"])}, {text(s["set"])} set</small></th>{answers}</tr>'
    head = "".join(f"<th>{who}</th>" for who in ("prompt", "SFT", *ARMS))
    choices = ""
    for key in ("set", "task"):
        values = "".join(f"<option>{text(value)}</option>" for value in sorted({s[key] for s in ordered}))
        choices += f'<label>{key}<select id="{key}"><option value="">all</option>{values}</select></label>'
    return f"""<p>What the policies of the first seed say at the end, with the gold of each answer, from −1 (red) to
+1 (green). The prompts on which RM-PPO lost the most against the SFT model come first.</p>
<div class="note">{choices}<span id="shown"></span></div>
<div class="wide" id="samples"><table class="text"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"""


def claims(results, details):
    signs, rows = {"reproduced": "✓", "contradicted": "✗", "undecided": "?"}, []
    for key, claim in sorted(results["claims"].items(), key=lambda item: int(item[0][1:])):
        badge = f'<span class="badge {claim["verdict"]}">{signs[claim["verdict"]]} {claim["verdict"]}</span>'
        cells = [text(details["claim_texts"][key]), badge, number(claim["statistic"], 3), span(claim["interval"], 3)]
        rows.append([key, *cells, text(claim["rule"])])
    return "<p>Each claim's statistic and rule were fixed before the runs that decide it.</p>" + table(
        ["", "claim", "verdict", "statistic", "interval", "rule fixed beforehand"], rows, kind="text claims"
    )


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
    return (
        table(["", ""], flatten(about), kind="text")
        + f"<h3>Seconds per stage</h3>{table(['stage', 'seconds'], stages)}"
        + f"<h3>Settings</h3>{table(['setting', 'value'], flatten(results['config']), kind='text')}"
    )


# --- the page ---------------------------------------------------------------------------------------------------------


def write_report(folder: Path) -> Path:
    results, details = (json.loads((folder / f"{n}.json").read_text(encoding="utf-8")) for n in ("results", "details"))
    seed = folder / f"seed_{results['seeds'][0]}"
    drawn = {name: (seed / name).read_bytes() for name in FIGURES}  # a missing one ends it before the drawing

    def picture(name):
        caption, kind = FIGURES[name], "single" if "clusters" in name else "embedded"
        return figure([(drawn[name], re.sub("<.*?>", "", caption))], caption, False, kind)

    sections = [
        ("scores", "Reward model and advantage model", calibration(results, details, picture)),
        ("policies", "Policies", policies(results, details)),
        ("selection", "Selective rehearsal", selection(details, picture)),
        ("answers", "Answers", samples(details)),
        ("claims", "Claims", claims(results, details)),
        ("run", "How it was run", how_it_was_run(results, details)),
    ]
    links = "".join(f'<a href="#{anchor}">{title}</a>' for anchor, title, _ in sections)
    body = "".join(f'<section id="{anchor}"><h2>{title}</h2>{content}</section>' for anchor, title, content in sections)
    page = f"""<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Advantage model and selective rehearsal</title><style>{STYLE}</style></head><body><main>
<h1>Stabilizing RLHF through Advantage Model and Selective Rehearsal</h1>
<div class="note">The tables and figures of Peng et al. (2023) in miniature, beside the paper's own</div>
<nav>{links}</nav>
{story(results, details)}{body}</main><script>{SCRIPT}</script></body></html>"""
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    for name, (png, _) in zip(("gold_main", "gold_forget"), gold_charts(results["curves"], legend=True), strict=True):
        (folder / f"{name}.png").write_bytes(png)  # the two pictures of the README
    return path


def main(args: Args):
    try:
        print(f"written: {write_report(args.folder)}")
    except FileNotFoundError as error:
        raise InputError(f"{error.filename}: missing; reproduce.py writes it") from None


if __name__ == "__main__":
    run_cli(main, Args, __doc__)
