"""Shared by all subcommands: consoles, errors as one line, progress on stderr."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import typer
from rich.console import Console
from rich.text import Text

from mea.names import printable
from mea.records import Progress

# Without markup: brackets in names, paths and messages are no marks.
SPEAKS = os.environ.get("RANK", "0") == "0"  # of the processes of torchrun, only the first prints results
output, errors = Console(markup=False, quiet=not SPEAKS), Console(stderr=True, markup=False)
USER_ERROR = 2  # exit code of errors that the user can fix
STATELESS = ("generate", "export", "perplexity", "report", "fit")  # commands of which an interrupted run keeps nothing
LINE_SECONDS = 15.0  # between two lines of progress if stderr is no terminal


def friendly(command: Callable[..., Any]) -> Callable[..., Any]:
    """Print errors that the user can fix as one line and exit with code 2; other errors show their traceback.

    The user can fix ValueError and OSError, and ImportError for an extra that is not installed.
    """

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except (ValueError, OSError, ImportError) as error:
            errors.print(Text.assemble(("error: ", "bold red"), _one_line(error)), soft_wrap=True)
            raise typer.Exit(USER_ERROR) from None
        except KeyboardInterrupt as stop:
            kept = command.__name__ not in STATELESS
            said = str(stop) or f"the same command {'continues from what was finished' if kept else 'starts again'}"
            errors.print(f"interrupted; {said}", soft_wrap=True)
            raise typer.Exit(130) from None

    return run


@contextmanager
def progress() -> Iterator[Progress]:
    """A function that shows progress: one bar for each stage, or a line every `LINE_SECONDS` if stderr is a log.

    Text in brackets after a stage's name may change from call to call. A total of 0 is one that is not known.
    """
    if not SPEAKS:
        yield lambda what, done, total, /: None
        return
    with _bars() if errors.is_terminal else _lines() as report:
        yield report


@contextmanager
def _bars() -> Iterator[Progress]:
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars
    from rich.table import Column

    name = Column(max_width=36, no_wrap=True, overflow="ellipsis")  # all columns fit into 80 characters
    columns = (
        TextColumn("{task.description}", markup=False, table_column=name),
        BarColumn(bar_width=14),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Bars(*columns, TimeRemainingColumn(), console=errors) as bars:
        tasks: dict[str, Any] = {}

        def report(what: str, done: int, total: int, /) -> None:
            name = what.partition(" (")[0]
            if name not in tasks:
                tasks[name] = bars.add_task(what, total=total or None)
            bars.update(tasks[name], description=what, completed=done, total=total or None)

        yield report


@contextmanager
def _lines() -> Iterator[Progress]:
    """A line when a stage begins, then one every `LINE_SECONDS` from a thread, because steps may take minutes."""
    stage, began, ended = ["", 0, 0], [0.0, 0], threading.Event()
    shown: list[Any] = []

    def show() -> None:
        shown[:] = what, done, total = stage
        line = f"{what}: {done:,} of {total:,} ({done / total:.0%})" if total else what
        seconds = time.monotonic() - began[0]
        if began[1] < done < total and seconds > LINE_SECONDS:
            line += f", about {seconds * (total - done) / (done - began[1]) / 60:,.1f} min left"
        errors.print(line, soft_wrap=True, highlight=False)

    def report(what: str, done: int, total: int, /) -> None:
        begins = what.partition(" (")[0] != str(stage[0]).partition(" (")[0]
        if begins and stage != shown and stage[1] == stage[2] > 1:
            show()  # the end of the stage before
        stage[:] = what, done, total
        if begins:
            began[:] = time.monotonic(), done
            show()

    def repeat() -> None:
        while not ended.wait(LINE_SECONDS):
            what, done, total = stage
            if what and (done < total or not total):  # not what has ended
                show()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield report
    finally:
        ended.set()
        thread.join()
        if stage != shown and stage[1] == stage[2] > 1:
            show()


def _one_line(error: Exception) -> str:
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return " ".join(printable(text).split()) or type(error).__name__
