"""The clusters of a selection, and D_R beside a random control: a table and a picture.

    python -m tools.cluster_report runs/select       # a folder of select_rehearsal.py; seconds

Writes clusters.json (of every cluster: size, range of scores, the task that most of it has, the
prompts nearest its centre) and clusters.png.
"""

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import tyro
from matplotlib.figure import Figure

from utils import InputError, environment, load_rows, refuse_finished, run_cli, write_json

MEASURES = ("score", "length", "entropy", "gold")


@dataclass
class Args:
    folder: tyro.conf.Positional[str]
    """the folder that select_rehearsal.py wrote"""
    output_dir: str | None = None
    """receives clusters.json and clusters.png; the same folder by default"""

    def __post_init__(self):  # a default, too, is tried by run_cli before any work
        self.output_dir = self.output_dir or self.folder


def last_turn(prompt):
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def cluster_report(rows, measures, clusters, embeddings, kept, control):
    """Every cluster, and the mean of every measure over D_R and over the random control.

    measures: {"score": (pairs,), ...}; kept, control: indices of pairs.
    """
    entries, scores = [], measures["score"]
    tasks = [row.get("task", "all") for row in rows]
    for c in np.unique(clusters):
        members = np.flatnonzero(clusters == c)
        distances = ((embeddings[members] - embeddings[members].mean(0)) ** 2).sum(1)
        nearest = members[np.argsort(distances, kind="stable")]
        typical = dict.fromkeys(last_turn(rows[i]["prompt"]) for i in nearest)
        task, count = Counter(tasks[i] for i in members).most_common(1)[0]
        entry = {"cluster": int(c), "size": len(members)}
        entry |= {"dominant_task": task, "dominant_share": count / len(members)}
        entry |= {"score_min": scores[members].min(), "score_max": scores[members].max()}
        entry["kept_score_min"] = min((scores[i] for i in kept if clusters[i] == c), default=None)
        entries.append(entry | {"typical_prompts": list(typical)[:3]})
    report = {"pairs": len(rows), "kept": len(kept), "clusters": entries}
    for name, chosen in (("selected", kept), ("random_control", control)):
        counts = sorted(Counter(tasks[i] for i in chosen).items())
        report[name] = {f"mean_{key}": values[chosen].mean() for key, values in measures.items()}
        report[name]["share_of_tasks"] = {task: count / len(chosen) for task, count in counts}
    return report


def draw(embeddings, clusters, kept, path):
    """The prompts in the plane of their two largest principal components, D_R ringed."""
    from sklearn.decomposition import PCA

    plane = PCA(2, random_state=0).fit_transform(embeddings)
    figure = Figure(figsize=(7, 5.2), layout="constrained")
    axis = figure.subplots()
    axis.scatter(*plane.T, c=clusters, cmap="tab20", s=6, alpha=0.5)
    rings = dict(facecolors="none", edgecolors="black", s=30, linewidths=0.7)
    axis.scatter(*plane[kept].T, **rings, label=f"D_R ({len(kept)})")
    axis.set(xlabel="first principal component of the prompt embeddings", ylabel="second")
    axis.set_title(f"{len(plane)} prompts in {len(np.unique(clusters))} clusters", fontsize=10)
    axis.legend()
    figure.savefig(path, dpi=130)


def write_report(folder, output_dir, args):
    if not (folder / "clusters.npz").is_file():
        raise InputError(f"{folder}: no clusters.npz there; select_rehearsal.py writes it")
    found = np.load(folder / "clusters.npz")
    rows = load_rows(folder / "responses.jsonl", {"prompt": "prompt"})
    measures = {k: np.array([row[k] for row in rows]) for k in MEASURES if k in rows[0]}
    clusters, embeddings, kept = found["clusters"], found["embeddings"], found["kept"]
    if len(rows) != len(clusters):
        problem = f"{len(rows)} responses and {len(clusters)} clusters; run the selection again"
        raise InputError(f"{folder}: {problem}")
    report = cluster_report(rows, measures, clusters, embeddings, kept, found["control"])
    settings = {"criterion": str(found["criterion"])}
    write_json(output_dir / "clusters.json", settings | report | args | environment())
    draw(embeddings, clusters, kept, output_dir / "clusters.png")
    return report


def main(args: Args):
    folder, output_dir = Path(args.folder), Path(args.output_dir)
    refuse_finished(output_dir / "clusters.json", args)
    report = write_report(folder, output_dir, {"args": asdict(args)})
    print(f"{report['kept']} of {report['pairs']} pairs kept; clusters.json in {output_dir}")
    for name in ("selected", "random_control"):
        means = {k: v for k, v in report[name].items() if k != "share_of_tasks"}
        print(f"{name}: " + "  ".join(f"{k} {v:.3f}" for k, v in means.items()))


if __name__ == "__main__":
    run_cli(main, Args, __doc__)
