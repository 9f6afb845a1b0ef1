"""
How fast the hand-written parts are, beside what a user would install instead.

    python -m kernels.bench                          # one table: ours, the peers, the ratios and their goals, and the errors of both
    python -m kernels.bench sampler step --models toy-sized --json bench.json
    python -m kernels.bench mismatch --model FOLDER  # sampler against trainer on a real checkpoint

Ours and the peers run in turns in one process, on the same tensors. Times are medians, with the distance of the quartiles; a ratio is the
median of the ratios of neighbouring runs, so that a machine that others use too does little harm. Sizes follow the device: tiny and small
models on a CPU, shapes of 0.5B to 8B models with random weights on a GPU. A peer that is not installed is left out, and the table says so.
A floor is what the arithmetic and the bytes of a task must take at the rates that a large product and a large copy reach in the same
process; the ratio to it is at most about 1. This command looks at the files above it in the list; nothing rests on it.
"""
import json
import math
import statistics
import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen2Config

from kernels.attention import attend_one, precision, reference as attention_formula
from kernels.linear import keep_memory, linear
from kernels.logprob import head_bytes, token_logprob
from kernels.norm import reference as norm_formula, rms_norm
from kernels.swiglu import reference as swiglu_formula, swiglu
from model import Transformer, unfuse, load, score
from sample import Sample, Seats, decode, uniforms
from selfplay import pack
from train import Ranks, micro_batches

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HEADS = {"cpu": [(2048, 256, 4096)],                                                                      # tokens, width, words
         "cuda": [(16384, 4096, 128256), (16384, 3584, 152064), (16384, 896, 151936)]}[DEVICE.type]
TINY = dict(num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)
MODELS = {"cpu": {"toy-sized": LlamaConfig(vocab_size=160, hidden_size=128, intermediate_size=512, **TINY, initializer_range=0.1),
                  "6M": LlamaConfig(vocab_size=4096, hidden_size=256, intermediate_size=1024, **TINY, initializer_range=0.06),
                  "SmolLM2-sized": LlamaConfig(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                                               num_attention_heads=9, num_key_value_heads=3, initializer_range=0.04)},
          "cuda": {"Qwen2.5-0.5B": Qwen2Config(vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
                                               num_attention_heads=14, num_key_value_heads=2),
                   "Qwen2.5-7B": Qwen2Config(vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
                                             num_attention_heads=28, num_key_value_heads=4),
                   "Llama-8B": LlamaConfig(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                                           num_attention_heads=32, num_key_value_heads=8)}}[DEVICE.type]
CACHES = {"cpu": [(64, 2, 2, 48, 32), (64, 3, 3, 400, 64)],                                               # rows, K, G, slots, E
          "cuda": [(256, 8, 4, 1024, 128), (256, 4, 7, 2048, 128), (256, 2, 7, 1024, 64)]}[DEVICE.type]
TYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16,)}[DEVICE.type]
CALLS = {"cpu": 1, "cuda": 50}[DEVICE.type]   # calls of a small layer that are timed together
ROUNDS = {5.0: 7, 120.0: 3, math.inf: 1}       # how many count, by the seconds that one takes
GOALS = {("cpu", "head", torch.bfloat16, "TRL chunked"): 2.0, ("cuda", "head", torch.bfloat16, "TRL chunked"): 0.95,
         ("cpu", "sampler", torch.float32, "generate, log-probs"): 2.5, ("cpu", "sampler", torch.bfloat16, "generate, log-probs"): 1.8,
         ("cuda", "sampler", torch.bfloat16, "generate, log-probs"): 3.0,
         ("cuda", "sampler", torch.bfloat16, "generate, static cache"): 1.3,
         ("cuda", "head", torch.bfloat16, "floor"): 0.68, ("cuda", "layers", torch.bfloat16, "floor"): 0.7,
         ("cuda", "decode", torch.bfloat16, "floor"): 0.6}


@dataclass(frozen=True)
class Work:
    """
    Prompts to reply to, `rows` at a time: one of the instructions in front, of so many tokens, then between own[0] and own[1] tokens of
    their own. Replies have up to `new` tokens, and end with each of them with this chance.
    """
    prompts: int
    rows: int
    instructions: tuple[int, ...]
    own: tuple[int, int]
    new: int
    ends: float


