"""Bits: the budget is met, one threshold decides for all sections, and more bytes never cost."""

import itertools
from typing import Any

import pytest
import torch

from mea.compression.coding.bits import NOISE, Section, allocate, expected_loss, tiers_at, unit_of
from mea.ops.codes import TIERS, bits_per_token

LEVELS = (*TIERS, 0)


def losses(count: int, decay: float, size: float = 1.0) -> torch.Tensor:
    return size * decay ** torch.arange(count, dtype=torch.float64)


def sections() -> list[Section]:
    return [
        Section(losses(128, 0.95), 1000),
        Section(losses(128, 0.98, 0.01), 1000),
        Section(losses(64, 0.9, 3.0), 200),
        Section(losses(16, 0.8, 1e-3), 1000),
    ]


def taken(tiers, given) -> int:
    return sum(bits_per_token(tier) * section.tokens for tier, section in zip(tiers, given, strict=True))


def total_loss(tiers, given) -> float:
    return sum(expected_loss(section, tier) for section, tier in zip(given, tiers, strict=True))


@pytest.mark.parametrize("bits", [20_000, 100_000, 300_000, 700_000, 1_200_000, 10**9])
def test_the_budget_is_met_in_whole_units(bits):
    given = sections()
    tiers = allocate(given, bits)
    assert taken(tiers, given) <= bits
    for tier, section in zip(tiers, given, strict=True):
        assert sum(tier) <= len(section.losses)
        assert not any(count % unit_of(len(section.losses)) for count in tier)


def test_more_bits_never_cost():
    given = sections()
    found = [allocate(given, bits) for bits in range(20_000, 2_000_000, 50_000)]
    for less, more in itertools.pairwise(found):
        assert taken(less, given) <= taken(more, given)
        assert total_loss(more, given) <= total_loss(less, given)


def test_there_is_room_for_everything():
    given = sections()
    assert allocate(given, 10**12) == [(len(section.losses), 0, 0) for section in given]


@pytest.mark.parametrize("bits", [200_000, 600_000, 1_500_000])
def test_no_exchange_of_a_unit_lowers_the_loss(bits):
    """With one threshold theta, a level of bits more saves less than theta per bit, one less costs more than theta.

    So no unit that gives bits away and no unit that takes as many can gain together. Edges are rounded to units: what
    is compared is the unit on either side of an edge.
    """
    given = sections()
    tiers = allocate(given, bits)
    gains, costs = [], []  # per bit and token: of the best next level, and of the worst level given away
    for section, tier in zip(given, tiers, strict=True):
        unit, count = unit_of(len(section.losses)), len(section.losses)
        edges = [0, *itertools.accumulate(tier), count]
        for level, (upper, lower) in enumerate(itertools.pairwise(LEVELS)):
            edge, change = edges[level + 1], NOISE[lower] - NOISE[upper]
            scale = change / (upper - lower) / section.tokens
            # Beyond the unit that rounding may have moved the edge by.
            if edge + unit < edges[level + 2] or (level == 2 and edge + unit < count):
                gains.append(section.losses[edge + unit].item() * scale)
            if edge - unit > edges[level]:
                costs.append(section.losses[edge - unit].item() * scale)
    assert max(gains) <= min(costs)


def test_a_threshold_gives_the_same_bits_to_the_same_loss_per_token():
    """A loss in a section with half of the tokens is worth twice as many bits: sliding layers are cheap."""
    values = losses(128, 0.93)
    assert tiers_at(Section(values, 100), 1e-6) == tiers_at(Section(values, 50), 2e-6)
    full, sliding = allocate([Section(values, 1000), Section(values, 100)], 300_000)
    assert bits_per_token(sliding) > bits_per_token(full)


def test_zero_losses_get_no_bits():
    given = [Section(torch.zeros(64, dtype=torch.float64), 100), Section(losses(64, 0.9), 100)]
    nothing, something = allocate(given, 30_000)
    assert nothing == (0, 0, 0)
    assert sum(something) > 0


def test_sections_without_losses_at_all():
    """Any bits do; nothing fails."""
    given = [Section(torch.zeros(64, dtype=torch.float64), 100)] * 2
    assert taken(allocate(given, 100_000), given) <= 100_000


def test_no_room_is_refused():
    with pytest.raises(ValueError, match="the budget leaves no room for codes"):
        allocate(sections(), 10)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_units_of_the_loss_do_not_matter(scale: Any):
    given = sections()
    scaled = [Section(section.losses * scale, section.tokens) for section in given]
    for bits in (100_000, 700_000):
        found, expected = (taken(allocate(each, bits), each) for each in (scaled, given))
        assert found == pytest.approx(expected, rel=0.02)


def test_expected_loss_is_that_of_rounding():
    """Half of each component's energy in the metric, times the relative error of its bits."""
    section = Section(losses(16, 0.5), 1)
    parts = section.losses.split((4, 4, 4, 4))
    expected = sum(NOISE[bits] * float(part.sum()) for bits, part in zip(LEVELS, parts, strict=True))
    assert expected_loss(section, (4, 4, 4)) == pytest.approx(expected)
