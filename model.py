"""
The transformer, its cache, and how weights come and go.

    ids_BT -> embed -> L x [ norm -> attention -> + -> norm -> SwiGLU -> + ] -> norm -> head(hidden_BTD, weight_VD)

One decoder-only architecture in the variants that open models use: RMSNorm, rotary positions, grouped-query attention, SwiGLU, optional
biases on queries, keys and values (Qwen2), optional norms on queries and keys (Qwen3), optional output matrix tied to the embedding.
A checkpoint is an ordinary Hugging Face folder: `transformers` opens what `save` writes, and `load` opens what `transformers` writes.

    python model.py                       # a random model against transformers: the largest difference of their logits
    python model.py --model FOLDER        # the same for a checkpoint

Shapes, here and in every file: B rows, T positions, S cache slots, V vocabulary, D width, H query heads, K key/value heads,
G = H / K query heads that share a key, E head width, L layers, N tokens or turns in a flat list.
"""
from __future__ import annotations

import json
import math
import sys
from argparse import ArgumentParser
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels.attention import attend, attend_one, precision
from kernels.linear import linear, matmul_fp32
from kernels.logprob import token_logprob
from kernels.norm import rms_norm
from kernels.swiglu import swiglu

if TYPE_CHECKING:   # at run time the functions below import it late: it costs a second, and not every command opens a checkpoint
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")  # the model types whose formulas are below
Head = Callable[[Tensor, Tensor], object]               # (hidden_BTD, weight_VD) -> whatever the caller needs of the logits


def stop(sentence: str) -> NoReturn:
    """Bad input ends here, before any work: one sentence that says what to do, and exit status 2."""
    print(sentence, file=sys.stderr, flush=True)
    raise SystemExit(2)


# ---------------------------------------------------------------- shape

@dataclass(frozen=True)
class ModelConfig:
    """What the formulas need to know, read from a Hugging Face config."""
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_width: int
    inner: int
    vocab: int
    rope_theta: float
    rope_scaling: tuple[float, float, float, float] | None   # Llama 3's: factor, low and high bound in turns, original context
    norm_eps: float
    tied: bool
    qkv_bias: bool
    o_bias: bool
    qk_norm: bool


