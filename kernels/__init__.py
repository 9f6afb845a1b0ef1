"""
The few formulas that everything rests on, in PyTorch and in Triton; and what every command does first.

A model of a few million parameters plays and learns on one thread: its matmuls are too short to share. Its
SFT, in larger batches, and larger models use all threads. Those sleep while they wait for each other:
OpenMP lets them spin by default, and on a machine that others use too, a spinning thread keeps the core
from the very thread that it waits for. A user's own OMP_NUM_THREADS and OMP_WAIT_POLICY stay; torchrun sets
the first to 1 for each of several processes.
"""
import os
import sys
from argparse import ArgumentParser
from typing import NoReturn

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is imported, so this goes first

import torch  # noqa: E402

for stream in (sys.stdout, sys.stderr):
    if hasattr(stream, "reconfigure"):  # a text that a terminal cannot show must not end a run
        stream.reconfigure(errors="backslashreplace")

# cuDNN's attention builds a plan for every new shape, 0.4 s and more by the reports of others (sglang issue
# 4650, FunASR issue 3704), and ragged batches have many shapes
torch.backends.cuda.enable_cudnn_sdp(False)

SMALL_MODEL = 10_000_000  # parameters
ALL_THREADS = torch.get_num_threads()
BY_USER = "OMP_NUM_THREADS" in os.environ

def set_threads(n_parameters: float) -> None:
    """Give a model of this size all threads if it can use them, else one; a user's own number stays."""
    if not BY_USER:
        torch.set_num_threads(ALL_THREADS if n_parameters > SMALL_MODEL else 1)

set_threads(0)

# ---------------------------------------------------------------- how a command refuses
def stop(sentence: str) -> NoReturn:
    """Refuse bad input before any work: print one sentence that says what to do, and exit with status 2."""
    print(sentence.replace("\n", " "), file=sys.stderr, flush=True)
    raise SystemExit(2)

class CommandLine(ArgumentParser):
    """A parser that refuses a wrong argument with one sentence."""

    def error(self, message: str) -> NoReturn:
        stop(f"{self.prog}: {message}; python {self.prog} --help lists the arguments.")

def check_number(name: str, value: object, low: float, high: float) -> None:
    """Refuse an argument that is not a number from `low` to `high`."""
    if not isinstance(value, int | float) or not low <= value <= high:
        stop(f"--{name.replace('_', '-')} {value}: must be a number from {low} to {high}.")
