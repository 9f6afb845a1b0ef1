"""
`statistics` and `slice_gradient` of logprob.py on a GPU, in Triton. Logits never leave the registers.

    statistics       log-sum-exp, log-probability and entropy by online softmax (arXiv 1805.02867). Programs
                     split the vocabulary among them, and PyTorch adds up the splits
    slice_gradient   grad_output * (onehot - p) / temperature for a slice of the vocabulary

Every program owns what it writes, without atomics: two runs give the same bits. Logits are fp32 from the
tensor cores' accumulators to the result.

    python -m pytest tests/test_kernels.py     # in Triton's interpreter on a CPU, and compiled for sm_90
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.layers_triton import INTERPRET

PROGRAMS = 1024   # enough to keep all multiprocessors of a GPU busy
LOWEST = tl.constexpr(-1e30)   # used for -inf: 0 * LOWEST is 0, but 0 * -inf is nan

def tile_sizes(dtype: torch.dtype) -> dict[str, int]:
    """Sizes of a program's tile, and its warps: in bf16 the fastest of eight that were tried on an H200."""
    if dtype == torch.float32 and not INTERPRET:
        return {"BLOCK_N": 64, "BLOCK_V": 64, "BLOCK_D": 32, "num_warps": 4, "num_stages": 2}
    return {"BLOCK_N": 128, "BLOCK_V": 256, "BLOCK_D": 64, "num_warps": 8, "num_stages": 3}

@triton.jit
def logits_tile(
    hidden_ptr, weight_ptr, n_N1, v_V,
    N, V, D, scale,
    BLOCK_N: tl.constexpr,   # rows of a tile
    BLOCK_V: tl.constexpr,   # words of a tile
    BLOCK_D: tl.constexpr,   # features that one step of the loop multiplies
    UPCAST: tl.constexpr,    # the interpreter cannot multiply bf16
):
    """z of rows n_N1 and words v_V, in fp32 registers. Words beyond the vocabulary get LOWEST."""
    z_NV = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    hidden_ptr_N1 = hidden_ptr + n_N1.to(tl.int64) * D
    weight_ptr_V = weight_ptr + v_V.to(tl.int64) * D
    for start in range(0, D, BLOCK_D):
        d_D = start + tl.arange(0, BLOCK_D)
        d_D1 = d_D[:, None]
        hidden_ND = tl.load(hidden_ptr_N1 + d_D, mask=(n_N1 < N) & (d_D < D), other=0.0)
        weight_DV = tl.load(weight_ptr_V + d_D1, mask=(d_D1 < D) & (v_V < V), other=0.0)
        if UPCAST:
            hidden_ND = hidden_ND.to(tl.float32)
            weight_DV = weight_DV.to(tl.float32)
        # "ieee": no TF32 where the factors are fp32.
        z_NV = tl.dot(hidden_ND, weight_DV, z_NV, input_precision="ieee")
    return tl.where(v_V < V, z_NV * scale, LOWEST)

