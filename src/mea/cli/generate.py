"""``mea generate``."""

from typing import Annotated

import typer

from mea.cli.console import errors


def generate(
    model: Annotated[str, typer.Argument(help="Hub id, local folder or GGUF file.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens of this total probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the draws, if the temperature is above 0.")] = 0,
    cache_bits: Annotated[
        int | None, typer.Option(help="Store the cache in 8, 4 or 2 bits instead of as it is.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Use the model's chat template.")] = False,
    against: Annotated[str | None, typer.Option(help="Another model, to continue the same prompt.")] = None,
    dtype: Annotated[str, typer.Option(help="auto (the weights' own), fast, float32, bfloat16 or float16.")] = "auto",
) -> None:
    """Continue a prompt; the text appears as it is made."""
    from mea.evaluate.generation import continue_prompt
    from mea.models.loading import load

    for source in filter(None, (model, against)):
        with errors.status(f"loading {source}"):
            loaded, tokenizer = load(source, dtype)
        if against:
            typer.echo(f"--- {source}")
        continue_prompt(
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