# equal: nothing in common, and nobody ends early. game: what games ask for. In the embedded world prompts have 13 tokens and replies 17 on
# average, and the examination asks 1,152; real attackers are instructed in 125 tokens where the seed is harmful, in 117 where it is benign
WORKS = {"cpu": {"toy-sized": {"equal": Work(64, 64, (0,), (25, 32), 32, 0.0), "game": Work(1152, 64, (0,), (8, 18), 48, 1 / 17)},
                 "6M": {"equal": Work(64, 64, (0,), (25, 32), 32, 0.0), "game": Work(256, 64, (0,), (8, 18), 48, 1 / 17)},
                 "SmolLM2-sized": {"equal": Work(64, 64, (0,), (25, 32), 32, 0.0), "game": Work(64, 64, (125, 117), (12, 40), 48, 1 / 17)}},
         "cuda": {"Qwen2.5-0.5B": {"equal": Work(128, 128, (0,), (473, 480), 32, 0.0),
                                   "game": Work(512, 128, (125, 117), (12, 40), 128, 1 / 50)},
                  "Qwen2.5-7B": {"equal": Work(128, 128, (0,), (473, 480), 32, 0.0)},
                  "Llama-8B": {"equal": Work(128, 128, (0,), (473, 480), 32, 0.0)}}}[DEVICE.type]
TRAINED = {"cpu": Work(192, 128, (0,), (8, 18), 48, 1 / 17), "cuda": Work(16, 16, (0,), (473, 480), 32, 0.0)}[DEVICE.type]   # a whole step


@dataclass(frozen=True)
class Row:
    """One line of the table. Times in milliseconds; a ratio above 1 is in our favour; `note` holds errors, or why there is no peer."""
    section: str
    what: str
    ours_ms: float
    spread_ms: float
    peer: str = ""
    peer_ms: float | None = None
    ratio: float | None = None
    goal: float | None = None
    note: str = ""


def seconds(act: Callable[[], object]) -> float:
    """What an act takes; if it returns how many tokens it has drawn, what a thousand of them take."""
    begun = time.perf_counter()
    made = act()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - begun) * (1000 / made if isinstance(made, int) else 1)


def beside(section: str, what: str, dtype: torch.dtype, ours: Callable[[], object], peers: dict[str, Callable[[], object] | None],
           note: str = "", floor_s: float = 0.0) -> list[Row]:
    """
    Time ours and all peers in turns; a row for each peer, and one for the floor if there is one. The first round does not count, if there
    is time for more.
    """
    acts, begun = [ours, *(act for act in peers.values() if act)], time.perf_counter()
    first = [seconds(act) * 1e3 for act in acts]
    more = next(count for limit, count in ROUNDS.items() if time.perf_counter() - begun < limit)
    rounds = [[seconds(act) * 1e3 for act in acts] for _ in range(more)] if more > 1 else [first, first]
    times = dict(zip(["ours", *(name for name, act in peers.items() if act)], zip(*rounds)))
    times |= {"floor": (floor_s * 1e3,) * len(rounds)} if floor_s else {}
    quartiles, rows = statistics.quantiles(times["ours"], n=4), []
    for name in [*peers, *(["floor"] if floor_s else [])]:
        row = dict(section=section, what=f"{what}, {str(dtype)[6:]}", ours_ms=statistics.median(times["ours"]), peer=name, note=note,
                   spread_ms=quartiles[2] - quartiles[0], goal=GOALS.get((DEVICE.type, section, dtype, name)))
        found = dict(peer_ms=statistics.median(times[name]), ratio=statistics.median(p / o for o, p in zip(times["ours"], times[name]))) \
            if name in times else dict(note="not installed")
        rows.append(Row(**row | found))
    return rows


# ---------------------------------------------------------------- the ceilings

@lru_cache
def ceilings(dtype: torch.dtype) -> tuple[float, float]:
    """FLOP/s of a large square product of random numbers, and bytes/s, read and written, of a large copy: nothing here is faster."""
    size, many = (8192, 2 ** 29) if DEVICE.type == "cuda" else (1024, 2 ** 26)
    (a, b), c = torch.randn(2, size, size, device=DEVICE).to(dtype), torch.ones(many, dtype=torch.int8, device=DEVICE)
    product, copy = (statistics.median(sorted([seconds(act) for _ in range(13)])[:5]) for act in (lambda: linear(a, b), c.clone))
    return 2 * size ** 3 / product, 2 * many / copy


