"""Attention over the pages of a packed cache.

On a GPU, the new tokens of all requests with `FEW` of them are read together (`mea.models.paged_attention`). Other
requests are read one after the other by `mea.models.coded_attention`, so that a served model reads as ``generate()``
does: keys and values of one layer are rebuilt for prompts. Its `Held` is gathered from pages.

Shapes: ``T`` tokens of a step, of all requests; others as in `mea.ops.latent`.
"""

from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from vllm.forward_context import get_forward_context
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.attention.backend import AttentionBackend, AttentionMetadataBuilder, MultipleOf

from mea.models.layer_code import CODES
from mea.models.packed_cache import Held
from mea.models.paged_attention import PagedCodedAttention, Rows
from mea.ops.codes import bits_per_token, code_bytes
from mea.ops.latent import rotate
from mea.vllm.cache import PagedCache

ALL = 2**40  # tokens that a layer without codes keeps exactly
FEW = 8  # new tokens of a request, at most, that are read with those of others


@dataclass
class Request:
    """A request's part of a step: rows ``start .. stop - 1`` of the step's tokens, at the end of `total` tokens."""

    start: int
    stop: int
    total: int
    device: torch.device
    shared: SimpleNamespace  # angles, which all layers share

    @cached_property
    def positions(self) -> Tensor:
        """Of the new tokens, ``[1, q]``."""
        return torch.arange(self.total - self.stop + self.start, self.total, device=self.device)[None]

    @property
    def few(self) -> bool:
        """Whether its new tokens may be read with those of other requests."""
        return self.stop - self.start <= FEW

    def turns(self, attention: Any, like: Tensor, whole: bool) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``[1, _, d]`` of the new tokens, or of the `whole` text."""
        known, name = vars(self.shared), "whole" if whole else "new"
        if name not in known:
            positions = torch.arange(self.total, device=like.device)[None] if whole else self.positions
            known[name] = attention.rotary(like, positions)
        return known[name]


@dataclass
class Few:
    """The new tokens that are read together: rows `index` of the step's tokens."""

    index: Tensor | slice
    owner: Tensor  # [b], their requests
    positions: Tensor  # [b]
    longest: int  # tokens of a request
    rows: Rows | None = None  # which all layers share


@dataclass
class Step:
    """What a step reads and writes of one cache; row ``i`` goes to token ``places[i]`` of page ``pages[i]``."""

    requests: list[Request]
    few: Few | None
    table: Tensor  # [requests, blocks], pages
    pages: Tensor
    places: Tensor


class StepBuilder(AttentionMetadataBuilder[Step]):
    """Makes a cache's `Step` of what vLLM knows about a step."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Step:
        common, size = common_attn_metadata, self.kv_cache_spec.block_size
        starts = common.query_start_loc_cpu.tolist()
        totals = common.seq_lens_cpu_upper_bound  # exact without speculation
        totals = (common.seq_lens.cpu() if totals is None else totals).tolist()
        requests = []
        for start, stop, total in zip(starts, starts[1:], totals, strict=False):
            if stop > start:
                requests.append(Request(start, stop, total, self.device, SimpleNamespace()))
        # Page 0 stands for blocks that a request does not hold: what is written there is never read.
        slots = common.slot_mapping[: starts[-1]].long().clamp_min(0)
        few = self._few(common, requests) if self.together(self.device) else None
        return Step(requests, few, common.block_table_tensor.long(), slots // size, slots % size)

    @staticmethod
    def together(device: torch.device) -> bool:
        """Whether new tokens of several requests are read together."""
        return device.type == "cuda"

    def _few(self, common: Any, requests: list[Request]) -> Few | None:
        """The tokens of all requests with few of them; nothing waits for the device."""
        some = [request for request in requests if request.few]
        if not some:
            return None
        token = torch.arange(some[-1].stop, device=self.device)
        if len(some) < len(requests):
            rows = [row for request in some for row in range(request.start, request.stop)]
            token = torch.tensor(rows).to(self.device, non_blocking=True)
        ends = common.query_start_loc[1:].long()
        owner = torch.searchsorted(ends, token, right=True)
        positions = common.seq_lens[owner] - ends[owner] + token
        index = token if len(some) < len(requests) else slice(0, some[-1].stop)
        return Few(index, owner, positions, max(request.total for request in some))


class PagedBackend(AttentionBackend):
    """vLLM's description of the two caches; `PagedAttention` reads and writes them."""

    supported_dtypes = [torch.float32, torch.bfloat16, torch.float16]  # noqa: RUF012, the type vLLM declares

    @staticmethod
    def get_name() -> str:
        return "MEA_PACKED"

    @staticmethod
    def get_impl_cls() -> Any:
        raise NotImplementedError("the model's own attention reads this cache")

    @staticmethod
    def get_builder_cls() -> type[StepBuilder]:
        return StepBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(1)]


