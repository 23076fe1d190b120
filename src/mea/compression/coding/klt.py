"""The Karhunen-Loeve transform in a metric: components whose errors add up, sorted by what losing each one costs."""

from typing import NamedTuple

import torch
from torch import Tensor

FLOOR = 1e-6  # the metric's eigenvalues are at least this part of their mean: no direction is free
# Of the largest loss: rarer components are not enlarged to unit variance, as a text that uses them would fill a range.
RARE = 1e-6


class Transform(NamedTuple):
    """Encoder to components, decoder back, and the loss without each component, sorted.

    Components have unit variance, or less where their loss is below `RARE`. With a metric ``E[g g^T]`` of gradients the
    loss is in nats per token: half of the component's variance there.
    """

    encoder: Tensor  # [r, n]
    decoder: Tensor  # [n, r]
    losses: Tensor  # [r]


def transform(covariance: Tensor, metric: Tensor) -> Transform:
    """The transform for this covariance, real or complex (Hermitian), in this metric; both ``[*, n, n]``, fp64.

    Complex components have real and imaginary parts of unit variance, and the loss is that of each part.
    """
    values, vectors = torch.linalg.eigh(metric)
    mean = values.mean(-1, keepdim=True).clamp_min(0)
    values = torch.where(mean > 0, values / mean, 1).clamp_min(FLOOR).sqrt()
    root = vectors * values[..., None, :] @ vectors.mH
    inverse = vectors / values[..., None, :] @ vectors.mH
    energies, basis = torch.linalg.eigh(root @ covariance @ root)
    energies, basis = energies.flip(-1).clamp_min(0), basis.flip(-1)
    if covariance.is_complex():
        energies = energies / 2
    largest = energies[..., :1]
    size = torch.where(largest > 0, torch.maximum(energies, RARE * largest), 1).sqrt()
    return Transform(basis.mH @ root / size[..., None], inverse @ basis * size[..., None, :], mean * energies / 2)
