"""
How fast the hand-written parts are beside what a user would install instead.

    python tests/bench.py          # all sections, as one Markdown table; on a GPU those of bench_gpu.py
    python tests/bench.py sampler --models toy-sized --json bench.json

    head      log-probability of tokens, forward and backward: beside the dense formula, and TRL if installed
    sampler   replies with log-probabilities: beside `generate` of transformers, in batches of like lengths
    step      a training step's parts beside transformers'; |log-prob of sampler - of trainer|, nats a token

Ours and the peers compute the same from the same weights, in turns in one process. Times are milliseconds for
1,000 tokens (in sampler and step: of replies), medians with the distance of the quartiles. A ratio is the
median of the ratios of neighbouring runs, so that other load does little harm; above 1, ours is faster.
"""
import json
import statistics
import sys
import time
from argparse import ArgumentParser
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import kernels  # noqa: F401  before torch, which reads the OpenMP setting in there
import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig

from kernels.logprob import log_policy, token_logprob
from model import Transformer, score, unfuse
from sample import Sample, sample, uniforms
from data import pack
from train import Ranks, micro_batches

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TEMPERATURE = 0.7          # of the head
Run = Callable[[], int]    # something to time; it returns how many tokens it handled

# ---------------------------------------------------------------- sizes
@dataclass(frozen=True)
class Workload:
    """Prompts to reply to: one of the shared prefixes, then tokens of their own."""
    prompts: int
    prefixes: tuple[int, ...]   # their lengths in tokens
    own: tuple[int, int]        # fewest and most tokens of a prompt's own
    new_tokens: int             # most tokens of a reply
    end_chance: float           # that a token is a reply's last
    rows: int = 64              # prompts that decode at a time


@dataclass(frozen=True)
class Sizes:
    """What a device is measured with."""
    dtype: torch.dtype
    heads: list[tuple[int, int, int]]   # tokens, dim, words
    models: dict[str, tuple[PreTrainedConfig, Workload]]
    step: Workload                      # of the first model
    micro_tokens: int                   # most tokens in one pass of a step
    rounds: int = 5                     # runs of each side that count
    patience_s: float = 120             # a comparison that has taken longer stops after two rounds


def sized(family: type, vocab: int, dim: int, ffn_dim: int, layers: int, heads: int, kv_heads: int,
          deviation: float = 0.02, tied: bool = False) -> PreTrainedConfig:
    """A model with random weights of this standard deviation."""
    return family(vocab_size=vocab, hidden_size=dim, intermediate_size=ffn_dim, num_hidden_layers=layers,
                  num_attention_heads=heads, num_key_value_heads=kv_heads, initializer_range=deviation,
                  tie_word_embeddings=tied)


# In the toy world prompts have 13 tokens, replies 17 on average, and the exam has 1,152 prompts. In English,
# an attacker's instructions have 125 tokens where the seed is harmful, and 117 where it is benign.
GAMES = Workload(256, (), (8, 18), 48, 1 / 17)
CHAT = Workload(64, (125, 117), (12, 40), 48, 1 / 17)
CPU = Sizes(torch.float32, [(2048, 256, 4096), (512, 576, 49152)], {
    "toy-sized": (sized(LlamaConfig, 160, 128, 512, 4, 4, 2, 0.1), replace(GAMES, prompts=1152)),
    "6M": (sized(LlamaConfig, 4096, 256, 1024, 4, 4, 2, 0.06), GAMES),
    "SmolLM2-sized": (sized(LlamaConfig, 49152, 576, 1536, 30, 9, 3, 0.04), CHAT),
}, GAMES, micro_tokens=1024)

# ---------------------------------------------------------------- timing
Row = dict[str, str | float]
HEADER = ("ms for 1,000 tokens\n\n| section | what | ours, ms | ± | peer | peer, ms | ratio | |\n"
          + "| --- " * 8 + "|")
COLUMNS = ("section", "what", "ours_ms:.0f", "spread_ms:.0f", "peer", "peer_ms:.0f", "ratio:.2f", "note")


def print_row(**row: str | float) -> Row:
    """Print a line of the table at once, and return it."""
    print("".join(f"| {{{column}}} " for column in COLUMNS).format(**row) + "|", flush=True)
    return row


