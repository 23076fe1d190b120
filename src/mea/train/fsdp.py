"""FSDP2: parameters, gradients and optimiser moments sharded over all processes."""

from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor


def shard(module: nn.Module, layers: Iterable[nn.Module]) -> None:
    """Shard a module over all processes, in place: each of its `layers` is gathered when it runs.

    Raises
    ------
    ValueError
        There is one process only.
    RuntimeError
        A parameter is still whole.
    """
    if not dist.is_initialized() or dist.get_world_size() < 2:
        raise ValueError(
            "sharding needs several processes (torchrun --nproc-per-node 2 --no-python mea ...); leave it out for one"
        )
    for layer in layers:
        fully_shard(layer)
    fully_shard(module)
    whole = [name for name, parameter in module.named_parameters() if not isinstance(parameter, DTensor)]
    if whole:
        raise RuntimeError(f"not sharded: {', '.join(whole)}")


def is_sharded(module: Any) -> bool:
    """Whether `shard` was applied."""
    return isinstance(module, FSDPModule)


def full_state(module: nn.Module, *, trained_only: bool = False) -> dict[str, Any]:
    """The whole weights of a module, on the first process if it is sharded; all processes must call it."""
    return get_model_state_dict(module, options=_options(trained_only))


def load_full_state(module: nn.Module, state: dict[str, Any], *, trained_only: bool = False) -> None:
    """Put what `full_state` gave back into a module; every process gives the whole and keeps its part."""
    set_model_state_dict(module, state, options=_options(trained_only))


def _options(trained_only: bool) -> StateDictOptions:
    # Not strict: a tied head is not in a file.
    return StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=trained_only, strict=False)
