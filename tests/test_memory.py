"""
How much memory a run takes where a CPU can show it: when it starts, when it resumes, and on a GPU by formula.
"""
import ctypes
import json
import os
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig

import checkpoint
import sample as s
import train
from conftest import byte_tokenizer, measured
from launch import succeeds
from model import Cache, new_model, save
from train import Config


def write_model(folder, layers, dim=512):
    """A random model in fp32 in this folder; its size in bytes. 28 layers are 83 million parameters."""
    config = LlamaConfig(vocab_size=2000, hidden_size=dim, intermediate_size=11 * dim // 4,
                         num_hidden_layers=layers, num_attention_heads=8, num_key_value_heads=4,
                         max_position_embeddings=1024)
    model = new_model(config, 0)
    save(folder, model.state_dict(), model, byte_tokenizer())
    return 4 * sum(p.numel() for p in model.parameters())


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Peak:
    """The most memory that a block of code takes beyond what there was."""

    def __enter__(self):
        self.before = self.most = resident()
        self.ended = threading.Event()
        self.watcher = threading.Thread(target=self.watch)
        self.watcher.start()
        return self

    def watch(self):
        while not self.ended.wait(0.001):
            self.most = max(self.most, resident())

    def __exit__(self, *_):
        self.ended.set()
        self.watcher.join()
        self.bytes = self.most - self.before


def give_memory_back():
    """Freed blocks of 64 KB and more go back to the system at once: what is resident is what is held."""
    ctypes.CDLL(None).mallopt(-3, 2 ** 16)


def open_and_measure(folder, nano, out, rank):
    give_memory_back()
    ranks = train.setup(Config(precision="fp32"))
    train.open_sharded(nano, torch.float32, ranks)   # libraries take memory at their first call
    with Peak() as peak:
        train.open_sharded(folder, torch.float32, ranks)
    Path(f"{out}_{rank}").write_text(str(peak.bytes))


def test_a_process_opens_its_share_of_a_model_and_rank_0_one_copy_more(tmp_path):
    """80 million parameters in many small matrices, as in larger models: none is more than 2 % of all."""
    size = write_model(tmp_path / "large", layers=28)
    write_model(tmp_path / "nano", layers=1, dim=32)
    folders = [str(tmp_path / name) for name in ("large", "nano")]
    succeeds(ranks=2, instead=partial(open_and_measure, *folders, tmp_path / "peak"))
    first, second = [int((tmp_path / f"peak_{rank}").read_text()) / size for rank in (0, 1)]
    measured("rank 0: peak in copies of the weights, of which its share is 0.5", first, 1.1 * 0.5 + 1)
    measured("rank 1: peak in copies of the weights, of which its share is 0.5", second, 1.1 * 0.5)


def most_memory(file, rank):
    """Write down how much this process has ever taken, when it has saved its last step."""
    give_memory_back()
    prune = checkpoint.prune

    def prune_and_write(*args):
        prune(*args)
        peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
        Path(file).write_text(peak.split()[1])
    checkpoint.prune = prune_and_write


def test_a_resumed_run_takes_no_more_memory_than_a_fresh_one(tmp_path):
    """Both play, learn and save one step; AdamW makes the moments of the fresh one, the other reads them."""
    size = write_model(tmp_path / "model", layers=7)
    for label in ("harmful", "benign"):
        (tmp_path / f"{label}.jsonl").write_text(json.dumps({"prompt": f"how do i bake {label} bread"}))
    seeds = [f"{label}={tmp_path / label}.jsonl" for label in ("harmful", "benign")]
    flags = ["--model", tmp_path / "model", "--judge", "keywords", "--seeds", *seeds, "--no-cot", "--no-exam",
             "--games", "4", "--max-new-tokens", "4", "--micro-tokens", "512", "--out", tmp_path / "run"]
    succeeds(*flags, "--steps", "1", before=partial(most_memory, tmp_path / "fresh"))
    succeeds(*flags, "--steps", "2", "--resume", before=partial(most_memory, tmp_path / "resumed"))
    fresh, resumed = [int((tmp_path / name).read_text()) * 1024 / size for name in ("fresh", "resumed")]
    assert fresh > 5, "weights, reference, gradients and two moments"
    measured(f"peak on resume over that of a fresh run ({fresh:.1f} x the weights)", resumed / fresh, 1.01)


# ---------------------------------------------------------------- what a GPU's memory decides

class FakeGPU:
    """A GPU with so many free bytes, and PyTorch with as many more that it holds unused."""

    def __init__(self, free, monkeypatch):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free // 2, 10 * free))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: free)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: free - free // 2)


def on_gpu(config):
    """What rows_for reads of a model on a GPU, in bf16."""
    weight_VD = SimpleNamespace(is_cuda=True, itemsize=2)
    return SimpleNamespace(config=config, embed_tokens=SimpleNamespace(weight=weight_VD))


@pytest.mark.parametrize("gib, slots", [(20, 3800), (60, 3800), (20, 600), (1, 3800)])
def test_rows_of_a_batch_fill_the_share_of_a_gpus_memory(gib, slots, monkeypatch):
    FakeGPU(gib * 2 ** 30, monkeypatch)
    large = LlamaConfig(hidden_size=3584, intermediate_size=18944, num_attention_heads=28, head_dim=128,
                        num_key_value_heads=4, num_hidden_layers=28, vocab_size=152064)
    with torch.device("meta"):
        config = s.Transformer(large).config
    rows = s.rows_for(on_gpu(config), 10_000, slots)
    cache = Cache(config, rows, slots, torch.bfloat16, torch.device("meta"))
    logits = 24 * rows * config.vocab
    filled = (cache.block_2LBKSE.nbytes + logits) / (gib * 2 ** 30)
    assert rows > 1 and s.rows_for(on_gpu(config), 3, slots) == 3
    measured(f"{rows} rows of {slots} slots in {gib} GiB: share", filled, s.CACHE_SHARE)
    assert filled > s.CACHE_SHARE * rows / (rows + 1) - 1e-9, "one row more would not fit"
