"""Loss and divergence on held-out text of a model in which single layers are replaced.

Only the layers above a change are run again. One backward pass estimates the effect of a small change of *any* layer:
the gradient of the divergence with respect to each attention's output, times the change of that output.
"""

import copy
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mea.compression.calibrate.layerwise import LayerWalk
from mea.compression.convert import latent_copy
from mea.compression.methods.factors import LayerFactors
from mea.models.lm_head import ROWS, head_logits
from mea.ops.precision import fast_dtype


class Scores(NamedTuple):
    """Per scored token, in nats."""

    loss: Float[Tensor, "n scored"]
    divergence: Float[Tensor, "n scored"]  # from the original's next-token distribution


class HeldOut:
    """Windows of text and the model that scores them, layer by layer.

    Parameters
    ----------
    walk
        Of the uncompressed model, in memory. If the model has another dtype than `dtype`, a copy is scored.
    tokens
        The windows.
    dtype
        Of the computation, by default `fast_dtype`; sums of losses are in fp32.
    """

    def __init__(self, walk: LayerWalk, tokens: Int[Tensor, "n t"], dtype: torch.dtype | None = None):
        model, dtype = walk.model, dtype or fast_dtype(walk.model.device)
        self.model = model if model.dtype == dtype else copy.deepcopy(model).to(dtype)
        self.rotary = model.model.rotary_emb  # not the copy's: a cast rounds its frequencies
        self.tokens, self.dtype = tokens, dtype
        self.layers: list[Any] = list(self.model.model.layers)
        self.options = [_cast(inputs.options, dtype) for inputs in walk.inputs(tokens.shape[1])]
        self.first = walk.embed(tokens).to(dtype)
        self.reference = self.states(self.layers)[-1]

    def compressed(self, index: int, factors: LayerFactors | None) -> Any:
        """Layer `index` with factors, or the original layer without; unchanged weights are shared."""
        return self.layers[index] if factors is None else latent_copy(self.layers[index], factors, self.rotary)

    @torch.no_grad()
    def through(self, hidden: Float[Tensor, "n t D"], layer: Any, index: int) -> Float[Tensor, "n t D"]:
        """Run all windows through a layer at position `index`."""
        return torch.cat([layer(window, **self.options[index]) for window in hidden.split(1)])

    def above(self, hidden: Float[Tensor, "n t D"], index: int) -> Float[Tensor, "n t D"]:
        """The last layer's output from the output of layer `index - 1`, through uncompressed layers."""
        for number in range(index, len(self.layers)):
            hidden = self.through(hidden, self.layers[number], number)
        return hidden

    def states(
        self, layers: Sequence[Any], known: Sequence[Float[Tensor, "n t D"]] = ()
    ) -> list[Float[Tensor, "n t D"]]:
        """The input of each layer, then the output of the last; the inputs of the first layers may be `known`."""
        states = list(known) or [self.first]
        for index in range(len(states) - 1, len(layers)):
            states.append(self.through(states[-1], layers[index], index))
        return states

    @torch.no_grad()
    def score(self, last: Float[Tensor, "n t D"]) -> Scores:
        """Losses, and the divergence from the original, given the last layer's output."""
        losses, divergences = [], []
        for window, hidden, reference in zip(self.tokens, last, self.reference, strict=True):
            parts = [self._compare(*part) for part in self._parts(window, hidden, reference)]
            losses.append(torch.cat([loss for loss, _ in parts]))
            divergences.append(torch.cat([divergence for _, divergence in parts]))
        return Scores(torch.stack(losses), torch.stack(divergences))

    def slopes(
        self, layers: Sequence[Any], variants: Sequence[Mapping[Hashable, Any]]
    ) -> tuple[float, list[dict[Hashable, float]]]:
        """The first-order change of the mean divergence when a layer is replaced by a variant.

        Parameters
        ----------
        layers
            The layers of the current model.
        variants
            Per layer: name -> a layer that could replace it.

        Returns
        -------
        The mean divergence now, and per layer and name the change by this replacement alone.
        """
        states = self.states(layers)
        total, gradient = self._gradient(states[-1])
        changes: list[dict[Hashable, float]] = []
        for index in reversed(range(len(layers))):
            added = dict.fromkeys(variants[index], 0.0)
            below = []
            for hidden, upper in zip(states[index].split(1), gradient.split(1), strict=True):
                hidden = hidden.detach().requires_grad_()
                with torch.enable_grad(), _attention(layers[index]) as seen:
                    out = layers[index](hidden, **self.options[index])
                lower, attention = torch.autograd.grad(out, [hidden, seen["out"]], upper)
                below.append(lower)
                for name, variant in variants[index].items():
                    with torch.no_grad():
                        other = variant.self_attn(seen["in"].detach(), **self.options[index])[0]
                    difference = other.float() - seen["out"].detach().float()
                    added[name] += (difference * attention.float()).sum().item()
            gradient = torch.cat(below)
            changes.append(added)
        return total, changes[::-1]

    def _gradient(self, last: Float[Tensor, "n t D"]) -> tuple[float, Float[Tensor, "n t D"]]:
        """The mean divergence and its gradient with respect to the last layer's output."""
        count, total, gradients = len(last) * (last.shape[1] - 1), 0.0, []
        for window, hidden, reference in zip(self.tokens, last, self.reference, strict=True):
            hidden = hidden.detach().requires_grad_()
            gradient = torch.zeros_like(hidden)
            with torch.enable_grad():
                for part in self._parts(window, hidden, reference):
                    divergence = self._compare(*part)[1].sum() / count
                    total += divergence.item()
                    gradient += torch.autograd.grad(divergence, hidden)[0]
            gradients.append(gradient)
        return total, torch.stack(gradients)

    def _parts(self, window: Tensor, hidden: Tensor, reference: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for start in range(0, len(window) - 1, ROWS):
            stop = min(start + ROWS, len(window) - 1)
            yield hidden[start:stop], reference[start:stop], window[start + 1 : stop + 1]

    def _compare(
        self, hidden: Float[Tensor, "q D"], reference: Float[Tensor, "q D"], targets: Int[Tensor, " q"]
    ) -> tuple[Float[Tensor, " q"], Float[Tensor, " q"]]:
        norm = self.model.model.norm
        own = head_logits(self.model, norm(hidden)).float().log_softmax(-1)
        with torch.no_grad():
            true = head_logits(self.model, norm(reference)).float().log_softmax(-1)
        loss = -own.gather(-1, targets[:, None].to(own.device))[:, 0]
        return loss, (true.exp() * (true - own)).sum(-1)


def _cast(options: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    tables = tuple(table.to(dtype) for table in options["position_embeddings"])
    return {**options, "position_embeddings": tables, "past_key_values": None}


@contextmanager
def _attention(layer: Any) -> Iterator[dict[str, Tensor]]:
    """Records the input and the output of the layer's attention."""
    seen: dict[str, Tensor] = {}

    def note(_module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        seen["in"] = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        seen["out"] = output[0]

    handle = layer.self_attn.register_forward_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()
