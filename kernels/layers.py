"""
The layers of a transformer: matrix product, norm, rotary positions, gate and attention.

    matmul_fp32  y_M    = x_D @ weight_MD.T, in fp32
    rms_norm     y_D    = x_D / sqrt(mean_d(x_D^2) + eps) * weight_D                  (arXiv 1910.07467)
    rotate       pairs of channels by angles that grow with the position              (arXiv 2104.09864)
    swiglu       y      = silu(gate) * up;  gate and up are the two sides of gate_up  (arXiv 2002.05202)
    attend       out_TE = softmax_s(query_TE . key_SE / sqrt(E) + causal mask_TS) @ value_SE

Training, prefill and decoding call the same functions. A CPU runs the formulas as they stand here, and
autograd differentiates them. On a GPU, kernels in layers_triton.py compute the norm, the gate, their
gradients, and a decode step's attention.

    python -m pytest tests/test_kernels.py        # every function against fp64

Shapes: B rows, T positions, S key positions or cache slots, D and M features, H query heads, K key/value
heads, G = H / K query heads that share a key head, E features of a head.
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

FEW_POSITIONS = 128   # up to here a CPU attends faster by two matmuls than by PyTorch's fused routine
MIN_QUERIES = 4       # fewest rows of such a matmul; attention_reference says why

# ---------------------------------------------------------------- matrix product
def matmul_fp32(x_ND: Tensor, weight_MD: Tensor) -> Tensor:
    """
    x @ weight.T as fp32 [N, M], whatever the dtype of the factors. Logits need it: bf16 has 8 bits, so it
    would round a logit of 12 to a multiple of 1/16, and change its probability by up to 3 %.
    """
    if x_ND.is_cuda and x_ND.dtype != torch.float32:
        # Tensor cores add products of bf16 numbers in fp32; out_dtype returns that sum unrounded.
        return torch.mm(x_ND, weight_MD.T, out_dtype=torch.float32)
    return x_ND.float() @ weight_MD.float().T

# ---------------------------------------------------------------- norm
def norm_reference(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """The definition over the last dimension. Like Llama, it rounds to the dtype of x before the weight."""
    magnitude = torch.linalg.vector_norm(x.float(), dim=-1, keepdim=True)
    r = (magnitude.square() / x.shape[-1] + eps).rsqrt()   # 1 / sqrt(|x|^2 / D + eps)
    return (x.float() * r).to(x.dtype) * weight_D

class NormFunction(torch.autograd.Function):
    """rms_norm and its gradients on a GPU. It keeps x alone, where autograd would keep three matrices."""

    @staticmethod
    def forward(ctx, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        from kernels import layers_triton   # here, because Triton exists on Linux only
        ctx.save_for_backward(x, weight_D)
        ctx.eps = eps
        return layers_triton.rms_norm(x, weight_D, eps)

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor, Tensor, None]:
        from kernels import layers_triton
        x, weight_D = ctx.saved_tensors
        grad_x, grad_weight_D = layers_triton.rms_norm_backward(grad_output, x, weight_D, ctx.eps)
        return grad_x, grad_weight_D.to(weight_D.dtype), None

def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension, in the dtype of x; the root mean square is fp32."""
    return NormFunction.apply(x, weight_D, eps) if x.is_cuda else norm_reference(x, weight_D, eps)

# ---------------------------------------------------------------- rotary positions
def rope_frequencies(head_dim: int, theta: float, scaling: tuple | None, device: torch.device) -> Tensor:
    """
    frequency_E2: radians per position of each pair of channels (Su et al., arXiv 2104.09864).

    Llama 3.1 slows down low frequencies, so that positions beyond the original context look like positions
    within it. A pair that turns fewer than `low` times over that context is slowed by `factor`, one that
    turns more than `high` times stays, and in between the two are blended (rope_type "llama3").
    """
    exponent_E2 = torch.arange(0, head_dim, 2, device=device).float() / head_dim
    frequency_E2 = theta ** -exponent_E2
    if scaling is None:
        return frequency_E2
    factor, low, high, original_context = scaling
    turns_E2 = original_context * frequency_E2 / (2 * math.pi)
    kept_E2 = ((turns_E2 - low) / (high - low)).clamp(0, 1)  # 1: the frequency stays
    return frequency_E2 * (kept_E2 + (1 - kept_E2) / factor)

def rotation(position_BT: Tensor, rope: tuple, dtype: torch.dtype) -> Tensor:
    """rotation_BT2E: cosines and sines of every position's angles; the first half of the sines is negated."""
    # angles in fp32: bf16 cannot tell position 1000 from 1001
    angle_BTE = position_BT[..., None].float() * rope_frequencies(*rope, position_BT.device)
    cos, sin = angle_BTE.cos(), angle_BTE.sin()  # half of E each: a pair shares its angle
    cos_BTE = torch.cat((cos, cos), dim=-1)
    sin_BTE = torch.cat((-sin, sin), dim=-1)
    return torch.stack((cos_BTE, sin_BTE), dim=-2).to(dtype)

def rotate(x_BTHE: Tensor, rotation_BT2E: Tensor) -> Tensor:
    """Rotate each pair (x[e], x[e + E/2]) by its position's angle: Hugging Face's order of channels."""
    cos_BT1E, sin_BT1E = rotation_BT2E.split(1, dim=-2)
    low, high = x_BTHE.chunk(2, dim=-1)  # not neighbours: the two halves of a head
    swapped_BTHE = torch.cat((high, low), dim=-1)
    # x * cos + swapped * sin, in place in the copy
    return swapped_BTHE.mul_(sin_BT1E).addcmul_(x_BTHE, cos_BT1E)

