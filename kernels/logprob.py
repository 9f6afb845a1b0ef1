"""
Log-probability and entropy of given tokens, from hidden states and the output matrix.

    z_NV       = hidden_ND @ weight_VD.T / temperature
    logprob_N  = z[n, ids[n]] - logsumexp(z[n])
    entropy_N  = logsumexp(z[n]) - sum_v softmax(z[n])_v z[n, v]

The [N, V] matrix z never exists as a whole. It is made for `CHUNK` tokens at a time, reduced in fp32, and made again when the
gradient asks for it: at 16,384 tokens and 128,256 words that is 1 GiB at a time in place of 7.8 GiB, held twice.
Why fp32: a log-sum-exp over 128k words is about 12, where bf16 moves in steps of 1/16, and a ratio of probabilities off by 6 %
is a different algorithm.
"""
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK = 2048  # tokens whose logits exist at the same time


def log_policy(logits: Tensor, temperature: float) -> Tensor:
    """The policy itself: sampling draws from it, training scores with it, and nothing else defines it. [..., V] to fp32 [..., V]."""
    return F.log_softmax(logits.float() / temperature, dim=-1)


def _chunk(hidden_ND: Tensor, weight_VD: Tensor, ids_N: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logp_NV = log_policy(hidden_ND.float() @ weight_VD.float().T, temperature)
    with torch.no_grad():
        entropy_N = -(logp_NV.exp() * logp_NV).sum(-1)
    return logp_NV.gather(-1, ids_N[:, None]).squeeze(-1), entropy_N


def token_logprob(hidden_ND: Tensor, weight_VD: Tensor, ids_N: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """
    log p(ids[n] | hidden[n]) and the entropy of that distribution in nats, both fp32 [N]. Any float dtype goes in; N may be 0.
    The log-probability carries gradients to `hidden_ND` and `weight_VD`; the entropy is a measurement and carries none.
    """
    parts = [checkpoint(_chunk, hidden_ND[i:i + CHUNK], weight_VD, ids_N[i:i + CHUNK], temperature, use_reentrant=False)
             for i in range(0, max(len(ids_N), 1), CHUNK)]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
