"""Multi-head explicit attention (MEA, arXiv 2601.19611): key and value heads are linear combinations of components.

The paper's steps, and where they are: ``k_comp = x W_K`` and ``v_comp = x W_V`` are `k_proj` and `v_proj`;
``W_lc^K`` and ``W_lc^V`` are `key_mixing` and `value_mixing`; the GroupNorm is `head_norm`; ``W_O`` is `o_proj`.
Components that keys and values share are not from the paper.
"""

from typing import Literal, Unpack, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from mea.attention.backends import AttentionMask
from mea.attention.base import Attention, AttentionOptions, Cache
from mea.attention.gqa import GroupedQueryAttention
from mea.attention.mixing import (
    FrequencyMixing,
    HeadMixing,
    HeadNormGain,
    MixingInit,
    check_name,
    fold_projection,
    make_head_norm,
)
from mea.ops.rope import Rotary, rotate

Mix = Literal["both", "keys", "values", "neither"]
KeyMixing = Literal["scalar", "frequency"]
Fold = Literal["auto", "always", "never"]
MOVED = 256  # multiplications in the time that a number takes from or to memory: 295 on an H100 (989 TFLOPS, 3.35 TB/s)


def folding_is_cheaper(tokens: int, width: int, components: int, heads: int) -> bool:
    """Whether mixing the rows of a projection from `width` channels is cheaper than mixing `tokens` activations.

    Counts multiplications per channel of a head, including the projection, and `MOVED` for every number that the mixing
    reads or writes; both orders give the same result.
    """
    mixing = components * heads + MOVED * (components + heads)
    return width * mixing + tokens * width * heads < tokens * mixing + tokens * width * components


