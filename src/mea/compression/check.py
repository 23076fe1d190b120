"""The two checks of every conversion, made layer by layer during the fit.

1. At full rank the converted model's logits equal the original's: the architecture's forward is reproduced.
2. At the chosen rank, decoding token by token over a cache (absorbed) equals the pass over all tokens at once
   (materialised) in every layer.

Both run in fp32 on the first tokens of the calibration text, whatever the model's dtype.
"""

import math

import torch
from jaxtyping import Int
from torch import Tensor

from mea.compression.calibrate.layerwise import LayerWalk, attention_outputs, run_layer_cached
from mea.compression.convert import CHECKED_TOKENS, TOLERANCE, ConversionError, latent_copy
from mea.compression.fit import FittedLayer


class SelfCheck:
    """Both checks: runs the original, the full-rank and the compressed layers side by side.

    Parameters
    ----------
    walk
        Layer walk of the original model.
    tokens
        Calibration tokens, of which the first few are used.
    """

    def __init__(self, walk: LayerWalk, tokens: Int[Tensor, "n t"]):
        self.walk = walk
        self.tokens = tokens[:1, :CHECKED_TOKENS]
        self.inputs = walk.inputs(self.tokens.shape[1])
        self.original = self.full = self.chosen = walk.embed(self.tokens).float()
        self.cached_error = 0.0

    @torch.no_grad()
    def advance(self, fitted: FittedLayer) -> None:
        """Run all streams through one layer, and the chosen rank in both ways of reading."""
        layer, inputs = fitted.layer, self.inputs[fitted.index]
        self.original = layer(self.original, **inputs.options)
        if fitted.factors is None or fitted.full_rank is None:
            self.full, self.chosen = (layer(stream, **inputs.options) for stream in (self.full, self.chosen))
            return
        self.full = latent_copy(layer, fitted.full_rank, inputs.rotary)(self.full, **inputs.options)
        chosen = latent_copy(layer, fitted.factors, inputs.rotary)
        with attention_outputs(chosen) as cached:
            chosen.self_attn.reading = "absorbed"
            run_layer_cached(chosen, self.chosen, inputs)
        with attention_outputs(chosen) as at_once:
            chosen.self_attn.reading = "materialised"
            self.chosen = chosen(self.chosen, **inputs.options)
        expected = at_once[0]
        error = (torch.cat(cached, dim=1) - expected).abs().max() / expected.abs().max().clamp_min(1e-30)
        self.cached_error = max(error.nan_to_num(math.inf).item(), self.cached_error)

    def result(self) -> dict[str, float]:
        """The errors of both checks.

        ``full_rank`` is the largest error of the logits, relative to the largest logit if it is above 1. ``cached`` is
        the largest error of cached decoding in a layer's attention output, relative to the largest output. It is
        measured layer by layer on equal input: in a coarsely compressed model rounding errors can grow from layer to
        layer.

        Raises
        ------
        ConversionError
            An error is above the tolerance.
        """
        original, full = self.walk.read_out(self.tokens, torch.cat([self.original, self.full]))
        full_error = ((full - original).abs().max() / original.abs().max().clamp_min(1.0)).item()
        errors = {"full_rank": full_error, "cached": self.cached_error}
        explanations = {
            "full_rank": "at full rank the converted model's logits differ from the original's",
            "cached": "decoding over the compressed cache differs from the pass over all tokens at once",
        }
        for name, error in errors.items():
            if not error <= TOLERANCE:
                raise ConversionError(
                    f"{explanations[name]} by {error:.1e} (allowed: {TOLERANCE:.0e}); nothing was saved. The model's "
                    f"attention has a feature that the conversion does not support; please report the model's config"
                )
        return errors
