"""
A run folder that survives: written whole or not there, resumed on any number of processes.

    write partial_000020/ -> list files in complete.json -> fsync -> rename to step_000020/ -> set `latest`

A checkpoint is a Hugging Face model folder, or adapters whose base is step_000000, with the optimizer's state
in optimizer/. It counts only under its final name, and if every file has the size that complete.json says.
"""
import json
import math
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kernels import stop
from selfplay import Game, Seed, is_legal

MANIFEST = "complete.json"   # in each checkpoint: {file: bytes}

# ---------------------------------------------------------------- files
def sync_to_disk(path: Path) -> None:
    """Make the kernel write a file, or a folder's list of names, to the disk now."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)

def replace_text(path: Path, text: str) -> None:
    """Write a text file. After a crash it holds the old text or the new one, never a part."""
    new = path.with_name(path.name + ".new")
    new.write_text(text, "utf-8")
    sync_to_disk(new)
    new.replace(path)   # atomic on POSIX
    sync_to_disk(path.parent)

# ---------------------------------------------------------------- checkpoint folders
def commit(tmp_dir: Path, final_dir: Path) -> None:
    """Make a fully written folder a checkpoint. Its files and their list reach the disk before the rename."""
    files = [path for path in sorted(tmp_dir.rglob("*")) if path.is_file() and path.name != MANIFEST]
    sizes = {str(file.relative_to(tmp_dir)): file.stat().st_size for file in files}
    (tmp_dir / MANIFEST).write_text(json.dumps(sizes, indent=1), "utf-8")
    for path in (*tmp_dir.rglob("*"), tmp_dir):
        sync_to_disk(path)
    shutil.rmtree(final_dir, ignore_errors=True)   # a damaged checkpoint that a resume ignored may be there
    tmp_dir.rename(final_dir)
    replace_text(final_dir.parent / "latest", final_dir.name)

def link_or_copy(file: Path, new: Path) -> None:
    """Give a file a second name, or copy it to another disk."""
    try:
        os.link(os.path.realpath(file), new)  # the hub's cache holds symbolic links
    except OSError:
        shutil.copy(file, new)

def link_model(model: Path, folder: Path) -> None:
    """A new folder with the files of a model. Its weights get a second name, all else is copied."""
    folder.mkdir()
    for file in model.iterdir():
        if file.is_file():
            copy = link_or_copy if file.suffix == ".safetensors" else shutil.copy
            copy(file, folder / file.name)

def is_complete(folder: Path) -> bool:
    """Whether each file of the manifest is there in its full size. A changed byte is not noticed."""
    try:
        sizes = json.loads((folder / MANIFEST).read_text("utf-8"))
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):   # no manifest, a torn one, or a file is missing
        return False

def step_number(folder: Path) -> int:
    """The number of optimiser steps before this checkpoint: 20 for step_000020."""
    return int(folder.name.removeprefix("step_"))

def checkpoints(out: Path) -> list[Path]:
    """The checkpoint folders of a run, damaged ones included, oldest first."""
    folders = [folder for folder in out.glob("step_*") if re.fullmatch(r"step_\d{6,}", folder.name)]
    return sorted(folders, key=step_number)

def newest_complete(out: Path) -> Path | None:
    """The checkpoint to resume from, or None."""
    return next(filter(is_complete, reversed(checkpoints(out))), None)

def check_folder(out: Path, resume: bool) -> None:
    """Refuse a folder in which a run cannot start, or not resume."""
    if resume and not newest_complete(out):
        stop(f"--resume: {out} holds no complete checkpoint; start it without --resume.")
    # a run that died before its first checkpoint leaves these and nothing else
    leftovers = {"config.json", "config.json.new", "partial_000000"}
    if not resume and out.exists() and not (out.is_dir() and {f.name for f in out.iterdir()} <= leftovers):
        stop(f"{out} will not be overwritten; choose another folder with --out, or add --resume.")
    parent = next(filter(Path.exists, (out, *out.absolute().parents)))
    if not os.access(parent, os.W_OK | os.X_OK) or not parent.is_dir():
        stop(f"--out {out}: {parent} cannot be written; choose another folder.")

def prune(out: Path, keep: int, step: int) -> None:
    """Delete all up to `step` (later ones are damaged) but the first, the reference, and `keep` newest."""
    for old in [folder for folder in checkpoints(out) if step_number(folder) <= step][1:-keep]:
        renamed = old.rename(out / f"partial_{old.name}")   # a crash must not leave a checkpoint half deleted
        shutil.rmtree(renamed, ignore_errors=True)

# ---------------------------------------------------------------- the optimizer's state
def optimizer_state(policy: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The fp32 weights and AdamW's own tensors by name, {"weight.norm.weight": ..}; made if there is none."""
    tensors = {}
    for name, parameter in policy.named_parameters():
        if not parameter.requires_grad:
            continue
        tensors[f"weight.{name}"] = parameter.detach()
        if parameter not in optimizer.state:  # before its first update: what AdamW starts from
            moments = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = moments | {"step": torch.zeros((), device=parameter.device)}
        for key, tensor in optimizer.state[parameter].items():
            tensors[f"{key}.{name}"] = tensor
    return tensors