def time_in_turns(runs: dict[str, Run], sizes: Sizes) -> dict[str, list[float]]:
    """Milliseconds for 1,000 tokens of runs that take turns; the first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    first = time.perf_counter()
    for n in range(1 + sizes.rounds):
        if n > 2 and time.perf_counter() - first > sizes.patience_s:
            break
        for name, run in runs.items():
            start = time.perf_counter()
            tokens = run()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            times[name].append((time.perf_counter() - start) * 1e6 / tokens)
    return {name: values[1:] for name, values in times.items()}


def median_ratio(ours: list[float], theirs: list[float]) -> float:
    return statistics.median(peer / own for peer, own in zip(theirs, ours, strict=True))


def compare(section: str, what: str, runs: dict[str, Run], sizes: Sizes, note: str = "") -> list[Row]:
    """Time all runs in turns, the first of which is ours, and return a row for each of the others."""
    (_, ours), *peers = time_in_turns(runs, sizes).items()
    low, ours_ms, high = statistics.quantiles(ours, n=4)
    return [print_row(section=section, what=what, ours_ms=ours_ms, spread_ms=high - low, peer=name,
                      peer_ms=statistics.median(theirs), ratio=median_ratio(ours, theirs), note=note)
            for name, theirs in peers]

# ---------------------------------------------------------------- head
def dense_head(hidden_ND: Tensor, weight_VD: Tensor, ids_N: Tensor) -> Tensor:
    """What most code does: all logits in the dtype of the model, then a log-softmax in fp32."""
    return log_policy(hidden_ND @ weight_VD.T, TEMPERATURE).gather(1, ids_N[:, None]).squeeze(1)


def trl_head(hidden_ND: Tensor, weight_VD: Tensor, ids_N: Tensor) -> Tensor:
    """TRL 1.16's chunked head with its own chunk size, and with the entropy, which ours returns, too."""
    from trl.kernels import ChunkedLogProbFunction
    options = (TEMPERATURE, 32768, None, 1.0, ("entropy",))
    return ChunkedLogProbFunction.apply(hidden_ND, weight_VD, None, ids_N, *options)[0]


def both_passes(head: Callable[..., Tensor], hidden_ND: Tensor, weight_VD: Tensor, ids_N: Tensor) -> int:
    torch.autograd.grad(head(hidden_ND, weight_VD, ids_N).sum(), (hidden_ND, weight_VD))
    return len(ids_N)


HEADS = {"ours": lambda *tensors: token_logprob(*tensors, TEMPERATURE)[0], "dense": dense_head}
if all(find_spec(name) for name in ("trl", "accelerate", "datasets")):   # trl needs the others
    HEADS["TRL"] = trl_head


