"""Choose ranks layer by layer: bytes move between layers as long as that makes the compressed model better.

What a layer would save by being wider, all else staying, is known to first order from one pass back through the
compressed model: to second order the divergence from the original is ``e^T H e / 2`` in the errors ``e`` of all
attention outputs, its gradient is ``H e``, and taking back ``e_w`` of one layer's error changes it by ``-e_w^T H e``
(`HeldOut.slopes`), twice what that really saves. But errors meet further up: ranks chosen by adding up what layers
save one by one, by such slopes or even measured, are hardly better than equal ones (docs/LOG.md). So savings only say
what to *try*: a few ranks become a step wider and as many narrower as the budget wants, drawn with a preference for
what promises most, and what lowers the divergence that is measured on held-out text stays. By that measure the layout
never gets worse than the one that it began with.
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

Dial = tuple[tuple[int, Pair], ...]  # what turns together: layers, and whether their keys, values or both
MOVES = 8  # h_kv * d over so many is a step of a width
AT_ONCE = 6  # ranks that become wider in one exchange, at most


class Tried(NamedTuple):
    """A layout and its mean divergence from the original on the held-out text, in nats per token."""

    layout: Layout
    divergence: float


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
    """Layouts that cost no more than the start, each better than the one before; take the last.

    The first and the last one's divergences are those of a fit at just these ranks, the others' of factors that were
    fitted for several. `equal`, `same`, `step` and `tries` are as in `Allocation`.

    Parameters
    ----------
    walk, tokens
        To fit on.
    held_out
        To measure on.
    method, shape, start
        How factors are found, and a layout to begin with, with ranks in every layer.
    seed
        Of the exchanges that are tried.
    folder
        Where fits and measurements are kept, from which the same choice goes on if it is interrupted.
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
    """Divergences of exchanges in their order: those that an interrupted search has left are not measured again."""

    def __init__(self, held_out: HeldOut, candidates: list[RankCandidates], folder: Path | None):
        self.held_out, self.candidates = held_out, candidates
        self.path = folder / "measured.json" if folder else None
        left = self.path and self.path.is_file()
        self.divergences: list[float] = json.loads(self.path.read_text(encoding="utf-8")) if self.path and left else []
        self.known = iter(self.divergences.copy())

    def run(self, ranks: list[Pair], before: "_Running | None" = None) -> "_Running":
        """The compressed model at these ranks, from where it differs from an earlier one."""
        factors = [candidate.factors(pair) for candidate, pair in zip(self.candidates, ranks, strict=True)]
        return _run(self.held_out, factors, ranks, before)

    def run_exchange(self, best: "_Running", wanted: list[Pair]) -> "tuple[_Running, _Running]":
        """The best model so far, run if it has to be, and the one at the ranks that are wanted."""
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
    keys, values = (max(step, width // step * step) for width in pair)
    return keys, values


def _exchange(
    ranks: list[Pair], dials: list[Dial], candidates: list[RankCandidates], budget: int, generator: torch.Generator
) -> list[Pair] | None:
    """Ranks after an exchange that is drawn at random and within the budget; None if there is none."""

    def turn(pairs: list[Pair], dial: Dial, by: int) -> list[Pair] | None:
        turned = list(pairs)
        for place, way in dial:
            pair = candidates[place].turned(pairs[place], way, by)
            if pair is None:
                return None
            turned[place] = pair
        return turned

    def drawn(by: int) -> list[Dial]:
        """Dials that can be turned, more or less from the one that promises most."""
        able = [dial for dial in dials if turn(ranks, dial, by)]
        promised = torch.tensor([sum(candidates[i].promise(ranks[i], way, by) for i, way in dial) for dial in able])
        noise = torch.randn(len(able), generator=generator) * promised.abs().mean()
        return [able[i] for i in (promised + noise).argsort().tolist()]

    many = int(torch.randint(1, AT_ONCE + 1, (), generator=generator))
    wider = drawn(1)[:many]
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
    """A compressed model and what the held-out text is in it, layer by layer; both empty where only measured before."""

    ranks: list[Pair]
    layers: list[Any]
    states: list[Tensor]
    divergence: float


def _run(
    held_out: HeldOut, factors: Sequence[LayerFactors | None], ranks: list[Pair], before: _Running | None = None
) -> _Running:
    """Run what differs from an earlier model, and what is above it."""
    earlier = before.ranks if before else [None] * len(ranks)
    same = [old == new for old, new in zip(earlier, ranks, strict=True)]
    layers = [
        before.layers[place] if before and same[place] else held_out.compressed(place, each)
        for place, each in enumerate(factors)
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
    """The plan with the ranks that were chosen, and all that was tried; a plan without an allocation as it is.

    With a `folder`, the choice and all on the way to it is kept there and taken from there.

    Raises
    ------
    ValueError
        There is not enough text to hold out.
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
        write_file(path, json.dumps([(each.layout.ranks, each.divergence) for each in tried]))
    return replace(plan, layout=tried[-1].layout), tried
