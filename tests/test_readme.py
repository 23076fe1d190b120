"""The numbers of README.md and docs/choosing.md are those of the records."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_tables_and_figure_are_what_the_records_say():
    run = subprocess.run([sys.executable, "scripts/readme.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_drawings_are_up_to_date():
    run = subprocess.run([sys.executable, "scripts/drawings.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_times_of_the_experiment_are_those_of_the_benchmarks():
    results = json.loads((ROOT / "benchmarks/results/decode_model.json").read_text())["results"]
    one, four = (
        {side: f"{1 / x['median']:.2f}" for side, x in results[f"batch_{batch}"]["speedup"].items()} for batch in (1, 4)
    )
    experiment = " ".join((ROOT / "experiments/coding/README.md").read_text().split())
    assert f"takes {one['predictive20']} times as long, {four['predictive20']} with 4 sequences" in experiment
    assert f"`joint` {one['joint20']} and {four['joint20']}" in experiment
    alone = json.loads((ROOT / "benchmarks/results/decode_attention.json").read_text())["results"]
    times = {
        side: [f"{1 / alone[f'queries_per_kv_head_{n}']['speedup'][side]['median']:.2f}" for n in (1, 8)]
        for side in ("predictive", "joint")
    }
    assert "{} times as long with one query for each kv head, {} with eight".format(*times["predictive"]) in experiment
    assert "`joint` {} and {}. `predictive` reads".format(*times["joint"]) in experiment


def test_figures_in_sentences_are_those_of_the_records():
    readme, serving = (" ".join((ROOT / name).read_text().split()) for name in ("README.md", "docs/serving.md"))
    recovery = json.loads((ROOT / "experiments/recovery/records/predictive.json").read_text())["results"]
    assert f"from {recovery['ratio_start']:.3f} to {recovery['ratio']:.3f}" in readme
    assert "Half an hour on one core" in readme
    assert 25 < recovery["seconds"] / 60 < 35
    capacity = json.loads((ROOT / "benchmarks/results/serving_capacity.json").read_text())["results"]
    before, after = (capacity[side]["tokens"] for side in ("original", "compressed"))
    assert f"{after / before:.2f} times as many tokens in one GiB" in readme
    assert f"| {before:,} |" in serving
    assert f"| {after:,} ({after / before:.2f} times as many) |" in serving
