"""Pages of a packed cache in vLLM: what they hold, how large they are, and when they are freed.

A query reads a token exactly if it is among the `recent` newest ones up to its own or among the `first` ones, and by
its code otherwise. So vLLM gets two caches for the whole model, both of pages of the same size:

- *codes* of all tokens, as full attention;
- *exact* keys before RoPE and values, as a sliding window of `recent` tokens whose first blocks stay.

A page holds a block of tokens of all layers, one layer after the other: layers whose codes differ in size need no
padding. A token gets both entries when it arrives: a code depends on nothing but its token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import lcm
from typing import Any, NamedTuple

import torch
from torch import Tensor
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.utils.math_utils import cdiv, round_up
from vllm.v1.core.kv_cache_utils import resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry, register_kv_cache_spec

LARGEST_BLOCK = 256  # tokens; prefix-cache hits end at multiples of both block sizes
CHECKPOINT = 512  # tokens, about, between places inside a long prefill where prefix-cache hits may end


class Blocks(NamedTuple):
    """Tokens of a block of codes and of a block of exact tokens, and the bytes of a page for either."""

    codes: int
    exact: int
    page: int

    def alignment(self) -> int:
        """Prefix-cache hits end at multiples of so many tokens."""
        return lcm(self.codes, self.exact)


def window_blocks(tokens: int, block: int) -> int:
    """Blocks that hold `tokens` neighbouring tokens, at most."""
    return cdiv(tokens, block) + 1


def held_blocks(blocks: Blocks, first: int, recent: int, batches: int) -> int:
    """Blocks of exact tokens that a request holds at most, with so many `batches` in flight.

    They are the first ones, the window of the next query, and those that a running batch fills: its newest tokens,
    from the window before the last place on where a prefix-cache hit may end.
    """
    written = window_blocks(recent + blocks.alignment() - 2, blocks.exact)
    return cdiv(first, blocks.exact) + window_blocks(recent - 1, blocks.exact) + batches * written


def choose_blocks(
    code_bytes: int, exact_bytes: int, first: int, recent: int, length: int, batches: int, multiple: int = 4
) -> Blocks:
    """The block sizes with which a request of `length` tokens takes the least memory.

    Parameters
    ----------
    code_bytes, exact_bytes
        Bytes of codes and of exact numbers of one token, all layers together.
    multiple
        The number of tokens in a block of codes is a multiple of this.
    """
    best, least = None, 0
    for codes in range(max(16, multiple), LARGEST_BLOCK + 1, multiple):
        for exact in range(1, 65):
            page = round_up(max(codes * code_bytes, exact * exact_bytes), 16)
            blocks = Blocks(codes, exact, page)
            if blocks.alignment() > LARGEST_BLOCK:
                continue
            cost = page * (cdiv(length, codes) + held_blocks(blocks, first, recent, batches))
            if best is None or cost < least:
                best, least = blocks, cost
    assert best is not None
    return best


class ExactTokensManager(SlidingWindowManager):
    """Keeps the blocks of the first tokens, and of a chunk only those whose tokens will be read from pages.

    Queries of a chunk have the chunk's own keys and values at hand. So blocks in its middle stay empty, except before
    `CHECKPOINT` multiples where the pool has room: a later prompt that shares the text resumes there.
    """

    def __init__(self, kv_cache_spec: Any, **kwargs: Any):
        super().__init__(kv_cache_spec, **kwargs)
        self.kept = cdiv(kv_cache_spec.first, self.block_size)
        self.passed: dict[str, int] = {}  # of a request: blocks before this one are freed already

    def _window(self, end: int, start: int) -> range:
        """Blocks from `start` on that hold the window before token `end`."""
        return range(max(start, max(0, end - self.sliding_window + 1) // self.block_size), cdiv(end, self.block_size))

    def _needed(self, start: int, tokens: int) -> set[int]:
        """Blocks from `start` on that are filled when a request grows to `tokens` tokens."""
        alignment, stop = self.kv_cache_spec.alignment, cdiv(tokens, self.block_size)
        newest = self._window(tokens // alignment * alignment, start).start
        return {*range(start, min(self.kept, stop)), *range(max(start, newest), stop)}

    def _checkpoints(self, start: int, tokens: int) -> set[int]:
        every = round_up(CHECKPOINT, self.kv_cache_spec.alignment)
        first = (start * self.block_size // every + 1) * every
        return {block for end in range(first, tokens, every) for block in self._window(end, start)}

    def get_num_blocks_to_allocate(
        self, request_id: str, num_tokens: int, new_computed_blocks: Sequence[Any], *args: Any,
        apply_admission_cap: bool = False, **kwargs: Any,
    ) -> int:  # fmt: skip
        """Blocks that a request takes from the pool to grow to `num_tokens`, cached ones that are free included."""
        start = len(self.req_to_blocks.get(request_id, ())) + len(new_computed_blocks)
        count = len(self._needed(start, num_tokens))
        if apply_admission_cap:  # for a whole sequence, which grows chunk by chunk
            count = min(max(0, cdiv(num_tokens, self.block_size) - start), self.max_admission_blocks_per_request)
        return count + self._get_num_evictable_blocks(new_computed_blocks)

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[Any]:
        blocks = self.req_to_blocks[request_id]
        start, needed = len(blocks), self._needed(len(blocks), num_tokens)
        more = self._checkpoints(start, num_tokens) - needed if self.enable_caching else set()
        if len(needed | more) <= self.block_pool.get_num_free_blocks() - self.block_pool.num_gpu_blocks // 2:
            needed |= more
        taken = iter(self.block_pool.get_new_blocks(len(needed)))
        stop = cdiv(num_tokens, self.block_size)
        new = [next(taken) if block in needed else self._null_block for block in range(start, stop)]
        blocks.extend(new)
        return new

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[Any],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:
        assert not num_external_computed_tokens
        assert not self.req_to_blocks[request_id]
        self.block_pool.touch([block for block in new_computed_blocks if not block.is_null])
        self.req_to_blocks[request_id].extend(new_computed_blocks)
        self.num_cached_block[request_id] = len(new_computed_blocks)

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        blocks = self.req_to_blocks.get(request_id, [])
        stop = min(self.get_num_skipped_tokens(processed_computed_tokens) // self.block_size, len(blocks))
        start = self.passed.get(request_id, self.kept)
        if start >= stop:
            return
        self.block_pool.free_blocks([block for block in reversed(blocks[start:stop]) if not block.is_null])
        blocks[start:stop] = [self._null_block] * (stop - start)
        self.passed[request_id] = stop

    def pop_blocks_for_free(self, request_id: str) -> list[Any]:
        self.passed.pop(request_id, None)
        return [block for block in super().pop_blocks_for_free(request_id) if not block.is_null]

    @classmethod
    def reachable_block_mask(cls, *args: Any, **kwargs: Any) -> list[bool] | None:
        """All blocks that there are may serve a hit."""
        return None

    @classmethod
    def find_longest_cache_hit(
        cls, block_hashes: Any, max_length: int, kv_cache_group_ids: list[int], block_pool: Any, kv_cache_spec: Any,
        drop_eagle_block: bool, alignment_tokens: int, **kwargs: Any,
    ) -> tuple[tuple[list[Any], ...], int]:  # fmt: skip
        """A hit needs the blocks of the first tokens and of the window before its end; others are null."""
        found, length = super().find_longest_cache_hit(
            block_hashes, max_length, kv_cache_group_ids, block_pool, kv_cache_spec, drop_eagle_block,
            alignment_tokens, **kwargs,
        )  # fmt: skip
        size = kv_cache_spec.block_size
        hashes = resolve_block_hashes(block_hashes, block_pool.hash_block_size, size)
        for block in range(min(cdiv(kv_cache_spec.first, size), length // size)):
            cached = block_pool.get_cached_block(hashes[block], kv_cache_group_ids)
            if cached is None:
                return tuple([] for _ in kv_cache_group_ids), 0
            for group, own in zip(found, cached, strict=True):
                group[block] = own
        return found, length


KVCacheSpecRegistry.check_kv_cache_spec_registry({})  # vLLM's own kinds come first: it adds them to an empty registry


@register_kv_cache_spec(manager_class=ExactTokensManager)
@dataclass(frozen=True, kw_only=True)
class ExactTokensSpec(SlidingWindowSpec):
    """The cache of exact tokens; `held` is the number of blocks of a request, see `held_blocks`."""

    first: int
    alignment: int
    held: int

    def max_admission_blocks_per_request(self, max_in_flight_tokens: int, max_model_len: int) -> int:
        return min(self.held, cdiv(max_model_len, self.block_size))


class PagedCache(AttentionLayerBase):
    """One of the two caches, as vLLM sees it: a layer with pages of bytes.

    Parameters
    ----------
    name
        Name with exactly one number in it, by which vLLM orders layers.
    """

    def __init__(self, name: str, spec: Any, backend: type):
        self.name, self.spec, self.backend = name, spec, backend
        self.kv_cache = torch.empty(0, dtype=torch.uint8)
        self.pages = self.kv_cache

    def get_attn_backend(self) -> type:
        return self.backend

    def get_kv_cache_spec(self, vllm_config: Any) -> Any:
        return self.spec

    def bind_kv_cache(self, kv_cache: Tensor) -> None:
        """Take vLLM's ``[pages, 1, tokens, bytes]``."""
        self.kv_cache = kv_cache
        pages, _, tokens, width = kv_cache.shape
        self.pages = kv_cache.as_strided((pages, tokens * width), (kv_cache.stride(0), 1))

    def part(self, start: int, width: int, dtype: torch.dtype) -> Tensor:
        """Numbers ``[pages, tokens, _]`` of bytes `start` to `start + width` of each token."""
        tokens = self.spec.block_size
        return self.pages[:, start * tokens : (start + width) * tokens].view(dtype).unflatten(1, (tokens, -1))


def caches(
    code_bytes: int, exact_bytes: int, first: int, recent: int, vllm_config: Any, backend: type
) -> tuple[PagedCache, PagedCache]:
    """The caches of codes and of exact tokens for a model with so many bytes of a token in all layers."""
    batches, length = vllm_config.max_concurrent_batches, vllm_config.model_config.max_model_len
    multiple = 64 if vllm_config.device_config.device_type == "cuda" else 4  # the kernels read 64 tokens at a time
    blocks = choose_blocks(code_bytes, exact_bytes, first, recent, length, batches, multiple)
    common: dict[str, Any] = {"num_kv_heads": 1, "dtype": torch.uint8, "page_size_padded": blocks.page}
    codes = FullAttentionSpec(block_size=blocks.codes, head_size=code_bytes, state_content_bytes=code_bytes, **common)
    exact = ExactTokensSpec(
        block_size=blocks.exact, head_size=exact_bytes, state_content_bytes=exact_bytes, sliding_window=recent,
        first=first, alignment=blocks.alignment(), held=held_blocks(blocks, first, recent, batches), **common,
    )  # fmt: skip
    return PagedCache("mea.0.codes", codes, backend), PagedCache("mea.1.exact", exact, backend)
