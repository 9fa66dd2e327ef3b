"""docs/GLOSSARY.md has every metric that a script writes, and none that nobody writes.

Names are read from the scripts' source, so that a metric behind a flag counts, too. A string that is a
key of a dict is a metric, or it stands in OTHER.
"""

import ast
import re
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/GLOSSARY.md").read_text(encoding="utf-8")
GROUPS = {  # a heading of the page: where its metrics are written
    "ppo_sr.py": {"ppo_sr.py": None, "plumbing/run_folder.py": "write"},
    "am_train.py, sft.py": {"am_train.py": None, "sft.py": None},
    "select_rehearsal.py": {"select_rehearsal.py": None},
    "evaluate.py": {"evaluate.py": None, "tools/judges.py": "summary"},
}
PREFIX = {"answer_test_prompts": "eval/*/"}  # of ppo_sr.py: its caller's names have this before them
# what am_train.py writes as eval/* is evaluate.py's: two functions that test_layout.py keeps equal
SKIP = {"am_train.py": {"ranking_metrics", "score_balance"}}
FIELDS = {"prompt", "response", "chosen", "rejected", "reference", "task", "set", "args", "prompts"}
OTHER = {  # keys that are no metrics: fields of rows, flags, parts of a report
    "ppo_sr.py": {"eval/*/eval/*/*", "kl", "scores", "score", "gold", "moving_average", "start"},
    "am_train.py, sft.py": {
        *("alternates", "row", "rows", "where", "default", "margin", "e", "k", "r", "weighted_sum"),
        *("current_logprob_*", "logprob_*", "logprobs_*", "policy_*", "per_task"),
        *("expected_reward_head", "trained"),
    },
    "select_rehearsal.py": {
        *("cluster", "clusters", "control", "embeddings", "ended", "file_line", "kept"),
        *("covariance_type", "random_state", "reg_covar", "method", "method_output_name"),
        *("modality_config", "module_output_name", "text", "normalize_embeddings", "show_progress_bar"),
    },
    "evaluate.py": {
        *("* - *", "balance", "bins", "left_out", "paired", "pairs", "per_task", "scorer", "scorers"),
        *("intervals", "tasks", "logprobs_of", "judge", "name"),
    },
}


def strings(node, constants):
    """What an expression may be as text, with * for what only a run knows."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return {node.value}
    if isinstance(node, ast.JoinedStr):
        return {"".join("*" if isinstance(v, ast.FormattedValue) else v.value for v in node.values)}
    if isinstance(node, ast.Tuple | ast.List):
        return set().union(*(strings(item, constants) for item in node.elts))
    return constants.get(node.id, set()) if isinstance(node, ast.Name) else set()


def keys(source):
    """{function: keys of the dicts that it makes or stores in}, of a module's source."""
    found, constants = defaultdict(set), {}
    tree = ast.parse(source)
    for node in tree.body:
        if isinstance(node, ast.Assign):
            constants |= {t.id: strings(node.value, {}) for t in node.targets if isinstance(t, ast.Name)}

    def walk(node, function):
        here = found[function]
        if isinstance(node, ast.Dict):
            here.update(*(strings(key, {}) for key in node.keys))
        elif isinstance(node, ast.DictComp):  # {k: ... for k in ("win", "lose")}
            loops = {g.target.id: strings(g.iter, constants) for g in node.generators if hasattr(g.target, "id")}
            here.update(strings(node.key, loops))
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "dict":
            here.update(word.arg for word in node.keywords if word.arg)
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
            here.update(strings(node.slice, {}))
        for child in ast.iter_child_nodes(node):
            is_function = isinstance(child, ast.FunctionDef) and not function
            walk(child, child.name if is_function else function)

    walk(tree, "")
    return found


def written(group, sources=None):
    """The metrics of a heading; sources: {file: source} in the place of what is on disk."""
    names = set()
    for file, only in GROUPS[group].items():
        source = (sources or {}).get(file) or (ROOT / file).read_text(encoding="utf-8")
        for function, of_function in keys(source).items():
            if function not in SKIP.get(file, ()) and only in (None, function):
                names |= {PREFIX.get(function, "") + name for name in of_function}
    return names - FIELDS - OTHER[group]


def explained(group, page=PAGE):
    """The names before the colon of each point under a heading."""
    [part] = re.findall(rf"^### {re.escape(quoted(group))}\n(.*?)(?=^#|\Z)", page, flags=re.M | re.S)
    heads = re.findall(r"^- ((?:`[^`]+`(?:, )?)+):", part, flags=re.M)
    assert len(heads) == len(re.findall(r"^- ", part, flags=re.M)), "a point without names and a colon"
    return re.findall(r"`([^`]+)`", " ".join(heads))


