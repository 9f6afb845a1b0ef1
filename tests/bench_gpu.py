"""
What a GPU reaches beside floors, goals and peers: on a GPU, `python tests/bench.py` runs this.

    ceilings   R, the rate of a large matmul, and BW, the bandwidth of a copy: all floors rest on these two
    head       log-probability of N tokens: 2 N D V / R forward, 8 N D V / R with the backward pass
    decode     a step of 256 rows at 1,024 tokens: max(weights / BW, 2 P B / R) + keys and values / BW
    sampler    replies beside `generate` of transformers; mismatch: |log-prob of sampler - of trainer|
    step       play; score, 2 P N / R; update, forward and backward without an optimizer, 6 P N / R

A share is floor / time: of an update, the model FLOP utilisation. P is what a token is multiplied with.
"""
import statistics
import time
from collections.abc import Callable
from functools import partial

import bench   # before the product's files, which it makes importable
import torch
from bench import DEVICE, HEADS, Pair, Run, Sizes, Workload, both_passes, sized, time_in_turns
from transformers import LlamaConfig, Qwen2Config

from kernels.layers import attend_one
from sample import DecodeBatch

# seconds from the start after which a section begins no measurement: all are to end within eight minutes
UNTIL_S = {"ceilings": 60, "head": 100, "decode": 160, "sampler": 300, "step": 390}
MATMUL, COPY = 8192, 2**30   # rows of a square matrix; how many numbers are copied
ROWS, CONTEXT = 256, 1024    # of a decode step
LONG = Workload(256, (125, 117), (12, 40), 128, 1 / 50, rows=128)
GPU = Sizes(torch.bfloat16, [(16384, 4096, 128256), (16384, 3584, 152064), (16384, 896, 151936)], {
    "Qwen2.5-0.5B": (sized(Qwen2Config, 151936, 896, 4864, 24, 14, 2, tied=True), LONG),
    "Llama-8B": (sized(LlamaConfig, 128256, 4096, 14336, 32, 32, 8), LONG),
    "Qwen2.5-7B": (sized(Qwen2Config, 152064, 3584, 18944, 28, 28, 4), LONG),
}, Workload(128, (125, 117), (12, 40), 128, 1 / 50, rows=64), micro_tokens=16384, rounds=20, patience_s=5)
STEP_MODELS = {"Qwen2.5-0.5B": True, "Qwen2.5-7B": False}   # room for transformers', too; else recompute
# Set on paper, before any GPU ran this: of a row, or of one model's or shape's; without a unit, of the share
GOALS = {
    "forward": "H1: >= 0.70", "forward, 16384 x 896 x 151936": "H6: >= 0.50",
    "both passes": "H2: >= 0.68", "both passes, 16384 x 896 x 151936": "H6: >= 0.50",
    "TRL vs ours": "H5: >= 0.95 x", "memory": "H7: <= 0.6 GiB", "largest error": "H8: <= 1e-4 nats",
    "decode step": "D1: >= 0.60", "decode step, Qwen2.5-0.5B": "D2: >= 0.35", "mismatch": "M1: <= 5e-3 nats",
    "generate vs ours, Qwen2.5-0.5B": "D3: >= 8 x", "generate vs ours, Llama-8B": "D3: >= 3 x",
    "update, Qwen2.5-0.5B": "S2: >= 0.35", "update, Qwen2.5-7B": "S2: >= 0.45", "attention": "D4: >= 0.70"}
HEADER = "| section | what | measured | floor | share | goal | met | note |\n" + "| --- " * 8 + "|"
Parts = dict[str, Callable[[], dict]]   # a row's name, and a function that measures its other columns


def print_row(section: str, what: str, subject: str, measured: float | None = None, unit: str = "",
              floor: float | None = None, note: str = "") -> dict[str, object]:
    """Print a line of the table at once, and return it. What was not measured meets no goal."""
    share = floor / measured if floor and measured else None
    number = share if floor else measured
    what, goal = f"{what}, {subject}", GOALS.get(f"{what}, {subject}", GOALS.get(what, ""))
    met = ""
    if goal and number is not None:
        _, sign, bound = goal.split()[:3]
        met = "yes" if (number <= float(bound) if sign == "<=" else number >= float(bound)) else "no"
    numbers = ((measured, unit), (floor, unit), (share, ""))
    texts = ["" if number is None else f"{number:.4g} {kind}".strip() for number, kind in numbers]
    print(f"| {' | '.join((section, what, *texts, goal, met, note))} |", flush=True)
    return dict(section=section, what=what, measured=measured, unit=unit, floor=floor, goal=goal, met=met,
                note=note)


