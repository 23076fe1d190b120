"""Model folders that this package writes: complete or absent, with a card and a record."""

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from mea.arguments import check_output
from mea.models.loading import hidden_bars
from mea.records import Record, write_record

SHARD_SIZE = "4GB"  # a shard is in memory as a whole while it is written


def not_written(path: Path, error: Exception) -> OSError:
    """The error for a result that could not be written."""
    return OSError(
        f"{path} could not be written: {error}. No incomplete file is left; free disk space and repeat the same "
        f"command: finished layers are kept"
    )


@contextmanager
def writing(out: Path, work: Path, kept: str) -> Iterator[None]:
    """Hold an output folder for this process; a start that fails leaves nothing.

    Under ``torchrun`` the first process holds it for all.

    Parameters
    ----------
    out
        The output folder. Its lock is a file beside it while it is held.
    work
        Folder of unfinished work. If it was empty or not there, and holds nothing of `kept` at the end of a failure, it
        is removed. So are new folders above it that are empty.
    kept
        Pattern of the files or folders in `work` from which a run continues.

    Raises
    ------
    ValueError
        Another process writes the folder.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    out, work = out.absolute(), work.absolute()
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    new = not work.is_dir() or not any(work.iterdir())
    out.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out.with_name(f".{out.name}.lock"))
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise ValueError(
            f"another process is writing {out}: wait until it has finished, or choose another folder"
        ) from None
    try:
        yield
    except BaseException as error:
        finished = work.is_dir() and any(work.glob(kept))
        if new and not finished:
            shutil.rmtree(work, ignore_errors=True)
        if isinstance(error, KeyboardInterrupt) and not finished:
            raise KeyboardInterrupt("nothing was finished yet: the same command starts again") from error
        raise
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)  # before the release: the next process makes its own
        lock.release()
        for folder in made:
            with suppress(OSError):  # not empty
                folder.rmdir()


def follow_umask(folder: Path) -> None:
    """Give all files of a folder the mode of a new file: safetensors lets only their owner read them."""
    probe = folder / ".mode"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


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
        follow_umask(filling)
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
        with hidden_bars(hide=True):
            model.save_pretrained(folder, max_shard_size=SHARD_SIZE)
        tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(card, encoding="utf-8")
        write_record(folder / name, record)
        for path in copied:
            if path.is_file():
                shutil.copy(path, folder)
