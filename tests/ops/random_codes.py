"""Random codes and scales of a packed cache, for the tests of the kernels that read one."""

import torch
from torch import Tensor

from mea.ops.codes import Groups, code_bytes

# Bits and size of each group, how many of the groups are pairs.
ALL_TIERS = ([(8, 16), (4, 96), (2, 64), (4, 48), (2, 96)], 3)
TWO_BITS = ([(2, 16), (2, 128)], 1)
EMPTY = ([(8, 0), (4, 32), (2, 0), (8, 48), (4, 0), (2, 16)], 3)


def random_codes(
    groups: Groups, b: int, begin: int, n: int, factor: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Codes and scales of tokens ``begin .. begin + n - 1`` in larger buffers with other things around.

    Steps of a token's groups are alike. Scales of other tokens are NaN.
    """
    size = sum(code_bytes(*group) for group in groups)
    codes = torch.randint(0, 256, (b, begin + n + 5, size + 3), dtype=torch.uint8, generator=generator)[..., :size]
    step = (0.5 + torch.rand(b, n, len(groups), generator=generator)) * factor * 0.1
    low = -step * torch.tensor([2.0**bits - 1 for bits, _ in groups])
    low = low * torch.rand(b, n, len(groups), generator=generator)
    scales = torch.full((b, begin + n + 5, 2 * len(groups)), float("nan")).bfloat16()
    scales[:, begin : begin + n] = torch.stack([low, step], -1).flatten(-2)
    return codes, scales
