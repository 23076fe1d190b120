"""The guide to the attention family is true: its code runs and its table is the one that the presets give."""

import re
from pathlib import Path

from mea import attention
from mea.models import presets
from mea.models.accounting import training_flops
from mea.models.presets import VARIANTS, parameter_table, preset
from mea.records import read_record

GUIDE = (Path(__file__).parents[2] / "docs" / "attention.md").read_text()


def test_the_code_of_the_guide_runs(monkeypatch):
    """Its new variant goes into copies of the tables, which end with the test."""
    for module, table in ((attention, "METHODS"), (presets, "VARIANTS")):
        monkeypatch.setattr(module, table, getattr(module, table).copy())
    blocks = re.findall(r"```python\n(.*?)```", GUIDE, flags=re.DOTALL)
    assert len(blocks) == 7
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


TRAINING = Path(__file__).parents[2] / "benchmarks" / "results"


def test_the_training_steps_of_the_guide_are_those_of_the_records():
    assert training_table() in GUIDE


def test_the_operations_of_the_guide_are_counted():
    plain = training_flops(preset("10m"), 16, 512)
    ratios = {name: training_flops(preset("10m", name), 16, 512) / plain for name in VARIANTS}
    assert f"take {ratios['interleaved_heads']:.2f} times" in " ".join(GUIDE.split())
    rest = ("gated", "knocking_heads", "mea_shared", "mea_shared_half", "gqa_half", "mqa")
    assert f"at most {max(ratios[name] for name in rest):.2f} times" in " ".join(GUIDE.split())


def training_table() -> str:
    """Training throughput and peak memory of every variant against the plain Transformer's, as Markdown."""
    columns = {
        "10m fp32": "training_step_10m_float32*.json",
        "10m bf16": "training_step_10m_bfloat16*.json",
        "30m fp32": "training_step_30m_float32*.json",
        "30m bf16": "training_step_30m_bfloat16*.json",
        "10m memory": "training_memory_10m_float32.json",
        "30m memory": "training_memory_30m_float32.json",
    }
    found: dict[str, dict[str, str]] = {}
    for column, pattern in columns.items():
        for path in sorted(TRAINING.glob(pattern)):
            for variant, result in read_record(path)["results"].items():
                if column.endswith("memory"):
                    cell = f"{result['peak_memory_against_transformer']:.2f}"
                else:
                    ratio = result["throughput_against_transformer"]
                    cell = f"{ratio['median']:.2f} ({ratio['lower_quartile']:.2f}-{ratio['upper_quartile']:.2f})"
                found.setdefault(variant, {})[column] = cell
    lines = [f"| variant | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for variant in VARIANTS:
        if variant in found and variant != "transformer":
            cells = [found[variant].get(column, "–") for column in columns]
            lines.append(f"| `{variant}` | {' | '.join(cells)} |")
    return "\n".join(lines)
