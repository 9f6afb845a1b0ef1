"""
The gate of a SwiGLU layer (Shazeer, arXiv 2002.05202), of one matrix that holds both halves.

    y_NI = silu(gate_NI) * up_NI,   silu(g) = g * sigmoid(g),   gate and up: the left and the right tmp_dir of gate_up_N2I

Written out, autograd keeps three matrices and puts the gradients of the halves together by a copy. Here one matrix is kept, and its
gradient is written where it belongs. layers_triton.py has the forward pass for a GPU.
"""
import torch
import torch.nn.functional as F
from torch import Tensor


# ---------------------------------------------------------------- the formula, in PyTorch

def reference(gate_up: Tensor) -> Tensor:
    """The definition, [..., 2 I] to [..., I]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


# ---------------------------------------------------------------- forward and backward

def forward(gate_up: Tensor) -> Tensor:
    """The same without a gradient."""
    if gate_up.is_cuda:
        from kernels import layers_triton
        return layers_triton.swiglu(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


class SwiGLU(torch.autograd.Function):
    """`swiglu` with its gradient; silu(gate) is made again."""

    @staticmethod
    def forward(ctx, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return forward(gate_up)

    @staticmethod
    def backward(ctx, upstream: Tensor) -> Tensor:
        gate_up, = ctx.saved_tensors
        (gate, up), gradient = gate_up.chunk(2, dim=-1), torch.empty_like(gate_up)
        for_gate, for_up = gradient.chunk(2, dim=-1)
        torch.ops.aten.silu_backward.grad_input(upstream * up, gate, grad_input=for_gate)
        torch.mul(F.silu(gate), upstream, out=for_up)
        return gradient


# ---------------------------------------------------------------- what everybody calls

def swiglu(gate_up: Tensor) -> Tensor:
    """silu(left tmp_dir) * right tmp_dir over the last dimension, [..., 2 I] to [..., I]."""
    return SwiGLU.apply(gate_up) if torch.is_grad_enabled() and gate_up.requires_grad else forward(gate_up)
