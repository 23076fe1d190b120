"""Triton kernels for the packed cache; `mea.ops.triton.packed` calls them, `mea.ops.triton.reference` defines results.

A program of the two score kernels reads a block of `TOKENS` tokens: it stores the softmax of the block's scores and
their log-sum-exp. A program of `average_codes` reads one group of components of many blocks and weighs each block by
its part of the total. Averages of different programs are added. Both kernels unpack codes in registers.

Every group is a row ``(first byte, size, first component, index, bits)`` of ``table``; the score kernels read it in
slices, which are rows of their own. Tiles have as many components
whatever the size. ``DOT`` is the type of products' operands: bf16 on a GPU, fp32 in Triton's interpreter, which
cannot multiply bf16.
"""

from typing import no_type_check  # keeps shape checks away from the source that Triton compiles

import triton
import triton.language as tl

TOKENS = 64  # of a block, whose angles are its first token's plus those of the places in it
# Components of a tile. Registers spill with more of them, seen by compiling for compute capabilities 8.0 to 10.0.
PAIRS = tl.constexpr(64)  # of `score_pairs`
REBUILT = tl.constexpr(32)  # of `score_rebuilt`
GROUP = tl.constexpr(128)  # of the other kernels: the largest group
COLUMNS = tl.constexpr(5)  # of `table`
CHANNELS = tl.constexpr(32)  # rotary frequencies of a tile of the mean


@triton.jit
@no_type_check
def _block(start, stride_page, stride_token, begin, block, sequence, pages, page_count, read, T: tl.constexpr,
           PAGE: tl.constexpr):  # fmt: skip
    """Address of a block of tokens: in one of a sequence's pages, which hold whole blocks, or in a row of them."""
    first = (begin + block * T).to(tl.int64)
    if PAGE:
        page = tl.load(pages + sequence * page_count + first // PAGE, mask=read, other=0).to(tl.int64)
        return start + page * stride_page + first % PAGE * stride_token
    return start + sequence.to(tl.int64) * stride_page + first * stride_token


@triton.jit
@no_type_check
def _group(table, index):
    """First byte, size, first component and index of a group."""
    row = table + index * COLUMNS
    return tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)


