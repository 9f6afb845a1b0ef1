"""
Log-probability and entropy of tokens, from hidden states and the output matrix (the "head").

    z_NV       = hidden_ND @ weight_VD.T / temperature
    logprob_N  = z[n, ids[n]] - logsumexp(z[n])
    entropy_N  = logsumexp(z[n]) - sum_v softmax(z[n])_v z[n, v]        in nats

The whole matrix z never exists: for 16,384 tokens and 128,256 words it takes 7.8 GiB in fp32, and its
gradient as much again. The forward pass computes z for some tokens at a time and keeps one number per token,
the log-sum-exp. The backward pass computes z again, for a slice of the vocabulary at a time:

    grad_z[n, v] = grad_logprob[n] * (1[v = ids[n]] - exp(z[n, v] - lse[n])) / temperature

Logits stay fp32 from the matmul to the result. A log-sum-exp over 128k words is about 12, where bf16 moves in
steps of 1/16; a ratio of probabilities that is wrong by 6 % is a different algorithm.

    python -m pytest tests/test_kernels.py        # against the dense formula in fp64
"""
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

PIECE = {"cpu": 2**20, "cuda": 2**27}   # logits, or gradients of logits, of one piece
MIN_SIDE = 256                          # fewest rows or columns of a piece: thin matmuls are slow
MAX_MISMATCH = 5e-3                     # nats; in bf16 a matmul changes with its batch

# ---------------------------------------------------------------- the formula
def log_policy(logits: Tensor, temperature: float) -> Tensor:
    """The policy, [..., V] to fp32 [..., V]: sampling draws from it. token_logprob is the same, in pieces."""
    return F.log_softmax(logits.float() / temperature, dim=-1)

def importance_weight(log_ratio_BT: Tensor) -> Tensor:
    """
    weight_BT from the trainer's minus the sampler's log-probability: e^log_ratio, at most 2 (truncated
    importance sampling, Ionides 2008); 1 where the two differ by no more than MAX_MISMATCH.
    """
    return log_ratio_BT.exp().clamp(max=2.0).where(log_ratio_BT.abs() > MAX_MISMATCH, 1.0)

