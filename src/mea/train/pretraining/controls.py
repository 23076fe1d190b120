"""Controls of an experiment: mixing that is frozen, or folded into the projections during training."""

from typing import Any

import torch
from transformers import TrainerCallback

from mea.attention import MultiheadExplicitAttention
from mea.attention.mixing import HeadMixing, block_copy
from mea.models.decoder import MeaForCausalLM


def freeze_mixing(model: MeaForCausalLM) -> None:
    """Freeze every mixing matrix.

    Raises
    ------
    ValueError
        The model has none.
    """
    mixings = [module for module in model.modules() if isinstance(module, HeadMixing)]
    if not mixings:
        raise ValueError(f"{model.config.attention!r} has no mixing matrices to freeze")
    for mixing in mixings:
        mixing.requires_grad_(False)


class FoldMixing(TrainerCallback):
    """At a step, multiply the mixing into ``W_K`` and ``W_V`` and freeze the identity in its place.

    The model computes the same function. The optimiser's moments of the two projections belong to the old basis and are
    dropped.

    Parameters
    ----------
    step
        Optimiser step, counted from 0, before which the mixing is folded.
    """

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **others: Any) -> None:
        if state.global_step == self.step:
            fold_in_place(model, others.get("optimizer"))
        elif state.global_step > self.step:
            freeze_mixing(model)  # a run that goes on from a checkpoint behind the fold


@torch.no_grad()
def fold_in_place(model: MeaForCausalLM, optimizer: Any = None) -> None:
    """Multiply every square mixing into its projection and freeze the identity in its place.

    Raises
    ------
    ValueError
        The model has no square scalar mixing.
    """
    layers = [module for module in model.modules() if isinstance(module, MultiheadExplicitAttention)]
    if not layers or any(layer.compressed for layer in layers):
        raise ValueError(f"{model.config.attention!r} with these options has no square mixing to fold")
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    for layer in layers:
        for projection, mixing in ((layer.k_proj, layer.key_mixing), (layer.v_proj, layer.value_mixing)):
            if not isinstance(mixing, HeadMixing):
                continue
            projection.weight.copy_(mixing.fold(projection.weight))
            if projection.bias is not None:
                projection.bias.copy_(mixing.fold(projection.bias[:, None])[:, 0])
            mixing.weight.copy_(block_copy(mixing.components, mixing.heads))
            mixing.requires_grad_(False)
            mixing.weight.grad = None
            if inner is not None:
                for parameter in projection.parameters():
                    inner.state.pop(parameter, None)
