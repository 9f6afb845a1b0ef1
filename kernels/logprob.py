"""
Log-probability and entropy of given tokens, from hidden states and the output matrix.

    z_NV       = hidden_ND @ weight_VD.T / temperature
    logprob_N  = z[n, ids[n]] - logsumexp(z[n])
    entropy_N  = logsumexp(z[n]) - sum_v softmax(z[n])_v z[n, v]

The [N, V] matrix z never exists as a whole; at 16,384 tokens and 128,256 words it would take 7.8 GiB in fp32, twice. The forward pass
reduces it piece by piece and keeps one number per token, the log-sum-exp; the backward pass makes it again, a slice of the vocabulary at a
time. On a GPU one kernel makes each piece in registers and reduces it there (the online log-sum-exp of Milakov and Gimelshein, arXiv 1805.02867). Sums
run in a fixed order, without atomics: two runs give the same bits.

Logits stay in fp32 from the product to the result. A log-sum-exp over 128k words is about 12, where bf16 moves in steps of 1/16, and a
ratio of probabilities off by 6 % is a different algorithm.
"""
import os
from collections.abc import Callable

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

PIECE = {"cpu": 2 ** 20, "cuda": 2 ** 27}   # logits, or gradients of logits, that exist at the same time, in at least
LEAST = 256                                 # rows or columns, for a product of a few is slow
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"   # Triton's interpreter runs on a CPU; it cannot multiply in bf16


# ---------------------------------------------------------------- the formula, in PyTorch

def log_policy(logits: Tensor, temperature: float) -> Tensor:
    """The policy itself: sampling draws from it, training scores with it, and nothing else defines it. [..., V] to fp32 [..., V]."""
    return F.log_softmax(logits.float() / temperature, dim=-1)


