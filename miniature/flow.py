"""Who reads what, as a picture: the data flow of README.

python -m miniature.flow          # docs/results/flow.png
"""

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

FILES, SCRIPTS, MODELS = "#f4f1ea", "#dce8f6", "#dcefe4"  # kinds of boxes
WIDTH, HEIGHT = 2.05, 0.62
BOXES = {  # name: (x, y, what stands in it, kind)
    "demos": (1.1, 3.2, "demonstrations\nsft.jsonl", FILES),
    "pairs": (1.1, 2.0, "preference pairs\npairs.jsonl", FILES),
    "prompts": (1.1, 0.8, "prompts, PPO's too\nprompts.jsonl", FILES),
    "sft": (3.8, 3.2, "sft.py", SCRIPTS),
    "am": (3.8, 2.0, "am_train.py\nEq. 1, 5–8", SCRIPTS),
    "select": (3.8, 0.8, "select_rehearsal.py\n§3.2", SCRIPTS),
    "policy": (6.5, 3.2, "SFT policy π_init\nsft/model", MODELS),
    "scorer": (6.5, 2.0, "scorer, RM or AM\nam/model", MODELS),
    "replay": (6.5, 0.8, "D_R: old answers\nrehearsal.jsonl", FILES),
    "ppo": (9.2, 2.0, "ppo_sr.py\nEq. 2, 9", SCRIPTS),
    "trained": (9.2, 0.8, "policy π\nppo/model", MODELS),
    "evaluate": (11.9, 0.8, "evaluate.py\nwin rate, calibration", SCRIPTS),
}
ARROWS = (
    ("demos", "sft"), ("sft", "policy"), ("policy", "am"), ("pairs", "am"), ("am", "scorer"),
    ("policy", "ppo"), ("scorer", "ppo"), ("replay", "ppo"), ("ppo", "trained"),
    ("prompts", "select"), ("scorer", "select"), ("policy", "select"), ("select", "replay"),
    ("trained", "evaluate"), ("scorer", "evaluate"),
)  # fmt: skip


def edge(box, other):
    """Where an arrow from the middle of `box` to `other` leaves it."""
    (x, y), (to_x, to_y) = BOXES[box][:2], BOXES[other][:2]
    dx, dy = to_x - x, to_y - y
    scale = min(
        WIDTH / 2 / abs(dx) if dx else float("inf"), HEIGHT / 2 / abs(dy) if dy else float("inf")
    )
    return x + scale * dx, y + scale * dy


def draw():
    figure = Figure(figsize=(11.6, 3.5))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, 13), ylim=(0.3, 3.75))
    axis.axis("off")
    for start, end in ARROWS:
        look = dict(arrowstyle="-|>", mutation_scale=12, color="#7b7f87", lw=1.1, zorder=1)
        axis.add_patch(FancyArrowPatch(edge(start, end), edge(end, start), **look))
    for x, y, words, colour in BOXES.values():
        corner = (x - WIDTH / 2, y - HEIGHT / 2)
        look = dict(boxstyle="round,pad=0,rounding_size=0.08", fc=colour, ec="#7b7f87", zorder=2)
        axis.add_patch(FancyBboxPatch(corner, WIDTH, HEIGHT, **look))
        family = "monospace" if colour == SCRIPTS and "\n" not in words else None
        axis.text(x, y, words, ha="center", va="center", fontsize=9.5, family=family, zorder=3)
    return figure


if __name__ == "__main__":
    draw().savefig("docs/results/flow.png", dpi=130, facecolor="white")
