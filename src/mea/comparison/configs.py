"""The compared ways to make a cache smaller, each with its name in tables, and the default sets of commands."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mea.compression.methods import DEFAULT_METHOD, METHODS
from mea.compression.options import CompressOptions
from mea.evaluate.through_cache import ThroughCache
from mea.models.quantized_cache import CacheFormat, QuantisedCache
from mea.names import CODED_KEEPS, RANKED_KEEPS

BACKEND_BITS = (4, 2)  # of transformers' own cache


@dataclass(frozen=True)
class CacheConfig:
    """A quantised cache: its bits, and whether this package or one of transformers' backends makes it."""

    bits: int
    backend: str = ""

    @property
    def read(self) -> ThroughCache:
        """How a text is read through this cache."""
        form = CacheFormat()
        return ThroughCache(self.make, form.block, 0 if self.backend else form.first)

    def absent(self, config: Any) -> str:
        """Why this cache cannot be made on this machine; empty if it can."""
        try:
            self.make(config)
        except (ImportError, ValueError) as error:
            return " ".join(str(error).split())[:200]
        return ""

    def make(self, config: Any) -> Any:
        """An empty cache."""
        if not self.backend:
            return QuantisedCache(config, self.bits)
        from transformers import QuantizedCache

        # Groups and exact window as in this package's own; the axes are those that each backend has for tokens.
        axis = 1 if self.backend.lower() == "hqq" else 0
        return QuantizedCache(
            self.backend, config, nbits=self.bits, q_group_size=32, residual_length=CacheFormat().block,
            axis_key=axis, axis_value=axis,
        )  # fmt: skip


@dataclass(frozen=True)
class MethodConfig:
    """One way to make a cache smaller.

    Attributes
    ----------
    label
        Name in tables and of the record.
    method, keep, refine
        As in `mea.compression.options.CompressOptions`. A `method` of ``"none"`` leaves ranks as they are, and one of
        ``"kvpress NAME"`` or ``"cacheshrink NAME"`` is that method of the peer, scored on continuations alone.
    bits, backend
        See `CacheConfig`; None is an ordinary cache. Others are for a `method` of ``"none"``.
    series
        Name shared by one method's configs at several sizes; their labels then give the size.
    recovered
        Whether to measure after training, which is the same for all such configs of a comparison.
    """

    label: str
    method: str
    keep: float = 0.5
    refine: int = 0
    bits: int | None = None
    backend: str = ""
    series: str = ""
    recovered: bool = False

    @property
    def options(self) -> CompressOptions | None:
        """Options of the fit, without the calibration text; None if nothing is fitted."""
        if self.method == "none" or self.peer:
            return None
        return CompressOptions(keep=self.keep, method=self.method, refine=self.refine)

    @property
    def peer(self) -> str:
        """The other package that the method belongs to, if any."""
        return self.method.split()[0] if " " in self.method else ""

    @property
    def calibrated(self) -> bool:
        """Whether its result depends on the calibration text."""
        return self.options is not None or self.peer == "cacheshrink"

    @property
    def cache(self) -> CacheConfig | None:
        """The quantised cache; None for an ordinary cache."""
        return None if self.bits is None else CacheConfig(self.bits, self.backend)


DEMO = (
    MethodConfig("predictive 0.2 (default)", "predictive", 0.2, series="predictive"),
    MethodConfig("joint 0.2, keys rebuilt", "joint", 0.2, series="joint"),
    MethodConfig("whole cache in 4 bits", "none", 1.0, bits=4, series="quantised"),
    MethodConfig("paper's svd 0.5, 1 key and 2 value heads", "svd", 0.5, series="svd"),
)
REFINED = MethodConfig(
    f"{DEFAULT_METHOD} 0.2, refined", DEFAULT_METHOD, 0.2, refine=2, series=f"{DEFAULT_METHOD}, refined"
)


def method_configs(
    methods: Sequence[str],
    keeps: Sequence[float] = (),
    *,
    bits: Sequence[int] = (8, 4, 3, 2),
    backends: Sequence[str] = (),
    presses: Sequence[str] = (),
    conversions: Sequence[str] = (),
    recovered: bool = False,
) -> list[MethodConfig]:
    """Every method at every size, the uncompressed model's quantised cache, and the peers' methods.

    Parameters
    ----------
    methods, keeps
        Names in `mea.compression.methods.METHODS`, and fractions of the bytes; by default `CODED_KEEPS` for packed
        caches and `RANKED_KEEPS` for other methods. The caller has to leave out impossible sizes.
    bits
        Bits of this package's quantised cache.
    backends
        Backends of transformers' own cache in 4 and 2 bits: ``hqq``, ``quanto``.
    presses, conversions
        Classes of kvpress, and of cacheshrink's ways to compress: ``separate``, ``joint``, ``xkv``.
    recovered
        Whether to add every method at every size after training.
    """
    coded = {method for method in methods if method in METHODS and METHODS[method].coded}
    sizes = {method: keeps or (CODED_KEEPS if method in coded else RANKED_KEEPS) for method in methods}
    configs = [_sized(method, keep) for method in methods for keep in sizes[method]]
    if recovered:
        configs += [
            replace(config, label=f"{config.label}, recovered", series=f"{config.series}, recovered", recovered=True)
            for config in configs
        ]
    configs += [MethodConfig(f"{count} bits", "none", 1.0, bits=count, series="quantised") for count in bits]
    configs += [
        MethodConfig(f"transformers {name} {count} bits", "none", 1.0, bits=count, backend=name)
        for name in backends
        for count in BACKEND_BITS
    ]
    peers = [f"kvpress {press}" for press in presses] + [f"cacheshrink {name}" for name in conversions]
    return configs + [_sized(peer, keep) for peer in peers for keep in keeps or RANKED_KEEPS]


def _sized(method: str, keep: float) -> MethodConfig:
    return MethodConfig(f"{method} {keep:.3g}", method, keep, series=method)
