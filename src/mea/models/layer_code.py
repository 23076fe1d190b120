"""The encoders and decoders of one layer's packed cache, for the two readings of `mea.models.coded_attention`.

Dimensions as there: ``r`` components of a token, of which ``r_k`` belong to keys in the predictive form.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mea.ops import triton as gpu
from mea.ops.codes import Groups, code_bytes, from_codes, group_sizes, rounded, to_codes, wide
from mea.ops.latent import rotate


class _Code(nn.Module):
    """What both readings share."""

    exactly = False  # without rounding, in passes without a cache
    groups: Groups
    key_decoder: nn.Parameter
    key_mean: nn.Parameter
    value_decoder: nn.Parameter
    value_mean: nn.Parameter

    def once(self, name: str, make: Callable[[], Any], *parameters: Tensor) -> Any:
        """What depends on these parameters only, made again when they change; not kept under gradients."""
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in parameters):
            return make()
        mark = [(x._version, x.data_ptr(), x.device, x.dtype) for x in parameters]
        kept = self.__dict__.setdefault("_kept", {})
        if name not in kept or kept[name][0] != mark:
            # What is kept may be used where gradients are wanted; leaving inference mode turns them on.
            with torch.inference_mode(False), torch.no_grad():
                kept[name] = mark, make()
        return kept[name][1]

    def __getstate__(self) -> dict[str, Any]:
        """For copies: what is kept is made again there."""
        return {name: value for name, value in self.__dict__.items() if name != "_kept"}

    def reader(self, make: Callable[..., Any]) -> Any:
        """A kernel's reader, a `PackedReader` of `mea.ops`, of these maps; kept until they change."""
        maps = (self.key_decoder, self.key_mean, self.value_decoder, self.value_mean)
        frequency = getattr(self, "frequency", None)
        return self.once("reader", lambda: make(self.groups, *maps, frequency), *maps)

    def unmix(self, averages: Tensor) -> Tensor:
        """Outputs ``[b, h, d]`` of the heads from averages ``[b, h, r]`` of components."""
        decoder, mean = self.value_decoder, self.value_mean
        g = len(mean)
        matrix = self.once("unmix", lambda: wide(decoder).mT.contiguous(), decoder)
        shift = self.once("shift", lambda: wide(mean)[:, None].contiguous(), mean)
        grouped = averages.to(matrix.dtype).unflatten(1, (g, -1))
        return (grouped @ matrix + shift).flatten(1, 2)


