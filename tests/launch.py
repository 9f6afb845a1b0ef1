"""
What tests of whole runs share: train.py on one or more processes, started fast, and readers of its folder.

    done = run("--steps", 3, "--out", folder, ranks=2)     -> returncode, stdout, stderr
    done = succeeds("--steps", 3, "--out", folder)         the same, and its status must be 0
    processes = start(["--steps", 3]); ...; done = finished(processes)
    run(ranks=3, instead=function_of_the_rank)             any other function on three processes

A new Python needs seconds to import torch. A fork server (multiprocessing) imports everything once; a process
of a run is a fork of it and starts in 0.1 s. Its output goes to files, one per process and stream.
"""
import json
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from unittest import mock

from safetensors.torch import load_file
from torch import Tensor

import train

PRELOADED = ["train", "toy", "torch.distributed.fsdp", "torch.distributed.checkpoint", "torch._dynamo",
             "huggingface_hub.serialization", "launch"]
FORK_SERVER = multiprocessing.get_context("forkserver")
FORK_SERVER.set_forkserver_preload(PRELOADED)

Hook = Callable[[int], None] | None   # called with the rank
WITHOUT_GPUS = os.environ | {"CUDA_VISIBLE_DEVICES": ""}   # processes of tests meet on CPUs, by gloo


@dataclass
class Run:
    """The processes of a run, one per rank, and the folder of their output."""
    ranks: list[multiprocessing.Process]
    printed: Path


@dataclass
class Done:
    """How a run ended: the status of the first process that failed, or 0, and the output of all."""
    returncode: int
    stdout: str
    stderr: str


# ---------------------------------------------------------------- processes

def redirect(stream: int, file: Path) -> None:
    """Send a file descriptor (1 is stdout, 2 is stderr) to a file."""
    os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)


def run_rank(args: list[str], number: int, world: int, port: int, printed: Path, before: Hook,
             instead: Hook) -> None:
    """One process of a run, with the environment variables that torchrun would give it."""
    redirect(1, printed / f"stdout_{number}")
    redirect(2, printed / f"stderr_{number}")
    sys.stdout = open(1, "w", closefd=False)
    sys.stderr = open(2, "w", closefd=False)
    if world > 1:
        os.environ |= {"WORLD_SIZE": str(world), "RANK": str(number)}
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    if before:
        before(number)
    signal.signal(signal.SIGINT, signal.SIG_DFL)   # as train.py does when it is the main program
    train.torch.set_num_threads(1)
    if instead:
        instead(number)
    else:
        train.main(args)


def free_port() -> int:
    """A TCP port of this machine that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def start(args: list, ranks: int = 1, before: Hook = None, instead: Hook = None) -> Run:
    """
    Start train.py with these flags. Each process first calls `before` with its rank: it may damage something.
    It calls `instead` with its rank in place of train.main.
    """
    printed = Path(tempfile.mkdtemp(prefix="printed_"))
    port = free_port()
    with mock.patch.dict(os.environ, WITHOUT_GPUS):
        ensure_running()
    words = [str(arg) for arg in args]
    started = Run([], printed)
    for number in range(ranks):
        task = (words, number, ranks, port, printed, before, instead)
        process = FORK_SERVER.Process(target=run_rank, args=task)
        process.start()
        started.ranks.append(process)
    return started


def finished(started: Run, timeout: float = 200) -> Done:
    """Wait for a run's processes. As torchrun does, end the others once one has failed; return its status."""
    deadline = time.monotonic() + timeout
    failed = None
    while any(process.is_alive() for process in started.ranks) and not failed and time.monotonic() < deadline:
        failed = first_failed(started)
        time.sleep(0.02)
    for process in started.ranks:
        process.join(3 if failed else 0)   # seconds in which the others may print why they end
        process.kill()
        process.join()
    failed = failed or first_failed(started)
    done = Done(failed.exitcode if failed else 0, output(started, "stdout"), output(started, "stderr"))
    shutil.rmtree(started.printed)
    return done


def first_failed(started: Run) -> multiprocessing.Process | None:
    return next((process for process in started.ranks if process.exitcode), None)


def output(started: Run, stream: str) -> str:
    """What all processes of a run wrote to "stdout" or "stderr", rank after rank."""
    return "".join(file.read_text() for file in sorted(started.printed.glob(f"{stream}_*")))


def run(*args: object, ranks: int = 1, before: Hook = None, instead: Hook = None) -> Done:
    """Run train.py with these flags to its end."""
    return finished(start(list(args), ranks, before, instead))


def succeeds(*args: object, ranks: int = 1, before: Hook = None, instead: Hook = None) -> Done:
    """Run train.py with these flags to its end, which must be a good one."""
    done = run(*args, ranks=ranks, before=before, instead=instead)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


# ---------------------------------------------------------------- run folders

def rows(file: Path) -> list[dict]:
    """The lines of a JSONL file."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def metrics(out: Path) -> list[dict]:
    return rows(out / "metrics.jsonl")


def games(out: Path) -> list[dict]:
    return rows(out / "games.jsonl")


def weights(out: Path, step: int | None = None) -> dict[str, Tensor]:
    """The weights of a run's latest checkpoint, or of that of a step."""
    folder = (out / "latest").read_text() if step is None else f"step_{step:06d}"
    return load_file(out / folder / "model.safetensors")


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest absolute difference between two sets of weights."""
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)
