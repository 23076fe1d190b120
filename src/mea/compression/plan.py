"""Options and plan of a compression, decided before any weight is loaded."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mea.arguments import parse_budget
from mea.compression.budget import (
    CONTEXT,
    PRESETS,
    CacheShape,
    Layout,
    Step,
    bytes_in_16_bits,
    coded_layout,
    coded_layout_for_bytes,
    layout_for_bytes,
    layout_for_keep,
    preset_layers,
    preset_layout,
    read_layout,
)
from mea.compression.calibrate.text import Calibration
from mea.compression.methods import find_method
from mea.compression.methods.base import Method
from mea.compression.methods.groups import in_groups
from mea.compression.options import CompressOptions
from mea.models.accounting import cached_share
from mea.models.fold import stock_config
from mea.models.loading import check_supported
from mea.names import CODED_METHODS, DEFAULT_CODED_KEEP, DEFAULT_KEEP, WHOLE_HEAD_METHODS


@dataclass(frozen=True)
class Plan:
    """Options, and the method and ranks that follow for one model.

    Attributes
    ----------
    layout
        Ranks per layer. Of a packed cache its budget, and the bits of components once they are known.
    cached
        Cache of the given model as a fraction of `shape`: below 1 for this package's models with fewer component heads
        than key/value heads.
    """

    options: CompressOptions
    method: Method
    layout: Layout
    shape: CacheShape
    cached: float = 1.0

    @property
    def calibration(self) -> Calibration:
        """The calibration text."""
        return self.options.calibration

    def bytes_before(self, context: int) -> int:
        """Bytes of the given model's cache after `context` tokens of one sequence; of coded methods, with 16 bits."""
        whole = bytes_in_16_bits(self.shape, context) if self.method.coded else self.shape.bytes(context)
        return round(whole * self.cached)

    def describe(self) -> dict[str, Any]:
        """The entries for the compressed model's configuration and the record."""
        calibration, method = self.calibration, self.method
        refinement = self.options.refinement
        return {
            "method": method.name,
            **({} if method.weighting is None else {"weighting": method.weighting}),
            "keep": round(self.layout.keep(self.shape) / self.cached, 6),
            "calibration_text": Path(calibration.text).name,
            "calibration_tokens": calibration.tokens,
            "calibration_window": calibration.window,
            "seed": calibration.seed,
            **({"groups": method.groups} if method.groups > 1 else {}),
            **({"calibration_copy_fraction": calibration.copy_fraction} if calibration.copy_fraction else {}),
            **({} if refinement is None else {"refinement": asdict(refinement)}),
        }


def make_plan(config: Any, itemsize: int, options: CompressOptions | None = None) -> Plan:
    """Decide ranks and method.

    Parameters
    ----------
    config
        Configuration of the model, from transformers or this package.
    itemsize
        Bytes of a cached number.
    options
        None for the default method at its default `keep`.

    Raises
    ------
    ValueError
        The model is not supported, no layout meets the budget, the heads cannot be divided into the groups, or the
        calibration windows are longer than the model's context.
    """
    options = options or CompressOptions()
    cached, config = cached_share(config), stock_config(config)
    check_supported(config)
    shape = CacheShape.of(config, itemsize)
    method = _method(options, shape.num_kv_heads)
    window, context = options.calibration.window, config.max_position_embeddings
    if method.coded:
        layout = _coded_layout(options, shape, cached, context)
    else:
        layout = _layout(options, shape, method.step(shape.head_dim), cached)
        for ranks in layout.ranks:
            if ranks:
                method.form.check(*ranks)
    if window > context:
        raise ValueError(
            f"a calibration window of {window} tokens is longer than the model's context of {context}: give a shorter "
            "calibration window"
        )
    plan = Plan(options, method, layout, shape, cached)
    if cached < 1 and not method.coded and layout.bytes(shape, 1) > plan.bytes_before(1):
        raise ValueError(
            f"the result would cache {layout.bytes(shape, 1):,} bytes per token, and the model with its fewer "
            f"component heads caches {plan.bytes_before(1):,}; give a smaller budget, and ranks for every layer"
        )
    return plan


def _method(options: CompressOptions, num_kv_heads: int) -> Method:
    """The method; raises ValueError where there is none, or groups are given that it cannot have."""
    if options.groups != 1 and options.method in CODED_METHODS:
        raise ValueError(
            f"groups is an option of methods that lower ranks, such as {WHOLE_HEAD_METHODS[0]}: {options.method} "
            "spends bits by one threshold over all layers"
        )
    return in_groups(find_method(options.method, num_kv_heads), options.groups, num_kv_heads)


def _coded_layout(options: CompressOptions, shape: CacheShape, cached: float, longest: int) -> Layout:
    """The layout of a packed cache.

    Raises
    ------
    ValueError
        Nothing meets the budget.
    """
    if options.budget is not None:
        return coded_layout_for_bytes(shape, *parse_budget(options.budget))
    context = min(CONTEXT, longest)
    keep = (DEFAULT_CODED_KEEP if options.keep is None else options.keep) * cached
    if options.layout is None:
        return coded_layout(shape, keep, context)
    if str(options.layout) in PRESETS:
        return coded_layout(shape, keep, context, preset_layers(shape, str(options.layout)))
    raise ValueError(
        f"{options.method} has bits, not ranks: give keep, budget or a layout of {', '.join(PRESETS)}, or for a file "
        f"of ranks a method that lowers them, such as {WHOLE_HEAD_METHODS[0]}"
    )


def _layout(options: CompressOptions, shape: CacheShape, step: Step, cached: float) -> Layout:
    fraction = (DEFAULT_KEEP if options.keep is None else options.keep) * cached
    if options.budget is not None:
        return layout_for_bytes(shape, *parse_budget(options.budget), step)
    if options.layout is None:
        return layout_for_keep(shape, fraction, step)
    if str(options.layout) in PRESETS:
        return preset_layout(shape, str(options.layout), step, fraction)
    if options.keep is not None:
        raise ValueError("give one budget: keep, or a file of ranks")
    return read_layout(Path(options.layout), shape, step)
