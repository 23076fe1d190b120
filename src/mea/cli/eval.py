"""``mea eval``."""

import functools
from pathlib import Path
from typing import Annotated

import typer

from mea.arguments import check_models
from mea.cli import options as shared
from mea.cli.console import errors, output, progress
from mea.names import CACHE_BITS, SUITES, listed

EXAMPLES = (
    "mea eval COMPRESSED --against MODEL --suite zero-shot",
    "mea eval MODEL --suite long-context --lengths 512,1024 --cache-bits 4",
)
LONG_CONTEXT_PANEL = "With --suite long-context"


# As long as its list of options is.
def evaluate(
    model: shared.Model,
    against: shared.Against = None,
    suite: Annotated[str | None, typer.Option(help=f"{listed(SUITES)}.", rich_help_panel=shared.WHAT)] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="A task of lm-evaluation-harness, or of long-context; may be repeated.", rich_help_panel=shared.WHAT
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(help="Most rows of each task, or prompts of each kind.", rich_help_panel=shared.WHAT),
    ] = None,
    out: Annotated[
        Path,
        typer.Option(
            help="Folder for records and samples; an interrupted run continues there.", rich_help_panel=shared.WHAT
        ),
    ] = Path("eval"),
    lengths: Annotated[
        str | None,
        typer.Option(
            help="Context lengths in tokens, such as 512,1024; by default up to the model's limit.",
            rich_help_panel=LONG_CONTEXT_PANEL,
        ),
    ] = None,
    cache_bits: Annotated[
        int | None,
        typer.Option(
            help=f"Quantise the cache of an uncompressed MODEL (only) to {listed(CACHE_BITS)} bits a number.",
            rich_help_panel=LONG_CONTEXT_PANEL,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the prompts.", rich_help_panel=LONG_CONTEXT_PANEL)] = 0,
    data: Annotated[
        Path | None,
        typer.Option(help="Folder with local rows of the zero-shot tasks.", rich_help_panel=shared.ADVANCED),
    ] = None,
    label: Annotated[
        str | None,
        typer.Option(
            help="Name of the model in records; by default its folder's name.", rich_help_panel=shared.ADVANCED
        ),
    ] = None,
    batch_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens of a batch; by default determined while running.", rich_help_panel=shared.ADVANCED),
    ] = None,
    dtype: shared.Dtype = "auto",
    device: shared.Device = "auto",
) -> None:
    """Score a model on tasks or long contexts, alone or compared with another one item by item."""
    check_models(model, against)
    from mea.evaluate.suites import LONG_CONTEXT
    from mea.ops.device import use_device

    use_device(device)
    tasks, folder = tuple(task or ()), None if data is None else str(data)
    long_only = {"--lengths": lengths, "--cache-bits": cache_bits, "--seed": seed or None}
    if suite == LONG_CONTEXT:
        refuse({"--data": data, "--batch-tokens": batch_tokens}, f"is no option of the suite {LONG_CONTEXT}")
        long_context(model, against, tasks, lengths, cache_bits, seed, limit, dtype, label, out)
        return
    refuse(long_only, f"is an option of --suite {LONG_CONTEXT} only")

    from mea.evaluate.harness.run import HarnessTasks, describe
    from mea.evaluate.runner import evaluate as run
    from mea.report.sections.tasks import task_tables

    plan = HarnessTasks(suite, tasks, folder, limit, dtype, batch_tokens)
    with progress() as report:
        records = run(model, plan, out, against=against, label=label, progress=report)
    for table in task_tables(records):
        output.print(table)
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
    """Run the suite long-context, which is not part of lm-evaluation-harness."""
    from mea.evaluate.long_context import LongContext
    from mea.evaluate.runner import evaluate as run
    from mea.report.sections.long_context import context_tables

    plan = LongContext(tasks, numbers(lengths), limit, seed, cache_bits=cache_bits, dtype=dtype)
    with progress() as report:
        say = functools.partial(errors.print, highlight=False)
        records = run(model, plan, out, against=against, label=label, progress=report, say=say)
    for table in context_tables(records):
        output.print(table)


def numbers(text: str | None) -> tuple[int, ...]:
    """``512,1024`` as numbers."""
    try:
        return tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise ValueError(
            f"--lengths takes numbers of tokens separated by commas, such as 512,1024, not {text!r}"
        ) from None


def refuse(options: dict[str, object], why: str) -> None:
    """Refuse given options that do not apply."""
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"{name} {why}")
