"""
Softmax attention, where G query heads share a key head.

    weight_BKGTS = softmax_s(query_BKGTE . key_BKSE / sqrt(E) + mask)        out_BKGTE = weight_BKGTS value_BKSE

Written out, it is two products and a softmax, and all G * T queries of a key head stand in one matrix, so that each key is read once: on a
CPU this is faster than PyTorch's routine while there are few positions, and that routine takes exponentials to 20 bits there. Over many
positions the matrix of weights no longer fits a cache, and PyTorch's routine, which never writes it down, is better, as it always is on a
GPU. The sampler asks with one query per row of keys in a cache: for that layers_triton.py has a kernel.

With fewer than four queries in one matrix, the products of a CPU add in another order than with many, and are slower. So the sampler fills
up with zeros, and gets the logits of the trainer to the bit: rounding one of 50 moves its weight by as much as it moves the logit, 4e-6.

A CPU attends in fp64 for bf16 models. Rows of all other products there are the same to the bit in whatever company, but the sums of
attention run in another order in the sampler than in the trainer; in fp32 that turns a bf16 the other way now and then, and thirty layers
make of it log-probabilities that differ by .03 (SmolLM2). In fp64 it never does: they differ by 5e-7, which is the head's fp32.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

FEW = 128    # positions
LEAST = 4    # queries in a product


def precision(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What a model of this type attends in, and keeps keys and values in."""
    return torch.float64 if device.type == "cpu" and dtype != torch.float32 else dtype


# ---------------------------------------------------------------- the formula, in PyTorch

def causal(T: int, like: Tensor) -> Tensor:
    """mask_TT: a position sees itself and what is before it."""
    return torch.full((T, T), float("-inf"), dtype=like.dtype, device=like.device).triu(1)


def reference(query_BTHE: Tensor, key_BKSE: Tensor, value_BKSE: Tensor, mask: Tensor) -> Tensor:
    """The definition, [B, T, H * E]; the mask, of zeros and minus infinities, is one of [B, 1, T, S] or broadcasts to it."""
    (B, T, H, E), (K, S) = query_BTHE.shape, key_BKSE.shape[1:3]
    query_BKNE = (query_BTHE * E ** -0.5).transpose(1, 2).reshape(B, K, H // K * T, E)   # N = G * T, positions innermost
    logit_BHTS = (query_BKNE @ key_BKSE.mT).view(B, H, T, S) + mask
    mixed_BKNE = logit_BHTS.softmax(-1).view(B, K, H // K * T, S) @ value_BKSE
    return mixed_BKNE.view(B, H, T, E).transpose(1, 2).flatten(2)


# ---------------------------------------------------------------- the same for one query per row, on a CPU

def one_query(query_B1HE: Tensor, key_BKSE: Tensor, value_BKSE: Tensor, mask_BS: Tensor) -> Tensor:
    """The same, [B, 1, H * E], without a gradient."""
    (B, _, H, E), K = query_B1HE.shape, key_BKSE.shape[1]
    query_BKGE = (query_B1HE * E ** -0.5).view(B, K, H // K, E)
    query_BKGE = F.pad(query_BKGE, (0, 0, 0, max(0, LEAST - H // K)))
    logit_BKGS = (query_BKGE @ key_BKSE.mT).add_(mask_BS[:, None, None])
    return (logit_BKGS.softmax(-1) @ value_BKSE)[:, :, :H // K].reshape(B, 1, H * E)


# ---------------------------------------------------------------- the same by PyTorch's routine

def fused(query_BTHE: Tensor, key_BKSE: Tensor, value_BKSE: Tensor, mask: Tensor | None) -> Tensor:
    """The same; without a mask it is causal over T = S, and takes no memory for one."""
    mixed_BHTE = F.scaled_dot_product_attention(query_BTHE.transpose(1, 2), key_BKSE, value_BKSE, mask, is_causal=mask is None,
                                                enable_gqa=query_BTHE.shape[2] != key_BKSE.shape[1])
    return mixed_BHTE.transpose(1, 2).flatten(2)


# ---------------------------------------------------------------- what everybody calls

def attend(query_BTHE: Tensor, key_BKSE: Tensor, value_BKSE: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of T queries per row to S keys, [B, T, H * E]; without a mask it is causal over T = S."""
    T, dtype, within = query_BTHE.shape[1], query_BTHE.dtype, precision(query_BTHE.dtype, query_BTHE.device)
    query_BTHE, key_BKSE, value_BKSE = query_BTHE.to(within), key_BKSE.to(within), value_BKSE.to(within)
    if T > FEW or query_BTHE.is_cuda:
        return fused(query_BTHE, key_BKSE, value_BKSE, mask if mask is None else mask.to(within)).to(dtype)
    return reference(query_BTHE, key_BKSE, value_BKSE, causal(T, query_BTHE) if mask is None else mask).to(dtype)


def attend_one(query_B1HE: Tensor, keys_BKSE: Tensor, values_BKSE: Tensor, mask_BS: Tensor, slot_1: Tensor, front: int = 0) -> Tensor:
    """
    Attention of one query per row to slots 0 .. slot_1[0] of a cache, [B, 1, H * E], without a gradient. mask_BS is fp32, zeros and minus
    infinities; the first `front` slots are hidden in any row that matters, and a CPU leaves them out. On a GPU nothing waits for the host.
    """
    if query_B1HE.is_cuda:
        from kernels import layers_triton
        return layers_triton.attend_one(query_B1HE, keys_BKSE, values_BKSE, mask_BS, slot_1)
    end = int(slot_1) + 1
    seen = keys_BKSE[:, :, front:end], values_BKSE[:, :, front:end], mask_BS[:, front:end]
    return one_query(query_B1HE.to(keys_BKSE.dtype), *seen).to(query_B1HE.dtype)
