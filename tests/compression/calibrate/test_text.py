"""Which windows the factors are fitted on, and which are held out."""

import copy

import pytest
from tokenizers.processors import TemplateProcessing

from mea.compression.calibrate.text import calibration_tokens, held_out_tokens


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
