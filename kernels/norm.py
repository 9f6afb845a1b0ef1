"""
The norm of a transformer (Zhang and Sennrich, arXiv 1910.07467), and its gradients.

    y_ND = round(n_ND) * weight_D,   n_ND = x_ND * r_N1,   r = 1 / sqrt(mean_d(x^2) + eps)
    grad_x = r (g - n mean_d(g n)),  g = upstream * weight        grad_weight_D = sum_n upstream * n

The root mean square and n are fp32; n is rounded to the precision of x before the weight, as Llama does it. Two things are kept for the
backward pass, x and one number a row. layers_triton.py has the forward pass for a GPU.
"""
import torch
from torch import Tensor


# ---------------------------------------------------------------- the formula, in PyTorch

def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """r, fp32, [..., 1]: 1 / sqrt(|x|^2 / D + eps)."""
    length = torch.linalg.vector_norm(x.float(), dim=-1, keepdim=True)
    return length.new_full((), eps).addcmul(length, length, value=1 / x.shape[-1]).rsqrt_()


def reference(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """The definition, over the last dimension."""
    return (x.float() * inverse_rms(x, eps)).to(x.dtype) * weight_D


# ---------------------------------------------------------------- forward and backward

def forward(x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y and r, without a gradient."""
    if x.is_cuda:
        from kernels import layers_triton
        return layers_triton.rms_norm(x, weight_D, eps)
    r = inverse_rms(x, eps)
    return (x.float() * r).to(x.dtype).mul_(weight_D), r


class RMSNorm(torch.autograd.Function):
    """`rms_norm` with its two gradients."""

    @staticmethod
    def forward(ctx, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        y, r = forward(x, weight_D, eps)
        ctx.save_for_backward(x, weight_D, r)
        return y

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight_D, r = ctx.saved_tensors
        n, g = x.float() * r, (upstream * weight_D).float()
        grad_weight_D = (upstream * n).flatten(0, -2).sum(0).to(weight_D.dtype)
        grad_x = (g - n * (g * n).mean(-1, keepdim=True)) * r
        return grad_x.to(x.dtype), grad_weight_D, None


# ---------------------------------------------------------------- what everybody calls

def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """The norm over the last dimension, in the precision of x."""
    if torch.is_grad_enabled() and (x.requires_grad or weight_D.requires_grad):
        return RMSNorm.apply(x, weight_D, eps)
    return forward(x, weight_D, eps)[0]