# ---------------------------------------------------------------- gate
def swiglu_reference(gate_up: Tensor) -> Tensor:
    """The definition, [..., 2 * ffn_dim] to [..., ffn_dim]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up

class SwiGLUFunction(torch.autograd.Function):
    """swiglu and its gradient on a GPU. It keeps gate_up alone, and computes silu(gate) a second time."""

    @staticmethod
    def forward(ctx, gate_up: Tensor) -> Tensor:
        from kernels import layers_triton
        ctx.save_for_backward(gate_up)
        return layers_triton.swiglu(gate_up)

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> Tensor:
        from kernels import layers_triton
        return layers_triton.swiglu_backward(grad_output, *ctx.saved_tensors)

def swiglu(gate_up: Tensor) -> Tensor:
    """silu(left side) * right side of the last dimension, [..., 2 * ffn_dim] to [..., ffn_dim]."""
    return SwiGLUFunction.apply(gate_up) if gate_up.is_cuda else swiglu_reference(gate_up)

# ---------------------------------------------------------------- attention
def attention_reference(query_BTHE: Tensor, key_BKSE: Tensor, value_BKSE: Tensor, mask: Tensor) -> Tensor:
    """
    The definition, [B, T, H * E]. The mask holds 0 or -inf and broadcasts to [B, 1, T, 1, S]. The T * G
    queries that share a key head form one matrix, so each key is read once, which is fast on a CPU.
    """
    B, T, H, E = query_BTHE.shape
    K = key_BKSE.shape[1]
    G = H // K
    # At least fp32: sampler and trainer add in different orders, and would round to different bf16 numbers.
    dtype = torch.promote_types(query_BTHE.dtype, torch.float32)
    query_BTKGE = (query_BTHE.to(dtype) * E**-0.5).view(B, T, K, G, E)
    # Pad to 4 queries: below that, CPU matmuls are slower and round differently, and the sampler's log-probs
    # would differ from the trainer's.
    missing = max(0, -(-MIN_QUERIES // T) - G)
    query_BTKGE = F.pad(query_BTKGE, (0, 0, 0, missing))
    query_BKNE = query_BTKGE.transpose(1, 2).flatten(2, 3)   # N = T * (G + missing)
    # Adding -inf is 3 to 5 times faster than masked_fill.
    logit_BKTGS = (query_BKNE @ key_BKSE.to(dtype).mT).unflatten(2, (T, -1)).add_(mask)
    out_BKNE = logit_BKTGS.softmax(-1).flatten(2, 3) @ value_BKSE.to(dtype)
    out_BKTGE = out_BKNE.unflatten(2, (T, -1))[:, :, :, :G]
    return out_BKTGE.transpose(1, 2).reshape(B, T, H * E).to(query_BTHE.dtype)

def attend(query_BTHE: Tensor, key_BKSE: Tensor, value_BKSE: Tensor) -> Tensor:
    """
    Causal attention of the last T of S positions, [B, T, H * E]: position t sees the first S - T + t + 1
    keys.
    """
    T, H = query_BTHE.shape[1:3]
    K, S = key_BKSE.shape[1:3]
    if T <= FEW_POSITIONS and not query_BTHE.is_cuda:
        mask_TS = query_BTHE.new_full((T, S), float("-inf")).triu(S - T + 1)
        return attention_reference(query_BTHE, key_BKSE, value_BKSE, mask_TS[:, None])
    # PyTorch's routine never writes the [T, S] weights to memory. Its is_causal aligns the mask to the upper
    # left; prompts behind a shared prefix (T < S) need the lower right.
    mask = None if T == S else causal_lower_right(T, S)
    query_BHTE = query_BTHE.transpose(1, 2)
    out_BHTE = F.scaled_dot_product_attention(
        query_BHTE, key_BKSE, value_BKSE, mask, is_causal=T == S, enable_gqa=H != K
    )
    return out_BHTE.transpose(1, 2).flatten(2)

def attend_one(query_B1HE: Tensor, keys_BKSE: Tensor, values_BKSE: Tensor, length_B: Tensor) -> Tensor:
    """
    Attention of one query per row, [B, 1, H * E], without a gradient: row b sees slots 0..length_B[b] of its
    cache. On a GPU the host never waits for the lengths, so that a CUDA graph can hold the step, and nothing
    reads what lies behind a row's length. A CPU reads up to the largest length: stale slots must be finite.
    """
    if query_B1HE.is_cuda:
        from kernels import layers_triton
        return layers_triton.attend_one(query_B1HE, keys_BKSE, values_BKSE, length_B)
    end = max(length_B.tolist(), default=-1) + 1
    is_behind_BS = torch.arange(end) > length_B[:, None]
    mask_BS = query_B1HE.new_zeros(is_behind_BS.shape).masked_fill_(is_behind_BS, float("-inf"))
    mask = mask_BS[:, None, None, None]
    key_BKSE = keys_BKSE[:, :, :end]
    value_BKSE = values_BKSE[:, :, :end]
    return attention_reference(query_B1HE, key_BKSE, value_BKSE, mask)
