"""Fit the codes of all layers to a budget: bits by one threshold, then encoders and decoders."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from mea.compression.coding.bits import Section, allocate, expected_loss
from mea.compression.coding.klt import Transform, transform
from mea.compression.coding.moments import LayerMoments
from mea.ops.codes import Tiers, rounded

ROUNDS = 3  # of bits and prediction in turns
RIDGE = 1e-4  # of the components' unit variance


@dataclass
class LayerCode:
    """What a layer's module in `mea.models.layer_code` holds.

    Attributes
    ----------
    tiers
        As in ``config.cache_code``; None leaves the layer ordinary.
    tensors
        Parameters and buffers by name.
    loss
        Expected loss of the rounding in nats per token.
    """

    tiers: list[Tiers]
    tensors: dict[str, Tensor] = field(repr=False)
    loss: float = 0.0


@runtime_checkable
class Reading(Protocol):
    """One way of coding a layer: sections of components, and what they become at given tiers."""

    name: str

    def __init__(self, moments: LayerMoments): ...

    def sections(self) -> list[Float[Tensor, " n"]]:
        """Losses without each component, sorted, for each section in turn."""
        ...

    def update(self, tiers: Sequence[Tiers]) -> None:
        """Take into account how the sections will be rounded."""
        ...

    def code(self, tiers: Sequence[Tiers]) -> LayerCode:
        """Encoders and decoders with these tiers."""
        ...


class Joint:
    """Keys and values in one transform."""

    name = "joint"

    def __init__(self, moments: LayerMoments):
        self.moments = moments
        # In units of the keys' and the values' deviation: a model may have either at any scale.
        energy = moments.covariance.diagonal().unflatten(0, (2, -1)).mean(1, keepdim=True)
        unit = torch.where(energy > 0, energy, 1).sqrt().expand(-1, len(moments.mean) // 2).flatten()
        pairs = torch.outer(unit, unit)
        encoder, decoder, losses = transform(moments.covariance / pairs, moments.cost * pairs)
        self.transform = Transform(encoder / unit, unit[:, None] * decoder, losses)

    def sections(self) -> list[Float[Tensor, " n"]]:
        return [self.transform.losses]

    def update(self, tiers: Sequence[Tiers]) -> None:
        """Nothing: one transform suits all bits."""

    def code(self, tiers: Sequence[Tiers]) -> LayerCode:
        r, d, n = sum(tiers[0]), self.moments.head_dim, len(self.moments.mean) // 2
        encoder, decoder = self.transform.encoder[:r], self.transform.decoder[:, :r]
        tensors = {
            "encoder": encoder,
            "key_decoder": decoder[:n].unflatten(0, (-1, d)),
            "value_decoder": decoder[n:].unflatten(0, (-1, d)),
            **_means(self.moments),
        }
        return LayerCode(list(tiers), tensors, expected_loss(Section(self.transform.losses, 1), tiers[0]))


class Predictive:
    """Keys by rotary frequency, values predicted from the rounded key components, and the rest of the values."""

    name = "predictive"

    def __init__(self, moments: LayerMoments):
        self.moments = moments
        d, n = moments.head_dim, len(moments.mean) // 2
        self.value_cost = moments.cost[n:, n:]
        covariance, cost = (per_frequency(m[:n, :n], d) for m in (moments.covariance, moments.cost))
        found = transform(covariance, cost / 2)  # half of the energy, as the phases are uniform
        f, g, _ = covariance.shape
        order = found.losses.flatten().argsort(descending=True)  # of complex components [f, g]
        self.frequency = order // g
        self.encoder = found.encoder.reshape(f * g, g)[order]  # [p, g]
        self.decoder = found.decoder.transpose(1, 2).reshape(f * g, g)[order]  # [p, g]
        self.key_losses = found.losses.flatten()[order].repeat_interleave(2)
        keys, values = (moments.sample.double() - moments.mean).tensor_split(2, 1)
        heads = keys.unflatten(1, (g, 2, -1))  # s g re/im f
        complex_keys = torch.complex(heads[:, :, 0], heads[:, :, 1])  # s g f
        components = torch.einsum("sgp,pg->sp", complex_keys[:, :, self.frequency], self.encoder)
        self.components = torch.view_as_real(components).flatten(1).float()
        self.values = values
        self.prediction, self.rest = self._predict(self.components)

    def sections(self) -> list[Float[Tensor, " n"]]:
        return [self.key_losses, self.rest.losses]

    def update(self, tiers: Sequence[Tiers]) -> None:
        r = sum(tiers[0])
        self.prediction, self.rest = self._predict(rounded(self.components[:, :r], tiers[0]))

    def code(self, tiers: Sequence[Tiers]) -> LayerCode:
        self.update(tiers)
        r, rest, d = sum(tiers[0]), sum(tiers[1]), self.moments.head_dim
        decoder = torch.cat([self.prediction, self.rest.decoder[:, :rest]], 1)
        tensors = {
            "frequency": self.frequency[: r // 2].int(),
            "key_encoder": torch.view_as_real(self.encoder[: r // 2].contiguous()),
            "key_decoder": torch.view_as_real(self.decoder[: r // 2].T.contiguous()),
            "value_encoder": self.rest.encoder[:rest],
            "value_decoder": decoder.unflatten(0, (-1, d)),
            **_means(self.moments),
        }
        losses = zip((self.key_losses, self.rest.losses), tiers, strict=True)
        return LayerCode(list(tiers), tensors, sum(expected_loss(Section(x, 1), tier) for x, tier in losses))

    def _predict(self, seen: Float[Tensor, "s r"]) -> tuple[Float[Tensor, "n r"], Transform]:
        """Least squares of values on the components as they are read, and the transform of what is left."""
        seen, count = seen.double(), len(seen)
        square = seen.T @ seen / count + RIDGE * torch.eye(seen.shape[1], dtype=seen.dtype, device=seen.device)
        prediction = torch.linalg.solve(square, seen.T @ self.values / count).T
        rest = self.values - seen @ prediction.T
        return prediction, transform(rest.T @ rest / count, self.value_cost)


READINGS: dict[str, type[Reading]] = {"predictive": Predictive, "joint": Joint}


def fit_codes(
    readings: Sequence[Reading | None],
    tokens: Sequence[int],
    bits: int,
    advance: Callable[[int, int], None] = lambda _round, _layer: None,
) -> list[LayerCode | None]:
    """Codes of all layers that take at most `bits`, if layer ``i`` codes ``tokens[i]`` tokens.

    A layer without a reading stays ordinary, one without tokens to code gets the most bits. `advance` is called with
    the round, from 1, and the layer that begin.

    Raises
    ------
    ValueError
        The budget leaves no room for codes.
    """
    used = [(reading, max(1, count)) for reading, count in zip(readings, tokens, strict=True) if reading is not None]
    tiers: list[Tiers] = []
    for number in range(1, ROUNDS + 1):
        sections = [Section(losses.cpu(), count) for reading, count in used for losses in reading.sections()]
        tiers = allocate(sections, bits)
        for index, ((reading, _), own) in enumerate(zip(used, _by_layer(used, tiers), strict=True)):
            advance(number, index)
            reading.update(own)
    codes = iter([reading.code(own) for (reading, _), own in zip(used, _by_layer(used, tiers), strict=True)])
    return [None if reading is None else next(codes) for reading in readings]


def full_code(reading: Reading) -> LayerCode:
    """All components, in 8 bits: exact where nothing is rounded."""
    tiers: list[Tiers] = []
    for losses in reading.sections():
        tiers.append((len(losses), 0, 0))
    return reading.code(tiers)


def _by_layer(used: Sequence[tuple[Reading, int]], tiers: list[Tiers]) -> list[list[Tiers]]:
    rest = iter(tiers)
    return [[next(rest) for _ in reading.sections()] for reading, _ in used]


def _means(moments: LayerMoments) -> dict[str, Tensor]:
    key_mean, value_mean = moments.mean.unflatten(0, (2, -1, moments.head_dim))
    return {"key_mean": key_mean, "value_mean": value_mean}


def per_frequency(moment: Float[Tensor, "n n"], head_dim: int) -> Complex[Tensor, "f g g"]:
    """``E[z z^H]`` over heads for every rotary frequency, of a real second moment in half-split layout."""
    f = head_dim // 2
    parts = moment.unflatten(0, (-1, 2, f)).unflatten(-1, (-1, 2, f)).diagonal(dim1=2, dim2=5)  # g a h b f
    real = parts[:, 0, :, 0] + parts[:, 1, :, 1]
    imaginary = parts[:, 1, :, 0] - parts[:, 0, :, 1]
    return torch.complex(real, imaginary).permute(2, 0, 1)
