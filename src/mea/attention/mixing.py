"""Learnable linear combinations of heads (HLC, arXiv 2601.19611) or channels, and the norm that follows attention.

A mixing turns ``h_c`` component heads into ``h_kv`` heads. Because it is linear over heads, the same matrix can be
applied to activations, folded into the projection before it, or, during decoding, applied to the queries and the
output. Each has a method, and the three agree up to rounding.
"""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mea.names import did_you_mean
from mea.ops import reference
from mea.ops.rope import join_pairs, split_pairs

MixingInit = Literal["identity", "identity_noise", "orthogonal", "scaled_random"]
HeadNormGain = Literal["off", "no_gain", "shared_gain", "per_head_gain"]
NOISE = 0.02  # standard deviation of "identity_noise", as usual for projections


def check_name(kind: str, name: str, allowed: tuple[str, ...]) -> None:
    """Raise ValueError unless `name` is one of `allowed`."""
    if name not in allowed:
        hint = did_you_mean(name, allowed)
        raise ValueError(f"{kind} must be one of {', '.join(map(repr, allowed))}, not {name!r}{hint}")


def block_copy(components: int, heads: int) -> Float[Tensor, "h_c h_kv"]:
    """The identity if square; fewer components are copied to blocks of neighbouring heads, more are averaged."""
    if components > heads:
        blocks = block_copy(heads, components).mT
        return blocks / blocks.sum(0)
    source = torch.arange(heads) * components // heads
    return F.one_hot(source, components).mT.float()


class HeadMixing(nn.Module):
    """One scalar per pair of heads: ``HLC(W_lc, T)`` of the paper, with its ``W_lc`` as ``weight`` ``[h_c, h_kv]``.

    Parameters
    ----------
    components, heads
        ``h_c`` and ``h_kv``.
    init
        ``"identity"`` (a block copy when components are fewer: training starts from plain grouped attention; means of
        blocks when they are more),
        ``"identity_noise"`` (the same plus normal noise of 0.02), ``"orthogonal"``, or ``"scaled_random"`` (normal, of
        variance ``1 / h_c``, which keeps the variance of a head).
    """

    def __init__(self, components: int, heads: int, init: MixingInit = "identity") -> None:
        super().__init__()
        check_name("init", init, get_args(MixingInit))
        self.components, self.heads, self.init = components, heads, init
        self.weight = nn.Parameter(torch.empty(components, heads))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise as `init` says."""
        if self.init == "orthogonal":
            nn.init.orthogonal_(self.weight)
        elif self.init == "scaled_random":
            nn.init.normal_(self.weight, std=self.components**-0.5)
        else:
            self.weight.copy_(block_copy(self.components, self.heads))
            if self.init == "identity_noise":
                self.weight.add_(torch.randn_like(self.weight), alpha=NOISE)

    def forward(self, x: Float[Tensor, "b t h_c d"]) -> Float[Tensor, "b t h_kv d"]:
        """Mix activations."""
        return reference.hlc(x, self.weight)

    def fold(self, weight: Float[Tensor, "rows_c D"]) -> Float[Tensor, "rows_kv D"]:
        """Mix the rows of the projection that makes the components instead (or its bias, as one column)."""
        return (self.weight.mT @ weight.reshape(self.components, -1)).view(-1, weight.shape[1])

    def absorb(self, q: Float[Tensor, "b t h d"]) -> Float[Tensor, "b t h r"]:
        """Apply the mixing of keys to the queries, whose products with the concatenated components are the scores."""
        grouped = q.unflatten(2, (self.heads, -1))
        return torch.einsum("btgid,cg->btgicd", grouped, self.weight).flatten(-2).flatten(2, 3)

    def unmix(self, out: Float[Tensor, "b t h r"]) -> Float[Tensor, "b t h d"]:
        """Apply the mixing of values to `out`, the weighted sum of the concatenated components."""
        grouped = out.unflatten(3, (self.components, -1)).unflatten(2, (self.heads, -1))
        return torch.einsum("btgicd,cg->btgid", grouped, self.weight).flatten(2, 3)


class FrequencyMixing(nn.Module):
    """One complex number per pair of heads and channel pair, for keys: the most general mixing that commutes with RoPE.

    ``weight`` holds real and imaginary parts, ``[d / 2, h_c, h_kv, 2]``; the arithmetic is real, so that bf16 works.

    Parameters
    ----------
    components, heads, init
        As in `HeadMixing`; ``"orthogonal"`` is unitary here.
    head_dim, rotary_dim
        ``d`` and ``2 f``: channels that do not rotate are pairs too (`mea.ops.rope.split_pairs`).
    """

    def __init__(
        self, components: int, heads: int, head_dim: int, rotary_dim: int, init: MixingInit = "identity"
    ) -> None:
        super().__init__()
        check_name("init", init, get_args(MixingInit))
        self.components, self.heads, self.rotary_dim, self.init = components, heads, rotary_dim, init
        self.weight = nn.Parameter(torch.empty(head_dim // 2, components, heads, 2))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise as `init` says."""
        if self.init == "orthogonal":
            tall = max(self.components, self.heads), min(self.components, self.heads)
            unitary = torch.linalg.qr(torch.randn(self.weight.shape[0], *tall, dtype=torch.complex64)).Q
            unitary = unitary if self.components >= self.heads else unitary.mT
            self.weight.copy_(torch.view_as_real(unitary.contiguous()))
        elif self.init == "scaled_random":
            nn.init.normal_(self.weight, std=(2 * self.components) ** -0.5)
        else:
            self.weight.zero_()
            self.weight[..., 0].copy_(block_copy(self.components, self.heads))
            if self.init == "identity_noise":
                self.weight.add_(torch.randn_like(self.weight), alpha=NOISE)

    def forward(self, x: Float[Tensor, "b t h_c d"]) -> Float[Tensor, "b t h_kv d"]:
        """Mix activations."""
        re, im = split_pairs(x, self.rotary_dim)
        w_re, w_im = self.weight.unbind(-1)
        mix = "btcp,pcg->btgp"
        first = torch.einsum(mix, re, w_re) - torch.einsum(mix, im, w_im)
        second = torch.einsum(mix, im, w_re) + torch.einsum(mix, re, w_im)
        return join_pairs(first, second, self.rotary_dim)

    def fold(self, weight: Float[Tensor, "rows_c D"]) -> Float[Tensor, "rows_kv D"]:
        """Mix the rows of the projection that makes the components instead (or its bias, as one column)."""
        columns = weight.mT.unflatten(1, (self.components, -1))[None]
        return self(columns)[0].flatten(1).mT

    def absorb(self, q: Float[Tensor, "b t h d"]) -> Float[Tensor, "b t h r"]:
        """Carry the mixing over to the queries, by the conjugate: ``Re(conj(q) w c) = Re(conj(conj(w) q) c)``."""
        re, im = split_pairs(q.unflatten(2, (self.heads, -1)), self.rotary_dim)
        w_re, w_im = self.weight.unbind(-1)
        mix = "btgip,pcg->btgicp"
        first = torch.einsum(mix, re, w_re) + torch.einsum(mix, im, w_im)
        second = torch.einsum(mix, im, w_re) - torch.einsum(mix, re, w_im)
        return join_pairs(first, second, self.rotary_dim).flatten(-2).flatten(2, 3)


