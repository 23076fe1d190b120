"""A quantised cache for uncompressed models, with 8, 4, 3 or 2 bits per number.

transformers' own `QuantizedCache` quantises all tokens again when its exact window is full, so that errors add up, and
it quantises the first tokens, which attention reads most. This cache quantises a block of tokens once, when the block
is complete, and keeps the first tokens as they are.

Numbers that share a scale are one channel of a block of tokens (``"channel"``) or `group` neighbouring channels of one
token (``"token"``), as in KIVI (arXiv 2402.02750). Each group stores its lowest number and the step between codes, in
bfloat16 each: as wide in range as fp32, and exact for the lowest number of a bfloat16 cache.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import BFloat16, Float
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from mea.models.packed_cache import TensorsByBatch
from mea.names import CACHE_BITS as BITS
from mea.ops import cpu
from mea.ops.codes import pack, unpack

ALONG = ("channel", "token")
NO_CROP = "a quantised cache cannot remove tokens from quantised blocks: use an ordinary cache"


@dataclass(frozen=True)
class CacheFormat:
    """How numbers are quantised.

    Attributes
    ----------
    bits
        Bits per number: 2, 3, 4 or 8. There is no kernel for 3 bits: slow, for comparisons only.
    keys, values
        Numbers that share a scale: ``"channel"`` or ``"token"``.
    block
        Tokens that are quantised together. The tokens of an incomplete block are not quantised.
    first
        Tokens at the beginning of the text that are never quantised, because attention reads them most.
    group
        Upper limit of the channels that share a scale along ``"token"``; the largest divisor of the width is used.

    Raises
    ------
    ValueError
        A number is out of range.
    """

    bits: int = 8
    keys: str = "channel"
    values: str = "token"
    block: int = 64
    first: int = 4
    group: int = 32

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ValueError(f"cached numbers can be stored in {', '.join(map(str, BITS))} bits, not in {self.bits}")
        for name in ("keys", "values"):
            if getattr(self, name) not in ALONG:
                raise ValueError(f"{name} share scales along 'channel' or 'token', not {getattr(self, name)!r}")
        if self.block < 8 or self.first < 0 or self.group < 1:
            raise ValueError(
                f"block must be at least 8 tokens, first not negative and group positive, "
                f"not {self.block}, {self.first} and {self.group}"
            )


class Store:
    """The keys or the values of one layer: first tokens, quantised complete blocks, newest tokens.

    Parameters
    ----------
    form
        See `CacheFormat`.
    along
        Numbers that share a scale here.
    """

    PARTS = ("first", "codes", "step", "low", "recent")

    def __init__(self, form: CacheFormat, along: str):
        self.form, self.along = form, along
        self.first = self.codes = self.step = self.low = self.recent = None

    def append(self, new: Float[Tensor, "b h q w"]) -> Float[Tensor, "b h t w"]:
        """Add tokens and return all tokens; the new ones are returned unquantised."""
        form = self.form
        recent = new if self.recent is None else torch.cat([self.recent, new], dim=2)
        everything = self._with_older(recent)
        if form.first and (self.first is None or self.first.shape[2] < form.first):
            held = 0 if self.first is None else self.first.shape[2]
            taken, recent = recent[:, :, : form.first - held], recent[:, :, form.first - held :]
            self.first = taken.clone() if self.first is None else torch.cat([self.first, taken], dim=2)
        complete = recent.shape[2] // form.block
        if complete:
            self._encode(recent[:, :, : complete * form.block].unflatten(2, (complete, form.block)))
            recent = recent[:, :, complete * form.block :]
        self.recent = recent.clone()  # a view would keep the whole tensor in memory
        return everything

    def change(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply a function to every stored tensor; the first dimension of each is the batch."""
        for name in self.PARTS:
            if getattr(self, name) is not None:
                setattr(self, name, function(getattr(self, name)))

    def tensors(self) -> list[Tensor]:
        """All stored tensors."""
        return [getattr(self, name) for name in self.PARTS if getattr(self, name) is not None]

    def _encode(self, blocks: Float[Tensor, "b h n block w"]) -> None:
        # [b, h, n, groups in time, tokens of a group, groups of channels, channels of a group]
        self.width = blocks.shape[-1]
        grouped = self._grouped(blocks.float())
        dims = (4, 6)
        low, high = grouped.amin(dims, keepdim=True), grouped.amax(dims, keepdim=True)
        largest = 2**self.form.bits - 1
        # Encoding uses the rounded numbers of decoding; rounded outwards, they keep all numbers within reach.
        low = _rounded(low, -torch.inf)
        step = _rounded((high - low.float()) / largest, torch.inf)
        codes = (grouped - low.float()) / torch.where(step > 0, step, 1).float()
        codes = codes.round_().clamp_(0, largest).to(torch.uint8)
        new = {"codes": pack(codes.reshape(blocks.shape), self.form.bits), "step": step, "low": low}
        for name, tensor in new.items():
            old = getattr(self, name)
            setattr(self, name, tensor if old is None else torch.cat([old, tensor], dim=2))

    def _with_older(self, recent: Float[Tensor, "b h q w"]) -> Float[Tensor, "b h t w"]:
        """The first tokens, the complete blocks, and `recent`."""
        if self.codes is None or self.step is None or self.low is None:
            return recent if self.first is None else torch.cat([self.first, recent], dim=2)
        start = 0 if self.first is None else self.first.shape[2]
        stop = start + self.codes.shape[2] * self.codes.shape[3]
        # Filled part by part: concatenation would copy the parts once more.
        everything = recent.new_empty(*recent.shape[:2], stop + recent.shape[2], recent.shape[3])
        if self.first is not None:
            everything[:, :, :start] = self.first
        self._decode(self.codes, self.step, self.low, everything[:, :, start:stop])
        everything[:, :, stop:] = recent
        return everything

    def _decode(self, codes: Tensor, step: Tensor, low: Tensor, out: Float[Tensor, "b h t w"]) -> None:
        group = None if self.along == "channel" else self._group
        if self.form.bits != 3 and cpu.usable(out, out) and (group is None or group % 16 == 0):
            cpu.decode(codes.contiguous(), step.contiguous(), low.contiguous(), out, self.form.bits, group)
            return
        # In fp32: the product of a code and a step has more digits than 16 bits hold.
        numbers = self._grouped(unpack(codes, self.form.bits, self.width).float())
        out.copy_(numbers.mul_(step.float()).add_(low.float()).view(out.shape))

    @property
    def _group(self) -> int:
        """Channels of a token that share a scale."""
        return _largest_divisor(self.width, self.form.group)

    def _grouped(self, blocks: Tensor) -> Tensor:
        """``[b, h, n, block or 1, 1 or block, w / group, group]``: dimensions 4 and 6 share a scale."""
        channel = self.along == "channel"
        return blocks.unflatten(-1, (-1, 1 if channel else self._group)).unsqueeze(3 if channel else 4)


