"""
The transformer, its key-value cache, its adapters, and how weights come and go.

    ids_BT -> embed -> L x [norm, attention, +, norm, SwiGLU, +] -> norm -> head(hidden_BTD, weight_VD)

One decoder-only architecture in the variants that open models use: RMSNorm, rotary positions, grouped-query
attention, SwiGLU, optional biases on queries, keys and values (Qwen2), optional norms on queries and keys
(Qwen3), and an output matrix that may be tied to the embedding. A checkpoint is an ordinary Hugging Face
folder, or adapters for PEFT: others open what `save` writes, and `load` opens what `transformers` writes.

    python model.py                       # a random model's logits against those of transformers
    python model.py --model FOLDER        # the same for a checkpoint
    python model.py --merge RUN --role defender --out FOLDER  # a run's adapter becomes part of the weights

Tensor names end in their shape, here and in every file: B rows, T positions, S cache slots, V vocabulary, D
model width, H query heads, K key/value heads, G = H / K query heads that share a key head, E head width, L
layers, N tokens or turns in a flat list, I the width of the feed-forward layer, R the rank of an adapter.
"""
from __future__ import annotations

from kernels import CommandLine, set_threads, stop  # before torch, which reads the OpenMP setting in there
import json
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

from kernels.layers import attend, attend_one, matmul_fp32, rms_norm, rotate, rotation, swiglu
from kernels.logprob import token_logprob

if TYPE_CHECKING:  # functions import transformers when they run: it takes a second, --help should not wait
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

Head = Callable[[Tensor, Tensor], object]  # (hidden_BTD, weight_VD) -> what the caller needs of the logits
LORA_SCALE = 2  # of what an adapter adds: alpha / rank
ADAPTER_FILES = "*/adapter_model.safetensors"  # in a checkpoint; these folders have the adapters' names

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
    rope: tuple[int, float, tuple | None]  # the arguments of rope_frequencies
    norm_eps: float
    tied: bool
    qkv_bias: bool
    o_bias: bool
    qk_norm: bool

ARCHITECTURES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}  # classes
ROPE_FIELDS = {"default": (), "llama3": ("factor", "low_freq_factor", "high_freq_factor",
                                         "original_max_position_embeddings")}
READ = {"model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "rms_norm_eps",
        "num_attention_heads", "num_key_value_heads", "head_dim", "rope_parameters", "attention_bias",
        "tie_word_embeddings", "initializer_range", "eos_token_id"}  # config fields that this file reads
ONE_VALUE = {"hidden_act": "silu", "mlp_bias": False, "attention_dropout": 0.0, "use_sliding_window": False,
             "sliding_window": None, "quantization_config": None}  # of these it implements one value
NO_EFFECT = {"bos_token_id", "pad_token_id", "use_cache", "max_position_embeddings", "max_window_layers",
             "pretraining_tp"}  # fields that change no formula

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
        stop(f"{name}: config.json says model_type = {kind!r}; model.py has {', '.join(ARCHITECTURES)}.")
    for field, value in unsupported_fields(hf_config).items():
        stop(f"{name}: config.json says {field} = {value!r}, which model.py does not implement; "
             "choose another model.")
    rope = hf_config.rope_parameters
    scaling = tuple(rope[field] for field in ROPE_FIELDS[rope["rope_type"]])
    bias = kind in ("llama", "qwen3") and hf_config.attention_bias
    head_dim = getattr(hf_config, "head_dim", None) or hf_config.hidden_size // hf_config.num_attention_heads
    return ModelConfig(
        layers=hf_config.num_hidden_layers, dim=hf_config.hidden_size, heads=hf_config.num_attention_heads,
        kv_heads=hf_config.num_key_value_heads, head_dim=head_dim, ffn_dim=hf_config.intermediate_size,
        vocab=hf_config.vocab_size, norm_eps=hf_config.rms_norm_eps, tied=hf_config.tie_word_embeddings,
        rope=(head_dim, float(rope["rope_theta"]), scaling or None),
        qkv_bias=kind == "qwen2" or bias,  # Qwen2 always has these biases, and never says so
        o_bias=bias, qk_norm=kind == "qwen3")

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
        self.rotation_S2E = rotation(torch.arange(slots, device=device), config.rope, dtype)

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

