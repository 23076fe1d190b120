"""Which number format a device multiplies fastest, and how fast."""

import math
import time

import torch


def fast_dtype(device: torch.device | str = "cpu") -> torch.dtype:
    """bfloat16 where the device has instructions for its products, else float32.

    A processor without them emulates bfloat16: on one with AVX2 only, products take seven times as long as in fp32.
    """
    device = torch.device(device)
    if device.type == "cpu":
        able = torch.cpu.get_capabilities()
        fast = any(able.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))
    elif device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = True
    return torch.bfloat16 if fast else torch.float32


def named_dtype(name: str) -> str:
    """A dtype's name as it is, or for ``"fast"`` that of `fast_dtype` on this machine."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return str(fast_dtype(device)).removeprefix("torch.") if name == "fast" else name


def peak_flops(device: str, precision: str) -> float:
    """Most operations per second of a processor, measured on one large product of matrices.

    Of a GPU it is less than the number on its data sheet: utilisation is against what the machine can really do.
    """
    size = 4096 if device == "cuda" else 1024
    x = torch.randn(size, size, device=device, dtype=getattr(torch, precision))
    best = math.inf
    for _ in range(4):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        torch.mm(x, x)
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
