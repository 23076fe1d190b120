"""The scalar mixing of arXiv 2601.19611 after a change of basis in each head.

The paper mixes heads with one scalar per pair, in the given bases. But a value head may be multiplied by any invertible
matrix (undone in ``W_O``), and a key head by any complex number per rotary frequency (undone in ``W_Q``), without
changing attention: same architecture, same speed. In suitable bases the heads are more similar. With ``G_g`` the change
of basis, ``w`` the scalars and ``c_j`` component heads that may be any linear function of the heads,

    x_g ≈ G_g sum_j w_gj c_j,

fitted by alternating least squares, every step in closed form: on second moments weighted by the queries' (keys) or
``W_O``'s (values) energy from several starts; values then once more on attention-averaged moments, with ``W_O``. With
one component, or one less than the number of heads, this form can express every subspace.
"""

import torch
from jaxtyping import Float, Num
from torch import Tensor, linalg

from mea.compression.calibrate.rope_moments import average_over_phases
from mea.compression.calibrate.statistics import AveragedValues, LayerStatistics
from mea.compression.methods.base import Method
from mea.compression.methods.factors import Factors
from mea.compression.methods.values import alternate, conjugate_gradients, decoder_equations, single_heads
from mea.compression.methods.whole_heads.gauge_maps import head_matrices, key_blocks, value_blocks
from mea.compression.methods.whole_heads.gqa_procrustes import align, grouping

STARTS = 6  # random ones, besides two that are made of similar heads
FIRST_ROUNDS, ROUNDS = 10, 50
FLOOR = 1e-9  # smallest energy, relative to the largest
RTOL = 1e-3  # of the largest singular value: a direction in which decoders are smaller would be read out of rounding


