"""Calibrate and factorise: one pass over the layers for any number of methods and layouts."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mea.compression.budget import Layout
from mea.compression.calibrate.layerwise import (
    AttentionPass,
    LayerInputs,
    LayerWalk,
    check_activations,
    check_finite,
    run_layer,
)
from mea.compression.calibrate.offload import resident
from mea.compression.calibrate.score_sensitivity import ScoreMomentsSum
from mea.compression.calibrate.statistics import AveragedValues, AveragedValuesSum, LayerStatistics, StatisticsSum
from mea.compression.convert import latent_copy
from mea.compression.methods.base import CalibratedLayer, Method
from mea.compression.methods.factors import LayerFactors
from mea.names import CODED_METHODS, listed

CODED = listed(CODED_METHODS)
ERROR_WINDOWS = 2  # calibration windows on which the error of a layer's output is measured


class FittedLayer(NamedTuple):
    """A fitted layer, for one method and layout.

    Attributes
    ----------
    index, layer, inputs
        The original layer with its weights in memory, and its arguments.
    factors
        None if the layout leaves the layer uncompressed.
    full_rank
        Factors of the same method at full rank, for the self-check.
    relative_output_error
        See the function of that name; on `ERROR_WINDOWS` calibration windows.
    """

    index: int
    layer: Any
    inputs: LayerInputs
    factors: LayerFactors | None
    full_rank: LayerFactors | None
    relative_output_error: float


class Target(NamedTuple):
    """What to fit: a method, a layout, and the factors of layers that an earlier run finished."""

    method: Method
    layout: Layout
    known: Callable[[int], LayerFactors | None] = lambda _: None


@torch.no_grad()
def fit_layers(walk: LayerWalk, tokens: Int[Tensor, "n t"], targets: list[Target]) -> Iterator[list[FittedLayer]]:
    """Fit layer by layer; yields one result per target for each layer.

    Statistics are taken from the *uncompressed* model: factors fitted on the outputs of compressed layers below were
    worse (docs/LOG.md), and this way the layers are independent of each other.

    Raises
    ------
    ValueError
        Activations or their moments are not finite, or a method cannot be fitted.
    """
    hidden = walk.embed(tokens).float()
    inputs = walk.inputs(tokens.shape[1])
    needs_scores = any(target.method.needs_scores for target in targets)
    for index, original in enumerate(walk.layers):
        layer = resident(original)
        passes, statistics = _calibrate(layer, hidden, inputs[index], walk.rotations[index], needs_scores)
        hidden = torch.stack([window.layer_out for window in passes])
        check_activations(hidden, index, layer)
        for name in ("keys", "queries", "values"):
            check_finite(getattr(statistics, name), index, f"second moments of {name}", layer)
        calibrated = _calibrated(layer, inputs[index], passes, statistics)
        fitted: list[FittedLayer] = []
        full_rank: dict[str, LayerFactors] = {}
        for method, layout, known in targets:
            ranks = layout.ranks[index]
            if ranks is None:
                fitted.append(FittedLayer(index, layer, inputs[index], None, None, 0.0))
                continue
            try:
                factors = known(index) or _finite(method.fit(calibrated, ranks))
                if method.label not in full_rank:
                    full_rank[method.label] = _finite(method.full_rank(statistics))
            except torch.linalg.LinAlgError as error:
                raise ValueError(f"layer {index}: {method.label} cannot be fitted ({error}): give {CODED}") from error
            error = calibrated.error(factors)
            fitted.append(FittedLayer(index, layer, inputs[index], factors, full_rank[method.label], error))
        yield fitted


def _finite(factors: LayerFactors) -> LayerFactors:
    tensors = (*factors.keys, *factors.values, *([] if factors.output is None else [factors.output]))
    if not all(tensor.isfinite().all() for tensor in tensors):
        raise torch.linalg.LinAlgError("its factors are not finite")
    return factors


def _calibrate(
    layer: Any, hidden: Tensor, inputs: LayerInputs, rotations: tuple[Tensor, Tensor], needs_scores: bool
) -> tuple[list[AttentionPass], LayerStatistics]:
    total = StatisticsSum(layer.self_attn)
    scores = ScoreMomentsSum(layer.self_attn, inputs) if needs_scores else None
    passes = []
    for window in run_layer(layer, hidden, inputs):
        total.add(window.attention_in)
        if scores:
            scores.add(window)
        passes.append(window)
    return passes, replace(total.result(*rotations), scores=scores and scores.result())


def _calibrated(
    layer: Any, inputs: LayerInputs, passes: list[AttentionPass], statistics: LayerStatistics
) -> CalibratedLayer:
    """The layer for its methods."""

    def average(
        method: Method, key_projection: Float[Tensor, "n _"], encoder: Float[Tensor, "r _"] | None = None
    ) -> AveragedValues:
        encoder = None if encoder is None else encoder.float()
        total = AveragedValuesSum(
            layer.self_attn, inputs, key_projection.float(), method.form, encoder, groups=method.groups
        )
        for window in passes:
            total.add(window.attention_in, window.heads_out, window.weight)
        return total.result()

    def error(factors: LayerFactors) -> float:
        return relative_output_error(layer, factors, inputs, passes[:ERROR_WINDOWS])

    return CalibratedLayer(statistics, average, error)


@torch.no_grad()
def relative_output_error(layer: Any, factors: LayerFactors, inputs: LayerInputs, passes: list[AttentionPass]) -> float:
    """Squared error of the attention's output relative to its squared norm: 0 is exact, 1 equals an output of zero.

    Tokens are weighted by `AttentionPass.weight`.
    """
    compressed = latent_copy(layer, factors, inputs.rotary).self_attn
    error = energy = 0.0
    for window in passes:
        output = compressed(window.attention_in[None], **inputs.without_cache)[0][0]
        true = layer.self_attn.o_proj(window.heads_out)
        error += ((output - true).square().sum(-1) * window.weight).sum().item()
        energy += (true.square().sum(-1) * window.weight).sum().item()
    return error / energy if energy else float(error > 0)