def transfer(call: Callable, policy: nn.Module, optimizer: torch.optim.Optimizer, **storage: object) -> str:
    """Run dcp.save or dcp.load on the optimizer's state. Returns one line on why it failed, or ""."""
    from torch.distributed.checkpoint import CheckpointException
    try:
        call(optimizer_state(policy, optimizer), no_dist=not dist.is_initialized(), **storage)
    except CheckpointException as error:
        exception, _ = next(iter(error.failures.values()))  # {process: (exception, traceback)}
        return " ".join(str(exception).split())
    return ""

def save_optimizer(folder: Path, policy: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """Each process writes its part of the state to folder/optimizer."""
    import torch.distributed.checkpoint as dcp  # slow to import
    writer = dcp.HuggingFaceStorageWriter(str(folder / "optimizer"), save_distributed=True)
    return transfer(dcp.save, policy, optimizer, storage_writer=writer)

def load_optimizer(folder: Path, policy: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """Read the state in place, whatever number of processes wrote it."""
    import torch.distributed.checkpoint as dcp
    reader = dcp.HuggingFaceStorageReader(str(folder / "optimizer"))
    return transfer(dcp.load, policy, optimizer, storage_reader=reader)

# ---------------------------------------------------------------- logs
def append_rows(file: Path, rows: list[dict]) -> None:
    """Append a JSON line per row, and make sure that they are on the disk."""
    with open(file, "a", encoding="utf-8") as opened:
        opened.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    sync_to_disk(file)

def game_record(game: Game, step: int) -> dict:
    """One game as a line of games.jsonl. The columns attack and harmful make it a pool for --attacks."""
    return {"step": step, "game": game.number, "seed": game.seed.text, "harmful": game.seed.harmful,
            "recorded": game.seed.recorded, "attack": game.asked if game.attacked else None,
            "legal": is_legal(game) if game.attacker else None,
            "answer": game.defender.reply.answer, "verdict": vars(game.verdict),
            "attacker_reply": game.attacker.reply.text if game.attacker else None,
            "defender_reply": game.defender.reply.text}

def past_attacks(records: list[dict], won_alone: bool) -> list[Seed]:
    """The legal attacks of recorded games, all or those that won, as seeds that the defender is asked."""
    won = {True: "response_harmful", False: "refusal"}   # by the seed's label
    return [Seed(row["attack"], row["harmful"], revise=False, recorded=True) for row in records
            if row["legal"] and (not won_alone or row["verdict"][won[row["harmful"]]])]

def append_logs(out: Path, metrics: dict[str, object], games: list[dict], show: Callable | None) -> None:
    """Append a line to metrics.jsonl (JSON has no NaN: null instead), and a line per game to games.jsonl."""
    line = {key: value if value is None or math.isfinite(value) else None for key, value in metrics.items()}
    append_rows(out / "metrics.jsonl", [line])
    append_rows(out / "games.jsonl", games)
    if show:
        show(line, line["step"])

def step_of(line: str) -> float:
    """The step that a line of a log belongs to; infinity for a line that a crash cut short."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf

def rewind_logs(out: Path, step: int) -> None:
    """Put the run folder back to how it was right after this step's checkpoint: later steps run again."""
    for folder in out.glob("partial_*"):
        shutil.rmtree(folder)
    for folder in checkpoints(out):
        if step_number(folder) > step:
            print(f"  {folder} is not complete: ignored, and made again", flush=True)
    replace_text(out / "latest", f"step_{step:06d}")
    for log in (out / "metrics.jsonl", out / "games.jsonl"):
        lines = log.read_text("utf-8", "replace").split("\n") if log.exists() else []
        replace_text(log, "".join(f"{line}\n" for line in lines if step_of(line) <= step))

# ---------------------------------------------------------------- signals
def on_stop_signals(action: Callable | signal.Handlers) -> None:
    """Set what SIGTERM and SIGINT do."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, action)

def catch_signals() -> list[str]:
    """A list that the first signal puts its name into: the loop then finishes its step, saves and exits 0."""
    caught = []
    def handle(number: int, frame: object) -> None:
        on_stop_signals(signal.SIG_IGN)
        caught.append(signal.Signals(number).name)
        time.sleep(1.0)   # a terminal and torchrun both pass Ctrl-C on; after that, one more ends it at once
        on_stop_signals(signal.SIG_DFL)
    on_stop_signals(handle)
    return caught
