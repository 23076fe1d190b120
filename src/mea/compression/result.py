"""The result of a compression plan."""

from dataclasses import dataclass
from typing import Any

from mea.compression.plan import Plan
from mea.compression.refine import Refined


@dataclass(frozen=True)
class Compressed:
    """A compressed model with its plan, errors and checks.

    Attributes
    ----------
    layers
        Error of every layer, 0 for an uncompressed one: the attention's relative output error
        (`mea.compression.fit.relative_output_error`), or for a packed cache the expected loss in nats per token.
    self_check
        Errors of the two self-checks, see `mea.compression.check`.
    seconds
        Time of calibration, fit, checks and refinement.
    refined
        Result of the refinement, if there was one.
    """

    model: Any
    plan: Plan
    layers: list[float]
    self_check: dict[str, float]
    seconds: float
    refined: Refined | None = None
