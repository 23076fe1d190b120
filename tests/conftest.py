"""What every test may use: the same random numbers each time, and tolerances that are derived."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def agree() -> Callable[..., None]:
    """Assert that two results differ by rounding only.

    A chain of sums over n terms is off by at most n ulps of the largest partial sum (Higham, Accuracy and Stability of
    Numerical Algorithms, section 3.1), and both sides are such chains: the bound is 2 n eps max(1, |expected|), for
    inputs of size 1. `terms` is n: the lengths of all contractions on the way to one output number, added.
    """

    def check(actual: Tensor, expected: Tensor, terms: int, what: str = "result") -> None:
        assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
        eps = max(torch.finfo(x.dtype).eps for x in (actual, expected))
        bound = 2 * terms * eps * max(1.0, expected.abs().max().item())
        error = (actual - expected).abs().max().item()
        assert error <= bound, f"{what}: error {error:.2e} above the rounding bound {bound:.2e}"

    return check
