"""What select_rehearsal.py says of its clusters beside D_R: clusters.json and clusters.png."""

from collections import Counter

import numpy as np


def cluster_report(rows, measures, clusters, embeddings, kept, control):
    """Size, score range, dominant task and the three prompts nearest the centre of every cluster; D_R by task.

    measures: {"score": (pairs,), ...}, each reported as its mean over D_R and over the random control.
    """
    entries, scores = [], measures["score"]
    for c in np.unique(clusters):
        members = np.flatnonzero(clusters == c)
        centre = embeddings[members].mean(0)
        nearest = members[np.argsort(((embeddings[members] - centre) ** 2).sum(1), kind="stable")]
        typical = dict.fromkeys(str(rows[i]["prompt"]) for i in nearest)
        task, count = Counter(rows[i].get("task", "all") for i in members).most_common(1)[0]
        entry = {"cluster": int(c), "size": len(members), "dominant_task": task, "dominant_share": count / len(members)}
        entry |= {"score_min": scores[members].min(), "score_max": scores[members].max()}
        entry["kept_score_min"] = min((scores[i] for i in kept if clusters[i] == c), default=None)
        entries.append(entry | {"typical_prompts": list(typical)[:3]})
    report = {"pairs": len(rows), "kept": len(kept), "clusters": entries}
    for name, chosen in (("selected", kept), ("random_control", control)):
        counts = Counter(rows[i].get("task", "all") for i in chosen)
        shares = {task: count / len(chosen) for task, count in sorted(counts.items())}
        report[name] = {f"mean_{key}": values[chosen].mean() for key, values in measures.items()}
        report[name]["share_of_tasks"] = shares
    return report


def draw(embeddings, clusters, kept, path):
    """The prompts in the plane of their two largest principal components, D_R ringed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from sklearn.decomposition import PCA

    plane = PCA(2, random_state=0).fit_transform(embeddings)
    figure, axis = plt.subplots(figsize=(7, 5.2), layout="constrained")
    axis.scatter(*plane.T, c=clusters, cmap="tab20", s=6, alpha=0.5)
    axis.scatter(
        *plane[kept].T, facecolors="none", edgecolors="black", s=30, linewidths=0.7, label=f"D_R ({len(kept)})"
    )
    axis.set(xlabel="first principal component of the prompt embeddings", ylabel="second")
    axis.set_title(f"{len(plane)} prompts in {len(np.unique(clusters))} clusters", fontsize=10)
    axis.legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)
