"""
Log-probability and entropy of given tokens, from hidden states and the output matrix.

    z_NV       = hidden_ND @ weight_VD.T / temperature
    logprob_N  = z[n, ids[n]] - logsumexp(z[n])
    entropy_N  = logsumexp(z[n]) - sum_v softmax(z[n])_v z[n, v]

The [N, V] matrix z never exists as a whole; at 16,384 tokens and 128,256 words it would take 7.8 GiB in fp32, twice. The forward pass
reduces it piece by piece and keeps one number per token, the log-sum-exp; the backward pass makes it again, a slice of the vocabulary at a
time. Here both are plain PyTorch, the path of a CPU; logprob_triton.py has the same two functions as kernels for a GPU.

Logits stay in fp32 from the product to the result. A log-sum-exp over 128k words is about 12, where bf16 moves in steps of 1/16, and a
ratio of probabilities off by 6 % is a different algorithm.
"""
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.linear import HAS_BF16, linear, widened

PIECE = {"cpu": 2 ** 20, "cuda": 2 ** 27}   # logits, or gradients of logits, that exist at the same time
LEAST = 256                                 # rows or columns of such a piece at least: thin matrix products are slow


# ---------------------------------------------------------------- the formula, in PyTorch

def log_policy(logits: Tensor, temperature: float) -> Tensor:
    """The policy itself, [..., V] to fp32 [..., V]: sampling draws from it, and token_logprob is tested against it."""
    return F.log_softmax(logits.float() / temperature, dim=-1)