# ---------------------------------------------------------------- layers
class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight over the last dimension (Zhang and Sennrich, arXiv 1910.07467)."""

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

class Linear(nn.Linear):
    """x @ weight.T + bias over the last dimension, and what the active adapter adds (LoRA)."""

    def __init__(self, dim: int, parts: list[int], bias: bool):
        super().__init__(dim, sum(parts), bias)
        self.parts = parts  # rows of the matrices that are fused into this one; each has an A of its own
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()  # by the adapter's name
        self.adapter = ""  # the active one; none

    def reset_parameters(self) -> None:
        """Skip init: weights are loaded, or drawn by `new_model`."""

    def adapt(self, x: Tensor) -> Tensor:
        """2 * x @ A.T @ B.T, part by part, in the dtype of x (Hu et al., arXiv 2106.09685)."""
        hidden = LORA_SCALE * F.linear(x, self.lora_A[self.adapter].to(x.dtype))
        b_parts = self.lora_B[self.adapter].to(x.dtype).split(self.parts)
        pairs = zip(hidden.chunk(len(b_parts), dim=-1), b_parts, strict=True)
        return torch.cat([F.linear(*pair) for pair in pairs], dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + self.adapt(x) if self.adapter else y

class Attention(nn.Module):
    """Grouped-query attention with rotary positions; queries, keys and values come from one fused matmul."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        rows = [n * config.head_dim for n in (config.heads, config.kv_heads, config.kv_heads)]  # q, k, v
        self.qkv_proj = Linear(config.dim, rows, bias=config.qkv_bias)
        self.o_proj = Linear(config.heads * config.head_dim, [config.dim], bias=config.o_bias)
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
        return query_BTHE, key_BTKE.transpose(1, 2), value_BTKE.transpose(1, 2)  # in the cache's order

    def forward(self, x_BTD: Tensor, rotation_BT2E: Tensor, cache: Cache | None, layer: int) -> Tensor:
        query_BTHE, key_BKTE, value_BKTE = self.project(x_BTD, rotation_BT2E)
        if cache is None:
            return self.o_proj(attend(query_BTHE, key_BKTE, value_BKTE))
        return self.o_proj(cache.attend(layer, query_BTHE, key_BKTE, value_BKTE))

