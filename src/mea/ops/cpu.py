"""CPU kernels of this package: attention of a few queries over a long cache, in bf16 or in codes (``latent_cpu.c``).

PyTorch's kernel converts a bf16 cache, multiplies at a fraction of the CPU's speed, and gives one kv head to one core.
The kernels here are compiled at their first use, once per version of their source and CPU, into the user's cache folder
(``$XDG_CACHE_HOME/mea``). Without a compiler or the CPU's instructions, `usable` is False and PyTorch's kernel reads
the cache instead. ``MEA_KERNELS=reference`` switches them off.
"""

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import BFloat16, Float, Float32, Int, UInt8
from torch import Tensor

from mea.ops import kernels_wanted

SOURCE = Path(__file__).with_name("latent_cpu.c")
FLAGS = ("-O3", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512bf16", "-mavx512vnni", "-fopenmp", "-shared", "-fPIC")
TILES = ("-mamx-tile", "-mamx-int8", "-mamx-bf16")
FEATURES = ("avx512_f", "avx512_bw", "avx512_vl", "avx512_bf16", "avx512_vnni")  # by torch's names
TILE_FEATURES = ("amx_tile", "amx_int8", "amx_bf16")


LARGEST_GROUP = 128  # components
PLACES = 64  # tokens of a block of codes, whose angles are its own plus those of its places

Groups = list[tuple[int, int]]  # bits of a code and number of components, of each group of a token in its order


def usable(queries: Tensor, *others: Tensor) -> bool:
    """Whether the kernels support these tensors on this machine: bf16 on a CPU, contiguous channels, no gradient."""
    return (
        all(x.dtype == torch.bfloat16 and x.device.type == "cpu" for x in (queries, *others))
        and all(x.stride(-1) == 1 for x in others)
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and library() is not None
    )


def codes_usable(queries: Tensor, groups: Groups) -> bool:
    """Whether a `PackedReader` supports these queries and groups on this machine (`usable`); sizes are 16, 32, ..."""
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
        The kernel is not available on this machine (see `usable`), or memory is short.
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
    """Products of queries with keys that the kernel first rotates by the angles of their tokens, in fp32.

    Channels ``c`` and ``c + d / 2`` are a pair, whose angle's cosine and sine are those at ``c``.

    Raises
    ------
    RuntimeError
        The kernel is not available on this machine (see `usable`).
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
    step: BFloat16[Tensor, "..."],
    low: BFloat16[Tensor, "..."],
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
        The kernel is not available on this machine (see `usable`).
    """
    sizes = (ctypes.c_long * 7)(*codes.shape[:4], out.shape[3], bits, group or 0)
    addresses = [x.data_ptr() for x in (codes, step, low, out)]
    _present().mea_decode(*addresses, sizes, (ctypes.c_long * 3)(*out.stride()[:3]), torch.get_num_threads())


class Exact(NamedTuple):
    """Tokens that are read as they are: keys before RoPE and values ``[b, g, t, d]``, channels side by side."""

    keys: Tensor
    values: Tensor


class Angles(NamedTuple):
    """Cosines and sines of the rotary angles of tokens; `blocks` and `exact` include RoPE's attention scaling.

    Attributes
    ----------
    blocks : [b or 1, blocks, d / 2]
        Angles of the first of each 64 coded tokens, from the first that is read.
    places : [64, d / 2]
        Angles of the places in a block: a token's angle is the sum of its block's and its place's.
    exact : [b or 1, t, d / 2]
        Angles of the exact tokens, the first ones before the newest; the new token's is the last.
    """

    blocks: tuple[Tensor, Tensor]
    places: tuple[Tensor, Tensor]
    exact: tuple[Tensor, Tensor]


class _Packed(ctypes.Structure):
    """`struct packed` of the source."""

    _addresses = (
        *("queries", "keys", "values", "first_keys", "first_values", "exact_cosines", "exact_sines"),
        *("codes", "scales", "hidden", "block_cosines", "block_sines", "place_cosines", "place_sines"),
        *("frequency", "key_pairs", "key_decoder", "key_mean", "value_decoder", "value_mean", "groups", "output"),
    )
    _numbers = (
        *("b", "h", "g", "half", "n", "rk", "group_count", "recent", "first", "code_stride", "scale_stride"),
        *("code_sequence", "scale_sequence", "angle_sequence", "exact_sequence"),
        *("keys_sequence", "keys_head", "values_sequence", "values_head"),
    )
    _fields_ = (
        *((name, ctypes.c_void_p) for name in _addresses),
        *((name, ctypes.c_long) for name in _numbers),
        ("scale", ctypes.c_float),
        ("threads", ctypes.c_int),
    )


class PackedReader:
    """How one new token reads a layer of a packed cache (`mea.models.coded_attention`), prepared once.

    Component ``i`` of a group is ``low + step * code``. With `frequency` the first components are pairs ``(re, im)`` of
    keys before RoPE, rotated by their token's angle; averages are of components before this rotation. Without it, keys
    ``key_decoder c + key_mean`` of each head are rebuilt from all components ``c`` and rotated. Channels ``c`` and ``c
    + d / 2`` of a head are a pair for RoPE. CPUs with matrix tiles (AMX) multiply components (rotated if they are
    pairs) and queries in bf16. Others round a row of the decoder to 15 bits of its largest number in a group, and to 8
    bits for codes of 4 or 2 bits, which are coarser than this rounding.

    Parameters
    ----------
    groups
        Of 16, 32, ... `LARGEST_GROUP` components; none has both pairs and others.
    key_decoder
        ``[g, d, r]``, bf16; with `frequency`, ``[g, pairs, 2]``.
    key_mean, value_mean
        ``[g, d]``.
    value_decoder
        ``[g, d, r]``, bf16.
    frequency
        ``[pairs]``, whole numbers below ``d / 2``.

    Raises
    ------
    ValueError
        Groups or tensors do not fit each other.
    """

    def __init__(
        self,
        groups: Groups,
        key_decoder: Float[Tensor, "g _ _"],
        key_mean: Float[Tensor, "g d"],
        value_decoder: BFloat16[Tensor, "g d r"],
        value_mean: Float[Tensor, "g d"],
        frequency: Int[Tensor, " pairs"] | None = None,
    ):
        (g, d), r = key_mean.shape, sum(size for _, size in groups)
        if any(bits not in (2, 4, 8) or size % 16 or not 0 <= size <= LARGEST_GROUP for bits, size in groups):
            raise ValueError(f"groups need 2, 4 or 8 bits and 16, 32, ... {LARGEST_GROUP} components: {groups}")
        pairs = 0 if frequency is None else 2 * len(frequency)
        if pairs not in {sum(size for _, size in groups[:i]) for i in range(len(groups) + 1)}:
            raise ValueError(f"{pairs} components are pairs, which is no sum of the first sizes of the groups {groups}")
        expected = (g, d, r) if frequency is None else (g, pairs // 2, 2)
        if d % 2 or tuple(key_decoder.shape) != expected or tuple(value_decoder.shape) != (g, d, r):
            raise ValueError(
                f"decoders {tuple(key_decoder.shape)} and {tuple(value_decoder.shape)} do not fit {g} heads of {d} "
                f"channels and the groups {groups}"
            )
        self.groups, self.bytes = groups, sum(bits * size // 8 for bits, size in groups)
        kept = {"key_mean": key_mean.float(), "value_decoder": value_decoder, "value_mean": value_mean.float()}
        if frequency is None:
            kept["key_decoder"] = torch.nn.functional.pad(key_decoder, (0, -r % 32, 0, -d % 16))
        else:
            kept |= {"frequency": frequency.to(torch.int32), "key_pairs": key_decoder.float()}
        self._kept = {name: x.contiguous() for name, x in kept.items()}
        self._table = (ctypes.c_long * (2 * len(groups)))(*(x for group in groups for x in group))
        self._call = _Packed(
            **{name: x.data_ptr() for name, x in self._kept.items()},
            groups=ctypes.addressof(self._table), g=g, half=d // 2, rk=pairs, group_count=len(groups),
        )  # fmt: skip

    def read(
        self,
        queries: BFloat16[Tensor, "b h d"],
        recent: Exact,
        first: Exact | None,
        codes: UInt8[Tensor, "b t bytes"],
        scales: BFloat16[Tensor, "b t two_groups"],
        begin: int,
        n: int,
        hidden: UInt8[Tensor, "b n"] | None,
        angles: Angles,
        scale: float,
    ) -> Float32[Tensor, "b h d"]:
        """Attention of one new token over exact tokens and tokens ``[begin, begin + n)`` of the codes.

        Parameters
        ----------
        queries
            Before RoPE, in the order of kv heads.
        recent
            Of any strides of sequence and head; the last is the new token.
        first
            Contiguous.
        codes, scales
            Of any strides of sequence and token. ``scales`` holds ``low, step`` of each group; the first code of a byte
            is in its lowest bits.
        hidden
            Not 0: the coded token gets no weight.

        Raises
        ------
        ValueError
            Tokens, angles or queries do not fit each other.
        RuntimeError
            The kernel is not available on this machine (see `codes_usable`), or memory is short.
        """
        kernel, call, (b, h, d), half = _present(), self._call, queries.shape, self._call.half
        tokens = recent.keys.shape[2] + (0 if first is None else first.keys.shape[2])
        if h % call.g or d != 2 * half:
            raise ValueError(f"{h} queries of {d} channels do not fit {call.g} kv heads of {2 * half}")
        if not 0 < n <= min(codes.shape[1], scales.shape[1]) - begin or begin < 0:
            raise ValueError(f"tokens {begin} to {begin + n} are not all in a cache of {codes.shape[1]}")
        if codes.shape[-1] < self.bytes or scales.shape[-1] != 2 * len(self.groups):
            raise ValueError(
                f"{codes.shape[-1]} bytes and {scales.shape[-1]} scales of a token do not hold {self.groups}"
            )
        side_by_side = (codes, scales, recent.keys, recent.values)
        if any(x.stride(-1) != 1 for x in side_by_side) or any(x.stride(2) != d for x in recent):
            raise ValueError("codes, scales and the channels of exact tokens must be contiguous")
        for (cos, _), rows in ((angles.blocks, -(-n // PLACES)), (angles.exact, tokens)):
            if cos.shape[0] not in (1, b) or cos.shape[1] < rows or cos.shape[2] != half:
                raise ValueError(f"angles {tuple(cos.shape)} for {b} sequences of {rows} tokens or blocks, {half} each")
        if any(x.shape != (PLACES, half) for x in angles.places):
            raise ValueError(f"angles {tuple(angles.places[0].shape)} of places, not {(PLACES, half)}")
        if hidden is not None and hidden.shape != (b, n):
            raise ValueError(f"hidden is {tuple(hidden.shape)}, not {(b, n)}")
        output = torch.empty(b, h, d)
        queries = queries.contiguous()
        tables = [x if x.is_contiguous() else x.contiguous() for pair in angles for x in pair]
        old = None if first is None else [x.contiguous() for x in first]
        blocks, exact = tables[0], tables[4]
        call.queries, call.keys, call.values = (x.data_ptr() for x in (queries, *recent))
        call.first_keys, call.first_values = (None, None) if old is None else (x.data_ptr() for x in old)
        call.block_cosines, call.block_sines, call.place_cosines, call.place_sines = (x.data_ptr() for x in tables[:4])
        call.exact_cosines, call.exact_sines = (x.data_ptr() for x in tables[4:])
        call.codes = codes.data_ptr() + begin * codes.stride(1)
        call.scales = scales.data_ptr() + begin * scales.stride(1) * scales.element_size()
        call.hidden = None if hidden is None else hidden.data_ptr()
        call.output = output.data_ptr()
        call.b, call.h, call.n, call.recent, call.first = b, h, n, recent.keys.shape[2], tokens - recent.keys.shape[2]
        call.code_sequence, call.code_stride, _ = codes.stride()
        call.scale_sequence, call.scale_stride, _ = scales.stride()
        call.angle_sequence = 0 if blocks.shape[0] == 1 else blocks.stride(0)
        call.exact_sequence = 0 if exact.shape[0] == 1 else exact.stride(0)
        call.keys_sequence, call.keys_head = recent.keys.stride()[:2]
        call.values_sequence, call.values_head = recent.values.stride()[:2]
        call.scale, call.threads = scale, torch.get_num_threads()
        if kernel.mea_read_packed(ctypes.byref(call)):
            raise RuntimeError(f"not enough memory to read {n:,} tokens with {b * h:,} queries")
        return output


def push(buffers: Sequence[BFloat16[Tensor, "b g t d"]], tokens: Sequence[BFloat16[Tensor, "b g 1 d"]]) -> None:
    """Drop the oldest token of each contiguous buffer and put a new one behind the others, in place."""
    for buffer, token in zip(buffers, tokens, strict=True):
        b, g, t, d = buffer.shape
        sizes = (ctypes.c_long * 6)(b, g, t, d, token.stride(0), token.stride(1))
        _present().mea_push(buffer.data_ptr(), token.data_ptr(), sizes)


def _present() -> ctypes.CDLL:
    kernel = library()
    if kernel is None:
        raise RuntimeError("the kernel needs a processor with AVX-512 bf16 and a C compiler: see mea.ops.cpu.usable")
    return kernel


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernel; None if it is not available, with a message in the log if only a compiler is missing."""
    if not kernels_wanted() or not _processor_has(FEATURES):
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
    kernel.mea_read_packed.argtypes = [ctypes.c_void_p]
    kernel.mea_push.argtypes = [ctypes.c_void_p] * 3
    kernel.mea_use_tiles(1)
    kernel.mea_turned_scores.restype = kernel.mea_decode.restype = kernel.mea_push.restype = None
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
    flags = FLAGS + TILES if _processor_has(TILE_FEATURES) else FLAGS
    identity = hashlib.sha256(SOURCE.read_bytes() + " ".join((compiler, *flags)).encode()).hexdigest()[:16]
    target = folder / f"latent_cpu-{identity}.so"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch, target.name)
            command = [*compiler.split(), *flags, "-o", str(made), str(SOURCE), "-lm"]
            subprocess.run(command, check=True, capture_output=True, text=True)
            os.replace(made, target)
    return target
