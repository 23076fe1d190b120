"""Weights that accelerate keeps elsewhere, brought into memory layer by layer."""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_module
from accelerate.utils import align_module_device
from torch import nn


def resident(layer: Any) -> Any:
    """The layer in memory and fp32: itself, or a copy where its weights are offloaded to disk or of another dtype."""
    if all(parameter.device.type != "meta" and parameter.dtype == torch.float32 for parameter in layer.parameters()):
        return layer
    with weights_of(layer):
        local = copy.deepcopy(layer)  # keeps its weights when the original gives them back
    return remove_hook_from_module(local, recurse=True).float()


@contextmanager
def weights_of(module: nn.Module) -> Iterator[None]:
    """Have the weights of a module and of all below it in memory, also where they are offloaded."""
    with ExitStack() as there:
        for each in module.modules():
            there.enter_context(align_module_device(each))
        yield
