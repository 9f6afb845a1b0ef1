"""
statistics and slice_gradient of logprob.py on a GPU, in Triton. No piece of the [N, V] logits leaves the registers.

    statistics       log-sum-exp, log-probability and entropy by an online softmax (arXiv 1805.02867). The
                     vocabulary is split among programs; PyTorch adds up the splits
    slice_gradient   grad_output * (onehot - p) / temperature for a slice of the vocabulary

Every program owns what it writes, without atomics: two runs give the same bits. Logits are fp32 from the tensor
cores' accumulators to the result.

    python -m pytest tests/test_kernels.py     # in Triton's interpreter on a CPU, and compiled for sm_90
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.layers_triton import INTERPRET

LOWEST = tl.constexpr(-1e30)   # stands for -inf, but 0 * LOWEST is 0 and not nan
PROGRAMS = 1024                # so many keep every multiprocessor of a GPU busy


def tiles(dtype: torch.dtype) -> dict[str, int]:
    """Tile sizes and warps: the largest that compile for Hopper without spills. Not timed on a GPU yet."""
    if INTERPRET:
        return {"BLOCK_N": 32, "BLOCK_V": 256, "BLOCK_D": 64}
    if dtype == torch.float32:
        return {"BLOCK_N": 64, "BLOCK_V": 64, "BLOCK_D": 32, "num_warps": 4, "num_stages": 2}
    return {"BLOCK_N": 64, "BLOCK_V": 256, "BLOCK_D": 64, "num_warps": 8, "num_stages": 3}


@triton.jit
def logits_tile(hidden_ptr, weight_ptr, n_N, v_V, N, V, D, scale,
                BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr):
    """One tile of z in fp32: rows n_N, words v_V. Words beyond the vocabulary get LOWEST."""
    z_NV = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    row_N = n_N.to(tl.int64) * D
    row_V = v_V.to(tl.int64) * D
    for start in range(0, D, BLOCK_D):
        d_D = start + tl.arange(0, BLOCK_D)
        valid_ND = (n_N < N)[:, None] & (d_D < D)[None, :]
        valid_DV = (v_V < V)[None, :] & (d_D < D)[:, None]
        hidden_ND = tl.load(hidden_ptr + row_N[:, None] + d_D[None, :], mask=valid_ND, other=0.0)
        weight_DV = tl.load(weight_ptr + row_V[None, :] + d_D[:, None], mask=valid_DV, other=0.0)
        if INTERPRET:
            hidden_ND = hidden_ND.to(tl.float32)
            weight_DV = weight_DV.to(tl.float32)
        z_NV = tl.dot(hidden_ND, weight_DV, z_NV, input_precision="ieee")
    return tl.where((v_V < V)[None, :], z_NV * scale, LOWEST)


# ---------------------------------------------------------------- forward


@triton.jit
def forward_kernel(hidden_ptr, weight_ptr, ids_ptr, out_ptr, N, V, D, scale, words,
                   BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr):
    """
    Program (i, s): rows of block i, over split s of the vocabulary, `words` of them. It writes, into out_3SN, the
    log-sum-exp and the entropy over these words alone, and the target's logit, 0 if it is not among them.
    """
    split = tl.program_id(1)
    n_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    ids_N = tl.load(ids_ptr + n_N, mask=n_N < N, other=-1)
    # With m the largest logit so far: sum of exp(z - m), and moment, the sum of (z - m) * exp(z - m).
    max_N = tl.full((BLOCK_N,), LOWEST, tl.float32)
    sum_N = tl.zeros((BLOCK_N,), tl.float32)
    moment_N = tl.zeros((BLOCK_N,), tl.float32)
    target_N = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(split * words, tl.minimum((split + 1) * words, V), BLOCK_V):
        v_V = start + tl.arange(0, BLOCK_V)
        z_NV = logits_tile(hidden_ptr, weight_ptr, n_N, v_V, N, V, D, scale, BLOCK_N, BLOCK_V, BLOCK_D)
        target_N += tl.sum(tl.where(v_V[None, :] == ids_N[:, None], z_NV, 0.0), 1)
        new_max_N = tl.maximum(max_N, tl.max(z_NV, 1))
        shift_N = max_N - new_max_N
        below_NV = z_NV - new_max_N[:, None]
        p_NV = tl.exp(below_NV)
        # Under the new maximum every old (z - m) is larger in size by the shift.
        moment_N = (moment_N + shift_N * sum_N) * tl.exp(shift_N) + tl.sum(below_NV * p_NV, 1)
        sum_N = sum_N * tl.exp(shift_N) + tl.sum(p_NV, 1)
        max_N = new_max_N
    log_sum_N = tl.log(sum_N)
    splits = tl.num_programs(1)
    offset_N = split.to(tl.int64) * N + n_N
    stride = splits.to(tl.int64) * N
    tl.store(out_ptr + offset_N, max_N + log_sum_N, mask=n_N < N)
    tl.store(out_ptr + stride + offset_N, log_sum_N - moment_N / sum_N, mask=n_N < N)
    tl.store(out_ptr + 2 * stride + offset_N, target_N, mask=n_N < N)


def statistics(
    hidden_ND: Tensor, weight_VD: Tensor, ids_N: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(lse_N, logprob_N, entropy_N), all fp32."""
    N, D = hidden_ND.shape
    V = len(weight_VD)
    tile = tiles(hidden_ND.dtype)
    blocks = triton.cdiv(N, tile["BLOCK_N"])
    # Where there are few rows, split the vocabulary, in whole tiles, so that there are enough programs.
    words = triton.cdiv(V * max(1, blocks), PROGRAMS)
    words = triton.cdiv(words, tile["BLOCK_V"]) * tile["BLOCK_V"]
    splits = triton.cdiv(V, words)
    out_3SN = torch.empty(3, splits, N, device=hidden_ND.device)
    if N:
        forward_kernel[(blocks, splits)](
            hidden_ND, weight_VD, ids_N, out_3SN, N, V, D, 1.0 / temperature, words, **tile
        )
    lse_SN, entropy_SN, target_SN = out_3SN
    lse_N = lse_SN.logsumexp(0)
    # Chain rule: the entropy of a word is that of its split plus the mean entropy within a split.
    log_share_SN = lse_SN - lse_N
    entropy_N = (log_share_SN.exp() * (entropy_SN - log_share_SN)).sum(0)
    logprob_N = (target_SN.sum(0) - lse_N).clamp(max=0.0)
    return lse_N, logprob_N, entropy_N


