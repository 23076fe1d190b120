"""What is compared: ways to compress, each with its name in tables, and the sets of them that commands run."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mea.comparison.measure import CacheConfig
from mea.compression.methods import DEFAULT_METHOD
from mea.compression.plan import Allocation, CompressOptions


@dataclass(frozen=True)
class MethodConfig:
    """One way to compress.

    Attributes
    ----------
    label
        Its name in tables and of its record.
    method, keep, allocate, refine
        As in `mea.compression.plan.CompressOptions`; a weighting stands behind a colon, ``"post_rope:uniform"``. A
        `method` of ``"none"`` leaves ranks as they are, and one of ``"kvpress NAME"`` or ``"cacheshrink NAME"`` is that
        method of the peer, scored on continuations alone.
    bits, backend
        See `CacheConfig`; None is an ordinary cache.
    series
        What configs at several sizes share; their labels then say the size.
    recovered
        Measured after the training that all such configs of a comparison get.
    """

    label: str
    method: str
    keep: float = 0.5
    allocate: Allocation | bool = False
    refine: int = 0
    bits: int | None = None
    backend: str = ""
    series: str = ""
    recovered: bool = False

    @property
    def options(self) -> CompressOptions | None:
        """Of the fit, but for the calibration text; None where nothing is fitted."""
        if self.method == "none" or self.peer:
            return None
        return CompressOptions(keep=self.keep, method=self.method, allocate=self.allocate, refine=self.refine)

    @property
    def peer(self) -> str:
        """The package whose method it is, if it is not this one."""
        return self.method.split()[0] if " " in self.method else ""

    @property
    def calibrated(self) -> bool:
        """Whether its result depends on the calibration text."""
        return self.options is not None or self.peer == "cacheshrink"

    @property
    def stored(self) -> CacheConfig | None:
        """How the cache is stored."""
        return None if self.bits is None else CacheConfig(self.bits, self.backend)


DEMO = (
    MethodConfig(f"{DEFAULT_METHOD} (default)", DEFAULT_METHOD),
    MethodConfig("post_rope:sensitivity", "post_rope:sensitivity"),
    MethodConfig("post_rope:uniform", "post_rope:uniform"),
    MethodConfig("joint latent, slower to read", "joint"),
    MethodConfig("paper's svd, 1 key and 2 value heads", "svd"),
)
REFINED = MethodConfig(f"{DEFAULT_METHOD}, refined", DEFAULT_METHOD, refine=2)


def method_configs(
    methods: Sequence[str],
    keeps: Sequence[float],
    *,
    bits: Sequence[int] = (8, 4, 2),
    backends: Sequence[str] = (),
    allocated: Sequence[float] = (),
    presses: Sequence[str] = (),
    conversions: Sequence[str] = (),
    recovered: bool = False,
) -> list[MethodConfig]:
    """Every method at every size, few bits alone and on top of the first method, and the peers' at the same sizes.

    Parameters
    ----------
    methods, keeps
        Names in `mea.compression.methods.METHODS`, and fractions of the bytes. Sizes that a method with whole heads
        cannot have are the caller's to leave out.
    bits
        Of this package's cache, by itself and (8 and 4) on top of the first method.
    backends
        Of transformers' own cache in 4 bits: ``hqq``, ``quanto``.
    allocated
        Sizes at which ranks are also chosen layer by layer, with the first method.
    presses, conversions
        Classes of kvpress, and of cacheshrink's ways to compress: ``separate``, ``joint``, ``xkv``.
    recovered
        Every method at every size also after training.
    """
    first = methods[0]
    found = [MethodConfig(f"{method} {keep:.3g}", method, keep, series=method) for method in methods for keep in keeps]
    if recovered:
        found += [
            replace(x, label=f"{x.label}, recovered", series=f"{x.series}, recovered", recovered=True) for x in found
        ]
    found += [
        MethodConfig(f"{first} allocated {keep:.3g}", first, keep, allocate=True, series=f"{first}, allocated")
        for keep in allocated
    ]
    found += [MethodConfig(f"{count} bits", "none", 1.0, bits=count, series="few bits") for count in bits]
    found += [
        MethodConfig(f"{first} {keep:.3g}, {count} bits", first, keep, bits=count, series=f"{first}, {count} bits")
        for count in bits
        if count > 2
        for keep in keeps
    ]
    found += [MethodConfig(f"transformers {each} 4 bits", "none", 1.0, bits=4, backend=each) for each in backends]
    others = [f"kvpress {press}" for press in presses] + [f"cacheshrink {name}" for name in conversions]
    return found + [
        MethodConfig(f"{other} {keep:.3g}", other, keep, series=other) for other in others for keep in keeps
    ]
