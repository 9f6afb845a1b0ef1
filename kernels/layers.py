"""
The layers of a transformer: matrix product, norm, gate and attention. Each formula comes first, then its fast version.

    linear       y_M    = x_D @ weight_MD.T + bias_M
    rms_norm     y_D    = x_D / sqrt(mean_d(x_D^2) + eps) * weight_D             (arXiv 1910.07467)
    swiglu       y      = silu(gate) * up,   gate and up are the two sides of gate_up    (arXiv 2002.05202)
    attend       out_TE = softmax_s(query_TE . key_SE / sqrt(E) + causal mask_TS) @ value_SE

Training, prefill and decoding call the same functions. On a GPU the small layers run the Triton kernels of
layers_triton.py; their gradients are here. A CPU runs everything in PyTorch.

    python -m pytest tests/test_kernels.py        # every function against fp64

Shapes: B rows, T positions, S key positions or cache slots, D and M features, H query heads, K key/value heads,
G = H / K query heads that share a key head, E features of a head.
"""
import ctypes
import sys

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

MATMUL_POSITIONS = 128   # up to here a CPU attends faster by two matmuls than by PyTorch's fused routine
MIN_QUERIES = 4          # rows in such a matmul; see attention_by_matmul

# ---------------------------------------------------------------- matrix product


def linear_reference(x: Tensor, weight_MD: Tensor, bias_M: Tensor | None = None) -> Tensor:
    """The definition: [..., D] to [..., M], one inner product per output."""
    y = (x[..., None, :] * weight_MD).sum(-1)
    return y if bias_M is None else y + bias_M


def linear(x: Tensor, weight_MD: Tensor, bias_M: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias over the last dimension, [..., D] to [..., M], in the dtype of x."""
    return F.linear(x, weight_MD, bias_M)


def matmul_fp32(x_ND: Tensor, weight_MD: Tensor) -> Tensor:
    """
    x @ weight.T as fp32 [N, M], whatever the dtype of the factors. Logits come from here: bf16 has 8 bits, so
    it would round a logit of 12 to a multiple of 1/16, and its probability by up to 3 %.
    """
    if x_ND.is_cuda and x_ND.dtype != torch.float32:
        # Tensor cores add products of bf16 in fp32 anyway; out_dtype keeps that sum.
        return torch.mm(x_ND, weight_MD.T, out_dtype=torch.float32)
    return F.linear(x_ND.float(), weight_MD.float())


def keep_freed_memory() -> None:
    """
    Let the process keep memory that it frees. glibc returns blocks of some megabytes, such as activations, to
    the system at once, and each reuse then costs page faults.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, 2**30)       # M_MMAP_THRESHOLD, bytes: smaller blocks come from the heap
        libc.mallopt(-1, 2**31 - 1)   # M_TRIM_THRESHOLD, bytes that may stay free at the end of the heap


# ---------------------------------------------------------------- norm


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """r = 1 / sqrt(|x|^2 / D + eps), fp32 [..., 1]."""
    length = torch.linalg.vector_norm(x.float(), dim=-1, keepdim=True)
    return (length.square() / x.shape[-1] + eps).rsqrt()


