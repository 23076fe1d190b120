"""Methods that align heads before they share them: what each claims to be, and that alignment pays."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from compression.rotary import rotation, tables
from mea.compression.calibrate.statistics import AveragedValues, LayerStatistics
from mea.compression.methods import METHODS
from mea.compression.methods.factors import Factors
from mea.compression.methods.whole_heads import gauge, gqa_mean, gqa_procrustes
from mea.compression.methods.whole_heads.gauge_maps import head_matrices, key_blocks, value_blocks

G, D, WIDTH = 4, 6, 40
N = G * D
F = D // 2


def statistics(keys: Tensor, values: Tensor, queries: Tensor | None = None) -> LayerStatistics:
    """Of samples ``[s, g, d]``; queries look at everything alike unless given."""
    metric = torch.eye(D).double().expand(G, D, D) if queries is None else queries.mT @ queries / queries.shape[1]
    cos, sin = tables(torch.arange(64), torch.tensor([1.0, 0.3, 0.01]).double())
    moments = [x.flatten(1).T @ x.flatten(1) / len(x) for x in (keys, values)]
    cross = keys.flatten(1).T @ values.flatten(1) / len(keys)
    weights = torch.randn(2, N, WIDTH)
    return LayerStatistics(moments[0], metric, moments[1], cos, sin, *weights, cross, metric)


def turned(components: Tensor, groups: list[int], noise: float) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values ``[s, g, d]`` that are components ``[s, c, d]`` turned head by head; and the values' matrices."""
    phases = torch.polar(torch.ones(G, F).double(), 6.3 * torch.rand(G, F).double())
    matrices = torch.linalg.qr(torch.randn(G, D, D).double()).Q
    keys = torch.view_as_complex(components[:, groups].unflatten(-1, (2, F)).transpose(-1, -2).contiguous()) * phases
    keys = torch.cat([keys.real, keys.imag], -1)
    values = torch.einsum("gab,sgb->sga", matrices, components[:, groups])
    return keys + noise * torch.randn_like(keys), values + noise * torch.randn_like(values), matrices


def relative_error(factors: Factors, moment: Tensor) -> float:
    residual = torch.eye(N).double() - factors.projection
    return (torch.trace(residual @ moment @ residual.T) / torch.trace(moment)).item()


def both(name: str, given: LayerStatistics, heads: int) -> list[float]:
    """Relative errors of keys and of values, single tokens counting alike."""
    method = METHODS[name]
    assert method.values is not None
    factors = method.keys(given, heads * D), method.values(given, heads * D)
    return [relative_error(each, moment) for each, moment in zip(factors, (given.keys, given.values), strict=True)]


def test_mean_pooling_is_the_mean_of_neighbouring_projections() -> None:
    given = statistics(*torch.randn(2, 50, G, D).double())
    factors = gqa_mean.values(given, 2 * D)
    weight = given.value_weight.double().view(2, 2, D, WIDTH)
    expected = weight.mean(1, keepdim=True).expand(2, 2, D, WIDTH).reshape(N, WIDTH)
    torch.testing.assert_close(factors.projection @ given.value_weight.double(), expected)


@pytest.mark.parametrize(("heads", "groups", "expected"), [(8, 4, [0, 0, 1, 1, 2, 2, 3, 3]), (3, 2, [0, 0, 1])])
def test_neighbours_share_a_group(heads: int, groups: int, expected: list[int]) -> None:
    assert gqa_mean.neighbours(heads, groups).tolist() == expected


@pytest.mark.parametrize("groups", [[0, 1, 0, 1], [0, 0, 1, 1], [0, 1, 1, 1]])
def test_procrustes_finds_and_undoes_the_turns(groups: list[int]) -> None:
    """Heads that are turned copies of two components: nothing is lost; the mean of heads as they come loses much."""
    keys, values, _ = turned(torch.randn(300, 2, D).double(), groups, 0.0)
    given = statistics(keys, values)
    assert max(both("gqa-procrustes", given, 2)) < 1e-12
    assert min(both("gqa-mean", given, 2)) > 0.2


