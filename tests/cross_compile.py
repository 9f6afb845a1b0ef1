"""Compile every kernel for sm_90 on a machine without a GPU, and print what came out as JSON. Run by test_kernels.py."""
import inspect
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).parent.parent))
from kernels import layers_triton, logprob_triton

ELEMENT = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}
FIXED = {name: "*fp32" for name in ("max_ptr", "sum_ptr", "moment_ptr", "target_ptr", "lse_ptr", "upstream_ptr", "r_ptr", "mask_ptr", "mixed_ptr")} | \
    {"ids_ptr": "*i64", "slot_ptr": "*i64", "scale": "fp32", "eps": "fp32"}
HEADS = dict(BLOCK_G=16, BLOCK_E=128)   # of Llama-3.1-8B and Qwen2.5-7B
TILES = {"norm_kernel": dict(BLOCK=4096), "swiglu_kernel": dict(BLOCK=1024), "merge_kernel": HEADS,
         "split_kernel": dict(SPLIT=layers_triton.SPLIT, UPCAST=False, **HEADS)}


def tile_of(name, dtype):
    if name in TILES:
        keys = {"BLOCK_S": layers_triton.at_once(dtype)} if name == "split_kernel" else {}
        return TILES[name] | keys | {"num_warps": layers_triton.WARPS[name], "num_stages": 3}
    return logprob_triton.tiles(dtype) | {"UPCAST": False}


def compile_for_hopper(kernel, dtype):
    """Pointers and widths divisible by 16, as in every real model; the vocabulary is ragged."""
    constants = tile_of(kernel.fn.__name__, dtype)
    options = {key: constants.pop(key) for key in ("num_warps", "num_stages")}
    names = list(inspect.signature(kernel.fn).parameters)
    signature = {name: "constexpr" if name in constants else FIXED.get(name, ELEMENT[dtype] if name.endswith("_ptr") else "i32") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name.endswith("_ptr") or name in ("D", "E", "I")}
    made = triton.compile(ASTSource(kernel, signature, constants, aligned), target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(made.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        used = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", used.stdout + used.stderr)}
    return {"tensor_cores": "wgmma" in made.asm["ptx"] or "mma.sync" in made.asm["ptx"], "shared": made.metadata.shared,
            "spilled_bytes": usage["STACK"] + usage["LOCAL"], "registers": usage["REG"]}


if __name__ == "__main__":
    kernels = {name: value for file in (logprob_triton, layers_triton) for name, value in vars(file).items() if name.endswith("_kernel")}
    print(json.dumps({f"{name} {word}": compile_for_hopper(kernel, dtype) for name, kernel in kernels.items()
                      for word, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))}))