class PredictiveCode(_Code):
    """Encoders and decoders of a layer in the predictive form.

    Parameters
    ----------
    num_kv_heads, head_dim
        ``g`` and ``d`` of the original attention.
    tiers
        Numbers of components with 8, 4 and 2 bits: of keys, and of what their prediction of values misses.

    Attributes
    ----------
    frequency : [r_k / 2]
        The rotary frequency of each complex component of keys.
    key_encoder : [r_k / 2, g, 2], key_decoder : [g, r_k / 2, 2]
        Complex, as real and imaginary parts: from the heads' numbers of that frequency to a component, and back.
    value_encoder : [r - r_k, g * d]
        Of the values' residual.
    value_decoder : [g, d, r]
        From all components, those of keys first.
    key_mean, value_mean : [g, d]
        Of keys before RoPE, and of values.
    """

    reading, sections = "predictive", 2

    def __init__(self, num_kv_heads: int, head_dim: int, tiers: list[list[int]]):
        super().__init__()
        self.keys_tiers, self.rest_tiers = (tuple(part) for part in tiers)
        g, d, r_k, rest = num_kv_heads, head_dim, sum(self.keys_tiers), sum(self.rest_tiers)
        self.groups = group_sizes(self.keys_tiers) + group_sizes(self.rest_tiers)
        self.frequency: Tensor
        self.register_buffer("frequency", torch.zeros(r_k // 2, dtype=torch.int32))
        self.key_encoder = nn.Parameter(torch.zeros(r_k // 2, g, 2))
        self.key_decoder = nn.Parameter(torch.zeros(g, r_k // 2, 2))
        self.value_encoder = nn.Parameter(torch.zeros(rest, g * d))
        self.value_decoder = nn.Parameter(torch.zeros(g, d, r_k + rest))
        self.key_mean = nn.Parameter(torch.zeros(g, d))
        self.value_mean = nn.Parameter(torch.zeros(g, d))

    def encode(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and scales ``[b, t, _]`` of keys before RoPE and values ``[b, g, t, d]``."""
        components = self.key_components(keys)
        codes, scales = _to_codes(components, self.keys_tiers)
        seen = from_codes(codes, scales, self.keys_tiers)
        more, other = _to_codes(self.rest_components(values, seen), self.rest_tiers)
        return torch.cat([codes, more], -1), torch.cat([scales, other], -1)

    def rounded(self, keys: Tensor, values: Tensor) -> Tensor:
        """The components ``[b, t, r]`` as they are read; gradients pass through the rounding."""
        if self.exactly:
            seen = self.key_components(keys)
            return torch.cat([seen, self.rest_components(values, seen)], -1)
        seen = rounded(self.key_components(keys), self.keys_tiers)
        return torch.cat([seen, rounded(self.rest_components(values, seen), self.rest_tiers)], -1)

    def decode(self, codes: Tensor, scales: Tensor) -> Tensor:
        """The components ``[b, t, r]``."""
        groups = group_sizes(self.keys_tiers)
        at, pairs = sum(code_bytes(*group) for group in groups), 2 * len(groups)
        keys = from_codes(codes[..., :at], scales[..., :pairs], self.keys_tiers)
        return torch.cat([keys, from_codes(codes[..., at:], scales[..., pairs:], self.rest_tiers)], -1)

    def key_components(self, keys: Tensor) -> Tensor:
        """Components of keys before they are rounded."""
        return _flat(keys, self.key_mean) @ self._dense(self.key_encoder.transpose(0, 1), -1).flatten(0, 1)

    def rest_components(self, values: Tensor, seen: Tensor) -> Tensor:
        """Components of the values' residual after prediction from the rounded key components."""
        decoder = wide(self.value_decoder[..., : seen.shape[-1]]).flatten(0, 1)
        predicted = seen.to(decoder.dtype) @ decoder.T
        return (_flat(values, self.value_mean) - predicted) @ wide(self.value_encoder).T

    def rebuild(self, components: Tensor) -> tuple[Tensor, Tensor]:
        """Keys before RoPE and values ``[b, g, t, d]``, in fp32 or fp64."""
        r_k = 2 * len(self.frequency)
        keys = _heads(components[..., :r_k], self._dense(self.key_decoder), self.key_mean)
        return keys, _heads(components, self.value_decoder, self.value_mean)

    def scores(self, queries: Tensor, components: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Products ``[b, h, q, t]`` of rotated queries with the coded keys at positions with these angles.

        The components are rotated; keys are not rebuilt.
        """
        pairs = components[..., : 2 * len(self.frequency)].unflatten(-1, (-1, 2))
        index = self.frequency.long()
        c, s = wide(cos[..., index]), wide(sin[..., index])
        real, imaginary = pairs.unbind(-1)
        turned = torch.stack([real * c - imaginary * s, real * s + imaginary * c], -1).flatten(-2)
        half = cos.shape[-1] // 2
        mean = wide(torch.stack([cos[..., :half], sin[..., :half]], -1)).flatten(-2)
        keys = torch.cat([turned, mean.expand(*turned.shape[:2], -1)], -1)
        absorbed = wide(self.absorb(queries))
        return absorbed @ keys[:, None].mT.to(absorbed.dtype)

    def absorb(self, queries: Tensor) -> Tensor:
        """Queries ``[b, h, q, r_k + d]`` for turned components, followed by the turns themselves."""
        grouped = wide(queries).unflatten(1, (len(self.key_mean), -1))
        matrix = self.once("absorb", self._absorbing, self.key_decoder, self.key_mean)
        return (grouped @ matrix[:, None]).flatten(1, 2)

    def _absorbing(self) -> Tensor:
        """The keys' decoder and mean as real matrices ``[g, d, r_k + d]``: the mean is a component a frequency."""
        half = self.key_mean.shape[1] // 2
        mean = torch.stack(self.key_mean.chunk(2, -1), -1)
        all_frequencies = torch.arange(half, device=mean.device)
        return torch.cat([self._dense(self.key_decoder), self._dense(mean, frequency=all_frequencies)], -1)

    def _dense(self, pairs: Tensor, sign: int = 1, frequency: Tensor | None = None) -> Tensor:
        """Real matrices ``[g, d, r_k]`` of complex numbers ``[g, r_k / 2, 2]``; ``sign`` -1 conjugates them."""
        (g, count, _), half = pairs.shape, self.key_mean.shape[1] // 2
        real, imaginary = wide(pairs).unbind(-1)
        imaginary = sign * imaginary
        block = torch.stack([torch.stack([real, -imaginary], -1), torch.stack([imaginary, real], -1)], 1)  # g a p b
        frequency = self.frequency if frequency is None else frequency
        here = nn.functional.one_hot(frequency.long(), half).T.to(real.dtype)  # f p
        return (block[:, :, None] * here[None, None, :, :, None]).reshape(g, 2 * half, 2 * count)


class JointCode(_Code):
    """Encoder and decoders of a layer in the joint form.

    Parameters
    ----------
    num_kv_heads, head_dim
        ``g`` and ``d`` of the original attention.
    tiers
        One entry: numbers of components with 8, 4 and 2 bits.

    Attributes
    ----------
    encoder : [r, 2 * g * d]
        From keys before RoPE and values, stacked.
    key_decoder, value_decoder : [g, d, r]
        From the components.
    key_mean, value_mean : [g, d]
        Of keys before RoPE, and of values.
    """

    reading, sections = "joint", 1

    def __init__(self, num_kv_heads: int, head_dim: int, tiers: list[list[int]]):
        super().__init__()
        (self.tiers,) = (tuple(part) for part in tiers)
        g, d, r = num_kv_heads, head_dim, sum(self.tiers)
        self.groups = group_sizes(self.tiers)
        self.encoder = nn.Parameter(torch.zeros(r, 2 * g * d))
        self.key_decoder = nn.Parameter(torch.zeros(g, d, r))
        self.value_decoder = nn.Parameter(torch.zeros(g, d, r))
        self.key_mean = nn.Parameter(torch.zeros(g, d))
        self.value_mean = nn.Parameter(torch.zeros(g, d))

    def encode(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and scales ``[b, t, _]`` of keys before RoPE and values ``[b, g, t, d]``."""
        return _to_codes(self.components(keys, values), self.tiers)

    def rounded(self, keys: Tensor, values: Tensor) -> Tensor:
        """The components ``[b, t, r]`` as they are read; gradients pass through the rounding."""
        components = self.components(keys, values)
        return components if self.exactly else rounded(components, self.tiers)

    def decode(self, codes: Tensor, scales: Tensor) -> Tensor:
        """The components ``[b, t, r]``."""
        return from_codes(codes, scales, self.tiers)

    def components(self, keys: Tensor, values: Tensor) -> Tensor:
        """Components before they are rounded."""
        both = torch.cat([_flat(keys, self.key_mean), _flat(values, self.value_mean)], -1)
        return both @ wide(self.encoder).T

    def rebuild(self, components: Tensor) -> tuple[Tensor, Tensor]:
        """Keys before RoPE and values ``[b, g, t, d]``, in fp32 or fp64."""
        keys = _heads(components, self.key_decoder, self.key_mean)
        return keys, _heads(components, self.value_decoder, self.value_mean)

    def scores(self, queries: Tensor, components: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Products ``[b, h, q, t]`` of rotated queries with the coded keys at positions with these angles."""
        keys = rotate(_heads(components, self.key_decoder, self.key_mean), wide(cos), wide(sin))
        (_, g, t, _), (b, h, q, d) = keys.shape, queries.shape
        return (wide(queries).reshape(b, g, h // g * q, d) @ keys.mT).view(b, h, q, t)


CODES: dict[str, Any] = {code.reading: code for code in (PredictiveCode, JointCode)}


def _to_codes(components: Tensor, tiers: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    if gpu is not None and components.dtype == torch.float32 and gpu.usable(components):
        return gpu.to_codes(components, tiers)
    return to_codes(components, tiers)


def _flat(heads: Tensor, mean: Tensor) -> Tensor:
    """``[b, t, g * d]`` in fp32 or fp64, without the mean."""
    return (wide(heads) - wide(mean)[:, None]).transpose(1, 2).flatten(2)


def _heads(components: Tensor, decoder: Tensor, mean: Tensor) -> Tensor:
    """``[b, g, t, d]`` in fp32 or fp64."""
    decoder = wide(decoder)
    return components[:, None].to(decoder.dtype) @ decoder.mT + wide(mean)[:, None]
