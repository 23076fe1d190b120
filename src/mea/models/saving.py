"""Model folders that this package writes: complete or not there, with a card and a record."""

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from mea.records import Record, write_record

SHARD_SIZE = "4GB"  # a shard is in memory as a whole while it is written

USAGE = """```python
import mea  # or trust_remote_code=True below
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("this folder")
```"""


def model_card(title: str, summary: str, header: Sequence[str], rows: Sequence[Sequence[str]], record: str) -> str:
    """Markdown: what was made, what was measured, how to load it.

    Parameters
    ----------
    title, summary
        One line, and one paragraph.
    header, rows
        Of the table of measurements.
    record
        The file beside the card that holds the record.
    """
    table = [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]
    head = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    head += ["tags: [mea, kv-cache-compression]", "---"]
    licence = "The licence of the original model holds for this one."
    kept = f"`{record}` holds the record: every choice, every measurement, machine and versions."
    parts = ("\n".join(head), f"# {title}", summary, "\n".join(table), licence, USAGE, kept)
    return "\n\n".join(parts) + "\n"


def check_output(out: Path) -> None:
    """Refuse to write where something is.

    Raises
    ------
    ValueError
        The folder is not empty, or is no folder.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty folder; choose another, or remove it first")


def not_written(path: Path, error: Exception) -> OSError:
    """What to say where a result could not be written."""
    return OSError(
        f"{path} could not be written: {error}. No incomplete file is left; free disk space and repeat the same "
        f"command: finished layers are kept"
    )


@contextmanager
def complete_folder(out: Path, work: Path) -> Iterator[Path]:
    """A folder to fill that becomes `out` when the block ends, and is removed if it fails.

    The folder has its own name, because two runs that fill the same folder would mix their files.

    Raises
    ------
    ValueError
        Another run has written `out` in the meantime.
    OSError
        Writing failed, for instance because the disk is full; no incomplete file is left.
    """
    work.mkdir(parents=True, exist_ok=True)
    filling = Path(tempfile.mkdtemp(prefix="model-", dir=work), "model")  # mkdtemp's own folder is private
    filling.mkdir()
    try:
        yield filling
        check_output(out)  # another run may have finished first
    except BaseException as error:
        shutil.rmtree(filling.parent, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):  # safetensors has its own error for a full disk
            raise not_written(out, error) from error
        raise
    if out.exists():
        out.rmdir()
    os.replace(filling, out)
    shutil.rmtree(work, ignore_errors=True)


def save_folder(
    out: Path, work: Path, model: Any, tokenizer: Any, card: str, name: str, record: Record, copied: Sequence[Path] = ()
) -> None:
    """Write a model with its tokenizer, its card, its record under `name`, and copies of files that exist.

    Raises
    ------
    OSError
        As `complete_folder`.
    """
    with complete_folder(out, work) as folder:
        model.save_pretrained(folder, max_shard_size=SHARD_SIZE)
        tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(card, encoding="utf-8")
        write_record(folder / name, record)
        for path in copied:
            if path.is_file():
                shutil.copy(path, folder)