class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer, arXiv 2002.05202); gate and up come from one fused matmul."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_up_proj = Linear(config.dim, [config.ffn_dim, config.ffn_dim], bias=False)
        self.down_proj = Linear(config.ffn_dim, [config.dim], bias=False)

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
        self.lm_head = None if config.tied else Linear(config.dim, [config.vocab], bias=False)
        self.recompute = False  # the layers' activations in the backward pass, instead of keeping them
        self.projections = [module for module in self.layers.modules() if isinstance(module, Linear)]
        self.adapters: dict[str, str] = {}  # of roles, by name: they change the projections of all layers

    def use(self, role: str) -> None:
        """Run with this role's adapter from now on; without one, or for no role (""), as the base."""
        for linear in self.projections:
            linear.adapter = self.adapters.get(role, "")

    def add_adapter(self, name: str, rank: int, seed: int = 0) -> None:
        """Add an adapter for the roles in its name, "attacker-defender", one, or "past". It adds 0 so far."""
        generator = torch.Generator().manual_seed(seed)
        for linear in self.projections:
            size = rank * len(linear.parts), linear.in_features
            a_RD = torch.randn(size, generator=generator).to(self.norm.weight.device)
            linear.lora_A[name] = nn.Parameter(a_RD / (3 * size[1]) ** 0.5)  # as large as PEFT's
            linear.lora_B[name] = nn.Parameter(a_RD.new_zeros(linear.out_features, rank))
        self.adapters |= dict.fromkeys(name.split("-"), name)

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
            rotation_BT2E = rotation(position_BT, self.config.rope, x_BTD.dtype)
        else:  # a row's new tokens come after what it holds
            rotation_BT2E = cache.rotation_S2E[position_BT + cache.length_B[:, None]]
        for layer, block in enumerate(self.layers):
            if head is None and block is self.layers[-1]:  # nobody reads what comes out of it
                block.write_cache(x_BTD, rotation_BT2E, cache, layer)
            elif self.recompute and torch.is_grad_enabled():
                x_BTD = checkpoint(block, x_BTD, rotation_BT2E, cache, layer, use_reentrant=False)
            else:
                x_BTD = block(x_BTD, rotation_BT2E, cache, layer)
        if cache is not None:
            cache.length_B += T  # in place: the address stays, as a CUDA graph needs
        weight_VD = self.embed_tokens.weight if self.config.tied else self.lm_head.weight
        return None if head is None else head(self.norm(x_BTD), weight_VD)

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
    from huggingface_hub.errors import HFValidationError  # its other errors are OSErrors
    try:
        wanted = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
        second_copy = ["original/*", "consolidated*"]  # of the weights, in Meta's and Mistral's own formats
        return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=second_copy))
    except (OSError, HFValidationError) as error:
        stop(f"{name}: no such folder, and no hub model of that name can be had ({error}); give another.")

def newest_step(name: str) -> Path:
    """The newest checkpoint of a run folder; any other name as it is, also one too long for a file."""
    latest = Path(name, "latest")
    return Path(name, latest.read_text("utf-8", "replace").strip() if os.path.isfile(latest) else "")

def find_checkpoint(name: str) -> Path:
    """The checkpoint folder behind a run folder, a checkpoint folder or a hub name; all else is refused."""
    folder = newest_step(name)
    if not os.path.exists(folder):
        folder = download(str(folder))
    for pattern in ("config.json", "*.safetensors"):
        if not list(folder.glob(pattern)) and not list(folder.glob(ADAPTER_FILES)):
            stop(f"{folder}: no {pattern} there; give a model's folder with safetensors weights, or a run.")
    return folder

def run_config(name: str) -> dict:
    """The config.json of the run that a run or checkpoint folder belongs to; empty for other models."""
    run = Path(name).absolute().parent
    for folder in [Path(name)] + [run] * Path(name).absolute().name.startswith("step_"):
        if os.path.isfile(folder / "config.json") and os.path.isdir(folder / "step_000000"):
            try:
                config = json.loads((folder / "config.json").read_text("utf-8"))
                config["prompts"] = dict(config["prompts"])
                return config
            except (ValueError, KeyError, TypeError):
                stop(f"{folder}/config.json: cannot be read as a run's settings; put back the file.")
    return {}

def weight_files(folder: Path) -> list[Path]:
    """A checkpoint's weights, by its index: some folders hold a second copy. Adapters follow their base."""
    if adapters := sorted(folder.glob(ADAPTER_FILES)):
        return weight_files(find_checkpoint(str(folder.parent / "step_000000"))) + adapters
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return sorted({folder / file for file in json.loads(index.read_text("utf-8"))["weight_map"].values()})
    return list(folder.glob("model.safetensors")) or sorted(folder.glob("*.safetensors"))

@contextmanager
def refuse_damage(folder: Path) -> Iterator[None]:
    """Say in one sentence why a checkpoint cannot be read."""
    try:
        yield
    except Exception as error:  # of safetensors, transformers, jinja or the disk: there is no narrower class
        reason = " ".join(str(error).split())[:200]
        stop(f"{folder}: cannot be read ({reason}); give another.")