def reference(hidden_ND: Tensor, weight_VD: Tensor, ids_N: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The definition, with the whole matrix: what all other code here is tested against."""
    logp_NV = log_policy(hidden_ND.float() @ weight_VD.float().T, temperature)
    return logp_NV.gather(-1, ids_N[:, None]).squeeze(-1), -(logp_NV.exp() * logp_NV).sum(-1).detach()


# ---------------------------------------------------------------- the same, piece by piece

def statistics(hidden_ND: Tensor, weight_VD: Tensor, ids_N: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """lse_N, the target's logit target_N, and entropy_N, some tokens at a time."""
    def piece(hidden_ND: Tensor, ids_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z_NV = linear(hidden_ND.float() / temperature, weight_VD)
        target_N = z_NV.gather(-1, ids_N[:, None]).squeeze(-1)
        max_N1 = z_NV.amax(-1, keepdim=True)
        below_NV = z_NV.sub_(max_N1)
        p_NV = below_NV.softmax(-1)
        log_sum_N = -p_NV.amax(-1).log()       # the largest p is exp(0) over the sum of all
        return max_N1.squeeze(-1) + log_sum_N, target_N, log_sum_N - torch.linalg.vecdot(p_NV, below_NV)

    rows, weight_VD = max(LEAST, PIECE["cpu"] // len(weight_VD)), weight_VD.float()
    return tuple(torch.cat(part) for part in zip(*map(piece, hidden_ND.split(rows), ids_N.split(rows))))


def slice_gradient(hidden_ND: Tensor, weight_CD: Tensor, ids_N: Tensor, lse_N: Tensor, upstream_N: Tensor, temperature: float,
                   first: int) -> Tensor:
    """
    gradient_NC[n, c] = upstream[n] * (1[first + c = ids[n]] - p[n, first + c]) / temperature for a slice of the vocabulary, in the
    precision of the hidden states.
    """
    scale_N1, C = (upstream_N / temperature)[:, None], len(weight_CD)
    gradient_NC = linear(hidden_ND.float() / temperature, weight_CD.float()).sub_(lse_N[:, None]).exp_().mul_(-scale_N1)
    inside_N = (ids_N >= first) & (ids_N < first + C)
    place_N1 = (ids_N - first).clamp(0, C - 1)[:, None]
    return gradient_NC.scatter_add_(1, place_N1, scale_N1 * inside_N[:, None]).to(hidden_ND.dtype)


# ---------------------------------------------------------------- forward and backward

def slice_width(N: int, device_type: str) -> int:
    """Words of the vocabulary whose gradients exist at the same time."""
    return max(LEAST, PIECE[device_type] // max(1, N))


def add_product(sum_ND: Tensor, a_NC: Tensor, b_CD: Tensor) -> None:
    """sum_ND += a_NC @ b_CD, the sum in fp32; on a GPU without a copy of the product."""
    if a_NC.is_cuda and a_NC.dtype != torch.float32:
        torch.addmm(sum_ND, a_NC, b_CD, out_dtype=torch.float32, out=sum_ND)
    else:
        sum_ND += linear(a_NC, b_CD.T)


def head_bytes(N: int, D: int, V: int, element: int, device_type: str) -> int:
    """
    Bytes that both passes over N tokens take at their peak, beyond the inputs, of `element` bytes a number, and the gradients that they
    return: the fp32 sum for the hidden states, and a slice of the gradients of logits. A CPU widens its factors to fp32, and keeps
    products; its forward pass needs two pieces of logits, and the output matrix in fp32. One that cannot multiply in bf16 does all of it in
    fp32, and rounds gradients at the end.
    """
    if device_type == "cpu" and element < 4 and not HAS_BF16:
        return 8 * (N + V) * D + head_bytes(N, D, V, 4, device_type)
    C, rows, narrow = min(V, slice_width(N, device_type)), min(N, max(LEAST, PIECE["cpu"] // V)), element < 4
    sums = 4 * N * D * narrow
    if device_type != "cpu":
        return sums + element * N * C
    making, using = 4 * (N * C + (N + C * narrow) * D), N * C * (element + 4 * narrow) + element * (N + C) * D
    return max(4 * (2 * rows * V + rows * D * (1 + narrow) + V * D * narrow), sums + max(making, using))


class TokenLogprob(torch.autograd.Function):
    """token_logprob by a pair of functions, (statistics, slice_gradient); one number per token is kept for the backward pass."""

    @staticmethod
    def forward(ctx, hidden_ND: Tensor, weight_VD: Tensor, ids_N: Tensor, temperature: float,
                by: tuple[Callable, Callable]) -> tuple[Tensor, Tensor]:
        hidden_ND, weight_VD, ids_N = hidden_ND.contiguous(), weight_VD.contiguous(), ids_N.contiguous()
        lse_N, target_N, entropy_N = by[0](hidden_ND, weight_VD, ids_N, temperature)
        ctx.save_for_backward(hidden_ND, weight_VD, ids_N, lse_N)
        ctx.temperature, ctx.slice_gradient = temperature, by[1]
        ctx.mark_non_differentiable(entropy_N)
        return (target_N - lse_N).clamp(max=0.0), entropy_N

    @staticmethod
    def backward(ctx, upstream_N: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        hidden_ND, weight_VD, ids_N, lse_N = ctx.saved_tensors
        grad_hidden_ND, grad_weight_VD = torch.zeros(hidden_ND.shape, device=hidden_ND.device), torch.zeros_like(weight_VD)
        columns = slice_width(len(ids_N), hidden_ND.device.type)
        for first in range(0, len(weight_VD) if len(ids_N) else 0, columns):
            weight_CD = weight_VD[first:first + columns]
            gradient_NC = ctx.slice_gradient(hidden_ND, weight_CD, ids_N, lse_N, upstream_N.contiguous(), ctx.temperature, first)
            add_product(grad_hidden_ND, gradient_NC, weight_CD)
            grad_weight_VD[first:first + columns] = linear(gradient_NC.T, hidden_ND.T)
            del gradient_NC   # or the next slice would stand beside this one
        return grad_hidden_ND.to(hidden_ND.dtype), grad_weight_VD, None, None, None


# ---------------------------------------------------------------- what everybody calls

def engine(device_type: str) -> tuple[Callable, Callable]:
    """(statistics, slice_gradient) for a device. Triton is imported where it is needed: it costs a third of a second."""
    if device_type == "cpu":
        return statistics, slice_gradient
    from kernels import logprob_triton
    return logprob_triton.statistics, logprob_triton.slice_gradient


def token_logprob(hidden_ND: Tensor, weight_VD: Tensor, ids_N: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """
    log p(ids[n] | hidden[n]) and the entropy of that distribution in nats, both fp32 [N]. Any float dtype goes in; N may be 0.
    The log-probability carries gradients to `hidden_ND` and `weight_VD`; the entropy is a measurement and carries none.
    """
    return TokenLogprob.apply(widened(hidden_ND), widened(weight_VD), ids_N, temperature, engine(hidden_ND.device.type))