def bench_ceilings(dtype: torch.dtype) -> Iterator[Row]:
    flops, bandwidth = ceilings(dtype)
    yield Row("ceilings", str(dtype)[6:], 0.0, 0.0, note=f"product {flops / 1e12:.2f} TFLOP/s, copy {bandwidth / 1e9:.0f} GB/s")


def step_floor(model: Transformer, rows: int, context: int, dtype: torch.dtype) -> float:
    """Seconds of a step that draws a token for each row: weights read once or multiplied, whichever is longer, and the cache read once."""
    (flops, bandwidth), shape = ceilings(dtype), model.config
    weights = sum(p.numel() for p in model.parameters()) - (0 if shape.tied else model.embed_tokens.weight.numel())
    cache = 2 * shape.layers * rows * context * shape.kv_heads * shape.head_width * precision(dtype, DEVICE).itemsize
    return max(weights * dtype.itemsize / bandwidth, 2 * weights * rows / flops) + cache / bandwidth


# ---------------------------------------------------------------- the head

def full_logits(hidden_ND: Tensor, weight_VD: Tensor, ids_N: Tensor, temperature: float) -> Tensor:
    """What most code does: all logits in the model's precision, then a log-softmax in fp32."""
    logp_NV = torch.log_softmax((hidden_ND @ weight_VD.T).float() / temperature, -1)
    return logp_NV.gather(1, ids_N[:, None]).squeeze(1)


def trl_head(hidden_ND: Tensor, weight_VD: Tensor, ids_N: Tensor, temperature: float) -> Tensor:
    """TRL 1.16's chunked head, with its own chunk size and with the entropy, which ours returns too."""
    from trl.kernels import ChunkedLogProbFunction
    return ChunkedLogProbFunction.apply(hidden_ND, weight_VD, None, ids_N, temperature, 32768, None, 1.0, ("entropy",))[0]


def our_head(hidden_ND: Tensor, weight_VD: Tensor, ids_N: Tensor, temperature: float) -> Tensor:
    return token_logprob(hidden_ND, weight_VD, ids_N, temperature)[0]


def forward_backward(head: Callable, hidden_ND: Tensor, weight_VD: Tensor, ids_N: Tensor) -> Callable[[], Tensor]:
    """Both passes of a head, as something to time; it returns the log-probabilities."""
    def act() -> Tensor:
        hidden_ND.grad = weight_VD.grad = None
        logprob_N = head(hidden_ND, weight_VD, ids_N, 0.7)
        logprob_N.sum().backward()
        return logprob_N.detach()
    return act


def bench_head(dtype: torch.dtype) -> Iterator[Row]:
    """Log-probability, forward and backward. The error is the largest against fp64, on the first 256 tokens."""
    for N, D, V in HEADS:
        made = dict(generator=torch.Generator(DEVICE).manual_seed(0), device=DEVICE)
        hidden_ND = (torch.randn(N, D, **made) * 25 / (3 * D ** 0.5)).to(dtype).requires_grad_()
        weight_VD = torch.randn(V, D, **made).to(dtype).requires_grad_()
        ids_N = torch.randint(V, (N,), **made)
        exact_NV = torch.log_softmax(hidden_ND[:256].detach().double() @ weight_VD.detach().double().T / 0.7, -1)
        exact_N = exact_NV.gather(1, ids_N[:256, None]).squeeze(1)
        trl_runs = find_spec("trl") and find_spec("accelerate") and find_spec("datasets")   # its backward pass imports its trainers
        heads = {"ours": our_head, "full logits": full_logits} | ({"TRL chunked": trl_head} if trl_runs else {})
        acts = {name: forward_backward(head, hidden_ND, weight_VD, ids_N) for name, head in heads.items()}
        errors = [f"{name} {(act()[:256].double() - exact_N).abs().max():.0e}" for name, act in acts.items()]
        peers = {name: acts.get(name) for name in ("full logits", "TRL chunked")}
        note, product_s = "errors: " + ", ".join(errors) + extra_memory(acts["ours"], N, D, V, dtype), 2 * N * D * V / ceilings(dtype)[0]
        alone = lambda: our_head(hidden_ND.detach(), weight_VD.detach(), ids_N, 0.7)
        yield from beside("head", f"{N} x {D} x {V}, both passes", dtype, acts["ours"], peers, note, floor_s=4 * product_s)
        yield from beside("head", f"{N} x {D} x {V}, forward", dtype, alone, {}, floor_s=product_s)