class FeatureMixing(nn.Module):
    """One matrix that mixes the channels of a head, the same for all heads: ``T`` of knocking heads (arXiv 2510.23052).

    ``weight`` is ``[d, d]``, input × output, and starts as the identity.
    """

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(head_dim, head_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start as the identity."""
        nn.init.eye_(self.weight)

    def forward(self, x: Float[Tensor, "b t h d"]) -> Float[Tensor, "b t h d"]:
        """Mix activations."""
        return reference.knock(x, self.weight)

    def fold(self, weight: Float[Tensor, "rows D"]) -> Float[Tensor, "rows D"]:
        """Mix the rows of the projection before it instead (or its bias, as one column)."""
        return (self.weight.mT @ weight.unflatten(0, (-1, len(self.weight)))).flatten(0, 1)


def fold_projection(state: dict[str, Tensor], name: str, mixing: HeadMixing | FrequencyMixing | FeatureMixing) -> None:
    """Fold `mixing` into weight and bias of the projection `name` of a state dict, in place."""
    state[f"{name}.weight"] = mixing.fold(state[f"{name}.weight"])
    if f"{name}.bias" in state:
        state[f"{name}.bias"] = mixing.fold(state[f"{name}.bias"][:, None])[:, 0]


class HeadNorm(nn.Module):
    """RMSNorm over the channels of each head, statistics in fp32 (or wider): the paper's GroupNorm.

    Parameters
    ----------
    num_heads, channels
        Number of heads after attention, and of channels per head.
    gain
        ``"no_gain"``, ``"shared_gain"`` (one for all heads, as in Differential Transformer) or ``"per_head_gain"``.
    init
        Initial gain.
    """

    def __init__(
        self, num_heads: int, channels: int, gain: HeadNormGain = "shared_gain", eps: float = 1e-5, init: float = 1.0
    ) -> None:
        super().__init__()
        shapes = {"no_gain": None, "shared_gain": (channels,), "per_head_gain": (num_heads, channels)}
        check_name("gain", gain, tuple(shapes))
        self.channels, self.gain, self.eps, shape = channels, gain, eps, shapes[gain]
        self.init = init
        self.weight = None if shape is None else nn.Parameter(torch.full(shape, init))

    def forward(self, x: Float[Tensor, "b t h e"]) -> Float[Tensor, "b t h e"]:
        """Normalise every head of every token."""
        if self.weight is not None and self.weight.dim() == 2:
            return F.rms_norm(x, (self.channels,), None, self.eps) * self.weight.to(x.dtype)
        weight = None if self.weight is None else self.weight.to(x.dtype)
        return F.rms_norm(x, (self.channels,), weight, self.eps)


def make_head_norm(num_heads: int, channels: int, gain: HeadNormGain, eps: float, init: float = 1.0) -> nn.Module:
    """The norm after attention by name; nothing for ``"off"``."""
    check_name("head_norm", gain, get_args(HeadNormGain))
    return nn.Identity() if gain == "off" else HeadNorm(num_heads, channels, gain, eps, init)
