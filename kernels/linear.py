"""
The product that a transformer mostly consists of, and its gradients.

    y_NM       = x_ND @ weight_MD.T + bias_M
    grad_x_ND  = upstream_NM @ weight_MD,   grad_weight_MD = upstream_NM.T @ x_ND,   grad_bias_M = sum_n upstream_NM

On a CPU, PyTorch gives fp32 products to MKL and bf16 ones to oneDNN; both libraries come with it. Which one is fast, the processor decides:

    AVX-512, by AMD          MKL does not use all of it: on one core of an EPYC we measured 65 to 100 GFLOP/s of MKL, 130 to 220 of oneDNN.
                             Large fp32 products go to oneDNN, by the operator that torch.compile uses for them. Both add in fp32; by the
                             order in which it adds, oneDNN errs up to three times as much (7e-5 where sums of 576 products are about 100)
    AVX-512, by Intel        on one core of a Xeon MKL 80 to 160, oneDNN 45 to 150, least where products are small: MKL
    AVX2 alone               MKL 75 to 84 of at most 100, oneDNN 50 to 75, and some milliseconds for each new shape: MKL
    no bf16 arithmetic       oneDNN's bf16 products run at 1 to 10 GFLOP/s with AVX2, at 25 to 30 with AVX-512: factors are widened to fp32
                             (75 to 140), which loses nothing, and the result is rounded to bf16, as it would have been

What else makes a CPU slow, the C library's way with memory, is mended here, too.
"""
import ctypes
import platform
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

CPUINFO = Path("/proc/cpuinfo")
BY_AMD = "AuthenticAMD" in (CPUINFO.read_text() if CPUINFO.is_file() else platform.processor())
HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
BY_ONEDNN = HAS_ONEDNN and BY_AMD and torch.cpu._is_avx512_supported()   # large fp32 products
HAS_BF16 = torch.cpu._is_avx512_bf16_supported()
SMALLEST = 2 ** 20    # multiplications from which on the better product makes up for the longer way to it


def keep_memory() -> None:
    """
    Let the C library keep what it once got of the system. By itself glibc gives blocks of some megabytes, such as activations, back as soon
    as they are free, and they come back page by page, each cleared first: a fifth of the time of a whole run on a CPU.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, 2 ** 30)        # M_MMAP_THRESHOLD, bytes: smaller blocks come from the heap
        libc.mallopt(-1, 2 ** 31 - 1)    # M_TRIM_THRESHOLD, bytes: so much may lie unused at the heap's end


# ---------------------------------------------------------------- the formula, in PyTorch

def reference(x: Tensor, weight_MD: Tensor, bias_M: Tensor | None = None) -> Tensor:
    """The definition; `x` is [..., D]."""
    return F.linear(x, weight_MD, bias_M)


# ---------------------------------------------------------------- the same as the processor likes it, without a gradient

def is_narrow(t: Tensor) -> bool:
    """Whether the device cannot multiply in this tensor's precision."""
    return not HAS_BF16 and t.dtype.itemsize < 4 and t.device.type == "cpu"


def widened(t: Tensor | None) -> Tensor | None:
    """The same numbers in a precision that the device can multiply in."""
    return t.float() if t is not None and is_narrow(t) else t


def is_for_onednn(x: Tensor, weight_MD: Tensor) -> bool:
    """Whether this product is one of the large fp32 ones that oneDNN is faster at."""
    return BY_ONEDNN and x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() * len(weight_MD) >= SMALLEST


def product(x: Tensor, weight_MD: Tensor, bias_M: Tensor | None = None) -> Tensor:
    """The definition again, in the precision of x."""
    wide = widened(x), widened(weight_MD), widened(bias_M)
    if is_for_onednn(*wide[:2]):
        return torch.ops.mkldnn._linear_pointwise(*wide, "none", [], "").to(x.dtype)
    return reference(*wide).to(x.dtype)


def gradient(upstream: Tensor, x: Tensor, weight_MD: Tensor) -> Tensor:
    """upstream.T @ x over all rows, [M, D], like the weight."""
    upstream_NM, x_ND = upstream.flatten(0, -2), x.flatten(0, -2)
    if is_for_onednn(x_ND, weight_MD):   # its product would first transpose both factors
        return torch.ops.aten.mkldnn_linear_backward_weights(upstream_NM.to_mkldnn(), x_ND.to_mkldnn(), weight_MD, False)[0]
    return product(upstream_NM.T, x_ND.T)


class Linear(torch.autograd.Function):
    """`linear` with its three gradients, each again one product; factors are kept as they came, not widened."""

    @staticmethod
    def forward(ctx, x: Tensor, weight_MD: Tensor, bias_M: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight_MD)
        return product(x, weight_MD, bias_M)

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight_MD = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        return (product(upstream, weight_MD.T) if for_x else None, gradient(upstream, x, weight_MD) if for_weight else None,
                upstream.flatten(0, -2).sum(0) if for_bias else None)


# ---------------------------------------------------------------- what everybody calls

def linear(x: Tensor, weight_MD: Tensor, bias_M: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias over the last dimension, [..., D] to [..., M], in the precision of x."""
    if not (is_narrow(x) or is_for_onednn(x, weight_MD)):
        return reference(x, weight_MD, bias_M)
    needs_gradient = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight_MD, bias_M))
    return Linear.apply(x, weight_MD, bias_M) if needs_gradient else product(x, weight_MD, bias_M)


def matmul_fp32(x_ND: Tensor, weight_MD: Tensor) -> Tensor:
    """x @ weight.T in fp32, whatever the precision of the factors: a product of two bf16 numbers is exact in fp32."""
    if x_ND.is_cuda and x_ND.dtype == weight_MD.dtype != torch.float32:
        return torch.mm(x_ND, weight_MD.T, out_dtype=torch.float32)
    return linear(x_ND.float(), weight_MD.float())
