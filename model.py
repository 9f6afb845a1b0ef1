"""
The transformer, its key-value cache, and how weights come and go.

    ids_BT -> embed -> L x [norm, attention, +, norm, SwiGLU, +] -> norm -> head(hidden_BTD, weight_VD)

One decoder-only architecture in the variants that open models use: RMSNorm, rotary positions, grouped-query
attention, SwiGLU, optional biases on queries, keys and values (Qwen2), optional norms on queries and keys
(Qwen3), and an output matrix that may be tied to the embedding. A checkpoint is an ordinary Hugging Face
folder: `transformers` opens what `save` writes, and `load` opens what `transformers` writes.

    python model.py                       # a random model's logits against those of transformers
    python model.py --model FOLDER        # the same for a checkpoint

Tensor names end in their shape, here and in every file: B rows, T positions, S cache slots, V vocabulary, D
model width, H query heads, K key/value heads, G = H / K query heads that share a key head, E head width, L
layers, N tokens or turns in a flat list, I the width of the feed-forward layer.
"""
from __future__ import annotations

from kernels import CommandLine, set_threads, stop  # before torch, which reads the OpenMP setting in there
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels.layers import attend, attend_one, matmul_fp32, rms_norm, swiglu
from kernels.logprob import token_logprob

if TYPE_CHECKING:  # functions import transformers when they run: it takes a second, --help should not wait
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

# (hidden_BTD, weight_VD) -> whatever the caller needs of the logits
Head = Callable[[Tensor, Tensor], object]

# ---------------------------------------------------------------- configuration
@dataclass(frozen=True)
class ModelConfig:
    """What the formulas below need to know of a Hugging Face config."""
    layers: int
    dim: int       # of the residual stream, D
    heads: int     # query heads, H
    kv_heads: int  # key and value heads, K
    head_dim: int  # of one head, E
    ffn_dim: int   # of the feed-forward layer, I
    vocab: int
    rope_theta: float
    rope_scaling: tuple[float, float, float, float] | None  # Llama 3's, see rope_frequencies
    norm_eps: float
    tied: bool
    qkv_bias: bool
    o_bias: bool
    qk_norm: bool

