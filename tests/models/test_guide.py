"""The guide to the attention family is true: its code runs and its table is the one that the presets give."""

import re
from pathlib import Path

from mea.models.presets import VARIANTS, parameter_table

GUIDE = (Path(__file__).parents[2] / "docs" / "attention.md").read_text()


def test_the_code_of_the_guide_runs():
    blocks = re.findall(r"```python\n(.*?)```", GUIDE, flags=re.DOTALL)
    assert len(blocks) == 4
    names: dict = {}
    for block in blocks:
        exec(compile(block, "docs/attention.md", "exec"), names)


def test_the_table_of_the_guide_is_up_to_date():
    assert table() in GUIDE


def table() -> str:
    """Parameters of every variant at every size, as Markdown: thousands for the plain Transformer, then differences."""
    rows = parameter_table()
    shapes = list(dict.fromkeys(row[0] for row in rows))
    lines = [f"| variant | {' | '.join(shapes)} |", "|---" * (len(shapes) + 1) + "|"]
    for variant in VARIANTS:
        cells = []
        for _, name, _, count, relative in rows:
            if name == variant:
                cells.append(f"{count:,}" if variant == "transformer" else f"{100 * relative:+.2f} %")
        lines.append(f"| `{variant}` | {' | '.join(cells)} |")
    return "\n".join(lines)
