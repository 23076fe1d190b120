"""Choose widths layer by layer: what errors matter is measured on the compressed model, and bytes move accordingly.

To second order the divergence from the original is ``e^T H e / 2`` in the errors ``e`` of all attention outputs, and
its gradient is ``H e``. What one layer would take back of its own error by being wider, ``e_w``, changes it by
``-e_w^T H e`` to first order (`HeldOut.slopes`, one pass back for all layers): twice what it really saves. Being
narrower adds error that the gradient knows nothing of. So each layer gets a weight, for keys and for values: what wider
ones save, per share of the attention's energy that they lose less; and weight times lost energy is its table for
`allocate`. Energies at narrower widths are continued from those at the wider ones, by a constant factor from step to
step.

Bytes move by a limited amount, and the next round measures anew, because errors add up over layers: what a layer's loss
matters depends on what the others lose. The layout with the least measured divergence is taken, the uniform one if
none was better.
"""

import json
from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from jaxtyping import Int
from torch import Tensor

from mea.compression.allocation import LossTable, allocate
from mea.compression.fit import FittedLayer, Target, fit_layers
from mea.compression.held_out import HeldOut, held_out_tokens
from mea.compression.layout import CacheShape, Layout
from mea.compression.methods import Method
from mea.compression.plan import MOVES, Plan
from mea.compression.store import write_whole
from mea.compression.stream import evaluating

Progress = Callable[[str, int, int], None]
Pair = tuple[int, int]


class Tried(NamedTuple):
    """A layout and its mean divergence from the original on the held-out text, in nats per token."""

    layout: Layout
    divergence: float