class MultiheadExplicitAttention(Attention):
    """Grouped attention whose key and value heads are mixed from component heads, normalised per head.

    Parameters
    ----------
    hidden_size, num_heads, num_kv_heads, options
        As in `Attention`. With `qk_norm` the keys are normalised after a square mixing, which then still folds into the
        weights. With fewer or shared components they are normalised before it, so that the cache holds components.
    num_component_heads
        ``h_c``, the paper's h', at most ``h_kv``; None means ``h_kv``. With fewer, a cache holds the components, as one
        head of dimension ``h_c d`` instead of ``h_kv d`` numbers.
    mix
        Whether keys, values or both are mixed. Without mixing there are ``h_kv`` heads.
    head_norm
        ``"off"``, ``"no_gain"``, ``"shared_gain"`` (the paper's) or ``"per_head_gain"``.
    init
        Initialisation of the mixing, see `HeadMixing`.
    key_mixing
        ``"scalar"``, one number per pair of heads (the paper's), or ``"frequency"``, a complex one for each frequency.
    fold
        Mix activations (``"never"``), or the rows of ``W_K`` and ``W_V`` at each step (``"always"``): the same result.
        ``"auto"`` takes the order that takes less time for the given number of tokens (`folding_is_cheaper`).
    share_components
        Mix keys and values from the same components, which `k_proj` makes: there is no `v_proj`. A cache holds the
        components before norm and RoPE, ``h_c d`` numbers per token instead of ``2 h_c d``. Each pass rotates them by
        their positions in the cache, so `positions` of one row must be consecutive. `mix` must be ``"both"``.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        num_component_heads: int | None = None,
        mix: Mix = "both",
        head_norm: HeadNormGain = "shared_gain",
        init: MixingInit = "identity",
        key_mixing: KeyMixing = "scalar",
        fold: Fold = "auto",
        share_components: bool = False,
        **options: Unpack[AttentionOptions],
    ) -> None:
        h_kv = num_heads if num_kv_heads is None else num_kv_heads
        h_c = h_kv if num_component_heads is None else num_component_heads
        if not 1 <= h_c <= h_kv:
            raise ValueError(f"num_component_heads ({h_c}) must be between 1 and num_kv_heads ({h_kv})")
        check_name("mix", mix, get_args(Mix))
        check_name("key_mixing", key_mixing, get_args(KeyMixing))
        check_name("fold", fold, get_args(Fold))
        mix_keys, mix_values = mix in ("both", "keys"), mix in ("both", "values")
        if h_c < h_kv and mix == "neither":
            raise ValueError("fewer component heads than key/value heads need a mixing; mix is 'neither'")
        if share_components and mix != "both":
            raise ValueError(f"components that keys and values share need both of them mixed; mix is {mix!r}")
        heads = (num_heads, h_c if mix_keys else h_kv, h_c if mix_values else h_kv)
        super().__init__(hidden_size, num_heads, h_kv, projections=heads, **options)
        self.num_component_heads, self.fold = h_c, fold
        self.share_components, self.compressed = share_components, h_c < h_kv or share_components
        if share_components:
            del self.v_proj
        self.key_mixing: HeadMixing | FrequencyMixing | None = None
        if mix_keys and key_mixing == "frequency":
            self.key_mixing = FrequencyMixing(h_c, h_kv, self.head_dim, self.rotary_dim, init)
        elif mix_keys:
            self.key_mixing = HeadMixing(h_c, h_kv, init)
        self.value_mixing = HeadMixing(h_c, h_kv, init) if mix_values else None
        self.head_norm = make_head_norm(num_heads, self.head_dim, head_norm, self.eps, self.head_norm_init)

    def forward(
        self,
        x: Float[Tensor, "b t D"],
        *,
        mask: AttentionMask | None = None,
        positions: Int[Tensor, "#b t"] | Rotary | None = None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "b t D"]:
        """Attend within `x` and to the tokens in `cache`; arguments as in `GroupedQueryAttention.forward`."""
        q = self.q_norm(self.heads(self.q_proj(x)))
        if self.compressed and cache is not None:
            return self.output(self.head_norm(self._attend_to_components(x, q, mask, positions, cache)))
        if self.compressed and self.key_mixing is not None and not isinstance(self.k_norm, nn.Identity):
            k = self.key_mixing(self.k_norm(self.heads(self.k_proj(x))))
        else:
            k = self.k_norm(self._mixed(x, self.k_proj, self.key_mixing))
        v = self._mixed(x, self.k_proj if self.share_components else self.v_proj, self.value_mixing)
        q, k = self.rotate(q, k, positions, cache)
        k, v = self.remember(k, v, cache)
        return self.output(self.head_norm(self.attend(q, k, v, mask)))

    def _attend_to_components(
        self,
        x: Float[Tensor, "b t D"],
        q: Float[Tensor, "b t h d"],
        mask: AttentionMask | None,
        positions: Int[Tensor, "#b t"] | Rotary | None,
        cache: Cache,
    ) -> Float[Tensor, "b t h d"]:
        """Attend to components after RoPE. Many queries read recombined heads; a single query is mixed instead."""
        if self.share_components:
            q, k, v = self._shared(x, q, cache)
        else:
            k = self.k_norm(self.heads(self.k_proj(x)))
            q, k = self.rotate(q, k, positions, cache)
            k, v = k.flatten(2)[:, :, None], self.v_proj(x)[:, :, None]
            k, v = self.remember(k, v, cache)
        if x.shape[1] == 1 and self.key_mixing is not None and self.value_mixing is not None:
            return self.value_mixing.unmix(self.attend(self.key_mixing.absorb(q), k, v, mask))
        return self.attend(q, self._recombined(k, self.key_mixing), self._recombined(v, self.value_mixing), mask)

    def _shared(
        self,
        x: Float[Tensor, "b t D"],
        q: Float[Tensor, "b t h d"],
        cache: Cache,
    ) -> tuple[Float[Tensor, "b t h d"], Float[Tensor, "b 1 s r"], Float[Tensor, "b 1 s r"]]:
        """Queries after RoPE, and the shared components of all tokens as keys, after norm and RoPE, and as values.

        The cache holds half of the channels as keys and half as values. Scores depend on differences of positions only,
        so that places in the cache serve as positions, left padding included.
        """
        first_half, second_half = self.k_proj(x)[:, None].chunk(2, dim=-1)
        components = torch.cat(cache.update(first_half, second_half, self.layer_index), dim=-1)
        k = self.k_norm(self.heads(components[:, 0]))
        if self.rope is not None:
            places = torch.arange(k.shape[1], device=x.device)[None]
            # A cache of fixed length has empty slots after the new tokens, one with a window has dropped the first.
            past = torch.as_tensor(cache.get_seq_length(self.layer_index) - q.shape[1], device=x.device)
            first = past.clamp(max=k.shape[1] - q.shape[1])
            q = rotate(q, self.rotary(places[:, : q.shape[1]] + first, q.dtype))
            k = rotate(k, self.rotary(places, k.dtype))
        return q, k.flatten(2)[:, None], components

    def _recombined(
        self, latent: Float[Tensor, "b 1 s r"], mixing: HeadMixing | FrequencyMixing | None
    ) -> Float[Tensor, "b h_kv s d"]:
        """All key or value heads from the cached components."""
        components = self.heads(latent[:, 0])
        return (components if mixing is None else mixing(components)).transpose(1, 2)

    def _mixed(
        self, x: Float[Tensor, "b t D"], proj: nn.Linear, mixing: HeadMixing | FrequencyMixing | None
    ) -> Float[Tensor, "b t h_kv d"]:
        """Project and mix, in the order set by `fold`."""
        if mixing is None:
            return self.heads(proj(x))
        tokens = x.shape[0] * x.shape[1]
        cheaper = folding_is_cheaper(tokens, self.hidden_size, self.num_component_heads, self.num_kv_heads)
        if self.fold == "never" or (self.fold == "auto" and not cheaper):
            return mixing(self.heads(proj(x)))
        bias = None if proj.bias is None else mixing.fold(proj.bias[:, None])[:, 0]
        return self.heads(F.linear(x, mixing.fold(proj.weight), bias))

    @torch.no_grad()
    def folded(self, *, expand: bool = False) -> GroupedQueryAttention:
        """The same function without mixing: grouped attention, head norm kept, with ``W_lc`` inside ``W_K``, ``W_V``.

        Raises
        ------
        ValueError
            Without `expand`: components are fewer than key/value heads or shared by keys and values, so the result
            would have a larger cache. Always: component keys have a norm, which stands between ``W_K`` and the mixing.
        """
        normed = self.key_mixing is not None and not isinstance(self.k_norm, nn.Identity)
        if self.compressed and (normed or not expand):
            kind = "shared component heads" if self.share_components else "component heads"
            raise ValueError(
                f"{self.num_component_heads} {kind} for {self.num_kv_heads} key/value heads do not fold into grouped "
                "attention without losing the smaller cache; only a square mixing folds, of components not shared"
            )
        gain: HeadNormGain = getattr(self.head_norm, "gain", "off")
        plain = GroupedQueryAttention.like(self, head_norm=gain)
        state = {name: x for name, x in self.state_dict().items() if "_mixing." not in name}
        if self.share_components:
            state |= {name.replace("k_", "v_"): x for name, x in state.items() if name.startswith("k_proj.")}
        for name, mixing in (("k_proj", self.key_mixing), ("v_proj", self.value_mixing)):
            if mixing is not None:
                fold_projection(state, name, mixing)
        plain.load_state_dict(state)
        return plain
