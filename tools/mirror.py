"""A run's metrics.jsonl in TensorBoard or wandb, for curves in a browser.

    python -m tools.mirror runs/ppo                              # TensorBoard
    python -m tools.mirror runs/am --to wandb --follow True      # while it runs

TensorBoard's files go to the run folder's tensorboard/; `tensorboard --logdir runs` shows them.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from tools.watch import read_rows
from utils import InputError, run_cli


@dataclass
class Args:
    run_folder: tyro.conf.Positional[str]
    """the folder of a run of any script"""
    to: Literal["tensorboard", "wandb"] = "tensorboard"
    """where the numbers go"""
    follow: bool = False
    """wait for more rows, up to a PPO run's last step; Ctrl-C ends it"""


def open_log(folder, to):
    """log(metrics, step) of TensorBoard or wandb."""
    if to == "wandb":
        import wandb

        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["args"]
        return wandb.init(project="steady-rlhf", dir=str(folder), config=config).log
    from torch.utils.tensorboard import SummaryWriter

    board = SummaryWriter(folder / "tensorboard")

    def log(metrics, step):
        for name, value in metrics.items():
            board.add_scalar(name, value, step)
        board.flush()

    return log


def main(args: Args):
    folder, log, row = Path(args.run_folder), None, {}
    try:
        for row in read_rows(folder, args.follow):
            log = log or open_log(folder, args.to)  # a folder without a run starts nothing
            metrics = {name: value for name, value in row.items() if name != "step"}
            log(metrics, step=row["step"])
    except ImportError:
        package = args.to
        raise InputError(f"--to {package}: is not installed; pip install {package}") from None
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder}: no run to read ({error})") from None
    print(f"steps up to {row.get('step')} of {folder} are in {args.to}")


if __name__ == "__main__":
    run_cli(main, Args, __doc__)
