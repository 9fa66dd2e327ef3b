"""What a run leaves behind, and where it goes on."""

import hashlib
import time
from dataclasses import asdict
from pathlib import Path

from plumbing import checkpoints, finite
from plumbing.records import plain, to_json, write_aside
from utils import backend, environment, save_model, write_json


class RunLog:
    """A run folder: config.json, metrics.jsonl, samples.jsonl, checkpoint/ and model/.

    `parts` (engines, dicts of numbers) are what a checkpoint holds. With --resume they and the
    random numbers go on from there, `step` is that one's, and rows of later steps are dropped.
    """

    FILES = ("metrics.jsonl", "samples.jsonl")

    def __init__(self, args, **parts):
        self.args, self.folder, self.start = args, Path(args.output_dir), time.time()
        self.parts = parts
        self.checkpoint = self.folder / "checkpoint" / "state.pt"
        data = {}  # by flag and content: a file may move
        for flag, value in asdict(args).items():
            files = value if isinstance(value, tuple) else [value]
            if files and all(isinstance(f, str) and Path(f).is_file() for f in files):
                data[flag] = [hashlib.sha256(Path(f).read_bytes()).hexdigest()[:16] for f in files]
        self.config = plain({"args": asdict(args), "data": data} | environment())
        checkpoints.refuse_begun(args)
        self.saved = checkpoints.load(self) if args.resume else None
        checkpoints.restore(self, self.saved)
        self.step = self.saved["step"] if self.saved else 0
        for name in self.FILES:
            path, kept = self.folder / name, b""
            if self.saved and path.is_file():
                kept = path.read_bytes()[: self.saved["sizes"][name]]
            write_aside(path, kept.decode())
        write_json(self.folder / "config.json", self.config)

    def save(self, step):
        """Write a checkpoint: the parts and the random numbers' state."""
        checkpoints.save(self, step)

    def finish(self, what, engine, tokenizer):
        """Write model/, and say where it is."""
        save_model(engine, self.folder / "model", tokenizer, self.config)
        print(f"{what} written to {self.folder / 'model'}")

    def write(self, step, metrics):
        seconds = round(time.time() - self.start, 2)
        self.append("metrics.jsonl", [{"step": step, "seconds": seconds} | metrics])

    def append(self, name, rows):
        if backend.writes:
            with open(self.folder / name, "a", encoding="utf-8") as file:
                file.write("".join(map(to_json, rows)))

    def check_finite(self, what, value, step, batch):
        """Stop before a NaN or infinite number reaches the weights; the batch is kept."""
        finite.check(self, what, value, step, batch)

    def take_step(self, engine, whose, step, batch):
        """engine.step() from finite gradients to sound weights -> the gradients' norm."""
        return finite.take_step(self, engine, whose, step, batch)
