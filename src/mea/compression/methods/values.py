"""Latent values with the least error of attention-weighted averages of values after ``W_O``.

Attention reads only averages of values, never a single token's value. With ``u_i = A_i v`` (all kv heads' values under
query head i's attention map) the factors minimise

    E | y - sum_i W_i D_g(i) E u_i |^2,        y = sum_i W_i A_i v_g(i)  from the uncompressed attention,

over the encoder E ``[r, n]``, each kv head's decoder D_g ``[d, r]`` and the output projection ``W_i``, by alternating
least squares: each is linear given the others and is solved, the first two by conjugate gradients, on second moments
alone. Tokens are weighted by the inverse energy of the residual stream that the output is added to: the next norm
divides by it, and without this weight a few tokens with huge activations (attention sinks) would dominate the
objective. Values are not centred, also because of these tokens.

Where a head norm stands between the average and ``W_O`` (MEA), ``y = sum_i W_i n(o_i)`` with ``o_i = A_i v_g(i)`` and
``n(o) = o / rho(o)``, ``rho(o) = sqrt(mean(o^2) + eps)``: this is not linear in the factors. With ``rho`` fixed at its
uncompressed value it is, and the objective is the one above with ``u_i / rho(o_i)`` instead of ``u_i``: every head of
every token is weighted by its inverse RMS, because the norm removes the size of a head's output. The neglected term is
of first order only along ``o_i`` itself: for small eps ``n(o + e) - n(o)`` is
``(I - n n^T / d) e / rho + O(e^2)``: the norm removes an error along ``o_i``, and this objective counts it.

In a model with many heads, moments are kept only within blocks of query heads (`AveragedValues`), and each block has
its own target: the moments of all pairs would not fit into memory.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from mea.compression.calibrate.statistics import AveragedValues, LayerStatistics
from mea.compression.methods.factors import Factors, orthonormal, weighted_subspace

ROUNDS = 2
RIDGE = 1e-2
CG_STEPS = 15


def fit_values(averaged: AveragedValues, num_kv_heads: int, rank: int) -> tuple[Factors, Float[Tensor, "D _"]]:
    """Factors of values, and the output projection fitted to them, from attention-averaged moments.

    The start is the best subspace if products of different query heads are ignored.
    """
    moment, metric = single_heads(averaged, num_kv_heads)
    encoder, decoder = weighted_subspace(moment, metric, rank)
    encoder, decoder, output = alternate(averaged, encoder, decoder.view(num_kv_heads, -1, rank))
    return orthonormal(encoder, decoder.reshape(-1, rank)), output


def single_heads(averaged: AveragedValues, num_kv_heads: int) -> tuple[Float[Tensor, "n n"], Float[Tensor, "g d d"]]:
    """Without products of different query heads: the second moment of values, and the metric of their errors."""
    output = averaged.output_weight
    d = output.shape[-1]
    moment = torch.einsum("cinim->nm", averaged.gram)
    metric = torch.einsum("cioa,cioe->ciae", output, output).view(num_kv_heads, -1, d, d).sum(1)
    return moment.double(), metric.double()


DecoderStep = Callable[[AveragedValues, Float[Tensor, "r n"], Float[Tensor, "g d r"]], Float[Tensor, "g d r"]]
EncoderStep = Callable[[AveragedValues, Float[Tensor, "r n"], Float[Tensor, "g d r"]], Float[Tensor, "r n"]]


def alternate(
    averaged: AveragedValues,
    encoder: Float[Tensor, "r n"],
    decoder: Float[Tensor, "g d r"],
    fit_decoder: DecoderStep | None = None,
    fit_encoder: EncoderStep | None = None,
) -> tuple[Float[Tensor, "r n"], Float[Tensor, "g d r"], Float[Tensor, "D _"]]:
    """Rounds of least squares from a start: decoder, encoder, then the output projection."""
    output = averaged.output_weight
    fit_decoder, fit_encoder = fit_decoder or _fit_decoder, fit_encoder or _fit_encoder
    encoder, decoder = encoder.float(), decoder.float()
    for _ in range(ROUNDS):
        decoder = fit_decoder(averaged, encoder, decoder)
        encoder = fit_encoder(averaged, encoder, decoder)
        averaged = averaged._replace(output_weight=_fit_output(averaged, encoder, decoder, output))
    width = output.shape[2]
    return encoder.double(), decoder.double(), averaged.output_weight.permute(2, 0, 1, 3).reshape(width, -1)


def covariance_values(statistics: LayerStatistics, rank: int) -> Factors:
    """The principal subspace of single tokens' values, without regard to attention."""
    moment = statistics.values
    identity = torch.eye(statistics.head_dim, dtype=moment.dtype, device=moment.device)
    return orthonormal(*weighted_subspace(moment, identity.expand(statistics.num_kv_heads, -1, -1), rank))


