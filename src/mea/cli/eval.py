"""``mea eval``."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mea.cli.console import errors, progress


def evaluate(
    model: Annotated[str, typer.Argument(help="Hub id, local folder or GGUF file.")],
    against: Annotated[str | None, typer.Option(help="Another model, to compare item by item.")] = None,
    suite: Annotated[str | None, typer.Option(help="zero-shot, knowledge, science or math.")] = None,
    task: Annotated[list[str] | None, typer.Option(help="A task of lm-evaluation-harness; may be repeated.")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder with local rows of the zero-shot tasks.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only so many rows of each task.")] = None,
    dtype: Annotated[str, typer.Option(help="auto (that of the weights), float32, bfloat16 or float16.")] = "auto",
    batch_tokens: Annotated[int | None, typer.Option(help="Tokens of a batch; found while running if absent.")] = None,
    label: Annotated[
        str | None, typer.Option(help="Name of the model in records; by default that of its folder.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for records and samples; runs are resumed there.")] = Path("eval"),
) -> None:
    """Score a model on tasks by lm-evaluation-harness, alone or item by item against another one."""
    from mea.evaluate.benchmarks import Evaluation, describe
    from mea.evaluate.benchmarks import evaluate as run
    from mea.report.tasks import task_tables

    plan = Evaluation(suite, tuple(task or ()), None if data is None else str(data), limit, dtype, batch_tokens)
    with progress() as report:
        records = run(model, plan, out, against=against, label=label, progress=report)
    for table in task_tables(records):
        Console().print(table)
    if suite:
        errors.print(describe(suite), highlight=False)
