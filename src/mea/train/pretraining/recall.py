"""Associative recall as a task: rows of key-value pairs and queries for them, drawn by a seed.

Multi-query associative recall (MQAR, arXiv 2312.04927): a row begins with pairs of a key and its value. Then come
queries, each a key from the row and, as the token to predict, its value. Blanks fill the places between them.
"""

from typing import Annotated

import numpy as np
import torch
from pydantic import BeforeValidator, Field, StrictFloat, StrictInt
from pydantic.dataclasses import dataclass
from torch import Tensor
from torch.utils.data import Dataset

from mea.models.lm_head import IGNORED
from mea.train.settings import CONFIG, Count

BLANK = 0  # the token between queries
# A lone number in TOML is a list of one.
Counts = Annotated[
    tuple[Count, ...],
    BeforeValidator(lambda value: (value,) if isinstance(value, int) else value),
]


@dataclass(frozen=True, config=CONFIG)
class RecallSettings:
    """Multi-query associative recall (arXiv 2312.04927).

    Parameters
    ----------
    pairs
        Numbers of pairs in a row; rows take them in turn.
    validation_pairs
        Numbers of pairs in validation, which gives the accuracy for each; empty for `pairs`.
    queries
        Queries per row, each for a different key; at most one per pair. None for one per pair.
    keys_per_query
        Tokens of a key. With two or more, a key is an ordered tuple; the keys of a row share tokens, so the value
        depends on the whole tuple.
    keys, values
        Sizes of the two alphabets.
    power
        Exponent of the distribution of query positions: the s-th position after the pairs has a probability
        proportional to ``s ** (power - 1)``. The paper takes 0.01, which favours early positions; 1 is uniform.
    """

    pairs: Annotated[Counts, Field(min_length=1)] = (4, 8, 16)
    validation_pairs: Counts = ()
    queries: Count | None = None
    keys_per_query: Annotated[StrictInt, Field(ge=1, le=8)] = 1
    keys: Count = 64
    values: Count = 64
    power: Annotated[StrictFloat, Field(gt=0, le=1)] = 0.01

    def __post_init__(self) -> None:
        most = max(self.pairs + self.validation_pairs)
        if self.keys**self.keys_per_query < most:
            raise ValueError(
                f"data.recall.keys ({self.keys}) are too few for {most} different keys of {self.keys_per_query} token"
                f"{'s' * (self.keys_per_query > 1)}"
            )
        if self.values < 2:
            raise ValueError("data.recall.values must be 2 or more: with one there is nothing to recall")

    @property
    def vocabulary(self) -> int:
        """Tokens of the model: the blank, then keys, then values."""
        return 1 + self.keys + self.values

    @property
    def scored_pairs(self) -> tuple[int, ...]:
        """Numbers of pairs in validation."""
        return tuple(sorted(set(self.validation_pairs or self.pairs)))

    @property
    def longest(self) -> int:
        """Tokens that the pairs and queries of the fullest row take."""
        return max(
            (pairs + self.queries_of(pairs)) * (self.keys_per_query + 1) for pairs in self.pairs + self.scored_pairs
        )

    def queries_of(self, pairs: int) -> int:
        """Queries of a row of `pairs`."""
        return pairs if self.queries is None else min(pairs, self.queries)


class RecallRows(Dataset):
    """`count` rows. A row depends on its index and the stream only, so every process draws the same rows.

    Parameters
    ----------
    task
        Settings of the task.
    pairs
        Numbers of pairs: row ``i`` has ``pairs[i % len(pairs)]``.
    row
        Tokens of a row.
    stream
        Seeds. Those of training and of validation differ.
    """

    def __init__(
        self, task: RecallSettings, pairs: tuple[int, ...], row: int, count: int, stream: tuple[int, ...]
    ) -> None:
        self.task, self.pairs, self.row, self.count, self.stream = task, pairs, row, count, stream

    def __len__(self) -> int:
        return self.count

    def pairs_of(self, index: int) -> int:
        """Pairs of a row."""
        return self.pairs[index % len(self.pairs)]

    def mean_by_pairs(self, values: Tensor) -> list[float]:
        """Means of values ``[rows]`` over the rows with equally many pairs, from few pairs to many."""
        pairs = torch.tensor([self.pairs_of(index) for index in range(len(self))])
        return [values[pairs == count].mean().item() for count in sorted(set(self.pairs))]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        rng = np.random.default_rng([*self.stream, index])
        tokens, labels = recall_row(self.task, self.pairs_of(index), self.row, rng)
        row = {"input_ids": tokens, "labels": labels, "position_ids": np.arange(self.row)}
        return {name: torch.from_numpy(values) for name, values in row.items()}


def recall_row(task: RecallSettings, pairs: int, row: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of one row and their labels: the value behind each query, elsewhere `IGNORED`.

    The value is in the tokens too, as in text; no key is asked for twice, so that no answer stands in the row before.
    """
    width, queries = task.keys_per_query + 1, task.queries_of(pairs)
    values = 1 + task.keys + rng.integers(task.values, size=(pairs, 1))
    entries = np.concatenate([_keys(task, pairs, rng), values], 1)
    tokens, labels = np.full(row, BLANK), np.full(row, IGNORED)
    tokens[: entries.size] = entries.ravel()
    places = (row - entries.size) // width
    weights = np.arange(1.0, places + 1) ** (task.power - 1)
    taken = rng.choice(places, queries, replace=False, p=weights / weights.sum())
    asked = entries[rng.choice(pairs, queries, replace=False)]
    starts = entries.size + taken * width
    tokens[starts[:, None] + np.arange(width)] = asked
    labels[starts + width - 1] = asked[:, -1]
    return tokens, labels


def _keys(task: RecallSettings, pairs: int, rng: np.random.Generator) -> np.ndarray:
    """Different keys ``[pairs, keys_per_query]``, among about twice as many that the row's tokens can form."""
    length = task.keys_per_query
    size = min(task.keys, int(np.ceil((2 * pairs) ** (1 / length))))
    alphabet = 1 + rng.choice(task.keys, size, replace=False)
    numbers = rng.choice(size**length, pairs, replace=False)
    return alphabet[numbers[:, None] // size ** np.arange(length) % size]
