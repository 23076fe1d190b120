"""The Triton kernel that rounds and packs components gives the codes of `mea.ops.codes.to_codes`, bit for bit."""

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton: pip install 'mea[gpu]'")

from mea.ops.codes import to_codes
from mea.ops.triton import packed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def check(components, tiers):
    found, expected = packed.to_codes(components.to(DEVICE), tiers), to_codes(components, tiers)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one.cpu(), other)  # but for the sign of zero, which depends on the order of a minimum


@pytest.mark.parametrize("tiers", [(16, 96, 64), (0, 300, 0), (130, 0, 0), (0, 0, 13), (3, 7, 10), (0, 0, 0)], ids=str)
@pytest.mark.parametrize("tokens", [(1,), (3, 13)], ids=str)
def test_codes_are_those_of_the_definition(tiers, tokens):
    check(torch.randn(*tokens, sum(tiers)) * torch.logspace(-3, 3, sum(tiers)), tiers)


@pytest.mark.parametrize("factor", [0.0, 1e-30, 1e-20, 1e20, 1e30])
def test_at_any_scale(factor):
    components = factor * torch.randn(40, 48)
    components[7], components[8, :16], components[9] = factor, -factor, 0.0
    check(components, (16, 16, 16))


def test_ties_go_to_the_even_code():
    components = torch.cat([torch.arange(0, 16).float(), torch.arange(15) + 0.5])[None]
    check(components, (0, 31, 0))
