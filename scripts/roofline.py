"""Write the tables of docs/performance.md from `mea.models.accounting`: ``python scripts/roofline.py``.

With ``--check`` nothing is written, and it fails if they differ.
"""

import math
import sys
from pathlib import Path

from mea.models.accounting import (
    GPUS,
    LLAMAS,
    Reading,
    Shape,
    joint_reading,
    plain_reading,
    predictive_reading,
    step_seconds,
    tokens_for_speedup,
    tokens_that_fit,
)

PAGE = Path(__file__).parent.parent / "docs" / "performance.md"
BEGIN, END = "<!-- begin: written by scripts/roofline.py -->", "<!-- end -->"
# Numbers of components relative to keys and values, averaged over the layers of SmolLM2-135M at 20 % of the bytes:
# experiments/coding/records/seed0, predictive-0-2.json and joint-0-2.json.
PREDICTIVE, KEYS, JOINT = 0.92, 0.48, 0.80


def readings(shape: Shape) -> dict[str, Reading]:
    return {
        "bf16": plain_reading(shape),
        "4 bits": plain_reading(shape, 4, 1),
        "`predictive`, 20 %": predictive_reading(shape, 0.2, PREDICTIVE, KEYS),
        "`joint`, 20 %": joint_reading(shape, 0.2, JOINT),
    }


def tables() -> str:
    """Three tables in Markdown."""
    lines = [
        "| model | reading | bytes moved | products | instructions | H100 | H200 | B200 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for shape in LLAMAS.values():
        for name, reading in readings(shape).items():
            times = [f"{1e12 * reading.seconds(gpu):,.0f} ps, {reading.bound(gpu)}" for gpu in GPUS.values()]
            counts = [f"{x:,.0f}" for x in (reading.moved, reading.products, reading.vector)]
            lines.append("| " + " | ".join([shape.name, name, *counts, *times]) + " |")
    shape = LLAMAS["8B"]
    lines += ["", "| Llama-3-8B, cached tokens | " + " | ".join(GPUS) + " |", "|---|---|---|---|"]
    plain, *others = readings(shape).items()
    for name, reading in [plain, *others]:
        fits = [tokens_that_fit(shape, gpu, reading) for gpu in GPUS.values()]
        lines.append(f"| fit in {name} | " + " | ".join(f"{x / 1e6:.2f} million" for x in fits) + " |")
    for name, reading in others:
        least = [tokens_for_speedup(shape, gpu, plain[1], reading, 1.2) for gpu in GPUS.values()]
        shown = ["never" if math.isinf(x) else f"{x / 1e3:,.0f} thousand" for x in least]
        lines.append(f"| 1.2 times faster with {name}, from | " + " | ".join(shown) + " |")
    lines += ["", "| Llama-3-8B, ms a step | bf16 | 4 bits | `predictive` | `joint` |", "|---|---|---|---|---|"]
    for gpu in GPUS.values():
        for batch, context in ((1, 8192), (1, 131072), (16, 8192), (64, 8192)):
            steps = []
            for reading in readings(shape).values():
                fits = batch * context <= tokens_that_fit(shape, gpu, reading)
                steps.append(
                    f"{1e3 * step_seconds(shape, gpu, reading, batch, context):.1f}" if fits else "does not fit"
                )
            lines.append(f"| {gpu.name}, {batch} × {context:,} tokens | " + " | ".join(steps) + " |")
    return "\n".join(lines)


def page(text: str) -> str:
    """The page with its tables written anew."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{tables()}\n\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    old = PAGE.read_text(encoding="utf-8")
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(page(old), encoding="utf-8")
    elif page(old) != old:
        sys.exit(f"the tables of {PAGE.name} are not those of mea.models.accounting: run python scripts/roofline.py")
