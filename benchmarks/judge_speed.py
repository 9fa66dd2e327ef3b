"""Seconds that `--judge openai:MODEL` takes for 1,000 pairs in both orders against a local server.

    python -m benchmarks.judge_speed         # 2,000 requests at 50 ms, 16 in flight; at best 6.25 s

The server (tests/judge_server.py) is another process on this machine, so it takes its share of the
processor.
"""

import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass

from tools.judges import Settings, load_judge
from utils import InputError, run_cli


@dataclass
class Args:
    pairs: int = 1000
    """pairs of answers, each asked in both orders"""
    delay: float = 0.05
    """seconds that the server waits before it answers"""
    concurrency: int = 16
    """requests in flight"""


def main(args: Args):
    if args.pairs < 1:
        raise InputError("--pairs: must be positive")
    command = [sys.executable, "-m", "tests.judge_server", "--delay", str(args.delay)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    columns = ("prompt", "response", "reference")
    rows = [{k: f"{k} {i}" for k in columns} for i in range(args.pairs)]
    try:
        url = server.stdout.readline().strip()
        with tempfile.TemporaryDirectory() as folder:
            settings = Settings(base_url=url, concurrency=args.concurrency)
            judge = load_judge("openai:bench", settings, folder)
            start = time.perf_counter()
            judge.compare(rows)
            seconds = time.perf_counter() - start
    finally:
        server.kill()
        server.wait()
    requests = judge.usage["requests"]
    rate, ideal = requests / seconds, requests * args.delay / args.concurrency
    print(f"{requests:,} requests in {seconds:.2f} s ({rate:.0f} a second; at best {ideal:.2f} s)")
    return seconds


if __name__ == "__main__":
    run_cli(main, Args, __doc__)
