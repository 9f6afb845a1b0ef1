"""
Forward passes of the small layers on a GPU, a kernel each; formulas and gradients are in norm.py, swiglu.py and attention.py.

    rms_norm      a program per row
    swiglu        a program per row and block of columns
    attend_one    one query per row, of keys in a cache: the keys are split among programs of SPLIT keys each, whose sums a second kernel
                  puts together. The query heads that share a key head stand in one tile, so that each key is read once

Where the last key lies is read from memory on the GPU, and the grid depends on sizes alone: so a step can be recorded and replayed. Every
program owns what it writes and splits have a fixed length: two runs give the same bits, in whatever batch.
"""
import os

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"   # Triton's interpreter runs on a CPU; it cannot multiply in bf16
SPLIT = 256                                             # keys of one program
WARPS = {"norm_kernel": 4, "swiglu_kernel": 4, "split_kernel": 4, "merge_kernel": 2}


# ---------------------------------------------------------------- kernels

@triton.jit
def norm_kernel(x_ptr, weight_ptr, y_ptr, r_ptr, D, eps, BLOCK: tl.constexpr):
    """Program n: row n."""
    n, d_D = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    x_D = tl.load(x_ptr + n * D + d_D, mask=d_D < D, other=0.0).to(tl.float32)
    r = 1.0 / tl.sqrt(tl.sum(x_D * x_D, 0) / D + eps)
    weight_D = tl.load(weight_ptr + d_D, mask=d_D < D, other=0.0).to(tl.float32)
    normed_D = (x_D * r).to(y_ptr.dtype.element_ty).to(tl.float32)
    tl.store(y_ptr + n * D + d_D, (normed_D * weight_D).to(y_ptr.dtype.element_ty), mask=d_D < D)
    tl.store(r_ptr + n, r)


@triton.jit
def swiglu_kernel(gate_up_ptr, y_ptr, I, BLOCK: tl.constexpr):
    """Program (n, j): columns of block j of row n."""
    n, i_I = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate_I = tl.load(gate_up_ptr + 2 * n * I + i_I, mask=i_I < I, other=0.0).to(tl.float32)
    up_I = tl.load(gate_up_ptr + 2 * n * I + I + i_I, mask=i_I < I, other=0.0).to(tl.float32)
    tl.store(y_ptr + n * I + i_I, (gate_I * tl.sigmoid(gate_I) * up_I).to(y_ptr.dtype.element_ty), mask=i_I < I)