def open_empty(name: str, dtype: torch.dtype = torch.float32) -> Transformer:
    """A checkpoint's model, on the meta device: it has shapes, and no memory for its weights."""
    from transformers import AutoConfig, GenerationConfig
    folder = find_checkpoint(name)
    with refuse_damage(folder):
        with torch.device("meta"):
            model = Transformer(AutoConfig.from_pretrained(folder), name).to(dtype)
        for file in sorted(folder.glob(ADAPTER_FILES)):
            rank = json.loads(file.with_name("adapter_config.json").read_text("utf-8"))["r"]
            model.add_adapter(file.parent.name, rank)
        if (folder / "generation_config.json").exists():
            model.generation = GenerationConfig.from_pretrained(folder)
    set_threads(sum(p.numel() for p in model.parameters()))
    return model

def read_tensors(file: Path, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a safetensors file, by their names without the prefixes of wrappers."""
    for key in safe_open(file, "pt").keys():
        tensor = safe_open(file, "pt").get_tensor(key)  # opened anew: what was read is free again
        if not tensor.isfinite().all():
            stop(f"{file}: {key} holds NaN or infinity; give another checkpoint.")
        key = re.sub(r"^((_orig_mod|module|model|base_model)\.)+", "", key)
        if ".lora_" in key:
            yield key.replace("weight", file.parent.name), tensor.float()  # the name of its adapter
        elif not key.endswith("rotary_emb.inv_freq"):  # computed here, never read
            yield key, tensor.to(dtype, copy=True)

def read_adapter(folder: Path, model: Transformer, name: str) -> str:
    """Give the adapter `name` the values of one in a checkpoint, and return `name`."""
    with refuse_damage(folder):
        weights = dict(read_tensors(folder / "adapter_model.safetensors", torch.float32))
    fuse(weights)
    for key, tensor in weights.items():
        model.get_parameter(key.replace(folder.name, name)).data.copy_(tensor)
    return name

def read_weights(name: str, model: Transformer) -> dict[str, Tensor]:
    """The weights for a model of `open_empty`, on the CPU. One that is missing or unknown is an error."""
    folder = find_checkpoint(name)
    shapes = {key: parameter.shape for key, parameter in model.named_parameters()}
    weights: dict[str, Tensor] = {}
    with refuse_damage(folder):
        for file in weight_files(folder):
            weights.update(read_tensors(file, model.norm.weight.dtype))
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
    for fused, parts in FUSED.items():
        if f".{fused}." in key:
            return [key.replace(fused, part) for part in parts]
    return [key]

def fuse(weights: dict[str, Tensor]) -> None:
    """Put our parameters in the place of those of a checkpoint, one by one: no second copy of all."""
    for fused, parts in FUSED.items():
        for key in [key for key in weights if f".{parts[0]}." in key]:
            tensors = [weights.pop(key.replace(parts[0], part)) for part in parts]
            weights[key.replace(parts[0], fused)] = torch.cat(tensors)

def unfuse(weights: dict[str, Tensor], model: Transformer) -> dict[str, Tensor]:
    """The parameters of a Hugging Face checkpoint, under its names, from ours."""
    hf_weights = {}
    heads = model.layers[0].self_attn.qkv_proj.parts
    for key, tensor in weights.items():
        names = hf_names(key)
        unequal = ".qkv_proj." in key and ".lora_A." not in key  # all other parts have as many rows each
        pieces = tensor.split(heads) if unequal else tensor.chunk(len(names))
        for part, piece in zip(names, pieces, strict=True):
            # safetensors refuses tensors that share memory, as slices of a fused matrix do: copy only those
            if not piece.is_contiguous() or piece.untyped_storage().nbytes() > piece.nbytes:
                piece = piece.clone(memory_format=torch.contiguous_format)
            hf_weights[part if part.startswith("lm_head") else f"model.{part}"] = piece
    return hf_weights

def merge(model: Transformer, role: str) -> dict[str, Tensor]:
    """The weights with the adapter of a role, if it has one, added to them."""
    model.use(role)
    weights = {key: tensor for key, tensor in model.state_dict().items() if ".lora_" not in key}
    for name, module in model.named_modules():
        if getattr(module, "adapter", ""):
            weights[f"{name}.weight"] = module.weight + module.adapt(torch.eye(module.in_features)).T
    return weights

def save(folder: Path, weights: dict[str, Tensor], model: Transformer,
         tokenizer: PreTrainedTokenizerBase) -> None:
    """Write weights or adapters (`model` may be sharded), the configs and the tokenizer."""
    from huggingface_hub import save_torch_state_dict
    folder.mkdir(parents=True, exist_ok=True)
    write = save_adapters if any(".lora_" in key for key in weights) else save_torch_state_dict
    write(unfuse(weights, model), folder)
    model.hf_config.architectures = [ARCHITECTURES[model.hf_config.model_type] + "ForCausalLM"]
    model.hf_config.dtype = next(iter(weights.values())).dtype
    model.hf_config.save_pretrained(folder)
    model.generation.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

def save_adapters(hf_weights: dict[str, Tensor], folder: Path) -> None:
    """Write adapters as PEFT does, each to a folder of its name. Their base is the start of the run."""
    from huggingface_hub import save_torch_state_dict
    for adapter in {key.split(".")[-1] for key in hf_weights}:
        tensors = {f"base_model.model.{key.removesuffix(adapter)}weight": tensor
                   for key, tensor in hf_weights.items() if key.endswith(f".{adapter}")}
        rank = next(len(tensor) for key, tensor in tensors.items() if ".lora_A." in key)
        config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": LORA_SCALE * rank,
                  "target_modules": sorted({key.split(".")[-3] for key in tensors}),
                  "base_model_name_or_path": str(folder.absolute().parent / "step_000000")}
        (folder / adapter).mkdir()
        save_torch_state_dict(tensors, folder / adapter, filename_pattern="adapter_model{suffix}.safetensors")
        (folder / adapter / "adapter_config.json").write_text(json.dumps(config, indent=1), "utf-8")

# ---------------------------------------------------------------- the command line
@torch.no_grad()
def main() -> None:
    cli = CommandLine(description="Compare our logits with those of transformers, or merge an adapter.")
    cli.add_argument("--model", help="a checkpoint or run folder to compare [a small random Llama]")
    cli.add_argument("--merge", help="a run with adapters: write the model of --role to --out")
    cli.add_argument("--role", default="defender", help="whose adapter to add [%(default)s]")
    cli.add_argument("--out", type=Path, help="a new folder for the merged model")
    args = cli.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
    name = args.merge or args.model
    if args.merge and (not args.out or args.out.exists() or args.role not in open_empty(name).adapters):
        stop(f"--merge {name}: needs an adapter of the {args.role} there, and a new folder as --out.")
    small = LlamaConfig(vocab_size=512, hidden_size=128, num_hidden_layers=2, num_attention_heads=4)
    ours = load(name) if name else new_model(small, seed=0)
    weights = merge(ours, args.role)
    if args.merge:
        weights = {key: tensor.to(ours.hf_config.dtype) for key, tensor in weights.items()}
        return save(args.out, weights, ours, AutoTokenizer.from_pretrained(find_checkpoint(name)))
    theirs = AutoModelForCausalLM.from_config(ours.hf_config, dtype=torch.float32).eval()
    theirs.load_state_dict(unfuse(weights, ours), strict=not ours.config.tied)
    ids_BT = torch.randint(ours.config.vocab, (2, 64), generator=torch.Generator().manual_seed(0))
    ours_BTV = ours(ids_BT, lambda hidden_BTD, weight_VD: hidden_BTD @ weight_VD.T)
    difference = (ours_BTV - theirs(ids_BT).logits).abs().max()
    print(f"largest difference to transformers over {ours_BTV.numel():,} logits: {difference:.1e}, "
          f"where the largest logit is {ours_BTV.abs().max():.1f}")

if __name__ == "__main__":
    main()
