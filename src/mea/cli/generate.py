"""``mea generate``."""

from pathlib import Path
from typing import Annotated

import typer

from mea.arguments import check_models
from mea.cli import options as shared
from mea.cli.console import errors

EXAMPLES = (
    "mea generate MODEL --prompt 'Once upon a time' --cache-bits 8",
    "mea generate COMPRESSED --against MODEL --prompt 'Once upon a time'",
)


def generate(
    model: shared.Model,
    prompt: Annotated[str, typer.Option(help="Text to continue.", show_default=False, rich_help_panel=shared.WHAT)],
    against: shared.Against = None,
    max_new_tokens: Annotated[
        int, typer.Option(help="Largest number of new tokens.", rich_help_panel=shared.WHAT)
    ] = 128,
    chat: Annotated[
        bool, typer.Option("--chat", help="Use the model's chat template.", rich_help_panel=shared.WHAT)
    ] = False,
    temperature: Annotated[
        float,
        typer.Option(help="Sampling temperature; 0 always takes the most likely token.", rich_help_panel="Sampling"),
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(
            help="Sample from the most likely tokens with this total probability.", rich_help_panel="Sampling"
        ),
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.", rich_help_panel="Sampling")] = 0,
    dtype: shared.Dtype = "auto",
    device: shared.Device = "auto",
    cache_bits: shared.CacheBits = None,
) -> None:
    """Continue a prompt, and print the text token by token."""
    check_models(model, against)
    from mea.evaluate.generation import continue_prompt
    from mea.evaluate.through_cache import check_cache_bits
    from mea.models.loading import dtype_name, load
    from mea.ops.device import use_device

    use_device(device)
    for source in filter(None, (model, against)):
        check_cache_bits(source, cache_bits)
    for source in filter(None, (model, against)):
        with errors.status(f"loading {Path(source).name}"):
            loaded, tokenizer = load(source, dtype, progress=lambda *_: None)  # without transformers' bar
        dtype = dtype_name(loaded)  # the other model has the same
        if against:
            typer.echo(f"--- {Path(source).name}")
        answer = continue_prompt(
            loaded,
            tokenizer,
            prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            chat=chat,
            cache_bits=cache_bits,
            stream=lambda piece: typer.echo(piece, nl=False),
        )
        typer.echo()
        code = getattr(loaded.config, "cache_code", None)
        if code and not chat and len(tokenizer(prompt + answer).input_ids) <= code["first"] + code["recent"]:
            errors.print(
                f"note: the first {code['first']} and the newest {code['recent']} tokens are kept exactly; this text "
                "has no others, so nothing was read from codes",
                soft_wrap=True,
            )
