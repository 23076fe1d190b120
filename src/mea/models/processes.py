"""Work divided among the processes of ``torchrun``: each takes rows ``rank, rank + count, ...``."""

import os

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor

from mea.ops.device import used_device


def join() -> None:
    """Form a group with the other processes of ``torchrun``; without torchrun, do nothing."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        PartialState(cpu=used_device().type == "cpu")


def place() -> tuple[int, int]:
    """The rank of this process, and the number of processes: 0 and 1 without a group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def wait() -> None:
    """Wait until all processes have called this."""
    if dist.is_initialized():
        dist.barrier()


def summed(tensor: Tensor) -> Tensor:
    """The sum of all processes' tensors of one shape."""
    if place()[1] > 1:
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def interleaved(own: Tensor) -> Tensor:
    """All rows in their order, from each process's own rows."""
    count = place()[1]
    if count == 1:
        return own
    parts: list[Tensor] = [own] * count
    dist.all_gather_object(parts, own.cpu())
    rows = torch.empty(sum(map(len, parts)), *own.shape[1:], dtype=own.dtype)
    for rank, part in enumerate(parts):
        rows[rank::count] = part
    return rows.to(own.device)
