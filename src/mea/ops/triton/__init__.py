"""Triton kernels for the packed cache on a GPU: reading, paged or contiguous, and writing.

Start at `mea.ops.triton.reference`, which has the definitions; `mea.ops.triton.packed` calls the kernels. They need the
``gpu`` extra. ``MEA_KERNELS=reference`` switches them off, like the CPU kernels.
"""

import importlib.util
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mea.ops import kernels_wanted
from mea.ops.triton.reference import Angles, CodedTokens

if TYPE_CHECKING:
    from mea.ops.triton.packed import PackedReader, fits, to_codes

__all__ = ["Angles", "CodedTokens", "PackedReader", "fits", "to_codes", "usable"]


def usable(*tensors: Tensor) -> bool:
    """Whether the kernels support these tensors on this machine: on an NVIDIA GPU with Triton, no gradient."""
    return (
        all(x.is_cuda for x in tensors)
        and torch.version.hip is None
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and kernels_wanted()
        and importlib.util.find_spec("triton") is not None
    )


def __getattr__(name: str) -> Any:
    if name not in ("PackedReader", "fits", "to_codes"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mea.ops.triton import packed

    return getattr(packed, name)