ROPES = {"default": (), "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}
READ = {"model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "head_dim", "rms_norm_eps", "rope_parameters", "attention_bias", "tie_word_embeddings", "initializer_range", "eos_token_id"}
FIXED = {"hidden_act": "silu", "mlp_bias": False, "attention_dropout": 0.0, "use_sliding_window": False, "sliding_window": None,
         "quantization_config": None}                # fields of which we implement this one value
WITHOUT_EFFECT = {"bos_token_id", "pad_token_id", "use_cache", "max_position_embeddings", "max_window_layers", "pretraining_tp"}


def unsupported(config: PreTrainedConfig) -> dict[str, object]:
    """
    The fields of a config that ask for something that is not implemented here. A field that `transformers` reads and this file does not
    know may only have its default; one that `transformers` does not know means nothing to it either.
    """
    from transformers import PreTrainedConfig
    usual = type(config)().to_dict() | {"layer_types": ["full_attention"] * config.num_hidden_layers} | FIXED
    checked = usual.keys() - READ - WITHOUT_EFFECT - PreTrainedConfig().to_dict().keys()
    rope = config.rope_parameters
    known = {"rope_theta"} | ({"rope_type", *ROPES[rope["rope_type"]]} if rope["rope_type"] in ROPES else set())
    return ({field: value for field, value in config.to_dict().items() if field in checked and value != usual[field]}
            | {field: value for field, value in rope.items() if field not in known})


def read_config(config: PreTrainedConfig, name: str) -> ModelConfig:
    """The shape behind a config. What we do not implement is refused by name, never ignored."""
    if config.model_type not in ARCHITECTURES:
        stop(f"{name}: config.json says model_type = {config.model_type!r}; model.py implements {', '.join(ARCHITECTURES)}.")
    for field, value in unsupported(config).items():
        stop(f"{name}: config.json says {field} = {value!r}, which model.py does not implement; choose another model.")
    rope, bias = config.rope_parameters, getattr(config, "attention_bias", False)
    head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return ModelConfig(layers=config.num_hidden_layers, width=config.hidden_size, heads=config.num_attention_heads,
                 kv_heads=config.num_key_value_heads, head_width=head_width, inner=config.intermediate_size, vocab=config.vocab_size,
                 rope_theta=rope["rope_theta"], rope_scaling=tuple(rope[field] for field in ROPES[rope["rope_type"]]) or None,
                 norm_eps=config.rms_norm_eps, tied=config.tie_word_embeddings, qkv_bias=config.model_type == "qwen2" or bias,
                 o_bias=bias, qk_norm=config.model_type == "qwen3")


# ---------------------------------------------------------------- the cache

class Cache:
    """
    Keys and values of every layer in one block of memory of fixed size. All rows write the same slot at the same time:

        slot    | 0 .. shared | pad_B[b] slots, never seen | the row's own tokens ... | length

    The `shared` slots in front hold a prefix that all rows have in common; rows are padded behind it. `length` counts the slots in use; it
    lies on the device as length_1, from where a step of one token reads it. What such a step would compute anew each time comes with it:
    cosines and sines of all positions, and which slots are padding. Nobody needs the first `front` slots any more. Addresses stay until
    rows leave, so that a step can be recorded. Keys and values are kept in the precision of attention, for bf16 models on a CPU fp64.
    """

    def __init__(self, shape: ModelConfig, rows: int, slots: int, pad_B: Tensor, dtype: torch.dtype, shared: int = 0):
        size, device = (2, shape.layers, rows, shape.kv_heads, slots, shape.head_width), pad_B.device
        self.key_LBKSE, self.value_LBKSE = torch.zeros(size, dtype=precision(dtype, device), device=device)
        self.pad_B, self.shared, self.slots, self.front = pad_B.clone(), shared, slots, 0
        self.length_1 = torch.zeros(1, dtype=torch.long, device=device)
        self.rotation_S2E = rotation(torch.arange(slots, device=device), shape, dtype)
        self.mask_BS = torch.empty(rows, slots, device=device)
        self.hide()

    @property
    def length(self) -> int:
        """Slots in use. To ask for it is to wait for a GPU."""
        return int(self.length_1)

    def hide(self) -> None:
        """mask_BS, to be added to the logits of attention: minus infinity where a row has padding, 0 elsewhere."""
        slot_S = torch.arange(self.slots, device=self.pad_B.device)
        padding_BS = (slot_S >= self.shared) & (slot_S < self.shared + self.pad_B[:, None])
        self.mask_BS.zero_().masked_fill_(padding_BS, float("-inf"))

    def rotations(self, position_BT: Tensor) -> Tensor:
        """rotation_BT2E of these positions."""
        return F.embedding(position_BT, self.rotation_S2E.flatten(1)).unflatten(-1, (2, -1))

    def begin_with(self, prefix: Cache) -> None:
        """Every row begins with the slots of a cache of one row."""
        self.key_LBKSE[:, :, :, :prefix.length] = prefix.key_LBKSE[:, :, :, :prefix.length]
        self.value_LBKSE[:, :, :, :prefix.length] = prefix.value_LBKSE[:, :, :, :prefix.length]
        self.length_1.copy_(prefix.length_1)

    def append(self, layer: int, key_BKTE: Tensor, value_BKTE: Tensor) -> tuple[Tensor, Tensor]:
        """Write one layer's new slots; return all its slots so far. `length` moves once all layers have written."""
        begin, end = self.length, self.length + key_BKTE.shape[2]
        keys_BKSE, values_BKSE = self.key_LBKSE[layer], self.value_LBKSE[layer]
        keys_BKSE[:, :, begin:end], values_BKSE[:, :, begin:end] = key_BKTE, value_BKTE
        return keys_BKSE[:, :, :end], values_BKSE[:, :, :end]

    def append_one(self, layer: int, key_BK1E: Tensor, value_BK1E: Tensor) -> tuple[Tensor, Tensor]:
        """Write one slot of one layer, and return all its slots, used or not. A GPU's host does not learn which it was."""
        keys_BKSE, values_BKSE = self.key_LBKSE[layer], self.value_LBKSE[layer]
        if keys_BKSE.device.type == "cpu":
            self.append(layer, key_BK1E, value_BK1E)
            return keys_BKSE, values_BKSE
        keys_BKSE.index_copy_(2, self.length_1, key_BK1E.to(keys_BKSE.dtype))
        values_BKSE.index_copy_(2, self.length_1, value_BK1E.to(keys_BKSE.dtype))
        return keys_BKSE, values_BKSE

    def place(self, row_N: Tensor, from_N: Tensor, other: Cache) -> None:
        """
        These rows take over the tokens of rows from_N of another cache, which end at the present length. The other one's rows may have more
        in common than the prefix of this one: that goes in front of each row's own tokens.
        """
        length, others, first = self.length, other.length, other.shared + int(other.pad_B[from_N].min())   # before it is padding
        begin, more = length - (others - first), other.shared - self.shared
        self.pad_B[row_N] = other.pad_B[from_N] + length - others
        slot_NX = self.shared + self.pad_B[row_N, None] + torch.arange(more, device=row_N.device)
        for ours_LBKSE, theirs_LBKSE in ((self.key_LBKSE, other.key_LBKSE), (self.value_LBKSE, other.value_LBKSE)):
            ours_LBKSE[:, row_N, :, begin:length] = theirs_LBKSE[:, from_N, :, first:others]
            ours_LBKSE[:, row_N[:, None], :, slot_NX] = theirs_LBKSE[:, 0, :, self.shared:other.shared].permute(2, 0, 1, 3)   # XLKE
        self.hide()

    def slide(self, by: int) -> None:
        """Move all tokens `by` slots to the front, into padding, so that new ones find room behind them."""
        length = self.length
        for block_BKSE in (*self.key_LBKSE, *self.value_LBKSE):
            block_BKSE[:, :, :length - by] = block_BKSE[:, :, by:length].clone()
        self.pad_B.sub_(by).clamp_(min=0)
        self.length_1 -= by
        self.front = max(self.front - by, 0)
        self.hide()

    def keep(self, row_B: Tensor) -> None:
        """Drop all rows but these: finished rows should cost nothing."""
        self.key_LBKSE, self.value_LBKSE = self.key_LBKSE[:, row_B], self.value_LBKSE[:, row_B]
        self.pad_B, self.mask_BS = self.pad_B[row_B], self.mask_BS[row_B]


def visible(pad_B: Tensor, start: int, length: int, dtype: torch.dtype, shared: int = 0) -> Tensor:
    """
    mask_B1TS, to be added to the logits of attention, 0 or minus infinity: the query in slot start + t sees the shared slots and its row's
    own up to itself, padding left out; a padding query sees itself, so that no row of the mask is empty.
    """
    query_T1 = torch.arange(start, start + length, device=pad_B.device)[:, None]
    key_S = torch.arange(start + length, device=pad_B.device)
    is_token_BTS = (key_S < shared) | (key_S >= shared + pad_B[:, None, None])
    sees_BTS = (key_S <= query_T1) & (is_token_BTS | (key_S == query_T1))
    return torch.zeros(sees_BTS.shape, dtype=dtype, device=pad_B.device).masked_fill_(~sees_BTS, float("-inf"))[:, None]


# ---------------------------------------------------------------- layers

class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension; the root mean square in fp32 (Zhang and Sennrich, arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def rope_rates(shape: ModelConfig, device: torch.device) -> Tensor:
    """
    rate_E2: radians per position of each pair of channels (Su et al., arXiv 2104.09864). Llama 3 stretches what turns slowly, so that
    positions beyond the original context look like positions within it: a pair that makes fewer than `low` turns over that context is
    slowed down by `factor`, one that makes more than `high` is left alone, and in between the two are blended.
    """
    rate_E2 = shape.rope_theta ** (-torch.arange(0, shape.head_width, 2, device=device).float() / shape.head_width)
    if shape.rope_scaling is None:
        return rate_E2
    factor, low, high, original = shape.rope_scaling
    turns_E2 = original * rate_E2 / (2 * math.pi)
    kept_E2 = ((turns_E2 - low) / (high - low)).clamp(0, 1)
    return rate_E2 * (kept_E2 + (1 - kept_E2) / factor)


def rotation(position: Tensor, shape: ModelConfig, dtype: torch.dtype) -> Tensor:
    """
    Cosines and sines of each position's angles, [..., 2, E]; the sines of the first tmp_dir carry the minus of the rotation's formula.
    Angles in fp32: bf16 cannot tell position 1000 from 1001.
    """
    angle = position[..., None].float() * rope_rates(shape, position.device)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack((torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)), dim=-2).to(dtype)


def rotate(x_BTHE: Tensor, rotation_BT2E: Tensor) -> Tensor:
    """Rotate each pair (x[e], x[e + E/2]) by its position's angle: the layout of Hugging Face checkpoints."""
    cos_BT1E, sin_BT1E = rotation_BT2E.split(1, dim=-2)
    low, high = x_BTHE.chunk(2, dim=-1)
    return torch.cat((high, low), dim=-1).mul_(sin_BT1E).addcmul_(x_BTHE, cos_BT1E)


class Linear(nn.Linear):
    """The parameters of nn.Linear, and the product of kernels/linear.py."""

    def reset_parameters(self) -> None:
        """Nothing: weights come from `new_model` or a checkpoint, and PyTorch takes a second to get ready for drawing some on no device."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Attention(nn.Module):
    def __init__(self, shape: ModelConfig):
        super().__init__()
        self.heads, self.kv_heads, self.head_width = shape.heads, shape.kv_heads, shape.head_width
        self.qkv_proj = Linear(shape.width, (self.heads + 2 * self.kv_heads) * self.head_width, bias=shape.qkv_bias)
        self.o_proj = Linear(self.heads * self.head_width, shape.width, bias=shape.o_bias)
        self.qk_norm = shape.qk_norm
        if self.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(shape.head_width, shape.norm_eps), RMSNorm(shape.head_width, shape.norm_eps)

    def project(self, x_BTD: Tensor, rotation_BT2E: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """query_BTHE, key_BKTE and value_BKTE."""
        split = self.heads, self.kv_heads
        both_BTJE, value_BTKE = self.qkv_proj(x_BTD).unflatten(-1, (-1, self.head_width)).split((sum(split), self.kv_heads), dim=2)
        if self.qk_norm:
            query_BTHE, key_BTKE = both_BTJE.split(split, dim=2)
            both_BTJE = torch.cat((self.q_norm(query_BTHE), self.k_norm(key_BTKE)), dim=2)
        query_BTHE, key_BTKE = rotate(both_BTJE, rotation_BT2E).split(split, dim=2)
        return query_BTHE, key_BTKE.transpose(1, 2), value_BTKE.transpose(1, 2)

    def forward(self, x_BTD: Tensor, rotation_BT2E: Tensor, mask: Tensor | None, cache: Cache | None, layer: int) -> Tensor:
        query_BTHE, *slots = self.project(x_BTD, rotation_BT2E)
        if cache and mask is None:
            return self.o_proj(attend_one(query_BTHE, *cache.append_one(layer, *slots), cache.mask_BS, cache.length_1, cache.front))
        return self.o_proj(attend(query_BTHE, *(cache.append(layer, *slots) if cache else slots), mask))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer, arXiv 2002.05202)."""

    def __init__(self, shape: ModelConfig):
        super().__init__()
        self.gate_up_proj = Linear(shape.width, 2 * shape.inner, bias=False)
        self.down_proj = Linear(shape.inner, shape.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_up_proj(x)))


class Block(nn.Module):
    def __init__(self, shape: ModelConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(shape.width, shape.norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape.width, shape.norm_eps)
        self.mlp = SwiGLU(shape)

    def forward(self, x_BTD: Tensor, rotation_BT2E: Tensor, mask: Tensor | None, cache: Cache | None, layer: int) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), rotation_BT2E, mask, cache, layer)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))

    def fill(self, x_BTD: Tensor, rotation_BT2E: Tensor, cache: Cache, layer: int) -> None:
        """Leave keys and values in the cache, and nothing else."""
        _, *slots = self.self_attn.project(self.input_layernorm(x_BTD), rotation_BT2E)
        cache.append(layer, *slots)


