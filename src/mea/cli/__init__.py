"""The command line: one file per subcommand, no logic.

A subcommand is a function with typer's annotations and two examples, registered below. It imports torch and
transformers only when it runs: these imports take seconds, and ``--help`` must not wait for them.
"""

from typing import Annotated

import typer

import mea
from mea.cli import (
    compare,
    compress,
    demo,
    eval,
    export,
    fit,
    generate,
    perplexity,
    pretrain,
    profile,
    recover,
    report,
    sweep,
)
from mea.cli.command import Command, epilog
from mea.cli.console import friendly

app = typer.Typer(
    name="mea",
    help="Make the KV cache of a language model several times smaller, and measure what it costs.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
COMMANDS = {
    "Compress": {
        "compress": (compress.compress, compress.EXAMPLES),
        "recover": (recover.recover, recover.EXAMPLES),
        "generate": (generate.generate, generate.EXAMPLES),
        "export": (export.export, export.EXAMPLES),
        "profile": (profile.profile, profile.EXAMPLES),
    },
    "Measure": {
        "perplexity": (perplexity.perplexity, perplexity.EXAMPLES),
        "eval": (eval.evaluate, eval.EXAMPLES),
        "compare": (compare.compare, compare.EXAMPLES),
        "demo": (demo.demo, demo.EXAMPLES),
        "report": (report.report, report.EXAMPLES),
    },
    "Pretrain": {
        "pretrain": (pretrain.pretrain, pretrain.EXAMPLES),
        "sweep": (sweep.sweep, sweep.EXAMPLES),
        "fit": (fit.fit, fit.EXAMPLES),
    },
}
for panel, commands in COMMANDS.items():
    for name, (function, examples) in commands.items():
        register = app.command(name, cls=Command, epilog=epilog(examples), rich_help_panel=panel)
        register(friendly(function))


def print_version(wanted: bool) -> bool:
    """Print the version and exit."""
    if wanted:
        typer.echo(f"mea {mea.__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=print_version, is_eager=True)
    ] = False,
) -> None:
    """Required by typer to keep subcommand names, even with a single subcommand."""
