"""Carry out plans with packed caches: one calibration for all of them, then each in seconds."""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from jaxtyping import Int
from torch import Tensor

from mea.compression.budget import CodedLayout
from mea.compression.calibrate.layerwise import LayerWalk, evaluating
from mea.compression.checkpoint import FactorStore
from mea.compression.coding.convert import assemble_coded, check_codes, coded_config
from mea.compression.coding.fit import READINGS, ROUNDS, LayerCode, Reading, fit_codes
from mea.compression.coding.moments import LayerMoments, layer_moments
from mea.compression.plan import Plan
from mea.compression.result import Compressed
from mea.records import Progress

PARTS = ROUNDS + 2  # of a plan: its readings, the rounds of its bits, and its check
Advance = Callable[[int, int], None]  # called with the part and the layer that begin


def code_plans(
    walk: LayerWalk,
    tokens: Int[Tensor, "n t"],
    plans: Sequence[Plan],
    store: FactorStore | None = None,
    progress: Progress | None = None,
) -> list[Compressed]:
    """Carry out plans of coded methods, each with its self-checks.

    A `store` holds the sums of a calibration and its moments when it is finished: an interrupted run continues there.

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
        shared, results = time.perf_counter() - start + (store.seconds if store else 0.0), []
        made: tuple[Any, list[Reading | None]] = (None, [])
        for plan in plans:
            start, kind = time.perf_counter(), (plan.method.name, plan.layout.ranks)

            def advance(part: int, layer: int, name: str = plan.method.name) -> None:
                if progress:
                    before = PARTS * len(results) + part
                    total = PARTS * len(plans) * len(moments)
                    progress(f"choosing bits and checking ({name})", before * len(moments) + layer, total)

            if made[0] != kind:  # plans of one kind differ in their bits only
                made = kind, _readings(plan, moments, advance)
            result = _coded(walk, tokens, plan, [copy.copy(reading) for reading in made[1]], advance)
            results.append(replace(result, seconds=shared + time.perf_counter() - start))
            advance(0, 0)  # of the next plan, or the end
    return results


def _readings(plan: Plan, moments: Sequence[LayerMoments], advance: Advance) -> list[Reading | None]:
    kind, readings = READINGS[plan.method.name], []
    for index, (pair, found) in enumerate(zip(plan.layout.ranks, moments, strict=True)):
        advance(0, index)
        readings.append(None if pair is None else kind(found))
    return readings


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
    moments = layer_moments(walk, tokens, layout.first, plan.calibration.seed, progress, store)
    for index, found in enumerate(moments):
        if store:
            store.put_tensors("moments", index, found.tensors())
    return moments


def _coded(
    walk: LayerWalk,
    tokens: Int[Tensor, "n t"],
    plan: Plan,
    readings: Sequence[Reading | None],
    advance: Advance,
) -> Compressed:
    """One plan carried out, without its time; the readings change."""
    layout, name = plan.layout, plan.method.name
    assert isinstance(layout, CodedLayout)
    room = layout.budget - layout.exact_bytes(plan.shape, layout.context)
    codes = fit_codes(readings, layout.coded_tokens(plan.shape), 8 * room, advance)
    plan = replace(plan, layout=replace(layout, tiers=_tiers(codes)))
    config = coded_config(walk.model.config, name, (layout.first, layout.recent), codes, plan.describe())
    errors = check_codes(walk, tokens, readings, codes, partial(advance, PARTS - 1))
    model = assemble_coded(walk.model, codes, config)
    return Compressed(model, plan, [0.0 if code is None else code.loss for code in codes], errors, 0.0)


def _tiers(codes: Sequence[LayerCode | None]) -> tuple[Any, ...]:
    return tuple(None if code is None else tuple(code.tiers) for code in codes)
