"""The two checks that every conversion ends in, made layer by layer while the layers stream by.

1. At full rank the converted model's logits equal the original's: the architecture's forward is reproduced.
2. At the chosen rank, decoding token by token over a cache (absorbed) equals the pass over all tokens at once
   (materialised): the two ways of reading agree.

Both run in fp32 on the first tokens of the calibration text, whatever the model's dtype.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mea.compression.convert import latent_copy
from mea.compression.fit import FittedLayer
from mea.compression.stream import embed, layer_inputs, read_out, run_layer_cached

CHECKED_TOKENS = 24
TOLERANCE = 1e-4


class ConversionError(ValueError):
    """A converted model does not compute what it must; nothing of it should be used."""


class SelfCheck:
    """Four streams of hidden states through the layers: original, full rank, and the chosen rank read in both ways.

    Parameters
    ----------
    model
        The original.
    tokens
        Calibration tokens, of which the first few are used.
    """

    def __init__(self, model: Any, tokens: Int[Tensor, "n t"]):
        self.model = model
        self.tokens = tokens[:1, :CHECKED_TOKENS]
        self.inputs = layer_inputs(model, self.tokens.shape[1])
        hidden = embed(model, self.tokens).float()
        self.original = self.full = self.at_once = self.cached = hidden

    @torch.no_grad()
    def advance(self, fitted: FittedLayer) -> None:
        """Take all streams through one layer."""
        layer, inputs = fitted.layer, self.inputs[fitted.index]
        full = chosen = layer
        if fitted.factors is not None and fitted.full is not None:
            full, chosen = latent_copy(layer, fitted.full), latent_copy(layer, fitted.factors)
            chosen.self_attn.reading = "materialised"
        self.original = layer(self.original, **inputs.options)
        self.full = full(self.full, **inputs.options)
        self.at_once = chosen(self.at_once, **inputs.options)
        if chosen is not layer:
            chosen.self_attn.reading = "absorbed"
        self.cached = run_layer_cached(chosen, self.cached, inputs)

    def result(self) -> dict[str, float]:
        """The largest errors of the logits, relative to the largest logit where that is above 1.

        Raises
        ------
        ConversionError
            An error is above the tolerance.
        """
        streams = torch.cat([self.original, self.full, self.at_once, self.cached])
        original, full, at_once, cached = read_out(self.model, self.tokens, streams)
        errors = {"full_rank": _error(full, original), "cached": _error(cached, at_once)}
        explanations = {
            "full_rank": "at full rank the converted model's logits differ from the original's",
            "cached": "decoding over the compressed cache differs from the pass over all tokens at once",
        }
        for name, error in errors.items():
            if not error <= TOLERANCE:
                raise ConversionError(
                    f"{explanations[name]} by {error:.1e} (allowed: {TOLERANCE:.0e}); nothing was saved. The model's "
                    f"attention does something that the conversion does not know; please report the model's config"
                )
        return errors


def _error(actual: Float[Tensor, "t vocabulary"], expected: Float[Tensor, "t vocabulary"]) -> float:
    return ((actual - expected).abs().max() / expected.abs().max().clamp_min(1.0)).item()
