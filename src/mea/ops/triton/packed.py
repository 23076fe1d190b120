"""Reading and writing a packed cache with Triton kernels; `mea.ops.triton.reference` defines the results of reading.

A reading is two kernels and two small sums. The first kernel stores the weights of tokens, a softmax for each block of
64; the second averages components with them, one group of components a program. Accumulators of all components at once
would not fit into registers: 32 heads times 1,400 components in fp32 are 179 KB. So codes of keys are read twice.
"""

import functools

import torch
import triton
from jaxtyping import BFloat16, Float, Float32, UInt8
from torch import Tensor

from mea.ops.codes import Groups, code_bytes, group_sizes
from mea.ops.triton import kernels
from mea.ops.triton.reference import Angles, CodedTokens, Maps, absorb

PROGRAMS = 256  # of the second kernel, about: two for each multiprocessor
ROWS = 32  # queries of a tile, at most: registers spill with 64
CHANNELS = 32  # of each half of a rebuilt key in a tile, at most
WRITTEN = 32  # tokens that a program of the writing kernel packs
DOT = torch.float32 if triton.knobs.runtime.interpret else torch.bfloat16  # operands of products
TYPES = {torch.float32: triton.language.float32, torch.bfloat16: triton.language.bfloat16}


class PackedReader:
    """How new tokens read a layer of a packed cache, prepared once.

    Parameters
    ----------
    groups, key_decoder, key_mean, frequency
        See `mea.ops.triton.reference.Maps`. Groups have at most 128 components; no group has both pairs and others.
    value_decoder, value_mean
        Not used, because averages are of components; accepted so that all readers have one signature.

    Raises
    ------
    ValueError
        A group is too large, or has half a pair.
    """

    def __init__(
        self,
        groups: Groups,
        key_decoder: Float[Tensor, "g _ _"],
        key_mean: Float[Tensor, "g d"],
        value_decoder: Tensor | None = None,
        value_mean: Tensor | None = None,
        frequency: Tensor | None = None,
    ):
        pairs = 0 if frequency is None else len(frequency)
        if not fits(groups, pairs):
            raise ValueError(f"groups need at most 128 components, and pairs a whole number of groups: {groups}")
        self.groups, self.maps = groups, Maps(groups, key_decoder, key_mean, frequency)
        self.components, self.bytes = sum(size for _, size in groups), sum(code_bytes(*group) for group in groups)
        width = kernels.REBUILT if frequency is None else kernels.PAIRS
        self.table, _ = _table(groups, 0, 128, key_mean.device)
        self.slices, self.ends = _table(groups, 2 * pairs or self.components, width.value, key_mean.device)
        if frequency is None:
            self.decoder = key_decoder.mT.to(DOT).contiguous()
            parts = [self.decoder[:, first : first + size].float() for _, size, first, *_ in self.slices.tolist()]
            self.sums = torch.stack([part.sum(1) for part in parts], 1)
            self.mean = key_mean.float().contiguous()
        else:
            self.frequency = frequency.to(torch.int32).contiguous()
            self.mean_pairs = torch.stack(key_mean.float().chunk(2, -1), -1)

    def read(
        self, queries: Float[Tensor, "b h q d"], tokens: CodedTokens, angles: Angles, scale: float
    ) -> tuple[Float32[Tensor, "b h q r"], Float32[Tensor, "b h q"]]:
        """Averages of components and log-sum-exps, as `mea.ops.triton.reference.read`.

        Raises
        ------
        ValueError
            Codes, scales or angles do not fit the maps, or are not contiguous where they have to be.
        """
        (b, h, q, d), n = queries.shape, tokens.n
        self._check(b, d, tokens, angles)
        rows, half, blocks = h * q, d // 2, triton.cdiv(n, kernels.TOKENS)
        queries = queries.float().unflatten(1, (len(self.maps.key_mean), -1))
        device = queries.device
        seen = torch.full((b, q), n, device=device) if tokens.seen is None else tokens.seen
        seen = seen.to(torch.int32)[:, None].expand(b, h, q).contiguous()
        weights = torch.empty(b, blocks * kernels.TOKENS, rows, dtype=DOT, device=device)
        log_sums = torch.empty(b, blocks, rows, device=device)
        pages = None if tokens.pages is None else tokens.pages.to(torch.int32).contiguous()
        cos, sin = (x.float().contiguous() for x in angles.blocks)
        places = [x.float().contiguous() for x in angles.places]
        hidden = None if tokens.hidden is None else tokens.hidden.contiguous()
        cache = (tokens.codes, tokens.scales, pages)
        strides = (*tokens.codes.stride()[:2], *tokens.scales.stride()[:2])
        paging = {"PAGE": 0 if pages is None else tokens.codes.shape[1], "ALIGN": self._alignment(tokens.codes)}
        paging |= {"T": kernels.TOKENS, "DOT": TYPES[DOT]}
        page_count, angle_stride = 0 if pages is None else pages.shape[1], 0 if len(cos) == 1 else cos.stride(0)
        common = (*cache, seen, hidden, cos, sin, *places, self.slices)
        if self.maps.frequency is None:
            head_rows = rows // len(self.maps.key_mean)
            tile, heads = _tile_rows(head_rows), len(self.maps.key_mean)
            x, y = queries.flatten(2, 3).mT.chunk(2, -2)  # [b, g, half, head_rows]
            turned = torch.stack([x, y], 1).permute(0, 1, 3, 2, 4).contiguous()
            kernels.score_rebuilt[blocks, heads * triton.cdiv(head_rows, tile), b](
                turned, self.decoder, self.sums, self.mean, *common, weights, log_sums, scale, tokens.begin, n, rows,
                head_rows, half, self.components, len(self.slices), blocks, page_count, angle_stride, *strides,
                *self.ends, R=tile, HALF=min(CHANNELS, max(16, triton.next_power_of_2(half))),
                HIDDEN=hidden is not None, num_warps=8,
                num_stages=1, **paging,
            )  # fmt: skip
        else:
            tile = _tile_rows(rows)
            kernels.score_pairs[blocks, triton.cdiv(rows, tile), b](
                *self._absorbed(queries), *common, self.frequency, weights, log_sums, scale, tokens.begin, n, rows,
                half, len(self.frequency), blocks, page_count, angle_stride, *strides, *self.ends, R=tile,
                HIDDEN=hidden is not None, num_warps=8, num_stages=1, **paging,
            )  # fmt: skip
        log_sum = log_sums.logsumexp(1)
        groups, row_tiles = len(self.table), b * triton.cdiv(rows, ROWS)
        splits = min(blocks, triton.cdiv(PROGRAMS, groups * row_tiles))
        per_split = triton.cdiv(blocks, splits)
        splits = triton.cdiv(blocks, per_split)
        averages = torch.empty(splits, b, rows, self.components, device=device)
        kernels.average_codes[groups, splits, row_tiles](
            *cache, weights, log_sums, log_sum, self.table, averages, tokens.begin, n, rows, self.components, blocks,
            per_split, page_count, b, *strides, R=ROWS, num_warps=8, num_stages=1, **paging,
        )  # fmt: skip
        return averages.sum(0).view(b, h, q, -1), log_sum.view(b, h, q)

    def _absorbed(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Queries for turned components ``[b, 2, pairs, rows]``, and for the mean's turns ``[b, 2, d / 2, rows]``."""
        x, y = queries.chunk(2, -1)
        index = self.frequency.long()
        pairs = absorb(x[..., index], y[..., index], self.maps.key_decoder)
        both = [torch.stack(parts, 1).flatten(2, 4).mT for parts in (pairs, absorb(x, y, self.mean_pairs))]
        return both[0].to(DOT).contiguous(), both[1].contiguous()

    def _alignment(self, codes: Tensor) -> int:
        """Bytes of which addresses of groups are multiples: wider loads where it is 4."""
        even = all(size % 16 == 0 for _, size in self.groups)
        return 4 if even and all(x % 4 == 0 for x in (*codes.stride()[:2], codes.data_ptr())) else 1

    def _check(self, b: int, d: int, tokens: CodedTokens, angles: Angles) -> None:
        codes, scales, begin, n = tokens[:4]
        held = codes.shape[1] if tokens.pages is None else codes.shape[1] * tokens.pages.shape[1]
        if not 0 < n <= held - begin or begin < 0:
            raise ValueError(f"tokens {begin} to {begin + n} are not all in a cache of {held}")
        if tokens.pages is not None and (codes.shape[1] % kernels.TOKENS or begin % kernels.TOKENS):
            raise ValueError(
                f"pages of {codes.shape[1]} tokens, read from token {begin}, have to hold whole blocks of 64"
            )
        if codes.shape[-1] < self.bytes or scales.shape[-1] != 2 * len(self.groups):
            raise ValueError(f"{codes.shape[-1]} bytes and {scales.shape[-1]} scales of a token are not {self.groups}")
        if codes.stride(-1) != 1 or scales.stride(-1) != 1:
            raise ValueError("codes and scales of a token must be contiguous")
        blocks = angles.blocks[0]
        if blocks.shape[0] not in (1, b) or blocks.shape[1] < triton.cdiv(n, 64) or blocks.shape[2] != d // 2:
            raise ValueError(f"angles {tuple(blocks.shape)} for {b} sequences of {n} tokens, {d // 2} each")


def fits(groups: Groups, pairs: int) -> bool:
    """Whether the kernels can read such groups, the first of which hold `pairs` pairs."""
    starts = {sum(size for _, size in groups[:i]) for i in range(len(groups) + 1)}
    paired = [size for i, (_, size) in enumerate(groups) if sum(size for _, size in groups[:i]) < 2 * pairs]
    even = all(size % 2 == 0 for size in paired)
    return bool(groups) and max(size for _, size in groups) <= 128 and 2 * pairs in starts and even


def to_codes(
    components: Float32[Tensor, "*t r"], tiers: tuple[int, ...]
) -> tuple[UInt8[Tensor, "*t bytes"], BFloat16[Tensor, "*t two_groups"]]:
    """As `mea.ops.codes.to_codes` on a processor, bit for bit."""
    groups, shape = group_sizes(tiers), components.shape[:-1]
    flat = components.reshape(shape.numel(), components.shape[-1]).contiguous()
    width, device = sum(code_bytes(*group) for group in groups), components.device
    codes = torch.empty(len(flat), width, dtype=torch.uint8, device=device)
    scales = torch.empty(len(flat), 2 * len(groups), dtype=torch.bfloat16, device=device)
    if groups and len(flat):
        kernels.write_codes[triton.cdiv(len(flat), WRITTEN), len(groups)](
            flat,
            codes,
            scales.view(torch.int16),
            _all_groups(tiers, device),
            len(flat),
            flat.shape[1],
            width,
            len(groups),
            T=WRITTEN,
        )
    return codes.view(*shape, width), scales.view(*shape, 2 * len(groups))


@functools.cache
def _all_groups(tiers: tuple[int, ...], device: torch.device) -> Tensor:
    """The table of whole groups, which is copied to the device once."""
    return _table(group_sizes(tiers), 0, 128, device)[0]


def _table(groups: Groups, keys: int, width: int, device: torch.device) -> tuple[Tensor, tuple[int, int, int]]:
    """Rows of the kernels' ``table``, of at most `width` components, and where 8, 4 and 2 bits end among `keys`.

    The slices of the `keys` first components come first, sorted by bits.
    """
    rows, byte, component = [], 0, 0
    for index, (bits, size) in enumerate(groups):
        for start in range(0, size, width):
            first = component + start
            rows.append((first >= keys, -bits, byte + start * bits // 8, min(width, size - start), first, index))
        byte, component = byte + code_bytes(bits, size), component + size
    rows.sort()
    ends = [sum(not rest and -bits >= least for rest, bits, *_ in rows) for least in (8, 4, 2)]
    table = [(byte, size, first, index, -bits) for _, bits, byte, size, first, index in rows]
    return torch.tensor(table, dtype=torch.int32, device=device), (ends[0], ends[1], ends[2])


def _tile_rows(rows: int) -> int:
    return min(ROWS, max(16, triton.next_power_of_2(rows)))
