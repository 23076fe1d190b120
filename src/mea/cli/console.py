"""What all subcommands share: errors as one line, progress on stderr."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

errors = Console(stderr=True)
USER_ERROR = 2  # exit code of what the user can put right


def friendly(command: Callable[..., Any]) -> Callable[..., Any]:
    """Print what the user can put right as one line, and leave with code 2; anything else is a defect and shows itself.

    Such errors are ValueError and OSError, and ImportError for an extra that is not installed.
    """

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except (ValueError, OSError, ImportError) as error:
            errors.print(f"[bold red]error:[/] {escape(_one_line(error))}", soft_wrap=True, highlight=False)
            raise typer.Exit(USER_ERROR) from None
        except KeyboardInterrupt:
            errors.print("interrupted")
            raise typer.Exit(130) from None

    return run


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """A function of (what, done, total) that shows one bar for each thing that is being done.

    What stands in brackets after its name may change from call to call.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=errors) as bars:
        tasks: dict[str, Any] = {}

        def report(what: str, done: int, total: int) -> None:
            name = what.partition(" (")[0]
            if name not in tasks:
                tasks[name] = bars.add_task(what, total=total)
            bars.update(tasks[name], description=what, completed=done, total=total)

        yield report


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__
