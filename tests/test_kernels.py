"""
The layers and the log-probability of tokens, against fp64.

`as_accurate` compares a function with the plain formula in the same precision: it may err twice as much, plus
one rounding. The Triton kernels run in Triton's interpreter on a CPU, and are compiled for Hopper without
a GPU.

    python -m pytest tests/test_kernels.py
"""
import json
import math
import os
import subprocess
import sys
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn.attention.bias import CausalBias
from torch.profiler import ProfilerActivity, profile

import kernels.logprob
from conftest import DEVICE, measured
from kernels import layers, layers_triton, logprob_triton
from kernels.logprob import (
    PIECE, TokenLogprob, functions_for, head_bytes, log_policy, token_logprob,
)

ON_CPU = pytest.mark.skipif(DEVICE == "cuda", reason="counts the memory of a CPU")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def randn(*size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*size, generator=generator, device="cpu").to(DEVICE, dtype)


@pytest.fixture(autouse=True)
def everything_is_on_the_gpu_if_there_is_one():
    """Without one, Triton's interpreter runs the kernels."""
    torch.set_default_device(DEVICE)
    yield
    torch.set_default_device(None)


def as_accurate(what: str, ours: Tensor, plain: Tensor, exact: Tensor, rounding: float) -> None:
    """Ours and the plain formula in the same precision, exact in fp64."""
    bound = 2 * (plain.double() - exact).abs().max().item() + rounding
    measured(what, (ours.double() - exact).abs().max(), bound)


# ---------------------------------------------------------------- log-probability, in pieces on a CPU