def reference(hidden_ND: Tensor, weight_VD: Tensor, ids_N: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The definition, with the whole matrix: what all other code here is tested against."""
    logp_NV = log_policy(hidden_ND.float() @ weight_VD.float().T, temperature)
    return logp_NV.gather(-1, ids_N[:, None]).squeeze(-1), -(logp_NV.exp() * logp_NV).sum(-1).detach()


# ---------------------------------------------------------------- on a CPU: the same, piece by piece

def statistics(hidden_ND: Tensor, weight_VD: Tensor, ids_N: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """lse_N, the target's logit target_N, and entropy_N, some tokens at a time."""
    parts, rows, weight_VD = [], max(LEAST, PIECE["cpu"] // len(weight_VD)), weight_VD.float()
    for begin in range(0, max(len(ids_N), 1), rows):
        z_NV = hidden_ND[begin:begin + rows].float() @ weight_VD.T / temperature
        lse_N1 = z_NV.logsumexp(-1, keepdim=True)
        target_N = z_NV.gather(-1, ids_N[begin:begin + rows, None]).squeeze(-1)
        logp_NV = z_NV.sub_(lse_N1)
        parts.append((lse_N1.squeeze(-1), target_N, -(logp_NV.exp() * logp_NV).sum(-1)))
    return tuple(torch.cat(part) for part in zip(*parts))


def slice_gradient(hidden_ND: Tensor, weight_CD: Tensor, ids_N: Tensor, lse_N: Tensor, upstream_N: Tensor, temperature: float,
                   first: int) -> Tensor:
    """
    gradient_NC[n, c] = upstream[n] * (1[first + c = ids[n]] - p[n, first + c]) / temperature for a slice of the vocabulary, in the
    precision of the hidden states.
    """
    scale_N1, C = (upstream_N / temperature)[:, None], len(weight_CD)
    gradient_NC = (hidden_ND.float() @ weight_CD.float().T / temperature).sub_(lse_N[:, None]).exp_().mul_(-scale_N1)
    inside_N = (ids_N >= first) & (ids_N < first + C)
    place_N1 = (ids_N - first).clamp(0, C - 1)[:, None]
    return gradient_NC.scatter_add_(1, place_N1, scale_N1 * inside_N[:, None]).to(hidden_ND.dtype)


# ---------------------------------------------------------------- on a GPU: kernels

@triton.jit
def _logits(hidden_ptr, weight_ptr, n_N, v_V, N, V, D, scale, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
            UPCAST: tl.constexpr):
    """One tile of z, in fp32 registers: rows n_N, columns v_V; a column beyond the vocabulary is -inf, whatever its tile reads."""
    z_NV = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    row_N, column_V = n_N.to(tl.int64) * D, v_V.to(tl.int64) * D
    for start in range(0, D, BLOCK_D):
        d_D = start + tl.arange(0, BLOCK_D)
        hidden_ND = tl.load(hidden_ptr + row_N[:, None] + d_D[None, :], mask=(n_N < N)[:, None] & (d_D < D)[None, :], other=0.0)
        weight_DV = tl.load(weight_ptr + column_V[None, :] + d_D[:, None], mask=(v_V < V)[None, :] & (d_D < D)[:, None], other=0.0)
        if UPCAST:
            hidden_ND, weight_DV = hidden_ND.to(tl.float32), weight_DV.to(tl.float32)
        z_NV = tl.dot(hidden_ND, weight_DV, z_NV, input_precision="ieee")
    return tl.where((v_V < V)[None, :], z_NV * scale, float("-inf"))


@triton.jit
def forward_kernel(hidden_ptr, weight_ptr, ids_ptr, max_ptr, sum_ptr, moment_ptr, target_ptr, N, V, D, scale, columns,
                   BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr):
    """
    Program (i, s): rows of block i over the words of split s, `columns` of them. Leaves for each row and split the largest logit m, the
    sums of exp(z - m) and of (z - m) exp(z - m), and the target's logit if it is among these words.
    """
    split = tl.program_id(1)
    n_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    ids_N = tl.load(ids_ptr + n_N, mask=n_N < N, other=-1)
    max_N, sum_N = tl.full((BLOCK_N,), float("-inf"), tl.float32), tl.zeros((BLOCK_N,), tl.float32)
    moment_N, target_N = tl.zeros((BLOCK_N,), tl.float32), tl.zeros((BLOCK_N,), tl.float32)
    for start in range(split * columns, tl.minimum((split + 1) * columns, V), BLOCK_V):
        v_V = start + tl.arange(0, BLOCK_V)
        z_NV = _logits(hidden_ptr, weight_ptr, n_N, v_V, N, V, D, scale, BLOCK_N, BLOCK_V, BLOCK_D, UPCAST)
        target_N += tl.sum(tl.where(v_V[None, :] == ids_N[:, None], z_NV, 0.0), 1)
        new_N = tl.maximum(max_N, tl.max(z_NV, 1))
        shrink_N = tl.exp(max_N - new_N)
        moved_N = tl.where(sum_N > 0, max_N - new_N, 0.0) * sum_N        # what the old moment lacks under the new maximum
        below_NV = tl.where((v_V < V)[None, :], z_NV - new_N[:, None], -1e9)
        p_NV = tl.exp(below_NV)
        moment_N = (moment_N + moved_N) * shrink_N + tl.sum(below_NV * p_NV, 1)
        sum_N = sum_N * shrink_N + tl.sum(p_NV, 1)
        max_N = new_N
    place_N = split.to(tl.int64) * N + n_N
    tl.store(max_ptr + place_N, max_N, mask=n_N < N)
    tl.store(sum_ptr + place_N, sum_N, mask=n_N < N)
    tl.store(moment_ptr + place_N, moment_N, mask=n_N < N)
    tl.store(target_ptr + place_N, target_N, mask=n_N < N)


@triton.jit
def gradient_kernel(hidden_ptr, weight_ptr, ids_ptr, lse_ptr, upstream_ptr, out_ptr, N, C, D, scale, first,
                    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr):
    """Program (i, j): rows of block i, columns of block j of the slice that begins with word `first`; see slice_gradient."""
    n_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    c_C = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    z_NC = _logits(hidden_ptr, weight_ptr, n_N, c_C, N, C, D, scale, BLOCK_N, BLOCK_V, BLOCK_D, UPCAST)
    ids_N = tl.load(ids_ptr + n_N, mask=n_N < N, other=-1)
    lse_N = tl.load(lse_ptr + n_N, mask=n_N < N, other=0.0)
    upstream_N = tl.load(upstream_ptr + n_N, mask=n_N < N, other=0.0)
    hit_NC = ((first + c_C)[None, :] == ids_N[:, None]).to(tl.float32)
    gradient_NC = (upstream_N * scale)[:, None] * (hit_NC - tl.exp(z_NC - lse_N[:, None]))
    place_NC = n_N.to(tl.int64)[:, None] * C + c_C[None, :]
    tl.store(out_ptr + place_NC, gradient_NC.to(out_ptr.dtype.element_ty), mask=(n_N < N)[:, None] & (c_C < C)[None, :])


def tiles(dtype: torch.dtype) -> dict[str, int]:
    """Tile sizes and warps: for Hopper, the largest bf16 tiles that cross-compile without spills; not yet timed on a GPU."""
    if INTERPRET:
        return dict(BLOCK_N=32, BLOCK_V=256, BLOCK_D=64)
    return dict(BLOCK_N=64, BLOCK_V=64, BLOCK_D=32, num_warps=4, num_stages=2) if dtype == torch.float32 else \
        dict(BLOCK_N=64, BLOCK_V=256, BLOCK_D=64, num_warps=8, num_stages=3)


def kernel_statistics(hidden_ND: Tensor, weight_VD: Tensor, ids_N: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """`statistics` by the forward kernel; the splits of the vocabulary are put together in fp32."""
    (N, D), V, tile = hidden_ND.shape, len(weight_VD), tiles(hidden_ND.dtype)
    # enough programs to fill the chip where there are few rows, and words in whole tiles
    splits = max(1, min(triton.cdiv(V, tile["BLOCK_V"]), triton.cdiv(1024, max(1, triton.cdiv(N, tile["BLOCK_N"])))))
    columns = triton.cdiv(triton.cdiv(V, splits), tile["BLOCK_V"]) * tile["BLOCK_V"]
    splits = triton.cdiv(V, columns)
    max_SN, sum_SN, moment_SN, target_SN = torch.empty(4, splits, N, device=hidden_ND.device)
    if N:
        forward_kernel[triton.cdiv(N, tile["BLOCK_N"]), splits](hidden_ND, weight_VD, ids_N, max_SN, sum_SN, moment_SN, target_SN, N, V, D,
                                                                1.0 / temperature, columns, UPCAST=INTERPRET, **tile)
    max_N = max_SN.amax(0)
    below_SN = max_SN - max_N
    sum_N = (sum_SN * below_SN.exp()).sum(0)
    entropy_N = sum_N.log() - ((moment_SN + below_SN * sum_SN) * below_SN.exp()).sum(0) / sum_N
    return max_N + sum_N.log(), target_SN.sum(0), entropy_N


def kernel_slice_gradient(hidden_ND: Tensor, weight_CD: Tensor, ids_N: Tensor, lse_N: Tensor, upstream_N: Tensor, temperature: float,
                          first: int) -> Tensor:
    """`slice_gradient` by the gradient kernel."""
    (N, D), C, tile = hidden_ND.shape, len(weight_CD), tiles(hidden_ND.dtype)
    gradient_NC = torch.empty(N, C, dtype=hidden_ND.dtype, device=hidden_ND.device)
    gradient_kernel[triton.cdiv(N, tile["BLOCK_N"]), triton.cdiv(C, tile["BLOCK_V"])](
        hidden_ND, weight_CD, ids_N, lse_N, upstream_N, gradient_NC, N, C, D, 1.0 / temperature, first, UPCAST=INTERPRET, **tile)
    return gradient_NC


# ---------------------------------------------------------------- forward and backward

def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in the precision of its factors, with the result in fp32 where the device can give it."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda and a.dtype != torch.float32 else (a @ b).float()


class TokenLogprob(torch.autograd.Function):
    """token_logprob by a pair of functions, (statistics, slice_gradient); one number per token is kept for the backward pass."""

    @staticmethod
    def forward(ctx, hidden_ND: Tensor, weight_VD: Tensor, ids_N: Tensor, temperature: float,
                engine: tuple[Callable, Callable]) -> tuple[Tensor, Tensor]:
        hidden_ND, weight_VD, ids_N = hidden_ND.contiguous(), weight_VD.contiguous(), ids_N.contiguous()
        lse_N, target_N, entropy_N = engine[0](hidden_ND, weight_VD, ids_N, temperature)
        ctx.save_for_backward(hidden_ND, weight_VD, ids_N, lse_N)
        ctx.temperature, ctx.engine = temperature, engine
        ctx.mark_non_differentiable(entropy_N)
        return (target_N - lse_N).clamp(max=0.0), entropy_N

    @staticmethod
    def backward(ctx, upstream_N: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        hidden_ND, weight_VD, ids_N, lse_N = ctx.saved_tensors
        grad_hidden_ND, grad_weight_VD = torch.zeros(hidden_ND.shape, device=hidden_ND.device), torch.zeros_like(weight_VD)
        columns = max(LEAST, PIECE[hidden_ND.device.type] // max(1, len(ids_N)))
        for first in range(0, len(weight_VD) if len(ids_N) else 0, columns):
            weight_CD = weight_VD[first:first + columns]
            gradient_NC = ctx.engine[1](hidden_ND, weight_CD, ids_N, lse_N, upstream_N.contiguous(), ctx.temperature, first)
            grad_hidden_ND += product(gradient_NC, weight_CD)
            grad_weight_VD[first:first + columns] = product(gradient_NC.T, hidden_ND).to(weight_VD.dtype)
        return grad_hidden_ND.to(hidden_ND.dtype), grad_weight_VD, None, None, None


# ---------------------------------------------------------------- what everybody calls

ENGINES = {"cpu": (statistics, slice_gradient), "cuda": (kernel_statistics, kernel_slice_gradient)}


def token_logprob(hidden_ND: Tensor, weight_VD: Tensor, ids_N: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """
    log p(ids[n] | hidden[n]) and the entropy of that distribution in nats, both fp32 [N]. Any float dtype goes in; N may be 0.
    The log-probability carries gradients to `hidden_ND` and `weight_VD`; the entropy is a measurement and carries none.
    """
    return TokenLogprob.apply(hidden_ND, weight_VD, ids_N, temperature, ENGINES[hidden_ND.device.type])