@triton.jit
def split_kernel(query_ptr, key_ptr, value_ptr, mask_ptr, slot_ptr, mixed_ptr, max_ptr, sum_ptr, S, K, G, E, scale,
                 SPLIT: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_E: tl.constexpr, UPCAST: tl.constexpr):
    """
    Program (b K + k, j): the queries of key head k in row b, over split j of the keys up to the last one. Leaves the largest logit m, the
    sum of exp(z - m), and the values weighted so; a split behind the last key leaves minus infinity and zeros.
    """
    row, split, end = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.load(slot_ptr).to(tl.int32) + 1
    g_G, e_E = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_E)
    held_GE = (g_G < G)[:, None] & (e_E < E)[None, :]
    query_GE = tl.load(query_ptr + row * G * E + g_G[:, None] * E + e_E[None, :], mask=held_GE, other=0.0)
    max_G, sum_G = tl.full((BLOCK_G,), float("-inf"), tl.float32), tl.zeros((BLOCK_G,), tl.float32)
    mixed_GE = tl.zeros((BLOCK_G, BLOCK_E), tl.float32)
    for start in range(split * SPLIT, tl.minimum((split + 1) * SPLIT, end), BLOCK_S):
        s_S = start + tl.arange(0, BLOCK_S)
        place_SE = (row * S + s_S)[:, None] * E + e_E[None, :]
        seen_SE = (s_S < end)[:, None] & (e_E < E)[None, :]
        key_SE, value_SE = tl.load(key_ptr + place_SE, mask=seen_SE, other=0.0), tl.load(value_ptr + place_SE, mask=seen_SE, other=0.0)
        if UPCAST:
            query_GE, key_SE, value_SE = query_GE.to(tl.float32), key_SE.to(tl.float32), value_SE.to(tl.float32)
        hidden_S = tl.load(mask_ptr + (row // K) * S + s_S, mask=s_S < end, other=float("-inf"))
        z_GS = tl.dot(query_GE, tl.trans(key_SE), input_precision="ieee") * scale + hidden_S[None, :]
        new_G = tl.maximum(max_G, tl.max(z_GS, 1))
        from_G = tl.where(new_G == float("-inf"), 0.0, new_G)            # nothing seen so far: exp(-inf - 0) is 0, not nan
        shrink_G, p_GS = tl.exp(max_G - from_G), tl.exp(z_GS - from_G[:, None])
        sum_G = sum_G * shrink_G + tl.sum(p_GS, 1)
        mixed_GE = mixed_GE * shrink_G[:, None] + tl.dot(p_GS.to(value_SE.dtype), value_SE, input_precision="ieee")
        max_G = new_G
    part = row * tl.num_programs(1) + split
    tl.store(max_ptr + part * G + g_G, max_G, mask=g_G < G)
    tl.store(sum_ptr + part * G + g_G, sum_G, mask=g_G < G)
    tl.store(mixed_ptr + part * G * E + g_G[:, None] * E + e_E[None, :], mixed_GE, mask=held_GE)


@triton.jit
def merge_kernel(mixed_ptr, max_ptr, sum_ptr, out_ptr, splits, G, E, BLOCK_G: tl.constexpr, BLOCK_E: tl.constexpr):
    """Program b K + k: the splits of one key head, one after the other."""
    row, g_G, e_E = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_E)
    held_GE = (g_G < G)[:, None] & (e_E < E)[None, :]
    max_G, sum_G = tl.full((BLOCK_G,), float("-inf"), tl.float32), tl.zeros((BLOCK_G,), tl.float32)
    mixed_GE = tl.zeros((BLOCK_G, BLOCK_E), tl.float32)
    for split in range(splits):
        part = row * splits + split
        other_G = tl.load(max_ptr + part * G + g_G, mask=g_G < G, other=float("-inf"))
        new_G = tl.maximum(max_G, other_G)
        from_G = tl.where(new_G == float("-inf"), 0.0, new_G)
        ours_G, theirs_G = tl.exp(max_G - from_G), tl.exp(other_G - from_G)
        sum_G = sum_G * ours_G + tl.load(sum_ptr + part * G + g_G, mask=g_G < G, other=0.0) * theirs_G
        part_GE = tl.load(mixed_ptr + part * G * E + g_G[:, None] * E + e_E[None, :], mask=held_GE, other=0.0)
        mixed_GE = mixed_GE * ours_G[:, None] + part_GE * theirs_G[:, None]
        max_G = new_G
    mixed_GE = mixed_GE / tl.where(sum_G > 0, sum_G, 1.0)[:, None]
    tl.store(out_ptr + row * G * E + g_G[:, None] * E + e_E[None, :], mixed_GE.to(out_ptr.dtype.element_ty), mask=held_GE)


# ---------------------------------------------------------------- launching them

def at_once(dtype: torch.dtype) -> int:
    """Keys in one tile: as many as stay in registers."""
    return 128 // dtype.itemsize


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y like x, and r, fp32, [..., 1]."""
    x, D = x.contiguous(), x.shape[-1]
    y, r = torch.empty_like(x), torch.empty(*x.shape[:-1], 1, device=x.device)
    if x.numel():
        norm_kernel[x.numel() // D,](x, weight_D, y, r, D, eps, BLOCK=triton.next_power_of_2(D), num_warps=WARPS["norm_kernel"])
    return y, r


def swiglu(gate_up: Tensor) -> Tensor:
    """[..., 2 I] to [..., I]."""
    gate_up, I = gate_up.contiguous(), gate_up.shape[-1] // 2
    y = torch.empty(*gate_up.shape[:-1], I, dtype=gate_up.dtype, device=gate_up.device)
    if y.numel():
        block = min(1024, triton.next_power_of_2(I))
        swiglu_kernel[y.numel() // I, triton.cdiv(I, block)](gate_up, y, I, BLOCK=block, num_warps=WARPS["swiglu_kernel"])
    return y


def attend_one(query_B1HE: Tensor, keys_BKSE: Tensor, values_BKSE: Tensor, mask_BS: Tensor, slot_1: Tensor) -> Tensor:
    """Attention of one query per row to slots 0 .. slot_1[0] of its keys, [B, 1, H * E]."""
    (B, _, H, E), (K, S) = query_B1HE.shape, keys_BKSE.shape[1:3]
    splits, G, device = triton.cdiv(S, SPLIT), H // K, query_B1HE.device
    mixed, (largest, sums) = torch.empty(B * K, splits, G, E, device=device), torch.empty(2, B * K, splits, G, device=device)
    out = torch.empty(B, 1, H * E, dtype=query_B1HE.dtype, device=device)
    tile = dict(BLOCK_G=max(16, triton.next_power_of_2(G)), BLOCK_E=max(16, triton.next_power_of_2(E)))
    if B:
        split_kernel[B * K, splits](query_B1HE.contiguous(), keys_BKSE, values_BKSE, mask_BS, slot_1, mixed, largest, sums, S, K, G, E,
                                    E ** -0.5, SPLIT=SPLIT, BLOCK_S=at_once(keys_BKSE.dtype), UPCAST=INTERPRET,
                                    num_warps=WARPS["split_kernel"], **tile)
        merge_kernel[B * K,](mixed, largest, sums, out, splits, G, E, num_warps=WARPS["merge_kernel"], **tile)
    return out
