"""
Runs of train.py whose processes start in a tenth of a second: forked from a server that has imported everything, with pipes to files.

    done = finished(start(["--steps", "3"], ranks=2))                       -> returncode, stdout, stderr
    done = finished(start([], ranks=3, instead=function_of_a_rank))         the same for any function that knows its rank
"""
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
from pathlib import Path

import train

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["train", "toy", "torch.distributed.fsdp", "torch.distributed.checkpoint", "torch._dynamo",
                               "huggingface_hub.serialization", "launch"])


@dataclass
class Run:
    """The processes of a run, one a rank, and the folder that their output goes to."""
    ranks: list[multiprocessing.Process]
    printed: Path


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


def rank(args: list, number: int, world: int, port: int, printed: Path, before: Callable | None, instead: Callable | None) -> None:
    """One process of a run, as torchrun would have started it."""
    for stream, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(printed / f"{name}_{number}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
    if world > 1:
        os.environ |= {"WORLD_SIZE": str(world), "RANK": str(number), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    if before:
        before(number)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    train.torch.set_num_threads(1)
    instead(number) if instead else train.main([str(arg) for arg in args])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def start(args: list, ranks: int = 1, before: Callable | None = None, instead: Callable | None = None) -> Run:
    """Start a run; `before` is called with its number in each process first, to prepare some mischief."""
    printed, port = Path(tempfile.mkdtemp(prefix="printed_")), free_port()
    run = Run([FORKS.Process(target=rank, args=(args, n, ranks, port, printed, before, instead)) for n in range(ranks)], printed)
    for process in run.ranks:
        process.start()
    return run


def finished(run: Run, timeout: float = 200) -> Done:
    """Wait for all ranks; as torchrun does, end the others once one has failed, and take its exit status."""
    deadline, failed = time.monotonic() + timeout, None
    while any(process.is_alive() for process in run.ranks) and not failed and time.monotonic() < deadline:
        failed = next((process for process in run.ranks if process.exitcode), None)
        time.sleep(0.02)
    for process in run.ranks:
        process.join(3 if failed else 0)   # time to say why
        process.kill()
        process.join()
    failed = failed or next((process for process in run.ranks if process.exitcode), None)
    text = {name: "".join(file.read_text() for file in sorted(run.printed.glob(f"{name}_*"))) for name in ("stdout", "stderr")}
    shutil.rmtree(run.printed)
    return Done(failed.exitcode if failed else 0, **text)