# The model types whose formulas are in this file, and what transformers calls their classes.
ARCHITECTURES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
ROPE_FIELDS = {
    "default": (),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
# Config fields that this file reads
READ = {"model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "rms_norm_eps",
        "num_attention_heads", "num_key_value_heads", "head_dim", "rope_parameters", "attention_bias",
        "tie_word_embeddings", "initializer_range", "eos_token_id"}
# Fields of which it implements this one value
ONE_VALUE = {"hidden_act": "silu", "mlp_bias": False, "attention_dropout": 0.0, "use_sliding_window": False,
             "sliding_window": None, "quantization_config": None}
# Fields that change no formula
NO_EFFECT = {"bos_token_id", "pad_token_id", "use_cache", "max_position_embeddings", "max_window_layers",
             "pretraining_tp"}

def unsupported_fields(hf_config: PreTrainedConfig) -> dict[str, object]:
    """Fields of a config that ask for what is not implemented. What transformers does not read is ignored."""
    from transformers import PreTrainedConfig
    usual = type(hf_config)().to_dict()  # all that transformers reads for this architecture, at its default
    usual |= {"layer_types": ["full_attention"] * hf_config.num_hidden_layers} | ONE_VALUE
    checked = usual.keys() - READ - NO_EFFECT - PreTrainedConfig().to_dict().keys()  # those are bookkeeping
    rope = hf_config.rope_parameters
    rope_fields = {"rope_theta"}
    if rope["rope_type"] in ROPE_FIELDS:  # its name has two spellings; the default ignores all else
        rope_fields |= {"type", "rope_type", *ROPE_FIELDS["llama3"]}
    values = hf_config.to_dict().items()
    refused = {key: value for key, value in values if key in checked and value != usual[key]}
    refused |= {key: value for key, value in rope.items() if key not in rope_fields}
    return {key: value for key, value in refused.items() if (key, value) != ("partial_rotary_factor", 1.0)}

def read_config(hf_config: PreTrainedConfig, name: str) -> ModelConfig:
    """Our config from Hugging Face's. What is not implemented is refused by name, never ignored."""
    kind = hf_config.model_type
    if kind not in ARCHITECTURES:
        stop(f"{name}: config.json says model_type = {kind!r}; "
             f"model.py implements {', '.join(ARCHITECTURES)}.")
    for field, value in unsupported_fields(hf_config).items():
        stop(f"{name}: config.json says {field} = {value!r}, which model.py does not implement; "
             "choose another model.")
    rope = hf_config.rope_parameters
    bias = kind in ("llama", "qwen3") and hf_config.attention_bias
    head_dim = getattr(hf_config, "head_dim", None) or hf_config.hidden_size // hf_config.num_attention_heads
    return ModelConfig(
        layers=hf_config.num_hidden_layers, dim=hf_config.hidden_size, heads=hf_config.num_attention_heads,
        kv_heads=hf_config.num_key_value_heads, head_dim=head_dim, ffn_dim=hf_config.intermediate_size,
        vocab=hf_config.vocab_size, norm_eps=hf_config.rms_norm_eps, tied=hf_config.tie_word_embeddings,
        rope_theta=float(rope["rope_theta"]),
        rope_scaling=tuple(rope[field] for field in ROPE_FIELDS[rope["rope_type"]]) or None,
        qkv_bias=kind == "qwen2" or bias,  # Qwen2 always has these biases, and never says so
        o_bias=bias,
        qk_norm=kind == "qwen3",
    )

# ---------------------------------------------------------------- the key-value cache
class Cache:
    """
    Keys and values of every layer in one block. Row b holds its tokens in slots 0 .. length_B[b] - 1, and
    after a prefill padding up to the longest row's.

    A pass over T > 1 tokens (prefill) writes the last T slots of every row. A pass over one token (a decode
    step) writes slot length_B[b] of row b: rows differ in length, nothing moves, a GPU's host need not know.
    """

    def __init__(self, config: ModelConfig, rows: int, slots: int, dtype: torch.dtype, device: torch.device):
        # keys and values first, then layers; a head's slots are neighbours: attention reads them in turn
        size = (2, config.layers, rows, config.kv_heads, slots, config.head_dim)
        self.block_2LBKSE = torch.zeros(size, dtype=dtype, device=device)
        self.length_B = torch.zeros(rows, dtype=torch.long, device=device)
        self.slots = slots
        self.rotation_S2E = rotation(torch.arange(slots, device=device), config, dtype)  # not in every step

    def append(self, layer: int, key_BKTE: Tensor, value_BKTE: Tensor) -> tuple[Tensor, Tensor]:
        """Write one layer's new keys and values, and return all its slots. `forward` raises length_B."""
        keys_BKSE, values_BKSE = self.block_2LBKSE[:, layer]
        T = key_BKTE.shape[2]
        if T > 1:  # prefill: all rows at once
            keys_BKSE[:, :, -T:] = key_BKTE
            values_BKSE[:, :, -T:] = value_BKTE
        else:
            # one slot per row, each at its own length: written at a fixed address, as CUDA graphs need
            row_B = torch.arange(len(self.length_B), device=self.length_B.device)
            keys_BKSE[row_B, :, self.length_B] = key_BKTE[:, :, 0]
            values_BKSE[row_B, :, self.length_B] = value_BKTE[:, :, 0]
        return keys_BKSE, values_BKSE

    def attend(self, layer: int, query_BTHE: Tensor, key_BKTE: Tensor, value_BKTE: Tensor) -> Tensor:
        """Attention of new tokens to the cached ones and to themselves, [B, T, H * E]."""
        keys_BKSE, values_BKSE = self.append(layer, key_BKTE, value_BKTE)
        if query_BTHE.shape[1] > 1:  # the last T of S slots, each sees those before it
            return attend(query_BTHE, keys_BKSE, values_BKSE)
        return attend_one(query_BTHE, keys_BKSE, values_BKSE, self.length_B)

    def copy_rows(self, rows: list[int] | slice, other: Cache, other_rows: list[int] | slice) -> None:
        """Copy rows of a smaller cache, or its only row, to the first slots of these; not their lengths."""
        self.block_2LBKSE[:, :, rows, :, :other.slots] = other.block_2LBKSE[:, :, other_rows]

    def keep_rows(self, rows: list[int]) -> None:
        """Drop all rows but these."""
        self.block_2LBKSE = self.block_2LBKSE[:, :, rows]
        self.length_B = self.length_B[rows]

# ---------------------------------------------------------------- rotary positions
def rope_frequencies(config: ModelConfig, device: torch.device) -> Tensor:
    """
    frequency_E2: radians per position of each pair of channels (Su et al., arXiv 2104.09864).

    Llama 3 slows down low frequencies, so that positions beyond the original context look like positions
    within it. A pair that turns fewer than `low` times over that context is slowed by `factor`, one that
    turns more than `high` times stays, and in between the two are blended (Llama 3.1, transformers' rope_type
    "llama3").
    """
    exponent_E2 = torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim
    frequency_E2 = config.rope_theta ** -exponent_E2
    if config.rope_scaling is None:
        return frequency_E2
    factor, low, high, original_context = config.rope_scaling
    turns_E2 = original_context * frequency_E2 / (2 * math.pi)
    kept_E2 = ((turns_E2 - low) / (high - low)).clamp(0, 1)  # 1: the frequency stays
    return frequency_E2 * (kept_E2 + (1 - kept_E2) / factor)

def rotation(position_BT: Tensor, config: ModelConfig, dtype: torch.dtype) -> Tensor:
    """rotation_BT2E: cosines and sines of every position's angles; the first half of the sines is negated."""
    # angles in fp32: bf16 cannot tell position 1000 from 1001
    angle_BTE = position_BT[..., None].float() * rope_frequencies(config, position_BT.device)
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

# ---------------------------------------------------------------- layers
class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (Zhang and Sennrich, arXiv 1910.07467)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

class Linear(nn.Linear):
    """x @ weight.T + bias over the last dimension."""

    def reset_parameters(self) -> None:
        """Skip init: weights are loaded, or drawn by `new_model`."""

class Attention(nn.Module):
    """Grouped-query attention with rotary positions; queries, keys and values come from one fused matmul."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        # rows: H query heads, then K key heads, then K value heads
        fused_dim = (config.heads + 2 * config.kv_heads) * config.head_dim
        self.qkv_proj = Linear(config.dim, fused_dim, bias=config.qkv_bias)
        self.o_proj = Linear(config.heads * config.head_dim, config.dim, bias=config.o_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.norm_eps)

    def project(self, x_BTD: Tensor, rotation_BT2E: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """query_BTHE, key_BKTE and value_BKTE, queries and keys rotated."""
        H, K = self.config.heads, self.config.kv_heads
        qkv_BTJE = self.qkv_proj(x_BTD).unflatten(-1, (-1, self.config.head_dim))  # J = H + 2 K
        qk_BTJE, value_BTKE = qkv_BTJE.split((H + K, K), dim=2)
        if self.config.qk_norm:  # Qwen3 normalises each head before the rotation
            query_BTHE, key_BTKE = qk_BTJE.split((H, K), dim=2)
            qk_BTJE = torch.cat((self.q_norm(query_BTHE), self.k_norm(key_BTKE)), dim=2)
        query_BTHE, key_BTKE = rotate(qk_BTJE, rotation_BT2E).split((H, K), dim=2)
        # keys and values in the cache's order
        return query_BTHE, key_BTKE.transpose(1, 2), value_BTKE.transpose(1, 2)

    def forward(self, x_BTD: Tensor, rotation_BT2E: Tensor, cache: Cache | None, layer: int) -> Tensor:
        query_BTHE, key_BKTE, value_BKTE = self.project(x_BTD, rotation_BT2E)
        if cache is None:
            return self.o_proj(attend(query_BTHE, key_BKTE, value_BKTE))
        return self.o_proj(cache.attend(layer, query_BTHE, key_BKTE, value_BKTE))

class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer, arXiv 2002.05202); gate and up come from one fused matmul."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_up_proj = Linear(config.dim, 2 * config.ffn_dim, bias=False)
        self.down_proj = Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_up_proj(x)))

class Block(nn.Module):
    """One layer: attention and feed-forward, each behind a norm and added to its input."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, x_BTD: Tensor, rotation_BT2E: Tensor, cache: Cache | None, layer: int) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), rotation_BT2E, cache, layer)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))

    def write_cache(self, x_BTD: Tensor, rotation_BT2E: Tensor, cache: Cache, layer: int) -> None:
        """Write keys and values, and compute nothing else."""
        _, key_BKTE, value_BKTE = self.self_attn.project(self.input_layernorm(x_BTD), rotation_BT2E)
        cache.append(layer, key_BKTE, value_BKTE)

# ---------------------------------------------------------------- the model
class Transformer(nn.Module):
    """Parameters are named as in Hugging Face checkpoints, without `model.` and with FUSED matrices."""

    def __init__(self, hf_config: PreTrainedConfig, name: str = "model"):
        super().__init__()
        from transformers import GenerationConfig
        self.hf_config = hf_config
        self.config = config = read_config(hf_config, name)
        self.generation = GenerationConfig.from_model_config(hf_config)
        # from_pretrained with freeze=False: a trainable embedding that is not initialised twice
        self.embed_tokens = nn.Embedding.from_pretrained(torch.empty(config.vocab, config.dim), freeze=False)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        # a tied model has no output matrix of its own
        self.lm_head = None if config.tied else Linear(config.dim, config.vocab, bias=False)
        # recompute: the backward pass computes each layer's activations again instead of keeping them
        self.recompute = False

    def forward(self, ids_BT: Tensor, head: Head | None, cache: Cache | None = None) -> object:
        """
        Run the layers and return head(hidden_BTD, weight_VD). Rows start at position 0 and are padded on the
        right, so a plain causal mask is all they need: no token looks to its right.

        With a cache, ids_BT follow what each row holds (see Cache). Without a head, only the cache is filled,
        and the last layer stops after its keys and values. The head runs inside this call because a sharded
        model (FSDP) holds its output matrix in full only here.
        """
        T = ids_BT.shape[1]
        x_BTD = self.embed_tokens(ids_BT)
        position_BT = torch.arange(T, device=ids_BT.device)[None]
        if cache is None:
            rotation_BT2E = rotation(position_BT, self.config, x_BTD.dtype)
        else:  # a row's new tokens come after what it holds
            rotation_BT2E = cache.rotation_S2E[position_BT + cache.length_B[:, None]]
        last = len(self.layers) - 1
        for layer, block in enumerate(self.layers):
            if head is None and layer == last:  # nobody reads what comes out of it
                block.write_cache(x_BTD, rotation_BT2E, cache, layer)
            elif self.recompute and torch.is_grad_enabled():
                x_BTD = checkpoint(block, x_BTD, rotation_BT2E, cache, layer, use_reentrant=False)
            else:
                x_BTD = block(x_BTD, rotation_BT2E, cache, layer)
        if cache is not None:
            cache.length_B += T  # in place: the address stays, as a CUDA graph needs
        if head is None:
            return None
        weight_VD = self.embed_tokens.weight if self.config.tied else self.lm_head.weight
        return head(self.norm(x_BTD), weight_VD)

def last_logits(hidden_BTD: Tensor, weight_VD: Tensor) -> Tensor:
    """The head of decoding: logits_BV of the last position, in fp32."""
    return matmul_fp32(hidden_BTD[:, -1], weight_VD)

def score(model: Transformer, ids_BT: Tensor, mask_BT: Tensor,
          temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """
    logprob_BT[b, t] = log p(ids[b, t] | ids[b, :t]) where mask_BT is True, else 0, and entropy_BT of those
    choices, in nats. This is the one place that shifts: nothing predicts column 0, so it is always 0.
    """
    target_BT = mask_BT.clone()
    target_BT[:, 0] = False
    predictor_BT = F.pad(target_BT[:, 1:], (0, 1))  # the position before each target predicts it

    def head(hidden_BTD: Tensor, weight_VD: Tensor) -> tuple[Tensor, Tensor]:
        return token_logprob(hidden_BTD[predictor_BT], weight_VD, ids_BT[target_BT], temperature)

    logprob_N, entropy_N = model(ids_BT, head)
    zeros_BT = torch.zeros(ids_BT.shape, device=ids_BT.device)
    return zeros_BT.masked_scatter(target_BT, logprob_N), zeros_BT.masked_scatter(target_BT, entropy_N)

# ---------------------------------------------------------------- weights come and go
def new_model(hf_config: PreTrainedConfig, seed: int) -> Transformer:
    """Random init, a function of the seed alone: weights normal (`initializer_range`), norms 1, biases 0."""
    model = Transformer(hf_config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif parameter.dim() == 2:
            nn.init.normal_(parameter, std=hf_config.initializer_range, generator=generator)
    return model

def download(name: str) -> Path:
    """The local copy of a hub model: safetensors, configs and tokenizer, no code."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    try:
        wanted = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
        second_copy = ["original/*", "consolidated*"]  # of the weights, in Meta's and Mistral's own formats
        return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=second_copy))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        stop(f"{name}: no such folder, and no hub model of that name can be had ({error}); give another.")

def newest_step(name: str) -> Path:
    """The newest checkpoint of a run folder; any other name as it is, also one too long for a file."""
    latest = Path(name, "latest")
    return Path(name, latest.read_text("utf-8", "replace").strip() if os.path.isfile(latest) else "")

def find_checkpoint(name: str) -> Path:
    """The checkpoint folder behind a run folder, a checkpoint folder or a hub name; all else is refused."""
    folder = newest_step(name)
    if not os.path.exists(folder):
        folder = download(name)
    for pattern in ("config.json", "*.safetensors"):
        if not list(folder.glob(pattern)):
            stop(f"{folder}: no {pattern} there; give a model's folder with safetensors weights, or a run.")
    return folder

def run_config(name: str) -> dict:
    """The config.json of the run that a run or checkpoint folder belongs to; empty for other models."""
    for folder in (Path(name), Path(name).absolute().parent):
        if os.path.isfile(folder / "config.json") and os.path.isdir(folder / "step_000000"):
            try:
                config = json.loads((folder / "config.json").read_text("utf-8"))
                config["prompts"] = dict(config["prompts"])
                return config
            except (ValueError, KeyError, TypeError):
                stop(f"{folder}/config.json: cannot be read as a run's settings; put back the file.")
    return {}

def weight_files(folder: Path) -> list[Path]:
    """The files of a checkpoint's weights, by its index: some folders hold a second copy of them."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return sorted({folder / file for file in json.loads(index.read_text("utf-8"))["weight_map"].values()})
    single = folder / "model.safetensors"
    return [single] if single.exists() else sorted(folder.glob("*.safetensors"))

@contextmanager
def refuse_damage(folder: Path) -> Iterator[None]:
    """Say in one sentence why a checkpoint cannot be read."""
    try:
        yield
    except Exception as error:  # of safetensors, transformers, jinja or the disk: there is no narrower class
        reason = " ".join(str(error).split())[:200]
        stop(f"{folder}: the checkpoint cannot be read ({reason}); give another.")

def open_empty(name: str, dtype: torch.dtype = torch.float32) -> Transformer:
    """A checkpoint's model, on the meta device: it has shapes, and no memory for its weights."""
    from transformers import AutoConfig, GenerationConfig
    folder = find_checkpoint(name)
    with refuse_damage(folder):
        with torch.device("meta"):
            model = Transformer(AutoConfig.from_pretrained(folder), name).to(dtype)
        if (folder / "generation_config.json").exists():
            model.generation = GenerationConfig.from_pretrained(folder)
    set_threads(sum(p.numel() for p in model.parameters()))
    return model

def read_weights(name: str, model: Transformer) -> dict[str, Tensor]:
    """The weights for a model of `open_empty`, on the CPU. One that is missing or unknown is an error."""
    folder = find_checkpoint(name)
    shapes = {key: parameter.shape for key, parameter in model.named_parameters()}
    weights: dict[str, Tensor] = {}
    with refuse_damage(folder):
        for file in weight_files(folder):
            for key in safe_open(file, "pt").keys():
                tensor = safe_open(file, "pt").get_tensor(key)  # opened anew: what was read is free again
                if not tensor.isfinite().all():
                    stop(f"{file}: {key} holds NaN or infinity; give another checkpoint.")
                if not key.endswith("rotary_emb.inv_freq"):  # computed here, never read
                    key = re.sub(r"^((_orig_mod|module|model)\.)+", "", key)  # prefixes of wrappers
                    weights[key] = tensor.to(model.norm.weight.dtype, copy=True)
        if model.config.tied and "lm_head.weight" in weights:  # one matrix, under either name or both
            head_VD = weights.pop("lm_head.weight")
            if not torch.equal(head_VD, weights.setdefault("embed_tokens.weight", head_VD)):
                stop(f"{folder}: lm_head is not the embedding; config.json must not tie_word_embeddings.")
        wanted = {part for key in shapes for part in hf_names(key)}
        problems = {"lack": wanted - weights.keys(), "also hold": weights.keys() - wanted}
        if not any(problems.values()):
            fuse(weights)
            problems["differ in shape in"] = {key for key in shapes if weights[key].shape != shapes[key]}
    for problem, keys in problems.items():
        if keys:
            stop(f"{folder}: against config.json, the weights {problem} {len(keys)}: {sorted(keys)[:4]}.")
    return weights

def load(name: str, dtype: torch.dtype = torch.float32) -> Transformer:
    """Open a checkpoint on the CPU, from safetensors only."""
    model = open_empty(name, dtype)
    model.load_state_dict(read_weights(name, model), assign=True)  # assign: no memory to copy into
    return model

# Checkpoints hold these matrices one by one; here each group is one matrix, so that it is one matmul.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}

def hf_names(key: str) -> list[str]:
    """What is one parameter here, by its names in a checkpoint, without `model.`."""
    module = key.split(".")[-2]
    return [key.replace(module, part) for part in FUSED.get(module, [module])]

def fuse(weights: dict[str, Tensor]) -> None:
    """Put our parameters in the place of those of a checkpoint, one by one: no second copy of all."""
    for fused, parts in FUSED.items():
        for key in [key for key in weights if f".{parts[0]}." in key]:
            tensors = [weights.pop(key.replace(parts[0], part)) for part in parts]
            weights[key.replace(parts[0], fused)] = torch.cat(tensors)

def unfuse(weights: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The parameters of a Hugging Face checkpoint, under its names, from ours."""
    rows = {
        "qkv_proj": [heads * config.head_dim for heads in (config.heads, config.kv_heads, config.kv_heads)],
        "gate_up_proj": [config.ffn_dim, config.ffn_dim],
    }
    hf_weights = {}
    for key, tensor in weights.items():
        module = key.split(".")[-2]
        pieces = tensor.split(rows[module]) if module in rows else [tensor]
        for part, piece in zip(hf_names(key), pieces, strict=True):
            hf_weights[part if module == "lm_head" else f"model.{part}"] = piece
    return hf_weights

def save(folder: Path, weights: dict[str, Tensor], model: Transformer,
         tokenizer: PreTrainedTokenizerBase) -> None:
    """Write a Hugging Face folder: these weights (`model` may be sharded), the configs, the tokenizer."""
    from huggingface_hub import save_torch_state_dict
    folder.mkdir(parents=True, exist_ok=True)
    hf_weights = {}
    for key, tensor in unfuse(weights, model.config).items():
        tensor = tensor.detach()
        # safetensors refuses tensors that share memory, as slices of a fused matrix do: copy only those
        if not tensor.is_contiguous() or tensor.untyped_storage().nbytes() > tensor.nbytes:
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        hf_weights[key] = tensor
    save_torch_state_dict(hf_weights, folder)
    model.hf_config.architectures = [ARCHITECTURES[model.hf_config.model_type] + "ForCausalLM"]
    model.hf_config.dtype = next(iter(weights.values())).dtype
    model.hf_config.save_pretrained(folder)
    model.generation.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

# ---------------------------------------------------------------- the command line
@torch.no_grad()
def main() -> None:
    cli = CommandLine(description="Compare our logits with those of transformers, on random tokens.")
    cli.add_argument("--model", help="a checkpoint or run folder [a small random Llama]")
    args = cli.parse_args()
    from transformers import AutoModelForCausalLM, LlamaConfig
    small = LlamaConfig(vocab_size=512, hidden_size=128, num_hidden_layers=2, num_attention_heads=4)
    ours = load(args.model) if args.model else new_model(small, seed=0)
    theirs = AutoModelForCausalLM.from_config(ours.hf_config, dtype=torch.float32).eval()
    theirs.load_state_dict(unfuse(ours.state_dict(), ours.config), strict=not ours.config.tied)
    ids_BT = torch.randint(ours.config.vocab, (2, 64), generator=torch.Generator().manual_seed(0))
    ours_BTV = ours(ids_BT, lambda hidden_BTD, weight_VD: hidden_BTD @ weight_VD.T)
    difference = (ours_BTV - theirs(ids_BT).logits).abs().max()
    print(f"largest difference to transformers over {ours_BTV.numel():,} logits: {difference:.1e}, "
          f"where the largest logit is {ours_BTV.abs().max():.1f}")

if __name__ == "__main__":
    main()
