"""Attention-averaged values: every half step against a dense least-squares solution of the same problem."""

from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from mea.compression.calibrate.statistics import AveragedValues
from mea.compression.methods import values
from mea.compression.methods.factors import Factors
from mea.compression.methods.values import RIDGE, fit_values

H, G, D, WIDTH, RANK = 4, 2, 3, 8, 4  # query heads, kv heads, head dimension, model width, latent width
N = G * D


class Problem(NamedTuple):
    """Explicit samples, from which moments and dense solutions are made."""

    averaged: Tensor  # [h, samples, n]: u_i
    output: Tensor  # W_O per head, [h, D, d]

    def target(self, blocks: int) -> Tensor:
        """The true output of each block's heads, ``[c, samples, D]``."""
        own = torch.stack([self.averaged[i][:, g * D : (g + 1) * D] for i, g in enumerate(GROUPS)])
        return torch.einsum("isa,ioa->iso", own, self.output).unflatten(0, (blocks, -1)).sum(1)

    def moments(self, blocks: int = 1) -> AveragedValues:
        c, m = blocks, H // blocks
        u, target = self.averaged.unflatten(0, (c, m)), self.target(blocks)
        return AveragedValues(
            torch.einsum("cisn,cjsk->cinjk", u, u), torch.einsum("cisn,cso->cino", u, target),
            target.square().sum().item(), self.output.unflatten(0, (c, m)),
        )  # fmt: skip

    def loss(self, encoder: Tensor, decoder: Tensor, output: Tensor, blocks: int = 1) -> float:
        """``sum |y - sum_i W_i D_g(i) E u_i|^2``, `decoder` ``[g, d, r]``, `output` ``[h, D, d]``."""
        heads = torch.einsum("iar,rn,isn->isa", decoder[GROUPS], encoder, self.averaged)
        made = torch.einsum("isa,ioa->iso", heads, output).unflatten(0, (blocks, -1)).sum(1)
        return (made - self.target(blocks)).square().sum().item()


GROUPS = torch.arange(H) // (H // G)


@pytest.fixture
def problem() -> Problem:
    """Attention averages of the same values under different maps: correlated, as real ones are."""
    common = torch.randn(60, N, dtype=torch.float64) @ torch.randn(N, N, dtype=torch.float64)
    averaged = common + 0.5 * torch.randn(H, 60, N, dtype=torch.float64)
    return Problem(averaged / N, torch.randn(H, WIDTH, D, dtype=torch.float64))


