"""Exchanging layers: running again from the middle is running from the start, and slopes are derivatives."""

import copy

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from compression.small import tiny
from mea.compression.allocate.held_out_loss import HeldOut
from mea.compression.budget import Layout
from mea.compression.calibrate.layerwise import LayerWalk
from mea.compression.calibrate.text import calibration_tokens, held_out_tokens
from mea.compression.fit import Target, fit_layers
from mea.compression.methods import METHODS
from mea.evaluate.perplexity import token_losses


@pytest.fixture(params=["llama", "gemma3_text", "granite"])
def model(request):
    return tiny(request.param)


def tokens(count: int = 2, length: int = 40) -> torch.Tensor:
    return torch.randint(0, 256, (count, length))


def variants(model, ranks) -> list[list]:
    """Per pair of ranks the factors of all layers."""
    targets = [Target(METHODS["post_rope:uniform"], Layout((pair,) * 3)) for pair in ranks]
    fitted = list(fit_layers(LayerWalk(model), tokens(4, 64), targets))
    return [[layer[target] for layer in fitted] for target in range(len(targets))]


def test_losses_are_those_of_the_model_itself(model):
    held_out = HeldOut(LayerWalk(model), tokens(), torch.float32)
    found = held_out.score(held_out.reference)
    torch.testing.assert_close(found.loss, token_losses(model, held_out.tokens.flatten(), 40))
    assert found.divergence.abs().max() < 1e-5  # rounding alone


def test_layers_above_a_change_are_enough(model):
    held_out = HeldOut(LayerWalk(model), tokens(), torch.float32)
    (fitted,) = variants(model, [(16, 16)])
    changed = held_out.compressed(1, fitted[1].factors)
    partly = held_out.above(held_out.through(held_out.states(held_out.layers)[1], changed, 1), 2)
    whole = held_out.states([held_out.layers[0], changed, held_out.layers[2]])[-1]
    torch.testing.assert_close(partly, whole, rtol=0, atol=0)
    assert held_out.score(whole).divergence.mean() > 0


def test_slopes_are_those_of_a_small_step(model):
    """Against a central difference, the variant's attention output taken a little way in."""
    held_out = HeldOut(LayerWalk(model), tokens(), torch.float32)
    now, other = variants(model, [(16, 16), (24, 24)])
    layers = [held_out.compressed(x.index, x.factors) for x in now]
    others = [{"wider": held_out.compressed(x.index, x.factors)} for x in other]
    total, slopes = held_out.slopes(layers, others)
    assert total == pytest.approx(held_out.score(held_out.states(layers)[-1]).divergence.mean().item(), rel=1e-4)
    for place in range(3):
        step = 1e-2
        values = []
        for way in (step, -step):
            with blended(layers[place], others[place]["wider"], way):
                values.append(held_out.score(held_out.states(layers)[-1]).divergence.double().mean().item())
        assert slopes[place]["wider"] == pytest.approx((values[0] - values[1]) / (2 * step), rel=0.02, abs=2e-5)


class blended:
    """A layer whose attention gives its own output plus a share of the way to another's."""

    def __init__(self, layer, other, share):
        self.layer, self.other, self.share = layer, other, share

    def __enter__(self):
        def move(_module, args, kwargs, output):
            further = self.other.self_attn(*args, **kwargs)[0]
            return (output[0] + self.share * (further - output[0]), *output[1:])

        self.handle = self.layer.self_attn.register_forward_hook(move, with_kwargs=True)

    def __exit__(self, *_):
        self.handle.remove()


def test_held_out_windows_are_not_those_of_the_calibration(tokenizer, calibration):
    used = {tuple(window.tolist()) for window in calibration_tokens(tokenizer, calibration)}
    left = held_out_tokens(tokenizer, calibration, 256, 64)
    assert left.shape == (4, 64)
    assert not used & {tuple(window.tolist()) for window in left}


def test_too_little_text_is_refused(tokenizer, calibration):
    with pytest.raises(ValueError, match="besides those for calibration, not 64,000"):
        held_out_tokens(tokenizer, calibration, 64000, 64)
    with pytest.raises(ValueError, match="at least one window"):
        held_out_tokens(tokenizer, calibration, 32, 64)


def test_every_window_opens_with_the_token_that_the_tokenizer_puts_first(tokenizer, calibration):
    """Llama and Gemma read nothing without it; its keys and values are read by all tokens behind it."""
    plain = calibration_tokens(tokenizer, calibration), held_out_tokens(tokenizer, calibration, 256, 64)
    opening = copy.deepcopy(tokenizer)
    opening.add_special_tokens({"bos_token": "<s>"})
    first = ("<s>", opening.bos_token_id)
    opening.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[first])
    found = calibration_tokens(opening, calibration), held_out_tokens(opening, calibration, 256, 64)
    for without, rows in zip(plain, found, strict=True):
        assert rows.shape == without.shape
        assert (rows[:, 0] == opening.bos_token_id).all()
        assert not (rows[:, 1:] == opening.bos_token_id).any()
        assert not (without == opening.bos_token_id).any()
