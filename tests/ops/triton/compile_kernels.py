"""Compile every kernel for an NVIDIA GPU that need not be there, and print what it uses, as JSON.

``python compile_kernels.py 90`` compiles for compute capability 9.0. Memory is in bytes: what a block shares, and what
registers spill of each thread.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mea.ops.triton import kernels

BF16 = {"DOT": triton.language.bfloat16, "ALIGN": 4, "T": kernels.TOKENS}
PAIRS = {**BF16, "HIDDEN": True}
# Everything that `mea.ops.triton.packed` asks for, but for heads of fewer than 64 channels.
VARIANTS = {
    "score_pairs, 16 rows": ("score_pairs", {**PAIRS, "R": 16, "PAGE": 0}),
    "score_pairs, 32 rows, paged": ("score_pairs", {**PAIRS, "R": 32, "PAGE": 64}),
    "score_rebuilt, 16 rows": ("score_rebuilt", {**PAIRS, "HALF": 32, "R": 16, "PAGE": 0}),
    "score_rebuilt, 32 rows, paged": ("score_rebuilt", {**PAIRS, "HALF": 32, "R": 32, "PAGE": 64}),
    "average_codes": ("average_codes", {**BF16, "R": 32, "PAGE": 0}),
    "average_codes, paged": ("average_codes", {**BF16, "R": 32, "PAGE": 64}),
    "write_codes": ("write_codes", {"T": 32}),
}
POINTERS = {
    "*bf16": {"queries", "scales", "decoder", "weights"},
    "*u8": {"codes", "hidden"},
    "*i32": {"pages", "seen", "table", "frequencies"},
    "*fp32": {"mean_queries", "mean", "sums", "log_sums", "log_sum", "averages", "components", "block_cos", "block_sin"}
    | {"place_cos", "place_sin"},
    "fp32": {"scale"},
}
TYPES = {name: kind for kind, names in POINTERS.items() for name in names}
OTHER = {
    "score_rebuilt": {"queries": "*fp32", "components": "i32"},
    "average_codes": {"components": "i32"},
    "write_codes": {"scales": "*i16"},
}


def compiled(name, constants, capability):
    """What a kernel uses."""
    function = getattr(kernels, name)
    types = {**TYPES, **OTHER.get(name, {})}
    signature = {x: "constexpr" if x in constants else types.get(x, "i32") for x in function.arg_names}
    source = ASTSource(fn=function, signature=signature, constexprs=constants)
    options = {"num_warps": 8, "num_stages": 1} if name != "write_codes" else {}
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "kernel.ptx").write_text(kernel.asm["ptx"])
        target = re.search(r"\.target (\w+)", kernel.asm["ptx"])[1]
        assembler = tools / ("ptxas-blackwell" if capability >= 100 else "ptxas")
        command = [assembler, "-v", f"--gpu-name={target}", "-o", "/dev/null", "kernel.ptx"]
        log = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stderr
    return {
        "shared": kernel.metadata.shared,
        "spilled": sum(int(x) for x in re.findall(r"(\d+) bytes spill", log)),
        "registers": max(int(x) for x in re.findall(r"Used (\d+) registers", log)),
    }


if __name__ == "__main__":
    print(json.dumps({name: compiled(*of, int(sys.argv[1])) for name, of in VARIANTS.items()}))