def quoted(group):
    return ", ".join(f"`{name}`" for name in group.split(", "))


@pytest.mark.parametrize("group", GROUPS)
def test_the_glossary_has_the_metrics_that_are_written(group):
    names = explained(group)
    missing, unknown = sorted(written(group) - {*names}), sorted({*names} - written(group))
    assert not missing, f"docs/GLOSSARY.md lacks {missing} (or they are no metrics: OTHER)"
    assert not unknown, f"docs/GLOSSARY.md has {unknown}, which nobody writes"
    assert len(names) == len({*names}), "a metric stands twice"


MUTANTS = [  # a heading, a file, its text, another text, what is missing then, what nobody writes
    ("ppo_sr.py", "ppo_sr.py", '"val/ratio": ratio', '"val/mean_ratio": ratio', "val/mean_ratio", "val/ratio"),
    ("ppo_sr.py", "ppo_sr.py", 'f"task/{task}/kl"', 'f"task/{task}/nats"', "task/*/nats", "task/*/kl"),
    ("ppo_sr.py", "ppo_sr.py", 'found["nll"]', 'found["loss"]', "eval/*/loss", "eval/*/nll"),
    ("am_train.py, sft.py", "sft.py", '{"loss": loss', '{"loss": loss, "tokens": 1', "tokens", None),
    ("am_train.py, sft.py", "am_train.py", 'metrics["lr"] =', 'metrics["rate"] =', "rate", None),
    ("select_rehearsal.py", "select_rehearsal.py", 'measures["entropy"] =', 'measures["h"] =', "h", "entropy"),
    ("evaluate.py", "evaluate.py", '("win", "tie", "lose")', '("win", "tie", "loss")', "loss", "lose"),
    ("evaluate.py", "tools/judges.py", '"too_long")}', '"too_big")}', "too_big", None),
    ("evaluate.py", "evaluate.py", '"score_std": both.std()', "", None, "score_std"),
]


@pytest.mark.parametrize(("group", "file", "text", "other", "missing", "unknown"), MUTANTS)
def test_a_renamed_a_new_and_a_lost_metric_are_seen(group, file, text, other, missing, unknown):
    source = (ROOT / file).read_text(encoding="utf-8")
    assert source.count(text) == 1
    names, now = {*explained(group)}, written(group, {file: source.replace(text, other)})
    assert now - names == ({missing} if missing else set())
    assert unknown is None or unknown in names - now


def test_a_metric_that_the_page_loses_or_invents_is_seen():
    page = PAGE.replace("- `val/ratio`:", "- `val/first_ratio_error`:")
    assert {*explained("ppo_sr.py", page)} ^ written("ppo_sr.py") == {"val/ratio", "val/first_ratio_error"}


def test_no_key_that_is_no_metric_is_listed_in_vain():
    for group, other in OTHER.items():
        found = set()
        for file in GROUPS[group]:
            for function, names in keys((ROOT / file).read_text(encoding="utf-8")).items():
                found |= {PREFIX.get(function, "") + name for name in names}
        assert not other - found, group


def test_bands_are_those_of_the_alarms():
    """The numbers that the page takes from tools/watch.py."""
    from tools.watch import BANDS

    lines = {
        name: line for line in PAGE.replace("\n  ", " ").split("\n- ") for name in re.findall(r"`([^`]+)`", line)[:1]
    }
    shown = {
        "objective/kl per token": ("objective/kl", "Above {high} a token"),
        "objective/kl": ("objective/kl", "Below −1"),
        "objective/entropy / step 1's": ("objective/entropy", "Below {low} of step 1's"),
        "log perplexity / entropy": ("policy/perplexity", "outside {low} to {high} entropies"),
        "val/ratio": ("val/ratio", "Outside {low} to {high}"),
        "policy/clipfrac_avg": ("policy/clipfrac_avg", "Above {high}"),
        "val/no_eos_share": ("val/no_eos_share", "Above {high},"),
        "val/no_eos_share - step 1's": ("val/no_eos_share", "{high} above step 1's"),
        "task/*/kl / other tasks'": ("task/*/score", "above {high} times"),
    }
    for dial, (metric, words) in shown.items():
        band = BANDS[dial]
        assert words.format(low=band.low, high=band.high) in lines[metric], dial
    assert (BANDS["objective/kl"].low, BANDS["val/explained_variance"].low) == (-1, 0)
    assert BANDS["val/response_length / step 1's"][:2] == (0.5, 2)  # half to twice
