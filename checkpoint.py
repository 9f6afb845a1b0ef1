"""
A run folder that survives: written whole or not there.
"""
import dataclasses
import json
import math
import os
import re
import shutil
import signal
import time
import zlib
from pathlib import Path
from threading import Thread

import torch
from torch import Tensor

from model import Transformer

MANIFEST = "complete.json"



def sync_to_disk(path: Path) -> None:
    """Push a file, or a folder's list of names, through to the disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)



def replace_text(path: Path, text: str) -> None:
    """The whole old text or the whole new one, whatever happens in between."""
    new = path.with_name(path.name + ".new")
    new.write_text(text)
    sync_to_disk(new)
    new.replace(path)
    sync_to_disk(path.parent)



def file_size(file: Path) -> list[int]:
    """Size, and a checksum of the first MiB: of all of a small file, and of the header of a large one, whose tears show in its size."""
    with open(file, "rb") as opened:
        return [file.stat().st_size, zlib.crc32(opened.read(2 ** 20))]



def commit(tmp_dir: Path, final: Path) -> None:
    """A written folder gets a list of its files, goes to the disk, and only then gets its name."""
    files = [file for file in sorted(tmp_dir.rglob("*")) if file.is_file() and file.name != MANIFEST]   # a copied start brings its own list
    (tmp_dir / MANIFEST).write_text(json.dumps({str(file.relative_to(tmp_dir)): file_size(file) for file in files}, indent=1))
    for path in (*tmp_dir.rglob("*"), tmp_dir):
        sync_to_disk(path)
    shutil.rmtree(final, ignore_errors=True)   # only ever one that a resume passed over
    tmp_dir.rename(final)
    replace_text(final.parent / "latest", final.name)



def is_complete(folder: Path) -> bool:
    """Whether every listed file is there as it was written."""
    try:
        return all(file_size(folder / name) == expected for name, expected in json.loads((folder / MANIFEST).read_text()).items())
    except (OSError, ValueError, AttributeError):
        return False



def checkpoints(out: Path) -> list[Path]:
    return sorted(folder for folder in out.glob("step_*") if re.fullmatch(r"step_\d{6,}", folder.name))



def newest_complete(out: Path) -> Path | None:
    """The checkpoint to go on from. One that was torn or tmp_dir deleted is passed over."""
    return next((folder for folder in reversed(checkpoints(out)) if is_complete(folder)), None)



def prune(out: Path, keep: int) -> None:
    """Delete all checkpoints but the start and the newest; first the name, so that no tmp_dir of one is taken for a checkpoint."""
    for old in checkpoints(out)[1:-keep]:
        shutil.rmtree(old.rename(out / f"partial_{old.name}"), ignore_errors=True)



def state_by_name(policy: Transformer, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The very tensors of the optimizer's state. A new optimizer gets its state by an update of nothing, by nothing."""
    if not optimizer.state:
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        for parameter in policy.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
    return {f"{key}.{name}": tensor for name, p in policy.named_parameters() for key, tensor in optimizer.state[p].items()}



def reason(error: BaseException) -> str:
    """What the first rank that failed says of a checkpoint that could not be written or read."""
    return str(next(iter(error.failures.values()))[0])



def rewind_logs(cfg, newest: Path, out: Path) -> None:
    """Leave the run folder as it was right after this checkpoint: steps that were logged later will be made again."""
    for torn in out.glob("partial_*"):
        shutil.rmtree(torn)
    replace_text(out / "latest", newest.name)
    replace_text(out / "config.json", json.dumps(dataclasses.asdict(cfg), indent=1))
    for log in (out / "metrics.jsonl", out / "games.jsonl"):
        lines = log.read_text().splitlines(keepends=True) if log.exists() else []
        replace_text(log, "".join(line for line in lines if step_of(line) <= int(newest.name.removeprefix("step_"))))



def step_of(line: str) -> float:
    """The step that a line of a log is about; of a torn line, one that has not been made."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf



STOPPING = (signal.SIGTERM, signal.SIGINT)



def catch_signals() -> list[str]:
    """
    The names of the signals that ask the run to stop, as they come. The first is a wish, to be granted after the step. One more than a
    second later ends the process at once; sooner it is the same wish, for both a terminal and torchrun pass Ctrl-C on. A thread listens:
    Python's own handlers would have to wait for as long as a collective does.
    """
    heard, (ear, mouth) = [], os.pipe()
    os.set_blocking(mouth, False)
    signal.set_wakeup_fd(mouth)
    for number in STOPPING:
        signal.signal(number, lambda *_: None)

    def wait() -> None:
        since = math.inf
        while True:
            number = os.read(ear, 1)[0]
            if time.monotonic() > since + 1:
                os._exit(128 + number)
            since = min(since, time.monotonic())
            heard.append(signal.Signals(number).name)
    Thread(target=wait, daemon=True).start()
    return heard

