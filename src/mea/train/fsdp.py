"""FSDP2: parameters, gradients and moments shared out among processes, by what transformers has for loading models.

Hugging Face's Trainer knows a model that was sharded when it was made and leaves it alone, but cannot go on with its
training: it would save what the first process holds of the optimiser, and load weights only into whole tensors.
`save_state`, `load_state` and `load_weights` are what it lacks.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig
from transformers.distributed.checkpoint import load_optimizer_distributed, save_optimizer_distributed

from mea.models.decoder import MeaForCausalLM

PLAN = {"model.layers.*": "free_full_weight"}  # each layer gathered when its turn comes; the rest with the root
FOLDER = "optimizer"  # of a checkpoint, for the moments
SCHEDULER = "scheduler.pt"


def shard(model: MeaForCausalLM, processes: int, device: torch.device) -> MeaForCausalLM:
    """Share out a model, the same in all processes, over all of them, each on its `device`.

    Raises
    ------
    ValueError
        There is one process only.
    RuntimeError
        A parameter is still whole.
    """
    if processes < 2:
        raise ValueError(
            "run.shard needs several processes (torchrun --nproc-per-node 2 --no-python mea pretrain ...); "
            "leave it out for one"
        )
    nn.Module.to(model, device)
    plan, _, mesh = type(model).prepare_distribute_model(DistributedConfig(fsdp_size=processes, fsdp_plan=PLAN))
    type(model).maybe_distribute_model(model, plan, mesh)  # in place
    whole = [name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]
    if whole or not is_sharded(model):
        raise RuntimeError(f"not sharded: {', '.join(whole) or 'the model'}")
    return model


def is_sharded(model: Any) -> bool:
    """Whether `shard` was here."""
    return bool(getattr(model, "is_distributed_loading_by_transformers", False))


def save_state(model: nn.Module, optimizer: Any, scheduler: Any, folder: Path, first: bool) -> None:
    """Write moments and the place in the schedule into a checkpoint; all processes must call it."""
    save_optimizer_distributed(model, getattr(optimizer, "optimizer", optimizer), str(folder / FOLDER))
    if first:
        torch.save(scheduler.state_dict(), folder / SCHEDULER)


def load_state(model: nn.Module, optimizer: Any, scheduler: Any, folder: Path) -> None:
    """Read what `save_state` wrote; all processes must call it."""
    load_optimizer_distributed(model, getattr(optimizer, "optimizer", optimizer), str(folder / FOLDER))
    scheduler.load_state_dict(torch.load(folder / SCHEDULER, map_location="cpu", weights_only=True))


def load_weights(model: nn.Module, folder: Path) -> None:
    """Give every process its part of the weights of a checkpoint."""
    options = StateDictOptions(full_state_dict=True, strict=False)  # a tied head is not in the file
    weights: dict[str, Any] = dict(load_file(folder / "model.safetensors"))
    set_model_state_dict(model, weights, options=options)
