"""Changes of basis of single heads that leave attention unchanged, and second moments in blocks for them.

A value head may be multiplied by any invertible matrix, undone in ``W_O``. A key head may, at every rotary frequency,
be multiplied by any complex number: it commutes with RoPE and is undone in the queries. Both are *blocks*: a key head
is ``d / 2`` of them, complex and of size 1, one per frequency; a value head is one real block of size ``d``.

Dimensions: ``b`` blocks of a head, ``a`` their size (``b a`` is ``d / 2`` complex or ``d`` real numbers), ``g`` kv
heads.
"""

import torch
from jaxtyping import Float, Num
from torch import Tensor

from mea.compression.calibrate.rope_moments import average_over_phases


def key_blocks(moment: Float[Tensor, "n n"], head_dim: int) -> Num[Tensor, "b g a g a"]:
    """``E[z z^H]`` between heads at every frequency, from the second moment of pre-RoPE keys."""
    g, f = moment.shape[0] // head_dim, head_dim // 2
    parts = average_over_phases(moment, head_dim).view(g, 2, f, g, 2, f).diagonal(dim1=2, dim2=5)  # g re/im g re/im f
    complex_moment = torch.complex(parts[:, 0, :, 0] + parts[:, 1, :, 1], parts[:, 1, :, 0] - parts[:, 0, :, 1])
    return complex_moment.permute(2, 0, 1)[:, :, None, :, None]


def value_blocks(moment: Float[Tensor, "n n"], head_dim: int) -> Num[Tensor, "b g a g a"]:
    """``E[v v^T]`` between heads: a single block."""
    g = moment.shape[0] // head_dim
    return moment.double().view(1, g, head_dim, g, head_dim)


def head_matrices(maps: Num[Tensor, "b g a a"]) -> Float[Tensor, "g d d"]:
    """The real matrix of each head's map: a complex number rotates and scales the two channels of its frequency."""
    if not maps.is_complex():
        return maps[0]
    numbers = maps[:, :, 0, 0].T
    re, im = torch.diag_embed(numbers.real), torch.diag_embed(numbers.imag)
    return torch.cat([torch.cat([re, -im], -1), torch.cat([im, re], -1)], -2)