def choose_layout(
    model: Any,
    tokens: Int[Tensor, "n t"],
    held_out: HeldOut,
    method: Method,
    shape: CacheShape,
    keep: float,
    start: Layout,
    *,
    equal: bool = False,
    same: bool = False,
    step: int = 8,
    moves: tuple[int, ...] = MOVES,
    progress: Progress | None = None,
) -> list[Tried]:
    """Layouts from the start on, each in the budget and with the divergence that was measured; take the least.

    Parameters
    ----------
    model, tokens
        To fit on; a few windows are enough to choose by.
    held_out
        To measure on.
    method, shape, keep, start
        How factors are found, the budget, and a layout of it to begin with, with widths in every layer.
    equal, same, step
        As `allocate`.
    moves
        See `MOVES`; one round each.
    progress
        Called with a word, the layers done and the layers in all.
    """
    tried: list[Tried] = []
    layout = start
    for number, part in enumerate(moves, start=1):
        move = max(step, shape.width // part // step * step)
        fitted, neighbours = _fit(model, tokens, method, layout, shape.width, move, equal, _named(progress, number))
        total, slopes = _slopes(held_out, fitted)
        tried.append(Tried(layout, total))
        tables = [_table(each, slopes[i], neighbours[i][0], step, equal) for i, each in enumerate(fitted)]
        layout = allocate(shape, tables, [1.0] * len(tables), keep, step=step, equal=equal, same=same)
        if layout in [each.layout for each in tried]:
            return tried
    fitted, _ = _fit(model, tokens, method, layout, shape.width, 0, equal, _named(progress, len(moves) + 1))
    last = held_out.states(
        [held_out.compressed(i, next(iter(each.values())).factors) for i, each in enumerate(fitted)]
    )[-1]
    tried.append(Tried(layout, held_out.score(last).divergence.double().mean().item()))
    return tried


Fitted = dict[Pair, FittedLayer]


def _fit(
    model: Any, tokens: Tensor, method: Method, layout: Layout, width: int, move: int, equal: bool,
    progress: Callable[[int, int], None],
) -> tuple[list[Fitted], list[list[Pair]]]:  # fmt: skip
    """Every layer at its own widths and at wider ones; and which these are."""
    ways = [(1, 1)] if equal else [(1, 0), (0, 1)]
    ways = [(0, 0), *ways] if move else [(0, 0)]

    def towards(pair: Pair, way: Pair) -> Pair:
        keys, values = (min(width, own + move * more) for own, more in zip(pair, way, strict=True))
        return keys, values

    neighbours = [[towards(pair, way) for way in ways] for pair in layout.widths if pair]
    targets = [Target(method, Layout(tuple(pairs[i] for pairs in neighbours))) for i in range(len(ways))]
    found = []
    for done, layers in enumerate(fit_layers(model, tokens, targets), start=1):
        found.append(dict(zip(neighbours[done - 1], layers, strict=True)))
        progress(done, len(neighbours))
    return found, neighbours


def _slopes(held_out: HeldOut, fitted: list[Fitted]) -> tuple[float, list[dict[Any, float]]]:
    own = [next(iter(each.values())) for each in fitted]
    layers = [held_out.compressed(each.index, each.factors) for each in own]
    others: list[Mapping[Hashable, Any]] = [
        {pair: held_out.compressed(i, other.factors) for pair, other in each.items() if other is not own[i]}
        for i, each in enumerate(fitted)
    ]
    return held_out.slopes(layers, others)


def _table(fitted: Fitted, slopes: dict[Any, float], here: Pair, step: int, equal: bool) -> LossTable:
    """Changes of the divergence over the neighbouring widths; keys and values are taken to add up."""
    lost = {pair: each.lost for pair, each in fitted.items()}

    def line(place: int) -> dict[int, float]:
        wider = next((p for p in lost if p[place] > here[place] and (equal or p[1 - place] == here[1 - place])), None)
        if wider is None:
            return {here[place]: 0.0}
        return _line(here[place], wider[place], lost[here], lost[wider], slopes[wider], step)

    keys, values = line(0), line(1)
    shares = 2 if equal else 1  # a step of both is one move
    table = tuple(tuple((a + b) / shares for b in values.values()) for a in keys.values())
    return LossTable(tuple(keys), tuple(values), table)


def _line(here: int, wider: int, lost: float, lost_wider: float, slope: float, step: int) -> dict[int, float]:
    """Changes of the divergence at narrower, present and wider widths; half of the first-order saving is real."""
    narrower = max(step, 2 * here - wider)
    saved = max(-slope, 0.0) / 2
    if lost_wider <= 0 or lost <= lost_wider or narrower == here:
        return {here: 0.0, wider: -saved}
    growth = (lost / lost_wider) ** ((here - narrower) / (wider - here))
    return {narrower: saved * lost * (growth - 1) / (lost - lost_wider), here: 0.0, wider: -saved}


def _named(progress: Progress | None, number: int) -> Callable[[int, int], None]:
    def report(done: int, of: int) -> None:
        if progress:
            progress(f"allocating, round {number}", done, of)

    return report


def allocated(
    model: Any,
    tokenizer: Any,
    tokens: Int[Tensor, "n t"],
    plan: Plan,
    progress: Progress | None = None,
    path: Path | None = None,
) -> tuple[Plan, list[Tried]]:
    """The plan with the widths that were chosen, and all that was tried; a plan without an allocation as it is.

    With a `path`, the choice is kept there and taken from there.

    Raises
    ------
    ValueError
        There is not enough text to hold out.
    """
    how = plan.allocation
    if how is None:
        return plan, []
    if path and path.is_file():
        kept = json.loads(path.read_text(encoding="utf-8"))
        tried = [Tried(Layout(tuple((keys, values) for keys, values in widths)), value) for widths, value in kept]
    else:
        text = held_out_tokens(tokenizer, plan.calibration, how.tokens, plan.calibration.window, how.text)
        with evaluating(model):
            tried = choose_layout(
                model, tokens[: how.windows], HeldOut(model, text), plan.method, plan.shape,
                plan.layout.keep(plan.shape), plan.layout, equal=how.equal, same=how.same, progress=progress,
                step=how.step or plan.method.step(plan.shape.head_dim).size,
            )  # fmt: skip
    if path and not path.is_file():
        write_whole(path, json.dumps([(each.layout.widths, each.divergence) for each in tried]).encode())
    return replace(plan, layout=min(tried, key=lambda each: each.divergence).layout), tried
