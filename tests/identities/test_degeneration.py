"""What the norm does and does not do: the step of a factored projection, and the scale of an averaged value."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mea.ops import reference as ref
from mea.ops.masks import attention_mask

H, D, WIDTH, TOKENS = 3, 4, 10, 9


def product(mixing: torch.Tensor, components: torch.Tensor) -> torch.Tensor:
    """``W_g = sum_c W_lc[c, g] C_c``: the projection, ``[h, d, D]``, that a mixing and its components amount to."""
    return torch.einsum("cg,cdx->gdx", mixing, components)


@pytest.mark.parametrize("norm", [False, True], ids=["without norm", "with norm"])
@pytest.mark.parametrize("side", ["keys", "values"])
def test_a_factored_step_is_a_preconditioned_step_to_first_order(norm, side, agree):
    """One step of gradient descent on both factors moves the product by ``-lr P(G) + lr² Q`` and nothing else.

    ``P(G)_g = sum_g' (W^T W)_gg' G_g' + sum_c <G_g, C_c> C_c`` preconditions the gradient G of the product, and
    ``Q_g = sum_c <C_c, G_g> sum_g' W_cg' G_g'``: a plain step never has P. The norm changes G alone, so it does not
    keep the factored projection from being one projection: what it changes is what any head norm changes.
    """
    x = torch.randn(1, TOKENS, WIDTH, dtype=torch.float64)
    q, other = torch.randn(2, 1, TOKENS, H, D, dtype=torch.float64)
    target = torch.randn(1, TOKENS, H, D, dtype=torch.float64)
    mixing = torch.randn(H, H, dtype=torch.float64)
    components = torch.randn(H, D, WIDTH, dtype=torch.float64) / WIDTH**0.5

    def loss(mixing: torch.Tensor, components: torch.Tensor) -> torch.Tensor:
        heads = ref.hlc(torch.einsum("btx,cdx->btcd", x, components), mixing)
        k, v = (heads, other) if side == "keys" else (other, heads)
        out = ref.attend(q, k, v, attention_mask(TOKENS))
        return ((ref.head_norm(out) if norm else out) - target).square().mean()

    g_mixing, g_components = torch.func.grad(loss, argnums=(0, 1))(mixing, components)
    eye = torch.eye(H, dtype=torch.float64)
    g = torch.func.grad(loss, argnums=1)(eye, product(mixing, components))
    overlap = torch.einsum("gdx,cdx->gc", g, components)
    preconditioned = product(mixing.mT @ mixing, g) + torch.einsum("gc,cdx->gdx", overlap, components)
    second = torch.einsum("gc,ce,edx->gdx", overlap, mixing, g)

    for lr in (1.0, 1e-1, 1e-2):
        moved = product(mixing - lr * g_mixing, components - lr * g_components) - product(mixing, components)
        agree(moved, -lr * preconditioned + lr**2 * second, terms=4 * (TOKENS + WIDTH + D) * H)
    assert not torch.allclose(preconditioned, g, rtol=0.1), "the preconditioner is not the identity"


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 48), variance=st.floats(1e-2, 1e2), seed=st.integers(0, 2**16))
def test_averaging_shrinks_a_head_and_the_norm_undoes_it(n, variance, seed, agree):
    """Uniform attention over n uncorrelated values: RMS sqrt(variance / n); normed, 1 / sqrt(1 + n eps / variance).

    The norm restores the scale as long as n eps is small against the variance, and fades out beyond. Uncorrelated is
    made exact: the values are orthogonal, and of mean square `variance`.
    """
    d, eps = 48, 1e-5
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
    v = (basis[:n] * (variance * d) ** 0.5)[None, :, None]
    q, k = torch.zeros(1, 1, 1, d, dtype=torch.float64), torch.randn(1, n, 1, d, dtype=torch.float64)

    def rms(x: torch.Tensor) -> torch.Tensor:
        return x.square().mean(dim=-1).sqrt().squeeze()

    out = ref.attend(q, k, v)
    scale = torch.tensor(variance, dtype=torch.float64)
    agree(rms(out), (scale / n).sqrt(), terms=4 * d * d)
    agree(rms(ref.head_norm(out, eps=eps)), (1 + n * eps / scale).rsqrt(), terms=4 * d * d)


def test_the_norm_does_not_stop_the_fold(agree):
    """Square MEA with its norm is a function of the products alone: two factorisations of one product are one model."""
    x = torch.randn(1, TOKENS, WIDTH, dtype=torch.float64)
    q, v = torch.randn(2, 1, TOKENS, H, D, dtype=torch.float64)
    components = torch.randn(H, D, WIDTH, dtype=torch.float64)
    mixing, change = torch.randn(2, H, H, dtype=torch.float64)
    eye = torch.eye(H, dtype=torch.float64)

    def mea(mixing: torch.Tensor, components: torch.Tensor) -> torch.Tensor:
        return ref.mea(q, torch.einsum("btx,cdx->btcd", x, components), v, mixing, eye, mask=attention_mask(TOKENS))

    # Solving with `change` loses as many digits as its condition number has.
    refactored = mea(torch.linalg.solve(change, mixing), product(change, components))
    condition = int(torch.linalg.cond(change).ceil())
    agree(refactored, mea(mixing, components), terms=condition * 4 * (TOKENS + WIDTH + D) * H)
