"""
The two functions of kernels/logprob.py on a GPU, where no piece of the [N, V] matrix of logits leaves the registers.

    statistics       lse_N, target_N, entropy_N by an online log-sum-exp (Milakov and Gimelshein, arXiv 1805.02867)
    slice_gradient   upstream * (onehot - p) / temperature for a slice of the vocabulary

The vocabulary is split among programs, each of which owns its sums: no atomics, and two runs give the same bits. Logits are fp32 from the
tensor cores' accumulators to the result. Formulas, the backward pass and the definition that both are tested against are in logprob.py.
"""
import os

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"   # Triton's interpreter runs on a CPU; it cannot multiply in bf16


# ---------------------------------------------------------------- kernels

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


# ---------------------------------------------------------------- launching them

def statistics(hidden_ND: Tensor, weight_VD: Tensor, ids_N: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """lse_N, the target's logit target_N, and entropy_N; the splits of the vocabulary are put together in fp32."""
    (N, D), V, tile = hidden_ND.shape, len(weight_VD), tiles(hidden_ND.dtype)
    # enough programs to fill_template the chip where there are few rows, and words in whole tiles
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


def slice_gradient(hidden_ND: Tensor, weight_CD: Tensor, ids_N: Tensor, lse_N: Tensor, upstream_N: Tensor, temperature: float,
                   first: int) -> Tensor:
    """gradient_NC of a slice of the vocabulary that begins with word `first`, in the precision of the hidden states."""
    (N, D), C, tile = hidden_ND.shape, len(weight_CD), tiles(hidden_ND.dtype)
    gradient_NC = torch.empty(N, C, dtype=hidden_ND.dtype, device=hidden_ND.device)
    gradient_kernel[triton.cdiv(N, tile["BLOCK_N"]), triton.cdiv(C, tile["BLOCK_V"])](
        hidden_ND, weight_CD, ids_N, lse_N, upstream_N, gradient_NC, N, C, D, 1.0 / temperature, first, UPCAST=INTERPRET, **tile)
    return gradient_NC
