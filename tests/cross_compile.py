"""
Compile every Triton kernel for Hopper (sm_90) on a machine without a GPU, and print what came out as JSON:
spilled bytes, shared memory, registers, and whether the kernel uses tensor cores.

    python tests/cross_compile.py        # test_kernels.py runs it, too; TRITON_INTERPRET must not be set
"""
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

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
TYPES = {   # of the arguments that do not have the dtype of the model
    "ids_ptr": "*i64", "length_ptr": "*i64", "lse_ptr": "*fp32", "grad_ptr": "*fp32",
    "scale": "fp32", "eps": "fp32",
}
ALIGNED = ("D", "E", "ffn_dim")   # sizes that are multiples of 16 in every real model; the vocabulary is not
HEAD = {"BLOCK_G": 16, "BLOCK_E": 128}   # of Llama-3.1-8B and Qwen2.5-7B


def constants_of(name: str, dtype: torch.dtype) -> dict[str, int]:
    """Tile sizes and options that a launch for a real model would choose."""
    if name in ("norm_kernel", "norm_backward_kernel"):
        return {"BLOCK": 4096}
    if name in ("swiglu_kernel", "swiglu_backward_kernel"):
        return {"BLOCK": 1024}
    if name == "attend_kernel":
        return {"BLOCK_S": 128 // dtype.itemsize, **HEAD}
    return {"UPCAST": False, **logprob_triton.tile_sizes(dtype)}


def type_of(argument: str, kernel: str, dtype: str) -> str:
    """The Triton type of one argument."""
    if (kernel, argument) in (("forward_kernel", "out_ptr"), ("norm_backward_kernel", "grad_weight_ptr")):
        return "*fp32"
    if (kernel, argument) == ("swiglu_backward_kernel", "grad_ptr"):   # in the head's kernels it is fp32
        return f"*{dtype}"
    return TYPES.get(argument, f"*{dtype}" if argument.endswith("_ptr") else "i32")


def compile_for_hopper(kernel: triton.JITFunction, dtype: str) -> dict[str, int | bool]:
    """Compile one kernel and read the resources that it uses from its cubin."""
    name = kernel.fn.__name__
    constants = constants_of(name, DTYPES[dtype])
    options = {key: constants.pop(key, default) for key, default in (("num_warps", 4), ("num_stages", 3))}
    arguments = list(inspect.signature(kernel.fn).parameters)
    signature = {a: "constexpr" if a in constants else type_of(a, name, dtype) for a in arguments}
    attributes = {}
    for i, argument in enumerate(arguments):
        if argument.endswith("_ptr") or argument in ALIGNED:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        command = [tool, "-res-usage", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    numbers = re.findall(r"(REG|STACK|LOCAL):(\d+)", done.stdout + done.stderr)
    usage = {key: int(value) for key, value in numbers}
    ptx = compiled.asm["ptx"]
    return {
        "tensor_cores": "wgmma" in ptx or "mma.sync" in ptx,
        "shared": compiled.metadata.shared,
        "spilled_bytes": usage["STACK"] + usage["LOCAL"],
        "registers": usage["REG"],
    }


def main() -> None:
    results = {}
    for file in (layers_triton, logprob_triton):
        for name, kernel in vars(file).items():
            if name.endswith("_kernel"):
                results |= {f"{name} {dtype}": compile_for_hopper(kernel, dtype) for dtype in DTYPES}
    print(json.dumps(results))


if __name__ == "__main__":
    main()
