"""Averages over positions against explicit rotations, one position after the other."""

import pytest
import torch
from torch import Tensor

from compression.rotary import rotation, tables
from mea.compression.calibrate.rope_moments import average_over_phases, average_over_positions


def random_moment(n: int, groups: int = 0) -> Tensor:
    factor = torch.randn(*([groups] if groups else []), n, 2 * n, dtype=torch.float64)
    return factor @ factor.transpose(-1, -2) / (2 * n)


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("d", [2, 6, 10])
@pytest.mark.parametrize("scale", [1.0, 1.3])  # some rotary embeddings scale (YaRN)
def test_average_over_positions_is_the_mean_of_rotated_moments(heads: int, d: int, scale: float) -> None:
    positions = torch.arange(17)
    theta = 0.5 ** torch.arange(d // 2, dtype=torch.float64)
    cos, sin = (scale * table for table in tables(positions, theta))
    moment = random_moment(heads * d)
    rotations = [rotation(c, s, heads) for c, s in zip(cos, sin, strict=True)]
    expected = torch.stack([r @ moment @ r.T for r in rotations]).mean(0)
    torch.testing.assert_close(average_over_positions(moment, cos, sin), expected, rtol=0, atol=1e-12)


def test_groups_are_averaged_each_by_itself() -> None:
    cos, sin = tables(torch.arange(9), torch.tensor([1.0, 0.1], dtype=torch.float64))
    moments = random_moment(4, groups=3)
    together = average_over_positions(moments, cos, sin)
    for one, moment in zip(together, moments, strict=True):
        assert torch.equal(one, average_over_positions(moment, cos, sin))


def test_average_over_phases_is_the_mean_over_independent_turns() -> None:
    """Every frequency turned by 0, 90, 180 and 270 degrees, each combination once, averages as uniform phases do."""
    d, heads = 4, 2
    moment = random_moment(heads * d)
    quarter = torch.arange(4, dtype=torch.float64) * torch.pi / 2
    turned = []
    for phases in torch.cartesian_prod(quarter, quarter):
        both = torch.cat([phases, phases])
        r = rotation(both.cos(), both.sin(), heads)
        turned.append(r @ moment @ r.T)
    expected = torch.stack(turned).mean(0)
    torch.testing.assert_close(average_over_phases(moment, d), expected, rtol=0, atol=1e-12)


def test_positions_approach_phases_when_all_frequencies_are_fast() -> None:
    d = 6
    moment = random_moment(2 * d)
    theta = torch.tensor([1.0, 0.73, 0.41], dtype=torch.float64)
    limit = average_over_phases(moment, d)
    errors = []
    for count in (100, 1000, 10_000):
        errors.append((average_over_positions(moment, *tables(torch.arange(count), theta)) - limit).abs().max().item())
    # A geometric sum of phases: the mean over p positions falls as 1 / p.
    assert errors[1] < errors[0] / 5
    assert errors[2] < errors[1] / 5


def test_a_frequency_that_does_not_turn_keeps_its_moment() -> None:
    moment = random_moment(4)
    cos, sin = tables(torch.arange(50), torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(average_over_positions(moment, cos, sin), moment, rtol=0, atol=1e-12)