class QuantisedLayer(TensorsByBatch, DynamicLayer):
    """One layer of a quantised cache; `keys` and `values` hold the newest tokens only."""

    is_croppable = False

    def __init__(self, form: CacheFormat):
        super().__init__()
        self.form = form
        self.length = 0
        self.stores = (Store(form, form.keys), Store(form, form.values))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.length += key_states.shape[-2]
        keys, values = (store.append(x) for store, x in zip(self.stores, (key_states, value_states), strict=True))
        self._show()
        return keys, values

    def get_seq_length(self) -> int:
        return self.length

    def stored(self) -> list[Tensor]:
        """All tensors of the layer."""
        return [tensor for store in self.stores for tensor in store.tensors()]

    def reset(self) -> None:
        self.__init__(self.form)

    def activate_past_recording(self) -> None:
        """Refused, as `crop`: assisted decoding asks for it before it reads the prompt."""
        raise NotImplementedError(NO_CROP)

    def crop(self, tokens_to_remove: int) -> None:
        raise NotImplementedError(NO_CROP)

    def _change(self, function: Callable[[Tensor], Tensor]) -> None:
        for store in self.stores:
            store.change(function)
        self._show()

    def _show(self) -> None:
        self.keys, self.values = (store.recent for store in self.stores)


class QuantisedCache(DynamicCache):
    """A quantised cache for uncompressed models: ``model.generate(..., past_key_values=QuantisedCache(...))``.

    Layers with a sliding window are not quantised: they hold few tokens.

    Parameters
    ----------
    config
        Configuration of the model that the cache is for.
    form
        The format, or only the number of bits.

    Raises
    ------
    ValueError
        As `CacheFormat`, or the model's cache is compressed already.
    """

    def __init__(self, config: Any, form: CacheFormat | int = 8):
        check_uncompressed(config)
        super().__init__(config=config)
        form = CacheFormat(form) if isinstance(form, int) else form
        self.layers = [QuantisedLayer(form) if type(x) is DynamicLayer else x for x in self.layers]


def check_uncompressed(config: Any) -> None:
    """Refuse a model with a compressed cache, which loses less at equal bytes by a smaller ``--keep``.

    Raises
    ------
    ValueError
        The model is one.
    """
    if getattr(config, "cache_code", None) or getattr(config, "latent_ranks", None):
        raise ValueError(
            "the model's cache is compressed already, and cache bits are for uncompressed models: leave out cache "
            "bits, or for fewer bytes compress the original again with mea compress MODEL OUT --keep FRACTION"
        )


def _rounded(x: Tensor, towards: float) -> BFloat16[Tensor, "..."]:
    """In bfloat16, rounded up or down; what bfloat16 holds exactly stays as it is."""
    nearest = x.bfloat16()
    wrong = nearest.float() < x if towards > 0 else nearest.float() > x
    return torch.where(wrong, nearest.nextafter(torch.full_like(nearest, towards)), nearest)


def _largest_divisor(number: int, limit: int) -> int:
    return max(divisor for divisor in range(1, min(number, limit) + 1) if number % divisor == 0)
