"""Base class of the attention modules: projections, RoPE, cache and backend."""

from typing import Protocol, TypedDict, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mea.attention import backends
from mea.attention.backends import AttentionMask, Backend
from mea.attention.mixing import HeadNorm, check_name
from mea.ops.rope import RopeConfig, Rotary, frequencies, rotary, rotate


@runtime_checkable
class Cache(Protocol):
    """Interface of a cache, as in transformers and `KVCache`. Tensors are ``[b, heads, s, width]``."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Append the new tokens' keys and values to layer `layer_idx`, and return those of all tokens."""
        ...

    def get_seq_length(self, layer_idx: int) -> int:
        """Number of tokens seen by layer `layer_idx`."""
        ...


class KVCache:
    """The simplest incremental cache: a pair of tensors per layer, grown by concatenation."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Append the new tokens' keys and values to layer `layer_idx`, and return those of all tokens."""
        if layer_idx in self.layers:
            keys, values = self.layers[layer_idx]
            key_states = torch.cat([keys, key_states], dim=2)
            value_states = torch.cat([values, value_states], dim=2)
        self.layers[layer_idx] = key_states, value_states
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of tokens in layer `layer_idx`."""
        return self.layers[layer_idx][0].shape[2] if layer_idx in self.layers else 0


class AttentionOptions(TypedDict, total=False):
    """Options that all attention modules take by keyword; `Attention` explains and checks them."""

    head_dim: int | None
    rope: RopeConfig | None
    qk_norm: bool
    causal: bool
    window: int | None
    bias: bool
    backend: Backend
    eps: float
    head_norm_init: float
    layer_index: int


class Attention(nn.Module):
    """Base class of the attention modules.

    Parameters
    ----------
    hidden_size, num_heads, num_kv_heads
        ``D``, ``h`` and ``h_kv`` (``h`` if None). ``h_kv`` divides ``h``.
    head_dim
        ``d``, ``D / h`` if None.
    rope
        Rotary embedding of queries and keys, or None for no position embedding.
    qk_norm
        RMSNorm of each query and key head before RoPE, with a gain shared by the heads (arXiv 2302.05442, Qwen3).
    causal, window
        The mask if the caller gives none: causal, and the last `window` tokens including the query's own.
    bias
        Biases on all four projections.
    backend
        ``"eager"``, ``"sdpa"`` or ``"flex"`` (`mea.attention.backends`).
    eps
        Epsilon of every norm.
    head_norm_init
        Initial gain of the norm after attention, if there is one. At 1 a head's output is initially many times as large
        as without the norm.
    layer_index
        Index of this module's layer in a cache; it also sets lambda_init of Differential V1.
    projections
        Heads of the query, key and value projections, if they differ from ``h, h_kv, h_kv``.
    """

    backends: tuple[Backend, ...] = backends.BACKENDS

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        head_dim: int | None = None,
        rope: RopeConfig | None = RopeConfig(),  # noqa: B008, frozen
        qk_norm: bool = False,
        causal: bool = True,
        window: int | None = None,
        bias: bool = False,
        backend: Backend = "sdpa",
        eps: float = 1e-5,
        head_norm_init: float = 1.0,
        layer_index: int = 0,
        projections: tuple[int, int, int] | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads ({num_kv_heads}) must divide num_heads ({num_heads})")
        if head_dim is None and hidden_size % num_heads:
            raise ValueError(f"give head_dim: hidden_size {hidden_size} is no multiple of num_heads {num_heads}")
        if window is not None and window < 1:
            raise ValueError(
                f"window is the number of visible tokens including the query's own: at least 1, not {window}"
            )
        check_name("backend", backend, self.backends)
        d = hidden_size // num_heads if head_dim is None else head_dim
        self.hidden_size, self.num_heads, self.num_kv_heads, self.head_dim = hidden_size, num_heads, num_kv_heads, d
        self.rope, self.causal, self.window = rope, causal, window
        self.backend: Backend = backend
        self.layer_index, self.eps, self.head_norm_init = layer_index, eps, head_norm_init
        self.rotary_dim = d if rope is None else rope.rotary_dim(d)

        q, k, v = projections or (num_heads, num_kv_heads, num_kv_heads)
        self.q_proj = nn.Linear(hidden_size, q * d, bias=bias)
        self.k_proj = nn.Linear(hidden_size, k * d, bias=bias)
        self.v_proj = nn.Linear(hidden_size, v * d, bias=bias)
        self.o_proj = nn.Linear(num_heads * d, hidden_size, bias=bias)
        self.q_norm = HeadNorm(q, d, "shared_gain", eps) if qk_norm else nn.Identity()
        self.k_norm = HeadNorm(k, d, "shared_gain", eps) if qk_norm else nn.Identity()

    def heads(self, x: Float[Tensor, "b t width"]) -> Float[Tensor, "b t heads d"]:
        """Split a projection into heads."""
        return x.unflatten(-1, (-1, self.head_dim))

    def rotate(
        self,
        q: Float[Tensor, "b t h d"],
        k: Float[Tensor, "b t h_k d"],
        positions: Int[Tensor, "#b t"] | Rotary | None,
        cache: Cache | None,
    ) -> tuple[Float[Tensor, "b t h d"], Float[Tensor, "b t h_k d"]]:
        """Apply RoPE, if there is one. Without `positions` they continue from the length of the cache."""
        if self.rope is None:
            return q, k
        if positions is None:
            seen = 0 if cache is None else cache.get_seq_length(self.layer_index)
            positions = torch.arange(q.shape[1], device=q.device)[None] + seen
        turn = positions if isinstance(positions, Rotary) else self.rotary(positions, q.dtype)
        return rotate(q, turn), rotate(k, turn)

    def rotary(self, positions: Int[Tensor, "#b t"], dtype: torch.dtype) -> Rotary:
        """Angles at `positions`, in fp32 or in `dtype` if that is wider.

        The frequencies are not a buffer: ``module.bfloat16()`` would round them, and the meta device would lose them.
        """
        assert self.rope is not None
        theta = frequencies(self.head_dim, self.rope, device=positions.device)
        return rotary(positions, theta.to(torch.promote_types(dtype, torch.float32)))

    def project(
        self,
        x: Float[Tensor, "b t D"],
        positions: Int[Tensor, "#b t"] | Rotary | None,
        cache: Cache | None,
    ) -> tuple[Float[Tensor, "b t h d"], Float[Tensor, "b n s d"], Float[Tensor, "b n s d"]]:
        """Queries of the new tokens, and keys and values of all tokens, head-major: after norms, RoPE and the cache."""
        q, k, v = self.heads(self.q_proj(x)), self.heads(self.k_proj(x)), self.heads(self.v_proj(x))
        q, k = self.rotate(self.q_norm(q), self.k_norm(k), positions, cache)
        return q, *self.remember(k, v, cache)

    def remember(
        self, k: Float[Tensor, "b t n width_k"], v: Float[Tensor, "b t m width_v"], cache: Cache | None
    ) -> tuple[Float[Tensor, "b n s width_k"], Float[Tensor, "b m s width_v"]]:
        """Append keys and values to the cache; return all of them, head-major."""
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        return (k, v) if cache is None else cache.update(k, v, self.layer_index)

    def attend(
        self,
        q: Float[Tensor, "b t h width"],
        k: Float[Tensor, "b n s width"],
        v: Float[Tensor, "b n s e"],
        mask: AttentionMask | None,
    ) -> Float[Tensor, "b t h e"]:
        """Softmax attention by this module's backend, scaled by ``1 / sqrt(d)`` whatever the width of `q`."""
        out = backends.attend(
            q.transpose(1, 2),
            k,
            v,
            mask,
            backend=self.backend,
            causal=self.causal,
            window=self.window,
            scale=self.head_dim**-0.5,
        )
        return out.transpose(1, 2)

    def output(self, heads: Float[Tensor, "b t h e"]) -> Float[Tensor, "b t D"]:
        """Concatenate the heads and project."""
        return self.o_proj(heads.flatten(2))
