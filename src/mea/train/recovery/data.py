"""Text as windows to train on, and windows held out from it."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from mea.text import encode_source, load_text, repeat_spans, start_token
from mea.text import windows as cut
from mea.train.recovery.settings import Recovery


def windows(
    tokenizer: Any, texts: Sequence[str], settings: Recovery, skip: int = 0
) -> tuple[Int[Tensor, "n t"], Int[Tensor, "m t"]]:
    """Windows to train on, in their order, and windows held out.

    Each opens with the token that the tokenizer puts before every text, if it has one.

    The end of every text is held out, in proportion to the texts' lengths, so that hardly any held-out window continues
    a training window. The other windows are drawn without repetition from all texts; of these,
    ``settings.copy_fraction`` end with copies of some of their own tokens.

    Parameters
    ----------
    texts
        Packaged names or files.
    skip
        Training tokens that earlier stages took from the same draw.

    Raises
    ------
    ValueError
        The texts are too short.
    """
    rows = []
    for text in texts:
        ids = encode_source(tokenizer, text)
        rows.append(cut(ids, settings.window, start_token(tokenizer)))
    count = sum(len(part) for part in rows)
    wanted, held = settings.steps * settings.batch, -(-settings.held_out // settings.window)
    before = -(-skip // settings.window)
    if before + wanted + held > count:
        earlier = f" after the {skip:,} of the stages before" if skip else ""
        raise ValueError(
            f"{', '.join(map(str, texts))}: {count * settings.window:,} tokens in windows of {settings.window}; "
            f"{settings.tokens:,} to train on{earlier} and {settings.held_out:,} held out are needed: give more "
            f"text (--text may be repeated) or fewer tokens"
        )
    ends = [max(1, round(held * len(part) / count)) if len(part) else 0 for part in rows]
    kept_out = torch.cat([part[len(part) - end :] for part, end in zip(rows, ends, strict=True)])
    rest = torch.cat([part[: len(part) - end] for part, end in zip(rows, ends, strict=True)])
    if before + wanted > len(rest):
        raise ValueError(
            f"{', '.join(map(str, texts))}: too short for one held-out window each; give longer or fewer texts"
        )
    order = torch.randperm(len(rest), generator=torch.Generator().manual_seed(settings.seed))
    return repeat_spans(rest[order[before : before + wanted]], settings.copy_fraction, settings.seed), kept_out


def overlaps(texts: Sequence[str], tested: Sequence[str], run: int = 13) -> int:
    """Number of sequences of `run` words, ignoring case and punctuation, that training texts share with test texts."""

    def runs(name: str) -> Iterator[int]:
        words = re.findall(r"\w+", load_text(name).lower())
        return (hash(tuple(words[start : start + run])) for start in range(len(words) - run + 1))

    known = {run_hash for name in tested for run_hash in runs(name)}
    return len({run_hash for name in texts for run_hash in runs(name) if run_hash in known})