@triton.jit
@no_type_check
def _unpack(codes, stride, byte, size, read, WIDTH: tl.constexpr, BITS: tl.constexpr, ALIGN: tl.constexpr):
    """Codes ``[tokens, WIDTH]`` of a group, in the order of components."""
    token: tl.constexpr = read.shape[0]
    column = tl.arange(0, WIDTH * BITS // 8)
    inside = read[:, None] & (column * 8 < size * BITS)[None, :]
    offset = tl.arange(0, token)[:, None] * tl.multiple_of(stride, ALIGN) + column[None, :]
    packed = tl.load(codes + tl.multiple_of(byte, ALIGN) + offset, mask=inside, other=0)
    if BITS == 4:
        packed = tl.join(packed & 15, packed >> 4)
    elif BITS == 2:
        packed = tl.join(tl.join(packed & 3, packed >> 4 & 3), tl.join(packed >> 2 & 3, packed >> 6))
    return tl.reshape(packed, [token, WIDTH])


@triton.jit
@no_type_check
def _scale(scales, stride, index, read):
    """The lowest number and the step of a group ``[tokens]``."""
    low = scales + 2 * index + tl.arange(0, read.shape[0]) * stride
    step = tl.load(low + 1, mask=read, other=0.0).to(tl.float32)
    return tl.load(low, mask=read, other=0.0).to(tl.float32), step


@triton.jit
@no_type_check
def _angles(block_cos, block_sin, place_cos, place_sin, frequency, inside, half, T: tl.constexpr):
    """Cosines and sines ``[tokens, frequencies]``: the block's angle plus the place's."""
    c, s = (
        tl.load(block_cos + frequency, mask=inside, other=0.0),
        tl.load(block_sin + frequency, mask=inside, other=0.0),
    )
    place = tl.arange(0, T)[:, None] * half + frequency[None, :]
    cos, sin = (
        tl.load(place_cos + place, mask=inside[None, :], other=0.0),
        tl.load(place_sin + place, mask=inside[None, :], other=0.0),
    )
    return c[None, :] * cos - s[None, :] * sin, s[None, :] * cos + c[None, :] * sin


@triton.jit
@no_type_check
def _block_softmax(scores, token, row, reach, hidden, weights, log_sums, block, sequence, n, rows, blocks,
                   HIDDEN: tl.constexpr, T: tl.constexpr):  # fmt: skip
    """Store the softmax of a block's scores ``[tokens, rows]``, and their log-sum-exp."""
    visible = token[:, None] < reach[None, :]
    if HIDDEN:
        visible &= tl.load(hidden + sequence.to(tl.int64) * n + token, mask=token < n, other=1)[:, None] == 0
    scores = tl.where(visible, scores, float("-inf"))
    best = tl.max(scores, 0)
    best = tl.where(best == float("-inf"), 0.0, best)
    weight = tl.exp(scores - best[None, :])
    total = tl.sum(weight, 0)
    some = tl.where(total > 0, total, 1.0)
    here = sequence.to(tl.int64) * blocks
    slot = weights + (here * T + token)[:, None] * rows + row[None, :]
    tl.store(slot, weight / some[None, :], mask=(row < rows)[None, :] & (token >= 0)[:, None])
    tl.store(
        log_sums + (here + block) * rows + row, tl.where(total > 0, best + tl.log(some), float("-inf")), mask=row < rows
    )


@triton.jit
@no_type_check
def _add_pairs(scores, queries, cache, table, begin, end, read, row, inside_row, rows, plane, frequencies, angles, half,
               BITS: tl.constexpr, T: tl.constexpr, ALIGN: tl.constexpr, DOT: tl.constexpr):  # fmt: skip
    """Add the products of queries with the turned components of groups ``begin .. end - 1``, all of them of `BITS`."""
    codes, code_token, scales, scale_token = cache
    for index in range(begin, end):
        byte, size, component, place = _group(table, index)
        low, step = _scale(scales, scale_token, place, read)
        numbers = _unpack(codes, code_token, byte, size, read, PAIRS, BITS, ALIGN).to(tl.float32)
        numbers = low[:, None] + step[:, None] * numbers
        re, im = tl.split(tl.reshape(numbers, [T, PAIRS // 2, 2]))
        pair = tl.arange(0, PAIRS // 2)
        inside = pair * 2 < size
        pair += component // 2
        frequency = tl.load(frequencies + pair, mask=inside, other=0)
        cos, sin = _angles(angles[0], angles[1], angles[2], angles[3], frequency, inside, half, T)
        query, there = queries + pair[:, None] * rows + row[None, :], inside[:, None] & inside_row[None, :]
        scores = tl.dot((re * cos - im * sin).to(DOT), tl.load(query, mask=there, other=0.0), scores)
        scores = tl.dot((re * sin + im * cos).to(DOT), tl.load(query + plane, mask=there, other=0.0), scores)
    return scores


@triton.jit
@no_type_check
def score_pairs(
    queries, mean_queries, codes, scales, pages, seen, hidden, block_cos, block_sin, place_cos, place_sin, table,
    frequencies, weights, log_sums, scale, begin, n, rows, half, pairs, blocks, page_count, angle_stride,
    code_page, code_token, scale_page, scale_token, end_8, end_4, end_2,
    T: tl.constexpr, R: tl.constexpr, PAGE: tl.constexpr, HIDDEN: tl.constexpr, ALIGN: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Scores of absorbed queries with key components that turn by their position; grid ``(blocks, rows / R, b)``."""
    block, sequence = tl.program_id(0), tl.program_id(2)
    token, row = block * T + tl.arange(0, T), tl.program_id(1) * R + tl.arange(0, R)
    inside_row = row < rows
    reach = tl.load(seen + sequence * rows + row, mask=inside_row, other=0)
    stop = tl.max(reach, 0)
    read, some = token < stop, block * T < stop
    code_rows = _block(codes, code_page, code_token, begin, block, sequence, pages, page_count, some, T, PAGE)
    scale_rows = _block(scales, scale_page, scale_token, begin, block, sequence, pages, page_count, some, T, PAGE)
    angle = sequence * angle_stride + block * half
    block_cos, block_sin = block_cos + angle, block_sin + angle
    scores = tl.zeros([T, R], tl.float32)
    mean_queries += sequence * 2 * half * rows
    for start in range(0, half, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)
        inside = channel < half
        cos, sin = _angles(block_cos, block_sin, place_cos, place_sin, channel, inside, half, T)
        query, there = mean_queries + channel[:, None] * rows + row[None, :], inside[:, None] & inside_row[None, :]
        scores = tl.dot(cos, tl.load(query, mask=there, other=0.0), scores, input_precision="tf32x3")
        scores = tl.dot(sin, tl.load(query + half * rows, mask=there, other=0.0), scores, input_precision="tf32x3")
    plane = pairs * rows
    queries += sequence * 2 * plane
    ends = (0, end_8, end_4, end_2)
    cache, angles = (code_rows, code_token, scale_rows, scale_token), (block_cos, block_sin, place_cos, place_sin)
    for tier in tl.static_range(3):
        scores = _add_pairs(scores, queries, cache, table, ends[tier], ends[tier + 1], read, row, inside_row, rows,
                            plane, frequencies, angles, half, 8 >> tier, T, ALIGN, DOT)  # fmt: skip
    _block_softmax(
        scores * scale, token, row, reach, hidden, weights, log_sums, block, sequence, n, rows, blocks, HIDDEN, T
    )


@triton.jit
@no_type_check
def _add_keys(x, y, cache, table, begin, end, read, decoder, sums, channel, inside, half,
              BITS: tl.constexpr, ALIGN: tl.constexpr, DOT: tl.constexpr):  # fmt: skip
    """Add to both halves of a head's keys what groups ``begin .. end - 1``, all of them of `BITS`, give."""
    codes, code_token, scales, scale_token = cache
    middle = (2**BITS - 1) / 2
    for index in range(begin, end):
        byte, size, component, place = _group(table, index)
        low, step = _scale(scales, scale_token, place, read)
        low = (low + step * middle)[:, None]
        codes_here = (_unpack(codes, code_token, byte, size, read, REBUILT, BITS, ALIGN).to(tl.float32) - middle).to(
            DOT
        )
        number = tl.arange(0, REBUILT)
        part = decoder + (component + number)[:, None] * (2 * half) + channel[None, :]
        there = (number < size)[:, None] & inside[None, :]
        total = sums + index * (2 * half) + channel
        x += step[:, None] * tl.dot(codes_here, tl.load(part, mask=there, other=0.0))
        x += low * tl.load(total, mask=inside, other=0.0)[None, :]
        y += step[:, None] * tl.dot(codes_here, tl.load(part + half, mask=there, other=0.0))
        y += low * tl.load(total + half, mask=inside, other=0.0)[None, :]
    return x, y


@triton.jit
@no_type_check
def score_rebuilt(
    queries, decoder, sums, mean, codes, scales, pages, seen, hidden, block_cos, block_sin, place_cos, place_sin, table,
    weights, log_sums, scale, begin, n, rows, head_rows, half, components, slices, blocks, page_count, angle_stride,
    code_page, code_token, scale_page, scale_token, end_8, end_4, end_2,
    T: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr, PAGE: tl.constexpr, HIDDEN: tl.constexpr,
    ALIGN: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Scores of queries with keys that are rebuilt and turned in a tile; grid ``(blocks, g * head_rows / R, b)``."""
    block, sequence, parts = tl.program_id(0), tl.program_id(2), tl.cdiv(head_rows, R)
    head, place = tl.program_id(1) // parts, tl.program_id(1) % parts * R + tl.arange(0, R)
    row = tl.where(place < head_rows, head * head_rows + place, rows)
    token, inside_row = block * T + tl.arange(0, T), row < rows
    reach = tl.load(seen + sequence * rows + row, mask=inside_row, other=0)
    stop = tl.max(reach, 0)
    read, some = token < stop, block * T < stop
    code_rows = _block(codes, code_page, code_token, begin, block, sequence, pages, page_count, some, T, PAGE)
    scale_rows = _block(scales, scale_page, scale_token, begin, block, sequence, pages, page_count, some, T, PAGE)
    cache, ends = (code_rows, code_token, scale_rows, scale_token), (0, end_8, end_4, end_2)
    decoder += head * components * 2 * half
    sums += head * slices * 2 * half
    mean += head * 2 * half
    queries += sequence * 2 * half * rows
    angle = sequence * angle_stride + block * half
    scores = tl.zeros([T, R], tl.float32)
    for start in range(0, half, HALF):
        channel = start + tl.arange(0, HALF)
        inside = channel < half
        x = tl.zeros([T, HALF], tl.float32) + tl.load(mean + channel, mask=inside, other=0.0)[None, :]
        y = tl.zeros([T, HALF], tl.float32) + tl.load(mean + half + channel, mask=inside, other=0.0)[None, :]
        for tier in tl.static_range(3):
            x, y = _add_keys(x, y, cache, table, ends[tier], ends[tier + 1], read, decoder, sums, channel, inside,
                             half, 8 >> tier, ALIGN, DOT)  # fmt: skip
        cos, sin = _angles(block_cos + angle, block_sin + angle, place_cos, place_sin, channel, inside, half, T)
        query, there = queries + channel[:, None] * rows + row[None, :], inside[:, None] & inside_row[None, :]
        scores = tl.dot(x * cos - y * sin, tl.load(query, mask=there, other=0.0), scores, input_precision="tf32x3")
        query += half * rows
        scores = tl.dot(y * cos + x * sin, tl.load(query, mask=there, other=0.0), scores, input_precision="tf32x3")
    _block_softmax(
        scores * scale, token, row, reach, hidden, weights, log_sums, block, sequence, n, rows, blocks, HIDDEN, T
    )


@triton.jit
@no_type_check
def _average(
    cache, weights, log_sums, log_sum, table, index, begin, n, first, last, row, rows, sequence, blocks,
    BITS: tl.constexpr, T: tl.constexpr, R: tl.constexpr, PAGE: tl.constexpr, ALIGN: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Weighted sums ``[rows, GROUP]`` of a group's components over blocks ``first .. last - 1``."""
    codes, scales, pages, page_count, code_page, code_token, scale_page, scale_token = cache
    middle = (2**BITS - 1) / 2
    byte, size, _, place = _group(table, index)
    inside_row = row < rows
    whole = tl.load(log_sum + sequence * rows + row, mask=inside_row, other=0.0)
    whole = tl.where(whole == float("-inf"), 0.0, whole)
    total, constant = tl.zeros([R, GROUP], tl.float32), tl.zeros([R], tl.float32)
    for block in range(first, last):
        here = sequence.to(tl.int64) * blocks + block
        part = tl.load(log_sums + here * rows + row, mask=inside_row, other=float("-inf"))
        share = tl.exp(part - whole)
        slot = here * T + tl.arange(0, T)
        weight = tl.load(weights + slot[None, :] * rows + row[:, None], mask=inside_row[:, None], other=0.0)
        weight = weight.to(tl.float32) * share[:, None]
        token = block * T + tl.arange(0, T)
        # Where no row has any weight, tokens and their pages need not exist.
        some = tl.max(share, 0) > 0
        read = (token < n) & (tl.max(weight, 0) > 0)
        code_rows = _block(codes, code_page, code_token, begin, block, sequence, pages, page_count, some, T, PAGE)
        scale_rows = _block(scales, scale_page, scale_token, begin, block, sequence, pages, page_count, some, T, PAGE)
        low, step = _scale(scale_rows, scale_token, place, read)
        numbers = (_unpack(code_rows, code_token, byte, size, read, GROUP, BITS, ALIGN).to(tl.float32) - middle).to(DOT)
        total = tl.dot((weight * step[None, :]).to(DOT), numbers, total)
        constant += tl.sum(weight * (low + step * middle)[None, :], 1)
    return total + constant[:, None]


@triton.jit
@no_type_check
def average_codes(
    codes, scales, pages, weights, log_sums, log_sum, table, averages, begin, n, rows, components, blocks, per_split,
    page_count, sequences, code_page, code_token, scale_page, scale_token,
    T: tl.constexpr, R: tl.constexpr, PAGE: tl.constexpr, ALIGN: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Averages of components over a part of the blocks; grid ``(groups, splits, b * rows / R)``."""
    index, split, parts = tl.program_id(0), tl.program_id(1), tl.cdiv(rows, R)
    sequence, row = tl.program_id(2) // parts, tl.program_id(2) % parts * R + tl.arange(0, R)
    first = split * per_split
    last = tl.minimum(first + per_split, blocks)
    bits, size, component = (tl.load(table + index * COLUMNS + 4), tl.load(table + index * COLUMNS + 1),
                             tl.load(table + index * COLUMNS + 2))  # fmt: skip
    cache = (codes, scales, pages, page_count, code_page, code_token, scale_page, scale_token)
    if bits == 8:
        total = _average(cache, weights, log_sums, log_sum, table, index, begin, n, first, last, row, rows, sequence,
                         blocks, 8, T, R, PAGE, ALIGN, DOT)  # fmt: skip
    elif bits == 4:
        total = _average(cache, weights, log_sums, log_sum, table, index, begin, n, first, last, row, rows, sequence,
                         blocks, 4, T, R, PAGE, ALIGN, DOT)  # fmt: skip
    else:
        total = _average(cache, weights, log_sums, log_sum, table, index, begin, n, first, last, row, rows, sequence,
                         blocks, 2, T, R, PAGE, ALIGN, DOT)  # fmt: skip
    number = tl.arange(0, GROUP)
    out = averages + ((split * sequences + sequence).to(tl.int64) * rows + row)[:, None] * components
    tl.store(out + component + number[None, :], total, mask=(row < rows)[:, None] & (number < size)[None, :])


@triton.jit
@no_type_check
def _to_bfloat16(x):
    """The bits of the nearest bf16 number, ties to even, and that number."""
    bits = x.to(tl.uint32, bitcast=True)
    bits = bits + 0x7FFF + (bits >> 16 & 1) >> 16
    return bits.to(tl.int16), (bits << 16).to(tl.float32, bitcast=True)


@triton.jit
@no_type_check
def _write_group(components, codes, scales, table, index, token, read, r, row_bytes, groups,
                 BITS: tl.constexpr, T: tl.constexpr):  # fmt: skip
    """Round and pack a group of a block of tokens."""
    byte, size, component, place = _group(table, index)
    largest: tl.constexpr = 2**BITS - 1
    number = tl.arange(0, GROUP)
    inside = (number < size)[None, :]
    x = components + token[:, None] * r + (component + number)[None, :]
    x = tl.load(x, mask=read[:, None] & inside, other=0.0).to(tl.float32)
    low_bits, low = _to_bfloat16(tl.min(tl.where(inside, x, float("inf")), 1))
    span = (tl.max(tl.where(inside, x, float("-inf")), 1) - low) * 1.00390625
    step_bits, step = _to_bfloat16(tl.div_rn(span, tl.full([T], largest, tl.float32)))
    code = tl.div_rn(x - low[:, None], tl.where(step > 0, step, 1.0)[:, None] + tl.zeros([T, GROUP], tl.float32))
    # Adding 1.5 * 2^23 rounds to the nearest whole number, ties to even.
    code = (tl.minimum(tl.maximum(code, 0.0), largest * 1.0) + 12582912.0) - 12582912.0
    code = tl.where(inside, code, 0.0).to(tl.int32)
    per_byte: tl.constexpr = 8 // BITS
    shift = tl.arange(0, per_byte) * BITS
    packed = tl.sum(tl.reshape(code, [T, GROUP // per_byte, per_byte]) << shift[None, None, :], 2)
    column = tl.arange(0, GROUP // per_byte)
    there = read[:, None] & (column * 8 < size * BITS)[None, :]
    tl.store(codes + token[:, None] * row_bytes + (byte + column)[None, :], packed.to(tl.uint8), mask=there)
    scale = scales + token * (2 * groups) + 2 * place
    tl.store(scale, low_bits, mask=read)
    tl.store(scale + 1, step_bits, mask=read)


@triton.jit
@no_type_check
def write_codes(components, codes, scales, table, tokens, r, row_bytes, groups, T: tl.constexpr):
    """Round and pack components ``[tokens, r]``; scales are the bits of bf16 numbers. Grid ``(tokens / T, groups)``."""
    token, index = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T), tl.program_id(1)
    read = token < tokens
    bits = tl.load(table + index * COLUMNS + 4)
    if bits == 8:
        _write_group(components, codes, scales, table, index, token, read, r, row_bytes, groups, 8, T)
    elif bits == 4:
        _write_group(components, codes, scales, table, index, token, read, r, row_bytes, groups, 4, T)
    else:
        _write_group(components, codes, scales, table, index, token, read, r, row_bytes, groups, 2, T)
