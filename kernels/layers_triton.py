"""
The small layers on a GPU, in Triton. Formulas are in layers.py.

    rms_norm      one program per row; backward: one for several rows, which adds up their part of a gradient
    swiglu        one program per row and block of columns, forward and backward
    attend_one    one program per row and key head: online softmax over the row's own keys (arXiv 1805.02867)

Kernels read each row's length from GPU memory, and the grid depends on tensor sizes alone, so that a CUDA
graph can record a decode step. Every program owns what it writes, without atomics: two runs give the same
bits, and a row's result does not depend on its batch.

    python -m pytest tests/test_kernels.py     # in Triton's interpreter on a CPU, and compiled for sm_90
"""
import os

import torch
import triton
import triton.language as tl
from torch import Tensor

NORM_PROGRAMS = 1024   # of the backward pass of a norm, at most: each adds up a gradient of its own
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"   # Triton runs on a CPU, for tests

# ---------------------------------------------------------------- norm
@triton.jit
def norm_kernel(x_ptr, weight_ptr, y_ptr, D, eps, BLOCK: tl.constexpr):
    """Program n: row n."""
    # Row offsets are 64-bit in all kernels: a tensor may have more than 2^31 elements.
    row = tl.program_id(0).to(tl.int64) * D
    d_D = tl.arange(0, BLOCK)
    valid_D = d_D < D
    x_D = tl.load(x_ptr + row + d_D, mask=valid_D, other=0.0).to(tl.float32)
    weight_D = tl.load(weight_ptr + d_D, mask=valid_D)
    r = tl.rsqrt(tl.sum(x_D * x_D, 0) / D + eps)
    # Round to the dtype of x before the weight multiplies, as Llama does.
    rounded_D = (x_D * r).to(x_ptr.dtype.element_ty)
    tl.store(y_ptr + row + d_D, rounded_D.to(tl.float32) * weight_D, mask=valid_D)

def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension."""
    x = x.contiguous()
    y = torch.empty_like(x)
    D = x.shape[-1]
    if x.numel():
        grid = (x.numel() // D,)
        norm_kernel[grid](x, weight_D, y, D, eps, BLOCK=triton.next_power_of_2(D))
    return y

@triton.jit
def norm_backward_kernel(x_ptr, weight_ptr, grad_y_ptr, grad_x_ptr, grad_weight_ptr, N, D, eps, rows,
                         BLOCK: tl.constexpr):
    """Program p: rows p * rows and on, and row p of grad_weight_PD, which is theirs alone."""
    d_D = tl.arange(0, BLOCK)
    valid_D = d_D < D
    weight_D = tl.load(weight_ptr + d_D, mask=valid_D, other=0.0).to(tl.float32)
    grad_weight_D = tl.zeros((BLOCK,), tl.float32)
    first = tl.program_id(0).to(tl.int64) * rows
    for n in range(first, tl.minimum(first + rows, N)):
        offset_D = n * D + d_D
        x_D = tl.load(x_ptr + offset_D, mask=valid_D, other=0.0).to(tl.float32)
        grad_y_D = tl.load(grad_y_ptr + offset_D, mask=valid_D, other=0.0).to(tl.float32)
        r = tl.rsqrt(tl.sum(x_D * x_D, 0) / D + eps)
        n_D = x_D * r
        grad_weight_D += grad_y_D * n_D
        grad_n_D = grad_y_D * weight_D
        grad_x_D = (grad_n_D - n_D * (tl.sum(grad_n_D * n_D, 0) / D)) * r
        tl.store(grad_x_ptr + offset_D, grad_x_D, mask=valid_D)
    tl.store(grad_weight_ptr + tl.program_id(0).to(tl.int64) * D + d_D, grad_weight_D, mask=valid_D)

def rms_norm_backward(grad_y: Tensor, x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(grad_x, grad_weight_D) of rms_norm. The latter is the sum over the programs, in fp32."""
    x, grad_y = x.contiguous(), grad_y.contiguous()
    D = x.shape[-1]
    N = x.numel() // D
    rows = max(1, triton.cdiv(N, NORM_PROGRAMS))
    programs = triton.cdiv(N, rows)
    grad_x = torch.empty_like(x)
    grad_weight_PD = x.new_empty(programs, D, dtype=torch.float32)
    if N:
        norm_backward_kernel[(programs,)](x, weight_D, grad_y, grad_x, grad_weight_PD, N, D, eps, rows,
                                          BLOCK=triton.next_power_of_2(D))
    return grad_x, grad_weight_PD.sum(0)

# ---------------------------------------------------------------- gate
@triton.jit
def swiglu_kernel(gate_up_ptr, y_ptr, ffn_dim, BLOCK: tl.constexpr):
    """Program (n, j): block j of the columns of row n."""
    row = tl.program_id(0).to(tl.int64) * ffn_dim
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = column < ffn_dim
    gate_ptr = gate_up_ptr + 2 * row + column
    gate = tl.load(gate_ptr, mask=valid).to(tl.float32)
    up = tl.load(gate_ptr + ffn_dim, mask=valid)
    tl.store(y_ptr + row + column, gate * tl.sigmoid(gate) * up, mask=valid)