def extra_memory(act: Callable[[], object], N: int, D: int, V: int, dtype: torch.dtype) -> str:
    """What a head takes at its peak on a GPU beyond its inputs and gradients, and what the formula says."""
    if DEVICE.type == "cpu":
        return ""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()   # the gradients of the run before are still there, and are freed as this one begins
    act()
    taken, formula = torch.cuda.max_memory_allocated() - before, head_bytes(N, D, V, dtype.itemsize, "cuda")
    return f"; extra memory {taken / 2 ** 30:.2f} GiB, by formula {formula / 2 ** 30:.2f}"


# ---------------------------------------------------------------- the small layers

def worst(ours: Tensor, exact: Tensor) -> str:
    return f"{(ours.double() - exact).abs().max():.0e}"


def bench_layers(dtype: torch.dtype) -> Iterator[Row]:
    """Attention of one query per row to a full cache, the norm and the gate, as a step of the sampler calls them. Errors against fp64."""
    bandwidth = ceilings(dtype)[1]
    made = lambda *size, of=dtype: torch.randn(*size, device=DEVICE).to(of)
    often, times = lambda act: lambda: [act() for _ in range(CALLS)], f", {CALLS} times" if CALLS > 1 else ""
    kept = precision(dtype, DEVICE)
    for B, K, G, S, E in CACHES:
        query, keys, values = made(B, 1, K * G, E), made(B, K, S, E, of=kept), made(B, K, S, E, of=kept)
        mask_BS = torch.zeros(B, S, device=DEVICE)
        slot, packed, same = torch.tensor([S - 1], device=DEVICE), query.view(B, K, G, E), (keys.to(dtype), values.to(dtype))
        ours, theirs = lambda: attend_one(query, keys, values, mask_BS, slot), lambda: F.scaled_dot_product_attention(packed, *same)
        exact = attention_formula(*(t[:4].double() for t in (query, keys, values)), torch.zeros(1, device=DEVICE, dtype=torch.double))
        note = f"errors: ours {worst(ours()[:4], exact)}, PyTorch's {worst(theirs().view(B, 1, -1)[:4], exact)}"
        yield from beside("layers", f"attention, {B} rows, {K} x {G} heads, {S} slots, width {E}{times}", dtype, often(ours),
                          {"PyTorch's routine": often(theirs)}, note, floor_s=CALLS * 2 * keys.nbytes / bandwidth)
    D = max(config.hidden_size for config in MODELS.values())
    rows_at_once = CACHES[0][0]
    x, weight, gate_up = made(rows_at_once, 1, D), made(D), made(rows_at_once, 1, 8 * D)
    for name, ours, eager, given in (("norm", lambda *t: rms_norm(*t, 1e-5), lambda *t: norm_formula(*t, 1e-5), (x, weight)),
                                     ("gate", swiglu, swiglu_formula, (gate_up,))):
        exact = eager(*(t.double() for t in given))
        note = f"errors: ours {worst(ours(*given), exact)}, eager {worst(eager(*given), exact)}"
        yield from beside("layers", f"{name}, {rows_at_once} rows, width {D}{times}", dtype, often(partial(ours, *given)),
                          {"eager": often(partial(eager, *given))}, note)


# ---------------------------------------------------------------- models

