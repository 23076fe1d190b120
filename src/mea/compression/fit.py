"""Calibrate and factorise: one streaming pass over the layers, any number of methods and layouts at once."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from mea.compression.budget import Layout
from mea.compression.calibrate.layerwise import (
    AttentionPass,
    LayerInputs,
    embed,
    layer_inputs,
    resident,
    rotations,
    run_layer,
)
from mea.compression.calibrate.score_sensitivity import AttendedSum
from mea.compression.calibrate.statistics import AveragedValues, AveragedValuesSum, LayerStatistics, StatisticsSum
from mea.compression.convert import LayerFactors, latent_copy
from mea.compression.methods import Method, joint
from mea.compression.methods.factors import Factors
from mea.compression.methods.groups import by_group
from mea.compression.methods.values import covariance_values

ERROR_WINDOWS = 2


class FittedLayer(NamedTuple):
    """A layer of the stream, for one method and layout.

    Attributes
    ----------
    index, layer, inputs
        The original layer, with its weights there, and what it is called with.
    factors
        None where the layout leaves the layer as it is.
    full
        Factors of the same method at full rank, for the self-check.
    lost
        The share of the attention output's energy that the factors lose, on a few calibration windows.
    """

    index: int
    layer: Any
    inputs: LayerInputs
    factors: LayerFactors | None
    full: LayerFactors | None
    lost: float


class Target(NamedTuple):
    """What to fit: a method, a layout, and factors of layers that an earlier run has finished."""

    method: Method
    layout: Layout
    known: Callable[[int], LayerFactors | None] = lambda _: None


@torch.no_grad()
def fit_layers(model: Any, tokens: Int[Tensor, "n t"], targets: list[Target]) -> Iterator[list[FittedLayer]]:
    """Fit layer after layer; each yields one result per target.

    Statistics are those of the *uncompressed* model: factors fitted on what compressed layers below hand up were worse
    (docs/LOG.md), and this way the layers are independent of each other.

    Raises
    ------
    ValueError
        Activations are not finite.
    """
    hidden = embed(model, tokens).float()
    inputs, tables = layer_inputs(model, tokens.shape[1]), rotations(model)
    attended = any(target.method.attended for target in targets)
    for index, stored in enumerate(model.model.layers):
        layer = resident(stored)
        passes, statistics = _calibrate(layer, hidden, inputs[index], tables[index], attended)
        hidden = torch.stack([window.layer_out for window in passes])
        if not hidden.isfinite().all():
            raise ValueError(f"layer {index}: activations are not finite on the calibration text; the model overflows")
        fitted, shared, full = [], {}, {}
        for target in targets:
            ranks = target.layout.ranks[index]
            if ranks is None:
                fitted.append(FittedLayer(index, layer, inputs[index], None, None, 0.0))
                continue
            factors = target.known(index)
            if factors is None:
                factors = _fit(target.method, layer, inputs[index], passes, statistics, ranks, shared)
            lost = relative_output_error(layer, factors, inputs[index], passes[:ERROR_WINDOWS])
            if target.method.name not in full:
                full[target.method.name] = full_rank(target.method, statistics)
            fitted.append(FittedLayer(index, layer, inputs[index], factors, full[target.method.name], lost))
        yield fitted


def _calibrate(
    layer: Any, hidden: Tensor, inputs: LayerInputs, table: tuple[Tensor, Tensor], attended: bool
) -> tuple[list[AttentionPass], LayerStatistics]:
    total = StatisticsSum(layer.self_attn)
    scores = AttendedSum(layer.self_attn, inputs) if attended else None
    passes = []
    for window in run_layer(layer, hidden, inputs):
        total.add(window.attention_in)
        if scores:
            scores.add(window)
        passes.append(window)
    return passes, replace(total.result(*table), attended=scores and scores.result())


def _fit(
    method: Method,
    layer: Any,
    inputs: LayerInputs,
    passes: list[AttentionPass],
    statistics: LayerStatistics,
    ranks: tuple[int, int],
    shared: dict[tuple[str, int], AveragedValues],
) -> LayerFactors:
    """One layer's factors. What values of several ranks need beside the same keys is in `shared`, the last of it."""

    def averaged(key_projection: Tensor, encoder: Tensor | None = None) -> AveragedValues:
        encoder = None if encoder is None else encoder.float()
        total = AveragedValuesSum(
            layer.self_attn, inputs, key_projection.float(), method.form, encoder, groups=method.groups
        )
        for window in passes:
            total.add(window.attention_in, window.heads_out, window.weight)
        return total.result()

    def lost(factors: Factors) -> float:
        return relative_output_error(
            layer, LayerFactors(*joint.split(factors), form="joint"), inputs, passes[:ERROR_WINDOWS]
        )

    if method.form == "joint":
        both = min((joint.keys(statistics, sum(ranks), balance) for balance in joint.BALANCES), key=lost)
        keys, values = joint.split(both)
        rest = joint.values(averaged(keys.decoder, both.encoder), values, statistics.num_kv_heads)
        return LayerFactors(keys, *rest, method.form)
    keys = method.keys(statistics, ranks[0])
    if method.values is not None:
        return LayerFactors(keys, method.values(statistics, ranks[1]), form=method.form, groups=method.groups)
    name = (method.name, ranks[0])
    if name not in shared:
        shared.clear()
        shared[name] = averaged(keys.projection)
    rest = method.averaged(shared[name], statistics.num_kv_heads, ranks[1])
    return LayerFactors(keys, *rest, method.form, method.groups)


@torch.no_grad()
def relative_output_error(layer: Any, factors: LayerFactors, inputs: LayerInputs, passes: list[AttentionPass]) -> float:
    """The share of the attention output's energy that is lost with these factors: 0 is exact, 1 is nothing kept.

    Tokens count as in `AttentionPass.weight`.
    """
    compressed = latent_copy(layer, factors, inputs.rotary).self_attn
    lost = total = 0.0
    for window in passes:
        options = {name: value for name, value in inputs.options.items() if name != "past_key_values"}
        output = compressed(window.attention_in[None], **options)[0][0]
        true = layer.self_attn.o_proj(window.heads_out)
        lost += ((output - true).square().sum(-1) * window.weight).sum().item()
        total += (true.square().sum(-1) * window.weight).sum().item()
    return lost / total


def full_rank(method: Method, statistics: LayerStatistics) -> LayerFactors:
    """The method's factors at full rank, which must reproduce the layer."""
    n = statistics.num_kv_heads * statistics.head_dim
    if method.form == "joint":
        return LayerFactors(*joint.split(joint.keys(statistics, 2 * n)), form=method.form)
    values = method.values or by_group(covariance_values, method.groups)
    return LayerFactors(method.keys(statistics, n), values(statistics, n), form=method.form, groups=method.groups)
