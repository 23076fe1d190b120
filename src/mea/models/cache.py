"""A dynamic cache that does not copy itself at every token."""

from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class PreallocatedLayer(DynamicLayer):
    """A dynamic layer whose tensors are the filled part of larger buffers, into which new tokens are written.

    It behaves like its parent: `keys` and `values` hold only the cached tokens.

    Parameters
    ----------
    capacity
        Tokens to allocate at once, and again whenever the buffer is full.
    """

    def __init__(self, capacity: int = 1024):
        super().__init__()
        self.capacity = capacity
        self._buffers: dict[str, Tensor] = {}

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._append("keys", self.keys, key_states)
        self.values = self._append("values", self.values, value_states)
        return self.keys, self.values

    def reset(self) -> None:
        super().reset()
        self._buffers.clear()

    def _append(self, name: str, cached: Tensor | None, new: Tensor) -> Tensor:
        before = cached.shape[-2] if cached is not None and cached.numel() else 0
        total = before + new.shape[-2]
        buffer = self._buffers.get(name)
        # Beam search, batch operations and offloading replace the cached tensors: then a new buffer is allocated.
        is_ours = buffer is not None and cached is not None and before and cached.data_ptr() == buffer.data_ptr()
        if buffer is None or not is_ours or len(new) != len(buffer) or total > buffer.shape[-2]:
            room = -(-total // self.capacity) * self.capacity
            buffer = new.new_empty(*new.shape[:-2], room, new.shape[-1])
            if cached is not None and before:
                buffer[..., :before, :] = cached
            self._buffers[name] = buffer
        buffer[..., before:total, :] = new
        return buffer[..., :total, :]


class PreallocatedCache(DynamicCache):
    """A `DynamicCache` with `PreallocatedLayer` for layers with full attention; sliding layers are unchanged.

    Parameters
    ----------
    config
        Configuration of the model that the cache is for.
    capacity
        See `PreallocatedLayer`; the length of the whole generation, if known, avoids every copy.
    """

    def __init__(self, config: Any, capacity: int = 1024):
        super().__init__(config=config)
        self.layers = [PreallocatedLayer(capacity) if type(x) is DynamicLayer else x for x in self.layers]
