"""
How fast the hand-written parts are, beside what a user would install instead.

    python -m kernels.bench               # one table: ours, the peer, their ratio, and the errors of both
    python -m kernels.bench --json bench.json

Ours and the peer run in turns in one process, on the same tensors; times are medians, with the spread between the quartiles. Sizes follow
the device: tiny models on a CPU, heads of 8B models on a GPU. A peer that is not installed is left out, and the table says so. This command
looks at the files above it in the list; nothing rests on it.
"""
import json
import statistics
import sys
import time
from argparse import ArgumentParser
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

sys.path.insert(0, str(Path(__file__).parent.parent))
from kernels.logprob import token_logprob
from model import Transformer, new_model, score, their_name
from sample import sample, uniforms
from selfplay import pack

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HEADS = [(16384, 4096, 128256), (16384, 3584, 152064)] if DEVICE.type == "cuda" else [(2048, 256, 4096)]   # tokens, width, words
LAYERS = dict(num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)
MODELS = {"toy-sized": dict(vocab_size=160, hidden_size=128, intermediate_size=512, **LAYERS),
          "4M": dict(vocab_size=4096, hidden_size=256, intermediate_size=704, **LAYERS)}
REPEATS = 7


@dataclass(frozen=True)
class Row:
    """One line of the table. Times in milliseconds; `ratio` above 1 is in our favour; `note` holds errors or the reason for a gap."""
    what: str
    ours_ms: float
    spread_ms: float
    peer: str
    peer_ms: float | None = None
    ratio: float | None = None
    note: str = ""


def seconds(act: Callable[[], object]) -> float:
    begun = time.perf_counter()
    act()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def beside(what: str, ours: Callable[[], object], peer_name: str, peer: Callable[[], object] | None, note: str = "") -> Row:
    """Time both in turns, after one run each that does not count."""
    acts = [ours] + [peer] * (peer is not None)
    times = list(zip(*[[seconds(act) * 1e3 for act in acts] for _ in range(REPEATS + 1)][1:]))
    medians, quartiles = [statistics.median(t) for t in times], statistics.quantiles(times[0], n=4)
    if peer is None:
        return Row(what, medians[0], quartiles[2] - quartiles[0], peer_name, note=note or "not installed")
    return Row(what, medians[0], quartiles[2] - quartiles[0], peer_name, medians[1], medians[1] / medians[0], note)


# ---------------------------------------------------------------- the head

def full_logits(hidden_ND: Tensor, weight_VD: Tensor, ids_N: Tensor, temperature: float) -> tuple[Tensor, None]:
    """What most code does: all logits in the model's precision, then a log-softmax in fp32."""
    logp_NV = torch.log_softmax((hidden_ND @ weight_VD.T).float() / temperature, -1)
    return logp_NV.gather(1, ids_N[:, None]).squeeze(1), None


