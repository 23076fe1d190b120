"""The command line: one file per subcommand, no logic.

A subcommand is a function with typer's annotations, registered below. What it needs it imports when it runs, so that no
other waits for it. The package itself, which registers models with transformers, is the wait of a few seconds before
``mea --help``.
"""

import typer

from mea.cli.compare import compare
from mea.cli.compress import compress
from mea.cli.console import friendly
from mea.cli.demo import demo
from mea.cli.eval import evaluate
from mea.cli.fit import fit
from mea.cli.generate import generate
from mea.cli.perplexity import perplexity
from mea.cli.pretrain import pretrain
from mea.cli.profile import profile
from mea.cli.recover import recover
from mea.cli.report import report
from mea.cli.sweep import sweep

app = typer.Typer(
    name="mea",
    help="Halve the KV cache of a language model, and measure what it costs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
COMMANDS = {
    "compress": compress,
    "compare": compare,
    "demo": demo,
    "eval": evaluate,
    "fit": fit,
    "perplexity": perplexity,
    "generate": generate,
    "profile": profile,
    "pretrain": pretrain,
    "sweep": sweep,
    "recover": recover,
    "report": report,
}
for name, command in COMMANDS.items():
    app.command(name)(friendly(command))


@app.callback()
def main() -> None:
    """Keeps subcommands subcommands, however few there are."""
