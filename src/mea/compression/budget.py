"""Ranks of each layer for a budget of cache bytes.

A layer's *ranks* are ``(r_k, r_v)``, the numbers cached per token for keys and for values; None leaves the layer
uncompressed. Methods are compared at equal cache bytes, so the bytes of a layout are exact, and tests compare them with
the cache of the real model.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mea.arguments import check_keep
from mea.models.packed_cache import packed_tokens
from mea.names import LAYOUTS as PRESETS
from mea.names import size
from mea.ops.codes import Tiers, bits_per_token
from mea.records import read_json

Ranks = tuple[int, int] | None
CONTEXT = 8192  # tokens at which a packed cache keeps its promise of bytes
FIRST, RECENT = 4, 64  # tokens of a packed cache that are exact
LEAST_BITS = 0.5  # a number, of codes: below, no model was of use


@dataclass(frozen=True)
class CacheShape:
    """Shape of an uncompressed model's cache.

    Attributes
    ----------
    num_kv_heads, head_dim
        ``h_kv`` and ``d``.
    windows
        Per layer the sliding window in tokens, or None for full attention.
    itemsize
        Bytes of one cached number.
    """

    num_kv_heads: int
    head_dim: int
    windows: tuple[int | None, ...]
    itemsize: int

    @classmethod
    def of(cls, config: Any, itemsize: int) -> "CacheShape":
        """Read the shape from a Hugging Face configuration."""
        kinds = getattr(config, "layer_types", None) or [None] * config.num_hidden_layers
        window = getattr(config, "sliding_window", None)
        # Mistral has no layer types: its window applies to every layer.
        windows = tuple(window if kind in (None, "sliding_attention") else None for kind in kinds)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(config.num_key_value_heads, head_dim, windows, itemsize)

    @property
    def width(self) -> int:
        """Numbers per token and layer for the keys, and the same for the values: ``h_kv * d``."""
        return self.num_kv_heads * self.head_dim

    def tokens(self, layer: int, context: int) -> int:
        """Tokens that a layer caches after `context` tokens: a sliding layer drops tokens outside its window."""
        window = self.windows[layer]
        return context if window is None else min(context, window - 1)

    def bytes(self, context: int) -> int:
        """Bytes of the uncompressed cache after `context` tokens of one sequence."""
        return Layout((None,) * len(self.windows)).bytes(self, context)


@dataclass(frozen=True)
class Layout:
    """Ranks per layer."""

    ranks: tuple[Ranks, ...]

    def bytes(self, shape: CacheShape, context: int) -> int:
        """Bytes of the cache after `context` tokens of one sequence."""
        return shape.itemsize * sum(
            (2 * shape.width if ranks is None else sum(ranks)) * shape.tokens(layer, context)
            for layer, ranks in enumerate(self.ranks)
        )

    def described(self) -> dict[str, Any]:
        """The entries for records."""
        return {"ranks": [None if pair is None else list(pair) for pair in self.ranks]}

    def keep(self, shape: CacheShape) -> float:
        """Bytes as a fraction of the uncompressed cache, while no sliding window is full."""
        return self.bytes(shape, 1) / shape.bytes(1)

    def bytes_per_token(self, shape: CacheShape) -> float:
        """Bytes for each token of a context."""
        return float(self.bytes(shape, 1))


@dataclass(frozen=True)
class CodedLayout(Layout):
    """A packed cache (`mea.models.packed_cache`): bits of components instead of ranks.

    Attributes
    ----------
    ranks
        None for ordinary layers; all numbers of the other layers are coded.
    budget
        Bytes of the whole cache after `context` tokens of one sequence.
    first, recent
        Tokens that are exact.
    tiers
        Of the layers' sections of components, once they are known; None for ordinary layers.
    """

    budget: int = 0
    context: int = CONTEXT
    first: int = FIRST
    recent: int = RECENT
    tiers: tuple[tuple[Tiers, ...] | None, ...] = ()

    def bytes(self, shape: CacheShape, context: int) -> int:
        """Bytes after `context` tokens of one sequence; in proportion to the budget while bits are not known."""
        if not self.tiers:
            return round(self.budget * context / self.context)
        coded = sum(
            packed_tokens(self.recent, context, shape.windows[layer])[0] * sum(map(token_bytes, tiers))
            for layer, tiers in enumerate(self.tiers)
            if tiers is not None
        )
        return coded + self.exact_bytes(shape, context)

    def described(self) -> dict[str, Any]:
        """The entries for records."""
        tiers = [None if layer is None else [list(tier) for tier in layer] for layer in self.tiers]
        numbers = next(2 * pair[0] for pair in self.ranks if pair)
        return {
            "tiers": tiers, "numbers": numbers, "context": self.context, "first": self.first, "recent": self.recent,
        }  # fmt: skip

    def bytes_per_token(self, shape: CacheShape) -> float:
        """Bytes for each token of a text of `context` tokens."""
        return self.bytes(shape, self.context) / self.context

    def exact_bytes(self, shape: CacheShape, context: int) -> int:
        """Bytes of ordinary layers, and of exact tokens in the others."""
        total = 0
        for layer, ranks in enumerate(self.ranks):
            window, tokens = shape.windows[layer], shape.tokens(layer, context)
            if ranks is not None:
                coded, newest = packed_tokens(self.recent, context, window)
                tokens = newest + (self.first if coded and window is None else 0)
            total += 2 * shape.width * shape.itemsize * tokens
        return total

    def coded_tokens(self, shape: CacheShape) -> list[int]:
        """Tokens of each layer that there is memory for in codes, at `context`."""
        return [packed_tokens(self.recent, self.context, window)[0] for window in shape.windows]

    def keep(self, shape: CacheShape) -> float:
        """Bytes after `context` tokens as a fraction of the cache in 16 bits."""
        return self.bytes(shape, self.context) / bytes_in_16_bits(shape, self.context)


def token_bytes(tiers: Tiers) -> int:
    """Bytes of a token's codes and scales in one section."""
    return bits_per_token(tiers) // 8


