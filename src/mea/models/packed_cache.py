"""The packed cache of one layer: codes of old tokens, the newest tokens and the first ones as they are.

A model with such a cache creates it by itself: its attention replaces every empty layer of the given cache by a
`PackedLayer`, so that ``generate``, pipelines and ``model(ids, use_cache=True)`` need no argument.

A query reads a token exactly if it is among the `recent` tokens up to its own or among the first ones, and from its
codes otherwise. Neither padding nor the split of a text into calls changes this. Tokens are coded once, from their
exact numbers, `recent` of them at a time.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

CHUNK = 256  # tokens by which the memory for codes grows


class TensorsByBatch:
    """Operations of a cache layer that change all of its tensors alike; the first dimension of each is the batch.

    A class with it defines `_change`, which applies a function to every tensor.
    """

    is_initialized: bool
    device: Any

    def _change(self, function: Callable[[Tensor], Tensor]) -> None:
        raise NotImplementedError

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put the rows in another order, for beam search."""
        self._change(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self._change(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        self._change(lambda tensor: tensor[indices])

    def offload(self) -> None:
        """Move everything to the CPU."""
        self._change(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move everything back."""
        if self.is_initialized:
            self._change(lambda tensor: tensor.to(self.device, non_blocking=True))


class Held(NamedTuple):
    """Contents of a layer during one call, new tokens included. Slots count tokens and padding from 0.

    Attributes
    ----------
    keys, values
        Exact, ``[b, g, m, d]``, of slots ``total - m .. total - 1``; keys before RoPE.
    codes, scales
        ``[b, n, _]``, of slots ``begin .. begin + n - 1``, see `mea.ops.codes.to_codes`.
    first_keys, first_values
        Exact, ``[b, g, f, d]``, of the slots `first` ``[b, f]``.
    """

    keys: Tensor
    values: Tensor
    codes: Tensor
    scales: Tensor
    begin: int
    total: int
    first_keys: Any
    first_values: Any
    first: Any  # None where there are no first tokens yet, as the two before


class PackedLayer(TensorsByBatch, DynamicLayer):
    """One layer of a packed cache; ``keys`` and ``values`` hold the newest tokens only, keys before RoPE.

    Parameters
    ----------
    first, recent
        Numbers of first and of newest tokens that are kept exactly. Layers with a sliding window keep no first tokens.
    window
        Sliding window in tokens, or None.
    """

    keys: Any
    values: Any
    PARTS = ("keys", "values", "codes", "scales", "first_keys", "first_values", "skipped")

    def __init__(self, first: int, recent: int, window: int | None = None):
        super().__init__()
        self.is_sliding = window is not None
        self.sliding_window = window
        self.first_count = 0 if window else first
        self.recent = recent if window is None else min(recent, window - 1)
        self.record_past = False
        self._clear()

    def _clear(self) -> None:
        self.codes: Any = None
        self.scales: Any = None
        self.first_keys: Any = None
        self.first_values: Any = None
        self.skipped: Tensor | None = None  # leading slots of each row that are padding
        self.begin = self.coded = self.total = 0  # first slot held in codes, slots coded, slots seen

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError(
            "this cache belongs to a model with a packed cache: give other models an empty cache of their own"
        )

    def append(
        self, keys: Tensor, values: Tensor, encode: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        padding: Tensor | None = None,
    ) -> Held:  # fmt: skip
        """Add tokens and return everything that they and their queries may read.

        `padding` ``[b]`` counts the leading slots of each row that no query sees.
        """
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
            self.keys, self.values = keys[:, :, :0], values[:, :, :0]
        if (padding is not None and self.total < int(padding.max()) + 1) or self.total == 0:
            self.skipped = padding
        keys, values = torch.cat([self.keys, keys], 2), torch.cat([self.values, values], 2)
        start = self.total - self.keys.shape[2]
        self.total = start + keys.shape[2]
        end = self.begin + self.coded
        if self.total - self.recent > end:
            stop = min(self.total, end + -(-(self.total - self.recent - end) // self.recent) * self.recent)
            fresh = slice(end - start, stop - start)
            self._keep_first(keys[:, :, fresh], values[:, :, fresh], end)
            self._store(*encode(keys[:, :, fresh], values[:, :, fresh]))
        held = self._held(keys, values)
        self.keys, self.values = keys, values
        if not self.record_past:
            self._forget()
        return held

    def push(self, keys: Tensor, values: Tensor, move: Callable[[Any, Any], None]) -> Held | None:
        """As `append` for one token that `move` adds to the exact ones in place; None if `append` is needed.

        `append` is needed if tokens have to be coded, if the layer does not hold exactly `recent` exact tokens, if it
        has a sliding window, or if it records the past.
        """
        if (
            not self.is_initialized
            or self.total + 1 - self.recent > self.begin + self.coded
            or self.keys.shape[2] != self.recent
            or self.record_past
            or self.is_sliding
            or not (self.keys.is_contiguous() and self.values.is_contiguous())
        ):
            return None
        move((self.keys, self.values), (keys, values))
        self.total += 1
        return self._held(self.keys, self.values)

    def _held(self, keys: Tensor, values: Tensor) -> Held:
        first = self.first_keys, self.first_values, self._first_slots()
        return Held(keys, values, *self._coded(), self.begin, self.total, *first)

    def _coded(self) -> tuple[Tensor, Tensor]:
        if self.codes is None:
            empty = self.keys.new_empty(self.keys.shape[0], 0, 0, dtype=torch.uint8)
            return empty, empty.bfloat16()
        return self.codes[:, : self.coded], self.scales[:, : self.coded]

    def _store(self, codes: Tensor, scales: Tensor) -> None:
        """Write behind the stored codes, in memory that grows by `CHUNK` tokens."""
        end = self.coded + codes.shape[1]
        for name, new in (("codes", codes), ("scales", scales)):
            old = getattr(self, name)
            if old is None or old.shape[1] < end:
                larger = new.new_zeros(new.shape[0], -(-end // CHUNK) * CHUNK, new.shape[2])
                if old is not None:
                    larger[:, : self.coded] = old[:, : self.coded]
                setattr(self, name, larger)
            getattr(self, name)[:, self.coded : end] = new
        self.coded = end

    def _keep_first(self, keys: Tensor, values: Tensor, slot: int) -> None:
        """Copy those of the tokens from `slot` on that are the first of their row."""
        if not self.first_count or (self.skipped is None and slot >= self.first_count):
            return
        if self.first_keys is None:
            shape = (*keys.shape[:2], self.first_count, keys.shape[3])
            self.first_keys, self.first_values = keys.new_zeros(shape), values.new_zeros(shape)
        place = self._slots(keys) - slot
        here = ((place >= 0) & (place < keys.shape[2]))[:, None, :, None]
        index = place.clamp(0, keys.shape[2] - 1)[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3])
        self.first_keys = torch.where(here, keys.gather(2, index), self.first_keys)
        self.first_values = torch.where(here, values.gather(2, index), self.first_values)

    def _slots(self, like: Tensor) -> Tensor:
        slots = torch.arange(self.first_count, device=like.device).expand(like.shape[0], -1)
        return slots if self.skipped is None else slots + self.skipped[:, None]

    def _first_slots(self) -> Tensor | None:
        return None if self.first_keys is None else self._slots(self.first_keys)

    def _forget(self) -> None:
        """Drop exact tokens that are no longer new, and codes outside the sliding window with their memory."""
        if self.keys.shape[2] > self.recent:
            self.keys, self.values = (x[:, :, -self.recent :].clone() for x in (self.keys, self.values))
        if self.sliding_window is None:
            return
        outside = min(self.coded, self.total - self.sliding_window + 1 - self.begin)
        if outside > 0:
            self.begin, self.coded = self.begin + outside, self.coded - outside
            size = -(-self.coded // CHUNK) * CHUNK
            for name in ("codes", "scales"):
                old = getattr(self, name)
                kept = old.new_zeros(old.shape[0], size, old.shape[2])
                kept[:, : self.coded] = old[:, outside : outside + self.coded]
                setattr(self, name, kept)

    def get_seq_length(self) -> int:
        return self.total

    def get_max_length(self) -> int:
        return -1 if self.sliding_window is None else self.sliding_window

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        seen = 0 if self.sliding_window is None else max(self.total - self.sliding_window + 1, 0)
        return self.total - seen + query_length, seen

    def stored(self) -> list[Tensor]:
        """All tensors of the layer."""
        return [x for name in self.PARTS if (x := getattr(self, name)) is not None]

    def reset(self) -> None:
        self.keys = self.values = None
        self.is_initialized = False
        self._clear()

    def activate_past_recording(self) -> None:
        """Keep exact tokens and the codes of those outside the sliding window until the next `crop`."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest tokens. If the past was recorded, the rest reads as if they had never been added.

        Otherwise tokens that are no longer held exactly are read from their codes, even where they are newest again.

        Raises
        ------
        ValueError
            The number is positive, or larger than the cache.
        RuntimeError
            A sliding window has dropped tokens that would be visible again.
        """
        if tokens_to_remove > 0 or -tokens_to_remove > self.total:
            raise ValueError(f"give minus the number of tokens to remove, at most {self.total}, not {tokens_to_remove}")
        if self.is_initialized and tokens_to_remove:
            if self.begin > max(0, self.total + tokens_to_remove + 1 - (self.sliding_window or 0)):
                raise RuntimeError(
                    "a full sliding window can be cropped only back to where activate_past_recording() was called: "
                    "older tokens are gone"
                )
            self.total += tokens_to_remove
            self.keys, self.values = self.keys[:, :, :tokens_to_remove], self.values[:, :, :tokens_to_remove]
            self.coded = min(self.coded, self.total - self.begin)
        if self.record_past and self.is_initialized:
            self._forget()

    def _change(self, function: Callable[[Tensor], Tensor]) -> None:
        for name in self.PARTS:
            if (tensor := getattr(self, name)) is not None:
                setattr(self, name, function(tensor))


def packed_layer(cache: Any, index: int, first: int, recent: int, window: int | None) -> PackedLayer:
    """The packed layer of a cache; it takes the place of an empty ordinary layer.

    Raises
    ------
    ValueError
        The layer holds tokens of another model, or is of a kind that stores tokens in its own way.
    """
    layers = cache.layers
    while len(layers) <= index:
        layers.append(DynamicLayer())
    layer = layers[index]
    if isinstance(layer, PackedLayer):
        return layer
    ordinary = type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) or isinstance(layer, StaticLayer)
    if not ordinary or (layer.is_initialized and int(layer.get_seq_length()) > 0):
        held = "tokens of another model" if ordinary else f"a layer of its own kind ({type(layer).__name__})"
        raise ValueError(
            f"this model packs its cache by itself, and the given cache has {held}: give an empty DynamicCache, or none"
        )
    layers[index] = packed = PackedLayer(first, recent, window)
    packed.record_past = getattr(layer, "record_past", False)
    return packed


def all_dynamic(cache: Any) -> None:
    """Replace empty static layers by dynamic ones: transformers makes one mask for all layers of a cache."""
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, StaticLayer) and not (layer.is_initialized and int(layer.get_seq_length()) > 0):
            sliding = layer.is_sliding
            cache.layers[index] = DynamicSlidingWindowLayer(layer.max_cache_len) if sliding else DynamicLayer()


def packed_tokens(recent: int, context: int, window: int | None = None) -> tuple[int, int]:
    """Tokens for which a layer has memory for codes, and exact newest tokens, after a text of `context` tokens."""
    recent = recent if window is None else min(recent, window - 1)
    due = max(0, context - recent)
    coded = min(context, -(-due // recent) * recent)
    if window is not None:
        coded -= max(0, min(coded, context - window + 1))
    return -(-coded // CHUNK) * CHUNK, min(context, recent)
