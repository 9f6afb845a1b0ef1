"""
Step time with the same work for each process, on 1 and on more: what is lost to communication, and to what processes share.

    python tests/weak_scaling.py            # 1, 2 and 4 processes, 32 games each, on this machine
"""
import json
import os
import sys
import tempfile
from argparse import ArgumentParser
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
os.environ["OMP_NUM_THREADS"] = "1"   # a process is meant to be a core

import numpy as np

from launch import finished, start


def seconds(ranks: int, folder: Path, games: int, steps: int, sft_steps: int) -> float:
    """Median seconds of a step, the first one left out."""
    out = folder / str(ranks)
    done = finished(start(["--games", games * ranks, "--steps", steps, "--sft-steps", sft_steps, "--max-new-tokens", "40", "--no-exam", "--out", out],
                          ranks), timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()][1:]
    return float(np.median([line["seconds"] for line in lines]))


def main() -> None:
    cli = ArgumentParser(description="Step time with the same work for each process.")
    cli.add_argument("--games", type=int, default=32, help="of each process, a multiple of 4 [%(default)s]")
    cli.add_argument("--steps", type=int, default=6, help="2 at least [%(default)s]")
    cli.add_argument("--sft-steps", type=int, default=60, help="[%(default)s]")
    args, alone = cli.parse_args(), []
    with tempfile.TemporaryDirectory() as folder:
        print(f"{os.cpu_count()} cores\n\n| processes | games a step | s a step | of 1 process's speed, each |\n| --- | --- | --- | --- |")
        for ranks in (1, 2, 4):
            took = seconds(ranks, Path(folder), args.games, args.steps, args.sft_steps)
            alone.append(took)
            print(f"| {ranks} | {args.games * ranks} | {took:.2f} | {alone[0] / took:.0%} |", flush=True)


if __name__ == "__main__":
    main()