def test_procrustes_maps_are_orthogonal_and_commute_with_rotation() -> None:
    keys, values, _ = turned(torch.randn(300, 2, D).double(), [0, 1, 0, 1], 0.5)
    given = statistics(keys, values)
    for moment in (key_blocks(given.keys, D), value_blocks(given.values, D)):
        maps = head_matrices(gqa_procrustes.align(moment, [0, 2, 3]))
        torch.testing.assert_close(maps @ maps.mT, torch.eye(D).double().expand(3, D, D))
    projection = gqa_procrustes.keys(given, D).projection
    turn = rotation(given.cos[40], given.sin[40], G)
    torch.testing.assert_close(projection @ turn, turn @ projection)


def test_alignment_is_a_maximum() -> None:
    """No small turn of any head brings the heads nearer to their mean."""
    _, values, _ = turned(torch.randn(300, 2, D).double(), [0, 1, 0, 1], 1.0)
    moment = value_blocks(statistics(values, values).values, D)
    maps = gqa_procrustes.align(moment, list(range(G)))

    def agreement(maps: Tensor) -> float:
        return torch.einsum("bgea,bgahc,bhec->", maps, moment, maps).item()

    best = agreement(maps)
    for _ in range(50):
        skew = 0.05 * torch.randn(1, G, D, D).double()
        assert agreement(torch.linalg.matrix_exp(skew - skew.mT) @ maps) <= best * (1 + 1e-9)


def test_gauge_undoes_what_procrustes_cannot() -> None:
    """Mixtures of components, each head in coordinates of its own that are not orthogonal: still nothing is lost."""
    components, mixing = torch.randn(400, 2, D).double(), torch.randn(G, 2).double()
    keys, values, _ = turned(torch.einsum("scd,gc->sgd", components, mixing), list(range(G)), 0.0)
    values = torch.einsum("gab,sgb->sga", torch.randn(G, D, D).double(), values)
    given = statistics(keys, values)
    assert relative_error(gauge.keys(given, 2 * D), given.keys) < 1e-6
    maps, scalars = gauge.fit_gauge(value_blocks(given.values, D), 2)
    factors = gauge._decoder(head_matrices(maps), scalars)
    assert relative_error(Factors(torch.linalg.pinv(factors), factors), given.values) < 1e-3
    assert min(both("gqa-procrustes", given, 2)) > 0.02


def test_gauge_loses_no_more_than_the_scalar_mixings_it_contains() -> None:
    keys, values, _ = turned(torch.randn(300, 2, D).double(), [0, 1, 0, 1], 0.7)
    given = statistics(keys, values)
    own = relative_error(gauge.keys(given, 2 * D), given.keys)
    for name in ("gqa-procrustes", "gqa-mean", "gram", "svd"):
        assert own < both(name, given, 2)[0], name


@pytest.mark.parametrize("heads", [1, G - 1])
def test_gauge_is_the_best_subspace_per_frequency_at_one_head_and_at_one_less_than_all(heads: int) -> None:
    """Eckart and Young, frequency by frequency, under the queries' weights."""
    samples = torch.randn(300, N).double() @ torch.randn(N, N).double()
    queries = torch.randn(G, 200, D).double() * (0.1 + torch.rand(G, 1, D).double())
    given = statistics(samples.view(-1, G, D), samples.view(-1, G, D), queries)
    energy = given.queries.diagonal(dim1=1, dim2=2).unflatten(1, (2, F)).mean(1)
    weight = energy.repeat(1, 2).flatten().sqrt()
    lost = weight[:, None] * (torch.eye(N).double() - gauge.keys(given, heads * D).projection)
    blocks = key_blocks(weight[:, None] * given.keys * weight, D)[:, :, 0, :, 0]
    least = torch.linalg.eigvalsh(blocks)[:, : G - heads].sum().item()
    phase_averaged = torch.zeros(N, N).double()
    for f in range(F):
        rows = [torch.arange(G) * D + f, torch.arange(G) * D + f + F]
        for a in (0, 1):
            phase_averaged[rows[a][:, None], rows[a]] = blocks[f].real / weight[rows[0], None] / weight[rows[0]] / 2
        cross = blocks[f].imag / weight[rows[0], None] / weight[rows[0]] / 2
        phase_averaged[rows[1][:, None], rows[0]], phase_averaged[rows[0][:, None], rows[1]] = cross, -cross
    found = torch.trace(lost @ phase_averaged @ lost.T).item()
    assert found == pytest.approx(least, rel=1e-3)


