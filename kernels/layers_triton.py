"""
Forward passes of the small layers on a GPU, in Triton. Formulas and gradients are in layers.py.

    rms_norm      one program per row
    swiglu        one program per row and block of columns
    attend_one    flash decoding: one program per row, key head and split of SPLIT cache slots computes a partial
                  softmax; merge_kernel then adds the partial results of the splits that hold keys

Each row's length is read from GPU memory and the grid depends on tensor sizes alone, so a decode step can be
recorded as a CUDA graph. No atomics, and splits of fixed length: two runs give the same bits, in any batch.

    python -m pytest tests/test_kernels.py     # in Triton's interpreter on a CPU, and compiled for sm_90
"""
import os

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")   # the interpreter cannot multiply bf16
SPLIT = 256   # cache slots of one program
WARPS = {"norm_kernel": 4, "swiglu_kernel": 4, "split_kernel": 4, "merge_kernel": 2}


# ---------------------------------------------------------------- norm


@triton.jit
def norm_kernel(x_ptr, weight_ptr, y_ptr, r_ptr, D, eps, BLOCK: tl.constexpr):
    """Program n: row n."""
    n = tl.program_id(0).to(tl.int64)
    d_D = tl.arange(0, BLOCK)
    valid_D = d_D < D
    x_D = tl.load(x_ptr + n * D + d_D, mask=valid_D, other=0.0).to(tl.float32)
    weight_D = tl.load(weight_ptr + d_D, mask=valid_D, other=0.0).to(tl.float32)
    r = 1.0 / tl.sqrt(tl.sum(x_D * x_D, 0) / D + eps)
    # Like Llama, round to the dtype of x before the weight multiplies.
    n_D = (x_D * r).to(y_ptr.dtype.element_ty).to(tl.float32)
    tl.store(y_ptr + n * D + d_D, n_D * weight_D, mask=valid_D)
    tl.store(r_ptr + n, r)


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y like x, and r = 1 / rms(x), fp32 [..., 1]."""
    x = x.contiguous()
    D = x.shape[-1]
    y = torch.empty_like(x)
    r = torch.empty(*x.shape[:-1], 1, device=x.device)
    if x.numel():
        block = triton.next_power_of_2(D)
        norm_kernel[(r.numel(),)](x, weight_D, y, r, D, eps, BLOCK=block, num_warps=WARPS["norm_kernel"])
    return y, r


# ---------------------------------------------------------------- gate


@triton.jit
def swiglu_kernel(gate_up_ptr, y_ptr, ffn_dim, BLOCK: tl.constexpr):
    """Program (n, j): block j of the columns of row n."""
    n = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = column < ffn_dim
    gate_ptr = gate_up_ptr + 2 * n * ffn_dim
    gate = tl.load(gate_ptr + column, mask=valid, other=0.0).to(tl.float32)
    up = tl.load(gate_ptr + ffn_dim + column, mask=valid, other=0.0).to(tl.float32)
    tl.store(y_ptr + n * ffn_dim + column, gate * tl.sigmoid(gate) * up, mask=valid)


def swiglu(gate_up: Tensor) -> Tensor:
    """[..., 2 * ffn_dim] to [..., ffn_dim]."""
    gate_up = gate_up.contiguous()
    ffn_dim = gate_up.shape[-1] // 2
    y = gate_up.new_empty(*gate_up.shape[:-1], ffn_dim)
    if y.numel():
        block = min(1024, triton.next_power_of_2(ffn_dim))
        grid = y.numel() // ffn_dim, triton.cdiv(ffn_dim, block)
        swiglu_kernel[grid](gate_up, y, ffn_dim, BLOCK=block, num_warps=WARPS["swiglu_kernel"])
    return y


# ---------------------------------------------------------------- attention of one query per row


@triton.jit
def split_kernel(query_ptr, key_ptr, value_ptr, length_ptr, part_ptr, lse_ptr, S, K, G, E, scale,
                 SPLIT: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_E: tl.constexpr):
    """
    Program (b * K + k, j): the G queries of key head k in row b, over the row's keys in split j. It writes the
    softmax-weighted mean of the values and the log-sum-exp of the logits. A split behind the last key writes nothing.
    """
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    end = tl.load(length_ptr + row // K).to(tl.int32) + 1   # the row's keys are in slots 0..end - 1
    if split * SPLIT >= end:
        return
    g_G = tl.arange(0, BLOCK_G)
    e_E = tl.arange(0, BLOCK_E)
    valid_E = (e_E < E)[None, :]
    valid_GE = (g_G < G)[:, None] & valid_E
    offset_GE = g_G[:, None] * E + e_E[None, :]
    query_GE = tl.load(query_ptr + row * G * E + offset_GE, mask=valid_GE, other=0.0)
    if INTERPRET:
        query_GE = query_GE.to(tl.float32)
    # Online softmax: sum_G and out_GE are relative to the largest logit so far, max_G.
    max_G = tl.full((BLOCK_G,), float("-inf"), tl.float32)
    sum_G = tl.zeros((BLOCK_G,), tl.float32)
    out_GE = tl.zeros((BLOCK_G, BLOCK_E), tl.float32)
    for start in range(split * SPLIT, tl.minimum((split + 1) * SPLIT, end), BLOCK_S):
        s_S = start + tl.arange(0, BLOCK_S)
        offset_SE = (row * S + s_S)[:, None] * E + e_E[None, :]
        valid_SE = (s_S < end)[:, None] & valid_E
        key_SE = tl.load(key_ptr + offset_SE, mask=valid_SE, other=0.0)
        value_SE = tl.load(value_ptr + offset_SE, mask=valid_SE, other=0.0)
        if INTERPRET:
            key_SE = key_SE.to(tl.float32)
            value_SE = value_SE.to(tl.float32)
        logit_GS = tl.dot(query_GE, tl.trans(key_SE), input_precision="ieee") * scale
        logit_GS = tl.where((s_S < end)[None, :], logit_GS, float("-inf"))
        new_max_G = tl.maximum(max_G, tl.max(logit_GS, 1))
        rescale_G = tl.exp(max_G - new_max_G)
        p_GS = tl.exp(logit_GS - new_max_G[:, None])
        sum_G = sum_G * rescale_G + tl.sum(p_GS, 1)
        part_GE = tl.dot(p_GS.to(value_SE.dtype), value_SE, input_precision="ieee")
        out_GE = out_GE * rescale_G[:, None] + part_GE
        max_G = new_max_G
    part = (row * tl.num_programs(1) + split) * G
    tl.store(part_ptr + part * E + offset_GE, out_GE / sum_G[:, None], mask=valid_GE)
    tl.store(lse_ptr + part + g_G, max_G + tl.log(sum_G), mask=g_G < G)


@triton.jit
def merge_kernel(part_ptr, lse_ptr, length_ptr, out_ptr, splits, K, G, E,
                 SPLIT: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_E: tl.constexpr):
    """Program b * K + k: the weighted mean of this row's splits, each weighted by the exponential of its log-sum-exp."""
    row = tl.program_id(0).to(tl.int64)
    used = tl.load(length_ptr + row // K).to(tl.int32) // SPLIT + 1   # splits that hold keys of this row
    g_G = tl.arange(0, BLOCK_G)
    e_E = tl.arange(0, BLOCK_E)
    valid_GE = (g_G < G)[:, None] & (e_E < E)[None, :]
    offset_GE = g_G[:, None] * E + e_E[None, :]
    max_G = tl.full((BLOCK_G,), float("-inf"), tl.float32)
    sum_G = tl.zeros((BLOCK_G,), tl.float32)
    out_GE = tl.zeros((BLOCK_G, BLOCK_E), tl.float32)
    for split in range(used):
        part = (row * splits + split) * G
        lse_G = tl.load(lse_ptr + part + g_G, mask=g_G < G, other=0.0)
        part_GE = tl.load(part_ptr + part * E + offset_GE, mask=valid_GE, other=0.0)
        new_max_G = tl.maximum(max_G, lse_G)
        rescale_G = tl.exp(max_G - new_max_G)
        weight_G = tl.exp(lse_G - new_max_G)
        sum_G = sum_G * rescale_G + weight_G
        out_GE = out_GE * rescale_G[:, None] + part_GE * weight_G[:, None]
        max_G = new_max_G
    tl.store(out_ptr + row * G * E + offset_GE, out_GE / sum_G[:, None], mask=valid_GE)


def keys_per_tile(dtype: torch.dtype) -> int:
    """Keys that one tile holds: as many as stay in registers, 64 in bf16 and 32 in fp32."""
    return 128 // dtype.itemsize


def attend_one(query_B1HE: Tensor, keys_BKSE: Tensor, values_BKSE: Tensor, length_B: Tensor) -> Tensor:
    """Attention of one query per row b to slots 0..length_B[b], [B, 1, H * E]. The cache must be contiguous."""
    B, _, H, E = query_B1HE.shape
    K, S = keys_BKSE.shape[1:3]
    G = H // K
    splits = triton.cdiv(S, SPLIT)
    part_NGE = torch.empty(B * K * splits, G, E, device=query_B1HE.device)   # fp32
    lse_NG = torch.empty(B * K * splits, G, device=query_B1HE.device)
    out_B1M = query_B1HE.new_empty(B, 1, H * E)
    # tl.dot needs tiles of at least 16 x 16.
    tile = {"BLOCK_G": max(16, triton.next_power_of_2(G)), "BLOCK_E": max(16, triton.next_power_of_2(E))}
    if B:
        split_kernel[(B * K, splits)](
            query_B1HE.contiguous(), keys_BKSE, values_BKSE, length_B, part_NGE, lse_NG, S, K, G, E, E**-0.5,
            SPLIT=SPLIT, BLOCK_S=keys_per_tile(keys_BKSE.dtype), num_warps=WARPS["split_kernel"], **tile,
        )
        merge_kernel[(B * K,)](
            part_NGE, lse_NG, length_B, out_B1M, splits, K, G, E,
            SPLIT=SPLIT, num_warps=WARPS["merge_kernel"], **tile,
        )
    return out_B1M
