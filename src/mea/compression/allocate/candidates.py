"""One layer of a model at several ranks: its factors, and the estimated change of the divergence."""

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
KEYS, VALUES, BOTH = (1, 0), (0, 1), (1, 1)  # which of the two ranks grows


def _moved(pair: Pair, way: Pair, by: int) -> Pair:
    return pair[0] + by * way[0], pair[1] + by * way[1]


@dataclass
class RankCandidates:
    """A layer at its possible ranks, each up to `REACH` moves from the start.

    Values of another rank are fitted with keys of the start rank, and are combined with keys of other ranks too. This
    is an approximation: the chosen layout is fitted again with both ranks.
    """

    start: Pair
    move: int
    fitted: dict[Pair, FittedLayer]
    weights: dict[Pair, float] = field(default_factory=dict)  # way -> nats per share of the attention's energy

    def turned(self, pair: Pair, way: Pair, by: int) -> Pair | None:
        """Ranks after `by` moves along a way; None if there are no factors for them."""
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
        """Estimated change of the divergence after `by` moves: the weight times the change of the output error."""

        def error(by: int) -> float:
            moved = self.turned(pair, way, by)
            assert moved
            keys, values = (own if along else first for own, along, first in zip(moved, way, self.start, strict=True))
            return self.fitted[keys, values].relative_output_error

        return self.weights[way] * (error(by) - error(0))


def fit_candidates(
    walk: LayerWalk,
    tokens: Int[Tensor, "n t"],
    method: Method,
    start: list[Pair],
    most: int,
    move: int,
    ways: list[Pair],
    report: Progress,
    folder: Path | None = None,
) -> list[RankCandidates]:
    """Fit every layer at all ranks of its candidate, none above `most`; finished layers are kept in `folder`."""
    crosses = [_cross(pair, most, move, ways) for pair in start]
    columns = list(zip_longest(*crosses))
    stores = [FactorStore(folder / f"ranks-{number}", str(column)) for number, column in enumerate(columns) if folder]
    known = [store.get for store in stores] or [lambda _: None] * len(columns)
    targets = [Target(method, Layout(column), get) for column, get in zip(columns, known, strict=True)]
    candidates = []
    for layers in fit_layers(walk, tokens, targets):
        index = len(candidates)
        for store, layer in zip(stores, layers, strict=False):
            if layer.factors:
                store.put(index, layer.factors)
        candidates.append(RankCandidates(start[index], move, dict(zip(crosses[index], layers, strict=False))))
        report("fitting at several ranks", index + 1, len(crosses))
    return candidates


def _cross(start: Pair, most: int, move: int, ways: list[Pair]) -> list[Pair]:
    pairs = [start]
    for way in ways:
        for by in (*range(-REACH, 0), *range(1, REACH + 1)):
            pair = _moved(start, way, by * move)
            if min(pair) > 0 and max(pair) <= most:
                pairs.append(pair)
    return pairs


def weigh(held_out: HeldOut, candidates: list[RankCandidates], ways: list[Pair]) -> None:
    """Set each candidate's weights: the estimated fall of the divergence per fall of the relative output error."""
    own = [held_out.compressed(index, candidate.factors(candidate.start)) for index, candidate in enumerate(candidates)]
    wider = [{way: candidate.turned(candidate.start, way, 1) for way in ways} for candidate in candidates]
    others: list[Mapping[Hashable, Any]] = [
        {way: held_out.compressed(index, candidates[index].factors(pair)) for way, pair in pairs.items() if pair}
        for index, pairs in enumerate(wider)
    ]
    _, slopes = held_out.slopes(own, others)
    for candidate, pairs, slope in zip(candidates, wider, slopes, strict=True):
        for way, pair in pairs.items():
            saved = max(-slope[way], 0.0) / 2 if pair else 0.0
            less = (
                candidate.fitted[candidate.start].relative_output_error - candidate.fitted[pair].relative_output_error
                if pair
                else 0.0
            )
            candidate.weights[way] = saved / less if less > 0 else 0.0
