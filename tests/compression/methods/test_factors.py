"""The linear algebra that the methods share."""

import pytest
import torch
from torch import Tensor

from mea.compression.methods.factors import Factors, from_head_mixing, orthonormal, weighted_subspace

D, G = 4, 3
N = D * G


def random_moment(n: int, samples: int | None = None) -> Tensor:
    x = torch.randn(samples or 3 * n, n, dtype=torch.float64)
    return x.T @ x / len(x)


def loss(factors: Factors, moment: Tensor, metric: Tensor) -> float:
    """``E sum_g (x - x̂)_g^T metric_g (x - x̂)_g``."""
    residual = torch.eye(len(moment), dtype=torch.float64) - factors.projection
    return torch.trace(torch.block_diag(*metric) @ residual @ moment @ residual.T).item()


@pytest.mark.parametrize("rank", [1, 5, 11])
def test_weighted_subspace_is_the_best_of_its_rank(rank: int) -> None:
    moment, metric = random_moment(N), torch.stack([random_moment(D) for _ in range(G)])
    best = loss(Factors(*weighted_subspace(moment, metric, rank)), moment, metric)
    # What it must be: the discarded eigenvalues of the moment between the metric's roots.
    weighted = torch.linalg.eigvals(moment @ torch.block_diag(*metric)).real.sort().values
    assert best == pytest.approx(weighted[: N - rank].sum().item(), rel=1e-9)
    for _ in range(50):  # and no factors near it, nor any others, are better
        near = Factors(*(x + 0.01 * torch.randn_like(x) for x in weighted_subspace(moment, metric, rank)))
        random = orthonormal(torch.randn(rank, N, dtype=torch.float64), torch.randn(N, rank, dtype=torch.float64))
        assert loss(near, moment, metric) > best
        assert loss(random, moment, metric) > best


@pytest.mark.parametrize("samples", [3, 100])  # fewer than dimensions: directions that were never seen
def test_full_rank_is_exact_whatever_the_moments(samples: int) -> None:
    moment = random_moment(N, samples)
    metric = torch.stack([random_moment(D, 2) for _ in range(G)])
    factors = orthonormal(*weighted_subspace(moment, metric, N))
    identity = torch.eye(N, dtype=torch.float64)
    # Never-seen directions count a billionth: roots and inverses of condition 10^4.5 lose that many of 16 digits.
    torch.testing.assert_close(factors.projection, identity, rtol=0, atol=1e-9)


def test_an_unused_group_does_not_break_the_others() -> None:
    moment = random_moment(N)
    metric = torch.stack([random_moment(D), torch.zeros(D, D, dtype=torch.float64), random_moment(D)])
    factors = orthonormal(*weighted_subspace(moment, metric, 8))
    assert factors.projection.isfinite().all()


def test_orthonormal_keeps_the_product() -> None:
    encoder, decoder = torch.randn(5, N, dtype=torch.float64), torch.randn(N, 5, dtype=torch.float64)
    factors = orthonormal(encoder, decoder)
    torch.testing.assert_close(factors.projection, decoder @ encoder, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        factors.decoder.T @ factors.decoder, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-12
    )


def test_head_mixing_is_the_papers_hlc() -> None:
    """``c_j = sum_g w_jg x_g``, ``x̂_g = sum_j w_jg c_j``: one scalar per pair of heads, the same for all channels."""
    mixing = torch.linalg.qr(torch.randn(G, 2, dtype=torch.float64)).Q.T
    x = torch.randn(G, D, dtype=torch.float64)
    factors = from_head_mixing(mixing, D)
    components = torch.einsum("jg,gd->jd", mixing, x)
    torch.testing.assert_close(factors.encoder @ x.flatten(), components.flatten())
    rebuilt = torch.einsum("jg,jd->gd", mixing, components)
    torch.testing.assert_close(factors.projection @ x.flatten(), rebuilt.flatten())
