"""``mea eval``."""

import functools
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mea.cli.console import errors, progress


def evaluate(
    model: Annotated[str, typer.Argument(help="Hub id, local folder or GGUF file.")],
    against: Annotated[str | None, typer.Option(help="Another model, to compare item by item.")] = None,
    suite: Annotated[str | None, typer.Option(help="zero-shot, knowledge, science, math or long-context.")] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="A task of lm-evaluation-harness, or of long-context; may be repeated.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Folder with local rows of the zero-shot tasks.")] = None,
    lengths: Annotated[
        str | None, typer.Option(help="long-context: tokens, as in 512,1024; by default up to the model's limit.")
    ] = None,
    cache_bits: Annotated[
        int | None, typer.Option(help="long-context: store the cache of MODEL (not of --against) in 8, 4 or 2 bits.")
    ] = None,
    seed: Annotated[int, typer.Option(help="long-context: of the prompts.")] = 0,
    limit: Annotated[int | None, typer.Option(help="Only so many rows of each task, or prompts of each kind.")] = None,
    dtype: Annotated[str, typer.Option(help="auto (the weights' own), fast, float32, bfloat16 or float16.")] = "auto",
    batch_tokens: Annotated[int | None, typer.Option(help="Tokens of a batch; found while running if absent.")] = None,
    label: Annotated[
        str | None, typer.Option(help="Name of the model in records; by default that of its folder.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for records and samples; runs are resumed there.")] = Path("eval"),
) -> None:
    """Score a model by lm-evaluation-harness's tasks or on long contexts, alone or item by item against another one."""
    from mea.evaluate.suites import LONG_CONTEXT

    tasks, place = tuple(task or ()), None if data is None else str(data)
    long_only = {"--lengths": lengths, "--cache-bits": cache_bits, "--seed": seed or None}
    if suite == LONG_CONTEXT:
        refuse({"--data": data, "--batch-tokens": batch_tokens}, f"has no meaning for the suite {LONG_CONTEXT}")
        long_context(model, against, tasks, lengths, cache_bits, seed, limit, dtype, label, out)
        return
    refuse(long_only, f"goes with --suite {LONG_CONTEXT} only")

    from mea.evaluate.harness.run import HarnessTasks, describe
    from mea.evaluate.runner import evaluate as run
    from mea.report.sections.tasks import task_tables

    plan = HarnessTasks(suite, tasks, place, limit, dtype, batch_tokens)
    with progress() as report:
        records = run(model, plan, out, against=against, label=label, progress=report)
    for table in task_tables(records):
        Console().print(table)
    if suite:
        errors.print(describe(suite), highlight=False)


def long_context(
    model: str,
    against: str | None,
    tasks: tuple[str, ...],
    lengths: str | None,
    cache_bits: int | None,
    seed: int,
    limit: int | None,
    dtype: str,
    label: str | None,
    out: Path,
) -> None:
    """The suite that is not the harness's."""
    from mea.evaluate.long_context import LongContext
    from mea.evaluate.runner import evaluate as run
    from mea.report.sections.long_context import context_tables

    plan = LongContext(tasks, numbers(lengths), limit, seed, cache_bits=cache_bits, dtype=dtype)
    with progress() as report:
        say = functools.partial(errors.print, highlight=False)
        records = run(model, plan, out, against=against, label=label, progress=report, say=say)
    for table in context_tables(records):
        Console().print(table)


def numbers(text: str | None) -> tuple[int, ...]:
    """``512,1024`` as numbers."""
    try:
        return tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise ValueError(f"lengths are numbers of tokens with commas between, as in 512,1024, not {text!r}") from None


def refuse(options: dict[str, object], why: str) -> None:
    """Refuse options that were given and mean nothing here."""
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"{name} {why}")
