"""Each method against what it claims to minimise, and against what makes it exact."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from compression.rotary import rotation, tables
from mea.compression.calibrate.rope_moments import average_over_positions
from mea.compression.calibrate.statistics import LayerStatistics, ScoreMoments
from mea.compression.methods import METHODS, RENAMED, find_method
from mea.compression.methods.baselines import gram, shared
from mea.compression.methods.factors import Factors, orthonormal, weighted_subspace
from mea.compression.methods.whole_heads import svd

G, D, WIDTH = 3, 8, 20  # kv heads, head dimension, model width
N = G * D
SEPARATE = [name for name, method in METHODS.items() if not (method.coded or method.form.shared)]
ROTATED = [name for name, method in METHODS.items() if not (method.coded or method.form.pre_rope)]


def statistics(theta: Tensor | None = None, count: int = 4096, bias: bool = True) -> LayerStatistics:
    """Of random weights on correlated input, with queries that look at some channels more than at others."""
    theta = torch.tensor([1.0, 0.6, 0.2, 0.001], dtype=torch.float64) if theta is None else theta
    x = torch.randn(500, WIDTH, dtype=torch.float64) @ torch.randn(WIDTH, WIDTH, dtype=torch.float64) / WIDTH**0.5
    if bias:
        x = torch.cat([x, torch.ones(500, 1, dtype=torch.float64)], 1)
    key_weight, value_weight = torch.randn(2, N, x.shape[1], dtype=torch.float64)
    keys, values = x @ key_weight.T, x @ value_weight.T
    queries = torch.randn(G, 400, D, dtype=torch.float64) * torch.rand(G, 1, D, dtype=torch.float64)
    output = torch.randn(G, WIDTH, D, dtype=torch.float64)
    cos, sin = tables(torch.arange(count), theta)
    return LayerStatistics(
        keys.T @ keys / 500, queries.transpose(1, 2) @ queries / 400, values.T @ values / 500, cos, sin,
        key_weight.float(), value_weight.float(), keys.T @ values / 500, output.mT @ output,
        ScoreMoments(keys.T @ keys / 500, torch.zeros(N, N, dtype=torch.float64), queries.mT @ queries / 400),
    )  # fmt: skip


@pytest.mark.parametrize("name", SEPARATE)
def test_full_rank_is_exact(name: str) -> None:
    method, given = METHODS[name], statistics()
    factors = [method.keys(given, N)] + ([method.values(given, N)] if method.values else [])
    for each in factors:
        torch.testing.assert_close(each.projection, torch.eye(N, dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in SEPARATE if name != "gauge"])  # which keeps its form instead
def test_ranks_are_as_asked_and_decoders_orthonormal(name: str) -> None:
    method = METHODS[name]
    width = 2 * D if method.whole_heads else 10
    factors = method.keys(statistics(), width)
    assert factors.encoder.shape == (width, N)
    torch.testing.assert_close(
        factors.decoder.T @ factors.decoder, torch.eye(width, dtype=torch.float64), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("which", ["keys", "values"])
def test_svd_is_the_papers_truncated_svd(which: str, heads: int, bias: bool) -> None:
    """Against arXiv 2601.19611, section on virtual heads, done by NumPy on ``[d * D, h_kv]`` as written there."""
    given = statistics(bias=bias)
    weight = (given.key_weight if which == "keys" else given.value_weight).double().numpy()  # [h_kv * d, D (+ 1)]
    columns = weight.reshape(G, -1).T  # a column per head
    left, singular, right = np.linalg.svd(columns, full_matrices=False)
    components, w_lc = left[:, :heads], singular[:heads, None] * right[:heads]
    expected = (components @ w_lc).T.reshape(N, -1)

    factors = getattr(svd, which)(given, heads * D)
    rebuilt = factors.projection.numpy() @ weight
    np.testing.assert_allclose(rebuilt, expected, rtol=0, atol=1e-12 * singular[0])
    discarded = np.sqrt((singular[heads:] ** 2).sum())
    assert np.linalg.norm(weight - rebuilt) == pytest.approx(discarded, rel=1e-9)
    # The component heads themselves are the paper's up to a factor each, which W_lc takes up.
    own = (factors.encoder.numpy() @ weight).reshape(heads, -1)
    cosines = np.abs((own * components.T).sum(1)) / np.linalg.norm(own, axis=1)
    np.testing.assert_allclose(cosines, 1, rtol=0, atol=1e-9)


def error(factors: Factors, moment: Tensor) -> float:
    """``E sum_g |x_g - x̂_g|^2``."""
    residual = torch.eye(N, dtype=torch.float64) - factors.projection
    return torch.trace(residual @ moment @ residual.T).item()


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("which", ["keys", "values"])
def test_gram_loses_least_of_all_scalar_mixings(which: str, heads: int) -> None:
    given = statistics()
    moment = getattr(given, which)
    best = error(getattr(gram, which)(given, heads * D), moment)
    for _ in range(100):
        mixing = torch.linalg.qr(torch.randn(G, heads, dtype=torch.float64)).Q.T
        encoder = torch.kron(mixing, torch.eye(D, dtype=torch.float64))
        assert error(Factors(encoder, encoder.T), moment) >= best
    assert best < error(getattr(svd, which)(given, heads * D), moment)


def test_frequency_factors_commute_with_rotation() -> None:
    given = statistics()
    projection = METHODS["post_rope:frequency"].keys(given, 10).projection
    keys = torch.randn(N, 30, dtype=torch.float64)
    for cos, sin in zip(given.cos[::500], given.sin[::500], strict=True):
        turn = rotation(cos, sin, G)
        torch.testing.assert_close(projection @ (turn @ keys), turn @ (projection @ keys), rtol=0, atol=1e-11)


def test_position_factors_do_not_commute_where_frequencies_are_slow() -> None:
    """Else the test above would show nothing."""
    given = statistics()
    projection = METHODS["post_rope:uniform"].keys(given, 10).projection
    turn = rotation(given.cos[1000], given.sin[1000], G)
    assert (projection @ turn - turn @ projection).abs().max() > 1e-3


def test_position_is_frequency_where_all_frequencies_are_fast() -> None:
    fast = torch.tensor([1.0, 0.8, 0.55, 0.3], dtype=torch.float64)
    gaps = []
    for count in (1000, 100_000):
        given = statistics(fast, count)
        gap = (
            METHODS["post_rope:uniform"].keys(given, 10).projection
            - METHODS["post_rope:frequency"].keys(given, 10).projection
        )
        gaps.append(gap.abs().max().item())
        torch.manual_seed(0)
    assert gaps[1] < 1e-3
    assert all(later < earlier / 10 for earlier, later in pairwise(gaps))


def weighted_error_at(factors: Factors, given: LayerStatistics, positions: range) -> float:
    """Error of rotated keys under rotated queries, each averaged over the positions."""
    keys = torch.zeros(N, N, dtype=torch.float64)
    metric = torch.zeros(N, N, dtype=torch.float64)
    for p in positions:
        turn = rotation(given.cos[p], given.sin[p], G)
        keys += turn @ given.keys @ turn.T / len(positions)
        metric += turn @ torch.block_diag(*given.queries) @ turn.T / len(positions)
    residual = torch.eye(N, dtype=torch.float64) - factors.projection
    lost = torch.trace(metric @ residual @ keys @ residual.T).item()
    return lost / torch.trace(metric @ keys).item()


def test_position_holds_at_long_positions_where_pca_of_short_ones_fails() -> None:
    """Slow frequencies have hardly turned within a short window: PCA there takes their direction for fixed."""
    theta = torch.tensor([0.002, 0.0015, 0.001, 0.0008], dtype=torch.float64)
    given = statistics(theta, 8192)
    # Keys that all point one way before rotation, as biased keys of slow frequencies do.
    mean = torch.randn(N, 4, dtype=torch.float64)
    given = LayerStatistics(**{**vars(given), "keys": mean @ mean.T + 0.01 * torch.eye(N)})
    short, long = range(0, 128, 8), range(4096, 8192, 32)
    moments = [torch.zeros(N, N, dtype=torch.float64), torch.zeros(N, N, dtype=torch.float64)]
    for p in short:
        turn = rotation(given.cos[p], given.sin[p], G)
        moments[0] += turn @ given.keys @ turn.T
        moments[1] += turn @ torch.block_diag(*given.queries) @ turn.T
    metric = torch.stack([moments[1][g * D : (g + 1) * D, g * D : (g + 1) * D] for g in range(G)])
    pca = orthonormal(*weighted_subspace(moments[0], metric, 12))
    ours = METHODS["post_rope:uniform"].keys(given, 12)

    assert weighted_error_at(pca, given, short) < 0.05
    assert weighted_error_at(pca, given, long) > 10 * weighted_error_at(pca, given, short)
    assert weighted_error_at(ours, given, long) < 0.5 * weighted_error_at(pca, given, long)
    assert weighted_error_at(ours, given, long) < 1.5 * weighted_error_at(ours, given, short)


def test_uniform_weights_lose_least_over_all_positions() -> None:
    given = statistics(count=200)
    everywhere = range(200)
    losses = {name: weighted_error_at(METHODS[name].keys(given, 16), given, everywhere) for name in ROTATED}
    for name in [name for name in ROTATED if METHODS[name].needs_scores]:  # all scores count alike here
        assert losses.pop(name) == pytest.approx(losses["post_rope:uniform"], rel=1e-12)
    assert min(losses, key=losses.__getitem__) == "post_rope:uniform"
    assert losses["post_rope:frequency"] < losses["gram"]
    best = METHODS["post_rope:uniform"].keys(given, 16)
    for _ in range(30):
        near = Factors(best.encoder + 0.01 * torch.randn_like(best.encoder), best.decoder)
        assert weighted_error_at(near, given, everywhere) > losses["post_rope:uniform"]


def turned_error(residual: Tensor, given: LayerStatistics) -> float:
    """Error of unrotated keys that queries meet turned by every distance, summed one by one."""
    lost = 0.0
    for cos, sin in zip(given.cos, given.sin, strict=True):
        turn = rotation(cos, sin, G)
        metric = turn @ torch.block_diag(*given.queries) @ turn.T
        lost += torch.trace(metric @ residual @ given.keys @ residual.T).item() / len(given.cos)
    return lost


def test_latent_is_the_best_approximation_of_keys_before_rotation() -> None:
    """Eckart and Young on ``[metric^½ W L]``, with the metric's root and the moment's by other means than ours."""
    given = statistics(count=60)
    metric = torch.zeros(N, N, dtype=torch.float64)
    for cos, sin in zip(given.cos, given.sin, strict=True):
        turn = rotation(cos, sin, G)
        metric += turn @ torch.block_diag(*given.queries) @ turn.T / len(given.cos)
    scores = torch.linalg.cholesky(metric).T @ torch.linalg.cholesky(given.keys + 1e-12 * torch.eye(N))
    singular = torch.linalg.svdvals(scores)
    for width in (4, 10, 17):
        factors = METHODS["pre_rope"].keys(given, width)
        found = turned_error(torch.eye(N, dtype=torch.float64) - factors.projection, given)
        assert found == pytest.approx(singular[width:].square().sum().item(), rel=1e-6, abs=1e-9)


def test_unrotated_keys_lose_less_than_rotated_ones() -> None:
    """Of the same width and over all positions: pooling of all frequencies is allowed only before rotation."""
    given = statistics(count=200)
    energy = turned_error(torch.eye(N, dtype=torch.float64), given)
    for width in (8, 16):
        residual = torch.eye(N, dtype=torch.float64) - METHODS["pre_rope"].keys(given, width).projection
        rotated = weighted_error_at(METHODS["post_rope:uniform"].keys(given, width), given, range(200))
        assert turned_error(residual, given) / energy < 0.8 * rotated


def joint_error(factors: Factors, given: LayerStatistics, balance: float) -> float:
    """What `shared` says that it minimises."""
    residual = torch.eye(2 * N, dtype=torch.float64) - factors.projection
    moment = torch.cat([torch.cat([given.keys, given.cross], 1), torch.cat([given.cross.T, given.values], 1)])
    left = residual @ moment @ residual.T
    metric = average_over_positions(given.queries, given.cos, given.sin)
    total = 0.0
    for weight, part, true, factor in (
        (metric, left[:N, :N], given.keys, balance), (given.output, left[N:, N:], given.values, 1.0)
    ):  # fmt: skip
        weight = torch.block_diag(*weight)
        total += factor * (torch.trace(weight @ part) / torch.trace(weight @ true)).item()
    return total


@pytest.mark.parametrize("balance", shared.BALANCES)
def test_joint_factors_are_a_minimum_and_better_than_separate_ones(balance: float) -> None:
    """Of equal bytes; and no small change of the factors loses less."""
    given = statistics(count=60)
    both = shared.keys(given, 16, balance)
    best = joint_error(both, given, balance)
    for _ in range(30):
        near = Factors(both.encoder + 0.01 * torch.randn_like(both.encoder), both.decoder)
        assert joint_error(near, given, balance) > best
    for width in (4, 8, 12):
        keys = METHODS["pre_rope"].keys(given, width)
        values = orthonormal(*weighted_subspace(given.values, given.output, 16 - width))
        apart = Factors(*(torch.block_diag(a, b) for a, b in zip(keys, values, strict=True)))
        assert joint_error(apart, given, balance) > best


def test_a_joint_latent_as_wide_as_the_input_loses_nothing() -> None:
    """Keys and values of all heads are linear in the input and its constant, here 21 numbers of 48."""
    given = statistics()
    both = shared.keys(given, WIDTH + 1)
    assert joint_error(both, given, 1.0) < 1e-9
    assert joint_error(shared.keys(given, WIDTH - 2), given, 1.0) > 1e-6
    keys, values = shared.split(both)
    torch.testing.assert_close(torch.cat([keys.decoder, values.decoder]), both.decoder)
    torch.testing.assert_close(torch.cat([keys.encoder, values.encoder], 1), both.encoder)


def test_methods_are_found_by_name() -> None:
    assert find_method("gram", 4) is METHODS["gram"]
    known = "the methods are predictive, joint, svd, .*, post_rope, .*, gram"
    with pytest.raises(ValueError, match=f"{known}, not 'garm'; did you mean 'gram'"):
        find_method("garm", 4)
    with pytest.raises(ValueError, match="only one kv head: give predictive or joint"):
        find_method("svd", 1)
    assert find_method("post_rope:mean", 4) is METHODS["post_rope"]
    for name in RENAMED:
        with pytest.raises(ValueError, match=f"the method '{name}' is now p"):
            find_method(name, 4)
