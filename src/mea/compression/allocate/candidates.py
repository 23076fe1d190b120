"""One layer of a model at several ranks: what its factors are there, and what they promise."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from jaxtyping import Int
from torch import Tensor

from mea.compression.allocate.held_out_loss import HeldOut
from mea.compression.budget import Layout
from mea.compression.calibrate.layerwise import LayerWalk
from mea.compression.checkpoint import FactorStore
from mea.compression.fit import FittedLayer, Target, fit_layers
from mea.compression.methods.base import Method
from mea.compression.methods.factors import LayerFactors
from mea.compression.plan import REACH
from mea.records import Progress

Pair = tuple[int, int]
KEYS, VALUES, BOTH = (1, 0), (0, 1), (1, 1)  # ways of becoming wider


def _moved(pair: Pair, way: Pair, by: int) -> Pair:
    return pair[0] + by * way[0], pair[1] + by * way[1]


@dataclass
class RankCandidates:
    """A layer at the ranks that it may have, each up to `REACH` moves from where it starts.

    Values of other ranks were fitted beside keys of the first width, and stand beside other keys too: not quite what a
    fit of both gives, which the chosen layout gets in the end.
    """

    start: Pair
    move: int
    fitted: dict[Pair, FittedLayer]
    weights: dict[Pair, float] = field(default_factory=dict)  # way -> nats per share of the attention's energy

    def turned(self, pair: Pair, way: Pair, by: int) -> Pair | None:
        """Ranks some moves further along a way; None where there are no factors."""
        keys, values = _moved(pair, way, by * self.move)
        parts = ((keys, values),) if way == BOTH else ((keys, self.start[1]), (self.start[0], values))
        return (keys, values) if all(part in self.fitted for part in parts) else None

    def factors(self, pair: Pair) -> LayerFactors | None:
        if pair in self.fitted:
            return self.fitted[pair].factors
        values, keys = (self.fitted[part].factors for part in ((self.start[0], pair[1]), (pair[0], self.start[1])))
        assert keys
        assert values
        return values._replace(keys=keys.keys)

    def promise(self, pair: Pair, way: Pair, by: int) -> float:
        """What being so much wider or narrower would add to the divergence, by the weight and by what is lost."""

        def error(by: int) -> float:
            at = self.turned(pair, way, by)
            assert at
            keys, values = (own if along else first for own, along, first in zip(at, way, self.start, strict=True))
            return self.fitted[keys, values].relative_output_error

        return self.weights[way] * (error(by) - error(0))


def fit_candidates(
    walk: LayerWalk,
    tokens: Int[Tensor, "n t"],
    method: Method,
    start: list[Pair],
    width: int,
    move: int,
    ways: list[Pair],
    report: Progress,
    folder: Path | None = None,
) -> list[RankCandidates]:
    """Fit every layer at all ranks of its candidate, none wider than `width`; finished layers are kept in `folder`."""
    crosses = [_cross(pair, width, move, ways) for pair in start]
    columns = list(zip_longest(*crosses))
    stores = [FactorStore(folder / f"widths-{number}", str(column)) for number, column in enumerate(columns) if folder]
    known = [store.get for store in stores] or [lambda _: None] * len(columns)
    targets = [Target(method, Layout(column), get) for column, get in zip(columns, known, strict=True)]
    candidates = []
    for layers in fit_layers(walk, tokens, targets):
        place = len(candidates)
        for store, layer in zip(stores, layers, strict=False):
            if layer.factors:
                store.put(place, layer.factors)
        candidates.append(RankCandidates(start[place], move, dict(zip(crosses[place], layers, strict=False))))
        report("fitting at several ranks", place + 1, len(crosses))
    return candidates


def _cross(start: Pair, width: int, move: int, ways: list[Pair]) -> list[Pair]:
    found = [start]
    for way in ways:
        for by in (*range(-REACH, 0), *range(1, REACH + 1)):
            pair = _moved(start, way, by * move)
            if min(pair) > 0 and max(pair) <= width:
                found.append(pair)
    return found


def weigh(held_out: HeldOut, candidates: list[RankCandidates], ways: list[Pair]) -> None:
    """Give each candidate what the divergence would fall by, per share of energy, if the layer lost less of it."""
    own = [held_out.compressed(place, candidate.factors(candidate.start)) for place, candidate in enumerate(candidates)]
    wider = [{way: candidate.turned(candidate.start, way, 1) for way in ways} for candidate in candidates]
    others: list[Mapping[Hashable, Any]] = [
        {way: held_out.compressed(place, candidates[place].factors(pair)) for way, pair in each.items() if pair}
        for place, each in enumerate(wider)
    ]
    _, slopes = held_out.slopes(own, others)
    for candidate, each, slope in zip(candidates, wider, slopes, strict=True):
        for way, pair in each.items():
            saved = max(-slope[way], 0.0) / 2 if pair else 0.0
            less = (
                candidate.fitted[candidate.start].relative_output_error - candidate.fitted[pair].relative_output_error
                if pair
                else 0.0
            )
            candidate.weights[way] = saved / less if less > 0 else 0.0
