"""Texts to calibrate and to test on: packaged texts by name, users' texts and conversations, and repeated spans."""

import gzip
import json
import zlib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from mea.arguments import check_text
from mea.names import TEXTS

STRETCH = 512  # tokens: as many as are refined and recovered on in one piece
LEAST = 8  # tokens: a shorter stretch has no room for a copy


def load_text(name_or_path: str | Path) -> str:
    """A packaged text by name, or the text of a file.

    Parameters
    ----------
    name_or_path
        One of `mea.names.TEXTS` (``data/README.md`` says what they are), or a UTF-8 file, which is compressed if its
        name ends in ``.gz``.

    Raises
    ------
    ValueError
        No such name; or the file is not UTF-8, is a damaged ``.gz``, or holds nothing but white space.
    OSError
        The file does not exist or cannot be read.
    """
    if str(name_or_path) in TEXTS:
        data = (files("mea") / "data" / f"{name_or_path}.txt.gz").read_bytes()
        return gzip.decompress(data).decode("utf-8")
    check_text(name_or_path)
    return _read(Path(name_or_path))


def encode_text(tokenizer: Any, text: str, limit: int | None = None) -> Int[Tensor, " n"]:
    """Token ids of a text without special tokens, the first `limit` of them.

    Raises
    ------
    ValueError
        `limit` is not positive, or the text has fewer tokens.
    """
    return _first(torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]).long(), limit)


def encode_source(tokenizer: Any, name_or_path: str | Path, limit: int | None = None) -> Int[Tensor, " n"]:
    """Token ids of a text as `load_text` takes it, or of the conversations of a ``.jsonl`` file, one after the other.

    A line of such a file is an object with ``messages``, a list of objects with ``role`` and ``content``, which the
    model's chat template turns into text. `limit` is that of `encode_text`.

    Raises
    ------
    ValueError
        As `load_text` and `encode_chat`; or a line is something else.
    OSError
        The file does not exist or cannot be read.
    """
    name = str(name_or_path).removesuffix(".gz")
    if not name.endswith(".jsonl"):
        return encode_text(tokenizer, load_text(name_or_path), limit)
    conversations = []
    for number, line in enumerate(_read(Path(name_or_path)).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            messages = json.loads(line)["messages"]
            right = bool(messages) and all(
                isinstance(m["role"], str) and isinstance(m["content"], str) for m in messages
            )
        except (KeyError, RecursionError, TypeError, ValueError):
            right = False
        if not right:
            raise ValueError(
                f'{name_or_path}: line {number} must be {{"messages": [{{"role": "user", "content": "..."}}, ...]}}, '
                f"not {line.strip()[:60]}"
            )
        conversations.append(torch.tensor(encode_chat(tokenizer, messages)["input_ids"], dtype=torch.long))
    return _first(torch.cat(conversations), limit)


def encode_chat(tokenizer: Any, messages: Sequence[dict[str, str]], **options: Any) -> Any:
    """A conversation by the tokenizer's chat template; `options` are those of ``apply_chat_template``.

    Raises
    ------
    ValueError
        There is no template, or it fails.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("this model's tokenizer has no chat template: give plain text without the chat template")
    try:
        return tokenizer.apply_chat_template(messages, return_dict=True, **options)
    except ImportError:
        raise
    except Exception as error:  # a template is a program that comes with the model, and can fail in any way
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"this model's chat template fails ({type(error).__name__}: {reason}): continue text without it, "
            "or correct the template"
        ) from error


def start_token(tokenizer: Any) -> int | None:
    """The token that this tokenizer puts before every text, or None."""
    ids = tokenizer("a")["input_ids"]
    return ids[0] if tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id else None


def windows(tokens: Int[Tensor, " n"], window: int, start: int | None) -> Int[Tensor, "windows window"]:
    """Rows of `window` tokens of a text, each beginning with `start` if given; an incomplete last row is dropped."""
    taken = window if start is None else window - 1
    rows = tokens[: len(tokens) // taken * taken].view(-1, taken)
    return rows if start is None else torch.cat([rows.new_full((len(rows), 1), start), rows], dim=1)


def repeat_spans(rows: Int[Tensor, "n t"], share: float, seed: int = 0) -> Int[Tensor, "n t"]:
    """The windows, a share of them with repeated spans: every stretch ends with a copy of some of its own tokens.

    Running prose seldom repeats distant text verbatim, so predicting it hardly needs recall of distant tokens. Repeated
    spans give weight to the keys and queries that such recall uses.

    Parameters
    ----------
    rows
        The windows; their first tokens are never copied.
    share
        Share of the windows with repeated spans, between 0 and 1.
    seed
        Chooses the windows and the copied spans, each 1/16 to 7/16 of a stretch of `STRETCH` tokens.
    """
    rows, generator = rows.clone(), torch.Generator().manual_seed(seed)

    def draw(least: int, most: int) -> int:
        return int(torch.randint(least, most + 1, (), generator=generator))

    for index in torch.randperm(len(rows), generator=generator)[: round(share * len(rows))]:
        for stretch in rows[index].split(STRETCH):
            size = len(stretch)
            if size < LEAST:
                continue
            length = draw(max(1, size // 16), 7 * size // 16)
            begin = draw(1, size - 2 * length)
            stretch[-length:] = stretch[begin : begin + length].clone()
    return rows


def check_fraction(share: float) -> None:
    """Raise ValueError unless `share` is between 0 and 1."""
    if not 0 <= share <= 1:
        raise ValueError(f"copy_fraction is a fraction of the windows, from 0 to 1, not {share}")


def _first(ids: Int[Tensor, " n"], limit: int | None) -> Int[Tensor, " m"]:
    if limit is not None and limit <= 0:
        raise ValueError(f"the number of tokens must be positive, not {limit}")
    if limit is not None and len(ids) < limit:
        raise ValueError(
            f"the text has {len(ids):,} tokens, not the {limit:,} asked for: give a longer text or fewer tokens"
        )
    return ids[:limit]


def _read(path: Path) -> str:
    data = path.read_bytes()
    try:
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}): convert it first") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is not a complete gzip file ({error}): copy or download it again") from error
    if not text.strip():
        raise ValueError(f"{path} holds no text")
    return text
