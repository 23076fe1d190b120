"""What a compression will do, before any weight is loaded."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mea.compression.budget import (
    PRESETS,
    CacheShape,
    Layout,
    Step,
    layout_for_bytes,
    layout_for_keep,
    parse_budget,
    preset_layout,
    read_layout,
)
from mea.compression.calibrate.text import Calibration
from mea.compression.methods import DEFAULT_METHOD, Method, find_method
from mea.compression.methods.groups import in_groups
from mea.compression.refine import Refinement
from mea.models.accounting import cached_share
from mea.models.fold import stock_config
from mea.models.loading import check_supported

DEFAULT_KEEP = 0.5
REACH = 2  # steps to either side that an allocation may take a width


@dataclass(frozen=True)
class Allocation:
    """How ranks are chosen layer by layer (`mea.compression.allocate.search`), instead of equal ones.

    Attributes
    ----------
    equal
        As many numbers for keys as for values within a layer: PyTorch's fast kernels on processors need it.
    same
        The same ranks in all layers.
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


def allocation(wanted: bool, **options: Any) -> Allocation | bool:
    """An allocation with those of the options that are given, or False.

    Raises
    ------
    ValueError
        Options are given and no allocation is wanted.
    """
    given = {name: value for name, value in options.items() if value not in (None, False)}
    if given and not wanted:
        raise ValueError(f"{', '.join(given)} say how to allocate ranks: give --allocate too")
    return Allocation(**given) if wanted else False


@dataclass(frozen=True)
class Plan:
    """Method and layout for one model.

    Attributes
    ----------
    cached
        What the given model caches, as a fraction of `shape`: below 1 for this package's models with fewer component
        than key/value heads.
    allocation
        How `layout` is or was chosen, if it is not the budget's own.
    refinement
        How layers are refined after the closed form, if they are.
    """

    method: Method
    layout: Layout
    shape: CacheShape
    calibration: Calibration
    cached: float = 1.0
    allocation: Allocation | None = None
    refinement: Refinement | None = None

    def bytes_before(self, context: int) -> int:
        """Bytes of the given model's cache after `context` tokens of one sequence."""
        return round(self.shape.bytes(context) * self.cached)

    def describe(self) -> dict[str, Any]:
        """What is written into the compressed model's configuration and the record."""
        calibration = self.calibration
        return {
            "method": self.method.name,
            "keep": round(self.layout.keep(self.shape) / self.cached, 6),
            "calibration_text": Path(calibration.text).name,
            "calibration_tokens": calibration.tokens,
            "calibration_window": calibration.window,
            "seed": calibration.seed,
            **({"groups": self.method.groups} if self.method.groups > 1 else {}),
            **({"calibration_copy_fraction": calibration.copy_fraction} if calibration.copy_fraction else {}),
            **({} if self.allocation is None else {"allocation": asdict(self.allocation)}),
            **({} if self.refinement is None else {"refinement": asdict(self.refinement)}),
        }


def make_plan(
    config: Any,
    itemsize: int,
    *,
    keep: float | None = None,
    budget: str | None = None,
    layout: str | Path | None = None,
    method: str = DEFAULT_METHOD,
    odd: str = "values",
    groups: int = 1,
    calibration: Calibration | None = None,
    allocate: Allocation | bool = False,
    refine: Refinement | int = 0,
) -> Plan:
    """Decide ranks and method.

    Parameters
    ----------
    config
        Of the model, from transformers or of this package.
    itemsize
        Bytes of a cached number.
    keep
        The fraction of the cache's bytes that stays, `DEFAULT_KEEP` if no other budget is given.
    budget
        Instead: bytes at a context length, such as ``"64k tokens in 2 GiB"``.
    layout
        Instead: ``"full"``, ``"half"`` or ``"deep"`` (with `keep`, of the layers that they name), or a file of ranks.
    method
        A name in `mea.compression.methods.METHODS`.
    odd
        ``"keys"`` or ``"values"``: which of them get an odd component head, for methods with whole heads.
    groups
        Of neighbouring heads, each with latents of its own: as many as ranks that share an attention layer.
    allocate
        The layout is only where to begin, and ranks will be chosen layer by layer: how.
    refine
        Passes over the calibration text in which every layer is refined after the closed form, or how; 0 for none.

    Raises
    ------
    ValueError
        The model is not supported, no layout meets the budget, the heads do not make such groups, or `refine` is
        negative.
    """
    cached, config = cached_share(config), stock_config(config)
    check_supported(config)
    if budget is not None and (keep is not None or layout is not None):
        raise ValueError("give one budget: keep, bytes at a context length, or a layout")
    if odd not in ("keys", "values"):
        raise ValueError(f"odd heads go to 'keys' or 'values', not {odd!r}")
    shape = CacheShape.of(config, itemsize)
    chosen = in_groups(find_method(method, shape.num_kv_heads), groups, shape.num_kv_heads)
    step = chosen.step(shape.head_dim, odd)
    fraction = (DEFAULT_KEEP if keep is None else keep) * cached
    if budget is not None:
        ranks = layout_for_bytes(shape, *parse_budget(budget), step)
    elif layout is None:
        ranks = layout_for_keep(shape, fraction, step)
    elif str(layout) in PRESETS:
        ranks = preset_layout(shape, str(layout), step, fraction)
    elif keep is not None:
        raise ValueError("give one budget: keep, or a file of ranks")
    else:
        ranks = read_layout(Path(layout), shape, step)
    if chosen.form == "joint" and any(pair and pair[0] != pair[1] for pair in ranks.ranks):
        raise ValueError("a joint latent is cached in two equal halves: give [r, r] or null for each layer")
    calibration = calibration or Calibration()
    if calibration.window > config.max_position_embeddings:
        raise ValueError(
            f"a calibration window of {calibration.window} tokens is longer than the model's context of "
            f"{config.max_position_embeddings}"
        )
    if allocate:
        how = Allocation() if allocate is True else allocate
        ranks = _to_begin_with(ranks, how, shape, step, budget is not None)
    refinement = (Refinement(refine) if refine else None) if isinstance(refine, int) else refine
    plan = Plan(chosen, ranks, shape, calibration, cached, how if allocate else None, refinement)
    if cached < 1 and ranks.bytes(shape, 1) > plan.bytes_before(1):
        raise ValueError(
            f"the result would cache {ranks.bytes(shape, 1):,} bytes per token and the model, with its fewer "
            f"component heads, caches {plan.bytes_before(1):,}; give a smaller budget, and ranks to every layer"
        )
    return plan


def _to_begin_with(layout: Layout, how: Allocation, shape: CacheShape, step: Step, absolute: bool) -> Layout:
    """The layout from which an allocation starts.

    Raises
    ------
    ValueError
        The layout or the options do not go with an allocation.
    """
    if any(pair is None for pair in layout.ranks):
        raise ValueError("allocate chooses the ranks of all layers: give keep or budget instead of a layout of some")
    if absolute and any(shape.windows):
        raise ValueError(
            "bytes at a context length cannot be allocated in a model with sliding windows, where what a layer's width "
            "costs depends on its window: give keep"
        )
    if how.step is not None and how.step % step.size:
        raise ValueError(f"the method's ranks are multiples of {step.size}, and so must be those of step {how.step}")
    if how.equal and not step.paired and any(pair and pair[0] != pair[1] for pair in layout.ranks):
        raise ValueError("as many key as value heads do not come out at this budget: give a keep for which they do")
    least = min(pair for pair in layout.ranks if pair)
    return replace(layout, ranks=(least,) * len(layout.ranks)) if how.same else layout