# ---------------------------------------------------------------- forward
@triton.jit
def forward_kernel(
    hidden_ptr, weight_ptr, ids_ptr, out_ptr,
    N, V, D, scale, words,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """
    Program (i, s): rows of block i, over split s of the vocabulary, `words` of them. For these words alone,
    it writes log-sum-exp, entropy, and the target's logit (0 if the target is elsewhere) to out_S3N.
    """
    n_N1 = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    split = tl.program_id(1)
    ids_N1 = tl.load(ids_ptr + n_N1, mask=n_N1 < N, other=-1)
    # With m the largest logit so far: sum is that of exp(z - m), moment that of (z - m) * exp(z - m).
    max_N1 = tl.full((BLOCK_N, 1), LOWEST, tl.float32)
    sum_N1 = tl.zeros((BLOCK_N, 1), tl.float32)
    moment_N1 = tl.zeros((BLOCK_N, 1), tl.float32)
    target_N1 = tl.zeros((BLOCK_N, 1), tl.float32)
    for start in range(split * words, tl.minimum((split + 1) * words, V), BLOCK_V):
        v_V = start + tl.arange(0, BLOCK_V)
        z_NV = logits_tile(
            hidden_ptr, weight_ptr, n_N1, v_V,
            N, V, D, scale, BLOCK_N, BLOCK_V, BLOCK_D, UPCAST,
        )
        # At most one word of all splits is the target, so a sum picks its logit.
        target_N1 += tl.sum(tl.where(v_V == ids_N1, z_NV, 0.0), 1, keep_dims=True)
        new_max_N1 = tl.maximum(max_N1, tl.max(z_NV, 1, keep_dims=True))
        # Under a larger maximum, each old z - m moves down by the shift.
        shift_N1 = max_N1 - new_max_N1
        moment_N1 = (moment_N1 + shift_N1 * sum_N1) * tl.exp(shift_N1)
        sum_N1 = sum_N1 * tl.exp(shift_N1)
        below_NV = z_NV - new_max_N1
        p_NV = tl.exp(below_NV)
        moment_N1 += tl.sum(below_NV * p_NV, 1, keep_dims=True)
        sum_N1 += tl.sum(p_NV, 1, keep_dims=True)
        max_N1 = new_max_N1
    log_sum_N1 = tl.log(sum_N1)
    # entropy = lse - mean of z = (m + log sum) - (m + moment / sum)
    out_ptr_N1 = out_ptr + 3 * split.to(tl.int64) * N + n_N1
    tl.store(out_ptr_N1, max_N1 + log_sum_N1, mask=n_N1 < N)
    tl.store(out_ptr_N1 + N, log_sum_N1 - moment_N1 / sum_N1, mask=n_N1 < N)
    tl.store(out_ptr_N1 + 2 * N, target_N1, mask=n_N1 < N)

def statistics(
    hidden_ND: Tensor, weight_VD: Tensor, ids_N: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(lse_N, logprob_N, entropy_N), all fp32."""
    N, D = hidden_ND.shape
    V = len(weight_VD)
    tile = tile_sizes(hidden_ND.dtype)
    blocks = max(1, triton.cdiv(N, tile["BLOCK_N"]))
    # Few rows make few blocks: split the vocabulary, in whole tiles, until there are enough programs.
    words = triton.cdiv(V * blocks, PROGRAMS * tile["BLOCK_V"]) * tile["BLOCK_V"]
    splits = triton.cdiv(V, words)
    out_S3N = torch.empty(splits, 3, N, device=hidden_ND.device)
    if N:
        forward_kernel[(blocks, splits)](
            hidden_ND, weight_VD, ids_N, out_S3N,
            N, V, D, 1 / temperature, words, UPCAST=INTERPRET, **tile,
        )
    lse_SN, entropy_SN, target_SN = out_S3N.unbind(1)
    lse_N = lse_SN.logsumexp(0)
    # Chain rule: the entropy of the split that a word falls into, plus the mean entropy within a split.
    log_share_SN = lse_SN - lse_N
    entropy_N = (log_share_SN.exp() * (entropy_SN - log_share_SN)).sum(0)
    # the two are summed in different orders: a difference above 0 is rounding
    return lse_N, (target_SN.sum(0) - lse_N).clamp(max=0.0), entropy_N

# ---------------------------------------------------------------- backward
@triton.jit
def gradient_kernel(
    hidden_ptr, weight_ptr, ids_ptr, lse_ptr, grad_ptr, out_ptr,
    N, C, D, scale, first,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Program (i, j): rows of block i, words of block j of the slice of C words from word `first` on."""
    n_N1 = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    c_C = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    z_NC = logits_tile(
        hidden_ptr, weight_ptr, n_N1, c_C,
        N, C, D, scale, BLOCK_N, BLOCK_V, BLOCK_D, UPCAST,
    )
    ids_N1 = tl.load(ids_ptr + n_N1, mask=n_N1 < N)
    lse_N1 = tl.load(lse_ptr + n_N1, mask=n_N1 < N)
    grad_N1 = tl.load(grad_ptr + n_N1, mask=n_N1 < N)
    p_NC = tl.exp(z_NC - lse_N1)
    onehot_NC = tl.where(first + c_C == ids_N1, 1.0, 0.0)
    grad_NC = grad_N1 * scale * (onehot_NC - p_NC)
    tl.store(out_ptr + n_N1.to(tl.int64) * C + c_C, grad_NC, mask=(n_N1 < N) & (c_C < C))

def slice_gradient(
    hidden_ND: Tensor,
    weight_CD: Tensor,
    ids_N: Tensor,
    lse_N: Tensor,
    grad_logprob_N: Tensor,
    temperature: float,
    first: int,
) -> Tensor:
    """grad_z_NC of the C words from word `first` on, in the dtype of the hidden states."""
    N, D = hidden_ND.shape
    C = len(weight_CD)
    tile = tile_sizes(hidden_ND.dtype)
    grid = (triton.cdiv(N, tile["BLOCK_N"]), triton.cdiv(C, tile["BLOCK_V"]))
    grad_NC = hidden_ND.new_empty(N, C)
    gradient_kernel[grid](
        hidden_ND, weight_CD, ids_N, lse_N, grad_logprob_N, grad_NC,
        N, C, D, 1 / temperature, first, UPCAST=INTERPRET, **tile,
    )
    return grad_NC
