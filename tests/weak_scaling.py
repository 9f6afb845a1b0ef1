"""
Weak scaling: seconds per step when every process has the same work, on 1, 2 and 4 processes of this machine.

    python tests/weak_scaling.py            # 32 games per process

The loss against one process is communication, and memory bandwidth that the processes share.
"""
import os
import sys
import tempfile
from argparse import ArgumentParser
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
os.environ["OMP_NUM_THREADS"] = "1"   # one process stands for one core

import numpy as np

from launch import finished, metrics, start


def seconds_per_step(ranks: int, out: Path, games: int, steps: int, sft_steps: int) -> float:
    """Median seconds of a step without the first one. `games` are those of each process."""
    args = ["--games", games * ranks, "--steps", steps, "--sft-steps", sft_steps, "--max-new-tokens", 40]
    done = finished(start([*args, "--no-exam", "--out", out], ranks), timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    return float(np.median([line["seconds"] for line in metrics(out)[1:]]))


def main() -> None:
    cli = ArgumentParser(description="Seconds per step with the same work for each process.")
    cli.add_argument("--games", type=int, default=32, help="per process, a multiple of 4 [%(default)s]")
    cli.add_argument("--steps", type=int, default=6, help="2 at least [%(default)s]")
    cli.add_argument("--sft-steps", type=int, default=60, help="[%(default)s]")
    args = cli.parse_args()
    print(f"{os.cpu_count()} cores\n")
    print("| processes | games a step | s a step | speed of each process, of one alone |")
    print("| --- | --- | --- | --- |")
    alone = None
    with tempfile.TemporaryDirectory() as folder:
        for ranks in (1, 2, 4):
            out = Path(folder) / str(ranks)
            seconds = seconds_per_step(ranks, out, args.games, args.steps, args.sft_steps)
            alone = alone or seconds
            print(f"| {ranks} | {args.games * ranks} | {seconds:.2f} | {alone / seconds:.0%} |", flush=True)


if __name__ == "__main__":
    main()
