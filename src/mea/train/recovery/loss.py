"""The loss of recovery: the divergence from the original, the text's cross-entropy, or both."""

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn import functional

from mea.models.lm_head import IGNORED, LMHead, distance


class Distilled(nn.Module):
    """The student as a module for the Trainer: token ids in, loss out.

    The original model is kept out of the module tree: it is neither trained, nor saved, nor wrapped.
    """

    def __init__(self, student: Any, original: Any | None, *, kl: float, ce: float):
        super().__init__()
        self.student = student
        self.kl, self.ce = kl, ce
        self._original = (original,)
        self._heads = (LMHead(student), LMHead(original) if original is not None else None)

    @property
    def original(self) -> Any | None:
        """The uncompressed model."""
        return self._original[0]

    def forward(self, input_ids: Int[Tensor, "b t"]) -> dict[str, Tensor]:
        """Loss of a batch of windows, and its parts ``kl`` and ``ce`` in nats per token; both while evaluating."""
        original, head = self._original[0], self._heads[1]
        kl, ce = (self.kl, self.ce) if self.training else (float(original is not None), 1.0)
        hidden = self.student.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        teacher = None
        if kl and original is not None and head is not None:
            with torch.no_grad():
                other = original.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
            teacher = (other.flatten(0, 1), head)
        labels = functional.pad(input_ids[:, 1:], (0, 1), value=IGNORED).flatten()
        loss, parts = distance(hidden.flatten(0, 1), self._heads[0], teacher, labels, kl=kl, ce=ce)
        return {"loss": loss, "kl": parts[0], "ce": parts[1]}