def bytes_in_16_bits(shape: CacheShape, context: int) -> int:
    """Bytes of the uncompressed cache with 16 bits a number, the unit of `keep` in packed caches."""
    return shape.bytes(context) * 2 // shape.itemsize


def coded_layout(shape: CacheShape, keep: float, context: int, layers: range | None = None) -> CodedLayout:
    """A packed cache with a fraction `keep` of the 16-bit bytes of `layers` at `context` tokens, others ordinary.

    Raises
    ------
    ValueError
        `keep` is not a fraction, or exact tokens alone take more.
    """
    check_keep(keep)
    count, width = len(shape.windows), shape.width
    coded = set(range(count) if layers is None else layers)
    ranks = tuple((width, width) if layer in coded else None for layer in range(count))
    numbers = {layer: 2 * width * shape.tokens(layer, context) for layer in range(count)}
    ordinary = sum(shape.itemsize * numbers[layer] for layer in range(count) if layer not in coded)
    budget = ordinary + int(keep * 2 * sum(numbers[layer] for layer in coded))
    return _with_room(CodedLayout(ranks, budget, context), shape, f"keep {keep:g}")


def coded_layout_for_bytes(shape: CacheShape, context: int, budget: int) -> CodedLayout:
    """A packed cache that takes at most `budget` bytes after `context` tokens.

    Raises
    ------
    ValueError
        Exact tokens alone take more.
    """
    ranks = ((shape.width, shape.width),) * len(shape.windows)
    return _with_room(CodedLayout(ranks, budget, context), shape, f"{size(budget)} for {context:,} tokens")


def _with_room(layout: CodedLayout, shape: CacheShape, what: str) -> CodedLayout:
    exact = layout.exact_bytes(shape, layout.context)
    tokens = sum(count for count, pair in zip(layout.coded_tokens(shape), layout.ranks, strict=True) if pair)
    least = exact + int(tokens * LEAST_BITS * 2 * shape.width / 8)
    if layout.budget < least:
        whole = bytes_in_16_bits(shape, layout.context)
        raise ValueError(
            f"no packed cache meets {what}: this allows {size(layout.budget)} at {layout.context:,} tokens, and "
            f"the smallest packed cache takes {size(least)}, {math.ceil(1000 * least / whole) / 10} % of the 16-bit "
            f"cache ({layout.first} first and {layout.recent} newest tokens exact, {LEAST_BITS} bits per number for "
            "the others); allow more bytes or a longer context"
        )
    # 8 bits for every component, in one or two sections.
    widest = max(token_bytes((2 * shape.width, 0, 0)), 2 * token_bytes((shape.width, 0, 0)))
    return replace(layout, budget=min(layout.budget, exact + tokens * widest))


