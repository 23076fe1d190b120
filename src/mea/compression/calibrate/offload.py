"""Load weights that accelerate has offloaded into memory, layer by layer."""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_module
from accelerate.utils import align_module_device
from torch import nn


def resident(layer: Any) -> Any:
    """The layer in memory and fp32: itself, or a copy if its weights are offloaded or have another dtype."""
    if all(parameter.device.type != "meta" and parameter.dtype == torch.float32 for parameter in layer.parameters()):
        return layer
    with weights_of(layer):
        local = copy.deepcopy(layer)  # keeps its weights when the original's are offloaded again
        device = next(layer.parameters()).device
    return remove_hook_from_module(local, recurse=True).to(device, torch.float32)  # without its hook it is in RAM


@contextmanager
def weights_of(module: nn.Module) -> Iterator[None]:
    """Hold the weights of a module and its submodules in memory, even if they are offloaded."""
    with ExitStack() as loaded:
        for submodule in module.modules():
            loaded.enter_context(align_module_device(submodule))
        yield
