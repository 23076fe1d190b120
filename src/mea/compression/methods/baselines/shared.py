"""One latent for keys before RoPE and values together, as in multi-head latent attention (arXiv 2405.04434).

Both are linear in the layer's input, so their common part is cached once. With ``z = [k; v]`` the factors
minimise

    balance * E |k - k̂|^2_Q / E |k|^2_Q  +  E |v - v̂|^2_O / E |v|^2_O,

where the metric of key errors is the second moment of queries (as in `pre_rope`) and the metric of value errors comes
from ``W_O``. The effect of a score error depends on how sharp attention is, so the method tries several balances and
takes the one with the smallest error of the layer's attention output. The encoder is then fixed; the values' decoder
and ``W_O`` are fitted to attention-averaged latents.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from mea.compression.calibrate.rope_moments import average_over_positions
from mea.compression.calibrate.statistics import AveragedValues, LayerStatistics
from mea.compression.methods.base import CalibratedLayer, Method
from mea.compression.methods.factors import Factors, LayerFactors, weighted_subspace
from mea.compression.methods.values import alternate
from mea.ops.cache_forms import FORMS

BALANCES = (0.5, 1.5, 4.0, 12.0, 32.0, 100.0)


def keys(statistics: LayerStatistics, rank: int, balance: float = 1.0) -> Factors:
    """Factors of the stacked ``z`` of keys and values; `rank` is the rank of the shared latent."""
    metric = average_over_positions(statistics.queries, statistics.cos, statistics.sin)
    moment = torch.cat(
        [
            torch.cat([statistics.keys, statistics.cross], dim=1),
            torch.cat([statistics.cross.T, statistics.values], dim=1),
        ]
    )
    key_energy, value_energy = (
        torch.trace(torch.block_diag(*weight) @ part).clamp_min(torch.finfo(torch.float64).tiny)  # zeros have none
        for weight, part in ((metric, statistics.keys), (statistics.output, statistics.values))
    )
    weights = torch.cat([metric * balance / key_energy, statistics.output / value_energy])
    encoder, decoder = weighted_subspace(moment, weights, rank)
    # Not orthonormal in z: values can be much smaller than keys, and rounding the latents would lose them.
    size = torch.linalg.matrix_norm(decoder) / rank**0.5
    return Factors(size * encoder, decoder / size)


def split(factors: Factors) -> tuple[Factors, Factors]:
    """The factors of keys and of values; the outputs of their encoders add up to the shared latent."""
    encoder, decoder = factors
    n = len(decoder) // 2
    return Factors(encoder[:, :n], decoder[:n]), Factors(encoder[:, n:], decoder[n:])


def values(averaged: AveragedValues, factors: Factors, num_kv_heads: int) -> tuple[Factors, Float[Tensor, "D _"]]:
    """The values' part with its decoder, and the output projection, fitted to averaged latents."""
    encoder, decoder = factors
    whole = torch.eye(len(encoder), device=encoder.device)
    start = decoder.view(num_kv_heads, -1, len(encoder))
    _, fitted, output = alternate(averaged, whole, start, fit_encoder=lambda _averaged, kept, _decoder: kept)
    return Factors(encoder, fitted.reshape(decoder.shape)), output


class SharedMethod(Method):
    """Keys and values in one latent; `Method.keys` factorises both stacked, `values` and `averaged` are not used."""

    def fit(self, layer: CalibratedLayer, ranks: tuple[int, int]) -> LayerFactors:
        statistics = layer.statistics
        both = min(
            (keys(statistics, sum(ranks), balance) for balance in BALANCES),
            key=lambda factors: layer.error(LayerFactors(*split(factors), form=self.form)),
        )
        key_factors, value_factors = split(both)
        averaged = layer.average(self, key_factors.decoder, both.encoder)
        value_factors, output = values(averaged, value_factors, statistics.num_kv_heads)
        return LayerFactors(key_factors, value_factors, output, self.form)

    def full_rank(self, statistics: LayerStatistics) -> LayerFactors:
        n = statistics.num_kv_heads * statistics.head_dim
        return LayerFactors(*split(keys(statistics, 2 * n)), form=self.form)


METHODS = (SharedMethod("shared", keys, form=FORMS["joint"]),)