def random_model(config: PreTrainedConfig, dtype: torch.dtype) -> Transformer:
    """Random weights, made where they will be used: speed does not depend on what they are, if they are not all zeros."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = Transformer(config).to(dtype).requires_grad_(False)
    for name, parameter in model.named_parameters():
        if not name.endswith("norm.weight"):
            parameter.normal_(std=config.initializer_range)
    return model


def theirs_of(ours: Transformer, dtype: torch.dtype) -> torch.nn.Module:
    """transformers, on the very same weights."""
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(ours.hf_config, dtype=dtype).eval().requires_grad_(False)
    model.load_state_dict(unfuse(ours.state_dict(), ours.config), strict=not ours.config.tied, assign=True)
    model.tie_weights()
    return model


@dataclass
class Generated:
    """A batch of transformers' replies: whole_BT with its attention mask, and of the last positions, which tokens are the reply's."""
    whole_BT: Tensor
    mask_BT: Tensor
    reply_BT: Tensor
    logprob_BT: Tensor | None

    def rescored(self, model: torch.nn.Module) -> Tensor:
        """logprob_BT of the replies by a pass over the whole."""
        position_BT, T = (self.mask_BT.cumsum(1) - 1).clamp(min=0), self.reply_BT.shape[1]
        given = dict(attention_mask=self.mask_BT, position_ids=position_BT, logits_to_keep=T + 1, use_cache=False)
        logits_BTV = model(self.whole_BT, **given).logits
        return logits_BTV[:, :-1].float().log_softmax(-1).gather(2, self.whole_BT[:, -T:, None]).squeeze(2)


@dataclass
class Pair:
    """A model here and in transformers, and what both have to do. The first words of the vocabulary end a reply."""
    ours: Transformer
    theirs: torch.nn.Module
    work: Work
    prompts: list[list[int]]     # longest first
    stops: list[int]

    @torch.inference_mode()
    def sample(self) -> list[Sample]:
        uniform_NT = uniforms(0, 0, range(len(self.prompts)), 0, self.work.new)
        return decode(self.ours, self.prompts, uniform_NT, self.stops, 1.0, None, self.work.rows, tqdm(disable=True))

    @torch.no_grad()
    def generate(self, scores: bool = True, cache: str = "dynamic") -> list[Generated]:
        """Theirs, so many rows at a time, padded on the left; with `scores`, the log-probability of each token too."""
        batches = [self.prompts[first:first + self.work.rows] for first in range(0, len(self.prompts), self.work.rows)]
        return [self.generate_batch(prompts, scores, cache) for prompts in batches]

    def generate_batch(self, prompts: list[list[int]], scores: bool, cache: str) -> Generated:
        """Some prompts, longest first."""
        longest = len(prompts[0])
        ids_BT = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=DEVICE)
        mask_BT = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=DEVICE)
        made = self.theirs.generate(ids_BT, attention_mask=mask_BT, max_new_tokens=self.work.new, do_sample=True, top_k=0, top_p=1.0,
                                    temperature=1.0, eos_token_id=self.stops or None, pad_token_id=0, output_logits=scores,
                                    return_dict_in_generate=True, cache_implementation=cache)
        drawn_BT, logprob_BT = made.sequences[:, longest:], None
        ends_BT = torch.isin(drawn_BT, torch.tensor(self.stops, dtype=torch.long, device=DEVICE))
        reply_BT = ends_BT.cumsum(1) - ends_BT.long() == 0
        if scores:
            logp_TBV = torch.stack(made.logits).float().log_softmax(-1)
            logprob_BT = logp_TBV.gather(2, drawn_BT.T[..., None]).squeeze(2).T
        return Generated(made.sequences, torch.cat((mask_BT, reply_BT.long()), 1), reply_BT, logprob_BT)


def pair_of(ours: Transformer, dtype: torch.dtype, work: Work) -> Pair:
    rng, vocab = np.random.default_rng(0), ours.config.vocab
    heads = [rng.integers(1, vocab, size).tolist() for size in work.instructions]
    own = [rng.integers(1, vocab, rng.integers(work.own[0], work.own[1] + 1)).tolist() for _ in range(work.prompts)]
    prompts = [heads[n % len(heads)] + some for n, some in enumerate(own)]
    return Pair(ours, theirs_of(ours, dtype), work, sorted(prompts, key=len, reverse=True), list(range(1, 1 + round(work.ends * vocab))))


# ---------------------------------------------------------------- the sampler

def sampler_floor(pair: Pair, tokens: int, dtype: torch.dtype) -> float:
    """Seconds for so many tokens through rows that are always taken, and every prompt once, what prompts begin with once for all."""
    work, weights = pair.work, sum(p.numel() for p in pair.ours.layers.parameters())
    own = sum(work.instructions) + work.prompts * statistics.mean(work.own)
    context = round(statistics.mean(map(len, pair.prompts)) + tokens / work.prompts / 2)
    return 2 * weights * own / ceilings(dtype)[0] + tokens / work.rows * step_floor(pair.ours, work.rows, context, dtype)


def bench_sampler(dtype: torch.dtype) -> Iterator[Row]:
    """Ours always records log-probabilities. Theirs: with and, of the first model, without, and with a cache of fixed size."""
    goals, first = {"equal": "equal prompts", "game": "sampler"}, next(iter(MODELS))
    for model, config in MODELS.items():
        random = random_model(config, dtype)
        for kind, work in WORKS[model].items():
            pair = pair_of(random, dtype, work)
            drawn = lambda: sum(len(reply.ids) for reply in pair.sample())
            theirs = lambda **how: lambda: int(sum(batch.reply_BT.sum() for batch in pair.generate(**how)))
            peers = {"generate, log-probs": theirs()}
            if (model, kind) == (first, "equal"):
                peers |= {"generate": theirs(scores=False), "generate, static cache": theirs(scores=False, cache="static")}
            tokens = drawn()
            what = f"{model}, {work.prompts} prompts over {work.rows} rows, 1,000 tokens"
            yield from beside(goals[kind], what, dtype, drawn, peers, floor_s=1000 / tokens * sampler_floor(pair, tokens, dtype))
        yield from bench_decode(model, pair_of(random, dtype, WORKS[model]["equal"]), dtype)


@torch.inference_mode()
def bench_decode(name: str, pair: Pair, dtype: torch.dtype) -> list[Row]:
    """Steps alone, with the prompts in the cache: on a GPU, replays of the game_record."""
    rows = pair.work.rows
    seats = Seats(pair.ours, pair.prompts, rows, uniforms(0, 0, range(rows), 0, 400), [], 1.0)
    seats.fill_template()
    for _ in range(2):
        seats.advance()   # the first is taken as it is and recorded

    def eight() -> None:
        before = seats.cache.length
        while seats.cache.length < before + 8:
            seats.advance()
    context = seats.cache.length + 8 * (ROUNDS[5.0] // 2)
    found = beside("decode", f"{name}, {rows} rows, 8 steps", dtype, eight, {}, floor_s=8 * step_floor(pair.ours, rows, context, dtype))
    return [replace(row, note=f"{8 * rows / row.ours_ms * 1e3:,.0f} tokens a second") for row in found]


def bench_mismatch(dtype: torch.dtype, folder: str = "") -> Iterator[Row]:
    """|sampler - trainer| of the log-probability, nats a token: ours, and theirs between `generate` and a pass over the same tokens."""
    models = {folder: lambda: load(folder, dtype).to(DEVICE).requires_grad_(False)} if folder else \
        {name: lambda config=config: random_model(config, dtype) for name, config in MODELS.items()}
    for name, make in models.items():
        pair = pair_of(make(), dtype, Work(16, 16, (0,), (25, 32), 32, 0.0))
        replies, theirs = pair.sample(), pair.generate()[0]
        ids_BT, mask_BT, recorded_BT = pack(pair.prompts, [r.ids for r in replies], [[r.logprobs for r in replies]], DEVICE)
        with torch.no_grad():
            ours_N = (score(pair.ours, ids_BT, mask_BT)[0] - recorded_BT)[mask_BT].abs()
            theirs_N = (theirs.rescored(pair.theirs) - theirs.logprob_BT)[theirs.reply_BT].abs()
        note = ", ".join(f"{who} mean {d.mean():.1e}, max {d.max():.1e}, ratios off by 1 %: {(d.expm1().abs() > 0.01).float().mean():.0%}"
                         for who, d in (("ours", ours_N), ("theirs", theirs_N)))
        yield Row("mismatch", f"{name}, {str(dtype)[6:]}", 0.0, 0.0, note=note)


# ---------------------------------------------------------------- a whole step

def shares(act: Callable[[], object], most: int = 6) -> str:
    """The operations that take most of an act's time on a CPU."""
    if DEVICE.type != "cpu":
        return ""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        act()
    times = {event.key.removeprefix("aten::"): event.self_cpu_time_total for event in profile.key_averages()}
    largest = sorted(times, key=lambda name: -times[name])[:most]
    return ", ".join(f"{name} {times[name] / sum(times.values()):.0%}" for name in largest)