def _per_query_head(decoder: Float[Tensor, "g d r"], c: int, m: int) -> Float[Tensor, "c m d r"]:
    return decoder.repeat_interleave(c * m // len(decoder), dim=0).unflatten(0, (c, m))


def _read(averaged: AveragedValues, decoder: Float[Tensor, "g d r"]) -> Float[Tensor, "c m r D"]:
    """From the value latent to the output, for each query head: ``W_i D_g(i)``."""
    output = averaged.output_weight
    return torch.einsum("cioa,ciar->ciro", output, _per_query_head(decoder, *output.shape[:2]))


def _fit_decoder(
    averaged: AveragedValues, encoder: Float[Tensor, "r n"], start: Float[Tensor, "g d r"]
) -> Float[Tensor, "g d r"]:
    normal, right = decoder_equations(averaged, encoder, start.shape[0])
    return conjugate_gradients(normal, right, start)


def decoder_equations(
    averaged: AveragedValues, encoder: Float[Tensor, "r n"], num_kv_heads: int
) -> tuple[Callable[[Tensor], Tensor], Float[Tensor, "g d r"]]:
    """The best decoder solves ``normal(decoder) = right``."""
    output, r = averaged.output_weight, len(encoder)
    c, m, _, d = output.shape
    gram = torch.einsum("cinjm,sm->cinjs", averaged.gram, encoder)
    gram = torch.einsum("rn,cinjs->cirjs", encoder, gram)
    overlap = torch.einsum("cioa,cjoe->ciaje", output, output)
    right = torch.einsum("ciro,cioa->ciar", torch.einsum("rn,cino->ciro", encoder, averaged.target), output)

    def per_group(x: Float[Tensor, "c m d r"]) -> Float[Tensor, "g d r"]:
        return x.reshape(num_kv_heads, -1, d, r).sum(1)

    def normal(x: Float[Tensor, "g d r"]) -> Float[Tensor, "g d r"]:
        inner = torch.einsum("cirjs,cjes->cirje", gram, _per_query_head(x, c, m))
        return per_group(torch.einsum("cirje,ciaje->ciar", inner, overlap))

    return normal, per_group(right)


def _fit_encoder(
    averaged: AveragedValues, start: Float[Tensor, "r n"], decoder: Float[Tensor, "g d r"]
) -> Float[Tensor, "r n"]:
    read = _read(averaged, decoder)
    overlap = torch.einsum("ciro,cjso->cirjs", read, read)
    right = torch.einsum("cino,ciro->rn", averaged.target, read)

    def normal(x: Float[Tensor, "r n"]) -> Float[Tensor, "r n"]:
        inner = torch.einsum("cinjm,sm->cinjs", averaged.gram, x)
        return torch.einsum("cinjs,cirjs->rn", inner, overlap)

    return conjugate_gradients(normal, right, start)


def _fit_output(
    averaged: AveragedValues,
    encoder: Float[Tensor, "r n"],
    decoder: Float[Tensor, "g d r"],
    original: Float[Tensor, "c m D d"],
) -> Float[Tensor, "c m D d"]:
    """``W_O`` by ridge regression from the heads' compressed outputs, regularised towards the original."""
    c, m, width, d = original.shape
    heads = torch.einsum("ciar,rn->cian", _per_query_head(decoder, c, m), encoder)
    gram = torch.einsum("cian,cinjm->ciajm", heads, averaged.gram)
    gram = torch.einsum("ciajm,cjem->ciaje", gram, heads).reshape(c, m * d, m * d)
    right = torch.einsum("cian,cino->ciao", heads, averaged.target).reshape(c, m * d, width)
    ridge = RIDGE * gram.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None]
    start = original.transpose(2, 3).reshape(c, m * d, width)
    ridge = torch.where(ridge > 0, ridge, 1)  # heads whose outputs are zero keep the original
    solved = torch.linalg.solve(gram + ridge * torch.eye(m * d, device=gram.device), right + ridge * start)
    return solved.view(c, m, d, width).transpose(2, 3)


def conjugate_gradients(normal: Callable[[Tensor], Tensor], right: Tensor, x: Tensor) -> Tensor:
    """A few steps towards ``normal(x) = right`` for a positive semi-definite `normal`; stops at rounding."""
    left = right - normal(x)
    direction, energy = left, left.square().sum()
    floor = torch.finfo(x.dtype).eps ** 2 * right.square().sum()
    for _ in range(CG_STEPS):
        if energy <= floor:
            break
        image = normal(direction)
        curvature = (direction * image).sum()
        if curvature <= 0:  # no direction left that matters
            break
        step = energy / curvature
        x, left = x + step * direction, left - step * image
        before, energy = energy, left.square().sum()
        direction = left + energy / before * direction
    return x
