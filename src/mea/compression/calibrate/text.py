"""Calibration text: which, how much, and what of it is held out."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from mea.text import check_fraction, encode_text, load_text, repeat_spans, start_token, windows


@dataclass(frozen=True)
class Calibration:
    """Which text the factors are fitted on.

    Attributes
    ----------
    text
        A packaged text's name or a file.
    tokens, window
        How much of it, in windows of how many tokens.
    seed
        Chooses the windows.
    copy_fraction
        Share of the windows in which a part is read a second time, see `mea.text.repeat_spans`.
    """

    text: str = "calibration"
    tokens: int = 16384
    window: int = 1024
    seed: int = 0
    copy_fraction: float = 0.5

    def __post_init__(self) -> None:
        check_fraction(self.copy_fraction)
        if self.window < 64 or self.tokens < 4 * self.window:
            raise ValueError(
                f"calibration needs at least 4 windows of at least 64 tokens, not {self.tokens} tokens in windows of "
                f"{self.window}"
            )

    def order(self, windows: int) -> Int[Tensor, " n"]:
        """Numbers of the text's windows: factors are fitted on the first ones, the rest may be held out."""
        return torch.randperm(windows, generator=torch.Generator().manual_seed(self.seed))


def calibration_tokens(tokenizer: Any, calibration: Calibration) -> Int[Tensor, "n t"]:
    """Windows of the calibration text, chosen by the seed from all that it has.

    Each opens with the token that the tokenizer puts before every text, if it has one: what is kept of that token in
    the cache is read by all that follow, and a model may be useless without it. In as many as
    `Calibration.copy_fraction` says a part is read again.

    Raises
    ------
    ValueError
        The text is shorter than what is asked for.
    """
    ids = encode_text(tokenizer, load_text(calibration.text))
    rows, wanted = windows(ids, calibration.window, start_token(tokenizer)), calibration.tokens // calibration.window
    if len(rows) < wanted:
        raise ValueError(
            f"{calibration.text} has {len(ids):,} tokens, {len(rows)} calibration windows of {calibration.window}; "
            f"{wanted} are asked for: give a longer text or fewer tokens"
        )
    chosen = rows[calibration.order(len(rows))[:wanted].sort().values]
    return repeat_spans(chosen, calibration.copy_fraction, calibration.seed)


def held_out_tokens(
    tokenizer: Any, calibration: Calibration, count: int, window: int, text: str | None = None
) -> Int[Tensor, "n t"]:
    """Windows of text that factors were not fitted on: of `text`, or of the calibration text's rest.

    Raises
    ------
    ValueError
        There is not so much of it.
    """
    wanted, start = count // window, start_token(tokenizer)
    if wanted < 1:
        raise ValueError(f"held-out text needs at least one window of {window} tokens, not {count} tokens")
    ids = encode_text(tokenizer, load_text(text or calibration.text))
    if text is None:
        used, rows = calibration.tokens // calibration.window, windows(ids, calibration.window, start)
        ids = rows[calibration.order(len(rows))[used:], start is not None :].flatten()
    found = windows(ids, window, start)[:wanted]
    if len(found) < wanted:
        beside = "" if text else " beside those of the calibration"
        raise ValueError(
            f"{text or calibration.text} has {len(ids):,} tokens{beside}, not {wanted * window:,}: "
            "calibrate on fewer, or name another text to hold out"
        )
    return found
