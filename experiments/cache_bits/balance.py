"""Make latents easy to quantise, without a change to what the model computes.

Latents may be taken in any basis: ``T E`` and ``D T^{-1}`` give the same keys and values as ``E`` and ``D``. Rounding a
token's latent with one step for all channels adds noise of the same size to each, and the step grows with the largest
channel. With ``Σ`` the latents' second moment and ``M`` what an error costs (for keys the second moment of the queries
that are multiplied with them, for values what reaches the residual stream), the noise costs
``tr(T Σ T^T) tr(T^{-T} M T^{-1})``. The least is reached with ``T^T T = S``, where ``S Σ S = M``, the matrix geometric
mean of ``M`` and ``Σ^{-1}``: ``S = M^½ (M^½ Σ M^½)^{-½} M^½``. What is left free, a rotation after it, is a random one,
which makes all channels alike and spreads outliers, as QuaRot does (arXiv 2404.00456) where no scaling is free.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

from mea.compression.calibrate.layerwise import evaluating
from mea.ops.latent import absorb

FLOOR = 1e-6  # of the mean eigenvalue: directions that are never seen are not blown up further


@torch.no_grad()
def balance_latents(model: Any, tokens: Int[Tensor, "n t"], *, scale: bool = True, seed: int = 0) -> None:
    """Change the basis of every compressed layer's latents, in place.

    Parameters
    ----------
    model
        A compressed model, all of whose weights are in memory.
    tokens
        A few windows of text; what is read over a cache are their latents.
    scale
        Balance before rotating; otherwise only rotate.
    seed
        Of the rotations.

    Raises
    ------
    ValueError
        No layer of the model caches latents, or keys and values share them, or groups of heads have their own.
    """
    layers = [layer.self_attn for layer in model.model.layers if hasattr(layer.self_attn, "head_mixing")]
    if not layers:
        raise ValueError("no layer of this model caches latents: there is nothing to balance")
    if any(attention.head_mixing.groups > 1 for attention in layers):
        raise ValueError("latents of groups of heads cannot be balanced: compress without groups")
    if any(attention.head_mixing.form.shared for attention in layers):
        raise ValueError("joint latents cannot be balanced: their halves are not keys and values; use another method")
    moments = _moments(model, layers, tokens) if scale else {}
    generator = torch.Generator().manual_seed(seed)
    for attention in layers:
        mixing = attention.head_mixing
        ranks = mixing.key_decoder.shape[-1], mixing.value_decoder.shape[-1]
        bases = []
        for which, width in enumerate(ranks):
            rotation = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64, generator=generator)).Q
            if scale:
                root, inverse = balancing(*moments[attention.layer_idx][which])
                bases.append((rotation @ root, inverse @ rotation.T))
            else:
                bases.append((rotation, rotation.T))
        (keys, keys_back), (values, values_back) = bases
        _multiply(mixing.key_encoder, left=keys)
        _multiply(mixing.key_decoder, right=keys_back)
        _multiply(attention.v_proj.weight, left=values)
        if attention.v_proj.bias is not None:
            _multiply(attention.v_proj.bias, left=values)
        _multiply(mixing.value_decoder, right=values_back)


def balancing(
    moment: Float[Tensor, "r r"], cost: Float[Tensor, "r r"]
) -> tuple[Float[Tensor, "r r"], Float[Tensor, "r r"]]:
    """``S^½`` and its inverse for ``S moment S = cost``, see the module."""
    cost_root, _ = _roots(cost)
    _, middle = _roots(cost_root @ moment @ cost_root)
    return _roots(cost_root @ middle @ cost_root)


def _roots(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Square root and its inverse of a symmetric matrix without negative eigenvalues."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    mean = values.clamp_min(0).mean().item()
    values = values.clamp_min(FLOOR * mean if mean > 0 else 1.0).sqrt()
    return (vectors * values) @ vectors.T, (vectors / values) @ vectors.T


def _multiply(parameter: Tensor, left: Tensor | None = None, right: Tensor | None = None) -> None:
    wide = parameter.double()
    wide = wide if left is None else left.to(wide.device) @ wide
    parameter.copy_(wide if right is None else wide @ right.to(wide.device))


Pair = tuple[Tensor, Tensor]


def _moments(model: Any, layers: list[Any], tokens: Tensor) -> dict[int, tuple[Pair, Pair]]:
    """Per layer, of keys and of values: the latents' second moment, and what an error costs."""
    seen: dict[int, list[Tensor]] = {}
    with evaluating(model), _watched_queries(layers) as queries:
        for window in tokens:
            cache = DynamicCache(config=model.config)
            model.base_model(input_ids=window[None].to(model.device), past_key_values=cache, use_cache=True)
            for attention in layers:
                cached: Any = cache.layers[attention.layer_idx]
                new = [_second_moment(x[0, 0]) for x in (cached.keys, cached.values)]
                old = seen.get(attention.layer_idx)
                seen[attention.layer_idx] = new if old is None else [a + b for a, b in zip(old, new, strict=True)]
    found = {}
    for attention in layers:
        keys, values = seen[attention.layer_idx]
        decoder = attention.head_mixing.value_decoder
        g, d, r = decoder.shape
        output = attention.o_proj.weight.double().unflatten(1, (g, -1, d))  # heads of a group stand together
        cost = _second_moment(torch.einsum("Dgmd,gdr->Dgmr", output, decoder.double()).reshape(-1, r))
        found[attention.layer_idx] = (keys, queries[attention.layer_idx]), (values, cost)
    return found


def _second_moment(rows: Float[Tensor, "n r"]) -> Float[Tensor, "r r"]:
    rows = rows.double().cpu()
    return rows.T @ rows


@contextmanager
def _watched_queries(layers: list[Any]) -> Iterator[dict[int, Tensor]]:
    """Second moments of absorbed queries by layer, filled while the model runs."""
    sums: dict[int, Tensor] = {}

    def watch(attention: Any) -> Any:
        def project(*args: Any) -> Any:
            keys, values, queries = type(attention)._project(attention, *args)
            absorbed = absorb(queries, attention.head_mixing.key_decoder)
            new = _second_moment(absorbed.reshape(-1, absorbed.shape[-1]))
            sums[attention.layer_idx] = sums.get(attention.layer_idx, 0) + new
            return keys, values, queries

        return project

    for attention in layers:
        attention._project = watch(attention)
    try:
        yield sums
    finally:
        for attention in layers:
            del attention._project
