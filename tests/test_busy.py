"""
A machine that others use too: how much a training step slows down beside two busy processes.

Three runnable threads on two cores make a step 1.5 times as long, five threads 2.5 times. OpenMP threads that
spin while they wait for each other make it 4 to 40 times; kernels/__init__.py says how they wait. The bound
is a ratio, not a time. The neighbours are stopped and continued in turns: other load then slows both sides.
"""
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from conftest import measured
from launch import WITHOUT_GPUS

ROOT = Path(__file__).parent.parent
# After so short an SFT no attack keeps its intent; by the toy judge none is legal, and the run would stop.
TRAIN = [sys.executable, ROOT / "train.py", "--steps", "100000", "--games", "16", "--sft-steps", "40",
         "--judge", "keywords"]
MATMULS = """
import torch
a = torch.randn(1024, 1024)
print("busy", flush=True)
while True:
    a @ a
"""
LOOP = """
print("busy", flush=True)
while True:
    pass
"""
ROUNDS = 3   # of two steps alone and two beside the neighbours
USER_ENVIRONMENT = {name: value for name, value in WITHOUT_GPUS.items() if not name.startswith("OMP_")}


def launch(line, stdout):
    """Start a process in its own session, as another user would: Linux shares the cores among sessions."""
    return subprocess.Popen(line, env=USER_ENVIRONMENT, stdout=stdout, stderr=subprocess.DEVNULL, text=True,
                            start_new_session=True)


def launch_training(out):
    return launch([*TRAIN, "--no-exam", "--out", out], subprocess.DEVNULL)


def steps_made(out):
    log = out / "metrics.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def wait_for_steps(out, steps, process, timeout=120):
    deadline = time.monotonic() + timeout
    while steps_made(out) < steps:
        assert process.poll() is None, f"{out} ended"
        assert time.monotonic() < deadline, f"{out} made {steps_made(out)} steps in {timeout} s"
        time.sleep(0.01)


def seconds_of_next_steps(run, n):
    """Seconds of the next n steps. The one that runs now is left out: it began under other conditions."""
    process, out = run
    made = steps_made(out)
    wait_for_steps(out, made + 1 + n, process)
    lines = (out / "metrics.jsonl").read_text().splitlines()[made + 1:made + 1 + n]
    return [json.loads(line)["seconds"] for line in lines]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A training run in a new interpreter with the user's own environment: the process, and its folder."""
    out = tmp_path_factory.mktemp("busy") / "ours"
    process = launch_training(out)
    wait_for_steps(out, 2, process)
    yield process, out
    process.kill()
    process.wait()


def start_neighbours(kind, folder):
    """Two busy processes. Training runs find the SFT start of ours beside them and make none."""
    if kind == "training runs":
        outs = [folder / "neighbour_1", folder / "neighbour_2"]
        processes = [launch_training(out) for out in outs]
        for process, out in zip(processes, outs, strict=True):
            wait_for_steps(out, 1, process)
        return processes
    program = {"loops in Python": LOOP, "matrix products": MATMULS}[kind]
    processes = [launch([sys.executable, "-c", program], subprocess.PIPE) for _ in range(2)]
    for process in processes:
        assert process.stdout.readline() == "busy\n"
    return processes


@pytest.mark.parametrize("kind", ["loops in Python", "matrix products", "training runs"])
def test_two_busy_neighbours_make_a_step_at_most_three_times_as_long(kind, run):
    neighbours = start_neighbours(kind, run[1].parent)
    try:
        alone = []
        beside = []
        for _ in range(ROUNDS):
            for process in neighbours:
                process.send_signal(signal.SIGSTOP)
            alone += seconds_of_next_steps(run, 2)
            for process in neighbours:
                process.send_signal(signal.SIGCONT)
            beside += seconds_of_next_steps(run, 2)
    finally:
        for process in neighbours:
            process.kill()
            process.wait()
    alone_s = np.median(alone)
    beside_s = np.median(beside)
    print(f"\n    seconds a step: {alone_s:.2f} alone, {beside_s:.2f} beside two {kind}", end="")
    measured("ratio", beside_s / alone_s, 3.0)
