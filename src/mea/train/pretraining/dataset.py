"""Rows of tokens for training and validation, cut from memory-mapped shards."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mea.models.lm_head import IGNORED
from mea.records import read_json
from mea.train.checkpoints import checksum_of

CHECKED_BYTES = 2 << 30  # up to here checksums are compared on opening; above, sizes alone


class TokenStream:
    """All tokens of one split as one sequence, read from memory-mapped shards.

    Raises
    ------
    ValueError
        A shard is missing or damaged; the message says what to delete.
    """

    def __init__(self, folder: str | Path, split: str) -> None:
        folder = Path(folder)
        manifest = read_json(folder / "manifest.json")
        self.tokens, self.starts = [], []
        try:
            shards = manifest["shards"][split]
            total = sum(entry["tokens"]["bytes"] for entry in shards)
            for entry in shards:
                for what, dtype in (("tokens", manifest["dtype"]), ("starts", "int64")):
                    path = folder / Path(entry[what]["file"]).name  # in this folder, whatever a manifest says
                    _check(path, entry[what], total <= CHECKED_BYTES)
                    getattr(self, what).append(np.memmap(path, dtype=dtype, mode="r"))
            self.offsets = np.concatenate([[0], np.cumsum([entry["length"] for entry in shards])])
        except (KeyError, TypeError, AttributeError):
            raise ValueError(
                f"{folder / 'manifest.json'} is damaged: delete the folder {folder} to have it made again"
            ) from None

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def read(self, start: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens from `start` on, and the positions among them where documents begin."""
        tokens, begins = [], []
        end = start + length
        shard = int(np.searchsorted(self.offsets, start, side="right")) - 1
        while start < end:
            low, high = int(self.offsets[shard]), int(self.offsets[shard + 1])
            stop = min(end, high)
            tokens.append(self.tokens[shard][start - low : stop - low])
            first, last = np.searchsorted(self.starts[shard], [start - low, stop - low])
            begins.append(self.starts[shard][first:last] + low - (end - length))
            start, shard = stop, shard + 1
        return np.concatenate(tokens).astype(np.int64), np.concatenate(begins)


def _check(path: Path, entry: dict[str, Any], checksum: bool) -> None:
    size = path.stat().st_size if path.is_file() else -1
    good = size == entry["bytes"]
    if good and checksum:
        good = checksum_of(path) == entry["crc32"]
    if not good:
        what = "missing" if size < 0 else f"damaged ({size:,} bytes; {entry['bytes']:,} were written)"
        raise ValueError(f"shard {path} is {what}: delete the folder {path.parent} to have it made again")


def row_of(stream: TokenStream, start: int, length: int) -> dict[str, Tensor]:
    """One row: tokens, labels and positions.

    Positions restart at every document, so that attention stays within documents; the first token of a document is not
    predicted.
    """
    tokens, begins = stream.read(start, length)
    labels, positions = tokens.copy(), np.arange(length)
    labels[begins] = IGNORED
    for begin in begins:
        positions[begin:] = np.arange(length - begin)
    row = {"input_ids": tokens, "labels": labels, "position_ids": positions}
    return {name: torch.from_numpy(values) for name, values in row.items()}


class TrainingRows(Dataset):
    """`count` rows in the order a run sees them: permutation after permutation of all rows, by a seed.

    The order depends on the seed alone, so that a run that continues at row ``n`` reads the same rows.
    """

    def __init__(self, stream: TokenStream, row: int, count: int, seed: int) -> None:
        self.stream, self.row, self.count, self.seed = stream, row, count, seed
        self.available = len(stream) // row
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        epoch, position = divmod(index, self.available)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.available)
        return row_of(self.stream, int(self._order[position]) * self.row, self.row)


class ValidationRows(Dataset):
    """Rows of the validation split, spread evenly over all of it."""

    def __init__(self, stream: TokenStream, row: int, tokens: int) -> None:
        self.stream, self.row = stream, row
        available, wanted = len(stream) // row, max(1, tokens // row)
        if not available:
            raise ValueError(f"the validation split has {len(stream):,} tokens, less than a row of {row}")
        self.chosen = np.unique(np.linspace(0, available - 1, min(wanted, available)).astype(int))

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return row_of(self.stream, int(self.chosen[index]) * self.row, self.row)


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Rows as a batch. Positions are left out where no document begins: attention then needs no mask and is faster."""
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    plain = torch.arange(batch["position_ids"].shape[1])
    if (batch["position_ids"] == plain).all():
        del batch["position_ids"]
    return batch