class Measurements:
    """What to measure of a shape or a model, section by section, and what this GPU reached at the start."""
    def __init__(self, sizes: Sizes):
        self.sizes = sizes
        self.started = time.perf_counter()
        a, b = torch.randn(2, MATMUL, MATMUL, device=DEVICE, dtype=sizes.dtype)
        source = torch.randn(COPY, device=DEVICE, dtype=sizes.dtype)
        target = torch.empty_like(source)
        matmul = self.timed(lambda: len([a @ b for _ in range(20)]), 1)   # many: no wait for the host
        copy = self.timed(lambda: len([target.copy_(source) for _ in range(20)]), 1)
        self.flops_per_ms = 2 * MATMUL**3 / matmul["measured"]
        self.bytes_per_ms = 2 * source.nbytes / copy["measured"]   # read and written

    def timed(self, run: Run, tokens: int, floor: float | None = None) -> dict:
        """The milliseconds that a run over so many tokens takes."""
        times = time_in_turns({"": run}, self.sizes)[""]
        return dict(measured=statistics.median(times) * tokens / 1000, unit="ms", floor=floor,
                    note=f"median of {len(times)}, peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")

    def against(self, ours: Run, theirs: Run) -> dict:
        """How many times as long a peer takes for as many tokens."""
        times = time_in_turns({"ours": ours, "theirs": theirs}, self.sizes)
        note = ", ".join(f"{name} {statistics.median(values):.3g}" for name, values in times.items())
        return dict(measured=bench.median_ratio(*times.values()), unit="x",
                    note=f"{note} ms for 1,000 tokens, {len(times['ours'])} rounds")

    def ceilings(self, _: str) -> Parts:
        return {"R": partial(dict, measured=self.flops_per_ms / 1e9, unit="TFLOP/s"),
                "BW": partial(dict, measured=self.bytes_per_ms / 1e9, unit="TB/s", note="read and written")}

    def head(self, shape: str) -> Parts:
        N, D, V = map(int, shape.split(" x "))
        floor = 2 * N * D * V / self.flops_per_ms
        tensors = bench.head_inputs(N, D, V, self.sizes.dtype)
        allocated = torch.cuda.memory_allocated() + tensors[0].nbytes + tensors[1].nbytes   # with gradients
        forward = torch.no_grad()(lambda: len(HEADS["ours"](*tensors)))
        runs = {name: partial(both_passes, function, *tensors) for name, function in HEADS.items()}

        def memory() -> dict:
            runs["ours"]()
            return dict(measured=(torch.cuda.max_memory_allocated() - allocated) / 2**30, unit="GiB",
                        note="beyond inputs and gradients")
        parts = {"forward": partial(self.timed, forward, N, floor),
                 "both passes": partial(self.timed, runs["ours"], N, 4 * floor), "memory": memory,
                 "largest error": lambda: dict(measured=bench.head_error("ours", *tensors), unit="nats")}
        for name in list(HEADS)[1:]:
            parts[f"{name} vs ours"] = partial(self.against, runs["ours"], runs[name])
        return parts

    def decode_floor(self, model: torch.nn.Module) -> tuple[float, float]:
        """Milliseconds of a step, and of its attention alone."""
        c, itemsize = model.config, model.norm.weight.itemsize
        n = c.vocab * c.dim + sum(p.numel() for p in model.layers.parameters())   # but the embedding
        attention = 2 * ROWS * CONTEXT * c.layers * c.kv_heads * c.head_dim * itemsize / self.bytes_per_ms
        return max(n * itemsize / self.bytes_per_ms, 2 * n * ROWS / self.flops_per_ms) + attention, attention

    def decode(self, name: str) -> Parts:
        model = bench.random_model(self.sizes.models[name][0], self.sizes.dtype)
        c = model.config
        batch = DecodeBatch(model, ROWS, CONTEXT, torch.rand(ROWS, 64, dtype=torch.float64), 1.0)
        batch.prompt_B = list(range(ROWS))         # all rows are active: the host has its work, too
        batch.cache.block_2LBKSE.normal_()         # not zeros, which are faster
        batch.cache.length_B.fill_(CONTEXT - 1)    # a step writes the last slot, and the length stays
        query_B1HE = torch.randn(ROWS, 1, c.heads, c.head_dim, device=DEVICE, dtype=self.sizes.dtype)

        def attention() -> None:
            for layer in range(c.layers):
                attend_one(query_B1HE, *batch.cache.block_2LBKSE[:, layer], batch.cache.length_B)

        def timed_attention() -> dict:
            attention()   # compiles
            graph = torch.cuda.CUDAGraph()   # without the time that the host takes to launch kernels
            with torch.cuda.graph(graph):
                attention()
            return self.timed(lambda: len([graph.replay()]), 1, attention_floor)
        floor, attention_floor = self.decode_floor(model)
        return {"decode step": partial(self.timed, lambda: len(batch.step()), ROWS, floor),
                "attention": timed_attention}

    def sampler(self, name: str) -> Parts:
        pair = Pair(*self.sizes.models[name], self.sizes)

        def nats() -> dict:
            ours_N, theirs_N = bench.mismatches(pair, pair.sample(), pair.generate())
            return dict(measured=ours_N.mean().item(), unit="nats", note=f"theirs {theirs_N.mean():.1e}")
        return {"generate vs ours": partial(self.against, pair.our_play, pair.their_play), "mismatch": nats}

    def step(self, name: str) -> Parts:
        pair = Pair(self.sizes.models[name][0], self.sizes.step, self.sizes, with_peer=STEP_MODELS[name])
        replies = pair.sample()
        pair.ours.requires_grad_(True).recompute = not STEP_MODELS[name]
        update = partial(pair.our_pass, replies)
        score = torch.no_grad()(update)
        n = sum(len(reply.ids) for reply in replies)
        c, layers = pair.ours.config, sum(p.numel() for p in pair.ours.layers.parameters())
        # the output matrix meets the tokens of replies alone
        floor = 2 * (layers * (n + sum(map(len, pair.prompts))) + c.vocab * c.dim * n) / self.flops_per_ms
        parts = {"play": partial(self.timed, pair.our_play, n), "score": partial(self.timed, score, n, floor),
                 "update": partial(self.timed, update, n, 3 * floor),
                 "all three": partial(self.timed, lambda: (pair.our_play(), score(), update())[2], n)}
        what = "update of transformers vs ours"
        if not STEP_MODELS[name]:
            return parts | {what: partial(dict, note="left out: no room in 80 GB, and ours recomputes")}
        pair.theirs.requires_grad_(True)
        return parts | {what: partial(self.against, update, partial(pair.their_pass, pair.generate()))}

    def attempt(self, section: str, measure: Callable[[], dict]) -> dict:
        """What it returns, or a note why there is nothing."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        if time.perf_counter() - self.started > UNTIL_S[section]:
            return dict(note="not measured: no time was left")
        try:
            return measure()
        except torch.OutOfMemoryError:
            return dict(note="out of memory")

    def run(self, section: str, sizes: Sizes, models: list[str]) -> list[dict]:
        """All rows of a section."""
        rows = []
        subjects = {"ceilings": ["this run"], "head": [" x ".join(map(str, shape)) for shape in sizes.heads],
                    "step": [name for name in models if name in STEP_MODELS]}
        for subject in subjects.get(section, models):
            parts = self.attempt(section, partial(getattr(self, section), subject))
            parts = {"all": partial(dict, parts)} if "note" in parts else parts
            for what in list(parts):   # pop: no other variable may keep a model when the next one comes
                rows.append(print_row(section, what, subject, **self.attempt(section, parts.pop(what))))
        return rows


def main(argv: list[str] | None = None, sizes: Sizes = GPU) -> list[dict]:
    measurements = Measurements(sizes)
    sections = {name: partial(measurements.run, name) for name in UNTIL_S}
    rows = bench.main(argv, sizes, sections, f"{torch.cuda.get_device_name()}\n\n{HEADER}")
    print(f"\n{time.perf_counter() - measurements.started:.0f} s; 480 s are allowed")
    return rows