class Transformer(nn.Module):
    """Parameter names are those of Hugging Face checkpoints without the leading `model.`, but for the matrices of FUSED."""

    def __init__(self, config: PreTrainedConfig, name: str = "model"):
        super().__init__()
        from transformers import GenerationConfig
        self.hf_config, self.config = config, read_config(config, name)
        self.generation = GenerationConfig.from_model_config(config)
        self.embed_tokens = nn.Embedding.from_pretrained(torch.empty(self.config.vocab, self.config.width), freeze=False)
        self.layers = nn.ModuleList(Block(self.config) for _ in range(self.config.layers))
        self.norm = RMSNorm(self.config.width, self.config.norm_eps)
        self.lm_head = nn.Identity() if self.config.tied else Linear(self.config.width, self.config.vocab, bias=False)
        self.recompute = False   # whether a backward pass makes each layer's activations again instead of keeping them

    def forward(self, ids_BT: Tensor, head: Head | None, pad_B: Tensor | None = None, cache: Cache | None = None) -> object:
        """
        Run the layers and return head(hidden_BTD, weight_VD). `pad_B` counts the padding slots on the left of each row; padding on the
        right needs no mask, because nothing looks to the right. With a cache, ids_BT are the next T slots of every row; without a head,
        filling it is all that is wanted, and the last layer stops at its keys and values.
        The head runs inside the forward pass because only there does a sharded model hold its output matrix in full.
        """
        x_BTD, T, mask = self.embed_tokens(ids_BT), ids_BT.shape[1], None
        slot_T = torch.arange(T, device=ids_BT.device)
        if cache:
            position_BT = (cache.length_1 + slot_T - cache.pad_B[:, None]).clamp(min=cache.shared)
            rotation_BT2E = cache.rotations(position_BT)
            one = T == 1 and head is not None   # of every row; what only fills the cache may be padding, which sees nothing
            mask = None if one else visible(cache.pad_B, cache.length, T, x_BTD.dtype, cache.shared)
        elif pad_B is not None:
            rotation_BT2E = rotation((slot_T - pad_B[:, None]).clamp(min=0), self.config, x_BTD.dtype)
            mask = visible(pad_B, 0, T, x_BTD.dtype)
        else:
            rotation_BT2E = rotation(slot_T[None], self.config, x_BTD.dtype)
        for layer, block in enumerate(self.layers if head else self.layers[:-1]):
            given = (x_BTD, rotation_BT2E, mask, cache, layer)
            x_BTD = checkpoint(block, *given, use_reentrant=False) if self.recompute and torch.is_grad_enabled() else block(*given)
        if head is None:
            self.layers[-1].fill(x_BTD, rotation_BT2E, cache, len(self.layers) - 1)
        if cache:
            cache.length_1 += T
        return head(self.norm(x_BTD), self.embed_tokens.weight if self.config.tied else self.lm_head.weight) if head else None


