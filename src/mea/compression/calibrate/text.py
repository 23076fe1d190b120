"""The choice of calibration windows and of held-out text."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from mea.text import check_fraction, encode_source, repeat_spans, start_token, windows


@dataclass(frozen=True)
class Calibration:
    """Which text the factors are fitted on.

    Attributes
    ----------
    text
        A packaged text's name or a file, also of conversations: `mea.text.encode_source`.
    tokens, window
        Tokens of the text, and tokens of one window.
    seed
        Chooses the windows.
    copy_fraction
        Share of the windows with repeated spans, see `mea.text.repeat_spans`.
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
                f"{self.window}: give at least {4 * max(64, self.window):,} tokens, or shorter windows"
            )

    def order(self, windows: int) -> Int[Tensor, " n"]:
        """Indices of the text's windows in random order: factors are fitted on the first, the rest may be held out."""
        return torch.randperm(windows, generator=torch.Generator().manual_seed(self.seed))


def calibration_tokens(tokenizer: Any, calibration: Calibration) -> Int[Tensor, "n t"]:
    """Windows of the calibration text, drawn at random with the seed.

    Each begins with the token that the tokenizer puts before every text, if it has one: all later tokens attend to it,
    and a model may fail without it. A fraction `Calibration.copy_fraction` of the windows has repeated spans.

    Raises
    ------
    ValueError
        The text has fewer windows than asked for.
    """
    ids = encode_source(tokenizer, calibration.text)
    rows, wanted = windows(ids, calibration.window, start_token(tokenizer)), calibration.tokens // calibration.window
    if len(rows) < wanted:
        raise ValueError(
            f"{calibration.text} has {len(ids):,} tokens, and the calibration needs {wanted} windows of "
            f"{calibration.window:,}: give a longer text, or fewer calibration tokens"
        )
    chosen = rows[calibration.order(len(rows))[:wanted].sort().values]
    return repeat_spans(chosen, calibration.copy_fraction, calibration.seed)


def held_out_tokens(
    tokenizer: Any, calibration: Calibration, count: int, window: int, text: str | None = None
) -> Int[Tensor, "n t"]:
    """Windows of text that factors were not fitted on: of `text`, or of the rest of the calibration text.

    Raises
    ------
    ValueError
        The text is too short.
    """
    wanted, start = count // window, start_token(tokenizer)
    if wanted < 1:
        raise ValueError(f"held-out text needs at least one window of {window} tokens, not {count} tokens")
    ids = encode_source(tokenizer, text or calibration.text)
    if text is None:
        used, rows = calibration.tokens // calibration.window, windows(ids, calibration.window, start)
        ids = rows[calibration.order(len(rows))[used:], start is not None :].flatten()
    rows = windows(ids, window, start)[:wanted]
    if len(rows) < wanted:
        besides = "" if text else " besides those for calibration"
        raise ValueError(
            f"{text or calibration.text} has {len(ids):,} tokens{besides}, not {wanted * window:,}: "
            "calibrate on fewer tokens, or give another held-out text"
        )
    return rows
