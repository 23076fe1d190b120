"""Which layer gets how much of the cache: widths that lose least at a given number of bytes.

Every layer has a table of what its attention output loses at each pair of widths, from one calibration pass, and a
weight that says how much the model minds. The sum of weighted losses is made small by moving bytes between layers, and
within a layer between keys and values. Layers are taken to add up: what a layer loses is small beside the residual
stream, but not always small enough (docs/LOG.md), so a layout is to be measured before it is believed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mea.compression.layout import CacheShape, Layout

ROUNDING = 1e-9


@dataclass(frozen=True)
class LossTable:
    """What one layer loses at widths on a grid.

    Attributes
    ----------
    key_widths, value_widths
        Increasing.
    lost
        ``lost[i][j]`` at ``key_widths[i]`` and ``value_widths[j]``, in any unit that all layers share.
    """

    key_widths: tuple[int, ...]
    value_widths: tuple[int, ...]
    lost: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        rows, columns = len(self.key_widths), len(self.value_widths)
        if len(self.lost) != rows or any(len(row) != columns for row in self.lost):
            raise ValueError(f"a table of {rows} key and {columns} value widths needs {rows} rows of {columns} losses")
        for widths in (self.key_widths, self.value_widths):
            if list(widths) != sorted(set(widths)) or not widths:
                raise ValueError(f"the widths of a table increase, unlike {list(widths)}")

    def at(self, key_width: int, value_width: int) -> float:
        """Linear between the grid's widths; beyond its ends the nearest."""
        rows = [np.interp(value_width, self.value_widths, row) for row in self.lost]
        return float(np.interp(key_width, self.key_widths, rows))


class Choice(NamedTuple):
    """Widths of a layer, what they cost and what they lose."""

    widths: tuple[int, int]
    numbers: int
    lost: float


def choices(table: LossTable, weight: float, step: int, *, equal: bool = False) -> list[Choice]:
    """The widths of one layer that are worth considering: at each cost the best, on the lower convex hull.

    Parameters
    ----------
    table, weight
        Of the layer.
    step
        Widths are multiples of it.
    equal
        ``r_k = r_v`` only.
    """
    keys = _multiples(table.key_widths, step)
    values = _multiples(table.value_widths, step)
    best: dict[int, Choice] = {}
    for key_width in keys:
        for value_width in values:
            if equal and key_width != value_width:
                continue
            found = Choice((key_width, value_width), key_width + value_width, weight * table.at(key_width, value_width))
            if found.numbers not in best or found.lost < best[found.numbers].lost:
                best[found.numbers] = found
    return _hull([best[numbers] for numbers in sorted(best)])


def allocate(
    shape: CacheShape,
    tables: Sequence[LossTable],
    weights: Sequence[float],
    keep: float,
    *,
    step: int = 8,
    equal: bool = False,
    same: bool = False,
) -> Layout:
    """Widths with the least weighted loss in at most a fraction `keep` of the uncompressed cache's bytes.

    Bytes go one by one where they save most per byte, along the `choices` of each layer. The sum of weighted losses is
    at most one such move's saving above that of the best layout of the budget.

    Parameters
    ----------
    shape
        Of the uncompressed cache; bytes are those at a length at which no sliding window is full.
    tables, weights
        One per layer.
    step
        Widths are multiples of it, as attention kernels want.
    equal
        ``r_k = r_v`` in every layer.
    same
        The same widths in all layers.

    Raises
    ------
    ValueError
        `keep` is not a fraction, the lists are not of one length per layer, or no widths of the tables are that small.
    """
    layers = len(shape.windows)
    if not 0 < keep <= 1:
        raise ValueError(f"keep is the fraction of the cache's bytes that stays, above 0 and at most 1, not {keep}")
    if len(tables) != layers or len(weights) != layers:
        raise ValueError(f"{layers} layers need as many tables and weights, not {len(tables)} and {len(weights)}")
    if any(weight < 0 for weight in weights):
        raise ValueError("weights are not negative: a layer that does not matter has 0")
    budget = int(2 * shape.width * keep * layers + 1e-9)
    if same:
        table = _total(tables, weights)
        fitting = [choice for choice in choices(table, 1.0, step, equal=equal) if choice.numbers * layers <= budget]
        if not fitting:
            raise ValueError(_too_small(keep, tables, step))
        return Layout((min(fitting, key=lambda choice: choice.lost).widths,) * layers)

    offered = [choices(table, weight, step, equal=equal) for table, weight in zip(tables, weights, strict=True)]
    place, left = [0] * layers, budget - sum(each[0].numbers for each in offered)
    if left < 0:
        raise ValueError(_too_small(keep, tables, step))
    while True:
        saving = {}
        for layer, each in enumerate(offered):
            if place[layer] + 1 < len(each):
                now, then = each[place[layer]], each[place[layer] + 1]
                if then.numbers - now.numbers <= left:
                    saving[layer] = (now.lost - then.lost) / (then.numbers - now.numbers)
        if not saving:
            return Layout(tuple(each[at].widths for each, at in zip(offered, place, strict=True)))
        layer = max(saving, key=lambda each: saving[each])
        left -= offered[layer][place[layer] + 1].numbers - offered[layer][place[layer]].numbers
        place[layer] += 1


def _multiples(widths: tuple[int, ...], step: int) -> range:
    return range(-(-widths[0] // step) * step, widths[-1] + 1, step)


def _hull(found: list[Choice]) -> list[Choice]:
    """The lower convex hull, as far as more numbers lose less: savings per number that never grow.

    Points on its straight edges stay, up to rounding: steps are as small as they can be.
    """
    hull: list[Choice] = []
    for choice in found:
        if hull and choice.lost >= hull[-1].lost:
            continue
        while len(hull) > 1 and _slope(hull[-2], choice) < (1 + ROUNDING) * _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(choice)
    return hull


def _slope(a: Choice, b: Choice) -> float:
    return (b.lost - a.lost) / (b.numbers - a.numbers)


def _total(tables: Sequence[LossTable], weights: Sequence[float]) -> LossTable:
    first = tables[0]
    if any((each.key_widths, each.value_widths) != (first.key_widths, first.value_widths) for each in tables):
        raise ValueError("the same widths in all layers need tables over the same widths")
    lost = sum(weight * np.array(table.lost) for table, weight in zip(tables, weights, strict=True))
    return LossTable(first.key_widths, first.value_widths, tuple(map(tuple, np.asarray(lost).tolist())))


def _too_small(keep: float, tables: Sequence[LossTable], step: int) -> str:
    least = sum(_multiples(t.key_widths, step)[0] + _multiples(t.value_widths, step)[0] for t in tables)
    return f"no layout keeps {keep:g} or less: the smallest widths of the tables come to {least} numbers per token"