def head_inputs(N: int, D: int, V: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """hidden_ND, weight_VD and ids_N; logits have a standard deviation of 8."""
    torch.manual_seed(0)
    hidden_ND = (torch.randn(N, D, device=DEVICE) * 8 / D**0.5).to(dtype).requires_grad_()
    weight_VD = torch.randn(V, D, device=DEVICE, dtype=dtype).requires_grad_()
    return hidden_ND, weight_VD, torch.randint(V, (N,), device=DEVICE)


@torch.no_grad()
def head_error(name: str, hidden_ND: Tensor, weight_VD: Tensor, ids_N: Tensor) -> float:
    """The largest error against fp64 over the first 256 tokens, nats."""
    exact_NV = (hidden_ND[:256].double() @ weight_VD.double().T / TEMPERATURE).log_softmax(-1)
    exact_N = exact_NV.gather(1, ids_N[:256, None]).squeeze(1)
    return (HEADS[name](hidden_ND, weight_VD, ids_N)[:256] - exact_N).abs().max().item()


def bench_head(sizes: Sizes, models: list[str]) -> list[Row]:
    """Forward and backward."""
    rows = []
    for shape in sizes.heads:
        tensors = head_inputs(*shape, sizes.dtype)
        errors = [f"{name} {head_error(name, *tensors):.0e}" for name in HEADS]
        runs = {name: partial(both_passes, head, *tensors) for name, head in HEADS.items()}
        what = " x ".join(map(str, shape))
        rows += compare("head", what, runs, sizes, "errors: " + ", ".join(errors))
    return rows

# ---------------------------------------------------------------- one model, here and in transformers
@dataclass
class Replies:
    """A batch of replies by transformers. Rows are padded on the left; the last T columns are the replies."""
    whole_BS: Tensor
    attention_BS: Tensor
    reply_BT: Tensor     # which of the last columns hold tokens of the reply
    logprob_BT: Tensor   # recorded while drawing

    def score(self, model: torch.nn.Module) -> Tensor:
        """logprob_BT of the replies by a pass over the whole."""
        T = self.reply_BT.shape[1]
        position_BS = (self.attention_BS.cumsum(1) - 1).clamp(min=0)
        logits_BTV = model(self.whole_BS, attention_mask=self.attention_BS, position_ids=position_BS,
                           logits_to_keep=T + 1, use_cache=False).logits
        logp_BTV = logits_BTV[:, :-1].float().log_softmax(-1)
        return logp_BTV.gather(2, self.whole_BS[:, -T:, None]).squeeze(2)


def random_model(config: PreTrainedConfig, dtype: torch.dtype) -> Transformer:
    """Random weights, drawn on the device: norms 1, all else normal."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = Transformer(config).to(dtype).requires_grad_(False)
    model.to_empty(device=DEVICE)
    for name, parameter in model.named_parameters():
        parameter.normal_(std=config.initializer_range)
        if name.endswith("norm.weight"):
            parameter.fill_(1.0)
    return model


class Pair:
    """Our model and that of transformers with the same random weights, and prompts for both."""

    def __init__(self, config: PreTrainedConfig, workload: Workload, sizes: Sizes, with_peer: bool = True):
        self.ours = random_model(config, sizes.dtype)
        if with_peer:
            with torch.device(DEVICE):
                self.theirs = AutoModelForCausalLM.from_config(config, dtype=sizes.dtype)
            self.theirs.requires_grad_(False)
            weights = unfuse(self.ours.state_dict(), self.ours)
            self.theirs.load_state_dict(weights, strict=not config.tie_word_embeddings)
        rng = np.random.default_rng(0)
        self.workload = workload
        self.micro_tokens = sizes.micro_tokens
        self.prefixes = [rng.integers(1, config.vocab_size, length).tolist() for length in workload.prefixes]
        self.prompts = []
        for n, length in enumerate(rng.integers(workload.own[0], workload.own[1] + 1, workload.prompts)):
            prefix = self.prefixes[n % len(self.prefixes)] if self.prefixes else []
            self.prompts.append(prefix + rng.integers(1, config.vocab_size, length).tolist())
        self.prompts.sort(key=len, reverse=True)   # so that batches of theirs have like lengths
        self.stops = list(range(1, 1 + round(workload.end_chance * config.vocab_size)))

    def sample(self) -> list[Sample]:
        work = self.workload
        uniform_NT = uniforms(0, 0, range(work.prompts), 0, work.new_tokens)
        return sample(self.ours, self.prompts, uniform_NT, self.stops, 1.0, self.prefixes, max_rows=work.rows)

    def generate(self) -> list[Replies]:
        """Theirs, in batches of `rows` prompts that are sorted by length."""
        rows = self.workload.rows
        return [self.generate_batch(self.prompts[i:i + rows]) for i in range(0, len(self.prompts), rows)]

    @torch.no_grad()
    def generate_batch(self, prompts: list[list[int]]) -> Replies:
        longest = len(prompts[0])
        ids_BS = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=DEVICE)
        mask_BS = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=DEVICE)
        output = self.theirs.generate(
            ids_BS, attention_mask=mask_BS, max_new_tokens=self.workload.new_tokens, do_sample=True, top_k=0,
            eos_token_id=self.stops, pad_token_id=0, output_logits=True, return_dict_in_generate=True)
        drawn_BT = output.sequences[:, longest:]
        is_stop_BT = torch.isin(drawn_BT, torch.tensor(self.stops, device=DEVICE))
        reply_BT = is_stop_BT.cumsum(1) - is_stop_BT.long() == 0   # up to the first stop, which is included
        steps = zip(output.logits, drawn_BT.T[..., None], strict=True)
        logprobs = [log_policy(logits_BV, 1.0).gather(1, drawn_B1) for logits_BV, drawn_B1 in steps]
        attention_BS = torch.cat((mask_BS, reply_BT.long()), 1)
        return Replies(output.sequences, attention_BS, reply_BT, torch.cat(logprobs, 1))

    def our_play(self) -> int:
        return sum(len(reply.ids) for reply in self.sample())

    def their_play(self) -> int:
        return sum(int(batch.reply_BT.sum()) for batch in self.generate())

    def our_pass(self, replies: list[Sample]) -> int:
        """Score the replies in micro-batches, as train.py does; outside of no_grad, backward as well."""
        lengths = [len(p) + len(r.ids) for p, r in zip(self.prompts, replies, strict=True)]
        for numbers in micro_batches(dict(enumerate(lengths)), Ranks(0, 1, DEVICE), self.micro_tokens):
            prompts = [self.prompts[i] for i in numbers]
            ids_BT, mask_BT = pack(prompts, [replies[i].ids for i in numbers], device=DEVICE)
            total = score(self.ours, ids_BT, mask_BT)[0].sum()
            if total.requires_grad:
                total.backward()
        return sum(len(reply.ids) for reply in replies)

    def their_pass(self, batches: list[Replies]) -> int:
        for batch in batches:
            total = batch.score(self.theirs)[batch.reply_BT].sum()
            if total.requires_grad:
                total.backward()
        return sum(int(batch.reply_BT.sum()) for batch in batches)

# ---------------------------------------------------------------- sampler and step
def bench_sampler(sizes: Sizes, models: list[str]) -> list[Row]:
    rows = []
    for name in models:
        pair = Pair(*sizes.models[name], sizes)
        what = f"{name}, {len(pair.prompts)} prompts over {pair.workload.rows} rows"
        runs = {"ours": pair.our_play, "generate, log-probs": pair.their_play}
        rows += compare("sampler", what, runs, sizes)
    return rows


@torch.no_grad()
def mismatches(pair: Pair, replies: list[Sample], batches: list[Replies]) -> tuple[Tensor, Tensor]:
    """|log-prob of the sampler - log-prob of the trainer| of every token, nats: ours and theirs."""
    ids, logprobs = [reply.ids for reply in replies], [reply.logprobs for reply in replies]
    ids_BT, mask_BT, logprob_BT = pack(pair.prompts, ids, [logprobs], DEVICE)
    ours_N = (score(pair.ours, ids_BT, mask_BT)[0] - logprob_BT)[mask_BT].abs()
    return ours_N, torch.cat([(b.score(pair.theirs) - b.logprob_BT)[b.reply_BT].abs() for b in batches])


def bench_step(sizes: Sizes, models: list[str]) -> list[Row]:
    """Draw replies, score them as the reference does, and run both passes of the update."""
    pair = Pair(sizes.models[models[0]][0], sizes.step, sizes)
    replies = pair.sample()
    batches = pair.generate()
    ours_N, theirs_N = mismatches(pair, replies, batches)
    note = f"mismatch: {ours_N.mean():.0e}, theirs {theirs_N.mean():.0e}"
    pair.ours.requires_grad_(True)
    pair.theirs.requires_grad_(True)
    ours, theirs = partial(pair.our_pass, replies), partial(pair.their_pass, batches)
    parts = {"play": (pair.our_play, pair.their_play),
             "score": (torch.no_grad()(ours), torch.no_grad()(theirs)),
             "update": (ours, theirs)}
    rows = []
    for part, (ours, theirs) in parts.items():
        what = f"{part}, {models[0]}, {sizes.step.prompts} turns"
        rows += compare("step", what, {"ours": ours, "transformers": theirs}, sizes)
    total = {key: sum(row[key] for row in rows) for key in ("ours_ms", "spread_ms", "peer_ms")}
    total["ratio"] = total["peer_ms"] / total["ours_ms"]
    rows.append(print_row(**rows[0] | total | {"what": f"all three, {models[0]}", "note": note}))
    return rows

# ---------------------------------------------------------------- the command line
SECTIONS = {"head": bench_head, "sampler": bench_sampler, "step": bench_step}


def main(argv: list[str] | None = None, sizes: Sizes = CPU, sections: dict[str, Callable] = SECTIONS,
         header: str = HEADER) -> list:
    cli = ArgumentParser(description="Time the hand-written parts beside their peers.")
    cli.add_argument("sections", nargs="*", metavar="SECTION", help=f"some of {', '.join(sections)} [all]")
    cli.add_argument("--models", nargs="+", choices=sizes.models, default=list(sizes.models), metavar="MODEL",
                     help=f"some of {', '.join(sizes.models)}; on a CPU, step takes the first [all]")
    cli.add_argument("--json", help="write the rows to this file")
    args = cli.parse_args(argv)
    if unknown := [name for name in args.sections if name not in sections]:
        cli.error(f"no section {', '.join(unknown)}; there are {', '.join(sections)}")
    torch.set_num_threads(1)   # the fastest for models this small on a CPU, for ours and for the peers
    print(f"{DEVICE.type}, {sizes.dtype}, torch {torch.__version__}, {header}", flush=True)
    rows = []
    for name in args.sections or sections:
        rows += sections[name](sizes, args.models)
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1))
    return rows


if __name__ == "__main__":
    if DEVICE.type == "cuda":
        from bench_gpu import main
    main()