def swiglu(gate_up: Tensor) -> Tensor:
    """silu(left side) * right side, [..., 2 * ffn_dim] to [..., ffn_dim]."""
    gate_up = gate_up.contiguous()
    *rows, columns = gate_up.shape
    ffn_dim = columns // 2
    y = gate_up.new_empty(*rows, ffn_dim)
    if y.numel():
        block = min(1024, triton.next_power_of_2(ffn_dim))
        grid = (y.numel() // ffn_dim, triton.cdiv(ffn_dim, block))
        swiglu_kernel[grid](gate_up, y, ffn_dim, BLOCK=block)
    return y

@triton.jit
def swiglu_backward_kernel(grad_y_ptr, gate_up_ptr, grad_ptr, ffn_dim, BLOCK: tl.constexpr):
    """Program (n, j): the gradients of both sides in block j of the columns of row n."""
    row = tl.program_id(0).to(tl.int64) * ffn_dim
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = column < ffn_dim
    side = 2 * row + column
    gate = tl.load(gate_up_ptr + side, mask=valid).to(tl.float32)
    up = tl.load(gate_up_ptr + side + ffn_dim, mask=valid).to(tl.float32)
    grad_y = tl.load(grad_y_ptr + row + column, mask=valid).to(tl.float32)
    s = tl.sigmoid(gate)
    grad_gate = grad_y * up * s * (1 + gate * (1 - s))   # silu(x) = x s(x), and s' = s (1 - s)
    tl.store(grad_ptr + side, grad_gate, mask=valid)
    tl.store(grad_ptr + side + ffn_dim, grad_y * gate * s, mask=valid)

def swiglu_backward(grad_y: Tensor, gate_up: Tensor) -> Tensor:
    """The gradient of gate_up, [..., 2 * ffn_dim]."""
    grad_y, gate_up = grad_y.contiguous(), gate_up.contiguous()
    ffn_dim = grad_y.shape[-1]
    grad = torch.empty_like(gate_up)
    if grad_y.numel():
        block = min(1024, triton.next_power_of_2(ffn_dim))
        grid = (grad_y.numel() // ffn_dim, triton.cdiv(ffn_dim, block))
        swiglu_backward_kernel[grid](grad_y, gate_up, grad, ffn_dim, BLOCK=block)
    return grad

# ---------------------------------------------------------------- attention of one query per row
@triton.jit
def attend_kernel(
    query_ptr, key_ptr, value_ptr, length_ptr, out_ptr,
    S, K, G, E, scale,
    BLOCK_S: tl.constexpr,   # keys in one tile
    BLOCK_G: tl.constexpr,   # at least G, a power of two
    BLOCK_E: tl.constexpr,   # at least E, a power of two
):
    """Program b * K + k: the G queries that share key head k in row b, over the keys of that row."""
    row = tl.program_id(0).to(tl.int64)
    g_G1 = tl.arange(0, BLOCK_G)[:, None]
    e_E = tl.arange(0, BLOCK_E)
    offset_GE = (row * G + g_G1) * E + e_E
    valid_GE = (g_G1 < G) & (e_E < E)
    query_GE = tl.load(query_ptr + offset_GE, mask=valid_GE, other=0.0)
    # sum and out are relative to exp(max), the largest logit so far, so that no exponential overflows.
    max_G1 = tl.full((BLOCK_G, 1), float("-inf"), tl.float32)
    sum_G1 = tl.zeros((BLOCK_G, 1), tl.float32)
    out_GE = tl.zeros((BLOCK_G, BLOCK_E), tl.float32)
    # The keys are in slots 0..length. What lies behind them is never read: it may be anything, even nan.
    end = tl.load(length_ptr + row // K) + 1
    for start in range(0, end, BLOCK_S):
        s_S1 = start + tl.arange(0, BLOCK_S)[:, None]
        offset_SE = (row * S + s_S1) * E + e_E
        valid_SE = (s_S1 < end) & (e_E < E)
        key_SE = tl.load(key_ptr + offset_SE, mask=valid_SE, other=0.0)
        value_SE = tl.load(value_ptr + offset_SE, mask=valid_SE, other=0.0)
        # "ieee" keeps fp32 keys in fp32; the default would round them to TF32.
        logit_GS = tl.dot(query_GE, key_SE.T, input_precision="ieee") * scale
        logit_GS = tl.where(s_S1.T < end, logit_GS, float("-inf"))
        new_max_G1 = tl.maximum(max_G1, tl.max(logit_GS, 1, keep_dims=True))
        p_GS = tl.exp(logit_GS - new_max_G1)
        rescale_G1 = tl.exp(max_G1 - new_max_G1)
        sum_G1 = sum_G1 * rescale_G1 + tl.sum(p_GS, 1, keep_dims=True)
        new_GE = tl.dot(p_GS.to(value_SE.dtype), value_SE, input_precision="ieee")
        out_GE = out_GE * rescale_G1 + new_GE
        max_G1 = new_max_G1
    tl.store(out_ptr + offset_GE, out_GE / sum_G1, mask=valid_GE)

def attend_one(query_B1HE: Tensor, keys_BKSE: Tensor, values_BKSE: Tensor, length_B: Tensor) -> Tensor:
    """Attention of row b's one query to slots 0..length_B[b], [B, 1, H * E]. The cache must be contiguous."""
    B, _, H, E = query_B1HE.shape
    K, S = keys_BKSE.shape[1:3]
    out_B1D = query_B1HE.new_empty(B, 1, H * E)
    tensors = [query_B1HE.contiguous(), keys_BKSE, values_BKSE]
    if INTERPRET:   # Triton's interpreter cannot multiply bf16
        tensors = [t.float() for t in tensors]
    if B:
        attend_kernel[(B * K,)](
            *tensors, length_B, out_B1D, S, K, H // K, E, E**-0.5,
            BLOCK_S=128 // keys_BKSE.itemsize,   # as many keys as stay in registers: 64 in bf16, 32 in fp32
            BLOCK_G=max(16, triton.next_power_of_2(H // K)),   # tl.dot needs at least 16 x 16
            BLOCK_E=max(16, triton.next_power_of_2(E)),
        )
    return out_B1D
