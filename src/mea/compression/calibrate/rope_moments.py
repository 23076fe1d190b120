"""Second moments of vectors under rotary embedding, averaged over positions.

With the complex view ``z_f = x_f + i x_{f+d/2}``, position ``s`` multiplies ``z_f`` by ``w_f(s) = cos + i sin``. A
real second moment is the pair ``E[z z^H]``, ``E[z z^T]``; RoPE multiplies their entries ``(f, f')`` by
``w_f conj(w_f')`` and ``w_f w_f'``, so averaging over positions multiplies by the averages of these factors.
"""

import torch
from jaxtyping import Complex, Float
from torch import Tensor


def average_over_positions(
    moment: Float[Tensor, "*g n n"], cos: Float[Tensor, "p d"], sin: Float[Tensor, "p d"]
) -> Float[Tensor, "*g n n"]:
    """Average ``E[(R_s x)(R_s x)^T]`` over the positions whose `cos` and `sin` are given.

    `moment` is the second moment of stacked heads (``n`` is a multiple of ``d``) in half-split layout. A scale in `cos`
    and `sin` stays in the result.
    """
    d = cos.shape[-1]
    phase = torch.complex(cos[:, : d // 2].double(), sin[:, : d // 2].double())
    hermitian, symmetric = phase.T @ phase.conj() / len(phase), phase.T @ phase / len(phase)
    return _scale(moment, hermitian, symmetric)


def average_over_phases(moment: Float[Tensor, "*g n n"], head_dim: int) -> Float[Tensor, "*g n n"]:
    """Average over independent uniform phases of the frequencies: the limit of infinitely many positions."""
    same = torch.eye(head_dim // 2, dtype=torch.complex128, device=moment.device)
    return _scale(moment, same, torch.zeros_like(same))


def _scale(
    moment: Float[Tensor, "*g n n"], hermitian: Complex[Tensor, "f f"], symmetric: Complex[Tensor, "f f"]
) -> Float[Tensor, "*g n n"]:
    f = len(hermitian)
    heads = moment.shape[-1] // (2 * f)
    parts = moment.double().unflatten(-1, (heads, 2, f)).unflatten(-4, (heads, 2, f))  # ... a re/im f, b re/im f
    rr, ri, ir, ii = (parts[..., :, a, :, :, b, :] for a in (0, 1) for b in (0, 1))  # each ... a f b f
    outer = torch.complex(rr + ii, ir - ri) * hermitian[:, None, :]  # E[z z^H]
    inner = torch.complex(rr - ii, ir + ri) * symmetric[:, None, :]  # E[z z^T]
    rr, ii = (outer.real + inner.real) / 2, (outer.real - inner.real) / 2
    ir, ri = (inner.imag + outer.imag) / 2, (inner.imag - outer.imag) / 2
    rows = [torch.stack(row, dim=-2) for row in ((rr, ri), (ir, ii))]  # ... a f b re/im f
    return torch.stack(rows, dim=-5).reshape(moment.shape)
