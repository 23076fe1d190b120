"""Our own kernels for processors: a few queries over a long cache, in bf16 or quantised (``latent_cpu.c``).

PyTorch's kernel converts a bf16 cache and multiplies at a fraction of what the processor can do, and gives one kv head
to one core. The kernel is compiled when it is first wanted, once per version of its source and processor, into the
user's cache folder (``$XDG_CACHE_HOME/mea``); where there is no compiler, or the processor lacks the instructions,
`usable` is False and PyTorch's kernel reads the cache instead. ``MEA_NO_KERNEL=1`` switches it off.
"""

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from jaxtyping import Float, Float16, UInt8
from torch import Tensor

SOURCE = Path(__file__).with_name("latent_cpu.c")
FLAGS = ("-O3", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512bf16", "-fopenmp", "-shared", "-fPIC")
FEATURES = ("avx512_f", "avx512_bw", "avx512_vl", "avx512_bf16")  # by torch's names


def usable(queries: Tensor, *others: Tensor) -> bool:
    """Whether the kernels take these tensors, here: bf16 on this processor, channels side by side, no gradient."""
    return (
        all(x.dtype == torch.bfloat16 and x.device.type == "cpu" for x in (queries, *others))
        and all(x.stride(-1) == 1 for x in others)
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and library() is not None
    )


def attend(
    queries: Float[Tensor, "b g n r"], keys: Float[Tensor, "b g t r"], values: Float[Tensor, "b g t v"], scale: float
) -> Float[Tensor, "b g n v"]:
    """``softmax(scale * Q K^T) V`` of every head, all tokens visible; sums and softmax are fp32.

    Raises
    ------
    RuntimeError
        The kernel cannot be had here (see `usable`), or memory is short.
    """
    kernel = _present()
    (b, g, n, r), t, v = queries.shape, keys.shape[2], values.shape[3]
    queries, output = queries.contiguous(), queries.new_empty(b, g, n, v)
    sizes, threads = (ctypes.c_long * 6)(b, g, n, t, r, v), torch.get_num_threads()
    strides = [(ctypes.c_long * 3)(*x.stride()[:3]) for x in (keys, values)]
    addresses = [x.data_ptr() for x in (queries, keys, values, output)]
    if kernel.mea_attend_latents(*addresses, sizes, *strides, scale, threads):
        raise RuntimeError(f"not enough memory to attend to {t:,} tokens with {b * g * n:,} queries")
    return output


def turned_scores(
    queries: Float[Tensor, "b g n d"],
    keys: Float[Tensor, "b g t d"],
    cos: Float[Tensor, "_ t d"],
    sin: Float[Tensor, "_ t d"],
) -> Float[Tensor, "b g n t"]:
    """Products of queries with keys that are rotated by the angles of their tokens on the way, in fp32.

    Channels ``c`` and ``c + d / 2`` are a pair, whose angle's cosine and sine are those at ``c``.

    Raises
    ------
    RuntimeError
        The kernel cannot be had here (see `usable`).
    """
    kernel = _present()
    (b, g, n, d), t = queries.shape, keys.shape[2]
    queries, scores = queries.contiguous(), queries.new_empty(b, g, n, t, dtype=torch.float32)
    cos, sin = cos.expand(b, -1, -1), sin.expand(b, -1, -1)
    if cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    sizes, threads = (ctypes.c_long * 5)(b, g, n, t, d), torch.get_num_threads()
    strides = [(ctypes.c_long * 3)(*x.stride()) for x in (keys[..., 0], cos)]
    addresses = [x.data_ptr() for x in (queries, keys, cos, sin, scores)]
    kernel.mea_turned_scores(*addresses, sizes, *strides, threads)
    return scores


def decode(
    codes: UInt8[Tensor, "b g n block bytes"],
    step: Float16[Tensor, "..."],
    low: Float16[Tensor, "..."],
    out: Float[Tensor, "b g t width"],
    bits: int,
    group: int | None,
) -> None:
    """Fill ``out`` (``t = n * block``) with ``low + code * step``, multiplied and added in fp32.

    Parameters
    ----------
    codes
        Contiguous; the first of a byte is in its lowest bits.
    step, low
        Contiguous, a number for each channel of a block; or for each `group` channels of a token, a multiple of 16.

    Raises
    ------
    RuntimeError
        The kernel cannot be had here (see `usable`).
    """
    sizes = (ctypes.c_long * 7)(*codes.shape[:4], out.shape[3], bits, group or 0)
    addresses = [x.data_ptr() for x in (codes, step, low, out)]
    _present().mea_decode(*addresses, sizes, (ctypes.c_long * 3)(*out.stride()[:3]), torch.get_num_threads())


def _present() -> ctypes.CDLL:
    kernel = library()
    if kernel is None:
        raise RuntimeError("the kernel needs a processor with AVX-512 bf16 and a C compiler: see mea.ops.cpu.usable")
    return kernel


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernel; None where it cannot be had, with a message in the log if only a compiler is missing."""
    if os.environ.get("MEA_NO_KERNEL") or not _processor_has(FEATURES):
        return None
    try:
        kernel = ctypes.CDLL(str(_compiled()))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or error
        logging.getLogger(__name__).warning("decoding in bf16 is slower than it could be: no kernel: %s", reason)
        return None
    addresses = [ctypes.c_void_p] * 4
    kernel.mea_attend_latents.argtypes = [*addresses, *[ctypes.c_void_p] * 3, ctypes.c_float, ctypes.c_int]
    kernel.mea_turned_scores.argtypes = [*addresses, *[ctypes.c_void_p] * 4, ctypes.c_int]
    kernel.mea_decode.argtypes = [*addresses, *[ctypes.c_void_p] * 2, ctypes.c_int]
    kernel.mea_turned_scores.restype = kernel.mea_decode.restype = None
    return kernel


def _processor_has(features: tuple[str, ...]) -> bool:
    able = torch.cpu.get_capabilities()
    return all(able.get(feature) for feature in features)


def _compiled() -> Path:
    """The library's file, compiled if it is not there; it appears complete or not at all."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise FileNotFoundError("no C compiler (cc, gcc or clang) on the path; install one or set CC")
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mea"
    identity = hashlib.sha256(SOURCE.read_bytes() + " ".join((compiler, *FLAGS)).encode()).hexdigest()[:16]
    target = folder / f"latent_cpu-{identity}.so"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch, target.name)
            command = [*compiler.split(), *FLAGS, "-o", str(made), str(SOURCE), "-lm"]
            subprocess.run(command, check=True, capture_output=True, text=True)
            os.replace(made, target)
    return target
