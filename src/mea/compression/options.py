"""Every option of a compression, from the command line to the record."""

from dataclasses import dataclass, field
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any

from mea.arguments import check_budget
from mea.compression.calibrate.text import Calibration
from mea.names import DEFAULT_METHOD, did_you_mean, listed


@dataclass(frozen=True)
class Refinement:
    """How layers are refined.

    Attributes
    ----------
    passes
        Passes over the calibration windows for every layer.
    window
        Tokens of one training window, at most a calibration window.
    batch
        Windows per step.
    lr, base_lr
        Peak learning rates of the factors (encoders and decoders), and of the projections of queries, keys and output.
    held_out
        One window in `held_out` is not trained on. A layer whose loss on these windows does not fall keeps its weights.
    seed
        Seed of the order and the positions of the windows.
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
                "refinement needs at least 1 pass, windows of 8 tokens, a batch of 1 window and at most 1 held-out "
                f"window in 2, not {self.passes}, {self.window}, {self.batch} and 1 in {self.held_out}"
            )
        if not (self.lr > 0 and self.base_lr > 0):
            raise ValueError(f"learning rates must be positive, not {self.lr} and {self.base_lr}")


@dataclass(frozen=True)
class CompressOptions:
    """Every option of a compression, from the command line to the record.

    Attributes
    ----------
    keep
        Fraction of the cache's bytes to keep; for packed caches, of the 16-bit cache at 8,192 tokens or the model's
        limit. Without any budget: `mea.names.DEFAULT_CODED_KEEP` for packed caches, `mea.names.DEFAULT_KEEP` for
        methods that lower ranks.
    budget
        Instead of `keep`: bytes at a context length, such as ``"64k tokens in 2 GiB"``.
    layout
        ``"full"``, ``"half"`` or ``"deep"``, whose compressed layers take `keep`; or, instead of `keep`, a file of
        ranks.
    method
        A key of `mea.compression.methods.METHODS`.
    groups
        Number of groups of neighbouring heads with separate latents: one per rank of tensor parallelism.
    calibration
        The text, its length, and the seed of its windows.
    refine
        Passes over the calibration text that refine every layer after the closed-form fit, or a `Refinement`.

    Groups and a file of ranks are for methods that lower ranks.
    """

    keep: float | None = None
    budget: str | None = None
    layout: str | Path | None = None
    method: str = DEFAULT_METHOD
    groups: int = 1
    calibration: Calibration = field(default_factory=Calibration)
    refine: Refinement | int = 0

    def __post_init__(self) -> None:
        check_budget(self.keep, self.budget, self.layout)

    @classmethod
    def of(cls, options: "CompressOptions | None", fields: dict[str, Any]) -> "CompressOptions":
        """The given options, or new options with these fields.

        Raises
        ------
        TypeError
            Both are given, or a field is unknown.
        """
        known = [option.name for option in dataclass_fields(cls)]
        for name in fields:
            if name not in known:
                raise TypeError(f"there is no option {name!r}: options are {listed(known)}{did_you_mean(name, known)}")
        if options is None:
            return cls(**fields)
        if fields:
            raise TypeError(f"give options or {', '.join(fields)}, not both")
        return options

    @property
    def refinement(self) -> Refinement | None:
        """The settings of the refinement, or None."""
        return self.refine if isinstance(self.refine, Refinement) else Refinement(self.refine) if self.refine else None