# ---------------------------------------------------------------- the same in pieces, on a CPU
def statistics(
    hidden_ND: Tensor, weight_VD: Tensor, ids_N: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(lse_N, logprob_N, entropy_N), all fp32, some tokens at a time."""
    # three tensors, not views of one: FSDP warns of outputs that are views
    lse_N, logprob_N, entropy_N = (torch.empty(len(ids_N)) for _ in range(3))
    rows = max(MIN_SIDE, PIECE["cpu"] // len(weight_VD))
    for start in range(0, len(ids_N), rows):
        piece = slice(start, start + rows)
        target_N1 = ids_N[piece, None]
        z_NV = F.linear(hidden_ND[piece] / temperature, weight_VD)
        target_logit_N = z_NV.gather(-1, target_N1).squeeze(-1)
        logp_NV = z_NV.log_softmax(-1)
        del z_NV   # so that two matrices of this size exist at a time, and not three
        logprob_N[piece] = logp_NV.gather(-1, target_N1).squeeze(-1)
        lse_N[piece] = target_logit_N - logprob_N[piece]
        entropy_N[piece] = -torch.linalg.vecdot(logp_NV.exp(), logp_NV)
    return lse_N, logprob_N, entropy_N

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
    C = len(weight_CD)
    scale_N1 = grad_logprob_N[:, None] / temperature
    z_NC = F.linear(hidden_ND / temperature, weight_CD)
    # In place, because N * C numbers are the most that should exist at a time.
    grad_NC = z_NC.sub_(lse_N[:, None]).exp_().mul_(-scale_N1)
    column_N1 = ids_N[:, None] - first
    is_here_N1 = (column_N1 >= 0) & (column_N1 < C)
    return grad_NC.scatter_add_(1, column_N1.clamp(0, C - 1), scale_N1 * is_here_N1)

# ---------------------------------------------------------------- forward and backward
def slice_words(N: int, device_type: str) -> int:
    """Words of the vocabulary whose gradients exist at the same time."""
    words = PIECE[device_type] // max(1, N)
    return max(MIN_SIDE, words - words % 128)   # rows that begin at odd addresses make a GPU's matmul slow

def head_bytes(N: int, D: int, V: int) -> int:
    """
    Bytes that token_logprob takes at its peak on a GPU in bf16, forward and backward over N tokens, beyond
    its inputs and the gradients that it returns.
    """
    C = min(V, slice_words(N, "cuda"))
    # the fp32 sum for the hidden states, and a slice of the gradients of logits and of weights
    return 4 * N * D + 2 * C * (N + D)

def add_matmul(sum_ND: Tensor, a_NC: Tensor, b_CD: Tensor) -> None:
    """sum_ND += a_NC @ b_CD in fp32; on a GPU without a copy of the factors or of their product."""
    if a_NC.is_cuda and a_NC.dtype != torch.float32:
        torch.addmm(sum_ND, a_NC, b_CD, out_dtype=torch.float32, out=sum_ND)
    else:
        sum_ND += a_NC.float() @ b_CD.float()

class TokenLogprob(torch.autograd.Function):
    """token_logprob by two functions, `statistics` and `slice_gradient`. It keeps one number per token."""

    @staticmethod
    def forward(
        ctx,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        ids_N: Tensor,
        temperature: float,
        functions: tuple[Callable, Callable],
    ) -> tuple[Tensor, Tensor]:
        """logprob_N, and entropy_N without a gradient."""
        compute_statistics, ctx.slice_gradient = functions
        ctx.temperature = temperature
        tensors = [hidden_ND.contiguous(), weight_VD.contiguous(), ids_N.contiguous()]
        lse_N, logprob_N, entropy_N = compute_statistics(*tensors, temperature)
        ctx.save_for_backward(*tensors, lse_N)
        ctx.mark_non_differentiable(entropy_N)
        return logprob_N, entropy_N

    @staticmethod
    def backward(ctx, grad_logprob_N: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        """Gradients of hidden_ND and weight_VD, a slice of the vocabulary at a time."""
        hidden_ND, weight_VD, ids_N, lse_N = ctx.saved_tensors
        grad_logprob_N = grad_logprob_N.contiguous()
        N = len(ids_N)
        # fp32, because it is a sum over all slices; each row of the other gradient belongs to one slice.
        grad_hidden_ND = torch.zeros_like(hidden_ND, dtype=torch.float32)
        grad_weight_VD = torch.zeros_like(weight_VD)
        words = slice_words(N, hidden_ND.device.type)
        for first in range(0, len(weight_VD) if N else 0, words):
            weight_CD = weight_VD[first : first + words]
            grad_NC = ctx.slice_gradient(
                hidden_ND, weight_CD, ids_N, lse_N, grad_logprob_N, ctx.temperature, first
            )
            add_matmul(grad_hidden_ND, grad_NC, weight_CD)
            grad_weight_VD[first : first + words] = grad_NC.T @ hidden_ND
            del grad_NC   # before the next slice is made
        return grad_hidden_ND.to(hidden_ND.dtype), grad_weight_VD, None, None, None

# ---------------------------------------------------------------- the public function
def functions_for(device_type: str) -> tuple[Callable, Callable]:
    """(statistics, slice_gradient) for a device."""
    if device_type == "cpu":
        return statistics, slice_gradient
    from kernels import logprob_triton   # here, because Triton exists on Linux only
    return logprob_triton.statistics, logprob_triton.slice_gradient

def token_logprob(
    hidden_ND: Tensor, weight_VD: Tensor, ids_N: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """
    log p(ids[n] | hidden[n]) and the entropy of that distribution in nats, both fp32 [N]. The inputs have any
    float dtype; N may be 0. Gradients of the log-probability flow to hidden_ND and weight_VD; the entropy is
    only measured and has none.
    """
    device_type = hidden_ND.device.type
    if device_type == "cpu":
        hidden_ND, weight_VD = hidden_ND.float(), weight_VD.float()
    return TokenLogprob.apply(hidden_ND, weight_VD, ids_N, temperature, functions_for(device_type))
