"""Text tokenised once: a tokenizer, and for each split shards of token ids.

A folder of shards holds the tokenizer, and for each split shards of two files: ``tokens`` (unsigned integers, document
after document, each closed by the end mark) and ``starts`` (where documents begin). A shard exists as soon as
``progress.json`` names it; ``manifest.json`` is written last, when all are there.
"""

import hashlib
import json
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mea.models.loading import load_tokenizer_alone
from mea.records import Progress, read_json, write_atomically
from mea.train.pretraining.documents import documents, is_validation, source_files
from mea.train.pretraining.settings import DataSettings

END = "<|end|>"  # closes a document
SPLITS = ("train", "validation")
BATCH_CHARACTERS = 4_000_000  # tokenised at a time


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

    An interrupted call continues after the last complete shard. While another process tokenises the same data, this one
    waits.

    Raises
    ------
    ValueError
        A given tokenizer without an end mark; or a split that came out empty.
    """
    folder = Path(cache) / _fingerprint(data)
    if (folder / "manifest.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        lock.acquire(blocking=False)
    except Timeout:
        if progress:
            progress("waiting for another process that tokenises this text", 0, 1)
        lock.acquire()
    try:
        if not (folder / "manifest.json").is_file():
            _tokenise(data, _tokenizer(data, folder), folder, progress)
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()
    return folder


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder of shards."""
    return load_tokenizer_alone(str(Path(folder) / "tokenizer"))


def _fingerprint(data: DataSettings) -> str:
    """Tells data sets apart: the settings, and the files' names, sizes and ends."""
    other = ("validation_tokens", "row", "files", "recall")
    settings = {name: value for name, value in asdict(data).items() if name not in other}
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=8)
    for path in source_files(data) if data.hub is None else ():
        with path.open("rb") as file:
            head = file.read(1 << 16)
            file.seek(max(0, path.stat().st_size - (1 << 16)))
            digest.update(f"{path.name} {path.stat().st_size}".encode() + head + file.read())
    return digest.hexdigest()


def _tokenizer(data: DataSettings, folder: Path) -> PreTrainedTokenizerBase:
    path = folder / "tokenizer"
    if not path.is_dir():
        if data.tokenizer is not None:
            tokenizer = load_tokenizer_alone(data.tokenizer)
        else:
            tokenizer = train_tokenizer(_first(data), data.vocabulary)
        if tokenizer.eos_token_id is None:
            raise ValueError(f"the tokenizer {data.tokenizer} has no end-of-text token to close documents with")
        partial = folder / "tokenizer.partial"
        tokenizer.save_pretrained(partial)
        partial.rename(path)
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
    path = folder / "progress.json"
    state: dict[str, Any] = {"documents": 0, "shards": {split: [] for split in SPLITS}}
    if path.is_file():
        state = read_json(path)
        if not (
            isinstance(state, dict) and type(state.get("documents")) is int and isinstance(state.get("shards"), dict)
        ):
            raise ValueError(f"{path} is damaged: delete the folder {folder} to begin again")
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
            _write(folder / name, content)
            entry[what] = {"file": name, "bytes": len(content), "crc32": zlib.crc32(content)}
        state["shards"][split].append(entry)
        pieces.clear()
    state["documents"] = done
    _write_json(folder / "progress.json", state)


def _write(path: Path, content: bytes) -> None:
    try:
        write_atomically(path, content)
    except OSError as error:
        free = shutil.disk_usage(path.parent).free
        message = f"{error.strerror}; {len(content):,} bytes to write, {free:,} free"
        raise OSError(error.errno, message, str(path)) from error


def _write_json(path: Path, value: Any) -> None:
    _write(path, json.dumps(value, indent=1).encode())