def exact_logprob(hidden: Tensor, weight: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The definition in fp64, with all logits."""
    logp = torch.log_softmax(hidden.double() @ weight.double().T / temperature, -1)
    return logp.gather(-1, ids[:, None]).squeeze(-1), -(logp.exp() * logp).sum(-1)


def dense_logprob(hidden: Tensor, weight: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The definition in fp32, with all logits."""
    logp = log_policy(hidden.float() @ weight.float().T, temperature)
    return logp.gather(-1, ids[:, None]).squeeze(-1), -(logp.exp() * logp).sum(-1).detach()


def inputs(N: int, D: int = 32, V: int = 1153, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """hidden_ND, weight_VD and ids_N."""
    ids = torch.randint(V, (N,), generator=torch.Generator().manual_seed(N), device="cpu").to(DEVICE)
    hidden = randn(N, D, dtype=dtype, seed=N)
    weight = randn(V, D, dtype=dtype, seed=N + 1)
    return [hidden.requires_grad_(), weight.requires_grad_(), ids]


def gradients(function, tensors: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    """Gradients of the log-probability for hidden states and weights, at temperature 0.7."""
    logprob = function(*tensors, 0.7)[0]
    return torch.autograd.grad(logprob, tensors[:2], grad.to(logprob.dtype))


@pytest.fixture
def small_pieces(monkeypatch):
    """Pieces of 8 tokens in the forward pass."""
    monkeypatch.setitem(PIECE, "cpu", 8 * 1153)
    monkeypatch.setattr(kernels.logprob, "MIN_SIDE", 1)


@pytest.mark.parametrize("N", [1, 7, 8, 20])
def test_log_probability_and_entropy_equal_fp64_for_every_number_of_pieces(N, small_pieces):
    ours = token_logprob(*inputs(N), 0.7)
    exact = exact_logprob(*inputs(N), 0.7)
    measured(f"log-probability, N={N}", (ours[0] - exact[0]).abs().max(), 2e-5)
    measured(f"entropy, N={N}", (ours[1] - exact[1]).abs().max(), 2e-5)


def test_gradients_equal_those_of_the_dense_formula(small_pieces):
    tensors = inputs(20)
    ours = gradients(token_logprob, tensors, torch.linspace(-1, 1, 20))
    exact = gradients(exact_logprob, tensors, torch.linspace(-1, 1, 20))
    for name, a, b in zip(("hidden", "weight"), ours, exact, strict=True):
        measured(f"gradient of {name}", (a - b).abs().max() / b.abs().max(), 1e-5)


def test_logits_of_bf16_inputs_are_never_rounded():
    hidden, weight, ids = inputs(64, dtype=torch.bfloat16)
    exact = exact_logprob(hidden, weight, ids, 1.0)[0]
    rounded = torch.log_softmax((hidden @ weight.T).float(), -1).gather(-1, ids[:, None]).squeeze(-1)
    ours = (token_logprob(hidden, weight, ids)[0] - exact).abs().max()
    measured("error, as a share of that with bf16 logits", ours / (rounded - exact).abs().max(), 1e-2)


def test_no_tokens_give_no_log_probabilities():
    logprob_N, entropy_N = token_logprob(*inputs(0))
    assert logprob_N.shape == entropy_N.shape == (0,)
    logprob_N.sum().backward()


def test_extreme_logits_stay_finite():
    assert torch.isfinite(log_policy(torch.tensor([[1e4, -1e4, 0.0]]), 1.0)).all()


@ON_CPU
def test_the_matrix_of_logits_never_exists_as_a_whole(small_pieces):
    hidden, weight, ids = inputs(50)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        token_logprob(hidden, weight, ids)[0].sum().backward()
    largest = max(event.self_cpu_memory_usage for event in trace.events())
    # The gradient of the weights, which is returned, has 32 / 50 of the size of the logits.
    measured("largest block of memory, as a share of all logits", largest / (50 * 1153 * 4), 0.7)


@ON_CPU
@pytest.mark.parametrize("N, D, V", [(2048, 256, 4096), (4096, 512, 2048)])
@DTYPES
def test_the_head_takes_the_memory_of_a_few_rows_of_logits_and_a_slice_of_their_gradients(N, D, V, dtype):
    """A CPU computes in fp32: from bf16 it copies both factors, and it rounds both gradients at the end."""
    hidden, weight, ids = inputs(N, D, V, dtype)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        token_logprob(hidden, weight, ids)[0].sum().backward()
    events = [e for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    extra = max(accumulate(sizes)) - (N + V) * D * weight.element_size()   # without the gradients it returns
    rows, C = max(256, 2**20 // V), min(V, 2**20 // N)
    copies = 8 * (N + V) * D if dtype == torch.bfloat16 else 0
    formula = copies + 4 * max(2 * rows * V + rows * D, N * C + (N + C) * D)
    measured(f"peak of {extra / 2**20:.1f} MiB over the formula's", extra / formula, 1.05)
    assert extra > 0.6 * formula, "the formula promises what is needed, not much more"


@pytest.mark.parametrize("D, V", [(4096, 128256), (3584, 152064)])
def test_the_heads_of_8b_models_take_at_most_600_mib_for_16k_tokens_on_a_gpu(D, V):
    measured(f"GiB at width {D}, {V} words", head_bytes(16384, D, V) / 2**30, 0.6)


# ---------------------------------------------------------------- log-probability by the Triton kernels

def by_kernels(hidden: Tensor, weight: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """token_logprob as a GPU computes it."""
    return TokenLogprob.apply(hidden, weight, ids, temperature, functions_for("cuda"))


@DTYPES
@pytest.mark.parametrize("N, D, V", [(1, 16, 1), (5, 32, 1153), (33, 48, 257), (70, 64, 512), (3, 40, 50257)])
def test_the_kernel_errs_no_more_than_the_dense_formula(N, D, V, dtype):
    """Programs split the vocabulary, the last split is ragged, and sizes are no multiples of tiles."""
    tensors = inputs(N, D, V, dtype)
    ours = by_kernels(*tensors, 0.7)
    plain = dense_logprob(*tensors, 0.7)
    exact = exact_logprob(*tensors, 0.7)
    for i, name in enumerate(("log-probability", "entropy")):
        rounding = 5e-7 * max(1.0, exact[i].abs().max().item())
        as_accurate(name, ours[i], plain[i], exact[i], rounding)


@pytest.mark.parametrize("programs", [1, 16, 1024])
def test_every_split_of_the_vocabulary_gives_the_same_result(programs, monkeypatch):
    monkeypatch.setattr(logprob_triton, "PROGRAMS", programs)
    tensors = inputs(70, V=3000)
    for a, b in zip(by_kernels(*tensors, 0.7), exact_logprob(*tensors, 0.7), strict=True):
        measured(f"with {programs} programs", (a - b).abs().max(), 5e-5)


@pytest.mark.parametrize("V", [128256, 151936])
def test_the_vocabularies_of_real_models_are_summed_without_phantom_words(V):
    """Neither is a multiple of 1024; one word too many would add log(1 + 1/V) at equal logits."""
    ids = torch.tensor([0, V - 1])
    logprob = by_kernels(torch.zeros(2, 16), torch.zeros(V, 16), ids, 1.0)[0]
    measured("log-probability at equal logits + log V", (logprob.double() + math.log(V)).abs().max(), 2e-6)


@DTYPES
def test_gradients_of_the_kernel_err_no_more_than_those_of_the_dense_formula(dtype, monkeypatch):
    monkeypatch.setitem(PIECE, "cpu", 37 * 500)   # several slices of the vocabulary, the last one ragged
    tensors = inputs(37, 32, 1153, dtype)
    grad = torch.linspace(-1, 1, 37)
    ours, plain, exact = [gradients(f, tensors, grad) for f in (by_kernels, dense_logprob, exact_logprob)]
    for i, name in enumerate(("hidden", "weight")):
        largest = exact[i].abs().max().item()
        # The interpreter truncates to bf16 where a GPU rounds: one unit in the last place for each factor.
        rounding = 2**-7 * largest if dtype == torch.bfloat16 else 2e-6 * largest
        as_accurate(f"gradient of {name}", ours[i], plain[i], exact[i].double(), rounding)


@pytest.mark.parametrize("scale", [25.0, 1e4])
def test_extreme_logits_leave_the_kernel_finite_and_right(scale):
    hidden = torch.eye(4, 16) * scale
    weight = torch.eye(40, 16)
    weight[20:] = -weight[:20]
    ids = torch.tensor([0, 1, 22, 39])
    ours = by_kernels(hidden, weight, ids, 1.0)
    exact = exact_logprob(hidden, weight, ids, 1.0)
    for name, a, b in zip(("log-probability", "entropy"), ours, exact, strict=True):
        assert torch.isfinite(a).all()
        measured(f"{name}, relative", ((a - b).abs() / b.abs().clamp(min=1.0)).max(), 1e-6)
    assert (ours[0] <= 0).all()


def test_the_kernel_takes_no_tokens():
    by_kernels(*inputs(0), 1.0)[0].sum().backward()


def test_the_kernel_takes_inputs_that_are_not_contiguous():
    hidden = randn(64, 12).T
    weight = randn(64, 150, seed=1).T
    ids = torch.arange(24)[::2]
    ours = by_kernels(hidden, weight, ids, 1.0)[0]
    measured("strided inputs", (ours - exact_logprob(hidden, weight, ids, 1.0)[0]).abs().max(), 2e-5)


def test_two_runs_of_the_kernel_give_the_same_bits():
    tensors = inputs(40)
    once = gradients(by_kernels, tensors, torch.ones(40))
    twice = gradients(by_kernels, tensors, torch.ones(40))
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


# ---------------------------------------------------------------- matrix product, norm, gate, positions

def test_logits_of_bf16_factors_are_fp32_and_exact():
    x = randn(50, 64, dtype=torch.bfloat16)
    weight = randn(96, 64, dtype=torch.bfloat16, seed=1)
    logits = layers.matmul_fp32(x, weight)
    assert logits.dtype == torch.float32
    measured("error of a logit", (logits - x.double() @ weight.double().T).abs().max(), 2e-5)


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return layers.rms_norm(x, weight, 1e-5)


def norm_formula(x: Tensor, weight: Tensor) -> Tensor:
    return layers.norm_reference(x, weight, 1e-5)


# ours, as called and by the kernels, which a CPU interprets; the plain formula; sizes of the arguments
LAYERS = {
    "norm as called": (norm, norm_formula, (3, 7, 48), (48,)),
    "swiglu as called": (layers.swiglu, layers.swiglu_reference, (3, 7, 96)),
    "norm": (lambda x, weight: layers.NormFunction.apply(x, weight, 1e-5), norm_formula, (3, 7, 48), (48,)),
    "swiglu": (layers.SwiGLUFunction.apply, layers.swiglu_reference, (3, 7, 96)),
}


def with_gradients(function, args: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The result of a function, computed in this dtype, and the gradients of its arguments."""
    leaves = [t.to(dtype).requires_grad_() for t in args]
    y = function(*leaves)
    grad = randn(*y.shape, dtype=args[0].dtype, seed=9).to(dtype)
    return [y, *torch.autograd.grad(y, leaves, grad)]


@DTYPES
@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_and_its_gradients_err_no_more_than_autograd_on_the_formula(layer, dtype):
    function, formula, *sizes = LAYERS[layer]
    args = [randn(*size, dtype=dtype, seed=i) for i, size in enumerate(sizes)]
    ours = with_gradients(function, args, dtype)
    plain = with_gradients(formula, args, dtype)
    exact = with_gradients(formula, args, torch.double)
    for i in range(len(ours)):
        rounding = torch.finfo(dtype).eps * exact[i].abs().max().item()
        as_accurate(f"{layer}, gradient {i}" if i else layer, ours[i], plain[i], exact[i], rounding)
    with torch.no_grad():
        assert torch.equal(function(*args), ours[0]), "without gradients it is the same"


@DTYPES
@pytest.mark.parametrize("rows, dim", [((5,), 1), ((3, 7), 48), ((2, 1, 3), 1100), ((0,), 16)])
def test_the_kernels_of_norm_and_gate_err_no_more_than_the_formula(rows, dim, dtype):
    x = randn(*rows, dim, dtype=dtype)
    weight = randn(dim, dtype=dtype, seed=1)
    gate_up = randn(*rows, 2 * dim, dtype=dtype, seed=2)
    cases = {"norm": (layers_triton.rms_norm, layers.norm_reference, (x, weight, 1e-5)),
             "gate": (layers_triton.swiglu, layers.swiglu_reference, (gate_up,))}
    for name, (kernel, formula, args) in cases.items():
        ours = kernel(*args)
        assert ours.shape == x.shape and ours.dtype == dtype
        if x.numel():
            exact = formula(*(t.double() if isinstance(t, Tensor) else t for t in args))
            # The interpreter truncates to bf16 where a GPU rounds.
            rounding = 2 * torch.finfo(dtype).eps * exact.abs().max().item()
            as_accurate(name, ours, formula(*args), exact, rounding)


@DTYPES
@pytest.mark.parametrize("programs", [1, 2, 1024])
@pytest.mark.parametrize("rows, dim", [((5,), 3), ((3, 7), 48), ((2, 1, 3), 1100), ((0,), 16)])
def test_the_kernels_of_gradients_err_no_more_than_the_formula(rows, dim, programs, dtype, monkeypatch):
    """Programs of several rows, the last of which may have fewer; one row each; one program for all."""
    monkeypatch.setattr(layers_triton, "NORM_PROGRAMS", programs)
    x, weight = randn(*rows, dim, dtype=dtype), randn(dim, dtype=dtype, seed=1)
    gate_up, grad = randn(*rows, 2 * dim, dtype=dtype, seed=2), randn(*rows, dim, dtype=dtype, seed=9)
    cases = {"norm": (layers_triton.rms_norm_backward(grad, x, weight, 1e-5), norm_formula, (x, weight)),
             "gate": ((layers_triton.swiglu_backward(grad, gate_up),), layers.swiglu_reference, (gate_up,))}
    for name, (ours, formula, args) in cases.items():
        plain = with_gradients(formula, args, dtype)[1:]
        exact = with_gradients(formula, args, torch.double)[1:]
        for i, gradient in enumerate(ours):
            assert gradient.shape == args[i].shape
            assert grad.numel() or not gradient.any(), "of no rows it is 0"
            if gradient.numel() and grad.numel():
                rounding = 2 * torch.finfo(dtype).eps * exact[i].abs().max().item()
                as_accurate(f"{name}, gradient {i}", gradient, plain[i], exact[i], rounding)


@pytest.mark.parametrize("scaling", [None, (8.0, 1.0, 4.0, 8192.0)], ids=["plain", "llama 3"])
def test_rotary_positions_turn_complex_numbers_as_fp64_does(scaling):
    """Pair e is the complex number x[e] + i x[e + E/2]; position p turns it by p times its frequency."""
    B, T, H, E = 2, 5, 3, 16
    position_BT = torch.tensor([[0, 1, 7, 100, 8000]]).expand(B, T)
    x = randn(B, T, H, E)
    frequency_E2 = layers.rope_frequencies(E, 10_000.0, scaling, x.device)
    for e, frequency in enumerate(frequency_E2.tolist()):
        exact = 10_000.0 ** (-2 * e / E)
        if scaling:   # slowed by 8 below one turn in 8192 positions, not from four on, blended between
            kept = min(1.0, max(0.0, (8192 * exact / (2 * math.pi) - 1) / 3))
            exact *= kept + (1 - kept) / 8
        measured(f"frequency {e}, relative", abs(frequency / exact - 1), 1e-6)
    pairs = torch.complex(x[..., :E // 2].double(), x[..., E // 2:].double())
    angle = position_BT[..., None, None].double() * frequency_E2.double()
    turned = pairs * torch.polar(torch.ones_like(angle), angle)
    ours = layers.rotate(x, layers.rotation(position_BT, (E, 10_000.0, scaling), torch.float32))
    error = (ours.double() - torch.cat((turned.real, turned.imag), dim=-1)).abs().max()
    measured("rotated queries; angles up to 8000 radians are fp32, exact to 2.4e-4", error, 5e-4)


# ---------------------------------------------------------------- attention

def exact_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention in fp64, each query head by itself."""
    T, H = query.shape[1:3]
    K, S = key.shape[1:3]
    heads = []
    for h in range(H):
        logit = query[:, :, h].double() @ key[:, h * K // H].double().mT / math.sqrt(query.shape[-1])
        is_hidden = torch.ones(T, S, dtype=torch.bool).triu(S - T + 1)
        weight = logit.masked_fill(is_hidden, float("-inf")).softmax(-1)
        heads.append(weight @ value[:, h * K // H].double())
    return torch.cat(heads, -1)


@pytest.mark.parametrize("T, S", [(1, 1), (9, 9), (200, 200), (1, 30), (2, 3), (9, 30), (200, 230)])
@pytest.mark.parametrize("K", [1, 3, 6])
def test_attention_equals_fp64_over_few_and_many_positions_with_and_without_a_prefix(T, S, K):
    query, key, value = randn(2, T, 6, 16), randn(2, K, S, 16, seed=1), randn(2, K, S, 16, seed=2)
    exact = exact_attention(query, key, value)
    measured(f"{T} of {S} positions", (layers.attend(query, key, value) - exact).abs().max(), 5e-6)


@pytest.mark.parametrize("T", [3, 200])
def test_gradients_of_attention_equal_fp64(T):
    args = [randn(2, T, 6, 16), randn(2, 3, T, 16, seed=1), randn(2, 3, T, 16, seed=2)]
    ours = with_gradients(layers.attend, args, torch.float32)
    exact = with_gradients(exact_attention, args, torch.double)
    for a, b in zip(ours, exact, strict=True):
        measured(f"{T} positions", (a - b).abs().max(), 1e-5)


CACHES = [   # K, G, S, E, and the rows' lengths: at the first and last slot, on both sides of a tile's end
    (2, 3, 700, 64, [600, 0, 699]),
    (1, 7, 40, 32, [0, 39]),
    (2, 1, 257, 48, [255, 256, 31, 32, 33]),
    (2, 2, 600, 128, [63, 64, 128]),
    (1, 1, 20, 16, []),
]


def cache(
    K: int, G: int, S: int, E: int, lengths: list[int], dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Arguments of attend_one."""
    B = len(lengths)
    keys, values = randn(B, K, S, E, dtype=dtype, seed=1), randn(B, K, S, E, dtype=dtype, seed=2)
    return [randn(B, 1, K * G, E, dtype=dtype), keys, values, torch.tensor(lengths, dtype=torch.long)]


def by_rows(function, query: Tensor, keys: Tensor, values: Tensor, length_B: Tensor) -> Tensor:
    """A row at a time, with its own keys alone."""
    rows = [query.new_empty(0, 1, query.shape[2] * query.shape[3])]
    for b, length in enumerate(length_B.tolist()):
        rows.append(function(query[b:b + 1], keys[b:b + 1, :, :length + 1], values[b:b + 1, :, :length + 1]))
    return torch.cat(rows)


@DTYPES
@pytest.mark.parametrize("sizes", CACHES, ids=str)
def test_attention_of_one_query_errs_no_more_than_the_formula_wherever_a_row_ends(sizes, dtype):
    """Behind each row's length is nan: the kernel must not read it."""
    query, keys, values, length_B = cache(*sizes, dtype)
    exact = by_rows(exact_attention, query, keys, values, length_B)
    plain = by_rows(layers.attend, query, keys, values, length_B)
    on_cpu = layers.attend_one(query, keys, values, length_B)
    for b, length in enumerate(length_B.tolist()):
        keys[b, :, length + 1:] = torch.nan
        values[b, :, length + 1:] = torch.nan
    kernel = layers_triton.attend_one(query, keys, values, length_B)
    assert kernel.shape == on_cpu.shape == exact.shape
    if len(length_B):
        # one rounding of the result, and one of the exponential, which a GPU has to 2 units in the last place
        rounding = 2 * torch.finfo(dtype).eps * exact.abs().max().item()
        as_accurate("kernel", kernel, plain, exact, rounding)
        as_accurate("CPU", on_cpu, plain, exact, rounding)


def test_a_cpu_does_not_read_behind_the_longest_row():
    args = cache(2, 2, 30, 16, [12, 20, 3])
    expected = layers.attend_one(*args)
    args[1][:, :, 21:] = torch.nan
    args[2][:, :, 21:] = torch.nan
    assert torch.equal(layers.attend_one(*args), expected)


def test_the_kernel_gives_a_row_the_same_bits_in_any_batch_and_in_every_run():
    args = cache(2, 3, 300, 32, [299, 5, 130])
    together = layers_triton.attend_one(*args)
    assert torch.equal(layers_triton.attend_one(*args), together)
    for b in range(3):
        alone = layers_triton.attend_one(*(t[b:b + 1] for t in args))
        assert torch.equal(alone[0], together[b])


def test_the_kernel_is_right_where_logits_are_1e4():
    query, keys, values, length_B = cache(1, 2, 600, 16, [550, 300])
    keys *= 2500
    exact = by_rows(exact_attention, query, keys, values, length_B)
    ours = layers_triton.attend_one(query, keys, values, length_B)
    measured("logits of 1e4", (ours - exact).abs().max(), 1e-3)


def test_the_kernel_takes_a_query_that_is_not_contiguous():
    _, *rest = cache(2, 2, 50, 16, [49, 20, 7])
    query = randn(3, 1, 8, 32)[:, :, 2:6, ::2]
    strided = layers_triton.attend_one(query, *rest)
    assert torch.equal(strided, layers_triton.attend_one(query.contiguous(), *rest))


# ---------------------------------------------------------------- compiled for Hopper, without a GPU

@pytest.fixture(scope="module")
def compiled():
    """What cross_compile.py says of every kernel, in a process that does not run the interpreter."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, Path(__file__).parent / "cross_compile.py"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


MATMULS = ("forward_kernel", "gradient_kernel", "attend_kernel")
ROWS = ("norm_kernel", "norm_backward_kernel", "swiglu_kernel", "swiglu_backward_kernel")


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("kernel", [*MATMULS, *ROWS])
def test_every_kernel_compiles_for_hopper_without_spills_in_its_loop_and_fits(kernel, dtype, compiled):
    result = compiled[f"{kernel} {dtype}"]
    print(f"\n    {result}", end="")
    # Once a tile, outside the loop over features: on an H200 faster than what was tried and does not spill.
    assert result["spilled_bytes"] <= (512 if (kernel, dtype) == ("forward_kernel", "bf16") else 0)
    assert result["shared"] <= 232_448   # bytes that one program may use on an H100
    # bf16 is multiplied by tensor cores; fp32 is not, because they would round it to TF32.
    assert result["tensor_cores"] == (kernel in MATMULS and dtype == "bf16")


def test_every_kernel_was_compiled(compiled):
    names = [name for name in (*vars(logprob_triton), *vars(layers_triton)) if name.endswith("_kernel")]
    assert {f"{name} {dtype}" for name in names for dtype in ("bf16", "fp32")} == compiled.keys()


# ---------------------------------------------------------------- which attention of PyTorch's a GPU takes

def test_cudnns_attention_is_off_in_every_command():
    """It builds a plan for every new shape, and ragged batches have many."""
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()


@pytest.mark.parametrize("T, S", [(40, 40), (300, 300), (40, 90), (17, 18)])
@pytest.mark.parametrize("H, K", [(4, 4), (4, 2), (6, 1)])
def test_no_call_hands_pytorch_a_mask_that_flash_attention_would_refuse(T, S, H, K, monkeypatch):
    """Flash attention takes a causal mask by name, equal dtypes, and heads whose channels are neighbours."""
    calls = []
    real = torch.nn.functional.scaled_dot_product_attention

    def spy(query, key, value, mask=None, **settings):
        calls.append((query, key, value, mask, settings))
        return real(query, key, value, mask, **settings)
    functional = vars(torch.nn.functional) | {"scaled_dot_product_attention": spy}
    monkeypatch.setattr(layers, "F", SimpleNamespace(**functional))
    monkeypatch.setattr(layers, "FEW_POSITIONS", 0)   # as on a GPU: the routine at any length
    query_BTHE = randn(2, T, H, 16)
    key_BKSE, value_BKSE = randn(2, K, S, 16, seed=1), randn(2, K, S, 16, seed=2)
    out_BTD = layers.attend(query_BTHE, key_BKSE, value_BKSE)
    query, key, value, mask, settings = calls[0]
    assert isinstance(mask, CausalBias) if T < S else mask is None and settings["is_causal"]
    assert settings["enable_gqa"] == (H != K)
    assert all(tensor.stride(-1) == 1 and tensor.dtype == query.dtype for tensor in (query, key, value))
    mask_TS = torch.full((T, S), float("-inf")).triu(S - T + 1)
    exact = layers.attention_reference(query_BTHE.double(), key_BKSE.double(), value_BKSE.double(),
                                       mask_TS[:, None].double())
    measured("to the definition in fp64", (out_BTD.double() - exact).abs().max(), 1e-5)
