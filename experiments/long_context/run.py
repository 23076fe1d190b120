"""Long contexts for several versions of one model, each compared prompt by prompt with the first.

Started again, it goes on where it was: every answer is kept as soon as it is there, and committed records of the same
weights and prompts are not made again.

    python experiments/long_context/run.py uncompressed=FOLDER default=FOLDER svd=FOLDER
"""

import argparse
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from mea.evaluate.long_context import LongContext, compare
from mea.evaluate.long_context.plan import LENGTHS
from mea.evaluate.runner import evaluate
from mea.records import write_record

RECORDS = Path(__file__).parent / "records"


def run(models: Mapping[str, str], plan: LongContext, work: Path, records: Path) -> None:
    """Evaluate one model after the other, then compare."""
    first, *others = models
    by_label = {}
    for label, source in models.items():
        began = time.perf_counter()
        done, record = work / f"{label}-long-context.json", records / f"{label}.json"
        if record.is_file() and not done.is_file():
            work.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(record, done)
        (by_label[label],) = evaluate(source, plan, work, label=label, progress=tell, say=print)
        print(f"{label}: {time.perf_counter() - began:.0f} s", flush=True)
        records.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(done, record)
    for label in others:
        write_record(records / f"paired-{label}-{first}.json", compare(by_label[label], by_label[first]))


def tell(what: str, done: int, of: int) -> None:
    print(f"{done:3} % {what}", flush=True)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="label=model")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--limit", type=int, help="prompts of each kind at each length")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("build/long_context"), help="for samples and resumption")
    parser.add_argument("--records", type=Path, default=RECORDS)
    options = parser.parse_args()
    if any("=" not in model for model in options.models):
        sys.exit("models are given as label=folder")
    models = dict(model.split("=", 1) for model in options.models)
    plan = LongContext(lengths=tuple(options.lengths), limit=options.limit, seed=options.seed, dtype="bfloat16")
    run(models, plan, options.work, options.records)


if __name__ == "__main__":
    main()