# ---------------------------------------------------------------- backward


@triton.jit
def gradient_kernel(hidden_ptr, weight_ptr, ids_ptr, lse_ptr, grad_ptr, out_ptr, N, C, D, scale, first,
                    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr):
    """Program (i, j): rows of block i, words of block j of the slice that begins with word `first`."""
    n_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    c_C = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    z_NC = logits_tile(hidden_ptr, weight_ptr, n_N, c_C, N, C, D, scale, BLOCK_N, BLOCK_V, BLOCK_D)
    ids_N = tl.load(ids_ptr + n_N, mask=n_N < N, other=-1)
    lse_N = tl.load(lse_ptr + n_N, mask=n_N < N, other=0.0)
    grad_N = tl.load(grad_ptr + n_N, mask=n_N < N, other=0.0)
    onehot_NC = ((first + c_C)[None, :] == ids_N[:, None]).to(tl.float32)
    p_NC = tl.exp(z_NC - lse_N[:, None])
    grad_NC = (grad_N * scale)[:, None] * (onehot_NC - p_NC)
    offset_NC = n_N.to(tl.int64)[:, None] * C + c_C[None, :]
    tl.store(out_ptr + offset_NC, grad_NC, mask=(n_N < N)[:, None] & (c_C < C)[None, :])


def slice_gradient(
    hidden_ND: Tensor, weight_CD: Tensor, ids_N: Tensor, lse_N: Tensor, grad_output_N: Tensor, temperature: float, first: int
) -> Tensor:
    """grad_z_NC of the C words from word `first` on, in the dtype of the hidden states."""
    N, D = hidden_ND.shape
    C = len(weight_CD)
    tile = tiles(hidden_ND.dtype)
    grad_NC = hidden_ND.new_empty(N, C)
    if N:
        gradient_kernel[(triton.cdiv(N, tile["BLOCK_N"]), triton.cdiv(C, tile["BLOCK_V"]))](
            hidden_ND, weight_CD, ids_N, lse_N, grad_output_N, grad_NC, N, C, D, 1.0 / temperature, first, **tile
        )
    return grad_NC
