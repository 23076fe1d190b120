"""Tokens on disk: a tokenizer trained once, documents tokenised once, shards mapped into memory, rows cut from them.

A folder of shards holds the tokenizer, and for each split shards of two files: ``tokens`` (unsigned integers, document
after document, each closed by the end mark) and ``starts`` (where documents begin). A shard exists as soon as
``progress.json`` names it; ``manifest.json`` is written last, when all are there.
"""

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mea.records import Progress
from mea.train.checkpoints import checksum_of
from mea.train.pretraining.documents import documents, is_validation, source_files
from mea.train.pretraining.settings import DataSettings

END = "<|end|>"  # closes a document
SPLITS = ("train", "validation")
BATCH_CHARACTERS = 4_000_000  # tokenised at a time
CHECKED_BYTES = 2 << 30  # up to here checksums are compared on opening; above, sizes alone
IGNORED = -100  # a label that is not scored


def train_tokenizer(texts: Iterator[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE (arXiv 1508.07909): any text can be encoded, and decodes to itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[END],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


def prepare(data: DataSettings, cache: str | Path, progress: Progress | None = None) -> Path:
    """Tokenise a data set unless that is done; return the folder of its shards inside `cache`.

    Interrupted, it goes on after the last whole shard.

    Raises
    ------
    ValueError
        A given tokenizer without an end mark; or a split that came out empty.
    """
    key = _fingerprint(data)
    folder = Path(cache) / key
    if (folder / "manifest.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(data, folder)
    _tokenise(data, tokenizer, folder, progress)
    return folder


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder of shards."""
    return AutoTokenizer.from_pretrained(Path(folder) / "tokenizer")


def _fingerprint(data: DataSettings) -> str:
    """Tells data sets apart: the settings, and the files' names, sizes and ends."""
    settings = {
        name: value for name, value in asdict(data).items() if name not in ("validation_tokens", "row", "files")
    }
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=8)
    for path in source_files(data) if data.hub is None else ():
        with path.open("rb") as file:
            head = file.read(1 << 16)
            file.seek(max(0, path.stat().st_size - (1 << 16)))
            digest.update(f"{path.name} {path.stat().st_size}".encode() + head + file.read())
    return digest.hexdigest()


def _tokenizer(data: DataSettings, folder: Path) -> PreTrainedTokenizerBase:
    place = folder / "tokenizer"
    if not place.is_dir():
        if data.tokenizer is not None:
            tokenizer = AutoTokenizer.from_pretrained(data.tokenizer)
        else:
            tokenizer = train_tokenizer(_first(data), data.vocabulary)
        if tokenizer.eos_token_id is None:
            raise ValueError(f"the tokenizer {data.tokenizer} has no end-of-text token to close documents with")
        partial = folder / "tokenizer.partial"
        tokenizer.save_pretrained(partial)
        partial.rename(place)
    return load_tokenizer(folder)


def _first(data: DataSettings) -> Iterator[str]:
    left = data.tokenizer_characters
    for text in documents(data):
        if not is_validation(text, data.validation_fraction):
            yield text[:left]
            left -= len(text)
        if left <= 0:
            return


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _tokenise(data: DataSettings, tokenizer: Any, folder: Path, progress: Progress | None) -> None:
    """Write shards of both splits side by side; after each round say in ``progress.json`` how far it got."""
    place = folder / "progress.json"
    state: dict[str, Any] = {"documents": 0, "shards": {split: [] for split in SPLITS}}
    if place.is_file():
        state = json.loads(place.read_text(encoding="utf-8"))
    dtype = np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32
    open_tokens: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    done, waiting = state["documents"], 0
    for batch in _batches(islice(documents(data), done, None)):
        encoded = tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        for text, ids in zip(batch, encoded, strict=True):
            split = SPLITS[is_validation(text, data.validation_fraction)]
            open_tokens[split].append(np.asarray([*ids, tokenizer.eos_token_id], dtype))
            waiting += len(ids) + 1
        done += len(batch)
        if progress:
            progress("documents tokenised", done, done)
        if waiting >= data.shard_tokens:
            _close(folder, state, open_tokens, done)
            waiting = 0
    _close(folder, state, open_tokens, done)
    for split in SPLITS:
        if not state["shards"][split]:
            raise ValueError(
                f"no document fell into the {split} split ({done} documents, validation_fraction "
                f"{data.validation_fraction}): give more documents, a separator, or another fraction"
            )
    manifest = {"documents": done, "dtype": np.dtype(dtype).name, "shards": state["shards"]}
    _write_json(folder / "manifest.json", manifest)


def _close(folder: Path, state: dict[str, Any], open_tokens: dict[str, list[np.ndarray]], done: int) -> None:
    """Write what is waiting as shards, then name them in the progress file, together with the documents they cover."""
    for split, pieces in open_tokens.items():
        if not pieces:
            continue
        number = len(state["shards"][split])
        lengths = np.asarray([len(piece) for piece in pieces], np.int64)
        files = {"tokens": np.concatenate(pieces), "starts": lengths.cumsum() - lengths}
        entry: dict[str, Any] = {"length": int(lengths.sum())}
        for what, array in files.items():
            name = f"{split}-{number:05d}.{what}"
            content = array.tobytes()
            _write_bytes(folder / name, content)
            entry[what] = {"file": name, "bytes": len(content), "crc32": zlib.crc32(content)}
        state["shards"][split].append(entry)
        pieces.clear()
    state["documents"] = done
    _write_json(folder / "progress.json", state)


def _write_bytes(path: Path, data: Any) -> None:
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        free = shutil.disk_usage(path.parent).free
        raise OSError(
            error.errno, f"{error.strerror}; {len(data):,} bytes to write, {free:,} free", str(path)
        ) from error


def _write_json(path: Path, value: Any) -> None:
    _write_bytes(path, json.dumps(value, indent=1).encode())


class TokenStream:
    """All tokens of one split as one sequence, read from memory-mapped shards.

    Raises
    ------
    ValueError
        A shard is missing or damaged; the message says what to delete.
    """

    def __init__(self, folder: str | Path, split: str) -> None:
        folder = Path(folder)
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        shards = manifest["shards"][split]
        total = sum(entry["tokens"]["bytes"] for entry in shards)
        self.tokens, self.starts = [], []
        for entry in shards:
            for what, dtype in (("tokens", manifest["dtype"]), ("starts", "int64")):
                path = folder / entry[what]["file"]
                _check(path, entry[what], total <= CHECKED_BYTES)
                getattr(self, what).append(np.memmap(path, dtype=dtype, mode="r"))
        self.offsets = np.concatenate([[0], np.cumsum([entry["length"] for entry in shards])])

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def read(self, start: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens from `start` on, and the places among them where documents begin."""
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

    Positions begin anew with every document, which is how attention is told not to cross; the first token of a document
    is not predicted from the one before it.
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

    The order depends on the seed alone, so that a run that goes on at row ``n`` sees what it would have seen.
    """

    def __init__(self, stream: TokenStream, row: int, count: int, seed: int) -> None:
        self.stream, self.row, self.count, self.seed = stream, row, count, seed
        self.available = len(stream) // row
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        epoch, place = divmod(index, self.available)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.available)
        return row_of(self.stream, int(self._order[place]) * self.row, self.row)


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