def bench_step(dtype: torch.dtype) -> Iterator[Row]:
    """Games of the smallest model: play, score by the reference, and an update's passes; each beside its floor, together beside theirs."""
    name, config = next(iter(MODELS.items()))
    pair = pair_of(random_model(config, dtype), dtype, TRAINED)
    replies, (flops, _), weights = pair.sample(), ceilings(dtype), sum(p.numel() for p in pair.ours.parameters())
    lengths = [len(p) + len(r.ids) for p, r in zip(pair.prompts, replies)]
    pass_s = 2 * weights * sum(lengths) / flops
    batches = micro_batches(lengths, Ranks(0, 1, DEVICE), {"cpu": 1024, "cuda": 16384}[DEVICE.type])
    pair.ours.requires_grad_(True)
    pair.theirs.requires_grad_(True)

    def passes(backward: bool) -> None:
        for rows in batches:
            ids_BT, mask_BT = pack([pair.prompts[i] for i in rows], [replies[i].ids for i in rows], device=DEVICE)
            with torch.set_grad_enabled(backward):
                total = score(pair.ours, ids_BT, mask_BT)[0].sum()
            if backward:
                total.backward()

    def ours() -> None:
        pair.sample()
        passes(backward=False)
        passes(backward=True)

    def theirs() -> None:
        for batch in pair.generate():
            with torch.no_grad():
                batch.rescored(pair.theirs)
            batch.rescored(pair.theirs)[batch.reply_BT].sum().backward()
    what = f"{name}, {TRAINED.prompts} turns"
    parts = {"play": (pair.sample, sampler_floor(pair, sum(len(r.ids) for r in replies), dtype)),
             "score": (lambda: passes(backward=False), pass_s), "update": (lambda: passes(backward=True), 3 * pass_s)}
    for part, (act, floor_s) in parts.items():
        yield from beside("step", f"{part}, {what}", dtype, act, {}, note=shares(act), floor_s=floor_s)
    whole_s = sum(floor_s for _, floor_s in parts.values())
    yield from beside("step", f"whole, {what}", dtype, ours, {"the same by transformers": theirs}, floor_s=whole_s)


