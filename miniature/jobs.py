"""Jobs in two worker processes of one thread each, in an order, and never twice.

A job calls main(args) of a script. Its output goes into log.txt of its folder, and when it is done
it leaves done.json there. What was killed has no done.json, and starts again: at its checkpoint if
there is one, else from its beginning.
"""

import contextlib
import importlib
import json
import multiprocessing
import os
import shutil
import threading
import time
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from plumbing.progress import Progress
from plumbing.records import plain
from utils import InputError, write_json

WORKERS = 2
SECONDS = {"sft": 200, "ppo_sr": 115, "am_train": 75, "select_rehearsal": 15}  # for the bar
SECONDS |= {"evaluate:Winrate": 8, "baselines.average_weights": 8}


@dataclass
class Job:
    folder: Path
    script: str  # a module, or module:class where its arguments are not called Args
    args: (
        dict  # functions among the values are called at the start: what an earlier job has to tell
    )
    needs: tuple[str, ...] = ()  # jobs that come first: their folders' names, beside this one
    threads: int = 1

    @property
    def seconds(self):
        return SECONDS.get(self.script, 40)

    def done(self):
        record = self.folder / "done.json"
        return record.is_file() and read_json(record)["args"] == plain(self.args)


def read_json(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def read_jsonl(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n") if line]


def check_folder(folder, *models):
    for name in models:
        if not (Path(folder) / name / "model").is_dir():
            problem = f"holds no {name}/model; run make reproduce first"
            raise InputError(f"--folder {folder}: {problem}")


def check_seeds(seeds):
    if len(set(seeds)) < len(seeds) or not seeds:
        raise InputError(f"--seeds {seeds}: give at least one, each once")


def die_with_parent(parent):
    """In a worker: a killed run must not leave workers that write beside the next one's."""

    def watch():
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_job(job):
    """In a worker: the script's main, its output into log.txt."""
    import torch

    torch.set_num_threads(job.threads)
    checkpoint, begun, args = job.folder / "checkpoint", job.folder / "begun.json", dict(job.args)
    had, saved = read_json(begun) if begun.is_file() else {}, checkpoint / "state.pt"
    if had.get("args") == plain(args) and saved.is_file():
        args["resume"] = True
        spent = had["spent"] + saved.stat().st_mtime - had["at"]  # seconds up to the checkpoint
    else:
        shutil.rmtree(job.folder, ignore_errors=True)  # what a killed run left
        spent = 0.0
    start = time.time()
    write_json(begun, {"args": job.args, "spent": spent, "at": start})
    name, _, args_class = job.script.partition(":")
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(open(job.folder / "log.txt", "a", encoding="utf-8"))
        stack.enter_context(contextlib.redirect_stdout(log))
        stack.enter_context(contextlib.redirect_stderr(log))
        module = importlib.import_module(name)
        module.main(getattr(module, args_class or "Args")(**args))
    shutil.rmtree(checkpoint, ignore_errors=True)  # gigabytes, of a language model
    seconds = spent + time.time() - start
    write_json(job.folder / "done.json", {"args": job.args, "seconds": seconds})


def run_jobs(jobs):
    """Run the jobs, each once what it needs is done, on WORKERS threads altogether.

    Raises RuntimeError with the place of the log when one fails; those under way still finish.
    """
    waiting, running, finished = list(jobs), {}, set()
    line = "{elapsed} gone, about {remaining} left{postfix}"
    look = dict(bar_format=f"{{bar:30}} {line}", line=line, smoothing=0)
    worker = multiprocessing.get_context("spawn"), die_with_parent, (os.getpid(),)
    with (
        ProcessPoolExecutor(WORKERS, *worker) as pool,
        Progress(total=sum(job.seconds for job in jobs), **look) as bar,
    ):
        while waiting or running:
            for job in list(waiting):
                if not finished.issuperset(job.folder.with_name(name) for name in job.needs):
                    continue
                job.args = {k: v() if callable(v) else v for k, v in job.args.items()}
                if job.done():
                    waiting.remove(job)
                    finished.add(job.folder)
                    bar.total -= job.seconds
                elif sum(j.threads for j in running.values()) + job.threads <= WORKERS:
                    waiting.remove(job)
                    running[pool.submit(run_job, job)] = job
            bar.set_postfix_str(", ".join(job.folder.name for job in running.values()))
            for future in wait(running, timeout=1.0, return_when="FIRST_COMPLETED").done:
                job = running.pop(future)
                if error := future.exception():
                    where = f"its output is in {job.folder / 'log.txt'}"
                    raise RuntimeError(f"{job.folder.name} failed: {error!r}; {where}")
                finished.add(job.folder)
                bar.update(job.seconds)
