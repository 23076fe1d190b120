"""Bytes go where they save most: held against trying everything."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mea.compression.allocation import LossTable, allocate, choices
from mea.compression.layout import CacheShape

WIDTHS = (8, 16, 24, 32)
SHAPE = CacheShape(4, 8, (None,) * 3, 4)  # 32 keys and as many values per token


def product(key: float, value: float) -> LossTable:
    """Convex in both widths: what is lost shrinks geometrically."""
    lost = tuple(tuple(key ** (k / 8) + value ** (v / 8) for v in WIDTHS) for k in WIDTHS)
    return LossTable(WIDTHS, WIDTHS, lost)


RATES = st.floats(0.05, 0.9)
TABLES = st.lists(st.builds(product, RATES, RATES), min_size=3, max_size=3)
WEIGHTS = st.lists(st.floats(0.1, 10), min_size=3, max_size=3)


def total(tables: list[LossTable], weights: list[float], widths) -> float:
    return sum(w * t.at(*pair) for t, w, pair in zip(tables, weights, widths, strict=True))


@given(TABLES, WEIGHTS, st.sampled_from([0.4, 0.5, 0.75]))
def test_no_other_layout_of_the_budget_loses_less(tables, weights, keep) -> None:
    # Losses are separable and convex, so that every step costs 8 numbers and the hull leaves no gap.
    found = allocate(SHAPE, tables, weights, keep, step=8)
    pairs = list(itertools.product(WIDTHS, WIDTHS))
    lost = [
        np.array([weight * table.at(*pair) for pair in pairs]) for table, weight in zip(tables, weights, strict=True)
    ]
    everything = lost[0][:, None, None] + lost[1][:, None] + lost[2]
    size = np.array([sum(pair) for pair in pairs])
    best = everything[size[:, None, None] + size[:, None] + size <= 64 * 3 * keep].min()
    assert found.keep(SHAPE) <= keep
    assert total(tables, weights, found.widths) <= best * (
        1 + 1e-8
    )  # points within 1e-9 of a hull's edge count as on it


def test_a_layer_that_matters_more_gets_more() -> None:
    tables = [product(0.5, 0.5)] * 3
    widths = allocate(SHAPE, tables, [1.0, 1.0, 50.0], 0.5).widths
    assert widths[2] == (32, 32)
    assert sum(map(sum, widths)) <= 96


def test_keys_get_more_where_they_lose_more() -> None:
    widths = allocate(SHAPE, [product(0.9, 0.05)] * 3, [1.0, 1.0, 1.0], 0.5).widths
    assert all(key > value for key, value in widths)


def test_constraints_hold() -> None:
    tables, weights = [product(0.9, 0.05), product(0.5, 0.3), product(0.1, 0.8)], [1.0, 5.0, 0.2]
    equal = allocate(SHAPE, tables, weights, 0.6, equal=True)
    assert all(key == value for key, value in equal.widths)
    assert len(set(allocate(SHAPE, tables, weights, 0.6, same=True).widths)) == 1
    coarse = allocate(SHAPE, tables, weights, 0.6, step=16)
    assert all(width % 16 == 0 for pair in coarse.widths for width in pair)


def test_choices_are_convex_where_the_table_is_not() -> None:
    table = LossTable((8, 16, 24), (8,), ((1.0,), (0.99,), (0.1,)))  # the second step saves more than the first
    assert [choice.widths for choice in choices(table, 1.0, 8)] == [(8, 8), (24, 8)]


def test_what_does_not_fit_is_refused() -> None:
    tables = [product(0.5, 0.5)] * 3
    with pytest.raises(ValueError, match="48 numbers per token"):
        allocate(SHAPE, tables, [1.0, 1.0, 1.0], 0.2)
    with pytest.raises(ValueError, match="not 2 and 3"):
        allocate(SHAPE, tables[:2], [1.0, 1.0, 1.0], 0.5)
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        allocate(SHAPE, tables, [1.0, 1.0, 1.0], 1.5)
    with pytest.raises(ValueError, match="increase"):
        LossTable((16, 8), (8,), ((1.0,), (2.0,)))
