"""studies/ppo_max.py: its rows, its runs, its table."""

from dataclasses import MISSING, fields

from baselines import ppo_max
from miniature.reproduce import SETTINGS
from miniature.tables import table_of_seeds
from studies import ppo_max as study


def test_rows_differ_from_their_model_in_one_switch():
    defaults = {f.name: f.default for f in fields(ppo_max.Args) if f.default is not MISSING}
    own = {"buffer", "ptx_dataset_name", "critic_warmup_steps"}  # of the toy world's size
    assert all(defaults[flag] == value for flag, value in study.MAX.items() if flag not in own)
    off = study.PLAIN.items() - {("buffer", study.LARGE), ("ptx_dataset_name", None)}
    assert all(defaults[flag] != value for flag, value in off)
    beside = [item for flags in study.BESIDE.values() for item in flags.items()]
    assert all(defaults[flag] != value for flag, value in beside if flag != "kl_coef")
    assert len(study.ROWS) == 2 + 2 * (11 + 5)
    for name, (switch, _, _) in study.PRESET.items():
        for row, model in ((f"plain + {name}", study.PLAIN), (f"PPO-max - {name}", study.MAX)):
            assert {flag for flag in model if study.ROWS[row][flag] != model[flag]} == {switch}


def test_every_row_makes_as_many_updates_from_as_many_responses():
    jobs = study.jobs_of(study.Args("out"), SETTINGS["full"])
    assert len(jobs) == 3 * len(study.ROWS) == len({job.folder for job in jobs})
    for job in jobs:
        flags = ppo_max.Args(**job.args)
        learning = flags.total_steps - flags.critic_warmup_steps
        assert learning * flags.global_batch_size == 48 * 128
        assert learning * flags.num_mini_batches == 48 * 4
        assert flags.total_steps % flags.eval_steps == 0 or flags.eval_steps < flags.total_steps


def test_the_table():
    metrics = {metric: [1.0, 2.0] for metric in study.COLUMNS}
    rows = {"plain PPO": metrics, "PPO-max": metrics}
    lines = table_of_seeds(rows, study.COLUMNS).splitlines()
    assert len(lines) == 4 and lines[2].startswith("| plain PPO | 1.50 (1.00 to 2.00) |")
    assert {line.count("|") for line in lines} == {len(study.COLUMNS) + 2}
