"""Attention over a packed cache of transform-coded keys and values.

Keys (after their norm, before RoPE) and values are centred, turned into *components* by a learned linear map, and
rounded with a number of bits for each component (`mea.ops.codes`). There are two readings.

- *predictive*: components of keys mix the heads of one rotary frequency only, as complex numbers, so that they can be
  rotated by their position when they are read: ``q_i^T R_t B c = (B^H q_i)^T R_t c``. Values are predicted from the
  rounded key components, and what the prediction misses has components of its own. No keys or values are rebuilt.
- *joint*: components of keys and values together; fewer bits at equal error, but keys are rebuilt at every reading.

The newest tokens and the first ones are read exactly (`mea.models.packed_cache`); every other token is read from its
codes, also within one pass over a whole text. Logits do not depend on how a text is split into calls.

Dimensions as in `mea.ops.latent`; ``r`` components of a token, of which ``r_k`` belong to keys in the predictive form.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer, StaticLayer

from mea.models.packed_cache import Held, PackedLayer, packed_layer
from mea.ops import cpu
from mea.ops import triton as gpu
from mea.ops.codes import wide
from mea.ops.latent import key_positions, rotate

QUERIES = 256  # queries that read together in a pass over many tokens
TOKENS = 1024  # coded tokens that are unpacked together where there is no kernel
NO_PAGES = "a compressed cache cannot be paged: use generate() instead of continuous batching"
BLOCK = 64  # tokens that share the angle of their first one in the kernel


# The base of a mixin that uses the attributes of the stock class after it.
_Stock: Any = object


class CodedAttention(_Stock):
    """Forward pass over a packed cache; comes before an architecture's attention class in the bases."""

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Attend; arguments and result as in the stock modules, without weights."""
        if kwargs.get("cache") is not None:
            raise NotImplementedError(NO_PAGES)
        queries, keys, values = self._projected(hidden_states)
        q, positions = queries.shape[2], kwargs.get("position_ids")
        dropout = self.attention_dropout if self.training else 0.0
        output = None
        if past_key_values is None:
            seen = _visible(attention_mask, len(queries), q, q)
            held, turn = self._whole(keys, values, seen), position_embeddings
        else:
            if positions is None:
                raise ValueError("a packed cache needs the new tokens' position_ids: it rotates keys when it reads")
            layer = self.packed(past_key_values)
            # No gradient passes through stored codes: a text that is read at once is read without them.
            trained = layer.total == 0 and q > 1 and torch.is_grad_enabled() and keys.requires_grad
            slots, hidden = layer.get_mask_sizes(q)
            seen = _visible(attention_mask, len(queries), q, slots)
            held = self._push(layer, keys, values, seen)
            if held is None:
                padding = None if hidden or layer.is_sliding else _padding(seen)
                held = layer.append(keys, values, self.code.encode, padding)
            if q == 1 and not dropout:
                output = self._read_one(queries, position_embeddings, held, seen, past_key_values, positions)
            if trained:
                held, turn = self._whole(keys, values, seen), position_embeddings
            else:
                turn = self._turns(held, seen, positions) if output is None else None
        if output is None:
            output = self._read_many(
                self._turned(queries, position_embeddings), keys, values, held, seen, turn, dropout
            )
        output = output.to(hidden_states.dtype).transpose(1, 2)
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), None

    def _projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values before RoPE."""
        shape = (*x.shape[:-1], -1, self.head_dim)
        queries, keys, values = (f(x).view(shape) for f in (self.q_proj, self.k_proj, self.v_proj))
        if hasattr(self, "q_norm"):
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        return queries.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)

    def _turned(self, queries: Tensor, position_embeddings: Any) -> Tensor:
        modelling = sys.modules[type(self).__mro__[2].__module__]
        return modelling.apply_rotary_pos_emb(queries, queries, *position_embeddings)[0]

    def _push(self, layer: PackedLayer, keys: Tensor, values: Tensor, seen: Tensor | None) -> Held | None:
        """Add one token in place where a kernel can do it and nothing has to be coded; None where not."""
        if keys.shape[2] != 1 or cpu is None or not cpu.usable(keys, values):
            return None
        if seen is not None and not seen[:, 0, 0, -layer.recent :].all():
            return None
        return layer.push(keys, values, cpu.push)

    def _whole(self, keys: Tensor, values: Tensor, seen: Tensor | None) -> Held:
        """A text that is read at once, without a cache: everything is exact, and what is read by its code follows."""
        first, t = 0 if self.window() else self.exact[0], keys.shape[2]
        slots = torch.arange(min(first, t), device=keys.device).expand(len(keys), -1)
        if (padding := _padding(seen)) is not None:
            slots = (slots + padding[:, None]).clamp_max(t - 1)
        index = slots[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3])
        none = keys.new_empty(len(keys), 0, 0)
        first_tokens = (keys.gather(2, index), values.gather(2, index), slots) if slots.shape[1] else (None, None, None)
        return Held(keys, values, none, none, 0, t, *first_tokens)

    def _turns(self, held: Held, seen: Tensor | None, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``[_, slots, d]`` of all slots from the first one that is held."""
        begin = min(held.begin, held.total - held.keys.shape[2])
        hidden = None if seen is None else _columns(~seen[:, 0, 0], begin, held.total, held.total)
        past = held.total - position_ids.shape[1]
        return self._rotary_at(key_positions(position_ids, hidden, past, held.total - begin), held.keys)

    def _rotary_at(self, positions: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        kind = [self.layer_type] if isinstance(self.rotary.rope_type, dict) else []
        return self.rotary(like, positions, *kind)

    def packed(self, cache: Any) -> PackedLayer:
        """The layer's own part of a cache, which is packed from now on if it is empty.

        Raises
        ------
        ValueError
            The cache is filled, or of a kind that stores tokens in its own way.
        """
        layers, tiers = cache.layers, (getattr(self.config, "cache_code", None) or {}).get("tiers", ())
        given = layers[self.layer_idx] if self.layer_idx < len(layers) else None
        wrong = any(isinstance(layer, StaticLayer) for layer in layers)
        wrong |= self.window() is not None and (given is None or type(given) is DynamicLayer)
        if None in tiers and wrong:
            raise ValueError(
                "this model packs the cache of some layers only, and its masks are made for all layers alike: give "
                "DynamicCache(config=model.config) instead of a static cache or one without windows, or none"
            )
        first, recent = self.exact
        return packed_layer(cache, self.layer_idx, first, recent, self.window())

    def window(self) -> int | None:
        """The sliding window in tokens; Mistral's attention has it in the configuration only."""
        return getattr(self, "sliding_window", getattr(self.config, "sliding_window", None))

    def _recent(self) -> int:
        window = self.window()
        return self.exact[1] if window is None else min(self.exact[1], window - 1)

    def _read_many(
        self, queries: Tensor, keys: Tensor, values: Tensor, held: Held, seen: Tensor | None, turn: Any, dropout: float
    ) -> Tensor:
        """Attention of any number of queries ``[b, h, q, d]``: all keys and values of the layer are rebuilt."""
        recent, total, q = self._recent(), held.total, queries.shape[2]
        begin, start = held.begin, total - held.keys.shape[2]  # first slots in codes, and exact
        base = min(begin, start)
        cos, sin = (x[:, -(total - base) :] for x in turn)
        exact = rotate(held.keys, cos[:, start - base :], sin[:, start - base :])
        stop = max(begin, start, total - recent)  # of the slots that some query reads by their code
        coded_keys, coded_values = exact[:, :, :0], held.values[:, :, :0]
        if stop > begin:
            slots = slice(begin - base, stop - base)
            coded_keys, coded_values = self.code.rebuild(self._components(keys, values, held, stop - begin))
            coded_keys = rotate(coded_keys, wide(cos[:, slots]), wide(sin[:, slots])).to(exact.dtype)
            coded_values = coded_values.to(exact.dtype)
        first_keys = first_values = exact[:, :, :0]
        if held.first is not None:
            # Only layers without a window have first tokens, and they hold all slots: `base` is 0.
            place = held.first.clamp_max(total - 1)[..., None].expand(-1, -1, cos.shape[-1])
            there = [x.expand(len(place), -1, -1).gather(1, place) for x in (cos, sin)]
            first_keys, first_values = rotate(held.first_keys, *there), held.first_values
        outputs = []
        for low in range(total - q, total, QUERIES):
            high = min(low + QUERIES, total)
            near, far = max(start, low - recent + 1), max(begin, min(stop, max(start, high - recent)))
            old, new = slice(0, far - begin), slice(near - start, high - start)
            read_keys = torch.cat([first_keys, coded_keys[:, :, old], exact[:, :, new]], 2)
            read_values = torch.cat([first_values, coded_values[:, :, old], held.values[:, :, new]], 2)
            rows = slice(low - total + q, high - total + q)
            mask = self._mask(held, None if seen is None else seen[:, 0, rows], (low, high), (begin, far), (near, high))
            outputs.append(
                nn.functional.scaled_dot_product_attention(
                    queries[:, :, rows], read_keys, read_values, mask, dropout, scale=self.scaling, enable_gqa=True
                )
            )
        return torch.cat(outputs, 2)

    def _components(self, keys: Tensor, values: Tensor, held: Held, count: int) -> Tensor:
        """The first components that are held as they are read, from a cache or in a pass without one."""
        if held.codes.shape[1]:
            return self.code.decode(held.codes[:, :count], held.scales[:, :count])
        return self.code.rounded(keys[:, :, :count], values[:, :, :count])

    def _mask(
        self, held: Held, seen: Tensor | None, queries: tuple[int, int], coded: tuple[int, int], exact: tuple[int, int]
    ) -> Tensor:
        """Which first, coded and exact slots the queries at these slots read, ``[b or 1, 1, q, n]``.

        A query reads the newest slots up to its own exactly, less those that a cropped cache has as codes only.
        """
        device, window, start = held.keys.device, self.window(), held.total - held.keys.shape[2]
        i = torch.arange(*queries, device=device)[:, None]
        edge = (i - self._recent()).clamp_min(start - 1)  # the newest slot that is read by its code
        reads = []
        for slots, is_exact in ((coded, False), (exact, True)):
            j = torch.arange(*slots, device=device)
            part = ((j > edge) & (j <= i) if is_exact else j <= edge)[None]
            if window is not None:
                part = part & (j > i - window)
            if seen is not None:
                part = part & _columns(seen, *slots, held.total)
            if held.first is not None and not is_exact:
                part = part & ~(j[:, None] == held.first[:, None]).any(-1)[:, None]
            reads.append(part)
        if held.first is not None:
            part = held.first[:, None] <= edge
            if seen is not None:
                place = held.first.clamp_max(held.total - 1)[:, None].expand(-1, seen.shape[1], -1)
                part = part & seen.gather(2, place)
            reads.insert(0, part)
        b = max(map(len, reads))
        return torch.cat([part.expand(b, -1, -1) for part in reads], -1)[:, None]

    def _read_one(
        self, queries: Tensor, position_embeddings: Any, held: Held, seen: Tensor | None, cache: Any,
        position_ids: Tensor,
    ) -> Tensor | None:  # fmt: skip
        """Attention of one query ``[b, h, 1, d]`` before RoPE over the codes; None where `_read_many` has to do it.

        That is with hidden tokens in the middle, few codes in a row, or old tokens beyond a sliding window.
        """
        total, recent, window = held.total, min(self._recent(), held.keys.shape[2]), self.window()
        stop = total - recent - held.begin  # codes to read
        skip, hidden = 0 if held.first is None else held.first.shape[1], None
        if stop <= skip or (window is not None and held.begin < total - window):
            return None
        if seen is not None and not seen.all():
            row = _columns(seen[:, 0, 0], held.begin, total, total)
            if (row[:, 1:] < row[:, :-1]).any() or not row[:, -recent:].all():
                return None
            hidden = ~row[:, :stop]
            if held.first is not None:
                if (held.first >= total - recent).any():
                    return None
                slots = torch.arange(held.begin, held.begin + stop, device=row.device)
                hidden = hidden | (slots[None, :, None] == held.first[:, None]).any(-1)
            skip = 0
        newest = position_ids[:, -1:]
        oldest = newest - (total - 1 - held.begin - skip)
        keys, values = held.keys[:, :, -recent:], held.values[:, :, -recent:]
        step = (position_ids, total, recent, held.first is None)
        exact = self._shared(cache, "exact", step, lambda: self._exact_angles(held, newest, recent))
        mask = None if hidden is None else hidden.to(torch.uint8)

        def coded() -> tuple[Any, Any]:
            step = (position_ids, total, skip, stop)
            return self._shared(cache, "codes", step, lambda: self._angles(oldest, stop - skip))

        if self._kernel_fits(queries, values):
            first = None if held.first is None else cpu.Exact(held.first_keys, held.first_values)
            return self.code.reader(cpu.PackedReader).read(
                queries[:, :, 0], cpu.Exact(keys, values), first, held.codes, held.scales, skip, stop - skip,
                mask, cpu.Angles(*coded(), exact), self.scaling,
            )[:, :, None]  # fmt: skip
        queries = self._turned(queries, position_embeddings)
        if self._gpu_fits(queries, held.codes):
            tokens = gpu.CodedTokens(held.codes, held.scales, skip, stop - skip, mask)
            reader = self.code.reader(gpu.PackedReader)
            average, weight = (x[:, :, 0] for x in reader.read(queries, tokens, gpu.Angles(*coded()), self.scaling))
        else:
            average, weight = self._read_codes(queries, held, skip, stop - skip, hidden, oldest)
        if held.first is not None:
            keys, values = torch.cat([held.first_keys, keys], 2), torch.cat([held.first_values, values], 2)
        return self._joined(queries, keys, values, exact, average, weight)[:, :, None]

    def _joined(
        self, queries: Tensor, keys: Tensor, values: Tensor, turn: tuple[Tensor, Tensor], average: Tensor,
        weight: Tensor, seen: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Attention ``[b, h, d]`` of one query over coded tokens, given their averages, and over exact ones.

        `queries` ``[b, h, 1, d]`` are turned; `keys` ``[b, g, t, d]`` are not, by cosines and sines ``[_, t, d / 2]``.
        `seen` ``[b, t]`` says which exact tokens there are.
        """
        (b, h, _, d), g = queries.shape, keys.shape[1]
        keys = rotate(wide(keys), *(torch.cat([x, x], -1) for x in turn))
        scores = wide(queries).reshape(b, g, h // g, d) @ keys.mT * self.scaling
        if seen is not None:
            scores = scores.masked_fill(~seen[:, None, None], float("-inf"))
        share = torch.sigmoid(weight - scores.logsumexp(-1).flatten(1))[..., None]  # of the coded tokens
        output = (scores.softmax(-1) @ wide(values)).reshape(b, h, d)
        return torch.lerp(output, self.code.unmix(average), share)

    def _exact_angles(self, held: Held, newest: Tensor, recent: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``[b or 1, t, d / 2]`` of the first and the newest tokens."""
        positions = torch.arange(-recent + 1, 1, device=newest.device) + newest
        if held.first is not None:
            first = (newest - (held.total - 1) + held.first).expand(max(len(positions), len(held.first)), -1)
            positions = torch.cat([first, positions.expand(len(first), -1)], 1)
        cos, sin = self._rotary_at(positions, wide(held.keys[:0]))
        return cos[..., : self.head_dim // 2].contiguous(), sin[..., : self.head_dim // 2].contiguous()

    def _shared(self, cache: Any, name: str, step: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """What all layers of a step share; `step` tells it apart, its first member by identity."""
        if torch.compiler.is_compiling():
            return make()
        kind = self.layer_type if isinstance(self.rotary.rope_type, dict) else None
        known = vars(cache).setdefault("shared_by_layers", {})
        found = known.get((name, kind))
        if found is None or found[0][0] is not step[0] or found[0][1:] != step[1:]:
            known[name, kind] = found = step, make()
        return found[1]

    def _read_codes(
        self, queries: Tensor, held: Held, skip: int, count: int, hidden: Tensor | None, position: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Averages ``[b, h, r]`` of coded tokens from `skip` on, and the logarithm of their weight ``[b, h]``.

        `position` ``[b, 1]`` is that of the first of these tokens.
        """
        code = self.code
        b, h = queries.shape[:2]
        best = wide(queries[..., 0, :1]).new_full((b, h, 1), torch.finfo(torch.float32).min)
        total, average = torch.zeros_like(best), torch.zeros((), dtype=best.dtype, device=best.device)
        for low in range(skip, skip + count, TOKENS):
            high = min(low + TOKENS, skip + count)
            components = code.decode(held.codes[:, low:high], held.scales[:, low:high]).to(wide(queries[:0]).dtype)
            positions = position + torch.arange(low - skip, high - skip, device=position.device)
            turn = self._rotary_at(positions, components)
            scores = code.scores(queries, components, *turn)[:, :, 0] * self.scaling
            if hidden is not None:
                scores = scores.masked_fill(hidden[:, None, low:high], torch.finfo(scores.dtype).min)
            top = torch.maximum(best, scores.amax(-1, keepdim=True))
            weights = (scores - top).exp()
            if hidden is not None:
                weights = weights.masked_fill(hidden[:, None, low:high], 0)
            before = (best - top).exp()
            total, best = weights.sum(-1, keepdim=True) + total * before, top
            average = weights @ components + average * before
        return average / total.clamp_min(1e-30), (best + total.clamp_min(1e-30).log())[..., 0]

    def _kernel_fits(self, queries: Tensor, values: Tensor) -> bool:
        code = self.code
        if cpu is None or not self._adds_angles():
            return False
        return code.value_decoder.dtype == values.dtype and cpu.codes_usable(queries[:, :, 0], code.groups)

    def _gpu_fits(self, queries: Tensor, codes: Tensor) -> bool:
        if gpu is None or not self._adds_angles() or not gpu.usable(queries, codes):
            return False
        return gpu.fits(self.code.groups, len(getattr(self.code, "frequency", ())))

    def _adds_angles(self) -> bool:
        """Whether angles of positions may be added, as kernels do: some scalings change them with the text's length."""
        kind = str(self.rotary.rope_type)
        return "dynamic" not in kind and "longrope" not in kind

    def _angles(self, position: Tensor, count: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Cosines and sines of the blocks of `count` tokens from `position` ``[b, 1]`` on, and of places in a block."""
        half, device = self.head_dim // 2, position.device
        like = torch.empty(0, device=device)
        base = self._rotary_at(position + torch.arange(-(-count // BLOCK), device=device) * BLOCK, like)
        cos, sin = (x[0, :, :half] for x in self._rotary_at(torch.arange(BLOCK, device=device)[None], like))
        factor = cos[0, 0]  # of attention scaling, which `base` has
        cut = [x[..., :half].contiguous() for x in base]
        return (cut[0], cut[1]), (cos / factor, sin / factor)


def _visible(mask: Any, batch: int, queries: int, slots: int) -> Tensor | None:
    """What each new token sees, ``[b, 1, q, slots]``, or None for everything before it.

    Masks of transformers are boolean, added to scores, or (flash attention) ``[b, slots]``. A mask for a longer cache
    than there is, such as an empty static one, is cut.
    """
    if mask is None:
        return None
    if mask.dim() == 2:
        mask = (mask != 0)[:, None, None, -slots:]
        i = torch.arange(slots - queries, slots, device=mask.device)[:, None]
        return mask & (torch.arange(slots, device=mask.device) <= i)
    mask = mask[..., :slots].expand(batch, -1, -1, -1)
    return mask > torch.finfo(mask.dtype).min / 2 if mask.is_floating_point() else mask != 0


def _padding(seen: Tensor | None) -> Tensor | None:
    """How many leading slots of each row no query sees; None where every row begins with a token."""
    if seen is None:
        return None
    leading = (~seen.any(2)[:, 0]).long().cumprod(-1).sum(-1)
    return leading if bool(leading.any()) else None


def _columns(rows: Tensor, low: int, high: int, total: int) -> Tensor:
    """The columns of slots ``low .. high - 1`` of a mask whose last column is slot ``total - 1``.

    Slots before its first column are hidden.
    """
    offset = total - rows.shape[-1]
    columns = rows[..., max(0, low - offset) : max(0, high - offset)]
    return nn.functional.pad(columns, (high - low - columns.shape[-1], 0))
