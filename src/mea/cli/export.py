"""``mea export``."""

from pathlib import Path
from typing import Annotated

import typer

from mea.arguments import check_models, check_output
from mea.cli import options as shared
from mea.cli.console import output

EXAMPLES = (
    "mea export OUT STOCK",
    "mea export gqa-mean-folder stock-folder",
)


def export(
    model: shared.Model,
    out: Annotated[Path, typer.Argument(help="Folder for the result; must not exist, or be empty.")],
) -> None:
    """Write a model compressed to whole heads as a stock checkpoint, which any engine loads."""
    check_models(model)
    check_output(out)
    from mea.models.export import export as run

    run(model, out)
    output.print(f"{out}: a stock checkpoint")