def trl_head(hidden_ND: Tensor, weight_VD: Tensor, ids_N: Tensor, temperature: float) -> tuple[Tensor, None]:
    """TRL's chunked head."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    result = ChunkedLogProbFunction.apply(hidden_ND, weight_VD, ids_N, temperature)
    return (result[0] if isinstance(result, tuple) else result), None


def forward_backward(head: Callable, hidden_ND: Tensor, weight_VD: Tensor, ids_N: Tensor) -> Callable[[], Tensor]:
    """Both passes of a head, as something to time; it returns the log-probabilities."""
    def act() -> Tensor:
        hidden_ND.grad = weight_VD.grad = None
        logprob_N = head(hidden_ND, weight_VD, ids_N, 0.7)[0]
        logprob_N.sum().backward()
        return logprob_N.detach()
    return act


def bench_head(dtype: torch.dtype) -> list[Row]:
    """Log-probability, forward and backward. The error is against fp64, on the first 256 tokens."""
    rows = []
    for N, D, V in HEADS:
        generator = torch.Generator().manual_seed(0)
        hidden_ND = (torch.randn(N, D, generator=generator) * 25 / (3 * D ** 0.5)).to(DEVICE, dtype).requires_grad_()
        weight_VD = torch.randn(V, D, generator=generator).to(DEVICE, dtype).requires_grad_()
        ids_N = torch.randint(V, (N,), generator=generator).to(DEVICE)
        exact_NV = torch.log_softmax(hidden_ND[:256].detach().double() @ weight_VD.detach().double().T / 0.7, -1)
        exact_N = exact_NV.gather(1, ids_N[:256, None]).squeeze(1)
        peers = {"full logits": full_logits, "TRL chunked": trl_head if find_spec("trl") else None}
        error = lambda act: (act()[:256].double() - exact_N).abs().max().item()
        ours = forward_backward(token_logprob, hidden_ND, weight_VD, ids_N)
        for name, head in peers.items():
            peer = forward_backward(head, hidden_ND, weight_VD, ids_N) if head else None
            note = f"errors {error(ours):.0e}, {error(peer):.0e}" if peer else ""
            rows.append(beside(f"head {str(dtype)[6:]}, {N} x {D} x {V}", ours, name, peer, note))
    return rows


# ---------------------------------------------------------------- the sampler

def theirs_of(ours: Transformer, dtype: torch.dtype) -> torch.nn.Module:
    """The same weights in transformers."""
    model = AutoModelForCausalLM.from_config(ours.config).eval()
    model.load_state_dict({their_name(key): tensor for key, tensor in ours.state_dict().items()}, strict=not ours.shape.tied)
    return model.to(DEVICE, dtype)


def bench_sampler(dtype: torch.dtype, rows: int = 64, prompt: int = 32, new: int = 32) -> list[Row]:
    """Ragged prompts, log-probabilities recorded, against `generate` with its scores kept; and sampler against trainer."""
    lines = []
    for name, size in MODELS.items():
        ours = new_model(LlamaConfig(**size, initializer_range=0.1, tie_word_embeddings=True), seed=0)
        ours = ours.to(DEVICE, dtype).requires_grad_(False)
        theirs = theirs_of(ours, dtype)
        generator = torch.Generator().manual_seed(0)
        prompts = [torch.randint(1, size["vocab_size"], (prompt - n % 8,), generator=generator).tolist() for n in range(rows)]
        uniform_NT = uniforms(0, 0, range(rows), 0, new)
        ids_BT = torch.tensor([[0] * (prompt - len(p)) + p for p in prompts], device=DEVICE)
        mask_BT = torch.tensor([[0] * (prompt - len(p)) + [1] * len(p) for p in prompts], device=DEVICE)
        act = lambda: sample(ours, prompts, uniform_NT, [])
        peer = lambda: theirs.generate(ids_BT, attention_mask=mask_BT, max_new_tokens=new, do_sample=True, top_k=0, eos_token_id=None,
                                       pad_token_id=0, output_scores=True, return_dict_in_generate=True)
        replies = act()
        packed_BT, chosen_BT, sampled_BT = pack(prompts, [r.ids for r in replies], [[r.logprobs for r in replies]], DEVICE)
        with torch.no_grad():
            difference = (score(ours, packed_BT, chosen_BT)[0] - sampled_BT)[chosen_BT].abs()
        note = f"sampler - trainer: max {difference.max():.0e}, mean {difference.mean():.0e}"
        lines.append(beside(f"sampler {str(dtype)[6:]}, {name}, {rows} rows", act, "transformers generate", peer, note))
    return lines


def table(rows: list[Row]) -> str:
    """The rows as Markdown."""
    head = ["| what | ours, ms | peer | peer, ms | ratio | |", "| --- | --- | --- | --- | --- | --- |"]
    shown = lambda value, digits: "-" if value is None else f"{value:.{digits}f}"
    cells = [(r.what, f"{r.ours_ms:.0f} ± {r.spread_ms:.0f}", r.peer, shown(r.peer_ms, 0), shown(r.ratio, 2), r.note) for r in rows]
    return "\n".join(head + ["| " + " | ".join(row) + " |" for row in cells])


def main() -> None:
    cli = ArgumentParser(description="Time the hand-written parts beside their peers.")
    cli.add_argument("--json", help="write the rows to this file")
    args = cli.parse_args()
    if DEVICE.type == "cpu":
        torch.set_num_threads(1)   # for models this small one thread is fastest, for ours and for the peers
    rows = [row for dtype in (torch.float32, torch.bfloat16) for bench in (bench_head, bench_sampler) for row in bench(dtype)]
    print(f"{DEVICE.type}, torch {torch.__version__}, medians of {REPEATS}, ± distance of the quartiles\n\n{table(rows)}")
    if args.json:
        Path(args.json).write_text(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
