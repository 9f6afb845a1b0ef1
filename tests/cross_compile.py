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
from kernels import logprob_triton

OUTPUTS = {"max_ptr": "*fp32", "sum_ptr": "*fp32", "moment_ptr": "*fp32", "target_ptr": "*fp32", "lse_ptr": "*fp32", "upstream_ptr": "*fp32",
           "ids_ptr": "*i64", "scale": "fp32"}


def compile_for_hopper(kernel, dtype):
    """Pointers and widths divisible by 16, as in every real model; the vocabulary is ragged."""
    tile = logprob_triton.tiles(dtype)
    options = {key: tile.pop(key) for key in ("num_warps", "num_stages")}
    names = list(inspect.signature(kernel.fn).parameters)
    constants = {**tile, "UPCAST": False}
    element = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}[dtype]
    signature = {name: "constexpr" if name in constants else OUTPUTS.get(name, element if name.endswith("_ptr") else "i32") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name.endswith("_ptr") or name == "D"}
    made = triton.compile(ASTSource(kernel, signature, constants, aligned), target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(made.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        used = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", used.stdout + used.stderr)}
    return {"tensor_cores": "wgmma" in made.asm["ptx"], "shared": made.metadata.shared, "spilled_bytes": usage["STACK"] + usage["LOCAL"],
            "registers": usage["REG"]}


if __name__ == "__main__":
    kernels = {name: value for name, value in vars(logprob_triton).items() if name.endswith("_kernel")}
    print(json.dumps({f"{name} {word}": compile_for_hopper(kernel, dtype) for name, kernel in kernels.items()
                      for word, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))}))
