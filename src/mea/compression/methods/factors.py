"""Low-rank factors of one layer's keys or values, and the linear algebra that all methods share."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from mea.ops.cache_forms import FORMS, PostRope


class Factors(NamedTuple):
    """``x ≈ decoder @ encoder @ x`` for the stacked heads ``x`` of one token: keys, or values.

    Attributes
    ----------
    encoder
        ``[r, n]``, with ``n = h_kv * d``.
    decoder
        ``[n, r]``, with orthonormal columns: latents have the norm of the approximated vectors, which suits low
        precision.
    """

    encoder: Float[Tensor, "r n"]
    decoder: Float[Tensor, "n r"]

    @property
    def projection(self) -> Float[Tensor, "n n"]:
        """``decoder @ encoder``."""
        return self.decoder @ self.encoder


class Moments(NamedTuple):
    """Arguments of `weighted_subspace`: the second moment of keys, and a metric of their errors per head."""

    keys: Float[Tensor, "n n"]
    metric: Float[Tensor, "g d d"]


class LayerFactors(NamedTuple):
    """One layer's factors; `output` replaces ``W_O`` where it was fitted with them.

    With a shared latent, the outputs of both encoders are added, and both decoders read the sum
    (`mea.ops.cache_forms`). With `groups`, encoders and decoders are block-diagonal with one block per group.
    """

    keys: Factors
    values: Factors
    output: Float[Tensor, "D h*d"] | None = None
    form: PostRope = FORMS["post_rope"]
    groups: int = 1


def orthonormal(encoder: Float[Tensor, "r n"], decoder: Float[Tensor, "n r"]) -> Factors:
    """The same product, with orthonormal columns in the decoder."""
    q, r = torch.linalg.qr(decoder)
    return Factors(r @ encoder, q)


def weighted_subspace(
    moment: Float[Tensor, "n n"], metric: Float[Tensor, "g d d"], rank: int
) -> tuple[Float[Tensor, "r n"], Float[Tensor, "n r"]]:
    """Best rank-`rank` encoder and decoder of ``x`` with second moment `moment` under a metric per head.

    Minimises ``E sum_g (x - x̂)_g^T metric_g (x - x̂)_g``: the top eigenvectors of the moment between the metric's square
    roots. In fp64; exact at full rank whatever the inputs.
    """
    root, inverse = zip(*(_root(m) for m in metric), strict=True)
    root, inverse = torch.block_diag(*root), torch.block_diag(*inverse)
    _, vectors = torch.linalg.eigh(root @ moment @ root)
    top = vectors.flip(-1)[:, :rank]
    return top.T @ root, inverse @ top


def _root(moment: Float[Tensor, "d d"]) -> tuple[Float[Tensor, "d d"], Float[Tensor, "d d"]]:
    """Square root of a second moment and its inverse; eigenvalues are at least 1e-9 of the largest."""
    values, vectors = torch.linalg.eigh(moment)
    top = values[-1].item()
    values = values.clamp_min(1e-9 * top if top > 0 else 1.0).sqrt()
    return (vectors * values) @ vectors.T, (vectors / values) @ vectors.T


def from_head_mixing(mixing: Float[Tensor, "h_c h_kv"], head_dim: int) -> Factors:
    """Factors of a scalar HLC with orthonormal rows: component heads ``c_j = sum_g mixing_jg x_g``."""
    encoder = torch.kron(mixing.double(), torch.eye(head_dim, dtype=torch.float64, device=mixing.device))
    return Factors(encoder, encoder.T)
