"""Every option of a compression, from the command line to the record."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mea.compression.calibrate.text import Calibration
from mea.names import DEFAULT_METHOD


@dataclass(frozen=True)
class Allocation:
    """How ranks are chosen layer by layer (`mea.compression.allocate.search`), instead of equal ones.

    Attributes
    ----------
    equal
        Keys and values get the same rank within a layer: PyTorch's fast kernels on processors need it.
    same
        All layers get the same ranks.
    step
        Ranks are multiples of it; by default the method's own step.
    text, tokens
        What the choice is measured on; by default calibration text that the factors have not seen.
    windows
        Calibration windows that factors are fitted on while choosing, at most: with a few, other ranks come out best.
    tries
        Exchanges of ranks that are measured.
    """

    equal: bool = False
    same: bool = False
    step: int | None = None
    text: str | None = None
    tokens: int = 4096
    windows: int = 16
    tries: int = 64

    def __post_init__(self) -> None:
        if self.tries < 1 or self.windows < 1:
            raise ValueError(f"an allocation takes at least 1 window and 1 try, not {self.windows} and {self.tries}")
        if self.step is not None and self.step < 1:
            raise ValueError(f"ranks are multiples of a positive step, not of {self.step}")


@dataclass(frozen=True)
class Refinement:
    """How layers are refined.

    Attributes
    ----------
    passes
        Over the calibration windows, for every layer.
    window
        Tokens that are read in one piece, at most those of a calibration window.
    batch
        Windows a step.
    lr, base_lr
        Peak learning rates of the factors (encoders and decoders), and of the projections of queries, keys and output.
    held_out
        One window in so many is not trained on: a layer on which its loss did not fall stays as it was.
    seed
        Of the windows' order and positions.
    """

    passes: int = 1
    window: int = 512
    batch: int = 2
    lr: float = 5e-4
    base_lr: float = 2e-4
    held_out: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if self.passes < 1 or self.window < 8 or self.batch < 1 or self.held_out < 2:
            raise ValueError(
                "refinement takes at least 1 pass, windows of 8 tokens, 1 window a step and 1 window in 2 to train on, "
                f"not {self.passes}, {self.window}, {self.batch} and 1 in {self.held_out}"
            )
        if not (self.lr > 0 and self.base_lr > 0):
            raise ValueError(f"learning rates must be positive, not {self.lr} and {self.base_lr}")


@dataclass(frozen=True)
class CompressOptions:
    """Every option of a compression, from the command line to the record.

    Attributes
    ----------
    keep
        The fraction of the cache's bytes that stays, `DEFAULT_KEEP` if no other budget is given.
    budget
        Instead: bytes at a context length, such as ``"64k tokens in 2 GiB"``.
    layout
        Instead: ``"full"``, ``"half"`` or ``"deep"`` (with `keep`, of the layers that they name), or a file of ranks.
    method
        A name in `mea.compression.methods.METHODS`.
    weighting
        Of the method ``"post_rope"``: a name in `mea.compression.methods.post_rope.WEIGHTINGS`.
    groups
        Of neighbouring heads, each with latents of its own: as many as ranks that share an attention layer in tensor
        parallelism.
    calibration
        The text, its length, and the seed of its windows.
    allocate
        Choose ranks layer by layer; the layout is only where the search begins. True stands for an `Allocation`.
    refine
        Passes over the calibration text in which every layer is refined after the closed form, or a `Refinement`.
    """

    keep: float | None = None
    budget: str | None = None
    layout: str | Path | None = None
    method: str = DEFAULT_METHOD
    weighting: str | None = None
    groups: int = 1
    calibration: Calibration = field(default_factory=Calibration)
    allocate: Allocation | bool = False
    refine: Refinement | int = 0

    def __post_init__(self) -> None:
        if self.budget is not None and (self.keep is not None or self.layout is not None):
            raise ValueError("give one budget: keep, bytes at a context length, or a layout")

    @classmethod
    def of(cls, options: "CompressOptions | None", fields: dict[str, Any]) -> "CompressOptions":
        """The options that are given, or new ones with these fields.

        Raises
        ------
        TypeError
            Both are given, or a field is unknown.
        """
        if options is None:
            return cls(**fields)
        if fields:
            raise TypeError(f"give options or {', '.join(fields)}, not both")
        return options

    @property
    def allocation(self) -> Allocation | None:
        """How ranks are chosen layer by layer, if they are."""
        return Allocation() if self.allocate is True else self.allocate or None

    @property
    def refinement(self) -> Refinement | None:
        """How layers are refined, if they are."""
        return self.refine if isinstance(self.refine, Refinement) else Refinement(self.refine) if self.refine else None
