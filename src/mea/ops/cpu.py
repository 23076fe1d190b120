"""Our own kernels for processors: a few queries over a long cache, in bf16 or in codes (``latent_cpu.c``).

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
from jaxtyping import BFloat16, Float, Float16, Float32, Int32, UInt8
from torch import Tensor

SOURCE = Path(__file__).with_name("latent_cpu.c")
FLAGS = ("-O3", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512bf16", "-mavx512vnni", "-fopenmp", "-shared", "-fPIC")
FEATURES = ("avx512_f", "avx512_bw", "avx512_vl", "avx512_bf16", "avx512_vnni")  # by torch's names


LARGEST_GROUP = 128  # components
PLACES = 64  # tokens of a block of codes, whose angles are its own plus those of its places

Groups = list[tuple[int, int]]  # bits of a code and number of components, of each group of a token in its order


def usable(queries: Tensor, *others: Tensor) -> bool:
    """Whether the kernels take these tensors, here: bf16 on this processor, channels side by side, no gradient."""
    return (
        all(x.dtype == torch.bfloat16 and x.device.type == "cpu" for x in (queries, *others))
        and all(x.stride(-1) == 1 for x in others)
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and library() is not None
    )


def codes_usable(queries: Tensor, groups: Groups) -> bool:
    """Whether `read_pairs` and `read_joint` take these queries and groups, here: see `usable`; sizes are 16, 32, ..."""
    return (
        all(bits in (2, 4, 8) and 0 <= size <= LARGEST_GROUP and size % 16 == 0 for bits, size in groups)
        and len(groups) > 0
        and queries.shape[-1] % 2 == 0
        and usable(queries)
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


def read_pairs(
    queries: BFloat16[Tensor, "b h columns"],
    codes: UInt8[Tensor, "b t bytes"],
    scales: BFloat16[Tensor, "b t two_groups"],
    groups: Groups,
    frequency: Int32[Tensor, " half"],
    base: tuple[Float32[Tensor, "_ blocks f"], Float32[Tensor, "_ blocks f"]],
    offsets: tuple[Float32[Tensor, "64 f"], Float32[Tensor, "64 f"]],
    begin: int,
    n: int,
    hidden: UInt8[Tensor, "b n"] | None,
    scale: float,
) -> tuple[Float32[Tensor, "b h r"], Float32[Tensor, "b h"]]:
    """One new token reads tokens ``[begin, begin + n)`` of codes whose first components are pairs of a key before RoPE.

    Component ``i`` of a group is ``low + step * code``. The pairs ``(re, im)``, the first ``2 * half`` components, are
    turned by the angle of their token; behind them stand, for each frequency, the cosine and the sine of that angle.
    The score of a token is ``scale`` times the product of these ``columns = 2 * half + 2 * f`` numbers with a query.
    The weighted average is that of all components, not turned.

    Parameters
    ----------
    queries
        Absorbed.
    codes, scales
        Of any strides of sequence and token. ``scales`` holds ``low, step`` of each group; the first code of a byte is
        in its lowest bits; no group has both pairs and other components. At most 128 components are a group.
    frequency
        Which angle turns a pair.
    base, offsets
        Cosines and sines of the angles of each block of 64 tokens, counted from ``begin``, and of the places in a
        block, which add up to a token's. Any factor is in ``base``.
    hidden
        Not 0: the token gets no weight.

    Returns
    -------
    The averages, and the natural log of the sum of exponentials of the scores; 0 and -1e30 if no token is visible.

    Raises
    ------
    ValueError
        Groups, tokens, angles or queries do not fit each other.
    RuntimeError
        The kernel cannot be had here (see `codes_usable`), or memory is short.
    """
    pairs = 2 * frequency.numel()
    if pairs not in {sum(size for _, size in groups[:i]) for i in range(len(groups) + 1)}:
        raise ValueError(f"{pairs} components are pairs, which is no sum of the first sizes of the groups {groups}")
    if queries.shape[-1] != pairs + 2 * offsets[0].shape[-1]:
        raise ValueError(f"queries have {queries.shape[-1]} columns, not {pairs} + 2 * {offsets[0].shape[-1]}")
    return _read_codes(
        queries, codes, scales, groups, frequency.to(torch.int32), None, None, base, offsets, begin, n, hidden, scale
    )


def read_joint(
    queries: BFloat16[Tensor, "b h d"],
    codes: UInt8[Tensor, "b t bytes"],
    scales: BFloat16[Tensor, "b t two_groups"],
    groups: Groups,
    decoder: BFloat16[Tensor, "g d r"],
    mean: Float32[Tensor, "g d"],
    base: tuple[Float32[Tensor, "_ blocks f"], Float32[Tensor, "_ blocks f"]],
    offsets: tuple[Float32[Tensor, "64 f"], Float32[Tensor, "64 f"]],
    begin: int,
    n: int,
    hidden: UInt8[Tensor, "b n"] | None,
    scale: float,
) -> tuple[Float32[Tensor, "b h r"], Float32[Tensor, "b h"]]:
    """As `read_pairs`, where the ``r`` components are a latent ``c`` and a head's keys ``decoder c + mean``, turned.

    Channels ``c`` and ``c + d / 2`` of a key are a pair, turned by angle ``c``. Queries are in the order of kv heads. A
    row of the decoder is rounded to 15 bits of its largest number in a group, and to 8 bits where codes have 4 or 2:
    those are coarse enough for that.

    Raises
    ------
    ValueError
        Groups, tokens, angles, the decoder or queries do not fit each other.
    RuntimeError
        The kernel cannot be had here (see `codes_usable`), or memory is short.
    """
    heads, width, latent = decoder.shape
    if (queries.shape[-1], mean.shape, sum(size for _, size in groups)) != (width, (heads, width), latent):
        raise ValueError(
            f"a decoder {tuple(decoder.shape)} does not fit queries of {queries.shape[-1]} channels, "
            f"a mean {tuple(mean.shape)} and groups {groups}"
        )
    if queries.shape[1] % heads or width != 2 * offsets[0].shape[-1]:
        raise ValueError(
            f"{queries.shape[1]} queries of {width} channels do not fit {heads} kv heads and "
            f"{offsets[0].shape[-1]} angles"
        )
    return _read_codes(queries, codes, scales, groups, None, decoder, mean, base, offsets, begin, n, hidden, scale)


def _read_codes(
    queries: Tensor,
    codes: Tensor,
    scales: Tensor,
    groups: Groups,
    frequency: Tensor | None,
    decoder: Tensor | None,
    mean: Tensor | None,
    base: tuple[Tensor, Tensor],
    offsets: tuple[Tensor, Tensor],
    begin: int,
    n: int,
    hidden: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    kernel, (b, h, _), angles = _present(), queries.shape, offsets[0].shape[-1]
    blocks, components = -(-n // PLACES), sum(size for _, size in groups)
    if not 0 < n <= min(codes.shape[1], scales.shape[1]) - begin or begin < 0:
        raise ValueError(f"tokens {begin} to {begin + n} are not all in a cache of {codes.shape[1]}")
    if any(bits not in (2, 4, 8) or size % 16 or not 0 <= size <= LARGEST_GROUP for bits, size in groups):
        raise ValueError(f"groups need 2, 4 or 8 bits and 16, 32, ... {LARGEST_GROUP} components: {groups}")
    if codes.shape[-1] < sum(bits * size // 8 for bits, size in groups) or scales.shape[-1] != 2 * len(groups):
        raise ValueError(f"{codes.shape[-1]} bytes and {scales.shape[-1]} scales of a token do not hold {groups}")
    if codes.stride(-1) != 1 or scales.stride(-1) != 1:
        raise ValueError("codes and scales of a token have to stand side by side")
    if any(x.shape[0] not in (1, b) or x.shape[1] < blocks or x.shape[2] != angles for x in base):
        raise ValueError(f"angles {tuple(base[0].shape)} of blocks, for {b} sequences of {blocks} with {angles} each")
    if any(x.shape != (PLACES, angles) for x in offsets):
        raise ValueError(f"angles {tuple(offsets[0].shape)} of places, not {(PLACES, angles)}")
    if hidden is not None and hidden.shape != (b, n):
        raise ValueError(f"hidden is {tuple(hidden.shape)}, not {(b, n)}")
    averages = queries.new_empty(b, h, components, dtype=torch.float32)
    lse = queries.new_empty(b, h, dtype=torch.float32)
    tables = [x.float().contiguous() for x in (*base, *offsets)]
    kept = [None if x is None else x.contiguous() for x in (queries, hidden, frequency, decoder, mean)]
    query, *others = [None if x is None else x.data_ptr() for x in kept]
    starts = [x.data_ptr() + begin * x.stride(1) * x.element_size() for x in (codes, scales)]
    of_sequence = 0 if base[0].shape[0] == 1 else tables[0].stride(0)
    pairs = 0 if frequency is None else 2 * frequency.numel()
    heads = 1 if decoder is None else decoder.shape[0]
    strides = (codes.stride(1), scales.stride(1), codes.stride(0), scales.stride(0), of_sequence)
    sizes = (ctypes.c_long * 12)(b, h, n, angles, pairs, len(groups), heads, *strides)
    table = (ctypes.c_long * (2 * len(groups)))(*(x for group in groups for x in group))
    results = [x.data_ptr() for x in (*tables, averages, lse)]
    if kernel.mea_read_codes(query, *starts, *others, *results, sizes, table, scale, torch.get_num_threads()):
        raise RuntimeError(f"not enough memory to read {n:,} tokens with {b * h:,} queries")
    return averages, lse


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
    kernel.mea_read_codes.argtypes = [*[ctypes.c_void_p] * 15, ctypes.c_float, ctypes.c_int]
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
