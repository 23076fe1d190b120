"""A typer command that answers an option's old name with the new name."""

from typing import Any

from typer.core import TyperCommand

# Command -> old option -> what to give instead.
RENAMED: dict[str, dict[str, str]] = {
    "compress": {
        "--text": "--calibration-text",
        "--tokens": "--calibration-tokens",
        "--window": "--calibration-window",
        "--reread": "--copy-fraction",
        "--odd": "--layout FILE, with the ranks of keys and values of each layer",
    },
    "compare": {"--reread": "--copy-fraction"},
    "fit": {"--out": "--record"},
    "perplexity": {"--json": "--record"},
    "profile": {"--reread": "--copy-fraction"},
    "recover": {"--reread": "--copy-fraction", "--rate": "--lr", "--other-rate": "--base-lr"},
    "sweep": {"--files": "--text"},
}


class Command(TyperCommand):
    """A subcommand that knows the old names of its options."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        for argument in args:
            old = argument.partition("=")[0]
            if new := RENAMED.get(str(self.name), {}).get(old):
                ctx.fail(f"{old} was renamed: give {new}")
        return super().parse_args(ctx, args)


def epilog(examples: tuple[str, ...]) -> str:
    """Format examples for the end of a command's help."""
    return "\n\n".join(["Examples:", *(f"  {example}" for example in examples)])
