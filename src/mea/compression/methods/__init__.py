"""The factorisation methods by name: all write the same cache and differ in how the factors are found.

One method is one file with a function `keys`, and `values` where it has its own way with them; the others share the
attention-averaged values of `mea.compression.methods.values`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches

from jaxtyping import Float
from torch import Tensor

from mea.compression.budget import Step
from mea.compression.calibrate.statistics import AveragedValues, LayerStatistics
from mea.compression.methods import attended, frequency, joint, position, post_rope, pre_rope
from mea.compression.methods.baselines import gauge, gqa_mean, gqa_procrustes, gram, svd
from mea.compression.methods.factors import Factors
from mea.compression.methods.values import fit_values

Factorise = Callable[[LayerStatistics, int], Factors]
FitAveraged = Callable[[AveragedValues, int, int], tuple[Factors, Float[Tensor, "D _"]]]
RANK_STEP = 8  # attention kernels want ranks that are multiples of 8


@dataclass(frozen=True)
class Method:
    """How factors are found.

    Attributes
    ----------
    keys, values
        From statistics and a rank to factors; no `values` means attention-averaged ones.
    averaged
        From attention-averaged values, the number of kv heads and a rank to factors and the ``W_O`` fitted to them.
    whole_heads
        Ranks are whole component heads, as in arXiv 2601.19611: one scalar per pair of heads.
    form
        Of the latents, see `mea.models.latent_attention.FORMS`. The keys of ``"joint"`` ones are keys and values
        stacked, `values` and `averaged` do not count (`mea.compression.methods.joint`).
    attended
        `keys` reads `LayerStatistics.attended`.
    groups
        Of heads, each with latents of its own (`mea.compression.methods.groups.in_groups`).
    """

    name: str
    keys: Factorise
    values: Factorise | None = None
    whole_heads: bool = False
    averaged: FitAveraged = fit_values
    form: str = "post_rope"
    attended: bool = False
    groups: int = 1

    def step(self, head_dim: int, odd: str = "values") -> Step:
        """The steps in which a layer's ranks grow, every group's alike."""
        if self.whole_heads:
            return Step(head_dim * self.groups, paired=False, odd=odd)
        return Step(RANK_STEP * self.groups)


METHODS = {
    method.name: method
    for method in (
        Method("svd", svd.keys, svd.values, whole_heads=True),
        Method("gram", gram.keys, gram.values, whole_heads=True),
        Method("gqa-mean", gqa_mean.keys, gqa_mean.values, whole_heads=True),
        Method("gqa-procrustes", gqa_procrustes.keys, gqa_procrustes.values, whole_heads=True),
        Method("gauge", gauge.keys, whole_heads=True, averaged=gauge.values),
        Method("frequency", frequency.keys),
        Method("position", position.keys),
        Method("attended", attended.keys, attended=True),
        Method("blended", post_rope.keys, attended=True),
        Method("latent", pre_rope.keys, form="pre_rope"),
        Method("joint", joint.keys, form="joint"),
    )
}
DEFAULT_METHOD = "blended"


def find_method(name: str, num_kv_heads: int) -> Method:
    """The method of that name, for a model with so many kv heads.

    Raises
    ------
    ValueError
        There is no such method, or it cannot do anything for such a model.
    """
    if name not in METHODS:
        close = get_close_matches(name, METHODS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"the methods are {', '.join(METHODS)}, not {name!r}{hint}")
    method = METHODS[name]
    if method.whole_heads and num_kv_heads == 1:
        finer = ", ".join(other.name for other in METHODS.values() if not other.whole_heads)
        raise ValueError(f"{name!r} mixes whole heads and the model has one kv head only; use {finer}")
    return method
