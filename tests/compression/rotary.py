"""Rotary embedding written out: tables of a model, and the matrix that turns stacked heads."""

import torch
from torch import Tensor


def tables(positions: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines as a Hugging Face rotary embedding gives them: both halves alike."""
    angles = positions[:, None].double() * theta
    return torch.cat([angles.cos(), angles.cos()], -1), torch.cat([angles.sin(), angles.sin()], -1)


def rotation(cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    """The matrix that turns the stacked heads at one position: ``x cos + rotate_half(x) sin``."""
    d = len(cos)
    half = torch.zeros(d, d, dtype=torch.float64)
    half[: d // 2, d // 2 :] = -torch.eye(d // 2)
    half[d // 2 :, : d // 2] = torch.eye(d // 2)
    return torch.block_diag(*[torch.diag(cos) + torch.diag(sin) @ half] * heads)
