"""The interface of factorisation methods: they differ in how they fit the factors."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from jaxtyping import Float
from torch import Tensor

from mea.compression.budget import Step
from mea.compression.calibrate.statistics import AveragedValues, LayerStatistics
from mea.compression.methods.factors import Factors, LayerFactors
from mea.compression.methods.values import covariance_values, fit_values
from mea.ops.cache_forms import FORMS, PostRope

Factorise = Callable[[LayerStatistics, int], Factors]
FitAveraged = Callable[[AveragedValues, int, int], tuple[Factors, Float[Tensor, "D _"]]]
DEFAULT_WEIGHTING = "mean"
RANK_STEP = 8  # attention kernels are fast for multiples of 8


class Average(Protocol):
    """Attention-averaged values of a layer under compressed keys, see `AveragedValuesSum` for the arguments."""

    def __call__(
        self, method: "Method", key_projection: Float[Tensor, "n _"], encoder: Float[Tensor, "r _"] | None = None
    ) -> AveragedValues: ...


class CalibratedLayer(NamedTuple):
    """One layer as a method sees it.

    Attributes
    ----------
    statistics
        Weights and second moments.
    average
        Computes attention-averaged values under given compressed keys, with a further pass over the calibration
        windows.
    error
        The relative error of the attention's output with given factors, on a few calibration windows.
    """

    statistics: LayerStatistics
    average: Average
    error: Callable[[LayerFactors], float]


@dataclass(frozen=True)
class Method:
    """How factors are fitted. A new method is one file that defines a `Method`, and one line in `mea.names.METHODS`.

    Attributes
    ----------
    name
        On the command line and in records.
    keys, values
        Functions from statistics and a rank to factors; without `values`, attention-averaged values are fitted.
    whole_heads
        Ranks are whole component heads, as in arXiv 2601.19611: one scalar per pair of heads.
    averaged
        Function from attention-averaged values, the number of kv heads and a rank to factors and a fitted ``W_O``.
    form
        The cache form that it writes.
    needs_scores
        `keys` reads `LayerStatistics.scores`.
    groups
        Number of groups of heads with separate latents (`mea.compression.methods.groups.in_groups`).
    full_rank_values
        Used instead of attention-averaged values at full rank, where any basis is exact.
    weighting
        Weight of each attention score, for the method with this option (`mea.compression.methods.baselines.post_rope`).
    """

    name: str
    keys: Factorise
    values: Factorise | None = None
    whole_heads: bool = False
    averaged: FitAveraged = fit_values
    form: PostRope = FORMS["post_rope"]
    needs_scores: bool = False
    groups: int = 1
    full_rank_values: Factorise = covariance_values
    weighting: str | None = None

    @property
    def label(self) -> str:
        """The name, with the weighting where it is not the default: ``"post_rope:uniform"``."""
        return self.name if self.weighting in (None, DEFAULT_WEIGHTING) else f"{self.name}:{self.weighting}"

    @property
    def coded(self) -> bool:
        """Whether the method codes components with bits of their own instead of choosing ranks."""
        return False

    def step(self, head_dim: int) -> Step:
        """The step in which a layer's ranks grow, the same for every group."""
        return Step(head_dim * self.groups, paired=False) if self.whole_heads else Step(RANK_STEP * self.groups)

    def fit(self, layer: CalibratedLayer, ranks: tuple[int, int]) -> LayerFactors:
        """Factors of a layer with these ranks."""
        statistics = layer.statistics
        keys = self.keys(statistics, ranks[0])
        if self.values is not None:
            return LayerFactors(keys, self.values(statistics, ranks[1]), form=self.form, groups=self.groups)
        averaged = layer.average(self, keys.projection)
        values, output = self.averaged(averaged, statistics.num_kv_heads, ranks[1])
        return LayerFactors(keys, values, output, self.form, self.groups)

    def full_rank(self, statistics: LayerStatistics) -> LayerFactors:
        """The method's factors at full rank, which must reproduce the layer."""
        n = statistics.num_kv_heads * statistics.head_dim
        values = (self.values or self.full_rank_values)(statistics, n)
        return LayerFactors(self.keys(statistics, n), values, form=self.form, groups=self.groups)
