"""Measure decoding on this machine: a table for the reader, and records for everything else.

    python benchmarks/run.py [--only attention] [--compressed FOLDER] [--out FOLDER]

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

from mea.evaluate.speed import use_packed_decode
from mea.models.loading import load, packaged_model
from mea.records import make_record, write_record

RESULTS = Path(__file__).parent / "results"
COMPRESSED = {"decode_attention": "absorbed", "decode_model": "compressed"}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["attention", "model"], help="one of the two benchmarks")
    parser.add_argument("--source", help="the uncompressed model; SmolLM2-135M from its package if absent")
    parser.add_argument("--compressed", help="a folder with that model compressed; a truncation if absent")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the records")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def attention_part(args: argparse.Namespace) -> dict[str, Any]:
    config = {**decode_attention.CONFIG, "dtype": args.dtype}
    return {"config": config, **decode_attention.measure(config, args.seed)}


def model_part(args: argparse.Namespace) -> dict[str, Any]:
    config = {**decode_model.CONFIG, "dtype": args.dtype}
    source = args.source or packaged_model()
    model, _ = load(source, dtype=config["dtype"])
    if args.compressed:
        compressed = AutoModelForCausalLM.from_pretrained(args.compressed, dtype=model.dtype).eval()
    else:
        compressed = decode_model.truncated(model, config["keep"])
    models = {"uncompressed": use_packed_decode(model), "compressed": compressed}
    names = {"source": Path(source).name, "compressed": args.compressed and Path(args.compressed).name}
    config = {**config, **names, "ranks": compressed.config.latent_ranks, "code": compressed.config.cache_code}
    return {"config": config, **decode_model.measure(models, config, args.seed)}


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
        result["bar_met"] = result["speedup"]["median"] >= result["bar"]
    samples = {**measured["samples"], "limits_before": before["samples"], "limits_after": after["samples"]}
    seeds = {"everything": args.seed}
    return make_record(kind, measured["config"], results={**results, "limits": machine}, samples=samples, seeds=seeds)


def show(records: list[dict[str, Any]], console: Console) -> None:
    dtype = records[-1]["config"]["dtype"]
    table = Table(title=f"Decoding: compressed cache against the uncompressed model in its fastest form, {dtype}")
    for title in ("", "uncompressed", "compressed", "times as fast (range)", "bar", "of bandwidth"):
        table.add_column(title, no_wrap=True)
    for record in records:
        for name, result in record["results"].items():
            if name == "limits":
                continue
            speedup, sides = result["speedup"], ("uncompressed", COMPRESSED[record["kind"]])
            table.add_row(
                f"{record['kind'].removeprefix('decode_')}, {name}".replace("_", " "),
                *(f"{result['milliseconds'][side]:.2f} ms" for side in sides),
                f"{speedup['median']:.2f} ({speedup['lowest']:.2f} to {speedup['highest']:.2f})",
                f"{result['bar']} {'met' if result['bar_met'] else 'missed'}",
                " -> ".join(f"{result['share_of_bandwidth'][side]:.0%}" for side in sides),
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
            of = f"_{Path(args.compressed).name}" if args.compressed and name == "model" else ""
            write_record(args.out / f"decode_{name}_{args.dtype}{of}.json", record)
            records.append(record)
    show(records, console)


if __name__ == "__main__":
    main()
