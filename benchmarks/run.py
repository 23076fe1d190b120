"""Measure decoding on this machine: a table for the reader, and records for everything else.

    python benchmarks/run.py [--only attention] [--compressed FOLDER FOLDER] [--out FOLDER]

The numbers mean something on a machine that does nothing else meanwhile; the load average is recorded beside them.
"""

import argparse
import os
import sys
from pathlib import Path
from statistics import median
from typing import Any

import decode_attention
import decode_model
import torch
from rich.console import Console
from rich.table import Table
from timing import limits
from transformers import AutoModelForCausalLM

from mea.compression import Calibration, compress
from mea.evaluate.speed import use_packed_decode
from mea.models.loading import load, packaged_model
from mea.records import make_record, write_record

RESULTS = Path(__file__).parent / "results"
READINGS = ("predictive", "joint")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["attention", "model"], help="one of the two benchmarks")
    parser.add_argument("--source", help="the uncompressed model; SmolLM2-135M from its package if absent")
    parser.add_argument(
        "--compressed", nargs="+", default=[], help="folders of that model compressed; made here at a fifth if absent"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the records")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def attention_part(args: argparse.Namespace) -> dict[str, Any]:
    return {"config": decode_attention.CONFIG, **decode_attention.measure(decode_attention.CONFIG, args.seed)}


def model_part(args: argparse.Namespace) -> dict[str, Any]:
    config = decode_model.CONFIG
    source = args.source or packaged_model()
    model, tokenizer = load(source, dtype=config["dtype"])
    packed = {
        Path(folder).name: AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype).eval()
        for folder in args.compressed
    }
    if not packed:
        calibration = Calibration(tokens=2048)  # little: the time depends on how many bits there are, not on which
        packed = {name: compress(model, tokenizer, method=name, calibration=calibration) for name in READINGS}
    codes = {name: compressed.config.cache_code for name, compressed in packed.items()}
    models = {"uncompressed": use_packed_decode(model), **packed}
    return {
        "config": {**config, "source": Path(source).name, "codes": codes},
        **decode_model.measure(models, config, args.seed),
    }


def record_of(kind: str, measured: dict[str, Any], before: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """A record with the machine's limits, measured before and after, and each side's share of the bandwidth."""
    after = limits()
    machine = {name: max(before["results"][name], after["results"][name]) for name in after["results"]}
    results = measured["results"]
    for name, result in results.items():
        result["milliseconds"] = {side: 1e3 * median(x) for side, x in measured["samples"][name].items()}
        result["share_of_bandwidth"] = {
            side: result["bytes_read"][side] / (result["milliseconds"][side] / 1e3) / machine["read_bytes_per_second"]
            for side in result["milliseconds"]
        }
        result["bars_met"] = {side: result["speedup"][side]["median"] >= bar for side, bar in result["bars"].items()}
    samples = {**measured["samples"], "limits_before": before["samples"], "limits_after": after["samples"]}
    seeds = {"everything": args.seed}
    return make_record(kind, measured["config"], results={**results, "limits": machine}, samples=samples, seeds=seeds)


def show(records: list[dict[str, Any]], console: Console) -> None:
    table = Table(title="Decoding: packed caches against the uncompressed model in its fastest form, bfloat16")
    for title in ("", "ms", "time ratio (range)", "at most", "of bandwidth"):
        table.add_column(title, no_wrap=True)
    for record in records:
        for name, result in record["results"].items():
            if name == "limits":
                continue
            for side, milliseconds in result["milliseconds"].items():
                speedup, bar = result["speedup"].get(side), result["bars"].get(side)
                met = bar and ("met" if result["bars_met"][side] else "missed")
                low, middle, high = (1 / speedup[x] for x in ("highest", "median", "lowest")) if speedup else (1, 1, 1)
                table.add_row(
                    f"{record['kind'].removeprefix('decode_')}, {name}, {side}".replace("_", " "),
                    f"{milliseconds:.2f}",
                    f"{middle:.2f} ({low:.2f} to {high:.2f})" if speedup else "1",
                    f"{1 / bar:.2f} {met}" if bar else "",
                    f"{result['share_of_bandwidth'][side]:.0%}",
                )
    console.print(table)
    found = records[-1]["results"]["limits"]
    console.print(
        f"{torch.get_num_threads()} threads; load average {os.getloadavg()[0]:.1f}; memory read "
        f"{found['read_bytes_per_second'] / 1e9:.1f} GB/s; products in bf16 "
        f"{found['bfloat16_operations_per_second'] / 1e9:.0f} GFLOP/s, in fp32 "
        f"{found['float32_operations_per_second'] / 1e9:.0f} (AMX: {'yes' if found['has_amx'] else 'no'})"
    )


def main() -> None:
    args, records = arguments(), []
    console = Console() if sys.stdout.isatty() else Console(width=120)
    parts = {"attention": attention_part, "model": model_part}
    for name, part in parts.items():
        if args.only in (None, name):
            console.print(f"Measuring {name}; leave the machine alone meanwhile")
            before = limits()
            record = record_of(f"decode_{name}", part(args), before, args)
            write_record(args.out / f"decode_{name}.json", record)
            records.append(record)
    show(records, console)


if __name__ == "__main__":
    main()
