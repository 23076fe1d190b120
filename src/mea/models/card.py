"""The model card beside weights that this package writes."""

from collections.abc import Sequence

USAGE = """```python
import mea  # or trust_remote_code=True below
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("this folder")
```"""


def model_card(title: str, summary: str, header: Sequence[str], rows: Sequence[Sequence[str]], record: str) -> str:
    """Markdown: what was made, what was measured, how to load it.

    Parameters
    ----------
    title, summary
        One line, and one paragraph.
    header, rows
        Of the table of measurements.
    record
        The file beside the card that holds the record.
    """
    table = [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]
    head = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    head += ["tags: [mea, kv-cache-compression]", "---"]
    licence = "The licence of the original model holds for this one."
    kept = f"`{record}` holds the record: every choice, every measurement, machine and versions."
    parts = ("\n".join(head), f"# {title}", summary, "\n".join(table), licence, USAGE, kept)
    return "\n\n".join(parts) + "\n"
