"""Precision, speed and memory of this machine: its fastest number format, peak FLOP/s, and reuse of freed memory."""

import ctypes
import math
import os
import time

import torch

from mea.ops.device import used_device

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # parameters of glibc's mallopt
SET_BY_USER = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "LD_PRELOAD")


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
    """A dtype's name as it is, or for ``"fast"`` that of `fast_dtype` on the device that is used."""
    return str(fast_dtype(used_device())).removeprefix("torch.") if name == "fast" else name


def peak_flops(device: str, precision: str) -> float:
    """Most operations per second of a processor, measured on one large product of matrices.

    On a GPU the result is below the data sheet's: utilisation is relative to a speed that was measured.
    """
    size = 4096 if device == "cuda" else 1024
    x = torch.randn(size, size, device=device, dtype=getattr(torch, precision))
    best, end = math.inf, time.perf_counter() + 0.4  # long enough that other programs leave gaps
    while best == math.inf or time.perf_counter() < end:
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        torch.mm(x, x)
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def keep_freed_memory() -> bool:
    """Make this process keep the memory that it frees for its next tensors; return whether that was possible.

    The C library gives blocks of tens of megabytes back to the system when they are freed, and gets the next ones page
    by page, each filled with zeros first. Distillation of a model with a large vocabulary on a CPU spends most of its
    time on this. The drawback: the process holds its peak memory until it ends.

    Only glibc has this setting. Nothing changes if the user has set glibc's variables or loads another allocator.
    """
    if any(name in os.environ for name in SET_BY_USER):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return False
    return all(mallopt(which, 2**30) for which in (MMAP_THRESHOLD, TRIM_THRESHOLD))