def keys(statistics: LayerStatistics, rank: int) -> Factors:
    """Factors of post-RoPE keys."""
    d = statistics.head_dim
    energy = average_over_phases(statistics.queries, d).diagonal(dim1=1, dim2=2)
    weight = energy.clamp_min(FLOOR * energy.max().item() or 1.0).sqrt()  # g d, equal for both channels of a frequency
    rows = weight.flatten()
    maps, scalars = fit_gauge(key_blocks(rows[:, None] * statistics.keys * rows, d), rank // d)
    decoder = _decoder(head_matrices(maps) / weight[:, :, None], scalars)
    return Factors(linalg.pinv(rows[:, None] * decoder) * rows, decoder)


def values(averaged: AveragedValues, num_kv_heads: int, rank: int) -> tuple[Factors, Float[Tensor, "D _"]]:
    """Factors of values, and the output projection fitted to them."""
    moment, metric = single_heads(averaged, num_kv_heads)
    d = metric.shape[1]
    energies, vectors = linalg.eigh(metric)
    scale = energies.clamp_min(FLOOR * energies.max().item() or 1.0).sqrt()
    root, inverse = vectors * scale[:, None] @ vectors.mT, vectors / scale[:, None] @ vectors.mT
    weighted = torch.block_diag(*root)
    maps, scalars = fit_gauge(value_blocks(weighted @ moment @ weighted, d), rank // d)
    decoder = _decoder(inverse @ head_matrices(maps), scalars)
    encoder = linalg.pinv(weighted @ decoder, rtol=RTOL) @ weighted
    encoder, decoder, output = alternate(averaged, encoder, decoder.view(num_kv_heads, d, -1), _fit_decoder)
    return Factors(encoder, decoder.reshape(num_kv_heads * d, rank)), output


def fit_gauge(
    moment: Num[Tensor, "b g a g a"], components: int
) -> tuple[Num[Tensor, "b g a a"], Float[Tensor, "g h_c"]]:
    """Bases of heads, and scalars, with the least squared error for heads with this second moment."""
    fitted = [_rounds(moment, *start, FIRST_ROUNDS) for start in _starts(moment, components)]
    best = max(fitted, key=lambda fit: _kept(moment, *fit))
    return _rounds(moment, *best, ROUNDS)


def _starts(moment: Num[Tensor, "b g a g a"], components: int) -> list[tuple[Tensor, Tensor]]:
    (b, g, a), device = moment.shape[:3], moment.device
    plain = torch.eye(a, dtype=moment.dtype, device=device).expand(b, g, a, a).clone()
    each = torch.eye(g, dtype=torch.float64, device=device)
    if components == g:  # as they are, the heads lose nothing
        return [(plain, each)]
    alike, member = plain.clone(), each.new_zeros(g, components)
    for component, group in enumerate(grouping(moment, components)):
        alike[:, group], member[group, component] = align(moment, group).mH, 1.0
    together = align(moment, list(range(g)))
    products = torch.einsum("bgea,bgahc,bhec->gh", together, moment, together.conj()).real
    starts = [(alike, member), (together.mH, linalg.eigh(products)[1][:, -components:])]
    generator = torch.Generator().manual_seed(0)
    if components == g - 1:  # what is lost is one combination of heads: coordinates in which it is their sum
        lost = linalg.eigh(moment.reshape(b, g * a, g * a))[1][:, :, :a].reshape(b, g, a, a)
        zero_sum = linalg.qr(each[:, 1:] - 1 / g).Q
        starts.append((linalg.pinv(lost.mH), zero_sum))
    random = torch.randn(STARTS, g, components, dtype=torch.float64, generator=generator).to(device)
    return starts + [(plain, linalg.qr(scalars).Q) for scalars in random]


def _spread(maps: Num[Tensor, "b g a a"], scalars: Float[Tensor, "g h_c"]) -> Num[Tensor, "b n r"]:
    """The decoder of every block."""
    b, g, a, _ = maps.shape
    return torch.einsum("bgae,gj->bgaje", maps, scalars.to(maps.dtype)).reshape(b, g * a, -1)


def _kept(moment: Num[Tensor, "b g a g a"], maps: Tensor, scalars: Tensor) -> float:
    """The energy that this decoder can reach."""
    decoder = _spread(maps, scalars)
    basis = linalg.svd(decoder, full_matrices=False).U
    return (
        (basis.mH @ moment.reshape(len(moment), decoder.shape[1], -1) @ basis)
        .diagonal(dim1=1, dim2=2)
        .real.sum()
        .item()
    )


def _rounds(
    moment: Num[Tensor, "b g a g a"], maps: Num[Tensor, "b g a a"], scalars: Float[Tensor, "g h_c"], rounds: int
) -> tuple[Num[Tensor, "b g a a"], Float[Tensor, "g h_c"]]:
    """Encoder, bases and scalars in turn, each the best given the others."""
    b, g, a = moment.shape[:3]
    whole = moment.reshape(b, g * a, g * a)
    for _ in range(rounds):
        encoder = linalg.pinv(_spread(maps, scalars))
        cross, own = whole @ encoder.mH, encoder @ whole @ encoder.mH  # E[x c^H], E[c c^H]
        cross, own = cross.view(b, g, a, -1, a), own.view(b, -1, a, scalars.shape[1], a)
        mixed = scalars.to(moment.dtype)
        right = torch.einsum("bgaje,gj->bgae", cross, mixed)
        left = torch.einsum("bjekf,gj,gk->bgef", own, mixed, mixed)
        maps = right @ linalg.pinv(left, hermitian=True)
        normal = torch.einsum("bgae,bjekf,bgaf->gjk", maps, own, maps.conj()).real
        wanted = torch.einsum("bgaje,bgae->gj", cross, maps.conj()).real
        scalars = (linalg.pinv(normal, hermitian=True) @ wanted[..., None])[..., 0]
    return maps, scalars


def _decoder(maps: Float[Tensor, "g d d"], scalars: Float[Tensor, "g h_c"]) -> Float[Tensor, "n r"]:
    """``D_g = [w_g1 G_g, ..., w_gc G_g]``, in a basis of the components in which it is nearly orthonormal."""
    scalars = linalg.qr(scalars).Q
    size = torch.einsum("gj,gae,gaf->ef", scalars.square(), maps, maps) / scalars.shape[1]
    energies, vectors = linalg.eigh(size)
    # The symmetric root, which leaves a diagonal `size` (keys: the two channels of a frequency alike) diagonal.
    maps = maps @ (vectors / energies.clamp_min(FLOOR * energies.max().item()).sqrt()) @ vectors.mT
    return torch.einsum("gae,gj->gaje", maps, scalars).reshape(maps.shape[0] * maps.shape[1], -1)


def _fit_decoder(
    averaged: AveragedValues, encoder: Float[Tensor, "r n"], start: Float[Tensor, "g d r"]
) -> Float[Tensor, "g d r"]:
    """The step of `alternate` that keeps to decoders ``w_gj G_g``: both by least squares, one after the other."""
    normal, right = decoder_equations(averaged, encoder, len(start))
    shape = (start.shape[1], -1, start.shape[1])
    blocks = start.unflatten(2, shape[1:]).transpose(1, 2).flatten(2)  # g h_c d*d, of rank one
    left, size, maps = linalg.svd(blocks, full_matrices=False)
    scalars, maps = left[:, :, 0] * size[:, :1], maps[:, 0].unflatten(1, (shape[0], shape[0]))

    def put(maps: Float[Tensor, "g d d"], scalars: Float[Tensor, "g h_c"]) -> Float[Tensor, "g d r"]:
        return torch.einsum("gae,gj->gaje", maps, scalars).flatten(2)

    def to_maps(x: Float[Tensor, "g d r"]) -> Float[Tensor, "g d d"]:
        return torch.einsum("gaje,gj->gae", x.unflatten(2, shape[1:]), scalars)

    def to_scalars(x: Float[Tensor, "g d r"]) -> Float[Tensor, "g h_c"]:
        return torch.einsum("gaje,gae->gj", x.unflatten(2, shape[1:]), maps)

    maps = conjugate_gradients(lambda x: to_maps(normal(put(x, scalars))), to_maps(right), maps)
    scalars = conjugate_gradients(lambda x: to_scalars(normal(put(maps, x))), to_scalars(right), scalars)
    return put(maps, scalars)


METHODS = (Method("gauge", keys, whole_heads=True, averaged=values),)