@dataclass(frozen=True)
class Step:
    """The smallest change of a layer's ranks that a method allows.

    Attributes
    ----------
    size
        Numbers per step.
    paired
        A step adds to both ranks, so that ``r_k = r_v``: common attention kernels are fast only then. Otherwise (whole
        heads) steps alternate, and the last of an odd number goes to the values.
    """

    size: int
    paired: bool = True

    def ranks(self, steps: int) -> tuple[int, int]:
        """``(r_k, r_v)`` of a layer with this number of steps."""
        if self.paired:
            return self.size * steps, self.size * steps
        return self.size * (steps // 2), self.size * (steps - steps // 2)

    @property
    def numbers(self) -> int:
        """Numbers per token that one step adds to a layer."""
        return self.size * (2 if self.paired else 1)


def layout_for_keep(shape: CacheShape, keep: float, step: Step, layers: range | None = None) -> Layout:
    """The largest equal ranks with at most a fraction `keep` of the uncompressed bytes of `layers`, at any length.

    Raises
    ------
    ValueError
        `keep` is not a fraction, or no layout is that small.
    """
    check_keep(keep)
    layers = range(len(shape.windows)) if layers is None else layers
    numbers = int(2 * shape.width * keep * len(layers) + 1e-9)
    spread = _spread(shape, numbers, [1] * len(layers), step, f"keep {keep:g}", _shortest_first(shape, layers))
    ranks: list[Ranks] = [None] * len(shape.windows)
    for layer, steps in zip(layers, spread, strict=True):
        ranks[layer] = step.ranks(steps)
    return Layout(tuple(ranks))


def layout_for_bytes(shape: CacheShape, context: int, budget: int, step: Step) -> Layout:
    """The largest equal ranks whose cache of `context` tokens takes at most `budget` bytes.

    Raises
    ------
    ValueError
        No layout is that small.
    """
    tokens = [shape.tokens(layer, context) for layer in range(len(shape.windows))]
    spread = _spread(shape, budget // shape.itemsize, tokens, step, f"{budget} bytes for {context} tokens")
    return Layout(tuple(step.ranks(steps) for steps in spread))


def _shortest_first(shape: CacheShape, layers: range) -> list[int]:
    """Indices into `layers`, sliding layers first: spare steps there do not add bytes at long contexts."""
    return sorted(range(len(layers)), key=lambda index: shape.windows[layers[index]] or math.inf)


def _spread(
    shape: CacheShape, numbers: int, weights: list[int], step: Step, what: str, order: list[int] | None = None
) -> list[int]:
    """Give every layer the same number of steps, then one more step to each layer in turn while the budget allows.

    `weights` are the tokens that each layer caches; `numbers` is the budget; `order` is the order of the spare steps,
    by default from the first layer on.
    """
    least, most = (1, shape.width // step.size) if step.paired else (2, 2 * shape.width // step.size)
    cost = [weight * step.numbers for weight in weights]
    even = min(most, numbers // sum(cost))
    if even < least:
        smallest = least * sum(cost) * shape.itemsize
        raise ValueError(
            f"no layout meets {what}: the smallest takes {smallest} bytes, and {numbers * shape.itemsize} are allowed; "
            f"allow more bytes, or use a method with finer steps than {step.size} numbers"
        )
    steps, left = [even] * len(cost), numbers - even * sum(cost)
    dealt = True
    while dealt:
        dealt = False
        for layer in order or range(len(cost)):
            if steps[layer] < most and cost[layer] <= left:
                steps[layer] += 1
                left -= cost[layer]
                dealt = True
    return steps


def preset_layout(shape: CacheShape, name: str, step: Step, keep: float = 0.5) -> Layout:
    """The layouts of arXiv 2601.19611: half of the heads in all layers, in the middle half, or in all but the first 3.

    Raises
    ------
    ValueError
        There is no such layout.
    """
    return layout_for_keep(shape, keep, step, preset_layers(shape, name))


def preset_layers(shape: CacheShape, name: str) -> range:
    """The layers that a layout of arXiv 2601.19611 compresses.

    Raises
    ------
    ValueError
        There is no such layout.
    """
    count = len(shape.windows)
    if name not in PRESETS:
        raise ValueError(f"the named layouts are {', '.join(PRESETS)}, not {name!r}")
    # "half" was layers 12 to 35 of 48, counted from 1.
    layers = {
        "full": range(count),
        "half": range(11 * count // 48, max(1, 35 * count // 48)),
        "deep": range(min(3, count - 1), count),
    }
    return layers[name]


def read_layout(path: Path, shape: CacheShape, step: Step) -> Layout:
    """Read a JSON file: a list with ``[r_k, r_v]`` or ``null`` per layer.

    Raises
    ------
    ValueError
        The file is not such a list, or a rank is impossible for the model or the method.
    """
    try:
        entries = read_json(path)
    except FileNotFoundError:
        raise ValueError(f"no layout {str(path)!r}: give {', '.join(PRESETS)} or a JSON file of ranks") from None
    count = len(shape.windows)
    if not isinstance(entries, list) or len(entries) != count:
        raise ValueError(f"{path} must hold a list of {count} entries, [r_k, r_v] or null for each layer")
    for layer, entry in enumerate(entries):
        fits = entry is None or (
            isinstance(entry, list)
            and len(entry) == 2
            and all(type(r) is int and 0 < r <= shape.width and r % step.size == 0 for r in entry)
        )
        if not fits:
            raise ValueError(
                f"{path}, layer {layer}: ranks are null or two multiples of {step.size} from {step.size} to "
                f"{shape.width} (h_kv * d), not {entry!r}"
            )
    return Layout(tuple(None if entry is None else (entry[0], entry[1]) for entry in entries))
