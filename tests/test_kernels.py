"""Products, and the log-probability of given tokens, against fp64 and the whole matrix of logits."""
import json
import os
import subprocess
import sys
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import kernels.logprob
from conftest import measured
from kernels import attention, layers_triton, logprob_triton, norm, swiglu
from kernels import linear as product
from kernels.logprob import PIECE, TokenLogprob, engine, head_bytes, log_policy, reference, token_logprob
from model import visible


def dense(hidden, weight, ids, temperature):
    """The definition in fp64, with the matrix that the real one never makes."""
    logp = torch.log_softmax(hidden.double() @ weight.double().T / temperature, -1)
    return logp.gather(-1, ids[:, None]).squeeze(-1), -(logp.exp() * logp).sum(-1)


def inputs(N, D=32, V=1153, dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(N)
    hidden, weight = torch.randn(N, D, generator=generator) * scale, torch.randn(V, D, generator=generator)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), torch.randint(V, (N,), generator=generator)


def some(*size, dtype=torch.float32, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("N", [1, 7, 8, 20])
def test_log_probability_and_entropy_equal_fp64_for_every_number_of_chunks(N, monkeypatch):
    monkeypatch.setitem(PIECE, "cpu", 8 * 1153)
    monkeypatch.setattr(kernels.logprob, "LEAST", 1)
    hidden, weight, ids = inputs(N)
    for name, ours, exact in zip(("log-probability", "entropy"), token_logprob(hidden, weight, ids, 0.7), dense(hidden, weight, ids, 0.7)):
        measured(f"{name}, N={N}", (ours - exact).abs().max(), 2e-5)


def test_gradients_equal_those_of_the_dense_formula(monkeypatch):
    monkeypatch.setitem(PIECE, "cpu", 8 * 1153)
    monkeypatch.setattr(kernels.logprob, "LEAST", 1)
    hidden, weight, ids = inputs(20)
    upstream = torch.linspace(-1, 1, 20)
    ours = torch.autograd.grad((token_logprob(hidden, weight, ids, 0.7)[0] * upstream).sum(), (hidden, weight))
    exact = torch.autograd.grad((dense(hidden, weight, ids, 0.7)[0] * upstream).sum(), (hidden, weight))
    for name, a, b in zip(("hidden", "weight"), ours, exact):
        measured(f"gradient of {name}", (a - b).abs().max() / b.abs().max(), 1e-5)


def test_bf16_inputs_are_never_rounded_on_the_way():
    hidden, weight, ids = inputs(64, dtype=torch.bfloat16)
    exact = dense(hidden, weight, ids, 1.0)[0]
    rounded = torch.log_softmax((hidden @ weight.T).float(), -1).gather(-1, ids[:, None]).squeeze(-1)
    ours = (token_logprob(hidden, weight, ids)[0] - exact).abs().max()
    measured("bf16 log-probability over one with rounded logits", ours / (rounded - exact).abs().max(), 1e-2)


def test_no_tokens_give_no_log_probabilities():
    hidden, weight, ids = inputs(0)
    logprob_N, entropy_N = token_logprob(hidden, weight, ids)
    assert logprob_N.shape == entropy_N.shape == (0,)
    logprob_N.sum().backward()


def test_extreme_logits_stay_finite():
    logits = torch.tensor([[1e4, -1e4, 0.0]])
    assert torch.isfinite(log_policy(logits, 1.0)).all()


def test_the_matrix_of_logits_never_exists_as_a_whole(monkeypatch):
    monkeypatch.setitem(PIECE, "cpu", 300 * 50)
    monkeypatch.setattr(kernels.logprob, "LEAST", 1)
    hidden, weight, ids = inputs(50)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        token_logprob(hidden, weight, ids)[0].sum().backward()
    largest = max(event.self_cpu_memory_usage for event in seen.events())
    measured("largest block of memory, as a share of all logits", largest / (50 * 1153 * 4), 0.7)   # the gradient of the weights itself: 32 / 50


@pytest.mark.parametrize("N, D, V", [(2048, 256, 4096), (4096, 512, 2048)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_head_takes_the_memory_that_its_formula_says(N, D, V, dtype):
    hidden, weight, ids = inputs(N, D, V, dtype)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        token_logprob(hidden, weight, ids)[0].sum().backward()
    taken = sorted((e.start_ns(), e.nbytes()) for e in seen.profiler.kineto_results.events() if e.name() == "[memory]")
    extra = max(accumulate(nbytes for _, nbytes in taken)) - (N + V) * D * weight.element_size()
    formula = head_bytes(N, D, V, weight.element_size(), "cpu")
    measured(f"peak of {extra / 2 ** 20:.1f} MiB over the formula's", extra / formula, 1.05)
    assert extra > 0.6 * formula, "the formula promises what is needed, not much more"


def test_the_heads_of_8b_models_take_at_most_600_mib_for_16k_tokens_on_a_gpu():
    for D, V in ((4096, 128256), (3584, 152064)):
        measured(f"GiB at width {D}, {V} words", head_bytes(16384, D, V, 2, "cuda") / 2 ** 30, 0.6)


# ---------------------------------------------------------------- the product

@pytest.mark.parametrize("by_onednn", [False, True] if product.HAS_ONEDNN else [False], ids=["MKL", "oneDNN"] if product.HAS_ONEDNN else ["MKL"])
@pytest.mark.parametrize("shape, M", [((4, 5, 16), 24), ((3, 200, 96), 80), ((700, 33), 129)], ids=["small", "three dimensions", "odd sizes"])
def test_a_product_and_its_gradients_err_little_more_than_eagers(shape, M, by_onednn, monkeypatch):
    monkeypatch.setattr(product, "BY_ONEDNN", by_onednn)
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, upstream = (torch.randn(size, generator=generator) for size in (shape, (M, shape[-1]), (M,), (*shape[:-1], M)))
    results = []
    for f, dtype in ((product.linear, torch.float32), (product.reference, torch.float32), (product.reference, torch.float64)):
        given = [t.to(dtype).requires_grad_() for t in (x, weight, bias)]
        y = f(*given)
        results.append((y, *torch.autograd.grad(y, given, upstream.to(dtype))))
    for name, ours, eager, exact in zip(("product", "gradient of x", "of the weights", "of the bias"), *results):
        as_accurate(name, ours, eager, exact, slack=4.0)   # MKL adds in an order that errs less; both are fp32 throughout
    assert torch.equal(product.linear(x, weight, bias), results[0][0]), "without gradients it is the same product"


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
def test_a_product_has_the_gradients_that_are_asked_for_and_no_others(wanted, monkeypatch):
    """0: of x, 1: of the weights, 2: of the bias, which may learn while the weights are frozen."""
    monkeypatch.setattr(product, "BY_ONEDNN", product.HAS_ONEDNN)
    given = [some(700, 64), some(96, 64, seed=1), some(96, seed=2)]
    ours, exact = ([t.to(dtype, copy=True).requires_grad_(i in wanted) for i, t in enumerate(given)] for dtype in (torch.float32, torch.float64))
    product.linear(*ours).square().sum().backward()
    product.reference(*exact).square().sum().backward()
    for i, (a, b) in enumerate(zip(ours, exact)):
        assert (a.grad is not None) == (i in wanted)
        if i in wanted:
            measured(f"gradient {i}", (a.grad - b.grad).abs().max() / b.grad.abs().max(), 1e-5)


@pytest.mark.skipif(not product.HAS_ONEDNN, reason="this build of PyTorch has no oneDNN")
def test_where_onednn_is_faster_large_fp32_products_go_to_it_and_small_and_bf16_ones_do_not(monkeypatch):
    def operators(x, weight):
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            product.linear(x, weight)
        return {event.name for event in seen.events()}
    monkeypatch.setattr(product, "BY_ONEDNN", True)
    monkeypatch.setattr(product, "HAS_BF16", True)
    large, small = torch.ones(256, 128), torch.ones(2, 128)
    assert "mkldnn::_linear_pointwise" in operators(large, torch.ones(128, 128))
    assert not any("_linear_pointwise" in name for x, w in ((small, torch.ones(128, 128)), (large.bfloat16(), torch.ones(128, 128).bfloat16())) for name in operators(x, w))
    monkeypatch.setattr(product, "BY_ONEDNN", False)
    assert not any("mkldnn" in name for name in operators(large, torch.ones(128, 128)))


def test_where_a_cpu_cannot_multiply_in_bf16_factors_are_widened_and_only_the_result_is_rounded(monkeypatch):
    monkeypatch.setattr(product, "HAS_BF16", False)
    given = [some(50, 64, dtype=torch.bfloat16), some(96, 64, dtype=torch.bfloat16, seed=1), some(96, dtype=torch.bfloat16, seed=2)]
    found = []
    for f, dtype in ((product.linear, torch.bfloat16), (product.reference, torch.float64)):
        leaves = [t.to(dtype).requires_grad_() for t in given]
        y = f(*leaves)
        found.append((y, *torch.autograd.grad(y, leaves, some(50, 96, seed=3).bfloat16().to(dtype))))
    for name, ours, exact in zip(("product", "gradient of x", "of the weights", "of the bias"), *found):
        assert ours.dtype == torch.bfloat16
        measured(f"{name}, in roundings of the largest", (ours.double() - exact).abs().max() / exact.abs().max() * 2 ** 8, 1.0)


def on_gpu_path(hidden, weight, ids, temperature):
    """token_logprob by the kernels, which run in the interpreter here."""
    return TokenLogprob.apply(hidden, weight, ids, temperature, engine("cuda"))


# ---------------------------------------------------------------- the Triton kernels, in the interpreter

def as_accurate(what, kernel, eager, exact, slack=2.0, rounding=0.0):
    """Kernel and eager in low precision, exact in fp64: the kernel may err at most `slack` times what eager errs, and one rounding."""
    measured(what, (kernel.double() - exact).abs().max(), slack * (eager.double() - exact).abs().max().item() + rounding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("N, D, V", [(1, 16, 1), (5, 32, 1153), (33, 48, 257), (70, 64, 512), (3, 40, 50257)])
def test_the_kernel_errs_no_more_than_eager_does(N, D, V, dtype):
    hidden, weight, ids = inputs(N, D, V, dtype)
    ours, eager, exact = on_gpu_path(hidden, weight, ids, 0.7), reference(hidden, weight, ids, 0.7), dense(hidden, weight, ids, 0.7)
    for name, a, b, c in zip(("log-probability", "entropy"), ours, eager, exact):
        as_accurate(name, a, b, c, rounding=5e-7 * max(1.0, c.abs().max().item()))


@pytest.mark.parametrize("V", [128256, 151936])
def test_the_vocabularies_of_real_models_are_summed_without_phantom_words(V):
    """Neither is a multiple of 1024; a word too many in the sum would show as log(1 + 1/V) at equal logits."""
    hidden, weight, ids = torch.zeros(2, 16), torch.zeros(V, 16), torch.tensor([0, V - 1])
    measured("log-probability at equal logits + log V", (on_gpu_path(hidden, weight, ids, 1.0)[0].double() + torch.tensor(float(V)).double().log()).abs().max(), 2e-6)


@pytest.mark.parametrize("dtype, slack", [(torch.float32, 2.0), (torch.bfloat16, 2.0)], ids=["fp32", "bf16"])
def test_gradients_of_the_kernel_err_no_more_than_eagers(dtype, slack, monkeypatch):
    monkeypatch.setitem(PIECE, "cpu", 37 * 500)   # several slices of the vocabulary, the last one ragged
    hidden, weight, ids = inputs(37, 32, 1153, dtype)
    upstream = torch.linspace(-1, 1, 37)
    grads = [torch.autograd.grad((f(hidden, weight, ids, 0.7)[0] * upstream).sum(), (hidden, weight)) for f in (on_gpu_path, reference, dense)]
    for name, ours, eager, exact in zip(("hidden", "weight"), *grads):
        largest = exact.abs().max().item()   # the interpreter cuts bf16 off where a GPU rounds: one unit in the last place for each factor
        as_accurate(f"gradient of {name}", ours, eager, exact.double(), slack, rounding=2 ** -7 * largest if dtype == torch.bfloat16 else 2e-6 * largest)


@pytest.mark.parametrize("scale", [25.0, 1e4])
def test_extreme_logits_leave_the_kernel_finite_and_right(scale):
    hidden, weight = torch.eye(4, 16) * scale, torch.eye(40, 16)
    weight[20:] = -weight[:20]
    ids = torch.tensor([0, 1, 22, 39])
    ours, exact = on_gpu_path(hidden, weight, ids, 1.0), dense(hidden, weight, ids, 1.0)
    for name, a, b in zip(("log-probability", "entropy"), ours, exact):
        assert torch.isfinite(a).all()
        measured(f"{name}, relative", ((a - b).abs() / b.abs().clamp(min=1.0)).max(), 1e-6)
    assert (ours[0] <= 0).all()


def test_no_tokens_and_inputs_that_are_not_contiguous_pass_through_the_kernel():
    hidden, weight, ids = inputs(0)
    on_gpu_path(hidden, weight, ids, 1.0)[0].sum().backward()
    wide = torch.randn(64, 12).T
    ids = torch.arange(12)
    strided = torch.randn(64, 150)
    ours, exact = on_gpu_path(wide, strided.T, ids, 1.0)[0], dense(wide, strided.T, ids, 1.0)[0]
    measured("strided inputs", (ours - exact).abs().max(), 2e-5)


def test_two_runs_of_the_kernel_give_the_same_bits():
    hidden, weight, ids = inputs(40, 32, 1153)
    once, twice = (torch.autograd.grad(on_gpu_path(hidden, weight, ids, 0.7)[0].sum(), (hidden, weight)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, twice))


# ---------------------------------------------------------------- norm, SwiGLU, attention

LAYERS = {"norm": (lambda x, w: norm.rms_norm(x, w, 1e-5), lambda x, w: norm.reference(x, w, 1e-5), (3, 7, 48), (48,)),
          "swiglu": (swiglu.swiglu, swiglu.reference, (3, 7, 96))}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_and_its_gradients_err_no_more_than_what_autograd_makes_of_the_formula(layer, dtype):
    ours, formula, *sizes = LAYERS[layer]
    given, upstream, found = [some(*size, dtype=dtype, seed=i) for i, size in enumerate(sizes)], None, []
    for f, of in ((ours, dtype), (formula, dtype), (formula, torch.float64)):
        leaves = [t.to(of).requires_grad_() for t in given]
        y = f(*leaves)
        upstream = some(*y.shape, dtype=dtype, seed=9) if upstream is None else upstream
        found.append((y, *torch.autograd.grad(y, leaves, upstream.to(of))))
    for i, (a, eager, exact) in enumerate(zip(*found)):
        unit = torch.finfo(dtype).eps * exact.abs().max().item()
        as_accurate(f"{layer}, {'result' if i == 0 else f'gradient {i}'}", a, eager, exact, rounding=unit)
    assert torch.equal(ours(*given), found[0][0]), "without gradients it is the same"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("rows, width", [((5,), 1), ((3, 7), 48), ((2, 1, 3), 1100), ((0,), 16)])
def test_the_kernels_of_norm_and_swiglu_err_no_more_than_eager_does(rows, width, dtype):
    x, weight, gate_up = some(*rows, width, dtype=dtype), some(width, dtype=dtype, seed=1), some(*rows, 2 * width, dtype=dtype, seed=2)
    exact, eager = norm.reference(x.double(), weight.double(), 1e-5), norm.reference(x, weight, 1e-5)
    y, r = layers_triton.rms_norm(x, weight, 1e-5)
    opened = swiglu.reference(gate_up.double())
    assert y.shape == x.shape and r.shape == (*rows, 1) and layers_triton.swiglu(gate_up).shape == x.shape
    if x.numel():
        unit = 2 * torch.finfo(dtype).eps   # the interpreter cuts bf16 off where a GPU rounds
        as_accurate("norm", y, eager, exact, rounding=unit * exact.abs().max().item())
        as_accurate("inverse of the root mean square", r, norm.inverse_rms(x, 1e-5), norm.inverse_rms(x.double(), 1e-5), rounding=1e-6 * r.max().item())
        as_accurate("swiglu", layers_triton.swiglu(gate_up), swiglu.reference(gate_up), opened, rounding=unit * opened.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("B, K, G, S, E, slot", [(3, 2, 3, 700, 64, 600), (2, 1, 7, 40, 32, 0), (2, 2, 1, 257, 48, 256), (2, 2, 2, 600, 128, 255), (0, 1, 1, 20, 16, 3)])
def test_attention_of_one_query_errs_no_more_than_eager_does_wherever_the_last_key_lies(B, K, G, S, E, slot, dtype):
    """What lies behind the last key is not a number here: it must not be read."""
    query, keys, values = some(B, 1, K * G, E, dtype=dtype), some(B, K, S, E, dtype=dtype, seed=1), some(B, K, S, E, dtype=dtype, seed=2)
    keys[:, :, slot + 1:], values[:, :, slot + 1:] = torch.nan, torch.nan
    mask_BS = torch.zeros(B, S)
    mask_BS[1:, :slot // 2] = float("-inf")
    given = query, keys[:, :, :slot + 1], values[:, :, :slot + 1], mask_BS[:, None, None, :slot + 1]
    exact, eager = attention.reference(*(t.double() for t in given)), attention.reference(*given[:3], given[3].to(dtype))
    kernel = layers_triton.attend_one(query, keys, values, mask_BS, torch.tensor([slot]))
    on_cpu = attention.attend_one(query, keys.float(), values.float(), mask_BS, torch.tensor([slot]))
    if B:
        for name, ours in (("kernel", kernel), ("CPU", on_cpu)):
            as_accurate(name, ours, eager, exact, rounding=torch.finfo(dtype).eps * exact.abs().max().item())
    assert kernel.shape == on_cpu.shape == (B, 1, K * G * E)


def test_attention_to_nothing_but_padding_is_finite_and_logits_of_1e4_are_right():
    keys, values, mask_BS = some(2, 1, 600, 16, seed=1) * 2500, some(2, 1, 600, 16, seed=2), torch.full((2, 600), float("-inf"))
    mask_BS[1, 300:] = 0
    query, slot = some(2, 1, 2, 16), torch.tensor([550])
    ours = layers_triton.attend_one(query, keys, values, mask_BS, slot)
    exact = attention.reference(query[1:].double(), keys[1:, :, 300:551].double(), values[1:, :, 300:551].double(), torch.zeros(1, dtype=torch.double))
    assert torch.isfinite(ours).all()
    measured("logits of 1e4", (ours[1] - exact[0]).abs().max(), 1e-3)
    assert torch.equal(ours, layers_triton.attend_one(query, keys, values, mask_BS, slot)), "two runs give the same bits"


def test_a_cpu_does_not_look_at_slots_in_front_that_nobody_needs():
    query, keys, values, mask_BS, slot = some(2, 1, 4, 16), some(2, 2, 30, 16, seed=1), some(2, 2, 30, 16, seed=2), torch.zeros(2, 30), torch.tensor([20])
    exact = attention.attend_one(query, keys[:, :, 7:], values[:, :, 7:], mask_BS[:, 7:], slot - 7)
    keys[:, :, :7], values[:, :, :7] = torch.nan, torch.nan
    assert torch.equal(attention.attend_one(query, keys, values, mask_BS, slot, 7), exact)


def test_a_query_that_is_not_contiguous_passes_through_the_kernel():
    wide, keys, values = some(3, 1, 8, 32), some(3, 2, 50, 16, seed=1), some(3, 2, 50, 16, seed=2)
    query, mask_BS, slot = wide[:, :, 2:6, ::2], torch.zeros(3, 50), torch.tensor([49])
    assert torch.equal(layers_triton.attend_one(query, keys, values, mask_BS, slot), layers_triton.attend_one(query.contiguous(), keys, values, mask_BS, slot))


@pytest.mark.parametrize("T", [1, 9, 200])
@pytest.mark.parametrize("masked", [False, True], ids=["causal", "padded"])
def test_attention_written_out_equals_fp64_and_pytorchs_routine(T, masked):
    query, key, value = some(2, T, 6, 16), some(2, 3, T, 16, seed=1), some(2, 3, T, 16, seed=2)
    mask = visible(torch.tensor([0, T // 3]), 0, T, torch.float32) if masked else None
    exact = attention.reference(query.double(), key.double(), value.double(), (attention.causal(T, query) if mask is None else mask).double())
    for name, ours in (("public", attention.attend(query, key, value, mask)), ("fused", attention.fused(query, key, value, mask))):
        measured(f"{name}, {T} positions", (ours - exact).abs().max(), 5e-6)


# ---------------------------------------------------------------- cross-compiled for Hopper, without a GPU

@pytest.fixture(scope="module")
def compiled():
    """What the compiler makes of every kernel for sm_90. Apart from the tests, which run under the interpreter."""
    done = subprocess.run([sys.executable, Path(__file__).parent / "cross_compile.py"], capture_output=True, text=True,
                          env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("kernel", ["forward_kernel", "gradient_kernel", "norm_kernel", "swiglu_kernel", "split_kernel", "merge_kernel"])
def test_every_kernel_compiles_for_hopper_without_spills_and_within_its_shared_memory(kernel, dtype, compiled):
    made = compiled[f"{kernel} {dtype}"]
    print(f"\n    {made}", end="")
    assert made["spilled_bytes"] == 0 and made["shared"] <= 232_448
    products = kernel in ("forward_kernel", "gradient_kernel", "split_kernel")
    assert made["tensor_cores"] == (products and dtype == "bf16"), "bf16 products run on tensor cores, fp32 ones keep their precision"


def test_every_kernel_there_is_was_compiled(compiled):
    jitted = {f"{name} {dtype}" for file in (logprob_triton, layers_triton) for name in vars(file) if name.endswith("_kernel") for dtype in ("bf16", "fp32")}
    assert jitted == compiled.keys()
