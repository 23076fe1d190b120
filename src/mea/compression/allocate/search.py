"""Choose ranks layer by layer: exchange ranks between layers while this improves the compressed model.

One backward pass through the compressed model estimates how much a higher rank in one layer would lower the divergence
from the original. To second order the divergence is ``e^T H e / 2`` in the errors ``e`` of all attention outputs, its
gradient is ``H e``, and removing ``e_w`` of one layer's error changes it by ``-e_w^T H e`` to first order
(`HeldOut.slopes`), twice the true saving. But errors of different layers interact: ranks chosen by adding up the
savings of single layers, estimated or measured, are hardly better than equal ranks (docs/LOG.md). So the savings only
propose exchanges: a few ranks grow by a step, and others shrink until the budget is met, drawn at random with a
preference for the largest estimated saving. An exchange is accepted if it lowers the divergence measured on held-out
text. By that measure the layout is never worse than the start.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from mea.compression.allocate.candidates import (
    BOTH,
    KEYS,
    VALUES,
    Pair,
    Progress,
    RankCandidates,
    fit_candidates,
    weigh,
)
from mea.compression.allocate.held_out_loss import HeldOut
from mea.compression.budget import CacheShape, Layout
from mea.compression.calibrate.layerwise import LayerWalk, evaluating
from mea.compression.calibrate.text import held_out_tokens
from mea.compression.checkpoint import write_file
from mea.compression.fit import Target, fit_layers
from mea.compression.methods.base import Method
from mea.compression.methods.factors import LayerFactors
from mea.compression.plan import Plan

Dial = tuple[tuple[int, Pair], ...]  # ranks that change together: layers, and whether of keys, values or both
MOVES = 8  # a step of a rank is h_kv * d / MOVES
AT_ONCE = 6  # ranks that grow in one exchange, at most


class Tried(NamedTuple):
    """A layout and its mean divergence from the original on the held-out text, in nats per token."""

    layout: Layout
    divergence: float


# Over 60 lines with its arguments and their description; the body is one sequence of steps.
def search_ranks(
    walk: LayerWalk,
    tokens: Int[Tensor, "n t"],
    held_out: HeldOut,
    method: Method,
    shape: CacheShape,
    start: Layout,
    *,
    equal: bool = False,
    same: bool = False,
    step: int = 8,
    tries: int = 64,
    seed: int = 0,
    progress: Progress | None = None,
    folder: Path | None = None,
) -> list[Tried]:
    """Layouts with at most the bytes of the start, each better than the one before; the last is the result.

    The first and the last divergence are measured with factors fitted at exactly these ranks, the others with factors
    from `RankCandidates`. `equal`, `same`, `step` and `tries` are as in `Allocation`.

    Parameters
    ----------
    walk, tokens
        The model and the calibration windows.
    held_out
        The text that divergences are measured on.
    method, shape, start
        The method, the uncompressed cache, and the first layout, with ranks in every layer.
    seed
        Of the random exchanges.
    folder
        Holds finished fits and measurements, from which an interrupted search continues.
    """
    report = progress or (lambda *_: None)
    ways = [BOTH] if equal else [VALUES, KEYS]
    budget = sum(sum(pair) for pair in start.ranks if pair)
    move = max(step, shape.width // MOVES // step * step)
    ranks = [_multiples(pair, step) for pair in start.ranks if pair]
    candidates = fit_candidates(walk, tokens, method, ranks, shape.width, move, ways, report, folder)
    weigh(held_out, candidates, ways)
    dials = [tuple((layer, way) for layer in range(len(candidates))) for way in ways]
    if not same:
        dials = [(one,) for dial in dials for one in dial]
    measured = _Measured(held_out, candidates, folder)
    best = measured.run(ranks)
    tried = [Tried(Layout(tuple(ranks)), best.divergence)]
    generator = torch.Generator().manual_seed(seed)
    for number in range(tries):
        wanted = _exchange(best.ranks, dials, candidates, budget, generator)
        if wanted:
            best, other = measured.run_exchange(best, wanted)
            if other.divergence < best.divergence:
                best = other
                tried.append(Tried(Layout(tuple(wanted)), other.divergence))
        report("trying exchanges", number + 1, tries)
    if len(tried) == 1:
        return tried
    (chosen,) = zip(*fit_layers(walk, tokens, [Target(method, tried[-1].layout)]), strict=True)
    final = _run(held_out, [layer.factors for layer in chosen], best.ranks)
    better = final.divergence < tried[0].divergence
    return [*tried[:-1], Tried(tried[-1].layout, final.divergence)] if better else tried[:1]


class _Measured:
    """Divergences of exchanges in order; those of an interrupted search are not measured again."""

    def __init__(self, held_out: HeldOut, candidates: list[RankCandidates], folder: Path | None):
        self.held_out, self.candidates = held_out, candidates
        self.path = folder / "measured.json" if folder else None
        left = self.path and self.path.is_file()
        self.divergences: list[float] = json.loads(self.path.read_text(encoding="utf-8")) if self.path and left else []
        self.known = iter(self.divergences.copy())

    def run(self, ranks: list[Pair], before: "_Running | None" = None) -> "_Running":
        """The compressed model at these ranks; layers below the first difference from `before` are not run again."""
        factors = [candidate.factors(pair) for candidate, pair in zip(self.candidates, ranks, strict=True)]
        return _run(self.held_out, factors, ranks, before)

    def run_exchange(self, best: "_Running", wanted: list[Pair]) -> "tuple[_Running, _Running]":
        """The best model so far, run if necessary, and the model at the wanted ranks."""
        divergence = next(self.known, None)
        if divergence is not None:
            return best, _Running(wanted, [], [], divergence)
        best = best if best.states else self.run(best.ranks)
        other = self.run(wanted, best)
        self.divergences.append(other.divergence)
        if self.path:
            write_file(self.path, json.dumps(self.divergences))
        return best, other


def _multiples(pair: Pair, step: int) -> Pair:
    keys, values = (max(step, rank // step * step) for rank in pair)
    return keys, values


def _exchange(
    ranks: list[Pair], dials: list[Dial], candidates: list[RankCandidates], budget: int, generator: torch.Generator
) -> list[Pair] | None:
    """Ranks after a random exchange within the budget; None if it changes nothing or exceeds the budget."""

    def turn(pairs: list[Pair], dial: Dial, by: int) -> list[Pair] | None:
        turned = list(pairs)
        for layer, way in dial:
            pair = candidates[layer].turned(pairs[layer], way, by)
            if pair is None:
                return None
            turned[layer] = pair
        return turned

    def drawn(by: int) -> list[Dial]:
        """Dials that can be turned, in noisy order of their estimated change of the divergence."""
        able = [dial for dial in dials if turn(ranks, dial, by)]
        promised = torch.tensor([sum(candidates[i].promise(ranks[i], way, by) for i, way in dial) for dial in able])
        noise = torch.randn(len(able), generator=generator) * promised.abs().mean()
        return [able[i] for i in (promised + noise).argsort().tolist()]

    growing = int(torch.randint(1, AT_ONCE + 1, (), generator=generator))
    wider = drawn(1)[:growing]
    now = ranks
    for dial in wider:
        now = turn(now, dial, 1) or now
    for dial in drawn(-1):
        if sum(map(sum, now)) <= budget:
            break
        if dial not in wider:
            now = turn(now, dial, -1) or now
    return now if now != ranks and sum(map(sum, now)) <= budget else None


class _Running(NamedTuple):
    """A compressed model and its hidden states on the held-out text; both empty if only the divergence is known."""

    ranks: list[Pair]
    layers: list[Any]
    states: list[Tensor]
    divergence: float


def _run(
    held_out: HeldOut, factors: Sequence[LayerFactors | None], ranks: list[Pair], before: _Running | None = None
) -> _Running:
    """Run the layers from the first difference to an earlier model on."""
    earlier = before.ranks if before else [None] * len(ranks)
    same = [old == new for old, new in zip(earlier, ranks, strict=True)]
    layers = [
        before.layers[index] if before and same[index] else held_out.compressed(index, layer_factors)
        for index, layer_factors in enumerate(factors)
    ]
    states = held_out.states(layers, before.states[: same.index(False) + 1] if before else ())
    return _Running(ranks, layers, states, held_out.score(states[-1]).divergence.double().mean().item())


def allocated(
    walk: LayerWalk,
    tokenizer: Any,
    tokens: Int[Tensor, "n t"],
    plan: Plan,
    progress: Progress | None = None,
    folder: Path | None = None,
) -> tuple[Plan, list[Tried]]:
    """The plan with the chosen ranks, and the accepted layouts; a plan without an allocation is returned unchanged.

    A `folder` holds the state of the search, from which an interrupted search continues.

    Raises
    ------
    ValueError
        The held-out text is too short.
    """
    allocation = plan.options.allocation
    if allocation is None:
        return plan, []
    path = folder / "layout.json" if folder else None
    if path and path.is_file():
        kept = json.loads(path.read_text(encoding="utf-8"))
        tried = [Tried(Layout(tuple((keys, values) for keys, values in ranks)), value) for ranks, value in kept]
    else:
        text = held_out_tokens(tokenizer, plan.calibration, allocation.tokens, plan.calibration.window, allocation.text)
        with evaluating(walk.model):
            tried = search_ranks(
                walk, tokens[: allocation.windows], HeldOut(walk, text), plan.method, plan.shape, plan.layout,
                equal=allocation.equal or plan.method.form.shared, same=allocation.same, tries=allocation.tries,
                step=allocation.step or plan.method.step(plan.shape.head_dim).size, seed=plan.calibration.seed,
                progress=progress, folder=folder,
            )  # fmt: skip
    if path and not path.is_file():
        write_file(path, json.dumps([(layout.ranks, divergence) for layout, divergence in tried]))
    return replace(plan, layout=tried[-1].layout), tried
