"""Carry out plans with packed caches: one calibration for all of them, then each in seconds."""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from mea.compression.budget import CodedLayout
from mea.compression.calibrate.layerwise import LayerWalk, evaluating
from mea.compression.checkpoint import FactorStore
from mea.compression.coding.convert import assemble_coded, check_codes, coded_config
from mea.compression.coding.fit import READINGS, LayerCode, fit_codes
from mea.compression.coding.moments import LayerMoments, layer_moments
from mea.compression.plan import Plan
from mea.models.packed_cache import PackedLayer
from mea.records import Progress


class CodedResult:
    """A compressed model, its plan with the bits chosen, the expected loss of each layer, and the checks."""

    def __init__(self, model: Any, plan: Plan, losses: list[float], self_check: dict[str, float], seconds: float):
        self.model, self.plan, self.losses, self.self_check, self.seconds = model, plan, losses, self_check, seconds


def code_plans(
    walk: LayerWalk,
    tokens: Int[Tensor, "n t"],
    plans: Sequence[Plan],
    store: FactorStore | None = None,
    progress: Progress | None = None,
) -> list[CodedResult]:
    """Carry out plans of coded methods, each with its self-checks.

    A `store` holds the moments of a finished calibration, from which an interrupted run continues.

    Raises
    ------
    ValueError
        Activations are not finite, the text has too little variety, or the budget leaves no room for codes.
    ConversionError
        A self-check fails.
    """
    if not plans:
        return []
    start = time.perf_counter()
    with evaluating(walk.model):
        moments = _moments(walk, tokens, plans[0], store, progress)
        shared, results = time.perf_counter() - start, []
        for plan in plans:
            start = time.perf_counter()
            results.append(_coded(walk, tokens, plan, moments))
            results[-1].seconds = shared + time.perf_counter() - start
    return results


def _moments(
    walk: LayerWalk, tokens: Int[Tensor, "n t"], plan: Plan, store: FactorStore | None, progress: Progress | None
) -> list[LayerMoments]:
    count = len(walk.layers)
    known = [store.get_tensors("moments", index) for index in range(count)] if store else [None] * count
    if all(tensors is not None for tensors in known):
        head_dim = plan.shape.head_dim
        return [LayerMoments(**tensors, head_dim=head_dim) for tensors in known if tensors]
    layout = plan.layout
    assert isinstance(layout, CodedLayout)
    moments = layer_moments(walk, tokens, layout.first, plan.calibration.seed, progress)
    for index, found in enumerate(moments):
        if store:
            store.put_tensors("moments", index, found.tensors())
    return moments


def _coded(walk: LayerWalk, tokens: Int[Tensor, "n t"], plan: Plan, moments: Sequence[LayerMoments]) -> CodedResult:
    layout, name = plan.layout, plan.method.name
    assert isinstance(layout, CodedLayout)
    readings = [
        None if pair is None else READINGS[name](found) for pair, found in zip(layout.ranks, moments, strict=True)
    ]
    room = layout.budget - layout.exact_bytes(plan.shape, layout.context)
    codes = fit_codes(readings, layout.coded_tokens(plan.shape), 8 * room)
    plan = replace(plan, layout=replace(layout, tiers=_tiers(codes)))
    config = coded_config(walk.model.config, name, (layout.first, layout.recent), codes, plan.describe())
    errors = check_codes(walk, tokens, readings, codes)
    model = assemble_coded(walk.model, codes, config)
    return CodedResult(model, plan, [0.0 if code is None else code.loss for code in codes], errors, 0.0)


def _tiers(codes: Sequence[LayerCode | None]) -> tuple[Any, ...]:
    return tuple(None if code is None else tuple(code.tiers) for code in codes)


@torch.no_grad()
def packed_bytes(model: Any, context: int) -> int:
    """Bytes of all tensors of a model's packed cache after `context` tokens, measured on caches filled with noise.

    Ordinary layers are not counted.
    """
    total = 0
    for layer in model.model.layers:
        attention = layer.self_attn
        if not hasattr(attention, "code"):
            continue
        first, recent = attention.exact
        cache = PackedLayer(first, recent, attention.window())
        shape = (1, attention.code.key_mean.shape[0], context, attention.head_dim)
        like = {"dtype": attention.k_proj.weight.dtype, "device": attention.k_proj.weight.device}
        cache.append(torch.randn(shape, **like), torch.randn(shape, **like), attention.code.encode)
        total += sum(tensor.nbytes for tensor in cache.stored())
    return total
