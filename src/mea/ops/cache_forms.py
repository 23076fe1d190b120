"""Cache forms: which latents a layer caches for a token, and how attention reads them. A new form is one class here.

A form holds everything in which it differs from the others; no other file checks its name. Cached tensors have the
shapes of `mea.ops.latent`: ``[b, c, t, r]``. The decoders are ``[g, d, r]``, with the ranks of `decoder_ranks`.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mea.ops.latent import absorb, attend_rebuilt, encode, materialise, rebuilt_scores, rotate, unmix


class PostRope:
    """Latents of post-RoPE keys, and latents of values. Decoding reads both without rebuilding keys or values.

    Attributes
    ----------
    name
        As in ``config.latent_form``.
    pre_rope
        Keys are encoded before RoPE and have to be rotated when they are read.
    shared
        One latent encodes keys and values together. Half of it is cached in the place of keys, half in the place of
        values, so both halves have the same rank. Groups of heads cannot have separate latents.
    """

    name = "post_rope"
    pre_rope = False
    shared = False

    def __repr__(self) -> str:
        return self.name

    def decoder_ranks(self, key_rank: int, value_rank: int) -> tuple[int, int]:
        """Input ranks of the decoders of keys and of values, given the cached numbers of each."""
        both = key_rank + value_rank
        return (both, both) if self.shared else (key_rank, value_rank)

    def cached_ranks(self, key_rank: int, value_rank: int) -> tuple[int, int]:
        """Numbers cached in the place of keys and of values; the inverse of `decoder_ranks`."""
        return (key_rank // 2, value_rank // 2) if self.shared else (key_rank, value_rank)

    def check(self, key_rank: int, value_rank: int, groups: int = 1) -> None:
        """Refuse ranks or groups that the form does not support.

        Raises
        ------
        ValueError
            A shared latent with different key and value ranks, or with groups.
        """
        if self.shared and key_rank != value_rank:
            raise ValueError(
                f"a {self.name} latent is cached in two equal halves: give [r, r] or null for each layer, not "
                f"[{key_rank}, {value_rank}]"
            )
        if self.shared and groups > 1:
            raise ValueError(
                f"a {self.name} latent combines the keys and values of all heads: give another method, or no groups"
            )

    def encode(
        self,
        keys: Float[Tensor, "b g t d"],
        rotated: Float[Tensor, "b g t d"],
        values: Float[Tensor, "b c t r_v"],
        encoder: Float[Tensor, "rows n"],
    ) -> tuple[Float[Tensor, "b c t _"], Float[Tensor, "b c t _"]]:
        """The tensors to cache for new tokens; `values` are already encoded by the layer's ``v_proj``."""
        latents = encode(keys if self.pre_rope else rotated, encoder)
        if self.shared:
            first, second = (latents + values).chunk(2, dim=-1)
            return first, second
        return latents, values

    def rebuild(
        self,
        keys: Float[Tensor, "b c t _"],
        values: Float[Tensor, "b c t _"],
        decoders: tuple[Float[Tensor, "g d _"], Float[Tensor, "g d _"]],
        turn: tuple[Tensor, Tensor] | None,
    ) -> tuple[Float[Tensor, "b g t d"], Float[Tensor, "b g t d"]]:
        """Keys and values of all heads; `turn` holds the cosines and sines of a form that rotates when it reads."""
        return materialise(keys, decoders[0]), materialise(values, decoders[1])

    def read(
        self,
        queries: Float[Tensor, "b h q d"],
        keys: Float[Tensor, "b c t _"],
        values: Float[Tensor, "b c t _"],
        decoders: tuple[Float[Tensor, "g d _"], Float[Tensor, "g d _"]],
        mask: Tensor | None,
        turn: tuple[Tensor, Tensor] | None,
        *,
        attend: Any,
        scale: float,
        dropout: float,
    ) -> tuple[Float[Tensor, "b h q d"], Tensor | None]:
        """Attention of few queries over the cache, and its weights if `attend` returns them.

        `attend` maps packed queries ``[b, c, h / c * q, r]``, cached keys, values and a mask to outputs and weights:
        the heads of a group become rows of one head's queries, so that the latents are read once for all of them.
        """
        (b, h, q, _), c = queries.shape, keys.shape[1]
        packed = absorb(queries, decoders[0]).reshape(b, c, h // c * q, -1)
        if mask is not None:
            shape = (mask.shape[0], 1, h // c * q, -1)
            mask = mask.expand(-1, h // c, -1, -1).reshape(shape)
        output, weights = attend(packed, keys, values, mask)
        weights = None if weights is None else weights.view(weights.shape[0], h, q, -1)
        return unmix(output.reshape(output.shape[0], h, q, -1), decoders[1]), weights


class PreRope(PostRope):
    """Latents of keys before RoPE: less error at equal bytes, but every read rebuilds the keys and rotates them."""

    name = "pre_rope"
    pre_rope = True

    def rebuild(self, keys: Any, values: Any, decoders: Any, turn: Any) -> tuple[Tensor, Tensor]:
        latents, averaged = (torch.cat(parts, -1) for parts in self._parts(keys, values))
        return rotate(materialise(latents, decoders[0]), *turn), materialise(averaged, decoders[1])

    def read(
        self, queries: Any, keys: Any, values: Any, decoders: Any, mask: Any, turn: Any, *, attend: Any, scale: Any,
        dropout: Any,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        latents, averaged = self._parts(keys, values)
        scores = rebuilt_scores(queries, latents, decoders[0], *turn)
        output, weights = attend_rebuilt(scores, averaged, mask, scale, dropout)
        return unmix(output, decoders[1]), weights

    def _parts(self, keys: Tensor, values: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The parts whose concatenation the decoders of keys and of values read."""
        return ((keys, values), (keys, values)) if self.shared else ((keys,), (values,))


class Joint(PreRope):
    """One latent for keys before RoPE and values together: the least error at equal bytes."""

    name = "joint"
    shared = True


FORMS: dict[str, PostRope] = {form.name: form for form in (PostRope(), PreRope(), Joint())}
