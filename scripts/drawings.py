"""Draw docs/cache.svg and docs/reading.svg: the layout of a packed cache, and how it is read. With --check, compare."""

import argparse
import sys
from html import escape
from pathlib import Path

from mea.ops.codes import TIERS, bits_per_token
from mea.records import read_record

ROOT = Path(__file__).parent.parent
RECORD, LAYER = ROOT / "experiments/coding/records/seed0/predictive-0-2.json", 1  # whose tiers are drawn
INK, EXACT = "#808080", "#e0662b"  # grey that is legible on white and on black
SHADES = {8: "#1f5f9c", 4: "#2f86d6", 2: "#5f9fd8"}


def text(x: float, y: float, words: str, size: int = 13, anchor: str = "middle", fill: str = INK) -> str:
    """One line of text."""
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" fill="{fill}">{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, fill: str, *lines: str) -> str:
    """A filled rectangle with lines of white text."""
    parts = [f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="3" fill="{fill}"/>']
    first = y + height / 2 + 5 - 8 * (len(lines) - 1)
    parts += [text(x + width / 2, first + 16 * index, line, 12, fill="#fff") for index, line in enumerate(lines)]
    return "\n".join(parts)


def arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    """A line with a head."""
    return f'<path d="M{x1:g} {y1:g}L{x2:g} {y2:g}" stroke="{INK}" fill="none" marker-end="url(#head)"/>'


def line(x1: float, y1: float, x2: float, y2: float) -> str:
    """A dashed line."""
    return f'<path d="M{x1:g} {y1:g}L{x2:g} {y2:g}" stroke="{INK}" stroke-dasharray="3 3" fill="none"/>'


def drawing(width: int, height: int, title: str, parts: list[str]) -> str:
    """The file."""
    head = (
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0L8 4L0 8z" fill="{INK}"/></marker></defs>'
    )
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif"'
    return "\n".join([f'{opening} role="img">', f"<title>{escape(title)}</title>", head, *parts, "</svg>", ""])


def layout() -> str:
    """Tokens of one layer, and the bytes of one coded token."""
    config = read_record(RECORD)["config"]
    tiers = config["tiers"][LAYER]
    first, recent = config["first"], config["recent"]
    parts = [text(10, 24, "One layer, oldest token on the left", anchor="start")]
    parts += [box(10, 36, 90, 44, EXACT, f"first {first}", "exact"), box(104, 36, 420, 44, SHADES[4], "codes")]
    parts += [
        box(528, 36, 182, 44, EXACT, f"newest {recent}", "exact"),
        line(300, 80, 10, 120),
        line(312, 80, 710, 120),
    ]
    total = sum(bits_per_token(of) for of in tiers) // 8
    whole = 2 * config["numbers"]
    parts.append(
        text(
            10,
            142,
            f"One coded token: {total} bytes instead of {whole} (layer {LAYER} of {config['label']})",
            13,
            "start",
        )
    )
    y = 154
    for name, of in zip(("keys", "values"), tiers, strict=True):
        used = [(bits, count) for bits, count in zip(TIERS, of, strict=True) if count]
        x, scale = 70.0, (710 - 70 - 46 * len(used)) / max(bits_per_token(t) // 8 - 4 * len(used) for t in tiers)
        parts.append(text(10, y + 28, name, anchor="start"))
        for bits, count in used:
            wide = bits * count / 8 * scale
            parts.append(box(x, y, 42, 44, INK, "min", "step"))
            parts.append(box(x + 42, y, wide, 44, SHADES[bits], f"{count} × {bits} bits", f"{bits * count // 8} bytes"))
            x += wide + 46
        y += 54
    dropped = config["numbers"] - sum(map(sum, tiers))
    note = (
        "min, step: lowest number and step of a group, 2 bytes each. "
        f"{dropped} of {config['numbers']} components have 0 bits."
    )
    parts.append(text(10, y + 14, note, 12, "start"))
    return drawing(720, y + 26, "Layout of a packed cache", parts)


def reading() -> str:
    """How `predictive` and `joint` read codes."""
    parts = []
    steps = {
        "predictive": [
            (EXACT, "query", "turned"),
            (SHADES[8], "× Bᴴ", "once"),
            (SHADES[4], "scores with", "key components,", "turned to t"),
            (SHADES[4], "average of", "all components"),
            (SHADES[8], "× un-mixing", "once"),
            (EXACT, "output"),
        ],
        "joint": [
            (EXACT, "query", "turned"),
            (SHADES[4], "rebuild keys", "of a block,", "turn them"),
            (SHADES[4], "scores with", "keys"),
            (SHADES[4], "average of", "all components"),
            (SHADES[8], "× un-mixing", "once"),
            (EXACT, "output"),
        ],
    }
    y = 12
    for name, chain in steps.items():
        parts.append(text(10, y + 14, name, 14, "start"))
        for index, (fill, *words) in enumerate(chain):
            x = 10 + 119 * index
            parts.append(box(x, y + 24, 105, 58, fill, *words))
            if index:
                parts.append(arrow(x - 13, y + 53, x - 1, y + 53))
        y += 100
    for x, fill, words in (
        (10, EXACT, "exact"),
        (150, SHADES[8], "once for each new token"),
        (370, SHADES[4], "for every token"),
    ):
        parts += [box(x, y + 6, 14, 14, fill), text(x + 20, y + 18, words, 12, "start")]
    return drawing(720, y + 30, "How packed caches are read", parts)


def main() -> None:
    """Write, or compare and leave with 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    for name, content in (("cache", layout()), ("reading", reading())):
        path = ROOT / f"docs/{name}.svg"
        if not check:
            path.write_text(content, encoding="utf-8")
        elif not path.is_file() or path.read_text(encoding="utf-8") != content:
            sys.exit(f"{path.relative_to(ROOT)} is out of date: run scripts/drawings.py")


if __name__ == "__main__":
    main()
