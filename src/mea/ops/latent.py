"""Attention over a compressed KV cache: one latent vector per token for the keys of all heads, one for the values.

Per token a layer caches ``c_k = E_k k`` (rank ``r_k``, from the *post-RoPE* keys of all heads) and ``c_v = E_v v``
(rank ``r_v``), where ordinary attention caches ``h_kv * d`` numbers each. Decoders ``D_k[g]``, ``D_v[g]`` rebuild the
keys and values of kv head ``g``: ``k_g ≈ D_k[g] c_k``. The cache is read in one of two ways, equal up to rounding:

- *absorbed* (decoding): ``q^T D_k[g] c_k = (D_k[g]^T q)^T c_k``. The query is multiplied by its group's decoder,
  attention runs over the latents **as one kv head shared by all queries**, and the output is multiplied by ``D_v[g]``.
  No tensor has the size of the uncompressed cache.
- *materialised* (prefill): rebuild keys and values, then attend as usual.

The paper's virtual heads (arXiv 2601.19611, section on KV-cache compression) are the case ``D_k[g] = w_g ⊗ I_d``.

Latents of *pre-RoPE* keys have a smaller error at equal bytes, but keys have to be rebuilt and rotated at every read
(`key_positions`); only values can then be read absorbed (`attend_rebuilt`).

Neighbouring heads may form ``c`` groups with separate latents, one group per rank of tensor parallelism. The above then
holds within each group, and each group attends as one kv head.

Tensors here are head-major, as in caches and attention backends: ``b`` batch, ``c`` groups, ``h`` query heads,
``g`` kv heads, ``q`` query tokens, ``t`` cached tokens, ``d`` head dimension, ``r`` latent rank of a group.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mea.ops import cpu

REBUILT = 2048  # tokens whose keys are rebuilt at a time on a CPU: they fit into a core's own cache


def absorb(queries: Float[Tensor, "b h q d"], decoder: Float[Tensor, "g d r"]) -> Float[Tensor, "b h q r"]:
    """Multiply each query by the transposed key decoder of its group: scores against latents equal scores against keys.

    Query heads are grouped as in GQA: head ``i`` reads kv head ``i // (h / g)``.
    """
    b, h, q, d = queries.shape
    g, _, r = decoder.shape
    grouped = queries.reshape(b, g, h // g * q, d)
    return torch.matmul(grouped, decoder).reshape(b, h, q, r)


def unmix(outputs: Float[Tensor, "b h q r"], decoder: Float[Tensor, "g d r"]) -> Float[Tensor, "b h q d"]:
    """Turn attention-weighted value latents into each head's output: ``A_i D_v c_v = D_v (A_i c_v)``."""
    b, h, q, r = outputs.shape
    g, d, _ = decoder.shape
    grouped = outputs.reshape(b, g, h // g * q, r)
    return torch.matmul(grouped, decoder.transpose(1, 2)).reshape(b, h, q, d)


def materialise(latents: Float[Tensor, "b c t r"], decoder: Float[Tensor, "g d r"]) -> Float[Tensor, "b g t d"]:
    """Rebuild the keys or values of all kv heads from their latents."""
    b, c, t, r = latents.shape
    g, d, _ = decoder.shape
    if c > 1:
        rebuilt = torch.matmul(latents, decoder.reshape(c, g // c * d, r).transpose(1, 2))
        return rebuilt.view(b, c, t, g // c, d).transpose(2, 3).reshape(b, g, t, d)
    rebuilt = torch.matmul(latents[:, 0], decoder.reshape(g * d, r).T)
    return rebuilt.view(b, t, g, d).transpose(1, 2)


def encode(heads: Float[Tensor, "b g t d"], encoder: Float[Tensor, "rows n"]) -> Float[Tensor, "b c t r"]:
    """The latents of all heads' vectors, as they are cached. ``n = g / c * d``, ``rows = c * r``."""
    b, g, t, d = heads.shape
    c = g * d // encoder.shape[1]
    if c > 1:
        grouped = heads.reshape(b, c, g // c, t, d).transpose(2, 3).reshape(b, c, t, -1)
        return torch.matmul(grouped, encoder.view(c, -1, encoder.shape[1]).transpose(1, 2))
    return torch.matmul(heads.transpose(1, 2).reshape(b, t, g * d), encoder.T)[:, None]


def key_positions(
    position_ids: Int[Tensor, "b q"],
    hidden: Bool[Tensor, "_ t"] | None,
    past: int | Int[Tensor, ""],
    slots: int,
) -> Int[Tensor, "_ t"]:
    """Positions of all tokens in a cache, given the positions of the new ones.

    They are counted back from the first new token. If its position is the number of tokens before it (the default of
    transformers), all slots count. Otherwise only slots that are not hidden count, as in ``generate`` with padding.

    Parameters
    ----------
    position_ids
        Of the new tokens.
    hidden
        Whether a slot is hidden from the first new token.
    past
        Tokens that the cache has seen before them.
    slots
        Tokens in the cache, new ones included. A static cache has empty slots behind them; a sliding cache has dropped
        the first ones.
    """
    q = position_ids.shape[1]
    first = torch.as_tensor(past, device=position_ids.device).clamp(max=slots - q)
    offsets = torch.arange(slots, device=position_ids.device) - first
    near = offsets.clamp(0, q - 1)
    positions = position_ids[:, near] + offsets - near
    if hidden is None:
        return positions
    skipped = (hidden & (offsets < 0)).long().flip(-1).cumsum(-1).flip(-1)
    return positions + skipped * (position_ids[:, :1] != past)


def rotate(
    keys: Float[Tensor, "b g t d"], cos: Float[Tensor, "_ t d"], sin: Float[Tensor, "_ t d"]
) -> Float[Tensor, "b g t d"]:
    """Rotate each pair of channels ``d / 2`` apart by its angle, as all supported architectures do (arXiv 2104.09864).

    As `mea.ops.rope.rotate`, but for heads before tokens and in the precision of the keys. Saved models contain this
    file and not `mea.ops.rope`.
    """
    first, second = keys.chunk(2, -1)
    c, s = (x[:, None, :, : first.shape[-1]] for x in (cos, sin))
    return torch.cat([torch.addcmul(first * c, second, s, value=-1), torch.addcmul(second * c, first, s)], -1)


def rebuilt_scores(
    queries: Float[Tensor, "b h q d"],
    latents: tuple[Float[Tensor, "b c t _"], ...],
    decoder: Float[Tensor, "g d r"],
    cos: Float[Tensor, "_ t d"],
    sin: Float[Tensor, "_ t d"],
) -> Float[Tensor, "b h q t"]:
    """Products of queries with keys that are rebuilt from the concatenated `latents` and then rotated.

    On a CPU in blocks of `REBUILT` tokens.
    """
    (b, h, q, d), g, t = queries.shape, len(decoder), latents[0].shape[2]
    grouped = queries.reshape(b, g, h // g * q, d)
    whole = queries.device.type != "cpu" or torch.compiler.is_compiling()
    size, scores = t if whole else REBUILT, []
    for start in range(0, t, size):
        some = [part[:, :, start : start + size] for part in latents]
        keys = materialise(some[0] if len(some) == 1 else torch.cat(some, -1), decoder)
        turn = cos[:, start : start + size], sin[:, start : start + size]
        if cpu is not None and cpu.usable(grouped, keys, *turn):
            scores.append(cpu.turned_scores(grouped, keys, *turn))
        else:
            scores.append(torch.matmul(grouped, rotate(keys, *turn).transpose(2, 3)))
    return torch.cat(scores, -1).view(b, h, q, t)


def attend_rebuilt(
    scores: Float[Tensor, "b h q t"],
    values: tuple[Float[Tensor, "b c t _"], ...],
    mask: Tensor | None,
    scale: float,
    dropout: float = 0.0,
) -> tuple[Float[Tensor, "b h q r"], Float[Tensor, "b h q t"]]:
    """Attention over latent values from `rebuilt_scores`, for few queries: outputs before `unmix`, and the weights.

    `values` are parts that are concatenated along the rank. `mask` is boolean, true where a query may attend, or a
    tensor that is added to the scores.
    """
    scores = scores * scale
    b, h, q, t = scores.shape
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(values[0].dtype)
    weights = torch.nn.functional.dropout(weights, dropout)
    c = values[0].shape[1]
    rows = weights.view(b, c, h // c * q, t)
    return torch.cat([torch.matmul(rows, part) for part in values], -1).view(b, h, q, -1), weights


def read(
    queries: Float[Tensor, "b c n r"], keys: Float[Tensor, "b c t r"], values: Float[Tensor, "b c t v"], scale: float
) -> Float[Tensor, "b c n v"]:
    """Attention of all queries to all tokens of their group, by the fastest kernel for these latents."""
    if keys.shape[1] > 1:
        own, latents, averaged = (tensor.flatten(0, 1)[:, None] for tensor in (queries, keys, values))
        return read(own, latents, averaged, scale).view(*queries.shape[:3], -1)
    if cpu is not None and cpu.usable(queries, keys, values):
        return cpu.attend(queries, keys, values, scale)
    parts = parts_to_read(keys, values.shape[-1])
    if parts > 1:
        return read_in_parts(queries, keys, values, scale, parts)
    return torch.nn.functional.scaled_dot_product_attention(queries, keys, values, scale=scale)


def parts_to_read(latents: Float[Tensor, "b 1 t r"], value_rank: int) -> int:
    """Number of parts into which `read_in_parts` should split these latents; 1 if it cannot or need not.

    On a CPU, attention runs in parallel over batch and kv heads, and latents have only one kv head: without parts,
    decoding a single sequence would use one core. GPU kernels split by themselves.
    """
    b, _, t, r = latents.shape
    if latents.device.type != "cpu" or r != value_rank or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return 1
    return max(1, min(torch.get_num_threads() // b, t // 512))


def read_in_parts(
    queries: Float[Tensor, "b 1 n r"],
    keys: Float[Tensor, "b 1 t r"],
    values: Float[Tensor, "b 1 t r"],
    scale: float,
    parts: int,
) -> Float[Tensor, "b 1 n r"]:
    """Attention to all tokens, on several cores: each part of the tokens by itself, then their outputs together.

    With ``s_p`` the log of part p's sum of exponentials and ``o_p`` its output, attention is ``Σ_p softmax(s)_p o_p``.
    """
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # what SDPA calls; SDPA drops the sums
    size = keys.shape[2] // parts
    even = size * parts
    cut_keys, cut_values = (x[:, 0, :even].unflatten(1, (parts, size)) for x in (keys, values))
    outputs, logsums = flash(queries.expand(-1, parts, -1, -1), cut_keys, cut_values, scale=scale)
    if even < keys.shape[2]:
        rest, logsum = flash(queries, keys[:, :, even:], values[:, :, even:], scale=scale)
        outputs, logsums = torch.cat([outputs, rest], 1), torch.cat([logsums, logsum], 1)
    weights = torch.softmax(logsums, 1).unsqueeze(-1)
    return (weights * outputs).sum(1, keepdim=True).to(queries.dtype)


def absorbed_is_cheaper(query_tokens: int, cached_tokens: int, query_heads: int, decoder_shape: torch.Size) -> bool:
    """Whether reading the latents directly takes fewer multiplications than rebuilding keys and values first.

    Rebuilding costs ``t r g d`` per cache, then each query costs ``h t d``; absorbed each query costs ``h t r`` and the
    two products at its ends ``2 h d r``. A single query is always absorbed: rebuilding would write the whole
    uncompressed cache at every step, which costs memory traffic that multiplications do not show.
    """
    if query_tokens == 1:
        return True
    g, d, r = decoder_shape
    rebuilt = cached_tokens * r * g * d + query_tokens * query_heads * cached_tokens * d
    absorbed = query_tokens * query_heads * (cached_tokens * r + 2 * d * r)
    return absorbed < rebuilt
