"""The README's numbers are those of the records."""

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_table_and_figure_are_what_the_records_say():
    run = subprocess.run([sys.executable, "scripts/readme.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_times_are_those_of_the_benchmarks():
    results = json.loads((ROOT / "benchmarks/results/decode_model.json").read_text())["results"]
    one, four = (
        {side: f"{1 / x['median']:.2f}" for side, x in results[f"batch_{batch}"]["speedup"].items()} for batch in (1, 4)
    )
    read = {name: " ".join((ROOT / name).read_text().split()) for name in ("README.md", "docs/choosing.md")}
    read["experiment"] = " ".join((ROOT / "experiments/coding/README.md").read_text().split())
    assert f"{one['predictive20']} times as long with `predictive` at 20 %" in read["README.md"]
    assert f"{one['joint20']} times with `joint` and {one['4 bits']} times with 4 bits" in read["README.md"]
    for row, side in (
        ("`mea compress MODEL OUT`", "predictive20"),
        ("`--method joint`", "joint20"),
        ("bits 4`", "4 bits"),
    ):
        assert re.search(rf"{row}[^|]*\|[^|]*\| {one[side]} \|", read["docs/choosing.md"]), row
    assert f"takes {one['predictive20']} times as long, {four['predictive20']} with 4 sequences" in read["experiment"]
    assert f"`joint` {one['joint20']} and {four['joint20']}" in read["experiment"]
    alone = json.loads((ROOT / "benchmarks/results/decode_attention.json").read_text())["results"]
    times = {
        side: [f"{1 / alone[f'queries_per_kv_head_{n}']['speedup'][side]['median']:.2f}" for n in (1, 8)]
        for side in ("predictive", "joint")
    }
    assert (
        "{} times as long with one query for each kv head, {} with eight".format(*times["predictive"])
        in read["experiment"]
    )
    assert "`joint` {} and {}. `predictive` reads".format(*times["joint"]) in read["experiment"]