def norm_reference(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """The definition over the last dimension. Like Llama, it rounds to the dtype of x before it multiplies."""
    return (x.float() * inverse_rms(x, eps)).to(x.dtype) * weight_D


def norm_forward(x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y and r, without a gradient."""
    if x.is_cuda:
        from kernels import layers_triton   # imported here: Triton exists on Linux only and takes 0.3 s
        return layers_triton.rms_norm(x, weight_D, eps)
    r = inverse_rms(x, eps)
    return (x.float() * r).to(x.dtype).mul_(weight_D), r


class NormFunction(torch.autograd.Function):
    """rms_norm with its gradients. It keeps x and one number per row, r."""

    @staticmethod
    def forward(ctx, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        y, r = norm_forward(x, weight_D, eps)
        ctx.save_for_backward(x, weight_D, r)
        return y

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight_D, r = ctx.saved_tensors
        n = x.float() * r
        grad_n = (grad_output * weight_D).float()
        # A row's length does not matter, so its gradient has no component along n.
        grad_x = (grad_n - n * (grad_n * n).mean(-1, keepdim=True)) * r
        grad_weight_D = (grad_output * n).flatten(0, -2).sum(0)
        return grad_x.to(x.dtype), grad_weight_D.to(weight_D.dtype), None


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension, in the dtype of x; the root mean square is fp32."""
    if torch.is_grad_enabled() and (x.requires_grad or weight_D.requires_grad):
        return NormFunction.apply(x, weight_D, eps)
    return norm_forward(x, weight_D, eps)[0]


# ---------------------------------------------------------------- gate


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """The definition, [..., 2 * ffn_dim] to [..., ffn_dim]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up


def swiglu_forward(gate_up: Tensor) -> Tensor:
    """The same, without a gradient."""
    if gate_up.is_cuda:
        from kernels import layers_triton
        return layers_triton.swiglu(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


class SwiGLUFunction(torch.autograd.Function):
    """swiglu with its gradient. It keeps gate_up alone and computes silu(gate) again; autograd would keep three."""

    @staticmethod
    def forward(ctx, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return swiglu_forward(gate_up)

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        grad = torch.empty_like(gate_up)
        grad_gate, grad_up = grad.chunk(2, dim=-1)   # views: both operators below write into grad
        torch.ops.aten.silu_backward.grad_input(grad_output * up, gate, grad_input=grad_gate)
        torch.mul(F.silu(gate), grad_output, out=grad_up)
        return grad


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(left side) * right side of the last dimension, [..., 2 * ffn_dim] to [..., ffn_dim]."""
    if torch.is_grad_enabled() and gate_up.requires_grad:
        return SwiGLUFunction.apply(gate_up)
    return swiglu_forward(gate_up)


# ---------------------------------------------------------------- attention


def attention_reference(query_BTHE: Tensor, key_BKSE: Tensor, value_BKSE: Tensor, mask: Tensor) -> Tensor:
    """The definition, [B, T, H * E]. The mask holds 0 or -inf and broadcasts to [B, H, T, S]."""
    G = query_BTHE.shape[2] // key_BKSE.shape[1]
    key_BHSE = key_BKSE.repeat_interleave(G, dim=1)
    value_BHSE = value_BKSE.repeat_interleave(G, dim=1)
    logit_BHTS = query_BTHE.transpose(1, 2) @ key_BHSE.mT * query_BTHE.shape[-1] ** -0.5 + mask
    return (logit_BHTS.softmax(-1) @ value_BHSE).transpose(1, 2).flatten(2)


def attention_by_matmul(query_BTHE: Tensor, key_BKSE: Tensor, value_BKSE: Tensor, mask: Tensor) -> Tensor:
    """
    The same for a CPU and few positions, [B, T, H * E]. The T * G queries that share a key head form one matrix,
    so each key is read once. The mask broadcasts to [B, 1, T, 1, S].
    """
    B, T, H, E = query_BTHE.shape
    K = key_BKSE.shape[1]
    G = H // K
    query_BKTGE = (query_BTHE * E**-0.5).view(B, T, K, G, E).transpose(1, 2)
    # Pad to 4 queries: below that, CPU matmuls are slower and round differently, and the sampler's log-probs
    # would differ from the trainer's.
    missing = max(0, -(-MIN_QUERIES // T) - G)
    query_BKTGE = F.pad(query_BKTGE, (0, 0, 0, missing))
    logit_BKNS = query_BKTGE.flatten(2, 3) @ key_BKSE.mT   # N = T * (G + missing)
    # Adding -inf is 3 to 5 times faster than masked_fill.
    logit_BKTGS = logit_BKNS.unflatten(2, (T, -1)).add_(mask)
    out_BKNE = logit_BKTGS.softmax(-1).flatten(2, 3) @ value_BKSE
    out_BKTGE = out_BKNE.unflatten(2, (T, -1))[:, :, :, :G]
    return out_BKTGE.transpose(1, 2).reshape(B, T, H * E)


def attend(query_BTHE: Tensor, key_BKSE: Tensor, value_BKSE: Tensor) -> Tensor:
    """
    Causal attention of the last T of S positions, [B, T, H * E]: position t sees the first S - T + t + 1 keys.
    """
    T, H = query_BTHE.shape[1:3]
    K, S = key_BKSE.shape[1:3]
    if T <= MATMUL_POSITIONS and not query_BTHE.is_cuda:
        mask_TS = query_BTHE.new_full((T, S), float("-inf")).triu(S - T + 1)
        return attention_by_matmul(query_BTHE, key_BKSE, value_BKSE, mask_TS[:, None])
    # PyTorch's routine never writes the [T, S] weights. Its is_causal means upper left, which is wrong if T < S.
    mask = None if T == S else causal_lower_right(T, S)
    out_BHTE = F.scaled_dot_product_attention(
        query_BTHE.transpose(1, 2), key_BKSE, value_BKSE, mask, is_causal=T == S, enable_gqa=H != K
    )
    return out_BHTE.transpose(1, 2).flatten(2)


def attend_one(query_B1HE: Tensor, keys_BKSE: Tensor, values_BKSE: Tensor, length_B: Tensor) -> Tensor:
    """
    Attention of one query per row, [B, 1, H * E], without a gradient: row b sees slots 0..length_B[b] of its
    cache, the last of which is its own new key. On a GPU the host never waits (CUDA graph); a CPU reads slots up
    to the longest row's, so stale slots before that must hold finite numbers.
    """
    if query_B1HE.is_cuda:
        from kernels import layers_triton
        return layers_triton.attend_one(query_B1HE, keys_BKSE, values_BKSE, length_B)
    end = max(length_B.tolist(), default=-1) + 1
    hidden_BS = torch.arange(end) > length_B[:, None]
    mask_BS = query_B1HE.new_zeros(hidden_BS.shape).masked_fill_(hidden_BS, float("-inf"))
    mask = mask_BS[:, None, None, None]
    return attention_by_matmul(query_B1HE, keys_BKSE[:, :, :end], values_BKSE[:, :, :end], mask)
