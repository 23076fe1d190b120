"""Zero-shot tasks for several versions of one model, each compared item by item with the first.

Small tasks come first and HellaSwag last, and every model does a task before the next one begins: whenever this is
stopped, what is there can be compared. Started again, it goes on where it was; committed records of the same weights
and rows are not made again.

    python experiments/zero_shot/run.py DATA uncompressed=FOLDER default=FOLDER svd=FOLDER
"""

import argparse
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from mea.evaluate.harness.run import HarnessTasks, compare
from mea.evaluate.runner import evaluate
from mea.records import Record, write_record

TASKS = ("openbookqa", "winogrande", "arc_challenge", "piqa", "arc_easy", "hellaswag")
RECORDS = Path(__file__).parent / "records"
BATCH_TOKENS = 2048  # fixed: the last digits depend on it


def run(
    models: Mapping[str, str],
    data: str,
    work: Path,
    records: Path,
    limit: int | None,
    tasks: list[str],
    in_float32: list[str],
) -> None:
    """Evaluate and compare, task by task."""
    first, *others = models
    done: dict[str, list[Record]] = {label: [] for label in models}
    for task in tasks:
        for label, source in models.items():
            dtype = "float32" if label in in_float32 else "bfloat16"
            plan = HarnessTasks("zero-shot", (task,), data, limit, dtype, BATCH_TOKENS)
            began = time.perf_counter()
            name = f"{label}-{task}.json"
            known(records / name, work / name)
            (record,) = evaluate(source, plan, work, label=label)
            print(f"{task} {label}: {record['results']['metrics']} in {time.perf_counter() - began:.0f} s", flush=True)
            done[label].append(record)
            records.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(work / name, records / name)
        for label in others:
            write_record(records / f"paired-{label}-{first}.json", compare(done[label], done[first]))


def known(record: Path, work: Path) -> None:
    """Let the evaluation find a committed record, which it takes if it is of the same weights and rows."""
    if record.is_file() and not work.is_file():
        work.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(record, work)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="folder with a folder per task")
    parser.add_argument("models", nargs="+", metavar="label=model")
    parser.add_argument("--work", type=Path, default=Path("build/zero_shot"), help="for samples and resumption")
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--limit", type=int, help="only the first rows of each task")
    parser.add_argument("--float32", nargs="+", default=[], metavar="label", help="models to compute in float32")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    options = parser.parse_args()
    if any("=" not in model for model in options.models):
        sys.exit("models are given as label=folder")
    models = dict(model.split("=", 1) for model in options.models)
    run(models, options.data, options.work, options.records, options.limit, options.tasks, options.float32)


if __name__ == "__main__":
    main()
