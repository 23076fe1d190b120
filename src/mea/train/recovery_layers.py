"""The first stage: every compressed attention learns to give the original's output for the original's input.

No error is handed on from layer to layer, so all layers train side by side, each by itself, and no gradient runs
through more than one attention.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from mea.train.recovery.loss import Distilled
from mea.train.recovery.parameters import LATENT_CLASSES


class LayerOutputs(nn.Module):
    """Mean over layers of the attention output's squared error, relative to the energy of the original's output."""

    def __init__(self, student: Any, original: Any):
        super().__init__()
        self.student = student
        self._original = (original,)
        self._whole = (Distilled(student, original, kl=1.0, ce=0.0),)
        own, other = student.model.layers, original.model.layers
        self._pairs = [
            (mine.self_attn, theirs.self_attn)
            for mine, theirs in zip(own, other, strict=True)
            if isinstance(mine.self_attn, LATENT_CLASSES)
        ]

    @property
    def original(self) -> Any:
        """The uncompressed model."""
        return self._original[0]

    def forward(self, input_ids: Int[Tensor, "b t"]) -> dict[str, Tensor]:
        """Loss of a batch of windows; while evaluating, the whole model's ``kl`` and ``ce``."""
        if not self.training:
            return self._whole[0].eval()(input_ids)
        with torch.no_grad(), _recorded([theirs for _, theirs in self._pairs]) as calls:
            self._original[0].base_model(input_ids=input_ids, use_cache=False)
        losses = []
        for mine, theirs in self._pairs:
            arguments, expected = calls[theirs]
            output = mine(**arguments)[0]
            losses.append((output - expected).float().square().sum() / expected.float().square().sum())
        return {"loss": torch.stack(losses).mean()}


@contextmanager
def _recorded(modules: list[nn.Module]) -> Iterator[dict[nn.Module, tuple[dict[str, Any], Tensor]]]:
    """Arguments and outputs of each module's next call."""
    calls: dict[nn.Module, tuple[dict[str, Any], Tensor]] = {}

    def keep(module: nn.Module, positional: Any, arguments: dict[str, Any], output: Any) -> None:
        if positional:
            arguments = {"hidden_states": positional[0], **arguments}
        calls[module] = arguments, output[0]

    handles = [module.register_forward_hook(keep, with_kwargs=True) for module in modules]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
