"""The uncompressed model's zero-shot scores once more by lm-evaluation-harness's own model class, on the same rows.

    python experiments/zero_shot/harness.py DATA MODEL [--task TASK ...]

The class scores every text by itself in padded batches; this package's scorer computes shared beginnings once.
Items are compared one by one with ``records/uncompressed-TASK.json``.
"""

import argparse
import math
import time
from pathlib import Path
from typing import Any

from lm_eval import evaluator
from lm_eval.models.huggingface import HFLM

from mea.evaluate.harness.local_data import read_task
from mea.evaluate.harness.model import harness_task
from mea.evaluate.harness.run import numbers
from mea.evaluate.suites import ZERO_SHOT
from mea.models.loading import load
from mea.records import make_record, read_record, write_record

HERE = Path(__file__).parent
BATCH = 16


def check(lm: Any, name: str, data: str) -> dict[str, Any]:
    """Both ways' accuracies, and of how many items they say different things."""
    rows = read_task(data, name)
    ours = read_record(HERE / "records" / f"uncompressed-{name}.json")
    if ours["config"]["data"] != rows.digest:
        raise SystemExit(f"{name}: the record is of other rows than {data} has")
    began = time.perf_counter()
    evaluated: Any = evaluator.evaluate(lm, {"tasks": harness_task(name, rows)}, bootstrap_iters=0)
    theirs = [float(sample["acc"]) for sample in evaluated["samples"][name]]
    mine = numbers(ours["samples"]["acc"])
    mean = sum(theirs) / len(theirs)
    return {
        "items": len(theirs),
        "harness": mean,
        "standard_error": math.sqrt(mean * (1 - mean) / (len(theirs) - 1)),
        "mea": sum(mine) / len(mine),
        "items_that_differ": sum(a != b for a, b in zip(theirs, mine, strict=True)),
        "seconds_harness": time.perf_counter() - began,
        "seconds_mea": ours["results"]["seconds"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="folder with a folder per task")
    parser.add_argument("model")
    parser.add_argument("--task", action="append", choices=ZERO_SHOT, help="may be repeated; all if absent")
    options = parser.parse_args()
    model, tokenizer = load(options.model, "bfloat16")
    lm: Any = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=BATCH)  # pyright: ignore
    for name in options.task or ZERO_SHOT:
        results = check(lm, name, options.data)
        print(name, results, flush=True)
        config = {"task": name, "model": Path(options.model).name, "dtype": "bfloat16", "batch_size": BATCH}
        write_record(HERE / "records" / "harness" / f"{name}.json", make_record("reference", config, results=results))


if __name__ == "__main__":
    main()
