"""Model cards: what was made, what was measured, how to load it, and the fields by which hubs find a model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from yaml import YAMLError

from mea.models.gguf_file import read_header
from mea.models.loading import locate
from mea.names import escaped

IMPORT = "import mea  # or trust_remote_code=True below\n"
USAGE = """```python
{imported}from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("this folder")
```"""
MADE_HERE = ("compression.json", "recovery.json")  # beside cards that this package wrote


def origin(source: str) -> dict[str, Any]:
    """``base_model`` and ``license`` for a model made from `source`, if its card or GGUF file gives them.

    Parameters
    ----------
    source
        Hub id, folder or GGUF file. A folder that this package wrote passes on what its own card says.
    """
    folder, gguf = locate(source)
    if gguf is not None:
        licence = read_header(Path(folder, gguf)).metadata.get("general.license")
        return {"license": licence} if isinstance(licence, str) else {}
    local = Path(folder).is_dir()
    fields: dict[str, Any] = {} if local else {"base_model": folder}
    try:
        data = ModelCard.load(Path(folder, "README.md") if local else folder).data
    except (OSError, ValueError, YAMLError):  # none, not reachable, or not in the form of a card
        return fields
    passed_on = ["license"]
    if local and any(Path(folder, name).is_file() for name in MADE_HERE):
        passed_on.append("base_model")
    return fields | {name: value for name in passed_on if isinstance(value := data.get(name), str)}


def model_card(
    title: str,
    summary: str,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    record: str,
    fields: Mapping[str, Any],
    measured: Mapping[str, Any] | None = None,
    *,
    stock: bool = False,
) -> str:
    """A card in Markdown.

    Parameters
    ----------
    title, summary
        One line of text, and one paragraph of Markdown.
    header, rows
        Header and rows of the table of measurements.
    record
        The file beside the card that holds the record.
    fields
        Result of `origin`.
    measured
        A record: its perplexity, if it has one, goes into the card's ``model-index``.
    stock
        Whether the model loads without this package.
    """
    results = None
    if measured and "perplexity" in measured["results"]:
        text, tokens = (measured["config"][f"measured_{name}"] for name in ("text", "tokens"))
        value = measured["results"]["perplexity"]
        results = [EvalResult("text-generation", text, f"{text}, first {tokens:,} tokens", "perplexity", value)]
    data = ModelCardData(
        library_name="transformers", pipeline_tag="text-generation", tags=["mea", "kv-cache-compression"],
        model_name=title, eval_results=results, **fields,
    )  # fmt: skip
    shown = [[escaped(" ".join(cell.split())).replace("|", "\\|") for cell in cells] for cells in (header, *rows)]
    table = [f"| {' | '.join(cells)} |" for cells in (shown[0], ["---"] * len(header), *shown[1:])]
    licence = "The licence of the original model holds for this one."
    kept = f"`{record}` holds the record: every choice, every measurement, machine and versions."
    parts = (
        f"---\n{data.to_yaml()}\n---",
        f"# {escaped(' '.join(title.split()))}",
        summary,
        "\n".join(table),
        licence,
        USAGE.format(imported="" if stock else IMPORT),
        kept,
    )
    return "\n\n".join(parts) + "\n"