SECTIONS = {"ceilings": bench_ceilings, "head": bench_head, "layers": bench_layers, "sampler": bench_sampler, "mismatch": bench_mismatch,
            "step": bench_step}


HEADER = "| section | what | ours, ms | peer | peer, ms | ratio | goal | |\n| --- | --- | --- | --- | --- | --- | --- | --- |"


def line(row: Row) -> str:
    """A row as Markdown."""
    shown = lambda value, digits: "" if value is None else f"{value:.{digits}f}"
    digits = 0 if row.ours_ms >= 100 else 2
    ours = f"{row.ours_ms:.{digits}f} ± {row.spread_ms:.{digits}f}" if row.ours_ms else ""
    cells = (row.section, row.what, ours, row.peer, shown(row.peer_ms, digits), shown(row.ratio, 2), shown(row.goal, 2), row.note)
    return f"| {' | '.join(cells)} |"


def main() -> None:
    cli = ArgumentParser(description="Time the hand-written parts beside their peers.")
    cli.add_argument("sections", nargs="*", help=f"some of {', '.join(SECTIONS)} [all]")
    known = ", ".join(MODELS)
    cli.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="MODEL", help=f"some of {known} [all]")
    cli.add_argument("--model", default="", help="measure the mismatch of this checkpoint in place of random models")
    cli.add_argument("--json", help="write the rows to this file")
    args = cli.parse_args()
    if unknown := set(args.sections) - SECTIONS.keys():
        cli.error(f"no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    for name in MODELS.keys() - set(args.models):
        del MODELS[name]
    keep_memory()
    if DEVICE.type == "cpu":
        torch.set_num_threads(1)   # for models this small one thread is fastest, for ours and for the peers
    print(f"{DEVICE.type}, torch {torch.__version__}, medians of {min(ROUNDS.values())} to {max(ROUNDS.values())} rounds, "
          "± distance of the quartiles\n")
    print(HEADER)
    rows = []
    for name in args.sections or SECTIONS:
        for dtype in TYPES:
            for row in bench_mismatch(dtype, args.model) if name == "mismatch" else SECTIONS[name](dtype):
                print(line(row), flush=True)
                rows.append(row)
    if args.json:
        Path(args.json).write_text(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