def layer_bytes(tiers: Any, heads: int, head_dim: int, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of a token in a layer: in the cache of codes, where a layer without codes is whole, and of exact tokens."""
    exact = 2 * heads * head_dim * dtype.itemsize
    return exact if tiers is None else sum(map(bits_per_token, tiers)) // 8, exact


class PagedAttention(PagedCodedAttention, nn.Module):
    """Takes the place of a layer's ``attn`` in vLLM's class: queries and keys come before RoPE.

    Parameters
    ----------
    stock
        vLLM's attention of the layer.
    tiers
        The layer's entry in ``config.cache_code["tiers"]``.
    rotary
        transformers' rotary embedding of the model.
    """

    caches: tuple[PagedCache, PagedCache]  # of codes and of exact tokens
    starts: tuple[int, int]  # where the layer's bytes of a token start in them

    def __init__(self, stock: Any, config: Any, tiers: Any, rotary: nn.Module):
        nn.Module.__init__(self)
        self.config, self.rotary, self.name = config, rotary, stock.layer_name
        self.num_heads, self.heads, self.head_dim = stock.num_heads, stock.num_kv_heads, stock.head_size
        self.scaling, code = stock.impl.scale, config.cache_code
        self.code: Any = None if tiers is None else CODES[code["reading"]](self.heads, self.head_dim, tiers)
        self.exact = (0, ALL) if tiers is None else (code["first"], code["recent"])

    def window(self) -> None:
        return None

    def _turned(self, queries: Tensor, position_embeddings: Any) -> Tensor:
        return rotate(queries, *position_embeddings)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Outputs ``[T, h * d]`` of queries before RoPE, with keys before RoPE and values ``[T, g * d]``."""
        output = torch.empty_like(query)
        torch.ops.vllm.mea_packed_attention(query, key, value, output, self.name)
        return output

    def attend(self, query: Tensor, key: Tensor, value: Tensor, output: Tensor, steps: Any) -> None:
        """Write the new tokens to their pages, then fill `output` for all requests."""
        codes, exact = (steps[cache.name] for cache in self.caches)
        end = max(request.stop for request in codes.requests)
        output[end:].zero_()
        query, key, value = (
            x[:end].unflatten(1, (-1, self.head_dim)).transpose(0, 1)[None] for x in (query, key, value)
        )
        parts = self._parts(key.dtype)
        self._write(parts, codes, exact, key, value)
        few = codes.few
        if self.code is None or self.exact[1] <= FEW or (query.is_cuda and not self._gpu_fits(query, parts[0])):
            few = None
        if few is not None:
            if few.rows is None:
                tables = codes.table[few.owner], exact.table[few.owner]
                few.rows = self.rows(few.positions, few.longest, tables, parts[2].shape[1])
            read = self.read_rows(query[0].transpose(0, 1)[few.index], parts, few.rows)
            output[few.index] = read.flatten(1).to(output.dtype)
        for index, request in enumerate(codes.requests):
            if few is not None and request.few:
                continue
            rows = slice(request.start, request.stop)
            tables = codes.table[index], exact.table[index]
            read = self._read(parts, tables, request, query[:, :, rows], key[:, :, rows], value[:, :, rows])
            output[rows] = read[0].transpose(0, 1).flatten(1).to(output.dtype)

    def _parts(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """The layer's views of pages: codes and scales, exact keys and values; without codes only the latter two."""
        (codes, exact), (first, second) = self.caches, self.starts
        width = self.heads * self.head_dim * dtype.itemsize
        if self.code is None:
            return codes.part(first, width, dtype), codes.part(first + width, width, dtype)
        size, scales = sum(code_bytes(*group) for group in self.code.groups), 4 * len(self.code.groups)
        return (
            *(codes.part(first, size, torch.uint8), codes.part(first + size, scales, torch.bfloat16)),
            *(exact.part(second, width, dtype), exact.part(second + width, width, dtype)),
        )

    def _write(self, parts: tuple[Tensor, ...], codes: Step, exact: Step, key: Tensor, value: Tensor) -> None:
        plain = tuple(x[0].transpose(0, 1).flatten(1) for x in (key, value))
        if self.code is None:
            pairs = ((codes, parts, plain),)
        else:
            packed = tuple(x[0] for x in self.code.encode(key, value))
            pairs = ((codes, parts[:2], packed), (exact, parts[2:], plain))
        for step, targets, numbers in pairs:
            for target, new in zip(targets, numbers, strict=True):
                target[step.pages, step.places] = new

    def _heads(self, part: Tensor, table: Tensor, start: int, stop: int) -> Tensor:
        """Keys or values ``[1, g, t, d]`` of tokens `start` to `stop`; tokens of a head side by side."""
        slots, size = torch.arange(start, stop, device=table.device), part.shape[1]
        flat = part[table[slots // size], slots % size]
        return flat.unflatten(1, (self.heads, -1)).transpose(0, 1).contiguous()[None]

    def _read(
        self, parts: tuple[Tensor, ...], tables: tuple[Tensor, Tensor], request: Request, query: Tensor, key: Tensor,
        value: Tensor,
    ) -> Tensor:  # fmt: skip
        """Attention ``[1, h, q, d]`` of one request's new tokens."""
        q, total, (first, recent) = query.shape[2], request.total, self.exact
        past, none = total - q, key.new_empty(1, 0, 0)
        if self.code is None:
            keys, values = (self._heads(part, tables[0], 0, total) for part in parts)
            held = Held(keys, values, none, none, 0, total, None, None, None)
        else:
            start, n, size = max(0, past - recent + 1), max(0, total - recent), parts[0].shape[1]
            pages = tables[0][: -(-n // size)]
            packed = [part[pages].flatten(0, 1)[None, :n] for part in parts[:2]] if n else [none, none]
            keys, values = (
                torch.cat([self._heads(part, tables[1], start, past), new], 2)
                for part, new in zip(parts[2:], (key, value), strict=True)
            )
            firsts: tuple[Any, Any, Any] = (None, None, None)
            if count := min(first, total):
                firsts = (
                    *(self._heads(part, tables[1], 0, count) for part in parts[2:]),
                    torch.arange(count, device=key.device)[None],
                )
            held = Held(keys, values, packed[0], packed[1], 0, total, *firsts)
            if q == 1:
                turn = request.turns(self, key, whole=False)
                output = self._read_one(query, turn, held, None, request.shared, request.positions)
                if output is not None:
                    return output
        turn = request.turns(self, key, whole=True)
        turned = self._turned(query, tuple(x[:, -q:] for x in turn))
        return self._read_many(turned, key, value, held, None, turn, 0.0)


def packed_attention(query: Tensor, key: Tensor, value: Tensor, output: Tensor, name: str) -> None:
    """`PagedAttention.attend` of the layer with this name; zeros where vLLM only measures memory."""
    context = get_forward_context()
    if context.attn_metadata is None:
        output.zero_()
        return
    context.no_compile_layers[name].attend(query, key, value, output, context.attn_metadata)


def _no_output(query: Tensor, key: Tensor, value: Tensor, output: Tensor, name: str) -> None:
    return None


# An operation of its own hides the loop over requests from torch.compile.
direct_register_custom_op("mea_packed_attention", packed_attention, mutates_args=["output"], fake_impl=_no_output)
