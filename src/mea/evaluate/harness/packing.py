"""Rows in which several continuations share their common context, so that it is computed once.

The answers of a multiple-choice item differ at their end only. Their common beginning is written once, each rest
follows as a branch, and a mask lets every token see the beginning and its own branch. Tokens keep the positions that
they have in their own text, so that with rotary positions every branch is computed as if it stood alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

PADDING = -1  # segment of tokens that belong to no text
# Attention and its mask grow with the square of a row, so that strangers in it cost more than they save: a text joins
# where at least this share of it is common, while the branches together are no longer than the beginning, or than this.
LEAST_SHARE, BRANCHES = 0.25, 512


@dataclass(frozen=True)
class Scored:
    """One text whose end is scored: the tokens to read, and the tokens to predict at its end."""

    tokens: tuple[int, ...]  # without the last target, which nobody reads
    targets: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.targets or len(self.targets) > len(self.tokens):
            raise ValueError(f"{len(self.targets)} targets cannot be predicted from {len(self.tokens)} tokens")


@dataclass(frozen=True)
class Packed:
    """One row: `targets_at` has, for each text by its index, the row's tokens at which its targets are predicted."""

    tokens: tuple[int, ...]
    positions: tuple[int, ...]
    segments: tuple[int, ...]  # 0 is the common beginning, then the branches
    targets_at: tuple[tuple[int, tuple[int, ...]], ...]


def pack(texts: Sequence[Scored], share: bool = True) -> list[Packed]:
    """Rows for all texts; neighbours with a common beginning share a row if that saves tokens, and if `share`."""
    rows: list[Packed] = []
    group: list[int] = []
    for index, text in enumerate(texts):
        if group and (not share or not _worth(texts, group, text)):
            rows.append(_row(texts, group))
            group = []
        group.append(index)
    return [*rows, _row(texts, group)] if group else rows


def batches(rows: Sequence[Packed], budget: int) -> Iterator[list[Packed]]:
    """Rows of like length together, longest first, as many as fit into `budget` tokens with padding, at least one."""
    ordered = sorted(rows, key=lambda row: -len(row.tokens))
    first = 0
    while first < len(ordered):
        count = max(1, budget // len(ordered[first].tokens))
        yield ordered[first : first + count]
        first += count


def tensors(
    rows: Sequence[Packed],
) -> tuple[Int[Tensor, "b t"], Int[Tensor, "b t"], Bool[Tensor, "b 1 t t"] | None]:
    """Tokens, positions and mask (true where a token may look) of one batch.

    The mask is None where no row has branches: causal attention then needs none, because padding comes last.
    """
    length = max(len(row.tokens) for row in rows)
    ids = torch.tensor([[*row.tokens, *[0] * (length - len(row.tokens))] for row in rows])
    positions = torch.tensor([[*row.positions, *[0] * (length - len(row.tokens))] for row in rows])
    if not any(any(row.segments) for row in rows):
        return ids, positions, None
    segments = torch.tensor([[*row.segments, *[PADDING] * (length - len(row.tokens))] for row in rows])
    seen = (segments[:, None, :] == 0) | (segments[:, None, :] == segments[:, :, None])
    mask = seen & torch.ones(length, length, dtype=torch.bool).tril()
    return ids, positions, mask[:, None]


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _worth(texts: Sequence[Scored], group: list[int], text: Scored) -> bool:
    """Whether one more text makes the row shorter than two rows would be, and the row does not become a long one."""
    members = [texts[index] for index in group]
    before = min((_common(members[0].tokens, member.tokens) for member in members[1:]), default=len(members[0].tokens))
    after = min(before, _common(members[0].tokens, text.tokens))
    branches = sum(len(member.tokens) - after for member in [*members, text])
    few = after >= LEAST_SHARE * len(text.tokens) and branches <= max(after, BRANCHES)
    return few and after * len(group) > before * (len(group) - 1)


def _row(texts: Sequence[Scored], group: list[int]) -> Packed:
    first = texts[group[0]].tokens
    shared = min(_common(first, texts[index].tokens) for index in group)
    tokens, positions, segments = list(first[:shared]), list(range(shared)), [0] * shared
    targets_at = []
    branch = 0
    for index in group:
        text = texts[index]
        rest = text.tokens[shared:]
        offset = len(tokens) - shared
        wanted = range(len(text.tokens) - len(text.targets), len(text.tokens))
        targets_at.append((index, tuple(i if i < shared else i + offset for i in wanted)))
        if rest and len(group) > 1:
            branch += 1
        tokens += rest
        positions += range(shared, len(text.tokens))
        segments += [branch] * len(rest)
    return Packed(tuple(tokens), tuple(positions), tuple(segments), tuple(targets_at))