@pytest.fixture(autouse=True)
def converged(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many steps as the tiny problems have unknowns: conjugate gradients then end at the solution."""
    monkeypatch.setattr(values, "CG_STEPS", 200)


def start() -> tuple[Tensor, Tensor]:
    encoder, decoder = torch.randn(RANK, N, dtype=torch.float64), torch.randn(G, D, RANK, dtype=torch.float64)
    return encoder, decoder


def solve(design: Tensor, target: Tensor) -> Tensor:
    return torch.linalg.lstsq(design, target, driver="gelsd").solution


@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_decoder_is_the_dense_least_squares_solution(problem: Problem, blocks: int) -> None:
    encoder, decoder = start()
    fitted = values._fit_decoder(problem.moments(blocks), encoder, decoder)
    latents = torch.einsum("rn,isn->isr", encoder, problem.averaged)
    columns = torch.zeros(blocks, 60, WIDTH, G, D, RANK, dtype=torch.float64)
    for i, g in enumerate(GROUPS):
        columns[i // (H // blocks), :, :, g] += torch.einsum("sr,oa->soar", latents[i], problem.output[i])
    dense = solve(columns.reshape(-1, G * D * RANK), problem.target(blocks).reshape(-1, 1)).view(G, D, RANK)
    torch.testing.assert_close(fitted, dense, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_encoder_is_the_dense_least_squares_solution(problem: Problem, blocks: int) -> None:
    encoder, decoder = start()
    fitted = values._fit_encoder(problem.moments(blocks), encoder, decoder)
    read = torch.einsum("ioa,iar->ior", problem.output, decoder[GROUPS])
    columns = torch.einsum("ior,isn->isorn", read, problem.averaged).unflatten(0, (blocks, -1)).sum(1)
    dense = solve(columns.reshape(-1, RANK * N), problem.target(blocks).reshape(-1, 1)).view(RANK, N)
    torch.testing.assert_close(fitted, dense, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_output_is_the_dense_ridge_solution(problem: Problem, blocks: int) -> None:
    """Ridge towards the original ``W_O``: rows ``sqrt(ridge)`` below the design, with the original as their target."""
    encoder, decoder = start()
    original = problem.output.unflatten(0, (blocks, -1))
    fitted = values._fit_output(problem.moments(blocks), encoder, decoder, original)
    heads = torch.einsum("iar,rn,isn->isa", decoder[GROUPS], encoder, problem.averaged).unflatten(0, (blocks, -1))
    for block in range(blocks):
        design = heads[block].transpose(0, 1).reshape(60, -1)
        ridge = RIDGE * design.square().sum(0).mean()
        rows = torch.cat([design, ridge.sqrt() * torch.eye(design.shape[1], dtype=torch.float64)])
        before = original[block].transpose(1, 2).reshape(-1, WIDTH)
        dense = solve(rows, torch.cat([problem.target(blocks)[block], ridge.sqrt() * before]))
        own = fitted[block].transpose(1, 2).reshape(-1, WIDTH)
        torch.testing.assert_close(own, dense, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("steps", [0, 1, 2, 15])
def test_half_steps_never_lose_against_their_start(
    problem: Problem, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However few: conjugate gradients fall at every step."""
    monkeypatch.setattr(values, "CG_STEPS", steps)
    moments, (encoder, decoder) = problem.moments(), start()
    losses = [problem.loss(encoder, decoder, problem.output)]
    for _ in range(5):
        decoder = values._fit_decoder(moments, encoder, decoder)
        losses.append(problem.loss(encoder, decoder, problem.output))
        encoder = values._fit_encoder(moments, encoder, decoder)
        losses.append(problem.loss(encoder, decoder, problem.output))
    for earlier, later in pairwise(losses):
        assert later <= earlier * (1 + 1e-9)
    assert (losses[-1] < 0.9 * losses[0]) == (steps > 0)


def test_conjugate_gradients_stop_at_a_solution() -> None:
    """Started where nothing is left to do, they stay there instead of dividing zero by zero."""
    matrix = torch.diag(torch.tensor([1.0, 2.0, 0.0]))
    x = torch.tensor([1.0, 1.0, 5.0])
    assert torch.equal(values.conjugate_gradients(lambda y: matrix @ y, matrix @ x, x), x)
    zero = torch.zeros(3)
    assert torch.equal(values.conjugate_gradients(lambda y: matrix @ y, zero, zero), zero)


def fit(problem: Problem, blocks: int, rank: int) -> tuple[Factors, Tensor]:
    """As the stream does it: fp32, scaled to energy 1; the output projection ``[h, D, d]``."""
    gram, target, energy, output = problem.moments(blocks)
    moments = AveragedValues((gram / energy).float(), (target / energy).float(), 1.0, output.float())
    factors, output = fit_values(moments, G, rank)
    return factors, output.double().view(WIDTH, H, D).permute(1, 0, 2)


def lost(problem: Problem, blocks: int) -> float:
    """Share of the summed output's energy, which only one block minimises."""
    factors, output = fit(problem, blocks, RANK)
    return problem.loss(factors.encoder, factors.decoder.view(G, D, RANK), output) / problem.moments().energy


def test_the_fit_never_loses_against_its_start(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = []
    for rounds in (0, 1, 2, 4):
        monkeypatch.setattr(values, "ROUNDS", rounds)
        losses.append(lost(problem, 1))
    assert losses[1] < losses[0]
    for earlier, later in pairwise(losses):
        assert later <= earlier


def test_blocks_come_between_the_start_and_all_heads_together(
    problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two, four = (lost(problem, blocks) for blocks in (1, 2, 4))
    monkeypatch.setattr(values, "ROUNDS", 0)
    start = lost(problem, 1)
    assert one < two < start
    assert one < four < start


@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_full_rank_loses_nothing(problem: Problem, blocks: int) -> None:
    factors, output = fit(problem, blocks, N)
    made = problem.loss(factors.encoder, factors.decoder.view(G, D, N), output)
    assert made / problem.moments().energy < 1e-8  # the square of fp32's rounding, times the condition of the moments