def last_logits(hidden_BTD: Tensor, weight_VD: Tensor) -> Tensor:
    """The head of decoding: logits_BV of the last slot, never rounded below fp32."""
    return matmul_fp32(hidden_BTD[:, -1], weight_VD)


def score(model: Transformer, ids_BT: Tensor, mask_BT: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """
    logprob_BT[b, t] = log p(ids[b, t] | ids[b, :t]) where mask_BT, 0 elsewhere, and the entropy_BT of each such choice in nats. This is
    the one place that shifts: column 0 is always 0, because nothing predicts it. Rows are padded on the right.
    """
    chosen_BT = mask_BT.clone()
    chosen_BT[:, 0] = False
    before_BT = F.pad(chosen_BT[:, 1:], (0, 1))  # the slot that predicts each chosen one

    def head(hidden_BTD: Tensor, weight_VD: Tensor) -> tuple[Tensor, Tensor]:
        return token_logprob(hidden_BTD[before_BT], weight_VD, ids_BT[chosen_BT], temperature)

    logprob_N, entropy_N = model(ids_BT, head)
    blank_BT = torch.zeros(ids_BT.shape, device=ids_BT.device)
    return blank_BT.masked_scatter(chosen_BT, logprob_N), blank_BT.masked_scatter(chosen_BT, entropy_N)


# ---------------------------------------------------------------- weights come and go

def new_model(config: PreTrainedConfig, seed: int) -> Transformer:
    """A random_init model: weights normal with deviation `config.initializer_range`, norms 1, biases 0; a function of the seed alone."""
    model, generator = Transformer(config), torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif parameter.dim() == 2:
            nn.init.normal_(parameter, std=config.initializer_range, generator=generator)
    return model


def find_checkpoint(name: str) -> Path:
    """The checkpoint folder behind a run folder, a checkpoint folder, or a hub name; anything else is refused."""
    folder = Path(name)
    if (folder / "latest").is_file():
        return folder / (folder / "latest").read_text().strip()
    if not folder.exists():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
        try:
            folder = Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"],
                                            ignore_patterns=["original/*", "consolidated*"]))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError):
            stop(f"{name}: no such folder, and no hub model of that name can be reached; give a folder with config.json and weights.")
    for needed in ("config.json", "*.safetensors"):
        if not list(folder.glob(needed)):
            stop(f"{folder}: no {needed} there; give a Hugging Face folder with safetensors weights, or a run folder past its warm start.")
    return folder


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a checkpoint's weights: its index knows; some folders hold a second copy in another format."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return sorted({folder / file for file in json.loads(index.read_text())["weight_map"].values()})
    whole = folder / "model.safetensors"
    return [whole] if whole.exists() else sorted(folder.glob("*.safetensors"))