def test_gauge_keeps_the_papers_form_and_commutes_with_rotation() -> None:
    """In each head's coordinates the decoder is one scalar per component head: ``D_g = [w_g1 G_g, w_g2 G_g]``."""
    samples = torch.randn(300, N).double() @ torch.randn(N, N).double()
    given = statistics(samples.view(-1, G, D), samples.view(-1, G, D))
    factors = gauge.keys(given, 2 * D)
    blocks = factors.decoder.view(G, D, 2, D).transpose(1, 2).flatten(2)
    assert (torch.linalg.svdvals(blocks)[:, 1] < 1e-9).all()
    turn, small = rotation(given.cos[40], given.sin[40], G), rotation(given.cos[40], given.sin[40], 2)
    torch.testing.assert_close(factors.encoder @ turn, small @ factors.encoder)
    assert torch.linalg.cond(factors.decoder) < 100


class Problem(NamedTuple):
    """Attention-averaged values of 2 query heads per kv head, all correlated."""

    averaged: AveragedValues
    samples: Tensor


def problem(rank: int = N, noise: float = 0.3) -> Problem:
    h, width = 2 * G, 12
    common = torch.randn(200, rank).double() @ torch.randn(rank, N).double() / N**0.5
    u = common + noise * torch.randn(h, 200, N).double()
    output = torch.randn(1, h, width, D).double()
    own = torch.stack([u[i].view(200, G, D)[:, i // 2] for i in range(h)])
    target = torch.einsum("isd,iod->so", own, output[0])
    energy = target.square().sum().item()
    gram = torch.einsum("isn,jsm->injm", u, u)[None] / energy
    cross = torch.einsum("isn,so->ino", u, target)[None] / energy
    return Problem(AveragedValues(gram.float(), cross.float(), 1.0, output.float()), u)


def lost(averaged: AveragedValues, factors: Factors, output: Tensor) -> float:
    """Share of the output's energy, from the moments: ``1 - 2 <y, ŷ> + |ŷ|²``."""
    h = averaged.gram.shape[1]
    read = output.double().view(-1, h, D).permute(1, 2, 0)  # h d D
    decoder = factors.decoder.view(G, D, -1)[torch.arange(h) // 2] @ factors.encoder  # h d n
    made = torch.einsum("hdn,hdo->hno", decoder, read)
    cross = (made * averaged.target[0].double()).sum()
    return (1 - 2 * cross + torch.einsum("ino,injm,jmo->", made, averaged.gram[0].double(), made)).item()


def test_gauge_values_keep_the_form_and_improve_on_their_start(monkeypatch: pytest.MonkeyPatch) -> None:
    from mea.compression.methods import values
    from mea.compression.methods.values import fit_values

    averaged = problem().averaged
    losses = []
    for rounds in (0, 1, 3):
        monkeypatch.setattr(values, "ROUNDS", rounds)
        factors, output = gauge.values(averaged, G, 2 * D)
        blocks = factors.decoder.view(G, D, 2, D).transpose(1, 2).flatten(2)
        singular = torch.linalg.svdvals(blocks)
        assert (singular[:, 1] < 1e-5 * singular[:, 0]).all()
        losses.append(lost(averaged, factors, output))
    assert losses[2] < losses[1] < losses[0]
    free = lost(averaged, *fit_values(averaged, G, 2 * D))
    assert free < losses[2], "without the form more is possible"


def test_gauge_values_lose_nothing_at_full_rank() -> None:
    averaged = problem().averaged
    assert lost(averaged, *gauge.values(averaged, G, N)) < 1e-6


def test_gauge_values_do_not_cancel_where_hardly_anything_was_seen() -> None:
    """Found on SmolLM2: decoders of 1e2 against encoders of 1e5, whose products in fp32 were per cents off."""
    factors, _ = gauge.values(problem(rank=1, noise=1e-5).averaged, G, 3 * D)
    sizes = [torch.linalg.matrix_norm(each, 2).item() for each in (factors.decoder, factors.encoder)]
    assert sizes[0] * sizes[1] < 3 / gauge.RTOL
