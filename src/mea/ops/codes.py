"""Numbers in 8, 4, 2 or 0 bits: how the components of a token are rounded and packed.

A token's components come in *tiers*: first those of 8 bits, then of 4, then of 2. Components of 0 bits are not stored.
A tier is cut into groups of at most `GROUP` components. Each group of each token stores its lowest number and the step
between codes, both in bfloat16, so that no power-of-two scale of the model over- or underflows. A token is coded by
itself: how a text is cut into blocks does not change its codes.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import BFloat16, Float, UInt8
from torch import Tensor

TIERS = (8, 4, 2)  # bits, in the order of storage
GROUP = 128  # components that share a step, at most
UNIT = 16  # groups are multiples of it where a tier is: a vector of a processor

Tiers = tuple[int, int, int]
Groups = list[tuple[int, int]]


def group_sizes(tiers: Sequence[int]) -> Groups:
    """``(bits, size)`` of every group of a token, in the order of storage.

    A tier of ``n`` components has ``ceil(n / GROUP)`` groups of nearly equal size.
    """
    cut: Groups = []
    for bits, count in zip(TIERS, tiers, strict=True):
        unit = next(unit for unit in (UNIT, 8 // bits, 1) if count % unit == 0)
        parts = -(-count // GROUP)
        edges = [count // unit * part // parts * unit for part in range(parts + 1)] if parts else []
        cut += [(bits, b - a) for a, b in pairwise(edges)]
    return cut


def bits_per_token(tiers: Sequence[int]) -> int:
    """Bits of a token's codes, in whole bytes for each group, with their lowest numbers and steps."""
    return sum(8 * code_bytes(bits, size) + 32 for bits, size in group_sizes(tiers))


def code_bytes(bits: int, size: int) -> int:
    """Bytes of the codes of a group."""
    return -(-bits * size // 8)


def wide(x: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """In fp32, or fp64 if it is that already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def to_codes(
    components: Float[Tensor, "*t r"], tiers: Sequence[int]
) -> tuple[UInt8[Tensor, "*t bytes"], BFloat16[Tensor, "*t two_groups"]]:
    """Codes, and the lowest number and the step of each group: ``number ≈ low + step * code``.

    Codes of a group are consecutive, the first in the lowest bits of the first byte.
    """
    packed, scales, start = [], [], 0
    for bits, size in group_sizes(tiers):
        part = wide(components[..., start : start + size])
        start += size
        largest = 2**bits - 1
        low, high = part.amin(-1, keepdim=True), part.amax(-1, keepdim=True)
        low = low.bfloat16()
        # Encoding uses the rounded numbers of decoding; a wider step keeps the highest number within reach.
        step = ((high - low.float()) * (1 + 2**-8) / largest).bfloat16()
        codes = (part - low.float()) / torch.where(step > 0, step, 1).float()
        packed.append(pack(codes.round_().clamp_(0, largest).to(torch.uint8), bits))
        scales += [low, step]
    if not packed:
        return components.new_empty(*components.shape[:-1], 0, dtype=torch.uint8), components[..., :0].bfloat16()
    return torch.cat(packed, -1), torch.cat(scales, -1)


def from_codes(
    codes: UInt8[Tensor, "*t bytes"], scales: BFloat16[Tensor, "*t two_groups"], tiers: Sequence[int]
) -> Float[Tensor, "*t r"]:
    """The rounded components, in fp32."""
    parts, start = [scales[..., :0].float()], 0
    for index, (bits, size) in enumerate(group_sizes(tiers)):
        stop = start + code_bytes(bits, size)
        numbers = unpack(codes[..., start:stop], bits, size).float()
        low, step = scales[..., 2 * index, None].float(), scales[..., 2 * index + 1, None].float()
        parts.append(low + step * numbers)
        start = stop
    return torch.cat(parts, -1)


def rounded(components: Float[Tensor, "*t r"], tiers: Sequence[int]) -> Float[Tensor, "*t r"]:
    """The components after rounding, as `from_codes` returns them; gradients ignore the rounding (straight-through)."""
    exact = wide(components)
    with torch.no_grad():
        error = from_codes(*to_codes(exact, tiers), tiers) - exact
    return exact + error


def pack(codes: UInt8[Tensor, "*t w"], bits: int) -> UInt8[Tensor, "*t bytes"]:
    """Codes below ``2 ** bits`` as bytes ``[..., ceil(w * bits / 8)]``; 3 bits as the lower two and the highest."""
    if bits == 3:
        return torch.cat([pack(codes & 3, 2), pack(codes >> 2, 1)], -1)
    per_byte = 8 // bits
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % per_byte)).unflatten(-1, (-1, per_byte))
    packed = codes[..., 0]
    for position in range(1, per_byte):
        packed = packed | codes[..., position] << bits * position
    return packed


def unpack(packed: UInt8[Tensor, "*t bytes"], bits: int, width: int) -> UInt8[Tensor, "*t w"]:
    """The codes ``[..., width]``; the inverse of `pack`."""
    if bits == 3:
        lower = code_bytes(2, width)
        return unpack(packed[..., :lower], 2, width) | unpack(packed[..., lower:], 1, width) << 2
    shifts = range(0, 8, bits)
    codes = torch.stack([packed >> shift & 2**bits - 1 for shift in shifts], dim=-1)
    return codes.flatten(-2)[..., :width]