def load(name: str, dtype: torch.dtype = torch.float32) -> Transformer:
    """Open a checkpoint: safetensors only, one file or many, every weight accounted for."""
    from transformers import AutoConfig, GenerationConfig
    folder = find_checkpoint(name)
    try:
        with torch.device("meta"):
            model = Transformer(AutoConfig.from_pretrained(folder), name)
        weights = {}
        for file in weight_files(folder):
            weights |= {key.removeprefix("model."): tensor.to(dtype) for key, tensor in load_file(file).items()}
        if model.config.tied:
            weights.pop("lm_head.weight", None)
        model.load_state_dict(fuse(weights), assign=True)
        if (folder / "generation_config.json").exists():
            model.generation = GenerationConfig.from_pretrained(folder)
    except (OSError, SafetensorError, RuntimeError, KeyError, ValueError, json.JSONDecodeError) as error:
        stop(f"{folder}: the checkpoint cannot be read ({str(error).splitlines()[0]}); it is damaged or of another shape, give another.")
    return model


def open_tokenizer(name: str, chat: bool = True) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer. With `chat` it must have a chat template that can be filled, because both players speak through it."""
    from transformers import AutoTokenizer
    message, rendered = "How are you?", ""
    try:
        tokenizer = AutoTokenizer.from_pretrained(find_checkpoint(name))
        if chat and tokenizer.chat_template:
            rendered = tokenizer.apply_chat_template([{"role": "user", "content": message}], tokenize=False, add_generation_prompt=True)
    except Exception as error:   # of a damaged file; the tokenizers library has no narrower class
        stop(f"{name}: its tokenizer or chat template cannot be read ({' '.join(str(error).split())[:120]}); it is damaged, give another.")
    if chat and message not in rendered:
        stop(f"{name}: its tokenizer has no chat template that shows a user's message; choose an instruction-tuned model.")
    return tokenizer


def stop_ids(model: Transformer, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a reply, by the generation config and by the tokenizer."""
    listed = [model.generation.eos_token_id, tokenizer.eos_token_id]
    return sorted({i for entry in listed for i in (entry if isinstance(entry, list) else [entry]) if i is not None})


FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}   # in checkpoints; one product here


def fuse(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our parameters from those of a checkpoint."""
    weights = dict(weights)
    for whole, parts in FUSED.items():
        for key in [key for key in weights if f".{parts[0]}." in key]:
            weights[key.replace(parts[0], whole)] = torch.cat([weights.pop(key.replace(parts[0], part)) for part in parts])
    return weights


def unfuse(weights: dict[str, Tensor], shape: ModelConfig) -> dict[str, Tensor]:
    """The parameters of a Hugging Face checkpoint, under its names, from ours."""
    rows = {"qkv_proj": [heads * shape.head_width for heads in (shape.heads, shape.kv_heads, shape.kv_heads)],
            "gate_up_proj": [shape.inner, shape.inner]}
    theirs = {}
    for key, tensor in weights.items():
        whole = key.split(".")[-2]
        pieces = zip(FUSED[whole], tensor.split(rows[whole])) if whole in FUSED else [(whole, tensor)]
        theirs |= {("" if whole == "lm_head" else "model.") + key.replace(whole, part): piece for part, piece in pieces}
    return theirs


def save(folder: Path, weights: dict[str, Tensor], model: Transformer, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write a Hugging Face folder: these weights (under this file's names; `model` itself may be sharded), configs and tokenizer."""
    from huggingface_hub import save_torch_state_dict
    folder.mkdir(parents=True, exist_ok=True)
    # safetensors wants each tensor in memory of its own: a slice of a common buffer is copied, the rest of a large model is not
    own = {key: tensor if tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
           else tensor.clone(memory_format=torch.contiguous_format) for key, tensor in unfuse(weights, model.config).items()}
    save_torch_state_dict({key: tensor.detach() for key, tensor in own.items()}, folder)
    config = model.hf_config
    config.architectures = [{"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[config.model_type] + "ForCausalLM"]
    config.dtype = next(iter(weights.values())).dtype
    config.save_pretrained(folder)
    model.generation.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig  # the reference to compare with
    cli = ArgumentParser(description="Compare this file's logits with those of transformers, on random tokens.")
    cli.add_argument("--model", help="a checkpoint or run folder [a small random Llama]")
    args = cli.parse_args()
    small = dict(vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    ours = load(args.model) if args.model else new_model(LlamaConfig(**small), seed=0)
    theirs = AutoModelForCausalLM.from_config(ours.hf_config, dtype=torch.float32).eval()
    theirs.load_state_dict(unfuse(ours.state_dict(), ours.config), strict=not ours.config.tied)
    ids_BT = torch.randint(ours.config.vocab, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours_BTV = ours(ids_BT, lambda hidden_BTD, weight_VD: hidden_BTD @ weight_VD.T)
        theirs_BTV = theirs(ids_BT).logits
    print(f"{sum(p.numel() for p in ours.parameters()):,} parameters, {ours.config}")
    print(f"largest difference to transformers over {ours_BTV.numel():,} logits: {(ours_BTV - theirs_BTV).abs().max():.1e}, "
          f"where the largest logit is {theirs_BTV.abs().max():.1f}")


if __name__ == "__main__":
    main()
