"""Rotary position embedding (RoPE, arXiv 2104.09864): the only one in the package, and the complex view of it.

Half-split layout, as in Llama checkpoints: of a head's ``d`` channels the first ``2 f`` rotate, and channel ``j < f``
is paired with channel ``j + f``. Read as a complex number ``x_j + i x_{j+f}``, a pair is multiplied by
``exp(i theta_j t)`` at position ``t``. The angle depends on the frequency and the position and never on the head, so
every linear map *over heads* that is complex-linear and chosen per frequency commutes with the rotation. Channels that
do not rotate (partial RoPE, or none) are pairs of frequency zero: they commute with anything.

Dimensions: ``b`` batch, ``t`` tokens, ``h`` heads, ``d`` head dimension, ``f`` rotary frequencies, ``p`` = d / 2 pairs.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class RopeConfig:
    """How the frequencies of a rotary embedding are chosen.

    Attributes
    ----------
    theta
        Base of the geometric series of frequencies.
    scaling
        ``"default"``; ``"linear"``: every frequency divided by `factor` (arXiv 2306.15595); ``"llama3"``: only the slow
        ones divided, with a smooth passage between, as in Llama 3.1.
    fraction
        The part of a head's channels that rotates, in (0, 1] (partial RoPE).
    factor, low_freq_factor, high_freq_factor, original_max_position
        Parameters of the scaling; the last three are read for ``"llama3"`` only.
    """

    theta: float = 10_000.0
    scaling: Literal["default", "linear", "llama3"] = "default"
    fraction: float = 1.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192

    def __post_init__(self) -> None:
        if self.scaling not in ("default", "linear", "llama3"):
            raise ValueError(f"RoPE scaling is 'default', 'linear' or 'llama3', not {self.scaling!r}")
        if not 0.0 < self.fraction <= 1.0:
            raise ValueError(f"the rotating fraction of a head's channels lies in (0, 1], not {self.fraction}")
        if self.theta <= 1.0 or self.factor <= 0.0:
            raise ValueError(f"RoPE needs theta > 1 and factor > 0, not theta={self.theta} and factor={self.factor}")
        if self.scaling == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise ValueError("llama3 scaling needs low_freq_factor < high_freq_factor")

    def rotary_dim(self, head_dim: int) -> int:
        """Number of rotating channels ``2 f`` of a head of `head_dim` channels."""
        dim = int(head_dim * self.fraction)
        if dim % 2 or dim == 0:
            raise ValueError(f"an even number of channels must rotate; {self.fraction} of {head_dim} gives {dim}")
        return dim


class Rotary(NamedTuple):
    """Cosine and sine of every angle: what a decoder computes once and hands to all of its layers."""

    cos: Float[Tensor, "#b t f"]
    sin: Float[Tensor, "#b t f"]


def frequencies(head_dim: int, config: RopeConfig, device: torch.device | str | None = None) -> Float[Tensor, " f"]:
    """Angular frequencies in radians per token, fast to slow, always fp32: bf16 ones are wrong after 256 tokens."""
    dim = config.rotary_dim(head_dim)
    exponent = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
    theta = config.theta**-exponent
    if config.scaling == "linear":
        return theta / config.factor
    if config.scaling == "llama3":
        # `turns` of the circle that a frequency makes within the original context: few turns, slow, divided by factor.
        turns = config.original_max_position * theta / (2 * math.pi)
        keep = (turns - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)
        keep = keep.clamp(0.0, 1.0)
        return theta * (keep + (1.0 - keep) / config.factor)
    return theta


def rotary(positions: Int[Tensor, "#b t"], theta: Float[Tensor, " f"]) -> Rotary:
    """Cosines and sines of ``theta_f * t``, in the precision of `theta` (at least fp32)."""
    angle = positions[..., None].to(theta.dtype) * theta
    return Rotary(angle.cos(), angle.sin())


def rotate(x: Float[Tensor, "b t h d"], turn: Rotary) -> Float[Tensor, "b t h d"]:
    """Rotate the channel pairs of `x` by the angles of `turn`; channels beyond ``2 f`` pass through.

    Computed in the wider of the two precisions and returned in that of `x`.
    """
    cos, sin = turn.cos[:, :, None, :], turn.sin[:, :, None, :]
    f = cos.shape[-1]
    re, im, rest = x[..., :f], x[..., f : 2 * f], x[..., 2 * f :]
    return torch.cat([(re * cos - im * sin).to(x.dtype), (im * cos + re * sin).to(x.dtype), rest], dim=-1)


def split_pairs(
    x: Float[Tensor, "*lead d"], rotary_dim: int | None = None
) -> tuple[Float[Tensor, "*lead p"], Float[Tensor, "*lead p"]]:
    """Split channels into the first and the second of every pair: first the ``f`` rotating pairs, then those at rest.

    Parameters
    ----------
    x
        Channels in the half-split layout, last axis ``d`` even.
    rotary_dim
        ``2 f``, the number of leading channels that rotate; all of them if None. The rest is paired by halves likewise.
    """
    d = x.shape[-1]
    moving = d if rotary_dim is None else rotary_dim
    if d % 2 or moving % 2 or not 0 <= moving <= d:
        raise ValueError(f"head dimension and rotary_dim must be even, rotary_dim <= d; got d={d}, rotary_dim={moving}")
    f, middle = moving // 2, (d + moving) // 2
    first = torch.cat([x[..., :f], x[..., moving:middle]], dim=-1)
    second = torch.cat([x[..., f:moving], x[..., middle:]], dim=-1)
    return first, second


def join_pairs(
    first: Float[Tensor, "*lead p"], second: Float[Tensor, "*lead p"], rotary_dim: int | None = None
) -> Float[Tensor, "*lead d"]:
    """Undo `split_pairs`."""
    f = first.shape[-1] if rotary_dim is None else rotary_dim // 2
    return torch.cat([first[..., :f], second[..., :f], first[..., f:], second[..., f:]], dim=-1)


def to_complex(x: Float[Tensor, "*lead d"], rotary_dim: int | None = None) -> Complex[Tensor, "*lead p"]:
    """View channel pairs (`split_pairs`) as complex numbers: rotation multiplies the first ``f`` by exp(i theta_f t).

    `x` is fp32 or fp64; there is no complex bf16.
    """
    return torch.complex(*split_pairs(x, rotary_dim))


def from_complex(z: Complex[Tensor, "*lead p"], rotary_dim: int | None = None) -> Float[Tensor, "*lead d"]:
    """Undo `to_complex`."""
    return join_pairs(z.real, z.imag, rotary_dim)
