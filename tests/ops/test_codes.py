"""Codes: packing loses nothing, rounding errs by half a step, scales are free, and bytes are those of the tensors."""

import itertools

import pytest
import torch

from mea.ops.codes import (
    GROUP,
    TIERS,
    UNIT,
    bits_per_token,
    from_codes,
    group_sizes,
    pack,
    rounded,
    to_codes,
    unpack,
)

MIXED = [
    (16, 0, 0),
    (0, 32, 0),
    (0, 0, 48),
    (4, 8, 12),
    (16, 160, 144),
    (3, 5, 7),
    (1, 1, 1),
    (130, 130, 255),
    (0, 0, 0),
]


def steps(scales, tiers):
    """The step of every component."""
    parts = [scales[..., :0]] + [
        scales[..., 2 * i + 1, None].expand(*scales.shape[:-1], n) for i, (_, n) in enumerate(group_sizes(tiers))
    ]
    return torch.cat(parts, -1).double()


def lows(scales, tiers):
    """The lowest number of every component's group."""
    parts = [scales[..., :0]] + [
        scales[..., 2 * i, None].expand(*scales.shape[:-1], n) for i, (_, n) in enumerate(group_sizes(tiers))
    ]
    return torch.cat(parts, -1).double()


@pytest.mark.parametrize("bits", TIERS)
@pytest.mark.parametrize("width", [*range(1, 20), 127, 128])
def test_packing_is_lossless(bits, width):
    codes = torch.randint(2**bits, (2, 3, width)).to(torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (2, 3, -(-width * bits // 8))
    assert torch.equal(unpack(packed, bits, width), codes)


@pytest.mark.parametrize("tiers", [*MIXED, (2064, 272, 1040), *itertools.product((0, 129, 144), (0, 257), (0, 259))])
def test_groups_divide_tiers(tiers):
    """Sizes add up to each tier, none is above 128, and whole units of 16 where the tier is a multiple of 16."""
    groups = group_sizes(tiers)
    for bits, count in zip(TIERS, tiers, strict=True):
        sizes = [size for own, size in groups if own == bits]
        assert sum(sizes) == count
        assert len(sizes) == -(-count // GROUP)
        assert all(0 < size <= GROUP for size in sizes)
        assert count % UNIT or not any(size % UNIT for size in sizes)
    assert [bits for bits, _ in groups] == sorted((bits for bits, _ in groups), reverse=True)


@pytest.mark.parametrize("tiers", MIXED)
def test_bits_are_those_of_the_tensors(tiers):
    codes, scales = to_codes(torch.randn(2, 5, sum(tiers)), tiers)
    assert codes.shape[:2] == scales.shape[:2] == (2, 5)
    assert (codes.nbytes + scales.nbytes) * 8 == 10 * bits_per_token(tiers)


@pytest.mark.parametrize("offset", [0.0, 10.0, -3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tiers", MIXED)
def test_error_is_at_most_half_a_step(tiers, dtype, offset):
    """Of every number, the highest of a group included: a step is wide enough to reach it.

    The lowest number may have been rounded up, by 2^-8 of it (bf16), and numbers below it are its code 0. fp32 sums add
    2^-23 of the number.
    """
    x = torch.randn(3, 4, sum(tiers), dtype=dtype) * 2 + offset
    codes, scales = to_codes(x, tiers)
    found = from_codes(codes, scales, tiers)
    assert found.shape == x.shape
    assert found.dtype == torch.float32
    bound = (steps(scales, tiers) / 2).maximum(2**-8 * lows(scales, tiers).abs()) + 2**-22 * x.abs()
    assert ((found.double() - x).abs() <= bound).all()


@pytest.mark.parametrize("tiers", MIXED[:-1])
def test_a_step_is_the_range_over_the_codes(tiers):
    """At most 2^-8 wider, and 2^-8 more of rounding: with 8 bits the highest code is 254 or 255."""
    x = torch.randn(3, sum(tiers))
    scales, start = to_codes(x, tiers)[1].double(), 0
    for index, (bits, size) in enumerate(group_sizes(tiers)):
        part = x[:, start : start + size].double()
        span = (part.amax(-1) - scales[:, 2 * index]).clamp_min(0)
        assert (scales[:, 2 * index + 1] * (2**bits - 1) <= span * (1 + 2**-8) * (1 + 2**-8)).all()
        start += size


@pytest.mark.parametrize("exponent", [-24, -7, 3, 24])
def test_powers_of_two_are_free(exponent):
    """Scaled numbers have the same codes, and the same results scaled, to the bit."""
    tiers, x = (16, 160, 144), torch.randn(2, 3, 320)
    codes, scales = to_codes(x, tiers)
    codes_there, scales_there = to_codes(x * 2.0**exponent, tiers)
    assert torch.equal(codes_there, codes)
    assert torch.equal(scales_there, scales * 2.0**exponent)
    assert torch.equal(rounded(x * 2.0**exponent, tiers), rounded(x, tiers) * 2.0**exponent)


@pytest.mark.parametrize("value", [0.0, 3.0, -0.125, 2.0**-100, 1e30])
def test_constant_groups(value):
    """Exact where bf16 has the number, otherwise its neighbour there: at most 2^-8 of it away."""
    x = torch.full((2, 24), value)
    found = from_codes(*to_codes(x, (8, 8, 8)), (8, 8, 8))
    assert ((found - x).abs() <= 2**-8 * x.abs()).all()
    assert value == 1e30 or torch.equal(found, x)


def test_one_huge_number_costs_its_group_only():
    """It is found again to half a step; the other groups of the token are as they were without it."""
    tiers, x = (16, 144, 16), torch.randn(1, 176)
    expected = rounded(x, tiers)
    x[0, 20] = 1e30
    found = rounded(x, tiers)
    sizes = [size for _, size in group_sizes(tiers)]
    own = slice(sizes[0], sizes[0] + sizes[1])
    assert (found[0, 20] / 1e30 - 1).abs() <= 1 / 15
    assert found.isfinite().all()
    others = torch.ones(176, dtype=torch.bool)
    others[own] = False
    assert torch.equal(found[:, others], expected[:, others])


def test_tokens_are_coded_by_themselves():
    tiers, x = (4, 8, 12), torch.randn(3, 10, 24)
    whole, parts = to_codes(x, tiers), [to_codes(part, tiers) for part in x.split((1, 2, 7), 1)]
    for found, expected in zip(zip(*parts, strict=True), whole, strict=True):
        assert torch.equal(torch.cat(found, 1), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rounded_is_what_codes_give_back(dtype):
    """Up to the last digit, since the error is added to the exact number; the gradient is that of the identity."""
    tiers = (4, 8, 12)
    x = torch.randn(2, 5, 24).to(dtype).requires_grad_()
    found = rounded(x, tiers)
    expected = from_codes(*to_codes(x.detach(), tiers), tiers)
    torch.testing.assert_close(found.detach().float(), expected, atol=2**-22 * 4, rtol=0)
    weight = torch.randn(2, 5, 24).to(found.dtype)
    (found * weight).sum().backward()
    assert torch.equal(x.grad, weight.to(dtype))


def test_relative_errors_of_normal_numbers():
    """Groups of 128 normal numbers: their range is about 5.2 deviations, and a step's error its square over 12.

    Steps of 5.2 / 255 and 5.2 / 15 give 3.5e-5 and 1.0e-2. With the step of 2 bits, 1.7 deviations, errors are not
    uniform: 0.25, from 10^5 numbers.
    """
    x = torch.randn(2000, 128)
    for tiers, expected in (((128, 0, 0), 3.5e-5), ((0, 128, 0), 1.0e-2), ((0, 0, 128), 0.25)):
        error = (rounded(x, tiers) - x).square().mean().item()
        assert error == pytest.approx(expected, rel=0.1)
