"""Transform coding: components of keys and values with 8, 4, 2 or 0 bits each (`mea.compression.coding`).

These two are not fitted layer by layer for given ranks, as other methods are: one threshold over all layers decides
bits. `mea.compression.coding.run` carries them out.
"""

from dataclasses import dataclass

from mea.compression.calibrate.statistics import LayerStatistics
from mea.compression.methods.base import Method
from mea.compression.methods.factors import Factors


def no_ranks(statistics: LayerStatistics, rank: int) -> Factors:
    """Refuse: bits are chosen for all layers together."""
    raise TypeError("a packed cache has bits, not ranks: mea.compression.coding fits it")


@dataclass(frozen=True)
class CodedMethod(Method):
    """A reading of `mea.models.coded_attention`, which has the method's name."""

    @property
    def coded(self) -> bool:
        """Whether the method codes components instead of choosing ranks."""
        return True


METHODS = (CodedMethod("predictive", no_ranks), CodedMethod("joint", no_ranks))
